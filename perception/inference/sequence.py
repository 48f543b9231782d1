"""Runs a network over the frames of a dataset in time order, with its memory, as in a vehicle."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from tqdm import tqdm

from perception.data.loader import SceneStreamSampler, collate
from perception.data.nuscenes import NuScenesDataset
from perception.inference.ego_motion import FIRST_FRAME
from perception.inference.fixed_rig import FixedRig
from perception.inference.live import NO_MEMORY_IN_NETWORK
from perception.inference.visibility import SeenMap
from perception.models.base import InferenceNetwork, remembers
from perception.types import Clip, Frame, FrameObjects, LiveObjects, NumpyCameraRig, Seen, StepInfo, map_tensors

# Changes frames with leading [1, 1] before the network sees them, given the number of their scene and of their sample.
Disturbance = Callable[[Frame, int, int], Frame]


class Stream(NamedTuple):
    """The predictions of a network for all frames of a dataset."""

    objects: dict[str, FrameObjects]  # by sample token, on the CPU, without batch dimension
    seconds_per_frame: float  # mean latency of network and decoding without image loading; excludes the first frame


@torch.inference_mode()
def run_sequence(model: InferenceNetwork, clips: Iterable[Clip]) -> Iterator[tuple[Clip, FrameObjects, float]]:
    """Runs a network on one frame after another and passes its memory on; the first frame of a scene ignores it.

    Args:
        model: in evaluation mode.
        clips: with leading [B=1, T=1], in time order.

    Yields:
        Each clip, its predictions without leading dimensions on the CPU, and the seconds for network and decoding.
    """
    device = next(model.parameters()).device
    state, fixed_rig = model.initial_state(1), FixedRig(model)
    for clip in clips:
        frame = map_tensors(lambda tensor: tensor[:, 0].to(device), clip.frames)
        start = _now(device)
        prediction, state = model(frame, state, *fixed_rig(frame))
        objects = model.decode(prediction)
        seconds = _now(device) - start
        yield clip, map_tensors(lambda tensor: tensor[0].cpu(), objects), seconds


@torch.inference_mode()
def run_sequence_seen(model: InferenceNetwork, clips: Iterable[Clip]) -> Iterator[tuple[Clip, LiveObjects, float]]:
    """As `run_sequence`, also with what the cameras see of the predictions now and have seen before."""
    has_memory = remembers(model)
    seen_map = SeenMap(has_memory)
    for clip, objects, seconds in run_sequence(model, clips):
        frame = map_tensors(lambda tensor: tensor[0, 0], clip.frames)
        rig = NumpyCameraRig(*(tensor.numpy() for tensor in frame.rig))
        H, W = frame.images.shape[-2:]
        view = seen_map.look(rig, (H, W), frame.ego_from_prev.numpy(), bool(frame.is_first))
        seen_map.keep(view)
        seen = Seen(*map(torch.from_numpy, view.of_objects(objects)))
        reason = NO_MEMORY_IN_NETWORK if not has_memory else FIRST_FRAME if frame.is_first else ""
        info = StepInfo(used_memory=not reason, no_memory_because=reason)
        ids = map_tensors(torch.Tensor.numpy, objects.ids)
        yield clip, LiveObjects(objects.boxes, objects.lines, seen, (), info, ids), seconds


def predict_stream(
    model: InferenceNetwork,
    dataset: NuScenesDataset,
    *,
    disturb: Disturbance | None = None,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    progress: bool = False,
) -> Stream:
    """Runs a network over the scenes of a dataset, one frame at a time, on the device of its weights.

    Args:
        model: in evaluation mode.
        dataset: with the scenes to run over.
        disturb: changes each frame before the network sees it; runs in the process that loads the images.
        rank, world_size: index of this process and number of processes; each of them takes a share of the scenes.
        workers: number of processes that load images.
        progress: show a progress bar on stderr.

    Raises:
        DataError: an image or a calibration is missing or malformed.
    """
    sampler = SceneStreamSampler(dataset.scene_of_sample.tolist(), rank, world_size)
    collate_fn = collate if disturb is None else partial(_collate_disturbed, disturb, dataset.scene_of_sample)
    loader = DataLoader(dataset, batch_size=1, sampler=sampler, collate_fn=collate_fn, num_workers=workers)
    tokens = dataset.tokens
    predictions, seconds = {}, []
    clips = tqdm(loader, desc="frames", unit="frame", disable=not progress)
    for clip, objects, latency in run_sequence(model, clips):
        predictions[tokens[int(clip.sample_index)]] = objects
        seconds.append(latency)
    return Stream(predictions, float(np.mean(seconds[1:] or seconds or [np.nan])))


def _collate_disturbed(disturb: Disturbance, scene_of_sample: NDArray[np.int64], clips: list[Clip]) -> Clip:
    clip = collate(clips)
    sample = int(clip.sample_index)
    return clip._replace(frames=disturb(clip.frames, int(scene_of_sample[sample]), sample))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
