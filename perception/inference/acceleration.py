"""Prepares a network for fast inference: precision, memory layout, folded batch norms, compiler, CUDA graph.

    fast = accelerated(network)
    with torch.inference_mode():
        prediction, state = fast(frame, state)
        objects = fast.decode(prediction)

The given network is not changed. `accelerated(network, **PLAIN)` is the baseline that every option is compared with:
eager float32 in PyTorch's default layout, with the network's own weights.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perception.errors import ConfigError
from perception.export.progress import stage
from perception.files import user_cache
from perception.inference.folding import fold_batch_norms, keep_float32, observe
from perception.models import Network
from perception.types import Frame, FrameObjects, map_tensors, named_tensors

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
PLAIN: dict[str, Any] = {"precision": "float32", "channels_last": False, "fold": False}
WARM_UP = 3  # passes before a CUDA graph is captured
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class AcceleratedNetwork(nn.Module):
    """A network in evaluation mode that `accelerated` has prepared; it is called as the network itself is.

    Attributes:
        config, finds, raw_names, extra_inputs, tracks: those of the network.
        precision: "float32", "bfloat16" or "float16".
        choice: what was chosen, and why, in one line.
    """

    def __init__(
        self, network: Network, precision: str, choice: str, *, channels_last: bool, compile: bool, cuda_graph: bool
    ) -> None:
        super().__init__()
        self.network = network
        self.config, self.finds, self.raw_names = network.config, network.finds, network.raw_names
        self.extra_inputs, self.tracks = network.extra_inputs, network.tracks
        self.precision, self.choice = precision, choice
        self._channels_last, self._cuda_graph = channels_last, cuda_graph
        self._device_type = next(network.parameters()).device.type
        self._compiled: Callable[..., Any] | None = _compiled(self.network) if compile else None
        self._ready: set[tuple[Any, ...]] = set()  # shapes of frames that were compiled
        self._graphs: dict[tuple[Any, ...], _FrameGraph] = {}  # by shapes of the frame
        self.training = False
        if hasattr(network, "rig_geometry"):  # see `perception.models.base.Network`
            self.rig_geometry = network.rig_geometry

    def extra_repr(self) -> str:
        """Returns what was chosen, for `repr`."""
        return self.choice

    def initial_state(self, batch_size: int) -> Any:
        """Returns the empty memory of a first frame, as `Network.initial_state`."""
        return self.network.initial_state(batch_size)

    def forward(self, frame: Frame, state: Any, *geometry: Any) -> tuple[Any, Any]:
        """Processes one frame, as `Network.forward`. Raw outputs and memory are float32 in every precision.

        The first frame of a number of cameras is compiled, if that was asked for, with a line on stderr. With
        `cuda_graph` the prediction is valid until the next call.

        Raises:
            ConfigError: the network cannot be compiled here.
        """
        if not self._cuda_graph:
            return self._run(frame, state, *geometry)
        inputs = (frame, state, *geometry)
        key = _shapes(inputs)
        if key not in self._graphs:
            self._graphs[key] = _FrameGraph(self._run, self.network.decode, inputs)
        return self._graphs[key](inputs)

    def decode(self, prediction: Any) -> FrameObjects:
        """Decodes boxes and lines, as `Network.decode`."""
        for graph in self._graphs.values():
            if prediction is graph.prediction:
                objects: FrameObjects = map_tensors(torch.clone, graph.objects)
                return objects
        return self.network.decode(prediction)

    def raw_outputs(self, prediction: Any) -> tuple[Tensor, ...]:
        """Returns the last layer before decoding, as `Network.raw_outputs`."""
        return self.network.raw_outputs(prediction)

    def _run(self, frame: Frame, state: Any, *geometry: Any) -> tuple[Any, Any]:
        if self._channels_last:
            frame = frame._replace(images=_channels_last(frame.images))
        with self._autocast():
            call = self._compiled_call if self._compiled is not None else self.network
            prediction, state = call(frame, state, *geometry)
        return map_tensors(_float, prediction), map_tensors(_float, state)

    def _compiled_call(self, *inputs: Any) -> Any:
        assert self._compiled is not None
        key = _shapes(inputs)
        if key in self._ready:
            return self._compiled(*inputs)
        _, N, _, H, W = inputs[0].images.shape
        name = f"compiling {type(self.network).__name__} for {N} images of {H} x {W}"
        try:
            with _compiler_cache() as folder, stage(f"{name} (minutes, unless {folder} holds it)", progress=True):
                result = self._compiled(*inputs)
        except Exception as error:  # compilers raise many types
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ConfigError(f"the network cannot be compiled here ({reason}); leave compile out") from None
        self._ready.add(key)
        return result

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self._device_type, _DTYPES[self.precision])


def accelerated(
    network: Network,
    *,
    precision: str = "auto",
    channels_last: bool = True,
    fold: bool = True,
    compile: bool = False,
    cuda_graph: bool = False,
) -> AcceleratedNetwork:
    """Prepares a network for inference on the device of its weights.

    Args:
        network: in evaluation mode; it is copied if weights change.
        precision: "float32"; "bfloat16" for large convolutions, the rest in float32; "float16" for all layers; "auto"
            for the fastest of them on this device that keeps the accuracy, see `choose_precision`. Geometry, sampling
            locations and softmax are float32 in each of them.
        channels_last: weights and images in channels_last memory format.
        fold: batch norms are folded into the convolutions before them.
        compile: by `torch.compile`, once for each number of cameras. The result is stored in the user's cache folder.
        cuda_graph: replay each frame as one CUDA graph, which takes the launches of kernels off the CPU.

    Raises:
        ConfigError: the precision is unknown or this device does not have it, there is no C++ compiler, or a CUDA graph
            is asked for without a GPU.
    """
    device = next(network.parameters()).device
    chosen, reason = choose_precision(precision, device)
    if cuda_graph and device.type != "cuda":
        raise ConfigError(f"cuda_graph needs a GPU, and the network is on {device.type!r}; leave cuda_graph out")
    if compile:
        check_compiler()
    choice = [f"{chosen} ({reason})"]
    prepared = network
    if channels_last or fold or chosen == "bfloat16":
        prepared = copy.deepcopy(network).eval().requires_grad_(False)
    if fold or chosen == "bfloat16":
        observer = observe(prepared)
        if chosen == "bfloat16":
            keep_float32(prepared, observer)
        if fold:
            choice.append(f"{fold_batch_norms(prepared, observer)} batch norms folded")
    if channels_last:
        prepared = prepared.to(memory_format=torch.channels_last)
        choice.append("channels_last")
    choice += ["compiled"] * compile + ["CUDA graph"] * cuda_graph
    return AcceleratedNetwork(
        prepared, chosen, ", ".join(choice), channels_last=channels_last, compile=compile, cuda_graph=cuda_graph
    )


def choose_precision(precision: str, device: torch.device) -> tuple[str, str]:
    """Returns the precision to run in, and the reason in a few words.

    Args:
        precision: one of `PRECISIONS`.
        device: of the network.

    Raises:
        ConfigError: the precision is unknown, or this device has no instructions for it.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; use one of {', '.join(PRECISIONS)}")
    if device.type == "cuda":
        half, name = "float16", torch.cuda.get_device_name(device)
        available = {"float32", "float16"} if torch.cuda.get_device_capability(device) >= (7, 0) else {"float32"}
        available |= {"bfloat16"} if torch.cuda.get_device_capability(device) >= (8, 0) else set()
    else:
        half, name = "bfloat16", "this CPU"
        available = {"float32", "bfloat16"} if cpu_has_bfloat16() else {"float32"}
    if precision == "auto":
        return (half, f"{name} has it") if half in available else ("float32", f"{name} has no {half}")
    if precision not in available:
        raise ConfigError(
            f"precision {precision} is slow on {name}, which has no instructions for it; use auto or float32"
        )
    return precision, "as asked for"


