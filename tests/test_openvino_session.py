"""OpenVINO gives the outputs of ONNX Runtime in float32 and in bfloat16, without telemetry."""

import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import pytest
from conftest import RAW
from onnx import numpy_helper

from perception.benchmark.latency import largest_difference
from perception.errors import CheckpointError, ConfigError
from perception.export.onnx import export_onnx
from perception.export.openvino_session import BFLOAT16, FLOAT32, openvino_core
from perception.export.parity import certify
from perception.export.quantize import relative_change
from perception.export.replay import camera_frame, frame_inputs, replay_frames
from perception.export.runtime import Runtime

# find_spec does not import openvino, which would start its telemetry.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")


@pytest.fixture
def with_bfloat16():
    try:
        openvino_core(BFLOAT16, "fp32")
    except ConfigError as error:
        pytest.skip(str(error))


def answers(runtime, town, count=8):
    """Returns raw outputs and memory of the first frames; one has a missing camera, one has rotated cameras."""
    rows = []
    for _, (_, frame) in zip(range(count), replay_frames(town, 6), strict=False):
        for name, array in frame_inputs(camera_frame(frame, runtime.images)).items():
            runtime.inputs[name][...] = array
        runtime.run()
        row = {name: array.copy() for name, array in runtime.outputs.items() if name.startswith("raw_")}
        rows.append(row | {"new_memory": runtime.memory()})
    return rows


def stacked(rows):
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def test_float32_outputs_equal_onnx_runtime(fp32_export, small_town):
    ours, theirs = Runtime(fp32_export, backend=FLOAT32, threads=1), Runtime(fp32_export)
    buffers = {name: array.ctypes.data for name, array in (ours.inputs | ours.outputs).items()}
    for one, other in zip(answers(theirs, small_town), answers(ours, small_town), strict=True):
        assert one["new_memory"].any() and largest_difference(one, other) < 1e-3
    assert {x: ours.outputs[x].dtype for x in ours.outputs} == {x: theirs.outputs[x].dtype for x in theirs.outputs}
    assert np.array_equal(ours.outputs["box_label"], theirs.outputs["box_label"])
    assert np.array_equal(ours.outputs["line_closed"], theirs.outputs["line_closed"])
    assert buffers == {name: array.ctypes.data for name, array in (ours.inputs | ours.outputs).items()}
    ours.reset()
    assert not ours.memory().any()


@pytest.mark.parametrize(
    ("precision", "for_cpu", "most"),
    [
        ("fp16", False, 0.002),
        pytest.param("int8", False, 0.1, marks=pytest.mark.slow),  # 0.073 were measured for these random weights
        pytest.param("int8", True, 0.02, marks=pytest.mark.slow),
        pytest.param("fp8", False, 0.02, marks=pytest.mark.slow),
    ],
)
def test_graphs_of_other_precisions(exports, small_town, precision, for_cpu, most):
    """The runtimes round differently, so their difference is about that between the graph and float32."""
    folder = exports(precision, for_cpu)
    wanted, found = (stacked(answers(Runtime(folder, backend=name), small_town)) for name in ("onnxruntime", FLOAT32))
    assert relative_change(wanted, found) < most


