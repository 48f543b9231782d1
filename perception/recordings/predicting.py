"""Runs a network over the frames of a recording."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from perception.inference.predictor import Predictor
from perception.recordings.recording import RecordedFrame
from perception.rigs.rig import Rig
from perception.rigs.virtual import virtual_rig
from perception.types import LiveObjects, NumpyBoxes, NumpyCameraRig, NumpyFrameObjects, NumpyPolylines


class PredictedFrame(NamedTuple):
    """One frame of a recording with its prediction."""

    recorded: RecordedFrame
    # What the network sees: a pinhole is a camera, or a part of one, see `perception.rigs.virtual`.
    names: tuple[str, ...]  # of the pinholes
    images: list[NDArray[np.uint8] | None]  # [H, W, 3] of each pinhole, None for an absent one
    rig: NumpyCameraRig  # of these images, at the time of the frame
    objects: LiveObjects


def predict_frames(predictor: Predictor, rig: Rig, frames: Iterable[RecordedFrame]) -> Iterator[PredictedFrame]:
    """Yields the predictions of the frames of a recording.

    Each camera's pose is that at its own exposure, carried to the time of the frame. A frame whose pose is not known
    is predicted without memory, and its result says so.

    Args:
        predictor: made without a rig.
        rig: the cameras.
        frames: in the order of time.

    Raises:
        DataError: an image has another size than in the rig, or a pose or time is out of range.

    Warns:
        PerceptionWarning: as `virtual_rig` and `Predictor.step` do.
    """
    virtual = virtual_rig(rig, predictor.model.config.image_size)
    virtual.make_tables()
    names = virtual.names
    predictor.name_cameras([camera.source.name for camera in virtual.cameras], rig.ego_from_lidar)
    predictor.reset()
    for recorded in frames:
        images, pinholes = virtual.frame(recorded.images)
        moved = np.stack([recorded.ego_from_exposure.get(c.source.name, np.eye(4)) for c in virtual.cameras])
        objects = predictor.step(images, pinholes, recorded.global_from_ego, recorded.time_s, ego_from_exposure=moved)
        carried = pinholes._replace(ego_from_cam=moved @ pinholes.ego_from_cam)
        yield PredictedFrame(recorded, names, images, carried, objects)


def as_arrays(objects: LiveObjects) -> NumpyFrameObjects:
    """Returns boxes and lines as numpy arrays."""
    return NumpyFrameObjects(
        NumpyBoxes(*map(np.asarray, objects.boxes)), NumpyPolylines(*map(np.asarray, objects.lines))
    )
