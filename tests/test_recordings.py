"""Recordings: what is read from folders, videos, bags, KITTI raw and nuScenes tables, against independent truth."""

import json
import shutil
from datetime import datetime
from itertools import pairwise

import cv2
import numpy as np
import pytest
from conftest import PROJECT, existing, noisy
from mutate import damage_bytes, run_cases
from PIL import Image
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore
from scipy.spatial.transform import Rotation

from perception.data.loader import collate
from perception.data.nuscenes import NUSCENES_CAMERAS, NuScenesDataset
from perception.errors import ConfigError, DataError, PerceptionError
from perception.geometry import invert_rigid, rigid_from_yaw
from perception.inference.predictor import Predictor
from perception.inference.sequence import run_sequence
from perception.models.bev_transformer.config import BEVTransformerConfig
from perception.models.bev_transformer.model import BEVTransformer
from perception.recordings import Recording, open_recording
from perception.recordings.convert import camera_info, convert_dataset, write_trajectory
from perception.recordings.predicting import predict_frames
from perception.recordings.recording import chosen_streams, named_camera
from perception.recordings.ros_images import decode_message
from perception.recordings.trajectory import Trajectory, read_trajectory
from perception.recordings.videos import VideoWriter
from perception.rigs import Rig, RigCamera, import_rig
from perception.rigs.models import BrownConrady, FTheta, KannalaBrandt, Pinhole
from perception.synthetic import VERSION

LIDAR = "/LIDAR_TOP/points"
STORE = get_typestore(Stores.ROS2_HUMBLE)
SECOND = 1_000_000_000


@pytest.fixture(scope="module")
def network():
    """A small network; from half the size of the town's images on, datasets read JPEGs at their full size."""
    config = BEVTransformerConfig.preset(
        "nano", image_size=(72, 128), grid=(20, 20), channels=16, depth_bins=8, backbone_stages=2, decoder_layers=2,
        box_queries=20, line_queries=8, line_points=6,
    )  # fmt: skip
    return noisy(BEVTransformer, config)


@pytest.fixture(scope="module")
def from_tables(network, town_root):
    """What the network predicts from the tables of the first scene."""
    split = next(iter(json.loads((town_root / VERSION / "splits.json").read_text())))
    dataset = NuScenesDataset(town_root, VERSION, split, image_size=network.config.image_size)
    return [objects for _, objects, _ in run_sequence(network, (collate([dataset[i]]) for i in range(4)))]


def predictions(network, recording: Recording, **how):
    predictor = Predictor(network, min_seen=0)
    return list(predict_frames(predictor, recording.rig, recording.frames(recording.plan(**how))))


def distance(found, wanted) -> float:
    """Largest difference of all numbers of two results of `min_score` and `min_seen` 0."""
    differences = [0.0]
    for kind in ("boxes", "lines"):
        valid = getattr(wanted, kind).valid
        for a, b in zip(getattr(found, kind), getattr(wanted, kind), strict=True):
            assert a.shape == b[valid].shape
            differences.append(float((a.double() - b[valid].double()).abs().max()) if a.numel() else 0.0)
    return max(differences)


@pytest.mark.parametrize("format", ["tables", "bag", "sqlite-bag", "ros1-bag"])
def test_a_bag_of_the_town_gives_the_predictions_of_its_tables(converted, from_tables, network, town_root, format):
    path, how = (town_root, {}) if format == "tables" else (converted(format), {"reference": LIDAR})
    recording = open_recording(path, **how)
    assert recording.cameras == recording.rig.names == NUSCENES_CAMERAS
    frames = predictions(network, recording, **how)
    assert len(frames) == len(from_tables) == 4
    for frame, wanted in zip(frames, from_tables, strict=True):
        assert distance(frame.objects, wanted) < 1e-4
    assert [frame.objects.info.used_memory for frame in frames] == [False, True, True, True]
    # The cameras expose up to 43 ms before the LiDAR, so that their poses differ from the rig's.
    moved = [np.abs(frame.rig.ego_from_cam - recording.rig.camera_rig().ego_from_cam).max() for frame in frames]
    assert min(moved) > 0.05


