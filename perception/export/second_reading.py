"""Runs frames of a drive again by a second executor, which reads the graph as the oldest TensorRT parser does.

A parser that meets a form which it does not know may read something else instead of refusing it. ONNX Runtime cannot
show that, for it reads every form as ONNX means it. `as_parsed` therefore writes down in ONNX what a parser reads, and
`ReferenceSession` runs that: the answers have to be those of ONNX Runtime. `perception.export.dialect` refuses forms
that are known to be misread before anything runs; this is the check by numbers, which needs no list of good forms.

What parsers read is taken from their source (onnx/onnx-tensorrt, branches release/8.6-GA and release/10.0-GA). What is
not listed here is read as ONNX means it, or refused by the parser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from perception.errors import ConfigError
from perception.export.contract import MODEL
from perception.export.nodes import opset_of
from perception.export.quantize import changed, is_judged
from perception.export.reference import ReferenceSession
from perception.export.replay import aligned

FIRST, LATER = 2, 0.75  # frames that are run again: so many from the start, and the one at this share of the drive
LARGEST = 1e-3  # difference that passes in float32; what a reading alone may change in any precision
# By how much of their spread answers may differ in a precision that two executors round differently. Good exports stay
# below half of it, exports whose every GridSample is read as nearest are above twice of it (tests/test_reference.py).
SHARES = {"fp16": 0.01, "int8": 0.03, "fp8": 0.03}
SHOWN = 3  # nodes that a failure names


@dataclass
class _Graph:
    """What readings ask for: opset, constants by name, shapes by name."""

    opset: int
    constants: dict[str, np.ndarray]
    shapes: dict[str, list[int]]


def as_parsed(model: onnx.ModelProto, runtime: str) -> tuple[onnx.ModelProto, list[str]]:
    """Writes a graph as the parser of a runtime reads it.

    Args:
        model: without subgraphs.
        runtime: one of `READINGS`.

    Returns:
        A copy whose meaning in ONNX is what the parser makes of the graph, and the nodes and constants that are not
        what they were.
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
    del model.graph.value_info[:]  # shapes may be others now
    other = []
    for node in model.graph.node:
        before = node.SerializeToString(deterministic=True)
        if node.op_type in READINGS[runtime]:
            READINGS[runtime][node.op_type](node, graph)
        if node.SerializeToString(deterministic=True) != before:
            other.append(f"{node.op_type} {node.name}")
    if runtime == "TensorRT 8.6":
        other += _narrowed(model.graph)
    # Sizes that a reading has written down.
    known = {tensor.name for tensor in model.graph.initializer}
    model.graph.initializer.extend(
        numpy_helper.from_array(value, name) for name, value in graph.constants.items() if name not in known
    )
    return model, other


def _narrowed(graph: onnx.GraphProto) -> list[str]:
    """Cuts INT64 constants to 32 bits [onnx2trt_utils.cpp, convertINT64]; returns which were cut."""
    # A slice may end anywhere behind the last element.
    bounds = {name for node in graph.node if node.op_type == "Slice" for name in node.input[1:3]}
    limits, cut = np.iinfo(np.int32), []
    for tensor in graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT64 and tensor.name not in bounds:
            value = numpy_helper.to_array(tensor)
            narrow = value.clip(limits.min, limits.max)
            if (narrow != value).any():
                tensor.CopyFrom(numpy_helper.from_array(narrow, tensor.name))
                cut.append(f"constant {tensor.name}")
    return cut


# Readings by operator. In brackets the file and function that reads it; in release/10.0-GA builtin_op_importers.cpp is
# called onnxOpImporters.cpp, and onnx2trt_utils.cpp importerUtils.cpp.


def _grid_sample(node: onnx.NodeProto, graph: _Graph) -> None:
    """Unknown modes are nearest, unknown paddings zeros [builtin_op_importers.cpp, GridSample]."""
    mode = _attribute(node, "mode", b"bilinear")
    if mode not in (b"nearest", b"bilinear", b"bicubic"):
        _set(node, "mode", "nearest")
    if _attribute(node, "padding_mode", b"zeros") not in (b"zeros", b"border", b"reflection"):
        _set(node, "padding_mode", "zeros")


