"""Checks the inputs of every live use and measures the motion between frames, with numpy alone.

A network with a memory never forgets a number that is not finite. So whatever no vehicle can have is refused here,
before the network runs; a motion that no vehicle can make starts the memory afresh.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import numpy as np

from perception.errors import ConfigError, DataError
from perception.geometry import is_rigid
from perception.types import CameraRig, FrameObjects

FARTHEST_POSE = 1e8  # metres; coordinates of UTM and ECEF stay below 1.1e7
FARTHEST_CAMERA = 50.0  # metres from the ego origin
FOCAL_RANGE = 0.05, 100.0  # times the larger side of the image: fields of view of 169 and 0.6 degrees
FARTHEST_PRINCIPAL = 3.0  # larger sides of the image from its middle; crops move the point out of the image
MAX_SKEW = 0.1  # of the focal length
EPOCH_UNITS = (("nanoseconds", 1e17, "1e9"), ("microseconds", 1e14, "1e6"), ("milliseconds", 1e11, "1e3"))

NOT_FINITE = (
    "the network's output is not finite: this step returns no boxes and no lines, the memory is dropped, and the next "
    "step is a first one; check the images and the calibration of this frame, and the weights if it happens again"
)


def checked_setting(name: str, value, low: float, high: float, meaning: str) -> float:
    """A number of low..high as float, or a ConfigError that names it."""
    number = _real(value)
    if number is None or not low <= number <= high:
        raise ConfigError(f"{name} is {value!r}; give {meaning}")
    return number


def checked_time(time_s) -> float:
    """A time in seconds as float, or a DataError that names the likely unit."""
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


def checked_pose(global_from_ego) -> np.ndarray:
    """A pose [4, 4] as float64, or a DataError that says what is wrong."""
    pose = rigid("global_from_ego", global_from_ego)
    farthest = np.abs(pose[:3, 3]).max()
    if farthest > FARTHEST_POSE:
        raise DataError(
            f"global_from_ego is {farthest:.4g} m from its origin, and no place on Earth needs more than "
            f"{FARTHEST_POSE:.0e}; give metres (not millimetres), and look for numbers that were never set"
        )
    return pose


def rigid(name: str, matrix) -> np.ndarray:
    """A rigid transform [4, 4] as float64, or a DataError that names it."""
    matrix = _floats(name, matrix, (4, 4), "give (4, 4)")
    if not np.isfinite(matrix).all() or (matrix[3] != (0, 0, 0, 1)).any():
        raise DataError(f"{name} is not a rigid transform; give finite numbers and 0 0 0 1 in the last row")
    if not is_rigid(matrix):
        raise DataError(f"{name} is not a rigid transform; its upper left 3 x 3 must be a rotation")
    return matrix


def checked_rig(rig: CameraRig, cameras: int) -> CameraRig:
    """A rig as numpy float64 and bool, with harmless numbers for cameras that are missing.

    Even NaN times weight 0 would be NaN.

    Args:
        rig: img_from_cam [N, 3, 3], ego_from_cam [N, 4, 4], present [N]; arrays, tensors or nested lists.
        cameras: how many images were given.

    Raises:
        DataError: the type or a shape does not fit, or the calibration of a camera that is present is none.
    """
    N = cameras
    if not isinstance(rig, CameraRig):
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
        ego_from_cam[n] = rigid(f"rig.ego_from_cam[{n}]", given_poses[n])
        farthest = np.abs(ego_from_cam[n, :3, 3]).max()
        if farthest > FARTHEST_CAMERA:
            raise DataError(
                f"rig.ego_from_cam[{n}] is {farthest:.4g} m from the ego origin, and no vehicle is longer than "
                f"{FARTHEST_CAMERA:g}; give metres (not millimetres) in the ego frame (not the global one)"
            )
    return CameraRig(img_from_cam, ego_from_cam, present.copy())


def check_intrinsics(name: str, img_from_cam: np.ndarray, image_size: tuple[int, int]) -> None:
    """Refuses a pinhole calibration that cannot be of an image of this size.

    Args:
        name: of the calibration, for the message.
        img_from_cam: [3, 3] of `checked_rig`.
        image_size: height and width in pixels of the image that it belongs to.

    Raises:
        DataError: focal length, principal point or skew are out of range.
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


def check_images(images, cameras: int | None = None, axes: Sequence[str] = ("H", "W", "3")) -> None:
    """Refuses what is not a list or an array of images, before any of them is looked at.

    Args:
        images: one per camera.
        cameras: how many the network takes, None for any number.
        axes: of one image.

    Raises:
        DataError: the type, or the number of images, does not fit.
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
            f"images: {len(images)} images were given; the network was exported for {cameras} (absent ones are None)"
        )


def checked_image(name: str, image) -> np.ndarray:
    """An RGB image [H, W, 3] uint8, or a DataError that names it."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(f"{name} is {_described(image)}; give RGB as a numpy array [H, W, 3] of uint8")
    if 0 in image.shape:
        raise DataError(f"{name} is {_described(image)} and holds no pixel; mark a camera without image in rig.present")
    return image


def scene_is_finite(whole: FrameObjects, kept: FrameObjects) -> bool:
    """Tells whether the scores of all predictions and all numbers of those that are handed out are finite.

    Only the scores count of what is left out: a box that nobody sees may have any size.

    Args:
        whole: all predictions, numpy or on the CPU.
        kept: those that are handed out.
    """
    arrays = [np.asarray(array) for array in (whole.boxes.score, whole.lines.score, *kept.boxes, *kept.lines)]
    return all(np.isfinite(array).all() for array in arrays)


def _array(name: str, values) -> np.ndarray:
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; tensors on a GPU, or that want a gradient
        raise DataError(f"{name} cannot be read as an array ({str(error).splitlines()[0]}); give numpy") from None


def _floats(name: str, values, shape: tuple[int, ...], fix: str) -> np.ndarray:
    """A copy as float64, or a DataError."""
    array = _array(name, values)
    if array.dtype.kind not in "fiu":
        raise DataError(f"{name} is {_described(values)}; {fix} as real numbers")
    if array.shape != shape:
        raise DataError(f"{name} has shape {array.shape}; {fix}")
    with np.errstate(over="ignore"):  # numbers of more than 64 bits become infinite, which is refused
        return array.astype(np.float64)


def _real(value) -> float | None:
    """The float of a real scalar, None of anything else."""
    try:
        if isinstance(value, Real) and not isinstance(value, bool):
            return float(value)
        array = np.asarray(value)
    except OverflowError:
        return np.inf
    except (TypeError, ValueError, RuntimeError):
        return None
    return float(array) if array.shape == () and array.dtype.kind in "fiu" else None


def _described(value) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
