"""Settings of a config that reach MMEngine's Runner: hooks, trackers such as W&B, logs and environment.

They have MMEngine's names and forms. `perception.engine.extension_checks` checks them.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perception.errors import ConfigError

KEYS = ("custom_hooks", "default_hooks", "visualizer", "log_processor", "env_cfg")

# Settings of MMEngine that have another place here.
REFUSED = {
    "train_cfg": "training streams scenes; set train.epochs and train.val_every",
    "val_cfg": "validation streams scenes; set train.val_every",
    "test_cfg": "use the command evaluate",
    "train_dataloader": "set train_data, train.batch_size and train.workers",
    "val_dataloader": "set val_data and train.workers",
    "test_dataloader": "use the command evaluate",
    "val_evaluator": "metrics are those of docs/evaluation.md; compute others in a custom hook",
    "test_evaluator": "metrics are those of docs/evaluation.md; compute others in a custom hook",
    "optim_wrapper": "set train.lr, train.weight_decay, train.grad_clip and train.backbone_lr_mult",
    "param_scheduler": "set train.lr, train.warmup_iters and train.epochs",
    "auto_scale_lr": "set train.lr for the batches of all processes",
    "resume": "add --resume to the command",
    "launcher": "add --launcher to the command",
    "work_dir": "add --work-dir to the command",
    "randomness": "add --seed to the command",
    "log_level": "set log_processor or default_hooks.logger",
    "default_scope": "register hooks in mmengine.registry.HOOKS, or write their scope before the name",
    "model_wrapper_cfg": "the launcher decides it",
}

# The package that a tracker needs, by name of its backend.
_TRACKERS = {
    "WandbVisBackend": "wandb",
    "MLflowVisBackend": "mlflow",
    "AimVisBackend": "aim",
    "ClearMLVisBackend": "clearml",
    "NeptuneVisBackend": "neptune",
    "DVCLiveVisBackend": "dvclive",
}


@dataclass(frozen=True)
class RunnerSettings:
    """Settings for MMEngine's Runner, checked."""

    custom_hooks: tuple[dict[str, Any], ...] = ()
    default_hooks: dict[str, Any] = field(default_factory=dict)
    visualizer: dict[str, Any] = field(default_factory=dict)
    log_processor: dict[str, Any] = field(default_factory=dict)
    env_cfg: dict[str, Any] = field(default_factory=dict)

    def over(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the arguments of a Runner with these settings over them.

        Hooks are added; keys of `log_processor`, `env_cfg` and of each default hook replace those of the arguments; a
        visualizer replaces the whole one.

        Args:
            arguments: `custom_hooks`, `default_hooks`, `visualizer`, `log_processor` and `env_cfg` of a Runner.

        Raises:
            ConfigError: the package of a tracker cannot be imported.
        """
        for backend in dicts(self.visualizer.get("vis_backends", [])):
            package = _TRACKERS.get(str(backend["type"]).rpartition(".")[2])
            if package is None:
                continue
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise ConfigError(
                    f"visualizer.vis_backends has {backend['type']}, and {package} cannot be imported ({error}); "
                    f"install it with: pip install {package}"
                ) from None
        merged = dict(arguments)
        merged["custom_hooks"] = [*arguments["custom_hooks"], *self.custom_hooks]
        for name, hook in self.default_hooks.items():
            present = merged["default_hooks"].get(name) or {}
            replaced = "type" in hook and hook["type"] != present.get("type")
            merged["default_hooks"] = merged["default_hooks"] | {name: hook if replaced else present | hook}
        merged["log_processor"] = arguments["log_processor"] | self.log_processor
        merged["env_cfg"] = arguments["env_cfg"] | self.env_cfg
        if self.visualizer:
            merged["visualizer"] = {"type": "Visualizer"} | self.visualizer
        return copy.deepcopy(merged)  # MMEngine takes keys out of them


def check_refused(path: Path, source: Mapping[str, Any]) -> None:
    """Checks that a config has no setting of MMEngine that has another place here.

    Raises:
        ConfigError: it has one; the message names the place.
    """
    for key in source:
        if key in REFUSED:
            raise ConfigError(f"{path}: {key} is set elsewhere: {REFUSED[key]}; remove {key}")


def dicts(value: Any) -> list[dict[str, Any]]:
    """Lists the configs of one or several things that MMEngine builds."""
    return [value] if isinstance(value, dict) else value
