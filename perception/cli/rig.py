"""Checks, imports and shows the calibration of the cameras of a vehicle.

`check` names what is wrong with a rig file, one sentence per finding, and exits with code 1 if there is a finding. With
images of the cameras it compares their sizes, colours and straight lines with the calibration. With --out it draws the
ground grid, the horizon and posts of 1.7 m into each image, the coverage from above, and a page with everything.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from perception.cli import command_parser, number, output_file, output_folder

if TYPE_CHECKING:
    from perception.rigs.rig import RigCamera

EXAMPLE = """examples:
  perception rig check rig.yaml --images drive/ --out out/rig
  perception rig check nuscenes --json out/rig.json
  perception rig import calib.txt --image-size 375x1242 --out rig.yaml
  perception rig show surround_fisheye
"""


def images_of(folder: Path, names: Sequence[str]) -> dict[str, list[Path]]:
    """Finds the images of cameras in a folder, sorted by name.

    Args:
        folder: files whose names, or whose folders' names, hold the name of a camera.
        names: of the cameras.

    Raises:
        DataError: there is no such folder, or no image of any camera in it.
    """
    from perception.errors import DataError
    from perception.recordings.folders import SUFFIXES
    from perception.recordings.recording import named_camera

    if not folder.is_dir():
        raise DataError(f"--images {folder} is not a folder; give one with images named after the cameras")
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES:
            place = str(path.relative_to(folder).with_suffix(""))
            name = named_camera(place, names)
            if name is not None:
                found.setdefault(name, []).append(path)
    if not found:
        raise DataError(f"--images {folder} has no image of {', '.join(names)}; put the camera's name into each file's")
    return found


def check(arguments: argparse.Namespace) -> int:
    """Prints the cameras and the findings, and draws them; returns 1 if there are findings."""
    import numpy as np

    from perception.data.loader import open_image
    from perception.files import replacing, write_json
    from perception.rigs.check import MOST_IMAGES, check_rig
    from perception.rigs.rig import read_cameras

    entries, _ = read_cameras(arguments.rig)
    images: dict[str, list[np.ndarray]] = {}
    if arguments.images:
        for name, paths in images_of(arguments.images, list(entries)).items():
            images[name] = []
            for path in paths[:: max(1, len(paths) // MOST_IMAGES)][:MOST_IMAGES]:
                with open_image(path) as image:
                    images[name].append(np.asarray(image.convert("RGB")))
    report = check_rig(entries, images, progress=True)
    print_table(report.rows())
    print(report.surroundings())
    for finding in report.findings:
        print(f"finding: {finding.sentence}")
    print(f"{arguments.rig}: {len(report.findings)} finding{'s' * (len(report.findings) != 1)}")
    if arguments.json:
        write_json(arguments.json, {"rig": str(arguments.rig)} | report.to_dict())
    if arguments.out:
        from perception.visualization.rig_check import draw_camera, draw_coverage, report_page

        arguments.out.mkdir(parents=True, exist_ok=True)
        pictures = {}
        for camera in report.cameras:
            fitting = [image for image in images.get(camera.name, ()) if image.shape[:2] == camera.image_size]
            pictures[camera.name] = draw_camera(camera, fitting[0] if fitting else None)
        coverage = draw_coverage(report.cameras, report.view)
        for name, picture in {**pictures, "coverage": coverage}.items():
            with replacing(arguments.out / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.png") as temporary:
                picture.save(temporary, "PNG")
        with replacing(arguments.out / "index.html") as temporary:
            temporary.write_text(report_page(str(arguments.rig), report, pictures, coverage), encoding="utf-8")
        print(f"pictures and page: {arguments.out / 'index.html'}")
    return 1 if report.findings else 0


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Prints rows of cells in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def import_file(arguments: argparse.Namespace) -> None:
    """Writes the rig file of a calibration of another format."""
    import numpy as np

    from perception.rigs.importers import import_rig
    from perception.rigs.rig import rigid_from_rpy

    given = arguments.ego_from_vehicle
    rig = import_rig(
        arguments.path,
        arguments.format,
        cameras=arguments.cameras,
        ego_from_vehicle=None if given is None else rigid_from_rpy(np.radians(given[3:]), given[:3]),
        scene=arguments.scene,
        image_size=arguments.image_size,
        poses=arguments.poses,
        base_frame=arguments.base_frame,
        intrinsics=arguments.intrinsics,
    )
    rig.save(arguments.out)
    show_cameras(rig.cameras)


def show(arguments: argparse.Namespace) -> None:
    """Prints the cameras of a rig that live use takes."""
    from perception.rigs.rig import Rig

    show_cameras(Rig.load(arguments.rig).cameras)


def show_cameras(cameras: Sequence[RigCamera]) -> None:
    """Prints cameras as a table, and what they see."""
    from perception.rigs.check import RigReport, surround_view

    report = RigReport(tuple(cameras), (), surround_view(cameras), {})
    print_table([row[:-1] for row in report.rows()])
    print(report.surroundings())


def main(argv: Sequence[str] | None = None) -> int:
    from perception.cli.simulate import image_size

    parser = command_parser("rig", __doc__, EXAMPLE)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    given = "a rig file, or the name of a rig of the library"
    checking = commands.add_parser("check", help="find what is wrong with a rig; exit code 1 if something is")
    checking.set_defaults(function=check)
    checking.add_argument("rig", help=given)
    checking.add_argument("--images", type=Path, help="folder with images whose names, or folders, name the camera")
    checking.add_argument("--out", type=output_folder("--out"), help="folder for pictures (PNG) and a page (HTML)")
    checking.add_argument("--json", type=output_file("--json"), help="file for the findings and what the cameras see")
    importing = commands.add_parser("import", help="make a rig file of a calibration of another format")
    importing.set_defaults(function=import_file)
    importing.add_argument("path", type=Path, help="calibration file or folder")
    importing.add_argument("--out", type=output_file("--out"), required=True, help="rig file to write, .yaml or .json")
    importing.add_argument("--format", help="of the calibration (default: recognised)")
    importing.add_argument("--cameras", nargs="+", metavar="NAME", help="cameras to keep, in this order (default: all)")
    importing.add_argument(
        "--ego-from-vehicle",
        nargs=6,
        type=number(float, -1000, 1000),
        metavar=("X", "Y", "Z", "ROLL", "PITCH", "YAW"),
        help="pose of the format's vehicle frame in the ego frame, metres and degrees (default: as it documents it)",
    )
    importing.add_argument("--scene", help="nuScenes: name of a scene (default: that of the first sample)")
    importing.add_argument("--image-size", type=image_size, metavar="HxW", help="KITTI object: size of the images")
    importing.add_argument("--poses", type=Path, help="ROS: URDF, static transforms as YAML, or a folder of Autoware")
    importing.add_argument("--base-frame", help="ROS and Autoware: the vehicle frame (default: base_link)")
    importing.add_argument("--intrinsics", type=Path, help="Autoware: folder of camera_info files")
    showing = commands.add_parser("show", help="print the cameras of a rig")
    showing.set_defaults(function=show)
    showing.add_argument("rig", help=given)
    arguments = parser.parse_args(argv)
    return arguments.function(arguments) or 0
