"""Runs a TensorRT engine on the GPU of this machine, with numpy, TensorRT and the CUDA runtime, without torch."""

from __future__ import annotations

import ctypes
import importlib
import weakref
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from perception.commands import command
from perception.errors import ConfigError
from perception.export.contract import memory_names

PACKAGES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}


def import_tensorrt(package: str) -> Any:
    """Imports the module of a TensorRT package.

    Raises:
        ConfigError: the package is unknown, or not installed.
    """
    if package not in PACKAGES:
        raise ConfigError(f"package {package!r} is not known; use one of {', '.join(PACKAGES)}")
    try:
        return importlib.import_module(PACKAGES[package])
    except ImportError as error:
        raise ConfigError(f"{package} is not installed ({error}); pip install {package}") from None


class Cuda:
    """Calls functions of the CUDA runtime and raises their errors.

    Raises:
        ConfigError: cuda-bindings is not installed, or a call fails, as all calls do without a GPU.
    """

    def __init__(self) -> None:
        try:
            self.api = importlib.import_module("cuda.bindings.runtime")
        except ImportError as error:
            raise ConfigError(
                f"engines need CUDA's runtime for Python ({error}); pip install cuda-bindings of the driver's version"
            ) from None

    def __call__(self, function: str, *arguments: Any) -> Any:
        """Calls `cuda<function>` and returns its first result, None if it has none."""
        error, *results = getattr(self.api, f"cuda{function}")(*arguments)
        if error != self.api.cudaError_t.cudaSuccess:
            _, text = self.api.cudaGetErrorString(error)
            raise ConfigError(f"cuda{function} failed ({text.decode()}); this needs an NVIDIA GPU and its driver")
        return results[0] if results else None

    def target(self) -> str:
        """Returns the compute capability of the current GPU, such as "sm89"."""
        attributes, device = self.api.cudaDeviceAttr, self("GetDevice")
        major, minor = (
            self("DeviceGetAttribute", getattr(attributes, f"cudaDevAttrComputeCapability{part}"), device)
            for part in ("Major", "Minor")
        )
        return f"sm{major}{minor}"


def find_engine(folder: str | Path, contract: dict) -> dict:
    """Returns the entry of a contract for the engine that this machine can run.

    Args:
        folder: of the export, for messages.
        contract: from `read_contract`.

    Raises:
        ConfigError: there is no GPU, no engine for it, or none for the installed version of TensorRT.
    """
    engines = list(contract["engines"].values())
    if not engines:
        raise ConfigError(f"{folder} holds no engine; build one with: {command('export')} --format tensorrt-rtx")
    here = Cuda().target()
    fitting = [engine for engine in engines if engine["gpu"] == here]
    if not fitting:
        gpus = ", ".join(engine["gpu"] for engine in engines)
        raise ConfigError(f"{folder} holds engines for {gpus}; the GPU of this machine is {here}: build one for it")
    for engine in fitting:
        version = import_tensorrt(engine["package"]).__version__
        if engine["package_version"] == version:
            return engine
    raise ConfigError(
        f"{Path(folder, engine['file'])} was built with {engine['package']} {engine['package_version']}, but {version} "
        "is installed; build it again, or install the version that it was built with"
    )


