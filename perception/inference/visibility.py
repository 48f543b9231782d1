"""Computes which boxes and line points a camera can see now, or could see while the memory lasted, with numpy alone.

A point is seen if it is projected into the part of a present camera's image that the network gets. What the memory has
seen is kept in a map of cells around the vehicle. The map does not turn with the vehicle and moves by whole cells only,
so that slow motion is not lost to rounding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from perception.geometry import box_corners, invert_rigid, yaw_from_rotation
from perception.types import (
    Boxes,
    FrameObjects,
    NumpyBoxes,
    NumpyCameraRig,
    NumpyFrameObjects,
    NumpyPolylines,
    NumpySeen,
    Polylines,
)

MIN_DEPTH = 0.1  # metres; nearer points count as not seen, as in `perception.cameras`
CELL = 3.0  # metres, side of a cell of the map
CELLS = 40  # along each side of the map, which therefore reaches 60 m to each side
HEIGHTS = (0.0, 1.0)  # metres above the ground; a cell is seen if its centre is seen at one of them
MIN_SEEN = 0.25  # default share of a box or line that must be seen


class View(NamedTuple):
    """What the cameras see in one frame, and what they have seen before."""

    img_from_ego: NDArray[np.float32]  # [N, 3, 4] of the present cameras, depth in the last row
    image_size: tuple[int, int]
    map_from_ego: NDArray[np.float64]  # [3, 3] rigid, in the plane
    corner: NDArray[np.int64]  # [2] number of the first cell of the map along its x and y
    before: NDArray[np.bool_]  # [CELLS, CELLS] seen in an earlier frame that the memory holds
    now: NDArray[np.bool_]  # [N, CELLS, CELLS] seen by each present camera

    def sees(self, points_ego: NDArray[Any]) -> NDArray[np.bool_]:
        """Returns which points [..., 3], metres, a camera sees now or has seen before: [...] bool."""
        points = points_ego.reshape(-1, 3).astype(np.float32)
        seen: NDArray[np.bool_] = _inside(self.img_from_ego, points, self.image_size).any(0)
        if self.before.any():
            cell = np.floor((points[:, :2] @ self.map_from_ego[:2, :2].T + self.map_from_ego[:2, 2]) / CELL)
            # Clipped before the conversion, because predictions of untrained networks may be far away.
            i, j = (cell - self.corner).clip(-1, CELLS).astype(np.int64).T
            on_map = (i >= 0) & (i < CELLS) & (j >= 0) & (j < CELLS)
            seen |= on_map & self.before[i.clip(0, CELLS - 1), j.clip(0, CELLS - 1)]
        return seen.reshape(points_ego.shape[:-1])

    def of_objects(self, objects: FrameObjects | NumpyFrameObjects) -> NumpySeen:
        """Returns what is seen of boxes [M] and lines [M], as numpy arrays or tensors on the CPU."""
        return NumpySeen(self.of_boxes(objects.boxes), self.of_lines(objects.lines))

    def of_boxes(self, boxes: Boxes | NumpyBoxes) -> NDArray[np.float32]:
        """Returns the seen share of the centre and the corners of boxes, [M]."""
        center, size, yaw = (np.asarray(x, np.float32) for x in (boxes.center, boxes.size, boxes.yaw))
        points = np.concatenate([center[:, None], center[:, None] + _corner_offsets(size, yaw)], 1)  # [M, 9, 3]
        share: NDArray[np.float32] = self.sees(points).mean(1, dtype=np.float32)
        return share

    def of_lines(self, lines: Polylines | NumpyPolylines) -> NDArray[np.bool_]:
        """Returns which points of lines on the ground are seen, [M, P]."""
        points = np.asarray(lines.points, np.float32)
        return self.sees(np.concatenate([points, np.zeros_like(points[..., :1])], -1))


class SeenMap:
    """Remembers which cells around the vehicle the cameras have seen, as long as the memory of the network lasts.

    Args:
        remembers: False for a network without a memory.
    """

    def __init__(self, remembers: bool = True) -> None:
        self.remembers = remembers
        self.reset()

    def reset(self) -> None:
        """Forgets everything, as the network's memory does."""
        self._last: View | None = None

    def look(
        self, rig: NumpyCameraRig, image_size: tuple[int, int], ego_from_prev: NDArray[Any], is_first: bool
    ) -> View:
        """Returns what the cameras of a frame see. It changes nothing; `keep` does.

        Args:
            rig: [N, ...] in pixels of the network's images, with finite numbers for all present cameras.
            image_size: height and width of the network's images.
            ego_from_prev: [4, 4] motion since the frame that `keep` stored.
            is_first: True if the memory is ignored.
        """
        present = np.flatnonzero(rig.present)
        cam_from_ego = invert_rigid(np.asarray(rig.ego_from_cam, np.float64)[present])
        img_from_ego = (np.asarray(rig.img_from_cam, np.float64)[present] @ cam_from_ego[:, :3]).astype(np.float32)
        last = None if is_first or not self.remembers else self._last
        map_from_ego = np.eye(3) if last is None else last.map_from_ego @ np.linalg.inv(_planar(ego_from_prev))
        corner = np.floor(map_from_ego[:2, 2] / CELL).astype(np.int64) - CELLS // 2
        before = np.zeros((CELLS, CELLS), bool)
        if last is not None:
            before = _moved(last.before | last.now.any(0), corner - last.corner)
        i, j = np.meshgrid(*(start + np.arange(CELLS) + 0.5 for start in corner), indexing="ij")
        on_map = np.stack([i.ravel(), j.ravel()], -1) * CELL  # [CELLS * CELLS, 2]
        centers = (on_map - map_from_ego[:2, 2]) @ map_from_ego[:2, :2]
        points = np.concatenate([np.pad(centers, ((0, 0), (0, 1)), constant_values=z) for z in HEIGHTS])
        seen = _inside(img_from_ego, points.astype(np.float32), image_size)
        now = seen.reshape(len(present), len(HEIGHTS), CELLS, CELLS).any(1)
        return View(img_from_ego, image_size, map_from_ego, corner, before, now)

    def keep(self, view: View) -> None:
        """Stores what a frame has seen, once the network's memory holds that frame."""
        if self.remembers:
            self._last = view


