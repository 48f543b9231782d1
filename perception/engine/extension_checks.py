"""Checks the settings of a config that reach MMEngine's Runner.

What would work against streaming, the checkpoints or the schedule of this library is refused, with the setting to use
instead. Only configs with such settings load this module, and MMEngine's Runner with it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine import hooks as mmengine_hooks
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, LOG_PROCESSORS, VISBACKENDS, VISUALIZERS, Registry
from mmengine.runner import get_priority
from mmengine.visualization import Visualizer

from perception.engine.config_file import DATA_SUFFIXES
from perception.engine.extensions import KEYS, RunnerSettings, dicts
from perception.errors import ConfigError
from perception.extensions import check_arguments
from perception.reading import short

# Hooks of MMEngine that would repeat or undo what training does.
_REFUSED_HOOKS: dict[type[Hook], str] = {
    mmengine_hooks.CheckpointHook: "training writes its own checkpoints, with the memory of every stream",
    mmengine_hooks.EMAHook: "set train.ema_momentum",
    mmengine_hooks.DistSamplerSeedHook: "the order of samples depends on --seed and the epoch",
    mmengine_hooks.ParamSchedulerHook: "training has it; set train.lr and train.warmup_iters",
    mmengine_hooks.RuntimeInfoHook: "training has it",
    mmengine_hooks.IterTimerHook: "training has it",
    mmengine_hooks.LoggerHook: "training has it; set default_hooks.logger",
    mmengine_hooks.SyncBuffersHook: "training averages the statistics of batch norms after every step",
    mmengine_hooks.EarlyStoppingHook: "training runs all epochs; set train.epochs",
    mmengine_hooks.PrepareTTAHook: "evaluation has no test-time augmentation",
}
# Stages that streaming validation does not have.
_NOT_CALLED = {"before_val_iter", "after_val_iter", *(stage for stage in Hook.stages if "test" in stage)}

_ENVIRONMENT = {"cudnn_benchmark": bool, "mp_cfg": dict, "resource_limit": int}


def parse_runner(path: Path, source: Mapping[str, Any]) -> RunnerSettings:
    """Checks the settings of a config for MMEngine's Runner. Its `custom_imports` must be imported.

    Args:
        path: of the config, for messages; the types in a YAML or JSON config are registered names only, because
            MMEngine imports whatever another name leads to.
        source: the content of the config.

    Raises:
        ConfigError: a setting has the wrong form, names something that is not registered, or works against training.
    """
    data = path.suffix in DATA_SUFFIXES
    hooks = source.get("custom_hooks") or []
    if not isinstance(hooks, list | tuple):
        raise ConfigError(f"{path}: custom_hooks is {short(hooks)}; write a list of dict(type=..., ...)")
    for number, hook in enumerate(hooks):
        where = f"{path}: custom_hooks[{number}]"
        kind = _check_hook(where, hook, data)
        for refused, reason in _REFUSED_HOOKS.items():
            if issubclass(kind, refused):
                raise ConfigError(f"{where} is a {refused.__name__}: {reason}; remove it")
    settings = {key: _as_dict(path, key, source.get(key)) for key in KEYS if key != "custom_hooks"}
    for name, hook in settings["default_hooks"].items():
        where = f"{path}: default_hooks.{name}"
        if name != "logger":
            raise ConfigError(f"{where} cannot be changed, training depends on it; remove it, or use custom_hooks")
        kind = _check_hook(where, {"type": "LoggerHook"} | hook if isinstance(hook, dict) else hook, data)
        if not issubclass(kind, mmengine_hooks.LoggerHook):
            raise ConfigError(f"{where}.type is {hook['type']}; give LoggerHook or a class derived from it")
    _check_visualizer(path, settings["visualizer"], data)
    processor = settings["log_processor"]
    _check_built(f"{path}: log_processor", {"type": "LogProcessor"} | processor, LOG_PROCESSORS, data)
    _check_environment(path, settings["env_cfg"])
    return RunnerSettings(custom_hooks=tuple(hooks), **settings)


def _as_dict(path: Path, key: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{path}: {key} is {short(value)}; it must be a dict(...)")
    return value or {}


def _check_hook(where: str, hook: Any, data: bool) -> type[Hook]:
    if not isinstance(hook, dict):
        raise ConfigError(f"{where} is {short(hook)}; write dict(type=..., ...)")
    if "priority" in hook:
        try:
            get_priority(hook["priority"])
        except (TypeError, ValueError, KeyError):
            raise ConfigError(
                f"{where}.priority is {short(hook['priority'])}; give 0 to 100, or a name such as NORMAL or LOW"
            ) from None
    kind = _check_built(where, {key: value for key, value in hook.items() if key != "priority"}, HOOKS, data)
    if not (isinstance(kind, type) and issubclass(kind, Hook)):
        raise ConfigError(f"{where}.type is {hook['type']}, which is no Hook of MMEngine; derive it from Hook")
    stages = {stage for stage in Hook.stages if getattr(kind, stage) is not getattr(Hook, stage)}
    if stages and stages <= _NOT_CALLED:
        raise ConfigError(
            f"{where}: {hook['type']} has only {', '.join(sorted(stages))}, which streaming training never calls; "
            "use after_val_epoch or after_train_iter"
        )
    return kind


def _check_visualizer(path: Path, visualizer: dict[str, Any], data: bool) -> None:
    if not visualizer:
        return
    where = f"{path}: visualizer"
    backends = visualizer.get("vis_backends")
    if not isinstance(backends, list | tuple | dict) or not backends:
        raise ConfigError(
            f"{where}.vis_backends is {short(backends)}; write a list such as [dict(type='TensorboardVisBackend')]"
        )
    others = {key: value for key, value in visualizer.items() if key != "vis_backends"}
    kind = _check_built(where, {"type": "Visualizer"} | others, VISUALIZERS, data)
    if not (isinstance(kind, type) and issubclass(kind, Visualizer)):
        raise ConfigError(f"{where}.type is {others['type']}, which is no Visualizer of MMEngine; use Visualizer")
    for number, backend in enumerate(dicts(backends)):
        # The Runner gives them the folder.
        _check_built(f"{where}.vis_backends[{number}]", backend, VISBACKENDS, data, save_dir="")


def _check_environment(path: Path, settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        where = f"{path}: env_cfg.{key}"
        if key == "dist_cfg":
            raise ConfigError(f"{where} cannot be set: processes use NCCL with GPUs and gloo without; remove it")
        if key not in _ENVIRONMENT:
            raise ConfigError(f"{where} is unknown; the keys there are {', '.join(_ENVIRONMENT)}")
        if type(value) is not _ENVIRONMENT[key]:
            raise ConfigError(f"{where} is {short(value)}; it must be of type {_ENVIRONMENT[key].__name__}")
    processes = settings.get("mp_cfg", {})
    for key in processes:
        if key not in (known := ("mp_start_method", "opencv_num_threads")):
            raise ConfigError(f"{path}: env_cfg.mp_cfg.{key} is unknown; the keys there are {', '.join(known)}")
    if processes.get("mp_start_method", "fork") not in (methods := ("fork", "spawn", "forkserver")):
        raise ConfigError(
            f"{path}: env_cfg.mp_cfg.mp_start_method is {short(processes['mp_start_method'])}; "
            f"give one of {', '.join(methods)}"
        )


def _check_built(where: str, settings: Any, registry: Registry, data: bool, **given: Any) -> Any:
    """Checks the config of something that MMEngine builds, and returns its class.

    Args:
        where: file and key, for messages.
        settings: its `type` and arguments.
        registry: where the type is registered.
        data: the config is only read, so nothing that is not registered may be imported.
        given: arguments that MMEngine adds.
    """
    if not isinstance(settings, dict) or not isinstance(settings.get("type"), str):
        raise ConfigError(f"{where} is {short(settings)}; write dict(type='Name', ...)")
    name = settings["type"]
    arguments = {key: value for key, value in settings.items() if key != "type"}
    if data and _names_more(arguments):
        raise ConfigError(f"{where} has a `type` or `_scope_` inside, which may run code; write it in a .py config")
    found = registry.module_dict.get(name)
    if found is None and "." in name and not data:
        found = registry.get(name)  # with a scope, such as mmdet.Name, or with the path of its module
    if found is None:
        near = difflib.get_close_matches(name, registry.module_dict, n=1)
        fix = f"did you mean {near[0]}?" if near else "name the module that registers it in custom_imports"
        raise ConfigError(f"{where}.type is {short(name)}, which is not registered in MMEngine; {fix}")
    check_arguments(where, found, arguments | given)
    return found


def _names_more(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(key in ("type", "_scope_") or _names_more(part) for key, part in value.items())
    return isinstance(value, list | tuple) and any(_names_more(part) for part in value)
