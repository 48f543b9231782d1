"""Benchmarks: failures become rows, modes are compared with float32, steps train and their shares add up."""

import json
import os
import signal
import time
from itertools import islice

import pytest
import torch
from conftest import RAW
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perception.benchmark import deployed, frames, gpu, stages, training
from perception.benchmark.deployed import DeployedRunner, measure_deployed
from perception.benchmark.frames import (
    Mode,
    Runner,
    differences,
    example_frame,
    load_network,
    measure_frames,
    warm_state,
)
from perception.benchmark.sampling import measure_sampling, network_samplings
from perception.benchmark.stages import Recorder, Stage, run_stages
from perception.benchmark.training import RandomClips, Step, measure_training
from perception.data.loader import collate
from perception.errors import CheckpointError, ConfigError
from perception.export.certificate import GATES, Gate
from perception.export.contract import ImageInputs
from perception.export.parity import fitted_frame
from perception.export.replay import camera_frame, frame_inputs, replay_frames
from perception.models import build_network, preset_config
from perception.models.bev_transformer.config import BEVTransformerConfig
from perception.models.checkpoint import save_checkpoint
from perception.types import map_tensors

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(small_network, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("benchmark") / "small.safetensors"
    save_checkpoint(path, small_network, {})
    return str(path)


@pytest.fixture
def few_passes(monkeypatch):
    monkeypatch.setattr(frames, "SECONDS", 0.0)
    monkeypatch.setattr(frames, "LEAST_PASSES", 3)
    monkeypatch.setattr(frames, "LIMIT", 200.0)  # a busy machine is slow


# -------------------------------------------------------------------------------------------------------------- stages


def _fail() -> dict:
    raise ValueError("a kernel\ndid not compile")


def _exhaust() -> dict:
    raise torch.OutOfMemoryError("CUDA out of memory")


def _ignore() -> dict:
    try:
        time.sleep(60)
    except BaseException:
        time.sleep(60)
    return {}


def break_down(recorder: Recorder) -> None:
    recorder.attempt("fails", 5.0, _fail)
    recorder.attempt("too large", 5.0, _exhaust)
    recorder.attempt("too slow", 0.2, time.sleep, 60)
    recorder.attempt("ignores it", 0.2, _ignore)
    recorder.attempt("works", 5.0, dict)
    os._exit(3)


def hang(recorder: Recorder) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])  # as inside a call that never returns
    recorder.attempt("never ends", 1.0, time.sleep, 60)


@pytest.mark.slow
def test_failures_do_not_end_a_run(monkeypatch):
    monkeypatch.setattr(stages, "GRACE", 0.5)
    order = [Stage("a", "m", break_down, (), 60.0), Stage("b", "", hang, (), 3.0), Stage("c", "", hang, (), 2.0)]
    rows = list(run_stages(order, 120.0))
    assert rows[:6] == [
        {"stage": "a", "model": "m", "name": "fails", "error": "ValueError: a kernel did not compile"},
        {"stage": "a", "model": "m", "name": "too large", "error": "out of memory"},
        {"stage": "a", "model": "m", "name": "too slow", "error": "stopped after 0 s"},
        {"stage": "a", "model": "m", "name": "ignores it", "error": "stopped after 0 s"},
        {"stage": "a", "model": "m", "name": "works"},
        {"stage": "a", "model": "m", "name": "", "error": "the process ended with code 3"},
    ]
    assert rows[6:] == [
        {"stage": "b", "model": "", "name": "", "error": "the process was ended after 4 s"},
        {"stage": "c", "model": "", "name": "", "error": "no time was left"},  # two seconds are too short for a start
    ]


def test_time_of_a_stage_is_shared_by_its_measurements():
    rows = []
    recorder = Recorder(rows.append, 0.3)
    recorder.attempt("first", 60.0, time.sleep, 60)
    start = time.monotonic()
    recorder.attempt("second", 60.0, time.sleep, 60)
    assert time.monotonic() - start < 10
    assert [row["error"] for row in rows] == ["stopped after 0 s"] * 2


# -------------------------------------------------------------------------------------------------------------- frames


