"""Converts a traced graph to an older opset, in the forms that every supported TensorRT parser reads as ONNX defines.

The exporter of torch writes opset 18 or newer. Parsers in use misread two of its forms. From opset 18 on the axes of
most Reduce operators are an input, which the parser of TensorRT 8.6 ignores: it reduces all axes (onnx/onnx-tensorrt,
release/8.6-GA, builtin_op_importers.cpp). From opset 20 on a mode of GridSample is named `linear`, which the parsers of
TensorRT 8.5 to 11.1 read as `nearest` (NVIDIA/TensorRT#4646). `perception.export.dialect` rejects graphs with such
forms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from perception.errors import ConfigError

if TYPE_CHECKING:
    import onnx

TRACED = 18  # the oldest opset that the exporter of torch writes
OPSET = 17  # the oldest opset with LayerNormalization and bilinear GridSample
OPSET_FP8 = 19  # the first opset whose QuantizeLinear supports 8-bit floats


def lower_graph(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Converts a graph of opset 18 to another opset.

    Args:
        model: of opset 18, without subgraphs; a graph with 8-bit floats may be of `OPSET_FP8`.
        opset: `OPSET`, or `OPSET_FP8` for graphs with 8-bit floats.

    Returns:
        A copy, with the oldest IR version that supports this opset.

    Raises:
        ConfigError: an operator has no form in the target opset.
    """
    import onnx
    from onnx import helper

    model = onnx.ModelProto.FromString(model.SerializeToString())
    found = next((entry.version for entry in model.opset_import if entry.domain == ""), None)
    if found != TRACED and not found == opset == OPSET_FP8:
        raise ConfigError(f"the graph is of opset {found}; give one of opset {TRACED}")
    if opset < TRACED:
        _lower(model.graph)
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", opset))
    model.ir_version = helper.find_min_ir_version_for(model.opset_import)
    onnx.checker.check_model(model)
    return model


def _lower(graph: onnx.GraphProto) -> None:
    """Converts the nodes whose form differs in opset 17, in place."""
    from onnx import defs, helper, numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}
    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
    shapes |= {name: list(tensor.dims) for name, tensor in constants.items()}
    for node in graph.node:
        kind = node.op_type
        if defs.get_schema(kind, TRACED, "").since_version < TRACED:
            continue
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if kind.startswith("Reduce"):
            attributes.pop("noop_with_empty_axes", None)
            if len(node.input) > 1:
                axes = constants.get(node.input[1])
                if axes is None or not len(numpy_helper.to_array(axes)):
                    raise ConfigError(
                        f"{kind} {node.name} has axes that are not constant; opset {OPSET} needs constant axes"
                    )
                attributes["axes"] = numpy_helper.to_array(axes).tolist()
                del node.input[1]
        elif kind == "Split":
            count = attributes.pop("num_outputs", None)
            if count is not None:
                shape = shapes.get(node.input[0], [])
                size = shape[attributes["axis"]] if shape else 0
                if not size or size % count:
                    raise ConfigError(
                        f"Split {node.name} has unequal or unknown parts; opset {OPSET} needs their sizes"
                    )
                name = f"{node.name}/sizes"
                graph.initializer.append(helper.make_tensor(name, 7, [count], [size // count] * count))  # int64
                node.input.append(name)
        elif kind == "Pad" and len(node.input) < 4:
            pass  # without axes it has the same form in both opsets
        elif kind == "Resize" and not attributes.get("antialias") and "axes" not in attributes:
            for name in ("antialias", "keep_aspect_ratio_policy"):
                attributes.pop(name, None)
        else:
            raise ConfigError(f"operator {kind} ({node.name}) has no form in opset {OPSET}")
        del node.attribute[:]
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
