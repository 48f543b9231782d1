"""Fixtures that several test files share."""

import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

# Without a GPU, Triton kernels run in Triton's interpreter, which must be selected before Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

PROJECT = Path(__file__).resolve().parent.parent


def existing(path: Path, what: str) -> Path:
    if not path.exists():
        pytest.skip(f"{what} is not at {path}")
    return path


@contextmanager
def one_thread():
    """Runs the block on one thread: sums in another order are other sums, and another number of threads has one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def noisy(network, config, seed=6):
    """Builds a network whose outputs depend on images, calibration and memory, by noise on the zeros of its heads."""
    torch.manual_seed(seed)
    model = network(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


RAW = (64, 112)  # pixels that the small export takes
MIXED = ((128, 224), RAW, RAW, (40, 80), (90, 160), RAW)  # sizes of the cameras of the mixed export


@pytest.fixture(scope="session")
def small_network():
    """The flagship at its smallest size, with random weights."""
    from perception.models.bev_transformer.config import BEVTransformerConfig
    from perception.models.bev_transformer.model import BEVTransformer

    config = BEVTransformerConfig.preset(
        "nano", image_size=(40, 80), grid=(20, 20), channels=16, depth_bins=8, backbone_stages=2, decoder_layers=2,
        box_queries=20, line_queries=8, line_points=6,
    )  # fmt: skip
    return noisy(BEVTransformer, config)


@pytest.fixture(scope="session")
def small_town(tmp_path_factory):
    """The dataset of export certificates: 2 scenes of 20 keyframes."""
    from perception.data.nuscenes import NuScenesDataset
    from perception.synthetic import VERSION, simulate

    root = tmp_path_factory.mktemp("export") / "town"
    simulate(root, scenes=2, seed=8, keyframes=20, split="certificate", image_size=RAW)
    return NuScenesDataset(root, VERSION, "certificate", image_size=RAW)


@pytest.fixture(scope="session")
def other_rig_town(tmp_path_factory):
    """The same number of frames of a rig with five cameras of other focal lengths."""
    from perception.data.nuscenes import NuScenesDataset
    from perception.synthetic import VERSION, simulate
    from perception.synthetic.sensors import FIVE_CAMERAS

    root = tmp_path_factory.mktemp("export") / "other_rig"
    simulate(root, scenes=2, seed=9, keyframes=20, split="certificate", image_size=RAW, rig=FIVE_CAMERAS)
    cameras = [camera.name for camera in FIVE_CAMERAS]
    return NuScenesDataset(root, VERSION, "certificate", image_size=RAW, cameras=cameras)


@pytest.fixture(scope="session")
def small_graph(small_network):
    """The graph of the small network, traced once because tracing takes most of the time."""
    from perception.export.contract import ImageInputs
    from perception.export.onnx import DeployedNetwork, example_inputs, trace

    images = ImageInputs((RAW,) * 6)
    return trace(DeployedNetwork(small_network, images).eval(), example_inputs(small_network, images))


@pytest.fixture(scope="session")
def exports(small_network, small_graph, small_town, tmp_path_factory):
    """Export folders by precision and target (CPU or not), each made on first use."""
    from perception.export.onnx import export_onnx

    @cache
    def make(precision: str, for_cpu: bool = False) -> Path:
        return export_onnx(
            small_network, tmp_path_factory.mktemp(precision), raw_size=RAW, precision=precision, for_cpu=for_cpu,
            calibration=small_town, graph=small_graph,
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def fp32_export(exports) -> Path:
    """The small network's export in float32; tests that modify it work on a copy."""
    return exports("fp32")


@pytest.fixture(scope="session")
def live_frames(small_town) -> list[tuple]:
    """Images, rig, pose and time of the first three frames of a scene, as `step` takes them."""
    from perception.types import CameraRig

    found = []
    for k in range(3):
        frame = small_town[k].frames
        images = list(frame.images[0].permute(0, 2, 3, 1).numpy())
        rig = CameraRig(*(tensor[0].numpy() for tensor in frame.rig))
        found.append((images, rig, small_town.ego_pose(k), 1.7e9 + 0.5 * k))
    return found