def test_poses_from_tf_are_those_of_the_odometry(converted, town_root):
    by_odometry, by_tf = (open_recording(converted("bag"), pose_topic=topic) for topic in (None, "/tf"))
    lidar = open_recording(town_root).rig.ego_from_lidar
    np.testing.assert_allclose(by_odometry.rig.ego_from_lidar, lidar, atol=1e-6)
    assert by_odometry.trajectory.source.endswith("/odometry") and by_tf.trajectory.source.endswith("/tf")
    np.testing.assert_array_equal(by_odometry.trajectory.times_ns, by_tf.trajectory.times_ns)
    np.testing.assert_allclose(by_odometry.trajectory.global_from_ego, by_tf.trajectory.global_from_ego, atol=1e-12)


def test_a_folder_of_the_town_holds_its_images_and_poses(converted, town_root):
    tables, folder = open_recording(town_root), open_recording(converted("folder"))
    assert folder.cameras == tables.cameras
    for wanted, found in zip(tables.frames(tables.plan(reference="CAM_BACK")),
                             folder.frames(folder.plan(reference="CAM_BACK")), strict=True):  # fmt: skip
        assert found.time_ns == wanted.time_ns
        np.testing.assert_allclose(found.global_from_ego, wanted.global_from_ego, atol=1e-9)
        for camera in NUSCENES_CAMERAS:
            np.testing.assert_array_equal(found.images[camera], wanted.images[camera])
            np.testing.assert_allclose(found.ego_from_exposure[camera], wanted.ego_from_exposure[camera], atol=1e-9)


