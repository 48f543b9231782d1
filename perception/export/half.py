"""Half precision written into an ONNX graph: what may be halves is, and what decides the geometry stays in float32.

Convolutions and products with weights run in halves, and so does what only moves or adds their results. Projection,
sampling locations, softmax, normalisation, decoding and memory stay as they are, with casts in between. A runtime that
takes types as they are written (TensorRT 10 and 11, TensorRT-RTX, ONNX Runtime) needs no further flag.

Layers in INT8 keep float32 scales and float32 around them: opset 17 has no other, and the parser of TensorRT 8.6
checks every scale as if it were float32 (onnx/onnx-tensorrt, release/8.6-GA, QuantDequantLinearHelper). Layers in FP8
have halves around them.
"""

from __future__ import annotations

import numpy as np

from perception.errors import ConfigError

WEIGHTED = ("Conv", "Gemm", "MatMul")
# What hands halves on: the inputs that have to be halves, None for all of them.
PASSING = {
    "Relu": (0,), "MaxPool": (0,), "Resize": (0,), "Reshape": (0,), "Transpose": (0,), "Squeeze": (0,),
    "Unsqueeze": (0,), "Slice": (0,), "Split": (0,), "Expand": (0,), "Flatten": (0,), "Concat": None, "Add": None,
}  # fmt: skip
LARGEST = 65504.0  # of float16


def check_weight(name: str, value: np.ndarray) -> None:
    """Refuses a weight that float16 cannot hold.

    Raises:
        ConfigError: a value is larger than 65504, or not a number.
    """
    largest = np.abs(value).max(initial=0.0)
    if not largest <= LARGEST:
        raise ConfigError(
            f"weight {name} holds {largest:.6g}, but float16 ends at {LARGEST:.0f}; take precision fp32, or scale this "
            "layer down and the next one up"
        )


def halve_graph(model, half: str = "float16"):
    """A copy of a float32 ONNX model with weights and most activations in halves; inputs and outputs keep their types.

    Args:
        model: an `onnx.ModelProto`, nodes in topological order, no subgraphs.
        half: "float16", or "bfloat16" for OpenVINO alone, which takes it in any opset; a Conv in bfloat16 is ONNX from
            opset 22 on.

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
    halves: set[str] = set()  # names of tensors that are halves now
    casts: dict[tuple[str, int], str] = {}
    nodes = []

    def cast(name: str, kind: int) -> str:
        """The name of a tensor in the wanted type; of a constant, a constant of that type."""
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
    marked = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in float8}
    for node in list(graph.node):
        inputs = list(node.input)
        weighted = node.op_type in WEIGHTED and len(inputs) > 1 and (inputs[1] in floats or inputs[1] in marked)
        needed = PASSING.get(node.op_type, ())
        needed = range(len(inputs)) if needed is None else needed
        passing = (
            node.op_type in PASSING
            and any(inputs[i] in halves for i in needed)
            and all(inputs[i] in halves or inputs[i] in floats for i in needed)
        )
        of_float8 = node.op_type in ("QuantizeLinear", "DequantizeLinear") and inputs[2] in float8
        if of_float8 and (node.op_type == "DequantizeLinear" or inputs[0] in halves):
            node.input[1] = cast(inputs[1], half_type)  # what is marked has the type of its scale
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
    if half == "bfloat16":  # not what ONNX allows at this opset
        return model
    return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
