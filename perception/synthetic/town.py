"""Makes districts: roads, traffic, buildings, trees and light from one seed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import shapely
from shapely.geometry import LineString, Point, Polygon, box

from perception.errors import ConfigError
from perception.synthetic.district import (
    Actor,
    Building,
    District,
    Kerb,
    Light,
    Marking,
    Pole,
    Surface,
    Trajectory,
    Tree,
)
from perception.synthetic.population import Population
from perception.synthetic.roads import PAINT_HALF, TILE_HALF, Network, make_network
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

# The only names that the devkit's NuScenesMap accepts. Traffic keeps to the left in Singapore.
LOCATIONS = ("singapore-onenorth", "singapore-hollandvillage", "singapore-queenstown", "boston-seaport")


class _Placement:
    """Takes geometry from the district's own frame to the map: mirror, turn, move; rounded to 0.1 mm.

    Every coordinate goes through the same elementwise arithmetic, so that shared vertices stay shared.
    """

    def __init__(self, angle: float, mirror: bool, origin: np.ndarray):
        self.angle, self.flip, self.origin = angle, -1.0 if mirror else 1.0, origin

    def points(self, xy: np.ndarray) -> np.ndarray:
        x, y = xy[..., 0], xy[..., 1] * self.flip
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        return np.round(np.stack([cos * x - sin * y + self.origin[0], sin * x + cos * y + self.origin[1]], axis=-1), 4)

    def geometry(self, geometry):
        moved = shapely.transform(geometry, self.points)
        return shapely.geometry.polygon.orient(moved) if isinstance(moved, Polygon) else moved

    def trajectory(self, trajectory: Trajectory) -> Trajectory:
        return Trajectory(trajectory.times, self.points(trajectory.xy), self.flip * trajectory.yaw + self.angle)


def _ego_route(rng: np.random.Generator, network: Network, duration: float) -> tuple[np.ndarray, list, float, tuple]:
    """The recording car's path, its stop lines, its cruising speed, and (road, direction, offset, start)."""
    cruise = float(np.clip(rng.uniform(4.5, 11.5), 3.0, max(3.0, 125.0 / (duration + 1))))
    travel = cruise * (duration + 1)
    index = 0 if rng.random() < 0.75 or len(network.roads) == 1 else int(rng.integers(1, len(network.roads)))
    road = network.roads[index]
    # The station next to the origin: the middle of the main road, the junction of a side road.
    middle = float(road.arc[np.argmin(np.linalg.norm(road.line, axis=1))])
    ways = [d for d in (1, -1) if road.lanes(d) and 5 < middle - d * 40 < road.length]
    index, ways = (index, ways) if ways else (0, [1])
    road = network.roads[index]
    middle = float(road.arc[np.argmin(np.linalg.norm(road.line, axis=1))])
    way = int(rng.choice(ways))
    start = middle - way * (min(travel, 120.0) * rng.uniform(0.4, 0.7) + (0.0 if index == 0 else 12.0))
    inside = [s for s in network.sections if s.road == index and s.start <= start <= s.stop]
    if not inside:  # in the middle of a junction: start before it
        start = middle - way * 45.0
    offset = road.lane_center(way, int(rng.integers(road.lanes(way))))
    straight = rng.random() < 0.6

    def pick(options: list[int]) -> int:
        return options.index(0) if straight and 0 in options else int(rng.integers(len(options)))

    path, stop_lines, _ = route(network, index, way, offset, start, travel + 60, pick)
    return path, stop_lines, cruise, (index, way, offset, start)


def _make_movers(
    rng: np.random.Generator, network: Network, ego: Mover, first: tuple, people: Population
) -> list[tuple[str, tuple, Mover]]:
    """Vehicles in motion, as (category, size, mover): one before and one behind the recording car, others anywhere."""
    movers: list[tuple[str, tuple, Mover]] = []
    index, way, offset, start = first
    starts = [
        (index, way, offset, start + way * d) for d in (rng.uniform(14, 32), -rng.uniform(11, 22)) if rng.random() < 0.6
    ]
    kinds = ["vehicle.car", "vehicle.truck", "vehicle.bus.rigid", "vehicle.motorcycle", "vehicle.bicycle"]
    spots = [spot for spot in people.spots]
    wanted = int(rng.integers(8, 17))
    for attempt in range(wanted * 4):
        if len(movers) >= wanted or not spots:
            break
        category = str(rng.choice(kinds, p=[0.66, 0.1, 0.09, 0.07, 0.08]))
        if attempt < len(starts):
            index, way, offset, start = starts[attempt]
            category = "vehicle.car"
        else:
            index, _, start = spots[rng.integers(len(spots))]
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
            return (
                options.index(0)
                if 0 in options and (not agile or rng.random() < 0.7)
                else int(rng.integers(len(options)))
            )

        path, stop_lines, _ = route(network, index, way, offset, start, 230.0, pick)
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


