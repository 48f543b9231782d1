"""Losses of the flagship.

Each decoder layer is matched with the ground truth, one query to one object (Hungarian matching as in DETR,
https://arxiv.org/abs/2005.12872). A line may be given in either direction and a ring may start at any vertex (MapTR,
https://arxiv.org/abs/2208.14437), so lines are compared in the ordering that fits best. Two auxiliary losses on the BEV
(centre heat map, BEV segmentation of the lines) supervise the BEV features. Three in the images (class, depth and
heading per pixel) are the perspective supervision of BEVFormer v2 (https://arxiv.org/abs/2211.10439), from boxes alone.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from perception.geometry import invert_rigid, transform_points, wrap_angle
from perception.grid import BEVGrid
from perception.matching import focal_cost, focal_loss, match_layers
from perception.models.bev_transformer.encoder import depth_bin
from perception.models.decoding import LOG_UNCERTAINTY_RANGE
from perception.targets import draw_bev_segmentation, draw_heatmap, encode_boxes, line_orderings, ray_cast_boxes
from perception.types import BOX_CLASSES, Boxes, Frame, FrameObjects, ImagePrediction, Polylines, Prediction

# Weights of the ten box parameters (centre, log size, sin cos yaw, velocity) in cost and loss. Most objects stand
# still: with less weight on velocities, the network goes on predicting zero for all.
BOX_WEIGHTS = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0)
# Cones have no yaw. Barriers look the same from front and back, so two yaws are equally right.
NO_YAW, SYMMETRIC = BOX_CLASSES.index("traffic_cone"), BOX_CLASSES.index("barrier")
LOSS_WEIGHTS = {
    "box_class": 2.0, "box_params": 0.25, "heatmap": 1.0,
    "line_class": 2.0, "line_points": 0.5, "line_direction": 0.1, "bev_seg": 1.0,
    "image_class": 1.0, "image_depth": 0.5, "image_heading": 1.0, "box_uncertainty": 0.1, "line_uncertainty": 0.1,
}  # fmt: skip


def frame_losses(prediction: Prediction, gt: FrameObjects, frame: Frame, grid: BEVGrid) -> dict[str, Tensor]:
    """Computes all losses of one frame, weighted, averaged over the decoder layers.

    Args:
        prediction: leading [L, B].
        gt: leading [B].
        frame: leading [B], the input of the network; its calibration projects the boxes into the images.
        grid: of the heat map and the segmentation.

    Returns:
        Scalars by name. A NaN in the prediction or in the ground truth of a matched object gives a NaN here. The
        exception is the velocity, whose ground truth is NaN where it is unknown.
    """
    boxes = _inside(gt.boxes, grid)
    sums = box_losses(prediction.box_logits, prediction.box_params, prediction.box_log_uncertainty, boxes)
    sums |= line_losses(prediction.line_logits, prediction.line_points, prediction.line_log_uncertainty, gt.lines)
    sums["heatmap"] = heatmap_loss(prediction.heatmap_logits, boxes, grid)
    sums["bev_seg"] = bev_seg_loss(prediction.bev_seg_logits, gt.lines, grid)
    sums = {name: LOSS_WEIGHTS[name] * loss for name, loss in sums.items()}
    return sums | image_losses(prediction.images, gt.boxes, frame)


def _inside(boxes: Boxes, grid: BEVGrid) -> Boxes:
    """Keeps boxes whose centre lies on the grid: no others can be predicted."""
    position = grid.normalize(boxes.center)
    return boxes._replace(valid=boxes.valid & ((position >= 0) & (position < 1)).all(-1))


# ---------------------------------------------------------------------------------------------------------------- boxes


def box_losses(logits: Tensor, params: Tensor, log_uncertainty: Tensor, boxes: Boxes) -> dict[str, Tensor]:
    """Computes the focal loss of classes, and L1 loss of parameters and likelihood of errors of matched boxes.

    Args:
        logits: [L, B, Q, K]; params: [L, B, Q, 10]; log_uncertainty: [L, B, Q, 9].
        boxes: the ground truth [B, M].
    """
    targets = encode_boxes(boxes)
    weights = params.new_tensor(BOX_WEIGHTS)
    with torch.no_grad():
        # Yaw and velocity do not count in the matching: not all classes have a yaw, and a velocity may be unknown.
        distance = (params[..., None, :6] - targets[:, None, :, :6]).abs()  # [L, B, Q, M, 6]
        cost = LOSS_WEIGHTS["box_class"] * focal_cost(logits, boxes.label)
        cost = cost + LOSS_WEIGHTS["box_params"] * (distance * weights[:6]).sum(-1)
        pred_idx, gt_idx = match_layers(cost, boxes.valid)
    label, target, found = boxes.label[gt_idx], targets[gt_idx], params[pred_idx]
    count = max(len(label), len(logits))  # at least one of each layer
    wanted = torch.zeros_like(logits)
    matched = (*pred_idx, label)
    wanted[matched] = 1.0
    target = torch.cat([target[:, :6], nearest_yaw(found[:, 6:8], target[:, 6:8], label), target[:, 8:]], 1)
    known = ~target.isnan()
    difference = torch.where(known, found - target.nan_to_num(), 0.0).abs()
    weights = weights.expand_as(difference).clone()
    weights[label == NO_YAW, 6:8] = 0.0
    yaw_error = torch.atan2(found[:, 6], found[:, 7]) - torch.atan2(target[:, 6], target[:, 7])
    error = torch.cat([difference[:, :6], wrap_angle(yaw_error)[:, None].abs(), difference[:, 8:]], 1)  # [pairs, 9]
    likelihood = laplace_loss(log_uncertainty[pred_idx], error) * torch.cat([known[:, :7], known[:, 8:]], 1)
    return {
        "box_class": focal_loss(logits, wanted).sum() / count,
        "box_params": (difference * weights).sum() / count,
        "box_uncertainty": likelihood.sum() / count,
    }


def nearest_yaw(found: Tensor, target: Tensor, label: Tensor) -> Tensor:
    """Chooses the target (sin, cos) of yaw [pairs, 2]: for symmetric classes the nearer of the two right ones."""
    behind = (found.detach() * target).sum(-1) < 0
    return torch.where((behind & (label == SYMMETRIC))[:, None], -target, target)


def heatmap_loss(logits: Tensor, boxes: Boxes, grid: BEVGrid) -> Tensor:
    """Penalty-reduced focal loss of CenterNet (https://arxiv.org/abs/1904.07850) on [B, K, X, Y]."""
    target = draw_heatmap(boxes, grid, logits.shape[1])
    probability = logits.float().sigmoid().clamp(1e-4, 1 - 1e-4)
    positive = target == 1
    hit = -((1 - probability) ** 2) * probability.log() * positive
    miss = -((1 - target) ** 4) * probability**2 * (1 - probability).log() * ~positive
    return (hit.sum() + miss.sum()) / positive.sum().clamp(min=1)


# ---------------------------------------------------------------------------------------------------------------- lines


def line_losses(logits: Tensor, points: Tensor, log_uncertainty: Tensor, lines: Polylines) -> dict[str, Tensor]:
    """Computes the focal loss of classes, and L1 loss, likelihood and edge direction loss of matched lines.

    Args:
        logits: [L, B, Q, K]; points: [L, B, Q, P, 2] metres; log_uncertainty: [L, B, Q, P, 2].
        lines: the ground truth [B, M].
    """
    P = points.shape[3]
    orderings, exists = line_orderings(lines)
    with torch.no_grad():
        M, O = exists.shape[1:]
        distance = torch.cdist(points.float().flatten(3), orderings.flatten(3).flatten(1, 2), p=1)  # [L, B, Q, M * O]
        distance = distance.unflatten(3, (M, O)) / P  # mean L1 distance per point, metres
        distance, ordering = distance.masked_fill(~exists[:, None], math.inf).min(-1)  # [L, B, Q, M]
        cost = LOSS_WEIGHTS["line_class"] * focal_cost(logits, lines.label) + LOSS_WEIGHTS["line_points"] * distance
        pred_idx, gt_idx = match_layers(cost, lines.valid)
    label, found = lines.label[gt_idx], points[pred_idx]
    pair = (*pred_idx, gt_idx[1])
    best = (*gt_idx, ordering[pair])
    target = orderings[best]  # [pairs, P, 2]
    count = max(len(label), len(logits))  # at least one of each layer
    wanted = torch.zeros_like(logits)
    matched = (*pred_idx, label)
    wanted[matched] = 1.0
    cosine = F.cosine_similarity(found.diff(dim=1), target.diff(dim=1), dim=-1, eps=1e-3)
    return {
        "line_class": focal_loss(logits, wanted).sum() / count,
        "line_points": (found - target).abs().sum(-1).mean(-1).sum() / count,
        "line_direction": (1 - cosine).mean(-1).sum() / count,
        "line_uncertainty": laplace_loss(log_uncertainty[pred_idx], (found - target).abs()).mean((1, 2)).sum() / count,
    }


def bev_seg_loss(logits: Tensor, lines: Polylines, grid: BEVGrid) -> Tensor:
    """Computes the focal loss of the BEV segmentation [B, K, X, Y] per cell that a line crosses."""
    target = draw_bev_segmentation(lines, grid, logits.shape[1])
    # Twice an alpha of one half: cells with and without a line have a weight of one.
    return 2 * focal_loss(logits, target, alpha=0.5).sum() / target.sum().clamp(min=1)


# --------------------------------------------------------------------------------------------------------------- images


def image_losses(prediction: ImagePrediction, boxes: Boxes, frame: Frame) -> dict[str, Tensor]:
    """Computes the losses per pixel: focal loss of classes; in boxes KL divergence of depth and L1 loss of heading.

    Args:
        prediction: leading [B].
        boxes: the ground truth [B, M].
        frame: leading [B]; absent cameras do not count.

    Returns:
        Weighted scalars by name, as in `frame_losses`.
    """
    rig = frame.rig
    B, N, K, h, w = prediction.logits.shape
    D = prediction.depth_logits.shape[2]
    H, W = frame.images.shape[-2:]
    depth, box = ray_cast_boxes(boxes, rig, (H, W), (h, w))  # [B, N, h, w]
    shown = depth.isfinite() & rig.present[..., None, None]
    count = shown.sum().clamp(min=1)
    b, n, row, column = shown.nonzero(as_tuple=True)  # of the P pixels that show a box
    m = box[shown]
    wanted = torch.zeros_like(prediction.logits)
    wanted[b, n, boxes.label[b, m], row, column] = 1.0
    present = rig.present[..., None, None, None]

    # The depth of the box centre, not of the visible side: the BEV encoder needs the object at its centre.
    center_cam = transform_points(invert_rigid(rig.ego_from_cam[b, n].float()), boxes.center[b, m][:, None])
    at = depth_bin(center_cam[:, 0, 2], D)  # [P]
    depth_target = (1 - (at[:, None] - torch.arange(D, device=at.device)).abs()).clamp(min=0)  # [P, D]
    depth_logits = prediction.depth_logits[b, n, :, row, column]  # [P, D]

    sight = (boxes.center[b, m] - rig.ego_from_cam[b, n, :3, 3])[:, :2]  # [P, 2]
    angle = boxes.yaw[b, m] - torch.atan2(sight[:, 1], sight[:, 0])
    heading = prediction.heading[b, n, :, row, column]  # [P, 2]
    yaw = nearest_yaw(heading, torch.stack([angle.sin(), angle.cos()], -1), boxes.label[b, m])
    has_yaw = (boxes.label[b, m] != NO_YAW)[:, None]
    losses = {
        "image_class": (focal_loss(prediction.logits, wanted) * present).sum() / count,
        "image_depth": F.kl_div(depth_logits.log_softmax(-1), depth_target, reduction="sum") / count,
        "image_heading": ((heading - yaw).abs() * has_yaw).sum() / count,
    }
    return {name: LOSS_WEIGHTS[name] * loss for name, loss in losses.items()}


def laplace_loss(log_uncertainty: Tensor, error: Tensor) -> Tensor:
    """Computes the negative log likelihood of absolute errors under Laplace distributions, element by element.

    The errors are detached, so this trains the scales alone. The scale of a Laplace distribution is the mean of the
    absolute error.
    """
    log_uncertainty = log_uncertainty.float().clamp(*LOG_UNCERTAINTY_RANGE)
    return math.log(2) + log_uncertainty + error.detach() * (-log_uncertainty).exp()
