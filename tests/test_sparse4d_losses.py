"""Losses of Sparse4Dv3 and SparseDrive: parity with the published code in matching, losses and gradients."""

import json

import pytest
import torch
from conftest import allowed
from safetensors.torch import load_file
from test_sparse4d import Sequence, box_config, close, load_head, network_config, of_frame

from perception.models.sparse4d.blocks import DepthBranch
from perception.models.sparse4d.config import DenoisingConfig
from perception.models.sparse4d.denoising import Denoised, make_noisy
from perception.models.sparse4d.head import Instances, box_head
from perception.models.sparse4d.losses import (
    BoxTargets,
    LineTargets,
    box_losses,
    denoising_losses,
    depth_loss,
    encode_boxes,
    line_losses,
    match_boxes,
    match_lines,
)
from perception.targets import line_orderings
from perception.types import Polylines

NAMES = {
    "box_class": "loss_cls", "box_params": "loss_box", "box_centerness": "loss_cns", "box_yawness": "loss_yns",
    "denoising_class": "loss_cls_dn", "denoising_params": "loss_box_dn",
    "line_class": "loss_cls", "line_points": "loss_line",
}  # fmt: skip


def padded(parts: list[torch.Tensor]) -> torch.Tensor:
    """Stacks tensors of different lengths, padded with zeros."""
    longest = max(map(len, parts))
    return torch.stack([torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])]) for x in parts])


def box_targets(of_frame: dict, batch: int) -> BoxTargets:
    boxes, labels = ([of_frame[f"gt_{kind}{b}"] for b in range(batch)] for kind in ("boxes", "labels"))
    valid = padded([torch.ones(len(x), dtype=torch.bool) for x in labels])
    return BoxTargets(encode_boxes(padded(boxes)), padded(labels), valid)


def check_losses(layers: list[dict], expected: dict, rtol: float, prefix: str = "") -> torch.Tensor:
    """Compares the losses of all layers with those of the published code and returns their sum."""
    for number, losses in enumerate(layers):
        for name, loss in losses.items():
            wanted = expected[f"{prefix}{NAMES[name]}_{number}"]
            assert loss.item() == pytest.approx(wanted, rel=rtol, abs=1e-7), (name, number)
    return torch.stack([loss for losses in layers for loss in losses.values()]).sum()


def check_box_matching(predicted: Instances, targets: BoxTargets, expected: dict):
    """Compares matches and their costs in all layers."""
    B = len(targets.label)
    for number, (logits, anchors) in enumerate(zip(predicted.logits, predicted.anchors, strict=True)):
        match, cost = match_boxes(logits, anchors, targets)
        assigned = torch.full(logits.shape[:2], -1)
        assigned[match.batch, match.query] = match.target
        for b in range(B):
            wanted = expected.get(f"layer{number}.assigned{b}", torch.full_like(assigned[b], -1))
            assert torch.equal(assigned[b], wanted.long())
            if f"layer{number}.cost{b}" in expected:
                close(cost[b, :, targets.valid[b]], expected[f"layer{number}.cost{b}"], 2e-4)


def frames_of(names) -> list[int]:
    """Returns the numbers of the frames that names such as "frame1.gt_boxes0" belong to."""
    return sorted({int(name.split(".")[0].removeprefix("frame")) for name in names if name.startswith("frame")})


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone().requires_grad_()


@pytest.mark.parametrize("case", ["plain", "empty", "dn"])
def test_sparse4d_losses(golden, case):
    """Losses and their gradients with respect to the predictions, of the published predictions."""
    folder = golden / "sparse4d_loss"
    inputs, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    losses = json.loads((folder / "loss.json").read_text())[case]
    published = json.loads((folder / "config.json").read_text())
    rtol = allowed(folder, "losses", 1e-6)
    for k in frames_of(losses):
        given, wanted = of_frame(inputs, f"frame{k}."), of_frame(expected, f"{case}.frame{k}.")
        predicted = of_frame(inputs, f"pred.{'plain' if case == 'empty' else case}.frame{k}.")
        B = predicted["classification"].shape[1]
        if case == "empty":
            given = given | {f"gt_{kind}1": given[f"gt_{kind}1"][:0] for kind in ("boxes", "labels")}
        targets = box_targets(given, B)
        leaves = {name: leaf(x) for name, x in predicted.items()}
        instances = Instances(leaves["classification"], leaves["quality"], leaves["prediction"], torch.zeros(0))
        if case != "dn":
            check_box_matching(Instances(*(x.detach() for x in instances)), targets, wanted)
        total = check_losses(box_losses(instances, targets), losses[f"frame{k}"], rtol)
        if case == "dn":
            noisy = noisy_of(published, given, of_frame(inputs, f"dn.frame{k}."), B)
            later = noisy.target._replace(
                boxes=wanted["temp_dn_reg_target"], label=wanted["temp_dn_cls_target"],
                valid=wanted["temp_dn_valid_mask"].bool(),
            )  # fmt: skip
            denoised = Denoised(leaves["dn_classification"], leaves["dn_prediction"], noisy.target, later)
            total = total + check_losses(denoising_losses(denoised, 1), losses[f"frame{k}"], rtol)
        assert total.item() == pytest.approx(losses[f"frame{k}"]["total"], rel=rtol)
        total.backward()
        for name, tensor in leaves.items():
            close(tensor.grad, wanted[f"grad.{name}"], 1e-5)


