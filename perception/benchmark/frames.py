"""Measures inference of one frame at batch 1 in several modes: precision, memory layout, compiler, CUDA graph.

Every mode is compared with the reference, eager float32 without TF32: passes are interleaved with it for the time, and
start from the same frame and memory for the results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from perception.benchmark.machine import wait
from perception.benchmark.stages import Recorder
from perception.cameras import usual_mounting
from perception.errors import CheckpointError
from perception.export.contract import ImageInputs, comparable_memory
from perception.export.onnx import example_inputs, named_raw_outputs, raw_names
from perception.export.replay import match_rows
from perception.inference.acceleration import WARM_UP, accelerated, capture_graph
from perception.models import Network, build_network, preset_config
from perception.models.base import memory_tensors
from perception.models.checkpoint import load_model, shipped_weights
from perception.ops.bilinear import preferred_implementation
from perception.types import CameraRig, Frame, FrameObjects, Memory, map_tensors, named_tensors

CAMERAS = 6
SECONDS, LEAST_PASSES, MOST_PASSES = 1.0, 30, 200  # of the timed passes of one mode
LIMIT, COMPILE_LIMIT = 20.0, 110.0  # seconds of one measurement, with preparation
KEPT_SHARE = 0.15  # of a stage's time, reserved for further measurements of the fastest mode
PORTS = ("bevformer_tiny", "maptr_tiny_r50_24e_bevformer")  # published networks for boxes and for lines
NAMES = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Mode:
    """Execution mode of a network in PyTorch.

    Args:
        precision: "fp32", "tf32" (float32 with TF32 products), or "bf16" and "fp16", which mean
            "bfloat16" and "float16" of `perception.inference.acceleration.accelerated`.
        channels_last: weights and images in channels_last memory format, and batch norms folded into convolutions, as
            in live use.
        compiled: by `torch.compile`.
        graph: captured as a CUDA graph and replayed.
        tuned: cuDNN autotunes its algorithms.
        plain: cameras and BEV are sampled by `F.grid_sample`, not by kernels of this library.
    """

    precision: str = "fp32"
    channels_last: bool = False
    compiled: bool = False
    graph: bool = False
    tuned: bool = True
    plain: bool = False

    @property
    def name(self) -> str:
        """Name of the mode in tables."""
        parts = ["compile" if self.compiled else "eager", self.precision]
        parts += ["channels_last"] * self.channels_last + ["untuned"] * (not self.tuned)
        parts += ["plain sampling"] * self.plain + ["graph"] * self.graph
        return " ".join(parts)


BASELINE = Mode()  # what a network does as it is loaded, without a choice for speed
REFERENCE = Mode(tuned=False, plain=True)
EAGER = (
    Mode(), Mode(graph=True), Mode("bf16", True, graph=True), Mode("fp16", True, graph=True),
    Mode("tf32", True, graph=True), Mode("bf16", graph=True), Mode("bf16", True), Mode("fp16", True), Mode("bf16"),
    Mode("fp16"), Mode("tf32"), Mode("tf32", True), Mode(channels_last=True),
)  # fmt: skip
COMPILED = (
    Mode("bf16", True, compiled=True), Mode("bf16", True, compiled=True, graph=True),
    Mode("fp16", True, compiled=True), Mode("fp16", True, compiled=True, graph=True),
    Mode("tf32", True, compiled=True, graph=True),
)  # fmt: skip
PORT_MODES = (REFERENCE, Mode("bf16", True, graph=True), Mode("fp16", True, graph=True), Mode("bf16", True))


def runs_on(mode: Mode, device: torch.device) -> bool:
    """Returns whether a device supports a mode. CPUs without float16 in hardware would take minutes for fp16."""
    return device.type == "cuda" or not (mode.graph or mode.precision in ("tf32", "fp16"))


# ----------------------------------------------------------------------------------------------------- networks, frames


def check_model(name: str) -> None:
    """Checks that `load_network` finds a network, without building it.

    Raises:
        CheckpointError: the file does not exist.
        ConfigError: there is no preset of this name.
    """
    if name.endswith(".safetensors") and not Path(name).is_file():
        raise CheckpointError(f"{name}: no such checkpoint; give the path of a .safetensors file that training wrote")
    if not has_weights(name):
        preset_config(name)


def has_weights(name: str) -> bool:
    """Returns whether `load_network` loads trained weights."""
    return name.endswith(".safetensors") or shipped_weights().with_name(f"{name}.safetensors").is_file()


def load_network(name: str, device: torch.device) -> Network:
    """Loads or builds a network for measurements, in evaluation mode.

    Args:
        name: shipped weights, a preset of the flagship or a published network (both with random weights), or the path
            of a `.safetensors` file.
        device: of the network.

    Raises:
        CheckpointError: the file is missing or unreadable.
        ConfigError: there is no preset of this name.
    """
    torch.manual_seed(0)
    if has_weights(name):
        return load_model(name).to(device)
    network = build_network(preset_config(name)).to(device)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1 and not parameter.any():  # with zeros, outputs would not depend on the images
                parameter.normal_(std=0.02)
        _calibrate_batch_norms(network, example_frame(network, device))
    return network.eval()


def _calibrate_batch_norms(network: Network, frame: Frame) -> None:
    """Sets the statistics of batch norms to those of a frame; with random weights activations would grow per block."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    network.train()
    network(frame, network.initial_state(1))
    for norm in norms:
        norm.momentum = 0.1


