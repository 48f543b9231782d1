"""Runs a PyTorch network on one frame after another, with its memory and the motion between frames.

predictor = Predictor("nano")
for images, global_from_ego, time_s in sequence:
    objects = predictor.step(images, rig, global_from_ego, time_s)
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from perception.errors import PerceptionWarning
from perception.inference.checks import (
    NOT_FINITE,
    check_images,
    check_intrinsics,
    checked_image,
    checked_rig,
    checked_setting,
    objects_are_finite,
)
from perception.inference.ego_motion import MAX_SPEED, MAX_TURN_RATE, EgoMotion
from perception.inference.fitting import fit_image
from perception.models import Network
from perception.models.checkpoint import load_model, on_device
from perception.types import Boxes, CameraRig, Frame, FrameObjects, NumpyCameraRig, Polylines, map_tensors

Objects = TypeVar("Objects", Boxes, Polylines)


class Predictor:
    """Runs a network on one frame after another and keeps its memory.

    Args:
        model: a network, or an argument of `load_model`: the name of weights that are part of the library, such as
            "nano", or a `.safetensors` file. A network is moved to the device and set to evaluation mode.
        device: on which it runs, such as "cpu" or "cuda".
        min_score: score threshold 0..1; boxes and lines below it are not returned.
        max_speed: m/s above which the pose has jumped and the memory is dropped; inf for no limit.
        max_turn_rate: rad/s above which the pose has jumped and the memory is dropped; inf for no limit.

    Raises:
        CheckpointError: there are no weights of this name, or the file is missing or unreadable.
        ConfigError: `min_score` is not in 0..1, a limit is negative, or torch cannot use the device.
    """

    def __init__(
        self,
        model: Network | str | Path,
        device: str | torch.device = "cpu",
        *,
        min_score: float = 0.0,
        max_speed: float = MAX_SPEED,
        max_turn_rate: float = MAX_TURN_RATE,
    ) -> None:
        self.min_score = checked_setting("Predictor: min_score", min_score, 0, 1, "a number from 0 to 1")
        self._ego_motion = EgoMotion(max_speed, max_turn_rate)
        self.model = on_device(load_model(model) if isinstance(model, str | Path) else model, device)
        self.device = torch.device(device)
        self.reset()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        device: str | torch.device = "cpu",
        *,
        min_score: float = 0.0,
        max_speed: float = MAX_SPEED,
        max_turn_rate: float = MAX_TURN_RATE,
    ) -> Predictor:
        """Creates a predictor with trained weights, as `Predictor(name_or_path)` does.

        Args:
            name_or_path: the name of weights that are part of the library, such as "nano", or a `.safetensors` file.
            device, min_score, max_speed, max_turn_rate: as for `Predictor`.

        Raises:
            CheckpointError, ConfigError: as for `Predictor`.
        """
        return cls(name_or_path, device, min_score=min_score, max_speed=max_speed, max_turn_rate=max_turn_rate)

    def reset(self) -> None:
        """Clears the memory; the next step is a first frame."""
        self._state = self.model.initial_state(1)
        self._ego_motion.reset()

    def step(
        self,
        images: NDArray[np.uint8] | Sequence[NDArray[np.uint8] | None],
        rig: CameraRig | NumpyCameraRig,
        global_from_ego: NDArray[Any],
        time_s: float,
    ) -> FrameObjects:
        """Predicts the boxes and lines of one frame.

        The images may have any size; they are resized and cropped as in training (see `fit_image`). The memory is
        ignored if the last step was more than `MAX_GAP` seconds ago or the pose has jumped since then. An error leaves
        the predictor in the state before the call.

        Args:
            images: [N, H, W, 3] uint8 RGB, or a sequence of N images [H, W, 3] of different sizes. The image of a
                camera that is not present is ignored and may be None.
            rig: img_from_cam [N, 3, 3] in pixels of these images, ego_from_cam [N, 4, 4] metres, present [N] bool.
            global_from_ego: [4, 4] pose at `time_s`, metres, in any frame that is the same in all steps.
            time_s: seconds, later than in the last step.

        Returns:
            Boxes [M] and lines [M] in the ego frame, without batch dimension, highest score first, as tensors on the
            CPU.

        Raises:
            DataError: an argument has the wrong shape or type, is not finite or out of range for a vehicle, or `time_s`
                is not later than in the last step.

        Warns:
            PerceptionWarning: the pose has jumped; three steps in a row came after a gap; or the output of the network
                is not finite, in which case no boxes and lines are returned and the memory is dropped.
        """
        motion = self._ego_motion.since_last(global_from_ego, time_s)
        pixels, fitted_rig = self._fit(images, rig)
        frame = Frame(
            images=pixels[None],  # [B, N, 3, H, W]
            rig=map_tensors(lambda tensor: tensor[None], fitted_rig),
            ego_from_prev=torch.from_numpy(motion.ego_from_prev).float()[None],  # [B, 4, 4]
            seconds_since_prev=torch.tensor([motion.seconds], dtype=torch.float32),
            is_first=torch.tensor([motion.is_first]),
        )
        with torch.inference_mode():
            prediction, state = self.model(map_tensors(lambda tensor: tensor.to(self.device), frame), self._state)
            predicted = map_tensors(lambda tensor: tensor[0].cpu(), self.model.decode(prediction))
            objects = FrameObjects(self._above_threshold(predicted.boxes), self._above_threshold(predicted.lines))
            finite = bool(state.bev.sum().isfinite()) and objects_are_finite(predicted, objects)
        if not finite:
            self.reset()
            warnings.warn(NOT_FINITE, PerceptionWarning, stacklevel=2)
            return map_tensors(lambda tensor: tensor[:0], objects)
        self._state = state
        self._ego_motion.keep(motion)
        return objects

    def _above_threshold(self, objects: Objects) -> Objects:
        keep = objects.valid & (objects.score >= self.min_score)
        return map_tensors(lambda tensor: tensor[keep], objects)

    def _fit(
        self, images: NDArray[np.uint8] | Sequence[NDArray[np.uint8] | None], rig: CameraRig | NumpyCameraRig
    ) -> tuple[Tensor, CameraRig]:
        """Returns the images [N, 3, H, W] uint8 in the network's size, and their calibration."""
        check_images(images)
        checked = checked_rig(rig, len(images))
        pixels = torch.zeros(len(images), 3, *self.model.config.image_size, dtype=torch.uint8)
        for n in np.flatnonzero(checked.present):
            image = checked_image(f"images[{n}]", images[n])
            check_intrinsics(f"rig.img_from_cam[{n}]", checked.img_from_cam[n], image.shape[:2])
            pixels[n], checked.img_from_cam[n] = fit_image(
                Image.fromarray(image), checked.img_from_cam[n], self.model.config.image_size
            )
        return pixels, CameraRig(
            img_from_cam=torch.from_numpy(checked.img_from_cam).float(),
            ego_from_cam=torch.from_numpy(checked.ego_from_cam).float(),
            present=torch.from_numpy(checked.present),
        )
