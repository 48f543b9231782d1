"""Reading and checking the config files of training and evaluation.

A config is a plain MMEngine Python config (`_base_` inheritance and `--cfg-options` work as usual) with four sections:
`model`, `train_data`, `val_data` and `train`. Each section is parsed into a frozen dataclass here, so a key that
nothing reads, a missing key or a value of the wrong type is an error before anything runs.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config

from perception.data.augment import Augment
from perception.data.nuscenes import NuScenesDataset
from perception.engine.config_file import read_config
from perception.errors import ConfigError
from perception.files import check_dataset
from perception.models import NetworkConfig, preset_config
from perception.models.base import dataclass_for


@dataclass(frozen=True)
class DataSection:
    """Where the samples come from: `train_data` and `val_data` of a config."""

    dataroot: str | tuple[str, ...]  # root of a nuScenes-format dataset, or several that are read as one
    version: str  # folder of its tables, e.g. v1.0-trainval
    split: str  # an official split or one of the dataset's own splits.json
    augment: Augment | None = None  # in a config: dict(), with those fields of Augment that differ from its defaults
    make_with: str = ""  # the command that makes it, `perception simulate ...`, named where it is missing


@dataclass(frozen=True)
class TrainSection:
    """How to train: `train` of a config. Iterations are counted over the whole training."""

    epochs: int  # of streaming training, after those of images alone
    batch_size: int  # clips per process
    streams: (
        int  # batches that take turns: batch b + streams follows the scenes of batch b, those in between other ones
    )
    frames_per_clip: int  # frames per step: as far back as gradients go, while the memory goes on along the scene
    drop_frames: float  # share of frames that are left out at random, for times between frames that vary
    image_epochs: int  # epochs at the start that train what the images show, before there is a map
    lr: float  # peak learning rate of AdamW
    weight_decay: float
    warmup_iters: int  # linear warm-up, then a cosine down to 1 % of the peak
    grad_clip: float  # largest norm of the gradient
    ema_momentum: float  # weight of the newest weights in the exponential moving average; 0 for none
    val_every: int  # epochs between two validations; the last epoch is always validated
    log_every: int  # iterations between two lines of the log
    workers: int  # processes that load clips; 0 loads them in the training process
    disabled_losses: tuple[
        str, ...
    ] = ()  # losses that are left out, by their names in perception.models.bev_transformer.losses.LOSS_WEIGHTS
    backbone_lr_mult: float = 1.0  # of lr that the backbone of the image encoder learns with
    frozen_stages: int = -1  # of the image encoder: 0 holds the stem as it is, n the first n stages too, -1 nothing
    backbone_weights: str = (
        ""  # that the image encoder's backbone starts from: published ones, or a network of the library
    )
    init_from: str = ""  # weights to start from, .safetensors or .pth of the same network, images of any size


@dataclass(frozen=True)
class TrainConfig:
    """A whole config, parsed."""

    name: str  # of the file, without .py; names the exported weights
    model: NetworkConfig
    train_data: DataSection | None  # this and `train` may be left out of a config that is only evaluated
    val_data: DataSection
    train: TrainSection | None
    source: Config  # as read, for the copy in the work directory


def load_config(name_or_path: str | Path, options: dict | None = None) -> TrainConfig:
    """Reads a config file.

    Args:
        name_or_path: a Python file, or the name of a config that came with the library, such as `synthetic/nano`.
        options: overrides with dotted keys, e.g. `{"train.lr": 1e-3}`.

    Raises:
        ConfigError: the file is missing or broken, a key is unknown or missing, or a value has the wrong type.
    """
    path, source = read_config(name_or_path, options)
    sections = {"model": None, "train_data": DataSection, "val_data": DataSection, "train": TrainSection}
    source_dict = source.to_dict()
    _check_keys(path, "", source_dict, set(sections), {"model", "val_data"})
    parsed = {
        name: _parse(path, name, source_dict[name], kind) if name in source_dict else None
        for name, kind in sections.items()
        if kind
    }
    model = model_config(source_dict["model"], str(path))
    return TrainConfig(name=path.stem, model=model, source=source, **parsed)


def model_config(section: dict, where: str) -> NetworkConfig:
    """The config of a network from a preset and overrides.

    Args:
        section: `preset`, of the flagship ("nano", "tiny" or "base") or another network of `perception.models`, such
            as "bevformer_tiny", and any fields of its config.
        where: the file that holds the section, for errors.

    Raises:
        ConfigError: the preset or a field does not exist, or a value has the wrong type.
    """
    if not isinstance(section, dict) or "preset" not in section:
        _check_keys(where, "model", section, set(section) if isinstance(section, dict) else set(), {"preset"})
    preset = section["preset"]
    if not isinstance(preset, str):
        raise ConfigError(f"{where}: model.preset is {preset!r}; it must be of type str")
    config = preset_config(preset)
    known = {field.name for field in dataclasses.fields(config)}
    _check_keys(where, "model", section, {"preset", *known}, {"preset"})
    hints = typing.get_type_hints(type(config))
    changes = {key: _typed(f"{where}: model.{key}", section[key], hints[key]) for key in section if key != "preset"}
    return dataclasses.replace(config, **changes)


def build_dataset(section: DataSection, model: NetworkConfig) -> NuScenesDataset:
    """The dataset of a section, with images of the size that the model wants.

    Raises:
        DataError: the root or one of its files is missing or malformed.
    """
    if section.make_with:
        check_dataset(section.dataroot, section.version, section.make_with)
    return NuScenesDataset(
        section.dataroot,
        section.version,
        section.split,
        image_size=model.image_size,
        points_per_line=model.line_points,
        augment=section.augment,
    )


def _check_keys(path: str | Path, where: str, section: object, allowed: set[str], required: set[str]) -> None:
    dot = f"{where}." if where else ""
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: {where} is {section!r}; it must be a dict(...)")
    for key in section:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            fix = f"did you mean {dot}{near[0]}?" if near else f"the keys there are {', '.join(sorted(allowed))}"
            raise ConfigError(f"{path}: unknown key {dot}{key}; {fix}")
    for key in sorted(required - set(section)):
        raise ConfigError(f"{path}: {dot}{key} is missing; add it")


def _parse(path: Path, where: str, section: dict, kind: type):
    fields = dataclasses.fields(kind)
    required = {field.name for field in fields if field.default is dataclasses.MISSING}
    _check_keys(path, where, section, {field.name for field in fields}, required)
    hints = typing.get_type_hints(kind)
    return kind(**{key: _typed(f"{path}: {where}.{key}", value, hints[key]) for key, value in section.items()})


def _typed(where: str, value, kind):
    """`value` as `kind` (an int becomes a float, a list a tuple, a dict a dataclass), or a ConfigError."""
    if kind == Augment | None:
        path, _, key = where.partition(": ")
        return None if value is None else _parse(path, key, value, Augment)
    if isinstance(value, dict) and (kinds := [k for k in typing.get_args(kind) if dataclasses.is_dataclass(k)]):
        path, _, key = where.partition(": ")
        return _parse(path, key, value, dataclass_for(value, kinds))
    origin = typing.get_origin(kind)
    if isinstance(kind, types.UnionType):
        kind = next((part for part in typing.get_args(kind) if isinstance(value, str) == (part is str)), kind)
        origin = typing.get_origin(kind)
    if origin is tuple and isinstance(value, list | tuple):
        inner = typing.get_args(kind)
        inner = inner[:1] * len(value) if inner[-1:] == (Ellipsis,) else inner
        if len(inner) == len(value):
            return tuple(_typed(f"{where}[{i}]", v, k) for i, (v, k) in enumerate(zip(value, inner, strict=True)))
    elif kind is float and type(value) in (int, float):
        return float(value)
    elif type(value) is kind:
        return value
    name = kind.__name__ if isinstance(kind, type) and origin is None else str(kind)
    raise ConfigError(f"{where} is {value!r}; it must be of type {name}")
