"""MapTRv2 and geometry-guided kernel attention, step by step against closed forms, explicit loops and OpenCV.

Parity with the published code is tested in test_maptrv2_golden.py and test_maptr.py, keys in test_bevformer.py.
"""

import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from perception.cameras import usual_mounting
from perception.geometry import invert_rigid, project_points, rigid_from_yaw, transform_points
from perception.grid import BEVGrid
from perception.models.checkpoint import load_model, save_checkpoint
from perception.models.decoding import empty_boxes
from perception.models.maptr.losses import lidar_lines
from perception.models.maptrv2.config import MapTRv2Config
from perception.models.maptrv2.encoder import camera_parameters, lifted_points
from perception.models.maptrv2.losses import draw_lines_in_bev, draw_lines_in_images, joined_pixels
from perception.models.maptrv2.model import MapTRv2, MapTRv2Outputs
from perception.models.published.backbone import FPNConfig
from perception.models.published.encoder import GeometryKernelAttention
from perception.models.published.geometry import lidar_projections
from perception.types import NUSCENES_EGO_FROM_LIDAR, Boxes, CameraRig, Frame, FrameObjects, Polylines, map_tensors

AHEAD = torch.tensor([[0.0, 0, 1, 1.5], [-1, 0, 0, 0], [0, -1, 0, 1.6], [0, 0, 0, 1]])
BEHIND = torch.tensor([[0.0, 0, -1, 0], [1, 0, 0, 0], [0, -1, 0, 1.6], [0, 0, 0, 1]])
RIG = CameraRig(
    torch.tensor([[60.0, 0, 48], [0, 60, 32], [0, 0, 1]]).expand(1, 2, 3, 3),
    torch.stack([AHEAD, BEHIND])[None],
    torch.ones(1, 2, dtype=torch.bool),
)
SIZE = (64, 96)
EGO_FROM_LIDAR = torch.tensor([NUSCENES_EGO_FROM_LIDAR])
SMALL = MapTRv2Config(
    image_size=SIZE, backbone=FPNConfig(stages=3, stride=16), bev=(20, 10), channels=16, feed_forward=24, heads=2,
    decoder_layers=2, lines=6, line_points=5, one_to_many_queries=8, one_to_many_repeats=2,
    depth_range=(1.0, 25.0, 1.0), aspp_channels=4, max_lines=4,
)  # fmt: skip


def frame(seed: int = 0) -> Frame:
    images = torch.randint(0, 256, (1, 2, 3, *SIZE), generator=torch.Generator().manual_seed(seed)).byte()
    return Frame(
        images, RIG, torch.eye(4)[None], torch.zeros(1), torch.ones(1, dtype=torch.bool), *usual_mounting(1, 2)
    )


def test_lifted_points_project_to_their_pixels():
    """A lifted point projects back to its pixel and its depth."""
    points = lifted_points(SMALL, RIG, EGO_FROM_LIDAR, SIZE, (4, 6))  # [1, 2, D, 4, 6, 3]
    cam_from_lidar = invert_rigid(RIG.ego_from_cam) @ EGO_FROM_LIDAR
    uv, depth = project_points(RIG.img_from_cam, transform_points(cam_from_lidar, points.flatten(2, 4)), 0.1)
    uv, depth = uv.unflatten(2, points.shape[2:5]), depth.unflatten(2, points.shape[2:5])
    assert depth[0, 1, :, 2, 3].tolist() == pytest.approx(list(range(1, 25)), abs=1e-4)
    assert uv[0, 0, 7, 0, :, 0].tolist() == pytest.approx([95 * k / 5 for k in range(6)], abs=1e-3)
    assert uv[0, 1, 7, :, 0, 1].tolist() == pytest.approx([63 * k / 3 for k in range(4)], abs=1e-3)


@torch.no_grad()
def test_features_are_splatted_into_their_cell():
    """Features of one pixel at 10 m depth are in one BEV cell; those of an absent camera in none."""
    torch.manual_seed(0)
    encoder = MapTRv2(SMALL).eval().head.transformer.encoder
    encoder.downsample = torch.nn.Identity()

    def one_pixel(features, cameras):
        logits = torch.full((2, 24, 4, 6), -200.0)
        logits[:, 9] = 200.0
        context = torch.zeros(2, 16, 4, 6)
        context[0, 3, 2, 2] = 7.0
        return logits, context

    encoder.depth_net.forward = one_pixel
    bev, _ = encoder(torch.zeros(1, 2, 16, 4, 6), RIG, EGO_FROM_LIDAR, SIZE)
    assert bev.shape == (1, 16, 40, 20)
    # Pixel (38, 42) of a camera 1.5 m ahead of the origin, 10 m along its axis: 1.667 m to the left.
    x, y = 10.0 * (38 - 48) / 60, 11.5 - 0.9437  # LiDAR's right and ahead
    row, column = math.floor((y + 30) / 1.5), math.floor((x + 15) / 1.5)
    assert (bev > 1e-6).nonzero().tolist() == [[0, 3, row, column]]
    assert bev[0, 3, row, column].item() == pytest.approx(7.0)
    gone = RIG._replace(present=torch.tensor([[False, True]]))
    assert not encoder(torch.zeros(1, 2, 16, 4, 6), gone, EGO_FROM_LIDAR, SIZE)[0].any()


