"""BEVFormer (https://arxiv.org/abs/2203.17270), with the published weights and outputs.

Modules are named as in the published checkpoints, so their keys fit after a change of prefixes
(`perception.models.checkpoint`). Coordinate frames and ego motion are described in
`perception.models.published.geometry`. The network predicts yaw in the convention of mmdet3d before 1.0; see
`decode_boxes`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from perception.models.bevformer.config import BEVFormerConfig
from perception.models.bevformer.losses import BOX_LOSS_WEIGHTS, bevformer_losses, encode_lidar_boxes, lidar_boxes
from perception.models.decoding import LOG_UNCERTAINTY_RANGE, empty_lines, topk_pairs
from perception.models.published.backbone import padded_size
from perception.models.published.decoder import LearnedPositionalEncoding, class_branches, regression_branches
from perception.models.published.encoder import BEVFormerTransformer
from perception.models.published.geometry import PREFIXES, can_bus_vector, constants, lidar_projections
from perception.models.published.losses import sum_layers
from perception.ops.deformable import refined
from perception.types import BOX_CLASSES, Boxes, Frame, FrameObjects, State


class BEVFormerHead(nn.Module):
    """BEV encoder and box decoder: image features to encoded boxes. Modules have their published names."""

    def __init__(self, config: BEVFormerConfig) -> None:
        super().__init__()
        self.config = config
        C, layers = config.channels, config.decoder_layers
        self.bev_embedding = nn.Embedding(config.bev[0] * config.bev[1], C)
        self.query_embedding = nn.Embedding(config.queries, 2 * C)
        self.positional_encoding = LearnedPositionalEncoding(config.bev, C)
        self.transformer = BEVFormerTransformer(config, reference_size=3)
        self.cls_branches = class_branches(C, len(BOX_CLASSES), layers)
        self.reg_branches = regression_branches(C, 10, layers)
        # Weights of the published loss; unused here, but the checkpoints hold them.
        self.code_weights = nn.Parameter(torch.tensor([1.0] * 8 + [0.2] * 2), requires_grad=False)

    def forward(
        self,
        features: list[Tensor],
        img_from_lidar: Tensor,
        can_bus: Tensor,
        image_size: tuple[int, int],
        previous: Tensor | None,
        is_first: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predicts boxes; arguments as in `BEVFormerTransformer.encode`.

        Returns:
            Class logits [L, B, Q, K]; boxes [L, B, Q, 10] as (x, y, log width, log length, z, log height, sin, cos, vx,
            vy) in metres and the LiDAR frame; BEV features [B, h * w, C].
        """
        config = self.config
        bev = self.transformer.encode(
            features, self.bev_embedding.weight, self.positional_encoding(), img_from_lidar, can_bus, image_size,
            previous, is_first,
        )  # fmt: skip
        position, query = (x.expand(len(bev), -1, -1) for x in self.query_embedding.weight.chunk(2, -1))
        reference = self.transformer.reference_points(position).float().sigmoid()  # [B, Q, 3]
        low, high = (constants(x, reference) for x in (config.low, config.high))
        all_logits, all_params = [], []
        for layer, classify, regress in zip(
            self.transformer.decoder.layers, self.cls_branches, self.reg_branches, strict=True
        ):
            query = layer(query, position, bev, reference[..., :2], config.bev)
            delta = regress(query).float()
            center = refined(reference, torch.cat([delta[..., :2], delta[..., 4:5]], -1))
            metres = low + center * (high - low)
            all_logits.append(classify(query))
            all_params.append(torch.cat([metres[..., :2], delta[..., 2:4], metres[..., 2:], delta[..., 5:]], -1))
            reference = center.detach()
        return torch.stack(all_logits), torch.stack(all_params), bev


class RawBoxes(NamedTuple):
    """Predictions of all decoder layers, for losses and decoding; see `BEVFormerHead.forward`."""

    logits: Tensor  # [L, B, Q, K]
    params: Tensor  # [L, B, Q, 10]
    ego_from_lidar: Tensor  # [B, 4, 4] of the frame


