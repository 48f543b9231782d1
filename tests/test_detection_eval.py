"""The official detection score on a hand-made dataset of three samples, and the conversions around it."""

import json
import math

import numpy as np
import pytest
import torch
from nuscenes import NuScenes
from nuscenes.utils.data_classes import Box
from PIL import Image
from pyquaternion import Quaternion

from perception.data.nuscenes import NuScenesDataset
from perception.errors import DataError
from perception.evaluation.detection import (
    evaluate_boxes,
    evaluate_submission,
    load_tables,
    submission_from_predictions,
)
from perception.geometry import rigid_from_quaternion
from perception.types import ATTRIBUTES, BOX_CLASSES, Boxes, FrameObjects, Polylines, map_tensors

VERSION, SPLIT = "v1.0-hand", "hand_val"
STEP = 0.5  # seconds between samples

# One object of each class in the ego frame of the first sample:
# class, category, attribute, x, y, z, length, width, height, yaw, speed along the box.
OBJECTS = [
    ("car", "vehicle.car", "vehicle.moving", 12.0, 3.0, 0.9, 4.6, 1.9, 1.7, 0.4, 6.0),
    ("truck", "vehicle.truck", "vehicle.parked", -15.0, 8.0, 1.5, 8.0, 2.6, 3.0, 2.8, 0.0),
    ("trailer", "vehicle.trailer", "vehicle.parked", 25.0, -12.0, 2.0, 12.0, 2.9, 3.9, -1.2, 0.0),
    ("bus", "vehicle.bus.rigid", "vehicle.stopped", 18.0, 14.0, 1.7, 11.0, 2.9, 3.4, 1.0, 0.0),
    ("construction_vehicle", "vehicle.construction", "vehicle.moving", -20.0, -9.0, 1.6, 6.0, 2.7, 3.2, 0.1, 1.0),
    ("bicycle", "vehicle.bicycle", "cycle.with_rider", 7.0, -6.0, 0.7, 1.8, 0.6, 1.5, -2.0, 4.0),
    ("motorcycle", "vehicle.motorcycle", "cycle.without_rider", -6.0, 5.0, 0.7, 2.1, 0.8, 1.4, 3.0, 0.0),
    ("pedestrian", "human.pedestrian.adult", "pedestrian.sitting_lying_down", 9.0, 8.0, 0.9, 0.7, 0.6, 1.2, 0.9, 0.0),
    ("traffic_cone", "movable_object.trafficcone", "", 10.0, -2.0, 0.5, 0.4, 0.5, 1.0, 0.0, 0.0),
    ("barrier", "movable_object.barrier", "", 14.0, -4.0, 0.5, 0.5, 2.4, 1.0, 1.3, 0.0),
]
EGO_YAW = 2.2  # the car drives into the map's upper left; a mix-up of ego and global axes cannot hide


def ego_pose(k):
    """Rotation and translation of sample k, as the ego_pose table holds them; the car drives 3 m/s ahead."""
    along = np.array([math.cos(EGO_YAW), math.sin(EGO_YAW), 0.0]) * 3.0 * STEP * k
    return Quaternion(axis=(0, 0, 1), radians=EGO_YAW), np.array([600.0, 1600.0, 0.0]) + along


def global_box(item, k):
    """The devkit's own Box of an object at sample k in the global frame."""
    _, _, _, x, y, z, length, width, height, yaw, speed = item
    box = Box([x, y, z], [width, length, height], Quaternion(axis=(0, 0, 1), radians=yaw))
    box.translate(np.array([math.cos(yaw), math.sin(yaw), 0.0]) * speed * STEP * k)
    rotation, _ = ego_pose(0)
    box.rotate(rotation)
    box.translate(ego_pose(0)[1])
    return box