def cpu_has_bfloat16() -> bool:
    """Returns whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX); emulation is slower than float32.

    PyTorch's own checks are private, so the flags that Linux lists are read.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("flags", 1)[1].splitlines()[0].split()
    except (OSError, IndexError):  # not Linux, or not x86
        return False
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


def _channels_last(images: Tensor) -> Tensor:
    flat = images.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return flat.view(*images.shape[:2], *flat.shape[1:])


def _float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _shapes(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple((tensor.shape, tensor.dtype) for tensor in _flat(inputs))


# -------------------------------------------------------------------------------------------------------- compiler


def check_compiler() -> None:
    """Checks that `torch.compile` finds a C++ compiler.

    Raises:
        ConfigError: there is none.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes a second to load

    try:
        get_cpp_compiler()
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"compile needs a C++ compiler, and there is none ({reason}); install one (apt install g++), name one in "
            "CXX, or leave compile out"
        ) from None


def _compiled(network: Any) -> Callable[..., Any]:
    def call(*inputs: Any) -> Any:  # a function, because compiled modules become submodules
        return network(*inputs)

    # One graph without breaks. Weights are constants: they are packed for the processor once, not in every pass.
    return torch.compile(call, fullgraph=True, dynamic=False, options={"freezing": True})


@contextmanager
def _compiler_cache() -> Iterator[Path]:
    """Lets the compiler store its results in the user's cache folder, for later processes.

    Its own default is a temporary folder. A folder that the user has named in `TORCHINDUCTOR_CACHE_DIR` is kept.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    own = before is not None and before != default_cache_dir()  # PyTorch writes its default into the environment
    folder = Path(before) if before is not None and own else user_cache() / "compiled"
    os.environ[name] = str(folder)
    try:
        yield folder
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


# ------------------------------------------------------------------------------------------------------- CUDA graph


def capture_graph(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Captures a pass as a CUDA graph, after warm-up passes on another stream, which capturing requires."""
    other = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(other)
    graph = torch.cuda.CUDAGraph()
    # Relaxed: kernels that run for the first time may be loaded during the capture.
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        run()
    return graph


class _FrameGraph:
    """One frame, forward and decoding, as a CUDA graph on buffers that every replay reads and writes.

    Args:
        run: as `AcceleratedNetwork.forward`.
        decode: as `Network.decode`.
        inputs: of the first call; copied.
    """

    def __init__(self, run: Callable[..., Any], decode: Callable[..., Any], inputs: tuple[Any, ...]) -> None:
        self._inputs = tuple(map_tensors(torch.clone, part) for part in inputs)
        self.prediction: Any = None
        self.objects: Any = None
        self._after: Any = None

        def one_pass() -> None:
            self.prediction, self._after = run(*self._inputs)
            self.objects = decode(self.prediction)

        self._graph = capture_graph(one_pass)

    def __call__(self, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
        """Processes one frame; the prediction is valid until the next call."""
        for buffer, tensor in zip(_flat(self._inputs), _flat(inputs), strict=True):
            buffer.copy_(tensor)
        self._graph.replay()
        return self.prediction, map_tensors(torch.clone, self._after)


def _flat(inputs: tuple[Any, ...]) -> Iterator[Tensor]:
    """Yields all tensors of several NamedTuples."""
    for part in inputs:
        yield from named_tensors(part).values()
