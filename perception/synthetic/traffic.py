"""Simulates traffic: routes through the road network, car following, and removal of colliding actors.

Everything is in the district's frame (see `roads`). Vehicles follow lane centres and keep their distance. In each step,
the speed of a vehicle is limited so that it can brake for the nearest obstacle, for a stop line at a red light, and for
the next bend. `drop_collisions` removes actors that collide nevertheless.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import shapely
from shapely.geometry import LineString

from perception.synthetic.district import Actor, Trajectory
from perception.synthetic.roads import Arm, Network, Road

STEP = 0.1  # s between samples of moving trajectories
# The ego vehicle: its origin is the rear axle; its body reaches from EGO_BACK behind the axle to EGO_FRONT ahead of it.
EGO_BACK, EGO_FRONT, EGO_WIDTH = 1.0, 3.9, 1.85
_BRAKE, _ACCELERATION, _SIDEWAYS = 2.6, 1.6, 1.9  # m/s2

# Mean length, width, height in metres and their relative deviation, close to nuScenes' statistics.
SIZES = {
    "vehicle.car": ((4.6, 1.95, 1.73), 0.07),
    "vehicle.truck": ((6.9, 2.5, 2.8), 0.12),
    "vehicle.bus.rigid": ((11.0, 2.9, 3.5), 0.06),
    "vehicle.trailer": ((12.3, 2.9, 3.9), 0.12),
    "vehicle.construction": ((6.4, 2.9, 3.2), 0.12),
    "vehicle.bicycle": ((1.7, 0.6, 1.3), 0.07),
    "vehicle.motorcycle": ((2.1, 0.8, 1.5), 0.08),
    "human.pedestrian.adult": ((0.73, 0.67, 1.77), 0.07),
    "human.pedestrian.child": ((0.5, 0.5, 1.25), 0.08),
    "human.pedestrian.construction_worker": ((0.73, 0.7, 1.76), 0.05),
    "movable_object.trafficcone": ((0.41, 0.41, 1.07), 0.08),
    "movable_object.barrier": ((0.5, 2.5, 0.98), 0.06),
}
_PAINTS = np.array([
    (0.93, 0.93, 0.93), (0.08, 0.08, 0.09), (0.45, 0.46, 0.48), (0.7, 0.71, 0.73), (0.65, 0.08, 0.08), (0.1, 0.2, 0.55),
    (0.1, 0.35, 0.2), (0.85, 0.7, 0.15), (0.45, 0.3, 0.2), (0.8, 0.4, 0.1), (0.25, 0.45, 0.65), (0.3, 0.3, 0.32),
])  # fmt: skip


def draw_size(rng: np.random.Generator, category: str) -> tuple[float, float, float]:
    """Draws length, width and height of an actor of this category."""
    mean, deviation = SIZES[category]
    whole, each = rng.normal(0, deviation * 0.8), rng.normal(0, deviation * 0.6, 3)
    length, width, height = (float(m * np.clip(1 + whole + e, 0.75, 1.3)) for m, e in zip(mean, each, strict=True))
    return length, width, height


def draw_color(rng: np.random.Generator, category: str) -> tuple[float, float, float]:
    """Draws the RGB colour of an actor of this category."""
    if category == "movable_object.trafficcone":
        base = np.array([0.95, 0.35, 0.08])
    elif category == "movable_object.barrier":
        base = np.array([(0.9, 0.42, 0.1), (0.85, 0.85, 0.85), (0.8, 0.15, 0.12)])[rng.integers(3)]
    elif category == "vehicle.construction":
        base = np.array([0.95, 0.7, 0.1])
    elif category.startswith("human"):
        base = rng.uniform(0.05, 0.85, 3)
    else:
        base = _PAINTS[rng.integers(len(_PAINTS))]
    red, green, blue = np.clip(base + rng.normal(0, 0.03, 3), 0.02, 1).tolist()
    return red, green, blue


def stationary(xy: np.ndarray, yaw: float) -> Trajectory:
    """Makes the trajectory of a stationary actor."""
    return Trajectory(np.zeros(1), np.asarray(xy, dtype=np.float64).reshape(1, 2), np.array([float(yaw)]))


@dataclass(eq=False)
class Mover:
    """A simulated vehicle: its path and its state along the path."""

    path: np.ndarray  # [P, 2]
    stop_lines: list[tuple[float, int, int]]  # station on the path, junction, road before the junction
    station: float  # metres along the path
    cruise: float  # m/s
    front: float  # metres from the reference point to the front bumper
    back: float  # metres from the reference point to the rear bumper
    width: float  # metres
    ego: bool = False

    def __post_init__(self) -> None:
        tail = self.path[-1] + (self.path[-1] - self.path[-2]) * 80.0 / np.linalg.norm(self.path[-1] - self.path[-2])
        line = LineString(np.concatenate([self.path, tail[None]]))
        stations = np.arange(0.0, line.length, 0.5)
        self.path = shapely.get_coordinates(shapely.line_interpolate_point(line, stations))  # [P, 2]
        heading = np.unwrap(np.arctan2(*np.gradient(self.path, axis=0).T[::-1]))
        # Steering takes time: headings are averaged over a few metres.
        kernel = np.ones(5) / 5
        self.heading = np.convolve(np.pad(heading, 2, mode="edge"), kernel, "valid")
        bend = abs(np.convolve(np.pad(np.gradient(self.heading, 0.5), 4, mode="edge"), np.ones(9) / 9, "valid"))
        # Drivers do not hold a speed exactly: it varies by a tenth over some dozens of metres.
        cruise = self.cruise * (0.95 + 0.05 * np.sin(stations / 14.0 + 40.0 * self.cruise))
        limit = np.minimum(cruise, np.sqrt(_SIDEWAYS / np.maximum(bend, 1e-4)))
        for i in range(len(limit) - 2, -1, -1):  # brake before the bend
            limit[i] = min(limit[i], np.sqrt(limit[i + 1] ** 2 + 2 * 0.6 * _BRAKE * 0.5))
        self.limit, self.stations = limit, stations
        self.track = Trajectory(stations, self.path, self.heading)  # over metres instead of seconds
        self.speed = float(np.interp(self.station, stations, limit))

    def pose(self) -> tuple[np.ndarray, float]:
        """Returns position [2] and heading at the current station."""
        return self.track.at(self.station)


def route(
    network: Network,
    road: int,
    direction: int,
    lane_offset: float,
    start: float,
    length: float,
    pick_turn: Callable[[list[int]], int],
) -> tuple[np.ndarray, list[tuple[float, int, int]]]:
    """Follows lanes from a station and returns the path.

    Args:
        network: the road network.
        road: index of the first road.
        direction: +1 along its line, -1 against it.
        lane_offset: lateral offset of the path on the first road.
        start: station on the first road.
        length: minimum length, metres; the path ends earlier at the end of the road.
        pick_turn: given a list of -1 (right), 0 (straight), 1 (left), returns the index of one.

    Returns:
        The path [P, 2] and its stop lines as (station on the path, junction, road).
    """
    points, stop_lines, total = [], [], 0.0
    station, offset = start, lane_offset
    while total < length:
        line = network.roads[road]
        ahead = [
            (arm.cut, index)
            for index, junction in enumerate(network.junctions)
            for arm in junction.arms
            if arm.road == road and arm.sign == -direction and (arm.cut - station) * direction > 0
        ]
        if not ahead:
            points.append(line.along(station, line.length if direction > 0 else 0.0, offset))
            break
        cut, index = min(ahead, key=lambda item: abs(item[0] - station))
        points.append(line.along(station, cut, offset))
        total += abs(cut - station)
        section = next(s for s in network.sections if s.road == road and cut in (s.start, s.stop))
        line_at = section.runs[-1][1] if direction > 0 else section.runs[0][0]
        stop_lines.append((total - abs(cut - line_at), index, road))
        entry, heading = line.point(cut, offset), line.heading(cut) + (0 if direction > 0 else np.pi)
        exits = exits_of(network, index, road, direction, cut)
        if not exits:
            break
        turn, arm = exits[pick_turn([option for option, _ in exits])]
        if turn:
            lane = lane_after(network.roads[arm.road], arm.sign, turn)
            offset = network.roads[arm.road].lane_center(arm.sign, lane)
            points.append(turn_curve(network, entry, heading, arm, offset))
        else:
            points.append(line.along(cut, arm.cut, offset))
        total += np.linalg.norm(np.diff(points[-1], axis=0), axis=1).sum()
        road, direction, station = arm.road, arm.sign, arm.cut
    path = np.concatenate(points)
    keep = np.concatenate([[True], np.linalg.norm(np.diff(path, axis=0), axis=1) > 1e-3])
    return path[keep], stop_lines


def exits_of(network: Network, junction: int, road: int, direction: int, cut: float) -> list[tuple[int, Arm]]:
    """Lists the arms by which traffic may leave a junction, each after its turn: -1 right, 0 straight, 1 left.

    Args:
        network: the road network.
        junction: index of the junction.
        road, direction: where the traffic comes from.
        cut: station at which it enters the junction.
    """
    heading = network.roads[road].heading(cut) + (0 if direction > 0 else np.pi)
    exits: list[tuple[int, Arm]] = []
    for arm in network.junctions[junction].arms:
        if not network.roads[arm.road].lanes(arm.sign) or (arm.road == road and arm.sign == -direction):
            continue
        away = network.roads[arm.road].heading(arm.cut) + (0 if arm.sign > 0 else np.pi)
        angle = (away - heading + np.pi) % (2 * np.pi) - np.pi
        exits.append((0 if arm.road == road else int(np.sign(angle)), arm))
    return exits


def lane_after(road: Road, direction: int, turn: int) -> int:
    """Returns the lane that a turn enters: right turns the outermost, left turns the innermost one."""
    return road.lanes(direction) - 1 if turn < 0 else 0


def turn_curve(network: Network, entry: np.ndarray, heading: float, arm: Arm, offset: float) -> np.ndarray:
    """Makes the path of a turn [P, 2]: the roundest cubic curve with a car's width of clearance.

    Args:
        network: the road network.
        entry, heading: where and in which direction the path enters the junction.
        arm, offset: the arm by which it leaves, and its offset there.
    """
    road = network.roads[arm.road]
    leave, away = road.point(arm.cut, offset), road.heading(arm.cut) + (0 if arm.sign > 0 else np.pi)
    first, last = (np.array([np.cos(a), np.sin(a)]) for a in (heading, away))
    # Distances to the intersection of the tangents. Handles of 0.58 of them give nearly an arc, longer ones cut less.
    solved = np.linalg.solve(np.stack([first, last], axis=1), leave - entry)
    chord = np.linalg.norm(leave - entry)
    u = np.linspace(0, 1, 40)[:, None]
    for share in (0.58, 0.68, 0.78, 0.88):
        handles = np.clip(share * solved, 0.25 * chord, chord)
        a, b = entry + handles[0] * first, leave - handles[1] * last
        curve = (1 - u) ** 3 * entry + 3 * u * (1 - u) ** 2 * a + 3 * u**2 * (1 - u) * b + u**3 * leave  # [P, 2]
        if network.surface.contains(LineString(curve).buffer(1.15)):
            break
    return curve


def simulate_movers(
    movers: list[Mover], pedestrians: list[Actor], green: Callable[[int, int, float], bool], duration: float
) -> list[Trajectory]:
    """Simulates all moving vehicles together.

    Args:
        movers: vehicles; their state is advanced in place.
        pedestrians: actors for whom vehicles brake.
        green: (junction, road, time) -> whether the traffic light of that road is green.
        duration: seconds.

    Returns:
        One trajectory per mover, sampled every `STEP` seconds from 0 to `duration`.
    """
    steps = int(np.ceil(duration / STEP)) + 1
    records = np.zeros((len(movers), steps, 3))  # x, y, yaw of each reference point
    # Obstacles are points: along the centre line of each vehicle, at most 2 m apart, and one per pedestrian.
    reaches = [np.linspace(-m.back, m.front, int((m.front + m.back) / 2) + 2) for m in movers]
    counts = [len(reach) for reach in reaches] + [len(pedestrians)]
    owner = np.repeat([*range(len(movers)), -1], counts)  # [Q]
    half = np.repeat([*(m.width / 2 for m in movers), 0.5], counts)  # [Q] half widths
    for step in range(steps):
        t = step * STEP
        poses = [mover.pose() for mover in movers]
        spines = [
            xy + reach[:, None] * np.array([np.cos(yaw), np.sin(yaw)])
            for (xy, yaw), reach in zip(poses, reaches, strict=True)
        ]
        on_foot = [pedestrian.trajectory.at(t)[0] for pedestrian in pedestrians]
        others = np.concatenate([*spines, np.array(on_foot).reshape(-1, 2)]).T.copy()  # [2, Q]
        drive = np.array([[m.speed * np.cos(p[1]), m.speed * np.sin(p[1])] for m, p in zip(movers, poses, strict=True)])
        for i, mover in enumerate(movers):
            records[i, step] = (*poses[i][0], poses[i][1])
            wanted = float(np.interp(mover.station + 0.5, mover.stations, mover.limit))
            nose = mover.station + mover.front
            window = slice(*np.searchsorted(mover.stations, [nose - 1.0, nose + 4 + 3 * mover.speed]))
            way, stations = mover.path[window][::2], mover.stations[window][::2]
            if len(way):
                dx, dy = (way[:, d, None] - others[d] for d in (0, 1))  # [P, Q]
                hit = (np.sqrt(dx * dx + dy * dy) < half + mover.width / 2 + 0.15) & (owner != i)
                for q in np.flatnonzero(hit.any(0)):
                    p = int(np.argmax(hit[:, q]))
                    yaw = np.interp(stations[p], mover.stations, mover.heading)
                    along = drive[owner[q]] @ [np.cos(yaw), np.sin(yaw)] if owner[q] >= 0 else 0.0
                    if mover.ego and owner[q] >= 0 and along < 0.5 * np.linalg.norm(drive[owner[q]]) - 0.1:
                        continue  # crossing traffic yields to the ego vehicle
                    gap = max(stations[p] - nose - 2.0 - half[q], 0.0)
                    wanted = min(wanted, np.sqrt(max(along, 0.0) ** 2 + 2 * 0.8 * _BRAKE * gap))
            for at, junction, origin in mover.stop_lines:
                room = at - 0.5 - nose
                if room > -1.5 and not green(junction, origin, t):
                    wanted = min(wanted, np.sqrt(2 * 0.8 * _BRAKE * max(room, 0.0)))
            if step == 0:  # the initial speed must allow for obstacles ahead
                mover.speed = min(mover.speed, wanted)
            brake = (1.3 if mover.ego else 2.2) * _BRAKE if wanted < mover.speed - 1.5 else _BRAKE
            change = np.clip(wanted - mover.speed, -brake * STEP, _ACCELERATION * STEP)
            mover.speed = float(max(mover.speed + change, 0.0))
        for mover in movers:
            mover.station += mover.speed * STEP
    times = np.arange(steps) * STEP
    return [Trajectory(times, record[:, :2].copy(), np.unwrap(record[:, 2])) for record in records]


def _footprints(actors: list[Actor], ego: Trajectory, t: float, margin: float) -> np.ndarray:
    """Returns polygons [1 + actors]: the footprints of the ego vehicle and of all actors at one time."""
    xy, yaw = ego.at(t)
    middle = xy + (EGO_FRONT - EGO_BACK) / 2 * np.array([np.cos(yaw), np.sin(yaw)])
    rows = [(middle, yaw, EGO_FRONT + EGO_BACK, EGO_WIDTH)]
    rows += [(*actor.trajectory.at(t), actor.size[0], actor.size[1]) for actor in actors]
    centers = np.array([row[0] for row in rows])
    yaws, lengths, widths = (np.array([row[k] for row in rows]) for k in (1, 2, 3))
    signs = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    half = np.stack([lengths, widths], axis=1) / 2 + margin
    local = half[:, None] * signs  # [A, 4, 2]
    cos, sin = np.cos(yaws)[:, None], np.sin(yaws)[:, None]
    turned = np.stack([cos * local[..., 0] - sin * local[..., 1], sin * local[..., 0] + cos * local[..., 1]], axis=-1)
    return shapely.polygons(centers[:, None] + turned)


def drop_collisions(actors: list[Actor], ego: Trajectory, duration: float) -> list[Actor]:
    """Keeps the actors that never touch the ego vehicle or a kept actor that is earlier in the list.

    Args:
        actors: in order of importance.
        ego: trajectory of the rear axle.
        duration: seconds to check, every 0.2 s.
    """
    pairs: set[tuple[int, int]] = set()
    for t in np.arange(0.0, duration + 1e-6, 0.2):
        shapes = _footprints(actors, ego, t, 0.08)
        first, second = shapely.STRtree(shapes).query(shapes, predicate="intersects")
        pairs |= set(zip(first[first < second].tolist(), second[first < second].tolist(), strict=True))
    kept = {0}
    for index in range(1, len(actors) + 1):
        if not any((other, index) in pairs for other in kept):
            kept.add(index)
    return [actor for index, actor in enumerate(actors, start=1) if index in kept]
