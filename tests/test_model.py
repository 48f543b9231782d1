"""The network: frames by hand-computed cases, batches, cameras, memory, checkpoints."""

import math

import numpy as np
import pytest
import torch

from perception.cameras import pixel_rays, see_points, usual_mounting
from perception.errors import CheckpointError, ConfigError
from perception.geometry import project_points, rigid_from_yaw
from perception.grid import BEVGrid
from perception.models.backbone import FPNEncoder
from perception.models.bev_transformer.config import BEVTransformerConfig
from perception.models.bev_transformer.decoder import MIN_NMS_RADIUS, USUAL_SIZES, ImageSampling, circle_nms, decode
from perception.models.bev_transformer.encoder import SpatialCrossAttention, TemporalFusion, depth_bin, sample_depth
from perception.models.bev_transformer.model import BEVTransformer
from perception.models.checkpoint import load_model, read_metrics, save_checkpoint
from perception.models.decoding import close_rings, empty_boxes, empty_lines
from perception.types import CameraRig, Frame, FrameObjects, ImagePrediction, Prediction, map_tensors

CONFIG = BEVTransformerConfig.preset(
    "nano", image_size=(48, 80), channels=16, grid=(20, 20), heads=2, depth_bins=6, decoder_layers=2,
    box_queries=12, line_queries=8, line_points=6, cameras_per_cell=2,
)  # fmt: skip


NO_IMAGES = ImagePrediction(*[torch.zeros(1)] * 3)


def make_rig(cameras: int, image_size, yaws=None) -> CameraRig:
    """Cameras 1.5 m above ground, looking outwards at even angles from straight ahead."""
    H, W = image_size
    yaws = [2 * math.pi * n / cameras for n in range(cameras)] if yaws is None else yaws
    ahead = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]])  # ego_from_cam, looking along x
    ego_from_cam = torch.from_numpy(np.stack([rigid_from_yaw(yaw) @ ahead for yaw in yaws])).float()
    focal = 0.6 * W
    img_from_cam = torch.tensor([[focal, 0, W / 2], [0, focal, H / 2], [0, 0, 1]]).expand(cameras, 3, 3)
    return CameraRig(img_from_cam[None], ego_from_cam[None], torch.ones(1, cameras, dtype=torch.bool))


def make_frame(batch: int = 1, cameras: int = 6, config: BEVTransformerConfig = CONFIG, seed: int = 0) -> Frame:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (batch, cameras, 3, *config.image_size), generator=generator, dtype=torch.uint8)
    rig = make_rig(cameras, config.image_size)
    rig = CameraRig(*(x.expand(batch, *x.shape[1:]).clone() for x in rig))
    first = torch.ones(batch, dtype=torch.bool)
    motion = torch.eye(4).expand(batch, 4, 4)
    return Frame(images, rig, motion, torch.zeros(batch), first, *usual_mounting(batch, cameras))


@pytest.fixture(scope="module")
def model() -> BEVTransformer:
    """A small network in evaluation mode whose every layer does something (many start at zero)."""
    torch.manual_seed(0)
    model = BEVTransformer(CONFIG).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def test_point_seen_by_hand():
    rig = make_rig(4, (100, 200))
    # 10 m ahead, 2 m left, 0.5 m above ground. In the front camera: 2 m left of the axis, 1 m below it.
    uv, depth, seen = see_points(rig, torch.tensor([[10.0, 2.0, 0.5]]), (100, 200))
    assert uv[0, 0, 0].tolist() == pytest.approx([0.5 - 0.6 * 2 / 10, 0.5 + 0.6 * 200 / 100 * 1 / 10])
    assert depth[0, :, 0].tolist() == pytest.approx([10, 2, -10, -2], abs=1e-5)
    assert seen[0, :, 0].tolist() == [True, False, False, False]
    absent = rig._replace(present=torch.tensor([[False, True, True, True]]))
    assert not see_points(absent, torch.tensor([[10.0, 2.0, 0.5]]), (100, 200))[2].any()


