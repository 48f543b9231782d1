"""Readers of files of others on thousands of damaged ones: a PerceptionError or a right result, nothing else."""

import hashlib
import io
import json
import math
import pickle
import random
import struct
import warnings
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mutate import damage_bytes, damage_tree, run_cases
from nuscenes.eval.common.data_classes import EvalBoxes
from nuscenes.eval.detection.data_classes import DetectionBox
from PIL import Image
from pyquaternion import Quaternion

from perception.data.info_files import read_info
from perception.data.map_vectors import load_map_vectors
from perception.data.plain_pickle import read_plain_pickle
from perception.data.splits import read_split_file, split_scenes
from perception.engine.config import load_config
from perception.engine.config_file import parse_options
from perception.errors import PerceptionError, PerceptionWarning
from perception.evaluation.lanes import evaluate_lanes
from perception.evaluation.submission import LaneSubmission, read_submission
from perception.export.contract import GEOMETRY, ImageInputs, check_graph, read_contract, write_contract
from perception.geometry import is_rigid
from perception.models.bev_transformer.config import BEVTransformerConfig
from perception.models.bev_transformer.model import BEVTransformer
from perception.models.checkpoint import import_published, load_model, read_metrics, save_checkpoint
from perception.types import BOX_CLASSES, LINE_CLASSES, LaneRange, MapLine, Weights

# Cases of the fast suite and of the slow one, by reader.
BUDGET = {
    "infos": (250, 2000), "infos of KITTI": (150, 800), "pickled infos": (250, 2000), "map vectors": (300, 1200),
    "split files": (200, 800), "splits.json": (100, 300), "lane submissions": (200, 1000),
    "box submissions": (200, 1000), "weights": (40, 150), "checkpoints": (10, 60), "contracts": (200, 900),
    "cfg-options": (60, 300),
}  # fmt: skip


@pytest.fixture(params=[0, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "many"])
def run(request):
    """Runs a reader on its budget of damaged files; some must be read and some refused."""

    def run(name, case, least_read=1):
        count = BUDGET[name][request.param]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PerceptionWarning)
            read = run_cases(f"{name} {request.param}", count, case, PerceptionError)
        assert least_read <= read < count, f"{read} of {count} damaged files were read"

    return run


def test_the_slow_suite_has_ten_thousand_cases():
    assert sum(many for _, many in BUDGET.values()) >= 10_000


def as_file(tree, rng: random.Random) -> bytes:
    """A damaged tree as JSON, or the bytes of its JSON damaged."""
    if rng.random() < 0.8:
        return json.dumps(damage_tree(tree, rng)).encode("utf-8", "surrogatepass")
    return damage_bytes(json.dumps(tree).encode(), rng)


POSE = [[0.0, 0, 1, 1.5], [-1, 0, 0, 0.2], [0, -1, 0, 1.6], [0, 0, 0, 1]]
INTRINSICS = [[20.0, 0, 12], [0, 20.0, 8], [0, 0, 1]]
SIZE = (16, 24)


def info_tree() -> dict:
    lidar = [[0.0, 1, 0, 0.9], [-1, 0, 0, 0], [0, 0, 1, 1.8], [0, 0, 0, 1]]
    box = {"bbox_3d": [10.0, 2, 0, 4, 2, 1.5, 0.1], "bbox_label_3d": 0, "velocity": [1.0, math.nan]}
    box |= {"bbox_3d_isvalid": True, "num_lidar_pts": 4}
    camera = {"img_path": "a.png", "cam2img": INTRINSICS, "cam2ego": POSE, "height": 16, "width": 24}
    with_lidar = {"img_path": "a.png", "cam2img": INTRINSICS, "lidar2cam": (np.linalg.inv(POSE) @ lidar).tolist()}
    entry = {
        "token": "t",
        "sample_idx": 3,
        "images": {"front": camera, "CAM_FRONT": with_lidar},
        "instances": [box, box],
    }
    entry |= {"ego2global": np.eye(4).tolist(), "lidar_points": {"lidar2ego": lidar}}
    metainfo = {"categories": {"car": 0, "truck": 1, "animal": -1}, "dataset": "nuscenes"}
    return {"metainfo": metainfo, "data_list": [entry, {"token": "t2"}]}


