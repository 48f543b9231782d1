"""Configuration of MapTR."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from perception.models.published.geometry import PublishedConfig


@dataclass(frozen=True)
class MapTRConfig(PublishedConfig):
    """Configures MapTR, MapTR-tiny by default; lengths in metres in the LiDAR frame."""

    bev: tuple[int, int] = (200, 100)
    point_cloud_range: tuple[float, float, float, float, float, float] = (-15.0, -30.0, -2.0, 15.0, 30.0, 2.0)
    encoder_layers: int = 1
    lines: int = 50  # instance queries
    line_points: int = 20
    max_lines: int = 50  # decoded lines

    @classmethod
    def gkt(cls) -> MapTRConfig:
        """Returns MapTR-tiny with geometry-guided kernel attention (GKT), the published default."""
        return cls(gkt_kernel=(3, 5))

    @classmethod
    def presets(cls) -> Mapping[str, Callable[[], MapTRConfig]]:
        """Returns the published networks by name."""
        return {"maptr_tiny_r50_24e_bevformer": cls, "maptr_tiny_r50_24e_gkt": cls.gkt}
