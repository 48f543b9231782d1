"""Reads samples in the info format of mmdet3d v1.1 (as JSON), and vector maps that belong to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perception.data.lane_map import cut_lines
from perception.data.loader import decode_image, pad_boxes, pad_lines
from perception.data.nuscenes import NUSCENES_CAMERAS
from perception.errors import DataError
from perception.geometry import invert_rigid, transform_points, wrap_angle, yaw_from_rotation
from perception.types import (
    BOX_CLASSES,
    DEFAULT_LANE_RANGE,
    LINE_CLASSES,
    Boxes,
    CameraRig,
    Clip,
    Frame,
    FrameObjects,
    LaneRange,
    MapLine,
)

_LINE_KINDS = {"lane_divider": "divider", "road_divider": "divider", "ped_crossing": "ped_crossing",
               "drivable_boundary": "boundary"}  # fmt: skip


def load_info_clip(
    json_path: str | Path,
    index: int = 0,
    *,
    image_size: tuple[int, int],
    cameras: tuple[str, ...] = NUSCENES_CAMERAS,
    points_per_line: int = 20,
) -> Clip:
    """Loads one sample of an info file as a clip of one frame, T = 1.

    Boxes are transformed from the LiDAR frame (x y z length width height yaw, z at the geometric centre) to the ego
    frame. All boxes are kept in the file's order. A box is valid if the file marks it as valid and its class is one of
    BOX_CLASSES; other classes get label -1. `lidar2cam` already holds the motion between the LiDAR's and the camera's
    exposure. There are no lines.

    Args:
        json_path: `{"metainfo": ..., "data_list": [...]}`; image paths are relative to its folder.
        index: entry of `data_list`.
        image_size: height and width of the images, see `fit_image`.
        cameras: channels, in order; one that the entry lacks is marked as not present.
        points_per_line: P of the (empty) ground truth lines.

    Raises:
        DataError: the file or an image is missing, or a field is missing or malformed.
    """
    path = Path(json_path)
    categories, info = _entry(path, index)
    ego_from_lidar = _matrix(path, info, ("lidar_points", "lidar2ego"), (4, 4))
    N = len(cameras)
    images = torch.zeros(1, N, 3, *image_size, dtype=torch.uint8)  # [T, N, 3, H, W]
    img_from_cam, ego_from_cam = np.tile(np.eye(3), (N, 1, 1)), np.tile(np.eye(4), (N, 1, 1))
    present = torch.tensor([[camera in info["images"] for camera in cameras]])  # [T, N]
    for camera, channel in enumerate(cameras):
        if channel not in info["images"]:
            continue
        stored_from_cam = _matrix(path, info, ("images", channel, "cam2img"), (3, 3))
        cam_from_lidar = _matrix(path, info, ("images", channel, "lidar2cam"), (4, 4))
        ego_from_cam[camera] = ego_from_lidar @ invert_rigid(cam_from_lidar)
        image_path = path.parent / info["images"][channel]["img_path"]
        images[0, camera], img_from_cam[camera] = decode_image(image_path, stored_from_cam, image_size)
    frames = Frame(
        images=images,
        rig=CameraRig(
            torch.from_numpy(img_from_cam).float()[None], torch.from_numpy(ego_from_cam).float()[None], present
        ),
        ego_from_prev=torch.eye(4)[None],
        seconds_since_prev=torch.zeros(1),
        is_first=torch.ones(1, dtype=torch.bool),
    )
    gt = FrameObjects(pad_boxes([_boxes(path, info, categories, ego_from_lidar)]), pad_lines([[]], points_per_line))
    return Clip(frames, gt, torch.tensor([index]))


def load_info_poses(json_path: str | Path, index: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Loads global_from_ego and ego_from_lidar, [4, 4] float64 each, of one sample of an info file."""
    path = Path(json_path)
    _, info = _entry(path, index)
    return _matrix(path, info, ("ego2global",), (4, 4)), _matrix(path, info, ("lidar_points", "lidar2ego"), (4, 4))


