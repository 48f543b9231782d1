"""Matching and losses: what a Prediction should have been, given the true FrameObjects.

Every decoder layer is matched anew with the ground truth, one query to one object (the Hungarian method, DETR,
https://arxiv.org/abs/2005.12872). A line is the same line when it is walked backwards, and a ring the same ring from
whichever vertex it starts (MapTR, https://arxiv.org/abs/2208.14437), so lines are compared in the ordering that fits
best. Two dense losses on the BEV, a centre heat map and a BEV segmentation of the lines, train the map itself; two in
the images, which object each pixel shows and how far away it is, train what the map is lifted from (the perspective
supervision of BEVFormer v2, https://arxiv.org/abs/2211.10439, from the boxes alone).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.profiler import record_function

from perception.geometry import invert_rigid, transform_points, wrap_angle
from perception.grid import BEVGrid
from perception.models.bev_encoder import depth_position, pixel_rays
from perception.models.decoder import LOG_UNCERTAINTY_RANGE
from perception.types import BOX_CLASSES, Boxes, CameraRig, Frame, FrameObjects, ImagePrediction, Polylines, Prediction

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0  # https://arxiv.org/abs/1708.02002
# Weights of the ten box parameters (centre, log size, sin cos yaw, velocity) in cost and loss. Most things stand: with
# less weight on velocities, the guess that everything does is never left.
BOX_WEIGHTS = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0)
# What looks the same from all sides has no yaw to learn, what looks the same from front and back has two.
ROUND, TWO_FACED = BOX_CLASSES.index("traffic_cone"), BOX_CLASSES.index("barrier")
LOSS_WEIGHTS = {
    "box_class": 2.0, "box_params": 0.25, "heatmap": 1.0,
    "line_class": 2.0, "line_points": 0.5, "line_direction": 0.1, "bev_seg": 1.0,
    "image_class": 1.0, "image_depth": 0.5, "image_heading": 1.0, "box_uncertainty": 0.1, "line_uncertainty": 0.1,
}  # fmt: skip


class Match(NamedTuple):
    """Pairs of one decoder layer over a whole batch; all tensors have the length of the number of pairs."""

    batch: Tensor  # index of the scene
    query: Tensor  # index of the query in its scene
    target: Tensor  # index of the object in the padded ground truth


def set_losses(prediction: Prediction, gt: FrameObjects, frame: Frame, grid: BEVGrid) -> dict[str, Tensor]:
    """All losses of one frame, weighted, averaged over the decoder layers.

    Args:
        prediction: leading [L, B].
        gt: leading [B].
        frame: leading [B], what the network saw; its calibration says what the images show.
        grid: the grid of the dense outputs on the BEV.

    Returns:
        Scalars by name; their sum is what to minimise. Nothing is hidden: a NaN in the prediction or the ground truth
        of a matched object is a NaN here, except velocities, whose ground truth is NaN where it is not known.
    """
    boxes = _inside(gt.boxes, grid)
    sums = box_losses(prediction.box_logits, prediction.box_params, prediction.box_log_uncertainty, boxes)
    sums |= line_losses(prediction.line_logits, prediction.line_points, prediction.line_log_uncertainty, gt.lines)
    sums["heatmap"] = heatmap_loss(prediction.heatmap_logits, boxes, grid)
    sums["bev_seg"] = bev_seg_loss(prediction.bev_seg_logits, gt.lines, grid)
    sums = {name: LOSS_WEIGHTS[name] * loss for name, loss in sums.items()}
    return sums | image_losses(prediction.images, gt.boxes, frame)


def _inside(boxes: Boxes, grid: BEVGrid) -> Boxes:
    """Only boxes whose centre lies on the grid can be found, so only they are gt_idx for."""
    place = grid.normalize(boxes.center)
    return boxes._replace(valid=boxes.valid & ((place >= 0) & (place < 1)).all(-1))


# ---------------------------------------------------------------------------------------------------------------- boxes


def encode_boxes(boxes: Boxes) -> Tensor:
    """True boxes [B, M] as the network's parameters [B, M, 10] (see `Prediction.box_params`)."""
    turn = torch.stack([boxes.yaw.sin(), boxes.yaw.cos()], -1)
    return torch.cat([boxes.center, boxes.size.clamp(min=1e-2).log(), turn, boxes.velocity], -1)


