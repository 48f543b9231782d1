"""Cuts the vector lines around the samples of a dataset from its maps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from perception.data.lane_map import LaneMap, Lines
from perception.geometry import invert_rigid, rigid_from_yaw, yaw_from_rotation
from perception.processes import in_processes, processors
from perception.types import LaneRange, MapLine

WIDE_MARGIN = LaneRange(24.0, 30.0)  # metres that the range of `wide_lines` is larger
MANY_SCENES = 16  # whose lines take longer than starting processes


def wide_range(lane_range: LaneRange) -> LaneRange:
    """Returns the larger range of the `wide_lines`, which augmentation cuts again after moving the ego frame."""
    return LaneRange(lane_range.x + WIDE_MARGIN.x, lane_range.y + WIDE_MARGIN.y)


def lines_of_samples(
    dataroot: Path,
    maps: list[bytes],
    scene: np.ndarray,
    global_from_ego: np.ndarray,
    ego_from_lidar: np.ndarray,
    lane_ranges: Sequence[LaneRange],
    title: str,
) -> list[Lines]:
    """Cuts the lines of all samples by the MapTR protocol, in several processes if there are many scenes.

    Args:
        dataroot: folder of the maps.
        maps: path of the map of each scene.
        scene: [S] number of each sample's scene.
        global_from_ego, ego_from_lidar: [S, 4, 4].
        lane_ranges: extents of the patches.
        title: of the progress bar.

    Returns:
        Lines in the ego frame for each range, with float32 vertices.

    Raises:
        DataError: a map is missing or malformed.
    """
    lane_maps = {path: LaneMap(dataroot / os.fsdecode(path)) for path in dict.fromkeys(maps)}
    blocks = np.split(np.arange(len(scene)), np.flatnonzero(np.diff(scene)) + 1)

    def cut(rows: np.ndarray) -> list[Lines]:
        lane_map, poses = lane_maps[maps[scene[rows[0]]]], (global_from_ego[rows], ego_from_lidar[rows])
        found = [lines_around_all(lane_map, *poses, lane_range) for lane_range in lane_ranges]
        return [lines._replace(vertices=lines.vertices.astype(np.float32)) for lines in found]

    parts = in_processes(cut, blocks, processors() if len(blocks) >= MANY_SCENES else 1)
    found = list(tqdm(parts, total=len(blocks), desc=title, unit="scene", delay=2))
    return [join(list(of_range)) for of_range in zip(*found, strict=True)]


def join(parts: list) -> Any:
    """Concatenates NamedTuples of arrays field by field; offsets (fields named *_offset) are shifted."""
    joined = {}
    for name in parts[0]._fields:
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], tuple):
            joined[name] = join(values)
        elif name.endswith("_offset"):
            starts = np.cumsum([0, *(value[-1] for value in values)])
            joined[name] = np.concatenate(
                [[0], *(value[1:] + start for value, start in zip(values, starts, strict=False))]
            )
        else:
            joined[name] = np.concatenate(values)
    return type(parts[0])(**joined)


def ego_from_patch(global_from_ego: np.ndarray, ego_from_lidar: np.ndarray) -> np.ndarray:
    """Returns the pose of MapTR's map patch in the ego frame: [4, 4], x ahead, y left, centred at LIDAR_TOP.

    The patch takes LIDAR_TOP's position and yaw. A map has no heights, so both frames are projected to the global xy
    plane: only position and yaw count.
    """
    global_from_lidar = global_from_ego @ ego_from_lidar
    ahead = float(yaw_from_rotation(global_from_lidar)) + np.pi / 2  # LiDAR y points ahead
    global_from_patch = rigid_from_yaw(ahead, (*global_from_lidar[:2, 3], 0.0))
    level = rigid_from_yaw(float(yaw_from_rotation(global_from_ego)), (*global_from_ego[:2, 3], 0.0))
    return invert_rigid(level) @ global_from_patch


def lines_around(
    lanes: LaneMap,
    global_from_ego: np.ndarray,
    ego_from_lidar: np.ndarray,
    lane_range: LaneRange,
    protocol: str = "maptr",
) -> list[MapLine]:
    """Cuts the lines around a pose by the patch of a published protocol.

    Args:
        lanes: the map of the location.
        global_from_ego, ego_from_lidar: [4, 4].
        lane_range: extent of the patch.
        protocol: "maptr", whose patch has LIDAR_TOP's position and yaw, or "streammapnet", whose patch has those of
            the ego frame.

    Returns:
        Lines in the ego frame.

    Raises:
        ConfigError: the protocol is unknown.
    """
    return lines_around_all(lanes, global_from_ego[None], ego_from_lidar[None], lane_range, protocol).of_sample(0)


def lines_around_all(
    lanes: LaneMap,
    global_from_ego: np.ndarray,
    ego_from_lidar: np.ndarray,
    lane_range: LaneRange,
    protocol: str = "maptr",
) -> Lines:
    """Cuts the lines around each of B poses [B, 4, 4], see `lines_around`."""
    if protocol != "maptr":
        yaws = yaw_from_rotation(global_from_ego)
        return lanes.lines_of_patches(global_from_ego[:, :2, 3], yaws, lane_range, protocol)
    global_from_lidar = global_from_ego @ ego_from_lidar
    yaws = yaw_from_rotation(global_from_lidar) + np.pi / 2
    found = lanes.lines_of_patches(global_from_lidar[:, :2, 3], yaws, lane_range)
    moved = found.vertices
    bounds = found.vertex_offset[found.sample_offset].tolist()
    for pose, lidar, start, stop in zip(global_from_ego, ego_from_lidar, bounds[:-1], bounds[1:], strict=True):
        if stop > start:
            ego_from = ego_from_patch(pose, lidar)
            moved[start:stop] = moved[start:stop] @ ego_from[:2, :2].T + ego_from[:2, 3]
    return found
