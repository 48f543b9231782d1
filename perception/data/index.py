"""Builds the flat index of nuScenes-format tables: everything a dataset needs, as a few numpy arrays.

The official devkit keeps millions of dicts, which take minutes to load and are copied into every worker. `load_index`
reads the tables once, stores the numbers in arrays, and caches these in one file, which processes map into their memory
and share. Its name is a hash of all inputs: the bytes of the tables and maps, and the code that read them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from perception import geometry, types
from perception.data import lane_map, splits, table_checks, tables
from perception.data.lane_map import LaneMap
from perception.data.splits import is_split_file, read_split_file, split_scenes
from perception.data.table_checks import DETECTION_CLASS, NO_CHANNEL, TableCheck, checked_tables
from perception.data.tables import TABLES
from perception.errors import DataError, PerceptionWarning
from perception.files import replacing, user_cache
from perception.geometry import invert_rigid, rigid_from_quaternion, rigid_from_yaw, yaw_from_rotation
from perception.rigs.rig import RIG_FILE, Rig
from perception.types import ATTRIBUTES, BOX_CLASSES, LaneRange, MapLine

_building = threading.Lock()

MAGIC = b"perception index"
HEADER = struct.Struct("<16sII40x")  # magic bytes, checksum of what follows, length of the JSON that follows
ALIGNED = 64  # bytes: the start of each array
KEPT_HASH = 1 << 24  # bytes of a file whose hash is kept
SETTLED_NS = 2_000_000_000  # since the last change of such a file

SAME_POSE = 0.05  # metres and radians between the tables, which count, and a rig file; calibrations of cars differ
AT_ONCE = 50_000  # boxes whose matrices are in memory
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
    folder = cache_dir or user_cache()
    content = _content_hash(dataroot, version, split, cameras, lane_range, folder)
    cache = folder / f"index-{content}.bin"
    with _building:  # threads of one process wait for each other; processes may build the same index and both store it
        index = _read(cache)
        if index is None:
            index = _build(dataroot, version, split, cameras, lane_range)
            _write(cache, index)
    return index


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
    return moved[0] if len(moved) == 1 else _join(moved)  # copies of a mapped file would not be shared by processes


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
    dataroot: Path, version: str, split: str | Path, cameras: tuple[str, ...], lane_range: LaneRange, cache: Path
) -> str:
    """Returns a hash of everything the index depends on; `cache` keeps those of large files."""
    digest = hashlib.blake2b(digest_size=20)
    # The content of a split file counts, not its path: files of the same scenes share an index.
    wanted = sorted(read_split_file(split)) if is_split_file(split) else split
    facts = [version, wanted, *cameras, str(lane_range), package_version("nuscenes-devkit"), package_version("shapely")]
    digest.update(json.dumps(facts).encode())
    files = [dataroot / version / f"{table}.json" for table in TABLES]
    files += [path for name in ("splits.json", RIG_FILE) if (path := dataroot / version / name).is_file()]
    files += sorted(path for path in (dataroot / "maps" / "expansion").glob("*.json") if path.is_file())
    code = [
        Path(__file__),
        *(Path(str(module.__file__)) for module in (lane_map, splits, table_checks, tables, geometry, types)),
    ]
    for path in files + code:
        digest.update(json.dumps([path.name, path.stat().st_size]).encode())
        digest.update(_file_hash(path, cache))
    return digest.hexdigest()


def _file_hash(path: Path, cache: Path) -> bytes:
    """Returns a hash of a file. That of a large one is kept, because reading gigabytes takes long.

    It is read again if the file's size, times or place on the disk have changed. The time of the last change is set by
    the system alone; a file that has changed just now is not kept, because clocks of file systems are coarse.
    """
    state = path.stat()
    facts = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, state.st_dev]
    name = hashlib.blake2b(os.fsencode(path.resolve()), digest_size=20).hexdigest()
    kept = cache / f"hash-{name}.json"
    if state.st_size >= KEPT_HASH:
        try:
            found = json.loads(kept.read_bytes())
            if found["facts"] == facts:
                return bytes.fromhex(found["hash"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
    now = time.time_ns()
    digest = hashlib.blake2b(digest_size=20)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    if state.st_size >= KEPT_HASH and now - max(state.st_mtime_ns, state.st_ctime_ns) > SETTLED_NS:
        with contextlib.suppress(OSError), replacing(kept) as temporary:  # writing the index will warn
            temporary.write_text(json.dumps({"facts": facts, "hash": digest.hexdigest()}))
    return digest.digest()


def _write(path: Path, index: Index) -> None:
    """Stores an index: magic bytes, checksum and length of the header, the header, and the arrays as they are."""
    arrays = {name: value for name, value in index._asdict().items() if not isinstance(value, Lines)}
    for name in ("lines", "wide_lines"):
        arrays |= {f"{name}.{field}": value for field, value in getattr(index, name)._asdict().items()}
    places, end = {}, 0
    for name, array in arrays.items():
        places[name] = [array.dtype.str, array.shape, end]
        end += -(-array.nbytes // ALIGNED) * ALIGNED
    header = json.dumps(places).encode()
    header += b" " * (-(len(header) + HEADER.size) % ALIGNED)
    checksum = zlib.crc32(header)
    for array in arrays.values():
        checksum = zlib.crc32(_padded(array), checksum)
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.write(HEADER.pack(MAGIC, checksum, len(header)) + header)
            for array in arrays.values():
                file.write(_padded(array))
    except OSError as error:
        warnings.warn(
            f"the index cache {path.parent} cannot be written ({error.strerror}), so the tables are read again next "
            "time; give a folder that can be written as cache_dir or in the environment variable PERCEPTION_CACHE",
            PerceptionWarning,
            stacklevel=2,
        )


def _padded(array: np.ndarray) -> bytes:
    return array.tobytes() + bytes(-array.nbytes % ALIGNED)


def _read(path: Path) -> Index | None:
    """Maps a stored index into memory, which processes share; None if there is none, or with a warning if damaged."""
    try:
        content = np.memmap(path, dtype=np.uint8, mode="c")  # tensors of its arrays may be written, the file is not
        magic, checksum, length = HEADER.unpack(content[: HEADER.size].tobytes())
        if magic != MAGIC:
            raise ValueError("it is no index")
        if zlib.crc32(content.data[HEADER.size :]) != checksum:
            raise ValueError("its checksum is wrong")
        start = HEADER.size + length
        arrays = {}
        for name, (dtype, shape, place) in json.loads(bytes(content[HEADER.size : start])).items():
            size = np.dtype(dtype).itemsize * int(np.prod(shape))
            arrays[name] = np.asarray(content[start + place :][:size]).view(dtype).reshape(shape)
        lines = {
            name: Lines(*(arrays[f"{name}.{field}"] for field in Lines._fields)) for name in ("lines", "wide_lines")
        }
        fields: dict[str, Any] = {name: arrays[name] for name in Index._fields if name not in lines} | lines
        return Index(**fields)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # damaged files fail in many ways
        warnings.warn(
            f"the index cache {path} cannot be read ({type(error).__name__}: {error}); it is made again",
            PerceptionWarning,
            stacklevel=2,
        )
        return None


def _build(dataroot: Path, version: str, split: str | Path, cameras: tuple[str, ...], lane_range: LaneRange) -> Index:
    checked = checked_tables(dataroot, version)
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
    ego_from_cam = np.tile(np.eye(4), (S, N, 1, 1))
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
        ego_from_cam[at, k] = invert_rigid(global_from_ego[at]) @ files.poses(found) @ calibrations[calibration]
    return {
        "timestamp_us": files.time[lidar],
        "global_from_ego": global_from_ego,
        "ego_from_lidar": calibrations[files.calibration[lidar]],
        "image_path": np.array(paths),
        "image_size": sizes,
        "img_from_cam": img_from_cam,
        "ego_from_cam": ego_from_cam,
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
    blocks = np.split(np.arange(len(scene)), np.flatnonzero(np.diff(scene)) + 1)

    def cut(rows: np.ndarray) -> list[Lines]:
        lane_map, poses = lane_maps[maps[scene[rows[0]]]], (global_from_ego[rows], ego_from_lidar[rows])
        return [_flat(lines_around_all(lane_map, *poses, one)) for one in (lane_range, wide_range(lane_range))]

    # Threads, because shapely releases the interpreter's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(tqdm(pool.map(cut, blocks), total=len(blocks), desc=title, unit="scene", delay=2))
    lines, wide_lines = (_join(list(parts)) for parts in zip(*found, strict=True))
    return lines, wide_lines


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
    return lines_around_all(lanes, global_from_ego[None], ego_from_lidar[None], lane_range, protocol)[0]


def lines_around_all(
    lanes: LaneMap,
    global_from_ego: np.ndarray,
    ego_from_lidar: np.ndarray,
    lane_range: LaneRange,
    protocol: str = "maptr",
) -> list[list[MapLine]]:
    """Cuts the lines around each of B poses [B, 4, 4], see `lines_around`."""
    if protocol != "maptr":
        yaws = yaw_from_rotation(global_from_ego)
        return lanes.lines_of_patches(global_from_ego[:, :2, 3], yaws, lane_range, protocol)
    global_from_lidar = global_from_ego @ ego_from_lidar
    yaws = yaw_from_rotation(global_from_lidar) + np.pi / 2
    found = lanes.lines_of_patches(global_from_lidar[:, :2, 3], yaws, lane_range)
    moved = []
    for pose, lidar, lines in zip(global_from_ego, ego_from_lidar, found, strict=True):
        ego_from = ego_from_patch(pose, lidar)
        moved.append([line._replace(points=line.points @ ego_from[:2, :2].T + ego_from[:2, 3]) for line in lines])
    return moved


def _flat(lines_of_samples: list[list[MapLine]]) -> Lines:
    """Packs the lines of all samples into flat arrays."""
    lines = [line for sample in lines_of_samples for line in sample]
    return Lines(
        sample_offset=np.cumsum([0, *map(len, lines_of_samples)]),
        label=np.array([line.label for line in lines], dtype=np.int8),
        vertex_offset=np.cumsum([0, *(len(line.points) for line in lines)]),
        vertices=np.concatenate([np.zeros((0, 2)), *(line.points for line in lines)]).astype(np.float32),
    )
