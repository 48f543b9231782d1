"""The official nuScenes detection score, computed by the devkit's own code (config `detection_cvpr_2019`).

Converts boxes of `FrameObjects` (ego frame, length-width-height, yaw) to the devkit's submission (global frame,
width-length-height, quaternion, one attribute per box), and runs the devkit on it.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nuscenes import NuScenes
from nuscenes.eval.common.config import config_factory
from nuscenes.eval.common.data_classes import EvalBoxes
from nuscenes.eval.common.loaders import get_samples_of_scenes
from nuscenes.eval.detection.data_classes import DetectionConfig, DetectionMetrics
from nuscenes.eval.detection.evaluate import DetectionEval
from nuscenes.eval.detection.utils import category_to_detection_name
from pyquaternion import Quaternion

from perception.data.checked_tables import open_tables
from perception.data.splits import Split, is_official, split_scenes
from perception.errors import DataError
from perception.evaluation.submission import CAMERA_ONLY
from perception.files import check_dataset, write_json
from perception.geometry import RIGID_TOLERANCE, is_rigid, transform_points
from perception.processes import in_processes, processors
from perception.types import ATTRIBUTES, BOX_CLASSES, Array, Boxes, FrameObjects

_CONFIG = "detection_cvpr_2019"
_MAX_BOXES = 500
# The devkit's names of the true-positive errors, and those in papers.
_ERRORS = {"trans_err": "mATE", "scale_err": "mASE", "orient_err": "mAOE", "vel_err": "mAVE", "attr_err": "mAAE"}
_MANY_BOXES = 100_000  # predictions whose evaluation takes longer than starting processes
_MOVING_SPEED = 0.2  # m/s


@dataclass(frozen=True)
class DetectionResult:
    """nuScenes detection scores of one split.

    Args:
        nds: nuScenes detection score, 0..1.
        mean_ap: mean AP over ten classes and four distances, 0..1.
        errors: mATE (m), mASE (1 - IoU), mAOE (rad), mAVE (m/s), mAAE (1 - accuracy).
        class_ap: AP per class name, mean over the four distances.
        class_errors: the five errors per class name, NaN where one is not defined for a class.
        gt_count: ground-truth boxes per class name in range and with LiDAR or radar points. The devkit scores a class
            without any as AP 0 and errors 1, so a split that lacks a class cannot reach NDS 1.
        samples: number of samples.
    """

    nds: float
    mean_ap: float
    errors: dict[str, float]
    class_ap: dict[str, float]
    class_errors: dict[str, dict[str, float]]
    gt_count: dict[str, int]
    samples: int

    def as_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; undefined errors become None."""
        return {
            "protocol": _CONFIG,
            "nds": self.nds,
            "mean_ap": self.mean_ap,
            **self.errors,
            "class_ap": dict(self.class_ap),
            "class_errors": {
                name: {key: None if np.isnan(value) else value for key, value in row.items()}
                for name, row in self.class_errors.items()
            },
            "gt_count": dict(self.gt_count),
            "samples": self.samples,
        }

    def table(self) -> str:
        """Returns the result as text for a terminal."""
        heads = "".join(f"{key[1:]:>8}" for key in self.errors)
        rows = [f"{'boxes (nuScenes)':<22}{'AP':>8}{heads}{'gt':>8}"]
        for name, ap in self.class_ap.items():
            cells = "".join(f"{'-' if np.isnan(v) else format(v, '.3f'):>8}" for v in self.class_errors[name].values())
            rows.append(f"{name:<22}{ap:8.3f}{cells}{self.gt_count[name]:8d}")
        means = "".join(f"{value:8.3f}" for value in self.errors.values())
        rows.append(f"{'mean':<22}{self.mean_ap:8.3f}{means}{sum(self.gt_count.values()):8d}")
        rows.append(f"{'NDS':<22}{self.nds:8.3f}")
        return "\n".join(rows)


