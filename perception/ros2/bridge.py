"""From the messages of a vehicle to predictions: all that the node does, without ROS."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from perception.errors import ConfigError, DataError
from perception.reading import nearest
from perception.recordings.bags import camera_from_info, pose_from_message, stamp_ns
from perception.recordings.ros_images import decode_message
from perception.recordings.trajectory import Trajectory
from perception.rigs.rig import Rig
from perception.rigs.ros import BASE_FRAME, Frames
from perception.ros2.assembly import ALIVE_S, AssembledFrame, FrameAssembler
from perception.types import LiveObjects, NumpyLiveObjects

KEPT_POSES = 512  # 5 s at 100 Hz; a frame needs those around its images


class Output(NamedTuple):
    """The prediction of one frame."""

    time_ns: int
    objects: LiveObjects | NumpyLiveObjects
    damaged: tuple[str, ...]  # for each image that cannot be decoded, a sentence; the camera is absent in this frame


def check_topics(cameras: Sequence[str], images: Sequence[str], infos: Sequence[str], has_rig: bool) -> None:
    """Checks the lists of cameras and topics that a user gives.

    Raises:
        ConfigError: there is no camera, or a list has another length.
    """
    if not cameras:
        raise ConfigError('no cameras were given; set cameras, such as ["front", "left"]')
    if len(images) != len(cameras):
        raise ConfigError(f"{len(cameras)} cameras have {len(images)} image_topics; give one for each, in their order")
    if len(infos) != len(cameras) and not (has_rig and not infos):
        raise ConfigError(
            f"{len(cameras)} cameras have {len(infos)} camera_info_topics; give one for each in their order, or a rig"
        )


class Bridge:
    """Turns messages into predictions: collects the calibration, assembles frames, finds their poses, runs the network.

    Messages are those of rclpy or of rosbags, which have the same fields. A frame for which no pose is known is
    predicted without memory, and its result says so.

    Args:
        cameras: names, as in the rig; the first one that is alive is the reference of the frames.
        make_predictor: makes the `Predictor` or `Runtime` for a rig; called once, when the calibration is complete.
        rig: the calibration; None for that of the CameraInfo messages and the static transforms.
        rectified: cameras whose images are undistorted (image_rect), without a rig.
        base_frame: the frame of the vehicle in the transforms, and of the poses.
        base_height: metres that it lies above the ground.

    Raises:
        ConfigError: two cameras have one name, or there is none.
        DataError: the rig lacks a camera, or does not fit the network.
    """

    def __init__(
        self,
        cameras: Sequence[str],
        make_predictor: Callable[[Rig], Any],
        *,
        rig: Rig | None = None,
        rectified: Collection[str] = (),
        base_frame: str = BASE_FRAME,
        base_height: float = 0.0,
    ) -> None:
        self._assembler = FrameAssembler(cameras)
        self._cameras, self._make_predictor, self._rectified = tuple(cameras), make_predictor, frozenset(rectified)
        self._base_frame, self._base_height = base_frame, base_height
        self._infos: dict[str, Any] = {}
        self._static: dict[str, tuple[str, NDArray[np.float64]]] = {}  # by frame: parent, and its pose there
        self._poses: deque[tuple[int, NDArray[np.float64]]] = deque(maxlen=KEPT_POSES)
        self._predictor: Any = None
        self.waits_for = f"camera_info of {', '.join(cameras)}"  # what is missing before the first frame
        if rig is not None:
            if missing := [camera for camera in cameras if camera not in rig.names]:
                raise DataError(f"the rig has no camera {missing[0]!r}; {nearest(missing[0], rig.names)}")
            self._start(Rig([rig[camera] for camera in cameras], rig.ego_from_lidar))

    def _start(self, rig: Rig) -> None:
        self._predictor, self.waits_for = self._make_predictor(rig), ""

    def add_camera_info(self, camera: str, message: Any) -> None:
        """Takes the calibration of a camera; the first one counts.

        Raises:
            DataError: it is malformed, or the rig of all cameras does not fit the network.
        """
        if self._predictor is None and camera not in self._infos:
            self._infos[camera] = message
            self._try_to_start()

    def add_static_transforms(self, message: Any) -> None:
        """Takes a tf2_msgs/TFMessage of /tf_static.

        Raises:
            DataError: a transform is no pose, or the rig of all cameras does not fit the network.
        """
        for transform in message.transforms:
            frame, parent = transform.child_frame_id.lstrip("/"), transform.header.frame_id.lstrip("/")
            moved = transform.transform
            pose = pose_from_message(moved.translation, moved.rotation, f"the transform from {parent} to {frame}")
            self._static[frame] = parent, pose
        if self._predictor is None:
            self._try_to_start()

    def _try_to_start(self) -> None:
        """Makes the rig once there is the calibration of all cameras."""
        if missing := [camera for camera in self._cameras if camera not in self._infos]:
            self.waits_for = f"camera_info of {', '.join(missing)}"
            return
        frames = {camera: info.header.frame_id.lstrip("/") for camera, info in self._infos.items()}
        tree = Frames.of(Path("/tf_static"), [(parent, frame, pose) for frame, (parent, pose) in self._static.items()])
        if lost := [frame for frame in frames.values() if not tree.leads_to(frame, self._base_frame)]:
            self.waits_for = f"static transforms from {self._base_frame} to {', '.join(lost)}"
            return
        cameras = []
        for camera in self._cameras:
            info, rectified, where = self._infos[camera], camera in self._rectified, f"camera_info of {camera}"
            cameras.append(camera_from_info(camera, info, rectified, tree, self._base_frame, self._base_height, where))
        self._start(Rig(cameras))

    def add_odometry(self, message: Any) -> None:
        """Takes a nav_msgs/Odometry with the pose of the vehicle frame.

        Raises:
            DataError: it is no pose, or that of another frame.
        """
        child = message.child_frame_id.lstrip("/")
        if child not in ("", self._base_frame):
            raise DataError(f"odometry is the pose of {child!r}, not of {self._base_frame!r}; set base_frame")
        pose = pose_from_message(message.pose.pose.position, message.pose.pose.orientation, "odometry")
        pose[:3, 3] -= self._base_height * pose[:3, 2]  # of the ego frame, on the ground
        self._poses.append((stamp_ns(message.header.stamp), pose))

    def add_image(self, camera: str, message: Any) -> list[Output]:
        """Takes a sensor_msgs/Image or CompressedImage and returns the predictions of the frames that are complete now.

        Raises:
            DataError: an image does not fit the rig, or what `Predictor.step` refuses.
        """
        if self._predictor is None:
            return []
        frames = self._assembler.add(camera, stamp_ns(message.header.stamp), message)
        return [self._predict(frame) for frame in frames]

    def _predict(self, frame: AssembledFrame) -> Output:
        if frame.restarted:
            self._predictor.reset()
            poses = [entry for entry in self._poses if entry[0] <= frame.time_ns + round(ALIVE_S * 1e9)]
            self._poses = deque(poses, maxlen=KEPT_POSES)
        images, times, damaged = {}, {}, []
        for camera, (time, message) in frame.images.items():
            try:
                images[camera], times[camera] = decode_message(message, f"camera {camera}"), time * 1e-9
            except DataError as error:
                damaged.append(str(error))
        pose = self._pose_at(frame.time_ns)
        objects = self._predictor.step(images, pose, time_s=frame.time_ns * 1e-9, camera_times_s=times)
        return Output(frame.time_ns, objects, tuple(damaged))

    def _pose_at(self, time_ns: int) -> NDArray[np.float64] | None:
        if not self._poses:
            return None
        times, poses = zip(*self._poses, strict=True)
        return Trajectory(np.array(times, np.int64), np.stack(poses), "odometry").at(time_ns)
