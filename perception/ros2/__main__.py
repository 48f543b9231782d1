"""Runs the ROS 2 node: `python -m perception.ros2 --ros-args -p cameras:='["front"]' ...`, see docs/ros2.md."""

from perception.errors import ConfigError, run_script

# Packages that come with ROS and with no package index.
ROS = ("nav_msgs", "rclpy", "rosidl_runtime_py", "sensor_msgs", "tf2_msgs")


def main() -> None:
    """Runs the node until it is interrupted.

    Raises:
        ConfigError: ROS 2 is not there.
    """
    try:
        from perception.ros2.node import main as run
    except ModuleNotFoundError as error:
        if error.name not in ROS:
            raise
        raise ConfigError(
            f"{error.name} is not installed; it is part of ROS 2: source its setup file, and install this library for "
            "the Python of ROS"
        ) from None
    run()


if __name__ == "__main__":
    run_script(main)
