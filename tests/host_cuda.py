"""Stubs of a GPU and TensorRT: device memory is host memory, and an engine is an ONNX graph.

They execute the calls of `EngineSession` in its order and on its addresses, so that a wrong buffer, a missing copy or a
memory buffer that is not swapped changes the outputs. They cannot show that the real libraries accept these calls.
"""

import ctypes
from types import SimpleNamespace

import numpy as np
import onnxruntime


class HostCuda:
    """`cuda.bindings.runtime` with one device."""

    cudaError_t = SimpleNamespace(cudaSuccess=0)
    cudaDeviceAttr = SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor="major", cudaDevAttrComputeCapabilityMinor="minor"
    )
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice="to device", cudaMemcpyDeviceToHost="to host")
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaStreamNonBlocking, cudaHostAllocDefault = 1, 0

    def __init__(self, capability):
        self._capability = dict(zip(("major", "minor"), capability, strict=True))
        self._memory = {"host": {}, "device": {}}
        self._tape = None  # the CUDA graph that is being captured

    def _do(self, work):
        work() if self._tape is None else self._tape.append(work)

    def _make(self, side, size):
        block = (ctypes.c_uint8 * size)(*[0xFF] * size)  # NaN, as uninitialised memory may be
        self._memory[side][ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    def cudaGetErrorString(self, error):
        return 0, b"no CUDA-capable device is detected"

    def cudaGetDevice(self):
        return 0, 0

    def cudaDeviceGetAttribute(self, attribute, device):
        return 0, self._capability[attribute]

    def cudaMalloc(self, size):
        return self._make("device", size)

    def cudaHostAlloc(self, size, flags):
        return self._make("host", size)

    def cudaFree(self, address):
        del self._memory["device"][address]
        return (0,)

    def cudaFreeHost(self, address):
        del self._memory["host"][address]
        return (0,)

    def cudaMemsetAsync(self, address, value, size, stream):
        assert size == len(self._memory["device"][address])
        self._do(lambda: ctypes.memset(address, value, size))
        return (0,)

    def cudaMemcpyAsync(self, to, start, size, kind, stream):
        sides = ("device", "host") if kind == "to device" else ("host", "device")
        for side, address in zip(sides, (to, start), strict=True):
            assert size == len(self._memory[side][address])
        self._do(lambda: ctypes.memmove(to, start, size))
        return (0,)

    def cudaMemcpy(self, to, start, size, kind):
        assert kind == "to host" and size == len(self._memory["device"][start])
        ctypes.memmove(to, start, size)
        return (0,)

    def cudaStreamCreateWithFlags(self, flags):
        return 0, 7

    def cudaStreamDestroy(self, stream):
        return (0,)

    def cudaStreamSynchronize(self, stream):
        return (0,)

    def cudaStreamBeginCapture(self, stream, mode):
        self._tape = []
        return (0,)

    def cudaStreamEndCapture(self, stream):
        graph, self._tape = self._tape, None
        return 0, graph

    def cudaGraphInstantiate(self, graph, flags):
        return 0, tuple(graph)

    def cudaGraphLaunch(self, graph, stream):
        for work in graph:
            work()
        return (0,)

    def cudaGraphDestroy(self, graph):
        return (0,)

    def cudaGraphExecDestroy(self, graph):
        return (0,)


class HostTensorRT:
    """`tensorrt` on a `HostCuda`; the file of an engine is an ONNX file."""

    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})
    nptype = staticmethod(lambda dtype: dtype)

    def __init__(self, cuda, version):
        self.__version__ = version
        self.Runtime = lambda logger: HostRuntime(cuda)


class HostRuntime:
    def __init__(self, cuda):
        self._cuda = cuda

    def deserialize_cuda_engine(self, content):
        return HostEngine(self._cuda, content) if content[:1] == b"\x08" else None


class HostEngine:
    def __init__(self, cuda, content):
        self._cuda, self._session = cuda, onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        inputs = {x.name: (x, "input") for x in self._session.get_inputs()}
        self._tensors = inputs | {x.name: (x, "output") for x in self._session.get_outputs()}
        self.num_io_tensors = len(self._tensors)

    def get_tensor_name(self, index):
        return list(self._tensors)[index]

    def get_tensor_mode(self, name):
        return self._tensors[name][1]

    def get_tensor_dtype(self, name):
        kind = self._tensors[name][0].type.removeprefix("tensor(").removesuffix(")")
        return np.dtype({"float": "float32"}.get(kind, kind))

    def get_tensor_shape(self, name):
        return self._tensors[name][0].shape

    def create_execution_context(self):
        return HostContext(self._cuda, self, self._session)


class HostContext:
    def __init__(self, cuda, engine, session):
        self._cuda, self._engine, self._session, self._addresses = cuda, engine, session, {}

    def set_tensor_address(self, name, address):
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream_handle):
        buffers = {name: self._view(name, address) for name, address in self._addresses.items()}

        def work():
            inputs = {x.name: buffers[x.name] for x in self._session.get_inputs()}
            for output, array in zip(self._session.get_outputs(), self._session.run(None, inputs), strict=True):
                buffers[output.name][...] = array

        self._cuda._do(work)
        return True

    def _view(self, name, address):
        block = self._cuda._memory["device"][address]
        return np.frombuffer(block, self._engine.get_tensor_dtype(name)).reshape(self._engine.get_tensor_shape(name))
