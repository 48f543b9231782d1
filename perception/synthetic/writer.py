"""Writes generated districts as a dataset in nuScenes format, which nuscenes-devkit 1.2.0 reads unchanged.

Format: the thirteen tables of https://www.nuscenes.org/nuscenes#data-format, JPEGs, LiDAR sweeps as `.pcd.bin`, a map
expansion 1.3 per location, and `<version>/splits.json` for the devkit's evaluation.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from pyquaternion import Quaternion
from tqdm import tqdm

from perception.errors import DataError
from perception.files import check_writable, new_folder
from perception.rigs.models import Pinhole
from perception.rigs.rig import RIG_FILE, Rig
from perception.synthetic.district import District
from perception.synthetic.limits import SWEEP_US, check_request, check_rig, check_space, official_names
from perception.synthetic.map_expansion import write_map_expansion
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
from perception.synthetic.town import LOCATIONS, make_district
from perception.types import ATTRIBUTES

VERSION = "v1.0-synthetic"
CATEGORIES = (
    "human.pedestrian.adult", "human.pedestrian.child", "human.pedestrian.wheelchair", "human.pedestrian.stroller",
    "human.pedestrian.personal_mobility", "human.pedestrian.police_officer", "human.pedestrian.construction_worker",
    "animal", "vehicle.car", "vehicle.motorcycle", "vehicle.bicycle", "vehicle.bus.bendy", "vehicle.bus.rigid",
    "vehicle.truck", "vehicle.construction", "vehicle.emergency.ambulance", "vehicle.emergency.police",
    "vehicle.trailer", "movable_object.barrier", "movable_object.trafficcone", "movable_object.pushable_pullable",
    "movable_object.debris", "static_object.bicycle_rack",
)  # fmt: skip
_VISIBILITIES = ("v0-40", "v40-60", "v60-80", "v80-100")

# The first keyframe is later than the scene's start, because some cameras expose before the LiDAR.
_LEAD_US = 100_000
# Largest distance of annotated boxes from the car, metres.
ANNOTATION_RANGE = 60.0
_JPEG_QUALITY = 92


@dataclass(frozen=True)
class _Job:
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
        return _token(self.seed, self.index, *parts)


def simulate(
    out: str | Path,
    *,
    scenes: int,
    seed: int,
    keyframes: int = 10,
    rate: int = 2,
    image_size: tuple[int, int] = (256, 448),
    split: str | None = None,
    workers: int | None = None,
    sweeps: bool = False,
    rare: float = 0.0,
    rig: Rig | Sequence[Mounting] = SIX_CAMERAS,
    version: str = VERSION,
) -> None:
    """Generates a dataset in nuScenes format.

    Scene i of seed S depends only on `numpy.random.SeedSequence([S, i])` and the arguments. The same arguments give the
    same bytes with any number of workers. The folder appears only when it is complete. The next run with the same `out`
    removes what a killed run left.

    Args:
        out: dataset root to create; it must not exist, or be empty.
        scenes: number of scenes, each in another district.
        seed: of the whole dataset; datasets of different seeds share no scene.
        keyframes: annotated samples per scene, for up to 59 s.
        rate: annotated samples per second, one of 1, 2 (as nuScenes), 5, 10 and 20.
        image_size: height and width of the images in pixels, 16 to 4096; a `Rig` has its own sizes.
        split: name under which `splits.json` lists the scenes, `town_val` by default. The devkit reserves its names
            (`train`, `val`, `test`, ...) for the scenes of nuScenes, so they cannot be used.
        workers: number of processes; None uses all CPU cores, 1 works in this process.
        sweeps: also write camera images between keyframes, 10 Hz in total; for rates of 1 to 5.
        rare: frequency of rare classes, from 0 (as in usual streets) to 1, see `make_district`.
        rig: nominal mountings of pinholes, from which each scene deviates a little; or 1 to 12 cameras of any model,
            size and mounting, which are rendered exactly, all at the LiDAR's time. Such a rig is written as
            `<version>/rig.yaml`, because the tables can hold pinholes only: `camera_intrinsic` of other cameras is
            empty, as that of a LiDAR. `NuScenesDataset` reads both.
        version: folder of the tables, `v1.0-synthetic`; or `v1.0-mini` or `v1.0-trainval`, for tools that take no other
            version. The scenes then have the names of the devkit's official splits, `mini_train` and `mini_val` or
            `train` and `val`: the first ones train, and about as large a share as in nuScenes, at least one scene,
            validates.

    Raises:
        ConfigError: an argument is out of its range, or the rig has too many cameras, or names that are no folders.
        DataError: `out` is not empty, another run is writing it, or the disk is full or about to be.
    """
    out = Path(out)
    official = official_names(version, scenes, split) if version != VERSION else None
    split = split or "town_val"
    check_request(scenes, seed, keyframes, rate, image_size, split, workers, sweeps, rare)
    names = official or [f"scene-{seed:04d}-{i:04d}" for i in range(scenes)]
    if isinstance(rig, Rig):
        check_rig(rig)
        sizes = [camera.image_size for camera in rig]
    else:
        rig, sizes = tuple(rig), [(image_size[0], image_size[1])] * len(rig)
    check_writable("out", out, folder=True)
    with new_folder(out) as root:
        check_space(out, scenes, keyframes, rate, sizes, sweeps)
        for channel in (*(camera.name for camera in rig), LIDAR_NAME):
            (root / "samples" / channel).mkdir(parents=True)
            if sweeps and channel != LIDAR_NAME:
                (root / "sweeps" / channel).mkdir(parents=True)
        workers = workers or os.cpu_count() or 1
        jobs = [
            _Job(root, names[i], seed, i, keyframes, rate, (image_size[0], image_size[1]), sweeps, rare, rig, sensors)
            for i, parts in enumerate(_parts_of_scenes(scenes, workers, len(rig) + 1))
            for sensors in parts
        ]
        written, districts = [], []
        for tables, district in tqdm(_whole_scenes(jobs, _run(jobs, workers)), total=scenes, desc="scenes"):
            written.append(tables)
            districts.append(district)
        _write_tables(root / version, seed, written, [camera.name for camera in rig])
        if not official:  # the devkit knows its own splits, and reads no others of these versions
            (root / version / "splits.json").write_text(json.dumps({split: names}, indent=0), encoding="utf-8")
        if isinstance(rig, Rig):
            rig.save(root / version / RIG_FILE)
        for location in LOCATIONS:
            here = [d for d in districts if d.location == location]
            if here:
                (root / "maps" / "expansion").mkdir(parents=True, exist_ok=True)
                write_map_expansion(here, root / "maps" / "expansion" / f"{location}.json")


def _parts_of_scenes(scenes: int, workers: int, sensors: int) -> list[list[range]]:
    """Divides the sensors of the last scenes, for which there are more workers than scenes, into parts of their own."""
    rest = scenes % workers
    count = min(workers // rest, sensors) if rest else 1
    bounds = [sensors * k // count for k in range(count + 1)]
    divided = [range(start, stop) for start, stop in pairwise(bounds)]
    return [[range(sensors)]] * (scenes - rest) + [divided] * rest


def _whole_scenes(
    jobs: list[_Job], results: Iterator[tuple[dict[str, list[dict]], District]]
) -> Iterator[tuple[dict[str, list[dict]], District]]:
    """Joins the rows of scenes that were rendered in parts; the last part has the labels."""
    before: dict[str, list[dict]] = {"ego_pose": [], "sample_data": []}
    for job, (tables, district) in zip(jobs, results, strict=True):
        before = {name: rows + tables[name] for name, rows in before.items()}
        if job.labels:
            yield tables | before, district
            before = {name: [] for name in before}


def _run(jobs: list[_Job], workers: int) -> Iterator[tuple[dict[str, list[dict]], District]]:
    """Yields the results of all jobs in their order."""
    if min(workers, len(jobs)) == 1:
        yield from map(_simulate_scene, jobs)
        return
    # Spawned processes: a forked one may inherit a lock that is held by a thread of its parent.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_start_worker) as pool:
        futures = [pool.submit(_simulate_scene, job) for job in jobs]
        try:
            for future in futures:
                yield future.result()
        except BrokenProcessPool:
            raise DataError(
                f"{jobs[0].root}: a worker process was killed, probably because memory ran out; give fewer workers or "
                "smaller images"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Prepares a worker process, which ends with its parent: a killed parent cannot stop it."""
    cv2.setNumThreads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _token(*parts: object) -> str:
    """Returns the token of a record: a hash of its parts."""
    return hashlib.md5("/".join(map(str, parts)).encode()).hexdigest()


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


