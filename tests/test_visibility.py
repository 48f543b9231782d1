"""What a rig sees now and has seen before, against the projection of the networks and against all frames of a drive."""

import warnings

import numpy as np
import pytest
import torch
from conftest import noisy
from toy_network import ToyConfig, ToyNetwork

from perception.cameras import see_points
from perception.data.nuscenes import NuScenesDataset
from perception.errors import ConfigError
from perception.export.runtime import Runtime
from perception.geometry import rigid_from_yaw, transform_points
from perception.inference.predictor import Predictor
from perception.inference.sequence import run_sequence_seen
from perception.inference.visibility import CELL, CELLS, SeenMap, View, kept_by, sees_ground
from perception.synthetic import VERSION
from perception.synthetic.sensors import EIGHT_CAMERAS, SIX_CAMERAS, make_cameras
from perception.types import Boxes, CameraRig, NumpyCameraRig, NumpySeen, map_tensors

SIZE = (90, 160)


def make_rig(mountings, seed=0) -> NumpyCameraRig:
    cameras = make_cameras(np.random.default_rng(seed), SIZE, mountings)
    return NumpyCameraRig(
        np.stack([camera.img_from_cam for camera in cameras]),
        np.stack([camera.ego_from_cam for camera in cameras]),
        np.ones(len(cameras), dtype=bool),
    )


def seen_now(rig, points) -> np.ndarray:
    """The points [P, 3] that any camera sees, computed as the networks do."""
    tensors = CameraRig(*(torch.from_numpy(part)[None] for part in rig))
    return see_points(tensors, torch.from_numpy(points).float(), SIZE)[2][0].any(0).numpy()


@pytest.mark.parametrize("mountings", [SIX_CAMERAS, EIGHT_CAMERAS, SIX_CAMERAS[:1]], ids=["six", "eight", "one"])
def test_points_are_seen_where_the_networks_project_them(mountings):
    rng = np.random.default_rng(0)
    rig = make_rig(mountings)
    rig.present[-1:] = len(mountings) == 1
    points = rng.uniform((-60, -60, -1), (60, 60, 4), (5000, 3))
    view = SeenMap().look(rig, SIZE, np.eye(4), True)
    found, expected = view.sees(points), seen_now(rig, points)
    assert 0.05 < expected.mean() < 0.999 and (found != expected).mean() < 1e-3  # rounding at the borders of images
    nobody = SeenMap().look(rig._replace(present=np.zeros(len(mountings), bool)), SIZE, np.eye(4), True)
    assert not nobody.sees(points).any()


@pytest.mark.parametrize("speed", [0.25, 3.0], ids=["slow", "fast"])
def test_the_map_holds_what_earlier_frames_saw(speed):
    # Two forward cameras on a bend. Truth: the points that any frame so far has seen, in exact coordinates.
    rig, rng = make_rig(SIX_CAMERAS[:2]), np.random.default_rng(1)
    seen_map = SeenMap()
    world_from_ego, ever = np.eye(4), None
    world = np.concatenate([rng.uniform(-45, 45, (4000, 2)), np.zeros((4000, 1))], 1)
    motion = rigid_from_yaw(0.02 * speed, (speed, 0, 0))  # prev_from_ego
    for k in range(round(30 / speed)):
        world_from_ego = world_from_ego @ motion if k else world_from_ego
        points = transform_points(np.linalg.inv(world_from_ego), world)
        now = seen_now(rig, points)
        ever = now if ever is None else ever | now
        view = seen_map.look(rig, SIZE, np.linalg.inv(motion), k == 0)
        seen_map.keep(view)
    near = np.abs(points[:, :2]).max(1) < 40
    found = view.sees(points)
    assert now[near].mean() + 0.1 < ever[near].mean() < 0.6
    assert (found != ever)[near].mean() < 0.05  # cells are CELL metres wide
    behind = near & (points[:, 0] < -2 * CELL) & ever
    assert behind.sum() > 100 and found[behind].mean() > 0.9
    # Nothing is remembered after a first frame, after reset, and by a network without a memory.
    fresh = SeenMap().look(rig, SIZE, np.eye(4), True).sees(points)
    assert (seen_map.look(rig, SIZE, np.linalg.inv(motion), True).sees(points) == fresh).all()
    seen_map.reset()
    assert (seen_map.look(rig, SIZE, np.linalg.inv(motion), False).sees(points) == fresh).all()
    forgetful = SeenMap(remembers=False)
    forgetful.keep(view)
    assert (forgetful.look(rig, SIZE, np.linalg.inv(motion), False).sees(points) == fresh).all()


