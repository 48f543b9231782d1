"""Computes rigid transforms, yaw angles, projections and polyline lengths.

Transforms are named `dst_from_src`, so that neighbouring names match in a product: `img_from_cam @ cam_from_ego`. The
functions on transforms and points accept numpy arrays and torch tensors and keep their dtype: datasets use float64, the
network uses float32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

from perception.types import Array

if TYPE_CHECKING:
    from torch import Tensor

ArrayOrTensor = TypeVar("ArrayOrTensor", Array, "Tensor")
P = ParamSpec("P")
R = TypeVar("R")


def _library(array: Array | Tensor) -> Any:
    """Returns the module of an array, numpy or torch. It does not import torch, which a vehicle does not have."""
    # A tuple of types: `torch.compile` splits its graph at a union of types.
    return np if isinstance(array, (np.ndarray, np.generic)) else sys.modules["torch"]


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function that autocast must not change: half precision is too coarse for metres and pixels."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        torch: Any = sys.modules.get("torch")
        for device in ("cpu", "cuda") if torch else ():
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return wrapped(*args, **kwargs)
        return function(*args, **kwargs)

    return wrapped


def transform_points(dst_from_src: ArrayOrTensor, points: ArrayOrTensor) -> ArrayOrTensor:
    """Applies rigid (or any affine) transforms to points.

    Args:
        dst_from_src: [..., 4, 4].
        points: [..., P, 3], leading dimensions broadcast against those of the transform.

    Returns:
        [..., P, 3] in the destination frame.
    """
    # Products and sums instead of a matrix product, which autocast would run in half precision.
    rotation = dst_from_src[..., None, :3, :3]
    moved: ArrayOrTensor = (rotation * points[..., None, :]).sum(-1) + dst_from_src[..., None, :3, 3]
    return moved


@full_precision
def invert_rigid(dst_from_src: ArrayOrTensor) -> ArrayOrTensor:
    """Inverts rigid transforms [..., 4, 4] by transposing the rotation."""
    lib = _library(dst_from_src)
    rotation = dst_from_src[..., :3, :3].swapaxes(-1, -2)
    translation = -(rotation @ dst_from_src[..., :3, 3:])
    top = lib.concatenate([rotation, translation], -1)
    inverse: ArrayOrTensor = lib.concatenate([top, dst_from_src[..., 3:, :]], -2)
    return inverse


RIGID_TOLERANCE = 1e-3  # of the entries of rotation times its transpose; poses are often stored in single precision


def is_rigid(dst_from_src: Array) -> bool:
    """Returns True for a finite matrix [4, 4] with a rotation, no mirroring, and 0 0 0 1 in the last row."""
    if dst_from_src.shape != (4, 4) or not np.isfinite(dst_from_src).all() or (dst_from_src[3] != (0, 0, 0, 1)).any():
        return False
    rotation = dst_from_src[:3, :3]
    # Large numbers are checked first, because their products would overflow.
    return bool(
        np.abs(rotation).max() <= 2
        and np.abs(rotation @ rotation.T - np.eye(3)).max() <= RIGID_TOLERANCE
        and np.linalg.det(rotation) > 0
    )


def yaw_from_rotation(rotation: ArrayOrTensor) -> ArrayOrTensor:
    """Returns the yaw of rotations [..., 3+, 3+]: the angle of the rotated x axis in the xy plane, in (-pi, pi]."""
    lib = _library(rotation)
    yaw: ArrayOrTensor = lib.arctan2(rotation[..., 1, 0], rotation[..., 0, 0])
    return yaw


def wrap_angle(angle: ArrayOrTensor) -> ArrayOrTensor:
    """Wraps angles to [-pi, pi), radians."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


def rigid_from_yaw(yaw: float, translation: Sequence[float] | Array = (0.0, 0.0, 0.0)) -> Array:
    """Returns a [4, 4] float64 transform that rotates by `yaw` radians about z, then moves by `translation` metres."""
    transform = np.eye(4)
    transform[:2, :2] = [[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]]
    transform[:3, 3] = translation
    return transform


