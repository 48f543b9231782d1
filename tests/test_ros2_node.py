"""The bridge gets the messages of a bag, as rosbags reads them.

rclpy is part of ROS and not of any package index: the node runs here on stand-ins for it, with the same messages.
"""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from perception import Predictor, Rig
from perception.errors import ConfigError, DataError, run_script
from perception.ros2 import __main__ as ros2
from perception.ros2.bridge import Bridge, check_topics

rosbags = pytest.importorskip("rosbags.highlevel", reason="rosbags reads the bag")

CAMERAS = ("CAM_FRONT", "CAM_FRONT_LEFT", "CAM_BACK")
FRAMES = 4


@pytest.fixture(scope="module")
def bag(small_town, tmp_path_factory):
    """A scene of the town as a bag of ROS 2."""
    from perception.recordings.convert import convert_dataset

    folder = tmp_path_factory.mktemp("bag") / "bags"
    return convert_dataset(small_town.roots[0], small_town.version, folder, "bag")[0]


@pytest.fixture(scope="module")
def messages(bag):
    """The messages of the bag up to the fifth front image: [(topic, message)], in the order of time."""
    found, fronts = [], 0
    with rosbags.AnyReader([bag]) as reader:
        wanted = [connection for connection in reader.connections if "LIDAR" not in connection.topic]
        for connection, _, raw in reader.messages(wanted):
            fronts += connection.topic == "/CAM_FRONT/image_raw/compressed"
            if fronts > FRAMES + 1:
                break
            found.append((connection.topic, reader.deserialize(raw, connection.msgtype)))
    return found


@pytest.fixture(scope="module")
def expected(bag, small_network):
    """The predictions of the first frames, as a recording is predicted."""
    from perception.recordings import open_recording

    recording = open_recording(bag)
    predictor = Predictor(small_network, rig=Rig([recording.rig[camera] for camera in CAMERAS]))
    results = []
    plan = recording.plan(reference="CAM_FRONT", count=FRAMES)
    for planned, frame in zip(plan, recording.frames(plan), strict=True):
        images = {camera: frame.images[camera] for camera in CAMERAS}
        times = {camera: int(recording.times_ns[camera][planned.images[camera]]) * 1e-9 for camera in CAMERAS}
        results.append(predictor.step(images, frame.global_from_ego, frame.time_s, camera_times_s=times))
    return results


def is_data(entry):
    return "camera_info" not in entry[0] and "static" not in entry[0]


def play(bridge, messages):
    """Gives a bridge all messages, the calibration first, and returns its outputs."""
    outputs = []
    for topic, message in sorted(messages, key=is_data):
        camera = topic.split("/")[1]
        if topic.endswith("camera_info") and camera in CAMERAS:
            bridge.add_camera_info(camera, message)
        elif topic == "/tf_static":
            bridge.add_static_transforms(message)
        elif topic == "/odometry":
            bridge.add_odometry(message)
        elif topic.endswith("compressed") and camera in CAMERAS:
            outputs += bridge.add_image(camera, message)
    return outputs


def assert_same(results, expected):
    assert len(results) >= len(expected)
    for result, wanted in zip(results, expected, strict=False):
        assert len(wanted.boxes.score) and len(wanted.lines.score)
        for part, other in zip((*result.boxes, *result.lines), (*wanted.boxes, *wanted.lines), strict=True):
            np.testing.assert_allclose(part, other, rtol=1e-5, atol=1e-5)


def test_predictions_are_those_of_the_recording(small_network, messages, expected):
    outputs = play(Bridge(CAMERAS, lambda rig: Predictor(small_network, rig=rig)), messages)
    assert_same([output.objects for output in outputs], expected)
    assert [output.objects.info.used_memory for output in outputs[:FRAMES]] == [False, True, True, True]


def test_a_rig_replaces_camera_info(small_network, bag, messages, expected):
    from perception.recordings import open_recording

    bridge = Bridge(CAMERAS, lambda rig: Predictor(small_network, rig=rig), rig=open_recording(bag).rig)
    assert bridge.waits_for == ""
    images = [(topic, message) for topic, message in messages if topic.endswith("compressed") or "odometry" in topic]
    assert_same([output.objects for output in play(bridge, images)], expected)


def test_without_odometry_frames_stand_for_themselves(small_network, messages):
    silent = [(topic, message) for topic, message in messages if topic != "/odometry"]
    outputs = play(Bridge(CAMERAS, lambda rig: Predictor(small_network, rig=rig)), silent)
    assert len(outputs) >= FRAMES and not any(output.objects.info.used_memory for output in outputs)


def test_what_is_missing_is_named(messages):
    bridge = Bridge(("CAM_FRONT", "CAM_BACK"), pytest.fail)
    assert bridge.waits_for == "camera_info of CAM_FRONT, CAM_BACK"
    infos = {topic: message for topic, message in messages if topic.endswith("camera_info")}
    bridge.add_camera_info("CAM_FRONT", infos["/CAM_FRONT/camera_info"])
    assert bridge.waits_for == "camera_info of CAM_BACK"
    bridge.add_camera_info("CAM_BACK", infos["/CAM_BACK/camera_info"])
    assert bridge.waits_for == ("static transforms from base_link to CAM_FRONT_optical_frame, CAM_BACK_optical_frame")
    assert bridge.add_image("CAM_FRONT", None) == []


