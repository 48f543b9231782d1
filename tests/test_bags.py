"""Bags: their images against OpenCV, and rigs and poses from messages that were written by hand."""

import shutil

import cv2
import numpy as np
import pytest
from mutate import damage_bytes, run_cases
from PIL import Image
from rosbags.rosbag2 import StoragePlugin, Writer
from written_recordings import (
    SECOND,
    STORE,
    circle,
    info_message,
    made,
    message,
    odometry,
    pose_stamped,
    raw_image,
    transform,
    transforms,
    two_cameras,
    write_bag,
)

from perception.errors import DataError, PerceptionError
from perception.geometry import invert_rigid, rigid_from_yaw
from perception.recordings import open_recording
from perception.recordings.convert import camera_info
from perception.recordings.ros_images import decode_message
from perception.rigs import Rig, RigCamera, import_rig
from perception.rigs.models import BrownConrady, FTheta, KannalaBrandt, Pinhole

# Images of ROS


def scenery() -> np.ndarray:
    """A smooth picture [40, 60, 3], whose colours survive being sampled at half the size."""
    y, x = np.mgrid[:40, :60].astype(np.float32)
    return np.stack([3 * x + 40, 2 * y + 90, 200 - 2 * x], -1).astype(np.uint8)


def test_encodings_of_ros_against_opencv():
    rgb = scenery()
    exact = {
        "rgb8": rgb, "bgr8": rgb[..., ::-1], "rgba8": np.dstack([rgb, rgb[..., 0]]), "8UC3": rgb[..., ::-1],
        "bgra8": np.dstack([rgb[..., ::-1], rgb[..., 0]]), "rgb16": rgb.astype("<u2") * 256 + 17,
    }  # fmt: skip
    for encoding, pixels in exact.items():
        for extra in (0, 5):
            found = decode_message(message(encoding, np.ascontiguousarray(pixels), 60, extra=extra), "here")
            np.testing.assert_array_equal(found, rgb, err_msg=encoding)
    gray = rgb[..., 0]
    deep = gray.astype(np.uint16) * 256
    for encoding, big, pixels in (("mono8", 0, gray), ("mono16", 1, deep.astype(">u2")), ("16UC1", 0, deep)):
        found = decode_message(message(encoding, pixels, 60, bigendian=big), "here")
        np.testing.assert_array_equal(found, np.repeat(gray[..., None], 3, -1))
    for encoding, code in (("yuv422", cv2.COLOR_YUV2RGB_UYVY), ("yuv422_yuy2", cv2.COLOR_YUV2RGB_YUY2)):
        packed = cv2.cvtColor(rgb, cv2.COLOR_RGB2YUV_UYVY if encoding == "yuv422" else cv2.COLOR_RGB2YUV_YUY2)
        found = decode_message(message(encoding, packed, 60), "here")
        assert np.abs(found.astype(int) - cv2.cvtColor(packed, code)).max() <= 2, encoding
        assert np.abs(found.astype(int) - rgb).max() <= 6
    planar = cv2.cvtColor(rgb, cv2.COLOR_RGB2YUV_I420)
    u, v = planar[40:50].reshape(20, 30), planar[50:].reshape(20, 30)
    for encoding, pair, code in (("nv12", (u, v), cv2.COLOR_YUV2RGB_NV12), ("nv21", (v, u), cv2.COLOR_YUV2RGB_NV21)):
        packed = np.concatenate([planar[:40], np.stack(pair, -1).reshape(20, 60)])
        found = decode_message(message(encoding, packed, 60), "here")
        assert np.abs(found.astype(int) - cv2.cvtColor(packed, code)).max() <= 2, encoding


@pytest.mark.parametrize(
    ("encoding", "red", "code"),
    [  # OpenCV names the patterns by the second row and column
        ("bayer_rggb8", (0, 0), cv2.COLOR_BayerBG2RGB), ("bayer_grbg8", (0, 1), cv2.COLOR_BayerGB2RGB),
        ("bayer_gbrg8", (1, 0), cv2.COLOR_BayerGR2RGB), ("bayer_bggr8", (1, 1), cv2.COLOR_BayerRG2RGB),
    ],
)  # fmt: skip
def test_bayer_images_against_opencv(encoding, red, code):
    rgb = np.random.default_rng(3).integers(0, 256, (40, 60, 3), np.uint8)
    row, column = np.mgrid[:40, :60] % 2
    channel = np.where((row == red[0]) & (column == red[1]), 0, np.where((row != red[0]) & (column != red[1]), 2, 1))
    mosaic = np.take_along_axis(rgb, channel[..., None], -1)[..., 0]
    found = decode_message(message(encoding, mosaic, 60), "here")
    inside = np.s_[1:-1, 1:-1]
    assert np.abs(found[inside].astype(int) - cv2.cvtColor(mosaic, code)[inside]).max() <= 1
    sixteen = decode_message(message(encoding[:-1] + "16", mosaic.astype("<u2") * 256, 60), "here")
    np.testing.assert_array_equal(sixteen, found)


