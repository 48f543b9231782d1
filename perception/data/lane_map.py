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
from typing import Any, NamedTuple

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
_LAYERS = {_DIVIDER: DIVIDER_LAYERS, _CROSSING: CROSSING_LAYERS, _BOUNDARY: SURFACE_LAYERS}


class Lines(NamedTuple):
    """Vector lines of S samples, or of the patches of S poses, in flat arrays."""

    sample_offset: np.ndarray  # [S+1] int64: sample i owns lines sample_offset[i] to sample_offset[i+1]
    label: np.ndarray  # [lines] int8 index into LINE_CLASSES
    vertex_offset: np.ndarray  # [lines+1] int64
    vertices: np.ndarray  # [vertices, 2] metres; float64, float32 in an index

    def of_sample(self, i: int) -> list[MapLine]:
        """Returns the lines of sample i, with float64 points."""
        first, end = self.sample_offset[i], self.sample_offset[i + 1]
        bounds = self.vertex_offset[first : end + 1].tolist()
        return [
            MapLine(label, self.vertices[start:stop].astype(np.float64))
            for label, start, stop in zip(self.label[first:end].tolist(), bounds[:-1], bounds[1:], strict=True)
        ]


class _Chains(NamedTuple):
    """Polylines in flat arrays; `owner` is the number of what each belongs to, in rising order."""

    owner: np.ndarray  # [n] int64
    length: np.ndarray  # [n] int64 vertices
    points: np.ndarray  # [vertices, 2]

    def split(self) -> list[np.ndarray]:
        """Returns the points of each polyline."""
        return np.split(self.points, np.cumsum(self.length)[:-1]) if len(self.length) else []


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
        # The shapes of all layers, one layer after the other, in the order of the file.
        shapes: list[BaseGeometry] = []
        labels: list[int] = []
        for label, layers in _LAYERS.items():
            for layer in layers:
                found = (
                    self._shapes(content, layer, "line_token", lines, self._polyline)
                    if label == _DIVIDER
                    else self._shapes(content, layer, "polygon_token", polygons, self._polygon)
                )
                shapes += found
                labels += [label] * len(found)
        self._shape, self._label_of = np.array(shapes, dtype=object), np.array(labels, dtype=np.int64)
        self._tree = shapely.STRtree(self._shape)
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

    def _shapes(
        self,
        content: object,
        layer: str,
        key: str,
        shapes: dict[str, dict[str, Any]],
        make: Callable[[str, dict[str, Any]], BaseGeometry | None],
    ) -> list[BaseGeometry]:
        """Makes the valid geometry of a layer, whose records name their shape in the field `key`."""
        geometries = []
        for record in self._records(content, layer):
            name = record.get(key)
            if not isinstance(name, str) or name not in shapes:
                wanted = key.removesuffix("_token")
                raise self._malformed(layer, record["token"], f"needs the token of a record of '{wanted}' as '{key}'")
            if (geometry := make(name, shapes[name])) is not None:
                geometries.append(geometry)
        return geometries

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
        return self.lines_of_patches(np.array([[x, y]]), np.array([yaw]), lane_range, protocol).of_sample(0)

    def lines_of_patches(
        self,
        centers: np.ndarray,
        yaws: np.ndarray,
        lane_range: LaneRange = DEFAULT_LANE_RANGE,
        protocol: str = "maptr",
    ) -> Lines:
        """Extracts the lines inside of many patches at once, which is quicker than one by one.

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
        pieces, label, patch = self._cut(np.asarray(centers, dtype=np.float64), yaws, lane_range)
        crossings, surfaces = (
            np.split(pieces[label == name], np.searchsorted(patch[label == name], np.arange(1, len(centers))))
            for name in (_CROSSING, _BOUNDARY)
        )
        if protocol == "maptr":
            rings = _outlines(crossings, _window(lane_range, PATCH_MARGIN))
        else:
            rings = _joined([_crossings_by_direction(polygons) for polygons in crossings])
        dividers = _chains(pieces[label == _DIVIDER], patch[label == _DIVIDER])
        boundaries = _outlines(surfaces, _window(lane_range, -PATCH_MARGIN))
        return _lines({_DIVIDER: dividers, _CROSSING: rings, _BOUNDARY: boundaries}, len(centers))

    def _cut(
        self, centers: np.ndarray, yaws: np.ndarray, lane_range: LaneRange
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cuts the geometry of all layers by patches.

        Returns:
            Polylines and polygons [n] in the frames of their patches, the class that each is for, and the number of its
            patch. They are in the order of patches, and in the order of the file in each layer.
        """
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * np.asarray(lane_range, dtype=np.float64) / 2
        turns = [np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]]) for yaw in yaws]
        patches = shapely.polygons([corners @ turn.T + center for turn, center in zip(turns, centers, strict=True)])
        patch, found = self._tree.query(patches, predicate="intersects")
        order = np.lexsort([found, patch])
        patch, found = patch[order], found[order]
        shapes = self._shape[found]
        pieces, pair = _parts(shapely.intersection(shapes, patches[patch]), shapely.get_dimensions(shapes))
        moved, owner = shapely.get_coordinates(pieces, return_index=True)
        start = 0
        ends = np.searchsorted(owner, np.searchsorted(patch[pair], np.arange(len(centers)), side="right"))
        for center, turn, end in zip(centers, turns, ends.tolist(), strict=True):
            moved[start:end] = (moved[start:end] - center) @ turn  # from global to patch
            start = end
        return shapely.set_coordinates(pieces, moved), self._label_of[found[pair]], patch[pair]

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
            pieces, _ = _parts(shapely.intersection(shapely.linestrings(line.points), window), np.array([1]))
            result.extend(line._replace(points=shapely.get_coordinates(piece)) for piece in pieces)
    rings = [shapely.linearrings(line.points) for line in lines if line.label == _CROSSING]
    outer = shapely.union_all([shapely.polygons(ring) for ring in rings if not shapely.is_ccw(ring)])
    holes = shapely.union_all([shapely.polygons(ring) for ring in rings if shapely.is_ccw(ring)])
    crossings, _ = _parts(shapely.intersection(shapely.difference(outer, holes), window), np.array([2]))
    outlines = _outlines([crossings], _window(lane_range, PATCH_MARGIN))
    boundaries = _joined([[line.points] for line in lines if line.label == _BOUNDARY])
    inside = _clip(boundaries, _window(lane_range, -PATCH_MARGIN))
    for label, chains in ((_CROSSING, outlines), (_BOUNDARY, inside)):
        result.extend(MapLine(label, points) for points in chains.split())
    return result


