"""Export: the graph is the network, the gate of the certificate can fail, and the runtime needs no torch."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import noisy
from onnx import numpy_helper
from PIL import Image

from perception.data.loader import fit_image
from perception.data.nuscenes import NuScenesDataset
from perception.errors import CheckpointError, ConfigError, DataError
from perception.export import latency, parity
from perception.export.contract import read_contract
from perception.export.drive import drive, moment_inputs
from perception.export.half import WEIGHTED
from perception.export.onnx import DeployedNetwork, example_inputs, export_onnx, fit_pixels, fitting_matrices, trace
from perception.export.parity import certify
from perception.export.quantize import BUDGET, KINDS, Quantizer, answers, changed, record
from perception.export.runtime import Runtime
from perception.export.tensorrt import build_engines
from perception.models.bev_transformer import BEVTransformer, ModelConfig
from perception.models.bevformer import BEVFormer, BEVFormerConfig
from perception.models.checkpoint import build_network
from perception.models.maptr import MapTRConfig
from perception.models.maptrv2 import MapTRv2, MapTRv2Config
from perception.models.published_backbone import FPNConfig
from perception.predictor import Predictor
from perception.synthetic import VERSION, simulate
from perception.types import CameraRig, map_tensors

RAW = (64, 112)
SMALL = ModelConfig.preset(
    "nano", image_size=(40, 80), grid=(20, 20), channels=16, depth_bins=8, backbone_stages=2, decoder_layers=2,
    box_queries=20, line_queries=8, line_points=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> BEVTransformer:
    return noisy(BEVTransformer, SMALL)


@pytest.fixture(scope="module")
def town(tmp_path_factory):
    root = tmp_path_factory.mktemp("export") / "town"
    simulate(root, scenes=2, seed=8, keyframes=20, split="certificate", image_size=RAW)
    return NuScenesDataset(root, VERSION, "certificate", image_size=RAW)


@pytest.fixture(scope="module")
def graph(model):
    """Traced once: that takes longer than all else."""
    return trace(DeployedNetwork(model, RAW).eval(), example_inputs(model, 6, RAW))


@pytest.fixture(scope="module")
def exports(model, graph, town, tmp_path_factory):
    """Folders by precision and whether for CPUs, each made when it is first asked for."""

    @cache
    def make(precision: str, for_cpu: bool = False):
        out = tmp_path_factory.mktemp(precision)
        return export_onnx(
            model, out, raw_size=RAW, precision=precision, for_cpu=for_cpu, calibration=town, graph=graph
        )

    return make


@pytest.fixture(scope="module")
def folder(exports):
    return exports("fp32")


@pytest.fixture(scope="module")
def certificate(model, folder, town):
    return certify(model, folder, town, drift_frames=60)


def test_the_graph_is_the_network(folder, certificate):
    """The whole drive with its own memory; images are fitted in the graph as Pillow does it."""
    assert certificate.failures == []
    assert certificate.frames == 40 and certificate.scenes == 2
    assert max(largest for largest, _ in certificate.raw.values()) < 1e-3
    assert certificate.boxes[0] < 1e-3 and certificate.lines[0] < 1e-3
    assert certificate.pixels == (0.0, 0.0)
    assert "Gate: **passed**" in certificate.markdown()
    certificate.save(folder)
    assert json.loads((folder / "certificate.json").read_text())["passed"]
    assert "| nds |" in (folder / "certificate.md").read_text()


def test_standard_operators_and_a_contract(folder):
    graph = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert {(o.domain, o.version) for o in graph.opset_import} == {("", 20)}
    operators = Counter(node.op_type for node in graph.graph.node)
    # What TensorRT has no static form of.
    assert not operators.keys() & {"NonZero", "ScatterND", "ScatterElements", "Loop", "If", "Unique", "Compress"}
    assert all(d.dim_value for x in graph.graph.input for d in x.type.tensor_type.shape.dim)
    shapes = {v.name: v.type.tensor_type.shape.dim for v in onnx.shape_inference.infer_shapes(graph).graph.value_info}
    sampled = [len(shapes[node.input[0]]) for node in graph.graph.node if node.op_type == "GridSample"]
    assert sampled and set(sampled) == {4}
    assert b"/perception/" not in (folder / "model.onnx").read_bytes()  # no paths of the machine that exported
    contract = json.loads((folder / "contract.json").read_text())
    assert [x["name"] for x in contract["inputs"]] == [x.name for x in graph.graph.input]
    assert [x["name"] for x in contract["outputs"]] == [x.name for x in graph.graph.output]
    assert contract["raw_size"] == list(RAW) and contract["cameras"] == 6 and contract["box_classes"][0] == "car"


def broken(folder, tmp_path, change):
    """A copy of an export with one of its weights changed, under a contract that says so."""
    import hashlib

    shutil.copytree(folder, tmp_path / "broken")
    graph = onnx.load(folder / "model.onnx")
    change(graph.graph)
    content = graph.SerializeToString()
    (tmp_path / "broken" / "model.onnx").write_bytes(content)
    contract = json.loads((folder / "contract.json").read_text())
    contract["sha256"]["model.onnx"] = hashlib.sha256(content).hexdigest()
    (tmp_path / "broken" / "contract.json").write_text(json.dumps(contract))
    return tmp_path / "broken"


def test_the_gate_sees_a_broken_weight(model, folder, town, tmp_path):
    def change(graph):
        weight = next(x for x in graph.initializer if "smooth" in x.name and len(x.dims) == 4)
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.02, weight.name))

    found = certify(model, broken(folder, tmp_path, change), town)
    assert any(text.startswith("raw_box differs by") for text in found.failures)
    assert "Gate: **failed**" in found.markdown()


def test_the_gate_sees_a_lost_memory(model, folder, town, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "moment_inputs", lambda frame: moment_inputs(frame) | {"is_first": np.ones(1, bool)})
    found = certify(model, folder, town)
    assert any(text.startswith("memory differs by") for text in found.failures)


def test_the_gate_sees_a_wrong_calibration(model, folder, town, monkeypatch):
    def off(frame):
        matrix = frame.rig.img_from_cam[0].numpy().copy()
        matrix[0, 0, 2] += 0.5  # pixels
        return moment_inputs(frame) | {"img_from_cam": matrix}

    monkeypatch.setattr(parity, "moment_inputs", off)
    assert certify(model, folder, town).failures


def test_the_gate_sees_other_metrics(certificate):
    metrics = certificate.metrics | {"lane_map": (0.5, 0.4989)}
    assert replace(certificate, metrics=metrics).failures == [
        "lane_map is 0.4989 instead of 0.5000, more than 0.0005 off"
    ]
    assert replace(certificate, metrics=metrics, precision="fp16").failures == []
    assert replace(certificate, drift=(1e-3, 1e-2)).failures == [
        "the memory drifts: off by 1.00e-03 early and by 1.00e-02 late"
    ]


def test_halves(model, town, exports):
    """Halves are in the graph, not where places are computed, and the answer stays close."""
    folder = exports("fp16")
    graph = onnx.shape_inference.infer_shapes(onnx.load(folder / "model.onnx")).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    half, whole = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert convolutions and all(kinds[name] == half for node in convolutions for name in node.input)
    for kind in ("GridSample", "Softmax", "LayerNormalization", "TopK"):
        nodes = [node for node in graph.node if node.op_type == kind]
        assert nodes and all(kinds[node.input[0]] == whole for node in nodes)
    contract = json.loads((folder / "contract.json").read_text())
    assert {x["dtype"] for x in contract["inputs"]} == {"uint8", "float32", "bool"}
    found = certify(model, folder, town)
    assert found.failures == [] and 1e-5 < found.boxes[1] < 0.05


@pytest.mark.parametrize("network", ["bevformer", "maptr"])
def test_published_networks_are_exported(network, town, tmp_path):
    """Without cells that are sought out at run time, in single precision, with or without a memory."""
    torch.manual_seed(0)
    small = {
        "image_size": RAW, "backbone": FPNConfig(stages=2), "channels": 16, "feed_forward": 24, "heads": 2,
        "encoder_layers": 1, "decoder_layers": 2,
    }  # fmt: skip
    if network == "bevformer":
        config = BEVFormerConfig(**small, bev=(10, 10), rotate_center=(5, 5), queries=15, max_boxes=10)
    else:
        config = MapTRConfig(**small, bev=(10, 6), lines=6, line_points=5, max_lines=5, kernel=(3, 5))
    model = build_network(config)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    folder = export_onnx(model.eval(), tmp_path)
    graph = onnx.load(folder / "model.onnx").graph
    kinds = {v.type.tensor_type.elem_type for v in graph.value_info} | {x.data_type for x in graph.initializer}
    assert onnx.TensorProto.DOUBLE not in kinds
    assert not {node.op_type for node in graph.node} & {"NonZero", "ScatterND", "Loop", "If"}
    found = certify(model, folder, town)
    assert found.failures == []
    assert set(found.raw) == ({"memory", "raw_box"} if network == "bevformer" else {"raw_line"})
    scene = Runtime(folder).scene()
    assert len(scene.boxes.score) == (10 if network == "bevformer" else 0)


def test_what_is_sure_decides_about_int8_and_order_does_not():
    generator = np.random.default_rng(0)
    wanted = {
        "raw_box_logits": generator.normal(-6, 0.1, (2, 5, 3)),
        "raw_box_places": generator.normal(0, 10, (2, 5, 4)),
    }
    wanted["raw_box_logits"][:, 0] = 4.0  # one sure box
    other_order = {name: values[:, ::-1] for name, values in wanted.items()}
    assert changed(wanted, other_order) == pytest.approx(0)
    sure, unsure = ({name: values.copy() for name, values in wanted.items()} for _ in range(2))
    sure["raw_box_places"][:, 0] += 1.0
    unsure["raw_box_places"][:, 1] += 1.0
    spread = wanted["raw_box_places"].std()
    weights = 1 / (1 + np.exp(-wanted["raw_box_logits"].max(-1)))
    assert changed(wanted, sure) == pytest.approx(weights[:, 0].sum() / weights.sum() / spread / 2)
    assert changed(wanted, unsure) < 0.02 * changed(wanted, sure)


def test_int8_where_it_changes_little(model, town, exports, tmp_path):
    """Marks on real ranges, the most sensitive layers left out, halves around them, and the certificate tells of it."""
    with pytest.raises(ConfigError, match="int8 needs a dataset"):
        export_onnx(model, tmp_path, raw_size=RAW, precision="int8")
    folder = exports("int8")
    told = read_contract(folder)["quantization"]
    assert told["together"] <= BUDGET and set(told["groups"]) < set(told["sensitivities"])
    assert sum(told["work"].values()) == pytest.approx(1)
    price = {name: told["sensitivities"][name] / told["work"][name] for name in told["work"]}  # of what it saves
    left_out = set(price) - set(told["groups"])
    assert min(price[name] for name in left_out) >= max(price[name] for name in told["groups"])
    graph = onnx.load(folder / "model.onnx").graph
    int8 = onnx.TensorProto.INT8
    weights = {x.name: x for x in graph.initializer if x.data_type == int8 and len(x.dims) > 1}
    made_by = {name: node for node in graph.node for name in node.output}
    quantized = [node for node in graph.node if node.op_type in WEIGHTED and node.input[1] in made_by]
    quantized = [node for node in quantized if made_by[node.input[1]].op_type == "DequantizeLinear"]
    assert {made_by[node.input[1]].input[0] for node in quantized} == set(weights) and len(weights) > 5
    assert all(made_by[node.input[0]].op_type == "DequantizeLinear" for node in quantized)
    scales = {x.name: x for x in graph.initializer}
    for node in quantized:  # a scale per channel, in halves
        scale = scales[made_by[node.input[1]].input[1]]
        channels = 0 if node.op_type == "Conv" else 1
        assert list(scale.dims) == [weights[made_by[node.input[1]].input[0]].dims[channels]]
        assert scale.data_type == onnx.TensorProto.FLOAT16
    found = certify(model, folder, town)
    assert found.precision == "int8" and found.quantization == told and 1e-4 < found.boxes[1] < 1
    assert "| all that are in eight bits together |" in found.markdown()


def test_int8_for_cpus(model, town, exports, tmp_path):
    """Bytes from zero up between layers, whole biases, float32 around: what CPUs have fast kernels for."""
    with pytest.raises(ConfigError, match="fp16 is slow on CPUs; take fp32 or int8"):
        export_onnx(model, tmp_path, raw_size=RAW, precision="fp16", for_cpu=True)
    folder = exports("int8", for_cpu=True)
    graph = onnx.load(folder / "model.onnx").graph
    kinds = Counter(tensor.data_type for tensor in graph.initializer)
    assert onnx.TensorProto.FLOAT16 not in kinds
    weights = {x.name for x in graph.initializer if x.data_type == onnx.TensorProto.INT8 and len(x.dims) > 1}
    zeros = {x.name: x.data_type for x in graph.initializer}
    into = {zeros[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"}
    assert into == {onnx.TensorProto.UINT8} and len(weights) > 3
    found = certify(model, folder, town)
    assert found.precision == "int8" and 1e-4 < found.raw["memory"][1] < 0.05


def test_fp8_keeps_three_bits_of_what_is_seen(graph, exports):
    """Weights in FP8 are off by at most half of their last digit."""
    marked = onnx.load(exports("fp8") / "model.onnx").graph
    fp8 = {x.name: x for x in marked.initializer if x.data_type == onnx.TensorProto.FLOAT8E4M3FN and len(x.dims) > 1}
    original = {x.name: numpy_helper.to_array(x) for x in graph.graph.initializer}
    scales = {x.name: numpy_helper.to_array(x).astype(np.float64) for x in marked.initializer}
    compared = 0
    for node in marked.node:
        name = node.input[0].removesuffix("_quantized")
        if node.op_type != "DequantizeLinear" or name not in original:
            continue
        wanted, axis = original[name], node.attribute[0].i
        scale = scales[node.input[1]].reshape([-1 if k == axis else 1 for k in range(wanted.ndim)])
        found = numpy_helper.to_array(fp8[node.input[0]]).astype(np.float64) * scale
        # Half a unit of three bits, and of the smallest step; a scale in halves is off by up to 2^-11 too.
        bound = np.abs(wanted) * (2**-4 + 2**-11) + scale * 2**-10
        assert (np.abs(found - wanted) <= bound).all()
        compared += 1
    assert compared > 3


def test_a_relu_before_eight_bits_stays(graph, town):
    """What is optimised says the same as what is not, for every kind of eight bits."""
    import onnxruntime

    moments = record(graph, town)
    for kind in KINDS:
        marked = Quantizer(graph, moments[:4], kind).quantized(
            ["image_encoder.trunk.stages.1", "line_decoder.layers.0"]
        )
        made_by = {name: node.op_type for node in marked.graph.node for name in node.output}
        from_marks = [n for n in marked.graph.node if made_by.get((*n.input, "", "")[1]) == "DequantizeLinear"]
        assert {"Conv", "MatMul"} <= {node.op_type for node in from_marks}
        told = answers(marked, moments[-1:], kind)["new_memory"][0]
        plain = onnxruntime.SessionOptions()
        plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(marked.SerializeToString(), plain, providers=["CPUExecutionProvider"])
        wanted = session.run(["new_memory"], dict(moments[-1]))[0]
        assert np.abs(told - wanted).mean() < 0.01 * wanted.std(), kind


@pytest.mark.parametrize("precision", ["fp16", "int8", "fp8"])
def test_engines_are_built_without_a_gpu(exports, precision, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    folder = Path(shutil.copytree(exports(precision), tmp_path / precision))
    with pytest.raises(ConfigError, match=r"target 'sm12' is not known to tensorrt-rtx; it builds for .*sm89"):
        build_engines(folder, targets=["sm12"])
    engines = build_engines(folder, targets=["sm89"])
    assert engines["sm89"].stat().st_size > 100_000
    contract = read_contract(folder)  # hashes and all
    assert contract["engines"]["sm89"]["package"] == "tensorrt-rtx" and "model.sm89.engine" in contract["sha256"]
    assert contract["layers"]["Conv"].keys() == {"float16"} and contract["layers"]["GridSample"].keys() == {"float"}
    Runtime(folder).run()  # the graph beside it still runs
    engines["sm89"].write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"sm89\.engine is not the file"):
        read_contract(folder)


def test_engines_that_cannot_be_built(folder, monkeypatch):
    with pytest.raises(ConfigError, match="package 'onnx' is not known"):
        build_engines(folder, package="onnx")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ConfigError, match=r"tensorrt is not installed .* pip install tensorrt"):
        build_engines(folder, package="tensorrt")


def test_latency_of_runtimes_that_take_turns(model, folder):
    measured = latency.measure(model, folder, ["pytorch", "ort"], passes=3)
    assert [len(told.passes) for told in measured.values()] == [3, 3]
    rows = latency.table(measured).splitlines()
    assert rows[2].startswith("| pytorch |") and rows[2].endswith("| 1.00 |") and rows[3].startswith("| ort | CPU |")
    told = latency.as_dict(measured)["ort"]
    assert told["p50"] == np.percentile(told["passes"], 50) > told["filling"] > 0
    with pytest.raises(ConfigError, match="backend 'abacus' is not known"):
        latency.measure(model, folder, ["abacus"])


def test_images_are_fitted_as_in_training():
    generator = np.random.default_rng(0)
    sizes = (
        ((90, 160), (40, 80)),
        (RAW, (40, 80)),
        ((30, 50), (40, 80)),
        ((40, 80), (40, 80)),
        ((225, 400), (44, 112)),
    )
    for raw, size in sizes:
        image = generator.integers(0, 256, (*raw, 3), dtype=np.uint8)
        matrix = np.array([[60.0, 0, 50], [0, 61, 30], [0, 0, 1]])
        wanted, wanted_matrix = fit_image(Image.fromarray(image), matrix, size)
        rows, columns, img_from_raw = fitting_matrices(raw, size)
        pixels = torch.from_numpy(image).permute(2, 0, 1).float()[None]
        found = fit_pixels(pixels, rows, columns)
        assert torch.equal(found[0], wanted.float())
        assert (img_from_raw.double().numpy() @ matrix) == pytest.approx(wanted_matrix, abs=1e-4)


def test_step_is_what_the_predictor_says(model, folder, town):
    predictor, runtime = Predictor(model), Runtime(folder, min_score=0.02)
    predictor.min_score = 0.02
    for k, (_, frame) in enumerate(drive(town)):
        if k == 5:
            break
        images = frame.images[0].permute(0, 2, 3, 1).numpy()
        rig = CameraRig(*(tensor[0].numpy() for tensor in frame.rig))
        given = [image if there else None for image, there in zip(images, rig.present, strict=True)]
        one = predictor.step(given, rig, town.ego_pose(k), k * 0.5)
        other = runtime.step(given, rig, town.ego_pose(k), k * 0.5)
        assert len(one.boxes.score) == len(other.boxes.score) > 0
        assert other.boxes.score == pytest.approx(one.boxes.score.numpy(), abs=1e-4)
        assert other.lines.points == pytest.approx(one.lines.points.numpy(), abs=1e-3)
    buffer = runtime.outputs["box_center"]
    runtime.run()
    assert runtime.outputs["box_center"] is buffer  # nothing is made anew


def test_the_runtime_runs_where_torch_cannot_be_imported(folder, town, tmp_path):
    frame = map_tensors(lambda tensor: tensor[:1], town[0].frames)
    rig = {name: getattr(frame.rig, name)[0].numpy() for name in frame.rig._fields}
    np.savez(tmp_path / "frame.npz", images=frame.images[0].permute(0, 2, 3, 1).numpy(), **rig)
    code = f"""
