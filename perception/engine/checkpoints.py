"""The work directory of a training: its checkpoints, its settings and its lock.

A checkpoint appears whole or not at all, and its hash is part of it. The newest one is found by looking into the
folder, so a folder that was moved or copied goes on with its own files. Reading a checkpoint runs no code and opens no
address.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perception.engine.config import TrainConfig
from perception.errors import CheckpointError, ConfigError, PerceptionWarning
from perception.files import locked, replacing
from perception.reading import short

FORMAT = "perception-training-1"  # changes when a training can no longer go on from old files
KEPT = 2  # checkpoints of finished epochs that stay
_NAME = re.compile(r"epoch_(\d+)(?:_batch_(\d+))?\.pth")

# Settings that do not change what is learned.
FREE = ("train.workers", "train.log_every", "train_data.make_with", "val_data.make_with")
# Settings that another value may follow in the middle of a training, if the user says so.
CHANGEABLE = (
    "train.epochs", "train.lr", "train.weight_decay", "train.grad_clip", "train.disabled_losses", "train.val_every",
    "train_data.dataroot", "train_data.samples", "val_data.dataroot", "amp",
)  # fmt: skip


class WorkDir:
    """The folder of one training.

    Args:
        path: the folder; it does not have to exist.
        name: of the config and of the exported weights.
    """

    def __init__(self, path: str | Path, name: str) -> None:
        self.path = Path(path)
        self.best = self.path / f"{name}.safetensors"
        self.last = self.path / f"{name}-last.safetensors"

    def checkpoints(self) -> list[Path]:
        """Lists the checkpoints, the newest first."""
        found = ((path, _NAME.fullmatch(path.name)) for path in self.path.glob("epoch_*.pth"))
        progress = {path: (int(match[1]), int(match[2] or 0)) for path, match in found if match}
        return sorted(progress, key=lambda path: progress[path], reverse=True)

    def work(self) -> list[Path]:
        """Lists what a training would lose by starting again: checkpoints and exported weights."""
        return [*self.checkpoints(), *(path for path in (self.best, self.last) if path.exists())]

    def clear(self) -> None:
        """Deletes the checkpoints and the exported weights. Logs stay."""
        for path in self.work():
            path.unlink()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for one training.

        Raises:
            ConfigError: another training holds it.
        """
        with locked(self.path / ".lock", wait=False) as held:
            if not held:
                raise ConfigError(f"another training is running in {self.path}; wait for it, or choose another folder")
            yield

    def save(self, content: dict[str, Any], epoch: int, batch: int) -> Path:
        """Writes a checkpoint and deletes those that are no longer needed.

        Args:
            content: nested dicts and lists of tensors and plain values, with a dict `meta`.
            epoch: number of finished epochs.
            batch: number of finished batches of the next epoch.

        Returns:
            The path of the checkpoint.
        """
        path = self.path / (f"epoch_{epoch}_batch_{batch}.pth" if batch else f"epoch_{epoch}.pth")
        content = plain(content)
        content["meta"] |= {"format": FORMAT, "epoch": epoch, "batch": batch}
        content["meta"]["sha256"] = content_hash(content)
        with replacing(path) as temporary:
            torch.save(content, temporary)
        self.prune(path)
        return path

    def prune(self, saved: Path | None = None) -> None:
        """Deletes checkpoints that are no longer needed: those inside of epochs but `saved`, and those of old epochs.

        Args:
            saved: the newest checkpoint, next to which a damaged one may have a higher number.
        """
        found = self.checkpoints()
        kept = [path for path in found if "_batch_" not in path.name][:KEPT]
        for path in found:
            if path not in kept and path != saved:
                path.unlink(missing_ok=True)

    def newest(self) -> dict[str, Any] | None:
        """Reads the newest checkpoint that is not damaged; None if there is no work in the folder.

        Warns of damaged checkpoints, and uses the one before.

        Raises:
            CheckpointError: the folder holds work, and no checkpoint of it can be read.
        """
        for path in self.checkpoints():
            try:
                content = torch.load(path, map_location="cpu", weights_only=True)
                if content["meta"]["format"] != FORMAT:
                    raise ValueError(f"its format is {content['meta']['format']!r}, not {FORMAT!r}")
                if content["meta"]["sha256"] != content_hash(content):
                    raise ValueError("its content does not have the hash that was written with it")
            except Exception as error:  # unpickling a damaged file may raise anything
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                warnings.warn(
                    f"{path} is damaged or of another program ({reason}) and is not used", PerceptionWarning, 2
                )
            else:
                return content
        if work := self.work():
            raise CheckpointError(
                f"{self.path} holds {work[0].name} but no readable checkpoint to go on from; add --overwrite to delete "
                "what is there and start again, or choose another folder"
            )
        return None


def settings_of(config: TrainConfig, **others: Any) -> dict[str, Any]:
    """Lists everything that decides what a training learns, as plain JSON values by dotted key.

    Args:
        config: the config.
        others: further settings, such as the seed.
    """
    sections = {name: getattr(config, name) for name in ("model", "train_data", "val_data", "train")}
    nested = {name: dataclasses.asdict(section) for name, section in sections.items()}
    flat = {f"{name}.{key}": value for name, section in nested.items() for key, value in section.items()}
    return json.loads(json.dumps({key: value for key, value in flat.items() if key not in FREE} | others))


def changed_settings(
    where: Path, before: Mapping[str, Any], now: Mapping[str, Any], allow_change: bool
) -> dict[str, tuple[Any, Any]]:
    """Compares the settings of a checkpoint with those of the training that goes on from it.

    Args:
        where: the work directory, for the message.
        before, now: of `settings_of`.
        allow_change: accept other values of the settings in `CHANGEABLE`.

    Returns:
        The old and the new value of each setting that has changed.

    Raises:
        ConfigError: a setting has changed and may not.
    """
    keys = sorted(before.keys() | now.keys())
    changed = {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}
    refused = [key for key in changed if not (allow_change and key in CHANGEABLE)]
    if refused:
        shown = ", ".join(f"{key} {short(changed[key][0])} -> {short(changed[key][1])}" for key in refused)
        if all(key in CHANGEABLE for key in refused):
            fix = "add --allow-change to go on with the new value, or give the old one"
        else:
            fix = "give the old value, or start in another --work-dir"
        raise ConfigError(f"{where} holds a training with other settings: {shown}; {fix}")
    return changed


def plain(value: Any) -> Any:
    """Converts nested containers to dicts and lists, with tensors on the CPU, so that reading them needs no code."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value


def content_hash(content: Mapping[str, Any]) -> str:
    """SHA-256 of a checkpoint without its own hash: names, types, shapes and bytes of tensors, and plain values."""
    digest = hashlib.sha256()

    def add(key: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for name, part in value.items():
                if (key, name) != ("/meta", "sha256"):
                    add(f"{key}/{name}", part)
        elif isinstance(value, list):
            for number, part in enumerate(value):
                add(f"{key}/{number}", part)
        elif isinstance(value, Tensor):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(f"{key} {value!r}".encode())

    add("", content)
    return digest.hexdigest()
