"""Lane-map AP against the published evaluator's numbers, closed forms and properties that must hold."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from perception.errors import ConfigError, DataError
from perception.evaluation.lanes import STRICT_THRESHOLDS, chamfer_distances, evaluate_lanes
from perception.types import LINE_CLASSES, MapLine

HERE = Path(__file__).parent


def read_case(frames):
    """Predictions and truth of a case in the golden layout."""

    def lines(items):
        return [
            MapLine(LINE_CLASSES.index(item["cls"]), np.array(item["pts"], dtype=np.float64), item.get("score", 1.0))
            for item in items
        ]

    return {f["token"]: lines(f["pred"]) for f in frames}, {f["token"]: lines(f["gt"]) for f in frames}


def line(points, label="divider", score=1.0):
    return MapLine(LINE_CLASSES.index(label), np.array(points, dtype=np.float64), score)


def assert_equals_golden(result, expected):
    for name in LINE_CLASSES:
        for threshold in expected["thresholds"]:
            wanted = expected["per_threshold"][str(threshold)]["AP"][name]
            assert result.ap[name][threshold] == pytest.approx(wanted, abs=1e-6), (name, threshold)
        assert result.class_ap[name] == pytest.approx(expected["AP_per_class"][name], abs=1e-6)
    assert result.mean_ap == pytest.approx(expected["mAP"], abs=1e-6)
    assert result.truth_count == expected["num_gts"]
    assert result.prediction_count == expected["num_preds"]


def hand_case():
    data = json.loads((HERE / "golden" / "map_eval_hand.json").read_text())
    return data, *read_case(data["frames"])


@pytest.mark.parametrize("flavour", ["maptr", "maptr_strict"])
def test_published_numbers_of_the_hand_checked_case(flavour):
    data, predictions, truth = hand_case()
    expected = data["expected"][flavour]
    assert_equals_golden(evaluate_lanes(predictions, truth, thresholds=expected["thresholds"]), expected)


@pytest.mark.parametrize("flavour", ["maptr", "maptr_strict"])
@pytest.mark.parametrize("case", ["main", "empty_class", "hand"])
def test_published_numbers(golden, case, flavour):
    predictions, truth = read_case(json.loads((golden / "map_eval" / "polylines.json").read_text())["cases"][case])
    expected = json.loads((golden / "map_eval" / "expected.json").read_text())[case][flavour]
    assert_equals_golden(evaluate_lanes(predictions, truth, thresholds=expected["thresholds"]), expected)


def test_divider_values_by_hand():
    _, predictions, truth = hand_case()
    result = evaluate_lanes(predictions, truth)
    assert result.ap["divider"] == pytest.approx({0.5: 1 / 3, 1.0: 1 / 2, 1.5: 11 / 12})
    strict = evaluate_lanes(predictions, truth, thresholds=STRICT_THRESHOLDS)
    assert strict.ap["divider"][0.2] == pytest.approx(1 / 9)


def random_lines(rng, count, score=True):
    lines = []
    for _ in range(count):
        start, angle = rng.uniform(-15, 15, 2), rng.uniform(0, 2 * np.pi)
        along = np.linspace(0, rng.uniform(1, 20), rng.integers(2, 12))
        points = start + along[:, None] * [np.cos(angle), np.sin(angle)] + rng.normal(0, 0.2, (len(along), 2))
        lines.append(MapLine(int(rng.integers(3)), points, float(rng.uniform()) if score else 1.0))
    return lines


def noisy_map(rng, frames=12):
    truth = {f"t{i:02d}": random_lines(rng, 8, score=False) for i in range(frames)}
    predictions = {
        token: [
            MapLine(
                l.label, l.points + rng.normal(0, 0.4, l.points.shape) + rng.normal(0, 0.5, 2), float(rng.uniform())
            )
            for l in lines
        ]
        + random_lines(rng, 4)
        for token, lines in truth.items()
    }
    return predictions, truth


def test_agrees_with_a_plain_loop_over_all_pairs():
    """The short cuts (bounds, buffers of near pairs only) must not change anything: compare with the long way."""
    import shapely

    rng = np.random.default_rng(3)
    predictions, truth = noisy_map(rng)

    def resample(points):
        string = shapely.LineString(points)
        return np.array([string.interpolate(s).coords[0] for s in np.linspace(0, string.length, 100)])

    def slow_ap(label, threshold):
        found, scores, count = [], [], 0
        for token in truth:
            trues = [resample(l.points) for l in truth[token] if l.label == label]
            taken = set()
            count += len(trues)
            for l in sorted((l for l in predictions[token] if l.label == label), key=lambda l: -l.score):
                points, best, best_index = resample(l.points), 100.0, None
                area = shapely.LineString(points).buffer(2, cap_style="flat", join_style="mitre")
                for index, other in enumerate(trues):
                    pairwise = cdist(points, other)
                    distance = (pairwise.min(1).mean() + pairwise.min(0).mean()) / 2
                    other_area = shapely.LineString(other).buffer(2, cap_style="flat", join_style="mitre")
                    if area.intersects(other_area) and distance < best:
                        best, best_index = distance, index
                hit = best <= threshold and best_index not in taken
                taken |= {best_index} if hit else set()
                found.append(hit)
                scores.append(l.score)
        found = np.array(found)[np.argsort(-np.array(scores))]
        recall = np.concatenate([[0], np.cumsum(found) / count, [1]])
        precision = np.concatenate([[0], np.cumsum(found) / np.arange(1, len(found) + 1), [0]])
        for i in range(len(precision) - 1, 0, -1):
            precision[i - 1] = max(precision[i - 1], precision[i])
        return sum((recall[i + 1] - recall[i]) * precision[i + 1] for i in range(len(recall) - 1))

    result = evaluate_lanes(predictions, truth)
    for label, name in enumerate(LINE_CLASSES):
        for threshold in result.thresholds:
            assert result.ap[name][threshold] == pytest.approx(slow_ap(label, threshold), abs=1e-9)
    assert 0.1 < result.mean_ap < 0.9


def test_chamfer_distance_in_closed_form():
    # Two parallel lines 1 m apart, one half as long: the long one's far half adds sqrt(1 + s^2) over s in 0..10.
    short = np.stack([np.linspace(0, 10, 2001), np.zeros(2001)], 1)
    long = np.stack([np.linspace(0, 20, 2001), np.ones(2001)], 1)
    far_half = (10 * np.sqrt(101) + np.arcsinh(10)) / 2 / 10
    expected = (1 + (1 + far_half) / 2) / 2
    assert chamfer_distances(short[None], long[None])[0] == pytest.approx(expected, rel=1e-3)


def test_perfect_predictions_score_one():
    truth = {
        "a": [line([[0, -10], [0, 10]]), line([[3, 0], [6, 0], [6, 2], [3, 2], [3, 0]], "ped_crossing")],
        "b": [line([[5, -10], [5, 3], [9, 10]], "boundary")],
    }
    assert evaluate_lanes(truth, truth, thresholds=(0.01, 1.5)).mean_ap == 1.0


def test_collinear_lines_whose_flat_buffers_do_not_touch_never_match():
    # The ends lie 0.5 m apart and the mean distance is 1 m, but buffers with flat caps leave the gap open.
    truth = {"a": [line([[0, 0], [1, 0]])]}
    predictions = {"a": [line([[1.5, 0], [2.5, 0]])]}
    assert chamfer_distances(truth["a"][0].points[None], predictions["a"][0].points[None])[0] < 1.5
    assert evaluate_lanes(predictions, truth).ap["divider"][1.5] == 0.0
    beside = {"a": [line([[0, 1.2], [1, 1.2]])]}
    assert evaluate_lanes(beside, truth).ap["divider"][1.5] == 1.0


def test_a_prediction_has_no_second_choice():
    # Both predictions are closest to the same line; the weaker one may not fall back on the other, though it is near.
    truth = {"a": [line([[0, 0], [0, 10]]), line([[1.2, 0], [1.2, 10]])]}
    predictions = {"a": [line([[0.1, 0], [0.1, 10]], score=0.9), line([[0.4, 0], [0.4, 10]], score=0.8)]}
    assert evaluate_lanes(predictions, truth).ap["divider"] == pytest.approx({0.5: 0.5, 1.0: 0.5, 1.5: 0.5})


def test_direction_of_lines_and_order_of_frames_do_not_matter():
    rng = np.random.default_rng(5)
    predictions, truth = noisy_map(rng)
    base = evaluate_lanes(predictions, truth)
    reversed_lines = {t: [l._replace(points=l.points[::-1]) for l in lines] for t, lines in predictions.items()}
    turned = evaluate_lanes(reversed_lines, truth)
    for name in LINE_CLASSES:
        assert turned.ap[name] == pytest.approx(base.ap[name], abs=1e-9)
    # Equal scores are the hard case for a shuffled split: give every prediction the same one.
    flat = {t: [l._replace(score=0.5) for l in lines] for t, lines in predictions.items()}
    shuffled = {t: flat[t] for t in rng.permutation(list(flat))}
    shuffled_truth = {t: truth[t] for t in rng.permutation(list(truth))}
    assert evaluate_lanes(shuffled, shuffled_truth) == evaluate_lanes(flat, truth)


def test_start_vertex_of_a_ring_hardly_matters():
    # The samples slide along the ring by at most half their spacing of 22 m / 99.
    ring = np.array([[0, 0], [8, 0], [8, 3], [0, 3]], dtype=np.float64)
    truth = {"a": [line(ring[[0, 1, 2, 3, 0]], "ped_crossing")]}
    for start in range(4):
        points = np.roll(ring, -start, axis=0)
        predictions = {"a": [line(np.concatenate([points, points[:1]]), "ped_crossing")]}
        assert evaluate_lanes(predictions, truth, thresholds=(22 / 99 / 2 + 0.01,)).class_ap["ped_crossing"] == 1.0


def test_bad_input_names_the_sample():
    good = {"tok": [line([[0, 0], [1, 1]])]}
    for bad in ([[0, 0]], [[0, 0], [np.nan, 1]], [[0, 0, 0], [1, 1, 1]]):
        with pytest.raises(DataError, match="sample tok"):
            evaluate_lanes({"tok": [line(bad)]}, good)
        with pytest.raises(DataError, match="sample tok"):
            evaluate_lanes(good, {"tok": [line(bad)]})
    with pytest.raises(DataError, match="sample tok"):
        evaluate_lanes({"tok": [MapLine(7, np.zeros((2, 2)))]}, good)
    with pytest.raises(DataError, match="lack 1 of 1"):
        evaluate_lanes({}, good)
    with pytest.raises(DataError, match="other"):
        evaluate_lanes({**good, "other": []}, good)
    with pytest.raises(DataError, match="empty"):
        evaluate_lanes({}, {})
    with pytest.raises(ConfigError, match="thresholds"):
        evaluate_lanes(good, good, thresholds=(0.0,))


def test_result_as_json_and_as_table():
    _, predictions, truth = hand_case()
    result = evaluate_lanes(predictions, truth)
    record = json.loads(json.dumps(result.as_dict()))
    assert record["ap"]["divider"]["1.5"] == pytest.approx(11 / 12)
    assert record["protocol"] == "maptr" and record["frames"] == 4
    table = result.table()
    blocks = table.split("\n\n")
    assert "maptr 60x30" in blocks[0] and "0.917" in blocks[0] and len(blocks) == 3
    assert all(len({len(row) for row in block.splitlines()}) == 1 for block in blocks)
