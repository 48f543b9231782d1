"""Exports of Sparse4D and SparseDrive: the dialect, the instance memory as inputs and outputs, ids, certificates."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from conftest import RAW
from test_sparse4d_network import SPARSE4D, SPARSEDRIVE, noisy_network

from perception.export.contract import ImageInputs, comparable_memory, memory_names
from perception.export.onnx import DeployedNetwork, example_inputs, export_onnx, trace
from perception.export.parity import certify
from perception.export.quantize import relative_change
from perception.export.runtime import Runtime
from perception.inference.predictor import Predictor
from perception.models.base import memory_tensors, remembers, with_tensors
from perception.types import CameraRig

MEMORY = ("feature", "anchor", "confidence", "ids", "next_id")
SHORT = {"layers": 2}


def small(name: str):
    """A small network: Sparse4D samples all cameras, SparseDrive the best two of each instance."""
    if name == "sparse4d":
        return noisy_network(replace(SPARSE4D, boxes=replace(SPARSE4D.boxes, **SHORT)))
    boxes, lines = replace(SPARSEDRIVE.boxes, **SHORT), replace(SPARSEDRIVE.lines, **SHORT)
    return noisy_network(replace(SPARSEDRIVE, boxes=boxes, lines=lines, best_cameras=2))


@pytest.fixture(scope="module")
def traced():
    """Small networks and their graphs by name, each traced on first use."""

    @cache
    def make(name: str):
        network, images = small(name), ImageInputs((RAW,) * 6)
        return network, trace(DeployedNetwork(network, images).eval(), example_inputs(network, images))

    return make


def test_the_memory_has_named_parts():
    network = noisy_network(SPARSE4D)
    memory = network.initial_state(1)
    parts = memory_tensors(memory)
    assert list(parts) == [f"memory_boxes_{name}" for name in MEMORY] and remembers(network)
    changed = with_tensors(memory, [part + 1 for part in parts.values()])
    assert (changed.boxes.feature == 1).all() and changed.denoising.feature.numel() == 0
    assert memory_names(["image_0", "memory", "memory_boxes_ids", "is_first"]) == ["memory", "memory_boxes_ids"]
    arrays = {name: part.numpy() for name, part in parts.items()}
    assert {name: rows.shape for name, rows in comparable_memory(arrays).items()} == {"memory_boxes": (24, 44)}
    rng = np.random.default_rng(0)
    frames = {f"new_{name}": rng.normal(size=(2, *x.shape)).astype(x.dtype) for name, x in arrays.items()}
    shuffled = {name: x[:, :, ::-1] for name, x in frames.items()}
    assert relative_change(frames, shuffled) == 0  # the order of instances does not count
    assert relative_change(frames, {name: x + x.dtype.type(1) for name, x in frames.items()}) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparse4d", "sparsedrive"])
def test_exports_are_certified(name, traced, small_town, tmp_path):
    """A certificate over 40 frames of two scenes in float32 and float16, and the same ids live."""
    network, graph = traced(name)
    assert "CumSum" not in {node.op_type for node in graph.graph.node}
    folder = export_onnx(network, tmp_path / "fp32", raw_size=RAW, graph=graph)
    contract = json.loads((folder / "contract.json").read_text())
    inputs, outputs = ({x["name"]: x for x in contract[side]} for side in ("inputs", "outputs"))
    assert [x for x in inputs if x.startswith("memory")] == [f"memory_boxes_{part}" for part in MEMORY]
    assert "float32" != inputs["memory_boxes_ids"]["dtype"] == outputs["box_id"]["dtype"] == "int32"
    assert "new_memory_boxes_ids of the previous frame" in inputs["memory_boxes_ids"]["meaning"]
    found = certify(network, folder, small_town)
    assert found.failures == [] and set(found.replays[0].raw) >= {"memory_boxes", "raw_box"}
    predictor, runtime = Predictor(network, precision="float32", min_seen=0), Runtime(folder, min_seen=0)
    for k in range(4):
        of_sample = small_town[k].frames
        given = list(of_sample.images[0].permute(0, 2, 3, 1).numpy())
        rig = CameraRig(*(x[0].numpy() for x in of_sample.rig))
        one, other = (live.step(given, rig, small_town.ego_pose(k), 0.5 * k) for live in (predictor, runtime))
        np.testing.assert_allclose(other.boxes.center, one.boxes.center.numpy(), atol=1e-3)
        assert one.ids.boxes.tolist() == other.ids.boxes.tolist()
    assert runtime.memories()["memory_boxes_next_id"].item() == 40 + 3 * 16 and not runtime.memory().size
    runtime.reset()
    assert not any(part.any() for part in runtime.memories().values())
    half = certify(
        network, export_onnx(network, tmp_path / "fp16", raw_size=RAW, graph=graph, precision="fp16"), small_town
    )
    assert half.failures == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "for_cpu"), [("sparse4d", True), ("sparsedrive", False)])
def test_an_export_in_eight_bits(name, for_cpu, traced, small_town, tmp_path):
    """Quantization ranges and sensitivities are measured with the memory of instances fed back."""
    network, graph = traced(name)
    folder = export_onnx(
        network, tmp_path, raw_size=RAW, precision="int8", for_cpu=for_cpu, calibration=small_town, graph=graph
    )
    contract = json.loads((folder / "contract.json").read_text())
    report = contract["quantization"]
    assert "image_encoder.neck" in report["groups"]
    assert report["together"] < 0.05  # at least one group is quantized, though it may change more than MAX_CHANGE
    assert for_cpu or all(contract["checked"].values())  # unsigned activations are for CPUs only
    with torch.inference_mode():
        assert certify(network, folder, small_town).failures == []
