"""Writes generated districts as a dataset in nuScenes format, which nuscenes-devkit 1.2.0 reads unchanged.

Format: the thirteen tables of https://www.nuscenes.org/nuscenes#data-format, JPEGs, LiDAR sweeps as `.pcd.bin`, a map
expansion 1.3 and its images per location, CAN bus messages per scene, and `<version>/splits.json` for the devkit's
evaluation. Scenes take the four locations in turn.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise
from pathlib import Path

import cv2
from tqdm import tqdm

from perception.errors import DataError
from perception.files import check_writable, new_folder
from perception.rigs.rig import RIG_FILE, Rig
from perception.synthetic.district import District
from perception.synthetic.limits import check_request, check_rig, check_space, official_names, scene_names
from perception.synthetic.map_expansion import write_map_expansion
from perception.synthetic.map_images import write_map_images
from perception.synthetic.scene import SceneJob, simulate_scene
from perception.synthetic.sensors import (
    LIDAR_NAME,
    SIX_CAMERAS,
    Mounting,
)
from perception.synthetic.tables import write_tables
from perception.synthetic.town import LOCATIONS

VERSION = "v1.0-synthetic"


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
    names = official or scene_names(scenes)
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
        (root / "can_bus").mkdir()
        workers = workers or os.cpu_count() or 1
        jobs = [
            SceneJob(
                root, names[i], seed, i, keyframes, rate, (image_size[0], image_size[1]), sweeps, rare, rig, sensors
            )
            for i, parts in enumerate(_parts_of_scenes(scenes, workers, len(rig) + 1))
            for sensors in parts
        ]
        written, districts = [], []
        for tables, district in tqdm(_whole_scenes(jobs, _run(jobs, workers)), total=scenes, desc="scenes"):
            written.append(tables)
            districts.append(district)
        write_tables(root / version, seed, written, [camera.name for camera in rig])
        if not official:  # the devkit knows its own splits, and reads no others of these versions
            (root / version / "splits.json").write_text(json.dumps({split: names}, indent=0), encoding="utf-8")
        if isinstance(rig, Rig):
            rig.save(root / version / RIG_FILE)
        for location in LOCATIONS:
            here = [d for d in districts if d.location == location]
            if here:
                (root / "maps" / "expansion").mkdir(parents=True, exist_ok=True)
                canvas = write_map_expansion(here, root / "maps" / "expansion" / f"{location}.json")
                write_map_images(here, canvas, root / "maps", location)


def _parts_of_scenes(scenes: int, workers: int, sensors: int) -> list[list[range]]:
    """Divides the sensors of the last scenes, for which there are more workers than scenes, into parts of their own."""
    rest = scenes % workers
    count = min(workers // rest, sensors) if rest else 1
    bounds = [sensors * k // count for k in range(count + 1)]
    divided = [range(start, stop) for start, stop in pairwise(bounds)]
    return [[range(sensors)]] * (scenes - rest) + [divided] * rest


def _whole_scenes(
    jobs: list[SceneJob], results: Iterator[tuple[dict[str, list[dict]], District]]
) -> Iterator[tuple[dict[str, list[dict]], District]]:
    """Joins the rows of scenes that were rendered in parts; the last part has the labels."""
    before: dict[str, list[dict]] = {"ego_pose": [], "sample_data": []}
    for job, (tables, district) in zip(jobs, results, strict=True):
        before = {name: rows + tables[name] for name, rows in before.items()}
        if job.labels:
            yield tables | before, district
            before = {name: [] for name in before}


def _run(jobs: list[SceneJob], workers: int) -> Iterator[tuple[dict[str, list[dict]], District]]:
    """Yields the results of all jobs in their order."""
    if min(workers, len(jobs)) == 1:
        yield from map(simulate_scene, jobs)
        return
    # Spawned processes: a forked one may inherit a lock that is held by a thread of its parent.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_start_worker) as pool:
        futures = [pool.submit(simulate_scene, job) for job in jobs]
        try:
            for future in futures:
                yield future.result()
        except BrokenProcessPool:
            raise DataError(
                f"{jobs[0].root}: a worker process ended early. If memory ran out, give fewer workers or smaller "
                'images; a script needs if __name__ == "__main__": around its call of simulate, or workers=1'
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
