"""Bags of ROS 1 and ROS 2 (SQLite and MCAP) through rosbags, without ROS."""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from perception.errors import ConfigError, DataError, not_installed
from perception.geometry import invert_rigid
from perception.reading import nearest
from perception.recordings.nuscenes import REFERENCE
from perception.recordings.recording import FramePlan, Image, Recording, checked_times, chosen_streams
from perception.recordings.ros_images import decode_message
from perception.recordings.trajectory import Trajectory, pose_from, read_trajectory
from perception.rigs.documents import Fields, located
from perception.rigs.models import FROM_INTEGER_CENTERS, Pinhole
from perception.rigs.rig import Rig, RigCamera, has_lidar_axes
from perception.rigs.ros import BASE_FRAME, Frames, model_of_camera_info

SUFFIXES = frozenset((".bag", ".mcap", ".db3"))
IMAGES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
INFO, TRANSFORMS = "sensor_msgs/msg/CameraInfo", "tf2_msgs/msg/TFMessage"
OLD_TRANSFORMS = "tf/msg/tfMessage"
# Messages with a pose of the vehicle, and how it is reached; the first kind that a bag has is used.
POSES = {
    "nav_msgs/msg/Odometry": lambda m: (m.child_frame_id, m.pose.pose),
    "geometry_msgs/msg/PoseWithCovarianceStamped": lambda m: ("", m.pose.pose),
    "geometry_msgs/msg/PoseStamped": lambda m: ("", m.pose),
}
NO_CAMERA = re.compile(r"depth|mask|segment|label|theora|disparity", re.IGNORECASE)
# What image_transport and image_proc append to the namespace of a camera.
IMAGE_NAME = re.compile(r"/(image[^/]*|rgb|color|compressed|image)(/compressed)?$")


class Stream(NamedTuple):
    """The messages of one camera: their times, and their place among the messages of the topic."""

    topic: str
    times_ns: NDArray[np.int64]  # [K], rising
    place: NDArray[np.int64]  # [K]


def is_bag(path: Path) -> bool:
    """Returns True for a bag file, and for a folder that is a bag of ROS 2."""
    return path.suffix in SUFFIXES or (path / "metadata.yaml").exists()


@contextmanager
def opened(paths: Sequence[Path]) -> Iterator[Any]:
    """Opens bags with rosbags.

    Raises:
        ConfigError: rosbags is not installed.
        DataError: a bag does not exist or is damaged, also for what is raised while it is read.
    """
    try:
        from rosbags.highlevel import AnyReader
        from rosbags.typesys import Stores, get_typestore
    except ImportError as error:
        raise not_installed(error) or error from None
    name = ", ".join(map(str, paths))
    try:
        with AnyReader(list(paths), default_typestore=get_typestore(Stores.ROS2_HUMBLE)) as reader:
            yield reader
    except (DataError, ConfigError, KeyboardInterrupt, GeneratorExit):
        raise
    except Exception as error:  # rosbags raises many kinds for damaged bags
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{name} cannot be read as a ROS bag ({reason[:200]}); copy it again, or repair it (ros2 bag reindex, "
            "rosbag reindex, mcap recover)"
        ) from None


