"""One real keyframe: LiDAR points, boxes, images and the map must agree in our frames."""

import json
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import shapely
import torch
from PIL import Image
from test_bevformer import SMALL as SMALL_BEVFORMER

from perception.cli.predict import main as predict
from perception.data.info_files import read_info
from perception.data.map_vectors import load_map_vectors
from perception.data.nuscenes import NUSCENES_CAMERAS
from perception.errors import DataError, PerceptionError, PerceptionWarning
from perception.geometry import box_corners, invert_rigid, project_points, rigid_from_yaw, transform_points, wrap_angle
from perception.models.bevformer.model import BEVFormer
from perception.models.checkpoint import save_checkpoint
from perception.types import BOX_CLASSES, LINE_CLASSES

SIZE = (450, 800)


@pytest.fixture(scope="module")
def clip(real_keyframe):
    return read_info(real_keyframe / "sample.json").clip(image_size=SIZE)


@pytest.fixture(scope="module")
def entry(real_keyframe):
    return json.loads((real_keyframe / "sample.json").read_text())["data_list"][0]


@pytest.fixture(scope="module")
def points_ego(real_keyframe):
    (path,) = real_keyframe.glob("*.pcd.bin")
    ego_from_lidar = read_info(real_keyframe / "sample.json").ego_from_lidar()
    return transform_points(ego_from_lidar, np.fromfile(path, dtype=np.float32).reshape(-1, 5)[:, :3].astype(float))


def inside(points, center, size, yaw, margin=0.0):
    offset = points - center
    along = offset[:, 0] * np.cos(yaw) + offset[:, 1] * np.sin(yaw)
    across = -offset[:, 0] * np.sin(yaw) + offset[:, 1] * np.cos(yaw)
    return np.all(np.abs(np.stack([along, across, offset[:, 2]], 1)) <= size / 2 + margin, axis=1)


def box_rows(clip):
    boxes = clip.gt.boxes
    return [[t[0].double().numpy() for t in boxes[:3]], boxes.label[0].tolist(), boxes.valid[0].tolist()]


def test_boxes_hold_the_lidar_points_the_annotators_counted(clip, entry, points_ego):
    (center, size, yaw), label, valid = box_rows(clip)
    # Three pedestrians have no points, and one object has no class of the task.
    assert len(center) == 69 and sum(valid) == 65 and label.count(-1) == 1
    want = np.array([item["num_lidar_pts"] for item in entry["instances"]])
    found = np.array([inside(points_ego, *row).sum() for row in zip(center, size, yaw, strict=True)])
    # Some boxes differ by a few points on their faces; a wrong height, axis or yaw would change hundreds.
    assert np.abs(found - want).sum() <= 0.04 * want.sum()
    assert (np.abs(found - want) <= np.maximum(2, 0.05 * want)).all() and (found == want).mean() > 0.85
    names = [item["bbox_label_3d"] for item in entry["instances"]]
    assert label == names  # the file's order of classes is BOX_CLASSES
    assert BOX_CLASSES[label[0]] == "pedestrian"


def test_points_in_boxes_project_into_their_hulls(clip, points_ego):
    (center, size, yaw), _, _ = box_rows(clip)
    rig = clip.frames.rig
    checked = 0
    for camera in range(6):
        cam_from_ego = invert_rigid(rig.ego_from_cam[0, camera].double()).numpy()
        img_from_cam = rig.img_from_cam[0, camera].double().numpy()
        for row in zip(center, size, yaw, strict=True):
            corners, depth = project_points(img_from_cam, transform_points(cam_from_ego, box_corners(*row)))
            on_box = points_ego[inside(points_ego, *row)]
            if depth.min() < 1 or len(on_box) == 0:
                continue
            uv_img, _ = project_points(img_from_cam, transform_points(cam_from_ego, on_box))
            hull = shapely.convex_hull(shapely.multipoints(corners))
            assert shapely.distance(shapely.points(uv_img), hull).max() < 1e-6
            checked += len(on_box)
    assert checked > 500


