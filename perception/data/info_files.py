"""Reads info files in the format of mmdet3d v1.1.

An info file is JSON or a pickle: `{"metainfo": ..., "data_list": [...]}` as mmdet3d writes it, the list alone, or one
entry of it. Pickles are read as plain data, no code in them is run (see `perception.data.plain_pickle`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from perception.data.infos import InfoSample
from perception.data.plain_pickle import read_plain_pickle
from perception.errors import DataError
from perception.reading import parse_json, read_bytes, short, typed


def read_info(path: str | Path, sample: int | str = 0) -> InfoSample:
    """Reads one entry of an info file.

    Args:
        path: `.pkl` or JSON, see the module.
        sample: number of the entry, or its `token` (or `sample_idx`) as text.

    Raises:
        DataError: the file is missing, is no info file, or has no such entry.
    """
    path = Path(path)
    metainfo, entries = _content(path)
    return _sample(path, metainfo, entries, _index(path, entries, sample))


def read_infos(path: str | Path) -> tuple[Mapping[str, Any], list[InfoSample]]:
    """Reads all entries of an info file.

    Returns:
        `metainfo`, empty if the file has none, and the entries in the file's order.

    Raises:
        DataError: the file is missing, is no info file, or has no entry.
    """
    path = Path(path)
    metainfo, entries = _content(path)
    if not entries:
        raise DataError(f"{path} has no entry in data_list; give a file with samples")
    return metainfo, [_sample(path, metainfo, entries, index) for index in range(len(entries))]


def _content(path: Path) -> tuple[Mapping[str, Any], list]:
    """Returns `metainfo` and the entries of a file."""
    content = _read(path)
    metainfo: Any = {}
    if isinstance(content, Mapping) and "infos" in content:
        raise DataError(
            f"{path} is an info file of mmdet3d before v1.1; convert it with tools/dataset_converters/"
            "update_infos_to_v2.py of mmdet3d"
        )
    if isinstance(content, Mapping) and "data_list" in content:
        metainfo = typed(content.get("metainfo", {}), Mapping, f"{path}: metainfo", "an object")
        entries = typed(content["data_list"], list, f"{path}: data_list", "a list of samples")
    elif isinstance(content, Mapping) and "images" in content:
        entries = [content]
    elif isinstance(content, list):
        entries = content
    else:
        raise DataError(
            f"{path} is no info file of mmdet3d v1.1; give an object with data_list, a list of samples, or one sample "
            "with images"
        )
    return metainfo, entries


def _sample(path: Path, metainfo: Mapping[str, Any], entries: list, index: int) -> InfoSample:
    name, dataset = f"{path}, entry {index}", metainfo.get("dataset", "")
    if not isinstance(entries[index], Mapping):
        raise DataError(f"{name} is {short(entries[index])}; it must be an object with images")
    return InfoSample(
        path, name, entries[index], _categories(path, metainfo), dataset.lower() if isinstance(dataset, str) else ""
    )


def _index(path: Path, entries: list, sample: int | str) -> int:
    """Returns the number of an entry."""
    if isinstance(sample, int):
        if not 0 <= sample < len(entries):
            raise DataError(
                f"{path} has {len(entries)} entries in 'data_list': entry {sample} does not exist; give a lower"
            )
        return sample
    wanted: set[object] = {sample} | ({int(sample)} if sample.isdecimal() and len(sample) < 19 else set())
    for key in ("token", "sample_idx"):
        for index, entry in enumerate(entries):
            value = entry.get(key) if isinstance(entry, Mapping) else None
            if isinstance(value, str | int | np.integer) and value in wanted:
                return index
    raise DataError(f"{path} has no entry with token or sample_idx {short(sample)}; give one of its {len(entries)}")


def _categories(path: Path, metainfo: Mapping) -> dict[int, str] | None:
    """Returns the class names by label, None without any."""
    if metainfo.get("categories") is None:
        return None
    given = typed(metainfo["categories"], Mapping, f"{path}: metainfo.categories", "labels by class name")
    names = {}
    for name, label in given.items():
        if not isinstance(name, str) or not isinstance(label, int | np.integer) or isinstance(label, bool):
            raise DataError(f"{path}: metainfo.categories has {short(name)}: {short(label)}; give labels by name")
        if label >= 0 and int(label) in names:
            raise DataError(f"{path}: metainfo.categories gives label {short(label)} twice; give each class its own")
        if label >= 0:  # classes that are left out have -1
            names[int(label)] = name
    return names


def _read(path: Path) -> Any:
    """Reads a pickle or a JSON file; the content decides."""
    kind = "an info file of mmdet3d v1.1"
    data = read_bytes(path, kind)
    if data[:1] != b"\x80":  # the first byte of a pickle, and none of JSON
        return parse_json(path, data, kind)
    try:
        return read_plain_pickle(data)
    except ValueError as error:
        raise DataError(f"{path} is not a pickle of plain data ({error}): give {kind}") from None
