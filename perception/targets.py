"""Training targets from ground truth: heat map, BEV segmentation, line orderings, and what the images show."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from perception.cameras import pixel_rays
from perception.geometry import invert_rigid, transform_points
from perception.grid import BEVGrid
from perception.types import Boxes, CameraRig, Polylines


def draw_heatmap(boxes: Boxes, grid: BEVGrid, classes: int) -> Tensor:
    """Draws a Gaussian at each box centre, [B, K, X, Y]: 1 in the cell of the centre, the maximum where they
    overlap."""
    B = boxes.valid.shape[0]
    X, Y = grid.shape
    cell = grid.cells(boxes.center).round().long()  # [B, M, 2]
    # As wide as the object, but at least about one cell.
    sigma = (boxes.size[..., :2].amax(-1) / (6 * min(grid.cell_size))).clamp(0.7, 2.0)
    step = torch.arange(-5, 6, device=cell.device)
    gaussian = torch.exp(-(step**2) / (2 * sigma[..., None] ** 2))  # [B, M, 11]
    gaussian = gaussian[..., :, None] * gaussian[..., None, :]  # [B, M, 11, 11]
    x, y = (cell[..., i, None] + step for i in range(2))  # [B, M, 11]
    inside = ((x >= 0) & (x < X))[..., :, None] & ((y >= 0) & (y < Y))[..., None, :] & boxes.valid[..., None, None]
    plane = torch.arange(B, device=cell.device)[:, None] * classes + boxes.label  # [B, M]
    index = plane[..., None, None] * (X * Y) + x[..., :, None] * Y + y[..., None, :]
    heat = gaussian.new_zeros(B * classes * X * Y)
    index, gaussian = index.masked_fill(~inside, 0), gaussian.masked_fill(~inside, 0.0)
    return heat.scatter_reduce(0, index.flatten(), gaussian.flatten(), "amax").view(B, classes, X, Y)


def line_orderings(lines: Polylines) -> tuple[Tensor, Tensor]:
    """Lists all equivalent orderings of ground-truth lines.

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


def draw_bev_segmentation(lines: Polylines, grid: BEVGrid, classes: int) -> Tensor:
    """Draws lines on the grid, [B, K, X, Y]: 1 in each cell that a line crosses, sampled at a quarter of a cell."""
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
    """Interpolates `steps` points on each edge of lines [..., P, 2], both ends included: [..., (P - 1) * steps, 2]."""
    t = torch.linspace(0, 1, steps, device=points.device)
    return torch.lerp(points[..., :-1, None, :], points[..., 1:, None, :], t[:, None]).flatten(-3, -2)


def ray_cast_boxes(
    boxes: Boxes, rig: CameraRig, image_size: tuple[int, int], feature_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Ray-casts boxes into a feature map: finds the nearest box that the ray through each pixel centre meets.

    A box grows by half the width of a pixel at its distance, so that thin objects do not fall between two rays. Boxes
    occlude each other; other objects, such as walls, are not in the ground truth.

    Args:
        boxes: [B, M].
        rig: leading [B, N].
        image_size: height and width in pixels of the images that the rig is calibrated for.
        feature_size: height and width of the feature map.

    Returns:
        depth [B, N, h, w] metres along the optical axis to the nearest box, infinite without one, and the index of that
        box, int64.
    """
    h, w = feature_size
    device = boxes.center.device
    ego_from_cam = rig.ego_from_cam.float()
    rays_cam, rays, pixel_width = pixel_rays(rig, image_size, feature_size)

    # Pairs of camera and box are tested only if the sphere around the box reaches into the field of view.
    centers_cam = transform_points(invert_rigid(ego_from_cam), boxes.center[:, None])  # [B, N, M, 3]
    distance = centers_cam.norm(dim=-1)  # [B, N, M]
    grown = boxes.size[:, None] / 2 + (distance * pixel_width[..., None] / 2)[..., None]  # [B, N, M, 3]
    radius = grown.norm(dim=-1)
    slope = rays_cam[..., 0].abs().amax(-1)[..., None]  # [B, N, 1]
    outside = (centers_cam[..., 0].abs() - slope * centers_cam[..., 2]) / (1 + slope**2).sqrt()
    b, n, m = ((outside < radius) & (centers_cam[..., 2] > -radius) & boxes.valid[:, None]).nonzero(as_tuple=True)

    cos, sin = boxes.yaw[b, m].cos(), boxes.yaw[b, m].sin()  # [pairs]
    box_from_ego = torch.stack([cos, sin, -sin, cos], -1).unflatten(-1, (2, 2))  # [pairs, 2, 2]

    def in_box_frame(vector: Tensor) -> Tensor:
        """Rotates vectors [pairs, R, 3] into the frames of the boxes."""
        return torch.cat([(box_from_ego[:, None] * vector[..., None, :2]).sum(-1), vector[..., 2:]], -1)

    start = in_box_frame((ego_from_cam[b, n, :3, 3] - boxes.center[b, m])[:, None])  # [pairs, 1, 3]
    direction = in_box_frame(rays[b, n])  # [pairs, h * w, 3]
    direction = torch.where(direction.abs() < 1e-6, 1e-6, direction)  # a ray parallel to a face meets it very far away
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


def encode_boxes(boxes: Boxes) -> Tensor:
    """Encodes boxes [B, M] as box parameters [B, M, 10], see `perception.types.Prediction.box_params`."""
    yaw = torch.stack([boxes.yaw.sin(), boxes.yaw.cos()], -1)
    return torch.cat([boxes.center, boxes.size.clamp(min=1e-2).log(), yaw, boxes.velocity], -1)