def test_videos_of_the_town_hold_its_images_and_times(converted, town_root):
    tables, videos = open_recording(town_root), open_recording(converted("video"))
    first = min(int(times[0]) for times in tables.times_ns.values())
    for camera in NUSCENES_CAMERAS:
        np.testing.assert_array_equal(videos.times_ns[camera], tables.times_ns[camera] - first)
    wanted, found = (r.frames(r.plan(reference="CAM_FRONT")) for r in (tables, videos))
    for before, after in zip(wanted, found, strict=True):
        np.testing.assert_allclose(after.global_from_ego, before.global_from_ego, atol=1e-9)
        for camera in NUSCENES_CAMERAS:
            error = np.abs(after.images[camera].astype(int) - before.images[camera])
            assert error.mean() < 4, "more than the loss of H.264"
    one = open_recording(converted("video") / "CAM_FRONT.mp4", Rig([tables.rig["CAM_FRONT"]]), fps=10, start=7)
    assert one.cameras == ("CAM_FRONT",)
    np.testing.assert_array_equal(one.times_ns["CAM_FRONT"], 7 * SECOND + np.arange(4) * SECOND // 10)


def test_frames_without_a_pose_stand_for_themselves(converted, network, tmp_path):
    path = shutil.copytree(converted("folder"), tmp_path / "images")
    lines = (path / "poses.txt").read_text().splitlines()
    (path / "poses.txt").write_text("\n".join(lines[:-14]))  # those of the last two frames are missing
    frames = predictions(network, open_recording(path))
    assert [frame.objects.info.used_memory for frame in frames] == [False, True, False, False]
    assert (
        frames[-1].objects.info.no_memory_because == "no pose was given" and frames[-1].recorded.global_from_ego is None
    )
    assert (frames[-1].rig.ego_from_cam == open_recording(path).rig.camera_rig().ego_from_cam).all()
    (path / "poses.txt").unlink()
    alone = predictions(network, open_recording(path))
    assert not any(frame.objects.info.used_memory for frame in alone)
    wanted = Predictor(network, min_seen=0)
    last = alone[-1]
    found = wanted.step(last.images, last.rig, np.eye(4), 5.0)
    assert distance(last.objects, found) == 0.0


# Trajectories


def circle(times_s, speed=8.0, rate=0.4):
    """Poses on a circle, in closed form."""
    yaw = rate * np.asarray(times_s)
    return np.stack([rigid_from_yaw(y, (speed / rate * np.sin(y), speed / rate * (1 - np.cos(y)), 1.0)) for y in yaw])


def test_trajectories_are_interpolated():
    times = np.arange(0, 3.01, 0.05)
    order = np.random.default_rng(0).permutation(len(times))
    trajectory = Trajectory(np.rint(times[order] * SECOND).astype(np.int64), circle(times)[order], "here")
    for time in (0.0, 0.05, 0.512, 2.99, 3.0, 3.04, -0.03):  # on a circle and on a straight line it is exact
        np.testing.assert_allclose(trajectory.at(round(time * SECOND)), circle([time])[0], atol=1e-8)
    straight = Trajectory(
        np.array([0, SECOND]), np.stack([rigid_from_yaw(1.0), rigid_from_yaw(1.0, (4, 2, 0))]), "here"
    )
    np.testing.assert_allclose(straight.at(SECOND // 4), rigid_from_yaw(1.0, (1, 0.5, 0)), atol=1e-12)
    assert trajectory.at(round(-0.11 * SECOND)) is None and trajectory.at(round(3.11 * SECOND)) is None
    gap = Trajectory(np.array([0, 3 * SECOND]), circle([0, 3]), "here")
    assert gap.at(SECOND) is None and gap.at(0) is not None
    twice = Trajectory(np.array([5, 5]), circle([0, 1]), "here")
    np.testing.assert_array_equal(twice.at(5), circle([1])[0])
    assert len(twice) == 1 and twice.at(6) is None
    with pytest.raises(DataError, match="here holds no poses"):
        Trajectory(np.zeros(0, np.int64), np.zeros((0, 4, 4)), "here")


def test_trajectory_files(tmp_path):
    path = tmp_path / "poses.txt"
    path.write_text("# a comment\n1532402927.612460001 1 2 3 0 0 0.7071067811865476 0.7071067811865476\n\n")
    found = read_trajectory(path)
    assert found.times_ns.tolist() == [1532402927612460001]
    np.testing.assert_allclose(found.global_from_ego[0], rigid_from_yaw(np.pi / 2, (1, 2, 3)), atol=1e-12)
    write_trajectory(path, Trajectory(np.array([-5, 1532402927612460001]), circle([0, 1]), "here"))
    again = read_trajectory(path)
    assert again.times_ns.tolist() == [-5, 1532402927612460001]
    np.testing.assert_allclose(again.global_from_ego, circle([0, 1]), atol=1e-12)
    for text, words in (
        ("1 2 3 4\n", 'line 1 is "1 2 3 4"; give time in seconds, x y z and qx qy qz qw'),
        ("1 2 3 4 0 0 0 2", "are no pose; give metres and a quaternion of length 1"),
        ("1 2 3 4 0 0 0 nan", "line 1 is"),
        ("time,x,y,z,qx,qy,qz,qw", "line 1 is"),
        ("", "holds no poses"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=words.replace("(", r"\(")):
            read_trajectory(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is not a text file"):
        read_trajectory(path)


# Names and grouping


def test_streams_belong_to_the_cameras_whose_names_stand_in_them():
    cameras = ("CAM_FRONT", "CAM_FRONT_LEFT", "cam1", "cam10")
    for label, wanted in (
        ("/sensing/cam_front/image_raw", "CAM_FRONT"), ("CAM-FRONT-LEFT.mp4", "CAM_FRONT_LEFT"), ("cam10", "cam10"),
        ("run__CAM_FRONT_LEFT__153", "CAM_FRONT_LEFT"), ("cam11", None), ("front", None),
    ):  # fmt: skip
        assert named_camera(label, cameras) == wanted
    assert chosen_streams(["a", "b"], None, {}, "x") == {"a": "a", "b": "b"}
    assert chosen_streams(["/cam1/x", "/v"], ["cam1", "cam2"], {"cam2": "/v"}, "x") == {"cam1": "/cam1/x", "cam2": "/v"}
    assert chosen_streams(["video"], ["front"], {}, "x") == {"front": "video"}
    for labels, given, words in (
        (["cam1/a", "cam1/b"], {}, "cam1/a and cam1/b both look like the camera cam1; choose with --cameras"),
        (["a", "b"], {}, "x has a, b, and the rig the cameras cam1, cam2; say which is which, as --cameras cam1=a"),
        (["a"], {"cam3": "a"}, "--cameras names 'cam3', and the rig has no such camera"),
        (["a"], {"cam1": "c"}, "x has no 'c' for the camera cam1; give one of a"),
    ):
        with pytest.raises(DataError, match=words):
            chosen_streams(labels, ["cam1", "cam2"], given, "x")


def recording(**times_s) -> Recording:
    """A recording whose images hold their own numbers."""
    times = {camera: np.rint(np.array(values) * SECOND).astype(np.int64) for camera, values in times_s.items()}

    def decode(plan):
        for planned in plan:
            yield {camera: np.full((1, 1, 3), k, np.uint8) for camera, k in planned.images.items()}

    return Recording("town", times, decode)


def test_images_are_grouped():
    fast, slow = np.arange(0, 1, 0.033), np.array([0.01, 0.11, 0.31, 0.42])  # one image was lost
    found = recording(fast=fast, slow=slow)
    plan = found.plan()
    assert [planned.time_ns for planned in plan] == np.rint(slow * SECOND).astype(int).tolist()
    for planned in plan:
        nearest = int(np.abs(fast - planned.time_ns / SECOND).argmin())
        assert planned.images == {"fast": nearest, "slow": plan.index(planned)}
    by_fast = found.plan(reference="fast", tolerance=0.012)
    assert len(by_fast) == len(fast)
    assert [len(planned.images) for planned in by_fast[:5]] == [2, 1, 1, 2, 1]
    thinned = [planned.time_ns / SECOND for planned in found.plan(reference="fast", rate=10)]
    np.testing.assert_allclose(np.diff(thinned), 0.1, atol=0.04)
    assert len(thinned) == 11 and len(found.plan(reference="fast", count=3)) == 3
    with pytest.raises(ConfigError, match="town has no 'fist' to take the times from; did you mean fast"):
        found.plan(reference="fist")
    apart = recording(a=[0.0, 1.0], b=[0.5, 1.5])
    assert [set(planned.images) for planned in apart.plan()] == [{"a"}, {"a"}]
    clocks = Recording("town", apart.times_ns, apart.decode, other_times_ns={"lidar": np.array([90 * SECOND])})
    with pytest.raises(DataError, match=r"town: no camera has an image within 0.05 s of a time of lidar; are"):
        clocks.plan(reference="lidar")
    assert [frame.images["fast"][0, 0, 0] for frame in found] == [m.images["fast"] for m in plan]


# Folders


def picture(path, shade: int = 100, size=(45, 80)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), shade, np.uint8)).save(path)
    return path


def two_cameras(size=(45, 80)) -> Rig:
    pinhole = Pinhole(fx=60.0, fy=60.0, cx=size[1] / 2, cy=size[0] / 2)
    poses = {"front": np.array([[0.0, 0, 1, 1.5], [-1, 0, 0, 0], [0, -1, 0, 1.6], [0, 0, 0, 1]]),
             "back": np.array([[0.0, 0, -1, 0], [1, 0, 0, 0], [0, -1, 0, 1.6], [0, 0, 0, 1]])}  # fmt: skip
    return Rig([RigCamera(name, size, pinhole, pose) for name, pose in poses.items()])


@pytest.mark.parametrize(
    ("stems", "fps", "wanted"),
    [
        (["1532402927.612460", "1532402928.112460"], None, [1532402927612460000, 1532402928112460000]),
        (["1532402927612", "1532402928112"], None, [1532402927612000000, 1532402928112000000]),
        (["x_1532402927612460", "x_1532402928112460"], None, [1532402927612460000, 1532402928112460000]),
        (["1532402927612460123", "1532402928112460123"], None, [1532402927612460123, 1532402928112460123]),
        (["1532402927_612460123", "1532402928_112460123"], None, [1532402927612460123, 1532402928112460123]),
        (["9", "10", "000012"], 10, [1900000000, 2000000000, 2200000000]),
    ],
)
def test_names_of_images_hold_their_times(tmp_path, stems, fps, wanted):
    for camera in ("front", "Back"):
        for stem in stems:
            picture(tmp_path / "images" / camera / f"{stem}.png")
            picture(tmp_path / "flat" / f"{camera}_{stem}.png")
    start = {} if fps is None else {"fps": fps, "start": 1.0}
    for folder in ("images", "flat"):
        found = open_recording(tmp_path / folder, two_cameras(), **start)
        assert set(found.cameras) == {"front", "back"}
        assert [times.tolist() for times in found.times_ns.values()] == [wanted, wanted]


def test_a_folder_with_one_image_per_camera_is_one_frame(tmp_path):
    picture(tmp_path / "front.jpg", 50)
    picture(tmp_path / "the back one.png", 200)
    (frame,) = open_recording(tmp_path, two_cameras())
    assert {camera: round(image.mean()) for camera, image in frame.images.items()} == {"front": 50, "back": 200}
    one = Rig([two_cameras()["front"]])
    (tmp_path / "the back one.png").unlink()
    (tmp_path / "front.jpg").rename(tmp_path / "anything.jpg")
    assert [set(frame.images) for frame in open_recording(tmp_path, one)] == [{"front"}]


def test_folders_that_cannot_be_read(tmp_path):
    def refused(words, **how):
        with pytest.raises(PerceptionError, match=words) as error:
            list(open_recording(tmp_path / "images", **how))
        assert "\n" not in str(error.value)

    rig = two_cameras()
    refused("images does not exist; give a folder of images, videos, or a ROS bag")
    (tmp_path / "images").mkdir()
    refused("is a folder of images and holds no calibration; give a rig, or put rig.yaml into it")
    refused("images holds no images; give a folder with images", rig=rig)
    picture(tmp_path / "images" / "left.png")
    refused("left.png has no camera of the rig in its name", rig=rig)
    (tmp_path / "images" / "left.png").unlink()
    picture(tmp_path / "images" / "front" / "a1.png")
    picture(tmp_path / "images" / "front" / "a2.png")
    refused("a1.png has no time stamp in its name", rig=rig)
    refused("--scene does not belong to it; leave it out", rig=rig, scene="x")
    picture(tmp_path / "images" / "front" / "b2.png")
    refused("image 2 has the time 0.200000 s, and the one before 0.200000; times must rise", rig=rig, fps=10)
    (tmp_path / "images" / "front" / "b2.png").write_bytes(b"no image")
    (tmp_path / "images" / "front" / "a2.png").unlink()
    refused("b2.png cannot be read as an image", rig=rig, fps=10)
    (tmp_path / "images" / "drive.mcap").write_bytes(b"")
    refused("holds the bag drive.mcap; give the bag itself", rig=rig)
    with pytest.raises(DataError, match="is no recording that is known"):
        open_recording(picture(tmp_path / "a.png"), rig)
    with pytest.raises(DataError, match="no recording was given"):
        open_recording([], rig)


# Videos


def test_videos_that_cannot_be_read(tmp_path):
    front = Rig([two_cameras()["front"]])
    with VideoWriter(tmp_path / "front.mp4") as video:
        for k in range(3):
            video.add(np.full((47, 81, 3), 60 * k, np.uint8), k * SECOND)

    def refused(words, path="front.mp4", **how):
        with pytest.raises(PerceptionError, match=words):
            list(open_recording(tmp_path / path, **how))

    assert [round(frame.images["front"].mean() / 60) for frame in open_recording(tmp_path / "front.mp4", front)] == [
        0,
        1,
        2,
    ]
    refused("front.mp4 holds no calibration; give a rig, or put rig.yaml next to the videos")
    (tmp_path / "front.avi").write_text("no video")
    refused(r"front.avi cannot be read as a video \(.*\); copy it again", "front.avi", rig=front)
    refused("--pose-topic does not belong to it", rig=front, pose_topic="/odom")
    (tmp_path / "front.avi").unlink()
    (tmp_path / "other.mp4").write_bytes((tmp_path / "front.mp4").read_bytes())
    two = [tmp_path / "front.mp4", tmp_path / "other.mp4"]
    rig = two_cameras()
    found = open_recording(two, rig, streams={"back": str(tmp_path / "other.mp4")})
    assert found.cameras == ("front", "back") and [len(frame.images) for frame in found] == [2, 2, 2]
    whole = (tmp_path / "front.mp4").read_bytes()
    (tmp_path / "front.mp4").write_bytes(whole[: whole.index(b"mdat") + 300])
    refused("front.mp4 cannot be read as a video|ends before its image", rig=front)


# Images of ROS


def message(encoding: str, data: np.ndarray, width: int, *, extra: int = 0, bigendian: int = 0):
    rows = data.reshape(data.shape[0], int(np.prod(data.shape[1:]))).view(np.uint8)
    padded = np.pad(rows, ((0, 0), (0, extra)))
    height = len(rows) * 2 // 3 if encoding in ("nv12", "nv21") else len(rows)
    header = STORE.types["std_msgs/msg/Header"](STORE.types["builtin_interfaces/msg/Time"](1, 2), "cam")
    return STORE.types["sensor_msgs/msg/Image"](
        header, height, width, encoding, bigendian, padded.shape[1], padded.ravel()
    )


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


# KITTI raw


@pytest.fixture()
def kitti_drive(tmp_path):
    """Three frames of a drive that turns from east to north at the latitude of Karlsruhe."""
    day = tmp_path / "2011_09_26"
    drive = day / "2011_09_26_drive_0001_sync"
    turn = (
        "7.533745e-03 -0.9999714 -6.16602e-04 1.480249e-02 7.280733e-04 -0.9998902 0.9998621 7.52379e-03 1.480755e-02"
    )
    day.mkdir()
    (day / "calib_cam_to_cam.txt").write_text(
        "S_rect_02: 80.0 45.0\nR_rect_00: 1 0 0 0 1 0 0 0 1\nP_rect_02: 60 0 40 0 0 60 22 0 0 0 1 0\n"
    )
    (day / "calib_velo_to_cam.txt").write_text(f"R: {turn}\nT: -4.069766e-03 -7.631618e-02 -2.717806e-01\n")
    (day / "calib_imu_to_velo.txt").write_text("R: 1 0 0 0 1 0 0 0 1\nT: -0.81 0.32 -0.80\n")
    for k in range(3):
        picture(drive / "image_02" / "data" / f"{k:010d}.png", 50 + k)
        (drive / "oxts" / "data").mkdir(parents=True, exist_ok=True)
        # 10 m to the east per frame; at the end the car looks to the north.
        longitude = 8.4 + np.degrees(10 * k / (6378137.0 * np.cos(np.radians(49.0))))
        row = [49.0, longitude, 110 + k, 0.0, 0.0, np.pi / 2 * (k == 2), *np.zeros(24)]
        (drive / "oxts" / "data" / f"{k:010d}.txt").write_text(" ".join(map(repr, map(float, row))))
    stamps = "".join(f"2011-09-26 13:02:25.{964389445 + 500 * k}\n" for k in range(3))
    for folder in ("image_02", "oxts"):
        (drive / folder / "timestamps.txt").write_text(stamps)
    return drive


def test_drives_of_kitti_raw(kitti_drive):
    recording = open_recording(kitti_drive)
    assert recording.cameras == ("image_02",)
    assert recording.times_ns["image_02"][0] == 1317042145964389445  # date -u -d "2011-09-26 13:02:25" +%s
    frames = list(recording)
    assert [int(frame.images["image_02"].mean()) for frame in frames] == [50, 51, 52]
    motion = [invert_rigid(a.global_from_ego) @ b.global_from_ego for a, b in pairwise(frames)]
    np.testing.assert_allclose(motion[0][:3, 3], [10, 0, 1], atol=1e-3)  # ahead, and the altitude
    np.testing.assert_allclose(motion[1], rigid_from_yaw(np.pi / 2, (10, 0, 1)), atol=1e-3)
    rig = recording.rig
    assert rig["image_02"].ego_from_cam[2, 3] == pytest.approx(1.65, abs=0.05)  # the height that KITTI states
    shutil.rmtree(kitti_drive / "oxts")
    assert open_recording(kitti_drive, rig).trajectory is None


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("oxts/data/0000000001.txt", "49 8.4 110", "does not begin with lat lon alt roll pitch yaw"),
        ("oxts/data/0000000001.txt", "95 8.4 110 0 0 0", "does not begin with lat lon alt"),
        ("oxts/timestamps.txt", "2011-09-26 13:02:25.9\n", "has 1 lines for 3 files; give a whole drive"),
        ("image_02/timestamps.txt", "2011-09-26 13:02:25\n", "has 1 lines, and the last image is 0000000002.png"),
        ("image_02/timestamps.txt", "26.9.2011\n", "line 1 is '26.9.2011'; give a date and a time"),
        ("image_02/timestamps.txt", "2011-99-26 13:02:25\n", "line 1 is '2011-99-26 13:02:25'; give a date"),
    ],
)
def test_drives_of_kitti_raw_that_are_damaged(kitti_drive, file, text, words):
    (kitti_drive / file).write_text(text)
    with pytest.raises(DataError, match=words):
        open_recording(kitti_drive)


# nuScenes tables


def test_scenes_of_tables(town_root):
    recording = open_recording(town_root)
    assert recording.reference == "LIDAR_TOP" and "choose with --scene" in recording.notes[0]
    names = [scene["name"] for scene in json.loads((town_root / VERSION / "scene.json").read_text())]
    second = open_recording(town_root, scene=names[1], version=VERSION)
    assert not second.notes and second.name.endswith(names[1])
    assert second.times_ns["CAM_FRONT"][0] > recording.times_ns["CAM_FRONT"][-1]
    with pytest.raises(DataError, match="has no scene 'scene-9'"):
        open_recording(town_root, scene="scene-9")
    with pytest.raises(ConfigError, match="is a nuScenes-format dataset, and --fps does not belong to it"):
        open_recording(town_root, fps=3)
    with pytest.raises(ConfigError, match="format is 'avi'; give one of bag"):
        convert_dataset(town_root, VERSION, "x", "avi")
    with pytest.raises(DataError, match="exists and is not empty"):
        convert_dataset(town_root, VERSION, town_root, "folder")


# Real recordings


def test_a_real_drive_as_a_folder(tmp_path):
    """Three frames of six cameras, each with its own pose; the cameras' world poses are independent truth."""
    root = existing(PROJECT.parent / "shared" / "data" / "real_drive", "the real drive")
    described = json.loads((root / "rig.json").read_text())["cameras"]
    frames = json.loads((root / "frames.json").read_text())

    def four(pose):
        w, x, y, z = pose["quaternion_wxyz"]
        found = np.eye(4)
        found[:3, :3], found[:3, 3] = Rotation.from_quat([x, y, z, w]).as_matrix(), pose["translation_m"]
        return found

    def stamp(text):  # 2464-11-12T01:04:10.027900Z; the years of the recording are not real
        time = datetime.fromisoformat(text.replace("Z", "+00:00").replace("2464", "2020"))
        return round(time.timestamp() * 1e6) * 1000

    keys = ("fx", "fy", "cx", "cy", "skew")
    rig = Rig([
        RigCamera(name, (row["height"], row["width"]), Pinhole(**{key: row[key] for key in keys}),
                  four(row["vehicle_from_camera"]))
        for name, row in described.items()
    ])  # fmt: skip
    times, poses = [], []
    for frame in frames:
        times.append(stamp(frame["timestamp"]))
        poses.append(four(frame["world_from_vehicle"]))
        for name, row in frame["cameras"].items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{stamp(row['timestamp']) // 1000}.jpg").symlink_to(root / row["file"])
    write_trajectory(tmp_path / "poses.txt", Trajectory(np.array(times), np.stack(poses), "drive"))
    recording = open_recording(tmp_path, rig)
    found = list(recording.frames(recording.plan(tolerance=0.1)))
    assert len(found) == 3 and all(len(frame.images) == 6 for frame in found)
    for frame, wanted in zip(found[1:], frames[1:], strict=True):  # poses begin 90 ms after the first images
        for name, row in wanted["cameras"].items():
            assert frame.images[name].shape == (1216, 1936, 3)
            world_from_cam = frame.global_from_ego @ frame.ego_from_exposure[name] @ rig[name].ego_from_cam
            assert np.linalg.norm(world_from_cam[:3, 3] - four(row["world_from_camera"])[:3, 3]) < 0.1
    predicted = list(predict_frames(Predictor("nano", min_score=0.1), rig, found[1:]))
    assert [frame.objects.info.used_memory for frame in predicted] == [False, True]


def test_a_real_keyframe_as_a_folder(real_keyframe):
    described = json.loads((real_keyframe / "sample.json").read_text())["data_list"][0]["images"]
    rig = Rig([
        RigCamera(name, (900, 1600), Pinhole(fx=k[0][0], fy=k[1][1], cx=k[0][2], cy=k[1][2]), np.array(row["cam2ego"]))
        for name, row in described.items() for k in [row["cam2img"]]
    ])  # fmt: skip
    recording = open_recording(real_keyframe, rig)
    (frame,) = recording
    assert set(frame.images) == set(NUSCENES_CAMERAS) and frame.global_from_ego is None
    for name, row in described.items():
        image = cv2.cvtColor(cv2.imread(str(real_keyframe / row["img_path"])), cv2.COLOR_BGR2RGB)
        assert np.abs(frame.images[name].astype(int) - image).mean() < 2
        assert int(recording.times_ns[name][0]) // 1000 == int(row["img_path"].split("__")[2].removesuffix(".jpg"))
