"""Videos through PyAV: one per camera."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perception.errors import DataError, not_installed
from perception.recordings.folders import described_by
from perception.recordings.recording import FramePlan, Image, Recording, checked_times, chosen_streams
from perception.recordings.trajectory import read_trajectory
from perception.rigs.rig import Rig

SUFFIXES = frozenset((".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v", ".ts", ".mjpeg", ".mpg", ".h264", ".hevc"))
MICROSECONDS = Fraction(1, 1_000_000)


def read_videos(
    paths: Sequence[Path],
    rig: Rig | None = None,
    streams: Mapping[str, str] | None = None,
    *,
    fps: float | None = None,
    start: float = 0.0,
    poses: Path | None = None,
) -> Recording:
    """Reads videos, one per camera.

    Args:
        paths: the files, with the names of the cameras in their names; or one folder of them.
        rig: the cameras; None for those of `rig.yaml` in the folder of the videos.
        streams: file name of each camera, where names do not tell.
        fps: images per second; None for the times in the files.
        start: seconds that are added to the times, as poses may have another zero.
        poses: trajectory file; None for `poses.txt` in the folder of the videos, if it is there.

    Raises:
        ConfigError: PyAV is not installed.
        DataError: a video cannot be read, or belongs to no camera, or there is no rig.
    """
    if len(paths) == 1 and paths[0].is_dir():
        paths = sorted(path for path in paths[0].iterdir() if path.suffix.lower() in SUFFIXES)
    name = str(paths[0]) if len(paths) == 1 else f"{paths[0].parent} ({len(paths)} videos)"
    rig, poses = described_by(paths[0].parent, rig, poses, name, "next to the videos")
    names = [path.name for path in paths]
    files = {path.name if names.count(path.name) == 1 else str(path): path for path in paths}
    given = {camera: Path(file).name if file not in files else file for camera, file in (streams or {}).items()}
    of_camera = {camera: files[label] for camera, label in chosen_streams(files, rig.names, given, name).items()}
    times = {camera: _times(path, fps, start) for camera, path in of_camera.items()}
    trajectory = None if poses is None else read_trajectory(poses)
    return Recording(name, times, partial(_decode, of_camera), trajectory, rig)


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Opens a video with PyAV: the container and its first video stream.

    Raises:
        ConfigError: PyAV is not installed.
        DataError: the file is missing, damaged, or holds no video, also for what is raised while it is read.
    """
    try:
        import av
    except ImportError as error:
        raise not_installed(error) or error from None
    if not path.exists():
        raise DataError(f"{path} does not exist; give a video")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path} holds no video; give a video file")
            stream = container.streams.video[0]
            yield container, stream
    except (av.error.FFmpegError, ValueError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} cannot be read as a video ({reason}); copy it again, or convert it to MP4") from None


def _times(path: Path, fps: float | None, start: float) -> NDArray[np.int64]:
    """Presentation times of the images, from the packets alone."""
    with opened(path) as (container, stream):
        base, stamps = stream.time_base, []
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                stamps.append(packet.pts)
    if fps is not None:
        found = [round((start + k / fps) * 1e9) for k in range(len(stamps))]
    elif None in stamps or base is None:
        raise DataError(f"{path} holds no times; give --fps")
    else:
        offset = round(start * 1e9)
        found = sorted(offset + int(stamp * base * 1_000_000_000) for stamp in stamps)
    return checked_times(found, str(path))


def _decode(paths: Mapping[str, Path], plan: Sequence[FramePlan]) -> Iterator[dict[str, Image]]:
    """Decodes all videos side by side, each of them once from its beginning."""
    videos = {camera: _images(path) for camera, path in paths.items()}
    last: dict[str, tuple[int, Any]] = {}
    try:
        for planned in plan:
            found = {}
            for camera, k in planned.images.items():
                while last.get(camera, (-1,))[0] < k:
                    if (found_next := next(videos[camera], None)) is None:
                        raise DataError(f"{paths[camera]} ends before its image {k}; it is damaged, copy it again")
                    last[camera] = found_next
                found[camera] = last[camera][1].to_ndarray(format="rgb24")
            yield found
    finally:
        for video in videos.values():
            video.close()


def _images(path: Path) -> Generator[tuple[int, Any], None, None]:
    with opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        yield from enumerate(container.decode(stream))


class VideoWriter:
    """Writes an MP4 (H.264) with the times of its images.

    Args:
        path: the file.
        quality: constant rate factor of x264, 0 (without loss) to 51.

    Raises:
        ConfigError: PyAV is not installed.
    """

    def __init__(self, path: Path, quality: int = 20) -> None:
        try:
            import av
        except ImportError as error:
            raise not_installed(error) or error from None
        self._av, self._quality = av, quality
        self._container = av.open(str(path), "w", format="mp4")
        self._stream: Any = None

    def add(self, image: Image, time_ns: int) -> None:
        """Appends an image [H, W, 3]; its sides are cut to even numbers of pixels, as H.264 has them.

        Args:
            image: uint8 RGB, of the size of the first one.
            time_ns: later than that of the image before; 0 is the beginning of the video.
        """
        height, width = (side // 2 * 2 for side in image.shape[:2])
        if self._stream is None:
            # B-frames would shift the times of a file.
            options = {"crf": str(self._quality), "preset": "veryfast", "bf": "0"}
            self._stream = self._container.add_stream("libx264", rate=30, options=options)
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
            self._stream.codec_context.time_base = self._stream.time_base = MICROSECONDS
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(image[:height, :width]), format="rgb24")
        frame.pts, frame.time_base = round(time_ns / 1000), MICROSECONDS
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Finishes the file."""
        if self._stream is not None:
            self._container.mux(self._stream.encode(None))
        self._container.close()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
