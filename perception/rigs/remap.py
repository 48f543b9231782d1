"""Resamples the image of a physical camera as the image of a pinhole at the same place.

The table of a pinhole holds for each of its pixels where the physical camera sees the same direction. It is computed
once and kept by content. Pixels are interpolated bilinearly in integers, so that results are the same on every machine.
Where the pinhole has fewer pixels per degree than the camera, the image is first reduced by Pillow's bilinear filter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from perception.rigs.rig import RigCamera

WEIGHT_BITS = 12  # of the interpolation weights; 8 more bits and the rounding fit into a lane of 21
LANES = (0, 21, 42)  # the three channels in one 64-bit number
CACHED_TABLES = 64  # a table has 12 bytes per pixel, 2 MB at 256 x 704


@dataclass(frozen=True, eq=False)
class RemapTable:
    """Where the pixels of a pinhole lie in the image of a physical camera.

    Attributes:
        uv_img: [H, W, 2] pixels of the physical image; NaN where it does not show this direction.
        seen: [H, W] False there; the result is black.
        box: left, top, right, bottom of the part of the physical image that is used, pixels.
        reduced_size: height and width to which this part is resized before the interpolation.
    """

    uv_img: NDArray[np.float32]
    seen: NDArray[np.bool_]
    box: tuple[int, int, int, int]
    reduced_size: tuple[int, int]
    _corner: NDArray[
        np.int32
    ]  # [P] the upper left one of the four neighbours, in an image with one more row and column
    _weights: NDArray[np.uint16]  # [4, P] of the neighbours, their sum is 2^WEIGHT_BITS, or 0 where nothing is seen

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Returns the image [H, W, 3] of the pinhole from an image of the physical camera, with the same channels."""
        left, top, right, bottom = self.box
        pixels = image[top:bottom, left:right]
        height, width = self.reduced_size
        if pixels.shape[:2] != (height, width):
            pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
        packed = _packed(pixels)
        row = pixels.shape[1] + 1
        total = np.full(len(self._corner), sum(1 << (lane + WEIGHT_BITS - 1) for lane in LANES), np.uint64)
        for weights, offset in zip(self._weights, (0, 1, row, row + 1), strict=True):
            total += packed[offset:].take(self._corner) * weights
        remapped = np.empty((*self.seen.shape, 3), np.uint8)
        for k, lane in enumerate(LANES):
            remapped[..., k] = (total >> np.uint64(lane + WEIGHT_BITS)).astype(np.uint8).reshape(self.seen.shape)
        return remapped


def remap_table(
    camera: RigCamera,
    ego_from_cam: NDArray[np.float64],
    img_from_cam: NDArray[np.float64],
    image_size: tuple[int, int],
) -> RemapTable:
    """Returns the table of a pinhole, which is computed once for equal arguments.

    Args:
        camera: the physical camera.
        ego_from_cam: [4, 4] pose of the pinhole; only its rotation counts, because both share one optical centre.
        img_from_cam: [3, 3] intrinsics of the pinhole.
        image_size: height and width of the pinhole's image.
    """
    cam_from_pinhole = camera.ego_from_cam[:3, :3].T @ ego_from_cam[:3, :3]
    # The key holds numbers only: equal cameras of different rigs share a table.
    key = (camera.model, camera.image_size, camera.lens_angle)
    return _table(*key, tuple(cam_from_pinhole.ravel()), tuple(img_from_cam.ravel()), image_size)


@lru_cache(maxsize=CACHED_TABLES)
def _table(model, physical_size, lens_angle, rotation, intrinsics, image_size) -> RemapTable:  # type: ignore[no-untyped-def]
    camera = RigCamera("", physical_size, model, np.eye(4), lens_angle)
    H, W = image_size
    v, u = np.mgrid[:H, :W] + 0.5
    directions = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(np.reshape(intrinsics, (3, 3))).T
    uv, seen = camera.project(directions @ np.reshape(rotation, (3, 3)).T)  # [H, W, 2]
    uv[~seen] = np.nan
    box, reduced_size = _part_of_image(uv, seen, physical_size)
    height, width = reduced_size
    scale = np.array([width / (box[2] - box[0]), height / (box[3] - box[1])])
    # Outside the centres of the outermost pixels, these are repeated, as Pillow and OpenCV do.
    xy = np.clip((uv[seen] - box[:2]) * scale - 0.5, 0, (width - 1, height - 1))  # [S, 2]
    corner, weights = np.zeros(H * W, np.int32), np.zeros((4, H * W), np.uint16)
    x, y = np.floor(xy).astype(np.int32).T
    corner[seen.ravel()] = y * (width + 1) + x
    weights[:, seen.ravel()] = _bilinear_weights(xy - np.floor(xy))
    return RemapTable(uv.astype(np.float32), seen, box, reduced_size, corner, weights)


def _part_of_image(
    uv: NDArray[np.float64], seen: NDArray[np.bool_], physical_size: tuple[int, int]
) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """Returns the part of the physical image that is needed, and the size to which it is reduced."""
    if not seen.any():
        return (0, 0, 1, 1), (1, 1)
    along_v, along_u = np.gradient(uv[..., 0]), np.gradient(uv[..., 1])
    area = np.abs(along_v[1] * along_u[0] - along_v[0] * along_u[1])  # physical pixels for one of the pinhole
    area = area[np.isfinite(area)]
    step = max(1.0, float(np.sqrt(np.median(area)))) if area.size else 1.0
    H, W = physical_size
    low, high = np.nanmin(uv, (0, 1)) - 2 * step, np.nanmax(uv, (0, 1)) + 2 * step
    left, top = (int(x) for x in np.maximum(np.floor(low), 0))
    right, bottom = (int(x) for x in np.minimum(np.ceil(high), (W, H)))
    size = max(1, round((bottom - top) / step)), max(1, round((right - left) / step))
    return (left, top, right, bottom), size


def _bilinear_weights(fraction: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Integer weights [4, S] of the upper left, upper right, lower left, lower right neighbour, exact in their sum."""
    x, y = fraction.T
    exact = np.stack([(1 - x) * (1 - y), x * (1 - y), (1 - x) * y, x * y]) * 2**WEIGHT_BITS
    weights = np.rint(exact).astype(np.int64)
    weights[np.argmax(weights, 0), np.arange(len(x))] += 2**WEIGHT_BITS - weights.sum(0)
    return np.asarray(weights, dtype=np.uint16)


def _packed(pixels: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Packs the channels of an image [h, w, 3] into one number per pixel, with its last row and column repeated."""
    h, w, _ = pixels.shape
    packed = np.empty((h + 1, w + 1), np.uint64)
    channels = pixels.astype(np.uint64)
    packed[:h, :w] = (
        channels[..., 0] | channels[..., 1] << np.uint64(LANES[1]) | channels[..., 2] << np.uint64(LANES[2])
    )
    packed[h], packed[:, w] = packed[h - 1], packed[:, w - 1]
    return packed.ravel()
