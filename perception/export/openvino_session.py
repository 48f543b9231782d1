"""Runs the graph of an export in OpenVINO on the CPU, with numpy and OpenVINO, without torch."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from perception.errors import ConfigError
from perception.export.contract import MODEL, check_graph, memory_names

FLOAT32, BFLOAT16 = "openvino", "openvino-bf16"  # backends, by the type of convolutions and products with weights
TELEMETRY = "openvino_telemetry"


def import_openvino() -> Any:
    """Imports `openvino` without its telemetry.

    `import openvino` writes an identifier into the home directory and sends a report over the network. This function
    prevents the import of the telemetry package, unless the program has imported `openvino` before.

    Raises:
        ConfigError: OpenVINO is not installed.
    """
    if sys.modules.get("openvino"):
        return sys.modules["openvino"]
    loaded = {TELEMETRY: sys.modules[TELEMETRY]} if TELEMETRY in sys.modules else {}
    sys.modules[TELEMETRY] = None  # type: ignore[assignment]  # the import fails, and openvino then uses a stub
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise ConfigError(
            f"openvino is not installed ({error}); install it, or the extra [openvino] of driving-perception"
        ) from None
    finally:
        del sys.modules[TELEMETRY]
        sys.modules.update(loaded)


def openvino_core(backend: str, precision: str) -> Any:
    """Returns OpenVINO's `Core` after checking that a backend can run here. Call it before long work.

    Args:
        backend: `FLOAT32` or `BFLOAT16`.
        precision: of the export.

    Raises:
        ConfigError: a package is not installed, this CPU has no bfloat16, or the backend is `BFLOAT16` for an export
            in float16 or FP8.
    """
    core = _core(import_openvino())
    if backend == BFLOAT16:
        if precision not in ("fp32", "int8"):
            raise ConfigError(f"backend {backend} runs exports of precision fp32 or int8, this one is {precision}")
        if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            name = core.get_property("CPU", "FULL_DEVICE_NAME")
            raise ConfigError(
                f"backend {backend} needs a CPU with bfloat16 (AVX512-BF16 or AMX), which {name} does not have; use "
                f"backend {FLOAT32}"
            )
        try:
            importlib.import_module("onnx")
        except ImportError as error:
            raise ConfigError(f"backend {backend} needs onnx ({error}); pip install onnx") from None
    return core


@cache
def _core(openvino: Any) -> Any:
    """Returns the only `Core` of the process.

    Each one gives the thread that compiles with it a stack for signals, and its end restores the one before, which may
    be gone: after two of them ended in the order of their creation, the next signal would end the process.
    """
    return openvino.Core()


class OpenVINOSession:
    """Runs the graph of an export, compiled by OpenVINO for the CPU.

    OpenVINO reads and writes the arrays of `inputs` and `outputs` without copies. The memory has two arrays that
    alternate as input and output.

    With `BFLOAT16`, the layers that `perception.export.half` converts run in bfloat16, and geometry, sampling, softmax
    and normalisation in float32; layers in INT8 stay as they are. OpenVINO's precision hint for bfloat16 would round
    the geometry too, with errors of up to 0.2 % in pixels and metres.

    Args:
        folder: of the export.
        contract: from `read_contract`.
        backend: `FLOAT32` or `BFLOAT16`.
        threads: number of CPU threads, 0 for the default of OpenVINO.

    Raises:
        ConfigError: as in `openvino_core`, or OpenVINO rejects the graph.
        CheckpointError: the inputs or outputs of the graph differ from those of the contract.
    """

    def __init__(self, folder: str | Path, contract: dict, backend: str, threads: int) -> None:
        core = openvino_core(backend, contract["precision"])
        openvino = import_openvino()
        path = Path(folder, MODEL)
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",  # keeps the types of the graph; the default may round to bfloat16
        }
        try:
            graph = core.read_model(path if backend == FLOAT32 else _in_bfloat16(path))
            _fuse_weighted_sums(graph)
            compiled = core.compile_model(graph, "CPU", options)
        except RuntimeError as error:
            reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), "it gives no reason")
            raise ConfigError(f"{path}: OpenVINO {openvino.__version__} does not take this graph: {reason}") from None
        inputs, outputs = (
            {x.any_name: (x.element_type.to_dtype().name, list(x.partial_shape.to_shape())) for x in ports}
            for ports in (graph.inputs, graph.outputs)
        )
        check_graph(path, contract, inputs, outputs)
        self.device = "CPU"
        self.inputs, self.outputs = (
            {x["name"]: np.zeros(x["shape"], x["dtype"]) for x in contract[side]} for side in ("inputs", "outputs")
        )
        arrays = self.inputs | self.outputs
        names = memory_names(self.inputs)
        self._memories = [{name: np.zeros_like(self.inputs[name]) for name in names} for _ in range(2)]
        self._requests = []
        for turn in range(2):
            arrays |= self._memories[turn] | {f"new_{name}": x for name, x in self._memories[1 - turn].items()}
            request = compiled.create_infer_request()
            for name, array in arrays.items():
                request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
            self._requests.append(request)

    def run(self, turn: int) -> None:
        """Runs the network from `inputs` to `outputs`; reads memory buffer `turn` and writes the other one."""
        self._requests[turn].infer()

    def memory(self, turn: int) -> dict[str, np.ndarray]:
        """Returns copies of the parts of memory buffer `turn` by name."""
        return {name: part.copy() for name, part in self._memories[turn].items()}

    def memory_is_finite(self, turn: int) -> bool:
        """Returns True if memory buffer `turn` is finite."""
        return all(bool(np.isfinite(part).all()) for part in self._memories[turn].values())

    def clear(self) -> None:
        """Fills both memory buffers with zeros."""
        for memory in self._memories:
            for part in memory.values():
                part[...] = 0


def _in_bfloat16(path: Path) -> bytes:
    import onnx

    from perception.export.half import convert_to_half

    return convert_to_half(onnx.load(path), "bfloat16").SerializeToString()


def _fuse_weighted_sums(graph: Any) -> None:
    """Replaces gathered rows that are multiplied by weights and summed with one operator that stores no rows, in place.

    ONNX has no such operator. `perception.ops.bilinear` samples features so in exports for CPUs.
    """
    opset = import_openvino().opset8
    for node in graph.get_ordered_ops():
        gather = node.input_value(1).get_node() if node.get_type_name() == "MatMul" else None
        if gather is None or gather.get_type_name() != "Gather":
            continue
        table, rows = gather.input_value(0), gather.input_value(1)
        weight = node.input_value(0)
        shapes = [list(x.get_partial_shape().to_shape()) for x in (table, rows, weight)]
        if list(map(len, shapes)) != [2, 2, 3] or shapes[2] != [shapes[1][0], 1, shapes[1][1]]:
            continue
        summed = opset.embedding_bag_packed_sum(table, rows, opset.squeeze(weight, [1]))
        node.output(0).replace(opset.unsqueeze(summed, [1]).output(0))
