"""One frame at batch 1 by different ways through PyTorch: precision, memory layout, compiler, CUDA graph.

Every way is compared with the plain one, eager float32 without TF32: in turns with it for the time, on the same frame
and memory for the results.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from perception.benchmark.stages import Recorder
from perception.errors import CheckpointError
from perception.export.contract import ImageInputs
from perception.export.onnx import example_inputs, named_raw_outputs, raw_names
from perception.export.replay import match_rows
from perception.models import Network, build_network, preset_config
from perception.models.checkpoint import load_model, shipped_weights
from perception.ops.bilinear import preferred_implementation
from perception.types import CameraRig, Frame, FrameObjects, Prediction, State, map_tensors

CAMERAS = 6
SECONDS, LEAST_PASSES, MOST_PASSES = 1.0, 30, 200  # of the timed passes of one way
WARM_UP = 3  # passes that are not timed
LIMIT, COMPILE_LIMIT = 20.0, 110.0  # seconds of one measurement, preparation included
KEPT_SHARE = 0.15  # of a stage's time, for what is measured of the fastest mode
PORTS = ("bevformer_tiny", "maptr_tiny_r50_24e_bevformer")  # for boxes and for lines
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Mode:
    """A way through PyTorch.

    Args:
        precision: "fp32", "tf32" (float32 whose products have 10 bits), or "bf16" and "fp16" by autocast.
        channels_last: weights and images with the channels last in memory.
        compiled: by `torch.compile`.
        graph: captured as a CUDA graph and replayed.
        tuned: cuDNN tries its algorithms once and keeps the fastest.
        plain: cameras and maps are sampled by `F.grid_sample`, not by kernels of this library.
    """

    precision: str = "fp32"
    channels_last: bool = False
    compiled: bool = False
    graph: bool = False
    tuned: bool = True
    plain: bool = False

    @property
    def name(self) -> str:
        """As tables have it."""
        parts = ["compile" if self.compiled else "eager", self.precision]
        parts += ["channels_last"] * self.channels_last + ["untuned"] * (not self.tuned)
        parts += ["plain sampling"] * self.plain + ["graph"] * self.graph
        return " ".join(parts)


REFERENCE = Mode(tuned=False, plain=True)
EAGER = (
    Mode(), Mode(graph=True), Mode("bf16", True, graph=True), Mode("fp16", True, graph=True),
    Mode("tf32", True, graph=True), Mode("bf16", graph=True), Mode("bf16", True), Mode("fp16", True), Mode("bf16"),
    Mode("fp16"), Mode("tf32"), Mode("tf32", True),
)  # fmt: skip
COMPILED = (
    Mode("bf16", True, compiled=True), Mode("bf16", True, compiled=True, graph=True),
    Mode("fp16", True, compiled=True), Mode("fp16", True, compiled=True, graph=True),
    Mode("tf32", True, compiled=True, graph=True),
)  # fmt: skip
RACED = (REFERENCE, Mode("bf16", True, graph=True), Mode("fp16", True, graph=True), Mode("bf16", True))


def runs_on(mode: Mode, device: torch.device) -> bool:
    """Whether a device has such a way; a CPU without float16 in hardware would take minutes for it."""
    return device.type == "cuda" or not (mode.graph or mode.precision in ("tf32", "fp16"))


# ----------------------------------------------------------------------------------------------------- networks, frames


def check_model(name: str) -> None:
    """Raises what `network_of` would, without making the network.

    Raises:
        CheckpointError: there is no such file.
        ConfigError: there is no such preset.
    """
    if name.endswith(".safetensors") and not Path(name).is_file():
        raise CheckpointError(f"{name}: no such checkpoint; give the path of a .safetensors file that training wrote")
    if not has_weights(name):
        preset_config(name)


def has_weights(name: str) -> bool:
    """Tells whether `network_of` gives a network trained weights."""
    return name.endswith(".safetensors") or shipped_weights().with_name(f"{name}.safetensors").is_file()


def network_of(name: str, device: torch.device) -> Network:
    """A network to measure, in evaluation mode.

    Args:
        name: shipped weights, a preset of the flagship or a published network (both with random weights), or the path
            of a `.safetensors` file.
        device: to move it to.

    Raises:
        CheckpointError: the file is missing or unreadable.
        ConfigError: there is no such preset.
    """
    torch.manual_seed(0)
    if has_weights(name):
        return load_model(name).to(device)
    network = build_network(preset_config(name)).to(device)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1 and not parameter.any():  # else outputs would not depend on the images
                parameter.normal_(std=0.02)
        _settle_norms(network, frame_of(network, device))
    return network.eval()


def _settle_norms(network: Network, frame: Frame) -> None:
    """Gives batch norms the statistics of a frame: through random weights alone numbers grow from block to block."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    network.train()
    network(frame, network.initial_state(1))
    for norm in norms:
        norm.momentum = 0.1


