"""Prepares a network for fast inference: precision, memory layout, folded batch norms, compiler, CUDA graph.

    fast = accelerated(network)
    prediction, state = fast(frame, state)
    objects = fast.decode(prediction)

The given network is not changed. `accelerated(network, **PLAIN)` is the baseline that every option is compared with:
eager float32 in the layout of training files, with the network's own weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from perception.errors import ConfigError
from perception.models import Network
from perception.types import CameraRig, Frame, FrameObjects, State, map_tensors

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
PLAIN: dict[str, Any] = {"precision": "float32", "channels_last": False, "fold": False}
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class AcceleratedNetwork(nn.Module):
    """A network in evaluation mode that runs fast, made by `accelerated`; it is called as the network itself is.

    Attributes:
        config, finds, raw_names: those of the network.
        precision: "float32", "bfloat16" or "float16".
        choice: what was chosen and why, one line for logs.
    """

    def __init__(self, network: Network, precision: str, choice: str, channels_last: bool) -> None:
        super().__init__()
        self.network: Any = network
        self.config, self.finds, self.raw_names = network.config, network.finds, network.raw_names
        self.precision, self.choice = precision, choice
        self._channels_last = channels_last
        self._device_type = next(network.parameters()).device.type
        self._call: Any = self.network

    def initial_state(self, batch_size: int) -> State:
        """Returns the empty memory of a first frame, as `Network.initial_state`."""
        return map_tensors(Tensor.float, self.network.initial_state(batch_size))

    def forward(self, frame: Frame, state: State) -> tuple[Any, State]:
        """Processes one frame, as `Network.forward`. Memory and raw outputs are float32 in every precision."""
        if self._channels_last:
            frame = frame._replace(images=_channels_last(frame.images))
        with self._autocast():
            prediction, state = self._call(frame, state)
        return map_tensors(_float, prediction), map_tensors(_float, state)

    def decode(self, prediction: Any) -> FrameObjects:
        """Decodes boxes and lines, as `Network.decode`."""
        return self.network.decode(prediction)

    def raw_outputs(self, prediction: Any) -> tuple[Tensor, ...]:
        """Returns the last layer before decoding, as `Network.raw_outputs`."""
        return self.network.raw_outputs(prediction)

    def _autocast(self) -> AbstractContextManager:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self._device_type, _DTYPES[self.precision], cache_enabled=False)


def accelerated(
    network: Network,
    *,
    precision: str = "auto",
    channels_last: bool = True,
    fold: bool = True,
    compile: bool = False,
    cuda_graph: bool = False,
) -> AcceleratedNetwork:
    """Prepares a copy of a network for inference on the device of its weights.

    Args:
        network: in evaluation mode.
        precision: of the layers; geometry, softmax and sampling locations are float32 in all of them. "auto" takes
            bfloat16 where the processor has instructions for it (see `choose_precision`).
        channels_last: convolutions run in channels_last memory layout.
        fold: batch norms are folded into the convolutions before them.
        compile: by `torch.compile`.
        cuda_graph: a frame is captured as one CUDA graph and replayed.

    Raises:
        ConfigError: the precision is unknown or cannot run here, or an option needs a GPU.
    """
    device = next(network.parameters()).device
    chosen, reason = choose_precision(precision, device)
    prepared = network
    if fold or channels_last:
        prepared = copy.deepcopy(network)
    if fold:
        fold_batch_norms(prepared)
    if channels_last:
        prepared = prepared.to(memory_format=torch.channels_last)
    return AcceleratedNetwork(prepared, chosen, reason, channels_last)


def choose_precision(precision: str, device: torch.device) -> tuple[str, str]:
    """Returns the precision to run in, and a sentence that says why.

    Raises:
        ConfigError: it is unknown, or this device has no instructions for it.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; use one of {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision, "as given"
    if device.type == "cpu":
        if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
            return "bfloat16", "this CPU has bfloat16 instructions"
        return "float32", "this CPU has no bfloat16 instructions"
    return "bfloat16", "this GPU has bfloat16 units"


def _channels_last(images: Tensor) -> Tensor:
    return images.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, images.shape[:2])


def _float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


# ----------------------------------------------------------------------------------------------------- batch norms


