"""Sensors of the simulated car: cameras of nuScenes' rig, of other nominal rigs and of rig files, and one LiDAR.

Frames: `ego` is the rear axle on the ground (x forward, y left, z up), `cam` is x right, y down, z forward, `lidar` is
x right, y forward, z up. Pixel centres are at +0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from perception.rigs.models import CameraModel, Pinhole
from perception.rigs.rig import BODY_FROM_OPTICAL, Rig, RigCamera

LIDAR_NAME = "LIDAR_TOP"
MOST_CAMERAS = 12
LIDAR_TILT_DEG = 1.5  # pitch of the LiDAR frame


class Mounting(NamedTuple):
    """Nominal mounting of a camera on the car.

    Args:
        name: channel.
        position: x, y, z in the ego frame, metres.
        yaw_deg: viewing direction, from ego x towards ego y, degrees.
        focal: focal length in image widths.
        delay_us: exposure time minus the LiDAR's time, microseconds. Cameras are triggered one after the other while
            the LiDAR turns, so their exposure times differ.
    """

    name: str
    position: tuple[float, float, float]
    yaw_deg: float
    focal: float
    delay_us: int


# The rig of nuScenes.
SIX_CAMERAS = (
    Mounting("CAM_FRONT", (1.70, 0.00, 1.51), 0.0, 0.79, -35_000),
    Mounting("CAM_FRONT_RIGHT", (1.55, -0.49, 1.50), -56.0, 0.79, -28_000),
    Mounting("CAM_FRONT_LEFT", (1.52, 0.49, 1.51), 55.0, 0.79, -43_000),
    Mounting("CAM_BACK", (0.03, 0.00, 1.57), 180.0, 0.505, -10_000),
    Mounting("CAM_BACK_LEFT", (1.04, 0.48, 1.59), 108.5, 0.79, -1_000),
    Mounting("CAM_BACK_RIGHT", (1.02, -0.48, 1.56), -109.5, 0.79, -20_000),
)
# Rigs for tests of generalisation: other numbers of cameras, focal lengths, heights and directions.
FIVE_CAMERAS = (
    Mounting("CAM_FRONT", (1.60, 0.00, 1.70), 0.0, 0.95, -35_000),
    Mounting("CAM_FRONT_RIGHT", (1.40, -0.55, 1.65), -65.0, 0.60, -28_000),
    Mounting("CAM_FRONT_LEFT", (1.40, 0.55, 1.65), 65.0, 0.60, -43_000),
    Mounting("CAM_BACK_LEFT", (0.20, 0.50, 1.70), 140.0, 0.60, -5_000),
    Mounting("CAM_BACK_RIGHT", (0.20, -0.50, 1.70), -140.0, 0.60, -15_000),
)
EIGHT_CAMERAS = (
    Mounting("CAM_FRONT", (1.60, 0.10, 1.65), 0.0, 0.60, -35_000),
    Mounting("CAM_FRONT_NARROW", (1.60, -0.10, 1.65), 0.0, 1.30, -35_000),
    Mounting("CAM_FRONT_RIGHT", (1.45, -0.50, 1.60), -50.0, 0.65, -28_000),
    Mounting("CAM_FRONT_LEFT", (1.45, 0.50, 1.60), 50.0, 0.65, -43_000),
    Mounting("CAM_RIGHT", (0.90, -0.52, 1.60), -100.0, 0.65, -22_000),
    Mounting("CAM_LEFT", (0.90, 0.52, 1.60), 100.0, 0.65, -2_000),
    Mounting("CAM_BACK", (0.00, 0.00, 1.62), 180.0, 0.65, -10_000),
    Mounting("CAM_BACK_NARROW", (0.00, 0.00, 1.66), 180.0, 1.00, -10_000),
)

NEAREST = 0.3  # metres in front of a camera from which a point counts as seen


@dataclass(frozen=True, eq=False, kw_only=True)
class Camera(RigCamera):
    """A calibrated camera of any model with gain, vignetting and noise.

    Attributes:
        delay_us: exposure time minus the LiDAR's time, microseconds.
        gain: [3] factors on red, green and blue: exposure and white balance of this camera.
        vignette: loss of light in the corners, 0..1.
        noise: standard deviation of the sensor noise; white is 1.
    """

    delay_us: int
    gain: np.ndarray
    vignette: float
    noise: float

    @property
    def img_from_cam(self) -> np.ndarray:
        """[3, 3] pixels; of the pinhole that agrees near the optical axis if the model is another one."""
        return self.model.img_from_cam

    def rays(self) -> np.ndarray:
        """Returns unit directions through all pixel centres, [H, W, 3] float32 in the camera frame, NaN for none."""
        if not self._is_plain:
            return _lens_rays(self.model, self.image_size, self.lens_angle)
        centres = _pixel_centres(self.image_size)
        homogeneous = np.concatenate([centres, np.ones_like(centres[..., :1])], -1)
        directions = homogeneous @ np.linalg.inv(self.img_from_cam).T  # [H, W, 3]
        return (directions / np.linalg.norm(directions, axis=-1, keepdims=True)).astype(np.float32)

    @property
    def _is_plain(self) -> bool:
        """A pinhole whose lens fills the image: a matrix is all it needs."""
        return isinstance(self.model, Pinhole) and self.lens_angle >= np.pi / 2

    def sees(self, points_cam: np.ndarray) -> np.ndarray:
        """Returns whether points [..., 3] of the camera frame lie in the image, [...] bool, nothing standing before."""
        if not self._is_plain:
            return (np.linalg.norm(points_cam, axis=-1) > NEAREST) & self.project(points_cam)[1]
        H, W = self.image_size
        uvw = points_cam @ self.img_from_cam.T
        inside = (uvw[..., :2] > 0).all(-1) & (uvw[..., :2] < uvw[..., 2:] * [W, H]).all(-1)
        return (uvw[..., 2] > NEAREST) & inside


def _pixel_centres(image_size: tuple[int, int]) -> np.ndarray:
    height, width = image_size
    return np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), -1)  # [H, W, 2]


@lru_cache(maxsize=MOST_CAMERAS)
def _lens_rays(model: CameraModel, image_size: tuple[int, int], lens_angle: float) -> np.ndarray:
    """Finds the rays of a camera with distortion, which takes seconds; all scenes of a rig share them."""
    rays, seen = RigCamera("", image_size, model, np.eye(4), lens_angle).unproject(_pixel_centres(image_size))
    rays[~seen] = np.nan
    found = rays.astype(np.float32)
    found.setflags(write=False)
    return found


@dataclass(frozen=True, eq=False)
class Lidar:
    """A spinning LiDAR. All points of one revolution are measured at the same time.

    Args:
        ego_from_spin: [4, 4] metres, pose of the spinning axis: z.
        lidar_from_spin: [3, 3], rotation from there to the axes in which the points are reported.
        elevations: [32] radians, lowest ring first.
        azimuths: number of columns per revolution.
        max_range: metres.
        range_noise: standard deviation, metres.
        dropout: share of lost returns, 0..1.
    """

    ego_from_spin: np.ndarray
    lidar_from_spin: np.ndarray
    elevations: np.ndarray
    azimuths: int = 1080
    max_range: float = 100.0
    range_noise: float = 0.01
    dropout: float = 0.03

    @property
    def ego_from_lidar(self) -> np.ndarray:
        """Pose [4, 4] of the LiDAR frame."""
        pose = self.ego_from_spin.copy()
        pose[:3, :3] = pose[:3, :3] @ self.lidar_from_spin.T
        return pose

    def rays(self) -> np.ndarray:
        """Returns unit directions of one revolution, [rings, azimuths, 3] float32 in the frame of the spinning axis."""
        azimuth = (np.arange(self.azimuths) + 0.5) * (2 * np.pi / self.azimuths)
        elevation = self.elevations[:, None]  # [rings, 1]
        x, y = np.cos(elevation) * np.sin(azimuth), np.cos(elevation) * np.cos(azimuth)  # [rings, azimuths]
        z = np.broadcast_to(np.sin(elevation), x.shape)
        return np.stack([x, y, z], -1).astype(np.float32)


def _rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Returns the rotation [3, 3] by roll about x, then pitch about y, then yaw about z, radians."""
    cy, sy, cp, sp, cr, sr = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch), np.cos(roll), np.sin(roll)
    about_z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    about_y = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    about_x = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    return about_z @ about_y @ about_x


