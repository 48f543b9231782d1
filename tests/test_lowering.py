"""Graphs in an older opset: equal outputs in forms that old parsers read correctly, or an error."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from perception.errors import ConfigError
from perception.export.lowering import OPSET, OPSET_FP8, TRACED, lower_graph


def graph_of(nodes, constants=(), opset=TRACED):
    """Creates a model x [2, 4, 6] -> y of nodes."""
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4, 6])],
        [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(value, name) for name, value in constants],
    )  # fmt: skip
    return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]))


X = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)


@pytest.mark.parametrize("kind", ["ReduceMax", "ReduceMin", "ReduceMean", "ReduceL2"])
@pytest.mark.parametrize("keep", [0, 1])
def test_axes_become_attributes(kind, keep):
    node = helper.make_node(kind, ["x", "axes"], ["y"], name="r", keepdims=keep, noop_with_empty_axes=0)
    model = graph_of([node], [("axes", np.array([-1, 1]))])
    lowered = lower_graph(model, OPSET)
    (changed,) = lowered.graph.node
    assert list(changed.input) == ["x"] and not lowered.graph.initializer
    assert [(o.domain, o.version) for o in lowered.opset_import] == [("", OPSET)]
    assert lowered.ir_version == 8  # the IR of opset 17
    wanted = {"ReduceMax": np.max, "ReduceMin": np.min, "ReduceMean": np.mean, "ReduceL2": np.linalg.norm}[kind]
    found = ReferenceEvaluator(lowered).run(None, {"x": X})[0]
    assert found == pytest.approx(wanted(X, axis=(1, 2), keepdims=bool(keep)), abs=1e-6)


def test_sums_keep_their_axes_as_an_input():
    """Since opset 13 ReduceSum has only this form, and the oldest parser reads it."""
    model = graph_of([helper.make_node("ReduceSum", ["x", "axes"], ["y"], name="r")], [("axes", np.array([1]))])
    assert list(lower_graph(model, OPSET).graph.node[0].input) == ["x", "axes"]


def test_split_into_equal_parts_gets_sizes():
    nodes = [
        helper.make_node("Split", ["x"], ["a", "b"], name="s", axis=2, num_outputs=2),
        helper.make_node("Sub", ["a", "b"], ["y"], name="m"),
    ]
    lowered = lower_graph(graph_of(nodes), OPSET)
    assert ReferenceEvaluator(lowered).run(None, {"x": X})[0] == pytest.approx(X[..., :3] - X[..., 3:])
    unequal = helper.make_node("Split", ["x"], ["y", "b", "c", "d"], name="s", axis=2, num_outputs=4)
    with pytest.raises(ConfigError, match=r"Split s has unequal or unknown parts"):
        lower_graph(graph_of([unequal]), OPSET)


def test_a_constant_in_equal_parts():
    """The shape of a constant is not among those of the graph's other tensors."""
    nodes = [
        helper.make_node("Split", ["w"], ["a", "b"], name="s", axis=0, num_outputs=2),
        helper.make_node("Sub", ["x", "b"], ["y"], name="m"),
    ]
    model = graph_of(nodes, [("w", np.float32([1, 2]))])
    assert ReferenceEvaluator(lower_graph(model, OPSET)).run(None, {"x": X})[0] == pytest.approx(X - 2)


def test_graphs_with_8_bit_floats_keep_their_opset():
    model = graph_of([helper.make_node("Relu", ["x"], ["y"], name="r")], opset=OPSET_FP8)
    assert lower_graph(model, OPSET_FP8).opset_import[0].version == OPSET_FP8
    with pytest.raises(ConfigError, match="the graph is of opset 19; give one of opset 18"):
        lower_graph(model, OPSET)


def test_operators_without_an_older_form_are_rejected():
    axes_from_data = [
        helper.make_node("Shape", ["x"], ["axes"], name="shape"),
        helper.make_node("ReduceMax", ["x", "axes"], ["y"], name="r"),
    ]
    with pytest.raises(ConfigError, match="ReduceMax r has axes that are not constant"):
        lower_graph(graph_of(axes_from_data), OPSET)
    with pytest.raises(ConfigError, match=r"operator Mish \(m\) has no form in opset 17"):
        lower_graph(graph_of([helper.make_node("Mish", ["x"], ["y"], name="m")]), OPSET)
    smooth = helper.make_node("Resize", ["x", "", "scales"], ["y"], name="r", mode="linear", antialias=1)
    with pytest.raises(ConfigError, match=r"operator Resize \(r\) has no form"):
        lower_graph(graph_of([smooth], [("scales", np.array([1, 1, 0.5], np.float32))]), OPSET)
    with pytest.raises(ConfigError, match="the graph is of opset 20; give one of opset 18"):
        lower_graph(graph_of([helper.make_node("Relu", ["x"], ["y"])], opset=20), OPSET)


def test_fp8_gets_the_first_opset_that_has_it():
    model = graph_of([helper.make_node("Relu", ["x"], ["y"], name="r")])
    lowered = lower_graph(model, OPSET_FP8)
    assert lowered.opset_import[0].version == 19 and lowered.ir_version == 9
    assert onnx.checker.check_model(lowered) is None
