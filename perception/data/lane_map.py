"""Vector lines from a nuScenes map-expansion file.

`LaneMap` parses the JSON (format 1.3) once into shapely geometry with a spatial index per layer, then cuts out the
lines around any pose. The rules are those of the MapTR / VectorMapNet ground truth: dividers are the pieces of every
divider inside the patch, crossings are the outlines of united crossings, boundaries are the outlines of the united road
surface with the patch's own border taken away.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from perception.errors import DataError
from perception.types import LINE_CLASSES, MapLine

DIVIDER_LAYERS = ("road_divider", "lane_divider")
CROSSING_LAYERS = ("ped_crossing",)
SURFACE_LAYERS = ("road_segment", "lane")

# The published extractor cuts outlines by a slightly larger patch for crossings, so that their rings stay whole, and
# by a slightly smaller one for boundaries, so that the border of the patch itself is no line.
PATCH_MARGIN = 0.2

_DIVIDER, _CROSSING, _BOUNDARY = (LINE_CLASSES.index(name) for name in ("divider", "ped_crossing", "boundary"))


class _Layer:
    """The valid geometry of one map layer, in the file's order, with a spatial index."""

    def __init__(self, geometries: list[BaseGeometry]) -> None:
        self.geometries = np.array(geometries, dtype=object)
        self.tree = shapely.STRtree(self.geometries)

    def cut(self, patch_global: BaseGeometry, center: np.ndarray, yaw: float) -> list[BaseGeometry]:
        """The parts of the layer inside the patch, carried into the patch frame; polylines and polygons only."""
        found = np.sort(self.tree.query(patch_global, predicate="intersects"))
        if len(found) == 0:
            return []
        dimensions = int(shapely.get_dimensions(self.geometries[found[0]]))
        pieces = _parts(shapely.intersection(self.geometries[found], patch_global), dimensions)
        turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])  # global_from_patch
        return list(shapely.transform(pieces, lambda points: (points - center) @ turn))


