"""Reads vector maps: files of global polylines, such as the dividers, crossings and boundaries around a sample."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import shapely

from perception.data.lane_map import cut_lines
from perception.errors import DataError, PerceptionWarning
from perception.geometry import rigid_from_yaw, yaw_from_rotation
from perception.inference.checks import FARTHEST_POSE, checked_rigid
from perception.reading import numbers, parse_json, read_bytes, typed
from perception.types import DEFAULT_LANE_RANGE, LINE_CLASSES, LaneRange, MapLine

_LINE_KINDS = {"lane_divider": "divider", "road_divider": "divider", "drivable_boundary": "boundary"} | {
    name: name for name in LINE_CLASSES
}


def load_map_vectors(
    json_path: str | Path, global_from_ego: np.ndarray, lane_range: LaneRange = DEFAULT_LANE_RANGE
) -> list[MapLine]:
    """Loads the lines around a pose from a file of global polylines, `{"features": [{"kind", "polyline"}]}`.

    Outlines of crossings may run in either direction, closed or not. Boundaries keep their direction.

    Args:
        json_path: the file. A kind is a class of LINE_CLASSES, or nuScenes' `lane_divider`, `road_divider` or
            `drivable_boundary`; other kinds are left out.
        global_from_ego: [4, 4]; its position and yaw are used, a map has no heights.
        lane_range: extent of the lines to keep, along the ego frame's x and y.

    Returns:
        Lines in the ego frame.

    Raises:
        DataError: the file is missing, has no 'features', or a feature is malformed.

    Warns:
        PerceptionWarning: no feature has a known kind, none is near the pose, or an outline crosses itself.
    """
    path = Path(json_path)
    kind_of_file = "a JSON file with 'features'"
    content = parse_json(path, read_bytes(path, kind_of_file), kind_of_file)
    if not isinstance(content, dict) or "features" not in content:
        raise DataError(f"{path} is not a JSON object with 'features': give another file or add the field")
    pose = checked_rigid("global_from_ego", global_from_ego)
    yaw = float(yaw_from_rotation(pose))
    turn = rigid_from_yaw(yaw)[:2, :2]  # global_from_ego in the plane
    lines = []
    for index, feature in enumerate(typed(content["features"], list, f"{path}: features", "a list")):
        where = f"{path}: features[{index}]"
        kind = typed(typed(feature, dict, where, "an object").get("kind"), str, f"{where}.kind", "the kind of a line")
        if kind not in _LINE_KINDS:
            continue
        label = LINE_CLASSES.index(_LINE_KINDS[kind])
        points_global = _polyline(feature.get("polyline"), f"{where}.polyline")
        lines.append(MapLine(label, (points_global - pose[:2, 3]) @ turn))
    crossing = LINE_CLASSES.index("ped_crossing")
    rings = [line.points for line in lines if line.label == crossing]
    kept = [line for line in lines if line.label != crossing] + [MapLine(crossing, r) for r in _clockwise(rings, path)]
    if not lines:
        _warn(f"{path}: no feature has a kind of {', '.join(_LINE_KINDS)}; there are no lines of the ground truth")
    found = cut_lines(kept, lane_range)
    if kept and not found:
        _warn(f"{path}: no line is within {lane_range} m of the pose; give the map of this place, in its coordinates")
    return found


def _clockwise(rings: list[np.ndarray], path: Path) -> list[np.ndarray]:
    """Turns the outlines [P, 2] of crossings as `cut_lines` takes them: clockwise, the holes of a crossing otherwise.

    A ring is a hole if it lies inside a ring of the other direction.
    """
    polygons = []
    for points in rings:
        closed = points if (points[0] == points[-1]).all() else np.concatenate([points, points[:1]])
        polygon = shapely.Polygon(closed) if len(closed) > 3 else None
        if polygon is None or not polygon.is_valid or polygon.area == 0:
            _warn(f"{path}: a crossing is left out, because its outline crosses itself or has no area; correct it")
        else:
            polygons.append(polygon)
    ccw = [bool(shapely.is_ccw(polygon.exterior)) for polygon in polygons]
    tree = shapely.STRtree(polygons)
    result = []
    for k, polygon in enumerate(polygons):
        around = [int(j) for j in tree.query(polygon, predicate="within") if ccw[j] != ccw[k]]
        points = shapely.get_coordinates(polygon.exterior)
        result.append(points if ccw[k] == bool(around) else points[::-1])
    return result


def _polyline(value: object, where: str) -> np.ndarray:
    """Returns points [P, 2] of a list of [x, y] or [x, y, z]."""
    rows = typed(value, list, where, "a list of two or more [x, y]")
    points = np.zeros((len(rows), 2))
    for index, row in enumerate(rows):
        points[index] = numbers(row, f"{where}[{index}]", 2, more=1)[:2]
    if len(rows) < 2:
        raise DataError(f"{where} has {len(rows)} points; give two or more [x, y]")
    if np.abs(points).max() > FARTHEST_POSE:
        raise DataError(f"{where} lies {np.abs(points).max():.4g} m from the map's origin; give metres")
    return points


def _warn(text: str) -> None:
    warnings.warn(text, PerceptionWarning, stacklevel=3)
