"""The second executor of exports, and certificates that run a graph as an old parser reads it."""

import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.version_converter import convert_version

from perception.errors import ConfigError
from perception.export.contract import read_contract
from perception.export.parity import certify
from perception.export.reference import ReferenceSession, grid_sample, resize_linear
from perception.export.replay import camera_frame, frame_inputs, replay_frames
from perception.export.runtime import Runtime, session_options
from perception.export.second_reading import LARGEST, READINGS, SHARES, SecondExecutor, as_parsed

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(2, 4, 6)).astype(np.float32)


def model_of(nodes, inputs, outputs, constants=(), opset=17):
    """Creates a model of nodes; inputs and outputs by name with type and shape."""
    infos = [[helper.make_tensor_value_info(name, *kind) for name, kind in side.items()] for side in (inputs, outputs)]
    tensors = [numpy_helper.from_array(value, name) for name, value in dict(constants).items()]
    graph = helper.make_graph(nodes, "g", *infos, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def single(kind, constants=(), opset=17, outputs=1, inputs=("x",), **attributes):
    """Creates a model x [2, 4, 6] -> y, ... of one node."""
    names = ["y", *(f"y{k}" for k in range(1, outputs))]
    node = helper.make_node(kind, [*inputs, *dict(constants)], names, name="n", **attributes)
    unknown = {name: (TensorProto.FLOAT, None) for name in names}
    return model_of([node], {"x": (TensorProto.FLOAT, [2, 4, 6])}, unknown, constants, opset)


def by_runtime(model, inputs):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), session_options("fp32"), providers=["CPUExecutionProvider"]
    )
    return dict(zip([x.name for x in session.get_outputs()], session.run(None, inputs), strict=True))


def points():
    """Returns sampling locations: random, far outside, on borders, on pixel centres and between them."""
    anywhere = GENERATOR.uniform(-1.4, 1.4, (2, 9, 11, 2))
    anywhere[0, 0] = GENERATOR.uniform(-1e4, 1e4, (11, 2))
    special = np.array([-1, 1, -1 - 1e-6, 1 + 1e-6, 0, -1 + 1 / 7, 1 - 1 / 5, -1 - 1 / 7, 1 + 1 / 5, 1e4, -1e4])
    anywhere[1, 0, :, 0], anywhere[1, 1, :, 1] = special, special
    anywhere[1, 2], anywhere[1, 3] = special[:, None], np.stack([special, -special], -1)
    return anywhere.astype(np.float32)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_sampling_equals_torch_and_onnx_runtime(mode, padding, align_corners):
    x, grid = GENERATOR.normal(size=(2, 3, 5, 7)).astype(np.float32), points()
    found = grid_sample(x, grid, mode.replace("bi", ""), padding, align_corners)
    wanted = torch.nn.functional.grid_sample(
        torch.from_numpy(x), torch.from_numpy(grid), mode, padding, align_corners
    ).numpy()
    node = helper.make_node(
        "GridSample", ["x", "grid"], ["y"], mode=mode, padding_mode=padding, align_corners=int(align_corners)
    )
    inputs = {"x": (TensorProto.FLOAT, x.shape), "grid": (TensorProto.FLOAT, grid.shape)}
    model = model_of([node], inputs, {"y": (TensorProto.FLOAT, None)})
    assert found == pytest.approx(wanted, abs=2e-5)
    assert found == pytest.approx(by_runtime(model, {"x": x, "grid": grid})["y"], abs=2e-5)
    (through_session,) = ReferenceSession(model).run({"x": x, "grid": grid}).values()
    assert np.array_equal(through_session, found)


def test_unsupported_sampling_is_rejected():
    node = helper.make_node("GridSample", ["x", "grid"], ["y"], name="s", padding_mode="reflection")
    kinds = {"x": (TensorProto.FLOAT, [1, 1, 2, 2]), "grid": (TensorProto.FLOAT, [1, 1, 1, 2])}
    model = model_of([node], kinds, {"y": (TensorProto.FLOAT, None)})
    with pytest.raises(ConfigError, match="GridSample s: linear with reflection of rank 4 cannot be run"):
        ReferenceSession(model).run(
            {"x": np.zeros((1, 1, 2, 2), np.float32), "grid": np.zeros((1, 1, 1, 2), np.float32)}
        )


