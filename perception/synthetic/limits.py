"""Checks what `simulate` is asked for before any work: ranges, cameras, and room on the disk."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from itertools import count, islice
from pathlib import Path

from nuscenes.utils.splits import create_splits_scenes, is_predefined_split

from perception.errors import ConfigError, DataError
from perception.rigs.rig import Rig
from perception.synthetic.sensors import LIDAR_NAME, MOST_CAMERAS

SWEEP_US = 100_000  # cameras at 10 Hz
RATES = (1, 2, 5, 10, 20)  # supported keyframes per second; nuScenes has 2
MAX_SCENES, MAX_SIDE = 100_000, 4096
LOWEST = 0.1  # metres of a camera above the ground
LONGEST_SCENE = 59  # seconds; scenes start a minute apart
OFFICIAL = {"v1.0-mini": ("mini_train", "mini_val"), "v1.0-trainval": ("train", "val")}  # splits of a version
# Numbers of scenes whose CAN bus messages the devkit refuses to read, because nuScenes has none for them.
_WITHOUT_CAN_BUS = frozenset((*range(161, 169), *range(170, 177), *range(309, 315)))
SCENE_BYTES, SECOND_BYTES = 600_000, 110_000  # of a scene's map and its images; of CAN bus messages
KEYFRAME_BYTES = 700_000  # of one keyframe without its images: a LiDAR sweep and its rows of the tables


def check_request(
    scenes: int,
    seed: int,
    keyframes: int,
    rate: int,
    image_size: tuple[int, int],
    split: str,
    workers: int | None,
    sweeps: bool,
    rare: float,
) -> None:
    """Checks the arguments of `simulate`."""
    if rate not in RATES:
        raise ConfigError(f"simulate: rate is {rate}; use one of {', '.join(map(str, RATES))} keyframes per second")
    for field, value, low, high in (
        ("scenes", scenes, 1, MAX_SCENES),
        ("keyframes", keyframes, 1, 1 + LONGEST_SCENE * rate),
        ("workers", 1 if workers is None else workers, 1, max(64, 4 * (os.cpu_count() or 1))),
        ("seed", seed, 0, 2**63 - 1),
        ("height of image_size", image_size[0], 16, MAX_SIDE),
        ("width of image_size", image_size[1], 16, MAX_SIDE),
    ):
        if not low <= value <= high:
            raise ConfigError(f"simulate: {field} is {value}; give {low} to {high}")
    if sweeps and rate > 5:
        raise ConfigError(f"simulate: sweeps at 10 Hz leave nothing between keyframes at {rate} Hz; leave sweeps out")
    if not 0 <= rare <= 1:
        raise ConfigError(f"simulate: rare is {rare}; give a number from 0 to 1")
    if is_predefined_split(split):
        raise ConfigError(
            f"simulate: split {split!r} is reserved by the nuScenes devkit; give another name, such as town_{split}"
        )


def scene_names(scenes: int) -> list[str]:
    """Returns the names of the scenes of a version of our own: scene-0001, scene-0002, ..."""
    numbers = (number for number in count(1) if number not in _WITHOUT_CAN_BUS)
    return [f"scene-{number:04d}" for number in islice(numbers, scenes)]


def official_names(version: str, scenes: int, split: str | None) -> list[str]:
    """Returns names of the devkit's official splits of a version, for training and then for validation.

    Raises:
        ConfigError: the devkit has no such version, or not so many scenes, or a split is given besides.
    """
    if version not in OFFICIAL:
        raise ConfigError(
            f"simulate: version is {version!r}; give {', '.join(OFFICIAL)}, or leave it out for a dataset of our own"
        )
    if split is not None:
        raise ConfigError(
            f"simulate: split is {split!r}, and version {version} has the splits {' and '.join(OFFICIAL[version])}; "
            "leave split out"
        )
    official = create_splits_scenes()
    training, validation = (official[name] for name in OFFICIAL[version])
    most = len(training) + len(validation)
    if not 2 <= scenes <= most:
        raise ConfigError(
            f"simulate: scenes is {scenes}, and version {version} has a scene for training, one for validation, and "
            f"{most} in all; give 2 to {most}"
        )
    held_out = max(1, scenes * len(validation) // most)
    return [*training[: scenes - held_out], *validation[:held_out]]


def check_rig(rig: Rig) -> None:
    """Checks that the cameras of a rig can be rendered and stored."""
    if len(rig) > MOST_CAMERAS:
        raise ConfigError(f"simulate: the rig has {len(rig)} cameras; give at most {MOST_CAMERAS}")
    folded = [name.casefold() for name in rig.names]
    for name in rig.names:
        if not re.fullmatch(r"\w[\w .-]*", name) or name == LIDAR_NAME or folded.count(name.casefold()) > 1:
            raise ConfigError(
                f"simulate: camera {name!r} gives a folder its name; give letters, digits, _ and -, no other camera's "
                f"name in capitals, and not {LIDAR_NAME}"
            )
        height, width = rig[name].image_size
        if not (16 <= height <= MAX_SIDE and 16 <= width <= MAX_SIDE):
            raise ConfigError(
                f"simulate: images of camera {name!r} have {height} x {width} pixels; give 16 to {MAX_SIDE}, or scale "
                "the rig"
            )
        if rig[name].ego_from_cam[2, 3] < LOWEST:
            raise ConfigError(
                f"simulate: camera {name!r} is {rig[name].ego_from_cam[2, 3]:.3g} m above the ground; give at least "
                f"{LOWEST:g} m"
            )


def check_space(
    out: Path, scenes: int, keyframes: int, rate: int, sizes: Sequence[tuple[int, int]], sweeps: bool
) -> None:
    """Checks that the dataset will fit on the disk. The estimate is about right for images of 256 x 448 pixels."""
    images = 1 + (keyframes - 1) * (1_000_000 // rate // SWEEP_US if sweeps else 1)  # per camera and scene
    pixels = sum(700 + 0.2 * height * width for height, width in sizes)  # bytes of one image of every camera
    seconds = (keyframes - 1) / rate
    expected = scenes * (images * pixels + keyframes * KEYFRAME_BYTES + seconds * SECOND_BYTES + SCENE_BYTES)
    free = shutil.disk_usage(out.parent).free
    if expected > free:
        raise DataError(
            f"{out}: about {expected / 1e9:.1f} GB will be written, but {free / 1e9:.1f} GB are free; give fewer "
            "scenes, keyframes or pixels, or a folder on another disk"
        )
