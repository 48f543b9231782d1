"""Measures how close the values of an exported graph come to the limits of its types.

A value above 65504 overflows in float16 and makes the memory infinite for all later frames; a value outside its
quantization range is clipped. The outputs of the export do not show how close its values come to these limits. The
graph therefore runs a second time in float32 and without Q/DQ nodes, and every tensor that is float16 or quantized in
the export is measured there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from perception.export.quantize import LARGEST_FP8, empty_memory
from perception.export.runtime import session_options

if TYPE_CHECKING:
    import onnx

# Operators whose outputs are not larger than their inputs, which are measured already.
BOUNDED = (
    "Relu", "MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Expand", "Flatten", "Concat",
)  # fmt: skip


@dataclass(frozen=True)
class Saturation:
    """The part of a quantized tensor that is outside its quantization range, by more than a step of the type.

    Args:
        share: of the values over all frames, 0..1.
        worst: share of the values in the worst frame, 0..1.
        reach: largest absolute value, in units of the range.
    """

    share: float
    worst: float
    reach: float


class RangeMonitor:
    """Runs the float32 version of an exported graph on consecutive frames and records the largest values.

    Args:
        model: the exported graph, with float16 or quantized tensors.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        import onnxruntime

        measured = measured_graph(model)
        self._halves, self._ranges = measured.halves, measured.ranges
        self._session = onnxruntime.InferenceSession(
            measured.model.SerializeToString(), session_options("fp32"), providers=["CPUExecutionProvider"]
        )
        self._memory = empty_memory(self._session)
        self._names = [*measured.outputs, *(f"new_{name}" for name in self._memory)]
        self._values: dict[str, list[float]] = {name: [] for name in measured.outputs}

    def run(self, frame: Mapping[str, np.ndarray]) -> None:
        """Measures one frame.

        Args:
            frame: inputs of the export by name; the memory may be missing.
        """
        found = dict(zip(self._names, self._session.run(self._names, {**frame, **self._memory}), strict=True))
        self._memory = {name: found[f"new_{name}"] for name in self._memory}
        for name, values in self._values.items():
            values.append(float(found[name]))

    def peaks(self) -> dict[str, float]:
        """Returns the largest absolute value of every float16 tensor of the export, in the order of the graph."""
        return {label: self._largest(f"peak/{name}") for label, name in self._halves.items()}

    def saturation(self) -> dict[str, Saturation]:
        """Returns the saturation of every quantized tensor, in the order of the graph."""
        return {
            label: Saturation(
                float(np.mean(self._values[f"beyond/{name}"])),
                self._largest(f"beyond/{name}"),
                self._largest(f"peak/{name}") / largest,
            )
            for label, (name, largest) in self._ranges.items()
        }

    def _largest(self, output: str) -> float:
        return float(np.max(self._values[output]))


class MeasuredGraph(NamedTuple):
    """A float32 graph with additional outputs that measure its tensors.

    Args:
        model: the graph.
        halves: by label, the tensor that is float16 in the export.
        ranges: by label, the tensor that is quantized in the export, and the largest absolute value of its range.
        outputs: names of the additional outputs: "peak/<tensor>", the largest absolute value in a frame, and
            "beyond/<tensor>", the share of values outside the range.
    """

    model: onnx.ModelProto
    halves: dict[str, str]
    ranges: dict[str, tuple[str, float]]
    outputs: list[str]


