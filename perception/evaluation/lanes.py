"""Average precision of vector lane maps, in both published protocols.

Their numbers are not comparable (docs/evaluation.md), so a result names its protocol:

- `maptr` (VectorMapNet, MapTR): every line is resampled to 100 points by arc length, and two lines are only compared
  where 2 m wide flat-cap buffers around them touch.
- `streammapnet` (StreamMapNet, MapTracker): 200 points, all pairs are compared, thresholds depend on the lane range.

The rest is common. The distance of two lines is the Chamfer distance: the mean of the two directed mean nearest-point
distances. Within a frame and class the predictions are matched in order of falling score. A prediction is a hit if its
closest ground-truth line is within the threshold and not yet matched. AP is the area under the monotone precision
envelope over all predictions of the split; the mean is taken over thresholds, then over the three classes. A class
without ground truth counts as 0, as in the published code.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import shapely
from tqdm import tqdm

from perception.errors import ConfigError, DataError
from perception.evaluation.lane_report import ClassTally, LaneResult, build_result
from perception.types import DEFAULT_LANE_RANGE, LINE_CLASSES, Array, LaneRange, MapLine


@dataclass(frozen=True)
class LaneProtocol:
    """The rules in which the published evaluators differ.

    Args:
        points: of every line after resampling.
        buffer: metres; lines whose buffers of this width do not touch are never compared. None compares all.
        thresholds: metres, per lane range.
        other_thresholds: metres, of all other lane ranges; None if the protocol has no other ranges.
    """

    points: int
    buffer: float | None
    thresholds: dict[LaneRange, tuple[float, ...]]
    other_thresholds: tuple[float, ...] | None


STRICT_THRESHOLDS = (0.2, 0.5, 1.0)
LANE_PROTOCOLS = {
    # MapTR publishes thresholds for 60x30 only; they are used for every range.
    "maptr": LaneProtocol(100, 2.0, {}, (0.5, 1.0, 1.5)),
    "streammapnet": LaneProtocol(
        200, None, {LaneRange(60.0, 30.0): (0.5, 1.0, 1.5), LaneRange(100.0, 50.0): (1.0, 1.5, 2.0)}, None
    ),
}

_PIECE = 0.5  # metres of a ground-truth line that share one position error
_BIN = 10.0  # metres
_CHUNK = 50  # frames of one task of a process
_BLOCK = 4  # pairs of lines whose distances fit into a core's cache


def evaluate_lanes(
    predictions: Mapping[str, Sequence[MapLine]],
    gt: Mapping[str, Sequence[MapLine]],
    *,
    protocol: str = "maptr",
    lane_range: LaneRange = DEFAULT_LANE_RANGE,
    thresholds: Sequence[float] | None = None,
    score_threshold: float | Mapping[str, float] | None = None,
    workers: int = 0,
    progress: bool = False,
) -> LaneResult:
    """Scores predicted lines against the ground truth.

    The result does not depend on the order of frames or on `workers`.

    Lines are not cropped. Give the ground truth of the protocol and the range, see `NuScenesDataset.gt_lines`.

    Args:
        predictions: per frame token the predicted lines, points [P, 2] in ego metres.
        gt: the same tokens with the ground-truth lines.
        protocol: `maptr` or `streammapnet`.
        lane_range: what ground truth and predictions cover. Chooses thresholds and distance bins; StreamMapNet has
            thresholds for 60x30 and 100x50.
        thresholds: metres, instead of the protocol's.
        score_threshold: the lowest score that is used at the operating point, for all classes or per class name; by
            default the score of the best F1 at the middle threshold, for each class.
        workers: processes that share the frames; 0 for this process only. They are spawned, so a script needs
            `if __name__ == "__main__"`.
        progress: show a progress bar on stderr.

    Raises:
        ConfigError: protocol, range, thresholds or score are not possible.
        DataError: the tokens differ, a line has fewer than two points, or a number is not finite.
    """
    rules, thresholds = lane_rules(protocol, lane_range, thresholds)
    scores = _score_thresholds(score_threshold)
    _check_tokens(predictions, gt)
    edges = np.arange(0.0, np.hypot(lane_range.x, lane_range.y) / 2, _BIN)
    threshold_index = thresholds.index(sorted(thresholds)[len(thresholds) // 2])
    # Sorted tokens, so that equal scores are ordered alike whatever the order of the frames.
    tokens = sorted(gt)
    chunks = (
        ([(t, predictions[t], gt[t]) for t in tokens[i : i + _CHUNK]], rules, thresholds, threshold_index, edges)
        for i in range(0, len(tokens), _CHUNK)
    )
    parts = []
    with tqdm(total=len(tokens), desc="lane maps", unit="frame", disable=not progress) as bar:
        for part in _run(chunks, workers):
            parts.append(part)
            bar.update(min(_CHUNK, len(tokens) - bar.n))
    return build_result(
        {name: _of_class(parts, label) for label, name in enumerate(LINE_CLASSES)},
        protocol=protocol,
        lane_range=lane_range,
        thresholds=thresholds,
        threshold_index=threshold_index,
        score_threshold=scores,
        bin_edges=edges.tolist(),
        frames=len(tokens),
    )


class Matches(NamedTuple):
    """How each prediction of one frame was matched, in the order given."""

    hit: Array  # [M, thresholds] bool
    closest: Array  # [M] index of the closest ground-truth line of the class, -1 if none is within the thresholds
    distance: Array  # [M] metres to it, infinite if none


def match_lines(
    predictions: Sequence[MapLine],
    gt: Sequence[MapLine],
    *,
    protocol: str = "maptr",
    lane_range: LaneRange = DEFAULT_LANE_RANGE,
    thresholds: Sequence[float] | None = None,
) -> Matches:
    """Matches the lines of one frame; arguments and errors as in `evaluate_lanes`."""
    rules, thresholds = lane_rules(protocol, lane_range, thresholds)
    packed = (_pack(predictions, "predicted line", "the frame"), _pack(gt, "ground-truth line", "the frame"))
    return _match(*packed, rules, thresholds)


def _chamfer(points_a: Array, points_b: Array, radius: float) -> tuple[Array, Array]:
    """Chamfer distances of pairs of lines, and whether flat-cap buffers of a radius touch for certain.

    The distance is the mean of the two directed mean nearest-point distances. Buffers touch for certain where the point
    of `b` that is closest to some point of `a` is an inner one, and nearer than the radius: the foot of the
    perpendicular then lies on `b` and not beyond its end, where the flat cap cuts the buffer off.

    Args:
        points_a, points_b: [pairs, P, 2] metres.
        radius: metres.

    Returns:
        Distances [pairs] in metres, and whether the buffers touch for certain [pairs] bool.
    """
    pairs, count = points_a.shape[:2]
    distance, touch = np.empty(pairs), np.empty(pairs, dtype=bool)
    squared, across = np.empty((2, min(_BLOCK, pairs), count, count))  # reused: allocation would take half the time
    for start in range(0, pairs, _BLOCK):
        rows = slice(start, start + _BLOCK)
        a, b = points_a[rows], points_b[rows]
        square, side = squared[: len(a)], across[: len(a)]  # [block, P, P]
        np.subtract(a[:, :, None, 0], b[:, None, :, 0], out=square)
        np.multiply(square, square, out=square)
        np.subtract(a[:, :, None, 1], b[:, None, :, 1], out=side)
        np.multiply(side, side, out=side)
        np.add(square, side, out=square)
        ends = np.minimum(square[:, :, 0], square[:, :, -1])  # [block, P]
        inner = square[:, :, 1:-1].min(2, initial=np.inf)  # [block, P]
        a_to_b, b_to_a = np.sqrt(np.minimum(inner, ends)).mean(1), np.sqrt(square.min(1)).mean(1)
        distance[rows] = (a_to_b + b_to_a) / 2
        touch[rows] = (inner < np.minimum(ends, radius * radius)).any(1)
    return distance, touch


class _Packed(NamedTuple):
    """The lines of one frame, end to end on one axis of arc length, to resample all of them at once."""

    label: Array  # [M]
    score: Array  # [M]
    vertices: Array  # [V, 2]
    first: Array  # [M] index of each line's first vertex
    arc: Array  # [V] metres, with a gap between lines
    start: Array  # [M] metres on that axis
    length: Array  # [M] metres

    def points_of(self, line: int) -> Array:
        """Returns the vertices [P, 2] of one line."""
        end = self.first[line + 1] if line + 1 < len(self.first) else None
        return self.vertices[self.first[line] : end]

    def at(self, line: Array, along: Array) -> Array:
        """Returns the points [..., 2] that lie `along` metres from the start of each `line` (index)."""
        arc = self.start[line] + along
        if len(self.arc) == 0:
            return np.zeros((*arc.shape, 2))
        return np.stack([np.interp(arc, self.arc, self.vertices[:, d]) for d in (0, 1)], -1)

    def resample(self, count: int) -> Array:
        """Returns points [M, count, 2], equally spaced by arc length, both ends included."""
        return self.at(np.arange(len(self.label))[:, None], self.length[:, None] * np.linspace(0.0, 1.0, count))


def _pack(lines: Sequence[MapLine], kind: str, where: str) -> _Packed:
    """Checks lines and packs them; `kind` and `where` are for error messages."""
    for number, line in enumerate(lines):
        points = np.asarray(line.points)
        if points.ndim != 2 or points.shape[1] != 2 or len(points) < 2:
            raise DataError(
                f"the {kind} {number} of {where} has points of shape {points.shape}; a line needs at least two [P, 2]"
            )
        if not 0 <= line.label < len(LINE_CLASSES):
            raise DataError(f"the {kind} {number} of {where} has label {line.label}; it must index {LINE_CLASSES}")
    count = np.array([len(line.points) for line in lines], dtype=np.int64)
    vertices = np.concatenate([np.zeros((0, 2)), *(line.points for line in lines)]).astype(np.float64, copy=False)
    score = np.array([line.score for line in lines], dtype=np.float64)
    label = np.array([line.label for line in lines], dtype=np.int64)
    first = np.cumsum(count) - count
    bad = ~np.isfinite(score)
    bad[np.searchsorted(first, np.flatnonzero(~np.isfinite(vertices).all(1)), side="right") - 1] = True
    if bad.any():
        raise DataError(
            f"the {kind} {bad.argmax()} of {where} holds a point or a score that is not finite; "
            "remove the line or fix its source"
        )
    step = np.concatenate([[0.0], np.linalg.norm(np.diff(vertices, axis=0), axis=1)])[: len(vertices)]
    step[first[1:]] = 1.0
    arc = np.cumsum(step)
    start = arc[first]
    return _Packed(label, score, vertices, first, arc, start, arc[first + count - 1] - start)


def _match(predicted: _Packed, gt: _Packed, rules: LaneProtocol, thresholds: tuple[float, ...]) -> Matches:
    hit = np.zeros((len(predicted.label), len(thresholds)), dtype=bool)
    closest, distance = np.full(len(predicted.label), -1), np.full(len(predicted.label), np.inf)
    if len(predicted.label) == 0 or len(gt.label) == 0:
        return Matches(hit, closest, distance)
    distances = _distances(predicted, gt, rules, max(thresholds))  # [M, N]
    nearest = distances.argmin(1)
    distance = distances[np.arange(len(nearest)), nearest]
    closest[np.isfinite(distance)] = nearest[np.isfinite(distance)]
    order = np.argsort(-predicted.score, kind="stable")
    order = order[closest[order] >= 0]
    for k, threshold in enumerate(thresholds):
        near = order[distance[order] <= threshold]
        # Of predictions with the same closest line, the first has the highest score and is the hit.
        hit[near[np.unique(closest[near], return_index=True)[1]], k] = True
    return Matches(hit, closest, distance)


def _distances(predicted: _Packed, gt: _Packed, rules: LaneProtocol, limit: float) -> Array:
    """Distances [M, N]; infinite between classes, beyond `limit`, and where the protocol does not compare.

    A pair beyond the largest threshold is no hit, and it is never closer than a hit. So its exact distance and its
    buffers do not matter, and few pairs are left for the costly steps.
    """
    points_a, points_b = predicted.resample(rules.points), gt.resample(rules.points)
    low_a, high_a, low_b, high_b = points_a.min(1), points_a.max(1), points_b.min(1), points_b.max(1)
    outside = np.maximum(np.maximum(low_b - high_a[:, None], low_a[:, None] - high_b), 0)  # [M, N, 2]
    same = predicted.label[:, None] == gt.label
    distances = np.full(same.shape, np.inf)
    a, b = np.nonzero(same & (np.hypot(outside[..., 0], outside[..., 1]) <= limit))
    # With a margin, so that rounding does not drop a pair exactly at the limit.
    bound = (_to_box(points_a[a], low_b[b], high_b[b]) + _to_box(points_b[b], low_a[a], high_a[a])) / 2
    a, b = a[bound <= limit + 1e-9], b[bound <= limit + 1e-9]
    # The buffer of shapely may be narrower than its width by a hundredth.
    distance, touch = _chamfer(points_a[a], points_b[b], 0.95 * (rules.buffer or 0.0))
    near = distance <= limit
    a, b, distance, touch = a[near], b[near], distance[near], touch[near]
    if rules.buffer is not None:
        touch &= (predicted.length[a] > 0) & (gt.length[b] > 0)  # a point has no buffer
        uncertain = np.flatnonzero(~touch)
        if len(uncertain):
            areas = (_buffers(points_a[a[uncertain]], rules.buffer), _buffers(points_b[b[uncertain]], rules.buffer))
            touch[uncertain] = shapely.intersects(*areas)
        a, b, distance = a[touch], b[touch], distance[touch]
    distances[a, b] = distance
    return distances


def _to_box(points: Array, low: Array, high: Array) -> Array:
    """Mean distance [pairs] of points [pairs, P, 2] to boxes [pairs, 2]: a lower bound of that to any line inside."""
    outside = np.maximum(np.maximum(low[:, None] - points, points - high[:, None]), 0)  # [pairs, P, 2]
    return np.asarray(np.hypot(outside[..., 0], outside[..., 1]).mean(1))


def _buffers(points: Array, width: float) -> Array:
    """The buffers [lines] of lines [lines, P, 2] as the published code makes them; empty for a point."""
    return np.asarray(shapely.buffer(shapely.linestrings(points), width, cap_style="flat", join_style="mitre"))


class _Part(NamedTuple):
    """The tally of a chunk of frames, all classes together; the fields are those of ClassTally."""

    label: Array  # [M]
    score: Array
    hit: Array
    length: Array
    gt_count: Array  # [K]
    gt_metres: Array  # [K, bins]
    owner: Array
    error: Array
    metres: Array
    bin: Array


def _tally(
    frames: Sequence[tuple[str, Sequence[MapLine], Sequence[MapLine]]],
    rules: LaneProtocol,
    thresholds: tuple[float, ...],
    threshold_index: int,
    edges: Array,
) -> _Part:
    rows, count = [], 0
    gt_count, gt_metres = np.zeros(len(LINE_CLASSES), dtype=np.int64), np.zeros((len(LINE_CLASSES), len(edges)))
    for token, predicted_lines, gt_lines in frames:
        predicted = _pack(predicted_lines, "predicted line", f"sample {token}")
        gt = _pack(gt_lines, "ground-truth line", f"sample {token}")
        matches = _match(predicted, gt, rules, thresholds)
        # Equal pieces of the ground-truth lines, each standing for `metres` around its midpoint.
        pieces = np.maximum(np.ceil(gt.length / _PIECE), 1).astype(np.int64)  # [N]
        line = np.repeat(np.arange(len(pieces)), pieces)  # [S]
        metres = gt.length[line] / pieces[line]
        middle = gt.at(line, (np.arange(len(line)) - (np.cumsum(pieces) - pieces)[line] + 0.5) * metres)  # [S, 2]
        bins = np.searchsorted(edges, np.hypot(middle[:, 0], middle[:, 1]), side="right") - 1
        np.add.at(gt_metres, (gt.label[line], bins), metres)
        gt_count += np.bincount(gt.label, minlength=len(LINE_CLASSES))
        pred_idx = np.full(len(pieces), -1)  # [N] the prediction that found each ground-truth line
        hits = np.flatnonzero(matches.hit[:, threshold_index])
        pred_idx[matches.closest[hits]] = hits
        found = np.flatnonzero(pred_idx[line] >= 0)
        owner = pred_idx[line[found]]
        strings = np.full(len(predicted.label), None)  # [M]
        for m in hits:
            strings[m] = shapely.linestrings(predicted.points_of(m))
        error = shapely.distance(shapely.points(middle[found]), strings[owner])
        of_predictions = (predicted.label, predicted.score, matches.hit, predicted.length)
        rows.append((*of_predictions, owner + count, error, metres[found], bins[found].astype(np.int8)))
        count += len(predicted.label)
    label, score, hit, length, owner, error, metres, bins = map(np.concatenate, zip(*rows, strict=True))
    return _Part(label, score, hit, length, gt_count, gt_metres, owner, error, metres, bins)


def _of_class(parts: list[_Part], label: int) -> ClassTally:
    """The tally of one class over all chunks, in their order."""
    fields, count = [], 0
    for part in parts:
        mine = part.label == label
        number = np.cumsum(mine) - 1 + count  # of each prediction among those of its class
        pieces = mine[part.owner]
        of_predictions = (part.score[mine], part.hit[mine], part.length[mine])
        of_pieces = (number[part.owner[pieces]], part.error[pieces], part.metres[pieces], part.bin[pieces])
        fields.append((*of_predictions, *of_pieces))
        count += int(mine.sum())
    score, hit, length, owner, error, metres, bins = map(np.concatenate, zip(*fields, strict=True))
    gt_count = int(sum(part.gt_count[label] for part in parts))
    gt_metres = np.sum([part.gt_metres[label] for part in parts], axis=0)
    return ClassTally(score, hit, length, gt_count, gt_metres, owner, error, metres, bins)


def _run(chunks: Iterator[tuple[Any, ...]], workers: int) -> Iterator[_Part]:
    if workers == 0:
        yield from (_tally(*chunk) for chunk in chunks)
        return
    # Spawned, because a forked process may inherit a lock of a thread that it does not have.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        waiting: deque[Future[_Part]] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_tally, *chunk))
                if len(waiting) > 2 * workers:  # keeps the processes busy with few copies of the lines
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def lane_rules(
    protocol: str, lane_range: LaneRange, thresholds: Sequence[float] | None = None
) -> tuple[LaneProtocol, tuple[float, ...]]:
    """The rules of a protocol and the thresholds (metres) in use; arguments as in `evaluate_lanes`.

    Raises:
        ConfigError: protocol, range or thresholds are not possible.
    """
    if protocol not in LANE_PROTOCOLS:
        raise ConfigError(f"the lane protocol is '{protocol}'; choose one of {', '.join(LANE_PROTOCOLS)}")
    rules = LANE_PROTOCOLS[protocol]
    if thresholds is None:
        thresholds = rules.thresholds.get(lane_range, rules.other_thresholds)
    if thresholds is None:
        ranges = ", ".join(map(str, rules.thresholds))
        raise ConfigError(f"the lane protocol {protocol} has no range {lane_range}; give one of {ranges}")
    checked = tuple(float(t) for t in thresholds)
    if not checked or not all(0 < t < np.inf for t in checked) or len(set(checked)) < len(checked):
        raise ConfigError(f"the lane thresholds are {checked}; give different distances in metres above 0")
    return rules, checked


def _score_thresholds(score: float | Mapping[str, float] | None) -> dict[str, float | None]:
    scores: dict[str, float | None]
    scores = dict(score) if isinstance(score, Mapping) else {name: score for name in LINE_CLASSES}
    if set(scores) != set(LINE_CLASSES):
        raise ConfigError(f"the score thresholds name {sorted(scores)}; give one for each of {LINE_CLASSES}")
    if not all(value is None or np.isfinite(value) for value in scores.values()):
        raise ConfigError(f"the score thresholds are {scores}; give finite numbers")
    return scores


def _check_tokens(predictions: Mapping[str, object], gt: Mapping[str, object]) -> None:
    missing, extra = gt.keys() - predictions.keys(), predictions.keys() - gt.keys()
    if missing:
        raise DataError(
            f"the predictions lack {len(missing)} of {len(gt)} samples, {min(missing)} among them; "
            "give every sample of the split an entry, an empty list where nothing was found"
        )
    if extra:
        raise DataError(
            f"the predictions hold {len(extra)} samples that the ground truth lacks, {min(extra)} among them; "
            "predict on the same split that is evaluated"
        )
    if not gt:
        raise DataError("the split is empty; choose one with samples")
