"""The work directory of a training: names, order, damage, and comparison of settings, without a training."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from perception.engine import checkpoints
from perception.engine.checkpoints import CHANGEABLE, WorkDir, changed_settings, content_hash, plain, settings_of
from perception.engine.config import load_config
from perception.errors import CheckpointError, ConfigError, PerceptionWarning


def content(number: float = 1.0) -> dict:
    return {
        "meta": {"seed": 3, "note": "a"},
        "model": {"weight": torch.arange(6.0).view(2, 3) * number, "steps": torch.tensor(7)},
        "optimizer": [{"lr": 1e-3}, {"lr": 2e-3, "state": (torch.ones(2, dtype=torch.bfloat16), None)}],
    }


def test_what_was_saved_is_read(tmp_path):
    folder = WorkDir(tmp_path, "small")
    assert folder.newest() is None and folder.work() == []
    assert folder.save(content(), 1, 0) == tmp_path / "epoch_1.pth"
    assert folder.save(content(2.0), 1, 40) == tmp_path / "epoch_1_batch_40.pth"
    found = folder.newest()
    assert found["meta"] | {"sha256": ""} == {
        "seed": 3, "note": "a", "format": "perception-training-1", "epoch": 1, "batch": 40, "sha256": "",
    }  # fmt: skip
    assert torch.equal(found["model"]["weight"], torch.arange(6.0).view(2, 3) * 2) and found["model"]["steps"] == 7
    assert found["optimizer"][1]["lr"] == 2e-3 and found["optimizer"][1]["state"][0].dtype == torch.bfloat16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_1.pth", "epoch_1_batch_40.pth"]


def test_checkpoints_are_ordered_by_their_numbers(tmp_path):
    folder = WorkDir(tmp_path, "small")
    names = ["epoch_10_batch_9.pth", "epoch_10_batch_10.pth", "epoch_9.pth", "epoch_10.pth", "epoch_2_batch_100.pth"]
    for name in (*names, "epoch_x.pth", "epoch_3.pth.tmp", "last.pth", "epoch_11.pt"):
        (tmp_path / name).write_bytes(b"")
    expected = ["epoch_10_batch_10.pth", "epoch_10_batch_9.pth", "epoch_10.pth", "epoch_9.pth", "epoch_2_batch_100.pth"]
    assert [path.name for path in folder.checkpoints()] == expected
    (tmp_path / "small.safetensors").write_bytes(b"")
    (tmp_path / "other.safetensors").write_bytes(b"")
    assert [path.name for path in folder.work()] == [*expected, "small.safetensors"]
    folder.prune(tmp_path / "epoch_2_batch_100.pth")  # two finished epochs, and the one given
    assert [path.name for path in folder.checkpoints()] == ["epoch_10.pth", "epoch_9.pth", "epoch_2_batch_100.pth"]
    folder.clear()
    left = {"epoch_x.pth", "epoch_3.pth.tmp", "last.pth", "epoch_11.pt", "other.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_a_damaged_checkpoint_and_one_of_another_format_are_skipped(tmp_path, monkeypatch):
    folder = WorkDir(tmp_path, "small")
    folder.save(content(), 1, 0)
    monkeypatch.setattr(checkpoints, "FORMAT", "perception-training-0")
    folder.save(content(), 2, 0)
    monkeypatch.undo()
    with pytest.warns(PerceptionWarning, match=r"epoch_2\.pth .*its format is 'perception-training-0'") as caught:
        assert folder.newest()["meta"]["epoch"] == 1
    assert caught[0].filename == __file__  # the line that asked
    changed = torch.load(tmp_path / "epoch_1.pth", weights_only=True)
    changed["model"]["weight"][0, 0] = 1e-7
    torch.save(changed, tmp_path / "epoch_1.pth")
    with (
        pytest.warns(PerceptionWarning, match="does not have the hash"),
        pytest.raises(
            CheckpointError, match=r"holds epoch_2\.pth but no readable checkpoint to go on from; add --overwrite"
        ),
    ):
        folder.newest()


def test_nothing_in_a_checkpoint_is_run(tmp_path):
    class Canary:
        def __reduce__(self):
            return Path.write_text, (tmp_path / "canary", "was run")

    folder = WorkDir(tmp_path, "small")
    torch.save({"meta": {"format": checkpoints.FORMAT}, "model": Canary()}, tmp_path / "epoch_1.pth")
    with pytest.warns(PerceptionWarning, match=r"epoch_1\.pth is damaged"), pytest.raises(CheckpointError):
        folder.newest()
    assert not (tmp_path / "canary").exists()


def test_exported_weights_alone_are_work_that_cannot_go_on(tmp_path):
    folder = WorkDir(tmp_path, "small")
    folder.last.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"holds small-last\.safetensors but no readable checkpoint"):
        folder.newest()


def test_a_second_training_is_refused_while_the_first_runs(tmp_path):
    with WorkDir(tmp_path, "a").lock():
        with pytest.raises(ConfigError, match="another training is running in"), WorkDir(tmp_path, "b").lock():
            pass
    with WorkDir(tmp_path, "b").lock():
        pass


def test_the_hash_sees_every_change_but_its_own(tmp_path):
    good = plain(content())
    expected = content_hash(good)
    assert content_hash(copy.deepcopy(good)) == expected
    marked = copy.deepcopy(good)
    marked["meta"]["sha256"] = "abc"
    assert content_hash(marked) == expected

    def with_change(change) -> str:
        changed = copy.deepcopy(good)
        change(changed)
        return content_hash(changed)

    changes = [
        lambda c: c["meta"].update(seed=4), lambda c: c["meta"].update(more=1), lambda c: c["meta"].pop("note"),
        lambda c: c.update(sha256="abc"), lambda c: c["model"].update(sha256=1),
        lambda c: c["model"]["weight"].view(-1)[5].mul_(1.0000002), lambda c: c["model"].update(steps=torch.tensor(8)),
        lambda c: c["model"].update(weight=c["model"]["weight"].view(3, 2)),
        lambda c: c["model"].update(steps=torch.tensor(7, dtype=torch.int32)), lambda c: c["optimizer"].reverse(),
        lambda c: c["optimizer"][1]["state"].__setitem__(1, 0), lambda c: c["optimizer"][0].update(lr="0.001"),
    ]  # fmt: skip
    hashes = {with_change(change) for change in changes}
    assert len(hashes) == len(changes) and expected not in hashes


def test_plain_keeps_values_and_needs_no_code():
    class Settings(dict):
        pass

    value = plain(Settings(a=(1, [torch.ones(2, requires_grad=True)], "b"), c=Settings(d=None)))
    assert type(value) is dict and type(value["c"]) is dict and value["a"][0] == 1 and value["a"][2] == "b"
    assert not value["a"][1][0].requires_grad


@pytest.fixture(scope="module")
def config():
    return load_config("synthetic/nano", {})


def test_settings_are_everything_that_is_learned_from(config):
    settings = settings_of(config, seed=3, amp=True, **{"train_data.samples": "hash"})
    assert settings["seed"] == 3 and settings["amp"] is True and json.loads(json.dumps(settings)) == settings
    assert settings["train.epochs"] == config.train.epochs and settings["model.channels"] == config.model.channels
    assert settings["model.image_size"] == list(config.model.image_size)
    for key in ("train.workers", "train.log_every", "train_data.make_with", "val_data.make_with"):
        section, name = key.split(".")
        assert hasattr(getattr(config, section), name) and key not in settings
    assert set(CHANGEABLE) <= settings.keys()


def test_changes_are_named_refused_or_taken(tmp_path):
    before = {"train.epochs": 4, "model.channels": 64, "seed": 0, "gone": 1}
    assert changed_settings(tmp_path, before, dict(before), False) == {}
    longer = before | {"train.epochs": 8}
    with pytest.raises(ConfigError, match=r"other settings: train\.epochs 4 -> 8; add --allow-change to go on"):
        changed_settings(tmp_path, before, longer, False)
    assert changed_settings(tmp_path, before, longer, True) == {"train.epochs": (4, 8)}
    wider = longer | {"model.channels": 32}
    with pytest.raises(ConfigError, match=r"settings: model\.channels 64 -> 32; give the old value, or start in"):
        changed_settings(tmp_path, before, wider, True)
    with pytest.raises(ConfigError, match=r"model\.channels 64 -> 32, train\.epochs 4 -> 8; give the old value"):
        changed_settings(tmp_path, before, wider, False)
    new = {"train.epochs": 4, "model.channels": 64, "seed": 0, "new": np.pi}
    with pytest.raises(ConfigError, match=r"gone 1 -> null or missing, new null or missing -> 3\.14"):
        changed_settings(tmp_path, before, new, True)
