"""Centre lines and successors: arc-line paths against closed forms and the devkit, links on hand-drawn graphs."""

import json
import shutil

import numpy as np
import pytest
import shapely

from perception.data.lane_map import LaneMap
from perception.data.lane_topology import CHORD_ERROR, SHAPES, clip_to_box, lane_points
from perception.data.nuscenes import NuScenesDataset
from perception.errors import DataError
from perception.geometry import polyline_length
from perception.types import LaneRange


def straight(x0, y0, x1, y1):
    """Makes a straight arc-line path: both arcs have length 0."""
    length, yaw = np.hypot(x1 - x0, y1 - y0), np.arctan2(y1 - y0, x1 - x0)
    return {"start_pose": [x0, y0, yaw], "shape": "LSL", "radius": 10.0, "segment_length": [0.0, length, 0.0]}


def write_graph(path, lanes, links, connectors=()):
    """Writes a map file that holds only a lane graph: {token: [paths]} and {token: [next tokens]}."""
    layers = ("node", "line", "polygon", "road_segment", "lane", "ped_crossing", "road_divider", "lane_divider")
    content = {name: [] for name in layers}
    # Lanes of real maps have polygons; one without width is no surface and is skipped.
    content["polygon"] = [{"token": "flat", "exterior_node_tokens": [], "holes": []}]
    content["lane"] = [{"token": t, "polygon_token": "flat"} for t in lanes if t not in connectors]
    content["lane_connector"] = [{"token": t, "polygon_token": "flat"} for t in connectors]
    content["arcline_path_3"] = lanes
    content["connectivity"] = {t: {"incoming": [], "outgoing": links.get(t, [])} for t in lanes}
    path.write_text(json.dumps(content))
    return path


def named_links(lines):
    return {(lines.token[a], lines.token[b]) for a, b in lines.successor}


