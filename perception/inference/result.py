"""Writes the result of one step in live use as JSON and reads it back, with numpy alone.

`result.schema.json` is the JSON Schema of the format. Numbers are those of the arrays: reading gives
the same values bit by bit. Padding (rows that are not valid) is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perception.errors import DataError
from perception.reading import short
from perception.rigs.documents import Fields
from perception.types import (
    ATTRIBUTES,
    BOX_CLASSES,
    LINE_CLASSES,
    Boxes,
    Ids,
    LiveObjects,
    NumpyBoxes,
    NumpyLiveObjects,
    NumpyPolylines,
    NumpySeen,
    Polylines,
    Seen,
    StepInfo,
    Weights,
)

SCHEMA = Path(__file__).with_name("result.schema.json")
FORMAT = "perception-result-1"  # changes when this version cannot read older results
AXES = "x forward, y left, z up; origin on the ground below the rear axle"
UNITS = {"length": "m", "angle": "rad", "time": "s", "velocity": "m/s"}
ROOT_KEYS = (
    "format", "frame", "axes", "units", "time_s", "global_from_ego", "memory", "weights", "box_classes", "line_classes",
    "warnings", "boxes", "lines",
)  # fmt: skip
BOX_NUMBERS = {"center": 3, "size": 3, "uncertainty": 9}  # how many of them a box has
BOX_KEYS = ("class", "score", *BOX_NUMBERS, "yaw", "velocity", "attribute", "seen", "id")
LINE_KEYS = ("class", "score", "closed", "points", "uncertainty", "seen", "id")


def to_dict(result: LiveObjects | NumpyLiveObjects) -> dict[str, Any]:
    """Returns a result as plain JSON values.

    Args:
        result: of one step, without batch dimension, on the CPU.
    """
    boxes = NumpyBoxes(*map(np.asarray, result.boxes))
    lines = NumpyPolylines(*map(np.asarray, result.lines))
    seen, info, ids = NumpySeen(*map(np.asarray, result.seen)), result.info, result.ids
    pose = info.global_from_ego
    return {
        "format": FORMAT,
        "frame": "ego",
        "axes": AXES,
        "units": UNITS,
        "time_s": info.time_s,
        "global_from_ego": None if pose is None else np.asarray(pose, np.float64).tolist(),
        "memory": {"used": info.used_memory, "reason": info.no_memory_because},
        "weights": {
            "name": info.weights.name,
            "trained_on": None if info.weights.trained_on is None else dict(info.weights.trained_on),
        },
        "box_classes": list(BOX_CLASSES),
        "line_classes": list(LINE_CLASSES),
        "warnings": list(result.warnings),
        "boxes": [
            {
                "class": BOX_CLASSES[boxes.label[m]],
                "score": float(boxes.score[m]),
                "center": boxes.center[m].tolist(),
                "size": boxes.size[m].tolist(),
                "yaw": float(boxes.yaw[m]),
                "velocity": [None if np.isnan(x) else x for x in boxes.velocity[m].tolist()],
                "attribute": None if boxes.attribute[m] < 0 else ATTRIBUTES[boxes.attribute[m]],
                "uncertainty": boxes.uncertainty[m].tolist(),
                "seen": float(seen.boxes[m]),
            }
            | _id(ids.boxes if ids else None, m)
            for m in np.flatnonzero(boxes.valid)
        ],
        "lines": [
            {
                "class": LINE_CLASSES[lines.label[m]],
                "score": float(lines.score[m]),
                "closed": bool(lines.closed[m]),
                "points": lines.points[m].tolist(),
                "uncertainty": lines.uncertainty[m].tolist(),
                "seen": seen.lines[m].tolist(),
            }
            | _id(ids.lines if ids else None, m)
            for m in np.flatnonzero(lines.valid)
        ],
    }


def to_json(result: LiveObjects | NumpyLiveObjects) -> str:
    """Returns a result as JSON text in one line, for JSON lines.

    Raises:
        DataError: a number is not finite.
    """
    try:
        return json.dumps(to_dict(result), allow_nan=False, separators=(",", ":"))
    except ValueError:
        raise DataError("the result holds a number that is not finite, which JSON has no word for") from None


def from_json(text: str, where: str = "result") -> NumpyLiveObjects:
    """Reads what `to_json` returned.

    Args:
        text: JSON.
        where: names its place, for messages.

    Raises:
        DataError: it is something else.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); give what to_json returned") from None
    return from_dict(values, where)


