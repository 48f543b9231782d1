"""Measures the latency of one frame in several backends, which take turns in one process so that ratios are fair.

Every backend is compared with "baseline": eager float32 in PyTorch as a network is loaded. A pass goes from camera
images on the host to boxes and lines on the host, with a filled memory. The accuracy stands next to the time: metrics
on a generated town for trained weights, raw differences for random ones.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from perception.benchmark.backends import (
    BACKENDS,
    check_backends,
    check_exports,
    images_of,
    make_exports,
    make_runner,
    torch_device,
)
from perception.benchmark.deployed import FrameRunner, Town, make_town, replay_all
from perception.benchmark.frames import CAMERAS, check_model, example_frame, has_weights, load_network
from perception.benchmark.machine import describe, limited
from perception.benchmark.stages import Recorder
from perception.data.nuscenes import NuScenesDataset
from perception.errors import ConfigError
from perception.export.contract import ImageInputs, comparable_memory, read_contract
from perception.export.quantize import is_compared, relative_change
from perception.export.replay import MISSING_AT, camera_frame, frame_inputs, match_rows
from perception.files import scratch_folder, write_json
from perception.models import Network

BASELINE = "baseline"
WARM_UP = 3  # consecutive frames before the timed passes; the outputs are compared after the last of them
OTHER_WEIGHTS = 0.3  # change of raw outputs in standard deviations that no precision of the same network makes
CALIBRATION_SCENES = 3  # of `deployed.KEYFRAMES` frames
HEADLINE = ("nds", "lane_mAP")
# How far from these metrics of the baseline an accurate backend may be, in eight bits and otherwise.
LIMITS_INT8, LIMITS = (0.010, 0.010), (0.002, 0.003)


@dataclass(frozen=True)
class Latency:
    """The measurements of one backend.

    Args:
        passes: latency of each pass in seconds, from images on the host to boxes and lines on the host.
        cpu_seconds: CPU time of each pass, of all threads; on a busy machine its ratios are steadier.
        megabytes: growth of the process memory by preparing the backend and the warm-up.
        device: on which it ran.
        largest: largest difference of raw outputs and memory from the baseline, in the units of certificates.
        changed: mean difference of raw outputs and memory from the baseline, in standard deviations
            (`perception.export.quantize.relative_change`).
        metrics: "nds" and "lane_mAP" on a generated town; None for random weights.
    """

    passes: tuple[float, ...]
    cpu_seconds: tuple[float, ...]
    megabytes: float
    device: str
    largest: float
    changed: float
    metrics: dict[str, float] | None = None

    def percentile(self, share: float) -> float:
        """Returns a percentile of the latency in seconds, `share` in 0..100."""
        return float(np.percentile(self.passes, share))

    def speedup(self, baseline: Latency) -> tuple[float, float, float]:
        """How many times as fast as the baseline: percentiles 10, 50 and 90 of the ratios of passes of one turn."""
        low, median, high = np.percentile(np.array(baseline.passes) / np.array(self.passes), [10, 50, 90])
        return float(low), float(median), float(high)

    def cpu_speedup(self, baseline: Latency) -> float:
        """The median ratio of CPU times, as `speedup`."""
        return float(np.median(np.array(baseline.cpu_seconds) / np.array(self.cpu_seconds)))


class Measured(NamedTuple):
    """The measurements of one model."""

    backends: dict[str, Latency]  # the baseline first
    failures: dict[str, str]  # by backend, why it is not measured

    def within_limits(self, name: str) -> bool:
        """Whether the metrics of a backend are near those of the baseline; True without metrics."""
        wanted, found = self.backends[BASELINE].metrics, self.backends[name].metrics
        if wanted is None or found is None:
            return True
        limits = zip(HEADLINE, accuracy_limits(name), strict=True)
        return all(abs(found[key] - wanted[key]) <= limit for key, limit in limits)

    def best(self) -> str:
        """The fastest backend of those within the limits of accuracy."""
        first = self.backends[BASELINE]
        names = [name for name in self.backends if self.within_limits(name)]
        return max(names, key=lambda name: self.backends[name].speedup(first)[1])


def accuracy_limits(backend: str) -> tuple[float, float]:
    """How far NDS and lane mAP of a backend may be from those of the baseline."""
    return LIMITS_INT8 if BACKENDS[backend].precision == "int8" else LIMITS


class Interrupted(KeyboardInterrupt):
    """Raised by `measure` after Ctrl-C, with the measurements until then.

    Args:
        measured: as `measure` returns it.
    """

    def __init__(self, measured: Measured) -> None:
        super().__init__()
        self.measured = measured


def check_request(
    models: Sequence[str],
    backends: Sequence[str],
    exports: Path | None = None,
    *,
    passes: int = 1,
    scenes: int = 0,
    max_seconds: float = 1.0,
) -> None:
    """Checks the arguments of `measure_models`. Call it before long work.

    Raises:
        CheckpointError: the file of a model is missing, or a folder holds files that are not an export.
        ConfigError: a number is out of range, a model or a backend is unknown, named twice or cannot run here, or an
            export is of another network.
    """
    for name, value, least in (("passes", passes, 1), ("scenes", scenes, 0)):
        if value < least:
            raise ConfigError(f"{name} is {value}; give at least {least}")
    if not max_seconds > 0:
        raise ConfigError(f"max_seconds is {max_seconds}; give a number above 0")
    names = [Path(model).stem for model in models]
    if not models or len(set(names)) < len(names):
        raise ConfigError(f"models are {', '.join(models) or 'missing'}; name at least one, and each once")
    for model in models:
        check_model(model)
    check_backends(backends)
    if any(BACKENDS[name].mode is None for name in backends):
        for model in models:
            check_exports(load_network(model, torch.device("cpu")), exports, model, backends)


def measure_models(
    models: Sequence[str],
    backends: Sequence[str],
    *,
    exports: Path | None = None,
    passes: int = 30,
    threads: int = 0,
    cpus: Sequence[int] = (),
    scenes: int = 4,
    seed: int = 0,
    max_seconds: float = 300.0,
    json: Path | None = None,
    progress: bool = False,
) -> dict[str, Measured]:
    """Measures models one after another, and prints each one's table as soon as it is there.

    Args:
        models: shipped weights, presets with random weights, or `.safetensors` files.
        backends: some of `BACKENDS`; the baseline is measured with them.
        exports: folder of exports, see `perception.benchmark.backends.export_folder`. Those that are missing are made
            there; None makes all in a folder that is deleted.
        passes, max_seconds, progress: as for `measure`.
        threads, cpus: as for `perception.benchmark.machine.limited`.
        scenes: of the generated town on which the metrics of trained weights are compared; 0 for raw differences alone.
        seed: of images and towns.
        json: file that is rewritten after every model, see `as_dict`; None for none.

    Raises:
        CheckpointError, ConfigError: as in `check_request`, or `limited`.
        Interrupted: as in `measure`.
    """
    check_request(models, backends, exports, passes=passes, scenes=scenes, max_seconds=max_seconds)
    results: dict[str, Measured] = {}
    with scratch_folder("latency") as folder, limited(cpus, threads) as count:
        machine = describe(torch_device(), count)
        for model in models:
            own = Path(folder, Path(model).stem)
            own.mkdir()
            network = load_network(model, torch.device("cpu"))
            root, trained = exports or own, has_weights(model)
            images = images_of(network, root, model, backends)

            calibration = partial(_calibration, own / "calibration", network, images, seed + 1) if trained else None
            made = make_exports(network, root, model, backends, images, calibration, progress=progress)
            town = make_town(own, network, images, scenes, seed) if trained and scenes else None
            try:
                results[model] = measure(
                    network, backends, made, town=town, passes=passes, threads=count, seed=seed,
                    max_seconds=max_seconds, progress=progress,
                )  # fmt: skip
            except Interrupted as stop:
                print(table(model, stop.measured))
                raise
            print(f"{table(model, results[model])}\n", flush=True)
            if json:
                write_json(json, as_dict(machine, results))
    return results


def measure(
    network: Network,
    backends: Sequence[str],
    exports: Mapping[str, str | Path],
    *,
    town: Town | None = None,
    passes: int = 30,
    threads: int = 1,
    seed: int = 0,
    max_seconds: float = 300.0,
    progress: bool = False,
) -> Measured:
    """Measures one network in several backends that take turns, the baseline first.

    A backend that cannot be prepared, in `max_seconds` or at all, is left out with its reason.

    Args:
        network: in evaluation mode, on the CPU; PyTorch runs it on the GPU if there is one.
        backends: some of `BACKENDS`.
        exports: folders of its exports by precision.
        town: on which metrics are compared; its first frames are timed. Without it, random images.
        passes: number of timed passes per backend.
        threads: number of CPU threads of other runtimes than PyTorch.
        seed: of the random images.
        max_seconds: no further turn starts after this time; at least one turn is made.
        progress: show progress on stderr.

    Raises:
        Interrupted: Ctrl-C after at least one complete turn.
    """
    folder = next(iter(exports.values()), None)
    images = (
        ImageInputs.of_contract(read_contract(folder))
        if folder is not None
        else ImageInputs.of_rig(CAMERAS, network.config.image_size)
    )
    *warm_up, timed = _frames_of_town(town) if town else _random_frames(network, images, seed)
    runners: dict[str, FrameRunner] = {}
    megabytes: dict[str, float] = {}
    outputs: dict[str, dict[str, np.ndarray]] = {}
    metrics: dict[str, dict[str, float]] = {}
    failures: dict[str, str] = {}
    turns: list[dict[str, tuple[float, float]]] = []  # seconds and CPU seconds by backend
    recorder = Recorder(lambda row: None, float("inf"))

    def prepare(name: str) -> dict:
        before = resident_bytes()
        runner = make_runner(name, network, images, warm_up[0], {k: Path(x) for k, x in exports.items()}, threads)
        for inputs in warm_up:
            found, _ = runner(inputs)
        outputs[name] = {key: array for key, array in found.items() if is_compared(key)}
        is_float32 = BACKENDS[name].mode is None and BACKENDS[name].precision == "fp32"
        if is_float32 and _change(outputs[BASELINE], outputs[name]) > OTHER_WEIGHTS:
            raise ConfigError(f"{exports['fp32']} is an export of other weights; delete it")
        megabytes[name] = (resident_bytes() - before) / 2**20
        runners[name] = runner
        return {}

    def summary() -> Measured:
        return _summary(turns, runners, megabytes, outputs, metrics, failures)

    try:
        with tqdm(_baseline_first(backends), unit="backend", disable=not progress) as bar:
            for name in bar:
                bar.set_description(f"preparing {name}" + " (minutes)" * name.startswith("compile"))
                row = recorder.attempt(name, max_seconds, prepare, name)
                if "error" in row:
                    failures[name] = row["error"]
                    runners.pop(name, None)
        if BASELINE not in runners:
            raise ConfigError(f"the baseline cannot run: {failures[BASELINE]}")
        start = time.perf_counter()
        with tqdm(total=passes, desc="passes of all backends", unit="turn", disable=not progress) as bar:
            while len(turns) < passes and (not turns or time.perf_counter() - start < max_seconds):
                turns.append({name: _timed(runner, timed) for name, runner in runners.items()})
                bar.update()
        for name in tqdm(runners, desc="metrics", unit="backend", disable=not progress or town is None):
            if town:
                runners[name].reset()
                metrics[name] = _metrics(runners[name], town)
    except KeyboardInterrupt:
        if not turns:
            raise
        raise Interrupted(summary()) from None
    return summary()


def _calibration(folder: Path, network: Network, images: ImageInputs, seed: int) -> NuScenesDataset:
    return make_town(folder, network, images, CALIBRATION_SCENES, seed).dataset


def _baseline_first(backends: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([BASELINE, *backends]))


def _frames_of_town(town: Town) -> list[list[np.ndarray]]:
    """Returns the first frames of a town, except for the one that lacks a camera."""
    frames = list(town.frames.values())[: WARM_UP + 2]
    return frames[:MISSING_AT] + frames[MISSING_AT + 1 :]


def _random_frames(network: Network, images: ImageInputs, seed: int) -> list[list[np.ndarray]]:
    """Returns consecutive frames of smooth random colours, the first one as the first of a sequence."""
    frame = example_frame(network, torch.device("cpu"), seed)
    frames = []
    for number in range(WARM_UP + 1):
        first = torch.full_like(frame.is_first, number == 0)
        given = camera_frame(frame._replace(is_first=first), images)
        frames.append(list(frame_inputs(given, network.extra_inputs).values()))
    return frames


def _timed(runner: FrameRunner, inputs: Sequence[np.ndarray]) -> tuple[float, float]:
    start = time.process_time()
    _, seconds = runner(inputs)
    return seconds, time.process_time() - start


def _metrics(runner: FrameRunner, town: Town) -> dict[str, float]:
    found = replay_all(runner, town.dataset, town.frames).metrics
    return {name: found[name] for name in HEADLINE}


def _summary(
    turns: Sequence[Mapping[str, tuple[float, float]]],
    runners: Mapping[str, FrameRunner],
    megabytes: Mapping[str, float],
    outputs: Mapping[str, dict[str, np.ndarray]],
    metrics: Mapping[str, dict[str, float]],
    failures: dict[str, str],
) -> Measured:
    first = outputs[BASELINE]
    backends = {
        name: Latency(
            passes=tuple(turn[name][0] for turn in turns),
            cpu_seconds=tuple(turn[name][1] for turn in turns),
            megabytes=megabytes[name],
            device=runner.device,
            largest=largest_difference(first, outputs[name]),
            changed=_change(first, outputs[name]),
            metrics=metrics.get(name),
        )
        for name, runner in runners.items()
    }
    return Measured(backends, failures)


def _change(reference: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> float:
    """Returns `relative_change` of one frame."""
    one, other = ({name: array[None] for name, array in outputs.items()} for outputs in (reference, found))
    return relative_change(one, other)


def largest_difference(reference: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> float:
    """Returns the largest difference of raw outputs and memory, relative for values above 1, absolute for others.

    Args:
        reference, found: raw outputs [Q, ...] and parts of the memory ("new_memory") by name; the order of rows may
            differ.
    """
    memories = [
        comparable_memory({name.removeprefix("new_"): x for name, x in outputs.items() if name.startswith("new_")})
        for outputs in (reference, found)
    ]
    pairs = []
    for kind, one in memories[0].items():
        other = memories[1][kind]
        pairs.append((one, other[match_rows(one, other)] if one.ndim > 1 else other))
    for kind in ("box", "line"):
        names = [name for name in reference if name.startswith(f"raw_{kind}")]
        if names:
            one, other = (
                np.concatenate([x[name].reshape(len(x[name]), -1) for name in names], 1) for x in (reference, found)
            )  # [Q, ...]
            pairs.append((one, other[match_rows(one, other)]))
    return max(float((np.abs(one - other) / np.maximum(1, np.abs(one))).max()) for one, other in pairs)


def resident_bytes() -> int:
    """Returns the resident memory of the process in bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


