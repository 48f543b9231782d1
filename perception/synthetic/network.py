"""Draws road networks of the synthetic town: roads and junctions with their paint and map layers.

Surfaces are unions of strips between stations and offsets of roads. A morphological closing rounds the corners of
junctions. Road segments come from one noding of the outline with all cut lines, so that neighbours share their edges
exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import shapely
from shapely.geometry import LineString, Point, Polygon
from shapely.geometry.base import BaseGeometry
from shapely.ops import polygonize, unary_union

from perception.synthetic.roads import PAINT_HALF, Arm, Crossing, Junction, Lane, Network, Road, Section

_REACH = 250.0  # length of centre lines from the origin, metres


def _centre_line(rng: np.random.Generator, kind: str, back: float, ahead: float) -> np.ndarray:
    """Draws a centre line [P, 2] through the origin with heading 0 there, in 1 m steps, with gradual curvature."""
    s = np.arange(-back, ahead + 0.5)
    curvature = np.zeros_like(s)
    # Every road is straight near the origin, where a junction may be.
    if kind != "straight":
        for side in (-1, 1):
            radius = rng.uniform(45, 160)
            turn = rng.uniform(0.35, 1.0) * rng.choice([-1, 1])
            begin = rng.uniform(14, 45)
            length = radius * abs(turn)
            into = abs(s) - begin
            bend = np.clip(np.minimum(into, length - into) / 8, 0, 1)
            if kind == "s-bend":
                into = into - length - rng.uniform(0, 15)
                bend -= np.clip(np.minimum(into, length - into) / 8, 0, 1)
            curvature += np.where(np.sign(s) == side, bend * np.sign(turn) / radius, 0)
    zero = int(np.argmin(abs(s)))
    heading = np.concatenate([[0.0], np.cumsum((curvature[1:] + curvature[:-1]) / 2)])
    heading -= heading[zero]
    middle = (heading[1:] + heading[:-1]) / 2
    steps = np.stack([np.cos(middle), np.sin(middle)], axis=1)
    line = np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])
    return line - line[zero]


def _cross_section(rng: np.random.Generator, *, main: bool) -> dict[str, Any]:
    """Draws the number and width of lanes, the gap and the parking strips of one road."""
    one_way = rng.random() < (0.2 if main else 0.25)
    forward = int(rng.choice([1, 2, 3], p=[0.35, 0.45, 0.2] if main else [0.6, 0.32, 0.08]))
    if one_way and forward == 1:
        forward = 2
    backward = 0 if one_way else int(np.clip(forward + rng.choice([-1, 0, 1], p=[0.1, 0.8, 0.1]), 1, 3))
    gap = float(rng.uniform(1.8, 3.2)) if not one_way and rng.random() < 0.3 else 0.0
    parking = tuple(float(rng.uniform(2.5, 2.8)) if rng.random() < 0.45 else 0.0 for _ in range(2))
    return dict(
        forward=forward, backward=backward, lane_width=float(rng.uniform(2.95, 3.7)), gap=gap, parking=parking
    )  # fmt: skip


def _draw_roads(rng: np.random.Generator) -> tuple[list[Road], list[tuple[float, int, float]]]:
    """Draws a main road and its side roads: the roads and the meetings (main station, side road, side station)."""
    kind = str(rng.choice(["straight", "curve", "s-bend"], p=[0.4, 0.35, 0.25]))
    roads = [Road(line=_centre_line(rng, kind, _REACH, _REACH), **_cross_section(rng, main=True))]
    layout = str(rng.choice(["road", "cross", "tee", "tee+tee", "cross+tee"], p=[0.14, 0.36, 0.2, 0.14, 0.16]))
    two = [-rng.uniform(36, 46), rng.uniform(36, 46)]
    stations: list[float] = {"road": [], "cross": [0.0], "tee": [0.0]}.get(layout, two)
    kinds = ["cross" if "cross" in layout and i == 0 else "tee" for i in range(len(stations))]
    meetings = []
    for along, what in zip(stations, kinds, strict=True):
        line = _centre_line(rng, str(rng.choice(["straight", "curve"])), _REACH if what == "cross" else 0.0, _REACH)
        side = 1 if what == "cross" else int(rng.choice([-1, 1]))
        station = _REACH + along
        angle = roads[0].heading(station) + side * np.pi / 2 + np.radians(rng.uniform(-20, 20))
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        roads.append(Road(line=line @ turn.T + roads[0].point(station, 0.0), **_cross_section(rng, main=False)))
        meetings.append((station, len(roads) - 1, _REACH if what == "cross" else 0.0))
    return roads, meetings


def _meets_cleanly(strips: list[Polygon], roads: list[Road], meetings: list) -> bool:
    """Returns whether roads touch each other only at their meetings and no road intersects itself."""
    if not all(strip.is_valid for strip in strips):
        return False
    for i in range(len(strips)):
        for j in range(i):
            near = [roads[0].point(m[0], 0.0) for m in meetings if j == 0 and m[1] == i]
            common = strips[i].intersection(strips[j])
            if near:
                common = common.difference(Point(near[0]).buffer(35))
            if common.intersection(Point(0, 0).buffer(PAINT_HALF * 1.42)).area > 0:
                return False
            if not near and strips[i].distance(strips[j]) < 25:
                return False
    return True


def _cut_station(road: Road, surface: Polygon, station: float, sign: int) -> float:
    """Returns the station at which an arm leaves its junction: the first where the asphalt is as wide as the road."""
    for distance in np.arange(3.0, 60.0, 0.5):
        s = station + sign * distance
        across = LineString(road.point(s, [road.right - 12.0, road.left + 12.0]))
        if across.intersection(surface).length < road.left - road.right + 0.03:
            return s + sign * 0.5
    return station + sign * 60.0


def _dashes(road: Road, start: float, stop: float, o: float, width: float, dash: tuple[float, float]) -> list[Polygon]:
    """Makes a painted line at offset `o`: `dash` is (paint, pause) in metres, pause 0 for a solid line."""
    if dash[1] == 0:
        return [road.strip(start, stop, o - width / 2, o + width / 2)]
    begins = np.arange(start, stop - 0.5, sum(dash))
    return [road.strip(s, min(s + dash[0], stop), o - width / 2, o + width / 2) for s in begins]


def _bay(rng: np.random.Generator, road: Road, run: tuple[float, float], side: int) -> Polygon:
    """Draws a bus bay of 28 to 45 m at one edge, with smooth tapers."""
    length = min(float(rng.uniform(28, 45)), run[1] - run[0] - 2)
    s = np.linspace(0, length, 60)
    ramp = np.clip(np.minimum(s, length - s) / 9, 0, 1)
    depth = 2.9 * ramp**2 * (3 - 2 * ramp)
    start = rng.uniform(run[0] + 1, run[1] - 1 - length)
    outer = road.point(start + s, road.edge(side) + side * depth)
    inner = road.point(start + s[::-1], road.edge(side) - side * 0.6)
    return Polygon(np.concatenate([outer, inner])).buffer(0)


class _Painter:
    """Collects the paint, map layers, islands and bays of all roads."""

    def __init__(self, rng: np.random.Generator, roads: list[Road]) -> None:
        self.rng, self.roads = rng, roads
        self.markings: list[tuple[Polygon, str]] = []
        self.crossings: list[Crossing] = []
        self.islands: list[Polygon] = []
        self.bays: list[Polygon] = []
        self.parking: list[Polygon] = []
        self.sections: list[Section] = []
        self.lanes: list[Lane] = []  # one per polygon of layers["lane"]
        self.layers: dict[str, list] = {
            name: [] for name in ("lane", "ped_crossing", "road_divider", "lane_divider", "stop_line", "carpark_area")
        }
        self.line_width = float(rng.uniform(0.13, 0.2))
        self.zebra_bar = float(rng.uniform(0.4, 0.6))
        self.center_color = "yellow" if rng.random() < 0.65 else "white"

    def crossing(self, index: int, start: float, stop: float) -> None:
        """Adds a zebra crossing between two stations."""
        road, bar = self.roads[index], self.zebra_bar
        polygon = road.strip(start, stop, road.right, road.left)
        self.crossings.append(Crossing(index, start, stop, polygon))
        self.layers["ped_crossing"].append(polygon)
        for o in np.arange(road.right + 0.3, road.left - 0.2, 2 * bar):
            self.markings.append((road.strip(start, stop, o, min(o + bar, road.left - 0.1)), "white"))

    def stop_line(self, index: int, s: float, direction: int) -> None:
        """Adds a stop line for the traffic in `direction`, its far edge at station `s`."""
        road = self.roads[index]
        if not road.lanes(direction):
            return
        inner = road.split - direction * (road.gap / 2 + 0.1)
        outer = road.split - direction * (road.gap / 2 + road.lanes(direction) * road.lane_width - 0.1)
        polygon = road.strip(min(s, s - direction * 0.4), max(s, s - direction * 0.4), inner, outer)
        self.layers["stop_line"].append(polygon)
        self.markings.append((polygon, "white"))

    def section(
        self, index: int, start: float, stop: float, at_start: bool, at_stop: bool, reach: tuple[float, float]
    ) -> None:
        """Adds lanes, crossings, stop lines and clear runs of one section of a road.

        Args:
            index: the road.
            start, stop: stations of the section.
            at_start, at_stop: whether there is a junction at this end.
            reach: stations between which the section may have an additional crossing.
        """
        rng, road = self.rng, self.roads[index]
        ends = [start, stop]
        for end, has_junction in enumerate((at_start, at_stop)):
            if not has_junction:
                continue
            inward = 1 if end == 0 else -1
            s = ends[end] + inward * 0.4
            if rng.random() < 0.72:
                width = rng.uniform(2.8, 4.5)
                self.crossing(index, min(s, s + inward * width), max(s, s + inward * width))
                s += inward * (width + 1.0)
            self.stop_line(index, s, -inward)
            ends[end] = s + inward * 0.6
        runs = [(ends[0], ends[1])]
        low, high = max(ends[0], reach[0]), min(ends[1], reach[1])
        if high - low > 60 and rng.random() < (0.65 if index == 0 else 0.3):
            middle, width = rng.uniform(low + 22, high - 22), rng.uniform(2.8, 4.5)
            self.crossing(index, middle - width / 2, middle + width / 2)
            for direction in (1, -1):
                self.stop_line(index, middle - direction * (width / 2 + 1.0), direction)
            runs = [(ends[0], middle - width / 2 - 1.6), (middle + width / 2 + 1.6, ends[1])]
        self.sections.append(Section(index, start, stop, tuple(runs)))
        for direction in (1, -1):
            for lane in range(road.lanes(direction)):
                o, half = road.lane_center(direction, lane), road.lane_width / 2
                self.layers["lane"].append(road.strip(start, stop, o - half, o + half))
                self.lanes.append(Lane(index, start, stop, direction, lane))
        lane_dash = (3.0, float(rng.uniform(3, 6)))
        for run in runs:
            if run[1] - run[0] > 3:
                self.run(index, run, lane_dash, (at_start or run[0] > runs[0][0], at_stop or run[1] < runs[-1][1]))

    def run(
        self, index: int, run: tuple[float, float], lane_dash: tuple[float, float], closed: tuple[bool, bool]
    ) -> None:
        """Adds dividers, islands, parking strips and bays of one clear run; `closed` ends have a stop line."""
        rng, road, width = self.rng, self.roads[index], self.line_width
        for direction in (1, -1):
            for lane in range(1, road.lanes(direction)):
                o = road.split - direction * (road.gap / 2 + lane * road.lane_width)
                self.layers["lane_divider"].append(LineString(road.along(*run, o)))
                # The line is solid in the last metres before a stop line.
                solid = min(16.0, (run[1] - run[0]) / 2) if closed[1 if direction > 0 else 0] else 0.0
                dashed = (run[0], run[1] - solid) if direction > 0 else (run[0] + solid, run[1])
                paint = _dashes(road, *dashed, o, width, lane_dash)
                if solid:
                    rest = (dashed[1], run[1]) if direction > 0 else (run[0], dashed[0])
                    paint += _dashes(road, *rest, o, width, (1.0, 0.0))
                self.markings += [(polygon, "white") for polygon in paint]
        if road.backward:
            self._middle(index, run, lane_dash)
        for side in (-1, 1):
            strip = road.parking[0 if side < 0 else 1]
            if strip and run[1] - run[0] > 14:
                edge = road.edge(side)
                polygon = road.strip(run[0] + 4, run[1] - 4, edge, edge - side * (strip - 0.1))
                self.parking.append(polygon)
                self.layers["carpark_area"].append(polygon)
            elif not strip and run[1] - run[0] > 40 and road.lanes(-side) and rng.random() < 0.3:
                self.bays.append(_bay(rng, road, run, side))

    def _middle(self, index: int, run: tuple[float, float], lane_dash: tuple[float, float]) -> None:
        """Adds the separation of the directions: one line, or a gap with an island and a line at each of its edges."""
        rng, road, width = self.rng, self.roads[index], self.line_width
        pieces, offsets = [run], [0.0]
        if road.gap:
            offsets = [-road.gap / 2, road.gap / 2]
            length = run[1] - run[0]
            if length > 14 and rng.random() < 0.85:
                share = 1.0 if rng.random() < 0.5 else rng.uniform(0.3, 0.7)
                low = run[0] + 1.5 + (1 - share) * rng.uniform(0, length - 6)
                high = min(low + share * length, run[1] - 1.5)
                half = road.gap / 2 - 0.25
                if high - low > 8:
                    core = road.strip(low + half, high - half, road.split - 0.02, road.split + 0.02)
                    self.islands.append(core.buffer(half - 0.02, quad_segs=6))
                    pieces = [(run[0], low - 0.5), (high + 0.5, run[1])]
        dash = lane_dash if self.center_color == "white" and road.forward == 1 and not road.gap else (1.0, 0.0)
        for piece in pieces:
            if piece[1] - piece[0] < 5:
                continue
            for o in offsets:
                self.layers["road_divider"].append(LineString(road.along(*piece, road.split + o)))
                self.markings += [(p, self.center_color) for p in _dashes(road, *piece, road.split + o, width, dash)]


def make_network(rng: np.random.Generator, tile: Polygon, paint: Polygon) -> Network:
    """Draws a road network.

    Args:
        rng: source of all randomness.
        tile: square to which the map layers are clipped, district frame.
        paint: larger square to which surfaces and paint are clipped.

    Returns:
        A network whose road segments cover `surface` within the tile without overlap and share edges exactly.
    """
    for _ in range(200):
        roads, meetings = _draw_roads(rng)
        strips = [road.strip(0.0, road.length, road.right, road.left) for road in roads]
        if _meets_cleanly(strips, roads, meetings):
            break
    else:
        raise AssertionError("no valid road network in 200 draws")

    surface = unary_union(strips)
    centers = [roads[0].point(station, 0.0) for station, _, _ in meetings]
    for center in centers:
        radius, around = rng.uniform(4.5, 9.0), Point(center).buffer(60)
        corner = surface.intersection(around).buffer(radius, quad_segs=12).buffer(-radius, quad_segs=12)
        surface = surface.union(corner.intersection(Point(center).buffer(45)))
    # Rounding errors leave thin cracks between the corners and the strips.
    surface = surface.buffer(0.01, join_style="mitre").buffer(-0.01, join_style="mitre")

    junctions: list[Junction] = []
    cuts: dict[int, list[tuple[float, int]]] = {index: [] for index in range(len(roads))}
    for (station, side_road, side_station), center in zip(meetings, centers, strict=True):
        arms = []
        for index, at in ((0, station), (side_road, side_station)):
            for sign in (1, -1):
                if 0 < at + sign * 20 < roads[index].length:
                    arms.append(Arm(index, sign, _cut_station(roads[index], surface, at, sign)))
                    cuts[index].append((arms[-1].cut, sign))
        junctions.append(Junction(center, tuple(arms)))

    painter = _Painter(rng, roads)
    for index, road in enumerate(roads):
        # Cuts alternate along the road: a section starts at an arm of sign +1 and stops at one of sign -1.
        marks = sorted(cuts[index])
        starts = [(0.0, False)] if not marks or marks[0][1] < 0 else []
        starts += [(s, True) for s, sign in marks if sign > 0]
        stops = [(s, True) for s, sign in marks if sign < 0] + [(road.length, False)]
        origin = _REACH if index == 0 or starts[0][0] == 0.0 else 0.0
        for (start, at_start), (stop, at_stop) in zip(starts, stops, strict=True):
            painter.section(index, start, stop, at_start, at_stop, (origin - 85, origin + 85))

    walkway_width = float(rng.uniform(2.6, 4.5))
    outline = unary_union([surface, *painter.bays]).intersection(paint)
    walkable = outline.buffer(walkway_width, quad_segs=8).intersection(paint)
    surface = shapely.set_precision(outline.difference(unary_union(painter.islands)).simplify(0.004), 1e-3)
    cut_lines = [
        LineString(roads[arm.road].point(arm.cut, [roads[arm.road].right - 0.5, roads[arm.road].left + 0.5]))
        for junction in junctions
        for arm in junction.arms
    ]
    walkways = [piece for piece in _polygons(walkable.difference(outline)) if piece.area > 2]
    layers, sources = _clip_layers(painter.layers, surface, walkways, cut_lines, tile)
    flags = tuple(any(piece.contains(Point(center)) for center in centers) for piece in layers["road_segment"])
    return Network(
        roads, junctions, painter.sections, painter.crossings, surface, painter.islands, walkways, walkway_width,
        [piece for area in painter.parking for piece in _polygons(area.intersection(paint))],
        [(p, color) for marking, color in painter.markings for p in _polygons(marking.intersection(paint))],
        layers, flags, tuple(painter.lanes[source] for source in sources),
    )  # fmt: skip


def _polygons(geometry: BaseGeometry) -> list[Polygon]:
    """Lists the polygons of a geometry."""
    return [part for part in getattr(geometry, "geoms", [geometry]) if isinstance(part, Polygon) and not part.is_empty]


def _clip_layers(
    layers: dict, surface: Polygon, walkways: list, cut_lines: list, tile: Polygon
) -> tuple[dict[str, list], list[int]]:
    """Clips all layers to the tile and makes the road segments by one noding of outline and cut lines.

    Returns:
        The clipped layers, and for each clipped lane the index of the lane before clipping.
    """
    linework = unary_union([surface.boundary, tile.boundary, *cut_lines])
    within = surface.intersection(tile)
    pieces = [piece for piece in polygonize(linework) if within.contains(piece.representative_point())]
    # Lanes stay a centimetre inside their road segment, so that they do not change the road's outline.
    inside = unary_union([piece.buffer(-0.01, join_style="mitre") for piece in pieces])
    clipped: dict[str, list] = {"road_segment": pieces, "drivable_area": _polygons(unary_union(pieces))}
    sources: list[int] = []
    for name, geometries in {**layers, "walkway": walkways}.items():
        region = inside if name == "lane" else tile
        cut = [geometry.intersection(region) for geometry in geometries]
        parts = [(k, part) for k, geometry in enumerate(cut) for part in getattr(geometry, "geoms", [geometry])]
        kept = [(k, part) for k, part in parts if part.area > 0.05 or (part.length > 1 and part.area == 0)]
        clipped[name] = [part for _, part in kept]
        if name == "lane":
            sources = [k for k, _ in kept]
    return clipped, sources
