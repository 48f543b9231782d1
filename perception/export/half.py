"""Converts an ONNX graph to mixed precision: layers with weights in float16, geometry in float32.

Convolutions and products with weights run in half precision, as do operators that only move or add their results.
Projection, sampling locations, softmax, normalisation, decoding and memory stay in float32, with casts in between. The
types are part of the graph, so runtimes that keep them (TensorRT 10 and 11, TensorRT-RTX, ONNX Runtime) need no flag.

INT8 layers keep float32 scales and float32 inputs and outputs: opset 17 allows nothing else, and the parser of TensorRT
8.6 checks every scale as if it were float32 (onnx/onnx-tensorrt, release/8.6-GA, QuantDequantLinearHelper). FP8 layers
have float16 inputs and outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from perception.errors import ConfigError

if TYPE_CHECKING:
    import onnx

WEIGHTED = ("Conv", "Gemm", "MatMul")
# Operators that run in half precision if these inputs, or all inputs (None), are in half precision.
PASSING: dict[str, tuple[int, ...] | None] = {
    "Relu": (0,), "MaxPool": (0,), "Resize": (0,), "Reshape": (0,), "Transpose": (0,), "Squeeze": (0,),
    "Unsqueeze": (0,), "Slice": (0,), "Split": (0,), "Expand": (0,), "Flatten": (0,), "Concat": None, "Add": None,
}  # fmt: skip
LARGEST = 65504.0  # the largest float16


def check_weight(name: str, value: np.ndarray) -> None:
    """Checks that a weight fits in float16.

    Raises:
        ConfigError: a value is larger than 65504, or NaN.
    """
    largest = np.abs(value).max(initial=0.0)
    if not largest <= LARGEST:
        raise ConfigError(
            f"weight {name} holds {largest:.6g}, but the largest float16 is {LARGEST:.0f}; use precision fp32, or "
            "scale this layer down and the next one up"
        )


def convert_to_half(model: onnx.ModelProto, half: str = "float16") -> onnx.ModelProto:
    """Converts the weights and most activations of a float32 graph to half precision.

    Args:
        model: without subgraphs, nodes in topological order.
        half: "float16", or "bfloat16" for OpenVINO, which accepts it in any opset. ONNX defines Conv in bfloat16 from
            opset 22 on.

    Returns:
        A copy; its inputs and outputs keep their types.

    Raises:
        ConfigError: a weight is too large for float16.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    half_type = TensorProto.DataType.Value(half.upper())
    constants = {tensor.name: tensor for tensor in graph.initializer}
    floats = {name for name, tensor in constants.items() if tensor.data_type == TensorProto.FLOAT}
    halves: set[str] = set()  # names of tensors that are in half precision
    casts: dict[tuple[str, int], str] = {}
    nodes = []

    def cast(name: str, kind: int) -> str:
        """Adds a cast of a tensor, or a converted constant, and returns its name."""
        if (name, kind) in casts:
            return casts[name, kind]
        suffix = "half" if kind == half_type else "float"
        wanted = f"{name}/{suffix}"
        if name in floats:
            value = numpy_helper.to_array(constants[name])
            if half == "float16":
                check_weight(name, value)
            halved = value.astype(helper.tensor_dtype_to_np_dtype(half_type))
            graph.initializer.append(numpy_helper.from_array(halved, wanted))
        else:
            nodes.append(helper.make_node("Cast", [name], [wanted], name=f"cast/{wanted}", to=kind))
        casts[name, kind] = wanted
        return wanted

    float8 = {name for name, tensor in constants.items() if tensor.data_type == TensorProto.FLOAT8E4M3FN}
    dequantized = {
        node.output[0] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in float8
    }
    for node in list(graph.node):
        inputs = list(node.input)
        weighted = node.op_type in WEIGHTED and len(inputs) > 1 and (inputs[1] in floats or inputs[1] in dequantized)
        needed = PASSING.get(node.op_type, ())
        if needed is None:
            needed = tuple(range(len(inputs)))
        passing = (
            node.op_type in PASSING
            and any(inputs[i] in halves for i in needed)
            and all(inputs[i] in halves or inputs[i] in floats for i in needed)
        )
        of_float8 = node.op_type in ("QuantizeLinear", "DequantizeLinear") and inputs[2] in float8
        if of_float8 and (node.op_type == "DequantizeLinear" or inputs[0] in halves):
            node.input[1] = cast(inputs[1], half_type)  # the output has the type of the scale
            if node.op_type == "DequantizeLinear":
                halves.update(node.output)
        elif weighted or passing:
            for i in range(len(inputs)) if weighted else needed:
                if inputs[i] and inputs[i] not in halves:
                    node.input[i] = cast(inputs[i], half_type)
            halves.update(node.output)
        else:
            for i, name in enumerate(inputs):
                if name in halves:
                    node.input[i] = cast(name, TensorProto.FLOAT)
        nodes.append(node)
    for output in graph.output:
        if output.name in halves:
            raw = f"{output.name}/raw"
            for node in nodes:
                node.input[:] = [raw if name == output.name else name for name in node.input]
                node.output[:] = [raw if name == output.name else name for name in node.output]
            nodes.append(
                helper.make_node("Cast", [raw], [output.name], name=f"cast/{output.name}", to=TensorProto.FLOAT)
            )
    used = {name for node in nodes for name in node.input} | {output.name for output in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    if half == "bfloat16":  # ONNX does not define it in this opset, so its checker would fail
        return model
    return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