def test_boxes_agree_with_the_file_s_own_camera_boxes(clip, entry):
    """`cam_instances` holds the projected centre of each box, made by the official converter."""
    center, rig, compared = clip.gt.boxes.center[0].double(), clip.frames.rig, 0
    for camera, channel in enumerate(NUSCENES_CAMERAS):
        points_cam = transform_points(invert_rigid(rig.ego_from_cam[0, camera].double()), center)
        uv_img, depth = project_points(rig.img_from_cam[0, camera].double(), points_cam)
        for item in entry["cam_instances"][channel]:
            want = torch.tensor(item["center_2d"]) * 0.5  # 1600 x 900 -> 800 x 450 is a pure scale
            gap = (uv_img - want).norm(dim=-1) + (depth - item["depth"]).abs()
            assert gap.min() < 0.5
            compared += 1
    assert compared > 30


def test_velocity_follows_the_ego_frame(clip, entry):
    """LiDAR y looks ahead and x to the right, so ahead = y and left = -x, up to the mounting's half degree."""
    velocity = clip.gt.boxes.velocity[0].numpy()
    lidar = np.array([item["velocity"] for item in entry["instances"]])
    known = np.isfinite(lidar).all(axis=1)
    assert np.isnan(velocity[~known]).all() and known.sum() > 60
    want = np.stack([lidar[known, 1], -lidar[known, 0]], axis=1)
    assert np.abs(velocity[known] - want).max() < 0.1 and np.abs(want).max() > 5
    # A moving car drives along its own heading.
    boxes = clip.gt.boxes
    fast = (boxes.label[0] == 0) & (boxes.velocity[0].norm(dim=-1) > 2)
    heading = torch.stack([boxes.yaw[0].cos(), boxes.yaw[0].sin()], -1)[fast]
    assert fast.sum() >= 1
    assert ((heading * boxes.velocity[0][fast]).sum(-1) / boxes.velocity[0][fast].norm(dim=-1) > 0.97).all()


def test_the_car_is_on_the_map(real_keyframe):
    global_from_ego = read_info(real_keyframe / "sample.json").global_from_ego()
    area = shapely.from_geojson((real_keyframe / "drivable_area.json").read_text())
    assert area.buffer(0).contains(shapely.Point(global_from_ego[:2, 3]))
    lines = load_map_vectors(real_keyframe / "map_vectors.json", global_from_ego)
    assert {LINE_CLASSES[line.label] for line in lines} == {"divider", "boundary"}
    # Back to the global frame with the full 3D pose: the car is level within a degree, so the error at 30 m is < 5 cm.
    edges = shapely.boundary(area)
    for line in lines:
        assert np.abs(line.points).max() <= 30 + 1e-6
        points = np.concatenate([line.points, np.zeros((len(line.points), 1))], axis=1)
        on_map = shapely.points(transform_points(global_from_ego, points)[:, :2])
        if LINE_CLASSES[line.label] == "boundary":
            assert shapely.distance(on_map, edges).max() < 0.05
        else:
            assert shapely.distance(on_map, area).max() < 0.05


def test_map_projects_onto_the_road(clip, real_keyframe, points_ego):
    """Dividers lie on the ground where the LiDAR measures a flat road, and project below the horizon of the cameras."""
    global_from_ego = read_info(real_keyframe / "sample.json").global_from_ego()
    lines = load_map_vectors(real_keyframe / "map_vectors.json", global_from_ego)
    dividers = [line.points for line in lines if LINE_CLASSES[line.label] == "divider"]
    on_ground = shapely.segmentize(shapely.linestrings(np.concatenate(dividers[:1])), 0.5)
    ground = np.concatenate(
        [shapely.get_coordinates(on_ground), np.zeros((shapely.get_num_coordinates(on_ground), 1))], 1
    )
    ground = ground[np.linalg.norm(ground, axis=1) < 20]
    assert len(ground) > 10
    rig, rows, seen = clip.frames.rig, SIZE[0], 0
    for camera in range(6):
        points_cam = transform_points(invert_rigid(rig.ego_from_cam[0, camera].double()).numpy(), ground)
        uv_img, depth = project_points(rig.img_from_cam[0, camera].double().numpy(), points_cam)
        in_image = (depth > 1) & (uv_img >= 0).all(1) & (uv_img < (SIZE[1], SIZE[0])).all(1)
        if in_image.any():
            assert (uv_img[in_image, 1] > rows / 2).all()  # below the horizon
            seen += in_image.sum()
    assert seen > 10
    near = np.linalg.norm(points_ego[:, None, :2] - ground[None, :, :2], axis=-1).min(axis=1) < 0.3
    assert abs(np.median(points_ego[near, 2])) < 0.3


