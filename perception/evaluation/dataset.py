"""Predicting and evaluating a dataset the way a vehicle sees it: frame after frame, with memory.

Needs neither the training engine nor a config: a network and a dataset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import shapely
from tqdm import tqdm

from perception.data.loader import pad_boxes, pad_lines
from perception.data.nuscenes import NuScenesDataset
from perception.errors import ConfigError
from perception.evaluation.confidence import CalibrationResult, evaluate_calibration
from perception.evaluation.detection import DetectionResult, evaluate_boxes, submission_from_scenes
from perception.evaluation.lanes import STRICT_THRESHOLDS, LaneResult, evaluate_lanes, lane_rules
from perception.evaluation.stability import StabilityResult, evaluate_stability
from perception.evaluation.submission import map_lines, write_lanes
from perception.files import write_json
from perception.inference.sequence import Stream, predict_stream
from perception.models import Network
from perception.types import Boxes, FrameObjects, LaneRange, MapLine, map_tensors


@dataclass(frozen=True)
class Evaluation:
    """Boxes and lines of one split against the ground truth.

    Args:
        detection: by the official devkit.
        lanes: at the thresholds that the protocol publishes.
        strict_lanes: by the same protocol at 0.2, 0.5 and 1.0 m.
        stability: displacement of the same boxes and lines from frame to frame; needs no truth.
        calibration: scores against precision, uncertainties against errors.
    """

    detection: DetectionResult
    lanes: LaneResult
    strict_lanes: LaneResult
    stability: StabilityResult
    calibration: CalibrationResult

    def metrics(self) -> dict[str, float]:
        """The headline numbers by name; `score` is the mean of NDS and lane mAP."""
        nds, lane_map = self.detection.nds, self.lanes.mean_ap
        return {
            "nds": nds,
            "mAP": self.detection.mean_ap,
            **{name: float(error) for name, error in self.detection.errors.items()},
            "lane_mAP": lane_map,
            "lane_mAP_strict": self.strict_lanes.mean_ap,
            "score": (nds + lane_map) / 2,
        }

    def as_dict(self) -> dict:
        """Headline numbers and all details as plain JSON values."""
        details = {field.name: getattr(self, field.name).as_dict() for field in fields(self)}
        return self.metrics() | details

    def table(self) -> str:
        """All of it as text for a terminal."""
        return "\n\n".join(getattr(self, field.name).table() for field in fields(self))


def published_gt(lines: Sequence[MapLine], protocol: str) -> list[MapLine]:
    """True lines in the form that a published evaluator compares with.

    MapTR's takes the exact vertices. StreamMapNet's takes lines simplified by Douglas and Peucker's method to 0.2 m, so
    even a perfect prediction of a curve is a little off there.
    """
    if protocol != "streammapnet":
        return list(lines)
    strings = shapely.simplify([shapely.linestrings(line.points) for line in lines], 0.2, preserve_topology=True)
    return [line._replace(points=shapely.get_coordinates(s)) for line, s in zip(lines, strings, strict=True)]


def all_gt_lines(
    dataset: NuScenesDataset, *, protocol: str = "maptr", lane_range: LaneRange | None = None, progress: bool = False
) -> dict[str, list[MapLine]]:
    """Per sample token of a dataset the lines that the published evaluator of a protocol compares with.

    Raises:
        ConfigError: the protocol does not exist or has no such range.
        DataError: a map file has gone or is malformed.
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
    """Compares lines with the dataset's true ones, as the published evaluator of the protocol has them.

    Args:
        dataset: of whose samples the lines are.
        lines: per sample token, ego frame.
        protocol, lane_range, score_threshold, workers, progress: as in `evaluate_lanes`.

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
    """The results at the protocol's own thresholds and at the strict ones."""
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


def evaluate_scenes(
    dataset: NuScenesDataset,
    scenes: dict[str, FrameObjects],
    *,
    protocol: str = "maptr",
    lane_range: LaneRange | None = None,
    score_threshold: float | None = None,
    workers: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Compares a FrameObjects per sample token of a dataset with its truth.

    Args:
        dataset: of one root.
        scenes: per sample token, without batch dimension.
        protocol, lane_range, score_threshold, workers, progress: of the lanes, as in `evaluate_lanes`.

    Raises:
        ConfigError: the dataset was made from several roots; the official evaluation knows one.
        DataError: scenes are missing, or hold numbers that are not finite.
    """
    if len(dataset.roots) != 1:
        raise ConfigError(f"the dataset has {len(dataset.roots)} roots; evaluate one root at a time")
    lane_range = lane_range or dataset.lane_range
    gt_lines = all_gt_lines(dataset, protocol=protocol, lane_range=lane_range, progress=progress)
    lines = {token: map_lines(scene.lines) for token, scene in scenes.items()}
    poses, tokens, scene_of_sample = ego_poses(dataset), dataset.tokens, dataset.scene_of_sample
    return Evaluation(
        evaluate_boxes(scenes, poses, dataset.roots[0], dataset.version, dataset.split),
        *_both_thresholds(lines, gt_lines, protocol, lane_range, score_threshold, workers, progress),
        evaluate_stability(
            scenes,
            [[tokens[i] for i in np.flatnonzero(scene_of_sample == scene)] for scene in np.unique(scene_of_sample)],
            poses,
            dict(zip(tokens, dataset.timestamps.tolist(), strict=True)),
            lane_range=lane_range,
        ),
        evaluate_calibration(
            scenes,
            {
                token: _ground_truth(dataset.gt_boxes(i), gt_lines[token], scenes[token].lines.points.shape[-2])
                for i, token in enumerate(tokens)
            },
            protocol=protocol,
            lane_range=lane_range,
        ),
    )


def evaluate_dataset(
    model: Network,
    dataset: NuScenesDataset,
    *,
    protocol: str = "maptr",
    lane_range: LaneRange | None = None,
    workers: int = 0,
    progress: bool = False,
) -> tuple[Evaluation, Stream]:
    """Runs a network on a dataset and evaluates what it predicts.

    Args:
        model, dataset, workers, progress: as in `predict_stream`.
        protocol, lane_range: as in `evaluate_scenes`.
    """
    stream = predict_stream(model, dataset, workers=workers, progress=progress)
    return evaluate_scenes(dataset, stream.objects, protocol=protocol, lane_range=lane_range, workers=workers), stream


def _ground_truth(boxes: Boxes, lines: Sequence[MapLine], points_per_line: int) -> FrameObjects:
    gt = FrameObjects(pad_boxes([boxes]), pad_lines([lines], points_per_line))
    return map_tensors(lambda tensor: tensor[0], gt)


def save_submissions(directory: str | Path, dataset: NuScenesDataset, scenes: dict[str, FrameObjects]) -> None:
    """Writes `detection.json` and `lanes.json`, which score what the scenes score (see `evaluation.submission`).

    Args:
        directory: is made where it is missing.
        dataset: of whose samples the scenes are.
        scenes: per sample token, without batch dimension.

    Raises:
        DataError: a box holds a number that is not finite.
    """
    boxes = submission_from_scenes(scenes, ego_poses(dataset))
    write_json(Path(directory) / "detection.json", boxes, indent=None)
    write_lanes(Path(directory) / "lanes.json", {token: map_lines(scene.lines) for token, scene in scenes.items()})


def ego_poses(dataset: NuScenesDataset) -> dict[str, np.ndarray]:
    """global_from_ego [4, 4] per sample token."""
    return {token: dataset.ego_pose(i) for i, token in enumerate(dataset.tokens)}
