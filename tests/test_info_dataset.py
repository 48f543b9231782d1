"""Info files of mmdet3d as datasets: written from tables and read again, they are the tables."""

import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from conftest import RAW, one_thread

from perception.cli.prepare_nuscenes import main as prepare_nuscenes
from perception.data.info_dataset import open_infos
from perception.data.nuscenes import NuScenesDataset
from perception.engine.config import build_dataset, load_config
from perception.engine.training import train
from perception.errors import ConfigError, DataError, PerceptionWarning
from perception.evaluation.dataset import check_evaluable, evaluate_predictions
from perception.geometry import wrap_angle
from perception.inference.sequence import predict_stream
from perception.synthetic import VERSION
from perception.types import FrameObjects, map_tensors

CONFIG = """
model = dict(preset="nano", image_size=(64, 96), grid=(20, 20), channels=16, depth_bins=8, backbone_stages=2,
             decoder_layers=2, box_queries=20, line_queries=8)
train_data = dict(infos={infos!r}, augment=dict())
val_data = dict(infos={infos!r})
train = dict(image_epochs=0, epochs=1, batch_size=1, streams=1, frames_per_clip=4, drop_frames=0.0, lr=2e-3,
             weight_decay=0.01, warmup_iters=2, grad_clip=10.0, ema_momentum=0.0, val_every=1, log_every=1, workers=0)
"""


@pytest.fixture(scope="module")
def town(town_root):
    return NuScenesDataset(town_root, VERSION, "town_val", image_size=RAW)


@pytest.fixture
def layout(town_root, tmp_path):
    """A folder with the parts of the town beside which an info file lies."""
    for part in (VERSION, "samples", "maps"):
        (tmp_path / part).symlink_to(town_root / part)
    return tmp_path


@pytest.fixture
def infos(layout, town_root):
    path = layout / "infos.pkl"
    prepare_nuscenes(
        ["infos", "--dataroot", str(town_root), "--version", VERSION, "--split", "town_val", "--out", str(path)]
    )
    return path


def changed(path, change):
    content = pickle.loads(path.read_bytes())
    change(content)
    path.write_bytes(pickle.dumps(content))


def test_infos_that_were_written_are_the_tables(infos, town):
    found, wanted = open_infos(infos, image_size=RAW).index, town.index
    exact = {"token", "timestamp_us", "scene", "previous", "scene_name", "box_offset", "box_label", "box_points",
             "box_attribute", "img_from_cam", "image_size"}  # fmt: skip
    assert (wanted.box_attribute >= 0).any() and np.isfinite(wanted.box_velocity).all()
    for name in exact:
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name)
    for name in ("global_from_ego", "ego_from_lidar", "ego_from_cam", "ego_from_exposure"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), atol=1e-8, err_msg=name)
    np.testing.assert_allclose(wrap_angle(found.box_yaw - wanted.box_yaw), 0, atol=1e-5)
    for name in ("box_center", "box_size", "box_velocity"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), atol=1e-5, err_msg=name)
    for part in ("lines", "wide_lines"):
        for f, w in zip(getattr(found, part), getattr(wanted, part), strict=True):
            np.testing.assert_allclose(f, w, atol=1e-4)
    assert len(found.lines.label) > 0


def test_a_network_trains_on_infos_and_has_the_metrics_of_the_tables(infos, town_root, tmp_path, capsys):
    path = tmp_path / "infos.py"
    path.write_text(CONFIG.format(infos=str(infos)))
    config = load_config(path, {"train.epochs": 2})
    with one_thread():
        network = train(config, tmp_path / "work").eval()  # two steps in each epoch
    of_infos = build_dataset(config.val_data, config.model)
    of_tables = NuScenesDataset(town_root, VERSION, "town_val", image_size=(64, 96))
    streams = [predict_stream(network, dataset).objects for dataset in (of_infos, of_tables)]
    for token, objects in streams[1].items():
        torch.testing.assert_close(streams[0][token].boxes.center, objects.boxes.center, atol=1e-3, rtol=1e-3)
    # Predictions that score: the ground truth, a little off.
    generator = torch.Generator().manual_seed(3)
    predictions = {}
    for i, token in enumerate(of_tables.tokens):
        gt = map_tensors(lambda tensor: tensor[0], of_tables[i].gt._replace(ids=None))
        off = 0.4 * torch.randn(gt.boxes.center.shape, generator=generator)
        boxes = gt.boxes._replace(center=gt.boxes.center + off, score=torch.rand(len(off), generator=generator))
        predictions[token] = FrameObjects(boxes, gt.lines)
    first, second = (evaluate_predictions(dataset, predictions).metrics() for dataset in (of_infos, of_tables))
    assert 0.3 < second["nds"] < 0.99
    assert first == pytest.approx(second, abs=1e-6, nan_ok=True)