@torch.no_grad()
def test_the_lift_of_a_fixed_rig_equals_the_lift():
    """Random features of two cameras in a tilted LiDAR frame, with all cameras present and with one."""
    torch.manual_seed(3)
    pose = torch.from_numpy(rigid_from_yaw(-np.pi / 2, (0.94, 0.0, 1.84)) @ tilt(2.0, -1.5)).float()[None]
    model = MapTRv2(SMALL).eval()
    for parameter in model.head.parameters():  # so that every parameter has an effect
        parameter.add_(torch.randn_like(parameter), alpha=0.1) if parameter.requires_grad else None
    fixed = model.for_rig(RIG, pose)
    assert len(fixed.lift.sizes) > 2  # cells of one feature and cells of many
    for present in ([True, True], [False, True]):
        of = frame(1)._replace(ego_from_lidar=pose, rig=RIG._replace(present=torch.tensor([present])))
        (wanted, _), (found, _) = (network(of, model.initial_state(1)) for network in (model, fixed))
        bev = model.head.transformer.encoder(model.image_encoder(of.images)[-1], of.rig, pose, SIZE)[0]
        assert bev.std() > 0.01
        for name in ("logits", "points", "bev_seg_logits", "depth_logits"):
            torch.testing.assert_close(getattr(found, name), getattr(wanted, name), atol=1e-5, rtol=1e-5)


def test_camera_parameters_are_those_of_the_full_image():
    numbers = camera_parameters(RIG, 0.5)[0, 1]
    assert numbers.tolist() == pytest.approx(
        [120, 120, 96, 64, 0.5, 0, 0, 0, 0.5, 0, 0, 0, -1, 0, 1, 0, 0, 0, 0, -1, 0, 1.6]
    )


def test_one_to_many_queries_only_in_training(tmp_path):
    """One-to-many queries do not change the lines: queries of the two kinds do not attend to each other."""
    torch.manual_seed(0)
    model = MapTRv2(SMALL).eval()
    for parameter in model.head.parameters():  # so that every parameter has an effect
        torch.nn.init.normal_(parameter, std=0.2) if parameter.requires_grad else None
    with torch.no_grad():
        alone, state = model(frame(), model.initial_state(1))
        model.head.training = True  # this flag only: batch norm and dropout stay in evaluation mode
        both, _ = model(frame(), state)
    assert alone.one_to_many_logits.shape[2] == 0 and both.one_to_many_logits.shape[2] == 8
    torch.testing.assert_close(alone.points, both.points, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone.logits, both.logits, atol=1e-5, rtol=1e-5)
    objects = model.decode(alone)
    assert objects.lines.points.shape == (1, 4, 5, 2) and objects.boxes.score.shape == (1, 0)
    model.head.training = False
    save_checkpoint(tmp_path / "w.safetensors", model, {})
    again = load_model(tmp_path / "w.safetensors")
    assert again.config == SMALL
    with torch.no_grad():
        assert torch.equal(again(frame(), state)[0].points, alone.points)
    # In earlier versions the config had the pose of the LiDAR.
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        metadata = file.metadata()
    former = json.loads(metadata["config"]) | {
        "ego_from_lidar": [[0, 1, 0, 1], [-1, 0, 0, 0], [0, 0, 1, 2], [0, 0, 0, 1]]
    }
    save_file(
        load_file(tmp_path / "w.safetensors"), tmp_path / "old.safetensors", metadata | {"config": json.dumps(former)}
    )
    assert load_model(tmp_path / "old.safetensors").config == SMALL


def drawn(lines: Polylines, size: tuple[int, int], of: Frame | None = None) -> torch.Tensor:
    """The image masks [B, N, 1, h, w] of lines in the ego frame."""
    of = frame() if of is None else of
    return draw_lines_in_images(lidar_lines(lines, of.ego_from_lidar), lidar_projections(of), SIZE, size)