def from_dict(values: Mapping[str, Any], where: str = "result") -> NumpyLiveObjects:
    """Reads what `to_dict` returned.

    Args:
        values: the result.
        where: names its place, for messages.

    Returns:
        The same values, float32 and int32 as those of the in-vehicle runtime.

    Raises:
        DataError: it is something else; the message names the field.
    """
    root = Fields(where, values)
    root.only(*ROOT_KEYS)
    for key, wanted in (("format", FORMAT), ("frame", "ego"), ("units", UNITS)):
        if root.get(key) != wanted:
            raise DataError(f"{root.at(key)} is {short(root.get(key))}; this version reads {short(wanted)}")
    boxes, lines = _entries(root, "boxes", BOX_KEYS), _entries(root, "lines", LINE_KEYS)
    points = [_rows(line, "points") for line in lines]
    if odd := [m for m, line in enumerate(points) if len(line) != len(points[0])]:
        raise DataError(
            f"{where}: lines[{odd[0]}] has {len(points[odd[0]])} points and lines[0] {len(points[0])}; all lines of a "
            "result have the same number"
        )
    count = len(points[0]) if points else 0
    spread = [_rows(line, "uncertainty", count) for line in lines]
    found_boxes = NumpyBoxes(
        **{name: _stacked([box.array(name, (size,)) for box in boxes], size)
           for name, size in BOX_NUMBERS.items()},
        velocity=_stacked([_velocity(box) for box in boxes], 2),
        yaw=_stacked([box.array("yaw", ()) for box in boxes]),
        label=_labels(boxes, "class", BOX_CLASSES),
        attribute=_labels(boxes, "attribute", ATTRIBUTES),
        score=_stacked([box.array("score", ()) for box in boxes]),
        valid=np.ones(len(boxes), bool),
    )  # fmt: skip
    found_lines = NumpyPolylines(
        points=_stacked(points, count, 2),
        closed=np.array([bool(_flags(line, "closed", ())) for line in lines], bool),
        label=_labels(lines, "class", LINE_CLASSES),
        score=_stacked([line.array("score", ()) for line in lines]),
        valid=np.ones(len(lines), bool),
        uncertainty=_stacked(spread, count, 2),
    )
    seen = NumpySeen(
        _stacked([box.array("seen", ()) for box in boxes]),
        np.array([_flags(line, "seen", (count,)) for line in lines], bool).reshape(len(lines), count),
    )
    warnings = _list(root, "warnings")
    if not all(isinstance(warning, str) for warning in warnings):
        raise DataError(f"{root.at('warnings')} is {short(warnings)}; give a list of text")
    has_ids = any("id" in entry for entry in (*boxes, *lines))
    ids = Ids(_ids(boxes), _ids(lines)) if has_ids else None
    return NumpyLiveObjects(found_boxes, found_lines, seen, tuple(warnings), _info(root), ids)


def as_tensors(result: NumpyLiveObjects) -> LiveObjects:
    """Converts a result to the types of PyTorch; needs torch."""
    import torch

    def tensor(array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).long() if array.dtype.kind == "i" else torch.from_numpy(array)

    return LiveObjects(
        Boxes(*map(tensor, result.boxes)),
        Polylines(*map(tensor, result.lines)),
        Seen(*map(tensor, result.seen)),
        *result[3:],
    )


def _info(root: Fields) -> StepInfo:
    memory, weights = root.section("memory"), root.section("weights")
    name, trained_on = weights.get("name"), weights.get("trained_on")
    if not isinstance(name, str | None):
        raise DataError(f"{weights.at('name')} is {short(name)}; give text or null")
    return StepInfo(
        time_s=None if root.get("time_s") is None else root.number("time_s"),
        global_from_ego=None if root.get("global_from_ego") is None else root.array("global_from_ego", (4, 4)),
        used_memory=bool(_flags(memory, "used", ())),
        no_memory_because=memory.text("reason"),
        weights=Weights(name, None if trained_on is None else dict(weights.section("trained_on").values)),
    )


def _id(ids: NDArray[Any] | None, m: int) -> dict[str, int]:
    return {} if ids is None or ids[m] < 0 else {"id": int(ids[m])}


def _ids(entries: list[Fields]) -> NDArray[np.int64]:
    found = [entry.number("id") if "id" in entry else -1 for entry in entries]
    return np.array(found, np.int64)


def _list(fields: Fields, key: str) -> list[Any]:
    value = fields.get(key)
    if not isinstance(value, list):
        raise DataError(f"{fields.at(key)} is {short(value)}; give a list")
    return value


def _entries(root: Fields, key: str, known: tuple[str, ...]) -> list[Fields]:
    entries = [Fields(f"{root.where}: {key}[{m}]", values) for m, values in enumerate(_list(root, key))]
    for entry in entries:
        entry.only(*known)
    return entries


def _rows(line: Fields, key: str, count: int | None = None) -> NDArray[np.float64]:
    """Numbers [count, 2] of a line, or [any, 2]."""
    count = len(_list(line, key)) if count is None else count
    return line.array(key, (count, 2))


def _velocity(box: Fields) -> NDArray[np.float64]:
    """Two numbers; null, for unknown, becomes NaN."""
    values = _list(box, "velocity")
    known = Fields(box.where, {"velocity": [0.0 if x is None else x for x in values]}).array("velocity", (2,))
    return np.where([x is None for x in values], np.nan, known)


def _flags(fields: Fields, key: str, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """True and false, in the given shape."""
    array = np.array(fields.get(key), object)
    if array.shape != shape or not all(isinstance(value, bool) for value in array.ravel()):
        wanted = f"a list of {shape[0]} times true or false" if shape else "true or false"
        raise DataError(f"{fields.at(key)} is {short(fields.get(key))}; give {wanted}")
    return array.astype(bool)


def _labels(entries: list[Fields], key: str, names: tuple[str, ...]) -> NDArray[np.int32]:
    """Indices of class names; null becomes -1."""
    allowed_null = names is ATTRIBUTES
    return np.array(
        [-1 if allowed_null and entry.get(key) is None else names.index(entry.text(key, names)) for entry in entries],
        np.int32,
    )


def _stacked(arrays: list[NDArray[np.float64]], *shape: int) -> NDArray[np.float32]:
    """Arrays of a shape as float32 with a leading axis, which may be empty."""
    return np.array(arrays, np.float64).reshape(len(arrays), *shape).astype(np.float32)
