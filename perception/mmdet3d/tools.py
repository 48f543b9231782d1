"""Runs mmdet3d's own tools, `train.py`, `test.py` and `create_data.py`, which find the library's networks by name."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import mmdet3d
import torch

from perception.engine.weights import MMENGINE_CLASSES
from perception.errors import ConfigError

TOOLS = ("train", "test", "create_data")
_NUSCENES = Path("data/nuscenes")


def run_tool(name: str, arguments: Sequence[str]) -> None:
    """Runs a tool of mmdet3d in this process.

    Args:
        name: of `TOOLS`.
        arguments: of the tool, as mmdet3d documents them.

    Raises:
        ConfigError: there is no such tool, mmdet3d was installed without its tools, or create_data would not find the
            dataset.
    """
    if name not in TOOLS:
        raise ConfigError(f"mmdet3d has no tool {name!r} here; give one of {', '.join(TOOLS)}")
    root = Path(mmdet3d.__file__).parent / ".mim"
    path = root / "tools" / f"{name}.py"
    if not path.is_file():
        raise ConfigError(f"{path} is missing; install mmdet3d from its wheel: pip install mmdet3d==1.4.0")
    if name == "create_data" and "nuscenes" in arguments and not _NUSCENES.is_dir():
        raise ConfigError(
            f"{_NUSCENES} is no folder here, and create_data of mmdet3d reads the tables from it whatever --root-path "
            "says; start the command where the dataset, or a link to it, is data/nuscenes"
        )
    before = sys.argv, sys.path
    sys.argv, sys.path = [str(path), *arguments], [str(root), *sys.path]  # the tools import each other from there
    try:
        # mmdet3d 1.4 is older than torch 2.6, whose `torch.load` takes tensors and listed classes only.
        with torch.serialization.safe_globals(MMENGINE_CLASSES):
            runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv, sys.path = before
