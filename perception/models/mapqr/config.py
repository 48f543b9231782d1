"""Configuration of MapQR."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from perception.models.maptr.config import MapTRConfig


@dataclass(frozen=True)
class MapQRConfig(MapTRConfig):
    """Configures MapQR; lengths in metres in the LiDAR frame."""

    encoder_layers: int = 3
    pillar_points: int = 8  # reference points per pillar, each with its own attention head
    gkt_kernel: tuple[int, int] = (2, 4)  # height and width, see `HeightKernelAttention`
    lines: int = 100  # instance queries
    one_to_many_queries: int = 600  # auxiliary instance queries in training
    one_to_many_repeats: int = 6  # each ground truth line is matched with this many of them

    @classmethod
    def presets(cls) -> Mapping[str, Callable[[], MapQRConfig]]:
        """Returns the published network by name."""
        return {"mapqr_nusc_r50_24ep": cls}
