"""The generated dataset: images and LiDAR agree with the tables, read by the official devkit."""

from collections import Counter
from typing import ClassVar

import cv2
import numpy as np
import pytest
from nuscenes import NuScenes
from nuscenes.map_expansion.map_api import NuScenesMap
from nuscenes.utils.data_classes import LidarPointCloud
from nuscenes.utils.geometry_utils import points_in_box, transform_matrix
from PIL import Image
from pyquaternion import Quaternion
from scipy.spatial import ConvexHull, Delaunay
from shapely.geometry import box

from perception.errors import ConfigError
from perception.geometry import invert_rigid, project_points, transform_points
from perception.synthetic import render, simulate, tracing
from perception.synthetic.actors import actor_mesh
from perception.synthetic.district import Actor, Building, District, Light, Marking, Surface, Trajectory
from perception.synthetic.ground import Ground
from perception.synthetic.mesh import Material
from perception.synthetic.render import TownRenderer
from perception.synthetic.scene import scene_district, scene_renderer
from perception.synthetic.sensors import EIGHT_CAMERAS, FIVE_CAMERAS, SIX_CAMERAS, make_cameras, make_lidar
from perception.synthetic.tracing import embree_scene
from perception.synthetic.writer import VERSION

SEED, KEYFRAMES, IMAGE_SIZE = 11, 4, (128, 224)  # of the fixture town_root

KEYFRAME = 2


@pytest.fixture(scope="module")
def nusc(town_root) -> NuScenes:
    return NuScenes(VERSION, str(town_root), verbose=False)


@pytest.fixture(scope="module")
def rendered(nusc):
    """Renders one keyframe of scene 0 again: the district, the renderer, and the record and buffers of each camera."""
    district = scene_district(SEED, 0, KEYFRAMES)
    renderer, cameras, _ = scene_renderer(SEED, 0, district, IMAGE_SIZE)
    sample = scene_samples(nusc, 0)[KEYFRAME]
    pictures = {}
    for camera in cameras:
        record = nusc.get("sample_data", sample["data"][camera.name])
        seconds = 0.1 + 0.5 * KEYFRAME + (record["timestamp"] - sample["timestamp"]) * 1e-6
        pictures[camera.name] = record, renderer.camera(camera, seconds, np.random.default_rng(0))
    return district, renderer, pictures


def scene_samples(nusc, index: int) -> list[dict]:
    token, samples = nusc.scene[index]["first_sample_token"], []
    while token:
        samples.append(nusc.get("sample", token))
        token = samples[-1]["next"]
    return samples


def cam_from_global(nusc, record) -> tuple[np.ndarray, np.ndarray]:
    """Returns the devkit's transforms at the exposure of an image: cam_from_global [4, 4] and img_from_cam [3, 3]."""
    pose = nusc.get("ego_pose", record["ego_pose_token"])
    mount = nusc.get("calibrated_sensor", record["calibrated_sensor_token"])
    ego_from_global = transform_matrix(pose["translation"], Quaternion(pose["rotation"]), inverse=True)
    cam_from_ego = transform_matrix(mount["translation"], Quaternion(mount["rotation"]), inverse=True)
    return cam_from_ego @ ego_from_global, np.array(mount["camera_intrinsic"])


def annotated_actors(nusc, sample, district) -> dict[int, str]:
    """Finds the annotation token of each actor index by position and size."""
    found = {}
    for token in sample["anns"]:
        row = nusc.get("sample_annotation", token)
        for k, actor in enumerate(district.actors):
            xy, _ = actor.trajectory.at(0.1 + 0.5 * KEYFRAME)
            same_size = np.allclose(row["size"], [actor.size[1], actor.size[0], actor.size[2]])
            if same_size and np.linalg.norm(xy - row["translation"][:2]) < 1e-6:
                found[k] = token
    return found


