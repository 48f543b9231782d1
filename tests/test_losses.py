"""Losses against hand-worked cases and against the symmetries they must have."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from perception.cameras import usual_mounting
from perception.geometry import rigid_from_yaw, transform_points
from perception.grid import BEVGrid
from perception.matching import focal_loss, hungarian, match_layers
from perception.models.bev_transformer.decoder import decode
from perception.models.bev_transformer.encoder import depth_bin
from perception.models.bev_transformer.losses import frame_losses, image_losses
from perception.targets import draw_bev_segmentation, draw_heatmap, encode_boxes, line_orderings, ray_cast_boxes
from perception.types import (
    BOX_CLASSES,
    Boxes,
    CameraRig,
    Frame,
    FrameObjects,
    ImagePrediction,
    Polylines,
    Prediction,
    map_tensors,
)

GRID = BEVGrid((-20.0, 20.0), (-20.0, 20.0), (20, 20))
RING = [[0.0, 0], [4, 0], [4, 2], [0, 2], [0, 0]]
AHEAD = [[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]]  # ego_from_cam of a camera that looks along x
BEHIND = [[0.0, 0, -1, 0], [1, 0, 0, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]]
FRAME = Frame(
    images=torch.zeros(1, 2, 3, 60, 100),
    rig=CameraRig(
        img_from_cam=torch.tensor([[50.0, 0, 50], [0, 50, 30], [0, 0, 1]]).expand(1, 2, 3, 3),
        ego_from_cam=torch.tensor([[AHEAD, BEHIND]]),
        present=torch.ones(1, 2, dtype=torch.bool),
    ),
    ego_from_prev=torch.eye(4)[None],
    seconds_since_prev=torch.zeros(1),
    is_first=torch.ones(1, dtype=torch.bool),
    ego_from_lidar=usual_mounting(1, 2)[0],
    ego_from_exposure=usual_mounting(1, 2)[1],
)
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
        uncertainty=torch.zeros(1, 4, 9),
    )


def make_lines() -> Polylines:
    return Polylines(
        points=torch.tensor([[BEND, RING]]),
        closed=torch.tensor([[False, True]]),
        label=torch.tensor([[2, 1]]),
        score=torch.ones(1, 2),
        valid=torch.ones(1, 2, dtype=torch.bool),
        uncertainty=torch.zeros(1, 2, 5, 2),
    )


def perfect_prediction(boxes: Boxes, lines: Polylines, logit: float = 12.0) -> Prediction:
    """Logits and parameters that say exactly the ground truth, in another order than the ground truth, with spare
    queries."""
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
    bev_seg = torch.where(draw_bev_segmentation(lines, GRID, 3) > 0, logit, -logit)
    depth, box = ray_cast_boxes(boxes, FRAME.rig, (60, 100), (15, 25))
    shown = F.one_hot(boxes.label[0, box], 10).movedim(-1, 2).bool() & depth.isfinite()[:, :, None]
    image = torch.where(shown, logit, -logit)
    ahead = boxes.center[0, :, 0]  # the cameras look along x, one forwards and one backwards
    place = depth_bin(torch.stack([ahead[box[:, 0]], -ahead[box[:, 1]]], 1), 8)[:, :, None]  # [B, N, 1, h, w]
    # The softmax of logs of weights that sum to one is those weights.
    depth_logits = (1 - (place - torch.arange(8).view(8, 1, 1)).abs()).clamp(min=1e-9).log()
    sight = boxes.center - FRAME.rig.ego_from_cam[:, 0, :3, 3]  # both cameras are in one place
    angle = (boxes.yaw - torch.atan2(sight[..., 1], sight[..., 0]))[0, box]
    heading = torch.stack([angle.sin(), angle.cos()], 2)
    images = ImagePrediction(image, depth_logits, heading)
    # An error of nothing under an uncertainty of one has the negative log likelihood log 2.
    uncertainties = torch.zeros(1, 1, Q, 9), torch.zeros(1, 1, 4, 5, 2)
    return Prediction(
        box_logits, params, uncertainties[0], line_logits, points, uncertainties[1], heatmap, bev_seg, images
    )


def test_truth_has_no_loss_and_decodes_to_itself():
    boxes, lines = make_boxes(), make_lines()
    prediction = perfect_prediction(boxes, lines)
    losses = frame_losses(prediction, FrameObjects(boxes, lines), FRAME, GRID)
    # 9 + 9 + 7 known errors of nothing for 3 boxes (one velocity is unknown), each log 2; loss weight 0.1
    assert losses.pop("box_uncertainty").item() == pytest.approx(0.1 * 25 / 3 * math.log(2))
    assert losses.pop("line_uncertainty").item() == pytest.approx(0.1 * math.log(2))
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
    prediction.box_params[0, 0, 4, 8] -= 2.0  # and 2 m/s off: 2 x 2 / 3 x 0.25
    losses = frame_losses(prediction, FrameObjects(boxes, lines), FRAME, GRID)
    assert losses["box_params"].item() == pytest.approx((3.0 * 1 + 2.0 * 2.0) / 3 * 0.25, rel=1e-5)


def test_line_error_by_hand():
    boxes, lines = make_boxes(), make_lines()
    prediction = perfect_prediction(boxes, lines)
    prediction.line_points[0, 0, 3] += torch.tensor([0.3, -0.1])  # 0.4 m at every point of one of two lines
    losses = frame_losses(prediction, FrameObjects(boxes, lines), FRAME, GRID)
    assert losses["line_points"].item() == pytest.approx(0.5 * 0.4 / 2, rel=1e-4)


@pytest.mark.parametrize("center", [[19.9, 20.1, 1.0], [20.1, 0.0, 1.0], [-20.1, 19.9, 1.0], [3.0, -20.1, 1.0]])
def test_a_box_beside_the_grid_is_not_asked_for(center):
    boxes, lines = make_boxes(), make_lines()
    prediction = perfect_prediction(boxes, lines)
    expected = frame_losses(prediction, FrameObjects(boxes, lines), FRAME, GRID)
    more = map_tensors(torch.clone, boxes)
    more.center[0, 3], more.size[0, 3], more.valid[0, 3] = torch.tensor(center), torch.tensor([4.0, 2, 1.5]), True
    found = frame_losses(prediction, FrameObjects(more, lines), FRAME, GRID)
    for name in ("box_class", "box_params", "box_uncertainty", "heatmap"):
        assert found[name] == expected[name], name
    more.center[0, 3] = torch.tensor([19.9, -19.9, 1.0])
    found = frame_losses(prediction, FrameObjects(more, lines), FRAME, GRID)
    assert found["box_class"] > expected["box_class"] + 0.1 and found["heatmap"] > expected["heatmap"] + 0.1


def test_depth_loss_by_hand():
    """A box between two depth bins: the divergence from a uniform and from a shifted prediction, in closed form."""
    boxes = one_box([10.0, 0, 1.5], [2.0, 2, 2], 0.0)
    prediction = perfect_prediction(make_boxes(), make_lines())
    at = depth_bin(torch.tensor(10.0), 8).item()
    low, share = int(at), at - int(at)
    assert 0.02 < share < 0.98
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    uniform = prediction.images._replace(depth_logits=torch.zeros_like(prediction.images.depth_logits))
    loss = image_losses(uniform, boxes, FRAME)["image_depth"]
    assert loss.item() == pytest.approx(0.5 * (math.log(8) - entropy), rel=1e-4)
    # All on the upper bin, but for 0.01 of each of the seven others.
    logits = torch.full_like(prediction.images.depth_logits, math.log(0.01))
    logits[:, :, low + 1] = math.log(0.93)
    loss = image_losses(uniform._replace(depth_logits=logits), boxes, FRAME)["image_depth"]
    expected = -entropy - share * math.log(0.93) - (1 - share) * math.log(0.01)
    assert loss.item() == pytest.approx(0.5 * expected, rel=1e-4)


@pytest.mark.parametrize(
    ("label", "turned", "error"),
    [("car", 180, 2.0), ("car", 90, 2.0), ("barrier", 180, 0.0), ("barrier", 90, 2.0), ("traffic_cone", 90, 0.0)],
)
def test_a_yaw_counts_as_far_as_a_class_has_one(label, turned, error):
    """A box that looks along x, found turned: the error of sin and cos together, in the map and in the images."""
    boxes, lines = make_boxes(), make_lines()
    boxes = boxes._replace(
        label=torch.full((1, 4), BOX_CLASSES.index(label)), yaw=torch.zeros(1, 4), velocity=torch.zeros(1, 4, 2)
    )
    prediction = perfect_prediction(boxes, lines)
    yaw = torch.tensor(math.radians(turned))
    prediction.box_params[0, 0, :, 6:8] = torch.stack([yaw.sin(), yaw.cos()])
    losses = frame_losses(prediction, FrameObjects(boxes, lines), FRAME, GRID)
    assert losses["box_params"].item() == pytest.approx(0.25 * error, abs=1e-5)
    turned_by = torch.stack([yaw.cos(), -yaw.sin(), yaw.sin(), yaw.cos()]).view(2, 2)
    cos_sin = turned_by @ prediction.images.heading.flip(2).movedim(2, -1)[..., None]
    heading = cos_sin[..., 0].movedim(-1, 2).flip(2)
    images = prediction.images._replace(heading=heading)
    found = frame_losses(prediction._replace(images=images), FrameObjects(boxes, lines), FRAME, GRID)[
        "image_heading"
    ].item()
    assert (found < 1e-4) == (error == 0.0)


def test_spread_is_the_mean_error():
    """Errors of 1 and 3 m under an uncertainty of 2 m: the likelihood is highest there, and only the uncertainty is
    trained."""
    boxes, lines = make_boxes(), make_lines()
    prediction = map_tensors(torch.Tensor.requires_grad_, map_tensors(torch.clone, perfect_prediction(boxes, lines)))
    with torch.no_grad():
        prediction.line_points[0, 0, 3] += torch.tensor([1.0, 0.0])
        prediction.line_points[0, 0, 1] += torch.tensor([3.0, 0.0])
        prediction.line_log_uncertainty[..., 0] = math.log(2)
    loss = frame_losses(prediction, FrameObjects(boxes, lines), FRAME, GRID)["line_uncertainty"]
    # Along x (log 2 + log 2 + (1 + 3) / 2 / 2), along y log 2; the mean of both, loss weight 0.1.
    assert loss.item() == pytest.approx(0.1 * (3 * math.log(2) + 1) / 2, rel=1e-5)
    loss.backward()
    slope = prediction.line_log_uncertainty.grad[0, 0, ..., 0].sum(-1)
    assert slope[3].item() == pytest.approx(-slope[1].item()) != 0  # one wants more, one less
    assert prediction.line_points.grad is None or not prediction.line_points.grad.any()


def test_a_turned_box_has_an_error_in_radians():
    boxes, lines = make_boxes(), make_lines()
    prediction = perfect_prediction(boxes, lines)
    yaw = boxes.yaw[0, 1] + 2 * math.pi - 0.3  # from -2.0 the short way
    prediction.box_params[0, 0, 0, 6:8] = torch.stack([yaw.sin(), yaw.cos()])
    loss = frame_losses(prediction, FrameObjects(boxes, lines), FRAME, GRID)["box_uncertainty"]
    assert loss.item() == pytest.approx(0.1 / 3 * (25 * math.log(2) + 0.3), rel=1e-4)


def test_unknown_velocity_costs_nothing_but_a_nan_in_the_output_shows():
    boxes, lines = make_boxes(), make_lines()
    prediction = perfect_prediction(boxes, lines)
    prediction.box_params[0, 0, 0, 8] = 100.0
    losses = frame_losses(prediction, FrameObjects(boxes, lines), FRAME, GRID)
    assert losses["box_params"].item() == pytest.approx(0, abs=1e-6)
    prediction.box_params[0, 0, 4, 0] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        frame_losses(prediction, FrameObjects(boxes, lines), FRAME, GRID)


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
    losses = frame_losses(prediction, FrameObjects(boxes, turned), FRAME, GRID)
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


def test_layers_and_samples_are_matched_one_by_one():
    torch.manual_seed(0)
    cost = torch.rand(3, 2, 5, 4)  # [L, B, Q, M]
    valid = torch.tensor([[True, False, True, True], [False, True, True, False]])
    (layer, sample, query), (sample_again, target) = match_layers(cost, valid)
    assert torch.equal(sample, sample_again) and len(layer) == 3 * 5
    for k in range(3):
        for b in range(2):
            found = {
                (q, m) for at, at_b, q, m in zip(layer, sample, query, target, strict=True) if (at, at_b) == (k, b)
            }
            objects = valid[b].nonzero()[:, 0].tolist()
            ways = itertools.permutations(range(5), len(objects))  # the query of each object
            best = min(ways, key=lambda way: sum(cost[k, b, q, m] for q, m in zip(way, objects, strict=True)))
            assert {(int(q), int(m)) for q, m in found} == set(zip(best, objects, strict=True))


def test_empty_scene_has_finite_losses_and_gradients():
    boxes, lines = make_boxes(), make_lines()
    prediction = map_tensors(torch.Tensor.requires_grad_, perfect_prediction(boxes, lines, logit=1.0))
    nothing = FrameObjects(
        boxes._replace(valid=torch.zeros(1, 4, dtype=torch.bool)),
        lines._replace(valid=torch.zeros(1, 2, dtype=torch.bool)),
    )
    losses = frame_losses(prediction, nothing, FRAME, GRID)
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


def test_heatmap_is_a_gaussian_around_the_nearest_cell():
    """Against a plain loop over cells, for centres anywhere in their cells and for small, medium and large boxes."""
    torch.manual_seed(5)
    longest = torch.tensor([0.5, 4.0, 12.0, 18.0, 40.0] * 8)
    sigma = [0.7, 0.7, 1.0, 1.5, 2.0] * 8  # a sixth of the longest side in cells of 2 m, from 0.7 to 2
    for k in range(len(longest)):
        center = torch.rand(1, 1, 3) * 30 - 15
        size = torch.tensor([[[longest[k], 0.4, 1.0]]]) if k % 2 else torch.tensor([[[0.4, longest[k], 1.0]]])
        boxes = map_tensors(lambda x: x[:, :1], make_boxes())._replace(center=center, size=size)
        heat = draw_heatmap(boxes, GRID, 10)[0, 0]
        distance = (GRID.cell_centers() - center[0, 0, :2]).norm(dim=-1)
        i, j = divmod(int(distance.argmin()), 20)
        for x in range(20):
            for y in range(20):
                far = max(abs(x - i), abs(y - j)) > 5
                expected = 0.0 if far else math.exp(-((x - i) ** 2 + (y - j) ** 2) / (2 * sigma[k] ** 2))
                assert heat[x, y].item() == pytest.approx(expected, abs=1e-6), (k, x, y)


def test_raster_marks_the_cells_a_line_crosses():
    bev_seg = draw_bev_segmentation(make_lines(), GRID, 3)
    # the straight part of the bend, y = 1 (cell 10), from x = -8 (cell 6) to x = 0 (cell 10)
    assert bev_seg[0, 2, 6:11, 10].tolist() == [1] * 5
    assert bev_seg[0, 0].sum() == 0
    assert bev_seg[0, 1].sum() > 0


def one_box(center, size, yaw, label=0) -> Boxes:
    values = {"center": [[center]], "size": [[size]], "yaw": [[yaw]], "velocity": [[[0.0, 0.0]]]}
    boxes = {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}
    ones = torch.ones(1, 1)
    return Boxes(
        **boxes,
        label=ones.long() * label,
        attribute=-ones.long(),
        score=ones,
        valid=ones.bool(),
        uncertainty=torch.zeros(1, 1, 9),
    )


def test_pixels_that_show_a_box_by_hand():
    """A cube of 2 m, 10 m ahead, its face 9 m away, seen by 100 x 60 pixels of 50 pixels focal length."""
    boxes = one_box([10.0, 0, 1.5], [2.0, 2, 2], 0.0)
    depth, _ = ray_cast_boxes(boxes, FRAME.rig, (60, 100), (60, 100))
    assert depth[0, 1].isinf().all()  # the other camera looks away
    # A pixel is 1 / 50 m wide at 1 m, so the cube is grown by 10 / 50 / 2 = 0.1 m: the face is 8.9 m away and spans
    # 50 x 1.1 / 8.9 = 6.18 pixels to either side of the middle. Centres lie at +0.5, so 6 pixels on each side.
    shown = depth[0, 0].isfinite()
    assert shown.any(1).nonzero()[[0, -1], 0].tolist() == [24, 35]
    assert shown.any(0).nonzero()[[0, -1], 0].tolist() == [44, 55]
    assert shown.sum() == 12 * 12
    torch.testing.assert_close(depth[0, 0][shown], torch.full((144,), 8.9))


def test_boxes_hide_boxes_and_turn_with_the_world():
    near, far = one_box([6.0, 0.5, 1.0], [1.0, 0.6, 2.0], 0.4), one_box([9.0, 0, 1.5], [4.0, 4, 3], -1.2)
    both = Boxes(*(torch.cat(pair, 1) for pair in zip(far, near, strict=True)))
    depth, box = ray_cast_boxes(both, FRAME.rig, (60, 100), (30, 50))
    alone = [ray_cast_boxes(b, FRAME.rig, (60, 100), (30, 50))[0][0, 0] for b in (far, near)]
    torch.testing.assert_close(depth[0, 0], torch.minimum(*alone))
    assert ((box[0, 0] == 1) == (alone[1] < alone[0])).all()
    assert alone[1].isfinite().sum() > 5
    assert (alone[0].isfinite() & (box[0, 0] == 1)).any()

    angle = 2.1
    turn = torch.from_numpy(rigid_from_yaw(angle)).float()
    center = transform_points(turn, both.center)
    rig = FRAME.rig._replace(ego_from_cam=turn @ FRAME.rig.ego_from_cam)
    again, box_again = ray_cast_boxes(both._replace(center=center, yaw=both.yaw + angle), rig, (60, 100), (30, 50))
    torch.testing.assert_close(again, depth, atol=1e-3, rtol=1e-3)
    assert (box_again == box).all()


def test_heading_is_against_the_line_of_sight():
    """A box that drives straight away from a camera has heading 0 there, wherever it is."""
    boxes, lines = one_box([-8.0, 4.0, 1.0], [4.0, 2, 2], math.atan2(4.0, -8.0)), make_lines()
    prediction = perfect_prediction(make_boxes(), lines)
    heading = torch.zeros_like(prediction.images.heading)
    heading[:, :, 1] = 1.0
    images = prediction.images._replace(heading=heading)
    assert image_losses(images, boxes, FRAME)["image_heading"].item() < 1e-6
    # turned by 90 degrees: sin and cos are both off by 1, loss weight 1
    turned = boxes._replace(yaw=boxes.yaw + math.pi / 2)
    loss = image_losses(images, turned, FRAME)["image_heading"]
    assert loss.item() == pytest.approx(1.0 * 2, rel=1e-5)


def test_an_absent_camera_has_no_loss():
    boxes, lines = make_boxes(), make_lines()
    prediction = perfect_prediction(boxes, lines)
    for dense in prediction.images:
        dense[:, 1] = 5.0
    losses = frame_losses(prediction, FrameObjects(boxes, lines), FRAME, GRID)
    assert losses["image_class"] > 1
    alone = FRAME._replace(rig=FRAME.rig._replace(present=torch.tensor([[True, False]])))
    losses = frame_losses(prediction, FrameObjects(boxes, lines), alone, GRID)
    for name in ("image_class", "image_depth", "image_heading"):
        loss = losses[name]
        assert loss.item() == pytest.approx(0, abs=1e-3), name
