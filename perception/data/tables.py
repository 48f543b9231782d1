"""Reads the tables of a nuScenes-format dataset by columns, as arrays."""

from __future__ import annotations

import bisect
import gc
import json
import ntpath
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from enum import Enum
from functools import partial
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from perception.data.table_files import Block, Span, divided, read_blocks
from perception.errors import DataError
from perception.processes import in_processes, processors

MAX_PIXELS = 80_000_000  # of one image: 240 MB when decoded; cameras of vehicles have up to 12 million
LONGEST_PATH = 1000  # characters; file systems allow some more
SPAN = 1 << 23  # bytes of a table that a process reads at a time
MOST_READERS = 4  # processes; each needs 50 MB

Reader: TypeAlias = Callable[[Sequence[Any], Sequence[dict[str, Any]]], Any]


class Missing(Enum):
    """The value of a field that a record lacks. It stays itself when a process sends it to another one."""

    FIELD = 0


NOTHING = Missing.FIELD
NO_TOKEN = "\0"  # equals no token


# Readers turn the values of a field, as JSON has them or `NOTHING`, into arrays


class Lists(NamedTuple):
    """A column of lists of tokens."""

    counts: np.ndarray  # [R] int64, -1 where the value is no such list
    keys: np.ndarray  # [sum of the counts] int64, see `key_of`


class Paths(NamedTuple):
    """A column of paths, of which only those of keyframes are kept."""

    state: np.ndarray  # [R] int8: 1 for a path, 0 for an empty one, -1 for any other value
    keyframes: list[bytes]  # paths of the records whose 'is_key_frame' is true, in order


MALFORMED = -1  # `hash` never returns it
EMPTY = hash("")  # 0, and no other text in practice


def key_of(value: object) -> int:
    """Returns the hash of a token, by which records are found.

    Millions of tokens do not fit into memory as text. Python's hash has 64 bits, with another key in each process: two
    of the three million tokens of nuScenes have the same one in one of five million processes.
    """
    return hash(value) if isinstance(value, str) else MALFORMED


def as_they_are(values: Sequence[Any], records: Sequence[dict[str, Any]] = ()) -> list[Any]:
    """Keeps the values, for short tables."""
    return list(values)


def token_keys(values: Sequence[Any], records: Sequence[dict[str, Any]] = ()) -> np.ndarray:
    """Reads tokens, [R] int64, see `key_of`."""
    kind = hash if set(map(type, values)) <= {str} else key_of
    return np.fromiter(map(kind, values), np.int64, len(values))


def own_keys(values: Sequence[Any], records: Sequence[dict[str, Any]] = ()) -> np.ndarray:
    """Reads the tokens of the records themselves, which can be stored as bytes and read again."""
    if set(map(type, values)) <= {str} and storable("".join(values)):
        return np.fromiter(map(hash, values), np.int64, len(values))
    good = (isinstance(value, str) and storable(value) for value in values)
    return np.array([hash(v) if ok else MALFORMED for v, ok in zip(values, good, strict=True)], dtype=np.int64)


def token_lists(values: Sequence[Any], records: Sequence[dict[str, Any]] = ()) -> Lists:
    """Reads lists of tokens."""
    if set(map(type, values)) <= {list}:
        flat = list(chain.from_iterable(values))
        if set(map(type, flat)) <= {str}:
            counts = np.fromiter(map(len, values), np.int64, len(values))
            return Lists(counts, np.fromiter(map(hash, flat), np.int64, len(flat)))
    good = [isinstance(value, list) and all(isinstance(item, str) for item in value) for value in values]
    numbers = [len(value) if ok else -1 for value, ok in zip(values, good, strict=True)]
    known = chain.from_iterable(value for value, ok in zip(values, good, strict=True) if ok)
    return Lists(np.array(numbers, dtype=np.int64), np.fromiter(map(hash, known), np.int64))


def vectors(count: int) -> Reader:
    """Returns a reader of lists of `count` numbers: [R, count] float64, NaN where one is not finite."""

    def read(values: Sequence[Any], records: Sequence[dict[str, Any]] = ()) -> np.ndarray:
        array = None
        try:
            flat = list(chain.from_iterable(values))
            if set(map(len, values)) <= {count} and set(map(type, flat)) <= {int, float}:
                array = np.array(flat, dtype=np.float64).reshape(-1, count)
        except (TypeError, ValueError, OverflowError):
            pass
        if array is None:
            array = np.array([floats(value, (count,)) for value in values]).reshape(-1, count)
        array[~np.isfinite(array).all(1)] = np.nan
        return array

    return read