def test_without_tables_gaps_divide_drives_and_boxes_alone_are_learned(infos, town):
    (infos.parent / VERSION).unlink()
    with pytest.warns(PerceptionWarning, match="there are no lines to learn"):
        dataset = open_infos(infos, image_size=RAW)
    np.testing.assert_array_equal(dataset.scene_of_sample, town.scene_of_sample)
    np.testing.assert_allclose(dataset.index.box_center, town.index.box_center, atol=1e-5)
    assert dataset.scene_names == ["drive-0000", "drive-0001"] and dataset.gt_lines(0) == []
    with pytest.raises(DataError, match=r"have no tables beside them, which the official evaluation reads"):
        check_evaluable(dataset)


def test_images_are_found_by_data_prefix_and_tables_by_dataroot(infos, layout, town_root, town, tmp_path):
    moved = tmp_path / "other" / "infos.pkl"
    moved.parent.mkdir()
    moved.write_bytes(infos.read_bytes())
    prefix = {camera: f"../samples/{camera}" for camera in town.cameras}
    dataset = open_infos(moved, image_size=RAW, data_prefix=prefix, dataroot=town_root)
    assert dataset.scene_names == town.scene_names
    torch.testing.assert_close(dataset[1].frames.images, town[1].frames.images)
    with pytest.raises(DataError, match=r"is missing in .*copy it there"):
        open_infos(moved, image_size=RAW, dataroot=town_root)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda c: c["data_list"].clear(), "has no entry in data_list"),
        (lambda c: c["data_list"][1].update(token=c["data_list"][0]["token"]), "twice in data_list"),
        (lambda c: c["data_list"][0].update(token="x"), 'lacks the token "x"'),
        (lambda c: c["data_list"][0].pop("token"), "entry 0: token is null or missing"),
        (lambda c: c["data_list"][0].update(timestamp=1.6e15), "entry 0: timestamp is .*give seconds"),
        (lambda c: c["data_list"][0]["lidar_points"].pop("lidar2ego"), r"lidar_points\.lidar2ego is missing"),
        (lambda c: c["data_list"][0]["instances"][0].update(num_lidar_pts="many"), "is no number of points"),
        (lambda c: c["data_list"][0]["images"]["CAM_BACK"].update(cam2img=[[1.0]]), r"CAM_BACK\.cam2img must be"),
    ],
)
def test_malformed_infos_are_refused(infos, change, sentence):
    def first_counts(content):
        instance = next(item for item in content["data_list"][0]["instances"] if item["bbox_3d_isvalid"])
        content["data_list"][0]["instances"] = [instance]
        change(content)

    changed(infos, first_counts)
    with warnings.catch_warnings(), pytest.raises(DataError, match=sentence):
        warnings.simplefilter("ignore", PerceptionWarning)
        open_infos(infos, image_size=RAW)


def test_config_sections_of_infos_are_checked(tmp_path, infos):
    path = tmp_path / "infos.py"
    path.write_text(CONFIG.format(infos=str(infos)))
    with pytest.raises(ConfigError, match=r"unknown key val_data\.split"):
        load_config(path, {"val_data.split": "town_val"})
    with pytest.raises(DataError, match=r"none\.pkl"):
        config = load_config(path, {"val_data.infos": str(tmp_path / "none.pkl")})
        build_dataset(config.val_data, config.model)


def test_the_command_counts_what_it_writes(town_root, tmp_path, capsys, town):
    arguments = ["--dataroot", str(town_root), "--version", VERSION, "--split", "town_val"]
    prepare_nuscenes(["infos", *arguments, "--out", str(tmp_path / "a.pkl"), "--json", str(tmp_path / "a.json")])
    assert "8 samples of 2 scenes" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["boxes"] == len(town.index.box_label)