def kitti_tree() -> dict:
    camera = {"img_path": "a.png", "lidar2cam": [[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, -0.3], [0, 0, 0, 1]]}
    camera["cam2img"] = [[20.0, 0, 12, 2.5], [0, 20.0, 8, 0.1], [0, 0, 1, 0.003], [0, 0, 0, 1]]
    box = {"bbox_3d": [-1.2, 1.7, 12.5, 3.9, 1.5, 1.6, 1.9], "bbox_label_3d": 2}
    entry = {"sample_idx": 8, "images": {"CAM2": camera, "R0_rect": POSE}, "instances": [box]}
    return {"metainfo": {"categories": {"Car": 2}, "dataset": "kitti"}, "data_list": [entry]}


def check_info(path, key) -> None:
    """Reads an entry and asserts that its numbers can be those of a car."""
    info = read_info(path, key)
    clip = info.clip(image_size=SIZE)
    rig, boxes = clip.frames.rig, clip.gt.boxes
    assert clip.frames.images.dtype == torch.uint8 and clip.frames.images.shape[2:] == (3, *SIZE)
    assert rig.present.any() and rig.present.shape[1] == len(info.cameras) == clip.frames.images.shape[1]
    for img_from_cam, ego_from_cam in zip(rig.img_from_cam[0].double(), rig.ego_from_cam[0].double(), strict=True):
        assert is_rigid(ego_from_cam.numpy()) and ego_from_cam[:3, 3].abs().max() <= 50.01
        assert img_from_cam.isfinite().all() and min(img_from_cam[0, 0], img_from_cam[1, 1]) > 0
        assert img_from_cam[2].tolist() == [0, 0, 1]
    assert all(x.isfinite().all() for x in (boxes.center, boxes.size, boxes.yaw))
    assert (boxes.size > 0).all() and (boxes.center.abs() < 3000).all() and (boxes.yaw.abs() < 3.1416).all()
    assert (boxes.velocity.isnan() | (boxes.velocity.abs() < 3000)).all()
    assert ((boxes.label >= -1) & (boxes.label < len(BOX_CLASSES))).all() and (boxes.label[boxes.valid] >= 0).all()
    if info.entry.get("ego2global") is not None:
        pose = info.global_from_ego()
        assert is_rigid(pose) and np.abs(pose[:3, 3]).max() <= 1e8


@pytest.mark.parametrize(("name", "tree"), [("infos", info_tree()), ("infos of KITTI", kitti_tree())])
def test_infos(run, tmp_path, name, tree):
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "a.png")

    def case(rng):
        whole = rng.choice((tree, tree, tree["data_list"], tree["data_list"][0]))
        (tmp_path / "a.json").write_bytes(as_file(whole, rng))
        check_info(tmp_path / "a.json", rng.choice((0, 0, "t", "8", "3")))

    run(name, case)


def with_arrays(tree, rng: random.Random):
    """Some lists of numbers as numpy arrays, and some numbers as numpy's."""
    if isinstance(tree, dict):
        return {key: with_arrays(value, rng) for key, value in tree.items()}
    if isinstance(tree, list):
        if rng.random() < 0.3:
            try:
                return np.array(tree, dtype=rng.choice(("f4", "f8", ">f8", "i8", "U4")))
            except (ValueError, TypeError, OverflowError):
                return tree
        return [with_arrays(value, rng) for value in tree]
    if isinstance(tree, int | float) and abs(tree) < 2**31 and rng.random() < 0.3:
        return np.asarray(tree)[()]
    return tree


