"""Extracts ground-truth lines from a nuScenes map-expansion file.

`LaneMap` parses the JSON (format 1.3) once into shapely geometry with a spatial index per layer. It then extracts the
lines around any pose, by the rules of one of the two published protocols. In both, dividers are the pieces of every
divider inside the patch, and boundaries are the outlines of the union of all road surfaces, without the border of the
patch. The protocols differ in crossings: MapTR and VectorMapNet outline the union of all crossings; StreamMapNet and
MapTracker unite only crossings of the same direction. They also differ in the pose of the patch, which the caller
chooses: MapTR's is centred at LIDAR_TOP, StreamMapNet's at the origin of the ego frame.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from perception.data.lane_topology import Centerlines, LaneGraph
from perception.errors import ConfigError, DataError
from perception.inference.checks import FARTHEST_POSE
from perception.reading import short
from perception.types import DEFAULT_LANE_RANGE, LINE_CLASSES, LaneRange, MapLine

DIVIDER_LAYERS = ("road_divider", "lane_divider")
CROSSING_LAYERS = ("ped_crossing",)
SURFACE_LAYERS = ("road_segment", "lane")

# The published protocols of lane ground truth: MapTR and VectorMapNet, StreamMapNet and MapTracker.
LANE_PROTOCOLS = ("maptr", "streammapnet")

# Metres. The published extractor clips outlines of crossings by a slightly larger patch, so that their rings stay
# closed, and boundaries by a slightly smaller one, so that the border of the patch is not a line.
PATCH_MARGIN = 0.2

# In the StreamMapNet protocol, crossings have the same direction if 1 - |cos| of the angle between them is below this.
SAME_DIRECTION = 0.01

_DIVIDER, _CROSSING, _BOUNDARY = (LINE_CLASSES.index(name) for name in ("divider", "ped_crossing", "boundary"))


class _Layer:
    """Valid geometry of one map layer, in the file's order, with a spatial index."""

    def __init__(self, geometries: list[BaseGeometry]) -> None:
        self.geometries = np.array(geometries, dtype=object)
        self.tree = shapely.STRtree(self.geometries)

    def cut(self, patches_global: np.ndarray, centers: np.ndarray, yaws: np.ndarray) -> list[list[BaseGeometry]]:
        """Cuts the layer by patches [B]; returns per patch polylines or polygons in its frame."""
        if not len(self.geometries):
            return [[] for _ in patches_global]
        patch, found = self.tree.query(patches_global, predicate="intersects")
        order = np.lexsort([found, patch])
        patch, found = patch[order], found[order]
        dimensions = int(shapely.get_dimensions(self.geometries[0]))
        pieces, pair = _parts(shapely.intersection(self.geometries[found], patches_global[patch]), dimensions)
        moved, owner = shapely.get_coordinates(pieces, return_index=True)
        ends = np.searchsorted(patch[pair], np.arange(len(patches_global)), side="right")  # pieces up to each patch
        ends_of_points = np.searchsorted(owner, ends)
        result, start, first = [], 0, 0
        for center, yaw, end in zip(centers, yaws, ends_of_points, strict=True):
            turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])  # global_from_patch
            moved[start:end] = (moved[start:end] - center) @ turn
            start = end
        pieces = shapely.set_coordinates(pieces, moved)
        for last in ends:
            result.append(list(pieces[first:last]))
            first = last
        return result


