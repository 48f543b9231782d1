"""Live use as vehicles have it: images by name, cameras at other times, no pose, motion from the CAN bus."""

import io
import json
import warnings

import numpy as np
import pytest
import torch
from conftest import RAW
from PIL import Image

from perception.data.nuscenes import NuScenesDataset
from perception.errors import DataError, PerceptionWarning
from perception.geometry import invert_rigid, rigid_from_quaternion, yaw_from_rotation
from perception.inference.ego_motion import Motion
from perception.inference.predictor import Predictor
from perception.rigs.models import Pinhole
from perception.rigs.rig import Rig, RigCamera
from perception.synthetic import VERSION

NAMES = ("front left", "front", "front right", "back left", "back", "back right")


def rig_of(camera_rig, size) -> Rig:
    """The named cameras of pinholes."""
    cameras = []
    for name, matrix, pose in zip(NAMES, *map(np.asarray, camera_rig[:2]), strict=False):
        pinhole = Pinhole(
            fx=float(matrix[0, 0]), fy=float(matrix[1, 1]), cx=float(matrix[0, 2]), cy=float(matrix[1, 2])
        )
        cameras.append(RigCamera(name, size, pinhole, pose.astype(np.float64)))
    return Rig(cameras)


@pytest.fixture(scope="module")
def rig(live_frames):
    return rig_of(live_frames[0][1], RAW)


def encoded(image, kind="PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def same(one, other) -> bool:
    parts = zip((*one.boxes, *one.lines, *one.seen), (*other.boxes, *other.lines, *other.seen), strict=True)
    return len(one.boxes.score) > 0 and all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in parts)


@pytest.fixture
def live(make_live, live_kind, rig):
    """Makes predictors or runtimes of the rig."""
    return lambda **settings: make_live[live_kind](rig=rig, **settings)


def test_images_of_every_kind_give_the_same(live, live_frames, tmp_path):
    images, _, pose, time = live_frames[0]
    Image.fromarray(images[0]).save(tmp_path / "front_left.png")
    kinds = (
        tmp_path / "front_left.png", encoded(images[1]), Image.fromarray(images[2]),
        torch.from_numpy(images[3]).permute(2, 0, 1), np.dstack([images[4], images[4][..., 0]]),
        np.frombuffer(encoded(images[5]), np.uint8),
    )  # fmt: skip
    expected = live().step(images, pose, time)
    assert same(live().step(dict(zip(NAMES, kinds, strict=True)), global_from_ego=pose, time_s=time), expected)
    assert same(live().step(list(kinds), pose, time_s=time), expected)
    assert same(live().step(np.stack(images), pose, time), expected)
    with pytest.raises(DataError, match=r"images\['back'\] is float64 \(64, 112, 3\); give RGB"):
        live().step(dict(zip(NAMES, [*images[:4], images[4] / 255, images[5]], strict=True)), pose, time)
    with pytest.raises(DataError, match=r"images\['front'\] is 56 x 64 pixels, and the rig is calibrated for 112 x 64"):
        live().step({"front": encoded(images[1][:, ::2])}, pose, time)


def test_blue_first(small_network, rig, live_frames):
    images, camera_rig, pose, time = live_frames[0]
    expected = Predictor(small_network).step(images, camera_rig, pose, time)
    bgr = [image[..., ::-1] for image in images]
    for given, settings in (((bgr, camera_rig), {}), ((bgr,), {"rig": rig})):
        assert same(Predictor(small_network, bgr=True, **settings).step(*given, pose, time), expected)
    mixed = [bgr[0], encoded(images[1]), *bgr[2:]]
    assert same(Predictor(small_network, bgr=True, rig=rig).step(mixed, pose, time), expected)


