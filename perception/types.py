"""Defines the data types of the library.

All data that passes through collate, pin_memory, DDP or export is a NamedTuple of tensors; dicts hold only losses and
metrics. Letters in shapes: B batch, T time, N cameras, H W image, X Y grid, Q queries, M targets (padded),
P points per line, L decoder layers, K classes, C channels. docs/conventions.md explains the frames: `ego` is x forward,
y left, z up in metres; `cam` is x right, y down, z forward; `img` is u right, v down in pixels of the given image, with
pixel centres at +0.5.

This module does not import PyTorch, so that evaluation and the in-vehicle runtime work without it. The in-vehicle
runtime uses the types with the prefix `Numpy`, which have the same fields as numpy arrays.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from numpy.typing import NDArray

from perception.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Array: TypeAlias = NDArray[Any]  # shapes and dtypes stand in comments and docstrings

# The ten classes of the nuScenes detection task, in the order of mmdet3d's nuScenes infos.
BOX_CLASSES = (
    "car", "truck", "trailer", "bus", "construction_vehicle",
    "bicycle", "motorcycle", "pedestrian", "traffic_cone", "barrier",
)  # fmt: skip

# The three classes of the published vector-map tasks, in MapTR's order.
LINE_CLASSES = ("divider", "ped_crossing", "boundary")

# nuScenes attributes; Boxes.attribute indexes this tuple, -1 for none or unknown.
ATTRIBUTES = (
    "cycle.with_rider", "cycle.without_rider",
    "pedestrian.moving", "pedestrian.standing", "pedestrian.sitting_lying_down",
    "vehicle.moving", "vehicle.parked", "vehicle.stopped",
)  # fmt: skip


# The pose of LIDAR_TOP on the cars of nuScenes, level and with its yaw rounded to a whole degree: what networks that
# were trained in the LiDAR frame get where no other pose is given. Axes of the LiDAR: x right, y ahead, z up.
NUSCENES_EGO_FROM_LIDAR = (
    (0.0, 1.0, 0.0, 0.9437),
    (-1.0, 0.0, 0.0, 0.0),
    (0.0, 0.0, 1.0, 1.8402),
    (0.0, 0.0, 0.0, 1.0),
)


class LaneRange(NamedTuple):
    """The rectangle for prediction, training and evaluation of lines, centred at the origin of the frame.

    One value defines the anchors of the line queries, the ground truth of training and the range of evaluation. It is
    written as "60x30" in configs, on command lines and in reports.
    """

    x: float  # length in metres along ego x
    y: float  # length in metres along ego y

    @classmethod
    def parse(cls, text: str) -> LaneRange:
        """Parses a text such as "60x30".

        Raises:
            ConfigError: the text is not of the form AxB with two positive numbers.
        """
        match = re.fullmatch(r"(\d+(?:\.\d+)?)x(\d+(?:\.\d+)?)", text)
        if match is None or not all(float(side) > 0 for side in match.groups()):
            raise ConfigError(f"the lane range is {text!r}; write metres along x and along y, e.g. 60x30")
        return cls(*map(float, match.groups()))

    def __str__(self) -> str:
        return f"{self.x:g}x{self.y:g}"


DEFAULT_LANE_RANGE = LaneRange(60.0, 30.0)  # of the published vector-map tasks


class CameraRig(NamedTuple):
    """Calibration of all cameras: an input of the network, not a constant of its weights.

    `ego_from_cam` is the pose of each camera at its own exposure time, expressed in the ego frame at the reference time
    of the frame.
    """

    img_from_cam: Tensor  # [..., N, 3, 3] pixels of the given images
    ego_from_cam: Tensor  # [..., N, 4, 4] metres
    present: Tensor  # [..., N] bool, False for a missing camera; its image is ignored


class Frame(NamedTuple):
    """One frame: images of all cameras, their calibration, and the motion since the previous frame."""

    images: Tensor  # [B, N, 3, H, W] RGB 0..255, uint8 or float; the network normalises them
    rig: CameraRig
    ego_from_prev: Tensor  # [B, 4, 4] transforms points from the previous ego frame to this one; identity if first
    seconds_since_prev: Tensor  # [B] float32, 0 if first
    is_first: Tensor  # [B] bool, True where the memory must be ignored
    # Pose of the LiDAR frame, in which published networks were trained (docs/conventions.md); calibration, as the rig.
    ego_from_lidar: Tensor  # [B, 4, 4] metres
    # Transforms points from the ego frame at the exposure of each camera to this one; identity where it is the same.
    # `invert_rigid(ego_from_exposure) @ rig.ego_from_cam` is the pose of the camera on the vehicle.
    ego_from_exposure: Tensor  # [B, N, 4, 4]


class Boxes(NamedTuple):
    """Padded 3D boxes in the ego frame, of the ground truth or of a prediction."""

    center: Tensor  # [..., M, 3] geometric centre, metres
    size: Tensor  # [..., M, 3] length (along x of the box), width, height, metres
    yaw: Tensor  # [..., M] radians from ego +x towards ego +y
    velocity: Tensor  # [..., M, 2] m/s over ground, along ego x and y; NaN where the ground truth has none
    label: Tensor  # [..., M] int64 index into BOX_CLASSES
    attribute: Tensor  # [..., M] int64 index into ATTRIBUTES, -1 for none or unknown
    score: Tensor  # [..., M] 0..1, 1 for ground truth
    valid: Tensor  # [..., M] bool, False for padding
    # [..., M, 9] expected absolute error of centre (m), log size, yaw (rad) and velocity (m/s); 0 for ground truth
    uncertainty: Tensor


class Polylines(NamedTuple):
    """Padded vector lines in the ego frame, of the ground truth or of a prediction.

    The last point of a closed line is its first point again.
    """

    points: Tensor  # [..., M, P, 2] metres
    closed: Tensor  # [..., M] bool
    label: Tensor  # [..., M] int64 index into LINE_CLASSES
    score: Tensor  # [..., M] 0..1, 1 for ground truth
    valid: Tensor  # [..., M] bool, False for padding
    # [..., M, P, 2] expected absolute error of each point along x and y, metres; 0 for ground truth
    uncertainty: Tensor


class MapLine(NamedTuple):
    """One vector line with any number of vertices, as in map files and submissions."""

    label: int  # index into LINE_CLASSES
    points: Array  # [P, 2] float64 metres; the last point of a closed line is its first point again
    score: float = 1.0


class FrameObjects(NamedTuple):
    """Boxes and lines of one frame. Ground truth and prediction have the same type."""

    boxes: Boxes
    lines: Polylines
    ids: Ids | None = None  # of a network that tracks, or of a dataset that has them; None without


class Seen(NamedTuple):
    """Which predictions lie where a camera looks, or looked while the memory lasted; see `inference.visibility`.

    Walls and other vehicles are not taken into account: what they hide counts as seen.
    """

    boxes: Tensor  # [M] float32, share of the centre and the eight corners that is seen
    lines: Tensor  # [M, P] bool, for each point


class Ids(NamedTuple):
    """Ids of boxes and lines, the same for the same thing in several frames: tensors in `FrameObjects`, else arrays."""

    boxes: Any  # [..., M] int64, -1 for none
    lines: Any  # [..., M] int64, -1 for none; None in ground truth, whose lines have no ids


class Weights(NamedTuple):
    """Which weights made a live result."""

    name: str | None = None  # of shipped weights or of a file; None if a network was given as an object
    # What they were trained on, as plain JSON values: the fields of `models.provenance.Provenance`; None if unknown.
    trained_on: Mapping[str, Any] | None = None


class StepInfo(NamedTuple):
    """How a live result was made; the same for PyTorch and the torch-free runtime."""

    time_s: float | None = None  # seconds; None if no time was given
    global_from_ego: Array | None = None  # [4, 4] float64 pose of the ego frame, metres; None if none was given
    used_memory: bool = False  # False: the result stands for itself, and earlier frames have no part in it
    no_memory_because: str = ""  # the reason, empty if memory was used
    weights: Weights = Weights()


class LiveObjects(NamedTuple):
    """Result of one step in live use: `FrameObjects`, with what is known about the input."""

    boxes: Boxes
    lines: Polylines
    seen: Seen  # of these boxes and lines
    warnings: tuple[str, ...]  # what is implausible in the input of this step; empty for a good one
    info: StepInfo = StepInfo()
    ids: Ids | None = None  # numpy arrays; None if neither the network nor a tracker gives them

    @property
    def objects(self) -> FrameObjects:
        """The boxes and lines alone, as evaluation takes them."""
        return FrameObjects(self.boxes, self.lines)

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as plain JSON values, see `perception.inference.result`."""
        from perception.inference import result  # it needs this module

        return result.to_dict(self)

    def to_json(self) -> str:
        """Returns the result as JSON text in one line, see `perception.inference.result`."""
        from perception.inference import result  # it needs this module

        return result.to_json(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "result") -> LiveObjects:
        """Reads what `to_dict` returned.

        Args:
            values: the result.
            where: names its place, for messages.

        Raises:
            DataError: it is something else; the message names the field.
        """
        from perception.inference import result  # it needs this module

        return result.as_tensors(result.from_dict(values, where))

    @classmethod
    def from_json(cls, text: str, where: str = "result") -> LiveObjects:
        """Reads what `to_json` returned; see `from_dict`."""
        from perception.inference import result  # it needs this module

        return result.as_tensors(result.from_json(text, where))


