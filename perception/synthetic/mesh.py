"""Triangle meshes with a colour and a material per face, and a builder that assembles them from simple solids."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Material(IntEnum):
    """Material of a pixel or face. GRASS to MARKING lie flat on the ground; KERB and later ones are meshes."""

    SKY = 0
    GRASS = 1
    WALKWAY = 2
    ASPHALT = 3
    PARKING = 4
    CONCRETE = 5
    MARKING = 6
    KERB = 7
    FACADE = 8
    ROOF = 9
    FOLIAGE = 10
    WOOD = 11
    METAL = 12
    PAINT = 13
    GLASS = 14
    LAMP = 15
    RUBBER = 16
    CLOTH = 17


class Mesh(NamedTuple):
    """Triangles. Normals are not stored; the ray caster returns them."""

    vertices: np.ndarray  # [V, 3] float32 metres
    faces: np.ndarray  # [F, 3] int32
    colors: np.ndarray  # [F, 3] float32 RGB, 0..1
    materials: np.ndarray  # [F] uint8, Material
    owners: np.ndarray  # [F] int32: index of the actor; -2 - index of the building; -1 otherwise


_BOX = np.array([[x, y, z] for z in (0, 1) for x, y in ((1, 1), (-1, 1), (-1, -1), (1, -1))], dtype=np.float64)
_BOX_SIDES = ((0, 3, 7, 4), (1, 0, 4, 5), (2, 1, 5, 6), (3, 2, 6, 7), (4, 7, 6, 5), (0, 1, 2, 3))


@lru_cache(maxsize=4)
def _icosphere(subdivisions: int) -> tuple[np.ndarray, np.ndarray]:
    """Builds vertices on the unit sphere [V, 3] and faces [F, 3]: an icosahedron whose triangles are split in four."""
    g = (1 + 5**0.5) / 2
    corners = [[-1, g, 0], [1, g, 0], [-1, -g, 0], [1, -g, 0], [0, -1, g], [0, 1, g], [0, -1, -g], [0, 1, -g]]
    corners += [[g, 0, -1], [g, 0, 1], [-g, 0, -1], [-g, 0, 1]]
    faces = [[0, 11, 5], [0, 5, 1], [0, 1, 7], [0, 7, 10], [0, 10, 11], [1, 5, 9], [5, 11, 4], [11, 10, 2], [10, 7, 6]]
    faces += [[7, 1, 8], [3, 9, 4], [3, 4, 2], [3, 2, 6], [3, 6, 8], [3, 8, 9], [4, 9, 5], [2, 4, 11], [6, 2, 10]]
    faces += [[8, 6, 7], [9, 8, 1]]
    points = [np.array(corner) / np.linalg.norm(corner) for corner in corners]
    for _ in range(subdivisions):
        middles: dict[tuple[int, int], int] = {}

        def middle(a: int, b: int, middles: dict[tuple[int, int], int] = middles) -> int:
            key = (min(a, b), max(a, b))
            if key not in middles:
                point = points[a] + points[b]
                points.append(point / np.linalg.norm(point))
                middles[key] = len(points) - 1
            return middles[key]

        split = []
        for a, b, c in faces:
            ab, bc, ca = middle(a, b), middle(b, c), middle(c, a)
            split += [[a, ab, ca], [b, bc, ab], [c, ca, bc], [ab, bc, ca]]
        faces = split
    return np.array(points), np.array(faces, dtype=np.int32)


def _cross(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> np.ndarray:
    """Returns the cross product of two vectors [3], in a tenth of the time that `numpy.cross` takes for one pair."""
    return np.array([a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]])


class MeshBuilder:
    """Collects solids. Every added face gets the current `owner`."""

    def __init__(self) -> None:
        self.owner = -1
        self._parts: list[Mesh] = []
        self._count = 0

    def triangles(self, vertices: ArrayLike, faces: ArrayLike, color: ArrayLike, material: Material) -> None:
        """Adds triangles: vertices [V, 3], faces [F, 3] of vertex indices, color [3] or [F, 3]."""
        vertices, faces = np.asarray(vertices, np.float32), np.asarray(faces, dtype=np.int32)
        colors = np.broadcast_to(np.asarray(color, dtype=np.float32), (len(faces), 3))
        materials = np.full(len(faces), material, dtype=np.uint8)
        owners = np.full(len(faces), self.owner, dtype=np.int32)
        self._parts.append(Mesh(vertices, faces + self._count, colors, materials, owners))
        self._count += len(vertices)

    def polygon(self, points: np.ndarray, color: ArrayLike, material: Material) -> None:
        """Adds one flat convex polygon [P, 3]."""
        fan = [[0, i, i + 1] for i in range(1, len(points) - 1)]
        self.triangles(points, fan, color, material)

    def box(
        self,
        low: ArrayLike,
        high: ArrayLike,
        color: ArrayLike,
        material: Material,
        top: ArrayLike = 1.0,
        lean: float = 0.0,
    ) -> None:
        """Adds a box from corner `low` to corner `high`.

        Args:
            low, high: [3] corners.
            color: RGB.
            material: a Material.
            top: scale of the upper face about its centre: one number, or one along x and one along y.
            lean: shift of the upper face along x, metres.
        """
        low, high = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
        scale = np.ones((8, 2))
        scale[4:] = top
        vertices = np.empty((8, 3))
        vertices[:, :2] = (low + high)[:2] / 2 + _BOX[:, :2] * scale * (high - low)[:2] / 2
        vertices[:, 2] = low[2] + _BOX[:, 2] * (high - low)[2]
        vertices[4:, 0] += lean
        faces = [triangle for a, b, c, d in _BOX_SIDES for triangle in ((a, b, c), (a, c, d))]
        self.triangles(vertices, faces, color, material)

    def extrude(self, profile: ArrayLike, half_width: float, color: ArrayLike, material: Material) -> None:
        """Adds a solid from a convex side view [P, 2] (x, z), from y = -half_width to +half_width."""
        profile = np.asarray(profile, dtype=np.float64)
        P = len(profile)
        left = np.insert(profile, 1, half_width, axis=1)  # [P, 3]
        right = np.insert(profile, 1, -half_width, axis=1)
        fan = [[0, i, i + 1] for i in range(1, P - 1)]
        faces = fan + [[P + a, P + b, P + c] for a, b, c in fan]
        for i in range(P):
            j = (i + 1) % P
            faces += [[i, j, P + j], [i, P + j, P + i]]
        self.triangles(np.concatenate([left, right]), faces, color, material)

    def cylinder(
        self,
        start: ArrayLike,
        end: ArrayLike,
        radius: float,
        color: ArrayLike,
        material: Material,
        sides: int = 8,
        end_radius: float | None = None,
    ) -> None:
        """Adds a cylinder or cone with caps between two points [3]."""
        start, end = np.asarray(start, dtype=np.float64), np.asarray(end, dtype=np.float64)
        axis = (end - start) / np.linalg.norm(end - start)
        across = _cross(axis, (1.0, 0.0, 0.0) if abs(axis[0]) < 0.9 else (0.0, 1.0, 0.0))
        across /= np.linalg.norm(across)
        angle = np.arange(sides) * (2 * np.pi / sides)
        ring = np.cos(angle)[:, None] * across + np.sin(angle)[:, None] * _cross(axis, across)  # [sides, 3]
        end_radius = radius if end_radius is None else end_radius
        vertices = np.concatenate([start + ring * radius, end + ring * end_radius])
        faces = []
        for i in range(sides):
            j = (i + 1) % sides
            faces += [[i, j, sides + j], [i, sides + j, sides + i]]
        for i in range(1, sides - 1):
            faces += [[0, i, i + 1], [sides, sides + i, sides + i + 1]]
        self.triangles(vertices, faces, color, material)

    def ring(self, center: ArrayLike, radius: float, thickness: float, color: ArrayLike, sides: int = 16) -> None:
        """Adds a thin upright wheel rim in the xz plane through `center` [3]."""
        center = np.asarray(center)
        angle = np.arange(sides) * (2 * np.pi / sides)
        around = np.stack([np.cos(angle), np.zeros(sides), np.sin(angle)], -1)  # [sides, 3]
        vertices = np.concatenate([center + around * radius, center + around * (radius - thickness)])
        faces = []
        for i in range(sides):
            j = (i + 1) % sides
            faces += [[i, j, sides + j], [i, sides + j, sides + i]]
        self.triangles(vertices, faces, color, Material.RUBBER)

    def sphere(
        self,
        center: ArrayLike,
        radii: ArrayLike,
        color: ArrayLike,
        material: Material,
        subdivisions: int = 1,
        bumps: np.ndarray | None = None,
    ) -> None:
        """Adds an ellipsoid with radii [3]; `bumps` [V] scales each vertex's distance from the centre."""
        points, faces = _icosphere(subdivisions)
        if bumps is not None:
            points = points * bumps[: len(points), None]
        self.triangles(np.asarray(center) + points * np.asarray(radii), faces, color, material)

    def build(self) -> Mesh:
        """Joins all added solids into one mesh."""
        if not self._parts:
            empty = np.zeros((0, 3), np.float32)
            return Mesh(empty, np.zeros((0, 3), np.int32), empty, np.zeros(0, np.uint8), np.zeros(0, np.int32))
        return Mesh(*(np.concatenate(field) for field in zip(*self._parts, strict=True)))
