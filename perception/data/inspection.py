"""Inspects a whole nuScenes-format dataset: tables, maps, splits and images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from perception.data.lane_map import LaneMap
from perception.data.loader import open_image
from perception.data.splits import custom_splits, split_scenes
from perception.data.table_checks import check_tables
from perception.data.tables import SHOWN, Finding, inside_root, read_tables
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
    findings = check_tables(dataroot, version)
    try:
        tables = read_tables(dataroot / version)
    except DataError:
        return version, findings
    findings += _maps(dataroot, tables["log"])
    findings += _splits(dataroot / version, tables["scene"])
    findings += _images(dataroot, dataroot / version, tables, progress)
    return version, sorted(findings, key=lambda finding: finding.severity != "error")


def _maps(dataroot: Path, logs: list[dict[str, Any]]) -> Iterator[Finding]:
    """Reads the map expansion of each location."""
    for location in sorted({str(log.get("location")) for log in logs}):
        path = dataroot / "maps" / "expansion" / f"{location}.json"
        if inside_root(f"maps/expansion/{location}.json"):
            try:
                LaneMap(path)
            except DataError as error:
                yield Finding("error", str(path), "", (), 0, str(error).removeprefix(f"{path}").lstrip(": "))


def _splits(folder: Path, scenes: list[dict[str, Any]]) -> Iterator[Finding]:
    """Reads the dataset's own splits. Named splits may list scenes of a larger dataset, but not only those."""
    path = folder / "splits.json"
    try:
        splits = custom_splits(path)
    except DataError as error:
        yield Finding("error", str(path), "", (), 0, str(error).removeprefix(f"{path} "))
        return
    names = [str(scene.get("name")) for scene in scenes]
    for split in splits:
        try:
            split_scenes(split, folder, names)
        except DataError as error:
            yield Finding("warning", str(path), "", (), 0, f"has a split that cannot be used: {error}")


def _images(dataroot: Path, folder: Path, tables: dict[str, list[dict[str, Any]]], progress: bool) -> Iterator[Finding]:
    """Opens the images of all keyframes and compares their sizes with the tables; pixels are not decoded."""
    modality = {row.get("token"): row.get("modality") for row in tables["sensor"] if isinstance(row.get("token"), str)}
    cameras = {
        row["token"]
        for row in tables["calibrated_sensor"]
        if isinstance(row.get("token"), str)
        and isinstance(row.get("sensor_token"), str)
        and modality.get(row["sensor_token"]) == "camera"
    }
    missing: list[str] = []
    wrong: list[tuple[str, str]] = []
    rows = [row for row in tables["sample_data"] if row.get("is_key_frame") is True]
    for row in tqdm(rows, desc="images", unit="file", disable=not progress, delay=2):
        name, token, calibration = row.get("filename"), row.get("token"), row.get("calibrated_sensor_token")
        size = (row.get("height"), row.get("width"))
        if not isinstance(calibration, str) or calibration not in cameras or {type(x) for x in size} != {int}:
            continue
        if not isinstance(name, str) or not name or not inside_root(name):
            continue
        if not os.path.isfile(dataroot / name):
            missing.append(f"{token}")
            continue
        try:
            with open_image(dataroot / name, size):  # type: ignore[arg-type]
                pass
        except DataError as error:
            wrong.append((f"{token}", str(error)))
    file = str(folder / "sample_data.json")
    if missing:
        problem = "names an image that is missing: copy the dataset's images again"
        yield Finding("error", file, "filename", tuple(missing[:SHOWN]), len(missing), problem)
    if wrong:
        tokens = tuple(token for token, _ in wrong[:SHOWN])
        yield Finding("error", file, "filename", tokens, len(wrong), f"names an image that is refused: {wrong[0][1]}")
