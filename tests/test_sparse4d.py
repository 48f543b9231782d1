"""Sparse4Dv3 and SparseDrive: parity with outputs of the published code over frames with history and pauses."""

import json

import pytest
import torch
from conftest import allowed
from safetensors.torch import load_file

from perception.models.published.backbone import PublishedBackboneConfig
from perception.models.sparse4d.aggregation import CameraView
from perception.models.sparse4d.boxes import decoded, rank_boxes
from perception.models.sparse4d.config import BoxHeadConfig, LineHeadConfig, Sparse4DConfig
from perception.models.sparse4d.head import box_head, line_head, operations
from perception.models.sparse4d.lines import rank_lines
from perception.models.sparse4d.memory import Motion
from perception.ops.bilinear import preferred_implementation

OPERATIONS = {"attend": "gnn", "recall": "temp_gnn", "sample": "deformable", "feed_forward": "ffn"}  # published names
LEAST = {"boxes": 1e-3, "logits": 1e-4, "features": 1e-4, "scores": 1e-4}  # tolerances, see `allowed`
SPARSEDRIVE = {"swaps_yaw": False, "keeps_confidence": False, "scores_all_layers": True}


def box_config(published: dict, **changes) -> BoxHeadConfig:
    return BoxHeadConfig(
        anchors=published["num_anchor"],
        remembered=published["num_temp_instances"],
        layers=published["num_decoder"],
        classes=published["num_classes"],
        feed_forward=published["feedforward_channels"],
        confidence_decay=published["confidence_decay"],
        default_interval=published["default_time_interval"],
        max_interval=published["max_time_interval"],
        encoder=tuple(published["encoder_dims"]),
        encoder_loops=published.get("encoder_out_loops", 4),
        fixed_points=tuple(tuple(map(float, point)) for point in published["fix_scale"]),
        learned_points=published["num_learnable_pts"],
        max_boxes=published["num_output"],
        **changes,
    )


def network_config(published: dict, boxes: BoxHeadConfig, **changes) -> Sparse4DConfig:
    backbone = PublishedBackboneConfig(levels=len(published["feature_shapes"]), channels=published["embed_dims"])
    return Sparse4DConfig(
        image_size=tuple(published["image_wh"][::-1]), backbone=backbone, channels=published["embed_dims"],
        groups=published["num_groups"], heads=published["num_heads"], boxes=boxes, **changes,
    )  # fmt: skip


def load_head(head, params: dict, prefix: str):
    head.load_state_dict({k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)})
    return head.eval()


