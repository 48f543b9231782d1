"""Weights as files: safetensors with configuration and metrics inside, and the import of published checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import get_args, get_type_hints

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from perception.errors import CheckpointError
from perception.files import replacing
from perception.models import NETWORKS, Network, NetworkConfig, build_network, network_name
from perception.models.base import dataclass_for

FORMAT = "perception-2"  # changes when old files can no longer be read


def save_checkpoint(path: str | Path, model: Network, metrics: dict[str, float], half: bool = False) -> None:
    """Writes weights, configuration and metrics into one safetensors file, beside and renamed.

    Args:
        path: file to write, ends in .safetensors.
        model: the network.
        metrics: numbers that were measured with these weights, stored as given.
        half: store them as `halve` does.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if half:
        tensors = halve(tensors)
    metadata = {
        "format": FORMAT,
        "architecture": network_name(model.config),
        "config": json.dumps(asdict(model.config)),
        "metrics": json.dumps(metrics),
    }
    with replacing(path) as beside:
        safetensors.torch.save_file(tensors, beside, metadata)


def halve(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices and kernels in float16, which halves a file and moves each weight by one part in 2,000 at most.

    Vectors stay as they are: the variances among them may be larger than float16 reaches.
    """
    return {name: tensor.half() if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}


def load_checkpoint(path: str | Path) -> tuple[Network, dict[str, float]]:
    """Reads a file of `save_checkpoint`.

    Returns:
        The network in evaluation mode on the CPU, and the metrics stored with it.

    Raises:
        CheckpointError: if the file is missing, is no such file, or does not fit its own configuration.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; give the path of a .safetensors file that training wrote")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            tensors = {name: t.float() if t.dtype == torch.float16 else t for name, t in tensors.items()}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}); write it again") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format is {metadata.get('format')!r}, not {FORMAT!r}; train or import it again")
    architecture = metadata.get("architecture", "bev_transformer")
    if architecture not in NETWORKS:
        raise CheckpointError(f"{path}: architecture {architecture!r} is not known to this version; use a newer one")
    try:
        config = _config(NETWORKS[architecture][0], json.loads(metadata["config"]))
    except TypeError as error:
        raise CheckpointError(f"{path}: config does not fit this version ({error}); train it again") from error
    model = build_network(config)
    _load_exactly(model, tensors, path)
    return model.eval(), json.loads(metadata["metrics"])


def _config(kind: type, values: dict):
    """A dataclass from JSON: lists become tuples, and dicts the dataclasses that the fields are annotated with."""

    def frozen(value):
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    known = {key: frozen(value) for key, value in values.items()}
    hints = get_type_hints(kind)
    for key, value in known.items():
        if isinstance(value, dict):
            known[key] = _config(dataclass_for(value, get_args(hints[key])), value)
    return kind(**known)


def import_published(path: str | Path) -> tuple[str, Network]:
    """A network with the weights of a checkpoint that the published code wrote.

    Args:
        path: `.pth` of a state dict with the official keys, alone or under `state_dict`.

    Returns:
        The name of the published network, a preset of its config, and the network in evaluation mode.

    Raises:
        CheckpointError: the file is missing, is not one of plain tensors, or is not exactly one of these networks: each
            key has to be there, with its shape, and nothing else.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; give the path of a .pth file of the published code")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling foreign bytes may raise
        raise CheckpointError(
            f"{path}: not readable as plain tensors ({type(error).__name__}); only files that torch.load reads with "
            "weights_only=True are taken, so save its state_dict alone where it was made"
        ) from None
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(x, Tensor) for x in weights.values()) or not weights:
        raise CheckpointError(f"{path}: holds no state dict; give a .pth that the published code wrote")
    wrong = {}
    for name, config, prefixes in _published():
        tensors = {our_key(key, prefixes): tensor for key, tensor in weights.items()}
        with torch.device("meta"):
            wrong[name] = misfits(build_network(config), tensors)
        if not wrong[name]:
            model = build_network(config)
            model.load_state_dict(tensors)
            return name, model.eval()
    nearest = min(wrong, key=lambda name: len(wrong[name]))
    raise CheckpointError(
        f"{path}: is none of {', '.join(wrong)}; nearest is {nearest}, with {len(wrong[nearest])} keys that are "
        f"missing, left over or of another shape, the first {wrong[nearest][0]}"
    )


def _published() -> Iterator[tuple[str, NetworkConfig, Mapping[str, str]]]:
    """Name, config and prefixes of keys of the networks whose published weights can be loaded."""
    for kind, network in NETWORKS.values():
        if network.published_prefixes:
            for name, make in kind.presets().items():
                yield name, make(), network.published_prefixes


def our_key(name: str, prefixes: Mapping[str, str]) -> str:
    """The library's name of an official key."""
    for theirs, ours in prefixes.items():
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
    return name.replace(".conv2_offset.", ".conv2.conv_offset.")  # older files name the layer so


def misfits(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Keys of a network that a state dict lacks, has too many of, or has in another shape, in alphabetical order."""
    wanted = model.state_dict()
    return [
        name
        for name in sorted(wanted.keys() | tensors.keys())
        if name not in wanted or name not in tensors or wanted[name].shape != tensors[name].shape
    ]


def _load_exactly(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Loads a state dict, or raises a CheckpointError that names the first key that does not fit."""
    for name in misfits(model, tensors):
        wanted = model.state_dict()
        has = f"has shape {tuple(tensors[name].shape)}" if name in tensors else "is missing"
        wants = f"shape {tuple(wanted[name].shape)} is needed" if name in wanted else "the network has no such key"
        raise CheckpointError(f"{path}: {name} {has}, {wants}; the checkpoint belongs to another configuration")
    model.load_state_dict(tensors)