def frame_of(network: Network, device: torch.device, seed: int = 0) -> Frame:
    """A frame [1, ...] of six cameras half a second and three metres after another one.

    The images are clouds of colour, stored as cameras give them: channels last.
    """
    generator = torch.Generator().manual_seed(seed)
    H, W = network.config.image_size
    clouds = torch.rand(CAMERAS, 3, max(H // 16, 2), max(W // 16, 2), generator=generator)
    images = nn.functional.interpolate(255 * clouds, (H, W), mode="bilinear").to(torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)[None]
    inputs = example_inputs(network, ImageInputs.of_rig(CAMERAS, network.config.image_size))
    img_from_cam, ego_from_cam, present, motion, seconds, is_first = inputs[1:7]
    motion[0, 3] = -3.0
    rig = CameraRig(img_from_cam[None], ego_from_cam[None], present[None])
    frame = Frame(images, rig, motion[None], torch.full_like(seconds, 0.5), ~is_first)
    return map_tensors(lambda x: x.to(device), frame)


@torch.inference_mode()
def memory_of(network: Network, frame: Frame) -> State:
    """What a network in evaluation mode remembers of a frame that it saw first."""
    first = frame._replace(is_first=torch.ones_like(frame.is_first))
    return network(first, network.initial_state(1))[1]


# ------------------------------------------------------------------------------------------------------------ one way


class Runner:
    """Passes of one frame by one mode; the memory is written back in place, as in live use.

    Args:
        network: in evaluation mode; copied where the mode wants another layout.
        frame, state: copied; a captured graph reads and writes the copies at their place.
        mode: how.
        advance: what a runner without a graph has compiled; compiled here where not given.
    """

    def __init__(
        self, network: Network, frame: Frame, state: State, mode: Mode, advance: Callable | None = None
    ) -> None:
        if not mode.channels_last:
            frame = frame._replace(images=frame.images.contiguous())
        elif advance is None:
            network = copy.deepcopy(network).to(memory_format=torch.channels_last)
        self.mode, self.device = mode, frame.images.device
        self.frame, self.state = map_tensors(torch.clone, frame), map_tensors(torch.clone, state)
        self._start = state

        def pass_of(frame: Frame, state: State) -> tuple[Prediction, FrameObjects, State]:
            prediction, state = network(frame, state)
            return prediction, network.decode(prediction), state

        self.advance = advance or (torch.compile(pass_of, dynamic=False) if mode.compiled else pass_of)
        self._graph = None
        self.results: tuple[Prediction, FrameObjects] | None = None
        if mode.graph:
            with torch.inference_mode():
                self._graph = captured(self._pass)

    def __call__(self) -> None:
        """One pass; its results are in `results` until the next."""
        with torch.inference_mode():
            if self._graph is None:
                self._pass()
            else:
                self._graph.replay()

    def first_pass(self) -> tuple[Prediction, FrameObjects, State]:
        """What a pass from the memory that was given returns."""
        with torch.inference_mode():
            self.state.bev.copy_(self._start.bev)
            self()
            return tuple(map_tensors(torch.clone, noun) for noun in (*self.results, self.state))

    def _pass(self) -> None:
        with mode_settings(self.mode, self.device):
            *results, after = self.advance(self.frame, self.state)
            self.state.bev.copy_(after.bev)
        self.results = tuple(results)


def mode_settings(mode: Mode, device: torch.device) -> AbstractContextManager:
    """Sets precision, cuDNN and sampling of a mode for the passes in the block."""
    stack = ExitStack()
    if device.type == "cuda":
        stack.enter_context(_products(mode.precision == "tf32", mode.tuned))
    if mode.plain:
        stack.enter_context(preferred_implementation("plain"))
    if mode.precision in DTYPES:
        stack.enter_context(torch.autocast(device.type, DTYPES[mode.precision]))
    return stack


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A pass as a CUDA graph, after some passes on another stream, as capturing wants it."""
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(other)
    graph = torch.cuda.CUDAGraph()
    # Relaxed: a kernel that is needed in this pass for the first time may be loaded meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        run()
    return graph


@contextmanager
def _products(tf32: bool, tuned: bool):
    """How products of float32 are made on a GPU, and whether cuDNN seeks its fastest algorithm."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=tuned, deterministic=False, allow_tf32=tf32):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def take_turns(runs: Mapping[str, Callable[[], None]], device: torch.device) -> dict[str, np.ndarray]:
    """Seconds of each pass, by name; what else the machine does falls on all alike.

    Args:
        runs: each makes one pass.
        device: that is waited for after each.
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


def wait(device: torch.device) -> None:
    """Until everything that a device was given to do is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timings(seconds: np.ndarray) -> dict:
    """Milliseconds for a row."""
    return {f"p{share}_ms": 1e3 * float(np.percentile(seconds, share)) for share in (50, 90, 99)} | {
        "passes": len(seconds)
    }


# ------------------------------------------------------------------------------------------------------------ stages


def measure_frames(recorder: Recorder, model: str, device_name: str, compiled: bool) -> None:
    """Rows of one network: the reference, its ways, and the fastest of them with the copies to the GPU and back.

    Args:
        recorder: takes the rows.
        model: for `network_of`.
        device_name: "cuda" or "cpu".
        compiled: the ways with the compiler, or those without.
    """
    device = torch.device(device_name)
    network = network_of(model, device)
    frame = frame_of(network, device)
    state = memory_of(network, frame)
    reference = Runner(network, frame, state, REFERENCE)
    wanted = reference.first_pass()
    runners: dict[Mode | str, Runner] = {}  # of what was compiled, and "fastest"
    fastest = float("inf")
    kept = KEPT_SHARE * recorder.left

    def measure_mode(mode: Mode) -> dict:
        """A row; keeps the runner while nothing is faster."""
        nonlocal fastest
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        plain = runners.get(replace(mode, graph=False)) if mode.compiled else None
        runner = Runner(network, frame, state, mode, plain and plain.advance)
        found = runner.first_pass()
        wait(device)
        row = {"prepared_s": time.perf_counter() - start}
        if device.type == "cuda":
            row["peak_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
        if mode.compiled:
            runners[mode] = runner
        seconds = take_turns({"reference": reference, "mode": runner}, device)
        row |= timings(seconds["mode"])
        if row["p50_ms"] < fastest:
            fastest, runners["fastest"] = row["p50_ms"], runner
        row["speedup"] = float(np.median(seconds["reference"] / seconds["mode"]))
        row["difference"] = differences(network, wanted, found)
        return row

    for mode in (REFERENCE, *(COMPILED if compiled else EAGER)):
        if runs_on(mode, device):
            limit = min(COMPILE_LIMIT if mode.compiled else LIMIT, recorder.left - kept)
            recorder.attempt(mode.name, limit, measure_mode, mode)
    if "fastest" in runners:
        recorder.attempt("with copies", LIMIT, _measure_copies, runners["fastest"], reference)
        recorder.attempt("profile", LIMIT, _profile, runners["fastest"])


def _measure_copies(runner: Runner, reference: Runner) -> dict:
    """A way with images from the host and boxes and lines back to it."""
    host = runner.frame.images.cpu()
    if runner.device.type == "cuda":
        host = host.pin_memory()

    def run() -> None:
        runner.frame.images.copy_(host, non_blocking=True)
        runner()
        map_tensors(lambda tensor: tensor.to("cpu", non_blocking=True), runner.results[1])

    with torch.inference_mode():
        seconds = take_turns({"reference": reference, "mode": run}, runner.device)
    speedup = float(np.median(seconds["reference"] / seconds["mode"]))
    return {"mode": runner.mode.name} | timings(seconds["mode"]) | {"speedup": speedup}


def differences(
    network: Network, wanted: tuple[Prediction, FrameObjects, State], found: tuple[Prediction, FrameObjects, State]
) -> dict[str, list[float] | None]:
    """Largest and mean difference of memory, raw boxes and raw lines of the last layer; None where one is not finite.

    Numbers larger than one count in units of themselves. Queries are compared in the order that fits best, since
    some start at the peaks of a map, whose order may change.
    """
    pairs = {"memory": [noun[2].bev.flatten()[:, None] for noun in (wanted, found)]}
    for kind in network.finds:
        raws = [named_raw_outputs(network, noun[0]) for noun in (wanted, found)]
        names = raw_names(network, kind)
        pairs[kind] = [torch.cat([raw[name][0].float().flatten(1) for name in names], 1) for raw in raws]  # [Q, ...]
    result: dict[str, list[float] | None] = {}
    for name, (one, other) in pairs.items():
        if not one.numel():
            continue
        one, other = one.float().cpu().numpy(), other.float().cpu().numpy()
        if not np.isfinite(other).all():
            result[name] = None
            continue
        if name != "memory":
            other = other[match_rows(one, other)]
        off = np.abs(one - other) / np.maximum(1, np.abs(one))
        result[name] = [float(off.max()), float(off.mean())]
    return result


def _profile(runner: Runner, passes: int = 3, most: int = 15) -> dict:
    """Where the time of the kernels goes: the most expensive ones, milliseconds and calls a frame."""
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
    """Rows of the flagship and two published networks in turns, by the same ways.

    Args:
        recorder: takes the rows.
        model: the flagship, for `network_of`.
        device_name: "cuda" or "cpu".
    """
    device = torch.device(device_name)
    networks = {name: network_of(name, device) for name in (model, *PORTS)}
    frames = {name: frame_of(network, device) for name, network in networks.items()}
    states = {name: memory_of(network, frames[name]) for name, network in networks.items()}

    def race(mode: Mode) -> dict:
        runs = {name: Runner(network, frames[name], states[name], mode) for name, network in networks.items()}
        seconds = take_turns(runs, device)
        both = sum(seconds[name] for name in PORTS)
        row = {name: timings(passes) for name, passes in seconds.items()}
        return row | {"share": float(np.median(seconds[model] / both))}

    for mode in RACED:
        if runs_on(mode, device):
            recorder.attempt(mode.name, 2 * LIMIT, race, mode)
