"""Builds the flat index of nuScenes-format tables: everything a dataset needs, as a few numpy arrays.

The official devkit keeps millions of dicts, which take minutes to load and are copied into every worker. `load_index`
reads the tables through the devkit once, stores the numbers in arrays, and caches these in one `.npz` file. Its name is
a hash of all inputs: the bytes of the tables and maps, and the code that read them.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import warnings
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from perception import geometry, types
from perception.data import lane_map, splits, table_checks
from perception.data.lane_map import LaneMap
from perception.data.splits import is_split_file, read_split_file, split_scenes
from perception.data.table_checks import DETECTION_CLASS, NO_CHANNEL, TableCheck, checked_tables
from perception.data.tables import TABLES
from perception.errors import DataError, PerceptionWarning
from perception.files import replacing
from perception.geometry import invert_rigid, rigid_from_quaternion, rigid_from_yaw, yaw_from_rotation
from perception.types import ATTRIBUTES, BOX_CLASSES, LaneRange, MapLine

_building = threading.Lock()

MAX_SECONDS = 1.5  # between boxes whose distance gives a velocity, as in the devkit
WIDE_MARGIN = LaneRange(24.0, 30.0)  # metres that the range of `wide_lines` is larger


def wide_range(lane_range: LaneRange) -> LaneRange:
    """Returns the larger range of the `wide_lines`, which augmentation cuts again after moving the ego frame."""
    return LaneRange(lane_range.x + WIDE_MARGIN.x, lane_range.y + WIDE_MARGIN.y)


class Lines(NamedTuple):
    """Vector lines of all samples in flat arrays."""

    sample_offset: np.ndarray  # [S+1] int64: sample i owns lines sample_offset[i] to sample_offset[i+1]
    label: np.ndarray  # [lines] int8 index into LINE_CLASSES
    vertex_offset: np.ndarray  # [lines+1] int64
    vertices: np.ndarray  # [vertices, 2] float32 metres, ego frame

    def of_sample(self, i: int) -> list[MapLine]:
        """Returns the lines of sample i, with float64 points."""
        return [
            MapLine(
                int(self.label[k]), self.vertices[self.vertex_offset[k] : self.vertex_offset[k + 1]].astype(np.float64)
            )
            for k in range(self.sample_offset[i], self.sample_offset[i + 1])
        ]


class Index(NamedTuple):
    """Poses, calibration, boxes and lines of S samples in scene order, with N cameras."""

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
    box_offset: np.ndarray  # [S+1] int64
    box_center: np.ndarray  # [boxes, 3] float32 ego
    box_size: np.ndarray  # [boxes, 3] float32 length, width, height
    box_yaw: np.ndarray  # [boxes] float32 ego
    box_velocity: np.ndarray  # [boxes, 2] float32 ego axes, NaN where unknown
    box_label: np.ndarray  # [boxes] int64 index into BOX_CLASSES
    box_attribute: np.ndarray  # [boxes] int64 index into ATTRIBUTES, -1 for none
    box_points: np.ndarray  # [boxes] int64 LiDAR and radar points on the object, see `NuScenesDataset.gt_boxes`
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
    content = _content_hash(dataroot, version, split, cameras, lane_range)
    cache = (cache_dir or _default_cache()) / f"index-{content}.npz"
    with _building:  # threads of one process wait for each other; processes may build the same index and both store it
        index = _read(cache)
        if index is None:
            index = _build(dataroot, version, split, cameras, lane_range)
            _write(cache, index)
    return index


def _default_cache() -> Path:
    if folder := os.environ.get("PERCEPTION_CACHE"):
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "perception"
    except RuntimeError:  # the user has no home, as in some containers: storing the index fails with a warning
        return Path(os.devnull) / "perception"


def concatenate(indices: list[Index], roots: list[Path]) -> Index:
    """Joins the indices of several roots into one; paths of images and maps become absolute."""
    sample_start = np.cumsum([0, *(len(index.token) for index in indices)])
    scene_start = np.cumsum([0, *(len(index.scene_name) for index in indices)])
    moved = []
    for index, root, samples, scenes in zip(indices, roots, sample_start, scene_start, strict=False):
        absolute = [os.path.join(os.fsencode(root), path) if path else b"" for path in index.image_path.ravel()]
        maps = [os.path.join(os.fsencode(root), path) for path in index.scene_map]
        moved.append(
            index._replace(
                scene=index.scene + scenes,
                previous=np.where(index.previous < 0, -1, index.previous + samples),
                image_path=np.array(absolute).reshape(index.image_path.shape),
                scene_map=np.array(maps),
            )
        )
    return _join(moved)


def _join(parts: list) -> Any:
    """Concatenates NamedTuples of arrays field by field; offsets (fields named *_offset) are shifted."""
    joined = {}
    for name in parts[0]._fields:
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], tuple):
            joined[name] = _join(values)
        elif name.endswith("_offset"):
            starts = np.cumsum([0, *(value[-1] for value in values)])
            joined[name] = np.concatenate(
                [[0], *(value[1:] + start for value, start in zip(values, starts, strict=False))]
            )
        else:
            joined[name] = np.concatenate(values)
    return type(parts[0])(**joined)


def _content_hash(
    dataroot: Path, version: str, split: str | Path, cameras: tuple[str, ...], lane_range: LaneRange
) -> str:
    """Returns a hash of everything the index depends on."""
    digest = hashlib.blake2b(digest_size=20)
    # The content of a split file counts, not its path: files of the same scenes share an index.
    wanted = sorted(read_split_file(split)) if is_split_file(split) else split
    facts = [version, wanted, *cameras, str(lane_range), package_version("nuscenes-devkit"), package_version("shapely")]
    digest.update(json.dumps(facts).encode())
    files = [dataroot / version / f"{table}.json" for table in TABLES]
    files += [path for path in [dataroot / version / "splits.json"] if path.is_file()]
    files += sorted(path for path in (dataroot / "maps" / "expansion").glob("*.json") if path.is_file())
    code = [
        Path(__file__),
        *(Path(str(module.__file__)) for module in (lane_map, splits, table_checks, geometry, types)),
    ]
    for path in files + code:
        digest.update(json.dumps([path.name, path.stat().st_size]).encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _write(path: Path, index: Index) -> None:
    arrays = {name: value for name, value in index._asdict().items() if not isinstance(value, Lines)}
    for name in ("lines", "wide_lines"):
        arrays |= {f"{name}.{field}": value for field, value in getattr(index, name)._asdict().items()}
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        warnings.warn(
            f"the index cache {path.parent} cannot be written ({error.strerror}), so the tables are read again next "
            "time; give a folder that can be written as cache_dir or in the environment variable PERCEPTION_CACHE",
            PerceptionWarning,
            stacklevel=2,
        )


def _read(path: Path) -> Index | None:
    """Reads a stored index; None if there is none, or with a warning if it is damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            lines = {
                name: Lines(*(arrays[f"{name}.{field}"] for field in Lines._fields)) for name in ("lines", "wide_lines")
            }
            fields: dict[str, Any] = {name: arrays[name] for name in Index._fields if name not in lines} | lines
            return Index(**fields)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # numpy and zipfile raise many kinds for damaged files
        warnings.warn(
            f"the index cache {path} cannot be read ({type(error).__name__}: {error}); it is made again",
            PerceptionWarning,
            stacklevel=2,
        )
        return None


