"""Training steps: where their time goes, how many frames a second, what memory a batch takes, how busy the GPU is.

The data are made here, so no dataset is needed: pictures of clouds with boxes and lines at random, in JPEG files of
nuScenes' size that worker processes decode and fit as in training.
"""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset

from perception.benchmark.frames import CAMERAS, frame_of, network_of, wait
from perception.benchmark.stages import Recorder
from perception.data.loader import collate, pad_boxes, pad_lines
from perception.inference.fitting import fit_image
from perception.models.bev_transformer.losses import frame_losses
from perception.models.bev_transformer.model import BEVTransformer
from perception.types import (
    ATTRIBUTES,
    BOX_CLASSES,
    LINE_CLASSES,
    Boxes,
    Clip,
    FrameObjects,
    MapLine,
    State,
    map_tensors,
)

STORED_SIZE = (900, 1600)  # height and width of nuScenes' images
WINDOW = 2  # frames of a clip, as the configurations have it
BOXES, LINES = 30, 15  # of a frame
STEPS = 3  # timed of each batch size
LIMIT = 20.0  # seconds of one measurement
KEPT_SHARE = 0.5  # of a stage's time, for the parts of a step and for steps with data from workers
LOADED_BATCH = 8  # the largest with data from workers
BUSY_EVERY = 0.1  # seconds


class RandomClips(Dataset):
    """Clips [T, ...] with boxes and lines at random; their images come from JPEG files held in memory.

    Args:
        network: decides the size of the images.
        length: how many there are.
        seed: of everything.
    """

    def __init__(self, network: BEVTransformer, length: int, seed: int = 0) -> None:
        self._frame = map_tensors(lambda x: x[0], frame_of(network, torch.device("cpu"), seed))
        self._size, self._length, self._seed = network.config.image_size, length, seed
        self._points = network.config.line_points
        rng = np.random.default_rng(seed)
        clouds = rng.integers(0, 256, (CAMERAS, 57, 100, 3), dtype=np.uint8)
        self._files = []
        for cloud in clouds:
            file = io.BytesIO()
            Image.fromarray(cloud).resize(STORED_SIZE[::-1], Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            self._files.append(file.getvalue())

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, item: int) -> Clip:
        rng = np.random.default_rng((self._seed, item))
        images = torch.stack([torch.stack([self._decoded(file) for file in self._files]) for _ in range(WINDOW)])
        frames = map_tensors(lambda x: x.expand(WINDOW, *x.shape).clone(), self._frame._replace(images=torch.zeros(0)))
        gt = FrameObjects(
            pad_boxes([_random_boxes(rng) for _ in range(WINDOW)]),
            pad_lines([_random_lines(rng) for _ in range(WINDOW)], self._points),
        )
        return Clip(frames._replace(images=images), gt, torch.arange(WINDOW))

    def _decoded(self, file: bytes) -> Tensor:
        return fit_image(Image.open(io.BytesIO(file)), np.eye(3), self._size)[0]


def _random_boxes(rng: np.random.Generator) -> Boxes:
    def drawn(low: float, high: float, *shape: int) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (BOXES, *shape)).astype(np.float32))

    return Boxes(
        center=torch.cat([drawn(-50, 50, 2), drawn(0.3, 1.5, 1)], -1),
        size=drawn(0.5, 5, 3),
        yaw=drawn(-np.pi, np.pi),
        velocity=drawn(-8, 8, 2),
        label=torch.from_numpy(rng.integers(0, len(BOX_CLASSES), BOXES)),
        attribute=torch.from_numpy(rng.integers(0, len(ATTRIBUTES), BOXES)),
        score=torch.ones(BOXES),
        valid=torch.ones(BOXES, dtype=torch.bool),
        uncertainty=torch.zeros(BOXES, 9),
    )


def _random_lines(rng: np.random.Generator) -> list[MapLine]:
    def line() -> MapLine:
        start, end = rng.uniform([-30, -15], [30, 15], (2, 2))
        return MapLine(int(rng.integers(len(LINE_CLASSES))), np.linspace(start, end, 8))

    return [line() for _ in range(LINES)]


class Step:
    """Training steps of the flagship in bfloat16, as `perception.engine` makes them.

    Args:
        network: its weights change.
    """

    def __init__(self, network: BEVTransformer) -> None:
        self.network = network.to(memory_format=torch.channels_last).train()
        self.device = network.cell_position.weight.device
        self._optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, weight_decay=0.01)

    def __call__(self, clip: Clip, marks: dict[str, float] | None = None) -> None:
        """One step on clips [B, T, ...] on the device.

        Args:
            clip: images, calibration and truth.
            marks: seconds of each part are added to it, which waits for the device after every part; None for no waits.
        """
        B, T = clip.sample_index.shape
        state: State = self.network.initial_state(B)
        total = 0.0
        for t in range(T):
            now = map_tensors(lambda x, t=t: x[:, t], clip)
            with self._timed("forward", marks), torch.autocast(self.device.type, torch.bfloat16):
                prediction, state = self.network(now.frames, state)
            with self._timed("losses", marks):
                prediction = map_tensors(Tensor.float, prediction)
                losses = frame_losses(prediction, now.gt, now.frames, self.network.grid)
                total = total + sum(losses.values()) / T
        with self._timed("backward", marks):
            total.backward()
        with self._timed("optimizer", marks):
            nn.utils.clip_grad_norm_(self.network.parameters(), 35.0)
            self._optimizer.step()
            self._optimizer.zero_grad()

    @contextmanager
    def _timed(self, part: str, marks: dict[str, float] | None) -> Iterator[None]:
        if marks is None:
            yield
            return
        start = time.perf_counter()
        yield
        wait(self.device)
        marks[part] = marks.get(part, 0.0) + time.perf_counter() - start


