"""Deformable aggregation: features of an instance are a weighted sum of image features at its key points.

All cameras and feature levels take part, with one softmax for each group of channels. The weights depend on the
instance and on the calibration of the camera.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.models.published.geometry import MIN_DEPTH, constants
from perception.models.sparse4d.blocks import mlp
from perception.models.sparse4d.config import Sparse4DConfig
from perception.ops.bilinear import choose_implementation, weighted_bilinear


class CameraView(NamedTuple):
    """Image features of one frame, and how they are calibrated."""

    features: list[Tensor]  # levels [B, N, C, h, w]
    img_from_lidar: Tensor  # [B, N, 4, 4], LiDAR points to (u depth, v depth, depth, 1); zero for a missing camera
    image_size: tuple[int, int]  # height and width in pixels of the images that `img_from_lidar` projects to


class KeyPoints(Protocol):
    """A module that makes the key points of instances."""

    count: int  # key points per instance

    def __call__(self, anchor: Tensor, feature: Tensor) -> Tensor:
        """Returns points [B, Q, count, 3] in metres for anchors [B, Q, D] and features [B, Q, C]."""
        ...


def project(points: Tensor, view: CameraView) -> Tensor:
    """Projects points [B, Q, P, 3] of the LiDAR frame: uv [B, N, Q, P, 2], 0..1 over the image.

    As published, the depth of a point behind a camera is only clamped.
    """
    points = F.pad(points.float(), (0, 1), value=1.0)
    projected = torch.einsum("bnij,bqpj->bnqpi", view.img_from_lidar.float()[:, :, :3], points)
    uv = projected[..., :2] / projected[..., 2:].clamp(min=MIN_DEPTH)
    H, W = view.image_size
    return uv / constants([W, H], uv)


def sample_all(features: list[Tensor], uv: Tensor, weight: Tensor, implementation: str | None = None) -> Tensor:
    """Sums bilinear samples of all cameras with weights; locations outside an image sample zero.

    Args:
        features: levels [B, N, C, h, w].
        uv: [B, N, Q, P, 2], 0..1 over the image.
        weight: [B, N, Q, L, P, G] for each level L and group of channels G.
        implementation: one of `perception.ops.bilinear.IMPLEMENTATIONS`, None for the fastest.

    Returns:
        [B, Q, C].
    """
    B, N, Q, P, _ = uv.shape
    implementation = choose_implementation(features[0], implementation, on_cpu="embedding_bag")
    if implementation != "plain":
        camera = torch.arange(N, device=uv.device).view(1, 1, N).expand(B, Q, -1)
        return _fused(features, uv.transpose(1, 2), camera, weight.transpose(1, 2), implementation)
    grid = (2 * uv - 1).flatten(0, 1)  # [B * N, Q, P, 2]
    weight = weight.flatten(0, 1).permute(2, 0, 4, 1, 3)[:, :, :, None]  # [L, B * N, G, 1, Q, P]
    total = torch.zeros_like(grid[..., 0, 0])[:, None]  # [B * N, 1, Q]
    for level, of_level in zip(features, weight, strict=True):
        samples = F.grid_sample(level.flatten(0, 1).to(grid.dtype), grid, align_corners=False)  # [B * N, C, Q, P]
        grouped = samples.unflatten(1, (of_level.shape[1], -1))  # [B * N, G, C / G, Q, P]
        total = total + (grouped * of_level).sum(-1).flatten(1, 2)
    return total.unflatten(0, (B, N)).sum(1).transpose(1, 2)


def sample_chosen(
    features: list[Tensor], uv: Tensor, camera: Tensor, weight: Tensor, implementation: str | None = None
) -> Tensor:
    """Sums bilinear samples of chosen cameras with weights; locations outside an image sample zero.

    The cameras are stacked into one tall map with a row of zeros below each, so that the camera is a vertical offset.

    Args:
        features: levels [B, N, C, h, w].
        uv: [B, Q, K, P, 2] in K cameras, 0..1 over the image.
        camera: [B, Q, K] int64 index of each camera.
        weight: [B, Q, K, L, P, G] for each level L and group of channels G.
        implementation: one of `perception.ops.bilinear.IMPLEMENTATIONS`, None for the fastest.

    Returns:
        [B, Q, C].
    """
    implementation = choose_implementation(features[0], implementation, on_cpu="embedding_bag")
    if implementation != "plain":
        return _fused(features, uv, camera, weight, implementation)
    weight = weight.permute(3, 0, 5, 1, 2, 4).flatten(4)[:, :, :, None]  # [L, B, G, 1, Q, K * P]
    total = torch.zeros_like(uv[:, :, 0, 0, 0])[:, None]  # [B, 1, Q]
    for level, of_level in zip(features, weight, strict=True):
        _, N, _, h, w = level.shape
        tall = F.pad(level.to(uv.dtype), (0, 0, 0, 1)).transpose(1, 2).flatten(2, 3)  # [B, C, N * (h + 1), w]
        row = (uv[..., 1] * h).clamp(-0.5, h + 0.5) + (camera * (h + 1))[..., None]
        grid = torch.stack([2 * uv[..., 0] - 1, row * (2 / (N * (h + 1))) - 1], -1).flatten(2, 3)  # [B, Q, K * P, 2]
        samples = F.grid_sample(tall, grid, align_corners=False)  # [B, C, Q, K * P]
        grouped = samples.unflatten(1, (of_level.shape[1], -1))
        total = total + (grouped * of_level).sum(-1).flatten(1, 2)
    return total.transpose(1, 2)


def _fused(features: list[Tensor], uv: Tensor, camera: Tensor, weight: Tensor, implementation: str) -> Tensor:
    """Computes `sample_chosen` with a fast implementation."""
    B, Q, K, P, _ = uv.shape
    G = weight.shape[-1]
    locations = uv.flatten(2, 3)[:, :, None].expand(-1, -1, G, -1, -1)  # [B, Q, G, K * P, 2]
    index = camera[..., None].expand(-1, -1, -1, P).flatten(2)[:, :, None].expand(-1, -1, G, -1)
    dtype = torch.promote_types(uv.dtype, weight.dtype)
    parts = [
        weighted_bilinear(
            level.permute(0, 1, 3, 4, 2).unflatten(-1, (G, -1)), locations, index,
            weight[:, :, :, i].flatten(2, 3).transpose(2, 3), border=False, dtype=dtype, implementation=implementation,
        )  # [B, Q, G, C / G]
        for i, level in enumerate(features)
    ]  # fmt: skip
    return torch.stack(parts).sum(0).flatten(2)


class DeformableAggregation(nn.Module):
    """Samples image features at the key points of instances.

    Args:
        config: of the network.
        key_points: makes the key points.
    """

    def __init__(self, config: Sparse4DConfig, key_points: KeyPoints) -> None:
        super().__init__()
        C, levels = config.channels, config.backbone.levels
        self.config = config
        self.kps_generator: Any = key_points
        self.output_proj = nn.Linear(C, C)
        self.camera_encoder = nn.Sequential(*mlp(12, C, 2))
        self.weights_fc = nn.Linear(C, config.groups * levels * key_points.count)

    def forward(self, feature: Tensor, anchor: Tensor, encoding: Tensor, view: CameraView) -> Tensor:
        """Aggregates image features.

        Args:
            feature: of the instances [B, Q, C].
            anchor: [B, Q, D].
            encoding: of the anchors [B, Q, C].
            view: the image features.

        Returns:
            [B, Q, 2 C]: the aggregated features, then `feature`.
        """
        config = self.config
        levels, P = config.backbone.levels, self.kps_generator.count
        uv = project(self.kps_generator(anchor, feature), view)  # [B, N, Q, P, 2]
        N, Q = uv.shape[1:3]
        cameras = self.camera_encoder(view.img_from_lidar[:, :, :3].flatten(2))  # [B, N, C]
        logits = self.weights_fc((feature + encoding)[:, None] + cameras[:, :, None])  # [B, N, Q, L * P * G]
        logits = logits.float().unflatten(-1, (levels * P, config.groups)).transpose(1, 2)  # [B, Q, N, L * P, G]
        weight = logits.flatten(2, 3).softmax(2).unflatten(2, (N, levels, P)).transpose(1, 2)  # [B, N, Q, L, P, G]
        if self.training and config.sampling_dropout > 0:
            kept = torch.rand(*weight.shape[:3], 1, P, 1, device=weight.device) > config.sampling_dropout
            weight = weight * kept / (1 - config.sampling_dropout)
        if config.drop_outside:
            weight = weight * ((uv > 0) & (uv < 1)).all(-1)[:, :, :, None, :, None]
        uv = uv.clamp(-1, 2)  # what is farther outside samples zero, too
        if config.best_cameras is None or config.best_cameras >= N:
            sampled = sample_all(view.features, uv, weight)
        else:
            share = weight.sum((3, 4, 5))  # [B, N, Q]
            camera = share.topk(config.best_cameras, dim=1).indices  # [B, K, Q]
            uv = uv.gather(1, camera[..., None, None].expand(-1, -1, -1, *uv.shape[3:]))
            weight = weight.gather(1, camera[..., None, None, None].expand(-1, -1, -1, *weight.shape[3:]))
            uv, camera, weight = (x.transpose(1, 2) for x in (uv, camera, weight))
            sampled = sample_chosen(view.features, uv, camera, weight)
        return torch.cat([self.output_proj(sampled.to(feature.dtype)), feature], -1)
