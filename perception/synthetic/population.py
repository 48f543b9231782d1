"""Draws all actors that are not moving traffic: parked vehicles, yards, work sites, cycles, pedestrians.

Everything is in the district's frame (see `roads`). Actors are placed independently of each other;
`traffic.drop_collisions` removes overlaps at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely
from shapely.geometry import LineString, Polygon

from perception.synthetic.district import Actor, Trajectory
from perception.synthetic.roads import Network, Road
from perception.synthetic.traffic import STEP, draw_color, draw_size, stationary

# Category frequencies, first as in usual streets, then with frequent rare classes: vehicles along kerbs, and vehicles
# that fill a yard. Between them, the probability that a yard holds at least one vehicle of a category.
_KERB_MIX = (
    {"vehicle.car": 0.86, "vehicle.truck": 0.06, "vehicle.motorcycle": 0.05, "vehicle.bicycle": 0.03},
    {"vehicle.car": 0.3, "vehicle.truck": 0.25, "vehicle.bus.rigid": 0.15, "vehicle.motorcycle": 0.15,
     "vehicle.bicycle": 0.15},
)  # fmt: skip
_YARD_CHANCE = {"vehicle.construction": 0.75, "vehicle.trailer": 0.85, "vehicle.truck": 0.5, "vehicle.bus.rigid": 0.5}
_YARD_FILL = (
    {"vehicle.car": 0.8, "vehicle.truck": 0.12, "vehicle.construction": 0.08},
    {"vehicle.car": 0.1, "vehicle.truck": 0.2, "vehicle.construction": 0.25, "vehicle.trailer": 0.25,
     "vehicle.bus.rigid": 0.2},
)  # fmt: skip


def mix_frequencies(usual: dict[str, float], rare: dict[str, float], share: float) -> tuple[list[str], list[float]]:
    """Interpolates category frequencies: 1 - `share` of `usual` plus `share` of `rare`, which has all keys of `usual`.

    Returns:
        The categories and their probabilities.
    """
    chances = [(1 - share) * usual.get(category, 0.0) + share * chance for category, chance in rare.items()]
    return (list(rare), chances) if share else (list(usual), list(usual.values()))


@dataclass(eq=False)
class Population:
    """Draws actors near the ego vehicle's path and gives them unique names.

    Args:
        rng: source of all randomness.
        network: road network on which actors are placed.
        path: the ego vehicle's path [P, 2].
        duration: seconds of pedestrian motion.
        rare: frequency of rare vehicles, cycles and work sites, from 0 (as in usual streets) to 1 (many more).
    """

    rng: np.random.Generator
    network: Network
    path: np.ndarray
    duration: float
    rare: float = 0.0

    def __post_init__(self) -> None:
        self.ego_line = LineString(self.path)
        shapely.prepare(self.ego_line)
        self.walkable = shapely.union_all(self.network.walkways)
        shapely.prepare(self.walkable)
        self.counts: dict[str, int] = {}
        self.spots = [
            (section.road, run, s)
            for section in self.network.sections
            for run in section.runs
            for s in np.arange(run[0] + 2, run[1] - 2, 2.0)
            if self.ego_line.distance(shapely.Point(self.network.roads[section.road].point(s, 0.0))) < 42
        ]

    def actor(
        self,
        category: str,
        trajectory: Trajectory,
        size: tuple[float, float, float] | None = None,
        rider: bool = False,
    ) -> Actor:
        """Makes an actor with a random colour and, unless given, a random size."""
        self.counts[category] = self.counts.get(category, 0) + 1
        size = size or draw_size(self.rng, category)
        name = f"{category}-{self.counts[category]}"
        return Actor(name, category, size, draw_color(self.rng, category), trajectory, rider)

    def spot(self) -> tuple[Road, tuple[float, float], float]:
        """Draws a road, one of its clear runs and a station in it, near the path."""
        index, run, s = self.spots[self.rng.integers(len(self.spots))]
        return self.network.roads[index], run, float(s)

    def parked(self) -> list[Actor]:
        """Draws vehicles along the kerbs of all parking strips near the path."""
        rng, actors = self.rng, []
        categories, chances = mix_frequencies(*_KERB_MIX, self.rare)
        occupancy = rng.uniform(0.3, 0.8)
        for index, run in dict.fromkeys((index, run) for index, run, _ in self.spots):
            road = self.network.roads[index]
            for side in (-1, 1):
                strip = road.parking[0 if side < 0 else 1]
                s = run[0] + 5.0
                while strip and s < run[1] - 10:
                    category = str(rng.choice(categories, p=chances))
                    size = draw_size(rng, category)
                    middle = s + size[0] / 2
                    xy = road.point(middle, road.edge(side) - side * (0.25 + size[1] / 2 + rng.uniform(0, 0.15)))
                    s += size[0] + rng.uniform(0.8, 2.2)
                    near = self.ego_line.distance(shapely.Point(xy)) < 42
                    if near and s < run[1] - 4 and rng.random() < occupancy:
                        facing = 0.0 if side < 0 or not road.backward else np.pi
                        yaw = road.heading(middle) + facing + rng.normal(0, 0.025)
                        actors.append(self.actor(category, stationary(xy, yaw), size))
        return actors

    def yards(self, count: int) -> tuple[list[Polygon], list[Actor]]:
        """Draws yards behind the walkway with large vehicles side by side; barriers close some of them."""
        rng = self.rng
        yards: list[Polygon] = []
        actors: list[Actor] = []
        taken = shapely.union_all([self.network.surface, *self.network.islands, self.walkable]).buffer(0.3)
        filling, chances = mix_frequencies(*_YARD_FILL, self.rare)
        wanted = [category for category, chance in _YARD_CHANCE.items() if rng.random() < chance]
        rng.shuffle(wanted)
        for _ in range(60):
            if len(yards) == count:
                break
            road, _, s = self.spot()
            side, length, depth = int(rng.choice([-1, 1])), rng.uniform(17, 27), rng.uniform(15.5, 19)
            if not length < s < road.length - length:
                continue
            corner = road.point(s, road.edge(side) + side * (self.network.walkway_width + 0.8))
            along = np.array([np.cos(road.heading(s)), np.sin(road.heading(s))])
            out = side * np.array([-along[1], along[0]])
            half, back = along * length / 2, out * depth
            yard = Polygon([corner - half, corner + half, corner + half + back, corner - half + back])
            if yard.intersects(taken):
                continue
            taken = taken.union(yard.buffer(0.5))
            yards.append(yard)
            at = -length / 2 + 2.2
            inward = np.arctan2(out[1], out[0])
            while at < length / 2 - 2.2:
                category = wanted.pop() if wanted else str(rng.choice(filling, p=chances))
                size = draw_size(rng, category)
                yaw = inward + rng.normal(0, 0.04) + np.pi * rng.integers(2)
                xy = corner + (at + size[1] / 2 - 1) * along + (size[0] / 2 + rng.uniform(0.5, 1.2)) * out
                if size[0] + 1.5 < depth and (rng.random() < 0.75 or category != "vehicle.car"):
                    actors.append(self.actor(category, stationary(xy, yaw), size))
                at += size[1] + rng.uniform(0.9, 2.2)
            if rng.random() < 0.6:
                for a in np.arange(-length / 2 + 1.4, length / 2 - 4, 2.75)[: int(rng.integers(2, 8))]:
                    actors.append(
                        self.actor(
                            "movable_object.barrier",
                            stationary(corner + a * along - 0.25 * out, inward + rng.normal(0, 0.03)),
                        )
                    )
        return yards, actors

    def work_site(self) -> list[Actor]:
        """Draws cones and barriers around an outer lane, a parking strip or part of the walkway; none if none fit."""
        rng = self.rng
        for _ in range(40):
            road, run, s = self.spot()
            side, length = int(rng.choice([-1, 1])), rng.uniform(10, 24)
            direction = 1 if side < 0 or not road.backward else -1
            lanes, strip, edge = road.lanes(direction), road.parking[0 if side < 0 else 1], road.edge(side)
            if rng.random() < 0.35:
                inner, outer = edge + side * 0.5, edge + side * min(2.2, self.network.walkway_width - 0.6)
            elif strip:
                inner, outer = edge - side * (strip - 0.1), edge - side * 0.4
            elif lanes >= 2:
                inner, outer = edge - side * (road.lane_width - 0.3), edge - side * 0.4
            else:
                continue
            s0, s1 = (s, s + length)
            if s1 > run[1] - 1 or self.ego_line.distance(road.strip(s0 - 4, s1 + 4, inner, outer)) < 1.6:
                continue
            heading = road.heading((s0 + s1) / 2)
            actors = []
            style = str(rng.choice(["cones", "barriers", "both"], p=[0.35, 0.2, 0.45]))
            if style != "barriers":
                for at in np.arange(s0, s1 + 0.1, rng.uniform(2.2, 4.0)):
                    # The first and last cones taper towards the kerb.
                    taper = np.clip(min(at - s0, s1 - at) / 5, 0, 1)
                    xy = road.point(at, outer + (inner - outer) * taper) + rng.normal(0, 0.06, 2)
                    actors.append(self.actor("movable_object.trafficcone", stationary(xy, rng.uniform(-np.pi, np.pi))))
            if style != "cones":
                shift = 0.0 if style == "barriers" else side * 0.9
                for at in np.arange(s0 + 2.5, s1 - 2, 2.7)[: int(rng.integers(2, 8))]:
                    xy, yaw = road.point(at, inner + shift), road.heading(at) + np.pi / 2 + rng.normal(0, 0.05)
                    actors.append(self.actor("movable_object.barrier", stationary(xy, yaw)))
            if abs(outer - inner) > 2.4 and length > 16 and rng.random() < 0.5:
                size = draw_size(rng, "vehicle.construction")
                xy = road.point((s0 + s1) / 2, outer - side * size[1] / 2)
                actors.append(self.actor("vehicle.construction", stationary(xy, heading + rng.normal(0, 0.05)), size))
            for _ in range(int(rng.integers(0, 4))):
                low, high = sorted((outer, edge + side * 1.5))
                xy = road.point(rng.uniform(s0 + 2, s1 - 2), rng.uniform(low, high))
                pose = stationary(xy, rng.uniform(-np.pi, np.pi))
                actors.append(self.actor("human.pedestrian.construction_worker", pose))
            return actors
        return []

    def cycles(self) -> list[Actor]:
        """Draws groups of parked bicycles and motorcycles on the house side of the walkway."""
        rng, actors = self.rng, []
        for category, most in (("vehicle.bicycle", 5), ("vehicle.motorcycle", 4)) * (1 + round(3 * self.rare)):
            if rng.random() > 0.7:
                continue
            road, run, s = self.spot()
            side = int(rng.choice([-1, 1]))
            for k in range(int(rng.integers(1, most))):
                at = s + k * rng.uniform(0.85, 1.3)
                xy = road.point(at, road.edge(side) + side * (self.network.walkway_width - 1.1))
                if at < run[1] and self.walkable.contains(shapely.Point(xy)):
                    yaw = road.heading(at) + np.pi / 2 + rng.normal(0, 0.12)
                    actors.append(self.actor(category, stationary(xy, yaw)))
        return actors

    def pedestrians(self, count: int) -> list[Actor]:
        """Draws pedestrians on the walkways, alone or in pairs, walking or standing."""
        rng = self.rng
        actors: list[Actor] = []
        for _ in range(count * 4):
            if len(actors) >= count:
                break
            road, run, s = self.spot()
            side, way = int(rng.choice([-1, 1])), int(rng.choice([-1, 1]))
            o = road.edge(side) + side * rng.uniform(1.4, self.network.walkway_width - 0.5)
            speed = float(rng.uniform(0.8, 1.8)) if rng.random() < 0.75 else 0.0
            end = float(np.clip(s + way * speed * self.duration, run[0], run[1]))
            child = rng.random() < 0.08
            for mate in range(2 if rng.random() < 0.3 else 1):
                category = "human.pedestrian.child" if child and mate else "human.pedestrian.adult"
                lane = o - side * 0.85 * mate
                line = road.along(s, end, lane) if abs(end - s) > 0.5 else road.point([s], lane)
                if not all(self.walkable.contains(shapely.Point(p)) for p in line):
                    continue
                if len(line) == 1:
                    actors.append(self.actor(category, stationary(line[0], rng.uniform(-np.pi, np.pi))))
                else:
                    actors.append(self.actor(category, self._walk(line, speed, 0.0)))
        return actors

    def crossing_pedestrians(self) -> list[Actor]:
        """Draws pedestrians who cross the road on zebra crossings near the path."""
        rng, actors = self.rng, []
        for crossing in self.network.crossings:
            if self.ego_line.distance(crossing.polygon) > 35:
                continue
            road = self.network.roads[crossing.road]
            for _ in range(int(rng.choice([0, 1, 2, 3], p=[0.4, 0.3, 0.2, 0.1]))):
                s = rng.uniform(crossing.start + 0.6, crossing.stop - 0.6)
                ends = road.point(s, [road.right - 1.6, road.left + 1.6])
                ends = ends if rng.random() < 0.5 else ends[::-1]
                delay = rng.uniform(-10, 0.6 * self.duration)
                actors.append(self.actor("human.pedestrian.adult", self._walk(ends, rng.uniform(1.0, 1.9), delay)))
        return actors

    def _walk(self, line: np.ndarray, speed: float, delay: float) -> Trajectory:
        """Makes the trajectory of a pedestrian along a line [P, 2], who starts at time `delay` (may be negative)."""
        times = np.arange(0.0, self.duration + STEP / 2, STEP)
        track = LineString(line)
        stations = np.clip((times - delay) * speed, 0, track.length)
        ahead = shapely.line_interpolate_point(track, np.minimum(stations + 0.4, track.length))
        behind = shapely.line_interpolate_point(track, np.maximum(stations - 0.4, 0))
        facing = shapely.get_coordinates(ahead) - shapely.get_coordinates(behind)
        xy = shapely.get_coordinates(shapely.line_interpolate_point(track, stations))  # [T, 2]
        return Trajectory(times, xy, np.unwrap(np.arctan2(facing[:, 1], facing[:, 0])))