def evaluate_boxes(
    predictions: Mapping[str, FrameObjects],
    ego_poses: Mapping[str, Array],
    dataroot: str | os.PathLike[str],
    version: str,
    split: Split,
    *,
    nusc: NuScenes | None = None,
    out_dir: str | os.PathLike[str] | None = None,
) -> DetectionResult:
    """Runs the official nuScenes detection evaluation on predictions of a network.

    Args:
        predictions: per sample token of the split, the predicted FrameObjects without batch dimension (boxes [M, ...]).
        ego_poses: per sample token, global_from_ego [4, 4] float64 of the predictions' ego frame.
        dataroot: root of a nuScenes-format dataset.
        version: folder of its tables, e.g. "v1.0-trainval".
        split: an official split, one listed in `splits.json` next to the tables, or a file of scene names (see
            `perception.data.splits`).
        nusc: the tables, see `load_tables`; loaded here by default, which takes most of the time.
        out_dir: folder for `submission.json` and `metrics.json`; by default nothing is written.

    Raises:
        DataError: the dataset or the split does not exist, has no boxes, or the predictions are not those of the split.
    """
    nusc = nusc or load_tables(dataroot, version)
    _check_tokens(predictions, split_tokens(nusc, split), split)
    submission = submission_from_predictions(predictions, ego_poses)
    if out_dir is not None:  # before the evaluation, which may refuse the ground truth
        write_json(Path(out_dir) / "submission.json", submission)
    result = evaluate_submission(nusc, split, submission)
    if out_dir is not None:
        write_json(Path(out_dir) / "metrics.json", result.as_dict())
    return result


def evaluate_submission(
    nusc: NuScenes, split: Split, submission: Mapping[str, Any], *, workers: int | None = None
) -> DetectionResult:
    """Runs the official nuScenes detection evaluation on a submission.

    Args:
        nusc: the tables, see `load_tables`.
        split: as in `evaluate_boxes`.
        submission: `meta` and `results` in nuScenes' format, see `perception.evaluation.submission`.
        workers: processes that share the classes and distances, with the same result; None takes one for each core,
            at most 8, or none for submissions of less than 100,000 boxes.

    Raises:
        DataError: the split does not exist or has no boxes, or the submission is not one of the split.
    """
    tokens = split_tokens(nusc, split)
    _check_tokens(submission["results"], tokens, split)
    annotations = (nusc.get("sample_annotation", ann) for t in tokens for ann in nusc.get("sample", t)["anns"])
    points = [
        record["num_lidar_pts"] + record["num_radar_pts"]
        for record in annotations
        if category_to_detection_name(record["category_name"])
    ]
    check_counted(points, nusc.table_root, split)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "submission.json"
        path.write_text(json.dumps(_never_empty(submission)))
        # The devkit shows a progress bar on stderr even without `verbose`.
        with contextlib.redirect_stderr(io.StringIO()):
            tables, name = (nusc, split) if is_official(split) else _named_split(nusc, split, Path(scratch))
            evaluation = DetectionEval(tables, config_factory(_CONFIG), str(path), name, scratch, verbose=False)
            if not evaluation.gt_boxes.all:
                raise DataError(
                    f"no box of split {split} in {nusc.table_root} has LiDAR or radar points and lies in the range of "
                    "its class, so nothing can be scored; check the poses in ego_pose.json, or choose another split"
                )
            if workers is None:
                many = sum(map(len, submission["results"].values())) >= _MANY_BOXES
                workers = min(processors(), 8) if many else 1
            metrics = _evaluate(evaluation, workers)
    summary = metrics.serialize()
    counted = Counter(box.detection_name for box in evaluation.gt_boxes.all)
    return DetectionResult(
        nds=float(summary["nd_score"]),
        mean_ap=float(summary["mean_ap"]),
        errors={name: float(summary["tp_errors"][key]) for key, name in _ERRORS.items()},
        class_ap={name: float(summary["mean_dist_aps"][name]) for name in BOX_CLASSES},
        class_errors={
            name: {short: float(summary["label_tp_errors"][name][key]) for key, short in _ERRORS.items()}
            for name in BOX_CLASSES
        },
        gt_count={name: counted[name] for name in BOX_CLASSES},
        samples=len(tokens),
    )


def _evaluate(evaluation: DetectionEval, workers: int) -> DetectionMetrics:
    """Runs the devkit's evaluation, in several processes by class and distance if there are workers."""
    if workers <= 1:
        metrics, _ = evaluation.evaluate()
        return metrics
    config = evaluation.cfg
    units = [(name, distance) for name in config.class_names for distance in config.dist_ths]
    metrics = DetectionMetrics(config)
    boxes = {
        name: tuple(_of_class(part, name) for part in (evaluation.gt_boxes, evaluation.pred_boxes))
        for name in BOX_CLASSES
    }

    def evaluate(unit: tuple[str, float]) -> tuple[float, dict[str, float]]:
        return _evaluate_unit(config, boxes[unit[0]], *unit)

    for (name, distance), (ap, errors) in zip(units, in_processes(evaluate, units, workers), strict=True):
        metrics.add_label_ap(name, distance, ap)
        if distance == config.dist_th_tp:
            for error, value in errors.items():
                metrics.add_label_tp(name, error, value)
    return metrics


