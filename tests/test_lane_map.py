"""Lines around a pose, against results of the published extractors and against hand-drawn maps."""

import json
import time

import numpy as np
import pytest
import shapely
import torch
from douglas_peucker import decided_by_rounding

from perception.data.info_files import read_info
from perception.data.lane_map import LANE_PROTOCOLS, LaneMap
from perception.data.nuscenes import NuScenesDataset
from perception.errors import ConfigError, DataError
from perception.geometry import (
    polyline_length,
    resample_polyline,
    rigid_from_quaternion,
    yaw_from_rotation,
)
from perception.targets import line_orderings
from perception.types import LINE_CLASSES, LaneRange, Polylines


def write_map(path, *, polygons=None, dividers=None):
    """Writes a map-expansion file of {layer: [(exterior, [holes])]} and {layer: [points]}."""
    content = {name: [] for name in ("node", "line", "polygon", "road_segment", "lane", "ped_crossing")}
    content |= {"road_divider": [], "lane_divider": [], "version": "1.3"}

    def add_nodes(points):
        first = len(content["node"])
        content["node"] += [{"token": f"n{first + k}", "x": x, "y": y} for k, (x, y) in enumerate(points)]
        return [f"n{first + k}" for k in range(len(points))]

    for layer, shapes in (polygons or {}).items():
        for exterior, holes in shapes:
            token = f"p{len(content['polygon'])}"
            record = {"token": token, "exterior_node_tokens": add_nodes(exterior)}
            content["polygon"].append(record | {"holes": [{"node_tokens": add_nodes(hole)} for hole in holes]})
            content[layer].append({"token": f"r{token}", "polygon_token": token})
    for layer, shapes in (dividers or {}).items():
        for points in shapes:
            token = f"l{len(content['line'])}"
            content["line"].append({"token": token, "node_tokens": add_nodes(points)})
            content[layer].append({"token": f"r{token}", "line_token": token})
    path.write_text(json.dumps(content))
    return path


def rectangle(x0, y0, x1, y1):
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def is_ring(points):
    return np.array_equal(points[0], points[-1])


def of_class(lines, name):
    return [line.points for line in lines if LINE_CLASSES[line.label] == name]


def test_matches_published_extractor(golden):
    lane_map, _, lidar_poses = golden_poses(golden)
    expected = json.loads((golden / "map_gt" / "expected.json").read_text())["maptr"]
    assert len(expected) == len(lidar_poses) > 0
    for global_from_lidar, want in zip(lidar_poses, expected, strict=True):
        x, y = global_from_lidar[:2, 3]
        # The patch of the LiDAR frame: 30 m across (x), 60 m ahead (y).
        lines = lane_map.lines(x, y, yaw_from_rotation(global_from_lidar), lane_range=LaneRange(30.0, 60.0))
        remaining = [(line.label, line.points) for line in lines]
        assert len(remaining) == len(want["lines"])
        for line in want["lines"]:
            points = np.array(line["pts"])
            # The direction of an open line is part of the published data.
            distances = [
                distance_of_lines(points, other) if label == line["label"] else np.inf for label, other in remaining
            ]
            best = int(np.argmin(distances))
            _, found = remaining.pop(best)
            assert distances[best] < 1e-6
            assert polyline_length(found) == pytest.approx(line["length"], abs=1e-5)
            assert is_ring(found) == line["closed"]


def test_matches_published_extractor_after_turning_the_patch_frame(golden):
    """Patch x forward is the LiDAR patch turned by 90 degrees: the same lines with turned coordinates."""
    lane_map, _, lidar_poses = golden_poses(golden)
    total = 0
    for global_from_lidar in lidar_poses:
        (x, y), yaw = global_from_lidar[:2, 3], yaw_from_rotation(global_from_lidar)
        lidar = lane_map.lines(x, y, yaw, lane_range=LaneRange(30.0, 60.0))
        forward = lane_map.lines(x, y, yaw + np.pi / 2, lane_range=LaneRange(60.0, 30.0))
        assert len(lidar) == len(forward)
        total += len(lidar)
        for line in lidar:
            turned = shapely.linestrings(np.stack([line.points[:, 1], -line.points[:, 0]], axis=1))
            alike = [shapely.linestrings(other.points) for other in forward if other.label == line.label]
            assert min(shapely.hausdorff_distance(turned, other) for other in alike) < 1e-6
    assert total > 0


