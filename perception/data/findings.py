"""Collects what is wrong with the records of tables, and reads their columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from perception.data.tables import EMPTY, MALFORMED, NO_TOKEN, Lists, Table, own_keys, storable
from perception.reading import short

SHOWN = 20  # records of a finding that are named
FEW = 100_000  # records that are found without sorting


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
        # Neighbours are found in neighbouring memory; a small table is in the processor's cache as a whole.
        by_key = np.argsort(wanted) if len(self.own) > FEW else slice(None)
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
            if not (isinstance(value, str) and value and storable(value) and (allowed is None or allowed(value))):
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
