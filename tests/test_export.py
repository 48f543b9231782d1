"""Exports compute what the network computes, and the gates of the certificate detect faults."""

import copy
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from conftest import MIXED, RAW, broken_export
from onnx import numpy_helper

from perception.cli.export import drawn_size, main, read_sizes
from perception.data.nuscenes import NuScenesDataset
from perception.errors import ConfigError, DataError, run_script
from perception.export import parity
from perception.export.certificate import GATES, Gate
from perception.export.contract import read_contract
from perception.export.export_rig import ExportRig
from perception.export.headroom import Saturation
from perception.export.onnx import export_onnx
from perception.export.parity import certify
from perception.export.replay import frame_inputs, pad_cameras, replay_frames
from perception.models.bevformer.config import BEVFormerConfig
from perception.models.bevformer.model import BEVFormer
from perception.models.checkpoint import save_checkpoint
from perception.models.maptrv2.config import MapTRv2Config
from perception.models.maptrv2.model import MapTRv2
from perception.models.published.backbone import FPNConfig
from perception.rigs.rig import Rig
from perception.synthetic import VERSION, simulate
from perception.synthetic.sensors import EIGHT_CAMERAS


@pytest.fixture(scope="module")
def certificate(small_network, fp32_export, small_town, other_rig_town):
    return certify(small_network, fp32_export, small_town, other_rig=other_rig_town, drift_frames=60)


def test_the_graph_equals_the_network(fp32_export, certificate):
    """The graph keeps its own memory over the dataset and resizes images as Pillow does."""
    assert certificate.failures == []
    for replay in certificate.replays:
        assert replay.frames == 40 and replay.scenes == 2
        assert max(largest for largest, _ in replay.raw.values()) < 1e-3
        assert replay.boxes[0] < 1e-3 and replay.lines[0] < 1e-3
        assert replay.pixels == (0.0, 0.0)
    assert "Gate: **passed**" in certificate.markdown()
    certificate.save(fp32_export)
    assert json.loads((fp32_export / "certificate.json").read_text())["passed"]
    assert "| nds |" in (fp32_export / "certificate.md").read_text()


