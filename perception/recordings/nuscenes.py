"""Scenes of nuScenes-format datasets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from perception.data.table_files import read_table
from perception.errors import DataError
from perception.geometry import rigid_from_quaternion
from perception.reading import nearest
from perception.recordings.folders import decode_files
from perception.recordings.recording import Recording, checked_times, chosen_streams
from perception.recordings.trajectory import Trajectory
from perception.rigs.documents import Fields
from perception.rigs.importers import import_rig
from perception.rigs.rig import Rig

REFERENCE = "LIDAR_TOP"  # whose times are those of the samples


@dataclass(frozen=True, eq=False)
class Scene:
    """The files of a scene.

    Attributes:
        name: of the scene.
        rig: its cameras.
        files: by channel, camera or LiDAR: time in nanoseconds, path, and whether it is of a keyframe.
        trajectory: poses at the times of all files.
        ego_from_lidar: [4, 4] pose of LIDAR_TOP.
    """

    name: str
    rig: Rig
    files: Mapping[str, list[tuple[int, Path, bool]]]
    trajectory: Trajectory
    ego_from_lidar: np.ndarray


def versions(root: Path) -> list[str]:
    """Names of the folders of tables in a folder; none if it is no nuScenes-format dataset."""
    return sorted(path.parent.name for path in root.glob("*/sample_data.json"))


def scene_names(root: Path, version: str) -> list[str]:
    """Names of the scenes of a dataset in the order of its table."""
    rows = read_table(root / version / "scene.json")
    return [Fields(f"{root / version / 'scene.json'}: row {k}", row).text("name") for k, row in enumerate(rows)]


def read_scene(root: Path, version: str, name: str | None = None) -> Scene:
    """Reads the files of a scene from the tables.

    Args:
        root: of the dataset.
        version: folder of the tables.
        name: of the scene; None for the first one.

    Raises:
        DataError: a table is missing or malformed, or there is no such scene.
    """
    folder = root / version
    names = scene_names(root, version)
    if name is None and names:
        name = names[0]
    if name not in names:
        raise DataError(f"{folder / 'scene.json'} has no scene {name!r}; {nearest(str(name), names)}")

    def table(kind: str) -> dict[str, Fields]:
        rows = read_table(folder / f"{kind}.json")
        fields = [Fields(f"{folder / f'{kind}.json'}: row {k}", row) for k, row in enumerate(rows)]
        return {row.text("token"): row for row in fields}

    def linked(row: Fields, key: str, rows: Mapping[str, Fields]) -> Fields:
        token = row.text(key)
        if token not in rows:
            raise DataError(f"{row.at(key)} is {token!r}, which no record has; give the tables of one version")
        return rows[token]

    scene = next(row for row in table("scene").values() if row.text("name") == name)
    samples = {token for token, row in table("sample").items() if row.get("scene_token") == scene.text("token")}
    sensors, calibrations, poses = table("sensor"), table("calibrated_sensor"), table("ego_pose")
    files: dict[str, list[tuple[int, Path, bool]]] = {}
    times, moved, lidar = [], [], np.eye(4)
    for row in table("sample_data").values():
        if row.get("sample_token") not in samples:
            continue
        calibration = linked(row, "calibrated_sensor_token", calibrations)
        sensor = linked(calibration, "sensor_token", sensors)
        channel = sensor.text("channel")
        if sensor.get("modality") != "camera" and channel != REFERENCE:
            continue
        time = int(row.number("timestamp")) * 1000
        pose = linked(row, "ego_pose_token", poses)
        files.setdefault(channel, []).append((time, root / row.text("filename"), bool(row.get("is_key_frame"))))
        times.append(time)
        moved.append(rigid_from_quaternion(pose.array("rotation", (4,)), pose.array("translation", (3,))))
        if channel == REFERENCE:
            lidar = rigid_from_quaternion(calibration.array("rotation", (4,)), calibration.array("translation", (3,)))
    trajectory = Trajectory(np.array(times, np.int64), np.array(moved).reshape(-1, 4, 4), f"{folder / 'ego_pose.json'}")
    ordered = {channel: sorted(found) for channel, found in files.items()}
    return Scene(name, import_rig(folder, "nuscenes", scene=name), ordered, trajectory, np.asarray(lidar))


def read_nuscenes(
    root: Path,
    rig: Rig | None = None,
    streams: Mapping[str, str] | None = None,
    *,
    version: str | None = None,
    scene: str | None = None,
) -> Recording:
    """Reads the keyframes of a scene of a nuScenes-format dataset. The times of frames are those of LIDAR_TOP.

    Args:
        root: of the dataset.
        rig: the cameras; None for those of the scene.
        streams: channel of each camera, where names do not tell.
        version: folder of the tables; None if there is one.
        scene: name of the scene; None for the first one.

    Raises:
        DataError: a table is missing or malformed, or there is no such scene, or several versions.
    """
    found = versions(root)
    if version is None and len(found) != 1:
        raise DataError(f"{root} has the versions {', '.join(found)}; give --version")
    read = read_scene(root, version or found[0], scene)
    keyframes = {channel: [row for row in rows if row[2]] for channel, rows in read.files.items()}
    times = {
        channel: checked_times([time for time, _, _ in rows], f"{root}: scene {read.name}: {channel}")
        for channel, rows in keyframes.items()
        if rows
    }
    other = {REFERENCE: times.pop(REFERENCE)} if REFERENCE in times else {}
    rig = rig or read.rig
    chosen = chosen_streams(times, rig.names, streams or {}, f"{root}: scene {read.name}")
    files = {camera: [path for _, path, _ in keyframes[channel]] for camera, channel in chosen.items()}
    times = {camera: times[channel] for camera, channel in chosen.items()}
    names = scene_names(root, version or found[0])
    notes = () if scene or len(names) == 1 else (f"this is scene {read.name} of {len(names)}; choose with --scene",)
    return Recording(
        f"{root}: scene {read.name}", times, partial(decode_files, files), read.trajectory, rig, other,
        next(iter(other), None), notes,
    )  # fmt: skip