def wholes(values: Sequence[Any], records: Sequence[dict[str, Any]] = ()) -> np.ndarray:
    """Reads whole numbers from -2^62 to 2^62: [R] int64, `NO_NUMBER` where there is none."""
    if set(map(type, values)) <= {int}:
        try:
            array = np.array(values, dtype=np.int64)
            if not len(array) or (array.min() > -(2**62) and array.max() < 2**62):
                return array
        except OverflowError:
            pass
    good = (type(value) is int and -(2**62) < value < 2**62 for value in values)
    return np.array([v if ok else NO_NUMBER for v, ok in zip(values, good, strict=True)], dtype=np.int64)


NO_NUMBER = -(2**63)


def flags(values: Sequence[Any], records: Sequence[dict[str, Any]] = ()) -> np.ndarray:
    """Reads truth values: [R] int8, -1 where there is none."""
    if set(map(type, values)) <= {bool}:
        return np.array(values, dtype=np.int8)
    return np.array([1 if value is True else 0 if value is False else -1 for value in values], dtype=np.int8)


def keyframe_paths(values: Sequence[Any], records: Sequence[dict[str, Any]] = ()) -> Paths:
    """Reads paths below the root of the dataset."""
    if not (set(map(type, values)) <= {str} and _all_inside(values)):
        good = (isinstance(v, str) and storable(v) and (not v or inside_root(v)) for v in values)
        values = [value if ok else None for value, ok in zip(values, good, strict=True)]
    state = np.array([-1 if value is None else 1 if value else 0 for value in values], dtype=np.int8)
    kept = [
        os.fsencode(value or "")
        for value, record in zip(values, records, strict=True)
        if record.get("is_key_frame") is True
    ]
    return Paths(state, kept)


def _all_inside(names: Sequence[str]) -> bool:
    """Returns whether all names are paths below the root or empty, by a quick test that has false alarms."""
    lines = "\n" + "\n".join(names)
    odd = any(part in lines for part in ("..", ":", "\n/", "\n\\", "\n."))
    return not odd and storable(lines) and max(map(len, names), default=0) <= LONGEST_PATH


def inside_root(name: str) -> bool:
    """Returns whether a path stays below the folder that it is relative to, on any system."""
    if len(name) > LONGEST_PATH:
        return False
    if name[0] not in "/\\." and ".." not in name and ":" not in name:
        return True
    slashes = name.replace("\\", "/")
    absolute = slashes.startswith("/") or ntpath.splitdrive(name)[0] != ""
    return not absolute and posixpath.normpath(slashes).split("/")[0] != ".." and posixpath.normpath(slashes) != "."


class _Part(NamedTuple):
    """Columns of records of a table that follow each other."""

    columns: dict[str, Any]  # by field
    present: set[str]  # fields that a record has
    blocks: list[tuple[int, int, int]]  # row after the last one, from the first of the part, and place in the file


class Table:
    """The columns of one table. Several processes read a large one.

    Args:
        path: the file, which records are read from again for messages.
        readers: by field; only these columns are kept.
        records: the records if they are in memory; None reads the file.

    Raises:
        DataError: the table is missing, is not JSON, or is not a list of objects.
    """

    def __init__(
        self, path: Path, readers: Mapping[str, Reader], records: Sequence[dict[str, Any]] | None = None
    ) -> None:
        self.path, self.records = path, records
        self.blocks: list[tuple[int, int, int]] = []  # row after the last one, and place in the file
        self.kept: tuple[int, Sequence[dict[str, Any]]] = (-1, ())  # a block that was read again
        self.present: set[str] = set()  # fields that a record has
        self.rows = 0
        joined = _Joined()
        size = len(records) if records is not None else path.stat().st_size if path.is_file() else 0
        for part in _parts(path, readers) if records is None else [_part(_in_memory(records), readers, size)]:
            self.present |= part.present
            joined.add(part.columns, (part.blocks[-1][2] - part.blocks[0][1]) / size if part.blocks else 1.0)
            self.blocks += [(self.rows + row, start, stop) for row, start, stop in part.blocks]
            self.rows = self.blocks[-1][0] if self.blocks else 0
        self.columns = joined.columns()

    def record(self, row: int) -> Mapping[str, Any]:
        """Returns one record, which is read from the file again."""
        if self.records is not None:
            return self.records[row]
        number = bisect.bisect_right(self.blocks, row, key=lambda block: block[0])
        if self.kept[0] != number:
            _, start, stop = self.blocks[number]
            try:
                with self.path.open("rb") as file:
                    file.seek(start)
                    text = file.read(stop - start).rstrip()
                self.kept = number, json.loads(b"[" + text + (b"" if text.endswith(b"]") else b"]"))
            except (OSError, ValueError):
                self.kept = number, ()
        first = self.blocks[number - 1][0] if number else 0
        if row - first >= len(self.kept[1]):
            raise DataError(f"{self.path} changed while it was read: start again")
        return self.kept[1][row - first]


