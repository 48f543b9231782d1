"""Eight bits by post-training quantisation: ranges from real frames, and layers that suffer most left as they are.

Quantised tensors are marked in the graph (QuantizeLinear, DequantizeLinear), weights channel by channel, so the graph
runs and is certified in ONNX Runtime, and TensorRT takes the same marks for its kernels. Calibration and marks are
those of ONNX Runtime; which layers are marked is found out here: each group of layers is quantised alone, and what
that changes in the network's answers over a short drive, its memory fed back, is its sensitivity.

Three kinds of eight bits: whole numbers around zero ("int8", for TensorRT), whole numbers from zero up for what flows
between the layers ("uint8", for which CPUs have instructions) and floats with four bits of exponent ("fp8", E4M3).
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from perception.data.nuscenes import NuScenesDataset
from perception.errors import DataError
from perception.export.contract import ImageInputs
from perception.export.half import WEIGHTED
from perception.export.lowering import OPSET_FP8
from perception.export.replay import aligned, camera_frame, filled, frame_inputs, replay_frames
from perception.export.runtime import session_options

RANGES_FROM, JUDGED_ON = 16, 6  # frames: spread over a drive, and one after the other
BAD_EVERY = 4  # of the former, one in so many comes again with a black image, and again with a white one
KINDS = ("int8", "uint8", "fp8")
LARGEST_INT8, LARGEST_FP8 = 127.0, 448.0
# By how much of its spread all layers in eight bits together may change an answer; for it the most sensitive are left
# out.
BUDGET = 0.015
PERCENTILE = 99.99  # of absolute values that a range holds; what lies beyond is cut off


def is_judged(name: str) -> bool:
    """Tells whether an output counts when answers of two graphs are compared."""
    return name.startswith("raw_") or name == "new_memory"


Moment = Mapping[str, np.ndarray]  # the inputs of one pass by name


@dataclass
class Quantizer:
    """Quantises one graph in several ways with ranges that are found once.

    Args:
        model: an `onnx.ModelProto` in float32, as `perception.export.onnx` traces it.
        frames: inputs of real frames, memory included; the ranges come from them.
        kind: one of KINDS.
    """

    model: object
    moments: Sequence[Moment]
    kind: str
    groups: dict[str, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.groups = layer_groups(self.model)
        self._folder = tempfile.TemporaryDirectory(prefix="perception-quantize-")
        self._path = Path(self._folder.name, "float.onnx")  # the library changes models that it is given as objects
        self._path.write_bytes(self.model.SerializeToString())

    def quantized(self, groups: Iterable[str]):
        """The graph with the layers of these groups in eight bits."""
        import onnx
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

        out = Path(self._folder.name, "model.onnx")
        nodes = [name for group in groups for name in self.groups[group]]
        options = {
            "ActivationSymmetric": self.kind != "uint8",
            "WeightSymmetric": True,
            # Its scale would be too small for halves; CPUs add it in whole numbers.
            "QuantizeBias": self.kind == "uint8",
            "CalibPercentile": PERCENTILE,
        }
        with quiet():
            quantize_static(
                self._path,
                out,
                _Reader(self.moments),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(WEIGHTED),
                per_channel=True,
                activation_type=QuantType.QUInt8 if self.kind == "uint8" else QuantType.QInt8,
                weight_type=QuantType.QInt8,
                nodes_to_quantize=nodes,
                calibrate_method=CalibrationMethod.Percentile,
                calibration_cache_path=Path(self._folder.name, "ranges.json"),
                extra_options=options,
            )
        return in_float8(onnx.load(out), self.model) if self.kind == "fp8" else onnx.load(out)

    def sensitivities(
        self, moments: Sequence[Moment], wanted: Mapping[str, np.ndarray], progress: bool = False
    ) -> dict[str, float]:
        """By group, what its quantisation alone changes in the wanted answers (see `changed`), most sensitive first."""
        groups = tqdm(self.groups, desc="sensitivities", unit="group", disable=not progress)
        found = {group: changed(wanted, answers(self.quantized([group]), moments, self.kind)) for group in groups}
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def quantize_graph(model, moments: Sequence[Moment], kind: str, *, progress: bool = False) -> tuple[object, dict]:
    """A graph with marks of eight bits wherever that changes its answers little.

    Args:
        model: an `onnx.ModelProto` in float32.
        frames: inputs of real frames; the last few, one after the other, judge, the others give ranges.
        kind: one of KINDS.
        progress: show progress bars on stderr.

    Returns:
        The graph, and plain JSON values: the sensitivity of each group of layers, its share of all multiplications with
        weights, the groups that are in eight bits, and what all of them together change.
    """
    judges = moments[-JUDGED_ON:]
    quantizer = Quantizer(model, moments[:-JUDGED_ON], kind)
    wanted = answers(model, judges)
    sensitivities = quantizer.sensitivities(judges, wanted, progress)
    work = group_work(model, quantizer.groups)
    # Left out first is what changes most for what it saves.
    groups = sorted(sensitivities, key=lambda group: -sensitivities[group] / work[group])
    left_out, enough = 0, len(groups) - 1  # one group is always in eight bits
    with tqdm(total=enough.bit_length(), desc="search", unit="trial", disable=not progress) as bar:
        while left_out < enough:  # more left out is closer to the original: the fewest that do are found by halving
            middle = (left_out + enough) // 2
            if changed(wanted, answers(quantizer.quantized(groups[middle:]), judges, kind)) <= BUDGET:
                enough = middle
            else:
                left_out = middle + 1
            bar.update()
    graph = quantizer.quantized(groups[enough:])
    together = changed(wanted, answers(graph, judges, kind))
    told = {"sensitivities": sensitivities, "work": work, "groups": groups[enough:], "together": together}
    return graph, told


def in_float8(marked, model):
    """A graph with marks of INT8 as one with the same ranges in FP8 (E4M3).

    Args:
        marked: with signed marks around zero.
        model: the graph in float32 that it was made from, where the weights still have all their digits.
    """
    import ml_dtypes
    import onnx
    from onnx import numpy_helper

    graph = onnx.ModelProto.FromString(marked.SerializeToString())
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    replaced: dict[str, np.ndarray] = {}
    for node in graph.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        value, scale, zero = node.input
        replaced[scale] = (constants[scale] * (LARGEST_INT8 / LARGEST_FP8)).astype(np.float32)
        replaced[zero] = np.zeros(constants[zero].shape, ml_dtypes.float8_e4m3fn)
        if value in constants:
            weight = numpy_helper.to_array(weights[value.removesuffix("_quantized")])
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
            shape = [-1 if k == axis else 1 for k in range(weight.ndim)]
            replaced[value] = (weight / replaced[scale].reshape(shape)).astype(ml_dtypes.float8_e4m3fn)
    for tensor in graph.graph.initializer:
        if tensor.name in replaced:
            tensor.CopyFrom(numpy_helper.from_array(replaced[tensor.name], tensor.name))
    del graph.graph.value_info[:]  # they tell the old types
    for entry in graph.opset_import:
        if entry.domain == "":
            entry.version = OPSET_FP8  # no older one takes 8-bit floats
    return graph


def changed(wanted: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> float:
    """Mean over the outputs of the mean difference, as a share of the standard deviation of what is wanted.

    Boxes and lines count as much as they are sure, whatever the order in which the queries give them.
    """
    shares = []
    for kind in ("box", "line"):
        names = [name for name in wanted if name.startswith(f"raw_{kind}_")]  # logits are the first
        if not names:
            continue
        parts = [wanted[name].reshape(*wanted[name].shape[:2], -1) for name in names]  # [frames, Q, ...]
        logits = parts[0]
        sure = 1 / (1 + np.exp(-logits.max(-1)))  # [frames, Q]
        others = [found[name].reshape(part.shape) for name, part in zip(names, parts, strict=True)]
        rows, other_rows = np.concatenate(parts, -1), np.concatenate(others, -1)
        off = np.abs(np.stack([b[aligned(a, b)] for a, b in zip(rows, other_rows, strict=True)]) - rows)
        ends = np.cumsum([part.shape[-1] for part in parts])[:-1]
        for part, values in zip(np.split(off, ends, -1), parts, strict=True):
            shares.append(np.average(part.mean(-1), weights=sure) / max(values.std(), 1e-6))
    if "new_memory" in wanted:
        memory = wanted["new_memory"]
        shares.append(np.abs(found["new_memory"] - memory).mean() / max(memory.std(), 1e-6))
    return float(np.mean(shares))


def record(model, dataset: NuScenesDataset, images: ImageInputs, *, progress: bool = False) -> list[Moment]:
    """Inputs of a graph at frames of a drive, with the memory that the graph itself had then.

    Args:
        model: the graph, an `onnx.ModelProto` in float32.
        dataset: to drive through.
        images: how the graph takes them.
        progress: show a progress bar on stderr.

    Returns:
        RANGES_FROM frames spread evenly, in between some of them again with a black and with a white image, then
        JUDGED_ON that follow one another: the last of the drive.

    Raises:
        DataError: the dataset is too short for that.
    """
    if len(dataset) < RANGES_FROM + JUDGED_ON:
        raise DataError(
            f"the dataset for the ranges of eight bits has {len(dataset)} frames; it needs {RANGES_FROM + JUDGED_ON}"
        )
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    shapes = {x.name: x.shape for x in session.get_inputs()}
    memory = {"memory": np.zeros(shapes["memory"], np.float32)} if "memory" in shapes else {}
    last = range(len(dataset) - JUDGED_ON, len(dataset))
    spread = np.linspace(0, last[0] - 1, RANGES_FROM).round().astype(int).tolist()
    moments = []
    frames = tqdm(
        replay_frames(dataset, len(images.sizes)),
        total=len(dataset),
        desc="calibration",
        unit="frame",
        disable=not progress,
    )
    for number, (_, frame) in enumerate(frames):
        moment = frame_inputs(camera_frame(frame, images)) | memory
        variants = [moment] if number in spread or number in last else []
        if number in spread[::BAD_EVERY]:  # a blinded camera must not drive the layers out of their ranges
            for camera, grey in ((number, 0), (number + 1, 255)):
                variants.append(frame_inputs(camera_frame(filled(frame, camera, grey), images)) | memory)
        moments += [{name: array.copy() for name, array in variant.items()} for variant in variants]
        if memory:
            memory = {"memory": session.run(["new_memory"], moment)[0]}
    return moments


def layer_groups(model) -> dict[str, list[str]]:
    """Names of the nodes with weights by part of the network: two words of a weight's name, four in the image backbone,
    three in the layers of the decoders."""
    constants = {tensor.name for tensor in model.graph.initializer}
    groups: dict[str, list[str]] = {}
    for node in model.graph.node:
        if node.op_type in WEIGHTED and len(node.input) > 1 and node.input[1] in constants:
            words = node.input[1].removeprefix("network.").split(".")
            if len(words) > 1:  # a weight under its own name; others were made by the exporter
                count = 4 if "backbone" in words[:2] and "stages" in words else 3 if words[1] == "layers" else 2
                groups.setdefault(".".join(words[:count]), []).append(node.name)
    return groups


def group_work(model, groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """By group, its share of the multiplications with weights."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.value_info, *graph.output)
    shapes = {value.name: [x.dim_value for x in value.type.tensor_type.shape.dim] for value in values}
    shapes |= {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    weighted = {name for names in groups.values() for name in names}
    count = {}
    for node in graph.node:
        if node.name in weighted:
            weight = shapes[node.input[1]]  # [out, in / groups, h, w] or [in, out]
            each = np.prod(weight[1:]) if node.op_type == "Conv" else weight[0]
            count[node.name] = float(np.prod(shapes[node.output[0]])) * float(each)
    work = {group: sum(count[name] for name in names) for group, names in groups.items()}
    total = sum(work.values())
    return {group: amount / total for group, amount in work.items()}


def answers(model, moments: Sequence[Moment], precision: str = "fp32") -> dict[str, np.ndarray]:
    """What a graph says to frames that follow one another: [frames, ...] by name of the raw outputs.

    It starts from the memory of the first frame and goes on with its own.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(
        model.SerializeToString(), session_options(precision), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs() if is_judged(output.name)]
    rows, memory = [], {}
    for moment in moments:
        rows.append(session.run(names, {**moment, **memory}))
        if "new_memory" in names:
            memory = {"memory": rows[-1][names.index("new_memory")]}
    return {name: np.stack([row[k] for row in rows]) for k, name in enumerate(names)}


class _Reader:
    def __init__(self, moments: Sequence[Moment]) -> None:
        self._left = iter(moments)

    def get_next(self) -> dict | None:
        """The next frame, None after the last."""
        return next((dict(moment) for moment in self._left), None)


@contextlib.contextmanager
def quiet():
    """Without what libraries report of their progress and of what they could not optimise; errors are still told."""
    loggers = logging.root, logging.getLogger("torch.onnx")  # torch's loggers do not ask the root
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
