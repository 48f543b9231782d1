"""Matching and losses of the published networks: parity with the published code, conventions, training."""

import json
import math

import numpy as np
import pytest
import torch
from mmengine.runner import set_random_seed
from safetensors.torch import load_file
from torch import nn

from perception.data.loader import collate
from perception.data.nuscenes import NuScenesDataset
from perception.engine.config import load_config
from perception.engine.dry_run import dry_run
from perception.engine.training import TrainingModel, build_optimizer, train
from perception.engine.weights import make_core
from perception.errors import ConfigError
from perception.matching import Match
from perception.models import build_network
from perception.models.bevformer.config import BEVFormerConfig
from perception.models.bevformer.losses import bevformer_losses, encode_lidar_boxes, lidar_boxes, match_boxes
from perception.models.bevformer.model import RawBoxes, decode_boxes
from perception.models.checkpoint import load_model, read_metrics
from perception.models.maptr.config import MapTRConfig
from perception.models.maptr.losses import (
    LINE_LOSS_WEIGHTS,
    lidar_lines,
    maptr_losses,
    match_lines,
    published_orderings,
)
from perception.models.maptr.model import RawLines
from perception.models.published.backbone import FPNConfig
from perception.models.published.losses import class_loss, sum_layers
from perception.synthetic import VERSION
from perception.types import NUSCENES_EGO_FROM_LIDAR, Polylines, map_tensors

