"""Reads the tables of a nuScenes-format dataset by columns, and describes what is wrong with records."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, repeat
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

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
    """Reads the thirteen tables of a dataset.

    Raises:
        DataError: a table is missing, is not JSON, or is not a list of objects.
    """
    return {name: read_table(folder / f"{name}.json") for name in TABLES}


def read_rig(folder: Path) -> Rig | None:
    """Reads the rig file that lies beside the tables of a dataset whose cameras are not all pinholes.

    Returns:
        The rig; None if there is no such file, and the tables describe the cameras alone.

    Raises:
        DataError: the file is malformed.
    """
    path = folder / RIG_FILE
    return Rig.load(path) if path.is_file() else None


def read_table(path: Path) -> list[dict[str, Any]]:
    """Reads one table, see `read_tables`."""
    try:
        content = path.read_bytes()
        rows = json.loads(content)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{path} is missing: unpack the dataset's metadata again") from None
        raise DataError(f"{path} cannot be read ({error.strerror}): unpack the metadata again") from None
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if content.startswith(b"version https://git-lfs"):
            reason = "it is a pointer of Git LFS, not the file"
        raise DataError(f"{path} is not valid JSON ({reason}): unpack the metadata again") from None
    if not isinstance(rows, list) or not set(map(type, rows)) <= {dict}:
        raise DataError(f"{path} is not a list of objects, one for each record: unpack the metadata again")
    return rows


class Columns:
    """Reads columns of tables as arrays and collects findings; malformed values become NaN or -1.

    Args:
        folder: of the tables, for messages.
        tables: records by table, from `read_tables`.
    """

    def __init__(self, folder: Path, tables: Mapping[str, Sequence[dict[str, Any]]]) -> None:
        self.folder, self.tables = folder, tables
        self.findings: list[Finding] = []
        self.columns: dict[str, dict[str, tuple[Any, ...]]] = {}
        self.row_of: dict[str, dict[str, int]] = {}  # token to row, per table

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
            text = f"needs {problem} as '{field}', but holds {short(self.tables[table][rows[0]].get(field))}"
        else:
            text = problem(int(rows[0]))
        self.add(severity, table, field, rows.tolist(), text)

    def add(self, severity: str, table: str, field: str, rows: Sequence[int], problem: str) -> None:
        """Adds a finding about records, or about the whole table if `rows` is empty."""
        labels = tuple(self.label(table, row) for row in rows[:SHOWN])
        self.findings.append(Finding(severity, str(self.folder / f"{table}.json"), field, labels, len(rows), problem))

    def label(self, table: str, row: int) -> str:
        """Returns the token of a record, or its row if it has no token that can be printed."""
        token = self.tables[table][row].get("token")
        return token if isinstance(token, str) and token.isprintable() and 0 < len(token) <= 80 else f"row {row}"

    # Columns

    def has(self, table: str, field: str) -> bool:
        """Returns whether any record has a field that nothing needs."""
        return any(field in row for row in self.tables[table])

    def column(self, table: str, field: str) -> list[Any]:
        """Returns the values of a field as they are, `NOTHING` where a record lacks it."""
        rows = self.tables[table]
        if table not in self.columns:
            # All fields of a record in one pass: records are scattered in memory, and reading one costs most.
            fields = list(rows[0]) if rows else []
            try:
                values = zip(*map(itemgetter(*fields), rows), strict=True) if len(fields) > 1 else []
                self.columns[table] = dict(zip(fields, values, strict=False))
            except KeyError:  # records have different fields
                self.columns[table] = {}
        if field in self.columns[table]:
            return list(self.columns[table][field])
        return [row.get(field, NOTHING) for row in rows]

    def tokens(self, table: str) -> None:
        """Checks that each record has a token of its own."""
        tokens = self.text(table, "token")
        self.row_of[table] = row_of = dict(zip(tokens, range(len(tokens)), strict=True))
        if len(row_of) < len(tokens):
            repeated = [row for row, token in enumerate(tokens) if row_of[token] != row and token != NO_TOKEN]
            self.report(
                table, "token", repeated, lambda row: f"has the 'token' of row {row_of[tokens[row]]}; give each its own"
            )
        row_of.pop(NO_TOKEN, None)

    def text(
        self,
        table: str,
        field: str,
        allowed: Callable[[str], bool] | None = None,
        needs: str = "text that is not empty",
        *,
        empty: bool = False,
    ) -> list[str]:
        """Reads a column of text, which may be empty if `empty` is true; `NO_TOKEN` where it is malformed."""
        values = self.column(table, field)
        good = set(map(type, values)) <= {str} and _storable("".join(values)) and (empty or "" not in values)
        if not good or (allowed and not all(map(allowed, filter(None, values)))):
            bad = [
                row
                for row, value in enumerate(values)
                if not isinstance(value, str)
                or not _storable(value)
                or (not value and not empty)
                or (value and allowed and not allowed(value))
            ]
            self.report(table, field, bad, needs)
            for row in bad:
                values[row] = NO_TOKEN
        return values

    def key(self, table: str, field: str, target: str, *, empty: bool = False, severity: str = "error") -> np.ndarray:
        """Reads a column of tokens as row numbers [R] int64 of the target table; -1 where it is empty or dangling."""
        values = self.column(table, field)
        if not set(map(type, values)) <= {str}:
            values = [value if isinstance(value, str) else NO_TOKEN for value in values]
        found = np.fromiter(map(self.row_of[target].get, values, repeat(-1)), np.int64, len(values))
        bad = [row for row in np.flatnonzero(found < 0).tolist() if not (empty and values[row] == "")]
        none = ", or ''" if empty else ""
        self.report(table, field, bad, f"the token of a record of {target}.json{none}", severity)
        return found

    def keys(self, table: str, field: str, target: str, check: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Reads a column of lists of tokens as pairs of row numbers: [P] of this table and [P] of the target."""
        values = self.column(table, field)
        bad = [row for row, value in enumerate(values) if not _is_texts(value)]
        self.report(table, field, bad, "a list of tokens")
        for row in bad:
            values[row] = []
        rows = np.repeat(np.arange(len(values)), np.fromiter(map(len, values), np.int64, len(values)))
        flat = list(chain.from_iterable(values))
        found = np.fromiter(map(self.row_of[target].get, flat, repeat(-1)), np.int64, len(flat))
        if check:
            self.report(table, field, np.unique(rows[found < 0]), f"tokens of records of {target}.json")
        return rows[found >= 0], found[found >= 0]

    def vector(self, table: str, field: str, count: int) -> np.ndarray:
        """Reads a column of lists of finite numbers, [R, count] float64; NaN where it is malformed."""
        values = self.column(table, field)
        array = None
        try:
            if set(map(len, values)) <= {count} and set(map(type, chain.from_iterable(values))) <= {int, float}:
                array = np.array(values, dtype=np.float64).reshape(-1, count)
        except (TypeError, ValueError, OverflowError):
            pass
        if array is None:
            array = np.array([floats(value, (count,)) for value in values]).reshape(-1, count)
        bad = ~np.isfinite(array).all(1)
        self.report(table, field, bad, f"{count} finite numbers")
        array[bad] = np.nan
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
        values = self.column(table, field)
        rows = np.arange(len(values)) if rows is None else rows
        values = [values[row] for row in rows.tolist()]
        if set(map(type, values)) <= {int} and (not values or (min(values) >= low and max(values) < 2**62)):
            return np.array(values, dtype=np.int64), np.ones(len(values), dtype=bool)
        good = np.array([type(value) is int and low <= value < 2**62 for value in values], dtype=bool)
        self.report(table, field, rows[~good], needs)
        return np.array([v if ok else 0 for v, ok in zip(values, good, strict=True)], dtype=np.int64), good


def _storable(text: str) -> bool:
    """Returns whether text can be stored as bytes and read again: no NUL, and no half of a surrogate pair."""
    return "\0" not in text and (text.isascii() or text.encode(errors="ignore").decode() == text)


def text_of(value: object) -> str:
    return value if isinstance(value, str) else NO_TOKEN


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


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
