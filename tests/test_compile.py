"""torch.compile makes one graph of every network, which fits all frames of a sequence, also in channels_last."""

import copy
import math

import pytest
import torch

from perception.cameras import usual_mounting
from perception.models.bevformer.config import BEVFormerConfig
from perception.models.bevformer.model import BEVFormer
from perception.models.mapqr.config import MapQRConfig
from perception.models.mapqr.model import MapQR
from perception.models.maptr.config import MapTRConfig
from perception.models.maptr.model import MapTR
from perception.models.maptrv2.config import MapTRv2Config
from perception.models.maptrv2.model import MapTRv2
from perception.models.published.backbone import PublishedBackboneConfig
from perception.types import CameraRig, Frame

SIZE = (64, 96)
SHARED = {
    "image_size": SIZE, "backbone": PublishedBackboneConfig(width=4, channels=32), "bev": (10, 8), "channels": 32,
    "feed_forward": 32, "heads": 4, "decoder_layers": 1, "encoder_layers": 1, "rotate_center": (4, 5),
}  # fmt: skip
LINES = {"lines": 5, "line_points": 4}


@pytest.fixture
def network(request, small_network):
    if request.param == "flagship":
        return small_network
    torch.manual_seed(0)
    made = {
        "bevformer": lambda: BEVFormer(BEVFormerConfig(**SHARED, queries=20, max_boxes=10)),
        "maptr": lambda: MapTR(MapTRConfig(**SHARED, **LINES)),
        "maptr_gkt": lambda: MapTR(MapTRConfig(**SHARED, **LINES, gkt_kernel=(3, 5))),
        "maptrv2": lambda: MapTRv2(MapTRv2Config(**SHARED, **LINES, aspp_channels=8)),
        "mapqr": lambda: MapQR(MapQRConfig(**SHARED, **LINES, pillar_points=4)),
    }[request.param]()
    with torch.no_grad():  # outputs of fresh networks hardly depend on images and calibration
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return made.eval()


def replay_frames(size: tuple[int, int], frames: int) -> list[Frame]:
    """Makes frames of six surround cameras whose calibration changes: rotated and zoomed a little more each time."""
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
        rig = CameraRig(matrix[None], pose[None], torch.ones(1, 6, dtype=torch.bool))
        motion = torch.eye(4)[None].clone()
        motion[:, 0, 3] = -float(t)
        made.append(
            Frame(images[t], rig, motion, torch.tensor([0.5 * t]), torch.tensor([t == 0]), *usual_mounting(1, 6))
        )
    return made


def tensors(noun) -> list[torch.Tensor]:
    return [tensor for part in noun for tensor in tensors(part)] if isinstance(noun, tuple) else [noun]


@torch.inference_mode()
def outputs(network, call) -> list[list[torch.Tensor]]:
    """Returns all tensors that a network returns, frame by frame."""
    state, found = network.initial_state(1), []
    for frame in replay_frames(network.config.image_size, 3):
        prediction, state = call(frame, state)
        found.append(tensors((prediction, state)))
    return found


@pytest.mark.parametrize(
    ("network", "layout"),
    [
        ("flagship", "channels_last"), ("bevformer", "channels_last"), ("maptr", "channels_last"),
        ("maptr_gkt", "channels_last"), ("maptrv2", "channels_last"), ("mapqr", "channels_last"),
        *(pytest.param(name, "contiguous_format", marks=pytest.mark.slow) for name in ("flagship", "bevformer")),
    ],
    indirect=["network"],
)  # fmt: skip
def test_one_graph_for_a_sequence(network, layout):
    expected = outputs(network, network)
    change = max(float((x - y).abs().max()) for x, y in zip(expected[0], expected[2], strict=True) if x.numel())
    assert change > 0.01  # a hundred times the tolerance below
    network = copy.deepcopy(network).to(memory_format=getattr(torch, layout))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        # A graph break is an error too. The graph is not compiled further, which would take minutes.
        found = outputs(network, torch.compile(network, backend="eager", fullgraph=True))
    for ours, theirs in zip(found, expected, strict=True):
        for our, their in zip(ours, theirs, strict=True):
            torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4)
