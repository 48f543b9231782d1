"""Writes small recordings by hand: pictures, rigs, and bags with rosbags' own messages."""

import numpy as np
from PIL import Image
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore
from scipy.spatial.transform import Rotation

from perception.geometry import rigid_from_yaw
from perception.recordings.convert import camera_info
from perception.rigs import Rig, RigCamera
from perception.rigs.models import Pinhole

STORE = get_typestore(Stores.ROS2_HUMBLE)
SECOND = 1_000_000_000


def circle(times_s, speed=8.0, rate=0.4):
    """Poses on a circle, in closed form."""
    yaw = rate * np.asarray(times_s)
    return np.stack([rigid_from_yaw(y, (speed / rate * np.sin(y), speed / rate * (1 - np.cos(y)), 1.0)) for y in yaw])


def picture(path, shade: int = 100, size=(45, 80)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), shade, np.uint8)).save(path)
    return path


def two_cameras(size=(45, 80)) -> Rig:
    pinhole = Pinhole(fx=60.0, fy=60.0, cx=size[1] / 2, cy=size[0] / 2)
    poses = {"front": np.array([[0.0, 0, 1, 1.5], [-1, 0, 0, 0], [0, -1, 0, 1.6], [0, 0, 0, 1]]),
             "back": np.array([[0.0, 0, -1, 0], [1, 0, 0, 0], [0, -1, 0, 1.6], [0, 0, 0, 1]])}  # fmt: skip
    return Rig([RigCamera(name, size, pinhole, pose) for name, pose in poses.items()])


def message(encoding: str, data: np.ndarray, width: int, *, extra: int = 0, bigendian: int = 0):
    rows = data.reshape(data.shape[0], int(np.prod(data.shape[1:]))).view(np.uint8)
    padded = np.pad(rows, ((0, 0), (0, extra)))
    height = len(rows) * 2 // 3 if encoding in ("nv12", "nv21") else len(rows)
    header = STORE.types["std_msgs/msg/Header"](STORE.types["builtin_interfaces/msg/Time"](1, 2), "cam")
    return STORE.types["sensor_msgs/msg/Image"](
        header, height, width, encoding, bigendian, padded.shape[1], padded.ravel()
    )


def made(kind: str, **fields):
    return STORE.types[kind](**fields)


def header(time_ns: int, frame: str = ""):
    stamp = made("builtin_interfaces/msg/Time", sec=time_ns // SECOND, nanosec=time_ns % SECOND)
    return made("std_msgs/msg/Header", stamp=stamp, frame_id=frame)


def pose_fields(pose, vector="geometry_msgs/msg/Point"):
    x, y, z, w = Rotation.from_matrix(pose[:3, :3]).as_quat()
    position = made(vector, **dict(zip("xyz", map(float, pose[:3, 3]), strict=True)))
    return position, made("geometry_msgs/msg/Quaternion", x=x, y=y, z=z, w=w)


def transform(time_ns, parent, frame, pose):
    translation, rotation = pose_fields(pose, "geometry_msgs/msg/Vector3")
    moved = made("geometry_msgs/msg/Transform", translation=translation, rotation=rotation)
    return made(
        "geometry_msgs/msg/TransformStamped", header=header(time_ns, parent), child_frame_id=frame, transform=moved
    )


def transforms(*rows):
    return made("tf2_msgs/msg/TFMessage", transforms=list(rows))


def odometry(time_ns, pose, child="base_link"):
    position, orientation = pose_fields(pose)
    placed = made("geometry_msgs/msg/Pose", position=position, orientation=orientation)
    zero = made("geometry_msgs/msg/Vector3", x=0.0, y=0.0, z=0.0)
    return made(
        "nav_msgs/msg/Odometry", header=header(time_ns, "odom"), child_frame_id=child,
        pose=made("geometry_msgs/msg/PoseWithCovariance", pose=placed, covariance=np.zeros(36)),
        twist=made("geometry_msgs/msg/TwistWithCovariance", covariance=np.zeros(36),
                   twist=made("geometry_msgs/msg/Twist", linear=zero, angular=zero)),
    )  # fmt: skip


def pose_stamped(time_ns, pose):
    position, orientation = pose_fields(pose)
    placed = made("geometry_msgs/msg/Pose", position=position, orientation=orientation)
    return made("geometry_msgs/msg/PoseStamped", header=header(time_ns, "map"), pose=placed)


def raw_image(time_ns, frame="front_optical", shade=0, size=(45, 80)):
    found = message("rgb8", np.full((*size, 3), shade, np.uint8), size[1])
    found.header = header(time_ns, frame)
    return found


def info_message(camera: RigCamera, frame: str):
    fields = camera_info(camera)
    roi = made("sensor_msgs/msg/RegionOfInterest", x_offset=0, y_offset=0, height=0, width=0, do_rectify=False)
    return made("sensor_msgs/msg/CameraInfo", header=header(1, frame), binning_x=0, binning_y=0, roi=roi, **fields)


def write_bag(path, *rows):
    """Writes (log time in seconds, topic, message), in this order."""
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        connections = {}
        for time, topic, content in rows:
            kind = content.__msgtype__
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=STORE)
            writer.write(connections[topic], round(time * SECOND), STORE.serialize_cdr(content, kind))
    return path
