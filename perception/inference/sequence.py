"""Runs a network over sequences of frames, with memory, as a vehicle does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from perception.data.loader import SceneStreamSampler, collate
from perception.data.nuscenes import NuScenesDataset
from perception.models import Network
from perception.types import Clip, Frame, FrameObjects, map_tensors

# What goes wrong in a stream: takes frames with leading [1, 1], the number of their scene and of their sample.
Disturbance = Callable[[Frame, int, int], Frame]


class Stream(NamedTuple):
    """What a network made of a dataset."""

    scenes: dict[str, FrameObjects]  # per sample token, on the CPU, without a batch dimension
    seconds_per_frame: float  # network and decoding, without the loading of images; the first frame is left out


@torch.inference_mode()
def run_sequence(model: Network, clips: Iterable[Clip]) -> Iterator[tuple[Clip, FrameObjects, float]]:
    """Runs a network over one frame after the other and hands its memory on; a first frame of a scene starts afresh.

    Args:
        model: in evaluation mode.
        clips: [B=1, T=1] each, in time order.

    Yields:
        Each clip, the FrameObjects without leading dimensions on the CPU, and the seconds for network and decoding.
    """
    device = next(model.parameters()).device
    state = model.initial_state(1)
    for clip in clips:
        frame = map_tensors(lambda tensor: tensor[:, 0].to(device), clip.frames)
        start = _now(device)
        prediction, state = model(frame, state)
        scene = model.decode(prediction)
        seconds = _now(device) - start
        yield clip, map_tensors(lambda tensor: tensor[0].cpu(), scene), seconds


def predict_stream(
    model: Network,
    dataset: NuScenesDataset,
    *,
    disturb: Disturbance | None = None,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    progress: bool = False,
) -> Stream:
    """Runs a network over a dataset scene by scene, one frame at a time, on the device of its weights.

    Args:
        model: in evaluation mode.
        dataset: whose scenes are streamed.
        disturb: changes every frame before the network sees it, in the process that loads the images.
        rank, world_size: where several processes share the work, each takes its share of whole scenes.
        workers: processes that load images.
        progress: show a progress bar on stderr.

    Raises:
        DataError: an image or a calibration is missing or malformed.
    """
    sampler = SceneStreamSampler(dataset.scene_of_sample, rank, world_size)
    together = collate if disturb is None else partial(_disturbed, disturb, dataset.scene_of_sample)
    loader = DataLoader(dataset, batch_size=1, sampler=sampler, collate_fn=together, num_workers=workers)
    tokens = dataset.tokens
    scenes, seconds = {}, []
    clips = tqdm(loader, desc="frames", unit="frame", disable=not progress)
    for clip, scene, spent in run_sequence(model, clips):
        scenes[tokens[int(clip.sample_index)]] = scene
        seconds.append(spent)
    return Stream(scenes, float(np.mean(seconds[1:] or seconds or [np.nan])))


def _disturbed(disturb: Disturbance, scene_of_sample: np.ndarray, clips: list[Clip]) -> Clip:
    clip = collate(clips)
    sample = int(clip.sample_index)
    return clip._replace(frames=disturb(clip.frames, int(scene_of_sample[sample]), sample))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
