"""What the published networks are fed, from the files of a dataset to the input of the head, against independent truth.

On a real nuScenes keyframe the truth is in its info file. On the generated town, whose LiDAR is tilted, it is computed
here from the tables as the published converters do.
"""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from pyquaternion import Quaternion

from perception.data.augment import move_frames
from perception.data.info_files import read_info
from perception.data.loader import collate
from perception.data.nuscenes import NUSCENES_CAMERAS, NuScenesDataset
from perception.errors import DataError
from perception.geometry import rigid_from_yaw
from perception.inference.predictor import Predictor
from perception.models import build_network
from perception.models.bevformer.config import BEVFormerConfig
from perception.models.mapqr.config import MapQRConfig
from perception.models.maptr.config import MapTRConfig
from perception.models.maptrv2.config import MapTRv2Config
from perception.models.maptrv2.encoder import camera_parameters, lifted_points
from perception.models.maptrv2.model import MapTRv2Head
from perception.models.published.backbone import PublishedBackboneConfig
from perception.models.published.geometry import bev_shift, mounted_rig
from perception.recordings.predicting import predict_frames
from perception.recordings.sources import open_recording
from perception.rigs.importers import import_rig
from perception.synthetic import VERSION
from perception.types import NUSCENES_EGO_FROM_LIDAR, Clip, map_tensors

PORTS = {
    "bevformer": BEVFormerConfig, "maptr": MapTRConfig, "gkt": MapTRConfig.gkt, "maptrv2": MapTRv2Config,
    "mapqr": MapQRConfig,
}  # fmt: skip


class Fed(Exception):
    """Stops a pass once the head has its input."""


def build(name, image_size):
    """A port that is narrow where it does not matter here."""
    small = {"channels": 32, "feed_forward": 48, "heads": 4, "decoder_layers": 1, "encoder_layers": 1}
    config, backbone = PORTS[name](), PublishedBackboneConfig(width=2, channels=32)
    return build_network(replace(config, **small, image_size=image_size, backbone=backbone)).eval()


def head_input(model, frame):
    """The arguments of the head for a frame [1, ...], and the images that the backbone gets."""
    seen = {}

    def stop(module, arguments):
        seen["head"] = arguments
        raise Fed

    hooks = [
        model.head.register_forward_pre_hook(stop),
        model.image_encoder.backbone.register_forward_pre_hook(lambda _, arguments: seen.update(pixels=arguments[0])),
    ]
    with torch.no_grad(), pytest.raises(Fed):
        model(frame, model.initial_state(1))
    for hook in hooks:
        hook.remove()
    return seen["head"], seen["pixels"]


def noise(rig):
    """Images of all cameras of a rig by name."""
    rng = np.random.default_rng(0)
    return {camera.name: rng.integers(0, 256, (*camera.image_size, 3), np.uint8) for camera in rig}


def homogeneous(matrix):
    found = np.eye(4)
    found[:3, :3] = matrix
    return found


def assert_close(found, wanted, relative=1e-6):
    """Compares matrices [N, ...] relative to the largest number of each."""
    found, wanted = found.double().numpy(), np.asarray(wanted)
    assert found.shape == wanted.shape
    scale = np.abs(wanted).max(tuple(range(1, wanted.ndim)), keepdims=True)
    assert (np.abs(found - wanted) / scale).max() < relative