def _simulate_scene(job: _Job) -> tuple[dict[str, list[dict]], District]:
    """Renders sensors of one scene, writes their files and returns their rows of the tables."""
    district = scene_district(job.seed, job.index, job.keyframes, job.rate, job.rare)
    renderer, cameras, lidar = scene_renderer(job.seed, job.index, district, job.image_size, job.rig)
    start_us = 1_600_000_000_000_000 + (job.seed % 100_000) * 1_000_000_000 + job.index * 60_000_000
    start_us += _LEAD_US
    sample_us = [start_us + job.keyframe_us * k for k in range(job.keyframes)]
    tables: dict[str, list[dict]] = {"ego_pose": [], "sample_data": [], "sample_annotation": []}
    tables["sample"] = _linked(
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
        tables["ego_pose"].append({"token": token, "timestamp": time_us, **_pose_fields(pose)})
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
    for rows in streams.values():
        tables["sample_data"] += _linked(rows)
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


def _linked(rows: list[dict]) -> list[dict]:
    """Adds prev and next to consecutive rows."""
    tokens = ["", *(row["token"] for row in rows), ""]
    return [row | {"prev": tokens[i], "next": tokens[i + 2]} for i, row in enumerate(rows)]


def _pose_fields(pose: np.ndarray) -> dict[str, Any]:
    """Returns rotation and translation of a pose [4, 4] as fields of a record."""
    return {"rotation": Quaternion(matrix=pose, atol=1e-6).elements.tolist(), "translation": pose[:3, 3].tolist()}


def _calibration(job: _Job, cameras: tuple[Camera, ...], lidar: Lidar) -> list[dict]:
    """Makes the calibrated_sensor rows of one scene."""
    # A matrix would say nothing true of a camera with distortion: the devkit finds none, and rig.yaml has the model.
    mounts = [
        (c.name, c.ego_from_cam, c.img_from_cam.tolist() if isinstance(c.model, Pinhole) else []) for c in cameras
    ]
    rows = []
    for channel, ego_from_sensor, intrinsic in [*mounts, (LIDAR_NAME, lidar.ego_from_lidar, [])]:
        row = {"token": job.token("calibrated_sensor", channel), "sensor_token": _token("sensor", channel)}
        rows.append(row | _pose_fields(ego_from_sensor) | {"camera_intrinsic": intrinsic})
    return rows


def _annotate(
    job: _Job, district: District, k: int, seconds: float, hit: np.ndarray, visible: np.ndarray
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
                "attribute_tokens": [_token("attribute", attribute)] if attribute else [],
                "translation": [float(xy[0]), float(xy[1]), height / 2],
                "size": [float(width), float(length), float(height)],
                "rotation": Quaternion(axis=[0, 0, 1], radians=yaw).elements.tolist(),
                "num_lidar_pts": int(counts[a]),
                "num_radar_pts": 0,
            }
        )
    return rows


