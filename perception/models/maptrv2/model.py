"""MapTRv2 (https://arxiv.org/abs/2308.05736): lines from BEV features that are lifted from images by depth.

Modules are named as in the published checkpoints. Coordinate frames are described in
`perception.models.published.geometry`. Differences from MapTR:

- BEV features come from Lift-Splat with a camera-aware depth net (`perception.models.maptrv2.encoder`).
- Decoder self-attention is decoupled: among instances, then among the points of an instance.
- In training, auxiliary one-to-many queries are matched with each ground truth line several times.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from perception.models.maptr.model import LineNetwork, decode_lines
from perception.models.maptrv2.config import MapTRv2Config
from perception.models.maptrv2.encoder import LiftSplat
from perception.models.maptrv2.fixed_rig import FixedLiftSplat
from perception.models.maptrv2.losses import MAPTRV2_LOSS_WEIGHTS, maptrv2_losses
from perception.models.published.backbone import padded_size
from perception.models.published.decoder import (
    BEVCrossAttention,
    FeedForward,
    LayerStack,
    LearnedPositionalEncoding,
    QuerySelfAttention,
    class_branches,
    init_matrices,
    regression_branches,
)
from perception.models.published.encoder import can_bus_mlp
from perception.models.published.geometry import mounted_rig
from perception.ops.deformable import refined
from perception.types import LINE_CLASSES, CameraRig, Frame, FrameObjects, State


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
    ego_from_lidar: Tensor  # [B, 4, 4] of the frame


class _MapTRv2Transformer(nn.Module):
    """BEV encoder, decoder layers and the layer that predicts initial reference points."""

    def __init__(self, config: MapTRv2Config) -> None:
        super().__init__()
        self.encoder = LiftSplat(config)
        self.reference_points = nn.Linear(config.channels, 2)
        self.decoder = LayerStack([DecoupledDecoderLayer(config) for _ in range(config.decoder_layers)])
        init_matrices(self)


class SegmentationLoss(nn.Module):
    """Binary cross-entropy, with the weight of positives under the name that the checkpoints give it."""

    def __init__(self, pos_weight: float) -> None:
        super().__init__()
        self.loss_fn = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([pos_weight]))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.loss_fn(logits, target)


def segmentation_head(channels: int) -> nn.Sequential:
    """Builds an auxiliary head that segments lines in features [B, C, h, w]."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.ReLU(inplace=True), nn.Conv2d(channels, 1, 1)
    )


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
        self.seg_head, self.pv_seg_head = segmentation_head(C), segmentation_head(C)
        self.loss_seg, self.loss_pv_seg = SegmentationLoss(4.0), SegmentationLoss(1.0)
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
        bev_features, depth_logits = self.transformer.encoder(features, rig, ego_from_lidar, image_size)
        return self.predict(features, bev_features, depth_logits, ego_from_lidar)

    def predict(
        self, features: Tensor, bev_features: Tensor, depth_logits: Tensor, ego_from_lidar: Tensor
    ) -> MapTRv2Outputs:
        """Predicts lines and segmentation from the results of the lift."""
        config = self.config
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
            ego_from_lidar=ego_from_lidar.float(),
        )


class MapTRv2ForRig(nn.Module):
    """A MapTRv2 whose calibration is fixed, for exports: `Frame.rig` gives only which cameras are present.

    `MapTRv2.for_rig` makes it. It runs on batches of one frame.
    """

    finds: ClassVar[tuple[str, ...]] = ("line",)
    extra_inputs: ClassVar[tuple[str, ...]] = ("ego_from_lidar",)
    raw_names: ClassVar[tuple[str, ...]] = ("line_logits", "line_points")
    tracks: ClassVar[bool] = False

    def __init__(self, network: MapTRv2, rig: CameraRig, ego_from_lidar: Tensor) -> None:
        super().__init__()
        self.config, self.image_encoder, self.head = network.config, network.image_encoder, network.head
        H, W = padded_size(torch.zeros(1, *network.config.image_size))
        with torch.no_grad():
            features = self.image_encoder(torch.zeros(1, 1, 3, *network.config.image_size))[-1]
        h, w = features.shape[-2:]
        self.lift = FixedLiftSplat(network.head.transformer.encoder, rig, ego_from_lidar, (H, W), (h, w))
        self.initial_state, self.decode = network.initial_state, network.decode
        self.raw_outputs = network.raw_outputs

    def forward(self, frame: Frame, state: State) -> tuple[MapTRv2Outputs, State]:
        """As `MapTRv2.forward`."""
        features = self.image_encoder(frame.images)[-1]
        bev_features, depth_logits = self.lift(features, frame.rig.present)
        return self.head.predict(features, bev_features, depth_logits, frame.ego_from_lidar), state


class MapTRv2(LineNetwork):
    """Predicts lines from calibrated images of any number of cameras."""

    loss_weights: ClassVar[Mapping[str, float]] = MAPTRV2_LOSS_WEIGHTS
    recomputable = ("head.transformer.encoder", "head.transformer.decoder.layers")
    config: MapTRv2Config
    head: MapTRv2Head

    def __init__(self, config: MapTRv2Config) -> None:
        super().__init__(config, MapTRv2Head(config))

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
        return self.head(features, mounted_rig(frame), frame.ego_from_lidar, image_size), state

    def for_rig(self, rig: CameraRig, ego_from_lidar: Tensor) -> MapTRv2ForRig:
        """Returns the network for one fixed calibration, whose lift has static shapes.

        Args:
            rig: leading [1, N], all cameras present, in pixels of images of the configured size, with the poses of the
                cameras on the vehicle.
            ego_from_lidar: [1, 4, 4].
        """
        return MapTRv2ForRig(self, rig, ego_from_lidar).eval()

    def loss(self, prediction: MapTRv2Outputs, gt: FrameObjects, frame: Frame) -> dict[str, Tensor]:
        """Computes the weighted losses by name, summed over decoder layers."""
        return maptrv2_losses(self, prediction, gt, frame)

    def decode(self, prediction: MapTRv2Outputs) -> FrameObjects:
        """Decodes lines in the ego frame, best score first, and no boxes."""
        return decode_lines(
            prediction.logits[-1][..., : len(LINE_CLASSES)],
            prediction.points[-1],
            prediction.ego_from_lidar,
            self.config,
        )
