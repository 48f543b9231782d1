"""Vision-only driving perception: calibrated camera images in, 3D boxes with velocity and a vector lane map out.

    from perception import Predictor

    predictor = Predictor("nano")
    objects = predictor.step(images, rig, global_from_ego, time_s)

The names below are loaded when they are first used: `import perception` loads neither PyTorch nor NumPy, and what only
scores lanes or runs an export never loads PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perception.data.nuscenes import NuScenesDataset
    from perception.engine.config import load_config
    from perception.engine.training import train
    from perception.errors import PerceptionError
    from perception.evaluation.dataset import evaluate_dataset
    from perception.evaluation.detection import evaluate_boxes
    from perception.evaluation.lanes import evaluate_lanes
    from perception.export.runtime import Runtime
    from perception.grid import BEVGrid
    from perception.inference.ego_motion import Motion
    from perception.inference.predictor import Predictor
    from perception.models.checkpoint import load_model, read_metrics
    from perception.rigs.importers import import_rig
    from perception.rigs.rig import Rig
    from perception.synthetic.writer import simulate
    from perception.types import BOX_CLASSES, LINE_CLASSES, Boxes, CameraRig, Frame, FrameObjects, MapLine, Polylines

__version__ = "0.1.0"

_MODULES = {
    "BEVGrid": "grid",
    "BOX_CLASSES": "types",
    "Boxes": "types",
    "CameraRig": "types",
    "Frame": "types",
    "FrameObjects": "types",
    "LINE_CLASSES": "types",
    "MapLine": "types",
    "Motion": "inference.ego_motion",
    "NuScenesDataset": "data.nuscenes",
    "PerceptionError": "errors",
    "Polylines": "types",
    "Predictor": "inference.predictor",
    "Rig": "rigs.rig",
    "Runtime": "export.runtime",
    "evaluate_boxes": "evaluation.detection",
    "evaluate_dataset": "evaluation.dataset",
    "evaluate_lanes": "evaluation.lanes",
    "import_rig": "rigs.importers",
    "load_config": "engine.config",
    "load_model": "models.checkpoint",
    "read_metrics": "models.checkpoint",
    "simulate": "synthetic.writer",
    "train": "engine.training",
}

__all__ = [
    "BOX_CLASSES",
    "LINE_CLASSES",
    "BEVGrid",
    "Boxes",
    "CameraRig",
    "Frame",
    "FrameObjects",
    "MapLine",
    "Motion",
    "NuScenesDataset",
    "PerceptionError",
    "Polylines",
    "Predictor",
    "Rig",
    "Runtime",
    "__version__",
    "evaluate_boxes",
    "evaluate_dataset",
    "evaluate_lanes",
    "import_rig",
    "load_config",
    "load_model",
    "read_metrics",
    "simulate",
    "train",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'perception' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"perception.{_MODULES[name]}"), name)
    globals()[name] = value  # the next use finds it at once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
