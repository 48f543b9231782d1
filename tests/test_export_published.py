"""Exports of published networks compute what the networks compute, MapTRv2's for the cameras of one vehicle."""

import warnings

import numpy as np
import onnx
import pytest
import torch
from conftest import RAW

from perception.cli.export import main
from perception.errors import ConfigError, DataError, PerceptionWarning
from perception.export.contract import ImageInputs, read_contract
from perception.export.export_rig import ExportRig
from perception.export.onnx import DeployedNetwork, _for_rig, example_inputs, export_onnx, trace
from perception.export.parity import certify
from perception.export.quantize import (
    MAX_CHANGE,
)  # fmt: skip
from perception.export.runtime import Runtime
from perception.export.tensorrt import parse_graph
from perception.geometry import rigid_from_yaw
from perception.inference.predictor import Predictor
from perception.models import build_network
from perception.models.bevformer.config import BEVFormerConfig
from perception.models.checkpoint import save_checkpoint
from perception.models.mapqr.config import MapQRConfig
from perception.models.maptr.config import MapTRConfig
from perception.models.maptrv2.config import MapTRv2Config
from perception.models.published.backbone import FPNConfig
from perception.rigs.importers import import_rig
from perception.rigs.rig import Rig
from perception.types import NUSCENES_EGO_FROM_LIDAR


def small_published(network: str):
    """A published network at its smallest size, with random weights that all have an effect."""
    torch.manual_seed(0)
    small = {
        "image_size": RAW, "backbone": FPNConfig(stages=2), "channels": 16, "feed_forward": 24, "heads": 2,
        "encoder_layers": 1, "decoder_layers": 2,
    }  # fmt: skip
    if network == "bevformer":
        config = BEVFormerConfig(**small, bev=(10, 10), rotate_center=(5, 5), queries=15, max_boxes=10)
    elif network == "mapqr":
        small["encoder_layers"] = 2  # the heights of the first layer reach the second
        config = MapQRConfig(**small, bev=(10, 6), lines=6, line_points=5, max_lines=5)
    elif network == "maptr":
        config = MapTRConfig(**small, bev=(10, 6), lines=6, line_points=5, max_lines=5, gkt_kernel=(3, 5))
    else:
        config = MapTRv2Config(**small, bev=(20, 10), lines=6, line_points=5, max_lines=5, one_to_many_queries=0,
                               depth_range=(1.0, 30.0, 1.0), aspp_channels=4)  # fmt: skip
    model = build_network(config)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize(("network", "precisions"), [("maptrv2", ("fp16", "int8")), ("mapqr", ("int8",))])
def test_published_line_networks_in_fewer_bits(network, precisions, small_town, tmp_path):
    """They pass the dialect and the certificate in fp16 and INT8 too, MapTRv2 for one rig."""
    model, fixed, sizes = small_published(network), None, RAW
    if network == "maptrv2":
        fixed, sizes = ExportRig.of_rig(import_rig(small_town.roots[0] / small_town.version, "nuscenes"), RAW)
    images = ImageInputs.of_rig(6, RAW, sizes)
    traced = model if fixed is None else _for_rig(model, fixed, images)
    graph = trace(DeployedNetwork(traced, images).eval(), example_inputs(model, images))
    for precision in precisions:
        folder = export_onnx(
            model, tmp_path / precision, raw_size=sizes, precision=precision, calibration=small_town, graph=graph,
            export_rig=fixed,
        )  # fmt: skip
        contract = read_contract(folder)
        assert all(contract["checked"].values())
        if precision == "fp16":
            assert "float16" in contract["layers"]["MatMul"]
        else:
            report = contract["quantization"]
            assert report["together"] <= MAX_CHANGE and "image_encoder.encoder" in report["groups"]
            assert contract["layers"]["QuantizeLinear"]["int8"] > len(report["groups"])
        found = certify(model, folder, small_town)
        assert found.failures == [] and 0 < found.replays[0].raw["raw_line"][1] < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("network", ["bevformer", "maptr", "maptrv2", "mapqr"])