def test_compressed_images(tmp_path):
    kind = STORE.types["sensor_msgs/msg/CompressedImage"]
    header = message("rgb8", scenery(), 60).header

    def compressed(data: bytes, format: str = "jpeg"):
        return decode_message(kind(header, format, np.frombuffer(data, np.uint8)), "bag: /front")

    def encoded(image, suffix):
        path = tmp_path / f"a.{suffix}"
        image.save(path)
        return path.read_bytes()

    np.testing.assert_array_equal(
        compressed(encoded(Image.fromarray(scenery()), "png"), "rgb8; png compressed bgr8"), scenery()
    )
    assert np.abs(compressed(encoded(Image.fromarray(scenery()), "jpg")).astype(int) - scenery()).mean() < 4
    deep = Image.fromarray(scenery()[..., 0].astype(np.uint16) * 256)
    np.testing.assert_array_equal(compressed(encoded(deep, "png"))[..., 1], scenery()[..., 0])
    with pytest.raises(DataError, match=r"bag: /front has an image that cannot be decoded \(.*\); copy the bag again"):
        compressed(b"nothing")
    with pytest.raises(DataError, match="holds depth images"):
        compressed(b"", "16UC1; compressedDepth png")


@pytest.mark.parametrize(
    ("encoding", "shape", "width", "words"),
    [
        ("rgb9", (4, 12), 4, "here has the encoding 'rgb9'; did you mean rgb"),
        ("32FC1", (4, 16), 4, "here has the encoding '32FC1'"),
        ("rgb8", (4, 8), 4, "4 rows of 12 were expected"),
        ("yuv422", (4, 6), 3, "with 3 columns; it must be even"),
        ("nv12", (3, 3), 3, "of 3 x 2 pixels; both must be even"),
        ("bayer_rggb8", (1, 4), 4, "it must have two rows and columns"),
        ("rgb8", (1, 0), 0, "an image of 0 x 1 pixels; the bag is damaged"),
    ],
)
def test_images_that_are_not_what_they_say(encoding, shape, width, words):
    with pytest.raises(DataError, match=words):
        decode_message(message(encoding, np.zeros(shape, np.uint8), width), "here")


# Bags written by hand, with rosbags' own messages


LENSES = {
    "pinhole": Pinhole(fx=60.0, fy=61.0, cx=40.5, cy=22.0),
    "plumb_bob": BrownConrady(fx=60.0, fy=61.0, cx=40.5, cy=22.0, distortion=(-0.1, 0.01, 0.001, 0.002)),
    "rational": BrownConrady(fx=60.0, fy=61.0, cx=40.5, cy=22.0, distortion=(0.1, 0.02, 0.0, 0.0, 0.01, 0.2, 0.0, 0.0)),
    "fisheye": KannalaBrandt(fx=30.0, fy=30.0, cx=40.0, cy=22.0, distortion=(0.01, -0.002, 0.0, 0.0)),
}  # fmt: skip