class BEVFormer(nn.Module):
    """Predicts boxes from calibrated images and the BEV features of the previous frame.

    `Frame.rig` must have the cameras that the network was trained with, in their order.
    """

    finds: ClassVar[tuple[str, ...]] = ("box",)
    loss_weights: ClassVar[Mapping[str, float]] = BOX_LOSS_WEIGHTS
    image_loss = None
    needs_gt: ClassVar[bool] = False
    tracks: ClassVar[bool] = False
    raw_names: ClassVar[tuple[str, ...]] = ("box_logits", "box_params")
    extra_inputs: ClassVar[tuple[str, ...]] = ("ego_from_lidar",)
    no_export: ClassVar[str] = ""
    recomputable: ClassVar[tuple[str, ...]] = ("head.transformer.encoder.layers", "head.transformer.decoder.layers")
    published_prefixes: ClassVar[Mapping[str, str]] = PREFIXES

    def __init__(self, config: BEVFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = config.backbone.build(config.channels)
        self.head = BEVFormerHead(config)

    def initial_state(self, batch_size: int) -> State:
        """Returns zeros as BEV features [B, C, rows along LiDAR y, columns along LiDAR x], for first frames."""
        return State(self.head.bev_embedding.weight.new_zeros(batch_size, self.config.channels, *self.config.bev))

    def forward(self, frame: Frame, state: State) -> tuple[RawBoxes, State]:
        """Predicts the boxes of one frame.

        Args:
            frame: leading [B], images [B, N, 3, H, W] of the configured size.
            state: of the previous frame, or `initial_state`.

        Returns:
            Predictions of all decoder layers, and the state for the next frame.
        """
        image_size = padded_size(frame.images)
        features = self.image_encoder(frame.images)
        img_from_lidar = lidar_projections(frame)
        can_bus = can_bus_vector(frame)
        previous = state.bev.flatten(2).transpose(1, 2)
        logits, params, bev = self.head(features, img_from_lidar, can_bus, image_size, previous, frame.is_first)
        memory = bev.transpose(1, 2).unflatten(2, self.config.bev)  # [B, C, rows, columns]
        return RawBoxes(logits, params, frame.ego_from_lidar.float()), State(
            memory.contiguous()
        )  # in the memory layout of `initial_state`

    def loss(self, prediction: RawBoxes, gt: FrameObjects, frame: Frame) -> dict[str, Tensor]:
        """Computes the weighted losses by name, summed over decoder layers. Boxes outside the range are ignored."""
        boxes = lidar_boxes(gt.boxes, frame.ego_from_lidar)
        low, high = (boxes.new_tensor(x[:2]) for x in (self.config.low, self.config.high))
        inside = ((boxes[..., :2] > low) & (boxes[..., :2] < high)).all(-1)
        targets, valid = encode_lidar_boxes(boxes), gt.boxes.valid & inside
        return sum_layers(bevformer_losses(*prediction[:2], targets, gt.boxes.label, valid))

    def raw_outputs(self, prediction: RawBoxes) -> tuple[Tensor, ...]:
        """Returns class logits and encoded boxes of the last decoder layer, [B, Q, ...]."""
        return prediction.logits[-1], prediction.params[-1]

    def decode(self, prediction: RawBoxes) -> FrameObjects:
        """Decodes boxes in the ego frame, best score first, and no lines."""
        boxes = decode_boxes(*prediction, self.config.max_boxes, self.config.post_center_range)
        return FrameObjects(boxes, empty_lines(len(boxes.score), boxes.score.device))


def topk_boxes(
    logits: Tensor, params: Tensor, count: int, center_range: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decodes the boxes of highest score of one decoder layer, as published.

    Args:
        logits: [B, Q, K].
        params: encoded boxes [B, Q, 10].
        count: number of boxes.
        center_range: least x, y, z, then largest x, y, z of box centres, metres.

    Returns:
        Scores [B, count]; labels [B, count]; boxes [B, count, 9] in the LiDAR frame, metres: x, y, z of the centre,
        width, length, height, yaw in the convention of mmdet3d before 1.0, velocity; valid [B, count] bool: whether the
        centre is within `center_range`. The published decoder drops the other boxes.
    """
    score, query, label = topk_pairs(logits, count)
    query = query[..., None].expand(-1, -1, 10)
    x, y, log_w, log_l, z, log_h, sin, cos, vx, vy = params.gather(1, query).unbind(-1)
    boxes = torch.stack([x, y, z, log_w.exp(), log_l.exp(), log_h.exp(), torch.atan2(sin, cos), vx, vy], -1)
    low, high = (constants(x, boxes) for x in (center_range[:3], center_range[3:]))
    valid = ((boxes[..., :3] >= low) & (boxes[..., :3] <= high)).all(-1)
    return score, label, boxes, valid


def decode_boxes(
    logits: Tensor, params: Tensor, ego_from_lidar: Tensor, count: int, center_range: tuple[float, ...]
) -> Boxes:
    """Decodes the boxes of the last decoder layer into the ego frame.

    Args:
        logits: [L, B, Q, K].
        params: encoded boxes [L, B, Q, 10].
        ego_from_lidar: [B, 4, 4].
        count, center_range: as in `topk_boxes`.
    """
    score, label, boxes, valid = topk_boxes(logits[-1].float(), params[-1].float(), count, center_range)
    lidar_from_ego = ego_from_lidar[:, :3, :3].mT  # its rotation
    center = boxes[..., :3] @ lidar_from_ego + ego_from_lidar[:, None, :3, 3]
    # mmdet3d before 1.0 measures yaw clockwise from -y; the length of a box is along its heading.
    heading = -boxes[..., 6] - math.pi / 2
    axis = torch.stack([heading.cos(), heading.sin()], -1) @ lidar_from_ego[:, :2, :2]
    width, length, height = boxes[..., 3:6].unbind(-1)
    return Boxes(
        center=center,
        size=torch.stack([length, width, height], -1),
        yaw=torch.atan2(axis[..., 1], axis[..., 0]),
        velocity=boxes[..., 7:] @ lidar_from_ego[:, :2, :2],
        label=label,
        attribute=torch.full_like(label, -1),
        score=score,
        valid=valid,
        uncertainty=torch.full((*score.shape, 9), math.exp(LOG_UNCERTAINTY_RANGE[1]), device=score.device),
    )
