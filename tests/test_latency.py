"""Latency of backends that take turns: refused arguments, exports, time limit, interruption, accuracy, CPUs."""

import importlib.util
import json
import os
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import noisy

from perception.benchmark import backends, deployed, latency
from perception.benchmark.backends import images_of, make_exports
from perception.benchmark.latency import (
    Interrupted,
    Latency,
    Measured,
    check_request,
    largest_difference,
    measure,
    measure_models,
)
from perception.benchmark.machine import cpu_name, limited
from perception.cli.benchmark import main
from perception.errors import CheckpointError, ConfigError, run_script
from perception.export.contract import read_contract
from perception.models.bev_transformer.model import BEVTransformer
from perception.models.checkpoint import save_checkpoint

needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")


@pytest.fixture
def weights(small_network, tmp_path) -> str:
    save_checkpoint(tmp_path / "small.safetensors", small_network, {})
    return str(tmp_path / "small.safetensors")


@pytest.fixture
def stored(fp32_export, tmp_path):
    """A folder that holds the export of the small network, as `--exports` takes it."""
    shutil.copytree(fp32_export, tmp_path / "exports" / "small-fp32")
    return tmp_path / "exports"


def measured_as(passes, metrics=None, largest=0.0) -> Latency:
    return Latency(tuple(passes), tuple(passes), 1.0, "CPU", largest, 0.0, metrics)


def test_backends_take_turns(small_network, fp32_export, capsys):
    measured = measure(small_network, ["pytorch", "bf16", "ort"], {"fp32": fp32_export}, passes=3, progress=True)
    assert list(measured.backends) == ["baseline", "pytorch", "bf16", "ort"] and not measured.failures
    assert {len(found.passes) for found in measured.backends.values()} == {3}
    first, plain, half, ort = measured.backends.values()
    assert first.largest == first.changed == 0
    assert 0 < plain.largest < 1e-3 and 0 < ort.largest < 1e-3  # folding and other kernels round differently
    assert 1e-4 < half.changed < 0.1 and half.changed > 10 * max(plain.changed, ort.changed)
    assert all(found.percentile(50) > 0 and min(found.cpu_seconds) > 0 for found in measured.backends.values())
    shown = capsys.readouterr().err
    assert "preparing ort" in shown and "passes of all backends: 100%" in shown


def test_ratios_are_medians_of_pairs():
    first, other = measured_as([1.0, 10.0, 3.0]), measured_as([0.5, 2.0, 3.0])
    assert other.speedup(first)[1] == 2.0 and other.speedup(first)[0] < 2.0 < other.speedup(first)[2]
    assert other.cpu_speedup(first) == 2.0  # the ratio of medians is 1.5


def test_the_best_backend_is_accurate():
    metrics = {"nds": 0.5, "lane_mAP": 0.8}
    found = {
        "baseline": measured_as([1.0], metrics),
        "ort": measured_as([0.5], {"nds": 0.5019, "lane_mAP": 0.8}),
        "bf16": measured_as([0.25], {"nds": 0.5, "lane_mAP": 0.796}),
        "ort-int8": measured_as([0.4], {"nds": 0.491, "lane_mAP": 0.8}),
        "openvino-int8": measured_as([0.2], {"nds": 0.4899, "lane_mAP": 0.8}),
    }
    measured = Measured(found, {"compile": "no compiler"})
    text = latency.table("m", measured)
    assert measured.best() == "ort-int8" and not measured.within_limits("bf16")
    lines = text.splitlines()
    assert lines[2].startswith("| baseline | 1000.0 |") and "| 0.5000 | 0.8000 |" in lines[2]
    assert "| 4.00 (4.00 to 4.00) | 4.00 | +0.0000 | -0.0040 |" in lines[4]
    assert "- not measured: compile: no compiler" in lines
    assert "- not accurate: bf16: more than 0.002 NDS or 0.003 lane mAP from the baseline" in lines
    assert "- not accurate: openvino-int8: more than 0.01 NDS or 0.01 lane mAP from the baseline" in lines
    assert lines[-1] == "m: best is ort-int8, 2.5 times as fast as the baseline (400 ms instead of 1000)"
    slow = Measured({"baseline": found["baseline"], "ort": measured_as([2.0])}, {})
    assert latency.sentence("m", slow) == "m: no backend is faster than the baseline"