def _build(dataroot: Path, version: str, split: str | Path, cameras: tuple[str, ...], lane_range: LaneRange) -> Index:
    tables = checked_tables(dataroot, version)
    wanted = set(split_scenes(split, dataroot / version, tables.scene_name))
    scenes = [row for row, name in enumerate(tables.scene_name) if name in wanted]
    samples, scene, previous = _order(tables, scenes)
    maps = [f"maps/expansion/{tables.location[tables.log_of_scene[row]]}.json".encode() for row in scenes]
    sample_fields = _samples(tables, samples, cameras, dataroot / version)
    token = tables.column("sample", "token")
    names = np.array([tables.scene_name[row].encode() for row in scenes])
    boxes = _boxes(tables, samples, sample_fields["global_from_ego"])
    del tables  # frees what the lines do not need
    poses = sample_fields["global_from_ego"], sample_fields["ego_from_lidar"]
    lines, wide_lines = _lines(dataroot, maps, scene, *poses, lane_range, f"indexing {version} {split}")
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


def _order(tables: TableCheck, scenes: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns per sample of the scenes: its row, the number of its scene, and the sample before it, -1 for none."""
    rows: list[int] = []
    scene_of: list[int] = []
    previous: list[int] = []
    for number, scene in enumerate(scenes):
        row, before = int(tables.first_sample[scene]), -1
        while row >= 0:
            rows.append(row)
            scene_of.append(number)
            previous.append(before)
            before, row = len(rows) - 1, int(tables.next_sample[row])
    return np.array(rows), np.array(scene_of), np.array(previous)


def _samples(tables: TableCheck, samples: np.ndarray, cameras: tuple[str, ...], folder: Path) -> dict[str, np.ndarray]:
    """Reads times, poses, calibration and image paths of samples, given by row."""
    S, N = len(samples), len(cameras)
    lidar = tables.lidar_of[samples]  # [S] row of the file
    global_from_ego = tables.ego_poses(tables.pose_of_data[lidar])  # [S, 4, 4]
    calibrations = rigid_from_quaternion(*tables.calibration)  # [calibrations, 4, 4]

    channel_of = tables.channel_of_data[tables.keyframe_rows]
    sample_of = tables.sample_of_data[tables.keyframe_rows]
    path_of = np.cumsum(tables.is_key) - 1  # [R] number among all keyframes
    size_of = np.zeros((len(tables.is_key), 2), dtype=np.int32)
    size_of[tables.camera_rows] = tables.camera_size
    paths = [[b""] * N for _ in range(S)]
    sizes = np.zeros((S, N, 2), dtype=np.int32)
    img_from_cam = np.tile(np.eye(3), (S, N, 1, 1))
    ego_from_cam = np.tile(np.eye(4), (S, N, 1, 1))
    place = np.full(tables.tables["sample"].rows, -1)
    place[samples] = np.arange(S)
    for k, camera in enumerate(cameras):
        sensor = tables.sensor_of_channel.get(camera, NO_CHANNEL)
        of_camera = channel_of == sensor
        at = place[sample_of[of_camera]]
        rows, at = tables.keyframe_rows[of_camera][at >= 0], at[at >= 0]
        calibration = tables.calibration_of_data[rows]
        if not tables.is_camera[calibration].all():
            modality = tables.modality[tables.sensor[calibration[~tables.is_camera[calibration]][0]]]
            raise DataError(
                f"{folder / 'sensor.json'}: {camera} was given as a camera, but its modality is '{modality}'; correct "
                f"it, or leave {camera} out"
            )
        for i, number in zip(at.tolist(), path_of[rows].tolist(), strict=True):
            paths[i][k] = tables.filename.keyframes[number]
        sizes[at, k] = size_of[rows]
        img_from_cam[at, k] = tables.intrinsics[calibration]
        global_from_exposure = tables.ego_poses(tables.pose_of_data[rows])
        ego_from_cam[at, k] = invert_rigid(global_from_ego[at]) @ global_from_exposure @ calibrations[calibration]
    return {
        "timestamp_us": tables.data_time[lidar],
        "global_from_ego": global_from_ego,
        "ego_from_lidar": calibrations[tables.calibration_of_data[lidar]],
        "image_path": np.array(paths),
        "image_size": sizes,
        "img_from_cam": img_from_cam,
        "ego_from_cam": ego_from_cam,
    }


def _boxes(tables: TableCheck, samples: np.ndarray, global_from_ego: np.ndarray) -> dict[str, np.ndarray]:
    """Reads the boxes of the ten detection classes of samples, given by row, in the ego frame."""
    names = [DETECTION_CLASS.get(name) for name in tables.category_name]
    label_of = np.array([-1 if name is None else BOX_CLASSES.index(name) for name in names] + [-1])
    label = label_of[tables.category[tables.instance]] if len(tables.instance) else np.zeros(0, dtype=np.int64)
    place = np.full(tables.tables["sample"].rows, -1)
    place[samples] = np.arange(len(samples))
    at = place[tables.sample_of_box] if len(label) else np.zeros(0, dtype=np.int64)
    rows = np.flatnonzero((label >= 0) & (at >= 0))
    rows = rows[np.argsort(at[rows], kind="stable")]  # in the order of the table within a sample, as the devkit has them
    ego_from_global = invert_rigid(global_from_ego)[at[rows]]  # [boxes, 4, 4]
    rotation, translation = tables.box_pose
    ego_from_box = ego_from_global @ rigid_from_quaternion(rotation[rows], translation[rows])
    # Contiguous, because BLAS rounds the product of a slice in another way.
    turn = np.ascontiguousarray(ego_from_global[:, :3, :3])
    velocity = (turn @ _velocity(tables, rows)[..., None])[:, :2, 0]
    known = [ATTRIBUTES.index(name) if name in ATTRIBUTES else -1 for name in tables.attribute_name]
    attribute = np.full(len(label), -1)
    owner, first = np.unique(tables.attribute_rows, return_index=True)
    attribute[owner] = np.array([*known, -1])[tables.attribute[first]]
    return {
        "box_offset": np.concatenate([[0], np.cumsum(np.bincount(at[rows], minlength=len(samples)))]),
        "box_center": ego_from_box[:, :3, 3].astype(np.float32),
        "box_size": tables.box_size[rows][:, [1, 0, 2]].astype(np.float32),
        "box_yaw": yaw_from_rotation(ego_from_box).astype(np.float32),
        "box_velocity": velocity.astype(np.float32),
        "box_label": label[rows],
        "box_attribute": attribute[rows],
        "box_points": tables.box_points[rows],
    }


def _velocity(tables: TableCheck, rows: np.ndarray) -> np.ndarray:
    """Returns the velocities [n, 3] of boxes in the global frame by the rule of the devkit: NaN where unknown.

    It is the distance between the boxes before and after, or from this box if there is only one of them, if these are
    at most 1.5 s from this box.
    """
    after = tables.next_box
    before = np.full(len(after), -1)
    linked = np.flatnonzero(after >= 0)
    before[after[linked]] = linked
    last = np.where(after[rows] >= 0, after[rows], rows)
    first = np.where(before[rows] >= 0, before[rows], rows)
    position, time = tables.box_pose[1], 1e-6 * tables.sample_time
    seconds = time[tables.sample_of_box[last]] - time[tables.sample_of_box[first]]
    most = np.where((after[rows] >= 0) & (before[rows] >= 0), 2, 1) * MAX_SECONDS
    known = (last != first) & (seconds <= most)
    velocity = np.full((len(rows), 3), np.nan)
    velocity[known] = (position[last] - position[first])[known] / seconds[known, None]
    return velocity


def _lines(
    dataroot: Path,
    maps: list[bytes],
    scene: np.ndarray,
    global_from_ego: np.ndarray,
    ego_from_lidar: np.ndarray,
    lane_range: LaneRange,
    title: str,
) -> tuple[Lines, Lines]:
    """Cuts the lines of all samples for a range, and for the wide range around it."""
    lane_maps = {path: LaneMap(dataroot / os.fsdecode(path)) for path in dict.fromkeys(maps)}
    lines, wide_lines = [], []
    for i in tqdm(range(len(scene)), desc=title, unit="sample", delay=2):
        lane_map = lane_maps[maps[scene[i]]]
        lines.append(lines_around(lane_map, global_from_ego[i], ego_from_lidar[i], lane_range))
        wide_lines.append(lines_around(lane_map, global_from_ego[i], ego_from_lidar[i], wide_range(lane_range)))
    return _flat(lines), _flat(wide_lines)


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
    if protocol != "maptr":
        x, y = global_from_ego[:2, 3]
        return lanes.lines(x, y, float(yaw_from_rotation(global_from_ego)), lane_range, protocol)
    global_from_lidar = global_from_ego @ ego_from_lidar
    ego_from = ego_from_patch(global_from_ego, ego_from_lidar)
    x, y = global_from_lidar[:2, 3]
    lines = lanes.lines(x, y, yaw_from_rotation(global_from_lidar) + np.pi / 2, lane_range)
    return [line._replace(points=line.points @ ego_from[:2, :2].T + ego_from[:2, 3]) for line in lines]


def _flat(lines_of_samples: list[list[MapLine]]) -> Lines:
    """Packs the lines of all samples into flat arrays."""
    lines = [line for sample in lines_of_samples for line in sample]
    return Lines(
        sample_offset=np.cumsum([0, *map(len, lines_of_samples)]),
        label=np.array([line.label for line in lines], dtype=np.int8),
        vertex_offset=np.cumsum([0, *(len(line.points) for line in lines)]),
        vertices=np.concatenate([np.zeros((0, 2)), *(line.points for line in lines)]).astype(np.float32),
    )
