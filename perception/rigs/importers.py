"""Imports calibrations of other formats as rigs: public datasets, ROS, Autoware and Kalibr.

Every format says where its own vehicle frame is. The ego frame of the library has its origin on the ground below the
rear axle; `ego_from_vehicle` carries the one to the other, and has a default where the format's own documentation gives
the numbers. docs/rigs.md has an example per format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from perception.errors import DataError
from perception.inference.checks import checked_rigid
from perception.reading import nearest
from perception.rigs import datasets, ros
from perception.rigs.documents import located, read_document, read_text
from perception.rigs.rig import Rig, RigCamera


@dataclass(frozen=True)
class _Format:
    """One format.

    Attributes:
        read: reads the cameras in the format's own vehicle frame, and returns a rig if it finds the pose of the LiDAR
            too; called with the path and the arguments in `takes`.
        what: the file or folder that it reads, for messages.
        vehicle: the format's own vehicle frame, for messages.
        ego_from_vehicle: height of the vehicle frame above the ground as [4, 4], None if nobody but the user knows it.
        takes: names of the arguments of `import_rig` that it reads.
    """

    read: Callable[..., list[RigCamera] | Rig]
    what: str
    vehicle: str
    ego_from_vehicle: NDArray[np.float64] | None
    takes: tuple[str, ...] = ()


def _up(height: float) -> NDArray[np.float64]:
    raised = np.eye(4)
    raised[2, 3] = height
    return raised


def _bag_cameras(path: Path, **arguments: Any) -> list[RigCamera]:
    from perception.recordings.bags import bag_cameras  # it needs rosbags

    return bag_cameras(path, **arguments)


FORMATS = {
    "nuscenes": _Format(datasets.nuscenes, "a folder of nuScenes tables, as v1.0-mini", "ego", np.eye(4), ("scene",)),
    # Height of the IMU above the road: Geiger et al., Vision meets Robotics, figure 3.
    "kitti": _Format(datasets.kitti, "calib.txt of the KITTI object benchmark", "IMU", _up(0.93), ("image_size",)),
    "kitti_raw": _Format(datasets.kitti_raw, "a folder with calib_cam_to_cam.txt of KITTI raw", "IMU", _up(0.93)),
    # Its IMU has x forward, y right, z down. Its cameras are 0.65 m above it and 1.55 m above the road.
    "kitti360": _Format(
        datasets.kitti360, "a folder with calib_cam_to_pose.txt of KITTI-360", "IMU",
        _up(0.90) @ np.diag([1.0, -1.0, -1.0, 1.0]),
    ),
    # The egovehicle frame is in the middle of the rear axle, about 33 cm above the ground.
    "argoverse2": _Format(
        datasets.argoverse2, "a folder with intrinsics.feather and egovehicle_SE3_sensor.feather of Argoverse 2",
        "egovehicle", _up(0.33),
    ),
    "waymo": _Format(datasets.waymo, "a JSON file of Waymo's camera_calibrations", "vehicle", np.eye(4)),
    "kalibr": _Format(ros.kalibr, "a camchain YAML of Kalibr", "IMU, or cam0 without an IMU", None),
    "ros": _Format(
        ros.camera_info, "a camera_info YAML file or a folder of them", "base_link", np.eye(4),
        ("poses", "frames", "base_frame"),
    ),
    "rosbag": _Format(
        _bag_cameras, "a ROS bag with CameraInfo and tf_static", "base_link", np.eye(4), ("base_frame",)
    ),
    "autoware": _Format(
        ros.autoware, "a folder with sensor_kit_calibration.yaml of Autoware", "base_link", np.eye(4),
        ("intrinsics", "base_frame"),
    ),
}  # fmt: skip


def import_rig(
    path: str | Path,
    format: str | None = None,
    *,
    cameras: Sequence[str] | None = None,
    ego_from_vehicle: ArrayLike | None = None,
    scene: str | None = None,
    image_size: tuple[int, int] | None = None,
    poses: str | Path | None = None,
    frames: Mapping[str, str] | None = None,
    base_frame: str | None = None,
    intrinsics: str | Path | Mapping[str, str | Path] | None = None,
) -> Rig:
    """Imports a calibration of another format.

    Args:
        path: a file or folder, as the format has it.
        format: "nuscenes", "kitti", "kitti_raw", "kitti360", "argoverse2", "waymo", "kalibr", "ros", "rosbag" or
            "autoware"; None to recognise it.
        cameras: names of the cameras to keep, in this order; None for all.
        ego_from_vehicle: [4, 4] metres; pose of the format's own vehicle frame in the ego frame (x forward, y left, z
            up, origin on the ground below the rear axle). None for the one that the format documents.
        scene: nuScenes: name of a scene; None for the first sample.
        image_size: KITTI object: height and width of the images, which its files do not hold.
        poses: ROS: a URDF, a YAML list of static transforms, or a folder of Autoware.
        frames: ROS: frame of each camera, by the camera's name; None to find it by the name.
        base_frame: ROS, bags and Autoware: the vehicle frame; None for base_link.
        intrinsics: Autoware: a folder of camera_info YAML files, or such a file for each camera.

    Raises:
        DataError: the format is not recognised, a file or field is missing or malformed, an argument does not belong to
            the format, or a calibration is invalid.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist; give a calibration file or folder")
    name = _recognised(path) if format is None else format
    if name not in FORMATS:
        raise DataError(f"format is {name!r}; {nearest(str(name), FORMATS)}")
    chosen = FORMATS[name]
    given: dict[str, Any] = {
        "scene": scene, "image_size": image_size, "poses": poses, "frames": frames, "base_frame": base_frame,
        "intrinsics": intrinsics,
    }  # fmt: skip
    given = {key: value for key, value in given.items() if value is not None}
    for key in given:
        if key not in chosen.takes:
            raise DataError(f"{key} was given, and the format {name} does not read it; leave it out")
    vehicle = chosen.ego_from_vehicle
    if ego_from_vehicle is not None:
        vehicle = checked_rigid("ego_from_vehicle", ego_from_vehicle)
    if vehicle is None:
        raise DataError(
            f"{path}: {name} has no vehicle frame; give ego_from_vehicle, the pose of its reference frame "
            f"({chosen.vehicle}) in the ego frame: x forward, y left, z up, origin on the ground below the rear axle"
        )
    read = chosen.read(path, **given)
    ego_from_lidar = read.ego_from_lidar if isinstance(read, Rig) else None
    if cameras is not None:
        by_name = {camera.name: camera for camera in read}
        for wanted in cameras:
            if wanted not in by_name:
                raise DataError(f"{path} has no camera {wanted!r}; {nearest(wanted, by_name)}")
        read = [by_name[wanted] for wanted in cameras]
    with located(str(path)):
        return Rig(
            [replace(camera, ego_from_cam=vehicle @ camera.ego_from_cam) for camera in read],
            None if ego_from_lidar is None else vehicle @ ego_from_lidar,
        )