def _link_instances(job: _Job, district: District, annotations: list[dict]) -> list[dict]:
    """Sets prev and next of the annotations in place and returns the instance rows."""
    instances = []
    for actor in district.actors:
        token = job.token("instance", actor.name)
        own = [row for row in annotations if row["instance_token"] == token]
        if not own:
            continue
        for row, linked in zip(own, _linked(own), strict=True):
            row.update(linked)
        first, last = own[0]["token"], own[-1]["token"]
        row = {"token": token, "category_token": _token("category", actor.category), "nbr_annotations": len(own)}
        instances.append(row | {"first_annotation_token": first, "last_annotation_token": last})
    return instances


def _write_tables(folder: Path, seed: int, parts: list[dict[str, list[dict]]], cameras: Sequence[str]) -> None:
    """Writes the thirteen tables to a folder, and the map images that the devkit requires beside it."""
    root = folder.parent
    tables = {name: [row for part in parts for row in part[name]] for name in parts[0]}
    tables["category"] = [
        {"token": _token("category", name), "name": name, "description": "", "index": i + 1}
        for i, name in enumerate(CATEGORIES)
    ]
    tables["attribute"] = [{"token": _token("attribute", name), "name": name, "description": ""} for name in ATTRIBUTES]
    tables["visibility"] = [
        {"token": str(i + 1), "level": level, "description": f"visible share of the object: {level[1:]} %"}
        for i, level in enumerate(_VISIBILITIES)
    ]
    tables["sensor"] = [
        {
            "token": _token("sensor", channel),
            "channel": channel,
            "modality": "lidar" if channel == LIDAR_NAME else "camera",
        }
        for channel in (*cameras, LIDAR_NAME)
    ]
    tables["map"] = []
    for location in LOCATIONS:
        logs = [row["token"] for row in tables["log"] if row["location"] == location]
        if not logs:
            continue
        token = _token(seed, "map", location)
        file = f"maps/{token}.png"
        (root / "maps").mkdir(exist_ok=True)
        # The devkit requires that the file exists; the content of the map is in the expansion.
        Image.new("L", (1, 1)).save(root / file)
        tables["map"].append({"category": "semantic_prior", "token": token, "filename": file, "log_tokens": logs})
    folder.mkdir()
    for name, rows in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=0), encoding="utf-8")
