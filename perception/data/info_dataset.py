"""Opens info files of mmdet3d v1.1 as a dataset for training and evaluation.

Poses, calibration, boxes and images are those of the file. It holds neither scenes nor lanes: these come from the
tables and the map expansion of nuScenes where they are beside it, as in mmdet3d's layout of `data/nuscenes`. The
official evaluation of boxes reads these tables too, as mmdet3d's `NuScenesMetric` does.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from perception.data import info_fields, infos, plain_pickle
from perception.data.augment import Augment
from perception.data.index import Index, cached_index, map_files
from perception.data.info_files import read_infos
from perception.data.infos import InfoSample
from perception.data.lane_map import Lines
from perception.data.nuscenes import NUSCENES_CAMERAS, NuScenesDataset, warn_of_lost_views
from perception.data.sample_lines import lines_of_samples, wide_range
from perception.errors import DataError, PerceptionWarning
from perception.geometry import invert_rigid
from perception.inference.ego_motion import interrupted
from perception.reading import number, parse_json, read_bytes, short, typed
from perception.types import ATTRIBUTES, DEFAULT_LANE_RANGE, LaneRange, NumpyCameraRig

_TABLES = ("sample", "scene", "log")
_MOST_POINTS = 10**9
_LATEST = 1e11  # seconds; nuScenes' times have 10 digits before the point


def open_infos(
    path: str | Path,
    *,
    image_size: tuple[int, int],
    data_prefix: Mapping[str, str] | None = None,
    dataroot: str | Path | None = None,
    cameras: Sequence[str] = NUSCENES_CAMERAS,
    points_per_line: int = 20,
    lane_range: LaneRange = DEFAULT_LANE_RANGE,
    cache_dir: str | Path | None = None,
    augment: Augment | None = None,
) -> NuScenesDataset:
    """Opens an info file as a dataset.

    Args:
        path: `.pkl` or JSON of mmdet3d v1.1.
        image_size: height and width of the images, see `fit_image`.
        data_prefix: folder of the images by camera, or of all other cameras under `img`, relative to the file. By
            default images are looked for beside the file and in `samples/<camera>`.
        dataroot: folder of the tables, whose version is `metainfo.version`, and of the maps; that of the file by
            default. Without tables, a gap or a jump begins a scene, there are no lines, and boxes cannot be evaluated.
        cameras: names, in order; a camera that an entry lacks is marked as not present.
        points_per_line, lane_range, cache_dir, augment: as for `NuScenesDataset`.

    Raises:
        ConfigError: as for `NuScenesDataset`.
        DataError: a file or a field is missing or malformed.

    Warns:
        PerceptionWarning: there are no lines, or the images are cut off.
    """
    path = Path(path)
    root = path.parent if dataroot is None else Path(dataroot)
    metainfo, samples = read_infos(path)
    version = metainfo.get("version", "")
    tables = root / version if isinstance(version, str) and version else None
    if tables is None or not all((tables / f"{table}.json").is_file() for table in _TABLES):
        tables = None
    names = tuple(cameras)
    prefix = None if data_prefix is None else dict(data_prefix)
    table_files = [] if tables is None else [tables / f"{table}.json" for table in _TABLES]
    code = [Path(str(module.__file__)) for module in (infos, info_fields, plain_pickle)]
    index = cached_index(
        [path, *table_files, *map_files(root), *code, Path(__file__)],
        ["infos", str(path.resolve()), str(root.resolve()), prefix, *names, str(lane_range)],
        lambda: _build(path, samples, names, prefix, root, tables, lane_range),
        None if cache_dir is None else Path(cache_dir),
    )
    if (index.scene_map == b"").all():
        warnings.warn(
            f"{path}: there are no lines to learn, because {root} has no tables of {short(version)} with "
            "maps/expansion; put them there, or leave the losses of lines out with train.disabled_losses",
            PerceptionWarning,
            stacklevel=2,
        )
    warn_of_lost_views(index, path, names, (image_size[0], image_size[1]))
    return NuScenesDataset.from_index(
        index,
        root,
        "" if tables is None else tables.name,
        tuple(os.fsdecode(name) for name in index.scene_name),
        image_size=image_size,
        cameras=names,
        points_per_line=points_per_line,
        lane_range=lane_range,
        augment=augment,
    )


def _build(
    path: Path,
    samples: list[InfoSample],
    cameras: tuple[str, ...],
    data_prefix: Mapping[str, str] | None,
    root: Path,
    tables: Path | None,
    lane_range: LaneRange,
) -> Index:
    tokens = [_token(sample) for sample in samples]
    if len(set(tokens)) < len(tokens):
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise DataError(f"{path} has token {short(twice)} twice in data_list; remove one of the entries")
    times = np.array([_time_us(sample) for sample in samples])
    poses = np.stack([sample.global_from_ego() for sample in samples])
    scene_of, names, maps = _drives(poses, times) if tables is None else _scenes(path, tokens, root, tables)
    order = np.lexsort((times, scene_of))  # one scene after the other, as the tables have them
    samples, tokens = [samples[i] for i in order], [tokens[i] for i in order]
    scene, times, poses = scene_of[order], times[order], poses[order]
    previous = np.where(np.diff(scene, prepend=-1) == 0, np.arange(len(scene)) - 1, -1)
    lidar = np.stack([_ego_from_lidar(sample) for sample in samples])
    rigs, from_exposure = zip(*(sample.rig(cameras) for sample in samples), strict=True)
    paths = [
        [
            os.fsencode(sample.image_path(camera, data_prefix)) if present else b""
            for camera, present in zip(cameras, rig.present, strict=True)
        ]
        for sample, rig in zip(samples, rigs, strict=True)
    ]
    ranges = (lane_range, wide_range(lane_range))
    no_lines = Lines(
        np.zeros(len(samples) + 1, np.int64), np.zeros(0, np.int8), np.zeros(1, np.int64), np.zeros((0, 2), np.float32)
    )
    lines = [no_lines, no_lines]
    if maps:
        title = f"indexing {path.name}"
        lines = lines_of_samples(root, [os.fsencode(place) for place in maps], scene, poses, lidar, ranges, title)
    return Index(
        token=np.array([token.encode() for token in tokens]),
        timestamp_us=times,
        global_from_ego=poses,
        ego_from_lidar=lidar,
        scene=scene,
        previous=previous,
        scene_name=np.array([name.encode() for name in names]),
        scene_map=np.array([os.fsencode(root / place) for place in maps] or [b""] * len(names)),
        image_path=np.array(paths),
        image_size=_image_sizes(samples, rigs, cameras, paths),
        img_from_cam=np.stack([rig.img_from_cam for rig in rigs]),
        ego_from_cam=np.stack([rig.ego_from_cam for rig in rigs]),
        ego_from_exposure=np.stack(from_exposure),
        **_boxes(samples),
        lines=lines[0],
        wide_lines=lines[1],
    )


def _scenes(path: Path, tokens: list[str], root: Path, tables: Path) -> tuple[np.ndarray, list[str], list[str]]:
    """Returns the number of the scene of each sample, the names of the scenes, and their maps, none without maps."""
    sample, scene, log = (_rows(tables / f"{table}.json") for table in _TABLES)
    of_sample = {}
    for token in tokens:
        if token not in sample:
            raise DataError(
                f"{tables / 'sample.json'} lacks the token {short(token)} of {path}; they do not belong together"
            )
        of_sample[token] = _field(sample, token, "scene_token", tables / "sample.json")
    wanted = set(of_sample.values())
    rows = {token: number for number, token in enumerate(token for token in scene if token in wanted)}
    if lacking := sorted(wanted - rows.keys()):
        raise DataError(f"{tables / 'scene.json'} lacks the scene {short(lacking[0])} of sample.json; unpack it again")
    names = [_field(scene, token, "name", tables / "scene.json") for token in rows]
    logs = [_field(scene, token, "log_token", tables / "scene.json") for token in rows]
    places = [_field(log, token, "location", tables / "log.json") for token in logs]
    maps = [f"maps/expansion/{place}.json" for place in places]
    found = (root / "maps" / "expansion").is_dir()
    return np.array([rows[of_sample[token]] for token in tokens]), names, maps if found else []


def _rows(path: Path) -> dict[str, Mapping[str, Any]]:
    """Returns the records of a table by token."""
    rows = typed(parse_json(path, read_bytes(path, "a table"), "a table"), list, str(path), "a list of records")
    return {row["token"]: row for row in rows if isinstance(row, Mapping) and isinstance(row.get("token"), str)}


def _field(rows: Mapping[str, Mapping[str, Any]], token: str, field: str, path: Path) -> str:
    return str(typed(rows.get(token, {}).get(field), str, f"{path}: {field} of {short(token)}", "text"))


def _drives(poses: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, list[str], list[str]]:
    """Divides samples without tables into drives, as `_scenes` does: a gap or a jump in the file's order begins one."""
    seconds = np.diff(times) * 1e-6
    motion = invert_rigid(poses[1:]) @ poses[:-1]
    begins = (seconds <= 0) | interrupted(motion, np.maximum(seconds, 0))
    drive = np.concatenate([[0], np.cumsum(begins)])
    return drive, [f"drive-{number:04d}" for number in range(drive[-1] + 1)], []