def test_straight_road(tmp_path):
    """A road 8 m wide through the patch: two open kerbs that end 0.2 m before the border, one divider to the border."""
    road = [(rectangle(-100, -4, 100, 4), [])]
    path = write_map(
        tmp_path / "m.json", polygons={"road_segment": road}, dividers={"lane_divider": [[(-100, 0), (100, 0)]]}
    )
    lines = LaneMap(path).lines(10.0, 1.0, 0.0)
    (divider,) = of_class(lines, "divider")
    assert sorted(divider.tolist()) == [[-30.0, -1.0], [30.0, -1.0]]
    kerbs = sorted(of_class(lines, "boundary"), key=lambda points: points[0, 1])
    right, left = kerbs
    # The surface is on the right: the left kerb runs along +x, the right kerb along -x.
    assert np.allclose(left, [[-29.8, 3.0], [29.8, 3.0]])
    assert np.allclose(right, [[29.8, -5.0], [-29.8, -5.0]])


def test_lanes_and_segments_unite_and_holes_are_closed(tmp_path):
    path = write_map(
        tmp_path / "m.json",
        polygons={
            "road_segment": [(rectangle(-10, -8, 0, 8), [rectangle(-5, -2, -3, 2)]), (rectangle(0, -8, 10, 8), [])],
            "lane": [(rectangle(-4, 8, 4, 10), [])],
        },
    )
    lines = of_class(LaneMap(path).lines(0.0, 0.0, 0.0), "boundary")
    assert len(lines) == 2 and all(np.array_equal(points[0], points[-1]) for points in lines)
    outer, hole = sorted(lines, key=polyline_length, reverse=True)
    assert polyline_length(outer) == pytest.approx(2 * 20 + 2 * 18)  # the bay adds 2 x 2 m of sides, no more
    assert not shapely.is_ccw(shapely.linearrings(outer)) and shapely.is_ccw(shapely.linearrings(hole))
    assert np.allclose(sorted(set(map(tuple, hole))), sorted(rectangle(-5, -2, -3, 2)))


def test_crossing_at_the_border_stays_a_closed_ring(tmp_path):
    halves = [(rectangle(27, -3, 29, 3), []), (rectangle(29, -3, 33, 3), [])]
    path = write_map(tmp_path / "m.json", polygons={"ped_crossing": halves})
    (ring,) = of_class(LaneMap(path).lines(0.0, 0.0, 0.0), "ped_crossing")
    assert np.array_equal(ring[0], ring[-1])
    assert ring[:, 0].min() == pytest.approx(27) and ring[:, 0].max() == pytest.approx(30)
    assert polyline_length(ring) == pytest.approx(2 * (3 + 6))


def test_bad_records_are_skipped(tmp_path):
    bow_tie = [(0, 0), (5, 5), (5, 0), (0, 5)]
    path = write_map(
        tmp_path / "m.json",
        polygons={"lane": [(bow_tie, []), ([(0, 0), (1, 1)], [])]},
        dividers={"road_divider": [[], [(1.0, 1.0)], [(-1.0, 0.0), (1.0, 0.0)]]},
    )
    lines = LaneMap(path).lines(0.0, 0.0, 0.0)
    assert [line.label for line in lines] == [0]


def test_empty_patch(tmp_path):
    path = write_map(tmp_path / "m.json", polygons={"lane": [(rectangle(0, 0, 5, 5), [])]})
    assert LaneMap(path).lines(500.0, 500.0, 1.0) == []


def test_errors_name_the_file(tmp_path):
    with pytest.raises(DataError, match=r"boston\.json is missing.*map expansion"):
        LaneMap(tmp_path / "boston.json")
    (tmp_path / "cut.json").write_text('{"node": [')
    with pytest.raises(DataError, match=r"cut\.json is not valid JSON"):
        LaneMap(tmp_path / "cut.json")
    (tmp_path / "other.json").write_text('{"node": []}')
    with pytest.raises(DataError, match=r"other\.json has no 'line'"):
        LaneMap(tmp_path / "other.json")


def golden_poses(golden):
    """Reads the map of the golden folder, and for each pose its global_from_ego and global_from_lidar."""
    folder = golden / "map_gt"
    content = json.loads((folder / "poses.json").read_text())
    lane_map = LaneMap(folder / "maps" / "expansion" / f"{content['location']}.json")
    ego, lidar = [], []
    for pose in content["poses"]:
        ego.append(rigid_from_quaternion(pose["ego2global_rotation"], pose["ego2global_translation"]))
        lidar.append(ego[-1] @ rigid_from_quaternion(pose["lidar2ego_rotation"], pose["lidar2ego_translation"]))
    return lane_map, ego, lidar


