"""Computes the light that reaches a camera from the sky, the ground and meshes, and exposes it as an 8-bit image.

All functions work on lists of pixels, a few thousand at a time, so that their arrays stay in the processor's cache. A
vector per pixel is an array [3, R], one contiguous row per component. Light is linear. Only elementwise arithmetic is
used: each pixel has the same value in any list, and with any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from perception.synthetic.district import Building, Light
from perception.synthetic.ground import Ground, smooth_noise
from perception.synthetic.mesh import Material

# Samples per pixel over which the ground is averaged along the viewing direction.
_GROUND_TAPS = 5
_NOISE_SIDE = 512
# Strength of the fine texture per material, in the order of Material.
_GRAIN = np.array([0, 0, 0, 0, 0, 0, 0, 0.06, 0.05, 0.06, 0.30, 0.22, 0.03, 0.0, 0.0, 0.0, 0.05, 0.03], np.float32)
_PANE = (0.9, 1.0, 1.1)  # tint of windows
_CHUNK = 16384  # pixels

# Returns 1 for points [3, R] in direct sunlight, else 0, [R] float32.
Sunlit = Callable[[np.ndarray], np.ndarray]


class Shader:
    """Light of one district, and the noise of its clouds and surfaces.

    Args:
        light: sun, sky and haze.
        buildings: their windows are drawn on faces of material FACADE.
        rng: source of randomness of the noise.
    """

    def __init__(self, light: Light, buildings: list[Building], rng: np.random.Generator) -> None:
        self._noise = smooth_noise(rng, _NOISE_SIDE, (0, 1, 3))
        self._clouds = smooth_noise(rng, _NOISE_SIDE, (4, 10, 30))
        self._cloudiness = rng.uniform(0.0, 0.8)
        # Windows per building: storey height, spacing, width, height of the glass (metres), brightness, seed.
        facades = np.zeros((len(buildings), 6), np.float32)
        for row, building in zip(facades, buildings, strict=True):
            style = np.random.default_rng(building.window_seed)
            row[:] = style.uniform([2.9, 1.8, 0.4, 1.3, 0.1, 0], [3.8, 3.6, 0.75, 1.9, 0.3, 1000])
            row[2] *= row[1]
            row[0] = building.height / max(1, round(building.height / row[0]))  # whole storeys
        self._facades = np.ascontiguousarray(facades.T)  # [6, buildings]

        self.sun = np.asarray(light.sun_direction, np.float32)
        sky = np.asarray(light.sky_color, np.float32) ** 2
        self._fog, self._exposure = light.fog_density, light.exposure
        self._zenith = 1.15 * sky * light.exposure
        self._horizon = (0.4 * sky + 0.6 * sky.max()) * (1.3 * light.exposure)
        tint = 0.5 * sky / sky.mean() + 0.5
        self._ambient_light = (light.ambient * 1.3 * light.exposure) * tint
        self._sun_light = (1 - light.ambient) * 2.1 * light.exposure * np.asarray(light.sun_color, np.float32)
        self._shadows = 1 - light.ambient > 0.12
        # Products of float32 arrays: a product of two numbers would be float64 with NumPy 1.
        self._white_clouds, self._glow = 1.05 * self._horizon, 0.5 * self._sun_light
        self._street = 0.35 * self._ambient_light  # reflections from below the horizon are about as bright as this

    def sky(self, rays: np.ndarray) -> np.ndarray:
        """Computes the light [3, R] of the sky along rays [3, R]: a gradient, clouds on a plane, a glow at the sun."""
        up = rays[2].clip(0.0, 1.0)
        lift = 90 / (up + 0.12)
        u, v = ((rays[d] * lift) % (_NOISE_SIDE - 1) for d in (0, 1))
        cloud = cv2.remap(self._clouds, u[None], v[None], cv2.INTER_LINEAR)[0]
        share = (self._cloudiness * (cloud * 0.5 + 0.4)).clip(0, 0.85) * (up * 5).clip(0, 1)
        glow = dot(rays, self.sun).clip(0, 1) ** 60
        rise = np.sqrt(up)
        light = np.empty_like(rays)
        for c in range(3):
            color = self._horizon[c] + (self._zenith[c] - self._horizon[c]) * rise
            color += share * (self._white_clouds[c] - color)
            np.add(color, glow * self._glow[c], out=light[c])
        return light

    def ground(
        self,
        ground: Ground,
        contact: Callable[[np.ndarray, np.ndarray], np.ndarray],
        rays: np.ndarray,
        distance: np.ndarray,
        origin: np.ndarray,
        pixel: float,
        sunlit: Sunlit,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Shades points of the ground, seen through haze.

        Args:
            ground: the texture.
            contact: returns the strength of contact shadows at x, y.
            rays: [3, R] unit directions that reach the ground.
            distance: [R] metres to the ground.
            origin: [3] position of the camera.
            pixel: angle of a pixel, radians.
            sunlit: of points [3, R].

        Returns:
            Light [3, R] and material [R].
        """
        flat = np.minimum(distance, 300.0)
        x, y = origin[0] + rays[0] * flat, origin[1] + rays[1] * flat
        across = flat * pixel
        along = (across * flat / origin[2]).clip(max=60.0)  # length of a pixel's footprint in the viewing direction
        heading = 1 / np.maximum(np.hypot(rays[0], rays[1]), 1e-3)
        dx, dy = rays[0] * heading * along, rays[1] * heading * along
        albedo = ground.colors(x, y, np.maximum(across, along / _GROUND_TAPS), dx, dy, _GROUND_TAPS)
        shade = 1 - 0.75 * (contact(x, y).astype(np.float32) / 255)
        lit = None
        if self._shadows:
            lit = np.ones_like(x)
            near = np.flatnonzero(distance < 90)
            lit[near] = sunlit(np.stack([x[near], y[near], np.full(len(near), 0.01, np.float32)]))
            lit *= max(self.sun[2], 0)
        haze = self._haze(distance)
        light = np.empty_like(rays)
        for c in range(3):
            incoming = shade * self._ambient_light[c]
            if lit is not None:
                incoming += lit * self._sun_light[c]
            color = albedo[c] ** 2
            color *= incoming
            self._veil(color, haze, c, light[c])
        return light, ground.materials(x, y)

    def mesh(
        self,
        albedo: np.ndarray,
        material: np.ndarray,
        buildings: np.ndarray,
        rays: np.ndarray,
        distance: np.ndarray,
        normal: np.ndarray,
        origin: np.ndarray,
        pixel: float,
        sunlit: Sunlit,
    ) -> np.ndarray:
        """Shades points of meshes, seen through haze.

        Args:
            albedo: [3, R] of the faces, linear; overwritten.
            material: [R] Material of the faces.
            buildings: [W] of the first W points, which lie on walls; no other point does.
            rays: [3, R] unit directions.
            distance: [R] metres.
            normal: [3, R] of any length and orientation; overwritten.
            origin: [3] position of the camera.
            pixel: angle of a pixel, radians.
            sunlit: of points [3, R].

        Returns:
            Light [3, R].
        """
        point = rays * distance
        point += origin[:, None]
        footprint = distance * pixel
        normal /= np.maximum(np.sqrt(_sum(normal * normal)), 1e-12)
        facing = _sum(normal * rays)
        normal *= np.where(facing > 0, np.float32(-1), np.float32(1))  # towards the camera
        np.negative(np.abs(facing, out=facing), out=facing)
        glass = material == Material.GLASS
        walls = len(buildings)
        if walls:
            glass[:walls] = self._windows(
                buildings, albedo[:, :walls], point[:, :walls], normal[:, :walls], footprint[:walls]
            )
        self._roughen(albedo, material, point, footprint)

        # Points near the ground and faces that point down receive less light from the sky.
        ambient = (0.62 + 0.38 * normal[2]) * (0.75 + 0.25 * (point[2] / 1.5).clip(0, 1))
        toward = through = None
        if self._shadows:
            toward = dot(normal, self.sun).clip(0, 1)
            lit = np.flatnonzero(toward > 0)
            if len(lit):
                start = normal.take(lit, axis=1)
                start *= np.float32(0.03)
                start += point.take(lit, axis=1)
                toward[lit] *= sunlit(start)
            # Leaves transmit light, so their dark side is not black.
            through = toward.copy()
            leaves = np.flatnonzero(material == Material.FOLIAGE)
            through[leaves] = 0.25 + 0.75 * toward.take(leaves)
        light = np.empty_like(albedo)
        lamps = np.flatnonzero(material == Material.LAMP)
        for c in range(3):
            incoming = ambient * self._ambient_light[c]
            if through is not None:
                incoming += through * self._sun_light[c]
            np.multiply(albedo[c], incoming, out=light[c])
            if len(lamps):
                light[c, lamps] = np.maximum(light[c, lamps], 0.75 * albedo[c, lamps] * self._exposure)
        smooth = np.flatnonzero(glass | (material == Material.PAINT))
        if len(smooth):
            seen = rays.take(smooth, axis=1), normal.take(smooth, axis=1), facing.take(smooth)
            self._reflect(light, smooth, glass.take(smooth), *seen, None if toward is None else toward.take(smooth))
        haze = self._haze(distance)
        for c in range(3):
            self._veil(light[c], haze, c, light[c])
        return light

    def _roughen(self, albedo: np.ndarray, material: np.ndarray, point: np.ndarray, footprint: np.ndarray) -> None:
        """Varies the albedo [3, R] in place, as far as pixels resolve it."""
        strength = _GRAIN.take(material) / (1 + (footprint * 12) ** 2)
        rough = np.flatnonzero(strength > 0.01)
        if len(rough):
            x, y, z = point.take(rough, axis=1)
            i = ((x + 0.7 * z) * 14).astype(np.int32) & (_NOISE_SIDE - 1)  # modulo a power of two
            j = ((y + 0.9 * z) * 14).astype(np.int32) & (_NOISE_SIDE - 1)
            i *= _NOISE_SIDE
            factor = np.ones_like(footprint)
            factor[rough] = (1 + 2 * strength.take(rough) * self._noise.ravel().take(i + j)).clip(0.2, 2)
            albedo *= factor

    def _reflect(
        self,
        light: np.ndarray,
        smooth: np.ndarray,
        glass: np.ndarray,
        rays: np.ndarray,
        normal: np.ndarray,
        facing: np.ndarray,
        toward: np.ndarray | None,
    ) -> None:
        """Adds reflections of sky, street and sun to the `smooth` columns of light [3, R].

        `glass` [S] parts windows from paint, `facing` [S] is the cosine between ray and normal, `toward` [S] the share
        of sunlight, None without sun.
        """
        mirrored = rays - 2 * facing * normal
        shine = None
        if toward is not None:
            near = dot(mirrored, self.sun)
            bright = np.flatnonzero((toward > 0) & (near > 0.3))  # elsewhere it is below 1e-20
            shine = np.zeros_like(near)
            shine[bright] = np.float32(0.6) * near.take(bright).clip(0, 1) ** 40
        rise, lower = np.sqrt(mirrored[2].clip(0, 1)), (0.5 + 6 * mirrored[2]).clip(0, 1)
        grazing = (1 - np.abs(facing)) ** 3
        share = np.where(glass, 0.18 + 0.6 * grazing, 0.04 + 0.25 * grazing)
        for c in range(3):
            sky = self._horizon[c] + (self._zenith[c] - self._horizon[c]) * rise
            sky = self._street[c] + (sky - self._street[c]) * lower
            color = light[c].take(smooth)
            sky -= color
            sky *= share
            if shine is not None:
                sky += shine * self._sun_light[c]
            color += sky
            light[c, smooth] = color

    def _windows(
        self, buildings: np.ndarray, wall: np.ndarray, point: np.ndarray, normal: np.ndarray, footprint: np.ndarray
    ) -> np.ndarray:
        """Draws rows of windows on the albedo [3, R] of walls, in place; returns whether each point is glass [R]."""
        storey, spacing, width, height, bright, seed = self._facades.take(buildings, axis=1)
        along = point[1] * normal[0] - point[0] * normal[1]
        column, row = along / spacing, point[2] / storey
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
        pane = (bright * (0.4 + 1.2 * dice)) ** 2
        band = (np.abs(row - np.round(row)) * storey < 0.12) & (footprint < 0.3)
        darker = np.where(band, 0.72, 1.0)  # float64, and with it the mixture
        for c in range(3):
            plain = wall[c] * darker
            wall[c] = plain + share * (pane * np.float32(_PANE[c]) - plain)
        return share > 0.5

    def _haze(self, distance: np.ndarray) -> np.ndarray:
        """Returns the share of light that passes through `distance` [R] metres of air."""
        return np.exp(-self._fog * np.minimum(distance, 1e4))

    def _veil(self, color: np.ndarray, haze: np.ndarray, c: int, out: np.ndarray) -> None:
        """Blends component `c` of the light with that of the horizon."""
        np.subtract(color, self._horizon[c], out=out)
        out *= haze
        out += self._horizon[c]


