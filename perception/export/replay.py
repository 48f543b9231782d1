"""Replays the frames of a dataset as inputs of an exported network, for calibration data and certificates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from perception.data.nuscenes import NuScenesDataset
from perception.export.contract import ImageInputs
from perception.export.export_rig import ExportRig
from perception.export.images import from_rgb
from perception.inference.fitting import fit_image
from perception.types import CameraRig, Frame, map_tensors

MISSING_AT, TURNED_AT = 3, 6  # frame of each scene with a missing camera, and with rotated cameras
TURN_DEG = 1.0
# With `bad_images`: frame of each scene with a black image (covered lens) and with a white image (direct sunlight).
BLACK_AT, WHITE_AT = 4, 8


def replay_frames(dataset: NuScenesDataset, cameras: int, *, bad_images: bool = False) -> Iterator[tuple[str, Frame]]:
    """Yields sample token and frame [1, cameras, ...] of every sample, scene by scene.

    Frame `MISSING_AT` of every scene lacks a camera and frame `TURNED_AT` has rotated cameras, because an export must
    handle both.

    Args:
        dataset: with images of the size that the export takes, or larger.
        cameras: number of cameras of the export.
        bad_images: also replace an image by black in frame `BLACK_AT` and another by white in frame `WHITE_AT`.
    """
    for scene in np.unique(dataset.scene_of_sample):
        for number, i in enumerate(np.flatnonzero(dataset.scene_of_sample == scene)):
            frame = pad_cameras(map_tensors(lambda tensor: tensor[:1], dataset[int(i)].frames), cameras)
            present, ego_from_cam = frame.rig.present.clone(), frame.rig.ego_from_cam.clone()
            if number == MISSING_AT and cameras > 1:
                present[0, int(scene) % cameras] = False
            if number == TURNED_AT:
                angle = torch.tensor(TURN_DEG).deg2rad()
                turn = torch.eye(4)
                turn[:2, :2] = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
                ego_from_cam = turn @ ego_from_cam
            frame = frame._replace(rig=CameraRig(frame.rig.img_from_cam, ego_from_cam, present))
            if bad_images and number in (BLACK_AT, WHITE_AT):
                frame = fill_image(frame, int(scene) + number, 0 if number == BLACK_AT else 255)
            yield dataset.tokens[i], frame


def fill_image(frame: Frame, camera: int, grey: int) -> Frame:
    """Replaces the image of one present camera of a frame [1, N, ...] by a constant grey value 0..255.

    The camera stays present, because a vehicle does not detect that a lens is covered or blinded.

    Args:
        frame: leading [1, N].
        camera: number of the camera among the present ones, modulo their number.
        grey: 0..255.
    """
    available = torch.nonzero(frame.rig.present[0])[:, 0]
    images = frame.images.clone()
    images[0, available[camera % len(available)]] = grey
    return frame._replace(images=images)


def pad_cameras(frame: Frame, cameras: int) -> Frame:
    """Cuts or pads the cameras of a frame [1, N, ...] to a number.

    Cameras that are added hold the image and the calibration of the first camera and are not present.
    """
    exists = torch.arange(cameras) < frame.rig.present.shape[1]
    index = torch.arange(cameras) * exists
    rig = map_tensors(lambda tensor: tensor[:, index], frame.rig)
    return frame._replace(
        images=frame.images[:, index], rig=rig._replace(present=rig.present & exists),
        ego_from_exposure=frame.ego_from_exposure[:, index],
    )  # fmt: skip


class CameraFrame(NamedTuple):
    """A frame [1, N, ...] with one image per camera, in the sizes and the format that an export takes."""

    images: tuple[np.ndarray, ...]
    rig: CameraRig  # img_from_cam in pixels of these images
    ego_from_prev: Tensor
    seconds_since_prev: Tensor
    is_first: Tensor
    ego_from_lidar: Tensor
    ego_from_exposure: Tensor


def camera_frame(frame: Frame, images: ImageInputs) -> CameraFrame:
    """Converts a frame [1, N, ...] of RGB bytes to the sizes and the format that an export takes."""
    converted, img_from_cam = [], frame.rig.img_from_cam.clone()
    for n, size in enumerate(images.sizes):
        rgb = frame.images[0, n].permute(1, 2, 0).numpy()
        if rgb.shape[:2] != size:
            pixels, matrix = fit_image(Image.fromarray(rgb), img_from_cam[0, n].double().numpy(), size)
            rgb, img_from_cam[0, n] = pixels.permute(1, 2, 0).numpy(), torch.from_numpy(matrix)
        converted.append(from_rgb(rgb, images.image_format))
    return CameraFrame(tuple(converted), frame.rig._replace(img_from_cam=img_from_cam), *frame[2:])


def with_export_rig(frame: CameraFrame, fixed: ExportRig | None) -> CameraFrame:
    """Returns a frame [1, ...] with the only calibration that an export is for; unchanged if it takes any."""
    if fixed is None:
        return frame
    img_from_cam, ego_from_cam, ego_from_lidar = (torch.from_numpy(array).float()[None] for array in fixed)
    rig = frame.rig._replace(img_from_cam=img_from_cam, ego_from_cam=ego_from_cam)
    still = torch.eye(4).expand_as(ego_from_cam)
    return frame._replace(rig=rig, ego_from_lidar=ego_from_lidar, ego_from_exposure=still)


def frame_inputs(frame: CameraFrame, extra: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Returns the inputs of an export for a frame [1, ...] by name, without the memory.

    Args:
        frame: leading [1].
        extra: those of `Network.extra_inputs` that the export has.
    """
    inputs = {f"image_{n}": image for n, image in enumerate(frame.images)} | {
        "img_from_cam": frame.rig.img_from_cam[0].numpy(),
        "ego_from_cam": frame.rig.ego_from_cam[0].numpy(),
        "present": frame.rig.present[0].numpy(),
        "ego_from_prev": frame.ego_from_prev[0].numpy(),
        "seconds_since_prev": frame.seconds_since_prev.numpy(),
        "is_first": frame.is_first.numpy(),
    }
    return inputs | {name: getattr(frame, name)[0].numpy() for name in extra}


def match_rows(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns for each row of `one` [Q, C] the index of its row in `other`, with the smallest sum of differences.

    Queries start at peaks of a heat map, and two peaks of equal height have no defined order.
    """
    return linear_sum_assignment(np.abs(one[:, None] - other).sum(-1))[1]