def _token(sample: InfoSample) -> str:
    token = sample.entry.get("token")
    if not isinstance(token, str) or not token:
        raise DataError(f"{sample.name}: token is {short(token)}; give each sample a text of its own")
    return token


def _time_us(sample: InfoSample) -> int:
    seconds = number(sample.entry.get("timestamp"))
    if not 0 <= seconds < _LATEST:
        raise DataError(
            f"{sample.name}: timestamp is {short(sample.entry.get('timestamp'))}; give seconds since 1970, as infos of "
            "v1.1 have them"
        )
    return round(seconds * 1e6)


def _ego_from_lidar(sample: InfoSample) -> np.ndarray:
    pose = sample.ego_from_lidar()
    if pose is None:
        raise DataError(f"{sample.name}: lidar_points.lidar2ego is missing; add it, because boxes are in that frame")
    return pose


def _image_sizes(
    samples: list[InfoSample], rigs: Sequence[NumpyCameraRig], cameras: tuple[str, ...], paths: list[list[bytes]]
) -> np.ndarray:
    """Returns height and width [S, N, 2] of the images.

    Infos of mmdet3d do not hold them. Opening every image would take long, so one is opened for each calibration.
    """
    sizes = np.zeros((len(samples), len(cameras), 2), dtype=np.int32)
    known: dict[tuple[int, bytes], tuple[int, int]] = {}
    for i, (sample, rig) in enumerate(zip(samples, rigs, strict=True)):
        for n in np.flatnonzero(rig.present):
            calibration = int(n), rig.img_from_cam[n].tobytes()
            if calibration not in known:
                known[calibration] = sample.stored_size(cameras[n], Path(os.fsdecode(paths[i][n])))
            sizes[i, n] = known[calibration]
    return sizes


