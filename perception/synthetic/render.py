"""Renders a district by ray casting: camera images with depth, actor and material buffers, and LiDAR sweeps.

Rays are cast with Embree against triangles; the ground is a plane whose colour comes from `Ground`.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from embreex.rtcore_scene import EmbreeScene

from perception.geometry import box_corners, rigid_from_yaw
from perception.synthetic.actors import actor_mesh
from perception.synthetic.district import District
from perception.synthetic.ground import Ground
from perception.synthetic.mesh import Material, MeshBuilder
from perception.synthetic.scenery import add_scenery
from perception.synthetic.sensors import Camera, Lidar
from perception.synthetic.shading import Shader, expose
from perception.synthetic.tracing import RayCaster, cones, embree_scene, shadows_on_ground

_TILE = 16  # pixels along the sides of the tiles of an image for which objects are looked up
_BAND = 32000  # pixels that are rendered at once, in arrays that fit into a cache; OpenCV's remap takes up to 32,766
_INTENSITY = np.array([0, 12, 14, 8, 8, 16, 45, 18, 22, 14, 10, 12, 30, 34, 4, 60, 6, 14], np.float32)


class Picture(NamedTuple):
    """Image of one camera with its depth, actor and material buffers."""

    rgb: np.ndarray  # [H, W, 3] uint8
    depth: np.ndarray  # [H, W] float32 metres along the optical axis, inf for the sky, NaN where the lens shows nothing
    distance: np.ndarray  # [H, W] float32 metres along the ray, in the same way
    actor: np.ndarray  # [H, W] int32 index into District.actors, -1 otherwise
    material: np.ndarray  # [H, W] uint8 Material


class Sweep(NamedTuple):
    """One revolution of the LiDAR."""

    points_lidar: np.ndarray  # [P, 5] float32 x, y, z (metres), intensity (0..255), ring
    actor: np.ndarray  # [P] int32 index into District.actors, -1 otherwise


class _View(NamedTuple):
    """What all images of one camera share."""

    rays: np.ndarray  # [H, W, 3] float32 unit directions in the camera frame; forward where the lens shows nothing
    dark: np.ndarray | None  # [H, W] bool, outside the image circle of a fisheye
    factors: np.ndarray  # [H, W, 3] float32 vignetting and gain
    axes: np.ndarray  # [T, 3] of cones around the rays of each tile of the image
    angles: np.ndarray  # [h, w] half angles of the cones, radians; T = h w


class TownRenderer:
    """Renders one district at any time within its duration.

    Args:
        district: the world.
        rng: source of randomness for textures; the labels do not depend on it.
    """

    def __init__(self, district: District, rng: np.random.Generator) -> None:
        self.district = district
        self._ground = Ground(district, district.ego.xy, rng)
        # Float32 is precise enough near the origin, so the renderer's frame starts at the corner of the ground texture.
        self._low = self._ground.low
        self._shader = Shader(district.light, district.buildings, rng)
        builder = MeshBuilder()
        add_scenery(builder, district, self._low, rng)
        self._actor_meshes = [actor_mesh(actor, k) for k, actor in enumerate(district.actors)]
        self._poses = [actor.trajectory.at(0.0) for actor in district.actors]  # at the current time
        self._sizes = np.array([actor.size for actor in district.actors]).reshape(-1, 3)
        self._single_scenes: dict[int, EmbreeScene] = {}  # each actor alone, in the actor's frame
        static = [builder.build()]
        moving = []
        for k, actor in enumerate(district.actors):
            if actor.trajectory.static:
                static.append(self._actor_meshes[k]._replace(vertices=self._at_pose(k)))
            else:
                moving.append(k)
        self._moving = np.array(moving, int)
        self._caster = RayCaster(static, [self._actor_meshes[k] for k in moving], self._shader.sun)
        self._view: tuple[Camera, _View] | None = None  # of the last camera
        self._time = np.nan
        self._placed: np.ndarray | None = None  # indices into `_moving` of what the caster has at `_time`

    def global_from_ego(self, time: float) -> np.ndarray:
        """Returns the pose of the car at `time` seconds, [4, 4] float64."""
        xy, yaw = self.district.ego.at(time)
        return rigid_from_yaw(yaw, (*xy, 0.0))

    def camera(self, camera: Camera, time: float, rng: np.random.Generator) -> Picture:
        """Renders the image of one camera exposed at `time` seconds; `rng` draws the sensor noise."""
        H, W = camera.image_size
        if self._view is None or self._view[0] is not camera:
            self._view = camera, _view(camera)
        view = self._view[1]
        self._move_to(time)
        origin, rotation = self._mount(camera.ego_from_cam, time)
        self._place(self._needed(view, origin, rotation))
        crowded = np.repeat(self._crowded(view, origin, rotation), _TILE, axis=1)[:, :W]  # [h, W]
        light = np.empty((H, W, 3), np.float32)
        distance = np.empty((H, W), np.float32)
        actor, material = np.empty((H, W), np.int32), np.empty((H, W), np.uint8)
        pixel = float(1 / camera.img_from_cam[0, 0])
        rows = max(1, _BAND // W)
        for top in range(0, H, rows):
            band = np.arange(top, min(top + rows, H))
            may_hit = np.flatnonzero(crowded[band // _TILE])
            part = slice(top, top + rows)
            buffers = (array[part].reshape(-1, *array.shape[2:]) for array in (light, distance, actor, material))
            self._render(view.rays[part].reshape(-1, 3) @ rotation.T, may_hit, origin, pixel, *buffers)
        if view.dark is not None:
            dark = view.dark
            light[dark], material[dark], actor[dark], distance[dark] = 0.0, Material.SKY, -1, np.nan
        depth = np.where(np.isinf(distance), np.inf, distance * view.rays[..., 2])
        return Picture(expose(light, view.factors, camera.noise, rng), depth, distance, actor, material)

    def _needed(self, view: _View, origin: np.ndarray, rotation: np.ndarray) -> np.ndarray:
        """Returns the moving actors that an image may show, or whose shadows it may show: indices into `_moving`."""
        boxes = self._boxes[self._moving]
        shadows = shadows_on_ground(boxes, self._shader.sun)
        if shadows is None:
            return np.arange(len(boxes))
        return np.flatnonzero(_tiles_near(view, origin, rotation, np.concatenate([boxes, shadows], 1)).any(0))

    def _crowded(self, view: _View, origin: np.ndarray, rotation: np.ndarray) -> np.ndarray:
        """Returns the tiles of an image in which moving actors may be seen, [h, w] bool."""
        near = _tiles_near(view, origin, rotation, self._boxes[self._moving])
        return near.any(1).reshape(view.angles.shape)

    def _render(
        self,
        rays: np.ndarray,
        may_hit: np.ndarray,
        origin: np.ndarray,
        pixel: float,
        light: np.ndarray,
        distance: np.ndarray,
        actor: np.ndarray,
        material: np.ndarray,
    ) -> None:
        """Renders pixels.

        Args:
            rays: [R, 3] unit directions in the renderer's frame.
            may_hit: indices of the rays that may hit a moving actor.
            origin: [3] position of the camera.
            pixel: angle of a pixel, radians.
            light, distance, actor, material: [R, 3], [R], [R], [R] receive the result.
        """
        caster = self._caster
        hits = caster.first_hits(origin, rays, may_hit)
        rays = np.ascontiguousarray(rays.T)  # [3, R]
        with np.errstate(divide="ignore"):
            ground = np.where(rays[2] < -1e-4, -origin[2] / rays[2], np.float32(np.inf))  # [R]
        on_mesh = hits.distance < ground
        on_ground = ~on_mesh & (ground < np.inf)
        np.minimum(hits.distance, ground, out=distance)
        actor[:] = -1
        material[:] = Material.SKY
        color = np.empty_like(rays)

        def paint(at: np.ndarray, colors: np.ndarray) -> None:
            for channel, values in zip(color, colors, strict=True):
                channel[at] = values

        sky, flat = np.flatnonzero(~(on_mesh | on_ground)), np.flatnonzero(on_ground)
        if len(sky):
            paint(sky, self._shader.sky(rays.take(sky, axis=1)))
        if len(flat):
            colors, material[flat] = self._shader.ground(
                self._ground, self._contact_at, rays.take(flat, axis=1), ground.take(flat), origin, pixel, caster.sunlit
            )
            paint(flat, colors)
        wall = on_mesh & caster.walls.take(hits.face)
        walls, others = np.flatnonzero(wall), np.flatnonzero(on_mesh & ~wall)
        mesh = np.concatenate([walls, others])
        if len(mesh):
            face = hits.face.take(mesh)
            owner, kind = caster.owners.take(face), caster.materials.take(face)
            seen = rays.take(mesh, axis=1), hits.distance.take(mesh)
            surface = caster.colors.take(face, axis=1), kind, -2 - owner[: len(walls)]
            normal = np.ascontiguousarray(hits.normal.take(mesh, axis=0).T)
            paint(mesh, self._shader.mesh(*surface, *seen, normal, origin, pixel, caster.sunlit))
            material[mesh], actor[mesh] = kind, np.maximum(owner, -1)
        light[:] = color.T

    def lidar(self, lidar: Lidar, time: float, rng: np.random.Generator) -> Sweep:
        """Simulates one revolution of the LiDAR at `time` seconds; `rng` draws range noise and lost returns."""
        self._move_to(time)
        self._place(np.arange(len(self._moving)))
        origin, rotation = self._mount(lidar.ego_from_spin, time)
        rays_spin = lidar.rays()
        ring = np.repeat(np.arange(len(rays_spin)), rays_spin.shape[1])
        rays_spin = rays_spin.reshape(-1, 3)
        rays = rays_spin @ rotation.T
        hits = self._caster.first_hits(origin, rays)
        with np.errstate(divide="ignore"):
            ground = np.where(rays[:, 2] < -1e-4, -origin[2] / rays[:, 2], np.inf).astype(np.float32)
        distance = np.minimum(hits.distance, ground)
        on_mesh = hits.distance < ground
        actor = np.where(on_mesh, np.maximum(self._caster.owners[hits.face], -1), -1).astype(np.int32)
        ground_xy = origin[:2] + rays[:, :2] * np.where(np.isfinite(ground), ground, 0)[:, None]
        material = np.where(on_mesh, self._caster.materials[hits.face], self._ground.materials(*ground_xy.T))
        kept = (distance < lidar.max_range) & (rng.random(len(rays)) >= lidar.dropout)
        distance = distance + lidar.range_noise * rng.standard_normal(len(rays), dtype=np.float32)
        intensity = _INTENSITY[material] * rng.uniform(0.8, 1.2, len(rays)).astype(np.float32)
        points_lidar = (rays_spin @ lidar.lidar_from_spin.T) * distance[:, None]
        points = np.concatenate([points_lidar, intensity[:, None], ring[:, None]], 1)
        return Sweep(points[kept].astype(np.float32), actor[kept])

    def visibility(self, cameras: tuple[Camera, ...], time: float, rays_per_actor: int = 64) -> np.ndarray:
        """Measures the visible share of each actor in all cameras, relative to the actor without occlusion.

        Args:
            cameras: all are exposed at `time`.
            time: seconds.
            rays_per_actor: rays that each camera casts at each actor's box.

        Returns:
            [A] float in 0..1, one per actor; 0 if an actor is outside all images.
        """
        self._move_to(time)
        self._place(np.arange(len(self._moving)))
        A = len(self.district.actors)
        # The same points in the unit cube for every actor: an R3 low-discrepancy sequence.
        steps = np.arange(1, rays_per_actor + 1)[:, None] * np.array([0.8191725, 0.6710436, 0.5497005])
        unit = (steps % 1.0 - 0.5) * [1, 1, 1] + [0, 0, 0.5]  # [R, 3]
        centers = np.array([[*(xy - self._low), 0.0] for xy, _ in self._poses]).reshape(-1, 3)
        turns = np.array([rigid_from_yaw(yaw)[:3, :3] for _, yaw in self._poses]).reshape(-1, 3, 3)
        points = (unit * self._sizes[:, None]) @ turns.swapaxes(1, 2) + centers[:, None]  # [A, R, 3]
        expected, seen = np.zeros(A), np.zeros(A)
        for camera in cameras:
            origin, rotation = self._mount(camera.ego_from_cam, time)
            away = centers - origin
            near = np.linalg.norm(away, axis=1) <= 90
            if camera.max_angle < np.pi / 2:
                near &= away @ rotation[:, 2] >= -8
            kept = np.flatnonzero(near)
            targets = points[kept] - origin  # [K, R, 3]
            inside = camera.sees(targets @ rotation)  # [K, R]
            owners, all_rays = [], []
            for k, target, shown in zip(kept, targets, inside, strict=True):
                if not shown.any():
                    continue
                rays = target[shown] / np.linalg.norm(target[shown], axis=1, keepdims=True)
                if k not in self._single_scenes:
                    self._single_scenes[k] = embree_scene(self._actor_meshes[k].vertices, self._actor_meshes[k].faces)
                start = np.broadcast_to(((origin - centers[k]) @ turns[k]).astype(np.float32), rays.shape)
                hit = self._single_scenes[k].run(start, (rays @ turns[k]).astype(np.float32)) >= 0
                owners.append(np.full(hit.sum(), k))
                all_rays.append(rays[hit])
            if owners:
                owner, rays = np.concatenate(owners), np.concatenate(all_rays).astype(np.float32)
                hits = self._caster.first_hits(origin, rays)
                first = np.where(hits.face >= 0, self._caster.owners[hits.face], -1)
                expected += np.bincount(owner, minlength=A)
                seen += np.bincount(owner[first == owner], minlength=A)
        return seen / np.maximum(expected, 1)

    def _mount(self, ego_from_sensor: np.ndarray, time: float) -> tuple[np.ndarray, np.ndarray]:
        """Returns position [3] and rotation [3, 3] of a sensor in the renderer's frame, float32."""
        pose = self.global_from_ego(time) @ ego_from_sensor
        pose[:2, 3] -= self._low
        return pose[:3, 3].astype(np.float32), pose[:3, :3].astype(np.float32)

    def _at_pose(self, k: int) -> np.ndarray:
        """Returns the vertices of actor k at the current time, in the renderer's frame, [V, 3] float32."""
        xy, yaw = self._poses[k]
        pose = rigid_from_yaw(yaw, (*(xy - self._low), 0.0))
        return (self._actor_meshes[k].vertices @ pose[:3, :3].T + pose[:3, 3]).astype(np.float32)

    def _move_to(self, time: float) -> None:
        """Moves the boxes of all actors and their contact shadows to where they are at `time`."""
        if time == self._time:
            return
        self._time, self._placed = time, None
        actors = self.district.actors
        for k in self._moving:
            self._poses[k] = actors[k].trajectory.at(time)
        centers = np.array([[*(xy - self._low), 0.0] for xy, _ in self._poses]).reshape(-1, 3)
        yaws = np.array([yaw for _, yaw in self._poses])
        lifted = centers + self._sizes * [0, 0, 0.5]
        self._boxes = box_corners(lifted, self._sizes + 0.02, yaws)  # [A, 8, 3], a little larger than the meshes
        # Contact shadows: a blurred image of all footprints near the car, 0.25 m per pixel.
        self._contact_low = (self.district.ego.at(time)[0] - self._low - 64).astype(np.float32)
        contact = np.zeros((512, 512), np.uint8)
        if actors:
            centers = np.array([[*(xy - self._low - self._contact_low), 0.0] for xy, _ in self._poses])
            corners = box_corners(centers, self._sizes, yaws)[:, :4, :2]  # [A, 4, 2]
            near = (np.abs(centers[:, :2] - 64) < 80).all(1)
            for outline in np.round(corners[near] * (4 * 16)).astype(np.int32):
                cv2.fillPoly(contact, [outline], (255,), cv2.LINE_8, 4)
        self._contact = cv2.GaussianBlur(contact, (9, 9), 1.5)

    def _place(self, needed: np.ndarray) -> None:
        """Places the meshes of moving actors, given as indices into `_moving`, where they are at the current time."""
        if self._placed is None or not np.array_equal(needed, self._placed):
            actors = self._moving[needed]
            self._caster.place(needed, [self._at_pose(k) for k in actors], self._boxes[actors])
            self._placed = needed

    def _contact_at(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Returns the strength of contact shadows at points [R] of the ground, 0..255."""
        u, v = (x - self._contact_low[0]) * 4 - 0.5, (y - self._contact_low[1]) * 4 - 0.5
        return np.asarray(cv2.remap(self._contact, u[None], v[None], cv2.INTER_LINEAR))[0]


def _tiles_near(view: _View, origin: np.ndarray, rotation: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Returns which tiles of an image may show which of the boxes with corners [M, P, 3], [T, M] bool."""
    axes, angles = cones(origin, corners)
    tiles = view.axes @ rotation.T.astype(np.float64)  # [T, 3]
    between = np.arccos(np.clip(tiles @ axes.T, -1, 1))  # [T, M]
    # Points that receive a shadow are moved off their surface by 3 cm; the rest is more than all rounding.
    margin = 0.003 + 0.04 / np.maximum(np.linalg.norm(corners - origin, axis=-1).min(1), 0.01)  # [M]
    return between <= angles + margin + view.angles.reshape(-1, 1)


def _view(camera: Camera) -> _View:
    """Computes what all images of a camera share."""
    H, W = camera.image_size
    rays = camera.rays()
    dark = np.isnan(rays[..., 0])
    if dark.any():
        rays = np.where(dark[..., None], np.array([0, 0, 1], np.float32), rays)
    v, u = np.ogrid[-1 : 1 : H * 1j, -1 : 1 : W * 1j]
    falloff = 1 - camera.vignette * (u**2 + v**2) / 2
    factors = falloff[..., None].astype(np.float32) * camera.gain.astype(np.float32)
    padded = np.pad(rays, ((0, -H % _TILE), (0, -W % _TILE), (0, 0)), "edge").astype(np.float64)
    tiles = padded.reshape(len(padded) // _TILE, _TILE, -1, _TILE, 3).swapaxes(1, 2)  # [h, w, TILE, TILE, 3]
    axes = tiles.mean((2, 3))
    axes /= np.maximum(np.linalg.norm(axes, axis=-1, keepdims=True), 1e-9)
    angles = np.arccos(np.clip((tiles * axes[:, :, None, None]).sum(-1).min((2, 3)), -1, 1))
    return _View(rays, dark if dark.any() else None, factors, axes.reshape(-1, 3), angles)
