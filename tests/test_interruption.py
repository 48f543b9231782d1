"""An interrupted training loses nothing: kills, signals, damaged, moved and copied folders, changed settings."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import killed_training
import numpy as np
import pytest
import torch
from conftest import RAW, one_thread
from tqdm import tqdm

from perception import cli
from perception.engine import loops
from perception.engine.checkpoints import WorkDir, content_hash
from perception.engine.config import load_config
from perception.engine.training import train
from perception.errors import CheckpointError, ConfigError, Interrupted, PerceptionError, PerceptionWarning, run_script
from perception.files import locked, replacing
from perception.models.checkpoint import load_model, read_metrics
from perception.synthetic import VERSION

PROJECT = Path(__file__).resolve().parent.parent
CONFIG = """
model = dict(preset="nano", image_size=(48, 80), grid=(20, 20), channels=16, depth_bins=8, backbone_stages=2,
             decoder_layers=2, box_queries=20, line_queries=8)
train_data = dict(dataroot={root!r}, version={version!r}, split="town_val", augment=dict())
val_data = dict(dataroot={root!r}, version={version!r}, split="town_val")
train = dict(image_epochs=1, epochs=2, batch_size=1, streams=2, frames_per_clip=2, drop_frames=0.0, lr=2e-3,
             weight_decay=0.01, warmup_iters=2, grad_clip=10.0, ema_momentum=0.1, val_every=1, log_every=1, workers=0)
