"""One real keyframe: LiDAR points, boxes, images and the map must agree in our frames."""

import json

import numpy as np
import pytest
import shapely
import torch

from perception.data.infos import load_info_clip, load_info_poses, load_map_vectors
from perception.data.nuscenes import NUSCENES_CAMERAS
from perception.errors import DataError
from perception.geometry import box_corners, invert_rigid, project_points, transform_points
from perception.types import BOX_CLASSES, LINE_CLASSES

SIZE = (450, 800)


@pytest.fixture(scope="module")
def clip(real_keyframe):
    return load_info_clip(real_keyframe / "sample.json", image_size=SIZE)


@pytest.fixture(scope="module")
def entry(real_keyframe):
    return json.loads((real_keyframe / "sample.json").read_text())["data_list"][0]


@pytest.fixture(scope="module")
def points_ego(real_keyframe):
    (path,) = real_keyframe.glob("*.pcd.bin")
    _, ego_from_lidar = load_info_poses(real_keyframe / "sample.json")
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
    global_from_ego, _ = load_info_poses(real_keyframe / "sample.json")
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
    global_from_ego, _ = load_info_poses(real_keyframe / "sample.json")
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
    with pytest.raises(DataError, match=r"jpg is missing"):
        load_info_clip(tmp_path / "bad.json", image_size=SIZE)
    for path in real_keyframe.glob("*.jpg"):
        (tmp_path / path.name).symlink_to(path)
    with pytest.raises(DataError, match=r"bad\.json: 'images\.CAM_BACK\.cam2img' must be 3 x 3 finite"):
        load_info_clip(tmp_path / "bad.json", image_size=SIZE)
    with pytest.raises(DataError, match=r"entry 7 does not exist"):
        load_info_clip(real_keyframe / "sample.json", 7, image_size=SIZE)
    with pytest.raises(DataError, match=r"none\.json is missing"):
        load_info_clip(tmp_path / "none.json", image_size=SIZE)