def test_resizing_equals_torch():
    x = GENERATOR.normal(size=(2, 3, 5, 7)).astype(np.float32)
    for size in ((10, 14), (3, 20), (5, 4)):
        scales = (1.0, 1.0, size[0] / 5, size[1] / 7)
        wanted = torch.nn.functional.interpolate(torch.from_numpy(x), size, mode="bilinear", align_corners=False)
        assert resize_linear(x, (2, 3, *size), scales) == pytest.approx(wanted.numpy(), abs=1e-5)


def test_other_operators_equal_onnx_runtime():
    """The reimplemented operators, in the forms that `onnx.reference` runs slowly or not at all."""
    image = {"x": (TensorProto.FLOAT, [2, 4, 9, 11])}
    x = GENERATOR.normal(size=(2, 4, 9, 11)).astype(np.float32)
    weight, bias = GENERATOR.normal(size=(6, 2, 3, 3)).astype(np.float32), np.arange(6, dtype=np.float32)
    whole = GENERATOR.integers(-128, 128, (6, 5)).astype(np.int8)
    elements = GENERATOR.integers(-9, 9, (2, 3, 7, 11))
    tuples = np.stack([GENERATOR.integers(0, size, (3, 5)) for size in (2, 4)], -1)
    scales = np.linspace(0.1, 1, 5).astype(np.float32)
    nodes = [
        helper.make_node(
            "Conv", ["x", "w", "b"], ["conv"], group=2, pads=[1, 0, 2, 1], strides=[2, 1], dilations=[1, 2]
        ),
        helper.make_node("Conv", ["x", "w"], ["same"], group=2, auto_pad="SAME_UPPER"),
        helper.make_node("MaxPool", ["x"], ["pool"], kernel_shape=[3, 2], strides=[2, 2], pads=[1, 1, 1, 0]),
        helper.make_node("Resize", ["x", "", "", "sizes"], ["resized"], mode="linear"),
        helper.make_node("Resize", ["x", "", "scales"], ["nearest"], mode="nearest", nearest_mode="floor"),
        helper.make_node("GatherElements", ["x", "elements"], ["taken"], axis=2),
        helper.make_node("GatherND", ["x", "tuples"], ["points"]),
        helper.make_node("DequantizeLinear", ["whole", "channel_scales", "zeros"], ["real"], axis=1),
        helper.make_node("QuantizeLinear", ["x", "scale", "middle"], ["bytes"]),
        helper.make_node("DequantizeLinear", ["bytes", "scale", "middle"], ["again"]),
    ]
    constants = {
        "w": weight, "b": bias, "sizes": np.array([2, 4, 18, 5]), "scales": np.array([1, 1, 2, 0.5], np.float32),
        "elements": elements, "tuples": tuples, "whole": whole, "channel_scales": scales,
        "zeros": np.arange(5, dtype=np.int8), "scale": np.float32(0.02), "middle": np.uint8(117),
    }  # fmt: skip
    names = [node.output[0] for node in nodes]
    kinds = {name: (TensorProto.UINT8 if name == "bytes" else TensorProto.FLOAT, None) for name in names}
    model = model_of(nodes, image, kinds, constants)
    wanted, found = by_runtime(model, {"x": x}), ReferenceSession(model).run({"x": x})
    for name in names:
        assert found[name].dtype == wanted[name].dtype
        assert found[name] == pytest.approx(wanted[name], abs=1e-5), name


def test_float16_operators_round_once():
    """A float16 softmax is computed in float32 and rounded at the end, not after every step."""
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Softmax", ["half"], ["y"], axis=-1),
    ]
    model = model_of(nodes, {"x": (TensorProto.FLOAT, [64, 9])}, {"y": (TensorProto.FLOAT16, [64, 9])})
    x = GENERATOR.normal(size=(64, 9)).astype(np.float16)
    found = ReferenceSession(model).run({"x": x.astype(np.float32)})
    powers = np.exp(x.astype(np.float64))
    assert list(found) == ["y"] and found["y"].dtype == np.float16
    assert np.array_equal(found["y"], (powers / powers.sum(-1, keepdims=True)).astype(np.float16))


