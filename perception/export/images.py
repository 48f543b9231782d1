"""Images at the network's size, as a part of the exported graph."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def fit_pixels(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Images [N, 3, raw H, raw W] at the network's size, with the matrices of `fitting_matrices`.

    Bit for bit what Pillow makes of them: it counts in whole multiples of 2^-22 and rounds to whole grey values after
    each of the two directions. Weights are split into two halves of 11 bits each, so that all products and sums are
    exact in float32, and in TF32 too.
    """

    def narrowed(pixels: Tensor, weights: Tensor) -> Tensor:
        coarse, fine = weights[0] @ pixels + 0.5, weights[1] @ pixels
        whole = coarse.floor()
        return (whole + (coarse - whole + fine).floor()).clamp(0, 255)

    # The matrices stand first: what is multiplied by weights from the right is halved in half precision.
    across = narrowed(pixels.transpose(2, 3), columns).transpose(2, 3)
    return narrowed(across, rows)


def fitting_matrices(raw_size: tuple[int, int], image_size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """What `perception.data.loader.fit_image` does, as products with constant matrices.

    Pillow's bilinear filter is a triangle as wide as the scale; every row of a matrix holds the weights of one pixel.

    Args:
        raw_size, image_size: height and width given and wanted.

    Returns:
        rows [2, H, raw H], columns [2, W, raw W], the coarse and the fine part of each, and img_from_raw [3, 3] for the
        calibration.
    """
    (H, W), (raw_h, raw_w) = image_size, raw_size
    scale = max(W / raw_w, H / raw_h)
    left, top = (raw_w - W / scale) / 2, raw_h - H / scale
    img_from_raw = torch.tensor([[scale, 0, -left * scale], [0, scale, -top * scale], [0, 0, 1]])

    def weights(count: int, given: int, start: float, end: float) -> Tensor:
        start, end = np.float32(start), np.float32(end)  # as Pillow keeps them
        step = float(end - start) / count
        middle = float(start) + (torch.arange(count, dtype=torch.float64)[:, None] + 0.5) * step
        reach = max(step, 1.0)
        distance = (torch.arange(given, dtype=torch.float64) + 0.5 - middle) / reach
        triangle = (1 - distance.abs()).clamp(min=0)
        share = (triangle / triangle.sum(1, keepdim=True) * 2**22 + 0.5).floor()  # in 2^-22
        coarse = (share / 2**11).floor() * 2**11
        return (torch.stack([coarse, share - coarse]) / 2**22).float()

    return weights(H, raw_h, top, raw_h), weights(W, raw_w, left, raw_w - left), img_from_raw
