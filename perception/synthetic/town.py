"""Generates districts: roads, traffic, buildings, trees and light from one seed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import shapely
from shapely.geometry import Point, Polygon, box
from shapely.geometry.base import BaseGeometry

from perception.errors import ConfigError
from perception.synthetic.district import (
    Actor,
    Building,
    District,
    Kerb,
    LaneGraph,
    LanePath,
    Light,
    Marking,
    Pole,
    Surface,
    Trajectory,
    Tree,
)
from perception.synthetic.lane_graph import make_lane_graph
from perception.synthetic.network import make_network
from perception.synthetic.population import Population, mix_frequencies
from perception.synthetic.roads import PAINT_HALF, TILE_HALF, Network
from perception.synthetic.surroundings import make_buildings, make_greenery, make_light
from perception.synthetic.traffic import (
    EGO_BACK,
    EGO_FRONT,
    EGO_WIDTH,
    Mover,
    draw_size,
    drop_collisions,
    route,
    simulate_movers,
)

__all__ = [
    "LOCATIONS", "Actor", "Building", "District", "Kerb", "Light", "Marking", "Pole", "Surface", "Trajectory", "Tree",
    "make_district",
]  # fmt: skip

# The only map names that the devkit's NuScenesMap accepts. Traffic keeps to the left in Singapore.
LOCATIONS = ("singapore-onenorth", "singapore-hollandvillage", "singapore-queenstown", "boston-seaport")

# Category frequencies of moving vehicles: as in usual streets, and with frequent rare classes.
_MOVER_MIX = (
    {"vehicle.car": 0.66, "vehicle.truck": 0.1, "vehicle.bus.rigid": 0.09, "vehicle.motorcycle": 0.07,
     "vehicle.bicycle": 0.08},
    {"vehicle.car": 0.2, "vehicle.truck": 0.22, "vehicle.bus.rigid": 0.22, "vehicle.motorcycle": 0.18,
     "vehicle.bicycle": 0.18},
)  # fmt: skip


class _Placement:
    """Transforms geometry from the district's frame to the map: mirrors, rotates, translates, rounds to 0.1 mm.

    Every coordinate goes through the same elementwise arithmetic, so that shared vertices stay equal.
    """

    def __init__(self, angle: float, mirror: bool, origin: np.ndarray) -> None:
        self.angle, self.flip, self.origin = angle, -1.0 if mirror else 1.0, origin

    def points(self, xy: np.ndarray) -> np.ndarray:
        """Transforms points [..., 2]."""
        x, y = xy[..., 0], xy[..., 1] * self.flip
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        return np.round(np.stack([cos * x - sin * y + self.origin[0], sin * x + cos * y + self.origin[1]], axis=-1), 4)

    def geometry(self, geometry: BaseGeometry) -> Any:
        """Transforms a shapely geometry; polygons get counter-clockwise exteriors."""
        moved = shapely.transform(geometry, self.points)
        return shapely.geometry.polygon.orient(moved) if isinstance(moved, Polygon) else moved

    def graph(self, graph: LaneGraph) -> LaneGraph:
        """Transforms a lane graph."""
        lanes, connectors = (
            tuple(LanePath(self.points(p.points), self.flip * p.yaw + self.angle, p.width) for p in paths)
            for paths in (graph.lanes, graph.connectors)
        )
        return LaneGraph(lanes, connectors, graph.links)

    def trajectory(self, trajectory: Trajectory) -> Trajectory:
        """Transforms a trajectory."""
        return Trajectory(trajectory.times, self.points(trajectory.xy), self.flip * trajectory.yaw + self.angle)


def _ego_route(
    rng: np.random.Generator, network: Network, duration: float
) -> tuple[np.ndarray, list[tuple[float, int, int]], float, tuple[int, int, float, float]]:
    """Draws the ego vehicle's path, its stop lines, its cruising speed, and (road, direction, offset, start)."""
    cruise = float(np.clip(rng.uniform(4.5, 11.5), 3.0, max(3.0, 100.0 / (duration + 1))))
    travel = cruise * (duration + 1)
    index = 0 if rng.random() < 0.75 or len(network.roads) == 1 else int(rng.integers(1, len(network.roads)))
    road = network.roads[index]
    # The station nearest to the origin: the middle of the main road, the junction of a side road.
    middle = float(road.arc[np.argmin(np.linalg.norm(road.line, axis=1))])
    ways = [d for d in (1, -1) if road.lanes(d) and 5 < middle - d * 40 < road.length]
    index, ways = (index, ways) if ways else (0, [1])
    road = network.roads[index]
    middle = float(road.arc[np.argmin(np.linalg.norm(road.line, axis=1))])
    way = int(rng.choice(ways))
    start = middle - way * (min(travel, 110.0) * rng.uniform(0.45, 0.65) + (0.0 if index == 0 else 12.0))
    inside = [s for s in network.sections if s.road == index and s.start <= start <= s.stop]
    if not inside:  # inside a junction: start before it
        start = middle - way * 45.0
    offset = road.lane_center(way, int(rng.integers(road.lanes(way))))
    straight = rng.random() < 0.6

    def pick(options: list[int]) -> int:
        return options.index(0) if straight and 0 in options else int(rng.integers(len(options)))

    path, stop_lines = route(network, index, way, offset, start, travel + 60, pick)
    return path, stop_lines, cruise, (index, way, offset, start)