def box_losses(logits: Tensor, params: Tensor, log_uncertainty: Tensor, boxes: Boxes) -> dict[str, Tensor]:
    """Focal loss of the classes, L1 of the parameters and likelihood of the errors of matched boxes.

    Args:
        logits: [L, B, Q, K]; params: [L, B, Q, 10]; log_uncertainty: [L, B, Q, 9].
        boxes: the ground truth [B, M].
    """
    targets = encode_boxes(boxes)
    weights = params.new_tensor(BOX_WEIGHTS)
    with torch.no_grad():
        # Neither yaw nor velocity decides who is who: not all classes have the one, and the other may be unknown.
        distance = (params[..., None, :6] - targets[:, None, :, :6]).abs()  # [L, B, Q, M, 6]
        cost = LOSS_WEIGHTS["box_class"] * focal_cost(logits, boxes.label)
        cost = cost + LOSS_WEIGHTS["box_params"] * (distance * weights[:6]).sum(-1)
        pred_idx, gt_idx = match_layers(cost, boxes.valid)
    label, target, found = boxes.label[gt_idx], targets[gt_idx], params[pred_idx]
    count = max(len(label), len(logits))  # at least one of each layer
    wanted = torch.zeros_like(logits)
    wanted[(*pred_idx, label)] = 1.0
    target = torch.cat([target[:, :6], nearest_turn(found[:, 6:8], target[:, 6:8], label), target[:, 8:]], 1)
    known = ~target.isnan()
    difference = torch.where(known, found - target.nan_to_num(), 0.0).abs()
    weights = weights.expand_as(difference).clone()
    weights[label == ROUND, 6:8] = 0.0
    yaw_error = torch.atan2(found[:, 6], found[:, 7]) - torch.atan2(target[:, 6], target[:, 7])
    error = torch.cat([difference[:, :6], wrap_angle(yaw_error)[:, None].abs(), difference[:, 8:]], 1)  # [pairs, 9]
    likelihood = laplace_loss(log_uncertainty[pred_idx], error) * torch.cat([known[:, :7], known[:, 8:]], 1)
    return {
        "box_class": focal_loss(logits, wanted).sum() / count,
        "box_params": (difference * weights).sum() / count,
        "box_uncertainty": likelihood.sum() / count,
    }


def nearest_turn(found: Tensor, target: Tensor, label: Tensor) -> Tensor:
    """The sin and cos of yaw [pairs, 2] that boxes of these classes should have: of two equal ones the nearer."""
    behind = (found.detach() * target).sum(-1) < 0
    return torch.where((behind & (label == TWO_FACED))[:, None], -target, target)


def heatmap_loss(logits: Tensor, boxes: Boxes, grid: BEVGrid) -> Tensor:
    """Penalty-reduced focal loss of CenterNet (https://arxiv.org/abs/1904.07850) on [B, K, X, Y]."""
    target = draw_heatmap(boxes, grid, logits.shape[1])
    probability = logits.float().sigmoid().clamp(1e-4, 1 - 1e-4)
    positive = target == 1
    hit = -((1 - probability) ** 2) * probability.log() * positive
    miss = -((1 - target) ** 4) * probability**2 * (1 - probability).log() * ~positive
    return (hit.sum() + miss.sum()) / positive.sum().clamp(min=1)


def draw_heatmap(boxes: Boxes, grid: BEVGrid, classes: int) -> Tensor:
    """Gaussian bumps at the centres: [B, K, X, Y], 1 at the cell that holds a centre, the highest where bumps meet."""
    B = boxes.valid.shape[0]
    X, Y = grid.shape
    cell = grid.cells(boxes.center).round().long()  # [B, M, 2]
    # Bumps as wide as the object, but at least about one cell.
    sigma = (boxes.size[..., :2].amax(-1) / (6 * min(grid.cell_size))).clamp(0.7, 2.0)
    step = torch.arange(-5, 6, device=cell.device)
    bump = torch.exp(-(step**2) / (2 * sigma[..., None] ** 2))  # [B, M, 11]
    bump = bump[..., :, None] * bump[..., None, :]  # [B, M, 11, 11]
    x, y = (cell[..., i, None] + step for i in range(2))  # [B, M, 11]
    inside = ((x >= 0) & (x < X))[..., :, None] & ((y >= 0) & (y < Y))[..., None, :] & boxes.valid[..., None, None]
    plane = torch.arange(B, device=cell.device)[:, None] * classes + boxes.label  # [B, M]
    place = plane[..., None, None] * (X * Y) + x[..., :, None] * Y + y[..., None, :]
    heat = bump.new_zeros(B * classes * X * Y)
    place, bump = place.masked_fill(~inside, 0), bump.masked_fill(~inside, 0.0)
    return heat.scatter_reduce(0, place.flatten(), bump.flatten(), "amax").view(B, classes, X, Y)


