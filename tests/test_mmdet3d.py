"""The library inside mmdet3d: boxes there and back, a detector that streams, mmdet3d's own reader, metric and tools."""

# ruff: noqa: E402 - mmdet3d can be imported after the stub of mmcv's operators is there, and not at all without the extra

import pickle

import numpy as np
import pytest
import torch
from conftest import PROJECT, RAW, noisy, one_thread
from nuscenes.eval.detection.config import config_factory

from perception.engine.mmcv_ops import install_stub

pytest.importorskip("mmdet3d", reason="mmdet3d is not installed; it comes with the extra [mmdet3d]")
install_stub()

from mmdet3d.datasets import NuScenesDataset as MMDet3DDataset
from mmdet3d.evaluation.metrics.nuscenes_metric import (
    cam_nusc_box_to_global,
    lidar_nusc_box_to_global,
    output_to_nusc_box,
)
from mmdet3d.registry import MODELS, TRANSFORMS
from mmdet3d.structures import CameraInstance3DBoxes, LiDARInstance3DBoxes
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from pyquaternion import Quaternion

from perception.data.info_writer import write_infos
from perception.data.nuscenes import NuScenesDataset
from perception.engine.config import model_config
from perception.engine.weights import load_weights
from perception.errors import ConfigError, DataError
from perception.evaluation.dataset import ego_poses
from perception.evaluation.detection import evaluate_boxes
from perception.geometry import wrap_angle
from perception.inference.sequence import predict_stream
from perception.mmdet3d import Detector, ego_boxes, sensor_boxes
from perception.mmdet3d.tools import run_tool
from perception.models.bev_transformer.config import BEVTransformerConfig
from perception.models.bev_transformer.model import BEVTransformer
from perception.synthetic import VERSION, simulate
from perception.types import BOX_CLASSES, Boxes, FrameObjects, map_tensors

NETWORK = {
    "preset": "nano", "image_size": RAW, "grid": (20, 20), "channels": 16, "depth_bins": 8, "backbone_stages": 2,
    "decoder_layers": 2, "box_queries": 20, "line_queries": 8,
}  # fmt: skip
PREFIX = {camera: f"samples/{camera}" for camera in (
    "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT",
)}  # fmt: skip


def pose(yaw, pitch, roll, translation):
    """A pose whose axes are turned by angles in degrees about z, y and x."""
    turn = Quaternion(axis=[0, 0, 1], degrees=yaw) * Quaternion(axis=[0, 1, 0], degrees=pitch)
    matrix = (turn * Quaternion(axis=[1, 0, 0], degrees=roll)).transformation_matrix
    matrix[:3, 3] = translation
    return torch.from_numpy(matrix)


LIDAR = pose(-90, 2.0, -1.5, (0.94, 0.02, 1.84))
# Camera axes (right, down, forward) looking back to the left, tilted too.
CAMERA = pose(120, 1.5, 2.0, (0.5, 0.5, 1.5)) @ torch.tensor(
    [[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]], dtype=torch.float64
)
SENSORS = [(LiDARInstance3DBoxes, LIDAR), (CameraInstance3DBoxes, CAMERA)]


def some_boxes(count=50):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape, low=-1.0, high=1.0):
        return low + (high - low) * torch.rand(*shape, generator=generator)

    return Boxes(
        center=draw(count, 3) * torch.tensor([60.0, 60.0, 3.0]),
        size=draw(count, 3, low=0.3, high=8.0),
        yaw=draw(count, low=-np.pi, high=np.pi),
        velocity=10 * draw(count, 2),
        label=torch.arange(count) % len(BOX_CLASSES),
        attribute=torch.full((count,), -1),
        score=draw(count, low=0.0),
        valid=torch.ones(count, dtype=torch.bool),
        uncertainty=torch.zeros(count, 9),
    )


@pytest.mark.parametrize("kind, ego_from_sensor", SENSORS)
def test_boxes_go_to_a_sensor_and_back(kind, ego_from_sensor):
    boxes = some_boxes()
    there = sensor_boxes(boxes, ego_from_sensor, kind)
    back = ego_boxes(there, boxes.label, ego_from_sensor, boxes.score)
    assert type(there) is kind and there.tensor.shape == (50, 9)
    for name in ("center", "size", "velocity", "label", "attribute", "score", "valid", "uncertainty"):
        torch.testing.assert_close(getattr(back, name), getattr(boxes, name), atol=1e-5, rtol=0)
    assert wrap_angle(back.yaw - boxes.yaw).abs().max() < 1e-5
    again = sensor_boxes(back, ego_from_sensor, kind).tensor
    again[:, 6] = there.tensor[:, 6] + wrap_angle(again[:, 6] - there.tensor[:, 6])
    torch.testing.assert_close(again, there.tensor, atol=2e-5, rtol=0)
    without = ego_boxes(kind(there.tensor[:, :7]), boxes.label, ego_from_sensor)
    assert without.velocity.isnan().all() and (without.score == 1).all()
    unknown = ego_boxes(there, torch.full((50,), -1), ego_from_sensor)
    assert not unknown.valid.any()


