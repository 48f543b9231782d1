"""Runs an exported network on one frame after another: numpy and ONNX Runtime, OpenVINO or TensorRT, without torch.

    runtime = Runtime("out/nano_onnx")                            # ONNX Runtime, on the CPU
    runtime = Runtime("out/nano_onnx", backend="openvino")        # OpenVINO, on the CPU
    runtime = Runtime("out/nano_rtx", backend="tensorrt")         # the engine for this GPU
    for images, global_from_ego, time_s in sequence:
        objects = runtime.step(images, rig, global_from_ego, time_s)

All buffers are allocated once. The memory stays on the device of the network, in two buffers that alternate as input
and output of a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from perception.errors import ConfigError
from perception.export.contract import MODEL, ImageInputs, check_graph, memory_names, read_contract
from perception.export.export_rig import SAME, ExportRig
from perception.inference.checks import NOT_FINITE, check_images, checked_rig, checked_setting, objects_are_finite
from perception.inference.ego_motion import MAX_SPEED, MAX_TURN_RATE, Motion
from perception.inference.images import AnyImage
from perception.inference.live import LiveInput, Step, without_result
from perception.inference.plausibility import sampled_rgb
from perception.inference.visibility import MIN_SEEN, kept_by
from perception.types import (
    CameraRig,
    Ids,
    NumpyBoxes,
    NumpyCameraRig,
    NumpyFrameObjects,
    NumpyLiveObjects,
    NumpyPolylines,
    NumpySeen,
    Weights,
    chosen,
    map_tensors,
)

if TYPE_CHECKING:
    import onnxruntime

    from perception.rigs.rig import Rig
    from perception.rigs.virtual import VirtualRig

BACKENDS = ("onnxruntime", "openvino", "openvino-bf16", "tensorrt")
MAX_THREADS = 1024  # more than any vehicle has; ONNX Runtime starts as many threads as it is given
DTYPES = {
    "tensor(bool)": "bool", "tensor(uint8)": "uint8", "tensor(int32)": "int32", "tensor(int64)": "int64",
    "tensor(float16)": "float16", "tensor(float)": "float32",
}  # fmt: skip
_no_numbers, _no_labels, _no_flags = np.zeros(0, np.float32), np.zeros(0, np.int32), np.zeros(0, bool)
# Outputs of a network that predicts only boxes or only lines.
EMPTY = {
    "box_center": np.zeros((0, 3), np.float32), "box_size": np.zeros((0, 3), np.float32), "box_yaw": _no_numbers,
    "box_velocity": np.zeros((0, 2), np.float32), "box_label": _no_labels, "box_score": _no_numbers,
    "box_valid": _no_flags, "box_uncertainty": np.zeros((0, 9), np.float32),
    "line_points": np.zeros((0, 2, 2), np.float32), "line_closed": _no_flags, "line_label": _no_labels,
    "line_score": _no_numbers, "line_uncertainty": np.zeros((0, 2, 2), np.float32),
}  # fmt: skip


class Session(Protocol):
    """An exported network in one runtime library, with its buffers."""

    device: str
    inputs: dict[str, NDArray[Any]]
    outputs: dict[str, NDArray[Any]]

    def run(self, turn: int) -> None:
        """Runs the network from `inputs` to `outputs`; reads memory buffer `turn` and writes the other one."""
        ...

    def memory(self, turn: int) -> dict[str, NDArray[Any]]:
        """Returns copies of the parts of memory buffer `turn` by the names of the inputs."""
        ...

    def memory_is_finite(self, turn: int) -> bool:
        """Returns True if memory buffer `turn` is finite, or is on a GPU, where it is not checked."""
        ...

    def clear(self) -> None:
        """Fills both memory buffers with zeros."""
        ...


def session_options(precision: str) -> onnxruntime.SessionOptions:
    """Returns options of ONNX Runtime for a graph of a precision."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: it warns of every float16 operator that has no CPU kernel
    if precision == "fp8":
        # ONNX Runtime 1.32 treats FP8 Q/DQ nodes as if they were UINT8: its extended optimisations remove a ReLU before
        # them, and its basic ones change the outputs where float16 tensors are next to them.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