def dot(vectors: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Returns the products [R] of vectors [3, R] with one direction [3]."""
    return (vectors[0] * direction[0] + vectors[1] * direction[1]) + vectors[2] * direction[2]


def _sum(vectors: np.ndarray) -> np.ndarray:
    """Adds the components of vectors [3, R]."""
    return (vectors[0] + vectors[1]) + vectors[2]


def expose(light: np.ndarray, factors: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Converts linear light to an 8-bit image: lens blur, vignetting, gain, tone curve, sensor noise.

    Args:
        light: [H, W, 3] float32.
        factors: [H, W, 3] float32 on the light.
        noise: standard deviation; white is 1.
        rng: source of the noise.
    """
    H, W = light.shape[:2]
    blurred: NDArray[np.float32] = np.asarray(cv2.GaussianBlur(light, (3, 3), 0.5), np.float32)
    image = np.empty((H, W, 3), np.uint8)
    rows = max(1, _CHUNK // (3 * W))
    for top in range(0, H, rows):
        part = blurred[top : top + rows]
        part *= factors[top : top + rows]
        # A soft shoulder instead of clipping keeps the colour of bright walls.
        shoulder = part * (1 + 0.25 * part)
        part *= 0.75
        part += 1
        shoulder /= part
        np.sqrt(shoulder, out=shoulder)
        grain = rng.standard_normal(part.shape, dtype=np.float32)
        grain *= noise
        shoulder += grain
        np.clip(shoulder, 0, 1, out=shoulder)
        shoulder *= 255
        shoulder += 0.5
        image[top : top + rows] = shoulder
    return image