def make_lines(points: torch.Tensor) -> Polylines:
    """Open lines [B, M, P, 2]."""
    yes = torch.ones(points.shape[:2], dtype=torch.bool)
    return Polylines(points, ~yes, (~yes).long(), yes.float(), yes, torch.zeros_like(points))


def test_lines_are_drawn_into_images():
    """Only the camera ahead sees a line straight ahead, 5 to 20 m away, 1.6 m below the LiDAR."""
    lines = make_lines(torch.tensor([[[[5.0, -0.05], [20.0, -0.05]]]]))
    image = drawn(lines, (64, 96))
    assert not image[0, 1].any()
    rows, columns = image[0, 0, 0].nonzero(as_tuple=True)
    assert set(columns.tolist()) == {48}
    below = AHEAD[2, 3] - (EGO_FROM_LIDAR[0, 2, 3] - 1.6)
    near, far = 32 + 60 * below / 3.5, 32 + 60 * below / 18.5
    assert rows.max() == int(near) and rows.min() == int(far)
    assert not drawn(lines._replace(valid=torch.zeros(1, 1, dtype=torch.bool)), (64, 96)).any()
    gone = frame()._replace(rig=RIG._replace(present=torch.tensor([[False, True]])))
    assert not drawn(lines, (64, 96), gone).any()


def test_bev_masks_are_almost_those_of_opencv():
    """Lines of thickness 3 between cells; OpenCV rounds their corners to whole cells first."""
    cv2 = pytest.importorskip("cv2")
    grid = BEVGrid((-15.0, 15.0), (-30.0, 30.0), (100, 200))
    points = np.random.default_rng(0).uniform((-15, -30), (15, 30), (5, 4, 2))
    wanted = np.zeros((200, 100), np.uint8)
    for line in points:
        cv2.polylines(wanted, [np.int32((line - [-15, -30]) / 0.3)], False, color=1, thickness=3)
    found = draw_lines_in_bev(make_lines(torch.from_numpy(points).float()[None]), grid)[0, 0].numpy()
    assert (found * wanted).sum() / np.maximum(found, wanted).sum() > 0.88
    nothing = make_lines(torch.zeros(1, 2, 4, 2))._replace(valid=torch.zeros(1, 2, dtype=torch.bool))
    assert draw_lines_in_bev(nothing, grid).shape == (1, 1, 200, 100) and not draw_lines_in_bev(nothing, grid).any()


def test_image_masks_are_those_of_opencv():
    """Random lines of a tilted LiDAR: 200 points each at z = -1.6 m, those ahead joined by cv2.polylines."""
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(4)
    pose = rigid_from_yaw(-np.pi / 2, (0.94, 0.0, 1.84)) @ tilt(2.0, -1.5)
    points = rng.uniform((-15, -30), (15, 30), (12, 2, 2))  # in the level LiDAR frame
    x, y = pose[0, 0], pose[1, 0]
    level = np.array([[x, -y], [y, x]]) / np.hypot(x, y)
    in_ego = torch.from_numpy(points @ level.T + pose[:2, 3]).float()[None]
    of = frame()._replace(ego_from_lidar=torch.from_numpy(pose).float()[None])
    found = drawn(make_lines(in_ego), (32, 48), of)
    wanted = np.zeros((2, 32, 48), np.uint8)
    for n in range(2):
        matrix = np.diag([0.5, 0.5, 1.0]) @ RIG.img_from_cam[0, n].double().numpy()
        cam_from_lidar = np.linalg.inv(RIG.ego_from_cam[0, n].double().numpy()) @ pose
        for start, end in points:
            along = start + np.linspace(0, 1, 200)[:, None] * (end - start)
            cam = np.column_stack([along, np.full(200, -1.6), np.ones(200)]) @ cam_from_lidar.T[:, :3]
            uv = (cam[cam[:, 2] > 0] @ matrix.T)[:, :2] / cam[cam[:, 2] > 0, 2:]
            cv2.polylines(wanted[n], np.int32([uv.clip(-1e6, 1e6)]), False, color=1, thickness=1)
    assert wanted.sum() > 200
    # OpenCV clips a line that leaves the image to a whole pixel first, which bends it.
    assert (found[0, :, 0].numpy() != wanted).mean() < 0.002