class LaneMap:
    """Lines of one nuScenes map-expansion file.

    Args:
        path: `maps/expansion/<location>.json` of a nuScenes-format root.

    Raises:
        DataError: the file is missing, is not JSON, lacks a layer, or a record is malformed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            content = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            raise DataError(
                f"{self.path} is missing: put the nuScenes map expansion (v1.3) for '{self.path.stem}' there"
            ) from None
        except OSError as error:
            raise DataError(f"{self.path} cannot be read ({error.strerror}); unpack the map expansion again") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path} is not valid JSON ({error}); unpack the map expansion again") from None
        self._nodes = {node["token"]: self._position(node) for node in self._records(content, "node")}
        lines, polygons = (
            {record["token"]: record for record in self._records(content, layer)} for layer in ("line", "polygon")
        )
        self._layers = {
            name: self._layer(content, name, "line_token", lines, self._polyline) for name in DIVIDER_LAYERS
        } | {
            name: self._layer(content, name, "polygon_token", polygons, self._polygon)
            for name in CROSSING_LAYERS + SURFACE_LAYERS
        }
        self._nodes = {}  # the layers hold all points
        # The lane graph is parsed on first use: most users of lines never need it.
        fields = ("lane", "lane_connector", "arcline_path_3", "connectivity")
        self._graph_content = {field: content[field] for field in fields if field in content}

    def _records(self, content: object, layer: str) -> list[dict[str, Any]]:
        """Returns the records of a layer; each has a token."""
        records = content.get(layer) if isinstance(content, dict) else None
        if not isinstance(records, list):
            raise DataError(
                f"{self.path} has no '{layer}': it is not a map expansion of format 1.3; unpack the map expansion again"
            )
        for number, record in enumerate(records):
            token = record.get("token") if isinstance(record, dict) else None
            if not isinstance(token, str):
                raise self._malformed(layer, f"{number} (from 0)", "needs text as 'token'")
        return records

    def _layer(
        self,
        content: object,
        layer: str,
        key: str,
        shapes: dict[str, dict[str, Any]],
        make: Callable[[str, dict[str, Any]], BaseGeometry | None],
    ) -> _Layer:
        """Makes the geometry of a layer, whose records name their shape in the field `key`."""
        geometries = []
        for record in self._records(content, layer):
            name = record.get(key)
            if not isinstance(name, str) or name not in shapes:
                wanted = key.removesuffix("_token")
                raise self._malformed(layer, record["token"], f"needs the token of a record of '{wanted}' as '{key}'")
            if (geometry := make(name, shapes[name])) is not None:
                geometries.append(geometry)
        return _Layer(geometries)

    def _position(self, node: dict[str, Any]) -> tuple[float, float]:
        x: Any = node.get("x")
        y: Any = node.get("y")
        # A comparison with NaN is false. Integers are compared before they are converted, which may overflow.
        if not (_is_number(x) and _is_number(y) and abs(x) <= FARTHEST_POSE and abs(y) <= FARTHEST_POSE):
            raise self._malformed(
                "node",
                node["token"],
                f"needs metres, at most {FARTHEST_POSE:.0e}, as 'x' and 'y', but holds {short(x)}, {short(y)}",
            )
        return float(x), float(y)

    def _points(self, layer: str, token: str, record: object, field: str) -> list[tuple[float, float]]:
        """Returns the positions of the nodes that a record lists."""
        nodes = record.get(field) if isinstance(record, dict) else None
        try:
            return [self._nodes[node] for node in nodes]  # type: ignore[union-attr]
        except (KeyError, TypeError):
            raise self._malformed(layer, token, f"needs a list of tokens of records of 'node' as '{field}'") from None

    def _polyline(self, token: str, record: dict[str, Any]) -> BaseGeometry | None:
        """Makes a LineString of a divider, None if it has fewer than two nodes."""
        points = self._points("line", token, record, "node_tokens")
        return shapely.linestrings(points) if len(points) > 1 else None

    def _polygon(self, token: str, record: dict[str, Any]) -> BaseGeometry | None:
        """Makes a Polygon of a surface, None if it is degenerate or crosses itself, as the published extractors do."""
        exterior = self._points("polygon", token, record, "exterior_node_tokens")
        if not isinstance(record.get("holes"), list):
            raise self._malformed("polygon", token, "needs a list as 'holes'")
        holes = [self._points("polygon", token, hole, "node_tokens") for hole in record["holes"]]
        holes = [hole for hole in holes if hole]
        if len(exterior) < 3 or any(len(hole) < 3 for hole in holes):
            return None
        polygon = shapely.Polygon(exterior, holes)
        return polygon if polygon.is_valid else None

    def _malformed(self, layer: str, record: str, problem: str) -> DataError:
        return DataError(f"{self.path}: record {record} of '{layer}' {problem}; unpack the map expansion again")

    def lines(
        self, x: float, y: float, yaw: float, lane_range: LaneRange = DEFAULT_LANE_RANGE, protocol: str = "maptr"
    ) -> list[MapLine]:
        """Extracts the lines inside a rectangle, the patch.

        Args:
            x: global x of the patch centre, metres.
            y: global y of the patch centre, metres.
            yaw: direction of the patch's x axis in the global frame, radians.
            lane_range: extent along the patch's x and y axes.
            protocol: one of LANE_PROTOCOLS.

        Returns:
            Lines with exact vertices in the patch frame (origin at the centre); dividers first, then crossings, then
            boundaries. Boundaries have the road surface on their right. Outlines of crossings run clockwise in the
            MapTR protocol and counter-clockwise in StreamMapNet's. An outline that lies wholly inside is closed: its
            first point is repeated last. A crossing is always closed.

        Raises:
            ConfigError: the protocol is unknown.
        """
        return self.lines_of_patches(np.array([[x, y]]), np.array([yaw]), lane_range, protocol)[0]

    def lines_of_patches(
        self,
        centers: np.ndarray,
        yaws: np.ndarray,
        lane_range: LaneRange = DEFAULT_LANE_RANGE,
        protocol: str = "maptr",
    ) -> list[list[MapLine]]:
        """Extracts the lines inside of many patches at once, which is twice as quick as one by one.

        Args:
            centers: [B, 2] global positions of the patch centres, metres.
            yaws: [B] directions of the patches' x axes in the global frame, radians.
            lane_range, protocol: as for `lines`.

        Returns:
            The lines of each patch, see `lines`.

        Raises:
            ConfigError: the protocol is unknown.
        """
        if protocol not in LANE_PROTOCOLS:
            raise ConfigError(f"protocol of lane lines is '{protocol}': give one of {', '.join(LANE_PROTOCOLS)}")
        half = np.asarray(lane_range, dtype=np.float64) / 2
        centers = np.asarray(centers, dtype=np.float64)
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half  # [4, 2]
        turns = [np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]]) for yaw in yaws]
        patches = shapely.polygons([corners @ turn.T + center for turn, center in zip(turns, centers, strict=True)])
        cut = {name: layer.cut(patches, centers, yaws) for name, layer in self._layers.items()}

        result: list[list[MapLine]] = [
            [MapLine(_DIVIDER, shapely.get_coordinates(piece)) for name in DIVIDER_LAYERS for piece in cut[name][i]]
            for i in range(len(patches))
        ]
        crossings, surfaces = (
            [[polygon for name in layers for polygon in cut[name][i]] for i in range(len(patches))]
            for layers in (CROSSING_LAYERS, SURFACE_LAYERS)
        )
        rings: list[list[np.ndarray]]
        if protocol == "maptr":
            rings = _outlines(crossings, _window(lane_range, PATCH_MARGIN))
        else:
            rings = [_crossings_by_direction(polygons) for polygons in crossings]
        boundaries = _outlines(surfaces, _window(lane_range, -PATCH_MARGIN))
        for lines, of_crossings, of_surfaces in zip(result, rings, boundaries, strict=True):
            lines.extend(MapLine(_CROSSING, points) for points in of_crossings)
            lines.extend(MapLine(_BOUNDARY, points) for points in of_surfaces)
        return result

    def centerlines(self, x: float, y: float, yaw: float, lane_range: LaneRange = DEFAULT_LANE_RANGE) -> Centerlines:
        """Extracts the centre lines of lanes and lane connectors inside a rectangle, and their successor links.

        Args: as for `lines`.

        Raises:
            DataError: the file has no lane graph (`arcline_path_3`, `connectivity`), or a record of it is malformed.
        """
        return self._graph.centerlines(x, y, yaw, lane_range)

    @cached_property
    def _graph(self) -> LaneGraph:
        graph = LaneGraph(self.path, self._graph_content)
        self._graph_content = {}  # flat arrays take its place
        return graph


def cut_lines(lines: Sequence[MapLine], lane_range: LaneRange) -> list[MapLine]:
    """Cuts the lines of a larger patch to a smaller one around the same origin.

    Args:
        lines: lines from `LaneMap.lines` for a patch that contains the smaller one, possibly rotated and moved since.
        lane_range: extent of the smaller patch.

    Returns:
        The lines that `LaneMap.lines` returns for the smaller patch.
    """
    window = _window(lane_range, 0.0)
    result: list[MapLine] = []
    for line in lines:
        if line.label == _DIVIDER:
            pieces, _ = _parts(shapely.intersection(shapely.linestrings(line.points), window), 1)
            result.extend(line._replace(points=shapely.get_coordinates(piece)) for piece in pieces)
    rings = [shapely.linearrings(line.points) for line in lines if line.label == _CROSSING]
    outer = shapely.union_all([shapely.polygons(ring) for ring in rings if not shapely.is_ccw(ring)])
    holes = shapely.union_all([shapely.polygons(ring) for ring in rings if shapely.is_ccw(ring)])
    crossings, _ = _parts(shapely.intersection(shapely.difference(outer, holes), window), 2)
    outlines = _outlines([list(crossings)], _window(lane_range, PATCH_MARGIN))[0]
    result.extend(MapLine(_CROSSING, points) for points in outlines)
    boundaries = [line.points for line in lines if line.label == _BOUNDARY]
    for inside in _clip(boundaries, _window(lane_range, -PATCH_MARGIN)):
        result.extend(MapLine(_BOUNDARY, points) for points in inside)
    return result


def _parts(geometry: BaseGeometry | np.ndarray, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """Keeps the lines (1) or polygons (2) of cut geometry; a window that only touches leaves points or edges.

    Returns:
        The parts, and the number of the geometry that each is of.
    """
    parts, owner = shapely.get_parts(geometry, return_index=True)
    kept = (shapely.get_dimensions(parts) == dimensions) & ~shapely.is_empty(parts)
    return parts[kept], owner[kept]


def _window(lane_range: LaneRange, margin: float) -> BaseGeometry:
    """Makes the rectangle of a patch around the origin, enlarged by a margin on every side."""
    x, y = lane_range.x / 2 + margin, lane_range.y / 2 + margin
    return shapely.box(-x, -y, x, y)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _outlines(surfaces: Sequence[Sequence[BaseGeometry]], window: BaseGeometry) -> list[list[np.ndarray]]:
    """Outlines the unions of polygons inside a window: pieces of each ring are merged, the surface is on their right.

    Args:
        surfaces: the polygons of each union.
        window: the rectangle.

    Returns:
        The pieces of each union.
    """
    unions = [shapely.union_all(polygons) for polygons in surfaces if polygons]
    numbers = np.array([number for number, polygons in enumerate(surfaces) if polygons], dtype=np.int64)
    polygons, union = shapely.get_parts(np.array(unions, dtype=object), return_index=True)
    rings, polygon = shapely.get_rings(polygons, return_index=True)
    is_hole = np.append(False, polygon[1:] == polygon[:-1])[: len(rings)]  # the first ring of a polygon is its exterior
    points, ring = shapely.get_coordinates(rings, return_index=True)
    ends = np.searchsorted(ring, np.arange(len(rings)), side="right")
    forward = shapely.is_ccw(rings) == is_hole
    oriented = [
        piece if ahead else piece[::-1] for piece, ahead in zip(np.split(points, ends[:-1]), forward, strict=False)
    ]
    result: list[list[np.ndarray]] = [[] for _ in surfaces]
    for number, pieces in zip(numbers[union[polygon]], _clip(oriented, window), strict=True):
        result[number].extend(pieces)
    return result


def _crossings_by_direction(polygons: list[BaseGeometry]) -> list[np.ndarray]:
    """Unites crossings with neighbours of the same direction and returns their outer rings, counter-clockwise.

    In the file's order, each crossing is united with all free crossings of its direction whose axis-aligned bounding
    box intersects its own. The direction is that of the longest edge of the minimum rotated rectangle. The published
    code then cuts the ring again by the border of the patch, where rounding decides which edges along the border
    survive, and closes the rest. This function keeps the ring, which gives the same result except for rounding.
    """
    if not polygons:
        return []
    corners = [shapely.get_coordinates(box)[:3] for box in shapely.oriented_envelope(polygons)]
    edges = [np.diff(points, axis=0) for points in corners]  # each [2, 2]; [1, 2] for a box without width
    longest = np.stack([edge[np.linalg.norm(edge, axis=1).argmax()] for edge in edges])  # [crossings, 2]
    longest /= np.linalg.norm(longest, axis=1, keepdims=True)
    low, high = np.split(shapely.bounds(polygons), 2, axis=1)  # each [crossings, 2]
    near = (low[:, None] <= high).all(-1) & (low <= high[:, None]).all(-1)
    joins = near & (1 - np.abs(longest @ longest.T) < SAME_DIRECTION)  # [crossings, crossings]

    rings, free = [], np.ones(len(polygons), dtype=bool)
    for k in range(len(polygons)):
        if not free[k]:
            continue
        members = joins[k] & free
        members[k] = True
        free &= ~members
        for part in shapely.get_parts(shapely.union_all([polygons[m] for m in np.flatnonzero(members)])):
            points = shapely.get_coordinates(part.exterior)
            rings.append(points if shapely.is_ccw(part.exterior) else points[::-1])
    return rings


def _clip(lines: Sequence[np.ndarray], window: BaseGeometry) -> list[list[np.ndarray]]:
    """Returns the pieces of polylines, each [P, 2], inside a window."""
    if not lines:
        return []
    counts = [len(line) for line in lines]
    whole = shapely.linestrings(np.concatenate(lines), indices=np.repeat(np.arange(len(lines)), counts))
    pieces, line = _parts(shapely.intersection(whole, window), 1)
    several = np.bincount(line, minlength=len(lines)) > 1
    # A ring is also cut at its start vertex: merge those two pieces.
    cut = np.flatnonzero(several[line])
    _, place = np.unique(line[cut], return_inverse=True)
    merged = shapely.line_merge(shapely.multilinestrings(pieces[cut], indices=place), directed=True)
    joined, owner = shapely.get_parts(merged, return_index=True)
    result: list[list[np.ndarray]] = [[] for _ in lines]
    alone = np.flatnonzero(~several[line])
    for number, piece in zip(line[alone], pieces[alone], strict=True):
        result[number].append(shapely.get_coordinates(piece))
    for number, piece in zip(np.flatnonzero(several)[owner], joined, strict=True):
        result[number].append(shapely.get_coordinates(piece))
    return result
