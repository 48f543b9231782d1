"""Splits of a nuScenes-format dataset: how far a pair of them leaks, one that does not leak, and info files of mmdet3d.

A split is one of the devkit's names, one of the dataset's splits.json, or a file of scene names.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from perception.cli import SEED, command_parser, number, output_file, output_folder

EXAMPLE = """examples:
  perception prepare-nuscenes leakage --dataroot data/nuscenes --version v1.0-trainval --train train --val val \\
      --json out/leakage.json --out out/leakage.png
  perception prepare-nuscenes split --dataroot data/nuscenes --version v1.0-trainval \\
      --min-distance 60 --seed 0 --out out/far_apart
  perception prepare-nuscenes leakage --dataroot data/nuscenes --version v1.0-trainval \\
      --train out/far_apart/train.txt --val out/far_apart/val.txt
  perception prepare-nuscenes infos --dataroot out/town_val --version v1.0-synthetic --split town_val \\
      --out out/town_val/infos_val.pkl
"""


def leakage(arguments, keyframes, tables: Path) -> None:
    """Prints how near the validation keyframes lie to the training keyframes."""
    from perception.data.leakage import draw_leakage, measure_leakage
    from perception.data.splits import split_scenes
    from perception.files import write_json

    train, val = (split_scenes(split, tables, keyframes.scene_name) for split in (arguments.train, arguments.val))
    result = measure_leakage(keyframes, train, val)
    print("share of validation keyframes within a distance of a training keyframe")
    print(result.table())
    print(f"scenes: {len(train)} in train, {len(val)} in val, {result.shared_scenes} in both")
    if arguments.json:
        write_json(arguments.json, {"train": arguments.train, "val": arguments.val} | result.as_dict())
    if arguments.out:
        draw_leakage(result, arguments.out, f"{arguments.val} (val) against {arguments.train} (train)")


def split(arguments, keyframes, tables: Path) -> None:
    """Writes a split that keeps a distance and prints what came of it."""
    from perception.data.geographic_split import geographic_split
    from perception.data.leakage import DISTANCES, measure_leakage
    from perception.data.splits import write_split_file
    from perception.files import write_json

    made = geographic_split(
        keyframes,
        min_distance=arguments.min_distance,
        seed=arguments.seed,
        val_share=arguments.val_share,
        max_left_out=arguments.max_left_out,
    )
    distances = sorted({*DISTANCES, arguments.min_distance})
    result = measure_leakage(keyframes, made.train, made.val, distances)
    if leaking := int((result.nearest <= arguments.min_distance).sum()):
        raise RuntimeError(f"{leaking} validation keyframes of the split that was made are too near to training")
    parts = {"train": made.train, "val": made.val, "left_out": made.left_out}
    command = f"--min-distance {arguments.min_distance:g} --seed {arguments.seed}"
    command += f" --val-share {arguments.val_share:g} --max-left-out {arguments.max_left_out:g}"
    for name, scenes in parts.items():
        path = arguments.out / f"{name}.txt"
        if scenes:
            write_split_file(path, scenes, f"{name} of {tables.name}, split {command}")
        else:
            path.unlink(missing_ok=True)  # of an earlier split in the same folder

    total = len(keyframes.xy)
    frames = {name: len(keyframes.of(scenes)[0]) for name, scenes in parts.items()}
    print(f"{'part':<26}{'scenes':>8}{'frames':>8}{'share':>10}")
    for name, scenes in parts.items():
        print(f"{name:<26}{len(scenes):>8}{frames[name]:>8}{frames[name] / total:>10.1%}")
    print(f"{made.groups} connected groups of scenes at {arguments.min_distance:g} m; none is divided")
    if abs(frames["val"] / total - arguments.val_share) > 0.1 * arguments.val_share:
        print(f"note: {arguments.val_share:.1%} was wanted in val; the groups do not come nearer without")
        print("leaving scenes out (--max-left-out), or with a smaller --min-distance")
    print("\nleakage of this split\n" + result.table())
    if arguments.json:
        summary = {name: {"scenes": len(scenes), "frames": frames[name]} for name, scenes in parts.items()}
        settings = {name: getattr(arguments, name) for name in ("min_distance", "seed", "val_share", "max_left_out")}
        write_json(arguments.json, settings | summary | {"groups": made.groups, "leakage": result.as_dict()})


def infos(arguments) -> None:
    """Writes an info file of mmdet3d v1.1 of a split."""
    from perception.data.info_writer import write_infos
    from perception.data.nuscenes import NuScenesDataset

    # Images are not read, so their size does not matter.
    dataset = NuScenesDataset(arguments.dataroot, arguments.version, arguments.split, image_size=(90, 160))
    write_infos(dataset, arguments.out)
    boxes = int(dataset.index.box_offset[-1])
    print(f"{arguments.out}: {len(dataset)} samples of {len(dataset.scene_names)} scenes, {boxes} boxes")
    if arguments.json:
        from perception.files import write_json

        write_json(arguments.json, {"samples": len(dataset), "scenes": len(dataset.scene_names), "boxes": boxes})


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_parser("prepare-nuscenes", __doc__, EXAMPLE)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    measure = commands.add_parser("leakage", help="how near validation lies to training")
    make = commands.add_parser("split", help="make a split that keeps a distance")
    write = commands.add_parser("infos", help="write an info file of mmdet3d v1.1")
    for command, function in ((measure, leakage), (make, split), (write, infos)):
        command.set_defaults(function=function)
        command.formatter_class, command.epilog = parser.formatter_class, parser.epilog
        command.add_argument("--dataroot", type=Path, required=True, help="root of a nuScenes-format dataset")
        command.add_argument("--version", required=True, help="folder of its tables, such as v1.0-trainval")
        command.add_argument("--json", type=output_file("--json"), help="file for the numbers")
    measure.add_argument("--train", required=True, help="name of the training split, or a file of scene names")
    measure.add_argument("--val", required=True, help="name of the validation split, or a file of scene names")
    measure.add_argument("--out", type=output_file("--out"), help="picture to write, .png: the keyframes on their maps")
    make.add_argument(
        "--min-distance", type=number(float, 0), required=True, help="metres between a val and a train keyframe"
    )
    make.add_argument("--seed", type=SEED, required=True, help="which of the possible splits")
    make.add_argument(
        "--val-share", type=number(float, 0, 1), default=0.15, help="keyframes wanted in val (default: %(default)s)"
    )
    make.add_argument(
        "--max-left-out",
        type=number(float, 0, 1),
        default=0.0,
        help="largest share of a location's scenes to leave out (default: 0)",
    )
    make.add_argument(
        "--out", type=output_folder("--out"), required=True, help="folder for train.txt, val.txt and left_out.txt"
    )
    write.add_argument("--split", required=True, help="name of a split, or a file of scene names")
    write.add_argument("--out", type=output_file("--out"), required=True, help="the info file, .pkl; best in the root")
    arguments = parser.parse_args(argv)

    from perception.errors import ConfigError
    from perception.files import check_dataset

    if arguments.function is leakage and arguments.out and arguments.out.suffix.lower() != ".png":
        raise ConfigError(f"--out {arguments.out}: the picture is a PNG; give a name that ends in .png")
    check_dataset(arguments.dataroot, arguments.version)
    if arguments.function is infos:
        infos(arguments)
        return

    from perception.data.leakage import read_keyframes  # the devkit, which takes seconds to load
    from perception.evaluation.detection import load_tables

    keyframes = read_keyframes(load_tables(arguments.dataroot, arguments.version))
    arguments.function(arguments, keyframes, arguments.dataroot / arguments.version)
