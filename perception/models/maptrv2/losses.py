"""Losses of MapTRv2 as published (https://arxiv.org/abs/2308.05736), with depth learned from boxes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from perception.grid import BEVGrid
from perception.models.maptr.losses import (
    LINE_LOSS_WEIGHTS,
    lidar_lines,
    line_losses,
    maptr_losses,
    published_orderings,
)
from perception.models.published.backbone import padded_size
from perception.models.published.geometry import lidar_projections
from perception.models.published.losses import sum_layers
from perception.targets import densify, ray_cast_boxes
from perception.types import Frame, FrameObjects, Polylines, map_tensors

if TYPE_CHECKING:
    from perception.models.mapqr.model import MapQR, MapQROutputs
    from perception.models.maptrv2.model import MapTRv2, MapTRv2Outputs

# Of the one-to-many queries and the segmentation heads.
AUXILIARY_LOSS_WEIGHTS = {
    "one_to_many_class": 2.0, "one_to_many_points": 5.0, "one_to_many_direction": 0.005, "bev_seg": 1.0,
    "image_seg": 2.0,
}  # fmt: skip
MAPTRV2_LOSS_WEIGHTS = LINE_LOSS_WEIGHTS | AUXILIARY_LOSS_WEIGHTS | {"depth": 3.0}
LINE_HEIGHT = -1.6  # metres along z of the LiDAR: where the published code takes the road to be
BEV_RADIUS = 2.5  # cells
LINE_SAMPLES = 200  # points of a line that are projected
FAR_PIXEL = 1e6  # of points at the plane of the camera


def maptrv2_losses(network: MapTRv2, prediction: MapTRv2Outputs, gt: FrameObjects, frame: Frame) -> dict[str, Tensor]:
    """Computes the weighted losses by name, summed over decoder layers; names as in `MAPTRV2_LOSS_WEIGHTS`.

    The published network learns depth from LiDAR points. Here it learns depth from the boxes in the images.

    Args:
        network: the network of the prediction, in training mode.
        prediction: leading [B].
        gt: ground truth [B] in the ego frame.
        frame: leading [B].
    """
    losses = line_losses(prediction.logits, prediction.points, gt, frame.ego_from_lidar, network.config)
    h, w = prediction.depth_logits.shape[-2:]
    depth, _ = ray_cast_boxes(gt.boxes, frame.rig, padded_size(frame.images), (h, w))
    losses |= auxiliary_losses(network, prediction, gt.lines, frame)
    return losses | {"depth": depth_loss(network, prediction, depth, frame.rig.present)}


def depth_loss(network: MapTRv2, prediction: MapTRv2Outputs, depth: Tensor, present: Tensor) -> Tensor:
    """Computes the weighted loss of the depth bins.

    Args:
        network: the network of the prediction.
        prediction: leading [B].
        depth: [B, N, h, w] metres along the optical axis; values outside the depth bins do not count.
        present: [B, N] bool; of absent cameras nothing is learned.
    """
    first, end, step = network.config.depth_range
    supervised = (depth >= first) & (depth < end) & present[..., None, None]
    b, n, v, u = supervised.nonzero(as_tuple=True)
    log_probability = prediction.depth_logits[b, n, :, v, u].log_softmax(-1)  # [pixels, D]
    bins = ((depth[supervised] - first) / step).long()
    cross_entropy = -log_probability.gather(1, bins[:, None]).sum() / max(len(bins), 1)
    return MAPTRV2_LOSS_WEIGHTS["depth"] * cross_entropy


def auxiliary_losses(
    network: MapTRv2 | MapQR, prediction: MapTRv2Outputs | MapQROutputs, gt: Polylines, frame: Frame
) -> dict[str, Tensor]:
    """Computes the weighted losses of the one-to-many queries and of the segmentation of lines in BEV and in images.

    Args:
        network: the network of the prediction, in training mode.
        prediction: leading [B].
        gt: lines of the ground truth [B] in the ego frame.
        frame: leading [B].
    """
    config = network.config
    lines = lidar_lines(gt, frame.ego_from_lidar)
    repeated = map_tensors(lambda tensor: tensor.repeat_interleave(config.one_to_many_repeats, 1), lines)
    layers = maptr_losses(
        prediction.one_to_many_logits, prediction.one_to_many_points, *published_orderings(repeated), repeated.label,
        repeated.valid, config.low, config.high,
    )  # fmt: skip
    losses = {name.replace("line", "one_to_many"): loss for name, loss in sum_layers(layers).items()}

    rows, columns = config.bev
    grid = BEVGrid((config.low[0], config.high[0]), (config.low[1], config.high[1]), (columns, rows))
    bev_seg = draw_lines_in_bev(lines, grid)
    h, w = prediction.image_seg_logits.shape[-2:]
    image_seg = draw_lines_in_images(lines, lidar_projections(frame), padded_size(frame.images), (h, w))
    return losses | segmentation_losses(network, prediction, bev_seg, image_seg, frame.rig.present)


def segmentation_losses(
    network: MapTRv2 | MapQR,
    prediction: MapTRv2Outputs | MapQROutputs,
    bev_seg: Tensor,
    image_seg: Tensor,
    present: Tensor,
) -> dict[str, Tensor]:
    """Computes the weighted losses of the segmentation of lines in BEV and in images by name.

    Args:
        network: the network of the prediction.
        prediction: leading [B].
        bev_seg: lines in BEV [B, 1, rows, columns], 0 or 1.
        image_seg: lines in the feature maps [B, N, 1, h, w], 0 or 1.
        present: [B, N] bool; of absent cameras nothing is learned.
    """
    known = present[..., None, None, None].expand_as(image_seg)
    image_loss = network.head.loss_pv_seg(prediction.image_seg_logits[known], image_seg[known])
    return {
        "bev_seg": AUXILIARY_LOSS_WEIGHTS["bev_seg"] * network.head.loss_seg(prediction.bev_seg_logits, bev_seg),
        "image_seg": AUXILIARY_LOSS_WEIGHTS["image_seg"] * image_loss,
    }


def draw_lines_in_bev(lines: Polylines, grid: BEVGrid) -> Tensor:
    """Draws lines [B, M] in the level LiDAR frame as targets of the BEV segmentation.

    The published code asks OpenCV for a thickness of 3, which fills the cells within 2.5 cells of a line.

    Returns:
        [B, 1, rows, columns], 1 in the cells of a line and 0 elsewhere; rows are along y of the grid.
    """
    columns, rows = grid.shape
    valid = lines.valid[..., None]
    longest = lines.points.diff(dim=2).norm(dim=-1).masked_fill(~valid, 0.0).amax().item() if valid.any() else 0.0
    cell = grid.cells(densify(lines.points, math.ceil(2 * longest / min(grid.cell_size)) + 2))  # [B, M, S, 2]
    side = torch.arange(-3, 4, device=cell.device)
    near = cell.round()[..., None, :] + torch.cartesian_prod(side, side)  # [B, M, S, 49, 2]
    inside = ((near >= 0) & (near < near.new_tensor([columns, rows]))).all(-1) & valid[..., None]
    b, m, s, k = (inside & ((near - cell[..., None, :]).norm(dim=-1) <= BEV_RADIUS)).nonzero(as_tuple=True)
    column, row = near[b, m, s, k].long().unbind(-1)
    image = torch.zeros(len(cell), 1, rows, columns, device=cell.device)
    image[b, 0, row, column] = 1.0
    return image


def draw_lines_in_images(
    lines: Polylines, img_from_lidar: Tensor, image_size: tuple[int, int], feature_size: tuple[int, int]
) -> Tensor:
    """Draws lines into feature maps as published, as targets of the image segmentation.

    A line lies in the plane `LINE_HEIGHT` of the LiDAR frame, which is tilted. About 200 points of it are projected by
    the cameras' poses at their exposures; those in front of the camera are truncated to pixels and joined.

    Args:
        lines: [B, M] in the level LiDAR frame, from `lidar_lines`.
        img_from_lidar: [B, N, 4, 4] from `lidar_projections`.
        image_size: height and width in pixels of the images that `img_from_lidar` projects to.
        feature_size: height and width of the feature maps.

    Returns:
        [B, N, 1, h, w], 1 in each pixel that a line passes and 0 elsewhere.
    """
    (H, W), (h, w) = image_size, feature_size
    dense = densify(lines.points, math.ceil(LINE_SAMPLES / (lines.points.shape[2] - 1)))  # [B, M, S, 2]
    points = F.pad(F.pad(dense, (0, 1), value=LINE_HEIGHT), (0, 1), value=1.0)
    projected = torch.einsum("bnij,bmsj->bnmsi", img_from_lidar, points)
    depth = projected[..., 2]
    uv = projected[..., :2] / depth.clamp(min=1e-6)[..., None] * projected.new_tensor([w / W, h / H])
    pixel = uv.clamp(-FAR_PIXEL, FAR_PIXEL).long()  # as published, truncated towards zero
    ahead = (depth > 0) & lines.valid[:, None, :, None]  # zero for absent cameras
    image = torch.zeros(*ahead.shape[:2], 1, h, w, device=uv.device)
    # As published, points that are not ahead are left out: an edge runs from a point to the next one ahead.
    b, n, m, s = ahead.nonzero(as_tuple=True)  # in the order of the lines' points
    corner = pixel[b, n, m, s]
    of_line = (b * ahead.shape[1] + n) * ahead.shape[2] + m
    edge = (of_line[1:] == of_line[:-1]).nonzero()[:, 0]
    on_edge = joined_pixels(corner[edge], corner[edge + 1], max(h, w))  # [edges, steps, 2]
    alone = corner[:, None]  # a line of one point
    for pixels, owner in ((on_edge, edge), (alone, torch.arange(len(b), device=b.device))):
        x, y = pixels.unbind(-1)
        inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
        k = owner[:, None].expand_as(x)[inside]
        image[b[k], n[k], 0, y[inside], x[inside]] = 1.0
    return image


def joined_pixels(start: Tensor, end: Tensor, size: int) -> Tensor:
    """Returns the pixels of the straight lines between pairs of pixels, as OpenCV draws them with thickness 1.

    Args:
        start, end: [E, 2] int64 column and row.
        size: pixels with both coordinates in 0..size - 1 are found.

    Returns:
        [E, size, 2]; -1 where a line has fewer pixels.
    """
    swap = (start[:, :1] > end[:, :1]).expand_as(start)
    start, end = torch.where(swap, end, start), torch.where(swap, start, end)  # from left to right
    delta = end - start
    steep = (delta[:, 1].abs() > delta[:, 0])[:, None]  # the row changes faster than the column
    start, delta = (torch.where(steep, x.flip(1), x) for x in (start, delta))  # major axis first
    (x, y), (dx, dy) = start.unbind(1), delta.unbind(1)
    major = torch.arange(size, device=x.device).expand(len(x), -1)
    length = dx.abs()[:, None]
    steps = (major - x[:, None]) * torch.where(dx < 0, -1, 1)[:, None]  # from the left end
    exists = (steps >= 0) & (steps <= length)
    # The other coordinate is rounded, halves towards the left end.
    moved = -((length - 2 * dy.abs()[:, None] * steps) // (2 * length).clamp(min=1))
    minor = y[:, None] + dy.sign()[:, None] * torch.where(length > 0, moved, 0)
    pixels = torch.stack([major, minor], -1)
    pixels = torch.where(steep[:, None], pixels.flip(2), pixels)
    return torch.where(exists[..., None], pixels, -1)
