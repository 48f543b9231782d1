"""Generated towns in nuscenes-devkit's tools: lane graph, CAN bus messages, map images, prediction, its own tests."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import shapely
from nuscenes import NuScenes
from nuscenes.can_bus.can_bus_api import NuScenesCanBus
from nuscenes.map_expansion import arcline_path_utils
from nuscenes.map_expansion.bitmap import BitMap
from nuscenes.map_expansion.map_api import NuScenesMap
from nuscenes.utils.map_mask import MapMask
from pyquaternion import Quaternion
from shapely.geometry import LineString, Point

from perception.data.lane_topology import lane_points
from perception.data.nuscenes import NuScenesDataset
from perception.synthetic import VERSION, map_images, simulate
from perception.synthetic.can_bus import RATES, STEERING_RATIO, TRACK_WIDTH, WHEEL_RADIUS, WHEELBASE, ego_motion
from perception.synthetic.district import LanePath, Trajectory
from perception.synthetic.lane_graph import arcline_path
from perception.synthetic.limits import scene_names
from perception.synthetic.map_expansion import write_map_expansion
from perception.synthetic.map_images import write_map_images
from perception.synthetic.roads import TILE_HALF
from perception.synthetic.town import LOCATIONS, make_district

ORIGIN = np.array([300.0, 300.0])


@pytest.fixture(scope="module")
def districts():
    """Districts with straight, curved and one-way roads, with traffic on the left and on the right."""
    return [make_district(seed, (300.0, 300.0), LOCATIONS[seed % 4], 5.0) for seed in (0, 4, 7, 11, 19)]


@pytest.fixture(scope="module")
def maps(districts, tmp_path_factory):
    """The devkit's map of each district, with our reading of its paths by token."""
    found = []
    for k, district in enumerate(districts):
        root = tmp_path_factory.mktemp(f"map{k}")
        path = root / "maps" / "expansion" / f"{district.location}.json"
        write_map_expansion([district], path)
        paths = {token: lane_points(arcs) for token, arcs in json.loads(path.read_text())["arcline_path_3"].items()}
        found.append((NuScenesMap(str(root), district.location), paths))
    return found


def test_arcs_follow_circles_and_lines():
    # A quarter of a circle with radius 20 m to the left, after 30 m straight ahead, from (5, 7).
    ahead = np.linspace(0, 30, 31)[:-1]
    angle = np.linspace(0, np.pi / 2, 33)
    x = np.concatenate([5 + ahead, 35 + 20 * np.sin(angle)])
    y = np.concatenate([np.full(30, 7.0), 27 - 20 * np.cos(angle)])
    yaw = np.concatenate([np.zeros(30), angle])
    for side in (1, -1):
        arcs = arcline_path(LanePath(np.stack([x, side * y], axis=1), side * yaw, 3.0))
        assert arcline_path_utils.length_of_lane(arcs) == pytest.approx(30 + 10 * np.pi, abs=0.01)
        curved = arcline_path_utils.get_curvature_at_distance_along_lane(50.0, arcs)
        assert curved == pytest.approx(1 / 20, rel=0.02)
        assert arcs[-1]["shape"] == ("LSL" if side > 0 else "RSR")
        poses = np.array(arcline_path_utils.discretize_lane(arcs, 0.5))
        after = poses[poses[:, 0] > 35.5]
        np.testing.assert_allclose(np.hypot(after[:, 0] - 35, after[:, 1] - side * 27), 20, atol=0.03)
        np.testing.assert_allclose(arcs[-1]["end_pose"], [55, side * 27, side * np.pi / 2], atol=1e-6)


def test_a_half_turn_and_a_straight_line_are_exact():
    angle = np.linspace(0, np.pi, 40)
    turn = arcline_path(LanePath(np.stack([8 * np.sin(angle), 8 - 8 * np.cos(angle)], axis=1), angle, 3.0))
    assert arcline_path_utils.length_of_lane(turn) == pytest.approx(8 * np.pi, abs=1e-3)
    line = arcline_path(LanePath(np.stack([np.arange(100.0), np.zeros(100)], axis=1), np.zeros(100), 3.0))
    assert len(line) <= 2 and arcline_path_utils.get_curvature_at_distance_along_lane(50.0, line) == 0