def noisy_of(published: dict, given: dict, drawn: dict, batch: int):
    """Noisy instances with the published random draws."""
    config = DenoisingConfig(
        groups=published["num_dn_groups"], handed_on=published["num_temp_dn_groups"],
        max_boxes=published["max_dn_gt"], noise=tuple(published["dn_noise_scale"]),
    )  # fmt: skip
    ids = padded([given[f"gt_ids{b}"] for b in range(batch)])
    draws = torch.stack([drawn[f"rand{i}"] for i in range(3)])
    return make_noisy(config, *box_targets(given, batch), ids, draws, drawn["perm"])


@pytest.mark.parametrize("case", ["plain", "empty", "dn"])
def test_sparse4d_training_frames(golden, case):
    """Two frames in training mode, with denoising and groups that are handed on; gradients of all parameters."""
    folder = golden / "sparse4d_loss"
    inputs, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    losses = json.loads((folder / "loss.json").read_text())[case]
    published = json.loads((folder / "config.json").read_text())
    sequence = Sequence(golden / "sparse4d")
    config = network_config(
        sequence.published, box_config(sequence.published), drop_outside=False, dropout=0.0, sampling_dropout=0.0
    )
    head = load_head(box_head(config), load_file(golden / "sparse4d" / "params.safetensors"), "head.").train()
    B = sequence.published["batch"]
    memory, handed_on = head.instance_bank.empty(B), None
    for k in frames_of(losses):
        given, wanted = of_frame(inputs, f"frame{k}."), of_frame(expected, f"{case}.frame{k}.")
        predicted = of_frame(inputs, f"pred.{'plain' if case == 'empty' else case}.frame{k}.")
        noisy = noisy_of(published, given, of_frame(inputs, f"dn.frame{k}."), B) if case == "dn" else None
        if case == "empty":
            given = given | {f"gt_{kind}1": given[f"gt_{kind}1"][:0] for kind in ("boxes", "labels")}
        targets = box_targets(given, B)
        output = head(sequence.view(k), memory, sequence.motion(k), noisy, handed_on)
        instances = output.instances
        sequence.close("boxes", instances.anchors, predicted["prediction"])
        sequence.close("logits", instances.logits, predicted["classification"])
        sequence.close("logits", instances.quality, predicted["quality"])
        parts = box_losses(instances, targets)
        if noisy is not None:
            check_denoising(head, output, noisy, predicted, wanted, sequence)
            parts += denoising_losses(output.denoised, config.boxes.single_frame_layers)
        total = sum(loss for layer in parts for loss in layer.values())
        assert total.item() == pytest.approx(losses[f"frame{k}"]["total"], rel=1e-5)
        head.zero_grad()
        total.backward()
        norms = {f"head.{name}": x.grad.norm().item() for name, x in head.named_parameters() if x.grad is not None}
        for name, norm in losses[f"frame{k}.grad_l2"].items():
            assert norms.get(name, 0.0) == pytest.approx(norm, rel=2e-3, abs=1e-4), name
        if "state.confidence" in wanted:
            sequence.close("boxes", output.memory.anchor, wanted["state.cached_anchor"])
            sequence.close("scores", output.memory.confidence, wanted["state.confidence"])
        memory, handed_on = output.memory, output.handed_on


def check_denoising(head, output, noisy, predicted, wanted, sequence):
    """Compares noisy instances, their targets before and after the take-over, predictions and what is handed on."""
    target, start = noisy.target, of_frame(wanted, "get_dn.")
    close(noisy.anchor[..., :10], start["dn_anchor"], 1e-5)
    close(target.boxes, start["dn_reg_target"], 1e-5)
    assert torch.equal(target.label, start["dn_cls_target"]) and torch.equal(target.ids, start["dn_id_target"])
    assert torch.equal(target.valid, start["valid_mask"].bool())
    D, Q = noisy.anchor.shape[1], head.config.anchors
    mask = noisy.mask_with(Q)[0]
    assert torch.equal(mask[Q:, Q:], start["attn_mask"].bool()) and mask[:Q, Q:].all() and mask[Q:, :Q].all()
    assert not mask[:Q, :Q].any() and mask.shape == (Q + D, Q + D)
    later = output.denoised.target
    close(later.boxes, wanted["temp_dn_reg_target"], 1e-5)
    assert torch.equal(later.label, wanted["temp_dn_cls_target"])
    assert torch.equal(later.valid, wanted["temp_dn_valid_mask"].bool())
    assert torch.equal(later.ids, wanted["dn_id_target"])
    sequence.close("boxes", output.denoised.anchors, predicted["dn_prediction"])
    sequence.close("logits", output.denoised.logits, predicted["dn_classification"])
    cached = of_frame(wanted, "cached_dn.")
    sequence.close("features", output.handed_on.feature, cached["dn_instance_feature"])
    sequence.close("boxes", output.handed_on.anchor, cached["dn_anchor"])
    assert torch.equal(output.handed_on.label, cached["dn_cls_target"])
    assert torch.equal(output.handed_on.ids, cached["dn_id_target"])
    assert torch.equal(output.handed_on.valid, cached["valid_mask"].bool())


