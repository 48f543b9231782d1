"""Checks the tables of a nuScenes-format dataset, before the devkit or the library uses a number of them.

The devkit trusts its tables: a dangling token is a KeyError, a cycle of `next` never ends, a negative time gives a
velocity of the wrong sign, and some rows stop its evaluation after hours of inference. `check_tables` finds all such
rows at once. Each check works on a whole column, because trainval has millions of rows.
"""

from __future__ import annotations

import ntpath
import os
import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from perception.commands import as_called
from perception.data.tables import (
    MAX_PIXELS,
    NO_TOKEN,
    NOTHING,
    SHOWN,
    TABLES,
    Columns,
    Finding,
    floats,
    read_rig,
    read_table,
    read_tables,
    text_of,
)  # fmt: skip
from perception.errors import DataError
from perception.geometry import invert_rigid, rigid_from_quaternion
from perception.inference.checks import FARTHEST_CAMERA, FARTHEST_POSE, check_intrinsics
from perception.inference.ego_motion import MAX_GAP, interrupted
from perception.rigs.rig import RIG_FILE, Rig
from perception.types import ATTRIBUTES

if TYPE_CHECKING:
    from nuscenes.nuscenes import NuScenes

MODALITIES = ("camera", "lidar", "radar")
LONGEST_NAME, LONGEST_PATH = 200, 1000  # characters; file systems allow some more
SMALLEST_BOX, LARGEST_BOX = 1e-3, 1e3  # metres
UNIT_TOLERANCE = 1e-2  # of the length of a quaternion; tables are rounded, and readers normalise
LATE = 0.5  # seconds between records of one keyframe above which a time is implausible

_accepted: set[tuple[object, ...]] = set()  # states of the files of tables that this process has found to be right


def open_tables(dataroot: Path, version: str) -> NuScenes:
    """Reads and checks all tables and gives them to the devkit, which indexes them.

    Raises:
        DataError: a table is missing or malformed, or records of it cannot be right; the message names the first.
    """
    tables = read_tables(dataroot / version)
    rig_file = dataroot / version / RIG_FILE
    files = [dataroot / version / f"{table}.json" for table in TABLES] + [rig_file] * rig_file.is_file()
    stats = (os.stat(file) for file in files)
    state = (str(dataroot.resolve()), version, *((stat.st_mtime_ns, stat.st_size) for stat in stats))
    # Each validation of a training opens the tables, and checking those of trainval takes a minute.
    findings = [] if state in _accepted else check_tables(dataroot, version, tables)
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        others = f"; {len(errors) - 1} more kinds of faults were found" if len(errors) > 1 else ""
        raise DataError(
            f"{errors[0].sentence()}{others}: correct the tables, or unpack the metadata again; all faults: "
            + as_called(f"perception doctor data {dataroot} --version {version}")
        )
    _accepted.add(state)
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
                found[name] = read_table(folder / f"{name}.json")
            except DataError as error:
                problem = str(error).removeprefix(f"{folder / name}.json ")
                unreadable.append(Finding("error", str(folder / f"{name}.json"), "", (), 0, problem))
        if unreadable:
            return unreadable
        tables = found
    try:
        rig = read_rig(folder)
    except DataError as error:
        path = str(folder / RIG_FILE)
        return [Finding("error", path, "", (), 0, str(error).removeprefix(path).lstrip(": "))]
    return _Check(dataroot, folder, tables, rig).run()