class LaneMap:
    """The lines of one nuScenes map-expansion file.

    Args:
        path: `maps/expansion/<location>.json` of a nuScenes-format root.

    Raises:
        DataError: the file is missing, is not JSON, or lacks a layer.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            content = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            raise DataError(
                f"{self.path} is missing: put the nuScenes map expansion (v1.3) for '{self.path.stem}' there"
            ) from None
        except ValueError as error:
            raise DataError(f"{self.path} is not valid JSON ({error}); unpack the map expansion again") from None
        try:
            nodes = {node["token"]: (node["x"], node["y"]) for node in content["node"]}
            lines = {line["token"]: line["node_tokens"] for line in content["line"]}
            polygons = {polygon["token"]: polygon for polygon in content["polygon"]}
            self._layers = {
                name: _Layer([g for r in content[name] if (g := _polyline(nodes, lines[r["line_token"]])) is not None])
                for name in DIVIDER_LAYERS
            } | {
                name: _Layer(
                    [g for r in content[name] if (g := _polygon(nodes, polygons[r["polygon_token"]])) is not None]
                )
                for name in CROSSING_LAYERS + SURFACE_LAYERS
            }
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{self.path} has no {error}: it is not a map expansion of format 1.3; unpack the map expansion again"
            ) from None

    def lines(self, x: float, y: float, yaw: float, size: tuple[float, float] = (60.0, 30.0)) -> list[MapLine]:
        """Lines of the MapTR flavour inside a rectangle.

        Args:
            x: global x of the patch centre, metres.
            y: global y of the patch centre, metres.
            yaw: direction of the patch's x axis in the global frame, radians.
            size: extent along the patch's x and y axes, metres.

        Returns:
            Lines with exact vertices in the patch frame (origin at the centre); dividers first, then crossings, then
            boundaries. Outlines run clockwise around crossings and keep the road surface on their right; an outline
            that lies wholly inside is closed (its first point is repeated last).
        """
        half = np.asarray(size, dtype=np.float64) / 2
        center = np.array([x, y], dtype=np.float64)
        turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half  # [4, 2]
        patch_global = shapely.polygons(corners @ turn.T + center)
        cut = {name: layer.cut(patch_global, center, yaw) for name, layer in self._layers.items()}

        result = [MapLine(_DIVIDER, shapely.get_coordinates(piece)) for name in DIVIDER_LAYERS for piece in cut[name]]
        for label, layers, margin in (
            (_CROSSING, CROSSING_LAYERS, PATCH_MARGIN),
            (_BOUNDARY, SURFACE_LAYERS, -PATCH_MARGIN),
        ):
            polygons = [polygon for name in layers for polygon in cut[name]]
            result.extend(MapLine(label, points) for points in _outlines(polygons, _window(size, margin)))
        return result


def cut_lines(lines: Sequence[MapLine], size: tuple[float, float]) -> list[MapLine]:
    """Cuts the lines of a larger patch to a smaller one around the same origin.

    Args:
        lines: what `LaneMap.lines` returned for a patch that holds the wanted one, possibly turned and moved since.
        size: extent of the wanted patch along x and y, metres.

    Returns:
        The same lines that `LaneMap.lines` would have given for the smaller patch.
    """
    window = _window(size, 0.0)
    result = []
    for line in lines:
        if line.label == _DIVIDER:
            pieces = _parts(shapely.intersection(shapely.linestrings(line.points), window), 1)
            result.extend(line._replace(points=shapely.get_coordinates(piece)) for piece in pieces)
    rings = [shapely.linearrings(line.points) for line in lines if line.label == _CROSSING]
    outer = shapely.union_all([shapely.polygons(ring) for ring in rings if not shapely.is_ccw(ring)])
    holes = shapely.union_all([shapely.polygons(ring) for ring in rings if shapely.is_ccw(ring)])
    crossings = _parts(shapely.intersection(shapely.difference(outer, holes), window), 2)
    result.extend(MapLine(_CROSSING, points) for points in _outlines(crossings, _window(size, PATCH_MARGIN)))
    for line in lines:
        if line.label == _BOUNDARY:
            result.extend(MapLine(_BOUNDARY, points) for points in _clip(line.points, _window(size, -PATCH_MARGIN)))
    return result


def _parts(geometry, dimensions: int) -> np.ndarray:
    """The lines (1) or polygons (2) of cut geometry; where a window only touches, points or edges are left over."""
    parts = shapely.get_parts(geometry)
    return parts[(shapely.get_dimensions(parts) == dimensions) & ~shapely.is_empty(parts)]


def _window(size: tuple[float, float], margin: float) -> BaseGeometry:
    """The rectangle of a patch around the origin, enlarged by a margin on every side."""
    x, y = size[0] / 2 + margin, size[1] / 2 + margin
    return shapely.box(-x, -y, x, y)


def _polyline(nodes: dict, node_tokens: list[str]) -> BaseGeometry | None:
    """A divider as a LineString, None where the file holds fewer than two nodes."""
    return shapely.linestrings([nodes[token] for token in node_tokens]) if len(node_tokens) > 1 else None


def _polygon(nodes: dict, record: dict) -> BaseGeometry | None:
    """A surface as a Polygon, None where it is degenerate or crosses itself (the published extractors skip those)."""
    exterior = [nodes[token] for token in record["exterior_node_tokens"]]
    holes = [[nodes[token] for token in hole["node_tokens"]] for hole in record["holes"] if hole["node_tokens"]]
    if len(exterior) < 3 or any(len(hole) < 3 for hole in holes):
        return None
    polygon = shapely.Polygon(exterior, holes)
    return polygon if polygon.is_valid else None


def _outlines(polygons: list[BaseGeometry], window: BaseGeometry) -> list[np.ndarray]:
    """Outlines of the union of polygons inside a window, each ring's pieces merged, the surface on their right."""
    outlines = []
    for polygon in shapely.get_parts(shapely.union_all(polygons)):
        for is_hole, ring in [(False, polygon.exterior), *((True, hole) for hole in polygon.interiors)]:
            points = shapely.get_coordinates(ring)
            outlines.extend(_clip(points if shapely.is_ccw(ring) == is_hole else points[::-1], window))
    return outlines


def _clip(points: np.ndarray, window: BaseGeometry) -> list[np.ndarray]:
    """The pieces of a polyline [P, 2] inside a window."""
    pieces = _parts(shapely.intersection(shapely.linestrings(points), window), 1)
    if len(pieces) > 1:
        # A ring is cut at its start vertex too: put those two pieces together again.
        pieces = shapely.get_parts(shapely.line_merge(shapely.multilinestrings(pieces), directed=True))
    return [shapely.get_coordinates(piece) for piece in pieces]
