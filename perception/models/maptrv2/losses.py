"""Losses of MapTRv2 as published (https://arxiv.org/abs/2308.05736), with depth learned from boxes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from perception.cameras import see_points
from perception.grid import BEVGrid
from perception.models.maptr.losses import (
    LINE_LOSS_WEIGHTS,
    lidar_lines,
    line_losses,
    maptr_losses,
    published_orderings,
)
from perception.models.published.backbone import padded_size
from perception.models.published.losses import sum_layers
from perception.targets import densify, draw_bev_segmentation, ray_cast_boxes
from perception.types import CameraRig, Frame, FrameObjects, Polylines, map_tensors

if TYPE_CHECKING:
    from perception.models.maptrv2.model import MapTRv2, MapTRv2Outputs

MAPTRV2_LOSS_WEIGHTS = LINE_LOSS_WEIGHTS | {
    "one_to_many_class": 2.0, "one_to_many_points": 5.0, "one_to_many_direction": 0.005, "bev_seg": 1.0,
    "image_seg": 2.0, "depth": 3.0,
}  # fmt: skip


def maptrv2_losses(network: MapTRv2, prediction: MapTRv2Outputs, gt: FrameObjects, frame: Frame) -> dict[str, Tensor]:
    """Computes the weighted losses by name, summed over decoder layers; names as in `MAPTRV2_LOSS_WEIGHTS`.

    The published network learns depth from LiDAR points. Here it learns depth from the boxes in the images.

    Args:
        network: the network of the prediction, in training mode.
        prediction: leading [B].
        gt: ground truth [B] in the ego frame.
        frame: leading [B].
    """
    config, rig = network.config, frame.rig
    losses = line_losses(prediction.logits, prediction.points, gt, frame.ego_from_lidar, config)
    lines = lidar_lines(gt.lines, frame.ego_from_lidar)
    repeated = map_tensors(lambda tensor: tensor.repeat_interleave(config.one_to_many_repeats, 1), lines)
    layers = maptr_losses(
        prediction.one_to_many_logits, prediction.one_to_many_points, *published_orderings(repeated), repeated.label,
        repeated.valid, config.low, config.high,
    )  # fmt: skip
    losses |= {name.replace("line", "one_to_many"): loss for name, loss in sum_layers(layers).items()}

    rows, columns = config.bev
    grid = BEVGrid((config.low[0], config.high[0]), (config.low[1], config.high[1]), (columns, rows))
    bev_seg = draw_bev_segmentation(lines, grid, config.classes).amax(1, keepdim=True).transpose(2, 3)
    losses["bev_seg"] = network.head.loss_seg(prediction.bev_seg_logits, bev_seg)  # [B, 1, rows, columns]

    image_size = padded_size(frame.images)
    h, w = prediction.image_seg_logits.shape[-2:]
    image_seg = draw_lines_in_images(gt.lines, rig, image_size, (h, w))
    present = rig.present[..., None, None, None].expand_as(image_seg)
    image_loss = network.head.loss_pv_seg(prediction.image_seg_logits[present], image_seg[present])
    losses["image_seg"] = MAPTRV2_LOSS_WEIGHTS["image_seg"] * image_loss

    depth, _ = ray_cast_boxes(gt.boxes, rig, image_size, (h, w))  # [B, N, h, w]
    first, end, step = config.depth_range
    supervised = (depth >= first) & (depth < end) & rig.present[..., None, None]
    b, n, v, u = supervised.nonzero(as_tuple=True)
    log_probability = prediction.depth_logits[b, n, :, v, u].log_softmax(-1)  # [pixels, D]
    bins = ((depth[supervised] - first) / step).long()
    cross_entropy = -log_probability.gather(1, bins[:, None]).sum() / max(len(bins), 1)
    losses["depth"] = MAPTRV2_LOSS_WEIGHTS["depth"] * cross_entropy
    return losses


def draw_lines_in_images(
    lines: Polylines, rig: CameraRig, image_size: tuple[int, int], feature_size: tuple[int, int]
) -> Tensor:
    """Draws lines on the ground into feature maps, as targets of the image segmentation.

    Args:
        lines: [B, M] in the ego frame, at height 0.
        rig: leading [B, N].
        image_size: height and width in pixels of the images that the rig is calibrated for.
        feature_size: height and width of the feature maps.

    Returns:
        [B, N, 1, h, w], 1 in each pixel that a line passes and 0 elsewhere.
    """
    h, w = feature_size
    dense = densify(lines.points, 8)  # [B, M, (P - 1) * 8, 2]
    points = F.pad(dense.flatten(1, 2), (0, 1))  # [B, points, 3]
    uv, _, visible = see_points(rig, points, image_size)  # [B, N, points, ...]
    visible = visible & lines.valid.repeat_interleave(dense.shape[2], 1)[:, None]
    b, n, p = visible.nonzero(as_tuple=True)
    u, v = (uv[b, n, p] * uv.new_tensor([w, h])).long().unbind(-1)
    image = torch.zeros(*visible.shape[:2], 1, h, w, device=uv.device)
    image[b, n, 0, v.clamp(max=h - 1), u.clamp(max=w - 1)] = 1.0
    return image
