"""Training: losses decrease, resuming is exact, a NaN stops with sample names, user errors exit with code 2."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import one_thread
from mmengine.runner import set_random_seed

from perception.data.loader import ClipRequest, TrainSampler, collate
from perception.engine.config import build_dataset, load_config
from perception.engine.step_times import PARTS
from perception.engine.training import TrainingModel, train
from perception.engine.weights import load_weights, make_core
from perception.errors import CheckpointError, ConfigError, TrainingError, run_script
from perception.evaluation.dataset import evaluate_dataset
from perception.models.bev_transformer.model import BEVTransformer
from perception.models.checkpoint import halve, load_model, read_metrics, read_provenance
from perception.synthetic import VERSION, simulate

PROJECT = Path(__file__).resolve().parent.parent
CONFIG = """
model = dict(preset="nano", image_size=(64, 96), grid=(20, 20), channels=16, depth_bins=8, backbone_stages=2,
             decoder_layers=2, box_queries=20, line_queries=8)
train_data = dict(dataroot={root!r}, version={version!r}, split="town_val", augment=dict())
val_data = dict(dataroot={root!r}, version={version!r}, split="town_val")
train = dict(image_epochs=1, epochs=4, batch_size=1, streams=1, frames_per_clip=2, drop_frames=0.0, lr=2e-3,
weight_decay=0.01,
             warmup_iters=2, grad_clip=10.0, ema_momentum=0.1, val_every=5, log_every=1, workers=0)
