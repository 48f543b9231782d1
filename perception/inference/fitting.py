"""Fits images of any size to the network's: one rule, for Pillow images and as constant matrices in a graph."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

FIT_BITS = 22  # of the weights behind the point, as Pillow counts


class Crop(NamedTuple):
    """The part of an image that the network sees, and how much it is scaled."""

    scale: float
    left: float  # pixels of the given image that are cut off at the left, and as many at the right
    top: float  # pixels of the given image that are cut off at the top

    @property
    def img_from_raw(self) -> np.ndarray:
        """[3, 3] from pixels of the given image to those of the network's."""
        scale = self.scale
        return np.array([[scale, 0, -self.left * scale], [0, scale, -self.top * scale], [0, 0, 1]])


def fitting_crop(raw_size: tuple[int, int], image_size: tuple[int, int]) -> Crop:
    """Scales an image until it covers the network's, and crops it at the top and equally at both sides.

    Args:
        raw_size: height and width of the given image.
        image_size: height and width of the network's.
    """
    (raw_h, raw_w), (H, W) = raw_size, image_size
    scale = max(W / raw_w, H / raw_h)
    return Crop(scale, (raw_w - W / scale) / 2, raw_h - H / scale)


def fit_image(image: Image.Image, img_from_cam: np.ndarray, image_size: tuple[int, int]) -> tuple[Tensor, np.ndarray]:
    """Fits an image to the network's size, see `fitting_crop`.

    Args:
        image: of any size; one that was opened but not read yet is decoded here, as small as will do.
        img_from_cam: [3, 3] calibration in its pixels.
        image_size: height and width wanted.

    Returns:
        [3, H, W] uint8 RGB, and [3, 3] float64 calibration in its pixels.
    """
    H, W = image_size
    full_w, full_h = image.size
    crop = fitting_crop((full_h, full_w), image_size)
    scale, left, top = crop
    # JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, several times faster.
    image.draft("RGB", (int(np.ceil(full_w * scale)), int(np.ceil(full_h * scale))))
    shrink = 1
    while full_w > image.size[0] * shrink:
        shrink *= 2
    box = (left / shrink, top / shrink, full_w / shrink - left / shrink, full_h / shrink)
    pixels = image.convert("RGB").resize((W, H), Image.Resampling.BILINEAR, box=box)
    chw = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous()  # [3, H, W]
    return chw, crop.img_from_raw @ img_from_cam


def fit_pixels(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Images [N, 3, raw H, raw W] at the network's size, with the matrices of `fitting_matrices`.

    Bit for bit what Pillow makes of them: it counts in whole multiples of 2^-22 and rounds to whole grey values after
    each of the two directions.
    """
    across = whole_values(pixels.transpose(2, 3), columns).transpose(2, 3)
    return whole_values(across, rows)


def whole_values(values: Tensor, weights: Tensor) -> Tensor:
    """`weights @ values` rounded to whole numbers 0..255, exactly.

    Args:
        values: [..., K, P] whole numbers.
        weights: [2, M, K] from `split_weights`; they stand first, for what is multiplied by weights from the right is
            halved in half precision.
    """
    coarse, fine = weights[0] @ values + 0.5, weights[1] @ values
    whole = coarse.floor()
    return (whole + (coarse - whole + fine).floor()).clamp(0, 255)


def split_weights(shares: Tensor, bits: int) -> Tensor:
    """Whole multiples [M, K] of 2^-bits as [2, M, K] float32: multiples of 2^(11 - bits), and the rest."""
    shares = shares.double()
    coarse = (shares / 2**11).floor() * 2**11
    return (torch.stack([coarse, shares - coarse]) / 2**bits).float()


def fitting_matrices(raw_size: tuple[int, int], image_size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """`fit_image` as products with constant matrices.

    Pillow's bilinear filter is a triangle as wide as the scale; every row of a matrix holds the weights of one pixel.

    Args:
        raw_size, image_size: height and width given and wanted.

    Returns:
        rows [2, H, raw H], columns [2, W, raw W], the coarse and the fine part of each, and img_from_raw [3, 3] for the
        calibration.
    """
    (H, W), (raw_h, raw_w) = image_size, raw_size
    crop = fitting_crop(raw_size, image_size)
    _, left, top = crop

    def weights(count: int, given: int, start: float, end: float) -> Tensor:
        start, end = np.float32(start), np.float32(end)  # as Pillow keeps them
        step = float(end - start) / count
        middle = float(start) + (torch.arange(count, dtype=torch.float64)[:, None] + 0.5) * step
        reach = max(step, 1.0)
        distance = (torch.arange(given, dtype=torch.float64) + 0.5 - middle) / reach
        triangle = (1 - distance.abs()).clamp(min=0)
        return split_weights((triangle / triangle.sum(1, keepdim=True) * 2**FIT_BITS + 0.5).floor(), FIT_BITS)

    img_from_raw = torch.from_numpy(crop.img_from_raw).float()
    return weights(H, raw_h, top, raw_h), weights(W, raw_w, left, raw_w - left), img_from_raw
