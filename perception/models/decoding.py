"""Decoding that networks share: the best pairs of query and class, and the objects of a network that predicts none."""

from __future__ import annotations

import torch
from torch import Tensor

from perception.types import Boxes, Polylines

LOG_UNCERTAINTY_RANGE = (-5.0, 4.0)  # of the logarithm of an expected error
CLOSED_GAP = 1.0  # metres between first and last point below which a predicted line counts as closed


def topk_pairs(logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best (query, class) pairs of logits [B, Q, K], at most `count`: score, query and label, each [B, count]."""
    Q, K = logits.shape[1:]
    score, index = logits.sigmoid().flatten(1).topk(min(count, Q * K), dim=1)
    return score, torch.div(index, K, rounding_mode="floor"), index % K


def empty_lines(batch_size: int, device: torch.device) -> Polylines:
    """The lines of a network that predicts none."""
    points = torch.zeros(batch_size, 0, 20, 2, device=device)
    score = points.flatten(2).sum(-1)  # [B, 0]
    return Polylines(points, score.bool(), score.long(), score, score.bool(), points)


def empty_boxes(batch_size: int, device: torch.device) -> Boxes:
    """The boxes of a network that predicts none."""
    three = torch.zeros(batch_size, 0, 3, device=device)
    score = three.sum(-1)  # [B, 0]
    label = score.long()
    return Boxes(three, three, score, three[..., :2], label, label, score, score.bool(), three.repeat(1, 1, 3))
