"""Reads and checks the config files of training and evaluation.

A config is a plain MMEngine Python config (`_base_` inheritance and `--cfg-options` work as usual) with four sections:
`model`, `train_data`, `val_data` and `train`. Each section is parsed into a frozen dataclass. An unknown key, a missing
key or a value of the wrong type is an error before anything runs. `custom_imports` and the settings of MMEngine's
Runner that `perception.engine.extensions` lists may stand next to the sections.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config

from perception.data.augment import Augment
from perception.data.info_dataset import open_infos
from perception.data.nuscenes import NuScenesDataset
from perception.engine.config_file import import_extensions, read_config
from perception.engine.extensions import KEYS, RunnerSettings, check_refused
from perception.errors import ConfigError
from perception.extensions import DATASETS, LOSSES, TRAINING_PARTS, check_arguments, check_parts, registered
from perception.files import check_dataset
from perception.models import NetworkConfig, network_class, preset_config
from perception.models.base import dataclass_for
from perception.reading import number, short
from perception.types import LaneRange


@dataclass(frozen=True)
class DataSection:
    """A dataset: `train_data` or `val_data` of a config."""

    dataroot: str | tuple[str, ...]  # root of a nuScenes-format dataset, or several roots that are read as one dataset
    version: str  # folder of the tables, e.g. v1.0-trainval
    split: str  # an official split, or one from splits.json of the dataset
    augment: Augment | None = None  # in a config: dict() with the fields of Augment that differ from the defaults
    make_with: dict[str, str] = field(default_factory=dict)  # by root the command that creates it, for error messages


@dataclass(frozen=True)
class CustomDataSection:
    """A dataset of a class from outside the package: `train_data` or `val_data` of a config with the key `type`."""

    type: str  # name by which `perception.extensions.register_dataset` registered it
    options: dict[str, Any]  # the other keys of the section, its arguments


@dataclass(frozen=True)
class InfosSection:
    """A dataset of mmdet3d: `train_data` or `val_data` of a config, in place of a `DataSection`."""

    infos: str  # info file of mmdet3d v1.1, e.g. data/nuscenes/nuscenes_infos_train.pkl
    data_prefix: dict[str, str] = field(default_factory=dict)  # folders of the images, see `open_infos`
    dataroot: str = ""  # folder of nuScenes' tables and maps; that of the info file by default
    augment: Augment | None = None  # as for `DataSection`


AnyDataSection = DataSection | InfosSection | CustomDataSection


@dataclass(frozen=True)
class TrainSection:
    """The training schedule: `train` of a config. Iterations are counted over the whole training."""

    epochs: int  # of streaming training, after `image_epochs`
    batch_size: int  # clips per process
    streams: int  # number of batches that alternate: batch b + streams continues the scenes of batch b
    frames_per_clip: int  # BPTT window: frames per step; the memory is kept between the clips of a scene
    drop_frames: float  # share of frames that are dropped at random, to vary the time between frames
    image_epochs: int  # epochs at the start that train only the image encoder and its image losses
    lr: float  # peak learning rate of AdamW
    weight_decay: float
    warmup_iters: int  # iterations of linear warm-up, followed by cosine decay to 1 % of the peak
    grad_clip: float  # largest norm of the gradient
    ema_momentum: float  # weight of the newest weights in the exponential moving average; 0 for none
    val_every: int  # epochs between two validations; the last epoch is always validated
    log_every: int  # iterations between two lines of the log
    workers: int  # processes that load clips; 0 loads them in the training process
    disabled_losses: tuple[str, ...] = ()  # names of losses in the network's `loss_weights` that are not used
    backbone_lr_mult: float = 1.0  # factor of lr for the backbone of the image encoder
    frozen_stages: int = -1  # of the backbone: 0 freezes the stem, n also the first n stages, -1 nothing
    backbone_weights: str = ""  # initial weights of the backbone: published ones, or a network of the library
    gradient_checkpointing: bool = False  # less memory, more time: the backward pass computes activations again
    init_from: str = ""  # initial weights, .safetensors or .pth of the same network for images of any size
    # Weight by name of losses that `perception.extensions.register_loss` registered; added to the network's own.
    extra_losses: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainConfig:
    """A parsed config."""

    name: str  # of the file without .py, also of the exported weights
    model: NetworkConfig
    train_data: AnyDataSection | None  # None, as `train`, for a config that is for evaluation only
    val_data: AnyDataSection
    train: TrainSection | None
    source: Config  # unparsed, for the copy in the work directory
    runner: RunnerSettings = field(default_factory=RunnerSettings)


def load_config(name_or_path: str | Path, options: dict | None = None) -> TrainConfig:
    """Reads a config file and imports the modules that it names in `custom_imports`.

    Args:
        name_or_path: a Python file, or the name of a config that came with the library, such as `synthetic/nano`.
        options: overrides by dotted key, e.g. `{"train.lr": 1e-3}`.

    Raises:
        ConfigError: the file is missing or broken, a key is unknown or missing, a value has the wrong type, or a module
            cannot be imported.
    """
    path, source = read_config(name_or_path, options)
    import_extensions(path, source)
    sections: dict[str, Any] = {
        "model": None,
        "train_data": DataSection,
        "val_data": DataSection,
        "train": TrainSection,
    }
    source_dict = source.to_dict()
    check_refused(path, source_dict)
    _check_keys(path, "", source_dict, {*sections, *KEYS, "custom_imports", "load_from"}, {"model", "val_data"})
    parsed: dict[str, Any] = {
        name: _parse_section(path, name, source_dict[name], kind) if name in source_dict else None
        for name, kind in sections.items()
        if kind
    }
    if (start := source_dict.get("load_from")) is not None:
        parsed["train"] = _load_from(path, start, parsed["train"])
    model = model_config(source_dict["model"], str(path))
    if any(key in source_dict for key in KEYS):
        from perception.engine.extension_checks import parse_runner  # MMEngine's Runner, which takes seconds to load

        parsed["runner"] = parse_runner(path, source_dict)
    return TrainConfig(name=path.stem, model=model, source=source, **parsed)


def _parse_section(path: Path, name: str, section: Any, kind: type[Any]) -> Any:
    if kind is DataSection and isinstance(section, dict) and "type" in section:
        registered(DATASETS, f"{path}: {name}.type", section["type"])
        options = {key: value for key, value in section.items() if key != "type"}
        try:
            json.dumps(options)  # they are compared when a training goes on
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{path}: {name} holds more than plain values ({error}); use numbers and text") from None
        return CustomDataSection(section["type"], options)
    if kind is DataSection and isinstance(section, dict) and "infos" in section:
        return _parse(path, name, section, InfosSection)
    parsed = _parse(path, name, section, kind)
    if isinstance(parsed, TrainSection):
        for loss in parsed.extra_losses:
            registered(LOSSES, f"{path}: train.extra_losses", loss)
    return parsed


def _load_from(path: Path, start: Any, section: TrainSection | None) -> TrainSection:
    """MMEngine's name for initial weights, `train.init_from`."""
    if not isinstance(start, str):
        raise ConfigError(f"{path}: load_from is {short(start)}; give the path of a .safetensors or .pth file")
    if section is None:
        raise ConfigError(f"{path}: load_from is for training, and the config has no section train; remove load_from")
    if section.init_from and section.init_from != start:
        raise ConfigError(f"{path}: load_from and train.init_from name different weights; give one of them")
    return dataclasses.replace(section, init_from=start)


