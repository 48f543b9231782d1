"""Makes the lane graph of a district: the centres of its lanes, connectors across junctions, and arc-line paths.

A connector is a path that the town's traffic may take across a junction (`traffic.route`). The paths are written as
nuScenes' `arcline_path_3`: chains of circular arcs and straight lines without kinks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import shapely
from shapely.geometry import LineString, Point, Polygon

from perception.synthetic.district import LaneGraph, LanePath
from perception.synthetic.roads import Lane, Network, Road
from perception.synthetic.traffic import exits_of, lane_after, turn_curve

_SNAP = 0.05  # metres between the end of a lane's polygon and the end of its section that are rounding
_TOLERANCE = 0.02  # metres, largest distance of an arc-line path from the points that it fits
_STRAIGHT = 1e-6  # 1/m, curvature below which the devkit takes an arc for a straight line


def make_lane_graph(network: Network) -> tuple[LaneGraph, list[Polygon]]:
    """Makes the lane graph of a road network, in its frame.

    Returns:
        The graph, and the areas of its connectors.
    """
    lanes, starts, ends = [], {}, {}
    for k, (lane, polygon) in enumerate(zip(network.lanes, network.layers["lane"], strict=True)):
        road = network.roads[lane.road]
        low, high = _extent(road, lane, polygon)
        first, last = (low, high) if lane.direction > 0 else (high, low)
        lanes.append(_along(road, first, last, road.lane_center(lane.direction, lane.number)))
        starts[lane.road, lane.direction, lane.number, first] = k
        ends[lane.road, lane.direction, lane.number, last] = k
    connectors, links, areas = [], [], []
    for (index, direction, number, cut), before in ends.items():
        road = network.roads[index]
        offset = road.lane_center(direction, number)
        for j, junction in enumerate(network.junctions):
            if not any((arm.road, arm.sign, arm.cut) == (index, -direction, cut) for arm in junction.arms):
                continue
            for turn, arm in exits_of(network, j, index, direction, cut):
                leaving = network.roads[arm.road]
                after_number = lane_after(leaving, arm.sign, turn) if turn else number
                after = starts.get((arm.road, arm.sign, after_number, arm.cut))
                if after is None:
                    continue
                if turn:
                    heading = road.heading(cut) + (0 if direction > 0 else np.pi)
                    away = leaving.lane_center(arm.sign, after_number)
                    points = turn_curve(network, road.point(cut, offset), heading, arm, away)
                    yaw = np.arctan2(*np.gradient(points, axis=0).T[::-1])
                    yaw[0], yaw[-1] = heading, leaving.heading(arm.cut) + (0 if arm.sign > 0 else np.pi)
                    path = LanePath(points, np.unwrap(yaw), min(road.lane_width, leaving.lane_width))
                else:
                    path = _along(road, cut, arm.cut, offset)
                connectors.append(path)
                links.append((before, after))
                areas.append(
                    LineString(path.points).simplify(0.01).buffer(path.width / 2, cap_style="flat", join_style="mitre")
                )
    return LaneGraph(tuple(lanes), tuple(connectors), tuple(links)), areas


def _along(road: Road, first: float, last: float, offset: float) -> LanePath:
    """Follows a road at an offset from one station to another, in either direction."""
    stations = np.linspace(first, last, int(np.ceil(abs(last - first))) + 1)
    points = road.point(stations, offset)  # [P, 2]
    normal = road.point(stations, 1.0) - road.point(stations, 0.0)
    yaw = np.unwrap(np.arctan2(-normal[:, 0], normal[:, 1]))
    return LanePath(points, yaw if last > first else yaw + np.pi, road.lane_width)


def _extent(road: Road, lane: Lane, polygon: Polygon) -> tuple[float, float]:
    """Returns the stations between which the centre of a lane lies in a polygon, which is the lane or a part of it."""
    stations = np.linspace(lane.start, lane.stop, int(np.ceil(lane.stop - lane.start)) + 1)
    line = LineString(road.point(stations, road.lane_center(lane.direction, lane.number)))
    inside = line.intersection(polygon)
    # A corner of a lane at the edge of the map may hold no part of its centre: then the nearest part is taken.
    points = shapely.get_coordinates(polygon if inside.is_empty else inside)
    lengths = np.linalg.norm(np.diff(shapely.get_coordinates(line), axis=0), axis=1)
    along = [line.project(Point(point)) for point in points]
    found = np.interp([min(along), max(along)], np.concatenate([[0.0], np.cumsum(lengths)]), stations)
    low = lane.start if found[0] - lane.start < _SNAP else float(found[0])
    high = lane.stop if lane.stop - found[1] < _SNAP else float(found[1])
    return low, high


def arcline_path(path: LanePath) -> list[dict[str, Any]]:
    """Fits arcs and straight lines to a path, to 2 cm: records of `arcline_path_3`.

    Each piece ends at a point of the path with the path's heading, so that errors do not add up.
    """
    records = []
    pieces = [(0, len(path.points) - 1)]
    while pieces:
        first, last = pieces.pop()
        arcs, deviation = _biarc(path, first, last)
        if deviation > _TOLERANCE and last - first > 1:
            middle = (first + last) // 2
            pieces += [(middle, last), (first, middle)]
            continue
        records += [_record(*arc) for arc in arcs]
    return records


def _biarc(path: LanePath, first: int, last: int) -> tuple[list[tuple[np.ndarray, float, float]], float]:
    """Connects two points of a path by two arcs without a kink.

    Returns:
        Start pose [3], curvature and length of each arc, and the largest distance of the points between from them.
    """
    start, stop = path.points[first], path.points[last]
    ahead, away = (np.array([np.cos(path.yaw[k]), np.sin(path.yaw[k])]) for k in (first, last))
    chord = stop - start
    # The arcs whose two tangent lengths are equal, see R. Juckett, "Biarc interpolation", 2014.
    along, square = chord @ (ahead + away), chord @ chord
    reach = square / (along + np.sqrt(along**2 + 2 * (1 - ahead @ away) * square))
    joint = (start + stop + reach * (ahead - away)) / 2
    curvature, length = _arc(start, path.yaw[first], joint)
    turned = path.yaw[first] + curvature * length
    rest = _arc(joint, turned, stop)
    arcs = [(np.array([*start, path.yaw[first]]), curvature, length), (np.array([*joint, turned]), *rest)]
    if abs(rest[0] - curvature) < _STRAIGHT:  # one arc
        arcs = [(arcs[0][0], curvature, length + rest[1])]
    points = path.points[first + 1 : last]
    on_first = (points - joint) @ [np.cos(turned), np.sin(turned)] < 0
    apart = np.where(on_first, _distance(points, *arcs[0][:2]), _distance(points, *arcs[-1][:2]))
    return arcs, float(apart.max(initial=0.0))


def _local(points: np.ndarray, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the coordinates of points [..., 2] ahead of and left of a pose [3]."""
    cos, sin = np.cos(pose[2]), np.sin(pose[2])
    x, y = points[..., 0] - pose[0], points[..., 1] - pose[1]
    return cos * x + sin * y, cos * y - sin * x


