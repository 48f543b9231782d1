"""Inspects a whole nuScenes-format dataset: tables, maps, splits and images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from perception.data.checked_tables import inspect_tables
from perception.data.findings import SHOWN, Finding
from perception.data.lane_map import LaneMap
from perception.data.loader import open_image
from perception.data.splits import custom_splits, split_scenes
from perception.data.table_checks import TableCheck
from perception.data.tables import inside_root
from perception.errors import DataError


def inspect_dataset(dataroot: Path, version: str | None = None, progress: bool = False) -> tuple[str, list[Finding]]:
    """Finds everything that the library would refuse in a dataset, and what is implausible.

    Args:
        dataroot: root of the dataset.
        version: folder of the tables; may be None if there is one.
        progress: show a progress bar of the images on stderr.

    Returns:
        The version, and all findings, errors first. Tables that cannot be read end the inspection.

    Raises:
        DataError: the folder does not exist, or `version` is needed.
    """
    if not dataroot.is_dir():
        raise DataError(f"{dataroot} is not a folder: give the root of a nuScenes-format dataset")
    found = sorted(path.parent.name for path in dataroot.glob("*/sample.json"))
    if version is None and len(found) != 1:
        raise DataError(f"{dataroot} has the versions {', '.join(found) or 'none'}: give one of them as --version")
    version = version or found[0]
    if not (dataroot / version).is_dir():
        raise DataError(f"{dataroot / version} is not a folder: give one of {', '.join(found) or 'none'} as --version")
    findings, check = inspect_tables(dataroot, version)
    if check is None:
        return version, findings
    findings += _maps(dataroot, check.column("log", "location"))
    findings += _splits(dataroot / version, check.column("scene", "name"))
    findings += _images(dataroot, check, progress)
    return version, sorted(findings, key=lambda finding: finding.severity != "error")


def _maps(dataroot: Path, locations: Sequence[object]) -> Iterator[Finding]:
    """Reads the map expansion of each location."""
    for location in sorted({location for location in locations if isinstance(location, str)}):
        path = dataroot / "maps" / "expansion" / f"{location}.json"
        if inside_root(f"maps/expansion/{location}.json"):
            try:
                LaneMap(path)
            except DataError as error:
                yield Finding("error", str(path), "", (), 0, str(error).removeprefix(f"{path}").lstrip(": "))


def _splits(folder: Path, scene_names: Sequence[object]) -> Iterator[Finding]:
    """Reads the dataset's own splits. Named splits may list scenes of a larger dataset, but not only those."""
    path = folder / "splits.json"
    try:
        splits = custom_splits(path)
    except DataError as error:
        yield Finding("error", str(path), "", (), 0, str(error).removeprefix(f"{path} "))
        return
    names = list(map(str, scene_names))
    for split in splits:
        try:
            split_scenes(split, folder, names)
        except DataError as error:
            yield Finding("warning", str(path), "", (), 0, f"has a split that cannot be used: {error}")


def _images(dataroot: Path, check: TableCheck, progress: bool) -> Iterator[Finding]:
    """Opens the images of all keyframes and compares their sizes with the tables; pixels are not decoded."""
    files = check.keyframes
    good = np.append(check.is_camera, False)[files.calibration] & (files.size > 0).all(1)
    missing: list[int] = []  # rows
    wrong: list[tuple[int, str]] = []
    for number in tqdm(np.flatnonzero(good).tolist(), desc="images", unit="file", disable=not progress, delay=2):
        if not (name := os.fsdecode(files.path[number])):  # malformed, which the check has found
            continue
        path, (height, width), row = dataroot / name, files.size[number].tolist(), int(files.row[number])
        if not path.is_file():
            missing.append(row)
            continue
        try:
            with open_image(path, (height, width)):
                pass
        except DataError as error:
            wrong.append((row, str(error)))
    for rows, problem in (
        (missing, "names an image that is missing: copy the dataset's images again"),
        ([row for row, _ in wrong], f"names an image that is refused: {wrong[0][1] if wrong else ''}"),
    ):
        if rows:
            tokens = tuple(check.label("sample_data", row) for row in rows[:SHOWN])
            yield Finding("error", str(check.folder / "sample_data.json"), "filename", tokens, len(rows), problem)
