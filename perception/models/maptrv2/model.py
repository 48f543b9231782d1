"""MapTRv2 (https://arxiv.org/abs/2308.05736): lines from a map that is lifted from the images by their depth.

Modules are named as in the published checkpoints and the network lives in the frame of LIDAR_TOP (see
`perception.models.published.geometry`). What it does otherwise than MapTR: each pixel says how far away it is and puts
its features there (Lift-Splat, https://arxiv.org/abs/2008.05711, with the camera-aware depth of BEVDepth,
https://arxiv.org/abs/2206.10092); queries attend among lines and along each line apart; and in training further queries
are matched with every line six times over.

The published network is told the calibration of the camera and the scale of the image apart: the config holds the
scale, and the calibration is that of the given images divided by it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.geometry import invert_rigid, transform_points
from perception.models.maptr.losses import line_losses
from perception.models.maptr.model import decode_lines
from perception.models.maptrv2.config import MapTRv2Config
from perception.models.maptrv2.losses import LIFTED_LOSS_WEIGHTS, lifted_losses
from perception.models.published.backbone import padded_size
from perception.models.published.encoder import (
    FeedForward,
    LearnedPosition,
    MapAttention,
    QueryAttention,
    branch,
    start_matrices,
)
from perception.models.published.geometry import PREFIXES, constants
from perception.ops.deformable import refined
from perception.types import LINE_CLASSES, CameraRig, Frame, FrameObjects, State


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around which the input goes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class _Dilated(nn.Module):
    def __init__(self, channels: int, inner: int, kernel: int, dilation: int) -> None:
        super().__init__()
        padding = dilation if kernel > 1 else 0
        self.atrous_conv = nn.Conv2d(channels, inner, kernel, 1, padding, dilation, bias=False)
        self.bn = nn.BatchNorm2d(inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.atrous_conv(x)))


class DilatedPyramid(nn.Module):
    """Convolutions of several reaches side by side (ASPP, https://arxiv.org/abs/1706.05587)."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.aspp1 = _Dilated(channels, inner, 1, 1)
        self.aspp2 = _Dilated(channels, inner, 3, 6)
        self.aspp3 = _Dilated(channels, inner, 3, 12)
        self.aspp4 = _Dilated(channels, inner, 3, 18)
        self.global_avg_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU()
        )
        self.conv1 = nn.Conv2d(5 * inner, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        overall = self.global_avg_pool(x).expand(-1, -1, *x.shape[-2:])
        parts = [self.aspp1(x), self.aspp2(x), self.aspp3(x), self.aspp4(x), overall]
        return self.dropout(F.relu(self.bn1(self.conv1(torch.cat(parts, 1)))))


class _CalibrationMLP(nn.Module):
    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels_in, channels)
        self.fc2 = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


class _Excitation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, channels, 1)
        self.conv_expand = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        return x * self.conv_expand(F.relu(self.conv_reduce(told[..., None, None]))).sigmoid()


