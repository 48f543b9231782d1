"""Augmented clips stay consistent: projections, boxes and lines agree with the original world."""

import json

import numpy as np
import pytest
import shapely
import torch

from perception.data.augment import Augment, change_colors, move_boxes, move_frames, move_lines, zoom_cameras
from perception.data.lane_map import LaneMap
from perception.data.loader import ClipRequest
from perception.data.nuscenes import NuScenesDataset
from perception.data.sample_lines import ego_from_patch, wide_range
from perception.errors import ConfigError
from perception.geometry import (
    box_corners,
    invert_rigid,
    project_points,
    rigid_from_quaternion,
    rigid_from_yaw,
    transform_points,
    yaw_from_rotation,
)
from perception.types import DEFAULT_LANE_RANGE, LaneRange

MIRROR = np.diag([1.0, -1.0, 1.0, 1.0])
MOVES = {
    "turn": rigid_from_yaw(0.3, (1.0, -0.5, 0.0)),
    "mirror": MIRROR,
    "both": rigid_from_yaw(-0.2, (0.7, 0.4, 0.0)) @ MIRROR,
}


@pytest.fixture(scope="module")
def data(hand_root, tmp_path_factory):
    return NuScenesDataset(
        hand_root, "v1.0-hand", "hand_val", image_size=(90, 160), cameras=("CAM_FRONT", "CAM_BACK"),
        cache_dir=tmp_path_factory.mktemp("cache"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def clip(data):
    """A clip with skewed, off-centre intrinsics, so that every wrong sign shows, and noise for images."""
    clip = data[ClipRequest((3, 4, 5), -1, (0,))]
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, clip.frames.images.shape, dtype=np.uint8))
    img_from_cam = clip.frames.rig.img_from_cam + torch.tensor([[0.0, 3.0, 11.0], [0.0, 4.0, -6.0], [0.0, 0.0, 0.0]])
    turn = torch.from_numpy(rigid_from_yaw(0.4)).float()
    rig = clip.frames.rig._replace(img_from_cam=img_from_cam, ego_from_cam=turn @ clip.frames.rig.ego_from_cam)
    return clip._replace(frames=clip.frames._replace(images=images, rig=rig))


def project(frames, points_ego):
    """Projects points [P, 3]: pixels [T, N, P, 2] and depths [T, N, P]."""
    rig = frames.rig
    cam_from_ego = invert_rigid(rig.ego_from_cam.double())
    return project_points(rig.img_from_cam.double(), transform_points(cam_from_ego, points_ego))


@pytest.fixture(scope="module")
def points_ego():
    return torch.from_numpy(np.random.default_rng(1).uniform([-30, -30, -1], [30, 30, 4], (200, 3)))


@pytest.mark.parametrize("name", MOVES)
def test_points_of_a_moved_world_project_to_the_same_pixels(clip, points_ego, name):
    move = MOVES[name]
    moved = move_frames(clip.frames, move)
    before, depth = project(clip.frames, points_ego)
    after, depth_after = project(moved, transform_points(torch.from_numpy(move), points_ego))
    seen = depth > 1
    assert torch.allclose(depth[seen], depth_after[seen], atol=1e-4)
    if np.linalg.det(move) < 0:
        before = torch.stack([160 - before[..., 0], before[..., 1]], -1)
    assert (before - after)[seen].abs().max() < 2e-2
    # The colour at the projected point is the same too.
    T, N = before.shape[:2]
    pixel, pixel_old = after.floor().long(), project(clip.frames, points_ego)[0].floor().long()
    off_edge = (after - after.round()).abs().min(-1).values > 0.05
    inside = seen & off_edge & (pixel >= 0).all(-1) & (pixel < torch.tensor([160, 90])).all(-1)
    for t in range(T):
        for n in range(N):
            new, old = pixel[t, n][inside[t, n]], pixel_old[t, n][inside[t, n]]
            assert len(new) > 3
            new_colors = moved.images[t, n][:, new[:, 1], new[:, 0]]
            assert torch.equal(new_colors, clip.frames.images[t, n][:, old[:, 1], old[:, 0]])


@pytest.mark.parametrize("name", MOVES)
def test_poses_stay_proper_rotations(clip, name):
    moved = move_frames(clip.frames, MOVES[name])
    for transform in (moved.rig.ego_from_cam, moved.ego_from_prev):
        rotation = transform[..., :3, :3].double()
        assert torch.allclose(torch.linalg.det(rotation), torch.ones(1).double(), atol=1e-5)
        assert torch.allclose(rotation @ rotation.mT, torch.eye(3).double(), atol=1e-5)
    assert (moved.rig.img_from_cam[..., 0, 0] > 0).all() and (moved.rig.img_from_cam[..., 1, 1] > 0).all()