def test_without_a_pose_or_a_time_every_frame_stands_for_itself(live, live_frames):
    predictor = live()
    frames = [(dict(zip(NAMES, frame[0], strict=True)), *frame[2:]) for frame in live_frames]
    with pytest.warns(PerceptionWarning, match="no pose was given, so every frame stands for itself") as warned:
        first = predictor.step(frames[0][0])
    assert len(warned) == 1 and first.info.time_s is None and first.info.global_from_ego is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once, and in every result
        second = predictor.step(frames[1][0], time_s=frames[1][2])
        third = predictor.step(frames[2][0], frames[2][1])
        fourth = predictor.step(*frames[2])
    for found, frame, reason in (
        (first, frames[0], "no pose was given"), (second, frames[1], "no pose was given"),
        (third, frames[2], "no time was given"), (fourth, frames[2], "the last frame had no pose and time"),
    ):  # fmt: skip
        assert same(found, live().step(*frame))
        assert found.to_dict()["memory"] == {"used": False, "reason": reason}
        assert any("stands for itself" in text for text in found.warnings) is (found is not fourth)
    assert second.info.time_s == frames[1][2] and (third.info.global_from_ego == frames[2][1]).all()
    after = predictor.step(frames[2][0], frames[2][1], frames[2][2] + 0.5)
    assert after.info.used_memory and not same(after, fourth)