def read_bag(
    paths: Sequence[Path],
    rig: Rig | None = None,
    streams: Mapping[str, str] | None = None,
    *,
    pose_topic: str | None = None,
    poses: Path | None = None,
    reference: str | None = None,
    base_frame: str = BASE_FRAME,
    base_height: float = 0.0,
) -> Recording:
    """Reads the cameras and the poses of a bag.

    Times are those of the headers. Images are read once for their times, and decoded while the frames are iterated.

    Args:
        paths: a bag of ROS 2 (a folder, `.mcap` or `.db3`), or one or several of ROS 1.
        rig: the cameras; None for those of the CameraInfo messages, with the transforms of tf_static.
        streams: topic of each camera, where names do not tell.
        pose_topic: topic of nav_msgs/Odometry, PoseStamped or PoseWithCovarianceStamped, or "/tf"; None for the
            Odometry with the most messages, else one of the others, else tf.
        poses: trajectory file, instead of what is in the bag.
        reference: a topic whose times are wanted, see `Recording.plan`.
        base_frame: the vehicle frame of the transforms.
        base_height: metres that it lies above the ground.

    Raises:
        ConfigError: rosbags is not installed.
        DataError: the bag is damaged, has no images of the cameras, or no calibration.
    """
    name = ", ".join(map(str, paths))
    with opened(paths) as reader:
        types = {connection.topic: connection.msgtype for connection in reader.connections}
        topics = _camera_topics(types, name, streams or {})
        topics_of = dict(streams or {_camera_name(topic, topics): topic for topic in topics})  # without a rig
        pose_topic, notes = _pose_topic(reader, types, pose_topic, name) if poses is None else (None, [])
        extra = set() if reference is None else {reference} & set(types)
        found = _Index(reader, types, pose_topic, name)
        found.read({*topics, *extra})
        tree = found.tree(base_frame)
        if rig is None:
            rig = _rig(found, topics_of, tree, base_frame, base_height, name)
            chosen = {camera.name: topics_of[camera.name] for camera in rig}
        else:
            chosen = chosen_streams(topics, rig.names, streams or {}, name)
        of_camera = {camera: found.stream(topic) for camera, topic in chosen.items()}
        other = {topic: found.stream(topic).times_ns for topic in extra - set(topics)}
        trajectory = read_trajectory(poses) if poses is not None else found.trajectory(tree, base_frame, base_height)
    if found.unstamped:
        notes.append(f"messages of {', '.join(sorted(found.unstamped))} have no time in their header: those of the bag")
    times = {camera: stream.times_ns for camera, stream in of_camera.items()}
    return Recording(name, times, partial(_decode, paths, of_camera), trajectory, rig, other, notes=tuple(notes))


def bag_cameras(path: Path, base_frame: str = BASE_FRAME) -> list[RigCamera]:
    """Reads the calibration in a bag: CameraInfo of the topics with images, and the transforms of tf_static.

    Args:
        path: a bag.
        base_frame: the vehicle frame.

    Raises:
        ConfigError: rosbags is not installed.
        DataError: the bag is damaged, or has no calibration.
    """
    with opened([path]) as reader:
        types = {connection.topic: connection.msgtype for connection in reader.connections}
        topics = _camera_topics(types, str(path), {})
        found = _Index(reader, types, None, str(path))
        found.read(set())
        named = {_camera_name(topic, topics): topic for topic in topics}
        return list(_rig(found, named, found.tree(base_frame), base_frame, 0.0, str(path)))


def _camera_topics(types: Mapping[str, str], name: str, given: Mapping[str, str]) -> list[str]:
    """The topics with images in the order of the bag, one per camera: raw before rectified, Image before compressed."""
    images = [topic for topic, kind in types.items() if kind in IMAGES]
    for topic in given.values():
        if topic not in images:
            raise DataError(f"{name} has no images on {topic}; {nearest(topic, images)}")
    images = [topic for topic in images if topic in given.values() or not NO_CAMERA.search(topic)]
    best: dict[str, str] = {}
    for topic in sorted(images, key=lambda topic: ("rect" in topic, IMAGES.index(types[topic]), topic)):
        best.setdefault(_namespace(topic), topic)
    taken = {_namespace(topic) for topic in given.values()}
    chosen = [topic for namespace, topic in best.items() if namespace not in taken] + list(given.values())
    if not chosen:
        kinds = ", ".join(sorted({f"{topic} ({kind})" for topic, kind in types.items()})[:8]) or "nothing"
        raise DataError(
            f"{name} has no topic of sensor_msgs Image or CompressedImage; it has {kinds}: give "
            "the bag with the cameras"
        )
    return [topic for topic in types if topic in chosen]


def _namespace(topic: str) -> str:
    return IMAGE_NAME.sub("", topic) or topic


def _camera_name(topic: str, topics: Iterable[str]) -> str:
    """The last part of the namespace; all of it if that stands twice."""
    lasts = Counter(_namespace(other).rpartition("/")[2] for other in topics)
    namespace = _namespace(topic)
    last = namespace.rpartition("/")[2]
    return last if lasts[last] == 1 else namespace.strip("/")