# ---------------------------------------------------------------------------------------------------------------- lines


def line_orderings(lines: Polylines) -> tuple[Tensor, Tensor]:
    """All equivalent orderings of ground-truth lines.

    An open line has two, a ring of P points (the last repeats the first) has 2 (P - 1).

    Args:
        lines: [B, M] lines of P points.

    Returns:
        points [B, M, O, P, 2] with O = 2 (P - 1), and exists [B, M, O] bool.
    """
    points = lines.points  # [B, M, P, 2]
    P = points.shape[-2]
    start = torch.arange(P - 1, device=points.device)
    ring = torch.cat([(start[:, None] + start) % (P - 1), start[:, None]], 1)  # [P - 1, P]
    forward = points[..., ring, :]  # [B, M, P - 1, P, 2]
    rings = torch.cat([forward, forward.flip(-2)], 2)  # [B, M, O, P, 2]
    open_lines = torch.stack([points, points.flip(-2)], 2).repeat_interleave(P - 1, 2)
    exists = torch.zeros(2 * (P - 1), dtype=torch.bool, device=points.device)
    exists[0] = exists[P - 1] = True
    closed = lines.closed[..., None]
    return torch.where(closed[..., None, None], rings, open_lines), closed | exists


def line_losses(logits: Tensor, points: Tensor, log_uncertainty: Tensor, lines: Polylines) -> dict[str, Tensor]:
    """Focal loss of the classes, L1 and likelihood of the points and cosine of the edges of matched lines.

    Args:
        logits: [L, B, Q, K]; points: [L, B, Q, P, 2] metres; log_uncertainty: [L, B, Q, P, 2].
        lines: the ground truth [B, M].
    """
    P = points.shape[3]
    orderings, exists = line_orderings(lines)
    with torch.no_grad():
        M, O = exists.shape[1:]
        distance = torch.cdist(points.float().flatten(3), orderings.flatten(3).flatten(1, 2), p=1)  # [L, B, Q, M * O]
        distance = distance.unflatten(3, (M, O)) / P  # mean L1 distance of a point, metres
        distance, ordering = distance.masked_fill(~exists[:, None], math.inf).min(-1)  # [L, B, Q, M]
        cost = LOSS_WEIGHTS["line_class"] * focal_cost(logits, lines.label) + LOSS_WEIGHTS["line_points"] * distance
        pred_idx, gt_idx = match_layers(cost, lines.valid)
    label, found = lines.label[gt_idx], points[pred_idx]
    target = orderings[(*gt_idx, ordering[(*pred_idx, gt_idx[1])])]  # [pairs, P, 2]
    count = max(len(label), len(logits))  # at least one of each layer
    wanted = torch.zeros_like(logits)
    wanted[(*pred_idx, label)] = 1.0
    cosine = F.cosine_similarity(found.diff(dim=1), target.diff(dim=1), dim=-1, eps=1e-3)
    return {
        "line_class": focal_loss(logits, wanted).sum() / count,
        "line_points": (found - target).abs().sum(-1).mean(-1).sum() / count,
        "line_direction": (1 - cosine).mean(-1).sum() / count,
        "line_uncertainty": laplace_loss(log_uncertainty[pred_idx], (found - target).abs()).mean((1, 2)).sum() / count,
    }


def bev_seg_loss(logits: Tensor, lines: Polylines, grid: BEVGrid) -> Tensor:
    """Focal loss of the BEV segmentation [B, K, X, Y], per cell that a line crosses."""
    target = draw_bev_segmentation(lines, grid, logits.shape[1])
    # An alpha of one half, doubled: cells with and without a line weigh the same, one.
    return 2 * focal_loss(logits, target, alpha=0.5).sum() / target.sum().clamp(min=1)


