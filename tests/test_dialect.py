"""Misread operator forms are rejected, by the table of forms and by the layers of the parsed network."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from perception.errors import ConfigError
from perception.export.dialect import FORMS, RUNTIMES, check_dialect
from perception.export.tensorrt import compare_layers, parse_graph, runtime_name

FLOAT, HALF, INT64, BOOL = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.BOOL


def graph_of(operator, inputs, opset=17, constants=(), outputs=1, name="sampled", **attributes):
    """Creates a graph of one operator; inputs have a type and a shape, constants are arrays."""
    fed = [helper.make_tensor_value_info(f"x{k}", kind, shape) for k, (kind, shape) in enumerate(inputs)]
    kept = [numpy_helper.from_array(array, f"c{k}") for k, array in enumerate(constants) if array is not None]
    names = [value.name for value in fed] + [
        f"c{k}" if array is not None else "" for k, array in enumerate(constants)
    ]  # fmt: skip
    node = helper.make_node(operator, names, [f"y{k}" for k in range(outputs)], name=name, **attributes)
    given = [helper.make_empty_tensor_value_info(output) for output in node.output]
    graph = helper.make_graph([node], "one", fed, given, kept)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


def sampling(mode="bilinear", opset=17, **attributes):
    given = {"mode": mode, "padding_mode": "zeros", "align_corners": 0} | attributes
    return graph_of("GridSample", [(FLOAT, [1, 1, 3, 4]), (FLOAT, [1, 2, 2, 2])], opset, **given)


def maximum(opset=17, **form):
    given = {"axes": [1], "keepdims": 0} | form if opset < 18 else {"keepdims": 0} | form
    constants = [np.array([1])] if "axes" not in given else []
    return graph_of("ReduceMax", [(FLOAT, [2, 3, 4])], opset, constants, **given)


INTS = np.array([1], np.int64)
READ = [
    sampling(),
    sampling("nearest", padding_mode="border", align_corners=1),
    maximum(),
    graph_of("ReduceSum", [(FLOAT, [2, 3])], constants=[INTS], keepdims=0),
    graph_of("Add", [(FLOAT, [2, 3]), (FLOAT, [3])]),
    graph_of("Clip", [(FLOAT, [2])], constants=[None, np.float32(1)]),
    graph_of("Cast", [(TensorProto.UINT8, [2])], to=FLOAT),
    graph_of("Slice", [(FLOAT, [5])], constants=[INTS, np.array([2**63 - 1]), INTS - 1]),
    graph_of("Split", [(FLOAT, [4, 6])], outputs=2, axis=1),
    graph_of("TopK", [(FLOAT, [4, 6])], constants=[INTS * 3], outputs=2, axis=1),
    graph_of("LayerNormalization", [(FLOAT, [4, 6])], constants=[np.ones(6, np.float32)] * 2, axis=-1),
    graph_of(
        "Resize", [(FLOAT, [1, 1, 4, 6])], constants=[None, None, np.array([1, 1, 8, 12])], mode="linear",
        coordinate_transformation_mode="half_pixel",
    ),
    graph_of(
        "Resize", [(FLOAT, [1, 1, 4, 6])], constants=[None, None, np.array([1, 1, 8, 12])], mode="nearest",
        coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    ),
    graph_of("Einsum", [(FLOAT, [2, 3]), (FLOAT, [4, 3])], equation="ij,kj->ik"),
]  # fmt: skip


@pytest.mark.parametrize("model", READ, ids=lambda model: model.graph.node[0].op_type)
def test_forms_that_every_parser_reads(model):
    onnx.checker.check_model(model, full_check=True)
    checked = check_dialect(model)
    assert checked.keys() == RUNTIMES.keys() and all(checked.values())
    assert checked["TensorRT 8.6"] == ["parser source read"]


ODD = [
    # mode `linear`, in an opset with this mode and in one without it
    (sampling("linear", 20), r"GridSample sampled: .*opset 20 .* read unknown modes as nearest"),
    (sampling("linear"), r"GridSample sampled: mode is 'linear'"),
    (sampling("bicubic"), r"GridSample sampled: mode is 'bicubic'"),
    (sampling(padding_mode="reflection"), r"padding_mode is 'reflection'"),
    (
        graph_of(
            "GridSample", [(FLOAT, [1, 1, 3, 4, 5]), (FLOAT, [1, 2, 2, 2, 3])], mode="bilinear", padding_mode="zeros"
        ),
        "inputs have ranks",
    ),
    (graph_of("ReduceMax", [(FLOAT, [2, 3])], constants=[INTS]), r"has 2 inputs .* TensorRT 8\.6 ignores axes"),
    (graph_of("ReduceMax", [(FLOAT, [2, 3]), (INT64, [1])], 19), r"input 1 is not constant"),
    (graph_of("ReduceMean", [(INT64, [2, 3])], axes=[1]), "its input is INT64"),
    (graph_of("ReduceSum", [(FLOAT, [2, 3])], keepdims=0), "has 1 inputs instead of 2"),
    (graph_of("Relu", [(INT64, [3])]), "its input is INT64"),
    (graph_of("Cast", [(TensorProto.UINT8, [2])], to=INT64), "UINT8 is cast to type 7"),
    (graph_of("Cast", [(FLOAT, [2])], to=TensorProto.DOUBLE), "FLOAT is cast to type 11"),
    (graph_of("Add", [(TensorProto.DOUBLE, [2]), (TensorProto.DOUBLE, [2])]), "its input is DOUBLE"),
    (graph_of("Split", [(FLOAT, [4, 7])], outputs=2, axis=1), "7 elements are split into 2 unequal parts"),
    (graph_of("TopK", [(FLOAT, [5000])], constants=[INTS * 4000], outputs=2), "k is 4000"),
    (graph_of("TopK", [(FLOAT, [5])], constants=[INTS], outputs=2, sorted=0), "sorted is 0"),
    (graph_of("TopK", [(FLOAT, [5]), (INT64, [1])], outputs=2), "input 1 is not constant"),
    (graph_of("Reshape", [(FLOAT, [6]), (INT64, [2])]), "input 1 is not constant"),
    (graph_of("LayerNormalization", [(FLOAT, [4, 6])], constants=[np.ones(6, np.float32)]), "has 2 inputs"),
    (graph_of("LayerNormalization", [(HALF, [4, 6])], constants=[np.ones(6, np.float16)] * 2), "has to be in FLOAT"),
    (
        graph_of("Resize", [(FLOAT, [1, 1, 4, 6])], constants=[None, None, np.array([1, 1, 8, 12])], mode="nearest"),
        "it is nearest, half_pixel, round_prefer_floor; give linear, half_pixel or nearest, asymmetric, floor",
    ),
    (
        graph_of(
            "Resize", [(FLOAT, [1, 1, 4, 6])], 19, [None, None, np.array([1, 1, 2, 3])], mode="linear", antialias=1
        ),
        "antialias is 1.*TensorRT 8.6 ignores antialias",
    ),
    (
        graph_of("Resize", [(FLOAT, [1, 1, 4, 6])], 19, [None, None, np.array([8, 12])], mode="linear", axes=[2, 3]),
        "it has the attribute axes",
    ),
    (
        graph_of("Resize", [(FLOAT, [1, 1, 4, 6])], constants=[None, np.float32([1, 1, 2, 2])], mode="linear"),
        "has 3 inputs",
    ),
    (graph_of("MaxPool", [(FLOAT, [1, 1, 8, 8])], kernel_shape=[3, 3], ceil_mode=1), "ceil_mode is 1"),
    (graph_of("Conv", [(FLOAT, [1, 2, 8, 8]), (FLOAT, [3, 2, 3, 3])]), "its weight is not constant"),
    (graph_of("Gemm", [(FLOAT, [2, 3]), (FLOAT, [3, 4])], alpha=0.5), "alpha is 0.5"),
    (graph_of("MatMul", [(FLOAT, [3]), (FLOAT, [3, 4])]), "an input is not a matrix"),
    (graph_of("Einsum", [(FLOAT, [3, 3])], equation="ii->i"), "has 1 inputs"),
    (graph_of("Einsum", [(FLOAT, [2, 3]), (FLOAT, [4, 3])], equation="...j,kj->...k"), "is not of two operands"),
    (graph_of("Where", [(BOOL, [2]), (FLOAT, [2]), (FLOAT, [2])], opset=16), "opset 16; write it in 17 or newer"),
    (graph_of("Mul", [(INT64, [2])], constants=[np.array([2**31])]), r"does not fit in 32 bits.*\(TensorRT 8\.6;"),
    (graph_of("Reshape", [(FLOAT, [1] * 8)], constants=[np.array([1] * 9)]), "has more than 8 axes"),
    (
        graph_of(
            "QuantizeLinear", [(FLOAT, [4])], constants=[np.float32(0.1), np.uint8(0)],
        ),
        "it is quantized to UINT8",
    ),
    (graph_of("QuantizeLinear", [(FLOAT, [4])], constants=[np.float32(0.1), np.int8(3)]), "not as many zeros"),
    (graph_of("DequantizeLinear", [], constants=[np.int8([1, 2]), np.float16(1), np.int8(0)]), "its scale is FLOAT16"),
    (
        graph_of("DequantizeLinear", [], constants=[np.ones((2, 2), np.int8), np.ones(2, "f"), np.zeros(2, np.int8)]),
        "a scale per channel but no axis",
    ),
    (graph_of("MaxPool", [(FLOAT, [1, 1, 8, 8])], outputs=2, kernel_shape=[3, 3]), "it has 2 outputs, more than 1"),
    (graph_of("ConstantOfShape", [], constants=[INTS], value=helper.make_tensor("v", INT64, [1], [3])), "with INT64"),
    # Parsers may read it correctly, but it is not listed.
    (graph_of("Tile", [(FLOAT, [2])], constants=[INTS * 2]), "Tile sampled: this operator was not checked for any"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "message"), ODD, ids=[f"{m.graph.node[0].op_type}-{s[:24]}" for m, s in ODD])
def test_other_forms_are_rejected(model, message):
    with pytest.raises(ConfigError, match=message) as refused:
        check_dialect(model)
    assert "TensorRT 8.6" in str(refused.value) and "\n" not in str(refused.value)


def test_an_error_names_the_runtimes():
    """A form that some runtimes read correctly is rejected for the others only."""
    with pytest.raises(ConfigError) as refused:
        check_dialect(sampling("linear", 20))
    named = {name for name in RUNTIMES if name in str(refused.value)}
    assert named == RUNTIMES.keys() - {"TensorRT-RTX 1.7"}
    assert [name for name, by in check_dialect(sampling("linear", 20), ["TensorRT-RTX 1.7"]).items() if by] == [
        "TensorRT-RTX 1.7"
    ]
    with pytest.raises(ConfigError, match=r"ReduceMax sampled: .*opset 18 .*\(TensorRT 8\.6; onnx/onnx-tensorrt"):
        check_dialect(maximum(18))
    newer = [name for name in RUNTIMES if name != "TensorRT 8.6"]
    checked = check_dialect(maximum(18), newer)
    assert checked["TensorRT 8.6"] == [] and all(checked[name] for name in newer)


def test_an_error_lists_the_first_findings():
    nodes = [helper.make_node("Tile", ["x", "n"], [f"y{k}"], name=f"tile{k}") for k in range(5)]
    inputs = [helper.make_tensor_value_info("x", FLOAT, [2]), helper.make_tensor_value_info("n", INT64, [1])]
    outputs = [helper.make_tensor_value_info(f"y{k}", FLOAT, None) for k in range(5)]
    model = helper.make_model(
        helper.make_graph(nodes, "five", inputs, outputs), opset_imports=[helper.make_opsetid("", 17)]
    )
    with pytest.raises(ConfigError, match=r"tile0: .*tile1: .*tile2: .*; and 2 more$"):
        check_dialect(model)


def test_what_the_misread_forms_mean():
    """In `onnx.reference` the correct and the wrong reading of each form differ by a lot."""
    generator = np.random.default_rng(0)
    image = generator.normal(size=(1, 1, 3, 4)).astype(np.float32)
    grid = np.float32([[[[-0.25, -1 / 3], [0.5, 0]], [[0.1, 0.3], [-0.6, 0.9]]]])

    def run(model, *values):
        return ReferenceEvaluator(model).run(None, {f"x{k}": value for k, value in enumerate(values)})[0]

    # The reference has only the newer mode name, ONNX Runtime both; parsers up to TensorRT 11.1 read it as nearest.
    session = onnxruntime.InferenceSession(sampling().SerializeToString(), providers=["CPUExecutionProvider"])
    bilinear = session.run(None, {"x0": image, "x1": grid})[0]
    assert run(sampling("linear", 20), image, grid) == pytest.approx(bilinear, abs=1e-6)
    # x = ((-0.25 + 1) * 4 - 1) / 2 = 1 and y = ((-1 / 3 + 1) * 3 - 1) / 2 = 0.5: half way between two pixels.
    assert bilinear[0, 0, 0, 0] == pytest.approx((image[0, 0, 0, 1] + image[0, 0, 1, 1]) / 2, abs=1e-6)
    assert np.abs(run(sampling("nearest"), image, grid) - bilinear).max() > 0.3
    values = generator.normal(size=(2, 3, 4)).astype(np.float32)
    assert np.array_equal(run(maximum(), values), values.max(1))
    assert np.array_equal(run(maximum(18), values), values.max(1))  # the parser of TensorRT 8.6 reads values.max()
    channels = [np.array([[2, 4], [6, 8]], np.int8), np.float32([1, 10]), np.zeros(2, np.int8)]
    rows = graph_of("DequantizeLinear", [], 19, channels, axis=0)
    default = graph_of("DequantizeLinear", [], 19, channels)  # parsers take axis 0
    assert run(rows).tolist() == [[2, 4], [60, 80]] and run(default).tolist() == [[2, 40], [6, 80]]


@pytest.mark.parametrize(
    ("precision", "for_cpu"),
    [
        ("fp32", False),
        ("fp16", False),
        pytest.param("int8", False, marks=pytest.mark.slow),
        pytest.param("fp8", False, marks=pytest.mark.slow),
        pytest.param("int8", True, marks=pytest.mark.slow),
    ],
)
def test_an_export_is_checked_for_its_runtimes(exports, precision, for_cpu):
    folder = exports(precision, for_cpu)
    checked = json.loads((folder / "contract.json").read_text())["checked"]
    assert checked.keys() == RUNTIMES.keys()
    wanted = [] if for_cpu else [name for name in RUNTIMES if precision != "fp8" or name != "TensorRT 8.6"]
    assert [name for name, by in checked.items() if by] == wanted
    model = onnx.load(folder / "model.onnx")
    if for_cpu:
        with pytest.raises(ConfigError, match=r"DequantizeLinear .*: its input is INT32"):
            check_dialect(model)
    else:
        assert check_dialect(model) == checked
        trt = pytest.importorskip("tensorrt_rtx")
        logger = trt.Logger(trt.Logger.ERROR)
        network, _reader = parse_graph(trt, trt.Builder(logger), logger, folder / "model.onnx", "tensorrt-rtx")
        assert network.num_layers > len(model.graph.node)


def test_one_changed_node_of_an_export_is_rejected(fp32_export):
    """Mode, axes and opset, as an exporter with other settings writes them."""

    def changed(change):
        model = onnx.load(fp32_export / "model.onnx")
        change(model)
        with pytest.raises(ConfigError) as refused:
            check_dialect(model)
        return str(refused.value)

    def mode(model):
        node = next(node for node in model.graph.node if node.op_type == "GridSample")
        node.name = "the changed one"
        next(attribute for attribute in node.attribute if attribute.name == "mode").s = b"linear"

    def axes(model):
        node = next(node for node in model.graph.node if node.op_type == "ReduceMax")
        node.name = "the changed one"
        attribute = next(attribute for attribute in node.attribute if attribute.name == "axes")
        model.graph.initializer.append(helper.make_tensor("axes", INT64, [len(attribute.ints)], attribute.ints))
        node.input.append("axes")
        node.attribute.remove(attribute)

    def opset(model):
        model.opset_import[0].version = 20

    error = changed(mode)
    assert "GridSample the changed one: mode is 'linear', and parsers read unknown modes as" in error
    assert all(name in error for name in RUNTIMES)
    error = changed(axes)
    assert "ReduceMax the changed one: it has 2 inputs instead of 1, and TensorRT 8.6 ignores axes" in error
    error = changed(opset)
    assert "TensorRT 8.6" in error and "is not known to be read" in error and "more" in error


def test_every_form_is_possible():
    """Each has versions that ONNX defines for its operators, attributes that they have, and known runtimes."""
    for form in FORMS:
        assert set(form.runtimes) <= RUNTIMES.keys()
        for operator in form.operators.split():
            schemas = [onnx.defs.get_schema(operator, opset) for opset in (17, 18, 19, 20)]
            schemas = [s for s in schemas if form.versions[0] <= s.since_version <= form.versions[1]]
            assert schemas, operator
            assert form.attributes.keys() <= {name for s in schemas for name in s.attributes}, operator
            assert all(s.min_input <= form.inputs[1] and s.max_input >= form.inputs[0] for s in schemas), operator


@pytest.fixture(scope="module")
def parser():
    """Parses models with TensorRT-RTX and keeps alive what the networks need."""
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    kept = []

    def read(model):
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        reader = trt.OnnxParser(network, logger)
        assert reader.parse(model.SerializeToString()), reader.get_error(0)
        kept.extend((builder, reader))
        return network

    return trt, read


@pytest.mark.parametrize("model", READ, ids=lambda model: model.graph.node[0].op_type)
def test_a_real_parser_reads_each_form(parser, model):
    trt, read = parser
    assert compare_layers(trt, read(model), model) == []


CHANGED = [
    (sampling(), sampling("nearest"), "GridSample sampled has the interpolation_mode NEAREST instead of LINEAR"),
    (sampling(), sampling(padding_mode="border"), "GridSample sampled has the sample_mode CLAMP instead of FILL"),
    (sampling(), sampling(align_corners=1), "GridSample sampled has the align_corners True instead of False"),
    (maximum(keepdims=1), maximum(axes=[2], keepdims=1), "ReduceMax sampled has the axes 4 instead of 2"),
    (maximum(), maximum(axes=[0, 1, 2]), r"ReduceMax sampled gives the shape \(\) instead of \(2, 4\)"),
    (maximum(), maximum(keepdims=1), "ReduceMax sampled has the keep_dims True instead of False"),
    (
        maximum(), graph_of("ReduceMin", [(FLOAT, [2, 3, 4])], axes=[1], keepdims=0),
        "ReduceMax sampled has the op MIN instead of MAX",
    ),
    (
        graph_of("TopK", [(FLOAT, [4, 6])], constants=[INTS * 3], outputs=2, axis=1),
        graph_of("TopK", [(FLOAT, [4, 6])], constants=[INTS * 2], outputs=2, axis=1),
        r"TopK sampled gives the shape \(4, 2\) instead of \(4, 3\)",
    ),
    (
        graph_of("TopK", [(FLOAT, [4, 4])], constants=[INTS * 4], outputs=2, axis=1),
        graph_of("TopK", [(FLOAT, [4, 4])], constants=[INTS * 4], outputs=2, axis=0),
        "TopK sampled has the axes 1 instead of 2",
    ),
    (
        graph_of("Softmax", [(FLOAT, [4, 4])], axis=-1), graph_of("Softmax", [(FLOAT, [4, 4])], axis=0),
        "Softmax sampled has the axes 1 instead of 2",
    ),
    (
        graph_of("Add", [(FLOAT, [4]), (FLOAT, [4])]), graph_of("Add", [(HALF, [4]), (HALF, [4])]),
        "Add sampled gives HALF instead of FLOAT",
    ),
    (
        graph_of("Where", [(BOOL, [2]), (FLOAT, [2]), (FLOAT, [2])]), graph_of("Add", [(FLOAT, [2]), (FLOAT, [2])]),
        "1 nodes Where became 0 layers SELECT",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("meant", "read", "message"), CHANGED, ids=[message[:48] for _, _, message in CHANGED])
def test_layers_that_differ_from_the_graph_are_found(parser, meant, read, message):
    """The parsed graph differs in one property from the graph with which its layers are compared."""
    import re

    trt, parse = parser
    assert any(re.search(message, text) for text in compare_layers(trt, parse(read), meant))


def test_a_misreading_parser_is_found(parser, tmp_path, monkeypatch):
    """A file with `linear`, read once correctly and once as older parsers read it."""
    trt, _ = parser
    path, logger = tmp_path / "model.onnx", trt.Logger(trt.Logger.ERROR)
    path.write_bytes(b"rubbish")
    with pytest.raises(ConfigError, match=r"tensorrt-rtx does not take .*model\.onnx"):
        parse_graph(trt, trt.Builder(logger), logger, path, "tensorrt-rtx")
    path.write_bytes(sampling("linear", 20).SerializeToString())
    network, _reader = parse_graph(trt, trt.Builder(logger), logger, path, "tensorrt-rtx")
    assert network.num_layers == 1

    class OlderParser(trt.OnnxParser):
        def parse(self, content):
            model = onnx.ModelProto.FromString(content)
            mode = next(attribute for attribute in model.graph.node[0].attribute if attribute.name == "mode")
            mode.s = b"nearest" if mode.s not in (b"bilinear", b"bicubic") else mode.s
            return super().parse(model.SerializeToString())

    monkeypatch.setattr(trt, "OnnxParser", OlderParser)
    with pytest.raises(
        ConfigError, match=r"parser of tensorrt-rtx .* reads .*model\.onnx otherwise .* NEAREST instead"
    ):
        parse_graph(trt, trt.Builder(logger), logger, path, "tensorrt-rtx")
    path.write_bytes(sampling().SerializeToString())
    parse_graph(trt, trt.Builder(logger), logger, path, "tensorrt-rtx")


def test_names_of_runtimes():
    assert runtime_name("tensorrt-rtx", "1.7.1.116") in RUNTIMES and runtime_name("tensorrt", "10.0.1") in RUNTIMES
