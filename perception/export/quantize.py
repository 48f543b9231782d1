"""Quantizes an exported graph to eight bits after training, except for its most sensitive layers.

Q/DQ nodes (QuantizeLinear, DequantizeLinear) quantize the inputs and the weights of layers, weights per channel. The
graph with Q/DQ nodes runs and is certified in ONNX Runtime, and TensorRT chooses its kernels from the same nodes. ONNX
Runtime computes the quantization ranges from calibration data and inserts the Q/DQ nodes. This module chooses the
layers: it quantizes each group of layers alone and measures how much the outputs of the network change over a few
consecutive frames, with the memory fed back. This change is the sensitivity of the group.

There are three kinds of quantization: signed integers ("int8", for TensorRT), unsigned activations with signed weights
("uint8", for instructions of CPUs such as AVX-512 VNNI), and floats with four exponent bits ("fp8", E4M3).
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from perception.data.nuscenes import NuScenesDataset
from perception.errors import DataError
from perception.export.contract import ImageInputs, comparable_memory, memory_names
from perception.export.half import WEIGHTED
from perception.export.lowering import OPSET_FP8
from perception.export.replay import camera_frame, fill_image, frame_inputs, match_rows, replay_frames
from perception.export.runtime import session_options

if TYPE_CHECKING:
    import onnx
    import onnxruntime

# Number of calibration frames, spread over the dataset, and of consecutive frames on which sensitivities are measured.
CALIBRATION_FRAMES, EVALUATION_FRAMES = 16, 12
BLINDED_EVERY = 4  # of the calibration frames, every fourth is repeated with a black and with a white image
KINDS = ("int8", "uint8", "fp8")
LARGEST_INT8, LARGEST_FP8 = 127.0, 448.0
# Largest mean change of the outputs by all quantized layers, in standard deviations. The most sensitive layers stay in
# floating point until the change is below it. At 1.3 to 1.5 % the shipped network lost up to 0.03 NDS in one of five
# datasets of 40 frames; at 1 % no dataset moved by more than 0.008.
MAX_CHANGE = 0.010
# Groups with a smaller share of the multiplications stay in floating point: eight bits would hardly save time there.
SMALLEST_WORK = 0.01
# Percentage of absolute values inside a quantization range; larger values are clipped. The backbone of the shipped
# network in INT8 changes the outputs by 1.1 %, with 99.99 by 2.0 %.
PERCENTILE = 99.999

FrameInputs = Mapping[str, np.ndarray]  # inputs of a graph for one frame, by name


def is_compared(name: str) -> bool:
    """Returns True for outputs that are compared between two graphs: raw outputs and the memory."""
    return name.startswith(("raw_", "new_memory"))


@dataclass
class Quantizer:
    """Quantizes different layers of one graph, with quantization ranges that are computed once.

    Args:
        model: in float32, from `perception.export.onnx.trace`.
        frames: calibration data, memory included.
        kind: one of KINDS.
    """

    model: onnx.ModelProto
    frames: Sequence[FrameInputs]
    kind: str
    groups: dict[str, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.groups = layer_groups(self.model)
        self._folder = tempfile.TemporaryDirectory(prefix="perception-quantize-")
        self._path = Path(self._folder.name, "float.onnx")  # a file, because ONNX Runtime changes the objects it gets
        self._path.write_bytes(self.model.SerializeToString())

    def quantized(self, groups: Iterable[str]) -> onnx.ModelProto:
        """Returns the graph with the layers of some groups quantized."""
        import onnx
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

        out = Path(self._folder.name, "model.onnx")
        nodes = [name for group in groups for name in self.groups[group]]
        options = {
            "ActivationSymmetric": self.kind != "uint8",
            "WeightSymmetric": True,
            # The scale of a bias would be too small for float16. CPUs add biases as 32-bit integers.
            "QuantizeBias": self.kind == "uint8",
            "CalibPercentile": PERCENTILE,
        }
        with quiet():
            quantize_static(
                self._path,
                out,
                _Reader(self.frames),
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
        return to_float8(onnx.load(out), self.model) if self.kind == "fp8" else onnx.load(out)

    def sensitivities(
        self,
        groups: Sequence[str],
        frames: Sequence[FrameInputs],
        reference: Mapping[str, np.ndarray],
        progress: bool = False,
    ) -> dict[str, float]:
        """Measures how much the quantization of each group alone changes the outputs.

        Args:
            groups: some of `groups`.
            frames: consecutive frames.
            reference: outputs of the float32 graph for these frames, from `run_frames`.
            progress: show a progress bar on stderr.

        Returns:
            The change of the outputs (see `relative_change`) by group, largest first.
        """
        found = {
            group: relative_change(reference, run_frames(self.quantized([group]), frames, self.kind))
            for group in tqdm(groups, desc="sensitivities", unit="group", disable=not progress)
        }
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def quantize_graph(
    model: onnx.ModelProto, frames: Sequence[FrameInputs], kind: str, *, progress: bool = False
) -> tuple[onnx.ModelProto, dict]:
    """Quantizes all layers of a graph except for the most sensitive and the smallest ones.

    Args:
        model: in float32.
        frames: from `record_frames`; sensitivities are measured on the last EVALUATION_FRAMES, the others are the
            calibration data.
        kind: one of KINDS.
        progress: show progress bars on stderr.

    Returns:
        The graph, and a report of plain JSON values: by group of layers the share of all multiplications with weights
        ("work") and, from SMALLEST_WORK on, the sensitivity ("sensitivities"); the names of the quantized groups
        ("groups"), and the change of the outputs by all of them ("together").
    """
    evaluation = frames[-EVALUATION_FRAMES:]
    quantizer = Quantizer(model, frames[:-EVALUATION_FRAMES], kind)
    reference = run_frames(model, evaluation)
    work = group_work(model, quantizer.groups)
    large = [group for group in work if work[group] >= SMALLEST_WORK]
    sensitivities = quantizer.sensitivities(large, evaluation, reference, progress)
    # Groups with the largest change per operation are excluded first.
    groups = sorted(sensitivities, key=lambda group: -sensitivities[group] / work[group])
    # A binary search for the smallest number of excluded groups; at least one group is quantized.
    low, excluded = 0, len(groups) - 1
    with tqdm(total=excluded.bit_length(), desc="search", unit="trial", disable=not progress) as bar:
        while low < excluded:
            middle = (low + excluded) // 2
            found = run_frames(quantizer.quantized(groups[middle:]), evaluation, kind)
            if relative_change(reference, found) <= MAX_CHANGE:
                excluded = middle
            else:
                low = middle + 1
            bar.update()
    graph = quantizer.quantized(groups[excluded:])
    together = relative_change(reference, run_frames(graph, evaluation, kind))
    report = {"sensitivities": sensitivities, "work": work, "groups": groups[excluded:], "together": together}
    return graph, report


def quantize_all(model: onnx.ModelProto, frames: Sequence[FrameInputs], kind: str) -> tuple[onnx.ModelProto, dict]:
    """Quantizes all layers of a graph, for measurements of time where accuracy has no meaning.

    Args:
        model: in float32.
        frames: calibration data, memory included.
        kind: one of KINDS.

    Returns:
        The graph, and a report as of `quantize_graph`, without sensitivities.
    """
    quantizer = Quantizer(model, frames, kind)
    graph = quantizer.quantized(quantizer.groups)
    together = relative_change(run_frames(model, frames), run_frames(graph, frames, kind))
    work = group_work(model, quantizer.groups)
    return graph, {"sensitivities": {}, "work": work, "groups": list(quantizer.groups), "together": together}


def to_float8(quantized: onnx.ModelProto, model: onnx.ModelProto) -> onnx.ModelProto:
    """Converts the Q/DQ nodes of a graph from INT8 to FP8 (E4M3) with the same ranges.

    Args:
        quantized: with symmetric INT8 Q/DQ nodes.
        model: the float32 graph that it was made from, with the weights in full precision.
    """
    import ml_dtypes
    import onnx
    from onnx import numpy_helper

    graph = onnx.ModelProto.FromString(quantized.SerializeToString())
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
    del graph.graph.value_info[:]  # has the types of INT8
    for entry in graph.opset_import:
        if entry.domain == "":
            entry.version = OPSET_FP8  # the first opset with 8-bit floats
    return graph


def relative_change(reference: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> float:
    """Compares outputs: the mean difference in standard deviations of the reference, averaged over the outputs.

    Queries are matched with `match_rows` and weighted with their score in the reference.

    Args:
        reference, found: [frames, ...] by name of the raw outputs and the memory.
    """
    changes = []
    for kind in ("box", "line"):
        names = [name for name in reference if name.startswith(f"raw_{kind}_")]  # logits are the first
        if not names:
            continue
        parts = [reference[name].reshape(*reference[name].shape[:2], -1) for name in names]  # [frames, Q, ...]
        logits = parts[0]
        scores = 1 / (1 + np.exp(-logits.max(-1)))  # [frames, Q]
        others = [found[name].reshape(part.shape) for name, part in zip(names, parts, strict=True)]
        rows, other_rows = np.concatenate(parts, -1), np.concatenate(others, -1)
        difference = np.abs(np.stack([b[match_rows(a, b)] for a, b in zip(rows, other_rows, strict=True)]) - rows)
        ends = np.cumsum([part.shape[-1] for part in parts])[:-1]
        for part, values in zip(np.split(difference, ends, -1), parts, strict=True):
            changes.append(np.average(part.mean(-1), weights=scores) / max(values.std(), 1e-6))
    memories = [_memories(outputs) for outputs in (reference, found)]
    for kind, rows in memories[0].items():
        other = memories[1][kind]
        if rows.ndim > 2:
            other = np.stack([there[match_rows(here, there)] for here, there in zip(rows, other, strict=True)])
        changes.append(np.abs(other - rows).mean() / max(rows.std(), 1e-6))
    return float(np.mean(changes))


def record_frames(
    model: onnx.ModelProto, dataset: NuScenesDataset, images: ImageInputs, *, progress: bool = False
) -> list[dict[str, np.ndarray]]:
    """Runs a graph over a dataset and records the inputs of some frames, with the memory of the graph.

    Args:
        model: in float32.
        dataset: with images of the size that the graph takes, or larger.
        images: sizes and format that the graph takes.
        progress: show a progress bar on stderr.

    Returns:
        CALIBRATION_FRAMES frames at equal distances, some of them also with a black and with a white image, and then
        EVALUATION_FRAMES consecutive frames, which are the last of the dataset.

    Raises:
        DataError: the dataset has too few frames.
    """
    needed = CALIBRATION_FRAMES + EVALUATION_FRAMES
    if len(dataset) < needed:
        raise DataError(f"the dataset for calibration has {len(dataset)} frames; give at least {needed}")
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    memory = empty_memory(session)
    extra = [name for name in ("ego_from_lidar",) if name in {x.name for x in session.get_inputs()}]
    last = range(len(dataset) - EVALUATION_FRAMES, len(dataset))
    spread = np.linspace(0, last[0] - 1, CALIBRATION_FRAMES).round().astype(int).tolist()
    recorded: list[dict[str, np.ndarray]] = []
    frames = tqdm(
        replay_frames(dataset, len(images.sizes)),
        total=len(dataset),
        desc="calibration",
        unit="frame",
        disable=not progress,
    )
    for number, (_, frame) in enumerate(frames):
        inputs = frame_inputs(camera_frame(frame, images), extra) | memory
        variants = [inputs] if number in spread or number in last else []
        if number in spread[::BLINDED_EVERY]:  # so that the ranges hold the activations of a blinded camera
            for camera, grey in ((number, 0), (number + 1, 255)):
                blinded = camera_frame(fill_image(frame, camera, grey), images)
                variants.append(frame_inputs(blinded, extra) | memory)
        recorded += [{name: array.copy() for name, array in variant.items()} for variant in variants]
        if memory:
            memory = dict(zip(memory, session.run([f"new_{name}" for name in memory], inputs), strict=True))
    return recorded


def _memories(outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Joins the parts of the memories of all frames [frames, ...] as `comparable_memory` does."""
    parts = [name for name in outputs if name.startswith("new_memory")]
    frames = [
        comparable_memory({name.removeprefix("new_"): array for name, array in zip(parts, of_frame, strict=True)})
        for of_frame in zip(*(outputs[name] for name in parts), strict=True)
    ]
    return {kind: np.stack([frame[kind] for frame in frames]) for kind in (frames[0] if frames else ())}