def test_a_backend_that_fails_is_left_out(small_network, fp32_export, monkeypatch):
    made = backends.make_runner

    def make(name, *arguments):
        if name == "ort":
            raise RuntimeError("out of order")
        return made(name, *arguments)

    monkeypatch.setattr(latency, "make_runner", make)
    measured = measure(small_network, ["ort", "pytorch"], {"fp32": fp32_export}, passes=1)
    assert list(measured.backends) == ["baseline", "pytorch"]
    assert measured.failures == {"ort": "RuntimeError: out of order"}


def test_an_export_of_other_weights_is_not_measured(small_network, fp32_export):
    torch.manual_seed(4)
    other = noisy(BEVTransformer, small_network.config)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    measured = measure(other, ["ort"], {"fp32": fp32_export}, passes=1)
    assert list(measured.backends) == ["baseline"]
    assert measured.failures["ort"] == f"ConfigError: {fp32_export} is an export of other weights; delete it"


@pytest.mark.slow
@needs_openvino
def test_int8_of_random_weights_has_all_layers_in_eight_bits(small_network, tmp_path):
    names = ["ort-int8", "openvino-int8", "openvino"]
    images = images_of(small_network, tmp_path, "small", names)
    made = make_exports(small_network, tmp_path, "small", names, images, None)
    quantization = read_contract(made["int8"])["quantization"]
    assert sum(quantization["work"][group] for group in quantization["groups"]) == pytest.approx(1)
    measured = measure(small_network, names, made, passes=1)
    assert not measured.failures
    assert 0 < measured.backends["openvino"].largest < 1e-3
    assert all(1e-3 < measured.backends[name].changed < 1 for name in names[:2])


def test_differences_do_not_depend_on_the_order():
    generator = np.random.default_rng(0)
    wanted = {"raw_box_logits": generator.normal(size=(5, 3)), "raw_box_params": 100 * generator.normal(size=(5, 4))}
    found = {name: values[::-1].copy() for name, values in wanted.items()}
    assert largest_difference(wanted, found) == 0
    wanted["raw_box_params"][1, 2], found["raw_box_params"][3, 2] = 50.0, 51.0
    assert largest_difference(wanted, found) == pytest.approx(1 / 50)
    assert largest_difference({"new_memory": np.zeros(3)}, {"new_memory": np.full(3, 0.5)}) == 0.5


def test_time_is_bounded_and_ctrl_c_keeps_the_measurements(small_network, monkeypatch):
    monkeypatch.setattr(latency.Recorder, "attempt", lambda self, name, limit, call, *arguments: call(*arguments))
    measured = measure(small_network, [], {}, passes=10**6, max_seconds=1e-6)
    assert len(measured.backends["baseline"].passes) == 1
    timed, calls = latency._timed, []

    def interrupted(runner, inputs):
        calls.append(runner)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return timed(runner, inputs)

    monkeypatch.setattr(latency, "_timed", interrupted)
    with pytest.raises(Interrupted) as stop:
        measure(small_network, ["pytorch"], {}, passes=10)
    found = stop.value.measured.backends
    assert [len(result.passes) for result in found.values()] == [2, 2]  # the third turn was not complete
    calls[:] = [None] * 5
    with pytest.raises(KeyboardInterrupt) as stop:
        measure(small_network, ["pytorch"], {}, passes=10)
    assert not isinstance(stop.value, Interrupted)


