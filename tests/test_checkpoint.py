"""Weights files that are damaged, foreign or wrapped: read right, or named in one sentence."""

import json
from dataclasses import asdict, replace

import pytest
import safetensors.torch
import torch

from perception.cli.import_checkpoint import main as import_checkpoint
from perception.engine.weights import load_weights
from perception.errors import CheckpointError
from perception.models import NETWORKS, preset_config
from perception.models.backbone import read_backbone_weights
from perception.models.checkpoint import (
    _config,
    import_published,
    library_key,
    load_model,
    read_metrics,
    save_checkpoint,
)
from perception.models.foreign import state_dict_of


@pytest.fixture(scope="module")
def published(official_keys) -> dict[str, torch.Tensor]:
    """Weights with the keys of BEVFormer-tiny. Each is one number, so that a file of them is small."""
    shapes = json.loads((official_keys / "bevformer_tiny.json").read_text())
    return {
        key: torch.tensor(7) if key.endswith("num_batches_tracked") else torch.tensor([k / 512]).expand(shape)
        for k, (key, shape) in enumerate(shapes.items())
    }


def prefixed(prefix, weights):
    return {prefix + key: tensor for key, tensor in weights.items()}


WRAPPED = {
    "alone": lambda w: w,
    "state_dict": lambda w: {"meta": {"epoch": 24}, "state_dict": w, "optimizer": {"state": {}}},
    "model": lambda w: {"model": w, "epoch": 3},
    "model, then state_dict": lambda w: {"model": {"state_dict": w}},
    "DataParallel": lambda w: {"state_dict": prefixed("module.", w)},
    "compiled DataParallel": lambda w: prefixed("_orig_mod.module.", w),
    "Lightning": lambda w: {"state_dict": prefixed("model.", w), "hyper_parameters": {}},
    "averaged by mmengine": lambda w: {"ema_state_dict": prefixed("module.", w) | {"steps": torch.tensor(5)}},
    "averaged by mmcv": lambda w: {
        "state_dict": w | {f"ema_{key.replace('.', '_')}": tensor + 1 for key, tensor in w.items()}
    },
    "ema_": lambda w: prefixed("ema_", w),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrapped_state_dicts_are_found(published, how):
    found = state_dict_of(WRAPPED[how](published))
    assert found.keys() == published.keys() and all(found[key] is tensor for key, tensor in published.items())


def test_a_wrapped_checkpoint_in_half_precision_is_imported(published, tmp_path, capsys):
    halves = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in published.items()}
    averaged = WRAPPED["averaged by mmcv"](halves)["state_dict"]
    torch.save({"state_dict": prefixed("module.", averaged)}, tmp_path / "half.pth")
    import_checkpoint([str(tmp_path / "half.pth"), "--out", str(tmp_path / "half.safetensors")])
    assert "is bevformer_tiny, 33.52 M parameters" in capsys.readouterr().out
    state = load_model(tmp_path / "half.safetensors").state_dict()
    prefixes = NETWORKS["bevformer"][1].published_prefixes
    assert len(state) == len(published)
    for key, tensor in published.items():
        found = state[library_key(key, prefixes)]
        assert found.dtype == tensor.dtype and torch.equal(found, tensor.half().to(found.dtype)), key


