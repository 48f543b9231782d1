"""Predicting and evaluating a dataset the way a vehicle sees it: frame after frame, with memory.

Needs neither the training engine nor a config: a network and a dataset.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import shapely
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from perception.data.loader import SceneStreamSampler, collate, pad_boxes, pad_lines
from perception.data.nuscenes import NuScenesDataset
from perception.errors import ConfigError
from perception.evaluation.calibration import CalibrationResult, evaluate_calibration
from perception.evaluation.detection import DetectionResult, evaluate_detection, submission_from_scenes
from perception.evaluation.lanes import LANE_EXTENTS, STRICT_THRESHOLDS, LaneResult, evaluate_lanes, lane_rules
from perception.evaluation.stability import StabilityResult, evaluate_stability
from perception.evaluation.submission import write_lanes
from perception.files import write_json
from perception.models.bev_transformer import BEVTransformer
from perception.types import Clip, Frame, FrameObjects, MapLine, Polylines, map_tensors

# What goes wrong in a stream: takes frames with leading [1, 1], the number of their scene and of their sample.
Disturbance = Callable[[Frame, int, int], Frame]


class Stream(NamedTuple):
    """What a network made of a dataset."""

    scenes: dict[str, FrameObjects]  # per sample token, on the CPU, without a batch dimension
    seconds_per_frame: float  # network and decoding, without the loading of images; the first frame is left out


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


def map_lines(lines: Polylines) -> list[MapLine]:
    """The valid lines of one frame (no leading dimension) as a list."""
    label, score, points = (x[lines.valid].cpu().numpy() for x in (lines.label, lines.score, lines.points))
    return [MapLine(int(k), p.astype(np.float64), float(s)) for k, p, s in zip(label, points, score, strict=True)]


@torch.inference_mode()
def run_sequence(model: BEVTransformer, clips: Iterable[Clip]) -> Iterator[tuple[Clip, FrameObjects, float]]:
    """Runs a network over one frame after the other and hands its memory on; a first frame of a scene starts afresh.

    Args:
        model: in evaluation mode.
        clips: [B=1, T=1] each, in time order.

    Yields:
        Each clip, the FrameObjects without leading dimensions on the CPU, and the seconds for network and decoding.
    """
    device = next(model.parameters()).device
    state = model.initial_state(1)
    for clip in clips:
        frame = map_tensors(lambda tensor: tensor[:, 0].to(device), clip.frames)
        start = _now(device)
        prediction, state = model(frame, state)
        scene = model.decode(prediction)
        seconds = _now(device) - start
        yield clip, map_tensors(lambda tensor: tensor[0].cpu(), scene), seconds


def predict_stream(
    model: BEVTransformer,
    dataset: NuScenesDataset,
    *,
    disturb: Disturbance | None = None,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    progress: bool = False,
) -> Stream:
    """Runs a network over a dataset scene by scene, one frame at a time, on the device of its weights.

    Args:
        model: in evaluation mode.
        dataset: whose scenes are streamed.
        disturb: changes every frame before the network sees it, in the process that loads the images.
        rank, world_size: where several processes share the work, each takes its share of whole scenes.
        workers: processes that load images.
        progress: show a progress bar on stderr.

    Raises:
        DataError: an image or a calibration is missing or malformed.
    """
    sampler = SceneStreamSampler(dataset.scene_of_sample, rank, world_size)
    together = collate if disturb is None else partial(_disturbed, disturb, dataset.scene_of_sample)
    loader = DataLoader(dataset, batch_size=1, sampler=sampler, collate_fn=together, num_workers=workers)
    tokens = dataset.tokens
    scenes, seconds = {}, []
    clips = tqdm(loader, desc="frames", unit="frame", disable=not progress)
    for clip, scene, spent in run_sequence(model, clips):
        scenes[tokens[int(clip.sample_index)]] = scene
        seconds.append(spent)
    return Stream(scenes, float(np.mean(seconds[1:] or seconds or [np.nan])))


def _disturbed(disturb: Disturbance, scene_of_sample: np.ndarray, clips: list[Clip]) -> Clip:
    clip = collate(clips)
    sample = int(clip.sample_index)
    return clip._replace(frames=disturb(clip.frames, int(scene_of_sample[sample]), sample))


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
    dataset: NuScenesDataset, *, protocol: str = "maptr", extent: str = "60x30", progress: bool = False
) -> dict[str, list[MapLine]]:
    """Per sample token of a dataset the lines that the published evaluator of a protocol compares with.

    Raises:
        ConfigError: protocol or extent do not exist.
        DataError: a map file has gone or is malformed.
    """
    lane_rules(protocol, extent)
    size = LANE_EXTENTS[extent]
    samples = tqdm(dataset.tokens, desc="ground-truth lines", unit="frame", disable=not progress)
    return {t: published_gt(dataset.gt_lines(i, protocol, size), protocol) for i, t in enumerate(samples)}


def evaluate_lines(
    dataset: NuScenesDataset,
    lines: Mapping[str, Sequence[MapLine]],
    *,
    protocol: str = "maptr",
    extent: str = "60x30",
    score_threshold: float | None = None,
    workers: int = 0,
    progress: bool = False,
) -> tuple[LaneResult, LaneResult]:
    """Compares lines with the dataset's true ones, as the published evaluator of the protocol has them.

    Args:
        dataset: of whose samples the lines are.
        lines: per sample token, ego frame.
        protocol, extent, score_threshold, workers, progress: as in `evaluate_lanes`.

    Returns:
        The result at the protocol's own thresholds, and at 0.2, 0.5 and 1.0 m.

    Raises:
        ConfigError, DataError: as `evaluate_lanes`.
    """
    gt = all_gt_lines(dataset, protocol=protocol, extent=extent, progress=progress)
    published, strict = (
        evaluate_lanes(
            lines,
            gt,
            protocol=protocol,
            extent=extent,
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
    extent: str = "60x30",
    score_threshold: float | None = None,
    workers: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Compares a FrameObjects per sample token of a dataset with its truth.

    Args:
        dataset: of one root.
        scenes: per sample token, without batch dimension.
        protocol, extent, score_threshold, workers, progress: of the lanes, as in `evaluate_lanes`.

    Raises:
        ConfigError: the dataset was made from several roots; the official evaluation knows one.
        DataError: scenes are missing, or hold numbers that are not finite.
    """
    if len(dataset.roots) != 1:
        raise ConfigError(f"the dataset has {len(dataset.roots)} roots; evaluate one root at a time")
    lines = {token: map_lines(scene.lines) for token, scene in scenes.items()}
    poses, tokens, scene_of_sample = ego_poses(dataset), dataset.tokens, dataset.scene_of_sample
    return Evaluation(
        evaluate_detection(dataset.roots[0], dataset.version, dataset.split, scenes, poses),
        *evaluate_lines(
            dataset,
            lines,
            protocol=protocol,
            extent=extent,
            score_threshold=score_threshold,
            workers=workers,
            progress=progress,
        ),
        evaluate_stability(
            scenes,
            [[tokens[i] for i in np.flatnonzero(scene_of_sample == scene)] for scene in np.unique(scene_of_sample)],
            poses,
            dict(zip(tokens, dataset.timestamps.tolist(), strict=True)),
        ),
        evaluate_calibration(
            scenes,
            {token: _gt(dataset, i, scenes[token].lines.points.shape[-2]) for i, token in enumerate(tokens)},
            protocol=protocol,
            extent=extent,
        ),
    )


def evaluate_stream(
    model: BEVTransformer, dataset: NuScenesDataset, *, workers: int = 0, progress: bool = False
) -> tuple[Evaluation, Stream]:
    """Streams a dataset through a network and evaluates what comes out.

    Args:
        model, dataset, workers, progress: as in `predict_stream`.
    """
    stream = predict_stream(model, dataset, workers=workers, progress=progress)
    return evaluate_scenes(dataset, stream.scenes), stream


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


def _gt(dataset: NuScenesDataset, i: int, points_per_line: int) -> FrameObjects:
    gt = FrameObjects(pad_boxes([dataset.gt_boxes(i)]), pad_lines([dataset.gt_lines(i)], points_per_line))
    return map_tensors(lambda tensor: tensor[0], gt)


def ego_poses(dataset: NuScenesDataset) -> dict[str, np.ndarray]:
    """global_from_ego [4, 4] per sample token."""
    return {token: dataset.ego_pose(i) for i, token in enumerate(dataset.tokens)}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
