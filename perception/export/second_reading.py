"""Runs an exported graph in a second executor, as the oldest TensorRT parser reads it, and compares the outputs.

A parser may misread a form that it does not support instead of rejecting it. ONNX Runtime cannot show this, because it
reads every form as ONNX defines it. `as_parsed` therefore rewrites a graph so that its meaning in ONNX is what a parser
reads, and `ReferenceSession` runs the result: its outputs must equal those of ONNX Runtime. `perception.export.dialect`
rejects misread forms before anything runs; this module checks the numbers and needs no list of supported forms.

The behaviour of the parsers is taken from their source (onnx/onnx-tensorrt, branches release/8.6-GA and
release/10.0-GA). Forms that are not listed here are read as ONNX defines them, or rejected by the parser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from perception.errors import ConfigError
from perception.export.contract import MODEL, comparable_memory
from perception.export.nodes import opset_of
from perception.export.quantize import is_compared, relative_change
from perception.export.reference import ReferenceSession
from perception.export.replay import match_rows

FIRST, LATER = 2, 0.75  # frames in the second executor: the first ones, and the one at this share of the dataset
LARGEST = 1e-3  # largest difference that passes: in float32, and in any precision for the effect of misread forms
# Largest change of the outputs in standard deviations, for precisions that two executors round differently. Correct
# exports stay below half of it; exports whose every GridSample is read as nearest exceed twice of it
# (tests/test_reference.py).
SHARES = {"fp16": 0.01, "int8": 0.03, "fp8": 0.03}
SHOWN = 3  # nodes in a message


@dataclass
class _Graph:
    """The opset, the constants and the shapes of a graph."""

    opset: int
    constants: dict[str, np.ndarray]
    shapes: dict[str, list[int]]


def as_parsed(model: onnx.ModelProto, runtime: str) -> tuple[onnx.ModelProto, list[str]]:
    """Rewrites a graph so that its meaning in ONNX is what the parser of a runtime reads.

    Args:
        model: without subgraphs.
        runtime: one of `READINGS`.

    Returns:
        A rewritten copy, and the names of the nodes and constants that changed.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.value_info, *inferred.input)
    graph = _Graph(
        opset_of(model),
        {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer},
        {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in values},
    )
    graph.shapes |= {name: list(value.shape) for name, value in graph.constants.items()}
    del model.graph.value_info[:]  # shapes may change
    changed = []
    for node in model.graph.node:
        before = node.SerializeToString(deterministic=True)
        if node.op_type in READINGS[runtime]:
            READINGS[runtime][node.op_type](node, graph)
        if node.SerializeToString(deterministic=True) != before:
            changed.append(f"{node.op_type} {node.name}")
    if runtime == "TensorRT 8.6":
        changed += _narrowed(model.graph)
    # Constants that a reading has added.
    known = {tensor.name for tensor in model.graph.initializer}
    model.graph.initializer.extend(
        numpy_helper.from_array(value, name) for name, value in graph.constants.items() if name not in known
    )
    return model, changed


def _narrowed(graph: onnx.GraphProto) -> list[str]:
    """Clips INT64 constants to 32 bits [onnx2trt_utils.cpp, convertINT64]; returns the names of those that changed."""
    # The end of a slice may be any number after the last element.
    bounds = {name for node in graph.node if node.op_type == "Slice" for name in node.input[1:3]}
    limits, clipped = np.iinfo(np.int32), []
    for tensor in graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT64 and tensor.name not in bounds:
            value = numpy_helper.to_array(tensor)
            narrow = value.clip(limits.min, limits.max)
            if (narrow != value).any():
                tensor.CopyFrom(numpy_helper.from_array(narrow, tensor.name))
                clipped.append(f"constant {tensor.name}")
    return clipped


# Readings by operator, with the file and the function of the parser in brackets. In release/10.0-GA,
# builtin_op_importers.cpp has the name onnxOpImporters.cpp, and onnx2trt_utils.cpp the name importerUtils.cpp.


def _grid_sample(node: onnx.NodeProto, graph: _Graph) -> None:
    """Unknown modes are read as nearest, unknown paddings as zeros [builtin_op_importers.cpp, GridSample]."""
    mode = _attribute(node, "mode", b"bilinear")
    if mode not in (b"nearest", b"bilinear", b"bicubic"):
        _set(node, "mode", "nearest")
    if _attribute(node, "padding_mode", b"zeros") not in (b"zeros", b"border", b"reflection"):
        _set(node, "padding_mode", "zeros")


def _reduce(node: onnx.NodeProto, graph: _Graph) -> None:
    """Axes are read from the attribute; without it all axes are reduced.

    Only ReduceSum reads its second input, from opset 13 on; noop_with_empty_axes is not read [builtin_op_importers.cpp,
    Reduce...; onnx2trt_utils.cpp, reduceTensor].
    """
    if not (node.op_type == "ReduceSum" and graph.opset >= 13):
        del node.input[1:]
    if len(node.input) < 2:
        _unread(node, "noop_with_empty_axes", 0)