class Truth:
    """A sample as the published code has it: calibration [N, ...] in pixels of the stored images, float64."""

    def __init__(self, cam2img, lidar2cam, cam2ego, lidar2ego):
        self.cam2img, self.lidar2cam, self.cam2ego, self.lidar2ego = map(
            np.asarray, (cam2img, lidar2cam, cam2ego, lidar2ego)
        )

    def check(self, name, head, scale, padded):
        """Compares the input of a port's head."""
        resize = np.diag([scale, scale, 1.0, 1.0])
        if name != "maptrv2":
            lidar2img = resize @ np.stack([homogeneous(m) for m in self.cam2img]) @ self.lidar2cam
            assert_close(head[1][0], lidar2img)
            assert head[3] == padded
            return
        _, rig, ego_from_lidar, image_size = head
        assert image_size == padded
        assert_close(ego_from_lidar, self.lidar2ego[None])
        assert_close(rig.ego_from_cam[0], self.cam2ego)
        own = [[m[0, 0], m[1, 1], m[0, 2], m[1, 2], scale, 0, 0, 0, scale, 0, *cam[:3].ravel()]
               for m, cam in zip(self.cam2img, self.cam2ego, strict=True)]  # fmt: skip
        config = MapTRv2Config(image_scale=scale)
        assert_close(camera_parameters(rig, scale)[0], own)
        (H, W), (h, w) = padded, (padded[0] // 32, padded[1] // 32)
        depth = np.arange(*config.depth_range)[:, None, None]
        v, u = np.linspace(0, H - 1, h)[:, None], np.linspace(0, W - 1, w)
        pixels = np.stack(np.broadcast_arrays(u * depth / scale, v * depth / scale, depth), -1)  # of the own image
        points = lifted_points(config, rig, ego_from_lidar, padded, (h, w))[0]
        for found, intrinsic, cam2ego in zip(points, self.cam2img, self.cam2ego, strict=True):
            lidar2cam = np.linalg.inv(self.lidar2ego) @ cam2ego
            wanted = pixels @ np.linalg.inv(intrinsic).T @ lidar2cam[:3, :3].T + lidar2cam[:3, 3]
            assert np.abs(found.double().numpy() - wanted).max() < 1e-4  # metres


@pytest.fixture(scope="module")
def keyframe(real_keyframe) -> tuple[Clip, Truth]:
    """A real keyframe whose images are halved, and the calibration of its info file."""
    entry = json.loads((real_keyframe / "sample.json").read_text())["data_list"][0]
    cameras = [entry["images"][name] for name in NUSCENES_CAMERAS]
    fields = ([camera[field] for camera in cameras] for field in ("cam2img", "lidar2cam", "cam2ego"))
    clip = read_info(real_keyframe / "sample.json").clip(image_size=(450, 800), data_prefix={"img": "."})
    return clip, Truth(*fields, entry["lidar_points"]["lidar2ego"])


@pytest.mark.parametrize("name", PORTS)
def test_the_calibration_of_a_real_keyframe_is_that_of_its_info_file(name, keyframe):
    clip, truth = keyframe
    head, pixels = head_input(build(name, (450, 800)), clip.frames)
    assert 1.4 < np.degrees(np.arccos(truth.lidar2ego[2, 2])) < 2.8
    truth.check(name, head, 0.5, (480, 800))
    assert not pixels[..., 450:, :].any() and pixels[..., 449, :].any()  # padded below, after normalisation


def test_images_of_a_real_keyframe_are_halved_in_place(keyframe, real_keyframe):
    """As OpenCV does it in the published pipeline, but for rounding and the decoder of the JPEG; a shift would show."""
    cv2 = pytest.importorskip("cv2")
    _, pixels = head_input(build("maptr", (450, 800)), keyframe[0].frames)
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    entry = json.loads((real_keyframe / "sample.json").read_text())["data_list"][0]
    image = cv2.imread(str(real_keyframe / entry["images"]["CAM_BACK"]["img_path"]))
    wanted = (cv2.resize(image, (800, 450))[..., ::-1] - mean) / std
    found = pixels.view(6, 3, 480, 800)[NUSCENES_CAMERAS.index("CAM_BACK"), :, :450].permute(1, 2, 0).numpy()
    differences = {
        shift: np.abs(found[5:-5, 5:-5] - np.roll(wanted, shift, (0, 1))[5:-5, 5:-5]).mean()
        for shift in ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))
    }
    assert differences.pop((0, 0)) < 0.01 < 0.2 * min(differences.values())  # half a grey level


@pytest.fixture(scope="module")
def town(town_root) -> NuScenesDataset:
    return NuScenesDataset(town_root, VERSION, "town_val", image_size=(64, 112))


