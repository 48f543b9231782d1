"""Measures the latency of one frame in several runtimes, which take turns in one process so that ratios are fair."""

from __future__ import annotations

import importlib
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from perception.errors import ConfigError
from perception.export.contract import ImageInputs, read_contract
from perception.export.engine_session import find_engine
from perception.export.onnx import DeployedNetwork, example_inputs
from perception.export.openvino_session import BFLOAT16, FLOAT32, openvino_core
from perception.export.quantize import relative_change
from perception.export.replay import match_rows
from perception.export.runtime import Runtime
from perception.models import Network

BACKENDS = ("pytorch", "compile", "ort", FLOAT32, BFLOAT16, "tensorrt")
WARM_UP = 3  # consecutive frames before the timed passes; the outputs are compared after the last of them
SECONDS_BETWEEN = 0.5  # time between these frames


@dataclass(frozen=True)
class Latency:
    """The measurements of one runtime.

    Args:
        passes: latency of each pass in seconds, from images on the CPU to boxes and lines on the CPU.
        filling: median seconds per pass for copying the images to the buffers of the runtime.
        megabytes: growth of the process memory by creating the runtime and the warm-up.
        device: on which it ran.
        largest: largest difference of raw outputs and memory from the first runtime, in the units of certificates.
        changed: mean difference of raw outputs and memory from the first runtime, in standard deviations
            (`perception.export.quantize.relative_change`).
    """

    passes: tuple[float, ...]
    filling: float
    megabytes: float
    device: str
    largest: float
    changed: float

    def percentile(self, share: float) -> float:
        """Returns a percentile of the latency in seconds, `share` in 0..100."""
        return float(np.percentile(self.passes, share))

    @property
    def jitter(self) -> float:
        """Standard deviation of the latency in seconds."""
        return float(np.std(self.passes))


class Interrupted(KeyboardInterrupt):
    """Raised by `measure` after Ctrl-C, with the measurements until then.

    Args:
        measured: as `measure` returns it.
    """

    def __init__(self, measured: dict[str, Latency]) -> None:
        super().__init__()
        self.measured = measured


class _Prepared(NamedTuple):
    run: Callable[[bool], float]  # runs a first frame (True) or a later one; returns the seconds for copying the images
    outputs: Callable[[], dict[str, np.ndarray]]  # returns raw outputs and memory of the last run
    device: str


def check_request(
    network: Network,
    folder: str | Path | None,
    backends: Sequence[str],
    *,
    passes: int,
    threads: int,
    max_seconds: float,
) -> None:
    """Checks the arguments of `measure`. Call it before long work.

    Args:
        network, backends, passes, threads, max_seconds: as for `measure`.
        folder: of an export; None for an fp32 export that does not exist yet.

    Raises:
        CheckpointError: the folder does not hold an export.
        ConfigError: a number is out of range, a backend is unknown, named twice or cannot run here, or the export is of
            another network.
    """
    for name, value, least in (("passes", passes, 1), ("threads", threads, 0)):
        if value < least:
            raise ConfigError(f"{name} is {value}; give at least {least}")
    if not max_seconds > 0:
        raise ConfigError(f"max_seconds is {max_seconds}; give a number above 0")
    if unknown := [name for name in backends if name not in BACKENDS]:
        raise ConfigError(f"backend {unknown[0]!r} is not known; use some of {', '.join(BACKENDS)}")
    if not backends or len(set(backends)) < len(backends):
        raise ConfigError(f"backends are {', '.join(backends) or 'missing'}; name at least one, and each once")
    precision = "fp32"
    contract: dict = {}
    if folder is not None:
        contract = read_contract(folder)
        precision = contract["precision"]
        exported, expected = (
            f"{name} for images of {height} x {width}"
            for name, (height, width) in (
                (contract["network"], contract["image_size"]),
                (type(network).__name__, network.config.image_size),
            )
        )
        if exported != expected:
            raise ConfigError(f"{folder} is an export of a {exported}, the checkpoint is a {expected}; export it again")
    for name in backends:
        if name == "compile":
            _check_compiler()
        elif name == "ort":
            try:
                importlib.import_module("onnxruntime")
            except ImportError as error:
                raise ConfigError(f"backend ort needs onnxruntime ({error}); pip install onnxruntime") from None
        elif name in (FLOAT32, BFLOAT16):
            openvino_core(name, precision)
        elif name == "tensorrt":
            if folder is None:
                raise ConfigError("backend tensorrt runs an engine; give the folder of an export that holds one")
            find_engine(folder, contract)


