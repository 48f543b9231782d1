"""Any network of the library as a detector of mmdet3d."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from mmdet3d.models.detectors import Base3DDetector
from mmdet3d.structures import BaseInstance3DBoxes, CameraInstance3DBoxes, Det3DDataSample, LiDARInstance3DBoxes
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry
from mmengine.structures import InstanceData
from torch import Tensor

from perception.data.loader import pad_boxes, pad_lines
from perception.engine.config import model_config
from perception.engine.training import TrainingModel
from perception.engine.weights import load_weights
from perception.errors import ConfigError, DataError
from perception.geometry import invert_rigid
from perception.inference.ego_motion import interrupted
from perception.mmdet3d.boxes import ego_boxes, sensor_boxes
from perception.mmdet3d.frames import FrameInput
from perception.models import build_network
from perception.types import Boxes, Clip, Frame, FrameObjects, Memory, Polylines, map_tensors

MODELS = Registry("model", parent=MMENGINE_MODELS, scope="perception", locations=["perception.mmdet3d"])
Found = TypeVar("Found", Boxes, Polylines)


class _Stream:
    """What a network remembers between two calls, and where and when that was, for each place of the batch."""

    def __init__(self) -> None:
        self._memory: Memory | None = None
        self._poses, self._times = np.zeros((0, 4, 4)), np.zeros(0)

    def follow(self, inputs: FrameInput) -> tuple[Frame, Memory | None]:
        """Returns the frames with the motion since the last call, and the memory.

        A frame of another drive, as one that is earlier, much later or elsewhere, is a first frame, by the rule of live
        use.

        Args:
            inputs: leading [B].
        """
        poses, times = inputs.global_from_ego.cpu().numpy(), inputs.time_s.cpu().numpy()
        if len(times) != len(self._times):  # the last batch of an epoch may be smaller
            self._memory, self._poses, self._times = None, poses, np.full(len(times), np.inf)
        ego_from_prev, seconds = invert_rigid(poses) @ self._poses, times - self._times
        is_first = (seconds <= 0) | interrupted(ego_from_prev, np.maximum(seconds, 0))
        ego_from_prev[is_first], seconds[is_first] = np.eye(4), 0.0
        self._poses, self._times = poses, times
        frame = inputs.frame
        return (
            frame._replace(
                ego_from_prev=torch.from_numpy(ego_from_prev).to(frame.ego_from_prev),
                seconds_since_prev=torch.from_numpy(seconds).to(frame.seconds_since_prev),
                is_first=torch.from_numpy(is_first).to(frame.is_first),
            ),
            self._memory,
        )

    def keep(self, memory: Memory | None) -> None:
        """Keeps the memory after a call, without gradients."""
        self._memory = None if memory is None else map_tensors(Tensor.detach, memory)


@MODELS.register_module()
class Detector(Base3DDetector):
    """Trains and runs a network of the library as mmdet3d does its own detectors.

    It keeps the memory of the network from call to call, for training and for evaluation: frames that follow each other
    in place b of two batches are a stream, any others are first frames. So give validation a sampler without shuffling
    and batches of one.

    Boxes alone are trained: data of mmdet3d hold no lines, so the losses of lines are left out. Labels are indices into
    `BOX_CLASSES`, the order of mmdet3d's nuScenes.

    Args:
        network: the section `model` of the library's configs, such as `dict(preset="nano")`.
        weights: to start from, a file or the name of shipped weights; empty for random ones.
        disabled_losses: further names of the network's losses that are left out.
        data_preprocessor: mmengine's `BaseDataPreprocessor` by default, because the network normalises images itself.
        init_cfg: of mmengine's BaseModule.

    Raises:
        ConfigError: the network is unknown, finds no boxes, or a name of a loss is unknown.
        CheckpointError: the weights are missing or belong to another network.
    """

    def __init__(
        self,
        network: dict[str, Any],
        weights: str = "",
        disabled_losses: Sequence[str] = (),
        data_preprocessor: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        config = model_config(dict(network), "Detector.network")
        self.core = load_weights(weights, config, any_size=True) if weights else build_network(config)
        if "box" not in self.core.finds:
            raise ConfigError(
                f"Detector: {type(self.core).__name__} finds no boxes, and mmdet3d has no lines; train it with "
                "perception train"
            )
        lines = [name for name in self.core.loss_weights if name.startswith("line_") or name == "bev_seg"]
        self.disabled_losses = tuple(dict.fromkeys([*lines, *disabled_losses]))
        TrainingModel(self.core, self.disabled_losses)  # checks the names
        self._streams = {True: _Stream(), False: _Stream()}  # of training and evaluation

    def loss(
        self, batch_inputs_dict: dict[str, Any], batch_data_samples: list[Det3DDataSample], **kwargs: Any
    ) -> dict[str, Tensor]:
        """Computes the losses of a batch by name.

        Args:
            batch_inputs_dict: of `PackFrame`, collated.
            batch_data_samples: with `gt_instances_3d`.

        Raises:
            DataError: a sample has no ground truth.
            FloatingPointError: a loss is NaN or infinite.
        """
        inputs = _stacked(batch_inputs_dict["frame"])
        frame, memory = self._streams[True].follow(inputs)
        poses = inputs.frame.ego_from_lidar
        boxes = pad_boxes([_ground_truth(*both) for both in zip(batch_data_samples, poses, strict=True)])
        lines = pad_lines([[]] * len(poses), self.core.config.line_points)
        gt = map_tensors(lambda tensor: tensor.to(frame.images.device), FrameObjects(boxes, lines))
        first = torch.zeros(len(poses), dtype=torch.int64, device=frame.images.device)
        clip = map_tensors(lambda tensor: tensor[:, None], Clip(frame, gt, first))  # [B, T=1]
        # Not kept: the state dict would hold the weights twice.
        model = TrainingModel(self.core, self.disabled_losses).train(self.training)
        losses, memory = model(clip, memory)
        self._streams[True].keep(memory)
        return {f"loss_{name}": loss for name, loss in losses.items()}  # mmengine adds up what has "loss" in its name

    def predict(
        self, batch_inputs_dict: dict[str, Any], batch_data_samples: list[Det3DDataSample], **kwargs: Any
    ) -> list[Det3DDataSample]:
        """Predicts boxes in the LiDAR frame, and lines if the network finds some.

        Args: as for `loss`; ground truth is not read.

        Returns:
            The samples with `pred_instances_3d`: `bboxes_3d` (`LiDARInstance3DBoxes` [M, 9] with velocities along the
            LiDAR's x and y), `labels_3d` and `scores_3d`. `pred_lines` of networks that find lines has `points`
            [M, P, 2] in the ego frame, `labels` (indices into LINE_CLASSES) and `scores`.
        """
        inputs = _stacked(batch_inputs_dict["frame"])
        frame, memory = self._streams[False].follow(inputs)
        state = self.core.initial_state(len(inputs.time_s)) if memory is None else memory
        prediction, state = self.core(frame, state)
        self._streams[False].keep(state)
        objects = self.core.decode(prediction)
        found = []
        for b, sample in enumerate(batch_data_samples):
            boxes, lines = _valid(objects.boxes, b), _valid(objects.lines, b)
            converted = sensor_boxes(boxes, inputs.frame.ego_from_lidar[b], LiDARInstance3DBoxes)
            found.append(InstanceData(bboxes_3d=converted, labels_3d=boxes.label, scores_3d=boxes.score))
            if "line" in self.core.finds:
                sample.pred_lines = InstanceData(points=lines.points, labels=lines.label, scores=lines.score)
        return self.add_pred_to_datasample(batch_data_samples, found)

    def _forward(self, batch_inputs_dict: dict[str, Any], data_samples: Any = None, **kwargs: Any) -> Any:
        """Returns the raw outputs of first frames."""
        frame = _stacked(batch_inputs_dict["frame"]).frame
        return self.core(frame, self.core.initial_state(len(frame.is_first)))[0]

    def extract_feat(self, batch_inputs: dict[str, Any]) -> Tensor:
        """Returns the features of the images [B * N, ...], without the calibration."""
        features: Tensor = self.core.image_encoder(_stacked(batch_inputs["frame"]).frame.images.flatten(0, 1))
        return features


def _stacked(inputs: Any) -> Any:
    """Stacks what mmengine's `pseudo_collate` gives, named tuples of tuples of tensors, to tensors with leading [B]."""
    if hasattr(inputs, "_fields"):
        return type(inputs)(*(_stacked(part) for part in inputs))
    return torch.stack(list(inputs))


def _valid(found: Found, b: int) -> Found:
    """Returns the valid boxes or lines of one element of a batch."""
    valid = found.valid[b]
    return map_tensors(lambda tensor: tensor[b, valid], found)


def _ground_truth(sample: Det3DDataSample, ego_from_lidar: Tensor) -> Boxes:
    if "gt_instances_3d" not in sample:
        raise DataError(
            f"sample {sample.get('token')} of mmdet3d has no boxes for training; put LoadAnnotations3D with "
            "with_bbox_3d and with_label_3d before perception.PackFrame"
        )
    gt = sample.gt_instances_3d
    boxes: BaseInstance3DBoxes = gt.bboxes_3d
    if isinstance(boxes, CameraInstance3DBoxes):
        raise DataError(
            f"sample {sample.get('token')} of mmdet3d has boxes in camera axes; give the dataset box_type_3d='LiDAR'"
        )
    return ego_boxes(boxes, gt.labels_3d.to(boxes.tensor.device), ego_from_lidar)
