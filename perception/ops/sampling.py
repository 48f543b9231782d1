"""Deformable sampling in plain PyTorch, with static shapes and 4-D grid_sample only, so that it exports as it is.

The idea is that of Deformable DETR (https://arxiv.org/abs/2010.04159): a query reads a few places that it chooses
itself, and takes their weighted sum. Here the places may lie in several cameras, or on the BEV grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from perception.grid import BEVGrid


def read_cameras(features: Tensor, uv: Tensor, camera: Tensor) -> Tensor:
    """Bilinear reading of camera feature maps, each sample from a camera of its own choice.

    The cameras are stacked into one tall map, which makes the choice of a camera a vertical offset. Places are clamped
    to the centres of the border pixels, so a sample never bleeds into the neighbour in the stack.

    Args:
        features: [B, N, C, h, w].
        uv: [B, Q, S, 2] place in the chosen camera, 0..1 over width and height.
        camera: [B, Q, S] int64 index of the chosen camera.

    Returns:
        [B, C, Q, S].
    """
    B, N, C, h, w = features.shape
    column = (uv[..., 0] * w).clamp(0.5, w - 0.5)  # [B, Q, S] feature pixels, centres at +0.5
    row = (uv[..., 1] * h).clamp(0.5, h - 0.5) + camera * h
    place = torch.stack([column * (2 / w) - 1, row * (2 / (N * h)) - 1], -1)  # [B, Q, S, 2]
    tall = features.transpose(1, 2).reshape(B, C, N * h, w)
    # Places keep their precision: eight bits of bfloat16 cannot tell the pixels of a large map apart.
    return F.grid_sample(tall.to(place.dtype), place, padding_mode="border", align_corners=False)


def sample_cameras(features: Tensor, uv: Tensor, camera: Tensor, weight: Tensor) -> Tensor:
    """The weighted sum of what `read_cameras` reads.

    Args:
        features: [B, N, C, h, w].
        uv: [B, Q, S, 2] place in the chosen camera, 0..1 over width and height.
        camera: [B, Q, S] int64 index of the chosen camera.
        weight: [B, Q, S]; zero for a sample that must not count.

    Returns:
        [B, Q, C].
    """
    samples = read_cameras(features, uv, camera)  # [B, C, Q, S]
    return (samples * weight[:, None]).sum(-1).transpose(1, 2)


def sample_bev(bev: Tensor, grid: BEVGrid, points_ego: Tensor, weight: Tensor) -> Tensor:
    """Multi-head deformable reading of a BEV map, zero outside the grid.

    Args:
        bev: [B, C, X, Y], the channels of head 0 first.
        grid: where the cells lie.
        points_ego: [B, Q, heads, S, 2] metres.
        weight: [B, Q, heads, S].

    Returns:
        [B, Q, C], the channels of head 0 first.
    """
    B, C, X, Y = bev.shape
    _, Q, heads, S, _ = points_ego.shape
    per_head = bev.reshape(B * heads, C // heads, X, Y)
    points = points_ego.transpose(1, 2).reshape(B * heads, Q, S, 2)
    samples = grid.sample(per_head, points)  # [B * heads, C / heads, Q, S]
    weight = weight.transpose(1, 2).reshape(B * heads, 1, Q, S)
    return (samples * weight).sum(-1).reshape(B, C, Q).transpose(1, 2)
