"""Where the time of training steps goes, and how near they come to what the device can compute."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.dist import get_dist_info
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from perception.benchmark.machine import measure_arithmetic, read_gpu_utilization
from perception.engine.gradient_checkpointing import is_recomputing
from perception.types import Clip

# "data" is the wait for the batch and its copy to the device, "matching" includes the losses, and "rest" is what hooks
# do after a step: averages, statistics and logs.
PARTS = ("data", "forward", "matching", "backward", "optimizer", "rest")
PEAK_TRIES, PEAK_SECONDS = 3, 0.1  # of a training's own measurement of the peak


class StepTimes:
    """Adds up the seconds of the parts of training steps.

    On a GPU they lie between events in its stream, so the steps are not slowed down by waiting for it.

    Args:
        device: on which the steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []  # part, its start and its end
        self.start()

    def start(self) -> None:
        """Starts the next part; what happened since the last one does not count."""
        self._last = self._now()

    def end(self, part: str) -> None:
        """Ends one of `PARTS`, which started where the last one ended, or at `start`."""
        now = self._now()
        self._spans.append((part, self._last, now))
        self._last = now

    def take(self) -> dict[str, float]:
        """Returns the seconds of each part since the last call."""
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds = dict.fromkeys(PARTS, 0.0)
        for part, start, end in self._spans:
            seconds[part] += start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
        self._spans.clear()
        return seconds

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _FlopCounter(TorchDispatchMode):
    """Counts the floating-point operations in the block, products and sums separately, without those of recomputation.

    Unlike PyTorch's `FlopCounterMode` it changes nothing: no operator is decomposed and no module has hooks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        formula = flop_registry.get(operator._overloadpacket)
        if formula is not None and not is_recomputing():
            self.flop += formula(*args, **(kwargs or {}), out_val=result)
        return result


class StepFlop:
    """Adds up the floating-point operations of steps; of steps of the same kind only the first one is counted."""

    def __init__(self) -> None:
        self._known: dict[Hashable, int] = {}
        self._sum = 0

    @contextmanager
    def counted(self, kind: Hashable) -> Iterator[None]:
        """Adds the operations of the step in the block.

        Args:
            kind: what the number of operations depends on, such as the shape of the batch.
        """
        if kind in self._known:
            yield
        else:
            with _FlopCounter() as counter:
                yield
            self._known[kind] = counter.flop
        self._sum += self._known[kind]

    def take(self) -> int:
        """Returns the operations since the last call."""
        flop, self._sum = self._sum, 0
        return flop


class ThroughputHook(Hook):
    """Logs throughput, the share of each of `PARTS`, model FLOP utilization (MFU), and how busy the GPU is.

    MFU (https://arxiv.org/abs/2204.02311) is the share of the device's peak that the operations of forward and backward
    pass make up; the peak is that of a large matrix product or convolution, measured when the training starts. What
    gradient checkpointing computes again does not count. Without NVML there is nothing about the GPU.

    Args:
        interval: iterations between two lines of the log, over which values are averaged.
        precision: "fp32" or "bf16", of the network.
    """

    def __init__(self, interval: int, precision: str) -> None:
        self.interval, self.precision = interval, precision
        self.frames = self.images = 0
        self.gpu_shares: list[float] = []

    def before_train(self, runner: Runner) -> None:
        """Measures the peak of the device, without taking random numbers from the training."""
        self.rank, self.world = get_dist_info()
        self.device = next(runner.model.parameters()).device
        self.reads_gpu = self.device.type == "cuda"
        if self.rank == 0:  # which writes the log; processes that share a CPU would disturb each other
            with torch.random.fork_rng([self.device] if self.reads_gpu else []):
                self.peak = 1e9 * max(measure_arithmetic(self.device, self.precision, PEAK_TRIES, PEAK_SECONDS))

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Clip, outputs: dict | None = None) -> None:
        """Adds a step, and logs the values with the next line."""
        loop = runner.train_loop
        self.frames += data_batch.sample_index.numel()
        self.images += data_batch.frames.images.shape[:3].numel()
        if self.reads_gpu:
            share = read_gpu_utilization(self.device)
            self.reads_gpu = share is not None
            self.gpu_shares += [] if share is None else [share]
        if not (self.every_n_inner_iters(batch_idx, self.interval) or self.end_of_epoch(loop.dataloader, batch_idx)):
            return
        seconds, flop = loop.times.take(), loop.flop.take()
        whole = sum(seconds.values())
        values = {"frames_per_s": self.frames * self.world / whole, "images_per_s": self.images * self.world / whole}
        values |= {f"share_{part}": value / whole for part, value in seconds.items()}
        if self.rank == 0:
            values["mfu"] = flop / (whole * self.peak)
        if self.gpu_shares:
            values["gpu_busy"] = sum(self.gpu_shares) / len(self.gpu_shares)
        for name, value in values.items():
            runner.message_hub.update_scalar(f"train/{name}", value)
        self.frames = self.images = 0
        self.gpu_shares.clear()
