"""Matching and losses of Sparse4Dv3 and of SparseDrive's first stage, as published.

As in the published code, the number of matched instances, by which the losses of a layer are divided, is counted before
instances with a low score are left out of the regression. The divisor of denoising counts negative instances, too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from perception.matching import Match, focal_cost, focal_loss, hungarian
from perception.models.sparse4d.boxes import CENTER, YAW
from perception.models.sparse4d.denoising import Denoised, NoisyTarget
from perception.models.sparse4d.head import Instances

BARRIER, TRAFFIC_CONE = 5, 9  # in the published order of classes
BOX_LOSS_WEIGHTS = {"box_class": 2.0, "box_params": 0.25, "box_centerness": 1.0, "box_yawness": 1.0}
DENOISING_LOSS_WEIGHTS = {"denoising_class": 2.0, "denoising_params": 0.25}
LINE_LOSS_WEIGHTS = {"line_class": 1.0, "line_points": 10.0}
DEPTH_LOSS_WEIGHT, MAX_DEPTH = 0.2, 60.0  # metres
# Of the ten values of an encoded box: in matching, in the loss, and of traffic cones, whose heading is not known.
MATCH_WEIGHTS = (2.0, 2.0, 2.0, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0)
VALUE_WEIGHTS = (2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
CONE_WEIGHTS = (2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0)
VALUES = 10  # without the vertical velocity
LEAST_SCORE = 0.05  # of matched instances that take part in the regression
BETA = 0.01  # of the smooth L1 distance of lines
EPS = torch.finfo(torch.float32).eps


class BoxTargets(NamedTuple):
    """Ground-truth boxes in the published encoding."""

    boxes: Tensor  # [B, M, 10], see `perception.models.sparse4d.boxes`, without the vertical velocity
    label: Tensor  # [B, M] in the published order of classes
    valid: Tensor  # [B, M] bool


class LineTargets(NamedTuple):
    """Ground-truth lines in all their orders."""

    points: Tensor  # [B, M, O, 2 P] metres in the LiDAR frame
    exists: Tensor  # [B, M, O] bool, which orders a line has
    label: Tensor  # [B, M] in the published order of classes
    valid: Tensor  # [B, M] bool


def encode_boxes(boxes: Tensor) -> Tensor:
    """Encodes boxes [..., 9] (x, y, z, length, width, height, yaw, velocity) as [..., 10].

    Unknown velocities become 0, as in the published data code.
    """
    yaw, velocity = boxes[..., 6:7], boxes[..., 7:]
    sides = boxes[..., 3:6].clamp(min=1e-2).log()
    return torch.cat([boxes[..., CENTER], sides, yaw.sin(), yaw.cos(), velocity.nan_to_num(0.0)], -1)


def instance_weights(label: Tensor, like: Tensor) -> Tensor:
    """Returns the weights [..., 10] of the values of boxes with labels [...]: 1, but for traffic cones."""
    cone = (label == TRAFFIC_CONE)[..., None]
    return torch.where(cone, like.new_tensor(CONE_WEIGHTS), 1.0)


def match_boxes(logits: Tensor, anchors: Tensor, targets: BoxTargets) -> tuple[Match, Tensor]:
    """Matches the instances of one decoder layer to the ground truth.

    Args:
        logits: [B, Q, K].
        anchors: [B, Q, 11].
        targets: ground truth [B, M].

    Returns:
        The match, and its cost [B, Q, M].
    """
    with torch.no_grad():
        weights = instance_weights(targets.label, anchors) * anchors.new_tensor(MATCH_WEIGHTS)  # [B, M, 10]
        distance = (anchors[:, :, None, :VALUES] - targets.boxes[:, None]).abs() * weights[:, None]
        label = targets.label.clamp(min=0)  # of padding, too
        cost = BOX_LOSS_WEIGHTS["box_class"] * focal_cost(logits, label)
        cost = cost + BOX_LOSS_WEIGHTS["box_params"] * distance.sum(-1)
        return hungarian(cost, targets.valid), cost


def _mean(loss: Tensor, count: float) -> Tensor:
    """Divides a sum by a count as mmdet does."""
    return loss.sum() / (count + EPS)


def class_loss(logits: Tensor, label: Tensor, match: Match, count: float) -> Tensor:
    """Computes the focal loss of one layer; instances without a match are background."""
    one_hot = torch.zeros_like(logits)
    one_hot[match.batch, match.query, label[match.batch, match.target]] = 1.0
    return _mean(focal_loss(logits, one_hot), count)


def box_losses(instances: Instances, targets: BoxTargets) -> list[dict[str, Tensor]]:
    """Computes the weighted losses of each decoder layer; names as in `BOX_LOSS_WEIGHTS`.

    Args:
        instances: in training mode, so that every layer predicts scores.
        targets: ground truth [B, M].
    """
    losses = []
    for logits, quality, anchors in zip(instances.logits, instances.quality, instances.anchors, strict=True):
        match, _ = match_boxes(logits, anchors, targets)
        count = max(len(match.query), 1)
        scores = logits.amax(-1).sigmoid()[match.batch, match.query]
        batch, query, target = (x[scores > LEAST_SCORE] for x in match)
        box, of_box = anchors[batch, query, :VALUES], targets.boxes[batch, target]
        label = targets.label[batch, target]
        cosine = F.cosine_similarity(of_box[:, YAW], box[:, YAW], dim=-1)
        turned = ((label == BARRIER) & (cosine < 0))[:, None]  # both headings of a barrier are right
        of_box = torch.cat([of_box[:, : YAW.start], of_box[:, YAW] * torch.where(turned, -1.0, 1.0), of_box[:, 8:]], -1)
        weights = instance_weights(label, box) * box.new_tensor(VALUE_WEIGHTS)
        centerness, yawness = quality[batch, query].unbind(-1)
        # As published, the gradient flows into the box, too.
        near = torch.exp(-(of_box[:, CENTER] - box[:, CENTER]).norm(dim=-1))
        agrees = F.cosine_similarity(of_box[:, YAW], box[:, YAW], dim=-1) > 0
        losses.append(
            {
                "box_class": class_loss(logits, targets.label, match, count),
                "box_params": _mean((box - of_box).abs() * weights, count),
                "box_centerness": _mean(F.binary_cross_entropy_with_logits(centerness, near, reduction="none"), count),
                "box_yawness": _mean(_gaussian_focal_loss(yawness.sigmoid(), agrees), count),
            }
        )
    return [{name: BOX_LOSS_WEIGHTS[name] * loss for name, loss in layer.items()} for layer in losses]


def _gaussian_focal_loss(probability: Tensor, positive: Tensor) -> Tensor:
    """Computes the focal loss of CenterNet for targets 0 and 1 (https://arxiv.org/abs/1904.07850)."""
    right = torch.where(positive, probability, 1 - probability)
    return -(right + 1e-12).log() * (1 - right) ** 2


def denoising_losses(denoised: Denoised, single_frame_layers: int) -> list[dict[str, Tensor]]:
    """Computes the weighted losses of noisy instances for each decoder layer; names as in `DENOISING_LOSS_WEIGHTS`.

    Args:
        denoised: predictions and targets.
        single_frame_layers: number of layers before groups of the previous frame are taken over.
    """
    losses = []
    for number, (logits, anchors) in enumerate(zip(denoised.logits, denoised.anchors, strict=True)):
        target: NoisyTarget = denoised.first_target if number < single_frame_layers else denoised.target
        count = max(int(target.valid.sum()), 1)
        positive = target.valid & (target.label >= 0)
        one_hot = torch.zeros_like(logits)
        b, d = positive.nonzero(as_tuple=True)
        one_hot[b, d, target.label[positive]] = 1.0
        error = (anchors[..., :VALUES] - target.boxes)[positive].abs()
        losses.append(
            {
                "denoising_class": _mean(focal_loss(logits, one_hot)[target.valid], count),
                "denoising_params": _mean(error * error.new_tensor(VALUE_WEIGHTS), count),
            }
        )
    return [{name: DENOISING_LOSS_WEIGHTS[name] * loss for name, loss in layer.items()} for layer in losses]


def normalized_lines(lines: Tensor, size: tuple[float, float]) -> Tensor:
    """Normalises points of lines [..., 2 P] in metres to about 0..1 over a range of this size along x and y."""
    extent = lines.new_tensor(size)
    points = (lines.unflatten(-1, (-1, 2)) + extent / 2) / (extent + 1e-5)
    return points.flatten(-2)


def match_lines(
    logits: Tensor, lines: Tensor, targets: LineTargets, size: tuple[float, float]
) -> tuple[Match, Tensor, Tensor]:
    """Matches the lines of one decoder layer to the ground truth.

    Args:
        logits: [B, Q, K].
        lines: [B, Q, 2 P].
        targets: ground truth [B, M].
        size: of the range, metres.

    Returns:
        The match, its cost [B, Q, M], and the order of the ground truth that is nearest [B, Q, M].
    """
    with torch.no_grad():
        predicted, wanted = normalized_lines(lines, size), normalized_lines(targets.points, size)
        M, O = targets.exists.shape[1:]
        one, other = predicted[:, :, None], wanted.flatten(1, 2)[:, None]  # [B, Q, 1, 2 P], [B, 1, M * O, 2 P]
        one, other = torch.broadcast_tensors(one, other)
        error = F.smooth_l1_loss(one, other, reduction="none", beta=BETA)
        distance = (error.sum(-1) / (lines.shape[-1] // 2)).unflatten(2, (M, O))
        nearest, order = distance.masked_fill(~targets.exists[:, None], torch.inf).min(-1)
        cost = LINE_LOSS_WEIGHTS["line_class"] * focal_cost(logits, targets.label)
        cost = cost + LINE_LOSS_WEIGHTS["line_points"] * nearest
        return hungarian(cost, targets.valid), cost, order


def line_losses(
    logits: Tensor, lines: Tensor, targets: LineTargets, size: tuple[float, float]
) -> list[dict[str, Tensor]]:
    """Computes the weighted losses of each decoder layer; names as in `LINE_LOSS_WEIGHTS`.

    Args:
        logits: [L, B, Q, K].
        lines: [L, B, Q, 2 P].
        targets: ground truth [B, M].
        size: of the range, metres.
    """
    losses = []
    for layer_logits, layer_lines in zip(logits, lines, strict=True):
        match, _, order = match_lines(layer_logits, layer_lines, targets, size)
        count = max(len(match.query), 1)
        scores = layer_logits.amax(-1).sigmoid()[match.batch, match.query]
        batch, query, target = (x[scores > LEAST_SCORE] for x in match)
        wanted = targets.points[batch, target, order[batch, query, target]]
        predicted, wanted = (normalized_lines(x, size) for x in (layer_lines[batch, query], wanted))
        error = F.smooth_l1_loss(predicted, wanted, reduction="none", beta=BETA)
        points = lines.shape[-1] // 2
        losses.append(
            {
                "line_class": class_loss(layer_logits, targets.label, match, count),
                "line_points": _mean(error, count) / points,
            }
        )
    return [{name: LINE_LOSS_WEIGHTS[name] * loss for name, loss in layer.items()} for layer in losses]


def depth_loss(depths: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Computes the weighted loss of the depth branch.

    Args:
        depths: metres, one tensor per feature level.
        targets: of the same shapes; values that are not above 0 are unknown.
    """
    total = torch.zeros((), device=depths[0].device)
    for depth, target in zip(depths, targets, strict=True):
        known = target > 0
        error = (depth[known].clamp(0, MAX_DEPTH) - target[known]).abs()
        total = total + error.sum() / max(int(known.sum()) * len(depths), 1)
    return DEPTH_LOSS_WEIGHT * total
