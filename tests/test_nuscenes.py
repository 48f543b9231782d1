"""The dataset against a small root written by hand, and against the official devkit on a generated one."""

import json
import shutil
import warnings

import numpy as np
import pytest
import shapely
import torch
from PIL import Image

from perception.data.index import load_index
from perception.data.loader import ClipRequest
from perception.data.nuscenes import NUSCENES_CAMERAS, NuScenesDataset
from perception.errors import DataError, PerceptionWarning
from perception.geometry import (
    box_corners,
    invert_rigid,
    project_points,
    rigid_from_quaternion,
    rigid_from_yaw,
    transform_points,
    yaw_from_rotation,
)
from perception.types import ATTRIBUTES, BOX_CLASSES, DEFAULT_LANE_RANGE, LINE_CLASSES

VERSION, SPLIT = "v1.0-hand", "hand_val"
CAMERAS = ("CAM_FRONT", "CAM_BACK")
STEP, SPEED = 0.5, 6.0  # seconds between keyframes, m/s of the ego car


@pytest.fixture
def root(hand_root, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(hand_root, tmp_path / "root")


def read(root, tmp_path, **changes):
    options = {"image_size": (90, 160), "cameras": CAMERAS, "cache_dir": tmp_path / "cache"} | changes
    return NuScenesDataset(root, options.pop("version", VERSION), options.pop("split", SPLIT), **options)


def edit(root, table, change):
    path = root / VERSION / f"{table}.json"
    rows = json.loads(path.read_text())
    change(rows)
    path.write_text(json.dumps(rows))


def test_streaming_frames(hand_root, tmp_path):
    data = read(hand_root, tmp_path)
    assert len(data) == 6 and data.tokens == ["s0-0", "s0-1", "s0-2", "s1-0", "s1-1", "s1-2"]
    assert data.scene_names == ["hand-0", "hand-1"] and data.scene_of_sample.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.allclose(np.diff(data.timestamps), [0.5, 0.5, 99, 0.5, 0.5])
    clips = [data[i] for i in range(6)]
    assert [bool(clip.frames.is_first) for clip in clips] == [True, False, False, True, False, False]
    for i, clip in enumerate(clips):
        frame = clip.frames
        assert frame.images.shape == (1, 2, 3, 90, 160) and frame.images.dtype == torch.uint8
        assert clip.sample_index.tolist() == [i]
        moved = 0.0 if i % 3 == 0 else SPEED * STEP
        # The car drives ahead: the previous origin is now behind it.
        assert np.allclose(frame.ego_from_prev[0], rigid_from_yaw(0.0, (-moved, 0, 0)), atol=1e-5)
        assert float(frame.seconds_since_prev) == pytest.approx(0.0 if i % 3 == 0 else STEP)
        assert abs(frame.images.float().mean().item() - (20 * (i % 3) + 60)) < 1.5


def test_a_clip_request_may_leave_keyframes_out(hand_root, tmp_path):
    data = read(hand_root, tmp_path)
    clip = data[ClipRequest((1, 2), -1, (0,))]
    assert clip.sample_index.tolist() == [1, 2]
    assert clip.frames.is_first.tolist() == [True, False]
    assert clip.frames.seconds_since_prev.tolist() == pytest.approx([0.0, STEP])
    assert torch.equal(clip.frames.ego_from_prev[0], torch.eye(4))
    clip = data[ClipRequest((5,), 3, (0,))]  # the one in between was dropped
    assert clip.frames.is_first.tolist() == [False]
    assert clip.frames.seconds_since_prev.tolist() == pytest.approx([2 * STEP])
    moved = torch.from_numpy(rigid_from_yaw(0.0, (-2 * SPEED * STEP, 0, 0))).float()
    torch.testing.assert_close(clip.frames.ego_from_prev[0], moved, atol=1e-5, rtol=0)
    with pytest.raises(IndexError):
        data[6]


def test_camera_poses_are_at_the_reference_time(hand_root, tmp_path):
    """CAM_FRONT exposes 20 ms late at 6 m/s: its pose is 0.12 m farther ahead than its mount."""
    rig = read(hand_root, tmp_path)[0].frames.rig
    front = torch.tensor([[0.0, 0, 1, 1.7 + 0.12], [-1, 0, 0, 0.1], [0, -1, 0, 1.5], [0, 0, 0, 1]])
    back = torch.tensor([[0.0, 0, -1, 0], [1, 0, 0, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]])
    assert torch.allclose(rig.ego_from_cam[0], torch.stack([front, back]), atol=1e-5)
    assert rig.present.tolist() == [[True, True]]


def test_boxes(hand_root, tmp_path):
    data = read(hand_root, tmp_path)
    boxes = data[1].gt.boxes  # ego has moved 3 m
    assert boxes.center.shape == (1, 2, 3)
    assert torch.allclose(boxes.center[0], torch.tensor([[19.0, 3.5, 0.8], [7.0, -5.0, 0.9]]), atol=1e-4)
    assert torch.allclose(boxes.size[0, 0], torch.tensor([4.5, 1.9, 1.6]))
    assert boxes.yaw[0].tolist() == pytest.approx([0.1, -np.radians(30)], abs=1e-5)
    assert torch.allclose(boxes.velocity[0], torch.tensor([[4.0, 0.0], [0.0, 0.0]]), atol=1e-4)
    assert [BOX_CLASSES[k] for k in boxes.label[0]] == ["car", "pedestrian"]
    assert ATTRIBUTES[boxes.attribute[0, 0]] == "vehicle.moving" and boxes.attribute[0, 1] == -1
    assert boxes.valid.tolist() == [[True, False]]  # the pedestrian has no LiDAR point


def test_unknown_velocity_is_nan(root, tmp_path):
    edit(root, "sample_annotation", lambda rows: [row.update(prev="", next="") for row in rows])
    assert read(root, tmp_path).gt_boxes(1).velocity.isnan().all()


def test_lines(hand_root, tmp_path):
    data = read(hand_root, tmp_path, points_per_line=11)
    exact = data.gt_lines(2)
    assert [LINE_CLASSES[line.label] for line in exact] == ["divider", "boundary", "boundary"]
    divider = sorted(exact[0].points.tolist())
    assert np.allclose(divider, [[0.9 - 30, 0], [0.9 + 30, 0]], atol=1e-4)  # centred at the LiDAR
    assert sorted(round(line.points[0, 1]) for line in exact[1:]) == [-4, 4]
    lines = data[2].gt.lines
    assert lines.points.shape == (1, 3, 11, 2) and lines.valid.all() and not lines.closed.any()
    assert torch.allclose(lines.points[0, 0, :, 0].sort().values, torch.linspace(-29.1, 30.9, 11), atol=1e-4)


def test_images_are_scaled_to_cover_and_cropped_at_the_top(hand_root, tmp_path):
    """160 x 90 -> 80 x 32: scale 0.5 gives 80 x 45, so 13 rows are cropped at the top."""
    frame = read(hand_root, tmp_path, image_size=(32, 80))[0].frames
    want = torch.tensor([[40.0, 0, 40], [0, 40, 22.5 - 13], [0, 0, 1]])
    assert frame.images.shape[-2:] == (32, 80) and torch.allclose(frame.rig.img_from_cam[0, 0], want)


def test_a_horizon_that_is_cut_off_is_named(hand_root, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(hand_root, tmp_path)
    with pytest.warns(
        PerceptionWarning, match="v1.0-hand: in .* the horizon is cut off from 'CAM_FRONT' .*; cut images"
    ):
        read(hand_root, tmp_path, image_size=(20, 160))


def test_missing_camera_is_not_present(root, tmp_path):
    def drop(rows):
        rows[:] = [row for row in rows if row["token"] != "s0-1-CAM_BACK"]

    edit(root, "sample_data", drop)
    frame = read(root, tmp_path)[1].frames
    assert frame.rig.present.tolist() == [[True, False]]
    assert frame.images[0, 1].max() == 0 and torch.isfinite(frame.rig.ego_from_cam).all()


def test_splits(hand_root, tmp_path):
    assert read(hand_root, tmp_path, split="hand_second").tokens == ["s1-0", "s1-1", "s1-2"]
    with pytest.raises(DataError, match=r'splits\.json has no split "other"'):
        read(hand_root, tmp_path, split="other")
    with pytest.raises(DataError, match=r"split val is an official one.* ending in trainval, not for v1\.0-hand"):
        read(hand_root, tmp_path, split="val")


def test_several_roots_are_one_dataset(hand_root, root, tmp_path):
    both = read([hand_root, root], tmp_path)
    one = read(hand_root, tmp_path)
    assert len(both) == 12 and both.scene_of_sample.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    first, again = one[ClipRequest((4, 5), 3, (0,))], both[ClipRequest((10, 11), 9, (0,))]
    assert again.sample_index.tolist() == [10, 11]
    assert torch.equal(first.frames.images, again.frames.images)
    assert torch.equal(first.gt.lines.points, again.gt.lines.points)
    assert torch.equal(first.gt.boxes.center, again.gt.boxes.center)
    assert torch.equal(first.frames.ego_from_prev, again.frames.ego_from_prev)


def test_streams_of_several_roots_are_those_of_each_root(hand_root, root, tmp_path):
    """The previous keyframe of each sample is one of its own root: another position and other times tell them apart."""
    edit(root, "sample", lambda rows: [row.update(timestamp=row["timestamp"] + 7_000_000) for row in rows])
    edit(root, "sample_data", lambda rows: [row.update(timestamp=row["timestamp"] + 7_000_000) for row in rows])
    edit(root, "ego_pose", lambda rows: [row.update(translation=[900.0 + k, 70, 0]) for k, row in enumerate(rows)])
    roots = [root, hand_root, root]
    both, single = read(roots, tmp_path), [read(one, tmp_path) for one in roots]
    first = [bool(both[i].frames.is_first) for i in range(18)]
    assert first == [i % 3 == 0 for i in range(18)]
    for i in range(18):
        frames, expected = both[i].frames, single[i // 6][i % 6].frames
        assert torch.equal(frames.ego_from_prev, expected.ego_from_prev)
        assert torch.equal(frames.seconds_since_prev, expected.seconds_since_prev)
        assert torch.equal(frames.images, expected.images)


def test_cache_is_used_and_never_stale(root, tmp_path, monkeypatch):
    before = read(root, tmp_path)
    files = list((tmp_path / "cache").iterdir())
    assert len(files) == 1 and files[0].suffix == ".bin"
    with monkeypatch.context() as context:  # a warm cache does not need the devkit
        context.setitem(__import__("sys").modules, "nuscenes.nuscenes", None)
        again = read(root, tmp_path)
    for a, b in zip(before._index, again._index, strict=True):
        for x, y in zip(*((a, b) if isinstance(a, tuple) else ((a,), (b,))), strict=True):
            assert x.dtype == y.dtype and np.array_equal(x, y, equal_nan=x.dtype.kind == "f")
    edit(root, "sample_annotation", lambda rows: rows[0].update(size=[1.0, 2.0, 3.0]))
    assert read(root, tmp_path).gt_boxes(0).size[0].tolist() == [2.0, 1.0, 3.0]
    path = root / "maps" / "expansion" / "hand-town.json"
    path.write_text(path.read_text().replace('"lane_divider": [{', '"lane_divider": [], "x": [{'))
    assert [line.label for line in read(root, tmp_path).gt_lines(0)] == [2, 2]


def test_damaged_cache_is_built_again(hand_root, tmp_path):
    want = read(hand_root, tmp_path).gt_boxes(0).center
    (cache,) = (tmp_path / "cache").iterdir()
    cache.write_bytes(cache.read_bytes()[:1000])
    assert torch.equal(read(hand_root, tmp_path).gt_boxes(0).center, want)
    assert cache.stat().st_size > 1000


def set_intrinsic(value):
    return lambda rows: rows[1].update(camera_intrinsic=value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: shutil.rmtree(r), r"root is not a folder"),
        (lambda r: (r / VERSION).rename(r / "v9"), r"version 'v1.0-hand' is missing; give one of .*: \['v9'\]"),
        (lambda r: (r / VERSION / "ego_pose.json").unlink(), r"ego_pose\.json is missing"),
        (lambda r: (r / VERSION / "sample.json").write_text("[{"), r"sample\.json is not valid JSON"),
        (
            lambda r: edit(r, "calibrated_sensor", set_intrinsic([[float("nan"), 0, 0], [0, 1, 0], [0, 0, 1]])),
            r"calibrated_sensor\.json: record CAM_FRONT needs 3 x 3 finite numbers as 'camera_intrinsic'.*NaN",
        ),
        (lambda r: edit(r, "calibrated_sensor", set_intrinsic([[1, 0], [0, 1]])), r"CAM_FRONT needs 3 x 3 finite"),
        (
            lambda r: edit(r, "calibrated_sensor", lambda rows: rows[2].update(translation=[0, None, 0])),
            r"calibrated_sensor\.json: record CAM_BACK needs 3 finite numbers as 'translation'",
        ),
        (
            lambda r: edit(r, "ego_pose", lambda rows: rows[0].update(rotation=[0, 0, 0, 0])),
            r"ego_pose\.json: record s0-0-LIDAR_TOP needs a unit quaternion",
        ),
        (lambda r: (r / "maps/expansion/hand-town.json").unlink(), r"hand-town\.json is missing.*map expansion"),
        (lambda r: (r / "samples/CAM_BACK/s0-0.jpg").unlink(), r"CAM_BACK/s0-0\.jpg is missing"),
        (
            lambda r: (r / "samples/CAM_BACK/s0-0.jpg").write_bytes(
                (r / "samples/CAM_BACK/s0-0.jpg").read_bytes()[:700]
            ),
            r"CAM_BACK/s0-0\.jpg cannot be read as an image .*truncated",
        ),
        (
            lambda r: Image.new("RGB", (80, 45)).save(r / "samples/CAM_BACK/s0-0.jpg"),
            r"s0-0\.jpg is 80 x 45 pixels, but the tables give 160 x 90",
        ),
    ],
)
def test_bad_data_is_named(root, tmp_path, damage, message):
    damage(root)
    with pytest.raises(DataError, match=message) as caught:
        read(root, tmp_path)[0]
    assert "\n" not in str(caught.value)


# The generated town: the official devkit is the independent reference.


@pytest.fixture(scope="module")
def town(town_root, tmp_path_factory):
    from nuscenes.nuscenes import NuScenes

    (version,) = [path.parent.name for path in town_root.glob("*/sample.json")]
    (split,) = [
        name for name, scenes in json.loads((town_root / version / "splits.json").read_text()).items() if scenes
    ]
    data = NuScenesDataset(town_root, version, split, image_size=(128, 224), cache_dir=tmp_path_factory.mktemp("cache"))
    return data, NuScenes(version, str(town_root), verbose=False)


def test_town_boxes_and_projection_agree_with_devkit(town):
    """The devkit transforms annotations with the pose at the camera's exposure, and so does our rig."""
    from nuscenes.utils.geometry_utils import BoxVisibility, view_points

    data, nusc = town
    compared = 0
    for i in (0, 3, 5):
        frame, record = data[i].frames, nusc.get("sample", data.tokens[i])
        gt = data.gt_boxes(i)
        anns = [nusc.get("sample_annotation", token) for token in record["anns"]]
        from nuscenes.eval.detection.utils import category_to_detection_name

        kept = [ann["token"] for ann in anns if category_to_detection_name(ann["category_name"])]
        assert len(kept) == len(gt.label) > 5
        corners = box_corners(gt.center.double(), gt.size.double(), gt.yaw.double())  # [M, 8, 3]
        for camera, channel in enumerate(NUSCENES_CAMERAS):
            _, boxes, intrinsic = nusc.get_sample_data(record["data"][channel], BoxVisibility.NONE)
            by_token = {box.token: box for box in boxes}
            cam_from_ego = invert_rigid(frame.rig.ego_from_cam[0, camera].double())
            points_cam = transform_points(cam_from_ego, corners)
            uv_img, depth = project_points(frame.rig.img_from_cam[0, camera].double(), points_cam)
            for k, token in enumerate(kept):
                want = by_token[token].corners().T
                near = np.linalg.norm(want[:, None] - points_cam[k].numpy()[None], axis=-1).min(axis=1)
                assert near.max() < 2e-3
                if (depth[k] > 1).all():
                    pixels = view_points(want.T, intrinsic, normalize=True)[:2].T
                    gap = np.linalg.norm(pixels[:, None] - uv_img[k].numpy()[None], axis=-1).min(axis=1)
                    assert gap.max() < 0.2
                    compared += 1
    assert compared > 20


def test_town_fields_agree_with_devkit(town):
    data, nusc = town
    from nuscenes.eval.detection.utils import category_to_detection_name

    for i, token in enumerate(data.tokens):
        record = nusc.get("sample", token)
        pose = nusc.get("ego_pose", nusc.get("sample_data", record["data"]["LIDAR_TOP"])["ego_pose_token"])
        assert np.allclose(data.ego_pose(i), rigid_from_quaternion(pose["rotation"], pose["translation"]))
        gt, turn = data.gt_boxes(i), data.ego_pose(i)[:3, :3]
        anns = [nusc.get("sample_annotation", t) for t in record["anns"]]
        anns = [ann for ann in anns if category_to_detection_name(ann["category_name"])]
        for k, ann in enumerate(anns):
            assert BOX_CLASSES[gt.label[k]] == category_to_detection_name(ann["category_name"])
            w, l, h = ann["size"]
            assert gt.size[k].tolist() == pytest.approx([l, w, h], abs=1e-5)
            assert bool(gt.valid[k]) == (ann["num_lidar_pts"] + ann["num_radar_pts"] > 0)
            back = turn @ np.array([*gt.velocity[k].tolist(), 0.0])
            assert np.allclose(back[:2], nusc.box_velocity(ann["token"])[:2], atol=2e-2, equal_nan=True)
            yaw = yaw_from_rotation(rigid_from_quaternion(ann["rotation"], ann["translation"]))
            off = yaw - yaw_from_rotation(turn) - float(gt.yaw[k])
            assert abs(np.sin(off)) < 1e-3 and np.cos(off) > 0


def test_town_static_boxes_stay_where_they_are(town):
    """Parked objects are static in global coordinates: `ego_from_prev` maps their box onto their next box."""
    data, _ = town
    moved = 0
    for i in range(1, len(data)):
        frame = data[i].frames
        if frame.is_first:
            continue
        now, before = data.gt_boxes(i), data.gt_boxes(i - 1)
        carried = transform_points(frame.ego_from_prev[0], before.center[before.velocity.norm(dim=-1) < 1e-3])
        gaps = (carried[:, None] - now.center).norm(dim=-1).min(dim=1).values
        assert (gaps < 1e-2).float().mean() > 0.8  # some leave the annotated area
        moved = max(moved, float(frame.ego_from_prev[0, :2, 3].norm()))
    assert moved > 0.5


def test_town_lines_lie_on_the_devkits_map(town):
    from nuscenes.map_expansion.map_api import NuScenesMap

    data, nusc = town
    scene = nusc.get("sample", data.tokens[0])["scene_token"]
    location = nusc.get("log", nusc.get("scene", scene)["log_token"])["location"]
    nusc_map = NuScenesMap(nusc.dataroot, location)
    dividers = [nusc_map.extract_line(r["line_token"]) for r in nusc_map.road_divider + nusc_map.lane_divider]
    surface = [nusc_map.extract_polygon(r["polygon_token"]) for r in nusc_map.road_segment + nusc_map.lane]
    kerbs = shapely.union_all(surface).boundary
    flat = rigid_from_yaw(yaw_from_rotation(data.ego_pose(0)), (*data.ego_pose(0)[:2, 3], 0.0))
    lines = data.gt_lines(0)
    assert {LINE_CLASSES[line.label] for line in lines} >= {"divider", "boundary"}
    for line in lines:
        points = line.points @ flat[:2, :2].T + flat[:2, 3]
        target = {"divider": shapely.union_all(dividers), "boundary": kerbs}.get(LINE_CLASSES[line.label])
        if target is not None:
            assert shapely.distance(shapely.points(points), target).max() < 1e-3


def test_town_index_is_quick_when_warm(town, town_root, tmp_path):
    import time

    data, nusc = town
    (split,) = [n for n, s in json.loads((town_root / nusc.version / "splits.json").read_text()).items() if s]
    load_index(town_root, nusc.version, split, NUSCENES_CAMERAS, DEFAULT_LANE_RANGE, tmp_path)
    start = time.perf_counter()
    load_index(town_root, nusc.version, split, NUSCENES_CAMERAS, DEFAULT_LANE_RANGE, tmp_path)
    assert time.perf_counter() - start < 1.0
