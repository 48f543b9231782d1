"""Predictions as the fields of ROS 2 messages: nested dicts of plain values, without ROS.

`rosidl_runtime_py.set_message_fields(message, fields)` fills a message from them, as `perception.ros2.node` does.
Fields that are left out keep the default of the message. All values are in one frame, `base`, which is the `base_link`
of the vehicle: x forward, y left, z up.

Sources of the conventions: the message definitions of autoware_msgs and vision_msgs, and for the twist, which Autoware
expresses in the frame of the object, autowarefoundation/autoware_universe#6192 and #8980, for its covariance #8996.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from perception.errors import DataError
from perception.geometry import rigid_from_yaw
from perception.types import BOX_CLASSES, LINE_CLASSES, LiveObjects, NumpyLiveObjects
from perception.visualization.pictures import BOX_COLORS, LINE_COLORS

Array = NDArray[Any]
Fields = dict[str, Any]
ORIGIN = (0.0, 0.0, 0.0)

# Values of autoware_perception_msgs/ObjectClassification. Classes that it lacks are UNKNOWN (0): obstacles of any kind.
AUTOWARE_LABELS = {
    "car": 1, "truck": 2, "bus": 3, "trailer": 4, "motorcycle": 5, "bicycle": 6, "pedestrian": 7,
    "construction_vehicle": 0, "traffic_cone": 0, "barrier": 0,
}  # fmt: skip
# Values of docs/ros2/driving_perception_msgs/msg/LaneLine.msg.
LANE_LABELS = {"divider": 0, "ped_crossing": 1, "boundary": 2}

_ORIENTATION_AVAILABLE = 2  # autoware_perception_msgs/DetectedObjectKinematics
_BOUNDING_BOX = 0  # autoware_perception_msgs/Shape
_CUBE, _LINE_STRIP, _LINE_LIST, _DELETE_ALL = 1, 4, 5, 3  # visualization_msgs/Marker
_LIFETIME_S = 1.0  # of markers: they vanish when nothing new comes
_LINE_WIDTH_M = 0.15


def header(time_ns: int, frame_id: str) -> Fields:
    """Returns the fields of `std_msgs/Header`.

    Args:
        time_ns: nanoseconds since the epoch of the clock that stamped the images.
        frame_id: the name of the frame.

    Raises:
        DataError: the seconds do not fit into the 31 bits of the message.
    """
    seconds, nanoseconds = divmod(time_ns, 10**9)
    if not 0 <= seconds < 2**31:
        raise DataError(f"a ROS 2 header holds 0 to 2147483647 seconds, and the time of the frame is {seconds} s")
    return {"stamp": {"sec": seconds, "nanosec": nanoseconds}, "frame_id": frame_id}


def detected_objects(
    objects: LiveObjects | NumpyLiveObjects, head: Mapping[str, Any], base_in_ego: Sequence[float] = ORIGIN
) -> Fields:
    """Returns the fields of `autoware_perception_msgs/DetectedObjects`.

    The variance of a position or velocity is 2 b^2 with the expected absolute error b that the network predicts (a
    Laplace distribution). The twist and its covariance are in the frame of the object, as Autoware has them.

    Args:
        objects: result of one step.
        head: from `header`.
        base_in_ego: x, y, z of the origin of base_link in the ego frame, metres; the axes are parallel.
    """
    found = []
    for box in _boxes(objects, base_in_ego):
        pose_covariance, twist_covariance = np.zeros((6, 6)), np.zeros((6, 6))
        pose_covariance[:3, :3] = np.diag(box.variance[:3])
        pose_covariance[5, 5] = box.variance[6]
        turn = rigid_from_yaw(box.yaw)[:2, :2].T  # object_from_base
        velocity = turn @ np.nan_to_num(box.velocity)
        has_deviations = bool(box.variance.any())  # networks that predict none give zeros
        twist_covariance[:2, :2] = turn @ np.diag(box.variance[7:]) @ turn.T
        found.append(
            {
                "existence_probability": box.score,
                "classification": [{"label": AUTOWARE_LABELS[box.name], "probability": 1.0}],
                "kinematics": {
                    "pose_with_covariance": {"pose": box.pose, "covariance": pose_covariance.ravel().tolist()},
                    "has_position_covariance": has_deviations,
                    "orientation_availability": _ORIENTATION_AVAILABLE,
                    "twist_with_covariance": {
                        "twist": {"linear": _xyz([*velocity, 0.0])},
                        "covariance": twist_covariance.ravel().tolist(),
                    },
                    "has_twist": bool(np.isfinite(box.velocity).all()),
                    "has_twist_covariance": has_deviations,
                },
                "shape": {"type": _BOUNDING_BOX, "dimensions": _xyz(box.size)},
            }
        )
    return {"header": dict(head), "objects": found}


def detection3d_array(
    objects: LiveObjects | NumpyLiveObjects, head: Mapping[str, Any], base_in_ego: Sequence[float] = ORIGIN
) -> Fields:
    """Returns the fields of `vision_msgs/Detection3DArray`, which has no place for velocities.

    The class is its name, such as "car". Arguments as those of `detected_objects`.
    """
    found = []
    for box in _boxes(objects, base_in_ego):
        covariance = np.zeros((6, 6))
        covariance[:3, :3] = np.diag(box.variance[:3])
        covariance[5, 5] = box.variance[6]
        hypothesis = {
            "hypothesis": {"class_id": box.name, "score": box.score},
            "pose": {"pose": box.pose, "covariance": covariance.ravel().tolist()},
        }
        found.append(
            {"header": dict(head), "results": [hypothesis], "bbox": {"center": box.pose, "size": _xyz(box.size)}}
        )
    return {"header": dict(head), "detections": found}


def lane_lines(
    objects: LiveObjects | NumpyLiveObjects, head: Mapping[str, Any], base_in_ego: Sequence[float] = ORIGIN
) -> Fields:
    """Returns the fields of `driving_perception_msgs/LaneLineArray`, whose definition is in docs/ros2.

    Arguments as those of `detected_objects`.
    """
    found = []
    for name, score, closed, points, deviation, seen in _lines(objects, base_in_ego):
        found.append(
            {
                "label": LANE_LABELS[name],
                "score": score,
                "is_closed": closed,
                "points": [_xyz(point) for point in points],
                "std_x": deviation[:, 0].tolist(),
                "std_y": deviation[:, 1].tolist(),
                "seen": seen.tolist(),
            }
        )
    return {"header": dict(head), "lines": found}


def marker_array(
    objects: LiveObjects | NumpyLiveObjects, head: Mapping[str, Any], base_in_ego: Sequence[float] = ORIGIN
) -> Fields:
    """Returns the fields of `visualization_msgs/MarkerArray`: cubes, the way of one second, and lines, for RViz.

    The first marker deletes those of the frame before. Parts that no camera has seen are faint. Arguments as those of
    `detected_objects`.
    """
    seconds = {"sec": int(_LIFETIME_S), "nanosec": 0}
    common = {"header": dict(head), "lifetime": seconds, "action": 0}
    upright = {"position": _xyz((0, 0, 0)), "orientation": {"x": 0.0, "y": 0.0, "z": 0.0, "w": 1.0}}
    markers: list[Fields] = [{"header": dict(head), "action": _DELETE_ALL}]
    for number, box in enumerate(_boxes(objects, base_in_ego)):
        color = _color(BOX_COLORS[box.name], 0.2 + 0.6 * box.seen)
        kind = {"ns": "boxes", "id": number, "type": _CUBE, "pose": box.pose, "scale": _xyz(box.size), "color": color}
        markers.append(common | kind)
        start = np.array([box.pose["position"][axis] for axis in "xyz"])
        way = [_xyz(start), _xyz(start + np.append(np.nan_to_num(box.velocity), 0.0))]
        kind = {"ns": "velocities", "id": number, "type": _LINE_LIST, "pose": upright, "points": way}
        markers.append(common | kind | {"scale": _xyz((_LINE_WIDTH_M, 0, 0)), "color": color})
    for number, (name, _, _, points, _, seen) in enumerate(_lines(objects, base_in_ego)):
        colors = [_color(LINE_COLORS[name], 1.0 if is_seen else 0.3) for is_seen in seen]
        kind = {"ns": "lines", "id": number, "type": _LINE_STRIP, "pose": upright, "colors": colors}
        kind |= {"points": [_xyz(point) for point in points], "scale": _xyz((_LINE_WIDTH_M, 0, 0))}
        markers.append(common | kind | {"color": _color(LINE_COLORS[name], 1.0)})
    return {"markers": markers}


class _Box(NamedTuple):
    name: str
    score: float
    seen: float  # share that is seen
    pose: Fields  # geometry_msgs/Pose
    yaw: float
    size: Array  # [3] length, width, height
    velocity: Array  # [2] m/s over ground, along x and y of base
    variance: Array  # [9] of centre, log size, yaw, velocity


def _boxes(objects: LiveObjects | NumpyLiveObjects, base_in_ego: Sequence[float]) -> Iterator[_Box]:
    boxes = objects.boxes
    center, size, yaw, velocity, uncertainty = (
        np.asarray(part, np.float64)
        for part in (boxes.center, boxes.size, boxes.yaw, boxes.velocity, boxes.uncertainty)
    )
    seen = np.asarray(objects.seen.boxes)
    for m in np.flatnonzero(np.asarray(boxes.valid)):
        half = yaw[m] / 2
        turn = {"x": 0.0, "y": 0.0, "z": math.sin(half), "w": math.cos(half)}
        yield _Box(
            BOX_CLASSES[int(boxes.label[m])],
            float(boxes.score[m]),
            float(seen[m]),
            {"position": _xyz(center[m] - base_in_ego), "orientation": turn},
            float(yaw[m]),
            size[m],
            velocity[m],
            2 * uncertainty[m] ** 2,
        )


def _lines(
    objects: LiveObjects | NumpyLiveObjects, base_in_ego: Sequence[float]
) -> Iterator[tuple[str, float, bool, Array, Array, Array]]:
    """Yields class, score, closed, points [P, 3] on the ground, standard deviations [P, 2] and seen [P]."""
    lines = objects.lines
    xy, uncertainty = (np.asarray(part, np.float64) for part in (lines.points, lines.uncertainty))
    seen = np.asarray(objects.seen.lines, bool)
    for m in np.flatnonzero(np.asarray(lines.valid)):
        points = np.pad(xy[m], ((0, 0), (0, 1))) - base_in_ego
        name, score, closed = LINE_CLASSES[int(lines.label[m])], float(lines.score[m]), bool(lines.closed[m])
        yield name, score, closed, points, math.sqrt(2) * uncertainty[m], seen[m]


def _xyz(values: Sequence[float] | Array) -> Fields:
    return dict(zip("xyz", map(float, values), strict=True))


def _color(rgb: tuple[int, int, int], alpha: float) -> Fields:
    return dict(zip("rgb", (value / 255 for value in rgb), strict=True)) | {"a": alpha}