def test_errors_name_the_file(tmp_path, real_keyframe):
    content = json.loads((real_keyframe / "sample.json").read_text())
    content["data_list"][0]["images"]["CAM_BACK"]["cam2img"][0][0] = float("nan")
    (tmp_path / "bad.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"bad\.json, entry 0: images\.CAM_BACK\.cam2img must be 3 x 3 .* finite"):
        read_info(tmp_path / "bad.json").clip(image_size=SIZE)
    with pytest.raises(DataError, match=r"entry 7 does not exist"):
        read_info(real_keyframe / "sample.json", 7)
    with pytest.raises(DataError, match=r"none\.json is missing"):
        read_info(tmp_path / "none.json")


# Cameras with names of their own, written by hand. Camera axes (right, down, forward) in ego axes.
FORWARD = [[0, 0, 1, 1.5], [-1, 0, 0, 0.2], [0, -1, 0, 1.6], [0, 0, 0, 1]]
LEFT = [[1, 0, 0, 1.0], [0, 0, 1, 0.5], [0, -1, 0, 1.6], [0, 0, 0, 1]]
INTRINSICS = [[80.0, 0, 48], [0, 80.0, 32], [0, 0, 1]]
SMALL = (64, 96)


def own_entry(folder) -> dict:
    """An entry without LiDAR, pose and boxes, and its images."""
    images = {}
    for name, pose in (("front", FORWARD), ("port side", LEFT)):
        Image.new("RGB", SMALL[::-1], (90, 120, len(images) * 80)).save(folder / f"{name}.png")
        images[name] = {"img_path": f"{name}.png", "cam2img": INTRINSICS, "cam2ego": pose}
    return {"token": "t-0", "sample_idx": 70, "images": images}


def write(path, content):
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content, 2))  # as mmengine writes it
    else:
        path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("name", ["a.json", "a.pkl"])
def test_a_file_is_one_sample_a_list_or_what_mmdet3d_writes(tmp_path, name):
    entries = [own_entry(tmp_path), own_entry(tmp_path) | {"token": "t-1", "sample_idx": 71}]
    whole = write(tmp_path / name, {"metainfo": {"dataset": "mine", "categories": {"car": 0}}, "data_list": entries})
    assert [read_info(whole, key).entry["token"] for key in (0, 1, "t-1", "70")] == ["t-0", "t-1", "t-1", "t-0"]
    for key, message in ((-1, "entry -1 does not"), ("t-9", 'no entry with token or sample_idx "t-9"')):
        with pytest.raises(DataError, match=message):
            read_info(whole, key)
    assert read_info(write(tmp_path / name, entries), 1).entry["token"] == "t-1"
    info = read_info(write(tmp_path / name, entries[0]))
    clip = info.clip(image_size=SMALL)
    assert info.cameras == ("front", "port side") and clip.frames.rig.present.tolist() == [[True, True]]
    np.testing.assert_allclose(clip.frames.rig.ego_from_cam[0].numpy(), [FORWARD, LEFT])
    np.testing.assert_allclose(clip.frames.rig.img_from_cam[0].numpy(), [INTRINSICS] * 2)
    assert clip.frames.images[0, 1, :, 5, 5].tolist() == [90, 120, 80] and clip.gt.boxes.label.shape == (1, 0)
    with pytest.raises(DataError, match="ego2global must be 4 x 4 finite numbers; it is null or missing"):
        info.global_from_ego()
    chosen = info.clip(image_size=SMALL, cameras=("port side", "absent"))
    assert chosen.frames.rig.present.tolist() == [[True, False]]


