"""Submissions: predictions of a split in one JSON file.

Boxes are in nuScenes' format (global frame), as its devkit reads it. Lanes have no official format; this one follows
the same pattern, in the ego frame of each sample (x forward, y left, metres, at the time of its LIDAR_TOP):

    {
      "meta": {"use_camera": true, "use_lidar": false, "use_radar": false, "use_map": false, "use_external": false},
      "frame": "ego",
      "results": {
        "<sample token>": [
          {"class": "divider", "score": 0.83, "points": [[-30.0, 1.8], [4.2, 1.9], [30.0, 2.0]]}
        ]
      }
    }

Every sample of the split is a key, with an empty list if nothing is predicted. A class is one of LINE_CLASSES. A line
has two points or more; a closed line repeats its first point last. Further keys are allowed and not read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from perception.errors import DataError
from perception.files import write_json
from perception.inference.checks import FARTHEST_POSE
from perception.reading import number, short, typed
from perception.types import ATTRIBUTES, BOX_CLASSES, LINE_CLASSES, MapLine, Polylines

CAMERA_ONLY = {"use_camera": True, "use_lidar": False, "use_radar": False, "use_map": False, "use_external": False}
FRAME = "ego"

_FARTHEST = 1000.0  # metres; lines beyond are not in the ego frame
_MAX_BOXES = 500  # of the nuScenes detection task
_BOX_NUMBERS = {"translation": 3, "size": 3, "rotation": 4, "velocity": 2}
_BOX_FIELDS = ("sample_token", *_BOX_NUMBERS, "detection_name", "detection_score", "attribute_name")


class LaneSubmission(NamedTuple):
    """Lines of a split.

    Args:
        path: the file, for error messages.
        meta: the sensors that the predictions use.
        results: per sample token the lines in the order of the file, ego frame.
    """

    path: Path
    meta: dict[str, Any]
    results: dict[str, list[MapLine]]


class DetectionSubmission(NamedTuple):
    """Boxes of a split; `meta` and `results` are as the nuScenes devkit reads them."""

    path: Path
    meta: dict[str, Any]
    results: dict[str, list[dict[str, Any]]]


def write_lanes(
    path: str | os.PathLike[str], lines: Mapping[str, Sequence[MapLine]], meta: Mapping[str, object] = CAMERA_ONLY
) -> None:
    """Writes a lane submission. Numbers keep all their digits, so that the file has the metrics of the lines.

    Args:
        path: the JSON file.
        lines: per sample token the predicted lines, ego frame.
        meta: the sensors that the predictions use.
    """
    results = {
        token: [
            {
                "class": LINE_CLASSES[line.label],
                "score": float(line.score),
                "points": np.asarray(line.points, dtype=np.float64).tolist(),
            }
            for line in found
        ]
        for token, found in lines.items()
    }
    write_json(Path(path), {"meta": dict(meta), "frame": FRAME, "results": results}, indent=None)


def read_submission(path: str | os.PathLike[str]) -> LaneSubmission | DetectionSubmission:
    """Reads and checks a submission of lanes or boxes.

    Raises:
        DataError: the file is missing, is not JSON, or a field is missing or malformed.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_unique)
    except OSError as error:
        raise DataError(f"submission {path} cannot be read ({error.strerror}); give a JSON file") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"submission {path} is not valid JSON ({error}); write it again") from None
    content = typed(content, dict, f"{path}: the file", 'an object with "meta" and "results"')
    for field in ("meta", "results"):
        if field not in content:
            raise DataError(f"{path}: field {field} is missing; a submission holds meta and results")
        typed(content[field], dict, f"{path}: field {field}", "an object")
    for token, entries in content["results"].items():
        where = f"{path}: results.{token[:60]}"
        for index, entry in enumerate(typed(entries, list, where, "a list, empty if nothing is predicted")):
            typed(entry, dict, f"{where}[{index}]", "an object")
    entries = (entry for found in content["results"].values() for entry in found)
    first: dict[str, Any] = next(entries, {})
    if "frame" not in content and not {"class", "points"} & first.keys():
        return _checked_boxes(path, content)
    if content.get("frame") != FRAME:
        raise DataError(
            f"{path}: field frame is {short(content.get('frame'))}; give lines in the ego frame (x forward, y left, "
            f'metres) and write "frame": "{FRAME}"'
        )
    results = {
        token: [_line(entry, f"{path}: results.{token[:60]}[{index}]") for index, entry in enumerate(found)]
        for token, found in content["results"].items()
    }
    return LaneSubmission(path, content["meta"], results)


def check_samples(submission: LaneSubmission | DetectionSubmission, tokens: Collection[str]) -> None:
    """Checks that a submission holds the samples of a split.

    Raises:
        DataError: it lacks samples of the split, or holds others.
    """
    wanted, found = set(tokens), submission.results.keys()
    if missing := wanted - found:
        raise DataError(
            f"{submission.path}: field results lacks {len(missing)} of the {len(wanted)} samples of the split, "
            f"{min(missing)} among them; give every sample a list, an empty one if nothing is predicted"
        )
    if extra := found - wanted:
        raise DataError(
            f"{submission.path}: field results holds {len(extra)} samples that are not in the split, {min(extra)} "
            "among them; remove them or evaluate the split that was predicted"
        )