def test_points_nearer_than_a_decimetre_are_not_seen():
    rig = make_rig(1, (100, 200))
    depths = [0.2, 0.11, 0.09, 0.01, 0.0, -0.2]
    on_axis = torch.tensor([[0.0, 0.0, d, 1.0] for d in depths])
    points_ego = (on_axis @ rig.ego_from_cam[0, 0].T)[:, :3]
    uv, depth, seen = see_points(rig, points_ego, (100, 200))
    assert depth[0, 0].tolist() == pytest.approx(depths, abs=1e-6)
    assert seen[0, 0].tolist() == [True, True, False, False, False, False] and uv.isfinite().all()


def test_pixel_rays_hit_their_pixels():
    img_from_cam = torch.tensor([[[70.0, 2.5, 39], [0, 65, 21], [0, 0, 1]]])[None]  # with skew
    rig = make_rig(1, (48, 80), yaws=[0.4])._replace(img_from_cam=img_from_cam)
    rays = pixel_rays(rig, (48, 80), (6, 10))
    uv, depth = project_points(img_from_cam, 7.0 * rays.cam)
    assert depth.unique().tolist() == [7.0]
    uv = uv.unflatten(2, (6, 10))
    assert uv[0, 0, 0, 0].tolist() == pytest.approx([4, 4], abs=1e-3)  # the first pixel is 8 pixels wide
    assert uv[0, 0, 2, 9].tolist() == pytest.approx([76, 20], abs=1e-3)
    points_ego = rig.ego_from_cam[..., None, :3, 3] + 7.0 * rays.ego
    seen_at, _, _ = see_points(rig, points_ego[0, 0], (48, 80))
    torch.testing.assert_close(seen_at.unflatten(2, (6, 10)), uv / torch.tensor([80.0, 48.0]))
    assert rays.pixel_width.tolist() == [[pytest.approx(8 / 70)]]


def test_shapes(model):
    prediction, state = model(make_frame(batch=2), model.initial_state(2))
    assert prediction.box_logits.shape == (2, 2, 12, 10)
    assert prediction.box_params.shape == (2, 2, 12, 10)
    assert prediction.box_log_uncertainty.shape == (2, 2, 12, 9)
    assert prediction.line_log_uncertainty.shape == (2, 2, 8, 6, 2)
    assert prediction.line_logits.shape == (2, 2, 8, 3)
    assert prediction.line_points.shape == (2, 2, 8, 6, 2)
    assert prediction.heatmap_logits.shape == (2, 10, 20, 20)
    assert prediction.bev_seg_logits.shape == (2, 3, 20, 20)
    assert prediction.images.logits.shape == (2, 6, 10, 6, 10)
    assert prediction.images.depth_logits.shape == (2, 6, 6, 6, 10)
    assert prediction.images.heading.shape == (2, 6, 2, 6, 10)
    assert state.bev.shape == (2, 16, 20, 20)


def test_every_parameter_gets_a_gradient(model):
    torch.manual_seed(2)
    frame = make_frame()
    model.zero_grad()
    _, state = model(frame, model.initial_state(1))
    prediction, _ = model(frame._replace(is_first=torch.zeros(1, dtype=torch.bool)), state)
    outputs = (*prediction[:-1], *prediction.images)
    sum((x * torch.randn_like(x)).sum() for x in outputs).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    model.zero_grad()
    assert missing == []


