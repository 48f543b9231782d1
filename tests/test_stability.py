"""Temporal stability: worlds whose displacement is known in closed form."""

import math

import numpy as np
import pytest
import torch

from perception.errors import DataError
from perception.evaluation.stability import BOX_GATE, evaluate_stability
from perception.geometry import invert_rigid, rigid_from_yaw, transform_points
from perception.types import BOX_CLASSES, Boxes, FrameObjects, Polylines

POSES = {"a": rigid_from_yaw(0.3, (100.0, 50.0, 0.0)), "b": rigid_from_yaw(0.5, (102.0, 51.0, 0.0))}
SECONDS = {"a": 10.0, "b": 10.5}


def scene(token, boxes=(), lines=()) -> FrameObjects:
    """Boxes (label, x, y, global velocity, score) and lines (label, points, score) of the world, in the ego frame."""
    ego_from_global = invert_rigid(POSES[token])
    centers = transform_points(ego_from_global, np.array([[x, y, 1.0] for _, x, y, _, _ in boxes]).reshape(-1, 3))
    velocity = np.array([v for _, _, _, v, _ in boxes]).reshape(-1, 2) @ ego_from_global[:2, :2].T
    count = len(boxes)
    points = [transform_points(ego_from_global, np.pad(p, ((0, 0), (0, 1))))[:, :2] for _, p, _ in lines]
    return FrameObjects(
        Boxes(
            center=torch.from_numpy(centers).float(),
            size=torch.ones(count, 3),
            yaw=torch.zeros(count),
            velocity=torch.from_numpy(velocity).float(),
            label=torch.tensor([box[0] for box in boxes], dtype=torch.int64),
            attribute=torch.full((count,), -1),
            score=torch.tensor([box[4] for box in boxes], dtype=torch.float32),
            valid=torch.ones(count, dtype=torch.bool),
            uncertainty=torch.zeros(count, 9),
        ),
        Polylines(
            points=torch.from_numpy(np.stack(points)).float() if points else torch.zeros(0, 2, 2),
            closed=torch.zeros(len(lines), dtype=torch.bool),
            label=torch.tensor([line[0] for line in lines], dtype=torch.int64),
            score=torch.tensor([line[2] for line in lines], dtype=torch.float32),
            valid=torch.ones(len(lines), dtype=torch.bool),
            uncertainty=torch.zeros(len(points), *(points[0].shape if points else (2, 2))),
        ),
    )


def stability(before, now, **options):
    return evaluate_stability(
        {"a": scene("a", **before), "b": scene("b", **now)}, [["a", "b"]], POSES, SECONDS, **options
    )


STILL = (0.0, 0.0)


def test_a_still_world_does_not_move_whatever_the_ego_does():
    world = [(0, 110.0, 52.0, STILL, 0.9), (7, 96.0, 60.0, STILL, 0.8), (0, 112.0, 47.0, STILL, 0.5)]
    result = stability({"boxes": world}, {"boxes": world[::-1]})
    assert result.frame_pairs == 1
    assert result.all_boxes.pairs == 3 and result.all_boxes.found_again == 1
    assert result.all_boxes.displacement == pytest.approx(0, abs=1e-4)
    assert result.boxes["pedestrian"].pairs == 1 and math.isnan(result.boxes["bus"].displacement)


def test_displacements_are_averaged_over_pairs():
    before = [(0, 110.0, 52.0, STILL, 0.9), (0, 120.0, 52.0, STILL, 0.9), (7, 96.0, 60.0, STILL, 0.8)]
    now = [(0, 110.3, 52.4, STILL, 0.9), (0, 120.0, 53.0, STILL, 0.9), (7, 96.0, 59.9, STILL, 0.8)]
    result = stability({"boxes": before}, {"boxes": now})
    assert result.boxes["car"].displacement == pytest.approx((0.5 + 1.0) / 2, abs=1e-4)
    assert result.all_boxes.displacement == pytest.approx((0.5 + 1.0 + 0.1) / 3, abs=1e-4)


def test_a_moving_box_is_followed_by_its_own_velocity():
    before, now = (0, 110.0, 52.0, (3.0, -1.0), 0.9), (0, 111.5, 51.5, (3.0, -1.0), 0.9)
    assert stability({"boxes": [before]}, {"boxes": [now]}).all_boxes.displacement == pytest.approx(0, abs=1e-4)
    blind = (0, 110.0, 52.0, STILL, 0.9)  # half a second at (3, -1) m/s: (1.5, -0.5) m
    result = stability({"boxes": [blind]}, {"boxes": [now]})
    assert result.all_boxes.displacement == pytest.approx(math.hypot(1.5, 0.5), abs=1e-4)
    unknown = (0, 110.0, 52.0, (math.nan, math.nan), 0.9)
    result = stability({"boxes": [unknown]}, {"boxes": [now]})
    assert result.all_boxes.displacement == pytest.approx(math.hypot(1.5, 0.5), abs=1e-4)


def test_flickering_boxes_are_not_found_again():
    steady, low = (0, 110.0, 52.0, STILL, 0.9), (0, 114.0, 52.0, STILL, 0.2)
    far = (0, 110.0, 52.0 + BOX_GATE + 0.1, STILL, 0.9)
    other = (1, 110.0, 52.0, STILL, 0.9)
    result = stability({"boxes": [steady, low]}, {"boxes": [steady, (0, 114.0, 52.0, STILL, 0.9)]})
    assert result.boxes["car"].pairs == 1 and result.boxes["car"].found_again == pytest.approx(1 / 2)
    assert stability({"boxes": [steady]}, {"boxes": [far]}).all_boxes.pairs == 0
    assert stability({"boxes": [steady]}, {"boxes": [other]}).boxes["truck"].found_again == 0
    assert stability({"boxes": [steady, low]}, {"boxes": [steady, low]}, min_score=0.1).all_boxes.pairs == 2


