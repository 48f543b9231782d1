"""Resizes and crops images to the input size of a network.

`fit_image` does it for Pillow images in training and live use. `fit_pixels` gives the same pixels from constant
matrices, for the graph of an export.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from perception.inference.crop import cropped_image, fitting_crop

FIT_BITS = 22  # fractional bits of the weights, the same as in Pillow


def fit_image(
    image: Image.Image, img_from_cam: NDArray[Any], image_size: tuple[int, int]
) -> tuple[Tensor, NDArray[np.float64]]:
    """Resizes and crops an image to the network's size, see `perception.inference.crop.fitting_crop`.

    Args:
        image: of any size. A JPEG that is not decoded yet is decoded here, at a reduced size if that is sufficient.
        img_from_cam: [3, 3] calibration in pixels of `image`.
        image_size: height and width of the result.

    Returns:
        [3, H, W] uint8 RGB, and the calibration [3, 3] float64 in its pixels.
    """
    fitted, crop = cropped_image(image, image_size)
    chw = np.empty((3, *image_size), dtype=np.uint8)
    for channel, band in zip(chw, fitted.split(), strict=True):  # half the time of turning [H, W, 3] over
        channel[:] = np.asarray(band)
    return torch.from_numpy(chw), crop.img_from_raw @ img_from_cam


def fit_pixels(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Resizes and crops images [N, 3, raw H, raw W] with the matrices of `fitting_matrices`.

    The result is bit-identical to `fit_image`: Pillow uses weights in multiples of 2^-22 and rounds to integers after
    each of the two directions.
    """
    across = round_products(pixels.transpose(2, 3), columns).transpose(2, 3)
    return round_products(across, rows)


def round_products(values: Tensor, weights: Tensor) -> Tensor:
    """Computes `weights @ values` exactly and rounds it to integers 0..255.

    Args:
        values: [..., K, P] integers.
        weights: [2, M, K] from `split_weights`. They are the left operand, because `perception.export.half` converts
            products with constants on the right to half precision.
    """
    coarse, fine = weights[0] @ values + 0.5, weights[1] @ values
    whole = coarse.floor()
    rounded: Tensor = (whole + (coarse - whole + fine).floor()).clamp(0, 255)
    return rounded


def split_weights(shares: Tensor, bits: int) -> Tensor:
    """Splits integers [M, K], in units of 2^-bits, into [2, M, K] float32: multiples of 2^(11 - bits) and the rest."""
    shares = shares.double()
    coarse = (shares / 2**11).floor() * 2**11
    parts: Tensor = torch.stack([coarse, shares - coarse]) / 2**bits
    return parts.float()


def fitting_matrices(raw_size: tuple[int, int], image_size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Computes constant matrices that resize and crop as `fit_image` does.

    Pillow's bilinear filter is a triangle whose width is the scale. A row of a matrix holds the weights of one pixel.

    Args:
        raw_size: height and width of the given image.
        image_size: height and width of the network's image.

    Returns:
        rows [2, H, raw H] and columns [2, W, raw W], each as coarse and fine part, and img_from_raw [3, 3] for the
        calibration.
    """
    (H, W), (raw_h, raw_w) = image_size, raw_size
    crop = fitting_crop(raw_size, image_size)
    _, left, top = crop

    def weights(count: int, given: int, start: float, end: float) -> Tensor:
        start32, end32 = np.float32(start), np.float32(end)  # Pillow stores them in single precision
        step = float(end32 - start32) / count
        middle = float(start32) + (torch.arange(count, dtype=torch.float64)[:, None] + 0.5) * step
        reach = max(step, 1.0)
        distance = (torch.arange(given, dtype=torch.float64) + 0.5 - middle) / reach
        triangle: Tensor = (1 - distance.abs()).clamp(min=0)
        return split_weights((triangle / triangle.sum(1, keepdim=True) * 2**FIT_BITS + 0.5).floor(), FIT_BITS)

    img_from_raw = torch.from_numpy(crop.img_from_raw).float()
    return weights(H, raw_h, top, raw_h), weights(W, raw_w, left, raw_w - left), img_from_raw
