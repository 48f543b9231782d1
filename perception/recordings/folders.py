"""Folders of images: one folder per camera, or files that are named after their cameras."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from perception.errors import DataError
from perception.recordings.recording import FramePlan, Image, Recording, checked_times, chosen_streams, named_camera
from perception.recordings.trajectory import nanoseconds, read_trajectory
from perception.rigs.rig import RIG_FILE, Rig

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"))
POSES_FILE = "poses.txt"  # beside the rig file of a folder that describes itself
# Units of a time stamp by its number of digits; dates from 2001 to 2286.
DIGITS = {10: 9, 13: 6, 16: 3, 19: 0}  # digits: power of ten to nanoseconds


def described_by(folder: Path, rig: Rig | None, poses: Path | None, name: str, place: str) -> tuple[Rig, Path | None]:
    """Returns the rig and the trajectory file of a recording: those that were given, or else those in its folder.

    Args:
        folder: which may hold `rig.yaml` and `poses.txt`.
        rig, poses: given by the user, or None.
        name, place: of the recording, and where its rig file belongs, for the message.

    Raises:
        DataError: there is no rig.
    """
    if rig is None and (folder / RIG_FILE).exists():
        rig = Rig.load(folder / RIG_FILE)
    if rig is None:
        raise DataError(f"{name} holds no calibration; give a rig, or put {RIG_FILE} {place}")
    if poses is None and (folder / POSES_FILE).exists():
        poses = folder / POSES_FILE
    return rig, poses


def read_folder(
    path: Path,
    rig: Rig | None = None,
    streams: Mapping[str, str] | None = None,
    *,
    fps: float | None = None,
    start: float = 0.0,
    poses: Path | None = None,
) -> Recording:
    """Reads a folder of images.

    The images of a camera are in a subfolder whose path holds its name, or the name stands in the names of the files.
    The time of an image is the time stamp in its name: seconds, milliseconds, microseconds or nanoseconds since 1970. A
    single image per camera needs none.

    Args:
        path: the folder. `rig.yaml` and `poses.txt` in it are read unless others are given.
        rig: the cameras; None for those of `rig.yaml`.
        streams: subfolder of each camera, where names do not tell.
        fps: images per second, for names that are numbers of images.
        start: time of the image 0 in seconds, with `fps`.
        poses: trajectory file.

    Raises:
        DataError: there are no images, no rig, or no times, or they are ambiguous.
    """
    rig, poses = described_by(path, rig, poses, f"{path} is a folder of images and", "into it")
    files = _files_by_camera(path, rig.names, streams or {})
    stamps = {camera: [_time_ns(file.stem, fps, start) for file in found] for camera, found in files.items()}
    untimed = [
        file
        for camera, found in files.items()
        for file, stamp in zip(found, stamps[camera], strict=True)
        if stamp is None
    ]
    if untimed and all(len(found) == 1 for found in files.values()):  # one frame
        stamps = {camera: [0] for camera in files}
    elif untimed:
        raise DataError(
            f"{untimed[0]} has no time stamp in its name (such as 1532402927612460.jpg, microseconds since 1970); "
            "rename the images, or give --fps if their numbers count the images"
        )
    times, ordered = {}, {}
    for camera, found in files.items():
        pairs = sorted((stamp, file) for stamp, file in zip(stamps[camera], found, strict=True) if stamp is not None)
        times[camera] = checked_times([stamp for stamp, _ in pairs], f"{path}: camera {camera}")
        ordered[camera] = [file for _, file in pairs]
    trajectory = None if poses is None else read_trajectory(poses)
    return Recording(str(path), times, partial(decode_files, ordered), trajectory, rig)


def _files_by_camera(path: Path, cameras: Sequence[str], streams: Mapping[str, str]) -> dict[str, list[Path]]:
    folders: dict[str, list[Path]] = {}
    flat: list[Path] = []
    for file in sorted(path.rglob("*")):
        if file.suffix.lower() not in SUFFIXES or file.name.startswith(".") or not file.is_file():
            continue
        if file.parent == path:
            flat.append(file)
        else:
            folders.setdefault(str(file.parent.relative_to(path)), []).append(file)
    if flat and not (streams or {camera for folder in folders if (camera := named_camera(folder, cameras))}):
        files: dict[str, list[Path]] = {}
        if len(cameras) == 1:
            return {cameras[0]: flat}
        for file in flat:
            camera = named_camera(file.stem, cameras)
            if camera is None:
                raise DataError(
                    f"{file} has no camera of the rig in its name ({', '.join(cameras)}); rename it, or put the images "
                    "of each camera into a folder with its name"
                )
            files.setdefault(camera, []).append(file)
        return {camera: files[camera] for camera in cameras if camera in files}
    if not folders:
        raise DataError(f"{path} holds no images; give a folder with images, or with one folder of images per camera")
    chosen = chosen_streams(folders, cameras, streams, str(path))
    return {camera: folders[folder] for camera, folder in chosen.items()}


def _time_ns(stem: str, fps: float | None, start: float) -> int | None:
    """The time in the name of a file; None if there is none."""
    if fps is not None:
        counted = re.findall(r"\d+", stem)
        return round((start + int(counted[-1]) / fps) * 1e9) if counted and len(counted[-1]) < 10 else None
    for number, fraction in reversed(re.findall(r"(?<!\d)(\d{10,19})(?:[._-](\d{1,9}))?(?!\d)", stem)):
        if fraction and len(number) == 10:  # 1532402927.612460, or seconds and nanoseconds as ROS writes them
            return nanoseconds(f"{number}.{fraction}")
        if len(number) in DIGITS:
            return int(number) * 10 ** DIGITS[len(number)]
    return None


def decode_files(files: Mapping[str, Sequence[Path]], plan: Sequence[FramePlan]) -> Iterator[dict[str, Image]]:
    """Returns the images of planned frames from the files of each camera, see `Recording.decode`."""
    for planned in plan:
        yield {camera: read_image(files[camera][k]) for camera, k in planned.images.items()}


def read_image(path: Path) -> Image:
    """Reads an image file as [H, W, 3] uint8 RGB.

    Raises:
        DataError: it cannot be read.
    """
    from perception.data.loader import open_image

    with open_image(path) as image:
        return np.asarray(image.convert("RGB"))
