"""Writes the predictions of a recording: JSON lines, pictures and a video."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from perception.errors import ConfigError, DataError
from perception.files import new_folder
from perception.inference.predictor import Predictor
from perception.reading import nearest
from perception.recordings.predicting import PredictedFrame, predict_frames
from perception.recordings.recording import FramePlan, Recording
from perception.recordings.videos import VideoWriter
from perception.rigs.rig import Rig
from perception.visualization.live import draw_live

JPEG_QUALITY = 90  # of images in .rrd and .mcap
Result = TypeVar("Result")


class Output(Protocol):
    """A file, or a folder of files, that holds the predictions of a recording."""

    def add(self, frame: PredictedFrame) -> None:
        """Appends a frame."""

    def close(self) -> None:
        """Finishes the file."""


class JsonLines:
    """Results as JSON, one line per frame (`LiveObjects.to_json`)."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def add(self, frame: PredictedFrame) -> None:
        self._file.write(frame.objects.to_json() + "\n")

    def close(self) -> None:
        self._file.close()


class Pictures:
    """A PNG per frame, named by the number of the frame and its time in nanoseconds."""

    def __init__(self, folder: Path, picture: Callable[[PredictedFrame], Image.Image]) -> None:
        folder.mkdir()
        self._folder, self._picture, self._count = folder, picture, 0

    def add(self, frame: PredictedFrame) -> None:
        self._picture(frame).save(self._folder / f"{self._count:06d}_{frame.recorded.time_ns}.png")
        self._count += 1

    def close(self) -> None:
        pass


class Video:
    """An MP4 of the pictures, with the times of the frames."""

    def __init__(self, path: Path, picture: Callable[[PredictedFrame], Image.Image]) -> None:
        self._writer, self._picture = VideoWriter(path), picture
        self._first: int | None = None

    def add(self, frame: PredictedFrame) -> None:
        self._first = frame.recorded.time_ns if self._first is None else self._first
        self._writer.add(np.asarray(self._picture(frame)), frame.recorded.time_ns - self._first)

    def close(self) -> None:
        self._writer.close()


class OncePerFrame(Generic[Result]):
    """Calls a function of a frame once, although several outputs need its result."""

    def __init__(self, function: Callable[[PredictedFrame], Result]) -> None:
        self._function = function
        self._last: tuple[PredictedFrame, Result] | None = None

    def __call__(self, frame: PredictedFrame) -> Result:
        """Returns the result for a frame."""
        if self._last is None or self._last[0] is not frame:
            self._last = frame, self._function(frame)
        return self._last[1]


def picture_of(frame: PredictedFrame, rig: Rig, note: str) -> Image.Image:
    """Draws a frame, with the cameras where they were when they exposed.

    Args:
        frame: to draw.
        rig: the physical cameras.
        note: what limits the predictions, in red; empty for none.
    """
    motion = frame.recorded.ego_from_exposure
    cameras = [
        replace(camera, ego_from_cam=motion[camera.name] @ camera.ego_from_cam) if camera.name in motion else camera
        for camera in rig
    ]
    notes = (note,) if note else ()
    objects = frame.objects._replace(warnings=(*notes, *frame.objects.warnings))
    return draw_live(frame.recorded.images, Rig(cameras), objects, min_score=0.0)


def encoded_images(frame: PredictedFrame) -> list[bytes | None]:
    """Returns the image of each pinhole as JPEG; None for an absent one."""
    return [None if image is None else _jpeg(image) for image in frame.images]


def _jpeg(image: NDArray[np.uint8]) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "JPEG", quality=JPEG_QUALITY)
    return data.getvalue()


FORMATS = ("jsonl", "pictures", "mp4", "rrd", "mcap")
FILES = {
    "jsonl": "results.jsonl", "pictures": "pictures", "mp4": "video.mp4", "rrd": "recording.rrd",
    "mcap": "recording.mcap",
}  # fmt: skip
DEFAULT_FORMATS = ("jsonl", "pictures", "mp4")