def _parts(geometry: BaseGeometry | np.ndarray, dimensions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keeps the lines (1) or polygons (2) of cut geometry; a window that only touches leaves points or edges.

    Args:
        geometry: one or [n].
        dimensions: [n] of the parts of each that are kept.

    Returns:
        The parts, and the number of the geometry that each is of.
    """
    parts, owner = shapely.get_parts(geometry, return_index=True)
    kept = (shapely.get_dimensions(parts) == dimensions[owner]) & ~shapely.is_empty(parts)
    return parts[kept], owner[kept]


def _chains(geometry: np.ndarray, owner: np.ndarray) -> _Chains:
    """Takes the points of polylines [n]."""
    points, number = shapely.get_coordinates(geometry, return_index=True)
    return _Chains(owner, np.bincount(number, minlength=len(geometry)), points)


def _joined(lines: Sequence[Sequence[np.ndarray]]) -> _Chains:
    """Joins the polylines of several owners."""
    flat = [line for of_owner in lines for line in of_owner]
    length = np.array([len(line) for line in flat], dtype=np.int64)
    owner = np.repeat(np.arange(len(lines)), [len(of_owner) for of_owner in lines])
    return _Chains(owner, length, np.concatenate([np.zeros((0, 2)), *flat]))


def _lines(chains: dict[int, _Chains], count: int) -> Lines:
    """Joins polylines by class to lines; those of one patch are in the order of the classes."""
    owner = np.concatenate([part.owner for part in chains.values()])
    order = np.argsort(owner, kind="stable")
    length = np.concatenate([part.length for part in chains.values()])
    offset = np.concatenate([[0], np.cumsum(length[order])])
    # The place of each vertex: that of its line before, and its number in the line.
    before = np.cumsum(length) - length
    place = np.repeat(before[order] - offset[:-1], length[order]) + np.arange(offset[-1])
    label = np.repeat(np.array([*chains], dtype=np.int8), [len(part.owner) for part in chains.values()])
    return Lines(
        sample_offset=np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=count))]),
        label=label[order],
        vertex_offset=offset,
        vertices=np.concatenate([part.points for part in chains.values()])[place],
    )


def _window(lane_range: LaneRange, margin: float) -> BaseGeometry:
    """Makes the rectangle of a patch around the origin, enlarged by a margin on every side."""
    x, y = lane_range.x / 2 + margin, lane_range.y / 2 + margin
    return shapely.box(-x, -y, x, y)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _outlines(surfaces: Sequence[np.ndarray], window: BaseGeometry) -> _Chains:
    """Outlines the unions of polygons inside a window: pieces of each ring are merged, the surface is on their right.

    Args:
        surfaces: the polygons of each union.
        window: the rectangle.

    Returns:
        The pieces of each union.
    """
    count = [len(polygons) for polygons in surfaces]
    padded = np.full((len(surfaces), max(count)), None)  # shapely leaves None out
    padded[np.arange(max(count)) < np.array(count)[:, None]] = np.concatenate(surfaces)
    numbers = np.flatnonzero(count)
    polygons, union = shapely.get_parts(shapely.union_all(padded[numbers], axis=1), return_index=True)
    rings, polygon = shapely.get_rings(polygons, return_index=True)
    is_hole = np.append(False, polygon[1:] == polygon[:-1])[: len(rings)]  # the first ring of a polygon is its exterior
    outlines = _chains(rings, numbers[union[polygon]])
    end = np.cumsum(outlines.length)
    place = np.arange(len(outlines.points))
    # A ring from `start` to `end` is turned round by counting from its end.
    turned = np.repeat(shapely.is_ccw(rings) != is_hole, outlines.length)
    place[turned] = np.repeat(2 * end - outlines.length - 1, outlines.length)[turned] - place[turned]
    return _clip(outlines._replace(points=outlines.points[place]), window)


def _crossings_by_direction(polygons: np.ndarray) -> list[np.ndarray]:
    """Unites crossings with neighbours of the same direction and returns their outer rings, counter-clockwise.

    In the file's order, each crossing is united with all free crossings of its direction whose axis-aligned bounding
    box intersects its own. The direction is that of the longest edge of the minimum rotated rectangle. The published
    code then cuts the ring again by the border of the patch, where rounding decides which edges along the border
    survive, and closes the rest. This function keeps the ring, which gives the same result except for rounding.
    """
    if not len(polygons):
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
        for part in shapely.get_parts(shapely.union_all(polygons[members])):
            points = shapely.get_coordinates(part.exterior)
            rings.append(points if shapely.is_ccw(part.exterior) else points[::-1])
    return rings


def _clip(lines: _Chains, window: BaseGeometry) -> _Chains:
    """Returns the pieces of polylines inside a window."""
    if not len(lines.owner):
        return lines
    whole = shapely.linestrings(lines.points, indices=np.repeat(np.arange(len(lines.owner)), lines.length))
    pieces, line = _parts(shapely.intersection(whole, window), np.ones(len(whole)))
    several = np.bincount(line, minlength=len(whole)) > 1
    # A ring is also cut at its start vertex: merge those two pieces.
    cut = np.flatnonzero(several[line])
    _, place = np.unique(line[cut], return_inverse=True)
    merged = shapely.line_merge(shapely.multilinestrings(pieces[cut], indices=place), directed=True)
    joined, number = shapely.get_parts(merged, return_index=True)
    alone = np.flatnonzero(~several[line])
    pieces, line = np.append(pieces[alone], joined), np.append(line[alone], np.flatnonzero(several)[number])
    order = np.argsort(line, kind="stable")
    return _chains(pieces[order], lines.owner[line[order]])
