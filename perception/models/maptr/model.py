"""MapTR (https://arxiv.org/abs/2208.14437) with BEVFormer's map encoder, faithful enough to run the published weights.

Modules are named as in the checkpoints and the network lives in the frame of LIDAR_TOP (see
`perception.models.published.geometry`). It sees each frame by itself: there is no memory, and the vector of the CAN bus
is that of a first frame.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from perception.models.decoding import LOG_UNCERTAINTY_RANGE, close_rings, empty_boxes, topk_pairs
from perception.models.maptr.config import MapTRConfig
from perception.models.maptr.losses import LINE_LOSS_WEIGHTS, line_losses
from perception.models.published.backbone import padded_size
from perception.models.published.encoder import (
    BEVFormerEncoder,
    DecoderLayer,
    LearnedPosition,
    branch,
    start_matrices,
)
from perception.models.published.geometry import PREFIXES, can_bus, constants, rig_from_lidar
from perception.ops.deformable import refined
from perception.types import LINE_CLASSES, Frame, FrameObjects, Polylines, State


class MapTRHead(nn.Module):
    """From features to raw lines; the modules and their names are the published ones."""

    def __init__(self, config: MapTRConfig) -> None:
        super().__init__()
        self.config = config
        C = config.channels
        self.bev_embedding = nn.Embedding(config.bev[0] * config.bev[1], C)
        self.instance_embedding = nn.Embedding(config.lines, 2 * C)
        self.pts_embedding = nn.Embedding(config.line_points, 2 * C)
        self.positional_encoding = LearnedPosition(config.bev, C)
        self.transformer = BEVFormerEncoder(config)
        self.transformer.reference_points = nn.Linear(C, 2)
        self.transformer.decoder = nn.Module()
        self.transformer.decoder.layers = nn.ModuleList(
            [DecoderLayer(C, config.heads, config.points, config.feed_forward) for _ in range(config.decoder_layers)]
        )
        start_matrices(self.transformer)
        self.cls_branches = nn.ModuleList(
            [branch(C, len(LINE_CLASSES), norm=True) for _ in range(config.decoder_layers)]
        )
        self.reg_branches = nn.ModuleList([branch(C, 2, norm=False) for _ in range(config.decoder_layers)])
        for classify in self.cls_branches:
            nn.init.constant_(classify[-1].bias, -math.log(99))
        # Weights of the published loss; kept because the checkpoints hold them.
        self.code_weights = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(
        self, features: list[Tensor], img_from_lidar: Tensor, bus: Tensor, image_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Raw lines of all layers, and the map; arguments as in `BEVFormerEncoder.encode`.

        Returns:
            logits [L, B, Q, K]; points [L, B, Q, P, 2], x and y in 0..1 over the range; the map [B, h * w, C].
        """
        config = self.config
        bev = self.transformer.encode(
            features, self.bev_embedding.weight, self.positional_encoding(), img_from_lidar, bus, image_size, None
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
    """What `MapTRHead` returns, for the losses."""

    logits: Tensor  # [L, B, Q, K]
    points: Tensor  # [L, B, Q, P, 2] x and y in 0..1 over the range


class MapTR(nn.Module):
    """Calibrated images in, raw lines out. `Frame.rig` must have the cameras that the network was trained with."""

    finds = ("line",)
    loss_weights = LINE_LOSS_WEIGHTS
    image_loss = None
    raw_names = ("line_logits", "line_points")
    no_export = ""
    published_prefixes = PREFIXES

    def __init__(self, config: MapTRConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = config.backbone.build(config.channels)
        self.head = MapTRHead(config)
        self.register_buffer("ego_from_lidar", torch.tensor(config.ego_from_lidar), persistent=False)

    def initial_state(self, batch_size: int) -> State:
        """Nothing: the network has no memory."""
        return State(self.ego_from_lidar.new_zeros(batch_size, 0, 1, 1))

    def forward(self, frame: Frame, state: State) -> tuple[RawLines, State]:
        """One frame.

        Args:
            frame: leading [B], with images [B, N, 3, H, W] of the configured size.
            state: handed back as it is.

        Returns:
            Logits and points of all layers as `MapTRHead` gives them, and the state.
        """
        image_size = padded_size(frame.images)
        bus = can_bus(frame._replace(is_first=torch.ones_like(frame.is_first)))
        features = self.image_encoder(frame.images)
        logits, points, _ = self.head(features, rig_from_lidar(frame, self.ego_from_lidar), bus, image_size)
        return RawLines(logits, points), state

    def loss(self, prediction: RawLines, gt: FrameObjects, frame: Frame) -> dict[str, Tensor]:
        """Weighted losses by name, added up over the layers."""
        return line_losses(prediction.logits, prediction.points, gt, self.ego_from_lidar, self.config)

    def raw_outputs(self, prediction: RawLines) -> tuple[Tensor, ...]:
        """Logits and points of the last layer, [B, Q, ...]."""
        return prediction.logits[-1], prediction.points[-1]

    def decode(self, prediction: RawLines) -> FrameObjects:
        """The best lines in the ego frame, best first; there are no boxes."""
        return decode_lines(prediction.logits[-1], prediction.points[-1], self.ego_from_lidar, self.config)


def decode_lines(logits: Tensor, points: Tensor, ego_from_lidar: Tensor, config: MapTRConfig) -> FrameObjects:
    """The best lines of one layer [B, Q, ...] as a FrameObjects in the ego frame, best first."""
    score, label, points = best_lines(logits.float(), points.float(), config.low, config.high, config.max_lines)
    points = points @ ego_from_lidar[:2, :2].T + ego_from_lidar[:2, 3]
    uncertainty = torch.full_like(points, math.exp(LOG_UNCERTAINTY_RANGE[1]))
    points, uncertainty, closed = close_rings(points, uncertainty)
    lines = Polylines(points, closed, label, score, torch.ones_like(closed), uncertainty)
    return FrameObjects(empty_boxes(len(score), score.device), lines)


def best_lines(
    logits: Tensor, points: Tensor, low: tuple[float, ...], high: tuple[float, ...], count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The published decoding of one layer [B, Q, ...]: scores, labels and points of the best (query, class) pairs.

    Returns:
        scores [B, count], labels [B, count], points [B, count, P, 2] in metres, LiDAR's frame.
    """
    score, row, label = topk_pairs(logits, count)
    row = row[..., None, None].expand(-1, -1, *points.shape[2:])
    start, end = (constants(x[:2], points) for x in (low, high))
    return score, label, start + points.gather(1, row) * (end - start)
