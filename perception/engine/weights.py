"""Loads the weights that training starts from or evaluation runs with."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from perception.commands import command
from perception.engine.config import TrainConfig, check_trainable
from perception.errors import CheckpointError, ConfigError
from perception.models import Network, NetworkConfig, build_network
from perception.models.backbone import load_backbone
from perception.models.checkpoint import check_fits, load_model, mismatched_keys


def _statistic(owner: object, name: str) -> Any:
    """Returns a method of HistoryBuffer, which its pickles name through `getattr`; no other attribute of anything."""
    if owner is not HistoryBuffer or name not in ("min", "max", "current", "mean"):
        raise ValueError(f"a checkpoint asks for the attribute {name}")
    return getattr(HistoryBuffer, name)


# What MMEngine's own checkpoints hold besides tensors and plain values: histories of scalars, as numpy arrays.
MMENGINE_CLASSES: list[Any] = [
    HistoryBuffer, (_statistic, "builtins.getattr"), np.ndarray, np.dtype, np.float64(0).__reduce__()[0],
    np.zeros(0).__reduce__()[0], *(type(np.dtype(kind)) for kind in "bilfd"),
]  # fmt: skip


def make_core(config: TrainConfig, *, initial_weights: bool = True) -> Network:
    """Builds the network of a training with its initial weights and frozen stages.

    Args:
        config: the config.
        initial_weights: load the weights that the config names. A training that goes on has its own.

    Raises:
        CheckpointError: the initial weights are missing or belong to another network.
        ConfigError: the config is for evaluation only, weights are given twice, or the backbone has fewer stages than
            are to be frozen.
    """
    section, _ = check_trainable(config)
    if section.init_from and section.backbone_weights:
        raise ConfigError(
            "train.init_from and train.backbone_weights are both given; the first holds a backbone already"
        )
    core = build_network(config.model)
    if section.init_from and initial_weights:
        core.load_state_dict(load_weights(section.init_from, config.model, any_size=True).state_dict())
    backbone = core.image_encoder.backbone
    if section.backbone_weights and initial_weights:
        load_backbone(backbone, section.backbone_weights)
    backbone.freeze(section.frozen_stages)
    return core


def load_weights(name_or_path: str | Path, model_config: NetworkConfig, *, any_size: bool = False) -> Network:
    """Loads a network in evaluation mode with the weights of a file.

    Args:
        name_or_path: weights exported by training (`.safetensors`), a training checkpoint (`.pth`), also one of
            `perception.mmdet3d`, or the name of shipped weights.
        model_config: config of the network.
        any_size: accept weights of a network with another image size; no weight depends on it.

    Raises:
        CheckpointError: the file is missing, unreadable, or belongs to another architecture.
    """
    path = Path(name_or_path)
    if path.suffix == ".safetensors" or not (path.suffix or path.is_file()):
        core = load_model(name_or_path)
        if type(core.config) is not type(model_config):
            raise CheckpointError(
                f"{path}: holds a {type(core).__name__}, the config is for another network; use its own config"
            )
        for field in fields(model_config):
            found, expected = getattr(core.config, field.name), getattr(model_config, field.name)
            if found != expected and not (any_size and field.name == "image_size"):
                raise CheckpointError(
                    f"{path}: its network has {field.name}={found}, the config's model has {expected}; use the config "
                    "it was trained with"
                )
        return core
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; give a .safetensors or .pth file that training wrote")
    model = build_network(model_config)
    try:
        with torch.serialization.safe_globals(MMENGINE_CLASSES):
            weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:  # unpickling a broken file may raise anything
        raise CheckpointError(
            f"{path}: not a readable training checkpoint ({type(error).__name__}); give a file that training wrote, "
            f"or import one of the published code with: {command('import-checkpoint')} {path} --out FILE.safetensors"
        ) from None
    weights = {name.removeprefix("core."): tensor for name, tensor in weights.items()}  # the prefix of `TrainingModel`
    for name in mismatched_keys(model, weights):
        raise CheckpointError(
            f"{path}: its {name} does not fit the config's model; evaluate with the config it was trained with"
        )
    check_fits(model, weights, path)
    model.load_state_dict(weights)
    return model.eval()
