"""From the bytes of cameras to images of the network, in the exported graph; image formats on the host.

What the graph computes is exact: whole grey values, the same as Pillow's resizing and OpenCV's colours bit for bit.
Weights are whole multiples of a power of two, split into two halves of 11 bits each, so that all products and sums are
exact in float32, and in TF32 too.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn

from perception.export.contract import ImageInputs
from perception.inference.fitting import fit_pixels, fitting_matrices, split_weights, whole_values

# By format: the luma of black, and what R = luma + a Cr, G = luma - b Cb - c Cr, B = luma + d Cb multiply luma, a, b, c
# and d by. The first is as OpenCV has it, the others follow from Kr and Kb of ITU-R BT.601 and BT.709.
NV12_COLORS = {
    "nv12": (16, 1.164, 1.596, 0.391, 0.813, 2.018),
    "nv12-er": (0, 1.0, 1.402, 0.344136, 0.714136, 1.772),
    "nv12-709": (16, 1.164384, 1.792741, 0.213249, 0.532909, 2.112402),
    "nv12-709-er": (0, 1.0, 1.5748, 0.187324, 0.468124, 1.8556),
}
COLOR_BITS = 20  # of the weights behind the point


class ImagePreprocessing(nn.Module):
    """Images of all cameras as the network takes them.

    Args:
        images: how they are given.
        image_size: height and width of the network's.
    """

    img_from_raw: Tensor  # [N, 3, 3] from pixels of the given images to those of the network's

    def __init__(self, images: ImageInputs, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.images, self.image_size = images, tuple(image_size)
        matrices = {size: fitting_matrices(size, self.image_size) for size in dict.fromkeys(images.sizes)}
        self.fitted = {size: k for k, size in enumerate(matrices) if size != self.image_size}
        for size, k in self.fitted.items():
            self.register_buffer(f"rows_{k}", matrices[size][0])
            self.register_buffer(f"columns_{k}", matrices[size][1])
        self.register_buffer("img_from_raw", torch.stack([matrices[size][2] for size in images.sizes]))
        if images.is_nv12:
            self.black = NV12_COLORS[images.image_format][0]
            self.register_buffer(
                "rgb_from_yuv", split_weights(torch.from_numpy(color_shares(images.image_format)), COLOR_BITS)
            )

    def forward(self, buffers: Sequence[Tensor]) -> Tensor:
        """Bytes of each camera, of `ImageInputs.shape`, to [N, 3, H, W] float RGB 0..255."""
        parts, rest = [], iter(buffers)
        for size, run in groupby(self.images.sizes):  # neighbours of the same size are one batch
            batch = torch.stack([next(rest).float() for _ in run])  # TensorRT can only cast bytes
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
    """Float NV12 [n, H * 3 / 2, W] to RGB [n, 3, H, W], each pair of colours for 2 x 2 pixels.

    Args:
        buffers: 0..255.
        rgb_from_yuv: [2, 3, 3] coarse and fine part of `color_shares`.
        black: the luma of black.
    """
    n, rows, W = buffers.shape
    H = rows // 3 * 2
    luma = torch.relu(buffers[:, :H] - black).reshape(n, 1, H * W)
    chroma = (buffers[:, H:] - 128).reshape(n, H // 2, W // 2, 2).permute(0, 3, 1, 2)  # [n, 2, H / 2, W / 2]
    chroma = chroma[:, :, :, None, :, None].expand(n, 2, H // 2, 2, W // 2, 2).reshape(n, 2, H * W)
    return whole_values(torch.cat([luma, chroma], 1), rgb_from_yuv).reshape(n, 3, H, W)


def color_shares(image_format: str) -> np.ndarray:
    """R, G, B from luma, Cb, Cr, [3, 3] int64 in units of 2^-COLOR_BITS."""
    _, luma, a, b, c, d = NV12_COLORS[image_format]
    weights = np.array([[luma, 0, a], [luma, -b, -c], [luma, d, 0]])
    return np.trunc(weights * 2**COLOR_BITS).astype(np.int64)


def to_rgb(image: np.ndarray, image_format: str) -> np.ndarray:
    """An image in one of the formats as RGB [H, W, 3] uint8: on the host what the graph does."""
    if image_format not in NV12_COLORS:
        rgb = image.transpose(1, 2, 0) if image_format.endswith("chw") else image
        return np.ascontiguousarray(rgb[..., ::-1] if image_format.startswith("bgr") else rgb)
    H = len(image) // 3 * 2
    yuv = np.empty((H, image.shape[1], 3), np.int64)
    yuv[..., 0] = np.maximum(image[:H].astype(np.int64) - NV12_COLORS[image_format][0], 0)
    for k in (0, 1):
        yuv[..., 1 + k] = np.repeat(np.repeat(image[H:, k::2].astype(np.int64) - 128, 2, 0), 2, 1)
    rgb = (yuv @ color_shares(image_format).T + 2 ** (COLOR_BITS - 1)) >> COLOR_BITS
    return rgb.clip(0, 255).astype(np.uint8)


def from_rgb(rgb: np.ndarray, image_format: str) -> np.ndarray:
    """RGB [H, W, 3] uint8 in one of the formats; NV12 keeps the mean colour of 2 x 2 pixels, H and W must be even."""
    if image_format not in NV12_COLORS:
        image = rgb[..., ::-1] if image_format.startswith("bgr") else rgb
        return np.ascontiguousarray(image.transpose(2, 0, 1) if image_format.endswith("chw") else image)
    H, W, _ = rgb.shape
    yuv_from_rgb = np.linalg.inv(color_shares(image_format) / 2**COLOR_BITS).astype(np.float32)
    yuv = rgb.astype(np.float32) @ yuv_from_rgb.T
    chroma = yuv[..., 1:].reshape(H // 2, 2, W // 2, 2, 2).mean((1, 3)).reshape(H // 2, W) + 128
    image = np.concatenate([yuv[..., 0] + NV12_COLORS[image_format][0], chroma])
    return image.round().clip(0, 255).astype(np.uint8)
