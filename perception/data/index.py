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
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from perception import geometry, types
from perception.data import lane_map, splits, table_checks
from perception.data.lane_map import LaneMap
from perception.data.splits import is_split_file, read_split_file, split_scenes
from perception.data.table_checks import open_tables
from perception.data.tables import TABLES, read_rig
from perception.errors import DataError, PerceptionWarning
from perception.files import replacing
from perception.geometry import invert_rigid, rigid_from_quaternion, rigid_from_yaw, yaw_from_rotation
from perception.rigs.rig import RIG_FILE, Rig
from perception.types import ATTRIBUTES, BOX_CLASSES, LaneRange, MapLine

if TYPE_CHECKING:
    from nuscenes.nuscenes import NuScenes

_building = threading.Lock()

SAME_POSE = 0.05  # metres and radians between the tables, which count, and a rig file; calibrations of cars differ
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

    If a rig file lies beside the tables, `img_from_cam` of a camera with distortion is that of the pinhole which agrees
    with it near the optical axis.
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
    files += [path for name in ("splits.json", RIG_FILE) if (path := dataroot / version / name).is_file()]
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
    nusc = open_tables(dataroot, version)
    tables = dataroot / version
    rig = read_rig(tables)
    wanted = set(split_scenes(split, tables, [scene["name"] for scene in nusc.scene]))
    scenes = [scene for scene in nusc.scene if scene["name"] in wanted]
    lane_maps: dict[str, LaneMap] = {}
    samples: list[dict[str, Any]] = []
    boxes, lines, wide_lines, maps = [], [], [], []
    for scene_number, scene in enumerate(tqdm(scenes, desc=f"indexing {version} {split}", unit="scene", delay=2)):
        location = nusc.get("log", scene["log_token"])["location"]
        maps.append(f"maps/expansion/{location}.json".encode())
        if location not in lane_maps:
            lane_maps[location] = LaneMap(dataroot / os.fsdecode(maps[-1]))
        token, previous = scene["first_sample_token"], -1
        while token:
            record = nusc.get("sample", token)
            sample = _sample(nusc, tables, record, cameras, rig) | {"scene": scene_number, "previous": previous}
            previous, token = len(samples), record["next"]
            samples.append(sample)
            boxes.append(_boxes(nusc, record, sample["global_from_ego"]))
            poses = (sample["global_from_ego"], sample["ego_from_lidar"])
            lines.append(lines_around(lane_maps[location], *poses, lane_range))
            wide_lines.append(lines_around(lane_maps[location], *poses, wide_range(lane_range)))
    flat = {name: np.array([sample[name] for sample in samples]) for name in samples[0]}
    names = {"scene_name": np.array([scene["name"].encode() for scene in scenes]), "scene_map": np.array(maps)}
    box_offset = np.cumsum([0, *(len(sample["box_label"]) for sample in boxes)])
    flat_boxes = {name: np.concatenate([sample[name] for sample in boxes]) for name in boxes[0]}
    return Index(**flat, **names, box_offset=box_offset, **flat_boxes, lines=_flat(lines), wide_lines=_flat(wide_lines))


def _sample(nusc: NuScenes, tables: Path, record: dict, cameras: tuple[str, ...], rig: Rig | None) -> dict[str, Any]:
    """Reads poses, calibration and image paths of one sample."""
    lidar = nusc.get("sample_data", record["data"]["LIDAR_TOP"])
    global_from_ego = _pose(nusc.get("ego_pose", lidar["ego_pose_token"]))
    calibration = nusc.get("calibrated_sensor", lidar["calibrated_sensor_token"])
    sample = {
        "token": record["token"].encode(),
        "timestamp_us": lidar["timestamp"],
        "global_from_ego": global_from_ego,
        "ego_from_lidar": _pose(calibration),
    }
    paths, sizes, intrinsics, poses = [], [], [], []
    for camera in cameras:
        if camera not in record["data"]:
            paths.append(b"")
            sizes.append((0, 0))
            intrinsics.append(np.eye(3))
            poses.append(np.eye(4))
            continue
        data = nusc.get("sample_data", record["data"][camera])
        if data["sensor_modality"] != "camera":
            raise DataError(
                f"{tables / 'sensor.json'}: {camera} was given as a camera, but its modality is "
                f"'{data['sensor_modality']}'; correct it, or leave {camera} out"
            )
        calibration = nusc.get("calibrated_sensor", data["calibrated_sensor_token"])
        global_from_exposure = _pose(nusc.get("ego_pose", data["ego_pose_token"]))
        exposure_from_cam = _pose(calibration)
        paths.append(os.fsencode(data["filename"]))
        sizes.append((data["height"], data["width"]))
        if rig is None:
            intrinsics.append(np.array(calibration["camera_intrinsic"], dtype=np.float64))
        else:
            intrinsics.append(_checked_model(tables, rig, camera, sizes[-1], exposure_from_cam))
        poses.append(invert_rigid(global_from_ego) @ global_from_exposure @ exposure_from_cam)
    return sample | {
        "image_path": np.array(paths),
        "image_size": np.array(sizes, dtype=np.int32),
        "img_from_cam": np.array(intrinsics),
        "ego_from_cam": np.array(poses),
    }


