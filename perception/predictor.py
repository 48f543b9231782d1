"""Live use: images of one moment after the other go in, scenes come out, memory and motion are taken care of.

predictor = Predictor(shipped_weights())
for images, global_from_ego, time_s in drive:
    scene = predictor.step(images, rig, global_from_ego, time_s)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from perception.data.loader import fit_image
from perception.errors import CheckpointError, ConfigError, DataError
from perception.geometry import invert_rigid
from perception.models.checkpoint import Network, load_checkpoint
from perception.types import CameraRig, Frame, Scene, map_tensors

MAX_GAP = 2.0  # seconds between two steps after which the memory is of no use


def shipped_weights(name: str = "nano") -> Path:
    """The file of weights that came with the library.

    Raises:
        CheckpointError: there are none of this name.
    """
    path = Path(__file__).parent / "weights" / f"{name}.safetensors"
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in path.parent.glob("*.safetensors"))) or "none"
        raise CheckpointError(f"{path}: no weights of this name were shipped (there are: {there}); train them")
    return path


class Predictor:
    """A network, its memory, and the pose and time of the last step.

    Args:
        model: a network, or the path of a `.safetensors` file. A network is moved to the device and set to evaluation.
        device: where it runs, such as "cpu" or "cuda".
        min_score: boxes and lines below this are left out, 0..1.

    Raises:
        CheckpointError: the file is missing, unreadable, or belongs to another architecture.
        ConfigError: `min_score` is not in 0..1, or torch has no such device here.
    """

    def __init__(
        self,
        model: Network | str | Path,
        device: str | torch.device = "cpu",
        *,
        min_score: float = 0.0,
    ) -> None:
        if not 0 <= min_score <= 1:
            raise ConfigError(f"Predictor: min_score is {min_score}; give a number from 0 to 1")
        network = load_checkpoint(model)[0] if isinstance(model, str | Path) else model
        try:
            self.device = torch.device(device)
            self.model = network.to(self.device).eval()
        except (RuntimeError, AssertionError) as error:  # torch uses both
            reason = str(error).splitlines()[0]
            raise ConfigError(f"Predictor: device {str(device)!r} cannot be used here ({reason}); use 'cpu'") from None
        self.min_score = min_score
        self.reset()

    def reset(self) -> None:
        """Forgets everything that was seen; the next step is a first one."""
        self._state = self.model.initial_state(1)
        self._last: tuple[np.ndarray, float] | None = None  # global_from_ego [4, 4] float64, seconds

    @torch.inference_mode()
    def step(
        self,
        images: np.ndarray | Sequence[np.ndarray | None],
        rig: CameraRig,
        global_from_ego: np.ndarray,
        time_s: float,
    ) -> Scene:
        """One moment.

        The images may have any size; they are fitted to the network's as in training (see `fit_image`). If more
        than `MAX_GAP` seconds have passed since the last step, the memory is left out. After an error the predictor is
        as before the call.

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
            DataError: an argument has the wrong shape or type, is not finite, or time did not go forward.
        """
        global_from_ego = _rigid("global_from_ego", global_from_ego)
        time_s = float(time_s)
        if not np.isfinite(time_s):
            raise DataError(f"time_s is {time_s}; give the seconds of this moment as a finite number")
        pixels, fitted_rig = self._fit(images, rig)
        if self._last is not None and time_s <= self._last[1]:
            raise DataError(
                f"time_s is {time_s:.6f}, but the last step was at {self._last[1]:.6f}: give moments in order, or call "
                "reset() before another drive"
            )
        is_first = self._last is None or time_s - self._last[1] > MAX_GAP
        ego_from_prev, seconds = np.eye(4), 0.0
        if not is_first:
            # In float64: global coordinates are kilometres, the motion is centimetres.
            ego_from_prev = invert_rigid(global_from_ego) @ self._last[0]
            seconds = time_s - self._last[1]
        frame = Frame(
            images=pixels[None],  # [B, N, 3, H, W]
            rig=map_tensors(lambda tensor: tensor[None], fitted_rig),
            ego_from_prev=torch.from_numpy(ego_from_prev).float()[None],  # [B, 4, 4]
            seconds_since_prev=torch.tensor([seconds], dtype=torch.float32),
            is_first=torch.tensor([is_first]),
        )
        prediction, self._state = self.model(map_tensors(lambda tensor: tensor.to(self.device), frame), self._state)
        self._last = global_from_ego, time_s
        scene = map_tensors(lambda tensor: tensor[0].cpu(), self.model.decode(prediction))
        return Scene(*(self._confident(noun) for noun in scene))

    def _confident(self, noun):
        keep = noun.valid & (noun.score >= self.min_score)
        return map_tensors(lambda tensor: tensor[keep], noun)

    def _fit(self, images, rig: CameraRig) -> tuple[Tensor, CameraRig]:
        """Images [N, 3, H, W] uint8 of the network's size, and their calibration."""
        N = len(images)
        present = np.asarray(rig.present)
        if present.shape != (N,) or present.dtype != bool:
            raise DataError(
                f"rig.present has shape {present.shape} and type {present.dtype}; {N} images were given, so give [{N}] "
                "bool"
            )
        for name, matrix in (("img_from_cam", (3, 3)), ("ego_from_cam", (4, 4))):
            if tuple(getattr(rig, name).shape) != (N, *matrix):
                shape = tuple(getattr(rig, name).shape)
                raise DataError(f"rig.{name} has shape {shape}; {N} images were given, so give {(N, *matrix)}")
        pixels = torch.zeros(N, 3, *self.model.config.image_size, dtype=torch.uint8)
        # A camera that is missing keeps a harmless calibration: even NaN times weight 0 would be NaN.
        img_from_cam, ego_from_cam = np.tile(np.eye(3), (N, 1, 1)), np.tile(np.eye(4), (N, 1, 1))
        for n in np.flatnonzero(present):
            given = np.asarray(rig.img_from_cam[n], dtype=np.float64)
            if not np.isfinite(given).all() or min(given[0, 0], given[1, 1]) <= 0 or (given[2] != (0, 0, 1)).any():
                raise DataError(
                    f"rig.img_from_cam[{n}] is not a pinhole calibration; give finite numbers, focal lengths above 0, "
                    "and 0 0 1 in the last row"
                )
            ego_from_cam[n] = _rigid(f"rig.ego_from_cam[{n}]", rig.ego_from_cam[n])
            image = images[n]
            if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                what = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
                raise DataError(f"images[{n}] is {what}; give RGB as a numpy array [H, W, 3] of uint8")
            pixels[n], img_from_cam[n] = fit_image(Image.fromarray(image), given, self.model.config.image_size)
        return pixels, CameraRig(
            img_from_cam=torch.from_numpy(img_from_cam).float(),
            ego_from_cam=torch.from_numpy(ego_from_cam).float(),
            present=torch.from_numpy(present.copy()),
        )


def _rigid(name: str, matrix) -> np.ndarray:
    """A rigid transform [4, 4] as float64, or a DataError that names it."""
    matrix = np.array(matrix, dtype=np.float64)
    if matrix.shape != (4, 4):
        raise DataError(f"{name} has shape {matrix.shape}; give (4, 4)")
    rotation = matrix[:3, :3]
    # Rotations of real datasets are stored in single precision.
    if not np.isfinite(matrix).all() or (matrix[3] != (0, 0, 0, 1)).any():
        raise DataError(f"{name} is not a rigid transform; give finite numbers and 0 0 0 1 in the last row")
    if np.abs(rotation @ rotation.T - np.eye(3)).max() > 1e-3 or np.linalg.det(rotation) < 0:
        raise DataError(f"{name} is not a rigid transform; its upper left 3 x 3 must be a rotation")
    return matrix
