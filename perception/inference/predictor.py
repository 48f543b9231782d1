"""Runs a PyTorch network on one frame after another, with its memory and the motion between frames.

predictor = Predictor("nano")
for images, global_from_ego, time_s in sequence:
    objects = predictor.step(images, rig, global_from_ego, time_s)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from perception.inference.acceleration import accelerated
from perception.inference.checks import (
    NOT_FINITE,
    check_images,
    checked_rig,
    checked_setting,
    objects_are_finite,
)
from perception.inference.ego_motion import MAX_SPEED, MAX_TURN_RATE, Motion
from perception.inference.fitting import fit_image
from perception.inference.fixed_rig import FixedRig
from perception.inference.folding import example_frame
from perception.inference.images import AnyImage
from perception.inference.live import LiveInput, Step, without_result
from perception.inference.plausibility import sampled_rgb
from perception.inference.visibility import MIN_SEEN, kept_by
from perception.models import Network
from perception.models.base import remembers
from perception.models.checkpoint import load_model, on_device, read_provenance
from perception.models.decoding import empty_boxes, empty_lines
from perception.models.provenance import weights_of
from perception.types import (
    NUSCENES_EGO_FROM_LIDAR,
    Boxes,
    CameraRig,
    Frame,
    FrameObjects,
    LiveObjects,
    NumpyCameraRig,
    Polylines,
    Seen,
    Weights,
    chosen,
    map_tensors,
    named_tensors,
)

if TYPE_CHECKING:
    from perception.rigs.rig import Rig
    from perception.rigs.virtual import VirtualRig


class Predictor:
    """Runs a network on one frame after another and keeps its memory.

    Args:
        model: a network, or an argument of `load_model`: the name of weights that are part of the library, such as
            "nano", or a `.safetensors` file. A network is moved to the device and set to evaluation mode.
        device: on which it runs, such as "cpu" or "cuda".
        precision: "auto", "float32", "bfloat16" or "float16", see `perception.inference.acceleration.accelerated`.
        compile: compile the network for this machine, which takes minutes once; later processes find the result in the
            user's cache folder. It happens here if the rig is given, else in the first step, with a line on stderr.
        cuda_graph: on a GPU, replay each frame as one CUDA graph.
        rig: the cameras of the vehicle, of any model, size and mounting; `step` then takes their images, and the
            network sees them through virtual pinholes (see `perception.rigs.virtual`). None if every step gets the
            calibration of pinholes.
        bgr: images that are numpy arrays or tensors have blue first, as OpenCV reads them. Files and Pillow images name
            their order.
        min_score: score threshold 0..1; boxes and lines below it are not returned.
        min_seen: share 0..1 of a box (of its centre and corners) or of the points of a line that must lie where a
            camera looks, or looked while the memory lasted; others are not returned.
        max_speed: m/s above which the pose has jumped and the memory is dropped; inf for no limit.
        max_turn_rate: rad/s above which the pose has jumped and the memory is dropped; inf for no limit.

    Raises:
        CheckpointError: there are no weights of this name, or the file is missing or unreadable.
        ConfigError: `min_score` or `min_seen` is not in 0..1, a limit is negative, torch cannot use the device, the rig
            does not fit the network, or precision, `compile` or `cuda_graph` cannot be had here.

    Attributes:
        model: the network as `accelerated` has prepared it; `model.choice` is the precision in which it runs, and why.
    """

    def __init__(
        self,
        model: Network | str | Path,
        device: str | torch.device = "cpu",
        *,
        precision: str = "auto",
        compile: bool = False,
        cuda_graph: bool = False,
        rig: Rig | VirtualRig | None = None,
        bgr: bool = False,
        min_score: float = 0.0,
        min_seen: float = MIN_SEEN,
        max_speed: float = MAX_SPEED,
        max_turn_rate: float = MAX_TURN_RATE,
    ) -> None:
        self.min_score = checked_setting("Predictor: min_score", min_score, 0, 1, "a number from 0 to 1")
        self.min_seen = checked_setting("Predictor: min_seen", min_seen, 0, 1, "a number from 0 to 1")
        self.provenance = read_provenance(model) if isinstance(model, str | Path) else None
        weights = weights_of(model, self.provenance) if isinstance(model, str | Path) else Weights()
        network = on_device(load_model(model) if isinstance(model, str | Path) else model, device)
        self.model = accelerated(network, precision=precision, compile=compile, cuda_graph=cuda_graph)
        self._fixed_rig = FixedRig(self.model)
        self.device = torch.device(device)
        self._live = LiveInput(
            self.model.config.image_size, remembers(self.model), rig=rig, weights=weights, bgr=bgr,
            max_speed=max_speed, max_turn_rate=max_turn_rate,
        )  # fmt: skip
        if (compile or cuda_graph) and self._live.cameras is not None:
            frame = example_frame(network, self._live.cameras)
            with torch.inference_mode():  # called as in `step`, so that nothing is compiled or captured again there
                self.model(frame, self.model.initial_state(1), *self._fixed_rig(frame))
        self.reset()

    def __repr__(self) -> str:
        return f"Predictor({type(self.model.network).__name__} on {self.device}: {self.model.choice})"

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        device: str | torch.device = "cpu",
        *,
        precision: str = "auto",
        compile: bool = False,
        cuda_graph: bool = False,
        rig: Rig | VirtualRig | None = None,
        bgr: bool = False,
        min_score: float = 0.0,
        min_seen: float = MIN_SEEN,
        max_speed: float = MAX_SPEED,
        max_turn_rate: float = MAX_TURN_RATE,
    ) -> Predictor:
        """Creates a predictor with trained weights, as `Predictor(name_or_path)` does.

        Args:
            name_or_path: the name of weights that are part of the library, such as "nano", or a `.safetensors` file.
            device, precision, compile, cuda_graph, rig, bgr, min_score, min_seen, max_speed, max_turn_rate: as for
                `Predictor`.

        Raises:
            CheckpointError, ConfigError: as for `Predictor`.
        """
        return cls(
            name_or_path, device, precision=precision, compile=compile, cuda_graph=cuda_graph, rig=rig, bgr=bgr,
            min_score=min_score, min_seen=min_seen, max_speed=max_speed, max_turn_rate=max_turn_rate,
        )  # fmt: skip

    def name_cameras(self, names: Sequence[str], ego_from_lidar: NDArray[Any] | None = None) -> None:
        """Gives the camera of each image a name, which then stands in warnings instead of its number.

        With a rig at construction they have those of the rig.

        Args:
            names: in the order of the images; images of one camera have the same name.
            ego_from_lidar: [4, 4], `Rig.ego_from_lidar` of their rig; None for `NUSCENES_EGO_FROM_LIDAR`.
        """
        self._live.name_cameras(names)
        self._live.ego_from_lidar = np.array(NUSCENES_EGO_FROM_LIDAR if ego_from_lidar is None else ego_from_lidar)

    def reset(self) -> None:
        """Clears the memory; the next step is a first frame."""
        self._state = self.model.initial_state(1)
        self._live.reset()

    def step(
        self,
        images: NDArray[np.uint8] | Sequence[AnyImage | None] | Mapping[str, AnyImage | None],
        rig: CameraRig | NumpyCameraRig | NDArray[Any] | None = None,
        global_from_ego: NDArray[Any] | float | None = None,
        time_s: float | None = None,
        *,
        motion: Motion | None = None,
        camera_times_s: Mapping[str, float | None] | Sequence[float | None] | None = None,
        ego_from_exposure: NDArray[Any] | None = None,
    ) -> LiveObjects:
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
            motion: the motion since the last step, for vehicles without a pose (see `Motion.from_speed_yaw_rate`).
            camera_times_s: when each camera exposed, seconds: by name with a rig at construction, else in the order of
                the images. `ego_from_cam` of a moving vehicle is carried from there to `time_s`, between the poses of
                this step and of those before.
            ego_from_exposure: [N, 4, 4] for each image the ego motion from its exposure to `time_s`, where that is
                known better than from `camera_times_s`, which is then left out.

        With a rig at construction the call is `step(images, global_from_ego, time_s)`: `images` are those of the
        cameras of the rig, in the sizes that it names, as a dict from names or a list in its order. A camera that is
        None, or missing in the dict, is absent. An image may be anything that `perception.inference.images.as_pixels`
        takes: a file name, bytes of a JPEG or PNG, a Pillow image, a numpy array or a torch tensor.

        Without a pose or a time, and without a motion, the frame stands for itself: no memory is used, and the result
        says so in `info`.

        Returns:
            Boxes [M] and lines [M] in the ego frame, without batch dimension, highest score first, as tensors on the
            CPU; what of them is seen; and what is implausible in the input. If no camera is present and the memory is
            empty, there are no boxes and lines.

        Raises:
            DataError: an argument has the wrong shape or type, is not finite or out of range for a vehicle, or `time_s`
                is not later than in the last step.

        Warns:
            PerceptionWarning: the pose has jumped; three steps in a row came after a gap; the output of the network is
                not finite, in which case no boxes and lines are returned and the memory is dropped; or the calibration
                or the images are implausible, or unlike the training data of the weights. What is implausible is
                emitted once by kind, and is in `warnings` of every result that it holds for.
        """
        live = self._live
        images, rig, global_from_ego, time_s = live.arguments(images, rig, global_from_ego, time_s)
        frame_motion = live.ego_motion.since_last(global_from_ego, time_s, motion)
        check_images(images)
        checked = checked_rig(rig, len(images))
        checked, moved, found = live.carried(checked, frame_motion, camera_times_s, ego_from_exposure)
        given = {int(n): live.pixels(int(n), images[n]) for n in np.flatnonzero(checked.present)}
        sizes = {n: image.shape[:2] for n, image in given.items()}
        samples = {n: sampled_rgb(image) for n, image in given.items()}
        step = live.inspect(frame_motion, checked, moved, sizes, samples, found)
        if self.provenance is not None:
            unlike = self.provenance.misfit(step.fitted_rig, self.model.config.image_size, frame_motion.seconds)
            step = step._replace(findings=step.findings | unlike)
        if step.is_blank:
            self.reset()
            return self._nothing(step, live.warnings.emit(step.findings))
        frame = self._frame(given, step)
        with torch.inference_mode():
            frame = map_tensors(lambda tensor: tensor.to(self.device), frame)
            prediction, state = self.model(frame, self._state, *self._fixed_rig(frame))
            predicted = map_tensors(lambda tensor: tensor[0].cpu(), self.model.decode(prediction))
            above = self._above_threshold(predicted.boxes), self._above_threshold(predicted.lines)
            objects = chosen(predicted, *above)
            finite = all(bool(tensor.sum().isfinite()) for tensor in named_tensors(state).values())
            finite = finite and objects_are_finite(predicted, objects)
        if not finite:
            self.reset()
            return self._nothing(step, live.warnings.emit(step.findings | {"not finite": NOT_FINITE}))
        self._state = state
        live.keep(step)
        seen = step.view.of_objects(objects)
        boxes, lines = kept_by(seen, self.min_seen)
        objects = chosen(objects, torch.from_numpy(boxes), torch.from_numpy(lines))
        return LiveObjects(
            boxes=objects.boxes,
            lines=objects.lines,
            seen=Seen(torch.from_numpy(seen.boxes[boxes]), torch.from_numpy(seen.lines[lines])),
            warnings=live.warnings.emit(step.findings),
            info=step.info,
            ids=map_tensors(torch.Tensor.numpy, objects.ids),
        )

    def _above_threshold(self, objects: Boxes | Polylines) -> Tensor:
        return objects.valid & (objects.score >= self.min_score)

    def _nothing(self, step: Step, warnings: tuple[str, ...]) -> LiveObjects:
        """Returns a result without boxes and lines."""
        cpu, points = torch.device("cpu"), self.model.config.line_points
        empty = FrameObjects(empty_boxes(1, cpu), empty_lines(1, cpu, points))
        boxes, lines, _ = map_tensors(lambda tensor: tensor[0], empty)
        seen = Seen(torch.zeros(0), torch.zeros(0, points, dtype=torch.bool))
        return LiveObjects(boxes, lines, seen, warnings, without_result(step.info))

    def _frame(self, images: dict[int, NDArray[np.uint8]], step: Step) -> Frame:
        """Returns the frame [B=1] for the network, on the CPU."""
        rig, motion = step.fitted_rig, step.motion
        H, W = self.model.config.image_size
        pixels = torch.zeros(1, len(rig.present), 3, H, W, dtype=torch.uint8)
        for n, image in images.items():
            pixels[0, n], _ = fit_image(Image.fromarray(image), rig.img_from_cam[n], (H, W))
        return Frame(
            images=pixels,
            rig=CameraRig(
                img_from_cam=torch.from_numpy(rig.img_from_cam).float()[None],
                ego_from_cam=torch.from_numpy(rig.ego_from_cam).float()[None],
                present=torch.from_numpy(rig.present)[None],
            ),
            ego_from_prev=torch.from_numpy(motion.ego_from_prev).float()[None],  # [B, 4, 4]
            seconds_since_prev=torch.tensor([motion.seconds], dtype=torch.float32),
            is_first=torch.tensor([motion.is_first]),
            ego_from_lidar=torch.from_numpy(self._live.ego_from_lidar).float()[None],  # [B, 4, 4]
            ego_from_exposure=torch.from_numpy(step.ego_from_exposure).float()[None],  # [B, N, 4, 4]
        )
