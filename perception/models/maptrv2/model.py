"""MapTRv2 (https://arxiv.org/abs/2308.05736): lines from BEV features that are lifted from images by depth.

Modules are named as in the published checkpoints. Coordinate frames are described in
`perception.models.published.geometry`. Differences from MapTR:

- BEV features come from Lift-Splat (https://arxiv.org/abs/2008.05711) with the camera-aware depth net of BEVDepth
  (https://arxiv.org/abs/2206.10092).
- Decoder self-attention is decoupled: among instances, then among the points of an instance.
- In training, auxiliary one-to-many queries are matched with each ground truth line several times.

The depth net takes the calibration of the camera's own image and the scale of the input image separately. The config
gives the scale. The calibration is that of the input images divided by it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.geometry import invert_rigid, transform_points
from perception.models.maptr.model import decode_lines
from perception.models.maptrv2.config import MapTRv2Config
from perception.models.maptrv2.losses import MAPTRV2_LOSS_WEIGHTS, maptrv2_losses
from perception.models.published.backbone import padded_size
from perception.models.published.encoder import (
    BEVCrossAttention,
    FeedForward,
    LayerStack,
    LearnedPositionalEncoding,
    QuerySelfAttention,
    can_bus_mlp,
    class_branches,
    init_matrices,
    regression_branches,
)
from perception.models.published.geometry import PREFIXES, constants
from perception.ops.deformable import refined
from perception.types import LINE_CLASSES, CameraRig, Frame, FrameObjects, State


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
    """Scales the channels of features by gates that depend on the camera (https://arxiv.org/abs/1709.01507)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, channels, 1)
        self.conv_expand = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Scales features [B, C, H, W] by gates from camera embeddings [B, C]."""
        return x * self.conv_expand(F.relu(self.conv_reduce(embedding[..., None, None]))).sigmoid()


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
        cameras = self.bn(cameras)
        x = self.reduce_conv(features)
        context = self.context_conv(self.context_se(x, self.context_mlp(cameras)))
        return self.depth_conv(self.depth_se(x, self.depth_mlp(cameras))), context


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
            rig: leading [B, N].
            ego_from_lidar: [4, 4].
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
        points = lifted_points(config, rig, ego_from_lidar, image_size, (h, w))  # [B, N, D, h, w, 3]
        # As published, indices are truncated towards zero: the first cells are half a cell larger.
        cell = ((points - (self.bx - self.dx / 2)) / self.dx).long()
        rows, columns = (side * config.splat_scale for side in config.bev)
        inside = ((cell >= 0) & (cell < self.nx.long())).all(-1)
        batch = torch.arange(B, device=cell.device).view(B, 1, 1, 1, 1)
        index = (batch * rows + cell[..., 1]) * columns + cell[..., 0]  # [B, N, D, h, w]
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
        rig: leading [B, N].
        ego_from_lidar: [4, 4].
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
    lidar_from_cam = invert_rigid(ego_from_lidar.float()) @ rig.ego_from_cam.float()
    return transform_points(lidar_from_cam, points_cam).unflatten(2, depth.shape)


class DecoupledDecoderLayer(nn.Module):
    """One decoder layer with decoupled self-attention: among instances, then among the points of an instance."""

    def __init__(self, config: MapTRv2Config) -> None:
        super().__init__()
        C, heads = config.channels, config.heads
        self.attentions = nn.ModuleList(
            [QuerySelfAttention(C, heads), QuerySelfAttention(C, heads), BEVCrossAttention(C, heads, config.points)]
        )
        self.ffns = nn.ModuleList([FeedForward(C, config.feed_forward)])
        self.norms = nn.ModuleList([nn.LayerNorm(C) for _ in range(4)])

    def forward(
        self,
        query: Tensor,
        position: Tensor,
        bev: Tensor,
        references: Tensor,
        size: tuple[int, int],
        mask: Tensor | None,
    ) -> Tensor:
        """Updates the queries.

        Args:
            query: [B, Q, P, C].
            position: positional encoding [B, Q, P, C].
            bev: BEV features [B, h * w, C].
            references: reference points [B, Q, P, 2], x and y normalised to 0..1.
            size: (h, w).
            mask: [Q, Q] bool, True for pairs of instances that must not attend to each other.

        Returns:
            [B, Q, P, C].
        """
        B, Q, P, _ = query.shape
        instances, instance_position = (x.transpose(1, 2).flatten(0, 1) for x in (query, position))  # [B * P, Q, C]
        query = self.attentions[0](instances, instance_position, mask).unflatten(0, (B, P)).transpose(1, 2)
        query = self.norms[0](query)
        query = self.attentions[1](query.flatten(0, 1), position.flatten(0, 1)).unflatten(0, (B, Q))
        query = self.norms[1](query)
        flat = self.attentions[2](query.flatten(1, 2), position.flatten(1, 2), bev, references.flatten(1, 2), size)
        return self.norms[3](self.ffns[0](self.norms[2](flat))).unflatten(1, (Q, P))


class MapTRv2Outputs(NamedTuple):
    """Predictions of all decoder layers and of the auxiliary heads, for losses and decoding."""

    logits: Tensor  # [L, B, Q, K]
    points: Tensor  # [L, B, Q, P, 2], x and y normalised to 0..1 over the range
    one_to_many_logits: Tensor  # [L, B, Q', K] of the one-to-many queries; Q' is 0 unless the network is training
    one_to_many_points: Tensor  # [L, B, Q', P, 2]
    bev_seg_logits: Tensor  # [B, 1, rows, columns], lines in BEV
    image_seg_logits: Tensor  # [B, N, 1, h, w], lines in images
    depth_logits: Tensor  # [B, N, D, h, w]


class _MapTRv2Transformer(nn.Module):
    """BEV encoder, decoder layers and the layer that predicts initial reference points."""

    def __init__(self, config: MapTRv2Config) -> None:
        super().__init__()
        self.encoder = LiftSplat(config)
        self.reference_points = nn.Linear(config.channels, 2)
        self.decoder = LayerStack([DecoupledDecoderLayer(config) for _ in range(config.decoder_layers)])
        init_matrices(self)


class _SegmentationLoss(nn.Module):
    """Binary cross-entropy, with the weight of positives under the name that the checkpoints give it."""

    def __init__(self, pos_weight: float) -> None:
        super().__init__()
        self.loss_fn = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([pos_weight]))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.loss_fn(logits, target)


class MapTRv2Head(nn.Module):
    """BEV encoder, line decoder and auxiliary segmentation heads. Modules have their published names."""

    def __init__(self, config: MapTRv2Config) -> None:
        super().__init__()
        self.config = config
        C, layers = config.channels, config.decoder_layers
        self.instance_embedding = nn.Embedding(config.lines + config.one_to_many_queries, 2 * C)
        self.pts_embedding = nn.Embedding(config.line_points, 2 * C)
        self.transformer = _MapTRv2Transformer(config)
        self.cls_branches = class_branches(C, config.classes, layers)
        self.reg_branches = regression_branches(C, 2, layers)
        self.seg_head, self.pv_seg_head = (
            nn.Sequential(nn.Conv2d(C, C, 3, 1, 1, bias=False), nn.ReLU(inplace=True), nn.Conv2d(C, 1, 1))
            for _ in range(2)
        )
        self.loss_seg, self.loss_pv_seg = _SegmentationLoss(4.0), _SegmentationLoss(1.0)
        # Weights of the published loss and parts of MapTR's encoder; unused, but the checkpoints hold them.
        self.code_weights = nn.Parameter(torch.ones(4), requires_grad=False)
        self.positional_encoding = LearnedPositionalEncoding(config.bev, C).requires_grad_(False)
        self.transformer.level_embeds = nn.Parameter(torch.zeros(config.level_embeddings, C), requires_grad=False)
        self.transformer.cams_embeds = nn.Parameter(torch.zeros(config.cameras, C), requires_grad=False)
        self.transformer.can_bus_mlp = can_bus_mlp(C).requires_grad_(False)

    def forward(
        self, features: Tensor, rig: CameraRig, ego_from_lidar: Tensor, image_size: tuple[int, int]
    ) -> MapTRv2Outputs:
        """Predicts lines, segmentation and depth; arguments as in `LiftSplat.forward`."""
        config = self.config
        bev_features, depth_logits = self.transformer.encoder(features, rig, ego_from_lidar, image_size)
        bev = bev_features.flatten(2).transpose(1, 2)  # [B, rows * columns, C]
        queries = config.lines + (config.one_to_many_queries if self.training else 0)
        embedding = self.instance_embedding.weight[:queries, None] + self.pts_embedding.weight  # [Q, P, 2 C]
        position, query = (x.expand(len(bev), -1, -1, -1) for x in embedding.chunk(2, -1))
        one_to_many = torch.arange(queries, device=bev.device) >= config.lines
        mask = one_to_many[:, None] != one_to_many if self.training else None
        reference = self.transformer.reference_points(position).float().sigmoid()  # [B, Q, P, 2]
        all_logits, all_points = [], []
        for layer, classify, regress in zip(
            self.transformer.decoder.layers, self.cls_branches, self.reg_branches, strict=True
        ):
            query = layer(query, position, bev, reference, config.bev, mask)
            points = refined(reference, regress(query))
            all_logits.append(classify(query.mean(2)))
            all_points.append(points)
            reference = points.detach()
        logits, points = torch.stack(all_logits), torch.stack(all_points)
        n = config.lines
        return MapTRv2Outputs(
            logits=logits[:, :, :n],
            points=points[:, :, :n],
            one_to_many_logits=logits[:, :, n:],
            one_to_many_points=points[:, :, n:],
            bev_seg_logits=self.seg_head(bev_features),
            image_seg_logits=self.pv_seg_head(features.flatten(0, 1)).unflatten(0, features.shape[:2]),
            depth_logits=depth_logits,
        )


class MapTRv2(nn.Module):
    """Predicts lines from calibrated images of any number of cameras."""

    finds = ("line",)
    loss_weights = MAPTRV2_LOSS_WEIGHTS
    image_loss = None
    raw_names = ("line_logits", "line_points")
    no_export = "it adds image features to BEV cells that depend on the calibration, which is a scatter at run time"
    published_prefixes = PREFIXES
    ego_from_lidar: Tensor

    def __init__(self, config: MapTRv2Config) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = config.backbone.build(config.channels)
        self.head = MapTRv2Head(config)
        self.register_buffer("ego_from_lidar", torch.tensor(config.ego_from_lidar), persistent=False)

    def initial_state(self, batch_size: int) -> State:
        """Returns an empty state: the network has no memory."""
        return State(self.ego_from_lidar.new_zeros(batch_size, 0, 1, 1))

    def forward(self, frame: Frame, state: State) -> tuple[MapTRv2Outputs, State]:
        """Predicts the lines of one frame.

        Args:
            frame: leading [B], images [B, N, 3, H, W] of the configured size.
            state: returned unchanged.

        Returns:
            Predictions of all decoder layers, and the state.
        """
        image_size = padded_size(frame.images)
        features = self.image_encoder(frame.images)[-1]
        return self.head(features, frame.rig, self.ego_from_lidar, image_size), state

    def loss(self, prediction: MapTRv2Outputs, gt: FrameObjects, frame: Frame) -> dict[str, Tensor]:
        """Computes the weighted losses by name, summed over decoder layers."""
        return maptrv2_losses(self, prediction, gt, frame)

    def raw_outputs(self, prediction: MapTRv2Outputs) -> tuple[Tensor, ...]:
        """Returns class logits and normalised points of the last decoder layer, [B, Q, ...]."""
        return prediction.logits[-1], prediction.points[-1]

    def decode(self, prediction: MapTRv2Outputs) -> FrameObjects:
        """Decodes lines in the ego frame, best score first, and no boxes."""
        return decode_lines(
            prediction.logits[-1][..., : len(LINE_CLASSES)], prediction.points[-1], self.ego_from_lidar, self.config
        )
