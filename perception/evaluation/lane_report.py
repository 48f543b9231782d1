"""The results of a lane-map evaluation: AP, and position errors at an operating point.

AP compares networks over all score thresholds. Live use takes one score threshold, and needs to know what is found at
that threshold, how accurately, at which distance, and how many metres are false. `LaneResult` holds both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from perception.types import LINE_CLASSES, Array, LaneRange


@dataclass(frozen=True)
class DistanceBin:
    """The ground truth of one class whose pieces lie between two distances from the ego origin.

    Args:
        near, far: metres; `far` is None for the last bin, which is open.
        metres_per_frame: length of ground-truth lines in the bin.
        recall: share of that length that belongs to matched lines at the operating point; None without ground truth.
        error, median_error: position error of the matched length, metres; None without any.
    """

    near: float
    far: float | None
    metres_per_frame: float
    recall: float | None
    error: float | None
    median_error: float | None


@dataclass(frozen=True)
class OperatingPoint:
    """One class at a score threshold.

    A prediction is right or wrong by the protocol's matching at `LaneResult.operating_threshold`. The position error is
    measured along the ground truth: every matched ground-truth line is cut into equal pieces of at most 0.5 m, and the
    error of a piece is the distance from its midpoint to the predicted line (to its segments, not to its vertices).
    Means and medians weigh pieces by their length. A piece belongs to the distance bin of its midpoint, so one line may
    count in several bins.

    Args:
        score: the score threshold; None without a prediction.
        precision, recall, f1: of whole lines; None without a prediction, or without ground truth.
        error, median_error: position error of matched lines, metres; None without any.
        false_metres_per_frame: length of the wrong predictions, metres per frame.
        bins: from near to far.
    """

    score: float | None
    precision: float | None
    recall: float | None
    f1: float | None
    error: float | None
    median_error: float | None
    false_metres_per_frame: float
    bins: tuple[DistanceBin, ...]


@dataclass(frozen=True)
class LaneResult:
    """Lane-map scores of one split under one protocol.

    Args:
        protocol: the published protocol of the numbers.
        lane_range: of ground truth and predictions.
        thresholds: distances in metres.
        ap: AP per class name and threshold.
        class_ap: mean of `ap` over the thresholds, per class name.
        mean_ap: mean of `class_ap` over all line classes.
        frames: number of frames.
        gt_count, prediction_count: number of lines per class name.
        operating_threshold: metres at which `operating_points` count a prediction as right: the middle one.
        operating_points: per class name.
    """

    protocol: str
    lane_range: LaneRange
    thresholds: tuple[float, ...]
    ap: dict[str, dict[float, float]]
    class_ap: dict[str, float]
    mean_ap: float
    frames: int
    gt_count: dict[str, int]
    prediction_count: dict[str, int]
    operating_threshold: float
    operating_points: dict[str, OperatingPoint]

    def as_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; thresholds are strings where they are keys."""
        return {
            "protocol": self.protocol,
            "lane_range": str(self.lane_range),
            "thresholds_m": list(self.thresholds),
            "mean_ap": self.mean_ap,
            "class_ap": dict(self.class_ap),
            "ap": {name: {str(t): value for t, value in row.items()} for name, row in self.ap.items()},
            "frames": self.frames,
            "gt_count": dict(self.gt_count),
            "prediction_count": dict(self.prediction_count),
            "operating_threshold_m": self.operating_threshold,
            "operating_points": {name: asdict(point) for name, point in self.operating_points.items()},
        }

    def table(self) -> str:
        """Returns the result as text for a terminal."""
        return "\n\n".join([self._ap_table(), self._operating_table(), self._distance_table()])

    def _ap_table(self) -> str:
        title = f"lane AP ({self.protocol} {self.lane_range})"
        rows = [f"{title:<30}" + "".join(f"{t:>7g} m" for t in self.thresholds)]
        rows[0] += f"{'mean':>9}{'gt':>8}{'pred.':>8}"
        for name, row in self.ap.items():
            cells = "".join(f"{row[t]:9.3f}" for t in self.thresholds)
            counts = f"{self.gt_count[name]:8d}{self.prediction_count[name]:8d}"
            rows.append(f"{name:<30}{cells}{self.class_ap[name]:9.3f}{counts}")
        means = "".join(f"{np.mean([row[t] for row in self.ap.values()]):9.3f}" for t in self.thresholds)
        total = f"{sum(self.gt_count.values()):8d}{sum(self.prediction_count.values()):8d}"
        rows.append(f"{'mean':<30}{means}{self.mean_ap:9.3f}{total}")
        return "\n".join(rows)

    def _operating_table(self) -> str:
        heads = ("score", "prec.", "recall", "F1", "error m", "median m", "false m/f")
        rows = [f"{f'operating point at {self.operating_threshold:g} m':<30}" + "".join(f"{h:>10}" for h in heads)]
        for name, point in self.operating_points.items():
            fields = (point.score, point.precision, point.recall, point.f1, point.error, point.median_error)
            cells = "".join(f"{_cell(value):>10}" for value in fields)
            rows.append(f"{name:<30}{cells}{point.false_metres_per_frame:10.1f}")
        return "\n".join(rows)

    def _distance_table(self) -> str:
        bins = next(iter(self.operating_points.values())).bins
        ranges = [f"{b.near:g}-{b.far:g} m" if b.far is not None else f"{b.near:g}+ m" for b in bins]
        rows = [f"{'by distance from the ego':<30}" + "".join(f"{r:>10}" for r in ranges)]
        for field, title in (("recall", "recall by metre"), ("error", "error m")):
            for name, point in self.operating_points.items():
                cells = "".join(f"{_cell(getattr(b, field)):>10}" for b in point.bins)
                rows.append(f"{f'{name}, {title}':<30}{cells}")
        return "\n".join(rows)


