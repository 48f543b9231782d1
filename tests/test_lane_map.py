"""Lines around a pose: against the published extractor's own numbers, and against hand-drawn maps."""

import json
import time

import numpy as np
import pytest
import shapely

from perception.data.lane_map import LaneMap
from perception.errors import DataError
from perception.geometry import polyline_length, rigid_from_quaternion, yaw_from_rotation
from perception.types import LINE_CLASSES


def write_map(path, *, polygons=None, dividers=None):
    """A map-expansion file: {layer: [(exterior, [holes])]} and {layer: [points]}."""
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


def of_class(lines, name):
    return [line.points for line in lines if LINE_CLASSES[line.label] == name]


def test_matches_published_extractor(golden):
    folder = golden / "map_gt"
    poses = json.loads((folder / "poses.json").read_text())
    expected = json.loads((folder / "expected.json").read_text())["maptr"]
    lane_map = LaneMap(folder / "maps" / "expansion" / f"{poses['location']}.json")
    assert len(expected) == len(poses["poses"])
    for pose, want in zip(poses["poses"], expected, strict=True):
        global_from_ego = rigid_from_quaternion(pose["ego2global_rotation"], pose["ego2global_translation"])
        ego_from_lidar = rigid_from_quaternion(pose["lidar2ego_rotation"], pose["lidar2ego_translation"])
        global_from_lidar = global_from_ego @ ego_from_lidar
        x, y = global_from_lidar[:2, 3]
        # The patch of the LiDAR frame: 30 m across (x), 60 m ahead (y).
        lines = lane_map.lines(x, y, yaw_from_rotation(global_from_lidar), size=(30.0, 60.0))
        remaining = [(line.label, shapely.linestrings(line.points), line.points) for line in lines]
        assert len(remaining) == len(want["lines"])
        for line in want["lines"]:
            points = np.array(line["pts"])
            geometry = shapely.linestrings(points)
            distances = [
                shapely.hausdorff_distance(geometry, other) if label == line["label"] else np.inf
                for label, other, _ in remaining
            ]
            best = int(np.argmin(distances))
            _, _, found = remaining.pop(best)
            assert distances[best] < 1e-6
            assert polyline_length(found) == pytest.approx(line["length"], abs=1e-5)
            assert np.array_equal(found[0], found[-1]) == line["closed"]
            if not line["closed"]:  # the direction is part of the published data
                assert np.abs(found[0] - points[0]).max() < 1e-6


def test_matches_published_extractor_after_turning_the_patch_frame(golden):
    """Patch x forward is the LiDAR patch turned by 90 degrees: the same lines with turned coordinates."""
    folder = golden / "map_gt"
    lane_map = LaneMap(next((folder / "maps" / "expansion").glob("*.json")))
    lidar = lane_map.lines(551.0, 1046.0, 0.3, size=(30.0, 60.0))
    forward = lane_map.lines(551.0, 1046.0, 0.3 + np.pi / 2, size=(60.0, 30.0))
    assert len(lidar) == len(forward) > 10
    for line in lidar:
        turned = shapely.linestrings(np.stack([line.points[:, 1], -line.points[:, 0]], axis=1))
        alike = [shapely.linestrings(other.points) for other in forward if other.label == line.label]
        assert min(shapely.hausdorff_distance(turned, other) for other in alike) < 1e-9


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
    # The surface stays on the right hand: the left kerb runs along +x, the right kerb along -x.
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


def test_is_fast(golden):
    folder = golden / "map_gt"
    lane_map = LaneMap(next((folder / "maps" / "expansion").glob("*.json")))
    times = []
    for k in range(30):
        start = time.perf_counter()
        lane_map.lines(551.0, 1046.0, 0.2 * k)
        times.append(time.perf_counter() - start)
    assert np.median(times) < 0.015