def _of_class(boxes: EvalBoxes, name: str) -> EvalBoxes:
    """Returns the boxes of one class, of all samples."""
    found = EvalBoxes()
    for token in boxes.sample_tokens:
        found.add_boxes(token, [box for box in boxes[token] if box.detection_name == name])
    return found


def _evaluate_unit(
    config: DetectionConfig, boxes: tuple[EvalBoxes, ...], name: str, distance: float
) -> tuple[float, dict[str, float]]:
    """Runs the devkit's evaluation of one class at one distance: AP, and the true-positive errors at that distance."""
    part = DetectionEval.__new__(DetectionEval)  # its constructor would read files
    part.verbose = False
    part.cfg = copy.copy(config)
    part.cfg.class_names, part.cfg.dist_ths, part.cfg.dist_th_tp = [name], [distance], distance
    part.gt_boxes, part.pred_boxes = boxes
    metrics, _ = part.evaluate()
    return metrics.get_label_ap(name, distance), {error: metrics.get_label_tp(name, error) for error in _ERRORS}


def check_counted(points: Collection[int], tables: str | os.PathLike[str], split: Split) -> None:
    """Checks that the evaluation counts a box of a split. It drops those whose LiDAR and radar points add up to 0.

    Args:
        points: per box of the ten classes, the sum of its LiDAR and radar points.
        tables: the folder of the tables, and
        split: the split, for the message.

    Raises:
        DataError: there is no box, or none counts.
    """
    if not points:
        raise DataError(f"split {split} of {tables} has no annotation of the ten classes; choose another split")
    if not any(points):
        raise DataError(
            f"{Path(tables) / 'sample_annotation.json'} gives all {len(points)} boxes of split {split} 0 LiDAR and "
            "radar points, so the evaluation counts none; write -1 as num_lidar_pts where the number is unknown"
        )


def load_tables(dataroot: str | os.PathLike[str], version: str) -> NuScenes:
    """Loads the devkit's tables of a nuScenes-format dataset, without output, after checking them.

    Raises:
        DataError: a table is missing, or records of it cannot be right.
    """
    check_dataset(Path(dataroot), version)
    return open_tables(Path(dataroot), version)


def submission_from_predictions(
    predictions: Mapping[str, FrameObjects], ego_poses: Mapping[str, Array]
) -> dict[str, Any]:
    """Makes a nuScenes detection submission: global frame, at most the 500 best boxes of each sample.

    A box whose attribute is -1 gets the likely attribute of its class and speed. An unknown velocity (NaN) becomes 0,
    because the devkit would leave such a box out of the velocity error.

    Args:
        predictions: per sample token, without batch dimension; only valid boxes are used.
        ego_poses: per sample token global_from_ego [4, 4] float64.

    Raises:
        DataError: a pose is missing or not rigid, or a box holds a number that is not finite or a size not above 0.
    """
    results = {token: _records(token, objects.boxes, _pose(ego_poses, token)) for token, objects in predictions.items()}
    return {"meta": dict(CAMERA_ONLY), "results": results}


def _records(token: str, boxes: Boxes, global_from_ego: Array) -> list[dict[str, Any]]:
    """Makes the submission entries of one sample, best score first."""
    if boxes.valid.ndim != 1:
        raise DataError(
            f"the prediction of sample {token} has boxes of shape {tuple(boxes.valid.shape)}; "
            "pass one FrameObjects per sample, without batch dimensions"
        )
    valid = boxes.valid.cpu()
    fields = (boxes.center, boxes.size, boxes.yaw, boxes.velocity, boxes.label, boxes.attribute, boxes.score)
    center, size, yaw, velocity, label, attribute, score = (
        field.detach().cpu()[valid].double().numpy() for field in fields
    )
    numbers = np.concatenate([center, size, yaw[:, None], score[:, None]], 1)  # [M, 8]
    bad = np.nonzero(~np.isfinite(numbers).all(1) | (size <= 0).any(1) | np.isinf(velocity).any(1))[0]
    if len(bad):
        raise DataError(
            f"box {bad[0]} of sample {token} has a number that is not finite or a size that is not positive; "
            "check the network's output for NaN"
        )
    center_global = transform_points(global_from_ego, center)  # [M, 3]
    velocity = np.nan_to_num(velocity)  # [M, 2]
    velocity_global = np.pad(velocity, ((0, 0), (0, 1))) @ global_from_ego[:3, :3].T  # [M, 3]
    turn = Quaternion(matrix=global_from_ego[:3, :3], rtol=0, atol=2 * RIGID_TOLERANCE)  # the determinant too
    # The product of quaternions for all boxes at once, by the matrix of the first: objects would take most of the time.
    w, x, y, z = turn.elements
    turned = np.array([[w, -x, -y, -z], [x, w, -z, y], [y, z, w, -x], [z, -y, x, w]])
    zero = np.zeros(len(yaw))
    about_z = np.stack([np.cos(yaw / 2), zero, zero, np.sin(yaw / 2)], 1)  # [M, 4]
    rotation = (turned @ about_z[..., None])[..., 0]  # [M, 4]
    speed = np.sqrt(velocity[:, None, :] @ velocity[:, :, None])[:, 0, 0]  # [M]
    best = np.argsort(-score, kind="stable")[:_MAX_BOXES]
    columns = (center_global, size[:, [1, 0, 2]], rotation, velocity_global[:, :2], label, attribute, score, speed)
    return [
        {
            "sample_token": token,
            "translation": box_center,
            "size": box_size,
            "rotation": box_rotation,
            "velocity": box_velocity,
            "detection_name": BOX_CLASSES[int(box_label)],
            "detection_score": box_score,
            "attribute_name": _attribute(int(box_attribute), int(box_label), box_speed > _MOVING_SPEED),
        }
        for box_center, box_size, box_rotation, box_velocity, box_label, box_attribute, box_score, box_speed in zip(
            *(column[best].tolist() for column in columns), strict=True
        )
    ]


