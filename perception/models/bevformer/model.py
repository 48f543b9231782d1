"""BEVFormer (https://arxiv.org/abs/2203.17270), faithful enough to run the published weights.

Modules are named as the published checkpoints name them, so a file of official keys loads after taking away prefixes
(`perception.models.checkpoint`). The quirks of frames and memory are told in `perception.models.published.geometry`;
yaw leaves the network as `-yaw - pi / 2` (`decode_boxes`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from perception.models.bevformer.config import BEVFormerConfig
from perception.models.bevformer.losses import BOX_LOSS_WEIGHTS, bevformer_losses, encode_lidar_boxes, lidar_boxes
from perception.models.decoding import LOG_UNCERTAINTY_RANGE, empty_lines, topk_pairs
from perception.models.published.backbone import padded_size
from perception.models.published.encoder import (
    BEVFormerEncoder,
    DecoderLayer,
    LearnedPosition,
    branch,
    start_matrices,
)
from perception.models.published.geometry import PREFIXES, can_bus, constants, rig_from_lidar
from perception.models.published.losses import sum_layers
from perception.ops.deformable import refined
from perception.types import BOX_CLASSES, Boxes, Frame, FrameObjects, State


class BEVFormerHead(nn.Module):
    """From features to raw boxes; the modules and their names are the published ones."""

    def __init__(self, config: BEVFormerConfig) -> None:
        super().__init__()
        self.config = config
        C, K = config.channels, len(BOX_CLASSES)
        self.bev_embedding = nn.Embedding(config.bev[0] * config.bev[1], C)
        self.query_embedding = nn.Embedding(config.queries, 2 * C)
        self.positional_encoding = LearnedPosition(config.bev, C)
        self.transformer = BEVFormerEncoder(config)
        self.transformer.reference_points = nn.Linear(C, 3)
        self.transformer.decoder = nn.Module()
        self.transformer.decoder.layers = nn.ModuleList(
            [DecoderLayer(C, config.heads, config.points, config.feed_forward) for _ in range(config.decoder_layers)]
        )
        start_matrices(self.transformer)
        self.cls_branches = nn.ModuleList([branch(C, K, norm=True) for _ in range(config.decoder_layers)])
        self.reg_branches = nn.ModuleList([branch(C, 10, norm=False) for _ in range(config.decoder_layers)])
        for classify in self.cls_branches:
            nn.init.constant_(classify[-1].bias, -math.log(99))
        # Weights of the published loss; kept because the checkpoints hold them.
        self.code_weights = nn.Parameter(torch.tensor([1.0] * 8 + [0.2] * 2), requires_grad=False)

    def forward(
        self,
        features: list[Tensor],
        img_from_lidar: Tensor,
        bus: Tensor,
        image_size: tuple[int, int],
        previous: Tensor | None,
        is_first: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Raw boxes of all layers, and the map; arguments as in `BEVFormerEncoder.encode`.

        Returns:
            logits [L, B, Q, K]; params [L, B, Q, 10] as (x, y, log width, log length, z, log height, sin, cos, vx, vy),
            metres; the map [B, h * w, C].
        """
        config = self.config
        bev = self.transformer.encode(
            features, self.bev_embedding.weight, self.positional_encoding(), img_from_lidar, bus, image_size, previous,
            is_first,
        )  # fmt: skip
        position, query = (x.expand(len(bev), -1, -1) for x in self.query_embedding.weight.chunk(2, -1))
        reference = self.transformer.reference_points(position).float().sigmoid()  # [B, Q, 3]
        low, high = (constants(x, reference) for x in (config.low, config.high))
        all_logits, all_params = [], []
        for layer, classify, regress in zip(
            self.transformer.decoder.layers, self.cls_branches, self.reg_branches, strict=True
        ):
            query = layer(query, position, bev, reference[..., :2], config.bev)
            change = regress(query).float()
            center = refined(reference, torch.cat([change[..., :2], change[..., 4:5]], -1))
            metres = low + center * (high - low)
            all_logits.append(classify(query))
            all_params.append(torch.cat([metres[..., :2], change[..., 2:4], metres[..., 2:], change[..., 5:]], -1))
            reference = center.detach()
        return torch.stack(all_logits), torch.stack(all_params), bev


class RawBoxes(NamedTuple):
    """What `BEVFormerHead` returns, for the losses."""

    logits: Tensor  # [L, B, Q, K]
    params: Tensor  # [L, B, Q, 10]