def test_a_bad_pair_does_not_push_a_good_one_apart():
    """0 -> 0.1 m and nothing for the other beats 1.9 m + 1.9 m, although the latter pairs more."""
    before = [(0, 110.0, 52.0, STILL, 0.9), (0, 111.9, 52.0, STILL, 0.9)]
    now = [(0, 111.8, 52.0, STILL, 0.9), (0, 113.8, 52.0, STILL, 0.9)]
    # pairs (110 -> 111.8) and (111.9 -> 113.8) sum to 3.7; (111.9 -> 111.8) and a pair beyond the gate (2) sum to 2.1
    result = stability({"boxes": before}, {"boxes": now})
    assert result.all_boxes.pairs == 1
    assert result.all_boxes.displacement == pytest.approx(0.1, abs=1e-4)


def global_line(y, x0, x1, step=1.0):
    """A straight line along the ego axis of frame b, at y metres to its left, from x0 to x1."""
    x = np.arange(x0, x1 + step / 2, step)
    points = np.stack([x, np.full_like(x, y), np.zeros_like(x)], 1)
    return transform_points(POSES["b"], points)[:, :2]


def test_lines_are_compared_where_both_were_seen():
    # The ego drove 2.2 m and so did the map range: the same kerb starts and ends elsewhere, that is no displacement.
    before, now = (2, global_line(4.0, -32.2, 27.8), 0.9), (2, global_line(4.0, -30, 30, step=0.7), 0.9)
    result = stability({"lines": [before]}, {"lines": [now]})
    assert result.all_lines.pairs == 1 and result.all_lines.found_again == 1
    assert result.all_lines.displacement == pytest.approx(0, abs=1e-3)
    moved = (2, global_line(4.3, -30, 30), 0.9)
    result = stability({"lines": [before]}, {"lines": [moved]})
    assert result.lines["boundary"].displacement == pytest.approx(0.3, abs=1e-3)


def test_reversed_lines_are_the_same_and_other_classes_are_not():
    points = global_line(-2.0, -20, 20)
    result = stability({"lines": [(0, points, 0.9)]}, {"lines": [(0, points[::-1].copy(), 0.9)]})
    assert result.lines["divider"].displacement == pytest.approx(0, abs=1e-4)
    result = stability({"lines": [(0, points, 0.9)]}, {"lines": [(1, points, 0.9)]})
    assert result.all_lines.pairs == 0 and result.lines["ped_crossing"].found_again == 0


def test_a_line_outside_the_common_area_is_not_asked_for():
    gone = (2, global_line(0.0, -60, -40), 0.9)
    result = stability({}, {"lines": [gone]})
    assert result.all_lines.pairs == 0 and math.isnan(result.all_lines.found_again)


def test_scenes_do_not_mix_and_missing_samples_are_named():
    world = {"boxes": [(0, 110.0, 52.0, STILL, 0.9)]}
    scenes = {"a": scene("a", **world), "b": scene("b", **world)}
    apart = evaluate_stability(scenes, [["a"], ["b"]], POSES, SECONDS)
    assert apart.frame_pairs == 0 and apart.all_boxes.pairs == 0
    with pytest.raises(DataError, match="lack the sample b"):
        evaluate_stability({"a": scenes["a"]}, [["a", "b"]], POSES, SECONDS)


def test_result_as_json_and_as_table():
    result = stability({"boxes": [(0, 110.0, 52.0, STILL, 0.9)]}, {"boxes": [(0, 110.0, 52.5, STILL, 0.9)]})
    record = result.as_dict()
    assert record["boxes"]["car"]["displacement"] == pytest.approx(0.5, abs=1e-4)
    assert record["all_lines"] == {"displacement": None, "found_again": None, "pairs": 0}
    assert set(record["boxes"]) == set(BOX_CLASSES)
    lines = result.table().splitlines()
    assert lines[1].split() == ["car", "0.500", "m", "1.000", "1"]


def test_the_limits_of_what_is_compared():
    def divider(y):
        return {"lines": [(0, global_line(y, -20, 20), 0.9)]}

    assert stability(divider(0.0), divider(1.49)).all_lines.pairs == 1
    assert stability(divider(0.0), divider(1.51)).all_lines.pairs == 0
    car = (0, 110.0, 52.0, STILL)
    assert stability({"boxes": [(*car, 0.9)]}, {"boxes": [(*car, 0.301)]}).all_boxes.pairs == 1
    assert stability({"boxes": [(*car, 0.9)]}, {"boxes": [(*car, 0.299)]}).all_boxes.pairs == 0
    # Boxes count below 50 m: the ego stands still, and the first box is exactly so far ahead.
    still = {"a": np.eye(4), "b": np.eye(4)}
    far, near = (scene("a")._replace(boxes=scene("a", boxes=[(0, 0.0, 0.0, STILL, 0.9)]).boxes) for _ in range(2))
    far.boxes.center[0], near.boxes.center[0] = torch.tensor([30.0, 40.0, 1.0]), torch.tensor([30.0, 39.9, 1.0])
    for objects, pairs in ((far, 0), (near, 1)):
        result = evaluate_stability({"a": objects, "b": objects}, [["a", "b"]], still, SECONDS)
        assert result.all_boxes.pairs == pairs


def test_what_is_missing_is_a_dash_in_the_table():
    text = stability({}, {"boxes": [(0, 110.0, 52.0, STILL, 0.9)]}).table().splitlines()
    assert [line.split()[2:] for line in text[1:]] == [["-", "0.000", "0"], ["-", "-", "0"]]