def measure(
    network: Network,
    folder: str | Path,
    backends: Sequence[str],
    *,
    passes: int = 30,
    threads: int = 0,
    seed: int = 0,
    max_seconds: float = 300.0,
    progress: bool = False,
) -> dict[str, Latency]:
    """Measures the latency of one frame with a filled memory, in several runtimes that take turns.

    Args:
        network: in evaluation mode; PyTorch runs it on the GPU if there is one.
        folder: of its export, for all backends except "pytorch" and "compile".
        backends: some of `BACKENDS`; the others are compared with the first.
        passes: number of timed passes per backend.
        threads: number of CPU threads, 0 for the default.
        seed: of the random images.
        max_seconds: no further turn starts after this time, preparation included. At least one turn is made.
        progress: show progress on stderr.

    Raises:
        CheckpointError, ConfigError: as in `check_request`; or the network cannot be compiled here.
        Interrupted: Ctrl-C after at least one complete turn.
    """
    start = time.perf_counter()
    check_request(network, folder, backends, passes=passes, threads=threads, max_seconds=max_seconds)
    torch_threads = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    contract = read_contract(folder)
    images = ImageInputs.of_contract(contract)
    inputs = example_inputs(network, images)
    prepared: dict[str, _Prepared] = {}
    megabytes, outputs = {}, {}
    turns: list[dict[str, tuple[float, float]]] = []  # by runtime, seconds of the pass and of copying the images
    try:
        with tqdm(backends, unit="runtime", disable=not progress) as bar:
            for name in bar:
                bar.set_description(f"preparing {name} (compiling may take minutes)")
                before = resident_bytes()
                if name in ("pytorch", "compile"):
                    prepared[name] = _torch(network, inputs, images, compiled=name == "compile")
                else:
                    prepared[name] = _exported(folder, inputs, name, threads)
                for k in range(WARM_UP):
                    prepared[name].run(k == 0)
                megabytes[name] = (resident_bytes() - before) / 2**20
                outputs[name] = prepared[name].outputs()
        with tqdm(total=passes, desc="passes of all runtimes", unit="turn", disable=not progress) as bar:
            while len(turns) < passes and (not turns or time.perf_counter() - start < max_seconds):
                turns.append({name: _timed(runtime.run) for name, runtime in prepared.items()})
                bar.update()
    except KeyboardInterrupt:
        if not turns:
            raise
        raise Interrupted(_summary(turns, prepared, megabytes, outputs)) from None
    finally:
        torch.set_num_threads(torch_threads)
    return _summary(turns, prepared, megabytes, outputs)


def _timed(run: Callable[[bool], float]) -> tuple[float, float]:
    start = time.perf_counter()
    filling = run(False)
    return time.perf_counter() - start, filling


def _summary(
    turns: Sequence[Mapping[str, tuple[float, float]]],
    prepared: Mapping[str, _Prepared],
    megabytes: Mapping[str, float],
    outputs: Mapping[str, dict[str, np.ndarray]],
) -> dict[str, Latency]:
    first = next(iter(outputs.values()))
    return {
        name: Latency(
            passes=tuple(turn[name][0] for turn in turns),
            filling=float(np.median([turn[name][1] for turn in turns])),
            megabytes=megabytes[name],
            device=runtime.device,
            largest=largest_difference(first, outputs[name]),
            changed=relative_change(*({key: x[None] for key, x in found.items()} for found in (first, outputs[name]))),
        )
        for name, runtime in prepared.items()
    }


