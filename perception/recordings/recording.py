"""Recordings: the images of several cameras over time, and the frames that they make together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from perception.errors import ConfigError, DataError
from perception.geometry import invert_rigid
from perception.reading import nearest
from perception.recordings.trajectory import Trajectory
from perception.rigs.rig import Rig

TOLERANCE = 0.05  # seconds between an image and the time of its frame
Image = NDArray[np.uint8]  # [H, W, 3] RGB


class FramePlan(NamedTuple):
    """Which images make up a frame."""

    time_ns: int
    images: dict[str, int]  # number of the image in the stream of each camera that has one


class RecordedFrame(NamedTuple):
    """One frame of a recording."""

    time_ns: int
    images: dict[str, Image]  # by camera; a camera without an image at this time is missing
    global_from_ego: NDArray[np.float64] | None  # [4, 4] at `time_ns`, metres; None if it is not known
    # [4, 4] by camera: takes points of the ego frame at its exposure to that at `time_ns`; identity if unknown
    ego_from_exposure: dict[str, NDArray[np.float64]]

    @property
    def time_s(self) -> float:
        """The time in seconds."""
        return self.time_ns * 1e-9


@dataclass(frozen=True, eq=False)
class Recording:
    """The images of several cameras over time. Images are decoded while the frames are iterated.

    Attributes:
        name: of the file or folder, for messages.
        times_ns: [K] int64 nanoseconds, rising, of the images of each camera.
        decode: returns the images of one planned frame after another. They come in the order of time.
        trajectory: poses of the vehicle; None if the recording has none.
        rig: calibration of the cameras; None if the recording has none.
        other_times_ns: times of streams that are no cameras, such as a LiDAR, by name.
        reference: the camera or other stream whose times are those of the frames; None to choose a camera.
        notes: what a person should know about how the recording was read.
    """

    name: str
    times_ns: Mapping[str, NDArray[np.int64]]
    decode: Callable[[Sequence[FramePlan]], Iterator[dict[str, Image]]]
    trajectory: Trajectory | None = None
    rig: Rig | None = None
    other_times_ns: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    reference: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the cameras."""
        return tuple(self.times_ns)

    def plan(
        self,
        *,
        reference: str | None = None,
        tolerance: float = TOLERANCE,
        rate: float | None = None,
        count: int | None = None,
    ) -> list[FramePlan]:
        """Groups the images to frames: one for each time of the reference, with the nearest image of each camera.

        Args:
            reference: the camera, or other stream, whose times are those of the frames. None for that of the recording,
                or else the camera with the fewest images per second, which loses none of its images.
            tolerance: seconds between an image and the time of its frame; an image farther away is not used.
            rate: frames per second; frames between are left out. None for all.
            count: at most so many frames; None for all.

        Raises:
            ConfigError: there is no such reference.
            DataError: no camera has an image near a time of the reference.
        """
        everything = {**self.other_times_ns, **self.times_ns}
        reference = reference or self.reference
        if reference is None:
            reference = max(self.times_ns, key=lambda camera: _period(self.times_ns[camera]))  # the first of equal ones
        if reference not in everything:
            raise ConfigError(
                f"{self.name} has no {reference!r} to take the times from; {nearest(reference, everything)}"
            )
        found: list[FramePlan] = []
        for time in map(int, _thinned(everything[reference], rate)):
            images = {}
            for camera, times in self.times_ns.items():
                k = _nearest(times, time)
                if abs(int(times[k]) - time) <= tolerance * 1e9:
                    images[camera] = k
            if images:
                found.append(FramePlan(time, images))
            if len(found) == count:
                break
        if not found:
            raise DataError(
                f"{self.name}: no camera has an image within {tolerance:g} s of a time of {reference}; are their "
                "clocks the same? Give another reference, or a larger tolerance"
            )
        return found

    def frames(self, plan: Sequence[FramePlan] | None = None) -> Iterator[RecordedFrame]:
        """Yields the frames in the order of time.

        Args:
            plan: from `plan`; None for all frames with the default settings.

        Raises:
            DataError: an image cannot be decoded.
        """
        plan = self.plan() if plan is None else plan
        for planned, images in zip(plan, self.decode(plan), strict=True):
            pose = None if self.trajectory is None else self.trajectory.at(planned.time_ns)
            motion = {camera: np.eye(4) for camera in images}
            for camera in images if pose is not None else ():
                assert self.trajectory is not None and pose is not None
                exposed = self.trajectory.at(int(self.times_ns[camera][planned.images[camera]]))
                if exposed is not None:
                    motion[camera] = invert_rigid(pose) @ exposed
            yield RecordedFrame(planned.time_ns, images, pose, motion)

    def __iter__(self) -> Iterator[RecordedFrame]:
        return self.frames()