def _parts(path: Path, readers: Mapping[str, Reader]) -> Iterator[_Part]:
    """Reads a table in parts, in their order."""
    spans = divided(path, SPAN)
    read = partial(_read_span, path, readers)
    with closing(in_processes(read, spans, min(processors(), MOST_READERS) if len(spans) > 1 else 1)) as parts:
        for span, part in zip(spans, parts, strict=True):
            if part is None:  # the span is malformed, or its end is not the end of a record
                rest = Span(span.start, None) if span.start > spans[0].start else None
                yield _part(read_blocks(path, rest), readers, path.stat().st_size - span.start)
                return
            yield part


def _read_span(path: Path, readers: Mapping[str, Reader], span: Span) -> _Part | None:
    try:
        return _part(read_blocks(path, span), readers, (span.stop or path.stat().st_size) - span.start)
    except DataError:
        return None


def _part(blocks: Iterable[Block], readers: Mapping[str, Reader], size: int) -> _Part:
    """Reads the columns of blocks of records, which have `size` bytes."""
    joined, present, rows = _Joined(), set(), 0
    places = []
    with _no_collection():
        for block in blocks:
            rows += len(block.records)
            places.append((rows, block.start, block.stop))
            values = _columns(block.records, list(readers))
            columns = {field: readers[field](values[field], block.records) for field in readers}
            joined.add(columns, (block.stop - block.start) / size)
            present |= {f for f in values if f not in present and any(value is not NOTHING for value in values[f])}
    return _Part(joined.columns() if rows else {f: read((), ()) for f, read in readers.items()}, present, places)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pauses the collection of cycles, of which JSON has none: looking for them takes a sixth of the time."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _in_memory(records: Sequence[dict[str, Any]]) -> Iterator[Block]:
    for start in range(0, len(records), 10_000):
        some = list(records[start : start + 10_000])
        yield Block(some, start, start + len(some))


def _columns(records: Sequence[dict[str, Any]], fields: Sequence[str]) -> dict[str, Sequence[Any]]:
    """Returns the values of fields, `NOTHING` where a record lacks one, all of a record at once, which costs least."""
    first = [field for field in fields if field in records[0]]
    found: dict[str, Sequence[Any]] = {}
    if len(first) > 1:
        try:
            found = dict(zip(first, zip(*map(itemgetter(*first), records), strict=True), strict=True))
        except KeyError:  # records have different fields
            pass
    return {f: found[f] if f in found else [record.get(f, NOTHING) for record in records] for f in fields}


class _Joined:
    """Columns that come in parts. They grow in place: the parts and the whole would need twice the memory."""

    def __init__(self) -> None:
        self.first: dict[str, Any] | None = None
        self.growing: dict[str, _Growing] = {}

    def add(self, columns: dict[str, Any], share: float) -> None:
        """Adds a part; `share` is how much of the whole it is, about."""
        if self.first is None:
            self.first, self.share = columns, share
            return
        if not self.growing:
            self.growing = {field: _Growing(column, self.share) for field, column in self.first.items()}
            self.first = {}
        for field, column in columns.items():
            self.growing[field].add(column)

    def columns(self) -> dict[str, Any]:
        return {field: column.whole() for field, column in self.growing.items()} or self.first or {}


class _Growing:
    """One of the columns: an array, a list, or a tuple of them."""

    def __init__(self, first: Any, share: float) -> None:
        self.kind, self.length = type(first), 0
        self.fields = [_Growing(field, share) for field in first] if isinstance(first, tuple) else []
        self.items: list[Any] = []
        if isinstance(first, np.ndarray):  # memory that is never written takes no place
            self.array = np.empty((int(1.1 * len(first) / share) + 1, *first.shape[1:]), first.dtype)
        if not self.fields:
            self.add(first)

    def add(self, part: Any) -> None:
        if self.fields:
            for field, value in zip(self.fields, part, strict=True):
                field.add(value)
        elif isinstance(part, list):
            self.items += part
        else:
            start, self.length = self.length, self.length + len(part)
            if self.length > len(self.array):
                larger = np.empty((int(1.3 * self.length), *part.shape[1:]), part.dtype)
                larger[:start] = self.array[:start]
                self.array = larger
            self.array[start : self.length] = part

    def whole(self) -> Any:
        if self.fields:
            return self.kind(*(field.whole() for field in self.fields))
        return self.items if self.kind is list else self.array[: self.length]


