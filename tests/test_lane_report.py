"""What a lane result tells beside AP, by hand arithmetic."""

import json

import numpy as np
import pytest

from perception.evaluation.lanes import evaluate_lanes
from perception.types import LINE_CLASSES, LaneRange, MapLine


def line(points, label="divider", score=1.0):
    return MapLine(LINE_CLASSES.index(label), np.array(points, dtype=np.float64), score)


def operating_case():
    """Two frames with one true divider of 20 m each, on the x axis: ahead in one, behind in the other."""
    gt = {"a": [line([[0, 0], [20, 0]])], "b": [line([[-30, 0], [-10, 0]])]}
    predictions = {
        "a": [
            line([[0, 6], [10, 6]], score=0.5),  # 10 m that are not there
            line([[0, 0.4], [20, 0.4]], score=0.9),  # finds the first, 0.4 m off
        ],
        "b": [line([[-30, 0.8], [-10, 0.8]], score=0.3)],  # finds the second, 0.8 m off
    }
    return predictions, gt


def test_working_point_by_hand():
    # At 1 m (the middle threshold) the flags by falling score are 1 0 1, and there are 2 ground-truth lines.
    # F1 = 2 tp / (used + true): 2/3 from 0.9 on, 2/4 from 0.5 on, 4/5 from 0.3 on, which is the best.
    result = evaluate_lanes(*operating_case())
    point = result.operating_points["divider"]
    assert result.operating_threshold == 1.0
    assert point.score == 0.3
    assert (point.precision, point.recall, point.f1) == pytest.approx((2 / 3, 1.0, 4 / 5))
    # 20 m are 0.4 m off and 20 m are 0.8 m off: their mean and their median are 0.6 m. 10 m in two frames are false.
    assert (point.error, point.median_error) == pytest.approx((0.6, 0.6))
    assert point.false_metres_per_frame == pytest.approx(10 / 2)
    # 0-10 m: half of the first line. 10-20 m: the other half, and half of the second. 20-30 m: the rest of the second.
    assert [(b.near, b.far) for b in point.bins] == [(0, 10), (10, 20), (20, 30), (30, None)]
    assert [b.metres_per_frame for b in point.bins] == pytest.approx([10 / 2, 20 / 2, 10 / 2, 0])
    assert [b.recall for b in point.bins] == [pytest.approx(1), pytest.approx(1), pytest.approx(1), None]
    assert [b.error for b in point.bins] == [pytest.approx(0.4), pytest.approx(0.6), pytest.approx(0.8), None]
    assert [b.median_error for b in point.bins][:3] == pytest.approx([0.4, 0.6, 0.8])


def test_working_point_at_a_given_score():
    # From 0.5 on: one of two is right, one of two is found, all found metres are 0.4 m off.
    result = evaluate_lanes(*operating_case(), score_threshold=0.5)
    point = result.operating_points["divider"]
    assert (point.score, point.precision, point.recall, point.f1) == pytest.approx((0.5, 1 / 2, 1 / 2, 1 / 2))
    assert (point.error, point.median_error) == pytest.approx((0.4, 0.4))
    assert [b.recall for b in point.bins] == [pytest.approx(1), pytest.approx(1 / 2), 0, None]
    assert [b.error for b in point.bins] == [pytest.approx(0.4), pytest.approx(0.4), None, None]
    assert result.ap == evaluate_lanes(*operating_case()).ap
    # One score for each class; from above all of them on nothing is used.
    none = evaluate_lanes(*operating_case(), score_threshold=dict.fromkeys(LINE_CLASSES, 0.95)).operating_points[
        "divider"
    ]
    assert (none.precision, none.recall, none.error, none.false_metres_per_frame) == (None, 0, None, 0)


def test_position_error_is_measured_to_the_line_and_not_to_its_vertices():
    # From (0, 0) to (10, 1) past a true line on the x axis: a piece at x is x sin(atan(0.1)) away, and the mean and the
    # median x are 5.
    result = evaluate_lanes({"a": [line([[0, 0], [10, 1]])]}, {"a": [line([[0, 0], [10, 0]])]})
    expected = 5 * np.sin(np.arctan(0.1))
    point = result.operating_points["divider"]
    assert (point.error, point.median_error, point.bins[0].error) == pytest.approx((expected,) * 3)


