"""Checks that a graph has only operator forms that the parsers of all supported TensorRT versions read correctly.

A parser does not always reject a form that it does not support. The parsers of TensorRT 8.5 to 11.1 and of TensorRT-RTX
up to 1.5 read GridSample's mode `linear` (opset 20) as `nearest`, and the parser of TensorRT 8.6 reduces all axes if
they are an input of ReduceMax (opset 18). Runs in ONNX Runtime cannot show this. `FORMS` therefore lists, for every
operator of our exports, the forms that are known to be read as ONNX defines them, and `check_dialect` rejects a graph
with any other form. `RUNTIMES` names the sources of this knowledge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from perception.errors import ConfigError
from perception.export.nodes import UNKNOWN, Node, nodes_of, opset_of

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Runtime:
    """A runtime whose parser graphs are checked for.

    Args:
        opset: the newest opset for which the behaviour of the parser is known; operators of newer opsets are rejected.
        checked_by: how the forms were checked.
        source: repository, branch and files; or what was read or run instead of the source.
    """

    opset: int
    checked_by: str
    source: str


RUNTIMES = {
    "TensorRT 8.6": Runtime(
        17,  # docs/operators.md of the branch: "supports operators up to Opset 17"
        "parser source read",
        "onnx/onnx-tensorrt, release/8.6-GA, builtin_op_importers.cpp and onnx2trt_utils.cpp",
    ),
    "TensorRT 10.0": Runtime(
        19, "parser source read", "onnx/onnx-tensorrt, 10.0-GA, onnxOpImporters.cpp and importerUtils.cpp"
    ),
    "TensorRT 10.13": Runtime(
        19,
        "parser source read",
        # The source of 10.13 was not read, but those of a version before and a version after it, and the release notes.
        "onnx/onnx-tensorrt, onnxOpImporters.cpp and importerUtils.cpp of 10.10 (gedoensmax/onnx-tensorrt, "
        "external-weight-10-10) and onnxOpImporters.cpp of commit dd0a3a9, which has operators of 10.14; release notes "
        "of 10.11 to 10.13; NVIDIA/TensorRT#4646",
    ),
    "TensorRT 11": Runtime(
        19,
        "release notes read",
        "source not read; release notes of 11.0 to 11.5, and onnx/onnx-tensorrt PR 1060, whose author ran 11.1",
    ),
    "TensorRT-RTX 1.5": Runtime(19, "forms run through its parser", "parser of 1.5.0.114 run, its layers compared"),
    "TensorRT-RTX 1.7": Runtime(20, "forms run through its parser", "parser of 1.7.1.116 run, its layers compared"),
}
EVERY = tuple(RUNTIMES)
FROM_10 = EVERY[1:]
OLDEST_OPSET = 17
FLOORED = ("nearest", "asymmetric", "floor")  # of Resize
LARGEST_RANK, LARGEST_K = 8, 3840
MANY = 1 << 20  # inputs or outputs
SHOWN = 3  # findings in an error message

FLOATS = frozenset({"FLOAT", "FLOAT16"})
NUMBERS = FLOATS | {"INT32", "INT64"}
MOVED = NUMBERS | {"BOOL"}  # types for operators that only move elements
BOOL = frozenset({"BOOL"})
FLAG = (0, 1)


def any_value(value: object) -> bool:
    """Accepts every value of an attribute, for attributes that all parsers pass on."""
    return True


# Conditions on several attributes or inputs. Each returns an error as text, "" for none.


def _four_dimensional(node: Node) -> str:
    ranks = [len(node.shape(k)) for k in range(len(node.inputs)) if len(node.shape(k)) > 1]
    return "" if set(ranks) == {4} else f"inputs have ranks {ranks}, all parsers support only 4"


def _convolution(node: Node) -> str:
    weight = node.constant(1) is not None or node.inputs[1] in node.tensors.dequantized
    return _four_dimensional(node) or ("" if weight else "its weight is not constant")


def _two_dimensional(node: Node) -> str:
    return "" if len(node.shape(0)) == len(node.shape(1)) == 2 else "its inputs are not matrices"


def _matrices(node: Node) -> str:
    return "" if min(len(node.shape(0)), len(node.shape(1))) >= 2 else "an input is not a matrix"


def _float32(node: Node) -> str:
    # TensorRT 10.10 and later compute it in the type of the input and ignore stash_type.
    kinds = {node.kind(k) for k in range(3)}
    return "" if kinds == {"FLOAT"} else f"its inputs are {', '.join(sorted(kinds))}; it has to be in FLOAT"


def _reduced(node: Node) -> str:
    axes = node.attributes.get("axes") if len(node.inputs) == 1 else node.constant(1)
    return "" if axes is not None and len(axes) else "its axes are empty"


def _resized(node: Node) -> str:
    if node.has(1) or node.has(2):
        return "it has a region or scales; give sizes alone"
    names = "mode", "coordinate_transformation_mode", "nearest_mode"
    mode, transformation, rounding = (node.attributes[name] for name in names)
    if (mode, transformation) != ("linear", "half_pixel") and (mode, transformation, rounding) != FLOORED:
        return f"it is {mode}, {transformation}, {rounding}; give linear, half_pixel or {', '.join(FLOORED)}"
    sizes, shape = node.constant(3), node.shape(0)
    kept = sizes is not None and len(shape) == 4 and tuple(sizes[:2]) == shape[:2]
    return "" if kept else "sizes are not those of the two last of 4 axes"


def _split(node: Node) -> str:
    if len(node.inputs) > 1:
        return ""
    size, count = node.shape(0)[node.attributes["axis"]], len(node.outputs)
    return f"{size} elements are split into {count} unequal parts without sizes" if size % count else ""


def _top(node: Node) -> str:
    constant = node.constant(1)
    assert constant is not None  # see `Form.constants`
    k = int(constant.reshape(-1)[0])
    return "" if 0 < k <= LARGEST_K else f"k is {k}, larger than {LARGEST_K}"


def _cast(node: Node) -> str:
    number = {1: "FLOAT", 10: "FLOAT16", 6: "INT32", 7: "INT64", 9: "BOOL"}
    to = number.get(node.attributes["to"])
    known = to in FLOATS if node.kind(0) == "UINT8" else to is not None
    return "" if known else f"{node.kind(0)} is cast to type {node.attributes['to']}"


def _filled(node: Node) -> str:
    kind = node.tensors.kinds.get(node.outputs[0], UNKNOWN)[0]
    return "" if kind == "FLOAT" else f"it is filled with {kind} instead of FLOAT"


def _condition(node: Node) -> str:
    same = node.kind(0) == "BOOL" and node.kind(1) == node.kind(2) and node.kind(1) in MOVED
    return "" if same else f"its inputs are {', '.join(node.kind(k) for k in range(3))}"


def _einsum(node: Node) -> str:
    equation = node.attributes["equation"].replace(" ", "")
    operands, arrow, result = equation.partition("->")
    terms = operands.split(",")
    simple = arrow and len(terms) == 2 and all(t.isascii() and t.isalpha() and t.islower() for t in (*terms, result))
    distinct = all(len(set(term)) == len(term) for term in (*terms, result))
    return "" if simple and distinct else f"equation {equation!r} is not of two operands with letters a to z, each once"


def _quantized(node: Node) -> str:
    """Accepts symmetric INT8 with float32 scales; from opset 19 on also FLOAT8E4M3FN and float16 scales."""
    quantizes = node.operator == "QuantizeLinear"
    number, real = node.kind(2), node.kind(0) if quantizes else node.kind(1)
    if number not in ({"INT8"} if node.version < 19 else {"INT8", "FLOAT8E4M3FN"}):
        return f"it is quantized to {number}; give INT8 or, from opset 19 on, FLOAT8E4M3FN"
    if node.kind(1) != real or real not in ({"FLOAT"} if node.version < 19 else FLOATS):
        return f"its scale is {node.kind(1)} and its values are {real}; give FLOAT, from opset 19 on FLOAT16 too"
    if not quantizes and node.kind(0) != number:
        return f"its values are {node.kind(0)} and its zero point is {number}"
    scale, zero = node.constant(1), node.constant(2)
    assert scale is not None and zero is not None  # see `Form.constants`
    if not (scale.astype(np.float32) > 0).all():
        return "a scale is not above 0"
    if zero.shape != scale.shape or zero.astype(np.float32).any():
        return "its zero points are not as many zeros as scales"
    if scale.size > 1 and "axis" not in node.given:
        return "it has a scale per channel but no axis, and parsers take axis 0"  # ONNX: axis 1
    if scale.size > 1 and (quantizes or node.constant(0) is None):
        return "it has a scale per channel for values that are not constant"
    return ""


@dataclass(frozen=True)
class Form:
    """A form of one or more operators that parsers read as ONNX defines it.

    Args:
        operators: names, separated by spaces.
        types: element types of the first input.
        inputs: smallest and largest number of inputs.
        constants: inputs that must be constants of the graph.
        attributes: by name, the values that parsers read correctly, or a function that accepts them; a node with any
            other attribute is rejected.
        outputs: largest number of outputs.
        versions: oldest and newest version of the operator with this form.
        runtimes: that read this form correctly.
        functions: of the parser's source that read it, if they are not named after the operator.
        otherwise: how a parser misreads other forms, for messages.
        condition: further condition; returns an error as text, "" for none.
    """

    operators: str
    types: frozenset[str]
    inputs: tuple[int, int]
    constants: tuple[int, ...] = ()
    attributes: Mapping[str, tuple[Any, ...] | Callable[[object], bool]] = field(default_factory=dict)
    outputs: int = 1
    versions: tuple[int, int] = (1, 19)
    runtimes: tuple[str, ...] = EVERY
    functions: str = ""
    otherwise: str = ""
    condition: Callable[[Node], str] | None = None

    def findings(self, node: Node) -> list[str]:
        """Returns the differences between a node and this form as texts."""
        least, most = self.inputs
        if not least <= len(node.inputs) <= most:
            counted = f"{least}" if least == most else f"{least} to {most}"
            return [f"it has {len(node.inputs)} inputs instead of {counted}"]
        found = []
        if len(node.outputs) > self.outputs:
            found.append(f"it has {len(node.outputs)} outputs, more than {self.outputs}")
        if node.kind(0) not in self.types:
            found.append(f"its input is {node.kind(0)}")
        for k in self.constants:
            if node.has(k) and node.constant(k) is None:
                found.append(f"input {k} is not constant")
        for name in node.given:
            if name not in self.attributes:
                found.append(f"it has the attribute {name}")
        for name, allowed in self.attributes.items():
            value = node.attributes.get(name)
            if value is not None and not (allowed(value) if callable(allowed) else value in allowed):
                found.append(f"{name} is {value!r}")
        if not found and self.condition:
            found = [text for text in (self.condition(node),) if text]
        return found


AXES_AS_INPUT = "TensorRT 8.6 ignores axes that are an input and reduces all; write them as an attribute (opset 17)"
SPATIAL: dict[str, tuple[Any, ...] | Callable[[object], bool]] = {
    "auto_pad": ("NOTSET",), "dilations": any_value, "kernel_shape": any_value, "pads": any_value, "strides": any_value,
}  # fmt: skip
FORMS = (
    Form("Add Sub Mul Max Min", NUMBERS, (2, 2), functions="elementwiseHelper"),
    Form("Div", FLOATS, (2, 2), functions="elementwiseHelper"),
    Form("Equal Greater Less GreaterOrEqual LessOrEqual", NUMBERS, (2, 2), functions="elementwiseHelper"),
    Form("And Or", BOOL, (2, 2), functions="elementwiseHelper"),
    Form("Mod", frozenset({"INT32", "INT64"}), (2, 2), attributes={"fmod": (0,)}, functions="modWithIntegerInputs"),
    Form(
        "Abs Atan Cos Exp Floor Log Neg Reciprocal Round Sin Sqrt", FLOATS, (1, 1), functions="unaryHelper"
    ),  # ties of Round go to even numbers in both
    Form("Not", BOOL, (1, 1), functions="unaryHelper"),
    Form("IsNaN", FLOATS, (1, 1), versions=(13, 20)),  # up to TensorRT 10.0 it becomes not (x == x)
    Form("Relu Sigmoid", FLOATS, (1, 1), functions="activationHelper"),
    Form("Clip", NUMBERS, (1, 3), constants=(1, 2), functions="Clip, elementwiseClipHelper"),
    Form(
        "Cast", MOVED | {"UINT8"}, (1, 1), attributes={"to": any_value, "saturate": (1,)}, condition=_cast
    ),  # INT64 becomes INT32 in TensorRT 8.6
    Form("Where", BOOL, (3, 3), condition=_condition),
    Form("Reshape", MOVED, (2, 2), constants=(1,), attributes={"allowzero": FLAG}),
    Form("Transpose", MOVED, (1, 1), attributes={"perm": any_value}),
    Form("Squeeze Unsqueeze Expand", MOVED, (2, 2), constants=(1,)),
    Form("Concat", MOVED, (1, MANY), attributes={"axis": any_value}),
    Form("Slice", MOVED, (4, 5), constants=(1, 2, 3, 4)),
    Form("Gather GatherElements", MOVED, (2, 2), attributes={"axis": any_value}),
    Form("GatherND", MOVED, (2, 2), attributes={"batch_dims": (0,)}),
    Form(
        "ConstantOfShape", frozenset({"INT64"}), (1, 1), constants=(0,), attributes={"value": any_value},
        condition=_filled,
    ),
    Form("Pad", NUMBERS, (2, 3), constants=(1, 2), attributes={"mode": ("constant",)}),
    Form(
        "Split", MOVED, (1, 2), constants=(1,), outputs=MANY, attributes={"axis": any_value}, versions=(13, 17),
        condition=_split,
    ),
    Form(
        "Split", MOVED, (1, 2), constants=(1,), outputs=MANY, versions=(18, 19), condition=_split,
        attributes={"axis": any_value, "num_outputs": any_value},
    ),
    *(
        form
        for operators, types in (("ReduceMax ReduceMin", NUMBERS), ("ReduceMean ReduceL2", FLOATS))
        for form in (
            Form(
                operators, types, (1, 1), attributes={"axes": any_value, "keepdims": FLAG}, versions=(11, 17),
                functions="reduceTensor", condition=_reduced, otherwise=AXES_AS_INPUT,
            ),
            Form(
                operators, types, (2, 2), constants=(1,), attributes={"keepdims": FLAG, "noop_with_empty_axes": (0,)},
                versions=(18, 20), functions="reduceTensor", condition=_reduced, otherwise=AXES_AS_INPUT,
            ),
        )
    ),
    Form(
        "ReduceSum", NUMBERS, (2, 2), constants=(1,), attributes={"keepdims": FLAG, "noop_with_empty_axes": (0,)},
        functions="reduceTensor", condition=_reduced,
    ),
    Form("Softmax", FLOATS, (1, 1), attributes={"axis": any_value}, versions=(13, 19), functions="addSoftmax"),
    Form(
        "LayerNormalization", FLOATS, (3, 3), attributes={"axis": any_value, "epsilon": any_value, "stash_type": (1,)},
        condition=_float32,
    ),
    Form("MatMul", FLOATS, (2, 2), condition=_matrices),
    Form(
        "Gemm", FLOATS, (2, 3), attributes={"alpha": (1.0,), "beta": (1.0,), "transA": FLAG, "transB": FLAG},
        condition=_two_dimensional,
    ),
    Form("Einsum", FLOATS, (2, 2), attributes={"equation": any_value}, condition=_einsum),
    Form(
        "Conv", FLOATS, (2, 3), constants=(2,), attributes=SPATIAL | {"group": any_value}, condition=_convolution,
        functions="Conv, convMultiInput, getKernelParams",
    ),
    Form(
        "MaxPool", FLOATS, (1, 1), functions="poolingHelper, getKernelParams", condition=_four_dimensional,
        attributes=SPATIAL | {"ceil_mode": (0,), "storage_order": (0,), "dilations": ([1, 1],)},
    ),
    Form(
        "Resize", FLOATS, (4, 4), constants=(3,), condition=_resized,
        attributes={
            "mode": any_value, "coordinate_transformation_mode": any_value, "nearest_mode": any_value,
            "antialias": (0,), "exclude_outside": (0,), "extrapolation_value": (0.0,),
            "keep_aspect_ratio_policy": ("stretch",), "cubic_coeff_a": any_value,  # read for other modes only
        },
        otherwise="TensorRT 8.6 ignores antialias and axes",
    ),
    Form(
        "GridSample", FLOATS, (2, 2), versions=(16, 19), condition=_four_dimensional,
        attributes={"mode": ("bilinear", "nearest"), "padding_mode": ("zeros", "border"), "align_corners": FLAG},
        otherwise="parsers read unknown modes as nearest; write bilinear (opset 17)",
    ),
    Form(
        "GridSample", FLOATS, (2, 2), versions=(20, 20), condition=_four_dimensional,
        attributes={"mode": ("linear", "nearest"), "padding_mode": ("zeros", "border"), "align_corners": FLAG},
        runtimes=("TensorRT-RTX 1.7",),
        otherwise="parsers read unknown modes as nearest; write bilinear (opset 17)",
    ),
    Form(
        "TopK", FLOATS, (2, 2), constants=(1,), outputs=2, condition=_top,
        attributes={"axis": any_value, "largest": FLAG, "sorted": (1,)},
    ),
    Form(
        "QuantizeLinear", FLOATS, (3, 3), constants=(1, 2), attributes={"axis": any_value, "saturate": (1,)},
        condition=_quantized, functions="QuantDequantLinearHelper",
        otherwise="the parser of TensorRT 8.6 checks every scale as if it were FLOAT, and supports no 8-bit floats",
    ),
    Form(
        "DequantizeLinear", frozenset({"INT8", "FLOAT8E4M3FN"}), (3, 3), constants=(1, 2),
        attributes={"axis": any_value}, condition=_quantized, functions="QuantDequantLinearHelper",
        otherwise="the parser of TensorRT 8.6 checks every scale as if it were FLOAT, and supports no 8-bit floats",
    ),
)  # fmt: skip


def check_dialect(model: onnx.ModelProto, runtimes: Sequence[str] | None = None) -> dict[str, list[str]]:
    """Checks that the parsers of runtimes read a graph as ONNX defines it.

    Args:
        model: without subgraphs.
        runtimes: names from `RUNTIMES`. None means all of them, or those with 8-bit floats for a graph that has some.
            Give an empty sequence for an export that is not for TensorRT.

    Returns:
        The checks that were made, by name of every runtime; empty for a runtime that was not checked. `build_engines`
        adds the check that runs the parser.

    Raises:
        ConfigError: a node has a form, or an operator, that is not known to be read correctly; the message names node,
            form and runtimes.
    """
    import onnx

    if runtimes is None:
        eight = onnx.TensorProto.FLOAT8E4M3FN
        floats8 = any(tensor.data_type == eight for tensor in model.graph.initializer)
        runtimes = FROM_10 if floats8 else EVERY
    opset = opset_of(model)
    if opset < OLDEST_OPSET:
        raise ConfigError(
            f"the graph is of opset {opset}; write it in {OLDEST_OPSET} or newer: how parsers read older operators is "
            f"not known ({', '.join(runtimes)})"
        )
    findings = []
    for node in nodes_of(model) if runtimes else ():
        texts: dict[str, list[str]] = {}  # runtimes by finding
        for runtime in runtimes:
            for text in _findings(node, runtime):
                texts.setdefault(text, []).append(runtime)
        findings += [
            f"{node.operator} {node.name}: {text} ({', '.join(hit)}; {RUNTIMES[hit[0]].source})"
            for text, hit in texts.items()
        ]
    if findings:
        more = f"; and {len(findings) - SHOWN} more" if len(findings) > SHOWN else ""
        raise ConfigError(
            f"the graph has forms that a TensorRT parser may misread: {'; '.join(findings[:SHOWN])}{more}"
        )
    return {name: [runtime.checked_by] if name in runtimes else [] for name, runtime in RUNTIMES.items()}


@cache
def _forms_of(operator: str) -> list[Form]:
    return [form for form in FORMS if operator in form.operators.split()]


def _findings(node: Node, runtime: str) -> list[str]:
    """Returns the reasons why a runtime may misread a node."""
    forms = _forms_of(node.operator)
    if not forms:
        return ["this operator was not checked for any parser"]
    form = next((form for form in forms if form.versions[0] <= node.version <= form.versions[1]), forms[0])
    oldest, newest = form.versions[0], min(form.versions[1], RUNTIMES[runtime].opset)
    if runtime in form.runtimes and oldest <= node.version <= newest:
        found = form.findings(node)
    else:
        found = [f"its form of opset {node.version} is not known to be read correctly"]
    if found and form.otherwise:
        found[-1] += f", and {form.otherwise}"
    for name in node.outputs:
        if len(node.tensors.kinds.get(name, UNKNOWN)[1]) > LARGEST_RANK:
            found.append(f"output {name} has more than {LARGEST_RANK} axes")
    if runtime == EVERY[0] and node.operator != "Slice":  # the end of a slice may be any number after the last element
        constants = [value for value in map(node.constant, range(len(node.inputs))) if value is not None]
        if any(value.dtype == np.int64 and np.abs(value).max(initial=0) >= 2**31 for value in constants):
            found.append("a constant does not fit in 32 bits, to which INT64 is clipped")
    return [f"{text} [{form.functions or node.operator}]" for text in found]
