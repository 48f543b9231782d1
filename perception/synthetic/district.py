"""Districts of the synthetic town: the world of one scene.

A district is a road network of about 220 x 220 m with its buildings, plants, markings and actors. All geometry is in
global map metres, float64, on flat ground z = 0; yaw turns from +x to +y. The same seed gives the same district.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from shapely.geometry import Polygon
from shapely.geometry.base import BaseGeometry

# Below this speed (m/s) an actor counts as stationary.
STATIONARY_SPEED = 0.2


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Pose over time: linear between samples, constant before the first and after the last.

    Args:
        times: [T] seconds from the scene's start, increasing; T = 1 for an actor that never moves.
        xy: [T, 2] global metres.
        yaw: [T] radians, unwrapped (no jumps of 2 pi), so that it can be interpolated.
    """

    times: np.ndarray
    xy: np.ndarray
    yaw: np.ndarray

    @property
    def static(self) -> bool:
        """True if there is only one sample."""
        return len(self.times) == 1

    def at(self, t: float) -> tuple[np.ndarray, float]:
        """Returns position [2] in global metres and yaw in radians at time `t` seconds."""
        row = int(self.times.searchsorted(t, "right"))  # of the first sample after t
        if row in (0, len(self.times)):
            row = max(row - 1, 0)
            return self.xy[row].copy(), float(self.yaw[row])
        span, since = self.times[row] - self.times[row - 1], t - self.times[row - 1]
        xy = (self.xy[row] - self.xy[row - 1]) / span * since + self.xy[row - 1]
        return xy, float((self.yaw[row] - self.yaw[row - 1]) / span * since + self.yaw[row - 1])

    def velocity(self, t: float, half_step: float = 0.05) -> np.ndarray:
        """Returns the velocity [2] in m/s along global x and y, by central difference over `2 * half_step` seconds."""
        if self.static:
            return np.zeros(2)
        low, high = max(t - half_step, self.times[0]), min(t + half_step, self.times[-1])
        if high <= low:
            return np.zeros(2)
        return (self.at(high)[0] - self.at(low)[0]) / (high - low)


@dataclass(frozen=True, eq=False)
class Actor:
    """An object with a 3D box.

    Args:
        name: unique within the district.
        category: nuScenes category, such as `vehicle.car` or `human.pedestrian.adult`.
        size: length (along the heading), width, height in metres; a barrier is short and wide.
        color: RGB, 0..1.
        trajectory: of the centre of the footprint.
        rider: whether a bicycle or motorcycle has a rider.
    """

    name: str
    category: str
    size: tuple[float, float, float]
    color: tuple[float, float, float]
    trajectory: Trajectory
    rider: bool = False

    def attribute(self, t: float) -> str:
        """Returns the nuScenes attribute at time `t`, '' for cones and barriers.

        A vehicle that never moves is parked.
        """
        moving = bool(np.linalg.norm(self.trajectory.velocity(t)) > STATIONARY_SPEED)
        if self.category in ("vehicle.bicycle", "vehicle.motorcycle"):
            return "cycle.with_rider" if self.rider else "cycle.without_rider"
        if self.category.startswith("human.pedestrian"):
            return "pedestrian.moving" if moving else "pedestrian.standing"
        if self.category.startswith("vehicle"):
            if moving:
                return "vehicle.moving"
            return "vehicle.parked" if self.trajectory.static else "vehicle.stopped"
        return ""


@dataclass(frozen=True, eq=False)
class Building:
    """A block with vertical walls. `window_seed` selects the pattern of its windows."""

    footprint: np.ndarray  # [P, 2] counter-clockwise, first point not repeated
    height: float
    color: tuple[float, float, float]
    window_seed: int


@dataclass(frozen=True, eq=False)
class Tree:
    """A trunk (cylinder) with a round crown on top."""

    xy: np.ndarray  # [2]
    trunk_height: float
    trunk_radius: float
    crown_radius: float


@dataclass(frozen=True, eq=False)
class Pole:
    """A vertical cylinder: a lamp post or a sign post."""

    xy: np.ndarray  # [2]
    height: float
    radius: float


@dataclass(frozen=True, eq=False)
class Surface:
    """An area of ground. Surfaces are drawn in list order: later ones cover earlier ones.

    `material` is one of 'grass', 'walkway', 'asphalt', 'parking', 'concrete'.
    """

    polygon: Polygon
    material: str


@dataclass(frozen=True, eq=False)
class Marking:
    """Road paint ('white' or 'yellow') on top of all surfaces. Every dash and every zebra bar is one polygon."""

    polygon: Polygon
    color: str


@dataclass(frozen=True, eq=False)
class Kerb:
    """Centre line of kerb stones along the road's boundary; a closed line repeats its first point last."""

    line: np.ndarray  # [P, 2]


@dataclass(frozen=True, eq=False)
class Light:
    """Illumination of the whole scene. `sun_direction` is a unit vector from the ground towards the sun."""

    sun_direction: np.ndarray  # [3]
    sun_color: tuple[float, float, float]
    sky_color: tuple[float, float, float]
    ambient: float  # 0..1 share of ambient light
    fog_density: float  # 1/m: transmission over d metres is exp(-fog_density * d)
    exposure: float  # factor on brightness


@dataclass(frozen=True, eq=False)
class LanePath:
    """Centre of a lane or a lane connector, in driving direction, with its tangents."""

    points: np.ndarray  # [P, 2] metres, about 1 m apart
    yaw: np.ndarray  # [P] radians, unwrapped
    width: float  # metres

    def edge(self, row: int) -> np.ndarray:
        """Returns the line [2, 2] across the path at one of its points, from its left to its right side."""
        left = np.array([-np.sin(self.yaw[row]), np.cos(self.yaw[row])]) * self.width / 2
        return np.round([self.points[row] + left, self.points[row] - left], 4)


@dataclass(frozen=True, eq=False)
class LaneGraph:
    """Lanes and the connectors between them, which cross junctions."""

    lanes: tuple[LanePath, ...] = ()  # one per polygon of layers["lane"]
    connectors: tuple[LanePath, ...] = ()  # one per polygon of layers["lane_connector"]
    links: tuple[tuple[int, int], ...] = ()  # one per connector: the lanes before and after it


@dataclass(frozen=True, eq=False)
class District:
    """World of one scene. `layers` holds the shapely geometries of the nuScenes map layers by layer name."""

    seed: int
    location: str
    name: str
    layers: dict[str, list[BaseGeometry]]
    intersections: tuple[bool, ...]  # one per polygon of layers["road_segment"]
    surfaces: list[Surface]
    markings: list[Marking]
    kerbs: list[Kerb]
    buildings: list[Building]
    trees: list[Tree]
    poles: list[Pole]
    actors: list[Actor]
    ego: Trajectory
    light: Light
    duration: float
    lane_graph: LaneGraph = LaneGraph()
