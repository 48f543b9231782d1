"""Roofline and scaling: operations and bytes against closed forms, parts against the whole, tables, plots, refusals."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from perception.benchmark import machine, roofline, scaling
from perception.benchmark.frames import example_frame, warm_state
from perception.benchmark.machine import Peaks, measure_peaks
from perception.benchmark.roofline import Cost, PartCounter, count_costs
from perception.cli.benchmark import main
from perception.engine.dry_run import forward_gflops
from perception.errors import run_script
from perception.models.bev_transformer.config import BEVTransformerConfig
from perception.models.checkpoint import save_checkpoint

CPU = torch.device("cpu")
PEAKS = Peaks({"fp32": 100.0, "bf16": 200.0}, {"fp32": 90.0, "bf16": 250.0}, 10.0)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(machine, "SECONDS", 0.0)
    monkeypatch.setattr(machine, "GEMM_SIDE", {"cpu": 64})
    monkeypatch.setattr(machine, "CONVOLUTION", {"cpu": (1, 8, 16, 16)})
    monkeypatch.setattr(machine, "COPIED_BYTES", {"cpu": 2**20})


def test_operations_and_bytes_follow_closed_forms():
    conv, linear = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Linear(16, 4)
    images, rows = torch.randn(2, 3, 10, 12), torch.randn(5, 16)
    with torch.inference_mode(), PartCounter({"conv": conv, "linear": linear}).attached() as counter:
        conv(images)
        linear(rows)
        rows.t()[:2].unsqueeze(0) + 1  # views move nothing
    costs = counter.costs
    assert costs["conv"].flop == 2 * (2 * 8 * 10 * 12) * (3 * 9)
    assert costs["conv"].bytes == 4 * (2 * 3 * 120 + 8 * 27 + 2 * 8 * 120)
    assert costs["linear"].flop == 2 * 5 * 16 * 4
    assert costs["linear"].bytes == 4 * (5 * 16 + 16 * 4 + 4 + 5 * 4)
    assert costs["rest"].flop == 0 and costs["rest"].bytes == 4 * (2 * 5 + 2 * 5)
    assert not conv._forward_hooks and not conv._forward_pre_hooks


def test_parts_add_up_to_the_whole(small_network):
    frame = example_frame(small_network, CPU)
    state = warm_state(small_network, frame)
    costs = count_costs(small_network, frame, state)
    gflops = sum(cost.flop for cost in costs.values()) / 1e9
    assert gflops == pytest.approx(forward_gflops(small_network, frame), rel=1e-4)  # which leaves out the decoding
    backbone, encoder = costs["image_encoder.backbone"], costs["image_encoder"]
    assert backbone.flop > encoder.flop > 0  # the backbone is not counted twice
    roofline.time_pass(small_network, frame, state, costs)
    assert all(cost.shortest > 0 for cost in costs.values())
    assert not any(module._forward_hooks for module in small_network.modules())


def test_parts_are_bound_by_memory_or_arithmetic():
    assert Cost(flop=1e9, bytes=1e9).limit(PEAKS, "fp32") == (pytest.approx(0.1), "memory")
    assert Cost(flop=5e10, bytes=1e9).limit(PEAKS, "fp32") == (pytest.approx(0.5), "arithmetic")
    assert Cost(flop=5e10, bytes=1e9).limit(PEAKS, "bf16") == (pytest.approx(0.2), "arithmetic")


@pytest.mark.usefixtures("quick")
def test_peaks_are_positive():
    peaks = measure_peaks(CPU)
    assert peaks.gemm.keys() == peaks.convolution.keys() == {"fp32", "bf16"}
    assert min(*peaks.gemm.values(), *peaks.convolution.values(), peaks.bandwidth) > 0
    assert peaks.gflops("fp32") == max(peaks.gemm["fp32"], peaks.convolution["fp32"])


@pytest.mark.usefixtures("quick")
def test_the_roofline_command(small_network, tmp_path, monkeypatch, capsys):
    weights, out, plot = (str(tmp_path / name) for name in ("small.safetensors", "roof.json", "roof.png"))
    save_checkpoint(weights, small_network, {})
    main(["roofline", "--models", weights, "--passes", "2", "--threads", "1", "--json", out, "--plot", plot])
    content = json.loads(Path(out).read_text())
    rows = content["models"][weights]["fp32"]
    parts = [row for name, row in rows.items() if name != "all"]
    for key in ("gflop", "megabytes", "limit_ms"):
        assert sum(row[key] for row in parts) == pytest.approx(rows["all"][key])
    assert 0 < sum(row["ms"] for row in parts) <= rows["all"]["ms"] * 1.001  # each of its fastest pass
    assert (
        content["models"][weights]["bf16"]["image_encoder.backbone"]["megabytes"]
        < (rows["image_encoder.backbone"]["megabytes"])
    )
    printed = capsys.readouterr().out
    assert "| peaks | GEMM" in printed and "| image_encoder.backbone | " in printed and printed.count("| all |") == 2
    assert Image.open(plot).size > (300, 300)

    def run(*arguments) -> int:
        with pytest.raises(SystemExit) as stop:
            run_script(lambda: main(list(arguments)))
        return stop.value.code

    monkeypatch.setattr(roofline, "measure_peaks", None)  # refused before any work
    for arguments, message in (
        (("roofline", "--models", "huge"), "model preset is 'huge'"),
        (("roofline", "--precisions", "fp8"), "--precisions: 'fp8' is not known; use some of fp32, bf16"),
        (("roofline", "--device", "tpu"), "device 'tpu' is not available; use one of cpu"),
        (("scaling", "--models", "bevformer_tiny"), "--models: 'bevformer_tiny' is not a preset of the flagship"),
        (("scaling", "--axes", "lanes"), "--axes: 'lanes' is not known; use some of cameras, image"),
        (("scaling", "--precision", "fp8"), "--precision is 'fp8'; use one of fp32, bf16"),
    ):
        assert run(*arguments) == 2 and message in capsys.readouterr().err
    monkeypatch.setattr("perception.inference.acceleration.cpu_has_bfloat16", lambda: False)
    for command in (("roofline", "--precisions", "bf16"), ("scaling", "--precision", "bf16")):
        assert run(*command) == 2 and "precision bfloat16 is slow on this CPU" in capsys.readouterr().err
    assert not roofline._has("bf16", CPU) and roofline._has("fp32", CPU)


def test_sizes_change_one_thing_at_a_time():
    config = BEVTransformerConfig.nano()
    assert [size.value for size in scaling.sizes(config, "queries")] == [35, 70, 140, 280]
    small = scaling.sizes(replace(config, image_size=(64, 96)), "image")
    assert [(size.config.image_size, size.is_default) for size in small] == [
        ((32, 64), False), ((64, 96), True), ((96, 128), False),
    ]  # fmt: skip
    for axis in scaling.AXES:
        found = scaling.sizes(config, axis)
        (default,) = [size for size in found if size.is_default]
        assert (default.config, default.cameras, default.batch) == (config, 6, 1)
        assert [size.value for size in found] == sorted({size.value for size in found})
        fields = {"image": ["image_size"], "grid": ["grid"], "queries": ["box_queries", "line_queries"]}.get(axis, [])
        for size in found:
            assert replace(size.config, **{name: getattr(config, name) for name in fields}) == config


def test_the_scaling_command(small_network, tmp_path, monkeypatch, capsys):
    config = replace(small_network.config, image_size=(64, 96), grid=(16, 16))
    monkeypatch.setattr(BEVTransformerConfig, "nano", lambda: config)
    out, plot = tmp_path / "scaling.json", tmp_path / "scaling.png"
    command = ["scaling", "--models", "nano", "--axes", "cameras", "batch", "grid", "--passes", "2", "--threads", "1"]
    main([*command, "--json", str(out), "--plot", str(plot)])
    axes = json.loads(out.read_text())["models"]["nano"]
    assert list(axes) == ["cameras", "batch", "grid"]
    for rows in axes.values():
        assert [row["ratio"] for row in rows if row["default"]] == [1.0]
        assert all(row["ms"] > 0 and len(row["passes_ms"]) == 2 for row in rows)
    assert axes["batch"][2]["gflop"] == pytest.approx(4 * axes["batch"][0]["gflop"], rel=1e-3)
    flop = {row["value"]: row["gflop"] for row in axes["cameras"]}
    assert flop[4] - flop[2] == pytest.approx(2 * (flop[2] - flop[1]), rel=1e-3)  # the rest does not depend on cameras
    assert axes["grid"][-1]["gflop"] > axes["grid"][0]["gflop"]
    assert "| frames in a batch, " in capsys.readouterr().out
    assert Image.open(plot).size > (300, 200)