def _attribute(attribute: int, label: int, moving: bool) -> str:
    """Returns the box's attribute, or the likely one of its class if it moves or is at rest."""
    if attribute >= 0:
        return ATTRIBUTES[attribute]
    name = BOX_CLASSES[label]
    if name in ("barrier", "traffic_cone"):
        return ""
    if name == "pedestrian":
        return "pedestrian.moving" if moving else "pedestrian.standing"
    if name in ("bicycle", "motorcycle"):
        return "cycle.with_rider" if moving else "cycle.without_rider"
    if moving:
        return "vehicle.moving"
    return "vehicle.stopped" if name == "bus" else "vehicle.parked"  # a bus at rest mostly waits at its stop


def _pose(ego_poses: Mapping[str, Array], token: str) -> Array:
    if token not in ego_poses:
        raise DataError(f"there is no ego pose for sample {token}; give global_from_ego [4, 4] for every sample")
    pose = np.asarray(ego_poses[token], dtype=np.float64)
    if not is_rigid(pose):
        raise DataError(f"the ego pose of sample {token} is not a rigid [4, 4] transform; check the ego_pose table")
    return pose


def _never_empty(submission: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a submission with at least one box.

    The devkit fails on a submission without any, as an untrained network gives. It drops a box a thousand kilometres
    away by its range filter, before anything is counted.
    """
    results = submission["results"]
    if any(results.values()):
        return submission
    token = next(iter(results))
    far_box = {
        "sample_token": token,
        "translation": [1e6, 1e6, 0.0],
        "size": [1.0, 1.0, 1.0],
        "rotation": [1.0, 0.0, 0.0, 0.0],
        "velocity": [0.0, 0.0],
        "detection_name": "car",
        "detection_score": 0.0,
        "attribute_name": "vehicle.parked",
    }
    return {**submission, "results": {**results, token: [far_box]}}


def _scenes(nusc: NuScenes, split: Split) -> list[str]:
    return split_scenes(split, Path(nusc.table_root), [scene["name"] for scene in nusc.scene])


def _named_split(nusc: NuScenes, split: Split, folder: Path) -> tuple[NuScenes, str]:
    """Returns the same tables with the scenes of a split under a name, and that name.

    The devkit takes its own splits and those of `splits.json` in the dataset, which must not be changed. It finds that
    file by the tables' `dataroot`, and the evaluation reads no other file by it.
    """
    name = "split"
    write_json(folder / nusc.version / "splits.json", {name: _scenes(nusc, split)})
    tables = copy.copy(nusc)
    tables.dataroot = str(folder)
    return tables, name


def split_tokens(nusc: NuScenes, split: Split) -> list[str]:
    """Returns the sample tokens of a split, see `split_scenes`.

    Raises:
        DataError: the split does not exist, or does not fit the tables.
    """
    return list(get_samples_of_scenes(_scenes(nusc, split), nusc))


def _check_tokens(results: Mapping[str, object], tokens: list[str], split: Split) -> None:
    missing, extra = set(tokens) - results.keys(), results.keys() - set(tokens)
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(tokens)} samples of split {split} have no prediction, {min(missing)} among "
            "them; give every sample a FrameObjects, without valid boxes where nothing was found"
        )
    if extra:
        raise DataError(
            f"{len(extra)} predictions belong to samples outside split {split}, {min(extra)} among them; "
            "predict on the split that is evaluated"
        )
