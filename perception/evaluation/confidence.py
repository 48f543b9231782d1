"""Whether a network knows how sure it can be: scores against precision, uncertainties against errors.

A score of 0.7 should be right seven times in ten. Predictions are sorted into bins by their score; the expected
calibration error is the mean distance between a bin's mean score and its share of right predictions, weighted by the
number of predictions (https://arxiv.org/abs/1706.04599). A box is right where the official detection score calls it so
at 2 m: nobody surer has taken the same true box of its class. A line is right under the rules of the lane protocol at
its middle threshold.

An uncertainty is the scale of a Laplace distribution, so its mean absolute error: half of all errors should be smaller
than log 2 times the uncertainty and nine tenths smaller than log 10 times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch

from perception.errors import DataError
from perception.evaluation.lanes import lane_rules, match_lines
from perception.geometry import wrap_angle
from perception.targets import line_orderings
from perception.types import BOX_CLASSES, DEFAULT_LANE_RANGE, Boxes, FrameObjects, LaneRange, MapLine, Polylines

BOX_THRESHOLD = 2.0  # metres between centres on the ground, at which the official score measures its errors
# Metres from the ego within which the official score counts the boxes of a class.
BOX_RANGE = dict(zip(BOX_CLASSES, (50.0, 50.0, 50.0, 50.0, 50.0, 40.0, 40.0, 40.0, 30.0, 30.0), strict=True))
# Which of the nine numbers of `Boxes.uncertainty` belong together.
BOX_QUANTITIES = {"position m": (0, 1), "height above ground m": (2,), "log size": (3, 4, 5), "yaw rad": (6,),
                  "velocity m/s": (7, 8)}  # fmt: skip


@dataclass(frozen=True)
class Reliability:
    """Scores of one task against how often they are right.

    Args:
        error: the expected calibration error, 0 to 1; NaN without a prediction.
        mean_score, precision: per bin of the score, NaN where the bin is empty.
        count: predictions per bin.
    """

    error: float
    mean_score: tuple[float, ...]
    precision: tuple[float, ...]
    count: tuple[int, ...]


@dataclass(frozen=True)
class UncertaintyCheck:
    """Predicted uncertainty of one quantity against the errors of right predictions.

    Args:
        mean_error: mean absolute error; mean_uncertainty: mean of the uncertainties, which should be the same.
        half, nine_tenths: share of the errors within log 2 and log 10 times their uncertainty; 0.5 and 0.9 if
            calibrated.
        count: number of errors.
    """

    mean_error: float
    mean_uncertainty: float
    half: float
    nine_tenths: float
    count: int


@dataclass(frozen=True)
class CalibrationResult:
    """Of one split.

    Args:
        boxes, lines: reliability of the scores.
        uncertainties: per quantity.
        min_score: predictions below it were left out.
    """

    boxes: Reliability
    lines: Reliability
    uncertainties: dict[str, UncertaintyCheck]
    min_score: float

    def as_dict(self) -> dict:
        """Plain JSON values; what is not a number becomes None."""

        def plain(value):
            if isinstance(value, dict):
                return {key: plain(part) for key, part in value.items()}
            if isinstance(value, list | tuple):
                return [plain(part) for part in value]
            return None if isinstance(value, float) and np.isnan(value) else value

        return plain(asdict(self))

    def table(self) -> str:
        """The result as text for a terminal."""
        bins = len(self.boxes.count)
        edges = [f"{k / bins:.1f}-{(k + 1) / bins:.1f}" for k in range(bins)]
        rows = [
            f"{f'calibration (score >= {self.min_score:g})':<28}" + "".join(f"{e:>9}" for e in edges) + f"{'ECE':>9}"
        ]
        for name, part in (("boxes", self.boxes), ("lines", self.lines)):
            cells = "".join(f"{_cell(p):>9}" for p in part.precision)
            rows.append(f"{f'{name}, share that is right':<28}{cells}{_cell(part.error):>9}")
            rows.append(f"{f'{name}, number':<28}" + "".join(f"{c:9d}" for c in part.count))
        rows.append("")
        heads = ("mean error", "uncertainty", "in 50 %", "in 90 %", "number")
        rows.append(f"{'uncertainty of what is right':<28}" + "".join(f"{h:>11}" for h in heads))
        for name, part in self.uncertainties.items():
            cells = (part.mean_error, part.mean_uncertainty, part.half, part.nine_tenths)
            rows.append(f"{name:<28}" + "".join(f"{_cell(c):>11}" for c in cells) + f"{part.count:11d}")
        return "\n".join(rows)


def evaluate_calibration(
    scenes: Mapping[str, FrameObjects],
    gt: Mapping[str, FrameObjects],
    *,
    protocol: str = "maptr",
    lane_range: LaneRange = DEFAULT_LANE_RANGE,
    min_score: float = 0.05,
    bins: int = 10,
) -> CalibrationResult:
    """Compares scores with precision and uncertainties with errors.

    Args:
        scenes: predictions per sample token, on the CPU, without leading dimensions.
        gt: the same tokens with the true scenes; lines have as many points as the predicted ones.
        protocol, lane_range: of the lanes, as in `evaluate_lanes`.
        min_score: predictions below it are left out. A set of queries has many that mean nothing.
        bins: of equal width.

    Raises:
        ConfigError: protocol or range do not exist.
        DataError: the tokens differ.
    """
    if scenes.keys() != gt.keys():
        raise DataError(
            f"{len(scenes.keys() ^ gt.keys())} samples are in predictions or ground truth only; give both the same ones"
        )
    _, thresholds = lane_rules(protocol, lane_range)
    middle = sorted(thresholds)[len(thresholds) // 2]
    scores, hits = {"boxes": [], "lines": []}, {"boxes": [], "lines": []}
    errors = {name: [] for name in (*BOX_QUANTITIES, "line point m")}  # [n, 2]: absolute error and uncertainty
    for token in sorted(gt):
        found, true = scenes[token], gt[token]
        score, hit, error, uncertainty = _compare_boxes(_usable(found.boxes, min_score), _usable(true.boxes, min_score))
        scores["boxes"].append(score)
        hits["boxes"].append(hit)
        for name, columns in BOX_QUANTITIES.items():
            pairs = np.stack([error[:, columns].ravel(), uncertainty[:, columns].ravel()], 1)
            errors[name].append(pairs[np.isfinite(pairs).all(1)])  # the ground truth may not know a velocity
        score, hit, pairs = _compare_lines(found.lines, true.lines, min_score, protocol, lane_range, middle)
        scores["lines"].append(score)
        hits["lines"].append(hit)
        errors["line point m"].append(pairs)
    return CalibrationResult(
        boxes=_reliability(np.concatenate(scores["boxes"]), np.concatenate(hits["boxes"]), bins),
        lines=_reliability(np.concatenate(scores["lines"]), np.concatenate(hits["lines"]), bins),
        uncertainties={name: _check(np.concatenate(parts)) for name, parts in errors.items()},
        min_score=min_score,
    )


def _usable(boxes: Boxes, min_score: float) -> Boxes:
    """As numpy arrays: what the official score would count of these boxes, best score first."""
    boxes = Boxes(*(field.numpy() for field in boxes))
    limit = np.array(list(BOX_RANGE.values()))[boxes.label]
    keep = boxes.valid & (boxes.score >= min_score) & (np.linalg.norm(boxes.center[:, :2], axis=1) < limit)
    order = np.flatnonzero(keep)
    order = order[np.argsort(-boxes.score[order], kind="stable")]
    return Boxes(*(field[order] for field in boxes))


def _compare_boxes(found: Boxes, true: Boxes) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Score [M] and whether it is right [M] bool; absolute errors and uncertainties [hits, 9] of those that are."""
    distance = np.linalg.norm(found.center[:, None, :2] - true.center[None, :, :2], axis=-1)  # [M, N]
    distance[found.label[:, None] != true.label] = np.inf
    partner = np.full(len(found.label), -1)
    for m in range(len(partner) if len(true.label) else 0):
        nearest = distance[m].argmin()
        if distance[m, nearest] < BOX_THRESHOLD:
            partner[m] = nearest
            distance[:, nearest] = np.inf  # taken
    hit = partner >= 0
    a, b = Boxes(*(field[hit] for field in found)), Boxes(*(field[partner[hit]] for field in true))
    error = np.concatenate(
        [
            a.center - b.center,
            np.log(a.size) - np.log(b.size),
            wrap_angle(a.yaw - b.yaw)[:, None],
            a.velocity - b.velocity,
        ],
        1,
    )
    return found.score, hit, np.abs(error), a.uncertainty


