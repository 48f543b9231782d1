"""Measures the accuracy of execution modes: the deployed network over generated scenes, against float32 on a CPU.

Every mode runs `DeployedNetwork` recurrently over the same frames, from camera bytes to boxes and lines on the host.
The tolerances are those of export certificates: fp32 for float32, fp16 for all other modes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from perception.benchmark.frames import (
    CAMERAS,
    COMPILE_LIMIT,
    Mode,
    load_network,
    mode_settings,
    prepared_network,
    runs_on,
    timings,
)
from perception.benchmark.stages import Recorder
from perception.data.nuscenes import NuScenesDataset
from perception.evaluation.dataset import evaluate_predictions
from perception.export.certificate import METRICS, Certificate, Replay
from perception.export.contract import ImageInputs, comparable_memory
from perception.export.onnx import DeployedNetwork
from perception.export.parity import as_tensors, largest_and_mean, matched_distances, raw_differences, raw_queries
from perception.export.replay import camera_frame, frame_inputs, replay_frames
from perception.export.runtime import objects_of
from perception.files import scratch_folder
from perception.inference.acceleration import capture_graph
from perception.inference.fixed_rig import FixedRig
from perception.models import Network
from perception.models.base import memory_tensors
from perception.synthetic import VERSION, simulate
from perception.types import NumpyFrameObjects

SCENES, KEYFRAMES, SEED = 4, 10, 77  # of the generated dataset; a certificate needs as many frames
LIMIT = 40.0  # seconds of one mode
MODES = (
    Mode(), Mode(graph=True), Mode("tf32", graph=True), Mode("fp16", True, graph=True), Mode("bf16", True, graph=True),
    Mode("bf16", True), Mode(compiled=True, graph=True), Mode("fp16", True, compiled=True, graph=True),
)  # fmt: skip


class FrameRunner(Protocol):
    """A network that is ready to run, with its memory."""

    device: str

    def __call__(self, inputs: Sequence[np.ndarray]) -> tuple[dict[str, np.ndarray], float]:
        """Runs the next frame: outputs by name, and the seconds from inputs to outputs on the host."""
        ...

    def reset(self) -> None:
        """Clears the memory."""
        ...


class DeployedRunner:
    """Runs a deployed network in one mode, with buffers for its inputs and its memory on the device.

    Args:
        network: in evaluation mode, on any device; copied.
        images: sizes and format of the camera images.
        inputs: of one frame, without the memory, in the order of `DeployedNetwork.input_names`.
        mode: execution mode.
        device: on which the network runs.
    """

    def __init__(
        self, network: Network, images: ImageInputs, inputs: Sequence[np.ndarray], mode: Mode, device: torch.device
    ) -> None:
        prepared = prepared_network(copy.deepcopy(network).to(device), mode)
        if mode.channels_last and not mode.graph:  # as in live use; a graph cannot compare the calibration
            fixed_rig = FixedRig(prepared)
            prepared.register_forward_pre_hook(lambda _, given: (*given, *fixed_rig(given[0])))
        model = DeployedNetwork(prepared, images).eval()
        self._mode, self._device, self._names = mode, device, model.output_names
        self.device = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        self._model = model
        self._cameras = len(images.sizes)
        self._inputs = [torch.from_numpy(array.copy()).to(device) for array in inputs]
        self._memory = list(memory_tensors(model.network.initial_state(1)).values())
        self._results: tuple[torch.Tensor, ...] = ()
        self._graph: torch.cuda.CUDAGraph | None = None
        with torch.inference_mode():
            if mode.graph:
                self._graph = capture_graph(self._pass)
            else:
                self._pass()
        self.reset()

    def _pass(self) -> None:
        images, others = tuple(self._inputs[: self._cameras]), self._inputs[self._cameras :]
        with mode_settings(self._mode, self._device):
            self._results = self._model(images, *others, *self._memory)
        for memory, new in zip(self._memory, self._results[len(self._results) - len(self._memory) :], strict=True):
            memory.copy_(new)

    def reset(self) -> None:
        """Clears the memory."""
        with torch.inference_mode():
            for memory in self._memory:
                memory.zero_()

    @torch.inference_mode()
    def __call__(self, inputs: Sequence[np.ndarray]) -> tuple[dict[str, np.ndarray], float]:
        """Runs the next frame.

        Returns:
            The outputs by name, and the seconds from inputs to outputs on the host. The memory, which can stay on the
            device, is copied after the timing.
        """
        start = time.perf_counter()
        for buffer, array in zip(self._inputs, inputs, strict=True):
            buffer.copy_(torch.from_numpy(array))
        if self._graph is None:
            self._pass()
        else:
            self._graph.replay()
        outputs = [_on_host(result) for result in self._results[: len(self._names) - len(self._memory)]]
        seconds = time.perf_counter() - start
        return dict(zip(self._names, [*outputs, *map(_on_host, self._memory)], strict=True)), seconds


def _on_host(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.is_floating_point() else tensor).to("cpu", copy=True).numpy()


class Town(NamedTuple):
    """A generated dataset, and its frames as inputs of a deployed network."""

    dataset: NuScenesDataset
    frames: dict[str, list[np.ndarray]]  # by sample token, in their order

    @property
    def first(self) -> list[np.ndarray]:
        """The inputs of the first frame."""
        return next(iter(self.frames.values()))


def make_town(folder: Path, network: Network, images: ImageInputs, scenes: int, seed: int) -> Town:
    """Generates a dataset.

    Args:
        folder: receives it.
        network: that will be deployed.
        images: sizes and format that it takes; the largest size is rendered.
        scenes: number of scenes of `KEYFRAMES` frames each.
        seed: of the town.
    """
    size = max(images.sizes, key=lambda size: size[0] * size[1])
    simulate(folder / "town", scenes=scenes, seed=seed, keyframes=KEYFRAMES, split="benchmark", image_size=size)
    dataset = NuScenesDataset(folder / "town", VERSION, "benchmark", image_size=size, cache_dir=folder / "cache")
    replayed = replay_frames(dataset, len(images.sizes))
    frames = {
        token: list(frame_inputs(camera_frame(frame, images), network.extra_inputs).values())
        for token, frame in replayed
    }
    return Town(dataset, frames)


class Run(NamedTuple):
    """Results of a mode over all frames."""

    outputs: list[dict[str, np.ndarray]]  # by name
    objects: list[NumpyFrameObjects]
    metrics: dict[str, float]
    seconds: np.ndarray


def replay_all(runner: FrameRunner, dataset: NuScenesDataset, frames: dict[str, list[np.ndarray]]) -> Run:
    """Runs all frames, given as inputs by sample token, in their order."""
    passes = [runner(inputs) for inputs in frames.values()]
    objects = [objects_of(outputs) for outputs, _ in passes]
    predictions = {token: as_tensors(found) for token, found in zip(frames, objects, strict=True)}
    metrics = evaluate_predictions(dataset, predictions).metrics()
    return Run([outputs for outputs, _ in passes], objects, metrics, np.array([seconds for _, seconds in passes]))


def compare(wanted: Run, found: Run, precision: str, focal_lengths: tuple[float, ...]) -> Certificate:
    """Compares two replays of the same frames as `certify` does.

    Args:
        wanted, found: the reference, and the run to judge.
        precision: "fp32" or "fp16", selects the tolerances.
        focal_lengths: of the cameras, in image widths.
    """
    raw: dict[str, list[np.ndarray]] = {}
    boxes, lines = [], []
    for expected, outputs in zip(wanted.outputs, found.outputs, strict=True):
        memories = [
            comparable_memory({n.removeprefix("new_"): x for n, x in of.items() if n.startswith("new_")})
            for of in (expected, outputs)
        ]
        for name, rows in memories[0].items():
            raw.setdefault(name, []).append(raw_differences(rows, memories[1][name]))
        for kind in ("box", "line"):
            raw.setdefault(f"raw_{kind}", []).append(
                raw_differences(raw_queries(expected, kind), raw_queries(outputs, kind))
            )
    for first, second in zip(wanted.objects, found.objects, strict=True):
        boxes.append(matched_distances(first.boxes.center, second.boxes.center, first.boxes, second.boxes))
        lines.append(matched_distances(first.lines.points, second.lines.points, first.lines, second.lines))
    judged = Replay(
        cameras=CAMERAS,
        slots=CAMERAS,
        focal_lengths=focal_lengths,
        bad_images=False,
        frames=len(found.objects),
        scenes=SCENES,
        not_finite=0,
        raw={name: largest_and_mean(parts) for name, parts in raw.items()},
        pixels=(0.0, 0.0),  # both runs got the same bytes
        boxes=largest_and_mean(boxes),
        lines=largest_and_mean(lines),
        metrics={name: (wanted.metrics[name], found.metrics[name]) for name in METRICS},
    )
    return Certificate(precision=precision, backend="pytorch", replays=(judged,))


def measure_deployed(recorder: Recorder, model: str, device_name: str) -> None:
    """Records rows of one network: the reference, which is eager float32 on the CPU, then modes on the device.

    Args:
        recorder: receives the rows.
        model: a flagship with trained weights, see `load_network`.
        device_name: "cuda" or "cpu".
    """
    device, cpu = torch.device(device_name), torch.device("cpu")
    network = load_network(model, cpu)
    size = network.config.image_size
    images = ImageInputs.of_rig(CAMERAS, size)
    reference: list[tuple[Town, Run]] = []

    def measure_reference(folder: Path) -> dict:
        """Generates the dataset and measures the reference on it."""
        start = time.perf_counter()
        town = make_town(folder, network, images, SCENES, SEED)
        runner = DeployedRunner(network, images, town.first, Mode(), cpu)
        prepared = time.perf_counter() - start
        run = replay_all(runner, town.dataset, town.frames)
        reference.append((town, run))
        metrics = {name: run.metrics[name] for name in METRICS}
        return {"prepared_s": prepared, **timings(run.seconds), "frames": len(town.frames), "metrics": metrics}

    def measure_mode(mode: Mode) -> dict:
        """Measures a mode against the reference."""
        ((town, wanted),) = reference
        start = time.perf_counter()
        runner = DeployedRunner(network, images, town.first, mode, device)
        prepared = time.perf_counter() - start
        found = replay_all(runner, town.dataset, town.frames)
        first = town.dataset[0].frames
        focal_lengths = tuple((first.rig.img_from_cam[0, :, 0, 0] / size[1]).tolist())
        judged = compare(wanted, found, "fp32" if mode.precision == "fp32" else "fp16", focal_lengths).as_dict()
        row = {name: judged["replays"][0][name] for name in ("raw", "boxes", "lines", "metrics")}
        row |= {"gate": judged["precision"], "passed": judged["passed"], "failures": judged["failures"]}
        return {"prepared_s": prepared, **timings(found.seconds), **row}

    with scratch_folder("benchmark") as folder:
        recorder.attempt("reference", recorder.left, measure_reference, Path(folder))
        if not reference:
            return
        for mode in MODES:
            if runs_on(mode, device):
                recorder.attempt(mode.name, COMPILE_LIMIT if mode.compiled else LIMIT, measure_mode, mode)