def test_looking_changes_nothing_and_a_far_jump_empties_the_map():
    rig, points = make_rig(SIX_CAMERAS[:1]), np.random.default_rng(2).uniform((-40, -40, 0), (40, 40, 0), (2000, 3))
    seen_map = SeenMap()
    seen_map.keep(seen_map.look(rig, SIZE, np.eye(4), True))
    back = rigid_from_yaw(np.pi)
    turned = seen_map.look(rig, SIZE, back, False).sees(points)
    assert turned.sum() > 1.5 * seen_now(rig, points).sum()
    for motion in (rigid_from_yaw(1.0, (3.0, 0, 0)), rigid_from_yaw(0, (500.0, 0, 0))):
        seen_map.look(rig, SIZE, motion, False)
    assert (seen_map.look(rig, SIZE, back, False).sees(points) == turned).all()
    far = seen_map.look(rig, SIZE, rigid_from_yaw(0, (500.0, 0, 0)), False)
    assert not far.before.any() and (far.sees(points) == seen_now(rig, points)).mean() > 0.999


def test_the_seen_share_of_boxes_and_lines():
    view = SeenMap().look(make_rig(SIX_CAMERAS[:1]), SIZE, np.eye(4), True)  # forward, 65 degrees wide
    center = torch.tensor([[20.0, 0, 0.8], [-20, 0, 0.8], [20, 12.7, 0.8]])
    size, yaw = torch.tensor([[4.0, 2, 1.6]]).expand(3, 3), torch.zeros(3)
    nothing = torch.zeros(3)
    share = view.of_boxes(Boxes(center, size, yaw, nothing, nothing, nothing, nothing, nothing, nothing))
    assert share[:2].tolist() == [1.0, 0.0] and 0.2 < share[2] < 0.8
    lines = NumpySeen(share, np.array([[True] * 4, [True, False, False, False], [False] * 4]))
    boxes_kept, lines_kept = kept_by(lines, 0.25)
    assert boxes_kept.tolist() == [True, False, bool(share[2] >= 0.25)] and lines_kept.tolist() == [True, True, False]
    assert kept_by(lines, 0.3)[1].tolist() == [True, False, False] and all(map(np.all, kept_by(lines, 0.0)))


def test_a_ray_finds_the_ground_that_cell_centres_miss():
    cameras = make_rig(SIX_CAMERAS)
    assert sees_ground(cameras, SIZE).all()
    steep = cameras.ego_from_cam.copy()
    steep[:, :3, :3] = steep[:, :3, :3] @ [[1, 0, 0], [0, 0, 1], [0, -1, 0]]  # straight down
    assert sees_ground(cameras._replace(ego_from_cam=steep), SIZE).all()
    steep[:, :3, :3] = steep[:, :3, :3] @ [[1, 0, 0], [0, -1, 0], [0, 0, -1]]  # straight up
    assert not sees_ground(cameras._replace(ego_from_cam=steep), SIZE).any()


@pytest.fixture(scope="module")
def town(town_root) -> NuScenesDataset:
    return NuScenesDataset(town_root, VERSION, "town_val", image_size=(128, 224))


def arguments(town, k, cameras=slice(None)):
    frame = map_tensors(lambda tensor: tensor[0], town[k].frames)
    rig = CameraRig(*(tensor[cameras].numpy() for tensor in frame.rig))
    return frame.images[cameras].permute(0, 2, 3, 1).numpy(), rig, town.ego_pose(k), float(town.timestamps[k])


def test_two_forward_cameras_give_nothing_that_lies_behind(town):
    predictor, everything = Predictor("nano", min_score=0.1), Predictor("nano", min_score=0.1, min_seen=0)
    behind = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the weights were trained with six cameras
        for k in range(4):
            live, full = (each.step(*arguments(town, k, slice(2))) for each in (predictor, everything))
            points, seen = live.lines.points, live.seen.lines
            # Nothing behind was seen in the first frame; later only what the car has passed.
            passed = float(np.linalg.norm(town.ego_pose(k)[:3, 3] - town.ego_pose(0)[:3, 3]))
            assert not seen[points[..., 0] < -passed - CELL].any() and not (live.boxes.center[:, 0] < -passed - 5).any()
            assert (live.seen.boxes >= 0.25).all() and (seen.float().mean(1) >= 0.25).all()
            kept = kept_by(NumpySeen(*(part.numpy() for part in full.seen)), 0.25)
            for part, every, mask in zip(live.objects[:2], full.objects[:2], kept, strict=True):
                assert all(torch.equal(a, b[torch.from_numpy(mask)]) for a, b in zip(part, every, strict=True))
            behind += int((~torch.from_numpy(kept[1])).sum())
    assert behind > 0  # the network does predict such lines