@pytest.mark.parametrize(
    ("models", "names", "changes", "message"),
    [
        (["nano"], ["ort", "abacus"], {}, "backend 'abacus' is not known; use some of baseline, pytorch, bf16"),
        (["nano"], ["ort", "ort"], {}, "backends are ort, ort; name at least one, and each once"),
        (["nano"], [], {}, "backends are missing"),
        (["nano", "nano"], ["ort"], {}, "models are nano, nano; name at least one, and each once"),
        (["huge"], ["ort"], {}, "model preset is 'huge'"),
        (["nano"], ["ort"], {"passes": 0}, "passes is 0; give at least 1"),
        (["nano"], ["ort"], {"scenes": -1}, "scenes is -1; give at least 0"),
        (["nano"], ["ort"], {"max_seconds": 0.0}, "max_seconds is 0.0; give a number above 0"),
        (["nano"], ["ort"], {"max_seconds": float("nan")}, "max_seconds is nan"),
        (["nano"], ["tensorrt"], {}, "backend tensorrt runs an engine; write one to --exports DIR"),
    ],
)
def test_invalid_arguments_are_named(models, names, changes, message):
    with pytest.raises(ConfigError, match=message):
        check_request(models, names, **changes)


def test_exports_of_other_networks_are_refused(small_network, weights, stored, tmp_path, monkeypatch):
    check_request([weights], ["ort"], stored)
    with pytest.raises(ConfigError, match="holds no engine; build one with"):
        check_request([weights], ["tensorrt"], stored)
    other = tmp_path / "other" / "small.safetensors"
    save_checkpoint(other, BEVTransformer(replace(small_network.config, image_size=(48, 80))), {})
    with pytest.raises(ConfigError, match=r"small-fp32 is an export of a BEVTransformer for images of 40 x 80, fp32, "):
        check_request([str(other)], ["ort"], stored)
    shutil.copytree(stored / "small-fp32", stored / "small-int8")
    with pytest.raises(
        ConfigError, match=r"small-int8 is an export .* needed is .* int8; delete it or export it again"
    ):
        check_request([weights], ["ort-int8"], stored)
    (stored / "small-fp32" / "contract.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"contract\.json"):
        check_request([weights], ["ort"], stored)
    with pytest.raises(CheckpointError, match=r"none\.safetensors: no such checkpoint"):
        check_request(["none.safetensors"], ["ort"])


def test_exports_of_one_model_take_the_same_images(small_network, fp32_export, mixed_export, tmp_path):
    shutil.copytree(fp32_export, tmp_path / "small-fp32")
    shutil.copytree(mixed_export, tmp_path / "small-int8")
    assert images_of(small_network, tmp_path, "small", ["ort"]).sizes == ((64, 112),) * 6
    with pytest.raises(ConfigError, match=r"small-fp32 and .*small-int8: exports of one model take the same images"):
        images_of(small_network, tmp_path, "small", ["ort", "ort-int8"])


@pytest.mark.parametrize(
    ("module", "backend", "extra"),
    [("onnxruntime", "ort", "export"), ("openvino", "openvino", "openvino"), ("onnxscript", "ort", "export")],
)
def test_missing_packages_are_named_with_their_extra(module, backend, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"{module} is not installed.*; install it, or the extra \[{extra}\]"):
        check_request(["nano"], [backend])


@needs_affinity
def test_all_threads_stay_on_the_cpus_that_are_given():
    mine = os.sched_getaffinity(0)
    threads = torch.get_num_threads()
    with limited([min(mine)]) as count:
        assert count == torch.get_num_threads() == 1
        assert all(os.sched_getaffinity(int(thread)) == {min(mine)} for thread in os.listdir("/proc/self/task"))
    assert os.sched_getaffinity(0) == mine and torch.get_num_threads() == threads
    with limited(threads=1) as count:
        assert count == 1 and os.sched_getaffinity(0) == mine
    with limited() as count:
        assert count == len(mine)
    with pytest.raises(ConfigError, match=r"--cpus: CPU 4095 is not available to this process; use some of \d"):
        limited([4095]).__enter__()
    with pytest.raises(ConfigError, match="--threads is 2, for 1 CPUs; give at most as many threads"):
        limited([min(mine)], 2).__enter__()


def test_systems_without_affinity_refuse_cpus(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    with pytest.raises(ConfigError, match=r"--cpus: .* cannot bind a process to CPUs; leave it out"):
        limited([0]).__enter__()
    assert cpu_name()


@pytest.mark.slow
def test_the_command(weights, stored, tmp_path, monkeypatch, capsys):
    out = tmp_path / "latency.json"

    def run(*arguments) -> int:
        command = ["latency", "--models", weights, "--exports", stored, "--backends", "ort", "--threads", 1, *arguments]
        with pytest.raises(SystemExit) as stop:
            run_script(lambda: main(list(map(str, command))))
        return stop.value.code

    with monkeypatch.context() as before:
        before.setattr("perception.benchmark.latency.measure", None)  # rejected before any work
        for arguments, message in (
            (("--backends", "abacus"), "backend 'abacus' is not known"),
            (("--passes", "0"), "argument --passes: 0 is out of range"),
            (("--cpus", "two"), "argument --cpus: 'two' names no CPUs; give their numbers, such as 0,1 or 0-3"),
            (("--cpus", "3-1"), "argument --cpus: '3-1' names no CPUs"),
            (("--cpus", "0-1,4095"), "--cpus: CPU "),
            (("--json", tmp_path), f"--json {tmp_path} is a folder; give a file"),
        ):
            assert run(*arguments) == 2 and message in capsys.readouterr().err
    monkeypatch.setattr(deployed, "KEYFRAMES", 3)
    assert run("--passes", "2", "--scenes", 1, "--json", out) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[2].startswith("| baseline |") and printed[3].startswith("| ort |")
    assert "| +0.0000 | +0.0000 |" in printed[3] and "small.safetensors: " in printed[-2]
    content = json.loads(out.read_text())
    found = content["models"][weights]
    ort = found["backends"]["ort"]
    assert ort["p50"] == np.percentile(ort["passes"], 50) and len(ort["passes"]) == 2
    assert ort["speedup"]["p50"] == pytest.approx(
        np.median(np.divide(found["backends"]["baseline"]["passes"], ort["passes"]))
    )
    assert ort["within_limits"] and found["best"] in ("baseline", "ort") and found["failures"] == {}
    assert content["machine"]["threads"] == 1 and content["machine"]["torch"] == torch.__version__

    def interrupted(*_):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 1.0, 1.0

    calls = []
    out.unlink()
    monkeypatch.setattr(latency, "_timed", interrupted)
    assert run("--scenes", 0, "--json", out) == 130
    printed = capsys.readouterr()
    assert printed.out.splitlines()[3].startswith("| ort |") and printed.err.endswith("interrupted\n")
    assert not out.exists()


@pytest.mark.slow
def test_int8_of_trained_weights_searches_sensitive_layers(weights, tmp_path, monkeypatch):
    made = measure_models([weights], ["ort-int8"], exports=tmp_path, passes=1, threads=1, scenes=1)
    (found,) = made.values()
    quantization = read_contract(tmp_path / "small-int8")["quantization"]
    assert quantization["sensitivities"] and found.backends["ort-int8"].metrics
    monkeypatch.setattr(backends, "trace", None)  # the export is not made again
    measure_models([weights], ["ort-int8"], exports=tmp_path, passes=1, threads=1, scenes=0)


def test_compilers_and_instructions_are_checked_first(monkeypatch):
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: shutil.copy("/nowhere", "/nowhere"))
    with pytest.raises(ConfigError, match=r"compile needs a C\+\+ compiler, and there is none \(.*nowhere"):
        check_request(["nano"], ["compile"])
    monkeypatch.setattr("perception.inference.acceleration.cpu_has_bfloat16", lambda: False)
    with pytest.raises(ConfigError, match="precision bfloat16 is slow on this CPU"):
        check_request(["nano"], ["bf16"])
