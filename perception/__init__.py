"""Vision-only driving perception: calibrated camera images in, 3D boxes with velocity and a vector lane map out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from perception.types import (
    BOX_CLASSES,
    LINE_CLASSES,
    Boxes,
    CameraRig,
    Clip,
    Frame,
    FrameObjects,
    MapLine,
    Polylines,
    Prediction,
    State,
)

if TYPE_CHECKING:
    from perception.grid import BEVGrid

__all__ = [
    "BOX_CLASSES",
    "LINE_CLASSES",
    "BEVGrid",
    "Boxes",
    "CameraRig",
    "Clip",
    "Frame",
    "FrameObjects",
    "MapLine",
    "Polylines",
    "Prediction",
    "State",
]


def __getattr__(name: str) -> object:
    # The grid alone needs PyTorch, which takes a second and half a gigabyte; who only scores lanes never pays for it.
    if name == "BEVGrid":
        from perception.grid import BEVGrid

        return BEVGrid
    raise AttributeError(f"module 'perception' has no attribute '{name}'")
