"""Draws the images that nuscenes-devkit keeps of each map: the semantic prior and the basemap.

The semantic prior is a mask of drivable areas and walkways, `MapMask` reads it with 0.1 m per pixel, and its last row
is y = 0. The basemap shows the ground in grey; `BitMap` stretches it over the canvas of the map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import shapely
from shapely.geometry import Polygon, box
from shapely.geometry.base import BaseGeometry

from perception.errors import DataError
from perception.synthetic.district import District

# File names, without suffix, under which the devkit's BitMap looks for the semantic prior.
PRIOR_NAMES = {
    "singapore-onenorth": "53992ee3023e5494b90c316c183be829",
    "singapore-hollandvillage": "37819e65e09e5547b8a3ceaefba56bb2",
    "singapore-queenstown": "93406b464a165eaba6d9de76ca09f5da",
    "boston-seaport": "36092f0b03a857c6a3403e25b4b7aab3",
}
_RESOLUTION = 0.1  # metres per pixel of the semantic prior
_MOST_PIXELS = 100_000_000  # of an image, which is held in memory
_GREY = {"grass": 70, "walkway": 170, "asphalt": 110, "parking": 120, "concrete": 150}
_PAINT, _BUILDING = 240, 40


def write_map_images(districts: Sequence[District], canvas: Sequence[float], maps: Path, location: str) -> None:
    """Writes `<prior name>.png` and `basemap/<location>.png` of one location.

    Args:
        districts: all districts of the location.
        canvas: width and height of the map, metres.
        maps: folder `maps` of the dataset.
        location: name of the map.
    """
    fits = canvas[0] * canvas[1] / _RESOLUTION**2 <= _MOST_PIXELS
    (maps / "basemap").mkdir(parents=True, exist_ok=True)
    # A larger prior has one empty pixel: the devkit requires that the file exists, and takes no other resolution.
    prior = _Canvas(canvas, _RESOLUTION) if fits else _Canvas((_RESOLUTION, _RESOLUTION), _RESOLUTION)
    resolution = _RESOLUTION if fits else float(np.sqrt(canvas[0] * canvas[1] / _MOST_PIXELS))
    basemap = _Canvas(canvas, resolution, _GREY["grass"])
    for district in districts:
        for layer in ("drivable_area", "walkway") if fits else ():
            for polygon in district.layers[layer]:
                prior.fill(polygon, 255)
        # The ground extends beyond the map layers; neighbours must not cover each other.
        low = np.min([p.bounds[:2] for p in district.layers["drivable_area"]], axis=0)
        high = np.max([p.bounds[2:] for p in district.layers["drivable_area"]], axis=0)
        window = box(*low, *high)
        for surface in district.surfaces:
            for polygon in _polygons(surface.polygon.intersection(window)):
                basemap.fill(polygon, _GREY[surface.material])
        for marking in district.markings:
            for polygon in _polygons(marking.polygon.intersection(window)):
                basemap.fill(polygon, _PAINT)
        for building in district.buildings:
            for polygon in _polygons(Polygon(building.footprint).intersection(window)):
                basemap.fill(polygon, _BUILDING)
    prior.save(maps / f"{PRIOR_NAMES[location]}.png")
    basemap.save(maps / "basemap" / f"{location}.png")


class _Canvas:
    """A grey image of a map, of `resolution` metres per pixel; the last row is y = 0."""

    def __init__(self, size: Sequence[float], resolution: float, grey: int = 0) -> None:
        self.resolution = resolution
        columns, rows = (max(1, round(edge / resolution)) for edge in size)
        self.image = np.full((rows, columns), grey, np.uint8)

    def fill(self, polygon: Polygon, grey: int) -> None:
        """Fills a polygon in map metres, without its holes."""
        rows = len(self.image)
        points = []
        for ring in (polygon.exterior, *polygon.interiors):
            xy = shapely.get_coordinates(ring) / self.resolution
            points.append(np.round((np.stack([xy[:, 0], rows - xy[:, 1]], axis=1) - 0.5) * 16).astype(np.int32))
        cv2.fillPoly(self.image, points, (grey,), cv2.LINE_8, 4)

    def save(self, path: Path) -> None:
        """Writes the image as PNG."""
        if not cv2.imwrite(str(path), self.image):
            raise DataError(f"{path}: the image of the map cannot be written; is the disk full?")


def _polygons(geometry: BaseGeometry) -> Iterator[Polygon]:
    """Yields the polygons of a geometry."""
    if isinstance(geometry, Polygon):
        if not geometry.is_empty:
            yield geometry
    else:
        for part in getattr(geometry, "geoms", []):
            yield from _polygons(part)
