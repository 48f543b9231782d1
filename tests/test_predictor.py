"""The predictor gives the results of streaming a dataset, and rejects invalid inputs."""

import json

import numpy as np
import pytest
import torch
from conftest import noisy

from perception.data.nuscenes import NuScenesDataset
from perception.errors import CheckpointError, ConfigError, DataError
from perception.inference.predictor import Predictor
from perception.inference.sequence import predict_stream
from perception.models.bev_transformer.config import BEVTransformerConfig
from perception.models.bev_transformer.model import BEVTransformer
from perception.models.checkpoint import read_metrics, save_checkpoint, shipped_weights, weights_file
from perception.synthetic import VERSION
from perception.types import LiveObjects, map_tensors

# The town's images are 128 x 224: these are scaled by 0.75 and cropped by 2.5 pixels at both sides.
SMALL = BEVTransformerConfig.preset(
    "nano", image_size=(96, 162), grid=(20, 20), channels=16, depth_bins=8, backbone_stages=2, decoder_layers=2,
    box_queries=20, line_queries=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> BEVTransformer:
    return noisy(BEVTransformer, SMALL)


def intrinsics(root) -> dict:
    """Returns the intrinsics [3, 3] of the tables by sample token and channel."""

    def rows(name):
        return {row["token"]: row for row in json.loads((root / VERSION / f"{name}.json").read_text())}

    calibrated, sensors = rows("calibrated_sensor"), rows("sensor")
    found = {}
    for data in rows("sample_data").values():
        record = calibrated[data["calibrated_sensor_token"]]
        found[data["sample_token"], sensors[record["sensor_token"]]["channel"]] = record["camera_intrinsic"]
    return found


class Sequence:
    """The inputs of the first scene of the town: stored images, their calibration, poses, times."""

    def __init__(self, root):
        stored = NuScenesDataset(root, VERSION, "town_val", image_size=(128, 224))
        self.samples = [int(i) for i in np.flatnonzero(stored.scene_of_sample == 0)]
        frames = [map_tensors(lambda tensor: tensor[0], stored[i].frames) for i in self.samples]
        self.tokens = [stored.tokens[i] for i in self.samples]
        self.images = [frame.images.permute(0, 2, 3, 1).numpy() for frame in frames]  # [N, H, W, 3] each
        exact = intrinsics(root)  # those of the dataset are rounded to float32
        self.rigs = [
            frame.rig._replace(
                img_from_cam=torch.from_numpy(np.array([exact[token, camera] for camera in stored.cameras]))
            )
            for token, frame in zip(self.tokens, frames, strict=True)
        ]
        self.poses = [stored.ego_pose(i) for i in self.samples]
        self.times = [float(stored.timestamps[i]) for i in self.samples]

    def arguments(self, k: int) -> list:
        return [self.images[k], self.rigs[k], self.poses[k], self.times[k]]


@pytest.fixture(scope="module")
def sequence(town_root) -> Sequence:
    return Sequence(town_root)


def assert_same(found, expected, tolerance=1e-5):
    found, expected = (x.objects if isinstance(x, LiveObjects) else x for x in (found, expected))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def differ(first, second) -> bool:
    return not torch.allclose(first.boxes.center, second.boxes.center, atol=1e-3)


def test_the_predictor_equals_the_stream_of_the_dataset(town_root, sequence, model):
    dataset = NuScenesDataset(town_root, VERSION, "town_val", image_size=SMALL.image_size)
    stream = predict_stream(model, dataset)
    predictor = Predictor(model, precision="float32")
    for k, token in enumerate(sequence.tokens):
        objects = predictor.step(*sequence.arguments(k))
        assert_same(objects, stream.objects[token])
    # Poses matter: without their motion the memory is warped wrongly.
    predictor.reset()
    for k in range(len(sequence.tokens)):
        images, rig, _, time = sequence.arguments(k)
        objects = predictor.step(images, rig, np.eye(4), time)
    assert differ(objects, stream.objects[sequence.tokens[-1]])


def test_poses_far_from_the_origin_change_nothing(sequence, model):
    # A pose at 4000 km has a resolution of half a metre in float32.
    near, far = Predictor(model), Predictor(model)
    moved = np.eye(4)
    moved[:2, 3] = 4e6, -4e6
    for k in range(3):
        images, rig, pose, time = sequence.arguments(k)
        assert_same(far.step(images, rig, moved @ pose, time), near.step(images, rig, pose, time), 1e-4)


def test_memory_ends_with_reset_and_with_a_gap(sequence, model):
    fresh = Predictor(model).step(*sequence.arguments(1))
    predictor = Predictor(model)
    predictor.step(*sequence.arguments(0))
    remembering = predictor.step(*sequence.arguments(1))
    assert differ(remembering, fresh)
    predictor.reset()
    assert_same(predictor.step(*sequence.arguments(1)), fresh)
    for seconds, forgets in ((1.9, False), (2.1, True)):
        predictor.reset()
        images, rig, pose, _ = sequence.arguments(0)
        predictor.step(images, rig, pose, sequence.times[1] - seconds)
        assert differ(predictor.step(*sequence.arguments(1)), fresh) is not forgets


def test_calibration_is_checked_against_the_size_of_its_image(sequence, model):
    images, rig, pose, time = sequence.arguments(0)
    tiny = [np.zeros((1, 1, 3), np.uint8), np.zeros((1, 4000, 3), np.uint8), *images[2:]]
    tiny_rig = rig._replace(img_from_cam=rig.img_from_cam.clone())
    for camera, width in ((0, 1.0), (1, 4000.0)):
        tiny_rig.img_from_cam[camera] = torch.tensor([[width, 0, width / 2], [0, width, 0.5], [0, 0, 1]])
    assert Predictor(model).step(tiny, tiny_rig, pose, time).boxes.center.isfinite().all()
    with pytest.raises(DataError, match=r"img_from_cam\[0\] has focal lengths of .* image of 1 x 1 pixels"):
        Predictor(model).step(tiny, rig, pose, time)


def test_images_of_another_size_are_fitted(sequence, model):
    # Each pixel repeated 2 x 2 times, with the calibration of the larger image, gives nearly the same objects.
    images, rig, pose, time = sequence.arguments(0)
    larger = images.repeat(2, axis=1).repeat(2, axis=2)
    twice = rig._replace(img_from_cam=torch.diag(torch.tensor([2.0, 2.0, 1.0])).double() @ rig.img_from_cam)
    expected = Predictor(model).step(images, rig, pose, time)

    def change(objects) -> float:
        return float((objects.lines.points - expected.lines.points).abs().median())

    fitted = change(Predictor(model).step(larger, twice, pose, time))
    wrong = change(Predictor(model).step(larger, rig, pose, time))
    assert fitted < 0.25 * wrong
    # Cameras of different sizes come as a list.
    mixed = [larger[0], *images[1:]]
    mixed_rig = rig._replace(img_from_cam=torch.cat([twice.img_from_cam[:1], rig.img_from_cam[1:]]))
    assert change(Predictor(model).step(mixed, mixed_rig, pose, time)) < 0.25 * wrong


def test_the_image_of_a_missing_camera_is_ignored(sequence, model):
    images, rig, pose, time = sequence.arguments(0)
    everything = Predictor(model, precision="float32", min_seen=0).step(images, rig, pose, time)
    gone = rig._replace(present=torch.tensor([True, False] + [True] * (len(images) - 2)))
    without = Predictor(model, precision="float32", min_seen=0).step(images, gone, pose, time)
    assert differ(without, everything)
    broken = gone._replace(img_from_cam=rig.img_from_cam.clone(), ego_from_cam=rig.ego_from_cam.clone())
    broken.img_from_cam[1], broken.ego_from_cam[1] = torch.nan, torch.nan
    assert_same(
        Predictor(model, precision="float32", min_seen=0).step([images[0], None, *images[2:]], broken, pose, time),
        without,
    )
    # A rig of the other cameras gives the same result.
    others = torch.arange(len(images)) != 1
    fewer = Predictor(model, precision="float32", min_seen=0).step(
        images[others.numpy()], map_tensors(lambda t: t[others], rig), pose, time
    )
    assert_same(fewer, without, 1e-4)


def test_min_score_is_the_score_threshold(sequence, model):
    everything = Predictor(model).step(*sequence.arguments(0))
    scores = everything.boxes.score.unique()
    threshold = float(scores[len(scores) // 2])
    kept = Predictor(model, min_score=threshold).step(*sequence.arguments(0))
    count = int((everything.boxes.score >= threshold).sum())
    assert 0 < count < len(everything.boxes.score)
    assert_same(kept.boxes, map_tensors(lambda tensor: tensor[:count], everything.boxes))
    assert len(kept.lines.score) == len(kept.lines.points) == int((everything.lines.score >= threshold).sum())


def test_a_checkpoint_file_is_loaded(tmp_path, sequence, model):
    save_checkpoint(tmp_path / "some.safetensors", model, {})
    loaded = Predictor(tmp_path / "some.safetensors")
    assert_same(loaded.step(*sequence.arguments(0)), Predictor(model).step(*sequence.arguments(0)))
    with pytest.raises(CheckpointError, match=r"unheard_of: no weights of this name are shipped \(there are: nano\)"):
        weights_file("unheard_of")
    with pytest.raises(CheckpointError, match=r"import-checkpoint some\.pth --out"):
        weights_file("some.pth")
    assert weights_file("nano") == shipped_weights() == weights_file(shipped_weights())


def test_shipped_weights_have_a_name(sequence):
    by_name, by_path = Predictor.from_pretrained("nano", min_score=0.2), Predictor(shipped_weights(), min_score=0.2)
    assert by_name.min_score == 0.2 and not by_name.model.training
    for one, other in zip(by_name.model.parameters(), by_path.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert_same(by_name.step(*sequence.arguments(0)), by_path.step(*sequence.arguments(0)))
    # The numbers of the evaluation that the weights were chosen by; docs and README print the same.
    assert {name: round(value, 3) for name, value in read_metrics("nano").items() if name in ("nds", "lane_mAP")} == {
        "nds": 0.552,
        "lane_mAP": 0.880,
    }


@pytest.mark.parametrize("seconds", [0.0, -0.1])
def test_time_must_go_forward_and_errors_change_nothing(sequence, model, seconds):
    predictor, undisturbed = Predictor(model), Predictor(model)
    for each in (predictor, undisturbed):
        each.step(*sequence.arguments(0))
    images, rig, pose, time = sequence.arguments(0)
    with pytest.raises(DataError, match=r"time_s is .*last step was at .*reset\(\)"):
        predictor.step(images, rig, pose, time + seconds)
    assert_same(predictor.step(*sequence.arguments(1)), undisturbed.step(*sequence.arguments(1)))


def spoilt(tensor, value, *where):
    changed = torch.as_tensor(tensor).clone()
    changed[where] = value
    return changed


WRONG = {
    "float images": (lambda i, r, p, t: (i.astype(np.float32), r, p, t), r"images\[0\] is float32"),
    "channels first": (lambda i, r, p, t: (i.transpose(0, 3, 1, 2), r, p, t), r"images\[0\] .* \[H, W, 3\]"),
    "no image": (lambda i, r, p, t: ([*i[:2], None, *i[3:]], r, p, t), r"images\[2\] is NoneType"),
    "fewer images": (lambda i, r, p, t: (i[:4], r, p, t), r"rig.present .* \[4\] bool"),
    "present as numbers": (
        lambda i, r, p, t: (i, r._replace(present=r.present.float()), p, t),
        "rig.present .*float32",
    ),
    "padded calibration": (
        lambda i, r, p, t: (i, r._replace(img_from_cam=torch.eye(4).expand(6, 4, 4)), p, t),
        r"rig.img_from_cam has shape \(6, 4, 4\)",
    ),
    "NaN calibration": (
        lambda i, r, p, t: (i, r._replace(img_from_cam=spoilt(r.img_from_cam, torch.nan, 3, 0, 2)), p, t),
        r"rig.img_from_cam\[3\]",
    ),
    "transposed calibration": (lambda i, r, p, t: (i, r._replace(img_from_cam=r.img_from_cam.mT), p, t), "last row"),
    "NaN mounting": (
        lambda i, r, p, t: (i, r._replace(ego_from_cam=spoilt(r.ego_from_cam, torch.nan, 5, 1, 3)), p, t),
        r"rig.ego_from_cam\[5\] .* finite",
    ),
    "scaled mounting": (
        lambda i, r, p, t: (
            i,
            r._replace(ego_from_cam=r.ego_from_cam @ torch.diag(torch.tensor([2.0, 2, 2, 1]))),
            p,
            t,
        ),
        r"rig.ego_from_cam\[0\] .* rotation",
    ),
    "flat pose": (lambda i, r, p, t: (i, r, p[:3], t), r"global_from_ego has shape \(3, 4\)"),
    "infinite pose": (lambda i, r, p, t: (i, r, spoilt(p, torch.inf, 0, 3).numpy(), t), "global_from_ego"),
    "NaN time": (lambda i, r, p, t: (i, r, p, np.nan), "time_s is nan"),
}


@pytest.mark.parametrize("case", WRONG)
def test_malformed_input_is_named(sequence, model, case):
    change, message = WRONG[case]
    with pytest.raises(DataError, match=message):
        Predictor(model).step(*change(*sequence.arguments(0)))


def test_impossible_settings_are_named(model):
    with pytest.raises(ConfigError, match=r"min_score is 1\.5"):
        Predictor(model, min_score=1.5)
    with pytest.raises(ConfigError, match="device 'nonsense' cannot be used here"):
        Predictor(model, "nonsense")
