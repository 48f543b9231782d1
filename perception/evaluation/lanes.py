"""Average precision of vector lane maps.

The flavour here is the one of VectorMapNet and MapTR (protocol name `maptr`): every line is resampled to 100 points by
arc length, the distance of two lines is the mean of their two directed mean nearest-point distances, and two lines are
only compared where 2 m wide flat-cap buffers around them touch. Within a frame and class the predictions come in order
of falling score; each may take its closest true line only, and is a hit when that line is near enough and still free.
AP is the area under the monotone precision envelope over all predictions of the split; the mean is taken over
thresholds, then over the three classes. A class without any true line counts as 0, as in the published code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import shapely
from tqdm import tqdm

from perception.errors import DataError
from perception.geometry import resample_polyline
from perception.types import LINE_CLASSES, MapLine

MAPTR_THRESHOLDS = (0.5, 1.0, 1.5)
STRICT_THRESHOLDS = (0.2, 0.5, 1.0)

_POINTS = 100
_BUFFER = 2.0


@dataclass(frozen=True)
class LaneResult:
    """Lane-map scores of one split under one protocol.

    Args:
        protocol: which published flavour the numbers follow.
        thresholds: distances in metres, rising as given.
        ap: AP per class name and threshold.
        class_ap: mean of `ap` over the thresholds, per class name.
        mean_ap: mean of `class_ap` over all line classes.
        frames: number of frames that were compared.
        truth_count, prediction_count: number of lines per class name.
    """

    protocol: str
    thresholds: tuple[float, ...]
    ap: dict[str, dict[float, float]]
    class_ap: dict[str, float]
    mean_ap: float
    frames: int
    truth_count: dict[str, int]
    prediction_count: dict[str, int]

    def as_dict(self) -> dict:
        """The result as plain JSON values; thresholds become strings, as JSON keys are."""
        return {
            "protocol": self.protocol,
            "thresholds_m": list(self.thresholds),
            "mean_ap": self.mean_ap,
            "class_ap": dict(self.class_ap),
            "ap": {name: {str(t): value for t, value in row.items()} for name, row in self.ap.items()},
            "frames": self.frames,
            "truth_count": dict(self.truth_count),
            "prediction_count": dict(self.prediction_count),
        }

    def table(self) -> str:
        """The result as text for a terminal."""
        head = f"{'lane AP (' + self.protocol + ')':<20}" + "".join(f"{t:>7g} m" for t in self.thresholds)
        rows = [head + f"{'mean':>9}{'truth':>8}{'pred.':>8}"]
        for name, row in self.ap.items():
            cells = "".join(f"{row[t]:9.3f}" for t in self.thresholds)
            counts = f"{self.truth_count[name]:8d}{self.prediction_count[name]:8d}"
            rows.append(f"{name:<20}{cells}{self.class_ap[name]:9.3f}{counts}")
        means = "".join(f"{np.mean([row[t] for row in self.ap.values()]):9.3f}" for t in self.thresholds)
        counts = f"{sum(self.truth_count.values()):8d}{sum(self.prediction_count.values()):8d}"
        rows.append(f"{'mean of classes':<20}{means}{self.mean_ap:9.3f}{counts}")
        return "\n".join(rows)


def evaluate_lanes(
    predictions: Mapping[str, Sequence[MapLine]],
    truth: Mapping[str, Sequence[MapLine]],
    *,
    thresholds: Sequence[float] = MAPTR_THRESHOLDS,
    progress: bool = False,
) -> LaneResult:
    """Scores predicted vector maps the way MapTR (arXiv 2208.14437) does.

    The score does not depend on the frame of the coordinates, the order of the frames or the direction of a line.
    Lines are used whole: clip them to the mapped area before.

    Args:
        predictions: per sample token the predicted lines, points [P, 2] in metres.
        truth: per sample token the true lines in the same frame; the same tokens as `predictions`.
        thresholds: distances in metres up to which a prediction may count as a hit.
        progress: show a progress bar on stderr.

    Raises:
        DataError: the tokens differ, a line has fewer than two points, or a number is not finite.
    """
    thresholds = _checked_thresholds(thresholds)
    _check_tokens(predictions, truth)
    scores = {label: [] for label in range(len(LINE_CLASSES))}
    hits = {label: [] for label in range(len(LINE_CLASSES))}
    truth_count = dict.fromkeys(LINE_CLASSES, 0)
    # Sorted tokens: equal scores then have one order, whatever order the frames arrive in.
    for token in tqdm(sorted(truth), desc="lane maps", unit="frame", disable=not progress):
        predicted_lines = _by_class(predictions[token], token, "predicted")
        true_lines = _by_class(truth[token], token, "true")
        for label, name in enumerate(LINE_CLASSES):
            predicted, true = predicted_lines[label], true_lines[label]
            truth_count[name] += len(true)
            scores[label].extend(line.score for line in predicted)
            hits[label].append(_match(predicted, true, thresholds))

    ap, prediction_count = {}, {}
    for label, name in enumerate(LINE_CLASSES):
        prediction_count[name] = len(scores[label])
        order = np.argsort(-np.asarray(scores[label], dtype=np.float64), kind="stable")
        flags = np.concatenate([np.zeros((0, len(thresholds)), dtype=bool), *hits[label]])[order]
        ap[name] = {t: _average_precision(flags[:, k], truth_count[name]) for k, t in enumerate(thresholds)}
    class_ap = {name: float(np.mean(list(row.values()))) for name, row in ap.items()}
    return LaneResult(
        protocol="maptr",
        thresholds=thresholds,
        ap=ap,
        class_ap=class_ap,
        mean_ap=float(np.mean(list(class_ap.values()))),
        frames=len(truth),
        truth_count=truth_count,
        prediction_count=prediction_count,
    )


def chamfer_distances(points_a: np.ndarray, points_b: np.ndarray) -> np.ndarray:
    """Mean of the two directed mean nearest-point distances of pairs of lines.

    Args:
        points_a, points_b: [pairs, P, 2] metres.

    Returns:
        [pairs] metres.
    """
    # One coordinate at a time and in place: a third of the memory traffic of a [pairs, P, P, 2] difference.
    squared = points_a[:, :, None, 0] - points_b[:, None, :, 0]  # [pairs, P, P]
    squared *= squared
    across = points_a[:, :, None, 1] - points_b[:, None, :, 1]  # [pairs, P, P]
    across *= across
    squared += across
    a_to_b, b_to_a = np.sqrt(squared.min(2)).mean(1), np.sqrt(squared.min(1)).mean(1)
    return (a_to_b + b_to_a) / 2


def _match(predicted: list[MapLine], true: list[MapLine], thresholds: tuple[float, ...]) -> np.ndarray:
    """Which predictions of one frame and class are hits: [predictions, thresholds] bool, in the given order."""
    hits = np.zeros((len(predicted), len(thresholds)), dtype=bool)
    if not predicted or not true:
        return hits
    points_predicted = np.stack([resample_polyline(line.points, _POINTS) for line in predicted])  # [predictions, P, 2]
    points_true = np.stack([resample_polyline(line.points, _POINTS) for line in true])  # [truths, P, 2]
    distances = _distances(points_predicted, points_true, max(thresholds))  # [predictions, truths]
    closest = distances.argmin(1)
    nearest = distances[np.arange(len(predicted)), closest]
    order = np.argsort([-line.score for line in predicted], kind="stable")
    for k, threshold in enumerate(thresholds):
        taken = set()
        for index in order:
            if nearest[index] <= threshold and closest[index] not in taken:
                taken.add(closest[index])
                hits[index, k] = True
    return hits


def _distances(points_a: np.ndarray, points_b: np.ndarray, limit: float) -> np.ndarray:
    """All pairs' distances [A, B], infinite where they exceed `limit` or where the buffers do not touch.

    A pair beyond the largest threshold can never be a hit, and it can never be closer than one that is; so neither its
    exact distance nor its buffers matter. That leaves few pairs for the costly steps.
    """
    distances = np.full((len(points_a), len(points_b)), np.inf)
    index_a, index_b = np.nonzero(_lower_bounds(points_a, points_b) <= limit)
    for start in range(0, len(index_a), 512):  # pieces that stay below 100 MB
        a, b = index_a[start : start + 512], index_b[start : start + 512]
        distances[a, b] = chamfer_distances(points_a[a], points_b[b])
    index_a, index_b = np.nonzero(distances <= limit)
    touch = np.zeros_like(distances, dtype=bool)
    if len(index_a):
        buffers_a, buffers_b = _buffers(points_a, index_a), _buffers(points_b, index_b)
        touch[index_a, index_b] = shapely.intersects(buffers_a, buffers_b)
    return np.where(touch, distances, np.inf)


def _lower_bounds(points_a: np.ndarray, points_b: np.ndarray) -> np.ndarray:
    """[A, B] distances that chamfer_distances can never fall below: points of one line to the other's bounding box."""

    def to_box(points: np.ndarray, others: np.ndarray) -> np.ndarray:
        low, high = others.min(1)[None, :, None], others.max(1)[None, :, None]  # [1, others, 1, 2]
        outside = np.maximum(np.maximum(low - points[:, None], points[:, None] - high), 0)  # [lines, others, P, 2]
        return np.hypot(outside[..., 0], outside[..., 1]).mean(2)

    # A whisker below, so that rounding cannot drop a pair that lies exactly on the limit.
    return (to_box(points_a, points_b) + to_box(points_b, points_a).T) / 2 - 1e-9


