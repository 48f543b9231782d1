"""Runs inference on one sample, draws the result with the ground truth, and writes boxes and lines as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from perception.cli import command_parser, number, output_file

EXAMPLE = """examples:
  perception predict --dataroot out/town --version v1.0-synthetic --split town_try --sample TOKEN \\
      --out out/sample.png --json out/sample.json
  perception predict --info sample.json --map-vectors map_vectors.json --out out/sample.png
  perception predict --info data/kitti/kitti_infos_val.pkl --sample 8 --data-prefix training/image_2 --out out/8.png

A sample of a dataset is predicted with the temporal memory of its scene, a sample of an info file without memory.
"""


def predict_sample(model, arguments):
    """Returns token, clip [B=1, T=1] with ground truth, objects and camera names of a sample of a dataset."""
    from collections import deque

    import numpy as np

    from perception.data.loader import collate
    from perception.data.nuscenes import NuScenesDataset
    from perception.errors import DataError
    from perception.inference.sequence import run_sequence

    dataset = NuScenesDataset(
        arguments.dataroot,
        arguments.version,
        arguments.split,
        image_size=model.config.image_size,
        points_per_line=100,
    )
    tokens = dataset.tokens
    sample = arguments.sample or tokens[-1]
    if sample not in tokens:
        raise DataError(
            f"{arguments.dataroot}: split '{arguments.split}' has no sample {sample}; its first is {tokens[0]}"
        )
    target = tokens.index(sample)
    start = int(np.flatnonzero(dataset.scene_of_sample == dataset.scene_of_sample[target])[0])
    clips = (collate([dataset[i]]) for i in range(start, target + 1))
    clip, scene, _ = deque(run_sequence(model, clips), maxlen=1).pop()  # what comes before the sample fills the memory
    return sample, clip, scene, dataset.cameras


def predict_info(model, arguments):
    """As `predict_sample`, of an entry of an info file."""
    from perception.data.infos import read_info
    from perception.data.loader import collate, pad_lines
    from perception.data.map_vectors import load_map_vectors
    from perception.errors import DataError
    from perception.inference.sequence import run_sequence

    info = read_info(arguments.info, arguments.sample or arguments.index or 0)
    wanted = model.config.cameras
    if wanted is not None and len(info.cameras) != wanted:
        raise DataError(
            f"{info.name} has {len(info.cameras)} cameras, and {arguments.checkpoint} takes {wanted}; give weights "
            "that take any number, such as nano"
        )
    clip = info.clip(image_size=model.config.image_size, data_prefix=prefixes(arguments.data_prefix))
    if arguments.map_vectors:
        lines = pad_lines([load_map_vectors(arguments.map_vectors, info.global_from_ego())], 100)
        clip = clip._replace(gt=clip.gt._replace(lines=lines))
    clip, scene, _ = next(run_sequence(model, [collate([clip])]))
    return info.name, clip, scene, info.cameras


def prefixes(texts: Sequence[str] | None) -> dict[str, str] | None:
    """The folder by camera of `--data-prefix`, a folder alone under the key `img`; None without any."""
    if not texts:
        return None
    pairs = (text.partition("=") if "=" in text else ("img", "=", text) for text in texts)
    return {name: folder for name, _, folder in pairs}


def as_records(scene, min_score: float) -> dict:
    """Boxes and lines of one frame as plain JSON values, in the ego frame, metres and radians."""
    from perception.types import BOX_CLASSES, LINE_CLASSES

    boxes, lines = scene
    found = [int(m) for m in (boxes.valid & (boxes.score >= min_score)).nonzero()[:, 0]]
    drawn = [int(m) for m in (lines.valid & (lines.score >= min_score)).nonzero()[:, 0]]
    return {
        "boxes": [
            {
                "class": BOX_CLASSES[boxes.label[m]],
                "score": float(boxes.score[m]),
                "center": boxes.center[m].tolist(),
                "size": boxes.size[m].tolist(),
                "yaw": float(boxes.yaw[m]),
                "velocity": boxes.velocity[m].tolist(),
            }
            for m in found
        ],
        "lines": [
            {"class": LINE_CLASSES[lines.label[m]], "score": float(lines.score[m]), "points": lines.points[m].tolist()}
            for m in drawn
        ],
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_parser("predict", __doc__, EXAMPLE)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataroot", type=Path, help="nuScenes-format dataset")
    source.add_argument("--info", type=Path, help="info file of mmdet3d v1.1, .pkl or JSON")
    parser.add_argument("--version", help="folder of tables of the dataset")
    parser.add_argument("--split", help="split that holds the sample")
    parser.add_argument(
        "--sample",
        help="token (default: the last sample of the split); with --info the token or sample_idx of an entry",
    )
    parser.add_argument("--index", type=number(int, 0), help="with --info: number of the entry (default: 0)")
    parser.add_argument(
        "--data-prefix",
        nargs="+",
        metavar="[CAMERA=]FOLDER",
        help="with --info: where the images are, as in mmdet3d's data_prefix, relative to the info file (default: next "
        "to it, or where nuScenes, KITTI and Waymo have them)",
    )
    parser.add_argument("--map-vectors", type=Path, help="with --info: JSON of global polylines, drawn as ground truth")
    parser.add_argument(
        "--checkpoint",
        default="nano",
        help="a .safetensors file, or the name of weights that came with the library (default: %(default)s)",
    )
    parser.add_argument(
        "--min-score", type=number(float, 0, 1), default=0.3, help="score threshold (default: %(default)s)"
    )
    parser.add_argument("--out", type=output_file("--out"), required=True, help="picture to write, .png")
    parser.add_argument("--json", type=output_file("--json"), help="file for the predicted boxes and lines, ego frame")
    arguments = parser.parse_args(argv)

    from perception.errors import ConfigError
    from perception.files import check_dataset, replacing, write_json

    if arguments.out.suffix.lower() != ".png":
        raise ConfigError(f"--out {arguments.out}: the picture is a PNG; give a name that ends in .png")
    if arguments.dataroot:
        if missing := [name for name in ("version", "split") if getattr(arguments, name) is None]:
            raise ConfigError(f"--{missing[0]} is missing: with --dataroot give --version and --split too")
        check_dataset(arguments.dataroot, arguments.version)
    for name in ("index", "data_prefix", "map_vectors") if arguments.dataroot else ("version", "split"):
        if getattr(arguments, name) is not None:
            owner = "--info" if arguments.dataroot else "--dataroot"
            raise ConfigError(f"--{name.replace('_', '-')} belongs to {owner}; leave it out")
    if arguments.index is not None and arguments.sample is not None:
        raise ConfigError("--index and --sample both choose the entry of the info file; leave one out")

    from perception.models.checkpoint import load_model
    from perception.types import map_tensors
    from perception.visualization.pictures import draw_frame

    model = load_model(arguments.checkpoint)
    sample, clip, scene, cameras = (predict_info if arguments.info else predict_sample)(model, arguments)
    clip = map_tensors(lambda tensor: tensor[0, 0], clip)
    records = as_records(scene, arguments.min_score)
    picture = draw_frame(clip.frames, scene, clip.gt, cameras=cameras, caption=sample, min_score=arguments.min_score)
    with replacing(arguments.out) as beside:
        picture.save(beside, "PNG")
    if arguments.json:
        write_json(arguments.json, {"sample": sample, "frame": "ego"} | records)
    print(f"{'':8s}{'predicted':>10s}{'true':>8s}")
    for kind, gt in zip(("boxes", "lines"), clip.gt, strict=True):
        print(f"{kind:8s}{len(records[kind]):>10d}{int(gt.valid.sum()):>8d}")
