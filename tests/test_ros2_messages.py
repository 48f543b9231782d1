"""Messages of ROS 2 are filled by field name and serialised as ROS does (CDR), by another library."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from perception.errors import DataError
from perception.ros2.messages import (
    AUTOWARE_LABELS,
    LANE_LABELS,
    detected_objects,
    detection3d_array,
    header,
    lane_lines,
    marker_array,
)
from perception.types import (
    BOX_CLASSES,
    LINE_CLASSES,
    NumpyBoxes,
    NumpyLiveObjects,
    NumpyPolylines,
    NumpySeen,
)

DOCS = Path(__file__).resolve().parent.parent / "docs" / "ros2"
# Fields and constants of the definitions that are not part of ROS itself: autoware_msgs and vision_msgs (branch ros2).
DEFINITIONS = {
    "autoware_perception_msgs/msg/DetectedObjects": "std_msgs/Header header\nDetectedObject[] objects",
    "autoware_perception_msgs/msg/DetectedObject": (
        "float32 existence_probability\nObjectClassification[] classification\nDetectedObjectKinematics kinematics\n"
        "Shape shape"
    ),
    "autoware_perception_msgs/msg/DetectedObjectKinematics": (
        "uint8 UNAVAILABLE=0\nuint8 SIGN_UNKNOWN=1\nuint8 AVAILABLE=2\n"
        "geometry_msgs/PoseWithCovariance pose_with_covariance\nbool has_position_covariance\n"
        "uint8 orientation_availability\ngeometry_msgs/TwistWithCovariance twist_with_covariance\nbool has_twist\n"
        "bool has_twist_covariance"
    ),
    "autoware_perception_msgs/msg/ObjectClassification": (
        "uint8 UNKNOWN = 0\nuint8 CAR = 1\nuint8 TRUCK = 2\nuint8 BUS = 3\nuint8 TRAILER = 4\nuint8 MOTORCYCLE = 5\n"
        "uint8 BICYCLE = 6\nuint8 PEDESTRIAN = 7\nuint8 label\nfloat32 probability"
    ),
    "autoware_perception_msgs/msg/Shape": (
        "uint8 BOUNDING_BOX=0\nuint8 CYLINDER=1\nuint8 POLYGON=2\nuint8 type\ngeometry_msgs/Polygon footprint\n"
        "geometry_msgs/Vector3 dimensions"
    ),
    "vision_msgs/msg/Detection3DArray": "std_msgs/Header header\nDetection3D[] detections",
    "vision_msgs/msg/Detection3D": (
        "std_msgs/Header header\nObjectHypothesisWithPose[] results\nBoundingBox3D bbox\nstring id"
    ),
    "vision_msgs/msg/ObjectHypothesisWithPose": ("ObjectHypothesis hypothesis\ngeometry_msgs/PoseWithCovariance pose"),
    "vision_msgs/msg/ObjectHypothesis": "string class_id\nfloat64 score",
    "vision_msgs/msg/BoundingBox3D": "geometry_msgs/Pose center\ngeometry_msgs/Vector3 size",
}


@pytest.fixture(scope="module")
def sent():
    """A function that fills a message, serialises it and reads it back."""
    typesys = pytest.importorskip("rosbags.typesys", reason="rosbags serialises the messages")
    store = typesys.get_typestore(typesys.Stores.ROS2_HUMBLE)
    definitions = dict(DEFINITIONS)
    for file in (DOCS / "driving_perception_msgs" / "msg").glob("*.msg"):
        definitions[f"driving_perception_msgs/msg/{file.stem}"] = file.read_text()
    for name, text in definitions.items():
        store.register(typesys.get_types_from_msg(text, name))

    def value(description, given):
        kind, detail = description
        if kind.name == "BASE":
            return {"string": "", "bool": False}.get(detail[0], 0) if given is None else given
        if kind.name == "NAME":
            return message(detail, given or {})
        item, length = detail
        if item[0].name == "BASE" and item[1][0] != "string":
            return np.array([0] * length if given is None else given, dtype=item[1][0])
        return [value(item, part) for part in given or ()]

    def message(name, given):
        fields = dict(store.fielddefs[name][1])
        assert not set(given) - set(fields), f"{name} has no such fields"
        return store.types[name](**{field: value(fields[field], given.get(field)) for field in fields})

    def roundtrip(name, given):
        return store.deserialize_cdr(store.serialize_cdr(message(name, given), name), name)

    return roundtrip


def make_objects(count=3):
    """One box of each of `count` classes and two lines, with uncertainties."""
    rng = np.random.default_rng(3)
    boxes = NumpyBoxes(
        center=rng.normal(size=(count, 3)) * 10,
        size=rng.uniform(1, 5, (count, 3)),
        yaw=np.linspace(-3, 3, count),
        velocity=rng.normal(size=(count, 2)) * 5,
        label=np.arange(count) % len(BOX_CLASSES),
        attribute=np.full(count, -1),
        score=np.linspace(0.9, 0.3, count),
        valid=np.ones(count, bool),
        uncertainty=rng.uniform(0.1, 1, (count, 9)),
    )
    lines = NumpyPolylines(
        points=rng.normal(size=(2, 5, 2)) * 10,
        closed=np.array([False, True]),
        label=np.array([0, 1]),
        score=np.array([0.8, 0.6]),
        valid=np.ones(2, bool),
        uncertainty=rng.uniform(0.1, 1, (2, 5, 2)),
    )
    seen = NumpySeen(np.linspace(0, 1, count), np.array([[1, 1, 0, 0, 1], [1, 1, 1, 1, 1]], bool))
    return NumpyLiveObjects(boxes, lines, seen, ())


def xyz(point):
    return np.array([point.x, point.y, point.z])


def yaw_of(quaternion):
    return Rotation.from_quat([quaternion.x, quaternion.y, quaternion.z, quaternion.w]).as_euler("ZYX")[0]


def test_header_keeps_nanoseconds(sent):
    stamp = sent("std_msgs/msg/Header", header(1532402927_612460123, "base_link"))
    assert (stamp.frame_id, stamp.stamp.sec, stamp.stamp.nanosec) == ("base_link", 1532402927, 612460123)
    for time_ns in (-1, 2**31 * 10**9):
        with pytest.raises(DataError, match="header holds 0 to 2147483647 seconds"):
            header(time_ns, "")


def test_detected_objects(sent):
    objects, base = make_objects(len(BOX_CLASSES)), (1.0, 0.0, 0.4)
    message = sent(
        "autoware_perception_msgs/msg/DetectedObjects",
        detected_objects(objects, header(5_500_000_000, "base_link"), base),
    )
    boxes = objects.boxes
    assert message.header.stamp.sec == 5 and len(message.objects) == len(BOX_CLASSES)
    for m, found in enumerate(message.objects):
        pose, twist = found.kinematics.pose_with_covariance, found.kinematics.twist_with_covariance
        np.testing.assert_allclose(xyz(pose.pose.position), boxes.center[m] - base)
        assert yaw_of(pose.pose.orientation) == pytest.approx(boxes.yaw[m])
        assert found.existence_probability == pytest.approx(boxes.score[m])
        assert found.classification[0].label == AUTOWARE_LABELS[BOX_CLASSES[m]]
        np.testing.assert_allclose(xyz(found.shape.dimensions), boxes.size[m])  # x is the length
        # The twist turned back by the pose of the object is the velocity over ground.
        turn = Rotation.from_euler("z", boxes.yaw[m]).as_matrix()
        np.testing.assert_allclose((turn @ xyz(twist.twist.linear))[:2], boxes.velocity[m])
        covariance = twist.covariance.reshape(6, 6)[:2, :2]
        np.testing.assert_allclose(
            turn[:2, :2] @ covariance @ turn[:2, :2].T, np.diag(2 * boxes.uncertainty[m, 7:] ** 2), atol=1e-12
        )
        # The variance of a Laplace distribution with mean absolute deviation b is 2 b^2.
        np.testing.assert_allclose(
            np.diag(pose.covariance.reshape(6, 6)),
            [*2 * boxes.uncertainty[m, :3] ** 2, 0, 0, 2 * boxes.uncertainty[m, 6] ** 2],
        )
        kinematics = found.kinematics
        assert kinematics.has_twist and kinematics.has_twist_covariance and kinematics.has_position_covariance
        assert kinematics.orientation_availability == kinematics.AVAILABLE
        assert found.shape.type == found.shape.BOUNDING_BOX
    constants = message.objects[0].classification[0]
    for name, label in AUTOWARE_LABELS.items():
        assert label == getattr(constants, name.upper(), constants.UNKNOWN)


def test_what_a_network_does_not_predict_is_marked(sent):
    objects = make_objects(1)
    boxes = objects.boxes._replace(velocity=np.full((1, 2), np.nan), uncertainty=np.zeros((1, 9)))
    fields = detected_objects(objects._replace(boxes=boxes), header(0, "base_link"))
    kinematics = sent("autoware_perception_msgs/msg/DetectedObjects", fields).objects[0].kinematics
    assert not (kinematics.has_twist or kinematics.has_twist_covariance or kinematics.has_position_covariance)
    assert (xyz(kinematics.twist_with_covariance.twist.linear) == 0).all()


def test_padding_is_left_out():
    objects = make_objects(3)
    objects = objects._replace(
        boxes=objects.boxes._replace(valid=np.array([True, False, True])),
        lines=objects.lines._replace(valid=np.array([False, True])),
    )
    head = header(0, "base_link")
    assert len(detected_objects(objects, head)["objects"]) == len(detection3d_array(objects, head)["detections"]) == 2
    assert [line["label"] for line in lane_lines(objects, head)["lines"]] == [LANE_LABELS["ped_crossing"]]


def test_detection3d_array(sent):
    objects = make_objects(2)
    message = sent("vision_msgs/msg/Detection3DArray", detection3d_array(objects, header(2_250_000_000, "base_link")))
    for m, found in enumerate(message.detections):
        assert found.header.stamp.nanosec == 250000000
        hypothesis = found.results[0]
        assert hypothesis.hypothesis.class_id == BOX_CLASSES[m]
        assert hypothesis.hypothesis.score == objects.boxes.score[m]
        np.testing.assert_allclose(xyz(found.bbox.center.position), objects.boxes.center[m])
        np.testing.assert_allclose(xyz(found.bbox.size), objects.boxes.size[m])
        assert yaw_of(found.bbox.center.orientation) == pytest.approx(objects.boxes.yaw[m])
        assert hypothesis.pose.covariance[0] == pytest.approx(2 * objects.boxes.uncertainty[m, 0] ** 2)


def test_lane_lines(sent):
    objects = make_objects()
    fields = lane_lines(objects, header(0, "base_link"), base_in_ego=(0.0, 0.0, 0.33))
    message = sent("driving_perception_msgs/msg/LaneLineArray", fields)
    for m, line in enumerate(message.lines):
        assert line.label == getattr(line, LINE_CLASSES[objects.lines.label[m]].upper())
        assert line.is_closed == objects.lines.closed[m]
        np.testing.assert_allclose([xyz(point)[:2] for point in line.points], objects.lines.points[m], rtol=1e-6)
        np.testing.assert_allclose([point.z for point in line.points], -0.33, rtol=1e-6)  # the ground
        deviations = np.stack([line.std_x, line.std_y], -1)
        np.testing.assert_allclose(deviations, math.sqrt(2) * objects.lines.uncertainty[m], rtol=1e-6)
        np.testing.assert_array_equal(line.seen, objects.seen.lines[m])
    assert LANE_LABELS == {name: getattr(message.lines[0], name.upper()) for name in LINE_CLASSES}


def test_marker_array(sent):
    objects = make_objects(2)
    first, *markers = sent("visualization_msgs/msg/MarkerArray", marker_array(objects, header(0, "map"))).markers
    assert first.action == first.DELETEALL
    assert [(marker.ns, marker.id) for marker in markers] == [
        ("boxes", 0), ("velocities", 0), ("boxes", 1), ("velocities", 1), ("lines", 0), ("lines", 1)
    ]  # fmt: skip
    box, way, line = markers[0], markers[1], markers[4]
    assert (box.type, way.type, line.type) == (box.CUBE, box.LINE_LIST, box.LINE_STRIP)
    np.testing.assert_allclose(xyz(box.scale), objects.boxes.size[0])
    np.testing.assert_allclose(xyz(way.points[1]) - xyz(way.points[0]), [*objects.boxes.velocity[0], 0])
    np.testing.assert_allclose(xyz(line.points[2])[:2], objects.lines.points[0, 2])
    assert line.colors[2].a < line.colors[1].a  # the third point was not seen
    assert markers[0].color.a < markers[2].color.a  # nor was the first box
    assert all(marker.header.frame_id == "map" and marker.lifetime.sec == 1 for marker in markers)
    assert way.pose.orientation.w == line.pose.orientation.w == 1.0