def test_the_height_of_the_base_frame_moves_cameras_and_poses(messages):
    """A base_link 0.4 m above the ground, while the vehicle pitches by 90 degrees."""
    rigs = []
    bridge = Bridge(CAMERAS, rigs.append, base_height=0.4)
    flat = Bridge(CAMERAS, rigs.append)
    play(flat, messages), play(bridge, messages)
    difference = rigs[1]["CAM_BACK"].ego_from_cam - rigs[0]["CAM_BACK"].ego_from_cam
    np.testing.assert_allclose(difference[:3, 3], [0, 0, 0.4], atol=1e-12)
    half = np.sqrt(0.5)
    position, turn = SimpleNamespace(x=1.0, y=2.0, z=3.0), SimpleNamespace(w=half, x=0.0, y=half, z=0.0)
    pose = SimpleNamespace(pose=SimpleNamespace(position=position, orientation=turn))
    header = SimpleNamespace(stamp=SimpleNamespace(sec=1, nanosec=0))
    bridge.add_odometry(SimpleNamespace(child_frame_id="base_link", pose=pose, header=header))
    # Nose down: the vehicle's z axis is the global x axis.
    np.testing.assert_allclose(bridge._poses[-1][1][:3, 3], [1.0 - 0.4, 2.0, 3.0])


def test_mistakes_are_named(small_network, messages):
    rig = Rig.load("nuscenes")
    with pytest.raises(DataError, match="the rig has no camera 'CAM_FRON'; did you mean CAM_FRONT"):
        Bridge(["CAM_FRON"], pytest.fail, rig=rig)
    odometry = next(message for topic, message in messages if topic == "/odometry")
    with pytest.raises(DataError, match="odometry is the pose of 'base_link', not of 'base'; set base_frame"):
        Bridge(["CAM_FRONT"], lambda rig: None, rig=rig, base_frame="base").add_odometry(odometry)
    check_topics(["a"], ["/a"], [], has_rig=True)
    for arguments, sentence in {
        ((), (), (), True): "no cameras were given",
        (("a", "b"), ("/a",), (), True): "2 cameras have 1 image_topics",
        (("a", "b"), ("/a", "/b"), (), False): "2 cameras have 0 camera_info_topics",
        (("a", "b"), ("/a", "/b"), ("/i",), True): "2 cameras have 1 camera_info_topics",
    }.items():
        with pytest.raises(ConfigError, match=sentence):
            check_topics(*arguments)


class Stand:
    """What the node calls of rclpy."""

    def __init__(self, parameters):
        self.given, self.takers, self.published, self.logged = parameters, {}, [], []
        stand = self

        class Node:
            def __init__(self, name):
                assert name == "perception"

            def declare_parameter(self, name, default):
                return SimpleNamespace(value=stand.given.get(name, default))

            def create_subscription(self, kind, topic, callback, qos):
                stand.takers[topic] = (kind.name, callback)

            def create_publisher(self, kind, topic, depth):
                publish = lambda message: stand.published.append((topic, kind.name, message.fields))  # noqa: E731
                return SimpleNamespace(publish=publish, get_subscription_count=lambda: 1)

            def create_timer(self, seconds, callback):
                stand.report = callback

            def get_logger(self):
                log = lambda text, **_: stand.logged.append(text)  # noqa: E731
                return SimpleNamespace(error=log, warning=log, info=log)

        def message_type(full_name):
            return type("Message", (), {"name": full_name})

        anything = SimpleNamespace(TRANSIENT_LOCAL=0, BEST_EFFORT=0)
        contents = {
            "rclpy": {}, "rclpy.node": {"Node": Node},
            "rclpy.qos": {"QoSProfile": lambda **_: None, "DurabilityPolicy": anything, "ReliabilityPolicy": anything,
                          "qos_profile_sensor_data": None},
            "rosidl_runtime_py": {"set_message_fields": lambda message, fields: setattr(message, "fields", fields)},
            "rosidl_runtime_py.utilities": {"get_message": message_type},
            "nav_msgs": {}, "sensor_msgs": {}, "tf2_msgs": {},
            "nav_msgs.msg": {"Odometry": message_type("nav_msgs/msg/Odometry")},
            "tf2_msgs.msg": {"TFMessage": message_type("tf2_msgs/msg/TFMessage")},
            "sensor_msgs.msg": {
                name: message_type(f"sensor_msgs/msg/{name}") for name in ("CameraInfo", "CompressedImage", "Image")
            },
        }  # fmt: skip
        self.modules = {}
        for name, content in contents.items():
            self.modules[name] = ModuleType(name)
            vars(self.modules[name]).update(content)