def _pose_topic(reader: Any, types: Mapping[str, str], given: str | None, name: str) -> tuple[str | None, list[str]]:
    """The topic of the poses, None for none; and a note if there were others."""
    counts: Counter[str] = Counter()
    for connection in reader.connections:
        counts[connection.topic] += connection.msgcount
    found = [topic for kind in POSES for topic, _ in counts.most_common() if types[topic] == kind and counts[topic]]
    moving = [topic for topic, kind in types.items() if kind in (TRANSFORMS, OLD_TRANSFORMS) and "static" not in topic]
    if given is not None:
        if given not in (*found, *moving):
            raise DataError(f"{name} has no poses on {given}; {nearest(given, [*found, *moving])}")
        return given, []
    candidates = [*found, *moving]
    if not candidates:
        return None, []
    others = [topic for topic in found[1:] if types[topic] == types[found[0]]]
    notes = [f"poses are those of {found[0]}; others are {', '.join(others)} (--pose-topic)"] if others else []
    return candidates[0], notes


class _Index:
    """What one pass over a bag finds: times of images, poses, transforms and camera_info."""

    def __init__(self, reader: Any, types: Mapping[str, str], pose_topic: str | None, name: str) -> None:
        self._reader, self._types, self._pose_topic, self._name = reader, types, pose_topic, name
        self._stamps: dict[str, list[int]] = {}
        self.infos: dict[str, Any] = {}  # by topic
        self.frame_ids: dict[str, str] = {}  # of images by topic
        self.static: dict[str, tuple[str, NDArray[np.float64]]] = {}  # by frame: parent, and its pose there
        self.moving: dict[str, list[tuple[int, str, NDArray[np.float64]]]] = {}
        self.poses: list[tuple[int, str, NDArray[np.float64]]] = []  # time, child frame, pose
        self.unstamped: set[str] = set()

    def read(self, stamped: set[str]) -> None:
        """Reads all messages that are needed; of the topics in `stamped` only the times."""
        for topic in stamped:
            self._stamps[topic] = []
            if not self._has_header(self._types[topic]):
                raise DataError(f"{self._name}: messages of {topic} have no header with a time; give another topic")
        wanted = [
            connection
            for connection in self._reader.connections
            if connection.topic in stamped
            or connection.topic == self._pose_topic
            or connection.msgtype in (INFO, TRANSFORMS, OLD_TRANSFORMS)
        ]
        for connection, received, raw in self._reader.messages(wanted) if wanted else ():
            topic, kind = connection.topic, connection.msgtype
            if topic in stamped:
                stamp = _stamp(raw, self._reader.is2)
                if stamp <= 0:
                    self.unstamped.add(topic)
                    stamp = received
                self._stamps[topic].append(stamp)
                if topic not in self.frame_ids and kind in IMAGES:
                    self.frame_ids[topic] = self._message(raw, kind).header.frame_id
            if kind in (TRANSFORMS, OLD_TRANSFORMS):
                self._add_transforms(self._message(raw, kind).transforms, "static" in topic)
            elif kind == INFO:
                if topic not in self.infos:
                    self.infos[topic] = self._message(raw, kind)
            elif topic == self._pose_topic:
                message = self._message(raw, kind)
                child, pose = POSES[kind](message)
                time = stamp_ns(message.header.stamp) or received
                self.poses.append(
                    (
                        time,
                        child.lstrip("/"),
                        pose_from_message(pose.position, pose.orientation, f"{self._name}: {topic}"),
                    )
                )

    def stream(self, topic: str) -> Stream:
        """The images of a topic in the order of time; of two with the same time the first counts."""
        times, place = np.unique(np.array(self._stamps[topic], np.int64), return_index=True)
        return Stream(topic, checked_times(times.tolist(), f"{self._name}: {topic}"), place)

    def tree(self, base_frame: str) -> Frames:
        """The static transforms; where a part is missing, the first of a moving one."""
        edges = [(parent, frame, pose) for frame, (parent, pose) in self.static.items()]
        above = self._moving_above(base_frame)
        for frame, moved in self.moving.items():
            if frame not in self.static and frame != above:
                edges.append((moved[0][1], frame, moved[0][2]))
        return Frames.of(Path(self._name), edges)

    def trajectory(self, tree: Frames, base_frame: str, base_height: float) -> Trajectory | None:
        """The poses of the ego frame, which lies below the vehicle frame on the ground; None if there are none."""
        base_from_ego = np.eye(4)
        base_from_ego[2, 3] = -base_height
        if self.poses:
            child = self.poses[0][1]
            child_from_base = np.eye(4)
            if child and child != base_frame and base_frame in (*tree.parents, *(p for p, _ in tree.parents.values())):
                child_from_base = _between(tree, child, base_frame)
            times = np.array([time for time, _, _ in self.poses], np.int64)
            poses = np.stack([pose for _, _, pose in self.poses]) @ child_from_base @ base_from_ego
            return Trajectory(times, poses, f"{self._name}: {self._pose_topic}")
        frame = self._moving_above(base_frame)
        if frame is None or self._pose_topic is None:
            return None
        frame_from_base = tree.base_from(base_frame, frame) if base_frame != frame else np.eye(4)
        times = np.array([time for time, _, _ in self.moving[frame]], np.int64)
        poses = np.stack([pose for _, _, pose in self.moving[frame]]) @ frame_from_base @ base_from_ego
        return Trajectory(times, poses, f"{self._name}: {self._pose_topic}")

    def _moving_above(self, base_frame: str) -> str | None:
        """The base frame, or the one that carries it, which moves in its parent; None if none does."""
        frame, seen = base_frame, set()
        while frame not in self.moving and frame in self.static and frame not in seen:
            seen.add(frame)
            frame = self.static[frame][0]
        return frame if frame in self.moving else None

    def _add_transforms(self, transforms: Iterable[Any], is_static: bool) -> None:
        for transform in transforms:
            frame, parent = transform.child_frame_id.lstrip("/"), transform.header.frame_id.lstrip("/")
            where = f"{self._name}: transform from {frame} to {parent}"
            pose = pose_from_message(transform.transform.translation, transform.transform.rotation, where)
            if is_static:
                self.static[frame] = (parent, pose)
            else:
                self.moving.setdefault(frame, []).append((stamp_ns(transform.header.stamp), parent, pose))

    def _message(self, raw: bytes, kind: str) -> Any:
        return self._reader.deserialize(raw, kind)

    def _has_header(self, kind: str) -> bool:
        _, fields = self._reader.typestore.fielddefs[kind]
        return bool(fields) and fields[0][1][1] == "std_msgs/msg/Header"


