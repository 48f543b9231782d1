"""Tables that cannot be right are named by table, record and field; good ones have no finding."""

import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from perception.cli.doctor import main
from perception.data.checked_tables import check_tables, open_tables
from perception.data.loader import ClipRequest
from perception.data.nuscenes import NuScenesDataset
from perception.data.table_files import TABLES
from perception.errors import DataError, PerceptionWarning
from perception.evaluation.dataset import check_evaluable
from perception.evaluation.detection import evaluate_boxes, load_tables
from perception.inference.ego_motion import EgoMotion
from perception.types import map_tensors

VERSION, SPLIT, CAMERAS = "v1.0-hand", "hand_val", ("CAM_FRONT", "CAM_BACK")


@pytest.fixture
def root(hand_root, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(hand_root, tmp_path / "root")


def read(root, tmp_path, **changes):
    options = {"image_size": (90, 160), "cameras": CAMERAS, "cache_dir": tmp_path / "cache"} | changes
    return NuScenesDataset(root, VERSION, SPLIT, **options)


def rows_of(root, table):
    return json.loads((root / VERSION / f"{table}.json").read_text())


def set_field(root, table, token, /, **fields):
    rows = rows_of(root, table)
    for row in rows:
        if row["token"] == token or token is None:
            row.update(fields)
    (root / VERSION / f"{table}.json").write_text(json.dumps(rows))


def test_good_tables_have_no_finding(hand_root, town_root):
    assert check_tables(hand_root, VERSION) == []
    assert check_tables(town_root, "v1.0-synthetic") == []


# Every foreign key of the schema: https://www.nuscenes.org/nuscenes#data-format. "error": the library or the devkit's
# evaluation reads it.
KEYS = [
    ("instance", "category_token", "error"),
    ("instance", "first_annotation_token", "warning"),
    ("instance", "last_annotation_token", "warning"),
    ("calibrated_sensor", "sensor_token", "error"),
    ("scene", "log_token", "error"),
    ("scene", "first_sample_token", "error"),
    ("scene", "last_sample_token", "warning"),
    ("sample", "scene_token", "error"),
    ("sample", "next", "error"),
    ("sample", "prev", "error"),
    ("sample_data", "sample_token", "error"),
    ("sample_data", "ego_pose_token", "error"),
    ("sample_data", "calibrated_sensor_token", "error"),
    ("sample_data", "next", "warning"),
    ("sample_data", "prev", "warning"),
    ("sample_annotation", "sample_token", "error"),
    ("sample_annotation", "instance_token", "error"),
    ("sample_annotation", "visibility_token", "warning"),
    ("sample_annotation", "attribute_tokens", "error"),
    ("sample_annotation", "next", "error"),
    ("sample_annotation", "prev", "error"),
]


@pytest.mark.parametrize(("table", "field", "severity"), KEYS)
@pytest.mark.parametrize("value", ["dangling", None, 7])
def test_every_dangling_reference_is_named(root, tmp_path, table, field, severity, value):
    rows = rows_of(root, table)
    token = rows[-1]["token"]
    set_field(root, table, token, **{field: [value] if field == "attribute_tokens" else value})
    found = [
        finding for finding in check_tables(root, VERSION) if (finding.field, finding.severity) == (field, severity)
    ]
    assert any(finding.file == str(root / VERSION / f"{table}.json") and token in finding.records for finding in found)
    assert all("\n" not in finding.sentence() for finding in found)
    if severity == "error":
        with pytest.raises(DataError, match=rf"{table}\.json: record {token} .*'{field}'"):
            open_tables(root, VERSION)
    else:
        assert len(read(root, tmp_path)) == 6


def test_the_logs_of_a_map_may_be_those_of_a_larger_dataset(root):
    """The map table of nuScenes mini lists the logs of the whole dataset."""
    set_field(root, "map", None, log_tokens=["log", "another"])
    assert check_tables(root, VERSION) == []
    set_field(root, "map", None, log_tokens=["another"])
    with pytest.raises(DataError, match=r"log\.json: record log is in no 'log_tokens' of map\.json"):
        open_tables(root, VERSION)


CAR = "vehicle.car-0-1"  # the middle one of three boxes
FAULTS = {
    "a cycle of samples": ("sample", "s0-2", {"next": "s0-0"}, r"s0-0 as 'next', which is not later.*cycle of 3"),
    "a cycle of one": ("sample", "s0-2", {"next": "s0-2"}, r"which is not later.*cycle of 1"),
    "a cycle of boxes": ("sample_annotation", "vehicle.car-0-2", {"next": "vehicle.car-0-0"}, r"cycle of 3"),
    "equal times": ("sample", "s0-1", {"timestamp": 1000_000_000}, r"record s0-0 has s0-1 as 'next', .*must increase"),
    "a LiDAR time that goes back": (
        "sample_data", "s0-1-LIDAR_TOP", {"timestamp": 999_000_000}, r"999000000 as 'timestamp', which is not later"
    ),
    "a time that is text": ("sample", "s0-1", {"timestamp": "now"}, r"whole microseconds as 'timestamp'.*\"now\""),
    "a time with a fraction": ("sample_data", "s0-1-LIDAR_TOP", {"timestamp": 1.5}, r"whole microseconds"),
    "a time before 1970": ("sample", "s0-1", {"timestamp": -1}, r"whole microseconds"),
    "a time beyond int64": ("sample", "s0-1", {"timestamp": 10**30}, r"whole microseconds"),
    "a size of 0": ("sample_annotation", CAR, {"size": [1.0, 0.0, 1.0]}, r"metres above 0.*'size'"),
    "a negative size": ("sample_annotation", CAR, {"size": [-1.0, 2.0, 1.0]}, r"metres above 0"),
    "an infinite size": ("sample_annotation", CAR, {"size": [float("inf"), 2.0, 1.0]}, r"3 finite numbers as 'size'"),
    "a huge size": ("sample_annotation", CAR, {"size": [1e30, 2.0, 1.0]}, r"\(0\.001 to 1000\) as 'size'"),
    "a size of almost 0": ("sample_annotation", CAR, {"size": [1e-300, 2.0, 1.0]}, r"0\.001 to 1000"),
    "a position of NaN": ("sample_annotation", CAR, {"translation": [0, float("nan"), 0]}, r"3 finite numbers"),
    "a position beyond float": ("ego_pose", "s0-1-CAM_BACK", {"translation": [0, 10**400, 0]}, r"3 finite numbers"),
    "a position of booleans": ("ego_pose", "s0-1-CAM_BACK", {"translation": [True, 0, 0]}, r"3 finite numbers"),
    "a position in millimetres": ("ego_pose", "s0-1-CAM_BACK", {"translation": [4e8, 0, 0]}, r"metres, at most 1e\+08"),
    "a quaternion of length 0": ("sample_annotation", CAR, {"rotation": [0, 0, 0, 0]}, r"a unit quaternion"),
    "a quaternion of length 2": ("ego_pose", "s0-1-CAM_BACK", {"rotation": [2, 0, 0, 0]}, r"a unit quaternion"),
    "a quaternion too large": ("ego_pose", "s0-1-CAM_BACK", {"rotation": [1e300, 0, 0, 0]}, r"a unit quaternion"),
    "a camera far away": ("calibrated_sensor", "CAM_BACK", {"translation": [1500, 0, 0]}, r"at most 50 from the ego"),
    "a focal length of 0": (
        "calibrated_sensor", "CAM_BACK", {"camera_intrinsic": [[0, 0, 80], [0, 60, 45], [0, 0, 1]]},
        r"focal lengths above 0",
    ),
    "zero intrinsics": ("calibrated_sensor", "CAM_BACK", {"camera_intrinsic": [[0] * 3] * 3}, r"focal lengths above 0"),
    "no intrinsics": ("calibrated_sensor", "CAM_BACK", {"camera_intrinsic": []}, r"3 x 3 finite numbers"),
    "intrinsics of another image size": (
        "calibrated_sensor", "CAM_BACK", {"camera_intrinsic": [[900, 0, 800], [0, 900, 450], [0, 0, 1]]},
        r"camera_intrinsic.*principal point",
    ),
    "an absolute file": ("sample_data", "s0-1-CAM_BACK", {"filename": "/etc/passwd"}, r"below the root.*/etc/passwd"),
    "a file of another system": ("sample_data", "s0-1-CAM_BACK", {"filename": "C:\\a.jpg"}, r"below the root"),
    "a file that leaves": ("sample_data", "s0-1-CAM_BACK", {"filename": "samples/../../a"}, r"below the root"),
    "a map that leaves": ("log", "log", {"location": "../../../secret"}, r"the name of a map as 'location'"),
    "a mask that leaves": ("map", "map", {"filename": "../mask.png"}, r"below the root"),
    "a mask that is missing": ("map", "map", {"filename": "maps/other.png"}, r"has no file .*other\.png, which is its"),
    "an image without a file": ("sample_data", "s0-1-CAM_BACK", {"filename": ""}, r"the path of an image as"),
    "an image of 0 pixels": ("sample_data", "s0-1-CAM_BACK", {"height": 0}, r"whole pixels as 'height'"),
    "a large image": ("sample_data", "s0-1-CAM_BACK", {"height": 36_000, "width": 36_000}, r"at most 8e\+07 pixels"),
    "a flag that is text": ("sample_data", "s0-1-CAM_BACK", {"is_key_frame": "false"}, r"true or false"),
    "points that are null": ("sample_annotation", CAR, {"num_lidar_pts": None}, r"-1 if it is unknown"),
    "points with a fraction": ("sample_annotation", CAR, {"num_radar_pts": 1.0}, r"a whole number"),
    "two attributes": (
        "sample_annotation", CAR, {"attribute_tokens": ["vehicle.moving"] * 2}, r"at most one attribute"
    ),
    "an unknown attribute": ("attribute", "vehicle.moving", {"name": "vehicle.flying"}, r"does not know.*cycle\.with"),
    "a box of another instance": (
        "sample_annotation", CAR, {"instance_token": "animal-0"}, r"a record of the same instance as 'next'"
    ),
    "a sample of another scene": ("sample", "s0-1", {"scene_token": "scene1"}, r"a sample of the same scene as 'next'"),
    "links that disagree": ("sample", "s0-2", {"prev": "s0-0"}, r"a record whose 'prev' is this record as 'next'"),
    "a scene that starts in another": ("scene", "scene0", {"first_sample_token": "s1-0"}, r"a sample of this scene"),
    "a scene that starts late": ("scene", "scene0", {"first_sample_token": "s0-1"}, r"s0-0 is not reached from its"),
    "a second keyframe": ("sample_data", "s0-1-CAM_BACK", {"sample_token": "s0-2"}, r"a second keyframe of CAM_BACK"),
    "no LiDAR keyframe": ("sample_data", "s0-1-LIDAR_TOP", {"is_key_frame": False}, r"s0-1 has no LIDAR_TOP keyframe"),
    "a token twice": ("sample", "s0-2", {"token": "s0-1"}, r"has the 'token' of row"),
    "a token of a surrogate": ("sample", "s0-2", {"token": "\ud800"}, r"row 2 needs text that is not empty as 'token'"),
    "a token with NUL": ("sample", "s0-2", {"token": "s0-2\0"}, r"row 2 needs text"),
    "a token that is a list": ("sample", "s0-2", {"token": []}, r"row 2 needs text"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(root, fault):
    table, token, fields, message = FAULTS[fault]
    set_field(root, table, token, **fields)
    with pytest.raises(DataError, match=message) as caught:
        open_tables(root, VERSION)
    assert "\n" not in str(caught.value) and f"{VERSION}/" in str(caught.value)


IMPLAUSIBLE = {
    "a gap": (
        "sample_data",
        "s0-2-LIDAR_TOP",
        {"timestamp": 1_010_000_000},
        r"s0-1 is followed by a gap of more than 2",
    ),
    "a jump": (
        "ego_pose",
        "s0-2-LIDAR_TOP",
        {"translation": [600.0, 800.0, 0.0]},
        r"s0-1 is followed by .* or by a jump",
    ),
    "an image of another time": ("sample_data", "s0-1-CAM_BACK", {"timestamp": 1_002_000_000}, r"microseconds of its"),
    "a pose of another time": ("ego_pose", "s0-1-CAM_BACK", {"timestamp": 1}, r"the pose at its own timestamp"),
    "a wrong total": ("scene", "scene0", {"nbr_samples": 4}, r"the number of its samples as 'nbr_samples'"),
    "no points at all": (
        "sample_annotation",
        None,
        {"num_lidar_pts": 0},
        r"no LiDAR and radar points, like all others",
    ),
    "a name twice": ("scene", "scene1", {"name": "hand-0"}, r"a name that no other scene has"),
}


@pytest.mark.parametrize("case", IMPLAUSIBLE)
def test_what_is_implausible_is_a_warning(root, case):
    table, token, fields, message = IMPLAUSIBLE[case]
    set_field(root, table, token, **fields)
    findings = check_tables(root, VERSION)
    assert {finding.severity for finding in findings} == {"warning"}
    assert any(re.search(message, finding.sentence()) for finding in findings)
    open_tables(root, VERSION)


def test_all_findings_come_at_once(root):
    for fault in (
        "a size of 0",
        "a focal length of 0",
        "an absolute file",
        "a cycle of samples",
        "a time that is text",
    ):
        table, token, fields, _ = FAULTS[fault]
        set_field(root, table, token, **fields)
    fields = {finding.field for finding in check_tables(root, VERSION) if finding.severity == "error"}
    assert fields >= {"size", "camera_intrinsic", "filename", "next", "timestamp"}
    with pytest.raises(DataError, match=r"[4-9] more kinds of faults were found.*perception doctor data"):
        open_tables(root, VERSION)
    set_field(root, "sample_annotation", None, size=[0, 0, 0])
    (finding,) = [finding for finding in check_tables(root, VERSION) if finding.field == "size"]
    assert finding.total == 18 and "(and 17 more such records)" in finding.sentence()


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("content", ["", "{}", "[1]", "null", "[" * 100_000, "\x00", '[{"token": 1e999}]', "[{}]"])
def test_a_table_of_another_shape_is_named(root, table, content):
    (root / VERSION / f"{table}.json").write_text(content)
    with pytest.raises(DataError, match=rf"{table}\.json") as caught:
        load_tables(root, VERSION)
    assert "\n" not in str(caught.value)
    assert check_tables(root, VERSION)


def test_an_empty_table_of_annotations_is_a_dataset_without_boxes(root, tmp_path):
    """As the test version of nuScenes."""
    for table in ("sample_annotation", "instance"):
        (root / VERSION / f"{table}.json").write_text("[]")
    data = read(root, tmp_path)
    assert data[0].gt.boxes.valid.shape == (1, 0)
    with pytest.raises(DataError, match=r"has no annotation of the ten classes"):
        check_evaluable(data)


# Points


def test_points_count_as_in_the_devkit(root, tmp_path):
    """The devkit drops a box if its LiDAR and radar points add up to 0: -1 is unknown and counts."""
    car, walker = "vehicle.car-0-1", "human.pedestrian.adult-0-1"
    for lidar, radar in ((0, 0), (-1, 0), (0, 3), (5, 0), (-1, 1), (-1, -1)):
        set_field(root, "sample_annotation", car, num_lidar_pts=lidar, num_radar_pts=radar)
        set_field(root, "sample_annotation", walker, num_lidar_pts=4, num_radar_pts=0)
        data = read(root, tmp_path)
        from nuscenes.eval.common.config import config_factory
        from nuscenes.eval.common.loaders import add_center_dist, filter_eval_boxes, load_gt_of_sample_tokens
        from nuscenes.eval.detection.data_classes import DetectionBox

        nusc = open_tables(root, VERSION)
        gt = load_gt_of_sample_tokens(nusc, ["s0-1"], DetectionBox)
        kept = filter_eval_boxes(nusc, add_center_dist(nusc, gt), config_factory("detection_cvpr_2019").class_range)
        assert data.gt_boxes(1).valid.sum() == len(kept["s0-1"]), (lidar, radar)


def test_a_dataset_without_points_is_named_and_not_scored(hand_root, root, tmp_path):
    shutil.copytree(hand_root, root.parent / "good")
    set_field(root, "sample_annotation", None, num_lidar_pts=0)
    with pytest.warns(
        PerceptionWarning,
        match=r"root/v1\.0-hand/sample_annotation\.json gives every box .* 0 LiDAR and radar points.*write -1",
    ):
        read([root.parent / "good", root], tmp_path)
    with pytest.warns(PerceptionWarning):
        data = read(root, tmp_path)
    message = r"gives all 12 boxes of split hand_val 0 LiDAR and radar points.*write -1 as num_lidar_pts"
    with pytest.raises(DataError, match=message):
        check_evaluable(data)
    gt = {token: data[i].gt for i, token in enumerate(data.tokens)}
    predictions = {token: map_tensors(lambda tensor: tensor[0], of_sample) for token, of_sample in gt.items()}
    poses = {token: data.ego_pose(i) for i, token in enumerate(data.tokens)}
    with pytest.raises(DataError, match=message):
        evaluate_boxes(predictions, poses, root, VERSION, SPLIT, out_dir=tmp_path / "out")
    assert (tmp_path / "out" / "submission.json").is_file()  # the predictions are not lost


def test_a_dataset_whose_boxes_are_all_out_of_range_is_named(root, tmp_path):
    set_field(root, "sample_annotation", None, translation=[9000.0, 0.0, 0.0])
    data = read(root, tmp_path)
    gt = {token: data[i].gt for i, token in enumerate(data.tokens)}
    predictions = {token: map_tensors(lambda tensor: tensor[0], of_sample) for token, of_sample in gt.items()}
    poses = {token: data.ego_pose(i) for i, token in enumerate(data.tokens)}
    with pytest.raises(DataError, match=r"no box of split hand_val .* in the range of its class"):
        evaluate_boxes(predictions, poses, root, VERSION, SPLIT)


# Gaps


@pytest.mark.parametrize(("seconds", "metres"), [(0.5, 3.0), (1.99, 3.0), (2.01, 3.0), (0.5, 30.9), (0.5, 31.1)])
def test_gaps_and_jumps_follow_the_rule_of_live_use(root, tmp_path, seconds, metres):
    """The third keyframe of a scene is moved in time and place: datasets and `EgoMotion` agree on the first frames."""
    micros = 1_000_500_000 + round(1e6 * seconds)
    pose = next(row for row in rows_of(root, "ego_pose") if row["token"] == "s0-1-LIDAR_TOP")["translation"]
    ahead = metres * np.array([np.cos(np.radians(30)), np.sin(np.radians(30)), 0.0])
    set_field(root, "sample", "s0-2", timestamp=micros)
    for sensor in ("LIDAR_TOP", *CAMERAS):
        set_field(root, "sample_data", f"s0-2-{sensor}", timestamp=micros)
        set_field(root, "ego_pose", f"s0-2-{sensor}", timestamp=micros, translation=(pose + ahead).tolist())
    data, live = read(root, tmp_path), EgoMotion()
    for i in range(3):
        motion = live.since_last(data.ego_pose(i), data.timestamps[i])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PerceptionWarning)
            live.keep(motion)
        frame = data[i].frames
        assert bool(frame.is_first) == motion.is_first
        assert float(frame.seconds_since_prev) == pytest.approx(motion.seconds, abs=1e-4)
        assert np.allclose(frame.ego_from_prev[0].numpy(), motion.ego_from_prev, atol=1e-4)
    assert motion.is_first == (seconds > 2 or metres > 60 * seconds + 1)
    assert data[ClipRequest((1, 2), 0, (0,))].frames.is_first.tolist() == [False, motion.is_first]


def test_keyframes_left_out_count_as_a_gap(hand_root, tmp_path):
    frames = read(hand_root, tmp_path)[ClipRequest((0, 3), -1, (0,))].frames  # 100 s apart
    assert frames.is_first.tolist() == [True, True] and frames.seconds_since_prev.tolist() == [0.0, 0.0]
    assert torch.equal(frames.ego_from_prev[1], torch.eye(4))


def test_timestamps_of_another_unit_are_named(root, tmp_path):
    for table in ("sample", "sample_data"):
        rows = rows_of(root, table)
        for row in rows:
            row["timestamp"] *= 1000
        (root / VERSION / f"{table}.json").write_text(json.dumps(rows))
    with pytest.warns(PerceptionWarning, match=r"4 of 4 keyframes .*keyframes are 500 s apart if timestamps are micro"):
        read(root, tmp_path)


# Files


def test_a_file_below_a_folder_with_dots_is_fine(root, tmp_path):
    (root / "samples" / "CAM_BACK" / "s0-0.jpg").rename(root / "samples" / "CAM_BACK" / "..s0..0.jpg")
    set_field(root, "sample_data", "s0-0-CAM_BACK", filename="./samples/CAM_FRONT/../CAM_BACK/..s0..0.jpg")
    assert read(root, tmp_path)[0].frames.images.shape == (1, 2, 3, 90, 160)


def test_a_lidar_record_needs_no_file(root, tmp_path):
    """Datasets without a LiDAR have records for its pose alone."""
    set_field(root, "sample_data", "s0-1-LIDAR_TOP", filename="")
    assert check_tables(root, VERSION) == [] and len(read(root, tmp_path)) == 6


def test_a_lidar_given_as_a_camera_is_named(hand_root, tmp_path):
    with pytest.raises(DataError, match=r"LIDAR_TOP was given as a camera, but its modality is 'lidar'"):
        read(hand_root, tmp_path, cameras=("CAM_FRONT", "LIDAR_TOP"))


# `perception doctor data`


def doctor(capsys, *arguments):
    code = main([*map(str, arguments)])
    return code, capsys.readouterr().out


def test_doctor_lists_all_findings_of_a_dataset(root, tmp_path, capsys):
    assert doctor(capsys, "data", root) == (0, f"{root / VERSION}: 0 errors, 0 warnings\n")
    set_field(root, "sample_annotation", CAR, size=[0, 1, 1])
    set_field(root, "calibrated_sensor", "CAM_BACK", camera_intrinsic=[[0] * 3] * 3)
    set_field(root, "scene", "scene0", nbr_samples=9)
    (root / "samples" / "CAM_BACK" / "s0-0.jpg").unlink()
    (root / "samples" / "CAM_BACK" / "s0-1.jpg").write_text("no image")
    expansion = root / "maps" / "expansion" / "hand-town.json"
    expansion.write_text(expansion.read_text().replace('"token": "0"', '"token": 0'))
    (root / VERSION / "splits.json").write_text('{"hand_val": 3}')
    code, out = doctor(capsys, "data", root, "--json", tmp_path / "faults.json")
    assert code == 2 and out.splitlines()[-1] == f"{root / VERSION}: 6 errors, 1 warnings"
    report = json.loads((tmp_path / "faults.json").read_text())
    assert (report["version"], report["errors"]) == (VERSION, 6)
    found = {(Path(finding["file"]).name, finding["field"], finding["severity"]) for finding in report["findings"]}
    assert found == {
        ("sample_annotation.json", "size", "error"),
        ("calibrated_sensor.json", "camera_intrinsic", "error"),
        ("scene.json", "nbr_samples", "warning"),
        ("sample_data.json", "filename", "error"),
        ("hand-town.json", "", "error"),
        ("splits.json", "", "error"),
    }
    assert all(finding["problem"] in out and {"records", "total"} < finding.keys() for finding in report["findings"])
    assert "record s0-0-CAM_BACK names an image that is missing" in out
    assert "s0-1.jpg cannot be read as an image" in out


def test_doctor_names_the_versions_of_a_dataset(root, tmp_path, capsys):
    shutil.copytree(root / VERSION, root / "v2")
    with pytest.raises(DataError, match=r"has the versions v1\.0-hand, v2: give one of them as --version"):
        main(["data", str(root)])
    assert doctor(capsys, "data", root, "--version", "v2")[0] == 0
    (root / "v2" / "log.json").write_text("[")
    code, out = doctor(capsys, "data", root, "--version", "v2")
    assert code == 2 and "log.json is not valid JSON" in out
    with pytest.raises(DataError, match=r"none is not a folder"):
        main(["data", str(tmp_path / "none")])
