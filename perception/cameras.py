"""Computes camera geometry: pixel rays, projection, visibility, and the cameras that see a point best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from perception.geometry import invert_rigid, project_points, transform_points
from perception.types import NUSCENES_EGO_FROM_LIDAR, CameraRig

MIN_DEPTH = 0.1  # metres; nearer points count as not visible


class PixelRays(NamedTuple):
    """Viewing rays through the pixel centres of a feature map, with length 1 along the optical axis."""

    cam: Tensor  # [B, N, h * w, 3] in the camera frames
    ego: Tensor  # [B, N, h * w, 3] the same directions in the ego frame
    pixel_width: Tensor  # [B, N] width in metres of one feature-map pixel at a depth of one metre


def pixel_rays(rig: CameraRig, image_size: tuple[int, int], feature_size: tuple[int, int]) -> PixelRays:
    """Computes the viewing rays of a feature map.

    Args:
        rig: calibration with leading [B, N].
        image_size: height and width in pixels of the images that the rig is calibrated for.
        feature_size: height and width of the feature map.
    """
    (H, W), (h, w) = image_size, feature_size
    img_from_cam = rig.img_from_cam.float()
    device = img_from_cam.device
    v = ((torch.arange(h, device=device) + 0.5) * (H / h)).repeat_interleave(w)  # [h * w]
    u = ((torch.arange(w, device=device) + 0.5) * (W / w)).repeat(h)
    focal_x, skew, center_x, focal_y, center_y = (
        img_from_cam[..., i, j, None] for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2))
    )
    y = (v - center_y) / focal_y  # [B, N, h * w]
    x = (u - center_x - skew * y) / focal_x
    rays_cam = torch.stack([x, y, torch.ones_like(x)], -1)
    rays_ego = (rig.ego_from_cam.float()[:, :, None, :3, :3] * rays_cam[..., None, :]).sum(-1)
    return PixelRays(rays_cam, rays_ego, W / w / focal_x[..., 0])


def see_points(rig: CameraRig, points_ego: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Projects points into all cameras of a rig and checks which cameras see them.

    Args:
        rig: calibration with leading [B, N].
        points_ego: [P, 3] metres, shared by the batch, or [B, P, 3].
        image_size: height and width in pixels of the images that the rig is calibrated for.

    Returns:
        uv [B, N, P, 2] with 0..1 over the image, depth [B, N, P] metres, and seen [B, N, P] bool: True if the camera is
        present and the point lies in front of it and inside its image.
    """
    H, W = image_size
    cam_from_ego = invert_rigid(rig.ego_from_cam.float())
    points_cam = transform_points(cam_from_ego, points_ego.unsqueeze(-3))  # [B, N, P, 3]
    uv_img, depth = project_points(rig.img_from_cam.float(), points_cam, MIN_DEPTH)
    uv = torch.stack([uv_img[..., 0] / W, uv_img[..., 1] / H], -1)
    inside = ((uv > 0) & (uv < 1)).all(-1)
    return uv, depth, inside & (depth > MIN_DEPTH) & rig.present[..., None]


def choose_cameras(
    rig: CameraRig, points_ego: Tensor, image_size: tuple[int, int], count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chooses for each group of points the cameras that see most of its points.

    Args:
        rig: calibration with leading [B, N].
        points_ego: [Q, G, 3] metres, groups of G points, shared by the batch, or [B, Q, G, 3].
        image_size: height and width in pixels of the images that the rig is calibrated for.
        count: how many cameras to choose; the fields of view of a usual rig overlap at most pairwise.

    Returns:
        uv [B, Q, G, K, 2] with 0..1 over the image, depth [B, Q, G, K] metres, seen [B, Q, G, K] bool and the camera
        index [B, Q, G, K]; K is the smaller of `count` and the number of cameras.
    """
    Q, G, _ = points_ego.shape[-3:]
    K = min(count, rig.present.shape[1])
    uv, depth, seen = see_points(rig, points_ego.flatten(-3, -2), image_size)  # [B, N, Q * G, ...]
    uv, depth, seen = (torch.unflatten(x, 2, (Q, G)) for x in (uv, depth, seen))
    # Rank by the number of visible points. Ties are broken by the distance from the image centre, so that the choice
    # does not depend on the order of the cameras.
    eccentricity = (uv - 0.5).abs().amax(-1).clamp(max=1.0)  # [B, N, Q, G]
    camera = (seen * (2 - eccentricity)).sum(-1).topk(K, dim=1).indices  # [B, K, Q]
    camera = camera[..., None].expand(-1, -1, -1, G)
    depth, seen = depth.gather(1, camera), seen.gather(1, camera)  # [B, K, Q, G]
    uv = uv.gather(1, camera[..., None].expand(-1, -1, -1, -1, 2))  # [B, K, Q, G, 2]
    depth, seen, camera = (x.permute(0, 2, 3, 1) for x in (depth, seen, camera))
    return uv.permute(0, 2, 3, 1, 4), depth, seen, camera


def surround_rig(sizes: Sequence[tuple[int, int]]) -> CameraRig:
    """Makes level cameras [N] 1.6 m above the ground that look in all directions, for images of these sizes.

    Args:
        sizes: height and width of each camera's images in pixels; 0.7 of the width is the focal length.
    """
    N = len(sizes)
    angle = torch.arange(N) * (2 * torch.pi / N)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(N)
    ego_from_cam = torch.eye(4).repeat(N, 1, 1)
    ego_from_cam[:, :3, 0] = torch.stack([sin, -cos, zero], -1)  # right
    ego_from_cam[:, :3, 1] = torch.tensor([0.0, 0.0, -1.0])  # down
    ego_from_cam[:, :3, 2] = torch.stack([cos, sin, zero], -1)  # forward
    ego_from_cam[:, 2, 3] = 1.6
    img_from_cam = torch.tensor([[[0.7 * W, 0.0, W / 2], [0.0, 0.7 * W, H / 2], [0.0, 0.0, 1.0]] for H, W in sizes])
    return CameraRig(img_from_cam, ego_from_cam, torch.ones(N, dtype=torch.bool))


def usual_mounting(batch: int, cameras: int) -> tuple[Tensor, Tensor]:
    """Returns what a frame has where nothing is known of a LiDAR and of the times of the cameras.

    Returns:
        `Frame.ego_from_lidar` [B, 4, 4], that of `NUSCENES_EGO_FROM_LIDAR`, and `Frame.ego_from_exposure` [B, N, 4, 4],
        identity.
    """
    lidar = torch.tensor(NUSCENES_EGO_FROM_LIDAR)
    return lidar.expand(batch, 4, 4), torch.eye(4).expand(batch, cameras, 4, 4)
