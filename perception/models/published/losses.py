"""Loss terms that the published networks share."""

from __future__ import annotations

import torch
from torch import Tensor

from perception.matching import Match, focal_loss


def class_loss(logits: Tensor, label: Tensor, match: Match) -> Tensor:
    """Computes the focal loss of one decoder layer, divided by the number of matched queries.

    Args:
        logits: [B, Q, K].
        label: classes of the ground truth [B, M].
        match: pairs of queries and ground truth; queries without a pair are background.
    """
    one_hot = torch.zeros_like(logits)
    one_hot[match.batch, match.query, label[match.batch, match.target]] = 1.0
    return focal_loss(logits, one_hot).sum() / max(len(match.query), 1)


def sum_layers(layers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Adds up the losses of all decoder layers by name, as the published code does."""
    return {name: torch.stack([layer[name] for layer in layers]).sum() for name in layers[0]}