def _boxes(samples: list[InfoSample]) -> dict[str, np.ndarray]:
    """Reads the boxes of the ten classes."""
    parts, counts = [], []
    for sample in samples:
        boxes = sample.boxes()
        rows = np.flatnonzero(boxes.label.numpy() >= 0)
        given = sample.entry.get("instances") or []
        facts = [_counted(given[row], bool(boxes.valid[row]), f"{sample.name}: instances[{row}]") for row in rows]
        points, attribute = np.array(facts, dtype=np.int64).reshape(-1, 2).T
        parts.append([part.numpy()[rows] for part in boxes[:5]] + [points, attribute])
        counts.append(len(rows))
    center, size, yaw, velocity, label, points, attribute = (np.concatenate(part) for part in zip(*parts, strict=True))
    return {
        "box_offset": np.concatenate([[0], np.cumsum(counts)]),
        "box_center": center,
        "box_size": size,
        "box_yaw": yaw,
        "box_velocity": velocity,
        "box_label": label,
        "box_attribute": attribute,
        "box_points": points,
        "box_instance": np.full(len(label), -1),  # infos have no ids
    }


def _counted(instance: Mapping[str, Any], valid: bool, where: str) -> tuple[int, int]:
    """Returns the LiDAR and radar points of a box, -1 where they are unknown and the box counts, and its attribute."""
    given = [value for key in ("num_lidar_pts", "num_radar_pts") if (value := instance.get(key)) is not None]
    points = -1 if valid else 0
    if given and valid:
        counts = [number(value) for value in given]
        if not all(-1 <= count <= _MOST_POINTS for count in counts):
            raise DataError(f"{where}: num_lidar_pts or num_radar_pts is no number of points; correct it")
        points = int(sum(counts))
    attribute = instance.get("attr_label", len(ATTRIBUTES))
    known = isinstance(attribute, int | np.integer) and 0 <= attribute < len(ATTRIBUTES)
    return points, int(attribute) if known else -1
