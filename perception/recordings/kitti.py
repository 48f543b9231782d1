"""Drives of KITTI raw: rectified images, and OXTS as poses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from perception.errors import DataError
from perception.geometry import invert_rigid
from perception.recordings.folders import decode_files
from perception.recordings.recording import Recording, checked_times, chosen_streams
from perception.recordings.trajectory import Trajectory
from perception.rigs.documents import read_text
from perception.rigs.importers import FORMATS, import_rig
from perception.rigs.rig import Rig, rigid_from_rpy

EARTH_RADIUS = 6378137.0  # metres, as in KITTI's devkit
COLOUR = ("image_02", "image_03")


def is_kitti_raw(path: Path) -> bool:
    """Returns True for the folder of a drive."""
    return (path / "oxts").is_dir() or any((path / camera / "timestamps.txt").exists() for camera in COLOUR)


def read_kitti_raw(path: Path, rig: Rig | None = None, streams: Mapping[str, str] | None = None) -> Recording:
    """Reads a drive of KITTI raw, such as `2011_09_26/2011_09_26_drive_0001_sync`.

    Args:
        path: the folder of the drive; `calib_cam_to_cam.txt` and the other calibration files lie in the folder above
            it, that of the day.
        rig: cameras named as the folders, `image_00` to `image_03`; None for the colour cameras there are.
        streams: folder of each camera, where names do not tell.

    Raises:
        DataError: a file is missing or malformed.
    """
    there = sorted(folder.name for folder in path.glob("image_0?") if (folder / "data").is_dir())
    if not there:
        raise DataError(f"{path} has no image_02/data; give the folder of a drive of KITTI raw")
    if rig is None:
        rig = import_rig(path.parent, "kitti_raw", cameras=[c for c in there if c in COLOUR] or there)
    chosen = chosen_streams(there, rig.names, streams or {}, str(path))
    times, files = {}, {}
    for camera, folder in chosen.items():
        stamps = _timestamps(path / folder / "timestamps.txt")
        images = sorted((path / folder / "data").glob("*.png")) or sorted((path / folder / "data").glob("*.jpg"))
        numbered = [int(file.stem) for file in images if file.stem.isdecimal()]
        if not numbered or len(numbered) != len(images) or numbered[-1] >= len(stamps):
            raise DataError(
                f"{path / folder / 'timestamps.txt'} has {len(stamps)} lines, and the last image is "
                f"{images[-1].name if images else 'missing'}; give a whole drive"
            )
        times[camera] = checked_times([stamps[k] for k in numbered], f"{path}: {folder}")
        files[camera] = images
    trajectory = _oxts(path / "oxts") if (path / "oxts" / "data").is_dir() else None
    return Recording(str(path), times, partial(decode_files, files), trajectory, rig)


def _timestamps(path: Path) -> list[int]:
    """Nanoseconds of lines such as `2011-09-26 13:02:25.964389445`."""
    stamps = []
    for number, line in enumerate(read_text(path, "the timestamps of a drive of KITTI raw").splitlines(), 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?:\.(\d{1,9}))?", line.strip())
        try:
            if match is None:
                raise ValueError
            second = datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S").replace(tzinfo=timezone.utc)
        except ValueError:
            raise DataError(
                f"{path}: line {number} is {line.strip()[:40]!r}; give a date and a time, "
                "as 2011-09-26 13:02:25.964389445"
            ) from None
        stamps.append(round(second.timestamp()) * 1_000_000_000 + int((match[2] or "0").ljust(9, "0")))
    return stamps


def _oxts(folder: Path) -> Trajectory:
    """Poses of the GPS/IMU by the formula of KITTI's devkit: a Mercator projection, and roll, pitch and yaw."""
    stamps = _timestamps(folder / "timestamps.txt")
    files = sorted((folder / "data").glob("*.txt"))
    rows = np.array([_oxts_row(file) for file in files]).reshape(-1, 6)
    numbers = [int(file.stem) if file.stem.isdecimal() else -1 for file in files]
    if len(files) and not 0 <= min(numbers) <= max(numbers) < len(stamps):
        raise DataError(
            f"{folder / 'timestamps.txt'} has {len(stamps)} lines for {len(files)} files; give a whole drive"
        )
    poses = [_imu_pose(row, np.cos(np.radians(rows[0, 0]))) for row in rows]
    vehicle = FORMATS["kitti_raw"].ego_from_vehicle
    assert vehicle is not None
    global_from_ego = np.array(poses).reshape(-1, 4, 4) @ invert_rigid(vehicle)
    return Trajectory(np.array([stamps[k] for k in numbers], np.int64), global_from_ego, str(folder))


def _oxts_row(file: Path) -> list[float]:
    """Latitude and longitude in degrees, altitude in metres, roll, pitch and yaw in radians."""
    try:
        row = [float(word) for word in read_text(file, "OXTS data of KITTI raw").split()[:6]]
    except ValueError:
        row = []
    if len(row) != 6 or not np.isfinite(row).all() or abs(row[0]) >= 90 or abs(row[1]) > 360 or abs(row[2]) > 1e5:
        raise DataError(f"{file} does not begin with lat lon alt roll pitch yaw; give OXTS data of KITTI raw")
    return row


def _imu_pose(row: NDArray[np.float64], scale: float) -> NDArray[np.float64]:
    latitude, longitude, altitude, *rpy = row.tolist()
    x = scale * EARTH_RADIUS * np.radians(longitude)
    y = scale * EARTH_RADIUS * np.log(np.tan(np.radians(90 + latitude) / 2))
    return rigid_from_rpy(rpy, (x, y, altitude))