def _split(node: onnx.NodeProto, graph: _Graph) -> None:
    """Without sizes, each part has the size divided by the number of outputs, rounded down; num_outputs is not read.

    [builtin_op_importers.cpp, Split]
    """
    size, parts = graph.shapes[node.input[0]][_attribute(node, "axis", 0)], len(node.output)
    if len(node.input) < 2 and size % parts:
        name = f"{node.name}/parsed_sizes"
        graph.constants[name] = np.full(parts, size // parts, np.int64)
        node.input.append(name)
        _set(node, "num_outputs", None)


def _resize(node: onnx.NodeProto, graph: _Graph) -> None:
    """Attributes of opset 18 are not read [builtin_op_importers.cpp, Resize]."""
    for name, default in (("antialias", 0), ("axes", None), ("keep_aspect_ratio_policy", b"stretch")):
        _unread(node, name, default)


def _shape(node: onnx.NodeProto, graph: _Graph) -> None:
    """The attributes start and end of opset 15 are not read [builtin_op_importers.cpp, Shape]."""
    _unread(node, "start", 0)
    _unread(node, "end", None)


def _constant(node: onnx.NodeProto, graph: _Graph) -> None:
    """Integers are read from the float fields, which are empty.

    [builtin_op_importers.cpp, Constant; OnnxAttrs.cpp, get<float>]
    """
    for name, read in (("value_int", np.zeros((), np.int64)), ("value_ints", np.zeros(0, np.int64))):
        if _attribute(node, name, None) is not None:
            _set(node, name, None)
            _set(node, "value", numpy_helper.from_array(read))


def _quantize(node: onnx.NodeProto, graph: _Graph) -> None:
    """Per-channel scales without an axis use axis 0, not 1 [builtin_op_importers.cpp, QuantDequantLinearHelper]."""
    scale = graph.constants.get(node.input[1])
    if scale is not None and scale.size > 1 and _attribute(node, "axis", None) is None:
        _set(node, "axis", 0)


def _attribute(node: onnx.NodeProto, name: str, default: object) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _unread(node: onnx.NodeProto, name: str, default: object) -> None:
    """Removes an attribute that differs from its default."""
    if _attribute(node, name, default) != default:
        _set(node, name, None)


def _set(node: onnx.NodeProto, name: str, value: object) -> None:
    """Sets an attribute, or removes it if the value is None."""
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    if len(kept) < len(node.attribute) or value is not None:
        del node.attribute[:]
        node.attribute.extend(kept if value is None else [*kept, helper.make_attribute(name, value)])


REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
_FROM_10: dict[str, Callable[[onnx.NodeProto, _Graph], None]] = {
    "GridSample": _grid_sample, "QuantizeLinear": _quantize, "DequantizeLinear": _quantize,
}  # fmt: skip
# By runtime, oldest first: the operators with forms that its parser misreads.
READINGS = {
    "TensorRT 8.6": {
        **_FROM_10,
        **{f"Reduce{name}": _reduce for name in REDUCTIONS},
        "Split": _split, "Resize": _resize, "Shape": _shape, "Constant": _constant,
    },
    "TensorRT 10.0": _FROM_10,
}  # fmt: skip


@dataclass(frozen=True)
class SecondReading:
    """The differences between the second executor and ONNX Runtime.

    Args:
        runtime: with the parser whose reading was run; empty if the graph was run as ONNX defines it, because the
            export is not for TensorRT.
        frames: number of frames, each with the memory of ONNX Runtime.
        differences: largest and mean by output, as in `Replay.raw`; "box" and "line" are all decoded values.
        share: change of the raw outputs and the memory in standard deviations, see `quantize.relative_change`.
        read_otherwise: names of the nodes and constants that the parser misreads.
        by_reading: largest difference that these misread forms make, both sides run in the second executor.
    """

    runtime: str
    frames: int
    differences: dict[str, tuple[float, float]]
    share: float
    read_otherwise: tuple[str, ...]
    by_reading: float

    def failures(self, precision: str) -> list[str]:
        """Returns the reasons why an export of this precision must not be used; empty if it passed."""
        found = []
        if not self.by_reading <= LARGEST:
            found.append(
                f"the parser of {self.runtime} misreads {_named(self.read_otherwise)}, and outputs change by up to "
                f"{self.by_reading:.2e}"
            )
        if precision == "fp32":
            found += [
                f"{name} of the second executor differs by {largest:.2e}, more than {LARGEST:.0e}"
                for name, (largest, _) in self.differences.items()
                if not largest <= LARGEST
            ]
        elif not self.share <= SHARES[precision]:
            found.append(
                f"outputs of the second executor differ by {self.share:.4f} standard deviations, more than "
                f"{SHARES[precision]}"
            )
        return found

    def markdown(self) -> list[str]:
        """Returns the lines of the certificate in Markdown."""
        reading = f"as the parser of {self.runtime} reads the graph" if self.runtime else "as ONNX defines the graph"
        return [
            f"{self.frames} frames in a second executor, {reading}. Outputs differ by {self.share:.1e} standard "
            f"deviations. Nodes that the parser misreads: {len(self.read_otherwise)}; they change outputs by up to "
            f"{self.by_reading:.1e}.",
            "",
            "| output | largest difference | mean |",
            "|---|---|---|",
            *(f"| {name} | {largest:.2e} | {mean:.2e} |" for name, (largest, mean) in self.differences.items()),
            "",
        ]


class SecondExecutor:
    """Runs some frames of a certificate in the second executor and compares the outputs.

    Args:
        folder: of the export.
        contract: from `read_contract`; the graph is run as the oldest runtime that it was checked for reads it.
        frames: number of frames of the dataset.

    Raises:
        ConfigError: the graph holds an operator that the second executor does not support.
    """

    def __init__(self, folder: str | Path, contract: dict, frames: int) -> None:
        self.frames = {*range(FIRST), int(LATER * frames)}  # numbers of the frames for `add`
        model = onnx.load(Path(folder, MODEL))
        self._runtime = next((runtime for runtime in READINGS if contract["checked"].get(runtime)), "")
        parsed, self._misread = as_parsed(model, self._runtime) if self._runtime else (model, [])
        self._session = ReferenceSession(parsed)
        self._plain = ReferenceSession(model) if self._misread else None
        self._pairs: list[tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]] = []
        self._by_reading = 0.0

    def add(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        """Runs a frame.

        Args:
            inputs: of the graph by name, memory included.
            outputs: of ONNX Runtime for these inputs, new memory included.

        Raises:
            ConfigError: the graph cannot be run as the parser reads it.
        """
        try:
            found = self._session.run(inputs)
            for name, values in found.items():
                if values.shape != outputs[name].shape:
                    raise ConfigError(f"{name} has the shape {values.shape} instead of {outputs[name].shape}")
        except ConfigError as error:
            if not self._misread:
                raise
            raise ConfigError(
                f"the parser of {self._runtime} misreads {_named(self._misread)}, and the graph that it reads cannot "
                f"be run ({error})"
            ) from None
        if self._plain:
            expected = self._plain.run(inputs)
            self._by_reading = np.max([self._by_reading, *(_relative(expected[x], found[x]).max() for x in found)])
        self._pairs.append(({name: outputs[name].copy() for name in found}, found))

    def result(self) -> SecondReading:
        """Returns the comparison of all frames."""
        differences: dict[str, list[np.ndarray]] = {}
        for expected, found in self._pairs:
            others = _tables(found)
            for name, rows in _tables(expected).items():
                other = others[name]
                if rows.ndim > 1 and np.isfinite(other).all():
                    other = other[match_rows(rows, other)]  # the order of queries is not defined
                differences.setdefault(name, []).append(_relative(rows, other).ravel())
        compared = [name for name in self._pairs[0][0] if is_compared(name)]
        expected, found = (
            {name: np.stack([pair[side][name] for pair in self._pairs]) for name in compared} for side in (0, 1)
        )
        finite = all(np.isfinite(values).all() for values in found.values())
        return SecondReading(
            runtime=self._runtime,
            frames=len(self._pairs),
            differences={name: (float(np.max(parts)), float(np.mean(parts))) for name, parts in differences.items()},
            share=relative_change(expected, found) if finite else np.inf,
            read_otherwise=tuple(self._misread),
            by_reading=float(self._by_reading),
        )


def _named(nodes: Sequence[str]) -> str:
    return ", ".join(nodes[:SHOWN]) + (f" and {len(nodes) - SHOWN} more" if len(nodes) > SHOWN else "")


def _tables(outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Joins outputs to one row per query [Q, ...], by "raw_box", "box", "raw_line" and "line"; keeps the memory."""
    tables = comparable_memory(
        {name.removeprefix("new_"): part for name, part in outputs.items() if name.startswith("new_memory")}
    )
    for prefix in ("raw_box", "box", "raw_line", "line"):
        columns = []
        for name, values in outputs.items():
            if name.startswith(f"{prefix}_"):
                values = values.reshape(len(values), -1).astype(np.float64)
                # Angles are periodic.
                columns += [np.cos(values), np.sin(values)] if name == "box_yaw" else [values]
        if columns:
            tables[prefix] = np.concatenate(columns, 1)
    return tables


def _relative(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns differences, relative for values above 1 and absolute for others."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    return np.abs(one - other) / np.maximum(1, np.abs(one))