def _checked_model(
    tables: Path, rig: Rig, name: str, image_size: tuple[int, int], ego_from_cam: np.ndarray
) -> np.ndarray:
    """Returns img_from_cam [3, 3] of a camera of the rig file after comparing it with the tables.

    Raises:
        DataError: the rig has no such camera, or it is for images of another size, or has another pose.
    """
    if name not in rig.names:
        raise DataError(
            f"{tables / RIG_FILE} has no camera {name}, which sample_data.json has; add it, or delete the file"
        )
    camera = rig[name]
    if camera.image_size != image_size:
        (H, W), (given_H, given_W) = camera.image_size, image_size
        raise DataError(
            f"{tables / RIG_FILE}: camera {name} has images of {W} x {H} pixels (width x height), and sample_data.json "
            f"of {given_W} x {given_H}; correct one of them"
        )
    if np.abs(camera.ego_from_cam - ego_from_cam).max() > SAME_POSE:
        raise DataError(
            f"{tables / RIG_FILE}: camera {name} has another pose than in calibrated_sensor.json, by up to "
            f"{np.abs(camera.ego_from_cam - ego_from_cam).max():.2g} in an element of the matrix; correct one of them"
        )
    return camera.model.img_from_cam


def _pose(record: dict) -> np.ndarray:
    """Returns rotation and translation of a record as a rigid transform [4, 4]."""
    return rigid_from_quaternion(record["rotation"], record["translation"])


def _boxes(nusc: NuScenes, record: dict, global_from_ego: np.ndarray) -> dict[str, np.ndarray]:
    """Reads the boxes of the ten detection classes of one sample, in the ego frame."""
    from nuscenes.eval.detection.utils import category_to_detection_name

    ego_from_global = invert_rigid(global_from_ego)
    rows = []
    for token in record["anns"]:
        box = nusc.get("sample_annotation", token)
        name = category_to_detection_name(box["category_name"])
        if name is None:
            continue
        width, length, height = box["size"]
        ego_from_box = ego_from_global @ _pose(box)
        velocity = ego_from_global[:3, :3] @ nusc.box_velocity(token)
        attributes = [nusc.get("attribute", attribute)["name"] for attribute in box["attribute_tokens"]]
        attribute = ATTRIBUTES.index(attributes[0]) if attributes and attributes[0] in ATTRIBUTES else -1
        points = box["num_lidar_pts"] + box["num_radar_pts"]
        yaw = yaw_from_rotation(ego_from_box)
        rows.append(
            (
                *ego_from_box[:3, 3],
                length,
                width,
                height,
                yaw,
                *velocity[:2],
                BOX_CLASSES.index(name),
                attribute,
                points,
            )
        )
    table = np.array(rows, dtype=np.float64).reshape(-1, 12)
    return {
        "box_center": table[:, 0:3].astype(np.float32),
        "box_size": table[:, 3:6].astype(np.float32),
        "box_yaw": table[:, 6].astype(np.float32),
        "box_velocity": table[:, 7:9].astype(np.float32),
        "box_label": table[:, 9].astype(np.int64),
        "box_attribute": table[:, 10].astype(np.int64),
        "box_points": table[:, 11].astype(np.int64),
    }


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