def test_paths_are_the_middle_of_the_lanes(maps):
    for nusc_map, paths in maps:
        assert len(nusc_map.lane) > 0
        for lane in nusc_map.lane:
            polygon = nusc_map.extract_polygon(lane["polygon_token"])
            line = LineString(paths[lane["token"]])
            middle = shapely.line_interpolate_point(line, np.arange(4.0, line.length - 4.0, 0.5))
            to_side = shapely.distance(middle, polygon.exterior)
            if not len(middle) or not polygon.contains(middle[0]):
                continue  # a corner at the edge of the map
            # Both sides are parallel to the centre: the width is area over length, and everywhere the same.
            near_edge = np.abs(shapely.get_coordinates(middle) - ORIGIN).max(axis=1) > TILE_HALF - 6
            half = np.median(to_side)
            assert 1.4 < half < 1.9
            np.testing.assert_allclose(to_side[~near_edge], half, atol=0.05)


def test_lanes_and_connectors_join_without_gap_or_kink(maps):
    linked = 0
    for nusc_map, paths in maps:
        tokens = {record["token"] for record in (*nusc_map.lane, *nusc_map.lane_connector)}
        assert set(paths) == set(nusc_map.connectivity) == tokens
        for token in tokens:
            for after in nusc_map.get_outgoing_lane_ids(token):
                linked += 1
                assert token in nusc_map.get_incoming_lane_ids(after)
                end = arcline_path_utils.discretize_lane(nusc_map.get_arcline_path(token), 0.5)[-1]
                start = nusc_map.get_arcline_path(after)[0]["start_pose"]
                np.testing.assert_allclose(end[:2], start[:2], atol=0.01)
                assert np.cos(end[2] - start[2]) > np.cos(0.02)
        for connector in nusc_map.lane_connector:
            token = connector["token"]
            assert len(nusc_map.get_incoming_lane_ids(token)) == len(nusc_map.get_outgoing_lane_ids(token)) == 1
            polygon = nusc_map.extract_polygon(connector["polygon_token"])
            assert polygon.buffer(0.1).contains(LineString(paths[token]))
    assert linked > 50


def test_both_readers_see_the_same_paths(maps):
    for nusc_map, paths in maps:
        for token, poses in nusc_map.discretize_lanes(list(paths), 0.5).items():
            poses = np.array(poses)
            assert np.isfinite(poses).all()
            assert shapely.distance(shapely.points(poses[:, :2]), LineString(paths[token])).max() < 0.02


def test_the_car_drives_on_the_graph(districts, maps):
    for district, (nusc_map, paths) in zip(districts, maps, strict=True):
        inside = np.abs(district.ego.xy - ORIGIN).max(axis=1) < TILE_HALF - 1
        assert inside.any()
        for (x, y), yaw in zip(district.ego.xy[inside][::7], district.ego.yaw[inside][::7], strict=True):
            near = [points for points in paths.values() if LineString(points).distance(Point(x, y)) < 0.1]
            turns = []
            for points in near:
                line = LineString(points)
                at = line.project(Point(x, y))
                back, front = (shapely.get_coordinates(line.interpolate(max(at + d, 0)))[0] for d in (-0.5, 0.5))
                turns.append(abs(np.angle(np.exp(1j * (np.arctan2(*(front - back)[::-1]) - yaw)))))
            assert min(turns) < 0.25  # the car's heading is averaged over 2.5 m
            closest = nusc_map.get_closest_lane(x, y, radius=3)
            # The devkit measures to points of the path half a metre apart.
            assert LineString(paths[closest]).distance(Point(x, y)) < 0.3


