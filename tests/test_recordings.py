"""Recordings: what is read from folders, videos, bags, KITTI raw and nuScenes tables, against independent truth."""

import json
import shutil
from datetime import datetime

import cv2
import numpy as np
import pytest
from conftest import PROJECT, existing, noisy
from rosbags.typesys import Stores, get_typestore
from scipy.spatial.transform import Rotation
from written_recordings import circle

from perception.data.loader import collate
from perception.data.nuscenes import NUSCENES_CAMERAS, NuScenesDataset
from perception.errors import ConfigError, DataError
from perception.geometry import rigid_from_yaw
from perception.inference.predictor import Predictor
from perception.inference.sequence import run_sequence
from perception.models.bev_transformer.config import BEVTransformerConfig
from perception.models.bev_transformer.model import BEVTransformer
from perception.recordings import Recording, open_recording
from perception.recordings.convert import convert_dataset, write_trajectory
from perception.recordings.predicting import predict_frames
from perception.recordings.recording import chosen_streams, named_camera
from perception.recordings.trajectory import Trajectory, read_trajectory
from perception.rigs import Rig, RigCamera
from perception.rigs.models import Pinhole
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
    predictor = Predictor(network, precision="float32", min_seen=0)
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
    wanted = Predictor(network, precision="float32", min_seen=0)
    last = alone[-1]
    found = wanted.step(last.images, last.rig, np.eye(4), 5.0)
    assert distance(last.objects, found) == 0.0


# Trajectories


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
