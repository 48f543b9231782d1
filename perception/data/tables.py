"""Reads and checks the tables of a nuScenes-format dataset, before the devkit or the library uses a number of them.

The devkit trusts its tables: a dangling token is a KeyError, a cycle of `next` never ends, a negative time gives a
velocity of the wrong sign, and some rows stop its evaluation after hours of inference. `check_tables` finds all such
rows at once. Each check works on a whole column, because trainval has millions of rows.
"""

from __future__ import annotations

import json
import ntpath
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, repeat
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from perception.errors import DataError
from perception.inference.checks import FARTHEST_CAMERA, FARTHEST_POSE, check_intrinsics
from perception.inference.ego_motion import MAX_GAP
from perception.types import ATTRIBUTES

if TYPE_CHECKING:
    from nuscenes.nuscenes import NuScenes

TABLES = (
    "category", "attribute", "visibility", "instance", "sensor", "calibrated_sensor", "ego_pose",
    "log", "scene", "sample", "sample_data", "sample_annotation", "map",
)  # fmt: skip

MAX_PIXELS = 80_000_000  # of one image: 240 MB when decoded; cameras of vehicles have up to 12 million
LARGEST_BOX = 1000.0  # metres
UNIT_TOLERANCE = 1e-2  # of the length of a quaternion; tables are rounded, and readers normalise
LATE = 0.5  # seconds between records of one keyframe above which a time is implausible
SHOWN = 20  # records of a finding that are named

_NOTHING = object()  # a field that a record lacks
_NO_TOKEN = "\0"  # equals no token


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


def open_tables(dataroot: Path, version: str) -> NuScenes:
    """Reads and checks all tables and gives them to the devkit, which indexes them.

    Raises:
        DataError: a table is missing or malformed, or records of it cannot be right; the message names the first.
    """
    tables = read_tables(dataroot / version)
    errors = [finding for finding in check_tables(dataroot, version, tables) if finding.severity == "error"]
    if errors:
        others = f"; {len(errors) - 1} more kinds of faults were found" if len(errors) > 1 else ""
        raise DataError(
            f"{errors[0].sentence()}{others}: correct the tables, or unpack the metadata again (`perception doctor "
            f"data {dataroot}` lists all faults)"
        )
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