def _reduce(node: onnx.NodeProto, graph: _Graph) -> None:
    """Axes are read from the attribute, otherwise all are reduced [builtin_op_importers.cpp, Reduce...;
    onnx2trt_utils.cpp, reduceTensor]. Only ReduceSum passes on its second input, from opset 13 on; nothing reads
    noop_with_empty_axes."""
    if not (node.op_type == "ReduceSum" and graph.opset >= 13):
        del node.input[1:]
    if len(node.input) < 2:
        _unread(node, "noop_with_empty_axes", 0)


def _split(node: onnx.NodeProto, graph: _Graph) -> None:
    """Without sizes, every part has the size divided by the number of outputs, rounded down; num_outputs is not read
    [builtin_op_importers.cpp, Split]."""
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
    """The part that is wanted (opset 15) is not read [builtin_op_importers.cpp, Shape]."""
    _unread(node, "start", 0)
    _unread(node, "end", None)


def _constant(node: onnx.NodeProto, graph: _Graph) -> None:
    """Whole numbers are read from the fields of floats, which are empty [builtin_op_importers.cpp, Constant;
    OnnxAttrs.cpp, get<float>]."""
    for name, read in (("value_int", np.zeros((), np.int64)), ("value_ints", np.zeros(0, np.int64))):
        if _attribute(node, name, None) is not None:
            _set(node, name, None)
            _set(node, "value", numpy_helper.from_array(read))


def _quantize(node: onnx.NodeProto, graph: _Graph) -> None:
    """Several scales without an axis belong to axis 0, not 1 [builtin_op_importers.cpp, QuantDequantLinearHelper]."""
    scale = graph.constants.get(node.input[1])
    if scale is not None and scale.size > 1 and _attribute(node, "axis", None) is None:
        _set(node, "axis", 0)


def _attribute(node: onnx.NodeProto, name: str, default: object) -> object:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _unread(node: onnx.NodeProto, name: str, default: object) -> None:
    """Removes an attribute that has another value than its default."""
    if _attribute(node, name, default) != default:
        _set(node, name, None)


def _set(node: onnx.NodeProto, name: str, value: object) -> None:
    """Gives an attribute another value, or removes it where that is None."""
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    if len(kept) < len(node.attribute) or value is not None:
        del node.attribute[:]
        node.attribute.extend(kept if value is None else [*kept, helper.make_attribute(name, value)])


REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
_FROM_10: dict[str, Callable[[onnx.NodeProto, _Graph], None]] = {
    "GridSample": _grid_sample, "QuantizeLinear": _quantize, "DequantizeLinear": _quantize,
}  # fmt: skip
# By runtime, oldest first: the operators of which its parser reads some forms otherwise than ONNX means them.
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
    """How far the second executor is from ONNX Runtime.

    Args:
        runtime: whose parser's reading was run; empty for ONNX' own, where the export is for no TensorRT.
        frames: that were run again, each from the memory that ONNX Runtime had.
        differences: largest and mean by output, as in `Certificate.raw`; "box" and "line" are all decoded numbers.
        share: how much of their spread the raw outputs and the memory change, see `quantize.changed`.
        read_otherwise: nodes and constants that the parser reads otherwise than ONNX means them.
        by_reading: the largest difference that these alone make, in one and the same executor.
    """

    runtime: str
    frames: int
    differences: dict[str, tuple[float, float]]
    share: float
    read_otherwise: tuple[str, ...]
    by_reading: float

    def failures(self, precision: str) -> list[str]:
        """Why an export of this precision must not be used; empty if it may."""
        found = []
        if not self.by_reading <= LARGEST:
            found.append(
                f"the parser of {self.runtime} does not read {_named(self.read_otherwise)} as ONNX means it, and "
                f"answers change by up to {self.by_reading:.2e}"
            )
        if precision == "fp32":
            found += [
                f"{name} of the second executor differs by {largest:.2e}, more than {LARGEST:.0e}"
                for name, (largest, _) in self.differences.items()
                if not largest <= LARGEST
            ]
        elif not self.share <= SHARES[precision]:
            found.append(
                f"answers of the second executor differ by {self.share:.4f} of their spread, more than "
                f"{SHARES[precision]}"
            )
        return found

    def markdown(self) -> list[str]:
        """Lines for people."""
        reading = f"as the parser of {self.runtime} reads the graph" if self.runtime else "as ONNX defines the graph"
        return [
            f"{self.frames} frames again by another executor than ONNX Runtime, {reading}. Answers differ by "
            f"{self.share:.1e} of their spread. Nodes that are read otherwise than ONNX means them: "
            f"{len(self.read_otherwise)}; they change answers by up to {self.by_reading:.1e}.",
            "",
            "| output | largest difference | mean |",
            "|---|---|---|",
            *(f"| {name} | {largest:.2e} | {mean:.2e} |" for name, (largest, mean) in self.differences.items()),
            "",
        ]


