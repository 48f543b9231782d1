"""Data loading: decodes images, pads and collates samples, and orders them for training and streaming."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Sampler

from perception.data.tables import MAX_PIXELS
from perception.errors import ConfigError, DataError
from perception.geometry import resample_polyline
from perception.inference.fitting import fit_image
from perception.types import Boxes, Clip, Data, FrameObjects, Ids, MapLine, Polylines

# Pillow runs another program to decode some of the others.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000")


def decode_image(
    path: str | Path, img_from_cam: np.ndarray, image_size: tuple[int, int], stored_size: tuple[int, int] | None = None
) -> tuple[Tensor, np.ndarray]:
    """Reads an image, fits it to the network's input size (see `fit_image`) and adapts its calibration.

    Args:
        path: an image file.
        img_from_cam: [3, 3] calibration in pixels of the stored image.
        image_size: height and width of the returned image.
        stored_size: height and width that the calibration was made for; None takes those of the file.

    Returns:
        [3, H, W] uint8 RGB, and [3, 3] float64 calibration in its pixels.

    Raises:
        DataError: the file is missing, truncated, not an image, larger than MAX_PIXELS, or its size is not
            `stored_size`.
    """
    with open_image(path, stored_size) as image:
        return fit_image(image, img_from_cam, image_size)


@contextmanager
def open_image(path: str | Path, stored_size: tuple[int, int] | None = None) -> Iterator[Image.Image]:
    """Opens an image and checks its size, which stands in its header. Its pixels are decoded when they are used.

    Args:
        path: an image file.
        stored_size: height and width that the image must have; None for any.

    Raises:
        DataError: as for `decode_image`, also for what is raised while the pixels are decoded.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            stored_w, stored_h = image.size
            if stored_w * stored_h > MAX_PIXELS:  # importing the nuScenes devkit lifts Pillow's own limit
                raise DataError(
                    f"{path} is {stored_w} x {stored_h} pixels according to its header, and at most {MAX_PIXELS:.0e} "
                    "pixels are decoded; restore the original image"
                )
            if stored_size is not None and tuple(stored_size) != (stored_h, stored_w):
                raise DataError(
                    f"{path} is {stored_w} x {stored_h} pixels, but the tables give {stored_size[1]} x {stored_size[0]}"
                    ": restore the original image or correct width and height in sample_data.json"
                )
            yield image
    except FileNotFoundError:
        raise DataError(f"{path} is missing: copy the dataset's images again") from None
    except DataError:
        raise
    except Exception as error:  # Pillow raises OSError for truncated files, and many others for damaged ones
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} cannot be read as an image ({reason}): copy it again") from None


def pad_boxes(boxes: Sequence[Boxes], count: int = 0) -> Boxes:
    """Stacks the boxes of several frames, padded to the largest number or to `count`: [M_i, ...] -> [T, M, ...]."""
    return _stack_padded(boxes, max(count, *(len(part.label) for part in boxes)))


def pad_lines(lines: Sequence[Sequence[MapLine]], points_per_line: int, count: int = 0) -> Polylines:
    """Resamples the lines of several frames and stacks them, padded to the largest number or to `count`.

    Returns:
        Polylines with points [T, M, P, 2] float32.
    """
    stacked = []
    for frame_lines in lines:
        count_in_frame = len(frame_lines)
        points = np.empty((count_in_frame, points_per_line, 2), dtype=np.float32)
        for row, line in zip(points, frame_lines, strict=True):
            row[:] = resample_polyline(line.points, points_per_line)
        closed = [len(line.points) > 2 and np.array_equal(line.points[0], line.points[-1]) for line in frame_lines]
        stacked.append(
            Polylines(
                points=torch.from_numpy(points),
                closed=torch.tensor(closed, dtype=torch.bool),
                label=torch.tensor([line.label for line in frame_lines], dtype=torch.int64),
                score=torch.tensor([line.score for line in frame_lines], dtype=torch.float32),
                valid=torch.ones(count_in_frame, dtype=torch.bool),
                uncertainty=torch.zeros(count_in_frame, points_per_line, 2),
            )
        )
    return _stack_padded(stacked, max(count, *(len(frame_lines) for frame_lines in lines)))


def _stack_padded(parts: Sequence[Data], count: int) -> Data:
    """Stacks nouns along a new first axis after padding their first axis with zeros (valid: False) to `count`."""

    def padded(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor.new_zeros(count - len(tensor), *tensor.shape[1:])])

    return type(parts[0])(*(torch.stack([padded(tensor) for tensor in field]) for field in zip(*parts, strict=True)))