def distance_of_lines(points, others):
    """Returns the Hausdorff distance in metres; for open lines, also the distance of the first points counts."""
    distance = shapely.hausdorff_distance(*map(shapely.linestrings, (points, others)))
    return distance if is_ring(points) else max(distance, np.abs(points[0] - others[0]).max())


def compare_crossings_at_border(want, remaining):
    """Compares crossings that the published code has cut twice by the border of the patch with our remaining ones.

    Rounding decides which of their vertices are kept and which pieces are united: the minimum rectangles along all
    sides of a triangle have the same area, so the direction of a cut-off corner is ambiguous. Their total area is not.
    """
    assert all(name == "ped_crossing" and is_ring(points) for name, points in remaining)
    assert all(shapely.is_ccw(shapely.linearrings(points)) for _, points in remaining)
    assert any(line["touches_patch_border"] for line in want) == bool(want) == bool(remaining)
    covered = [
        shapely.union_all([shapely.buffer(shapely.polygons(points), 0) for points in rings])
        for rings in ([line["pts"] for line in want], [points for _, points in remaining])
    ]
    assert shapely.area(shapely.symmetric_difference(*covered)) < 1e-3


def golden_streammapnet(golden):
    """Yields the patch size and the lines of each golden StreamMapNet extract, such as streammapnet_60x30."""
    expected = json.loads((golden / "map_gt" / "expected.json").read_text())
    for key in sorted(expected):
        if key.startswith("streammapnet_"):
            yield LaneRange.parse(key.removeprefix("streammapnet_")), expected[key]


def test_streammapnet_matches_published_extractor(golden):
    lane_map, poses, _ = golden_poses(golden)
    sizes = []
    for size, expected in golden_streammapnet(golden):
        sizes.append(size)
        assert len(expected) == len(poses)
        for global_from_ego, want in zip(poses, expected, strict=True):
            x, y = global_from_ego[:2, 3]
            lines = lane_map.lines(x, y, yaw_from_rotation(global_from_ego), size, "streammapnet")
            remaining = [(LINE_CLASSES[line.label], line.points) for line in lines]
            at_border = []  # of the crossings
            for line in want["lines"]:
                points = np.array(line["pts"])
                distances = [
                    distance_of_lines(points, other) if name == line["cls"] else np.inf for name, other in remaining
                ]
                best = int(np.argmin(distances)) if distances else -1
                if line["cls"] == "ped_crossing" and (line["touches_patch_border"] or distances[best] > 1e-6):
                    at_border.append(line)
                    continue
                _, found = remaining.pop(best)
                assert distances[best] < 1e-6
                assert polyline_length(found) == pytest.approx(line["length"], abs=1e-5)
                assert is_ring(found) == line["closed"]
                if line["closed"]:  # directions are part of the published data
                    assert shapely.is_ccw(shapely.linearrings(found)) == shapely.is_ccw(shapely.linearrings(points))
            compare_crossings_at_border(at_border, remaining)
    assert sizes


def test_lines_simplify_to_those_the_streammapnet_evaluator_scores(golden):
    """The evaluator simplifies lines by Douglas-Peucker, 0.2 m: exact vertices give the published lines.

    If two vertices are equally far from a chord, rounding decides which one is kept, and both results are right.
    """
    lane_map, poses, _ = golden_poses(golden)
    compared = 0
    for size, expected in golden_streammapnet(golden):
        for global_from_ego, want in zip(poses, expected, strict=True):
            x, y = global_from_ego[:2, 3]
            lines = lane_map.lines(x, y, yaw_from_rotation(global_from_ego), size, "streammapnet")
            for line in want["lines"]:
                if line["closed"]:  # the result for a ring depends on its start, which is arbitrary
                    continue
                compared += 1
                label, points, wanted = (
                    LINE_CLASSES.index(line["cls"]),
                    *(np.array(line[k]) for k in ("pts", "simplified_pts")),
                )
                ours = min(
                    (other.points for other in lines if other.label == label),
                    key=lambda other: shapely.hausdorff_distance(*map(shapely.linestrings, (other, points))),
                )
                simplified = shapely.get_coordinates(shapely.simplify(shapely.linestrings(ours), 0.2))
                gap = shapely.hausdorff_distance(*map(shapely.linestrings, (simplified, wanted)))
                assert gap < 1e-6 or (
                    decided_by_rounding(points, wanted, 0.2) and decided_by_rounding(ours, simplified, 0.2)
                )
    assert compared > 0


