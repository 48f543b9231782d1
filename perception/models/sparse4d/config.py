"""Configuration of Sparse4Dv3 and of SparseDrive's first stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from perception.models.published.backbone import FPNConfig, PublishedBackboneConfig
from perception.types import DEFAULT_LANE_RANGE, LaneRange

# Key points of a box in parts of its length, width and height: the centre and points near the six faces.
FIXED_POINTS = (
    (0.0, 0.0, 0.0), (0.45, 0.0, 0.0), (-0.45, 0.0, 0.0), (0.0, 0.45, 0.0), (0.0, -0.45, 0.0), (0.0, 0.0, 0.45),
    (0.0, 0.0, -0.45),
)  # fmt: skip


@dataclass(frozen=True)
class HeadConfig:
    """Configures what the heads for boxes and for lines share.

    Args:
        anchors: instances per frame.
        remembered: how many of them are remembered for the next frame, 0 for none.
        layers: decoder layers.
        single_frame_layers: decoder layers before the remembered instances replace some of the new ones.
        classes: of the scores, in the published order.
        feed_forward: hidden channels.
        decoupled: attention sees features and anchor encodings concatenated; False adds them.
        first_attention: the first single-frame layer has self-attention, too.
        scores_all_layers: every layer predicts scores in evaluation mode; False for the first and the last ones. In
            training mode every layer does.
        keeps_confidence: after a pause that is too long for the memory, its confidence still counts for the instances
            in its place, as in Sparse4D; SparseDrive clears it.
        confidence_decay: factor of the remembered confidence per frame.
        default_interval: seconds between frames where there is no memory, or it is too old.
        max_interval: seconds after which remembered instances do not replace new ones.
    """

    anchors: int = 900
    remembered: int = 600
    layers: int = 6
    single_frame_layers: int = 1
    classes: int = 10
    feed_forward: int = 1024
    decoupled: bool = True
    first_attention: bool = False
    scores_all_layers: bool = False
    keeps_confidence: bool = True
    confidence_decay: float = 0.6
    default_interval: float = 0.5
    max_interval: float = 2.0


@dataclass(frozen=True)
class BoxHeadConfig(HeadConfig):
    """Configures the head for boxes.

    Args:
        encoder: channels of the encodings of position, size, yaw and velocity; their sum is the number of channels.
        encoder_loops: layers of each encoding.
        fixed_points: key points in parts of length, width and height.
        learned_points: further key points, predicted for each instance.
        swaps_yaw: sin and cos of the yaw of remembered boxes change places in every frame, as in the published Sparse4D
            and in its weights; SparseDrive repaired it.
        max_boxes: decoded boxes.
    """

    encoder: tuple[int, int, int, int] = (128, 32, 32, 64)
    encoder_loops: int = 4
    fixed_points: tuple[tuple[float, float, float], ...] = FIXED_POINTS
    learned_points: int = 6
    swaps_yaw: bool = True
    max_boxes: int = 300


@dataclass(frozen=True)
class LineHeadConfig(HeadConfig):
    """Configures the head for lines.

    Args:
        points: per line.
        learned_points: key points for each point and height.
        heights: of the key points above the ground, metres.
        ground: height of the ground in the LiDAR frame, metres.
        size: extent of the range of lines along LiDAR x and y, metres, centred at the LiDAR.
    """

    anchors: int = 100
    remembered: int = 0
    classes: int = 3
    decoupled: bool = False
    first_attention: bool = True
    scores_all_layers: bool = True
    keeps_confidence: bool = False
    points: int = 20
    learned_points: int = 3
    heights: tuple[float, ...] = (0.0, 0.5, -0.5, 1.0, -1.0)
    ground: float = -1.84023
    size: tuple[float, float] = (30.0, 60.0)


@dataclass(frozen=True)
class DenoisingConfig:
    """Configures denoising, see `perception.models.sparse4d.denoising`.

    Args:
        groups: of noisy instances, 0 for none.
        handed_on: how many of them are handed on to the next frame.
        max_boxes: boxes of a frame that take part.
        noise: largest noise of a positive instance, in each of the first values of an encoded box.
    """

    groups: int = 5
    handed_on: int = 3
    max_boxes: int = 32
    noise: tuple[float, ...] = (2.0, 2.0, 2.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Sparse4DConfig:
    """Configures Sparse4Dv3.

    Args:
        image_size: height and width of the images.
        backbone: ResNet and FPN, or the flagship's image encoder; each head samples all levels.
        channels: of image features and instances.
        groups: of channels with sampling weights of their own.
        heads: of attention.
        boxes: the head.
        drop_outside: key points outside an image do not count, as in the published CUDA operator, with which the
            released weights were trained. False samples as its PyTorch form does: up to half a feature cell outside.
        best_cameras: each instance samples only the cameras that count most for it, for speed; None for all.
        dropout: in attention and feed-forward layers.
        sampling_dropout: of sampling weights.
        depth_layers: first feature levels from which the auxiliary depth branch learns; all if there are fewer.
        denoising: noisy instances in training.
        box_range: metres; the loss leaves out boxes farther from the LiDAR.
    """

    image_size: tuple[int, int] = (256, 704)
    backbone: PublishedBackboneConfig | FPNConfig = field(
        default_factory=lambda: PublishedBackboneConfig(outputs=(0, 1, 2, 3), levels=4, trains_norm=True)
    )
    channels: int = 256
    groups: int = 8
    heads: int = 8
    boxes: BoxHeadConfig = field(default_factory=BoxHeadConfig)
    drop_outside: bool = True
    best_cameras: int | None = None
    dropout: float = 0.1
    sampling_dropout: float = 0.15
    depth_layers: int = 3
    denoising: DenoisingConfig = field(default_factory=DenoisingConfig)
    box_range: float = 55.0
    cameras: ClassVar[None] = None  # any number: their calibration is encoded
    # Of the ground-truth lines that datasets load; Sparse4D predicts no lines.
    line_points: ClassVar[int] = 20
    lane_range: ClassVar[LaneRange] = DEFAULT_LANE_RANGE

    @classmethod
    def presets(cls) -> Mapping[str, Callable[[], Sparse4DConfig]]:
        """Returns the published network by name."""
        return {"sparse4dv3_temporal_r50_1x8_bs6_256x704": cls}


def _sparsedrive_boxes() -> BoxHeadConfig:
    return BoxHeadConfig(swaps_yaw=False, keeps_confidence=False, scores_all_layers=True)


@dataclass(frozen=True)
class SparseDriveConfig(Sparse4DConfig):
    """Configures SparseDrive's first stage: the box head of Sparse4D with its slips repaired, and a head for lines.

    Args:
        lines: the head.
    """

    boxes: BoxHeadConfig = field(default_factory=_sparsedrive_boxes)
    denoising: DenoisingConfig = field(default_factory=lambda: DenoisingConfig(groups=0, handed_on=0))
    lines: LineHeadConfig = field(default_factory=LineHeadConfig)

    @property
    def line_points(self) -> int:  # type: ignore[override]
        """Points per line."""
        return self.lines.points

    @property
    def lane_range(self) -> LaneRange:  # type: ignore[override]
        """The range of the lines along the vehicle and across it; the LiDAR's y is ahead."""
        return LaneRange(self.lines.size[1], self.lines.size[0])

    @classmethod
    def presets(cls) -> Mapping[str, Callable[[], SparseDriveConfig]]:
        """Returns the published network by name."""
        return {"sparsedrive_small_stage1": cls}
