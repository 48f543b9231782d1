"""Roads of the synthetic town: centre lines with a cross-section, junctions, lanes, and the network of them.

Everything is in the district's frame: the main road passes the origin along +x, traffic keeps to the right.
`town.make_district` rotates, mirrors (for left-hand traffic) and moves the result into the map.

A road is a centre line with arc length `s` (station) and lateral offset `o` (left of the line is positive).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike
from shapely.geometry import LineString, MultiPolygon, Polygon

# Half edge (m) of the axis-aligned square of the map layers, and of the larger square of surfaces and paint.
TILE_HALF = 125.0
PAINT_HALF = 172.0


@dataclass(frozen=True, eq=False)
class Road:
    """Centre line and cross-section of a road, in metres.

    The cross-section has, from right to left: parking, forward lanes, gap, backward lanes, parking.
    """

    line: np.ndarray  # [P, 2], steps of about 1 m
    forward: int  # lanes along the line's direction, right of the split
    backward: int  # lanes against it, 0 for a one-way road
    lane_width: float
    gap: float  # between the two directions; 0 if only a line separates them
    parking: tuple[float, float]  # widths of the parking strips at the right and at the left edge, 0 for none
    arc: np.ndarray = field(init=False)
    normal: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        steps = np.linalg.norm(np.diff(self.line, axis=0), axis=1)
        tangent = np.gradient(self.line, axis=0)
        tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
        object.__setattr__(self, "arc", np.concatenate([[0.0], np.cumsum(steps)]))
        object.__setattr__(self, "normal", np.stack([-tangent[:, 1], tangent[:, 0]], axis=1))

    @property
    def length(self) -> float:
        """Arc length of the centre line."""
        return float(self.arc[-1])

    @property
    def split(self) -> float:
        """Offset of the middle between the two directions. A one-way road is centred on its line."""
        return 0.0 if self.backward else self.forward * self.lane_width / 2

    @property
    def right(self) -> float:
        """Offset of the right edge (negative)."""
        return self.split - self.gap / 2 - self.forward * self.lane_width - self.parking[0]

    @property
    def left(self) -> float:
        """Offset of the left edge (positive)."""
        return self.split + self.gap / 2 + self.backward * self.lane_width + self.parking[1]

    def edge(self, side: int) -> float:
        """Returns the offset of the edge at `side`: -1 right, +1 left."""
        return self.left if side > 0 else self.right

    def lanes(self, direction: int) -> int:
        """Returns the number of lanes in the direction of the line (+1) or against it (-1)."""
        return self.forward if direction > 0 else self.backward

    def lane_center(self, direction: int, lane: int) -> float:
        """Returns the offset of a lane's centre; lane 0 is the innermost of its direction."""
        return self.split - direction * (self.gap / 2 + (lane + 0.5) * self.lane_width)

    def point(self, s: ArrayLike, o: ArrayLike) -> np.ndarray:
        """Returns positions [..., 2] at stations `s` and offsets `o` (broadcast)."""
        s, o = np.broadcast_arrays(np.asarray(s, dtype=np.float64), np.asarray(o, dtype=np.float64))
        normal = np.stack([np.interp(s, self.arc, self.normal[:, d]) for d in range(2)], axis=-1)
        normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
        return np.stack([np.interp(s, self.arc, self.line[:, d]) for d in range(2)], axis=-1) + o[..., None] * normal

    def heading(self, s: float) -> float:
        """Returns the direction of the line at station `s`, radians."""
        normal = self.point(s, 1.0) - self.point(s, 0.0)
        return float(np.arctan2(-normal[0], normal[1]))

    def along(self, s0: float, s1: float, o: float) -> np.ndarray:
        """Returns the line [P, 2] at offset `o` from station `s0` to `s1` (either order), simplified to 2 mm."""
        low, high = min(s0, s1), max(s0, s1)
        inner = self.arc[(self.arc > low + 0.2) & (self.arc < high - 0.2)]
        line = self.point(np.concatenate([[low], inner, [high]]), o)
        line = np.asarray(LineString(line).simplify(0.002).coords)
        return line if s0 <= s1 else line[::-1]

    def strip(self, s0: float, s1: float, o0: float, o1: float) -> Polygon:
        """Returns the area between two stations and two offsets."""
        return Polygon(np.concatenate([self.along(s0, s1, o0), self.along(s1, s0, o1)]))


@dataclass(frozen=True)
class Arm:
    """A road that leaves a junction."""

    road: int
    sign: int  # +1 towards growing stations, -1 towards falling ones
    cut: float  # station at which the arm leaves the junction


@dataclass(frozen=True, eq=False)
class Junction:
    """A junction and the roads that leave it."""

    center: np.ndarray  # [2]
    arms: tuple[Arm, ...]


@dataclass(frozen=True, eq=False)
class Section:
    """A section of road between two junctions (or the end of the road), with its clear runs between crossings."""

    road: int
    start: float
    stop: float
    runs: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Lane:
    """A lane of a section; lane 0 is the innermost of its direction."""

    road: int
    start: float  # station of the section's start
    stop: float
    direction: int  # +1 along the road's line, -1 against it
    number: int


@dataclass(frozen=True, eq=False)
class Crossing:
    """A pedestrian crossing between two stations of a road."""

    road: int
    start: float
    stop: float
    polygon: Polygon


@dataclass(frozen=True, eq=False)
class Network:
    """Roads with their paint and map layers. `layers` are clipped to the tile; the other fields extend beyond it."""

    roads: list[Road]
    junctions: list[Junction]
    sections: list[Section]
    crossings: list[Crossing]
    surface: Polygon | MultiPolygon  # all asphalt, islands are holes
    islands: list[Polygon]
    walkways: list[Polygon]
    walkway_width: float
    parking: list[Polygon]
    markings: list[tuple[Polygon, str]]
    layers: dict[str, list]
    intersections: tuple[bool, ...]
    lanes: tuple[Lane, ...]  # one per polygon of layers["lane"]