def _compare_lines(
    found: Polylines, true: Polylines, min_score: float, protocol: str, lane_range: LaneRange, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Score [M], whether it is right [M] bool, and [n, 2] absolute errors and uncertainties of the points'
    coordinates."""
    found = Polylines(*(field[found.valid & (found.score >= min_score)] for field in found))
    true = Polylines(*(field[true.valid] for field in true))
    lists = (
        [MapLine(int(k), p.numpy().astype(float), float(s)) for k, p, s in zip(x.label, x.points, x.score, strict=True)]
        for x in (found, true)
    )
    matches = match_lines(*lists, protocol=protocol, lane_range=lane_range, thresholds=(threshold,))
    hit = matches.hit[:, 0]
    pairs = [np.zeros((0, 2))]
    if hit.any():
        orderings, exists = line_orderings(Polylines(*(field[None] for field in true)))  # [1, N, O, P, 2]
        partner = torch.from_numpy(matches.closest[hit])
        error = (found.points[torch.from_numpy(hit)][:, None] - orderings[0, partner]).abs()  # [hits, O, P, 2]
        total = error.sum((2, 3)).masked_fill(~exists[0, partner], torch.inf)
        best = error[torch.arange(len(partner)), total.argmin(1)]
        pairs.append(torch.stack([best, found.uncertainty[torch.from_numpy(hit)]], -1).reshape(-1, 2).numpy())
    return found.score.numpy(), hit, np.concatenate(pairs)


def _reliability(score: np.ndarray, hit: np.ndarray, bins: int) -> Reliability:
    number = np.minimum((score * bins).astype(int), bins - 1)
    count = np.bincount(number, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean_score = np.bincount(number, score, bins) / count
        precision = np.bincount(number, hit, bins) / count
    filled = count > 0
    gap = np.abs(mean_score - precision)[filled]
    error = float((gap * count[filled]).sum() / count.sum()) if filled.any() else float("nan")
    return Reliability(error, tuple(mean_score.tolist()), tuple(precision.tolist()), tuple(count.tolist()))


def _check(pairs: np.ndarray) -> UncertaintyCheck:
    if len(pairs) == 0:
        return UncertaintyCheck(*[float("nan")] * 4, 0)
    error, uncertainty = pairs.T.astype(float)
    within = [float((error < uncertainty * np.log(k)).mean()) for k in (2, 10)]
    return UncertaintyCheck(float(error.mean()), float(uncertainty.mean()), *within, len(pairs))


def _cell(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}"
