"""Writes info files of mmdet3d v1.1 from nuScenes-format tables, as mmdet3d's create_data does, without mmdet3d.

Any version, split and cameras will do, where mmdet3d's converter takes nuScenes' own alone. Left out are LiDAR sweeps
between keyframes, boxes of other than the ten classes, and the two-dimensional boxes in each image (`cam_instances`).
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from nuscenes import NuScenes
from nuscenes.eval.detection.utils import category_to_detection_name

from perception.data.checked_tables import open_tables
from perception.data.nuscenes import NuScenesDataset
from perception.errors import ConfigError
from perception.files import replacing
from perception.geometry import invert_rigid, transform_points, wrap_angle, yaw_from_rotation
from perception.types import ATTRIBUTES, BOX_CLASSES

_LIDAR = "LIDAR_TOP"
_POINT_FEATURES = 5  # numbers of a LiDAR point in nuScenes' files


def write_infos(dataset: NuScenesDataset, path: str | Path) -> None:
    """Writes the samples of a dataset as an info file.

    Images are named as in mmdet3d's layout: the file name, below `samples/<camera>` of the root; or the path below the
    root where they are elsewhere. So put the file into the root, or give `data_prefix` to its readers.

    Args:
        dataset: of one root, read from tables, without a rig file.
        path: `.pkl` to write, a pickle of plain data.

    Raises:
        ConfigError: the dataset has several roots, no tables, or cameras that are no pinholes.
        DataError: the tables are malformed.
    """
    if len(dataset.roots) != 1 or not dataset.version:
        raise ConfigError(f"infos are made of one root with tables, and the dataset has {len(dataset.roots)}; give one")
    if dataset.virtual_rig is not None:
        raise ConfigError(
            f"{dataset.roots[0] / dataset.version} has a rig file, and infos hold pinholes without distortion only; "
            "train on the tables instead"
        )
    nusc = open_tables(dataset.roots[0], dataset.version)
    content = {
        "metainfo": {
            "categories": {name: label for label, name in enumerate(BOX_CLASSES)},
            "dataset": "nuscenes",
            "version": dataset.version,
            "info_version": "1.1",
        },
        "data_list": [_entry(dataset, nusc, i) for i in range(len(dataset))],
    }
    with replacing(path) as temporary:
        temporary.write_bytes(pickle.dumps(content, protocol=4))


def _entry(dataset: NuScenesDataset, nusc: NuScenes, i: int) -> dict[str, Any]:
    token, index = dataset.tokens[i], dataset.index
    sample = nusc.get("sample", token)
    lidar = nusc.get("sample_data", sample["data"][_LIDAR])
    ego_from_lidar = dataset.ego_from_lidar(i)
    images = {}
    for n, camera in enumerate(dataset.cameras):
        if not index.image_path[i, n]:
            continue
        record = nusc.get("sample_data", sample["data"][camera])
        ego_from_cam = index.ego_from_cam[i, n]
        height, width = index.image_size[i, n].tolist()
        images[camera] = {
            "img_path": _relative(dataset, os.fsdecode(index.image_path[i, n]), camera),
            "height": height,
            "width": width,
            "cam2img": index.img_from_cam[i, n].tolist(),
            "cam2ego": (invert_rigid(index.ego_from_exposure[i, n]) @ ego_from_cam).tolist(),
            "lidar2cam": (invert_rigid(ego_from_cam) @ ego_from_lidar).tolist(),
            "timestamp": record["timestamp"] / 1e6,
            "sample_data_token": record["token"],
        }
    return {
        "sample_idx": i,
        "token": token,
        "timestamp": int(index.timestamp_us[i]) / 1e6,
        "ego2global": dataset.ego_pose(i).tolist(),
        "images": images,
        "lidar_points": {
            "num_pts_feats": _POINT_FEATURES,
            "lidar_path": _relative(dataset, str(dataset.roots[0] / lidar["filename"]), _LIDAR),
            "lidar2ego": ego_from_lidar.tolist(),
        },
        "lidar_sweeps": [],
        "instances": _instances(dataset, nusc, i),
    }


def _instances(dataset: NuScenesDataset, nusc: NuScenes, i: int) -> list[dict[str, Any]]:
    boxes, ego_from_lidar = dataset.gt_boxes(i), dataset.ego_from_lidar(i)
    annotations = [nusc.get("sample_annotation", token) for token in nusc.get("sample", dataset.tokens[i])["anns"]]
    annotations = [row for row in annotations if category_to_detection_name(row["category_name"])]
    center = transform_points(invert_rigid(ego_from_lidar), boxes.center.double().numpy())
    # The forms of mmdet3d, see `InfoSample.boxes`.
    yaw = wrap_angle(boxes.yaw.double().numpy() - yaw_from_rotation(ego_from_lidar))
    velocity = boxes.velocity.double().numpy() @ ego_from_lidar[:2, :2]
    return [
        {
            "bbox_label": label,
            "bbox_3d": [*row_center, *row_size, row_yaw],
            "bbox_label_3d": label,
            "velocity": row_velocity,
            "attr_label": attribute if attribute >= 0 else len(ATTRIBUTES),
            "num_lidar_pts": record["num_lidar_pts"],
            "num_radar_pts": record["num_radar_pts"],
            "bbox_3d_isvalid": valid,
        }
        for record, row_center, row_size, row_yaw, row_velocity, label, attribute, valid in zip(
            annotations,
            np.asarray(center).tolist(),
            boxes.size.tolist(),
            np.asarray(yaw).tolist(),
            velocity.tolist(),
            boxes.label.tolist(),
            boxes.attribute.tolist(),
            boxes.valid.tolist(),
            strict=True,
        )
    ]


def _relative(dataset: NuScenesDataset, path: str, channel: str) -> str:
    """Returns the name of a file in `samples/<channel>`, or its path below the root if it is elsewhere."""
    below = os.path.relpath(path, dataset.roots[0])
    folder, name = os.path.split(below)
    return name if folder == os.path.join("samples", channel) else below
