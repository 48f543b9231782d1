"""Checks the tables of a nuScenes-format dataset, before the devkit or the library uses a number of them.

The devkit trusts its tables: a dangling token is a KeyError, a cycle of `next` never ends, a negative time gives a
velocity of the wrong sign, and some rows stop its evaluation after hours of inference. `check_tables` finds all such
rows at once. Each check works on a whole column, because trainval has millions of rows.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from perception.data.findings import SHOWN, Columns, Finding
from perception.data.table_files import TABLES
from perception.data.tables import (
    DETECTION_CLASS,
    MAX_PIXELS,
    NO_TOKEN,
    NOTHING,
    Paths,
    Tables,
    floats,
    inside_root,
    text_of,
)
from perception.errors import DataError
from perception.geometry import invert_rigid, rigid_from_quaternion
from perception.inference.checks import FARTHEST_CAMERA, FARTHEST_POSE, check_intrinsics
from perception.inference.ego_motion import MAX_GAP, interrupted
from perception.rigs.rig import Rig
from perception.types import ATTRIBUTES

MODALITIES = ("camera", "lidar", "radar")
LONGEST_NAME = 200  # characters; file systems allow some more
SMALLEST_BOX, LARGEST_BOX = 1e-3, 1e3  # metres
UNIT_TOLERANCE = 1e-2  # of the length of a quaternion; tables are rounded, and readers normalise
LARGE = ("ego_pose", "sample_data", "sample_annotation")  # tables with millions of records
NO_CHANNEL = -2  # that no file has
LATE = 0.5  # seconds between records of one keyframe above which a time is implausible


class Keyframes(NamedTuple):
    """The K files of keyframes. Row numbers are -1 where a token is dangling, numbers NaN where they are malformed."""

    row: np.ndarray  # [K] in sample_data
    sample: np.ndarray  # [K] row of its sample
    calibration: np.ndarray  # [K] row in calibrated_sensor
    channel: np.ndarray  # [K] row in sensor
    time: np.ndarray  # [K] int64 microseconds, -1 where it is malformed
    size: np.ndarray  # [K, 2] int64 height and width; 0 for what is no camera
    path: list[bytes]  # [K]
    rotation: np.ndarray  # [K, 4] of the vehicle in the global frame
    translation: np.ndarray  # [K, 3]

    def poses(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the vehicle's poses global_from_ego [n, 4, 4] of files."""
        with np.errstate(all="ignore"):
            return rigid_from_quaternion(self.rotation[numbers], self.translation[numbers])


