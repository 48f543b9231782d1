"""Coordinate frames, ego motion and camera projection of the published BEVFormer, MapTR and MapTRv2.

The published weights depend on these conventions:

- 3D coordinates are those of LIDAR_TOP with its tilt: x to the right, y ahead. Rows of the BEV grid lie along y,
  columns along x. `Frame.ego_from_lidar` is the pose of LIDAR_TOP.
- Lines have no height. They lie in a level frame with the position and yaw of LIDAR_TOP, as the published ground truth,
  and are taken as points of the LiDAR frame.
- BEVFormer and MapTR project by the cameras' poses at their own exposures (`lidar_projections`), MapTRv2 lifts by their
  poses on the vehicle (`mounted_rig`).
- Ego motion comes as a CAN bus vector of 18 numbers, of which the published code uses the driven distance, its
  direction and the change of yaw. `can_bus_vector` makes it from `Frame.ego_from_prev`. The numbers that only a CAN bus
  has (global pose, acceleration) are zero.
- The previous BEV features are rotated with nearest-neighbour sampling about the cell (100, 100), in all published
  configs and whatever the size of the grid. Translation shifts the reference points of temporal self-attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from perception.geometry import full_precision, invert_rigid
from perception.models.published.backbone import FPNConfig, PublishedBackboneConfig
from perception.types import CameraRig, Frame, LaneRange

MIN_DEPTH = 1e-5  # metres
# Prefixes of the keys in published checkpoints, and the library's.
PREFIXES = {"img_backbone.": "image_encoder.backbone.", "img_neck.": "image_encoder.neck.", "pts_bbox_head.": "head."}


@dataclass(frozen=True)
class PublishedConfig:
    """Configures what the published networks share; lengths in metres in the LiDAR frame."""

    image_size: tuple[int, int] = (450, 800)
    backbone: PublishedBackboneConfig | FPNConfig = field(default_factory=PublishedBackboneConfig)
    bev: tuple[int, int] = (50, 50)  # cells of the BEV grid: rows along y, columns along x
    # Corners of the perception range: least x, y, z, then largest x, y, z.
    point_cloud_range: tuple[float, float, float, float, float, float] = (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0)
    channels: int = 256
    feed_forward: int = 512  # hidden channels
    heads: int = 8
    encoder_layers: int = 3
    decoder_layers: int = 6
    level_embeddings: int = 4  # as many as the checkpoint has; each FPN level uses one, in order
    pillar_points: int = 4  # reference points per pillar in spatial cross-attention
    camera_points: int = 8  # sampling points per head and level in spatial cross-attention, over all pillar points
    points: int = 4  # sampling points per head in temporal self-attention and in the decoder
    gkt_kernel: tuple[int, int] | None = None  # height and width, see `GeometryKernelAttention`; None for deformable
    cameras: int = 6
    rotate_center: tuple[int, int] = (100, 100)  # column and row

    @property
    def lane_range(self) -> LaneRange:
        """The x and y extent of `point_cloud_range` along the car and across it; the LiDAR's y is ahead."""
        return LaneRange(self.high[1] - self.low[1], self.high[0] - self.low[0])

    @property
    def low(self) -> tuple[float, float, float]:
        """Least x, y, z of `point_cloud_range`."""
        return self.point_cloud_range[:3]

    @property
    def high(self) -> tuple[float, float, float]:
        """Largest x, y, z of `point_cloud_range`."""
        return self.point_cloud_range[3:]


def constants(values: Sequence, like: Tensor) -> Tensor:
    """Makes a tensor of (nested) Python numbers with the type and device of another one.

    Nothing is copied from the host, so a pass can be captured as a CUDA graph.
    """
    return torch.stack([constants(v, like) if isinstance(v, Sequence) else like.new_full((), v) for v in values])


def cell_centers(h: int, w: int, device: torch.device | str) -> Tensor:
    """Returns the centres of all cells, row by row: [h * w, 2], x and y normalised to 0..1."""
    y, x = torch.meshgrid(
        (torch.arange(h, device=device) + 0.5) / h, (torch.arange(w, device=device) + 0.5) / w, indexing="ij"
    )
    return torch.stack([x, y], -1).flatten(0, 1)