class EngineSession:
    """Runs an engine with buffers on host and GPU, and one captured CUDA graph for each of the two memory buffers.

    A run launches one CUDA graph that copies the inputs to the GPU, runs the engine and copies the outputs back. A run
    allocates nothing. Host buffers are page-locked. The memory stays on the GPU, in two buffers that alternate as input
    and output.

    Args:
        folder: of the export.
        contract: from `read_contract`.

    Raises:
        ConfigError: as in `find_engine`; TensorRT cannot load the file, or its inputs or outputs differ from those of
            the contract.
    """

    def __init__(self, folder: str | Path, contract: dict) -> None:
        described = find_engine(folder, contract)
        self.device = described["gpu"]
        path = Path(folder, described["file"])
        trt = import_tensorrt(described["package"])
        self._cuda = cuda = Cuda()
        self._allocated: list[tuple[str, object]] = []
        # Frees GPU memory when the session is garbage-collected.
        weakref.finalize(self, _release, cuda, self._allocated)
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))  # must outlive the engine
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise ConfigError(f"{path}: {described['package']} cannot load this engine here; build it again")
        self._check(trt, path, contract)
        self._stream = self._keep("StreamDestroy", cuda("StreamCreateWithFlags", cuda.api.cudaStreamNonBlocking))
        self.inputs = {x["name"]: self._host(x) for x in contract["inputs"]}
        self.outputs = {x["name"]: self._host(x) for x in contract["outputs"]}
        device = {name: self._device(x) for name, x in (self.inputs | self.outputs).items()}
        names = memory_names(self.inputs)
        self._memories = [{name: device[f"{new}{name}"] for name in names} for new in ("", "new_")]
        self._contexts: list[Any] = []
        self._graphs: list[Any] = []
        for turn in range(2):
            device |= self._memories[turn] | {f"new_{name}": x for name, x in self._memories[1 - turn].items()}
            self._graphs.append(self._capture(path, device))
        self.clear()  # the runs on empty inputs in `_capture` may have written values that are not finite

    def run(self, turn: int) -> None:
        """Runs the engine from `inputs` to `outputs`; reads memory buffer `turn` and writes the other one."""
        self._cuda("GraphLaunch", self._graphs[turn], self._stream)
        self._cuda("StreamSynchronize", self._stream)

    def memory(self, turn: int) -> dict[str, np.ndarray]:
        """Returns copies of the parts of memory buffer `turn` by name."""
        kind = self._cuda.api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        copies = {}
        for name, address in self._memories[turn].items():
            copies[name] = np.empty_like(self.inputs[name])
            self._cuda("Memcpy", copies[name].ctypes.data, address, copies[name].nbytes, kind)
        return copies

    def memory_is_finite(self, turn: int) -> bool:
        """Returns True without a check: it would need a copy of the memory from the GPU in every run."""
        return True

    def clear(self) -> None:
        """Fills both memory buffers with zeros."""
        for memory in self._memories:  # in the stream of the runs, which does not synchronize with others
            for name, address in memory.items():
                self._cuda("MemsetAsync", address, 0, self.inputs[name].nbytes, self._stream)
        self._cuda("StreamSynchronize", self._stream)

    def _check(self, trt: Any, path: Path, contract: dict) -> None:
        """Checks that the inputs and outputs of the engine are those of the contract."""
        engine = self._engine
        for side, mode in (("inputs", trt.TensorIOMode.INPUT), ("outputs", trt.TensorIOMode.OUTPUT)):
            names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
            found = {
                name: (np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name, tuple(engine.get_tensor_shape(name)))
                for name in names
                if engine.get_tensor_mode(name) == mode
            }
            wanted = {x["name"]: (x["dtype"], tuple(x["shape"])) for x in contract[side]}
            for name in sorted(wanted.keys() | found.keys()):
                if wanted.get(name) != found.get(name):
                    raise ConfigError(
                        f"{path}: {side} {name} is {found.get(name)} in the engine and {wanted.get(name)} in the "
                        "contract; export again"
                    )

    def _keep(self, release: str, handle: Any) -> Any:
        """Records the function that releases a handle, and returns the handle."""
        self._allocated.append((release, handle))
        return handle

    def _host(self, described: dict) -> np.ndarray:
        """Allocates a page-locked array of zeros."""
        dtype, shape = np.dtype(described["dtype"]), tuple(described["shape"])
        size = dtype.itemsize * prod(shape)
        address = self._cuda("HostAlloc", size, self._cuda.api.cudaHostAllocDefault)
        memory = (ctypes.c_uint8 * size).from_address(int(address))
        # Freed with the last array that uses it, which may live longer than the session.
        weakref.finalize(memory, self._cuda, "FreeHost", address)
        array = np.frombuffer(memory, dtype).reshape(shape)
        array[...] = 0
        return array

    def _device(self, array: np.ndarray) -> int:
        return int(self._keep("Free", self._cuda("Malloc", array.nbytes)))

    def _capture(self, path: Path, addresses: dict[str, int]) -> Any:
        """Captures the CUDA graph of one run with the engine's tensors at these addresses."""
        cuda, stream, kinds = self._cuda, self._stream, self._cuda.api.cudaMemcpyKind
        context = self._engine.create_execution_context()
        if context is None:
            raise ConfigError(f"{path}: TensorRT creates no context for this engine; see its messages above")
        self._contexts.append(context)  # the graph uses scratch memory of its context
        for name, address in addresses.items():
            context.set_tensor_address(name, address)
        names = memory_names(self.inputs)
        sent = {name: array for name, array in self.inputs.items() if name not in names}
        fetched = {name: array for name, array in self.outputs.items() if name.removeprefix("new_") not in names}

        def enqueue() -> None:
            for name, array in sent.items():
                to_device = kinds.cudaMemcpyHostToDevice
                cuda("MemcpyAsync", addresses[name], array.ctypes.data, array.nbytes, to_device, stream)
            if not context.execute_async_v3(int(stream)):
                raise ConfigError(f"{path}: TensorRT does not run this engine; see its messages above")
            for name, array in fetched.items():
                to_host = kinds.cudaMemcpyDeviceToHost
                cuda("MemcpyAsync", array.ctypes.data, addresses[name], array.nbytes, to_host, stream)

        enqueue()  # TensorRT's lazy initialisation happens in the first run and must not be captured
        cuda("StreamSynchronize", stream)
        cuda("StreamBeginCapture", stream, cuda.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        enqueue()
        graph = self._keep("GraphDestroy", cuda("StreamEndCapture", stream))
        return self._keep("GraphExecDestroy", cuda("GraphInstantiate", graph, 0))


def _release(cuda: Cuda, allocated: list[tuple[str, object]]) -> None:
    for release, handle in reversed(allocated):
        cuda(release, handle)
