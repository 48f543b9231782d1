"""A new network is one file and one line in a table; training, evaluation, live use and export take it as it is."""

import pytest
import torch
from toy_network import ToyConfig, ToyNetwork

from perception.engine.config import build_dataset, load_config
from perception.engine.training import train
from perception.engine.weights import load_weights
from perception.errors import ConfigError
from perception.evaluation.dataset import evaluate_dataset
from perception.export.onnx import export_onnx
from perception.export.parity import certify
from perception.inference.predictor import Predictor
from perception.models import NETWORKS, build_network
from perception.models.base import Network
from perception.synthetic import VERSION
from perception.types import map_tensors

CONFIG = """
model = dict(preset="toy")
train_data = dict(dataroot={root!r}, version={version!r}, split="town_val")
val_data = dict(dataroot={root!r}, version={version!r}, split="town_val")
train = dict(
    image_epochs=0, epochs=1, batch_size=1, streams=1, frames_per_clip=2, drop_frames=0.0, lr=2e-3, weight_decay=0.01,
    warmup_iters=2, grad_clip=10.0, ema_momentum=0.0, val_every=1, log_every=1, workers=0,
)
"""


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(NETWORKS, "toy", (ToyConfig, ToyNetwork))


@pytest.mark.slow
def test_a_network_in_one_file_goes_the_whole_way(town_root, small_town, tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(CONFIG.format(root=str(town_root), version=VERSION))
    config = load_config(path)
    trained = train(config, tmp_path / "work", seed=1)
    untrained = build_network(config.model)
    assert type(trained) is ToyNetwork and not torch.equal(trained.head[2].weight, untrained.head[2].weight)

    weights = tmp_path / "work" / "toy-last.safetensors"
    network = load_weights(weights, config.model)
    dataset = build_dataset(config.val_data, config.model)
    evaluation, stream = evaluate_dataset(network, dataset)
    assert 0 <= evaluation.metrics()["nds"] < 1 and evaluation.metrics()["lane_mAP"] == 0

    clip = map_tensors(lambda tensor: tensor[0], dataset[0].frames)
    images = clip.images.permute(0, 2, 3, 1).numpy()
    objects = Predictor(weights, precision="float32").step(images, clip.rig, dataset.ego_pose(0), 0.0)
    assert torch.allclose(objects.boxes.center, stream.objects[dataset.tokens[0]].boxes.center, atol=1e-4)
    assert len(objects.lines.score) == 0

    folder = export_onnx(network, tmp_path / "export", raw_size=(64, 112))
    certificate = certify(network, folder, small_town)
    assert certificate.failures == [] and set(certificate.replays[0].raw) == {"raw_box"}


def test_losses_may_be_left_out_and_mistakes_are_named(town_root, tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(CONFIG.format(root=str(town_root), version=VERSION))
    with pytest.raises(ConfigError, match=r"the losses are box_class, box_params"):
        train(load_config(path, {"train.disabled_losses": ("heatmap",)}), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"train\.image_epochs must be 0"):
        train(load_config(path, {"train.image_epochs": 1}), tmp_path / "b")
    with pytest.raises(ConfigError, match=r"unknown key model\.chanels; did you mean model\.channels"):
        load_config(path, {"model.chanels": 3})


def test_the_class_keeps_the_protocol():
    """`Network` names everything that the library reads of a network."""
    for _, network in NETWORKS.values():
        wanted = {name for name in (*Network.__annotations__, *vars(Network)) if not name.startswith("_")}
        wanted -= {"config", "image_encoder"}  # of instances
        assert not [name for name in wanted if not hasattr(network, name)]
        assert {name.split("_")[0] for name in network.raw_names} == set(network.finds)