def fold_batch_norms(network: Network) -> int:
    """Folds every batch norm that directly follows a convolution into it, in place, and returns their number.

    Which ones do is observed in one pass of an example frame, so it holds for any network: the convolution's output
    goes nowhere else, and the batch norm gets no other input.
    """
    pairs = _observed_pairs(network)
    for conv, norm in pairs:
        scale = norm.weight.data * (norm.running_var + norm.eps).rsqrt()
        bias = torch.zeros_like(norm.running_mean) if conv.bias is None else conv.bias.data
        conv.weight = nn.Parameter(conv.weight.data * scale.view(-1, 1, 1, 1), requires_grad=False)
        conv.bias = nn.Parameter((bias - norm.running_mean) * scale + norm.bias.data, requires_grad=False)
    folded = {id(norm) for _, norm in pairs}
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in folded:
                setattr(parent, name, nn.Identity())
    return len(pairs)


class _Uses(TorchDispatchMode):
    """Records the outputs of convolutions and where they go, and the inputs of batch norms, by operator."""

    def __init__(self, convs: dict[int, Any], norms: dict[int, Any]) -> None:
        super().__init__()
        self._convs, self._norms = convs, norms
        self.made: list[tuple[Any, Tensor]] = []  # the tensors are kept, so that no other gets the same id
        self.users: dict[int, list[Any]] = {}  # by id of the output of a convolution: a batch norm, or None for others
        self.inputs: dict[int, list[int]] = {}  # by id of a batch norm: ids of its inputs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs.values())))
        norm = next((self._norms[id(tensor)] for tensor in given if id(tensor) in self._norms), None)
        for tensor in given:
            if id(tensor) in self.users:
                self.users[id(tensor)].append(norm)
        if norm is not None:
            self.inputs.setdefault(id(norm), []).append(id(args[0]))
        result = func(*args, **kwargs)
        if func is torch.ops.aten.convolution.default and id(args[1]) in self._convs:
            self.made.append((self._convs[id(args[1])], result))
            self.users[id(result)] = []
        return result


def _tensors(values: Any) -> Iterable[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif not isinstance(values, str) and isinstance(values, Iterable):
        for value in values:
            yield from _tensors(value)


@torch.no_grad()
def _observed_pairs(network: Network) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Returns the convolutions whose output goes into one batch norm and nowhere else, each with this batch norm."""
    convs = {id(module.weight): module for module in network.modules() if isinstance(module, nn.Conv2d)}
    norms = {id(module.running_mean): module for module in network.modules() if isinstance(module, nn.BatchNorm2d)}
    with _Uses(convs, norms) as uses:
        network(example_frame(network), network.initial_state(1))
    found: dict[int, tuple[Any, set[int]]] = {}
    for conv, output in uses.made:
        users = uses.users[id(output)]
        only = id(users[0]) if len(users) == 1 and users[0] is not None else 0
        found.setdefault(id(conv), (conv, set()))[1].add(only)
    by_id = {id(norm): norm for norm in norms.values()}
    outputs: dict[int, set[int]] = {}
    for conv, output in uses.made:
        outputs.setdefault(id(conv), set()).add(id(output))
    pairs = []
    for conv, targets in found.values():
        (target, *others) = targets
        if not others and target in by_id and set(uses.inputs[target]) == outputs[id(conv)]:
            pairs.append((conv, by_id[target]))
    return pairs


def example_frame(network: Network, cameras: int | None = None) -> Frame:
    """Makes a frame [1, ...] of cameras in all directions, on the device of a network.

    Args:
        network: decides the size of the images and the device.
        cameras: number of cameras; that of the network's config by default, or one.
    """
    N = cameras or network.config.cameras or 1
    H, W = network.config.image_size
    device = next(network.parameters()).device
    angle = torch.arange(N) * (2 * torch.pi / N)
    ego_from_cam = torch.zeros(N, 4, 4)
    ego_from_cam[:, 0, 0], ego_from_cam[:, 1, 0] = angle.sin(), -angle.cos()  # right
    ego_from_cam[:, 2, 1] = -1.0  # down
    ego_from_cam[:, 0, 2], ego_from_cam[:, 1, 2] = angle.cos(), angle.sin()  # forward
    ego_from_cam[:, 2, 3], ego_from_cam[:, 3, 3] = 1.6, 1.0
    img_from_cam = torch.tensor([[0.7 * W, 0.0, W / 2], [0.0, 0.7 * W, H / 2], [0.0, 0.0, 1.0]]).expand(N, 3, 3)
    frame = Frame(
        torch.randint(0, 256, (1, N, 3, H, W), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
        CameraRig(img_from_cam[None], ego_from_cam[None], torch.ones(1, N, dtype=torch.bool)),
        torch.eye(4)[None],
        torch.full((1,), 0.5),
        torch.zeros(1, dtype=torch.bool),
    )
    return map_tensors(lambda tensor: tensor.to(device), frame)