def write_dataset(root, samples=3):
    """nuScenes tables of one scene, written by hand and by the devkit's Box alone."""

    def table(name, rows):
        (root / VERSION / f"{name}.json").write_text(json.dumps(rows))

    (root / VERSION).mkdir(parents=True)
    Image.new("L", (2, 2)).save(root / "map.png")
    (root / VERSION / "splits.json").write_text(json.dumps({SPLIT: ["scene-hand"], "nowhere": ["scene-other"]}))
    names = [item[1] for item in OBJECTS]
    table("category", [{"token": n, "name": n, "description": ""} for n in names])
    table("attribute", [{"token": n, "name": n, "description": ""} for n in ATTRIBUTES])
    table("visibility", [{"token": "4", "level": "v80-100", "description": ""}])
    table("sensor", [{"token": "lidar", "channel": "LIDAR_TOP", "modality": "lidar"}])
    mounting = {"translation": [0.9, 0.0, 1.8], "rotation": [1.0, 0.0, 0.0, 0.0], "camera_intrinsic": []}
    table("calibrated_sensor", [{"token": "cs", "sensor_token": "lidar", **mounting}])
    table("log", [{"token": "log", "logfile": "", "vehicle": "", "date_captured": "", "location": "boston-seaport"}])
    table("map", [{"token": "map", "log_tokens": ["log"], "category": "semantic_prior", "filename": "map.png"}])
    times = [1_600_000_000_000_000 + int(k * STEP * 1e6) for k in range(samples)]
    table(
        "ego_pose",
        [
            {
                "token": f"pose{k}",
                "timestamp": times[k],
                "rotation": ego_pose(k)[0].elements.tolist(),
                "translation": ego_pose(k)[1].tolist(),
            }
            for k in range(samples)
        ],
    )
    ends = {"first_sample_token": "s0", "last_sample_token": f"s{samples - 1}", "nbr_samples": samples}
    table("scene", [{"token": "scene", "log_token": "log", "name": "scene-hand", "description": "", **ends}])

    def chain(prefix, k):
        return {"prev": f"{prefix}{k - 1}" if k else "", "next": f"{prefix}{k + 1}" if k + 1 < samples else ""}

    table(
        "sample",
        [{"token": f"s{k}", "timestamp": times[k], "scene_token": "scene", **chain("s", k)} for k in range(samples)],
    )
    table(
        "sample_data",
        [
            {
                "token": f"d{k}",
                "sample_token": f"s{k}",
                "ego_pose_token": f"pose{k}",
                "calibrated_sensor_token": "cs",
                "timestamp": times[k],
                "fileformat": "pcd",
                "is_key_frame": True,
                "height": 0,
                "width": 0,
                "filename": f"samples/LIDAR_TOP/{k}.pcd.bin",
                **chain("d", k),
            }
            for k in range(samples)
        ],
    )
    instances, annotations = [], []
    for number, item in enumerate(OBJECTS):
        prefix = f"a{number}_"
        ends = {"first_annotation_token": f"{prefix}0", "last_annotation_token": f"{prefix}{samples - 1}"}
        instances.append({"token": f"i{number}", "category_token": item[1], "nbr_annotations": samples, **ends})
        for k in range(samples):
            box = global_box(item, k)
            annotations.append(
                {
                    "token": f"{prefix}{k}",
                    "sample_token": f"s{k}",
                    "instance_token": f"i{number}",
                    "visibility_token": "4",
                    "attribute_tokens": [item[2]] if item[2] else [],
                    "translation": box.center.tolist(),
                    "size": box.wlh.tolist(),
                    "rotation": box.orientation.elements.tolist(),
                    "num_lidar_pts": 9,
                    "num_radar_pts": 0,
                    **chain(prefix, k),
                }
            )
    table("instance", instances)
    table("sample_annotation", annotations)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("hand")
    write_dataset(root)
    poses = {f"s{k}": rigid_from_quaternion(ego_pose(k)[0].elements, ego_pose(k)[1]) for k in range(3)}
    return root, NuScenes(VERSION, str(root), verbose=False), poses


def perfect_predictions():
    """What a perfect network returns: in each sample's own ego frame, by plain trigonometry."""
    scenes = {}
    for k in range(3):
        rows = []
        for name, _, attribute, x, y, z, length, width, height, yaw, speed in OBJECTS:
            vx, vy = speed * math.cos(yaw), speed * math.sin(yaw)
            label, attribute = BOX_CLASSES.index(name), ATTRIBUTES.index(attribute) if attribute else -1
            # The ego moves 3 m/s along its own x, so the world slides back by that.
            position = (x + (vx - 3.0) * STEP * k, y + vy * STEP * k, z)
            rows.append((*position, length, width, height, yaw, vx, vy, label, attribute))
        rows = torch.tensor(rows)
        padding = torch.full((2, rows.shape[1]), float("nan"))
        padding[:, 9:] = -1
        rows = torch.cat([rows, padding])
        boxes = Boxes(
            center=rows[:, 0:3],
            size=rows[:, 3:6],
            yaw=rows[:, 6],
            velocity=rows[:, 7:9],
            label=rows[:, 9].long(),
            attribute=rows[:, 10].long(),
            score=torch.linspace(0.9, 0.5, len(rows)),
            valid=torch.arange(len(rows)) < len(OBJECTS),
            uncertainty=torch.zeros(len(rows), 9),
        )
        nothing = torch.zeros(0)
        lines = Polylines(
            torch.zeros(0, 2, 2), nothing.bool(), nothing.long(), nothing, nothing.bool(), torch.zeros(0, 2, 2)
        )
        scenes[f"s{k}"] = FrameObjects(boxes, lines)
    return scenes


