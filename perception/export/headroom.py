"""Measures whether the types of an exported graph hold its values: float16 up to 65504, eight bits up to their range.

An overflow in float16 gives infinity and spoils the memory for good; a value beyond the range of eight bits is clipped.
The outputs of the export show neither before it has happened. So its graph is run a second time in float32 and without
Q/DQ nodes, and every tensor that is float16 or quantized in the export is measured there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from perception.export.quantize import LARGEST_FP8
from perception.export.runtime import session_options

# Their outputs are no larger than their inputs, which are measured where they are computed.
BOUNDED = (
    "Relu", "MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Expand", "Flatten", "Concat",
)  # fmt: skip


@dataclass(frozen=True)
class Saturation:
    """How much of a quantized tensor lies beyond its range.

    Args:
        share: of its values over all frames, 0..1.
        worst: of its values in the worst frame, 0..1.
        reach: the largest absolute value, in units of the range.
    """

    share: float
    worst: float
    reach: float


class RangeMonitor:
    """Runs the float32 graph of an export frame by frame, with a memory of its own, and keeps the extremes.

    Args:
        model: the exported `onnx.ModelProto`, with tensors that are float16 or quantized.
    """

    def __init__(self, model) -> None:
        import onnxruntime

        measured = measured_graph(model)
        self._halves, self._ranges = measured.halves, measured.ranges
        self._session = onnxruntime.InferenceSession(
            measured.model.SerializeToString(), session_options("fp32"), providers=["CPUExecutionProvider"]
        )
        inputs = {x.name: x.shape for x in self._session.get_inputs()}
        self._memory = {"memory": np.zeros(inputs["memory"], np.float32)} if "memory" in inputs else {}
        self._wanted = [*measured.outputs, *(["new_memory"] if self._memory else [])]
        self._values: dict[str, list[float]] = {name: [] for name in measured.outputs}

    def run(self, frame: Mapping[str, np.ndarray]) -> None:
        """Measures one frame.

        Args:
            frame: the inputs of the export by name; `memory` is not needed.
        """
        found = dict(zip(self._wanted, self._session.run(self._wanted, {**frame, **self._memory}), strict=True))
        if self._memory:
            self._memory = {"memory": found["new_memory"]}
        for name, values in self._values.items():
            values.append(float(found[name]))

    def peaks(self) -> dict[str, float]:
        """The largest absolute value of every tensor that is float16 in the export, in the order of the graph."""
        return {label: self._largest(f"peak/{name}") for label, name in self._halves.items()}

    def saturation(self) -> dict[str, Saturation]:
        """By quantized tensor, in the order of the graph."""
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
    """A float32 graph whose further outputs measure.

    Args:
        model: the `onnx.ModelProto`.
        halves: by label, the tensor that is float16 in the export.
        ranges: by label, the tensor that is quantized in the export, and the largest absolute value of its range.
        outputs: names of the further outputs: "peak/<tensor>", the largest absolute value of a frame, and
            "beyond/<tensor>", the share of values beyond the range.
    """

    model: object
    halves: dict[str, str]
    ranges: dict[str, tuple[str, float]]
    outputs: list[str]


def measured_graph(model) -> MeasuredGraph:
    """The float32 graph of an export, without Q/DQ nodes, that measures what the export cannot hold.

    Args:
        model: the exported `onnx.ModelProto`, of any precision; weights keep the digits that they have there.
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
            # What no layer takes in eight bits is the output of one.
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
    used = {name for node in nodes for name in node.input}
    del graph.graph.node[:], graph.graph.initializer[:], graph.graph.value_info[:]
    graph.graph.node.extend(nodes)
    graph.graph.initializer.extend(numpy_helper.from_array(weights[name], name) for name in weights if name in used)
    graph.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in outputs)
    return MeasuredGraph(graph, halves, ranges, outputs)


def _measuring(tensors: Iterable[str], bounds: Mapping[str, tuple[float, float]]) -> tuple[list, dict, list[str]]:
    """Nodes that measure tensors, their constants, and the names of the scalars that they give."""
    from onnx import TensorProto, helper

    nodes, constants, outputs = [], {}, []

    def add(operator: str, inputs: list[str], out: str, **attributes) -> str:
        nodes.append(helper.make_node(operator, inputs, [out], name=out, **attributes))
        return out

    # Without axes a reduction goes over all of them, in every version of the standard.
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


def layer_names(model) -> dict[str, str]:
    """By tensor, the layer of the network that computes it with a weight or bias, or that takes it in eight bits."""
    constants = {tensor.name for tensor in model.graph.initializer}
    made_by = {name: node for node in model.graph.node for name in node.output}

    def unmarked(name: str) -> str:
        node = made_by.get(name)
        return node.input[0] if node is not None and node.op_type == "DequantizeLinear" else name

    names: dict[str, str] = {}
    for node in model.graph.node:
        inputs = [unmarked(name) for name in node.input]
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
    """The lowest and the highest value that an eight-bit type rounds to a number of its own."""
    import ml_dtypes

    if zero.dtype == ml_dtypes.float8_e4m3fn:
        low, high, step = -LARGEST_FP8, LARGEST_FP8, 32.0  # E4M3 counts by 32 between 256 and 448
    else:
        whole = np.iinfo(zero.dtype)
        low, high, step = whole.min - float(zero), whole.max - float(zero), 1.0
    return (low - step / 2) * float(scale), (high + step / 2) * float(scale)


def _dequantized(node, constants: Mapping[str, np.ndarray]) -> np.ndarray:
    """A constant in eight bits, or a bias in 32, as float32."""
    value, scale, zero = (constants[name].astype(np.float32) for name in node.input)
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
    shape = [-1 if scale.ndim and k == axis % value.ndim else 1 for k in range(value.ndim)]
    return (value - zero.reshape(shape if zero.ndim else ())) * scale.reshape(shape if scale.ndim else ())
