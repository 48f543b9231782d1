"""Decoding that networks share: top-k decoding, and empty results of networks that predict no boxes or no lines."""

from __future__ import annotations

import torch
from torch import Tensor

from perception.types import Boxes, Polylines

LOG_UNCERTAINTY_RANGE = (-5.0, 4.0)  # natural logarithm of a Laplace scale
CLOSED_GAP = 1.0  # metres; a predicted line whose first and last point are closer is closed


def topk_pairs(logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Selects the (query, class) pairs of highest score.

    Args:
        logits: [B, Q, K].
        count: number of pairs; all Q * K pairs if there are fewer.

    Returns:
        Scores, query indices and labels, each [B, count], highest score first.
    """
    Q, K = logits.shape[1:]
    score, index = logits.sigmoid().flatten(1).topk(min(count, Q * K), dim=1)
    return score, torch.div(index, K, rounding_mode="floor"), index % K


def empty_lines(batch_size: int, device: torch.device) -> Polylines:
    """Returns the lines [B, 0] of a network that predicts none."""
    points = torch.zeros(batch_size, 0, 20, 2, device=device)
    score = points.flatten(2).sum(-1)  # [B, 0]
    return Polylines(points, score.bool(), score.long(), score, score.bool(), points)


def empty_boxes(batch_size: int, device: torch.device) -> Boxes:
    """Returns the boxes [B, 0] of a network that predicts none."""
    three = torch.zeros(batch_size, 0, 3, device=device)
    score = three.sum(-1)  # [B, 0]
    label = score.long()
    return Boxes(three, three, score, three[..., :2], label, label, score, score.bool(), three.repeat(1, 1, 3))
