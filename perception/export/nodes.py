"""Reads the operators of an ONNX graph with their attributes, ONNX defaults, and tensor types and shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

STANDARD = ("", "ai.onnx")  # names of the domain of standard ONNX operators
UNKNOWN: tuple[str, tuple[int, ...]] = ("unknown", ())


@dataclass(frozen=True)
class Tensors:
    """The tensors of a graph by name.

    Args:
        constants: values of the initializers.
        kinds: name of the ONNX element type, and shape.
        dequantized: outputs of DequantizeLinear whose input is a constant.
    """

    constants: Mapping[str, np.ndarray]
    kinds: Mapping[str, tuple[str, tuple[int, ...]]]
    dequantized: frozenset[str]


@dataclass(frozen=True)
class Node:
    """An operator of a graph.

    Args:
        operator: name of the operator, with its domain unless that is the standard one.
        name: of the node.
        version: last opset, up to the graph's, that changed the operator.
        inputs, outputs: names of tensors.
        given: attributes that are set in the node.
        attributes: those and the ONNX defaults of the others.
        tensors: of the whole graph.
    """

    operator: str
    name: str
    version: int
    inputs: Sequence[str]
    outputs: Sequence[str]
    given: Mapping[str, Any]
    attributes: Mapping[str, Any]
    tensors: Tensors

    def has(self, k: int) -> bool:
        """Returns True if the node has input k."""
        return k < len(self.inputs) and self.inputs[k] != ""

    def constant(self, k: int) -> np.ndarray | None:
        """Returns the value of input k if it is a constant of the graph, else None."""
        return self.tensors.constants.get(self.inputs[k]) if self.has(k) else None

    def kind(self, k: int) -> str:
        """Returns the element type of input k."""
        return self.tensors.kinds.get(self.inputs[k], UNKNOWN)[0]

    def shape(self, k: int) -> tuple[int, ...]:
        """Returns the shape of input k."""
        return self.tensors.kinds.get(self.inputs[k], UNKNOWN)[1]


def opset_of(model: onnx.ModelProto) -> int:
    """Returns the version of the standard operators of a model, 0 if it has none."""
    return next((entry.version for entry in model.opset_import if entry.domain in STANDARD), 0)


def nodes_of(model: onnx.ModelProto) -> list[Node]:
    """Returns the operators of a model without subgraphs, with the types and shapes from ONNX shape inference."""
    import onnx
    from onnx import defs, helper, numpy_helper

    opset = opset_of(model)
    graph = onnx.shape_inference.infer_shapes(model).graph
    name_of = onnx.TensorProto.DataType.Name
    kinds = {}
    for value in (*graph.value_info, *graph.input, *graph.output):
        kind = value.type.tensor_type
        kinds[value.name] = name_of(kind.elem_type), tuple(dimension.dim_value for dimension in kind.shape.dim)
    kinds |= {tensor.name: (name_of(tensor.data_type), tuple(tensor.dims)) for tensor in graph.initializer}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    dequantized = frozenset(
        node.output[0] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in constants
    )
    tensors = Tensors(constants, kinds, dequantized)
    nodes = []
    for number, node in enumerate(graph.node):
        given = {attribute.name: _plain(helper.get_attribute_value(attribute)) for attribute in node.attribute}
        operator, version, defaults = f"{node.domain}.{node.op_type}", opset, {}
        if node.domain in STANDARD:
            operator = node.op_type
            if defs.has(operator, opset):
                schema = defs.get_schema(operator, opset)
                version = schema.since_version
                defaults = {
                    key: _plain(helper.get_attribute_value(attribute.default_value))
                    for key, attribute in schema.attributes.items()
                    if attribute.default_value.type
                }
        name = node.name or f"number {number}"
        nodes.append(
            Node(operator, name, version, list(node.input), list(node.output), given, {**defaults, **given}, tensors)
        )
    return nodes


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return list(value) if isinstance(value, (list, tuple)) else value