def load_map_vectors(
    json_path: str | Path, global_from_ego: np.ndarray, lane_range: LaneRange = DEFAULT_LANE_RANGE
) -> list[MapLine]:
    """Loads the lines around a pose from a file of global polylines, `{"features": [{"kind", "polyline"}]}`.

    Args:
        json_path: the file; kinds other than dividers, crossings and the drivable boundary are left out.
        global_from_ego: [4, 4]; its position and yaw are used, a map has no heights.
        lane_range: extent of the lines to keep, along the ego frame's x and y.

    Returns:
        Lines in the ego frame.

    Raises:
        DataError: the file is missing or has no 'features'.
    """
    path = Path(json_path)
    yaw = yaw_from_rotation(global_from_ego)
    turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])  # global_from_ego in the plane
    lines = []
    for feature in _read(path, "features"):
        if feature["kind"] in _LINE_KINDS:
            points = (np.asarray(feature["polyline"], dtype=np.float64)[:, :2] - global_from_ego[:2, 3]) @ turn
            lines.append(MapLine(LINE_CLASSES.index(_LINE_KINDS[feature["kind"]]), points))
    return cut_lines(lines, lane_range)


def _read(path: Path, field: str) -> Any:
    """Reads one field of a JSON object."""
    try:
        return json.loads(path.read_bytes())[field]
    except FileNotFoundError:
        raise DataError(f"{path} is missing: give the path of a JSON file with '{field}'") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is not a JSON object with '{field}': give another file or add the field") from None


def _entry(path: Path, index: int) -> tuple[dict[int, str], dict]:
    """Reads the class names of the file's labels, and one entry of its list."""
    entries, metainfo = _read(path, "data_list"), _read(path, "metainfo")
    if not 0 <= index < len(entries):
        raise DataError(f"{path} has {len(entries)} entries in 'data_list': entry {index} does not exist; give a lower")
    names = {label: name for name, label in metainfo["categories"].items()}
    for field in ("images", "lidar_points", "instances", "ego2global"):
        if field not in entries[index]:
            raise DataError(f"{path}: entry {index} of 'data_list' has no '{field}'; add it")
    return names, entries[index]


def _matrix(path: Path, info: dict, keys: tuple[str, ...], shape: tuple[int, int]) -> np.ndarray:
    """Reads a matrix of finite numbers from nested fields."""
    value = info
    try:
        for key in keys:
            value = value[key]
        matrix = np.array(value, dtype=np.float64)
    except (KeyError, TypeError, ValueError):
        matrix = np.array(np.nan)
    if matrix.shape != shape or not np.isfinite(matrix).all():
        raise DataError(f"{path}: '{'.'.join(keys)}' must be {shape[0]} x {shape[1]} finite numbers")
    return matrix


def _boxes(path: Path, info: dict, categories: dict[int, str], ego_from_lidar: np.ndarray) -> Boxes:
    """Reads the boxes of one entry and transforms them to the ego frame."""
    instances = info["instances"]
    try:
        box = np.array([item["bbox_3d"] for item in instances], dtype=np.float64).reshape(-1, 7)
        velocity = np.array([item["velocity"] for item in instances], dtype=np.float64).reshape(-1, 2)
        names = [categories.get(item["bbox_label_3d"]) for item in instances]
        valid = np.array([item["bbox_3d_isvalid"] for item in instances], dtype=bool)
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: a record of 'instances' is malformed ({error})") from None
    label = np.array([BOX_CLASSES.index(name) if name in BOX_CLASSES else -1 for name in names], dtype=np.int64)
    flat_velocity = np.concatenate([velocity, np.zeros((len(box), 1))], axis=1)  # [M, 3]
    return Boxes(
        center=torch.from_numpy(transform_points(ego_from_lidar, box[:, :3])).float(),
        size=torch.from_numpy(box[:, 3:6]).float(),
        yaw=torch.from_numpy(wrap_angle(box[:, 6] + yaw_from_rotation(ego_from_lidar))).float(),
        velocity=torch.from_numpy((flat_velocity @ ego_from_lidar[:3, :3].T)[:, :2]).float(),
        label=torch.from_numpy(label),
        attribute=torch.full((len(box),), -1),
        score=torch.ones(len(box)),
        valid=torch.from_numpy(valid & (label >= 0)),
        uncertainty=torch.zeros(len(box), 9),
    )