class TableCheck(Columns):
    """One run of all checks. It leaves the columns that an index needs as attributes."""

    def __init__(self, dataroot: Path, folder: Path, tables: Tables, rig: Rig | None) -> None:
        super().__init__(folder, tables)
        self.dataroot, self.rig = dataroot, rig

    def run(self) -> list[Finding]:
        for table in TABLES:
            if table not in LARGE:
                self.tokens(table)
        self.names()
        self.sensors()
        self.files()
        self.samples()
        self.annotations()
        return sorted(self.findings, key=lambda finding: finding.severity != "error")

    def names(self) -> None:
        """Text that the library or the devkit compares, and names of files."""
        self.category_name = self.text("category", "name")
        self.attribute_name = self.text("attribute", "name")
        self.channel = self.text("sensor", "channel")
        self.text("sensor", "modality", MODALITIES.__contains__, " or ".join(MODALITIES))
        self.scene_name = self.text("scene", "name")
        name = Counter(self.scene_name)
        repeated = [row for row, given in enumerate(self.column("scene", "name")) if name[text_of(given)] > 1]
        self.report("scene", "name", repeated, "a name that no other scene has", "warning")
        self.location = self.text("log", "location", _is_name, "the name of a map")
        paths: Paths = self.column("sample_data", "filename")
        self.report("sample_data", "filename", paths.state < 0, "a path below the root of the dataset")
        masks = self.text("map", "filename", inside_root, "a path below the root of the dataset")
        gone = [row for row, mask in enumerate(masks) if mask != NO_TOKEN and not os.path.exists(self.dataroot / mask)]
        self.report(
            "map", "filename", gone, lambda row: f"has no file {self.dataroot / masks[row]}, which is its 'filename'"
        )
        # nuScenes' own mini version lists the logs of the whole dataset, so dangling tokens are usual here.
        _, logs = self.keys("map", "log_tokens", "log", check=False)
        lacking = np.ones(self.tables["log"].rows, dtype=bool)
        lacking[logs] = False
        self.report("log", "token", lacking, lambda row: "is in no 'log_tokens' of map.json; add it to its map")
        if not self.tables["map"].rows:
            self.add("error", "map", "", [], "has no record; add one for each map")

    def sensors(self) -> None:
        """Calibration, as in live use."""
        sensor = self.key("calibrated_sensor", "sensor_token", "sensor")
        self.modality = [text_of(value) for value in self.column("sensor", "modality")]
        self.sensor = sensor
        self.is_camera = np.array([*(kind == "camera" for kind in self.modality), False])[sensor]  # [calibrations]
        # Sensors with the same channel count as one.
        self.sensor_of_channel = {channel: row for row, channel in enumerate(self.channel)}
        same = [self.sensor_of_channel[channel] for channel in self.channel]
        self.channel_of = np.array([*same, -1])[sensor]
        self.calibration = _, position = self.pose("calibrated_sensor")
        far = np.abs(position).max(1, initial=0) > FARTHEST_CAMERA
        self.report("calibrated_sensor", "translation", far, f"metres, at most {FARTHEST_CAMERA:g} from the ego origin")
        values = list(self.column("calibrated_sensor", "camera_intrinsic"))
        in_rig_file = {camera.name: camera for camera in self.rig or ()}
        for row in np.flatnonzero(self.is_camera & (self.channel_of >= 0)) if in_rig_file else ():
            if values[row] == [] and (camera := in_rig_file.get(self.channel[self.channel_of[row]])):
                values[row] = camera.model.img_from_cam.tolist()  # its model has distortion
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
        rotation, translation = self.vector(table, "rotation"), self.vector(table, "translation")
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

    def files(self) -> None:
        """The files of all sensors, and the poses of the vehicle."""
        table = "sample_data"
        self.tokens(table)
        time, timed = self.integers(table, "timestamp", 0, "whole microseconds")
        time = np.where(timed, time, -1)
        if self.has(table, "next"):
            self.links(table, time, "warning")
        del self.lookup[table]
        key = self.take(table, "is_key_frame")
        self.report(table, "is_key_frame", key < 0, "true or false")
        is_key = key > 0
        sample = self.key(table, "sample_token", "sample")[is_key]
        calibration = self.key(table, "calibrated_sensor_token", "calibrated_sensor")
        self.images(is_key, calibration)
        calibration = calibration[is_key]

        self.tokens("ego_pose")
        rotation, translation = self.pose("ego_pose")
        pose = self.key(table, "ego_pose_token", "ego_pose")
        del self.lookup["ego_pose"]
        if self.has("ego_pose", "timestamp"):
            pose_time, pose_timed = self.integers("ego_pose", "timestamp", 0, "whole microseconds")
            known = (pose >= 0) & timed
            other = np.abs(np.append(pose_time, 0)[pose] - time) > LATE * 1e6
            other &= known & np.append(pose_timed, False)[pose]
            self.report(table, "ego_pose_token", other, "the pose at its own timestamp", "warning")
        pose = pose[is_key]
        posed = [np.full((len(pose), part.shape[1]), np.nan) for part in (rotation, translation)]
        for kept, part in zip(posed, (rotation, translation), strict=True):
            kept[pose >= 0] = part[pose[pose >= 0]]
        self.keyframes = Keyframes(
            row=np.flatnonzero(is_key),
            sample=sample,
            calibration=calibration,
            channel=np.append(self.channel_of, -1)[calibration],
            time=time[is_key],
            size=self.image_size,
            path=self.take(table, "filename").keyframes,
            rotation=posed[0],
            translation=posed[1],
        )

    def images(self, is_key: np.ndarray, calibration: np.ndarray) -> None:
        """Files and sizes of the images of keyframes."""
        table = "sample_data"
        camera = is_key & np.append(self.is_camera, False)[calibration]
        rows = np.flatnonzero(camera)
        unnamed = self.column(table, "filename").state[rows] == 0
        self.report(table, "filename", rows[unnamed], "the path of an image")
        sizes, good = [], np.ones(len(rows), dtype=bool)
        for field in ("height", "width"):
            size, whole = self.integers(table, field, 1, "whole pixels", rows)
            sizes.append(size)
            good &= whole
        self.image_size = np.zeros((int(is_key.sum()), 2), dtype=np.int64)
        self.image_size[camera[is_key]] = np.stack(sizes, 1)
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
        self.log_of_scene = self.key("scene", "log_token", "log")
        self.first_sample = first = self.key("scene", "first_sample_token", "sample")
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
        self.next_sample = np.where(linked, after, -1)
        self.order(self.next_sample)

    def order(self, after: np.ndarray) -> None:
        """The records of each sample, and the time and motion from sample to sample; `after` [S] is the next one."""
        count = len(after)
        files = self.keyframes
        known = np.flatnonzero(files.sample >= 0)
        sample = files.sample[known]
        _, once = np.unique(sample * (len(self.channel) + 1) + files.channel[known], return_index=True)
        again = np.ones(len(known), dtype=bool)
        again[once] = False
        twice = known[again]
        names = [*self.channel, ""]
        channel_of = {
            int(row): names[channel] for row, channel in zip(files.row[twice], files.channel[twice], strict=True)
        }
        self.report(
            "sample_data",
            "sample_token",
            files.row[twice],
            lambda row: f"is a second keyframe of {channel_of[row]} in its sample; a sample has one",
        )
        lidar = known[files.channel[known] == self.sensor_of_channel.get("LIDAR_TOP", NO_CHANNEL)]
        lacking = np.ones(count, dtype=bool)
        lacking[files.sample[lidar]] = False
        self.report(
            "sample",
            "token",
            lacking,
            lambda row: f"has no LIDAR_TOP keyframe in {self.folder / 'sample_data.json'}, which gives the pose",
        )
        late = np.abs(files.time[known] - self.sample_time[sample]) > LATE * 1e6
        self.report(
            "sample_data",
            "timestamp",
            files.row[known[late]],
            "the microseconds of its sample, except for the exposure's delay",
            "warning",
        )
        self.lidar_of = lidar_of = np.full(count, -1)  # number of the LIDAR_TOP keyframe
        lidar_of[files.sample[lidar]] = lidar
        rows = np.flatnonzero(after >= 0)
        here, there = lidar_of[rows], lidar_of[after[rows]]
        found = (here >= 0) & (there >= 0)
        rows, here, there = rows[found], here[found], there[found]
        timed = np.minimum(files.time[here], files.time[there]) >= 0
        rows, here, there = rows[timed], here[timed], there[timed]
        early = files.time[there] <= files.time[here]
        time_of = dict(zip(files.row[there[early]].tolist(), files.time[there[early]].tolist(), strict=True))
        self.report(
            "sample_data",
            "timestamp",
            files.row[there[early]],
            lambda row: f"has {time_of[row]} as 'timestamp', which is not later than LIDAR_TOP of the sample before it",
        )
        lost = np.isnan(files.rotation[:, 0]) | np.isnan(files.translation[:, 0])
        good = ~early & ~lost[here] & ~lost[there]
        rows, here, there = rows[good], here[good], there[good]
        if not len(rows):
            return
        ends = [files.poses(end) for end in (here, there)]  # each [n, 4, 4]
        seconds = (files.time[there] - files.time[here]) * 1e-6
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
        if self.has(table, "prev") or table == "sample_annotation":  # whose velocity is computed by it
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
        table = "sample_annotation"
        self.tokens(table)
        self.category = category = self.key("instance", "category_token", "category")
        self.sample_of_box = sample = self.key(table, "sample_token", "sample")
        self.instance = instance = self.key(table, "instance_token", "instance")
        self.box_pose = self.pose(table)
        self.box_size = size = self.vector(table, "size")
        self.report(
            table,
            "size",
            (size < SMALLEST_BOX).any(1) | (size > LARGEST_BOX).any(1),
            f"metres above 0 ({SMALLEST_BOX:g} to {LARGEST_BOX:g})",
        )
        points = np.zeros(len(sample), dtype=np.int64)
        for field in ("num_lidar_pts", "num_radar_pts"):
            points += self.integers(table, field, -1, "a whole number, -1 if it is unknown,")[0]
        self.box_points = points
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
        self.next_box = after
        pair = sample * max(len(category), 1) + instance
        _, number, counts = np.unique(pair, return_inverse=True, return_counts=True)
        twice = (counts[number] > 1) & (sample >= 0) & (instance >= 0)
        self.report(table, "instance_token", twice, "an instance once per sample", "warning")
        if self.has(table, "visibility_token"):
            self.key(table, "visibility_token", "visibility", empty=True, severity="warning")

        rows, attribute = self.keys(table, "attribute_tokens", "attribute")
        self.attribute_rows, self.attribute = rows, attribute
        detected = np.array([*(name in DETECTION_CLASS for name in self.category_name), False])
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
        counts = np.bincount(owner[owner >= 0], minlength=self.tables[table].rows).tolist()
        given = self.column(table, field)
        wrong = [row for row, number in enumerate(given) if number is not NOTHING and number != counts[row]]
        self.report(table, field, wrong, needs, "warning")


def _is_name(text: str) -> bool:
    """Returns whether text can be the name of a file."""
    return len(text) <= LONGEST_NAME and not {"/", "\\"} & set(text) and text not in (".", "..")
