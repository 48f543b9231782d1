"""The BEV encoder of MapTRv2: Lift-Splat (https://arxiv.org/abs/2008.05711) with the depth net of BEVDepth
(https://arxiv.org/abs/2206.10092).

Modules are named as in the published checkpoints. The depth net takes the calibration of the camera's own image and the
scale of the input image separately. The config gives the scale. The calibration is that of the input images divided by
it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.geometry import full_precision, invert_rigid, transform_points
from perception.models.maptrv2.config import MapTRv2Config
from perception.models.published.geometry import constants
from perception.types import CameraRig


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Transforms [B, C, H, W] to the same shape."""
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class _AtrousConv(nn.Module):
    def __init__(self, channels: int, hidden: int, kernel: int, dilation: int) -> None:
        super().__init__()
        padding = dilation if kernel > 1 else 0
        self.atrous_conv = nn.Conv2d(channels, hidden, kernel, 1, padding, dilation, bias=False)
        self.bn = nn.BatchNorm2d(hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.atrous_conv(x)))


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (DeepLabv3, https://arxiv.org/abs/1706.05587)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.aspp1 = _AtrousConv(channels, hidden, 1, 1)
        self.aspp2 = _AtrousConv(channels, hidden, 3, 6)
        self.aspp3 = _AtrousConv(channels, hidden, 3, 12)
        self.aspp4 = _AtrousConv(channels, hidden, 3, 18)
        self.global_avg_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU()
        )
        self.conv1 = nn.Conv2d(5 * hidden, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Transforms [B, C, H, W] to the same shape."""
        pooled = self.global_avg_pool(x).expand(-1, -1, *x.shape[-2:])
        parts = [self.aspp1(x), self.aspp2(x), self.aspp3(x), self.aspp4(x), pooled]
        return self.dropout(F.relu(self.bn1(self.conv1(torch.cat(parts, 1)))))


class _MLP(nn.Module):
    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels_in, channels)
        self.fc2 = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


class SqueezeExcitation(nn.Module):
    """Gates for the channels of features that depend on the camera (https://arxiv.org/abs/1709.01507)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, channels, 1)
        self.conv_expand = nn.Conv2d(channels, channels, 1)

    def forward(self, embedding: Tensor) -> Tensor:
        """Computes gates [B, C, 1, 1] from camera embeddings [B, C]."""
        return self.conv_expand(F.relu(self.conv_reduce(embedding[..., None, None]))).sigmoid()


class DepthNet(nn.Module):
    """Predicts context features and a depth distribution per pixel from image features and camera parameters."""

    CAMERA_PARAMETERS = 22  # see `camera_parameters`

    def __init__(self, channels: int, depth_bins: int, aspp_channels: int) -> None:
        super().__init__()
        self.reduce_conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, 1, 1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        )
        self.context_conv = nn.Conv2d(channels, channels, 1)
        self.context_mlp = _MLP(self.CAMERA_PARAMETERS, channels)
        self.context_se = SqueezeExcitation(channels)
        self.bn = nn.BatchNorm1d(self.CAMERA_PARAMETERS)
        self.depth_mlp = _MLP(self.CAMERA_PARAMETERS, channels)
        self.depth_se = SqueezeExcitation(channels)
        self.depth_conv = nn.Sequential(
            *[ResidualBlock(channels) for _ in range(3)],
            ASPP(channels, aspp_channels),
            nn.Conv2d(channels, depth_bins, 1),
        )

    def forward(self, features: Tensor, cameras: Tensor) -> tuple[Tensor, Tensor]:
        """Predicts depth and context.

        Args:
            features: [B * N, C, h, w].
            cameras: [B * N, 22] from `camera_parameters`.

        Returns:
            Depth logits [B * N, D, h, w], context features [B * N, C, h, w].
        """
        return self.gated(features, *self.gates(cameras))

    def gates(self, cameras: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gates [B * N, C, 1, 1] of context and depth for camera parameters [B * N, 22]."""
        cameras = self.bn(cameras)
        return self.context_se(self.context_mlp(cameras)), self.depth_se(self.depth_mlp(cameras))

    def gated(self, features: Tensor, context_gate: Tensor, depth_gate: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, with the result of `gates`."""
        x = self.reduce_conv(features)
        return self.depth_conv(x * depth_gate), self.context_conv(x * context_gate)


def camera_parameters(rig: CameraRig, scale: float) -> Tensor:
    """Makes the 22 camera parameters of the depth net.

    Args:
        rig: leading [B, N], calibrated for the input images.
        scale: size of the input images relative to the camera's own.

    Returns:
        [B, N, 22]: focal lengths and principal point of the camera's own image in pixels, two rows of the resize to the
        input image (2x2 matrix and shift each), three rows of `ego_from_cam`.
    """
    matrix = rig.img_from_cam.float() / scale
    focal = torch.stack([matrix[..., 0, 0], matrix[..., 1, 1], matrix[..., 0, 2], matrix[..., 1, 2]], -1)
    resize = constants([scale, 0.0, 0.0, 0.0, scale, 0.0], focal).expand(*focal.shape[:-1], -1)
    return torch.cat([focal, resize, rig.ego_from_cam[..., :3, :].float().flatten(-2)], -1)


class LiftSplat(nn.Module):
    """Lifts image features by their depth distribution and sums them up in BEV cells (Lift-Splat)."""

    def __init__(self, config: MapTRv2Config) -> None:
        super().__init__()
        self.config = config
        C = config.channels
        rows, columns = (side * config.splat_scale for side in config.bev)
        low, high = torch.tensor(config.low), torch.tensor(config.high)
        size = torch.tensor([columns, rows, 1.0])
        step = (high - low) / size
        # Cell size, centre of the first cell and number of cells of the splat grid; the checkpoints hold them.
        self.dx = nn.Parameter(step, requires_grad=False)
        self.bx = nn.Parameter(low + step / 2, requires_grad=False)
        self.nx = nn.Parameter(size, requires_grad=False)
        self.depth_net = DepthNet(C, config.depth_bins, config.aspp_channels)

        def conv(stride: int) -> list[nn.Module]:
            return [nn.Conv2d(C, C, 3, stride, 1, bias=False), nn.BatchNorm2d(C), nn.ReLU(inplace=True)]

        self.downsample = nn.Sequential(*conv(1), *conv(config.splat_scale), *conv(1))

    def forward(
        self, features: Tensor, rig: CameraRig, ego_from_lidar: Tensor, image_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Encodes image features as BEV features.

        Args:
            features: [B, N, C, h, w].
            rig: leading [B, N], with the poses of the cameras on the vehicle, see `mounted_rig`.
            ego_from_lidar: [B, 4, 4].
            image_size: height and width in pixels of the images that the rig is calibrated for.

        Returns:
            BEV features [B, C, rows, columns], depth logits [B, N, D, h, w].
        """
        config = self.config
        B, N, C, h, w = features.shape
        cameras = camera_parameters(rig, config.image_scale)
        depth_logits, context = self.depth_net(features.flatten(0, 1), cameras.flatten(0, 1))
        depth_logits, context = depth_logits.unflatten(0, (B, N)), context.unflatten(0, (B, N))
        probability = depth_logits.float().softmax(2)  # [B, N, D, h, w]
        # An addition to the published network: absent cameras contribute nothing.
        probability = probability * rig.present[..., None, None, None]
        index, inside = self.cells(rig, ego_from_lidar, image_size, (h, w))
        rows, columns = (side * config.splat_scale for side in config.bev)
        if torch.compiler.is_compiling():  # shapes must not depend on data: points outside add zeros to cell 0
            index = torch.where(inside, index, 0).flatten()
            lifted = context[:, :, None] * (probability * inside)[:, :, :, None].to(context.dtype)
            lifted = lifted.movedim(3, -1).flatten(0, 4)  # [B * N * D * h * w, C]
        else:
            b, n, d, v, u = inside.nonzero(as_tuple=True)
            index = index[b, n, d, v, u]
            lifted = context[b, n, :, v, u] * probability[b, n, d, v, u, None].to(context.dtype)
        splat = context.new_zeros(B * rows * columns, C).index_add(0, index, lifted)
        bev = splat.view(B, rows, columns, C).permute(0, 3, 1, 2)
        return self.downsample(bev), depth_logits

    def cells(
        self, rig: CameraRig, ego_from_lidar: Tensor, image_size: tuple[int, int], feature_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Finds the cell of each feature and depth; arguments as in `lifted_points`.

        Returns:
            Index [B, N, D, h, w] into the splat grids of the batch, row by row; inside [B, N, D, h, w] bool: whether
            there is such a cell.
        """
        points = lifted_points(self.config, rig, ego_from_lidar, image_size, feature_size)  # [B, N, D, h, w, 3]
        # As published, indices are truncated towards zero: the first cells are half a cell larger.
        cell = ((points - (self.bx - self.dx / 2)) / self.dx).long()
        inside = ((cell >= 0) & (cell < self.nx.long())).all(-1)
        rows, columns = (side * self.config.splat_scale for side in self.config.bev)
        batch = torch.arange(len(cell), device=cell.device).view(-1, 1, 1, 1, 1)
        return (batch * rows + cell[..., 1]) * columns + cell[..., 0], inside


@full_precision
def lifted_points(
    config: MapTRv2Config,
    rig: CameraRig,
    ego_from_lidar: Tensor,
    image_size: tuple[int, int],
    feature_size: tuple[int, int],
) -> Tensor:
    """Lifts the pixels of a feature map to 3D points at the start of each depth bin (Lift-Splat).

    As published, the first and the last pixel of the feature map lie on the first and the last pixel of the image.

    Args:
        config: the depth bins.
        rig: leading [B, N], with the poses of the cameras on the vehicle.
        ego_from_lidar: [B, 4, 4].
        image_size: height and width in pixels of the images that the rig is calibrated for.
        feature_size: height and width of the feature map.

    Returns:
        [B, N, D, h, w, 3], metres in the LiDAR frame.
    """
    (H, W), (h, w) = image_size, feature_size
    device = rig.img_from_cam.device
    depth = torch.arange(*config.depth_range, device=device)
    v, u = torch.linspace(0, H - 1, h, device=device), torch.linspace(0, W - 1, w, device=device)
    depth, v, u = torch.meshgrid(depth, v, u, indexing="ij")
    pixels = torch.stack([u * depth, v * depth, depth], -1)  # [D, h, w, 3]
    cam_from_img = torch.linalg.inv(
        torch.where(rig.present[..., None, None], rig.img_from_cam.float(), torch.eye(3, device=device))
    )
    points_cam = pixels.flatten(0, 2) @ cam_from_img.transpose(-1, -2)  # [B, N, D * h * w, 3]
    lidar_from_cam = invert_rigid(ego_from_lidar.float())[:, None] @ rig.ego_from_cam.float()
    return transform_points(lidar_from_cam, points_cam).unflatten(2, depth.shape)
