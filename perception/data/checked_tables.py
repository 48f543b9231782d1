"""Reads the tables of a dataset, checks them, and refuses those that cannot be right."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perception.commands import as_called
from perception.data.findings import Finding
from perception.data.table_checks import TableCheck
from perception.data.table_files import TABLES, read_blocks, read_rig, read_tables
from perception.data.tables import Tables
from perception.errors import DataError
from perception.rigs.rig import RIG_FILE

if TYPE_CHECKING:
    from nuscenes.nuscenes import NuScenes

_accepted: set[tuple[object, ...]] = set()  # states of the files of tables that this process has found to be right


def open_tables(dataroot: Path, version: str) -> NuScenes:
    """Reads and checks all tables and gives them to the devkit, which indexes them.

    Raises:
        DataError: a table is missing or malformed, or records of it cannot be right; the message names the first.
    """
    state = _state(dataroot, version)
    tables = read_tables(dataroot / version)
    if state not in _accepted:  # each validation of a training opens the tables
        _accept(dataroot, version, check_tables(dataroot, version, tables), state)
    from nuscenes.nuscenes import NuScenes  # slow to import, and not needed if the index is cached

    class CheckedTables(NuScenes):
        """The devkit with the tables that were read here."""

        def __load_table__(self, table_name: str) -> Any:
            return tables.pop(table_name) if table_name in tables else super().__load_table__(table_name)

    try:
        return CheckedTables(version, str(dataroot), verbose=False)
    except Exception as error:  # of an optional table, such as lidarseg, which only the devkit knows
        reason = f"key {error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise DataError(f"{dataroot / version} cannot be read by the nuScenes devkit: {reason}") from error


def check_and_keep(dataroot: Path, version: str) -> TableCheck:
    """Reads and checks all tables, of which it keeps what an index needs.

    Raises:
        DataError: as for `open_tables`.
    """
    state = _state(dataroot, version)
    folder = dataroot / version
    check = TableCheck(dataroot, folder, Tables(folder), read_rig(folder))
    _accept(dataroot, version, check.run(), state)
    return check


def _state(dataroot: Path, version: str) -> tuple[object, ...]:
    """Returns what changes with the files of the tables."""
    rig_file = dataroot / version / RIG_FILE
    files = [dataroot / version / f"{table}.json" for table in TABLES] + [rig_file] * rig_file.is_file()
    try:
        stats = [os.stat(file) for file in files]
    except OSError:  # reading the table will name it
        return ()
    return (str(dataroot.resolve()), version, *((stat.st_mtime_ns, stat.st_size) for stat in stats))


def _accept(dataroot: Path, version: str, findings: list[Finding], state: tuple[object, ...]) -> None:
    """Raises the first error among findings; tables without are not checked again by this process."""
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        others = f"; {len(errors) - 1} more kinds of faults were found" if len(errors) > 1 else ""
        raise DataError(
            f"{errors[0].sentence()}{others}: correct the tables, or unpack the metadata again; all faults: "
            + as_called(f"perception doctor data {dataroot} --version {version}")
        )
    _accepted.add(state)


def check_tables(
    dataroot: Path, version: str, tables: Mapping[str, Sequence[dict[str, Any]]] | None = None
) -> list[Finding]:
    """Checks every record of the tables: types, ranges, references, times, links, and what the devkit expects.

    Args:
        dataroot: root of the dataset.
        version: folder of the tables.
        tables: from `read_tables`; read here by default, where a table that cannot be read is a finding.

    Returns:
        All findings, errors first. A table that cannot be read ends the check.
    """
    return inspect_tables(dataroot, version, tables)[0]


def inspect_tables(
    dataroot: Path, version: str, tables: Mapping[str, Sequence[dict[str, Any]]] | None = None
) -> tuple[list[Finding], TableCheck | None]:
    """Returns the findings of `check_tables`, and what the check has kept of the tables; None if one is unreadable."""
    folder = dataroot / version
    try:
        check = TableCheck(dataroot, folder, Tables(folder, tables), read_rig(folder))
        return check.run(), check
    except DataError:  # the only errors that are no findings are those of files
        return _unreadable(folder), None


def _unreadable(folder: Path) -> list[Finding]:
    """Returns what is wrong with the files that cannot be read."""
    findings = []
    for path in (*(folder / f"{name}.json" for name in TABLES), folder / RIG_FILE):
        try:
            if path.name == RIG_FILE:
                read_rig(folder)
            else:
                for _ in read_blocks(path):
                    pass
        except DataError as error:
            problem = str(error).removeprefix(str(path)).lstrip(": ")
            findings.append(Finding("error", str(path), "", (), 0, problem))
    return findings
