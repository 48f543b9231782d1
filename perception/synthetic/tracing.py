"""Casts rays against the meshes of a district with Embree."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene

from perception.synthetic.mesh import Material, Mesh, MeshBuilder

CELL = 0.5  # metres of a cell of the shadow map
LOWEST_SUN = 0.1  # sine of the elevation below which shadows are too long for a map


class Hits(NamedTuple):
    """First hits of R rays."""

    distance: np.ndarray  # [R] float32 metres, inf for none
    face: np.ndarray  # [R] int32: a face of the static meshes, then of the moving ones; -1 for none
    normal: np.ndarray  # [R, 3] float32, not normalised, of either orientation


class RayCaster:
    """Static meshes, and moving meshes placed at one time, in the light of one sun.

    What stands still is built once, what moves for each picture. Embree looks at each ray alone, so rays that hit no
    moving mesh are not cast at them: those outside `may_hit`, and those to the sun from where no shadow may fall.

    Args:
        static: in the renderer's frame.
        moving: each in its own frame; `place` moves their vertices.
        sun: [3] unit vector towards the sun.
    """

    def __init__(self, static: list[Mesh], moving: list[Mesh], sun: np.ndarray) -> None:
        still = _join(static)
        self._static = embree_scene(still.vertices, still.faces)
        self._moving_faces = [mesh.faces for mesh in moving]
        self._first_faces = len(still.faces) + np.cumsum([0] + [len(faces) for faces in self._moving_faces[:-1]])
        meshes = [still, *moving]
        self.colors = np.ascontiguousarray(np.concatenate([mesh.colors for mesh in meshes]).T) ** 2  # [3, F] linear
        self.materials = np.concatenate([mesh.materials for mesh in meshes])  # [F]
        self.walls = self.materials == Material.FACADE  # [F]
        self.owners = np.concatenate([mesh.owners for mesh in meshes])  # [F]
        self._sun = np.asarray(sun, np.float32)
        self._scene: EmbreeScene | None = None

    def place(self, moving: np.ndarray, vertices: list[np.ndarray], corners: np.ndarray) -> None:
        """Places moving meshes in the renderer's frame; the others are nowhere.

        Args:
            moving: [M] indices of the meshes.
            vertices: [V, 3] of each of them.
            corners: [M, 8, 3] of boxes in which they lie.
        """
        self._scene = None
        if len(moving):
            # One mesh of all: where faces coincide, the order in which Embree finds them decides on the picture.
            # Embree's wrapper reads Python's numbers faster than numpy's.
            own = [self._moving_faces[k] for k in moving]
            starts = np.cumsum([0] + [len(v) for v in vertices[:-1]])
            faces = np.concatenate([f + start for f, start in zip(own, starts, strict=True)])
            self._scene = embree_scene(np.concatenate(vertices), faces.astype(object))
            self._placed_faces = np.concatenate(
                [np.arange(first, first + len(f)) for f, first in zip(own, self._first_faces[moving], strict=True)]
            ).astype(np.int32)
            self._shadows = _ShadowMap(corners, self._sun)

    def first_hits(self, origin: np.ndarray, rays: np.ndarray, may_hit: np.ndarray | None = None) -> Hits:
        """Finds the first hits of rays [R, 3] with unit directions, float32, from `origin` [3].

        `may_hit` has the indices of all rays that pass a moving mesh so closely that they may hit it; None means all.
        """
        found = self._static.run(np.broadcast_to(origin, rays.shape), rays, output=1)
        face, distance, normal = found["primID"], found["tfar"], found["Ng"]
        distance[face < 0] = np.inf
        if self._scene is not None and (may_hit is None or len(may_hit)):
            rays = rays if may_hit is None else rays[may_hit]
            found = self._scene.run(np.broadcast_to(origin, rays.shape), rays, output=1)
            before = distance if may_hit is None else distance[may_hit]
            nearer = np.flatnonzero((found["primID"] >= 0) & (found["tfar"] < before))
            rows = nearer if may_hit is None else may_hit[nearer]
            distance[rows], normal[rows] = found["tfar"][nearer], found["Ng"][nearer]
            face[rows] = self._placed_faces.take(found["primID"][nearer])
        return Hits(distance, face, normal)

    def sunlit(self, points: np.ndarray) -> np.ndarray:
        """Returns 1 for points [3, R] in direct sunlight, else 0, [R] float32."""
        starts = np.ascontiguousarray(points.T)
        lit = self._static.run(starts, np.broadcast_to(self._sun, starts.shape), query="OCCLUDED") < 0
        if self._scene is not None:
            dark = np.flatnonzero(self._shadows.covers(points))
            if len(dark):
                starts = starts[dark]
                lit[dark] &= self._scene.run(starts, np.broadcast_to(self._sun, starts.shape), query="OCCLUDED") < 0
        return lit.astype(np.float32)


class _ShadowMap:
    """Cells of the ground that the shadows of meshes may touch. A ray towards the sun meets the ground in one cell.

    Args:
        corners: [M, 8, 3] of the boxes in which the meshes lie.
        sun: [3] unit vector towards the sun.
    """

    def __init__(self, corners: np.ndarray, sun: np.ndarray) -> None:
        ground = shadows_on_ground(corners, sun)
        self._slope = None if ground is None else sun[:2] / sun[2]
        if ground is None:
            return
        shadows = ground[..., :2]  # [M, 8, 2]
        margin = 3 * CELL  # what rounding and the outline of a polygon may miss, and an empty frame around the shadows
        self._low = (shadows.min((0, 1)) - margin).astype(np.float32)
        columns, rows = np.ceil((shadows.max((0, 1)) + margin - self._low) / CELL).astype(int) + 1
        cells = np.zeros((rows, columns), np.uint8)
        for shadow in np.floor((shadows - self._low) / CELL).astype(np.int32):
            cv2.fillConvexPoly(cells, cv2.convexHull(shadow), (1,))
        self._cells = cv2.dilate(cells, np.ones((3, 3), np.uint8))

    def covers(self, points: np.ndarray) -> np.ndarray:
        """Returns whether points [3, R] may lie in a shadow, [R] bool; those that do not surely lie in none."""
        if self._slope is None:
            return np.ones(points.shape[1], bool)
        index = []
        for d, side in enumerate(self._cells.shape[::-1]):
            cell = ((points[d] - self._slope[d] * points[2] - self._low[d]) * np.float32(1 / CELL)).astype(np.int32)
            index.append(np.clip(cell, 0, side - 1, out=cell))
        return self._cells.ravel().take(index[1] * self._cells.shape[1] + index[0]) > 0


def shadows_on_ground(corners: np.ndarray, sun: np.ndarray) -> np.ndarray | None:
    """Projects points [..., 3] to the ground along the light of the sun [3]; None if the sun is too low for that."""
    return corners - corners[..., 2:] * (sun / sun[2]) if sun[2] > LOWEST_SUN else None


def cones(origin: np.ndarray, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns cones from a point [3] around boxes with corners [M, P, 3]: axes [M, 3] and half angles [M], radians."""
    points = corners - origin  # [M, P, 3]
    axes = points.mean(1)
    axes /= np.maximum(np.linalg.norm(axes, axis=-1, keepdims=True), 1e-9)
    cosines = (points * axes[:, None]).sum(-1) / np.linalg.norm(points, axis=-1)
    angles = np.arccos(np.clip(cosines.min(1), -1, 1))
    # A cone of nearly half of all directions or more does not hold the whole box.
    return axes, np.where(angles < 1.4, angles, np.pi)


def embree_scene(vertices: np.ndarray, faces: np.ndarray) -> EmbreeScene:
    """Builds an Embree scene of vertices [V, 3] and faces [F, 3]."""
    scene = EmbreeScene()
    TriangleMesh(scene, vertices, faces)
    return scene


def _join(meshes: list[Mesh]) -> Mesh:
    """Joins meshes into one."""
    if not meshes:
        return MeshBuilder().build()
    offsets = np.cumsum([0] + [len(m.vertices) for m in meshes[:-1]])
    shifted = [m._replace(faces=m.faces + offset) for m, offset in zip(meshes, offsets, strict=True)]
    return Mesh(*(np.concatenate(field) for field in zip(*shifted, strict=True)))