class ClassTally(NamedTuple):
    """The matches of one class over all frames: M predictions, S pieces of matched ground-truth lines."""

    score: Array  # [M]
    hit: Array  # [M, thresholds] bool
    length: Array  # [M] metres
    gt_count: int
    gt_metres: Array  # [bins] metres of ground-truth lines
    owner: Array  # [S] index of the prediction that the piece is matched with
    error: Array  # [S] metres
    metres: Array  # [S] length of the piece
    bin: Array  # [S] index of its distance bin


def build_result(
    tallies: Mapping[str, ClassTally],
    *,
    protocol: str,
    lane_range: LaneRange,
    thresholds: tuple[float, ...],
    threshold_index: int,
    score_threshold: Mapping[str, float | None],
    bin_edges: Sequence[float],
    frames: int,
) -> LaneResult:
    """Computes the result from the matches of all frames.

    Args:
        tallies: per class name, in the order of LINE_CLASSES.
        protocol, lane_range, thresholds, frames: as in `LaneResult`.
        threshold_index: of the threshold of the operating points.
        score_threshold: per class name; None for the score of the best F1.
        bin_edges: metres; the last bin begins at the last edge and is open.
    """
    ap = {}
    for name, tally in tallies.items():
        order = np.argsort(-tally.score, kind="stable")
        columns = tally.hit[order].T
        ap[name] = {t: _average_precision(hit, tally.gt_count) for t, hit in zip(thresholds, columns, strict=True)}
    class_ap = {name: float(np.mean(list(row.values()))) for name, row in ap.items()}
    return LaneResult(
        protocol=protocol,
        lane_range=lane_range,
        thresholds=thresholds,
        ap=ap,
        class_ap=class_ap,
        mean_ap=float(np.mean([class_ap[name] for name in LINE_CLASSES])),
        frames=frames,
        gt_count={name: tally.gt_count for name, tally in tallies.items()},
        prediction_count={name: len(tally.score) for name, tally in tallies.items()},
        operating_threshold=thresholds[threshold_index],
        operating_points={
            name: _operating_point(tally, tally.hit[:, threshold_index], score_threshold[name], bin_edges, frames)
            for name, tally in tallies.items()
        },
    )


def _average_precision(hits: Array, gt_count: int) -> float:
    """Computes the area under the monotone precision envelope of hits [M] in order of falling score."""
    if gt_count == 0 or len(hits) == 0:
        return 0.0
    found = np.cumsum(hits)
    precision = found / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[hits].sum() / gt_count)  # recall rises by 1 / gt_count at every hit


def _best_score(score: Array, hit: Array, gt_count: int) -> float | None:
    """Finds the score threshold of the best F1; of equals the highest.

    Without a hit it is the lowest score, so that all false predictions are counted. Without a prediction it is None.
    """
    if len(score) == 0:
        return None
    if not hit.any():
        return float(score.min())
    order = np.argsort(-score, kind="stable")
    score, used = score[order], np.arange(1, len(score) + 1)
    f1 = 2 * np.cumsum(hit[order]) / (used + gt_count)
    f1[:-1][score[:-1] == score[1:]] = 0.0  # a threshold keeps all predictions of its score
    return float(score[f1.argmax()])


def _operating_point(
    tally: ClassTally, hit: Array, score: float | None, edges: Sequence[float], frames: int
) -> OperatingPoint:
    if score is None:
        score = _best_score(tally.score, hit, tally.gt_count)
    used = tally.score >= score if score is not None else np.zeros(0, dtype=bool)
    found, count, gt = int((hit & used).sum()), int(used.sum()), tally.gt_count
    pieces = used[tally.owner]
    error, metres, bins = tally.error[pieces], tally.metres[pieces], tally.bin[pieces]
    mean, median = _weighted(error, metres)
    rows = []
    for k, near in enumerate(edges):
        inside = bins == k
        total = float(tally.gt_metres[k])
        rows.append(
            DistanceBin(
                float(near),
                float(edges[k + 1]) if k + 1 < len(edges) else None,
                total / frames,
                min(float(metres[inside].sum() / total), 1.0) if total > 0 else None,
                *_weighted(error[inside], metres[inside]),
            )
        )
    return OperatingPoint(
        score=score,
        precision=found / count if count else None,
        recall=found / gt if gt else None,
        f1=2 * found / (count + gt) if count and gt else None,
        error=mean,
        median_error=median,
        false_metres_per_frame=float(tally.length[used & ~hit].sum() / frames),
        bins=tuple(rows),
    )


def _weighted(values: Array, weights: Array) -> tuple[float | None, float | None]:
    """Computes the weighted mean and median; None for both without any weight."""
    total = weights.sum()
    if not total > 0:
        return None, None
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order]) / total
    # At exactly one half the median is the mean of two values; the margin keeps rounding from deciding.
    middle = np.searchsorted(reached, [0.5 - 1e-9, 0.5 + 1e-9])
    return float((values * weights).sum() / total), float(values[order[middle]].mean())


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