def _make_scenery(
    rng: np.random.Generator, network: Network, yards: list[Polygon], actors: list[Actor]
) -> tuple[list[Building], list[Tree], list[Pole]]:
    """Buildings in rows behind the walkways, trees and lamp posts along them; nothing in an actor's way."""
    built: list[Polygon] = []
    buildings: list[Building] = []
    ground = shapely.union_all([network.surface, *network.islands, *network.walkways])
    keep_out = shapely.union_all([ground.buffer(0.6), *[yard.buffer(1.0) for yard in yards]])
    shapely.prepare(keep_out)
    tone, tallest = rng.uniform(0.35, 0.75), rng.uniform(8, 32)
    for section in network.sections:
        road = network.roads[section.road]
        for side in (-1, 1):
            for row, setback in enumerate((rng.uniform(0.8, 6), rng.uniform(24, 34))):
                s = section.start - 10
                while s < section.stop + 10:
                    width, depth, height = rng.uniform(9, 26), rng.uniform(9, 17), rng.uniform(4, tallest) + 8 * row
                    gap, color = (
                        rng.choice([0.0, 1.5, 7.0], p=[0.45, 0.3, 0.25]),
                        np.clip(tone + rng.normal(0, 0.13, 3), 0.12, 0.92),
                    )
                    middle, heading = s + width / 2, road.heading(np.clip(s + width / 2, 0, road.length))
                    s += width + gap
                    base = road.point(
                        middle, road.edge(side) + side * (network.walkway_width + setback + rng.uniform(0, 0.8))
                    )
                    if not 0 < middle < road.length or abs(base).max() > PAINT_HALF * 1.3 or rng.random() < 0.1:
                        continue
                    along, out = (
                        np.array([np.cos(heading), np.sin(heading)]),
                        side * np.array([-np.sin(heading), np.cos(heading)]),
                    )
                    corners = [base + a * along + o * out for a, o in ((-1, 0), (1, 0), (1, 1), (-1, 1))
                               for a, o in ((a * width / 2, o * depth),)]  # fmt: skip
                    shape = Polygon(corners)
                    if keep_out.intersects(shape) or any(shape.intersects(other) for other in built):
                        continue
                    built.append(shape.buffer(-0.05))
                    seed = int(rng.integers(2**31))
                    buildings.append(Building(np.array(corners), float(height), tuple(map(float, color)), seed))

    walkable = shapely.union_all(network.walkways)
    busy = shapely.union_all(
        [c.polygon.buffer(3.0) for c in network.crossings]
        + [Point(p).buffer(a.size[1] / 2 + 0.6) for a in actors for p in a.trajectory.xy[::5]]
        + [LineString(a.trajectory.xy[[0, -1]]).buffer(0.5) for a in actors if not a.trajectory.static]
    )
    shapely.prepare(walkable)
    shapely.prepare(busy)
    trees, poles = [], []
    for section in network.sections:
        road = network.roads[section.road]
        for side in (-1, 1):
            planted, spacing, lamp = rng.random() < 0.6, rng.uniform(8, 15), rng.uniform(24, 36)
            for kind, pitch, inset in (("pole", lamp, 0.45), ("tree", spacing, 0.75)):
                for s in np.arange(section.start + rng.uniform(1, 8), section.stop, pitch):
                    xy = road.point(s, road.edge(side) + side * inset)
                    spot = Point(xy)
                    crowded = any(np.linalg.norm(p.xy - xy) < 2.5 for p in poles)
                    if crowded or busy.intersects(spot) or not walkable.contains(spot) or abs(xy).max() > PAINT_HALF:
                        continue
                    if kind == "pole":
                        poles.append(Pole(xy, float(rng.uniform(5.5, 9)), float(rng.uniform(0.07, 0.12))))
                    elif planted:
                        trees.append(_tree(rng, xy))
    solid = shapely.union_all(
        [ground.buffer(1.0), *[b.buffer(1.5) for b in built], *[yard.buffer(1.5) for yard in yards]]
    )
    shapely.prepare(solid)
    for xy in rng.uniform(-PAINT_HALF, PAINT_HALF, (160, 2)):
        if not solid.intersects(Point(xy)):
            trees.append(_tree(rng, xy))
    return buildings, trees, poles


def _tree(rng: np.random.Generator, xy: np.ndarray) -> Tree:
    crown = rng.uniform(1.2, 2.8)
    return Tree(xy, float(rng.uniform(2.4, 3.6)), float(rng.uniform(0.12, 0.25)), float(crown))