class _Check(Columns):
    """One run of all checks."""

    def __init__(
        self, dataroot: Path, folder: Path, tables: Mapping[str, Sequence[dict[str, Any]]], rig: Rig | None
    ) -> None:
        super().__init__(folder, tables)
        self.dataroot = dataroot
        self.in_rig_file = {camera.name: camera for camera in rig or ()}

    def run(self) -> list[Finding]:
        for table in TABLES:
            self.tokens(table)
        self.names()
        self.sensors()
        self.poses()
        self.samples()
        self.annotations()
        return sorted(self.findings, key=lambda finding: finding.severity != "error")

    def names(self) -> None:
        """Text that the library or the devkit compares, and names of files."""
        self.category_name = self.text("category", "name")
        self.attribute_name = self.text("attribute", "name")
        self.channel = np.array(self.text("sensor", "channel"), dtype=object)
        self.text("sensor", "modality", MODALITIES.__contains__, " or ".join(MODALITIES))
        name = Counter(self.text("scene", "name"))
        repeated = [row for row, scene in enumerate(self.tables["scene"]) if name[text_of(scene.get("name"))] > 1]
        self.report("scene", "name", repeated, "a name that no other scene has", "warning")
        self.text("log", "location", _is_name, "the name of a map")
        self.filename = self.text(
            "sample_data", "filename", inside_root, "a path below the root of the dataset", empty=True
        )
        masks = self.text("map", "filename", inside_root, "a path below the root of the dataset")
        gone = [row for row, mask in enumerate(masks) if mask != NO_TOKEN and not os.path.exists(self.dataroot / mask)]
        self.report(
            "map", "filename", gone, lambda row: f"has no file {self.dataroot / masks[row]}, which is its 'filename'"
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
        modality = np.array([text_of(row.get("modality")) for row in self.tables["sensor"]] + [""], dtype=object)
        self.is_camera = modality[sensor] == "camera"  # [calibrations]
        self.channel_of = np.append(self.channel, "")[sensor]
        _, position = self.pose("calibrated_sensor")
        far = np.abs(position).max(1, initial=0) > FARTHEST_CAMERA
        self.report("calibrated_sensor", "translation", far, f"metres, at most {FARTHEST_CAMERA:g} from the ego origin")
        values = list(self.column("calibrated_sensor", "camera_intrinsic"))
        for row, (value, camera, channel) in enumerate(zip(values, self.is_camera, self.channel_of, strict=True)):
            if camera and value == [] and channel in self.in_rig_file:  # its model has distortion
                values[row] = self.in_rig_file[channel].model.img_from_cam.tolist()
        self.intrinsics = np.array(
            [floats(v, (3, 3)) if camera else np.eye(3) for v, camera in zip(values, self.is_camera, strict=True)]
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

    def pose(self, table: str) -> tuple[np.ndarray, np.ndarray]:
        """Checks rotations and translations; returns them [R, 4] and [R, 3]."""
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
        return rotation, translation

    def poses(self) -> None:
        """Poses of the vehicle, and the files of all sensors."""
        self.ego_pose = self.pose("ego_pose")
        table = "sample_data"
        self.sample_of_data = self.key(table, "sample_token", "sample")
        calibration = self.key(table, "calibrated_sensor_token", "calibrated_sensor")
        self.pose_of_data = pose = self.key(table, "ego_pose_token", "ego_pose")
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
        unnamed = [row for row in rows.tolist() if not self.filename[row]]
        self.report(table, "filename", unnamed, "the path of an image")
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
        self.keyframes(np.where(linked, after, -1))

    def keyframes(self, after: np.ndarray) -> None:
        """The records of each sample, and the time and motion from sample to sample; `after` [S] is the next one."""
        count = len(after)
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
        late = np.abs(self.data_time[keyframes] - self.sample_time[self.sample_of_data[keyframes]]) > LATE * 1e6
        self.report(
            "sample_data",
            "timestamp",
            keyframes[late],
            "the microseconds of its sample, except for the exposure's delay",
            "warning",
        )
        lidar_of = np.full(count, -1)  # row of the LIDAR_TOP keyframe
        lidar_of[self.sample_of_data[lidar]] = lidar
        rows = np.flatnonzero(after >= 0)
        here, there = lidar_of[rows], lidar_of[after[rows]]
        known = (here >= 0) & (there >= 0) & (np.minimum(self.data_time[here], self.data_time[there]) >= 0)
        rows, here, there = rows[known], here[known], there[known]
        early = self.data_time[there] <= self.data_time[here]
        self.report(
            "sample_data",
            "timestamp",
            there[early],
            lambda row: (
                f"has {self.data_time[row]} as 'timestamp', which is not later than LIDAR_TOP of the sample before it"
            ),
        )
        known = ~early & (self.pose_of_data[here] >= 0) & (self.pose_of_data[there] >= 0)
        rows, here, there = rows[known], here[known], there[known]
        if not len(rows):
            return
        ends = [self.ego_poses(self.pose_of_data[end]) for end in (here, there)]  # each [n, 4, 4]
        seconds = (self.data_time[there] - self.data_time[here]) * 1e-6
        broken = interrupted(invert_rigid(ends[1]) @ ends[0], seconds)
        self.report(
            "sample",
            "next",
            rows[broken],
            lambda row: (
                f"is followed by a gap of more than {MAX_GAP:g} s or by a jump of the pose, which empties the memory"
            ),
            "warning",
        )

    def ego_poses(self, rows: np.ndarray) -> np.ndarray:
        """Returns the poses [n, 4, 4] of records; NaN where they are malformed."""
        rotation, translation = (part[rows] for part in self.ego_pose)
        with np.errstate(all="ignore"):
            return np.array([rigid_from_quaternion(q, t) for q, t in zip(rotation, translation, strict=True)])

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
            table,
            "size",
            (size < SMALLEST_BOX).any(1) | (size > LARGEST_BOX).any(1),
            f"metres above 0 ({SMALLEST_BOX:g} to {LARGEST_BOX:g})",
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
        names = [name if name != NO_TOKEN else "" for name in self.category_name]
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
        wrong = [row for row, number in enumerate(given) if number is not NOTHING and number != counts[row]]
        self.report(table, field, wrong, needs, "warning")


def _is_name(text: str) -> bool:
    """Returns whether text can be the name of a file."""
    return len(text) <= LONGEST_NAME and not {"/", "\\"} & set(text) and text not in (".", "..")


def inside_root(name: str) -> bool:
    """Returns whether a path stays below the folder that it is relative to, on any system."""
    if len(name) > LONGEST_PATH:
        return False
    if name[0] not in "/\\." and ".." not in name and ":" not in name:
        return True
    slashes = name.replace("\\", "/")
    absolute = slashes.startswith("/") or ntpath.splitdrive(name)[0] != ""
    return not absolute and posixpath.normpath(slashes).split("/")[0] != ".." and posixpath.normpath(slashes) != "."
