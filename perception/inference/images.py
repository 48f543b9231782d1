"""Converts images as people have them (files, encoded bytes, Pillow, numpy, torch) to pixels. Pillow is loaded if used.

Pixels are never turned: cameras are calibrated for the pixels as they are stored. A file that asks viewers to turn it
(EXIF) is refused, because nobody can tell which of the two the calibration is for.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from perception.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

AnyImage: TypeAlias = "str | Path | bytes | Image | NDArray[np.uint8] | Tensor"

MODES = ("RGB", "L", "RGBA", "RGBX", "LA", "P", "PA", "CMYK", "YCbCr")  # of Pillow, with 8 bits per channel
EXIF_ORIENTATION, AS_STORED = 0x0112, 1
CHANNELS = (1, 3, 4)
WANTED = (
    "give RGB as a numpy array [H, W, 3] of uint8, or grey [H, W], RGBA, a torch tensor, a Pillow image, a file name, "
    "or the bytes of a JPEG or PNG"
)


def as_pixels(name: str, image: object, *, given_bgr: bool = False, wanted_bgr: bool = False) -> NDArray[np.uint8]:
    """Returns the pixels of an image.

    Args:
        name: of the image, for messages.
        image: a file name; the bytes of an encoded file, also as a one-dimensional uint8 array; a Pillow image; a numpy
            array uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]; a torch tensor of these shapes or with the channels
            first, uint8 or float 0..1. Transparency is ignored.
        given_bgr: arrays and tensors have blue first, as OpenCV reads them; files and Pillow images name their order.
        wanted_bgr: return blue first.

    Returns:
        [H, W, 3] uint8, RGB or BGR.

    Raises:
        DataError: it is something else, cannot be read, or its orientation, its axes or its range are ambiguous.
    """
    if isinstance(image, str | Path):
        pixels, is_bgr = _opened(f"{name}, {image},", Path(image)), False
    elif isinstance(image, bytes | bytearray | memoryview) or _is_encoded(image):
        pixels, is_bgr = _opened(name, io.BytesIO(_bytes(image))), False
    elif _is(image, "PIL.Image", "Image"):
        pixels, is_bgr = _decoded(name, image), False
    elif _is(image, "torch", "Tensor"):
        pixels, is_bgr = _colors(name, _from_tensor(name, image)), given_bgr
    elif isinstance(image, np.ndarray) and image.dtype == np.uint8:
        pixels, is_bgr = _colors(name, image), given_bgr
    else:
        what = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise DataError(f"{name} is {what}; {WANTED}")
    return pixels if is_bgr == wanted_bgr else np.ascontiguousarray(pixels[..., ::-1])


def _is(value: object, module: str, kind: str) -> bool:
    """Whether a value is of a type of a module, which is loaded if the value is."""
    return module in sys.modules and isinstance(value, getattr(sys.modules[module], kind, ()))


def _is_encoded(image: object) -> bool:
    """Whether it is a file in an array, as OpenCV's imencode and ROS's CompressedImage have it."""
    return isinstance(image, np.ndarray) and image.ndim == 1 and image.dtype == np.uint8


def _bytes(image: Any) -> bytes:
    return image.tobytes() if isinstance(image, np.ndarray) else bytes(image)


def _opened(name: str, file: Path | io.BytesIO) -> NDArray[np.uint8]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            return _decoded(name, image)
    except FileNotFoundError:
        raise DataError(f"{name} does not exist; give the file of this camera, or None if it is absent") from None
    except UnidentifiedImageError:
        raise DataError(f"{name} is no image that Pillow can read; give a JPEG or PNG") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # damaged, or too large
        raise DataError(f"{name} cannot be read ({error}); give a complete JPEG or PNG") from None


def _decoded(name: str, image: Any) -> NDArray[np.uint8]:
    """Pixels of a Pillow image."""
    if image.mode not in MODES:
        raise DataError(f"{name} has the mode {image.mode} of Pillow; convert it to 8 bits per channel (RGB or L)")
    orientation = image.getexif().get(EXIF_ORIENTATION, AS_STORED)
    if orientation != AS_STORED:
        raise DataError(
            f"{name} has the EXIF orientation {orientation}, by which viewers and OpenCV turn or mirror it: save it "
            "without the tag, in the orientation that the calibration is for, or give np.asarray(image) of it"
        )
    try:
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except (OSError, SyntaxError) as error:  # truncated or damaged
        raise DataError(f"{name} cannot be decoded ({error}); give a complete JPEG or PNG") from None


def _from_tensor(name: str, tensor: Any) -> NDArray[np.uint8]:
    """A tensor as uint8 [H, W] or [H, W, C]."""
    array = tensor.detach().cpu()
    shape = tuple(array.shape)
    if array.ndim == 3:
        first, last = shape[0] in CHANNELS, shape[2] in CHANNELS
        if first == last:
            problem = (
                "so that its channels may be the first axis or the last" if first else "without 1, 3 or 4 channels"
            )
            raise DataError(f"{name} is a tensor {shape}, {problem}; give [3, H, W] or [H, W, 3]")
        if first:
            array = array.permute(1, 2, 0)
    if array.is_floating_point():
        low, high = (float(x) for x in array.float().aminmax()) if array.numel() else (0.0, 1.0)
        if not 0 <= low <= high <= 1:  # also NaN
            raise DataError(
                f"{name} is a float tensor of {low:.4g} to {high:.4g}; give uint8 of 0..255, or float of 0..1 without "
                "normalisation"
            )
        array = (array.float() * 255).round().byte()
    pixels: NDArray[Any] = array.numpy()
    if pixels.dtype != np.uint8:
        raise DataError(f"{name} is a tensor of {pixels.dtype}; give uint8 of 0..255, or float of 0..1")
    return pixels


def _colors(name: str, array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] with three channels."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in CHANNELS):
        raise DataError(f"{name} is uint8 {array.shape}; {WANTED}")
    if 0 in array.shape:
        raise DataError(f"{name} is uint8 {array.shape} and has no pixels; give None if this camera is absent")
    if array.ndim == 2 or array.shape[2] == 1:
        return np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
    return array[..., :3]
