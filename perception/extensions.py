"""Losses and datasets from outside the package, and the import of the modules that register them.

A config names modules in `custom_imports`, a command in `--import`. Importing such a module registers what it adds: a
network with `perception.models.register_network`, a loss or a dataset with the functions here, a hook with MMEngine's
`HOOKS`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from perception.errors import ConfigError, PerceptionError
from perception.reading import short

if TYPE_CHECKING:
    from torch import Tensor

    from perception.types import Frame, FrameObjects

    Loss = Callable[[Any, FrameObjects, Frame], dict[str, Tensor]]

Registered = TypeVar("Registered", bound=Callable[..., Any])

LOSSES: dict[str, Loss] = {}
DATASETS: dict[str, Callable[..., Any]] = {}

# What training and validation read of a dataset, as `perception.data.nuscenes.NuScenesDataset` has it.
TRAINING_PARTS = ("__getitem__", "__len__", "tokens", "scene_of_sample")
VALIDATION_PARTS = (
    *TRAINING_PARTS, "roots", "version", "split", "timestamps", "ego_pose", "gt_boxes", "gt_lines", "lane_range",
)  # fmt: skip


def register_loss(name: str) -> Callable[[Registered], Registered]:
    """Makes a loss function usable as `train.extra_losses = {name: weight}` of a config, as a decorator.

    The function takes the raw outputs of the network in float32, the ground truth and the frame, all with leading [B],
    and returns scalars by name. Training adds them to the network's own losses, times the weight.

    Args:
        name: in configs.

    Raises:
        ConfigError: another function has this name.
    """
    return _registering(LOSSES, "a loss", name)


def register_dataset(name: str) -> Callable[[Registered], Registered]:
    """Makes a dataset usable as `train_data = dict(type=name, ...)` of a config, as a decorator of a class or function.

    It is called with the other keys of the section, and with `image_size`, `points_per_line` and `lane_range` of the
    network. It returns what has the attributes in `TRAINING_PARTS`, for `val_data` those in `VALIDATION_PARTS`; a
    subclass of `NuScenesDataset` has them.

    Args:
        name: in configs.

    Raises:
        ConfigError: another class or function has this name.
    """
    return _registering(DATASETS, "a dataset", name)


def _registering(table: dict[str, Any], kind: str, name: str) -> Callable[[Registered], Registered]:
    def register(entry: Registered) -> Registered:
        check_free(table.get(name), entry, f"{kind} {name!r}")
        table[name] = entry
        return entry

    return register


def check_free(present: Any, entry: Any, what: str) -> None:
    """Checks that a name is free for a class or function, or holds the same one, which a module may register again.

    Raises:
        ConfigError: the name is taken.
    """
    if present is not None and _place(present) != _place(entry):
        raise ConfigError(
            f"{_place(entry)} registers {what}, and {_place(present)} has this name already; choose another name"
        )


def _place(entry: Any) -> str:
    return f"{getattr(entry, '__module__', '?')}.{getattr(entry, '__qualname__', type(entry).__name__)}"


def registered(table: Mapping[str, Registered], where: str, name: Any) -> Registered:
    """Looks up a loss or a dataset by name.

    Args:
        table: `LOSSES` or `DATASETS`.
        where: file and key that hold the name, for messages.
        name: of the entry.

    Raises:
        ConfigError: nothing has this name.
    """
    if not isinstance(name, str) or name not in table:
        near = difflib.get_close_matches(str(name), table, n=1)
        known = f"did you mean {near[0]!r}?" if near else f"registered are: {', '.join(sorted(table)) or 'none'};"
        raise ConfigError(
            f"{where} names {short(name)}, which is not registered; {known} name the module that registers it in "
            "custom_imports"
        )
    return table[name]


def check_arguments(where: str, target: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Checks that a class or function can be called with arguments.

    Raises:
        ConfigError: an argument is unknown or missing; the message begins with `where`.
    """
    try:
        inspect.signature(target).bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"{where} does not fit {_place(target)}: {error}; correct its keys") from None


def check_parts(where: str, dataset: Any, parts: Iterable[str]) -> None:
    """Checks that a dataset has the attributes that training or validation reads.

    Raises:
        ConfigError: attributes are missing; the message names them.
    """
    if missing := [part for part in parts if not hasattr(dataset, part)]:
        raise ConfigError(
            f"{where}: {_place(type(dataset))} lacks {', '.join(missing)}; add what `NuScenesDataset` has there, or "
            "derive the class from it"
        )


def import_modules(names: Iterable[str], where: str, folder: Path | None = None) -> None:
    """Imports modules that register networks, losses, datasets or hooks.

    Args:
        names: of modules, such as `my_package.networks`.
        where: what named them, for messages.
        folder: where to look after the folders of PYTHONPATH and the installed packages.

    Raises:
        ConfigError: a module does not exist, or fails when it is imported.
    """
    if folder is not None and str(folder.resolve()) not in sys.path:
        sys.path.append(str(folder.resolve()))  # last, so that it hides no installed package; modules import more later
    for name in names:
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(f"{where} has {short(name)}; write the name of a module, such as my_package.networks")
        importlib.invalidate_caches()
        try:
            importlib.import_module(name)
        except PerceptionError:
            raise
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise ConfigError(f"{where}: {name} needs {error.name}, which is not installed; install it") from None
            beside = f" or into {folder.resolve()}" if folder is not None else ""
            raise ConfigError(f"{where}: there is no module {name}; put it on PYTHONPATH{beside}") from None
        except Exception as error:  # the module is a program and may raise anything
            last = traceback.extract_tb(error.__traceback__)[-1]
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"{where}: {name} fails when it is imported ({type(error).__name__}: {reason}, {last.filename}:"
                f"{last.lineno}); correct it"
            ) from None
