"""The ROS 2 node, which `python -m perception.ros2` runs (docs/ros2.md).

Only this module imports rclpy and messages of ROS. It subscribes to images, camera_info, static transforms and
odometry, and publishes boxes, lane lines and markers.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import rclpy
from nav_msgs.msg import Odometry
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from rosidl_runtime_py import set_message_fields
from rosidl_runtime_py.utilities import get_message
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from tf2_msgs.msg import TFMessage

from perception.errors import PerceptionError
from perception.rigs.rig import Rig
from perception.ros2.bridge import Bridge, check_topics
from perception.ros2.messages import detected_objects, detection3d_array, header, lane_lines, marker_array

# Parameter that holds the topic, message type, and the function that fills it.
OUTPUTS = {
    "objects_topic": ("autoware_perception_msgs/msg/DetectedObjects", detected_objects),
    "detections_topic": ("vision_msgs/msg/Detection3DArray", detection3d_array),
    "lanes_topic": ("driving_perception_msgs/msg/LaneLineArray", lane_lines),
    "markers_topic": ("visualization_msgs/msg/MarkerArray", marker_array),
}
PARAMETERS = {
    "weights": "nano",  # a name, a .safetensors file, or a folder with an exported network
    "device": "cpu",
    "rig": "",  # a rig file or a name of the library; empty for camera_info and tf_static
    "cameras": [""],
    "image_topics": [""],  # of each camera; names that end with /compressed are CompressedImage
    "camera_info_topics": [""],  # of each camera; not needed with a rig
    "odometry_topic": "",  # nav_msgs/Odometry; empty: every frame is predicted without memory
    "base_frame": "base_link",
    "base_height": 0.0,  # metres of base_frame above the ground
    "min_score": 0.3,
    "objects_topic": "",  # outputs; an empty one is not published
    "detections_topic": "",
    "lanes_topic": "",
    "markers_topic": "~/markers",
}


class PerceptionNode(Node):  # type: ignore[misc]  # rclpy has no types
    """Predicts boxes and lines from the cameras of a vehicle.

    Raises:
        PerceptionError: a parameter is wrong.
    """

    def __init__(self) -> None:
        super().__init__("perception")
        self._settings = {name: self.declare_parameter(name, value).value for name, value in PARAMETERS.items()}
        settings = self._settings
        cameras, images = ([text for text in settings[key] if text] for key in ("cameras", "image_topics"))
        infos = [text for text in settings["camera_info_topics"] if text]
        rig = Rig.load(settings["rig"]) if settings["rig"] else None
        check_topics(cameras, images, infos, rig is not None)
        self._bridge = Bridge(
            cameras,
            self._make_predictor,
            rig=rig,
            rectified=[camera for camera, topic in zip(cameras, images, strict=True) if "rect" in topic],
            base_frame=settings["base_frame"],
            base_height=settings["base_height"],
        )
        # Images that arrive while the network runs are replaced by later ones.
        newest = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
        for camera, topic in zip(cameras, images, strict=True):
            kind = CompressedImage if topic.endswith("/compressed") else Image
            self._listen(kind, topic, partial(self._on_image, camera), newest)
        for camera, topic in zip(cameras, infos, strict=bool(infos)):
            self._listen(CameraInfo, topic, partial(self._bridge.add_camera_info, camera), qos_profile_sensor_data)
        latched = QoSProfile(depth=100, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        if rig is None:
            self._listen(TFMessage, "/tf_static", self._bridge.add_static_transforms, latched)
        if settings["odometry_topic"]:
            self._listen(Odometry, settings["odometry_topic"], self._bridge.add_odometry, qos_profile_sensor_data)
        self._outputs: list[tuple[Any, Any, Any]] = []
        for parameter, (name, fill) in OUTPUTS.items():
            if settings[parameter]:
                kind = get_message(name)
                self._outputs.append((kind, fill, self.create_publisher(kind, settings[parameter], 1)))
        self.create_timer(5.0, self._report)

    def _make_predictor(self, rig: Rig) -> Any:
        weights, min_score = self._settings["weights"], self._settings["min_score"]
        if Path(weights).is_dir():
            from perception.export.runtime import Runtime

            return Runtime(weights, rig=rig, min_score=min_score)
        from perception.inference.predictor import Predictor

        return Predictor(weights, self._settings["device"], rig=rig, min_score=min_score)

    def _listen(self, kind: Any, topic: str, take: Any, qos: Any) -> None:
        """Subscribes; a message that cannot be used is logged, and the node goes on."""

        def callback(message: Any) -> None:
            try:
                take(message)
            except PerceptionError as error:
                self.get_logger().error(f"{topic}: {error}", throttle_duration_sec=5.0)

        self.create_subscription(kind, topic, callback, qos)

    def _on_image(self, camera: str, message: Any) -> None:
        for time_ns, objects, damaged in self._bridge.add_image(camera, message):
            for warning in (*damaged, *objects.warnings):
                self.get_logger().warning(warning, throttle_duration_sec=5.0)
            head = header(time_ns, self._settings["base_frame"])
            base_in_ego = (0.0, 0.0, self._settings["base_height"])
            for kind, fill, publisher in self._outputs:
                if publisher.get_subscription_count():
                    filled = kind()
                    set_message_fields(filled, fill(objects, head, base_in_ego))
                    publisher.publish(filled)

    def _report(self) -> None:
        if self._bridge.waits_for:
            self.get_logger().warning(f"waiting for {self._bridge.waits_for}")


def main() -> None:
    """Runs the node until it is interrupted.

    Raises:
        PerceptionError: a parameter is wrong.
    """
    rclpy.init()
    node = None
    try:
        node = PerceptionNode()
        rclpy.spin(node)
    except KeyboardInterrupt:
        pass
    finally:
        if node is not None:
            node.destroy_node()
        rclpy.try_shutdown()
