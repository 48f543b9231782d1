"""Frames, motion and calibration as the published BEVFormer and MapTR take them.

What decides whether the published numbers come out is kept here:

- The networks live in the frame of LIDAR_TOP, x to the right and y ahead; rows of their maps run along y.
  `PublishedConfig.ego_from_lidar` says where that is.
- They were given a vector of 18 numbers from the CAN bus. Three of them matter: how far the car drove, in which
  direction, and by how much it turned. `can_bus` makes the vector from `Frame.ego_from_prev`; what a car's bus would
  have added (global pose, acceleration) is zero.
- The map of the previous frame is turned by the nearest cell, about a centre that is (100, 100) in all published
  configurations whatever the size of the map, and moved by shifting the locations where it is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from perception.geometry import invert_rigid
from perception.models.published.backbone import FPNConfig, PublishedBackboneConfig
from perception.types import Frame, LaneRange

# The pose of LIDAR_TOP on the cars of nuScenes, rotation without its tenths of a degree.
NUSCENES_EGO_FROM_LIDAR = (
    (0.0, 1.0, 0.0, 0.9437),
    (-1.0, 0.0, 0.0, 0.0),
    (0.0, 0.0, 1.0, 1.8402),
    (0.0, 0.0, 0.0, 1.0),
)
NEAREST_DEPTH = 1e-5  # metres
# The keys of published checkpoints by prefix, and the library's.
PREFIXES = {"img_backbone.": "image_encoder.backbone.", "img_neck.": "image_encoder.neck.", "pts_bbox_head.": "head."}


@dataclass(frozen=True)
class PublishedConfig:
    """What decides the shape of the shared parts; metres in the LiDAR's frame."""

    image_size: tuple[int, int] = (450, 800)
    backbone: PublishedBackboneConfig | FPNConfig = field(default_factory=PublishedBackboneConfig)
    bev: tuple[int, int] = (50, 50)  # rows along y, columns along x
    low: tuple[float, float, float] = (-51.2, -51.2, -5.0)
    high: tuple[float, float, float] = (51.2, 51.2, 3.0)
    channels: int = 256
    feed_forward: int = 512
    heads: int = 8
    encoder_layers: int = 3
    decoder_layers: int = 6
    level_embeddings: int = 4  # rows of a table of which the first are used
    pillar_points: int = 4
    camera_points: int = 8  # per level and head, spread over the heights of a pillar
    points: int = 4  # per head, in the map
    kernel: tuple[int, int] | None = None  # of patches that cameras are read in, see `KernelCrossAttention`
    cameras: int = 6
    rotate_center: tuple[int, int] = (100, 100)  # column and row, as published
    ego_from_lidar: tuple[tuple[float, ...], ...] = NUSCENES_EGO_FROM_LIDAR

    @property
    def lane_range(self) -> LaneRange:
        """Of the lines; the LiDAR's y looks ahead."""
        return LaneRange(self.high[1] - self.low[1], self.high[0] - self.low[0])


def constants(values: Sequence, like: Tensor) -> Tensor:
    """Makes a tensor of (nested) Python numbers with the type and device of another one.

    Nothing is copied from the host, so a pass can be captured as a CUDA graph.
    """
    return torch.stack([constants(v, like) if isinstance(v, Sequence) else like.new_full((), v) for v in values])


def cell_locations(h: int, w: int, device) -> Tensor:
    """Middles of all cells, x and y in 0..1: [h * w, 2], row by row."""
    y, x = torch.meshgrid(
        (torch.arange(h, device=device) + 0.5) / h, (torch.arange(w, device=device) + 0.5) / w, indexing="ij"
    )
    return torch.stack([x, y], -1).flatten(0, 1)


