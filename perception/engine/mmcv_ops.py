"""Lets mmdet and mmdet3d be imported beside mmcv-lite, which lacks the compiled operators that they import."""

from __future__ import annotations

import importlib.util
import sys
import types
from importlib.machinery import ModuleSpec

NAME = "mmcv._ext"


class _Operators(types.ModuleType):
    """Stands in for mmcv's compiled operators: they can be imported, and say what is missing when they are called."""

    def __getattr__(self, operator: str):
        if operator.startswith("__"):
            raise AttributeError(operator)

        def missing(*args, **kwargs):
            raise RuntimeError(
                f"mmcv's compiled operator {operator} is needed and not installed; install mmcv instead of mmcv-lite"
            )

        return missing


def stand_in() -> None:
    """Makes `mmcv.ops` importable where mmcv has no compiled operators; does nothing where it has them."""
    if NAME in sys.modules or importlib.util.find_spec(NAME) is not None:
        return
    module = _Operators(NAME)
    module.__file__ = __file__  # mmcv tells where its operators are from
    module.__spec__ = ModuleSpec(NAME, None)  # without a loader, so that mmengine does not take it for the real ones
    sys.modules[NAME] = module
