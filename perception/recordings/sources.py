"""Opens recordings of any format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perception.errors import ConfigError, DataError
from perception.recordings import bags, folders, kitti, nuscenes, videos
from perception.recordings.recording import Recording
from perception.rigs.rig import Rig

# Arguments of `open_recording` that each format reads, besides the rig and the streams.
TAKES = {
    "a ROS bag": ("poses", "pose_topic", "reference", "base_frame", "base_height"),
    "videos": ("fps", "start", "poses"),
    "a nuScenes-format dataset": ("version", "scene"),
    "a drive of KITTI raw": (),
    "a folder of images": ("fps", "start", "poses"),
}


def open_recording(
    paths: str | Path | Sequence[str | Path],
    rig: Rig | str | Path | None = None,
    *,
    streams: Mapping[str, str] | None = None,
    fps: float | None = None,
    start: float | None = None,
    poses: str | Path | None = None,
    pose_topic: str | None = None,
    reference: str | None = None,
    base_frame: str | None = None,
    base_height: float | None = None,
    version: str | None = None,
    scene: str | None = None,
) -> Recording:
    """Opens a recording.

    The format is recognised: a ROS bag (a folder with metadata.yaml, `.mcap`, `.db3`, or one or several `.bag`),
    videos, a nuScenes-format dataset, a drive of KITTI raw, or a folder of images. docs/recordings.md has more.

    Args:
        paths: a file or a folder; several only for videos and bags of ROS 1.
        rig: a `Rig`, its file, or its name in the library; None for the calibration that the recording holds.
        streams: topic, folder or file of each camera by its name, where names do not tell.
        fps: folders and videos: images per second, where names or files hold no times.
        start: folders and videos: seconds of the first image with `fps`; of videos, seconds that are added.
        poses: trajectory file with lines of `time x y z qx qy qz qw`.
        pose_topic: bags: where the poses are.
        reference: bags: a topic whose times are wanted, see `Recording.plan`.
        base_frame: bags: the vehicle frame, base_link by default.
        base_height: bags: metres that the vehicle frame lies above the ground, 0 by default.
        version, scene: nuScenes format.

    Raises:
        ConfigError: an argument does not belong to the format, or a package is not installed.
        DataError: the format is not recognised, or the recording is damaged, or a calibration is missing.
    """
    found = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not found:
        raise DataError("no recording was given; give a folder, videos or a bag")
    for path in found:
        if not path.exists():
            raise DataError(f"{path} does not exist; give a folder of images, videos, or a ROS bag")
    loaded = rig if isinstance(rig, Rig) or rig is None else Rig.load(rig)
    kind = _recognised(found)
    given: dict[str, Any] = {
        "fps": fps, "start": start, "poses": None if poses is None else Path(poses), "pose_topic": pose_topic,
        "reference": reference, "base_frame": base_frame, "base_height": base_height, "version": version,
        "scene": scene,
    }  # fmt: skip
    given = {key: value for key, value in given.items() if value is not None}
    for key in given:
        if key not in TAKES[kind] and key != "reference":  # which `Recording.plan` takes too
            raise ConfigError(
                f"{found[0]} is {kind}, and --{key.replace('_', '-')} does not belong to it; leave it out"
            )
    given = {key: value for key, value in given.items() if key in TAKES[kind]}
    if kind == "a ROS bag":
        return bags.read_bag(found, loaded, streams, **given)
    if kind == "videos":
        return videos.read_videos(found, loaded, streams, **given)
    if len(found) > 1:
        raise DataError(f"{found[0]} is {kind}, and {len(found)} paths were given; give one")
    if kind == "a nuScenes-format dataset":
        return nuscenes.read_nuscenes(found[0], loaded, streams, **given)
    if kind == "a drive of KITTI raw":
        return kitti.read_kitti_raw(found[0], loaded, streams)
    return folders.read_folder(found[0], loaded, streams, **given)


def _recognised(paths: Sequence[Path]) -> str:
    if all(bags.is_bag(path) for path in paths):
        if len(paths) > 1 and any(path.suffix != ".bag" for path in paths):
            raise DataError(
                f"{paths[0]} and {len(paths) - 1} more bags were given; several are read of ROS 1 only (.bag)"
            )
        return "a ROS bag"
    if all(path.is_file() and path.suffix.lower() in videos.SUFFIXES for path in paths):
        return "videos"
    path = paths[0]
    if path.is_file():
        raise DataError(
            f"{path} is no recording that is known; give a folder of images, a ROS bag "
            f"({', '.join(sorted(bags.SUFFIXES))}), or videos ({', '.join(sorted(videos.SUFFIXES))})"
        )
    if nuscenes.versions(path):
        return "a nuScenes-format dataset"
    if kitti.is_kitti_raw(path):
        return "a drive of KITTI raw"
    if any(file.suffix.lower() in videos.SUFFIXES for file in path.iterdir()):
        return "videos"
    if inside := [file for file in path.iterdir() if bags.is_bag(file)]:
        raise DataError(f"{path} holds the bag {inside[0].name}; give the bag itself")
    return "a folder of images"