SMALL = {"image_size": (64, 96), "backbone": FPNConfig(stages=2), "channels": 32, "feed_forward": 48, "heads": 4}


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads rows [M_b, ...] to [B, M, ...]; returns them and valid [B, M]."""
    most = max(len(row) for row in rows)
    whole = torch.stack([torch.cat([row, row.new_zeros(most - len(row), *row.shape[1:])]) for row in rows])
    return whole, torch.stack([torch.arange(most) < len(row) for row in rows])


def cases(golden) -> list[str]:
    return sorted({key.split(".")[0] for key in load_file(golden / "bevformer_loss/inputs.safetensors") if "." in key})


def test_bevformer(golden):
    inputs, expected = (load_file(golden / f"bevformer_loss/{name}.safetensors") for name in ("inputs", "outputs"))
    assert cases(golden)
    for case in cases(golden):
        images = range(inputs["all_cls_scores"].shape[1])
        boxes, valid = padded([inputs[f"{case}.gt_boxes{b}"] for b in images])
        label, _ = padded([inputs[f"{case}.gt_labels{b}"] for b in images])
        boxes[..., 2] += boxes[..., 5] / 2  # the published boxes have their origin at the bottom centre
        targets = encode_lidar_boxes(boxes)
        logits = inputs["all_cls_scores"].clone().requires_grad_()
        params = inputs["all_bbox_preds"].clone().requires_grad_()
        layers = len(logits)
        for layer in range(layers):
            match, cost = match_boxes(logits[layer], params[layer], targets, label, valid)
            for b in images:
                published = {
                    key: expected[f"{case}.layer{layer}.image{b}.{key}"] for key in ("cost", "assigned_gt_inds")
                }
                torch.testing.assert_close(cost[b, :, valid[b]], published["cost"], atol=1e-4, rtol=1e-5)
                assigned = torch.zeros(logits.shape[2], dtype=torch.int64)
                assigned[match.query[match.batch == b]] = match.target[match.batch == b] + 1
                assert torch.equal(assigned, published["assigned_gt_inds"])
        losses = bevformer_losses(logits, params, targets, label, valid)
        for layer, values in enumerate(losses):
            prefix = "" if layer == layers - 1 else f"d{layer}."
            for name, ours in (("loss_cls", "box_class"), ("loss_bbox", "box_params")):
                torch.testing.assert_close(
                    values[ours].detach(), expected[f"{case}.{prefix}{name}"][0], atol=0, rtol=1e-5
                )
        sum(loss for layer in losses for loss in layer.values()).backward()
        torch.testing.assert_close(logits.grad, expected[f"{case}.grad_all_cls_scores"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(params.grad, expected[f"{case}.grad_all_bbox_preds"], atol=1e-5, rtol=1e-5)


def resample(points: list, count: int) -> np.ndarray:
    """Resamples a line to `count` points at equal distances."""
    points = np.asarray(points, dtype=np.float64)
    along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    wanted = np.linspace(0, along[-1], count)
    return np.stack([np.interp(wanted, along, points[:, k]) for k in range(2)], 1)


def test_maptr(golden):
    folder = golden / "maptr"
    published = json.loads((folder / "loss.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    outputs = load_file(folder / "outputs.safetensors")
    P, M = config["num_pts"], len(published["gt"])
    orderings, exists = torch.zeros(1, M, P - 1, P, 2), torch.zeros(1, M, P - 1, dtype=torch.bool)
    for m, line in enumerate(published["gt"]):
        walks = [line["pts"], line["pts"][::-1]]
        if line["pts"][0] == line["pts"][-1]:  # from each vertex
            ring = np.array(line["pts"][:-1])
            walks = [np.roll(ring, k, axis=0) for k in range(len(ring))]
            walks = [np.concatenate([walk, walk[:1]]) for walk in walks]
        for k, walk in enumerate(walks):
            orderings[0, m, k] = torch.from_numpy(resample(walk, P))
            exists[0, m, k] = True
    label = torch.tensor([[line["label"] for line in published["gt"]]])
    valid = torch.ones(1, M, dtype=torch.bool)
    low, high = config["pc_range"][:2], config["pc_range"][3:5]
    normalized = (orderings - torch.tensor(low)) / (torch.tensor(high) - torch.tensor(low))
    logits = outputs["all_cls_scores"].requires_grad_()
    found = outputs["all_pts_preds"].requires_grad_()
    for layer, (assigned_inds, order) in enumerate(
        zip(published["assigned_gt_inds"], published["order_index"], strict=True)
    ):
        match, best = match_lines(logits[layer], found[layer], normalized, exists, label, valid)
        assigned = torch.zeros(logits.shape[2], dtype=torch.int64)
        assigned[match.query] = match.target + 1
        assert assigned.tolist() == assigned_inds
        assert best[0].tolist() == order
    losses = maptr_losses(logits, found, orderings, exists, label, valid, tuple(low), tuple(high))
    names = {"loss_cls": "line_class", "loss_pts": "line_points", "loss_dir": "line_direction"}
    for layer, values in enumerate(losses):
        prefix = "" if layer == len(losses) - 1 else f"d{layer}."
        for name, ours in names.items():
            assert values[ours].item() == pytest.approx(published["losses"][prefix + name], rel=1e-4)
            bare = values[ours].item() / LINE_LOSS_WEIGHTS[ours]
            assert bare == pytest.approx(published["losses_all_weights_1"][prefix + name], rel=1e-4)
    total = sum(loss for layer in losses for loss in layer.values())
    assert total.item() == pytest.approx(published["total"], rel=1e-4)


def test_orderings_of_closed_and_open_lines():
    ring = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 0]])
    points = torch.stack([ring, ring + torch.arange(4.0)[:, None]])[None]
    yes = torch.ones(1, 2, dtype=torch.bool)
    closed = torch.tensor([[True, False]])
    lines = Polylines(points, closed, closed.long(), yes.float(), yes, torch.zeros_like(points))
    orderings, exists = published_orderings(lines)
    assert exists[0].tolist() == [[True, True, True, False], [True, False, False, True]]
    assert orderings[0, 0, 1].tolist() == [[1, 0], [1, 1], [0, 0], [1, 0]]
    assert torch.equal(orderings[0, 1, 3], points[0, 1].flip(0))


def test_box_encoding_inverts_decoding():
    """Encoding decoded boxes as ground truth gives the boxes again."""
    torch.manual_seed(0)
    box = torch.cat(
        [10 * torch.randn(1, 5, 3), 1 + torch.rand(1, 5, 3), 6 * torch.rand(1, 5, 1), torch.randn(1, 5, 2)], -1
    )
    config = BEVFormerConfig.tiny()
    ego_from_lidar = torch.tensor([NUSCENES_EGO_FROM_LIDAR])
    logits = torch.full((1, 1, 5, 10), -9.0)
    logits[0, 0, range(5), range(5)] = torch.arange(5.0, 0.0, -1.0)
    boxes = decode_boxes(logits, encode_lidar_boxes(box)[None], ego_from_lidar, 5, config.post_center_range)
    back = lidar_boxes(boxes, ego_from_lidar)
    turns = (back[..., 6] - box[..., 6]) / (2 * math.pi)
    assert turns.round().sub(turns).abs().max() < 1e-5
    torch.testing.assert_close(
        back[..., [0, 1, 2, 3, 4, 5, 7, 8]], box[..., [0, 1, 2, 3, 4, 5, 7, 8]], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("network", ["bevformer", "maptr"])
def test_reference_points_stay_float32_under_autocast(network, town_root):
    """bfloat16 has 8 significant bits: steps of 0.25 m in a range of 60 m, and huge gradients where it rounds to 1."""
    dataset = NuScenesDataset(town_root, VERSION, "town_val", image_size=(64, 96))
    frame = map_tensors(lambda tensor: tensor[:, 0], collate([dataset[0]]).frames)
    torch.manual_seed(0)
    model = build_network(BEVFormerConfig(**SMALL, bev=(8, 8)) if network == "bevformer" else MapTRConfig(**SMALL))
    start = model.head.transformer.reference_points
    nn.init.constant_(start.bias, 7.0)
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            points = model.eval()(frame, model.initial_state(1))[0][1]
        assert points.dtype == torch.float32
        gradients.append(torch.autograd.grad(points[0].mean(), start.bias)[0])
    assert (points != points.bfloat16()).any()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.2, atol=1e-7)


@pytest.mark.parametrize("network", ["bevformer", "maptr"])
def test_perfect_predictions_have_no_loss(network, town_root):
    """The loss of the ground truth as prediction, with confident logits, is almost zero."""
    data = NuScenesDataset(town_root, VERSION, "town_val", image_size=(64, 96))
    clip = collate([data[0]])
    frame, gt, _ = map_tensors(lambda tensor: tensor[:, 0], clip)
    model = build_network(BEVFormerConfig(**SMALL, bev=(8, 8)) if network == "bevformer" else MapTRConfig(**SMALL))
    turn = frame.ego_from_lidar
    if network == "bevformer":
        params = encode_lidar_boxes(lidar_boxes(gt.boxes, turn))[None]
        inside = (params[0, ..., :2].abs() < 51.2).all(-1)  # boxes outside the range are ignored
        label, known = gt.boxes.label, gt.boxes.valid & inside
    else:
        lidar = lidar_lines(gt.lines, turn).points
        params = ((lidar + torch.tensor([15.0, 30.0])) / torch.tensor([30.0, 60.0]))[None]
        label, known = gt.lines.label, gt.lines.valid
    logits = torch.full((1, *label.shape, 10 if network == "bevformer" else 3), -9.0)
    logits[0, 0, torch.arange(label.shape[1])[known[0]], label[known]] = 9.0
    prediction = (RawBoxes if network == "bevformer" else RawLines)(logits, params, turn)
    losses = model.loss(prediction, gt, frame)
    assert known.sum() > 3 and all(loss.item() < 1e-2 for loss in losses.values())
    moved = prediction._replace(**{prediction._fields[1]: prediction[1] + 0.1})
    assert sum(model.loss(moved, gt, frame).values()) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset",
    [
        "bevformer_tiny",
        "maptr_tiny_r50_24e_gkt",
        "maptrv2_nusc_r50_24ep",
        "mapqr_nusc_r50_24ep",
    ],
)
def test_published_networks_are_trained(preset, town_root, tmp_path):
    """Trains with the flagship's image encoder through scripts/train.py's functions and loads the written weights."""
    path = tmp_path / "port.py"
    path.write_text(f"""