def test_pickled_infos(run, tmp_path):
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "a.png")

    def case(rng):
        protocol = rng.choice((2, 4, 5))
        if rng.random() < 0.5:
            data = pickle.dumps(with_arrays(damage_tree(info_tree(), rng), rng), protocol)
        else:
            data = damage_bytes(pickle.dumps(with_arrays(info_tree(), rng), protocol), rng)
        (tmp_path / "a.pkl").write_bytes(data)
        check_info(tmp_path / "a.pkl", 0)

    run("pickled infos", case)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=30,
)


@settings(max_examples=60, derandomize=True, database=None, deadline=None)
@given(PLAIN, st.integers(2, 5))
def test_every_pickle_of_plain_data_is_read(value, protocol):
    assert read_plain_pickle(pickle.dumps(value, protocol)) == value


def test_map_vectors(run, tmp_path):
    ring = [[2.0, -3.0], [5.0, -3.0], [5.0, 3.0], [2.0, 3.0]]
    lines = [
        ("lane_divider", [[-99, 0.5], [99, 1]]),
        ("ped_crossing", ring),
        ("ped_crossing", [[3, -1], [3, 1], [4, 0]]),
    ]
    lines += [("drivable_boundary", [*ring, ring[0]]), ("lane", [[0, 0], [1, 1]]), ("boundary", [[0, 9, 1], [9, 9, 1]])]
    tree = {"location": "x", "features": [{"id": "f", "kind": kind, "polyline": line} for kind, line in lines]}
    reach = np.array(LaneRange(60, 30)) / 2 + 0.21

    def case(rng):
        (tmp_path / "m.json").write_bytes(as_file(tree, rng))
        pose = np.eye(4)
        pose[:2, 3] = rng.uniform(-5, 5), rng.uniform(-5, 5)
        for line in load_map_vectors(tmp_path / "m.json", pose):
            assert 0 <= line.label < len(LINE_CLASSES) and line.points.ndim == 2 and len(line.points) >= 2
            assert np.isfinite(line.points).all() and (np.abs(line.points) <= reach).all()
            if LINE_CLASSES[line.label] == "ped_crossing":
                assert len(line.points) >= 4 and (line.points[0] == line.points[-1]).all()

    run("map vectors", case)


def test_split_files(run, tmp_path):
    names = [f"scene-{k:04d}" for k in range(6)]

    def case(rng):
        path = tmp_path / rng.choice(("a.json", "a.txt"))
        text = "# of a town\n\n" + "\n".join(names) + "\n"
        path.write_bytes(as_file(names, rng) if path.suffix == ".json" else damage_bytes(text.encode(), rng))
        found = read_split_file(path)
        assert found and len(set(found)) == len(found) and all(isinstance(name, str) and name for name in found)
        scenes = split_scenes(path, tmp_path, names)
        assert scenes and set(scenes) == set(found) and scenes == [name for name in names if name in scenes]

    run("split files", case)


def test_splits_json(run, tmp_path):
    names = [f"scene-{k:04d}" for k in range(6)]
    tree = {"my_train": names[:4], "my_val": names[4:], "val": names}

    def case(rng):
        (tmp_path / "splits.json").write_bytes(as_file(tree, rng))
        found = split_scenes("my_val", tmp_path, names)
        assert found and set(found) <= set(names)

    run("splits.json", case)


META = {"use_camera": True, "use_lidar": False, "use_radar": False, "use_map": False, "use_external": False}


def test_lane_submissions(run, tmp_path):
    lines = [
        {"class": name, "score": 0.5, "points": [[-20.0, k], [0.0, k + 0.5], [20.0, k]]}
        for k, name in enumerate(LINE_CLASSES)
    ]
    tree = {"meta": META, "frame": "ego", "results": {"t1": lines, "t2": lines[:1]}}
    gt = {token: [MapLine(k, np.array([[-20.0, k], [20.0, k]])) for k in range(3)] for token in ("t1", "t2")}

    def case(rng):
        (tmp_path / "a.json").write_bytes(as_file(tree, rng))
        submission = read_submission(tmp_path / "a.json")
        if not isinstance(submission, LaneSubmission):
            return
        for line in (line for found in submission.results.values() for line in found):
            assert 0 <= line.label < len(LINE_CLASSES) and math.isfinite(line.score)
            assert line.points.dtype == np.float64 and line.points.shape[1] == 2 and len(line.points) >= 2
            assert (np.abs(line.points) <= 1000).all()
        result = evaluate_lanes(submission.results, gt)
        assert all(0 <= ap <= 1 for ap in result.class_ap.values())

    run("lane submissions", case)


