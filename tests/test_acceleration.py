"""Networks prepared for speed give the results of the plain network, which is compared as it is."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._inductor.config
from conftest import noisy
from test_compile import replay_frames, small, tensors
from torch import nn
from torch.nn import functional as F

from perception.data.nuscenes import NuScenesDataset
from perception.errors import ConfigError
from perception.evaluation.dataset import evaluate_predictions
from perception.inference import acceleration
from perception.inference.acceleration import PLAIN, AcceleratedNetwork, accelerated, choose_precision, cpu_has_bfloat16
from perception.inference.folding import fold_batch_norms, observe
from perception.inference.predictor import Predictor
from perception.inference.sequence import predict_stream
from perception.models import build_network, preset_config
from perception.models.bev_transformer.model import BEVTransformer
from perception.models.bevformer.model import BEVFormer
from perception.models.checkpoint import load_model
from perception.models.maptrv2.model import MapTRv2
from perception.rigs.rig import Rig
from perception.synthetic import VERSION, simulate
from perception.types import State, map_tensors

CPU = torch.device("cpu")


def with_statistics(network):
    """Gives batch norms other statistics than zero and one, as training does."""
    network = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(4)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d) and part.track_running_stats:
            part.running_mean.normal_(0, 0.2, generator=generator)
            part.running_var.uniform_(0.5, 2, generator=generator)
    return network


@pytest.fixture(scope="module")
def flagship(small_network):
    return with_statistics(small_network)


@pytest.fixture
def network(request, flagship):
    if request.param == "bevformer":
        return with_statistics(noisy(BEVFormer, small(preset_config("bevformer_tiny"))))
    if request.param == "maptrv2":
        return with_statistics(noisy(MapTRv2, small(preset_config("maptrv2_nusc_r50_24ep"))))
    return flagship


@torch.inference_mode()
def outputs(network, frames=2) -> list[torch.Tensor]:
    """Returns all tensors that a network returns for the last of some frames."""
    state = network.initial_state(1)
    for frame in replay_frames(network.config.image_size, frames):
        prediction, state = network(frame, state)
    return [tensor for tensor in tensors((prediction, state)) if tensor is not None]


def largest_difference(found, expected) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(found, expected, strict=True) if x.numel())


def usual_difference(found, expected) -> float:
    """Sum of medians: a query that starts at another peak of the heat map moves by metres."""
    return sum(float((x - y).abs().median()) for x, y in zip(found, expected, strict=True) if x.numel())


# ----------------------------------------------------------------------------------------------------- batch norms


@pytest.mark.parametrize("network", ["flagship", "bevformer", "maptrv2"], indirect=True)
def test_folding_changes_rounding_only(network):
    """Folded in float64, the image encoder agrees to 1e-12 with itself before; geometry is float32 always."""
    folded = copy.deepcopy(network)
    norms = sum(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    observer = observe(folded)
    count = fold_batch_norms(folded.double(), observer)
    left = [part for part in folded.modules() if isinstance(part, nn.BatchNorm2d)]
    # Deformable convolutions are no `nn.Conv2d`; the batch norms after them stay.
    deformable = sum(type(part).__name__ == "DeformableConv" for part in folded.modules())
    assert count == norms - deformable > 0 and len(left) == deformable
    images = replay_frames(network.config.image_size, 1)[0].images.double()
    images = images[0] if isinstance(network, BEVTransformer) else images
    found, expected = (model.double().image_encoder(images) for model in (folded, copy.deepcopy(network)))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float64 and (one - other).abs().max() < 1e-12 * other.abs().max()


def test_the_given_network_is_not_changed(flagship):
    before = {name: tensor.clone() for name, tensor in flagship.state_dict().items()}
    parts = [type(part) for part in flagship.modules()]
    expected = outputs(flagship)
    fast = accelerated(flagship)
    outputs(fast)
    after = flagship.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert [type(part) for part in flagship.modules()] == parts
    assert all(parameter.requires_grad for parameter in flagship.parameters())
    assert largest_difference(outputs(flagship), expected) == 0


class Awkward(nn.Module):
    """Batch norms that must not be folded, between others that may be."""

    class config:
        image_size, cameras = (16, 24), 1

    def __init__(self):
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.twice, self.twice_norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.before_norm, self.before = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.one, self.other, self.shared_norm = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.reused, self.reused_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, affine=False)
        self.changed, self.changed_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.returned, self.returned_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.batch_norm = nn.BatchNorm2d(8, track_running_stats=False)  # with the statistics of the batch

    def initial_state(self, batch):
        return State(self.first.weight.new_zeros(batch, 0))

    def forward(self, frame, state):
        x = F.relu(self.first_norm(self.first(frame.images[:, 0].to(self.first.weight.dtype) / 255)))  # folded
        y = self.twice(x)
        x = self.twice_norm(y) + y  # the output of the convolution goes elsewhere too
        x = self.before(F.relu(self.before_norm(x)))  # a batch norm before its convolution
        x = self.shared_norm(self.one(x)) + self.shared_norm(self.other(x))  # one batch norm after two convolutions
        x = self.reused_norm(self.reused(x)) + self.reused_norm(self.reused(x.flip(-1)))  # one pair, twice: folded
        y = self.changed(x)
        y += 1  # in place, between the two
        x = self.returned(self.batch_norm(self.changed_norm(y)))
        return (self.returned_norm(x), x), state


@torch.no_grad()
def test_batch_norms_are_folded_only_where_that_is_exact():
    torch.manual_seed(2)
    network = with_statistics(Awkward()).double().eval()
    folded = copy.deepcopy(network)
    assert fold_batch_norms(folded, observe(folded)) == 2
    assert [name for name, part in folded.named_children() if isinstance(part, nn.Identity)] == [
        "first_norm", "reused_norm"
    ]  # fmt: skip
    frame = replay_frames((16, 24), 1)[0]
    found, expected = (model(frame, model.initial_state(1))[0] for model in (folded, network))
    assert largest_difference(found, expected) < 1e-12


# ------------------------------------------------------------------------------------------------------- precision


def test_the_baseline_is_the_network_itself(flagship):
    baseline = accelerated(flagship, **PLAIN)
    assert baseline.network is flagship
    assert largest_difference(outputs(baseline), outputs(flagship)) == 0


@pytest.mark.parametrize("network", ["flagship", "bevformer", "maptrv2"], indirect=True)
def test_float32_agrees_with_the_baseline(network):
    fast = accelerated(network, precision="float32")
    expected = outputs(network)
    assert 0 < largest_difference(outputs(fast), expected) < 1e-3  # folded, in another layout
    images = next(part for part in fast.modules() if isinstance(part, nn.Conv2d) and part.kernel_size == (3, 3))
    assert images.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("network", ["flagship", "bevformer", "maptrv2"], indirect=True)
def test_bfloat16_is_closer_than_autocast_alone(network, monkeypatch):
    """Linear layers and small convolutions stay float32, so that logits and locations are no bfloat16 numbers."""
    monkeypatch.setattr(acceleration, "cpu_has_bfloat16", lambda: True)  # slow, but right, on other CPUs
    expected = outputs(network)
    found = outputs(accelerated(network, precision="bfloat16"))
    with torch.autocast("cpu", torch.bfloat16):
        everything = [tensor.float() for tensor in outputs(network)]
    assert all(tensor.dtype == torch.float32 for tensor in found if tensor.is_floating_point())
    assert 0 < usual_difference(found, expected) < 0.7 * usual_difference(everything, expected)
    assert any((tensor != tensor.bfloat16()).any() for tensor in found[:2])


def test_the_precision_is_that_of_the_machine(monkeypatch, flagship):
    assert cpu_has_bfloat16() == (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    for has, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(acceleration, "cpu_has_bfloat16", lambda has=has: has)
        assert choose_precision("auto", CPU)[0] == expected
        assert accelerated(flagship).choice.startswith(f"{expected} (this CPU has")
    assert choose_precision("float32", CPU) == ("float32", "as asked for")
    with pytest.raises(ConfigError, match=r"precision bfloat16 is slow on this CPU, .* use auto or float32"):
        choose_precision("bfloat16", CPU)
    with pytest.raises(ConfigError, match="precision float16 is slow on this CPU"):
        accelerated(flagship, precision="float16")
    with pytest.raises(ConfigError, match="precision is 'half'; use one of auto, float32, bfloat16, float16"):
        Predictor(flagship, precision="half")


@pytest.mark.parametrize("text", ["processor: 0\n", "flags\t: fpu sse2 avx512f\n", None])
def test_cpus_without_bfloat16(monkeypatch, text):
    def read_text(path, encoding):
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(Path, "read_text", read_text)
    assert not cpu_has_bfloat16()


# ------------------------------------------------------------------------------------------- compiler, CUDA graph


def test_cuda_graphs_need_a_gpu(flagship):
    with pytest.raises(ConfigError, match="cuda_graph needs a GPU, and the network is on 'cpu'; leave cuda_graph out"):
        Predictor(flagship, cuda_graph=True)


def test_a_replayed_frame_reads_its_own_inputs(flagship, monkeypatch):
    """Without a GPU the pass is repeated instead of replayed; buffers and copies are those of a CUDA graph."""
    captured = []

    def capture(run):
        captured.append(run)
        run()
        return SimpleNamespace(replay=run)

    monkeypatch.setattr(acceleration, "capture_graph", capture)
    plain = accelerated(flagship, precision="float32")
    graph = AcceleratedNetwork(
        plain.network, "float32", "", channels_last=True, compile=False, cuda_graph=True
    )  # fmt: skip
    first, second = replay_frames(flagship.config.image_size, 2)
    narrow = second._replace(
        images=second.images[:, :5],
        rig=map_tensors(lambda tensor: tensor[:, :5], second.rig),
        ego_from_exposure=second.ego_from_exposure[:, :5],
    )
    with torch.inference_mode():
        kept = []
        for run in (plain, graph):
            state = run.initial_state(1)
            for frame in (first, second, narrow):
                prediction, state = run(frame, state)
                kept.append((run.decode(prediction), state))
        assert len(captured) == 2  # one for each number of cameras
        for expected, found in zip(kept[:3], kept[3:], strict=True):
            torch.testing.assert_close(found, expected)
        prediction, _ = plain(first, plain.initial_state(1))
        torch.testing.assert_close(graph.decode(prediction), kept[0][0])


def test_a_memory_without_some_of_its_parts_is_compiled(monkeypatch):
    """Sparse4D has no memory of lines. It runs eagerly here, since compiling takes minutes."""
    monkeypatch.setattr(acceleration, "_compiled", lambda network: network.__call__)
    network = build_network(small(preset_config("sparse4dv3_temporal_r50_1x8_bs6_256x704"))).eval()
    frame = replay_frames(network.config.image_size, 1)[0]
    found, expected = (
        accelerated(network, precision="float32", compile=compile)(frame, network.initial_state(1))[1]
        for compile in (True, False)
    )
    assert found.lines is None and torch.equal(found.boxes.anchor, expected.boxes.anchor)


@pytest.mark.filterwarnings("ignore::perception.errors.PerceptionWarning")  # the image is grey
def test_a_predictor_with_a_rig_compiles_at_construction(flagship, monkeypatch, capsys):
    """Eagerly, since compiling takes minutes; the line on stderr and the choice of when to compile are those of it."""
    monkeypatch.setattr(acceleration, "_compiled", lambda network: network.__call__)
    predictor = Predictor(flagship, rig=Rig.load("surround_fisheye"), precision="float32", compile=True)
    assert repr(predictor).startswith("Predictor(BEVTransformer on cpu: float32 (as asked for), 25 batch norms folded")
    assert capsys.readouterr().err.count("compiling BEVTransformer for") == 2  # before and after
    found = predictor.step({"left": np.full((966, 1280, 3), 90, np.uint8)}, np.eye(4), 0.0)
    assert capsys.readouterr().err == "" and len(found.boxes.score)

    def fail(*inputs):
        raise RuntimeError("no header\nand more")

    monkeypatch.setattr(acceleration, "_compiled", lambda network: fail)
    with pytest.raises(ConfigError, match=r"the network cannot be compiled here \(no header\); leave compile out"):
        Predictor(flagship, rig=Rig.load("surround_fisheye"), compile=True)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {name: text for name, text in (os.environ | environment).items() if text}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_a_missing_compiler_is_named(flagship):
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.raises(ConfigError, match=r"compile needs a C\+\+ compiler, .* one in CXX, or leave compile out"):
            accelerated(flagship, compile=True)


COMPILE = """
import json, sys, torch
sys.path.insert(0, "tests")
from conftest import noisy
from test_compile import replay_frames
from toy_network import ToyConfig, ToyNetwork
from perception.inference.acceleration import accelerated
from torch._dynamo.utils import counters