class CountedScene:
    """An Embree scene that counts calls and rays per name of the set of meshes."""

    counts: ClassVar[Counter] = Counter()

    def __init__(self, vertices: np.ndarray, faces: np.ndarray) -> None:
        self._scene = embree_scene(vertices, faces)
        self._name = "moving" if faces.dtype == object else "static"

    def run(self, origins: np.ndarray, rays: np.ndarray, **options) -> object:
        self.counts[self._name, "calls"] += 1
        self.counts[self._name, "rays"] += len(rays)
        return self._scene.run(origins, rays, **options)


def test_few_rays_are_cast_in_large_batches_and_none_is_missing(monkeypatch):
    """Pictures are the same without the look-ups that spare rays, in other batches, and in any order of the images."""
    monkeypatch.setattr(tracing, "embree_scene", CountedScene)
    district = scene_district(SEED, 1, KEYFRAMES)
    renderer, cameras, _ = scene_renderer(SEED, 1, district, IMAGE_SIZE)
    times = [0.4 + 0.1 * c for c in range(len(cameras))]
    CountedScene.counts.clear()
    pictures = [renderer.camera(c, t, np.random.default_rng(0)) for c, t in zip(cameras, times, strict=True)]
    counts, pixels = CountedScene.counts.copy(), len(cameras) * IMAGE_SIZE[0] * IMAGE_SIZE[1]
    assert any((p.actor[..., None] == renderer._moving).any() for p in pictures)  # moving actors are seen
    bands = len(cameras) * -(-pixels // len(cameras) // render._BAND)
    assert sum(counts[name, "calls"] for name in ("static", "moving")) <= 6 * (bands + len(cameras))
    assert pixels <= counts["static", "rays"] < 1.9 * pixels and counts["moving", "rays"] < 0.6 * pixels

    monkeypatch.setattr(render, "_BAND", 1500)
    monkeypatch.setattr(TownRenderer, "_needed", lambda self, *_: np.arange(len(self._moving)))
    monkeypatch.setattr(TownRenderer, "_crowded", lambda self, view, *_: np.ones_like(view.angles, bool))
    monkeypatch.setattr(tracing._ShadowMap, "covers", lambda self, points: np.ones(points.shape[1], bool))
    for picture, camera, time_s in list(zip(pictures, cameras, times, strict=True))[::-1]:
        again = renderer.camera(camera, time_s, np.random.default_rng(0))
        for one, two in zip(picture, again, strict=True):
            np.testing.assert_array_equal(one, two)
    assert CountedScene.counts["moving", "rays"] - counts["moving", "rays"] > pixels


def test_an_image_has_shadows_of_actors_outside_it(monkeypatch):
    renderer, cameras, _ = scene_renderer(13, 2, scene_district(13, 2, KEYFRAMES), IMAGE_SIZE)
    camera, time_s = cameras[2], 0.6  # the shadow of an actor outside the image falls into it
    found = renderer.camera(camera, time_s, np.random.default_rng(0))
    assert len(renderer._placed) < len(renderer._moving)
    needed = {
        "all": lambda self, *_: np.arange(len(self._moving)),
        "seen": lambda self, *_: np.flatnonzero(np.isin(self._moving, found.actor)),
    }
    rgb = {}
    for name, function in needed.items():
        monkeypatch.setattr(TownRenderer, "_needed", function)
        rgb[name] = renderer.camera(camera, time_s, np.random.default_rng(0)).rgb
    np.testing.assert_array_equal(found.rgb, rgb["all"])
    assert (found.rgb != rgb["seen"]).sum() > 500


@pytest.mark.slow
def test_rare_classes_become_frequent():
    def count(rare):
        actors = [a for i in range(4) for a in scene_district(5, i, keyframes=4, rare=rare).actors]
        return {name: sum(a.category == name for a in actors) for name in {a.category for a in actors}}

    usual, more = count(0.0), count(1.0)
    for name in ("vehicle.truck", "vehicle.bus.rigid", "vehicle.trailer", "vehicle.bicycle"):
        assert more[name] > 1.5 * usual.get(name, 0), name
    assert more["vehicle.car"] < usual["vehicle.car"]
    with pytest.raises(ConfigError, match=r"rare is 1\.5; give a number from 0 to 1"):
        scene_district(5, 0, keyframes=4, rare=1.5)


def test_keyframes_at_another_rate(tmp_path):
    """At 10 Hz consecutive keyframes are 0.1 s apart, and velocities are still in metres per second."""
    simulate(tmp_path / "fast", seed=3, scenes=1, keyframes=4, rate=10, workers=1, image_size=(32, 56))
    nusc = NuScenes(VERSION, str(tmp_path / "fast"), verbose=False)
    samples = scene_samples(nusc, 0)
    assert np.allclose(np.diff([sample["timestamp"] for sample in samples]), 1e5)
    times = [nusc.get("sample_data", sample["data"]["CAM_BACK"])["timestamp"] for sample in samples]
    assert np.allclose(np.diff(times), 1e5)
    speeds = [np.linalg.norm(nusc.box_velocity(token)[:2]) for token in samples[1]["anns"]]
    district = scene_district(3, 0, keyframes=4, rate=10)
    assert 2 < max(speeds) < 25 and district.actors
    with pytest.raises(ConfigError, match="rate is 3; use one of 1, 2, 5"):
        simulate(tmp_path / "odd", seed=3, scenes=1, rate=3)
    with pytest.raises(ConfigError, match="nothing between keyframes at 10 Hz"):
        simulate(tmp_path / "odd", seed=3, scenes=1, rate=10, sweeps=True)


def test_devkit_reads_tables_and_maps(nusc, town_root):
    assert (len(nusc.category), len(nusc.attribute), len(nusc.visibility), len(nusc.sensor)) == (23, 8, 4, 7)
    assert len(nusc.scene) == 2 and len(nusc.sample) == 2 * KEYFRAMES
    assert len(nusc.sample_data) == 2 * KEYFRAMES * 7
    district = scene_district(SEED, 1, KEYFRAMES)
    samples = scene_samples(nusc, 1)
    assert len(samples) == KEYFRAMES
    speeds = 0
    for k, sample in enumerate(samples):
        assert len(sample["data"]) == 7
        boxes = nusc.get_boxes(sample["data"]["LIDAR_TOP"])
        assert len(boxes) == len(sample["anns"]) > 5
        for camera in ("CAM_FRONT", "CAM_BACK_LEFT"):
            path, _, _ = nusc.get_sample_data(sample["data"][camera])
            assert Image.open(path).size == IMAGE_SIZE[::-1]
        for token in sample["anns"]:
            row = nusc.get("sample_annotation", token)
            for side in ("prev", "next"):
                if row[side]:
                    there = nusc.get("sample_annotation", row[side])
                    assert there["instance_token"] == row["instance_token"]
                    assert abs(there["translation"][0] - row["translation"][0]) < 15
            velocity = nusc.box_velocity(token)[:2]
            near = [a for a in district.actors if (a.size[0] == row["size"][1] and a.size[2] == row["size"][2])]
            gt = [a.trajectory.velocity(0.1 + 0.5 * k, 0.5) for a in near]
            if 0 < k < KEYFRAMES - 1 and row["prev"] and row["next"]:
                assert min(np.linalg.norm(velocity - v) for v in gt) < 0.02
                speeds += np.linalg.norm(velocity) > 1
    assert speeds > 0
    for log in nusc.log:
        town = NuScenesMap(str(town_root), log["location"])
        assert town.lane_divider or town.road_divider


def test_stored_images_equal_rendered_ones(nusc, rendered, town_root):
    for record, picture in rendered[2].values():
        stored = np.asarray(Image.open(town_root / record["filename"]), dtype=np.float32)
        # They differ by sensor noise and JPEG compression.
        assert np.abs(stored - picture.rgb).mean() < 7


def test_actors_lie_in_their_projected_boxes(nusc, rendered):
    district, _, pictures = rendered
    sample = scene_samples(nusc, 0)[KEYFRAME]
    tokens = annotated_actors(nusc, sample, district)
    checked, filled = 0, 0
    for record, picture in pictures.values():
        cam, img_from_cam = cam_from_global(nusc, record)
        delay = abs(record["timestamp"] - sample["timestamp"]) * 1e-6
        for k, token in tokens.items():
            v, u = np.nonzero(picture.actor == k)
            corners = transform_points(cam, nusc.get_box(token).corners().T)  # [8, 3]
            # The box is at the actor's position at the keyframe; the image was exposed slightly earlier.
            moved = np.linalg.norm(district.actors[k].trajectory.velocity(1.1)) * delay + 0.03
            if len(u):
                depth = picture.depth[v, u]
                assert corners[:, 2].min() - moved <= depth.min()
                assert depth.max() <= corners[:, 2].max() + moved
            if corners[:, 2].min() < 1.0:
                continue
            uv, _ = project_points(img_from_cam, corners)
            slack = 1 + moved * img_from_cam[0, 0] / corners[:, 2].min()
            center = uv.mean(0)
            hull = uv[ConvexHull(uv).vertices]
            outward = hull - center
            wider = center + outward * (1 + 1.5 * slack / np.linalg.norm(outward, axis=1, keepdims=True))
            pixels = np.stack([u, v], -1) + 0.5
            if len(u):
                assert (Delaunay(wider).find_simplex(pixels) >= 0).all()
                checked += 1
            inside = (hull > 0).all() and (hull < np.array(IMAGE_SIZE[::-1])).all()
            area = ConvexHull(uv).volume
            if inside and area > 60 and nusc.get("sample_annotation", token)["visibility_token"] == "4":
                assert len(u) > 0.12 * area  # a bicycle fills its box least
                filled += 1
    assert checked >= 8 and filled >= 3


def test_depth_of_the_ground_is_that_of_the_plane(nusc, rendered):
    for record, picture in rendered[2].values():
        cam, img_from_cam = cam_from_global(nusc, record)
        flat = (picture.material > Material.SKY) & (picture.material <= Material.MARKING)
        v, u = np.nonzero(flat)
        homogeneous = np.stack([u + 0.5, v + 0.5, np.ones(len(u))], -1) @ np.linalg.inv(img_from_cam).T
        points = transform_points(invert_rigid(cam), homogeneous * picture.depth[flat][:, None])
        near = picture.depth[flat] < 60
        assert near.sum() > 500
        assert np.abs(points[near, 2]).max() < 0.01


def test_map_dividers_and_crossings_lie_on_paint(nusc, rendered, town_root):
    district, _, pictures = rendered
    town = NuScenesMap(str(town_root), district.location)
    lines = [town.extract_line(r["line_token"]) for r in (*town.lane_divider, *town.road_divider)]
    crossings = [town.extract_polygon(r["polygon_token"]) for r in town.ped_crossing]
    on_line, off_line = [], []
    for line in lines:
        if line.length < 1:
            continue
        for arc in np.arange(0.3, line.length - 0.3, 0.1):
            a, b, c = (np.array(line.interpolate(arc + d).coords[0])[:2] for d in (0, -0.2, 0.2))
            across = np.array([b[1] - c[1], c[0] - b[0]]) / max(np.linalg.norm(c - b), 1e-9)
            on_line.append(a)
            off_line += [a + 0.7 * across, a - 0.7 * across]

    def painted(points_xy: np.ndarray, reach: float) -> np.ndarray:
        """Returns whether each point that a camera sees unoccluded within `reach` metres shows paint."""
        shown = []
        for record, picture in pictures.values():
            cam, img_from_cam = cam_from_global(nusc, record)
            points = transform_points(cam, np.insert(points_xy, 2, 0.0, axis=1))
            uv, depth = project_points(img_from_cam, points)
            fits = (depth > 1) & (depth < reach) & (uv > 0).all(1) & (uv < np.array(IMAGE_SIZE[::-1])).all(1)
            column, row = uv[fits].astype(int).T
            open_view = np.abs(picture.depth[row, column] / depth[fits] - 1) < 0.05
            shown.append(picture.material[row, column][open_view] == Material.MARKING)
        return np.concatenate(shown)

    hit, miss = painted(np.array(on_line), 14), painted(np.array(off_line), 14)
    assert len(hit) > 40
    assert hit.mean() > 0.3  # dashed lines are paint on less than half of their length
    assert miss.mean() < 0.25 * hit.mean()
    inside = [
        p
        for crossing in crossings
        for p in np.stack(
            np.meshgrid(*(np.arange(crossing.bounds[i], crossing.bounds[i + 2], 0.3) for i in (0, 1))), -1
        )
        .reshape(-1, 2)
        .tolist()
        if crossing.buffer(-0.3).contains(box(p[0] - 0.01, p[1] - 0.01, p[0] + 0.01, p[1] + 0.01))
    ]
    zebra = painted(np.array(inside), 40)
    assert len(zebra) > 50
    assert 0.25 < zebra.mean() < 0.75


def test_lidar_counts_agree_with_the_devkit(nusc):
    compared = []
    for index in range(2):
        for sample in scene_samples(nusc, index):
            path, boxes, _ = nusc.get_sample_data(sample["data"]["LIDAR_TOP"])
            cloud = LidarPointCloud.from_file(path)
            record = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
            lidar_from_global, _ = cam_from_global(nusc, record)
            height = transform_points(invert_rigid(lidar_from_global), cloud.points[:3].T)[:, 2]
            high = cloud.points[:3, height > 0.06]  # without the road surface under a car
            for item in boxes:
                count = nusc.get("sample_annotation", item.token)["num_lidar_pts"]
                most = points_in_box(item, cloud.points[:3], 1.03).sum()
                least = points_in_box(item, high, 0.97).sum()
                assert least - 3 <= count <= most + 3
                compared.append(count)
    assert sum(c > 10 for c in compared) > 20
    sweep = np.fromfile(path, np.float32).reshape(-1, 5)
    assert set(np.unique(sweep[:, 4])) <= set(range(32)) and (sweep[:, 3] >= 0).all()
    assert 15_000 < len(sweep) < 32 * 1080


def stationary(x: float, y: float, yaw: float = 0.0) -> Trajectory:
    return Trajectory(np.zeros(1), np.array([[x, y]]), np.array([yaw]))


def small_world(actors, buildings=(), markings=()) -> District:
    surfaces = [Surface(box(-60, -60, 60, 60), "asphalt")]
    sun = np.array([0.0, 0.6, 0.8])
    light = Light(sun, (1.0, 1.0, 1.0), (0.5, 0.6, 0.9), 0.3, 0.0, 1.0)
    fixed = dict(seed=0, location="boston-seaport", name="small", layers={}, intersections=(), surfaces=surfaces)
    objects = dict(kerbs=[], buildings=list(buildings), trees=[], poles=[], actors=actors, ego=stationary(0, 0))
    return District(**fixed, markings=list(markings), **objects, light=light, duration=1.0)


def test_visibility_and_lidar_of_occluded_actors():
    size = (4.4, 1.9, 1.6)
    actors = [Actor(f"car{i}", "vehicle.car", size, (0.8, 0.1, 0.1), stationary(x, y)) for i, (x, y) in enumerate(
        [(15.0, 8.0), (20.0, -8.0), (25.0, 0.0), (200.0, 0.0)]
    )]  # fmt: skip
    # One wall occludes the second car completely, another the right half of the third.
    walls = [np.array([[12, -9], [13, -9], [13, -2], [12, -2]]), np.array([[14, -1.6], [15, -1.6], [15, 0], [14, 0]])]
    buildings = [Building(wall.astype(float), 4.0, (0.5, 0.5, 0.5), 1) for wall in walls]
    renderer = TownRenderer(small_world(actors, buildings), np.random.default_rng(0))
    cameras = make_cameras(np.random.default_rng(1), (128, 224))
    free, hidden, half, far = renderer.visibility(cameras, 0.0)
    assert free == 1 and hidden == 0 and 0.35 < half < 0.65 and far == 0
    sweep = renderer.lidar(make_lidar(np.random.default_rng(2)), 0.0, np.random.default_rng(3))
    hits = np.bincount(sweep.actor + 1, minlength=5)[1:]
    assert hits[0] > 50 and hits[1] == 0 and 5 < hits[2] < hits[0] and hits[3] == 0


def test_shadows_fall_away_from_the_sun():
    tower = Building(np.array([[8.0, -1], [10, -1], [10, 1], [8, 1]]), 8.0, (0.5, 0.5, 0.5), 1)
    renderer = TownRenderer(small_world([], [tower]), np.random.default_rng(0))
    camera = make_cameras(np.random.default_rng(1), (128, 224))[0]
    picture = renderer.camera(camera, 0.0, np.random.default_rng(0))
    cam_from_ego = invert_rigid(camera.ego_from_cam)

    def brightness(x, y):
        uv, _ = project_points(camera.img_from_cam, transform_points(cam_from_ego, np.array([[x, y, 0.0]])))
        column, row = uv[0].astype(int)
        return picture.rgb[row - 2 : row + 3, column - 2 : column + 3].mean()

    # The sun is on the left (+y), 53 degrees high: the shadow reaches 6 m to the right of the tower.
    assert brightness(9, -3.5) < 0.75 * brightness(9, 3.5)


@pytest.mark.parametrize("rider", [False, True])
@pytest.mark.parametrize(
    ("category", "size"),
    [
        ("vehicle.car", (4.5, 1.9, 1.6)), ("vehicle.truck", (8.0, 2.5, 3.3)), ("vehicle.truck", (5.5, 2.0, 2.1)),
        ("vehicle.trailer", (10.0, 2.5, 3.6)), ("vehicle.bus.rigid", (11.0, 2.7, 3.2)),
        ("vehicle.construction", (6.0, 2.6, 3.0)), ("vehicle.bicycle", (1.75, 0.6, 1.6)),
        ("vehicle.motorcycle", (2.1, 0.8, 1.5)), ("human.pedestrian.adult", (0.7, 0.65, 1.75)),
        ("movable_object.trafficcone", (0.4, 0.4, 0.8)), ("movable_object.barrier", (0.5, 2.0, 1.0)),
    ],
)  # fmt: skip
def test_meshes_fill_their_boxes(category, size, rider):
    mesh = actor_mesh(Actor("a", category, size, (0.2, 0.4, 0.6), stationary(0, 0), rider), 7)
    half = np.array(size) / 2
    assert np.allclose(mesh.vertices.min(0), [-half[0], -half[1], 0], atol=1e-5)
    assert np.allclose(mesh.vertices.max(0), [half[0], half[1], size[2]], atol=1e-5)
    assert (mesh.owners == 7).all() and mesh.faces.max() < len(mesh.vertices)
    if category.startswith("vehicle"):  # red lamps at the back, white ones at the front
        middle = mesh.vertices[mesh.faces].mean(1)[:, 0]
        lamps = mesh.materials == Material.LAMP
        red = lamps & (mesh.colors[:, 1] < 0.2)
        assert middle[red].max() < -0.25 * size[0] and red.any()
        white = lamps & (mesh.colors.min(1) > 0.5)
        assert not white.any() or middle[white].min() > 0.25 * size[0]


def test_rays_go_through_pixel_centres():
    for camera in make_cameras(np.random.default_rng(5), (9, 16)):
        rays = camera.rays().astype(np.float64)
        uv, depth = project_points(camera.img_from_cam, rays.reshape(-1, 3))
        v, u = np.mgrid[:9, :16] + 0.5
        assert np.allclose(uv, np.stack([u.ravel(), v.ravel()], -1), atol=1e-4) and (depth > 0).all()
    lidar = make_lidar(np.random.default_rng(5))
    forward = lidar.ego_from_lidar[:3, :3] @ [0.0, 1.0, 0.0]
    assert forward[0] > 0.999  # y of the LiDAR points forward


def test_far_ground_has_the_mean_colour():
    """Half of the road is white bars of 0.2 m: without aliasing, the road is gray from far away."""
    markings = [Marking(box(x, -5, x + 0.2, 5), "white") for x in np.arange(-10, 10, 0.4)]
    ground = Ground(small_world([], markings=markings), np.zeros((1, 2)), np.random.default_rng(0), margin=20.0)
    x, y = (np.array([-2.8, 1.2, 4.0], np.float32) - np.float32(low) for low in ground.low)
    y = np.zeros_like(y) - np.float32(ground.low[1])

    def colors(x, footprint):
        return ground.colors(x, y, np.full_like(x, footprint), np.zeros_like(x), np.zeros_like(x), 1) * 255  # [3, R]

    near = [colors(x + np.float32(shift), 0.01) for shift in np.arange(0, 0.4, 0.05)]
    assert np.ptp(np.array(near), axis=0).min() > 60
    assert np.abs(colors(x, 1.6) - np.mean(near, 0)).max() < 20
    assert (ground.materials(x + np.float32(0.1), y) == Material.MARKING).all()
    assert (ground.materials(x + np.float32(0.3), y) == Material.ASPHALT).all()


@pytest.mark.slow
def test_another_rig(tmp_path):
    """The devkit reads rigs other than nuScenes' with the right number, directions and focal lengths of cameras."""
    for name, rig, count in (("five", FIVE_CAMERAS, 5), ("eight", EIGHT_CAMERAS, 8)):
        simulate(tmp_path / name, scenes=1, seed=3, keyframes=1, image_size=(32, 56), workers=1, sweeps=True, rig=rig)
        nusc = NuScenes(VERSION, str(tmp_path / name), verbose=False)
        data = scene_samples(nusc, 0)[0]["data"]
        assert set(data) == {*(camera.name for camera in rig), "LIDAR_TOP"} and len(rig) == count
        for camera in rig:
            record = nusc.get("sample_data", data[camera.name])
            mount = nusc.get("calibrated_sensor", record["calibrated_sensor_token"])
            assert mount["camera_intrinsic"][0][0] == pytest.approx(56 * camera.focal, rel=0.031)
            view = Quaternion(mount["rotation"]).rotation_matrix[:, 2]
            off = np.degrees(np.arctan2(view[1], view[0])) - camera.yaw_deg
            assert abs((off + 180) % 360 - 180) < 1.6
            assert np.linalg.norm(np.array(mount["translation"]) - camera.position) < 0.07
            assert np.asarray(Image.open(tmp_path / name / record["filename"])).std() > 5


@pytest.mark.slow
def test_a_longer_focal_length_magnifies_the_centre():
    """The enlarged centre of a wide-angle image equals the narrow image from the same position."""
    district = scene_district(SEED, 0, KEYFRAMES)
    wide, narrow = (SIX_CAMERAS[0]._replace(focal=focal) for focal in (0.6, 1.2))
    images = []
    for mounting in (wide, narrow):
        renderer, cameras, _ = scene_renderer(SEED, 0, district, (96, 160), [mounting])
        images.append(renderer.camera(cameras[0], 0.1, np.random.default_rng(0)).rgb.astype(np.float32).mean(-1))
        center = cameras[0].img_from_cam[:2, 2]
    left, top = center[0] / 2, center[1] / 2  # corner of the narrow image in the wide one
    matrix = np.array([[2, 0, -2 * left], [0, 2, -2 * top]])
    enlarged = cv2.warpAffine(images[0], matrix, (160, 96))
    assert np.corrcoef(enlarged[8:-8, 8:-8].ravel(), images[1][8:-8, 8:-8].ravel())[0, 1] > 0.9
