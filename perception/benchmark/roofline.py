"""Compares the parts of a network with what the machine can do: operations and bytes of each, against measured peaks.

The roofline model (https://doi.org/10.1145/1498765.1498785): a part that does few operations per byte is bound by the
memory, others by the arithmetic units. The bytes are those that the operators read and write one by one, as in eager
mode; caches and fused operators need fewer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from perception.benchmark.frames import (
    BASELINE,
    NAMES,
    Mode,
    check_model,
    example_frame,
    load_network,
    prepared_network,
    wait,
    warm_state,
)
from perception.benchmark.machine import Peaks, clock, describe, limited, measure_peaks
from perception.errors import ConfigError
from perception.files import replacing, write_json
from perception.inference.acceleration import choose_precision
from perception.types import Frame, Memory

MODES = {"fp32": BASELINE, "bf16": Mode("bf16", channels_last=True)}
REST = "rest"  # what no part does: geometry, normalisation, decoding
BACKBONE = "image_encoder.backbone"
SHOWN, LOWEST = 0.01, 1.0  # share of the time, and GFLOP/s, from which a part is drawn
COLOURS = {"fp32": "tab:blue", "bf16": "tab:red"}


@dataclass
class Cost:
    """What one part of a network does in a pass.

    Args:
        flop: operations, products and sums separately.
        bytes: read and written by all operators.
        seconds: of each timed pass.
    """

    flop: float = 0.0
    bytes: float = 0.0
    seconds: list[float] = field(default_factory=list)

    @property
    def shortest(self) -> float:
        """Seconds of the fastest pass, as of the peaks: other load of the machine only makes passes slower."""
        return min(self.seconds)

    def limit(self, peaks: Peaks, precision: str) -> tuple[float, str]:
        """The seconds that this part needs at least, and what binds it: "arithmetic" or "memory"."""
        arithmetic = self.flop / (1e9 * peaks.gflops(precision))
        memory = self.bytes / (1e9 * peaks.bandwidth)
        return max(arithmetic, memory), "arithmetic" if arithmetic >= memory else "memory"


class PartCounter(TorchDispatchMode):
    """Counts operations and bytes of the operators in the block, by the part of a network that runs them.

    Args:
        parts: modules by the name of the part.
    """

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        self._parts = parts
        self.costs = {name: Cost() for name in (*parts, REST)}
        self._current = [REST]  # the parts that are running, outermost first

    @contextmanager
    def attached(self) -> Iterator[PartCounter]:
        """Follows which part is running, in the block."""

        def enter(name: str) -> Any:
            return lambda *_: self._current.append(name)

        hooks = []
        for name, part in self._parts.items():
            hooks += [
                part.register_forward_pre_hook(enter(name)),
                part.register_forward_hook(lambda *_: self._current.pop() and None, always_call=True),
            ]
        try:
            with self:
                yield self
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator._overloadpacket not in flop_registry:
            with self:
                result = operator.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        result = operator(*args, **(kwargs or {}))
        cost = self.costs[self._current[-1]]
        count = flop_registry.get(operator._overloadpacket)
        if count is not None:
            cost.flop += count(*args, **(kwargs or {}), out_val=result)
        cost.bytes += _moved(operator, (args, kwargs), result)
        return result


def _moved(operator: Any, given: Any, result: Any) -> int:
    """Returns the bytes that an operator reads and writes; views move none."""
    inputs = [x for x in tree_leaves(given) if isinstance(x, Tensor)]
    outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    storages = {x.untyped_storage()._cdata for x in inputs}
    if outputs and all(x.untyped_storage()._cdata in storages for x in outputs) and not operator._schema.is_mutable:
        return 0
    return sum(_size(x) for x in (*inputs, *outputs))


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor; those of a broadcast tensor are read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def network_parts(network: nn.Module) -> dict[str, nn.Module]:
    """The parts of a network by name: its children; of its image encoder, the backbone stands for itself."""
    parts: dict[str, nn.Module] = {}
    for name, child in network.named_children():
        parts[name] = child
        if f"{name}.backbone" == BACKBONE:
            parts[BACKBONE] = child.get_submodule("backbone")
    return parts


@torch.inference_mode()
def count_costs(network: Any, frame: Frame, state: Memory) -> dict[str, Cost]:
    """Counts operations and bytes of a pass by part, without those of parts within it; idle parts are left out.

    Args:
        network: in evaluation mode, or one that `perception.inference.acceleration` has prepared.
        frame, state: of the pass.
    """
    with PartCounter(network_parts(_inner(network))).attached() as counter:
        network.decode(network(frame, state)[0])
    return {name: cost for name, cost in counter.costs.items() if cost.bytes}


@torch.inference_mode()
def time_pass(network: Any, frame: Frame, state: Memory, costs: dict[str, Cost]) -> None:
    """Adds the seconds of one pass to each part; the device is synchronized between parts."""
    device = frame.images.device
    clock_now = clock(device)
    seconds, stack = dict.fromkeys(costs, 0.0), [REST]
    start = clock_now()

    def switch() -> None:
        nonlocal start
        wait(device)
        now = clock_now()
        seconds[stack[-1]] = seconds.get(stack[-1], 0.0) + now - start
        start = now

    def enter(name: str) -> Any:
        def hook(*_: Any) -> None:
            switch()
            stack.append(name)

        return hook

    def leave(*_: Any) -> None:
        switch()
        stack.pop()

    hooks = []
    for name, part in network_parts(_inner(network)).items():
        hooks += [part.register_forward_pre_hook(enter(name)), part.register_forward_hook(leave)]
    try:
        start = clock_now()
        network.decode(network(frame, state)[0])
        switch()
    finally:
        for hook in hooks:
            hook.remove()
    for name, cost in costs.items():
        cost.seconds.append(seconds[name])


def _inner(network: Any) -> nn.Module:
    """The network within one that was prepared for speed."""
    return getattr(network, "network", network)


def measure_roofline(
    models: Sequence[str],
    *,
    precisions: Sequence[str] = (),
    device: str = "cpu",
    passes: int = 10,
    threads: int = 0,
    cpus: Sequence[int] = (),
    max_seconds: float = 120.0,
    json: Path | None = None,
    progress: bool = False,
) -> dict:
    """Measures the peaks of the machine and the parts of networks, one frame of six cameras.

    Args:
        models: presets, shipped weights or `.safetensors` files.
        precisions: "fp32" is the network as it is loaded, "bf16" that of live use: bfloat16 for large convolutions, in
            channels_last, with folded batch norms. Both take turns. Empty for those that the device has.
        device: "cpu" or "cuda".
        passes: timed per model and precision.
        threads, cpus: as for `perception.benchmark.machine.limited`.
        max_seconds: per model, after which no further pass begins.
        json: file for the result, rewritten after every model; None for none.
        progress: show progress on stderr.

    Returns:
        Plain JSON values: "machine", "peaks", and "models": for each precision and part gflop, megabytes, milliseconds,
        limit_ms and bound.

    Raises:
        CheckpointError, ConfigError: a model is missing or unknown, or a precision or the device is.
    """
    if unknown := [name for name in precisions if name not in MODES]:
        raise ConfigError(f"--precisions: {unknown[0]!r} is not known; use some of {', '.join(MODES)}")
    where = checked_device(device)
    for precision in precisions:
        choose_precision(NAMES[precision], where)
    precisions = precisions or [name for name in MODES if _has(name, where)]
    for model in models:
        check_model(model)
    with limited(cpus, threads) as count:
        peaks = measure_peaks(where)
        content: dict = {"machine": describe(where, count), "peaks": asdict(peaks), "models": {}}
        for model in models:
            content["models"][model] = _measure_model(model, precisions, where, peaks, passes, max_seconds, progress)
            if json:
                write_json(json, content)
    return content


def _has(precision: str, device: torch.device) -> bool:
    try:
        choose_precision(NAMES[precision], device)
    except ConfigError:
        return False
    return True


def checked_device(name: str) -> torch.device:
    """Returns a device.

    Raises:
        ConfigError: it is neither "cpu" nor an available "cuda".
    """
    available = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    if name not in available:
        raise ConfigError(f"device {name!r} is not available; use one of {', '.join(available)}")
    return torch.device(name)


def _measure_model(
    model: str,
    precisions: Sequence[str],
    device: torch.device,
    peaks: Peaks,
    passes: int,
    seconds: float,
    progress: bool,
) -> dict:
    network = load_network(model, device)
    frame = example_frame(network, device)
    state = warm_state(network, frame)
    runs = {}
    for precision in precisions:
        prepared = prepared_network(network, MODES[precision])
        runs[precision] = prepared, count_costs(prepared, frame, state)
        time_pass(prepared, frame, state, {name: Cost() for name in runs[precision][1]})  # warm-up
    begin = time.perf_counter()
    for number in tqdm(range(passes), desc=model, unit="pass", disable=not progress):
        if number and time.perf_counter() - begin > seconds:
            break
        for prepared, costs in runs.values():
            time_pass(prepared, frame, state, costs)
    result: dict = {}
    for precision, (_, costs) in runs.items():
        whole = Cost(
            sum(cost.flop for cost in costs.values()), sum(cost.bytes for cost in costs.values()),
            np.sum([cost.seconds for cost in costs.values()], axis=0).tolist(),
        )  # fmt: skip
        result[precision] = {name: _row(cost, peaks, precision) for name, cost in (costs | {"all": whole}).items()}
        # The limit of the whole is the sum of those of the parts, which run one after another.
        limits = [row["limit_ms"] for name, row in result[precision].items() if name != "all"]
        result[precision]["all"]["limit_ms"] = sum(limits)
    return result


def _row(cost: Cost, peaks: Peaks, precision: str) -> dict:
    seconds, bound = cost.limit(peaks, precision)
    return {
        "gflop": cost.flop / 1e9, "megabytes": cost.bytes / 1e6, "ms": 1e3 * cost.shortest, "limit_ms": 1e3 * seconds,
        "bound": bound, "passes_ms": [1e3 * x for x in cost.seconds],
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------- tables and plots


def tables(content: dict) -> str:
    """Formats the result of `measure_roofline` as Markdown."""
    peaks = Peaks(**content["peaks"])
    machine = content["machine"]
    hardware = machine.get("gpu", f"{machine['cpu']}, threads: {machine['threads']}")
    parts = [f"{hardware}, torch {machine['torch']}"]
    lines = [
        f"| {precision} | {peaks.gemm[precision]:.0f} | {peaks.convolution[precision]:.0f} | {peaks.bandwidth:.1f} |"
        for precision in peaks.gemm
    ]
    head = "| peaks | GEMM, GFLOP/s | 3x3 convolution, GFLOP/s | copy, GB/s |\n|---|---|---|---|"
    parts.append("\n".join([head, *lines]))
    for model, precisions in content["models"].items():
        for precision, rows in precisions.items():
            lines = [
                f"| {model}, {precision} | GFLOP | MB | FLOP/byte | ms | share % | GFLOP/s | limit ms | of the limit % "
                "| bound by |",
                "|---" * 10 + "|",
            ]
            whole = rows["all"]["ms"]
            for name, row in rows.items():
                rate = row["gflop"] / row["ms"] * 1e3
                lines.append(
                    f"| {name} | {row['gflop']:.2f} | {row['megabytes']:.1f} "
                    f"| {1e3 * row['gflop'] / row['megabytes']:.1f} | {row['ms']:.1f} | {100 * row['ms'] / whole:.0f} "
                    f"| {rate:.0f} | {row['limit_ms']:.1f} | {100 * row['limit_ms'] / row['ms']:.0f} "
                    f"| {row['bound'] if name != 'all' else ''} |"
                )
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def draw(content: dict, path: str | Path) -> None:
    """Draws the roofline of each model as a PNG: GFLOP/s of the parts over FLOP per byte, below the measured peaks."""
    from matplotlib.figure import Figure

    peaks, models = Peaks(**content["peaks"]), content["models"]
    figure = Figure(figsize=(5.2 * len(models), 4.8), layout="constrained")
    axes = figure.subplots(1, len(models), squeeze=False)[0]
    x = np.geomspace(0.3, 600, 100)
    for panel, (model, precisions) in zip(axes, models.items(), strict=True):
        numbers: dict[str, int] = {}
        for precision, rows in precisions.items():
            colour, whole = COLOURS[precision], rows["all"]["ms"]
            panel.plot(x, np.minimum(peaks.gflops(precision), x * peaks.bandwidth), color=colour, label=precision)
            for name, row in rows.items():
                at = 1e3 * row["gflop"] / row["megabytes"], 1e3 * row["gflop"] / row["ms"]
                if name == "all" or at[0] < x[0] or at[1] < LOWEST or row["ms"] < SHOWN * whole:
                    continue
                number = numbers.setdefault(name, len(numbers) + 1)
                panel.scatter(*at, s=40 + 900 * row["ms"] / whole, color=colour, alpha=0.4, linewidths=0)
                panel.annotate(str(number), at, fontsize=8, ha="center", va="center")
        panel.set(xscale="log", yscale="log", xlim=(x[0], x[-1]), ylim=(LOWEST, 2 * max(map(peaks.gflops, precisions))))
        panel.set_title(model, fontsize=10)
        panel.set_xlabel("FLOP per byte that operators read and write", fontsize=8)
        panel.set_ylabel("GFLOP/s", fontsize=8)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, loc="upper left")
        names = "\n".join(f"{number} {name}" for name, number in numbers.items())
        panel.text(0.98, 0.02, names, transform=panel.transAxes, fontsize=7, ha="right", va="bottom")
    figure.suptitle("Parts of a frame, area by time, below measured peaks", fontsize=11)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)
