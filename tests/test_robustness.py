"""The robustness card: what is disturbed, how losses are counted, and a network that sees exactly what it is shown."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from perception.data.loader import pad_lines
from perception.data.nuscenes import NuScenesDataset
from perception.errors import ConfigError
from perception.evaluation.dataset import evaluate_predictions
from perception.evaluation.robustness import (
    BadImages,
    MissingCamera,
    NoMemory,
    RobustnessCard,
    TrialResult,
    YawError,
    evaluate_robustness,
    plan_trials,
)
from perception.geometry import invert_rigid, project_points, transform_points
from perception.inference.sequence import predict_stream
from perception.models.bev_transformer.config import BEVTransformerConfig
from perception.models.bev_transformer.decoder import decode
from perception.models.bev_transformer.model import BEVTransformer
from perception.models.checkpoint import save_checkpoint
from perception.synthetic import VERSION
from perception.types import ImagePrediction, LaneRange, Prediction, State

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "evaluate.py"
CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
SMALL = BEVTransformerConfig.preset(
    "nano", image_size=(64, 96), grid=(20, 20), channels=16, depth_bins=8, backbone_stages=2, decoder_layers=2,
    box_queries=20, line_queries=8,
)  # fmt: skip
CONFIG = """
model = dict(preset="nano", image_size=(64, 96), grid=(20, 20), channels=16, depth_bins=8, backbone_stages=2,
             decoder_layers=2, box_queries=20, line_queries=8)
train_data = dict(dataroot={root!r}, version={version!r}, split="town_val")
val_data = dict(dataroot={root!r}, version={version!r}, split="town_val")
train = dict(image_epochs=0, epochs=1, batch_size=1, streams=1, frames_per_clip=1, drop_frames=0.0, lr=1e-3,
             weight_decay=0.0, warmup_iters=1, grad_clip=1.0, ema_momentum=0.0, val_every=1, log_every=1, workers=0)
