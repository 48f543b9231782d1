"""Builds the meshes of static objects without a box: buildings, trees, poles, kerb stones and a distant skyline."""

from __future__ import annotations

import numpy as np
from shapely.geometry import Polygon
from shapely.ops import triangulate

from perception.synthetic.district import District, Tree
from perception.synthetic.mesh import Material, MeshBuilder

KERB_HEIGHT, KERB_WIDTH = 0.12, 0.18


def add_scenery(builder: MeshBuilder, district: District, low: np.ndarray, rng: np.random.Generator) -> None:
    """Adds the district's scenery to a mesh.

    Args:
        builder: receives the faces; the owner of building k is -2 - k.
        district: the world.
        low: [2] global metres, the origin of the mesh.
        rng: source of randomness for colours, tree shapes and the skyline.
    """
    for k, building in enumerate(district.buildings):
        builder.owner = -2 - k
        _add_building(builder, building.footprint - low, building.height, np.array(building.color), rng)
    builder.owner = -1
    for kerb in district.kerbs:
        _add_kerb(builder, kerb.line - low)
    for tree in district.trees:
        _add_tree(builder, tree.xy - low, tree, rng)
    for pole in district.poles:
        base = np.append(pole.xy - low, 0.0)
        gray = np.array([0.42, 0.44, 0.45]) * rng.uniform(0.6, 1.2)
        top = base + np.array([0, 0, pole.height])
        builder.cylinder(base, top, pole.radius, gray, Material.METAL, sides=8, end_radius=0.7 * pole.radius)
        if pole.height > 4:  # a lamp on an arm
            angle = rng.uniform(0, 2 * np.pi)
            arm = top + np.array([1.3 * np.cos(angle), 1.3 * np.sin(angle), 0.15])
            builder.cylinder(top - np.array([0, 0, 0.1]), arm, 0.05, gray, Material.METAL, sides=6)
            builder.sphere(arm, [0.32, 0.32, 0.09], (0.85, 0.85, 0.8), Material.METAL)
    _add_skyline(builder, district, low, rng)


def _add_building(
    builder: MeshBuilder, footprint: np.ndarray, height: float, color: np.ndarray, rng: np.random.Generator
) -> None:
    """Adds walls, a flat roof and roof machinery on a footprint [P, 2]."""
    P = len(footprint)
    low, high = np.insert(footprint, 2, 0.0, axis=1), np.insert(footprint, 2, height, axis=1)
    walls = []
    for i in range(P):
        j = (i + 1) % P
        walls += [[i, j, P + j], [i, P + j, P + i]]
    builder.triangles(np.concatenate([low, high]), walls, color, Material.FACADE)
    outline = Polygon(footprint)
    for part in triangulate(outline):
        if not outline.contains(part.representative_point()):
            continue  # the triangulation covers the convex hull
        roof = np.array(part.exterior.coords)[:-1]
        builder.polygon(np.insert(roof, 2, height, axis=1), color * 0.6, Material.ROOF)
    center = footprint.mean(0)
    for _ in range(rng.integers(0, 3)):  # roof machinery
        at = center + (footprint[rng.integers(P)] - center) * rng.uniform(0, 0.5)
        size = rng.uniform(1.0, 2.5, 2)
        builder.box([*(at - size), height], [*(at + size), height + rng.uniform(1, 2.5)], color * 0.5, Material.ROOF)