def empty_memory(session: onnxruntime.InferenceSession) -> dict[str, np.ndarray]:
    """Returns zeros for the parts of the memory that a graph takes, by name."""
    types = {"tensor(float)": np.float32, "tensor(int32)": np.int32}
    inputs = {x.name: x for x in session.get_inputs()}
    return {name: np.zeros(inputs[name].shape, types[inputs[name].type]) for name in memory_names(inputs)}


def layer_groups(model: onnx.ModelProto) -> dict[str, list[str]]:
    """Groups the nodes with weights by part of the network.

    A group is named after the first two words of a weight's name, four in the image backbone, three in decoder layers.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    groups: dict[str, list[str]] = {}
    for node in model.graph.node:
        if node.op_type in WEIGHTED and len(node.input) > 1 and node.input[1] in constants:
            words = node.input[1].removeprefix("network.").split(".")
            if len(words) > 1:  # a weight of the network; the exporter names its own constants differently
                count = 4 if "backbone" in words[:2] and "stages" in words else 3 if words[1] == "layers" else 2
                groups.setdefault(".".join(words[:count]), []).append(node.name)
    return groups


def group_work(model: onnx.ModelProto, groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Returns the share of each group in all multiplications with weights."""
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


def run_frames(model: onnx.ModelProto, frames: Sequence[FrameInputs], precision: str = "fp32") -> dict[str, np.ndarray]:
    """Runs a graph on consecutive frames, starting from the memory of the first frame.

    Returns:
        The raw outputs and the memory [frames, ...] by name.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(
        model.SerializeToString(), session_options(precision), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs() if is_compared(output.name)]
    rows: list[list[np.ndarray]] = []
    memory: dict[str, np.ndarray] = {}
    for frame in frames:
        rows.append(session.run(names, {**frame, **memory}))
        memory = {
            name.removeprefix("new_"): array
            for name, array in zip(names, rows[-1], strict=True)
            if name.startswith("new_")
        }
    return {name: np.stack([row[k] for row in rows]) for k, name in enumerate(names)}


class _Reader:
    """Reads calibration data for ONNX Runtime."""

    def __init__(self, frames: Sequence[FrameInputs]) -> None:
        self._frames = iter(frames)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Returns the next frame, None after the last."""
        return next((dict(frame) for frame in self._frames), None)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides progress and warnings of the libraries in a block; errors are still shown."""
    loggers = logging.root, logging.getLogger("torch.onnx")  # torch.onnx does not propagate to the root
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
