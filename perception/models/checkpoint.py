"""Weights files: safetensors with config and metrics, and the import of published checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from perception.commands import command
from perception.errors import CheckpointError, ConfigError
from perception.files import replacing
from perception.models import NETWORKS, Network, NetworkConfig, build_network, network_name
from perception.models.base import dataclass_for
from perception.models.foreign import check_finite, read_state_dict
from perception.models.provenance import Provenance
from perception.reading import short
from perception.types import LaneRange

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"  # shipped with the library
FORMAT = "perception-2"  # changes when old files can no longer be read

# Of the numbers of a config; larger ones come from damaged files.
_LARGEST = 100_000
_MOST_CELLS = 2**24  # of a grid, and pixels of an image
_MOST_OTHERS = 2**24  # numbers of tensors that are no weights


def save_checkpoint(
    path: str | Path,
    model: Network,
    metrics: dict[str, float],
    half: bool = False,
    provenance: Provenance | None = None,
) -> None:
    """Writes weights, config, metrics and provenance into one safetensors file, atomically.

    Args:
        path: file to write, ends in .safetensors.
        model: the network.
        metrics: metrics of these weights, stored as given.
        half: store the weights as `halve` converts them.
        provenance: what the weights were trained on, from `provenance_of`; None if that is not known.
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
    if not (module := type(model).__module__).startswith("perception."):
        metadata["module"] = module  # of a network from outside the package, for the message that it is unknown
    if provenance is not None:
        metadata["provenance"] = provenance.to_json()
    with replacing(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata)


def halve(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts weight matrices and kernels to float16: half the file size, a relative error of 1/2000 at most.

    Vectors stay as they are, because batch norm variances may exceed the range of float16.
    """
    return {name: tensor.half() if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}


def shipped_weights(name: str = "nano") -> Path:
    """Returns the path of weights that are shipped with the library.

    Raises:
        CheckpointError: no shipped weights have this name.
    """
    path = WEIGHTS / f"{name}.safetensors"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in WEIGHTS.glob("*.safetensors"))) or "none"
        raise CheckpointError(
            f"{name}: no weights of this name are shipped (there are: {shipped}); give one of them, or a .safetensors "
            "file that training wrote"
        )
    return path


def weights_file(name_or_path: str | Path) -> Path:
    """Returns the path of a `.safetensors` file, or of the shipped weights that any other string names.

    Raises:
        CheckpointError: no shipped weights have this name, or the path is a `.pth` file.
    """
    if Path(name_or_path).suffix in (".pth", ".pt"):
        raise CheckpointError(
            f"{name_or_path}: is not a .safetensors file; training writes one next to its .pth; a checkpoint of the "
            f"published code is imported with: {command('import-checkpoint')} {name_or_path} --out FILE.safetensors"
        )
    return Path(name_or_path) if Path(name_or_path).suffix == ".safetensors" else shipped_weights(str(name_or_path))


def load_model(name_or_path: str | Path, device: str | torch.device = "cpu") -> Network:
    """Loads a network with trained weights, in evaluation mode.

    Args:
        name_or_path: name of shipped weights, such as "nano", or a `.safetensors` file that training,
            `save_checkpoint` or `perception import-checkpoint` wrote.
        device: such as "cpu" or "cuda".

    Raises:
        CheckpointError: no shipped weights have this name, or the file is missing or unreadable, or its weights do not
            fit its config.
        ConfigError: torch has no such device.
    """
    path = weights_file(name_or_path)
    tensors, metadata = _read(path)
    tensors = {name: t.float() if t.dtype == torch.float16 else t for name, t in tensors.items()}
    architecture = metadata.get("architecture", "bev_transformer")
    if architecture not in NETWORKS:
        module = metadata.get("module", "")
        outside = all(part.isidentifier() for part in module.split("."))
        fix = f"add --import {module}" if outside else "use a newer version, or add --import MODULE"
        raise CheckpointError(
            f"{path}: architecture {short(architecture)} is unknown here; {fix}, or name the module that registers it "
            "in custom_imports of the config"
        )
    try:
        config = _config(NETWORKS[architecture][0], _json(path, metadata, "config"))
        with _Outline(sum(tensor.numel() for tensor in tensors.values())):
            model = build_network(config)
    except Exception as error:  # a network may raise anything for values that it was not made for
        reason = str(error).splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path}: config does not fit this version ({reason[0]}); train it again") from None
    check_fits(model, tensors, path)
    model.load_state_dict(tensors)
    return on_device(model, device)


class _Outline(TorchFunctionMode):
    """Builds a network whose weights are loaded afterwards.

    Initial weights are not drawn, which takes longer than loading. The network may have as many weights as the file,
    because a damaged config may ask for any number. (The meta device would do both, but PyTorch loads its compiler for
    it, which takes longer than everything else.)
    """

    def __init__(self, weights: int) -> None:
        super().__init__()
        self.left = weights + _MOST_OTHERS

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        if func in (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn):
            size = args[0] if args else kwargs["size"]
            self.left -= math.prod(args if isinstance(size, int) else size)
            if self.left < 0:
                raise ConfigError("it asks for more weights than the file has")
        return func(*args, **(kwargs or {}))


def on_device(model: Network, device: str | torch.device) -> Network:
    """Moves a network to a device and sets evaluation mode.

    Raises:
        ConfigError: torch has no such device.
    """
    try:
        return model.to(torch.device(device)).eval()
    except (RuntimeError, AssertionError) as error:  # torch raises either
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {str(device)!r} cannot be used here ({reason}); use 'cpu'") from None


def read_metrics(name_or_path: str | Path) -> dict[str, float]:
    """Reads the metrics that are stored with weights, such as "nds" and "lane_mAP".

    Args:
        name_or_path: as in `load_model`.

    Raises:
        CheckpointError: no shipped weights have this name, or the file is missing or unreadable.
    """
    path = weights_file(name_or_path)
    return _json(path, _read(path, tensors=False)[1], "metrics")


def read_provenance(name_or_path: str | Path) -> Provenance | None:
    """Reads what weights were trained on, None if their file does not say it.

    Args:
        name_or_path: as in `load_model`.

    Raises:
        CheckpointError: no shipped weights have this name, or the file is missing or unreadable.
    """
    path = weights_file(name_or_path)
    text = _read(path, tensors=False)[1].get("provenance")
    try:
        return None if text is None else Provenance.from_json(text)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: provenance is malformed ({error}); write it with write_provenance") from None


def write_provenance(path: str | Path, provenance: Provenance) -> None:
    """Writes into a weights file what its weights were trained on. Its tensors stay the same bit for bit.

    Args:
        path: a `.safetensors` file that `save_checkpoint` wrote.
        provenance: from `provenance_of`.

    Raises:
        CheckpointError: the file is missing or unreadable.
    """
    _read(Path(path), tensors=False)
    content = Path(path).read_bytes()
    length = int.from_bytes(content[:8], "little")  # a safetensors file: length of the header, header as JSON, tensors
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"]["provenance"] = provenance.to_json()
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    with replacing(path) as temporary:
        Path(temporary).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def _read(path: Path, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors (none if `tensors` is False) and the metadata of a file that `save_checkpoint` wrote."""
    _check_exists(path, "a .safetensors file that training wrote")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            content = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}
    except Exception as error:  # a damaged header may raise anything
        reason = str(error).splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path}: not a readable safetensors file ({reason[0]}); write it again") from None
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format is {short(metadata.get('format'))}, not {FORMAT}; train or import it again"
        )
    return content, metadata


