"""Confidence calibration: scores against precision, uncertainties against errors.

With calibrated scores, seven in ten predictions of score 0.7 are right. Predictions are sorted into bins by their
score. The expected calibration error (ECE) is the mean distance between a bin's mean score and its precision, weighted
by the number of predictions (https://arxiv.org/abs/1706.04599). A box is right where the official detection score
counts it as a true positive at 2 m: no box of higher score has been matched with the same ground-truth box of its
class. A line is right under the rules of the lane protocol at its middle threshold.

An uncertainty is the scale of a Laplace distribution, so its mean absolute error. If it is calibrated, half of all
errors are smaller than log 2 times the uncertainty, and nine tenths are smaller than log 10 times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from perception.errors import DataError
from perception.evaluation.lanes import lane_rules, match_lines
from perception.geometry import wrap_angle
from perception.targets import line_orderings
from perception.types import (
    BOX_CLASSES,
    DEFAULT_LANE_RANGE,
    Array,
    Boxes,
    FrameObjects,
    LaneRange,
    MapLine,
    Polylines,
    map_tensors,
)

BOX_THRESHOLD = 2.0  # metres between centres on the ground, at which the official score measures its errors
# Metres from the ego within which the official score counts the boxes of a class.
BOX_RANGE = dict(zip(BOX_CLASSES, (50.0, 50.0, 50.0, 50.0, 50.0, 40.0, 40.0, 40.0, 30.0, 30.0), strict=True))
# The columns of `Boxes.uncertainty` that are reported together.
BOX_QUANTITIES = {"position m": (0, 1), "height above ground m": (2,), "log size": (3, 4, 5), "yaw rad": (6,),
                  "velocity m/s": (7, 8)}  # fmt: skip
LINE_QUANTITY = "line point m"


@dataclass(frozen=True)
class Reliability:
    """The scores of one task against precision.

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
    """The predicted uncertainty of one quantity against the errors of right predictions.

    Args:
        mean_error: mean absolute error; mean_uncertainty: mean of the uncertainties, equal to it if calibrated.
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
class ConfidenceResult:
    """The confidence calibration of one split.

    Args:
        boxes, lines: reliability of the scores.
        uncertainties: per quantity.
        min_score: predictions below it were left out.
    """

    boxes: Reliability
    lines: Reliability
    uncertainties: dict[str, UncertaintyCheck]
    min_score: float

    def as_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; NaN becomes None."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(part) for key, part in value.items()}
            if isinstance(value, list | tuple):
                return [plain(part) for part in value]
            return None if isinstance(value, float) and np.isnan(value) else value

        return {key: plain(value) for key, value in asdict(self).items()}

    def table(self) -> str:
        """Returns the result as text for a terminal."""
        bins = len(self.boxes.count)
        edges = [f"{k / bins:.1f}-{(k + 1) / bins:.1f}" for k in range(bins)]
        rows = [
            f"{f'confidence (score >= {self.min_score:g})':<28}" + "".join(f"{e:>9}" for e in edges) + f"{'ECE':>9}"
        ]
        for name, part in (("boxes", self.boxes), ("lines", self.lines)):
            cells = "".join(f"{_cell(p):>9}" for p in part.precision)
            rows.append(f"{f'{name}, precision':<28}{cells}{_cell(part.error):>9}")
            rows.append(f"{f'{name}, number':<28}" + "".join(f"{c:9d}" for c in part.count))
        rows.append("")
        heads = ("mean error", "uncertainty", "in 50 %", "in 90 %", "number")
        rows.append(f"{'uncertainty of matches':<28}" + "".join(f"{h:>13}" for h in heads))
        for name, check in self.uncertainties.items():
            values = (check.mean_error, check.mean_uncertainty, check.half, check.nine_tenths)
            rows.append(f"{name:<28}" + "".join(f"{_cell(v):>13}" for v in values) + f"{check.count:13d}")
        return "\n".join(rows)


def evaluate_confidence(
    predictions: Mapping[str, FrameObjects],
    gt: Mapping[str, FrameObjects],
    *,
    protocol: str = "maptr",
    lane_range: LaneRange = DEFAULT_LANE_RANGE,
    min_score: float = 0.05,
    bins: int = 10,
) -> ConfidenceResult:
    """Compares scores with precision and uncertainties with errors.

    Args:
        predictions: per sample token, on the CPU, without leading dimensions.
        gt: ground truth of the same tokens, its lines of the protocol and range; lines have as many points as the
            predicted ones.
        protocol, lane_range: of the lanes, as in `evaluate_lanes`.
        min_score: predictions below it are left out. Most queries of a network are background.
        bins: of equal width.

    Raises:
        ConfigError: the protocol does not exist or has no such range.
        DataError: the tokens differ.
    """
    if predictions.keys() != gt.keys():
        alone = len(predictions.keys() ^ gt.keys())
        raise DataError(f"{alone} samples are in predictions or ground truth only; give both the same ones")
    _, thresholds = lane_rules(protocol, lane_range)
    middle = sorted(thresholds)[len(thresholds) // 2]
    scores: dict[str, list[Array]] = {"boxes": [], "lines": []}
    hits: dict[str, list[Array]] = {"boxes": [], "lines": []}
    # [n, 2] each: absolute error and uncertainty.
    errors: dict[str, list[Array]] = {name: [] for name in (*BOX_QUANTITIES, LINE_QUANTITY)}
    for token in sorted(gt):
        predicted, target = predictions[token], gt[token]
        score, hit, error, uncertainty = _compare_boxes(
            _countable(predicted.boxes, min_score), _countable(target.boxes, min_score)
        )
        scores["boxes"].append(score)
        hits["boxes"].append(hit)
        for name, columns in BOX_QUANTITIES.items():
            pairs = np.stack([error[:, columns].ravel(), uncertainty[:, columns].ravel()], 1)
            errors[name].append(pairs[np.isfinite(pairs).all(1)])  # the ground truth may lack a velocity
        score, hit, pairs = _compare_lines(predicted.lines, target.lines, min_score, protocol, lane_range, middle)
        scores["lines"].append(score)
        hits["lines"].append(hit)
        errors[LINE_QUANTITY].append(pairs)
    return ConfidenceResult(
        boxes=_reliability(np.concatenate(scores["boxes"]), np.concatenate(hits["boxes"]), bins),
        lines=_reliability(np.concatenate(scores["lines"]), np.concatenate(hits["lines"]), bins),
        uncertainties={name: _check(np.concatenate(parts)) for name, parts in errors.items()},
        min_score=min_score,
    )


def _countable(boxes: Boxes, min_score: float) -> Boxes:
    """The boxes [M, ...] that the official score would count, best score first."""
    limit = torch.tensor(list(BOX_RANGE.values()))[boxes.label]
    keep = boxes.valid & (boxes.score >= min_score) & (boxes.center[:, :2].norm(dim=1) < limit)
    order = keep.nonzero()[:, 0]
    order = order[(-boxes.score[order]).argsort(stable=True)]
    return map_tensors(lambda tensor: tensor[order], boxes)


def _compare_boxes(predicted: Boxes, gt: Boxes) -> tuple[Array, Array, Array, Array]:
    """Matches boxes [M, ...] with the ground truth [N, ...].

    Returns:
        Score [M] and whether the box is right [M] bool; absolute errors and uncertainties [hits, 9] of right boxes.
    """
    distance = np.linalg.norm(predicted.center.numpy()[:, None, :2] - gt.center.numpy()[None, :, :2], axis=-1)  # [M, N]
    distance[(predicted.label[:, None] != gt.label).numpy()] = np.inf
    gt_idx = np.full(len(predicted.label), -1)
    for m in range(len(gt_idx) if len(gt.label) else 0):
        nearest = distance[m].argmin()
        if distance[m, nearest] < BOX_THRESHOLD:
            gt_idx[m] = nearest
            distance[:, nearest] = np.inf  # taken
    hit = gt_idx >= 0
    a = map_tensors(lambda tensor: tensor[torch.from_numpy(hit)], predicted)
    b = map_tensors(lambda tensor: tensor[torch.from_numpy(gt_idx[hit])], gt)
    error = np.concatenate(
        [
            (a.center - b.center).numpy(),
            np.log(a.size.numpy()) - np.log(b.size.numpy()),
            wrap_angle((a.yaw - b.yaw).numpy())[:, None],
            (a.velocity - b.velocity).numpy(),
        ],
        1,
    )
    return predicted.score.numpy(), hit, np.abs(error), a.uncertainty.numpy()


def _compare_lines(
    predicted: Polylines, gt: Polylines, min_score: float, protocol: str, lane_range: LaneRange, threshold: float
) -> tuple[Array, Array, Array]:
    """Matches lines [M, ...] with the ground truth [N, ...].

    Returns:
        Score [M], whether the line is right [M] bool, and [n, 2] absolute errors and uncertainties of the coordinates
        of the points of right lines.
    """
    used = predicted.valid & (predicted.score >= min_score)
    predicted = map_tensors(lambda tensor: tensor[used], predicted)
    gt = map_tensors(lambda tensor: tensor[gt.valid], gt)
    matches = match_lines(
        *(
            [
                MapLine(int(label), points.numpy().astype(float), float(score))
                for label, points, score in zip(lines.label, lines.points, lines.score, strict=True)
            ]
            for lines in (predicted, gt)
        ),
        protocol=protocol,
        lane_range=lane_range,
        thresholds=(threshold,),
    )
    hit = matches.hit[:, 0]
    pairs = [np.zeros((0, 2))]
    if hit.any():
        orderings, exists = line_orderings(map_tensors(lambda tensor: tensor[None], gt))  # [1, N, O, P, 2]
        gt_idx = torch.from_numpy(matches.closest[hit])
        error = (predicted.points[torch.from_numpy(hit)][:, None] - orderings[0, gt_idx]).abs()  # [hits, O, P, 2]
        total = error.sum((2, 3)).masked_fill(~exists[0, gt_idx], torch.inf)
        best = error[torch.arange(len(gt_idx)), total.argmin(1)]
        pairs.append(torch.stack([best, predicted.uncertainty[torch.from_numpy(hit)]], -1).reshape(-1, 2).numpy())
    return predicted.score.numpy(), hit, np.concatenate(pairs)


def _reliability(score: Array, hit: Array, bins: int) -> Reliability:
    number = np.minimum((score * bins).astype(int), bins - 1)
    count = np.bincount(number, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean_score = np.bincount(number, score, bins) / count
        precision = np.bincount(number, hit, bins) / count
    filled = count > 0
    gap = np.abs(mean_score - precision)[filled]
    error = float((gap * count[filled]).sum() / count.sum()) if filled.any() else float("nan")
    return Reliability(error, tuple(mean_score.tolist()), tuple(precision.tolist()), tuple(count.tolist()))


def _check(pairs: Array) -> UncertaintyCheck:
    if len(pairs) == 0:
        return UncertaintyCheck(np.nan, np.nan, np.nan, np.nan, 0)
    error, uncertainty = pairs.T.astype(float)
    half, nine_tenths = (float((error < uncertainty * np.log(k)).mean()) for k in (2, 10))
    return UncertaintyCheck(float(error.mean()), float(uncertainty.mean()), half, nine_tenths, len(pairs))


def _cell(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}"