@pytest.fixture(scope="module")
def tables(town_root):
    def rows(name):
        return {row["token"]: row for row in json.loads((town_root / VERSION / f"{name}.json").read_text())}

    return {name: rows(name) for name in ("sample_data", "calibrated_sensor", "ego_pose", "sensor")}


def pose_of(row):
    found = homogeneous(Quaternion(row["rotation"]).rotation_matrix)
    found[:3, 3] = row["translation"]
    return found


def truth_of(tables, token) -> tuple[Truth, np.ndarray, int]:
    """Calibration of a sample by the published converter, global_from_ego and the time of its LiDAR."""
    files = {}
    for row in tables["sample_data"].values():
        if row["sample_token"] == token and row["is_key_frame"]:
            calibration = tables["calibrated_sensor"][row["calibrated_sensor_token"]]
            files[tables["sensor"][calibration["sensor_token"]]["channel"]] = row, calibration
    lidar, calibration = files["LIDAR_TOP"]
    lidar2ego, ego2global = pose_of(calibration), pose_of(tables["ego_pose"][lidar["ego_pose_token"]])
    found = []
    for name in NUSCENES_CAMERAS:
        row, calibration = files[name]
        cam2ego, own_ego2global = pose_of(calibration), pose_of(tables["ego_pose"][row["ego_pose_token"]])
        cam2lidar = np.linalg.inv(lidar2ego) @ np.linalg.inv(ego2global) @ own_ego2global @ cam2ego
        found.append((calibration["camera_intrinsic"], np.linalg.inv(cam2lidar), cam2ego))
    return Truth(*(np.stack(x) for x in zip(*found, strict=True)), lidar2ego), ego2global, lidar["timestamp"]


@pytest.mark.parametrize("name", PORTS)
def test_the_calibration_of_the_town_is_that_of_its_tables(name, town, tables):
    model = build(name, (64, 112))
    for k in (1, 6):
        frame = map_tensors(lambda tensor: tensor[:, 0], collate([town[k]]).frames)
        truth, _, _ = truth_of(tables, town.tokens[k])
        assert truth.lidar2ego[2, 2] < np.cos(np.radians(1.0))  # the tilt would be noticed
        moved = truth.lidar2cam @ np.linalg.inv(truth.lidar2ego) @ truth.cam2ego
        assert np.abs(moved[:, :3, 3]).max() > 0.1  # so would be the motion between the exposures
        truth.check(name, head_input(model, frame)[0], 0.5, (64, 128))


def test_ego_motion_is_that_of_the_published_code(town, tables):
    """Shift and angle by the published formulas from global poses; times from the tables."""
    model = build("bevformer", (64, 112))
    samples = [truth_of(tables, token) for token in town.tokens]
    assert len(samples) == 8
    for k, ((_, before, start), (_, now, end)) in enumerate(pairwise(samples), 1):
        if k == 4:  # another scene
            continue
        frame = map_tensors(lambda tensor: tensor[:, 0], collate([town[k]]).frames)
        assert frame.seconds_since_prev.item() == pytest.approx((end - start) * 1e-6, abs=1e-6)
        bus = head_input(model, frame)[0][2]
        assert bus.shape == (1, 18)
        delta = now[:3, 3] - before[:3, 3]
        yaw, yaw_before = (np.degrees(np.arctan2(pose[1, 0], pose[0, 0])) for pose in (now, before))
        turn = (yaw - yaw_before + 180) % 360 - 180
        assert bus[0, -1].item() == pytest.approx(turn, abs=1e-4)
        assert bus[0, :3].norm().item() == pytest.approx(np.linalg.norm(delta), rel=1e-5)
        length, angle = np.hypot(*delta[:2]), np.radians(yaw) - np.arctan2(delta[1], delta[0])
        low, high = model.config.low, model.config.high
        wanted = [length * np.sin(angle) / (high[0] - low[0]), length * np.cos(angle) / (high[1] - low[1])]
        assert length > 0.5
        assert bev_shift(model.config, bus)[0].tolist() == pytest.approx(wanted, abs=1e-7)
    first = map_tensors(lambda tensor: tensor[:, 0], collate([town[4]]).frames)
    bus = head_input(model, first)[0][2]
    assert not bus[0, :3].any() and bus[0, -1] == 0


