"""Extracts lane centre lines and their successor links from the lane graph of a nuScenes map expansion.

The path of a lane (`arcline_path_3`) is a chain of arc-line paths. Each has a start pose and three segments of given
lengths: an arc, a straight line or an arc, an arc. `shape` gives the turn of each segment (L left, S straight, R
right). All arcs of a path have one radius. `connectivity` lists the successors of each lane.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from perception.errors import DataError
from perception.inference.checks import FARTHEST_POSE
from perception.reading import short
from perception.types import LaneRange

SHAPES = ("LSL", "LSR", "RSL", "RSR", "LRL", "RLR")
TURN = {"L": 1.0, "S": 0.0, "R": -1.0}

CHORD_ERROR = 0.01  # metres, largest distance between an arc and its chords
MAX_LENGTH = 1e5  # metres of a segment
MAX_VERTICES = 100_000  # of a segment
STRAIGHT = 1e-9  # 1/m, curvature below which an arc is a straight line
JOINT = 0.05  # metres; closer vertices of consecutive paths are merged


class Centerlines(NamedTuple):
    """Directed centre lines inside a patch. A centre line that leaves the patch and comes back is several lines.

    `token` is that of the lane or lane connector in the map file. `successor` holds only links whose common point is
    inside the patch: line `successor[e, 0]` ends where line `successor[e, 1]` starts.
    """

    points: list[np.ndarray]  # each [P, 2] float64 metres, in driving direction
    token: list[str]  # one per line
    successor: np.ndarray  # [E, 2] int64 indices of lines, sorted


class LaneGraph:
    """All centre lines of one map file, in global coordinates.

    Args:
        path: the map file, for error messages.
        content: its fields `lane`, `lane_connector`, `arcline_path_3` and `connectivity`.

    Raises:
        DataError: one of these fields is missing, or a record is malformed.
    """

    def __init__(self, path: Path, content: dict) -> None:
        for field, kind in (("lane", list), ("lane_connector", list), ("arcline_path_3", dict), ("connectivity", dict)):
            if not isinstance(content.get(field), kind):
                raise DataError(f"{path} has no '{field}': give a map expansion of format 1.3 for centre lines")
        arclines, connectivity = content["arcline_path_3"], content["connectivity"]
        for field in ("lane", "lane_connector"):
            for k, record in enumerate(content[field]):
                if not isinstance(record, dict) or not isinstance(record.get("token"), str):
                    raise DataError(
                        f"{path}: record {k} (from 0) of '{field}' needs text as 'token': unpack the map "
                        "expansion again"
                    )
        records = [*content["lane"], *content["lane_connector"]]
        # A lane without a path has no centre line; the official maps contain a few.
        self.tokens = [record["token"] for record in records if arclines.get(record["token"])]
        self._points: list[np.ndarray] = []  # each [P, 2] global
        for token in self.tokens:
            try:
                self._points.append(lane_points(arclines[token]))
            except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
                raise DataError(
                    f"{path}: 'arcline_path_3' of lane {token} is malformed ({error}): unpack the map expansion again"
                ) from None
        self._low = np.array([points.min(axis=0) for points in self._points]).reshape(-1, 2)
        self._high = np.array([points.max(axis=0) for points in self._points]).reshape(-1, 2)
        number = {token: k for k, token in enumerate(self.tokens)}
        self._next: list[list[int]] = []
        for token in self.tokens:
            try:
                successors = connectivity.get(token, {}).get("outgoing", ())
                self._next.append(sorted({number[name] for name in successors if name in number}))
            except (AttributeError, TypeError):
                raise DataError(
                    f"{path}: 'connectivity' of lane {token} needs a list of tokens as 'outgoing': unpack the map "
                    "expansion again"
                ) from None

    def centerlines(self, x: float, y: float, yaw: float, lane_range: LaneRange) -> Centerlines:
        """Cuts the centre lines by a rectangle and returns them in its frame, see `LaneMap.centerlines`."""
        half = np.asarray(lane_range, dtype=np.float64) / 2
        center = np.array([x, y], dtype=np.float64)
        turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])  # global_from_patch
        reach = np.abs(turn) @ half  # half extent of the axis-aligned box around the patch
        near = np.flatnonzero(((self._low <= center + reach) & (self._high >= center - reach)).all(axis=1))

        points: list[np.ndarray] = []
        lanes: list[int] = []
        starts, ends = {}, {}
        for lane in near.tolist():
            whole = (self._points[lane] - center) @ turn
            for piece, has_start, has_end in clip_to_box(whole, half):
                if has_start:
                    starts[lane] = len(points)
                if has_end:
                    ends[lane] = len(points)
                points.append(piece)
                lanes.append(lane)
        links = sorted(
            (line, starts[after]) for lane, line in ends.items() for after in self._next[lane] if after in starts
        )
        return Centerlines(
            points, [self.tokens[lane] for lane in lanes], np.array(links, dtype=np.int64).reshape(-1, 2)
        )


def lane_points(paths: list[dict]) -> np.ndarray:
    """Discretizes the centre line of one lane: arcs within CHORD_ERROR, straight lines without inner vertices.

    Args:
        paths: arc-line paths in driving direction, each with `start_pose` (x, y, yaw), `shape`, `radius` and three
            `segment_length`.

    Returns:
        [P, 2] global, metres.

    Raises:
        KeyError, TypeError, ValueError: a field is missing or malformed.
    """
    vertices: list[np.ndarray] = []
    for path in paths:
        if path["shape"] not in SHAPES:
            raise ValueError(f"shape is {short(path['shape'])}, not one of {', '.join(SHAPES)}")
        x, y, yaw = (float(value) for value in path["start_pose"])
        lengths = np.array(path["segment_length"], dtype=np.float64)
        radius = float(path["radius"])
        numbers = [x, y, yaw, radius, *lengths]
        if lengths.shape != (3,) or not np.isfinite(numbers).all() or lengths.min() < 0 or radius <= 0:
            raise ValueError("radius and three lengths must be finite and not negative")
        if lengths.max() > MAX_LENGTH or max(abs(x), abs(y)) > FARTHEST_POSE:
            raise ValueError(f"lengths must be at most {MAX_LENGTH:g} m, and positions at most {FARTHEST_POSE:.0e} m")
        drawn = [np.array([[x, y]])]
        for letter, length in zip(path["shape"], lengths, strict=True):
            if length == 0:
                continue
            piece, yaw = _arc(drawn[-1][-1], yaw, TURN[letter] / radius, length)
            drawn.append(piece)
        fresh = np.concatenate(drawn)
        if vertices and np.linalg.norm(fresh[0] - vertices[-1][-1]) < JOINT:
            fresh = fresh[1:]
        vertices.append(fresh)
    points = np.concatenate(vertices)
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    points = points[np.concatenate([[True], steps > 0])]
    if len(points) < 2:
        raise ValueError("its path has no length")
    return points


def _arc(start: np.ndarray, yaw: float, curvature: float, length: float) -> tuple[np.ndarray, float]:
    """Discretizes a segment of constant curvature (1/m, left is positive).

    The position moves by the difference of (sin a, -cos a) / curvature between the headings a at both ends.

    Returns:
        Vertices after the start [n, 2], and the yaw at the end.
    """
    if abs(curvature) < STRAIGHT:
        return (start + length * np.array([np.cos(yaw), np.sin(yaw)]))[None], yaw
    angle = curvature * length
    widest = 2 * np.arccos(max(1 - CHORD_ERROR * abs(curvature), 0.0))  # a chord of this angle has CHORD_ERROR
    if abs(angle) > MAX_VERTICES * widest:
        raise ValueError(f"an arc of {length:g} m with a radius of {1 / abs(curvature):g} m turns too often")
    n = int(np.ceil(abs(angle) / widest))
    headings = yaw + angle * np.arange(1, n + 1) / n  # [n]
    circle = np.stack([np.sin(headings) - np.sin(yaw), np.cos(yaw) - np.cos(headings)], axis=1)  # [n, 2]
    return start + circle / curvature, yaw + angle


def clip_to_box(points: np.ndarray, half: np.ndarray) -> list[tuple[np.ndarray, bool, bool]]:
    """Cuts a polyline by an axis-aligned box around the origin; pieces keep their order and direction.

    Args:
        points: [P, 2], consecutive points differ.
        half: [2] half the extent of the box.

    Returns:
        For each piece: its points [n, 2], whether it starts at the start of the polyline, and whether it ends at the
        end of the polyline.
    """
    start, step = points[:-1], np.diff(points, axis=0)  # [P - 1, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = (-half - start) / step, (half - start) / step
    low, high = np.minimum(low, high), np.maximum(low, high)
    # A segment that is constant along an axis is inside everywhere or nowhere on this axis.
    constant, outside = step == 0, np.abs(start) > half
    low = np.where(constant, np.where(outside, np.inf, -np.inf), low)
    high = np.where(constant, np.inf, high)
    enter, leave = low.max(axis=1).clip(min=0.0), high.min(axis=1).clip(max=1.0)  # [P - 1] shares of the segment
    pieces: list[list[int]] = []  # runs of segments
    for k in np.flatnonzero(leave > enter).tolist():
        if pieces and pieces[-1][-1] == k - 1 and leave[k - 1] == 1 and enter[k] == 0:
            pieces[-1].append(k)
        else:
            pieces.append([k])
    result = []
    for run in pieces:
        first, last = run[0], run[-1]
        begin = start[first] + enter[first] * step[first] if enter[first] > 0 else points[first]
        end = start[last] + leave[last] * step[last] if leave[last] < 1 else points[last + 1]
        piece = np.concatenate([begin[None], points[first + 1 : last + 1], end[None]])
        result.append((piece, first == 0 and enter[first] == 0, last == len(step) - 1 and leave[last] == 1))
    return result