@pytest.mark.parametrize("kind, ego_from_sensor", SENSORS)
def test_mmdet3d_puts_the_boxes_where_they_are(kind, ego_from_sensor):
    """Its metric turns boxes of a sensor into the global frame, by quaternions of the devkit."""
    boxes = some_boxes()
    converted = sensor_boxes(boxes, ego_from_sensor, kind)
    found, _ = output_to_nusc_box({"bboxes_3d": converted, "scores_3d": boxes.score, "labels_3d": boxes.label})
    info = {
        "lidar_points": {"lidar2ego": ego_from_sensor.numpy()}, "ego2global": np.eye(4),
        "images": {"CAM": {"cam2ego": ego_from_sensor.numpy()}},
    }  # fmt: skip
    config = config_factory("detection_cvpr_2019")
    config.class_range = dict.fromkeys(BOX_CLASSES, 1000.0)
    if kind is LiDARInstance3DBoxes:
        found = lidar_nusc_box_to_global(info, found, BOX_CLASSES, config)
    else:
        found, _ = cam_nusc_box_to_global(info, found, [0] * 50, BOX_CLASSES, config, "CAM")
    for n, box in enumerate(found):
        np.testing.assert_allclose(box.center, boxes.center[n], atol=1e-5)
        np.testing.assert_allclose(box.wlh, boxes.size[n, [1, 0, 2]], atol=1e-5)
        ahead = box.orientation.rotation_matrix[:, 0]
        assert abs(wrap_angle(np.arctan2(ahead[1], ahead[0]) - float(boxes.yaw[n]))) < 1e-5
        np.testing.assert_allclose(box.velocity[:2], boxes.velocity[n], atol=1e-4)


@pytest.fixture(scope="module")
def town(town_root):
    return NuScenesDataset(town_root, VERSION, "town_val", image_size=RAW)


@pytest.fixture(scope="module")
def infos(town_root, town, tmp_path_factory):
    path = tmp_path_factory.mktemp("infos") / "infos.pkl"
    write_infos(town, path)
    return path


