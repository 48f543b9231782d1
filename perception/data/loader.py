"""From files to batches: image decoding, padding, collation, and the orders in which samples are drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Sampler

from perception.errors import DataError
from perception.geometry import resample_polyline
from perception.types import Boxes, Clip, MapLine, Polylines, Scene


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


def fit_image(image: Image.Image, img_from_cam: np.ndarray, image_size: tuple[int, int]) -> tuple[Tensor, np.ndarray]:
    """An image at the network's size: scaled until it covers it, cropped at the top and equally at both sides.

    Args:
        image: of any size; one that was opened but not read yet is decoded here, as small as will do.
        img_from_cam: [3, 3] calibration in its pixels.
        image_size: height and width wanted.

    Returns:
        As `decode_image`.
    """
    H, W = image_size
    full_w, full_h = image.size
    scale = max(W / full_w, H / full_h)
    left, top = (full_w - W / scale) / 2, full_h - H / scale
    # JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, several times faster.
    image.draft("RGB", (int(np.ceil(full_w * scale)), int(np.ceil(full_h * scale))))
    shrink = 1
    while full_w > image.size[0] * shrink:
        shrink *= 2
    box = (left / shrink, top / shrink, full_w / shrink - left / shrink, full_h / shrink)
    pixels = image.convert("RGB").resize((W, H), Image.Resampling.BILINEAR, box=box)
    adapted = np.array([[scale, 0, -left * scale], [0, scale, -top * scale], [0, 0, 1]]) @ img_from_cam
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous(), adapted  # [3, H, W]


def pad_boxes(boxes: Sequence[Boxes], count: int = 0) -> Boxes:
    """Stacks the boxes of several moments, padded to the longest or to `count`: each [M_i, ...] -> [T, M, ...]."""
    return _stack_padded(boxes, max(count, *(len(part.label) for part in boxes)))


def pad_lines(lines: Sequence[Sequence[MapLine]], points_per_line: int, count: int = 0) -> Polylines:
    """Resamples the lines of several moments and stacks them, padded to the most or to `count`.

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
            )
        )
    return _stack_padded(stacked, max(count, *(len(moment) for moment in lines)))


def _stack_padded(parts: Sequence, count: int):
    """Stacks nouns along a new first axis after padding their first axis with zeros (valid: False) to `count`."""

    def padded(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor.new_zeros(count - len(tensor), *tensor.shape[1:])])

    return type(parts[0])(*(torch.stack([padded(tensor) for tensor in field]) for field in zip(*parts, strict=True)))


def collate(clips: list[Clip]) -> Clip:
    """Clips [T, ...] into one batch [B, T, ...]; truth is padded to the longest of the batch."""
    truth = Scene(
        *(
            type(parts[0])(*map(_stack_truth, zip(*parts, strict=True)))
            for parts in zip(*(clip.truth for clip in clips), strict=True)
        )
    )
    frames = _stack([clip.frames for clip in clips])
    return Clip(frames, truth, torch.stack([clip.sample_index for clip in clips]))


def _stack(nouns: list):
    if isinstance(nouns[0], Tensor):
        return torch.stack(nouns)
    return type(nouns[0])(*(_stack(list(field)) for field in zip(*nouns, strict=True)))


def _stack_truth(tensors: Sequence[Tensor]) -> Tensor:
    """[T, M_i, ...] each -> [B, T, M, ...]."""
    count = max(tensor.shape[1] for tensor in tensors)
    return torch.stack([F.pad(t, (0, 0) * (t.ndim - 2) + (0, count - t.shape[1])) for t in tensors])


class Draw(NamedTuple):
    """What a shuffled sampler yields: which clip, and the seed of the random numbers for its augmentation."""

    index: int
    seed: tuple[int, ...]


class ShuffledSampler(Sampler):
    """Clips in random order; order and augmentation depend on the seed and the epoch only.

    Nothing else enters, neither the number of workers nor what was drawn before, so a resumed run goes on as if it had
    not been interrupted.

    Args:
        length: number of clips.
        seed: of the whole run.
        rank: of this process.
        world_size: number of processes; each gets equally many clips, the first ones twice if it does not divide.
    """

    def __init__(self, length: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.length, self.seed, self.rank, self.world_size = length, seed, rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """To be called before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.length // self.world_size)

    def __iter__(self) -> Iterator[Draw]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        order = np.resize(order, len(self) * self.world_size)[self.rank :: self.world_size]
        return (Draw(int(index), (self.seed, self.epoch, int(index))) for index in order)


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
