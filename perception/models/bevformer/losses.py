"""Matching and losses of BEVFormer as published (https://arxiv.org/abs/2203.17270).

They differ from `perception.models.bev_transformer.losses`. Boxes are compared in the published encoding, with a small
weight on velocities. A box of unknown velocity has a classification loss only. Losses of all decoder layers add up.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from perception.matching import Match, focal_cost, hungarian
from perception.models.published.losses import class_loss
from perception.types import Boxes

BOX_CODE_WEIGHTS = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2)
# As published; gradients are clipped, so the absolute size of the loss matters.
BOX_LOSS_WEIGHTS = {"box_class": 2.0, "box_params": 0.25}


def lidar_boxes(boxes: Boxes, ego_from_lidar: Tensor) -> Tensor:
    """Converts boxes to the convention of the published code; the inverse of `bevformer.model.decode_boxes`.

    Args:
        boxes: [B, M] in the ego frame.
        ego_from_lidar: [B, 4, 4].

    Returns:
        [B, M, 9] in the LiDAR frame, metres: x, y, z of the centre, width, length, height, yaw in the convention of
        mmdet3d before 1.0, velocity.
    """
    rotation = ego_from_lidar[:, :3, :3]
    center = (boxes.center - ego_from_lidar[:, None, :3, 3]) @ rotation
    axis = torch.stack([boxes.yaw.cos(), boxes.yaw.sin()], -1) @ rotation[:, :2, :2]
    yaw = -torch.atan2(axis[..., 1], axis[..., 0]) - math.pi / 2
    return torch.cat([center, boxes.size[..., [1, 0, 2]], yaw[..., None], boxes.velocity @ rotation[:, :2, :2]], -1)


def encode_lidar_boxes(boxes: Tensor) -> Tensor:
    """Encodes boxes [..., 9] of `lidar_boxes` as [..., 10]: x, y, log w, log l, z, log h, sin, cos, velocity."""
    x, y, z, w, l, h, yaw, vx, vy = boxes.unbind(-1)
    w, l, h = (side.clamp(min=1e-2).log() for side in (w, l, h))
    return torch.stack([x, y, w, l, z, h, yaw.sin(), yaw.cos(), vx, vy], -1)


def match_boxes(logits: Tensor, params: Tensor, targets: Tensor, label: Tensor, valid: Tensor) -> tuple[Match, Tensor]:
    """Matches the queries of one decoder layer to the ground truth, as published.

    Args:
        logits: [B, Q, K].
        params: encoded boxes [B, Q, 10].
        targets: ground truth [B, M, 10] from `encode_lidar_boxes`.
        label: [B, M].
        valid: [B, M] bool.

    Returns:
        The match, and its cost [B, Q, M].
    """
    with torch.no_grad():
        cost = BOX_LOSS_WEIGHTS["box_class"] * focal_cost(logits, label)
        distance = torch.cdist(params[..., :8], targets[..., :8], p=1)
        cost = cost + BOX_LOSS_WEIGHTS["box_params"] * distance
        return hungarian(cost, valid), cost


def bevformer_losses(
    logits: Tensor, params: Tensor, targets: Tensor, label: Tensor, valid: Tensor
) -> list[dict[str, Tensor]]:
    """Computes the weighted losses of each decoder layer.

    Args:
        logits: [L, B, Q, K].
        params: encoded boxes [L, B, Q, 10].
        targets, label, valid: ground truth as in `match_boxes`.

    Returns:
        Scalars by name for each layer; names as in `BOX_LOSS_WEIGHTS`.
    """
    losses = []
    for layer_logits, layer_params in zip(logits, params, strict=True):
        match, _ = match_boxes(layer_logits, layer_params, targets, label, valid)
        target = targets[match.batch, match.target]
        finite = target.isfinite().all(-1)  # as published, a box with an unknown value has no regression loss
        error = (layer_params[match.batch, match.query] - target)[finite].abs()
        box_params = (error * error.new_tensor(BOX_CODE_WEIGHTS)).sum() / max(len(match.query), 1)
        losses.append({"box_class": class_loss(layer_logits, label, match), "box_params": box_params})
    return [{name: BOX_LOSS_WEIGHTS[name] * loss for name, loss in layer.items()} for layer in losses]