torch.set_num_threads(1)
network = noisy(ToyNetwork, ToyConfig())  # the flagship takes minutes
runs = [accelerated(network, precision="float32", compile=compile) for compile in (False, True)]
off = []
with torch.inference_mode():
    states = [run.initial_state(1) for run in runs]
    for frame in replay_frames(network.config.image_size, 3):
        results = [run(frame, state) for run, state in zip(runs, states)]
        states = [state for _, state in results]
        pairs = zip(*(run.raw_outputs(prediction) for run, (prediction, _) in zip(runs, results)))
        off.append(max(float((one - other).abs().max()) for one, other in pairs))
print(json.dumps({"off": off, "hits": counters["inductor"]["fxgraph_cache_hit"], "choice": runs[1].choice}))
"""


@pytest.mark.slow
def test_a_compiled_network_is_found_again_by_the_next_process(tmp_path):
    environment = {"PERCEPTION_CACHE": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": ""}
    for hits in (0, 1):
        run = run_python(COMPILE, **environment)
        assert run.returncode == 0, run.stderr
        found = json.loads(run.stdout.splitlines()[-1])
        assert max(found["off"]) < 1e-3 and found["hits"] == hits and found["choice"].endswith(", compiled")
        line = f"compiling ToyNetwork for 6 images of 64 x 112 (minutes, unless {tmp_path}/compiled holds it) ..."
        assert run.stderr.count(line) == 1
    assert any((tmp_path / "compiled").rglob("*.so"))


@pytest.mark.slow
def test_a_compiler_that_fails_is_named(tmp_path):
    """A compiler that prints its version and nothing else, as one without the headers of Python."""
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exec /usr/bin/env -i /usr/bin/g++ --version\nexit 1\n')
    compiler.chmod(0o755)
    run = run_python(COMPILE, PERCEPTION_CACHE=str(tmp_path), TORCHINDUCTOR_CACHE_DIR="", CXX=str(compiler))
    assert "ConfigError: the network cannot be compiled here (" in run.stderr
    assert run.stderr.rstrip().endswith("leave compile out")


# -------------------------------------------------------------------------------------------------------- accuracy


@pytest.mark.slow
def test_the_shipped_network_is_as_accurate_in_bfloat16(tmp_path):
    """The difference of the metrics is noise that falls with the number of samples; docs/benchmarks.md has 144."""
    simulate(tmp_path / "town", scenes=2, seed=5000, keyframes=10, split="town", image_size=(176, 448), workers=1)
    network = load_model("nano")
    dataset = NuScenesDataset(tmp_path / "town", VERSION, "town", image_size=network.config.image_size)
    found, expected = (
        predict_stream(accelerated(network, **options), dataset).objects
        for options in ({"precision": "bfloat16"}, PLAIN)
    )
    metrics, wanted = (evaluate_predictions(dataset, objects).metrics() for objects in (found, expected))
    assert abs(metrics["nds"] - wanted["nds"]) < 0.005 and abs(metrics["lane_mAP"] - wanted["lane_mAP"]) < 0.008
    shares = []
    for token, objects in expected.items():
        sure, other = objects.boxes.score > 0.2, found[token].boxes
        distance = torch.cdist(objects.boxes.center[sure], other.center)
        distance[objects.boxes.label[sure][:, None] != other.label] = torch.inf
        nearest, which = distance.min(1)
        off = (other.score[which] - objects.boxes.score[sure]).abs()
        shares.append(((nearest < 0.3) & (off < 0.1)).float())
    share = torch.cat(shares)
    assert len(share) > 50 and share.mean() > 0.95  # 0.963 were measured
