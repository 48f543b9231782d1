"""Augmentation of training clips: a changed image becomes a new camera, a changed ground plane a new ego frame.

No extra fields are needed. All frames of a clip get the same change, so static objects stay static. Camera faults
(`perception.data.corruptions`) are drawn here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from perception.data.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    corrupt_camera,
    drop_camera,
    droppable_cameras,
    perturb_extrinsics,
)
from perception.data.lane_map import cut_lines
from perception.data.loader import pad_lines
from perception.data.sample_lines import wide_range
from perception.errors import ConfigError
from perception.geometry import invert_rigid, rigid_from_yaw, transform_points
from perception.types import Boxes, Clip, Frame, LaneRange, MapLine


@dataclass(frozen=True)
class Augment:
    """Changes training clips at random. Each number is the largest change; 0 switches it off.

    Args:
        mirror: probability that left and right of the world are swapped.
        yaw_deg: largest rotation of the ego frame about the vertical, either way, degrees.
        shift: largest translation of the ego frame along x and along y, metres.
        zoom: largest change of the field of view of each camera, as a fraction; the crop lies anywhere in the image.
        color: largest change of gain, contrast and gamma of each camera and of its colour balance, as a fraction.
        extrinsics_noise: probability that a whole scene has wrong extrinsics.
        extrinsics_noise_deg: largest yaw error of each camera in such a scene, degrees. Pitch is left alone: an error
            of pitch would move the road at 20 m by metres, and the network would learn to ignore image detail.
        drop_camera: probability that one camera is missing in a clip. The only camera of a frame is never dropped.
        corrupt: probability, for each camera, that its images of a clip get a random corruption.

    Raises:
        ConfigError: a number is negative, or a probability is more than 1.
    """

    mirror: float = 0.5
    yaw_deg: float = 10.0
    shift: float = 1.0
    zoom: float = 0.1
    color: float = 0.2
    extrinsics_noise: float = 0.0
    extrinsics_noise_deg: float = 1.0
    drop_camera: float = 0.0
    corrupt: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 0:
                raise ConfigError(f"Augment.{field.name} is {getattr(self, field.name)}; it must not be negative")
        for name in ("mirror", "extrinsics_noise", "drop_camera", "corrupt"):
            if getattr(self, name) > 1:
                raise ConfigError(f"Augment.{name} is {getattr(self, name)}; it is a probability, give at most 1")

    def check_reach(self, lane_range: LaneRange) -> None:
        """Checks that the patch of a moved ego frame lies within the `wide_range` of the index.

        Raises:
            ConfigError: yaw_deg and shift move it farther.
        """
        angle = np.radians(min(self.yaw_deg, 90.0))
        turn = np.array([[np.cos(angle), np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        if np.any(turn @ lane_range / 2 + self.shift > np.array(wide_range(lane_range)) / 2):
            raise ConfigError(
                f"Augment.yaw_deg {self.yaw_deg} with shift {self.shift} is too far for the map; use less"
            )

    def __call__(
        self,
        clip: Clip,
        wide_lines: Sequence[Sequence[MapLine]],
        ego_from_patch: Sequence[np.ndarray],
        lane_range: LaneRange,
        scene_rng: np.random.Generator,
        clip_rng: np.random.Generator,
    ) -> Clip:
        """Returns an augmented copy of one clip.

        Args:
            clip: with leading [T].
            wide_lines: T lists of exact lines in the ego frame, from a patch larger than that of the ground truth.
            ego_from_patch: T transforms [4, 4]; where the ground truth's patch lies in the (old and new) ego frame.
            lane_range: extent of the ground-truth lines.
            scene_rng: draws what stays the same along a scene: ego frame, crops, colours, calibration.
            clip_rng: draws what changes from clip to clip: missing cameras and corrupted images.

        Returns:
            The clip with new images, rig, ego motion and ground truth.
        """
        rng = scene_rng
        moved_from_ego = rigid_from_yaw(
            np.radians(rng.uniform(-self.yaw_deg, self.yaw_deg)), (*rng.uniform(-self.shift, self.shift, 2), 0.0)
        )
        if rng.random() < self.mirror:
            moved_from_ego = moved_from_ego @ np.diag([1.0, -1.0, 1.0, 1.0])
        frames = move_frames(clip.frames, moved_from_ego)
        lines = [
            move_lines(lines, moved_from_ego, patch, lane_range)
            for lines, patch in zip(wide_lines, ego_from_patch, strict=True)
        ]
        old = clip.gt.lines
        gt = clip.gt._replace(
            boxes=move_boxes(clip.gt.boxes, moved_from_ego),
            lines=pad_lines(lines, old.points.shape[-2], old.label.shape[-1]),
        )
        frames = change_colors(zoom_cameras(frames, self.zoom, rng), self.color, rng)
        if rng.random() < self.extrinsics_noise:
            frames = perturb_extrinsics(frames, self.extrinsics_noise_deg, rng)
        return clip._replace(frames=self._disturb(frames, clip_rng), gt=gt)

    def _disturb(self, frames: Frame, rng: np.random.Generator) -> Frame:
        """Drops a camera and corrupts images of frames [T], as drawn for this clip."""
        if rng.random() < self.drop_camera and (droppable := droppable_cameras(frames.rig)):
            frames = drop_camera(frames, int(rng.choice(droppable)))
        for camera in range(frames.rig.present.shape[-1]):
            if rng.random() < self.corrupt:
                frames = corrupt_camera(
                    frames, camera, str(rng.choice(list(CORRUPTIONS))), int(rng.choice(SEVERITIES)), rng
                )
        return frames


def move_frames(frames: Frame, moved_from_ego: np.ndarray) -> Frame:
    """Expresses the frames of a clip in another ego frame.

    A transform that mirrors (negative determinant) mirrors the images too: a camera with its x axis reversed sees the
    mirrored world in the mirrored image, and its pose stays a proper rotation. The LiDAR keeps its pose in the ego
    frame, as the patch of the ground-truth lines does: it moves with the ego frame, so that what networks predict in
    the LiDAR frame changes too.

    Args:
        frames: with leading [T].
        moved_from_ego: [4, 4] rigid, or rigid times a mirroring.
    """
    moved = torch.from_numpy(moved_from_ego)
    rig, images = frames.rig, frames.images
    ego_from_cam = moved @ rig.ego_from_cam.double()
    img_from_cam = rig.img_from_cam.double()
    if np.linalg.det(moved_from_ego[:3, :3]) < 0:
        images = images.flip(-1)
        turned = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0], dtype=torch.float64))
        mirrored_from_img = torch.eye(3, dtype=torch.float64)
        mirrored_from_img[0, 0], mirrored_from_img[0, 2] = -1.0, images.shape[-1]  # u' = W - u
        ego_from_cam = ego_from_cam @ turned
        img_from_cam = mirrored_from_img @ img_from_cam @ turned[:3, :3]
    ego_from_moved = torch.linalg.inv(moved)
    return frames._replace(
        images=images,
        rig=rig._replace(img_from_cam=img_from_cam.float(), ego_from_cam=ego_from_cam.float()),
        ego_from_prev=(moved @ frames.ego_from_prev.double() @ ego_from_moved).float(),
        ego_from_exposure=(moved @ frames.ego_from_exposure.double() @ ego_from_moved).float(),
    )


def move_boxes(boxes: Boxes, moved_from_ego: np.ndarray) -> Boxes:
    """Expresses boxes [T, M] in another ego frame, mirrored if the transform mirrors."""
    moved = torch.from_numpy(moved_from_ego).float()
    turn = moved[:2, :2]
    heading = torch.stack([torch.cos(boxes.yaw), torch.sin(boxes.yaw)], -1) @ turn.T  # [T, M, 2]
    return boxes._replace(
        center=transform_points(moved, boxes.center),
        yaw=torch.atan2(heading[..., 1], heading[..., 0]),
        velocity=boxes.velocity @ turn.T,
    )


def move_lines(
    lines: Sequence[MapLine], moved_from_ego: np.ndarray, ego_from_patch: np.ndarray, lane_range: LaneRange
) -> list[MapLine]:
    """Expresses lines of a large patch in another ego frame and cuts them by the ground truth's patch, which moves too.

    Args:
        lines: of a patch larger than `lane_range`, in the old ego frame.
        moved_from_ego: [4, 4] rigid, or rigid times a mirroring.
        ego_from_patch: [4, 4] the ground truth's patch in the old and in the new ego frame.
        lane_range: extent of the ground-truth lines.

    Returns:
        Lines inside `lane_range`, in the new ego frame.
    """
    patch_from_ego = invert_rigid(ego_from_patch)
    patch_from_old = patch_from_ego @ moved_from_ego
    step = -1 if np.linalg.det(moved_from_ego[:3, :3]) < 0 else 1  # the road stays on the right of its boundary
    in_patch = [line._replace(points=_transform_2d(patch_from_old, line.points)[::step]) for line in lines]
    return [
        line._replace(points=_transform_2d(ego_from_patch, line.points)) for line in cut_lines(in_patch, lane_range)
    ]


def _transform_2d(dst_from_src: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ dst_from_src[:2, :2].T + dst_from_src[:2, 3]


def zoom_cameras(frames: Frame, amount: float, rng: np.random.Generator) -> Frame:
    """Crops each camera's image at random, or pads it with black, and resizes the result to the original size."""
    if amount == 0:
        return frames
    H, W = frames.images.shape[-2:]
    images, scales = [], []
    for camera in range(frames.images.shape[1]):
        part = rng.uniform(1 - amount, 1 + amount)
        h, w = round(H * part), round(W * part)
        top = int(rng.integers(min(0, H - h), max(0, H - h) + 1))
        left = int(rng.integers(min(0, W - w), max(0, W - w) + 1))
        cut = F.pad(frames.images[:, camera], (-left, left + w - W, -top, top + h - H))  # [T, 3, h, w]
        images.append(F.interpolate(cut, size=(H, W), mode="bilinear", antialias=True))
        scales.append([[W / w, 0, -left * W / w], [0, H / h, -top * H / h], [0, 0, 1]])
    img_from_cam = torch.tensor(scales, dtype=torch.float64) @ frames.rig.img_from_cam.double()  # [T, N, 3, 3]
    return frames._replace(
        images=torch.stack(images, dim=1), rig=frames.rig._replace(img_from_cam=img_from_cam.float())
    )


def change_colors(frames: Frame, amount: float, rng: np.random.Generator) -> Frame:
    """Changes exposure, contrast, gamma and white balance of each camera, by one look-up table per channel."""
    if amount == 0:
        return frames
    N = frames.images.shape[1]
    value = np.arange(256) / 255
    gain, contrast, gamma = 1 + rng.uniform(-amount, amount, (3, N, 1, 1))
    balance = 1 + rng.uniform(-amount, amount, (N, 3, 1)) / 2
    tables = gain * balance * ((value**gamma - 0.5) * contrast + 0.5)  # [N, 3, 256]
    tables = torch.from_numpy((tables * 255).round().clip(0, 255).astype(np.uint8))
    images = torch.empty_like(frames.images)
    for camera in range(N):
        for channel in range(3):
            images[:, camera, channel] = _look_up(tables[camera, channel], frames.images[:, camera, channel])
    return frames._replace(images=images)


def _look_up(table: Tensor, pixels: Tensor) -> Tensor:
    # numpy's take on uint8 is several times faster than torch's indexing, which wants int64.
    return torch.from_numpy(np.take(table.numpy(), pixels.numpy()))