def rigid_from_quaternion(quaternion_wxyz: Sequence[float] | Array, translation: Sequence[float] | Array) -> Array:
    """Returns [..., 4, 4] float64 transforms from nuScenes' rotations (w, x, y, z) and translations (metres).

    Args:
        quaternion_wxyz: [..., 4], of any length above 0.
        translation: [..., 3].
    """
    quaternion = np.asarray(quaternion_wxyz, dtype=np.float64)
    # The product of one row and one column has the same digits as `np.linalg.norm` of one quaternion.
    length = np.sqrt(quaternion[..., None, :] @ quaternion[..., :, None])[..., 0]  # [..., 1]
    w, x, y, z = np.moveaxis(quaternion / length, -1, 0)
    transform = np.zeros((*quaternion.shape[:-1], 4, 4))
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    for i, row in enumerate(rows):
        for j, entry in enumerate(row):
            transform[..., i, j] = entry
    transform[..., :3, 3] = translation
    transform[..., 3, 3] = 1
    return transform


def project_points(
    img_from_cam: ArrayOrTensor, points_cam: ArrayOrTensor, min_depth: float = 0.1
) -> tuple[ArrayOrTensor, ArrayOrTensor]:
    """Projects camera points to pixels with the pinhole model.

    Args:
        img_from_cam: [..., 3, 3].
        points_cam: [..., P, 3] metres.
        min_depth: depths below this are clamped to it before the division, so that pixels stay finite.

    Returns:
        uv_img [..., P, 2] pixels, depth [..., P] metres (not clamped; negative behind the camera).
    """
    homogeneous = (img_from_cam[..., None, :, :] * points_cam[..., None, :]).sum(-1)
    depth = points_cam[..., 2]
    return homogeneous[..., :2] / homogeneous[..., 2:].clip(min=min_depth), depth


def box_corners(center: ArrayOrTensor, size: ArrayOrTensor, yaw: ArrayOrTensor) -> ArrayOrTensor:
    """Returns the corners of boxes in the frame of their centres.

    Args:
        center: [..., 3] metres.
        size: [..., 3] length, width, height, metres.
        yaw: [...] radians.

    Returns:
        [..., 8, 3]: the bottom face counter-clockwise seen from above, starting at the front left, then the top face in
        the same order.
    """
    lib = _library(center)
    signs = [[1, 1], [-1, 1], [-1, -1], [1, -1]]
    half = size / 2
    corners = []
    for z_sign in (-1, 1):
        for x_sign, y_sign in signs:
            x, y = x_sign * half[..., 0], y_sign * half[..., 1]
            turned = [lib.cos(yaw) * x - lib.sin(yaw) * y, lib.sin(yaw) * x + lib.cos(yaw) * y, z_sign * half[..., 2]]
            corners.append(center + lib.stack(turned, -1))
    stacked: ArrayOrTensor = lib.stack(corners, -2)
    return stacked


def polyline_length(points: Array) -> float:
    """Returns the length in metres of one polyline [P, 2 or 3]."""
    return float(np.linalg.norm(np.diff(points, axis=0), axis=1).sum())


def resample_polyline(points: Array, count: int) -> Array:
    """Resamples one polyline to `count` points with equal spacing by arc length, both ends included.

    Args:
        points: [P, D] with P >= 1; a line of length zero gives `count` copies of its first point.
        count: at least 2.

    Returns:
        [count, D] float64.
    """
    points = np.asarray(points, dtype=np.float64)
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    keep = np.concatenate([[True], steps > 0])
    points, arc = points[keep], np.concatenate([[0.0], np.cumsum(steps[steps > 0])])
    wanted = np.linspace(0.0, arc[-1], count)
    return np.stack([np.interp(wanted, arc, points[:, d]) for d in range(points.shape[1])], axis=1)