def test_a_line_shorter_than_a_metre_counts():
    point = evaluate_lanes({"a": [line([[0, 0.2], [0.6, 0.2]])]}, {"a": [line([[0, 0], [0.6, 0]])]}).operating_points[
        "divider"
    ]
    assert (point.error, point.median_error) == pytest.approx((0.2, 0.2))
    first = point.bins[0]
    assert (first.metres_per_frame, first.recall, first.error) == pytest.approx((0.6, 1, 0.2))


def test_equal_scores_are_used_together():
    # Two ground-truth lines. From 0.9 on one hit is used: F1 = 2 / (1 + 2). From 0.5 on two hits and three false lines:
    # F1 = 4 / (5 + 2), which is worse, though with the hit alone it would be 1.
    gt = {"a": [line([[0, 0], [10, 0]]), line([[0, 9], [10, 9]])]}
    same = [line([[0, y], [10, y]], score=0.5) for y in (9, -5, -9, -13)]
    for order in (1, -1):
        found = [line([[0, 0], [10, 0]], score=0.9), *same[::order]]
        point = evaluate_lanes({"a": found}, gt).operating_points["divider"]
        assert (point.score, point.precision, point.f1) == pytest.approx((0.9, 1, 2 / 3))
        point = evaluate_lanes({"a": found}, gt, score_threshold=0.5).operating_points["divider"]
        assert (point.precision, point.recall, point.f1) == pytest.approx((2 / 5, 1, 4 / 7))


def test_a_class_without_hits_keeps_all_its_predictions():
    gt = {"a": [line([[0, 0], [10, 0]])]}
    far = [line([[0, 9], [10, 9]], score=s) for s in (0.7, 0.2)]
    other = [line([[0, 3], [5, 3]], "boundary", 0.6)]  # of a class without ground truth
    working = evaluate_lanes({"a": far + other}, gt).operating_points
    point = working["divider"]
    assert (point.score, point.precision, point.recall, point.f1, point.error) == (0.2, 0, 0, 0, None)
    assert point.false_metres_per_frame == pytest.approx(20)
    point = working["boundary"]
    assert (point.score, point.precision, point.recall, point.f1) == (0.6, 0, None, None)
    assert point.false_metres_per_frame == pytest.approx(5)
    point = working["ped_crossing"]
    assert (point.score, point.precision, point.recall, point.false_metres_per_frame) == (None, None, None, 0)


def test_distance_bins_cover_the_lane_range():
    gt = {"a": [line([[0, 0], [50, 0]])]}
    for lane_range, last in ((LaneRange(60.0, 30.0), 30), (LaneRange(100.0, 50.0), 50)):
        bins = evaluate_lanes(gt, gt, lane_range=lane_range).operating_points["divider"].bins
        assert [b.near for b in bins] == list(range(0, last + 1, 10)) and bins[-1].far is None
        assert bins[-1].near < np.hypot(lane_range.x, lane_range.y) / 2 <= bins[-1].near + 10
        assert sum(b.metres_per_frame for b in bins) == pytest.approx(50)


def test_result_as_json_and_as_table():
    result = evaluate_lanes(*operating_case())
    record = json.loads(json.dumps(result.as_dict()))
    # Precision 1 up to the first of two ground-truth lines, 2/3 up to the second.
    assert record["ap"]["divider"]["1.0"] == pytest.approx((1 + 2 / 3) / 2)
    assert record["protocol"] == "maptr" and record["lane_range"] == "60x30" and record["frames"] == 2
    assert (
        record["operating_points"]["divider"]["f1"] == pytest.approx(4 / 5) and record["operating_threshold_m"] == 1.0
    )
    assert record["operating_points"]["divider"]["bins"][3] == {
        "near": 30.0, "far": None, "metres_per_frame": 0.0, "recall": None, "error": None, "median_error": None,
    }  # fmt: skip
    blocks = result.table().split("\n\n")
    assert "maptr 60x30" in blocks[0] and "0.833" in blocks[0] and len(blocks) == 3
    assert blocks[1].splitlines()[1].split() == "divider 0.300 0.667 1.000 0.800 0.600 0.600 5.0".split()
    assert "divider, error m                   0.400     0.600     0.800         -" in blocks[2]
    assert all(len({len(row) for row in block.splitlines()}) == 1 for block in blocks)