def draw_bev_segmentation(lines: Polylines, grid: BEVGrid, classes: int) -> Tensor:
    """1 in every cell that a line passes, [B, K, X, Y]: lines are sampled at a quarter of a cell."""
    B = lines.points.shape[0]
    X, Y = grid.shape
    longest = lines.points.diff(dim=2).norm(dim=-1)[lines.valid].amax().item() if lines.valid.any() else 0.0
    steps = max(2, math.ceil(longest / (min(grid.cell_size) / 4)) + 1)
    cell = grid.cells(densify(lines.points, steps)).round().long()  # [B, M, (P - 1) * steps, 2]
    inside = ((cell >= 0) & (cell < cell.new_tensor([X, Y]))).all(-1) & lines.valid[..., None]
    b = torch.arange(B, device=cell.device).view(B, 1, 1).expand_as(inside)
    label = lines.label[..., None].expand_as(inside)
    bev_seg = torch.zeros(B, classes, X, Y, device=cell.device)
    bev_seg[b[inside], label[inside], cell[..., 0][inside], cell[..., 1][inside]] = 1.0
    return bev_seg


def densify(points: Tensor, steps: int) -> Tensor:
    """Lines [..., P, 2] with every edge as `steps` points, its two ends among them: [..., (P - 1) * steps, 2]."""
    t = torch.linspace(0, 1, steps, device=points.device)
    return torch.lerp(points[..., :-1, None, :], points[..., 1:, None, :], t[:, None]).flatten(-3, -2)


# --------------------------------------------------------------------------------------------------------------- images


def image_losses(prediction: ImagePrediction, boxes: Boxes, frame: Frame) -> dict[str, Tensor]:
    """Focal loss of the class each pixel shows; where it shows a box, divergence of its depth and L1 of its heading.

    Args:
        prediction: leading [B].
        boxes: the ground truth [B, M].
        frame: leading [B]; cameras that are absent are left out.

    Returns:
        Weighted scalars by name, as in `set_losses`.
    """
    rig = frame.rig
    B, N, K, h, w = prediction.logits.shape
    D = prediction.depth_logits.shape[2]
    depth, box = draw_boxes(boxes, rig, frame.images.shape[-2:], (h, w))  # [B, N, h, w]
    shown = depth.isfinite() & rig.present[..., None, None]
    count = shown.sum().clamp(min=1)
    b, n, row, column = shown.nonzero(as_tuple=True)  # of the P pixels that show a box
    m = box[shown]
    wanted = torch.zeros_like(prediction.logits)
    wanted[b, n, boxes.label[b, m], row, column] = 1.0
    present = rig.present[..., None, None, None]

    # The depth of the middle of the box, not of the side that faces the camera: there the map wants to have it.
    center_cam = transform_points(invert_rigid(rig.ego_from_cam[b, n].float()), boxes.center[b, m][:, None])
    place = depth_position(center_cam[:, 0, 2], D)  # [P]
    nearness = (1 - (place[:, None] - torch.arange(D, device=place.device)).abs()).clamp(min=0)  # [P, D]
    depth_logits = prediction.depth_logits[b, n, :, row, column]  # [P, D]

    sight = (boxes.center[b, m] - rig.ego_from_cam[b, n, :3, 3])[:, :2]  # [P, 2]
    angle = boxes.yaw[b, m] - torch.atan2(sight[:, 1], sight[:, 0])
    heading = prediction.heading[b, n, :, row, column]  # [P, 2]
    turn = nearest_turn(heading, torch.stack([angle.sin(), angle.cos()], -1), boxes.label[b, m])
    turned = (boxes.label[b, m] != ROUND)[:, None]
    losses = {
        "image_class": (focal_loss(prediction.logits, wanted) * present).sum() / count,
        "image_depth": F.kl_div(depth_logits.log_softmax(-1), nearness, reduction="sum") / count,
        "image_heading": ((heading - turn).abs() * turned).sum() / count,
    }
    return {name: LOSS_WEIGHTS[name] * loss for name, loss in losses.items()}


