"""Simulates one scene: renders its sensors, writes their files, and makes its rows of the tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pyquaternion import Quaternion

from perception.rigs.models import Pinhole
from perception.rigs.rig import Rig
from perception.synthetic.can_bus import write_can_bus
from perception.synthetic.district import District
from perception.synthetic.limits import SWEEP_US
from perception.synthetic.render import TownRenderer
from perception.synthetic.sensors import (
    LIDAR_NAME,
    SIX_CAMERAS,
    Camera,
    Lidar,
    Mounting,
    cameras_of,
    make_cameras,
    make_lidar,
)
from perception.synthetic.tables import linked_rows, pose_fields, record_token
from perception.synthetic.town import LOCATIONS, make_district

# The first keyframe is later than the scene's start, because some cameras expose before the LiDAR.
_LEAD_US = 100_000
# Largest distance of annotated boxes from the car, metres.
ANNOTATION_RANGE = 60.0
_JPEG_QUALITY = 92


@dataclass(frozen=True)
class SceneJob:
    """All inputs of one scene, or of some of its sensors, for a worker process."""

    root: Path
    name: str  # of the scene
    seed: int
    index: int
    keyframes: int
    rate: int
    image_size: tuple[int, int]
    sweeps: bool
    rare: float
    rig: Rig | tuple[Mounting, ...]
    sensors: range  # cameras, in the order of the rig, and after them the LiDAR, with which the labels are made

    @property
    def log(self) -> str:
        """Name of the log."""
        return f"town-{self.seed:04d}-{self.index:04d}"

    @property
    def labels(self) -> bool:
        """Whether the LiDAR is among the sensors."""
        return len(self.rig) in self.sensors

    @property
    def keyframe_us(self) -> int:
        """Microseconds between keyframes."""
        return 1_000_000 // self.rate

    def token(self, *parts: object) -> str:
        """Returns the token of a record of this scene."""
        return record_token(self.seed, self.index, *parts)


def scene_location(index: int) -> tuple[str, tuple[float, float]]:
    """Returns location and origin of scene `index`: locations alternate, districts are 300 m apart on each map."""
    cell = index // len(LOCATIONS)
    return LOCATIONS[index % len(LOCATIONS)], (250.0 + 300.0 * (cell % 10), 250.0 + 300.0 * (cell // 10))


def scene_district(seed: int, index: int, keyframes: int, rate: int = 2, rare: float = 0.0) -> District:
    """Generates the district of scene `index` of the dataset that `simulate` makes from the same arguments."""
    location, origin = scene_location(index)
    duration = (_LEAD_US + 1_000_000 // rate * (keyframes - 1)) * 1e-6
    return make_district(int(_sequence(seed, index).generate_state(1)[0]), origin, location, duration, rare)


def _sequence(seed: int, index: int, *purpose: int) -> np.random.SeedSequence:
    """Returns the seeds of one purpose in scene `index`."""
    return np.random.SeedSequence([seed, index], spawn_key=purpose)


def scene_renderer(
    seed: int,
    index: int,
    district: District,
    image_size: tuple[int, int],
    rig: Rig | Sequence[Mounting] = SIX_CAMERAS,
) -> tuple[TownRenderer, tuple[Camera, ...], Lidar]:
    """Makes the renderer, the cameras and the LiDAR of scene `index`."""
    rng = np.random.default_rng(_sequence(seed, index, 1))
    cameras = cameras_of(rig, rng) if isinstance(rig, Rig) else make_cameras(rng, image_size, rig)
    lidar = make_lidar(rng, rig.ego_from_lidar if isinstance(rig, Rig) else None)
    return TownRenderer(district, np.random.default_rng(_sequence(seed, index, 2))), cameras, lidar


def simulate_scene(job: SceneJob) -> tuple[dict[str, list[dict]], District]:
    """Renders sensors of one scene, writes their files and returns their rows of the tables."""
    district = scene_district(job.seed, job.index, job.keyframes, job.rate, job.rare)
    renderer, cameras, lidar = scene_renderer(job.seed, job.index, district, job.image_size, job.rig)
    start_us = 1_600_000_000_000_000 + (job.seed % 100_000) * 1_000_000_000 + job.index * 60_000_000
    start_us += _LEAD_US
    sample_us = [start_us + job.keyframe_us * k for k in range(job.keyframes)]
    tables: dict[str, list[dict]] = {"ego_pose": [], "sample_data": [], "sample_annotation": []}
    tables["sample"] = linked_rows(
        [
            {"token": job.token("sample", k), "timestamp": time, "scene_token": job.token("scene")}
            for k, time in enumerate(sample_us)
        ]
    )

    def record(channel: str, time_us: int, k: int, key: bool, suffix: str, size: tuple[int, int]) -> Path:
        """Adds the ego_pose and sample_data rows of one file and returns its path."""
        token = job.token("sample_data", channel, time_us)
        file = f"{'samples' if key else 'sweeps'}/{channel}/{job.log}__{channel}__{time_us}.{suffix}"
        pose = renderer.global_from_ego((time_us - start_us + _LEAD_US) * 1e-6)
        tables["ego_pose"].append({"token": token, "timestamp": time_us, **pose_fields(pose)})
        row: dict[str, Any] = {"token": token, "sample_token": job.token("sample", k), "ego_pose_token": token}
        row |= {"calibrated_sensor_token": job.token("calibrated_sensor", channel), "timestamp": time_us}
        row |= {"fileformat": suffix.split(".")[0], "is_key_frame": key, "height": size[0], "width": size[1]}
        streams[channel].append(row | {"filename": file})
        return job.root / file

    streams: dict[str, list[dict]] = {channel: [] for channel in (*(camera.name for camera in cameras), LIDAR_NAME)}
    steps = job.keyframe_us // SWEEP_US if job.sweeps else 1  # images per keyframe interval
    # The noise is seeded by the number of the sweep, so that keyframes are the same with and without sweeps.
    stride = max(1, job.keyframe_us // SWEEP_US) // steps
    for c in (sensor for sensor in job.sensors if sensor < len(cameras)):
        camera = cameras[c]
        for image in range(0, steps * (job.keyframes - 1) + 1):
            step, key = image * stride, image % steps == 0
            time_us = start_us + image * (job.keyframe_us // steps) + camera.delay_us
            # An image between keyframes belongs to the next keyframe, as in nuScenes.
            path = record(camera.name, time_us, -(-image // steps), key, "jpg", camera.image_size)
            noise = np.random.default_rng(_sequence(job.seed, job.index, 3, c, step))
            picture = renderer.camera(camera, (time_us - start_us + _LEAD_US) * 1e-6, noise)
            Image.fromarray(picture.rgb).save(path, quality=_JPEG_QUALITY)
    for k, time_us in enumerate(sample_us if job.labels else []):
        seconds = (time_us - start_us + _LEAD_US) * 1e-6
        path = record(LIDAR_NAME, time_us, k, True, "pcd.bin", (0, 0))
        sweep = renderer.lidar(lidar, seconds, np.random.default_rng(_sequence(job.seed, job.index, 4, k)))
        sweep.points_lidar.tofile(path)
        visible = renderer.visibility(cameras, seconds)
        tables["sample_annotation"] += _annotate(job, district, k, seconds, sweep.actor, visible)
    if job.labels:
        first, last = ((time - start_us + _LEAD_US) * 1e-6 for time in (sample_us[0], sample_us[-1]))
        write_can_bus(job.root / "can_bus", job.name, district.ego, first, last, start_us - _LEAD_US)
    for rows in streams.values():
        tables["sample_data"] += linked_rows(rows)
    tables["instance"] = _link_instances(job, district, tables["sample_annotation"])
    tables["calibrated_sensor"] = _calibration(job, cameras, lidar)
    tables["scene"] = [
        {
            "token": job.token("scene"),
            "log_token": job.token("log"),
            "nbr_samples": job.keyframes,
            "first_sample_token": job.token("sample", 0),
            "last_sample_token": job.token("sample", job.keyframes - 1),
            "name": job.name,
            "description": f"generated town, seed {job.seed}, scene {job.index}: {district.name}",
        }
    ]
    tables["log"] = [
        {
            "token": job.token("log"),
            "logfile": job.log,
            "vehicle": "town",
            "date_captured": "2020-09-13",
            "location": district.location,
        }
    ]
    return tables, district


def _calibration(job: SceneJob, cameras: tuple[Camera, ...], lidar: Lidar) -> list[dict]:
    """Makes the calibrated_sensor rows of one scene."""
    # A matrix would say nothing true of a camera with distortion: the devkit finds none, and rig.yaml has the model.
    mounts = [
        (c.name, c.ego_from_cam, c.img_from_cam.tolist() if isinstance(c.model, Pinhole) else []) for c in cameras
    ]
    rows = []
    for channel, ego_from_sensor, intrinsic in [*mounts, (LIDAR_NAME, lidar.ego_from_lidar, [])]:
        row = {"token": job.token("calibrated_sensor", channel), "sensor_token": record_token("sensor", channel)}
        rows.append(row | pose_fields(ego_from_sensor) | {"camera_intrinsic": intrinsic})
    return rows


def _annotate(
    job: SceneJob, district: District, k: int, seconds: float, hit: np.ndarray, visible: np.ndarray
) -> list[dict]:
    """Makes the annotation rows of all actors near the car at keyframe k, without prev and next."""
    counts = np.bincount(hit[hit >= 0], minlength=len(district.actors))
    ego_xy, _ = district.ego.at(seconds)
    rows = []
    for a, actor in enumerate(district.actors):
        xy, yaw = actor.trajectory.at(seconds)
        if np.linalg.norm(xy - ego_xy) > ANNOTATION_RANGE:
            continue
        length, width, height = actor.size
        attribute = actor.attribute(seconds)
        level = int(np.searchsorted([0.4, 0.6, 0.8], visible[a], side="right"))
        rows.append(
            {
                "token": job.token("sample_annotation", k, actor.name),
                "sample_token": job.token("sample", k),
                "instance_token": job.token("instance", actor.name),
                "visibility_token": str(level + 1),
                "attribute_tokens": [record_token("attribute", attribute)] if attribute else [],
                "translation": [float(xy[0]), float(xy[1]), height / 2],
                "size": [float(width), float(length), float(height)],
                "rotation": Quaternion(axis=[0, 0, 1], radians=yaw).elements.tolist(),
                "num_lidar_pts": int(counts[a]),
                "num_radar_pts": 0,
            }
        )
    return rows


def _link_instances(job: SceneJob, district: District, annotations: list[dict]) -> list[dict]:
    """Sets prev and next of the annotations in place and returns the instance rows."""
    instances = []
    for actor in district.actors:
        token = job.token("instance", actor.name)
        own = [row for row in annotations if row["instance_token"] == token]
        if not own:
            continue
        for row, neighbours in zip(own, linked_rows(own), strict=True):
            row.update(neighbours)
        first, last = own[0]["token"], own[-1]["token"]
        row = {"token": token, "category_token": record_token("category", actor.category), "nbr_annotations": len(own)}
        instances.append(row | {"first_annotation_token": first, "last_annotation_token": last})
    return instances
