"""The BEV encoder: from image features to BEV features with a memory.

`CameraAwareHead` adds the camera geometry to the image features and predicts depth, class and heading per pixel.
`SpatialCrossAttention` samples image features for each BEV cell. `TemporalFusion` fuses them with the BEV features of
the previous frame. `BEVNeck` is a small convolutional pyramid on the grid.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.cameras import choose_cameras, pixel_rays
from perception.grid import BEVGrid
from perception.ops import is_channels_last, read_cameras, sample_cameras
from perception.types import CameraRig

NEAREST_DEPTH, FARTHEST_DEPTH = 1.0, 80.0  # metres, the range of the depth bins
DEPTH_CONTRAST = 10.0  # scales depth differences: a tenth of the range of the bins becomes 1
GROUND_WAVES = 6


def depth_bin(depth: Tensor, bins: int) -> Tensor:
    """Converts depths in metres to fractional indices 0..bins - 1 of logarithmically spaced bins from 1 m to 80 m."""
    span = math.log(FARTHEST_DEPTH / NEAREST_DEPTH)
    return torch.log(depth.clamp(NEAREST_DEPTH, FARTHEST_DEPTH) / NEAREST_DEPTH) / span * (bins - 1)


class PillarViews(NamedTuple):
    """Where the cameras of each BEV cell see the reference points of its pillar."""

    uv: Tensor  # [B, X * Y * Z, K, 2], 0..1 over the image
    depth: Tensor  # [B, X * Y * Z, K] metres
    seen: Tensor  # [B, X * Y * Z, K] bool
    camera: Tensor  # [B, X * Y * Z, K] index


def ray_features(rig: CameraRig, image_size: tuple[int, int], feature_size: tuple[int, int]) -> Tensor:
    """Describes the viewing ray of each pixel of the feature maps by numbers of about unit size.

    Args:
        rig: leading [B, N].
        image_size: height and width in pixels of the images that the rig is calibrated for.
        feature_size: height and width of the feature maps.

    Returns:
        [B, N, h * w, 7 + 2 * GROUND_WAVES]: direction, camera position, pixel width and ground distance.
    """
    rays = pixel_rays(rig, image_size, feature_size)
    position = rig.ego_from_cam.float()[:, :, None, :3, 3].expand_as(rays.ego)  # metres
    width = rays.pixel_width[..., None, None].expand(-1, -1, rays.ego.shape[2], -1)
    # The depth at which the pixel's ray meets the ground, where an object whose foot this pixel shows would stand.
    ground = position[..., 2] / (-rays.ego[..., 2]).clamp(min=position[..., 2].clamp(min=0.1) / (2 * FARTHEST_DEPTH))
    phase = depth_bin(ground, 2)[..., None] * (math.pi * 2.0 ** torch.arange(GROUND_WAVES, device=ground.device))
    return torch.cat([rays.ego, position, 10 * width, phase.sin(), phase.cos()], -1)


class CameraAwareHead(nn.Module):
    """Adds the camera geometry to the image features and predicts class, depth and heading of each pixel.

    The depth of an object follows from where it stands on the road, which depends on the height, tilt and focal length
    of the camera. So the calibration is an input here, as in BEVDepth (https://arxiv.org/abs/2206.10092).

    Args:
        channels: of the features.
        outputs: channels of the prediction per pixel.
    """

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            nn.Linear(7 + 2 * GROUND_WAVES, channels), nn.ReLU(inplace=True), nn.Linear(channels, channels)
        )
        self.mix = ConvBlock(channels, channels)
        self.head = nn.Conv2d(channels, outputs, 1)

    def forward(self, features: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
        """Predicts from image features and their viewing rays.

        Args:
            features: [B, N, C, h, w].
            rays: [B, N, h * w, 7 + 2 * GROUND_WAVES] from `ray_features`.

        Returns:
            Camera-aware features [B, N, C, h, w], and [B, N, outputs, h, w].
        """
        B, N, _, h, w = features.shape
        geometry = self.embed(rays).transpose(2, 3).unflatten(3, (h, w))  # [B, N, C, h, w]
        mixed = self.mix((features + geometry.to(features.dtype)).flatten(0, 1))
        return mixed.unflatten(0, (B, N)), self.head(mixed).unflatten(0, (B, N))


class SpatialCrossAttention(nn.Module):
    """Spatial cross-attention: each BEV cell samples the images of the cameras that see its pillar best.

    The reference points of a cell are its centre at fixed heights. Around the projection of each point, image features
    are sampled at learned offsets (BEVFormer, https://arxiv.org/abs/2203.17270). A sample is weighted by a learned
    weight and by a depth gate, which is the predicted probability that the pixel shows something at the depth of the
    cell. A predicted bypass opens the gate at all depths, for pixels that show no object, such as the road. Two more
    inputs per point are the gate itself and the difference between the depths of pixel and cell, which shows on which
    side of the cell centre the object is.

    Args:
        grid: the BEV grid.
        heights: heights of the reference points above ground in metres.
        channels_in: of the image features.
        channels: of the BEV features.
        cameras: number of cameras per cell.
        samples: sampling locations per height and camera.
    """

    points_ego: Tensor  # [X * Y, Z, 3] reference points

    def __init__(
        self,
        grid: BEVGrid,
        heights: tuple[float, ...],
        channels_in: int,
        channels: int,
        cameras: int,
        samples: int,
    ) -> None:
        super().__init__()
        self.grid, self.cameras, self.samples = grid, cameras, samples
        Z = len(heights)
        centers = grid.cell_centers().reshape(-1, 1, 2).expand(-1, Z, -1)
        z = torch.tensor(heights, dtype=torch.float32).view(1, Z, 1).expand(centers.shape[0], -1, -1)
        self.register_buffer("points_ego", torch.cat([centers, z], -1), persistent=False)  # [X * Y, Z, 3]
        self.value = nn.Conv2d(channels_in, channels, 1)
        self.offset = nn.Linear(channels, Z * samples * 2)
        # A softmax over one sample is constant.
        self.weight = nn.Linear(channels, Z * samples) if cameras * samples > 1 else None
        self.output = nn.Linear(Z * (channels + 2), channels)
        self.norm = nn.LayerNorm(channels)
        nn.init.normal_(self.offset.weight, std=1e-3)
        if self.weight is not None:
            nn.init.zeros_(self.weight.weight)
            nn.init.zeros_(self.weight.bias)
        # The first sampling location is the projection itself, the others start on a ring of one feature pixel.
        angle = torch.arange(samples) * (2 * torch.pi / max(samples - 1, 1))
        ring = torch.stack([angle.cos(), angle.sin()], -1) * (torch.arange(samples) > 0)[:, None]
        with torch.no_grad():
            self.offset.bias.copy_(ring.expand(Z, -1, -1).reshape(-1))

    def views(self, rig: CameraRig, image_size: tuple[int, int]) -> PillarViews:
        """Chooses the cameras of each cell and projects its reference points into them.

        Args:
            rig: leading [B, N].
            image_size: height and width in pixels of the images that the rig is calibrated for.
        """
        found = choose_cameras(rig, self.points_ego, image_size, self.cameras)  # [B, X * Y, Z, K, ...]
        return PillarViews(*(x.flatten(1, 2) for x in found))

    def forward(self, query: Tensor, images: Tensor, depth_gate: Tensor, views: PillarViews) -> Tensor:
        """Samples image features into the BEV queries.

        Args:
            query: [B, X * Y, C].
            images: [B, N, channels_in, h, w].
            depth_gate: [B, N, 2 + D, h, w] per pixel the gate bypass, the mean depth as `depth_bin` over two bins, and
                the probability of each of D depth bins; all 0..1.
            views: of the rig of these images.

        Returns:
            [B, X * Y, C].
        """
        B, N, _, h, w = images.shape
        XY, Z, _ = self.points_ego.shape
        S = self.samples
        value = self.value(images.flatten(0, 1)).unflatten(0, (B, N))
        uv, depth, seen, camera = views
        K = camera.shape[-1]
        bypass, mean = read_cameras(depth_gate[:, :, :2], uv, camera).unbind(1)  # [B, XY * Z, K]
        gate = torch.lerp(sample_depth(depth_gate[:, :, 2:], uv, camera, depth), torch.ones_like(depth), bypass)
        farther = DEPTH_CONTRAST * (mean - depth_bin(depth, 2)).clamp(-0.1, 0.1)
        geometry = torch.stack([gate, farther], -1) * (seen / seen.sum(-1, keepdim=True).clamp(min=1))[..., None]

        offset = self.offset(query).float().reshape(B, XY * Z, 1, S, 2)
        offset = torch.stack([offset[..., 0] / w, offset[..., 1] / h], -1)
        locations = (uv[:, :, :, None] + offset).reshape(B, XY * Z, K * S, 2)
        weight = (seen * gate)[..., None]  # [B, XY * Z, K, S]; a point that no camera sees samples nothing
        if self.weight is not None:
            logit = self.weight(query).float().reshape(B, XY * Z, 1, S).expand(-1, -1, K, -1)
            weight = weight * logit.masked_fill(~seen[..., None], -1e4).flatten(2).softmax(-1).unflatten(2, (K, S))
        pillar = sample_cameras(value, locations, camera[..., None].expand(-1, -1, -1, S).flatten(2), weight.flatten(2))
        pillar = torch.cat([pillar, geometry.sum(2)], -1)  # [B, XY * Z, C + 2]
        return self.norm(query + self.output(pillar.reshape(B, XY, -1)))


def sample_depth(likely: Tensor, uv: Tensor, camera: Tensor, depth: Tensor) -> Tensor:
    """Samples depth distributions by trilinear interpolation.

    Each depth bin counts as one camera for `read_cameras`, so a sample costs two bilinear samples of one channel,
    however many bins there are.

    Args:
        likely: [B, N, D, h, w] probability of each depth bin.
        uv: [B, Q, K, 2] sampling location in the chosen camera, 0..1 over width and height.
        camera: [B, Q, K] int64 index of the chosen camera.
        depth: [B, Q, K] metres.

    Returns:
        [B, Q, K].
    """
    B, N, D, h, w = likely.shape
    at = depth_bin(depth, D).clamp(max=D - 1 - 1e-3)  # [B, Q, K]
    low = at.floor()
    bins = (camera * D + low.long())[..., None] + torch.arange(2, device=depth.device)  # [B, Q, K, 2]
    uv = uv[..., None, :].expand(-1, -1, -1, 2, -1).flatten(2, 3)
    sampled = read_cameras(likely.reshape(B, N * D, 1, h, w), uv, bins.flatten(2))  # [B, 1, Q, 2 * K]
    lower, upper = sampled[:, 0].unflatten(2, (-1, 2)).unbind(-1)
    return torch.lerp(lower, upper, at - low)


class TemporalFusion(nn.Module):
    """Temporal fusion: a convolutional gated recurrent unit over the BEV memory, warped by the ego motion.

    The age of the memory is an input, so the unit works at any frame rate. The memory is ignored where `is_first`.
    """

    def __init__(self, grid: BEVGrid, channels: int) -> None:
        super().__init__()
        self.grid = grid
        self.gate = nn.Conv2d(2 * channels + 2, channels, 3, padding=1)
        self.candidate = nn.Conv2d(2 * channels + 2, channels, 3, padding=1)
        assert self.gate.bias is not None
        nn.init.constant_(self.gate.bias, 1.0)  # starts with more weight on the current frame

    def forward(
        self, bev: Tensor, memory: Tensor, ego_from_prev: Tensor, seconds: Tensor, is_first: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the new memory, and the old one warped into the current ego frame, both [B, C, X, Y].

        Args:
            bev: [B, C, X, Y] of the current frame.
            memory: [B, C, X, Y] in the previous ego frame.
            ego_from_prev: [B, 4, 4].
            seconds: [B] since the previous frame.
            is_first: [B] bool.
        """
        known = (~is_first).to(bev.dtype).view(-1, 1, 1, 1)
        # Selected instead of multiplied by zero, since a reset memory may hold any numbers.
        memory = torch.where(is_first.view(-1, 1, 1, 1), torch.zeros_like(memory), memory)
        warped = self.grid.warp(memory, ego_from_prev).to(bev.dtype)
        age = seconds.to(bev.dtype).view(-1, 1, 1, 1) * known
        timing = torch.cat([known, age], 1).expand(-1, -1, *bev.shape[-2:])
        if is_channels_last(self.gate.weight):  # parts of different layouts would be copied by every layer after this
            bev, warped, timing = (x.contiguous(memory_format=torch.channels_last) for x in (bev, warped, timing))
        both = torch.cat([bev, warped, timing], 1)
        gate = self.gate(both).sigmoid()
        return gate * self.candidate(both).relu() + (1 - gate) * warped + bev, warped


class ConvBlock(nn.Module):
    """Two 3x3 convolutions with a residual connection."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        same = channels_in == channels and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


class BEVNeck(nn.Module):
    """A convolutional pyramid on the BEV grid: one fine block and two coarser levels that are added back.

    Current and previous BEV features are concatenated, so that the motion of objects is visible.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 2 * channels
        self.fine = ConvBlock(2 * channels, channels)
        self.coarse = nn.Sequential(ConvBlock(channels, wide, stride=2), ConvBlock(wide, wide))
        self.coarser = nn.Sequential(ConvBlock(wide, wide, stride=2), ConvBlock(wide, wide))
        self.down = nn.Conv2d(wide, channels, 1)
        self.out = ConvBlock(channels, channels)

    def forward(self, current: Tensor, previous: Tensor) -> Tensor:
        """Fuses current and previous BEV features, each [B, C, X, Y], to [B, C, X, Y]."""
        fine = self.fine(torch.cat([current, previous], 1))
        coarse = self.coarse(fine)
        coarser = self.coarser(coarse)
        coarse = coarse + F.interpolate(coarser, size=coarse.shape[-2:], mode="bilinear", align_corners=False)
        up = F.interpolate(self.down(coarse), size=fine.shape[-2:], mode="bilinear", align_corners=False)
        return self.out(fine + up)