def _make_movers(
    rng: np.random.Generator,
    network: Network,
    ego: Mover,
    first: tuple[int, int, float, float],
    population: Population,
) -> list[tuple[str, tuple[float, float, float], Mover]]:
    """Draws moving vehicles: at most one ahead of and one behind the ego vehicle, and others elsewhere.

    Returns:
        Category, size and mover of each vehicle.
    """
    movers: list[tuple[str, tuple[float, float, float], Mover]] = []
    index, way, offset, start = first
    starts = [
        (index, way, offset, start + way * d) for d in (rng.uniform(14, 32), -rng.uniform(11, 22)) if rng.random() < 0.6
    ]
    kinds, chances = mix_frequencies(*_MOVER_MIX, population.rare)
    wanted = int(rng.integers(8, 17))
    for attempt in range(wanted * 4):
        if len(movers) >= wanted:
            break
        category = str(rng.choice(kinds, p=chances))
        if attempt < len(starts):
            index, way, offset, start = starts[attempt]
            category = "vehicle.car"
        else:
            index, _, start = population.spots[rng.integers(len(population.spots))]
            road = network.roads[index]
            way = int(rng.choice([d for d in (1, -1) if road.lanes(d)]))
            lane = road.lanes(way) - 1 if category == "vehicle.bicycle" else int(rng.integers(road.lanes(way)))
            offset = road.lane_center(way, lane)
            start = start - way * rng.uniform(0, 30)
            if category == "vehicle.bicycle":
                offset -= way * (road.lane_width / 2 - 0.65)
        road = network.roads[index]
        if not any(s.road == index and s.start + 4 < start < s.stop - 4 for s in network.sections):
            continue
        size = draw_size(rng, category)
        agile = category in ("vehicle.car", "vehicle.motorcycle", "vehicle.truck")

        def pick(options: list[int], agile: bool = agile) -> int:
            keep_on = 0 in options and (not agile or rng.random() < 0.7)
            return options.index(0) if keep_on else int(rng.integers(len(options)))

        path, stop_lines = route(network, index, way, offset, start, 230.0, pick)
        cruise = rng.uniform(2.5, 6.0) if category == "vehicle.bicycle" else rng.uniform(5.0, 13.0)
        if len(path) < 2 or np.linalg.norm(path[-1] - path[0]) < 20:
            continue
        mover = Mover(path, stop_lines, 0.0, float(cruise), size[0] / 2, size[0] / 2, size[1])
        gap = [
            np.linalg.norm(mover.pose()[0] - m.pose()[0]) - mover.front - m.back
            for m in [ego, *(m for *_, m in movers)]
        ]
        if min(gap) > 4.0:
            movers.append((category, size, mover))
    return movers


