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

from perception.commands import command
from perception.errors import CheckpointError, ConfigError
from perception.files import replacing
from perception.models import NETWORKS, Network, NetworkConfig, build_network, network_name
from perception.models.base import dataclass_for

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"  # that came with the library
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


def shipped_weights(name: str = "nano") -> Path:
    """The file of weights that came with the library.

    Raises:
        CheckpointError: there are none of this name.
    """
    path = WEIGHTS / f"{name}.safetensors"
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in WEIGHTS.glob("*.safetensors"))) or "none"
        raise CheckpointError(
            f"{name}: no weights of this name were shipped (there are: {there}); give one of them, or a .safetensors "
            "file that training wrote"
        )
    return path


def weights_file(name_or_path: str | Path) -> Path:
    """A `.safetensors` file as it is; anything else is the name of shipped weights, see `shipped_weights`.

    Raises:
        CheckpointError: there are none of this name.
    """
    if Path(name_or_path).suffix in (".pth", ".pt"):
        raise CheckpointError(
            f"{name_or_path}: is not a .safetensors file; training writes one beside its .pth, and a checkpoint of the "
            f"published code is imported with: {command('import-checkpoint')} {name_or_path} --out FILE.safetensors"
        )
    return Path(name_or_path) if Path(name_or_path).suffix == ".safetensors" else shipped_weights(str(name_or_path))


def load_model(name_or_path: str | Path, device: str | torch.device = "cpu") -> Network:
    """A network with trained weights, in evaluation mode.

    Args:
        name_or_path: the name of weights that came with the library, such as "nano", or a `.safetensors` file that
            training, `save_checkpoint` or `perception import-checkpoint` wrote.
        device: such as "cpu" or "cuda".

    Raises:
        CheckpointError: there are no weights of this name, or the file is missing, is no such file, or does not fit its
            own configuration.
        ConfigError: torch has no such device here.
    """
    path = weights_file(name_or_path)
    tensors, metadata = _read(path)
    tensors = {name: t.float() if t.dtype == torch.float16 else t for name, t in tensors.items()}
    architecture = metadata.get("architecture", "bev_transformer")
    if architecture not in NETWORKS:
        raise CheckpointError(f"{path}: architecture {architecture!r} is not known to this version; use a newer one")
    try:
        config = _config(NETWORKS[architecture][0], json.loads(metadata["config"]))
    except TypeError as error:
        raise CheckpointError(f"{path}: config does not fit this version ({error}); train it again") from error
    model = build_network(config)
    _load_exactly(model, tensors, path)
    return on_device(model, device)


def on_device(model: Network, device: str | torch.device) -> Network:
    """The network in evaluation mode on a device.

    Raises:
        ConfigError: torch has no such device here.
    """
    try:
        return model.to(torch.device(device)).eval()
    except (RuntimeError, AssertionError) as error:  # torch uses both
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {str(device)!r} cannot be used here ({reason}); use 'cpu'") from None


def read_metrics(name_or_path: str | Path) -> dict[str, float]:
    """The numbers that were measured with the weights of a file and stored in it, such as "nds" and "lane_mAP".

    Args:
        name_or_path: as of `load_model`.

    Raises:
        CheckpointError: as `load_model`.
    """
    return json.loads(_read(weights_file(name_or_path), tensors=False)[1]["metrics"])


def _read(path: Path, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file of `save_checkpoint`."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; give the path of a .safetensors file that training wrote")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            content = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}); write it again") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format is {metadata.get('format')!r}, not {FORMAT!r}; train or import it again")
    return content, metadata


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


def import_published(path: str | Path) -> Network:
    """A network with the weights of a checkpoint that the published code wrote.

    Args:
        path: `.pth` of a state dict with the official keys, alone or under `state_dict`.

    Returns:
        The network in evaluation mode. `preset_name` of its config is the name of the published network.

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
            return model.eval()
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
