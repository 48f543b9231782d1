"""Describes the inputs and outputs of an export in a JSON file, the contract.

The export writes the contract, and every runtime reads it, without torch. Each camera has one input (`image_0`,
`image_1`, ...) in the size and format of `ImageInputs`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod
from pathlib import Path

import numpy as np

from perception.commands import command
from perception.errors import CheckpointError, ConfigError, DataError
from perception.export.export_rig import ExportRig, fault_of
from perception.files import write_json
from perception.inference.ego_motion import JUMP_MARGIN_M, JUMP_MARGIN_RAD, MAX_GAP, MAX_SPEED, MAX_TURN_RATE
from perception.reading import number, short
from perception.types import BOX_CLASSES, LINE_CLASSES, Weights

CONTRACT, MODEL = "contract.json", "model.onnx"
FORMAT = "perception-export-3"  # changes when this version cannot read older folders
MAX_SIDE = 16384  # pixels
DTYPES = ("bool", "uint8", "int32", "int64", "float16", "float32")
# Required fields and their types.
FIELDS = {
    "precision": (str,), "cameras": (int,), "inputs": (list,), "outputs": (list,), "sha256": (dict,),
    "engines": (dict,), "image_size": (list,), "raw_size": (list,), "image_format": (str,), "quantization": (dict,),
    "checked": (dict,), "network": (str,),
}  # fmt: skip
# Rules of the memory, for programs that do without this library.
LIMITS = ("max_gap_s", "max_speed_m_s", "max_turn_rate_rad_s", "jump_margin_m", "jump_margin_rad")
GEOMETRY = {"img_from_cam", "ego_from_cam", "present", "ego_from_prev", "seconds_since_prev", "is_first"}
FIXED = ("img_from_cam", "ego_from_cam")  # inputs that a graph with a fixed rig does not read
ENGINE_FIELDS = ("file", "gpu", "package", "package_version")

_NV12 = "NV12 [H * 3/2, W]: luma, then one pair of Cb and Cr per 2 x 2 pixels, rows without padding; "
IMAGE_FORMATS = {
    "rgb": "RGB [H, W, 3], 0..255",
    "bgr": "BGR [H, W, 3], 0..255",
    "rgb-chw": "RGB [3, H, W], 0..255",
    "bgr-chw": "BGR [3, H, W], 0..255",
    "nv12": _NV12 + "BT.601, luma 16..235 (NVIDIA: NV12, REC601_SR)",
    "nv12-er": _NV12 + "BT.601, luma 0..255 (NVIDIA: NV12_ER, REC601_ER)",
    "nv12-709": _NV12 + "BT.709, luma 16..235 (NVIDIA: NV12_709, REC709_SR)",
    "nv12-709-er": _NV12 + "BT.709, luma 0..255 (NVIDIA: NV12_709_ER, REC709_ER)",
}
MEANING = {
    "img_from_cam": "pinhole intrinsics in pixels of the given images, pixel centres at +0.5",
    "ego_from_cam": "pose of each camera at its own exposure time, in the ego frame at the time of the frame, metres; "
    "camera axes x right, y down, z forward; ego axes x forward, y left, z up, origin on the ground below the rear "
    "axle; identity for a missing camera",
    "present": "false for a missing camera",
    "ego_from_prev": "transforms points from the previous ego frame to this one, metres; identity if first",
    "seconds_since_prev": "seconds since the previous frame, 0 if first",
    "is_first": "true if the memory must be ignored: in the first frame; if the previous frame was more than max_gap_s "
    "ago; if the pose has jumped since then, which is a distance above max_speed_m_s * seconds + jump_margin_m or an "
    "angle about any axis above max_turn_rate_rad_s * seconds + jump_margin_rad; after an output that is not finite",
    "ego_from_lidar": "pose of the LiDAR frame (x right, y ahead, z up) in the ego frame, metres; the network was "
    "trained in it, and a vehicle without a LiDAR gives the one of the training data",
    "memory": "new_memory of the previous frame; any finite values if first, so fill it with zeros after an output "
    "that is not finite",
    "box_center": "centre of the boxes, metres, ego frame",
    "box_size": "length (along the heading), width, height, metres",
    "box_yaw": "heading from ego x towards ego y, radians",
    "box_velocity": "over ground, along ego x and y, m/s",
    "box_label": "index into box_classes",
    "box_score": "0..1, highest first",
    "box_valid": "false for a box that circle NMS suppressed; ignore it",
    "box_uncertainty": "expected absolute error of centre (m), log size, yaw (rad) and velocity (m/s)",
    "line_points": "metres, ego frame; the last point of a closed line is its first point again",
    "line_closed": "true for a closed line",
    "line_label": "index into line_classes",
    "line_score": "0..1, highest first",
    "line_uncertainty": "expected absolute error of each point along ego x and y, metres",
    "box_id": "of the tracked object, the same from frame to frame",
}
MEMORY_PARTS = {  # of networks whose memory has several parts
    "memory_boxes_feature": "features of the remembered instances",
    "memory_boxes_anchor": "their boxes in the LiDAR frame of the previous frame: centre (m), logarithms of length, "
    "width and height (m), sin and cos of the yaw, velocity (m/s)",
    "memory_boxes_confidence": "their confidence, 0..1",
    "memory_boxes_ids": "their ids; the graph gives new ids by counting",
    "memory_boxes_next_id": "the next new id; zeros start anew",
    "memory_lines_feature": "features of the remembered lines",
    "memory_lines_anchor": "their points in the LiDAR frame of the previous frame, metres",
    "memory_lines_confidence": "their confidence, 0..1",
    "memory_lines_ids": "their ids",
    "memory_lines_next_id": "the next new id of a line",
}
RAW_MEANING = "output of the last decoder layer before decoding, for comparisons"  # of outputs with the prefix raw_


@dataclass(frozen=True)
class ImageInputs:
    """Sizes and format of the camera images that an export takes.

    Args:
        sizes: height and width in pixels for each camera.
        image_format: one of IMAGE_FORMATS, the same for all cameras.

    Raises:
        ConfigError: the format is unknown, or a size is out of range or impossible in this format.
    """

    sizes: tuple[tuple[int, int], ...]
    image_format: str = "rgb"

    def __post_init__(self) -> None:
        if self.image_format not in IMAGE_FORMATS:
            raise ConfigError(f"image format {self.image_format!r} is not known; use one of {', '.join(IMAGE_FORMATS)}")
        for n, (H, W) in enumerate(self.sizes):
            if not (1 <= H <= MAX_SIDE and 1 <= W <= MAX_SIDE):
                raise ConfigError(
                    f"the raw size of camera {n} is {H}x{W}; give height and width from 1 to {MAX_SIDE} pixels"
                )
            if self.is_nv12 and (H % 2 or W % 2):
                raise ConfigError(
                    f"the raw size of camera {n} is {H}x{W}; {self.image_format} needs even numbers, because one "
                    "pair of Cb and Cr belongs to 2 x 2 pixels"
                )

    @classmethod
    def of_rig(
        cls,
        cameras: int,
        image_size: tuple[int, int],
        raw_size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        image_format: str = "rgb",
    ) -> ImageInputs:
        """Creates the description for a number of cameras.

        Args:
            cameras: number of cameras.
            image_size: height and width of the network's images.
            raw_size: height and width of the camera images, one pair for all cameras or one pair for each; None if they
                have the network's size.
            image_format: one of IMAGE_FORMATS.

        Raises:
            ConfigError: the format or a size is invalid, there is no camera, or the number of sizes is neither one nor
                the number of cameras.
        """
        if cameras < 1:
            raise ConfigError(f"cameras is {cameras}; give at least 1")
        try:
            sizes = np.atleast_2d(np.asarray(image_size if raw_size is None else raw_size))
        except ValueError:  # rows of different lengths
            sizes = np.zeros(0)
        if sizes.ndim != 2 or sizes.shape[1] != 2 or sizes.dtype.kind not in "iu":
            raise ConfigError(f"raw size {raw_size!r} is not (height, width) in pixels, nor one such pair per camera")
        if len(sizes) not in (1, cameras):
            raise ConfigError(
                f"{len(sizes)} raw sizes were given for {cameras} cameras; give one for all, or one for each"
            )
        pairs = [(int(H), int(W)) for H, W in sizes]
        return cls(tuple(pairs * cameras if len(pairs) == 1 else pairs), image_format)

    @classmethod
    def of_contract(cls, contract: dict) -> ImageInputs:
        """Creates the description from a contract."""
        return cls(tuple((H, W) for H, W in contract["raw_size"]), contract["image_format"])

    @property
    def is_nv12(self) -> bool:
        """True for the NV12 formats."""
        return self.image_format.startswith("nv12")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the inputs, one per camera."""
        return tuple(f"image_{n}" for n in range(len(self.sizes)))

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of one image."""
        if self.is_nv12:
            return ("H * 3/2", "W")
        return ("3", "H", "W") if self.image_format.endswith("chw") else ("H", "W", "3")

    def shape(self, n: int) -> tuple[int, ...]:
        """Returns the shape of the image of camera n."""
        H, W = self.sizes[n]
        if self.is_nv12:
            return (H * 3 // 2, W)
        return (3, H, W) if self.image_format.endswith("chw") else (H, W, 3)

    def checked(self, n: int, image: object) -> np.ndarray:
        """Returns the image of camera n after checking it.

        Raises:
            DataError: it has another type or shape.
        """
        expected = self.shape(n)
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape == expected:
            return image
        what = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise DataError(
            f"images[{n}] is {what}; the network was exported for {self.image_format} of {self.sizes[n][0]} x "
            f"{self.sizes[n][1]} pixels (height x width) there: give uint8 {expected}"
        )


def write_contract(
    path: Path,
    *,
    inputs: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.ndarray],
    sha256: Mapping[str, str],
    network: str,
    weights: Weights,
    image_size: tuple[int, int],
    images: ImageInputs,
    precision: str,
    opset: int,
    layers: Mapping[str, Mapping[str, int]],
    quantization: dict,
    checked: Mapping[str, Sequence[str]],
    version: str,
    export_rig: ExportRig | None = None,
) -> None:
    """Writes the contract of an export.

    Args:
        path: of the file.
        inputs, outputs: example arrays by name, for shapes and types.
        sha256: hashes by file name.
        network: name of the network class.
        weights: which ones it has.
        image_size: height and width of the network's images.
        images: sizes and format of the camera images.
        precision: of the export.
        opset: of the graph.
        layers: number of operators by kind and type, from `perception.export.onnx.layer_types`.
        quantization: the report of `quantize_graph`, empty for an export that is not quantized.
        checked: by runtime, the checks that it reads the graph as ONNX defines it, from `perception.export.dialect`;
            empty for a runtime that the graph is not for.
        version: of the library.
        export_rig: the calibration that the graph holds; None for a graph that takes it as inputs.
    """

    image = IMAGE_FORMATS[images.image_format] + ", rows from the top; ignored while the camera is missing"
    meaning = MEANING | dict.fromkeys(images.names, image)
    meaning |= {name: RAW_MEANING for name in outputs if name.startswith("raw_")}
    for name in memory_names(inputs):
        text = MEANING["memory"].replace("new_memory", f"new_{name}")
        meaning[name] = f"{MEMORY_PARTS[name]}; {text}" if name in MEMORY_PARTS else text
        meaning[f"new_{name}"] = f"the {name} input of the next frame"
    if export_rig:
        meaning |= {name: f"not read: fixed in the graph, see calibration; {meaning[name]}" for name in FIXED}

    def described(arrays: Mapping[str, np.ndarray]) -> list[dict]:
        return [
            {"name": name, "shape": list(x.shape), "dtype": str(x.dtype), "meaning": meaning[name]}
            for name, x in arrays.items()
        ]

    write_json(
        path,
        {
            "format": FORMAT,
            "version": version,
            "network": network,
            "weights": {"name": weights.name, "trained_on": weights.trained_on},
            "precision": precision,
            "opset": opset,
            "image_size": list(image_size),
            "raw_size": [list(size) for size in images.sizes],
            "image_format": images.image_format,
            "layers": {kind: dict(types) for kind, types in layers.items()},
            "quantization": quantization,
            "checked": {runtime: list(checks) for runtime, checks in checked.items()},
            "engines": {},
            "cameras": len(images.sizes),
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
        }
        | ({"calibration": export_rig.as_dict()} if export_rig else {}),
    )


def memory_names(names: Iterable[str]) -> list[str]:
    """Returns those of the names of inputs that are parts of the memory; the outputs are called `new_` and the same."""
    return [name for name in names if name == "memory" or name.startswith("memory_")]


def comparable_memory(memory: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Joins the parts of a memory for comparisons.

    Args:
        memory: its parts [1, ...] by name.

    Returns:
        A single part as a flat array. Of instances their parts as rows [T, C], whose order is not defined where two
        have the same confidence. Ids are left out, because the order decides which instance gets which.
    """
    if set(memory) <= {"memory"}:
        return {name: part.ravel() for name, part in memory.items()}
    kinds: dict[str, list[np.ndarray]] = {}
    for name, part in memory.items():
        if part.dtype.kind == "f":
            kinds.setdefault("_".join(name.split("_")[:2]), []).append(part[0].reshape(part.shape[1], -1))
    return {kind: np.concatenate(parts, 1) for kind, parts in kinds.items()}


