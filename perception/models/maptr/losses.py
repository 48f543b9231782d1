"""Matching and losses of MapTR as published (https://arxiv.org/abs/2208.14437)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from perception.models.published.losses import sum_layers
from perception.types import FrameObjects

if TYPE_CHECKING:
    from perception.models.maptr.config import MapTRConfig

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from perception.matching import Match, focal_cost, focal_loss, hungarian
from perception.models.maptr.config import MapTRConfig
from perception.targets import line_orderings
from perception.types import Polylines

LINE_LOSS_WEIGHTS = {"line_class": 2.0, "line_points": 5.0, "line_direction": 0.005}


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
        shares: the ground truth [B, M, O, P, 2] in 0..1, in O orderings; exists: [B, M, O]; label, valid: [B, M].

    Returns:
        The match, and which ordering fits each pair best, [B, Q, M].
    """
    with torch.no_grad():
        M, O = exists.shape[1:]
        distance = torch.cdist(points.float().flatten(2), shares.flatten(3).flatten(1, 2), p=1).unflatten(2, (M, O))
        distance, best = distance.masked_fill(~exists[:, None], math.inf).min(-1)  # [B, Q, M]
        cost = LINE_LOSS_WEIGHTS["line_class"] * focal_cost(logits, label)
        cost = cost + LINE_LOSS_WEIGHTS["line_points"] * distance
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
        orderings: the ground truth [B, M, O, P, 2] in metres, in the frame of the range, and which of its orderings
            exist [B, M, O], as `published_orderings` gives them; label, valid: [B, M].
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


def lidar_lines(lines: Polylines, ego_from_lidar: Tensor) -> Polylines:
    """Lines of the ego frame in the LiDAR's."""
    return lines._replace(points=(lines.points - ego_from_lidar[:2, 3]) @ ego_from_lidar[:2, :2])


def line_losses(
    logits: Tensor, points: Tensor, gt: FrameObjects, ego_from_lidar: Tensor, config: MapTRConfig
) -> dict[str, Tensor]:
    """Weighted losses by name, added up over the layers, of raw lines [L, B, Q, ...] against ground truth [B]."""
    lines = lidar_lines(gt.lines, ego_from_lidar)
    layers = maptr_losses(
        logits, points, *published_orderings(lines), lines.label, lines.valid, config.low, config.high
    )
    return sum_layers(layers)