def _stamp(raw: Any, is_ros2: bool) -> int:
    """Nanoseconds of the header at the beginning of a message, without reading the rest of it."""
    data = bytes(raw[:12])
    if is_ros2:
        sec, nanosec = struct.unpack_from("<iI" if data[1] & 1 else ">iI", data, 4)
    else:
        _, sec, nanosec = struct.unpack_from("<III", data, 0)
    return int(sec) * 1_000_000_000 + int(nanosec)


def stamp_ns(stamp: Any) -> int:
    """Returns the nanoseconds of a time of a header."""
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)


def pose_from_message(position: Any, orientation: Any, where: str) -> NDArray[np.float64]:
    """Returns a pose [4, 4] from a Point or Vector3 and a Quaternion.

    Raises:
        DataError: they are no pose, see `pose_from`.
    """
    wxyz = [orientation.w, orientation.x, orientation.y, orientation.z]
    return pose_from([position.x, position.y, position.z], wxyz, where)


def _between(tree: Frames, frame: str, base: str) -> NDArray[np.float64]:
    """The pose of `base` in `frame`, through the root of both."""
    root = tree.root(frame)
    if root != tree.root(base):
        raise DataError(
            f"{tree.path}: poses are those of {frame!r}, and the transforms do not say where it is in {base!r}; give "
            "--base-frame, or another --pose-topic"
        )
    return invert_rigid(tree.base_from(frame, root)) @ tree.base_from(base, root)


def _rig(found: _Index, topics: Mapping[str, str], tree: Frames, base_frame: str, base_height: float, name: str) -> Rig:
    """The rig of the CameraInfo messages and the static transforms."""
    by_namespace = {topic.removesuffix("/camera_info"): info for topic, info in found.infos.items()}
    cameras = []
    for camera, topic in topics.items():
        info = by_namespace.get(_namespace(topic))
        if info is None:
            same = [info for info in found.infos.values() if info.header.frame_id == found.frame_ids.get(topic)]
            info = same[0] if len(same) == 1 else None
        if info is None:
            continue
        cameras.append(
            camera_from_info(
                camera, info, "rect" in topic, tree, base_frame, base_height, f"{name}: camera_info of {topic}"
            )
        )
    if not cameras:
        infos = ", ".join(found.infos) or "none"
        raise DataError(
            f"{name} has no camera_info for {', '.join(topics.values())} (it has {infos}); give the calibration of the "
            "cameras with --rig"
        )
    with located(name):
        return Rig(cameras, _lidar(tree, base_frame, base_height))


