"""What decides the shape of BEVFormer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from perception.models.published.backbone import PublishedBackboneConfig
from perception.models.published.geometry import PublishedConfig


@dataclass(frozen=True)
class BEVFormerConfig(PublishedConfig):
    """Everything that decides the shape of the network; metres in the LiDAR's frame."""

    queries: int = 900
    max_boxes: int = 300
    # Boxes whose centre lies outside are dropped: least x, y, z, then largest.
    post_center_range: tuple[float, float, float, float, float, float] = (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0)
    line_points: ClassVar[int] = 20  # of the ground truth; the network predicts no lines

    @classmethod
    def tiny(cls) -> BEVFormerConfig:
        """ResNet-50, 450 x 800 images, a map of 50 x 50."""
        return cls()

    @classmethod
    def small(cls) -> BEVFormerConfig:
        """ResNet-101 with deformable convolutions, 720 x 1280 images, a map of 150 x 150."""
        backbone = PublishedBackboneConfig(depth=101, caffe=True, deformable=(False, False, True, True))
        return cls(image_size=(720, 1280), backbone=backbone, bev=(150, 150))

    @classmethod
    def base(cls) -> BEVFormerConfig:
        """ResNet-101 with deformable convolutions, 900 x 1600 images, a map of 200 x 200."""
        backbone = PublishedBackboneConfig(
            depth=101, caffe=True, deformable=(False, False, True, True), outputs=(1, 2, 3), levels=4
        )
        return cls(image_size=(900, 1600), backbone=backbone, bev=(200, 200), encoder_layers=6)

    @classmethod
    def presets(cls) -> dict[str, Callable[[], BEVFormerConfig]]:
        """The published networks by name."""
        return {"bevformer_tiny": cls.tiny, "bevformer_small": cls.small, "bevformer_base": cls.base}
