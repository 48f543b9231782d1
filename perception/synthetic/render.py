"""Renders a district by ray casting: camera images with depth, actor and material buffers, and LiDAR sweeps.

Rays are cast with Embree against triangles; the ground is a plane whose colour comes from `Ground`. Shading is done in
numpy, in linear light, one camera at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene

from perception.geometry import box_corners, rigid_from_yaw
from perception.synthetic.actors import actor_mesh
from perception.synthetic.district import District
from perception.synthetic.ground import Ground, smooth_noise
from perception.synthetic.mesh import Material, Mesh, MeshBuilder
from perception.synthetic.scenery import add_scenery
from perception.synthetic.sensors import Camera, Lidar

# Samples per pixel over which the ground is averaged along the viewing direction.
_GROUND_TAPS = 5
_NOISE_SIDE = 512
# Strength of the fine texture per material, in the order of Material.
_GRAIN = np.array([0, 0, 0, 0, 0, 0, 0, 0.06, 0.05, 0.06, 0.30, 0.22, 0.03, 0.0, 0.0, 0.0, 0.05, 0.03], np.float32)
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


class _Hits(NamedTuple):
    """First hits of R rays."""

    distance: np.ndarray  # [R] float32 metres, inf for none
    face: np.ndarray  # [R] int32 into the renderer's face arrays, -1 for none
    normal: np.ndarray  # [R, 3] float32, not normalised, of either orientation


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
        self._noise = smooth_noise(rng, _NOISE_SIDE, (0, 1, 3))
        self._clouds = smooth_noise(rng, _NOISE_SIDE, (4, 10, 30))
        self._cloudiness = rng.uniform(0.0, 0.8)

        builder = MeshBuilder()
        add_scenery(builder, district, self._low, rng)
        self._actor_meshes = [actor_mesh(actor, k) for k, actor in enumerate(district.actors)]
        static = [builder.build()]
        self._moving: list[int] = []
        self._single_scenes: dict[int, EmbreeScene] = {}  # each actor alone, in the actor's frame
        for k, actor in enumerate(district.actors):
            if actor.trajectory.static:
                static.append(self._actor_meshes[k]._replace(vertices=self._placed(k, 0.0)))
            else:
                self._moving.append(k)
        fixed = _join(static)
        moving = _join([self._actor_meshes[k] for k in self._moving])
        self._static_scene = _embree(fixed.vertices, fixed.faces)
        self._static_count, self._moving_faces = len(fixed.faces), moving.faces
        self._colors = np.concatenate([fixed.colors, moving.colors]) ** 2  # linear light, gamma 2
        self._materials = np.concatenate([fixed.materials, moving.materials])
        self._owners = np.concatenate([fixed.owners, moving.owners])
        self._moving_scene: EmbreeScene | None = None
        self._time = np.nan

        # Windows per building: storey height, spacing, width, height of the glass (metres), brightness, seed.
        self._facades = np.zeros((len(district.buildings), 6), np.float32)
        for row, building in zip(self._facades, district.buildings, strict=True):
            style = np.random.default_rng(building.window_seed)
            row[:] = style.uniform([2.9, 1.8, 0.4, 1.3, 0.1, 0], [3.8, 3.6, 0.75, 1.9, 0.3, 1000])
            row[2] *= row[1]
            row[0] = building.height / max(1, round(building.height / row[0]))  # whole storeys

        light = district.light
        self._sun = np.asarray(light.sun_direction, np.float32)
        sky = np.asarray(light.sky_color, np.float32) ** 2
        self._zenith = 1.15 * sky * light.exposure
        self._horizon = (0.4 * sky + 0.6 * sky.max()) * (1.3 * light.exposure)
        tint = 0.5 * sky / sky.mean() + 0.5
        self._ambient_light = (light.ambient * 1.3 * light.exposure) * tint
        self._sun_light = (1 - light.ambient) * 2.1 * light.exposure * np.asarray(light.sun_color, np.float32)
        self._shadows = 1 - light.ambient > 0.12

    def global_from_ego(self, time: float) -> np.ndarray:
        """Returns the pose of the car at `time` seconds, [4, 4] float64."""
        xy, yaw = self.district.ego.at(time)
        return rigid_from_yaw(yaw, (*xy, 0.0))

    def camera(self, camera: Camera, time: float, rng: np.random.Generator) -> Picture:
        """Renders the image of one camera exposed at `time` seconds; `rng` draws the sensor noise."""
        H, W = camera.image_size
        self._move_to(time)
        origin, rotation = self._mount(camera.ego_from_cam, time)
        rays_cam = camera.rays()  # [H, W, 3]
        dark = np.isnan(rays_cam[..., 0])  # outside the image circle of a fisheye
        if dark.any():
            rays_cam = np.where(dark[..., None], np.array([0, 0, 1], np.float32), rays_cam)
        rays = (rays_cam.reshape(-1, 3) @ rotation.T).reshape(H, W, 3)
        hits = self._trace(np.broadcast_to(origin, (H * W, 3)), rays.reshape(-1, 3))
        with np.errstate(divide="ignore"):
            ground = np.where(rays[..., 2] < -1e-4, -origin[2] / rays[..., 2], np.inf).astype(np.float32)  # [H, W]
        distance = np.minimum(hits.distance.reshape(H, W), ground)
        on_mesh = hits.distance.reshape(H, W) < ground
        on_ground = ~on_mesh & (ground < np.inf)

        light = self._sky(rays)  # [H, W, 3] float32 linear
        material = np.zeros((H, W), np.uint8)
        actor = np.full((H, W), -1, np.int32)
        pixel = float(1 / camera.img_from_cam[0, 0])
        haze = np.exp(-self.district.light.fog_density * np.minimum(distance, 1e4))[..., None]
        top = int(np.argmax(on_ground.any(1))) if on_ground.any() else H
        if top < H:
            color, material[top:] = self._shade_ground(rays[top:], ground[top:], on_ground[top:], origin, pixel)
            lower = on_ground[top:, :, None]
            light[top:] = np.where(lower, self._horizon + (color - self._horizon) * haze[top:], light[top:])
            material[top:][~on_ground[top:]] = Material.SKY
        flat = np.flatnonzero(on_mesh)
        if len(flat):
            face = hits.face[flat]
            ray = rays.reshape(-1, 3)[flat]
            point = origin + ray * hits.distance[flat, None]  # [R, 3]
            color = self._shade_mesh(face, point, ray, hits.normal[flat], hits.distance[flat] * pixel)
            light.reshape(-1, 3)[flat] = self._horizon + (color - self._horizon) * haze.reshape(-1, 1)[flat]
            material.reshape(-1)[flat] = self._materials[face]
            actor.reshape(-1)[flat] = np.maximum(self._owners[face], -1)
        if dark.any():
            light[dark], material[dark], actor[dark], distance[dark] = 0.0, Material.SKY, -1, np.nan
        depth = np.where(np.isinf(distance), np.inf, distance * rays_cam[..., 2])
        return Picture(_expose(light, camera, rng), depth, distance, actor, material)

    def lidar(self, lidar: Lidar, time: float, rng: np.random.Generator) -> Sweep:
        """Simulates one revolution of the LiDAR at `time` seconds; `rng` draws range noise and lost returns."""
        self._move_to(time)
        origin, rotation = self._mount(lidar.ego_from_spin, time)
        rays_spin = lidar.rays()
        ring = np.repeat(np.arange(len(rays_spin)), rays_spin.shape[1])
        rays_spin = rays_spin.reshape(-1, 3)
        rays = rays_spin @ rotation.T
        hits = self._trace(np.broadcast_to(origin, rays.shape), rays)
        with np.errstate(divide="ignore"):
            ground = np.where(rays[:, 2] < -1e-4, -origin[2] / rays[:, 2], np.inf).astype(np.float32)
        distance = np.minimum(hits.distance, ground)
        on_mesh = hits.distance < ground
        actor = np.where(on_mesh, np.maximum(self._owners[hits.face], -1), -1).astype(np.int32)
        ground_xy = origin[:2] + rays[:, :2] * np.where(np.isfinite(ground), ground, 0)[:, None]
        material = np.where(on_mesh, self._materials[hits.face], self._ground.materials(*ground_xy.T))
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
        A = len(self.district.actors)
        # The same points in the unit cube for every actor: an R3 low-discrepancy sequence.
        steps = np.arange(1, rays_per_actor + 1)[:, None] * np.array([0.8191725, 0.6710436, 0.5497005])
        unit = (steps % 1.0 - 0.5) * [1, 1, 1] + [0, 0, 0.5]  # [R, 3]
        expected, seen = np.zeros(A), np.zeros(A)
        for camera in cameras:
            origin, rotation = self._mount(camera.ego_from_cam, time)
            owners, all_rays = [], []
            for k, actor in enumerate(self.district.actors):
                xy, yaw = actor.trajectory.at(time)
                center = np.append(xy - self._low, 0.0)
                ahead = (center - origin) @ rotation[:, 2]
                if np.linalg.norm(center - origin) > 90 or (ahead < -8 and camera.max_angle < np.pi / 2):
                    continue
                turn = rigid_from_yaw(yaw)[:3, :3]
                target = (unit * actor.size) @ turn.T + center - origin  # [R, 3]
                inside = camera.sees(target @ rotation)
                if not inside.any():
                    continue
                rays = target[inside] / np.linalg.norm(target[inside], axis=1, keepdims=True)
                if k not in self._single_scenes:
                    self._single_scenes[k] = _embree(self._actor_meshes[k].vertices, self._actor_meshes[k].faces)
                start = np.broadcast_to((origin - center) @ turn, rays.shape).astype(np.float32)
                hit = self._single_scenes[k].run(start, (rays @ turn).astype(np.float32)) >= 0
                owners.append(np.full(hit.sum(), k))
                all_rays.append(rays[hit])
            if owners:
                owner, rays = np.concatenate(owners), np.concatenate(all_rays).astype(np.float32)
                hits = self._trace(np.broadcast_to(origin, rays.shape), rays)
                first = np.where(hits.face >= 0, self._owners[hits.face], -1)
                expected += np.bincount(owner, minlength=A)
                seen += np.bincount(owner[first == owner], minlength=A)
        return seen / np.maximum(expected, 1)

    def _mount(self, ego_from_sensor: np.ndarray, time: float) -> tuple[np.ndarray, np.ndarray]:
        """Returns position [3] and rotation [3, 3] of a sensor in the renderer's frame, float32."""
        pose = self.global_from_ego(time) @ ego_from_sensor
        pose[:2, 3] -= self._low
        return pose[:3, 3].astype(np.float32), pose[:3, :3].astype(np.float32)

    def _placed(self, k: int, time: float) -> np.ndarray:
        """Returns the vertices of actor k at `time`, in the renderer's frame, [V, 3] float32."""
        xy, yaw = self.district.actors[k].trajectory.at(time)
        pose = rigid_from_yaw(yaw, (*(xy - self._low), 0.0))
        return (self._actor_meshes[k].vertices @ pose[:3, :3].T + pose[:3, 3]).astype(np.float32)

    def _move_to(self, time: float) -> None:
        """Places all moving actors and their contact shadows at `time`."""
        if time == self._time:
            return
        self._time = time
        if self._moving:
            vertices = np.concatenate([self._placed(k, time) for k in self._moving])
            self._moving_scene = _embree(vertices, self._moving_faces)
        # Contact shadows: a blurred image of all footprints near the car, 0.25 m per pixel.
        self._contact_low = (self.district.ego.at(time)[0] - self._low - 64).astype(np.float32)
        contact = np.zeros((512, 512), np.uint8)
        if self.district.actors:
            poses = [actor.trajectory.at(time) for actor in self.district.actors]
            centers = np.array([[*(xy - self._low - self._contact_low), 0.0] for xy, _ in poses])
            sizes = np.array([actor.size for actor in self.district.actors])
            corners = box_corners(centers, sizes, np.array([yaw for _, yaw in poses]))[:, :4, :2]  # [A, 4, 2]
            near = (np.abs(centers[:, :2] - 64) < 80).all(1)
            for outline in np.round(corners[near] * (4 * 16)).astype(np.int32):
                cv2.fillPoly(contact, [outline], (255,), cv2.LINE_8, 4)
        self._contact = cv2.GaussianBlur(contact, (9, 9), 1.5)

    def _trace(self, origins: np.ndarray, directions: np.ndarray) -> _Hits:
        """Finds the first hits of rays [R, 3] with unit directions."""
        origins = np.ascontiguousarray(origins, np.float32)
        directions = np.ascontiguousarray(directions, np.float32)
        found = self._static_scene.run(origins, directions, output=1)
        face, distance, normal = found["primID"], found["tfar"], found["Ng"]
        distance[face < 0] = np.inf
        if self._moving_scene is not None:
            near = self._moving_scene.run(origins, directions, output=1)
            nearer = np.flatnonzero((near["primID"] >= 0) & (near["tfar"] < distance))
            distance[nearer] = near["tfar"][nearer]
            face[nearer] = near["primID"][nearer] + self._static_count
            normal[nearer] = near["Ng"][nearer]
        return _Hits(distance, face, normal)

    def _sunlit(self, points: np.ndarray) -> np.ndarray:
        """Returns 1 for points [R, 3] in direct sunlight, else 0, [R] float32."""
        points = np.ascontiguousarray(points, np.float32)
        rays = np.broadcast_to(self._sun, points.shape).copy()
        lit = self._static_scene.run(points, rays, query="OCCLUDED") < 0
        if self._moving_scene is not None:
            lit &= self._moving_scene.run(points, rays, query="OCCLUDED") < 0
        return lit.astype(np.float32)

    def _sky(self, rays: np.ndarray) -> np.ndarray:
        """Computes the light of the sky in directions [H, W, 3]: a gradient, clouds on a plane, a glow at the sun."""
        up = rays[..., 2].clip(0.0, 1.0)
        light = self._horizon + (self._zenith - self._horizon) * np.sqrt(up)[..., None]
        lift = 90 / (up + 0.12)
        u = (rays[..., 0] * lift).astype(np.float32) % (_NOISE_SIDE - 1)
        v = (rays[..., 1] * lift).astype(np.float32) % (_NOISE_SIDE - 1)
        cloud = cv2.remap(self._clouds, u, v, cv2.INTER_LINEAR)
        share = (self._cloudiness * (cloud * 0.5 + 0.4)).clip(0, 0.85) * (up * 5).clip(0, 1)
        light += share[..., None] * (1.05 * self._horizon - light)
        glow = (rays @ self._sun).clip(0, 1) ** 60
        return light + glow[..., None] * (0.5 * self._sun_light)

    def _shade_ground(
        self, rays: np.ndarray, distance: np.ndarray, visible: np.ndarray, origin: np.ndarray, pixel: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Shades the ground.

        Args:
            rays: [H, W, 3] unit directions.
            distance: [H, W] metres to the ground.
            visible: [H, W] bool, whether the ray reaches the ground.
            origin: [3] position of the camera.
            pixel: angle of a pixel, radians.

        Returns:
            Light [H, W, 3] and material [H, W].
        """
        H, W = distance.shape
        flat = np.minimum(distance, 300.0)
        x, y = origin[0] + rays[..., 0] * flat, origin[1] + rays[..., 1] * flat
        material = self._ground.materials(x, y)
        across = flat * pixel
        along = (across * flat / origin[2]).clip(max=60.0)  # length of a pixel's footprint in the viewing direction
        heading = 1 / np.maximum(np.hypot(rays[..., 0], rays[..., 1]), 1e-3)
        dx, dy = rays[..., 0] * heading * along, rays[..., 1] * heading * along
        footprint = np.maximum(across, along / _GROUND_TAPS)
        albedo = np.zeros((H, W, 3), np.float32)
        for k in range(_GROUND_TAPS):
            shift = np.float32((k + 0.5) / _GROUND_TAPS - 0.5)
            albedo += self._ground.colors(x + shift * dx, y + shift * dy, footprint)
        albedo = (albedo * np.float32(1 / (255 * _GROUND_TAPS))) ** 2
        u, v = (x - self._contact_low[0]) * 4 - 0.5, (y - self._contact_low[1]) * 4 - 0.5
        contact = cv2.remap(self._contact, u, v, cv2.INTER_LINEAR).astype(np.float32) / 255
        incoming = (1 - 0.75 * contact)[..., None] * self._ambient_light
        if self._shadows:
            lit = np.ones((H, W), np.float32)
            near = visible & (distance < 90)
            lit[near] = self._sunlit(np.stack([x[near], y[near], np.full(near.sum(), 0.01, np.float32)], -1))
            incoming = incoming + (lit * max(self._sun[2], 0))[..., None] * self._sun_light
        return albedo * incoming, material

    def _shade_mesh(
        self, face: np.ndarray, point: np.ndarray, ray: np.ndarray, normal: np.ndarray, footprint: np.ndarray
    ) -> np.ndarray:
        """Computes the light [R, 3] of faces [R] hit at points [R, 3] by rays [R, 3].

        `normal` [R, 3] has any length and orientation; a pixel covers `footprint` [R] metres of the face.
        """
        normal = normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
        facing = (normal * ray).sum(1)
        normal = np.where(facing[:, None] > 0, -normal, normal)
        material = self._materials[face]
        albedo = self._colors[face]
        walls = np.flatnonzero(material == Material.FACADE)
        glass = material == Material.GLASS
        if len(walls):
            albedo[walls], glass[walls] = self._windows(face[walls], point[walls], normal[walls], footprint[walls])
        strength = _GRAIN[material] / (1 + (footprint * 12) ** 2)
        rough = np.flatnonzero(strength > 0.01)
        i = ((point[rough, 0] + 0.7 * point[rough, 2]) * 14).astype(np.int32) % _NOISE_SIDE
        j = ((point[rough, 1] + 0.9 * point[rough, 2]) * 14).astype(np.int32) % _NOISE_SIDE
        albedo[rough] *= (1 + 2 * strength[rough] * self._noise[i, j]).clip(0.2, 2)[:, None]

        up = normal[:, 2]
        # Points near the ground and faces that point down receive less light from the sky.
        ambient = (0.62 + 0.38 * up) * (0.75 + 0.25 * (point[:, 2] / 1.5).clip(0, 1))
        light = ambient[:, None] * self._ambient_light
        shine = np.zeros(len(face), np.float32)
        if self._shadows:
            toward = (normal @ self._sun).clip(0, 1)
            lit = np.flatnonzero(toward > 0)
            toward[lit] *= self._sunlit(point[lit] + normal[lit] * 0.03)
            # Leaves transmit light, so their dark side is not black.
            through = np.where(material == Material.FOLIAGE, 0.25 + 0.75 * toward, toward)
            light = light + through[:, None] * self._sun_light
            mirrored = ray - 2 * (ray * normal).sum(1, keepdims=True) * normal
            shine = ((mirrored @ self._sun).clip(0, 1) ** 40) * (toward > 0)
        color = albedo * light
        lamps = material == Material.LAMP
        color[lamps] = np.maximum(color[lamps], 0.75 * albedo[lamps] * self.district.light.exposure)
        smooth = np.flatnonzero(glass | (material == Material.PAINT))
        if len(smooth):
            reflected = ray[smooth] - 2 * (ray[smooth] * normal[smooth]).sum(1, keepdims=True) * normal[smooth]
            sky = self._horizon + (self._zenith - self._horizon) * np.sqrt(reflected[:, 2:].clip(0, 1))
            # Reflections from below the horizon are about as bright as the street.
            street = 0.35 * self._ambient_light
            sky = street + (sky - street) * (0.5 + 6 * reflected[:, 2:]).clip(0, 1)
            grazing = (1 - np.abs((ray[smooth] * normal[smooth]).sum(1))) ** 3
            share = np.where(glass[smooth], 0.18 + 0.6 * grazing, 0.04 + 0.25 * grazing)[:, None]
            color[smooth] += share * (sky - color[smooth]) + 0.6 * shine[smooth, None] * self._sun_light
        return color

    def _windows(
        self, face: np.ndarray, point: np.ndarray, normal: np.ndarray, footprint: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Computes the albedo [R, 3] of walls with rows of windows, and whether each point is glass [R]."""
        storey, spacing, width, height, bright, seed = self._facades[-2 - self._owners[face]].T
        along = point[:, 1] * normal[:, 0] - point[:, 0] * normal[:, 1]
        column, row = along / spacing, point[:, 2] / storey
        cell_u, cell_v = np.floor(column), np.floor(row)
        # Shop windows on the ground floor are wider. Edges fade over a pixel, so that distant walls do not alias.
        shop = cell_v < 1
        half_u = np.where(shop, 0.43 * spacing, width / 2)
        half_v = np.where(shop, 0.38 * storey, height / 2)
        soft = np.maximum(footprint, 0.02)
        inside_u = ((half_u - np.abs(column - cell_u - 0.5) * spacing) / soft + 0.5).clip(0, 1)
        inside_v = ((half_v - np.abs(row - cell_v - 0.5) * storey) / soft + 0.5).clip(0, 1)
        share = inside_u * inside_v
        dice = np.sin(cell_u * 12.9898 + cell_v * 78.233 + seed * 3.7) * 43758.547
        dice -= np.floor(dice)
        pane = (bright * (0.4 + 1.2 * dice))[:, None] ** 2 * np.array([0.9, 1.0, 1.1], np.float32)
        wall = self._colors[face]
        band = (np.abs(row - np.round(row)) * storey < 0.12) & (footprint < 0.3)
        wall = wall * np.where(band, 0.72, 1)[:, None]
        return wall + share[:, None] * (pane - wall), share > 0.5


def _embree(vertices: np.ndarray, faces: np.ndarray) -> EmbreeScene:
    """Builds an Embree scene of vertices [V, 3] and faces [F, 3]."""
    scene = EmbreeScene()
    TriangleMesh(scene, np.ascontiguousarray(vertices, np.float32), np.ascontiguousarray(faces, np.int32))
    return scene


def _join(meshes: list[Mesh]) -> Mesh:
    """Joins meshes into one."""
    if not meshes:
        return MeshBuilder().build()
    offsets = np.cumsum([0] + [len(m.vertices) for m in meshes[:-1]])
    shifted = [m._replace(faces=m.faces + offset) for m, offset in zip(meshes, offsets, strict=True)]
    return Mesh(*(np.concatenate(field) for field in zip(*shifted, strict=True)))


def _expose(light: np.ndarray, camera: Camera, rng: np.random.Generator) -> np.ndarray:
    """Converts linear light [H, W, 3] to an 8-bit image: lens blur, vignetting, gain, tone curve, sensor noise."""
    H, W = camera.image_size
    light = np.asarray(cv2.GaussianBlur(light.astype(np.float32), (3, 3), 0.5))
    v, u = np.ogrid[-1 : 1 : H * 1j, -1 : 1 : W * 1j]
    falloff = 1 - camera.vignette * (u**2 + v**2) / 2
    light *= falloff[..., None].astype(np.float32) * camera.gain.astype(np.float32)
    # A soft shoulder instead of clipping keeps the colour of bright walls.
    light = np.sqrt(light * (1 + 0.25 * light) / (1 + 0.75 * light))
    light += camera.noise * rng.standard_normal((H, W, 3), dtype=np.float32)
    return (light.clip(0, 1) * 255 + 0.5).astype(np.uint8)