def changed(scenes, **changes):
    """The scenes with box fields replaced by functions of the boxes."""
    return {
        token: scene._replace(boxes=scene.boxes._replace(**{name: f(scene.boxes) for name, f in changes.items()}))
        for token, scene in scenes.items()
    }


def score(dataset, scenes):
    root, nusc, poses = dataset
    return evaluate_boxes(scenes, poses, root, VERSION, SPLIT, nusc=nusc)


def test_perfect_predictions_score_one(dataset, tmp_path, capfd):
    root, _, poses = dataset
    result = evaluate_boxes(perfect_predictions(), poses, root, VERSION, SPLIT, out_dir=tmp_path / "out")
    assert result.nds == pytest.approx(1.0, abs=1e-5)
    assert result.mean_ap == pytest.approx(1.0, abs=1e-9)
    assert result.errors == pytest.approx(dict.fromkeys(("mATE", "mASE", "mAOE", "mAVE", "mAAE"), 0.0), abs=1e-5)
    assert result.class_ap == pytest.approx(dict.fromkeys(BOX_CLASSES, 1.0))
    assert result.samples == 3 and result.gt_count == dict.fromkeys(BOX_CLASSES, 3)
    assert capfd.readouterr() == ("", "")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["nds"] == result.nds
    assert len(json.loads((tmp_path / "out" / "submission.json").read_text())["results"]["s0"]) == len(OBJECTS)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["metrics.json", "submission.json"]


def test_the_ground_truth_of_a_generated_town_scores_one_in_every_class_that_occurs(town_root):
    dataset = NuScenesDataset(town_root, "v1.0-synthetic", "town_val", image_size=(32, 56))
    scenes = {token: map_tensors(lambda t: t[0], dataset[i].gt) for i, token in enumerate(dataset.tokens)}
    poses = {token: dataset.ego_pose(i) for i, token in enumerate(dataset.tokens)}
    result = evaluate_boxes(scenes, poses, town_root, "v1.0-synthetic", "town_val")
    occurs = {name: float(count > 0) for name, count in result.gt_count.items()}
    assert result.class_ap == pytest.approx(occurs, abs=1e-6) and sum(occurs.values()) >= 5
    for name, errors in result.class_errors.items():
        wanted = {key: 1 - occurs[name] for key, value in errors.items() if not math.isnan(value)}
        assert {key: errors[key] for key in wanted} == pytest.approx(wanted, abs=1e-3)


def test_swapped_length_and_width_show_in_the_scale_error_alone(dataset):
    result = score(dataset, changed(perfect_predictions(), size=lambda b: b.size[:, [1, 0, 2]]))
    # Boxes of footprint l x w and w x l overlap in w x w: mean over classes of 1 - w / (2 l - w), where w < l.
    expected = np.mean([1 - min(i[6:8]) / (2 * max(i[6:8]) - min(i[6:8])) for i in OBJECTS])
    assert result.errors["mASE"] == pytest.approx(expected, abs=1e-5) and expected > 0.5
    assert result.errors["mAOE"] == pytest.approx(0.0, abs=1e-5)
    assert result.mean_ap == pytest.approx(1.0)


def test_yaw_turned_by_90_degrees_shows_in_the_orientation_error_alone(dataset):
    result = score(dataset, changed(perfect_predictions(), yaw=lambda b: b.yaw + math.pi / 2))
    assert result.errors["mAOE"] == pytest.approx(math.pi / 2, abs=1e-5)
    assert result.errors["mASE"] == pytest.approx(0.0, abs=1e-5)
    assert result.nds == pytest.approx(0.9, abs=1e-5)


def test_velocity_in_wrong_axes_shows_in_the_velocity_error_alone(dataset):
    turned = changed(perfect_predictions(), velocity=lambda b: torch.stack([-b.velocity[:, 1], b.velocity[:, 0]], 1))
    result = score(dataset, turned)
    # A vector turned by 90 degrees is off by sqrt(2) of its length; eight classes have a velocity error.
    expected = math.sqrt(2) * sum(i[10] for i in OBJECTS) / 8
    assert result.errors["mAVE"] == pytest.approx(expected, abs=1e-4)
    assert result.errors["mATE"] == pytest.approx(0.0, abs=1e-5)