"""


@pytest.fixture(scope="module")
def config_path(tmp_path_factory, town_root) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.py"
    path.write_text(CONFIG.format(root=str(town_root), version=VERSION))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, config_path) -> Path:
    """The work directory of five epochs without interruption."""
    work_dir = tmp_path_factory.mktemp("trained")
    with one_thread():
        train(load_config(config_path), work_dir, seed=5)
    return work_dir


def scalars(work_dir: Path) -> list[dict]:
    (path,) = work_dir.glob("*/vis_data/scalars.json")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_loss_decreases_and_all_files_are_written(trained):
    lines = [line for line in scalars(trained) if "loss" in line]
    assert len(lines) == 20  # 2 scenes x 2 windows of 2 frames, five times
    assert sum(line["loss"] for line in lines[-4:]) < 0.9 * sum(line["loss"] for line in lines[4:8])
    images, lines = lines[:4], lines[4:]
    assert all({key for key in line if key.startswith(("box", "line", "heat"))} == set() for line in images)
    assert all(line["image_class"] > 0 for line in images)
    parts = {
        "box_class", "box_params", "box_uncertainty", "heatmap", "line_class", "line_points", "line_direction",
        "line_uncertainty", "bev_seg", "image_class", "image_depth", "image_heading",
    }  # fmt: skip
    assert parts <= lines[0].keys()
    assert lines[0]["loss"] == pytest.approx(sum(lines[0][part] for part in parts), rel=1e-4)
    assert all(line["images_per_s"] == pytest.approx(6 * line["frames_per_s"]) for line in lines)
    assert all(sum(line[f"share_{part}"] for part in PARTS) == pytest.approx(1) for line in lines)
    assert all(0 < line["share_matching"] < line["share_backward"] and 0 < line["mfu"] < 1.5 for line in lines)
    assert torch.cuda.is_available() or not any("gpu_busy" in line for line in lines)
    assert list(trained.glob("*/vis_data/events.out.tfevents.*"))
    validation = [line for line in scalars(trained) if "nds" in line]
    assert len(validation) == 1 and validation[0].keys() >= {"nds", "mAP", "lane_mAP", "mATE", "score", "fps"}


def test_exported_weights_are_the_averaged_ones(trained, config_path):
    config = load_config(config_path)
    exported, metrics = load_model(trained / "small.safetensors"), read_metrics(trained / "small.safetensors")
    last = load_model(trained / "small-last.safetensors")
    described = read_provenance(trained / "small.safetensors")
    assert described.is_generated and len(described.cameras) == 6 and described.scenes > 0
    assert described == read_provenance(trained / "small-last.safetensors")
    checkpoint = torch.load(trained / "epoch_5.pth", weights_only=True)
    averaged = {name.removeprefix("core."): tensor for name, tensor in checkpoint["state_dict"].items()}
    raw = checkpoint["ema_state_dict"]  # MMEngine swaps the two when it saves
    assert not all(torch.equal(tensor, raw[f"module.core.{name}"]) for name, tensor in averaged.items())
    for core in (exported, last, load_weights(trained / "epoch_5.pth", config.model)):
        weights = core.state_dict()
        assert weights.keys() == averaged.keys()
        for name, tensor in weights.items():
            stored = averaged[name] if core is not exported and core is not last else halve(averaged)[name].float()
            assert torch.equal(tensor, stored)
    assert metrics["epoch"] == 5 and metrics["score"] == (metrics["nds"] + metrics["lane_mAP"]) / 2


def test_bfloat16_trains_and_keeps_float32_weights(config_path, tmp_path):
    core = train(
        load_config(config_path, {"train.epochs": 1, "train.image_epochs": 0, "train.ema_momentum": 0}),
        tmp_path,
        amp=True,
    )
    assert {p.dtype for p in core.parameters()} == {torch.float32}
    first = next(line for line in scalars(tmp_path) if "loss" in line)
    assert 0 < first["loss"] < 1e3
    assert "ema_state_dict" not in torch.load(tmp_path / "epoch_1.pth", weights_only=True)


def test_training_starts_from_given_weights(trained, config_path, tmp_path):
    start = trained / "small.safetensors"
    options = {"train.image_epochs": 0, "train.epochs": 1, "train.lr": 1e-12, "train.ema_momentum": 0}
    core = train(load_config(config_path, options | {"train.init_from": str(start)}), tmp_path / "on")
    given = dict(load_model(start).named_parameters())
    for name, parameter in core.named_parameters():
        torch.testing.assert_close(parameter, given[name], atol=1e-6, rtol=0)
    larger = options | {"train.init_from": str(start), "model.image_size": (96, 128)}
    assert make_core(load_config(config_path, larger)).config.image_size == (96, 128)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        train(load_config(config_path, options | {"train.init_from": str(tmp_path / "none.pth")}), tmp_path / "off")


def test_published_weights_of_the_backbone_and_frozen_stages(config_path, tmp_path):
    """The stem and the first stage keep their weights and statistics; the second stage is trained."""
    published = torchvision.models.resnet18(weights=None)
    torch.save(published.state_dict(), tmp_path / "resnet18.pth")
    options = {
        "train.image_epochs": 0, "train.epochs": 1, "train.frozen_stages": 1, "train.ema_momentum": 0,
        "train.backbone_weights": str(tmp_path / "resnet18.pth"),
    }  # fmt: skip
    backbone = train(load_config(config_path, options), tmp_path / "work").image_encoder.backbone
    wanted = published.layer1.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in backbone.stages[0].state_dict().items())
    assert torch.equal(backbone.stem[1].running_mean, published.bn1.running_mean)
    change = (backbone.stages[1][0].conv1.weight - published.layer2[0].conv1.weight).abs().max()
    assert 0 < change < 0.1
    with pytest.raises(ConfigError, match="both given"):
        train(load_config(config_path, options | {"train.init_from": "x.pth"}), tmp_path / "both")


@pytest.mark.slow
def test_a_dry_run_estimates_the_cost_of_a_training(config_path, tmp_path):
    """Parameters and FLOPs against a count by hand of the network alone; the dataset of the config gives the steps."""
    from perception.engine.dry_run import dry_run

    config = load_config(config_path)
    estimate = dry_run(config)
    core = BEVTransformer(config.model)
    assert sum(estimate.parameters.values()) == estimate.learned == sum(p.numel() for p in core.parameters())
    assert estimate.steps == 5 * 4 and estimate.hours == pytest.approx(20 * estimate.seconds_per_step / 3600)
    # The stem alone: 6 images, 7 x 7 x 3 products and sums for each of 64 channels on 32 x 48 pixels.
    assert estimate.gflops > 6 * 2 * 147 * 64 * 32 * 48 / 1e9
    assert 2**26 < estimate.peak_memory < 2**36
    frozen = load_config(config_path, {"train.frozen_stages": 1, "train_data.dataroot": str(tmp_path / "none")})
    estimate = dry_run(frozen)
    assert (
        estimate.learned < sum(estimate.parameters.values())
        and estimate.steps is None
        and "unknown" in estimate.table()
    )


def test_a_training_that_diverges_stops_and_names_the_samples(config_path, tmp_path):
    config = load_config(config_path, {"train.lr": 1e30, "train.ema_momentum": 0})
    with pytest.raises(TrainingError, match=r"stopped at iteration \d: .* for the samples ") as caught:
        train(config, tmp_path)
    tokens = build_dataset(config.train_data, config.model).tokens
    named = str(caught.value).partition("for the samples ")[2].partition(";")[0].split(", ")
    assert len(named) == 2 and set(named) <= set(tokens)  # one clip of two frames


def test_a_loss_that_is_not_finite_is_named(config_path):
    config = load_config(config_path)
    dataset = build_dataset(config.train_data, config.model)
    clip = collate([dataset[0]])
    model = TrainingModel(BEVTransformer(config.model))
    losses, _ = model(clip, None)
    assert all(loss.isfinite() for loss in losses.values())
    boxes = clip.gt.boxes
    fast = boxes._replace(velocity=torch.full_like(boxes.velocity, torch.inf))
    with pytest.raises(FloatingPointError, match="loss box_params is inf"):
        model(clip._replace(gt=clip.gt._replace(boxes=fast)), None)


def test_disabled_losses(config_path):
    config = load_config(config_path, {"train.disabled_losses": ("heatmap", "image_depth")})
    clip = collate([build_dataset(config.train_data, config.model)[0]])
    core = BEVTransformer(config.model)
    whole, part = TrainingModel(core)(clip, None)[0], TrainingModel(core, config.train.disabled_losses)(clip, None)[0]
    assert whole.keys() - part.keys() == {"heatmap", "image_depth"}
    with pytest.raises(ConfigError, match=r"train\.disabled_losses names 'heat'; the losses are box_class"):
        TrainingModel(core, ("heat",))


def test_losses_are_the_mean_over_the_unrolled_frames(config_path):
    """Frame 1 uses the memory of frame 0: two single frames by hand give the same losses."""
    from perception.models.bev_transformer.losses import frame_losses
    from perception.types import map_tensors

    config = load_config(config_path)
    clip = collate([build_dataset(config.train_data, config.model)[ClipRequest((0, 1), -1, (0,))]])
    core = BEVTransformer(config.model).eval()
    first, second = (map_tensors(lambda tensor, t=t: tensor[:, t], clip) for t in (0, 1))
    prediction_0, state = core(first.frames, core.initial_state(1))
    prediction_1, _ = core(second.frames, state)
    by_hand = [frame_losses(p, c.gt, c.frames, core.grid) for p, c in ((prediction_0, first), (prediction_1, second))]
    losses, state = TrainingModel(core)(clip, None)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, (by_hand[0][name] + by_hand[1][name]) / 2)
    assert not state.bev.requires_grad


def test_memory_is_passed_from_batch_to_batch(config_path):
    """Two clips of one frame equal one clip of two, except for the gradient, which stays inside its clip."""
    config = load_config(config_path)
    data = build_dataset(config.train_data, config.model)
    model = TrainingModel(BEVTransformer(config.model)).eval()
    whole, state = model(collate([data[ClipRequest((0, 1), -1, (0,))]]), None)
    first, memory = model(collate([data[ClipRequest((0,), -1, (0,))]]), None)
    second, end = model(collate([data[ClipRequest((1,), 0, (0,))]]), memory)
    torch.testing.assert_close(end.bev, state.bev, atol=1e-5, rtol=1e-5)
    for name, loss in whole.items():
        torch.testing.assert_close(loss, (first[name] + second[name]) / 2)
    forgotten, _ = model(collate([data[ClipRequest((1,), 0, (0,))]]), None)
    assert forgotten["heatmap"] != second["heatmap"]
    images, same = model(collate([data[ClipRequest((0, 1), -1, (0,))]]), memory, images_only=True)
    assert same is memory and images.keys() == {"image_class", "image_depth", "image_heading"}
    for name, loss in images.items():  # over both frames at once: each pixel that shows a box counts the same
        assert min(first[name], second[name]) <= loss <= max(first[name], second[name])


def test_weights_of_another_architecture_are_rejected(trained, config_path):
    other = load_config(config_path, {"model.channels": 24}).model
    with pytest.raises(CheckpointError, match="has channels=16, the config's model has 24"):
        load_weights(trained / "small.safetensors", other)
    with pytest.raises(CheckpointError, match=r"epoch_5\.pth: its .* does not fit"):
        load_weights(trained / "epoch_5.pth", other)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_weights(trained / "epoch_9.pth", other)
    with pytest.raises(CheckpointError, match="not a readable training checkpoint"):
        load_weights(config_path, other)


def test_a_training_that_is_too_short_is_rejected(config_path, tmp_path):
    with pytest.raises(ConfigError, match=r"train\.warmup_iters is 1; give at least 2"):
        train(load_config(config_path, {"train.warmup_iters": 1}), tmp_path)
    with pytest.raises(ConfigError, match=r"20 iterations, not more than train\.warmup_iters=20"):
        train(load_config(config_path, {"train.warmup_iters": 20}), tmp_path)
    with pytest.raises(ConfigError, match=r"train\.drop_frames is 1\.5"):
        train(load_config(config_path, {"train.drop_frames": 1.5}), tmp_path)
    with pytest.raises(ConfigError, match=r"train\.log_every is 0; give at least 1"):
        train(load_config(config_path, {"train.log_every": 0}), tmp_path)


ONE_OF_TWO = """
import os, sys, torch
from perception.engine.config import load_config
from perception.engine.training import train

