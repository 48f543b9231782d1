"""Matching and losses of BEVFormer, MapTR and MapTRv2 as they were published, for training these networks.

They differ from `perception.losses` in what is compared: boxes as the published networks encode them, with little
weight on velocities, and a box whose velocity is not known teaches nothing but its class; lines in shares of their
range, and rings in one direction only. Losses add up over the decoder layers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from perception.grid import BEVGrid
from perception.losses import (
    Match,
    densify,
    draw_bev_segmentation,
    draw_boxes,
    focal_cost,
    focal_loss,
    hungarian,
    line_orderings,
)
from perception.models.bev_encoder import see_points
from perception.models.bevformer import BEVFormer, RawBoxes
from perception.models.maptr import MapTR, RawLines
from perception.models.maptrv2 import LiftedLines, MapTRv2
from perception.models.published_backbone import padded_size
from perception.types import Boxes, CameraRig, Frame, FrameObjects, Polylines, map_tensors

BOX_CODE_WEIGHTS = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2)
# The total, and so the size of a gradient that is clipped, is as published.
BOX_LOSS_WEIGHTS = {"box_class": 2.0, "box_params": 0.25}
LINE_LOSS_WEIGHTS = {"line_class": 2.0, "line_points": 5.0, "line_direction": 0.005}
LIFTED_LOSS_WEIGHTS = LINE_LOSS_WEIGHTS | {
    "many_class": 2.0, "many_points": 5.0, "many_direction": 0.005, "bev_seg": 1.0, "image_seg": 2.0, "depth": 3.0,
}  # fmt: skip


def lidar_boxes(boxes: Boxes, ego_from_lidar: Tensor) -> Tensor:
    """Boxes in the convention of the published code, the way back from `perception.models.bevformer.decode_boxes`.

    Args:
        boxes: [B, M] in the ego frame.
        ego_from_lidar: [4, 4].

    Returns:
        [B, M, 9]: x, y, z of the centre, width, length, height, yaw of mmdet3d before 1.0, velocity; LiDAR's frame.
    """
    turn = ego_from_lidar[:3, :3]
    center = (boxes.center - ego_from_lidar[:3, 3]) @ turn
    axis = torch.stack([boxes.yaw.cos(), boxes.yaw.sin()], -1) @ turn[:2, :2]
    yaw = -torch.atan2(axis[..., 1], axis[..., 0]) - math.pi / 2
    return torch.cat([center, boxes.size[..., [1, 0, 2]], yaw[..., None], boxes.velocity @ turn[:2, :2]], -1)


def encode_lidar_boxes(boxes: Tensor) -> Tensor:
    """Boxes [..., 9] of `lidar_boxes` as the parameters [..., 10] x, y, log w, log l, z, log h, sin, cos, v."""
    x, y, z, w, l, h, yaw, vx, vy = boxes.unbind(-1)
    w, l, h = (side.clamp(min=1e-2).log() for side in (w, l, h))
    return torch.stack([x, y, w, l, z, h, yaw.sin(), yaw.cos(), vx, vy], -1)


def match_boxes(logits: Tensor, params: Tensor, targets: Tensor, label: Tensor, valid: Tensor) -> tuple[Match, Tensor]:
    """The published assignment of one layer.

    Args:
        logits: [B, Q, K]; params: [B, Q, 10].
        targets: [B, M, 10] from `encode_lidar_boxes`; label, valid: [B, M].

    Returns:
        The match, and the cost [B, Q, M] that it comes from.
    """
    with torch.no_grad():
        cost = BOX_LOSS_WEIGHTS["box_class"] * focal_cost(logits, label)
        distance = torch.cdist(params[..., :8], targets[..., :8], p=1)
        cost = cost + BOX_LOSS_WEIGHTS["box_params"] * distance
        return hungarian(cost, valid), cost


def bevformer_losses(
    logits: Tensor, params: Tensor, targets: Tensor, label: Tensor, valid: Tensor
) -> list[dict[str, Tensor]]:
    """Weighted losses of each layer of raw boxes [L, B, Q, ...]; the ground truth as in `match_boxes`."""
    losses = []
    for one_logits, one_params in zip(logits, params, strict=True):
        match, _ = match_boxes(one_logits, one_params, targets, label, valid)
        count = max(len(match.query), 1)
        wanted = torch.zeros_like(one_logits)
        wanted[match.batch, match.query, label[match.batch, match.target]] = 1.0
        target = targets[match.batch, match.target]
        known = target.isfinite().all(-1)  # what is not known of a box, leaves all of it out
        difference = (one_params[match.batch, match.query] - target)[known].abs()
        losses.append(
            {
                "box_class": focal_loss(one_logits, wanted).sum() / count,
                "box_params": (difference * difference.new_tensor(BOX_CODE_WEIGHTS)).sum() / count,
            }
        )
    return [{name: BOX_LOSS_WEIGHTS[name] * loss for name, loss in layer.items()} for layer in losses]


def published_orderings(lines: Polylines) -> tuple[Tensor, Tensor]:
    """Orderings that MapTR takes for equal: open lines both ways, rings one way.

    The published code starts a ring at each vertex of its map polygon; here it starts at each of its points.

    Args:
        lines: [B, M] lines of P points.

    Returns:
        points [B, M, P, P, 2] (the last is an open line walked backwards), exists [B, M, P] bool.
    """
    P = lines.points.shape[-2]
    points, exists = line_orderings(lines)  # rings first one way from each point, then the other
    exists = exists[:, :, :P].clone()
    exists[..., -1] &= ~lines.closed
    return points[:, :, :P], exists


def match_lines(
    logits: Tensor, points: Tensor, shares: Tensor, exists: Tensor, label: Tensor, valid: Tensor
) -> tuple[Match, Tensor]:
    """The published assignment of one layer.

    Args:
        logits: [B, Q, K]; points: [B, Q, P, 2] in 0..1.
        shares: the ground truth [B, M, O, P, 2] in 0..1, in O orderings; exists: [B, M, O]; label, valid: [B, M].

    Returns:
        The match, and which ordering fits each pair best, [B, Q, M].
    """
    with torch.no_grad():
        M, O = exists.shape[1:]
        distance = torch.cdist(points.float().flatten(2), shares.flatten(3).flatten(1, 2), p=1).unflatten(2, (M, O))
        distance, best = distance.masked_fill(~exists[:, None], math.inf).min(-1)  # [B, Q, M]
        cost = LINE_LOSS_WEIGHTS["line_class"] * focal_cost(logits, label)
        cost = cost + LINE_LOSS_WEIGHTS["line_points"] * distance
        return hungarian(cost, valid), best


def maptr_losses(
    logits: Tensor,
    points: Tensor,
    orderings: Tensor,
    exists: Tensor,
    label: Tensor,
    valid: Tensor,
    low: tuple[float, ...],
    high: tuple[float, ...],
) -> list[dict[str, Tensor]]:
    """Weighted losses of each layer of raw lines.

    Args:
        logits: [L, B, Q, K]; points: [L, B, Q, P, 2] in 0..1 over the range.
        orderings: the ground truth [B, M, O, P, 2] in metres, in the frame of the range, and which of its orderings
            exist [B, M, O], as `published_orderings` gives them; label, valid: [B, M].
        low, high: ends of the range in metres, x and y first.
    """
    start, end = (points.new_tensor(x[:2]) for x in (low, high))
    extent = end - start
    shares = (orderings - start) / extent  # [B, M, O, P, 2]
    losses = []
    for one_logits, one_points in zip(logits, points, strict=True):
        match, best = match_lines(one_logits, one_points, shares, exists, label, valid)
        count = max(len(match.query), 1)
        wanted = torch.zeros_like(one_logits)
        wanted[match.batch, match.query, label[match.batch, match.target]] = 1.0
        ordering = best[match.batch, match.query, match.target]
        target = orderings[match.batch, match.target, ordering]  # [pairs, P, 2] metres
        found = one_points[match.batch, match.query]
        cosine = F.cosine_similarity((found * extent).diff(dim=1), target.diff(dim=1), dim=-1)
        losses.append(
            {
                "line_class": focal_loss(one_logits, wanted).sum() / count,
                "line_points": (found - (target - start) / extent).abs().sum() / count,
                "line_direction": (1 - cosine).sum() / count,
            }
        )
    return [{name: LINE_LOSS_WEIGHTS[name] * loss for name, loss in layer.items()} for layer in losses]


def lifted_losses(network: MapTRv2, prediction: LiftedLines, gt: FrameObjects, frame: Frame) -> dict[str, Tensor]:
    """Weighted losses of what MapTRv2 says beside its lines: further queries, segmentation and depth.

    The published network learns depth from the LiDAR. Here it learns it where images show boxes, from the boxes.

    Args:
        network: says in which frame and range its outputs are.
        prediction: leading [B].
        gt, frame: leading [B].
    """
    config, rig = network.config, frame.rig
    lines = lidar_lines(gt.lines, network.ego_from_lidar)
    many = map_tensors(lambda tensor: tensor.repeat_interleave(config.many_times, 1), lines)
    orderings, exists = published_orderings(many)
    layers = maptr_losses(
        prediction.many_logits, prediction.many_points, orderings, exists, many.label, many.valid, config.low,
        config.high,
    )  # fmt: skip
    losses = {name.replace("line", "many"): loss for name, loss in _summed(layers).items()}

    rows, columns = config.bev
    grid = BEVGrid((config.low[0], config.high[0]), (config.low[1], config.high[1]), (columns, rows))
    passed = (
        draw_bev_segmentation(lines, grid, config.classes).amax(1, keepdim=True).transpose(2, 3)
    )  # [B, 1, rows, columns]
    losses["bev_seg"] = network.head.loss_seg.loss_fn(prediction.bev_seg_logits, passed)
    image_size = padded_size(frame.images)
    shown = draw_lines_in_images(gt.lines, rig, image_size, prediction.image_logits.shape[-2:])
    told = rig.present[..., None, None, None].expand_as(shown)
    image_loss = network.head.loss_pv_seg.loss_fn(prediction.image_logits[told], shown[told])
    losses["image_seg"] = LIFTED_LOSS_WEIGHTS["image_seg"] * image_loss

    depth, _ = draw_boxes(gt.boxes, rig, image_size, prediction.depth_logits.shape[-2:])  # [B, N, h, w]
    first, end, step = config.depths
    near = (depth >= first) & (depth < end) & rig.present[..., None, None]
    b, n, v, u = near.nonzero(as_tuple=True)
    likely = prediction.depth_logits[b, n, :, v, u].log_softmax(-1)  # [pixels, D]
    bins = ((depth[near] - first) / step).long()
    unlikely = -likely.gather(1, bins[:, None]).sum() / max(len(bins), 1)
    losses["depth"] = LIFTED_LOSS_WEIGHTS["depth"] * unlikely
    return losses


def draw_lines_in_images(
    lines: Polylines, rig: CameraRig, image_size: tuple[int, int], feature_size: tuple[int, int]
) -> Tensor:
    """1 in every pixel of a feature map that a line on the ground passes, [B, N, 1, h, w].

    Args:
        lines: [B, M] in the ego frame, at height 0.
        rig: leading [B, N].
        image_size: height and width in pixels of the images that the rig is calibrated for.
        feature_size: height and width of the feature map.
    """
    h, w = feature_size
    dense = densify(lines.points, 8)  # [B, M, (P - 1) * 8, 2]
    points = F.pad(dense.flatten(1, 2), (0, 1))  # [B, points, 3]
    uv, _, seen = see_points(rig, points, image_size)  # [B, N, points, ...]
    seen = seen & lines.valid.repeat_interleave(dense.shape[2], 1)[:, None]
    b, n, p = seen.nonzero(as_tuple=True)
    u, v = (uv[b, n, p] * uv.new_tensor([w, h])).long().unbind(-1)
    image = torch.zeros(*seen.shape[:2], 1, h, w, device=uv.device)
    image[b, n, 0, v.clamp(max=h - 1), u.clamp(max=w - 1)] = 1.0
    return image


def lidar_lines(lines: Polylines, ego_from_lidar: Tensor) -> Polylines:
    """Lines of the ego frame in the LiDAR's."""
    return lines._replace(points=(lines.points - ego_from_lidar[:2, 3]) @ ego_from_lidar[:2, :2])