class OnnxSession:
    """Runs the graph of an export in ONNX Runtime.

    Args:
        folder: of the export.
        contract: from `read_contract`.
        providers: execution providers of ONNX Runtime, in order of preference.
        threads: number of CPU threads, 0 for one per core.

    Raises:
        ConfigError: an execution provider is not available.
        CheckpointError: the inputs or outputs of the graph differ from those of the contract.
    """

    def __init__(self, folder: str | Path, contract: dict, providers: Sequence[str], threads: int) -> None:
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise ConfigError(f"Runtime: onnxruntime is not installed ({error}); pip install onnxruntime") from None
        available = onnxruntime.get_available_providers()
        if not isinstance(providers, list | tuple) or not providers:
            raise ConfigError(f"Runtime: providers is {providers!r}; give a list of some of {', '.join(available)}")
        for provider in providers:
            if provider not in available:
                raise ConfigError(
                    f"Runtime: execution provider {provider} is not available; ONNX Runtime has {', '.join(available)}"
                )
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
        self._zeros = {name: np.zeros_like(self.inputs[name]) for name in memory_names(self.inputs)}
        device = "cuda" if self.device == "CUDA" else "cpu"
        self._memories = [
            {n: onnxruntime.OrtValue.ortvalue_from_numpy(x.copy(), device, 0) for n, x in self._zeros.items()}
            for _ in range(2)
        ]
        self._bindings = []
        values = {n: onnxruntime.OrtValue.ortvalue_from_numpy(x) for n, x in (self.inputs | self.outputs).items()}
        for turn in range(2):
            binding = self._session.io_binding()
            for name in self.inputs:
                binding.bind_ortvalue_input(name, self._memories[turn].get(name, values[name]))
            for name in self.outputs:
                written = self._memories[1 - turn].get(name.removeprefix("new_"))
                binding.bind_ortvalue_output(name, written or values[name])
            self._bindings.append(binding)

    def run(self, turn: int) -> None:
        """Runs the network from `inputs` to `outputs`; reads memory buffer `turn` and writes the other one."""
        self._session.run_with_iobinding(self._bindings[turn])

    def memory(self, turn: int) -> dict[str, NDArray[Any]]:
        """Returns copies of the parts of memory buffer `turn` by name."""
        return {name: value.numpy().copy() for name, value in self._memories[turn].items()}

    def memory_is_finite(self, turn: int) -> bool:
        """Returns True if memory buffer `turn` is finite, or is on a GPU, where it is not checked."""
        return all(  # no copy on the CPU
            value.device_name() != "cpu" or bool(np.isfinite(value.numpy()).all())
            for value in self._memories[turn].values()
        )

    def clear(self) -> None:
        """Fills both memory buffers with zeros."""
        for memory in self._memories:
            for name, value in memory.items():
                value.update_inplace(self._zeros[name])


