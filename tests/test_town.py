"""The synthetic town: geometry against closed forms and shapely, traffic against its rules, the map file against the
devkit that reads it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
import shapely
from shapely.geometry import LineString, Point, Polygon, box
from shapely.ops import unary_union

from perception.errors import ConfigError
from perception.synthetic.map_expansion import write_map_expansion
from perception.synthetic.network import make_network
from perception.synthetic.roads import Road
from perception.synthetic.town import LOCATIONS, Actor, Trajectory, make_district
from perception.synthetic.traffic import EGO_BACK, EGO_FRONT, EGO_WIDTH

SEEDS = range(10)
DURATION = 5.0

DETECTION_CLASS = {
    "vehicle.car": "car", "vehicle.truck": "truck", "vehicle.trailer": "trailer", "vehicle.bus.rigid": "bus",
    "vehicle.construction": "construction_vehicle", "vehicle.bicycle": "bicycle", "vehicle.motorcycle": "motorcycle",
    "human.pedestrian.adult": "pedestrian", "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian", "movable_object.trafficcone": "traffic_cone",
    "movable_object.barrier": "barrier",
}  # fmt: skip


@pytest.fixture(scope="module")
def districts():
    return [make_district(seed, (1000.0 + 260 * seed, 900.0), LOCATIONS[seed % 4], DURATION) for seed in SEEDS]


def fingerprint(district) -> str:
    parts = [g.wkb for name in sorted(district.layers) for g in district.layers[name]]
    parts += [s.polygon.wkb for s in district.surfaces] + [m.polygon.wkb for m in district.markings]
    parts += [np.concatenate([a.trajectory.xy.ravel(), a.trajectory.yaw, a.size, a.color]) for a in district.actors]
    parts += [b.footprint for b in district.buildings] + [t.xy for t in district.trees] + [district.ego.xy]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


def rectangle(xy, yaw, length, width) -> Polygon:
    turned = shapely.affinity.rotate(box(-length / 2, -width / 2, length / 2, width / 2), yaw, (0, 0), use_radians=True)
    return shapely.affinity.translate(turned, *xy)


def moving_box(actor: Actor, t: float) -> Polygon:
    xy, yaw = actor.trajectory.at(t)
    return rectangle(xy, yaw, actor.size[0], actor.size[1])


def test_same_seed_same_district_and_other_seed_another(districts):
    again = make_district(3, (1000.0 + 260 * 3, 900.0), LOCATIONS[3], DURATION)
    assert fingerprint(again) == fingerprint(districts[3])
    assert fingerprint(make_district(4, (1000.0 + 260 * 3, 900.0), LOCATIONS[3], DURATION)) != fingerprint(again)


def test_origin_moves_everything_by_a_shift(districts):
    there, here = districts[3], make_district(3, (500.0, 700.0), LOCATIONS[3], DURATION)
    shift = np.array([1000.0 + 260 * 3 - 500.0, 200.0])
    np.testing.assert_allclose(there.ego.xy - here.ego.xy, np.broadcast_to(shift, here.ego.xy.shape), atol=2e-4)
    moved = shapely.affinity.translate(unary_union(here.layers["lane"]), *shift)
    assert moved.symmetric_difference(unary_union(there.layers["lane"])).area < 0.5


def test_road_strip_has_the_area_of_a_ring_sector():
    angle = np.linspace(0, np.pi / 2, 400)
    circle = 80 * np.stack([np.sin(angle), 1 - np.cos(angle)], axis=1)  # turns left, centre (0, 80)
    road = Road(circle, forward=2, backward=1, lane_width=3.5, gap=2.0, parking=(2.5, 0.0))
    assert (road.right, road.left) == (-10.5, 4.5)
    assert road.lane_center(1, 1) == pytest.approx(-1 - 1.5 * 3.5)
    area = road.strip(0, road.length, road.right, road.left).area
    assert area == pytest.approx(np.pi / 4 * (90.5**2 - 75.5**2), rel=1e-3)
    assert road.heading(road.length / 2) == pytest.approx(np.pi / 4, abs=1e-3)


def test_road_segments_and_lanes_make_one_clean_surface(districts):
    for district in districts:
        segments, lanes = district.layers["road_segment"], district.layers["lane"]
        assert all(polygon.is_valid for polygon in segments + lanes)
        surface = unary_union(segments + lanes)
        assert surface.geom_type == "Polygon" and surface.is_valid
        # Segments cover the road without overlaps and cracks; every hole is an island of some size.
        assert sum(polygon.area for polygon in segments) == pytest.approx(surface.area, rel=1e-6)
        assert all(Polygon(ring).area > 2 for ring in surface.interiors)
        assert len(surface.interiors) == sum(len(polygon.interiors) for polygon in segments)
        # Lanes do not overlap each other and lie within the road segments.
        assert sum(lane.area for lane in lanes) == pytest.approx(unary_union(lanes).area, rel=1e-3)
        assert surface.area - unary_union(segments).area < 1e-6
        assert len(district.intersections) == len(segments)
        asphalt = unary_union([s.polygon for s in district.surfaces if s.material == "asphalt"])
        assert surface.difference(asphalt.buffer(1e-3)).area < 1e-6


def test_network_area_is_that_of_its_strips_plus_corners():
    tile = box(-125, -125, 125, 125)
    for seed in range(4):
        network = make_network(np.random.default_rng(seed), tile, tile.buffer(40, join_style="mitre"))
        strips = unary_union([road.strip(0, road.length, road.right, road.left) for road in network.roads])
        expected = strips.intersection(tile).difference(unary_union(network.islands))
        surplus = network.surface.intersection(tile).difference(expected)
        assert expected.difference(network.surface.buffer(0.01)).area < 0.1
        # Rounded corners (at most (1 - pi/4) 9^2 m2 each at a right angle, 2.5 times that at 70 degrees) and bus bays.
        assert surplus.area < len(network.junctions) * 4 * 45 + 130 * 6


def test_every_divider_is_painted_and_none_crosses_a_junction(districts):
    for district in districts:
        paint = unary_union([m.polygon for m in district.markings]).buffer(1e-3)
        junctions = unary_union(
            [p for p, flag in zip(district.layers["road_segment"], district.intersections, strict=True) if flag]
        )
        for name in ("road_divider", "lane_divider"):
            for line in district.layers[name]:
                assert isinstance(line, LineString)
                share = line.intersection(paint).length / line.length
                assert share > 0.3, (district.seed, name, share)  # 3 m of paint, at most 6 m of pause
                gaps = line.difference(paint)
                assert max((g.length for g in getattr(gaps, "geoms", [gaps])), default=0) < 6.2
                assert line.intersection(junctions).length < 0.05


def test_crossings_are_zebras_from_kerb_to_kerb(districts):
    count = 0
    for district in districts:
        white = unary_union([m.polygon for m in district.markings if m.color == "white"])
        kerbs = unary_union([LineString(k.line) for k in district.kerbs])
        for crossing in district.layers["ped_crossing"]:
            assert 0.35 < crossing.intersection(white).area / crossing.area < 0.65
            if Point(crossing.centroid).distance(Point(1000 + 260 * district.seed, 900)) < 100:
                count += 1
                ends = sorted(kerbs.distance(Point(p)) for p in crossing.exterior.coords[:-1])
                assert ends[3] < 0.02  # four corners at kerbs
    assert count > 10


def test_road_outline_has_a_kerb_with_another_ground_behind(districts):
    for district in districts[:5]:
        x, y = 1000 + 260 * district.seed, 900
        inner = box(x - 120, y - 120, x + 120, y + 120)
        outline = unary_union(district.layers["road_segment"] + district.layers["lane"]).boundary.intersection(inner)
        kerbs = unary_union([LineString(k.line) for k in district.kerbs])
        assert outline.difference(kerbs.buffer(0.02)).length < 0.1
        behind = unary_union(
            [s.polygon for s in district.surfaces if s.material in ("walkway", "grass", "concrete")][1:]
        )
        asphalt = unary_union([s.polygon for s in district.surfaces if s.material == "asphalt"])
        sides = outline.buffer(0.5).difference(asphalt)
        assert sides.difference(behind.buffer(1e-3)).area < 0.02 * sides.area


def test_no_objects_collide_at_any_time(districts):
    for district in districts:
        for t in np.linspace(0, DURATION, 11):
            xy, yaw = district.ego.at(t)
            middle = xy + (EGO_FRONT - EGO_BACK) / 2 * np.array([np.cos(yaw), np.sin(yaw)])
            shapes = [rectangle(middle, yaw, EGO_FRONT + EGO_BACK, EGO_WIDTH)]
            shapes += [moving_box(actor, t) for actor in district.actors]
            first, second = shapely.STRtree(shapes).query(shapes, predicate="intersects")
            assert (first == second).all(), (district.seed, t)
            solid = [Polygon(b.footprint) for b in district.buildings]
            solid += [Point(tree.xy).buffer(tree.trunk_radius) for tree in district.trees]
            solid += [Point(pole.xy).buffer(pole.radius) for pole in district.poles]
            hit = shapely.STRtree(solid).query(shapes, predicate="intersects")
            assert hit.size == 0, (district.seed, t)


def test_velocity_is_the_slope_of_position(districts):
    line = Trajectory(np.array([0.0, 1.0, 3.0]), np.array([[0.0, 0], [2, 0], [2, 6]]), np.array([0.0, 0, np.pi / 2]))
    np.testing.assert_allclose(line.velocity(0.5), [2, 0], atol=1e-9)
    np.testing.assert_allclose(line.velocity(2.0), [0, 3], atol=1e-9)
    assert line.at(2.0)[1] == pytest.approx(np.pi / 4)
    for district in districts:
        for actor in district.actors:
            for t in (0.55, 2.25):
                slope = (actor.trajectory.at(t + 0.02)[0] - actor.trajectory.at(t - 0.02)[0]) / 0.04
                np.testing.assert_allclose(actor.trajectory.velocity(t), slope, atol=0.5)
                speed = np.linalg.norm(slope)
                assert speed < 14
                if speed > 1 and "pedestrian" not in actor.category:  # vehicles drive along their heading
                    heading = actor.trajectory.at(t)[1]
                    assert slope @ [np.cos(heading), np.sin(heading)] > 0.95 * speed


def test_attributes_follow_motion(districts):
    counts: Counter = Counter()
    for district in districts:
        for actor in district.actors:
            t = 2.0
            speed, attribute = np.linalg.norm(actor.trajectory.velocity(t)), actor.attribute(t)
            counts[attribute] += 1
            if attribute.endswith(".moving"):
                assert speed > 0.2
            elif attribute in ("vehicle.parked", "vehicle.stopped", "pedestrian.standing", "cycle.without_rider"):
                assert speed <= 0.2
            elif attribute == "":
                assert actor.category.startswith("movable_object") and actor.trajectory.static
    assert {"vehicle.moving", "vehicle.stopped", "vehicle.parked", "pedestrian.moving", "pedestrian.standing",
            "cycle.with_rider", "cycle.without_rider", ""} == set(counts)  # fmt: skip


def test_all_ten_classes_are_common(districts):
    present = Counter(name for d in districts for name in {DETECTION_CLASS[a.category] for a in d.actors})
    assert len(present) == 10 and min(present.values()) >= len(districts) / 2, present
    for district in districts:
        assert 20 <= len(district.actors) <= 90
        assert len({a.name for a in district.actors}) == len(district.actors)
        path = shapely.MultiPoint(district.ego.xy)
        assert all(min(path.distance(Point(p)) for p in a.trajectory.xy[::5]) < 60 for a in district.actors)


def test_ego_stays_on_the_road_on_its_side_and_drives_smoothly(districts):
    speeds = []
    for district in districts:
        ego = district.ego
        assert ego.times[0] == 0 and ego.times[-1] >= DURATION + 1 - 1e-9
        road = unary_union(district.layers["drivable_area"])
        assert all(road.contains(Point(p).buffer(0.9)) for p in ego.xy[::5])
        origin = np.array([1000 + 260 * district.seed, 900])
        assert abs(ego.xy - origin).max() < 90
        velocity = np.diff(ego.xy, axis=0) / np.diff(ego.times)[:, None]
        speed = np.linalg.norm(velocity, axis=1)
        speeds.append(speed.max())
        assert speed.max() < 13 and abs(np.diff(speed)).max() / 0.1 < 5
        assert abs(np.diff(ego.yaw)).max() / 0.1 < 1.0
        fast = speed > 0.5
        heading = np.stack([np.cos(ego.yaw), np.sin(ego.yaw)], axis=1)[:-1]
        assert ((heading * velocity).sum(1)[fast] > 0.98 * speed[fast]).all()
        # In the lane's middle: a lane's border is at least 1.3 m away wherever a lane is.
        for p in ego.xy[::5]:
            lanes = [lane for lane in district.layers["lane"] if lane.contains(Point(p))]
            assert not lanes or lanes[0].exterior.distance(Point(p)) > 1.3 or _near_lane_end(lanes[0], p)
    assert np.median(speeds) > 4


def _near_lane_end(lane: Polygon, p) -> bool:
    corners = np.asarray(lane.minimum_rotated_rectangle.exterior.coords)[:-1]
    edges = [LineString([corners[i], corners[(i + 1) % 4]]) for i in range(4)]
    short = sorted(edges, key=lambda edge: edge.length)[:2]
    return min(edge.distance(Point(p)) for edge in short) < 3


def test_traffic_keeps_left_in_singapore_only(districts):
    for district in districts:
        lines = [line for line in district.layers["road_divider"]]
        xy, yaw = district.ego.at(0.0)
        left = np.array([-np.sin(yaw), np.cos(yaw)])
        near = [line for line in lines if line.distance(Point(xy)) < 6]
        for line in near:
            foot = np.array(line.interpolate(line.project(Point(xy))).coords[0])
            if 0.02 < line.project(Point(xy)) / line.length < 0.98:
                side = (foot - xy) @ left
                assert (side > 0) == (district.location == "boston-seaport")


def test_devkit_reads_the_map_and_returns_the_same_geometry(tmp_path, districts):
    map_api = pytest.importorskip("nuscenes.map_expansion.map_api")
    mine = [d for d in districts if d.location == "boston-seaport"]
    path = tmp_path / "maps" / "expansion" / "boston-seaport.json"
    write_map_expansion(mine, path)
    first = path.read_bytes()
    write_map_expansion(mine, path)
    assert path.read_bytes() == first and [p.name for p in path.parent.iterdir()] == [path.name]
    nusc_map = map_api.NuScenesMap(str(tmp_path), "boston-seaport")
    for name in ("road_segment", "lane", "ped_crossing", "walkway", "stop_line", "carpark_area"):
        polygons = [nusc_map.extract_polygon(record["polygon_token"]) for record in getattr(nusc_map, name)]
        gt = [polygon for d in mine for polygon in d.layers[name]]
        assert len(polygons) == len(gt) and all(a.equals_exact(b, 0) for a, b in zip(polygons, gt, strict=True))
    for name in ("road_divider", "lane_divider"):
        lines = [nusc_map.extract_line(record["line_token"]) for record in getattr(nusc_map, name)]
        gt = [line for d in mine for line in d.layers[name]]
        assert len(lines) == len(gt) and all(a.equals_exact(b, 0) for a, b in zip(lines, gt, strict=True))
    assert any(record["holes"] for record in nusc_map.road_segment) == any(
        polygon.interiors for d in mine for polygon in d.layers["road_segment"]
    )
    for district in mine:
        x, y = district.ego.at(1.0)[0]
        patch = box(x - 30, y - 30, x + 30, y + 30)
        for name in ("drivable_area", "lane_divider", "ped_crossing", "walkway"):
            ((_, geometries),) = nusc_map.get_map_geom((x, y, 60, 60), 0.0, [name])
            got = shapely.affinity.translate(unary_union(geometries), x, y)
            expected = unary_union(district.layers[name]).intersection(patch)
            size = (lambda g: g.length) if name == "lane_divider" else (lambda g: g.area)
            assert size(got) == pytest.approx(size(expected), abs=1e-3)
            assert got.difference(expected.buffer(1e-3)).is_empty
        assert nusc_map.record_on_point(x, y, "drivable_area")
        mask = nusc_map.get_map_mask((x, y, 60, 60), 0.0, ["drivable_area"], (60, 60))
        gt = unary_union(district.layers["drivable_area"]).intersection(patch).area
        assert mask.sum() == pytest.approx(gt, rel=0.15)


def test_holes_survive_the_map_file(tmp_path):
    seed = next(s for s in range(40) if any(
        p.interiors for p in make_district(s, (300, 300), "boston-seaport", 2.0).layers["road_segment"]))  # fmt: skip
    district = make_district(seed, (300, 300), "boston-seaport", 2.0)
    write_map_expansion([district], tmp_path / "m.json")
    document = json.loads((tmp_path / "m.json").read_text())
    holes = sum(len(record["holes"]) for record in document["polygon"])
    assert holes >= sum(len(p.interiors) for p in district.layers["road_segment"]) > 0
    nodes = {n["token"]: (n["x"], n["y"]) for n in document["node"]}
    used = {t for r in document["polygon"] for t in r["exterior_node_tokens"]}
    assert used <= set(nodes) and len(set(nodes.values())) == len(nodes)
    assert document["canvas_edge"][0] >= max(x for x, _ in nodes.values())


def test_bad_arguments_are_explained_in_a_sentence(tmp_path, districts):
    with pytest.raises(ConfigError, match="location is 'paris'"):
        make_district(0, (300, 300), "paris", 5.0)
    with pytest.raises(ConfigError, match="duration"):
        make_district(0, (300, 300), LOCATIONS[0], 0.0)
    with pytest.raises(ConfigError, match="exactly one location"):
        write_map_expansion(districts[:2], tmp_path / "m.json")
    with pytest.raises(ConfigError, match="same name"):
        write_map_expansion([districts[0], districts[0]], tmp_path / "m.json")
    with pytest.raises(ConfigError, match="negative"):
        write_map_expansion([make_district(0, (0, 0), LOCATIONS[0], 1.0)], tmp_path / "m.json")
    assert not list(tmp_path.iterdir())
