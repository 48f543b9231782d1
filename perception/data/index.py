"""Builds the flat index of nuScenes-format tables: everything a dataset needs, as a few numpy arrays.

The official devkit keeps millions of dicts, which take minutes to load and are copied into every worker. `load_index`
reads the tables once, stores the numbers in arrays, and caches these in one file, which processes map into their memory
and share. Its name is a hash of all inputs: the bytes of the tables and maps, and the code that read them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from perception import geometry, types
from perception.data import (
    checked_tables,
    findings,
    index_files,
    lane_map,
    sample_lines,
    splits,
    table_checks,
    table_files,
    tables,
)
from perception.data.checked_tables import check_and_keep
from perception.data.lane_map import Lines
from perception.data.sample_lines import join, lines_of_samples, wide_range
from perception.data.splits import is_split_file, read_split_file, split_scenes
from perception.data.table_checks import NO_CHANNEL, TableCheck
from perception.data.table_files import TABLES
from perception.data.tables import DETECTION_CLASS
from perception.errors import DataError
from perception.files import user_cache
from perception.geometry import invert_rigid, rigid_from_quaternion, yaw_from_rotation
from perception.rigs.rig import RIG_FILE, Rig
from perception.types import ATTRIBUTES, BOX_CLASSES, LaneRange

_building = threading.Lock()

SAME_POSE = 0.05  # metres and radians between the tables, which count, and a rig file; calibrations of cars differ
AT_ONCE = 50_000  # boxes whose matrices are in memory
MAX_SECONDS = 1.5  # between boxes whose distance gives a velocity, as in the devkit
LINES = ("lines", "wide_lines")  # fields of an index that hold several arrays

# What the numbers of an index depend on
_CODE = (
    geometry, types, checked_tables, findings, lane_map, sample_lines, splits, table_checks, table_files, tables,
)  # fmt: skip


class Index(NamedTuple):
    """Poses, calibration, boxes and lines of S samples in scene order, with N cameras.

    If there is a rig file in the folder of the tables, `img_from_cam` of a camera with distortion is that of the
    pinhole which agrees with it near the optical axis.
    """

    token: np.ndarray  # [S] bytes
    timestamp_us: np.ndarray  # [S] int64 of LIDAR_TOP: the reference time
    global_from_ego: np.ndarray  # [S, 4, 4] float64 at the reference time
    ego_from_lidar: np.ndarray  # [S, 4, 4] float64
    scene: np.ndarray  # [S] int64 index into scene_name
    previous: np.ndarray  # [S] int64 index of the previous keyframe of the scene, -1 at its start
    scene_name: np.ndarray  # [scenes] bytes
    scene_map: np.ndarray  # [scenes] bytes, path of the map expansion file
    image_path: np.ndarray  # [S, N] bytes, empty if the camera is missing
    image_size: np.ndarray  # [S, N, 2] int32 height, width
    img_from_cam: np.ndarray  # [S, N, 3, 3] float64 pixels of the original image
    ego_from_cam: np.ndarray  # [S, N, 4, 4] float64, the exposure's pose carried to the reference time
    ego_from_exposure: np.ndarray  # [S, N, 4, 4] float64, ego motion from the camera's exposure to the reference time
    box_offset: np.ndarray  # [S+1] int64
    box_center: np.ndarray  # [boxes, 3] float32 ego
    box_size: np.ndarray  # [boxes, 3] float32 length, width, height
    box_yaw: np.ndarray  # [boxes] float32 ego
    box_velocity: np.ndarray  # [boxes, 2] float32 ego axes, NaN where unknown
    box_label: np.ndarray  # [boxes] int64 index into BOX_CLASSES
    box_attribute: np.ndarray  # [boxes] int64 index into ATTRIBUTES, -1 for none
    box_points: np.ndarray  # [boxes] int64 LiDAR and radar points on the object, see `NuScenesDataset.gt_boxes`
    box_instance: np.ndarray  # [boxes] int64 row of the object in the instance table, the same in all its samples
    lines: Lines  # of the lane range that the index was made for
    wide_lines: Lines  # of its `wide_range`


def load_index(
    dataroot: Path,
    version: str,
    split: str | Path,
    cameras: tuple[str, ...],
    lane_range: LaneRange,
    cache_dir: Path | None,
) -> Index:
    """Loads the index of one split of one nuScenes-format root, from the cache if it is there.

    Args:
        dataroot: folder with `<version>/*.json`, `samples/` and `maps/expansion/*.json`.
        version: name of the folder of tables, such as `v1.0-trainval`.
        split: an official split, one of `<version>/splits.json`, or a file of scene names (see
            `perception.data.splits`).
        cameras: camera channels; the index keeps this order.
        lane_range: extent of the lines of the MapTR protocol.
        cache_dir: folder of the cache; None: `$PERCEPTION_CACHE`, `$XDG_CACHE_HOME/perception` or
            `~/.cache/perception`. If it cannot be written, a PerceptionWarning says so and the index is not stored.

    Raises:
        DataError: a folder, table, map or field is missing or malformed.
    """
    tables = dataroot / version
    if not dataroot.is_dir():
        raise DataError(f"{dataroot} is not a folder: give the root of a nuScenes-format dataset as dataroot")
    if not tables.is_dir():
        found = sorted(path.parent.name for path in dataroot.glob("*/sample.json"))
        raise DataError(
            f"{tables} is not a folder: version '{version}' is missing; give one of those found: {found or 'none'}"
        )
    for table in TABLES:
        if not (tables / f"{table}.json").is_file():
            raise DataError(f"{tables / f'{table}.json'} is missing: unpack the dataset's metadata again")
    # The content of a split file counts, not its path: files of the same scenes share an index.
    wanted = sorted(read_split_file(split)) if is_split_file(split) else split
    facts = [version, wanted, *cameras, str(lane_range)]
    files = [tables / f"{table}.json" for table in TABLES]
    files += [path for name in ("splits.json", RIG_FILE) if (path := tables / name).is_file()]
    return cached_index(
        [*files, *map_files(dataroot)], facts, lambda: _build(dataroot, version, split, cameras, lane_range), cache_dir
    )


def map_files(dataroot: Path) -> list[Path]:
    """Lists the files of the map expansion."""
    return sorted(path for path in (dataroot / "maps" / "expansion").glob("*.json") if path.is_file())


def cached_index(
    files: Sequence[Path], facts: Sequence[object], build: Callable[[], Index], cache_dir: Path | None
) -> Index:
    """Returns an index from the cache, or builds and stores it.

    Args:
        files: whose bytes decide what is in the index.
        facts: what else decides, as JSON values.
        build: makes the index.
        cache_dir: folder of the cache, see `load_index`.
    """
    folder = cache_dir or user_cache()
    versions = [package_version("nuscenes-devkit"), package_version("shapely")]
    code = [Path(__file__), *(Path(str(module.__file__)) for module in _CODE)]
    cache = folder / f"index-{index_files.content_hash([*facts, *versions], [*files, *code], folder)}.bin"
    with _building:  # threads of one process wait for each other; processes may build the same index and both store it
        arrays = index_files.read(cache, _array_names())
        if arrays is not None:
            return _from_arrays(arrays)
        index = build()
        index_files.write(cache, _arrays(index))
    return index


def _arrays(index: Index) -> dict[str, np.ndarray]:
    """Names the arrays of an index: those of its lines are `lines.label` and so on."""
    arrays: dict[str, np.ndarray] = {}
    for name, value in index._asdict().items():
        parts = {f"{name}.{field}": part for field, part in value._asdict().items()} if name in LINES else {name: value}
        arrays |= parts
    return arrays


def _array_names() -> set[str]:
    """Returns the names of the arrays of any index."""
    flat = {f"{name}.{field}" for name in LINES for field in Lines._fields}
    return flat | set(Index._fields).difference(LINES)


def _from_arrays(arrays: dict[str, np.ndarray]) -> Index:
    lines = {name: Lines(*(arrays[f"{name}.{field}"] for field in Lines._fields)) for name in LINES}
    fields: dict[str, Any] = {name: arrays[name] for name in Index._fields if name not in LINES} | lines
    return Index(**fields)


def concatenate(indices: list[Index], roots: list[Path]) -> Index:
    """Joins the indices of several roots into one; paths of images and maps become absolute."""
    sample_start = np.cumsum([0, *(len(index.token) for index in indices)])
    scene_start = np.cumsum([0, *(len(index.scene_name) for index in indices)])
    moved = []
    for index, root, samples, scenes in zip(indices, roots, sample_start, scene_start, strict=False):
        folder = os.path.join(os.fsencode(root), b"")
        moved.append(
            index._replace(
                scene=index.scene + scenes,
                previous=np.where(index.previous < 0, -1, index.previous + samples),
                image_path=np.where(index.image_path == b"", b"", np.char.add(folder, index.image_path)),
                scene_map=np.char.add(folder, index.scene_map),
            )
        )
    return moved[0] if len(moved) == 1 else join(moved)  # copies of a mapped file would not be shared by processes


def _build(dataroot: Path, version: str, split: str | Path, cameras: tuple[str, ...], lane_range: LaneRange) -> Index:
    checked = check_and_keep(dataroot, version)
    wanted = set(split_scenes(split, dataroot / version, checked.scene_name))
    scenes = [row for row, name in enumerate(checked.scene_name) if name in wanted]
    samples, scene, previous = _order(checked, scenes)
    maps = [f"maps/expansion/{checked.location[checked.log_of_scene[row]]}.json".encode() for row in scenes]
    sample_fields = _samples(checked, samples, cameras, dataroot / version)
    token = checked.column("sample", "token")
    names = np.array([checked.scene_name[row].encode() for row in scenes])
    boxes = _boxes(checked, samples, sample_fields["global_from_ego"])
    del checked  # frees what the lines do not need
    poses = sample_fields["global_from_ego"], sample_fields["ego_from_lidar"]
    ranges = (lane_range, wide_range(lane_range))
    lines, wide_lines = lines_of_samples(dataroot, maps, scene, *poses, ranges, f"indexing {version} {split}")
    return Index(
        token=np.array([token[row].encode() for row in samples.tolist()]),
        **sample_fields,
        scene=scene,
        previous=previous,
        scene_name=names,
        scene_map=np.array(maps),
        **boxes,
        lines=lines,
        wide_lines=wide_lines,
    )


def _order(checked: TableCheck, scenes: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns per sample of the scenes: its row, the number of its scene, and the sample before it, -1 for none."""
    rows: list[int] = []
    scene_of: list[int] = []
    previous: list[int] = []
    for number, scene in enumerate(scenes):
        row, before = int(checked.first_sample[scene]), -1
        while row >= 0:
            rows.append(row)
            scene_of.append(number)
            previous.append(before)
            before, row = len(rows) - 1, int(checked.next_sample[row])
    return np.array(rows), np.array(scene_of), np.array(previous)