class Runtime:
    """Runs an exported network on one frame after another and keeps its memory.

    Args:
        folder: written by `perception export`.
        backend: one of `BACKENDS`. "onnxruntime" runs the graph; "openvino" runs it on the CPU; "openvino-bf16" does so
            with convolutions and products with weights in bfloat16, if not in INT8; "tensorrt" runs an engine of the
            folder on a GPU.
        providers: execution providers of ONNX Runtime in order of preference, such as "CUDAExecutionProvider".
        threads: number of CPU threads for ONNX Runtime and OpenVINO, 0 for one per core.
        rig: the cameras of the vehicle, as for `Predictor`. Their images are remapped on the CPU before the graph,
            which needs Pillow. The export takes as many images as the rig has pinholes, as RGB or BGR, in the network's
            size; those of cameras that pass through may have the camera's size.
        min_score: score threshold 0..1; boxes and lines below it are not returned.
        min_seen: share 0..1 of a box (of its centre and corners) or of the points of a line that must lie where a
            camera looks, or looked while the memory lasted; others are not returned.
        max_speed: m/s above which the pose has jumped and the memory is dropped; inf for no limit.
        max_turn_rate: rad/s above which the pose has jumped and the memory is dropped; inf for no limit.

    Raises:
        CheckpointError: the folder does not hold an export, or a file in it has changed.
        ConfigError: the backend is unknown or cannot run here (not installed, no GPU, no engine for this GPU, another
            version of TensorRT, no bfloat16, no such execution provider), `min_score` or `min_seen` is not in
            0..1, `threads` is out of range, a limit is negative, or the rig does not fit the export or is not the one
            that it was made for.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        backend: str = "onnxruntime",
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int = 0,
        rig: Rig | VirtualRig | None = None,
        min_score: float = 0.0,
        min_seen: float = MIN_SEEN,
        max_speed: float = MAX_SPEED,
        max_turn_rate: float = MAX_TURN_RATE,
    ) -> None:
        self.min_score = checked_setting("Runtime: min_score", min_score, 0, 1, "a number from 0 to 1")
        self.min_seen = checked_setting("Runtime: min_seen", min_seen, 0, 1, "a number from 0 to 1")
        is_integer = isinstance(threads, int | np.integer) and not isinstance(threads, bool)
        if not is_integer or not 0 <= threads <= MAX_THREADS:
            raise ConfigError(
                f"Runtime: threads is {threads!r}; give a whole number of 0..{MAX_THREADS}, 0 for one per core"
            )
        self.contract = read_contract(folder)
        H, W = self.contract["image_size"]
        remembers = bool(memory_names(x["name"] for x in self.contract["inputs"]))
        self.images = ImageInputs.of_contract(self.contract)
        if rig is not None and self.images.image_format not in ("rgb", "bgr"):
            raise ConfigError(
                f"Runtime: the export takes {self.images.image_format}, and images of a rig are remapped as rgb or "
                "bgr; export the network for one of them"
            )
        about = self.contract.get("weights", {})  # older contracts have none
        weights = Weights(about.get("name"), about.get("trained_on"))
        is_bgr = self.images.image_format.startswith("bgr")  # arrays are in the order of the export
        self._live = LiveInput(
            (H, W), remembers, rig=rig, sizes=self.images.sizes, weights=weights,
            bgr=is_bgr, as_bgr=is_bgr,
            max_speed=max_speed, max_turn_rate=max_turn_rate,
        )  # fmt: skip
        self._export_rig = ExportRig.of_contract(self.contract)
        self._ego_from_lidar = self._live.ego_from_lidar
        if self._export_rig is not None:
            self._ego_from_lidar = self._export_rig.ego_from_lidar
            known = getattr(getattr(rig, "rig", rig), "ego_from_lidar", None)  # of a Rig, or of the one of a VirtualRig
            if known is not None and not np.allclose(known, self._ego_from_lidar, SAME, SAME):
                apart = np.abs(known - self._ego_from_lidar).max()
                raise ConfigError(
                    f"Runtime: ego_from_lidar of the rig differs by up to {apart:.2g} from that of the rig that the "
                    "network was exported for; export it again for this rig"
                )
        self._session: Session
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
        """Clears the memory; the next step is a first frame."""
        self._live.reset()
        self._session.clear()
        self._turn = 0

    def memory(self) -> NDArray[Any]:
        """Returns a copy of the memory that the next step reads, of a network whose memory is one tensor, or empty."""
        return self.memories().get("memory", np.zeros(0, np.float32))

    def memories(self) -> dict[str, NDArray[Any]]:
        """Returns copies of the parts of the memory that the next step reads, by the names of the inputs."""
        return self._session.memory(self._turn)

    def run(self) -> None:
        """Runs the network from the buffers `inputs` to the buffers `outputs`, and swaps the memory buffers.

        Fill `inputs` in place before the call, except the memory. `new_memory` of `outputs` is not filled; see
        `memories`.
        """
        self._session.run(self._turn)
        self._turn = 1 - self._turn

    def step(
        self,
        images: NDArray[np.uint8] | Sequence[AnyImage | None] | Mapping[str, AnyImage | None],
        rig: CameraRig | NumpyCameraRig | NDArray[Any] | None = None,
        global_from_ego: NDArray[Any] | float | None = None,
        time_s: float | None = None,
        *,
        motion: Motion | None = None,
        camera_times_s: Mapping[str, float | None] | Sequence[float | None] | None = None,
    ) -> NumpyLiveObjects:
        """Predicts the boxes and lines of one frame, as `perception.inference.predictor.Predictor.step` does.

        Args:
            images: N arrays uint8, each with the size and the format that the contract names for its camera, which is
                RGB [H, W, 3] by default. The image of a camera that is not present is ignored and may be None.
            rig: img_from_cam [N, 3, 3] in pixels of these images, ego_from_cam [N, 4, 4] metres, present [N] bool.
            global_from_ego: [4, 4] pose at `time_s`, metres, in any frame that is the same in all steps.
            time_s: seconds, later than in the last step.
            motion: the motion since the last step, for vehicles without a pose (see `Motion.from_speed_yaw_rate`).
            camera_times_s: when each camera exposed, seconds: by name with a rig at construction, else in the order of
                the images. `ego_from_cam` of a moving vehicle is carried from there to `time_s`, between the poses of
                this step and of those before.

        With a rig at construction the call is `step(images, global_from_ego, time_s)`: `images` are those of the
        cameras of the rig, in the sizes that it names, as a dict from names or a list in its order. A camera that is
        None, or missing in the dict, is absent. An image may be anything that `perception.inference.images.as_pixels`
        takes: a file name, bytes of a JPEG or PNG, a Pillow image, a numpy array or a torch tensor.

        Without a pose or a time, and without a motion, the frame stands for itself: no memory is used, and the result
        says so in `info`.

        Returns:
            Boxes [M] and lines [M] in the ego frame, highest score first, as numpy arrays; what of them is seen; and
            what is implausible in the input.

        Raises:
            DataError: an argument has the wrong shape or type, is not finite or out of range for a vehicle, `time_s`
                is not later than in the last step, or the export is for another calibration.

        Warns:
            PerceptionWarning: as in `Predictor.step`. On a GPU the memory is not checked; there, outputs that are not
                finite are detected from the boxes and lines.
        """
        live = self._live
        images, rig, global_from_ego, time_s = live.arguments(images, rig, global_from_ego, time_s)
        frame_motion = live.ego_motion.since_last(global_from_ego, time_s, motion)
        N = len(self.images.sizes)
        check_images(images, N, self.images.axes)
        checked = checked_rig(rig, N)
        if self._export_rig is not None:
            self._export_rig.check(checked)
        checked, moved, found = live.carried(checked, frame_motion, camera_times_s)
        given = {int(n): self.images.checked(int(n), images[n]) for n in np.flatnonzero(checked.present)}
        pixels = {n: sampled_rgb(image, self.images.image_format) for n, image in given.items()}
        step = live.inspect(frame_motion, checked, moved, self.images.sizes, pixels, found)
        if step.is_blank:
            self.reset()
            return self._nothing(step, live.warnings.emit(step.findings))
        for n, image in given.items():
            self.inputs[f"image_{n}"][...] = image
        self.fill(checked, frame_motion.ego_from_prev, frame_motion.seconds, frame_motion.is_first)
        self.run()
        predicted = self.objects()
        objects = chosen(predicted, self._above_threshold(predicted.boxes), self._above_threshold(predicted.lines))
        if not (self._session.memory_is_finite(self._turn) and objects_are_finite(predicted, objects)):
            self.reset()
            return self._nothing(step, live.warnings.emit(step.findings | {"not finite": NOT_FINITE}))
        live.keep(step)
        seen = step.view.of_objects(objects)
        boxes, lines = kept_by(seen, self.min_seen)
        objects = chosen(objects, boxes, lines)
        return NumpyLiveObjects(
            boxes=objects.boxes,
            lines=objects.lines,
            seen=NumpySeen(seen.boxes[boxes], seen.lines[lines]),
            warnings=live.warnings.emit(step.findings),
            info=step.info,
            ids=objects.ids,
        )

    def fill(self, rig: NumpyCameraRig, ego_from_prev: NDArray[Any], seconds: float, is_first: bool) -> None:
        """Writes all inputs except the images and the memory into their buffers."""
        for name in ("img_from_cam", "ego_from_cam", "present"):
            self.inputs[name][...] = getattr(rig, name)
        self.inputs["ego_from_prev"][...] = ego_from_prev
        self.inputs["seconds_since_prev"][...] = seconds
        self.inputs["is_first"][...] = is_first
        if "ego_from_lidar" in self.inputs:
            self.inputs["ego_from_lidar"][...] = self._ego_from_lidar

    def objects(self) -> NumpyFrameObjects:
        """Returns all predictions of the last `run`, in the output buffers that the next run overwrites."""
        return objects_of(self.outputs)

    def _above_threshold(self, objects: NumpyBoxes | NumpyPolylines) -> NDArray[np.bool_]:
        keep: NDArray[np.bool_] = objects.valid & (objects.score >= self.min_score)
        return keep

    def _nothing(self, step: Step, warnings: tuple[str, ...]) -> NumpyLiveObjects:
        """Returns a result without boxes and lines."""
        boxes, lines, _ = map_tensors(lambda array: array[:0].copy(), self.objects())
        seen = NumpySeen(np.zeros(0, np.float32), np.zeros(lines.points.shape[:2], bool))
        return NumpyLiveObjects(boxes, lines, seen, warnings, without_result(step.info))


def objects_of(outputs: Mapping[str, NDArray[Any]]) -> NumpyFrameObjects:
    """Collects the outputs of an export, by name. Boxes or lines that the network does not predict are empty."""
    arrays = EMPTY | dict(outputs)
    boxes = {name: arrays[f"box_{name}"] for name in NumpyBoxes._fields if name != "attribute"}
    lines = {name: arrays[f"line_{name}"] for name in NumpyPolylines._fields if name != "valid"}
    ids = None
    if "box_id" in outputs:
        ids = Ids(outputs["box_id"].astype(np.int64), np.full(len(lines["label"]), -1))
    return NumpyFrameObjects(
        NumpyBoxes(attribute=np.full_like(boxes["label"], -1), **boxes),
        NumpyPolylines(valid=np.ones_like(lines["closed"]), **lines),
        ids,
    )