@pytest.mark.parametrize("name", MOVES)
def test_static_things_stay_static(clip, points_ego, name):
    move = torch.from_numpy(MOVES[name])
    moved = move_frames(clip.frames, MOVES[name])
    now = transform_points(clip.frames.ego_from_prev[2].double(), points_ego)
    now_moved = transform_points(moved.ego_from_prev[2].double(), transform_points(move, points_ego))
    assert torch.allclose(now_moved, transform_points(move, now), atol=1e-5)


@pytest.mark.parametrize("name", MOVES)
def test_boxes_move_with_the_world(clip, name):
    boxes = clip.gt.boxes._replace(velocity=clip.gt.boxes.velocity + torch.tensor([0.5, 2.0]))
    boxes = boxes._replace(velocity=boxes.velocity.index_fill(1, torch.tensor([1]), float("nan")))
    move = torch.from_numpy(MOVES[name]).float()
    moved = move_boxes(boxes, MOVES[name])
    corners = transform_points(move, box_corners(boxes.center, boxes.size, boxes.yaw))
    new = box_corners(moved.center, moved.size, moved.yaw)
    assert torch.cdist(corners, new).min(-1).values.max() < 1e-4  # as sets: mirroring swaps left and right corners
    front = (new[..., [0, 3], :].mean(-2) - corners[..., [0, 3], :].mean(-2)).norm(dim=-1)
    assert front.max() < 1e-4  # the front is still the front
    later = torch.cat([boxes.center[..., :2] + 2 * boxes.velocity, boxes.center[..., 2:]], -1)
    later_moved = moved.center[..., :2] + 2 * moved.velocity
    gap = transform_points(move, later)[..., :2] - later_moved
    assert gap[:, 0].abs().max() < 1e-4 and moved.velocity[:, 1].isnan().all()


@pytest.mark.parametrize("name", MOVES)
def test_lines_equal_those_cut_from_a_moved_map(golden, tmp_path, name):
    """The independent ground truth is a map file whose nodes are moved (and mirrored), read at the unmoved pose."""
    poses = json.loads((golden / "map_gt" / "poses.json").read_text())
    path = golden / "map_gt" / "maps" / "expansion" / f"{poses['location']}.json"
    counts = [compare_with_moved_map(path, pose, MOVES[name], tmp_path) for pose in poses["poses"]]
    assert sum(counts) > 0


def compare_with_moved_map(path, pose, move, tmp_path) -> int:
    """Compares the lines around one pose of the map; returns their number."""
    whole = rigid_from_quaternion(pose["ego2global_rotation"], pose["ego2global_translation"])
    yaw, ego_from_window = yaw_from_rotation(whole), rigid_from_yaw(0.01, (0.9, 0.05, 0.0))
    global_from_ego = rigid_from_yaw(yaw, (*whole[:2, 3], 0.0))
    global_from_patch = global_from_ego @ ego_from_window
    content = json.loads(path.read_text())
    nodes = np.array([[node["x"], node["y"], 0.0] for node in content["node"]])
    nodes = transform_points(global_from_ego @ move @ invert_rigid(global_from_ego), nodes)
    for node, point in zip(content["node"], nodes, strict=True):
        node["x"], node["y"] = point[:2]
    (tmp_path / "moved.json").write_text(json.dumps(content))
    pose = (*global_from_patch[:2, 3], yaw + 0.01)
    want = LaneMap(tmp_path / "moved.json").lines(*pose, DEFAULT_LANE_RANGE)

    def in_ego(points):
        return points @ ego_from_window[:2, :2].T + ego_from_window[:2, 3]

    wide = LaneMap(path).lines(*pose, wide_range(DEFAULT_LANE_RANGE))
    wide = [line._replace(points=in_ego(line.points)) for line in wide]
    got = move_lines(wide, move, ego_from_window, DEFAULT_LANE_RANGE)
    assert len(got) == len(want)
    for line in want:
        points = in_ego(line.points)
        alike = [other.points for other in got if other.label == line.label]
        gaps = [shapely.hausdorff_distance(shapely.linestrings(points), shapely.linestrings(p)) for p in alike]
        found = alike[int(np.argmin(gaps))]
        assert min(gaps) < 1e-6
        closed = np.array_equal(points[0], points[-1])
        assert closed == np.array_equal(found[0], found[-1])
        if closed:
            assert shapely.is_ccw(shapely.linearrings(points)) == shapely.is_ccw(shapely.linearrings(found))
        elif line.label == 2:  # a boundary keeps the road on its right
            assert np.abs(points[0] - found[0]).max() < 1e-6
    return len(want)