def test_the_dataset_returns_the_centre_line_under_the_car(town_root):
    dataset = NuScenesDataset(town_root, VERSION, "town_val", image_size=(64, 112))
    for k in range(len(dataset)):
        lines = dataset.gt_centerlines(k)
        under = [line for line in map(LineString, lines.points) if line.distance(Point(0, 0)) < 0.1]
        assert under  # the car drives on a centre line, along +x
        ahead = [shapely.get_coordinates(line.interpolate(line.project(Point(0, 0)) + 0.5))[0] for line in under]
        assert max(x for x, _ in ahead) > 0.4


def test_motion_on_a_circle():
    speed, radius = 6.0, 25.0
    times = np.arange(0, 10, 0.1)
    yaw = speed / radius * times
    circle = Trajectory(times, radius * np.stack([np.sin(yaw), 1 - np.cos(yaw)], axis=1), yaw)
    motion = ego_motion(circle, np.arange(0.1, 9.5, 0.02))
    np.testing.assert_allclose(motion.velocity[:, 0], speed, rtol=2e-3)
    np.testing.assert_allclose(motion.velocity[:, 1], 0, atol=0.02)
    np.testing.assert_allclose(motion.yaw_rate, speed / radius, rtol=1e-6)
    np.testing.assert_allclose(motion.acceleration[:, 1].mean(), speed**2 / radius, rtol=0.01)
    np.testing.assert_allclose(motion.steering, STEERING_RATIO * np.arctan(WHEELBASE / radius), rtol=5e-3)


def test_motion_on_a_line():
    times = np.arange(0, 6, 0.1)
    braking = Trajectory(times, np.stack([10 * times - times**2, 0 * times], axis=1), 0 * times)
    seconds = np.round(np.arange(0.1, 4.5, 0.1), 1)
    motion = ego_motion(braking, seconds)
    np.testing.assert_allclose(motion.velocity[:, 0], 10 - 2 * seconds, atol=1e-6)
    np.testing.assert_allclose(motion.acceleration, [[-2, 0]] * len(seconds), atol=1e-6)
    assert not motion.steering.any()


def test_can_bus_messages_agree_with_the_ego_poses(town_root):
    nusc, can = NuScenes(VERSION, str(town_root), verbose=False), NuScenesCanBus(str(town_root))
    assert [scene["name"] for scene in nusc.scene] == ["scene-0001", "scene-0002"]
    assert can.list_misaligned_routes(max_misalignment=1.5) == []
    moved = 0.0
    for scene in nusc.scene:
        pose = can.get_messages(scene["name"], "pose")
        times = np.array([row["utime"] for row in pose])
        xy = np.array([row["pos"][:2] for row in pose])
        sample, poses = nusc.get("sample", scene["first_sample_token"]), []
        while True:
            lidar = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
            poses.append(nusc.get("ego_pose", lidar["ego_pose_token"]))
            if not sample["next"]:
                break
            sample = nusc.get("sample", sample["next"])
        rows = [int(np.flatnonzero(times == record["timestamp"])[0]) for record in poses]
        assert rows[0] == 0 and rows[-1] == len(pose) - 1
        for row, record in zip(rows, poses, strict=True):
            np.testing.assert_allclose(pose[row]["pos"], record["translation"], atol=2e-6)
            turned = Quaternion(pose[row]["orientation"]).inverse * Quaternion(record["rotation"])
            assert abs(turned.radians) < 1e-5
        # Velocities, turned into the map and added up, lead from one keyframe to the next.
        yaw = np.unwrap([Quaternion(row["orientation"]).yaw_pitch_roll[0] for row in pose])
        vel, rate = (np.array([row[key] for row in pose]) for key in ("vel", "rotation_rate"))
        accel = np.array([row["accel"] for row in pose])
        speed = np.stack([np.cos(yaw) * vel[:, 0] - np.sin(yaw) * vel[:, 1],
                          np.sin(yaw) * vel[:, 0] + np.cos(yaw) * vel[:, 1]], axis=1)  # fmt: skip
        for first, last in pairwise(rows):
            part, seconds = slice(first, last + 1), (times[last] - times[first]) * 1e-6
            driven = 0.02 * ((speed[part][1:] + speed[part][:-1]) / 2).sum(axis=0)
            assert np.linalg.norm(xy[last] - xy[first] - driven) < 0.03
            assert abs(yaw[last] - yaw[first] - rate[part, 2].mean() * seconds) < 0.02
            assert abs(vel[last, 0] - vel[first, 0] - accel[part, 0].mean() * seconds) < 0.25
            moved += np.linalg.norm(xy[last] - xy[first])
        wheels = can.get_messages(scene["name"], "zoe_veh_info")[::2]  # 100 Hz, as many as poses
        turns = 2 * np.pi * WHEEL_RADIUS / 60
        rear = np.array([[row["RL_wheel_speed"], row["RR_wheel_speed"]] for row in wheels]) * turns  # [K, 2] m/s
        np.testing.assert_allclose(rear.mean(axis=1), vel[:, 0], atol=1e-4)
        np.testing.assert_allclose((rear[:, 1] - rear[:, 0]) / TRACK_WIDTH, rate[:, 2], atol=1e-4)
        steer = np.array([row["value"] for row in can.get_messages(scene["name"], "steeranglefeedback")][::2])
        turning = np.abs(rate[:, 2]) > 1e-4
        assert (np.sign(steer[turning]) == -np.sign(rate[turning, 2])).all()  # right is positive
        meta = can.get_messages(scene["name"], "meta")
        for name, rate_hz in RATES.items():
            messages = can.get_messages(scene["name"], name)
            assert meta[name]["message_count"] == len(messages) and len(messages) > 1
            assert meta[name]["message_freq"] == pytest.approx(rate_hz)
            assert all(isinstance(row["utime"], int) for row in messages)
            assert set(meta[name]["var_stats"]) == set(messages[0])
        monitor = can.get_messages(scene["name"], "vehicle_monitor")
        assert [round(row["vehicle_speed"] / 3.6, 4) for row in monitor] == [round(v, 4) for v in vel[::25, 0]]
    assert moved > 5


