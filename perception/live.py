"""What every live use checks and keeps, with numpy alone: calibration, and the motion from one moment to the next."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from perception.errors import DataError
from perception.geometry import invert_rigid
from perception.types import CameraRig

MAX_GAP = 2.0  # seconds between two steps after which the memory is of no use


class Motion(NamedTuple):
    """From the moment before to this one."""

    ego_from_prev: np.ndarray  # [4, 4] float64, identity if first
    seconds: float  # 0 if first
    is_first: bool


class Odometer:
    """Remembers pose and time of the last moment."""

    def __init__(self) -> None:
        self._last: tuple[np.ndarray, float] | None = None  # global_from_ego [4, 4] float64, seconds

    def since_last(self, global_from_ego: np.ndarray, time_s: float) -> Motion:
        """The motion since the last moment that was kept; a first one if that was more than `MAX_GAP` ago.

        Raises:
            DataError: the pose is not rigid, the time not finite, or it did not go forward.
        """
        pose, time_s = rigid("global_from_ego", global_from_ego), float(time_s)
        if not np.isfinite(time_s):
            raise DataError(f"time_s is {time_s}; give the seconds of this moment as a finite number")
        if self._last is None:
            return Motion(np.eye(4), 0.0, True)
        last_pose, last_time = self._last
        if time_s <= last_time:
            raise DataError(
                f"time_s is {time_s:.6f}, but the last step was at {last_time:.6f}: give moments in order, or call "
                "reset() before another drive"
            )
        if time_s - last_time > MAX_GAP:
            return Motion(np.eye(4), 0.0, True)
        # In float64: global coordinates are kilometres, the motion is centimetres.
        return Motion(invert_rigid(pose) @ last_pose, time_s - last_time, False)

    def keep(self, global_from_ego: np.ndarray, time_s: float) -> None:
        """Makes this the last moment."""
        self._last = np.array(global_from_ego, dtype=np.float64), float(time_s)


def rigid(name: str, matrix) -> np.ndarray:
    """A rigid transform [4, 4] as float64, or a DataError that names it."""
    matrix = np.array(matrix, dtype=np.float64)
    if matrix.shape != (4, 4):
        raise DataError(f"{name} has shape {matrix.shape}; give (4, 4)")
    rotation = matrix[:3, :3]
    # Rotations of real datasets are stored in single precision.
    if not np.isfinite(matrix).all() or (matrix[3] != (0, 0, 0, 1)).any():
        raise DataError(f"{name} is not a rigid transform; give finite numbers and 0 0 0 1 in the last row")
    if np.abs(rotation @ rotation.T - np.eye(3)).max() > 1e-3 or np.linalg.det(rotation) < 0:
        raise DataError(f"{name} is not a rigid transform; its upper left 3 x 3 must be a rotation")
    return matrix


def checked_rig(rig: CameraRig, cameras: int) -> CameraRig:
    """A rig as numpy float64 and bool, with harmless numbers for cameras that are missing.

    Even NaN times weight 0 would be NaN.

    Args:
        rig: img_from_cam [N, 3, 3], ego_from_cam [N, 4, 4], present [N].
        cameras: how many images were given.

    Raises:
        DataError: a shape does not fit, or the calibration of a camera that is present is none.
    """
    N = cameras
    present = np.asarray(rig.present)
    if present.shape != (N,) or present.dtype != bool:
        raise DataError(
            f"rig.present has shape {present.shape} and type {present.dtype}; {N} images were given, so give [{N}] bool"
        )
    for name, matrix in (("img_from_cam", (3, 3)), ("ego_from_cam", (4, 4))):
        if tuple(getattr(rig, name).shape) != (N, *matrix):
            shape = tuple(getattr(rig, name).shape)
            raise DataError(f"rig.{name} has shape {shape}; {N} images were given, so give {(N, *matrix)}")
    img_from_cam, ego_from_cam = np.tile(np.eye(3), (N, 1, 1)), np.tile(np.eye(4), (N, 1, 1))
    for n in np.flatnonzero(present):
        given = np.asarray(rig.img_from_cam[n], dtype=np.float64)
        if not np.isfinite(given).all() or min(given[0, 0], given[1, 1]) <= 0 or (given[2] != (0, 0, 1)).any():
            raise DataError(
                f"rig.img_from_cam[{n}] is not a pinhole calibration; give finite numbers, focal lengths above 0, "
                "and 0 0 1 in the last row"
            )
        img_from_cam[n] = given
        ego_from_cam[n] = rigid(f"rig.ego_from_cam[{n}]", rig.ego_from_cam[n])
    return CameraRig(img_from_cam, ego_from_cam, present.copy())


def checked_image(name: str, image) -> np.ndarray:
    """An RGB image [H, W, 3] uint8, or a DataError that names it."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        what = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise DataError(f"{name} is {what}; give RGB as a numpy array [H, W, 3] of uint8")
    return image