def see_pillars(config: PublishedConfig, img_from_lidar: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where the cameras see the points of each cell's pillar.

    Returns:
        locations [B, N, h * w, Z, 2], x and y in 0..1 of the image, and whether any of a pillar is seen [B, N, h * w].
    """
    img_from_lidar = img_from_lidar.float()
    (h, w), Z = config.bev, config.pillar_points
    low, high = (constants(x, img_from_lidar) for x in (config.low, config.high))
    height = config.high[2] - config.low[2]
    z = torch.linspace(0.5, height - 0.5, Z, device=low.device) / height
    xy = cell_locations(h, w, low.device)
    cube = torch.cat([xy[:, None].expand(-1, Z, -1), z.view(1, Z, 1).expand(h * w, -1, -1)], -1)
    points = F.pad(low + cube * (high - low), (0, 1), value=1.0)  # [h * w, Z, 4]
    projected = torch.einsum("bnij,qzj->bnqzi", img_from_lidar, points)
    depth = projected[..., 2]
    locations = projected[..., :2] / depth.clamp(min=NEAREST_DEPTH)[..., None]
    locations = locations / constants([image_size[1], image_size[0]], locations)
    inside = ((locations > 0) & (locations < 1)).all(-1) & (depth > NEAREST_DEPTH)
    return locations, inside.any(-1)


def turn_map(bev: Tensor, config: PublishedConfig, angle_deg: Tensor) -> Tensor:
    """Maps [B, h * w, C] turned by angles [B], by the nearest cell, as torchvision's `rotate` turns images."""
    h, w = config.bev
    angle = angle_deg.deg2rad()
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    # In pixels from the middle of the image; so is the centre of the turn.
    rows, columns = (torch.arange(side, device=bev.device) - (side - 1) / 2 for side in (h, w))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    center_x, center_y = config.rotate_center[0] - w / 2, config.rotate_center[1] - h / 2
    x, y = (side.flatten().to(angle.dtype) - center for side, center in ((x, center_x), (y, center_y)))
    from_x, from_y = cos * x - sin * y + center_x, sin * x + cos * y + center_y  # [B, h * w]
    grid = torch.stack([from_x / (w / 2), from_y / (h / 2)], -1).to(bev.dtype).view(-1, h, w, 2)
    image = bev.transpose(1, 2).unflatten(2, (h, w))
    return F.grid_sample(image, grid, mode="nearest", align_corners=False).flatten(2).transpose(1, 2)


def map_shift(config: PublishedConfig, bus: Tensor) -> Tensor:
    """How far the car has driven, x and y in 0..1 of the map: [B, 2]."""
    way = bus[:, :2].norm(dim=1)
    angle = bus[:, -2] - torch.atan2(bus[:, 1], bus[:, 0])
    along, across = way * angle.cos(), way * angle.sin()
    extent = [high - low for low, high in zip(config.low, config.high, strict=True)]
    return torch.stack([across / extent[0], along / extent[1]], -1).float()


def can_bus(frame: Frame) -> Tensor:
    """The 18 numbers [B, 18] that the published networks want to be told, from the motion since the last frame.

    Translation [0:3], quaternion [3:7], yaw [-2] in radians and its change [-1] in degrees. The published ones are
    taken in the frame of the map; here the axes are those of the present ego frame, so yaw is 0.
    """
    motion = frame.ego_from_prev.float()
    moved = -motion[:, :3, 3]  # what stands still moved by the opposite, and the car by this
    back = invert_rigid(motion)
    turned = torch.atan2(back[:, 1, 0], back[:, 0, 0]).rad2deg()[:, None]
    known = (~frame.is_first[:, None]).float()
    rest = torch.zeros_like(turned).expand(-1, 13)  # of the quaternion 1 0 0 0, what a bus would add, and yaw
    return torch.cat([moved * known, torch.ones_like(turned), rest, turned * known], 1)


def rig_from_lidar(frame: Frame, ego_from_lidar: Tensor) -> Tensor:
    """From the LiDAR's frame to (u depth, v depth, depth, 1) of each camera, [B, N, 4, 4]; zero for absent ones."""
    rig = frame.rig
    last = F.pad(torch.zeros_like(rig.img_from_cam[..., :1, :]), (0, 1), value=1.0)  # 0 0 0 1
    img_from_cam = torch.cat([F.pad(rig.img_from_cam.float(), (0, 1)), last], -2)  # [B, N, 4, 4]
    matrix = img_from_cam @ invert_rigid(rig.ego_from_cam.float()) @ ego_from_lidar.float()
    return torch.where(rig.present[..., None, None], matrix, torch.zeros_like(matrix))
