"""Backends that run one network: PyTorch in several modes, and exports in other runtimes. All are called alike.

A runner takes the inputs of one frame as numpy arrays, keeps the memory, and returns outputs by name and seconds.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from perception.benchmark.deployed import DeployedRunner, FrameRunner
from perception.benchmark.frames import BASELINE, CAMERAS, NAMES, Mode
from perception.data.nuscenes import NuScenesDataset
from perception.errors import ConfigError, not_installed
from perception.export.contract import CONTRACT, ImageInputs, memory_names, read_contract
from perception.export.engine_session import find_engine
from perception.export.onnx import DeployedNetwork, check_export, example_inputs, export_onnx, trace
from perception.export.openvino_session import BFLOAT16, FLOAT32, import_openvino, openvino_core
from perception.export.progress import stage
from perception.export.runtime import Runtime
from perception.inference.acceleration import check_compiler, choose_precision
from perception.models import Network


@dataclass(frozen=True)
class Backend:
    """One way to run a network.

    Args:
        mode: of PyTorch; None for an export.
        runtime: backend of `Runtime` for an export, else empty.
        precision: of the export.
        packages: that it needs.
    """

    mode: Mode | None = None
    runtime: str = ""
    precision: str = "fp32"
    packages: tuple[str, ...] = ()


ORT, ONNX = ("onnxruntime",), ("onnx", "onnxscript", "onnxruntime")
BACKENDS = {
    "baseline": Backend(BASELINE),
    "pytorch": Backend(Mode(channels_last=True)),
    "bf16": Backend(Mode("bf16", channels_last=True)),
    "compile": Backend(Mode(channels_last=True, compiled=True)),
    "compile-bf16": Backend(Mode("bf16", channels_last=True, compiled=True)),
    "ort": Backend(runtime="onnxruntime", packages=ONNX),
    "ort-int8": Backend(runtime="onnxruntime", precision="int8", packages=ONNX),
    "openvino": Backend(runtime=FLOAT32, packages=(*ONNX, "openvino")),
    "openvino-bf16": Backend(runtime=BFLOAT16, packages=(*ONNX, "openvino")),
    "openvino-int8": Backend(runtime=FLOAT32, precision="int8", packages=(*ONNX, "openvino")),
    "openvino-int8-bf16": Backend(runtime=BFLOAT16, precision="int8", packages=(*ONNX, "openvino")),
    "tensorrt": Backend(runtime="tensorrt", packages=ONNX),
}


def check_backends(names: Sequence[str]) -> None:
    """Checks that backends exist and can run on this machine. Call it before long work.

    Raises:
        ConfigError: a backend is unknown, named twice, or cannot run here: a package, the compiler or an instruction
            set is missing.
    """
    if unknown := [name for name in names if name not in BACKENDS]:
        raise ConfigError(f"backend {unknown[0]!r} is not known; use some of {', '.join(BACKENDS)}")
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"backends are {', '.join(names) or 'missing'}; name at least one, and each once")
    for name in names:
        backend = BACKENDS[name]
        for package in backend.packages:
            try:
                importlib.import_module(package) if package != "openvino" else import_openvino()
            except ModuleNotFoundError as error:
                raise ConfigError(f"backend {name}: {not_installed(error) or error}") from None
        if backend.runtime in (FLOAT32, BFLOAT16):
            openvino_core(backend.runtime, backend.precision)
        if backend.mode is not None:
            choose_precision(NAMES[backend.mode.precision], torch_device())
            if backend.mode.compiled:
                check_compiler()


def torch_device() -> torch.device:
    """The device of the backends of PyTorch: the GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class ExportedRunner:
    """Runs an export.

    Args:
        folder: of the export.
        backend: of `Runtime`.
        threads: number of CPU threads.

    Raises:
        CheckpointError, ConfigError: as `Runtime`.
    """

    def __init__(self, folder: str | Path, backend: str, threads: int) -> None:
        self._runtime = Runtime(folder, backend=backend, threads=threads, providers=_providers(backend))
        memory = memory_names(self._runtime.inputs)
        self._names = [name for name in self._runtime.inputs if name not in memory]
        self.device = self._runtime.device

    def reset(self) -> None:
        """Clears the memory."""
        self._runtime.reset()

    def __call__(self, inputs: Sequence[np.ndarray]) -> tuple[dict[str, np.ndarray], float]:
        """Runs the next frame: outputs by name, and the seconds from inputs to outputs on the host."""
        start = time.perf_counter()
        for name, array in zip(self._names, inputs, strict=True):
            self._runtime.inputs[name][...] = array
        self._runtime.run()
        seconds = time.perf_counter() - start
        outputs = {name: array.copy() for name, array in self._runtime.outputs.items()}
        return outputs | {f"new_{name}": part for name, part in self._runtime.memories().items()}, seconds


def _providers(backend: str) -> tuple[str, ...]:
    """Returns the execution providers of ONNX Runtime: the GPU, if ONNX Runtime has one."""
    if backend == "onnxruntime":
        import onnxruntime

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            return ("CUDAExecutionProvider",)
    return ("CPUExecutionProvider",)