def measured_graph(model: onnx.ModelProto) -> MeasuredGraph:
    """Converts an exported graph to float32 without Q/DQ nodes and adds outputs that measure its tensors.

    Args:
        model: exported in any precision; the weights keep their values.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    typed = onnx.shape_inference.infer_shapes(model).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*typed.value_info, *typed.output)}
    layers = layer_names(model)
    graph = onnx.ModelProto.FromString(model.SerializeToString())
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = {
        name: value.astype(np.float32) if value.dtype == np.float16 else value for name, value in constants.items()
    }
    renamed: dict[str, str] = {}
    nodes, halves, ranges = [], {}, {}
    bounds: dict[str, tuple[float, float]] = {}
    for node in graph.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        out = node.output[0]
        if node.op_type == "QuantizeLinear":
            renamed[out] = tensor = node.input[0]
            low, high = _range(constants[node.input[1]], constants[node.input[2]])
            bounds[tensor] = low, high
            # A quantized tensor that is not the input of a layer is the output of one.
            ranges[f"{layers.get(out) or layers.get(tensor, node.op_type)} ({tensor})"] = tensor, max(-low, high)
        elif node.op_type == "DequantizeLinear" and node.input[0] in constants:
            weights[out] = _dequantized(node, constants)
        elif node.op_type == "DequantizeLinear":
            renamed[out] = node.input[0]
        else:
            for attribute in node.attribute:
                if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                    attribute.i = TensorProto.FLOAT
            nodes.append(node)
        if kinds.get(out) == TensorProto.FLOAT16 and node.op_type not in BOUNDED and out not in weights:
            halves[f"{layers.get(out, node.op_type)} ({out})"] = renamed.get(out, out)
    measuring, limits, outputs = _measuring(dict.fromkeys([*halves.values(), *bounds]), bounds)
    nodes += measuring
    weights |= limits
    used = {name for node in nodes for name in node.input} | {output.name for output in graph.graph.output}
    del graph.graph.node[:], graph.graph.initializer[:], graph.graph.value_info[:]
    graph.graph.node.extend(nodes)
    graph.graph.initializer.extend(numpy_helper.from_array(weights[name], name) for name in weights if name in used)
    graph.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in outputs)
    return MeasuredGraph(graph, halves, ranges, outputs)


def _measuring(tensors: Iterable[str], bounds: Mapping[str, tuple[float, float]]) -> tuple[list, dict, list[str]]:
    """Returns nodes that measure tensors, their constants, and the names of their scalar outputs."""
    from onnx import TensorProto, helper

    nodes: list[onnx.NodeProto] = []
    constants: dict[str, np.float32] = {}
    outputs: list[str] = []

    def add(operator: str, inputs: list[str], out: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [out], name=out, **attributes))
        return out

    # Without axes a reduction covers all axes, in every opset.
    for name in tensors:
        outputs.append(add("ReduceMax", [add("Abs", [name], f"size/{name}")], f"peak/{name}", keepdims=0))
    for name, (low, high) in bounds.items():
        constants |= {f"low/{name}": np.float32(low), f"high/{name}": np.float32(high)}
        below = add("Less", [name, f"low/{name}"], f"below/{name}")
        above = add("Greater", [name, f"high/{name}"], f"above/{name}")
        either = add("Or", [below, above], f"either/{name}")
        counted = add("Cast", [either], f"counted/{name}", to=TensorProto.FLOAT)
        outputs.append(add("ReduceMean", [counted], f"beyond/{name}", keepdims=0))
    return nodes, constants, outputs


def layer_names(model: onnx.ModelProto) -> dict[str, str]:
    """Returns by tensor the layer that computes it with a weight or a bias, or that takes it as quantized input."""
    constants = {tensor.name for tensor in model.graph.initializer}
    made_by = {name: node for node in model.graph.node for name in node.output}

    def before_dequantize(name: str) -> str:
        node = made_by.get(name)
        return node.input[0] if node is not None and node.op_type == "DequantizeLinear" else name

    names: dict[str, str] = {}
    for node in model.graph.node:
        inputs = [before_dequantize(name) for name in node.input]
        weights = [name for name in inputs if name in constants and name.startswith("network.")]
        if not weights or node.op_type == "DequantizeLinear":
            continue
        layer = weights[0].removeprefix("network.").removesuffix("/half").removesuffix("_quantized")
        layer = layer.partition(".weight")[0].partition(".bias")[0]
        names[node.output[0]] = layer
        for name, quantized in zip(node.input, inputs, strict=True):
            if name != quantized and quantized not in constants:
                for tensor in (name, quantized):
                    names.setdefault(tensor, f"input of {layer}")
    return names


def _range(scale: np.ndarray, zero: np.ndarray) -> tuple[float, float]:
    """Returns the smallest and the largest value that an eight-bit type moves by no more than a step.

    Rounding moves values by up to half a step, so clipping by less than a step costs hardly more. The largest value of
    a small tensor comes that far: ranges are measured before the weights are rounded.
    """
    import ml_dtypes

    if zero.dtype == ml_dtypes.float8_e4m3fn:
        low, high, step = -LARGEST_FP8, LARGEST_FP8, 32.0  # the step of E4M3 between 256 and 448
    else:
        whole = np.iinfo(zero.dtype)
        low, high, step = whole.min - float(zero), whole.max - float(zero), 1.0
    return (low - step) * float(scale), (high + step) * float(scale)


def _dequantized(node: onnx.NodeProto, constants: Mapping[str, np.ndarray]) -> np.ndarray:
    """Dequantizes a constant, which has eight bits, or 32 for a bias."""
    value, scale, zero = (constants[name].astype(np.float32) for name in node.input)
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
    shape = [-1 if scale.ndim and k == axis % value.ndim else 1 for k in range(value.ndim)]
    return (value - zero.reshape(shape if zero.ndim else ())) * scale.reshape(shape if scale.ndim else ())