def test_standard_operators_and_a_contract(fp32_export):
    graph = onnx.load(fp32_export / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert {(o.domain, o.version) for o in graph.opset_import} == {("", 17)}
    modes = {
        a.s for node in graph.graph.node if node.op_type == "GridSample" for a in node.attribute if a.name == "mode"
    }
    assert modes == {b"bilinear"}
    reduced = {node.op_type for node in graph.graph.node if node.op_type.startswith("Reduce") and len(node.input) > 1}
    assert reduced <= {"ReduceSum"}  # its axes are an input since opset 13, which all parsers read
    operators = Counter(node.op_type for node in graph.graph.node)
    # Operators without a static form in TensorRT.
    assert not operators.keys() & {"NonZero", "ScatterND", "ScatterElements", "Loop", "If", "Unique", "Compress"}
    assert all(d.dim_value for x in graph.graph.input for d in x.type.tensor_type.shape.dim)
    shapes = {v.name: v.type.tensor_type.shape.dim for v in onnx.shape_inference.infer_shapes(graph).graph.value_info}
    sampled = [len(shapes[node.input[0]]) for node in graph.graph.node if node.op_type == "GridSample"]
    assert sampled and set(sampled) == {4}
    assert b"/perception/" not in (fp32_export / "model.onnx").read_bytes()  # no paths of the exporting machine
    contract = json.loads((fp32_export / "contract.json").read_text())
    assert [x["name"] for x in contract["inputs"]] == [x.name for x in graph.graph.input]
    assert [x["name"] for x in contract["outputs"]] == [x.name for x in graph.graph.output]
    assert contract["raw_size"] == [list(RAW)] * 6 and contract["cameras"] == 6 and contract["box_classes"][0] == "car"
    images = [x for x in contract["inputs"] if x["dtype"] == "uint8"]
    assert [x["name"] for x in images] == [f"image_{n}" for n in range(6)]
    assert all(x["shape"] == [*RAW, 3] and x["meaning"].startswith("RGB [H, W, 3], 0..255") for x in images)


@pytest.mark.slow
def test_a_mixed_rig_is_certified(small_network, mixed_export, small_town):
    """Cameras of several sizes in NV12; the original network gets the same images in RGB, resized by Pillow."""
    contract = read_contract(mixed_export)
    assert contract["raw_size"] == [list(size) for size in MIXED] and contract["image_format"] == "nv12"
    assert [x["shape"] for x in contract["inputs"][:6]] == [[H * 3 // 2, W] for H, W in MIXED]
    assert "BT.601, luma 16..235" in contract["inputs"][0]["meaning"]
    found = certify(small_network, mixed_export, small_town, drift_frames=4)
    assert found.failures == [] and found.replays[0].pixels == (0.0, 0.0)
    assert max(largest for largest, _ in found.replays[0].raw.values()) < 1e-3


def test_the_gate_sees_a_broken_weight(small_network, fp32_export, small_town, tmp_path):
    def change(graph):
        weight = next(x for x in graph.initializer if "smooth" in x.name and len(x.dims) == 4)
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.02, weight.name))

    found = certify(small_network, broken_export(fp32_export, tmp_path, change), small_town)
    assert any(text.startswith("raw_box differs by") for text in found.failures)
    assert "Gate: **failed**" in found.markdown()


def test_the_gate_sees_numbers_that_are_not_finite(small_network, fp32_export, small_town, tmp_path):
    """An export with NaN outputs fails, and its outputs are not compared."""

    def change(graph):
        weight = next(x for x in graph.initializer if "smooth" in x.name and len(x.dims) == 4)
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(np.inf), weight.name))

    found = certify(small_network, broken_export(fp32_export, tmp_path, change), small_town)
    assert "outputs are not finite in 40 of 40 frames" in found.failures
    assert not found.replays[0].raw and not found.second_reading
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["replays"][0]["not_finite"] == 40


def test_the_gate_sees_a_lost_memory(small_network, fp32_export, small_town, tmp_path, monkeypatch):
    monkeypatch.setattr(
        parity, "frame_inputs", lambda frame, extra: frame_inputs(frame, extra) | {"is_first": np.ones(1, bool)}
    )
    found = certify(small_network, fp32_export, small_town)
    assert any(text.startswith("memory differs by") for text in found.failures)


def test_the_gate_sees_a_wrong_calibration(small_network, fp32_export, small_town, monkeypatch):
    def off(frame, extra):
        matrix = frame.rig.img_from_cam[0].numpy().copy()
        matrix[0, 0, 2] += 0.5  # pixels
        return frame_inputs(frame, extra) | {"img_from_cam": matrix}

    monkeypatch.setattr(parity, "frame_inputs", off)
    assert certify(small_network, fp32_export, small_town).failures


def test_the_gate_sees_other_metrics(certificate):
    first, second = certificate.replays
    off = replace(second, metrics=second.metrics | {"lane_mAP": (0.5, 0.4989)})
    found = replace(certificate, replays=(first, off))
    assert found.failures == ["replay 2: lane_mAP is 0.4989 instead of 0.5000, a difference of more than 0.0005"]
    assert replace(found, precision="fp16").failures == []
    assert replace(found, backend="openvino-bf16").failures == []
    assert replace(found, backend="openvino").failures == found.failures
    off = replace(first, raw={"memory": (0.5, 2e-4), "raw_box": (0.5, 1e-5)})
    assert replace(certificate, replays=(off,), backend="openvino").failures == [
        "memory differs by 2.00e-04 on average, more than 1e-04"
    ]
    assert replace(certificate, drift=(1e-3, 1e-2)).failures == [
        "the memory drifts: it differs by 1.00e-03 at first and by 1.00e-02 at the end"
    ]


def test_fp16(small_network, small_town, exports):
    """Layers with weights are in float16, sampling locations are not, and the outputs stay close."""
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
    found = certify(small_network, folder, small_town)
    assert found.failures == [] and 1e-5 < found.replays[0].boxes[1] < 0.05
    assert all(0 <= peak < 1000 for peak in found.peaks.values()) and not found.saturation


