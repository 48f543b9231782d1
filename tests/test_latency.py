"""Latency of runtimes that take turns: rejected arguments, time limit, and interruption."""

import importlib.util
import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from perception.cli.benchmark import main
from perception.errors import ConfigError, run_script
from perception.export import latency
from perception.export.latency import Interrupted, check_request, largest_difference, measure
from perception.models.bev_transformer.model import BEVTransformer
from perception.models.checkpoint import save_checkpoint

BOUNDS = {"passes": 3, "threads": 0, "max_seconds": 60.0}
needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")


@pytest.mark.slow
def test_runtimes_take_turns(small_network, fp32_export, capsys):
    threads = torch.get_num_threads()
    measured = measure(small_network, fp32_export, ["pytorch", "ort"], passes=3, threads=threads + 1, progress=True)
    assert torch.get_num_threads() == threads
    assert [len(result.passes) for result in measured.values()] == [3, 3]
    rows = latency.table(measured).splitlines()
    assert rows[2].startswith(f"| pytorch | {threads + 1} CPU threads |") and rows[2].endswith("| 1.00 | 0.0e+00 | 0 |")
    assert rows[3].startswith("| ort | CPU |")
    ort = latency.as_dict(measured)["ort"]
    assert ort["p50"] == np.percentile(ort["passes"], 50) > ort["filling"] > 0
    assert 0 < ort["largest"] < 1e-3 and 0 < ort["changed"] < 1e-4
    shown = capsys.readouterr().err
    assert "preparing ort" in shown and "passes of all runtimes: 100%" in shown


@pytest.mark.slow
@needs_openvino
def test_openvino_takes_its_turn(small_network, fp32_export):
    measured = measure(small_network, fp32_export, ["ort", "openvino"], passes=1)
    assert measured["openvino"].device == "CPU" and 0 < measured["openvino"].largest < 1e-3


def test_differences_do_not_depend_on_the_order():
    generator = np.random.default_rng(0)
    wanted = {"raw_box_logits": generator.normal(size=(5, 3)), "raw_box_params": 100 * generator.normal(size=(5, 4))}
    found = {name: values[::-1].copy() for name, values in wanted.items()}
    assert largest_difference(wanted, found) == 0
    wanted["raw_box_params"][1, 2], found["raw_box_params"][3, 2] = 50.0, 51.0
    assert largest_difference(wanted, found) == pytest.approx(1 / 50)
    assert largest_difference({"new_memory": np.zeros(3)}, {"new_memory": np.full(3, 0.5)}) == 0.5


def test_time_is_bounded_and_ctrl_c_keeps_the_measurements(small_network, fp32_export, monkeypatch):
    measured = measure(small_network, fp32_export, ["ort"], passes=10**6, max_seconds=1e-6)
    assert len(measured["ort"].passes) == 1
    timed, calls = latency._timed, []

    def interrupted(run):
        calls.append(run)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return timed(run)

    monkeypatch.setattr(latency, "_timed", interrupted)
    with pytest.raises(Interrupted) as stop:
        measure(small_network, fp32_export, ["pytorch", "ort"], passes=10)
    assert [len(result.passes) for result in stop.value.measured.values()] == [2, 2]  # the third turn was not complete
    calls[:] = [None] * 5
    with pytest.raises(KeyboardInterrupt) as stop:
        measure(small_network, fp32_export, ["pytorch", "ort"], passes=10)
    assert not isinstance(stop.value, Interrupted)


@pytest.mark.parametrize(
    ("backends", "changes", "message"),
    [
        (["ort", "abacus"], {}, "backend 'abacus' is not known; use some of pytorch, compile, ort, openvino"),
        (["ort", "ort"], {}, "backends are ort, ort; name at least one, and each once"),
        ([], {}, "backends are missing"),
        (["ort"], {"passes": 0}, "passes is 0; give at least 1"),
        (["ort"], {"threads": -1}, "threads is -1; give at least 0"),
        (["ort"], {"max_seconds": 0.0}, "max_seconds is 0.0; give a number above 0"),
        (["ort"], {"max_seconds": float("nan")}, "max_seconds is nan"),
        (["tensorrt"], {}, "holds no engine; build one with"),
    ],
)
def test_invalid_arguments_are_named(small_network, fp32_export, backends, changes, message):
    with pytest.raises(ConfigError, match=message):
        check_request(small_network, fp32_export, backends, **(BOUNDS | changes))


def test_missing_runtimes_are_named(small_network, fp32_export, exports, monkeypatch):
    with pytest.raises(ConfigError, match="tensorrt runs an engine; give the folder of an export that holds one"):
        check_request(small_network, None, ["tensorrt"], **BOUNDS)
    other = BEVTransformer(replace(small_network.config, image_size=(48, 80)))
    with pytest.raises(
        ConfigError, match=r"BEVTransformer for images of 40 x 80, the checkpoint is a BEVTransformer for"
    ):
        check_request(other, fp32_export, ["ort"], **BOUNDS)
    for module, backend in (("onnxruntime", "ort"), ("openvino", "openvino")):
        with monkeypatch.context() as absent:
            absent.setitem(sys.modules, module, None)
            with pytest.raises(ConfigError, match=f"{module} .*pip install {module}"):
                check_request(small_network, None, [backend], **BOUNDS)


def test_the_command(small_network, fp32_export, tmp_path, monkeypatch, capsys):
    checkpoint, out = tmp_path / "small.safetensors", tmp_path / "latency.json"
    save_checkpoint(checkpoint, small_network, {})

    def run(*arguments) -> int:
        command = ["latency", checkpoint, "--export", fp32_export, "--backends", "ort", *arguments]
        with pytest.raises(SystemExit) as stop:
            run_script(lambda: main(list(map(str, command))))
        return stop.value.code

    with monkeypatch.context() as before:
        before.setattr("perception.export.onnx.trace", None)  # rejected before any work
        before.setattr("perception.export.latency.measure", None)
        for arguments, message in (
            (("--backends", "abacus"), "backend 'abacus' is not known"),
            (("--passes", "0"), "argument --passes: 0 is out of range"),
            (("--json", tmp_path), f"--json {tmp_path} is a folder; give a file"),
            (("--export", tmp_path), "contract.json is missing"),
        ):
            assert run(*arguments) == 2 and message in capsys.readouterr().err
    assert run("--passes", "2", "--json", out) == 0
    assert capsys.readouterr().out.splitlines()[2].startswith("| ort |")
    assert len(json.loads(out.read_text())["ort"]["passes"]) == 2
    out.unlink()
    assert run("--max-seconds", "0.001", "--json", out) == 0
    assert "stopped after 0.001 s: 1 of 30 passes" in capsys.readouterr().err and out.exists()
    out.unlink()

    timed, calls = latency._timed, []

    def interrupted(run):
        calls.append(run)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return timed(run)

    monkeypatch.setattr(latency, "_timed", interrupted)
    assert run("--json", out) == 130
    printed = capsys.readouterr()
    assert printed.out.splitlines()[2].startswith("| ort |") and printed.err.endswith("interrupted\n")
    assert not out.exists()


@pytest.mark.slow
def test_compilers_are_checked_first(small_network, monkeypatch):
    check_request(small_network, None, ["compile"], **BOUNDS)
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: shutil.copy("/nowhere", "/nowhere"))
    with pytest.raises(ConfigError, match=r"backend compile finds no working compiler: .*nowhere"):
        check_request(small_network, None, ["compile"], **BOUNDS)
