"""Runtimes of an export: outputs, errors, buffers of engines. None of them needs torch."""

import gc
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import onnx
import pytest
from conftest import MIXED, RAW
from host_cuda import HostContext, HostCuda, HostEngine, HostRuntime, HostTensorRT

from perception.benchmark import latency
from perception.errors import CheckpointError, ConfigError, DataError, PerceptionWarning
from perception.export.contract import ImageInputs, read_contract
from perception.export.parity import certify
from perception.export.replay import camera_frame, replay_frames
from perception.export.runtime import Runtime, objects_of
from perception.export.tensorrt import build_engines, runtime_name
from perception.inference.predictor import Predictor
from perception.types import (
    Boxes,
    CameraRig,
    FrameObjects,
    LiveObjects,
    NumpyBoxes,
    NumpyCameraRig,
    NumpyFrameObjects,
    NumpyLiveObjects,
    NumpyPolylines,
    Polylines,
    map_tensors,
)


def five_steps(town):
    """Yields the arguments of `step` for the first five frames; one frame has a missing camera."""
    for k, (_, frame) in zip(range(5), replay_frames(town, 6), strict=False):
        rig = CameraRig(*(tensor[0].numpy() for tensor in frame.rig))
        images = frame.images[0].permute(0, 2, 3, 1).numpy()
        given = [image if there else None for image, there in zip(images, rig.present, strict=True)]
        yield given, rig, town.ego_pose(k), k * 0.5


def test_numpy_types_have_the_fields_of_the_tensor_types():
    for tensors, arrays in ((CameraRig, NumpyCameraRig), (Boxes, NumpyBoxes), (Polylines, NumpyPolylines)):
        assert arrays._fields == tensors._fields
    assert NumpyFrameObjects._fields == FrameObjects._fields
    assert NumpyLiveObjects._fields == LiveObjects._fields


def test_step_equals_the_predictor(small_network, fp32_export, small_town):
    predictor, runtime = Predictor(small_network, precision="float32"), Runtime(fp32_export, min_score=0.02)
    predictor.min_score = 0.02
    rings = 0
    for step in five_steps(small_town):
        one, other = predictor.step(*step), runtime.step(*step)
        closed = other.lines.closed
        rings += closed.sum()
        assert (other.lines.points[closed, 0] == other.lines.points[closed, -1]).all()
        assert (other.lines.closed == one.lines.closed.numpy()).all()
        assert isinstance(one, LiveObjects) and isinstance(other, NumpyLiveObjects)
        assert one.warnings == other.warnings and (other.seen.lines == one.seen.lines.numpy()).all()
        assert len(one.boxes.score) == len(other.boxes.score) > 0
        assert other.boxes.score == pytest.approx(one.boxes.score.numpy(), abs=1e-4)
        assert other.lines.points == pytest.approx(one.lines.points.numpy(), abs=1e-3)
    assert rings > 0
    buffer = runtime.outputs["box_center"]
    runtime.run()
    assert runtime.outputs["box_center"] is buffer  # no new arrays


def test_a_step_of_a_mixed_rig(small_network, mixed_export, small_town):
    """The runtime on NV12 of several sizes equals the predictor on the same images converted by OpenCV."""
    predictor, runtime = Predictor(small_network, precision="float32"), Runtime(mixed_export)
    images = ImageInputs(MIXED, "nv12")
    for k, (_, frame) in zip(range(3), replay_frames(small_town, 6), strict=False):
        given = camera_frame(frame, images)
        rig = CameraRig(*(tensor[0].numpy() for tensor in given.rig))
        rgb = [cv2.cvtColor(image, cv2.COLOR_YUV2RGB_NV12) for image in given.images]
        assert [image.shape[:2] for image in rgb] == list(MIXED)
        one = predictor.step(rgb, rig, small_town.ego_pose(k), 0.5 * k)
        other = runtime.step(given.images, rig, small_town.ego_pose(k), 0.5 * k)
        assert len(one.boxes.score) == len(other.boxes.score) > 0
        assert other.boxes.score == pytest.approx(one.boxes.score.numpy(), abs=1e-4)
        assert other.lines.points == pytest.approx(one.lines.points.numpy(), abs=1e-3)
    with pytest.raises(DataError, match=r"images\[4\] is uint8 \(96, 112\); .* nv12 of 90 x 160 pixels"):
        runtime.step([*given.images[:4], given.images[1], given.images[5]], rig, small_town.ego_pose(3), 1.5)
    with pytest.raises(DataError, match=r"images is .*; give \[N, H \* 3/2, W\], one image per camera"):
        runtime.step(np.zeros((6, *RAW, 3), np.uint8), rig, small_town.ego_pose(3), 1.5)
    measured = latency.measure(small_network, ["ort"], {"fp32": mixed_export}, passes=1)
    assert 0 < measured.backends["ort"].largest < 1e-3


