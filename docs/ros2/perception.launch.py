"""Starts the node with six cameras. Adapt the topics, and run: ros2 launch ./perception.launch.py"""

import sys

from launch import LaunchDescription
from launch.actions import ExecuteProcess

CAMERAS = ["front", "front_left", "front_right", "back", "back_left", "back_right"]


def quoted(names):
    return "[" + ", ".join(f'"{name}"' for name in names) + "]"


def generate_launch_description():
    parameters = {
        "weights": "nano",
        "cameras": quoted(CAMERAS),
        "image_topics": quoted(f"/sensing/camera/{name}/image_raw/compressed" for name in CAMERAS),
        "camera_info_topics": quoted(f"/sensing/camera/{name}/camera_info" for name in CAMERAS),
        "odometry_topic": "/localization/kinematic_state",
        "base_frame": "base_link",
        "objects_topic": "/perception/vision/objects",
    }
    arguments = [word for name, value in parameters.items() for word in ("-p", f"{name}:={value}")]
    # The Python of the environment with the library, which must see the packages of ROS as well.
    command = [sys.executable, "-m", "perception.ros2", "--ros-args", *arguments]
    return LaunchDescription([ExecuteProcess(cmd=command, output="screen")])