def test_map_images_show_the_layers(districts, tmp_path):
    rng = np.random.default_rng(0)
    district = districts[1]
    maps = tmp_path / "maps"
    canvas = write_map_expansion([district], maps / "expansion" / f"{district.location}.json")
    write_map_images([district], canvas, maps, district.location)
    prior, basemap = (BitMap(str(tmp_path), district.location, name) for name in ("semantic_prior", "basemap"))
    assert prior.image.shape == basemap.image.shape == tuple(round(10 * edge) for edge in canvas[::-1])
    mask = MapMask(str(next(maps.glob("*.png"))))
    area = shapely.union_all([*district.layers["drivable_area"], *district.layers["walkway"]])
    points = ORIGIN + rng.uniform(-120, 120, (3000, 2))
    clear = shapely.distance(shapely.points(points), area.boundary) > 0.15
    inside = shapely.contains_xy(area, points[:, 0], points[:, 1])
    assert inside.mean() > 0.1
    np.testing.assert_array_equal(mask.is_on_mask(*points[clear].T), inside[clear])
    # The basemap has its first row in the north, as the devkit draws it: paint is bright, asphalt is not.
    zebra = max((p for p in district.markings), key=lambda m: m.polygon.area).polygon.representative_point()
    row, column = int(basemap.image.shape[0] - 10 * zebra.y), int(10 * zebra.x)
    assert basemap.image[row, column] > 200
    assert 30 < np.median(basemap.image) < 120


def test_a_large_map_gets_a_coarse_basemap(districts, tmp_path, monkeypatch):
    monkeypatch.setattr(map_images, "_MOST_PIXELS", 1_000_000)
    write_map_images(districts[:1], [380.0, 420.0], tmp_path / "maps", districts[0].location)
    prior, basemap = (BitMap(str(tmp_path), districts[0].location, name) for name in ("semantic_prior", "basemap"))
    assert prior.image.shape == (1, 1)
    rows, columns = basemap.image.shape
    assert 0.99e6 < rows * columns < 1.01e6 and rows / columns == pytest.approx(420 / 380, rel=0.01)
    assert len(np.unique(basemap.image)) > 3


