"""A drive through a dataset as the vehicle meets it, and what calibration and certificates share beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from perception.data.nuscenes import NuScenesDataset
from perception.export.contract import ImageInputs
from perception.export.images import from_rgb
from perception.inference.fitting import fit_image
from perception.types import CameraRig, Frame, map_tensors

MISSING_AT, TURNED_AT = 3, 6  # frames of each scene with a camera less, and with the cameras turned
TURN_DEG = 1.0
# Frames of each scene in which the image of one camera is black (a lens cap) or white (the sun in it), where asked for.
BLACK_AT, WHITE_AT = 4, 8


def replay_frames(dataset: NuScenesDataset, cameras: int, *, bad_images: bool = False) -> Iterator[tuple[str, Frame]]:
    """Token and frame [1, cameras, ...] of every sample, scene by scene, with what a certificate wants to see.

    Args:
        dataset: images as the export takes them.
        cameras: how many the export takes.
        bad_images: in each scene also a black image, BLACK_AT, and a white one, WHITE_AT, each of another camera.
    """
    for scene in np.unique(dataset.scene_of_sample):
        for moment, i in enumerate(np.flatnonzero(dataset.scene_of_sample == scene)):
            frame = seated(map_tensors(lambda tensor: tensor[:1], dataset[int(i)].frames), cameras)
            present, ego_from_cam = frame.rig.present.clone(), frame.rig.ego_from_cam.clone()
            if moment == MISSING_AT and cameras > 1:
                present[0, int(scene) % cameras] = False
            if moment == TURNED_AT:
                angle = torch.tensor(TURN_DEG).deg2rad()
                turn = torch.eye(4)
                turn[:2, :2] = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
                ego_from_cam = turn @ ego_from_cam
            frame = frame._replace(rig=CameraRig(frame.rig.img_from_cam, ego_from_cam, present))
            if bad_images and moment in (BLACK_AT, WHITE_AT):
                frame = filled(frame, int(scene) + moment, 0 if moment == BLACK_AT else 255)
            yield dataset.tokens[i], frame


def filled(frame: Frame, camera: int, grey: int) -> Frame:
    """A frame [1, N, ...] in which the image of one camera that is present has one grey value, 0..255, all over.

    The camera still counts as present: a vehicle does not notice that its lens is covered or blinded.
    """
    there = torch.nonzero(frame.rig.present[0])[:, 0]
    images = frame.images.clone()
    images[0, there[camera % len(there)]] = grey
    return frame._replace(images=images)


def seated(frame: Frame, cameras: int) -> Frame:
    """The first cameras of a frame [1, N, ...]; where it has too few, its first stands in for the others, absent."""
    there = torch.arange(cameras) < frame.rig.present.shape[1]
    seats = torch.arange(cameras) * there
    rig = map_tensors(lambda tensor: tensor[:, seats], frame.rig)
    return frame._replace(images=frame.images[:, seats], rig=rig._replace(present=rig.present & there))


class CameraFrame(NamedTuple):
    """A frame [1, N, ...] with one image per camera, of the sizes and in the format that an export takes."""

    images: tuple[np.ndarray, ...]
    rig: CameraRig  # img_from_cam in pixels of these images
    ego_from_prev: Tensor
    seconds_since_prev: Tensor
    is_first: Tensor


def camera_frame(frame: Frame, images: ImageInputs) -> CameraFrame:
    """A frame [1, N, ...] of RGB bytes as the cameras of an export would give it; other sizes are fitted to theirs."""
    given, img_from_cam = [], frame.rig.img_from_cam.clone()
    for n, size in enumerate(images.sizes):
        rgb = frame.images[0, n].permute(1, 2, 0).numpy()
        if rgb.shape[:2] != size:
            pixels, matrix = fit_image(Image.fromarray(rgb), img_from_cam[0, n].double().numpy(), size)
            rgb, img_from_cam[0, n] = pixels.permute(1, 2, 0).numpy(), torch.from_numpy(matrix)
        given.append(from_rgb(rgb, images.image_format))
    return CameraFrame(tuple(given), frame.rig._replace(img_from_cam=img_from_cam), *frame[2:])


def frame_inputs(frame: CameraFrame) -> dict[str, np.ndarray]:
    """A frame [1, ...] as the inputs of an export by name, all but the memory."""
    return {f"image_{n}": image for n, image in enumerate(frame.images)} | {
        "img_from_cam": frame.rig.img_from_cam[0].numpy(),
        "ego_from_cam": frame.rig.ego_from_cam[0].numpy(),
        "present": frame.rig.present[0].numpy(),
        "ego_from_prev": frame.ego_from_prev[0].numpy(),
        "seconds_since_prev": frame.seconds_since_prev.numpy(),
        "is_first": frame.is_first.numpy(),
    }


def aligned(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Which rows of `other` [Q, C] are the rows of `one`, in the cheapest way: queries start at peaks of a map, and two
    equally high ones may come in either order."""
    return linear_sum_assignment(np.abs(one[:, None] - other).sum(-1))[1]