def read_contract(folder: str | Path) -> dict:
    """Reads the contract of an exported folder and checks the hashes of its files.

    Raises:
        CheckpointError: the folder does not hold an export, or one of another version; a file has changed; the contract
            is damaged, has no hash for a file that is run, or names a file outside the folder.
    """
    if not isinstance(folder, str | Path):
        raise CheckpointError(f"the folder of an export is {type(folder).__name__}; give its path")
    path = Path(folder, CONTRACT)
    try:
        contract = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} is missing; give a folder that `{command('export')}` wrote") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); make it readable") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); export again") from None
    if not isinstance(contract, dict):
        raise CheckpointError(f"{path} holds {type(contract).__name__}, not an object; export again")
    if contract.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format is {short(contract.get('format'))}, not {FORMAT}; export again")
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


def _is_finite(value: object) -> bool:
    """Whether a value of a JSON file can be written as JSON again, which holds no NaN and no infinity."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def _fault(contract: dict) -> str:
    """Returns the first error in a contract as text, empty for none."""
    for key, kinds in FIELDS.items():
        if key not in contract:
            return f"{key} is missing"
        if not isinstance(contract[key], kinds) or isinstance(contract[key], bool):
            return f"{key} is of type {type(contract[key]).__name__}, not {kinds[0].__name__}"
    if contract["cameras"] < 1:
        return f"cameras is {contract['cameras']}, not 1 or more"
    for side in ("inputs", "outputs"):
        for index, entry in enumerate(contract[side]):
            if not _describes_array(entry):
                return f"{side}[{index}] has no name, no shape of whole numbers above 0, or no dtype of {DTYPES}"
    sizes = contract["raw_size"]
    if len(sizes) != contract["cameras"] or not all(map(_is_size, sizes)):
        return "raw_size does not hold height and width of each camera's images"
    if not _is_size(contract["image_size"]):
        return f"image_size is {short(contract['image_size'])}, not height and width"
    if contract["image_format"] not in IMAGE_FORMATS:
        return f"image_format is {short(contract['image_format'])}, not one of {', '.join(IMAGE_FORMATS)}"
    try:
        images = ImageInputs.of_contract(contract)
    except ConfigError as error:
        return str(error)
    shapes = {entry["name"]: tuple(entry["shape"]) for entry in contract["inputs"]}
    if lacking := sorted((GEOMETRY | set(images.names)) - shapes.keys()):
        return f"inputs has no {lacking[0]}"
    if other := [name for n, name in enumerate(images.names) if shapes[name] != images.shape(n)]:
        return f"the shape of {other[0]} is not that of its raw_size and image_format"
    for side in ("inputs", "outputs"):
        names = [entry["name"] for entry in contract[side]]
        if len(set(names)) < len(names):
            return f"{side} names {short(next(name for name in names if names.count(name) > 1))} twice"
    for key, classes in (("box_classes", BOX_CLASSES), ("line_classes", LINE_CLASSES)):
        if contract.get(key, [*classes]) != [*classes]:
            return f"{key} is not the list of this version"
    for key in LIMITS:
        if key in contract and (isinstance(contract[key], bool) or not 0 <= number(contract[key]) < inf):
            return f"{key} is {short(contract[key])}, not a finite number of at least 0"
    weights = contract.get("weights", {})  # older contracts have none
    if not (
        isinstance(weights, dict)
        and isinstance(weights.get("name"), str | None)
        and isinstance(weights.get("trained_on"), dict | None)
        and _is_finite(weights)
    ):
        return f"weights is {short(weights)}, not a name and what they were trained on"
    if "calibration" in contract and (fault := fault_of(contract["calibration"], contract["cameras"])):
        return fault
    for runtime, checks in contract["checked"].items():
        if not isinstance(checks, list) or not all(isinstance(check, str) for check in checks):
            return f"checked[{short(runtime)}] is not a list of text"
    for target, engine in contract["engines"].items():
        if not isinstance(engine, dict) or not all(isinstance(engine.get(key), str) for key in ENGINE_FIELDS):
            return f"engines[{short(target)}] does not hold {', '.join(ENGINE_FIELDS)} as text"
    hashes = contract["sha256"]
    for name in (MODEL, *(engine["file"] for engine in contract["engines"].values())):
        if name not in hashes:
            return f"sha256 has no entry for {short(name)}, so changes of this file cannot be detected"
    for name, value in hashes.items():
        # Separators of Windows too, because the folder may be read there.
        parts = name.replace("\\", "/").split("/")
        if "" in parts or ".." in parts or ":" in name or "\0" in name:
            return f"sha256 names {short(name)}, which is not a file inside the folder"
        if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
            return f"sha256[{short(name)}] is not a SHA-256 in lower case"
    return ""


def _is_size(size: object) -> bool:
    return (
        isinstance(size, list) and len(size) == 2 and all(type(side) is int and 0 < side <= MAX_SIDE for side in size)
    )


def _describes_array(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and entry.get("dtype") in DTYPES
        and isinstance(entry.get("shape"), list)
        and all(type(size) is int and size > 0 for size in entry["shape"])
        and prod(entry["shape"]) < 2**31
    )


def check_graph(
    path: Path,
    contract: Mapping,
    inputs: Mapping[str, tuple[str, list[int]]],
    outputs: Mapping[str, tuple[str, list[int]]],
) -> None:
    """Checks that the inputs and outputs of a graph are those of its contract.

    Args:
        path: of the graph.
        contract: from `read_contract`.
        inputs, outputs: numpy type name and shape of those of the graph, by name.

    Raises:
        CheckpointError: a name, a type or a shape differs.
    """
    for side, found in (("inputs", inputs), ("outputs", outputs)):
        wanted = {x["name"]: (x["dtype"], x["shape"]) for x in contract[side]}
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise CheckpointError(
                    f"{path}: {side} {name} is {found.get(name)} in the graph and {wanted.get(name)} in the contract; "
                    "export again"
                )
