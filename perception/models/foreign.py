"""Reads state dicts in files that other training codes wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from perception.errors import CheckpointError

_TRUNCATED = ("central directory", "EOF", "truncated", "Ran out of input", "corrupt")  # words of torch's errors
_NESTS = ("state_dict", "model_state_dict", "model", "network", "net", "ema_state_dict", "ema")
_WRAPPERS = ("module.", "_orig_mod.", "model.", "network.", "ema_model.", "ema_module.", "ema_", "ema.")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Reads the state dict of a checkpoint; no code in it is run.

    Args:
        path: a `.safetensors` file, or a `.pth` of plain tensors: a state dict, alone or nested and wrapped as
            `state_dict_of` knows it.

    Returns:
        Tensors by key; numbers in half precision become float32.

    Raises:
        CheckpointError: the file is damaged, is no checkpoint, or holds more than plain tensors, or weights
            that are not finite.
    """
    path = Path(path)
    _check_start(path)
    try:
        if path.suffix == ".safetensors":
            content: object = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # reading an arbitrary file may raise anything
        if isinstance(error, EOFError) or any(sign in str(error) for sign in _TRUNCATED):
            raise CheckpointError(f"{path}: is truncated; copy or download it again") from None
        raise CheckpointError(
            f"{path}: not readable as plain tensors ({type(error).__name__}); only files that torch.load reads with "
            "weights_only=True are accepted, so save the state dict alone where the file was made"
        ) from None
    weights = state_dict_of(content)
    if not weights:
        raise CheckpointError(f"{path}: holds no state dict; give a file whose content is one")
    check_finite(weights, path)
    return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in weights.items()}


def check_finite(weights: Mapping[str, Tensor], path: Path) -> None:
    """Checks that weights are finite.

    Raises:
        CheckpointError: one is not; the message names it and `path`.
    """
    for key, tensor in weights.items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{path}: {key} holds numbers that are not finite, as after a training that diverged; give an earlier "
                "checkpoint"
            )


def _check_start(path: Path) -> None:
    """Checks that a file does not start like something else than a checkpoint that people download by mistake.

    Raises:
        CheckpointError: it does, or it cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(512).lstrip()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); make it readable") from None
    if not start:
        raise CheckpointError(f"{path}: is empty; copy or download it again")
    if start.startswith(b"<"):
        raise CheckpointError(f"{path}: is a web page; download the file behind the link, not the page that shows it")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: is a pointer of Git LFS; fetch the file with `git lfs pull`")


def state_dict_of(content: object) -> dict[str, Tensor]:
    """Finds the state dict in the content of a checkpoint and removes what wrappers add to its keys.

    The state dict may lie under the names of `_NESTS`, also several levels deep. Prefixes of DataParallel,
    torch.compile and averaged models are removed if all keys have them. Averaged copies next to the weights, which
    mmcv's EMA hook registers as `ema_` and the key with underscores, are left out: mmcv swaps them with the weights
    before it saves.

    Returns:
        Tensors by key, empty if there is no state dict.
    """
    for _ in range(4):
        if not isinstance(content, dict):
            return {}
        nest = next((name for name in _NESTS if isinstance(content.get(name), dict)), None)
        if nest is None:
            break
        content = content[nest]
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        return {}
    if not all(isinstance(tensor, Tensor) and tensor.layout == torch.strided for tensor in content.values()):
        return {}
    weights = dict(content)
    if any(key.startswith("module.") for key in weights):
        weights.pop("steps", None)  # the counter of mmengine's averaged models
    while prefix := next((p for p in _WRAPPERS if weights and all(key.startswith(p) for key in weights)), ""):
        weights = {key.removeprefix(prefix): tensor for key, tensor in weights.items()}
    copies = {f"ema_{key.replace('.', '_')}" for key in weights}
    return {key: tensor for key, tensor in weights.items() if key not in copies}