def test_a_whole_rig_loses_nothing_and_a_stream_sees_the_same(town):
    predictor = Predictor("nano", min_score=0.05)
    fitted = NuScenesDataset(town.roots, VERSION, "town_val", image_size=predictor.model.config.image_size)
    batches = (map_tensors(lambda tensor: tensor[None], fitted[k]) for k in range(2))
    for k, (_, streamed, _) in enumerate(run_sequence_seen(predictor.model, batches)):
        live = predictor.step(*arguments(town, k))
        boxes, lines = (int((part.valid & (part.score >= 0.05)).sum()) for part in streamed.objects[:2])
        assert live.warnings == () and len(live.boxes.score) == boxes > 10 and len(live.lines.score) == lines > 2
        assert torch.equal(streamed.seen.lines[:lines], live.seen.lines)  # best score first
        assert streamed.info[2:4] == live.info[2:4] == ((True, "") if k else (False, "it is the first frame"))


def test_the_runtime_sees_what_the_predictor_sees(make_live, live_frames):
    predictor, runtime = (make_live[kind](min_seen=0.3) for kind in ("predictor", "runtime"))
    for images, rig, pose, time in live_frames:
        front = rig._replace(present=np.arange(6) < 2)
        one, other = (live.step(images, front, pose, time) for live in (predictor, runtime))
        assert np.allclose(one.seen.boxes.numpy(), other.seen.boxes) and other.seen.boxes.dtype == np.float32
        assert (one.seen.lines.numpy() == other.seen.lines).all() and other.seen.lines.dtype == bool
        assert (other.seen.boxes >= 0.3).all() and len(other.boxes.score) == len(other.seen.boxes)
        assert len(other.lines.score) == len(other.seen.lines) < 200


@pytest.mark.parametrize("value", [-0.1, 1.1, np.nan, "all", None])
def test_invalid_shares_are_named(small_network, fp32_export, value):
    for make in (Predictor, Runtime):
        with pytest.raises(ConfigError, match=r"min_seen is .*; give a number from 0 to 1"):
            make(small_network if make is Predictor else fp32_export, min_seen=value)


def test_a_network_without_memory_has_seen_nothing_before(town):
    live = Predictor(noisy(ToyNetwork, ToyConfig(), seed=2), min_seen=0)
    for k in range(3):
        result = live.step(*arguments(town, k, slice(1)))
    rig = arguments(town, 2, slice(1))[1]
    view = SeenMap().look(NumpyCameraRig(*rig), (128, 224), np.eye(4), True)
    assert 0 < result.seen.boxes.mean() < 1
    assert np.abs(view.of_boxes(result.boxes) - result.seen.boxes.numpy()).max() < 0.2  # the same up to the crop


def test_a_step_that_fails_has_seen_nothing(make_live, live_kind, live_frames):
    live, undisturbed = make_live[live_kind](min_seen=0), make_live[live_kind](min_seen=0)
    images, rig, pose, time = live_frames[0]
    front = rig._replace(present=np.arange(6) < 1)
    for each in (live, undisturbed):
        each.step(images, front, pose, time)

    def fail(*_):
        raise RuntimeError("out of memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*((live.model, "decode") if live_kind == "predictor" else (live._session, "run")), fail)
        for k in range(1, 5):  # the same place, upside down and looking back
            with pytest.raises(RuntimeError, match="out of memory"):
                live.step([image[::-1] for image in images], rig, pose @ rigid_from_yaw(0.9 * k), time + 0.4)
    one, other = (each.step(images, front, pose, time + 0.5) for each in (live, undisturbed))
    assert one.warnings == other.warnings == ()
    for part, expected in zip(one.seen, other.seen, strict=True):
        assert np.array_equal(np.asarray(part), np.asarray(expected)) and np.asarray(part).mean() < 0.9


def test_all_cells_of_the_map_count_and_none_beside_it():
    before = np.ones((CELLS, CELLS), bool)
    blind = np.zeros((0, 3, 4), np.float32)
    view = View(blind, (10, 10), np.eye(3), np.array([-3, 5]), before, np.zeros((0, CELLS, CELLS), bool))
    inside = CELL * np.array([[-2.9, 5.1], [-2.9, 4.9 + CELLS], [-3.1 + CELLS, 5.1], [-3.1 + CELLS, 4.9 + CELLS]])
    outside = CELL * np.array([[-3.1, 5.1], [-2.9, 4.9], [-2.9 + CELLS, 5.1], [-2.9, 5.1 + CELLS]])
    assert view.sees(np.pad(inside, ((0, 0), (0, 1)))).all() and not view.sees(np.pad(outside, ((0, 0), (0, 1)))).any()