class DepthNet(nn.Module):
    """What each pixel shows and how far away it is, from its features and the calibration of its camera."""

    TOLD = 22  # numbers of a calibration, see `calibration_numbers`

    def __init__(self, channels: int, depths: int, aspp_channels: int) -> None:
        super().__init__()
        self.reduce_conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, 1, 1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        )
        self.context_conv = nn.Conv2d(channels, channels, 1)
        self.context_mlp = _CalibrationMLP(self.TOLD, channels)
        self.context_se = _Excitation(channels)
        self.bn = nn.BatchNorm1d(self.TOLD)
        self.depth_mlp = _CalibrationMLP(self.TOLD, channels)
        self.depth_se = _Excitation(channels)
        self.depth_conv = nn.Sequential(
            *[ResidualBlock(channels) for _ in range(3)],
            DilatedPyramid(channels, aspp_channels),
            nn.Conv2d(channels, depths, 1),
        )

    def forward(self, features: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
        """features [B * N, C, h, w], told [B * N, 22] -> depth logits [B * N, D, h, w], context [B * N, C, h, w]."""
        told = self.bn(told)
        x = self.reduce_conv(features)
        context = self.context_conv(self.context_se(x, self.context_mlp(told)))
        return self.depth_conv(self.depth_se(x, self.depth_mlp(told))), context


def calibration_numbers(rig: CameraRig, scale: float) -> Tensor:
    """The 22 numbers of each camera [B, N, 22] that the published network is told.

    Focal lengths and centre of the camera's own image, the two rows (of two and a shift) that take it to the given one,
    and the pose in the ego frame, row by row.
    """
    matrix = rig.img_from_cam.float() / scale
    focal = torch.stack([matrix[..., 0, 0], matrix[..., 1, 1], matrix[..., 0, 2], matrix[..., 1, 2]], -1)
    resized = constants([scale, 0.0, 0.0, 0.0, scale, 0.0], focal).expand(*focal.shape[:-1], -1)
    return torch.cat([focal, resized, rig.ego_from_cam[..., :3, :].float().flatten(-2)], -1)


class LiftSplat(nn.Module):
    """Puts the features of pixels where their depths say, and sums them up in the cells of the map."""

    def __init__(self, config: MapTRv2Config) -> None:
        super().__init__()
        self.config = config
        C = config.channels
        rows, columns = (side * config.finer for side in config.bev)
        low, high = torch.tensor(config.low), torch.tensor(config.high)
        size = torch.tensor([columns, rows, 1.0])
        step = (high - low) / size
        # Side lengths of the finer cells, middle of the first, and their number: the checkpoints hold them.
        self.dx = nn.Parameter(step, requires_grad=False)
        self.bx = nn.Parameter(low + step / 2, requires_grad=False)
        self.nx = nn.Parameter(size, requires_grad=False)
        self.depth_net = DepthNet(
            C, round((config.depths[1] - config.depths[0]) / config.depths[2]), config.aspp_channels
        )

        def conv(stride: int) -> list[nn.Module]:
            return [nn.Conv2d(C, C, 3, stride, 1, bias=False), nn.BatchNorm2d(C), nn.ReLU(inplace=True)]

        self.downsample = nn.Sequential(*conv(1), *conv(config.finer), *conv(1))

    def forward(
        self, features: Tensor, rig: CameraRig, ego_from_lidar: Tensor, image_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """From features [B, N, C, h, w] of images of `image_size` to the map [B, C, rows, columns].

        Returns:
            The map, and the depth logits [B, N, D, h, w].
        """
        config = self.config
        B, N, C, h, w = features.shape
        told = calibration_numbers(rig, config.image_scale)
        logits, context = self.depth_net(features.flatten(0, 1), told.flatten(0, 1))
        logits, context = logits.unflatten(0, (B, N)), context.unflatten(0, (B, N))
        likely = logits.float().softmax(2)  # [B, N, D, h, w]
        # The published network knows no missing cameras; here they add nothing to the map.
        likely = likely * rig.present[..., None, None, None]
        points = lifted_points(config, rig, ego_from_lidar, image_size, (h, w))  # [B, N, D, h, w, 3]
        cell = ((points - (self.bx - self.dx / 2)) / self.dx).long()  # towards zero: half a cell more at the lower ends
        rows, columns = (side * config.finer for side in config.bev)
        inside = ((cell >= 0) & (cell < self.nx.long())).all(-1)
        batch = torch.arange(B, device=cell.device).view(B, 1, 1, 1, 1)
        place = (batch * rows + cell[..., 1]) * columns + cell[..., 0]  # [B, N, D, h, w]
        if torch.compiler.is_compiling():  # shapes must not depend on what lies inside: the rest adds zeros somewhere
            place = torch.where(inside, place, 0).flatten()
            shown = context[:, :, None] * (likely * inside)[:, :, :, None].to(context.dtype)  # [B, N, D, C, h, w]
            shown = shown.movedim(3, -1).flatten(0, 4)
        else:
            b, n, d, v, u = inside.nonzero(as_tuple=True)
            place = place[b, n, d, v, u]
            shown = context[b, n, :, v, u] * likely[b, n, d, v, u, None].to(context.dtype)
        splat = context.new_zeros(B * rows * columns, C).index_add(0, place, shown)
        bev = splat.view(B, rows, columns, C).permute(0, 3, 1, 2)
        return self.downsample(bev), logits


def lifted_points(
    config: MapTRv2Config,
    rig: CameraRig,
    ego_from_lidar: Tensor,
    image_size: tuple[int, int],
    feature_size: tuple[int, int],
) -> Tensor:
    """Where the pixels of a feature map may lie: [B, N, D, h, w, 3], metres in the LiDAR's frame.

    As published, the first and the last pixel of a feature map stand for the first and the last of the image.
    """
    (H, W), (h, w) = image_size, feature_size
    device = rig.img_from_cam.device
    depth = torch.arange(*config.depths, device=device)
    v, u = torch.linspace(0, H - 1, h, device=device), torch.linspace(0, W - 1, w, device=device)
    depth, v, u = torch.meshgrid(depth, v, u, indexing="ij")
    pixels = torch.stack([u * depth, v * depth, depth], -1)  # [D, h, w, 3]
    cam_from_img = torch.linalg.inv(
        torch.where(rig.present[..., None, None], rig.img_from_cam.float(), torch.eye(3, device=device))
    )
    points_cam = pixels.flatten(0, 2) @ cam_from_img.transpose(-1, -2)  # [B, N, D * h * w, 3]
    lidar_from_cam = invert_rigid(ego_from_lidar.float()) @ rig.ego_from_cam.float()
    return transform_points(lidar_from_cam, points_cam).unflatten(2, depth.shape)


class DecoupledLayer(nn.Module):
    """One round of the decoder: among lines point by point, along each line, from the map, by themselves."""

    def __init__(self, config: MapTRv2Config) -> None:
        super().__init__()
        C, heads = config.channels, config.heads
        self.attentions = nn.ModuleList(
            [QueryAttention(C, heads), QueryAttention(C, heads), MapAttention(C, heads, config.points)]
        )
        self.ffns = nn.ModuleList([FeedForward(C, config.feed_forward)])
        self.norms = nn.ModuleList([nn.LayerNorm(C) for _ in range(4)])

    def forward(
        self,
        query: Tensor,
        position: Tensor,
        bev: Tensor,
        locations: Tensor,
        size: tuple[int, int],
        apart: Tensor | None,
    ) -> Tensor:
        """query, position [B, Q, P, C], bev [B, h * w, C], locations [B, Q, P, 2]; `apart` [Q, Q] is True where two
        lines must not see each other. Returns [B, Q, P, C]."""
        B, Q, P, _ = query.shape
        among, among_position = (x.transpose(1, 2).flatten(0, 1) for x in (query, position))  # [B * P, Q, C]
        query = self.attentions[0](among, among_position, apart).unflatten(0, (B, P)).transpose(1, 2)
        query = self.norms[0](query)
        query = self.attentions[1](query.flatten(0, 1), position.flatten(0, 1)).unflatten(0, (B, Q))
        query = self.norms[1](query)
        flat = self.attentions[2](query.flatten(1, 2), position.flatten(1, 2), bev, locations.flatten(1, 2), size)
        return self.norms[3](self.ffns[0](self.norms[2](flat))).unflatten(1, (Q, P))


class LiftedLines(NamedTuple):
    """What `MapTRv2Head` returns, for the losses."""

    logits: Tensor  # [L, B, Q, K]
    points: Tensor  # [L, B, Q, P, 2] x and y in 0..1 over the range
    many_logits: Tensor  # [L, B, Q', K] of the further queries; none where the network is not in training mode
    many_points: Tensor  # [L, B, Q', P, 2]
    bev_seg_logits: Tensor  # [B, 1, rows, columns] whether a line passes a cell of the map
    image_logits: Tensor  # [B, N, 1, h, w] whether a pixel shows a line
    depth_logits: Tensor  # [B, N, D, h, w] how far away what a pixel shows is


class MapTRv2Head(nn.Module):
    """From features to raw lines; the modules and their names are the published ones."""

    def __init__(self, config: MapTRv2Config) -> None:
        super().__init__()
        self.config = config
        C, layers = config.channels, config.decoder_layers
        self.instance_embedding = nn.Embedding(config.lines + config.many_lines, 2 * C)
        self.pts_embedding = nn.Embedding(config.line_points, 2 * C)
        self.transformer = nn.Module()
        self.transformer.encoder = LiftSplat(config)
        self.transformer.reference_points = nn.Linear(C, 2)
        self.transformer.decoder = nn.Module()
        self.transformer.decoder.layers = nn.ModuleList([DecoupledLayer(config) for _ in range(layers)])
        start_matrices(self.transformer)
        self.cls_branches = nn.ModuleList([branch(C, config.classes, norm=True) for _ in range(layers)])
        self.reg_branches = nn.ModuleList([branch(C, 2, norm=False) for _ in range(layers)])
        for classify in self.cls_branches:
            nn.init.constant_(classify[-1].bias, -math.log(99))
        self.seg_head, self.pv_seg_head = (
            nn.Sequential(nn.Conv2d(C, C, 3, 1, 1, bias=False), nn.ReLU(inplace=True), nn.Conv2d(C, 1, 1))
            for _ in range(2)
        )
        # Weights of the published losses, and parts of MapTR's encoder that nothing reads: the checkpoints hold them.
        self.code_weights = nn.Parameter(torch.ones(4), requires_grad=False)
        self.loss_seg, self.loss_pv_seg = nn.Module(), nn.Module()
        self.loss_seg.loss_fn = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([4.0]))
        self.loss_pv_seg.loss_fn = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0]))
        self.positional_encoding = LearnedPosition(config.bev, C).requires_grad_(False)
        self.transformer.level_embeds = nn.Parameter(torch.zeros(config.level_embeddings, C), requires_grad=False)
        self.transformer.cams_embeds = nn.Parameter(torch.zeros(config.cameras, C), requires_grad=False)
        self.transformer.can_bus_mlp = nn.Sequential(
            nn.Linear(18, C // 2), nn.ReLU(inplace=True), nn.Linear(C // 2, C), nn.ReLU(inplace=True)
        )
        self.transformer.can_bus_mlp.add_module("norm", nn.LayerNorm(C))
        self.transformer.can_bus_mlp.requires_grad_(False)

    def forward(
        self, features: Tensor, rig: CameraRig, ego_from_lidar: Tensor, image_size: tuple[int, int]
    ) -> LiftedLines:
        """Raw lines of all layers; arguments as in `LiftSplat.forward`."""
        config = self.config
        grid, depth_logits = self.transformer.encoder(features, rig, ego_from_lidar, image_size)
        bev = grid.flatten(2).transpose(1, 2)  # [B, rows * columns, C]
        lines = config.lines + (config.many_lines if self.training else 0)
        embedding = self.instance_embedding.weight[:lines, None] + self.pts_embedding.weight  # [Q, P, 2 C]
        position, query = (x.expand(len(bev), -1, -1, -1) for x in embedding.chunk(2, -1))
        further = torch.arange(lines, device=bev.device) >= config.lines
        apart = further[:, None] != further if self.training else None
        reference = self.transformer.reference_points(position).float().sigmoid()  # [B, Q, P, 2]
        all_logits, all_points = [], []
        for layer, classify, regress in zip(
            self.transformer.decoder.layers, self.cls_branches, self.reg_branches, strict=True
        ):
            query = layer(query, position, bev, reference, config.bev, apart)
            points = refined(reference, regress(query))
            all_logits.append(classify(query.mean(2)))
            all_points.append(points)
            reference = points.detach()
        logits, points = torch.stack(all_logits), torch.stack(all_points)
        image_logits = self.pv_seg_head(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        first, rest = slice(config.lines), slice(config.lines, None)
        return LiftedLines(
            logits[:, :, first], points[:, :, first], logits[:, :, rest], points[:, :, rest], self.seg_head(grid),
            image_logits, depth_logits,
        )  # fmt: skip


class MapTRv2(nn.Module):
    """Calibrated images in, raw lines out; any number of cameras."""

    finds = ("line",)
    loss_weights = LIFTED_LOSS_WEIGHTS
    image_loss = None
    raw_names = ("line_logits", "line_points")
    no_export = "it sums up features where their depths put them, which depends on data"
    published_prefixes = PREFIXES

    def __init__(self, config: MapTRv2Config) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = config.backbone.build(config.channels)
        self.head = MapTRv2Head(config)
        self.register_buffer("ego_from_lidar", torch.tensor(config.ego_from_lidar), persistent=False)

    def initial_state(self, batch_size: int) -> State:
        """Nothing: the network has no memory."""
        return State(self.ego_from_lidar.new_zeros(batch_size, 0, 1, 1))

    def forward(self, frame: Frame, state: State) -> tuple[LiftedLines, State]:
        """One frame.

        Args:
            frame: leading [B], with images [B, N, 3, H, W] of the configured size.
            state: handed back as it is.

        Returns:
            What `MapTRv2Head` returns, and the state.
        """
        image_size = padded_size(frame.images)
        features = self.image_encoder(frame.images)[-1]
        return self.head(features, frame.rig, self.ego_from_lidar, image_size), state

    def loss(self, prediction: LiftedLines, gt: FrameObjects, frame: Frame) -> dict[str, Tensor]:
        """Weighted losses by name, added up over the layers."""
        losses = line_losses(prediction.logits, prediction.points, gt, self.ego_from_lidar, self.config)
        return losses | lifted_losses(self, prediction, gt, frame)

    def raw_outputs(self, prediction: LiftedLines) -> tuple[Tensor, ...]:
        """Logits and points of the last layer, [B, Q, ...]."""
        return prediction.logits[-1], prediction.points[-1]

    def decode(self, prediction: LiftedLines) -> FrameObjects:
        """The best lines in the ego frame, best first; there are no boxes."""
        return decode_lines(
            prediction.logits[-1][..., : len(LINE_CLASSES)], prediction.points[-1], self.ego_from_lidar, self.config
        )