model = dict(
    preset={preset!r}, image_size=(64, 96), channels=32, feed_forward=48, heads=4, decoder_layers=2, encoder_layers=1,
    bev=(16, 16), backbone=dict(name="resnet18", stages=2, stride=8),
)
train_data = dict(dataroot={str(town_root)!r}, version={VERSION!r}, split="town_val", augment=dict(mirror=0.0))
val_data = dict(dataroot={str(town_root)!r}, version={VERSION!r}, split="town_val")
train = dict(
    epochs=2, batch_size=2, streams=1, frames_per_clip=1, drop_frames=0.0, image_epochs=0, lr=1e-3,
    backbone_lr_mult=0.5, frozen_stages=0, weight_decay=0.01, warmup_iters=2, grad_clip=35.0, ema_momentum=0.0,
    val_every=2, log_every=1, workers=0,
)
""")
    config = load_config(path)
    assert isinstance(config.model.backbone, FPNConfig)
    trained = train(config, tmp_path / "work", seed=0)
    loaded, metrics = (
        load_model(tmp_path / "work" / "port.safetensors"),
        read_metrics(tmp_path / "work" / "port.safetensors"),
    )
    assert loaded.config == config.model and metrics["epoch"] == 2
    set_random_seed(0)
    start = make_core(config).state_dict()
    changed = {name for name, tensor in trained.state_dict().items() if not torch.equal(tensor, start[name])}
    assert any(name.startswith("head.transformer.decoder") for name in changed)
    assert not any(name.startswith("image_encoder.encoder.backbone.stem") for name in changed)
    assert sum(dry_run(config).parameters.values()) == sum(p.numel() for p in trained.parameters())
    model = TrainingModel(trained)
    groups = build_optimizer(model, config.train).param_groups
    assert {group["lr"] for group in groups} == {1e-3, 5e-4}
    with pytest.raises(ConfigError, match="no image losses"):
        train(load_config(path, {"train.image_epochs": 1}), tmp_path / "other")
    with pytest.raises(ConfigError, match="names 'heatmap'; the losses are"):
        TrainingModel(trained, ("heatmap",))


@pytest.mark.parametrize("pairs", [0, 1, 2])
def test_class_loss_is_per_matched_query_and_at_least_of_one(pairs):
    at = torch.arange(pairs)
    loss = class_loss(torch.zeros(1, 2, 3), torch.tensor([[2, 0]]), Match(0 * at, at, at))
    expected = (pairs * 0.25 + (6 - pairs) * 0.75) * 0.25 * math.log(2) / max(pairs, 1)
    assert loss.item() == pytest.approx(expected)


def test_losses_of_layers_add_up():
    layers = [{"a": torch.tensor(x), "b": torch.tensor(2 * x)} for x in (1.0, 3.0, 0.5)]
    assert sum_layers(layers) == {"a": 4.5, "b": 9.0}
