"""Losses of MapTRv2 as published (https://arxiv.org/abs/2308.05736)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from perception.cameras import see_points
from perception.grid import BEVGrid
from perception.models.maptr.losses import LINE_LOSS_WEIGHTS, lidar_lines, maptr_losses, published_orderings
from perception.models.published.backbone import padded_size
from perception.models.published.losses import sum_layers
from perception.targets import densify, draw_bev_segmentation, ray_cast_boxes
from perception.types import CameraRig, Frame, FrameObjects, Polylines, map_tensors

if TYPE_CHECKING:
    from perception.models.maptrv2.model import LiftedLines, MapTRv2

LIFTED_LOSS_WEIGHTS = LINE_LOSS_WEIGHTS | {
    "many_class": 2.0, "many_points": 5.0, "many_direction": 0.005, "bev_seg": 1.0, "image_seg": 2.0, "depth": 3.0,
}  # fmt: skip


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
    losses = {name.replace("line", "many"): loss for name, loss in sum_layers(layers).items()}

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

    depth, _ = ray_cast_boxes(gt.boxes, rig, image_size, prediction.depth_logits.shape[-2:])  # [B, N, h, w]
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
