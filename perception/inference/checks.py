"""Checks the inputs and outputs of a network in live use, with numpy alone.

A value that is not finite stays in the memory of a network for all later frames. These checks therefore reject inputs
that are not finite or out of range for a vehicle before the network runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perception.errors import ConfigError, DataError
from perception.geometry import invert_rigid, is_rigid
from perception.types import CameraRig, FrameObjects, NumpyCameraRig, NumpyFrameObjects

FARTHEST_POSE = 1e8  # metres; coordinates of UTM and ECEF stay below 1.1e7
FARTHEST_CAMERA = 50.0  # metres from the ego origin
FOCAL_RANGE = 0.05, 100.0  # times the larger side of the image: fields of view of 169 and 0.6 degrees
FARTHEST_PRINCIPAL = 3.0  # larger sides of the image from its centre; crops move the point out of the image
MAX_SKEW = 0.1  # of the focal length
HIGHEST_ELEVATION = 60.0  # degrees of an optical axis above the horizon
UPRIGHT = 30.0, 60.0  # degrees of roll and elevation up to which a camera stands upright
ROLLED = 60.0  # degrees of roll from which it does not
EPOCH_UNITS = (("nanoseconds", 1e17, "1e9"), ("microseconds", 1e14, "1e6"), ("milliseconds", 1e11, "1e3"))

NOT_FINITE = (
    "the network's output is not finite: this step returns no boxes and no lines, the memory is dropped, and the next "
    "step is a first one; check the images and the calibration of this frame, and the weights if it happens again"
)


def checked_setting(name: str, value: object, low: float, high: float, meaning: str) -> float:
    """Converts a setting to float.

    Args:
        name: of the setting, for the message.
        value: any real number.
        low, high: smallest and largest number that is accepted.
        meaning: which values are accepted, for the message.

    Raises:
        ConfigError: `value` is not a number, or out of range.
    """
    number = _real(value)
    if number is None or not low <= number <= high:
        raise ConfigError(f"{name} is {value!r}; give {meaning}")
    return number


def checked_time(time_s: object) -> float:
    """Converts a time in seconds to float.

    Raises:
        DataError: it is not a finite number, or so large that it has another unit, which the message names.
    """
    seconds = _real(time_s)
    if seconds is None:
        raise DataError(
            f"time_s is {_described(time_s)}; give the seconds of this frame as a number, as datetime.timestamp() does"
        )
    if not np.isfinite(seconds):
        raise DataError(f"time_s is {seconds}; give the seconds of this frame as a finite number")
    for unit, least, divisor in EPOCH_UNITS:
        if abs(seconds) >= least:
            raise DataError(f"time_s is {seconds:.10g}, which looks like {unit} since 1970; divide it by {divisor}")
    return seconds


def checked_number(name: str, value: object, unit: str) -> float:
    """Converts a measured number to float.

    Raises:
        DataError: it is not a finite number.
    """
    number = _real(value)
    if number is None or not np.isfinite(number):
        raise DataError(f"{name} is {_described(value) if number is None else number}; give a finite number of {unit}")
    return number


def checked_pose(global_from_ego: object) -> NDArray[np.float64]:
    """Converts a pose [4, 4] to float64.

    Raises:
        DataError: it is not a rigid transform, or farther from its origin than any place on Earth.
    """
    pose = checked_rigid("global_from_ego", global_from_ego)
    farthest = np.abs(pose[:3, 3]).max()
    if farthest > FARTHEST_POSE:
        raise DataError(
            f"global_from_ego is {farthest:.4g} m from its origin, and no place on Earth needs more than "
            f"{FARTHEST_POSE:.0e}; give metres (not millimetres), and look for uninitialised numbers"
        )
    return pose


def checked_rigid(name: str, transform: object) -> NDArray[np.float64]:
    """Converts a rigid transform [4, 4] to float64.

    Args:
        name: of the transform, for the message.
        transform: array, tensor or nested lists.

    Raises:
        DataError: it is not a rigid transform.
    """
    matrix = _floats(name, transform, (4, 4), "give (4, 4)")
    if not np.isfinite(matrix).all() or (matrix[3] != (0, 0, 0, 1)).any():
        raise DataError(f"{name} is not a rigid transform; give finite numbers and 0 0 0 1 in the last row")
    if not is_rigid(matrix):
        raise DataError(f"{name} is not a rigid transform; its upper left 3 x 3 must be a rotation")
    return matrix


def checked_rig(rig: object, cameras: int) -> NumpyCameraRig:
    """Converts a rig to numpy float64 and bool.

    Cameras that are not present get identity matrices, because NaN times weight 0 is NaN.

    Args:
        rig: a `CameraRig` of img_from_cam [N, 3, 3], ego_from_cam [N, 4, 4], present [N]; arrays, tensors or nested
            lists.
        cameras: number of images.

    Raises:
        DataError: the type or a shape does not fit, or the calibration of a present camera is invalid.
    """
    N = cameras
    if not isinstance(rig, CameraRig | NumpyCameraRig):
        raise DataError(f"rig is {_described(rig)}; give a perception.CameraRig")
    present = _array("rig.present", rig.present)
    if present.shape != (N,) or present.dtype != bool:
        raise DataError(
            f"rig.present has shape {present.shape} and type {present.dtype}; {N} images were given, so give [{N}] bool"
        )
    given_intrinsics, given_poses = (
        _floats(f"rig.{name}", getattr(rig, name), (N, *shape), f"{N} images were given, so give {(N, *shape)}")
        for name, shape in (("img_from_cam", (3, 3)), ("ego_from_cam", (4, 4)))
    )
    img_from_cam, ego_from_cam = np.tile(np.eye(3), (N, 1, 1)), np.tile(np.eye(4), (N, 1, 1))
    for n in np.flatnonzero(present):
        given = given_intrinsics[n]
        if not np.isfinite(given).all() or min(given[0, 0], given[1, 1]) <= 0 or (given[2] != (0, 0, 1)).any():
            raise DataError(
                f"rig.img_from_cam[{n}] is not a pinhole calibration; give finite numbers, focal lengths above 0, "
                "and 0 0 1 in the last row"
            )
        img_from_cam[n] = given
        ego_from_cam[n] = checked_rigid(f"rig.ego_from_cam[{n}]", given_poses[n])
        farthest = np.abs(ego_from_cam[n, :3, 3]).max()
        if farthest > FARTHEST_CAMERA:
            raise DataError(
                f"rig.ego_from_cam[{n}] is {farthest:.4g} m from the ego origin, and no vehicle is longer than "
                f"{FARTHEST_CAMERA:g}; give metres (not millimetres) in the ego frame (not the global one)"
            )
    _check_axes(ego_from_cam, [int(n) for n in np.flatnonzero(present)])
    return NumpyCameraRig(img_from_cam, ego_from_cam, present.copy())


def roll_and_elevation(ego_from_cam: NDArray[np.float64]) -> tuple[float, float]:
    """Returns how a camera is rolled about its optical axis, and how far that axis points above the horizon, degrees.

    The roll is 0 for an image whose columns run downwards, and for a camera that looks nearly straight up or down.

    Args:
        ego_from_cam: [4, 4].
    """
    right, down, forward = ego_from_cam[2, :3].tolist()  # heights of the camera's axes in the ego frame
    elevation = math.degrees(math.asin(max(-1.0, min(forward, 1.0))))
    roll = 0.0 if abs(forward) > 0.9 else math.degrees(math.atan2(-right, -down))
    return roll, elevation


def _check_axes(ego_from_cam: NDArray[np.float64], present: list[int]) -> None:
    """Checks that the rotations of the present cameras are not those of other axes or of the inverse transform."""
    angles = {n: roll_and_elevation(ego_from_cam[n]) for n in present}
    # The inverse of a level camera looks to the right. Cameras that do so and are rolled do not exist.
    rolled = [n for n, (roll, _) in angles.items() if abs(roll) > ROLLED]
    inverses = [roll_and_elevation(invert_rigid(ego_from_cam[n])) for n in present if rolled]
    if rolled and all(abs(roll) < UPRIGHT[0] and abs(up) < UPRIGHT[1] for roll, up in inverses):
        raise DataError(
            f"rig.ego_from_cam[{rolled[0]}] is rolled by {angles[rolled[0]][0]:.0f} degrees, and the inverses of all "
            "matrices are upright cameras: they look like cam_from_ego; give the inverses, which transform camera "
            "points to the ego frame"
        )
    for n, (_, elevation) in angles.items():
        if elevation > HIGHEST_ELEVATION:
            raise DataError(
                f"rig.ego_from_cam[{n}] looks {elevation:.0f} degrees upwards, as a rotation for body axes (ROS: x "
                "forward, z up) does; give one for camera axes (x right, y down, z forward), which is the rotation for "
                "body axes times [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]"
            )


def check_intrinsics(name: str, img_from_cam: NDArray[np.float64], image_size: tuple[int, ...]) -> None:
    """Checks that pinhole intrinsics fit the size of their image.

    Args:
        name: of the calibration, for the message.
        img_from_cam: [3, 3] from `checked_rig`.
        image_size: height and width of the image in pixels.

    Raises:
        DataError: the focal length, the principal point or the skew is out of range.
    """
    (H, W), larger = image_size, max(image_size)
    (focal_x, skew_x, u), (skew_y, focal_y, v), _ = img_from_cam
    low, high = (share * larger for share in FOCAL_RANGE)
    if not low <= min(focal_x, focal_y) <= max(focal_x, focal_y) <= high:
        raise DataError(
            f"{name} has focal lengths of {focal_x:.4g} and {focal_y:.4g} px, and an image of {H} x {W} pixels (height "
            f"x width) can have {low:.4g} to {high:.4g}; give pixels of this image (not millimetres, not 0..1)"
        )
    if max(abs(u - W / 2), abs(v - H / 2)) > FARTHEST_PRINCIPAL * larger:
        raise DataError(
            f"{name} has its principal point at {u:.4g}, {v:.4g} px, far outside an image of {H} x {W} pixels (height "
            "x width); give pixels of this image"
        )
    if abs(skew_x) > MAX_SKEW * focal_x or abs(skew_y) > MAX_SKEW * focal_y:
        raise DataError(
            f"{name} has a skew of {skew_x:.4g} and {skew_y:.4g} px, more than a tenth of its focal length; give the "
            "rows fx 0 cx, 0 fy cy, 0 0 1"
        )


def check_images(images: object, cameras: int | None = None, axes: Sequence[str] = ("H", "W", "3")) -> None:
    """Checks that `images` is a list or an array with one image per camera. It does not check the images themselves.

    Args:
        images: one per camera.
        cameras: number of cameras of the network, None for any number.
        axes: names of the axes of one image, for messages.

    Raises:
        DataError: the type or the number of images does not fit.
    """
    if isinstance(images, np.ndarray):
        if images.ndim != 1 + len(axes) and not (images.ndim == 1 and images.dtype == object):
            raise DataError(f"images is {_described(images)}; give [N, {', '.join(axes)}], one image per camera")
    elif not isinstance(images, Sequence) or isinstance(images, str | bytes):
        raise DataError(f"images is {_described(images)}; give a list or a numpy array of images, one per camera")
    if len(images) == 0:
        raise DataError("images is empty; give one image per camera of the rig, at least one")
    if cameras is not None and len(images) != cameras:
        raise DataError(
            f"images: {len(images)} images were given; the network was exported for {cameras} (give None for a missing "
            "camera)"
        )


def checked_image(name: str, image: object) -> NDArray[np.uint8]:
    """Returns an RGB image [H, W, 3] uint8 after checking it.

    Raises:
        DataError: it has another type or shape, or no pixels.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(f"{name} is {_described(image)}; give RGB as a numpy array [H, W, 3] of uint8")
    if 0 in image.shape:
        raise DataError(f"{name} is {_described(image)} and has no pixels; set rig.present to False for this camera")
    return image


