"""Groups the images of several cameras to frames while they arrive."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from perception.errors import ConfigError
from perception.recordings.recording import TOLERANCE

PATIENCE_S = 0.1  # a frame waits no longer for an image
ALIVE_S = 1.0  # a camera that has sent nothing for so long is not waited for


class AssembledFrame(NamedTuple):
    """Images that belong together."""

    time_ns: int  # of the image of the reference camera
    images: dict[str, tuple[int, Any]]  # by camera: its own time, and its image; missing cameras are left out
    restarted: bool  # the clock went back: nothing before belongs to this frame


class FrameAssembler:
    """Groups images by their times: the nearest image of each camera to each image of a reference camera.

    These are the frames of `Recording.plan`. A frame is complete when every camera that is alive has sent an image
    of its time or later, or when `PATIENCE_S` have passed, by the times of the images. If the reference camera falls
    silent, the next camera takes its place. Images that come late or out of order are dropped; if the clock goes back
    by more than `ALIVE_S`, as when a recording is played again, the assembler starts anew.

    Args:
        cameras: names; the first one that is alive is the reference.

    Raises:
        ConfigError: there is no camera, or a name stands twice.
    """

    def __init__(self, cameras: Sequence[str]) -> None:
        if not cameras or len(set(cameras)) != len(cameras):
            raise ConfigError(f"the cameras are {', '.join(cameras) or 'none'}; give names that differ")
        self._cameras = tuple(cameras)
        self._restarted = False
        self._clear()

    def _clear(self) -> None:
        self._images: dict[str, deque[tuple[int, Any]]] = {camera: deque() for camera in self._cameras}
        self._newest = dict.fromkeys(self._cameras, -1)  # time of the newest image
        self._heard: dict[str, int] = {}  # the same, but that of the very first image for a camera without any
        self._done = -(10**18)  # time of the last frame; before all times at first
        self._reference: str | None = None  # of the last frame

    def add(self, camera: str, time_ns: int, image: Any) -> list[AssembledFrame]:
        """Adds an image and returns the frames that are complete now, in the order of time.

        Args:
            camera: one of the names.
            time_ns: of the exposure, nanoseconds.
            image: anything.

        Raises:
            ConfigError: there is no such camera.
        """
        if camera not in self._images:
            raise ConfigError(f"there is no camera {camera!r}; the cameras are {', '.join(self._cameras)}")
        newest = max(self._newest.values())
        if time_ns < newest - ALIVE_S * 1e9:
            self._clear()
            self._restarted = True
        elif time_ns <= self._newest[camera]:
            return []
        self._images[camera].append((time_ns, image))
        self._newest[camera] = time_ns
        self._heard = self._heard or dict.fromkeys(self._cameras, time_ns)
        self._heard[camera] = time_ns
        frames = []
        while frame := self._next():
            frames.append(frame)
        return frames

    def _next(self) -> AssembledFrame | None:
        newest = max(self._newest.values())
        alive = [camera for camera in self._cameras if self._heard[camera] >= newest - ALIVE_S * 1e9]
        tolerance = round(TOLERANCE * 1e9)
        times = [time for time, _ in self._images[alive[0]]]
        since = self._done
        if alive[0] != self._reference:
            since += tolerance  # not the last frame again
            if alive[0] != self._cameras[0] and len(times) > 1:
                since = max(since, times[-2])  # nor all that came while the first camera was waited for
        time = next((time for time in times if time > since), None)
        if time is None:
            return None
        is_settled = all(self._newest[camera] >= time for camera in alive)
        if not is_settled and newest < time + PATIENCE_S * 1e9:
            return None
        images = {}
        for camera, stream in self._images.items():
            nearest = min(stream, key=lambda entry: abs(entry[0] - time), default=None)  # the earlier of equal ones
            if nearest is not None and abs(nearest[0] - time) <= tolerance:
                images[camera] = nearest
            while stream and stream[0][0] < time - 2 * tolerance:
                stream.popleft()
        frame = AssembledFrame(time, images, self._restarted)
        self._done, self._reference, self._restarted = time, alive[0], False
        return frame