@pytest.fixture(scope="module")
def read_by_mmdet3d(town_root, infos):
    """mmdet3d's own dataset over infos that were written here."""
    init_default_scope("mmdet3d")
    pipeline = [
        {"type": "LoadAnnotations3D", "with_bbox_3d": True, "with_label_3d": True},
        {"type": "perception.PackFrame", "image_size": RAW},
    ]
    return MMDet3DDataset(
        data_root=str(town_root), ann_file=str(infos), data_prefix=PREFIX, pipeline=pipeline, use_valid_flag=True,
        modality={"use_camera": True, "use_lidar": False}, filter_empty_gt=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A detector with weights whose outputs depend on images, calibration and memory."""
    config = BEVTransformerConfig.preset(**{("name" if k == "preset" else k): v for k, v in NETWORK.items()})
    path = tmp_path_factory.mktemp("weights") / "noisy.pth"
    torch.save({"state_dict": noisy(BEVTransformer, config).state_dict()}, path)
    return MODELS.build({"type": "perception.Detector", "network": NETWORK, "weights": str(path)}).eval()


def test_mmdet3d_reads_frames_and_boxes_of_written_infos(read_by_mmdet3d, town):
    assert len(read_by_mmdet3d) == len(town) == 8
    for i in (0, 5):
        item, clip = read_by_mmdet3d[i], town[i]
        found, wanted = item["inputs"]["frame"], map_tensors(lambda tensor: tensor[0], clip.frames)
        for name in ("images", "ego_from_lidar", "ego_from_exposure"):
            torch.testing.assert_close(getattr(found.frame, name), getattr(wanted, name), atol=1e-6, rtol=0)
        for found_part, wanted_part in zip(found.frame.rig, wanted.rig, strict=True):
            torch.testing.assert_close(found_part, wanted_part, atol=1e-5, rtol=1e-6)
        np.testing.assert_allclose(found.global_from_ego, town.ego_pose(i))
        assert float(found.time_s) == pytest.approx(town.timestamps[i], abs=1e-6)
        gt, truth = item["data_samples"].gt_instances_3d, town.gt_boxes(i)
        boxes = ego_boxes(gt.bboxes_3d, gt.labels_3d, wanted.ego_from_lidar)
        truth = map_tensors(lambda tensor, keep=truth.valid: tensor[keep], truth)
        assert len(boxes.label) == len(truth.label) > 5
        torch.testing.assert_close(boxes.center, truth.center, atol=1e-5, rtol=0)
        torch.testing.assert_close(boxes.size, truth.size, atol=1e-5, rtol=0)
        # The converter of mmdet3d projects velocities onto the plane of the LiDAR and its metric those onto the ground,
        # which differ by the square of the tilt; so do the yaws.
        torch.testing.assert_close(boxes.velocity, truth.velocity, atol=1e-2, rtol=0)
        assert wrap_angle(boxes.yaw - truth.yaw).abs().max() < 1e-3
        assert (boxes.label == truth.label).all()


def test_the_detector_streams_as_the_library_does(read_by_mmdet3d, town, detector):
    detector._streams[False].__init__()
    wanted = predict_stream(detector.core, town).objects
    for i, token in enumerate(town.tokens):
        with torch.no_grad():
            (sample,) = detector.test_step(pseudo_collate([read_by_mmdet3d[i]]))
        objects, found = wanted[token], sample.pred_instances_3d
        assert type(found.bboxes_3d) is LiDARInstance3DBoxes
        boxes = ego_boxes(found.bboxes_3d, found.labels_3d, torch.from_numpy(town.ego_from_lidar(i)), found.scores_3d)
        valid = objects.boxes.valid
        assert len(boxes.score) == int(valid.sum()) > 0
        for name in ("center", "size", "velocity", "score"):
            torch.testing.assert_close(getattr(boxes, name), getattr(objects.boxes, name)[valid], atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(
            sample.pred_lines.points, objects.lines.points[objects.lines.valid], atol=1e-3, rtol=0
        )
    # A frame of another drive ignores the memory, and so does the same frame as a second time.
    first = [detector.test_step(pseudo_collate([read_by_mmdet3d[0]]))[0].pred_instances_3d for _ in range(2)]
    torch.testing.assert_close(first[0].scores_3d, first[1].scores_3d)


def test_the_detector_learns_boxes_with_its_memory(read_by_mmdet3d, detector):
    detector.train()
    detector._streams[True].__init__()
    losses = [detector(**detector.data_preprocessor(pseudo_collate([read_by_mmdet3d[i]]), True), mode="loss")
              for i in (1, 0, 1)]  # fmt: skip
    names = {name.removeprefix("loss_") for name in losses[0]}
    assert {"box_class", "box_params", "heatmap", "image_depth"} <= names
    assert not {name for name in names if name.startswith("line_")} and "bev_seg" not in names
    # With the frame before, the same frame gives another loss than without it.
    assert abs(float(losses[0]["loss_heatmap"]) - float(losses[2]["loss_heatmap"])) > 1e-5
    total, logged = detector.parse_losses(losses[2])
    assert float(total) == pytest.approx(sum(map(float, losses[2].values())), rel=1e-5) and "loss" in logged
    total.backward()
    of_lines = [p for name, p in detector.core.named_parameters() if "line" in name and p.grad is not None]
    assert not of_lines and detector.core.image_encoder.laterals[0].weight.grad.abs().sum() > 0
    batch = pseudo_collate([read_by_mmdet3d[0], read_by_mmdet3d[4]])
    two = detector(**detector.data_preprocessor(batch, True), mode="loss")
    assert all(torch.isfinite(loss) for loss in two.values())
    detector.eval()


def test_what_mmdet3d_cannot_do_is_refused(read_by_mmdet3d, detector, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="MapTR finds no boxes, and mmdet3d has no lines"):
        Detector({"preset": "maptr_tiny_r50_24e_bevformer"})
    with pytest.raises(ConfigError, match=r"train\.disabled_losses names 'other'"):
        Detector(NETWORK, disabled_losses=["other"])
    item = read_by_mmdet3d[0]
    del item["data_samples"].gt_instances_3d
    with pytest.raises(DataError, match="has no boxes for training; put LoadAnnotations3D"):
        detector(**detector.data_preprocessor(pseudo_collate([item])), mode="loss")
    with pytest.raises(DataError, match=r"sample \"t\" of mmdet3d: images"):
        TRANSFORMS.build({"type": "perception.PackFrame", "image_size": RAW})({"token": "t", "images": 3})
    with pytest.raises(ConfigError, match="no tool 'demo'"):
        run_tool("demo", [])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="start the command where the dataset, or a link to it, is data/nuscenes"):
        run_tool("create_data", ["nuscenes", "--version", "v1.0-mini"])


def plain(value):
    return [*map(plain, value)] if isinstance(value, list | tuple | np.ndarray) else value


def compare(ours, theirs, where=""):
    """Compares what mmdet3d's converter wrote with the same fields written here."""
    if isinstance(theirs, dict):
        for key in theirs.keys() & ours.keys() - {"lidar_sweeps"}:  # those between the keyframes are left out here
            compare(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(theirs, list) and theirs and isinstance(theirs[0], dict):
        assert len(ours) == len(theirs), where
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            compare(*pair, f"{where}[{number}]")
    elif isinstance(theirs, str):
        assert ours == theirs, where
    else:
        np.testing.assert_allclose(plain(ours), plain(theirs), atol=2e-5, err_msg=where)


@pytest.mark.slow
def test_mmdet3d_s_own_tools_convert_train_and_test_a_town(tmp_path, monkeypatch, capsys):
    root = tmp_path / "data" / "nuscenes"
    simulate(root, scenes=2, seed=36, keyframes=3, image_size=RAW, version="v1.0-mini", workers=1)
    monkeypatch.chdir(tmp_path)
    run_tool("create_data", ["nuscenes", "--root-path", "./data/nuscenes", "--out-dir", "./data/nuscenes",
                             "--extra-tag", "nuscenes", "--version", "v1.0-mini"])  # fmt: skip
    dataset = NuScenesDataset(root, "v1.0-mini", "mini_val", image_size=RAW)
    write_infos(dataset, tmp_path / "ours.pkl")
    ours, theirs = (
        pickle.loads(path.read_bytes()) for path in (tmp_path / "ours.pkl", root / "nuscenes_infos_val.pkl")
    )
    compare(ours, theirs)
    assert {"images", "instances", "ego2global"} <= ours["data_list"][0].keys() & theirs["data_list"][0].keys()

    config = Config.fromfile(str(PROJECT / "configs" / "mmdet3d" / "nano.py"))
    config.merge_from_dict(
        {"image_size": RAW, "model.network": NETWORK, "model.weights": "", "train_cfg.max_epochs": 1}
    )
    for name in ("train", "val", "test"):
        loader = config[f"{name}_dataloader"]
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.pipeline[-1].image_size = RAW
    config.dump("small.py")
    with one_thread():
        run_tool("train", ["small.py", "--work-dir", "work"])
        run_tool("test", ["small.py", "work/epoch_1.pth", "--work-dir", "work"])
    assert "NDS" in capsys.readouterr().out

    # The metric of mmdet3d and the devkit's wrapper here, on the same predictions.
    network = load_weights("work/epoch_1.pth", model_config(dict(config.model.network), "small.py"))
    weights = torch.load("work/epoch_1.pth", weights_only=False)["state_dict"]
    for name, tensor in network.state_dict().items():
        assert torch.equal(weights[f"core.{name}"], tensor)
    config.work_dir, config.load_from = "work", "work/epoch_1.pth"
    runner = Runner.from_cfg(config)
    predictions = {}
    generator = torch.Generator().manual_seed(2)
    for i, token in enumerate(dataset.tokens):
        boxes = dataset.gt_boxes(i)
        boxes = boxes._replace(
            center=boxes.center + 0.5 * torch.randn(boxes.center.shape, generator=generator),
            yaw=boxes.yaw + 0.2 * torch.randn(boxes.yaw.shape, generator=generator),
            velocity=boxes.velocity + 0.3 * torch.randn(boxes.velocity.shape, generator=generator),
            attribute=torch.full_like(boxes.label, -1),
            score=torch.rand(boxes.yaw.shape, generator=generator),
            valid=torch.ones_like(boxes.valid),
        )
        predictions[token] = FrameObjects(boxes, map_tensors(lambda tensor: tensor[0], dataset[i].gt.lines))
        converted = sensor_boxes(boxes, torch.from_numpy(dataset.ego_from_lidar(i)), LiDARInstance3DBoxes)
        sample = {"sample_idx": i, "pred_instances": {}, "pred_instances_3d": {
            "bboxes_3d": converted, "labels_3d": boxes.label, "scores_3d": boxes.score}}  # fmt: skip
        runner.test_evaluator.process([sample])
    runner.test_evaluator.dataset_meta = runner.test_dataloader.dataset.metainfo
    metrics = runner.test_evaluator.evaluate(len(dataset))
    result = evaluate_boxes(predictions, ego_poses(dataset), root, "v1.0-mini", "mini_val")
    nds, mean_ap = (next(v for k, v in metrics.items() if k.endswith(name)) for name in ("/NDS", "/mAP"))
    assert 0.2 < result.nds < 0.9
    assert nds == pytest.approx(result.nds, abs=1e-6) and mean_ap == pytest.approx(result.mean_ap, abs=1e-6)
