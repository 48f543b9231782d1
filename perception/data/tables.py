"""Reads the tables of a nuScenes-format dataset by columns, and describes what is wrong with records."""

from __future__ import annotations

import bisect
import gc
import json
import ntpath
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, TypeAlias

import numpy as np

from perception.errors import DataError
from perception.reading import short
from perception.rigs.rig import RIG_FILE, Rig

TABLES = (
    "category", "attribute", "visibility", "instance", "sensor", "calibrated_sensor", "ego_pose",
    "log", "scene", "sample", "sample_data", "sample_annotation", "map",
)  # fmt: skip

MAX_PIXELS = 80_000_000  # of one image: 240 MB when decoded; cameras of vehicles have up to 12 million
SHOWN = 20  # records of a finding that are named

BLOCK = 1 << 20  # bytes of text that are read at a time; records of a block stay in the processor's cache
LONGEST_RECORD = 1 << 26  # bytes
LONGEST_PATH = 1000  # characters; file systems allow some more

_OPENING = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*\[")
_BETWEEN = (b"},", b"}\n,", b"} ,", b"}\r\n,")
_SEPARATOR = re.compile(rb"[ \t\r\n]*,[ \t\r\n]*")
_TEXT_SEPARATOR = re.compile(r"[ \t\r\n]*,[ \t\r\n]*")
_DECODER = json.JSONDecoder()

Reader: TypeAlias = Callable[[Sequence[Any], Sequence[dict[str, Any]]], Any]

NOTHING = object()  # a field that a record lacks
NO_TOKEN = "\0"  # equals no token


class Finding(NamedTuple):
    """Records of one table that share a fault."""

    severity: str  # "error": the dataset is refused; "warning": nothing reads the value, or it is only implausible
    file: str
    field: str
    records: tuple[str, ...]  # tokens of the first of them, or "row 7" (from 0) without one; empty: the whole file
    total: int  # of all of them; 0: the whole file
    problem: str  # what is needed and what the first record holds

    def sentence(self) -> str:
        """Returns the finding as one sentence."""
        if not self.total:
            return f"{self.file} {self.problem}"
        more = f" (and {self.total - 1} more such records)" if self.total > 1 else ""
        return f"{self.file}: record {self.records[0]} {self.problem}{more}"

    def as_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return self._asdict() | {"records": list(self.records)}


def read_tables(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Reads the thirteen tables of a dataset into memory, as the devkit wants them.

    Raises:
        DataError: a table is missing, is not JSON, or is not a list of objects.
    """
    return {name: read_table(folder / f"{name}.json") for name in TABLES}


def read_rig(folder: Path) -> Rig | None:
    """Reads the rig file in the folder of the tables of a dataset whose cameras are not all pinholes.

    Returns:
        The rig; None if there is no such file, and the tables describe the cameras alone.

    Raises:
        DataError: the file is malformed.
    """
    path = folder / RIG_FILE
    return Rig.load(path) if path.is_file() else None


def read_table(path: Path) -> list[dict[str, Any]]:
    """Reads one table into memory, see `read_tables`. `read_blocks` does with a fraction of the memory."""
    return [record for block in read_blocks(path) for record in block.records]


class Block(NamedTuple):
    """Records of a table that follow each other, and where their text is in the file."""

    records: list[dict[str, Any]]
    start: int
    stop: int


def read_blocks(path: Path) -> Iterator[Block]:
    """Reads a table a few thousand records at a time. The tables of nuScenes trainval take 6 GB as objects.

    Raises:
        DataError: the table is missing, is not JSON, or is not a list of objects.
    """
    try:
        with path.open("rb") as file:
            yield from _read_blocks(path, file)
    except FileNotFoundError:
        raise DataError(f"{path} is missing: unpack the dataset's metadata again") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): unpack the metadata again") from None


def _read_blocks(path: Path, file: BinaryIO) -> Iterator[Block]:
    size = os.fstat(file.fileno()).st_size
    text = file.read(max(BLOCK, 1000))  # white space before the list is shorter
    opening = _OPENING.match(text)
    if opening is None:
        _refuse(path, text + file.read())
    text, start = text[opening.end() :], opening.end()  # `text` starts with a record
    found = False
    while True:
        last = file.tell() >= size
        # A block ends where one record ends and another starts. Strings may hold the same characters.
        stop = len(text) if last else max(text.rfind(mark) for mark in _BETWEEN) + 1
        try:
            records = json.loads(b"[" + text[:stop] + (b"" if last else b"]"))
            if last and found and not records:
                raise json.JSONDecodeError("Expecting value", text.decode(errors="replace"), 0)
        except (ValueError, RecursionError) as error:
            if last:
                raise _invalid(path, error, start) from None
            records, stop = _first_records(text)
            if not records and len(text) > LONGEST_RECORD:
                raise _invalid(path, error, start) from None
        if not set(map(type, records)) <= {dict}:
            raise _no_list(path)
        if records:
            found = True
            yield Block(records, start, start + stop)
        if last:
            return
        if records:
            stop += len(_SEPARATOR.match(text, stop)[0])  # type: ignore[index]
        text, start = text[stop:], start + stop
        text += file.read(max(BLOCK, len(text)))


def _first_records(text: bytes) -> tuple[list[Any], int]:
    """Decodes records as long as they are whole and a comma follows: for text that is not valid as one block.

    Returns:
        The records, and the number of bytes that they take.
    """
    try:
        content = text.decode(errors="surrogatepass")
    except UnicodeDecodeError as error:  # the end is in the middle of a letter
        content = text[: error.start].decode(errors="surrogatepass")
    records, start, stop = [], len(content) - len(content.lstrip(" \t\r\n")), 0
    try:
        while True:
            record, end = _DECODER.raw_decode(content, start)
            separator = _TEXT_SEPARATOR.match(content, end)
            if separator is None:
                break
            records.append(record)
            start, stop = separator.end(), end
    except (ValueError, RecursionError):
        pass
    return records, len(content[:stop].encode(errors="surrogatepass"))


def _refuse(path: Path, content: bytes) -> NoReturn:
    """Raises what is wrong with a file that does not start like a list."""
    if content.startswith(b"version https://git-lfs"):
        raise DataError(
            f"{path} is not valid JSON (it is a pointer of Git LFS, not the file): unpack the metadata again"
        )
    try:
        json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise _invalid(path, error, 1) from None
    raise _no_list(path)


def _invalid(path: Path, error: Exception, start: int) -> DataError:
    """Makes the message of a JSON error in the text from byte `start` on, which was decoded after a bracket."""
    reason = str(error)
    if isinstance(error, json.JSONDecodeError):
        place = start + max(len(error.doc[: error.pos].encode(errors="surrogatepass")) - 1, 0)
        with path.open("rb") as file:
            line = 1 + sum(file.read(min(BLOCK, place - k)).count(b"\n") for k in range(0, place, BLOCK))
        reason = f"{error.msg} in line {line}, at byte {place}"
    return DataError(f"{path} is not valid JSON ({reason}): unpack the metadata again")


def _no_list(path: Path) -> DataError:
    return DataError(f"{path} is not a list of objects, one for each record: unpack the metadata again")


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
    if set(map(type, values)) <= {str} and _storable("".join(values)):
        return np.fromiter(map(hash, values), np.int64, len(values))
    good = (isinstance(value, str) and _storable(value) for value in values)
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
        good = (isinstance(v, str) and _storable(v) and (not v or inside_root(v)) for v in values)
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
    return not odd and _storable(lines) and max(map(len, names), default=0) <= LONGEST_PATH


def inside_root(name: str) -> bool:
    """Returns whether a path stays below the folder that it is relative to, on any system."""
    if len(name) > LONGEST_PATH:
        return False
    if name[0] not in "/\\." and ".." not in name and ":" not in name:
        return True
    slashes = name.replace("\\", "/")
    absolute = slashes.startswith("/") or ntpath.splitdrive(name)[0] != ""
    return not absolute and posixpath.normpath(slashes).split("/")[0] != ".." and posixpath.normpath(slashes) != "."


class Table:
    """The columns of one table.

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
        parts: dict[str, list[Any]] = {field: [] for field in readers}
        with _no_collection():
            for block in read_blocks(path) if records is None else _in_memory(records):
                self.rows += len(block.records)
                self.blocks.append((self.rows, block.start, block.stop))
                for field, values in _columns(block.records, list(readers)).items():
                    parts[field].append(readers[field](values, block.records))
                    if field not in self.present and any(value is not NOTHING for value in values):
                        self.present.add(field)
        self.columns = {}
        for field, reader in readers.items():
            self.columns[field] = _joined(parts.pop(field)) if self.rows else reader((), ())

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
        yield Block(list(records[start : start + 10_000]), 0, 0)


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


def _joined(parts: list[Any]) -> Any:
    """Joins columns of blocks."""
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    if isinstance(parts[0], tuple):
        return type(parts[0])(*(_joined(list(fields)) for fields in zip(*parts, strict=True)))
    return list(chain.from_iterable(parts))


class Lookup:
    """Finds records by their token.

    Args:
        own: [R] int64 keys of the records.
    """

    def __init__(self, own: np.ndarray) -> None:
        self.order = np.argsort(own, kind="stable")
        self.own = own[self.order]

    def rows(self, wanted: np.ndarray) -> np.ndarray:
        """Returns the row number [n] of the last record with each key; -1 where there is none."""
        if not len(self.own):
            return np.full(len(wanted), -1)
        by_key = np.argsort(wanted)  # neighbours are found in neighbouring memory
        place = np.empty(len(wanted), dtype=np.int64)
        place[by_key] = np.searchsorted(self.own, wanted[by_key], side="right") - 1
        found = (place >= 0) & (self.own[place] == wanted) & (wanted != EMPTY) & (wanted != MALFORMED)
        return np.where(found, self.order[place], -1)


class Columns:
    """Reads columns of tables as arrays and collects findings; malformed values become NaN or -1.

    Args:
        folder: of the tables, for messages.
        tables: by name.
    """

    def __init__(self, folder: Path, tables: Mapping[str, Table]) -> None:
        self.folder, self.tables = folder, tables
        self.findings: list[Finding] = []
        self.lookup: dict[str, Lookup] = {}  # by table

    # Reporting

    def report(
        self,
        table: str,
        field: str,
        bad: np.ndarray | Iterable[int],
        problem: str | Callable[[int], str],
        severity: str = "error",
    ) -> None:
        """Adds a finding if there are bad records.

        Args:
            table, field: the place.
            bad: [R] bool, or row numbers.
            problem: what the records need, or a function of the row that returns the whole predicate.
            severity: as in `Finding`.
        """
        rows = np.flatnonzero(bad) if isinstance(bad, np.ndarray) and bad.dtype == bool else np.array(list(bad), int)
        if not len(rows):
            return
        if isinstance(problem, str):
            value = self.tables[table].record(int(rows[0])).get(field)
            text = f"needs {problem} as '{field}', but holds {short(value)}"
        else:
            text = problem(int(rows[0]))
        self.add(severity, table, field, rows.tolist(), text)

    def add(self, severity: str, table: str, field: str, rows: Sequence[int], problem: str) -> None:
        """Adds a finding about records, or about the whole table if `rows` is empty."""
        labels = tuple(self.label(table, row) for row in rows[:SHOWN])
        self.findings.append(Finding(severity, str(self.folder / f"{table}.json"), field, labels, len(rows), problem))

    def label(self, table: str, row: int) -> str:
        """Returns the token of a record, or its row if it has no token that can be printed."""
        token = self.tables[table].record(row).get("token")
        return token if isinstance(token, str) and token.isprintable() and 0 < len(token) <= 80 else f"row {row}"

    # Columns

    def has(self, table: str, field: str) -> bool:
        """Returns whether any record has a field that nothing needs."""
        return field in self.tables[table].present

    def column(self, table: str, field: str) -> Any:
        """Returns a column as its reader made it."""
        return self.tables[table].columns[field]

    def take(self, table: str, field: str) -> Any:
        """Returns a column that is needed once, so that its memory is free afterwards."""
        return self.tables[table].columns.pop(field)

    def tokens(self, table: str) -> None:
        """Checks that each record has a token of its own."""
        own = self.column(table, "token")
        own = own if isinstance(own, np.ndarray) else own_keys(own)
        self.report(table, "token", (own == MALFORMED) | (own == EMPTY), "text that is not empty")
        self.lookup[table] = lookup = Lookup(own)
        repeated = np.sort(lookup.order[:-1][lookup.own[1:] == lookup.own[:-1]])
        repeated = repeated[(own[repeated] != MALFORMED) & (own[repeated] != EMPTY)]

        def again(row: int) -> str:
            return f"has the 'token' of row {lookup.rows(own[[row]])[0]}; give each its own"

        self.report(table, "token", repeated, again)

    def text(
        self,
        table: str,
        field: str,
        allowed: Callable[[str], bool] | None = None,
        needs: str = "text that is not empty",
    ) -> list[str]:
        """Reads a column of text; `NO_TOKEN` where it is malformed."""
        values = list(self.column(table, field))
        for row, value in enumerate(values):
            if not (isinstance(value, str) and value and _storable(value) and (allowed is None or allowed(value))):
                values[row] = NO_TOKEN
        self.report(table, field, [row for row, value in enumerate(values) if value is NO_TOKEN], needs)
        return values

    def key(self, table: str, field: str, target: str, *, empty: bool = False, severity: str = "error") -> np.ndarray:
        """Reads a column of tokens as row numbers [R] int64 of the target table; -1 where it is empty or dangling."""
        wanted = self.take(table, field)
        found = self.lookup[target].rows(wanted)
        bad = (found < 0) & (wanted != EMPTY) if empty else found < 0
        none = ", or ''" if empty else ""
        self.report(table, field, bad, f"the token of a record of {target}.json{none}", severity)
        return found

    def keys(self, table: str, field: str, target: str, check: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Reads a column of lists of tokens as pairs of row numbers: [P] of this table and [P] of the target."""
        values: Lists = self.take(table, field)
        self.report(table, field, values.counts < 0, "a list of tokens")
        rows = np.repeat(np.arange(len(values.counts)), np.maximum(values.counts, 0))
        found = self.lookup[target].rows(values.keys)
        if check:
            self.report(table, field, np.unique(rows[found < 0]), f"tokens of records of {target}.json")
        return rows[found >= 0], found[found >= 0]

    def vector(self, table: str, field: str) -> np.ndarray:
        """Reads a column of lists of finite numbers, [R, count] float64; NaN where it is malformed."""
        array: np.ndarray = self.take(table, field)
        self.report(table, field, np.isnan(array[:, 0]), f"{array.shape[1]} finite numbers")
        return array

    def integers(
        self, table: str, field: str, low: int, needs: str, rows: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Reads a column of whole numbers of at least `low` and below 2^62.

        Args:
            table, field: the column.
            low: smallest number that is allowed.
            needs: what the numbers are, for the message.
            rows: [n] row numbers; all by default.

        Returns:
            [n] int64, and [n] bool, False where a value is malformed.
        """
        values = self.take(table, field)
        values = values if rows is None else values[rows]
        good = values >= low
        bad = np.flatnonzero(~good)
        self.report(table, field, bad if rows is None else rows[bad], needs)
        return np.where(good, values, 0), good


def _storable(text: str) -> bool:
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