def collate(clips: list[Clip]) -> Clip:
    """Collates clips [T, ...] into one batch [B, T, ...]; ground truth is padded to the largest number in the batch."""
    boxes = Boxes(*map(_stack_gt, zip(*(clip.gt.boxes for clip in clips), strict=True)))
    lines = Polylines(*map(_stack_gt, zip(*(clip.gt.lines for clip in clips), strict=True)))
    known = [clip.gt.ids.boxes + 1 for clip in clips if clip.gt.ids]  # so that padding, which is 0, becomes -1
    ids = Ids(_stack_gt(known) - 1, None) if len(known) == len(clips) else None
    gt = FrameObjects(boxes, lines, ids)
    frames = _stack([clip.frames for clip in clips])
    return Clip(frames, gt, torch.stack([clip.sample_index for clip in clips]))


def _stack(nouns: list) -> Any:
    """Stacks tensors, or the tensors of nouns field by field, along a new first axis."""
    if isinstance(nouns[0], Tensor):
        return torch.stack(nouns)
    return type(nouns[0])(*(_stack(list(field)) for field in zip(*nouns, strict=True)))


def _stack_gt(tensors: Sequence[Tensor]) -> Tensor:
    """Stacks tensors [T, M_i, ...] after padding M_i with zeros: [B, T, M, ...]."""
    count = max(tensor.shape[1] for tensor in tensors)
    return torch.stack([F.pad(t, (0, 0) * (t.ndim - 2) + (0, count - t.shape[1])) for t in tensors])


class ClipRequest(NamedTuple):
    """Request for a training clip: consecutive samples of one scene, and the seed of their augmentation."""

    samples: tuple[int, ...]
    previous: int  # sample of the memory's last frame, -1 if the memory is empty
    seed: tuple[int, ...]  # seed of the augmentation, the same along a scene


class TrainSampler(Sampler[ClipRequest]):
    """Draws clips for training with truncated backpropagation through time.

    A batch holds `batch_size` clips, each of another scene. Batches alternate between `streams` independent streams:
    batch b + streams continues batch b. Each of its elements is the next clip of the same scene or, at the end of the
    scene, the first clip of another one. Alternating matters: if consecutive steps all trained on the same street, the
    network would forget the others. Scenes come in random order.

    Order, dropped frames and augmentation depend only on the seed and the epoch. They depend neither on the number of
    workers nor on earlier draws, so a resumed run continues as if it had not been interrupted.

    Args:
        scene_of_sample: [S] scene number of each sample, samples in time order within a scene.
        batch_size: that of the DataLoader, which must keep the order.
        streams: number of independent streams.
        frames_per_clip: T, samples per clip. Scenes with fewer samples are left out. Samples that do not fill a clip
            are skipped, at random at the beginning or at the end of a scene.
        drop: probability that a sample is left out, so that the time between two frames varies.
        seed: of the whole run.
        rank: of this process.
        world_size: number of processes; they train on different scenes at any time.

    Raises:
        ConfigError: no scene has enough samples for a clip.
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
        self.epoch = self.start = 0
        clips = sum(len(samples) for samples in self.scenes) * (1 - drop) / frames_per_clip
        self.batches = max(1, round(clips / (batch_size * world_size)))

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the random numbers. Call it before each epoch."""
        self.epoch = epoch

    def set_start(self, batch: int) -> None:
        """Sets the first batch that is drawn, to continue inside of an epoch. The batches before are left out."""
        self.start = batch

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[ClipRequest]:
        rng = np.random.default_rng((self.seed, self.epoch))
        visits = self._visits(rng)
        streams: list[list[list[ClipRequest]]] = [
            [[] for _ in range(self.batch_size * self.world_size)] for _ in range(self.streams)
        ]
        for batch in range(self.batches):
            for number, pending in enumerate(streams[batch % self.streams]):
                if not pending:
                    pending.extend(next(visits))
                request = pending.pop(0)
                if batch >= self.start and number % self.world_size == self.rank:
                    yield request

    def _visits(self, rng: np.random.Generator) -> Iterator[list[ClipRequest]]:
        """Yields the clips of one scene after the other, without end."""
        for visit in itertools.count():
            if visit % len(self.scenes) == 0:
                order = rng.permutation(len(self.scenes))
            samples = self.scenes[order[visit % len(self.scenes)]]
            kept = samples[rng.random(len(samples)) >= self.drop]
            samples = kept if len(kept) >= self.frames_per_clip else samples
            samples = samples[rng.integers(len(samples) % self.frames_per_clip + 1) :]
            samples = samples[: len(samples) // self.frames_per_clip * self.frames_per_clip]
            clips = samples.reshape(-1, self.frames_per_clip).tolist()
            previous = [-1, *(clip[-1] for clip in clips)]
            yield [
                ClipRequest(tuple(clip), last, (self.seed, self.epoch, visit))
                for clip, last in zip(clips, previous, strict=False)
            ]


class SceneStreamSampler(Sampler[int]):
    """Draws samples in time order, one scene after the other; processes divide the scenes among themselves.

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
