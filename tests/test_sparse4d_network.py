"""Sparse4D and SparseDrive as networks of the library: frames, classes, memory, training, evaluation and live use."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from perception.cameras import usual_mounting
from perception.cli.import_checkpoint import main as import_checkpoint
from perception.data.loader import collate
from perception.data.nuscenes import NuScenesDataset
from perception.engine.checkpoints import plain
from perception.engine.config import load_config
from perception.engine.loops import _as_dicts, _restored
from perception.engine.training import train
from perception.evaluation.dataset import evaluate_dataset
from perception.geometry import invert_rigid, rigid_from_yaw
from perception.inference.predictor import Predictor
from perception.models import build_network, preset_config
from perception.models.checkpoint import library_key, load_model
from perception.models.published.backbone import FPNConfig, PublishedBackboneConfig
from perception.models.sparse4d.aggregation import sample_all, sample_chosen
from perception.models.sparse4d.boxes import PUBLISHED_CLASSES, decoded, move_boxes, to_library_classes
from perception.models.sparse4d.config import (
    BoxHeadConfig,
    DenoisingConfig,
    LineHeadConfig,
    Sparse4DConfig,
    SparseDriveConfig,
)
from perception.models.sparse4d.head import Instances
from perception.models.sparse4d.lines import PUBLISHED_LINE_CLASSES, move_lines, to_library_line_classes
from perception.models.sparse4d.losses import encode_boxes
from perception.models.sparse4d.model import PREFIXES, decode_boxes, decode_lines, lidar_boxes, to_published
from perception.synthetic import VERSION
from perception.types import (
    BOX_CLASSES,
    LINE_CLASSES,
    NUSCENES_EGO_FROM_LIDAR,
    Boxes,
    CameraRig,
    Frame,
    map_tensors,
    named_tensors,
)

HEAD = {"layers": 3, "feed_forward": 64}
BOXES = {"anchors": 40, "remembered": 24, "encoder": (16, 4, 4, 8), "max_boxes": 20, **HEAD}
SHARED = {
    "image_size": (64, 96), "backbone": PublishedBackboneConfig(outputs=(0, 1, 2, 3), levels=4, width=4, channels=32),
    "channels": 32, "groups": 4, "heads": 4, "dropout": 0.0, "sampling_dropout": 0.0,
}  # fmt: skip
SPARSE4D = Sparse4DConfig(**SHARED, boxes=BoxHeadConfig(**BOXES))
SPARSEDRIVE = SparseDriveConfig(
    **SHARED, boxes=BoxHeadConfig(**BOXES, swaps_yaw=False, keeps_confidence=False, scores_all_layers=True),
    lines=LineHeadConfig(anchors=12, points=6, learned_points=2, **HEAD),
)  # fmt: skip


def noisy_network(config):
    """A network in evaluation mode whose outputs depend on everything."""
    torch.manual_seed(1)
    network = build_network(config).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "anchor" not in name and "fix_scale" not in name:
                parameter += 0.05 * torch.randn_like(parameter)
    return network


def frame(seed: int, ego_from_prev=None, batch: int = 1) -> Frame:
    """Two cameras, ahead and behind, with random images."""
    images = torch.randint(0, 256, (batch, 2, 3, 64, 96), generator=torch.Generator().manual_seed(seed))
    ahead = [[0.0, 0, 1, 1.5], [-1, 0, 0, 0], [0, -1, 0, 1.6], [0, 0, 0, 1]]
    behind = [[0.0, 0, -1, 0], [1, 0, 0, 0], [0, -1, 0, 1.6], [0, 0, 0, 1]]
    focal = torch.tensor([[60.0, 0, 48], [0, 60, 32], [0, 0, 1]])
    poses = torch.tensor([[ahead, behind]])
    rig = CameraRig(focal.expand(batch, 2, 3, 3), poses.expand(batch, -1, -1, -1), torch.ones(batch, 2).bool())
    motion = torch.eye(4) if ego_from_prev is None else torch.from_numpy(ego_from_prev).float()
    first = ego_from_prev is None
    return Frame(
        images.byte(), rig, motion.expand(batch, 4, 4), torch.full((batch,), 0.0 if first else 0.5),
        torch.full((batch,), first), *usual_mounting(batch, 2),
    )  # fmt: skip


def test_classes_are_converted_by_name():
    published = (
        "car", "truck", "construction_vehicle", "bus", "trailer", "barrier", "motorcycle", "bicycle", "pedestrian",
        "traffic_cone",
    )  # fmt: skip
    assert [BOX_CLASSES[k] for k in to_library_classes(torch.arange(10))] == list(published)
    assert [LINE_CLASSES[k] for k in to_library_line_classes(torch.arange(3))] == [
        "ped_crossing",
        "divider",
        "boundary",
    ]
    for order in (PUBLISHED_CLASSES, PUBLISHED_LINE_CLASSES):
        labels = torch.arange(len(order))
        assert to_published(torch.tensor(order), order).tolist() == labels.tolist()


def test_boxes_pass_the_lidar_frame_and_back():
    """Encoding the ground truth and decoding it gives the same boxes, with a tilted LiDAR."""
    tilt = np.array(NUSCENES_EGO_FROM_LIDAR) @ rigid_from_yaw(0.02)
    roll = np.eye(4)
    roll[1:3, 1:3] = [[math.cos(0.03), -math.sin(0.03)], [math.sin(0.03), math.cos(0.03)]]
    ego_from_lidar = torch.from_numpy(tilt @ roll).float()[None]
    rng = torch.Generator().manual_seed(0)
    center = torch.randn(1, 5, 3, generator=rng) * 20
    size = torch.rand(1, 5, 3, generator=rng) + 1
    yaw, velocity = torch.rand(1, 5, generator=rng) * 6 - 3, torch.randn(1, 5, 2, generator=rng)
    label = torch.tensor([[0, 3, 9, 5, 7]])
    flag, nine = torch.ones(1, 5, dtype=torch.bool), torch.zeros(1, 5, 9)
    boxes = Boxes(center, size, yaw, velocity, label, label, flag.float(), flag, nine)
    encoded = torch.nn.functional.pad(encode_boxes(lidar_boxes(boxes, ego_from_lidar)), (0, 1))
    logits = torch.full((1, 1, 5, 10), -9.0)
    logits[0, 0, torch.arange(5), to_published(label, PUBLISHED_CLASSES)[0]] = torch.arange(5.0, 0, -1)
    instances = Instances(logits, torch.zeros(1, 1, 5, 2), encoded[None], torch.arange(5)[None].int())
    found, ids = decode_boxes(instances, ego_from_lidar, 5)
    assert torch.equal(found.label, label) and ids.tolist() == [[0, 1, 2, 3, 4]]
    torch.testing.assert_close(found.center, center, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.size, size)
    turned = (found.yaw - yaw + math.pi) % (2 * math.pi) - math.pi
    assert turned.abs().max() < 2e-3  # a yaw in a tilted plane
    torch.testing.assert_close(found.velocity, velocity, atol=5e-3, rtol=0)
    ahead = decoded(torch.tensor([0, 0, 0, 0, 0, 0, math.sin(1), math.cos(1), 0, 0, 0]))
    assert ahead[6].item() == pytest.approx(1)
    unknown = encode_boxes(torch.tensor([0.0, 0, 0, 1, 1, 1, 0, math.nan, math.nan]))
    assert unknown[-2:].tolist() == [0, 0]  # as in the published data code


def test_anchors_move_with_the_world():
    """A static and a moving box, and a line, seen after the vehicle has driven and turned."""
    now_from_prev = torch.from_numpy(invert_rigid(rigid_from_yaw(0.3, (4.0, 1.0, 0.0)))).float()[None]
    boxes = torch.tensor([[[5.0, 2, 0, 0, 0, 0, math.sin(1), math.cos(1), 2, 0, 0]]])
    moved = move_boxes(boxes, now_from_prev, torch.tensor([0.5]), swaps_yaw=False)[0, 0]
    expected = now_from_prev[0] @ torch.tensor([6.0, 2, 0, 1])
    torch.testing.assert_close(moved[:3], expected[:3])
    assert moved[6:8].tolist() == pytest.approx([math.sin(0.7), math.cos(0.7)], abs=1e-6)
    assert moved[8:10].tolist() == pytest.approx([2 * math.cos(0.3), -2 * math.sin(0.3)], abs=1e-6)
    swapped = move_boxes(boxes, now_from_prev, torch.tensor([0.5]), swaps_yaw=True)[0, 0]
    assert swapped[6:8].tolist() == moved[[7, 6]].tolist()
    line = move_lines(torch.tensor([[[6.0, 2, 0, 0]]]), now_from_prev, torch.zeros(1))[0, 0]
    torch.testing.assert_close(line[:2], expected[:2])


@pytest.mark.parametrize("implementation", ["plain", "embedding_bag"])
def test_chosen_cameras_sample_what_all_cameras_do(implementation):
    """If only two cameras have weight, choosing them changes nothing: values and gradients, also at the borders."""
    torch.manual_seed(0)
    B, N, Q, P, L, G, C = 2, 4, 7, 5, 2, 3, 6
    features = [torch.randn(B, N, C, h, w, requires_grad=True) for h, w in ((5, 8), (2, 3))]
    uv = torch.rand(B, N, Q, P, 2) * 1.6 - 0.3
    camera = torch.rand(B, Q, N).topk(2).indices  # [B, Q, K]
    weight = (
        torch.randn(B, N, Q, L, P, G)
        * torch.zeros(B, Q, N).scatter(2, camera, 1.0).transpose(1, 2)[..., None, None, None]
    )
    wanted = sample_all(features, uv, weight, "plain")
    index = camera[..., None, None]
    chosen_uv = uv.transpose(1, 2).gather(2, index.expand(-1, -1, -1, P, 2))
    chosen_weight = weight.transpose(1, 2).gather(2, index[..., None].expand(-1, -1, -1, L, P, G))
    every = sample_all(features, uv, weight, implementation)
    found = sample_chosen(features, chosen_uv, camera, chosen_weight, implementation)
    expected_gradient = torch.autograd.grad(wanted.square().sum(), features)
    for result in (every, found):
        torch.testing.assert_close(result, wanted, atol=1e-5, rtol=1e-4)
        for a, b in zip(torch.autograd.grad(result.square().sum(), features), expected_gradient, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("config", [SPARSE4D, SPARSEDRIVE], ids=["sparse4d", "sparsedrive"])
@torch.inference_mode()
def test_memory_of_a_batch_and_first_frames(config):
    network = noisy_network(config)
    motion = invert_rigid(rigid_from_yaw(0.1, (2.0, 0.0, 0.0)))
    first, second = frame(1), frame(2, motion)
    one, state = network(first, network.initial_state(1))
    two, _ = network(second, state)
    alone, _ = network(second._replace(is_first=torch.tensor([True])), state)
    fresh, _ = network(second._replace(is_first=torch.tensor([True])), network.initial_state(1))
    assert (two.boxes.anchors[-1] - alone.boxes.anchors[-1]).abs().max() > 1e-3  # the memory is used
    torch.testing.assert_close(alone.boxes.anchors, fresh.boxes.anchors)  # and ignored in a first frame
    # Element 0 goes on, element 1 is a first frame with the memory of something else.
    pair = map_tensors(lambda x: torch.cat([x, x]), second)._replace(is_first=torch.tensor([False, True]))
    together, _ = network(pair, map_tensors(lambda x: torch.cat([x, x]), state))
    for k, single in enumerate((two, alone)):
        torch.testing.assert_close(together.boxes.anchors[:, k], single.boxes.anchors[:, 0], atol=1e-4, rtol=1e-4)
    T, ids = config.boxes.remembered, two.boxes.ids[0].tolist()
    assert one.boxes.ids[0].tolist() == list(range(40)) and ids[:T] == state.boxes.ids[0].tolist()
    assert ids[T:] == list(range(40, 80 - T))
    chosen = build_network(type(config)(**{**vars(config), "best_cameras": 1})).eval()
    chosen.load_state_dict(network.state_dict())
    other, _ = chosen(second, state)  # ahead and behind do not overlap
    torch.testing.assert_close(other.boxes.anchors, two.boxes.anchors, atol=1e-4, rtol=1e-4)
    if config is SPARSEDRIVE:
        lines = decode_lines(two.lines, two.ego_from_lidar)
        assert lines.points.shape == (1, 12, 6, 2) and lines.score[0].diff().max() <= 0


CONFIG = """
model = dict(
    preset={preset!r}, image_size=(64, 96), backbone=dict(width=4, channels=32), channels=32, groups=4, heads=4,
    boxes=dict(anchors=40, remembered=24, layers=2, feed_forward=64, encoder=(16, 4, 4, 8), max_boxes=20), {more}
)
train_data = val_data = dict(dataroot={root!r}, version={version!r}, split="town_val")
train = dict(
    epochs=1, batch_size=1, streams=1, frames_per_clip=2, drop_frames=0.0, image_epochs=0, lr=1e-4, weight_decay=0.0,
    warmup_iters=2, grad_clip=1.0, ema_momentum=0.0, val_every=1, log_every=1, workers=0,
)
"""


@pytest.mark.parametrize("name", ["sparse4d", "sparsedrive"])
def test_training_evaluation_and_live_use(name, town_root, tmp_path):
    """Two training steps and a validation by the functions of the commands, then tracking in live use."""
    path = tmp_path / f"{name}.py"
    preset, more = "sparse4dv3_temporal_r50_1x8_bs6_256x704", ""
    if name == "sparsedrive":
        preset, more = "sparsedrive_small_stage1", "lines=dict(anchors=12, layers=2, feed_forward=64)"
    path.write_text(CONFIG.format(preset=preset, more=more, root=str(town_root), version=VERSION))
    config = load_config(path)
    assert config.model.backbone.levels == 4 and config.model.boxes.swaps_yaw == (name == "sparse4d")
    train(config, tmp_path / "work")
    network = load_model(tmp_path / "work" / f"{name}-last.safetensors")
    data = NuScenesDataset(town_root, VERSION, "town_val", image_size=(64, 96))
    evaluation, stream = evaluate_dataset(network, data)
    assert 0 <= evaluation.detection.nds < 0.3 and len(stream.objects) == len(data)
    predictor, seen = Predictor(network, min_seen=0), set()
    for k in range(3):
        of_sample = data[k].frames
        images = list(of_sample.images[0].permute(0, 2, 3, 1).numpy())
        live = predictor.step(images, map_tensors(lambda x: x[0].numpy(), of_sample.rig), data.ego_pose(k), 0.5 * k)
        ids = live.ids.boxes.tolist()
        assert len(ids) == len(live.boxes.score) == 20 and len(set(ids)) == 20
        assert (live.ids.lines == -1).all() and live.to_dict()["boxes"][0]["id"] == ids[0]
        if k:
            assert seen & set(ids)
        seen |= set(ids)


def test_a_checkpoint_keeps_the_memory():
    """The memory of a training is stored as plain dicts and comes back in its own types."""
    network = noisy_network(SPARSE4D)
    memory = map_tensors(lambda x: x + 1 if x.is_floating_point() else x, network.initial_state(2))
    restored = _restored(network.initial_state(1), plain(_as_dicts(memory)), torch.device("cpu"))
    assert type(restored.boxes) is type(memory.boxes) and restored.lines is None
    pairs = zip(named_tensors(memory).values(), named_tensors(restored).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_denoising_needs_ground_truth_and_ids(town_root):
    """Noisy instances come from the ground truth; groups are handed on only if its ids are known."""
    data = NuScenesDataset(town_root, VERSION, "town_val", image_size=(64, 96))
    clips = collate([data[0], data[1]])
    assert (clips.gt.ids.boxes >= 0).any() and (clips.gt.ids.boxes[~clips.gt.boxes.valid][-1:] == -1).all()
    gt, frames = (map_tensors(lambda x: x[:1, 0], part) for part in (clips.gt, clips.frames))
    network = noisy_network(SPARSE4D).train()
    prediction, state = network(frames, network.initial_state(1), gt)
    boxes = min(int(gt.boxes.valid.sum()), 32)
    assert prediction.denoised.logits.shape[2] <= 5 * 2 * boxes and state.denoising.ids.shape[1] == 3
    losses = network.loss(prediction, gt, frames)
    assert set(losses) == set(network.loss_weights) and all(loss.isfinite() for loss in losses.values())
    _, state = network(frames, network.initial_state(1), gt._replace(ids=None))
    assert state.denoising.ids.shape[1] == 0
    empty = gt._replace(boxes=gt.boxes._replace(valid=torch.zeros_like(gt.boxes.valid)))
    prediction, _ = network(frames, network.initial_state(1), empty)
    losses = network.loss(prediction, empty, frames)
    assert prediction.denoised is None and losses["denoising_class"] == 0 and losses["depth"] == 0
    assert {"boxes_feature", "boxes_next_id", "denoising_ids"} <= set(named_tensors(state))
    quiet = noisy_network(Sparse4DConfig(**{**vars(SPARSE4D), "denoising": DenoisingConfig(groups=0)})).train()
    assert quiet(frames, quiet.initial_state(1), gt)[0].denoised is None


@pytest.mark.parametrize("backbone", [SPARSE4D.backbone, FPNConfig(stages=2)], ids=["published", "flagship"])
def test_the_depth_branch_learns_from_the_levels_there_are(backbone, town_root):
    """Targets have the sizes of the first feature levels, which `strides` tells."""
    network = noisy_network(replace(SPARSE4D, backbone=backbone)).train()
    clip = collate([NuScenesDataset(town_root, VERSION, "town_val", image_size=(64, 96))[0]])
    gt, frames = (map_tensors(lambda x: x[:, 0], part) for part in (clip.gt, clip.frames))
    levels = network.image_encoder(frames.images)
    assert [x.shape[-2:] for x in levels] == [(64 // stride, 96 // stride) for stride in backbone.strides]
    prediction, _ = network(frames, network.initial_state(1), gt)
    assert prediction.depths.shape[-1] == sum(x.shape[-2] * x.shape[-1] for x in levels[:3])
    assert network.loss(prediction, gt, frames)["depth"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparse4dv3_temporal_r50_1x8_bs6_256x704", "sparsedrive_small_stage1"])
def test_checkpoints_are_imported(name, official_keys, tmp_path, capsys):
    """A checkpoint with the official keys becomes the network, also with a choice of cameras."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        key: torch.tensor(7) if key.endswith("num_batches_tracked") else torch.rand(shape, generator=generator)
        for key, shape in json.loads((official_keys / f"{name}.json").read_text()).items()
    }
    torch.save({"state_dict": weights, "meta": {"epoch": 100}}, tmp_path / "published.pth")
    out = tmp_path / "w.safetensors"
    import_checkpoint([str(tmp_path / "published.pth"), "--out", str(out), "--best-cameras", "2"])
    assert f"is {name}, " in capsys.readouterr().out
    network = load_model(out)
    assert network.config == replace(preset_config(name), best_cameras=2)
    state = network.state_dict()
    assert len(state) == len(weights)
    assert all(torch.equal(state[library_key(key, PREFIXES)], tensor) for key, tensor in weights.items())
