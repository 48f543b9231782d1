"""Losses against hand-worked cases and against the symmetries they must have."""

import math

import pytest
import torch

from perception.grid import BEVGrid
from perception.losses import (
    draw_heatmap,
    draw_raster,
    encode_boxes,
    focal_loss,
    hungarian,
    line_orderings,
    set_losses,
)
from perception.models.decoder import decode
from perception.types import Boxes, Polylines, Prediction, Scene

GRID = BEVGrid((-20.0, 20.0), (-20.0, 20.0), (20, 20))
RING = [[0.0, 0], [4, 0], [4, 2], [0, 2], [0, 0]]
BEND = [[-8.0, 1], [-4, 1], [0, 1], [2, 3], [2, 6]]


def make_boxes() -> Boxes:
    """Three boxes and one row of padding; the second box does not know its velocity."""
    return Boxes(
        center=torch.tensor([[[5.0, 3, 1], [-7, 2, 0.5], [11, -9, 2], [0, 0, 0]]]),
        size=torch.tensor([[[4.0, 2, 1.5], [0.7, 0.7, 1.8], [11, 3, 3.5], [0, 0, 0]]]),
        yaw=torch.tensor([[0.3, -2.0, 1.5, 0]]),
        velocity=torch.tensor([[[3.0, 1], [math.nan, math.nan], [0, 0], [0, 0]]]),
        label=torch.tensor([[0, 7, 3, 0]]),
        attribute=torch.full((1, 4), -1),
        score=torch.ones(1, 4),
        valid=torch.tensor([[True, True, True, False]]),
    )


def make_lines() -> Polylines:
    return Polylines(
        points=torch.tensor([[BEND, RING]]),
        closed=torch.tensor([[False, True]]),
        label=torch.tensor([[2, 1]]),
        score=torch.ones(1, 2),
        valid=torch.ones(1, 2, dtype=torch.bool),
    )


def perfect_prediction(boxes: Boxes, lines: Polylines, logit: float = 12.0) -> Prediction:
    """Logits and parameters that say exactly the truth, in another order than the truth, with spare queries."""
    Q = 6
    box_logits, params = torch.full((1, 1, Q, 10), -logit), torch.zeros(1, 1, Q, 10)
    for m, q in enumerate([4, 0, 2]):
        box_logits[0, 0, q, boxes.label[0, m]] = logit
        params[0, 0, q] = encode_boxes(boxes)[0, m].nan_to_num(9.0)
    line_logits, points = torch.full((1, 1, 4, 3), -logit), torch.full((1, 1, 4, 5, 2), 50.0)
    for m, q in enumerate([3, 1]):
        line_logits[0, 0, q, lines.label[0, m]] = logit
        points[0, 0, q] = lines.points[0, m]
    heat = draw_heatmap(boxes, GRID, 10)
    heatmap = torch.where(heat == 1, logit, -logit)
    raster = torch.where(draw_raster(lines, GRID, 3) > 0, logit, -logit)
    return Prediction(box_logits, params, line_logits, points, heatmap, raster)


def test_truth_has_no_loss_and_decodes_to_itself():
    boxes, lines = make_boxes(), make_lines()
    prediction = perfect_prediction(boxes, lines)
    losses = set_losses(prediction, Scene(boxes, lines), GRID)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(0, abs=1e-3), name
    scene = decode(prediction)
    for m in range(3):
        k = (scene.boxes.label[0] == boxes.label[0, m]).nonzero()[0, 0]
        assert scene.boxes.center[0, k].tolist() == pytest.approx(boxes.center[0, m].tolist())
        assert scene.boxes.yaw[0, k].item() == pytest.approx(boxes.yaw[0, m].item(), abs=1e-6)


def test_box_error_by_hand():
    boxes, lines = make_boxes(), make_lines()
    prediction = perfect_prediction(boxes, lines)
    prediction.box_params[0, 0, 4, 0] += 3.0  # the first box 3 m off in x: 3 m x weight 1 / 3 boxes x loss weight 0.25
    prediction.box_params[0, 0, 4, 8] -= 2.0  # and 2 m/s off: 2 x 0.5 / 3 x 0.25
    losses = set_losses(prediction, Scene(boxes, lines), GRID)
    assert losses["box_params"].item() == pytest.approx((3.0 * 1 + 2.0 * 0.5) / 3 * 0.25, rel=1e-5)


