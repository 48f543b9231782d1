"""Computes which part of an image a network sees, and at which scale."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from perception.types import NumpyCameraRig


class Crop(NamedTuple):
    """The scale of an image and the part of it that the network sees."""

    scale: float
    left: float  # pixels of the given image that are cut off at the left, and the same number at the right
    top: float  # pixels of the given image that are cut off at the top

    @property
    def img_from_raw(self) -> NDArray[np.float64]:
        """[3, 3], converts pixels of the given image to pixels of the network's image."""
        scale = self.scale
        return np.array([[scale, 0, -self.left * scale], [0, scale, -self.top * scale], [0, 0, 1]])


def fitting_crop(raw_size: tuple[int, int], image_size: tuple[int, int]) -> Crop:
    """Computes scale and crop of an image: scaled until it covers the network's image, cut at the top and both sides.

    Args:
        raw_size: height and width of the given image.
        image_size: height and width of the network's image.
    """
    (raw_h, raw_w), (H, W) = raw_size, image_size
    scale = max(W / raw_w, H / raw_h)
    return Crop(scale, (raw_w - W / scale) / 2, raw_h - H / scale)


def fitted_rig(rig: NumpyCameraRig, sizes: Any, image_size: tuple[int, int]) -> NumpyCameraRig:
    """Returns a rig with the calibration of the network's images.

    Args:
        rig: of the given images, [N, ...]; cameras that are not present keep their matrices.
        sizes: height and width of the given images by camera, for all present cameras.
        image_size: height and width of the network's images.
    """
    img_from_cam = rig.img_from_cam.copy()
    for n in np.flatnonzero(rig.present):
        img_from_cam[n] = fitting_crop(sizes[n], image_size).img_from_raw @ img_from_cam[n]
    return rig._replace(img_from_cam=img_from_cam)