def make_district(
    seed: int, origin_xy: tuple[float, float], location: str, duration: float, rare: float = 0.0
) -> District:
    """Generates the world of one scene.

    Args:
        seed: of all random numbers; the same arguments give the same district.
        origin_xy: global metres of the district's centre. Its map layers fill the square of +-125 m around it.
            Surfaces, markings, kerbs and buildings extend further, so that roads do not end in view.
        location: one of `LOCATIONS`.
        duration: seconds of the scene; trajectories are one second longer.
        rare: frequency of rare vehicles, cycles and work sites, from 0 (as in usual streets) to 1 (many more). Use
            values above 0 for training, not for evaluation.

    Returns:
        The district in global map metres.

    Raises:
        ConfigError: the location is unknown, the duration is not positive, or `rare` is not in 0..1.
    """
    if location not in LOCATIONS:
        raise ConfigError(f"make_district: location is {location!r}; choose one of {', '.join(LOCATIONS)}")
    if not duration > 0:
        raise ConfigError(f"make_district: duration is {duration}; give a positive number of seconds")
    if not 0 <= rare <= 1:
        raise ConfigError(f"make_district: rare is {rare}; give a number from 0 to 1")
    rng = np.random.default_rng(seed)
    angle = rng.uniform(-np.pi, np.pi)
    placement = _Placement(angle, location.startswith("singapore"), np.asarray(origin_xy, dtype=np.float64))
    # Squares along the map's axes, in the district's frame; mirroring maps such a square onto itself.
    turned = [shapely.affinity.rotate(box(-h, -h, h, h), -placement.flip * angle, (0, 0), use_radians=True)
              for h in (TILE_HALF, PAINT_HALF)]  # fmt: skip
    network = make_network(rng, *turned)

    path, stop_lines, cruise, first = _ego_route(rng, network, duration)
    ego = Mover(path, stop_lines, 0.0, cruise, EGO_FRONT, EGO_BACK, EGO_WIDTH, ego=True)
    last = int(np.searchsorted(ego.stations, cruise * (duration + 1)))
    population = Population(rng, network, ego.path[: last + 2], duration + 1, rare)
    yards, actors = population.yards(int(rng.choice([1, 2])) + round(2 * rare))
    for _ in range(int(rng.choice([1, 2], p=[0.5, 0.5])) + round(2 * rare)):
        actors += population.work_site()
    actors += population.cycles()
    actors += population.parked()
    crossing = population.crossing_pedestrians()
    movers = _make_movers(rng, network, ego, first, population)

    # Traffic lights: the ego vehicle's road has green from `change` on, the others until two seconds before.
    change = rng.uniform(1.0, 0.4 * duration + 1.0) if rng.random() < 0.22 else -100.0
    own_roads = {junction: road for _, junction, road in stop_lines}

    def green(junction: int, road: int, t: float) -> bool:
        return t >= change if own_roads.get(junction, 0) == road else t < change - 2.0

    tracks = simulate_movers([ego, *(m for *_, m in movers)], crossing, green, duration + 1)
    for (category, size, _), track in zip(movers, tracks[1:], strict=True):
        rider = category in ("vehicle.bicycle", "vehicle.motorcycle")
        actors.append(population.actor(category, track, size, rider))
    actors += crossing + population.pedestrians(int(rng.integers(8, 19)))
    driven = shapely.MultiPoint(tracks[0].xy[::5])
    actors = [a for a in actors if min(driven.distance(Point(p)) for p in a.trajectory.xy[::10]) < 55]
    actors = drop_collisions(actors, tracks[0], duration + 1)
    buildings = make_buildings(rng, network, yards)
    trees, poles = make_greenery(rng, network, yards, buildings, actors)

    square = box(-400, -400, 400, 400)
    surfaces = [(square, "grass"), *((w, "walkway") for w in network.walkways)]
    surfaces += [(yard, str(rng.choice(["concrete", "parking"]))) for yard in yards]
    surfaces += [(part, "asphalt") for part in getattr(network.surface, "geoms", [network.surface])]
    surfaces += [(p, "parking") for p in network.parking]
    surfaces += [(island, str(rng.choice(["grass", "concrete"]))) for island in network.islands]
    graph, connectors = make_lane_graph(network)
    layers = {**network.layers, "lane_connector": connectors, "carpark_area": network.layers["carpark_area"] + yards}
    border = turned[1].boundary.buffer(0.05)
    kerbs = network.surface.boundary.difference(border)
    kerbs = shapely.line_merge(kerbs) if kerbs.geom_type == "MultiLineString" else kerbs
    light = make_light(rng)
    return District(
        seed=seed,
        location=location,
        name=f"{location}-{seed}",
        layers={name: [placement.geometry(g) for g in geometries] for name, geometries in layers.items()},
        intersections=network.intersections,
        surfaces=[Surface(placement.geometry(p), material) for p, material in surfaces],
        markings=[Marking(placement.geometry(p), color) for p, color in network.markings],
        kerbs=[Kerb(placement.points(np.asarray(line.coords))) for line in getattr(kerbs, "geoms", [kerbs])],
        buildings=[
            replace(b, footprint=np.asarray(placement.geometry(Polygon(b.footprint)).exterior.coords)[:-1])
            for b in buildings
        ],
        trees=[replace(tree, xy=placement.points(tree.xy)) for tree in trees],
        poles=[replace(pole, xy=placement.points(pole.xy)) for pole in poles],
        actors=[replace(actor, trajectory=placement.trajectory(actor.trajectory)) for actor in actors],
        ego=placement.trajectory(tracks[0]),
        light=light,
        duration=duration,
        lane_graph=placement.graph(graph),
    )