def test_points_and_orderings_match_published_samples(golden):
    """Compares with MapTR's 20 points of each line and its equivalent orderings (`shift_v2`).

    An open line has two orderings in both. For a ring, MapTR starts at each vertex and resamples, in one direction;
    ours start at each sample, in both directions. So each ordering of MapTR has one of ours within half a step.
    """
    expected = json.loads((golden / "map_gt" / "expected.json").read_text())["maptr"]
    samples = np.load(golden / "map_gt" / "maptr_samples.npz")
    limit = np.array([15.0, 30.0])  # of the published patch
    compared = 0
    for pose, want in enumerate(expected):
        fixed, shifted = samples[f"pose{pose}_fixed20"], samples[f"pose{pose}_shift_v2"]
        assert samples[f"pose{pose}_labels"].tolist() == [line["label"] for line in want["lines"]]
        P = fixed.shape[1]
        for line, points, orders in zip(want["lines"], fixed, shifted, strict=True):
            vertices = np.array(line["pts"])
            compared += 1
            ours = resample_polyline(vertices, P).clip(-limit, limit)
            assert np.abs(ours - points).max() < 1e-5
            orders = orders[orders[:, 0, 0] > -1000]
            closed = torch.tensor([[line["closed"]]])
            points = torch.from_numpy(ours)[None, None]
            gt = Polylines(points, closed, closed.long(), closed.float(), closed | True, torch.zeros_like(points))
            alike, exists = line_orderings(gt)
            alike = alike[0, 0][exists[0, 0]].numpy()  # [O, P, 2]
            gap = np.linalg.norm(alike[:, None] - orders[None], axis=-1).max(-1)  # [O, orders of MapTR]
            if line["closed"]:
                rolled = [np.roll(vertices[:-1], k, axis=0) for k in range(len(vertices) - 1)]
                starts = [np.concatenate([ring, ring[:1]]) for ring in rolled]
                again = np.stack([resample_polyline(start, P) for start in starts]).clip(-limit, limit)
                assert len(orders) == min(len(again), P - 1)
                # In the order of the vertices; of more than P - 1 the published code takes P - 1 at random.
                apart = np.abs(again[:, None] - orders[None]).max((2, 3))  # [vertices, orders of MapTR]
                assert apart.min(axis=0).max() < 1e-5
                assert len(again) > P - 1 or apart.diagonal().max() < 1e-5
                assert gap.min(axis=0).max() <= line["length"] / (P - 1) / 2 + 1e-5
            else:
                assert len(alike) == len(orders) == 2 and gap.min(axis=0).max() < 1e-5
    assert compared > 0


def slanted(x, y, length, width, degrees):
    """Makes a rotated rectangle around (x, y)."""
    turn = np.radians(degrees)
    along, across = np.array([np.cos(turn), np.sin(turn)]), np.array([-np.sin(turn), np.cos(turn)])
    signs = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    return [tuple(np.array([x, y]) + a * length / 2 * along + b * width / 2 * across) for a, b in signs]


def test_crossings_unite_by_direction_in_streammapnet(tmp_path):
    """Halves unite in both protocols. An overlapping crossing unites in both at 5 degrees, only in MapTR's at 30.

    1 - cos(5 deg) = 0.004 and 1 - cos(30 deg) = 0.13, the limit is 0.01.
    """
    for degrees, united in ((5, True), (30, False), (175, True)):
        shapes = [rectangle(-6, -2, 0, 2), rectangle(0, -2, 6, 2), slanted(3, 0, 12, 3, degrees)]
        path = write_map(tmp_path / "m.json", polygons={"ped_crossing": [(shape, []) for shape in shapes]})
        published = {protocol: LaneMap(path).lines(0.0, 0.0, 0.0, protocol=protocol) for protocol in LANE_PROTOCOLS}
        assert len(published["maptr"]) == 1
        rings = [line.points for line in published["streammapnet"]]
        assert all(is_ring(points) and shapely.is_ccw(shapely.linearrings(points)) for points in rings)
        union = shapely.union_all([shapely.Polygon(shape) for shape in shapes])
        if united:
            assert len(rings) == 1
            assert shapely.Polygon(rings[0]).area == pytest.approx(union.area)
        else:
            assert sorted(shapely.Polygon(points).area for points in rings) == pytest.approx([36, 48])