@pytest.mark.parametrize("seed", range(4))
def test_zoomed_images_agree_with_their_calibration(clip, seed):
    """Finds a smooth blob at a projected point where the new calibration projects that point."""
    T, N = clip.frames.images.shape[:2]
    v, u = torch.meshgrid(torch.arange(90) + 0.5, torch.arange(160) + 0.5, indexing="ij")
    spots = torch.tensor([[70.0, 40.0], [88.0, 52.0]])  # u, v, one per camera
    blob = torch.exp(-((u - spots[:, 0, None, None]) ** 2 + (v - spots[:, 1, None, None]) ** 2) / (2 * 4.0**2))
    images = (250 * blob).round().byte()[None, :, None].expand(T, N, 3, 90, 160)
    zoomed = zoom_cameras(clip.frames._replace(images=images), 0.2, np.random.default_rng(seed))
    assert zoomed.images.shape == images.shape and zoomed.images.dtype == torch.uint8
    new_from_old = zoomed.rig.img_from_cam.double() @ torch.linalg.inv(clip.frames.rig.img_from_cam.double())
    for t in range(T):
        for n in range(N):
            want = (new_from_old[t, n] @ torch.tensor([*spots[n].tolist(), 1.0]).double())[:2]
            weight = zoomed.images[t, n, 0].double()
            found = torch.stack([(weight * u).sum(), (weight * v).sum()]) / weight.sum()
            assert (found - want).norm() < 0.2
    assert (new_from_old - torch.eye(3)).abs().max() > 0.02  # the zoom is not trivial


def test_colors_change_alike_over_time_and_keep_their_order(clip):
    values = torch.arange(0, 160).byte().expand(3, 2, 3, 90, 160)
    changed = change_colors(clip.frames._replace(images=values), 0.3, np.random.default_rng(0)).images
    assert torch.equal(changed[0], changed[2]) and not torch.equal(changed[0, 0], changed[0, 1])
    assert (changed[0, :, :, 0].diff(dim=-1).int() >= 0).all() and not torch.equal(changed, values)
    same = change_colors(clip.frames._replace(images=values), 0.0, np.random.default_rng(0)).images
    assert torch.equal(same, values)


def test_all_changes_switched_off_leave_the_clip_unchanged(data):
    clip = data[0]
    augment = Augment(mirror=0.0, yaw_deg=0.0, shift=0.0, zoom=0.0, color=0.0)
    wide = [data._index.wide_lines.of_sample(i) for i in clip.sample_index]
    patches = [ego_from_patch(data.ego_pose(i), data.ego_from_lidar(i)) for i in clip.sample_index.tolist()]
    same = augment(clip, wide, patches, DEFAULT_LANE_RANGE, np.random.default_rng(0), np.random.default_rng(1))
    assert torch.equal(same.frames.images, clip.frames.images)
    assert torch.allclose(same.frames.rig.ego_from_cam, clip.frames.rig.ego_from_cam)
    assert torch.allclose(same.gt.boxes.center, clip.gt.boxes.center)
    assert torch.allclose(same.gt.lines.points, clip.gt.lines.points, atol=1e-4)
    assert torch.equal(same.gt.lines.valid, clip.gt.lines.valid)


def drawn(root, samples, visit=0, **settings):
    """Draws the frames of a clip of the hand-written dataset, with only `settings` augmented."""
    off = {"mirror": 0.0, "yaw_deg": 0.0, "shift": 0.0, "zoom": 0.0, "color": 0.0}
    data = NuScenesDataset(
        root, "v1.0-hand", "hand_val", image_size=(90, 160), cameras=("CAM_FRONT", "CAM_BACK"),
        augment=Augment(**off | settings),
    )  # fmt: skip
    return data[ClipRequest(samples, -1, (0, 0, visit))].frames


def test_dropped_cameras_change_per_clip_and_extrinsics_noise_per_scene(hand_root):
    true = drawn(hand_root, (0,)).rig.ego_from_cam
    missing, errors = set(), set()
    for visit in range(6):
        for sample in range(3):
            rig = drawn(hand_root, (sample,), visit, drop_camera=1.0, extrinsics_noise=1.0).rig
            assert rig.present.sum() == 1  # one of the two is missing, never both
            missing.add((visit, sample, int(rig.present[0, 1])))
            errors.add((visit, *(rig.ego_from_cam - true)[0, :, :3, :3].mul(1e4).round().flatten().tolist()))
    dropped = {visit: {gone for v, _, gone in missing if v == visit} for visit in range(6)}
    assert {0, 1} in dropped.values()  # different cameras in the same scene
    assert len(errors) == 6  # one error per visit of the scene, the same for all its clips
    wrong = [
        not torch.equal(drawn(hand_root, (0,), visit, extrinsics_noise=0.3).rig.ego_from_cam, true)
        for visit in range(60)
    ]
    assert 8 <= sum(wrong) <= 29  # of 60 visits at 0.3: 18 +- 3.5
    assert drawn(hand_root, (0, 1, 2), drop_camera=1.0).rig.present.sum(0).tolist() in ([0, 3], [3, 0])  # a whole clip


