"""MapQR (https://arxiv.org/abs/2402.17430): lines from one query each, with the published weights and outputs.

Modules are named as in the published checkpoints. Coordinate frames are described in
`perception.models.published.geometry`. Differences from MapTRv2:

- BEV features come from BEVFormer's encoder with learned pillar heights (`perception.models.mapqr.encoder`).
- A query is a line, not a point of one. Each decoder layer scatters it to the points of the line and gathers what they
  read (`perception.models.mapqr.decoder`).

The network has no memory: every frame is encoded as a first frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from perception.models.mapqr.config import MapQRConfig
from perception.models.mapqr.decoder import MapQRDecoder, sine_embedding
from perception.models.mapqr.encoder import HeightKernelAttention, MapQREncoderLayer, initial_heights
from perception.models.maptr.losses import LINE_LOSS_WEIGHTS, line_losses
from perception.models.maptr.model import LineNetwork
from perception.models.maptrv2.losses import AUXILIARY_LOSS_WEIGHTS, auxiliary_losses
from perception.models.maptrv2.model import SegmentationLoss, segmentation_head
from perception.models.published.backbone import padded_size
from perception.models.published.decoder import LayerStack, LearnedPositionalEncoding, class_branches, init_matrices
from perception.models.published.encoder import can_bus_mlp
from perception.models.published.geometry import can_bus_vector, lidar_projections
from perception.ops.deformable import refined
from perception.types import LINE_CLASSES, Frame, FrameObjects, State


class MapQROutputs(NamedTuple):
    """Predictions of all decoder layers and of the auxiliary heads, for losses and decoding."""

    logits: Tensor  # [L, B, Q, K]
    points: Tensor  # [L, B, Q, P, 2], x and y normalised to 0..1 over the range
    one_to_many_logits: Tensor  # [L, B, Q', K] of the one-to-many queries; Q' is 0 unless the network is training
    one_to_many_points: Tensor  # [L, B, Q', P, 2]
    bev_seg_logits: Tensor  # [B, 1, rows, columns], lines in BEV
    image_seg_logits: Tensor  # [B, N, 1, h, w], lines in images
    ego_from_lidar: Tensor  # [B, 4, 4] of the frame


class MapQRTransformer(nn.Module):
    """BEV encoder, decoder and the layers that predict initial reference points."""

    def __init__(self, config: MapQRConfig) -> None:
        super().__init__()
        self.config = config
        C, P = config.channels, config.line_points
        self.level_embeds = nn.Parameter(torch.randn(config.level_embeddings, C))
        self.cams_embeds = nn.Parameter(torch.randn(config.cameras, C))
        self.can_bus_mlp = can_bus_mlp(C)
        self.encoder = LayerStack([MapQREncoderLayer(config) for _ in range(config.encoder_layers)])
        self.reference_points = nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.Linear(C, 2 * P))
        self.decoder = MapQRDecoder(config)
        init_matrices(self)
        for module in self.encoder.modules():
            if isinstance(module, HeightKernelAttention):  # start at the initial heights
                nn.init.zeros_(module.height_offsets.weight)
                nn.init.zeros_(module.height_offsets.bias)

    def encode(
        self,
        features: Tensor,
        queries: Tensor,
        position: Tensor,
        img_from_lidar: Tensor,
        can_bus: Tensor,
        image_size: tuple[int, int],
    ) -> Tensor:
        """Encodes the image features of all cameras as BEV features.

        Args:
            features: [B, N, C, h, w].
            queries: BEV queries [h * w, C].
            position: their positional encoding [1, h * w, C].
            img_from_lidar: [B, N, 4, 4] from `lidar_projections`.
            can_bus: [B, 18] from `can_bus_vector`.
            image_size: height and width in pixels of the images that `img_from_lidar` projects to.

        Returns:
            BEV features [B, h * w, C] in the LiDAR frame.
        """
        size = (features.shape[-2], features.shape[-1])
        features = features.flatten(3).transpose(2, 3) + self.cams_embeds[:, None] + self.level_embeds[0]
        query = queries + self.can_bus_mlp(can_bus.float())[:, None]  # [B, h * w, C]
        heights = initial_heights(self.config, query).expand(*query.shape[:2], -1)
        for layer in self.encoder.layers:
            query, heights = layer(query, position, features, size, heights, img_from_lidar, image_size)
        return query


class MapQRHead(nn.Module):
    """BEV encoder, line decoder and auxiliary segmentation heads. Modules have their published names."""

    def __init__(self, config: MapQRConfig) -> None:
        super().__init__()
        self.config = config
        C, layers = config.channels, config.decoder_layers
        self.bev_embedding = nn.Embedding(config.bev[0] * config.bev[1], C)
        self.instance_embedding = nn.Embedding(config.lines + config.one_to_many_queries, 2 * C)
        self.positional_encoding = LearnedPositionalEncoding(config.bev, C)
        self.transformer = MapQRTransformer(config)
        self.cls_branches = class_branches(C, len(LINE_CLASSES), layers)
        self.reg_branches = nn.ModuleList([_regression_branch(C, 2 * config.line_points) for _ in range(layers)])
        self.seg_head, self.pv_seg_head = segmentation_head(C), segmentation_head(C)
        self.loss_seg, self.loss_pv_seg = SegmentationLoss(4.0), SegmentationLoss(1.0)
        # Weights of the published loss; unused here, but the checkpoints hold them.
        self.code_weights = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(
        self,
        features: Tensor,
        img_from_lidar: Tensor,
        can_bus: Tensor,
        image_size: tuple[int, int],
        ego_from_lidar: Tensor,
    ) -> tuple[MapQROutputs, Tensor]:
        """Predicts lines and segmentation.

        Args:
            features, img_from_lidar, can_bus, image_size: as in `MapQRTransformer.encode`.
            ego_from_lidar: [B, 4, 4], for decoding.

        Returns:
            Predictions; BEV features [B, h * w, C].
        """
        config, transformer = self.config, self.transformer
        bev = transformer.encode(
            features, self.bev_embedding.weight, self.positional_encoding(), img_from_lidar, can_bus, image_size
        )
        queries = config.lines + (config.one_to_many_queries if self.training else 0)
        embedding = self.instance_embedding.weight[:queries]
        position, query = (x.expand(len(bev), -1, -1) for x in embedding.chunk(2, -1))  # [B, Q, C]
        one_to_many = torch.arange(queries, device=bev.device) >= config.lines
        mask = one_to_many[:, None] != one_to_many if self.training else None
        reference = transformer.reference_points(position).float().sigmoid().unflatten(-1, (-1, 2))  # [B, Q, P, 2]
        all_logits, all_points = [], []
        for layer, encode_points, classify, regress in zip(
            transformer.decoder.layers,
            transformer.decoder.pt_pos_query_projs,
            self.cls_branches,
            self.reg_branches,
            strict=True,
        ):
            point_position = encode_points(sine_embedding(reference, config.channels))  # [B, Q, P, C]
            query = layer(query, point_position, bev, reference, config.bev, mask)
            points = refined(reference, regress(query).unflatten(-1, (-1, 2)))
            all_logits.append(classify(query))
            all_points.append(points)
            reference = points.detach()
        logits, points = torch.stack(all_logits), torch.stack(all_points)
        n = config.lines
        return MapQROutputs(
            logits=logits[:, :, :n],
            points=points[:, :, :n],
            one_to_many_logits=logits[:, :, n:],
            one_to_many_points=points[:, :, n:],
            bev_seg_logits=self.seg_head(bev.transpose(1, 2).unflatten(2, config.bev)),
            image_seg_logits=self.pv_seg_head(features.flatten(0, 1)).unflatten(0, features.shape[:2]),
            ego_from_lidar=ego_from_lidar.float(),
        ), bev


def _regression_branch(channels: int, outputs: int) -> nn.Sequential:
    wide = 2 * channels
    return nn.Sequential(
        nn.Linear(channels, wide), nn.ReLU(), nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, wide), nn.ReLU(),
        nn.Linear(wide, outputs),
    )  # fmt: skip


class MapQR(LineNetwork):
    """Predicts lines from calibrated images.

    `Frame.rig` must have the cameras that the network was trained with, in their order.
    """

    loss_weights: ClassVar[Mapping[str, float]] = LINE_LOSS_WEIGHTS | AUXILIARY_LOSS_WEIGHTS
    config: MapQRConfig
    head: MapQRHead

    def __init__(self, config: MapQRConfig) -> None:
        super().__init__(config, MapQRHead(config))

    def forward(self, frame: Frame, state: State) -> tuple[MapQROutputs, State]:
        """Predicts the lines of one frame.

        Args:
            frame: leading [B], images [B, N, 3, H, W] of the configured size.
            state: returned unchanged.

        Returns:
            Predictions of all decoder layers, and the state.
        """
        can_bus = can_bus_vector(frame._replace(is_first=torch.ones_like(frame.is_first)))
        features = self.image_encoder(frame.images)[-1]
        image_size = padded_size(frame.images)
        prediction, _ = self.head(features, lidar_projections(frame), can_bus, image_size, frame.ego_from_lidar)
        return prediction, state

    def loss(self, prediction: MapQROutputs, gt: FrameObjects, frame: Frame) -> dict[str, Tensor]:
        """Computes the weighted losses by name, summed over decoder layers."""
        losses = line_losses(prediction.logits, prediction.points, gt, frame.ego_from_lidar, self.config)
        return losses | auxiliary_losses(self, prediction, gt.lines, frame)