def test_augmentation_moves_cameras_and_keeps_the_lidar(town):
    """The cameras on the vehicle move with the world; a mirrored camera looks at the mirrored world."""
    frames = town[1].frames
    moved_from_ego = rigid_from_yaw(0.1, (0.5, -0.3, 0.0)) @ np.diag([1.0, -1.0, 1.0, 1.0])
    moved = move_frames(frames, moved_from_ego)
    assert torch.equal(moved.ego_from_lidar, frames.ego_from_lidar)
    before, after = mounted_rig(frames).ego_from_cam[0].double(), mounted_rig(moved).ego_from_cam[0].double()
    wanted = torch.from_numpy(moved_from_ego) @ before @ torch.diag(torch.tensor([-1.0, 1, 1, 1], dtype=torch.float64))
    torch.testing.assert_close(after, wanted, atol=1e-5, rtol=0)


def watched(predictor):
    """A list that will hold the arguments of the head in each step."""
    seen = []
    (head,) = (module for module in predictor.model.modules() if isinstance(module, MapTRv2Head))
    head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    return seen


def test_live_use_takes_the_pose_of_the_rig(town_root, town, tables):
    rig = import_rig(town_root / VERSION, "nuscenes")
    truth, pose, _ = truth_of(tables, town.tokens[0])
    np.testing.assert_allclose(rig.ego_from_lidar, truth.lidar2ego, atol=1e-12)
    for given, wanted in ((rig, truth.lidar2ego), (type(rig)(rig.cameras), np.array(NUSCENES_EGO_FROM_LIDAR))):
        predictor = Predictor(build("maptrv2", (64, 112)), rig=given)
        seen = watched(predictor)
        predictor.step(noise(rig), pose, 0.0)
        assert_close(seen[0][2], wanted[None])


def test_cameras_that_expose_at_other_times_are_lifted_from_their_place_on_the_vehicle(town_root, tables, town):
    rig = import_rig(town_root / VERSION, "nuscenes")
    _, pose, _ = truth_of(tables, town.tokens[0])
    predictor = Predictor(build("maptrv2", (64, 112)), rig=rig)
    seen, images = watched(predictor), noise(rig)
    times = dict.fromkeys(rig.names, 0.45)
    predictor.step(images, pose, 0.0)
    predictor.step(images, pose @ rigid_from_yaw(0.05, (5.0, 0.2, 0.0)), 0.5, camera_times_s=times)
    first, second = (rig.ego_from_cam for _, rig, *_ in seen)
    torch.testing.assert_close(second, first, atol=1e-5, rtol=0)


def test_recordings_are_predicted_with_the_calibration_of_their_dataset(town_root, town, tables):
    """The head gets from a recording what it gets from the dataset: poses on the vehicle, and the pose of the LiDAR."""
    recording, predictor = open_recording(town_root), Predictor(build("maptrv2", (64, 112)))
    seen = watched(predictor)
    for k, _ in zip(range(2), predict_frames(predictor, recording.rig, recording.frames()), strict=False):
        truth, _, _ = truth_of(tables, town.tokens[k])
        truth.check("maptrv2", seen[k], 0.5, (64, 128))


def test_the_motion_since_the_exposures_is_checked(town_root, town, tables):
    rig = import_rig(town_root / VERSION, "nuscenes")
    predictor, moved = Predictor(build("maptrv2", (64, 112)), rig=rig), np.tile(np.eye(4), (6, 1, 1))
    for given, words in (
        ({"ego_from_exposure": moved, "camera_times_s": {}}, "camera_times_s and ego_from_exposure were given"),
        ({"ego_from_exposure": moved[:5]}, "ego_from_exposure has 5 matrices for 6 images"),
        ({"ego_from_exposure": 2 * moved}, r"ego_from_exposure\[0\] is not a rigid transform"),
    ):
        with pytest.raises(DataError, match=words):
            predictor.step(noise(rig), np.eye(4), 0.0, **given)