def test_the_rig_of_a_bag_is_that_of_camera_info_and_tf_static(tmp_path):
    poses = {name: camera.ego_from_cam for name, camera in zip(LENSES, [*two_cameras(), *two_cameras()], strict=True)}
    wanted = Rig([RigCamera(name, (45, 80), model, poses[name]) for name, model in LENSES.items()])
    body_from_optical = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])  # REP 103
    rows, static = [], [transform(0, "base_link", "mast", rigid_from_yaw(0.3, (0.5, 0.1, 0.2)))]
    mast = rigid_from_yaw(0.3, (0.5, 0.1, 0.2))
    for name in LENSES:  # one camera is given by its body frame, and all stand on a mast
        frame = f"{name}_optical" if name != "fisheye" else "fisheye_link"
        pose = poses[name] if name != "fisheye" else poses[name] @ invert_rigid(body_from_optical)
        pose = pose.copy()
        pose[2, 3] -= 0.4  # base_link lies 0.4 m above the ground
        static.append(transform(0, "mast", frame, invert_rigid(mast) @ pose))
        rows += [(1, f"/rig/{name}/camera_info", info_message(wanted[name], frame)),
                 (1, f"/rig/{name}/image_raw", raw_image(SECOND, frame))]  # fmt: skip
    path = write_bag(tmp_path / "bag", (0, "/tf_static", transforms(*static)), *rows)
    recording = open_recording(path, base_height=0.4)
    assert recording.rig.names == tuple(LENSES) and recording.trajectory is None
    grid = np.stack(np.meshgrid(np.arange(4, 80, 12.0), np.arange(4, 45, 8.0)), -1)
    for camera in recording.rig:
        np.testing.assert_allclose(camera.ego_from_cam, poses[camera.name], atol=1e-12)
        np.testing.assert_allclose(camera.unproject(grid)[0], wanted[camera.name].unproject(grid)[0], atol=1e-12)
    up = np.eye(4)
    up[2, 3] = 0.4
    (plain,) = import_rig(path, cameras=["pinhole"])  # the ego frame is base_link
    np.testing.assert_allclose(up @ plain.ego_from_cam, recording.rig["pinhole"].ego_from_cam, atol=1e-12)
    imported = import_rig(path, cameras=["fisheye", "pinhole"], ego_from_vehicle=up)
    assert imported.names == ("fisheye", "pinhole")
    for camera in imported:
        np.testing.assert_array_equal(camera.ego_from_cam, recording.rig[camera.name].ego_from_cam)
        assert camera.model == recording.rig[camera.name].model
    with pytest.raises(DataError, match="'pinhole_optical' end at 'base_link', not at 'cart'; give base_frame"):
        import_rig(next(path.glob("*.mcap")), base_frame="cart")
    with pytest.raises(DataError, match="camera x has the model f_theta, which CameraInfo does not have"):
        camera_info(RigCamera("x", (45, 80), FTheta(cx=40, cy=22, polynomial=(30.0,)), np.eye(4)))


def test_rectified_images_take_the_projection_of_camera_info(tmp_path):
    info = info_message(RigCamera("front", (45, 80), LENSES["plumb_bob"], np.eye(4)), "front_optical")
    info.p = np.array([50.0, 0, 39.5, 0, 0, 51.0, 21.5, 0, 0, 0, 1, 0])
    static = transforms(transform(0, "base_link", "front_optical", two_cameras()["front"].ego_from_cam))
    rows = [(0, "/tf_static", static), (1, "/front/camera_info", info)]
    path = write_bag(tmp_path / "rect", *rows, (1, "/front/image_rect", raw_image(SECOND)))
    assert open_recording(path).rig["front"].model == Pinhole(fx=50.0, fy=51.0, cx=40.0, cy=22.0)
    path = write_bag(tmp_path / "both", *rows, (1, "/front/image_rect", raw_image(SECOND)),
                     (1, "/front/image_raw", raw_image(SECOND)))  # fmt: skip
    assert isinstance(open_recording(path).rig["front"].model, BrownConrady)
    chosen = open_recording(path, streams={"ahead": "/front/image_rect"})
    assert chosen.cameras == ("ahead",) and isinstance(chosen.rig["ahead"].model, Pinhole)


def test_images_of_a_bag_are_put_together_in_any_order(tmp_path):
    rows = []
    for k, (front, back) in enumerate([(1.0, 1.02), (2.0, 2.01), (3.0, 3.03)]):
        late = 1.5 if k == 0 else 0.0  # the first image of the back arrives after the second one of the front
        rows += [(front, "/front/image_raw", raw_image(round(front * SECOND), shade=10 * k)),
                 (back + late, "/back/image_raw", raw_image(round(back * SECOND), shade=10 * k + 100))]  # fmt: skip
    rows.append((3.2, "/front/image_raw", raw_image(3 * SECOND, shade=77)))  # the same time again
    path = write_bag(tmp_path / "bag", *sorted(rows, key=lambda row: row[0]))
    recording = open_recording(path, two_cameras())
    frames = list(recording.frames(recording.plan(reference="front")))
    assert [{c: int(i[0, 0, 0]) for c, i in frame.images.items()} for frame in frames] == [
        {"front": 0, "back": 100}, {"front": 10, "back": 110}, {"front": 20, "back": 120}
    ]  # fmt: skip
    assert [frame.time_ns for frame in frames] == [SECOND, 2 * SECOND, 3 * SECOND]
    assert recording.trajectory is None and not recording.notes
    assert len(list(recording.frames(recording.plan(reference="front", count=1)))) == 1