def model_config(section: dict, where: str) -> NetworkConfig:
    """Creates the config of a network from a preset and overrides.

    Args:
        section: `preset`, the name of a preset such as "nano" or "bevformer_tiny", and any fields of its config.
        where: name of the config file, for messages.

    Raises:
        ConfigError: the preset or a field does not exist, or a value has the wrong type.
    """
    if not isinstance(section, dict) or "preset" not in section:
        _check_keys(where, "model", section, set(section) if isinstance(section, dict) else set(), {"preset"})
    preset = section["preset"]
    if not isinstance(preset, str):
        raise ConfigError(f"{where}: model.preset is {short(preset)}; it must be of type str")
    config = preset_config(preset)
    known = {field.name for field in dataclasses.fields(config)}
    _check_keys(where, "model", section, {"preset", *known}, {"preset"})
    return _changed(where, "model", config, {key: value for key, value in section.items() if key != "preset"})


def _changed(path: str, where: str, config: Any, section: dict) -> Any:
    """Returns a copy of a dataclass with other values. A dict changes fields of the dataclass in its place."""
    _check_keys(path, where, section, {field.name for field in dataclasses.fields(config)}, set())
    hints = typing.get_type_hints(type(config))
    changes = {}
    for key, value in section.items():
        present = getattr(config, key)
        kinds: list[Any] = [k for k in typing.get_args(hints[key]) or (hints[key],) if dataclasses.is_dataclass(k)]
        if isinstance(value, dict) and kinds and dataclass_for(value, [type(present), *kinds]) is type(present):
            changes[key] = _changed(path, f"{where}.{key}", present, value)
        else:
            changes[key] = _typed(f"{path}: {where}.{key}", value, hints[key])
    return dataclasses.replace(config, **changes)