def scaled(network, graph, factor):
    """Returns network and graph with one layer scaled up and the next one, after a ReLU, scaled down: equal outputs."""
    network, graph = copy.deepcopy(network), onnx.ModelProto.FromString(graph.SerializeToString())
    names = {
        "box_decoder.layers.0.to_box.0.weight": factor, "box_decoder.layers.0.to_box.0.bias": factor,
        "box_decoder.layers.0.to_box.2.weight": 1 / factor,
    }  # fmt: skip
    parameters = dict(network.named_parameters())
    for name, by in names.items():
        parameters[name].data *= by
        found = [x for x in graph.graph.initializer if x.name.removeprefix("network.").split("/")[0] == name]
        assert len(found) == 1
        found[0].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(found[0]) * np.float32(by), found[0].name))
    return network, graph


@pytest.mark.slow
def test_float16_overflow_fails_the_certificate(small_network, small_graph, small_town, other_rig_town, tmp_path):
    """If weights fit in float16 and outputs do not, the certificate names the layer."""
    network, graph = scaled(small_network, small_graph, 2.0**15)
    folder = export_onnx(network, tmp_path, raw_size=RAW, precision="fp16", graph=graph)
    found = certify(network, folder, small_town, other_rig=other_rig_town)
    named = [text for text in found.failures if text.startswith("values above 32752, half of the largest float16")]
    assert len(named) == 1 and "box_decoder.layers.0.to_box.0 (" in named[0]
    high = {name for name, peak in found.peaks.items() if peak > 32752}
    assert 1 <= len(high) <= 2  # the product, and the sum with its bias
    rows = found.markdown().splitlines()
    assert any(row.startswith("| box_decoder.layers.0.to_box.0 (") for row in rows)