def storable(text: str) -> bool:
    """Returns whether text can be stored as bytes and read again: no NUL, and no half of a surrogate pair."""
    return "\0" not in text and (text.isascii() or text.encode(errors="ignore").decode() == text)


def text_of(value: object) -> str:
    """Returns text as it is, and `NO_TOKEN` for anything else."""
    return value if isinstance(value, str) else NO_TOKEN


def floats(value: object, shape: tuple[int, ...]) -> np.ndarray:
    """Returns nested lists of numbers as float64 of a shape; NaN for anything else."""
    if not isinstance(value, list) or len(value) != shape[0]:
        return np.full(shape, np.nan)
    if len(shape) > 1:
        return np.array([floats(item, shape[1:]) for item in value])
    try:
        return np.array([item if type(item) in (int, float) else np.nan for item in value], dtype=np.float64)
    except OverflowError:
        return np.full(shape, np.nan)


# The class of the detection task by category, as in `category_to_detection_name` of the devkit, which takes seconds and
# 100 MB to import.
DETECTION_CLASS = {
    "movable_object.barrier": "barrier",
    "vehicle.bicycle": "bicycle",
    "vehicle.bus.bendy": "bus",
    "vehicle.bus.rigid": "bus",
    "vehicle.car": "car",
    "vehicle.construction": "construction_vehicle",
    "vehicle.motorcycle": "motorcycle",
    "human.pedestrian.adult": "pedestrian",
    "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian",
    "human.pedestrian.police_officer": "pedestrian",
    "movable_object.trafficcone": "traffic_cone",
    "vehicle.trailer": "trailer",
    "vehicle.truck": "truck",
}

# What is kept of each table while it is read
READERS: dict[str, dict[str, Reader]] = {
    "category": {"token": as_they_are, "name": as_they_are},
    "attribute": {"token": as_they_are, "name": as_they_are},
    "visibility": {"token": as_they_are},
    "instance": {
        "token": own_keys, "category_token": token_keys, "nbr_annotations": as_they_are,
        "first_annotation_token": token_keys, "last_annotation_token": token_keys,
    },
    "sensor": {"token": as_they_are, "channel": as_they_are, "modality": as_they_are},
    "calibrated_sensor": {
        "token": own_keys, "sensor_token": token_keys, "rotation": vectors(4), "translation": vectors(3),
        "camera_intrinsic": as_they_are,
    },
    "ego_pose": {"token": own_keys, "timestamp": wholes, "rotation": vectors(4), "translation": vectors(3)},
    "log": {"token": as_they_are, "location": as_they_are},
    "scene": {
        "token": as_they_are, "name": as_they_are, "log_token": token_keys, "first_sample_token": token_keys,
        "last_sample_token": token_keys, "nbr_samples": as_they_are,
    },
    "sample": {
        "token": as_they_are, "timestamp": wholes, "scene_token": token_keys, "prev": token_keys, "next": token_keys,
    },
    "sample_data": {
        "token": own_keys, "sample_token": token_keys, "ego_pose_token": token_keys, "timestamp": wholes,
        "calibrated_sensor_token": token_keys, "is_key_frame": flags, "height": wholes, "width": wholes,
        "filename": keyframe_paths, "prev": token_keys, "next": token_keys,
    },
    "sample_annotation": {
        "token": own_keys, "sample_token": token_keys, "instance_token": token_keys, "visibility_token": token_keys,
        "attribute_tokens": token_lists, "rotation": vectors(4), "translation": vectors(3), "size": vectors(3),
        "num_lidar_pts": wholes, "num_radar_pts": wholes, "prev": token_keys, "next": token_keys,
    },
    "map": {"token": as_they_are, "filename": as_they_are, "log_tokens": token_lists},
}  # fmt: skip


class Tables(dict[str, Table]):
    """Tables by name. Each is read when it is asked for, so that the large ones need not fit into memory together.

    Args:
        folder: of the tables.
        records: from `read_tables`, if they are in memory.
    """

    def __init__(self, folder: Path, records: Mapping[str, Sequence[dict[str, Any]]] | None = None) -> None:
        super().__init__()
        self.folder, self.records = folder, records

    def __missing__(self, name: str) -> Table:
        records = None if self.records is None else self.records[name]
        table = self[name] = Table(self.folder / f"{name}.json", READERS[name], records)
        return table
