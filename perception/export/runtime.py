"""Live use of an exported network: numpy and ONNX Runtime, OpenVINO or TensorRT, no torch.

    runtime = Runtime("out/nano_onnx")                            # ONNX Runtime, on the CPU
    runtime = Runtime("out/nano_onnx", backend="openvino")        # OpenVINO, on the CPU
    runtime = Runtime("out/nano_rtx", backend="tensorrt")         # the engine that fits this GPU
    for images, global_from_ego, time_s in drive:
        scene = runtime.step(images, rig, global_from_ego, time_s)

All buffers are made once. The memory stays where the network runs: two buffers take turns as its input and output.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from perception.errors import ConfigError, PerceptionWarning
from perception.export.contract import MODEL, ImageInputs, check_graph, read_contract
from perception.inference.checks import (
    NOT_FINITE,
    check_images,
    check_intrinsics,
    checked_rig,
    checked_setting,
    scene_is_finite,
)
from perception.inference.ego_motion import MAX_SPEED, MAX_TURN_RATE, EgoMotion
from perception.types import Boxes, CameraRig, FrameObjects, Polylines, map_tensors

BACKENDS = ("onnxruntime", "openvino", "openvino-bf16", "tensorrt")
_none, _no_label, _no_flag = np.zeros(0, np.float32), np.zeros(0, np.int32), np.zeros(0, bool)
MAX_THREADS = 1024  # more than any vehicle has; ONNX Runtime starts as many as it is given
DTYPES = {
    "tensor(bool)": "bool", "tensor(uint8)": "uint8", "tensor(int32)": "int32", "tensor(int64)": "int64",
    "tensor(float16)": "float16", "tensor(float)": "float32",
}  # fmt: skip
NOTHING = {
    "box_center": np.zeros((0, 3), np.float32), "box_size": np.zeros((0, 3), np.float32), "box_yaw": _none,
    "box_velocity": np.zeros((0, 2), np.float32), "box_label": _no_label, "box_score": _none, "box_valid": _no_flag,
    "box_uncertainty": np.zeros((0, 9), np.float32), "line_points": np.zeros((0, 2, 2), np.float32),
    "line_closed": _no_flag, "line_label": _no_label, "line_score": _none,
    "line_uncertainty": np.zeros((0, 2, 2), np.float32),
}  # fmt: skip


def session_options(precision: str):
    """Options of ONNX Runtime for a graph of this precision."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: it warns of every half that a CPU has no kernel for
    if precision == "fp8":
        # ONNX Runtime 1.32 treats marks of 8-bit floats as if they were bytes from zero up: the further optimisations
        # take a ReLU before them away, and the basic ones change the answers where halves are around them.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


