"""What decides the shape of the flagship."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from perception.errors import ConfigError
from perception.types import DEFAULT_LANE_RANGE, LaneRange


@dataclass(frozen=True)
class BEVTransformerConfig:
    """Everything that decides the shape of the network. Lengths in metres, in the ego frame."""

    image_size: tuple[int, int] = (160, 288)  # height and width of the input
    backbone: str = "resnet18"
    backbone_stages: int = 3
    neck: str = ""  # of mmdet or mmdet3d, instead of the feature pyramid
    feature_stride: int = 8
    channels: int = 64
    x_range: tuple[float, float] = (-51.2, 51.2)
    y_range: tuple[float, float] = (-51.2, 51.2)
    grid: tuple[int, int] = (80, 80)  # BEV cells along x and y
    heights: tuple[float, ...] = (0.0, 0.6, 1.2, 2.4)  # of the reference points of a pillar, above ground
    cameras_per_cell: int = 2
    camera_samples: int = 1  # places read per height and camera
    depth_bins: int = 32
    lane_range: LaneRange = DEFAULT_LANE_RANGE  # in which lines are predicted, also of the ground truth
    heads: int = 4
    decoder_layers: int = 3
    box_queries: int = 100
    line_queries: int = 40
    line_points: int = 20
    cameras: ClassVar[None] = None  # any number

    @classmethod
    def nano(cls) -> BEVTransformerConfig:
        """Trains on two CPU cores; ResNet-18 without its last stage, 160x288 images."""
        return cls(heights=(0.0, 0.8, 2.0), cameras_per_cell=1, depth_bins=64)

    @classmethod
    def tiny(cls) -> BEVTransformerConfig:
        """ResNet-18, 256x448 images, a finer grid."""
        return cls(
            image_size=(256, 448), backbone_stages=4, channels=128, grid=(128, 128), heads=8, camera_samples=4,
            decoder_layers=4, box_queries=200, line_queries=50,
        )  # fmt: skip

    @classmethod
    def base(cls) -> BEVTransformerConfig:
        """ResNet-50, 256x704 images: boxes on 102.4 x 102.4 m, lines on 60 x 30 m."""
        return cls(
            image_size=(256, 704), backbone="resnet50", backbone_stages=4, feature_stride=16, channels=256,
            grid=(128, 128), heads=8, camera_samples=4, depth_bins=64, decoder_layers=6, box_queries=300,
            line_queries=50,
        )  # fmt: skip

    @classmethod
    def presets(cls) -> dict[str, Callable[[], BEVTransformerConfig]]:
        """The sizes by name."""
        return {"nano": cls.nano, "tiny": cls.tiny, "base": cls.base}

    @classmethod
    def preset(cls, name: str, **changes: Any) -> BEVTransformerConfig:
        """Returns a preset with some fields changed.

        Raises:
            ConfigError: for an unknown preset or field.
        """
        presets = cls.presets()
        if name not in presets:
            raise ConfigError(f"model preset is {name!r}; use one of {', '.join(presets)}")
        known = {field.name for field in fields(cls)}
        for key in changes:
            if key not in known:
                raise ConfigError(f"model.{key} does not exist; BEVTransformerConfig has {', '.join(sorted(known))}")
        values: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in changes.items()}
        return replace(presets[name](), **values)