def largest_difference(reference: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> float:
    """Returns the largest difference of raw outputs and memory, relative for values above 1, absolute for others.

    Args:
        reference, found: raw outputs [Q, ...] and "new_memory" by name; the order of rows may differ.
    """
    pairs = [(reference[name], found[name]) for name in ("new_memory",) if name in reference]
    for kind in ("box", "line"):
        names = [name for name in reference if name.startswith(f"raw_{kind}")]
        if names:
            one, other = (
                np.concatenate([x[name].reshape(len(x[name]), -1) for name in names], 1) for x in (reference, found)
            )  # [Q, ...]
            pairs.append((one, other[match_rows(one, other)]))
    return max(float((np.abs(one - other) / np.maximum(1, np.abs(one))).max()) for one, other in pairs)


def _check_compiler() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except Exception as error:  # compilers raise many types
        raise ConfigError(f"backend compile finds no working compiler: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _frames(inputs: tuple[Any, ...]) -> dict[bool, list[Tensor]]:
    """Returns images of each camera, calibration and motion of a first frame (True) and of a later frame (False)."""
    images, *calibration_and_pose = inputs[:5]
    frames = {}
    for first, seconds in ((True, 0.0), (False, SECONDS_BETWEEN)):
        frames[first] = [*images, *calibration_and_pose, torch.tensor([seconds]), torch.tensor([first])]
    return frames


def _torch(network: Network, inputs: tuple, images: ImageInputs, *, compiled: bool) -> _Prepared:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = DeployedNetwork(network, images).eval().to(device)
    call = torch.compile(model) if compiled else model
    frames, memory = _frames(inputs), [tensor.to(device) for tensor in inputs[7:]]
    N = len(images.sizes)
    last: list[Tensor] = []

    @torch.inference_mode()
    def run(first: bool) -> float:
        start = time.perf_counter()
        frame = [tensor.to(device) for tensor in frames[first]]
        filling = time.perf_counter() - start
        try:
            results = call(frame[:N], *frame[N:], *memory)
        except Exception as error:  # compilers raise many types
            if not compiled:
                raise
            raise ConfigError(f"the network cannot be compiled here: {_first_line(error)}") from None
        if memory:
            memory[:] = results[-len(memory) :]
        last[:] = [result.cpu() for result in results[: len(results) - len(memory)]]
        return filling

    def outputs() -> dict[str, np.ndarray]:
        names = model.output_names
        found = dict(zip(names, [*last, *(tensor.cpu() for tensor in memory)], strict=True))
        return {name: found[name].numpy() for name in names if name.startswith(("raw_", "new_memory"))}

    cpu = f"{torch.get_num_threads()} CPU threads"
    return _Prepared(run, outputs, torch.cuda.get_device_name(device) if device.type == "cuda" else cpu)


def _exported(folder: str | Path, inputs: tuple, name: str, threads: int) -> _Prepared:
    if name == "ort":
        import onnxruntime

        available = onnxruntime.get_available_providers()
        provider = "CUDAExecutionProvider" if "CUDAExecutionProvider" in available else "CPUExecutionProvider"
        runtime = Runtime(folder, providers=[provider], threads=threads)
    else:
        runtime = Runtime(folder, backend=name, threads=threads)
    frames = {first: [tensor.numpy() for tensor in frame] for first, frame in _frames(inputs).items()}

    def run(first: bool) -> float:
        start = time.perf_counter()
        for buffer, array in zip(list(runtime.inputs.values())[: len(frames[first])], frames[first], strict=True):
            buffer[...] = array
        filling = time.perf_counter() - start
        runtime.run()
        return filling

    def outputs() -> dict[str, np.ndarray]:
        found = {name: array.copy() for name, array in runtime.outputs.items() if name.startswith("raw_")}
        return found | ({"new_memory": runtime.memory()} if "new_memory" in runtime.outputs else {})

    return _Prepared(run, outputs, runtime.device)


def resident_bytes() -> int:
    """Returns the resident memory of the process in bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def table(measured: dict[str, Latency]) -> str:
    """Returns the measurements in Markdown; ratios are medians over pairs of passes."""
    first = next(iter(measured.values()))
    lines = [
        "| runtime | device | p50 ms | p90 | p99 | jitter | images ms | MiB | times as fast | largest difference "
        "| outputs changed by % |",
        "|---" * 11 + "|",
    ]
    for name, latency in measured.items():
        ratio = float(np.median(np.array(first.passes) / np.array(latency.passes)))
        cells = [latency.percentile(share) for share in (50, 90, 99)] + [latency.jitter, latency.filling]
        numbers = " | ".join(f"{1e3 * value:.1f}" for value in cells)
        accuracy = f"{latency.largest:.1e} | {100 * latency.changed:.2g}"
        lines.append(f"| {name} | {latency.device} | {numbers} | {latency.megabytes:.0f} | {ratio:.2f} | {accuracy} |")
    return "\n".join(lines)


def as_dict(measured: dict[str, Latency]) -> dict:
    """Returns the measurements as plain JSON values."""
    return {
        name: asdict(latency)
        | {f"p{share}": latency.percentile(share) for share in (50, 90, 99)}
        | {"jitter": latency.jitter}
        for name, latency in measured.items()
    }