def _json(path: Path, metadata: Mapping[str, str], field: str) -> dict[str, Any]:
    """Reads a JSON object in the metadata of a weights file."""
    try:
        value = json.loads(metadata[field])
    except (KeyError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: metadata {field} is not a JSON object; write the file again")
    return value


def _check_exists(path: Path, kind: str) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; give the path of {kind}")


_FORMER = {"ego_from_lidar"}  # fields of earlier versions, which are inputs of a network today


def _config(kind: type, values: Mapping[str, Any]) -> Any:
    """Builds a config dataclass from JSON.

    Raises:
        TypeError: a key is unknown, or a value does not have the type of its field.
        ValueError: a number is out of range.
    """
    hints = get_type_hints(kind)
    values = {key: value for key, value in values.items() if key not in _FORMER}
    if unknown := sorted(values.keys() - {field.name for field in fields(kind)}):
        raise TypeError(f"{kind.__name__} has no {short(unknown[0])}")
    return kind(**{key: _of_type(key, value, hints[key]) for key, value in values.items()})


def _of_type(key: str, value: Any, hint: Any) -> Any:
    """Converts a JSON value to the type of a field. Lists become tuples; dicts become the dataclass that fits."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if isinstance(value, dict) and (
        configs := [kind for kind in kinds if isinstance(kind, type) and is_dataclass(kind)]
    ):
        return _config(dataclass_for(value, configs), value)
    if isinstance(value, list):
        for kind in kinds:
            inner = (float, float) if kind is LaneRange else get_args(kind) if get_origin(kind) is tuple else ()
            inner = inner[:1] * len(value) if inner[-1:] == (Ellipsis,) else inner
            if inner and len(inner) == len(value):
                items = tuple(_of_type(key, item, part) for item, part in zip(value, inner, strict=True))
                if inner == (int, int) and not (min(items) > 0 and math.prod(items) <= _MOST_CELLS):
                    raise ValueError(f"{key} is {short(value)}")
                if key.endswith("_range") and len(items) in (2, 6) and kind is not LaneRange:
                    half = len(items) // 2
                    if not all(low < high for low, high in zip(items[:half], items[half:], strict=True)):
                        raise ValueError(f"{key} is {short(value)}")
                if kind is LaneRange and min(items) <= 0:
                    raise ValueError(f"{key} is {short(value)}")
                return LaneRange(*items) if kind is LaneRange else items
    elif value is None and type(None) in kinds:
        return None
    elif type(value) is int and int in kinds:
        if not 0 <= value <= _LARGEST:
            raise ValueError(f"{key} is {short(value)}")
        return value
    elif type(value) in (int, float) and float in kinds:
        if not abs(value) <= _LARGEST:
            raise ValueError(f"{key} is {short(value)}")
        return float(value)
    elif type(value) in kinds:
        return value
    raise TypeError(f"{key} is {short(value)}")


def import_published(path: str | Path) -> Network:
    """Loads a checkpoint that the published code of a network of `NETWORKS` wrote.

    Args:
        path: `.pth` file of a state dict with the published keys, alone or as training codes nest and wrap it, see
            `perception.models.foreign.state_dict_of`. Weights in half precision become float32.

    Returns:
        The network in evaluation mode. `preset_name(network.config)` is the name of the published network.

    Raises:
        CheckpointError: the file is missing or damaged, holds more than plain tensors, fits no published network, or
            holds weights that are not finite.
    """
    path = Path(path)
    _check_exists(path, "a .pth file of the published code")
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: is a safetensors file; give the .pth file of the published code")
    weights = read_state_dict(path)
    mismatches = {}
    for name, config, prefixes in _published():
        tensors = {library_key(key, prefixes): tensor for key, tensor in weights.items()}
        with torch.device("meta"):
            outline = build_network(config)
        mismatches[name] = mismatched_keys(outline, tensors)
        if not mismatches[name]:
            check_fits(outline, tensors, path)
            model = build_network(config)
            model.load_state_dict(tensors)
            return model.eval()
    nearest = min(mismatches, key=lambda name: len(mismatches[name]))
    raise CheckpointError(
        f"{path}: is none of {', '.join(mismatches)}; nearest is {nearest}, with {len(mismatches[nearest])} keys that "
        f"are missing, left over or of another shape, the first {mismatches[nearest][0]}"
    )


def _published() -> Iterator[tuple[str, NetworkConfig, Mapping[str, str]]]:
    """Yields preset, config and key prefixes of the networks whose published weights can be loaded."""
    for kind, network in NETWORKS.values():
        if network.published_prefixes:
            for name, make in kind.presets().items():
                yield name, make(), network.published_prefixes


def library_key(name: str, prefixes: Mapping[str, str]) -> str:
    """Converts a key of a published checkpoint to the library's key.

    Args:
        name: the published key.
        prefixes: the library's prefix by published prefix.
    """
    for published, own in prefixes.items():
        if name.startswith(published):
            name = own + name.removeprefix(published)
    return name.replace(".conv2_offset.", ".conv2.conv_offset.")  # the name in older files


def mismatched_keys(model: Network, tensors: Mapping[str, Tensor]) -> list[str]:
    """Lists keys that a state dict lacks, has in addition, or has in another shape, in alphabetical order."""
    needed = model.state_dict()
    return [
        name
        for name in sorted(needed.keys() | tensors.keys())
        if name not in needed or name not in tensors or needed[name].shape != tensors[name].shape
    ]


def check_fits(outline: Network, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Checks that tensors are the weights of a network: their keys, shapes and types, and that they are finite.

    Args:
        outline: the network, on any device.
        tensors: its state dict.
        path: of the file, for messages.

    Raises:
        CheckpointError: they are not; the message names the first one.
    """
    needed = outline.state_dict()
    for name in mismatched_keys(outline, tensors):
        found = f"has shape {tuple(tensors[name].shape)}" if name in tensors else "is missing"
        need = f"shape {tuple(needed[name].shape)} is needed" if name in needed else "the network has no such key"
        raise CheckpointError(f"{path}: {name} {found}, {need}; the checkpoint belongs to another config")
    for name, tensor in tensors.items():
        if tensor.dtype != needed[name].dtype:
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}, not {needed[name].dtype}; write the file again")
    check_finite(tensors, path)