class OnnxSession:
    """The graph of an export in ONNX Runtime, with its buffers.

    Args:
        folder: of the export.
        contract: of `read_contract`.
        providers: of ONNX Runtime, first choice first.
        threads: of the CPU; 0 for as many as there are.

    Raises:
        ConfigError: a provider is not there.
        CheckpointError: the graph has other inputs or outputs than the contract.
    """

    def __init__(self, folder: str | Path, contract: dict, providers: Sequence[str], threads: int) -> None:
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise ConfigError(f"Runtime: onnxruntime is not installed ({error}); pip install onnxruntime") from None
        there = onnxruntime.get_available_providers()
        if not isinstance(providers, list | tuple) or not providers:
            raise ConfigError(f"Runtime: providers is {providers!r}; give a list of some of {', '.join(there)}")
        for provider in providers:
            if provider not in there:
                raise ConfigError(f"Runtime: provider {provider} is not there; ONNX Runtime has {', '.join(there)}")
        options = session_options(contract["precision"])
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(Path(folder, MODEL)), options, providers=list(providers))
        inputs, outputs = (
            {x.name: (DTYPES.get(x.type, x.type), list(x.shape)) for x in values}
            for values in (self._session.get_inputs(), self._session.get_outputs())
        )
        check_graph(Path(folder, MODEL), contract, inputs, outputs)
        self.device = providers[0].removesuffix("ExecutionProvider")
        self.inputs, self.outputs = (
            {x["name"]: np.zeros(x["shape"], x["dtype"]) for x in contract[side]} for side in ("inputs", "outputs")
        )
        # A network may have no memory at all.
        self._no_memory = np.zeros_like(self.inputs.get("memory", np.zeros(0, np.float32)))
        device = "cuda" if self.device == "CUDA" else "cpu"
        self._memories = [onnxruntime.OrtValue.ortvalue_from_numpy(self._no_memory.copy(), device, 0) for _ in range(2)]
        self._bindings = []
        values = {n: onnxruntime.OrtValue.ortvalue_from_numpy(x) for n, x in (self.inputs | self.outputs).items()}
        for turn in range(2):
            binding = self._session.io_binding()
            for name in self.inputs:
                binding.bind_ortvalue_input(name, self._memories[turn] if name == "memory" else values[name])
            for name in self.outputs:
                binding.bind_ortvalue_output(name, self._memories[1 - turn] if name == "new_memory" else values[name])
            self._bindings.append(binding)

    def run(self, turn: int) -> None:
        """One pass from `inputs` to `outputs` that reads the memory of this turn and writes the other."""
        self._session.run_with_iobinding(self._bindings[turn])

    def memory(self, turn: int) -> np.ndarray:
        """A copy of the memory that a pass of this turn reads."""
        return self._memories[turn].numpy().copy()

    def memory_is_finite(self, turn: int) -> bool:
        """Tells whether the memory that a pass of this turn reads is finite; true on a GPU, where it is not read."""
        value = self._memories[turn]
        return value.device_name() != "cpu" or bool(np.isfinite(value.numpy()).all())  # no copy on the CPU

    def clear(self) -> None:
        """Fills the memory with zeros."""
        for value in self._memories:
            value.update_inplace(self._no_memory)


