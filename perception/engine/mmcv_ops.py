"""Makes mmdet and mmdet3d importable with mmcv-lite, which lacks the compiled operators that they import."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec

NAME = "mmcv._ext"


class _Operators(types.ModuleType):
    """A stub of mmcv's compiled operators, which can be imported and raise an error when they are called."""

    def __getattr__(self, operator: str) -> Callable[..., None]:
        if operator.startswith("__"):
            raise AttributeError(operator)

        def missing(*args: object, **kwargs: object) -> None:
            raise RuntimeError(
                f"mmcv's compiled operator {operator} is needed and not installed; install mmcv instead of mmcv-lite"
            )

        return missing


def install_stub() -> None:
    """Installs a stub of mmcv's compiled operators if mmcv has none, so that `mmcv.ops` can be imported."""
    if NAME in sys.modules or importlib.util.find_spec(NAME) is not None:
        return
    module = _Operators(NAME)
    module.__file__ = __file__  # mmcv reads it
    module.__spec__ = ModuleSpec(NAME, None)  # without a loader, by which mmengine recognises real operators
    sys.modules[NAME] = module