def test_unknown_velocity_costs_nothing_but_a_nan_in_the_output_shows():
    boxes, lines = make_boxes(), make_lines()
    prediction = perfect_prediction(boxes, lines)
    prediction.box_params[0, 0, 0, 8] = 100.0
    losses = set_losses(prediction, Scene(boxes, lines), GRID)
    assert losses["box_params"].item() == pytest.approx(0, abs=1e-6)
    prediction.box_params[0, 0, 4, 0] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        set_losses(prediction, Scene(boxes, lines), GRID)


@pytest.mark.parametrize("walk", ["backwards", "ring start", "ring start backwards"])
def test_a_line_walked_otherwise_is_the_same_line(walk):
    boxes, lines = make_boxes(), make_lines()
    prediction = perfect_prediction(boxes, lines)
    if walk == "backwards":
        points = torch.tensor([BEND[::-1], RING[::-1]])
    else:
        ring = [*RING[2:], *RING[1:3]]
        points = torch.tensor([BEND, ring if walk == "ring start" else ring[::-1]])
    turned = lines._replace(points=points[None])
    losses = set_losses(prediction, Scene(boxes, turned), GRID)
    assert losses["line_points"].item() == pytest.approx(0, abs=1e-6)
    # cosine_similarity is guarded by an epsilon, so it is not exactly 1
    assert losses["line_direction"].item() == pytest.approx(0, abs=1e-5)


def test_an_open_line_may_not_be_started_in_its_middle():
    orderings, exists = line_orderings(make_lines())
    assert exists[0].sum(-1).tolist() == [2, 8]  # open: 2; ring of 5 points: 2 * 4
    kept = orderings[0, 0][exists[0, 0]]
    assert kept.tolist() == [BEND, BEND[::-1]]
    rings = {tuple(map(tuple, ring)) for ring in orderings[0, 1].tolist()}
    assert len(rings) == 8
    assert all(ring[0] == ring[-1] for ring in rings)


def test_matching_is_the_cheapest_and_ignores_padding():
    cost = torch.tensor([[[1.0, 2.0, -99.0], [1.5, 9.0, -99.0], [7.0, 8.0, -99.0]]])
    match = hungarian(cost, torch.tensor([[True, True, False]]))
    # 1.5 + 2.0 beats 1.0 + 8.0
    assert sorted(zip(match.query.tolist(), match.target.tolist(), strict=True)) == [(0, 1), (1, 0)]


def test_empty_scene_has_finite_losses_and_gradients():
    boxes, lines = make_boxes(), make_lines()
    prediction = Prediction(*(x.requires_grad_() for x in perfect_prediction(boxes, lines, logit=1.0)))
    nothing = Scene(
        boxes._replace(valid=torch.zeros(1, 4, dtype=torch.bool)),
        lines._replace(valid=torch.zeros(1, 2, dtype=torch.bool)),
    )
    losses = set_losses(prediction, nothing, GRID)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert prediction.box_logits.grad.isfinite().all()


def test_focal_loss_by_hand():
    # p = 0.5: alpha * 0.25 * ln 2 for a positive, (1 - alpha) * 0.25 * ln 2 for a negative
    logits, target = torch.zeros(2), torch.tensor([1.0, 0.0])
    expected = [0.25 * 0.25 * math.log(2), 0.75 * 0.25 * math.log(2)]
    assert focal_loss(logits, target).tolist() == pytest.approx(expected)


def test_heatmap_peaks_where_the_centres_are():
    heat = draw_heatmap(make_boxes(), GRID, 10)
    # cells of 2 m: x = 5 lies in cell (5 + 20) / 2 = 12.5 -> 12, y = 3 in cell 11.5 -> 11
    assert heat[0, 0, 12, 11] == 1
    assert (heat == 1).sum() == 3
    assert heat[0, 0, 13, 11] == pytest.approx(math.exp(-1 / (2 * 0.7**2)), rel=1e-5)


def test_raster_marks_the_cells_a_line_crosses():
    raster = draw_raster(make_lines(), GRID, 3)
    # the straight part of the bend, y = 1 (cell 10), from x = -8 (cell 6) to x = 0 (cell 10)
    assert raster[0, 2, 6:11, 10].tolist() == [1] * 5
    assert raster[0, 0].sum() == 0
    assert raster[0, 1].sum() > 0