@full_precision
def project_pillars(
    config: PublishedConfig, img_from_lidar: Tensor, image_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Projects the reference points of each BEV cell's pillar into the cameras.

    Args:
        config: the grid, its range and the points per pillar.
        img_from_lidar: [B, N, 4, 4] from `lidar_projections`.
        image_size: height and width in pixels of the images that `img_from_lidar` projects to.

    Returns:
        Reference points [B, N, h * w, Z, 2], x and y normalised to 0..1 over the image; visible [B, N, h * w] bool:
        whether the image shows at least one of a pillar's points.
    """
    img_from_lidar = img_from_lidar.float()
    (h, w), Z = config.bev, config.pillar_points
    low, high = (constants(x, img_from_lidar) for x in (config.low, config.high))
    height = config.high[2] - config.low[2]
    z = torch.linspace(0.5, height - 0.5, Z, device=low.device) / height
    xy = cell_centers(h, w, low.device)
    normalized = torch.cat([xy[:, None].expand(-1, Z, -1), z.view(1, Z, 1).expand(h * w, -1, -1)], -1)
    points = F.pad(low + normalized * (high - low), (0, 1), value=1.0)  # [h * w, Z, 4]
    references, inside = image_references(torch.einsum("bnij,qzj->bnqzi", img_from_lidar, points), image_size)
    return references, inside.any(-1)


def image_references(projected: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Normalises projected points.

    Args:
        projected: [..., 4] of (u depth, v depth, depth, 1).
        image_size: height and width in pixels of the images that they were projected to.

    Returns:
        Reference points [..., 2], x and y normalised to 0..1 over the image; whether the image shows the point [...].
    """
    depth = projected[..., 2]
    references = projected[..., :2] / depth.clamp(min=MIN_DEPTH)[..., None]
    references = references / constants([image_size[1], image_size[0]], references)
    return references, ((references > 0) & (references < 1)).all(-1) & (depth > MIN_DEPTH)


def rotate_bev(bev: Tensor, config: PublishedConfig, angle_deg: Tensor) -> Tensor:
    """Rotates BEV features [B, h * w, C] by angles [B] with nearest-neighbour sampling, as torchvision's `rotate`."""
    h, w = config.bev
    angle = angle_deg.deg2rad()
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    # In cells from the middle of the grid, as is the centre of rotation.
    rows, columns = (torch.arange(side, device=bev.device) - (side - 1) / 2 for side in (h, w))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    center_x, center_y = config.rotate_center[0] - w / 2, config.rotate_center[1] - h / 2
    x, y = (side.flatten().to(angle.dtype) - center for side, center in ((x, center_x), (y, center_y)))
    from_x, from_y = cos * x - sin * y + center_x, sin * x + cos * y + center_y  # [B, h * w]
    grid = torch.stack([from_x / (w / 2), from_y / (h / 2)], -1).to(bev.dtype).view(-1, h, w, 2)
    image = bev.transpose(1, 2).unflatten(2, (h, w))
    return F.grid_sample(image, grid, mode="nearest", align_corners=False).flatten(2).transpose(1, 2)


def bev_shift(config: PublishedConfig, can_bus: Tensor) -> Tensor:
    """Computes the translation since the previous frame: [B, 2], x and y normalised by the range."""
    distance = can_bus[:, :2].norm(dim=1)
    angle = can_bus[:, -2] - torch.atan2(can_bus[:, 1], can_bus[:, 0])
    along, across = distance * angle.cos(), distance * angle.sin()
    extent = [high - low for low, high in zip(config.low, config.high, strict=True)]
    return torch.stack([across / extent[0], along / extent[1]], -1).float()


def can_bus_vector(frame: Frame) -> Tensor:
    """Makes the CAN bus vector [B, 18] of the published networks from the ego motion since the previous frame.

    Translation in metres at [0:3], rotation quaternion at [3:7], yaw in radians at [-2], change of yaw in degrees
    at [-1]. The published vector is in the global frame. Here the axes are those of the present ego frame, so that
    yaw is 0.
    """
    ego_from_prev = frame.ego_from_prev.float()
    translation = -ego_from_prev[:, :3, 3]  # ego_from_prev moves static points, opposite to the car
    prev_from_ego = invert_rigid(ego_from_prev)
    yaw_change = torch.atan2(prev_from_ego[:, 1, 0], prev_from_ego[:, 0, 0]).rad2deg()[:, None]
    has_previous = (~frame.is_first[:, None]).float()
    zeros = torch.zeros_like(yaw_change).expand(-1, 13)  # the quaternion after its 1, acceleration, velocity, yaw
    return torch.cat([translation * has_previous, torch.ones_like(yaw_change), zeros, yaw_change * has_previous], 1)


@full_precision
def mounted_rig(frame: Frame) -> CameraRig:
    """Returns the rig [B, N] with the poses of the cameras on the vehicle, without motion since their exposure."""
    rig = frame.rig
    return rig._replace(ego_from_cam=invert_rigid(frame.ego_from_exposure.float()) @ rig.ego_from_cam.float())


def lidar_level(ego_from_lidar: Tensor) -> tuple[Tensor, Tensor]:
    """Returns rotation [..., 2, 2] and translation [..., 2] of the level frame of the lines in the ego frame."""
    x_axis = F.normalize(ego_from_lidar[..., :2, 0], dim=-1)
    return torch.stack([x_axis, torch.stack([-x_axis[..., 1], x_axis[..., 0]], -1)], -1), ego_from_lidar[..., :2, 3]


@full_precision
def lidar_projections(frame: Frame) -> Tensor:
    """Returns matrices [B, N, 4, 4] from LiDAR points to (u depth, v depth, depth, 1), zero for absent cameras."""
    rig = frame.rig
    last = F.pad(torch.zeros_like(rig.img_from_cam[..., :1, :]), (0, 1), value=1.0)  # 0 0 0 1
    img_from_cam = torch.cat([F.pad(rig.img_from_cam.float(), (0, 1)), last], -2)  # [B, N, 4, 4]
    matrix = img_from_cam @ invert_rigid(rig.ego_from_cam.float()) @ frame.ego_from_lidar.float()[:, None]
    return torch.where(rig.present[..., None, None], matrix, torch.zeros_like(matrix))
