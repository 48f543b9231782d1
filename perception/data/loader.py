"""From files to batches: image decoding, padding, collation, and the orders in which samples are drawn."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Sampler

from perception.errors import ConfigError, DataError
from perception.geometry import resample_polyline
from perception.inference.fitting import fit_image
from perception.types import Boxes, Clip, FrameObjects, MapLine, Polylines


def decode_image(
    path: str | Path, img_from_cam: np.ndarray, image_size: tuple[int, int], stored_size: tuple[int, int] | None = None
) -> tuple[Tensor, np.ndarray]:
    """Reads an image at the network's size (see `fit_image`), and the calibration that belongs to it.

    Args:
        path: an image file.
        img_from_cam: [3, 3] calibration in pixels of the stored image.
        image_size: height and width wanted.
        stored_size: height and width the calibration was made for; None takes those of the file.

    Returns:
        [3, H, W] uint8 RGB, and [3, 3] float64 calibration in its pixels.

    Raises:
        DataError: the file is missing, truncated, not an image, or of another size than it should be.
    """
    try:
        with Image.open(path) as image:
            stored_w, stored_h = image.size
            if stored_size is not None and tuple(stored_size) != (stored_h, stored_w):
                raise DataError(
                    f"{path} is {stored_w} x {stored_h} pixels, but the tables say {stored_size[1]} x {stored_size[0]}"
                    ": restore the original image or correct width and height in sample_data.json"
                )
            return fit_image(image, img_from_cam, image_size)
    except FileNotFoundError:
        raise DataError(f"{path} is missing: copy the dataset's images again") from None
    except OSError as error:  # PIL says so for truncated and for unknown files
        raise DataError(f"{path} cannot be read as an image ({error}): copy it again") from None


def pad_boxes(boxes: Sequence[Boxes], count: int = 0) -> Boxes:
    """Stacks the boxes of several frames, padded to the longest or to `count`: each [M_i, ...] -> [T, M, ...]."""
    return _stack_padded(boxes, max(count, *(len(part.label) for part in boxes)))


def pad_lines(lines: Sequence[Sequence[MapLine]], points_per_line: int, count: int = 0) -> Polylines:
    """Resamples the lines of several frames and stacks them, padded to the most or to `count`.

    Returns:
        Polylines with points [T, M, P, 2] float32.
    """
    stacked = []
    for moment in lines:
        points = np.zeros((len(moment), points_per_line, 2), dtype=np.float32)
        for row, line in zip(points, moment, strict=True):
            row[:] = resample_polyline(line.points, points_per_line)
        closed = [len(line.points) > 2 and np.array_equal(line.points[0], line.points[-1]) for line in moment]
        stacked.append(
            Polylines(
                points=torch.from_numpy(points),
                closed=torch.tensor(closed, dtype=torch.bool),
                label=torch.tensor([line.label for line in moment], dtype=torch.int64),
                score=torch.tensor([line.score for line in moment], dtype=torch.float32),
                valid=torch.ones(len(moment), dtype=torch.bool),
                uncertainty=torch.zeros(len(moment), points_per_line, 2),
            )
        )
    return _stack_padded(stacked, max(count, *(len(moment) for moment in lines)))


def _stack_padded(parts: Sequence, count: int):
    """Stacks nouns along a new first axis after padding their first axis with zeros (valid: False) to `count`."""

    def padded(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor.new_zeros(count - len(tensor), *tensor.shape[1:])])

    return type(parts[0])(*(torch.stack([padded(tensor) for tensor in field]) for field in zip(*parts, strict=True)))


def collate(clips: list[Clip]) -> Clip:
    """Clips [T, ...] into one batch [B, T, ...]; ground truth is padded to the longest of the batch."""
    gt = FrameObjects(
        *(
            type(parts[0])(*map(_stack_gt, zip(*parts, strict=True)))
            for parts in zip(*(clip.gt for clip in clips), strict=True)
        )
    )
    frames = _stack([clip.frames for clip in clips])
    return Clip(frames, gt, torch.stack([clip.sample_index for clip in clips]))


def _stack(nouns: list):
    if isinstance(nouns[0], Tensor):
        return torch.stack(nouns)
    return type(nouns[0])(*(_stack(list(field)) for field in zip(*nouns, strict=True)))


def _stack_gt(tensors: Sequence[Tensor]) -> Tensor:
    """[T, M_i, ...] each -> [B, T, M, ...]."""
    count = max(tensor.shape[1] for tensor in tensors)
    return torch.stack([F.pad(t, (0, 0) * (t.ndim - 2) + (0, count - t.shape[1])) for t in tensors])


class ClipRequest(NamedTuple):
    """What the training sampler yields: samples of one scene that follow each other, and how they are to be seen."""

    samples: tuple[int, ...]
    previous: int  # the sample that the memory is from, -1 where it starts empty
    seed: tuple[int, ...]  # of the random numbers of the augmentation, the same all along a scene


class TrainSampler(Sampler):
    """Windows of scenes, for training with a memory that is handed on from batch to batch.

    A batch holds one window of each of `batch_size` scenes. Batches take turns in `streams`: batch b + streams goes on
    where batch b ended, element by element, with the next window of the same scene or the first one of another. In
    between other scenes are seen, for steps that all see the same street unlearn the others. Scenes come in random
    order.

    Order, dropped frames and augmentation depend on the seed and the epoch only, neither on the number of workers nor
    on what was drawn before, so a resumed run goes on as if it had not been interrupted.

    Args:
        scene_of_sample: [S] scene number of each sample, samples in time order within a scene.
        batch_size: that of the DataLoader, which must keep the order.
        streams: batches that take turns.
        frames_per_clip: T, samples per draw. Scenes that have fewer are left out; what does not fill a frames_per_clip
            is skipped, now at the beginning of a scene and now at its end.
        drop: probability that a sample is left out, so that the time between two frames varies.
        seed: of the whole run.
        rank: of this process.
        world_size: number of processes; each has scenes of its own.

    Raises:
        ConfigError: no scene fills a window.
    """

    def __init__(
        self,
        scene_of_sample: Sequence[int],
        batch_size: int,
        streams: int,
        frames_per_clip: int,
        drop: float,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        scenes = np.asarray(scene_of_sample)
        of_scene = [np.flatnonzero(scenes == scene) for scene in np.unique(scenes)]
        self.scenes = [samples for samples in of_scene if len(samples) >= frames_per_clip]
        if not self.scenes:
            raise ConfigError(
                f"train.frames_per_clip is {frames_per_clip}, but no scene has that many samples; use at most "
                f"{max(map(len, of_scene), default=0)}"
            )
        self.batch_size, self.streams, self.frames_per_clip = batch_size, streams, frames_per_clip
        self.drop, self.seed = drop, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        windows = sum(len(samples) for samples in self.scenes) * (1 - drop) / frames_per_clip
        self.batches = max(1, round(windows / (batch_size * world_size)))

    def set_epoch(self, epoch: int) -> None:
        """To be called before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[ClipRequest]:
        rng = np.random.default_rng((self.seed, self.epoch))
        visits = self._visits(rng)
        streams = [[[] for _ in range(self.batch_size * self.world_size)] for _ in range(self.streams)]
        for batch in range(self.batches):
            for number, stream in enumerate(streams[batch % self.streams]):
                if not stream:
                    stream.extend(next(visits))
                draw = stream.pop(0)
                if number % self.world_size == self.rank:
                    yield draw

    def _visits(self, rng: np.random.Generator) -> Iterator[list[ClipRequest]]:
        """The windows of one scene after the other, without end."""
        for visit in itertools.count():
            if visit % len(self.scenes) == 0:
                order = rng.permutation(len(self.scenes))
            samples = self.scenes[order[visit % len(self.scenes)]]
            kept = samples[rng.random(len(samples)) >= self.drop]
            samples = kept if len(kept) >= self.frames_per_clip else samples
            samples = samples[rng.integers(len(samples) % self.frames_per_clip + 1) :]
            windows = samples[: len(samples) // self.frames_per_clip * self.frames_per_clip]
            windows = windows.reshape(-1, self.frames_per_clip).tolist()
            previous = [-1, *(window[-1] for window in windows)]
            yield [
                ClipRequest(tuple(w), p, (self.seed, self.epoch, visit))
                for w, p in zip(windows, previous, strict=False)
            ]


class SceneStreamSampler(Sampler):
    """Samples in the order a car meets them, one scene after the other; processes share the scenes.

    Args:
        scene_of_sample: [S] scene number of each sample, samples in time order within a scene.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(self, scene_of_sample: Sequence[int], rank: int = 0, world_size: int = 1) -> None:
        scenes = np.asarray(scene_of_sample)
        mine = np.unique(scenes)[rank::world_size]
        self.order = [int(i) for scene in mine for i in np.flatnonzero(scenes == scene)]

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)
