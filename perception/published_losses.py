"""Matching and losses of BEVFormer and MapTR as they were published, for training these networks.

They differ from `perception.losses` in what is compared: boxes as the published networks encode them, with little
weight on velocities, and a box whose velocity is not known teaches nothing but its class; lines in shares of their
range, and rings in one direction only. Losses add up over the decoder layers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from perception.losses import Match, focal_cost, focal_loss, hungarian, line_orderings
from perception.models.bevformer import BEVFormer, RawBoxes
from perception.models.maptr import MapTR, RawLines
from perception.types import Boxes, Polylines, Scene

BOX_CODE_WEIGHTS = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2)
# The total, and so the size of a gradient that is clipped, is as published.
BOX_LOSS_WEIGHTS = {"box_class": 2.0, "box_params": 0.25}
LINE_LOSS_WEIGHTS = {"line_class": 2.0, "line_points": 5.0, "line_direction": 0.005}


def lidar_boxes(boxes: Boxes, ego_from_lidar: Tensor) -> Tensor:
    """Boxes in the convention of the published code, the way back from `perception.models.bevformer.decode_boxes`.

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
    """Weighted losses of each layer of raw boxes [L, B, Q, ...]; the truth as in `match_boxes`."""
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


def published_orderings(lines: Polylines) -> tuple[Tensor, Tensor]:
    """Orderings that MapTR takes for equal: open lines both ways, rings one way.

    The published code starts a ring at each vertex of its map polygon; here it starts at each of its points.

    Args:
        lines: [B, M] lines of P points.

    Returns:
        points [B, M, P, P, 2] (the last is an open line walked backwards), exists [B, M, P] bool.
    """
    P = lines.points.shape[-2]
    points, exists = line_orderings(lines)  # rings first one way from each point, then the other
    exists = exists[:, :, :P].clone()
    exists[..., -1] &= ~lines.closed
    return points[:, :, :P], exists


def match_lines(
    logits: Tensor, points: Tensor, shares: Tensor, exists: Tensor, label: Tensor, valid: Tensor
) -> tuple[Match, Tensor]:
    """The published assignment of one layer.

    Args:
        logits: [B, Q, K]; points: [B, Q, P, 2] in 0..1.
        shares: the truth [B, M, O, P, 2] in 0..1, in O orderings; exists: [B, M, O]; label, valid: [B, M].

    Returns:
        The match, and which ordering fits each pair best, [B, Q, M].
    """
    with torch.no_grad():
        M, O = exists.shape[1:]
        distance = torch.cdist(points.float().flatten(2), shares.flatten(3).flatten(1, 2), p=1).unflatten(2, (M, O))
        distance, best = distance.masked_fill(~exists[:, None], math.inf).min(-1)  # [B, Q, M]
        cost = LINE_LOSS_WEIGHTS["line_class"] * focal_cost(logits, label)
        cost = cost + LINE_LOSS_WEIGHTS["line_points"] * distance.nan_to_num(posinf=0.0)  # padding has no ordering
        return hungarian(cost, valid), best


def maptr_losses(
    logits: Tensor,
    points: Tensor,
    orderings: Tensor,
    exists: Tensor,
    label: Tensor,
    valid: Tensor,
    low: tuple[float, ...],
    high: tuple[float, ...],
) -> list[dict[str, Tensor]]:
    """Weighted losses of each layer of raw lines.

    Args:
        logits: [L, B, Q, K]; points: [L, B, Q, P, 2] in 0..1 over the range.
        orderings: the truth [B, M, O, P, 2] in metres, in the frame of the range, and which of its orderings exist
            [B, M, O], as `published_orderings` gives them; label, valid: [B, M].
        low, high: ends of the range in metres, x and y first.
    """
    start, end = (points.new_tensor(x[:2]) for x in (low, high))
    extent = end - start
    shares = (orderings - start) / extent  # [B, M, O, P, 2]
    losses = []
    for one_logits, one_points in zip(logits, points, strict=True):
        match, best = match_lines(one_logits, one_points, shares, exists, label, valid)
        count = max(len(match.query), 1)
        wanted = torch.zeros_like(one_logits)
        wanted[match.batch, match.query, label[match.batch, match.target]] = 1.0
        ordering = best[match.batch, match.query, match.target]
        target = orderings[match.batch, match.target, ordering]  # [pairs, P, 2] metres
        found = one_points[match.batch, match.query]
        cosine = F.cosine_similarity((found * extent).diff(dim=1), target.diff(dim=1), dim=-1)
        losses.append(
            {
                "line_class": focal_loss(one_logits, wanted).sum() / count,
                "line_points": (found - (target - start) / extent).abs().sum() / count,
                "line_direction": (1 - cosine).sum() / count,
            }
        )
    return [{name: LINE_LOSS_WEIGHTS[name] * loss for name, loss in layer.items()} for layer in losses]


def losses_of(network: BEVFormer | MapTR, prediction: RawBoxes | RawLines, truth: Scene) -> dict[str, Tensor]:
    """Weighted losses of one moment, added up over the layers.

    Args:
        network: says in which frame and range its outputs are.
        prediction: of its `forward`, leading [L, B].
        truth: leading [B], in the ego frame.
    """
    config, ego_from_lidar = network.config, network.ego_from_lidar
    if isinstance(network, BEVFormer):
        boxes = lidar_boxes(truth.boxes, ego_from_lidar)
        low, high = (boxes.new_tensor(x[:2]) for x in (config.low, config.high))
        inside = ((boxes[..., :2] > low) & (boxes[..., :2] < high)).all(-1)
        layers = bevformer_losses(*prediction, encode_lidar_boxes(boxes), truth.boxes.label, truth.boxes.valid & inside)
    else:
        lines = truth.lines._replace(points=(truth.lines.points - ego_from_lidar[:2, 3]) @ ego_from_lidar[:2, :2])
        orderings, exists = published_orderings(lines)
        layers = maptr_losses(*prediction, orderings, exists, lines.label, lines.valid, config.low, config.high)
    return {name: torch.stack([layer[name] for layer in layers]).sum() for name in layers[0]}