def make_runner(
    name: str,
    network: Network,
    images: ImageInputs,
    inputs: Sequence[np.ndarray],
    exports: Mapping[str, Path],
    threads: int,
) -> FrameRunner:
    """Prepares a network for a backend; PyTorch runs on the GPU if there is one.

    Args:
        name: of a backend.
        network: in evaluation mode, on the CPU.
        images: sizes and format of the camera images.
        inputs: of one frame, without the memory.
        exports: folders of exports of this network, by precision.
        threads: number of CPU threads of other runtimes than PyTorch.

    Raises:
        CheckpointError, ConfigError: as `Runtime`.
    """
    backend = BACKENDS[name]
    if backend.mode is None:
        return ExportedRunner(exports[backend.precision], backend.runtime, threads)
    return DeployedRunner(network, images, inputs, backend.mode, torch_device())


# ------------------------------------------------------------------------------------------------------------- exports


def check_exports(network: Network, root: Path | None, model: str, backends: Sequence[str]) -> None:
    """Checks that the exports for backends can be made, or that those that exist fit a network.

    Args:
        network: in evaluation mode, on the CPU.
        root: see `export_folder`; None for a folder that does not exist yet.
        model: name of the network.
        backends: that will run.

    Raises:
        CheckpointError: a folder holds files that are not an export.
        ConfigError: the network cannot be exported, an export is of another network, or there is no engine.
    """
    for name in backends:
        backend = BACKENDS[name]
        if backend.mode is not None:
            continue
        folder = export_folder(root, model, backend.precision) if root is not None else None
        if folder is None or not (folder / CONTRACT).exists():
            if backend.runtime == "tensorrt":
                raise ConfigError(
                    f"backend {name} runs an engine; write one to {folder or '--exports DIR'} with perception export "
                    "--format tensorrt"
                )
            check_export(network, cameras=CAMERAS, precision=backend.precision, for_cpu=True)
            continue
        contract = read_contract(folder)
        exported, expected = (
            f"{kind} for images of {height} x {width}, {precision}"
            for kind, (height, width), precision in (
                (contract["network"], contract["image_size"], contract["precision"]),
                (type(network).__name__, network.config.image_size, backend.precision),
            )
        )
        if exported != expected:
            raise ConfigError(
                f"{folder} is an export of a {exported}, needed is a {expected}; delete it or export it again"
            )
        if backend.runtime == "tensorrt":
            find_engine(folder, contract)
    if root is not None:
        images_of(network, root, model, backends)


def export_folder(root: Path, model: str, precision: str) -> Path:
    """The folder in `root` of the export of a model, such as `nano-fp32`."""
    return root / f"{Path(model).stem}-{precision}"


def images_of(network: Network, root: Path, model: str, backends: Sequence[str]) -> ImageInputs:
    """Returns the images that all exports of a model take; six of the network's size if there is no export yet.

    Raises:
        ConfigError: exports take different images, or not those of six cameras.
    """
    found = {}
    for precision in _precisions(backends):
        folder = export_folder(root, model, precision)
        if (folder / CONTRACT).exists():
            found[ImageInputs.of_contract(read_contract(folder))] = folder
    if not found:
        return ImageInputs.of_rig(CAMERAS, network.config.image_size)
    images, *others = found
    if others or len(images.sizes) != CAMERAS:
        names = " and ".join(map(str, found.values()))
        raise ConfigError(f"{names}: exports of one model take the same images of {CAMERAS} cameras; export it again")
    return images


def _precisions(backends: Sequence[str]) -> list[str]:
    """Returns the precisions of the exports that backends need."""
    return list(dict.fromkeys(BACKENDS[name].precision for name in backends if BACKENDS[name].mode is None))


def make_exports(
    network: Network,
    root: Path,
    model: str,
    backends: Sequence[str],
    images: ImageInputs,
    calibration: Callable[[], NuScenesDataset] | None,
    *,
    progress: bool = False,
) -> dict[str, Path]:
    """Exports a network for backends, where the exports do not exist yet.

    Args:
        network: in evaluation mode, on the CPU.
        root: receives a folder per precision, see `export_folder`.
        model: name of the network.
        backends: that will run.
        images: see `images_of`.
        calibration: makes the dataset for eight bits, of which the search for sensitive layers takes minutes. None for
            random weights: then all layers with weights are quantized, with the ranges of one random frame.
        progress: show the steps on stderr.

    Returns:
        The folders by precision.
    """
    folders = {precision: export_folder(root, model, precision) for precision in _precisions(backends)}
    missing = {precision: folder for precision, folder in folders.items() if not (folder / CONTRACT).exists()}
    if not missing:
        return folders
    deployed, inputs = DeployedNetwork(network, images).eval(), example_inputs(network, images)
    with stage(f"tracing {model}", progress):
        traced = trace(deployed, inputs, for_cpu=True).SerializeToString()
    for precision, folder in missing.items():
        import onnx

        frames = None
        if precision == "int8":
            arrays = [*inputs[0], *inputs[1:]]
            frames = [{name: x.numpy() for name, x in zip(deployed.input_names, arrays, strict=True)}]
        export_onnx(
            network, folder, cameras=CAMERAS, raw_size=images.sizes, image_format=images.image_format,
            precision=precision, for_cpu=True, graph=onnx.load_from_string(traced),
            calibration=calibration() if calibration and frames else frames, progress=progress,
        )  # fmt: skip
    return folders