def _arc(start: np.ndarray, yaw: float, stop: np.ndarray) -> tuple[float, float]:
    """Returns curvature and length of the arc that leaves a point with a heading and meets another point."""
    x, y = _local(stop, np.array([*start, yaw]))
    curvature = float(2 * y / (x**2 + y**2))
    return (curvature, float(2 * np.arctan2(y, x) / curvature)) if abs(curvature) > _STRAIGHT else (0.0, float(x))


def _distance(points: np.ndarray, pose: np.ndarray, curvature: float) -> np.ndarray:
    """Returns the distances of points [P, 2] from the circle or line through a pose [3]."""
    x, y = _local(points, pose)
    power = curvature * (x**2 + y**2) - 2 * y
    return np.asarray(abs(power) / (1 + np.sqrt(np.maximum(1 + curvature * power, 0.0))))


def _record(pose: np.ndarray, curvature: float, length: float) -> dict[str, Any]:
    """Makes the record of one arc or straight line; the two other segments of the record have no length."""
    turn = curvature * length
    chord = length * np.sinc(turn / (2 * np.pi))
    end = pose + np.array([chord * np.cos(pose[2] + turn / 2), chord * np.sin(pose[2] + turn / 2), turn])
    start_pose, end_pose = (
        [*np.round(p[:2], 6).tolist(), round(float((p[2] + np.pi) % (2 * np.pi) - np.pi), 9)] for p in (pose, end)
    )
    length = round(length, 6)
    return {
        "start_pose": start_pose,
        "end_pose": end_pose,
        "shape": "RSR" if curvature < 0 else "LSL",
        "radius": round(1 / abs(curvature), 6) if curvature else 1e3,  # a straight line has none
        "segment_length": [length, 0.0, 0.0] if curvature else [0.0, length, 0.0],
    }