def _make_light(rng: np.random.Generator) -> Light:
    """Clear, hazy or overcast daylight."""
    elevation, azimuth = np.radians(rng.uniform(14, 72)), rng.uniform(-np.pi, np.pi)
    sun = np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])
    overcast = rng.random() < 0.35
    warm = 1.0 - np.sin(elevation)
    strength = 0.25 if overcast else 1.0
    color = tuple(float(strength * c) for c in (1.0, 0.97 - 0.15 * warm, 0.92 - 0.35 * warm))
    sky = (0.72, 0.74, 0.77) if overcast else (0.45 + 0.2 * warm, 0.62 + 0.05 * warm, 0.88)
    fog = float(rng.uniform(0.003, 0.009) if rng.random() < 0.25 else rng.uniform(0.0004, 0.0025))
    ambient = float(rng.uniform(0.6, 0.8) if overcast else rng.uniform(0.3, 0.45))
    return Light(sun, color, tuple(map(float, sky)), ambient, fog, float(rng.uniform(0.85, 1.15)))


def make_district(seed: int, origin_xy, location: str, duration: float) -> District:
    """Makes the world of one scene.

    Args:
        seed: decides everything; the same arguments give the same district.
        origin_xy: global metres of the district's middle. Its map layers fill the square of +-125 m around it; what is
            only painted (surfaces, markings, kerbs, buildings) reaches further, so that roads do not end in view.
        location: one of `LOCATIONS`.
        duration: seconds of the scene; trajectories are one second longer.

    Returns:
        The district in global map metres.

    Raises:
        ConfigError: for an unknown location or a duration that is not positive.
    """
    if location not in LOCATIONS:
        raise ConfigError(f"make_district: location is {location!r}; choose one of {', '.join(LOCATIONS)}")
    if not duration > 0:
        raise ConfigError(f"make_district: duration is {duration}; give a positive number of seconds")
    rng = np.random.default_rng(seed)
    angle = rng.uniform(-np.pi, np.pi)
    placement = _Placement(angle, location.startswith("singapore"), np.asarray(origin_xy, dtype=np.float64))
    # Squares along the map's axes, seen from the district's frame; a mirrored square turned back is again such a square.
    turned = [shapely.affinity.rotate(box(-h, -h, h, h), -placement.flip * angle, (0, 0), use_radians=True)
              for h in (TILE_HALF, PAINT_HALF)]  # fmt: skip
    network = make_network(rng, *turned)

    path, stop_lines, cruise, first = _ego_route(rng, network, duration)
    ego = Mover(path, stop_lines, 0.0, cruise, EGO_FRONT, EGO_BACK, EGO_WIDTH, ego=True)
    people = Population(rng, network, path[: max(2, len(path))], duration + 1)
    yards, actors = people.yards(int(rng.choice([1, 2])))
    for _ in range(int(rng.choice([1, 2, 3], p=[0.45, 0.4, 0.15]))):
        actors += people.work_site()
    actors += people.cycles()
    actors += people.parked()
    crossers = people.crossers()
    movers = _make_movers(rng, network, ego, first, people)

    # Lights: the ego's road has green from `change` on, the others until two seconds before.
    change = rng.uniform(1.5, 0.5 * duration + 1.5) if rng.random() < 0.3 else -100.0
    own_roads = {junction: road for _, junction, road in stop_lines}

    def green(junction: int, road: int, t: float) -> bool:
        return t >= change if own_roads.get(junction, 0) == road else t < change - 2.0

    tracks = simulate_movers([ego, *(m for *_, m in movers)], crossers, green, duration + 1)
    for (category, size, _), track in zip(movers, tracks[1:], strict=True):
        rider = category in ("vehicle.bicycle", "vehicle.motorcycle")
        actors.append(people.actor(category, track, size, rider))
    actors += crossers + people.walkers(int(rng.integers(6, 17)))
    driven = LineString(tracks[0].xy) if np.ptp(tracks[0].xy, axis=0).max() > 0.1 else Point(tracks[0].xy[0])
    actors = [a for a in actors if min(driven.distance(Point(p)) for p in a.trajectory.xy[::10]) < 55]
    actors = drop_collisions(actors, tracks[0], duration + 1, [])
    buildings, trees, poles = _make_scenery(rng, network, yards, actors)

    square = box(-400, -400, 400, 400)
    surfaces = [(square, "grass"), *((w, "walkway") for w in network.walkways)]
    surfaces += [(yard, str(rng.choice(["concrete", "parking"]))) for yard in yards]
    surfaces += [(part, "asphalt") for part in getattr(network.surface, "geoms", [network.surface])]
    surfaces += [(p, "parking") for p in network.parking]
    surfaces += [(island, str(rng.choice(["grass", "concrete"]))) for island in network.islands]
    layers = {**network.layers, "carpark_area": network.layers["carpark_area"] + yards}
    border = turned[1].boundary.buffer(0.05)
    kerbs = network.surface.boundary.difference(border)
    kerbs = shapely.line_merge(kerbs) if kerbs.geom_type == "MultiLineString" else kerbs
    light = _make_light(rng)
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
    )