class NumpyCameraRig(NamedTuple):
    """`CameraRig` as numpy arrays, the input of the in-vehicle runtime."""

    img_from_cam: NDArray[Any]
    ego_from_cam: NDArray[Any]
    present: NDArray[Any]


class NumpyBoxes(NamedTuple):
    """`Boxes` as numpy arrays."""

    center: NDArray[Any]
    size: NDArray[Any]
    yaw: NDArray[Any]
    velocity: NDArray[Any]
    label: NDArray[Any]
    attribute: NDArray[Any]
    score: NDArray[Any]
    valid: NDArray[Any]
    uncertainty: NDArray[Any]


class NumpyPolylines(NamedTuple):
    """`Polylines` as numpy arrays."""

    points: NDArray[Any]
    closed: NDArray[Any]
    label: NDArray[Any]
    score: NDArray[Any]
    valid: NDArray[Any]
    uncertainty: NDArray[Any]


class NumpyFrameObjects(NamedTuple):
    """`FrameObjects` as numpy arrays."""

    boxes: NumpyBoxes
    lines: NumpyPolylines
    ids: Ids | None = None


class NumpySeen(NamedTuple):
    """`Seen` as numpy arrays."""

    boxes: NDArray[Any]
    lines: NDArray[Any]


class NumpyLiveObjects(NamedTuple):
    """`LiveObjects` as numpy arrays, the result of the in-vehicle runtime."""

    boxes: NumpyBoxes
    lines: NumpyPolylines
    seen: NumpySeen
    warnings: tuple[str, ...]
    info: StepInfo = StepInfo()
    ids: Ids | None = None

    @property
    def objects(self) -> NumpyFrameObjects:
        """The boxes and lines alone, as evaluation takes them."""
        return NumpyFrameObjects(self.boxes, self.lines)

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as plain JSON values, as `LiveObjects.to_dict` does."""
        from perception.inference import result  # it needs this module

        return result.to_dict(self)

    def to_json(self) -> str:
        """Returns the result as JSON text in one line, as `LiveObjects.to_json` does."""
        from perception.inference import result  # it needs this module

        return result.to_json(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "result") -> NumpyLiveObjects:
        """Reads what `to_dict` returned; see `LiveObjects.from_dict`."""
        from perception.inference import result  # it needs this module

        return result.from_dict(values, where)

    @classmethod
    def from_json(cls, text: str, where: str = "result") -> NumpyLiveObjects:
        """Reads what `to_json` returned; see `LiveObjects.from_dict`."""
        from perception.inference import result  # it needs this module

        return result.from_json(text, where)


# What a network remembers: an argument and a result, never an attribute of a module. A NamedTuple of tensors [B, ...],
# or of such NamedTuples; a part may be None. Each network has its own; `State` is that of networks with a BEV map.
Memory: TypeAlias = tuple[Any, ...]


class State(NamedTuple):
    """The memory of a network that remembers a BEV map, or nothing."""

    bev: Tensor  # [B, C, X, Y], empty if nothing is remembered


class ImagePrediction(NamedTuple):
    """Predictions for each pixel of the image features, without the BEV map."""

    logits: Tensor  # [B, N, K, h, w] box class
    depth_logits: Tensor  # [B, N, D, h, w] depth of the box centre, see `models.bev_transformer.encoder`
    heading: Tensor  # [B, N, 2, h, w] sin cos of the yaw relative to the viewing ray through the box centre


class Prediction(NamedTuple):
    """Raw outputs of every decoder layer, for the losses. `decode` converts the last layer to `FrameObjects`."""

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
    """Consecutive frames of B scenes with their ground truth."""

    frames: Frame  # every tensor with leading [B, T]
    gt: FrameObjects  # every tensor with leading [B, T]
    sample_index: Tensor  # [B, T] int64 index into the dataset's tokens


Data = TypeVar("Data")
FrameData = TypeVar("FrameData", FrameObjects, NumpyFrameObjects)


def map_tensors(function: Callable[[Any], Any], data: Data) -> Data:
    """Applies a function to every tensor of a NamedTuple and of the NamedTuples in it, and keeps the types.

    `map_tensors(lambda tensor: tensor[:, t], clip.frames)` is the frame at time t. None stays None.
    """
    if data is None:
        return data
    if isinstance(data, tuple):
        return type(data)(*(map_tensors(function, part) for part in data))
    result: Data = function(data)
    return result


def chosen(objects: FrameData, boxes: Any, lines: Any) -> FrameData:
    """Returns some of the boxes and lines of a frame, with their ids, by masks or indices into their first axis."""
    ids = objects.ids and Ids(objects.ids.boxes[boxes], objects.ids.lines[lines])
    return objects._replace(
        boxes=map_tensors(lambda tensor: tensor[boxes], objects.boxes),
        lines=map_tensors(lambda tensor: tensor[lines], objects.lines),
        ids=ids,
    )


def named_tensors(data: Any) -> dict[str, Any]:
    """Lists the tensors of a NamedTuple and of the NamedTuples in it by their names, joined by underscores.

    `named_tensors(frame)` has the keys `images`, `rig_img_from_cam` and so on. A part that is None has no tensors.
    """
    found: dict[str, Any] = {}
    for name, part in zip(data._fields, data, strict=True):
        if isinstance(part, tuple):
            found |= {f"{name}_{inner}": tensor for inner, tensor in named_tensors(part).items()}
        elif part is not None:
            found[name] = part
    return found