def test_a_weight_that_is_too_large_for_float16(small_network, small_graph, small_town, tmp_path):
    network, _ = scaled(small_network, small_graph, 2.0**22)
    message = (
        r"weight box_decoder.layers.0.to_box.0.weight holds \S+, but the largest float16 is 65504; use precision fp32"
    )
    for precision in ("fp16", "int8", "fp8"):
        with pytest.raises(ConfigError, match=message):
            export_onnx(network, tmp_path, raw_size=RAW, precision=precision, calibration=small_town)
    # A weight that a folded batch norm makes too large is found before quantization, which would fail on this dataset.
    graph = onnx.ModelProto.FromString(small_graph.SerializeToString())
    weight = next(x for x in graph.graph.initializer if x.name == "network.image_encoder.smooth.0.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1e6, weight.name))
    with pytest.raises(ConfigError, match=r"weight network\.image_encoder\.smooth\.0\.weight holds"):
        export_onnx(small_network, tmp_path, raw_size=RAW, precision="int8", calibration=few(small_town), graph=graph)
    assert not list(tmp_path.iterdir())


def few(town):
    """Returns the same dataset with a length of 7 frames."""
    dataset = NuScenesDataset(town.roots[0], VERSION, "certificate", image_size=RAW)
    dataset.__class__ = type("Few", (NuScenesDataset,), {"__len__": lambda self: 7})
    return dataset


def test_the_gate_sees_overflow_and_saturation(certificate):
    peaks = {"one (a)": 32752.0, "two (b)": 32753.0, "three (c)": float("nan"), "four (d)": 1e6, "five (e)": 1e6}
    assert replace(certificate, peaks=peaks).failures == [
        "values above 32752, half of the largest float16: two (b) 32753, three (c) nan, four (d) 1000000 and 1 more"
    ]
    saturation = {"one (a)": Saturation(0.01, 1.0, 50.0), "two (b)": Saturation(0.011, 0.011, 1.5)}
    found = replace(certificate, saturation=saturation)
    assert found.failures == ["more than 1 % of values are outside their range: two (b) 1.10 %"]
    assert "| two (b) | 1.100 % | 1.100 % | 1.50 |" in found.markdown()
    assert json.loads(json.dumps(found.as_dict()))["saturation"]["one (a)"]["worst"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("cameras", [5, 8])
def test_other_numbers_of_cameras(small_network, small_town, other_rig_town, tmp_path, cameras):
    """Exports with five and with eight camera inputs, certified with rigs of five and of six cameras."""
    town = other_rig_town
    if cameras == 8:
        simulate(tmp_path / "eight", scenes=2, seed=9, keyframes=20, split="eight", image_size=RAW, rig=EIGHT_CAMERAS)
        names = [camera.name for camera in EIGHT_CAMERAS]
        town = NuScenesDataset(tmp_path / "eight", VERSION, "eight", image_size=RAW, cameras=names)
    folder = export_onnx(small_network, tmp_path / "export", cameras=cameras, raw_size=RAW)
    found = certify(small_network, folder, small_town, other_rig=town)
    assert found.failures == []
    first, second = found.replays
    assert first.cameras == min(6, cameras) and second.cameras == cameras and not first.bad_images
    assert second.focal_lengths[0] != pytest.approx(first.focal_lengths[0], rel=0.1)
    assert f"{cameras} cameras, focal lengths in image widths: " in found.markdown()


@pytest.mark.slow
def test_the_command(small_network, small_town, tmp_path, monkeypatch, capsys):
    """Exports and certifies with another rig than the dataset's; a failure gives exit code 2 and the reason."""
    checkpoint, out = tmp_path / "small.safetensors", tmp_path / "export"
    save_checkpoint(checkpoint, small_network, {})
    sizes = tmp_path / "sizes.yaml"

    def export(*arguments) -> int:
        command = [checkpoint, "--out", out, "--raw-size", f"{RAW[0]}x{RAW[1]}", *arguments]
        try:
            run_script(lambda: main(list(map(str, command))))
        except SystemExit as stop:
            return stop.code
        return 0

    for arguments, message in (
        (("--raw-size", "64"), "--raw-size: '64' is not HEIGHTxWIDTH"),
        (("--raw-size", "90x160"), "2 raw sizes were given for 6 cameras; give one for all, or one for each"),
        (
            ("--cameras", "2", "--raw-size", "0x8"),
            "the raw size of camera 1 is 0x8; give height and width from 1 to 16",
        ),
        (("--cameras", "2", "--raw-size", "5x8", "--image-format", "nv12"), "camera 1 is 5x8; nv12 needs even numbers"),
        (("--split", "certificate"), "--dataroot, --version and --split go together"),
        (("--format", "tensorrt", "--target", "cpu"), "leave it out with --target cpu"),
        (("--drift", "-1"), "argument --drift: -1 is out of range; give a whole number of at least 0"),
        (("--cameras", "0"), "cameras"),
        (("--target", "cpu", "--precision", "fp16"), "precision fp16 is slow on CPUs"),
        (("--out", checkpoint), f"--out {checkpoint} is a file; give a folder"),
        (("--also", "openvino-bf16", "--precision", "fp16"), "openvino"),
    ):
        assert export(*arguments) == 2 and message in capsys.readouterr().err
    for content, message in (
        (None, f"--raw-size {sizes} is missing"),
        ("front: [", f"--raw-size {sizes} cannot be read (while parsing a flow"),
        ("90x160", f"--raw-size {sizes} holds no sizes; write one HEIGHTxWIDTH per camera"),
        ("front: wide", f"{sizes}: 'wide' is not HEIGHTxWIDTH"),
    ):
        if content is not None:
            sizes.write_text(content)
        with pytest.raises(ConfigError) as error:
            read_sizes([str(sizes)])
        assert message in str(error.value) and "\n" not in str(error.value)
    for content in ("front: 90x160\nback: 64x112\n", "- 90X160\n- 64x112\n"):
        sizes.write_text(content)
        assert read_sizes([str(sizes)]) == [(90, 160), (64, 112)]
    assert drawn_size((2160, 3840)) == (900, 1600) and drawn_size((90, 160)) == (90, 160)
    town = ("--dataroot", small_town.roots[0], "--version", VERSION, "--split", "certificate")
    for calibration in ((), ("--calibration-split", "certificate")):
        assert export(*town, "--precision", "int8", *calibration) == 2
        assert "give --calibration-split a split other than --split" in capsys.readouterr().err
    assert not out.exists()

    monkeypatch.setitem(GATES, "fp32", Gate(1e-12, None, 0.0005, 0.0005))
    others = ("--raw-size", "90x160", "--raw-size", "40x80", "--raw-size", "64x112", "--image-format", "bgr-chw")
    out.mkdir()
    (out / "certificate.openvino.json").write_text("of an older graph")
    assert export(*town, "--cameras", "4", *others) == 2
    contract = read_contract(out)
    assert contract["raw_size"] == [list(RAW), [90, 160], [40, 80], list(RAW)]
    assert [x["shape"] for x in contract["inputs"][:3]] == [[3, *RAW], [3, 90, 160], [3, 40, 80]]
    printed = capsys.readouterr()
    assert f"error: {out} must not be used: onnxruntime: " in printed.err and "Gate: **failed**" in printed.out
    for text in (
        "tracing the network: ",
        f"export to {out}: ",
        "certificate: 100%",
        "certificate of onnxruntime: ",
        "metrics of both: ",
    ):
        assert text in printed.err
    certificate = json.loads((out / "certificate.json").read_text())
    assert not certificate["passed"] and all("more than 1e-12" in failure for failure in certificate["failures"])
    assert {path.name for path in out.iterdir()} == {
        "model.onnx", "contract.json", "certificate.json", "certificate.md",
    }  # fmt: skip


def test_unused_camera_inputs_change_nothing(small_network, small_town):
    """Frames for exports with more camera inputs than the dataset has cameras."""
    _, frame = next(replay_frames(small_town, 6))
    frame = frame._replace(images=frame.images[..., : small_network.config.image_size[0], :80])
    more = pad_cameras(frame, 8)
    assert more.images.shape[1] == 8 and more.rig.present.tolist() == [[True] * 6 + [False] * 2]
    with torch.inference_mode():
        (one, _), (other, _) = (small_network(x, small_network.initial_state(1)) for x in (frame, more))
    torch.testing.assert_close(other.box_params, one.box_params, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other.line_points, one.line_points, rtol=1e-5, atol=1e-5)
    fewer = pad_cameras(frame, 4)
    assert torch.equal(fewer.images, frame.images[:, :4])
    assert torch.equal(fewer.rig.ego_from_cam, frame.rig.ego_from_cam[:, :4])


def test_what_cannot_be_exported(small_network, small_graph, fp32_export, small_town, tmp_path):
    with pytest.raises(ConfigError, match="precision 'int4' is not known"):
        export_onnx(small_network, tmp_path, precision="int4")
    small = {"image_size": (64, 96), "backbone": FPNConfig(stages=2), "channels": 16, "heads": 2, "bev": (4, 4)}
    with pytest.raises(ConfigError, match="cameras is 4; this BEVFormer was trained with 6"):
        export_onnx(BEVFormer(BEVFormerConfig(**small)), tmp_path, cameras=4)
    with pytest.raises(ConfigError, match="MapTRv2 is exported for the cameras of one vehicle"):
        export_onnx(MapTRv2(MapTRv2Config(**small)), tmp_path)
    fixed, _ = ExportRig.of_rig(Rig.load("nuscenes"), (64, 96))
    with pytest.raises(ConfigError, match="a BEVFormer takes any calibration"):
        export_onnx(BEVFormer(BEVFormerConfig(**small)), tmp_path, export_rig=fixed)
    short = few(small_town)
    with pytest.raises(DataError, match="has 7 frames of 2 scenes; give at least 40 frames of 2 scenes"):
        certify(small_network, fp32_export, short)
    with pytest.raises(DataError, match="the dataset for calibration has 7 frames; give at least 28"):
        export_onnx(small_network, tmp_path, raw_size=RAW, precision="int8", calibration=short, graph=small_graph)
