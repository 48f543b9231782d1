"""What decides the shape of MapTRv2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from perception.models.maptr.config import MapTRConfig
from perception.types import LINE_CLASSES


@dataclass(frozen=True)
class MapTRv2Config(MapTRConfig):
    """Everything that decides the shape of the network; metres in the LiDAR's frame."""

    low: tuple[float, float, float] = (-15.0, -30.0, -10.0)
    high: tuple[float, float, float] = (15.0, 30.0, 10.0)
    classes: int = len(LINE_CLASSES)
    many_lines: int = 300  # further queries in training
    many_times: int = 6  # how often they are matched with each line
    depths: tuple[float, float, float] = (1.0, 35.0, 0.5)  # first, end and step, metres along the optical axis
    aspp_channels: int = 96
    finer: int = 2  # cells of the map that features fall into, per cell that queries read, along each side
    image_scale: float = 0.5  # of the given images against the camera's own

    @classmethod
    def with_centerlines(cls) -> MapTRv2Config:
        """The published variant that finds centre lines of lanes too, as a fourth class; `decode` leaves them out."""
        return cls(lines=70, classes=len(LINE_CLASSES) + 1)

    @classmethod
    def presets(cls) -> dict[str, Callable[[], MapTRv2Config]]:
        """The published networks by name."""
        return {"maptrv2_nusc_r50_24ep": cls, "maptrv2_nusc_r50_24ep_w_centerline": cls.with_centerlines}