def _period(times: NDArray[np.int64]) -> float:
    """Mean nanoseconds between images; infinite for one image."""
    return float(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else np.inf


def _nearest(times: NDArray[np.int64], time: int) -> int:
    after = int(np.searchsorted(times, time))
    if after == len(times) or (after and time - times[after - 1] <= times[after] - time):
        return after - 1
    return after


def _thinned(times: NDArray[np.int64], rate: float | None) -> Iterable[int]:
    """Yields the first time of each step of a grid with `rate` steps per second; all times without a rate.

    A time may be a quarter of a step early, as times are never exact.
    """
    last = None
    for time in times.tolist():
        step = time if rate is None else int((time - int(times[0])) * 1e-9 * rate + 0.25)
        if step != last:
            yield time
        last = step


def checked_times(times_ns: Sequence[int], where: str) -> NDArray[np.int64]:
    """Returns the times of a stream as an array.

    Raises:
        DataError: there are none, or they do not rise; `where` names the stream.
    """
    times = np.asarray(times_ns, dtype=np.int64)
    if not len(times):
        raise DataError(f"{where} holds no images; give one with images")
    wrong = np.flatnonzero(np.diff(times) <= 0)
    if len(wrong):
        k = int(wrong[0])
        raise DataError(
            f"{where}: image {k + 1} has the time {times[k + 1] * 1e-9:.6f} s, and the one before "
            f"{times[k] * 1e-9:.6f}; times must rise"
        )
    return times


def chosen_streams(
    labels: Iterable[str], cameras: Sequence[str] | None, given: Mapping[str, str], where: str
) -> dict[str, str]:
    """Returns the label of the stream of each camera: a topic, a folder or a file.

    A label belongs to the camera whose name stands in it, as a whole and in any case: `/sensing/cam_front/image_raw`
    to `CAM_FRONT`. Of several names the longest counts, so that `CAM_FRONT_LEFT` is not `CAM_FRONT`.

    Args:
        labels: of the streams.
        cameras: names of the cameras of the rig; None if there is none, and every label is a camera.
        given: labels by camera that the user gave.
        where: names the recording, for messages.

    Raises:
        DataError: a label or a camera of `given` does not exist, two labels belong to one camera, or none to any.
    """
    labels = list(labels)
    for name, label in given.items():
        if cameras is not None and name not in cameras:
            raise DataError(f"--cameras names {name!r}, and the rig has no such camera; {nearest(name, cameras)}")
        if label not in labels:
            raise DataError(f"{where} has no {label!r} for the camera {name}; {nearest(label, labels)}")
    if cameras is None:
        return dict(given) or {label: label for label in labels}
    found = dict(given)
    for label in labels:
        camera = None if label in given.values() else named_camera(label, cameras)
        if camera is None or camera in given:
            continue
        if camera in found:
            raise DataError(
                f"{where}: {found[camera]} and {label} both look like the camera {camera}; choose with "
                f"--cameras {camera}={label}"
            )
        found[camera] = label
    if not found and len(labels) == len(cameras) == 1:
        found = {cameras[0]: labels[0]}
    if not found:
        raise DataError(
            f"{where} has {', '.join(labels) or 'no images'}, and the rig the cameras {', '.join(cameras)}; say which "
            f"is which, as --cameras {cameras[0]}={labels[0] if labels else 'NAME'}"
        )
    return {camera: found[camera] for camera in cameras if camera in found}


def named_camera(label: str, cameras: Iterable[str]) -> str | None:
    """Returns the camera whose name stands in a label, see `chosen_streams`; None for none."""
    words = f"_{_plain(label)}_"
    inside = [camera for camera in cameras if f"_{_plain(camera)}_" in words]
    return max(inside, key=lambda camera: len(_plain(camera)), default=None)


def _plain(text: str) -> str:
    return "_".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