def sees_ground(rig: NumpyCameraRig, image_size: tuple[int, int]) -> NDArray[np.bool_]:
    """Returns which present cameras see the ground, or what is up to 1 m high, within 60 m: [present cameras] bool.

    It follows 7 x 7 rays through the image of each camera.

    Args:
        rig: [N, ...] in pixels of the network's images.
        image_size: height and width of the network's images.
    """
    (H, W), shares = image_size, np.linspace(0.001, 0.999, 7)
    u, v = np.meshgrid(shares * W, shares * H)
    uv = np.stack([u.ravel(), v.ravel(), np.ones(u.size)])  # [3, rays]
    poses = rig.ego_from_cam[rig.present]
    rays = poses[:, :3, :3] @ np.linalg.inv(rig.img_from_cam[rig.present]) @ uv  # [N, 3, rays] in the ego frame
    drop = np.array(HEIGHTS)[:, None, None] - poses[:, 2, 3, None]  # [heights, N, 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        far = drop / rays[:, 2] * np.hypot(rays[:, 0], rays[:, 1])  # metres along the ground; negative behind
        hits = (drop / rays[:, 2] > 0) & (far < CELL * CELLS / 2)
    seen: NDArray[np.bool_] = hits.any((0, 2))
    return seen


def kept_by(seen: NumpySeen, min_seen: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Returns for boxes [M] and lines [M] whether at least the share `min_seen` of each of them is seen."""
    lines = seen.lines.mean(1, dtype=np.float32) if seen.lines.shape[1] else np.ones(len(seen.lines), np.float32)
    return seen.boxes >= min_seen, lines >= min_seen


def _inside(
    img_from_ego: NDArray[np.float32], points: NDArray[np.float32], image_size: tuple[int, int]
) -> NDArray[np.bool_]:
    """Returns for each camera which points [P, 3] are inside its image: [N, P]."""
    H, W = image_size
    u, v, depth = np.moveaxis(
        img_from_ego[..., :3] @ points.T + img_from_ego[..., 3:], 1, 0
    )  # [N, P]; u, v times depth
    inside: NDArray[np.bool_] = (depth > MIN_DEPTH) & (u > 0) & (u < W * depth) & (v > 0) & (v < H * depth)
    return inside


def _corner_offsets(size: NDArray[np.float32], yaw: NDArray[np.float32]) -> NDArray[np.float32]:
    offsets: NDArray[np.float32] = box_corners(np.zeros_like(size), size, yaw)
    return offsets


def _planar(ego_from_prev: NDArray[Any]) -> NDArray[np.float64]:
    """Returns the motion in the xy plane, [3, 3]."""
    yaw = yaw_from_rotation(np.asarray(ego_from_prev, np.float64))
    motion = np.eye(3)
    motion[:2, :2] = [[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]]
    motion[:2, 2] = ego_from_prev[:2, 3]
    return motion


def _moved(cells: NDArray[np.bool_], by: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Returns the map with its first cell moved by a number of cells; new cells are False."""
    result = np.zeros_like(cells)
    if (np.abs(by) < CELLS).all():
        to, of = (tuple(slice(max(0, d), CELLS + min(0, d)) for d in step) for step in (-by, by))
        result[to] = cells[of]
    return result
