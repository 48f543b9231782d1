"""BEVFormer: parity with outputs of the published code, frames and memory, and import of published checkpoints."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from perception.cameras import usual_mounting
from perception.errors import CheckpointError
from perception.geometry import invert_rigid, rigid_from_yaw
from perception.models import NETWORKS, build_network, preset_config
from perception.models.bevformer.config import BEVFormerConfig
from perception.models.bevformer.model import BEVFormer, BEVFormerHead, decode_boxes, topk_boxes
from perception.models.checkpoint import import_published, library_key, load_model, read_metrics, save_checkpoint
from perception.models.published.backbone import PublishedBackboneConfig, PublishedImageEncoder
from perception.models.published.geometry import (
    PREFIXES,
    bev_shift,
    can_bus_vector,
    cell_centers,
    project_pillars,
    rotate_bev,
)
from perception.types import NUSCENES_EGO_FROM_LIDAR, CameraRig, Frame, map_tensors

SMALL = BEVFormerConfig(
    image_size=(60, 90), backbone=PublishedBackboneConfig(width=4, channels=32), bev=(20, 20), channels=32,
    feed_forward=48, heads=4, encoder_layers=2, decoder_layers=2, queries=12, cameras=2, rotate_center=(10, 10),
    max_boxes=20,
)  # fmt: skip
PUBLISHED = sorted(name for kind, network in NETWORKS.values() if network.published_prefixes for name in kind.presets())


@pytest.fixture(scope="module")
def data(golden):
    folder = golden / "bevformer"
    published = json.loads((folder / "config.json").read_text())
    config = BEVFormerConfig(
        image_size=tuple(published["img"]),
        backbone=PublishedBackboneConfig(levels=published["num_levels"], channels=published["embed"]),
        bev=(published["bev_h"], published["bev_w"]),
        point_cloud_range=tuple(published["pc_range"]),
        channels=published["embed"],
        feed_forward=published["ffn_channels"],
        heads=published["num_heads"],
        encoder_layers=published["encoder_layers"],
        decoder_layers=published["decoder_layers"],
        queries=published["num_query"],
        level_embeddings=published["num_feature_levels"],
        pillar_points=published["num_points_in_pillar"],
        camera_points=published["sca_points"],
        points=published["tsa_points"],
        cameras=published["num_cams"],
        rotate_center=tuple(published["rotate_center"]),
        max_boxes=published["max_num"],
        post_center_range=tuple(published["post_center_range"]),
    )
    head = BEVFormerHead(config).eval()
    params = load_file(folder / "params.safetensors")
    head.load_state_dict({name.removeprefix("pts_bbox_head."): tensor for name, tensor in params.items()})
    return head, load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors"), published


@torch.no_grad()
def test_two_frames_with_history(data):
    head, inputs, expected, published = data
    previous = None
    for frame in ("frame1", "frame2"):
        features = [inputs[f"{frame}.feat{level}"] for level in range(published["num_levels"])]
        bus = inputs[f"{frame}.can_bus"].view(1, 18)
        matrix = inputs[f"{frame}.lidar2img"]
        _, visible = project_pillars(head.config, matrix, tuple(published["img"]))
        mask = expected[f"{frame}.bev_mask"].bool()  # [N, B, h * w, Z]
        assert torch.equal(visible, mask.any(-1).transpose(0, 1))
        logits, params, bev = head(features, matrix, bus, tuple(published["img"]), previous)
        close = {"atol": 1e-4, "rtol": 0}
        torch.testing.assert_close(bev, expected[f"{frame}.bev_embed"].transpose(0, 1), **close)
        torch.testing.assert_close(logits, expected[f"{frame}.all_cls_scores"], **close)
        torch.testing.assert_close(params, expected[f"{frame}.all_bbox_preds"], atol=1e-3, rtol=0)
        config = head.config
        scores, labels, boxes, keep = topk_boxes(logits[-1], params[-1], config.max_boxes, config.post_center_range)
        torch.testing.assert_close(scores[keep], expected[f"{frame}.det_scores"], **close)
        assert torch.equal(labels[keep], expected[f"{frame}.det_labels"])
        torch.testing.assert_close(boxes[keep], expected[f"{frame}.det_boxes"], atol=1e-3, rtol=0)
        previous = bev
    turned = rotate_bev(expected["frame1.bev_embed"].transpose(0, 1), head.config, bus[:, -1])[0]
    torch.testing.assert_close(turned, expected["frame2.prev_bev_rotated"][:, 0])


def frame(seed: int, ego_from_prev: np.ndarray, is_first: bool) -> Frame:
    """A frame with one camera ahead and one behind, and random images."""
    images = torch.randint(0, 256, (1, 2, 3, 60, 90), generator=torch.Generator().manual_seed(seed))
    ahead = [[0.0, 0, 1, 1.5], [-1, 0, 0, 0], [0, -1, 0, 1.6], [0, 0, 0, 1]]
    behind = [[0.0, 0, -1, 0], [1, 0, 0, 0], [0, -1, 0, 1.6], [0, 0, 0, 1]]
    focal = torch.tensor([[60.0, 0, 45], [0, 60, 30], [0, 0, 1]])
    rig = CameraRig(focal.expand(1, 2, 3, 3), torch.tensor([[ahead, behind]]), torch.ones(1, 2, dtype=torch.bool))
    motion = torch.from_numpy(ego_from_prev).float()[None]
    return Frame(images.byte(), rig, motion, torch.tensor([0.5]), torch.tensor([is_first]), *usual_mounting(1, 2))


def test_static_features_are_aligned_with_the_present_frame():
    """A blob in the previous BEV features, rotated and shifted by the ego motion, is at its place now."""
    ego_from_prev = invert_rigid(rigid_from_yaw(math.radians(20), (4.0, 1.0, 0.0)))
    bus = can_bus_vector(frame(0, ego_from_prev, False))
    config = BEVFormerConfig(bev=(100, 100), rotate_center=(50, 50))
    ego_from_lidar = np.array(NUSCENES_EGO_FROM_LIDAR)
    lidar_from_prev = invert_rigid(ego_from_lidar) @ ego_from_prev @ ego_from_lidar
    before = np.array([-12.0, 20.0, 0, 1])  # ahead of the car, to its left
    locations = cell_centers(100, 100, "cpu")
    metres = (locations - 0.5) * 102.4
    blob = torch.exp(-((metres - torch.tensor(before[:2])) ** 2).sum(-1, keepdim=True) / 8).float()
    turned = rotate_bev(blob[None], config, bus[:, -1]).view(1, 1, 100, 100)
    grid = (2 * (locations + bev_shift(config, bus)) - 1).view(1, 100, 100, 2)
    now = torch.nn.functional.grid_sample(turned, grid, align_corners=False).flatten()
    center = (now[:, None] * metres).sum(0) / now.sum()
    # As published, features rotate about the LiDAR, but the car about its rear axle: 0.94 m times 20 degrees.
    assert center.numpy() == pytest.approx((lidar_from_prev @ before)[:2], abs=0.8)
    still = can_bus_vector(frame(0, np.eye(4), True))
    assert still[0, 3] == 1 and still[0, [0, 1, 2, -2, -1]].abs().sum() == 0


def test_boxes_are_decoded_to_the_ego_frame():
    """A box 10 m ahead and 2 m left of the LiDAR, yaw 0.5, 3 m/s, encoded in the convention of mmdet3d before 1.0."""
    yaw = -math.pi - 0.5  # -yaw - pi / 2 is 0.5 more than LiDAR y, which is ahead
    box = torch.tensor([-2.0, 10, math.log(1.9), math.log(4.5), -1, math.log(1.5), math.sin(yaw), math.cos(yaw), 0, 3])
    logits = torch.full((1, 1, 1, 10), -9.0)
    logits[..., 0] = 2.0
    boxes = decode_boxes(logits, box.view(1, 1, 1, 10), usual_mounting(1, 1)[0], 1, SMALL.post_center_range)
    assert boxes.center[0, 0].tolist() == pytest.approx([10.9437, 2, 0.8402], abs=1e-4)
    assert boxes.size[0, 0].tolist() == pytest.approx([4.5, 1.9, 1.5])
    assert boxes.yaw[0, 0].item() == pytest.approx(0.5, abs=1e-5) and boxes.label[0, 0] == 0
    assert boxes.velocity[0, 0].tolist() == pytest.approx([3, 0], abs=1e-6) and boxes.valid.all()


@torch.inference_mode()
def test_memory_batches_and_weights_files(tmp_path):
    torch.manual_seed(0)
    model = BEVFormer(SMALL).eval()
    for p in model.head.parameters():
        p.add_(0.05 * torch.randn_like(p))
    motion = invert_rigid(rigid_from_yaw(0.1, (2.0, 0.0, 0.0)))
    first, second = frame(1, np.eye(4), True), frame(2, motion, False)
    _, state = model(first, model.initial_state(1))
    together, after = model(second, state)
    alone, _ = model(second._replace(is_first=torch.tensor([True])), state)
    assert (together[0] - alone[0]).abs().max() > 1e-3  # the state is used
    pair = type(second)(
        *(torch.cat([a, b]) if isinstance(a, torch.Tensor) else CameraRig(*map(torch.cat, zip(a, b, strict=True)))
          for a, b in zip(second, first, strict=True))
    )  # fmt: skip
    both, _ = model(pair, map_tensors(lambda tensor: tensor.expand(2, -1, -1, -1), state))
    torch.testing.assert_close(both[0][:, :1], together[0], atol=1e-5, rtol=1e-5)
    objects = model.decode(together)
    assert objects.boxes.score.shape == (1, 20) and objects.lines.points.shape == (1, 0, 20, 2)
    save_checkpoint(tmp_path / "w.safetensors", model, {"nds": 0.5})
    loaded, metrics = load_model(tmp_path / "w.safetensors"), read_metrics(tmp_path / "w.safetensors")
    again, _ = loaded(second, state)
    assert loaded.config == SMALL and metrics == {"nds": 0.5} and torch.equal(again[1], together[1])
    assert after.bev.shape == (1, 32, 20, 20)


@torch.inference_mode()
def test_images_are_padded_below_and_at_the_right():
    """As published: zeros after normalisation, to a multiple of 32."""
    encoder = PublishedImageEncoder(SMALL.backbone).eval()
    images = frame(3, np.eye(4), True).images
    wide = torch.zeros(1, 2, 3, 64, 96)
    wide[..., :60, :90] = (images - encoder.mean) / encoder.std
    expected = encoder.neck([encoder.backbone(wide.flatten(0, 1))[3]])[0]
    torch.testing.assert_close(encoder(images)[0].flatten(0, 1), expected)


@pytest.mark.parametrize("name", PUBLISHED)
def test_official_keys(official_keys, name):
    path = official_keys / f"{name}.json"
    official = {library_key(key, PREFIXES): tuple(shape) for key, shape in json.loads(path.read_text()).items()}
    with torch.device("meta"):
        network = build_network(preset_config(name))
    ours = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    assert ours == official


def test_only_complete_checkpoints_are_imported(official_keys, tmp_path):
    path = official_keys / "bevformer_tiny.json"
    generator = torch.Generator().manual_seed(0)
    weights = {
        key: torch.tensor(7) if key.endswith("num_batches_tracked") else torch.rand(shape, generator=generator)
        for key, shape in json.loads(path.read_text()).items()
    }
    torch.save({"state_dict": weights, "meta": {"epoch": 24}}, tmp_path / "tiny.pth")
    script = Path(__file__).parent.parent / "scripts" / "import_checkpoint.py"
    command = [sys.executable, script, tmp_path / "tiny.pth", "--out", tmp_path / "tiny.safetensors"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "is bevformer_tiny, 33.52 M parameters" in run.stdout
    state = load_model(tmp_path / "tiny.safetensors").state_dict()
    assert len(state) == len(weights)
    assert all(torch.equal(state[library_key(key, PREFIXES)], tensor) for key, tensor in weights.items())
    weights["pts_bbox_head.extra"] = torch.zeros(1)
    torch.save(weights, tmp_path / "tiny.pth")
    with pytest.raises(CheckpointError, match=r"nearest is bevformer_tiny, with 1 keys .* the first head\.extra"):
        import_published(tmp_path / "tiny.pth")
    torch.save({"model": SMALL}, tmp_path / "code.pth")  # a pickle of more than tensors
    with pytest.raises(CheckpointError, match="not readable as plain tensors"):
        import_published(tmp_path / "code.pth")
