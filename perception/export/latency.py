"""How long one moment takes in each runtime: all of them in one process, taking turns, so that ratios are fair."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from perception.errors import ConfigError
from perception.export.contract import ImageInputs, read_contract
from perception.export.onnx import DeployedNetwork, example_inputs
from perception.export.runtime import Runtime
from perception.models.checkpoint import Network

BACKENDS = ("pytorch", "compile", "ort", "tensorrt")
WARM_UP = 3  # passes that are not timed


@dataclass(frozen=True)
class Latency:
    """Of one runtime.

    Args:
        passes: seconds of each pass, from images on the CPU to boxes and lines on the CPU.
        filling: median seconds of each pass for bringing the images to where the runtime reads them.
        megabytes: by which the process grew when the runtime was made and first run.
        device: what it ran on.
    """

    passes: tuple[float, ...]
    filling: float
    megabytes: float
    device: str

    def percentile(self, share: float) -> float:
        """Seconds that so many per cent of the passes stay below."""
        return float(np.percentile(self.passes, share))

    @property
    def jitter(self) -> float:
        """Standard deviation of the passes in seconds."""
        return float(np.std(self.passes))


def measure(
    network: Network,
    folder: str | Path,
    backends: Sequence[str],
    *,
    passes: int = 30,
    threads: int = 0,
    seed: int = 0,
) -> dict[str, Latency]:
    """Times one moment, the memory filled, in several runtimes that take turns.

    Args:
        network: in evaluation mode; moved to the GPU for PyTorch where there is one.
        folder: of its export, for "ort" and "tensorrt".
        backends: of `BACKENDS`; the first is what the others are held to.
        passes: timed for each.
        threads: of the CPU, 0 for as many as there are.
        seed: of the images.

    Raises:
        ConfigError: a backend is not known or cannot run here, or the network cannot be compiled here.
    """
    if strange := [name for name in backends if name not in BACKENDS]:
        raise ConfigError(f"backend {strange[0]!r} is not known; use some of {', '.join(BACKENDS)}")
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    contract = read_contract(folder)
    images = ImageInputs.of_contract(contract)
    inputs = example_inputs(network, images)
    runs: dict[str, tuple[Callable[[], float], str, float]] = {}
    for name in backends:
        before = resident_bytes()
        if name in ("ort", "tensorrt"):
            run, device = _exported(folder, inputs, name, threads)
        else:
            run, device = _torch(network, inputs, images, name)
        for _ in range(WARM_UP):
            run()
        runs[name] = run, device, (resident_bytes() - before) / 2**20
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in backends}
    for _ in range(passes):
        for name, (run, _, _) in runs.items():
            start = time.perf_counter()
            filling = run()
            seconds[name].append((time.perf_counter() - start, filling))
    return {
        name: Latency(
            tuple(whole for whole, _ in seconds[name]),
            float(np.median([filling for _, filling in seconds[name]])),
            megabytes,
            device,
        )
        for name, (_, device, megabytes) in runs.items()
    }


def _torch(network: Network, inputs, images: ImageInputs, name: str) -> tuple[Callable[[], float], str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = DeployedNetwork(network, images).eval().to(device)
    call = torch.compile(model) if name == "compile" else model
    memory = [tensor.to(device) for tensor in inputs[7:]]

    @torch.inference_mode()
    def run() -> float:
        start = time.perf_counter()
        buffers = [tensor.to(device) for tensor in inputs[0]]
        rest = [tensor.to(device) for tensor in inputs[1:7]]
        filling = time.perf_counter() - start
        try:
            results = call(buffers, *rest, *memory)
        except Exception as error:  # whatever a compiler may raise
            if name != "compile":
                raise
            raise ConfigError(f"the network cannot be compiled here: {str(error).splitlines()[0]}") from None
        if memory:
            memory[0] = results[-1]
        for result in results[:-1] if memory else results:
            result.cpu()
        return filling

    cpu = f"{torch.get_num_threads()} CPU threads"
    return run, torch.cuda.get_device_name(device) if device.type == "cuda" else cpu


def _exported(folder: str | Path, inputs, name: str, threads: int) -> tuple[Callable[[], float], str]:
    if name == "tensorrt":
        runtime = Runtime(folder, backend="tensorrt")
    else:
        import onnxruntime

        there = onnxruntime.get_available_providers()
        provider = "CUDAExecutionProvider" if "CUDAExecutionProvider" in there else "CPUExecutionProvider"
        runtime = Runtime(folder, providers=[provider], threads=threads)
    moment = [tensor.numpy() for tensor in (*inputs[0], *inputs[1:7])]

    def run() -> float:
        start = time.perf_counter()
        for buffer, array in zip(list(runtime.inputs.values())[: len(moment)], moment, strict=True):
            buffer[...] = array
        filling = time.perf_counter() - start
        runtime.run()
        return filling

    return run, runtime.device


def resident_bytes() -> int:
    """Bytes of memory that the process holds."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def table(measured: dict[str, Latency]) -> str:
    """All of it as Markdown; ratios are medians of pairs of passes."""
    first = next(iter(measured.values()))
    lines = [
        "| runtime | device | p50 ms | p90 | p99 | jitter | images ms | MiB | times as fast |",
        "|---" * 9 + "|",
    ]
    for name, told in measured.items():
        ratio = float(np.median(np.array(first.passes) / np.array(told.passes)))
        cells = [told.percentile(50), told.percentile(90), told.percentile(99), told.jitter, told.filling]
        numbers = " | ".join(f"{1e3 * value:.1f}" for value in cells)
        lines.append(f"| {name} | {told.device} | {numbers} | {told.megabytes:.0f} | {ratio:.2f} |")
    return "\n".join(lines)


def as_dict(measured: dict[str, Latency]) -> dict:
    """Plain JSON values."""
    return {
        name: asdict(told) | {f"p{share}": told.percentile(share) for share in (50, 90, 99)} | {"jitter": told.jitter}
        for name, told in measured.items()
    }