options = {"train.image_epochs": 0, "train.epochs": 2, "train.val_every": 2}
core = train(load_config(sys.argv[1], options), sys.argv[2], seed=5, resume=True, launcher="pytorch")
torch.save(core.state_dict(), f"{sys.argv[2]}/rank{os.environ['RANK']}.pt")
"""


@pytest.mark.slow
def test_two_processes_train_one_network(config_path, tmp_path):
    """Each process has its own scenes, steps use the mean of the gradients, and resuming is exact."""
    script = tmp_path / "one_of_two.py"
    script.write_text(ONE_OF_TWO)

    def run(work_dir: Path) -> list[dict]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [*command, script, config_path, work_dir], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        return [torch.load(work_dir / f"rank{rank}.pt", weights_only=True) for rank in range(2)]

    whole, rest = tmp_path / "whole", tmp_path / "rest"
    one, other = run(whole)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    rest.mkdir()
    shutil.copy(whole / "epoch_1.pth", rest)
    (rest / "last_checkpoint").write_text(str(rest / "epoch_1.pth"))
    assert all(torch.equal(tensor, one[name]) for name, tensor in run(rest)[0].items())
    assert [line["nds"] for line in scalars(whole) if "nds" in line]  # of all scenes, which the devkit checks

    config = load_config(config_path)
    set_random_seed(5)
    model, dataset = TrainingModel(make_core(config)), build_dataset(config.train_data, config.model)
    for rank in range(2):  # gradients of both processes in the first step
        draws = TrainSampler(dataset.scene_of_sample, 1, 1, 2, 0.0, 5, rank, 2)
        losses, _ = model(collate([dataset[next(iter(draws))]]), None)
        sum(losses.values()).backward()
    norm = sum((p.grad / 2).square().sum() for p in model.parameters() if p.grad is not None).sqrt()
    assert scalars(whole)[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of processes without a GPU each")
@pytest.mark.parametrize(
    ("launcher", "message"), [("pytorch", "start them with: torchrun"), ("slurm", "start them with: srun")]
)
def test_a_launcher_that_did_not_start_this_process(config_path, tmp_path, launcher, message):
    with pytest.raises(ConfigError, match=f"--launcher {launcher} .*{message}"):
        train(load_config(config_path), tmp_path, launcher=launcher)


def run_command(name: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(PROJECT / "scripts" / f"{name}.py"), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=PROJECT)


def error_of(run: subprocess.CompletedProcess) -> str:
    """Returns the error message of a failed command, which is one sentence."""
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    lines = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and run.stderr.rstrip().endswith(lines[0])
    return lines[0]


def test_evaluate_script(trained, config_path, tmp_path):
    out = tmp_path / "numbers" / "evaluation.json"
    run = run_command("evaluate", config_path, trained / "small.safetensors", "--json", out)
    assert run.returncode == 0, run.stderr
    assert "NDS" in run.stdout and "lane AP (maptr 60x30)" in run.stdout and "stability" in run.stdout
    numbers = json.loads(out.read_text())
    assert numbers.keys() >= {"nds", "mAP", "lane_mAP", "fps", "detection", "lanes", "samples"}
    assert numbers["samples"] == 8 and numbers["lanes"]["protocol"] == "maptr"
    metrics = read_metrics(trained / "small.safetensors")
    assert numbers["nds"] == pytest.approx(metrics["nds"], abs=1e-6)


def test_a_broken_image_is_one_sentence_even_from_a_worker(trained, config_path, town_root, tmp_path, capsys):
    root = tmp_path / "town"
    shutil.copytree(town_root, root)
    image = next(root.glob("samples/CAM_FRONT/*.jpg"))
    image.write_bytes(image.read_bytes()[:2000])
    config = load_config(config_path, {"val_data.dataroot": str(root)})
    core = load_model(trained / "small.safetensors")
    dataset = build_dataset(config.val_data, config.model)
    with pytest.raises(SystemExit) as exit_:
        run_script(lambda: evaluate_dataset(core, dataset, workers=1))
    assert exit_.value.code == 2
    assert re.fullmatch(rf"error: {image} cannot be read as an image .*\n", capsys.readouterr().err)


def test_a_calibration_that_is_not_finite_is_one_sentence(trained, config_path, town_root, tmp_path):
    root = tmp_path / "town"
    shutil.copytree(town_root, root)
    table = root / VERSION / "calibrated_sensor.json"
    rows = json.loads(table.read_text())
    row = next(row for row in rows if row["camera_intrinsic"])
    row["camera_intrinsic"][0][0] = float("nan")
    table.write_text(json.dumps(rows))
    run = run_command("evaluate", config_path, trained / "small.safetensors", "--dataroot", root, "--json", "e.json")
    sentence = error_of(run)
    assert "calibrated_sensor.json" in sentence and "camera_intrinsic" in sentence


@pytest.mark.slow
def test_one_scene_is_memorised(tmp_path):
    """Network, losses, decoding and evaluation agree: after long training on one scene it is reproduced."""
    root = tmp_path / "town"
    simulate(root, scenes=1, seed=36, keyframes=4, image_size=(128, 224), split="town_one", workers=1)
    options = {"train_data.dataroot": str(root), "val_data.dataroot": str(root)}
    config = load_config(PROJECT / "configs" / "synthetic" / "overfit.py", options)
    train(config, tmp_path / "work", amp=True)
    core = load_weights(tmp_path / "work" / "overfit.safetensors", config.model)
    evaluation, _ = evaluate_dataset(core, build_dataset(config.val_data, config.model))
    metrics = evaluation.metrics()
    assert metrics["nds"] > 0.8 and metrics["lane_mAP"] > 0.8
