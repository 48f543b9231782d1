"""Draws the ground as a texture seen from above, and samples it without aliasing at any distance."""

from __future__ import annotations

import cv2
import numpy as np
from shapely.geometry import Polygon, box
from shapely.geometry.base import BaseGeometry

from perception.synthetic.district import District
from perception.synthetic.mesh import Material

_MATERIALS = {
    "grass": Material.GRASS,
    "walkway": Material.WALKWAY,
    "asphalt": Material.ASPHALT,
    "parking": Material.PARKING,
    "concrete": Material.CONCRETE,
}
_PAINT = {"white": (0.90, 0.90, 0.87), "yellow": (0.88, 0.68, 0.13)}
# Side of the noise tiles in pixels: a multiple of the periods of paving stones and slabs.
_TILE = 480
_STONE, _SLAB = 12, 60
_STRIP = 8  # rows of the texture that are painted at once
_LEVELS = 8
# Pixels of a level per pixel of the finest one. The last is negative, which gives the farthest ground the colour of the
# texture's corner: an overflow of the first version, kept so that the same seed gives the same pictures.
_SCALE = np.array([2.0**-level for level in range(_LEVELS - 1)] + [-(2.0 ** -(_LEVELS - 1))], np.float32)


def smooth_noise(rng: np.random.Generator, side: int, octaves: tuple[float, ...]) -> np.ndarray:
    """Draws noise that tiles without a seam: [side, side] float32 with mean 0 and standard deviation 1.

    Args:
        rng: source of randomness.
        side: pixels.
        octaves: blur widths in pixels (0 for none), added with equal weights.
    """
    total: np.ndarray = np.zeros((side, side), np.float32)
    for sigma in octaves:
        noise = rng.standard_normal((side, side), dtype=np.float32)
        if sigma > 0:
            noise = _blur_tile(noise, sigma)
        total += noise / noise.std()
    return total / total.std()


def _blur_tile(tile: np.ndarray, sigma: float) -> np.ndarray:
    """Blurs a square that continues at its opposite sides: along rows and then along columns, each as far as needed."""
    pad = min(len(tile), int(4 * sigma) + 1)
    kernel, none = cv2.getGaussianKernel(round(8 * sigma + 1) | 1, sigma, cv2.CV_32F), np.ones(1, np.float32)
    wide = cv2.copyMakeBorder(tile, 0, 0, pad, pad, cv2.BORDER_WRAP)
    tile = np.ascontiguousarray(cv2.sepFilter2D(wide, -1, kernel, none)[:, pad:-pad])
    high = cv2.copyMakeBorder(tile, pad, pad, 0, 0, cv2.BORDER_WRAP)
    return np.ascontiguousarray(cv2.sepFilter2D(high, -1, none, kernel)[pad:-pad], np.float32)


def _polygons(geometry: BaseGeometry) -> list[Polygon]:
    """Lists the polygons of a geometry."""
    if geometry.geom_type == "Polygon":
        return [] if geometry.is_empty else [geometry]
    return [p for part in getattr(geometry, "geoms", []) for p in _polygons(part)]