class Sequence:
    """The inputs of the golden frames in the form that heads take."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.inputs = load_file(folder / "inputs.safetensors")
        self.published = json.loads((folder / "config.json").read_text())
        self.frames = sorted({int(name.split(".")[0].removeprefix("frame")) for name in self.inputs})

    def close(self, kind: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
        close(actual, expected, allowed(self.folder, kind, LEAST[kind]))

    def view(self, k: int, samples: slice = slice(None)) -> CameraView:
        levels = range(len(self.published["feature_shapes"]))
        features = [self.inputs[f"frame{k}.feat{level}"][samples] for level in levels]
        sizes = self.inputs[f"frame{k}.image_wh"].flatten(0, 1).unique(dim=0)
        assert len(sizes) == 1  # a network has one image size
        W, H = sizes[0].int().tolist()
        return CameraView(features, self.inputs[f"frame{k}.projection_mat"][samples], (H, W))

    def motion(self, k: int, samples: slice = slice(None)) -> Motion:
        pose, time = (self.inputs[f"frame{k}.{name}"][samples] for name in ("T_global", "timestamp"))
        first = torch.full((len(time),), k == self.frames[0])
        if first.all():
            return Motion(torch.eye(4).expand(len(time), 4, 4), torch.zeros(len(time)), first)
        before, then = (self.inputs[f"frame{k - 1}.{name}"][samples] for name in ("T_global", "timestamp"))
        return Motion((pose.inverse() @ before).float(), (time - then).float(), first)


def close(actual, expected, atol=1e-4):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def compare_boxes(head, output, recalled, expected, sequence):
    """Compares the outputs of one frame of a box head; `expected` are those of the frame by name."""
    instances = output.instances
    sequence.close("boxes", instances.anchors, expected["prediction"])
    sequence.close("logits", instances.logits, expected["classification"])
    sequence.close("logits", instances.quality, expected["quality"])
    assert torch.equal(instances.ids.long(), expected["instance_id"])
    close(recalled.interval, expected["time_interval"], 1e-6)
    if "mask" in expected:
        assert torch.equal(recalled.fresh, expected["mask"].bool())
    if "temp_anchor" in expected:
        wanted = expected["temp_anchor"]
        close(recalled.memory.anchor / wanted.abs().max(), wanted / wanted.abs().max(), 1e-5)
    memory = output.memory
    if "state.cached_feature" in expected:
        sequence.close("features", memory.feature, expected["state.cached_feature"])
    sequence.close("boxes", memory.anchor, expected["state.cached_anchor"])
    sequence.close("scores", memory.confidence, expected["state.confidence"])
    confidence = head.instance_bank.confidence(instances.logits[-1], recalled)
    sequence.close("scores", confidence, expected["state.temp_confidence"])
    padded = torch.nn.functional.pad(memory.ids.long(), (0, head.config.anchors - head.config.remembered), value=-1)
    assert torch.equal(padded, expected["state.instance_id"])
    assert (memory.next_id == expected["state.prev_id"]).all()
    score, label = instances.logits[-1].sigmoid().max(-1, keepdim=True)
    kinds = {"decoded": (score, label)}
    if "decoded_multi.scores_3d" in expected:
        every = torch.arange(head.config.classes).expand(*score.shape[:2], -1)
        kinds["decoded_multi"] = instances.logits[-1].sigmoid(), every
    for name, (scores, labels) in kinds.items():
        ranked = rank_boxes(scores, labels, instances.quality[-1], instances.anchors[-1], head.config.max_boxes)
        sequence.close("scores", ranked.score, expected[f"{name}.scores_3d"])
        sequence.close("scores", ranked.class_score, expected[f"{name}.cls_scores"])
        assert torch.equal(ranked.label, expected[f"{name}.labels_3d"])
        sequence.close("boxes", decoded(ranked.boxes), expected[f"{name}.boxes_3d"])
        if name == "decoded":
            assert torch.equal(instances.ids.long().gather(1, ranked.instance), expected["decoded.instance_ids"])


def of_frame(outputs: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): x for name, x in outputs.items() if name.startswith(prefix)}


def record_layers(head) -> dict:
    """Records the results of all operations by their published names, and what enters the refinements."""
    found = {"refine_input": []}

    def keep(number, name):
        def hook(module, arguments, result):
            found[f"layer{number:02d}.{OPERATIONS.get(name, name)}"] = result

        return hook

    for number, (name, layer) in enumerate(zip(head.operations, head.layers, strict=True)):
        layer.register_forward_hook(keep(number, name))
        if name == "refine":
            layer.register_forward_hook(lambda module, arguments, result: found["refine_input"].append(arguments[0]))
    return found


def check_layers(found: dict, expected: dict, sequence: Sequence):
    """Compares what `record_layers` found with the golden results of operations of sample 0."""
    for name, wanted in expected.items():
        if name.startswith("layer"):
            sequence.close("features", found[name][:1], wanted)


@pytest.mark.parametrize(
    ("folder", "prefix", "of_head"), [("sparse4d", "head.", ""), ("sparsedrive", "head.det_head.", "det.")]
)
@torch.no_grad()
def test_one_sample_gives_the_ids_of_a_batch_of_one(golden, folder, prefix, of_head):
    sequence, expected = Sequence(golden / folder), load_file(golden / folder / "outputs.safetensors")
    changes = {} if folder == "sparse4d" else SPARSEDRIVE
    config = network_config(sequence.published, box_config(sequence.published, **changes), drop_outside=False)
    head = load_head(box_head(config), load_file(golden / folder / "params.safetensors"), prefix)
    memory, first = head.instance_bank.empty(1), slice(0, 1)
    for k in sequence.frames:
        of_this = of_frame(expected, f"frame{k}.{of_head}")
        output = head(sequence.view(k, first), memory, sequence.motion(k, first))
        sequence.close("boxes", output.instances.anchors, of_this["prediction"][:, first])
        ids = output.instances.ids.long()
        assert torch.equal(ids, of_this["single.instance_id"])
        score, label = output.instances.logits[-1].sigmoid().max(-1, keepdim=True)
        quality, anchors = output.instances.quality[-1], output.instances.anchors[-1]
        ranked = rank_boxes(score, label, quality, anchors, sequence.published["num_output"])
        assert torch.equal(ids.gather(1, ranked.instance), of_this["single.decoded.instance_ids"])
        memory = output.memory


@pytest.mark.parametrize("implementation", ["embedding_bag", "plain"])
@pytest.mark.parametrize("sampling", ["outputs", "outputs_kernel"])
@torch.no_grad()
def test_sparse4d_frames(golden, sampling, implementation):
    """Boxes, ids and memory over all frames: with history, a pause, and new scenes without a reset."""
    folder = golden / "sparse4d"
    sequence, expected = Sequence(folder), load_file(folder / f"{sampling}.safetensors")
    published = sequence.published
    config = network_config(published, box_config(published), drop_outside=sampling == "outputs_kernel")
    names = [OPERATIONS.get(name, name) for name in operations(config.boxes)]
    assert names == published["operation_order"]
    head = load_head(box_head(config), load_file(folder / "params.safetensors"), "head.")
    memory = head.instance_bank.empty(published["batch"])
    layers = record_layers(head)
    with preferred_implementation(implementation):
        for k in sequence.frames:
            of_this = of_frame(expected, f"frame{k}.")
            layers["refine_input"].clear()
            motion = sequence.motion(k)
            recalled = head.instance_bank.recall(memory, motion)
            output = head(sequence.view(k), memory, motion)
            check_layers(layers, of_this, sequence)
            if "refine_input" in of_this:
                sequence.close("features", torch.stack(layers["refine_input"]), of_this["refine_input"])
            compare_boxes(head, output, recalled, of_this, sequence)
            memory = output.memory


def line_config(published: dict, remembered: int) -> LineHeadConfig:
    lines = published["map"]
    return LineHeadConfig(
        anchors=lines["num_anchor"],
        remembered=remembered,
        layers=lines["num_decoder"],
        classes=lines["num_classes"],
        feed_forward=lines["feedforward_channels"],
        confidence_decay=published["confidence_decay"],
        max_interval=published["max_time_interval"],
        default_interval=published["default_time_interval"],
        points=lines["num_sample"],
        learned_points=lines["num_learnable_pts"],
        heights=tuple(map(float, lines["fix_height"])),
        ground=lines["ground_height"],
        size=tuple(map(float, lines["roi_size"])),
    )


@pytest.mark.parametrize("sampling", ["outputs", "outputs_kernel"])
@torch.no_grad()
def test_sparsedrive_boxes(golden, sampling):
    folder = golden / "sparsedrive"
    sequence, expected = Sequence(folder), load_file(folder / f"{sampling}.safetensors")
    published = sequence.published
    boxes = box_config(published, **SPARSEDRIVE)
    config = network_config(published, boxes, drop_outside=sampling == "outputs_kernel")
    assert [OPERATIONS.get(name, name) for name in operations(boxes)] == published["operation_order"]
    head = load_head(box_head(config), load_file(folder / "params.safetensors"), "head.det_head.")
    memory = head.instance_bank.empty(published["batch"])
    layers = record_layers(head)
    for k in sequence.frames:
        of_this = of_frame(expected, f"frame{k}.det.")
        motion = sequence.motion(k)
        recalled = head.instance_bank.recall(memory, motion)
        output = head(sequence.view(k), memory, motion)
        check_layers(layers, of_this, sequence)
        compare_boxes(head, output, recalled, of_this, sequence)
        if "instance_feature" in of_this:
            sequence.close("features", output.feature, of_this["instance_feature"])
            sequence.close("features", head.anchor_encoder(of_this["prediction"][-1]), of_this["anchor_embed"])
        memory = output.memory


@pytest.mark.parametrize("kind", ["map", "map_temporal"])
@pytest.mark.parametrize("sampling", ["outputs", "outputs_kernel"])
@torch.no_grad()
def test_sparsedrive_lines(golden, sampling, kind):
    """Lines of stage 1, and with the memory that stage 2 has."""
    folder = golden / "sparsedrive"
    sequence, expected = Sequence(folder), load_file(folder / f"{sampling}.safetensors")
    published = sequence.published
    lines = line_config(published, published["map"]["num_temp_instances_temporal"] if kind == "map_temporal" else 0)
    config = network_config(published, box_config(published), drop_outside=sampling == "outputs_kernel")
    assert [OPERATIONS.get(name, name) for name in operations(lines)] == published["map"]["operation_order"]
    head = load_head(line_head(config, lines), load_file(folder / "params.safetensors"), "head.map_head.")
    memory = head.instance_bank.empty(published["batch"])
    layers = record_layers(head)
    for k in sequence.frames:
        of_this = of_frame(expected, f"frame{k}.{kind}.")
        motion = sequence.motion(k)
        recalled = head.instance_bank.recall(memory, motion)
        output = head(sequence.view(k), memory, motion)
        instances, memory = output.instances, output.memory
        check_layers(layers, of_this, sequence)
        sequence.close("boxes", instances.anchors, of_this["prediction"])
        sequence.close("logits", instances.logits, of_this["classification"])
        score, label, points = rank_lines(instances.logits[-1], instances.anchors[-1])
        sequence.close("scores", score, of_this["decoded.scores"])
        assert torch.equal(label, of_this["decoded.labels"])
        sequence.close("boxes", points, of_this["decoded.vectors"])
        if "instance_feature" in of_this:
            sequence.close("features", output.feature, of_this["instance_feature"])
            sequence.close("features", head.anchor_encoder(of_this["prediction"][-1]), of_this["anchor_embed"])
        if "mask" in of_this:
            assert torch.equal(recalled.fresh, of_this["mask"].bool())
        if "temp_anchor" in of_this:
            wanted = of_this["temp_anchor"]
            close(recalled.memory.anchor / wanted.abs().max(), wanted / wanted.abs().max(), 1e-5)
        if "state.cached_feature" in of_this:
            sequence.close("features", memory.feature, of_this["state.cached_feature"])
        if "time_interval" in of_this:
            close(recalled.interval, of_this["time_interval"], 1e-6)
        if "state.cached_anchor" in of_this:
            sequence.close("boxes", memory.anchor, of_this["state.cached_anchor"])
            close(memory.confidence, of_this["state.confidence"])
            confidence = head.instance_bank.confidence(instances.logits[-1], recalled)
            close(confidence, of_this["state.temp_confidence"])
