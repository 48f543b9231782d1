"""The robustness card: the loss of accuracy with missing cameras, wrong calibration, bad images or no memory.

Every disturbance is evaluated over all scenes with unchanged ground truth: objects that only a missing camera shows
count as missed. The disturbances follow RoboBEV (Xie et al., https://arxiv.org/abs/2405.17426), which reports the share
of accuracy that is left; this card reports the share that is lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from perception.data.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    as_first_frame,
    corrupt_camera,
    drop_camera,
    yaw_extrinsics,
)
from perception.data.nuscenes import NuScenesDataset
from perception.errors import ConfigError
from perception.evaluation.dataset import all_gt_lines, ego_poses
from perception.evaluation.detection import evaluate_boxes, load_tables
from perception.evaluation.lanes import evaluate_lanes
from perception.evaluation.submission import map_lines
from perception.inference.sequence import Disturbance
from perception.inference.shared import from_first, predict_shared, rank_and_size
from perception.models.base import InferenceNetwork
from perception.types import Frame, FrameObjects, LaneRange

DEFAULT_SEVERITY = 2
SCORES = {"nds": "NDS", "mAP": "mAP", "lane_mAP": "lane mAP"}  # higher is better
ERRORS = {"mAVE": "mAVE"}  # lower is better


@dataclass(frozen=True)
class MissingCamera:
    """One camera is missing in all frames."""

    camera: int

    def __call__(self, frames: Frame, scene: int, sample: int) -> Frame:
        return drop_camera(frames, self.camera)


@dataclass(frozen=True)
class YawError:
    """The yaw of each camera is wrong by the same angle; its sign is random per scene and constant within it."""

    degrees: float
    seed: int

    def __call__(self, frames: Frame, scene: int, sample: int) -> Frame:
        return yaw_extrinsics(frames, self.degrees, np.random.default_rng((self.seed, scene)))


@dataclass(frozen=True)
class BadImages:
    """The images of all cameras are corrupted, at random for every frame and camera."""

    kind: str
    severity: int
    seed: int

    def __call__(self, frames: Frame, scene: int, sample: int) -> Frame:
        rng = np.random.default_rng((self.seed, sample))
        for camera in range(frames.rig.present.shape[-1]):
            frames = corrupt_camera(frames, camera, self.kind, self.severity, rng)
        return frames


@dataclass(frozen=True)
class NoMemory:
    """Every frame is a first frame."""

    def __call__(self, frames: Frame, scene: int, sample: int) -> Frame:
        return as_first_frame(frames)


class Trial(NamedTuple):
    """One disturbance to evaluate."""

    name: str
    group: str  # "camera", "calibration", "image" or "memory"
    disturb: Disturbance


def plan_trials(
    cameras: tuple[str, ...],
    *,
    drop_camera: str | None = None,
    extrinsics_noise_deg: float | None = None,
    corrupt: str | None = None,
    no_memory: bool = False,
    seed: int = 0,
) -> list[Trial]:
    """Makes the trials of the options of a command line.

    Args:
        cameras: names of the dataset's cameras, in order.
        drop_camera: one of them, or "each" for one trial after the other.
        extrinsics_noise_deg: degrees by which the yaw of each camera is wrong.
        corrupt: "KIND" or "KIND:SEVERITY" with a key of `CORRUPTIONS` or "each" as kind; severity 2 by default.
        no_memory: also evaluate each frame without memory.
        seed: of the signs of yaw errors and of random corruptions.

    Raises:
        ConfigError: a name, a number or a severity is not possible.
    """
    if seed < 0:
        raise ConfigError(f"--seed is {seed}; give 0 or more")
    trials = []
    if drop_camera is not None:
        if drop_camera not in (*cameras, "each"):
            raise ConfigError(f"--drop-camera {drop_camera}: no such camera; give {', '.join(cameras)} or each")
        if len(cameras) < 2:
            raise ConfigError(f"--drop-camera {drop_camera}: the dataset has no other camera; leave it out")
        for number, name in enumerate(cameras):
            if drop_camera in (name, "each"):
                trials.append(Trial(f"without {name}", "camera", MissingCamera(number)))
    if extrinsics_noise_deg is not None:
        if not 0 < extrinsics_noise_deg <= 45:
            raise ConfigError(
                f"--extrinsics-noise-deg is {extrinsics_noise_deg:g}; give an angle of more than 0 and at most 45 "
                "degrees"
            )
        trials.append(
            Trial(f"yaw off by {extrinsics_noise_deg:g} deg", "calibration", YawError(extrinsics_noise_deg, seed))
        )
    if corrupt is not None:
        kind, colon, severity = corrupt.partition(":")
        if kind not in (*CORRUPTIONS, "each"):
            raise ConfigError(f"--corrupt {corrupt}: no such corruption; give {', '.join(CORRUPTIONS)} or each")
        if colon and severity not in map(str, SEVERITIES):
            raise ConfigError(f"--corrupt {corrupt}: no such severity; write {kind}:1, {kind}:2 or {kind}:3")
        level = int(severity) if colon else DEFAULT_SEVERITY
        for name in CORRUPTIONS if kind == "each" else (kind,):
            trials.append(Trial(f"{name}, severity {level}", "image", BadImages(name, level, seed)))
    if no_memory:
        trials.append(Trial("no memory", "memory", NoMemory()))
    return trials


@dataclass(frozen=True)
class TrialResult:
    """The metrics of one trial.

    Args:
        name, group: of the trial.
        metrics: the numbers of `SCORES` and `ERRORS`.
    """

    name: str
    group: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class RobustnessCard:
    """The metrics of a network without and with each disturbance.

    Args:
        clean: the numbers of `SCORES` and `ERRORS` without a disturbance.
        trials: with each disturbance, in order.
    """

    clean: dict[str, float]
    trials: tuple[TrialResult, ...]

    def loss(self, trial: TrialResult, metric: str) -> float:
        """Returns the loss of a trial as a share of the clean number: 0.25 for a quarter; NaN where that is 0."""
        clean, disturbed = self.clean[metric], trial.metrics[metric]
        if not clean:
            return math.nan
        return disturbed / clean - 1 if metric in ERRORS else 1 - disturbed / clean

    def worst(self, group: str, metric: str) -> TrialResult | None:
        """Returns the trial of a group with the largest loss of a metric; None without a trial or a loss."""
        trials = [t for t in self.trials if t.group == group and not math.isnan(self.loss(t, metric))]
        return max(trials, key=lambda trial: self.loss(trial, metric), default=None)

    def memory_gain(self) -> dict[str, float] | None:
        """Returns the gain of each metric by memory as a share of the single-frame number; None without that trial."""
        alone = next((trial.metrics for trial in self.trials if trial.group == "memory"), None)
        if alone is None:
            return None
        gain = {name: self.clean[name] / alone[name] - 1 if alone[name] else math.nan for name in SCORES}
        return gain | {name: 1 - self.clean[name] / alone[name] if alone[name] else math.nan for name in ERRORS}

    def as_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; NaN becomes None."""
        metrics = SCORES | ERRORS
        gain = self.memory_gain()
        return {
            "clean": _plain(self.clean),
            "trials": [
                asdict(trial)
                | {"metrics": _plain(trial.metrics), "loss": _plain({m: self.loss(trial, m) for m in metrics})}
                for trial in self.trials
            ],
            "memory_gain": None if gain is None else _plain(gain),
        }

    def table(self) -> str:
        """Returns the card as text for a terminal."""
        metrics = SCORES | ERRORS
        rows = [f"{'robustness':<28}" + "".join(f"{head:>9}{'loss':>8}" for head in metrics.values())]
        rows.append(f"{'clean':<28}" + "".join(f"{self.clean[m]:9.3f}{'':8}" for m in metrics))
        for trial in self.trials:
            cells = "".join(f"{trial.metrics[m]:9.3f}{_percent(self.loss(trial, m)):>8}" for m in metrics)
            rows.append(f"{trial.name:<28}{cells}")
        for group in ("camera", "image"):
            if sum(trial.group == group for trial in self.trials) > 1:
                worst = {m: self.worst(group, m) for m in metrics}
                losses = {m: self.loss(trial, m) if trial else math.nan for m, trial in worst.items()}
                cells = "".join(f"{'':9}{_percent(loss):>8}" for loss in losses.values())
                rows.append(f"{f'worst of each {group}':<28}{cells}")
        if gain := self.memory_gain():
            cells = "".join(f"{'':9}{_percent(gain[m]):>8}" for m in metrics)
            rows.append(f"{'gain by memory':<28}{cells}")
        return "\n".join(rows)


