"""Evaluation of datasets: memory follows scenes, processes share scenes, and the ground truth scores 1."""

import json

import numpy as np
import pytest
import torch
from douglas_peucker import decided_by_rounding, possible_simplifications

from perception.data.loader import pad_boxes, pad_lines
from perception.data.nuscenes import NuScenesDataset
from perception.errors import ConfigError, DataError
from perception.evaluation.dataset import evaluate_predictions, published_gt
from perception.evaluation.stability import evaluate_stability
from perception.evaluation.submission import map_lines
from perception.inference.sequence import predict_stream
from perception.models.bev_transformer.config import BEVTransformerConfig
from perception.models.bev_transformer.model import BEVTransformer
from perception.synthetic import VERSION
from perception.types import FrameObjects, LaneRange, MapLine, map_tensors

SMALL = BEVTransformerConfig.preset(
    "nano", image_size=(64, 96), grid=(20, 20), channels=16, depth_bins=8, backbone_stages=2, decoder_layers=2,
    box_queries=20, line_queries=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def dataset(town_root) -> NuScenesDataset:
    return NuScenesDataset(town_root, VERSION, "town_val", image_size=SMALL.image_size)


@pytest.fixture(scope="module")
def model() -> BEVTransformer:
    torch.manual_seed(0)
    return BEVTransformer(SMALL).eval()


def perfect_predictions(dataset, points_per_line=100) -> dict[str, FrameObjects]:
    scenes = {}
    for i, token in enumerate(dataset.tokens):
        gt = FrameObjects(pad_boxes([dataset.gt_boxes(i)]), pad_lines([dataset.gt_lines(i)], points_per_line))
        scenes[token] = map_tensors(lambda tensor: tensor[0], gt)
    return scenes


def test_the_ground_truth_scores_one(dataset):
    evaluation = evaluate_predictions(dataset, perfect_predictions(dataset))
    metrics = evaluation.metrics()
    present = [name for name, count in evaluation.detection.gt_count.items() if count]
    assert len(present) >= 5
    # A class that the town lacks counts as 0 in the devkit's mean.
    assert metrics["mAP"] == pytest.approx(len(present) / 10, abs=1e-6)
    assert all(evaluation.detection.class_ap[name] == pytest.approx(1) for name in present)
    lines = [name for name, count in evaluation.lanes.gt_count.items() if count]
    assert metrics["lane_mAP"] == pytest.approx(len(lines) / 3) == pytest.approx(metrics["lane_mAP_strict"])
    assert metrics["score"] == pytest.approx((metrics["nds"] + metrics["lane_mAP"]) / 2)
    assert evaluation.confidence.boxes.error == evaluation.confidence.lines.error == 0  # scores of 1, all right
    assert all(
        uncertainty.mean_error == pytest.approx(0, abs=1e-6)
        for uncertainty in evaluation.confidence.uncertainties.values()
    )


@pytest.mark.parametrize(
    ("protocol", "lane_range"), [("streammapnet", "60x30"), ("streammapnet", "100x50"), ("maptr", "40x20")]
)
def test_every_part_compares_with_the_ground_truth_that_was_asked_for(dataset, protocol, lane_range):
    """The ground truth of another protocol and range, as prediction, is right in all parts of the evaluation."""
    lane_range = LaneRange.parse(lane_range)
    scenes = {}
    for i, token in enumerate(dataset.tokens):
        lines = pad_lines([published_gt(dataset.gt_lines(i, protocol, lane_range), protocol)], 100)
        scenes[token] = map_tensors(lambda tensor: tensor[0], FrameObjects(pad_boxes([dataset.gt_boxes(i)]), lines))
    evaluation = evaluate_predictions(dataset, scenes, protocol=protocol, lane_range=lane_range)
    lines = [name for name, count in evaluation.lanes.gt_count.items() if count]
    assert evaluation.lanes.mean_ap == evaluation.strict_lanes.mean_ap == pytest.approx(len(lines) / 3)
    count = sum(int(scene.lines.valid.sum()) for scene in scenes.values())
    assert evaluation.confidence.lines.count[-1] == count and evaluation.confidence.lines.precision[-1] == 1.0
    assert evaluation.confidence.uncertainties["line point m"].mean_error == pytest.approx(0, abs=1e-6)
    # Steadiness is measured where lines are predicted: the same lines in a smaller area are fewer.
    whole = evaluate_stability_in(dataset, scenes, lane_range)
    assert evaluation.stability.all_lines == whole != evaluate_stability_in(dataset, scenes, LaneRange(30.0, 15.0))


def evaluate_stability_in(dataset, scenes, lane_range):
    tokens = dataset.tokens
    return evaluate_stability(
        scenes,
        [[tokens[i] for i in np.flatnonzero(dataset.scene_of_sample == scene)] for scene in range(2)],
        {token: dataset.ego_pose(i) for i, token in enumerate(tokens)},
        dict(zip(tokens, dataset.timestamps.tolist(), strict=True)),
        lane_range=lane_range,
    ).all_lines


def test_moved_lines_and_late_boxes_do_not_score_one(dataset):
    scenes = perfect_predictions(dataset)
    moved = {
        token: FrameObjects(
            scene.boxes._replace(center=scene.boxes.center + torch.tensor([3.0, 0, 0])),
            scene.lines._replace(points=scene.lines.points + 1.2),
        )
        for token, scene in scenes.items()
    }
    good, bad = (evaluate_predictions(dataset, s).metrics() for s in (scenes, moved))
    assert bad["mAP"] < 0.7 * good["mAP"] and bad["lane_mAP"] < 0.7 * good["lane_mAP"]


def test_memory_follows_the_scene_and_ends_with_it(dataset, model):
    whole = predict_stream(model, dataset)
    assert set(whole.objects) == set(dataset.tokens)
    assert whole.seconds_per_frame > 0
    # By hand: frame after frame with the memory handed on, afresh for the second scene.
    with torch.inference_mode():
        for scene in (0, 1):
            state = model.initial_state(1)
            for i in (dataset.scene_of_sample == scene).nonzero()[0]:
                prediction, state = model(dataset[int(i)].frames, state)
                token = dataset.tokens[i]
                expected = prediction.line_logits[-1].sigmoid().flatten().sort(descending=True).values
                found = whole.objects[token].lines.score
                torch.testing.assert_close(found, expected[: len(found)], rtol=1e-4, atol=1e-5)


def test_processes_share_whole_scenes_and_change_nothing(dataset, model):
    whole = predict_stream(model, dataset)
    parts = [predict_stream(model, dataset, rank=rank, world_size=2) for rank in (0, 1)]
    assert not set(parts[0].objects) & set(parts[1].objects)
    merged = parts[0].objects | parts[1].objects
    assert merged.keys() == whole.objects.keys()
    for token, scene in merged.items():
        torch.testing.assert_close(scene.boxes.center, whole.objects[token].boxes.center)


def test_ground_truth_has_the_vertices_of_the_published_evaluator(golden):
    """Where two vertices are equally far from a chord, the 9 decimals of the file decide which one stays."""
    poses = json.loads((golden / "map_gt" / "expected.json").read_text())
    protocols = [name for name in poses if name.startswith("streammapnet")]
    lines = [line for name in protocols for pose in poses[name] for line in pose["lines"]]
    given = [MapLine(0, np.array(line["pts"])) for line in lines]
    assert given
    for line, before, after in zip(lines, given, published_gt(given, "streammapnet"), strict=True):
        wanted = np.array(line["simplified_pts"])
        same = after.points.shape == wanted.shape and np.abs(after.points - wanted).max() < 1e-6
        assert same or all(decided_by_rounding(before.points, points, 0.2) for points in (after.points, wanted))
    assert published_gt(given, "maptr") == given
    assert published_gt([], "streammapnet") == []


def test_ties_of_the_simplification():
    """The flat top of a low trapezoid: either of its corners may stay, by a difference that 9 decimals do not show."""
    trapezoid = np.array([[0.0, 0.0], [5.0, 0.3], [6.0, 0.3], [11.0, 0.0]])
    assert possible_simplifications(trapezoid, 0.2) == [(0, 1, 3), (0, 2, 3)]
    kept = []
    for corner in (1, 2):
        points = trapezoid.copy()
        points[corner, 1] += 1e-9
        (line,) = published_gt([MapLine(0, points)], "streammapnet")
        kept.append(line.points)
        assert decided_by_rounding(trapezoid, line.points, 0.2)
    assert np.abs(kept[0] - kept[1]).max() > 0.9
    assert not decided_by_rounding(trapezoid, trapezoid, 0.2)  # nothing removed is no possible outcome
    sharp = np.array([[0.0, 0.0], [5.0, 1.0], [11.0, 0.0]])
    assert possible_simplifications(sharp, 0.2) == [(0, 1, 2)] and not decided_by_rounding(sharp, sharp, 0.2)


def test_map_lines_leaves_padding_out(dataset):
    scene = perfect_predictions(dataset)[dataset.tokens[0]]
    padded = scene.lines._replace(valid=torch.arange(len(scene.lines.valid)) % 2 == 0)
    lines = map_lines(padded)
    assert len(lines) == (len(scene.lines.valid) + 1) // 2
    assert (lines[1].points == scene.lines.points[2].double().numpy()).all()
    assert lines[1].label == int(scene.lines.label[2])


def test_incomplete_predictions_and_several_roots_are_refused(dataset, town_root):
    scenes = perfect_predictions(dataset)
    scenes.pop(dataset.tokens[3])
    with pytest.raises(DataError, match=dataset.tokens[3]):
        evaluate_predictions(dataset, scenes)
    twice = NuScenesDataset([town_root, town_root], VERSION, "town_val", image_size=SMALL.image_size)
    with pytest.raises(ConfigError, match="2 roots; evaluate one root at a time"):
        evaluate_predictions(twice, {})
