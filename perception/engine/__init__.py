"""Training with MMEngine; the only package that imports it."""

from perception.engine.comparison import Comparison, Cost, compare, measure_costs
from perception.engine.config import DataSection, TrainConfig, TrainSection, build_dataset, load_config, parse_options
from perception.engine.dry_run import DryRun, dry_run
from perception.engine.training import TrainingModel, train
from perception.engine.weights import load_weights

__all__ = [
    "Comparison",
    "Cost",
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
    "measure_costs",
    "parse_options",
    "train",
]