@pytest.mark.slow
@pytest.mark.usefixtures("few_passes")
def test_modes_are_compared_with_float32(weights):
    rows = []
    measure_frames(Recorder(rows.append, 600.0), weights, "cpu", False)
    assert [row["name"] for row in rows] == [
        "eager fp32 untuned plain sampling", "eager fp32", "eager bf16 channels_last", "eager bf16",
        "eager fp32 channels_last", "with copies", "profile",
    ]  # fmt: skip
    assert not any("error" in row for row in rows), rows
    same, half = rows[0], rows[2]
    assert same["difference"] == {"memory": [0, 0], "box": [0, 0], "line": [0, 0]}
    assert all(1e-5 < half["difference"][kind][1] < 0.1 for kind in ("memory", "box", "line"))
    assert all(0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"] for row in rows[:6])
    assert rows[-1]["kernels"] > 100 and rows[-1]["top"][0]["ms"] <= rows[-1]["kernel_ms"]


def test_a_runner_continues_from_its_memory(small_network):
    frame = example_frame(small_network, CPU)
    state = warm_state(small_network, frame)
    runner = Runner(small_network, frame, state, Mode())
    with torch.inference_mode():
        one, second = small_network(frame, state)
        two, third = small_network(frame, second)
    for _ in range(2):  # the initial memory is unchanged
        prediction, _, after = runner.first_pass()
        torch.testing.assert_close(prediction.box_params, one.box_params)
        torch.testing.assert_close(after.bev, second.bev)
    runner()
    torch.testing.assert_close(runner.state.bev, third.bev)
    torch.testing.assert_close(runner.results[0].line_points, two.line_points)
    assert (third.bev - second.bev).abs().max() > 1e-3


def test_differences_match_reordered_boxes(small_network):
    frame = example_frame(small_network, CPU)
    expected = Runner(small_network, frame, warm_state(small_network, frame), Mode()).first_pass()
    prediction, objects, state = expected
    reordered = prediction._replace(
        box_logits=prediction.box_logits.flip(2), box_params=prediction.box_params.flip(2),
        line_points=prediction.line_points + 0.5,
    )  # fmt: skip
    found = differences(small_network, expected, (reordered, objects, state))
    assert found["box"] == [0, 0] and found["memory"] == [0, 0]
    assert 0 < found["line"][1] < found["line"][0] == pytest.approx(0.5, rel=1e-3)  # classes do not differ
    broken = state._replace(bev=state.bev.clone().index_fill_(1, torch.tensor(0), float("nan")))
    assert differences(small_network, expected, (prediction, objects, broken))["memory"] is None


def test_random_networks_depend_on_the_images(small_network, monkeypatch):
    network = load_network("nano", CPU)
    assert network.config.image_size != (160, 288)  # the shipped weights, not the preset
    monkeypatch.setattr(BEVTransformerConfig, "tiny", lambda: small_network.config)
    tiny = load_network("tiny", CPU)
    frame = example_frame(tiny, CPU)
    other = frame._replace(images=255 - frame.images)
    with torch.inference_mode():
        one, two = (tiny(seen, tiny.initial_state(1))[0] for seen in (frame, other))
    for name in ("box_logits", "box_params", "line_logits", "line_points"):
        values = getattr(one, name)[-1]
        assert values.isfinite().all() and values.abs().max() < 1e3
        assert (values - getattr(two, name)[-1]).abs().max() > 1e-3


class HostTensors(TorchDispatchMode):
    """Records the operators of a GPU pass that read or create a tensor in host memory."""

    def __init__(self):
        super().__init__()
        self.found, self.operators = [], 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        self.found += [str(operator)] * any(x.device.type == "cpu" for x in tensors)
        self.operators += 1
        return result


def host_tensors_of_a_pass(config) -> HostTensors:
    """Runs a network on fake GPU tensors, which have shapes but no data and need no GPU."""
    with torch.device("meta"):
        network = build_network(config).eval()

    def on_gpu(x: torch.Tensor) -> torch.Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device="cuda")

    with FakeTensorMode(), torch.inference_mode(), HostTensors() as record:
        for module in network.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: on_gpu(x) for name, x in tensors.items() if x is not None})
        frame = map_tensors(on_gpu, example_frame(network, CPU))
        record.found.clear()
        network.decode(network(frame, network.initial_state(1))[0])
    return record


@pytest.mark.parametrize(
    "name",
    ["flagship", *frames.PORTS, "maptr_tiny_r50_24e_gkt", "maptrv2_nusc_r50_24ep", "mapqr_nusc_r50_24ep"],
)
def test_a_pass_uses_no_host_tensors(name, small_network, monkeypatch):
    """A CUDA graph cannot capture host tensors; operators with data-dependent shapes raise here."""
    if "maptrv2" in name:  # its shapes are independent of data only when compiled
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    record = host_tensors_of_a_pass(small_network.config if name == "flagship" else preset_config(name))
    assert record.found == [] and record.operators > 500


# ------------------------------------------------------------------------------------------------------------ sampling


