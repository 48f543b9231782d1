"""Checks the installation, or a dataset. Exit code 2 if something is wrong.

Without a command it checks packages, devices and shipped weights. `data` checks every record of a nuScenes-format
dataset, its maps, splits and images, and lists all faults at once.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from perception.cli import command_parser

EXAMPLE = """examples:
  perception doctor
  perception doctor data out/town --json out/faults.json
"""
PACKAGES = (
    "torch", "torchvision", "numpy", "nuscenes-devkit", "mmengine-lite", "mmcv-lite", "mmcv", "mmdet", "mmdet3d",
    "shapely", "embreex",
)  # fmt: skip
HEAVY = ("mmcv", "mmdet", "mmdet3d", "mmengine", "nuscenes", "matplotlib", "cv2")
LIGHT = (
    f"import sys, perception, perception.inference.predictor; print(*[name for name in {HEAVY} if name in sys.modules])"
)


def installed() -> list[tuple[str, str, str]]:
    """Name, version and what is wrong with it, of Python and every package of interest."""
    from packaging.requirements import Requirement

    supported = (3, 10) <= sys.version_info < (3, 13)
    rows = [("python", platform.python_version(), "" if supported else "3.10, 3.11 or 3.12 is needed")]
    try:
        requirements = [Requirement(text) for text in metadata.requires("driving-perception") or ()]
        rows.append(("driving-perception", metadata.version("driving-perception"), ""))
    except metadata.PackageNotFoundError:
        requirements = []
        rows.append(("driving-perception", "none", "install it: pip install -e . in the checkout"))
    needed = {one.name: one.specifier for one in requirements if not one.marker}
    for name in PACKAGES:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            rows.append((name, "none", f"install {name}{needed[name]}" if name in needed else ""))
            continue
        fits = name not in needed or needed[name].contains(version, prereleases=True)
        rows.append((name, version, "" if fits else f"{needed[name]} is needed"))
    return rows


def library() -> list[tuple[str, str, str]]:
    """Devices, threads, the shipped weights, and the weight of an import."""
    import torch

    from perception.errors import CheckpointError
    from perception.inference.acceleration import choose_precision
    from perception.models.checkpoint import load_model, shipped_weights

    devices = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    rows = [("devices", ", ".join(["cpu", *devices]), "")]
    rows.append(("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores", ""))
    for device in ["cpu", "cuda"][: 1 + torch.cuda.is_available()]:
        precision, reason = choose_precision("auto", torch.device(device))
        rows.append((f"precision on {device}", f"{precision} ({reason})", ""))
    try:
        path = shipped_weights()
        model = load_model(path)
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        rows.append(("shipped weights", f"{path.stem}, {millions:.2f} M parameters", ""))
    except CheckpointError as error:
        rows.append(("shipped weights", "none", str(error)))
    run = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    loaded = run.stdout.split() if run.returncode == 0 else ["an error"]
    rows.append(
        ("import perception", "light" if not loaded else "heavy", f"it loads {', '.join(loaded)}" * bool(loaded))
    )
    return rows


def check_dataset(arguments: argparse.Namespace) -> int:
    """Prints all findings about a dataset."""
    from perception.data.inspection import inspect_dataset
    from perception.files import check_writable, write_json

    if arguments.json:
        check_writable("--json", arguments.json)
    version, findings = inspect_dataset(arguments.root, arguments.version, progress=True)
    errors = sum(finding.severity == "error" for finding in findings)
    rows = [
        (finding.severity, Path(finding.file).name, str(finding.total or "file"), finding.sentence())
        for finding in findings
    ]
    for row in [("severity", "file", "records", "first record")] * bool(rows) + rows:
        print(f"{row[0]:10s}{row[1]:26s}{row[2]:>8s}  {row[3]}")
    print(f"{arguments.root / version}: {errors} errors, {len(findings) - errors} warnings")
    if arguments.json:
        content = {"dataroot": str(arguments.root), "version": version, "errors": errors}
        write_json(arguments.json, content | {"findings": [finding.as_dict() for finding in findings]})
    return 2 if errors else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser("doctor", __doc__, EXAMPLE)
    commands = parser.add_subparsers(metavar="COMMAND")
    data = commands.add_parser("data", help="check a dataset in nuScenes format")
    data.set_defaults(function=check_dataset)
    data.add_argument("root", type=Path, help="root of the dataset")
    data.add_argument("--version", help="folder of its tables (default: the only one)")
    data.add_argument("--json", type=Path, help="file for all findings")
    arguments = parser.parse_args(argv)
    if hasattr(arguments, "function"):
        return arguments.function(arguments)
    rows = installed() + library()
    for name, value, problem in rows:
        print(f"{name:20s}{value:32s}{problem or 'ok'}")
    return 2 if any(problem for _, _, problem in rows) else 0
