"""Sparse4Dv3 (https://arxiv.org/abs/2311.11722) and the first stage of SparseDrive (https://arxiv.org/abs/2405.19620).

Both run the released weights. Modules are named as in the published checkpoints. The networks work in the LiDAR frame
(x right, y ahead) and have their own order of classes; `decode` converts both. What differs from the published code:

- A first frame (`Frame.is_first`) starts without a memory. The published code never drops the memory, and carries it
  into the next scene as keys of attention.
- The depth branch, an auxiliary task of training, learns from the boxes in the images, not from LiDAR points.
- A network that has not been trained starts from regular anchors, not from clusters of the ground truth.
- The published detector of SparseDrive gives all samples of a batch the result of the last one; here each has its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from perception.geometry import invert_rigid
from perception.models.decoding import LOG_UNCERTAINTY_RANGE, close_rings, empty_lines
from perception.models.maptr.losses import lidar_lines
from perception.models.published.backbone import padded_size
from perception.models.published.geometry import lidar_level, lidar_projections
from perception.models.published.losses import sum_layers
from perception.models.sparse4d.aggregation import CameraView
from perception.models.sparse4d.blocks import DepthBranch
from perception.models.sparse4d.boxes import PUBLISHED_CLASSES, YAW, decoded, rank_boxes, to_library_classes
from perception.models.sparse4d.config import Sparse4DConfig, SparseDriveConfig
from perception.models.sparse4d.denoising import Denoised, HandedOn, Noisy, make_noisy, no_groups
from perception.models.sparse4d.head import Instances, SparseHead, box_head, line_head
from perception.models.sparse4d.lines import PUBLISHED_LINE_CLASSES, rank_lines, to_library_line_classes
from perception.models.sparse4d.losses import (
    BOX_LOSS_WEIGHTS,
    DENOISING_LOSS_WEIGHTS,
    DEPTH_LOSS_WEIGHT,
    LINE_LOSS_WEIGHTS,
    BoxTargets,
    LineTargets,
    box_losses,
    denoising_losses,
    depth_loss,
    encode_boxes,
    line_losses,
)
from perception.models.sparse4d.memory import InstanceMemory, Motion
from perception.targets import line_orderings, ray_cast_boxes
from perception.types import Boxes, Frame, FrameObjects, Ids, Polylines

# Prefixes of the keys in published checkpoints, and the library's.
PREFIXES = {"img_backbone.": "image_encoder.backbone.", "img_neck.": "image_encoder.neck."}


class SparseMemory(NamedTuple):
    """What Sparse4D and SparseDrive remember."""

    boxes: InstanceMemory
    lines: InstanceMemory | None  # None for Sparse4D; empty for SparseDrive's first stage
    denoising: HandedOn  # noisy instances, in training; no groups otherwise


class SparsePrediction(NamedTuple):
    """Predictions of all decoder layers, for losses and decoding."""

    boxes: Instances
    lines: Instances | None  # None for Sparse4D
    denoised: Denoised | None  # of noisy instances, in training
    depths: Tensor | None  # [B, N, pixels of all levels] metres, in training
    ego_from_lidar: Tensor  # [B, 4, 4]


class Sparse4D(nn.Module):
    """Predicts and tracks boxes from calibrated images of any number of cameras and remembered instances."""

    finds: ClassVar[tuple[str, ...]] = ("box",)
    loss_weights: ClassVar[Mapping[str, float]] = {
        **BOX_LOSS_WEIGHTS, **DENOISING_LOSS_WEIGHTS, "depth": DEPTH_LOSS_WEIGHT
    }  # fmt: skip
    image_loss = None
    needs_gt: ClassVar[bool] = True
    tracks: ClassVar[bool] = True
    raw_names: ClassVar[tuple[str, ...]] = ("box_logits", "box_params", "box_quality")
    no_export: ClassVar[str] = ""
    recomputable: ClassVar[tuple[str, ...]] = ("head.layers",)
    extra_inputs: ClassVar[tuple[str, ...]] = ("ego_from_lidar",)
    published_prefixes: ClassVar[Mapping[str, str]] = PREFIXES

    def __init__(self, config: Sparse4DConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = config.backbone.build(config.channels)
        self.head = self._build_head()
        self.depth_branch = DepthBranch(config.channels, len(self._depth_strides))

    def _build_head(self) -> nn.Module:
        return box_head(self.config)

    @property
    def _depth_strides(self) -> tuple[int, ...]:
        """Pixels per cell of the levels from which the depth branch learns."""
        return self.config.backbone.strides[: self.config.depth_layers]

    @property
    def _heads(self) -> tuple[SparseHead, SparseHead | None]:
        """The heads for boxes and for lines."""
        assert isinstance(self.head, SparseHead)
        return self.head, None

    def initial_state(self, batch_size: int) -> SparseMemory:
        """Returns the memory of a first frame."""
        box, line = self._heads
        boxes = box.instance_bank.empty(batch_size)
        lines = None if line is None else line.instance_bank.empty(batch_size)
        return SparseMemory(boxes, lines, no_groups(boxes.feature, boxes.anchor))

    def forward(
        self, frame: Frame, state: SparseMemory, gt: FrameObjects | None = None
    ) -> tuple[SparsePrediction, SparseMemory]:
        """Predicts the objects of one frame.

        Args:
            frame: leading [B], images [B, N, 3, H, W] of the configured size.
            state: of the previous frame, or `initial_state`.
            gt: ground truth, for denoising in training.

        Returns:
            Predictions of all decoder layers, and the state for the next frame.
        """
        features = self.image_encoder(frame.images)
        with _without_autocast(frame.images.device):  # as published, the heads run in float32
            features = [level.float() for level in features]
            view = CameraView(features, lidar_projections(frame), padded_size(frame.images))
            ego_from_lidar = frame.ego_from_lidar.float()
            lidar_from_prev = invert_rigid(ego_from_lidar) @ frame.ego_from_prev.float() @ ego_from_lidar
            motion = Motion(lidar_from_prev, frame.seconds_since_prev, frame.is_first)
            noisy = self._noisy(gt, ego_from_lidar) if gt is not None else None
            box, line = self._heads
            of_boxes = box(view, state.boxes, motion, noisy, state.denoising)
            lines, line_memory = None, state.lines
            if line is not None and state.lines is not None:
                of_lines = line(view, state.lines, motion)
                lines, line_memory = of_lines.instances, of_lines.memory
            depths = None
            if self.training:
                focal_px = frame.rig.img_from_cam[..., 0, 0].float()
                depths = torch.cat([depth.flatten(2) for depth in self.depth_branch(features, focal_px)], -1)
        prediction = SparsePrediction(of_boxes.instances, lines, of_boxes.denoised, depths, ego_from_lidar)
        return prediction, SparseMemory(of_boxes.memory, line_memory, of_boxes.handed_on)

    def _noisy(self, gt: FrameObjects, ego_from_lidar: Tensor) -> Noisy | None:
        targets = self._box_targets(gt.boxes, ego_from_lidar)
        return make_noisy(self.config.denoising, *targets, gt.ids and gt.ids.boxes)

    def _box_targets(self, boxes: Boxes, ego_from_lidar: Tensor) -> BoxTargets:
        """Converts ground truth [B, M] in the ego frame."""
        encoded = encode_boxes(lidar_boxes(boxes, ego_from_lidar))
        near = encoded[..., :2].norm(dim=-1) <= self.config.box_range
        return BoxTargets(encoded, to_published(boxes.label, PUBLISHED_CLASSES), boxes.valid & near)

    def loss(self, prediction: SparsePrediction, gt: FrameObjects, frame: Frame) -> dict[str, Tensor]:
        """Computes the weighted losses by name, summed over decoder layers.

        Boxes farther than `Sparse4DConfig.box_range` are left out.
        """
        targets = self._box_targets(gt.boxes, prediction.ego_from_lidar)
        losses = sum_layers(box_losses(prediction.boxes, targets))
        if prediction.denoised is not None:
            losses |= sum_layers(denoising_losses(prediction.denoised, self.config.boxes.single_frame_layers))
        else:  # the same losses in every step
            losses |= dict.fromkeys(DENOISING_LOSS_WEIGHTS, losses["box_class"].new_zeros(()))
        assert prediction.depths is not None  # in training mode
        image_size = padded_size(frame.images)
        H, W = image_size
        sizes = [(-(-H // stride), -(-W // stride)) for stride in self._depth_strides]
        targets_depth = []
        for size in sizes:
            depth, _ = ray_cast_boxes(gt.boxes, frame.rig, image_size, size)
            known = depth.isfinite() & frame.rig.present[..., None, None]
            targets_depth.append(torch.where(known, depth, -1.0).flatten(2))
        depths = prediction.depths.split([h * w for h, w in sizes], -1)
        return losses | {"depth": depth_loss(list(depths), targets_depth)}

    def raw_outputs(self, prediction: SparsePrediction) -> tuple[Tensor, ...]:
        """Returns class logits, encoded boxes and quality of the last decoder layer, [B, Q, ...]."""
        boxes = prediction.boxes
        return boxes.logits[-1], boxes.anchors[-1], boxes.quality[-1]

    def decode(self, prediction: SparsePrediction) -> FrameObjects:
        """Decodes boxes with ids in the ego frame, best score first, and no lines."""
        boxes, ids = decode_boxes(prediction.boxes, prediction.ego_from_lidar, self.config.boxes.max_boxes)
        lines = empty_lines(len(boxes.score), boxes.score.device)
        return FrameObjects(boxes, lines, Ids(ids, lines.label))


class _TwoHeads(nn.Module):
    """The heads of SparseDrive under their published names."""

    def __init__(self, config: SparseDriveConfig) -> None:
        super().__init__()
        self.det_head, self.map_head = box_head(config), line_head(config, config.lines)


class SparseDrive(Sparse4D):
    """Predicts and tracks boxes and predicts lines: the first stage of SparseDrive."""

    finds: ClassVar[tuple[str, ...]] = ("box", "line")
    loss_weights: ClassVar[Mapping[str, float]] = {**Sparse4D.loss_weights, **LINE_LOSS_WEIGHTS}
    raw_names: ClassVar[tuple[str, ...]] = (*Sparse4D.raw_names, "line_logits", "line_points")
    recomputable: ClassVar[tuple[str, ...]] = ("head.det_head.layers", "head.map_head.layers")
    config: SparseDriveConfig

    def _build_head(self) -> nn.Module:
        return _TwoHeads(self.config)

    @property
    def _heads(self) -> tuple[SparseHead, SparseHead | None]:
        assert isinstance(self.head, _TwoHeads)
        return self.head.det_head, self.head.map_head

    def loss(self, prediction: SparsePrediction, gt: FrameObjects, frame: Frame) -> dict[str, Tensor]:
        """Computes the weighted losses by name, summed over decoder layers."""
        assert prediction.lines is not None
        lines = lidar_lines(gt.lines, prediction.ego_from_lidar)
        points, exists = line_orderings(lines)
        label = to_published(lines.label, PUBLISHED_LINE_CLASSES)
        targets = LineTargets(points.flatten(3), exists, label, lines.valid)
        layers = line_losses(prediction.lines.logits, prediction.lines.anchors, targets, self.config.lines.size)
        return super().loss(prediction, gt, frame) | sum_layers(layers)

    def raw_outputs(self, prediction: SparsePrediction) -> tuple[Tensor, ...]:
        """Returns the raw outputs of boxes, then class logits and points of lines of the last decoder layer."""
        lines = prediction.lines
        assert lines is not None
        return (*super().raw_outputs(prediction), lines.logits[-1], lines.anchors[-1].unflatten(-1, (-1, 2)))

    def decode(self, prediction: SparsePrediction) -> FrameObjects:
        """Decodes boxes with ids, and lines, in the ego frame, best score first."""
        assert prediction.lines is not None
        boxes, ids = decode_boxes(prediction.boxes, prediction.ego_from_lidar, self.config.boxes.max_boxes)
        lines = decode_lines(prediction.lines, prediction.ego_from_lidar)
        return FrameObjects(boxes, lines, Ids(ids, torch.full_like(lines.label, -1)))


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Returns a context without autocast; nothing where there is none, so that a graph does not hold it."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def to_published(label: Tensor, order: tuple[int, ...]) -> Tensor:
    """Converts the library's labels to the published order of classes, given as indices into the library's."""
    return label.new_tensor([order.index(k) for k in range(len(order))])[label]


def lidar_boxes(boxes: Boxes, ego_from_lidar: Tensor) -> Tensor:
    """Converts boxes to the LiDAR frame.

    Args:
        boxes: [B, M] in the ego frame.
        ego_from_lidar: [B, 4, 4].

    Returns:
        [B, M, 9]: x, y, z of the centre, length, width, height, yaw from LiDAR x towards y, velocity.
    """
    rotation = ego_from_lidar[:, :3, :3]
    center = (boxes.center - ego_from_lidar[:, None, :3, 3]) @ rotation
    heading = torch.stack([boxes.yaw.cos(), boxes.yaw.sin()], -1) @ rotation[:, :2, :2]
    yaw = torch.atan2(heading[..., 1], heading[..., 0])[..., None]
    return torch.cat([center, boxes.size, yaw, boxes.velocity @ rotation[:, :2, :2]], -1)


def decode_boxes(instances: Instances, ego_from_lidar: Tensor, count: int) -> tuple[Boxes, Tensor]:
    """Decodes the boxes of the last decoder layer into the ego frame.

    Args:
        instances: leading [B] after the layers.
        ego_from_lidar: [B, 4, 4].
        count: number of boxes.

    Returns:
        The boxes [B, count], best score first, and their ids [B, count].
    """
    logits, quality, anchors = (x[-1].float() for x in instances[:3])
    score, label = logits.sigmoid().topk(1)  # not `max`: parsers were not checked for ArgMax
    ranked = rank_boxes(score, label, quality, anchors, count)
    values = decoded(ranked.boxes)
    rotation = ego_from_lidar[:, :3, :3].transpose(1, 2)
    center = values[..., :3] @ rotation + ego_from_lidar[:, None, :3, 3]
    heading = ranked.boxes[..., YAW].flip(-1) @ rotation[:, :2, :2]  # cos, sin
    boxes = Boxes(
        center=center,
        size=values[..., 3:6],
        yaw=torch.atan2(heading[..., 1], heading[..., 0]),
        velocity=values[..., 7:9] @ rotation[:, :2, :2],
        label=to_library_classes(ranked.label),
        attribute=torch.full_like(ranked.label, -1),
        score=ranked.score,
        valid=torch.ones_like(ranked.label, dtype=torch.bool),
        uncertainty=torch.full((*score.shape[:1], count, 9), math.exp(LOG_UNCERTAINTY_RANGE[1]), device=score.device),
    )
    return boxes, instances.ids.gather(1, ranked.instance).long()


def decode_lines(instances: Instances, ego_from_lidar: Tensor) -> Polylines:
    """Decodes the lines of the last decoder layer into the ego frame, best score first.

    Args:
        instances: leading [B] after the layers.
        ego_from_lidar: [B, 4, 4].
    """
    score, label, points = rank_lines(instances.logits[-1].float(), instances.anchors[-1].float())
    rotation, translation = lidar_level(ego_from_lidar)
    points = points @ rotation[:, None].mT + translation[:, None, None]
    uncertainty = torch.full_like(points, math.exp(LOG_UNCERTAINTY_RANGE[1]))
    points, uncertainty, closed = close_rings(points, uncertainty)
    return Polylines(points, closed, to_library_line_classes(label), score, torch.ones_like(closed), uncertainty)