def _unique(pairs: list[tuple[str, object]]) -> dict[str, Any]:
    """Makes a JSON object; refuses equal keys, of which json would keep the last one only."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)} occurs twice in one object")
    return found


def _field(entry: Mapping[str, Any], field: str, where: str) -> Any:
    if field not in entry:
        raise DataError(f"{where}.{field} is missing; add it (docs/evaluation.md shows the format)")
    return entry[field]


def _number(value: object, where: str) -> float:
    result = number(value)
    if not abs(result) <= FARTHEST_POSE:
        raise DataError(f"{where} is {short(value)}; it must be a finite number, at most {FARTHEST_POSE:.0e}")
    return result


def _line(entry: Mapping[str, Any], where: str) -> MapLine:
    name = _field(entry, "class", where)
    if name not in LINE_CLASSES:
        raise DataError(f"{where}.class is {short(name)}; it must be one of {', '.join(LINE_CLASSES)}")
    score = _number(_field(entry, "score", where), f"{where}.score")
    given = _field(entry, "points", where)
    try:
        points = np.array(given)
    except ValueError:  # rows of different lengths
        points = np.zeros(0)
    if points.dtype.kind not in "if" or points.ndim != 2 or points.shape[1] != 2 or len(points) < 2:
        raise DataError(f"{where}.points is {short(given)}; it must be a list of two or more [x, y]")
    points = points.astype(np.float64)
    if not np.isfinite(points).all():
        raise DataError(f"{where}.points holds a number that is not finite; remove the line or fix its source")
    if np.abs(points).max() > _FARTHEST:
        raise DataError(
            f"{where}.points lie up to {np.abs(points).max():.0f} m away, which looks like map coordinates; "
            "carry them into the ego frame of the sample"
        )
    return MapLine(LINE_CLASSES.index(name), points, score)


def _checked_boxes(path: Path, content: dict[str, Any]) -> DetectionSubmission:
    """Checks the boxes, and leaves out fields that are not of the format: the devkit would read some of them."""
    results: dict[str, list[dict[str, Any]]] = {}
    for token, boxes in content["results"].items():
        if len(boxes) > _MAX_BOXES:
            raise DataError(
                f"{path}: results.{token[:60]} has {len(boxes)} boxes; keep the {_MAX_BOXES} best of a sample"
            )
        results[token] = []
        for index, box in enumerate(boxes):
            where = f"{path}: results.{token[:60]}[{index}]"
            if _field(box, "sample_token", where) != token:
                raise DataError(
                    f"{where}.sample_token is {short(box['sample_token'])}; it must be its key, {short(token)}"
                )
            if "num_pts" in box:
                points = box["num_pts"]
                if isinstance(points, bool) or not isinstance(points, int):
                    raise DataError(f"{where}.num_pts is {short(points)}; leave it out, or give -1 for unknown")
                if points == 0:
                    raise DataError(
                        f"{where}.num_pts is 0, and the devkit leaves such boxes out of the score as if they were not "
                        "predicted; leave num_pts out, or give -1 for unknown"
                    )
            for field, count in _BOX_NUMBERS.items():
                values = _field(box, field, where)
                if not isinstance(values, list) or len(values) != count:
                    raise DataError(f"{where}.{field} is {short(values)}; it must be a list of {count} numbers")
                for value in values:
                    if field == "velocity" and value != value:
                        continue  # unknown: the devkit leaves the box out of the velocity error
                    _number(value, f"{where}.{field}")
            if min(box["size"]) <= 0:
                raise DataError(f"{where}.size is {short(box['size'])}; it must be above 0, as width, length, height")
            # The devkit normalises quaternions; the squares of very small numbers would be 0.
            if max(map(abs, box["rotation"])) < 1e-3:
                raise DataError(f"{where}.rotation is {short(box['rotation'])}; it must be a quaternion w, x, y, z")
            _number(_field(box, "detection_score", where), f"{where}.detection_score")
            for field, allowed in (("detection_name", BOX_CLASSES), ("attribute_name", ("", *ATTRIBUTES))):
                if _field(box, field, where) not in allowed:
                    wanted = ", ".join(name or '""' for name in allowed)
                    raise DataError(f"{where}.{field} is {short(box[field])}; it must be one of {wanted}")
            results[token].append({field: box[field] for field in _BOX_FIELDS})
    return DetectionSubmission(path, content["meta"], results)


def map_lines(lines: Polylines) -> list[MapLine]:
    """Returns the valid lines of one frame (no leading dimension) as a list."""
    label, score, points = (x[lines.valid].cpu().numpy() for x in (lines.label, lines.score, lines.points))
    return [MapLine(int(k), p.astype(np.float64), float(s)) for k, p, s in zip(label, points, score, strict=True)]