@torch.no_grad()
def test_batch_element_equals_it_alone(model):
    frame = make_frame(batch=3, seed=4)
    together, _ = model(frame, model.initial_state(3))
    alone_frame = Frame(frame.images[1:2], CameraRig(*(x[1:2] for x in frame.rig)), *(x[1:2] for x in frame[2:]))
    alone, _ = model(alone_frame, model.initial_state(1))
    torch.testing.assert_close(together.box_params[:, 1:2], alone.box_params, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together.line_points[:, 1:2], alone.line_points, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_order_of_cameras_does_not_matter(model):
    frame = make_frame(seed=5)
    order = [3, 0, 5, 1, 4, 2]
    shuffled = frame._replace(images=frame.images[:, order], rig=CameraRig(*(x[:, order] for x in frame.rig)))
    expected, _ = model(frame, model.initial_state(1))
    result, _ = model(shuffled, model.initial_state(1))
    expected = expected._replace(images=map_tensors(lambda tensor: tensor[:, order], expected.images))
    for a, b in zip((*result[:-1], *result.images), (*expected[:-1], *expected.images), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_any_number_of_cameras_and_a_missing_one_is_not_looked_at(model):
    for cameras in (1, 3, 8):
        prediction, _ = model(make_frame(cameras=cameras), model.initial_state(1))
        assert prediction.box_params.isfinite().all()
    frame = make_frame(seed=6)
    present = torch.ones(1, 6, dtype=torch.bool)
    present[0, 2] = False
    missing = frame._replace(rig=frame.rig._replace(present=present))
    images = missing.images.clone()
    images[:, 2] = 0
    expected, _ = model(missing, model.initial_state(1))
    result, _ = model(missing._replace(images=images), model.initial_state(1))
    torch.testing.assert_close(result.box_params, expected.box_params)
    # six cameras of which one is missing are the same as the five others
    five = [0, 1, 3, 4, 5]
    without = frame._replace(images=frame.images[:, five], rig=CameraRig(*(x[:, five] for x in frame.rig)))
    result, _ = model(without, model.initial_state(1))
    torch.testing.assert_close(result.box_params, expected.box_params, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_rotated_rig_gives_a_rotated_bev():
    """Turning the rig by 90 degrees on the car turns what the camera attention sees by 90 degrees."""
    torch.manual_seed(0)
    grid = BEVGrid((-16.0, 16.0), (-16.0, 16.0), (16, 16))
    attention = SpatialCrossAttention(grid, (0.0, 1.0), channels_in=9, channels=8, cameras=2, samples=3)
    images, distance = torch.randn(1, 4, 9, 6, 10), torch.rand(1, 4, 7, 6, 10)
    query = torch.zeros(1, 256, 8)  # the same query everywhere, so only geometry tells cells apart
    rig = make_rig(4, (48, 80))
    turned = make_rig(4, (48, 80), yaws=[math.pi / 2 * (n + 1) for n in range(4)])
    bev = attention(query, images, distance, attention.views(rig, (48, 80))).reshape(16, 16, 8)
    bev_turned = attention(query, images, distance, attention.views(turned, (48, 80))).reshape(16, 16, 8)
    assert bev.std(dim=(0, 1)).min() > 1e-3
    # turning from +x to +y is a quarter turn from the first to the second axis of [X, Y]
    torch.testing.assert_close(bev_turned, bev.rot90(1, (0, 1)), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_camera_that_does_not_see_a_cell_takes_no_weight():
    """The fields of view of four cameras of 80 degrees do not meet: a second camera per cell adds nothing."""
    torch.manual_seed(0)
    grid = BEVGrid((-16.0, 16.0), (-16.0, 16.0), (16, 16))
    attention = SpatialCrossAttention(grid, (0.0, 1.0), channels_in=9, channels=8, cameras=2, samples=3)
    arguments = torch.zeros(1, 256, 8), torch.randn(1, 4, 9, 6, 10), torch.rand(1, 4, 7, 6, 10)
    two = attention(*arguments, attention.views(make_rig(4, (48, 80)), (48, 80)))
    attention.cameras = 1
    torch.testing.assert_close(two, attention(*arguments, attention.views(make_rig(4, (48, 80)), (48, 80))))


@torch.no_grad()
def test_a_cell_is_lit_by_the_pixels_at_its_depth():
    """One camera whose every pixel shows something 8 m away: cells are lit by how well 8 m fits them."""
    torch.manual_seed(0)
    grid = BEVGrid((-16.0, 16.0), (-16.0, 16.0), (16, 16))
    attention = SpatialCrossAttention(grid, (1.0,), channels_in=3, channels=8, cameras=2, samples=1)
    bins = 32
    likely = torch.zeros(bins)
    place = depth_bin(torch.tensor(9.0), bins)  # 9 m lies between two bins
    low = int(place)
    likely[low], likely[low + 1] = low + 1 - place, place - low
    rig = make_rig(1, (48, 80))

    def lit(opened: float) -> torch.Tensor:
        distance = torch.cat([torch.tensor([opened, 0.5]), likely]).view(1, 1, -1, 1, 1).expand(-1, -1, -1, 6, 10)
        query = torch.zeros(1, 256, 8)
        images = [torch.full((1, 1, 3, 6, 10), value) for value in (1.0, 0.0)]
        attention.norm = torch.nn.Identity()
        bright, dark = (
            attention(query, image, distance, attention.views(rig, (48, 80))).reshape(16, 16, 8) for image in images
        )
        brightness = attention.value.weight[:, :, 0, 0].sum(1)  # [C]
        return (bright - dark)[..., 0] / (brightness @ attention.output.weight[0, :8])

    row = lit(0.0)[:, 8]  # along x, 1 m left of the axis; cells are 2 m long, the camera looks along x
    assert (row[:8] == 0).all()  # behind the camera
    assert row[12].item() == pytest.approx(((low + 1 - place) ** 2 + (place - low) ** 2).item(), abs=1e-4)
    assert row[8:].argmax().item() == 4 and (row[[8, 9, 14, 15]] < 1e-4).all()
    half, fully = lit(0.5)[:, 8], lit(1.0)[:, 8]
    seen = fully > 0.5
    torch.testing.assert_close(fully[seen], torch.ones_like(fully[seen]), atol=1e-4, rtol=0)
    torch.testing.assert_close(half, (row + fully) / 2, atol=1e-4, rtol=0)


def test_depth_is_read_between_pixels_and_between_bins():
    """Linear in column, row and logarithm of depth: a distribution that is so itself is read exactly."""
    D, h, w = 5, 4, 6
    bins, row, column = torch.meshgrid(torch.arange(D), torch.arange(h), torch.arange(w), indexing="ij")
    likely = torch.stack([100.0 * n + 7 * bins + row + 0.1 * column for n in range(3)])[None]  # [1, 3, D, h, w]
    uv = torch.tensor([[[[2.25 / w, 1.75 / h]], [[5.5 / w, 0.5 / h]]]])  # feature pixels (1.75, 1.25) and (5, 0)
    camera = torch.tensor([[[2], [0]]])
    depth = torch.tensor([[[80.0 ** (1.5 / 4)], [200.0]]])  # between bins 1 and 2; beyond the last
    read = sample_depth(likely, uv, camera, depth)[0, :, 0].tolist()
    assert read == pytest.approx([200 + 7 * 1.5 + 1.25 + 0.175, 7 * 4 + 0.5], abs=1e-2)


@torch.no_grad()
def test_a_cell_knows_how_much_farther_an_object_is():
    """Two numbers beside the features: how open the gate is, and how deep the pixel is against the cell."""
    grid = BEVGrid((-16.0, 16.0), (-16.0, 16.0), (16, 16))
    attention = SpatialCrossAttention(grid, (1.0,), channels_in=3, channels=8, cameras=1, samples=1)
    attention.norm = attention.output = torch.nn.Identity()
    mean = math.log(9) / math.log(80)
    distance = torch.tensor([0.25, mean, *[0.0] * 8]).view(1, 1, -1, 1, 1).expand(-1, -1, -1, 6, 10)
    attention.value = torch.nn.Conv2d(3, 8, 1)
    query = torch.zeros(1, 256, 10)
    attention.offset = torch.nn.Linear(10, 2)
    geometry = attention(query, torch.zeros(1, 1, 3, 6, 10), distance, attention.views(make_rig(1, (48, 80)), (48, 80)))
    geometry = geometry.reshape(16, 16, 10)[:, 8, 8:]  # along x, 1 m left of the axis; the camera looks along x
    assert (geometry[:8] == 0).all()
    assert geometry[12].tolist() == pytest.approx([0.25, 0.0], abs=1e-5)  # the cell at 9 m
    assert geometry[11, 1].item() == pytest.approx(10 * math.log(9 / 7) / math.log(80), abs=1e-5)
    assert geometry[15, 1].item() == -1.0  # limited: 15 m is more than half as far again


@torch.no_grad()
def test_a_box_is_read_at_its_centre_and_faces():
    """Images that hold their own column and row: what is read are the places where a box is seen."""
    config = CONFIG.image_size
    rig = make_rig(6, config)
    h, w = 24, 40
    row = ((torch.arange(h) + 0.5) / h).view(1, 1, 1, h, 1).expand(1, 6, 1, h, w)
    column = ((torch.arange(w) + 0.5) / w).view(1, 1, 1, 1, w).expand(1, 6, 1, h, w)
    reading = ImageSampling(2)
    reading.output = torch.nn.Identity()
    yaw = 0.5
    box = torch.tensor([[[9.0, 1.0, 1.2, math.log(4), math.log(2), math.log(1.6), math.sin(yaw), math.cos(yaw), 0, 0]]])
    read = reading(box, torch.cat([column, row], 2), rig, config).view(7, 4)
    front = [9 + 2 * math.cos(yaw), 1 + 2 * math.sin(yaw), 1.2]
    left = [9 - math.sin(yaw), 1 + math.cos(yaw), 1.2]
    top = [9, 1, 2.0]
    for k, point in ((1, front), (3, left), (5, top), (0, [9, 1, 1.2])):
        uv, depth, seen = see_points(rig, torch.tensor([point]), config)
        assert seen[0, :, 0].tolist() == [True, False, False, False, False, False]
        torch.testing.assert_close(read[k, :2], uv[0, 0, 0], atol=1e-4, rtol=0)
        assert read[k, 2].item() == pytest.approx(math.log(depth[0, 0, 0]) / math.log(80), abs=1e-5)
        assert read[k, 3] == 1
    assert (reading(box + torch.tensor([0, 0, 50.0] + [0] * 7), column, rig, config) == 0).all()  # in the sky


@torch.no_grad()
def test_memory_is_carried_and_reset(model):
    frame = make_frame(seed=7)
    _, state = model(make_frame(seed=8), model.initial_state(1))
    fresh, _ = model(frame, model.initial_state(1))
    reset, _ = model(frame, type(state)(torch.full_like(state.bev, float("nan"))))
    torch.testing.assert_close(reset.box_params, fresh.box_params)
    carried, _ = model(frame._replace(is_first=torch.zeros(1, dtype=torch.bool)), state)
    assert (carried.box_params - fresh.box_params).abs().max() > 1e-3


@torch.no_grad()
def test_memory_knows_how_long_ago():
    torch.manual_seed(0)
    memory = TemporalFusion(BEVGrid((-4.0, 4.0), (-4.0, 4.0), (8, 8)), 4)
    bev, old, eye = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.eye(4)[None]
    known = torch.zeros(1, dtype=torch.bool)
    slow, past = memory(bev, old, eye, torch.tensor([0.5]), known)
    fast, _ = memory(bev, old, eye, torch.tensor([0.1]), known)
    torch.testing.assert_close(past, old)  # the car stands still
    assert (slow - fast).abs().max() > 1e-4


def test_decode_by_hand():
    def inverse_sigmoid(p):
        return math.log(p / (1 - p))

    box_logits = torch.full((1, 1, 2, 10), -9.0)
    box_logits[0, 0, 1, 3] = inverse_sigmoid(0.8)
    box_logits[0, 0, 0, 7] = inverse_sigmoid(0.6)
    params = torch.zeros(1, 1, 2, 10)
    params[0, 0, 1] = torch.tensor([1, 2, 3, math.log(11), math.log(3), math.log(4), 1, 0, 5, 6])
    params[0, 0, 0, 7] = 1.0
    line_logits = torch.full((1, 1, 1, 3), -9.0)
    line_logits[..., 2] = inverse_sigmoid(0.7)
    points = torch.tensor([[0.0, 0], [10, 0], [10, 5], [0, 0.5]]).reshape(1, 1, 1, 4, 2)
    dense = torch.zeros(1, 1, 2, 2)
    box_uncertainty, line_uncertainty = torch.zeros(1, 1, 2, 9), torch.full((1, 1, 1, 4, 2), math.log(0.3))
    box_uncertainty[0, 0, 1, 6] = math.log(0.2)
    scene = decode(
        Prediction(box_logits, params, box_uncertainty, line_logits, points, line_uncertainty, dense, dense, NO_IMAGES)
    )
    assert scene.boxes.label[0].tolist() == [3, 7]
    assert scene.boxes.score[0].tolist() == pytest.approx([0.8, 0.6])
    assert scene.boxes.center[0, 0].tolist() == [1, 2, 3]
    assert scene.boxes.size[0, 0].tolist() == pytest.approx([11, 3, 4])
    assert scene.boxes.yaw[0].tolist() == pytest.approx([math.pi / 2, 0])
    assert scene.boxes.velocity[0, 0].tolist() == [5, 6]
    assert scene.boxes.uncertainty[0, :, 6].tolist() == pytest.approx([0.2, 1.0])
    assert scene.lines.uncertainty.unique().tolist() == pytest.approx([0.3])
    assert scene.lines.label[0].tolist() == [2]
    assert scene.lines.closed[0].tolist() == [True]  # the ends are 0.5 m apart
    assert scene.lines.points[0, 0].tolist() == [[0, 0], [10, 0], [10, 5], [0, 0]]


def test_sizes_and_uncertainties_are_limited():
    params, nothing = torch.zeros(1, 1, 3, 10), torch.zeros(1, 1, 2, 2)
    params[0, 0, :, 3:6] = torch.tensor([-30.0, 1.0, 30.0])[:, None]
    params[0, 0, :, 0] = torch.tensor([0.0, 30.0, 60.0])
    logits = torch.full((1, 1, 3, 10), -9.0)
    logits[0, 0, :, 0] = torch.tensor([3.0, 2.0, 1.0])
    extreme = torch.tensor([-30.0, 1.0, 30.0])
    uncertainty = extreme.view(1, 1, 3, 1).expand(-1, -1, -1, 9)
    lines = torch.zeros(1, 1, 1, 3), torch.rand(1, 1, 1, 3, 2), extreme.view(1, 1, 1, 3, 1).expand(-1, -1, -1, -1, 2)
    boxes, found, *_ = decode(Prediction(logits, params, uncertainty, *lines, nothing, nothing, NO_IMAGES))
    assert boxes.size[0, :, 1].tolist() == pytest.approx([math.exp(x) for x in (-3, 1, 4)])
    assert boxes.uncertainty[0, :, 8].tolist() == pytest.approx([math.exp(x) for x in (-5, 1, 4)])
    assert found.uncertainty[0, 0, :2, 0].tolist() == pytest.approx([math.exp(x) for x in (-5, 1)])


def test_no_boxes_and_no_lines_have_the_shapes_of_some():
    nothing = FrameObjects(empty_boxes(4, "cpu"), empty_lines(4, "cpu", 7))
    shapes = {name: tuple(tensor.shape) for name, tensor in nothing.boxes._asdict().items()}
    assert shapes.pop("center") == shapes.pop("size") == (4, 0, 3) and shapes.pop("velocity") == (4, 0, 2)
    assert shapes.pop("uncertainty") == (4, 0, 9) and set(shapes.values()) == {(4, 0)}
    assert nothing.lines.points.shape == nothing.lines.uncertainty.shape == (4, 0, 7, 2)
    assert {tuple(part.shape) for part in nothing.lines[1:5]} == {(4, 0)}
    assert empty_lines(1, "cpu").points.shape == (1, 0, 20, 2)
    assert nothing.boxes.valid.dtype == nothing.lines.valid.dtype == nothing.lines.closed.dtype == torch.bool
    assert nothing.boxes.label.dtype == nothing.boxes.attribute.dtype == nothing.lines.label.dtype == torch.int64


def test_a_closed_line_repeats_its_first_point():
    points = torch.tensor([[[0.0, 0.0], [5.0, 0.0], [0.0, gap]] for gap in (0.0, 0.99, 1.01)])
    uncertainty = torch.arange(18.0).view(3, 3, 2)
    closed_points, closed_uncertainty, closed = close_rings(points, uncertainty)
    assert closed.tolist() == [True, True, False]
    assert torch.equal(closed_points[:2, -1], points[:2, 0]) and torch.equal(closed_points[2], points[2])
    assert torch.equal(closed_uncertainty[:2, -1], uncertainty[:2, 0])
    assert torch.equal(closed_points[:, :-1], points[:, :-1])


def test_of_two_boxes_in_one_place_the_better_is_kept():
    """Cars of 1.95 m width in a row: 0.9, then 1.5 m on 0.8, then 1.5 m on 0.7, and a bus in the place of the 0.8."""
    logits = torch.full((1, 1, 5, 10), -9.0)
    params = torch.zeros(1, 1, 5, 10)
    for q, (label, score, x) in enumerate([(0, 0.7, 3.0), (0, 0.9, 0.0), (3, 0.5, 1.5), (0, 0.8, 1.5), (0, 0.6, 5.0)]):
        logits[0, 0, q, label] = math.log(score / (1 - score))
        params[0, 0, q, 0] = x
    nothing = torch.zeros(1, 1, 1, 2, 2)
    lines = torch.zeros(1, 1, 1, 3), nothing, nothing
    boxes = decode(Prediction(logits, params, torch.zeros(1, 1, 5, 9), *lines, nothing, nothing, NO_IMAGES)).boxes
    assert boxes.score[0].tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5])
    # 0.8 is 1.5 m from 0.9 and falls; 0.7 is 1.5 m from 0.8, which is gone, and 3 m from 0.9; 0.6 is 2 m from 0.7.
    assert boxes.valid[0].tolist() == [True, False, True, True, True]


def test_circle_nms_equals_the_sequential_rule():
    """Box after box, best score first: it is kept if no kept box of its class is closer than the class radius."""
    assert circle_nms(torch.tensor([[[0.0, 0.0], [1.0, 0.0]]]), torch.zeros(1, 2)).tolist() == [[True, False]]
    generator = torch.Generator().manual_seed(0)
    center, label = torch.rand(20, 40, 2, generator=generator) * 12, torch.randint(3, (20, 40), generator=generator)
    for points, labels, kept in zip(center, label, circle_nms(center, label), strict=True):
        better: list[int] = []
        for m in range(len(points)):
            radius = max(min(USUAL_SIZES[labels[m]][:2]), MIN_NMS_RADIUS)
            if all(labels[b] != labels[m] or (points[b] - points[m]).norm() >= radius for b in better):
                better.append(m)
        assert kept.nonzero()[:, 0].tolist() == better and len(better) < len(points)


def test_checkpoint_round_trip_and_refusals(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model, {"nds": 0.5})
    loaded, metrics = load_model(path), read_metrics(path)
    assert metrics == {"nds": 0.5} and loaded.config == CONFIG
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
    assert list(tmp_path.iterdir()) == [path]
    full = path.stat().st_size
    save_checkpoint(path, model, {"nds": 0.5}, half=True)
    assert path.stat().st_size < 0.65 * full  # beside the weights there is a header
    for name, tensor in load_model(path).state_dict().items():
        rounding = 0 if tensor.ndim < 2 else 2**-11
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=rounding, atol=1e-7)

    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_model(tmp_path / "absent.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_model(path)


def test_config_refuses_what_does_not_exist():
    with pytest.raises(ConfigError, match="preset"):
        BEVTransformerConfig.preset("huge")
    with pytest.raises(ConfigError, match=r"model\.chanels"):
        BEVTransformerConfig.preset("nano", chanels=3)
    with pytest.raises(ConfigError, match="backbone"):
        FPNEncoder("vgg", 3, 8, 16)
    with pytest.raises(ConfigError, match="feature_stride"):
        FPNEncoder("resnet18", 2, 16, 16)


@pytest.mark.parametrize("preset", ["nano", "tiny", "base"])
def test_presets_build(preset):
    config = BEVTransformerConfig.preset(preset)
    with torch.device("meta"):
        encoder = FPNEncoder(config.backbone, config.backbone_stages, config.feature_stride, config.channels)
        images = torch.empty(6, 3, *config.image_size)
        assert encoder(images).shape[-1] == config.image_size[1] // config.feature_stride
    assert sum(p.numel() for p in BEVTransformer(BEVTransformerConfig.nano()).parameters()) * 2 < 20e6  # half floats
