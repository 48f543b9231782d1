"""How much of what the cameras of a rig see reaches the network: rays, ground, and the horizon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perception.inference.crop import fitting_crop
from perception.rigs.models import Pinhole
from perception.rigs.rig import RigCamera
from perception.types import NumpyCameraRig

LEAST_GROUND = 0.5  # share of the rays below the horizon; a finding names cameras with less
SEE_TABLE = "rig.coverage(image_size).table() has the numbers"
CUT_FIRST = "cut images around the horizon before, with their intrinsics and sizes"
RAYS = 40_000  # per camera, evenly over its field of view; shares are exact to about 0.5 %
GROUND_STEP_DEG = 0.02  # of the angle at which ground is looked for

Sizes = Sequence[tuple[int, int]] | Mapping[int, tuple[int, int]]  # height and width by number of the camera
Pinholes = Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]]  # img_from_cam [3, 3], ego_from_cam [4, 4] each


@dataclass(frozen=True)
class GroundRange:
    """The flat ground that is in an image, at the azimuth of the camera's optical axis.

    Attributes:
        nearest, farthest: metres on the ground from the point below the camera; farthest is inf if the image reaches
            the horizon, and both are NaN if no ground is in the image.
        horizon: the horizon is in the image.
    """

    nearest: float
    farthest: float
    horizon: bool

    def __str__(self) -> str:
        if np.isnan(self.nearest):
            return "none"
        return f"{self.nearest:.1f} m to " + ("horizon" if self.horizon else f"{self.farthest:.1f} m")


@dataclass(frozen=True)
class CameraCoverage:
    """What of one physical camera reaches the network.

    Attributes:
        name: of the camera.
        pinholes: number of pinholes that stand for it.
        rays: share of its field of view, as a solid angle, that is in one of them.
        ground_rays: the same for the part of the field of view below the horizon; 1 if there is none.
        in_view: the ground that the camera sees.
        reached: the ground that the network sees.
    """

    name: str
    pinholes: int
    rays: float
    ground_rays: float
    in_view: GroundRange
    reached: GroundRange

    @property
    def horizon_is_lost(self) -> bool:
        """True if the camera sees the horizon and the network does not."""
        return self.in_view.horizon and not self.reached.horizon


@dataclass(frozen=True)
class Coverage:
    """What of the cameras of a rig reaches the network.

    Attributes:
        cameras: one entry per physical camera, in the order of the rig.
        image_size: height and width of the network's images.
    """

    cameras: tuple[CameraCoverage, ...]
    image_size: tuple[int, int]

    def __getitem__(self, name: str) -> CameraCoverage:
        return next(camera for camera in self.cameras if camera.name == name)

    def finding(self, fix: str) -> str:
        """Returns a sentence about cameras that lose the horizon or much of the ground; an empty one if none does.

        Args:
            fix: the end of the sentence.
        """
        parts = []
        if lost := [c for c in self.cameras if c.horizon_is_lost]:
            named = ", ".join(f"{c.name!r} (ground in the image: {c.reached})" for c in lost)
            parts.append(f"the horizon is cut off from {named}")
        if little := [c for c in self.cameras if c.ground_rays < LEAST_GROUND and not c.horizon_is_lost]:
            named = ", ".join(f"{c.name!r} ({c.ground_rays:.0%}, {c.reached})" for c in little)
            parts.append(f"less than {LEAST_GROUND:.0%} of the rays below the horizon are left of {named}")
        if not parts:
            return ""
        H, W = self.image_size
        return f"in the network's images of {W} x {H} pixels {', and '.join(parts)}; {fix}"

    def table(self) -> str:
        """Returns a readable table, one line per physical camera."""
        rows = [("camera", "pinholes", "rays", "below horizon", "ground in view", "ground reached")]
        for c in self.cameras:
            rows.append(
                (c.name, f"{c.pinholes}", f"{c.rays:.0%}", f"{c.ground_rays:.0%}", str(c.in_view), str(c.reached))
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def cover(source: RigCamera, pinholes: Pinholes, image_size: tuple[int, int]) -> CameraCoverage:
    """Computes what of a physical camera is in the images of pinholes at its place.

    Args:
        source: the physical camera.
        pinholes: intrinsics in pixels of the network's image, and poses.
        image_size: height and width of the network's images.
    """
    rotation, height = source.ego_from_cam[:3, :3], float(source.ego_from_cam[2, 3])
    rays_ego = _cap(source.max_angle) @ rotation.T
    rays_ego = rays_ego[source.project(rays_ego @ rotation)[1]]
    below = rays_ego[:, 2] < 0
    inside = _in_any(rays_ego, pinholes, image_size)
    central = _central_rays(rotation)
    seen = source.project(central @ rotation)[1]
    return CameraCoverage(
        source.name,
        len(pinholes),
        float(inside.mean()) if inside.size else 0.0,
        float(inside[below].mean()) if below.any() else 1.0,
        _ground(central, seen, height),
        _ground(central, seen & _in_any(central, pinholes, image_size), height),
    )


def fitted_coverage(names: Sequence[str], rig: NumpyCameraRig, sizes: Sizes, image_size: tuple[int, int]) -> Coverage:
    """Returns what of pinholes is left after fitting their images (`fitting_crop`), as dataset readers do.

    Args:
        names: of the cameras.
        rig: [N, ...] in pixels of the given images.
        sizes: height and width of the given images by camera, for all present cameras.
        image_size: height and width of the network's images.
    """
    found = []
    for n in np.flatnonzero(rig.present):
        (fx, skew, cx), (_, fy, cy), _ = np.asarray(rig.img_from_cam[n], dtype=np.float64)
        source = RigCamera(names[n], sizes[n], Pinhole(fx=fx, fy=fy, cx=cx, cy=cy, skew=skew), rig.ego_from_cam[n])
        matrix = fitting_crop(sizes[n], image_size).img_from_raw @ source.model.img_from_cam
        found.append(cover(source, [(matrix, source.ego_from_cam)], image_size))
    return Coverage(tuple(found), image_size)


def _cap(max_angle: float) -> NDArray[np.float64]:
    """Rays [RAYS, 3] of the camera frame, evenly over all directions up to an angle from the optical axis."""
    k = np.arange(RAYS) + 0.5
    z = 1 - (1 - np.cos(max_angle)) * k / RAYS  # equal areas on the unit sphere
    turn = k * np.pi * (3 - np.sqrt(5))  # the golden angle: a Fibonacci lattice
    radius = np.sqrt(1 - z**2)
    return np.stack([radius * np.cos(turn), radius * np.sin(turn), z], -1)


def _in_any(rays_ego: NDArray[np.float64], pinholes: Pinholes, image_size: tuple[int, int]) -> NDArray[np.bool_]:
    """Returns which rays [R, 3] of the ego frame are in the image of one of the pinholes."""
    H, W = image_size
    found = np.zeros(len(rays_ego), dtype=bool)
    for img_from_cam, ego_from_cam in pinholes:
        points = rays_ego @ ego_from_cam[:3, :3] @ img_from_cam.T
        ahead = points[:, 2] > 0
        uv = points[:, :2] / np.where(ahead, points[:, 2], 1.0)[:, None]
        found |= ahead & ((uv >= 0) & (uv <= (W, H))).all(-1)
    return found


def _central_rays(rotation: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rays [R, 3] of the ego frame in the vertical plane of an optical axis, from the horizon to straight below."""
    forward = rotation[:, 2]
    yaw = np.arctan2(forward[1], forward[0])
    down = np.radians(np.arange(0, 90 + GROUND_STEP_DEG / 2, GROUND_STEP_DEG))
    return np.stack([np.cos(down) * np.cos(yaw), np.cos(down) * np.sin(yaw), -np.sin(down)], -1)


def _ground(central: NDArray[np.float64], seen: NDArray[np.bool_], height: float) -> GroundRange:
    horizon = bool(seen[0])
    on_ground = np.flatnonzero(seen[1:]) + 1
    if height <= 0 or not on_ground.size:
        return GroundRange(np.nan, np.nan, horizon)
    flat, down = np.hypot(central[on_ground, 0], central[on_ground, 1]), -central[on_ground, 2]
    distance = height * flat / down
    return GroundRange(float(distance[-1]), np.inf if horizon else float(distance[0]), horizon)