def test_quarter_circles():
    """Left with radius 8 from heading east: the centre is (0, 8), the end is (8, 8) heading north; then 5 m north."""
    path = {"start_pose": [0, 0, 0], "shape": "LSR", "radius": 8.0, "segment_length": [4 * np.pi, 5.0, 4 * np.pi]}
    points = lane_points([path])
    arc = points[: len(points) // 2]
    assert np.allclose(np.linalg.norm(arc - [0, 8], axis=1), 8)
    assert np.isclose(points, [8, 8]).all(1).any() and np.isclose(points, [8, 13]).all(1).any()
    assert np.allclose(points[-1], [16, 21])  # right again, around (16, 13)
    # Chords are as long as CHORD_ERROR allows: the sagitta is 8 (1 - cos(half the angle)).
    angle = np.pi / 2 / np.ceil(np.pi / 2 / (2 * np.arccos(1 - CHORD_ERROR / 8)))
    assert np.linalg.norm(np.diff(points, axis=0), axis=1)[0] == pytest.approx(16 * np.sin(angle / 2))
    assert len(lane_points([straight(0, 0, 100, 0)])) == 2


@pytest.mark.parametrize("shape", SHAPES)
def test_arcs_are_the_devkits(shape):
    from nuscenes.map_expansion.arcline_path_utils import discretize, pose_at_length

    path = {"start_pose": [400.0, 900.0, 2.1], "shape": shape, "radius": 7.3, "segment_length": [6.0, 11.0, 9.0]}
    points = lane_points([path])
    devkit = np.array(discretize(path, 0.1))[:, :2]
    assert np.allclose(points[-1], pose_at_length(path, 26.0)[:2], atol=1e-9)
    assert shapely.distance(shapely.points(devkit), shapely.linestrings(points)).max() < 1.01 * CHORD_ERROR
    assert shapely.distance(shapely.points(points), shapely.linestrings(devkit)).max() < 1e-3
    assert polyline_length(points) == pytest.approx(26.0, abs=0.05)


def test_paths_of_a_lane_join_in_one_vertex():
    points = lane_points([straight(0, 0, 10, 0), straight(10.003, 0, 20, 0), straight(20.0, 0.0, 20, 10)])
    assert np.allclose(points, [[0, 0], [10, 0], [20, 0], [20, 10]], atol=1e-2)


def test_the_longest_segment():
    assert polyline_length(lane_points([straight(0, 0, 0.99e5, 0)])) == pytest.approx(0.99e5)
    with pytest.raises(ValueError, match="lengths must be at most 100000 m"):
        lane_points([straight(0, 0, 1.01e5, 0)])


def test_lanes_along_the_border_of_the_patch_count(tmp_path):
    lanes = {f"{x0} {y}": [straight(x0, y, x0 + 60, y)] for x0 in (-30, -80, 20) for y in (-5.0, 5.0)}
    lane_map = LaneMap(write_graph(tmp_path / "map.json", lanes, {}))
    found = lane_map.centerlines(0.0, 0.0, 0.0, LaneRange(40.0, 10.0))
    assert sorted(found.token) == ["-30 -5.0", "-30 5.0"]  # the others end or begin at a corner
    assert [points.tolist() for points in found.points] == [[[-20, y], [20, y]] for y in (-5, 5)]


def test_vertices_inside_are_kept_to_the_last_bit():
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = rng.uniform(-1, 1, (4, 2)) * [[1, 1], [1, 1], [1, 1], [1e-9, 1]]  # differences lose digits
        ((piece, has_start, has_end),) = clip_to_box(points, np.array([1.0, 1.0]))
        assert np.array_equal(piece, points) and has_start and has_end


def test_clipping_keeps_order_direction_and_ends():
    """A zig-zag that leaves the 4 x 2 m box through its top and comes back; both its ends are inside."""
    zigzag = np.array([[-1.0, 0.0], [-1.0, 2.0], [1.0, 2.0], [1.0, 0.0]])
    (first, *ends_first), (second, *ends_second) = clip_to_box(zigzag, np.array([2.0, 1.0]))
    assert np.allclose(first, [[-1, 0], [-1, 1]]) and ends_first == [True, False]
    assert np.allclose(second, [[1, 1], [1, 0]]) and ends_second == [False, True]
    assert clip_to_box(zigzag + np.array([0.0, 5.0]), np.array([2.0, 1.0])) == []
    ((through, *ends),) = clip_to_box(np.array([[-9.0, 0.5], [0.0, 0.5], [9.0, 0.5]]), np.array([2.0, 1.0]))
    assert np.allclose(through, [[-2, 0.5], [0, 0.5], [2, 0.5]]) and ends == [False, False]


def test_clipping_is_shapelys_intersection():
    rng = np.random.default_rng(3)
    for _ in range(50):
        points = np.cumsum(rng.normal(0, 6, (12, 2)), axis=0)
        pieces = [piece for piece, _, _ in clip_to_box(points, np.array([10.0, 5.0]))]
        want = shapely.intersection(shapely.linestrings(points), shapely.box(-10, -5, 10, 5))
        assert sum(map(polyline_length, pieces)) == pytest.approx(want.length)
        line = shapely.linestrings(points)
        along = [shapely.line_locate_point(line, shapely.Point(p[:2].mean(axis=0))) for p in pieces]
        assert all(shapely.distance(shapely.points(p), line).max() < 1e-9 for p in pieces)
        assert len(along) == 0 or (shapely.is_simple(line) <= (np.diff(along) > 0).all())


FORK = {
    "in": [straight(80, 100, 100, 100)],
    "ahead": [straight(100, 100, 110, 100)],
    "left": [{"start_pose": [100, 100, 0], "shape": "LSL", "radius": 8.0, "segment_length": [4 * np.pi, 0.0, 0.0]}],
    "out": [straight(110, 100, 160, 100)],
    "far": [straight(160, 100, 200, 100)],
    "without a path": [],
}
FORK_LINKS = {"in": ["ahead", "left", "not in the file"], "ahead": ["out", "without a path"], "out": ["far"]}


def test_fork(tmp_path):
    lane_map = LaneMap(write_graph(tmp_path / "m.json", FORK, FORK_LINKS, connectors=("ahead", "left")))
    lines = lane_map.centerlines(100.0, 100.0, 0.0)
    assert set(lines.token) == {"in", "ahead", "left", "out"}  # 'far' starts 60 m away
    assert named_links(lines) == {("in", "ahead"), ("in", "left"), ("ahead", "out")}
    for a, b in lines.successor:
        assert np.allclose(lines.points[a][-1], lines.points[b][0])
    by_token = dict(zip(lines.token, lines.points, strict=True))
    assert np.allclose(by_token["in"], [[-20, 0], [0, 0]])
    assert np.allclose(by_token["out"], [[10, 0], [30, 0]])
    assert np.allclose(by_token["left"][-1], [8, 8])
    # The patch is turned to look north: what was ahead is now on the right.
    turned = lane_map.centerlines(100.0, 100.0, np.pi / 2, LaneRange(60.0, 30.0))
    assert named_links(turned) == named_links(lines)
    by_token = dict(zip(turned.token, turned.points, strict=True))
    assert np.allclose(by_token["in"], [[0, 15], [0, 0]]) and np.allclose(by_token["left"][-1], [8, -8])


def test_links_need_their_meeting_point_inside(tmp_path):
    lane_map = LaneMap(write_graph(tmp_path / "m.json", FORK, FORK_LINKS))
    # 20 m long around x = 120: 'out' begins at its border's inside, 'ahead' lies beyond.
    lines = lane_map.centerlines(122.0, 100.0, 0.0, LaneRange(20.0, 10.0))
    assert lines.token == ["out"] and lines.successor.shape == (0, 2)
    empty = lane_map.centerlines(900.0, 100.0, 0.0)
    assert empty.points == [] and empty.token == [] and empty.successor.shape == (0, 2)


def test_a_lane_that_comes_back_has_two_lines_and_each_its_own_link(tmp_path):
    """A hairpin that leaves the patch at x = 30: its first half follows 'in', its second leads to 'back'."""
    hairpin = [straight(0, -3, 40, -3), straight(40, -3, 40, 3), straight(40, 3, 0, 3)]
    lanes = {"in": [straight(-10, -3, 0, -3)], "hairpin": hairpin, "back": [straight(0, 3, -10, 3)]}
    path = write_graph(tmp_path / "m.json", lanes, {"in": ["hairpin"], "hairpin": ["back"]})
    lines = LaneMap(path).centerlines(0.0, 0.0, 0.0)
    there, again = [k for k, token in enumerate(lines.token) if token == "hairpin"]
    assert np.allclose(lines.points[there], [[0, -3], [30, -3]])
    assert np.allclose(lines.points[again], [[30, 3], [0, 3]])
    source, sink = lines.token.index("in"), lines.token.index("back")
    assert sorted(map(tuple, lines.successor)) == sorted([(source, there), (again, sink)])


def test_dataset_returns_centerlines_in_the_ego_frame(hand_root, tmp_path):
    """The car of the hand-written dataset drives 30 degrees off x; the lane is 1.5 m to the right of its track."""
    root = shutil.copytree(hand_root, tmp_path / "root")
    path = root / "maps" / "expansion" / "hand-town.json"
    heading = np.array([np.cos(np.radians(30)), np.sin(np.radians(30))])
    start = np.array([500.0, 800.0]) + 1.5 * np.array([heading[1], -heading[0]])
    lanes = {
        "a": [straight(*(start - 100 * heading), *(start + 10 * heading))],
        "b": [straight(*(start + 10 * heading), *(start + 100 * heading))],
    }
    graph = json.loads(write_graph(tmp_path / "graph.json", lanes, {"a": ["b"]}).read_text())
    content = json.loads(path.read_text())
    content["polygon"] += graph["polygon"]
    content |= {name: graph[name] for name in ("lane", "lane_connector", "arcline_path_3", "connectivity")}
    path.write_text(json.dumps(content))
    options = {"image_size": (90, 160), "cameras": ("CAM_FRONT",), "cache_dir": tmp_path / "cache"}
    data = NuScenesDataset(root, "v1.0-hand", "hand_val", **options)
    for i in range(3):  # 3 m further each time
        lines = data.gt_centerlines(i)
        assert lines.token == ["a", "b"] and lines.successor.tolist() == [[0, 1]]
        assert np.allclose(lines.points[0], [[-30, -1.5], [10 - 3 * i, -1.5]], atol=1e-6)
        assert np.allclose(lines.points[1], [[10 - 3 * i, -1.5], [30, -1.5]], atol=1e-6)
    assert np.allclose(data.gt_centerlines(0, LaneRange(100.0, 50.0)).points[1][-1], [50, -1.5], atol=1e-6)
    plain = NuScenesDataset(hand_root, "v1.0-hand", "hand_val", **options)
    with pytest.raises(DataError, match=r"hand-town\.json has no 'lane_connector': give a map expansion"):
        plain.gt_centerlines(0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shape": "SLS"}, 'shape is "SLS", not one of LSL'),
        ({"radius": 0.0}, "must be finite and not negative"),
        ({"segment_length": [1.0, float("nan"), 1.0]}, "must be finite and not negative"),
        ({"segment_length": [0.0, 0.0, 0.0]}, "no length"),
        ({"start_pose": [1.0, 2.0]}, "not enough values"),
    ],
)
def test_errors_name_the_lane(tmp_path, change, reason):
    path = write_graph(tmp_path / "m.json", {"bent": [straight(0, 0, 5, 0) | change]}, {})
    with pytest.raises(DataError, match=rf"m\.json: 'arcline_path_3' of lane bent is malformed \(.*{reason}"):
        LaneMap(path).centerlines(0.0, 0.0, 0.0)
