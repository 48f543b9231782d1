"""Vision-only driving perception: calibrated camera images in, 3D boxes with velocity and a vector lane map out."""

from perception.grid import BEVGrid
from perception.types import (
    BOX_CLASSES,
    LINE_CLASSES,
    Boxes,
    CameraRig,
    Clip,
    Frame,
    MapLine,
    Polylines,
    Prediction,
    Scene,
    State,
)

__all__ = [
    "BOX_CLASSES",
    "LINE_CLASSES",
    "BEVGrid",
    "Boxes",
    "CameraRig",
    "Clip",
    "Frame",
    "MapLine",
    "Polylines",
    "Prediction",
    "Scene",
    "State",
]