def test_unknown_attributes_follow_class_and_speed(dataset):
    result = score(dataset, changed(perfect_predictions(), attribute=lambda b: torch.full_like(b.attribute, -1)))
    # Every object of the table behaves as the rule expects, except for the pedestrian who sits.
    assert result.errors["mAAE"] == pytest.approx(1 / 8, abs=1e-6)
    assert result.class_errors["pedestrian"]["mAAE"] == pytest.approx(1.0)


def test_a_shifted_box_is_off_by_the_shift(dataset):
    shifted = changed(perfect_predictions(), center=lambda b: b.center + torch.tensor([0.36, 0.48, 0.0]))
    result = score(dataset, shifted)
    assert result.errors["mATE"] == pytest.approx(0.6, abs=1e-5)
    assert result.mean_ap == pytest.approx(0.75)  # too far for the 0.5 m threshold, near enough for 1, 2 and 4 m


def test_no_box_at_all_scores_zero(dataset):
    result = score(dataset, changed(perfect_predictions(), valid=lambda b: torch.zeros_like(b.valid)))
    assert result.nds == 0.0 and result.mean_ap == 0.0
    assert result.errors["mATE"] == 1.0


def test_boxes_of_the_submission_are_those_of_the_devkit():
    """Ego boxes on a tilted ego pose, against the devkit's own transform of its boxes to the global frame."""
    rng = np.random.default_rng(4)
    turn = Quaternion(axis=(0, 0, 1), radians=2.0) * Quaternion(axis=(0.6, 0.8, 0), radians=0.03)
    pose = rigid_from_quaternion(turn.elements, [1010.0, 640.0, 2.0])
    devkit_boxes = [  # upright in the ego frame, so that yaw alone describes them
        Box(
            rng.uniform(-40, 40, 3), rng.uniform(0.5, 9, 3), Quaternion(axis=(0, 0, 1), radians=k - 3.0),
            velocity=(1.0 + k, -2.0, 0.0),
        )
        for k in range(6)
    ]  # fmt: skip
    boxes = Boxes(
        center=torch.tensor(np.array([box.center for box in devkit_boxes])),
        size=torch.tensor(np.array([box.wlh[[1, 0, 2]] for box in devkit_boxes])),
        yaw=torch.arange(6.0) - 3.0,
        velocity=torch.tensor(np.array([box.velocity[:2] for box in devkit_boxes])),
        label=torch.arange(6),
        attribute=torch.arange(6),
        score=0.9 - torch.arange(6.0) / 10,
        valid=torch.ones(6, dtype=torch.bool),
        uncertainty=torch.zeros(6, 9),
    )
    found = submission_from_predictions({"t": FrameObjects(boxes, None)}, {"t": pose})["results"]["t"]
    for k, (record, box) in enumerate(zip(found, devkit_boxes, strict=True)):
        box.rotate(turn)
        box.translate(pose[:3, 3])
        assert record["translation"] == pytest.approx(box.center, abs=1e-6)
        assert record["size"] == pytest.approx(box.wlh, abs=1e-6)
        assert abs(np.dot(record["rotation"], box.orientation.elements)) == pytest.approx(1.0, abs=1e-6)
        assert record["velocity"] == pytest.approx(box.velocity[:2], abs=1e-6)
        assert (record["detection_name"], record["attribute_name"]) == (BOX_CLASSES[k], ATTRIBUTES[k])
        assert record["detection_score"] == pytest.approx(0.9 - k / 10)


@pytest.mark.parametrize(
    "change",
    [{"center": [0.0, math.nan, 0]}, {"center": [math.inf, 0, 0]}, {"size": [1.0, 0.0, 1]}, {"size": [1.0, 1, -1]},
     {"size": [1.0, math.nan, 1]}, {"yaw": math.nan}, {"score": math.nan}, {"velocity": [math.inf, 0.0]}],
    ids=repr,
)  # fmt: skip
def test_boxes_that_no_devkit_could_read_are_named(change):
    good = Boxes(
        torch.ones(2, 3), torch.ones(2, 3), torch.ones(2), torch.tensor([[math.nan, 0], [1.0, 2]]),
        torch.zeros(2).long(), torch.zeros(2).long() - 1, torch.ones(2), torch.ones(2).bool(), torch.zeros(2, 9),
    )  # fmt: skip
    submission_from_predictions({"t": FrameObjects(good, None)}, {"t": np.eye(4)})  # a velocity may be unknown
    (name, value), *_ = change.items()
    getattr(good, name)[1] = torch.tensor(value)
    with pytest.raises(DataError, match="box 1 of sample t has a number that is not finite or a size that is not pos"):
        submission_from_predictions({"t": FrameObjects(good, None)}, {"t": np.eye(4)})


