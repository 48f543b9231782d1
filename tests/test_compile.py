"""torch.compile makes one graph of every network, which fits all frames, also in channels_last and bfloat16."""

import math
from dataclasses import fields, is_dataclass, replace

import pytest
import torch

from perception.cameras import see_points, usual_mounting
from perception.grid import BEVGrid
from perception.models import NETWORKS, build_network, preset_config
from perception.models.maptrv2.encoder import lifted_points
from perception.models.published.geometry import lidar_projections, mounted_rig, project_pillars
from perception.types import CameraRig, Frame

# Values of the fields of any config, with which a network is small but has all its parts.
SMALL = {
    "image_size": (64, 96), "width": 4, "channels": 32, "feed_forward": 32, "heads": 4, "bev": (10, 8), "grid": (9, 8),
    "rotate_center": (4, 5), "encoder_layers": 1, "decoder_layers": 1, "queries": 20, "max_boxes": 10, "lines": 5,
    "max_lines": 5, "line_points": 4, "box_queries": 20, "line_queries": 8, "depth_bins": 8, "aspp_channels": 8,
    "backbone_stages": 2, "feature_stride": 8, "depth": 18,
    "anchors": 20, "remembered": 10, "layers": 2, "points": 4, "groups": 4, "encoder": (16, 4, 4, 8),
    "encoder_loops": 1, "pillar_points": 4,
}  # fmt: skip
PRESETS = tuple(name for kind, _ in NETWORKS.values() for name in kind.presets())
# One of each way from images to boxes and lines; the others are slow tests.
FAST = (
    "nano", "bevformer_tiny", "maptrv2_nusc_r50_24ep", "sparse4dv3_temporal_r50_1x8_bs6_256x704",
)  # fmt: skip


def small(config):
    """Replaces all fields of a config, and of the configs in it, that `SMALL` names."""
    named = {field.name: getattr(config, field.name) for field in fields(config)}
    inner = {name: small(value) for name, value in named.items() if is_dataclass(value)}
    # Zero means that there is none of it.
    return replace(config, **{name: value for name, value in SMALL.items() if named.get(name)} | inner)


def small_preset(name):
    """Builds a network whose outputs depend on images and calibration, which those of fresh networks hardly do."""
    torch.manual_seed(0)
    network = build_network(small(preset_config(name)))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return network.eval()


def replay_frames(size: tuple[int, int], frames: int) -> list[Frame]:
    """Makes frames of six surround cameras, rotated and zoomed a little more each time, and another one is missing."""
    height, width = size
    images = torch.rand(frames, 1, 6, 3, height, width, generator=torch.Generator().manual_seed(1)) * 255
    made = []
    for t in range(frames):
        angle = torch.arange(6) * (math.pi / 3) + 0.05 * t
        zero, one = torch.zeros(6), torch.ones(6)
        forward = torch.stack([angle.cos(), angle.sin(), zero], -1)
        right = torch.stack([angle.sin(), -angle.cos(), zero], -1)
        down = torch.stack([zero, zero, -one], -1)
        pose = torch.eye(4).repeat(6, 1, 1)
        pose[:, :3, :3] = torch.stack([right, down, forward], -1)
        pose[:, :3, 3] = forward + torch.tensor([0.0, 0.0, 1.5])
        focal = width * (0.6 + 0.01 * t)
        matrix = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]).expand(6, 3, 3)
        rig = CameraRig(matrix[None], pose[None], torch.arange(6)[None] != 2 * t)
        motion = torch.eye(4)[None].clone()
        motion[:, 0, 3] = -float(t)
        made.append(
            Frame(images[t], rig, motion, torch.tensor([0.5 * t]), torch.tensor([t == 0]), *usual_mounting(1, 6))
        )
    return made


def tensors(noun) -> list[torch.Tensor]:
    if isinstance(noun, tuple):
        return [tensor for part in noun for tensor in tensors(part)]
    return [] if noun is None else [noun.float()]


@torch.inference_mode()
def outputs(network, call, precision) -> list[list[torch.Tensor]]:
    """Returns all tensors that a network returns, frame by frame."""
    state, found = network.initial_state(1), []
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        for frame in replay_frames(network.config.image_size, 3):
            prediction, state = call(frame, state)
            found.append(tensors((prediction, state)))
    return found


def cases():
    """Yields the arguments of the test."""
    for name in PRESETS:
        for precision, layout in (("bf16", "channels_last"), ("fp32", "contiguous_format")):
            fast = name in FAST and precision == "bf16"
            yield pytest.param(name, precision, layout, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(("name", "precision", "layout"), list(cases()))
def test_one_graph_for_a_sequence(name, precision, layout):
    network = small_preset(name).to(memory_format=getattr(torch, layout))
    expected = outputs(network, network, precision)
    change = max(float((x - y).abs().max()) for x, y in zip(expected[0], expected[2], strict=True) if x.numel())
    tolerance = 1e-4 if precision == "fp32" else 0.03
    assert change > 2 * tolerance
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        # A graph break is an error too. The graph is not compiled further, which would take minutes.
        found = outputs(network, torch.compile(network, backend="eager", fullgraph=True), precision)
    for ours, theirs in zip(found, expected, strict=True):
        for our, their in zip(ours, theirs, strict=True):
            torch.testing.assert_close(our, their, rtol=tolerance, atol=tolerance)


def test_autocast_does_not_change_geometry():
    """Products of matrices in bfloat16 would move image points by pixels and lifted pixels by metres."""
    size = SMALL["image_size"]
    frame = replay_frames(size, 2)[1]
    frame.rig.ego_from_cam[..., :3, 3] *= 1.01
    frame.ego_from_prev[:, 0, 3] *= 1.01
    frame = frame._replace(ego_from_exposure=frame.ego_from_prev[:, None].expand(-1, 6, -1, -1))
    bevformer, maptr = (small(preset_config(name)) for name in ("bevformer_tiny", "maptrv2_nusc_r50_24ep"))

    def geometry():
        projections, rig = lidar_projections(frame), mounted_rig(frame)
        pillars = project_pillars(bevformer, projections, size)
        lifted = lifted_points(maptr, rig, frame.ego_from_lidar, size, (2, 3))
        grid = BEVGrid((-5.0, 5.0), (-5.0, 5.0), (10, 10))
        warped = grid.warp(torch.rand(1, 1, 10, 10, generator=torch.Generator().manual_seed(0)), frame.ego_from_prev)
        seen = see_points(frame.rig, lifted[0].flatten(0, -2), size)
        return projections, *pillars, *rig, lifted, warped, *seen

    with torch.autocast("cpu", torch.bfloat16):
        found = geometry()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, geometry(), strict=True))
