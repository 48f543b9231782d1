"""Writes the thirteen tables of https://www.nuscenes.org/nuscenes#data-format from the rows of all scenes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pyquaternion import Quaternion

from perception.synthetic.map_images import PRIOR_NAMES
from perception.synthetic.sensors import LIDAR_NAME
from perception.synthetic.town import LOCATIONS
from perception.types import ATTRIBUTES

CATEGORIES = (
    "human.pedestrian.adult", "human.pedestrian.child", "human.pedestrian.wheelchair", "human.pedestrian.stroller",
    "human.pedestrian.personal_mobility", "human.pedestrian.police_officer", "human.pedestrian.construction_worker",
    "animal", "vehicle.car", "vehicle.motorcycle", "vehicle.bicycle", "vehicle.bus.bendy", "vehicle.bus.rigid",
    "vehicle.truck", "vehicle.construction", "vehicle.emergency.ambulance", "vehicle.emergency.police",
    "vehicle.trailer", "movable_object.barrier", "movable_object.trafficcone", "movable_object.pushable_pullable",
    "movable_object.debris", "static_object.bicycle_rack",
)  # fmt: skip
_VISIBILITIES = ("v0-40", "v40-60", "v60-80", "v80-100")


def record_token(*parts: object) -> str:
    """Returns the token of a record: a hash of its parts."""
    return hashlib.md5("/".join(map(str, parts)).encode()).hexdigest()


def linked_rows(rows: list[dict]) -> list[dict]:
    """Adds prev and next to consecutive rows."""
    tokens = ["", *(row["token"] for row in rows), ""]
    return [row | {"prev": tokens[i], "next": tokens[i + 2]} for i, row in enumerate(rows)]


def pose_fields(pose: np.ndarray) -> dict[str, Any]:
    """Returns rotation and translation of a pose [4, 4] as fields of a record."""
    return {"rotation": Quaternion(matrix=pose, atol=1e-6).elements.tolist(), "translation": pose[:3, 3].tolist()}


def write_tables(folder: Path, seed: int, parts: list[dict[str, list[dict]]], cameras: Sequence[str]) -> None:
    """Writes the thirteen tables to a folder."""
    tables = {name: [row for part in parts for row in part[name]] for name in parts[0]}
    tables["category"] = [
        {"token": record_token("category", name), "name": name, "description": "", "index": i + 1}
        for i, name in enumerate(CATEGORIES)
    ]
    tables["attribute"] = [
        {"token": record_token("attribute", name), "name": name, "description": ""} for name in ATTRIBUTES
    ]
    tables["visibility"] = [
        {"token": str(i + 1), "level": level, "description": f"visible share of the object: {level[1:]} %"}
        for i, level in enumerate(_VISIBILITIES)
    ]
    tables["sensor"] = [
        {
            "token": record_token("sensor", channel),
            "channel": channel,
            "modality": "lidar" if channel == LIDAR_NAME else "camera",
        }
        for channel in (*cameras, LIDAR_NAME)
    ]
    tables["map"] = []
    for location in LOCATIONS:
        logs = [row["token"] for row in tables["log"] if row["location"] == location]
        if not logs:
            continue
        row = {"category": "semantic_prior", "token": record_token(seed, "map", location)}
        tables["map"].append(row | {"filename": f"maps/{PRIOR_NAMES[location]}.png", "log_tokens": logs})
    folder.mkdir()
    for name, rows in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=0), encoding="utf-8")
