"""The nouns of the library.

Everything that travels through collate, pin_memory, DDP or export is a NamedTuple of tensors; dicts are only for losses
and metrics. Letters in shapes: B batch, T time, N cameras, H W image, X Y grid, Q queries, M targets (padded),
P points per line, L decoder layers, K classes, C channels. Frames are explained in docs/conventions.md: `ego` is
x forward, y left, z up in metres; `cam` is x right, y down, z forward; `img` is u right, v down in pixels of the image
that is given, pixel centres at +0.5.

Nothing here needs PyTorch at run time: what is scored and what is deployed goes without it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from perception.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Array: TypeAlias = np.ndarray[Any, Any]  # shapes and dtypes stand in comments and docstrings

# The ten classes of the nuScenes detection task, in the order of mmdet3d's nuScenes infos.
BOX_CLASSES = (
    "car", "truck", "trailer", "bus", "construction_vehicle",
    "bicycle", "motorcycle", "pedestrian", "traffic_cone", "barrier",
)  # fmt: skip

# The three classes of the published vector-map tasks, in MapTR's order.
LINE_CLASSES = ("divider", "ped_crossing", "boundary")

# nuScenes attributes; Boxes.attribute indexes this tuple, -1 where a box has none or it is not known.
ATTRIBUTES = (
    "cycle.with_rider", "cycle.without_rider",
    "pedestrian.moving", "pedestrian.standing", "pedestrian.sitting_lying_down",
    "vehicle.moving", "vehicle.parked", "vehicle.stopped",
)  # fmt: skip


class LaneRange(NamedTuple):
    """The rectangle in which lines are predicted, trained and compared, centred at the frame's origin.

    One value decides the anchors of the line queries, the ground truth of training and what evaluation compares.
    Written as "60x30" in configs, on command lines and in reports.
    """

    x: float  # metres along ego x (ahead and behind together)
    y: float  # metres along ego y (left and right together)

    @classmethod
    def parse(cls, text: str) -> LaneRange:
        """The range that a text such as "60x30" names.

        Raises:
            ConfigError: the text is not two positive numbers with an x between them.
        """
        match = re.fullmatch(r"(\d+(?:\.\d+)?)x(\d+(?:\.\d+)?)", text)
        if match is None or not all(float(side) > 0 for side in match.groups()):
            raise ConfigError(f"the lane range is {text!r}; write metres along x and along y, e.g. 60x30")
        return cls(*map(float, match.groups()))

    def __str__(self) -> str:
        return f"{self.x:g}x{self.y:g}"


DEFAULT_LANE_RANGE = LaneRange(60.0, 30.0)  # of the published vector-map tasks


class CameraRig(NamedTuple):
    """Calibration of all cameras: an input of the network, never baked in.

    `ego_from_cam` already holds each camera's own exposure pose, carried to the frame's reference time.
    """

    img_from_cam: Tensor  # [..., N, 3, 3] pixels of the given images
    ego_from_cam: Tensor  # [..., N, 4, 4] metres
    present: Tensor  # [..., N] bool, False for a camera that is missing; its image is ignored


class Frame(NamedTuple):
    """One frame: images of all cameras, their calibration, and the motion since the previous frame."""

    images: Tensor  # [B, N, 3, H, W] RGB 0..255, uint8 or float; the network normalises
    rig: CameraRig
    ego_from_prev: Tensor  # [B, 4, 4] takes points of the previous frame's ego frame to this one's; identity if first
    seconds_since_prev: Tensor  # [B] float32, 0 if first
    is_first: Tensor  # [B] bool, the memory is ignored where True


class Boxes(NamedTuple):
    """Padded 3D boxes in the ego frame; ground truth and prediction alike."""

    center: Tensor  # [..., M, 3] geometric centre, metres
    size: Tensor  # [..., M, 3] length (along x of the box), width, height, metres
    yaw: Tensor  # [..., M] radians from ego +x towards ego +y
    velocity: Tensor  # [..., M, 2] m/s over ground, along ego x and y; NaN where the ground truth does not know it
    label: Tensor  # [..., M] int64 index into BOX_CLASSES
    attribute: Tensor  # [..., M] int64 index into ATTRIBUTES, -1 for none or unknown
    score: Tensor  # [..., M] 0..1, 1 for ground truth
    valid: Tensor  # [..., M] bool, False for padding
    uncertainty: (
        Tensor  # [..., M, 9] expected error of centre (m), log size, yaw (rad), velocity (m/s); 0 for ground truth
    )


class Polylines(NamedTuple):
    """Padded vector lines in the ego frame; ground truth and prediction alike. A closed line repeats its first point
    last."""

    points: Tensor  # [..., M, P, 2] metres
    closed: Tensor  # [..., M] bool
    label: Tensor  # [..., M] int64 index into LINE_CLASSES
    score: Tensor  # [..., M] 0..1, 1 for ground truth
    valid: Tensor  # [..., M] bool, False for padding
    uncertainty: (
        Tensor  # [..., M, P, 2] expected absolute error of each point along x and y, metres; 0 for ground truth
    )


class MapLine(NamedTuple):
    """One vector line with as many vertices as it needs: what map files and submissions hold."""

    label: int  # index into LINE_CLASSES
    points: Array  # [P, 2] float64 metres; a closed line repeats its first point last
    score: float = 1.0


class FrameObjects(NamedTuple):
    """What there is to see at one frame. Ground truth and prediction have the same type."""

    boxes: Boxes
    lines: Polylines


class State(NamedTuple):
    """Everything the network remembers: an argument and a result, never an attribute of a module."""

    bev: Tensor  # [B, C, X, Y]


class ImagePrediction(NamedTuple):
    """What each pixel of the image features shows, before there is a map."""

    logits: Tensor  # [B, N, K, h, w] which box class, if any
    depth_logits: Tensor  # [B, N, D, h, w] how far away the centre of that box is, see `bev_encoder.depth_bin`
    heading: Tensor  # [B, N, 2, h, w] sin cos of its yaw, seen from the line of sight to its centre


class Prediction(NamedTuple):
    """Raw outputs of every decoder layer, for the losses. `decode` turns the last layer into a FrameObjects."""

    box_logits: Tensor  # [L, B, Q, K]
    box_params: Tensor  # [L, B, Q, 10] centre x y z (m, ego), log length width height, sin cos yaw, velocity x y
    box_log_uncertainty: Tensor  # [L, B, Q, 9] logarithm of `Boxes.uncertainty`
    line_logits: Tensor  # [L, B, Q, K]
    line_points: Tensor  # [L, B, Q, P, 2] metres, ego
    line_log_uncertainty: Tensor  # [L, B, Q, P, 2] logarithm of `Polylines.uncertainty`
    heatmap_logits: Tensor  # [B, K, X, Y] dense centre heat map of the boxes
    bev_seg_logits: Tensor  # [B, K, X, Y] BEV segmentation of the lines
    images: ImagePrediction


class Clip(NamedTuple):
    """Consecutive frames of one scene (or of B scenes) with their truth."""

    frames: Frame  # every tensor with leading [B, T]
    gt: FrameObjects  # every tensor with leading [B, T]
    sample_index: Tensor  # [B, T] int64 index into the dataset's tokens


Noun = TypeVar("Noun", bound="tuple[Any, ...]")


def map_tensors(function: Callable[[Tensor], Tensor], noun: Noun) -> Noun:
    """Applies a function to every tensor of a noun, also of the nouns inside it, and keeps the types.

    `map_tensors(lambda tensor: tensor[:, t], clip.frames)` is the frame at time t.
    """
    if isinstance(noun, tuple):
        return type(noun)(*(map_tensors(function, part) for part in noun))
    return function(noun)