def example_frame(network: Network, device: torch.device, seed: int = 0) -> Frame:
    """Makes a frame [1, ...] of six cameras, half a second and three metres after the previous one.

    The images are smooth random colours, stored in channels_last like camera images.
    """
    generator = torch.Generator().manual_seed(seed)
    H, W = network.config.image_size
    clouds = torch.rand(CAMERAS, 3, max(H // 16, 2), max(W // 16, 2), generator=generator)
    images = nn.functional.interpolate(255 * clouds, (H, W), mode="bilinear").to(torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)[None]
    inputs: Any = example_inputs(network, ImageInputs.of_rig(CAMERAS, network.config.image_size))
    img_from_cam, ego_from_cam, present, motion, seconds, is_first = inputs[1:7]
    motion[0, 3] = -3.0
    rig = CameraRig(img_from_cam[None], ego_from_cam[None], present[None])
    frame = Frame(images, rig, motion[None], torch.full_like(seconds, 0.5), ~is_first, *usual_mounting(1, CAMERAS))
    return map_tensors(lambda x: x.to(device), frame)


@torch.inference_mode()
def warm_state(network: Network, frame: Frame) -> Memory:
    """Returns the memory of a network in evaluation mode after a frame as its first one."""
    first = frame._replace(is_first=torch.ones_like(frame.is_first))
    return network(first, network.initial_state(1))[1]


# ------------------------------------------------------------------------------------------------------------ one mode


def prepared_network(network: Any, mode: Mode) -> Any:
    """Prepares a network, in evaluation mode, for a mode as for live use; the CUDA graph is up to the caller."""
    return accelerated(
        network, precision=NAMES[mode.precision], channels_last=mode.channels_last, fold=mode.channels_last,
        compile=mode.compiled,
    )  # fmt: skip


class Runner:
    """Runs passes of one frame in one mode; the memory is updated in place, as in live use.

    Args:
        network: in evaluation mode; copied if the mode changes its weights.
        frame, state: copied; a CUDA graph reads and writes these copies.
        mode: execution mode.
        prepared: result of `prepared_network` for this mode; made here if not given.
    """

    def __init__(self, network: Network, frame: Frame, state: Memory, mode: Mode, prepared: Any = None) -> None:
        if not mode.channels_last:
            frame = frame._replace(images=frame.images.contiguous())
        self.mode, self.device = mode, frame.images.device
        self.frame, self.state = map_tensors(torch.clone, frame), map_tensors(torch.clone, state)
        self._start = state
        self.network = prepared or prepared_network(network, mode)
        self._graph: torch.cuda.CUDAGraph | None = None
        self.results: Any = None  # prediction and objects of the last pass
        if mode.graph:
            with torch.inference_mode():
                self._graph = capture_graph(self._pass)

    def __call__(self) -> None:
        """Runs one pass; its results are in `results` until the next."""
        with torch.inference_mode():
            if self._graph is None:
                self._pass()
            else:
                self._graph.replay()

    def first_pass(self) -> tuple[Any, FrameObjects, Memory]:
        """Runs a pass from the initial memory and returns copies of prediction, objects and new memory."""
        with torch.inference_mode():
            _copy(self._start, self.state)
            self()
            prediction, objects, state = (map_tensors(torch.clone, noun) for noun in (*self.results, self.state))
            return prediction, objects, state

    def _pass(self) -> None:
        with mode_settings(self.mode, self.device):
            prediction, after = self.network(self.frame, self.state)
            objects = self.network.decode(prediction)
            _copy(after, self.state)
        self.results = prediction, objects


def _copy(memory: Memory, into: Memory) -> None:
    """Copies the tensors of a memory into those of another one."""
    for source, target in zip(named_tensors(memory).values(), named_tensors(into).values(), strict=True):
        target.copy_(source)


def mode_settings(mode: Mode, device: torch.device) -> AbstractContextManager:
    """Sets TF32, cuDNN and the sampling implementation of a mode for the passes in the block."""
    stack = ExitStack()
    if device.type == "cuda":
        stack.enter_context(_float32_settings(mode.precision == "tf32", mode.tuned))
    if mode.plain:
        stack.enter_context(preferred_implementation("plain"))
    return stack


@contextmanager
def _float32_settings(tf32: bool, tuned: bool) -> Iterator[None]:
    """Sets whether float32 products use TF32 on a GPU, and whether cuDNN autotunes."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=tuned, deterministic=False, allow_tf32=tf32):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def time_interleaved(runs: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, np.ndarray]:
    """Times passes of several functions, interleaved, so that other load of the machine affects all alike.

    Args:
        runs: functions that run one pass, by name.
        device: synchronized after each pass.

    Returns:
        Seconds of each pass, by name.
    """
    for run in runs.values():
        for _ in range(WARM_UP):
            run()
    wait(device)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for number in range(MOST_PASSES):
        if number >= LEAST_PASSES and time.perf_counter() - begin > SECONDS:
            break
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            wait(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(passes) for name, passes in seconds.items()}


def timings(seconds: np.ndarray) -> dict:
    """Returns percentiles in milliseconds and the number of passes, as fields of a row."""
    return {f"p{share}_ms": 1e3 * float(np.percentile(seconds, share)) for share in (50, 90, 99)} | {
        "passes": len(seconds)
    }


# ------------------------------------------------------------------------------------------------------------ stages


def measure_frames(recorder: Recorder, model: str, device_name: str, compiled: bool) -> None:
    """Records rows of one network: the reference, its modes, and the fastest mode with copies to and from the GPU.

    Args:
        recorder: receives the rows.
        model: see `load_network`.
        device_name: "cuda" or "cpu".
        compiled: measures the modes with the compiler if True, those without if False.
    """
    device = torch.device(device_name)
    network = load_network(model, device)
    frame = example_frame(network, device)
    state = warm_state(network, frame)
    reference = Runner(network, frame, state, REFERENCE)
    expected = reference.first_pass()
    runners: dict[Mode | str, Runner] = {}  # of compiled modes, and "fastest"
    fastest = float("inf")
    kept = KEPT_SHARE * recorder.left

    def measure_mode(mode: Mode) -> dict:
        """Measures a mode; keeps its runner if it is the fastest so far."""
        nonlocal fastest
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        plain = runners.get(replace(mode, graph=False)) if mode.compiled else None
        runner = Runner(network, frame, state, mode, plain.network if plain else None)
        found = runner.first_pass()
        wait(device)
        row: dict[str, Any] = {"prepared_s": time.perf_counter() - start}
        if device.type == "cuda":
            row["peak_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
        if mode.compiled:
            runners[mode] = runner
        seconds = time_interleaved({"reference": reference, "mode": runner}, device)
        row |= timings(seconds["mode"])
        if row["p50_ms"] < fastest:
            fastest, runners["fastest"] = row["p50_ms"], runner
        row["speedup"] = float(np.median(seconds["reference"] / seconds["mode"]))
        row["difference"] = differences(network, expected, found)
        return row

    for mode in (REFERENCE, *(COMPILED if compiled else EAGER)):
        if runs_on(mode, device):
            limit = min(COMPILE_LIMIT if mode.compiled else LIMIT, recorder.left - kept)
            recorder.attempt(mode.name, limit, measure_mode, mode)
    if "fastest" in runners:
        recorder.attempt("with copies", LIMIT, _measure_copies, runners["fastest"], reference)
        recorder.attempt("profile", LIMIT, _profile, runners["fastest"])


def _measure_copies(runner: Runner, reference: Runner) -> dict:
    """Measures a mode with images copied from the host and boxes and lines copied back."""
    host = runner.frame.images.cpu()
    if runner.device.type == "cuda":
        host = host.pin_memory()

    def run() -> None:
        runner.frame.images.copy_(host, non_blocking=True)
        runner()
        map_tensors(lambda tensor: tensor.to("cpu", non_blocking=True), runner.results[1])

    with torch.inference_mode():
        seconds = time_interleaved({"reference": reference, "mode": run}, runner.device)
    speedup = float(np.median(seconds["reference"] / seconds["mode"]))
    return {"mode": runner.mode.name} | timings(seconds["mode"]) | {"speedup": speedup}


def differences(
    network: Network, expected: tuple[Any, FrameObjects, Memory], found: tuple[Any, FrameObjects, Memory]
) -> dict[str, list[float] | None]:
    """Compares memory, raw boxes and raw lines of the last layer.

    Differences of numbers larger than 1 are relative. Queries are matched first, because some start at the peaks of a
    heat map, whose order may change.

    Returns:
        Largest and mean difference by name; None if a number is not finite.
    """
    memories = [
        comparable_memory({name: x.cpu().numpy() for name, x in memory_tensors(noun[2]).items()})
        for noun in (expected, found)
    ]
    pairs = {name: [torch.from_numpy(memory[name]) for memory in memories] for name in memories[0]}
    for kind in network.finds:
        raws = [named_raw_outputs(network, noun[0]) for noun in (expected, found)]
        names = raw_names(network, kind)
        pairs[kind] = [torch.cat([raw[name][0].float().flatten(1) for name in names], 1) for raw in raws]  # [Q, ...]
    result: dict[str, list[float] | None] = {}
    for name, tensors in pairs.items():
        if not tensors[0].numel():
            continue
        one, other = (tensor.float().cpu().numpy() for tensor in tensors)
        if not np.isfinite(other).all():
            result[name] = None
            continue
        if one.ndim > 1:
            other = other[match_rows(one, other)]
        off = np.abs(one - other) / np.maximum(1, np.abs(one))
        result[name] = [float(off.max()), float(off.mean())]
    return result


def _profile(runner: Runner, passes: int = 3, most: int = 15) -> dict:
    """Profiles the kernels: the most expensive ones with milliseconds and calls per frame."""
    device = runner.device
    runner()
    wait(device)
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as record:
        for _ in range(passes):
            runner()
        wait(device)
    events = []
    for event in record.key_averages():
        total = event.self_device_time_total if cuda else event.self_cpu_time_total
        if total > 0:
            events.append((total / 1e3 / passes, event.count / passes, event.key[:120]))
    events.sort(reverse=True)
    return {
        "mode": runner.mode.name,
        "kernel_ms": sum(event[0] for event in events),
        "kernels": sum(event[1] for event in events),
        "top": [{"ms": ms, "calls": calls, "name": name} for ms, calls, name in events[:most]],
    }


def measure_ports(recorder: Recorder, model: str, device_name: str) -> None:
    """Records rows of the flagship and two published networks, interleaved, in the same modes.

    Args:
        recorder: receives the rows.
        model: the flagship, see `load_network`.
        device_name: "cuda" or "cpu".
    """
    device = torch.device(device_name)
    networks = {name: load_network(name, device) for name in (model, *PORTS)}
    frames = {name: example_frame(network, device) for name, network in networks.items()}
    states = {name: warm_state(network, frames[name]) for name, network in networks.items()}

    def measure_mode(mode: Mode) -> dict:
        """Measures all networks in a mode."""
        runs = {name: Runner(network, frames[name], states[name], mode) for name, network in networks.items()}
        seconds = time_interleaved(runs, device)
        both = sum(seconds[name] for name in PORTS)
        row = {name: timings(passes) for name, passes in seconds.items()}
        return row | {"share": float(np.median(seconds[model] / both))}

    for mode in PORT_MODES:
        if runs_on(mode, device):
            recorder.attempt(mode.name, 2 * LIMIT, measure_mode, mode)
