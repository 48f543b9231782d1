"""How long one frame takes in each runtime: all of them in one process, taking turns, so that ratios are fair."""

from __future__ import annotations

import importlib
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from perception.errors import ConfigError
from perception.export.contract import ImageInputs, read_contract
from perception.export.engine_session import find_engine
from perception.export.onnx import DeployedNetwork, example_inputs
from perception.export.openvino_session import BFLOAT16, FLOAT32, openvino_core
from perception.export.quantize import changed
from perception.export.replay import aligned
from perception.export.runtime import Runtime
from perception.models import Network

BACKENDS = ("pytorch", "compile", "ort", FLOAT32, BFLOAT16, "tensorrt")
WARM_UP = 3  # passes that are not timed, of frames that follow one another; answers are compared after the last
SECONDS_BETWEEN = 0.5  # of these frames


@dataclass(frozen=True)
class Latency:
    """Of one runtime.

    Args:
        passes: seconds of each pass, from images on the CPU to boxes and lines on the CPU.
        filling: median seconds of each pass for bringing the images to where the runtime reads them.
        megabytes: by which the process grew when the runtime was made and first run.
        device: what it ran on.
        largest: largest difference of raw outputs and memory from the first runtime's, counted as in certificates.
        changed: mean difference of raw outputs and memory from the first runtime's, as a share of their standard
            deviation; boxes and lines count as much as they are sure (`perception.export.quantize.changed`).
    """

    passes: tuple[float, ...]
    filling: float
    megabytes: float
    device: str
    largest: float
    changed: float

    def percentile(self, share: float) -> float:
        """Seconds that so many per cent of the passes stay below."""
        return float(np.percentile(self.passes, share))

    @property
    def jitter(self) -> float:
        """Standard deviation of the passes in seconds."""
        return float(np.std(self.passes))


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what had been measured by then.

    Args:
        measured: as `measure` returns it.
    """

    def __init__(self, measured: dict[str, Latency]) -> None:
        super().__init__()
        self.measured = measured


class _Prepared(NamedTuple):
    run: Callable[[bool], float]  # a pass, of a first frame or not; returns the seconds that bringing the images took
    answers: Callable[[], dict[str, np.ndarray]]  # raw outputs and memory of the last pass
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
    """Checks everything that `measure` needs; ask before long work.

    Args:
        network, backends, passes, threads, max_seconds: as for `measure`.
        folder: of an export; None where one in fp32 will be made.

    Raises:
        CheckpointError: the folder is none of an export.
        ConfigError: a number is out of range, a backend is not known, is named twice or cannot run here, or the export
            is of another network.
    """
    for name, value, least in (("passes", passes, 1), ("threads", threads, 0)):
        if value < least:
            raise ConfigError(f"{name} is {value}; give at least {least}")
    if not max_seconds > 0:
        raise ConfigError(f"max_seconds is {max_seconds}; give a number above 0")
    if strange := [name for name in backends if name not in BACKENDS]:
        raise ConfigError(f"backend {strange[0]!r} is not known; use some of {', '.join(BACKENDS)}")
    if not backends or len(set(backends)) < len(backends):
        raise ConfigError(f"backends are {', '.join(backends) or 'missing'}; name at least one, and each once")
    precision = "fp32"
    if folder is not None:
        contract = read_contract(folder)
        precision = contract["precision"]
        exported, wanted = (
            f"{name} for images of {height} x {width}"
            for name, (height, width) in (
                (contract["network"], contract["image_size"]),
                (type(network).__name__, network.config.image_size),
            )
        )
        if exported != wanted:
            raise ConfigError(f"{folder} is an export of a {exported}, the checkpoint is a {wanted}; export it again")
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
    """Times one frame, the memory filled, in several runtimes that take turns.

    Args:
        network: in evaluation mode; moved to the GPU for PyTorch where there is one.
        folder: of its export, for all but "pytorch" and "compile".
        backends: of `BACKENDS`; the first is what the others are held to.
        passes: timed for each.
        threads: of the CPU, 0 for as many as there are.
        seed: of the images.
        max_seconds: after which no further turn begins; making the runtimes ready counts. One turn is always made.
        progress: show on stderr what is done.

    Raises:
        CheckpointError, ConfigError: as `check_request`; or the network cannot be compiled here.
        Interrupted: Ctrl-C, when at least one turn was complete.
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
    megabytes, answers = {}, {}
    turns: list[dict[str, tuple[float, float]]] = []  # seconds of each runtime's pass, and of bringing its images
    try:
        with tqdm(backends, unit="runtime", disable=not progress) as bar:
            for name in bar:
                bar.set_description(f"making {name} ready (compiling may take minutes)")
                before = resident_bytes()
                if name in ("pytorch", "compile"):
                    prepared[name] = _torch(network, inputs, images, compiled=name == "compile")
                else:
                    prepared[name] = _exported(folder, inputs, name, threads)
                for k in range(WARM_UP):
                    prepared[name].run(k == 0)
                megabytes[name] = (resident_bytes() - before) / 2**20
                answers[name] = prepared[name].answers()
        with tqdm(total=passes, desc="passes of all runtimes", unit="turn", disable=not progress) as bar:
            while len(turns) < passes and (not turns or time.perf_counter() - start < max_seconds):
                turns.append({name: _timed(runtime.run) for name, runtime in prepared.items()})
                bar.update()
    except KeyboardInterrupt:
        if not turns:
            raise
        raise Interrupted(_summary(turns, prepared, megabytes, answers)) from None
    finally:
        torch.set_num_threads(torch_threads)
    return _summary(turns, prepared, megabytes, answers)


def _timed(run: Callable[[bool], float]) -> tuple[float, float]:
    start = time.perf_counter()
    filling = run(False)
    return time.perf_counter() - start, filling


