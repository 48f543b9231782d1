"""Weights files say what they were trained on, and live use says where data are unlike it."""

import hashlib
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors import safe_open

from perception.data.nuscenes import NuScenesDataset
from perception.errors import CheckpointError, PerceptionWarning
from perception.inference.predictor import Predictor
from perception.models.checkpoint import (
    load_model,
    read_metrics,
    read_provenance,
    save_checkpoint,
    shipped_weights,
    write_provenance,
)
from perception.models.provenance import GENERATED, Provenance, provenance_of
from perception.synthetic import VERSION
from perception.synthetic.sensors import EIGHT_CAMERAS, FIVE_CAMERAS, SIX_CAMERAS, make_cameras
from perception.types import CameraRig


def tensor_bytes(path) -> bytes:
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def test_a_dataset_is_described_as_its_tables_say(town_root):
    rows = {
        name: json.loads((town_root / VERSION / f"{name}.json").read_text())
        for name in ("calibrated_sensor", "sample", "scene", "sensor", "sample_data")
    }
    cameras = [row for row in rows["calibrated_sensor"] if row["camera_intrinsic"]]
    # Images of 128 x 224 fill one of 176 x 448 from side to side, and one of 128 x 112 from top to bottom.
    focal = np.array([row["camera_intrinsic"][0][0] for row in cameras])
    heights = [row["translation"][2] for row in cameras]
    for image_size, width in (((176, 448), 224), ((128, 112), 112)):
        dataset = NuScenesDataset(town_root, VERSION, "town_val", image_size=image_size)
        found = provenance_of(dataset)
        assert found.versions == (GENERATED,) == (VERSION,) and found.is_generated
        assert found.frames == len(rows["sample"]) and found.scenes == len(rows["scene"]) == 2
        assert found.cameras == dataset.cameras and found.interval_s == (0.5, 0.5)
        assert found.focal == pytest.approx((focal.min() / width, focal.max() / width), rel=0.03)
        assert found.height == pytest.approx((min(heights), max(heights)), abs=0.05)
        twice = NuScenesDataset([town_root] * 2, VERSION, "town_val", image_size=image_size)
        assert provenance_of(twice) == found
    assert "trained on generated scenes only (2 scenes, 6 cameras, focal lengths of" in str(found)
    assert "trained on v1.0-trainval (" in str(Provenance(("v1.0-trainval",), 1, 1, ("A",), (1, 1), (1, 1), (0, 0)))


def test_a_checkpoint_holds_its_provenance(tmp_path, town_root, small_network):
    path = tmp_path / "weights.safetensors"
    described = provenance_of(NuScenesDataset(town_root, VERSION, "town_val", image_size=(40, 80)))
    save_checkpoint(path, small_network, {"nds": 0.5}, provenance=described)
    assert read_provenance(path) == described == Predictor(path).provenance
    assert Predictor(small_network).provenance is None
    save_checkpoint(path, small_network, {"nds": 0.5})
    assert read_provenance(path) is None
    before = tensor_bytes(path)
    write_provenance(path, described)
    write_provenance(path, described)
    assert read_provenance(path) == described and read_metrics(path) == {"nds": 0.5}
    assert tensor_bytes(path) == before and (path.stat().st_size - len(before)) % 8 == 0
    loaded = load_model(path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in small_network.state_dict().items())
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors: no such checkpoint"):
        write_provenance(tmp_path / "nowhere.safetensors", described)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"versions": 1}', "focal", "\udcff"])
def test_a_malformed_provenance_is_named(tmp_path, small_network, text):
    class Broken(Provenance):
        def to_json(self):
            return text.encode(errors="replace").decode()

    path = tmp_path / "weights.safetensors"
    save_checkpoint(path, small_network, {}, provenance=Broken((), 0, 0, (), (0, 0), (0, 0), (0, 0)))
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: provenance is malformed .*write_provenance"):
        read_provenance(path)


def test_the_shipped_weights_are_those_of_the_evaluation_and_say_what_they_are(tmp_path):
    shipped = read_provenance("nano")
    assert shipped.is_generated and shipped.scenes == 380 and len(shipped.cameras) == 6
    # The header has changed since they were trained, the tensors have not.
    digest = hashlib.sha256(tensor_bytes(shipped_weights())).hexdigest()
    assert digest == "6b9945a0e8fab3ee99e4df5b0306464cc50e75f0e655a4c2c25deb4277551f5d"
    copy = tmp_path / "copy.safetensors"
    shutil.copy(shipped_weights(), copy)
    write_provenance(copy, shipped)
    with safe_open(copy, "np") as one, safe_open(shipped_weights(), "np") as other:
        assert one.metadata() == other.metadata()