def test_pixels_between_two_pixels_are_those_of_opencv():
    cv2 = pytest.importorskip("cv2")
    ends = torch.from_numpy(np.random.default_rng(0).integers(0, 12, (300, 2, 2)))
    found = joined_pixels(ends[:, 0], ends[:, 1], 12)
    for (start, end), pixels in zip(ends.tolist(), found, strict=True):
        wanted = np.zeros((12, 12), np.uint8)
        cv2.line(wanted, start, end, 1)
        ours = {(y, x) for x, y in pixels.tolist() if x >= 0}
        assert ours == set(zip(*(side.tolist() for side in wanted.nonzero()), strict=True)), (start, end)


def tilt(roll_deg: float, pitch_deg: float) -> np.ndarray:
    """A rotation [4, 4] about x, then about y."""
    (r, p), found = np.radians([roll_deg, pitch_deg]), np.eye(4)
    about_x = [[1, 0, 0], [0, np.cos(r), -np.sin(r)], [0, np.sin(r), np.cos(r)]]
    found[:3, :3] = np.array([[np.cos(p), 0, np.sin(p)], [0, 1, 0], [-np.sin(p), 0, np.cos(p)]]) @ about_x
    return found


# A divider on the ground straight ahead and 2.4 m to the left, and one that is padding.
DIVIDER = torch.stack([torch.linspace(1.2, 9.0, 5), torch.full((5,), 2.4)], -1)
LINES = Polylines(
    torch.stack([DIVIDER, DIVIDER + 3])[None], torch.zeros(1, 2, dtype=torch.bool), torch.zeros(1, 2).long(),
    torch.ones(1, 2), torch.tensor([[True, False]]), torch.zeros(1, 2, 5, 2),
)  # fmt: skip


def box_ahead(distance: float) -> Boxes:
    """A box of which the camera that looks ahead sees a face at a distance in metres.

    Boxes grow by half a pixel of the feature map, 8 pixels of the image, at the distance of their centre.
    """
    center = (distance + 2) / (1 - 16 / 60 / 2)
    boxes = map_tensors(lambda x: torch.zeros(1, 1, *x.shape[2:], dtype=x.dtype), empty_boxes(1, "cpu"))
    boxes.center[0, 0], boxes.size[0, 0] = torch.tensor([1.5 + center, 0, 1.6]), torch.tensor([4.0, 3, 2])
    return boxes._replace(valid=torch.ones(1, 1, dtype=torch.bool))


# Cells of 3 m with their centre within 2.5 cells of the divider: LiDAR x is -2.4 m, y from 0.2563 to 8.0563 m.
DRAWN = [
    (row, column)
    for row, y in enumerate(np.arange(-28.5, 30, 3))
    for column, x in enumerate(np.arange(-13.5, 15, 3))
    if math.hypot(x + 2.4, max(0.2563 - y, 0, y - 8.0563)) <= 7.5
]  # fmt: skip


@pytest.fixture(scope="module")
def network() -> MapTRv2:
    return MapTRv2(SMALL).train()


@pytest.fixture(scope="module")
def perfect() -> MapTRv2Outputs:
    """Two layers and two one-to-many copies that predict `LINES` and a face 9.5 m away, with logits of 20."""
    in_lidar = torch.stack([-DIVIDER[:, 1], DIVIDER[:, 0] - NUSCENES_EGO_FROM_LIDAR[0][3]], -1)  # x right, y ahead
    low, extent = torch.tensor([-15.0, -30]), torch.tensor([30.0, 60])
    points = ((in_lidar - low) / extent).expand(2, 1, 8, 5, 2).clone()
    logits = torch.full((2, 1, 8, 3), -20.0)
    logits[:, :, 2:4, 0] = 20
    points[:, :, [0, 1, *range(4, 8)]] = 0.9
    bev = torch.full((1, 1, 20, 10), -20.0)
    for row, column in DRAWN:
        bev[0, 0, row, column] = 20
    image = 40 * drawn(LINES, (4, 6)) - 20
    depth = torch.full((1, 2, 24, 4, 6), -20.0)
    depth[:, :, 8] = 20  # bins of 1 m from 1 m on
    return MapTRv2Outputs(logits[:, :, 3:], points[:, :, 3:], logits, points, bev, image, depth, EGO_FROM_LIDAR)


def losses_of(network, prediction, boxes=None, lines=LINES, rig=RIG) -> dict[str, float]:
    gt = FrameObjects(box_ahead(9.5) if boxes is None else boxes, lines)
    losses = network.loss(prediction, gt, frame()._replace(rig=rig))
    return {name: float(loss) for name, loss in losses.items()}


def test_a_perfect_prediction_has_no_loss(network, perfect):
    losses = losses_of(network, perfect)
    assert set(losses) == {
        "line_class", "line_points", "line_direction", "one_to_many_class", "one_to_many_points",
        "one_to_many_direction", "bev_seg", "image_seg", "depth",
    }  # fmt: skip
    assert max(losses.values()) < 1e-4 and perfect.image_seg_logits.amax() == 20