def loss_weights(network: BEVFormer | MapTR | MapTRv2) -> dict[str, float]:
    """The losses of a network by name, and what they count."""
    return {BEVFormer: BOX_LOSS_WEIGHTS, MapTR: LINE_LOSS_WEIGHTS, MapTRv2: LIFTED_LOSS_WEIGHTS}[type(network)]


def losses_of(
    network: BEVFormer | MapTR | MapTRv2, prediction: RawBoxes | RawLines | LiftedLines, gt: FrameObjects, frame: Frame
) -> dict[str, Tensor]:
    """Weighted losses of one frame, added up over the layers.

    Args:
        network: says in which frame and range its outputs are.
        prediction: of its `forward`, leading [L, B].
        gt: leading [B], in the ego frame.
        frame: leading [B], what the network saw.
    """
    config, ego_from_lidar = network.config, network.ego_from_lidar
    if isinstance(network, BEVFormer):
        boxes = lidar_boxes(gt.boxes, ego_from_lidar)
        low, high = (boxes.new_tensor(x[:2]) for x in (config.low, config.high))
        inside = ((boxes[..., :2] > low) & (boxes[..., :2] < high)).all(-1)
        targets, valid = encode_lidar_boxes(boxes), gt.boxes.valid & inside
        return _summed(bevformer_losses(*prediction, targets, gt.boxes.label, valid))
    lines = lidar_lines(gt.lines, ego_from_lidar)
    layers = maptr_losses(
        prediction.logits, prediction.points, *published_orderings(lines), lines.label, lines.valid, config.low,
        config.high,
    )  # fmt: skip
    further = lifted_losses(network, prediction, gt, frame) if isinstance(network, MapTRv2) else {}
    return _summed(layers) | further


def _summed(layers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([layer[name] for layer in layers]).sum() for name in layers[0]}
