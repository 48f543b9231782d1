"""Inference over a dataset in several processes that `perception.engine.launchers` has joined.

In a process that has joined no others, every function here does the work of one process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from torch import distributed

from perception.data.nuscenes import NuScenesDataset
from perception.errors import PerceptionError
from perception.inference.sequence import Disturbance, Stream, predict_stream
from perception.models.base import InferenceNetwork

Result = TypeVar("Result")


def rank_and_size() -> tuple[int, int]:
    """Returns the number of this process and how many processes have joined."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def predict_shared(
    model: InferenceNetwork,
    dataset: NuScenesDataset,
    *,
    disturb: Disturbance | None = None,
    workers: int = 0,
    progress: bool = False,
) -> Stream:
    """Runs a network over a dataset as `predict_stream` does, and shares the scenes among all processes.

    Args:
        model, dataset, disturb: as in `predict_stream`.
        workers: processes that load images, for each of the processes.
        progress: show a progress bar of process 0 on stderr.

    Returns:
        The predictions of all processes, in each of them, in the order of the dataset; and the mean time of a frame.

    Raises:
        DataError: an image or a calibration is missing or malformed; the other processes exit with code 2.
    """
    rank, size = rank_and_size()
    arguments: dict[str, Any] = {"disturb": disturb, "workers": workers}
    if size == 1:
        return predict_stream(model, dataset, progress=progress, **arguments)
    part: Stream | PerceptionError
    try:
        part = predict_stream(model, dataset, rank=rank, world_size=size, progress=progress and rank == 0, **arguments)
    except PerceptionError as error:
        part = error
    parts: list[Any] = [None] * size
    distributed.all_gather_object(parts, part)
    streams = [_or_raise(part) for part in parts]
    found = {token: objects for stream in streams for token, objects in stream.objects.items()}
    seconds = [stream.seconds_per_frame for stream in streams if stream.objects]
    # In the order of one process: an evaluation that sorts by score keeps the order of equal scores.
    return Stream({token: found[token] for token in dataset.tokens if token in found}, float(np.mean(seconds)))


def from_first(make: Callable[[], Result]) -> Result:
    """Calls a function in process 0 only and returns its result in all processes.

    Raises:
        PerceptionError: what the function raised, in process 0; the other processes exit with code 2.
    """
    rank, size = rank_and_size()
    if size == 1:
        return make()
    results: list[Any] = [None]
    if rank == 0:
        try:
            results = [make()]
        except PerceptionError as error:
            results = [error]
    distributed.broadcast_object_list(results)
    result: Result | PerceptionError = results[0]
    return _or_raise(result)


def _or_raise(result: Result | PerceptionError) -> Result:
    """Returns a result, or raises the error in its place: in process 0 alone, so that its sentence appears once."""
    if not isinstance(result, PerceptionError):
        return result
    if rank_and_size()[0] == 0:
        raise result
    sys.exit(2)