def make_cameras(
    rng: np.random.Generator, image_size: tuple[int, int], rig: Sequence[Mounting] = SIX_CAMERAS
) -> tuple[Camera, ...]:
    """Draws cameras with small deviations from their nominal mounting and focal length, so that calibration matters.

    Args:
        rng: source of the deviations.
        image_size: height and width in pixels.
        rig: the nominal mountings.
    """
    height, width = image_size
    cameras = []
    for name, position, yaw_deg, focal, delay_us in rig:
        focal_px = focal * width * rng.uniform(0.97, 1.03)
        center = np.array([width, height]) * (0.5 + rng.uniform(-0.015, 0.015, 2))
        yaw, pitch, roll = np.radians(np.array([yaw_deg, 0.0, 0.0]) + rng.uniform(-1.5, 1.5, 3) * [1.0, 0.7, 0.4])
        ego_from_cam = np.eye(4)
        ego_from_cam[:3, :3] = _rotation(yaw, pitch, roll) @ BODY_FROM_OPTICAL[:3, :3]
        ego_from_cam[:3, 3] = np.array(position) + rng.uniform(-0.04, 0.04, 3)
        cameras.append(
            Camera(
                name=name,
                image_size=(height, width),
                model=Pinhole(fx=focal_px, fy=focal_px, cx=float(center[0]), cy=float(center[1])),
                ego_from_cam=ego_from_cam,
                delay_us=delay_us,
                **_optics(rng),
            )
        )
    return tuple(cameras)