# -------------------------------------------------------------------------------------------------------------- tables


def table(model: str, measured: Measured) -> str:
    """Returns the measurements of a model in Markdown, with what is not measured and a sentence about the best backend.

    Ratios are medians over turns, with percentiles 10 and 90. Metrics of other backends than the baseline are
    differences from it.
    """
    first = measured.backends[BASELINE]
    turns = f"{len(first.passes)} turns"
    heads = [
        f"{model}, {turns}", "p50 ms", "p90", "p99", "times as fast", "by CPU time", "NDS", "lane mAP",
        "largest difference", "changed by %", "MiB",
    ]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, latency in measured.backends.items():
        low, median, high = latency.speedup(first)
        cells = [name, *(f"{1e3 * latency.percentile(share):.1f}" for share in (50, 90, 99))]
        cells.append(f"{median:.2f} ({low:.2f} to {high:.2f})" if name != BASELINE else "1.00")
        cells.append(f"{latency.cpu_speedup(first):.2f}")
        cells += _metric_cells(first, latency)
        cells += [f"{latency.largest:.1e}", f"{100 * latency.changed:.2g}", f"{latency.megabytes:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"- not measured: {name}: {reason}" for name, reason in measured.failures.items()]
    for name in measured.backends:
        if not measured.within_limits(name):
            nds, lanes = accuracy_limits(name)
            notes.append(f"- not accurate: {name}: more than {nds:g} NDS or {lanes:g} lane mAP from the baseline")
    return "\n".join([*lines, "", *notes, *([""] if notes else []), sentence(model, measured)])


def _metric_cells(first: Latency, latency: Latency) -> list[str]:
    if first.metrics is None or latency.metrics is None:
        return ["", ""]
    if latency is first:
        return [f"{first.metrics[name]:.4f}" for name in HEADLINE]
    return [f"{latency.metrics[name] - first.metrics[name]:+.4f}" for name in HEADLINE]


def sentence(model: str, measured: Measured) -> str:
    """States how much faster than the baseline the best backend is."""
    best, first = measured.best(), measured.backends[BASELINE]
    if best == BASELINE:
        return f"{model}: no backend is faster than the baseline"
    found = measured.backends[best]
    return (
        f"{model}: best is {best}, {found.speedup(first)[1]:.1f} times as fast as the baseline "
        f"({1e3 * found.percentile(50):.0f} ms instead of {1e3 * first.percentile(50):.0f})"
    )


def as_dict(machine: dict, results: Mapping[str, Measured]) -> dict:
    """Returns the measurements as plain JSON values: the machine, and by model its backends, failures and the best."""
    models = {}
    for model, measured in results.items():
        first = measured.backends[BASELINE]
        models[model] = {
            "best": measured.best(),
            "failures": measured.failures,
            "backends": {
                name: asdict(latency)
                | {f"p{share}": latency.percentile(share) for share in (50, 90, 99)}
                | {"speedup": dict(zip(("p10", "p50", "p90"), latency.speedup(first), strict=True))}
                | {"cpu_speedup": latency.cpu_speedup(first)}
                | {"within_limits": measured.within_limits(name)}
                for name, latency in measured.backends.items()
            },
        }
    return {"machine": machine, "models": models}
