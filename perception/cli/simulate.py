"""Generates scenes of the synthetic town: a dataset in nuScenes format, or recordings as a vehicle makes them."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from perception.cli import command_parser, number
from perception.files import check_writable, write_json

EXAMPLE = """examples:
  perception simulate --out data/town --scenes 20 --seed 7 --image-size 256x448
  perception simulate --out data/fisheye --scenes 4 --seed 7 --rig surround_fisheye --scale 0.5
  perception simulate --out data/bags --scenes 2 --seed 7 --sweeps --format bag
  perception simulate --out data/nuscenes --scenes 10 --version v1.0-mini
"""
FORMATS = ("nuscenes", "bag", "sqlite-bag", "ros1-bag", "video", "folder")


def image_size(text: str) -> tuple[int, int]:
    """Parses HEIGHTxWIDTH."""
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 256x448") from None
    return height, width


def summarise(tables: Path, seconds: float) -> dict:
    """Numbers of the finished dataset: scenes, keyframes, pictures, and boxes with LiDAR points per class."""
    from nuscenes.eval.detection.utils import category_to_detection_name

    def table(name: str) -> list[dict]:
        return json.loads((tables / f"{name}.json").read_text(encoding="utf-8"))

    categories = {row["token"]: row["name"] for row in table("category")}
    names = {row["token"]: categories[row["category_token"]] for row in table("instance")}
    boxes = Counter(
        category_to_detection_name(names[row["instance_token"]]) or "other"
        for row in table("sample_annotation")
        if row["num_lidar_pts"] > 0
    )
    return {
        "scenes": len(table("scene")),
        "keyframes": len(table("sample")),
        "pictures": sum(row["fileformat"] == "jpg" for row in table("sample_data")),
        "boxes": dict(boxes.most_common()),
        "seconds": round(seconds, 1),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_parser("simulate", __doc__, EXAMPLE)
    parser.add_argument("--out", type=Path, required=True, help="dataset root to create; must not exist or be empty")
    parser.add_argument("--scenes", type=int, default=20, help="number of scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the whole dataset (default: %(default)s)")
    parser.add_argument("--keyframes", type=int, default=10, help="keyframes per scene (default: %(default)s)")
    parser.add_argument("--rate", type=int, default=2, help="keyframes per second (default: 2, as nuScenes has)")
    parser.add_argument("--image-size", type=image_size, metavar="HxW", help="pixels (default: 256x448)")
    parser.add_argument(
        "--rig",
        help="rig file, or the name of a rig of the library, whose cameras are rendered (default: about nuScenes')",
    )
    parser.add_argument(
        "--scale", type=number(float, 0.01, 4), help="with --rig: factor of the image sizes that it names (default: 1)"
    )
    parser.add_argument("--split", help="name of the split in splits.json (default: town_val)")
    parser.add_argument(
        "--version",
        help="folder of the tables, v1.0-mini or v1.0-trainval, with the scene names of the devkit's splits of that "
        "version, for tools that take no other (default: v1.0-synthetic)",
    )
    parser.add_argument("--workers", type=int, default=None, help="processes (default: all CPU cores)")
    parser.add_argument("--sweeps", action="store_true", help="camera pictures between keyframes too, 10 Hz in all")
    parser.add_argument(
        "--rare",
        type=float,
        default=0.0,
        metavar="0..1",
        help="more of the rare classes: trucks, buses, trailers, cycles, work sites (default: 0)",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="nuscenes",
        help="bags of ROS 2 (MCAP or SQLite) or ROS 1, or for each scene a folder of videos or images with calibration "
        "and poses (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, default=None, help="write the summary to this file as well")
    args = parser.parse_args(argv)

    from perception.errors import ConfigError
    from perception.files import scratch_folder
    from perception.recordings.convert import check_convertible, convert_dataset
    from perception.rigs import Rig
    from perception.synthetic import VERSION, simulate
    from perception.synthetic.sensors import SIX_CAMERAS

    if args.rig and args.image_size:
        raise ConfigError("--image-size: the rig has the size of each camera's images; give --scale to change them")
    if args.scale and not args.rig:
        raise ConfigError("--scale belongs to --rig; give --image-size instead")
    rig = Rig.load(args.rig).scaled(args.scale or 1) if args.rig else SIX_CAMERAS
    if args.json:
        check_writable("--json", args.json)
    start = time.perf_counter()
    version = args.version or VERSION
    settings = {
        "scenes": args.scenes, "seed": args.seed, "keyframes": args.keyframes, "rate": args.rate,
        "image_size": args.image_size or (256, 448), "split": args.split, "workers": args.workers,
        "sweeps": args.sweeps, "rare": args.rare, "rig": rig, "version": version,
    }  # fmt: skip
    if args.format == "nuscenes":
        simulate(args.out, **settings)
        summary = summarise(args.out / version, time.perf_counter() - start)
    else:
        check_convertible(args.format, args.out)
        with scratch_folder("town") as scratch:
            simulate(scratch / "town", **settings)
            convert_dataset(scratch / "town", version, args.out, args.format)
            summary = summarise(scratch / "town" / version, time.perf_counter() - start)
    for name in ("scenes", "keyframes", "pictures"):
        print(f"{name:24s}{summary[name]:>10d}")
    for name, count in summary["boxes"].items():
        print(f"{'boxes ' + name:24s}{count:>10d}")
    print(f"{'seconds':24s}{summary['seconds']:>10.1f}")
    if args.json:
        write_json(args.json, summary)
