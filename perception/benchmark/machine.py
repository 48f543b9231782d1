"""The machine of a measurement: which CPUs and threads are used, what the software is, and what the hardware can do."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F

from perception.errors import ConfigError

PACKAGES = ("onnxruntime", "openvino")
TRIES, SECONDS = 5, 1.0  # of a peak: the best of at least so many tries, which go on for so many seconds
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Large enough for all units, and short: a long try never has a busy machine for itself.
GEMM_SIDE = {"cpu": 1024, "cuda": 8192}
CONVOLUTION = {"cpu": (1, 128, 64, 112), "cuda": (32, 256, 128, 128)}  # images, channels, height, width
COPIED_BYTES = {"cpu": 2**27, "cuda": 2**31}  # far more than the caches hold


@contextmanager
def limited(cpus: Sequence[int] = (), threads: int = 0) -> Iterator[int]:
    """Keeps this process on some CPUs in the block, with a number of threads that all runtimes are given.

    Args:
        cpus: numbers of the CPUs; empty for those that the process may use now.
        threads: of the CPU; 0 for one per CPU.

    Yields:
        The number of threads.

    Raises:
        ConfigError: the system has no affinity, or a CPU is not available to this process.
    """
    if cpus and not hasattr(os, "sched_setaffinity"):
        raise ConfigError(f"--cpus: {platform.system()} cannot bind a process to CPUs; leave it out")
    available = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    if missing := sorted(set(cpus) - available):
        names = ",".join(map(str, sorted(available)))
        raise ConfigError(f"--cpus: CPU {missing[0]} is not available to this process; use some of {names}")
    if threads > len(cpus or available):
        raise ConfigError(f"--threads is {threads}, for {len(cpus or available)} CPUs; give at most as many threads")
    count = threads or len(cpus or available)
    before = torch.get_num_threads()
    if cpus:
        _bind(set(cpus))
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)
        if cpus:
            _bind(available)


def _bind(cpus: set[int]) -> None:
    """Binds all threads of the process; threads that start later inherit it from those that start them."""
    for thread in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(thread.name), cpus)
        except ProcessLookupError:  # it has ended
            continue


def describe(device: torch.device, threads: int) -> dict:
    """Describes the hardware and the software versions as plain JSON values."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    gpu = {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda} if device.type == "cuda" else {}
    python = platform.python_version()
    software = {"python": python, **found, "torch": torch.__version__}
    return {"cpu": cpu_name(), "cpus": cpus, "threads": threads, **gpu, **software}


def cpu_name() -> str:
    """Returns the name of the CPU and its instruction sets for fast products, of which the name may say nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    sets = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if name in flags]
    return " ".join([facts.get("model name", platform.machine()), *([f"({', '.join(sets)})"] if sets else [])])


def wait(device: torch.device) -> None:
    """Waits until a device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(device: torch.device) -> Callable[[], float]:
    """Returns the clock for measurements, in seconds.

    With one thread of the CPU it is the CPU time of the process, to which other load of the machine adds little; with
    several threads, or on a GPU, it is wall time.
    """
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


@dataclass(frozen=True)
class Peaks:
    """What a device reaches, measured.

    Args:
        gemm, convolution: 10^9 operations per second of a large matrix product and of a 3x3 convolution in
            channels_last, by type ("fp32", "bf16"). Products and sums count separately.
        bandwidth: 10^9 bytes per second, read and written, of a copy that no cache holds.
    """

    gemm: dict[str, float]
    convolution: dict[str, float]
    bandwidth: float

    def gflops(self, precision: str) -> float:
        """The larger one of both peaks of a type."""
        return max(self.gemm[precision], self.convolution[precision])


def measure_peaks(device: torch.device) -> Peaks:
    """Measures the peaks of a device with the threads that are set; takes a few seconds."""
    gemm, convolution = {}, {}
    for precision in DTYPES:
        gemm[precision], convolution[precision] = measure_arithmetic(device, precision, TRIES, SECONDS)
    with torch.inference_mode():
        source = torch.zeros(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
        target = torch.empty_like(source).fill_(1)
        bandwidth = 2e-9 * source.numel() / _shortest(partial(target.copy_, source), device, TRIES, SECONDS)
    return Peaks(gemm, convolution, bandwidth)


@torch.inference_mode()
def measure_arithmetic(device: torch.device, precision: str, tries: int, seconds: float) -> tuple[float, float]:
    """Measures 10^9 operations per second of a large matrix product and of a 3x3 convolution, see `Peaks`.

    Args:
        device: to measure, with the threads that are set.
        precision: "fp32" or "bf16".
        tries, seconds: least number of tries of each of them, and for how long they go on.
    """
    side, (N, C, H, W), dtype = GEMM_SIDE[device.type], CONVOLUTION[device.type], DTYPES[precision]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    gemm = _shortest(partial(torch.mm, a, b), device, tries, seconds)
    x = torch.randn(N, C, H, W, device=device).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(C, C, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
    convolution = _shortest(partial(F.conv2d, x, weight, padding=1), device, tries, seconds)
    return 2e-9 * side**3 / gemm, 2e-9 * N * H * W * 9 * C**2 / convolution


def read_gpu_utilization(device: torch.device) -> float | None:
    """Reads from NVML which share of its last sampling period a GPU was busy, 0..1; None without GPU or NVML."""
    if device.type != "cuda":
        return None
    try:
        return torch.cuda.utilization(device) / 100
    except Exception:  # a missing, old or forbidden NVML raises different exceptions
        return None


def _shortest(run: Callable[[], object], device: torch.device, tries: int, seconds: float) -> float:
    """Returns the seconds of the fastest try: other load of the machine only makes tries slower."""
    now = clock(device)
    run()
    wait(device)
    found: list[float] = []
    while len(found) < tries or sum(found) < seconds:
        start = now()
        run()
        wait(device)
        found.append(now() - start)
    return min(found)
