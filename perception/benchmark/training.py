"""Measures training steps: time of their parts, frames per second, memory per batch, GPU utilization.

No dataset is needed: the data are random boxes and lines, and images of smooth random colours. The images are JPEG
files of nuScenes' size, which worker processes decode and fit as in training.
"""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from operator import itemgetter

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset

from perception.benchmark.frames import CAMERAS, example_frame, load_network
from perception.benchmark.machine import read_gpu_utilization, wait
from perception.benchmark.stages import Recorder
from perception.data.loader import collate, pad_boxes, pad_lines
from perception.inference.fitting import fit_image
from perception.models import Network
from perception.types import (
    ATTRIBUTES,
    BOX_CLASSES,
    LINE_CLASSES,
    Boxes,
    Clip,
    FrameObjects,
    MapLine,
    map_tensors,
)

STORED_SIZE = (900, 1600)  # height and width of nuScenes' images
FRAMES_PER_CLIP = 2  # as in the shipped configs
BOXES, LINES = 30, 15  # per frame
STEPS = 3  # timed steps per batch size
LIMIT = 20.0  # seconds of one measurement
KEPT_SHARE = 0.5  # of a stage's time, reserved for the parts of a step and for steps with a data loader
LOADED_BATCH = 8  # largest batch with a data loader
UTILIZATION_EVERY = 0.1  # seconds


class RandomClips(Dataset):
    """Clips [T, ...] with random boxes and lines; their images come from JPEG files in memory.

    Args:
        network: determines the size of the images and the points per line.
        length: number of clips.
        seed: of all random numbers.
    """

    def __init__(self, network: Network, length: int, seed: int = 0) -> None:
        self._frame = map_tensors(lambda x: x[0], example_frame(network, torch.device("cpu"), seed))
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
        T = FRAMES_PER_CLIP
        images = torch.stack([torch.stack([self._decoded(file) for file in self._files]) for _ in range(T)])
        frames = map_tensors(lambda x: x.expand(T, *x.shape).clone(), self._frame._replace(images=torch.zeros(0)))
        gt = FrameObjects(
            pad_boxes([_random_boxes(rng) for _ in range(T)]),
            pad_lines([_random_lines(rng) for _ in range(T)], self._points),
        )
        return Clip(frames._replace(images=images), gt, torch.arange(T))

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
    """Runs training steps of a network in bfloat16, as `perception.engine` does.

    Args:
        network: its weights are trained in place.
    """

    def __init__(self, network: Network) -> None:
        self.network = network.to(memory_format=torch.channels_last).train()
        self.device = next(network.parameters()).device
        self._optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, weight_decay=0.01)

    def __call__(self, clip: Clip, part_seconds: dict[str, float] | None = None) -> None:
        """Runs one step on clips [B, T, ...] on the device.

        Args:
            clip: images, calibration and ground truth.
            part_seconds: seconds of each part are added to it, with a synchronization of the device after every part;
                None for no synchronization.
        """
        B, T = clip.sample_index.shape
        state = self.network.initial_state(B)
        total = torch.zeros((), device=self.device)
        for t in range(T):
            now = map_tensors(itemgetter((slice(None), t)), clip)
            with self._timed("forward", part_seconds), torch.autocast(self.device.type, torch.bfloat16):
                prediction, state = self.network(now.frames, state)
            with self._timed("losses", part_seconds):
                prediction = map_tensors(lambda x: x.float() if x.is_floating_point() else x, prediction)
                losses = self.network.loss(prediction, now.gt, now.frames)
                total = total + sum(losses.values()) / T
        with self._timed("backward", part_seconds):
            total.backward()
        with self._timed("optimizer", part_seconds):
            nn.utils.clip_grad_norm_(self.network.parameters(), 35.0)
            self._optimizer.step()
            self._optimizer.zero_grad()

    @contextmanager
    def _timed(self, part: str, part_seconds: dict[str, float] | None) -> Iterator[None]:
        if part_seconds is None:
            yield
            return
        start = time.perf_counter()
        yield
        wait(self.device)
        part_seconds[part] = part_seconds.get(part, 0.0) + time.perf_counter() - start


def measure_training(recorder: Recorder, model: str, device_name: str, batches: tuple[int, ...]) -> None:
    """Records rows of one network: growing batches, the parts of a step of the fastest, steps with a data loader.

    Batches grow until one fails or half of the time is used; the fastest is the one with the most frames per second.

    Args:
        recorder: receives the rows.
        model: see `load_network`.
        device_name: "cuda" or "cpu".
        batches: clips per step, smallest first.
    """
    device = torch.device(device_name)
    step = Step(load_network(model, device))
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
        best = max(rates, key=lambda batch: rates[batch])
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
    return row | {"step_ms": 1e3 * seconds, "frames_per_s": batch * FRAMES_PER_CLIP / seconds}


def _measure_parts(step: Step, clip: Clip, batch: int) -> dict:
    """Measures the shares of the parts of a step, with a synchronization after each part."""
    clips = _repeated(clip, batch, step.device)
    step(clips)
    wait(step.device)
    part_seconds: dict[str, float] = {}
    for _ in range(STEPS):
        step(clips, part_seconds)
    whole = sum(part_seconds.values())
    with profile(activities=[ProfilerActivity.CPU]) as record:
        step(clips)
    matching = sum(event.cpu_time_total for event in record.key_averages() if event.key == "matching") / 1e6
    shares = {part: value / whole for part, value in part_seconds.items()}
    shares["matching"] = matching / (whole / STEPS)  # a part of the losses
    return {"batch": batch, "step_ms": 1e3 * whole / STEPS, "shares": shares}


def _measure_loaded(step: Step, clips: RandomClips, batch: int, workers: int, seconds: float) -> dict:
    """Measures steps as in training: workers decode, copies to the device overlap, nothing is synchronized."""
    device = step.device
    cuda = device.type == "cuda"
    loader = DataLoader(
        clips, batch, num_workers=workers, collate_fn=collate, pin_memory=cuda, prefetch_factor=4,
        multiprocessing_context="fork",  # spawned workers would import all libraries again
    )  # fmt: skip
    batches = iter(loader)

    def load() -> Clip:
        return map_tensors(lambda x: x.to(device, non_blocking=True), next(batches))

    for _ in range(2):
        step(load())
    wait(device)
    steps, waited, begin = 0, 0.0, time.perf_counter()
    with gpu_utilization(device) as shares:
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
        "frames_per_s": steps * batch * FRAMES_PER_CLIP / took, "shares": {"data": waited / took},
    }  # fmt: skip
    return row | ({"gpu_busy": float(np.mean(shares))} if shares else {})


@contextmanager
def gpu_utilization(device: torch.device) -> Iterator[list[float]]:
    """Collects the utilization (0..1) of a GPU during the block, polled from NVML; the list is empty without NVML."""
    shares: list[float] = []
    over = threading.Event()

    def read() -> None:
        while not over.wait(UTILIZATION_EVERY):
            share = read_gpu_utilization(device)
            if share is None:
                return
            shares.append(share)

    thread = threading.Thread(target=read, daemon=True)
    if device.type == "cuda":
        thread.start()
    try:
        yield shares
    finally:
        over.set()
        if device.type == "cuda":
            thread.join()
