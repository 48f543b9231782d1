"""Exports in INT8 and FP8: which layers, which ranges, and how far the outputs change."""

from collections import Counter

import numpy as np
import onnx
import pytest
from conftest import RAW, broken_export
from onnx import numpy_helper

from perception.data.nuscenes import NuScenesDataset
from perception.errors import ConfigError
from perception.export.contract import ImageInputs, read_contract
from perception.export.half import WEIGHTED, convert_to_half
from perception.export.onnx import export_onnx
from perception.export.parity import certify
from perception.export.quantize import (
    BLINDED_EVERY,
    CALIBRATION_FRAMES,
    EVALUATION_FRAMES,
    KINDS,
    MAX_CHANGE,
    SMALLEST_WORK,
    Quantizer,
    record_frames,
    relative_change,
    run_frames,
)  # fmt: skip
from perception.export.replay import camera_frame, frame_inputs, replay_frames
from perception.models.checkpoint import load_model
from perception.synthetic import VERSION, simulate
from perception.synthetic.sensors import FIVE_CAMERAS, SIX_CAMERAS


def blinded(frames, grey):
    """Returns by frame the present cameras whose image has one constant grey value."""
    cameras = [[n for n in range(6) if m["present"][n] and (m[f"image_{n}"] == grey).all()] for m in frames]
    return {number: found for number, found in enumerate(cameras) if found}


def test_bad_images_of_a_replay(small_town, other_rig_town):
    """With `bad_images`, each scene has one black and one white image, and nothing else changes."""
    images = ImageInputs((RAW,) * 6)

    def replayed(town, bad_images):
        return [frame_inputs(camera_frame(x, images)) for _, x in replay_frames(town, 6, bad_images=bad_images)]

    usual, bad = (replayed(small_town, bad_images) for bad_images in (False, True))
    assert not blinded(usual, 0) and not blinded(usual, 255)
    black, white = blinded(bad, 0), blinded(bad, 255)
    assert list(black) == [4, 24] and list(white) == [8, 28]
    assert {len(cameras) for cameras in (*black.values(), *white.values())} == {1}
    for number, (one, other) in enumerate(zip(usual, bad, strict=True)):
        gone = {f"image_{n}" for n in (black | white).get(number, [])}
        assert {name for name in one if not np.array_equal(one[name], other[name])} == gone
    five = replayed(other_rig_town, True)
    assert not any(inputs["present"][5] for inputs in five)
    assert len(blinded(five, 0)) == len(blinded(five, 255)) == 2


def test_calibration_data_has_blinded_cameras(small_graph, small_town):
    frames = record_frames(small_graph, small_town, ImageInputs((RAW,) * 6))
    assert len(frames) == CALIBRATION_FRAMES + 2 * CALIBRATION_FRAMES // BLINDED_EVERY + EVALUATION_FRAMES
    black, white = blinded(frames, 0), blinded(frames, 255)
    assert len(black) == len(white) == CALIBRATION_FRAMES // BLINDED_EVERY
    assert max(*black, *white) < len(frames) - EVALUATION_FRAMES
    for number in black:  # a repeated frame
        assert np.array_equal(frames[number]["memory"], frames[number - 1]["memory"])
        assert np.array_equal(frames[number]["ego_from_prev"], frames[number - 1]["ego_from_prev"])
    assert len({camera for found in (*black.values(), *white.values()) for camera in found}) > 2


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_rare_large_activations_are_inside_the_range(kind):
    """Few values hold much of what a layer computes: 50 of a million are ten times as large as all others."""
    import onnxruntime
    from onnx import TensorProto, helper

    weight = numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "network.layer.weight")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 1000, 1000]) for name in ("input", "output")]
    node = helper.make_node("Conv", ["input", "network.layer.weight"], ["output"], name="conv")
    graph = helper.make_graph([node], "layer", ends[:1], ends[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    values = np.random.default_rng(0).uniform(0, 1, (1, 1, 1000, 1000)).astype(np.float32)
    values.flat[::20_000] = 10.0
    quantizer = Quantizer(model, [{"input": values}], kind)
    marked = quantizer.quantized(quantizer.groups).SerializeToString()
    (found,) = onnxruntime.InferenceSession(marked, providers=["CPUExecutionProvider"]).run(None, {"input": values})
    assert np.abs(found - values).max() < 10 / 127


def test_relative_change_weights_queries_by_score_and_ignores_their_order():
    generator = np.random.default_rng(0)
    wanted = {
        "raw_box_logits": generator.normal(-6, 0.1, (2, 5, 3)),
        "raw_box_params": generator.normal(0, 10, (2, 5, 4)),
    }
    wanted["raw_box_logits"][:, 0] = 4.0  # one box with a high score
    other_order = {name: values[:, ::-1] for name, values in wanted.items()}
    assert relative_change(wanted, other_order) == pytest.approx(0)
    sure, unsure = ({name: values.copy() for name, values in wanted.items()} for _ in range(2))
    sure["raw_box_params"][:, 0] += 1.0
    unsure["raw_box_params"][:, 1] += 1.0
    spread = wanted["raw_box_params"].std()
    weights = 1 / (1 + np.exp(-wanted["raw_box_logits"].max(-1)))
    assert relative_change(wanted, sure) == pytest.approx(weights[:, 0].sum() / weights.sum() / spread / 2)
    assert relative_change(wanted, unsure) < 0.02 * relative_change(wanted, sure)


def narrow_first_range(graph):
    first = next(node for node in graph.node if node.op_type == "QuantizeLinear")
    scale = next(x for x in graph.initializer if x.name == first.input[1])
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) / np.float32(20), scale.name))


