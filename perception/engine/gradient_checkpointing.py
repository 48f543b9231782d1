"""Gradient checkpointing (https://arxiv.org/abs/1604.06174): activations are computed again instead of being kept.

The backward pass runs the forward pass of each module once more, so only the inputs of modules stay in memory between
the two passes. Gradients are the same to float precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from perception.models import Network

_recomputing = ContextVar("recomputing", default=False)


def is_recomputing() -> bool:
    """Whether this thread runs a module for the second time, inside of a backward pass."""
    return _recomputing.get()


def recomputable_modules(core: Network) -> list[nn.Module]:
    """Lists the modules of a network that are run again in the backward pass; none is part of another one.

    They are the stem and the stages of the backbone of the image encoder, and what `Network.recomputable` names.
    """
    backbone: nn.Module = core.image_encoder.backbone
    while len(parts := list(backbone.children())) == 1:  # a wrapper around the network of another library
        backbone = parts[0]
    by_name = dict(core.named_modules())
    named = [by_name[name] for name in core.recomputable]
    return [entry for part in (*parts, *named) for entry in (part if isinstance(part, nn.ModuleList) else (part,))]


@contextmanager
def gradient_checkpointing(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Keeps only the inputs of modules that run in the block; backward passes may follow after it.

    Args:
        modules: none is part of another one, see `recomputable_modules`.
    """
    for module in modules:
        contexts = partial(_contexts, module)
        module.forward = partial(checkpoint, module.forward, use_reentrant=False, context_fn=contexts)
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # of the instance; that of the class stays


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Returns the contexts of the first and of the second run of a module."""
    return nullcontext(), _second_run(module)


@contextmanager
def _second_run(module: nn.Module) -> Iterator[None]:
    """Gives batch norms that use the statistics of the batch a copy of their running statistics to add them to."""
    norms = [part for part in module.modules() if getattr(part, "track_running_stats", False) and part.training]
    statistics = [(norm, name, tensor) for norm in norms for name, tensor in norm.named_buffers(recurse=False)]
    for norm, name, tensor in statistics:
        setattr(norm, name, tensor.clone())
    token = _recomputing.set(True)
    try:
        yield
    finally:
        _recomputing.reset(token)
        for norm, name, tensor in statistics:
            setattr(norm, name, tensor)