def _summary(turns, prepared, megabytes, answers) -> dict[str, Latency]:
    first = next(iter(answers.values()))
    return {
        name: Latency(
            passes=tuple(turn[name][0] for turn in turns),
            filling=float(np.median([turn[name][1] for turn in turns])),
            megabytes=megabytes[name],
            device=runtime.device,
            largest=largest_difference(first, answers[name]),
            changed=changed(*({key: x[None] for key, x in found.items()} for found in (first, answers[name]))),
        )
        for name, runtime in prepared.items()
    }


def largest_difference(wanted: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> float:
    """The largest difference of raw outputs and memory; a number above one counts in units of itself.

    Args:
        wanted, found: raw outputs [Q, ...] and "new_memory" by name; rows may come in another order.
    """
    pairs = [(wanted[name], found[name]) for name in ("new_memory",) if name in wanted]
    for kind in ("box", "line"):
        names = [name for name in wanted if name.startswith(f"raw_{kind}")]
        if names:
            one, other = (
                np.concatenate([x[name].reshape(len(x[name]), -1) for name in names], 1) for x in (wanted, found)
            )  # [Q, ...]
            pairs.append((one, other[aligned(one, other)]))
    return max(float((np.abs(one - other) / np.maximum(1, np.abs(one))).max()) for one, other in pairs)


def _check_compiler() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except Exception as error:  # whatever a compiler may raise
        raise ConfigError(f"backend compile finds no compiler that works: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _moments(inputs: tuple) -> dict[bool, list[Tensor]]:
    """Images of each camera, calibration and motion, of a first frame (True) and of a later one (False)."""
    images, *calibration_and_pose = inputs[:5]
    moments = {}
    for first, seconds in ((True, 0.0), (False, SECONDS_BETWEEN)):
        moments[first] = [*images, *calibration_and_pose, torch.tensor([seconds]), torch.tensor([first])]
    return moments


def _torch(network: Network, inputs: tuple, images: ImageInputs, *, compiled: bool) -> _Prepared:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = DeployedNetwork(network, images).eval().to(device)
    call = torch.compile(model) if compiled else model
    moments, memory = _moments(inputs), [tensor.to(device) for tensor in inputs[7:]]
    N = len(images.sizes)
    last: list[Tensor] = []

    @torch.inference_mode()
    def run(first: bool) -> float:
        start = time.perf_counter()
        moment = [tensor.to(device) for tensor in moments[first]]
        filling = time.perf_counter() - start
        try:
            results = call(moment[:N], *moment[N:], *memory)
        except Exception as error:  # whatever a compiler may raise
            if not compiled:
                raise
            raise ConfigError(f"the network cannot be compiled here: {_first_line(error)}") from None
        if memory:
            memory[0] = results[-1]
        last[:] = [result.cpu() for result in (results[:-1] if memory else results)]
        return filling

    def answers() -> dict[str, np.ndarray]:
        names = model.output_names
        found = dict(zip(names, [*last, *(tensor.cpu() for tensor in memory)], strict=True))
        return {name: found[name].numpy() for name in names if name.startswith(("raw_", "new_memory"))}

    cpu = f"{torch.get_num_threads()} CPU threads"
    return _Prepared(run, answers, torch.cuda.get_device_name(device) if device.type == "cuda" else cpu)


def _exported(folder: str | Path, inputs: tuple, name: str, threads: int) -> _Prepared:
    if name == "ort":
        import onnxruntime

        there = onnxruntime.get_available_providers()
        provider = "CUDAExecutionProvider" if "CUDAExecutionProvider" in there else "CPUExecutionProvider"
        runtime = Runtime(folder, providers=[provider], threads=threads)
    else:
        runtime = Runtime(folder, backend=name, threads=threads)
    moments = {first: [tensor.numpy() for tensor in moment] for first, moment in _moments(inputs).items()}

    def run(first: bool) -> float:
        start = time.perf_counter()
        for buffer, array in zip(list(runtime.inputs.values())[: len(moments[first])], moments[first], strict=True):
            buffer[...] = array
        filling = time.perf_counter() - start
        runtime.run()
        return filling

    def answers() -> dict[str, np.ndarray]:
        found = {name: array.copy() for name, array in runtime.outputs.items() if name.startswith("raw_")}
        return found | ({"new_memory": runtime.memory()} if "new_memory" in runtime.outputs else {})

    return _Prepared(run, answers, runtime.device)


def resident_bytes() -> int:
    """Bytes of memory that the process holds."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def table(measured: dict[str, Latency]) -> str:
    """All of it as Markdown; ratios are medians of pairs of passes."""
    first = next(iter(measured.values()))
    lines = [
        "| runtime | device | p50 ms | p90 | p99 | jitter | images ms | MiB | times as fast | largest difference "
        "| answers changed by % |",
        "|---" * 11 + "|",
    ]
    for name, told in measured.items():
        ratio = float(np.median(np.array(first.passes) / np.array(told.passes)))
        cells = [told.percentile(50), told.percentile(90), told.percentile(99), told.jitter, told.filling]
        numbers = " | ".join(f"{1e3 * value:.1f}" for value in cells)
        accuracy = f"{told.largest:.1e} | {100 * told.changed:.2g}"
        lines.append(f"| {name} | {told.device} | {numbers} | {told.megabytes:.0f} | {ratio:.2f} | {accuracy} |")
    return "\n".join(lines)


def as_dict(measured: dict[str, Latency]) -> dict:
    """Plain JSON values."""
    return {
        name: asdict(told) | {f"p{share}": told.percentile(share) for share in (50, 90, 99)} | {"jitter": told.jitter}
        for name, told in measured.items()
    }