def cameras_of(rig: Rig, rng: np.random.Generator) -> tuple[Camera, ...]:
    """Returns the cameras of a rig exactly as it has them, all exposed at the LiDAR's time.

    Args:
        rig: of any models and mountings.
        rng: source of gain, vignetting and noise.
    """
    return tuple(
        Camera(
            name=camera.name,
            image_size=camera.image_size,
            model=camera.model,
            ego_from_cam=camera.ego_from_cam,
            lens_angle=camera.lens_angle,
            delay_us=0,
            **_optics(rng),
        )
        for camera in rig
    )


def _optics(rng: np.random.Generator) -> dict[str, Any]:
    """Draws gain, vignetting and noise of a camera."""
    return {
        "gain": rng.uniform(0.9, 1.1) * rng.uniform(0.97, 1.03, 3),
        "vignette": rng.uniform(0.0, 0.25),
        "noise": rng.uniform(0.004, 0.02),
    }


def make_lidar(rng: np.random.Generator, ego_from_lidar: np.ndarray | None = None) -> Lidar:
    """Draws the roof LiDAR with a small deviation from its nominal mounting.

    As on nuScenes' cars, the LiDAR frame is tilted against the ego frame: by `LIDAR_TILT_DEG` about its x axis, so that
    its yaw, by which ground-truth lines are cut, stays. Its spinning axis is not: what it hits does not depend on the
    tilt.

    Args:
        rng: source of the deviations.
        ego_from_lidar: [4, 4] for a LiDAR that is mounted exactly there and spins about its z axis.
    """
    yaw, pitch, roll = np.radians(rng.uniform(-0.4, 0.4, 3)) - [np.pi / 2, 0.0, 0.0]
    ego_from_spin, lidar_from_spin = np.eye(4), _rotation(0.0, 0.0, np.radians(LIDAR_TILT_DEG))
    ego_from_spin[:3, :3] = _rotation(yaw, pitch, roll)
    ego_from_spin[:3, 3] = np.array([0.94, 0.0, 1.84]) + rng.uniform(-0.02, 0.02, 3)
    if ego_from_lidar is not None:
        ego_from_spin, lidar_from_spin = ego_from_lidar, np.eye(3)
    return Lidar(ego_from_spin, lidar_from_spin, elevations=np.radians(np.linspace(-30.0, 10.0, 32)))