def test_each_line_is_asked_for_once_and_of_the_further_queries_as_often_as_it_is_repeated(network, perfect):
    points = perfect.one_to_many_points.clone()
    points[:, 0, 3, :, 0] += 0.01  # 0.3 m
    losses = losses_of(network, perfect._replace(one_to_many_points=points))
    # Two layers, one of two copies, five points; loss weight 5.
    assert losses["one_to_many_points"] == pytest.approx(2 * 5 * 0.05 / 2, rel=1e-3) and losses["line_points"] < 1e-4
    points = perfect.points.clone()
    points[1, 0, 0, :, 1] -= 0.01
    losses = losses_of(network, perfect._replace(points=points))
    assert losses["line_points"] == pytest.approx(5 * 0.05, rel=1e-3) and losses["one_to_many_points"] < 1e-4
    turned = LINES._replace(points=LINES.points.flip(2))
    assert losses_of(network, perfect, lines=turned)["line_points"] < 1e-4


def test_segmentation_losses_by_hand(network, perfect):
    zero = perfect._replace(bev_seg_logits=torch.zeros(1, 1, 20, 10), image_seg_logits=torch.zeros(1, 2, 1, 4, 6))
    losses = losses_of(network, zero)
    # An entropy of log 2 in each cell; in those of the line it counts four times. Weights 1 and 2.
    assert losses["bev_seg"] == pytest.approx(math.log(2) * (200 + 3 * len(DRAWN)) / 200, rel=1e-4)
    assert losses["image_seg"] == pytest.approx(2 * math.log(2), rel=1e-4)
    # Of an absent camera nothing is learned, whatever it predicts.
    wrong = perfect.image_seg_logits.clone()
    wrong[:, 1] = 20
    assert losses_of(network, perfect._replace(image_seg_logits=wrong))["image_seg"] > 10
    alone = RIG._replace(present=torch.tensor([[True, False]]))
    assert losses_of(network, perfect._replace(image_seg_logits=wrong), rig=alone)["image_seg"] < 1e-4


def test_depth_is_learned_from_the_faces_of_boxes_within_the_range(network, perfect):
    uniform = perfect._replace(depth_logits=torch.zeros(1, 2, 24, 4, 6))
    assert losses_of(network, uniform)["depth"] == pytest.approx(3 * math.log(24), rel=1e-4)
    assert losses_of(network, perfect, box_ahead(8.5))["depth"] == pytest.approx(3 * 40, rel=1e-3)
    # Beyond 25 m, nearer than 1 m, and in an absent camera there is nothing to learn.
    for distance, expected in ((24.0, True), (26.5, False), (0.5, False)):
        assert (losses_of(network, uniform, box_ahead(distance))["depth"] > 0) == expected, distance
    assert losses_of(network, uniform, rig=RIG._replace(present=torch.tensor([[False, True]])))["depth"] == 0


@torch.no_grad()
def test_kernel_attention_equals_explicit_loops():
    torch.manual_seed(0)
    heads, kernel, h, w, cells = 2, (3, 5), 4, 7, 9
    attention = GeometryKernelAttention(8, heads, kernel)
    torch.nn.init.normal_(attention.attention.attention_weights.weight)
    query, features = torch.randn(1, cells, 8), torch.randn(1, 2, h * w, 8)
    references = torch.rand(1, 2, cells, heads, 2) * 1.4 - 0.2
    visible = torch.rand(1, 2, cells) > 0.4
    expected = torch.zeros(cells, 8)
    value = attention.attention.value_proj(features)[0].view(2, h, w, heads, 4)
    weight = attention.attention.attention_weights(query)[0].view(cells, heads, 15).softmax(-1)
    for cell in range(cells):
        cameras = [n for n in range(2) if visible[0, n, cell]]
        for n in cameras:
            for head in range(heads):
                u, v = (references[0, n, cell, head] * torch.tensor([w, h])).tolist()
                k = 0
                for du in (-2, -1, 0, 1, 2):
                    for dv in (-1, 0, 1):
                        x, y = min(max(round(u + du), 0), w - 1), min(max(round(v + dv), 0), h - 1)
                        part = weight[cell, head, k] * value[n, y, x, head] / len(cameras)
                        expected[cell, 4 * head : 4 * head + 4] += part
                        k += 1
    found = attention(query, features, [(h, w)], references, visible)
    torch.testing.assert_close(found[0], attention.output_proj(expected) + query[0])
