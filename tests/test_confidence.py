"""Confidence calibration by hand and on predictions whose distribution is known."""

import json
import math

import numpy as np
import pytest
import torch
from nuscenes.eval.common.config import config_factory

from perception.errors import DataError
from perception.evaluation.confidence import BOX_RANGE, BOX_THRESHOLD, evaluate_confidence
from perception.types import Boxes, FrameObjects, Polylines


def boxes(rows, uncertainty=1.0) -> Boxes:
    """Rows of label, x, y, score."""
    count = len(rows)
    columns = torch.tensor(rows, dtype=torch.float32).reshape(count, 4)
    return Boxes(
        center=torch.cat([columns[:, 1:3], torch.zeros(count, 1)], 1),
        size=torch.ones(count, 3),
        yaw=torch.zeros(count),
        velocity=torch.zeros(count, 2),
        label=columns[:, 0].long(),
        attribute=torch.full((count,), -1),
        score=columns[:, 3],
        valid=torch.ones(count, dtype=torch.bool),
        uncertainty=torch.full((count, 9), uncertainty),
    )


def lines(rows, uncertainty=1.0) -> Polylines:
    """Straight lines along x: rows of label, y, score."""
    count = len(rows)
    x = torch.linspace(-10, 10, 5)
    points = [torch.stack([x, torch.full_like(x, y)], -1) for _, y, _ in rows]
    return Polylines(
        points=torch.stack(points) if rows else torch.zeros(0, 5, 2),
        closed=torch.zeros(count, dtype=torch.bool),
        label=torch.tensor([row[0] for row in rows], dtype=torch.int64),
        score=torch.tensor([row[2] for row in rows], dtype=torch.float32),
        valid=torch.ones(count, dtype=torch.bool),
        uncertainty=torch.full((count, 5, 2), uncertainty),
    )


def test_reliability_by_hand():
    gt = FrameObjects(boxes([(0, 10.0, 0.0, 1.0), (0, 20.0, 0.0, 1.0), (7, 5.0, 5.0, 1.0)]), lines([(0, 0.0, 1.0)]))
    found = FrameObjects(
        boxes(
            [
                (0, 10.5, 0.0, 0.85),  # right
                (0, 9.0, 0.0, 0.75),  # the same car again: wrong
                (0, 21.9, 0.0, 0.78),  # right, 1.9 m off
                (7, 5.0, 7.1, 0.35),  # 2.1 m off: wrong
                (1, 10.0, 0.0, 0.05),  # another class, and the lowest score that counts: wrong
                (0, 10.0, 0.0, 0.04),  # too low to count
                (7, 41.0, 0.0, 0.99),  # a pedestrian beyond 40 m does not count
            ]
        ),
        lines([(0, 0.9, 0.65), (0, 0.0, 0.6), (1, 0.0, 0.3)]),
    )
    result = evaluate_confidence({"a": found}, {"a": gt})
    assert result.boxes.count == (1, 0, 0, 1, 0, 0, 0, 2, 1, 0)
    assert result.boxes.precision[7:9] == (0.5, 1.0) and math.isnan(result.boxes.precision[1])
    # |0.05 - 0| + |0.35 - 0| + 2 |0.765 - 0.5| + |0.85 - 1|, over five boxes
    assert result.boxes.error == pytest.approx((0.05 + 0.35 + 2 * 0.265 + 0.15) / 5, abs=1e-6)
    # Both dividers want the one true line and lie within 1 m of it; the surer one gets it, though it lies farther off.
    assert result.lines.count == (0, 0, 0, 1, 0, 0, 2, 0, 0, 0) and result.lines.precision[6] == 0.5
    assert result.lines.error == pytest.approx((0.3 + 2 * (0.625 - 0.5)) / 3, abs=1e-6)
    position = result.uncertainties["position m"]  # errors 0.5, 0, 1.9 and 0 under an uncertainty of 1
    assert position.count == 4 and position.mean_error == pytest.approx(2.4 / 4) and position.mean_uncertainty == 1
    assert position.half == 0.75 and position.nine_tenths == 1.0
    point = result.uncertainties["line point m"]  # five points off by 0 along x and 0.9 along y
    assert point.count == 10 and point.mean_error == pytest.approx(0.45) and point.half == 0.5
    record = json.loads(json.dumps(result.as_dict()))
    assert record["boxes"]["precision"][1] is None
    table = [line.split() for line in result.table().splitlines()]
    assert table[0][:3] == ["confidence", "(score", ">="] and table[0][3:5] == ["0.05)", "0.0-0.1"]
    assert table[0][-2:] == ["0.9-1.0", "ECE"]
    assert table[1] == "boxes, precision 0.000 - - 0.000 - - - 0.500 1.000 - 0.216".split()
    assert table[2] == "boxes, number 1 0 0 1 0 0 0 2 1 0".split()
    assert table[-1] == "line point m 0.450 1.000 0.500 1.000 10".split()