def test_separate_crossings_of_one_direction_stay_separate(tmp_path):
    """Crossings with a gap of 1 m stay separate. In a chain, only boxes that touch the first one's unite with it."""
    apart = [rectangle(-6, -2, 0, 2), rectangle(1, -2, 6, 2)]
    path = write_map(tmp_path / "m.json", polygons={"ped_crossing": [(shape, []) for shape in apart]})
    assert len(LaneMap(path).lines(0.0, 0.0, 0.0, protocol="streammapnet")) == 2
    chain = [rectangle(-10, -2, -4, 2), rectangle(-4, -2, 2, 2), rectangle(2, -2, 8, 2)]
    path = write_map(tmp_path / "m.json", polygons={"ped_crossing": [(shape, []) for shape in chain]})
    rings = [line.points for line in LaneMap(path).lines(0.0, 0.0, 0.0, protocol="streammapnet")]
    assert sorted(shapely.Polygon(points).area for points in rings) == pytest.approx([24, 48])


def test_crossing_in_the_corner_keeps_the_border_in_streammapnet(tmp_path):
    path = write_map(tmp_path / "m.json", polygons={"ped_crossing": [(rectangle(25, 12, 40, 40), [])]})
    (line,) = LaneMap(path).lines(0.0, 0.0, 0.0, protocol="streammapnet")
    assert is_ring(line.points) and polyline_length(line.points) == pytest.approx(2 * (5 + 3))


def test_unknown_protocol(tmp_path):
    path = write_map(tmp_path / "m.json")
    with pytest.raises(ConfigError, match="protocol of lane lines is 'vectormap': give one of maptr, streammapnet"):
        LaneMap(path).lines(0.0, 0.0, 0.0, protocol="vectormap")


def test_matches_shapely_on_a_real_map(real_keyframe, tmp_path):
    """Compares with real dividers and road outlines around a real pose, cut in the global frame by plain shapely.

    The file holds the outlines of `drivable_area`, not of road segments and lanes, and no crossings. So this checks
    the rules of dividers and outlines on real shapes, but neither the choice of layers nor the crossings.
    """
    features = json.loads((real_keyframe / "map_vectors.json").read_text())["features"]
    area = json.loads((real_keyframe / "drivable_area.json").read_text())
    of_kind = {
        kind: [f["polyline"] for f in features if f["kind"] == kind] for kind in ("lane_divider", "road_divider")
    }
    polygons = [(rings[0][:-1], [hole[:-1] for hole in rings[1:]]) for rings in area["coordinates"]]
    path = write_map(tmp_path / "m.json", polygons={"road_segment": polygons}, dividers=of_kind)
    lane_map = LaneMap(path)
    info = read_info(real_keyframe / "sample.json")
    global_from_ego, ego_from_lidar = info.global_from_ego(), info.ego_from_lidar()
    global_from_lidar = global_from_ego @ ego_from_lidar
    edges = shapely.MultiLineString([f["polyline"] for f in features if f["kind"] == "drivable_boundary"])
    dividers = shapely.MultiLineString([line for kind in of_kind.values() for line in kind])
    road = shapely.from_geojson(json.dumps(area)).buffer(0)
    for pose, ahead, protocol in ((global_from_lidar, np.pi / 2, "maptr"), (global_from_ego, 0.0, "streammapnet")):
        for size in (LaneRange(60.0, 30.0), LaneRange(100.0, 50.0)):
            yaw = yaw_from_rotation(pose) + ahead
            lines = lane_map.lines(*pose[:2, 3], yaw, size, protocol)
            turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
            found = {
                name: shapely.MultiLineString([p @ turn.T + pose[:2, 3] for p in of_class(lines, name)])
                for name in ("divider", "boundary")
            }
            for name, lines_global, margin in (("divider", dividers, 0.0), ("boundary", edges, 0.2)):
                x, y = np.array(size) / 2 - margin
                corners = np.array([[-x, -y], [x, -y], [x, y], [-x, y]]) @ turn.T + pose[:2, 3]
                want = shapely.intersection(lines_global, shapely.Polygon(corners))
                assert shapely.hausdorff_distance(shapely.segmentize(found[name], 0.5), want) < 1e-3
                assert found[name].length == pytest.approx(want.length, abs=1e-3)
                assert want.length > 20
            for line in found["boundary"].geoms:  # the road is on the right
                (x0, y0), (x1, y1) = np.array(line.coords)[[0, 1]]
                step = np.array([y1 - y0, x0 - x1]) * 1e-3 / line.length
                assert shapely.contains(road, shapely.Point((x0 + x1) / 2 + step[0], (y0 + y1) / 2 + step[1]))


