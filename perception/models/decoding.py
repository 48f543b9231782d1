"""Decoding that networks share: top-k decoding, closed lines, and empty results of networks without boxes or lines."""

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


def close_rings(points: Tensor, uncertainty: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Makes closed lines repeat their first point.

    A line is closed if its first and last point are closer than `CLOSED_GAP`. Its last point and the uncertainty of it
    point become those of the first.

    Args:
        points: [..., P, 2] metres.
        uncertainty: [..., P, 2] metres.

    Returns:
        Points and uncertainty of the same shapes, and closed [...] bool.
    """
    closed = (points[..., 0, :] - points[..., -1, :]).norm(dim=-1) < CLOSED_GAP
    # Not in place: that would be exported as ScatterND.
    points, uncertainty = (
        torch.cat([x[..., :-1, :], torch.where(closed[..., None, None], x[..., :1, :], x[..., -1:, :])], -2)
        for x in (points, uncertainty)
    )
    return points, uncertainty, closed


def empty_lines(batch_size: int, device: torch.device, line_points: int = 20) -> Polylines:
    """Returns no lines [B, 0]."""
    points = torch.zeros(batch_size, 0, line_points, 2, device=device)
    score = points[..., 0, 0]  # [B, 0]
    return Polylines(points, score.bool(), score.long(), score, score.bool(), points)


def empty_boxes(batch_size: int, device: torch.device) -> Boxes:
    """Returns no boxes [B, 0]."""
    nine = torch.zeros(batch_size, 0, 9, device=device)
    three, score = nine[..., :3], nine[..., 0]  # [B, 0, 3], [B, 0]
    label = score.long()
    return Boxes(three, three, score, nine[..., :2], label, label, score, score.bool(), nine)
