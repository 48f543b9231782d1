"""Evaluates a network on a dataset: inference frame after frame with memory, then all metrics.

Needs a network and a dataset, and neither the training engine nor a config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from tqdm import tqdm

from perception.data.loader import pad_boxes, pad_lines
from perception.data.nuscenes import NuScenesDataset
from perception.errors import ConfigError, DataError
from perception.evaluation.confidence import ConfidenceResult, evaluate_confidence
from perception.evaluation.detection import (
    DetectionResult,
    check_counted,
    evaluate_boxes,
    submission_from_predictions,
)
from perception.evaluation.lane_report import LaneResult
from perception.evaluation.lanes import STRICT_THRESHOLDS, evaluate_lanes, lane_rules
from perception.evaluation.stability import StabilityResult, evaluate_stability
from perception.evaluation.submission import map_lines, write_lanes
from perception.extensions import VALIDATION_PARTS, check_parts
from perception.files import write_json
from perception.inference.sequence import Stream, predict_stream
from perception.models.base import InferenceNetwork
from perception.types import Array, Boxes, FrameObjects, LaneRange, MapLine, map_tensors


@dataclass(frozen=True)
class Evaluation:
    """All metrics of one split.

    Args:
        detection: boxes by the official devkit.
        lanes: lines at the published thresholds of the protocol.
        strict_lanes: lines by the same protocol at 0.2, 0.5 and 1.0 m.
        stability: displacement of the same boxes and lines from frame to frame.
        confidence: calibration of scores and uncertainties.
    """

    detection: DetectionResult
    lanes: LaneResult
    strict_lanes: LaneResult
    stability: StabilityResult
    confidence: ConfidenceResult

    def metrics(self) -> dict[str, float]:
        """Returns the headline numbers by name; `score` is the mean of NDS and lane mAP."""
        nds, lane_ap = self.detection.nds, self.lanes.mean_ap
        return {
            "nds": nds,
            "mAP": self.detection.mean_ap,
            **{name: float(error) for name, error in self.detection.errors.items()},
            "lane_mAP": lane_ap,
            "lane_mAP_strict": self.strict_lanes.mean_ap,
            "score": (nds + lane_ap) / 2,
        }

    def as_dict(self) -> dict[str, Any]:
        """Returns headline numbers and all details as plain JSON values."""
        details = {field.name: getattr(self, field.name).as_dict() for field in fields(self)}
        return self.metrics() | details

    def table(self) -> str:
        """Returns all results as text for a terminal."""
        return "\n\n".join(getattr(self, field.name).table() for field in fields(self))


def published_gt(lines: Sequence[MapLine], protocol: str) -> list[MapLine]:
    """Returns ground-truth lines as the published evaluator of a protocol takes them.

    MapTR's evaluator takes the exact vertices. StreamMapNet's takes lines simplified by Douglas-Peucker to 0.2 m, so an
    exact prediction of a curve has a small error there.

    Args:
        lines: of `NuScenesDataset.gt_lines`.
        protocol: `maptr` or `streammapnet`.
    """
    if protocol != "streammapnet":
        return list(lines)
    strings = shapely.simplify([shapely.linestrings(line.points) for line in lines], 0.2, preserve_topology=True)
    return [line._replace(points=shapely.get_coordinates(s)) for line, s in zip(lines, strings, strict=True)]


def all_gt_lines(
    dataset: NuScenesDataset, *, protocol: str = "maptr", lane_range: LaneRange | None = None, progress: bool = False
) -> dict[str, list[MapLine]]:
    """Returns per sample token the ground truth of a protocol and range; the dataset's own range by default.

    Raises:
        ConfigError: the protocol does not exist or has no such range.
        DataError: a map file is missing or malformed.
    """
    lane_range = lane_range or dataset.lane_range
    lane_rules(protocol, lane_range)
    samples = tqdm(dataset.tokens, desc="ground-truth lines", unit="frame", disable=not progress)
    return {t: published_gt(dataset.gt_lines(i, protocol, lane_range), protocol) for i, t in enumerate(samples)}


def evaluate_lines(
    dataset: NuScenesDataset,
    lines: Mapping[str, Sequence[MapLine]],
    *,
    protocol: str = "maptr",
    lane_range: LaneRange | None = None,
    score_threshold: float | None = None,
    workers: int = 0,
    progress: bool = False,
) -> tuple[LaneResult, LaneResult]:
    """Evaluates lines against the dataset's ground truth of a protocol and range.

    Args:
        dataset: with the ground truth.
        lines: predictions per sample token, ego frame.
        lane_range: the dataset's by default.
        protocol, score_threshold, workers, progress: as in `evaluate_lanes`.

    Returns:
        The result at the protocol's own thresholds, and at 0.2, 0.5 and 1.0 m.

    Raises:
        ConfigError, DataError: as `evaluate_lanes`.
    """
    lane_range = lane_range or dataset.lane_range
    gt = all_gt_lines(dataset, protocol=protocol, lane_range=lane_range, progress=progress)
    return _both_thresholds(lines, gt, protocol, lane_range, score_threshold, workers, progress)


def _both_thresholds(
    lines: Mapping[str, Sequence[MapLine]],
    gt: Mapping[str, Sequence[MapLine]],
    protocol: str,
    lane_range: LaneRange,
    score_threshold: float | None,
    workers: int,
    progress: bool,
) -> tuple[LaneResult, LaneResult]:
    """Evaluates at the protocol's own thresholds and at the strict ones."""
    published, strict = (
        evaluate_lanes(
            lines,
            gt,
            protocol=protocol,
            lane_range=lane_range,
            thresholds=thresholds,
            score_threshold=score_threshold,
            workers=workers,
            progress=progress,
        )
        for thresholds in (None, STRICT_THRESHOLDS)
    )
    return published, strict


