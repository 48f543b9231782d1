"""Hungarian matching of queries and ground truth (DETR, https://arxiv.org/abs/2005.12872), and the focal loss."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0


class Match(NamedTuple):
    """Matched pairs of one decoder layer over a batch, one element per pair."""

    batch: Tensor  # index of the sample in the batch
    query: Tensor  # index of the query
    target: Tensor  # index of the object in the padded ground truth


def match_layers(cost: Tensor, valid: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Matches each decoder layer with the ground truth, all in one call, since many small ones keep a GPU waiting.

    Args:
        cost: [L, B, Q, M].
        valid: [B, M] bool.

    Returns:
        `pred_idx`, indices of the matched queries into tensors [L, B, Q], and `gt_idx`, those of their targets into
        tensors [B, M].
    """
    L, B = cost.shape[:2]
    match = hungarian(cost.flatten(0, 1), valid.repeat(L, 1))
    sample = match.batch % B
    return (match.batch // B, sample, match.query), (sample, match.target)


@record_function("matching")
def hungarian(cost: Tensor, valid: Tensor) -> Match:
    """Finds the one-to-one matching of queries and valid objects with the least total cost, sample by sample.

    Args:
        cost: [B, Q, M].
        valid: [B, M] bool.

    Raises:
        FloatingPointError: the cost of a valid object is not finite, because the network's output is not.
    """
    from scipy.optimize import linear_sum_assignment  # only training needs it, and it is slow to load

    device = cost.device
    cost_cpu, valid_cpu = cost.float().cpu().numpy(), valid.cpu().numpy()
    batch, query, target = [], [], []
    for b, (sample_cost, sample_valid) in enumerate(zip(cost_cpu, valid_cpu, strict=True)):
        objects = np.flatnonzero(sample_valid)
        sample_cost = sample_cost[:, objects]
        if not np.isfinite(sample_cost).all():
            raise FloatingPointError(f"matching cost of sample {b} of the batch is not finite")
        rows, columns = linear_sum_assignment(sample_cost)
        batch.append(np.full(len(rows), b))
        query.append(rows)
        target.append(objects[columns])
    return Match(*(torch.as_tensor(np.concatenate(x), dtype=torch.long, device=device) for x in (batch, query, target)))


def focal_loss(logits: Tensor, target: Tensor, alpha: float = FOCAL_ALPHA) -> Tensor:
    """Computes the sigmoid focal loss of each element; the target is 0 or 1 (https://arxiv.org/abs/1708.02002)."""
    logits = logits.float()
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    positive = target == 1
    wrong = torch.where(positive, 1 - probability, probability)
    return torch.where(positive, alpha, 1 - alpha) * wrong**FOCAL_GAMMA * entropy


def focal_cost(logits: Tensor, label: Tensor) -> Tensor:
    """Computes the class cost of matching: the focal loss of query q with the class of object m less that of
    background.

    Args:
        logits: [..., B, Q, K].
        label: [B, M].

    Returns:
        [..., B, Q, M].
    """
    one, zero = torch.ones_like(logits), torch.zeros_like(logits)
    gain = focal_loss(logits, one) - focal_loss(logits, zero)  # [..., B, Q, K]
    return gain.gather(-1, label[:, None].expand(*gain.shape[:-1], -1))
