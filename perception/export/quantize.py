"""INT8 by post-training quantisation: ranges from real frames, and layers that suffer most left in half precision.

Quantised tensors are marked in the graph (QuantizeLinear, DequantizeLinear), weights channel by channel, so the graph
runs and is certified in ONNX Runtime, and TensorRT takes the same marks for its INT8 kernels. Calibration and marks are
those of ONNX Runtime; which layers are marked is found out here: each group of layers is quantised alone, and what that
changes in the network's answers is its sensitivity.
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

from perception.data.nuscenes import NuScenesDataset
from perception.export.drive import aligned, drive, moment_inputs
from perception.export.half import WEIGHTED

RANGES_FROM, JUDGED_ON = 16, 4  # moments
# By how much of its spread all layers in INT8 together may change an answer; the most sensitive are left out for it.
BUDGET = 0.01
PERCENTILE = 99.99  # of absolute values that a range holds; what lies beyond is cut off
JUDGED = ("raw_box_logits", "raw_box_places", "raw_line_logits", "raw_line_places", "new_memory")
Moment = Mapping[str, np.ndarray]  # the inputs of one pass by name


@dataclass
class Quantizer:
    """Quantises one graph in several ways with ranges that are found once.

    Args:
        model: an `onnx.ModelProto` in float32, as `perception.export.onnx` traces it.
        moments: inputs of real frames, memory included; the ranges come from them.
    """

    model: object
    moments: Sequence[Moment]
    groups: dict[str, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.groups = layer_groups(self.model)
        self._folder = tempfile.TemporaryDirectory(prefix="perception-int8-")
        self._path = Path(self._folder.name, "float.onnx")  # the library changes models that it is given as objects
        self._path.write_bytes(self.model.SerializeToString())

    def quantized(self, groups: Iterable[str]):
        """The graph with the layers of these groups in INT8."""
        import onnx
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

        out = Path(self._folder.name, "model.onnx")
        nodes = [name for group in groups for name in self.groups[group]]
        options = {
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,  # its scale would be too small for halves
            "CalibPercentile": PERCENTILE,
        }
        with _quiet():
            quantize_static(
                self._path,
                out,
                _Reader(self.moments),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(WEIGHTED),
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                nodes_to_quantize=nodes,
                calibrate_method=CalibrationMethod.Percentile,
                calibration_cache_path=Path(self._folder.name, "ranges.json"),
                extra_options=options,
            )
        return onnx.load(out)

    def sensitivities(self, moments: Sequence[Moment]) -> dict[str, float]:
        """By group, what its quantisation alone changes (see `changed`), most sensitive first."""
        wanted = answers(self.model, moments)
        found = {group: changed(wanted, answers(self.quantized([group]), moments)) for group in self.groups}
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def quantize_graph(model, moments: Sequence[Moment]) -> tuple[object, dict]:
    """A graph with INT8 marks wherever that changes its answers little.

    Args:
        model: an `onnx.ModelProto` in float32.
        moments: inputs of real frames; the last few judge, the others give ranges.

    Returns:
        The graph, and plain JSON values: the sensitivity of each group of layers, the groups that are in INT8, and what
        all of them together change.
    """
    judges = moments[-JUDGED_ON:]
    quantizer = Quantizer(model, moments[:-JUDGED_ON])
    wanted = answers(model, judges)
    sensitivities = quantizer.sensitivities(judges)
    groups = list(sensitivities)
    while True:
        graph = quantizer.quantized(groups)
        together = changed(wanted, answers(graph, judges))
        if together <= BUDGET or len(groups) == 1:
            return graph, {"sensitivities": sensitivities, "groups": groups, "together": together}
        groups = groups[1:]  # without the most sensitive


def changed(wanted: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> float:
    """Mean over the outputs of the mean difference, as a share of the standard deviation of what is wanted.

    Boxes and lines count as much as they are sure, whatever the order in which the queries give them.
    """
    shares = []
    for kind in ("box", "line"):
        names = f"raw_{kind}_logits", f"raw_{kind}_places"
        if names[0] not in wanted:
            continue
        logits, places = (wanted[name].reshape(*wanted[name].shape[:2], -1) for name in names)  # [moments, Q, ...]
        sure = 1 / (1 + np.exp(-logits.max(-1)))  # [moments, Q]
        others = (found[name].reshape(part.shape) for name, part in zip(names, (logits, places), strict=True))
        rows, other_rows = np.concatenate([logits, places], -1), np.concatenate(list(others), -1)
        off = np.abs(np.stack([b[aligned(a, b)] for a, b in zip(rows, other_rows, strict=True)]) - rows)
        for part, values in zip(np.split(off, [logits.shape[-1]], -1), (logits, places), strict=True):
            shares.append(np.average(part.mean(-1), weights=sure) / max(values.std(), 1e-6))
    if "new_memory" in wanted:
        memory = wanted["new_memory"]
        shares.append(np.abs(found["new_memory"] - memory).mean() / max(memory.std(), 1e-6))
    return float(np.mean(shares))


def record(model, dataset: NuScenesDataset, count: int = RANGES_FROM + JUDGED_ON) -> list[Moment]:
    """Inputs of a graph at moments of a drive, spread evenly, with the memory that the graph itself had then."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    shapes = {x.name: x.shape for x in session.get_inputs()}
    memory = {"memory": np.zeros(shapes["memory"], np.float32)} if "memory" in shapes else {}
    chosen = set(np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist())
    moments = []
    for number, (_, frame) in enumerate(drive(dataset)):
        moment = moment_inputs(frame) | memory
        if number in chosen:
            moments.append({name: array.copy() for name, array in moment.items()})
        if memory:
            memory = {"memory": session.run(["new_memory"], moment)[0]}
    return moments


def layer_groups(model) -> dict[str, list[str]]:
    """Names of the nodes with weights by part of the network: two words of a weight's name, four in the image trunk."""
    constants = {tensor.name for tensor in model.graph.initializer}
    groups: dict[str, list[str]] = {}
    for node in model.graph.node:
        if node.op_type in WEIGHTED and len(node.input) > 1 and node.input[1] in constants:
            words = node.input[1].removeprefix("network.").split(".")
            if len(words) > 1:  # a weight under its own name; others were made by the exporter
                words = words[:4] if "trunk" in words[:2] and "stages" in words else words[:2]
                groups.setdefault(".".join(words), []).append(node.name)
    return groups


def answers(model, moments: Sequence[Moment]) -> dict[str, np.ndarray]:
    """What a graph says to each of the moments, one after the other: [moments, ...] by name of the raw outputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs() if output.name in JUDGED]
    rows = [session.run(names, dict(moment)) for moment in moments]
    return {name: np.stack([row[k] for row in rows]) for k, name in enumerate(names)}


class _Reader:
    def __init__(self, moments: Sequence[Moment]) -> None:
        self._left = iter(moments)

    def get_next(self) -> dict | None:
        """The next moment, None after the last."""
        return next((dict(moment) for moment in self._left), None)


@contextlib.contextmanager
def _quiet():
    """Without the library's progress reports."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.root.setLevel(level)