def evaluate_predictions(
    dataset: NuScenesDataset,
    predictions: Mapping[str, FrameObjects],
    *,
    protocol: str = "maptr",
    lane_range: LaneRange | None = None,
    score_threshold: float | None = None,
    workers: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Evaluates predictions of a dataset.

    Args:
        dataset: of one root.
        predictions: per sample token, on the CPU, without batch dimension.
        lane_range: of the lines; the dataset's by default.
        protocol, score_threshold, workers, progress: of the lines, as in `evaluate_lanes`.

    Raises:
        ConfigError: the dataset has several roots, the official evaluation takes one; or as in `evaluate_lanes`.
        DataError: predictions are missing, or hold numbers that are not finite.
    """
    check_evaluable(dataset)
    lane_range = lane_range or dataset.lane_range
    gt_lines = all_gt_lines(dataset, protocol=protocol, lane_range=lane_range, progress=progress)
    lines = {token: map_lines(objects.lines) for token, objects in predictions.items()}
    poses, tokens, scene_of_sample = ego_poses(dataset), dataset.tokens, dataset.scene_of_sample
    return Evaluation(
        evaluate_boxes(predictions, poses, dataset.roots[0], dataset.version, dataset.split),
        *_both_thresholds(lines, gt_lines, protocol, lane_range, score_threshold, workers, progress),
        evaluate_stability(
            predictions,
            [[tokens[i] for i in np.flatnonzero(scene_of_sample == scene)] for scene in np.unique(scene_of_sample)],
            poses,
            dict(zip(tokens, dataset.timestamps.tolist(), strict=True)),
            lane_range=lane_range,
        ),
        evaluate_confidence(
            predictions,
            {
                token: _ground_truth(dataset.gt_boxes(i), gt_lines[token], predictions[token].lines.points.shape[-2])
                for i, token in enumerate(tokens)
            },
            protocol=protocol,
            lane_range=lane_range,
        ),
    )


def evaluate_dataset(
    model: InferenceNetwork,
    dataset: NuScenesDataset,
    *,
    protocol: str = "maptr",
    lane_range: LaneRange | None = None,
    workers: int = 0,
    progress: bool = False,
) -> tuple[Evaluation, Stream]:
    """Runs a network on a dataset and evaluates its predictions.

    Args:
        model, dataset, workers, progress: as in `predict_stream`.
        protocol, lane_range: as in `evaluate_predictions`.
    """
    check_evaluable(dataset)
    stream = predict_stream(model, dataset, workers=workers, progress=progress)
    evaluation = evaluate_predictions(
        dataset, stream.objects, protocol=protocol, lane_range=lane_range, workers=workers, progress=progress
    )
    return evaluation, stream


def check_evaluable(dataset: NuScenesDataset) -> None:
    """Checks that predictions of a dataset can be evaluated. Call it before long work.

    Raises:
        ConfigError: the dataset has several roots, and the official evaluation takes one; or it is of a class from
            outside the package and lacks something.
        DataError: the split has no box, or every box has 0 LiDAR and radar points; or the dataset is made of infos
            without tables.
    """
    check_parts("the validation dataset", dataset, VALIDATION_PARTS)
    if len(dataset.roots) != 1:
        raise ConfigError(f"the dataset has {len(dataset.roots)} roots; evaluate one root at a time")
    if not dataset.version:
        raise DataError(
            f"the infos in {dataset.roots[0]} have no tables beside them, which the official evaluation reads; put the "
            "folder that metainfo.version names there, or give its root as val_data.dataroot"
        )
    valid = [ok for i in range(len(dataset)) for ok in dataset.gt_boxes(i).valid.int().tolist()]
    check_counted(valid, dataset.roots[0] / dataset.version, dataset.split)


def _ground_truth(boxes: Boxes, lines: Sequence[MapLine], points_per_line: int) -> FrameObjects:
    gt = FrameObjects(pad_boxes([boxes]), pad_lines([lines], points_per_line))
    return map_tensors(lambda tensor: tensor[0], gt)


def save_submissions(directory: str | Path, dataset: NuScenesDataset, predictions: Mapping[str, FrameObjects]) -> None:
    """Writes predictions as `detection.json` and `lanes.json` (see `perception.evaluation.submission`).

    Evaluating the files gives the same numbers as evaluating the predictions.

    Args:
        directory: made if it is missing.
        dataset: with the ego poses.
        predictions: per sample token, without batch dimension.

    Raises:
        DataError: a box holds a number that is not finite.
    """
    boxes = submission_from_predictions(predictions, ego_poses(dataset))
    Path(directory, "lanes.json").unlink(missing_ok=True)  # after an interruption, both files are of one network
    write_json(Path(directory) / "detection.json", boxes, indent=None)
    write_lanes(
        Path(directory) / "lanes.json", {token: map_lines(objects.lines) for token, objects in predictions.items()}
    )


def ego_poses(dataset: NuScenesDataset) -> dict[str, Array]:
    """Returns global_from_ego [4, 4] float64 per sample token."""
    return {token: dataset.ego_pose(i) for i, token in enumerate(dataset.tokens)}
