"""Memory: a stream is what is unrolled, a long one costs no more than a short one, and it lies where the world is."""

import math

import pytest
import torch

from perception.benchmark.latency import resident_bytes
from perception.cameras import usual_mounting
from perception.geometry import box_corners, invert_rigid, project_points, transform_points
from perception.models.bev_transformer.config import BEVTransformerConfig
from perception.models.bev_transformer.decoder import decode
from perception.models.bev_transformer.losses import frame_losses
from perception.models.bev_transformer.model import BEVTransformer
from perception.types import Boxes, CameraRig, Frame, FrameObjects, LaneRange, Polylines, map_tensors

STEP = 0.5  # seconds
CONFIG = BEVTransformerConfig.preset(
    "nano", image_size=(32, 96), channels=16, backbone_stages=2, depth_bins=12, heads=2, decoder_layers=1,
    x_range=(0.0, 20.0), y_range=(-10.0, 10.0), grid=(20, 20), lane_range=LaneRange(20.0, 10.0),
    box_queries=4, line_queries=2, line_points=4,
)  # fmt: skip
AHEAD = torch.tensor([[[[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 1.0], [0, 0, 0, 1]]]])  # one camera, 1 m above ground
FOCAL = torch.tensor([[[[60.0, 0, 48], [0, 60, 16], [0, 0, 1]]]])


def show(place: torch.Tensor, is_first: bool) -> Frame:
    """White cubes of 2 m at `place` [B, 2] before a grey wall; the car stands still."""
    B = len(place)
    H, W = CONFIG.image_size
    center = torch.cat([place, torch.full((B, 1), 1.0)], 1)
    corners = box_corners(center, torch.full((B, 3), 2.0), torch.zeros(B))  # [B, 8, 3]
    uv, _ = project_points(FOCAL[0, 0], transform_points(invert_rigid(AHEAD[0, 0]), corners))  # [B, 8, 2]
    low, high = uv.amin(1)[:, None, None], uv.amax(1)[:, None, None]  # [B, 1, 1, 2]
    v, u = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    pixel = torch.stack([u, v], -1)
    inside = ((pixel > low) & (pixel < high)).all(-1)  # [B, H, W]
    images = torch.where(inside, 255, 90).to(torch.uint8)[:, None, None].expand(-1, 1, 3, -1, -1)
    rig = CameraRig(FOCAL.expand(B, -1, -1, -1), AHEAD.expand(B, -1, -1, -1), torch.ones(B, 1, dtype=torch.bool))
    seconds = torch.full((B,), 0.0 if is_first else STEP)
    return Frame(images, rig, torch.eye(4).expand(B, 4, 4), seconds, torch.full((B,), is_first), *usual_mounting(B, 1))


