"""Configuration of MapTRv2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from perception.models.maptr.config import MapTRConfig
from perception.types import LINE_CLASSES


@dataclass(frozen=True)
class MapTRv2Config(MapTRConfig):
    """Configures MapTRv2; lengths in metres in the LiDAR frame."""

    point_cloud_range: tuple[float, float, float, float, float, float] = (-15.0, -30.0, -10.0, 15.0, 30.0, 10.0)
    classes: int = len(LINE_CLASSES)
    one_to_many_queries: int = 300  # auxiliary instance queries in training
    one_to_many_repeats: int = 6  # each ground truth line is matched with this many of them
    depth_range: tuple[float, float, float] = (1.0, 35.0, 0.5)  # first, end, step of depth bins, along the optical axis
    aspp_channels: int = 96
    splat_scale: int = 2  # cells of the lift-splat grid per BEV cell, along each side
    image_scale: float = 0.5  # size of the input images relative to the camera's own

    @property
    def depth_bins(self) -> int:
        """Number of depth bins."""
        first, end, step = self.depth_range
        return round((end - first) / step)

    @classmethod
    def with_centerlines(cls) -> MapTRv2Config:
        """Returns the published variant with lane centre lines as a fourth class, which `decode` drops."""
        return cls(lines=70, classes=len(LINE_CLASSES) + 1)

    @classmethod
    def presets(cls) -> Mapping[str, Callable[[], MapTRv2Config]]:
        """Returns the published networks by name."""
        return {"maptrv2_nusc_r50_24ep": cls, "maptrv2_nusc_r50_24ep_w_centerline": cls.with_centerlines}
