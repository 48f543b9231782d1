"""Tests that need a GPU: the same results as on the CPU, training in bfloat16, constant memory use, engines."""

import copy
import shutil

import pytest
import torch
from test_engine import CONFIG, scalars

from perception.benchmark import latency
from perception.data.loader import TrainSampler, collate
from perception.data.nuscenes import NuScenesDataset
from perception.engine.config import load_config
from perception.engine.training import TrainingModel, train
from perception.export.engine_session import Cuda
from perception.export.parity import certify
from perception.export.tensorrt import build_engines
from perception.inference.acceleration import accelerated
from perception.inference.sequence import predict_stream
from perception.models.checkpoint import load_model
from perception.synthetic import VERSION
from perception.types import map_tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    """Runs convolutions in float32, as on the CPU, not in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def network():
    return load_model("nano").eval()


@pytest.fixture(scope="module")
def dataset(town_root, network) -> NuScenesDataset:
    return NuScenesDataset(town_root, VERSION, "town_val", image_size=network.config.image_size)


def test_a_stream_is_the_same_as_on_the_cpu(network, dataset):
    on_cpu = predict_stream(network, dataset).objects
    on_gpu = predict_stream(copy.deepcopy(network).cuda(), dataset).objects
    for token in dataset.tokens:
        confident = on_cpu[token].boxes.score > 0.05
        assert confident.any()
        for name in ("center", "size", "velocity", "score"):
            ours, theirs = (getattr(scenes[token].boxes, name)[confident] for scenes in (on_cpu, on_gpu))
            torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-2)
        confident = on_cpu[token].lines.score > 0.05
        torch.testing.assert_close(
            on_gpu[token].lines.points[confident], on_cpu[token].lines.points[confident], rtol=1e-3, atol=1e-2
        )


def test_losses_and_gradients_are_those_of_the_cpu(network, dataset):
    requests = iter(TrainSampler(dataset.scene_of_sample, 2, 1, 2, 0.0, 0))
    clip = collate([dataset[next(requests)] for _ in range(2)])
    results = []
    for device in ("cpu", "cuda"):
        model = TrainingModel(copy.deepcopy(network)).to(device).eval()
        losses, _ = model(map_tensors(lambda tensor, device=device: tensor.to(device), clip), None)
        sum(losses.values()).backward()
        gradient = torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])
        results.append(({name: loss.item() for name, loss in losses.items()}, gradient))
    (ours, our_gradient), (theirs, their_gradient) = results
    # The uncertainty losses divide by the uncertainty: two orders of summation on one CPU differ by 5e-4 in
    # `box_uncertainty`.
    for name, loss in ours.items():
        assert theirs[name] == pytest.approx(loss, rel=3e-3 if name == "box_uncertainty" else 1e-3), name
    assert (our_gradient - their_gradient).norm() < 1e-2 * our_gradient.norm()


@pytest.mark.parametrize("amp", [False, True])
def test_training_on_a_gpu_reduces_the_loss(tmp_path, town_root, amp):
    path = tmp_path / "small.py"
    path.write_text(CONFIG.format(root=str(town_root), version=VERSION))
    core = train(load_config(path, {"train.workers": 2}), tmp_path / "work", seed=5, amp=amp)
    assert next(core.parameters()).is_cuda
    losses = [line["loss"] for line in scalars(tmp_path / "work") if "loss" in line]
    assert len(losses) == 20
    assert sum(losses[-4:]) < 0.9 * sum(losses[4:8])


def test_gpu_memory_does_not_grow(network, dataset):
    model = copy.deepcopy(network).cuda()
    frame = map_tensors(lambda tensor: tensor[None, 0].cuda(), dataset[1].frames)
    used = []
    with torch.inference_mode():
        state = model.initial_state(1)
        for _ in range(1000):
            _, state = model(frame, state)
            used.append(torch.cuda.memory_allocated())
    # Reused blocks may be larger than requested, so single frames differ, but the memory must not grow.
    assert max(used[500:]) <= max(used[10:500])
    assert not state.bev.requires_grad


@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_a_frame_is_captured_as_a_cuda_graph(network, dataset, precision):
    """A replayed frame is that of the same network without a graph, and later calls do not change what it returned."""
    model = copy.deepcopy(network).cuda()
    frames = [map_tensors(lambda tensor: tensor[None, 0].cuda(), dataset[i].frames) for i in (0, 1)]
    plain, graph = (accelerated(model, precision=precision, cuda_graph=graph) for graph in (False, True))
    assert graph.choice == f"{plain.choice}, CUDA graph"
    assert graph.precision == {"float32": "float32", "auto": "float16"}[precision]
    states, results = [plain.initial_state(1)] * 2, []
    with torch.inference_mode():
        for frame in frames:
            passed = [run(frame, state) for run, state in zip((plain, graph), states, strict=True)]
            states = [state for _, state in passed]
            objects = [run.decode(prediction) for run, (prediction, _) in zip((plain, graph), passed, strict=True)]
            results.append((*objects, *states))
    for expected, objects, state, replayed in results:
        confident = expected.boxes.score > 0.05
        torch.testing.assert_close(
            objects.boxes.center[confident], expected.boxes.center[confident], rtol=1e-3, atol=1e-2
        )
        torch.testing.assert_close(objects.boxes.score, expected.boxes.score, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(replayed, state, rtol=1e-2, atol=1e-2)
    with torch.inference_mode():  # a prediction of another network is decoded as it is
        prediction, _ = plain(frames[0], plain.initial_state(1))
        torch.testing.assert_close(graph.decode(prediction), plain.decode(prediction))


def test_an_engine_passes_the_gate_of_the_graph(exports, small_network, small_town, tmp_path):
    trt = pytest.importorskip("tensorrt_rtx")
    target = Cuda().target()
    if not hasattr(trt.ComputeCapability, target.upper()):
        pytest.skip(f"TensorRT-RTX has no engines for {target}")
    folder = shutil.copytree(exports("fp32"), tmp_path / "engine")
    build_engines(folder, targets=[target])
    found = certify(small_network, folder, small_town, backend="tensorrt")
    assert found.failures == []
    measured = latency.measure(small_network, ["tensorrt"], {"fp32": folder}, passes=10)
    assert measured.backends["tensorrt"].device == target
