"""Measured ranges of float32 values, compared with closed forms and PyTorch."""

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from conftest import RAW
from onnx import TensorProto, helper, numpy_helper

from perception.export.contract import ImageInputs
from perception.export.headroom import RangeMonitor
from perception.export.parity import fitted_frame
from perception.export.replay import camera_frame, frame_inputs, replay_frames

VALUES = np.linspace(-20, 20, 401, dtype=np.float32)[None]  # a step of 0.1


def quantized_product(zero: np.ndarray, scale: float, steps: int = 1):
    """Creates one layer `network.layer` with quantized input and per-channel weight: [1, 401] -> [1, 2]."""
    generator = np.random.default_rng(0)
    weight = generator.integers(-100, 100, (401, 2)).astype(np.int8)
    constants = {
        "scale": np.float32(scale), "zero": zero, "network.layer.weight_quantized": weight,
        "weight_scale": np.array([0.5, 0.25], np.float32), "weight_zero": np.zeros(2, np.int8),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
        helper.make_node("DequantizeLinear", ["network.layer.weight_quantized", "weight_scale", "weight_zero"], ["w"]),
        helper.make_node("MatMul", ["dq", "w"], ["product"], name="layer"),
    ]
    nodes[2].attribute.append(helper.make_attribute("axis", 1))
    graph = helper.make_graph(
        nodes, "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 401])],
        [helper.make_tensor_value_info("product", TensorProto.FLOAT, [1, 2])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)]), weight * np.array([0.5, 0.25])


@pytest.mark.parametrize(
    ("zero", "scale", "low", "high"),
    [
        (np.int8(0), 0.1, -12.9, 12.8),  # -128..127 steps and one more
        (np.uint8(10), 0.1, -1.1, 24.6),
        (ml_dtypes.float8_e4m3fn(0), 1 / 64, -7.5, 7.5),  # 448 and the step of 32
    ],
)
def test_values_outside_a_quantization_range(zero, scale, low, high):
    model, _ = quantized_product(np.asarray(zero), scale)
    monitor = RangeMonitor(model)
    monitor.run({"x": VALUES})
    monitor.run({"x": VALUES / 100})
    share = ((low > VALUES) | (high < VALUES)).mean()
    (label, found), *more = monitor.saturation().items()
    assert label == "input of layer (x)" and not more and monitor.peaks() == {}
    assert found.worst == pytest.approx(share) and found.share == pytest.approx(share / 2)
    assert found.reach == pytest.approx(20 / max(-low, high))


def test_quantized_weights_keep_their_values():
    """Float16 outputs of a quantized layer are measured with the quantized weight and without clipping the input."""
    model, weight = quantized_product(np.int8(0), 0.01)
    graph = model.graph
    graph.node[3].output[0] = "whole"
    graph.node.append(helper.make_node("Cast", ["whole"], ["half"], to=TensorProto.FLOAT16))
    graph.node.append(helper.make_node("Add", ["half", "half"], ["twice"]))
    graph.node.append(helper.make_node("Cast", ["twice"], ["product"], to=TensorProto.FLOAT))
    monitor = RangeMonitor(model)
    for scale in (1, 1000, 10):
        monitor.run({"x": VALUES * np.float32(scale)})
    largest = np.abs(1000 * VALUES.astype(float) @ weight).max()
    assert largest > 65504  # infinite in the export
    assert monitor.peaks() == pytest.approx({"Cast (half)": largest, "Add (twice)": 2 * largest}, rel=1e-5)


@torch.inference_mode()
def test_peaks_equal_those_of_the_network(small_network, exports, small_town):
    """Outputs of layers over consecutive frames with a black and a white image."""
    monitor = RangeMonitor(onnx.load(exports("fp16") / "model.onnx"))
    layers = ("image_encoder.laterals.0", "box_decoder.layers.1.to_box.0", "temporal_fusion.candidate")
    largest = dict.fromkeys(layers, 0.0)

    def watch(name):
        def hook(_module, _inputs, output):
            largest[name] = max(largest[name], float(output.abs().max()))

        return hook

    modules = dict(small_network.named_modules())
    hooks = [modules[name].register_forward_hook(watch(name)) for name in layers]
    state, images = small_network.initial_state(1), ImageInputs((RAW,) * 6)
    for number, (_, frame) in enumerate(replay_frames(small_town, 6, bad_images=True)):
        given = camera_frame(frame, images)
        _, state = small_network(fitted_frame(given, images, small_network.config.image_size), state)
        monitor.run(frame_inputs(given))
        if number == 10:
            break
    for hook in hooks:
        hook.remove()
    found = {label.partition(" (")[0]: peak for label, peak in monitor.peaks().items()}  # the last: with a bias
    assert {name: found[name] for name in layers} == pytest.approx(largest, rel=0.01)
    halves = {label for label in monitor.peaks() if label.startswith(("Add", "Cast"))}
    assert len(found) > 20 and len(halves) > 10