# What the library requires and a vehicle does not have.
ABSENT = (
    "torch", "torchvision", "scipy", "shapely", "PIL", "cv2", "safetensors", "tqdm", "yaml", "packaging",
    "pyquaternion", "nuscenes", "mmengine", "mmcv", "mmdet", "mmdet3d", "embreex", "tensorboard", "matplotlib", "onnx",
    "ml_dtypes",
)  # fmt: skip


def test_the_runtime_needs_numpy_and_onnx_runtime_alone(fp32_export, small_town, tmp_path):
    frame = map_tensors(lambda tensor: tensor[:1], small_town[0].frames)
    rig = {name: getattr(frame.rig, name)[0].numpy() for name in frame.rig._fields}
    np.savez(tmp_path / "frame.npz", images=frame.images[0].permute(0, 2, 3, 1).numpy(), **rig)
    code = f"""
import sys
for name in {ABSENT!r}:
    sys.modules[name] = None  # importing it is an ImportError
import numpy as np
import perception.export.engine_session
from perception import CameraRig, Runtime
data = np.load({str(tmp_path / "frame.npz")!r})
runtime = Runtime({str(fp32_export)!r})
rig = CameraRig(*(data[name] for name in CameraRig._fields))
objects = runtime.step(data["images"], rig, np.eye(4), 0.0)
assert len(objects.boxes.score) and np.isfinite(objects.lines.points).all()
print(len(objects.boxes.score))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 0


def test_onnx_runtime_that_is_absent(fp32_export, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"Runtime: onnxruntime is not installed .*; pip install onnxruntime"):
        Runtime(fp32_export)


def test_errors_name_the_fix(fp32_export, tmp_path):
    runtime = Runtime(fp32_export)
    level = np.array([[0.0, 0, 1, 1], [-1, 0, 0, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]])
    rig = CameraRig(np.eye(3)[None].repeat(6, 0), level[None].repeat(6, 0), np.ones(6, dtype=bool))
    images = np.zeros((6, *RAW, 3), np.uint8)
    with pytest.raises(DataError, match="5 images were given; the network was exported for 6"):
        runtime.step(images[:5], rig, np.eye(4), 0.0)
    with pytest.raises(DataError, match=r"images\[0\] is uint8 \(60, 112, 3\); .* exported for rgb of 64 x 112 pixels"):
        runtime.step(images[:, :60], rig, np.eye(4), 0.0)
    with pytest.raises(ConfigError, match="provider NoProvider is not available; ONNX Runtime has"):
        Runtime(fp32_export, providers=["NoProvider"])
    with pytest.raises(CheckpointError, match=r"contract\.json is missing"):
        Runtime(tmp_path)
    shutil.copytree(fp32_export, tmp_path / "changed")
    (tmp_path / "changed" / "model.onnx").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"is not the file that .* was written for"):
        Runtime(tmp_path / "changed")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threads": -5}, r"threads is -5; give a whole number of 0\.\.1024, 0 for one per core"),
        ({"threads": 10**9}, "threads is 1000000000"),
        ({"threads": 2.0}, r"threads is 2\.0"),
        ({"threads": None}, "threads is None"),
        ({"threads": True}, "threads is True"),
        ({"providers": []}, r"providers is \[\]; give a list of some of .*CPUExecutionProvider"),
        ({"providers": "CPUExecutionProvider"}, "providers is 'CPUExecutionProvider'; give a list"),
        ({"providers": None}, "providers is None"),
        ({"providers": [None]}, "provider None is not available"),
        ({"backend": None}, "backend None is not known"),
    ],
)
def test_impossible_settings_are_named(fp32_export, settings, message):
    with pytest.raises(ConfigError, match=message):
        Runtime(fp32_export, **settings)


def test_a_contract_of_another_graph_is_refused(fp32_export, tmp_path):
    folder = Path(shutil.copytree(fp32_export, tmp_path / "other"))
    contract = json.loads((folder / "contract.json").read_text())
    memory = next(x for x in contract["inputs"] if x["name"] == "memory")
    memory["shape"][-1] += 1
    (folder / "contract.json").write_text(json.dumps(contract))
    with pytest.raises(CheckpointError, match=r"inputs memory is .*20, 20\]\) in the graph and .*20, 21\]\) in the"):
        Runtime(folder)


@pytest.mark.parametrize(
    "precision", ["fp16", *(pytest.param(precision, marks=pytest.mark.slow) for precision in ("int8", "fp8"))]
)
def test_engines_are_built_without_a_gpu(exports, precision, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    folder = Path(shutil.copytree(exports(precision), tmp_path / precision))
    with pytest.raises(ConfigError, match=r"target 'sm12' is not known to tensorrt-rtx; it builds for .*sm89"):
        build_engines(folder, targets=["sm12"])
    engines = build_engines(folder, targets=["sm89"])
    assert engines["sm89"].stat().st_size > 100_000
    contract = read_contract(folder)  # checks the hashes
    assert contract["engines"]["sm89"]["package"] == "tensorrt-rtx" and "model.sm89.engine" in contract["sha256"]
    assert contract["layers"]["Conv"].keys() == ({"float", "float16"} if precision == "int8" else {"float16"})
    assert contract["layers"]["GridSample"].keys() == {"float"}
    assert contract["checked"][runtime_name("tensorrt-rtx", contract["engines"]["sm89"]["package_version"])][-1:] == [
        "parser run"
    ]
    Runtime(folder).run()  # the graph in the same folder still runs
    engines["sm89"].write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"sm89\.engine is not the file"):
        read_contract(folder)


def test_engines_that_cannot_be_built(fp32_export, monkeypatch):
    with pytest.raises(ConfigError, match="package 'onnx' is not known"):
        build_engines(fp32_export, package="onnx")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ConfigError, match=r"tensorrt is not installed .* pip install tensorrt"):
        build_engines(fp32_export, package="tensorrt")


@pytest.fixture
def engine_folder(fp32_export, tmp_path, monkeypatch):
    """An export with an engine, and stubs of a matching GPU and TensorRT."""
    folder = Path(shutil.copytree(fp32_export, tmp_path / "engine"))
    write_engine(folder, (folder / "model.onnx").read_bytes())
    cuda = HostCuda((8, 9))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", HostTensorRT(cuda, "1.7"))
    return folder


def test_an_engine_of_a_mixed_rig(engine_folder, mixed_export, small_town):
    """The image of every camera reaches the engine in its own buffer."""
    shutil.copytree(mixed_export, engine_folder, dirs_exist_ok=True)
    write_engine(engine_folder, (engine_folder / "model.onnx").read_bytes())
    ours, theirs = Runtime(engine_folder, backend="tensorrt"), Runtime(engine_folder)
    for k, (_, frame) in zip(range(2), replay_frames(small_town, 6), strict=False):
        given = camera_frame(frame, ours.images)
        rig = CameraRig(*(tensor[0].numpy() for tensor in given.rig))
        one, other = (runtime.step(given.images, rig, small_town.ego_pose(k), 0.5 * k) for runtime in (ours, theirs))
        assert len(one.boxes.score) and np.array_equal(one.boxes.center, other.boxes.center)


def write_engine(folder, content, **changed):
    (folder / "model.sm89.engine").write_bytes(content)
    contract = json.loads((folder / "contract.json").read_text())
    engine = {"file": "model.sm89.engine", "gpu": "sm89", "package": "tensorrt-rtx", "package_version": "1.7"}
    contract["engines"] = {"sm89": engine | changed}
    contract["sha256"]["model.sm89.engine"] = hashlib.sha256(content).hexdigest()
    (folder / "contract.json").write_text(json.dumps(contract))


def test_an_engine_gets_every_buffer_where_it_belongs(engine_folder, small_town):
    cuda = sys.modules["cuda.bindings.runtime"]
    ours, theirs = Runtime(engine_folder, backend="tensorrt", min_score=0.02), Runtime(engine_folder, min_score=0.02)
    assert ours.device == "sm89"
    assert not ours.memory().any()
    buffers = {name: array.ctypes.data for name, array in (ours.inputs | ours.outputs).items()}
    made = {side: set(blocks) for side, blocks in cuda._memory.items()}
    for step in five_steps(small_town):
        one, other = (runtime.step(*step) for runtime in (ours, theirs))
        assert len(one.boxes.score) and np.array_equal(one.boxes.center, other.boxes.center)
        assert np.array_equal(one.lines.points, other.lines.points)
        assert ours.memory().any() and np.array_equal(ours.memory(), theirs.memory())
    assert buffers == {name: array.ctypes.data for name, array in (ours.inputs | ours.outputs).items()}
    assert made == {side: set(blocks) for side, blocks in cuda._memory.items()}  # no new arrays
    last = ours.objects().lines.points
    wanted = last.copy()
    del ours
    gc.collect()
    assert not cuda._memory["device"]
    assert np.array_equal(last, wanted) and cuda._memory["host"]  # still in use
    del last, one
    gc.collect()
    assert not cuda._memory["host"]


def test_an_engine_whose_output_is_not_finite_drops_the_memory(engine_folder, small_town):
    cuda = sys.modules["cuda.bindings.runtime"]
    steps = list(five_steps(small_town))
    runtime, fresh = Runtime(engine_folder, backend="tensorrt"), Runtime(engine_folder)
    runtime.step(*steps[0])
    for memory in runtime._session._memories:
        cuda.cudaMemsetAsync(memory["memory"], 0xFF, runtime.inputs["memory"].nbytes, None)  # NaN
    with pytest.warns(PerceptionWarning, match="memory is dropped, and the next step is a first one"):
        objects = runtime.step(*steps[1])
    assert len(objects.boxes.score) == len(objects.lines.score) == 0 and not runtime.memory().any()
    one, other = runtime.step(*steps[2]), fresh.step(*steps[2])
    assert np.array_equal(one.boxes.center, other.boxes.center) and len(one.boxes.center)
    assert np.array_equal(runtime.memory(), fresh.memory())


@pytest.mark.slow
def test_a_certificate_of_an_engine(engine_folder, small_network, small_town):
    found = certify(small_network, engine_folder, small_town, backend="tensorrt")
    assert found.failures == [] and "run by tensorrt" in found.markdown()
    found.save(engine_folder)
    assert json.loads((engine_folder / "certificate.tensorrt.json").read_text())["backend"] == "tensorrt"
    measured = latency.measure(small_network, ["tensorrt"], {"fp32": engine_folder}, passes=1)
    assert measured.backends["tensorrt"].device == "sm89"


def test_engines_that_do_not_fit_are_refused(engine_folder, fp32_export, monkeypatch):
    content = (engine_folder / "model.onnx").read_bytes()
    write_engine(engine_folder, content, gpu="sm120")
    with pytest.raises(ConfigError, match="holds engines for sm120; the GPU of this machine is sm89: build one for it"):
        Runtime(engine_folder, backend="tensorrt")
    write_engine(engine_folder, content, package_version="1.6")
    with pytest.raises(ConfigError, match=r"was built with tensorrt-rtx 1\.6, but 1\.7 is installed; build it again"):
        Runtime(engine_folder, backend="tensorrt")
    write_engine(engine_folder, b"rubbish")
    with pytest.raises(ConfigError, match="cannot load this engine here; build it again"):
        Runtime(engine_folder, backend="tensorrt")
    graph = onnx.load(engine_folder / "model.onnx")
    next(x for x in graph.graph.output if x.name == "box_score").name = "score"
    next(node for node in graph.graph.node if "box_score" in node.output).output[:] = ["score"]
    write_engine(engine_folder, graph.SerializeToString())
    with pytest.raises(
        ConfigError, match=r"outputs box_score is None in the engine and \('float32', \(20,\)\) in the con"
    ):
        Runtime(engine_folder, backend="tensorrt")
    with pytest.raises(ConfigError, match="holds no engine; build one with"):
        Runtime(fp32_export, backend="tensorrt")
    with pytest.raises(ConfigError, match="backend 'abacus' is not known; use one of onnxruntime, openvino, openv"):
        Runtime(fp32_export, backend="abacus")
    monkeypatch.setattr(HostCuda, "cudaGetDevice", lambda self: (100, None))
    with pytest.raises(ConfigError, match=r"cudaGetDevice failed \(no CUDA-capable device is detected\); this needs"):
        Runtime(engine_folder, backend="tensorrt")
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(ConfigError, match=r"engines need CUDA's runtime for Python .* pip install cuda-bindings"):
        Runtime(engine_folder, backend="tensorrt")


def test_stubs_have_the_signatures_of_the_real_functions():
    trt, cuda = pytest.importorskip("tensorrt_rtx"), pytest.importorskip("cuda.bindings.runtime")
    pairs = [
        (HostCuda, cuda),
        (HostTensorRT, trt),
        (HostRuntime, trt.Runtime),
        (HostEngine, trt.ICudaEngine),
        (HostContext, trt.IExecutionContext),
    ]
    for stand_in, real in pairs:
        for name, value in vars(stand_in).items():
            if not name.startswith("_"):
                assert hasattr(real, name), (real, name)
                if isinstance(value, SimpleNamespace):
                    assert all(hasattr(getattr(real, name), field) for field in vars(value))
    for name, function in vars(HostCuda).items():  # the first line of their docstrings holds the signature
        if name.startswith("cuda") and callable(function):
            taken = getattr(cuda, name).__doc__.splitlines()[0].split("(")[1].rstrip(")")
            count = len([argument for argument in taken.split(",") if argument.strip()])
            assert count == function.__code__.co_argcount - 1, name


def test_what_a_network_does_not_predict_is_empty():
    """A network of boxes or of lines alone; no attribute is predicted, so it is -1."""
    boxes = {
        "box_center": np.ones((4, 3)), "box_size": np.ones((4, 3)), "box_yaw": np.ones(4),
        "box_velocity": np.ones((4, 2)), "box_label": np.ones(4, np.int32), "box_score": np.ones(4),
        "box_valid": np.ones(4, bool), "box_uncertainty": np.ones((4, 9)),
    }  # fmt: skip
    lines = {
        "line_points": np.ones((3, 5, 2)), "line_closed": np.ones(3, bool), "line_label": np.ones(3, np.int32),
        "line_score": np.ones(3), "line_uncertainty": np.ones((3, 5, 2)),
    }  # fmt: skip
    both = objects_of(boxes | lines)
    assert both.boxes.attribute.tolist() == [-1] * 4 and both.lines.valid.tolist() == [True] * 3
    only_lines, only_boxes = objects_of(lines), objects_of(boxes)
    for empty, full in ((only_lines.boxes, both.boxes), (only_boxes.lines, both.lines)):
        for name, part, other in zip(full._fields, empty, full, strict=True):
            assert len(part) == 0 and part.ndim == other.ndim and part.dtype.kind == other.dtype.kind, name
            assert part.shape[-1] == other.shape[-1] or part.ndim == 1, name