@pytest.mark.usefixtures("few_passes")
def test_sampling_is_measured_at_the_sizes_of_a_network(weights, small_network):
    cameras, bev = network_samplings(small_network, "bf16").values()
    features, uv, weight = cameras.inputs
    assert features.shape == (1, 6, 16, 5, 10) and features.dtype == torch.bfloat16
    assert uv.shape == (1, 20 * 20 * 3, 1, 2) and weight.shape == uv.shape[:-1]
    assert (weight == 0).float().mean() == pytest.approx(0.41, abs=0.05)
    assert [tuple(x.shape) for x in bev.inputs] == [(1, 16, 20, 20), (1, 20, 4, 4, 2), (1, 20, 4, 4)]
    assert bev.inputs[1].abs().max() > 40  # metres, over the whole grid
    rows = []
    measure_sampling(Recorder(rows.append, 60.0), (weights,), "cpu")
    assert [len(row["difference"]) for row in rows] == [1, 4] * 6
    assert 0 < max(off for row in rows for off in row["difference"]) < 1e-2


# ------------------------------------------------------------------------------------------------------------ training


def test_steps_learn(weights, monkeypatch):
    monkeypatch.setattr(training, "STORED_SIZE", (90, 160))
    network = load_network(weights, CPU)
    step = Step(network)
    before = [parameter.clone() for parameter in network.parameters()]
    clips = RandomClips(network, 4)
    assert clips[1].frames.images.shape == (2, 6, 3, 40, 80)
    assert (clips[1].gt.boxes.center != clips[2].gt.boxes.center).any()
    part_seconds = {}
    start = time.perf_counter()
    step(collate([clips[0], clips[1]]), part_seconds)
    assert sum(part_seconds.values()) <= time.perf_counter() - start and min(part_seconds.values()) > 0
    assert part_seconds.keys() == {"forward", "losses", "backward", "optimizer"}
    changed = [(a != b).any() for a, b in zip(before, network.parameters(), strict=True)]
    assert sum(changed) > 0.9 * len(changed)


@pytest.mark.slow
def test_training_is_measured_until_batches_do_not_fit(weights, monkeypatch):
    rows = []
    step = Step.__call__

    def step_on_a_small_gpu(self, clip, part_seconds=None):
        if len(clip.sample_index) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(self, clip, part_seconds)

    monkeypatch.setattr(Step, "__call__", step_on_a_small_gpu)
    monkeypatch.setattr(training, "STEPS", 1)
    monkeypatch.setattr(training, "STORED_SIZE", (90, 160))
    monkeypatch.setattr(training, "LIMIT", 200.0)
    monkeypatch.setattr(RandomClips, "__len__", lambda _: 8)  # otherwise steps with a loader would use all their time
    measure_training(Recorder(rows.append, 400.0), weights, "cpu", (1, 2, 4, 8))
    best = max((1, 2), key=lambda batch: rows[batch - 1]["frames_per_s"])
    assert [(row["name"], row.get("error")) for row in rows] == [
        ("batch 1", None), ("batch 2", None), ("batch 4", "out of memory"), (f"batch {best} in parts", None),
        ("loaded", None),
    ]  # fmt: skip
    for batch, row in zip((1, 2), rows, strict=False):
        assert row["frames_per_s"] == pytest.approx(2 * batch / (row["step_ms"] / 1e3))
    shares = rows[3]["shares"]
    assert sum(shares.values()) - shares["matching"] == pytest.approx(1)
    assert 0 < shares["matching"] < shares["losses"] * 2
    assert rows[-1]["batch"] == best and 0 <= rows[-1]["shares"]["data"] < 1


# ------------------------------------------------------------------------------------------------------------ deployed


@pytest.mark.slow
def test_deployed_modes_are_judged_by_the_gates_of_certificates(weights, monkeypatch):
    monkeypatch.setattr(deployed, "LIMIT", 200.0)
    monkeypatch.setattr(deployed, "SCENES", 1)
    monkeypatch.setattr(deployed, "KEYFRAMES", 3)
    monkeypatch.setitem(GATES, "fp16", Gate(1e-6, None, 1.0, 1.0))  # bfloat16 is less precise
    rows = []
    measure_deployed(Recorder(rows.append, 600.0), weights, "cpu")
    assert [row["name"] for row in rows] == ["reference", "eager fp32", "eager bf16 channels_last"]
    reference, same, half = rows
    assert reference["frames"] == 3 and 0 <= reference["metrics"]["nds"] < 0.2
    assert all(off == (0, 0) for off in same["raw"].values()) and same["boxes"] == same["lines"] == (0, 0)
    assert all(one == other == reference["metrics"][name] for name, (one, other) in same["metrics"].items())
    assert (same["gate"], same["passed"], same["failures"]) == ("fp32", True, [])
    assert all(1e-5 < mean < 0.1 for _, mean in half["raw"].values())
    assert (half["gate"], half["passed"]) == ("fp16", False)
    assert [failure.split()[0] for failure in half["failures"]] == ["memory", "raw_box", "raw_line"]
    machine = {"device": "a CPU", "torch": "2", "cuda": None}
    text = gpu.tables({"machine": machine, "rows": [{"stage": "deployed", "model": "m", **row} for row in rows]})
    assert text.count("\n| ") == 4 and text.count("fp32: passed") == text.count("fp16: failed") == 1


