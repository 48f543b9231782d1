"""Deformable sampling of camera features and of BEV maps.

As in Deformable DETR (https://arxiv.org/abs/2010.04159), a query predicts a few sampling locations and takes the
weighted sum of the features there. The locations are in several cameras, or on the BEV grid.

The plain implementations have static shapes and use only 4-D grid_sample, so that they can be exported. They are used
for export and in float64; `perception.ops.bilinear` has faster ones for other cases. Give one of its `IMPLEMENTATIONS`
to select one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from perception.grid import BEVGrid
from perception.ops.bilinear import choose_implementation, weighted_bilinear


def read_cameras(features: Tensor, uv: Tensor, camera: Tensor, implementation: str | None = None) -> Tensor:
    """Samples camera feature maps bilinearly; each sample has its camera.

    The cameras are stacked into one tall map, so the camera index becomes a vertical offset. Locations are clamped to
    the centres of the border pixels, so that a sample never mixes with the neighbouring camera in the stack.

    Args:
        features: [B, N, C, h, w].
        uv: [B, Q, S, 2] sampling location in the camera, 0..1 over width and height.
        camera: [B, Q, S] int64 index of the camera.
        implementation: one of `perception.ops.bilinear.IMPLEMENTATIONS`, None for the fastest.

    Returns:
        [B, C, Q, S].

    Raises:
        ConfigError: the implementation is unknown.
    """
    B, N, C, h, w = features.shape
    implementation = choose_implementation(features, implementation, on_cpu="plain")  # nothing is summed
    if implementation != "plain":
        weight = torch.ones_like(uv[..., 0])
        uv, single, weight = (x.flatten(1, 2)[:, :, None] for x in (uv, camera, weight))  # [B, Q * S, 1, ...]
        samples = sample_cameras(features, uv, single, weight, implementation)  # [B, Q * S, C]
        return samples.transpose(1, 2).unflatten(2, camera.shape[1:])
    column = (uv[..., 0] * w).clamp(0.5, w - 0.5)  # [B, Q, S] feature pixels, centres at +0.5
    row = (uv[..., 1] * h).clamp(0.5, h - 0.5) + camera * h
    locations = torch.stack([column * (2 / w) - 1, row * (2 / (N * h)) - 1], -1)  # [B, Q, S, 2]
    tall = features.transpose(1, 2).reshape(B, C, N * h, w)
    # Locations keep their precision: the eight bits of bfloat16 cannot distinguish the pixels of a large map.
    return F.grid_sample(tall.to(locations.dtype), locations, padding_mode="border", align_corners=False)


def sample_cameras(
    features: Tensor, uv: Tensor, camera: Tensor, weight: Tensor, implementation: str | None = None
) -> Tensor:
    """Sums the samples of `read_cameras` with weights.

    Args:
        features: [B, N, C, h, w].
        uv: [B, Q, S, 2] sampling location in the camera, 0..1 over width and height.
        camera: [B, Q, S] int64 index of the camera.
        weight: [B, Q, S]; give zero for samples to skip.
        implementation: one of `perception.ops.bilinear.IMPLEMENTATIONS`, None for the fastest.

    Returns:
        [B, Q, C].

    Raises:
        ConfigError: the implementation is unknown.
    """
    implementation = choose_implementation(features, implementation, on_cpu="embedding_bag")
    if implementation != "plain":
        maps = features.permute(0, 1, 3, 4, 2)[:, :, :, :, None]  # [B, N, h, w, 1, C]
        dtype = torch.promote_types(uv.dtype, weight.dtype)
        uv, camera, weight = uv[:, :, None], camera[:, :, None], weight[:, :, None]  # one head
        summed = weighted_bilinear(
            maps, uv, camera, weight, border=True, dtype=dtype, implementation=implementation
        )  # [B, Q, 1, C]
        return summed[:, :, 0]
    samples = read_cameras(features, uv, camera)  # [B, C, Q, S]
    return (samples * weight[:, None]).sum(-1).transpose(1, 2)


def sample_bev(
    bev: Tensor, grid: BEVGrid, points_ego: Tensor, weight: Tensor, implementation: str | None = None
) -> Tensor:
    """Sums bilinear samples of a BEV map with weights, per head; samples outside the grid are zero.

    Args:
        bev: [B, C, X, Y], the channels of head 0 first.
        grid: positions of the cells.
        points_ego: [B, Q, heads, S, 2] sampling locations, metres.
        weight: [B, Q, heads, S].
        implementation: one of `perception.ops.bilinear.IMPLEMENTATIONS`, None for the fastest.

    Returns:
        [B, Q, C], the channels of head 0 first.

    Raises:
        ConfigError: the implementation is unknown.
    """
    B, C, X, Y = bev.shape
    _, Q, heads, S, _ = points_ego.shape
    # On a CPU the map would have to be copied to channels_last, which takes longer than sampling a few queries.
    implementation = choose_implementation(bev, implementation, on_cpu="plain")
    if implementation != "plain":
        maps = bev.unflatten(1, (heads, C // heads)).permute(0, 3, 4, 1, 2)[:, None]  # [B, 1, X, Y, heads, C / heads]
        locations = grid.normalize(points_ego).flip(-1)  # columns run along y
        dtype = torch.promote_types(locations.dtype, weight.dtype)
        return weighted_bilinear(
            maps, locations, None, weight, border=False, dtype=dtype, implementation=implementation
        ).flatten(2)
    per_head = bev.reshape(B * heads, C // heads, X, Y)
    points = points_ego.transpose(1, 2).reshape(B * heads, Q, S, 2)
    samples = grid.sample(per_head, points)  # [B * heads, C / heads, Q, S]
    weight = weight.transpose(1, 2).reshape(B * heads, 1, Q, S)
    return (samples * weight).sum(-1).reshape(B, C, Q).transpose(1, 2)