def test_corrupted_images_are_drawn_with_their_probability(data, clip):
    augment = Augment(mirror=0.0, yaw_deg=0.0, shift=0.0, zoom=0.0, color=0.0, corrupt=0.3)
    samples = clip.sample_index.tolist()
    wide = [data._index.wide_lines.of_sample(i) for i in samples]
    patches = [ego_from_patch(data.ego_pose(i), data.ego_from_lidar(i)) for i in samples]
    changed = []
    for seed in range(50):
        bad = augment(clip, wide, patches, DEFAULT_LANE_RANGE, np.random.default_rng(0), np.random.default_rng(seed))
        different = (bad.frames.images != clip.frames.images).flatten(2).any(-1)  # [T, N]
        assert (different == different[0]).all()  # all images of a camera or none
        assert torch.equal(bad.frames.rig.ego_from_cam, clip.frames.rig.ego_from_cam) and bad.frames.rig.present.all()
        changed += different[0].tolist()
    assert 17 < sum(changed) < 43  # of 100 draws at 0.3: 30 +- 4.6


def test_the_reach_is_that_of_the_corners_of_the_turned_range():
    rng, refused = np.random.default_rng(3), 0
    for _ in range(200):
        lane_range = LaneRange(*rng.uniform(20, 100, 2))
        settings = Augment(yaw_deg=rng.uniform(0, 40), shift=rng.uniform(0, 12))
        corners = np.array([[x, y] for x in (-1, 1) for y in (-1, 1)]) * lane_range / 2
        turned = [corners @ rigid_from_yaw(np.radians(settings.yaw_deg) * k / 50)[:2, :2].T for k in range(51)]
        # The largest angle reaches farthest, unless a diagonal comes to lie along an axis before.
        beyond = (np.abs(turned[-1]) + settings.shift > np.array(wide_range(lane_range)) / 2).any()
        assert beyond <= (np.abs(turned) + settings.shift > np.array(wide_range(lane_range)) / 2).any()
        if beyond:
            refused += 1
            with pytest.raises(ConfigError, match="too far for the map"):
                settings.check_reach(lane_range)
        else:
            settings.check_reach(lane_range)
    assert 50 < refused < 150


def test_crops_and_pads_are_anywhere_and_colours_change_around_what_they_are(clip):
    rng, H, W = np.random.default_rng(5), 90, 160
    zoomed = {"in": [], "out": []}
    for _ in range(60):
        rig, before = zoom_cameras(clip.frames, 0.2, rng).rig, clip.frames.rig
        for n in range(2):
            scale = rig.img_from_cam[0, n, [0, 1], [0, 1]] / before.img_from_cam[0, n, [0, 1], [0, 1]]
            corner = rig.img_from_cam[0, n, :2, 2] - scale * before.img_from_cam[0, n, :2, 2]
            free = torch.tensor([W, H]) * (scale - 1)  # pixels of the result that the crop or the image may move by
            if free.abs().min() > 8:
                zoomed["in" if free[0] > 0 else "out"].append((-corner / free).tolist())
    for shares in zoomed.values():
        low, high = np.min(shares, 0), np.max(shares, 0)
        assert (
            len(shares) > 20
            and (low > -0.01).all()
            and (low < 0.2).all()
            and (high > 0.8).all()
            and (high < 1.01).all()
        )
    same = change_colors(clip.frames, 1e-9, rng).images
    assert torch.equal(same, clip.frames.images)
    changed = change_colors(clip.frames, 0.1, rng).images.float()
    assert 0.5 < (changed - same).abs().mean() < 25 and (changed.mean() - same.float().mean()).abs() < 25


def test_impossible_settings():
    with pytest.raises(ConfigError, match=r"Augment\.drop_camera is 1\.5; it is a probability"):
        Augment(drop_camera=1.5)
    with pytest.raises(ConfigError, match=r"Augment\.extrinsics_noise_deg is -1"):
        Augment(extrinsics_noise_deg=-1)
    with pytest.raises(ConfigError, match=r"Augment\.zoom is -0\.1"):
        Augment(zoom=-0.1)
    assert Augment(extrinsics_noise=1, drop_camera=1, corrupt=1, mirror=1).extrinsics_noise_deg == 1
    with pytest.raises(ConfigError, match="too far for the map"):
        Augment(yaw_deg=45.0).check_reach(DEFAULT_LANE_RANGE)
    Augment().check_reach(LaneRange(100.0, 50.0))
