"""Computes which part of an image a network sees, and at which scale, and cuts it out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from perception.types import NumpyCameraRig

if TYPE_CHECKING:
    from PIL import Image


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


def cropped_pixels(image: Image.Image, image_size: tuple[int, int]) -> tuple[NDArray[Any], Crop]:
    """Returns the pixels [H, W, 3] uint8 of `cropped_image`, and the crop."""
    fitted, crop = cropped_image(image, image_size)
    return np.array(fitted), crop


def cropped_image(image: Image.Image, image_size: tuple[int, int]) -> tuple[Image.Image, Crop]:
    """Resizes and crops an image to the network's size, see `fitting_crop`.

    Args:
        image: of any size. A JPEG that is not decoded yet is decoded here, at a reduced size if that is sufficient.
        image_size: height and width of the result.

    Returns:
        An RGB image, which may be `image` itself, and the crop in pixels of `image` as it was given.
    """
    from PIL.Image import Resampling  # a vehicle may have numpy alone

    H, W = image_size
    full_w, full_h = image.size
    crop = fitting_crop((full_h, full_w), image_size)
    scale, left, top = crop
    # Decoding a JPEG at 1/2, 1/4 or 1/8 of its size is several times faster.
    image.draft("RGB", (int(np.ceil(full_w * scale)), int(np.ceil(full_h * scale))))
    shrink = 1
    while full_w > image.size[0] * shrink:
        shrink *= 2
    box = (left / shrink, top / shrink, full_w / shrink - left / shrink, full_h / shrink)
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    if rgb.size == (W, H) and box == (0, 0, W, H):  # Pillow would copy it
        return rgb, crop
    return rgb.resize((W, H), Resampling.BILINEAR, box=box), crop