def parsed_formats(text: str) -> tuple[str, ...]:
    """Parses names of formats that are separated by commas.

    Raises:
        ConfigError: a name is not one of `FORMATS`.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in FORMATS:
            raise ConfigError(f"--write has {name!r}; {nearest(name, FORMATS)}")
    if not names:
        raise ConfigError(f"--write names no format; give some of {', '.join(FORMATS)}")
    return tuple(dict.fromkeys(names))


class Outputs:
    """Writes several formats into one folder.

    Args:
        folder: an existing folder.
        formats: some of `FORMATS`.
        rig: the physical cameras.
        note: what limits the predictions, in red on the pictures.

    Raises:
        ConfigError: a package is not installed.
    """

    def __init__(self, folder: Path, formats: Sequence[str], rig: Rig, note: str = "") -> None:
        from perception.recordings.mcap_file import McapFile
        from perception.recordings.rerun_file import RerunFile

        painter = OncePerFrame(lambda frame: picture_of(frame, rig, note))
        encoder = OncePerFrame(encoded_images)
        makers: dict[str, Callable[[Path], Output]] = {
            "jsonl": JsonLines,
            "pictures": lambda path: Pictures(path, painter),
            "mp4": lambda path: Video(path, painter),
            "rrd": lambda path: RerunFile(path, encoder),
            "mcap": lambda path: McapFile(path, encoder),
        }
        self._outputs: list[Output] = []
        with ExitStack() as stack:
            for format in formats:
                output = makers[format](folder / FILES[format])
                stack.callback(output.close)
                self._outputs.append(output)
            self._stack = stack.pop_all()

    def add(self, frame: PredictedFrame) -> None:
        """Appends a frame to all of them."""
        for output in self._outputs:
            output.add(frame)

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class Summary(NamedTuple):
    """What was predicted of a recording."""

    frames: int
    with_memory: int  # frames in which the network used its memory
    without_pose: int  # frames whose pose is not known
    boxes: int  # of all frames
    lines: int
    images: dict[str, int]  # number of frames in which a camera has an image


def write_predictions(
    predictor: Predictor,
    recording: Recording,
    out: str | Path,
    *,
    rig: Rig | None = None,
    plan: Sequence[FramePlan] | None = None,
    formats: Sequence[str] = DEFAULT_FORMATS,
    note: str = "",
    progress: bool = False,
) -> Summary:
    """Predicts the frames of a recording and writes the results into a folder, which appears when it is complete.

    Args:
        predictor: made without a rig; its `min_score` decides what is written.
        recording: from `open_recording`.
        out: folder to create; it must not exist, or be empty.
        rig: the cameras; None for those of the recording.
        plan: from `Recording.plan`; None for all frames.
        formats: some of `FORMATS`; `FILES` has the names of their files.
        note: what limits the predictions, in red on the pictures.
        progress: show a progress bar on stderr.

    Raises:
        ConfigError: a package is not installed.
        DataError: there is no rig, an image cannot be decoded or has another size than in the rig, or `out` is not
            empty.
    """
    if (rig := rig or recording.rig) is None:
        raise DataError(f"{recording.name} holds no calibration; give a rig")
    plan = recording.plan() if plan is None else plan
    images = dict.fromkeys(rig.names, 0)
    with_memory = without_pose = boxes = lines = 0
    with new_folder(out) as folder, Outputs(folder, formats, rig, note) as outputs:
        frames = predict_frames(predictor, rig, recording.frames(plan))
        for frame in tqdm(frames, total=len(plan), desc="frames", unit="frame", disable=not progress):
            outputs.add(frame)
            with_memory += frame.objects.info.used_memory
            without_pose += frame.recorded.global_from_ego is None
            boxes, lines = boxes + len(frame.objects.boxes.score), lines + len(frame.objects.lines.score)
            for camera in frame.recorded.images:
                images[camera] += 1
    return Summary(len(plan), with_memory, without_pose, boxes, lines, images)