"""


@pytest.fixture(scope="module")
def dataset(town_root) -> NuScenesDataset:
    return NuScenesDataset(town_root, VERSION, "town_val", image_size=SMALL.image_size)


@pytest.fixture(scope="module")
def model() -> BEVTransformer:
    torch.manual_seed(0)
    return BEVTransformer(SMALL).eval()


class Oracle(nn.Module):
    """Predicts the ground truth of images that are pixel by pixel those of the dataset.

    A box or a line is predicted if its middle lies in the image of a present camera; velocities only with a memory.
    """

    def __init__(self, dataset: NuScenesDataset) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))
        self.dataset = dataset
        self.frames = [dataset[i].frames for i in range(len(dataset))]
        self.sample = {p.numpy().tobytes(): i for i, f in enumerate(self.frames) for p in f.images[0]}

    def initial_state(self, batch_size: int) -> State:
        return State(torch.zeros(batch_size))

    def decode(self, prediction):
        return decode(prediction)

    def forward(self, frame, state):
        pictures = [self.sample.get(p.numpy().tobytes()) for p in frame.images[0]]
        known = [n for n in range(len(pictures)) if frame.rig.present[0, n] and pictures[n] is not None]
        boxes_at, params, labels = torch.zeros(0, 3), torch.zeros(0, 10), torch.zeros(0, dtype=torch.int64)
        points, kinds = torch.zeros(0, 20, 2), torch.zeros(0, dtype=torch.int64)
        if known:
            i = pictures[known[0]]
            boxes, lines = self.dataset.gt_boxes(i), pad_lines([self.dataset.gt_lines(i)], 20)
            boxes_at = boxes.center
            motion = torch.zeros_like(boxes.velocity) if frame.is_first[0] else boxes.velocity.nan_to_num()
            angle = torch.stack([boxes.yaw.sin(), boxes.yaw.cos()], -1)
            params = torch.cat([boxes_at, boxes.size.log(), angle, motion], -1)
            shown = self.shown(i, known, boxes_at) & boxes.valid
            params, labels = params[shown], boxes.label[shown]
            points, kinds = lines.points[0], lines.label[0]
            shown = self.shown(i, known, nn.functional.pad(points[:, 10], (0, 1)))
            points, kinds = points[shown], kinds[shown]
        nobody = nn.functional.one_hot(labels, 10), nn.functional.one_hot(kinds, 3)
        box_logits, line_logits = (20.0 * sure[None, None] - 10 for sure in nobody)
        images = ImagePrediction(*(torch.zeros(1) for _ in range(3)))
        empty = torch.zeros(1)
        boxes = box_logits, params[None, None], torch.zeros(1, 1, len(params), 9)
        lines = line_logits, points[None, None], torch.zeros(1, 1, *points.shape)
        return Prediction(*boxes, *lines, empty, empty, images), state

    def shown(self, i, cameras, points_ego):
        """[P, 3] -> [P] bool: in the picture of one of the cameras."""
        rig = self.frames[i].rig
        cam_from_ego = invert_rigid(rig.ego_from_cam[0, cameras])
        uv, depth = project_points(rig.img_from_cam[0, cameras], transform_points(cam_from_ego, points_ego))
        H, W = self.dataset.image_size
        return ((uv > 0) & (uv < torch.tensor([W, H]))).all(-1).logical_and(depth > 0).any(0)


def test_an_oracle_loses_what_missing_cameras_show(dataset):
    oracle = Oracle(dataset)
    stream = predict_stream(oracle, dataset)
    clean = evaluate_predictions(dataset, stream.objects).metrics()
    assert clean["mAP"] > 0.4 and clean["lane_mAP"] > 0.5
    trials = plan_trials(
        dataset.cameras, drop_camera="CAM_FRONT", extrinsics_noise_deg=1.0, corrupt="noise:1", no_memory=True, seed=3
    )
    card = evaluate_robustness(oracle, dataset, trials, clean)
    front, yaw, noise, alone = card.trials
    # It misses the objects that only the front camera shows, which are some but not all.
    assert 0.05 < card.loss(front, "mAP") < 0.9 and 0 < card.loss(front, "lane_mAP") < 0.9
    # It does not use the calibration.
    assert yaw.metrics == pytest.approx(card.clean)
    # It recognises no noisy image.
    assert noise.metrics["mAP"] == noise.metrics["lane_mAP"] == 0 and card.loss(noise, "lane_mAP") == 1
    # Without memory its velocities are 0: as if all of the clean run were 0.
    still = {
        token: scene._replace(boxes=scene.boxes._replace(velocity=torch.zeros_like(scene.boxes.velocity)))
        for token, scene in stream.objects.items()
    }
    expected = evaluate_predictions(dataset, still).metrics()
    assert alone.metrics == pytest.approx({name: expected[name] for name in alone.metrics})
    assert alone.metrics["mAP"] == pytest.approx(clean["mAP"]) and alone.metrics["mAVE"] > 1.2 * clean["mAVE"]
    assert card.memory_gain()["mAVE"] == pytest.approx(1 - clean["mAVE"] / expected["mAVE"])


def test_disturbed_and_clean_lines_are_compared_by_the_same_protocol_and_range(dataset):
    oracle, options = Oracle(dataset), {"protocol": "streammapnet", "lane_range": LaneRange(100.0, 50.0)}
    predictions = predict_stream(oracle, dataset).objects
    clean = evaluate_predictions(dataset, predictions, **options).metrics()
    assert clean["lane_mAP"] != evaluate_predictions(dataset, predictions).metrics()["lane_mAP"]
    (alone,) = evaluate_robustness(
        oracle, dataset, plan_trials(dataset.cameras, no_memory=True), clean, **options
    ).trials
    assert alone.metrics["lane_mAP"] == clean["lane_mAP"]  # its lines need no memory


def test_losses_are_shares_of_the_clean_run():
    card = RobustnessCard(
        {"nds": 0.5, "mAP": 0.0, "lane_mAP": 0.8, "mAVE": 1.0},
        (
            TrialResult("without A", "camera", {"nds": 0.4, "mAP": 0.0, "lane_mAP": 0.8, "mAVE": 1.1}),
            TrialResult("without B", "camera", {"nds": 0.45, "mAP": 0.0, "lane_mAP": 0.6, "mAVE": 0.9}),
            TrialResult("no memory", "memory", {"nds": 0.4, "mAP": 0.1, "lane_mAP": 0.8, "mAVE": 1.25}),
        ),
    )
    first, second, _ = card.trials
    assert card.loss(first, "nds") == pytest.approx(0.2) and card.loss(first, "mAVE") == pytest.approx(0.1)
    assert card.loss(second, "lane_mAP") == pytest.approx(0.25) and card.loss(second, "mAVE") == pytest.approx(-0.1)
    assert card.worst("camera", "nds") is first and card.worst("camera", "lane_mAP") is second
    assert card.worst("image", "nds") is None and card.worst("camera", "mAP") is None
    # The other way round: how much better than without.
    assert card.memory_gain() == pytest.approx({"nds": 0.25, "mAP": -1.0, "lane_mAP": 0.0, "mAVE": 0.2})
    rows = {row[:28].strip(): row[28:].split() for row in card.table().splitlines()}
    assert rows["without A"] == ["0.400", "20.0%", "0.000", "-", "0.800", "0.0%", "1.100", "10.0%"]
    assert rows["worst of each camera"] == ["20.0%", "-", "25.0%", "10.0%"]
    assert rows["gain by memory"] == ["25.0%", "-100.0%", "0.0%", "20.0%"]
    plain = json.loads(json.dumps(card.as_dict(), allow_nan=False))
    assert plain["trials"][0]["loss"]["mAP"] is None and plain["trials"][1]["loss"]["lane_mAP"] == pytest.approx(0.25)


def test_a_missing_camera_is_no_black_image(dataset, model):
    found = predict_stream(model, dataset, disturb=MissingCamera(0)).objects
    clean = predict_stream(model, dataset).objects
    # By hand, with a picture that is anything but black: nobody looks at it.
    state, different = model.initial_state(1), []
    with torch.inference_mode():
        for i in (dataset.scene_of_sample == 0).nonzero()[0]:
            frame = dataset[int(i)].frames
            rig = frame.rig._replace(present=torch.tensor([[False, True, True, True, True, True]]))
            frame = frame._replace(images=frame.images.index_fill(1, torch.tensor([0]), 200), rig=rig)
            prediction, state = model(frame, state)
            expected, scene = decode(prediction), found[dataset.tokens[i]]
            torch.testing.assert_close(scene.boxes.center, expected.boxes.center[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(scene.lines.points, expected.lines.points[0], rtol=1e-4, atol=1e-4)
            different.append(not torch.equal(scene.boxes.center, clean[dataset.tokens[i]].boxes.center))
    assert all(different)


def test_without_memory_every_frame_stands_alone(dataset, model):
    found = predict_stream(model, dataset, disturb=NoMemory()).objects
    with torch.inference_mode():
        for i, token in enumerate(dataset.tokens):
            frame = dataset[i].frames
            alone = frame._replace(is_first=torch.tensor([True]), seconds_since_prev=torch.zeros(1))
            expected = decode(model(alone, model.initial_state(1))[0])
            torch.testing.assert_close(found[token].boxes.center, expected.boxes.center[0], rtol=1e-4, atol=1e-4)


def test_random_corruptions_depend_on_seed_and_sample_only(dataset, model):
    noise = BadImages("noise", 2, seed=4)
    whole = predict_stream(model, dataset, disturb=noise).objects
    part = predict_stream(model, dataset, disturb=noise, rank=1, world_size=2, workers=1).objects
    for token, scene in part.items():
        assert torch.equal(scene.boxes.center, whole[token].boxes.center)
    frames = dataset[0].frames
    assert not torch.equal(noise(frames, 0, 0).images, noise(frames, 0, 1).images)
    # A camera that is mounted badly stays so all along a scene.
    yaw = YawError(1.0, seed=4)
    poses = [[yaw(frames, scene, sample).rig.ego_from_cam for sample in (0, 1)] for scene in range(4)]
    assert all(torch.equal(one, other) for one, other in poses)
    assert not all(torch.equal(poses[0][0], other) for other, _ in poses)
    others = [YawError(1.0, seed)(frames, 0, 0).rig.ego_from_cam for seed in (5, 6, 7)]
    assert not all(torch.equal(poses[0][0], other) for other in others)


def test_trials_are_named_in_order():
    trials = plan_trials(CAMERAS, drop_camera="each", extrinsics_noise_deg=1.0, corrupt="each", no_memory=True, seed=2)
    assert [trial.name for trial in trials[:7]] == [*(f"without {name}" for name in CAMERAS), "yaw off by 1 deg"]
    assert trials[3].disturb == MissingCamera(3) and trials[6].disturb == YawError(1.0, 2)
    assert trials[7].disturb == BadImages("bright", 2, 2) and trials[-1].disturb == NoMemory()
    assert [trial.group for trial in trials] == ["camera"] * 6 + ["calibration"] + ["image"] * 6 + ["memory"]
    (fog,) = plan_trials(CAMERAS, corrupt="fog:3")
    assert fog.disturb == BadImages("fog", 3, 0) and fog.name == "fog, severity 3"
    (back,) = plan_trials(CAMERAS, drop_camera="CAM_BACK")
    assert back.disturb == MissingCamera(3)
    assert plan_trials(CAMERAS) == []


@pytest.mark.parametrize(
    "wanted, message",
    [
        ({"drop_camera": "FRONT"}, "--drop-camera FRONT: no such camera; give CAM_FRONT, .* or each"),
        ({"extrinsics_noise_deg": 0.0}, "--extrinsics-noise-deg is 0; give an angle of more than 0"),
        ({"extrinsics_noise_deg": math.nan}, "--extrinsics-noise-deg is nan"),
        ({"corrupt": "snow"}, "--corrupt snow: no such corruption; give bright, dark"),
        ({"corrupt": "fog:4"}, "--corrupt fog:4: no such severity; write fog:1, fog:2 or fog:3"),
        ({"corrupt": "fog:"}, "--corrupt fog:: no such severity"),
        ({"seed": -1}, "--seed is -1; give 0 or more"),
    ],
)
def test_mistakes_get_a_sentence(wanted, message):
    with pytest.raises(ConfigError, match=message):
        plan_trials(CAMERAS, **wanted)


def test_the_only_camera_cannot_go():
    with pytest.raises(ConfigError, match="the dataset has no other camera"):
        plan_trials(("CAM_FRONT",), drop_camera="each")


def test_the_script_prints_a_card(town_root, model, tmp_path, monkeypatch, capsys):
    config, weights, numbers = tmp_path / "small.py", tmp_path / "small.safetensors", tmp_path / "numbers.json"
    config.write_text(CONFIG.format(root=str(town_root), version=VERSION))
    save_checkpoint(weights, model, {})
    words = [
        "--drop-camera",
        "CAM_BACK",
        "--corrupt",
        "quantize:3",
        "--no-memory",
        "--seed",
        "7",
        "--json",
        str(numbers),
    ]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(config), str(weights), *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code == 0
    table = capsys.readouterr().out
    names = ["robustness", "clean", "without CAM_BACK", "quantize, severity 3", "no memory", "gain by memory"]
    assert [line[:28].strip() for line in table.partition("\n\nrobustness")[2].splitlines()[1:6]] == names[1:]
    found = json.loads(numbers.read_text())
    card = found["robustness"]
    assert card["seed"] == 7 and [trial["name"] for trial in card["trials"]] == names[2:5]
    assert card["clean"] == {name: found[name] for name in ("nds", "mAP", "lane_mAP", "mAVE")}
    assert all(trial["metrics"].keys() == trial["loss"].keys() == card["clean"].keys() for trial in card["trials"])


def test_a_file_cannot_be_disturbed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--submission", str(tmp_path / "lanes.json"), "--no-memory"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code == 2 and "--submission has no inputs to disturb" in capsys.readouterr().err