def _samples(checked: TableCheck, samples: np.ndarray, cameras: tuple[str, ...], folder: Path) -> dict[str, np.ndarray]:
    """Reads times, poses, calibration and image paths of samples, given by row."""
    S, N = len(samples), len(cameras)
    files = checked.keyframes
    lidar = checked.lidar_of[samples]  # [S] number of the file
    global_from_ego = files.poses(lidar)  # [S, 4, 4]
    calibrations = rigid_from_quaternion(*checked.calibration)  # [calibrations, 4, 4]

    paths = [[b""] * N for _ in range(S)]
    sizes = np.zeros((S, N, 2), dtype=np.int32)
    img_from_cam = np.tile(np.eye(3), (S, N, 1, 1))
    ego_from_cam, ego_from_exposure = np.tile(np.eye(4), (2, S, N, 1, 1))
    place = np.full(checked.tables["sample"].rows, -1)
    place[samples] = np.arange(S)
    for k, camera in enumerate(cameras):
        sensor = checked.sensor_of_channel.get(camera, NO_CHANNEL)
        found = np.flatnonzero(files.channel == sensor)
        found = found[place[files.sample[found]] >= 0]
        at, calibration = place[files.sample[found]], files.calibration[found]
        if not checked.is_camera[calibration].all():
            modality = checked.modality[checked.sensor[calibration[~checked.is_camera[calibration]][0]]]
            raise DataError(
                f"{folder / 'sensor.json'}: {camera} was given as a camera, but its modality is '{modality}'; correct "
                f"it, or leave {camera} out"
            )
        for i, number in zip(at.tolist(), found.tolist(), strict=True):
            paths[i][k] = files.path[number]
        sizes[at, k] = files.size[found]
        img_from_cam[at, k] = checked.intrinsics[calibration]
        if checked.rig is not None and len(found):
            kinds = np.unique(np.column_stack([calibration, files.size[found]]), axis=0)
            for row, height, width in kinds.tolist():
                model = _checked_model(folder, checked.rig, camera, (height, width), calibrations[row])
                img_from_cam[at[calibration == row], k] = model
        ego_from_exposure[at, k] = invert_rigid(global_from_ego[at]) @ files.poses(found)
        ego_from_cam[at, k] = ego_from_exposure[at, k] @ calibrations[calibration]
    return {
        "timestamp_us": files.time[lidar],
        "global_from_ego": global_from_ego,
        "ego_from_lidar": calibrations[files.calibration[lidar]],
        "image_path": np.array(paths),
        "image_size": sizes,
        "img_from_cam": img_from_cam,
        "ego_from_cam": ego_from_cam,
        "ego_from_exposure": ego_from_exposure,
    }


