"""MapTR (https://arxiv.org/abs/2208.14437) on BEVFormer's BEV encoder, with the published weights and outputs.

Modules are named as in the published checkpoints. Coordinate frames are described in
`perception.models.published.geometry`. The network has no memory: every frame is encoded as a first frame.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from perception.models.decoding import LOG_UNCERTAINTY_RANGE, close_rings, empty_boxes, topk_pairs
from perception.models.maptr.config import MapTRConfig
from perception.models.maptr.losses import LINE_LOSS_WEIGHTS, line_losses
from perception.models.published.backbone import padded_size
from perception.models.published.decoder import LearnedPositionalEncoding, class_branches, regression_branches
from perception.models.published.encoder import BEVFormerTransformer
from perception.models.published.geometry import PREFIXES, can_bus_vector, constants, lidar_level, lidar_projections
from perception.ops.deformable import refined
from perception.types import LINE_CLASSES, Frame, FrameObjects, Polylines, State


class MapTRHead(nn.Module):
    """BEV encoder and line decoder: image features to line points. Modules have their published names."""

    def __init__(self, config: MapTRConfig) -> None:
        super().__init__()
        self.config = config
        C, layers = config.channels, config.decoder_layers
        self.bev_embedding = nn.Embedding(config.bev[0] * config.bev[1], C)
        self.instance_embedding = nn.Embedding(config.lines, 2 * C)
        self.pts_embedding = nn.Embedding(config.line_points, 2 * C)
        self.positional_encoding = LearnedPositionalEncoding(config.bev, C)
        self.transformer = BEVFormerTransformer(config, reference_size=2)
        self.cls_branches = class_branches(C, len(LINE_CLASSES), layers)
        self.reg_branches = regression_branches(C, 2, layers)
        # Weights of the published loss; unused here, but the checkpoints hold them.
        self.code_weights = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(
        self, features: list[Tensor], img_from_lidar: Tensor, can_bus: Tensor, image_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predicts lines; arguments as in `BEVFormerTransformer.encode`.

        Returns:
            Class logits [L, B, Q, K]; points [L, B, Q, P, 2], x and y normalised to 0..1 over the range; BEV features
            [B, h * w, C].
        """
        config = self.config
        bev = self.transformer.encode(
            features, self.bev_embedding.weight, self.positional_encoding(), img_from_lidar, can_bus, image_size, None
        )
        shape = (config.lines, config.line_points)
        embedding = (self.instance_embedding.weight[:, None] + self.pts_embedding.weight).flatten(0, 1)
        position, query = (x.expand(len(bev), -1, -1) for x in embedding.chunk(2, -1))  # [B, Q * P, C]
        reference = self.transformer.reference_points(position).float().sigmoid()
        all_logits, all_points = [], []
        for layer, classify, regress in zip(
            self.transformer.decoder.layers, self.cls_branches, self.reg_branches, strict=True
        ):
            query = layer(query, position, bev, reference, config.bev)
            points = refined(reference, regress(query))
            all_logits.append(classify(query.unflatten(1, shape).mean(2)))
            all_points.append(points.unflatten(1, shape))
            reference = points.detach()
        return torch.stack(all_logits), torch.stack(all_points), bev


class RawLines(NamedTuple):
    """Predictions of all decoder layers, for losses and decoding."""

    logits: Tensor  # [L, B, Q, K]
    points: Tensor  # [L, B, Q, P, 2], x and y normalised to 0..1 over the range
    ego_from_lidar: Tensor  # [B, 4, 4] of the frame