TOPICS = {
    "cameras": list(CAMERAS),
    "image_topics": [f"/{camera}/image_raw/compressed" for camera in CAMERAS],
    "camera_info_topics": [f"/{camera}/camera_info" for camera in CAMERAS],
    "odometry_topic": "/odometry",
    "objects_topic": "~/objects", "detections_topic": "~/detections", "lanes_topic": "~/lanes",
    "weights": "nano", "min_score": 0.0,
}  # fmt: skip


@pytest.fixture
def stand(monkeypatch):
    made = Stand(dict(TOPICS))
    for name, module in made.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    made.node = importlib.import_module("perception.ros2.node")
    yield made
    del sys.modules["perception.ros2.node"]


def test_the_node_publishes(stand, messages, expected, small_network, monkeypatch):
    monkeypatch.setattr("perception.inference.predictor.load_model", lambda name: small_network)
    stand.node.PerceptionNode()
    stand.report()
    assert stand.logged == ["waiting for camera_info of CAM_FRONT, CAM_FRONT_LEFT, CAM_BACK"]
    assert stand.takers["/CAM_BACK/image_raw/compressed"][0] == "sensor_msgs/msg/CompressedImage"
    for topic, message in sorted(messages, key=is_data):
        if topic in stand.takers:
            stand.takers[topic][1](message)
    of_topic = {}
    for topic, kind, fields in stand.published:
        of_topic.setdefault((topic, kind), []).append(fields)
    assert set(of_topic) == {
        ("~/objects", "autoware_perception_msgs/msg/DetectedObjects"),
        ("~/detections", "vision_msgs/msg/Detection3DArray"),
        ("~/lanes", "driving_perception_msgs/msg/LaneLineArray"),
        ("~/markers", "visualization_msgs/msg/MarkerArray"),
    }
    front = [message.header.stamp for topic, message in messages if topic == "/CAM_FRONT/image_raw/compressed"]
    for fields, wanted, stamp in zip(
        of_topic["~/objects", "autoware_perception_msgs/msg/DetectedObjects"], expected, front, strict=False
    ):
        assert fields["header"] == {
            "stamp": {"sec": stamp.sec, "nanosec": stamp.nanosec}, "frame_id": "base_link"
        }  # fmt: skip
        np.testing.assert_allclose(
            [box["existence_probability"] for box in fields["objects"]], wanted.boxes.score, rtol=1e-5
        )


def test_the_node_goes_on_after_a_bad_message(stand, messages, small_network, monkeypatch):
    monkeypatch.setattr("perception.inference.predictor.load_model", lambda name: small_network)
    stand.node.PerceptionNode()
    for topic, message in sorted(messages, key=is_data):
        if topic in stand.takers:
            if topic == "/CAM_BACK/image_raw/compressed" and not stand.published:
                message = SimpleNamespace(header=message.header, format="jpeg", data=b"no picture")
            stand.takers[topic][1](message)
    assert any("an image that cannot be decoded" in text for text in stand.logged)
    assert stand.published


def test_an_export_is_run_by_the_runtime(stand, fp32_export, bag, tmp_path):
    from perception import Runtime
    from perception.recordings import open_recording

    rig = open_recording(bag).rig
    rig.save(tmp_path / "rig.yaml")

    stand.given |= {
        "weights": str(fp32_export),
        "rig": str(tmp_path / "rig.yaml"),
        "camera_info_topics": [""],
        "markers_topic": "",
    }
    stand.given["cameras"] = list(rig.names)
    stand.given["image_topics"] = [f"/{camera}/image" for camera in stand.given["cameras"]]
    made = stand.node.PerceptionNode()
    assert isinstance(made._bridge._predictor, Runtime)
    assert "/tf_static" not in stand.takers


def test_wrong_parameters_end_the_node(stand, capsys):
    stand.given["image_topics"] = ["/a"]
    calls = []
    vars(stand.modules["rclpy"]).update(
        init=lambda: calls.append("init"), try_shutdown=lambda: calls.append("shutdown")
    )
    with pytest.raises(SystemExit) as end:
        run_script(ros2.main)
    assert end.value.code == 2 and calls == ["init", "shutdown"]
    assert capsys.readouterr().err.startswith("error: 3 cameras have 1 image_topics")


def test_without_ros_the_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rclpy", None)
    with pytest.raises(SystemExit) as end:
        run_script(ros2.main)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: rclpy is not installed; it is part of ROS 2: source its setup")


def test_the_node_runs_until_it_is_interrupted(stand):
    calls = []

    def spin(node):
        raise KeyboardInterrupt

    vars(stand.modules["rclpy"]).update(
        init=lambda: calls.append("init"), spin=spin, try_shutdown=lambda: calls.append("shutdown")
    )
    monkey = stand.modules["rclpy.node"].Node
    monkey.destroy_node = lambda self: calls.append("destroy")
    stand.node.main()
    assert calls == ["init", "destroy", "shutdown"]