def test_messages_without_a_time_take_that_of_the_bag(tmp_path):
    path = write_bag(tmp_path / "bag", (5, "/front/image_raw", raw_image(0)), (6, "/front/image_raw", raw_image(0)))
    recording = open_recording(path, Rig([two_cameras()["front"]]))
    assert recording.times_ns["front"].tolist() == [5 * SECOND, 6 * SECOND]
    assert recording.notes == ("messages of /front/image_raw have no time in their header: those of the bag",)


@pytest.mark.parametrize("kind", ["odometry", "sensor odometry", "pose", "tf", "tf above a footprint", "none"])
def test_poses_of_a_bag(tmp_path, kind):
    times = [1.0, 1.5, 2.0]
    poses = circle(times)
    rows = [(time, "/front/image_raw", raw_image(round(time * SECOND))) for time in times]
    base_from_sensor = rigid_from_yaw(0.5, (1.0, 0.2, 1.8))
    static = []
    for time, pose in zip(times, poses, strict=True):
        stamp = round(time * SECOND)
        if kind == "odometry":
            rows.append((time, "/odom", odometry(stamp, pose)))
            rows.append((time, "/other", pose_stamped(stamp, np.eye(4))))
        elif kind == "sensor odometry":
            static = [transform(0, "base_link", "imu", base_from_sensor)]
            rows.append((time, "/odom", odometry(stamp, pose @ base_from_sensor, "imu")))
        elif kind == "pose":
            rows.append((time, "/pose", pose_stamped(stamp, pose)))
        elif kind == "tf":
            rows.append((time, "/tf", transforms(transform(stamp, "odom", "base_link", pose))))
            rows.append((time, "/tf", transforms(transform(stamp, "map", "odom", rigid_from_yaw(time)))))
        elif kind == "tf above a footprint":
            static = [transform(0, "base_footprint", "base_link", base_from_sensor)]
            moved = transform(stamp, "odom", "base_footprint", pose @ invert_rigid(base_from_sensor))
            rows.append((time, "/tf", transforms(moved)))
    path = write_bag(tmp_path / "bag", *([(0, "/tf_static", transforms(*static))] if static else []), *rows)
    trajectory = open_recording(path, Rig([two_cameras()["front"]])).trajectory
    if kind == "none":
        assert trajectory is None
    else:
        np.testing.assert_allclose(trajectory.global_from_ego, poses, atol=1e-12)
        assert trajectory.times_ns.tolist() == [round(time * SECOND) for time in times]
        # The ego frame lies below a vehicle frame that is not on the ground.
        raised = open_recording(path, Rig([two_cameras()["front"]]), base_height=0.4).trajectory
        np.testing.assert_allclose(raised.global_from_ego[:, :3, 3], poses[:, :3, 3] - [0, 0, 0.4], atol=1e-12)


def test_the_odometry_with_the_most_messages_is_taken_and_the_others_are_named(tmp_path):
    rows = [(1, "/front/image_raw", raw_image(SECOND)), (1, "/a", odometry(SECOND, np.eye(4)))]
    rows += [(time, "/b", odometry(time * SECOND, np.eye(4))) for time in (1, 2)]
    path = write_bag(tmp_path / "bag", *rows)
    rig = Rig([two_cameras()["front"]])
    recording = open_recording(path, rig)
    assert recording.trajectory.source.endswith("/b") and "others are /a (--pose-topic)" in recording.notes[0]
    assert len(open_recording(path, rig, pose_topic="/a").trajectory) == 1
    (tmp_path / "poses.txt").write_text("0 0 0 0 0 0 0 1\n" * 3)
    assert open_recording(path, rig, poses=tmp_path / "poses.txt").trajectory.source.endswith("poses.txt")
    with pytest.raises(DataError, match="has no poses on /c; give one of /b, /a"):
        open_recording(path, rig, pose_topic="/c")