def _buffers(points: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The buffers of lines [lines, P, 2] picked by `index` (with repeats), each made once; empty for a point."""
    used, back = np.unique(index, return_inverse=True)
    lines = shapely.linestrings(points[used])
    return shapely.buffer(lines, _BUFFER, cap_style="flat", join_style="mitre")[back]


def _average_precision(hits: np.ndarray, truth_count: int) -> float:
    """Area under the monotone precision envelope for hits [predictions] in order of falling score."""
    if truth_count == 0 or len(hits) == 0:
        return 0.0
    found = np.cumsum(hits)
    precision = found / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[hits].sum() / truth_count)  # recall rises by 1 / truth_count at every hit


def _by_class(lines: Sequence[MapLine], token: str, kind: str) -> list[list[MapLine]]:
    groups = [[] for _ in LINE_CLASSES]
    for number, line in enumerate(lines):
        where = f"the {kind} line {number} of sample {token}"
        points = np.asarray(line.points)
        if points.ndim != 2 or points.shape[1] != 2 or len(points) < 2:
            raise DataError(f"{where} has points of shape {points.shape}; a line needs at least two points [P, 2]")
        if not (np.isfinite(points).all() and np.isfinite(line.score)):
            raise DataError(f"{where} holds a point or a score that is not finite; remove the line or fix its source")
        if not 0 <= line.label < len(LINE_CLASSES):
            raise DataError(f"{where} has label {line.label}; it must index {LINE_CLASSES}")
        groups[line.label].append(line)
    return groups


def _check_tokens(predictions: Mapping[str, object], truth: Mapping[str, object]) -> None:
    missing, extra = truth.keys() - predictions.keys(), predictions.keys() - truth.keys()
    if missing:
        raise DataError(
            f"the predictions lack {len(missing)} of {len(truth)} samples, {min(missing)} among them; "
            "give every sample of the split an entry, an empty list where nothing was found"
        )
    if extra:
        raise DataError(
            f"the predictions hold {len(extra)} samples that the truth does not know, {min(extra)} among them; "
            "predict on the same split that is evaluated"
        )
    if not truth:
        raise DataError("there is no sample to evaluate; the split is empty")


def _checked_thresholds(thresholds: Sequence[float]) -> tuple[float, ...]:
    checked = tuple(float(t) for t in thresholds)
    if not checked or not all(0 < t < np.inf for t in checked):
        raise DataError(f"the lane thresholds are {checked}; give at least one distance in metres above 0")
    return checked