def test_errors_are_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r"onnx\.reference cannot run the graph"):
        ReferenceSession(single("NoSuchOperator"))
    path = tmp_path / "model.onnx"
    onnx.save(single("Reshape", {"shape": np.array([5, 5])}), path)
    with pytest.raises(ConfigError, match="Reshape n cannot be run: cannot reshape"):
        ReferenceSession(path).run({"x": X})


# Readings of the TensorRT 8.6 parser, compared with results by hand.


def test_all_axes_are_reduced_where_they_are_an_input():
    for kind, reduce in (("Max", np.max), ("Min", np.min), ("Mean", np.mean), ("L2", np.linalg.norm)):
        model = single(f"Reduce{kind}", {"axes": np.array([1])}, opset=18, keepdims=1)
        parsed, other = as_parsed(model, "TensorRT 8.6")
        assert other == [f"Reduce{kind} n"]
        found = ReferenceSession(parsed).run({"x": X})["y"]
        assert found.shape == (1, 1, 1) and found.item() == pytest.approx(reduce(X.ravel()), rel=1e-5)
        same, other = as_parsed(model, "TensorRT 10.0")
        assert other == [] and ReferenceSession(same).run({"x": X})["y"].shape == (2, 1, 6)
    attribute = single("ReduceMax", axes=[1])
    total = single("ReduceSum", {"axes": np.array([1])})
    for model in (attribute, total):  # forms that the parser reads correctly
        parsed, other = as_parsed(model, "TensorRT 8.6")
        assert other == [] and ReferenceSession(parsed).run({"x": X})["y"].shape == (2, 1, 6)
    as_it_is = single("ReduceSum", opset=18, noop_with_empty_axes=1)
    assert ReferenceSession(as_it_is).run({"x": X})["y"].shape == (2, 4, 6)
    assert ReferenceSession(as_parsed(as_it_is, "TensorRT 8.6")[0]).run({"x": X})["y"].size == 1


def test_unknown_modes_are_nearest():
    x, grid = GENERATOR.normal(size=(2, 3, 5, 7)).astype(np.float32), points()
    kinds = {"x": (TensorProto.FLOAT, x.shape), "grid": (TensorProto.FLOAT, grid.shape)}
    for mode, opset, wanted in (
        ("linear", 20, "nearest"),
        ("cubic", 20, "nearest"),
        (None, 20, "linear"),  # the parser's default, too, is a good one
        ("bilinear", 17, "linear"),
        ("nearest", 17, "nearest"),
    ):
        node = helper.make_node("GridSample", ["x", "grid"], ["y"], name="s", **({"mode": mode} if mode else {}))
        model = model_of([node], kinds, {"y": (TensorProto.FLOAT, None)}, opset=opset)
        for runtime in READINGS:
            parsed, other = as_parsed(model, runtime)
            assert other == (["GridSample s"] if mode in ("linear", "cubic") else [])
            found = ReferenceSession(parsed).run({"x": x, "grid": grid})["y"]
            assert np.array_equal(found, grid_sample(x, grid, wanted, "zeros", False))