def test_depth_branch(golden):
    folder = golden / "sparse4d_loss"
    inputs, expected = load_file(folder / "depth_inputs.safetensors"), load_file(folder / "depth_outputs.safetensors")
    sequence = Sequence(golden / "sparse4d")
    weights = of_frame(inputs, "depth_branch.")
    levels = sum(name.endswith("weight") for name in weights)
    branch = DepthBranch(sequence.published["embed_dims"], levels)
    branch.load_state_dict(weights)
    features = [leaf(x) for x in sequence.view(1).features]
    depths = branch(features, inputs["focal"])
    for level, depth in enumerate(depths):
        torch.testing.assert_close(depth.flatten(0, 1)[:, None], expected[f"depth{level}"], rtol=1e-5, atol=1e-4)
    loss = depth_loss(depths, [inputs[f"gt_depth{level}"] for level in range(levels)])
    assert loss.item() == pytest.approx(expected["loss_dense_depth"].item(), rel=allowed(folder, "losses", 1e-6))
    loss.backward()
    for level in range(levels):
        close(features[level].grad, expected[f"grad.feat{level}"], 1e-5)
    for name, parameter in branch.named_parameters():
        close(parameter.grad, expected[f"grad.depth_branch.{name}"], 1e-5)


def test_sparsedrive_losses(golden):
    folder = golden / "sparsedrive_loss"
    inputs, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    losses = json.loads((folder / "loss.json").read_text())
    published = json.loads((folder / "config.json").read_text())
    size = tuple(map(float, published["roi_size"]))
    predictions = load_file(golden / "sparsedrive" / "outputs.safetensors")
    rtol = allowed(folder, "losses", 1e-6)
    for k in frames_of(inputs):
        given = of_frame(inputs, f"frame{k}.")
        B = sum(name.startswith("gt_labels") for name in given)
        of_losses = of_frame(losses, f"frame{k}.")
        leaves = {
            name: leaf(predictions[f"frame{k}.det.{name}"]) for name in ("classification", "quality", "prediction")
        }
        wanted = of_frame(expected, f"frame{k}.det.")
        instances = Instances(*leaves.values(), torch.zeros(0))
        targets = box_targets(given, B)
        check_box_matching(Instances(*(x.detach() for x in instances)), targets, wanted)
        check_losses(box_losses(instances, targets), of_losses, rtol, "det_").backward()
        for name, tensor in leaves.items():
            close(tensor.grad, wanted[f"grad.{name}"], 1e-5)

        points, labels = ([given[f"gt_map_{kind}{b}"] for b in range(B)] for kind in ("pts", "labels"))
        orders = padded(points)
        valid = padded([torch.ones(len(x), dtype=torch.bool) for x in labels])
        lines = LineTargets(orders.flatten(3), (orders.abs() < 1e4).flatten(3).all(-1), padded(labels), valid)
        leaves = {name: leaf(predictions[f"frame{k}.map.{name}"]) for name in ("classification", "prediction")}
        wanted = of_frame(expected, f"frame{k}.map.")
        for number, (logits, anchors) in enumerate(zip(*(x.detach() for x in leaves.values()), strict=True)):
            match, cost, order = match_lines(logits, anchors, lines, size)
            assigned = torch.full(logits.shape[:2], -1)
            assigned[match.batch, match.query] = match.target
            for b in range(B):
                assert torch.equal(assigned[b], wanted[f"layer{number}.assigned{b}"].long())
                if len(labels[b]):
                    close(cost[b, :, valid[b]], wanted[f"layer{number}.cost{b}"], 1e-4)
                    of_sample = match.batch == b
                    chosen = order[b, match.query[of_sample], match.target[of_sample]]
                    assert torch.equal(chosen, wanted[f"layer{number}.order{b}"].long()[match.target[of_sample]])
        check_losses(line_losses(*leaves.values(), lines, size), of_losses, rtol, "map_").backward()
        for name, tensor in leaves.items():
            close(tensor.grad, wanted[f"grad.{name}"], 1e-5)
        check_orderings(points, valid)


def check_orderings(points: list[torch.Tensor], valid: torch.Tensor):
    """The library's orders of a line are the published ones, in another order."""
    for of_sample in points:
        for orders in of_sample:
            orders = orders[(orders.abs() < 1e4).flatten(1).all(1)]
            closed = (orders[0, 0] - orders[0, -1]).norm() < 1e-3
            line = Polylines(orders[None, :1], closed[None, None], *[torch.zeros(1, 1)] * 4)
            ours, exists = line_orderings(line)
            ours = ours[0, 0][exists[0, 0]]
            distance = (ours[:, None] - orders[None]).abs().flatten(2).amax(-1)
            assert len(ours) == len(orders) and distance.amin(0).max() < 1e-3 and distance.amin(1).max() < 1e-3