import sys
sys.modules["torch"] = None
import numpy as np
from perception.export.runtime import Runtime
from perception.types import CameraRig
data = np.load({str(tmp_path / "frame.npz")!r})
runtime = Runtime({str(folder)!r})
rig = CameraRig(*(data[name] for name in CameraRig._fields))
scene = runtime.step(data["images"], rig, np.eye(4), 0.0)
assert len(scene.boxes.score) and np.isfinite(scene.lines.points).all()
print(len(scene.boxes.score))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 0


def test_errors_that_can_be_acted_on(model, folder, town, tmp_path):
    runtime = Runtime(folder)
    rig = CameraRig(np.eye(3)[None].repeat(6, 0), np.eye(4)[None].repeat(6, 0), np.ones(6, dtype=bool))
    images = np.zeros((6, *RAW, 3), np.uint8)
    with pytest.raises(DataError, match="5 images were given; the network was exported for 6"):
        runtime.step(images[:5], rig, np.eye(4), 0.0)
    with pytest.raises(DataError, match=r"images\[0\] is 60 x 112 pixels .* exported for 64 x 112"):
        runtime.step(images[:, :60], rig, np.eye(4), 0.0)
    with pytest.raises(ConfigError, match="provider NoProvider is not there; ONNX Runtime has"):
        Runtime(folder, providers=["NoProvider"])
    with pytest.raises(CheckpointError, match=r"contract\.json is missing"):
        Runtime(tmp_path)
    shutil.copytree(folder, tmp_path / "changed")
    (tmp_path / "changed" / "model.onnx").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"is not the file that .* was written for"):
        Runtime(tmp_path / "changed")
    with pytest.raises(ConfigError, match="precision 'int4' is not known"):
        export_onnx(model, tmp_path, precision="int4")
    small = {"image_size": (64, 96), "backbone": FPNConfig(stages=2), "channels": 16, "heads": 2, "bev": (4, 4)}
    with pytest.raises(ConfigError, match="cameras is 4; this BEVFormer was trained with 6"):
        export_onnx(BEVFormer(BEVFormerConfig(**small)), tmp_path, cameras=4)
    with pytest.raises(ConfigError, match="MapTRv2 is not exported"):
        export_onnx(MapTRv2(MapTRv2Config(**small)), tmp_path)
    few = NuScenesDataset(town.roots[0], VERSION, "certificate", image_size=RAW)
    few.__class__ = type("Few", (NuScenesDataset,), {"__len__": lambda self: 7})
    with pytest.raises(DataError, match="has 7 frames of 2 scenes; a certificate needs 40 of 2"):
        certify(model, folder, few)