@pytest.mark.slow
def test_int8_where_it_changes_little(small_network, small_town, exports, tmp_path):
    """Q/DQ nodes with real ranges except in the most sensitive layers, float16 around them, and the certificate.

    The gate sees a range that is too narrow.
    """
    with pytest.raises(ConfigError, match="int8 needs a dataset"):
        export_onnx(small_network, tmp_path, raw_size=RAW, precision="int8")
    folder = exports("int8")
    report = read_contract(folder)["quantization"]
    assert report["together"] <= MAX_CHANGE and set(report["groups"]) < set(report["sensitivities"])
    assert sum(report["work"].values()) == pytest.approx(1)
    price = {name: change / report["work"][name] for name, change in report["sensitivities"].items()}
    assert price.keys() == {name for name, share in report["work"].items() if share >= SMALLEST_WORK}
    left_out = set(price) - set(report["groups"])
    assert min(price[name] for name in left_out) >= max(price[name] for name in report["groups"])
    graph = onnx.load(folder / "model.onnx").graph
    int8 = onnx.TensorProto.INT8
    weights = {x.name: x for x in graph.initializer if x.data_type == int8 and len(x.dims) > 1}
    made_by = {name: node for node in graph.node for name in node.output}
    quantized = [node for node in graph.node if node.op_type in WEIGHTED and node.input[1] in made_by]
    quantized = [node for node in quantized if made_by[node.input[1]].op_type == "DequantizeLinear"]
    assert {made_by[node.input[1]].input[0] for node in quantized} == set(weights) and len(weights) > 3
    assert all(made_by[node.input[0]].op_type == "DequantizeLinear" for node in quantized)
    scales = {x.name: x for x in graph.initializer}
    for node in quantized:  # one float32 scale per channel, as opset 17 requires
        scale = scales[made_by[node.input[1]].input[1]]
        channels = 0 if node.op_type == "Conv" else 1
        assert list(scale.dims) == [weights[made_by[node.input[1]].input[0]].dims[channels]]
        assert scale.data_type == onnx.TensorProto.FLOAT
    found = certify(small_network, folder, small_town)
    assert found.precision == "int8" and found.quantization == report and 1e-4 < found.replays[0].boxes[1] < 1
    assert "| all layers in eight bits |" in found.markdown()

    failures = certify(small_network, broken_export(folder, tmp_path, narrow_first_range), small_town).failures
    assert any("are outside their range: input of image_encoder" in text for text in failures)


@pytest.mark.slow
def test_eight_bits_of_the_trained_network(tmp_path):
    """The shipped network in INT8 passes the gates on both rigs with blinded cameras; one narrowed range fails."""
    network = load_model("nano")

    def town(seed, rig):
        root, size = tmp_path / f"town{seed}", network.config.image_size
        simulate(root, scenes=2, seed=seed, keyframes=20, split="export", image_size=size, rig=rig)
        return NuScenesDataset(root, VERSION, "export", image_size=size, cameras=[camera.name for camera in rig])

    judge, calibration, other_rig = town(0, SIX_CAMERAS), town(1, SIX_CAMERAS), town(2, FIVE_CAMERAS)
    folder = export_onnx(network, tmp_path / "int8", precision="int8", calibration=calibration)
    found = certify(network, folder, judge, other_rig=other_rig)
    assert found.failures == []
    assert found.replays[0].metrics["nds"][0] > 0.4 and found.replays[1].metrics["nds"][0] > 0.1
    assert len(found.saturation) > 20 and max(found.peaks.values()) < 1000

    found = certify(network, broken_export(folder, tmp_path, narrow_first_range), judge)
    assert any(text.startswith("nds is") for text in found.failures)
    assert any("are outside their range: input of image_encoder" in text for text in found.failures)