def _add_kerb(builder: MeshBuilder, line: np.ndarray) -> None:
    """Adds a low stone strip along a line [P, 2]; stones of 1.2 m alternate slightly in brightness."""
    steps = np.linalg.norm(np.diff(line, axis=0), axis=1)
    line = line[np.concatenate([[True], steps > 1e-3])]
    if len(line) < 2:
        return
    arc = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])
    stops = np.unique(np.concatenate([arc, np.arange(0, arc[-1], 1.2)]))
    points = np.stack([np.interp(stops, arc, line[:, d]) for d in range(2)], -1)  # [P, 2]
    along = np.gradient(points, axis=0)
    if np.allclose(points[0], points[-1]):
        along[0] = along[-1] = points[1] - points[-2]
    along /= np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-9)
    across = np.stack([-along[:, 1], along[:, 0]], -1) * KERB_WIDTH / 2
    P = len(points)
    rims = [np.insert(points + side * across, 2, z, axis=1) for side, z in ((1, 0.0), (1, 1.0), (-1, 1.0), (-1, 0.0))]
    vertices = np.concatenate(rims) * [1, 1, KERB_HEIGHT]  # [4 P, 3]
    i = np.arange(P - 1)
    faces = []
    for a, b in ((0, 1), (1, 2), (2, 3)):
        faces += [np.stack([a * P + i, a * P + i + 1, b * P + i + 1], -1)]
        faces += [np.stack([a * P + i, b * P + i + 1, b * P + i], -1)]
    stone = 0.56 + 0.05 * ((stops[:-1] / 1.2).astype(int) % 2)
    colors = np.tile(stone[:, None] * np.array([1.0, 0.98, 0.95]), (6, 1))
    builder.triangles(vertices, np.concatenate(faces), colors, Material.KERB)


def _add_tree(builder: MeshBuilder, xy: np.ndarray, tree: Tree, rng: np.random.Generator) -> None:
    """Adds a trunk and three overlapping, bumpy crowns within the crown radius."""
    base = np.append(xy, 0.0)
    bark = np.array([0.30, 0.22, 0.15]) * rng.uniform(0.7, 1.3)
    middle = base + np.array([0, 0, tree.trunk_height + 0.75 * tree.crown_radius])
    builder.cylinder(base, middle, tree.trunk_radius, bark, Material.WOOD, end_radius=0.5 * tree.trunk_radius)
    leaf = np.array([0.20, 0.33, 0.12]) * rng.uniform(0.7, 1.35) + rng.uniform(-0.03, 0.05, 3)
    for k in range(3):
        radius = tree.crown_radius * (0.78 if k == 0 else rng.uniform(0.45, 0.6))
        offset = np.zeros(3) if k == 0 else rng.normal(0, 1, 3)
        offset *= (tree.crown_radius - radius) / max(float(np.linalg.norm(offset)), 1e-9)
        bumps = 1 + 0.13 * rng.standard_normal(200).clip(-2, 1)
        center = middle + offset * [1, 1, 0.7]
        builder.sphere(center, [radius, radius, radius * 0.9], leaf.clip(0, 1), Material.FOLIAGE, 2, bumps)


def _add_skyline(builder: MeshBuilder, district: District, low: np.ndarray, rng: np.random.Generator) -> None:
    """Adds a ring of distant houses and trees, so that roads do not end in the sky."""
    corners = [s.polygon.bounds for s in district.surfaces] or [(*low, *(low + 200))]
    bounds = np.array([np.min(corners, 0)[:2], np.max(corners, 0)[2:]]) - low
    center, reach = bounds.mean(0), np.linalg.norm(bounds[1] - bounds[0]) / 2
    angles = np.arange(0, 2 * np.pi, 0.085) + rng.uniform(0, 0.05)
    for angle in angles:
        distance = reach + rng.uniform(25, 90)
        at = center + distance * np.array([np.cos(angle), np.sin(angle)])
        if rng.random() < 0.6:
            size, height = rng.uniform(5, 14, 2), rng.uniform(7, 30)
            color = np.array([0.5, 0.47, 0.44]) * rng.uniform(0.7, 1.3) + rng.uniform(-0.04, 0.04, 3)
            builder.box([*(at - size), 0], [*(at + size), height], color.clip(0, 1), Material.ROOF)
        else:
            radius = rng.uniform(5, 9)
            bumps = 1 + 0.15 * rng.standard_normal(60)
            builder.sphere([*at, 4], [radius, radius, 5], (0.19, 0.28, 0.13), Material.FOLIAGE, 1, bumps)