def test_true_probabilities_and_laplace_errors_are_calibrated():
    """Scores drawn first and right with that probability; errors drawn from the distribution that the uncertainty
    names."""
    rng = np.random.default_rng(0)
    scenes, gt, wrong = {}, {}, {}
    for token in map(str, range(60)):
        count = 30
        place = np.stack([np.arange(count) * 3.0 % 90 - 45, np.where(np.arange(count) % 2, 8.0, -8.0)], 1)
        score = rng.uniform(0.1, 1, count)
        right = rng.random(count) < score
        uncertainty = rng.uniform(0.05, 0.2)
        off = place + rng.laplace(0, uncertainty, (count, 2))
        off[~right, 1] += np.sign(place[~right, 1]) * 10
        gt[token] = FrameObjects(boxes([(0, *p, 1.0) for p in place]), lines([]))
        rows = [(0, *p, s) for p, s in zip(off, score, strict=True)]
        scenes[token] = FrameObjects(boxes(rows, uncertainty), lines([]))
        wrong[token] = FrameObjects(boxes([(*row[:3], row[3] ** 3) for row in rows], uncertainty / 3), lines([]))
    good, bad = evaluate_confidence(scenes, gt), evaluate_confidence(wrong, gt)
    assert good.boxes.error < 0.04 < 0.15 < bad.boxes.error
    position = good.uncertainties["position m"]
    assert position.mean_error == pytest.approx(position.mean_uncertainty, rel=0.05)
    assert position.half == pytest.approx(0.5, abs=0.03) and position.nine_tenths == pytest.approx(0.9, abs=0.02)
    assert bad.uncertainties["position m"].half < 0.3
    assert math.isnan(good.lines.error) and good.uncertainties["line point m"].count == 0


def test_a_line_walked_backwards_has_the_same_errors():
    gt = {"a": FrameObjects(boxes([]), lines([(2, 3.0, 1.0)]))}
    found = lines([(2, 3.2, 0.9)])
    backwards = found._replace(points=found.points.flip(1))
    for predicted in (found, backwards):
        uncertainty = evaluate_confidence({"a": FrameObjects(boxes([]), predicted)}, gt).uncertainties["line point m"]
        assert uncertainty.mean_error == pytest.approx(0.1, abs=1e-6)


def test_the_range_of_a_class_is_measured_on_the_ground():
    walkers = boxes([(7, 39.9, 0.0, 0.9), (7, 0.0, 40.0, 0.8)])
    walkers.center[:, 2] = 9.0
    gt = {"a": FrameObjects(walkers, lines([]))}
    assert sum(evaluate_confidence(gt, gt).boxes.count) == 1


def test_ranges_are_those_of_the_official_score():
    config = config_factory("detection_cvpr_2019")
    assert config.class_range == BOX_RANGE and config.dist_th_tp == BOX_THRESHOLD


def test_each_uncertainty_is_compared_with_the_error_of_its_quantity():
    gt = boxes([(0, 10.0, 0.0, 1.0)])
    found = boxes([(0, 10.3, 0.1, 0.9)])._replace(
        yaw=torch.tensor([2 * math.pi - 0.5]), velocity=torch.tensor([[3.0, -4.0]]), size=torch.full((1, 3), math.e**2)
    )
    found.center[0, 2] = -0.7
    found = found._replace(uncertainty=torch.arange(1.0, 10.0)[None])
    nothing = lines([])
    checks = evaluate_confidence({"a": FrameObjects(found, nothing)}, {"a": FrameObjects(gt, nothing)}).uncertainties
    expected = {
        "position m": (0.2, 1.5, 2), "height above ground m": (0.7, 3, 1), "log size": (2, 5, 3),
        "yaw rad": (0.5, 7, 1), "velocity m/s": (3.5, 8.5, 2),
    }  # fmt: skip
    for name, (error, uncertainty, count) in expected.items():
        check = checks[name]
        assert check.mean_error == pytest.approx(error, abs=1e-6) and check.mean_uncertainty == uncertainty, name
        assert check.count == count
    unknown = gt._replace(velocity=torch.tensor([[math.nan, 1.0]]))
    checks = evaluate_confidence(
        {"a": FrameObjects(found, nothing)}, {"a": FrameObjects(unknown, nothing)}
    ).uncertainties
    assert checks["velocity m/s"].count == 1 and checks["velocity m/s"].mean_error == 5


def test_other_tokens_are_refused():
    nothing = FrameObjects(boxes([]), lines([]))
    with pytest.raises(DataError, match="2 samples are in predictions or ground truth only"):
        evaluate_confidence({"a": nothing}, {"b": nothing})