def test_dataset_cuts_any_protocol_and_size_around_its_pose(hand_root, tmp_path):
    """The road and the car point 30 degrees off global x; LIDAR_TOP is mounted 0.9 m ahead of the ego frame."""
    data = NuScenesDataset(
        hand_root, "v1.0-hand", "hand_val", image_size=(90, 160), cameras=("CAM_FRONT",), cache_dir=tmp_path
    )
    cases = [("maptr", LaneRange(60.0, 30.0), 0.9), ("maptr", LaneRange(20.0, 10.0), 0.9)]
    cases += [("streammapnet", LaneRange(60.0, 30.0), 0.0), ("streammapnet", LaneRange(100.0, 50.0), 0.0)]
    for protocol, size, middle in cases:
        lines = data.gt_lines(2, protocol, size)
        (divider,) = of_class(lines, "divider")
        half = size[0] / 2
        assert np.allclose(sorted(divider.tolist()), [[middle - half, 0], [middle + half, 0]], atol=1e-4)
        kerbs = sorted(of_class(lines, "boundary"), key=lambda points: points[0, 1])
        wanted = [[middle - half + 0.2, middle + half - 0.2]] * 2
        assert np.allclose([np.sort(points[:, 0]) for points in kerbs], wanted, atol=1e-4)
        assert np.allclose([points[:, 1].mean() for points in kerbs], [-4, 4], atol=1e-4)
    with pytest.raises(ConfigError, match="protocol"):
        data.gt_lines(0, "openlane")


def test_dataset_reads_several_roots(hand_root, town_root, tmp_path):
    """Lines cut from the map equal those of the index for every sample, also of a second root."""
    version = "v1.0-synthetic"
    splits = json.loads((town_root / version / "splits.json").read_text())
    split = next(name for name, scenes in splits.items() if scenes)
    data = NuScenesDataset([town_root, town_root], version, split, image_size=(128, 224), cache_dir=tmp_path)
    for i in (0, len(data) // 2, len(data) - 1):
        index, live = data.gt_lines(i), data.gt_lines(i, "maptr", LaneRange(60.0, 30.0 + 1e-9))
        assert len(index) == len(live) > 0
        for one, other in zip(index, live, strict=True):
            pair = shapely.linestrings(one.points), shapely.linestrings(other.points)
            assert one.label == other.label and shapely.hausdorff_distance(*pair) < 1e-4
        # MapTR's patch is StreamMapNet's moved to the LiDAR: far from the border the lines are equal.
        other_protocol = data.gt_lines(i, "streammapnet")
        inner = shapely.box(-25, -12, 25, 12)
        for name in ("divider", "boundary"):
            a, b = (
                shapely.intersection(shapely.MultiLineString(of_class(lines, name)), inner)
                for lines in (index, other_protocol)
            )
            assert shapely.hausdorff_distance(a, b) < 1e-3 or (a.is_empty and b.is_empty)


@pytest.mark.parametrize("protocol", LANE_PROTOCOLS)
def test_is_fast(town_root, protocol):
    """Every patch is timed twice and the faster counts, so that a busy machine does not decide."""
    for here in (LaneMap(path) for path in (town_root / "maps" / "expansion").glob("*.json")):
        centers = road_centers(here.path)
        times = []
        for k in range(30):
            x, y = centers[k % len(centers)]
            pair = []
            for _ in range(2):
                start = time.process_time()
                here.lines(x, y, 0.2 * k, protocol=protocol)
                pair.append(time.process_time() - start)
            times.append(min(pair))
        assert np.median(times) < 0.015


def road_centers(path):
    content = json.loads(path.read_text())
    nodes = {node["token"]: (node["x"], node["y"]) for node in content["node"]}
    polygons = {polygon["token"]: polygon["exterior_node_tokens"] for polygon in content["polygon"]}
    return [np.mean([nodes[t] for t in polygons[r["polygon_token"]]], axis=0) for r in content["road_segment"]][:10]