def build_dataset(section: AnyDataSection, model: NetworkConfig) -> NuScenesDataset:
    """Opens the dataset of a section, with the image size, the points per line and the lane range of a network.

    A dataset of another class has what training reads of NuScenesDataset.

    Raises:
        ConfigError: the class of a section with `type` does not take its keys, or lacks what training reads.
        DataError: the root or one of its files is missing or malformed.
    """
    shared: dict[str, Any] = {
        "image_size": model.image_size, "points_per_line": model.line_points, "lane_range": model.lane_range,
    }  # fmt: skip
    if isinstance(section, CustomDataSection):
        where = f"the dataset {section.type}"
        build = registered(DATASETS, where, section.type)
        check_arguments(where, build, section.options | shared)
        try:
            dataset = build(**section.options, **shared)
        except TypeError as error:  # of arguments that it passes on
            raise ConfigError(f"{where} cannot be made with the keys of its section: {error}; correct them") from error
        check_parts(where, dataset, TRAINING_PARTS)
        return dataset
    shared["augment"] = section.augment
    if isinstance(section, InfosSection):
        return open_infos(
            section.infos, data_prefix=section.data_prefix or None, dataroot=section.dataroot or None, **shared
        )
    check_dataset(section.dataroot, section.version, section.make_with)
    return NuScenesDataset(section.dataroot, section.version, section.split, **shared)


def check_trainable(config: TrainConfig) -> tuple[TrainSection, AnyDataSection]:
    """Checks that a config is for training, and returns its sections `train` and `train_data`.

    Raises:
        ConfigError: a section is missing, or `image_epochs` is set for a network without image losses.
    """
    section, data = config.train, config.train_data
    if section is None or data is None:
        name = "train" if section is None else "train_data"
        raise ConfigError(f"config {config.name} has no section {name}: it is for evaluation; choose another one")
    if section.image_epochs and network_class(config.model).image_loss is None:
        raise ConfigError(f"config {config.name}: train.image_epochs must be 0, its network has no image losses")
    return section, data


def _check_keys(path: str | Path, where: str, section: object, allowed: set[str], required: set[str]) -> None:
    dot = f"{where}." if where else ""
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: {where} is {short(section)}; it must be a dict(...)")
    for key in section:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            fix = f"did you mean {dot}{near[0]}?" if near else f"the keys there are {', '.join(sorted(allowed))}"
            raise ConfigError(f"{path}: unknown key {dot}{str(key)[:60]}; {fix}")
    for key in sorted(required - set(section)):
        raise ConfigError(f"{path}: {dot}{key} is missing; add it")


def _parse(path: str | Path, where: str, section: dict, kind: type[Any]) -> Any:
    fields = dataclasses.fields(kind)
    required = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    _check_keys(path, where, section, {field.name for field in fields}, required)
    hints = typing.get_type_hints(kind)
    return kind(**{key: _typed(f"{path}: {where}.{key}", value, hints[key]) for key, value in section.items()})


def _lane_range(where: str, value: object) -> LaneRange:
    """Converts "60x30" or (60, 30) to a lane range."""
    text = "x".join(map(str, value)) if isinstance(value, list | tuple) and len(value) == 2 else value
    try:
        return LaneRange.parse(str(text))
    except ConfigError:
        raise ConfigError(
            f'{where} is {short(value)}; write metres along x and along y, e.g. "60x30" or (60, 30)'
        ) from None


def _typed(where: str, value: Any, kind: Any) -> Any:
    """Converts a value to a type: int to float, list to tuple, dict to dataclass. Raises a ConfigError otherwise."""
    if value is None and types.NoneType in typing.get_args(kind):
        return None
    if kind == Augment | None:
        path, _, key = where.partition(": ")
        return _parse(path, key, value, Augment)
    kinds: list[Any] = [k for k in typing.get_args(kind) if dataclasses.is_dataclass(k)]
    if isinstance(value, dict) and kinds:
        path, _, key = where.partition(": ")
        return _parse(path, key, value, dataclass_for(value, kinds))
    origin = typing.get_origin(kind)
    if kind is LaneRange:
        return _lane_range(where, value)
    if isinstance(kind, types.UnionType):
        kind = next((part for part in typing.get_args(kind) if isinstance(value, str) == (part is str)), kind)
        origin = typing.get_origin(kind)
    if origin is tuple and isinstance(value, list | tuple):
        inner = typing.get_args(kind)
        inner = inner[:1] * len(value) if inner[-1:] == (Ellipsis,) else inner
        if len(inner) == len(value):
            return tuple(_typed(f"{where}[{i}]", v, k) for i, (v, k) in enumerate(zip(value, inner, strict=True)))
    elif origin is dict and isinstance(value, dict):
        name, content = typing.get_args(kind)
        return {_typed(f"{where} key", k, name): _typed(f"{where}[{k!r}]", v, content) for k, v in value.items()}
    elif kind is float and type(value) in (int, float):
        if not math.isfinite(number(value)):
            raise ConfigError(f"{where} is {short(value)}; give a finite number")
        return float(value)
    elif type(value) is kind:
        return value
    name = kind.__name__ if isinstance(kind, type) and origin is None else str(kind)
    raise ConfigError(f"{where} is {short(value)}; it must be of type {name}")