class SecondExecutor:
    """Runs frames of a certificate's drive again and compares.

    Args:
        folder: of the export.
        contract: of `read_contract`; the reading is that of the oldest runtime that the export was checked for.
        frames: of the drive.

    Raises:
        ConfigError: the graph holds an operator that the second executor does not know.
    """

    def __init__(self, folder: str | Path, contract: dict, frames: int) -> None:
        self.frames = {*range(FIRST), int(LATER * frames)}  # numbers of those that are to be given to `add`
        model = onnx.load(Path(folder, MODEL))
        self._runtime = next((runtime for runtime in READINGS if contract["checked"].get(runtime)), "")
        parsed, self._other = as_parsed(model, self._runtime) if self._runtime else (model, [])
        self._session = ReferenceSession(parsed)
        self._plain = ReferenceSession(model) if self._other else None
        self._pairs: list[tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]] = []
        self._by_reading = 0.0

    def add(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        """Runs a frame again.

        Args:
            inputs: of the graph by name, memory included.
            outputs: what ONNX Runtime made of them, new memory included.

        Raises:
            ConfigError: the graph cannot be run as the parser reads it.
        """
        try:
            found = self._session.run(inputs)
            for name, values in found.items():
                if values.shape != outputs[name].shape:
                    raise ConfigError(f"{name} has the shape {values.shape} instead of {outputs[name].shape}")
        except ConfigError as error:
            if not self._other:
                raise
            raise ConfigError(
                f"the parser of {self._runtime} does not read {_named(self._other)} as ONNX means it, and what it "
                f"reads cannot be run ({error})"
            ) from None
        if self._plain:
            meant = self._plain.run(inputs)
            self._by_reading = np.max([self._by_reading, *(_relative(meant[x], found[x]).max() for x in found)])
        self._pairs.append(({name: outputs[name].copy() for name in found}, found))

    def result(self) -> SecondReading:
        """The comparison of all frames that were given."""
        differences: dict[str, list[np.ndarray]] = {}
        for wanted, found in self._pairs:
            others = _tables(found)
            for name, rows in _tables(wanted).items():
                other = others[name]
                if name != "memory" and np.isfinite(other).all():
                    other = other[aligned(rows, other)]  # two equally good queries may come in either order
                differences.setdefault(name, []).append(_relative(rows, other).ravel())
        judged = [name for name in self._pairs[0][0] if is_judged(name)]
        wanted, found = (
            {name: np.stack([pair[side][name] for pair in self._pairs]) for name in judged} for side in (0, 1)
        )
        finite = all(np.isfinite(values).all() for values in found.values())
        return SecondReading(
            runtime=self._runtime,
            frames=len(self._pairs),
            differences={name: (float(np.max(parts)), float(np.mean(parts))) for name, parts in differences.items()},
            share=changed(wanted, found) if finite else np.inf,
            read_otherwise=tuple(self._other),
            by_reading=float(self._by_reading),
        )


def _named(nodes: Sequence[str]) -> str:
    return ", ".join(nodes[:SHOWN]) + (f" and {len(nodes) - SHOWN} more" if len(nodes) > SHOWN else "")


def _tables(outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs as one row per query [Q, ...] by "raw_box", "box", "raw_line" and "line"; the memory as it is."""
    tables = {"memory": outputs["new_memory"]} if "new_memory" in outputs else {}
    for prefix in ("raw_box", "box", "raw_line", "line"):
        columns = []
        for name, values in outputs.items():
            if name.startswith(f"{prefix}_"):
                values = values.reshape(len(values), -1).astype(np.float64)
                # One direction has many angles.
                columns += [np.cos(values), np.sin(values)] if name == "box_yaw" else [values]
        if columns:
            tables[prefix] = np.concatenate(columns, 1)
    return tables


def _relative(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Differences; of numbers larger than one, in units of these."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    return np.abs(one - other) / np.maximum(1, np.abs(one))