class BEVFormer(nn.Module):
    """Calibrated images in, raw boxes out, with the map of the previous frame passed in and out.

    `Frame.rig` must have as many cameras as the network was trained with, in their order.
    """

    finds = ("box",)
    loss_weights = BOX_LOSS_WEIGHTS
    image_loss = None
    raw_names = ("box_logits", "box_params")
    no_export = ""
    published_prefixes = PREFIXES

    def __init__(self, config: BEVFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = config.backbone.build(config.channels)
        self.head = BEVFormerHead(config)
        self.register_buffer("ego_from_lidar", torch.tensor(config.ego_from_lidar), persistent=False)

    def initial_state(self, batch_size: int) -> State:
        """The memory of a network that has seen nothing; the layout is [B, C, rows along LiDAR y, columns along x]."""
        return State(self.head.bev_embedding.weight.new_zeros(batch_size, self.config.channels, *self.config.bev))

    def forward(self, frame: Frame, state: State) -> tuple[RawBoxes, State]:
        """One frame.

        Args:
            frame: leading [B], with images [B, N, 3, H, W] of the configured size.
            state: what the previous call returned, or `initial_state`.

        Returns:
            Logits and parameters of all layers as `BEVFormerHead` gives them, and the memory for the next call.
        """
        image_size = padded_size(frame.images)
        features = self.image_encoder(frame.images)
        img_from_lidar = rig_from_lidar(frame, self.ego_from_lidar)
        bus = can_bus(frame)
        previous = state.bev.flatten(2).transpose(1, 2)
        logits, params, bev = self.head(features, img_from_lidar, bus, image_size, previous, frame.is_first)
        memory = bev.transpose(1, 2).unflatten(2, self.config.bev)  # [B, C, rows, columns]
        return RawBoxes(logits, params), State(memory.contiguous())  # in the layout of `initial_state`

    def loss(self, prediction: RawBoxes, gt: FrameObjects, frame: Frame) -> dict[str, Tensor]:
        """Weighted losses by name, added up over the layers; boxes outside the range teach nothing."""
        boxes = lidar_boxes(gt.boxes, self.ego_from_lidar)
        low, high = (boxes.new_tensor(x[:2]) for x in (self.config.low, self.config.high))
        inside = ((boxes[..., :2] > low) & (boxes[..., :2] < high)).all(-1)
        targets, valid = encode_lidar_boxes(boxes), gt.boxes.valid & inside
        return sum_layers(bevformer_losses(*prediction, targets, gt.boxes.label, valid))

    def raw_outputs(self, prediction: RawBoxes) -> tuple[Tensor, ...]:
        """Logits and parameters of the last layer, [B, Q, ...]."""
        return prediction.logits[-1], prediction.params[-1]

    def decode(self, prediction: RawBoxes) -> FrameObjects:
        """The best boxes in the ego frame, best first; there are no lines."""
        boxes = decode_boxes(*prediction, self.ego_from_lidar, self.config.max_boxes, self.config.post_center_range)
        return FrameObjects(boxes, empty_lines(len(boxes.score), boxes.score.device))


def best_boxes(
    logits: Tensor, params: Tensor, count: int, center_range: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The published decoding of one layer [B, Q, ...]: scores, labels and boxes of the best (query, class) pairs.

    Returns:
        scores [B, count], labels [B, count], boxes [B, count, 9] as x, y, z (centre), width, length, height, yaw in the
        convention of mmdet3d before 1.0, velocity; LiDAR's frame, metres. Then valid [B, count] bool: whether the
        centre lies within `center_range` (least x, y, z, then largest); the published decoder drops the others.
    """
    score, row, label = topk_pairs(logits, count)
    row = row[..., None].expand(-1, -1, 10)
    x, y, log_w, log_l, z, log_h, sin, cos, vx, vy = params.gather(1, row).unbind(-1)
    boxes = torch.stack([x, y, z, log_w.exp(), log_l.exp(), log_h.exp(), torch.atan2(sin, cos), vx, vy], -1)
    low, high = (constants(x, boxes) for x in (center_range[:3], center_range[3:]))
    valid = ((boxes[..., :3] >= low) & (boxes[..., :3] <= high)).all(-1)
    return score, label, boxes, valid


def decode_boxes(
    logits: Tensor, params: Tensor, ego_from_lidar: Tensor, count: int, center_range: tuple[float, ...]
) -> Boxes:
    """The best boxes of the last layer of raw ones [L, B, Q, ...], in the ego frame; see `best_boxes`."""
    score, label, boxes, valid = best_boxes(logits[-1].float(), params[-1].float(), count, center_range)
    turn = ego_from_lidar[:3, :3]
    center = boxes[..., :3] @ turn.T + ego_from_lidar[:3, 3]
    # mmdet3d before 1.0 measured yaw clockwise from -y; the length of a box lies along its heading.
    heading = -boxes[..., 6] - math.pi / 2
    axis = torch.stack([heading.cos(), heading.sin()], -1) @ turn[:2, :2].T
    width, length, height = boxes[..., 3:6].unbind(-1)
    return Boxes(
        center=center,
        size=torch.stack([length, width, height], -1),
        yaw=torch.atan2(axis[..., 1], axis[..., 0]),
        velocity=boxes[..., 7:] @ turn[:2, :2].T,
        label=label,
        attribute=torch.full_like(label, -1),
        score=score,
        valid=valid,
        uncertainty=torch.full((*score.shape, 9), math.exp(LOG_UNCERTAINTY_RANGE[1]), device=score.device),
    )