class Ground:
    """Colour texture of the plane z = 0 around a path, as an image pyramid in one atlas.

    Args:
        district: its surfaces are drawn in order, its markings on top.
        path: [P, 2] global metres; the texture covers the bounding box of the path and `margin` around it.
        rng: source of the texture's noise.
        margin: metres.
        resolution: metres per pixel of the finest level.
    """

    def __init__(
        self,
        district: District,
        path: np.ndarray,
        rng: np.random.Generator,
        margin: float = 75.0,
        resolution: float = 0.05,
    ) -> None:
        self.resolution = resolution
        step = resolution * 2 ** (_LEVELS - 1)
        self.low = np.floor((path.min(0) - margin) / step) * step  # [2] global metres
        high = np.ceil((path.max(0) + margin) / step) * step
        columns, rows = np.round((high - self.low) / resolution).astype(int).tolist()
        self.shape = rows, columns  # rows along y, columns along x
        self.material, color = self._paint(district, rng)
        self._atlas, self._origins, self._limits = _stack_pyramid(color)

    def _paint(self, district: District, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draws materials [rows, columns] uint8 and colours [rows, columns, 3] uint8."""
        rows, columns = self.shape
        window = box(*self.low, *(self.low + np.array([columns, rows]) * self.resolution))
        material = np.full((rows, columns), Material.GRASS, np.uint8)
        for surface in district.surfaces:
            for polygon in _polygons(surface.polygon.intersection(window)):
                self._fill(material, polygon, int(_MATERIALS[surface.material]))
        paint = {name: np.zeros((rows, columns), np.uint8) for name in _PAINT}
        for marking in district.markings:
            if marking.polygon.intersects(window):
                for polygon in _polygons(marking.polygon):
                    self._fill(paint[marking.color], polygon, 255)

        base = np.zeros((8, 3), np.float32)  # colour and strength of the texture per material
        base[Material.GRASS] = np.array([0.30, 0.37, 0.17]) * rng.uniform(0.75, 1.2) + rng.uniform(-0.03, 0.03, 3)
        base[Material.WALKWAY] = rng.uniform(0.50, 0.66) * np.array([1.0, 0.97, 0.92])
        base[Material.ASPHALT] = rng.uniform(0.25, 0.42) + rng.uniform(-0.015, 0.015, 3)
        base[Material.PARKING] = base[Material.ASPHALT] * rng.uniform(0.85, 1.2)
        base[Material.CONCRETE] = rng.uniform(0.52, 0.62) + rng.uniform(-0.02, 0.02, 3)
        grain = np.array([0, 0.17, 0.05, 0.06, 0.06, 0.05, 0, 0], np.float32)
        blotch = np.array([0, 0.14, 0.05, 0.07, 0.08, 0.05, 0, 0], np.float32)
        fine = smooth_noise(rng, _TILE, (0, 0.8, 2))
        coarse = smooth_noise(rng, _TILE * 3 // 2, (8, 25, 60))
        joints = np.ones((_TILE, _TILE), np.float32)
        joints[::_STONE], joints[:, ::_STONE] = 0.8, 0.8
        slabs = np.ones((_TILE, _TILE), np.float32)
        slabs[::_SLAB], slabs[:, ::_SLAB] = 0.72, 0.72
        patches, factors = self._patches(rng)

        color = np.empty((rows, columns, 3), np.uint8)
        for top in range(0, rows, _STRIP):  # arrays of one strip stay in the cache
            part = slice(top, min(top + _STRIP, rows))
            kind = material[part]  # [strip, columns]
            shade = 1 + grain.take(kind) * self._tiled(fine, top, kind.shape)
            shade += blotch.take(kind) * self._tiled(coarse, top, kind.shape)
            for paved, pattern in ((Material.WALKWAY, joints), (Material.CONCRETE, slabs)):
                there = np.flatnonzero(kind == paved)
                if len(there):
                    shade.ravel()[there] *= self._tiled(pattern, top, kind.shape).ravel().take(there)
            there = np.flatnonzero((kind == Material.ASPHALT) | (kind == Material.PARKING))
            shade.ravel()[there] *= factors.take(patches[part].ravel().take(there))
            strip = [base[:, c].take(kind) * shade for c in range(3)]  # [strip, columns] each
            for name, mask in paint.items():
                there = np.flatnonzero(mask[part])
                if len(there):
                    worn = self._tiled(coarse, top + 100, kind.shape).ravel().take(there)
                    worn = np.clip(0.93 + 0.10 * worn, 0.55, 1)
                    alpha = mask[part].ravel().take(there).astype(np.float32) / 255 * worn
                    for plane, value in zip(strip, _PAINT[name], strict=True):
                        below = plane.ravel().take(there)
                        plane.ravel()[there] = below + alpha * (np.float32(value) - below)
            for c, plane in enumerate(strip):
                plane *= 255
                color[part, :, c] = np.clip(plane, 0, 255, out=plane)
        for mask in paint.values():
            material[mask > 127] = Material.MARKING
        return material, color

    def _patches(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draws repairs, stains and manhole covers.

        Returns:
            [rows, columns] uint16 index into the second array, [K] float16 factors on the brightness of the asphalt.
        """
        rows, columns = self.shape
        index, factors = np.zeros((rows, columns), np.uint16), [1.0]
        for _ in range(int(rows * columns * self.resolution**2 / 220)):
            center = rng.uniform(0, [columns, rows])
            half = np.array([rng.uniform(0.4, 4.0), rng.uniform(0.3, 1.2)]) / self.resolution
            angle = np.degrees(rng.uniform(0, np.pi))
            corners = cv2.boxPoints((tuple(center), tuple(2 * half), angle)).astype(np.int32)
            cv2.fillPoly(index, [corners], (len(factors),))
            factors.append(rng.uniform(0.78, 1.1))
        cover = len(factors)
        for _ in range(int(rows * columns * self.resolution**2 / 900)):
            manhole = [int(c) for c in rng.uniform(0, [columns, rows])]
            cv2.circle(index, manhole, int(0.35 / self.resolution), (cover,), -1)
            cv2.circle(index, manhole, int(0.29 / self.resolution), (cover + 1,), -1)
        return index, np.array([*factors, 0.6, 0.8], np.float32).astype(np.float16)

    def _tiled(self, tile: np.ndarray, top: int, shape: tuple[int, ...]) -> np.ndarray:
        """Repeats a tile over a strip of the given shape that starts at row `top`."""
        rows = (np.arange(shape[0]) + top) % tile.shape[0]
        repeats = -(-shape[1] // tile.shape[1])
        return np.tile(tile[rows], (1, repeats))[:, : shape[1]]

    def _fill(self, image: np.ndarray, polygon: Polygon, value: int) -> None:
        """Fills one polygon; the even-odd rule leaves its holes empty. Vertices are exact to 1/16 pixel."""
        rings = [polygon.exterior, *polygon.interiors]
        # fillPoly also fills the pixels of the outline, and its pixel centres are whole numbers: hence the half.
        points = [((np.array(r.coords)[:, :2] - self.low) / self.resolution - 0.5) * 16 for r in rings]
        smooth = cv2.LINE_AA if value == 255 else cv2.LINE_8
        cv2.fillPoly(image, [np.round(p).astype(np.int32) for p in points], (value,), smooth, 4)

    def colors(
        self, x: np.ndarray, y: np.ndarray, footprint: np.ndarray, dx: np.ndarray, dy: np.ndarray, taps: int
    ) -> np.ndarray:
        """Averages samples of the colour along a line through each point.

        Args:
            x, y: [R] float32 metres from `low`.
            footprint: [R] metres over which one sample is averaged.
            dx, dy: [R] metres from the first to the last end of the line.
            taps: samples, each of an equal part of the line.

        Returns:
            [3, R] float32 RGB, 0..1.
        """
        level = np.log2(np.maximum(footprint, 1e-6) * (1 / self.resolution)).round().clip(0, _LEVELS - 1)
        level = level.astype(np.intp)
        scale = _SCALE.take(level) * np.float32(1 / self.resolution)
        (left, top), (right, bottom) = self._origins.take(level, axis=1), self._limits.take(level, axis=1)
        total = np.zeros((1, len(x), 3), np.float32)
        for k in range(taps):
            shift = np.float32((k + 0.5) / taps - 0.5)
            u = np.clip((x + shift * dx) * scale - 0.5, 0, right) + left
            v = np.clip((y + shift * dy) * scale - 0.5, 0, bottom) + top
            cv2.accumulate(cv2.remap(self._atlas, u[None], v[None], cv2.INTER_LINEAR), total)
        return np.ascontiguousarray(total[0].T) * np.float32(1 / (255 * taps))

    def materials(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Looks up the material (uint8, same shape) at points in metres from `low`; it is grass outside the texture."""
        column = np.clip(x * (1 / self.resolution), -1, self.shape[1]).astype(np.int32)
        row = np.clip(y * (1 / self.resolution), -1, self.shape[0]).astype(np.int32)
        inside = (x >= 0) & (y >= 0) & (column < self.shape[1]) & (row < self.shape[0])
        found = self.material[row.clip(0, self.shape[0] - 1), column.clip(0, self.shape[1] - 1)]
        return np.where(inside, found, np.uint8(Material.GRASS))


def _stack_pyramid(color: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packs all pyramid levels into one image: the finest on the left, the others stacked on its right.

    Returns:
        atlas [rows, 1.5 columns, 3] uint8, origins [2, levels] float32 (position of each level's first pixel, columns
        first), limits [2, levels] float32 (largest coordinate within each level).
    """
    rows, columns = color.shape[:2]
    atlas = np.zeros((rows, columns + columns // 2, 3), np.uint8)
    atlas[:, :columns] = color
    origins, limits = np.zeros((2, _LEVELS), np.float32), np.zeros((2, _LEVELS), np.float32)
    limits[:, 0] = columns - 1, rows - 1
    top, level = 0, color
    for i in range(1, _LEVELS):
        level = cv2.resize(level, (level.shape[1] // 2, level.shape[0] // 2), interpolation=cv2.INTER_AREA)
        h, w = level.shape[:2]
        atlas[top : top + h, columns : columns + w] = level
        origins[:, i] = columns, top
        limits[:, i] = w - 1, h - 1
        top += h
    return atlas, origins, limits
