"""The protocol that every network keeps; training, evaluation, live use and export know nothing else of a network.

A new network is a folder with a config and a class of this form, and one line in `perception.models.NETWORKS`; see
docs/add-a-network.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor, nn

from perception.types import Frame, FrameObjects, LaneRange, Memory, map_tensors, named_tensors

Self = TypeVar("Self", bound="Network")


class NetworkConfig(Protocol):
    """A frozen dataclass that decides the shape of a network: a network of the same config has the same weights."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the network takes."""
        ...

    @property
    def cameras(self) -> int | None:
        """How many cameras the network is made for, None for any number."""
        ...

    @property
    def line_points(self) -> int:
        """Points per line, of the ground truth too."""
        ...

    @property
    def lane_range(self) -> LaneRange:
        """The rectangle of the lines, also of the ground truth that the network is trained with."""
        ...

    @classmethod
    def presets(cls) -> dict[str, Callable[[], NetworkConfig]]:
        """Configs that have a name, such as `model = dict(preset="nano")` in a config file."""
        ...


class InferenceNetwork(Protocol):
    """What streaming and evaluation need of a network, also of one that `inference.acceleration` has prepared."""

    config: Any  # a NetworkConfig

    @property
    def finds(self) -> tuple[str, ...]:
        """What it predicts, of "box" and "line". What it does not predict is empty in what `decode` returns."""
        ...

    def __call__(self, frame: Frame, state: Any, *others: Any) -> tuple[Any, Any]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...

    def initial_state(self, batch_size: int) -> Memory:
        """The memory of a network that has seen nothing, on the device of the weights; empty without a memory."""
        ...

    def decode(self, prediction: Any) -> FrameObjects:
        """Boxes and lines in the ego frame with leading [B], best score first."""
        ...

    def raw_outputs(self, prediction: Any) -> tuple[Tensor, ...]:
        """The last layer before decoding, for comparisons: tensors [B, Q, ...] in the order of `raw_names`."""
        ...


class Network(InferenceNetwork, Protocol):
    """A network: calibrated images and a memory in, raw outputs and the next memory out.

    Also an `nn.Module` with an `image_encoder`, whose `backbone` has `freeze(stages)` and `load_published(weights,
    path)`; see `perception.models.backbone`. The memory is an argument and a result, never an attribute.

    A network may have a method `rig_geometry(rig, image_size)` that returns a NamedTuple of tensors, and take it as the
    third argument of `forward`; see `perception.inference.fixed_rig`. A network whose graph cannot take the calibration
    as an input has `for_rig(rig, ego_from_lidar)`, which returns the network for one calibration; that one is exported.
    """

    image_encoder: Any  # an nn.Module with a `backbone`
    finds: ClassVar[tuple[str, ...]]
    # The weights of the terms of `loss` by name. A training may leave terms out (`train.disabled_losses`).
    loss_weights: ClassVar[Mapping[str, float]]
    # The losses of the images alone, for epochs before the rest is trained; None for a network without such losses.
    image_loss: Callable[[Frame, FrameObjects], dict[str, Tensor]] | None
    # Whether `forward` takes the ground truth as a third argument in training, for denoising.
    needs_gt: ClassVar[bool]
    # Whether `decode` gives boxes ids that stay the same from frame to frame.
    tracks: ClassVar[bool]
    # Names of the tensors that `raw_outputs` returns, the first part of each "box" or "line".
    raw_names: ClassVar[tuple[str, ...]]
    # What it reads of `Frame` beyond images, rig and motion, which its export has as inputs: ("ego_from_lidar",) or ().
    extra_inputs: ClassVar[tuple[str, ...]]
    # Why the network cannot be exported, empty if it can.
    no_export: ClassVar[str]
    # Names of modules beyond the backbone that training may run again in the backward pass to save memory
    # (`train.gradient_checkpointing`); a list stands for its entries. They are called with tensors and none contains
    # another one.
    recomputable: ClassVar[tuple[str, ...]]
    # Prefixes of the keys in published checkpoints and the library's own; empty if nobody has published weights.
    published_prefixes: ClassVar[Mapping[str, str]]

    # Methods of nn.Module that training, live use and export call.
    def to(self: Self, *args: Any, **kwargs: Any) -> Self: ...
    def eval(self: Self) -> Self: ...
    def train(self: Self, mode: bool = True) -> Self: ...
    def requires_grad_(self: Self, requires_grad: bool = True) -> Self: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...
    def named_children(self) -> Iterator[tuple[str, nn.Module]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...

    def forward(self, frame: Frame, state: Any) -> tuple[Any, Any]:
        """One frame.

        Args:
            frame: leading [B], images of the configured size.
            state: what the previous call returned, or `initial_state`.

        Returns:
            Raw outputs as a NamedTuple of tensors, for `decode` and `loss`, and the memory for the next call.
        """
        ...

    def loss(self, prediction: Any, gt: FrameObjects, frame: Frame) -> dict[str, Tensor]:
        """Weighted losses by name, scalars; their sum is what training minimises.

        Args:
            prediction: of `forward`, in float32.
            gt: ground truth, leading [B], in the ego frame.
            frame: leading [B], what the network saw.
        """
        ...


def memory_tensors(memory: Memory) -> dict[str, Tensor]:
    """Lists the tensors of a memory by the names of their inputs in an export; empty ones are left out.

    The name is `memory` if there is one tensor, and else `memory_` and the names of its fields.
    """
    tensors = {name: tensor for name, tensor in named_tensors(memory).items() if tensor.numel()}
    return {"memory" if len(tensors) == 1 else f"memory_{name}": tensor for name, tensor in tensors.items()}


def with_tensors(memory: Memory, tensors: Sequence[Tensor]) -> Memory:
    """Replaces the tensors of a memory that `memory_tensors` lists by others, in the same order."""
    given = iter(tensors)
    return map_tensors(lambda tensor: next(given) if tensor.numel() else tensor, memory)


def remembers(network: InferenceNetwork) -> bool:
    """Whether a network has a memory."""
    return bool(memory_tensors(network.initial_state(1)))


def dataclass_for(values: Mapping[str, Any], kinds: Sequence[type]) -> type:
    """Which of several dataclasses has most of the given keys as fields; the first of equally good ones."""
    return max(kinds, key=lambda kind: len(values.keys() & {field.name for field in fields(kind)}))
