"""Live use: images of one frame after the other go in, scenes come out, memory and motion are taken care of.

predictor = Predictor("nano")
for images, global_from_ego, time_s in drive:
    scene = predictor.step(images, rig, global_from_ego, time_s)
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
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
    scene_is_finite,
)
from perception.inference.ego_motion import MAX_SPEED, MAX_TURN_RATE, EgoMotion
from perception.inference.fitting import fit_image
from perception.models import Network
from perception.models.checkpoint import load_model, on_device
from perception.types import CameraRig, Frame, FrameObjects, map_tensors


class Predictor:
    """A network, its memory, and the pose and time of the last step.

    Args:
        model: a network, or what `load_model` takes: the name of weights that came with the library, such as "nano",
            or a `.safetensors` file. A network is moved to the device and set to evaluation mode.
        device: where it runs, such as "cpu" or "cuda".
        min_score: boxes and lines below this are left out, 0..1.
        max_speed: m/s above which the pose has jumped, so that the memory is dropped; inf for no limit.
        max_turn_rate: rad/s, likewise.

    Raises:
        CheckpointError: there are no weights of this name, or the file is missing or unreadable.
        ConfigError: `min_score` is not in 0..1, a limit is negative, or torch has no such device here.
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
        self._odometer = EgoMotion(max_speed, max_turn_rate)
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
        """A predictor with trained weights, the same as `Predictor(name_or_path)`.

        Args:
            name_or_path: the name of weights that came with the library, such as "nano", or a `.safetensors` file.
            device, min_score, max_speed, max_turn_rate: as of `Predictor`.

        Raises:
            CheckpointError, ConfigError: as `Predictor`.
        """
        return cls(name_or_path, device, min_score=min_score, max_speed=max_speed, max_turn_rate=max_turn_rate)

    def reset(self) -> None:
        """Forgets everything that was seen; the next step is a first one."""
        self._state = self.model.initial_state(1)
        self._odometer.reset()

    def step(
        self,
        images: np.ndarray | Sequence[np.ndarray | None],
        rig: CameraRig,
        global_from_ego: np.ndarray,
        time_s: float,
    ) -> FrameObjects:
        """One frame.

        The images may have any size; they are fitted to the network's as in training (see `fit_image`). The memory is
        left out if more than `MAX_GAP` seconds have passed since the last step, or if the pose has jumped since. After
        an error the predictor is as before the call.

        Args:
            images: [N, H, W, 3] uint8 RGB, or a sequence of N images [H, W, 3] of different sizes. What stands for a
                camera that is not present is ignored and may be None.
            rig: img_from_cam [N, 3, 3] in pixels of these images, ego_from_cam [N, 4, 4] metres, present [N] bool.
            global_from_ego: [4, 4] pose at `time_s`, metres, in any frame that stays the same from step to step.
            time_s: seconds, later than the last step's.

        Returns:
            What there is to see in the ego frame, boxes [M] and lines [M] without batch dimension, best score first, on
            the CPU.

        Raises:
            DataError: an argument has the wrong shape or type, is not finite or beyond what a vehicle can have, or time
                did not go forward.

        Warns:
            PerceptionWarning: the pose has jumped; three steps in a row came after a gap; or the network's output is
                not finite, so that no boxes and lines are returned and the memory is dropped.
        """
        motion = self._odometer.since_last(global_from_ego, time_s)
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
            whole = map_tensors(lambda tensor: tensor[0].cpu(), self.model.decode(prediction))
            scene = FrameObjects(*(self._confident(noun) for noun in whole))
            finite = bool(state.bev.sum().isfinite()) and scene_is_finite(whole, scene)
        if not finite:
            self.reset()
            warnings.warn(NOT_FINITE, PerceptionWarning, stacklevel=2)
            return map_tensors(lambda tensor: tensor[:0], scene)
        self._state = state
        self._odometer.keep(motion)
        return scene

    def _confident(self, noun):
        keep = noun.valid & (noun.score >= self.min_score)
        return map_tensors(lambda tensor: tensor[keep], noun)

    def _fit(self, images, rig: CameraRig) -> tuple[Tensor, CameraRig]:
        """Images [N, 3, H, W] uint8 of the network's size, and their calibration."""
        check_images(images)
        rig = checked_rig(rig, len(images))
        pixels = torch.zeros(len(images), 3, *self.model.config.image_size, dtype=torch.uint8)
        for n in np.flatnonzero(rig.present):
            image = checked_image(f"images[{n}]", images[n])
            check_intrinsics(f"rig.img_from_cam[{n}]", rig.img_from_cam[n], image.shape[:2])
            pixels[n], rig.img_from_cam[n] = fit_image(
                Image.fromarray(image), rig.img_from_cam[n], self.model.config.image_size
            )
        return pixels, CameraRig(
            img_from_cam=torch.from_numpy(rig.img_from_cam).float(),
            ego_from_cam=torch.from_numpy(rig.ego_from_cam).float(),
            present=torch.from_numpy(rig.present),
        )