def test_other_misread_forms():
    parts = single("Split", opset=18, outputs=4, axis=2, num_outputs=4)  # ONNX: 2, 2, 2, 0
    parsed, other = as_parsed(parts, "TensorRT 8.6")
    assert other == ["Split n"]
    assert [part.shape[2] for part in ReferenceSession(parsed).run({"x": X}).values()] == [1, 1, 1, 1]
    assert as_parsed(single("Split", opset=18, outputs=2, axis=2, num_outputs=2), "TensorRT 8.6")[1] == []

    part = single("Shape", opset=15, start=1)
    assert ReferenceSession(part).run({"x": X})["y"].tolist() == [4, 6]
    assert ReferenceSession(as_parsed(part, "TensorRT 8.6")[0]).run({"x": X})["y"].tolist() == [2, 4, 6]

    number = model_of(
        [helper.make_node("Constant", [], ["y"], name="c", value_int=7)], {}, {"y": (TensorProto.INT64, [])}
    )
    assert ReferenceSession(number).run({})["y"] == 7
    assert ReferenceSession(as_parsed(number, "TensorRT 8.6")[0]).run({})["y"] == 0

    far = {"bound": np.array([2**40])}
    node = helper.make_node("Identity", ["bound"], ["y"])
    cut = model_of([node], {}, {"y": (TensorProto.INT64, [1])}, far)
    parsed, other = as_parsed(cut, "TensorRT 8.6")
    assert other == ["constant bound"] and ReferenceSession(parsed).run({})["y"] == 2**31 - 1
    ends = {"starts": np.array([1]), "ends": np.array([2**63 - 1]), "axes": np.array([2])}
    assert as_parsed(single("Slice", ends), "TensorRT 8.6")[1] == []  # all ends after the last element are equal

    whole, scales = np.ones((3, 3), np.int8), np.array([1, 2, 3], np.float32)
    node = helper.make_node("DequantizeLinear", ["whole", "scales", "zeros"], ["y"], name="d")
    constants = {"whole": whole, "scales": scales, "zeros": np.zeros(3, np.int8)}
    columns = model_of([node], {}, {"y": (TensorProto.FLOAT, [3, 3])}, constants)
    assert ReferenceSession(columns).run({})["y"][0].tolist() == [1, 2, 3]
    for runtime in READINGS:
        assert ReferenceSession(as_parsed(columns, runtime)[0]).run({})["y"][:, 0].tolist() == [1, 2, 3]

    smooth = single("Resize", opset=18, inputs=("x", "", "scales"), mode="linear", antialias=1)
    smooth.graph.initializer.append(numpy_helper.from_array(np.array([1, 1, 0.5], np.float32), "scales"))
    parsed, other = as_parsed(smooth, "TensorRT 8.6")
    assert other == ["Resize n"]
    # Without a filter, every second pair of neighbours is averaged.
    assert ReferenceSession(parsed).run({"x": X})["y"] == pytest.approx((X[..., ::2] + X[..., 1::2]) / 2, abs=1e-6)


# Certificates.


def rewritten(folder, tmp_path, change, checked=None):
    """Copies an export and changes its graph and contract."""
    import hashlib
    import shutil

    shutil.copytree(folder, tmp_path / "rewritten")
    model = onnx.load(folder / "model.onnx")
    model = change(model) or model
    content = model.SerializeToString()
    (tmp_path / "rewritten" / "model.onnx").write_bytes(content)
    contract = json.loads((folder / "contract.json").read_text())
    contract["sha256"]["model.onnx"] = hashlib.sha256(content).hexdigest()
    contract["checked"] |= checked or {}
    (tmp_path / "rewritten" / "contract.json").write_text(json.dumps(contract))
    return tmp_path / "rewritten"


def read_again(folder, dataset, frames=2, other=None):
    """Runs the first frames in the second executor, with the graph of another folder if one is given."""
    runtime = Runtime(folder)
    second = SecondExecutor(other or folder, read_contract(other or folder), 40)
    for number, (_, frame) in enumerate(replay_frames(dataset, 6)):
        if number == frames:
            return second.result()
        memory = runtime.memory()
        for name, array in frame_inputs(camera_frame(frame, runtime.images)).items():
            runtime.inputs[name][...] = array
        runtime.run()
        second.add(runtime.inputs | {"memory": memory}, runtime.outputs | {"new_memory": runtime.memory()})


def to_opset_20(model):
    """Converts a graph to opset 20: other mode names of GridSample, axes as an input."""
    return convert_version(model, 20)


def test_the_certificate_uses_the_second_executor(small_network, fp32_export, small_town):
    found = certify(small_network, fp32_export, small_town)
    second = found.second_reading
    assert found.failures == [] and second.runtime == "TensorRT 8.6" and second.frames == 3
    assert set(second.differences) == {"memory", "raw_box", "box", "raw_line", "line"}
    assert all(0 < mean <= largest < LARGEST for largest, mean in second.differences.values())
    assert second.read_otherwise == () and second.by_reading == 0
    assert "as the parser of TensorRT 8.6 reads the graph" in found.markdown() and "| raw_box |" in found.markdown()
    assert found.as_dict()["second_reading"]["differences"]["memory"] == second.differences["memory"]
    off = replace(second, differences=second.differences | {"line": (2e-3, 1e-6)})
    assert replace(found, second_reading=off).failures == [
        "line of the second executor differs by 2.00e-03, more than 1e-03"
    ]


