"""What goes into an exported network and what comes out: written at export, read by whoever runs it, without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from perception.errors import CheckpointError
from perception.files import write_json
from perception.live import MAX_GAP
from perception.types import BOX_CLASSES, LINE_CLASSES

CONTRACT, MODEL = "contract.json", "model.onnx"
FORMAT = "perception-export-1"  # changes when old folders can no longer be read

MEANING = {
    "images": "RGB, 0..255, rows from the top; what stands for a missing camera is ignored",
    "img_from_cam": "pinhole calibration in pixels of the images given, pixel centres at +0.5",
    "ego_from_cam": "pose of each camera at its own exposure, carried to the time of the moment, metres; camera axes x "
    "right, y down, z ahead; ego axes x ahead, y left, z up, on the ground below the rear axle; identity if missing",
    "present": "false for a camera that is missing",
    "ego_from_prev": "takes points of the ego frame of the moment before to the present one; metres; identity if first",
    "seconds_since_prev": "seconds since the moment before, 0 if first",
    "is_first": "true where the memory must not count: the first moment, or after a gap",
    "memory": "new_memory of the moment before; anything finite if first",
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
    checked: Mapping[str, Sequence[str]],
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
        checked: by runtime, how it was checked that it reads the graph as ONNX defines it; from
            `perception.export.dialect`, empty for a runtime that the graph is not for.
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
            "checked": {runtime: list(checks) for runtime, checks in checked.items()},
            "engines": {},
            "cameras": int(inputs["present"].shape[0]),
            "max_gap_s": MAX_GAP,
            "box_classes": list(BOX_CLASSES),
            "line_classes": list(LINE_CLASSES),
            "inputs": described(inputs),
            "outputs": described(outputs),
            "sha256": dict(sha256),
        },
    )


def read_contract(folder: str | Path) -> dict:
    """The contract of an exported folder, with the hashes of its files checked.

    Raises:
        CheckpointError: the folder is none of an export, is of another version, or a file has changed.
    """
    path = Path(folder, CONTRACT)
    try:
        contract = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; give a folder that scripts/export.py wrote") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); export again") from None
    if contract.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format is {contract.get('format')!r}, not {FORMAT!r}; export again")
    for name, wanted in contract["sha256"].items():
        file = Path(folder, name)
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; export again")
        if hashlib.sha256(file.read_bytes()).hexdigest() != wanted:
            raise CheckpointError(f"{file} is not the file that {path} was written for; export again")
    return contract