def test_scene_names_are_those_that_the_can_bus_reader_takes(tmp_path):
    names = scene_names(700)
    assert names[:2] == ["scene-0001", "scene-0002"] and len(set(names)) == 700
    (tmp_path / "can_bus").mkdir()
    refused = NuScenesCanBus(str(tmp_path)).can_blacklist
    assert refused and {int(name[-4:]) for name in names} == set(range(1, 701 + len(refused))) - set(refused)


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """A town under the devkit's version v1.0-mini with all four maps."""
    root = tmp_path_factory.mktemp("mini") / "town"
    simulate(root, scenes=4, seed=3, keyframes=4, image_size=(32, 56), version="v1.0-mini", workers=1)
    return root


@pytest.mark.slow
def test_prediction_inputs(mini):
    from nuscenes.prediction import PredictHelper
    from nuscenes.prediction.input_representation.agents import AgentBoxesWithFadedHistory
    from nuscenes.prediction.input_representation.combinators import Rasterizer
    from nuscenes.prediction.input_representation.interface import InputRepresentation
    from nuscenes.prediction.input_representation.static_layers import StaticLayerRasterizer

    nusc = NuScenes("v1.0-mini", str(mini), verbose=False)
    helper = PredictHelper(nusc)
    static = StaticLayerRasterizer(helper, meters_ahead=30, meters_behind=10, meters_left=20, meters_right=20)
    agents = AgentBoxesWithFadedHistory(helper, meters_ahead=30, meters_behind=10, meters_left=20, meters_right=20)
    both = InputRepresentation(static, agents, Rasterizer())
    sample = nusc.sample[1]
    cars = [row for row in map(lambda t: nusc.get("sample_annotation", t), sample["anns"])
            if row["category_name"] == "vehicle.car"]  # fmt: skip
    picture = both.make_input_representation(cars[0]["instance_token"], sample["token"])
    assert picture.shape == (400, 400, 3) and len(np.unique(picture.reshape(-1, 3), axis=0)) > 5
    future = helper.get_future_for_agent(cars[0]["instance_token"], sample["token"], 1.0, in_agent_frame=False)
    assert future.shape == (2, 2)


@pytest.mark.slow
def test_the_devkit_passes_its_own_tests_on_a_town(mini, tmp_path):
    import nuscenes

    folder = Path(next(iter(nuscenes.__path__)))
    chosen = [folder / "map_expansion" / "tests", folder / "tests" / "test_nuscenes.py",
              folder / "prediction" / "input_representation" / "tests"]  # fmt: skip
    # It counts the records of nuScenes' own maps.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not test_layer_stats"]
    environment = os.environ | {"NUSCENES": str(mini), "MPLBACKEND": "agg"}
    done = subprocess.run(
        [*command, *map(str, chosen)], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    verified = subprocess.run(
        [sys.executable, "-m", "nuscenes.tests.assert_download", "--dataroot", str(mini), "--version", "v1.0-mini"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert verified.returncode == 0, verified.stderr[-3000:]


@pytest.mark.slow
def test_the_devkit_draws_a_town(mini):
    matplotlib.use("agg")
    nusc = NuScenes("v1.0-mini", str(mini), verbose=False)
    scene = nusc.scene[0]
    location = nusc.get("log", scene["log_token"])["location"]
    nusc_map = NuScenesMap(str(mini), location)
    # Its drawings of polygons need Shapely 1: descartes 1.1 fails on the polygons of Shapely 2.
    nusc_map.render_centerlines(resolution_meters=1.0, figsize=1, bitmap=BitMap(str(mini), location, "basemap"))
    x, y, _ = nusc.ego_pose[0]["translation"]
    assert set(nusc_map.get_next_roads(x, y)) == {"road_segment", "road_block", "lane"}
    nusc.render_egoposes_on_map(log_location=location)
    NuScenesCanBus(str(mini)).plot_baseline_route(scene["name"])
    matplotlib.pyplot.close("all")