def test_box_submissions(run, tmp_path):
    box = {"sample_token": "t1", "translation": [1.0, 2, 3], "size": [2.0, 4, 1.5], "rotation": [1.0, 0, 0, 0]}
    box |= {"velocity": [math.nan, 0], "detection_name": "car", "detection_score": 0.5, "attribute_name": ""}
    tree = {"meta": META, "results": {"t1": [box, box | {"num_pts": 3}], "t2": []}}

    def case(rng):
        (tmp_path / "a.json").write_bytes(as_file(tree, rng))
        submission = read_submission(tmp_path / "a.json")
        if isinstance(submission, LaneSubmission):
            return
        boxes = EvalBoxes.deserialize(
            json.loads(json.dumps(submission.results)), DetectionBox
        )  # as the devkit reads it
        for found in boxes.all:
            numbers = (
                *found.translation,
                *found.size,
                found.detection_score,
                *Quaternion(found.rotation).rotation_matrix.flat,
            )
            assert np.isfinite(numbers).all() and min(found.size) > 0 and found.num_pts != 0
            assert found.detection_name in BOX_CLASSES

    run("box submissions", case)


@pytest.fixture(scope="module")
def weights():
    """The bytes of a small weights file: the header with its length, and the tensors; and its config."""
    config = BEVTransformerConfig.preset(
        "nano", image_size=(16, 32), grid=(8, 8), channels=8, depth_bins=4, backbone_stages=1, decoder_layers=1,
        box_queries=4, line_queries=3, line_points=4, heights=(0.0, 1.0), feature_stride=4,
    )  # fmt: skip
    torch.manual_seed(0)
    return BEVTransformer(config).eval()


def test_weights(run, weights, tmp_path):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, weights, {"nds": 0.5, "epoch": 3})
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, tensors = json.loads(data[8 : 8 + length]), data[8 + length :]
    texts = {"config": json.loads(header["__metadata__"]["config"]), "metrics": {"nds": 0.5, "epoch": 3}}

    def case(rng):
        choice = rng.random()
        if choice < 0.6:
            name = rng.choice(("config", "config", "config", "metrics"))
            metadata = header["__metadata__"] | {name: as_file(texts[name], rng).decode("utf-8", "replace")}
            new = json.dumps(header | {"__metadata__": metadata}).encode()
        elif choice < 0.8:
            new = json.dumps(damage_tree(header, rng)).encode()
        else:
            new = data[8 : 8 + length]
        file = struct.pack("<Q", len(new)) + new
        path.write_bytes((damage_bytes(file, rng) if choice >= 0.8 else file) + tensors)
        assert isinstance(read_metrics(path), dict)
        config = load_model(path).config
        numbers = [x for x in flat(config) if isinstance(x, float)]
        assert all(abs(x) <= 1e5 for x in numbers) and config.x_range[0] < config.x_range[1]
        assert min(*config.image_size, *config.grid, *config.lane_range) > 0

    run("weights", case)


def flat(value):
    """Yields the values in nested dataclasses and tuples."""
    if is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, list | tuple):
        for item in value:
            yield from flat(item)
    else:
        yield value


