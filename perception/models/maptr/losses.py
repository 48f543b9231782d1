"""Matching and losses of MapTR as published (https://arxiv.org/abs/2208.14437).

They differ from `perception.models.bev_transformer.losses`: points are compared after normalisation by the range, and
closed lines in one direction only. Losses of all decoder layers add up.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from perception.matching import Match, focal_cost, hungarian
from perception.models.maptr.config import MapTRConfig
from perception.models.published.geometry import lidar_level
from perception.models.published.losses import class_loss, sum_layers
from perception.targets import line_orderings
from perception.types import FrameObjects, Polylines

LINE_LOSS_WEIGHTS = {"line_class": 2.0, "line_points": 5.0, "line_direction": 0.005}


def published_orderings(lines: Polylines) -> tuple[Tensor, Tensor]:
    """Lists the equivalent point orders of MapTR: both directions of open lines, one direction of closed lines.

    The published code starts closed lines at each vertex of the map's polygon. Here they start at each of their points.

    Args:
        lines: [B, M] lines of P points.

    Returns:
        points [B, M, P, P, 2], the last order reversed; exists [B, M, P] bool.
    """
    P = lines.points.shape[-2]
    points, exists = line_orderings(lines)  # closed lines in one direction from each point, then in the other
    exists = exists[:, :, :P].clone()
    exists[..., -1] &= ~lines.closed
    return points[:, :, :P], exists


def match_lines(
    logits: Tensor, points: Tensor, orderings: Tensor, exists: Tensor, label: Tensor, valid: Tensor
) -> tuple[Match, Tensor]:
    """Matches the queries of one decoder layer to the ground truth, as published.

    Args:
        logits: [B, Q, K].
        points: [B, Q, P, 2], normalised to 0..1 over the range.
        orderings: ground truth [B, M, O, P, 2] in O point orders, normalised like `points`.
        exists: [B, M, O] bool.
        label: [B, M].
        valid: [B, M] bool.

    Returns:
        The match, and the index of the closest point order for each pair [B, Q, M].
    """
    with torch.no_grad():
        M, O = exists.shape[1:]
        distance = torch.cdist(points.float().flatten(2), orderings.flatten(3).flatten(1, 2), p=1).unflatten(2, (M, O))
        distance, closest = distance.masked_fill(~exists[:, None], math.inf).min(-1)  # [B, Q, M]
        cost = LINE_LOSS_WEIGHTS["line_class"] * focal_cost(logits, label)
        cost = cost + LINE_LOSS_WEIGHTS["line_points"] * distance
        return hungarian(cost, valid), closest


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
    """Computes the weighted losses of each decoder layer.

    Args:
        logits: [L, B, Q, K].
        points: [L, B, Q, P, 2], normalised to 0..1 over the range.
        orderings, exists: ground truth [B, M, O, P, 2] in metres, from `published_orderings` in the frame of the range.
        label: [B, M].
        valid: [B, M] bool.
        low, high: least and largest x and y of the range in metres; further entries are ignored.

    Returns:
        Scalars by name for each layer; names as in `LINE_LOSS_WEIGHTS`.
    """
    start, end = (points.new_tensor(x[:2]) for x in (low, high))
    extent = end - start
    normalized = (orderings - start) / extent  # [B, M, O, P, 2]
    losses = []
    for layer_logits, layer_points in zip(logits, points, strict=True):
        match, closest = match_lines(layer_logits, layer_points, normalized, exists, label, valid)
        count = max(len(match.query), 1)
        ordering = closest[match.batch, match.query, match.target]
        target = orderings[match.batch, match.target, ordering]  # [pairs, P, 2] metres
        predicted = layer_points[match.batch, match.query]
        cosine = F.cosine_similarity((predicted * extent).diff(dim=1), target.diff(dim=1), dim=-1)
        losses.append(
            {
                "line_class": class_loss(layer_logits, label, match),
                "line_points": (predicted - (target - start) / extent).abs().sum() / count,
                "line_direction": (1 - cosine).sum() / count,
            }
        )
    return [{name: LINE_LOSS_WEIGHTS[name] * loss for name, loss in layer.items()} for layer in losses]


def lidar_lines(lines: Polylines, ego_from_lidar: Tensor) -> Polylines:
    """Transforms lines [B, M] from the ego frame to the level LiDAR frame, with ego_from_lidar [B, 4, 4]."""
    rotation, translation = lidar_level(ego_from_lidar)
    return lines._replace(points=(lines.points - translation[:, None, None]) @ rotation[:, None])


def line_losses(
    logits: Tensor, points: Tensor, gt: FrameObjects, ego_from_lidar: Tensor, config: MapTRConfig
) -> dict[str, Tensor]:
    """Computes the weighted losses by name, summed over decoder layers.

    Args:
        logits: [L, B, Q, K].
        points: [L, B, Q, P, 2], normalised to 0..1 over the range.
        gt: ground truth [B] in the ego frame.
        ego_from_lidar: [B, 4, 4].
        config: the range.
    """
    lines = lidar_lines(gt.lines, ego_from_lidar)
    return sum_layers(
        maptr_losses(logits, points, *published_orderings(lines), lines.label, lines.valid, config.low, config.high)
    )