def _plain(numbers: dict[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in numbers.items()}


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}"


def evaluate_robustness(
    model: InferenceNetwork,
    dataset: NuScenesDataset,
    trials: list[Trial],
    clean: dict[str, float],
    *,
    protocol: str = "maptr",
    lane_range: LaneRange | None = None,
    workers: int = 0,
    progress: bool = False,
) -> RobustnessCard:
    """Runs a network on a dataset once per trial and compares with its clean evaluation.

    Processes of a launcher share the scenes, and all of them return the card.

    Args:
        model: in evaluation mode.
        dataset: of one root.
        trials: see `plan_trials`.
        clean: `Evaluation.metrics()` of the same network, dataset, protocol and range.
        protocol, lane_range: of the lanes, as in `evaluate_predictions`.
        workers: processes that load images and match lines.
        progress: show progress bars on stderr.

    Raises:
        ConfigError, DataError: as `predict_stream` and `evaluate_predictions`.
    """
    wanted = (*SCORES, *ERRORS)
    lane_range = lane_range or dataset.lane_range
    poses, results = ego_poses(dataset), []
    first = rank_and_size()[0] == 0  # the process that evaluates
    tables = load_tables(dataset.roots[0], dataset.version) if first else None
    gt = all_gt_lines(dataset, protocol=protocol, lane_range=lane_range, progress=progress) if first else {}

    def evaluated(predictions: Mapping[str, FrameObjects]) -> dict[str, float]:
        boxes = evaluate_boxes(predictions, poses, dataset.roots[0], dataset.version, dataset.split, nusc=tables)
        lines = {token: map_lines(objects.lines) for token, objects in predictions.items()}
        lanes = evaluate_lanes(lines, gt, protocol=protocol, lane_range=lane_range, workers=workers, progress=progress)
        found = {"nds": boxes.nds, "mAP": boxes.mean_ap, "lane_mAP": lanes.mean_ap, **boxes.errors}
        return {name: float(found[name]) for name in wanted}

    for name, group, disturb in tqdm(trials, desc="disturbances", unit="trial", disable=not (progress and first)):
        stream = predict_shared(model, dataset, disturb=disturb, workers=workers, progress=progress)
        results.append(TrialResult(name, group, from_first(partial(evaluated, stream.objects))))
    return RobustnessCard({name: float(clean[name]) for name in wanted}, tuple(results))