@pytest.fixture(scope="session")
def make_live(small_network, fp32_export):
    """Creates a predictor or a runtime of the small network, with the keywords that both take."""
    from perception.export.runtime import Runtime
    from perception.inference.predictor import Predictor

    return {
        "predictor": lambda **k: Predictor(small_network, precision="float32", **k),
        "runtime": lambda **k: Runtime(fp32_export, **k),
    }


@pytest.fixture(params=["predictor", "runtime"])
def live_kind(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def mixed_export(small_network, tmp_path_factory) -> Path:
    """The small network's export for NV12 cameras of several sizes."""
    from perception.export.onnx import export_onnx

    return export_onnx(small_network, tmp_path_factory.mktemp("mixed"), raw_size=MIXED, image_format="nv12")


def broken_export(folder, tmp_path, change):
    """Returns a copy of an export whose graph `change` has changed, with a matching contract."""
    import onnx

    shutil.copytree(folder, tmp_path / "broken")
    graph = onnx.load(folder / "model.onnx")
    change(graph.graph)
    content = graph.SerializeToString()
    (tmp_path / "broken" / "model.onnx").write_bytes(content)
    contract = json.loads((folder / "contract.json").read_text())
    contract["sha256"]["model.onnx"] = hashlib.sha256(content).hexdigest()
    (tmp_path / "broken" / "contract.json").write_text(json.dumps(contract))
    return tmp_path / "broken"


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Redirects the cache of dataset indices, so that tests do not touch the user's."""
    with pytest.MonkeyPatch.context() as context:
        context.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user_cache")))
        yield


BUNDLED_GOLDEN = PROJECT / "tests" / "golden"


@pytest.hookimpl(tryfirst=True)  # before `-m` selects tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test that reads golden numbers as part of the parity suite, `pytest -m golden`."""
    for item in items:
        if {"golden", "official_keys"} & set(item.fixturenames):
            item.add_marker("golden")


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden numbers (outputs of the published code): PERCEPTION_GOLDEN, or the bundled one.

    Tests take sizes, seeds, positions and ranges from its files, so that they hold for other data of the same layout.
    """
    path = Path(os.environ.get("PERCEPTION_GOLDEN", BUNDLED_GOLDEN))
    if not path.is_dir():  # no skip: a parity suite that skips itself proves nothing
        pytest.fail(f"the folder of golden numbers is not at {path}; correct or unset PERCEPTION_GOLDEN")
    return path


def allowed(folder: Path, kind: str, least: float) -> float:
    """Returns the tolerance for a kind of output: `least`, or five times the float32-float64 difference of the README.

    Args:
        folder: of golden numbers; its README states the differences, such as "boxes 2.4e-05, logits 3.8e-05".
        kind: first word of what the README calls the output.
        least: where the README states less, or nothing.
    """
    lines = re.findall(r"float32 - float64[^:\n]*:(.*)", (folder / "README.md").read_text())
    stated = re.findall(rf"\b{kind}\b[^,;:]*? (\d[\d.]*e-\d+)", "\n".join(lines))
    return max([least, *(5 * float(number) for number in stated)])


@pytest.fixture(scope="session")
def official_keys(golden) -> Path:
    """The folder with keys and shapes of the published networks' weights."""
    folders = [golden / "keys", golden.parent / "keys", BUNDLED_GOLDEN / "keys"]
    return next(path for path in folders if path.is_dir())


@pytest.fixture(scope="session")
def real_keyframe() -> Path:
    """One real nuScenes keyframe: images, LiDAR sweep, boxes and the map around it."""
    return existing(PROJECT.parent / "shared" / "data" / "real_keyframe", "the real keyframe")


@pytest.fixture(scope="session")
def town_root(tmp_path_factory) -> Path:
    """A small generated dataset: 2 scenes of 4 keyframes, images 128 x 224."""
    from perception.synthetic import simulate

    root = tmp_path_factory.mktemp("town")
    simulate(root, scenes=2, seed=11, keyframes=4, image_size=(128, 224), workers=1)
    return root


@pytest.fixture(scope="session")
def converted(town_root, tmp_path_factory):
    """The first scene of the town as a recording, by format of `recordings.convert`, each made on first use."""
    from perception.recordings.convert import convert_dataset
    from perception.synthetic import VERSION

    @cache
    def make(format: str) -> Path:
        return convert_dataset(town_root, VERSION, tmp_path_factory.mktemp("recorded") / format, format)[0]

    return make


HAND_STEP = 0.5  # seconds between keyframes of the dataset written by hand
HAND_SPEED = 6.0  # m/s of its ego car along its own x


def quaternion(yaw):
    return [float(np.cos(yaw / 2)), 0.0, 0.0, float(np.sin(yaw / 2))]


@pytest.fixture(scope="session")
def hand_root(tmp_path_factory) -> Path:
    """A dataset written by hand, without the simulator.

    Two scenes of three keyframes, 0.5 s and 3 m apart, on a straight road that runs 30 degrees off global x. Version
    `v1.0-hand`, split `hand_val` (both scenes) and `hand_second`, cameras CAM_FRONT and CAM_BACK.
    """
    root = tmp_path_factory.mktemp("hand")
    yaw = np.radians(30)
    heading = np.array([np.cos(yaw), np.sin(yaw)])
    tables = {name: [] for name in ("ego_pose", "sample", "sample_data", "sample_annotation", "scene", "instance")}
    sensors = ["LIDAR_TOP", "CAM_FRONT", "CAM_BACK"]
    tables["sensor"] = [
        {"token": f"sensor-{s}", "channel": s, "modality": "lidar" if "LIDAR" in s else "camera"} for s in sensors
    ]
    # Camera axes (right, down, forward) in ego axes: forward looks along +x, backward along -x.
    tables["calibrated_sensor"] = [
        calibration("LIDAR_TOP", [0.9, 0.0, 1.8], quaternion(-np.pi / 2), []),
        calibration("CAM_FRONT", [1.7, 0.1, 1.5], [0.5, -0.5, 0.5, -0.5], [[80, 0, 80], [0, 80, 45], [0, 0, 1]]),
        calibration("CAM_BACK", [0.0, 0.0, 1.5], [0.5, -0.5, -0.5, 0.5], [[60, 0, 80], [0, 60, 45], [0, 0, 1]]),
    ]
    tables["category"] = [{"token": n, "name": n} for n in ("vehicle.car", "human.pedestrian.adult", "animal")]
    tables["attribute"] = [{"token": n, "name": n} for n in ("vehicle.moving", "pedestrian.standing")]
    tables["visibility"] = [{"token": "4", "level": "v80-100"}]
    tables["log"] = [{"token": "log", "logfile": "", "location": "hand-town"}]
    tables["map"] = [{"token": "map", "log_tokens": ["log"], "category": "", "filename": "maps/mask.png"}]
    for scene in range(2):
        first, count = f"s{scene}-0", 3
        tables["scene"].append(
            {"token": f"scene{scene}", "name": f"hand-{scene}", "log_token": "log", "first_sample_token": first}
        )
        for k in range(count):
            token, time = f"s{scene}-{k}", round(1e6 * (1000 + 100 * scene + HAND_STEP * k))
            near = {"prev": f"s{scene}-{k - 1}" if k else "", "next": f"s{scene}-{k + 1}" if k + 1 < count else ""}
            tables["sample"].append({"token": token, "timestamp": time, "scene_token": f"scene{scene}"} | near)
            for sensor in sensors:
                late = 0.02 if sensor == "CAM_FRONT" else 0.0  # this camera exposes 20 ms after the LiDAR
                xy = np.array([500.0, 800.0]) + heading * HAND_SPEED * (HAND_STEP * k + late)
                pose = {"token": f"{token}-{sensor}", "translation": [*xy, 0.0], "rotation": quaternion(yaw)}
                tables["ego_pose"].append(pose | {"timestamp": time + round(1e6 * late)})
                name = f"samples/{sensor}/{token}.jpg"
                data = {"token": f"{token}-{sensor}", "sample_token": token, "ego_pose_token": f"{token}-{sensor}"}
                data |= {"calibrated_sensor_token": sensor, "filename": name, "is_key_frame": True, "height": 90}
                tables["sample_data"].append(data | {"width": 160, "timestamp": time, "prev": "", "next": ""})
                if sensor != "LIDAR_TOP":
                    (root / name).parent.mkdir(parents=True, exist_ok=True)
                    shade = np.full((90, 160, 3), 20 * k + 60, dtype=np.uint8)
                    Image.fromarray(shade).save(root / name, quality=95)
            # A car starts 20 m ahead of the first pose and 3.5 m left of it and drives ahead at 4 m/s; a pedestrian
            # without LiDAR points stands 10 m ahead and 5 m right; an animal is not a class of the task.
            left = np.array([-heading[1], heading[0]])
            car = np.array([500.0, 800.0]) + heading * (20 + 4 * HAND_STEP * k) + left * 3.5
            walker = np.array([500.0, 800.0]) + heading * 10 - left * 5
            annotate(
                tables, scene, k, count, "vehicle.car", [*car, 0.8], [1.9, 4.5, 1.6], yaw + 0.1, 9, "vehicle.moving"
            )
            annotate(tables, scene, k, count, "human.pedestrian.adult", [*walker, 0.9], [0.6, 0.7, 1.8], 0.0, 0, None)
            annotate(tables, scene, k, count, "animal", [*walker, 0.3], [0.3, 0.6, 0.5], 0.0, 3, None)
    folder = root / "v1.0-hand"
    folder.mkdir()
    for name, rows in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    (folder / "splits.json").write_text(json.dumps({"hand_val": ["hand-0", "hand-1"], "hand_second": ["hand-1"]}))
    (root / "maps" / "expansion").mkdir(parents=True)
    Image.new("L", (8, 8)).save(root / "maps" / "mask.png")
    write_road(root / "maps" / "expansion" / "hand-town.json", yaw)
    return root


def calibration(sensor, translation, rotation, intrinsic):
    record = {"token": sensor, "sensor_token": f"sensor-{sensor}", "translation": translation, "rotation": rotation}
    return record | {"camera_intrinsic": intrinsic}


def annotate(tables, scene, k, count, category, translation, size, yaw, points, attribute):
    instance = f"{category}-{scene}"
    if k == 0:
        tables["instance"].append({"token": instance, "category_token": category})
    tables["sample_annotation"].append(
        {
            "token": f"{instance}-{k}", "sample_token": f"s{scene}-{k}", "instance_token": instance,
            "translation": translation, "size": size, "rotation": quaternion(yaw), "visibility_token": "4",
            "attribute_tokens": [attribute] if attribute else [], "num_lidar_pts": points, "num_radar_pts": 0,
            "prev": f"{instance}-{k - 1}" if k else "", "next": f"{instance}-{k + 1}" if k + 1 < count else "",
        }
    )  # fmt: skip


def write_road(path, yaw):
    """Writes the map of a straight road, 8 m wide and 200 m long, with a divider on its centre line."""
    turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
    corners = np.array([[-100, -4], [100, -4], [100, 4], [-100, 4], [-100, 0], [100, 0]]) @ turn.T + [500, 800]
    content = {name: [] for name in ("lane", "ped_crossing", "road_divider")}
    content["node"] = [{"token": str(k), "x": x, "y": y} for k, (x, y) in enumerate(corners)]
    content["polygon"] = [{"token": "p", "exterior_node_tokens": list("0123"), "holes": []}]
    content["line"] = [{"token": "l", "node_tokens": ["4", "5"]}]
    content["road_segment"] = [{"token": "r", "polygon_token": "p"}]
    content["lane_divider"] = [{"token": "d", "line_token": "l"}]
    path.write_text(json.dumps(content))