SIGNAL = """
import gc, os, signal, sys
from perception.export.runtime import Runtime
first, second = (Runtime(sys.argv[1], backend="openvino") for _ in range(2))
del first
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("handled", flush=True))
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_signals_are_handled_after_sessions_ended(fp32_export):
    """Ctrl-C, or the end of a DataLoader's worker, would end the process with a segmentation fault."""
    command = [sys.executable, "-c", SIGNAL, str(fp32_export)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "handled\n"


TYPES = """
import json, os, sys
from perception.export.runtime import Runtime
found = {}
runtime = Runtime(sys.argv[1], backend=sys.argv[2])
for node in runtime._session._requests[0].get_compiled_model().get_runtime_model().get_ordered_ops():
    information = node.get_rt_info()
    kind, precision = (information[key].astype(str) for key in ("layerType", "runtimePrecision"))
    found.setdefault(kind, []).append(precision)
print(json.dumps({kind: sorted(set(types)) for kind, types in found.items()}), flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_types_are_those_of_the_graph(with_bfloat16, fp32_export, small_town):
    """By default OpenVINO would compute everything in bfloat16 on this CPU, also projection and sampling.

    The types are read in a separate process, which has a `Core` of its own: two of them in one process would leave it
    without a stack for signals.
    """
    for backend, of_weights in ((FLOAT32, "f32"), (BFLOAT16, "bf16")):
        command = [sys.executable, "-c", TYPES, str(fp32_export), backend]
        types = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert types["Convolution"] == [of_weights] and of_weights in types["FullyConnected"]
        assert types["GridSample"] == types["MVN"] == types["Softmax"] == ["f32"]
    runtimes = Runtime(fp32_export), Runtime(fp32_export, backend=BFLOAT16)
    wanted, found = (stacked(answers(runtime, small_town)) for runtime in runtimes)
    assert 1e-3 < relative_change(wanted, found) < 0.03


@pytest.mark.slow
def test_exports_for_cpus_sample_in_one_operator(with_bfloat16, small_network, exports, small_town, tmp_path):
    """The answers are those of the usual graph, whose features GridSample reads."""
    folder = export_onnx(small_network, tmp_path / "cpu", raw_size=RAW, for_cpu=True)
    for backend in ("onnxruntime", FLOAT32):
        wanted, found = (stacked(answers(Runtime(x, backend=backend), small_town)) for x in (exports("fp32"), folder))
        assert relative_change(wanted, found) < 1e-3
    for backend in (FLOAT32, BFLOAT16):
        command = [sys.executable, "-c", TYPES, str(folder), backend]
        types = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert types["EmbeddingBagPacked"] == ["f32"]
    nodes = Counter(node.op_type for node in onnx.load(folder / "model.onnx").graph.node)
    usual = Counter(node.op_type for node in onnx.load(exports("fp32") / "model.onnx").graph.node)
    assert nodes["GridSample"] < usual["GridSample"]


@pytest.mark.slow
def test_certificates_of_openvino(with_bfloat16, small_network, fp32_export, small_town, tmp_path):
    folder = Path(shutil.copytree(fp32_export, tmp_path / "copy"))
    for backend in (FLOAT32, BFLOAT16):
        found = certify(small_network, folder, small_town, backend=backend)
        assert f"run by {backend}." in found.markdown()
        if backend == FLOAT32:
            assert found.failures == []
        else:  # only metrics have gates, as for float16
            assert all(failure.split()[0] in ("nds", "lane_mAP") for failure in found.failures)
        found.save(folder)
        assert json.loads((folder / f"certificate.{backend}.json").read_text())["backend"] == backend


@pytest.mark.slow
def test_the_gate_sees_a_broken_weight_in_openvino(small_network, fp32_export, small_town, tmp_path):
    def change(graph):
        weight = next(x for x in graph.initializer if "smooth" in x.name and len(x.dims) == 4)
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.02, weight.name))

    found = certify(small_network, altered(fp32_export, tmp_path, change), small_town, backend=FLOAT32)
    assert any(text.startswith("raw_box differs by") and "on average" in text for text in found.failures)


def altered(folder, tmp_path, change):
    """Copies an export with another graph and its hash in the contract."""
    import hashlib

    copy = Path(shutil.copytree(folder, tmp_path / "altered"))
    model = onnx.load(folder / "model.onnx")
    change(model.graph)
    content = model.SerializeToString()
    (copy / "model.onnx").write_bytes(content)
    contract = json.loads((copy / "contract.json").read_text())
    contract["sha256"]["model.onnx"] = hashlib.sha256(content).hexdigest()
    (copy / "contract.json").write_text(json.dumps(contract))
    return copy


def test_errors_name_the_cause(fp32_export, exports, tmp_path, monkeypatch):
    def unknown(graph):
        next(node for node in graph.node if node.op_type == "Relu").op_type = "Abacus"

    def renamed(graph):
        next(x for x in graph.output if x.name == "box_score").name = "score"
        next(node for node in graph.node if "box_score" in node.output).output[:] = ["score"]

    with pytest.raises(ConfigError, match=r"model\.onnx: OpenVINO 20.* does not take this graph: .*Abacus"):
        Runtime(altered(fp32_export, tmp_path / "a", unknown), backend=FLOAT32)
    with pytest.raises(
        CheckpointError, match=r"outputs box_score is None in the graph and \('float32', \[20\]\) in th"
    ):
        Runtime(altered(fp32_export, tmp_path / "b", renamed), backend=FLOAT32)
    with pytest.raises(ConfigError, match="openvino-bf16 runs exports of precision fp32 or int8, this one is fp16"):
        Runtime(exports("fp16"), backend=BFLOAT16)
    with pytest.raises(ConfigError, match="threads is -1"):
        Runtime(fp32_export, backend=FLOAT32, threads=-1)
    old = {"OPTIMIZATION_CAPABILITIES": ["FP32", "INT8"], "FULL_DEVICE_NAME": "Old CPU"}
    module = ModuleType("openvino")
    module.Core = lambda: SimpleNamespace(get_property=lambda device, name: old[name])
    monkeypatch.setitem(sys.modules, "openvino", module)
    with pytest.raises(
        ConfigError, match=r"needs a CPU with bfloat16 .*, which Old CPU does not have; use backend open"
    ):
        Runtime(fp32_export, backend=BFLOAT16)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ConfigError, match=r"openvino is not installed .*; install it, or the extra \[openvino\]"):
        Runtime(fp32_export, backend=FLOAT32)


def test_no_telemetry_and_no_torch(fp32_export, tmp_path):
    """OpenVINO writes nothing into the home directory, as its own import would do."""
    code = f"""
import sys
sys.modules["torch"] = None
import numpy as np
from perception.export.runtime import Runtime
for backend in ("openvino", "onnxruntime"):
    runtime = Runtime({str(fp32_export)!r}, backend=backend)
    for name in ("img_from_cam", "ego_from_cam"):
        runtime.inputs[name][...] = np.eye(len(runtime.inputs[name][0]))
    runtime.inputs["ego_from_prev"][...] = np.eye(4)
    runtime.run()
    print(runtime.outputs["box_score"][0])
assert "openvino_telemetry" not in sys.modules
"""
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | {"HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    one, other = map(float, run.stdout.split())
    assert one == pytest.approx(other, abs=1e-4)
    assert not list(tmp_path.iterdir())


def test_buffers_outlive_their_session(fp32_export):
    runtime = Runtime(fp32_export, backend=FLOAT32)
    scores = runtime.outputs["box_score"]
    runtime.run()
    wanted = scores.copy()
    del runtime
    gc.collect()
    assert np.array_equal(scores, wanted, equal_nan=True)