def test_numbers_of_a_submission_are_those_of_quaternion_objects():
    """To the last digit: all boxes of a sample are turned at once."""
    rng = np.random.default_rng(0)
    count = 300
    boxes = Boxes(
        center=torch.from_numpy(rng.normal(0, 30, (count, 3))), size=torch.from_numpy(rng.uniform(0.1, 9, (count, 3))),
        yaw=torch.from_numpy(rng.normal(0, 3, count)), velocity=torch.from_numpy(rng.normal(0, 0.2, (count, 2))),
        label=torch.from_numpy(rng.integers(0, 10, count)), attribute=torch.full((count,), -1),
        score=torch.linspace(1, 0, count), valid=torch.ones(count, dtype=torch.bool),
        uncertainty=torch.zeros(count, 9),
    )  # fmt: skip
    turn = Quaternion(rng.normal(size=4)).normalised
    pose = turn.transformation_matrix
    pose[:3, 3] = rng.normal(0, 1000, 3)
    objects = FrameObjects(boxes, Polylines(*(torch.zeros(0) for _ in Polylines._fields)))
    records = submission_from_predictions({"sample": objects}, {"sample": pose})["results"]["sample"]
    turn = Quaternion(matrix=pose[:3, :3])
    for k, record in enumerate(records):
        one = turn * Quaternion(axis=(0, 0, 1), radians=float(boxes.yaw[k]))
        assert record["rotation"] == one.elements.tolist()
        moving = np.linalg.norm(boxes.velocity[k].numpy()) > 0.2
        assert moving == (".moving" in record["attribute_name"] or record["attribute_name"] == "cycle.with_rider") or (
            record["attribute_name"] == ""
        )


def test_processes_give_the_digits_of_one(town_root, tmp_path):
    """On predictions with errors of all kinds, classes without ground truth and samples without predictions."""
    (version,) = [path.parent.name for path in town_root.glob("*/sample.json")]
    splits = json.loads((town_root / version / "splits.json").read_text())
    (split,) = [name for name, scenes in splits.items() if scenes]
    data = NuScenesDataset(town_root, version, split, image_size=(128, 224), cache_dir=tmp_path)
    generator = torch.Generator().manual_seed(0)
    predictions = {}
    for i, token in enumerate(data.tokens):
        boxes = data.gt_boxes(i)
        noise = torch.randn(len(boxes.score), 3, generator=generator)
        boxes = boxes._replace(
            center=boxes.center + noise, size=boxes.size * (1 + 0.1 * noise.abs()), yaw=boxes.yaw + noise[:, 0],
            score=noise[:, 1].sigmoid(), valid=boxes.valid & (noise[:, 2] > -1) & (i != 2),
        )  # fmt: skip
        predictions[token] = FrameObjects(boxes, Polylines(*(torch.zeros(0) for _ in Polylines._fields)))
    poses = {token: data.ego_pose(i) for i, token in enumerate(data.tokens)}
    submission = submission_from_predictions(predictions, poses)
    nusc = load_tables(town_root, version)
    alone = evaluate_submission(nusc, split, submission, workers=1)
    assert 0.05 < alone.nds < 0.9 and len(set(alone.class_ap.values())) > 3
    assert json.dumps(evaluate_submission(nusc, split, submission, workers=2).as_dict()) == json.dumps(alone.as_dict())


def test_of_equal_scores_the_first_boxes_are_kept():
    M = 502
    boxes = Boxes(
        center=torch.arange(M, dtype=torch.float64)[:, None].expand(M, 3), size=torch.ones(M, 3), yaw=torch.zeros(M),
        velocity=torch.zeros(M, 2), label=torch.zeros(M).long(), attribute=torch.full((M,), -1),
        score=torch.full((M,), 0.5), valid=torch.ones(M).bool(), uncertainty=torch.zeros(M, 9),
    )  # fmt: skip
    found = submission_from_predictions({"t": FrameObjects(boxes, None)}, {"t": np.eye(4)})["results"]["t"]
    assert [box["translation"][0] for box in found] == list(range(500))