def objects_are_finite(predicted: FrameObjects | NumpyFrameObjects, returned: FrameObjects | NumpyFrameObjects) -> bool:
    """Returns True if all predicted scores and all numbers of the returned objects are finite.

    Of the predictions that are not returned only the scores are checked, because their other numbers have no effect.

    Args:
        predicted: all predictions, as numpy arrays or tensors on the CPU.
        returned: the predictions above the score threshold.
    """
    arrays = (predicted.boxes.score, predicted.lines.score, *returned.boxes, *returned.lines)
    return all(bool(np.isfinite(np.asarray(array)).all()) for array in arrays)


def _array(name: str, values: object) -> NDArray[Any]:
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; tensors on a GPU or with a gradient
        raise DataError(f"{name} cannot be read as an array ({str(error).splitlines()[0]}); give numpy") from None


def _floats(name: str, values: object, shape: tuple[int, ...], fix: str) -> NDArray[np.float64]:
    """Returns a copy as float64, or raises a DataError."""
    array = _array(name, values)
    if array.dtype.kind not in "fiu":
        raise DataError(f"{name} is {_described(values)}; {fix} as real numbers")
    if array.shape != shape:
        raise DataError(f"{name} has shape {array.shape}; {fix}")
    with np.errstate(over="ignore"):  # numbers of more than 64 bits become infinite, which callers reject
        return array.astype(np.float64)


def _real(value: object) -> float | None:
    """Returns a real scalar as float, None for anything else."""
    try:
        if isinstance(value, Real) and not isinstance(value, bool):
            return float(value)
        array = np.asarray(value)
    except OverflowError:
        return np.inf
    except (TypeError, ValueError, RuntimeError):
        return None
    return float(array) if array.shape == () and array.dtype.kind in "fiu" else None


def _described(value: object) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
