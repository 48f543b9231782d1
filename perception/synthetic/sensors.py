"""The sensors of the simulated car: six cameras and one LiDAR, mounted like those of nuScenes.

Frames: `ego` is the rear axle on the ground (x forward, y left, z up), `cam` is x right, y down, z forward, `lidar` is
x right, y forward, z up. Pixel centres lie at +0.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Name, mounting (x, y, z in metres; yaw in degrees), focal length in image widths, exposure relative to the LiDAR (us).
# The cameras fire one after the other while the LiDAR turns, so each one has its own time.
_CAMERAS = (
    ("CAM_FRONT", (1.70, 0.00, 1.51), 0.0, 0.79, -35_000),
    ("CAM_FRONT_RIGHT", (1.55, -0.49, 1.50), -56.0, 0.79, -28_000),
    ("CAM_FRONT_LEFT", (1.52, 0.49, 1.51), 55.0, 0.79, -43_000),
    ("CAM_BACK", (0.03, 0.00, 1.57), 180.0, 0.505, -10_000),
    ("CAM_BACK_LEFT", (1.04, 0.48, 1.59), 108.5, 0.79, -1_000),
    ("CAM_BACK_RIGHT", (1.02, -0.48, 1.56), -109.5, 0.79, -20_000),
)
CAMERA_NAMES = tuple(camera[0] for camera in _CAMERAS)
LIDAR_NAME = "LIDAR_TOP"

# Columns are the camera's axes (right, down, forward) in a frame that is x forward, y left, z up.
_FORWARD_FROM_CAM = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])


@dataclass(frozen=True, eq=False)
class Camera:
    """A calibrated pinhole camera with the small faults of a real one.

    Args:
        name: nuScenes channel.
        image_size: height and width in pixels.
        img_from_cam: [3, 3] pixels.
        ego_from_cam: [4, 4] metres.
        delay_us: exposure time minus the LiDAR's time, microseconds.
        gain: factors on red, green and blue: exposure and white balance of this one camera.
        vignette: how much darker the corners are, 0..1.
        noise: standard deviation of the sensor noise, on a scale where white is 1.
    """

    name: str
    image_size: tuple[int, int]
    img_from_cam: np.ndarray
    ego_from_cam: np.ndarray
    delay_us: int
    gain: np.ndarray
    vignette: float
    noise: float

    def rays(self) -> np.ndarray:
        """Unit directions through all pixel centres, [H, W, 3] float32 in the camera frame."""
        height, width = self.image_size
        u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
        directions = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(self.img_from_cam).T  # [H, W, 3]
        return (directions / np.linalg.norm(directions, axis=-1, keepdims=True)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Lidar:
    """A spinning LiDAR whose whole turn is measured at one instant.

    Args:
        ego_from_lidar: [4, 4] metres.
        elevations: [32] radians, lowest ring first.
        azimuths: number of columns per turn.
        max_range: metres.
        range_noise: standard deviation, metres.
        dropout: share of returns that get lost, 0..1.
    """

    ego_from_lidar: np.ndarray
    elevations: np.ndarray
    azimuths: int = 1080
    max_range: float = 100.0
    range_noise: float = 0.01
    dropout: float = 0.03

    def rays(self) -> np.ndarray:
        """Unit directions of one turn, [rings, azimuths, 3] float32 in the LiDAR frame."""
        azimuth = (np.arange(self.azimuths) + 0.5) * (2 * np.pi / self.azimuths)
        elevation = self.elevations[:, None]  # [rings, 1]
        x, y = np.cos(elevation) * np.sin(azimuth), np.cos(elevation) * np.cos(azimuth)  # [rings, azimuths]
        z = np.broadcast_to(np.sin(elevation), x.shape)
        return np.stack([x, y, z], -1).astype(np.float32)


def _rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Rotation by roll about x, then pitch about y, then yaw about z, radians."""
    cy, sy, cp, sp, cr, sr = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch), np.cos(roll), np.sin(roll)
    about_z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    about_y = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    about_x = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    return about_z @ about_y @ about_x


def make_cameras(rng: np.random.Generator, image_size: tuple[int, int]) -> tuple[Camera, ...]:
    """Six cameras, each a little off the nominal mounting and focal length, so that calibration matters.

    Args:
        rng: source of the offsets.
        image_size: height and width in pixels.
    """
    height, width = image_size
    cameras = []
    for name, position, yaw_deg, focal, delay_us in _CAMERAS:
        focal_px = focal * width * rng.uniform(0.97, 1.03)
        center = np.array([width, height]) * (0.5 + rng.uniform(-0.015, 0.015, 2))
        img_from_cam = np.array([[focal_px, 0, center[0]], [0, focal_px, center[1]], [0, 0, 1]])
        yaw, pitch, roll = np.radians(np.array([yaw_deg, 0.0, 0.0]) + rng.uniform(-1.5, 1.5, 3) * [1.0, 0.7, 0.4])
        ego_from_cam = np.eye(4)
        ego_from_cam[:3, :3] = _rotation(yaw, pitch, roll) @ _FORWARD_FROM_CAM
        ego_from_cam[:3, 3] = np.array(position) + rng.uniform(-0.04, 0.04, 3)
        cameras.append(
            Camera(
                name=name,
                image_size=(height, width),
                img_from_cam=img_from_cam,
                ego_from_cam=ego_from_cam,
                delay_us=delay_us,
                gain=rng.uniform(0.9, 1.1) * rng.uniform(0.97, 1.03, 3),
                vignette=rng.uniform(0.0, 0.25),
                noise=rng.uniform(0.004, 0.02),
            )
        )
    return tuple(cameras)


def make_lidar(rng: np.random.Generator) -> Lidar:
    """The roof LiDAR with a small offset of its mounting."""
    ego_from_lidar = np.eye(4)
    yaw, pitch, roll = np.radians(rng.uniform(-0.4, 0.4, 3)) - [np.pi / 2, 0.0, 0.0]
    ego_from_lidar[:3, :3] = _rotation(yaw, pitch, roll)
    ego_from_lidar[:3, 3] = np.array([0.94, 0.0, 1.84]) + rng.uniform(-0.02, 0.02, 3)
    return Lidar(ego_from_lidar=ego_from_lidar, elevations=np.radians(np.linspace(-30.0, 10.0, 32)))
