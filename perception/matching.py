"""One-to-one matching of queries and ground truth (the Hungarian method, DETR, https://arxiv.org/abs/2005.12872)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.profiler import record_function


class Match(NamedTuple):
    """Pairs of one decoder layer over a whole batch; all tensors have the length of the number of pairs."""

    batch: Tensor  # index of the scene
    query: Tensor  # index of the query in its scene
    target: Tensor  # index of the object in the padded ground truth


def match_layers(cost: Tensor, valid: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Every decoder layer matched anew; all in one go, for a GPU is kept waiting by many small calls.

    Args:
        cost: [L, B, Q, M].
        valid: [B, M] bool.

    Returns:
        Where the matched answers are in tensors [L, B, Q], and what was gt_idx for in tensors [B, M].
    """
    L, B = cost.shape[:2]
    match = hungarian(cost.flatten(0, 1), valid.repeat(L, 1))
    scene = match.batch % B
    return (match.batch // B, scene, match.query), (scene, match.target)


@record_function("matching")
def hungarian(cost: Tensor, valid: Tensor) -> Match:
    """The cheapest one-to-one matching of queries and valid objects, scene by scene.

    Args:
        cost: [B, Q, M].
        valid: [B, M] bool.

    Raises:
        FloatingPointError: if the cost of a valid object is not finite: the network's output already is not.
    """
    device = cost.device
    cost_cpu, valid_cpu = cost.float().cpu().numpy(), valid.cpu().numpy()
    batch, query, target = [], [], []
    for b, (scene_cost, scene_valid) in enumerate(zip(cost_cpu, valid_cpu, strict=True)):
        objects = np.flatnonzero(scene_valid)
        scene_cost = scene_cost[:, objects]
        if not np.isfinite(scene_cost).all():
            raise FloatingPointError(f"matching cost of scene {b} of the batch is not finite")
        rows, columns = linear_sum_assignment(scene_cost)
        batch.append(np.full(len(rows), b))
        query.append(rows)
        target.append(objects[columns])
    return Match(*(torch.as_tensor(np.concatenate(x), dtype=torch.long, device=device) for x in (batch, query, target)))


FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0  # https://arxiv.org/abs/1708.02002


def focal_loss(logits: Tensor, target: Tensor, alpha: float = FOCAL_ALPHA) -> Tensor:
    """Sigmoid focal loss of each element; target is 0 or 1."""
    logits = logits.float()
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    wrong = torch.where(target > 0.5, 1 - probability, probability)
    return torch.where(target > 0.5, alpha, 1 - alpha) * wrong**FOCAL_GAMMA * entropy


def focal_cost(logits: Tensor, label: Tensor) -> Tensor:
    """What calling query q by the class of object m would cost more than calling it background.

    Args:
        logits: [..., B, Q, K].
        label: [B, M].

    Returns:
        [..., B, Q, M].
    """
    one, zero = torch.ones_like(logits), torch.zeros_like(logits)
    gain = focal_loss(logits, one) - focal_loss(logits, zero)  # [..., B, Q, K]
    return gain.gather(-1, label[:, None].expand(*gain.shape[:-1], -1))