def test_motion_from_speed_and_yaw_rate_stands_for_the_pose(live, live_frames, small_town):
    """The town's poses as a CAN bus tells them: the results are close to those with the true poses."""
    by_pose, by_motion, alone = live(), live(), live()
    moved = 0
    for k, (images, _, pose, time) in enumerate(live_frames):
        expected = by_pose.step(images, pose, time)
        if k == 0:
            found = by_motion.step(images, motion=Motion.from_speed_yaw_rate(0.0, 0.0, 0.5), time_s=time)
        else:
            step = invert_rigid(live_frames[k - 1][2]) @ pose  # what wheels and a gyroscope measure between frames
            seconds = time - live_frames[k - 1][3]
            speed, yaw_rate = np.linalg.norm(step[:3, 3]) / seconds, yaw_from_rotation(step) / seconds
            moved += speed * seconds
            found = by_motion.step(images, motion=Motion.from_speed_yaw_rate(speed, yaw_rate, seconds), time_s=time)
        assert found.info.used_memory is (k > 0) and found.info.time_s == time
        order, scores = (np.sort(np.asarray(x.boxes.score)) for x in (found, expected))
        assert order == pytest.approx(scores, abs=2e-3)
        assert np.asarray(found.lines.score) == pytest.approx(np.asarray(expected.lines.score), abs=2e-3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            without = alone.step(images)
    assert moved > 1 and not np.allclose(np.sort(np.asarray(without.boxes.score)), scores, atol=2e-3)
    with pytest.raises(DataError, match="global_from_ego and motion"):
        by_motion.step(images, pose, time + 1, motion=Motion.from_speed_yaw_rate(1.0, 0.0, 1.0))


# --- Cameras at other times -------------------------------------------------------------------------------------------


def rows(root, name):
    return {row["token"]: row for row in json.loads((root / VERSION / f"{name}.json").read_text())}


def pose_of(row):
    return rigid_from_quaternion(row["rotation"], row["translation"])


def test_cameras_at_other_times_are_those_of_nuscenes(town_root, small_network):
    """The tables hold the pose of the vehicle at each camera's exposure; step gets keyframe poses and times alone."""
    stored = NuScenesDataset(town_root, VERSION, "town_val", image_size=(128, 224))
    data, ego, mounted, sensors = (
        rows(town_root, n) for n in ("sample_data", "ego_pose", "calibrated_sensor", "sensor")
    )
    frames, errors, uncorrected = [], [], []
    predictor = None
    hook = small_network.register_forward_pre_hook(lambda _, given: frames.append(given[0].rig.ego_from_cam[0]))
    for k in range(3):
        token = stored.tokens[k]
        keyframe = {}
        for row in data.values():
            if row["sample_token"] == token and row["is_key_frame"]:
                mounting = mounted[row["calibrated_sensor_token"]]
                keyframe[sensors[mounting["sensor_token"]]["channel"]] = row, mounting
        pose, time = stored.ego_pose(k), float(stored.timestamps[k])
        cameras = [keyframe[name] for name in stored.cameras]
        if predictor is None:
            static = [(mounting["camera_intrinsic"], pose_of(mounting)) for _, mounting in cameras]
            rig = rig_of((np.array([m for m, _ in static]), np.array([p for _, p in static]), None), (128, 224))
            predictor = Predictor(small_network, rig=rig)
        images = {n: town_root / row["filename"] for n, (row, _) in zip(NAMES, cameras, strict=True)}
        times = {n: row["timestamp"] * 1e-6 for n, (row, _) in zip(NAMES, cameras, strict=True)}
        predictor.step(images, pose, time, camera_times_s=times)
        for n, (row, mounting) in enumerate(cameras):
            exact = invert_rigid(pose) @ pose_of(ego[row["ego_pose_token"]]) @ pose_of(mounting)
            if k:
                errors.append(np.abs(frames[-1][n].numpy() - exact).max())
                uncorrected.append(np.abs(pose_of(mounting) - exact).max())
    hook.remove()
    assert max(uncorrected) > 0.1 and max(errors) < 0.1 * max(uncorrected)


def test_times_of_cameras_that_are_far_off(live, live_frames):
    predictor = live()
    images, _, pose, time = live_frames[0]
    with pytest.warns(PerceptionWarning) as warned:
        result = predictor.step(images, pose, time, camera_times_s={"back": time - 0.3, "front": None})
    assert {str(w.message) for w in warned} == set(result.warnings)
    assert any("camera 'back' exposed -0.3 s from the time of the frame: what moves" in w for w in result.warnings)
    assert any("camera 'back' exposed -0.3 s" in w and "not known in a first frame" in w for w in result.warnings)
    _, _, pose, time = live_frames[1]
    assert not predictor.step(live_frames[1][0], pose, time, camera_times_s={"back": time - 0.2}).warnings
    for times, given, message in (
        ({"back": (time + 1) * 1e3}, time + 1, "looks like milliseconds since 1970"),
        (
            {"back": time - 1},
            time + 1,
            r"camera_times_s of camera 'back' is -2 s from time_s; give seconds of one clock",
        ),
        ({"rear": time}, time + 1, "the rig has no camera 'rear'; it has front left"),
        ([time] * 6, time + 1, "camera_times_s is list; give a dict"),
        ({"back": "now"}, time + 1, "time_s is str"),
        ({"back": time}, None, "camera_times_s was given without time_s"),
    ):
        with pytest.raises(DataError, match=message):
            predictor.step(images, None if given is None else pose, given, camera_times_s=times)


def test_times_without_names(make_live, live_kind, live_frames):
    live = make_live[live_kind]()
    images, rig, pose, time = live_frames[0]
    live.step(images, rig, pose, time, camera_times_s=[time] * 6)
    for times in ({"front": time}, [time] * 5, 3.0):
        with pytest.raises(DataError, match="camera_times_s has not one time for each of the 6 images; give a list"):
            live.step(images, rig, pose, time + 0.5, camera_times_s=times)


FIVE_LINES = """
from pathlib import Path
from perception import Predictor, Rig
predictor = Predictor("nano", rig=Rig.load("rig.yaml"))
objects = predictor.step({path.stem: path for path in Path("images").glob("*.jpg")})
print(objects.to_json())
"""


def test_five_lines_on_real_images(real_keyframe, tmp_path, monkeypatch):
    """The README's example of an own rig: a folder of images and a YAML file."""
    info = json.loads((real_keyframe / "sample.json").read_text())["data_list"][0]["images"]
    cameras = []
    for name, camera in info.items():
        m, file = np.array(camera["cam2img"]), next(real_keyframe.glob(f"*__{name}__*.jpg"))
        pinhole = Pinhole(fx=m[0, 0], fy=m[1, 1], cx=m[0, 2], cy=m[1, 2])
        cameras.append(RigCamera(name, (900, 1600), pinhole, np.array(camera["cam2ego"])))
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{name}.jpg").symlink_to(file)
    Rig(cameras).save(tmp_path / "rig.yaml")
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    namespace = {"print": lambda text: printed.write(text)}
    with pytest.warns(PerceptionWarning, match="no pose was given"):
        exec(FIVE_LINES, namespace)
    objects = namespace["objects"]
    assert objects.to_dict() == json.loads(printed.getvalue()) and objects.info.weights.name == "nano"
    assert objects.info.used_memory is False and len(objects.boxes.score) > 0
    # The same as with arrays and matrices.
    images = [np.asarray(Image.open(tmp_path / "images" / f"{name}.jpg")) for name in info]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = Predictor("nano").step(images, Rig(cameras).camera_rig())
    assert same(objects, expected)
