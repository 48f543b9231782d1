"""Prepares the layers of a network for inference: batch norms folded into convolutions, and bfloat16 where it is safe.

What a network does with its layers is observed in one pass of an example frame, so nothing is assumed about its code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from perception.cameras import surround_rig, usual_mounting
from perception.models import Network
from perception.types import Frame, map_tensors

# A convolution with a smaller share of the work of all convolutions stays float32. Those that output logits are among
# them: rounded to eight bits, neighbouring cells of a heat map tie, and depths jump.
LARGE_SHARE = 0.001


@dataclass
class _Calls:
    """What a pass does with one convolution."""

    conv: nn.Conv2d
    work: int = 0  # multiplications
    outputs: list[Tensor] = field(default_factory=list)  # kept, so that no other tensor gets the same id
    users: list[Any] = field(default_factory=list)  # of the outputs: batch norms, None for other functions


class _Observer(TorchFunctionMode):
    """Records the calls of convolutions, where their outputs go, and the inputs of batch norms."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.calls = {id(part.weight): _Calls(part) for part in network.modules() if isinstance(part, nn.Conv2d)}
        norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
        self.norms = {id(norm.running_mean): norm for norm in norms if norm.running_mean is not None}
        self.inputs: dict[int, list[int]] = {}  # ids of the inputs of a batch norm, by its own id
        self._by_output: dict[int, _Calls] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # A batch norm and a convolution get their weights by position, as `nn.BatchNorm2d` and `nn.Conv2d` give them.
        norm = self.norms.get(id(args[1])) if func is F.batch_norm and len(args) > 1 else None
        if norm is not None:
            self.inputs.setdefault(id(norm), []).append(id(args[0]))
        if any(True for _ in _tensors(result)):  # others ask for a shape or a type
            self.add_user([args, list((kwargs or {}).values())], norm)
        call = self.calls.get(id(args[1])) if func is torch.conv2d and len(args) > 1 else None
        if call is not None:
            call.work += result.numel() * call.conv.weight[0].numel()
            call.outputs.append(result)
            self._by_output[id(result)] = call
        return result

    def add_user(self, values: Any, norm: nn.BatchNorm2d | None) -> None:
        """Records that a batch norm, or something else if None, uses those of the tensors that convolutions made."""
        for tensor in _tensors(values):
            if id(tensor) in self._by_output:
                self._by_output[id(tensor)].users.append(norm)


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


@torch.no_grad()
def observe(network: Network) -> _Observer:
    """Runs one example frame and returns what the network does with its convolutions and batch norms."""
    observer = _Observer(network)
    with observer:
        results = network(example_frame(network), network.initial_state(1))
    observer.add_user(results, None)
    return observer


@torch.no_grad()
def fold_batch_norms(network: Network, observer: _Observer) -> int:
    """Folds batch norms into the convolutions before them, in place.

    A batch norm is folded if it gets the outputs of one convolution and nothing else, and these go nowhere else.

    Args:
        network: in evaluation mode.
        observer: what `observe` returned for it.

    Returns:
        The number of folded batch norms.
    """
    folded = set()
    for call in observer.calls.values():
        norm = call.users[0] if call.users else None
        if norm is None or any(user is not norm for user in call.users) or len(call.users) != len(call.outputs):
            continue
        if sorted(observer.inputs[id(norm)]) != sorted(map(id, call.outputs)):
            continue
        conv, scale = call.conv, (norm.running_var + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight
        bias = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
        bias = bias * scale if norm.bias is None else bias * scale + norm.bias
        conv.weight = nn.Parameter(conv.weight * scale.view(-1, 1, 1, 1), requires_grad=False)
        conv.bias = nn.Parameter(bias, requires_grad=False)
        folded.add(id(norm))
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in folded:
                setattr(parent, name, nn.Identity())
    return len(folded)


class _Float32Linear(nn.Linear):
    """A linear layer that runs in float32 also under autocast."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.float(), self.weight, self.bias)


class _Float32Conv2d(nn.Conv2d):
    """A convolution that runs in float32 also under autocast."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            output: Tensor = self._conv_forward(input.float(), self.weight, self.bias)
            return output


def keep_float32(network: Network, observer: _Observer) -> None:
    """Lets linear layers and small convolutions run in float32 under autocast, in place.

    They are a small part of the work. The eight bits of bfloat16 cost most accuracy there: sampling locations, line
    points, logits.

    Args:
        network: to change.
        observer: what `observe` returned for it, before batch norms were folded or after.
    """
    total = sum(call.work for call in observer.calls.values())
    large = {id(call.conv) for call in observer.calls.values() if call.work >= LARGE_SHARE * total}
    for part in network.modules():
        # Parameters stay where they are, since networks read them too, for example for their device.
        if type(part) is nn.Linear:
            part.__class__ = _Float32Linear
        elif type(part) is nn.Conv2d and id(part) not in large:
            part.__class__ = _Float32Conv2d


def example_frame(network: Network, cameras: int | None = None) -> Frame:
    """Makes a frame [1, ...] of cameras in all directions, half a second after the one before, on a network's device.

    Args:
        network: decides the size of the images and the device.
        cameras: number of cameras; by default that of the network's config, or one.
    """
    N = cameras or network.config.cameras or 1
    H, W = network.config.image_size
    frame = Frame(
        torch.randint(0, 256, (1, N, 3, H, W), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
        map_tensors(lambda tensor: tensor[None], surround_rig([(H, W)] * N)),
        torch.eye(4)[None],
        torch.full((1,), 0.5),
        torch.zeros(1, dtype=torch.bool),
        *usual_mounting(1, N),
    )
    device = next(network.parameters()).device
    return map_tensors(lambda tensor: tensor.to(device), frame)
