"""What depends on the calibration alone is computed once per calibration, and never used for another one."""

import numpy as np
import pytest
import torch
from toy_network import ToyConfig, ToyNetwork

from perception.cameras import usual_mounting
from perception.inference.fixed_rig import FixedRig
from perception.inference.predictor import Predictor
from perception.models.backbone import FPNEncoder
from perception.types import CameraRig, Frame


@pytest.fixture
def counted(small_network, monkeypatch):
    """A network that writes down the image sizes for which it computes its geometry."""
    sizes, compute = [], small_network.rig_geometry

    def rig_geometry(rig, image_size):
        sizes.append(image_size)
        return compute(rig, image_size)

    monkeypatch.setattr(small_network, "rig_geometry", rig_geometry)
    return small_network, sizes


def two_cameras() -> CameraRig:
    """Returns one camera that looks ahead and one that looks back, of focal length 48 pixels."""
    pose = torch.tensor([[0.0, 0, 1, 1], [-1, 0, 0, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]])
    turn = torch.diag(torch.tensor([-1.0, -1, 1, 1]))
    matrix = torch.tensor([[48.0, 0, 40], [0, 48, 20], [0, 0, 1]])
    return CameraRig(matrix.expand(1, 2, 3, 3), torch.stack([pose, turn @ pose])[None], torch.ones(1, 2).bool())


def frame_of(images: torch.Tensor, rig: CameraRig, is_first: bool) -> Frame:
    motion = torch.eye(4)[None], torch.full((1,), 0.5), torch.tensor([is_first])
    return Frame(images, rig, *motion, *usual_mounting(1, images.shape[1]))


def last_bit(tensor: torch.Tensor) -> torch.Tensor:
    """Changes the last bit of the last number that is not zero or one."""
    changed = tensor.clone()
    flat = changed.view(-1)
    at = int(((flat != 0) & (flat != 1)).nonzero()[-1])
    flat[at] = torch.nextafter(flat[at], torch.tensor(torch.inf))
    return changed


def tensors(noun) -> list[torch.Tensor]:
    return [tensor for part in noun for tensor in tensors(part)] if isinstance(noun, tuple) else [noun]


def test_a_drive_whose_calibration_changes_gives_the_same_bits(counted):
    network, sizes = counted
    rig = two_cameras()
    copied = CameraRig(*(x.clone() for x in rig))  # the same numbers in other memory
    zoomed = rig._replace(img_from_cam=last_bit(rig.img_from_cam))
    moved = zoomed._replace(ego_from_cam=last_bit(rig.ego_from_cam))
    blind = moved._replace(present=torch.tensor([[True, False]]))
    one = CameraRig(*(x[:, :1] for x in blind))
    drive = [  # rig, image size, whether something has changed since the frame before
        (rig, (40, 80), True), (copied, (40, 80), False), (zoomed, (40, 80), True), (moved, (40, 80), True),
        (blind, (40, 80), True), (blind, (40, 88), True), (one, (40, 88), True), (rig, (40, 88), True),
        (rig, (40, 88), False),
    ]  # fmt: skip
    fixed_rig = FixedRig(network)
    state = plain = network.initial_state(1)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for t, (rig, size, is_new) in enumerate(drive):
            images = torch.rand(1, len(rig.present[0]), 3, *size, generator=generator) * 255
            frame = frame_of(images, rig, t == 0)
            before = len(sizes)
            prediction, state = network(frame, state, *fixed_rig(frame))
            assert len(sizes) == before + is_new, t
            expected, plain = network(frame, plain)
            for ours, theirs in zip(tensors((prediction, state)), tensors((expected, plain)), strict=True):
                assert torch.equal(ours, theirs), t


def test_a_network_without_such_geometry_gets_none():
    network = ToyNetwork(ToyConfig()).eval()
    images = torch.rand(1, 2, 3, *network.config.image_size)
    frame = frame_of(images, two_cameras(), True)
    assert FixedRig(network)(frame) == ()


def test_a_predictor_computes_it_once_and_for_carried_cameras_every_time(counted, live_frames):
    network, sizes = counted
    predictor, rig = Predictor(network), live_frames[0][1]
    sizes.clear()
    for images, _, pose, time in live_frames:
        predictor.step(images, rig, pose, time)
    assert len(sizes) == 1
    predictor.reset()
    for images, _, pose, time in live_frames:
        predictor.step(images, rig, pose, time, camera_times_s=time - np.linspace(0.01, 0.04, len(images)))
    assert len(sizes) == 3  # the first frame has no motion, so its cameras are where they were


@pytest.mark.parametrize("backbone", ["resnet18", "convnext_tiny"])
def test_sizes_of_feature_maps(backbone):
    encoder = FPNEncoder(backbone, 3, 16, 8).eval()
    for size in ((64, 96), (70, 81)):
        assert encoder(torch.zeros(1, 3, *size)).shape[-2:] == encoder.feature_size(size)