"""
AIMED = [
    "half checkpoint 1", "before rename 1", "rename 1", "before removal 1", "removal 1", "step 1", "step 5",
    "half weights 1", "before stream 1", "stream 1", "before evaluation 1", "evaluation 1", "rename 2", "rename 3",
    "half weights 2", "rename 4", "before rename 5",
]  # fmt: skip


@pytest.fixture(autouse=True)
def exact():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def config_path(tmp_path_factory, town_root) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.py"
    path.write_text(CONFIG.format(root=str(town_root), version=VERSION))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, config_path) -> Path:
    """The folder of a training that nothing interrupts: three epochs of four steps."""
    folder = tmp_path_factory.mktemp("whole") / "work"
    with one_thread():
        train(load_config(config_path), folder, seed=5)
    return folder


def results(folder: Path) -> dict:
    """Everything that a training leaves, as comparable values; times are left out."""
    checkpoint = torch.load(folder / "epoch_3.pth", weights_only=True)
    meta = checkpoint.pop("meta")
    found = {"checkpoint": content_hash(checkpoint), "settings": meta["settings"], "iter": meta["iter"]}
    for name in ("small", "small-last"):
        path = folder / f"{name}.safetensors"
        found[name] = content_hash(load_model(path).state_dict())
        found[f"{name} metrics"] = {key: value for key, value in read_metrics(path).items() if key != "fps"}
    found["files"] = sorted(path.name for path in folder.iterdir() if path.suffix in (".pth", ".safetensors", ".tmp"))
    return found


def copy_of(whole: Path, folder: Path, epoch: int) -> Path:
    """The folder as it was after an epoch and its validation, without what came later."""
    shutil.copytree(whole, folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    for path in folder.glob("epoch_*.pth"):
        if path.name != f"epoch_{epoch}.pth":
            path.unlink()
    return folder


def survive(config_path: Path, out: Path, moments: list[str]) -> list[Path]:
    script = Path(__file__).parent / "killed_training.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    out.mkdir()
    done = subprocess.run(
        [sys.executable, script, config_path, out, json.dumps(moments)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [Path(folder) for folder in json.loads(done.stdout.splitlines()[-1])]


@pytest.mark.slow
def test_kills_lose_nothing(config_path, whole, tmp_path):
    """At 17 chosen places and after 25 random times."""
    times = np.random.default_rng(0).uniform(0.05, 3.0, 25).round(2)
    folders = survive(config_path, tmp_path / "killed", [*AIMED, *(f"{seconds} s" for seconds in times)])
    for folder in folders:
        assert results(folder) == results(whole)


def test_resuming_a_finished_training_changes_nothing(config_path, whole, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    train(load_config(config_path), folder, seed=5, resume=True)
    assert results(folder) == results(whole)


def test_a_validation_that_was_cut_off_is_made_up(config_path, whole, tmp_path):
    """After a kill in the last validation the weights of the epoch before are there; resuming brings the newest."""
    folder = copy_of(whole, tmp_path / "work", 3)
    train(load_config(config_path), folder, seed=5, resume=True)
    assert read_metrics(folder / "small-last.safetensors")["epoch"] == 3
    assert content_hash(load_model(folder / "small-last.safetensors").state_dict()) == content_hash(
        load_model(whole / "small-last.safetensors").state_dict()
    )


@pytest.mark.parametrize("damage", ["torn", "empty", "flipped", "page"])
def test_a_damaged_checkpoint_is_skipped(config_path, whole, tmp_path, damage):
    folder = copy_of(whole, tmp_path / "work", 2)
    newest = folder / "epoch_3.pth"
    shutil.copy(whole / "epoch_3.pth", newest)
    content = newest.read_bytes()
    if damage == "flipped":  # one bit of a tensor: the archive's own checks are not read by torch
        position = content.index(
            torch.load(newest, weights_only=True)["state_dict"]["core.cell_position.weight"].numpy().tobytes()
        )
        content = content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
    newest.write_bytes(
        {"torn": content[: len(content) // 2], "empty": b"", "flipped": content, "page": b"<html>Not found</html>"}[
            damage
        ]
    )
    with pytest.warns(PerceptionWarning, match=r"epoch_3\.pth is damaged"):
        checkpoint = WorkDir(folder, "small").newest()
    assert checkpoint["meta"]["epoch"] == 2
    (folder / "epoch_2.pth").unlink()
    with pytest.raises(CheckpointError, match=r"no readable checkpoint.*--overwrite"), pytest.warns(PerceptionWarning):
        WorkDir(folder, "small").newest()


def test_no_damage_goes_unnoticed(whole, tmp_path):
    """Bytes changed anywhere in the file: it is read as it was written, or not at all."""
    content = (whole / "epoch_3.pth").read_bytes()
    expected = content_hash(torch.load(whole / "epoch_3.pth", weights_only=True))
    rng, found = np.random.default_rng(0), []
    for _ in range(15):
        damaged, start = bytearray(content), int(rng.integers(len(content)))
        for place in range(start, min(start + int(rng.integers(1, 400)), len(content))):
            damaged[place] = int(rng.integers(256))
        (tmp_path / "epoch_3.pth").write_bytes(damaged)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                checkpoint = WorkDir(tmp_path, "small").newest()
            except CheckpointError:
                assert any("is damaged" in str(warning.message) for warning in caught)
                found.append("refused")
            else:
                assert content_hash(checkpoint) == expected  # the bytes were padding
                found.append("read")
    assert found.count("refused") > 8


def test_a_moved_and_a_copied_folder_go_on_with_their_own_files(config_path, whole, tmp_path):
    """A pointer to another place, as older programs leave one, is neither followed nor opened."""
    original = copy_of(whole, tmp_path / "original", 2)
    copy = tmp_path / "copy"
    shutil.copytree(original, copy)
    (original / "epoch_2.pth").write_bytes(b"not of the copy")
    (copy / "last_checkpoint").write_text("https://example.org/epoch_9.pth")
    train(load_config(config_path), copy, seed=5, resume=True)
    assert results(copy)["checkpoint"] == results(whole)["checkpoint"]


def test_nothing_in_a_checkpoint_is_run(config_path, whole, tmp_path):
    folder, canary = copy_of(whole, tmp_path / "work", 2), tmp_path / "canary"
    program = f"open({str(canary)!r}, 'w').write('run')"
    content = torch.load(folder / "epoch_2.pth", weights_only=True)
    content["meta"] |= {"config": program, "cfg": program}
    content["meta"]["sha256"] = content_hash(content)
    torch.save(content, folder / "epoch_2.pth")
    train(load_config(config_path), folder, seed=5, resume=True)
    assert not canary.exists() and (folder / "epoch_3.pth").exists()


def test_work_is_not_overwritten_unless_asked(config_path, whole, tmp_path):
    config, folder = load_config(config_path), tmp_path / "work"
    shutil.copytree(whole, folder)
    before = results(folder)
    with pytest.raises(ConfigError, match=r"already holds epoch_3\.pth .* --resume .* --overwrite"):
        train(config, folder, seed=6)
    assert results(folder) == before
    for path in folder.glob("*.pth"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"already holds small\.safetensors"):  # weights alone are work too
        train(config, folder, seed=6)
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        train(config, folder, seed=5, resume=True)
    with pytest.raises(ConfigError, match="exclude each other"):
        train(config, folder, resume=True, overwrite=True)
    train(config, folder, seed=5, overwrite=True)
    assert results(folder) == before


def test_one_training_at_a_time(config_path, tmp_path):
    with locked(tmp_path / ".lock"), pytest.raises(ConfigError, match="another training is running"):
        train(load_config(config_path), tmp_path, seed=5)


@pytest.mark.slow
def test_changed_settings_are_refused_or_taken(config_path, whole, tmp_path):
    folder = copy_of(whole, tmp_path / "work", 2)

    def resume(options=None, **arguments):
        train(load_config(config_path, options), folder, **{"seed": 5, "resume": True} | arguments)

    with pytest.raises(ConfigError, match=r"other settings: seed 5 -> 6; give the old value"):
        resume(seed=6)
    with pytest.raises(ConfigError, match=r"seed 5 -> 6"):
        resume(seed=6, allow_change=True)
    with pytest.raises(ConfigError, match=r"model\.channels 16 -> 24"):
        resume({"model.channels": 24}, allow_change=True)
    with pytest.raises(ConfigError, match=r"train\.batch_size 1 -> 2"):
        resume({"train.batch_size": 2}, allow_change=True)
    with pytest.raises(ConfigError, match=r"train\.epochs 2 -> 3; add --allow-change"):
        resume({"train.epochs": 3})
    resume({"train.epochs": 3, "train.workers": 1}, allow_change=True)
    # The learning rate is that of a training of this length from the start.
    longer = tmp_path / "longer"
    train(load_config(config_path, {"train.epochs": 3}), longer, seed=5)
    rates = [
        [group["lr"] for group in torch.load(path / "epoch_4.pth", weights_only=True)["optimizer"]["param_groups"]]
        for path in (folder, longer)
    ]
    assert rates[0] == rates[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_the_batches_that_are_done(config_path, whole, tmp_path, monkeypatch, number):
    """In the middle of an epoch: the memory, the place in the epoch and the averaged weights are restored."""
    run_iter, calls = loops.StreamTrainLoop.run_iter, []

    def interrupted(self, idx, data_batch):
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), number)
        run_iter(self, idx, data_batch)

    monkeypatch.setattr(loops.StreamTrainLoop, "run_iter", interrupted)
    folder = tmp_path / "work"
    with pytest.raises(Interrupted, match=rf"{number.name} after batch 3 of epoch 2; .*--resume") as stop:
        train(load_config(config_path), folder, seed=5)
    assert stop.value.signal_number == number and (folder / "epoch_1_batch_3.pth").exists()
    train(load_config(config_path), folder, seed=5, resume=True)
    assert len(calls) == 12 and results(folder) == results(whole)


@pytest.mark.slow
def test_long_epochs_have_checkpoints_inside(config_path, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(loops, "SAVE_SECONDS", 0)
    saved = []
    save = WorkDir.save
    monkeypatch.setattr(WorkDir, "save", lambda *arguments: saved.append(save(*arguments).name))
    train(load_config(config_path), tmp_path / "work", seed=5)
    assert saved[:5] == [
        "epoch_0_batch_1.pth",
        "epoch_0_batch_2.pth",
        "epoch_0_batch_3.pth",
        "epoch_1.pth",
        "epoch_1_batch_1.pth",
    ]
    assert results(tmp_path / "work") == results(whole)


def test_a_signal_in_a_validation_ends_at_once(config_path, tmp_path, monkeypatch):
    monkeypatch.setattr(loops, "predict_shared", lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="SIGTERM with its last checkpoint"):
        train(load_config(config_path), tmp_path / "work", seed=5)
    assert (tmp_path / "work" / "epoch_2.pth").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_command_that_is_terminated_cleans_up(tmp_path):
    """SIGTERM ends a command like an error: temporary files go, the exit code is that of the signal."""
    script = (
        "import os, signal, sys, tempfile\n"
        "from perception.errors import run_script\n"
        "from perception.files import replacing\n"
        "def main():\n"
        "    with replacing(sys.argv[1]) as temporary, tempfile.TemporaryDirectory(dir=os.path.dirname(sys.argv[1])):\n"
        "        temporary.write_text('half')\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "run_script(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 143 and done.stderr.startswith("interrupted: ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_training_has_the_exit_code_of_its_signal(capsys):
    def main():
        raise Interrupted("the training was stopped", signal.SIGINT)

    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert end.value.code == 130 and capsys.readouterr().err == "interrupted: the training was stopped\n"


def test_leftovers_of_dead_processes_go_and_threads_do_not_meet(tmp_path):
    path = tmp_path / "numbers.json"
    process = os.fork()
    if process == 0:
        with replacing(path) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    (left,) = tmp_path.iterdir()
    barrier = threading.Barrier(4)
    errors = []

    def write(number: int) -> None:
        try:
            with replacing(path) as temporary:
                temporary.write_text(str(number))
                barrier.wait()
                assert temporary.read_text() == str(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and not left.exists() and list(tmp_path.iterdir()) == [path] and path.read_text() in "0123"


def killed(moment: str, work) -> None:
    """Runs a function in a child process that is killed at a moment; see `killed_training.arm`."""
    process = os.fork()
    if process == 0:
        tqdm.set_lock(
            threading.RLock()
        )  # the one of tqdm is shared with this process, which would wait for it for ever
        killed_training.arm(moment)
        work()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL, moment


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_killed_evaluation_leaves_whole_submissions_of_one_network(config_path, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def evaluate(out: str):
        cli.main(["evaluate", str(config_path), str(whole / "small.safetensors"), "--save-submission", out])

    evaluate("whole")
    expected = files(tmp_path / "whole")
    assert expected.keys() == {"detection.json", "lanes.json"}
    for moment in ("before rename 1", "rename 1", "before rename 2", "rename 2"):
        (tmp_path / "work").mkdir(exist_ok=True)
        for name in expected:
            (tmp_path / "work" / name).write_text("of another network")
        killed(moment, lambda: evaluate("work"))
        left = {path.name: path.read_bytes() for path in (tmp_path / "work").iterdir() if path.suffix == ".json"}
        assert {name: content == expected[name] for name, content in left.items()} in (
            {"detection.json": False}, {"detection.json": True}, {"detection.json": True, "lanes.json": True},
        ), moment  # fmt: skip
        evaluate("work")
        assert files(tmp_path / "work") == expected


@pytest.mark.slow
def test_a_killed_export_is_refused_by_the_runtime_and_made_good_by_the_next(small_network, small_graph, tmp_path):
    """The contract holds the hash of the graph, so the files of two exports do not pass for one."""
    from perception.export.onnx import export_onnx
    from perception.export.runtime import Runtime

    def export(folder: Path, **options):
        return export_onnx(small_network, folder, raw_size=RAW, graph=small_graph, **options)

    expected = files(export(tmp_path / "whole"))
    for moment in ("before rename 1", "rename 1", "before rename 2", "rename 2"):
        work = export(tmp_path / moment.replace(" ", "_"), precision="fp16")  # an older export in the folder
        killed(moment, lambda work=work: export(work))
        try:
            runtime = Runtime(work)
        except PerceptionError as error:
            assert moment == "rename 1" or moment == "before rename 2", error
        else:
            assert runtime.contract["precision"] == ("fp32" if moment == "rename 2" else "fp16")
        export(work)
        assert files(work) == expected


def test_what_was_just_saved_stays_next_to_a_damaged_file_of_a_higher_number(tmp_path):
    folder = WorkDir(tmp_path, "small")
    for epoch in (1, 2, 3):
        folder.save({"meta": {}}, epoch, 0)
    (tmp_path / "epoch_3.pth").write_bytes(b"")
    folder.save({"meta": {}}, 2, 5)
    assert [path.name for path in folder.checkpoints()] == ["epoch_3.pth", "epoch_2_batch_5.pth", "epoch_2.pth"]
    folder.save({"meta": {}}, 3, 0)
    assert [path.name for path in folder.checkpoints()] == ["epoch_3.pth", "epoch_2.pth"]