def measure_training(recorder: Recorder, model: str, device_name: str, batches: tuple[int, ...]) -> None:
    """Sends rows of one network: growing batches, the parts of a step of the fastest, steps with data from workers.

    Batches grow until one fails or half of the time is used up; the fastest is the one with the most frames a second.

    Args:
        recorder: takes the rows.
        model: for `network_of`, a flagship.
        device_name: "cuda" or "cpu".
        batches: clips of a step, smallest first.
    """
    device = torch.device(device_name)
    step = Step(network_of(model, device))
    clips = RandomClips(step.network, 1024)
    one, kept = clips[0], KEPT_SHARE * recorder.left
    rates: dict[int, float] = {}
    for batch in batches:
        if recorder.left < kept:
            break
        limit = min(LIMIT, recorder.left - kept)
        row = recorder.attempt(f"batch {batch}", limit, _measure_batch, step, one, batch)
        if "error" in row:
            break
        rates[batch] = row["frames_per_s"]
    if rates:
        best = max(rates, key=rates.get)
        recorder.attempt(f"batch {best} in parts", recorder.left / 2, _measure_parts, step, one, best)
        workers = max(1, min(14, (os.cpu_count() or 2) - 2))
        batch = min(best, LOADED_BATCH)
        seconds = recorder.left / 2
        recorder.attempt("loaded", recorder.left, _measure_loaded, step, clips, batch, workers, seconds)


def _repeated(clip: Clip, batch: int, device: torch.device) -> Clip:
    return map_tensors(lambda x: x.to(device), collate([clip] * batch))


def _measure_batch(step: Step, clip: Clip, batch: int) -> dict:
    device = step.device
    clips = _repeated(clip, batch, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step(clips)
    wait(device)
    row = {"peak_mib": torch.cuda.max_memory_allocated(device) / 2**20} if device.type == "cuda" else {}
    start = time.perf_counter()
    for _ in range(STEPS):
        step(clips)
    wait(device)
    seconds = (time.perf_counter() - start) / STEPS
    return row | {"step_ms": 1e3 * seconds, "frames_per_s": batch * WINDOW / seconds}


def _measure_parts(step: Step, clip: Clip, batch: int) -> dict:
    """Shares of the parts of a step, each of which is waited for."""
    clips = _repeated(clip, batch, step.device)
    step(clips)
    wait(step.device)
    marks: dict[str, float] = {}
    for _ in range(STEPS):
        step(clips, marks)
    whole = sum(marks.values())
    with profile(activities=[ProfilerActivity.CPU]) as record:
        step(clips)
    matching = sum(event.cpu_time_total for event in record.key_averages() if event.key == "matching") / 1e6
    shares = {part: value / whole for part, value in marks.items()}
    shares["matching"] = matching / (whole / STEPS)  # a part of the losses
    return {"batch": batch, "step_ms": 1e3 * whole / STEPS, "shares": shares}


def _measure_loaded(step: Step, clips: RandomClips, batch: int, workers: int, seconds: float) -> dict:
    """Steps as in a training: workers decode, the copy to the device overlaps, nothing is waited for."""
    device = step.device
    cuda = device.type == "cuda"
    loader = DataLoader(
        clips, batch, num_workers=workers, collate_fn=collate, pin_memory=cuda, prefetch_factor=4,
        multiprocessing_context="fork",  # a stage was spawned, and spawned workers would import all libraries again
    )  # fmt: skip
    batches = iter(loader)

    def load() -> Clip:
        return map_tensors(lambda x: x.to(device, non_blocking=True), next(batches))

    for _ in range(2):
        step(load())
    wait(device)
    steps, waited, begin = 0, 0.0, time.perf_counter()
    with busy(device) as shares:
        while time.perf_counter() - begin < seconds and steps < len(loader) - 3:
            start = time.perf_counter()
            clip = load()
            waited += time.perf_counter() - start
            step(clip)
            steps += 1
        wait(device)
    took = time.perf_counter() - begin
    row = {
        "batch": batch, "workers": workers, "step_ms": 1e3 * took / steps,
        "frames_per_s": steps * batch * WINDOW / took, "shares": {"data": waited / took},
    }  # fmt: skip
    return row | ({"gpu_busy": float(np.mean(shares))} if shares else {})


@contextmanager
def busy(device: torch.device) -> Iterator[list[float]]:
    """Shares of the time in which a GPU had something to do, read from NVML again and again; none without NVML."""
    shares: list[float] = []
    over = threading.Event()

    def read() -> None:
        while not over.wait(BUSY_EVERY):
            try:
                shares.append(torch.cuda.utilization(device) / 100)
            except Exception:  # NVML may be missing, old or forbidden, and each says so by another exception
                return

    thread = threading.Thread(target=read, daemon=True)
    if device.type == "cuda":
        thread.start()
    try:
        yield shares
    finally:
        over.set()
        if device.type == "cuda":
            thread.join()
