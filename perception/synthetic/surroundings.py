"""Draws the surroundings of the roads: buildings, trees, lamp posts, daylight.

Everything is in the district's frame (see `roads`).
"""

from __future__ import annotations

import numpy as np
import shapely
from shapely.geometry import LineString, Point, Polygon

from perception.synthetic.district import Actor, Building, Light, Pole, Tree
from perception.synthetic.roads import PAINT_HALF, Network

# Plaster, brick, sandstone, concrete, slate, painted wood.
_FACADES = np.array([
    (0.82, 0.78, 0.70), (0.58, 0.33, 0.26), (0.76, 0.66, 0.50), (0.62, 0.62, 0.60), (0.36, 0.39, 0.43),
    (0.70, 0.74, 0.76), (0.85, 0.84, 0.82), (0.48, 0.40, 0.34), (0.66, 0.50, 0.38), (0.52, 0.58, 0.55),
])  # fmt: skip


def make_buildings(rng: np.random.Generator, network: Network, yards: list[Polygon]) -> list[Building]:
    """Draws two rows of buildings behind every walkway: a front row with few gaps and a taller, looser back row."""
    ground = shapely.union_all([network.surface, *network.islands, *network.walkways])
    keep_out = shapely.union_all([ground.buffer(0.6), *[yard.buffer(1.0) for yard in yards]])
    shapely.prepare(keep_out)
    palette, tallest = _FACADES[rng.permutation(len(_FACADES))[:5]], rng.uniform(8, 32)
    taken: list[Polygon] = []
    buildings: list[Building] = []
    for section in network.sections:
        road = network.roads[section.road]
        for side in (-1, 1):
            for row, setback in enumerate((rng.uniform(0.8, 6), rng.uniform(24, 34))):
                s = section.start - 10
                while s < section.stop + 10:
                    width, depth = rng.uniform(9, 26), rng.uniform(9, 17)
                    height = float(rng.uniform(4, tallest) + 8 * row)
                    gap, recess = rng.choice([0.0, 1.5, 7.0], p=[0.45, 0.3, 0.25]), rng.uniform(0, 0.8)
                    color = np.clip(
                        palette[rng.integers(5)] * rng.uniform(0.8, 1.15) + rng.normal(0, 0.02, 3), 0.1, 0.95
                    )
                    window_seed, skipped = int(rng.integers(2**31)), rng.random() < 0.1
                    middle, s = s + width / 2, s + width + gap
                    front = road.edge(side) + side * (network.walkway_width + setback + recess)
                    base = road.point(middle, front)
                    if skipped or not 0 < middle < road.length or abs(base).max() > PAINT_HALF * 1.3:
                        continue
                    heading = road.heading(middle)
                    along = np.array([np.cos(heading), np.sin(heading)]) * width / 2
                    out = side * np.array([-np.sin(heading), np.cos(heading)]) * depth
                    corners = np.array([base - along, base + along, base + along + out, base - along + out])
                    shape = Polygon(corners)
                    if keep_out.intersects(shape) or (taken and shapely.intersects(taken, shape).any()):
                        continue
                    taken.append(shape.buffer(-0.05))
                    red, green, blue = color.tolist()
                    buildings.append(Building(corners, height, (red, green, blue), window_seed))
    return buildings


def make_greenery(
    rng: np.random.Generator, network: Network, yards: list[Polygon], buildings: list[Building], actors: list[Actor]
) -> tuple[list[Tree], list[Pole]]:
    """Draws trees and lamp posts along the kerbs, off crossings and actors' paths, and trees on open ground."""
    walkable = shapely.union_all(network.walkways)
    busy = shapely.union_all(
        [c.polygon.buffer(3.0) for c in network.crossings]
        + [Point(p).buffer(max(a.size[:2]) / 2 + 0.4) for a in actors for p in a.trajectory.xy[::5]]
        + [LineString(a.trajectory.xy[[0, -1]]).buffer(0.8) for a in actors if np.ptp(a.trajectory.xy, axis=0).any()]
    )
    shapely.prepare(walkable)
    shapely.prepare(busy)
    trees: list[Tree] = []
    poles: list[Pole] = []
    for section in network.sections:
        road = network.roads[section.road]
        for side in (-1, 1):
            planted, spacing, lamp = rng.random() < 0.6, rng.uniform(8, 15), rng.uniform(24, 36)
            for kind, pitch, inset in (("pole", lamp, 0.45), ("tree", spacing, 0.75)):
                if kind == "tree" and not planted:
                    continue
                for s in np.arange(section.start + rng.uniform(1, 8), section.stop, pitch):
                    xy = road.point(s, road.edge(side) + side * inset)
                    crowded = any(np.linalg.norm(pole.xy - xy) < 2.5 for pole in poles)
                    spot = Point(xy)
                    if crowded or abs(xy).max() > PAINT_HALF or busy.intersects(spot) or not walkable.contains(spot):
                        continue
                    if kind == "pole":
                        poles.append(Pole(xy, float(rng.uniform(5.5, 9)), float(rng.uniform(0.07, 0.12))))
                    else:
                        trees.append(_draw_tree(rng, xy))
    ground = [network.surface, *network.islands, *network.walkways, *yards]
    solid = shapely.union_all([*ground, *[Polygon(b.footprint) for b in buildings]]).buffer(1.5)
    shapely.prepare(solid)
    for xy in rng.uniform(-PAINT_HALF, PAINT_HALF, (160, 2)):
        if not solid.intersects(Point(xy)):
            trees.append(_draw_tree(rng, xy))
    return trees, poles


def _draw_tree(rng: np.random.Generator, xy: np.ndarray) -> Tree:
    """Draws the size of a tree at a position [2]."""
    height, radius, crown = rng.uniform(2.4, 3.6), rng.uniform(0.12, 0.25), rng.uniform(1.2, 2.8)
    return Tree(xy, float(height), float(radius), float(crown))


def make_light(rng: np.random.Generator) -> Light:
    """Draws clear, hazy or overcast daylight with a low or high sun."""
    elevation, azimuth = np.radians(rng.uniform(14, 72)), rng.uniform(-np.pi, np.pi)
    sun = np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])
    overcast = rng.random() < 0.35
    warm = float(1.0 - np.sin(elevation))  # a low sun is yellow
    strength = 0.25 if overcast else 1.0
    color = (strength, strength * (0.97 - 0.15 * warm), strength * (0.92 - 0.35 * warm))
    sky = (0.72, 0.74, 0.77) if overcast else (0.45 + 0.2 * warm, 0.62 + 0.05 * warm, 0.88)
    fog = float(rng.uniform(0.003, 0.009) if rng.random() < 0.25 else rng.uniform(0.0004, 0.0025))
    ambient = float(rng.uniform(0.6, 0.8) if overcast else rng.uniform(0.3, 0.45))
    return Light(sun, color, sky, ambient, fog, float(rng.uniform(0.85, 1.15)))