def test_images_are_found_below_the_data_prefix(tmp_path):
    entry = own_entry(tmp_path)
    path = write(tmp_path / "a.json", entry)
    (tmp_path / "samples" / "front").mkdir(parents=True)
    (tmp_path / "front.png").rename(tmp_path / "samples" / "front" / "front.png")
    assert len(read_info(path).clip(image_size=SMALL).frames.images[0]) == 2  # where nuScenes has them
    (tmp_path / "jpg").mkdir()
    (tmp_path / "samples" / "front" / "front.png").rename(tmp_path / "jpg" / "front.png")
    with pytest.raises(DataError, match=r'images\.front\.img_path: "front\.png" is missing in .*--data-prefix'):
        read_info(path).clip(image_size=SMALL)
    read_info(path).clip(image_size=SMALL, data_prefix={"front": "jpg"})
    with pytest.raises(DataError, match=r"images\.port side\.img_path"):
        read_info(path).clip(image_size=SMALL, data_prefix={"img": "jpg"})
    read_info(path).clip(image_size=SMALL, data_prefix={"img": "jpg", "port side": str(tmp_path)})
    for bad in (
        "/etc/passwd",
        "../front.png",
        "a/../../front.png",
        "C:\\front.png",
        "..\\front.png",
        "",
        "a\0b",
        "x" * 9000,
    ):
        entry["images"]["front"]["img_path"] = bad
        with pytest.raises(DataError, match=r"images\.front\.img_path"):
            read_info(write(path, entry)).clip(image_size=SMALL)