@pytest.mark.slow
def test_int8_for_cpus(small_network, small_town, exports, tmp_path):
    """Activations in UINT8, biases in INT32 and float32 elsewhere, for the INT8 kernels of CPUs."""
    with pytest.raises(ConfigError, match="fp16 is slow on CPUs; use fp32 or int8"):
        export_onnx(small_network, tmp_path, raw_size=RAW, precision="fp16", for_cpu=True)
    folder = exports("int8", for_cpu=True)
    graph = onnx.load(folder / "model.onnx").graph
    kinds = Counter(tensor.data_type for tensor in graph.initializer)
    assert onnx.TensorProto.FLOAT16 not in kinds
    weights = {x.name for x in graph.initializer if x.data_type == onnx.TensorProto.INT8 and len(x.dims) > 1}
    zeros = {x.name: x.data_type for x in graph.initializer}
    into = {zeros[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"}
    assert into == {onnx.TensorProto.UINT8} and len(weights) > 3
    found = certify(small_network, folder, small_town)
    assert found.precision == "int8" and 1e-4 < found.replays[0].raw["memory"][1] < 0.05


@pytest.mark.slow
def test_fp8_rounds_weights_to_three_bits(small_graph, small_town):
    """Weights in FP8 have an error of at most half of their last bit."""
    images = ImageInputs.of_rig(6, (40, 80), RAW)
    quantizer = Quantizer(small_graph, record_frames(small_graph, small_town, images)[:4], "fp8")
    marked = convert_to_half(quantizer.quantized(quantizer.groups)).graph
    fp8 = {x.name: x for x in marked.initializer if x.data_type == onnx.TensorProto.FLOAT8E4M3FN and len(x.dims) > 1}
    original = {x.name: numpy_helper.to_array(x) for x in small_graph.graph.initializer}
    scales = {x.name: numpy_helper.to_array(x).astype(np.float64) for x in marked.initializer}
    compared = 0
    for node in marked.node:
        name = node.input[0].removesuffix("_quantized")
        if node.op_type != "DequantizeLinear" or name not in original:
            continue
        wanted, axis = original[name], node.attribute[0].i
        scale = scales[node.input[1]].reshape([-1 if k == axis else 1 for k in range(wanted.ndim)])
        found = numpy_helper.to_array(fp8[node.input[0]]).astype(np.float64) * scale
        # Half a unit of three bits, half of the smallest step, and up to 2^-11 for a scale in float16.
        bound = np.abs(wanted) * (2**-4 + 2**-11) + scale * 2**-10
        assert (np.abs(found - wanted) <= bound).all()
        compared += 1
    assert compared > 3


@pytest.mark.slow
def test_graph_optimisations_keep_a_relu_before_a_quantized_layer(small_graph, small_town):
    """Graph optimisations of ONNX Runtime do not change the outputs, for every kind of quantization."""
    import onnxruntime

    frames = record_frames(small_graph, small_town, ImageInputs((RAW,) * 6))
    for kind in KINDS:
        marked = Quantizer(small_graph, frames[:4], kind).quantized(
            ["image_encoder.backbone.stages.1", "line_decoder.layers.0"]
        )
        made_by = {name: node.op_type for node in marked.graph.node for name in node.output}
        from_marks = [n for n in marked.graph.node if made_by.get((*n.input, "", "")[1]) == "DequantizeLinear"]
        assert {"Conv", "MatMul"} <= {node.op_type for node in from_marks}
        found = run_frames(marked, frames[-1:], kind)["new_memory"][0]
        plain = onnxruntime.SessionOptions()
        plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(marked.SerializeToString(), plain, providers=["CPUExecutionProvider"])
        expected = session.run(["new_memory"], dict(frames[-1]))[0]
        assert np.abs(found - expected).mean() < 0.01 * expected.std(), kind