class LineNetwork(nn.Module):
    """What MapTR, MapTRv2 and MapQR share: they predict the lines of each frame alone, in the LiDAR frame.

    Args:
        config: of the network.
        head: what follows the image encoder.
    """

    finds: ClassVar[tuple[str, ...]] = ("line",)
    image_loss = None
    needs_gt: ClassVar[bool] = False
    tracks: ClassVar[bool] = False
    raw_names: ClassVar[tuple[str, ...]] = ("line_logits", "line_points")
    extra_inputs: ClassVar[tuple[str, ...]] = ("ego_from_lidar",)
    no_export: ClassVar[str] = ""
    recomputable: ClassVar[tuple[str, ...]] = ("head.transformer.encoder.layers", "head.transformer.decoder.layers")
    published_prefixes: ClassVar[Mapping[str, str]] = PREFIXES

    def __init__(self, config: MapTRConfig, head: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = config.backbone.build(config.channels)
        self.head = head

    def initial_state(self, batch_size: int) -> State:
        """Returns an empty state: the network has no memory."""
        return State(next(self.parameters()).new_zeros(batch_size, 0, 1, 1))

    def raw_outputs(self, prediction: Any) -> tuple[Tensor, ...]:
        """Returns class logits and normalised points of the last decoder layer, [B, Q, ...]."""
        return prediction.logits[-1], prediction.points[-1]

    def decode(self, prediction: Any) -> FrameObjects:
        """Decodes lines in the ego frame, best score first, and no boxes."""
        return decode_lines(prediction.logits[-1], prediction.points[-1], prediction.ego_from_lidar, self.config)


class MapTR(LineNetwork):
    """Predicts lines from calibrated images.

    `Frame.rig` must have the cameras that the network was trained with, in their order.
    """

    loss_weights: ClassVar[Mapping[str, float]] = LINE_LOSS_WEIGHTS
    config: MapTRConfig
    head: MapTRHead

    def __init__(self, config: MapTRConfig) -> None:
        super().__init__(config, MapTRHead(config))

    def forward(self, frame: Frame, state: State) -> tuple[RawLines, State]:
        """Predicts the lines of one frame.

        Args:
            frame: leading [B], images [B, N, 3, H, W] of the configured size.
            state: returned unchanged.

        Returns:
            Predictions of all decoder layers, and the state.
        """
        image_size = padded_size(frame.images)
        can_bus = can_bus_vector(frame._replace(is_first=torch.ones_like(frame.is_first)))
        features = self.image_encoder(frame.images)
        img_from_lidar = lidar_projections(frame)
        logits, points, _ = self.head(features, img_from_lidar, can_bus, image_size)
        return RawLines(logits, points, frame.ego_from_lidar.float()), state

    def loss(self, prediction: RawLines, gt: FrameObjects, frame: Frame) -> dict[str, Tensor]:
        """Computes the weighted losses by name, summed over decoder layers."""
        return line_losses(prediction.logits, prediction.points, gt, frame.ego_from_lidar, self.config)


def decode_lines(logits: Tensor, points: Tensor, ego_from_lidar: Tensor, config: MapTRConfig) -> FrameObjects:
    """Decodes the lines of one decoder layer into the ego frame, best score first.

    Args:
        logits: [B, Q, K].
        points: [B, Q, P, 2], normalised to 0..1 over the range.
        ego_from_lidar: [B, 4, 4].
        config: the range and the number of lines.
    """
    score, label, points = topk_lines(logits.float(), points.float(), config.low, config.high, config.max_lines)
    rotation, translation = lidar_level(ego_from_lidar)
    points = points @ rotation[:, None].mT + translation[:, None, None]
    uncertainty = torch.full_like(points, math.exp(LOG_UNCERTAINTY_RANGE[1]))
    points, uncertainty, closed = close_rings(points, uncertainty)
    lines = Polylines(points, closed, label, score, torch.ones_like(closed), uncertainty)
    return FrameObjects(empty_boxes(len(score), score.device), lines)


def topk_lines(
    logits: Tensor, points: Tensor, low: tuple[float, ...], high: tuple[float, ...], count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Decodes the lines of highest score of one decoder layer, as published.

    Args:
        logits: [B, Q, K].
        points: [B, Q, P, 2], normalised to 0..1 over the range.
        low, high: least and largest x and y of the range in metres; further entries are ignored.
        count: number of lines.

    Returns:
        Scores [B, count]; labels [B, count]; points [B, count, P, 2] in the LiDAR frame, metres.
    """
    score, query, label = topk_pairs(logits, count)
    query = query[..., None, None].expand(-1, -1, *points.shape[2:])
    start, end = (constants(x[:2], points) for x in (low, high))
    return score, label, start + points.gather(1, query) * (end - start)