class Runtime:
    """An exported network, its memory, and the pose and time of the last step.

    Args:
        folder: that `perception export` wrote.
        backend: one of `BACKENDS`. "onnxruntime" runs the graph; "openvino" runs it on the CPU, "openvino-bf16" with
            convolutions and products with weights in bfloat16; "tensorrt" runs an engine of the folder on a GPU.
        providers: of ONNX Runtime, first choice first, such as "CUDAExecutionProvider".
        threads: of the CPU, for ONNX Runtime and OpenVINO; 0 for as many as there are.
        min_score: boxes and lines below this are left out, 0..1.
        max_speed: m/s above which the pose has jumped, so that the memory is dropped; inf for no limit.
        max_turn_rate: rad/s, likewise.

    Raises:
        CheckpointError: the folder is none of an export, or a file in it has changed.
        ConfigError: the backend is not known or cannot run here (not installed, no GPU, no engine that fits it, another
            version of TensorRT, no bfloat16, no such provider), `min_score` is not in 0..1, `threads` is no number of
            threads, or a limit is negative.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        backend: str = "onnxruntime",
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int = 0,
        min_score: float = 0.0,
        max_speed: float = MAX_SPEED,
        max_turn_rate: float = MAX_TURN_RATE,
    ) -> None:
        self.min_score = checked_setting("Runtime: min_score", min_score, 0, 1, "a number from 0 to 1")
        whole = isinstance(threads, int | np.integer) and not isinstance(threads, bool)
        if not whole or not 0 <= threads <= MAX_THREADS:
            raise ConfigError(
                f"Runtime: threads is {threads!r}; give a whole number of 0..{MAX_THREADS}, 0 for as many as there are"
            )
        self._odometer = EgoMotion(max_speed, max_turn_rate)
        self.contract = read_contract(folder)
        self.images = ImageInputs.of_contract(self.contract)
        if backend == "onnxruntime":
            self._session = OnnxSession(folder, self.contract, providers, int(threads))
        elif backend in ("openvino", "openvino-bf16"):
            from perception.export.openvino_session import OpenVINOSession

            self._session = OpenVINOSession(folder, self.contract, backend, int(threads))
        elif backend == "tensorrt":
            from perception.export.engine_session import EngineSession

            self._session = EngineSession(folder, self.contract)
        else:
            raise ConfigError(f"Runtime: backend {backend!r} is not known; use one of {', '.join(BACKENDS)}")
        self.inputs, self.outputs, self.device = self._session.inputs, self._session.outputs, self._session.device
        self.reset()

    def reset(self) -> None:
        """Forgets everything that was seen; the next step is a first one."""
        self._odometer.reset()
        self._session.clear()
        self._turn = 0

    def memory(self) -> np.ndarray:
        """A copy of the memory that the next step will start from."""
        return self._session.memory(self._turn)

    def run(self) -> None:
        """One pass from `inputs` to `outputs`, which are the buffers themselves, and the memory's turn.

        Fill `inputs` in place before; all but `memory`, which is kept here. `outputs["new_memory"]` is not filled.
        """
        self._session.run(self._turn)
        self._turn = 1 - self._turn

    def step(
        self,
        images: Sequence[np.ndarray | None],
        rig: CameraRig,
        global_from_ego: np.ndarray,
        time_s: float,
    ) -> FrameObjects:
        """One frame, as `perception.inference.predictor.Predictor.step`.

        Args:
            images: N arrays uint8, each of the size and in the format that the contract names for its camera (RGB
                [H, W, 3] unless the export was made for another). What stands for a camera that is not present is
                ignored and may be None.
            rig: img_from_cam [N, 3, 3] in pixels of these images, ego_from_cam [N, 4, 4] metres, present [N] bool.
            global_from_ego: [4, 4] pose at `time_s`, metres, in any frame that stays the same from step to step.
            time_s: seconds, later than the last step's.

        Returns:
            What there is to see in the ego frame, numpy arrays, best score first.

        Raises:
            DataError: an argument has the wrong shape or type, is not finite or beyond what a vehicle can have, or time
                did not go forward.

        Warns:
            PerceptionWarning: as `Predictor.step`. On a GPU the memory stays where it is and is not looked at; there
                the boxes and lines show that the network's output is not finite.
        """
        motion = self._odometer.since_last(global_from_ego, time_s)
        N = len(self.images.sizes)
        check_images(images, N, self.images.axes)
        rig = checked_rig(rig, N)
        for n in np.flatnonzero(rig.present):
            image = self.images.checked(n, images[n])
            check_intrinsics(f"rig.img_from_cam[{n}]", rig.img_from_cam[n], self.images.sizes[n])
            self.inputs[f"image_{n}"][...] = image
        self.fill(rig, motion.ego_from_prev, motion.seconds, motion.is_first)
        self.run()
        whole = self.scene()
        scene = FrameObjects(*(self._confident(noun) for noun in whole))
        if not (self._session.memory_is_finite(self._turn) and scene_is_finite(whole, scene)):
            self.reset()
            warnings.warn(NOT_FINITE, PerceptionWarning, stacklevel=2)
            return map_tensors(lambda array: array[:0], scene)
        self._odometer.keep(motion)
        return scene

    def fill(self, rig: CameraRig, ego_from_prev: np.ndarray, seconds: float, is_first: bool) -> None:
        """Writes all inputs but the images into their buffers."""
        for name in ("img_from_cam", "ego_from_cam", "present"):
            self.inputs[name][...] = getattr(rig, name)
        self.inputs["ego_from_prev"][...] = ego_from_prev
        self.inputs["seconds_since_prev"][...] = seconds
        self.inputs["is_first"][...] = is_first

    def scene(self) -> FrameObjects:
        """What the last pass said, all of it; the arrays are the buffers that the next pass writes into.

        What a network does not look for, boxes or lines, is empty.
        """
        return scene_of(self.outputs)

    def _confident(self, noun):
        keep = noun.valid & (noun.score >= self.min_score)
        return type(noun)(*(array[keep] for array in noun))


def scene_of(outputs: dict[str, np.ndarray]) -> FrameObjects:
    """Collects outputs of an export, by name, in a FrameObjects; what a network does not look for is empty."""
    outputs = NOTHING | outputs
    boxes = {name: outputs[f"box_{name}"] for name in Boxes._fields if name != "attribute"}
    lines = {name: outputs[f"line_{name}"] for name in Polylines._fields if name != "valid"}
    return FrameObjects(
        Boxes(attribute=np.full_like(boxes["label"], -1), **boxes),
        Polylines(valid=np.ones_like(lines["closed"]), **lines),
    )
