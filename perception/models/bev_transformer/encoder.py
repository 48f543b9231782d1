"""From camera features to a bird's-eye view that remembers.

`CameraAwareHead` tells the image features where their pixels look, `SpatialCrossAttention` lets each cell of the grid
read the cameras that see it, `TemporalFusion` fuses the result with the memory of the previous frame, `BEVNeck` looks
around on the grid.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.cameras import choose_cameras, pixel_rays
from perception.grid import BEVGrid
from perception.ops import read_cameras, sample_cameras
from perception.types import CameraRig

NEAREST_DEPTH, FARTHEST_DEPTH = 1.0, 80.0  # metres, the range of the depth bins
DEPTH_CONTRAST = 10.0  # a difference of a tenth of the range of the depth bins, half as far again, counts 1
GROUND_WAVES = 6


def depth_position(depth: Tensor, bins: int) -> Tensor:
    """Depths in metres as fractional places among logarithmically spaced bins from 1 m to 80 m: 0 to bins - 1."""
    span = math.log(FARTHEST_DEPTH / NEAREST_DEPTH)
    return torch.log(depth.clamp(NEAREST_DEPTH, FARTHEST_DEPTH) / NEAREST_DEPTH) / span * (bins - 1)


class CameraAwareHead(nn.Module):
    """Tells the image features where each pixel looks, and says what each pixel shows.

    How far away a thing is shows in where it stands on the road, and that is a matter of the camera: its height, tilt
    and focal length. So the calibration goes into the features here, as in BEVDepth (https://arxiv.org/abs/2206.10092).

    Args:
        channels: of the features.
        outputs: channels of what is said of each pixel.
    """

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            nn.Linear(7 + 2 * GROUND_WAVES, channels), nn.ReLU(inplace=True), nn.Linear(channels, channels)
        )
        self.mix = ConvBlock(channels, channels)
        self.head = nn.Conv2d(channels, outputs, 1)

    def forward(self, features: Tensor, rig: CameraRig, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """features [B, N, C, h, w], rig with leading [B, N] -> features alike, and [B, N, outputs, h, w]."""
        B, N, _, h, w = features.shape
        rays = pixel_rays(rig, image_size, (h, w))
        place = rig.ego_from_cam.float()[:, :, None, :3, 3].expand_as(rays.ego)  # metres, a few at most
        width = rays.pixel_width[..., None, None].expand(-1, -1, h * w, -1)
        # Where the pixel's ray meets the ground: there stands what shows its foot in this pixel.
        ground = place[..., 2] / (-rays.ego[..., 2]).clamp(min=place[..., 2].clamp(min=0.1) / (2 * FARTHEST_DEPTH))
        phase = depth_position(ground, 2)[..., None] * (
            math.pi * 2.0 ** torch.arange(GROUND_WAVES, device=ground.device)
        )
        told = torch.cat([rays.ego, place, 10 * width, phase.sin(), phase.cos()], -1)
        told = self.embed(told).transpose(2, 3).unflatten(3, (h, w))  # [B, N, C, h, w]
        mixed = self.mix((features + told.to(features.dtype)).flatten(0, 1))
        return mixed.unflatten(0, (B, N)), self.head(mixed).unflatten(0, (B, N))


class SpatialCrossAttention(nn.Module):
    """Each cell attends, per height of its pillar, to the cameras that see it best.

    A cell's reference points are its centre at fixed heights. Around each point's projection the cell reads a few
    places with learned offsets; how much a reading counts depends on a learned weight and on how likely the pixel is to
    show something that is as far away as the cell. Pixels that show no object open themselves to the cells at all
    distances along their ray: the ground decides by its height which of them it belongs to. Beside what it reads a cell
    is told how much farther than itself the pixel's object is, so that it knows on which side of its centre to look.

    Args:
        grid: the BEV grid.
        heights: heights of the reference points above ground in metres.
        channels_in: of what is read from the images.
        channels: of the BEV.
        cameras: how many of them a cell attends to.
        samples: places read per height and camera.
    """

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
        # A single reading has nothing to be weighed against.
        self.weight = nn.Linear(channels, Z * samples) if cameras * samples > 1 else None
        self.output = nn.Linear(Z * (channels + 2), channels)
        self.norm = nn.LayerNorm(channels)
        nn.init.normal_(self.offset.weight, std=1e-3)
        if self.weight is not None:
            nn.init.zeros_(self.weight.weight)
            nn.init.zeros_(self.weight.bias)
        # The first place is the projection itself, the others start on a ring of one feature pixel.
        angle = torch.arange(samples) * (2 * torch.pi / max(samples - 1, 1))
        ring = torch.stack([angle.cos(), angle.sin()], -1) * (torch.arange(samples) > 0)[:, None]
        with torch.no_grad():
            self.offset.bias.copy_(ring.expand(Z, -1, -1).reshape(-1))

    def forward(
        self, query: Tensor, images: Tensor, distance: Tensor, rig: CameraRig, image_size: tuple[int, int]
    ) -> Tensor:
        """Adds to the queries what the cameras see.

        Args:
            query: [B, X * Y, C].
            images: [B, N, channels_in, h, w].
            distance: [B, N, 2 + D, h, w], how open the pixel is, its mean depth as a place among the bins, and how
                likely it is to be at each depth; all 0..1.
            rig: leading [B, N].
            image_size: height and width in pixels.

        Returns:
            [B, X * Y, C].
        """
        B, N, _, h, w = images.shape
        XY, Z, _ = self.points_ego.shape
        S = self.samples
        value = self.value(images.flatten(0, 1)).unflatten(0, (B, N))
        uv, depth, seen, camera = (
            x.flatten(1, 2) for x in choose_cameras(rig, self.points_ego, image_size, self.cameras)
        )
        K = camera.shape[-1]  # uv [B, XY * Z, K, 2], the others [B, XY * Z, K]
        opened, mean = read_cameras(distance[:, :, :2], uv, camera).unbind(1)  # [B, XY * Z, K]
        gate = torch.lerp(read_depth(distance[:, :, 2:], uv, camera, depth), torch.ones_like(depth), opened)
        farther = DEPTH_CONTRAST * (mean - depth_position(depth, 2)).clamp(-0.1, 0.1)
        told = torch.stack([gate, farther], -1) * (seen / seen.sum(-1, keepdim=True).clamp(min=1))[..., None]

        offset = self.offset(query).float().reshape(B, XY * Z, 1, S, 2)
        offset = torch.stack([offset[..., 0] / w, offset[..., 1] / h], -1)
        place = (uv[:, :, :, None] + offset).reshape(B, XY * Z, K * S, 2)
        weight = (seen * gate)[..., None]  # [B, XY * Z, K, S]; a point that nobody sees reads nothing
        if self.weight is not None:
            logit = self.weight(query).float().reshape(B, XY * Z, 1, S).expand(-1, -1, K, -1)
            weight = weight * logit.masked_fill(~seen[..., None], -1e4).flatten(2).softmax(-1).unflatten(2, (K, S))
        pillar = sample_cameras(value, place, camera[..., None].expand(-1, -1, -1, S).flatten(2), weight.flatten(2))
        pillar = torch.cat([pillar, told.sum(2)], -1)  # [B, XY * Z, C + 2]
        return self.norm(query + self.output(pillar.reshape(B, XY, -1)))


def read_depth(likely: Tensor, uv: Tensor, camera: Tensor, depth: Tensor) -> Tensor:
    """Reads distributions over depth at places and depths, linearly in all three directions.

    Every bin is read as a camera of its own, so a reading costs two samples of one channel, however many there are.

    Args:
        likely: [B, N, D, h, w].
        uv: [B, Q, K, 2] place in the chosen camera, 0..1 over width and height.
        camera: [B, Q, K] int64 index of the chosen camera.
        depth: [B, Q, K] metres.

    Returns:
        [B, Q, K].
    """
    B, N, D, h, w = likely.shape
    place = depth_position(depth, D).clamp(max=D - 1 - 1e-3)  # [B, Q, K]
    low = place.floor()
    bins = (camera * D + low.long())[..., None] + torch.arange(2, device=depth.device)  # [B, Q, K, 2]
    uv = uv[..., None, :].expand(-1, -1, -1, 2, -1).flatten(2, 3)
    read = read_cameras(likely.reshape(B, N * D, 1, h, w), uv, bins.flatten(2))  # [B, 1, Q, 2 * K]
    lower, upper = read[:, 0].unflatten(2, (-1, 2)).unbind(-1)
    return torch.lerp(lower, upper, place - low)


class TemporalFusion(nn.Module):
    """Fuses what is seen now with what was known before: a convolutional gated unit over the warped memory.

    The unit is told how long ago the memory is from, so it works at any frame rate, and it starts afresh where
    `is_first`.
    """

    def __init__(self, grid: BEVGrid, channels: int) -> None:
        super().__init__()
        self.grid = grid
        self.gate = nn.Conv2d(2 * channels + 2, channels, 3, padding=1)
        self.candidate = nn.Conv2d(2 * channels + 2, channels, 3, padding=1)
        nn.init.constant_(self.gate.bias, 1.0)  # at first, trust the present

    def forward(
        self, bev: Tensor, memory: Tensor, ego_from_prev: Tensor, seconds: Tensor, is_first: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the new memory, and the old one as it lies in the new ego frame, both [B, C, X, Y].

        Args:
            bev: [B, C, X, Y] what the cameras show now.
            memory: [B, C, X, Y] in the previous ego frame.
            ego_from_prev: [B, 4, 4].
            seconds: [B] since the previous frame.
            is_first: [B] bool.
        """
        known = (~is_first).to(bev.dtype).view(-1, 1, 1, 1)
        # Finite but meaningless memory (a reset) must not count: select instead of multiplying.
        memory = torch.where(is_first.view(-1, 1, 1, 1), torch.zeros_like(memory), memory)
        warped = self.grid.warp(memory, ego_from_prev).to(bev.dtype)
        age = seconds.to(bev.dtype).view(-1, 1, 1, 1) * known
        told = torch.cat([known, age], 1).expand(-1, -1, *bev.shape[-2:])
        both = torch.cat([bev, warped, told], 1)
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
    """Convolutions on the grid: one fine block, then a coarser level that sees farther, added back.

    Present and past come side by side, so that what has moved shows from where to where.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 2 * channels
        self.fine = ConvBlock(2 * channels, channels)
        self.coarse = nn.Sequential(ConvBlock(channels, wide, stride=2), ConvBlock(wide, wide))
        self.coarser = nn.Sequential(ConvBlock(wide, wide, stride=2), ConvBlock(wide, wide))
        self.down = nn.Conv2d(wide, channels, 1)
        self.out = ConvBlock(channels, channels)

    def forward(self, present: Tensor, past: Tensor) -> Tensor:
        """Twice [B, C, X, Y] to [B, C, X, Y]."""
        fine = self.fine(torch.cat([present, past], 1))
        coarse = self.coarse(fine)
        coarser = self.coarser(coarse)
        coarse = coarse + F.interpolate(coarser, size=coarse.shape[-2:], mode="bilinear", align_corners=False)
        up = F.interpolate(self.down(coarse), size=fine.shape[-2:], mode="bilinear", align_corners=False)
        return self.out(fine + up)