def test_published_networks_are_exported(network, small_town, tmp_path):
    """They have static shapes, run in single precision, and have or do not have a memory."""
    model = small_published(network)
    rig, fixed, sizes = import_rig(small_town.roots[0] / small_town.version, "nuscenes"), None, None
    if network == "maptrv2":
        fixed, sizes = ExportRig.of_rig(rig, RAW)
    folder = export_onnx(model, tmp_path, raw_size=sizes, export_rig=fixed)
    graph = onnx.load(folder / "model.onnx").graph
    assert "ego_from_lidar" in {value.name for value in graph.input}
    kinds = {v.type.tensor_type.elem_type for v in graph.value_info} | {x.data_type for x in graph.initializer}
    assert onnx.TensorProto.DOUBLE not in kinds
    assert not {node.op_type for node in graph.node} & {"NonZero", "ScatterND", "Loop", "If"}
    found = certify(model, folder, small_town)
    assert found.failures == []
    assert set(found.replays[0].raw) == ({"memory", "raw_box"} if network == "bevformer" else {"raw_line"})
    runtime = Runtime(folder, rig=rig)
    assert len(runtime.objects().boxes.score) == (10 if network == "bevformer" else 0)
    images = {camera.name: np.random.default_rng(0).integers(0, 256, (*RAW, 3), np.uint8) for camera in rig}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PerceptionWarning)  # noise for images, of cameras of random order
        live, original = (made.step(images, np.eye(4), 0.0) for made in (runtime, Predictor(model, rig=rig)))
    np.testing.assert_array_equal(runtime.inputs["ego_from_lidar"], rig.ego_from_lidar.astype(np.float32))
    np.testing.assert_allclose(live.lines.score, original.lines.score, atol=1e-3)
    np.testing.assert_allclose(live.boxes.score, original.boxes.score, atol=1e-3)
    if network == "maptrv2":
        turned = rig.camera_rig()
        turned.ego_from_cam[2] = rigid_from_yaw(0.001) @ turned.ego_from_cam[2]
        with pytest.raises(DataError, match=r"rig.ego_from_cam\[2\] differs by up to .* exported for; export it again"):
            Runtime(folder).step([*images.values()], turned)
        other = Rig(rig.cameras, NUSCENES_EGO_FROM_LIDAR)
        with pytest.raises(ConfigError, match="ego_from_lidar of the rig differs by up to"):
            Runtime(folder, rig=other)
    assert all(read_contract(folder)["checked"].values())  # every runtime reads it as ONNX defines it
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    parse_graph(trt, trt.Builder(logger), logger, folder / "model.onnx", "tensorrt-rtx")


def test_a_rig_is_for_networks_whose_export_holds_the_calibration(tmp_path):
    out = ["--out", str(tmp_path / "out"), "--rig", "nuscenes"]
    with pytest.raises(ConfigError, match="--rig and --raw-size were given; leave --raw-size out"):
        main(["nano", *out, "--raw-size", "90x160"])
    with pytest.raises(ConfigError, match="a BEVTransformer takes any calibration as an input"):
        main(["nano", *out])


@pytest.mark.slow
def test_the_command_exports_maptrv2_for_a_rig(tmp_path):
    """From a rig file to a folder that passes its gates and runs with that rig."""
    torch.manual_seed(0)
    config = MapTRv2Config(
        image_size=RAW, backbone=FPNConfig(stages=2), channels=16, feed_forward=24, heads=2, decoder_layers=1,
        bev=(20, 10), lines=6, line_points=5, max_lines=5, one_to_many_queries=0, depth_range=(1.0, 30.0, 1.0),
        aspp_channels=4,
    )  # fmt: skip
    save_checkpoint(tmp_path / "w.safetensors", build_network(config), {})
    Rig.load("nuscenes").scaled(0.07).save(tmp_path / "rig.yaml")
    main([str(tmp_path / "w.safetensors"), "--out", str(tmp_path / "out"), "--rig", str(tmp_path / "rig.yaml")])
    contract = read_contract(tmp_path / "out")
    assert contract["raw_size"] == [[63, 112]] * 6 and len(contract["calibration"]["img_from_cam"]) == 6
    assert {x["name"]: x["meaning"] for x in contract["inputs"]}["ego_from_cam"].startswith("not read: fixed in the")
    Runtime(tmp_path / "out", rig=Rig.load(tmp_path / "rig.yaml"))