def _checked_model(
    folder: Path, rig: Rig, name: str, image_size: tuple[int, int], ego_from_cam: np.ndarray
) -> np.ndarray:
    """Returns img_from_cam [3, 3] of a camera of the rig file after comparing it with the tables.

    Raises:
        DataError: the rig has no such camera, or it is for images of another size, or has another pose.
    """
    if name not in rig.names:
        raise DataError(
            f"{folder / RIG_FILE} has no camera {name}, which sample_data.json has; add it, or delete the file"
        )
    camera = rig[name]
    if camera.image_size != image_size:
        (H, W), (given_H, given_W) = camera.image_size, image_size
        raise DataError(
            f"{folder / RIG_FILE}: camera {name} has images of {W} x {H} pixels (width x height), and sample_data.json "
            f"of {given_W} x {given_H}; correct one of them"
        )
    if np.abs(camera.ego_from_cam - ego_from_cam).max() > SAME_POSE:
        raise DataError(
            f"{folder / RIG_FILE}: camera {name} has another pose than in calibrated_sensor.json, by up to "
            f"{np.abs(camera.ego_from_cam - ego_from_cam).max():.2g} in an element of the matrix; correct one of them"
        )
    return camera.model.img_from_cam


def _boxes(checked: TableCheck, samples: np.ndarray, global_from_ego: np.ndarray) -> dict[str, np.ndarray]:
    """Reads the boxes of the ten detection classes of samples, given by row, in the ego frame."""
    names = [DETECTION_CLASS.get(name) for name in checked.category_name]
    label_of = np.array([-1 if name is None else BOX_CLASSES.index(name) for name in names] + [-1])
    label = label_of[checked.category[checked.instance]] if len(checked.instance) else np.zeros(0, dtype=np.int64)
    place = np.full(checked.tables["sample"].rows, -1)
    place[samples] = np.arange(len(samples))
    at = place[checked.sample_of_box] if len(label) else np.zeros(0, dtype=np.int64)
    rows = np.flatnonzero((label >= 0) & (at >= 0))
    # Within a sample in the order of the table, as the devkit has them.
    rows = rows[np.argsort(at[rows], kind="stable")]
    ego_from_global = invert_rigid(global_from_ego)
    rotation, translation = checked.box_pose
    velocity_global = _velocity(checked, rows)
    center, yaw = np.zeros((len(rows), 3), np.float32), np.zeros(len(rows), np.float32)
    velocity = np.zeros((len(rows), 2), np.float32)
    for start in range(0, len(rows), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        ego_from = ego_from_global[at[rows[some]]]  # [boxes, 4, 4]
        ego_from_box = ego_from @ rigid_from_quaternion(rotation[rows[some]], translation[rows[some]])
        center[some], yaw[some] = ego_from_box[:, :3, 3], yaw_from_rotation(ego_from_box)
        # Contiguous, because BLAS rounds the product of a slice in another way.
        turn = np.ascontiguousarray(ego_from[:, :3, :3])
        velocity[some] = (turn @ velocity_global[some, :, None])[:, :2, 0]
    known = [ATTRIBUTES.index(name) if name in ATTRIBUTES else -1 for name in checked.attribute_name]
    attribute = np.full(len(label), -1)
    owner, first = np.unique(checked.attribute_rows, return_index=True)
    attribute[owner] = np.array([*known, -1])[checked.attribute[first]]
    return {
        "box_offset": np.concatenate([[0], np.cumsum(np.bincount(at[rows], minlength=len(samples)))]),
        "box_center": center,
        "box_size": checked.box_size[rows][:, [1, 0, 2]].astype(np.float32),
        "box_yaw": yaw,
        "box_velocity": velocity,
        "box_label": label[rows],
        "box_attribute": attribute[rows],
        "box_points": checked.box_points[rows],
        "box_instance": checked.instance[rows].astype(np.int64),
    }


def _velocity(checked: TableCheck, rows: np.ndarray) -> np.ndarray:
    """Returns the velocities [n, 3] of boxes in the global frame by the rule of the devkit: NaN where unknown.

    It is the distance between the boxes before and after, or from this box if there is only one of them, if these are
    at most 1.5 s from this box.
    """
    after = checked.next_box
    before = np.full(len(after), -1)
    linked = np.flatnonzero(after >= 0)
    before[after[linked]] = linked
    last = np.where(after[rows] >= 0, after[rows], rows)
    first = np.where(before[rows] >= 0, before[rows], rows)
    position, time = checked.box_pose[1], 1e-6 * checked.sample_time
    seconds = time[checked.sample_of_box[last]] - time[checked.sample_of_box[first]]
    most = np.where((after[rows] >= 0) & (before[rows] >= 0), 2, 1) * MAX_SECONDS
    known = (last != first) & (seconds <= most)
    velocity = np.full((len(rows), 3), np.nan)
    velocity[known] = (position[last] - position[first])[known] / seconds[known, None]
    return velocity
