"""What decides the shape of MapTR."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from perception.models.published.geometry import PublishedConfig


@dataclass(frozen=True)
class MapTRConfig(PublishedConfig):
    """Everything that decides the shape of the network, MapTR-tiny by default; metres in the LiDAR's frame."""

    bev: tuple[int, int] = (200, 100)
    low: tuple[float, float, float] = (-15.0, -30.0, -2.0)
    high: tuple[float, float, float] = (15.0, 30.0, 2.0)
    encoder_layers: int = 1
    lines: int = 50
    line_points: int = 20
    max_lines: int = 50

    @classmethod
    def gkt(cls) -> MapTRConfig:
        """MapTR-tiny with geometry-guided kernel attention, the published default."""
        return cls(kernel=(3, 5))

    @classmethod
    def presets(cls) -> dict[str, Callable[[], MapTRConfig]]:
        """The published networks by name."""
        return {"maptr_tiny_r50_24e_bevformer": cls, "maptr_tiny_r50_24e_gkt": cls.gkt}