def _recognised(path: Path) -> str:
    """The format of a file or folder."""
    files = {
        "calibrated_sensor.json": "nuscenes",
        "intrinsics.feather": "argoverse2",
        "calib_cam_to_pose.txt": "kitti360",
        "calib_cam_to_cam.txt": "kitti_raw",
        "sensor_kit_calibration.yaml": "autoware",
    }
    names = [file.name for file in path.iterdir()] if path.is_dir() else [path.name]
    found = {format for file, format in files.items() if file in names}
    if not found and path.is_dir() and (path / "calibration" / "intrinsics.feather").exists():
        found = {"argoverse2"}
    elif not found and (path.suffix in (".bag", ".mcap", ".db3") or "metadata.yaml" in names):
        found = {"rosbag"}
    elif not found and path.suffix == ".txt":
        found = {"kitti"} if "Tr_velo_to_cam:" in read_text(path, "a calibration file") else set()
    elif not found and path.suffix in (".yaml", ".yml", ".json"):
        content = read_document(path, "a calibration file")
        if isinstance(content, Mapping):
            keys = {
                "rig_format": "rig", "cam0": "kalibr", "camera_matrix": "ros",
                "camera_calibrations": "waymo", "cameraCalibrations": "waymo", "context": "waymo",
            }  # fmt: skip
            found = {format for key, format in keys.items() if key in content}
    if found == {"rig"}:
        raise DataError(f"{path} is a rig file of this library; open it with Rig.load")
    if len(found) != 1:
        known = "; ".join(f"{name}: {format.what}" for name, format in FORMATS.items())
        kind = f"looks like {' and '.join(sorted(found))}" if found else "is of no known format"
        raise DataError(f"{path} {kind}; give `format`, one of these ({known})")
    return found.pop()