def rig_of(mountings, height=0.0) -> CameraRig:
    cameras = make_cameras(np.random.default_rng(3), (176, 448), mountings)
    poses = np.stack([camera.ego_from_cam for camera in cameras])
    poses[:, 2, 3] += height
    return CameraRig(np.stack([camera.img_from_cam for camera in cameras]), poses, np.ones(len(cameras), bool))


def test_each_limit_of_what_is_like_the_training():
    trained = Provenance(("a",), 10, 1, tuple("ABCDEF"), (0.8, 1.2), (1.0, 2.0), (0.1, 0.5))

    def kinds(count=6, focal=1.0, height=1.5, seconds=0.2, absent=False) -> list[str]:
        img_from_cam, ego_from_cam = np.tile(np.eye(3), (count, 1, 1)), np.tile(np.eye(4), (count, 1, 1))
        img_from_cam[:, 0, 0], ego_from_cam[:, 2, 3] = 448.0, 1.5
        img_from_cam[-1, 0, 0], ego_from_cam[-1, 2, 3] = 448.0 * focal, height
        present = np.ones(count, bool)
        present[-1] = not absent
        found = trained.misfit(CameraRig(img_from_cam, ego_from_cam, present), (176, 448), seconds)
        assert all(f"camera {count - 1} " in found[name] for name in found if name.endswith(("length", "height")))
        return [name.removeprefix("weights: ") for name in found]

    assert kinds() == kinds(3) == kinds(12) == [] and kinds(2) == kinds(13) == ["cameras"]
    assert kinds(focal=0.65) == kinds(focal=1.49) == [] and kinds(focal=0.63) == kinds(focal=1.51) == ["focal length"]
    assert kinds(height=0.51) == kinds(height=2.49) == [] and kinds(height=0.49) == kinds(height=2.51) == ["height"]
    assert kinds(seconds=0.041) == kinds(seconds=1.24) == [] == kinds(seconds=0.0)
    assert kinds(seconds=0.039) == kinds(seconds=1.26) == ["interval"]
    assert kinds(focal=9.0, height=9.0, absent=True) == []


def test_only_data_unlike_the_training_are_named():
    shipped = read_provenance("nano")

    def misfit(rig, seconds=0.5) -> set:
        return {kind.removeprefix("weights: ") for kind in shipped.misfit(rig, (176, 448), seconds)}

    assert misfit(rig_of(SIX_CAMERAS)) == misfit(rig_of(FIVE_CAMERAS)) == set()
    for seconds, expected in ((0.0, set()), (0.1, set()), (1.0, set()), (0.05, {"interval"}), (1.5, {"interval"})):
        assert misfit(rig_of(SIX_CAMERAS), seconds) == expected
    assert misfit(rig_of(EIGHT_CAMERAS)) == {"focal length"}  # one of 1.3 image widths
    assert misfit(rig_of(SIX_CAMERAS, height=1.0)) == {"height"}
    assert misfit(rig_of(SIX_CAMERAS[:2])) == {"cameras"}
    narrow = rig_of(EIGHT_CAMERAS)
    absent = narrow._replace(present=np.array([m.focal < 1 for m in EIGHT_CAMERAS]))
    assert misfit(absent) == set()  # what is not there does not count
    (sentence,) = shipped.misfit(narrow, (176, 448), 0.5).values()
    assert sentence.startswith("camera 1 has a focal length of 1.3") and "trained on generated scenes only" in sentence


def test_the_predictor_says_once_where_the_rig_is_unlike_the_training(live_frames):
    predictor = Predictor("nano", min_score=0.3)
    images, rig, pose, time = live_frames[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert predictor.step(images, rig, pose, time).warnings == ()
    high = rig._replace(ego_from_cam=rig.ego_from_cam + np.eye(4)[2][:, None] * np.eye(4)[3])
    images, _, pose, time = live_frames[1]
    with pytest.warns(PerceptionWarning, match=r"is at a height of 2\.\d+ m; the weights were trained on") as caught:
        result = predictor.step(images, high, pose, time)
    assert len(caught) == 1 and result.warnings == (str(caught[0].message),)
    images, _, pose, time = live_frames[2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert predictor.step(images, high, pose, time).warnings == result.warnings
