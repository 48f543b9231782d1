"""Converts camera images to network images in the exported graph, and between image formats on the host.

The graph computes integer grey values that are bit-identical to Pillow's resizing and OpenCV's colour conversion.
Weights are integer multiples of a power of two, split into two parts of 11 bits each, so that all products and sums are
exact in float32 and in TF32.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn

from perception.export.contract import ImageInputs
from perception.inference.fitting import fit_pixels, fitting_matrices, round_products, split_weights

# By format: the luma of black, and the factors of R = f luma + a Cr, G = f luma - b Cb - c Cr, B = f luma + d Cb as
# (f, a, b, c, d). The first are those of OpenCV, the others follow from Kr and Kb of ITU-R BT.601 and BT.709.
NV12_COLORS = {
    "nv12": (16, 1.164, 1.596, 0.391, 0.813, 2.018),
    "nv12-er": (0, 1.0, 1.402, 0.344136, 0.714136, 1.772),
    "nv12-709": (16, 1.164384, 1.792741, 0.213249, 0.532909, 2.112402),
    "nv12-709-er": (0, 1.0, 1.5748, 0.187324, 0.468124, 1.8556),
}
COLOR_BITS = 20  # fractional bits of the weights


class ImagePreprocessing(nn.Module):
    """Converts the images of all cameras to the colour format and the size of the network.

    Args:
        images: sizes and format of the camera images.
        image_size: height and width of the network's images.
    """

    img_from_raw: Tensor  # [N, 3, 3], converts pixels of the camera images to pixels of the network's images
    rgb_from_yuv: Tensor  # [2, 3, 3], for NV12 only

    def __init__(self, images: ImageInputs, image_size: tuple[int, int]) -> None:
        super().__init__()
        H, W = image_size
        self.images, self.image_size = images, (H, W)
        matrices = {size: fitting_matrices(size, (H, W)) for size in dict.fromkeys(images.sizes)}
        self.fitted = {size: k for k, size in enumerate(matrices) if size != self.image_size}
        for size, k in self.fitted.items():
            self.register_buffer(f"rows_{k}", matrices[size][0])
            self.register_buffer(f"columns_{k}", matrices[size][1])
        self.register_buffer("img_from_raw", torch.stack([matrices[size][2] for size in images.sizes]))
        if images.is_nv12:
            self.black = NV12_COLORS[images.image_format][0]
            self.register_buffer(
                "rgb_from_yuv", split_weights(torch.from_numpy(color_weights(images.image_format)), COLOR_BITS)
            )

    def forward(self, buffers: Sequence[Tensor]) -> Tensor:
        """Converts images uint8 of `ImageInputs.shape`, one per camera, to [N, 3, H, W] float RGB 0..255."""
        parts, rest = [], iter(buffers)
        for size, run in groupby(self.images.sizes):  # consecutive cameras of the same size are one batch
            batch = torch.stack([next(rest).float() for _ in run])  # cast first: TensorRT supports only casts of UINT8
            if self.images.is_nv12:
                batch = nv12_to_rgb(batch, self.rgb_from_yuv, self.black)
            elif not self.images.image_format.endswith("chw"):
                batch = batch.permute(0, 3, 1, 2)
            if size in self.fitted:
                k = self.fitted[size]
                batch = fit_pixels(batch, getattr(self, f"rows_{k}"), getattr(self, f"columns_{k}"))
            parts.append(batch)
        pixels = torch.cat(parts) if len(parts) > 1 else parts[0]
        if self.images.image_format.startswith("bgr"):
            pixels = torch.cat([pixels[:, 2:3], pixels[:, 1:2], pixels[:, 0:1]], 1)
        return pixels


def nv12_to_rgb(buffers: Tensor, rgb_from_yuv: Tensor, black: int) -> Tensor:
    """Converts float NV12 [n, H * 3 / 2, W] to RGB [n, 3, H, W]; one pair of Cb and Cr is used for 2 x 2 pixels.

    Args:
        buffers: 0..255.
        rgb_from_yuv: [2, 3, 3] coarse and fine part of `color_weights`.
        black: the luma of black.
    """
    n, rows, W = buffers.shape
    H = rows // 3 * 2
    luma = torch.relu(buffers[:, :H] - black).reshape(n, 1, H * W)
    chroma = (buffers[:, H:] - 128).reshape(n, H // 2, W // 2, 2).permute(0, 3, 1, 2)  # [n, 2, H / 2, W / 2]
    chroma = chroma[:, :, :, None, :, None].expand(n, 2, H // 2, 2, W // 2, 2).reshape(n, 2, H * W)
    return round_products(torch.cat([luma, chroma], 1), rgb_from_yuv).reshape(n, 3, H, W)


def color_weights(image_format: str) -> np.ndarray:
    """Returns the matrix [3, 3] int64 that converts luma, Cb, Cr to R, G, B, in units of 2^-COLOR_BITS."""
    _, luma, a, b, c, d = NV12_COLORS[image_format]
    weights = np.array([[luma, 0, a], [luma, -b, -c], [luma, d, 0]])
    return np.trunc(weights * 2**COLOR_BITS).astype(np.int64)


def to_rgb(image: np.ndarray, image_format: str) -> np.ndarray:
    """Converts an image to RGB [H, W, 3] uint8 on the host, with the same result as in the graph."""
    if image_format not in NV12_COLORS:
        rgb = image.transpose(1, 2, 0) if image_format.endswith("chw") else image
        return np.ascontiguousarray(rgb[..., ::-1] if image_format.startswith("bgr") else rgb)
    H = len(image) // 3 * 2
    yuv = np.empty((H, image.shape[1], 3), np.int64)
    yuv[..., 0] = np.maximum(image[:H].astype(np.int64) - NV12_COLORS[image_format][0], 0)
    for k in (0, 1):
        yuv[..., 1 + k] = np.repeat(np.repeat(image[H:, k::2].astype(np.int64) - 128, 2, 0), 2, 1)
    rgb = (yuv @ color_weights(image_format).T + 2 ** (COLOR_BITS - 1)) >> COLOR_BITS
    return rgb.clip(0, 255).astype(np.uint8)


def from_rgb(rgb: np.ndarray, image_format: str) -> np.ndarray:
    """Converts RGB [H, W, 3] uint8 to a format. NV12 keeps the mean colour of 2 x 2 pixels; H and W must be even."""
    if image_format not in NV12_COLORS:
        image = rgb[..., ::-1] if image_format.startswith("bgr") else rgb
        return np.ascontiguousarray(image.transpose(2, 0, 1) if image_format.endswith("chw") else image)
    H, W, _ = rgb.shape
    yuv_from_rgb = np.linalg.inv(color_weights(image_format) / 2**COLOR_BITS).astype(np.float32)
    yuv = rgb.astype(np.float32) @ yuv_from_rgb.T
    chroma = yuv[..., 1:].reshape(H // 2, 2, W // 2, 2, 2).mean((1, 3)).reshape(H // 2, W) + 128
    image = np.concatenate([yuv[..., 0] + NV12_COLORS[image_format][0], chroma])
    return image.round().clip(0, 255).astype(np.uint8)