def draw_boxes(
    boxes: Boxes, rig: CameraRig, image_size: tuple[int, int], feature_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """What the pixels of a feature map show: a ray through the middle of each against every box.

    A box is grown by the half width of a pixel at its distance, so that thin objects are not lost between two rays.
    Only boxes hide boxes; walls and trees are not known.

    Args:
        boxes: [B, M].
        rig: leading [B, N].
        image_size: height and width in pixels of the images that the rig is calibrated for.
        feature_size: height and width of the feature map.

    Returns:
        depth [B, N, h, w] metres along the optical axis to the nearest box, infinite where there is none, and the index
        of that box, int64.
    """
    h, w = feature_size
    device = boxes.center.device
    ego_from_cam = rig.ego_from_cam.float()
    rays_cam, rays, pixel_width = pixel_rays(rig, image_size, feature_size)

    # Only pairs of a camera and a box that may see each other: the ball around the box reaches into the field of view.
    centers_cam = transform_points(invert_rigid(ego_from_cam), boxes.center[:, None])  # [B, N, M, 3]
    distance = centers_cam.norm(dim=-1)  # [B, N, M]
    grown = boxes.size[:, None] / 2 + (distance * pixel_width[..., None] / 2)[..., None]  # [B, N, M, 3]
    radius = grown.norm(dim=-1)
    slope = rays_cam[..., 0].abs().amax(-1)[..., None]  # [B, N, 1]
    beside = (centers_cam[..., 0].abs() - slope * centers_cam[..., 2]) / (1 + slope**2).sqrt()
    b, n, m = ((beside < radius) & (centers_cam[..., 2] > -radius) & boxes.valid[:, None]).nonzero(as_tuple=True)

    cos, sin = boxes.yaw[b, m].cos(), boxes.yaw[b, m].sin()  # [pairs]
    box_from_ego = torch.stack([cos, sin, -sin, cos], -1).unflatten(-1, (2, 2))  # [pairs, 2, 2]

    def turned(vector: Tensor) -> Tensor:
        """[pairs, R, 3] into the frames of the boxes."""
        return torch.cat([(box_from_ego[:, None] * vector[..., None, :2]).sum(-1), vector[..., 2:]], -1)

    start = turned((ego_from_cam[b, n, :3, 3] - boxes.center[b, m])[:, None])  # [pairs, 1, 3]
    direction = turned(rays[b, n])  # [pairs, h * w, 3]
    direction = torch.where(direction.abs() < 1e-6, 1e-6, direction)  # a face parallel to the ray is met very far away
    half = grown[b, n, m][:, None]
    one, other = (-half - start) / direction, (half - start) / direction
    near, far = torch.minimum(one, other).amax(-1), torch.maximum(one, other).amin(-1)  # [pairs, h * w]
    near = near.masked_fill((near > far) | (near < 0), math.inf)
    camera = b * rig.present.shape[1] + n
    depth = torch.full((rig.present.numel(), h * w), math.inf, device=device)
    depth = depth.scatter_reduce(0, camera[:, None].expand_as(near), near, "amin")
    box = torch.zeros(depth.shape, dtype=torch.int64, device=device)
    pair, pixel = ((near == depth[camera]) & near.isfinite()).nonzero(as_tuple=True)
    box[camera[pair], pixel] = m[pair]
    shape = (*rig.present.shape, h, w)
    return depth.view(shape), box.view(shape)


# --------------------------------------------------------------------------------------------------------------- shared


def focal_loss(logits: Tensor, target: Tensor, alpha: float = FOCAL_ALPHA) -> Tensor:
    """Sigmoid focal loss of each element; target is 0 or 1."""
    logits = logits.float()
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    wrong = torch.where(target > 0.5, 1 - probability, probability)
    return torch.where(target > 0.5, alpha, 1 - alpha) * wrong**FOCAL_GAMMA * entropy


def laplace_loss(log_uncertainty: Tensor, error: Tensor) -> Tensor:
    """Negative log likelihood of absolute errors under Laplace distributions of the given scales, element by element.

    The errors count as given: this trains what is known of them, not them (the scale of a Laplace distribution is the
    mean of its absolute error).
    """
    log_uncertainty = log_uncertainty.float().clamp(*LOG_UNCERTAINTY_RANGE)
    return math.log(2) + log_uncertainty + error.detach() * (-log_uncertainty).exp()


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
