"""Denoising of Sparse4Dv3: in training, further instances start at disturbed ground truth and must find back.

Each of several groups of noisy instances holds a positive and a negative one per box. Groups do not see each other, and
ordinary instances see none of them. Some groups are handed on to the next frame, where they have the targets of the
same objects (`ids`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from perception.matching import hungarian
from perception.models.sparse4d.config import DenoisingConfig

NEGATIVE, LOST, PADDING = -3, -1, -1  # classes of noisy instances without a box; a handed-on one may lose its own
# Of the values of an encoded box, to decide which of the noisy instances has which box.
MATCH_WEIGHTS = (2.0, 2.0, 2.0, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0)


class NoisyTarget(NamedTuple):
    """What D noisy instances should become."""

    boxes: Tensor  # [B, D, 10] encoded as in `boxes`, without vertical velocity; zeros for none
    label: Tensor  # [B, D] class in the published order, negative for background
    valid: Tensor  # [B, D] bool, False for padding
    ids: Tensor  # [B, D] of the objects, -1 for none


class Noisy(NamedTuple):
    """Noisy instances of one frame, group by group."""

    anchor: Tensor  # [B, D, 11]
    target: NoisyTarget
    groups: int
    handed_on: Tensor  # [groups] bool, which of them are handed on to the next frame

    def mask_with(self, ordinary: int) -> Tensor:
        """Returns the mask [1, Q + D, Q + D] of self-attention: True for pairs that must not attend to each other."""
        D = self.anchor.shape[1]
        group = torch.arange(D, device=self.anchor.device) // (D // self.groups)
        group = F.pad(group, (ordinary, 0), value=-1)
        return (group[:, None] != group)[None]


class HandedOn(NamedTuple):
    """Groups of noisy instances that are handed on to the next frame, [B, groups, instances of a group, ...]."""

    feature: Tensor
    anchor: Tensor
    label: Tensor
    valid: Tensor
    ids: Tensor


class Denoised(NamedTuple):
    """Predictions of all decoder layers for noisy instances, and their targets."""

    logits: Tensor  # [L, B, D, K]
    anchors: Tensor  # [L, B, D, 11]
    first_target: NoisyTarget  # of the layers before the take-over
    target: NoisyTarget  # of the others


def make_noisy(
    config: DenoisingConfig,
    boxes: Tensor,
    label: Tensor,
    valid: Tensor,
    ids: Tensor | None,
    draws: Tensor | None = None,
    permutation: Tensor | None = None,
) -> Noisy | None:
    """Makes noisy instances from the ground truth.

    Args:
        config: how many, and how noisy.
        boxes: encoded ground truth [B, M, 10].
        label: [B, M] in the published order.
        valid: [B, M] bool.
        ids: [B, M] of the objects; None if they are unknown, in which case no group is handed on.
        draws: [3, groups * B, M', 10] uniform in 0..1: noise of positives, size of the noise of negatives, its sign;
            drawn here if None.
        permutation: [groups] of the groups, of which the lowest numbers are handed on; drawn here if None.

    Returns:
        None if there are no groups or no boxes.
    """
    B, G = len(boxes), config.groups
    # Valid boxes come first, in their order.
    order = (~valid).long().argsort(dim=1, stable=True)[:, : config.max_boxes]
    M = min(int(valid.sum(1).max()), config.max_boxes) if G else 0
    if M == 0:
        return None
    order = order[:, :M]
    valid = valid.gather(1, order)
    label = torch.where(valid, label.gather(1, order), PADDING).repeat(G, 1)  # [G * B, M]
    known = torch.full_like(order, -1) if ids is None else ids.gather(1, order)
    ids_of_box = torch.where(valid, known, -1).repeat(G, 1)
    boxes = torch.where(valid[..., None], boxes.gather(1, order[..., None].expand(-1, -1, 10)), 0.0).repeat(G, 1, 1)
    draws = torch.rand(3, *boxes.shape, device=boxes.device) if draws is None else draws
    noise = boxes.new_tensor(config.noise)
    positive = boxes + (2 * draws[0] - 1) * noise
    negative = boxes + (draws[1] + 1) * torch.where(draws[2] > 0.5, 1.0, -1.0) * noise
    anchor = torch.cat([positive, negative], 1)  # [G * B, 2 M, 10]
    # As published, the nearer of the two becomes the positive one. Padding takes part.
    weights = boxes.new_tensor(MATCH_WEIGHTS)
    cost = ((anchor[:, :, None] - boxes[:, None]).abs() * weights).sum(-1)
    match = hungarian(cost, torch.ones_like(label, dtype=torch.bool))
    found_boxes = torch.zeros_like(anchor)
    found_label = torch.full(anchor.shape[:2], NEGATIVE, device=boxes.device)
    found_ids = torch.full_like(found_label, -1)
    instance, source = (match.batch, match.query), (match.batch, match.target)
    found_boxes[instance], found_label[instance], found_ids[instance] = boxes[source], label[source], ids_of_box[source]
    exists = torch.cat([label, label], 1) >= 0
    found_valid = (found_label >= 0) | (exists & (found_label == NEGATIVE))

    def by_sample(x: Tensor) -> Tensor:
        return x.unflatten(0, (G, B)).transpose(0, 1).flatten(1, 2)  # [B, G * 2 M, ...]

    target = NoisyTarget(*map(by_sample, (found_boxes, found_label, found_valid, found_ids)))
    permutation = torch.randperm(G) if permutation is None else permutation
    handed_on = permutation < (0 if ids is None else config.handed_on)
    return Noisy(F.pad(by_sample(anchor), (0, 1)), target, G, handed_on.to(boxes.device))


def take_handed_on(
    feature: Tensor, anchor: Tensor, noisy: Noisy, handed_on: HandedOn, fresh: Tensor
) -> tuple[Tensor, Tensor, Noisy]:
    """Replaces the first groups by those of the previous frame, in samples with a fresh memory.

    Args:
        feature: of the noisy instances [B, D, C].
        anchor: [B, D, 11].
        noisy: how they started.
        handed_on: groups of the previous frame, moved to this one.
        fresh: [B] bool, see `Recalled`.

    Returns:
        Feature, anchor, and `noisy` with the targets of what is there now.
    """
    if handed_on.ids.shape[1] == 0:
        return feature, anchor, noisy
    G, target = noisy.groups, noisy.target

    def grouped(x: Tensor) -> Tensor:
        return x.unflatten(1, (G, -1))

    H, M = handed_on.ids.shape[1], grouped(target.ids).shape[2]
    same = handed_on.ids[..., None] == grouped(target.ids)[:, :H, None]  # [B, H, M of the previous frame, M]
    found = (same[..., None] * grouped(target.boxes)[:, :H, None]).sum(3)
    label = torch.where(same.any(-1), handed_on.label, LOST)
    old = (handed_on.feature, handed_on.anchor, found, label, handed_on.valid, handed_on.ids)
    new = (feature, anchor, target.boxes, target.label, target.valid, target.ids)
    joined = []
    for before, now in zip(old, map(grouped, new), strict=True):
        extra = max(M - before.shape[2], 0)
        before = torch.cat([before, before.new_zeros(*before.shape[:2], extra, *before.shape[3:])], 2)[:, :, :M]
        replace = fresh.view(-1, *[1] * (now.ndim - 1))
        joined.append(torch.cat([torch.where(replace, before, now[:, :H]), now[:, H:]], 1).flatten(1, 2))
    feature, anchor, *rest = joined
    return feature, anchor, noisy._replace(target=NoisyTarget(*rest))


def no_groups(feature: Tensor, anchor: Tensor) -> HandedOn:
    """Returns no groups for instances with these features [B, ..., C] and anchors [B, ..., D]."""
    B = len(feature)
    none = feature.new_zeros(B, 0, 0, dtype=torch.long)
    of_feature, of_anchor = (x.new_zeros(B, 0, 0, x.shape[-1]) for x in (feature, anchor))
    return HandedOn(of_feature, of_anchor, none, none.bool(), none)


def hand_on(feature: Tensor, anchor: Tensor, noisy: Noisy) -> HandedOn:
    """Returns the groups that are handed on to the next frame, without gradients.

    Args:
        feature: of the noisy instances [B, D, C].
        anchor: [B, D, 11].
        noisy: with their targets.
    """
    target = noisy.target
    parts = (feature.detach(), anchor.detach(), target.label, target.valid, target.ids)
    return HandedOn(*(x.unflatten(1, (noisy.groups, -1))[:, noisy.handed_on] for x in parts))