def test_left_over_keys_are_not_accepted(published, tmp_path, small_network):
    torch.save(published | {"pts_bbox_head.extra": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(CheckpointError, match=r"nearest is bevformer_tiny, with 1 keys .* the first head\.extra"):
        import_published(tmp_path / "more.pth")
    path = tmp_path / "more.safetensors"
    save_checkpoint(path, small_network, {})
    with safetensors.safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    safetensors.torch.save_file(tensors | {"extra": torch.zeros(1)}, path, metadata)
    with pytest.raises(CheckpointError, match=r"extra has shape .* the network has no such key"):
        load_model(path)


def test_what_is_no_checkpoint_is_named(published, tmp_path):
    torch.save({"state_dict": published}, tmp_path / "good.pth")
    good = (tmp_path / "good.pth").read_bytes()
    torch.save({"state_dict": published}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    old = (tmp_path / "old.pth").read_bytes()
    key = "pts_bbox_head.code_weights"
    bad = published[key].clone()
    bad[3] = float("nan")
    torch.save(published | {key: bad}, tmp_path / "nan.pth")
    contents = {
        "is truncated; copy or download it again": (
            good[: len(good) // 2],
            good[:-40],
            good[:100],
            old[: len(old) // 2],
        ),
        "is a web page; download the file behind": (b"\n <!DOCTYPE html><html></html>", b"<html>", b"<?xml version="),
        "is empty": (b"", b" \n"),
        "is a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",),
        "not readable as plain tensors": (b"hello", b"PKhello"),
        r"code_weights holds numbers that are not finite": ((tmp_path / "nan.pth").read_bytes(),),
    }
    for message, datas in contents.items():
        for data in datas:
            (tmp_path / "bad.pth").write_bytes(data)
            for read in (import_published, read_backbone_weights):
                with pytest.raises(CheckpointError, match=message) as caught:
                    read(tmp_path / "bad.pth")
                assert "\n" not in str(caught.value) and str(caught.value).startswith(str(tmp_path / "bad.pth"))
    for content in ([1], {}, {"state_dict": {}}, {"state_dict": {"a": 3}}, {"state_dict": {3: torch.zeros(1)}}, 7):
        torch.save(content, tmp_path / "bad.pth")
        with pytest.raises(CheckpointError, match="holds no state dict"):
            import_published(tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="is a safetensors file"):
        (tmp_path / "a.safetensors").write_bytes(b"x")
        import_published(tmp_path / "a.safetensors")


def test_metadata_of_every_preset_is_read_back():
    for kind, network in NETWORKS.values():
        for name in kind.presets():
            config = preset_config(name)
            assert _config(kind, json.loads(json.dumps(asdict(config)))) == config, (name, network)


def rewritten(path, **changes):
    """Writes a weights file again with other metadata; None removes an entry."""
    with safetensors.safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    metadata = {key: value for key, value in (metadata | changes).items() if value is not None}
    safetensors.torch.save_file(tensors, path.with_name("other.safetensors"), metadata)
    return path.with_name("other.safetensors")


def test_damaged_metadata_gets_a_sentence(small_network, tmp_path):
    path = tmp_path / "small.safetensors"
    save_checkpoint(path, small_network, {"nds": 0.5})
    config = small_network.config
    faults = {
        None: "metadata config is not a JSON object", "{": "not a JSON object", "[]": "not a JSON object",
        "[" * 10_000: "not a JSON object",
    }  # fmt: skip
    for changes, message in (
        ({"channels": "sixteen"}, 'channels is "sixteen"'), ({"channels": 16.5}, "channels is 16.5"),
        ({"channels": True}, "channels is true"), ({"channels": -16}, "channels is -16"),
        ({"channels": 10**12}, "channels is 1000000000000"), ({"grid": (10**5, 10**5)}, "grid is"),
        ({"grid": (20, 0)}, "grid is"), ({"x_range": (51.2, -51.2)}, r"x_range is \[51.2, -51.2\]"),
        ({"heights": (0.0, float("nan"), 2.0)}, "heights is NaN"), ({"lane_range": (60.0, -30.0)}, "lane_range is"),
        ({"chanels": 16}, 'Config has no "chanels"'), ({"backbone": "vgg"}, "does not fit this version"),
        ({"heads": 0}, "does not fit this version"), ({"image_size": 40}, "image_size is 40"),
    ):  # fmt: skip
        faults[json.dumps(asdict(config) | changes)] = message
    for text, message in faults.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            load_model(rewritten(path, config=text))
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match='architecture "resnet" is unknown'):
        load_model(rewritten(path, architecture="resnet"))
    for metrics in (None, "7", "nan", "{"):
        with pytest.raises(CheckpointError, match="metadata metrics is not a JSON object"):
            read_metrics(rewritten(path, metrics=metrics))
    assert load_model(rewritten(path)).config == replace(config)


def test_weights_that_are_not_finite_or_of_another_type_are_named(small_network, tmp_path):
    path = tmp_path / "small.safetensors"
    save_checkpoint(path, small_network, {})
    with safetensors.safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    name = next(key for key, tensor in tensors.items() if tensor.ndim > 1)
    for change, message in (
        (lambda x: x.clone().fill_(float("inf")), "not finite"), (lambda x: x.int(), r"is torch\.int32"),
        (lambda x: x.bfloat16(), r"is torch\.bfloat16"),
    ):  # fmt: skip
        safetensors.torch.save_file(tensors | {name: change(tensors[name])}, path, metadata)
        with pytest.raises(CheckpointError, match=f"{name} .*{message}"):
            load_model(path)
    training = {f"core.{key}": tensor for key, tensor in small_network.state_dict().items()}
    torch.save({"state_dict": training}, tmp_path / "epoch_1.pth")
    assert load_weights(tmp_path / "epoch_1.pth", small_network.config).config == small_network.config
    training[f"core.{name}"] = tensors[name].clone().fill_(float("nan"))
    torch.save({"state_dict": training}, tmp_path / "epoch_1.pth")
    with pytest.raises(CheckpointError, match=rf"epoch_1\.pth: {name} holds numbers that are not finite"):
        load_weights(tmp_path / "epoch_1.pth", small_network.config)