def read_tables(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Reads the thirteen tables of a dataset.

    Raises:
        DataError: a table is missing, is not JSON, or is not a list of objects.
    """
    return {name: _read_table(folder / f"{name}.json") for name in TABLES}


def _read_table(path: Path) -> list[dict[str, Any]]:
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
    folder = dataroot / version
    if tables is None:
        unreadable, found = [], {}
        for name in TABLES:
            try:
                found[name] = _read_table(folder / f"{name}.json")
            except DataError as error:
                problem = str(error).removeprefix(f"{folder / name}.json ")
                unreadable.append(Finding("error", str(folder / f"{name}.json"), "", (), 0, problem))
        if unreadable:
            return unreadable
        tables = found
    return _Check(dataroot, folder, tables).run()


class _Check:
    """One run of all checks. A column of the tables becomes an array, and bad values become NaN or -1 in it."""

    def __init__(self, dataroot: Path, folder: Path, tables: Mapping[str, Sequence[dict[str, Any]]]) -> None:
        self.dataroot, self.folder, self.tables = dataroot, folder, tables
        self.findings: list[Finding] = []
        self.columns: dict[str, dict[str, tuple[Any, ...]]] = {}
        self.row_of: dict[str, dict[str, int]] = {}  # token to row, per table

    def run(self) -> list[Finding]:
        for table in TABLES:
            self.tokens(table)
        self.names()
        self.sensors()
        self.poses()
        self.samples()
        self.annotations()
        return sorted(self.findings, key=lambda finding: finding.severity != "error")

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
            text = f"needs {problem} as '{field}', but holds {_short(self.tables[table][rows[0]].get(field, _NOTHING))}"
        else:
            text = problem(int(rows[0]))
        self.add(severity, table, field, rows.tolist(), text)

    def add(self, severity: str, table: str, field: str, rows: Sequence[int], problem: str) -> None:
        """Adds a finding about records, or about the whole table if `rows` is empty."""
        labels = tuple(self.label(table, row) for row in rows[:SHOWN])
        self.findings.append(Finding(severity, str(self.folder / f"{table}.json"), field, labels, len(rows), problem))

    def label(self, table: str, row: int) -> str:
        token = self.tables[table][row].get("token")
        return token if isinstance(token, str) and token.isprintable() and 0 < len(token) <= 80 else f"row {row}"

    # Columns

    def has(self, table: str, field: str) -> bool:
        """Returns whether any record has a field that nothing needs."""
        return any(field in row for row in self.tables[table])

    def column(self, table: str, field: str) -> list[Any]:
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
        return [row.get(field, _NOTHING) for row in rows]

    def tokens(self, table: str) -> None:
        """Checks that each record has a token of its own."""
        tokens = self.text(table, "token")
        self.row_of[table] = row_of = dict(zip(tokens, range(len(tokens)), strict=True))
        if len(row_of) < len(tokens):
            repeated = [row for row, token in enumerate(tokens) if row_of[token] != row and token != _NO_TOKEN]
            self.report(
                table, "token", repeated, lambda row: f"has the 'token' of row {row_of[tokens[row]]}; give each its own"
            )
        row_of.pop(_NO_TOKEN, None)

    def text(self, table: str, field: str, allowed: Callable[[str], bool] | None = None, needs: str = "") -> list[str]:
        """Reads a column of text that is not empty; `_NO_TOKEN` where it is not."""
        values = self.column(table, field)
        good = set(map(type, values)) <= {str} and _storable("".join(values)) and "" not in values
        if not good or (allowed and not all(map(allowed, values))):
            bad = [
                row
                for row, value in enumerate(values)
                if not isinstance(value, str) or not value or not _storable(value) or (allowed and not allowed(value))
            ]
            self.report(table, field, bad, needs or "text that is not empty")
            for row in bad:
                values[row] = _NO_TOKEN
        return values

    def key(self, table: str, field: str, target: str, *, empty: bool = False, severity: str = "error") -> np.ndarray:
        """Reads a column of tokens as row numbers [R] int64 of the target table; -1 where it is empty or dangling."""
        values = self.column(table, field)
        if not set(map(type, values)) <= {str}:
            values = [value if isinstance(value, str) else _NO_TOKEN for value in values]
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
            array = np.array([_floats(value, (count,)) for value in values]).reshape(-1, count)
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

    # The checks

    def names(self) -> None:
        """Text that the library or the devkit compares, and names of files."""
        self.category_name = self.text("category", "name")
        self.attribute_name = self.text("attribute", "name")
        self.channel = np.array(self.text("sensor", "channel"), dtype=object)
        self.text("sensor", "modality")
        name = Counter(self.text("scene", "name"))
        repeated = [row for row, scene in enumerate(self.tables["scene"]) if name[_text(scene.get("name"))] > 1]
        self.report("scene", "name", repeated, "a name that no other scene has", "warning")
        self.text("log", "location", lambda text: not {"/", "\\"} & set(text) and text != "..", "the name of a map")
        self.filenames = self.text("sample_data", "filename", _inside, "a path below the root of the dataset")
        masks = self.text("map", "filename", _inside, "a path below the root of the dataset")
        gone = [row for row, mask in enumerate(masks) if mask != _NO_TOKEN and not (self.dataroot / mask).exists()]
        self.report(
            "map", "filename", gone, lambda row: f"gives {self.dataroot / masks[row]}, which is missing, as 'filename'"
        )
        # nuScenes' own mini version lists the logs of the whole dataset, so dangling tokens are usual here.
        _, logs = self.keys("map", "log_tokens", "log", check=False)
        lacking = np.ones(len(self.tables["log"]), dtype=bool)
        lacking[logs] = False
        self.report("log", "token", lacking, lambda row: "is in no 'log_tokens' of map.json; add it to its map")
        if not self.tables["map"]:
            self.add("error", "map", "", [], "has no record; add one for each map")

    def sensors(self) -> None:
        """Calibration, as in live use."""
        sensor = self.key("calibrated_sensor", "sensor_token", "sensor")
        modality = np.array([_text(row.get("modality")) for row in self.tables["sensor"]] + [""], dtype=object)
        self.is_camera = modality[sensor] == "camera"  # [calibrations]
        self.channel_of = np.append(self.channel, "")[sensor]
        position = self.pose("calibrated_sensor")
        far = np.abs(position).max(1, initial=0) > FARTHEST_CAMERA
        self.report("calibrated_sensor", "translation", far, f"metres, at most {FARTHEST_CAMERA:g} from the ego origin")
        values = self.column("calibrated_sensor", "camera_intrinsic")
        self.intrinsics = np.array(
            [_floats(v, (3, 3)) if camera else np.eye(3) for v, camera in zip(values, self.is_camera, strict=True)]
        ).reshape(-1, 3, 3)
        finite = np.isfinite(self.intrinsics).all((1, 2))
        self.report("calibrated_sensor", "camera_intrinsic", ~finite, "3 x 3 finite numbers")
        focal, last = self.intrinsics[:, [0, 1], [0, 1]], self.intrinsics[:, 2]
        self.pinhole = finite & (focal > 0).all(1) & (last == (0, 0, 1)).all(1)
        self.report(
            "calibrated_sensor",
            "camera_intrinsic",
            finite & ~self.pinhole,
            "focal lengths above 0 and a last row of 0 0 1",
        )

    def pose(self, table: str) -> np.ndarray:
        """Checks rotations and translations; returns the translations [R, 3]."""
        rotation, translation = self.vector(table, "rotation", 4), self.vector(table, "translation", 3)
        with np.errstate(over="ignore", invalid="ignore"):
            length = np.sqrt((rotation**2).sum(1))
        self.report(table, "rotation", np.abs(length - 1) > UNIT_TOLERANCE, "a unit quaternion")
        self.report(
            table,
            "translation",
            np.abs(translation).max(1, initial=0) > FARTHEST_POSE,
            f"metres, at most {FARTHEST_POSE:.0e}",
        )
        return translation

    def poses(self) -> None:
        """Poses of the vehicle, and the files of all sensors."""
        self.pose("ego_pose")
        table = "sample_data"
        self.sample_of_data = self.key(table, "sample_token", "sample")
        calibration = self.key(table, "calibrated_sensor_token", "calibrated_sensor")
        pose = self.key(table, "ego_pose_token", "ego_pose")
        time, timed = self.integers(table, "timestamp", 0, "whole microseconds")
        self.data_time = np.where(timed, time, -1)
        key = self.column(table, "is_key_frame")
        unclear = [row for row, value in enumerate(key) if type(value) is not bool]
        self.report(table, "is_key_frame", unclear, "true or false")
        self.is_key = np.array([value is True for value in key], dtype=bool)
        if self.has("ego_pose", "timestamp"):
            pose_time, pose_timed = self.integers("ego_pose", "timestamp", 0, "whole microseconds")
            known = (pose >= 0) & timed
            other = np.abs(np.append(pose_time, 0)[pose] - time) > LATE * 1e6
            other &= known & np.append(pose_timed, False)[pose]
            self.report(table, "ego_pose_token", other, "the pose at its own timestamp", "warning")
        if self.has(table, "next"):
            self.links(table, self.data_time, "warning")

        self.channel_of_data = np.append(self.channel_of, "")[calibration]
        camera = self.is_key & np.append(self.is_camera, False)[calibration]
        rows = np.flatnonzero(camera)
        sizes, good = [], np.ones(len(rows), dtype=bool)
        for field in ("height", "width"):
            size, whole = self.integers(table, field, 1, "whole pixels", rows)
            sizes.append(size)
            good &= whole
        large = good & (sizes[0].astype(float) * sizes[1] > MAX_PIXELS)
        self.report(table, "width", rows[large], f"the width of an image of at most {MAX_PIXELS:.0e} pixels in all")
        good &= ~large & np.append(self.pinhole, False)[calibration[rows]]
        kinds, first = np.unique(
            np.stack([calibration[rows], *sizes])[:, good], axis=1, return_index=True
        )  # [3, kinds]
        for kind, row in zip(kinds.T.tolist(), rows[good][first].tolist(), strict=True):
            try:
                check_intrinsics("'camera_intrinsic'", self.intrinsics[kind[0]], (kind[1], kind[2]))
            except DataError as error:
                self.add(
                    "error",
                    "calibrated_sensor",
                    "camera_intrinsic",
                    [kind[0]],
                    f"does not fit its images, such as {self.label(table, row)} of sample_data.json: {error}",
                )

    def samples(self) -> None:
        """Scenes, their keyframes in order, and the records of each keyframe."""
        self.key("scene", "log_token", "log")
        first = self.key("scene", "first_sample_token", "sample")
        of_scene = self.key("sample", "scene_token", "scene")
        time, timed = self.integers("sample", "timestamp", 0, "whole microseconds")
        self.sample_time = np.where(timed, time, -1)
        after = self.links("sample", self.sample_time, "error")
        count = len(time)
        linked = (after >= 0) & (of_scene >= 0)
        other = linked & (of_scene[np.where(linked, after, 0)] != of_scene) if count else linked
        self.report("sample", "next", other, "a sample of the same scene")
        # A scene's keyframes are the chain from its first one. The devkit takes all samples of the scene instead.
        reached = np.full(count, -1)
        for scene, sample in enumerate(first.tolist()):
            while sample >= 0 and reached[sample] < 0:
                reached[sample] = scene
                sample = int(after[sample])
        start = np.array([of_scene[sample] for sample in first.tolist() if sample >= 0], dtype=np.int64)
        self.report(
            "scene",
            "first_sample_token",
            np.flatnonzero(first >= 0)[start != np.flatnonzero(first >= 0)],
            "a sample of this scene",
        )
        self.report(
            "sample",
            "scene_token",
            (of_scene >= 0) & (reached != of_scene),
            lambda row: "is not reached from its scene's 'first_sample_token' by way of 'next'",
        )
        self.summaries(of_scene, after)

        keyframes = np.flatnonzero(self.is_key & (self.sample_of_data >= 0))
        channels, channel = np.unique(self.channel_of_data[keyframes].astype(str), return_inverse=True)
        pair = self.sample_of_data[keyframes] * max(len(channels), 1) + channel
        _, once = np.unique(pair, return_index=True)
        again = np.ones(len(keyframes), dtype=bool)
        again[once] = False
        self.report(
            "sample_data",
            "sample_token",
            keyframes[again],
            lambda row: f"is a second keyframe of {self.channel_of_data[row]} in its sample; a sample has one",
        )
        lidar = keyframes[self.channel_of_data[keyframes] == "LIDAR_TOP"]
        lacking = np.ones(count, dtype=bool)
        lacking[self.sample_of_data[lidar]] = False
        self.report(
            "sample",
            "token",
            lacking,
            lambda row: f"has no LIDAR_TOP keyframe in {self.folder / 'sample_data.json'}, which gives the pose",
        )
        self.report(
            "sample_data",
            "timestamp",
            keyframes[
                np.abs(self.data_time - np.append(self.sample_time, 0)[self.sample_of_data])[keyframes] > LATE * 1e6
            ],
            "the microseconds of its sample, except for the exposure's delay",
            "warning",
        )
        lidar_time = np.full(count, -1)
        lidar_time[self.sample_of_data[lidar]] = self.data_time[lidar]
        rows = np.flatnonzero(linked)
        both = (lidar_time[rows] >= 0) & (lidar_time[after[rows]] >= 0)
        early = rows[both & (lidar_time[after[rows]] <= lidar_time[rows])]
        row_of_lidar = np.full(count, -1)
        row_of_lidar[self.sample_of_data[lidar]] = lidar
        self.report(
            "sample_data",
            "timestamp",
            row_of_lidar[after[early]],
            lambda row: (
                f"has {self.data_time[row]} as 'timestamp', which is not later than LIDAR_TOP of the sample before it"
            ),
        )
        gap = (self.sample_time[np.where(linked, after, 0)] - self.sample_time)[linked] if count else np.zeros(0)
        self.report(
            "sample",
            "next",
            rows[gap > MAX_GAP * 1e6],
            lambda row: (
                f"is followed by a gap of more than {MAX_GAP:g} s, after which the memory is empty; timestamps "
                "are microseconds"
            ),
            "warning",
        )

    def summaries(self, of_scene: np.ndarray, after: np.ndarray) -> None:
        """Fields of scenes that repeat what other tables hold; nothing reads them."""
        if self.has("scene", "last_sample_token"):
            last = self.key("scene", "last_sample_token", "sample", severity="warning")
            known = np.flatnonzero(last >= 0)
            wrong = known[(after[last[known]] >= 0) | (of_scene[last[known]] != known)]
            self.report("scene", "last_sample_token", wrong, "the last sample of this scene", "warning")
        self.totals("scene", "nbr_samples", of_scene, "the number of its samples")

    def links(self, table: str, time: np.ndarray, severity: str) -> np.ndarray:
        """Checks `prev` and `next`: they exist, agree, and lead to later records, so that no cycle is possible.

        Returns:
            [R] row number of the next record, -1 for none.
        """
        after = self.key(table, "next", table, empty=True, severity=severity)
        rows = np.flatnonzero(after >= 0)
        known = (time[rows] >= 0) & (time[after[rows]] >= 0)

        def early(row: int) -> str:
            cycle, at = 1, int(after[row])
            while cycle < SHOWN and at >= 0 and at != row:
                cycle, at = cycle + 1, int(after[at])
            what = f"it leads back in a cycle of {cycle}" if at == row else "timestamps must increase"
            return (
                f"has {self.label(table, int(after[row]))} as 'next', which is not later ({time[after[row]]} after "
                f"{time[row]} microseconds); {what}"
            )

        not_later = rows[known & (time[after[rows]] <= time[rows])]
        self.report(table, "next", not_later, early, severity)
        if self.has(table, "prev"):
            before = self.key(table, "prev", table, empty=True, severity=severity)
            self.report(
                table, "next", rows[before[after[rows]] != rows], "a record whose 'prev' is this record", severity
            )
            rows = np.flatnonzero(before >= 0)
            self.report(
                table, "prev", rows[after[before[rows]] != rows], "a record whose 'next' is this record", severity
            )
        after = after.copy()
        after[not_later] = -1
        return after

    def annotations(self) -> None:
        """Boxes, and what the devkit's evaluation expects of them."""
        from nuscenes.eval.detection.utils import category_to_detection_name

        table = "sample_annotation"
        category = self.key("instance", "category_token", "category")
        sample = self.key(table, "sample_token", "sample")
        instance = self.key(table, "instance_token", "instance")
        self.pose(table)
        size = self.vector(table, "size", 3)
        self.report(
            table, "size", (size <= 0).any(1) | (size > LARGEST_BOX).any(1), f"metres above 0, at most {LARGEST_BOX:g},"
        )
        points = np.zeros(len(sample), dtype=np.int64)
        for field in ("num_lidar_pts", "num_radar_pts"):
            points += self.integers(table, field, -1, "a whole number, -1 if it is unknown,")[0]
        if len(points) and not points.any():
            self.report(
                table,
                "num_lidar_pts",
                points == 0,
                lambda row: (
                    "has no LiDAR and radar points, like all others, and the evaluation ignores such boxes; "
                    "write -1 as 'num_lidar_pts' if the number is unknown"
                ),
                "warning",
            )
        after = self.links(table, np.append(self.sample_time, -1)[sample], "error")
        rows = np.flatnonzero(after >= 0)
        self.report(table, "next", rows[instance[after[rows]] != instance[rows]], "a record of the same instance")
        pair = sample * max(len(category), 1) + instance
        _, number, counts = np.unique(pair, return_inverse=True, return_counts=True)
        twice = (counts[number] > 1) & (sample >= 0) & (instance >= 0)
        self.report(table, "instance_token", twice, "an instance once per sample", "warning")
        if self.has(table, "visibility_token"):
            self.key(table, "visibility_token", "visibility", empty=True, severity="warning")

        rows, attribute = self.keys(table, "attribute_tokens", "attribute")
        names = [name if name != _NO_TOKEN else "" for name in self.category_name]
        detected = np.array([category_to_detection_name(name) is not None for name in names] + [False], dtype=bool)
        counted = detected[np.append(category, -1)[instance]]  # of the ten classes
        several = np.bincount(rows, minlength=len(sample)) > 1
        self.report(table, "attribute_tokens", several & counted, "at most one attribute")
        known_name = np.array([name in ATTRIBUTES for name in self.attribute_name], dtype=bool)
        nameless = np.unique(rows[~known_name[attribute]])
        self.report(
            table,
            "attribute_tokens",
            nameless[counted[nameless]],
            lambda row: f"has an attribute that the evaluation does not know; it knows {', '.join(ATTRIBUTES)}",
        )
        for field in ("first_annotation_token", "last_annotation_token"):
            if self.has("instance", field):
                end = self.key("instance", field, table, severity="warning")
                rows = np.flatnonzero(end >= 0)
                self.report("instance", field, rows[instance[end[rows]] != rows], "a box of its own", "warning")
        self.totals("instance", "nbr_annotations", instance, "the number of its boxes")

    def totals(self, table: str, field: str, owner: np.ndarray, needs: str) -> None:
        """Checks a field that holds the number of records that belong to each record; nothing reads it."""
        if not self.has(table, field):
            return
        counts = np.bincount(owner[owner >= 0], minlength=len(self.tables[table])).tolist()
        given = self.column(table, field)
        wrong = [row for row, number in enumerate(given) if number is not _NOTHING and number != counts[row]]
        self.report(table, field, wrong, needs, "warning")


def _inside(name: str) -> bool:
    """Returns whether a path stays below the folder that it is relative to, on any system."""
    if name[0] not in "/\\." and ".." not in name and ":" not in name:
        return True
    slashes = name.replace("\\", "/")
    absolute = slashes.startswith("/") or ntpath.splitdrive(name)[0] != ""
    return not absolute and posixpath.normpath(slashes).split("/")[0] != ".." and posixpath.normpath(slashes) != "."


def _storable(text: str) -> bool:
    """Returns whether text can be stored as bytes and read again: no NUL, and no half of a surrogate pair."""
    return "\0" not in text and (text.isascii() or text.encode(errors="ignore").decode() == text)


def _text(value: object) -> str:
    return value if isinstance(value, str) else _NO_TOKEN


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _floats(value: object, shape: tuple[int, ...]) -> np.ndarray:
    """Returns nested lists of numbers as float64 of a shape; NaN for anything else."""
    if not isinstance(value, list) or len(value) != shape[0]:
        return np.full(shape, np.nan)
    if len(shape) > 1:
        return np.array([_floats(item, shape[1:]) for item in value])
    try:
        return np.array([item if type(item) in (int, float) else np.nan for item in value], dtype=np.float64)
    except OverflowError:
        return np.full(shape, np.nan)


def _short(value: object) -> str:
    if value is _NOTHING:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