def test_bags_that_lack_something(tmp_path):
    front = Rig([two_cameras()["front"]])

    def refused(words, name, *rows, rig=None, **how):
        with pytest.raises(PerceptionError, match=words) as error:
            open_recording(write_bag(tmp_path / name, *rows), rig, **how)
        assert "\n" not in str(error.value)

    image = (1, "/front/image_raw", raw_image(SECOND))
    info = (1, "/front/camera_info", info_message(front["front"], "front_optical"))
    refused(
        "has no topic of sensor_msgs Image or CompressedImage; it has /odom", "a", (1, "/odom", odometry(1, np.eye(4)))
    )
    refused("has no camera_info for /front/image_raw .it has none.; give the calibration", "b", image)
    refused("no transform leads from its frame 'front_optical' to 'base_link'; give the calibration", "c", image, info)
    refused("has no images on /left", "d", image, rig=front, streams={"front": "/left"})
    far = odometry(1, rigid_from_yaw(0.0, (1e9, 0, 0)))
    refused("are no pose; give metres", "e", image, (1, "/odom", far), rig=front)
    no_header = made("std_msgs/msg/String", data="x")
    refused("messages of /text have no header with a time", "f", image, (1, "/text", no_header), rig=front,
            reference="/text")  # fmt: skip
    odd = info_message(front["front"], "front_optical")
    odd.distortion_model = "wide"
    static = (0, "/tf_static", transforms(transform(0, "base_link", "front_optical", front["front"].ego_from_cam)))
    refused(
        "camera_info of /front/image_raw: distortion_model is 'wide'",
        "g",
        image,
        (1, "/front/camera_info", odd),
        static,
    )
    tree = (0, "/tf_static", transforms(transform(0, "world", "base_link", np.eye(4))))
    unknown = odometry(1, np.eye(4), "imu")
    other = transforms(transform(0, "rig", "imu", np.eye(4)))
    refused("the transforms do not say where it is in 'base_link'", "h", image, tree, (1, "/odom", unknown),
            (2, "/tf_static", other), rig=front)  # fmt: skip
    (tmp_path / "text.mcap").write_text("no bag")
    with pytest.raises(DataError, match=r"text\.mcap cannot be read as a ROS bag"):
        open_recording(tmp_path / "text.mcap", front)
    with pytest.raises(DataError, match="several are read of ROS 1 only"):
        open_recording([tmp_path / "a", tmp_path / "text.mcap"], front)


@pytest.mark.parametrize("count", [50, pytest.param(400, marks=pytest.mark.slow)])
def test_messages_with_damaged_fields_are_refused_with_a_sentence_or_read(tmp_path, count):
    front = two_cameras()["front"]
    rows = [(0, "/tf_static", transforms(transform(0, "base_link", "front_optical", front.ego_from_cam))),
            (1, "/front/camera_info", info_message(front, "front_optical")),
            (1, "/front/image_raw", raw_image(SECOND, size=(6, 8))), (1, "/odom", odometry(SECOND, np.eye(4))),
            (2, "/front/image_raw", raw_image(2 * SECOND, size=(6, 8))), (2, "/odom", odometry(2 * SECOND, np.eye(4))),
            (1, "/tf", transforms(transform(SECOND, "odom", "base_link", np.eye(4))))]  # fmt: skip
    whole = [bytes(STORE.serialize_cdr(content, content.__msgtype__)) for _, _, content in rows]

    def case(rng):
        damaged = rng.randrange(len(rows))
        path = tmp_path / "bag"
        shutil.rmtree(path, ignore_errors=True)
        with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
            connections = {}
            for k, (time, topic, content) in enumerate(rows):
                if topic not in connections:
                    connections[topic] = writer.add_connection(topic, content.__msgtype__, typestore=STORE)
                data = damage_bytes(whole[k], rng) if k == damaged else whole[k]
                writer.write(connections[topic], time * SECOND, data)
        rig = rng.choice((None, Rig([front])))
        for frame in open_recording(path, rig, pose_topic=rng.choice((None, "/tf"))):
            assert all(image.shape[2] == 3 for image in frame.images.values())
            assert frame.global_from_ego is None or np.isfinite(frame.global_from_ego).all()

    read = run_cases(f"messages {count}", count, case, PerceptionError)
    assert count / 10 < read < count
