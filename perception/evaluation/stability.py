"""Stability: how much the same predictions move from one frame to the next, measured without tracks or ground truth.

Two consecutive predictions of a scene are compared in the later ego frame: the earlier one is transformed by the ego
motion, its boxes also move by their own predicted velocity. Boxes and lines of the same class are then matched one to
one with the least sum of distances (Hungarian matching), and the mean displacement of the pairs is reported. A detector
that flickers has few pairs, so the share of predictions with a partner in the frame before is reported as well.

The displacement of two lines is their mean distance where both could be predicted: for the points of either line in the
area that is in range at both times, the distance to the nearest point of the other line, averaged over both directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import shapely
from scipy.optimize import linear_sum_assignment

from perception.errors import DataError
from perception.geometry import invert_rigid, polyline_length, resample_polyline, transform_points
from perception.types import (
    BOX_CLASSES,
    DEFAULT_LANE_RANGE,
    LINE_CLASSES,
    Array,
    Boxes,
    FrameObjects,
    LaneRange,
    Polylines,
)

BOX_GATE = 2.0  # metres; boxes farther apart are no pair, as in the official detection score
LINE_GATE = 1.5  # metres; the widest of the published lane thresholds
STEP = 0.5  # metres between the points of a line that are compared
MARGIN = 1.0  # metres by which the common area is narrowed, because lines end at the border of the range


@dataclass(frozen=True)
class ClassStability:
    """The stability of one class.

    Args:
        displacement: mean over all pairs, metres; NaN without a pair.
        found_again: share of the later frame's instances, in range at both times, that have a partner in the earlier
            frame; NaN without an instance.
        pairs: number of pairs.
    """

    displacement: float
    found_again: float
    pairs: int


@dataclass(frozen=True)
class StabilityResult:
    """The stability of one split.

    Args:
        boxes: per class name.
        lines: per class name.
        all_boxes, all_lines: over the instances of all classes.
        frame_pairs: number of pairs of consecutive frames.
        min_score: instances below it were left out.
    """

    boxes: dict[str, ClassStability]
    lines: dict[str, ClassStability]
    all_boxes: ClassStability
    all_lines: ClassStability
    frame_pairs: int
    min_score: float

    def as_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; NaN becomes None."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(part) for key, part in value.items()}
            return None if isinstance(value, float) and np.isnan(value) else value

        return {key: plain(value) for key, value in asdict(self).items()}

    def table(self) -> str:
        """Returns the result as text for a terminal."""
        rows = [f"{f'stability (score >= {self.min_score:g})':<28}{'moved by':>10}{'found again':>13}{'pairs':>8}"]
        parts = {**self.boxes, "all boxes": self.all_boxes, **self.lines, "all lines": self.all_lines}
        for name, part in parts.items():
            if part.pairs or name.startswith("all"):
                moved = f"{part.displacement:8.3f} m" if part.pairs else f"{'-':>10}"
                again = "-" if np.isnan(part.found_again) else f"{part.found_again:.3f}"
                rows.append(f"{name:<28}{moved}{again:>13}{part.pairs:8d}")
        return "\n".join(rows)


def evaluate_stability(
    predictions: Mapping[str, FrameObjects],
    sequences: Sequence[Sequence[str]],
    global_from_ego: Mapping[str, Array],
    seconds: Mapping[str, float],
    *,
    min_score: float = 0.3,
    lane_range: LaneRange = DEFAULT_LANE_RANGE,
    box_range: float = 50.0,
) -> StabilityResult:
    """Measures the displacement of the same instances between consecutive frames.

    Args:
        predictions: per sample token, on the CPU, without leading dimensions.
        sequences: the tokens of each scene in time order.
        global_from_ego: per token [4, 4] float64.
        seconds: per token, the time of the sample.
        min_score: boxes and lines below it are left out.
        lane_range: in which lines are predicted.
        box_range: metres from the ego within which boxes are compared.

    Raises:
        DataError: a token of a sequence has no prediction.
    """
    tally = {name: _Tally() for name in BOX_CLASSES + LINE_CLASSES}
    frame_pairs = 0
    for tokens in sequences:
        missing = [token for token in tokens if token not in predictions]
        if missing:
            raise DataError(f"the predictions lack the sample {missing[0]}; give every sample of the split an entry")
        for before, now in pairwise(tokens):
            frame_pairs += 1
            now_from_before = invert_rigid(global_from_ego[now]) @ global_from_ego[before]
            passed = seconds[now] - seconds[before]
            _compare_boxes(
                predictions[before].boxes, predictions[now].boxes, now_from_before, passed, min_score, box_range, tally
            )
            _compare_lines(
                predictions[before].lines, predictions[now].lines, now_from_before, min_score, lane_range, tally
            )
    return StabilityResult(
        boxes={name: tally[name].result() for name in BOX_CLASSES},
        lines={name: tally[name].result() for name in LINE_CLASSES},
        all_boxes=_Tally.of([tally[name] for name in BOX_CLASSES]).result(),
        all_lines=_Tally.of([tally[name] for name in LINE_CLASSES]).result(),
        frame_pairs=frame_pairs,
        min_score=min_score,
    )


class _Tally:
    """The displacements and instances of one class over all frames."""

    def __init__(self) -> None:
        self.displacements: list[float] = []
        self.instances = 0

    @classmethod
    def of(cls, tallies: Sequence[_Tally]) -> _Tally:
        whole = cls()
        for tally in tallies:
            whole.displacements += tally.displacements
            whole.instances += tally.instances
        return whole

    def add(self, distance: Array, gate: float) -> None:
        """Matches instances by distances [before, now] in metres; infinite where no pair is possible."""
        self.instances += distance.shape[1]
        # Pairs beyond the gate cost the gate, so that they never replace a good pair.
        rows, columns = linear_sum_assignment(np.minimum(distance, gate))
        paired = distance[rows, columns]
        self.displacements += paired[paired < gate].tolist()

    def result(self) -> ClassStability:
        pairs = len(self.displacements)
        moved = float(np.mean(self.displacements)) if pairs else float("nan")
        return ClassStability(moved, pairs / self.instances if self.instances else float("nan"), pairs)


def _compare_boxes(
    before: Boxes,
    now: Boxes,
    now_from_before: Array,
    passed: float,
    min_score: float,
    box_range: float,
    tally: Mapping[str, _Tally],
) -> None:
    def arrays(boxes: Boxes) -> tuple[Array, Array, Array]:
        keep = boxes.valid & (boxes.score >= min_score)
        return boxes.center[keep].double().numpy(), boxes.velocity[keep].double().numpy(), boxes.label[keep].numpy()

    center_before, velocity, label_before = arrays(before)
    center, _, label = arrays(now)
    center_before[:, :2] += np.nan_to_num(velocity) * passed  # unknown velocities do not move the box
    center_before = transform_points(now_from_before, center_before)
    # Objects in range at one of the two times only may have no partner.
    ego_before = now_from_before[:2, 3]

    def in_range(points: Array) -> Array:
        farthest = np.maximum(np.linalg.norm(points[:, :2], axis=1), np.linalg.norm(points[:, :2] - ego_before, axis=1))
        return np.asarray(farthest < box_range)

    keep_before, keep = in_range(center_before), in_range(center)
    for k, name in enumerate(BOX_CLASSES):
        old, new = center_before[keep_before & (label_before == k)], center[keep & (label == k)]
        tally[name].add(np.linalg.norm(old[:, None, :2] - new[None, :, :2], axis=-1), BOX_GATE)


def _compare_lines(
    before: Polylines,
    now: Polylines,
    now_from_before: Array,
    min_score: float,
    lane_range: LaneRange,
    tally: Mapping[str, _Tally],
) -> None:
    half = np.asarray(lane_range) / 2 - MARGIN
    here = shapely.box(*-half, *half)
    corners = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * half
    there = shapely.polygons(_to_now(corners, now_from_before))
    both = shapely.intersection(here, there)
    shapely.prepare(both)

    def used(lines: Polylines) -> list[tuple[int, Array]]:
        keep = lines.valid & (lines.score >= min_score)
        return list(zip(lines.label[keep].tolist(), lines.points[keep].double().numpy(), strict=True))

    old, new = [(label, _to_now(points, now_from_before)) for label, points in used(before)], used(now)
    for k, name in enumerate(LINE_CLASSES):
        pair = [[_visible(points, both) for label, points in lines if label == k] for lines in (old, new)]
        earlier, later = ([line for line in lines if len(line[1])] for lines in pair)
        distance = np.full((len(earlier), len(later)), np.inf)
        for i, (line_i, points_i) in enumerate(earlier):
            for j, (line_j, points_j) in enumerate(later):
                ways = shapely.distance(points_i, line_j).mean(), shapely.distance(points_j, line_i).mean()
                distance[i, j] = sum(ways) / 2
        tally[name].add(distance, LINE_GATE)


def _to_now(points: Array, now_from_before: Array) -> Array:
    """Transforms ground points [P, 2] of the earlier ego frame to the later one."""
    return transform_points(now_from_before, np.pad(points, ((0, 0), (0, 1))))[:, :2]


def _visible(points: Array, area: shapely.Geometry) -> tuple[shapely.LineString, Array]:
    """Returns a line, and its points at equal steps that lie in the area; none for a line without length."""
    length = polyline_length(points)
    line = shapely.linestrings(points)
    if length == 0:
        return line, np.empty(0, dtype=object)
    dense = shapely.points(resample_polyline(points, max(2, round(length / STEP) + 1)))
    return line, np.asarray(dense[shapely.intersects(area, dense)])