@pytest.mark.slow
def test_misread_modes_of_opset_20_are_found(small_network, fp32_export, small_town, tmp_path):
    """ONNX Runtime computes the outputs of the network, and the certificate still fails."""
    folder = rewritten(fp32_export, tmp_path, to_opset_20, {"TensorRT 8.6": []})
    found = certify(small_network, folder, small_town)
    second = found.second_reading
    assert max(largest for largest, _ in found.replays[0].raw.values()) < LARGEST
    assert second.runtime == "TensorRT 10.0" and {name.split()[0] for name in second.read_otherwise} == {"GridSample"}
    assert len(second.read_otherwise) == 10 and min(second.by_reading, second.differences["memory"][0]) > 0.1
    assert found.failures[0].startswith("the parser of TensorRT 10.0 misreads GridSample ")
    assert "and 7 more, and outputs change by up to" in found.failures[0]
    assert any(text.startswith("memory of the second executor differs by") for text in found.failures)


@pytest.mark.parametrize(
    "precision", ["fp32", "fp16", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("int8", "fp8"))]
)
def test_misread_nodes_are_found_in_every_precision(exports, precision, small_town, tmp_path):
    """In eight bits, rounding hides one of them from a comparison with ONNX Runtime, but not from `by_reading`."""
    folder = exports(precision)
    good = read_again(folder, small_town)
    assert good.failures(precision) == [] and good.read_otherwise == ()
    assert good.runtime == ("TensorRT 10.0" if precision == "fp8" else "TensorRT 8.6")

    def misread(first):
        def linear(model):
            for node in [node for node in model.graph.node if node.op_type == "GridSample"][first:]:
                next(attribute for attribute in node.attribute if attribute.name == "mode").s = b"linear"

        # ONNX Runtime rejects that name in this opset, so its outputs are those of the unchanged graph.
        return read_again(folder, small_town, 2, rewritten(folder, tmp_path / str(first), linear))

    one, every = misread(-1), misread(0)
    (node,) = one.read_otherwise
    assert one.failures(precision)[0].startswith(
        f"the parser of {good.runtime} misreads {node}, and outputs change by up to"
    )
    assert len(every.read_otherwise) == 10 and len(every.failures(precision)) > 1
    if precision != "fp32":
        assert good.share < SHARES[precision] < every.share / 2


def test_axes_as_an_input_are_found(fp32_export, small_town, tmp_path, monkeypatch):
    """Misread axes give a graph that cannot run, or other numbers."""
    folder = rewritten(fp32_export, tmp_path, to_opset_20)
    reduce = READINGS["TensorRT 8.6"]["ReduceL2"]
    with pytest.raises(ConfigError, match=r"misreads .*ReduceM.*, and the graph .* cannot be run \(.*Reshape"):
        read_again(folder, small_town)
    monkeypatch.setitem(READINGS, "TensorRT 8.6", {"ReduceL2": reduce})
    with pytest.raises(ConfigError, match=r"cannot be run \(Unsqueeze .* is out of bounds"):
        read_again(folder, small_town)
    lengths = [node for node in onnx.load(folder / "model.onnx").graph.node if node.op_type == "ReduceL2"]
    one = next(node.name for node in lengths if onnx.helper.get_node_attr_value(node, "keepdims"))
    monkeypatch.setitem(
        READINGS, "TensorRT 8.6", {"ReduceL2": lambda node, graph: reduce(node, graph) if node.name == one else None}
    )
    found = read_again(folder, small_town)
    assert found.by_reading > 0.1 and found.read_otherwise == (f"ReduceL2 {one}",)
    assert found.failures("fp32")[0].startswith(f"the parser of TensorRT 8.6 misreads ReduceL2 {one}, and")


@pytest.mark.slow
def test_exports_for_no_tensorrt_are_read_as_onnx_defines_them(exports, small_town):
    found = read_again(exports("int8", True), small_town)
    assert found.runtime == "" and found.failures("int8") == [] and found.share < SHARES["int8"] / 2
    assert "as ONNX defines the graph" in found.markdown()[0]