def test_camera_names_are_no_paths(tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", SMALL[::-1]).save(tmp_path / "secret.png")
    for name in ("../..", "..", "/camera/front"):
        entry = {"images": {name: {"img_path": "secret.png", "cam2img": INTRINSICS, "cam2ego": FORWARD}}}
        info = read_info(write(tmp_path / "data" / "a.json", entry))
        assert info.cameras == (name,)
        with pytest.raises(DataError, match=r'"secret\.png" is missing in'):
            info.clip(image_size=SMALL)


def test_poses_that_contradict_each_other_are_named(tmp_path):
    entry = own_entry(tmp_path) | {"lidar_points": {"lidar2ego": np.eye(4).tolist()}}
    for move, turn, named in ((2.0, 8.0, False), (3.5, 0.0, True), (0.0, 12.0, True)):
        pose = rigid_from_yaw(np.radians(turn), (move, 0, 0)) @ np.array(FORWARD)
        entry["images"]["front"]["lidar2cam"] = np.linalg.inv(pose).tolist()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", PerceptionWarning)
            read_info(write(tmp_path / "a.json", entry)).clip(image_size=SMALL)
        assert named == any("more than the car moves between two exposures" in str(w.message) for w in caught)


CALIBRATION_FAULTS = {
    "millimetres": (
        "cam2ego",
        np.array(FORWARD) + 1600.0 * np.eye(4)[:, :1] * np.eye(4)[3],
        "images.front is .* m from the ego origin",
    ),
    "mirrored": ("cam2ego", np.array(FORWARD) * [[-1, 1, 1, 1]], r"front\.cam2ego is not a rigid transform"),
    "scaled": ("cam2ego", np.array(FORWARD) * [[2, 2, 2, 1]], r"front\.cam2ego is not a rigid transform"),
    "quaternion": ("cam2ego", np.ones(4), r"front\.cam2ego must be 4 x 4 finite numbers"),
    "normalised": ("cam2img", np.diag([0.8, 1.2, 1]), "focal lengths of 0.8 and 1.2 px"),
    "transposed": ("cam2img", np.array(INTRINSICS).T, r"images\.front\.cam2img is not a pinhole calibration"),
    "other image": ("cam2img", np.array(INTRINSICS) * [[1, 1, 40], [1, 1, 1], [1, 1, 1]], "principal point"),
    "skew": ("cam2img", np.array([[80.0, 70, 48], *INTRINSICS[1:]]), "skew of 70"),
    "infinite": ("cam2img", np.array([[np.inf, 0, 48], *INTRINSICS[1:]]), "finite numbers"),
    "last row": ("cam2img", np.ones((4, 4)), "as its last row; give 0 0 0 1"),
    "text": ("cam2img", "80 80 48 32", r'cam2img must be .* it is "80 80 48 32"'),
    "words": ("cam2img", [["80", "0", "48"]] * 3, "finite numbers"),
}


@pytest.mark.parametrize("fault", CALIBRATION_FAULTS)
def test_calibrations_are_checked_as_in_live_use(tmp_path, fault):
    field, value, message = CALIBRATION_FAULTS[fault]
    entry = own_entry(tmp_path)
    entry["images"]["front"][field] = value.tolist() if isinstance(value, np.ndarray) else value
    with np.errstate(invalid="ignore"), pytest.raises(DataError, match=message) as caught:
        read_info(write(tmp_path / "a.pkl", entry)).clip(image_size=SMALL)
    assert str(caught.value).startswith(f"{tmp_path / 'a.pkl'}, entry 0: ") and "\n" not in str(caught.value)


ENTRY_FAULTS = {
    "v1.0": ({"infos": [], "metadata": {}}, "before v1.1; convert it"),
    "number": (7, "is no info file"),
    "list of numbers": ([1], r"entry 0 is 1; it must be an object with images"),
    "no cameras": ({"images": {}}, "no camera with an img_path"),
    "cameras as list": ({"images": []}, r"images is \[\]"),
    "path as number": ({"images": {"front": {"img_path": 7, "cam2img": INTRINSICS, "cam2ego": FORWARD}}}, "is 7"),
    "no pose": ({"images": {"front": {"img_path": "front.png", "cam2img": INTRINSICS}}}, "has no pose; give cam2ego"),
    "other size": (("images", "front", {"height": 32, "width": 96}), "is 64 x 96 pixels .* gives 32 x 96"),
    "boxes as dict": (("instances", {}), "instances is {}"),
    "box as list": (("instances", [[1]]), r"instances\[0\] is \[1\]"),
    "NaN box": (("instances", [{"bbox_3d": [np.nan] * 7, "bbox_label_3d": 0}]), r"bbox_3d is \[NaN, .* 7 finite"),
    "flat box": (("instances", [{"bbox_3d": [5, 5, 0, 0, 1, 1, 0], "bbox_label_3d": 0}]), "not above 0"),
    "far box": (("instances", [{"bbox_3d": [1e300, 5, 0, 1, 1, 1, 0], "bbox_label_3d": 0}]), "metres from the LiDAR"),
    "turned box": (("instances", [{"bbox_3d": [5, 5, 0, 1, 1, 1, -101], "bbox_label_3d": 0}]), "and radians"),
    "a box 1001 m away": (("instances", [{"bbox_3d": [5, -1001, 0, 1, 1, 1, 0], "bbox_label_3d": 0}]), "LiDAR and rad"),
    "label": (("instances", [{"bbox_3d": [5, 5, 0, 1, 1, 1, 0], "bbox_label_3d": "car"}]), "bbox_label_3d is \"car\""),
    "velocity": (
        ("instances", [{"bbox_3d": [5, 5, 0, 1, 1, 1, 0], "bbox_label_3d": 0, "velocity": [1e9, 0]}]), "metres per sec"
    ),
    "flag": (
        ("instances", [{"bbox_3d": [5, 5, 0, 1, 1, 1, 0], "bbox_label_3d": 0, "bbox_3d_isvalid": "no"}]),
        "true or false",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", ENTRY_FAULTS)
def test_malformed_entries_get_a_sentence(tmp_path, fault):
    change, message = ENTRY_FAULTS[fault]
    content, entry = change, own_entry(tmp_path)
    if isinstance(change, tuple):
        *place, value = change
        if place == ["instances"]:
            entry |= {"instances": value, "lidar_points": {"lidar2ego": np.eye(4).tolist()}}
        else:
            entry["images"]["front"] |= value
        content = {"metainfo": {"categories": {"car": 0}}, "data_list": [entry]}
    with pytest.raises(DataError, match=message) as caught:
        read_info(write(tmp_path / "a.json", content)).clip(image_size=SMALL)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def test_boxes_that_cannot_be_placed_are_named(tmp_path):
    box = {"bbox_3d": [10, 2, 0, 4, 2, 1.5, 0.1], "bbox_label_3d": 0}
    entry = own_entry(tmp_path) | {"instances": [box]}
    for metainfo, message in (({"categories": {"car": 0}}, "no lidar_points.lidar2ego"), ({}, "metainfo.categories")):
        path = write(tmp_path / "a.json", {"metainfo": metainfo, "data_list": [entry]})
        with pytest.warns(PerceptionWarning, match=message):
            assert read_info(path).clip(image_size=SMALL).gt.boxes.label.shape == (1, 0)
    entry["lidar_points"] = {"lidar2ego": [[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 2], [0, 0, 0, 1]]}
    boxes = read_info(write(path, {"metainfo": {"categories": {"car": 0}}, "data_list": [entry]})).clip(
        image_size=SMALL
    )
    assert boxes.gt.boxes.center[0].tolist() == [[11, 2, 2]] and boxes.gt.boxes.valid.tolist() == [[True]]
    assert boxes.gt.boxes.velocity.isnan().all()
    box["bbox_3d"] = [999, -999, 0, 4, 2, 1.5, 99]  # far, but possible
    boxes = read_info(write(path, {"metainfo": {"categories": {"car": 0}}, "data_list": [entry]})).clip(
        image_size=SMALL
    )
    assert boxes.gt.boxes.center[0].tolist() == [[1000, -999, 2]]


@pytest.fixture
def kitti_file(tmp_path):
    """Two samples as mmdet3d's converter writes those of KITTI, with the calibration of the object benchmark."""
    p2 = [[721.5377, 0, 609.5593, 44.85728], [0, 721.5377, 172.854, 0.2163791], [0, 0, 1, 0.002745884], [0, 0, 0, 1]]
    lidar2cam = np.eye(4, dtype=np.float32)
    lidar2cam[:3] = [
        [0.00023477, -0.99994414, -0.01056347, -0.00279682], [0.01044941, 0.01056535, -0.99988957, -0.07510879],
        [0.99994540, 0.00012436, 0.01045130, -0.27213281],
    ]  # fmt: skip
    images = {f"CAM{n}": {"cam2img": p2} for n in (0, 1, 3)} | {"R0_rect": np.eye(4, dtype=np.float32).tolist()}
    images["CAM2"] = {"img_path": "000008.png", "height": 375, "width": 1242, "cam2img": p2}
    images["CAM2"] |= {"lidar2cam": lidar2cam.tolist()}
    box = {"bbox_3d": [-1.2, 1.7, 12.5, 3.9, 1.5, 1.6, 1.9], "bbox_label_3d": 2, "bbox_label": 2, "num_lidar_pts": 9}
    walker = box | {"bbox_3d": [3.0, 1.6, 9.0, 0.8, 1.75, 0.6, -2.5], "bbox_label_3d": 0}
    entry = {"sample_idx": 8, "images": images, "lidar_points": {"lidar_path": "000008.bin", "num_pts_feats": 4}}
    entry["instances"] = [box, walker, walker | {"bbox_label_3d": -1}]
    names = ("Pedestrian", "Cyclist", "Car", "Van", "Truck", "Person_sitting", "Tram", "Misc")
    metainfo = {"categories": {name: k for k, name in enumerate(names)} | {"DontCare": -1}, "dataset": "kitti"}
    (tmp_path / "training" / "image_2").mkdir(parents=True)
    Image.new("RGB", (1242, 375)).save(tmp_path / "training" / "image_2" / "000008.png")
    test = {key: value for key, value in entry.items() if key != "instances"} | {"sample_idx": 9}
    return write(tmp_path / "kitti_infos_train.pkl", {"metainfo": metainfo, "data_list": [entry, test]})


def test_infos_of_kitti(kitti_file):
    """The fourth column of cam2img moves the camera; boxes are in camera axes with the centre of the bottom face."""
    info, camera = read_info(kitti_file, "8"), read_info(kitti_file).entry["images"]["CAM2"]
    clip = info.clip(image_size=(375, 1242))
    assert info.cameras == ("CAM2",)
    assert read_info(kitti_file, 1).clip(image_size=(375, 1242)).gt.boxes.label.shape == (1, 0)
    ego_from_lidar = info.ego_from_lidar()
    points_lidar = np.random.default_rng(0).uniform([5, -3, -2], [40, 3, 1], (50, 3))
    want = (
        np.array(camera["cam2img"])
        @ np.array(camera["lidar2cam"])
        @ np.pad(points_lidar, ((0, 0), (0, 1)), constant_values=1).T
    )
    cam_from_ego = invert_rigid(clip.frames.rig.ego_from_cam[0, 0].double().numpy())
    points_cam = transform_points(cam_from_ego, transform_points(ego_from_lidar, points_lidar))
    uv_img, _ = project_points(clip.frames.rig.img_from_cam[0, 0].double().numpy(), points_cam)
    np.testing.assert_allclose(uv_img, (want[:2] / want[2]).T, atol=2e-3)  # pixels; the rig is in float32

    # What CameraInstance3DBoxes.convert_to of mmdet3d 1.4 makes of the two boxes; it leaves the tilt out of the yaw.
    bottom, dims = [[12.7897, 1.2175, -1.6288], [9.2898, -2.9838, -1.6097]], [[3.9, 1.6, 1.5], [0.8, 0.6, 1.75]]
    found = clip.gt.boxes
    half_height = np.array(dims)[:, 2:] / 2 * -np.array(camera["lidar2cam"])[1, :3]  # along the camera's y
    want = transform_points(ego_from_lidar, np.array(bottom) + half_height)
    np.testing.assert_allclose(found.center[0, :2].numpy(), want, atol=1e-4)
    np.testing.assert_allclose(found.size[0, :2].numpy(), dims, atol=1e-6)
    assert np.abs(wrap_angle(found.yaw[0, :2].numpy() - [2.8124, 0.9292])).max() < 0.02
    assert found.valid.tolist() == [[True, True, False]]
    assert [BOX_CLASSES[k] for k in found.label[0, :2]] == ["car", "pedestrian"] and found.label[0, 2] == -1


def test_a_horizon_that_is_cut_off_is_named(kitti_file):
    with pytest.warns(PerceptionWarning, match="entry 0: .* the horizon is cut off from 'CAM2'.*; cut images around"):
        read_info(kitti_file, "8").clip(image_size=(60, 1242))


def test_the_real_sample_is_the_same_as_a_pickle(real_keyframe, tmp_path, clip):
    content = json.loads((real_keyframe / "sample.json").read_text())
    for item in content["data_list"][0]["instances"]:  # as the converter leaves them
        item["num_lidar_pts"], item["bbox_3d_isvalid"] = (
            np.int64(item["num_lidar_pts"]), np.bool_(item["bbox_3d_isvalid"]),
        )  # fmt: skip
    for path in real_keyframe.glob("*.jpg"):
        channel = path.name.split("__")[1]
        (tmp_path / "samples" / channel).mkdir(parents=True)
        (tmp_path / "samples" / channel / path.name).symlink_to(path)
    info = read_info(write(tmp_path / "nuscenes_infos_val.pkl", content), "ca9a282c9e77460f8360f564131a8af5")
    assert info.cameras == NUSCENES_CAMERAS
    found = info.clip(image_size=SIZE)
    torch.testing.assert_close(found, clip, rtol=0, atol=0, equal_nan=True)


RING = [[2.0, -3.0], [5.0, -3.0], [5.0, 3.0], [2.0, 3.0]]


@pytest.mark.parametrize("points", [RING, RING[::-1], [*RING, RING[0]], [*RING[::-1], RING[-1]]])
def test_crossings_in_either_direction_count(tmp_path, points):
    features = [{"kind": "ped_crossing", "polyline": points}, {"kind": "divider", "polyline": [[-9, 1, 5], [9, 1, 5]]}]
    lines = load_map_vectors(write(tmp_path / "m.json", {"features": features}), np.eye(4))
    assert [LINE_CLASSES[line.label] for line in lines] == ["divider", "ped_crossing"]
    ring = shapely.LinearRing(lines[1].points)
    assert not ring.is_ccw and shapely.Polygon(ring).equals(shapely.Polygon(RING))


def test_a_triangle_whose_first_and_last_vertex_share_a_coordinate_is_closed(tmp_path):
    triangle = [[1.0, 1.0], [5.0, 4.0], [1.0, 6.0]]
    path = write(tmp_path / "map.json", {"features": [{"kind": "ped_crossing", "polyline": triangle}]})
    (line,) = load_map_vectors(path, np.eye(4))
    assert shapely.Polygon(line.points).equals(shapely.Polygon(triangle))


def test_a_ring_inside_a_crossing_is_a_hole_if_it_runs_the_other_way(tmp_path):
    inner = [[3, -1], [4, -1], [4, 1], [3, 1]]
    for outer, hole, count in ((RING, inner[::-1], 2), (RING[::-1], inner, 2), (RING, inner, 1)):
        features = [{"kind": "ped_crossing", "polyline": ring} for ring in (hole, outer)]
        lines = load_map_vectors(write(tmp_path / "m.json", {"features": features}), np.eye(4))
        assert len(lines) == count


MAP_FAULTS = {
    "list": ([], "not a JSON object with 'features'"),
    "text": ({"features": "none"}, 'features is "none"; it must be a list'),
    "feature": ({"features": [3]}, r"features\[0\] is 3"),
    "no kind": ({"features": [{}]}, r"features\[0\]\.kind is null or missing"),
    "no line": ({"features": [{"kind": "divider"}]}, r"polyline is null or missing"),
    "one point": ({"features": [{"kind": "divider", "polyline": [[1, 2]]}]}, "has 1 points"),
    "one number": ({"features": [{"kind": "divider", "polyline": [[1], [2]]}]}, r"polyline\[0\] is \[1\]"),
    "NaN": ({"features": [{"kind": "divider", "polyline": [[0, 0], [np.nan, 1]]}]}, r"polyline\[1\] is \[NaN, 1\]"),
    "null": ({"features": [{"kind": "divider", "polyline": [[0, 0], [None, 1]]}]}, r"polyline\[1\] is \[null, 1\]"),
    "far": ({"features": [{"kind": "divider", "polyline": [[0, 0], [1e200, 1]]}]}, "1e.200 m from the map's origin"),
}


@pytest.mark.parametrize("fault", MAP_FAULTS)
def test_malformed_map_vectors_get_a_sentence(tmp_path, fault):
    content, message = MAP_FAULTS[fault]
    with pytest.raises(DataError, match=message):
        load_map_vectors(write(tmp_path / "m.json", content), np.eye(4))


def test_map_vectors_that_show_nothing_are_named(tmp_path):
    far = [[9e3, 0], [9e3, 9]]
    bow_tie = [[0, 0], [5, 5], [5, 0], [0, 5]]
    for kind, points, message in (
        ("lane", far, "no feature has a kind of"), ("divider", far, "no line is within 60x30"),
        ("ped_crossing", bow_tie, "a crossing is left out"),
    ):  # fmt: skip
        path = write(tmp_path / "m.json", {"features": [{"kind": kind, "polyline": points}]})
        with pytest.warns(PerceptionWarning, match=message):
            assert load_map_vectors(path, np.eye(4)) == []


def test_predict_takes_cameras_of_any_name(tmp_path, capsys):
    entries = [own_entry(tmp_path), own_entry(tmp_path) | {"token": "t-1", "ego2global": np.eye(4).tolist()}]
    info = write(tmp_path / "infos.pkl", {"metainfo": {}, "data_list": entries})
    for image in tmp_path.glob("*.png"):
        (tmp_path / "jpg").mkdir(exist_ok=True)
        image.rename(tmp_path / "jpg" / image.name)
    lines = write(tmp_path / "m.json", {"features": [{"kind": "ped_crossing", "polyline": RING}]})
    arguments = ["--info", str(info), "--out", str(tmp_path / "a.png"), "--data-prefix", "jpg"]
    predict([*arguments, "--sample", "t-1", "--map-vectors", str(lines), "--json", str(tmp_path / "a.json")])
    assert (tmp_path / "a.png").stat().st_size > 1000 and "boxes" in json.loads((tmp_path / "a.json").read_text())
    assert "lines" in capsys.readouterr().out
    save_checkpoint(tmp_path / "six.safetensors", BEVFormer(replace(SMALL_BEVFORMER, cameras=6)), {})
    for more, message in (
        (["--checkpoint", str(tmp_path / "six.safetensors")], r"entry 0 has 2 cameras, and .*six\.safetensors takes 6"),
        (["--sample", "t-1", "--index", "1"], "leave one out"), (["--split", "val"], "--split belongs to --dataroot"),
        (["--map-vectors", str(lines)], "ego2global must be 4 x 4"), (["--index", "2"], "entry 2 does not exist"),
    ):  # fmt: skip
        with pytest.raises(PerceptionError, match=message):
            predict([*arguments, *more])
