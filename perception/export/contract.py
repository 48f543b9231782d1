"""What goes into an exported network and what comes out: written at export, read by whoever runs it, without torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import NoneType

import numpy as np

from perception.errors import CheckpointError
from perception.files import write_json
from perception.live import JUMP_MARGIN_M, JUMP_MARGIN_RAD, MAX_GAP, MAX_SPEED, MAX_TURN_RATE
from perception.types import BOX_CLASSES, LINE_CLASSES

CONTRACT, MODEL = "contract.json", "model.onnx"
FORMAT = "perception-export-1"  # changes when old folders can no longer be read
DTYPES = ("bool", "uint8", "int32", "int64", "float16", "float32")
# What readers of a contract rely on.
FIELDS = {
    "precision": (str,), "cameras": (int,), "inputs": (list,), "outputs": (list,), "sha256": (dict,),
    "engines": (dict,), "image_size": (list,), "raw_size": (list, NoneType), "quantization": (dict,),
}  # fmt: skip
GEOMETRY = {"img_from_cam", "ego_from_cam", "present", "ego_from_prev", "seconds_since_prev", "is_first"}
ENGINE_FIELDS = ("file", "gpu", "package", "package_version")

MEANING = {
    "images": "RGB, 0..255, rows from the top; what stands for a missing camera is ignored",
    "img_from_cam": "pinhole calibration in pixels of the images given, pixel centres at +0.5",
    "ego_from_cam": "pose of each camera at its own exposure, carried to the time of the moment, metres; camera axes x "
    "right, y down, z ahead; ego axes x ahead, y left, z up, on the ground below the rear axle; identity if missing",
    "present": "false for a camera that is missing",
    "ego_from_prev": "takes points of the ego frame of the moment before to the present one; metres; identity if first",
    "seconds_since_prev": "seconds since the moment before, 0 if first",
    "is_first": "true where the memory must not count: at the first frame; if more than max_gap_s have passed since "
    "the frame before; if the pose has jumped since, which is a distance above max_speed_m_s * seconds + jump_margin_m "
    "or an angle about any axis above max_turn_rate_rad_s * seconds + jump_margin_rad; after an output that is not "
    "finite",
    "memory": "new_memory of the frame before; anything finite if first, so fill it with zeros after an output that "
    "is not finite",
    "box_center": "middle of the boxes, metres, ego frame",
    "box_size": "length (along the heading), width, height, metres",
    "box_yaw": "heading from ego x towards ego y, radians",
    "box_velocity": "over ground, along ego x and y, m/s",
    "box_label": "index into box_classes",
    "box_score": "0..1, best first",
    "box_valid": "false for a box that is too close to a better one of its class; leave it out",
    "box_spread": "expected error of centre (m), logarithms of size, yaw (rad) and velocity (m/s)",
    "line_points": "metres, ego frame; a closed line repeats its first point last",
    "line_closed": "whether it is closed",
    "line_label": "index into line_classes",
    "line_score": "0..1, best first",
    "line_spread": "expected error of each point along ego x and y, metres",
    "raw_box_logits": "last decoder layer before decoding, for comparisons",
    "raw_box_places": "last decoder layer before decoding, for comparisons",
    "raw_line_logits": "last decoder layer before decoding, for comparisons",
    "raw_line_places": "last decoder layer before decoding, for comparisons",
    "new_memory": "hand it in as memory at the next moment",
}


def write_contract(
    path: Path,
    *,
    inputs: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.ndarray],
    sha256: Mapping[str, str],
    network: str,
    image_size: tuple[int, int],
    raw_size: tuple[int, int] | None,
    precision: str,
    opset: int,
    layers: Mapping[str, Mapping[str, int]],
    quantization: dict,
    version: str,
) -> None:
    """Writes the contract of an export.

    Args:
        path: of the file.
        inputs, outputs: by name; examples whose shapes and types count.
        sha256: by file name.
        network, image_size, raw_size, precision, opset, version: what was exported, and how.
        layers: how many operators of each kind run in which type.
        quantization: what `perception.export.quantize` found out, empty for other precisions.
    """

    def described(arrays: Mapping[str, np.ndarray]) -> list[dict]:
        return [
            {"name": name, "shape": list(x.shape), "dtype": str(x.dtype), "meaning": MEANING[name]}
            for name, x in arrays.items()
        ]

    write_json(
        path,
        {
            "format": FORMAT,
            "version": version,
            "network": network,
            "precision": precision,
            "opset": opset,
            "image_size": list(image_size),
            "raw_size": list(raw_size) if raw_size else None,
            "layers": {kind: dict(types) for kind, types in layers.items()},
            "quantization": quantization,
            "engines": {},
            "cameras": int(inputs["present"].shape[0]),
            "max_gap_s": MAX_GAP,
            "max_speed_m_s": MAX_SPEED,
            "max_turn_rate_rad_s": MAX_TURN_RATE,
            "jump_margin_m": JUMP_MARGIN_M,
            "jump_margin_rad": JUMP_MARGIN_RAD,
            "box_classes": list(BOX_CLASSES),
            "line_classes": list(LINE_CLASSES),
            "inputs": described(inputs),
            "outputs": described(outputs),
            "sha256": dict(sha256),
        },
    )


def read_contract(folder: str | Path) -> dict:
    """Reads the contract of an exported folder and checks the hashes of its files.

    Raises:
        CheckpointError: the folder is none of an export, is of another version, or a file has changed; the contract is
            damaged, lacks the hash of a file that is run, or names a file outside the folder.
    """
    if not isinstance(folder, str | Path):
        raise CheckpointError(f"the folder of an export is {type(folder).__name__}; give its path")
    path = Path(folder, CONTRACT)
    try:
        contract = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} is missing; give a folder that scripts/export.py wrote") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); make it readable") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); export again") from None
    if not isinstance(contract, dict):
        raise CheckpointError(f"{path} holds {type(contract).__name__}, not an object; export again")
    if contract.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format is {contract.get('format')!r}, not {FORMAT!r}; export again")
    if fault := _fault(contract):
        raise CheckpointError(f"{path}: {fault}; export again")
    for name, wanted in contract["sha256"].items():
        file = Path(folder, name)
        try:
            content = file.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointError(f"{file} is missing; export again") from None
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error.strerror}); export again") from None
        if hashlib.sha256(content).hexdigest() != wanted:
            raise CheckpointError(f"{file} is not the file that {path} was written for; export again")
    return contract


def _fault(contract: dict) -> str:
    """What a runtime would stumble over in a contract, empty if nothing."""
    for key, kinds in FIELDS.items():
        if key not in contract:
            return f"{key} is missing"
        if not isinstance(contract[key], kinds):
            return f"{key} is of type {type(contract[key]).__name__}, not {kinds[0].__name__}"
    if contract["cameras"] < 1:
        return f"cameras is {contract['cameras']}, not 1 or more"
    for side in ("inputs", "outputs"):
        for place, entry in enumerate(contract[side]):
            if not _describes_array(entry):
                return f"{side}[{place}] has no name, no shape of whole numbers above 0, or no dtype of {DTYPES}"
    names = {entry["name"] for entry in contract["inputs"]}
    if lacking := sorted(GEOMETRY - names):
        return f"inputs has no {lacking[0]}"
    for target, engine in contract["engines"].items():
        if not isinstance(engine, dict) or not all(isinstance(engine.get(key), str) for key in ENGINE_FIELDS):
            return f"engines[{target!r}] does not hold {', '.join(ENGINE_FIELDS)} as text"
    hashes = contract["sha256"]
    for name in (MODEL, *(engine["file"] for engine in contract["engines"].values())):
        if name not in hashes:
            return f"sha256 has no entry for {name}, so that nothing shows whether it has changed"
    for name, value in hashes.items():
        # Wherever the folder is read, also on Windows.
        parts = name.replace("\\", "/").split("/")
        if "" in parts or ".." in parts or ":" in name or "\0" in name:
            return f"sha256 names {name!r}, which is no file inside the folder"
        if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
            return f"sha256[{name!r}] is no SHA-256 in lower case"
    return ""


def _describes_array(entry) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and entry.get("dtype") in DTYPES
        and isinstance(entry.get("shape"), list)
        and all(type(size) is int and size > 0 for size in entry["shape"])
        and prod(entry["shape"]) < 2**31
    )
