"""Matching and losses of BEVFormer, MapTR and MapTRv2 as they were published, for training these networks.

They differ from `perception.models.bev_transformer.losses` in what is compared: boxes as the published networks encode
them, with little weight on velocities, and a box whose velocity is not known teaches nothing but its class; lines in
shares of their range, and rings in one direction only. Losses add up over the decoder layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from perception.matching import Match, focal_cost, focal_loss, hungarian
from perception.types import Boxes

BOX_CODE_WEIGHTS = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2)
# The total, and so the size of a gradient that is clipped, is as published.
BOX_LOSS_WEIGHTS = {"box_class": 2.0, "box_params": 0.25}


def lidar_boxes(boxes: Boxes, ego_from_lidar: Tensor) -> Tensor:
    """Boxes in the convention of the published code, the way back from
    `perception.models.bevformer.model.decode_boxes`.

    Args:
        boxes: [B, M] in the ego frame.
        ego_from_lidar: [4, 4].

    Returns:
        [B, M, 9]: x, y, z of the centre, width, length, height, yaw of mmdet3d before 1.0, velocity; LiDAR's frame.
    """
    turn = ego_from_lidar[:3, :3]
    center = (boxes.center - ego_from_lidar[:3, 3]) @ turn
    axis = torch.stack([boxes.yaw.cos(), boxes.yaw.sin()], -1) @ turn[:2, :2]
    yaw = -torch.atan2(axis[..., 1], axis[..., 0]) - math.pi / 2
    return torch.cat([center, boxes.size[..., [1, 0, 2]], yaw[..., None], boxes.velocity @ turn[:2, :2]], -1)


def encode_lidar_boxes(boxes: Tensor) -> Tensor:
    """Boxes [..., 9] of `lidar_boxes` as the parameters [..., 10] x, y, log w, log l, z, log h, sin, cos, v."""
    x, y, z, w, l, h, yaw, vx, vy = boxes.unbind(-1)
    w, l, h = (side.clamp(min=1e-2).log() for side in (w, l, h))
    return torch.stack([x, y, w, l, z, h, yaw.sin(), yaw.cos(), vx, vy], -1)


def match_boxes(logits: Tensor, params: Tensor, targets: Tensor, label: Tensor, valid: Tensor) -> tuple[Match, Tensor]:
    """The published assignment of one layer.

    Args:
        logits: [B, Q, K]; params: [B, Q, 10].
        targets: [B, M, 10] from `encode_lidar_boxes`; label, valid: [B, M].

    Returns:
        The match, and the cost [B, Q, M] that it comes from.
    """
    with torch.no_grad():
        cost = BOX_LOSS_WEIGHTS["box_class"] * focal_cost(logits, label)
        distance = torch.cdist(params[..., :8], targets[..., :8], p=1)
        cost = cost + BOX_LOSS_WEIGHTS["box_params"] * distance
        return hungarian(cost, valid), cost


def bevformer_losses(
    logits: Tensor, params: Tensor, targets: Tensor, label: Tensor, valid: Tensor
) -> list[dict[str, Tensor]]:
    """Weighted losses of each layer of raw boxes [L, B, Q, ...]; the ground truth as in `match_boxes`."""
    losses = []
    for one_logits, one_params in zip(logits, params, strict=True):
        match, _ = match_boxes(one_logits, one_params, targets, label, valid)
        count = max(len(match.query), 1)
        wanted = torch.zeros_like(one_logits)
        wanted[match.batch, match.query, label[match.batch, match.target]] = 1.0
        target = targets[match.batch, match.target]
        known = target.isfinite().all(-1)  # what is not known of a box, leaves all of it out
        difference = (one_params[match.batch, match.query] - target)[known].abs()
        losses.append(
            {
                "box_class": focal_loss(one_logits, wanted).sum() / count,
                "box_params": (difference * difference.new_tensor(BOX_CODE_WEIGHTS)).sum() / count,
            }
        )
    return [{name: BOX_LOSS_WEIGHTS[name] * loss for name, loss in layer.items()} for layer in losses]
