"""Configuration of BEVFormer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from perception.models.published.backbone import PublishedBackboneConfig
from perception.models.published.geometry import PublishedConfig
from perception.types import DEFAULT_LANE_RANGE, LaneRange


@dataclass(frozen=True)
class BEVFormerConfig(PublishedConfig):
    """Configures BEVFormer; lengths in metres in the LiDAR frame."""

    queries: int = 900
    max_boxes: int = 300  # decoded boxes
    # Boxes with their centre outside are dropped: least x, y, z, then largest x, y, z.
    post_center_range: tuple[float, float, float, float, float, float] = (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0)
    # Of the ground-truth lines that datasets load; BEVFormer predicts no lines.
    line_points: ClassVar[int] = 20
    lane_range: ClassVar[LaneRange] = DEFAULT_LANE_RANGE

    @classmethod
    def tiny(cls) -> BEVFormerConfig:
        """Returns BEVFormer-tiny: ResNet-50, 450 x 800 images, 50 x 50 BEV cells."""
        return cls()

    @classmethod
    def small(cls) -> BEVFormerConfig:
        """Returns BEVFormer-small: ResNet-101 with DCNv2, 720 x 1280 images, 150 x 150 BEV cells."""
        backbone = PublishedBackboneConfig(depth=101, caffe=True, deformable=(False, False, True, True))
        return cls(image_size=(720, 1280), backbone=backbone, bev=(150, 150))

    @classmethod
    def base(cls) -> BEVFormerConfig:
        """Returns BEVFormer-base: ResNet-101 with DCNv2, 900 x 1600 images, 200 x 200 BEV cells."""
        backbone = PublishedBackboneConfig(
            depth=101, caffe=True, deformable=(False, False, True, True), outputs=(1, 2, 3), levels=4
        )
        return cls(image_size=(900, 1600), backbone=backbone, bev=(200, 200), encoder_layers=6)

    @classmethod
    def presets(cls) -> Mapping[str, Callable[[], BEVFormerConfig]]:
        """Returns the published networks by name."""
        return {"bevformer_tiny": cls.tiny, "bevformer_small": cls.small, "bevformer_base": cls.base}