def draw(generator: torch.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Places now and velocities; the cubes move sideways by up to 3 m/s."""
    place = torch.rand(count, 2, generator=generator) * torch.tensor([6.0, 4.0]) + torch.tensor([8.0, -2.0])
    speed = 6 * torch.rand(count, generator=generator) - 3
    return place, torch.stack([torch.zeros(count), speed], 1)


def test_a_stream_is_what_is_unrolled_and_holds_no_graph():
    """One frame at a time without gradients gives what a clip that was unrolled for training gives."""
    torch.manual_seed(0)
    model = BEVTransformer(CONFIG).eval()
    generator = torch.Generator().manual_seed(2)
    place, velocity = draw(generator, 2)
    frames = [show(place + velocity * STEP * t, t == 0) for t in range(5)]
    state, unrolled = model.initial_state(2), []
    for frame in frames:
        prediction, state = model(frame, state)
        unrolled.append(prediction)
    assert state.bev.grad_fn is not None
    state = model.initial_state(2)
    for frame, expected in zip(frames, unrolled, strict=True):
        with torch.inference_mode():
            prediction, state = model(frame, state)
        assert state.bev.grad_fn is None
        for a, b in zip((*prediction[:-1], *prediction.images), (*expected[:-1], *expected.images), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_velocity_is_learned_from_memory_and_only_from_memory():
    """A cube that moves sideways: with memory its speed shows, without it every speed looks the same."""
    torch.manual_seed(0)
    model = BEVTransformer(CONFIG).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(3)
    steps, B = 500, 8
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        place, velocity = draw(generator, B)
        state, total = model.initial_state(B), 0.0
        for t in range(3):
            now = place + velocity * STEP * (t - 2)
            frame = show(now, t == 0)
            prediction, state = model(frame, state)
            total = total + sum(frame_losses(prediction, moving(now, velocity), frame, model.grid).values())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    model.eval()
    place, velocity = draw(torch.Generator().manual_seed(4), 64)

    @torch.inference_mode()
    def error(memory: bool) -> float:
        state = model.initial_state(len(place))
        for t in range(3):
            prediction, state = model(show(place + velocity * STEP * (t - 2), t == 0 or not memory), state)
        boxes = decode(prediction).boxes
        return (boxes.velocity[:, 0, 1] - velocity[:, 1]).abs().mean().item()  # of the surest box, m/s

    assert error(memory=False) > 1.2  # guessing 0 is off by 1.5 on average
    assert error(memory=True) < 0.5


def moving(place: torch.Tensor, velocity: torch.Tensor) -> FrameObjects:
    """The ground truth of `show`: one cube, taken for a car, and no lines."""
    B = len(place)
    one, yes = torch.ones(B, 1), torch.ones(B, 1, dtype=torch.bool)
    zero = torch.zeros(B, 1, dtype=torch.int64)
    center = torch.cat([place, torch.ones(B, 1)], 1)[:, None]
    boxes = Boxes(
        center, 2 * torch.ones(B, 1, 3), 0 * one, velocity[:, None], zero, zero, one, yes, torch.zeros(B, 1, 9)
    )
    P = CONFIG.line_points
    lines = Polylines(torch.zeros(B, 1, P, 2), ~yes, zero, 0 * one, ~yes, torch.zeros(B, 1, P, 2))
    return FrameObjects(boxes, lines)


@pytest.mark.slow
@torch.inference_mode()
def test_a_thousand_frames_take_no_more_memory():
    model = BEVTransformer(CONFIG).eval()
    frame = show(torch.tensor([[10.0, 0.0]]), False)
    state = model.initial_state(1)
    resident = []  # MiB
    for _ in range(1001):
        prediction, state = model(frame, state)
        resident.append(resident_bytes() / 2**20)
    assert prediction.box_params.isfinite().all() and state.bev.abs().max() < 1e4
    # Not the process's highest so far, under which a leak could hide once another test has needed more.
    assert max(resident[101:]) - max(resident[:101]) < 20


@torch.no_grad()
def test_memory_is_where_the_world_is():
    """A blob in the memory, seen after the car has driven 3 m and turned by 30 degrees, lies where a point would."""
    model = BEVTransformer(CONFIG).eval()
    grid = model.grid
    cells = grid.cell_centers()  # [X, Y, 2]
    blob = torch.exp(-((cells - torch.tensor([12.0, 1.0])) ** 2).sum(-1) / 4)
    turn = math.radians(30)
    cos, sin = math.cos(turn), math.sin(turn)
    # The car drove 3 m along its old x and turned left: p_now = R(-30 deg) (p_prev - (3, 0)).
    ego_from_prev = torch.tensor([[[cos, sin, 0, -3 * cos], [-sin, cos, 0, 3 * sin], [0, 0, 1, 0], [0, 0, 0, 1]]])
    warped = grid.warp(blob[None, None], ego_from_prev)[0, 0]
    weight = warped / warped.sum()
    center = (weight[..., None] * cells).sum((0, 1))
    expected = torch.tensor([cos * (12 - 3) + sin * 1, -sin * (12 - 3) + cos * 1])
    torch.testing.assert_close(center, expected, atol=0.1, rtol=0)
    assert map_tensors(torch.Tensor.numel, model.initial_state(1)).bev == 16 * 400