def _lidar(tree: Frames, base_frame: str, base_height: float) -> NDArray[np.float64] | None:
    """Returns the pose of a frame LIDAR_TOP with nuScenes' axes, as bags that were made from nuScenes have it."""
    if REFERENCE not in tree.parents:
        return None
    raised = np.eye(4)
    raised[2, 3] = base_height
    with suppress(DataError):  # no transform leads from it to the vehicle
        pose = raised @ tree.base_from(REFERENCE, base_frame)
        return pose if has_lidar_axes(pose) else None
    return None


def camera_from_info(
    camera: str, info: Any, is_rectified: bool, tree: Frames, base_frame: str, base_height: float, where: str
) -> RigCamera:
    """Returns a camera from its sensor_msgs/CameraInfo.

    Args:
        camera: its name.
        info: the message, of ROS 1 or ROS 2; its header names the frame of the camera.
        is_rectified: whether the images are those of image_proc without distortion, described by the matrix P.
        tree: the static transforms.
        base_frame: the vehicle frame in it.
        base_height: metres that it lies above the ground.
        where: names its place, for messages.

    Raises:
        DataError: a field is malformed, or no transform leads to the vehicle frame.
    """
    raised = np.eye(4)
    raised[2, 3] = base_height

    def field(key: str) -> Any:
        return getattr(info, key) if hasattr(info, key) else getattr(info, key.upper())

    values = {key: np.asarray(field(key), np.float64).tolist() for key in ("d", "k", "p")}
    values |= {"width": int(info.width), "height": int(info.height), "distortion_model": info.distortion_model}
    with located(where):
        fields = Fields(where, values)
        if is_rectified:
            p = fields.array("p", (12,)).reshape(3, 4)
            size = fields.pixels("height"), fields.pixels("width")
            model: Any = Pinhole(fx=p[0, 0], fy=p[1, 1], cx=p[0, 2], cy=p[1, 2]).moved(FROM_INTEGER_CENTERS)
        else:
            size, model = model_of_camera_info(fields)
    frame = info.header.frame_id.lstrip("/")
    if frame != base_frame and frame not in tree.parents:
        raise DataError(
            f"{where}: no transform leads from its frame {frame!r} to {base_frame!r}; give the calibration with --rig"
        )
    return RigCamera(camera, size, model, raised @ tree.base_from_optical(frame, base_frame))


def _decode(
    paths: Sequence[Path], streams: Mapping[str, Stream], plan: Sequence[FramePlan]
) -> Iterator[dict[str, Image]]:
    """Reads the bag once, and keeps the messages that wait for those of other cameras."""
    needed: Counter[tuple[str, int]] = Counter()  # by topic and place: how many frames use the image
    wanted = []
    for planned in plan:
        of_frame = {
            camera: (streams[camera].topic, int(streams[camera].place[k])) for camera, k in planned.images.items()
        }
        needed.update(of_frame.values())
        wanted.append(of_frame)
    held: dict[tuple[str, int], Any] = {}
    places: Counter[str] = Counter()
    next_frame = 0
    topics = {stream.topic for stream in streams.values()}
    with opened(paths) as reader:
        connections = [connection for connection in reader.connections if connection.topic in topics]
        for connection, _, raw in reader.messages(connections):
            key = (connection.topic, places[connection.topic])
            places[connection.topic] += 1
            if key not in needed:
                continue
            held[key] = reader.deserialize(raw, connection.msgtype)
            while next_frame < len(wanted) and all(key in held for key in wanted[next_frame].values()):
                images = {}
                for camera, key in wanted[next_frame].items():
                    images[camera] = decode_message(held[key], f"{', '.join(map(str, paths))}: {key[0]}")
                    needed[key] -= 1
                    if not needed[key]:
                        del held[key]
                next_frame += 1
                yield images
            if next_frame == len(wanted):
                return
