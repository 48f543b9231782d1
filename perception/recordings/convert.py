"""Writes the scenes of a nuScenes-format dataset as bags, videos or folders, as a vehicle would have recorded them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from perception.errors import ConfigError, DataError, not_installed
from perception.files import check_new, check_writable, new_folder
from perception.recordings.bags import TRANSFORMS
from perception.recordings.folders import POSES_FILE, read_image
from perception.recordings.nuscenes import REFERENCE, Scene, read_scene, scene_names
from perception.recordings.trajectory import Trajectory
from perception.recordings.videos import VideoWriter
from perception.rigs.models import FROM_INTEGER_CENTERS, BrownConrady, KannalaBrandt, Pinhole
from perception.rigs.rig import RIG_FILE, RigCamera
from perception.rigs.ros import BASE_FRAME

VIDEO_QUALITY = 17  # x264's constant rate factor: hardly any loss is seen
LIDAR_VALUES = 5  # float32 of a point in the files of nuScenes: x, y, z, intensity, ring


def convert_dataset(root: str | Path, version: str, out: str | Path, format: str) -> list[Path]:
    """Writes every scene of a nuScenes-format dataset as a recording, in a folder with its name.

    Args:
        root: of the dataset.
        version: folder of the tables.
        out: folder to create; it must not exist, or be empty. It appears when all scenes are complete.
        format: "bag" (ROS 2, MCAP), "sqlite-bag" (ROS 2), "ros1-bag", "video" (an MP4 per camera) or "folder" (a folder
            of images per camera). Videos and folders also hold rig.yaml and poses.txt.

    Returns:
        For each scene what `open_recording` takes.

    Raises:
        ConfigError: the format is another one, or its package is not installed.
        DataError: the dataset is malformed, `out` is not empty, or a camera cannot be described in ROS.
    """
    check_convertible(format, out)
    made = []
    with new_folder(out) as folder:
        for name in tqdm(scene_names(Path(root), version), desc=f"scenes as {format}", unit="scene"):
            made.append(Path(out) / FORMATS[format](read_scene(Path(root), version, name), folder).relative_to(folder))
    return made


def check_convertible(format: str, out: str | Path) -> None:
    """Checks, before long work, that `convert_dataset` can write a format to a folder.

    Raises:
        ConfigError: the format is another one, its package is not installed, or the folder cannot be written.
        DataError: `out` is not empty.
    """
    if format not in FORMATS:
        raise ConfigError(f"format is {format!r}; give one of {', '.join(FORMATS)}")
    check_writable("out", out, folder=True)
    check_new(out)
    try:
        if format in PACKAGES:
            importlib.import_module(PACKAGES[format])
    except ImportError as error:
        raise not_installed(error) or error from None


class _Event(NamedTuple):
    """One message of a bag."""

    time_ns: int
    topic: str
    kind: str
    fields: Callable[[], Mapping[str, Any]]  # read when it is written


def _write_ros2(scene: Scene, folder: Path, storage: str) -> Path:
    from rosbags.rosbag2 import StoragePlugin, Writer
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS2_HUMBLE)
    with Writer(folder / scene.name, version=9, storage_plugin=StoragePlugin[storage]) as writer:
        _write_events(scene, writer, store, store.serialize_cdr)
    return folder / scene.name


def _write_ros1(scene: Scene, folder: Path) -> Path:
    from rosbags.rosbag1 import Writer
    from rosbags.typesys import Stores, get_types_from_msg, get_typestore

    store = get_typestore(Stores.ROS1_NOETIC)
    store.register(get_types_from_msg("geometry_msgs/TransformStamped[] transforms", TRANSFORMS))
    with Writer(folder / f"{scene.name}.bag") as writer:
        _write_events(scene, writer, store, store.serialize_ros1)
    return folder / f"{scene.name}.bag"


def _write_events(scene: Scene, writer: Any, store: Any, serialize: Callable[[Any, str], Any]) -> None:
    events = list(_events(scene))
    kinds = {event.topic: event.kind for event in events}  # cameras in the order of the rig
    connections = {topic: writer.add_connection(topic, kind, typestore=store) for topic, kind in kinds.items()}
    for event in sorted(events, key=lambda event: event.time_ns):
        writer.write(
            connections[event.topic], event.time_ns, serialize(_message(store, event.kind, event.fields()), event.kind)
        )


def _message(store: Any, kind: str, values: Mapping[str, Any]) -> Any:
    """A message of rosbags from nested mappings, for ROS 2 and ROS 1."""
    arguments = {}
    for name, (sort, detail) in store.fielddefs[kind][1]:
        value = values.get(name, values.get(name.lower()))  # ROS 1 writes D, K, R, P in capitals
        if sort.name == "NAME":
            value = _message(store, detail, value or {})
        elif sort.name == "BASE":
            value = ("" if detail[0] == "string" else 0) if value is None else value
        elif detail[0][0].name == "NAME":  # an array or a sequence of messages
            value = [_message(store, detail[0][1], item) for item in value or ()]
        elif value is None:
            value = np.zeros(detail[1], detail[0][1][0])
        arguments[name] = value
    return store.types[kind](**arguments)


def _events(scene: Scene) -> Iterator[_Event]:
    first = min(int(time) for time in scene.trajectory.times_ns)
    static = [_transform(first, BASE_FRAME, _optical(camera.name), camera.ego_from_cam) for camera in scene.rig]
    static.append(_transform(first, BASE_FRAME, REFERENCE, scene.ego_from_lidar))
    yield _Event(first, "/tf_static", TRANSFORMS, lambda: {"transforms": static})
    for time, pose in zip(scene.trajectory.times_ns.tolist(), scene.trajectory.global_from_ego, strict=True):
        yield _Event(time, "/odometry", "nav_msgs/msg/Odometry", partial(_odometry, time, pose))
        yield _Event(time, "/tf", TRANSFORMS, partial(_moved, time, pose))
    for channel, files in scene.files.items():
        for time, path, _ in files:
            if channel == REFERENCE:
                yield _Event(time, f"/{channel}/points", "sensor_msgs/msg/PointCloud2", partial(_points, time, path))
                continue
            image, info = "sensor_msgs/msg/CompressedImage", "sensor_msgs/msg/CameraInfo"
            yield _Event(time, f"/{channel}/camera_info", info, partial(_info, time, scene.rig[channel]))
            yield _Event(time, f"/{channel}/image_raw/compressed", image, partial(_image, time, channel, path))


def _odometry(time_ns: int, pose: np.ndarray) -> dict[str, Any]:
    moved = _transform(time_ns, "map", BASE_FRAME, pose)
    placed = {"position": moved["transform"]["translation"], "orientation": moved["transform"]["rotation"]}
    return {"header": moved["header"], "child_frame_id": BASE_FRAME, "pose": {"pose": placed}}


def _moved(time_ns: int, pose: np.ndarray) -> dict[str, Any]:
    return {"transforms": [_transform(time_ns, "map", BASE_FRAME, pose)]}


def _info(time_ns: int, camera: RigCamera) -> dict[str, Any]:
    return {"header": _header(time_ns, _optical(camera.name))} | camera_info(camera)


def _image(time_ns: int, camera: str, path: Path) -> dict[str, Any]:
    return {"header": _header(time_ns, _optical(camera)), "format": "jpeg", "data": _bytes(path)}


def camera_info(camera: RigCamera) -> dict[str, Any]:
    """Returns the fields of sensor_msgs/CameraInfo of a camera, without the header.

    Raises:
        DataError: ROS has no such camera model.
    """
    model = camera.model.moved(-FROM_INTEGER_CENTERS)
    coefficients: tuple[float, ...] = ()
    if isinstance(model, Pinhole):
        kind, coefficients = "plumb_bob", (0.0,) * 5
    elif isinstance(model, BrownConrady):
        coefficients = model.distortion
        kind = "plumb_bob" if len(coefficients) <= 5 else "rational_polynomial"
        coefficients = (*coefficients, 0.0) if len(coefficients) == 4 else coefficients
    elif isinstance(model, KannalaBrandt):
        kind, coefficients = "equidistant", model.distortion
    else:
        raise DataError(
            f"camera {camera.name} has the model {camera.model.kind}, which CameraInfo does not have; use the format "
            "folder or video"
        )
    k = np.array(model.img_from_cam, np.float64)
    p = np.concatenate([k, np.zeros((3, 1))], 1)
    return {
        "height": camera.image_size[0], "width": camera.image_size[1], "distortion_model": kind,
        "d": np.array(coefficients), "k": k.ravel(), "r": np.eye(3).ravel(), "p": p.ravel(),
    }  # fmt: skip


def _optical(camera: str) -> str:
    return f"{camera}_optical_frame"


def _header(time_ns: int, frame: str) -> dict[str, Any]:
    return {"stamp": {"sec": time_ns // 1_000_000_000, "nanosec": time_ns % 1_000_000_000}, "frame_id": frame}


def _transform(time_ns: int, parent: str, frame: str, pose: np.ndarray) -> dict[str, Any]:
    x, y, z, w = map(float, Rotation.from_matrix(pose[:3, :3]).as_quat())
    position = dict(zip("xyz", map(float, pose[:3, 3]), strict=True))
    return {
        "header": _header(time_ns, parent), "child_frame_id": frame,
        "transform": {"translation": position, "rotation": {"x": x, "y": y, "z": z, "w": w}},
    }  # fmt: skip


def _bytes(path: Path) -> np.ndarray:
    return np.frombuffer(path.read_bytes(), np.uint8)


def _points(time_ns: int, path: Path) -> dict[str, Any]:
    """The fields of a PointCloud2 of a LiDAR sweep of nuScenes."""
    data = _bytes(path)
    step = 4 * LIDAR_VALUES
    names = ("x", "y", "z", "intensity", "ring")
    count = len(data) // step
    return {
        "header": _header(time_ns, REFERENCE), "height": 1, "width": count, "is_bigendian": False, "is_dense": True,
        "fields": [{"name": name, "offset": 4 * k, "datatype": 7, "count": 1} for k, name in enumerate(names)],
        "point_step": step, "row_step": step * count, "data": data[: step * count],
    }  # fmt: skip


def _write_folder(scene: Scene, folder: Path) -> Path:
    root = folder / scene.name
    for camera in scene.rig:
        (root / camera.name).mkdir(parents=True)
        for time, path, _ in scene.files[camera.name]:
            (root / camera.name / f"{time // 1000}{path.suffix}").write_bytes(path.read_bytes())
    scene.rig.save(root / RIG_FILE)
    write_trajectory(root / POSES_FILE, scene.trajectory)
    return root


def _write_videos(scene: Scene, folder: Path) -> Path:
    root = folder / scene.name
    root.mkdir()
    first = min(scene.files[camera.name][0][0] for camera in scene.rig)
    for camera in scene.rig:
        with VideoWriter(root / f"{camera.name}.mp4", VIDEO_QUALITY) as video:
            for time, path, _ in scene.files[camera.name]:
                video.add(read_image(path), time - first)
    scene.rig.save(root / RIG_FILE)
    poses = scene.trajectory
    write_trajectory(root / POSES_FILE, Trajectory(poses.times_ns - first, poses.global_from_ego, poses.source))
    return root


def write_trajectory(path: Path, trajectory: Trajectory) -> None:
    """Writes a trajectory file that `read_trajectory` reads."""
    lines = ["# time_s x y z qx qy qz qw"]
    for time, pose in zip(trajectory.times_ns.tolist(), trajectory.global_from_ego, strict=True):
        numbers = [*pose[:3, 3].tolist(), *Rotation.from_matrix(pose[:3, :3]).as_quat().tolist()]
        sign, rest = "-" if time < 0 else "", abs(time)
        lines.append(f"{sign}{rest // 10**9}.{rest % 10**9:09d} " + " ".join(map(repr, numbers)))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


PACKAGES = {"bag": "rosbags", "sqlite-bag": "rosbags", "ros1-bag": "rosbags", "video": "av"}
FORMATS: dict[str, Callable[[Scene, Path], Path]] = {
    "bag": lambda scene, folder: _write_ros2(scene, folder, "MCAP"),
    "sqlite-bag": lambda scene, folder: _write_ros2(scene, folder, "SQLITE3"),
    "ros1-bag": _write_ros1,
    "video": _write_videos,
    "folder": _write_folder,
}