def test_checkpoints(run, official_keys, tmp_path):
    shapes = json.loads((official_keys / "bevformer_tiny.json").read_text())
    tensors = {
        key: torch.zeros(1).expand(shape) for key, shape in shapes.items() if not key.endswith("batches_tracked")
    }
    tensors |= {key: torch.tensor(1) for key in shapes if key.endswith("batches_tracked")}
    saved = io.BytesIO()
    torch.save({"state_dict": tensors, "meta": {"epoch": 24}}, saved)
    saved = saved.getvalue()

    def case(rng):
        # Mostly in the part with the keys and shapes, at the start; the rest are the names of parts of a zip file.
        start = rng.choice((0, 0, len(saved) - 4000))
        (tmp_path / "a.pth").write_bytes(
            saved[:start] + damage_bytes(saved[start : start + 4000], rng) + saved[start + 4000 :]
        )
        model = import_published(tmp_path / "a.pth")
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())

    run("checkpoints", case, least_read=0)


def test_contracts(run, tmp_path):
    images = ImageInputs(((8, 16), (9, 12)), "rgb")
    inputs = {name: np.zeros(images.shape(n), np.uint8) for n, name in enumerate(images.names)}
    inputs |= {name: np.zeros((1, 2), np.float32) for name in sorted(GEOMETRY)}
    outputs = {"box_center": np.zeros((1, 3), np.float32), "raw_box": np.zeros((4,), np.int64)}
    (tmp_path / "model.onnx").write_bytes(b"graph")
    hashes = {"model.onnx": hashlib.sha256(b"graph").hexdigest()}
    write_contract(
        tmp_path / "contract.json", inputs=inputs, outputs=outputs, sha256=hashes,
        network="BEVTransformer", weights=Weights("nano", {"scenes": 3}), image_size=(8, 16), images=images,
        precision="fp32", opset=17,
        layers={"Conv": {"float32": 3}}, quantization={}, checked={"onnxruntime": ["resize"]}, version="0",
    )  # fmt: skip
    tree = json.loads((tmp_path / "contract.json").read_text())
    graph = [{x["name"]: (x["dtype"], x["shape"]) for x in tree[side]} for side in ("inputs", "outputs")]

    def case(rng):
        (tmp_path / "contract.json").write_bytes(as_file(tree, rng))
        contract = read_contract(tmp_path)
        found = ImageInputs.of_contract(contract)
        assert len(found.sizes) == contract["cameras"] and all(
            1 <= side <= 16384 for size in found.sizes for side in size
        )
        check_graph(tmp_path / "model.onnx", contract, *graph)
        for n, name in enumerate(found.names):
            assert {tuple(x["shape"]) for x in contract["inputs"] if x["name"] == name} == {found.shape(n)}
        assert all((tmp_path / name).resolve().is_relative_to(tmp_path.resolve()) for name in contract["sha256"])
        assert all(isinstance(side, int) and side > 0 for side in contract["image_size"])
        json.dumps(contract.get("weights"), allow_nan=False)  # they are part of every result
        for field in ("max_gap_s", "max_speed_m_s", "max_turn_rate_rad_s", "jump_margin_m", "jump_margin_rad"):
            assert 0 <= contract.get(field, 0) < math.inf

    run("contracts", case)


PAIRS = (
    "train.lr=1e-4", "train.epochs=3", "val_data.split=val", "train_data.augment.flip=0.5", "model.heights=(0.0,1.0)",
    "model.preset=nano", "model.lane_range=60x30", "train.disabled_losses=('depth',)", "train_data.augment=None",
    "val_data.dataroot=['a','b']", "model.channels=32", "train.grad_clip=1e999", "train.drop_frames=-1e999",
)  # fmt: skip


def test_cfg_options(run):
    def case(rng):
        pairs = [rng.choice(PAIRS).encode() for _ in range(rng.choice((1, 1, 2)))]
        pairs = [damage_bytes(pair, rng) if rng.random() < 0.8 else pair for pair in pairs]
        pairs = [pair.decode("utf-8", "surrogateescape") for pair in pairs]
        config = load_config("synthetic/nano", parse_options(pairs))
        numbers = [x for part in (config.model, config.train, config.train_data, config.val_data) for x in flat(part)]
        assert all(math.isfinite(x) for x in numbers if isinstance(x, float))

    run("cfg-options", case)
