"""Training with MMEngine; the only package that imports it."""

from perception.engine.comparison import Comparison, compare
from perception.engine.config import DataSection, TrainConfig, TrainSection, build_dataset, load_config, parse_options
from perception.engine.dry_run import DryRun, dry_run
from perception.engine.training import TrainingModel, load_weights, train

__all__ = [
    "Comparison",
    "DataSection",
    "DryRun",
    "TrainConfig",
    "TrainSection",
    "TrainingModel",
    "build_dataset",
    "compare",
    "dry_run",
    "load_config",
    "load_weights",
    "parse_options",
    "train",
]