def test_a_deployed_network_continues_from_its_memory(small_network, small_town):
    images = ImageInputs.of_rig(6, RAW)
    replayed = dict(islice(replay_frames(small_town, 6), 3))
    frames_of_cameras = {token: camera_frame(frame, images) for token, frame in replayed.items()}
    inputs = {token: list(frame_inputs(frame).values()) for token, frame in frames_of_cameras.items()}
    runner = DeployedRunner(small_network, images, inputs[next(iter(inputs))], Mode(), CPU)
    state = small_network.initial_state(1)
    for token, frame in frames_of_cameras.items():
        with torch.inference_mode():
            prediction, state = small_network(fitted_frame(frame, images, small_network.config.image_size), state)
        outputs, seconds = runner(inputs[token])
        assert outputs["new_memory"] == pytest.approx(state.bev.numpy(), abs=1e-4) and seconds > 0
        assert outputs["raw_line_logits"] == pytest.approx(prediction.line_logits[-1, 0].numpy(), abs=1e-4)


# ------------------------------------------------------------------------------------------------------------ one call


@pytest.mark.slow
@pytest.mark.usefixtures("few_passes")
def test_results_are_written_after_every_measurement(weights, tmp_path):
    path, seen = tmp_path / "gpu.json", []

    def progress(line: str) -> None:
        seen.append((line, len(json.loads(path.read_text())["rows"])))

    content = gpu.measure(path, models=[weights], stages=["sampling"], device="cpu", seconds=600.0, progress=progress)
    assert json.loads(path.read_text()) == content and content["machine"]["torch"] == torch.__version__
    assert [count for _, count in seen] == list(range(1, 13))  # the file has each row before it is reported
    text = gpu.tables(content)
    assert text.count("\n| ") == 13 and "Not measured" not in text


def test_the_first_model_comes_first():
    order = gpu.plan(["base", "nano", "tiny"], gpu.STAGES, "cuda", 360.0)
    assert [(stage.name, stage.model) for stage in order] == [
        ("frames", "base"), ("ports", "base"), ("frames", "nano"), ("sampling", ""), ("training", "base"),
        ("deployed", "nano"), ("training", "nano"), ("frames", "tiny"), ("training", "tiny"), ("compiled", "base"),
        ("compiled", "nano"), ("compiled", "tiny"),
    ]  # fmt: skip
    assert [stage.seconds for stage in gpu.plan(["nano"], ["deployed"], "cuda", 90.0)] == [pytest.approx(90.0)]
    assert order[0].seconds == pytest.approx(0.2 * 360.0)
    with pytest.raises(ConfigError, match="which random weights do not have; give --models shipped weights"):
        gpu.plan(["base"], ["deployed"], "cuda", 360.0)
    with pytest.raises(ConfigError, match="'frame' is not known; use some of frames, ports"):
        gpu.plan(["base"], ["frame"], "cuda", 360.0)
    with pytest.raises(ConfigError, match="--models"):
        gpu.plan([], ["frames"], "cuda", 360.0)
    with pytest.raises(ConfigError, match="device 'tpu' is not available"):
        gpu.measure("never.json", device="tpu")
    with pytest.raises(ConfigError, match="model preset is 'bse'"):
        gpu.measure("never.json", device="cpu", models=["nano", "bse"])
    with pytest.raises(CheckpointError, match=r"none\.safetensors: no such checkpoint"):
        gpu.measure("never.json", device="cpu", models=["none.safetensors"])


def test_tables_list_failed_measurements():
    row = {"p50_ms": 2.0, "p90_ms": 3.0, "p99_ms": 4.0, "speedup": 5.25, "peak_mib": 512.4}
    row["difference"] = {"memory": [0.5, 0.25], "box": None}
    content = {
        "machine": {"device": "a GPU", "torch": "2", "cuda": "13"},
        "rows": [
            {"stage": "frames", "model": "base", "name": "eager bf16", **row},
            {"stage": "compiled", "model": "base", "name": "compile", "error": "stopped after 75 s"},
        ],
    }
    text = gpu.tables(content)
    assert "| eager bf16 | 2.00 | 3.00 | 4.00 | 5.25 | 512 | 5.0e-01 (2.5e-01) | not finite |  |" in text
    assert text.endswith("Not measured:\n\n- compiled base compile: stopped after 75 s")
