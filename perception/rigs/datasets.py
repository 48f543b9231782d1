"""Calibration files of public datasets: nuScenes, KITTI, KITTI-360, Argoverse 2, Waymo.

Every function returns cameras whose `ego_from_cam` ends in the vehicle frame of the dataset; `import_rig` carries it to
the ego frame. That of nuScenes returns a rig, because it also finds the pose of the LiDAR. Where a dataset was
calibrated with pixel centres at whole numbers, as OpenCV and the toolboxes before it do, the principal point is moved
by half a pixel here.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perception.errors import DataError, PerceptionWarning, not_installed
from perception.geometry import rigid_from_quaternion
from perception.reading import nearest
from perception.rigs.documents import Fields, located, read_document, read_text
from perception.rigs.models import FROM_INTEGER_CENTERS, BrownConrady, CameraModel, Mei, Pinhole
from perception.rigs.rig import BODY_FROM_OPTICAL, RIG_FILE, Rig, RigCamera, has_lidar_axes

Matrix = NDArray[np.float64]


def pinhole_or_brown(matrix: Matrix, coefficients: Iterable[float]) -> CameraModel:
    """A model from a 3 x 3 matrix and OpenCV's coefficients: a pinhole if all are 0. It does not move pixels.

    Raises:
        DataError: the matrix is not that of a pinhole.
    """
    if (matrix[2] != (0, 0, 1)).any() or matrix[1, 0] != 0:
        raise DataError(
            f"the matrix {matrix.tolist()} is not that of a camera; give the rows fx skew cx, 0 fy cy, 0 0 1"
        )
    focal = {"fx": matrix[0, 0], "fy": matrix[1, 1], "cx": matrix[0, 2], "cy": matrix[1, 2], "skew": matrix[0, 1]}
    numbers = {key: float(value) for key, value in focal.items()}
    distortion = tuple(float(value) for value in coefficients)
    return BrownConrady(**numbers, distortion=distortion) if any(distortion) else Pinhole(**numbers)


def nuscenes(path: Path, scene: str | None = None) -> Rig:
    """Reads the cameras of one sample and the pose of LIDAR_TOP from the tables of nuScenes.

    Images are undistorted, and the ego frame is the library's. Principal points are taken as they are stored, as
    `NuScenesDataset` does. A camera without intrinsics has its model in the rig file of the dataset.

    Args:
        path: folder of the tables, such as `v1.0-mini`.
        scene: name of a scene; None for the first sample of the table.

    Raises:
        DataError: a table is missing or malformed, or there is no such scene.

    Warns:
        PerceptionWarning: LIDAR_TOP has other axes than nuScenes' and is left out.
    """
    tables = {name: _table(path, name) for name in ("sensor", "calibrated_sensor", "sample_data")}
    rig = Rig.load(path / RIG_FILE) if (path / RIG_FILE).is_file() else None  # cameras that the tables cannot describe
    if scene is None:
        sample = _table(path, "sample")[0].text("token")
    else:
        scenes = {row.text("name"): row for row in _table(path, "scene")}
        if scene not in scenes:
            raise DataError(f"{path / 'scene.json'} has no scene {scene!r}; {nearest(scene, scenes)}")
        sample = scenes[scene].text("first_sample_token")
    sensors = {row.text("token"): row for row in tables["sensor"]}
    calibrations = {row.text("token"): row for row in tables["calibrated_sensor"]}
    cameras, ego_from_lidar = [], None
    for row in tables["sample_data"]:
        if row.get("sample_token") != sample or not row.get("is_key_frame"):
            continue
        calibration = _linked(row, calibrations, "calibrated_sensor_token", path / "calibrated_sensor.json")
        sensor = _linked(calibration, sensors, "sensor_token", path / "sensor.json")
        if sensor.get("modality") != "camera" and sensor.get("channel") != "LIDAR_TOP":
            continue
        pose = rigid_from_quaternion(calibration.array("rotation", (4,)), calibration.array("translation", (3,)))
        if sensor.get("modality") != "camera":
            ego_from_lidar = pose if has_lidar_axes(pose) else None
            if ego_from_lidar is None:
                text = "the axes of LIDAR_TOP are not x right, y ahead, z up, so the rig is read without it"
                warnings.warn(f"{calibration.where}: {text}; correct its rotation", PerceptionWarning, stacklevel=3)
            continue
        name, size = sensor.text("channel"), (row.pixels("height"), row.pixels("width"))
        if rig is not None and calibration.get("camera_intrinsic") == []:
            cameras.append(replace(rig[name], ego_from_cam=pose))
            continue
        with located(calibration.at("camera_intrinsic")):
            model = pinhole_or_brown(calibration.array("camera_intrinsic", (3, 3)), ())
        cameras.append(RigCamera(name, size, model, pose))
    if not cameras:
        raise DataError(f"{path / 'sample_data.json'} has no camera images of sample {sample}; give another scene")
    with located(str(path)):
        return Rig(cameras, ego_from_lidar)


def _table(folder: Path, name: str) -> list[Fields]:
    rows = read_document(folder / f"{name}.json", "a folder of nuScenes tables, such as v1.0-mini")
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{folder / f'{name}.json'} is no table with rows; give a folder of nuScenes tables")
    return [Fields(f"{folder / f'{name}.json'}: row {k}", row) for k, row in enumerate(rows)]


def _linked(row: Fields, table: dict[str, Fields], key: str, file: Path) -> Fields:
    token = row.text(key)
    if token not in table:
        raise DataError(f"{row.at(key)} is {token!r}, which {file} does not have; give the tables of one version")
    return table[token]


def kitti(path: Path, image_size: tuple[int, int] | None = None) -> list[RigCamera]:
    """Reads `calib.txt` of the KITTI object benchmark: rectified pinholes P0 to P3.

    The vehicle frame is that of the IMU (x forward, y left, z up). Pixel centres are at whole numbers in KITTI.

    Args:
        path: the file.
        image_size: height and width of the images, which the file does not hold (375 x 1242 for most).

    Raises:
        DataError: the file is malformed, or `image_size` is None.
    """
    if image_size is None:
        raise DataError(f"{path} does not hold the size of the images; give image_size, such as (375, 1242)")
    if len(image_size) != 2 or not 0 < image_size[0] < image_size[1]:  # KITTI has landscape images
        raise DataError(f"image_size is {image_size}; give height and width of {path}'s images, such as (375, 1242)")
    rows = _key_rows(path)
    rectification = np.eye(4)
    rectification[:3, :3] = _row(path, rows, ("R0_rect", "R_rect"), (3, 3))
    rect_from_imu = (
        rectification @ _rigid(_row(path, rows, ("Tr_velo_to_cam", "Tr_velo_cam"), (3, 4)))
        @ _rigid(_row(path, rows, ("Tr_imu_to_velo", "Tr_imu_velo"), (3, 4)))
    )  # fmt: skip
    cameras = []
    for name in ("P0", "P1", "P2", "P3"):
        if name in rows:
            model, cam_from_rect = _split_projection(path, rows, name)
            cameras.append(RigCamera(name, image_size, model, np.linalg.inv(cam_from_rect @ rect_from_imu)))
    if not cameras:
        raise DataError(f"{path} has none of P0 to P3; give calib.txt of the KITTI object benchmark")
    return cameras


def kitti_raw(path: Path) -> list[RigCamera]:
    """Reads the calibration of a day of KITTI raw, for its synchronised and rectified images.

    The vehicle frame is that of the IMU (x forward, y left, z up). Pixel centres are at whole numbers in KITTI.

    Args:
        path: folder with calib_cam_to_cam.txt, calib_velo_to_cam.txt and calib_imu_to_velo.txt, or the first of them.

    Raises:
        DataError: a file is missing or malformed.
    """
    folder = path if path.is_dir() else path.parent
    file = folder / "calib_cam_to_cam.txt"
    rows = _key_rows(file)
    rectification = np.eye(4)
    rectification[:3, :3] = _row(file, rows, ("R_rect_00",), (3, 3))
    chain = [rectification]
    for name in ("calib_velo_to_cam.txt", "calib_imu_to_velo.txt"):
        step = _key_rows(folder / name)
        rotation, translation = (
            _row(folder / name, step, (key,), shape) for key, shape in (("R", (3, 3)), ("T", (3, 1)))
        )
        chain.append(_rigid(np.concatenate([rotation, translation], -1)))
    rect_from_imu = chain[0] @ chain[1] @ chain[2]
    cameras = []
    for number in ("00", "01", "02", "03"):
        if f"P_rect_{number}" in rows:
            model, cam_from_rect = _split_projection(file, rows, f"P_rect_{number}")
            pose = np.linalg.inv(cam_from_rect @ rect_from_imu)
            cameras.append(RigCamera(f"image_{number}", _size(file, rows, f"S_rect_{number}"), model, pose))
    if not cameras:
        raise DataError(f"{file} has no P_rect_00 to P_rect_03; give a calibration of KITTI raw")
    return cameras


def kitti360(path: Path) -> list[RigCamera]:
    """Reads the calibration of KITTI-360: rectified perspective cameras 00 and 01, and MEI fisheyes 02 and 03.

    The vehicle frame is that of `calib_cam_to_pose.txt` (IMU: x forward, y right, z down). Pixel centres are at whole
    numbers.

    Args:
        path: folder `calibration` with calib_cam_to_pose.txt and perspective.txt, image_02.yaml, image_03.yaml or some
            of them.

    Raises:
        DataError: a file is missing or malformed.
    """
    folder = path if path.is_dir() else path.parent
    poses_file, perspective_file = folder / "calib_cam_to_pose.txt", folder / "perspective.txt"
    poses = _key_rows(poses_file)
    perspective = _key_rows(perspective_file) if perspective_file.exists() else {}
    cameras = []
    for number in ("00", "01", "02", "03"):
        name = f"image_{number}"
        yaml_file = folder / f"{name}.yaml"
        if f"P_rect_{number}" in perspective:
            # Each camera has its own pose, so that the last column of P_rect, the baseline, is not used.
            model, _ = _split_projection(perspective_file, perspective, f"P_rect_{number}")
            size = _size(perspective_file, perspective, f"S_rect_{number}")
            cam_from_rect = np.eye(4)
            cam_from_rect[:3, :3] = _row(perspective_file, perspective, (f"R_rect_{number}",), (3, 3)).T
        elif yaml_file.exists():
            root = Fields(str(yaml_file), read_document(yaml_file, "image_02.yaml of KITTI-360"))
            if root.text("model_type") != "MEI":
                raise DataError(
                    f"{root.at('model_type')} is {root.text('model_type')!r}; give a file with the model MEI"
                )
            mirror, lens, scale = (root.section(f"{key}_parameters") for key in ("mirror", "distortion", "projection"))
            with located(str(yaml_file)):
                model = Mei(
                    fx=scale.number("gamma1"), fy=scale.number("gamma2"), cx=scale.number("u0"), cy=scale.number("v0"),
                    xi=mirror.number("xi"), distortion=tuple(lens.number(key) for key in ("k1", "k2", "p1", "p2")),
                ).moved(FROM_INTEGER_CENTERS)  # fmt: skip
            size, cam_from_rect = (root.pixels("image_height"), root.pixels("image_width")), np.eye(4)
        else:
            continue
        pose = _rigid(_row(poses_file, poses, (name,), (3, 4))) @ cam_from_rect
        cameras.append(RigCamera(name, size, model, pose))
    if not cameras:
        raise DataError(
            f"{folder} has no perspective.txt and no image_02.yaml; give the folder calibration of KITTI-360"
        )
    return cameras


def argoverse2(path: Path) -> list[RigCamera]:
    """Reads the calibration of an Argoverse 2 sensor log.

    The published images are undistorted, and the devkit projects without k1, k2, k3, which describe the lens before; so
    does this importer. Pixel centres are at whole numbers in the devkit.

    Args:
        path: the log, its folder `calibration`, or a folder with both files.

    Raises:
        DataError: pyarrow is not installed, or a file is missing or malformed.
    """
    folder = path if path.is_dir() else path.parent
    folder = folder / "calibration" if (folder / "calibration").is_dir() else folder
    poses = {}
    for row in _feather(folder / "egovehicle_SE3_sensor.feather"):
        quaternion = [row.number(key) for key in ("qw", "qx", "qy", "qz")]
        poses[row.text("sensor_name")] = rigid_from_quaternion(
            quaternion, [row.number(key) for key in ("tx_m", "ty_m", "tz_m")]
        )
    cameras = []
    for row in _feather(folder / "intrinsics.feather"):
        name = row.text("sensor_name")
        if name not in poses:
            raise DataError(f"{folder / 'egovehicle_SE3_sensor.feather'} has no pose of {name}; {nearest(name, poses)}")
        fx, fy, cx, cy = (row.number(key) for key in ("fx_px", "fy_px", "cx_px", "cy_px"))
        with located(row.where):
            model = Pinhole(fx=fx, fy=fy, cx=cx, cy=cy).moved(FROM_INTEGER_CENTERS)
        cameras.append(RigCamera(name, (row.pixels("height_px"), row.pixels("width_px")), model, poses[name]))
    return cameras


def _feather(path: Path) -> list[Fields]:
    if not path.exists():
        raise DataError(f"{path} does not exist; give the folder calibration of an Argoverse 2 log")
    try:
        feather = importlib.import_module("pyarrow.feather")
    except ImportError as error:
        raise DataError(f"{path} is a feather file, and {not_installed(error) or error}") from None
    try:
        rows = feather.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no feather file ({str(error).splitlines()[0]}); copy it again") from None
    return [Fields(f"{path}: row {k}", row) for k, row in enumerate(rows)]


def waymo(path: Path) -> list[RigCamera]:
    """Reads Waymo's `CameraCalibration` messages as JSON.

    `intrinsic` is f_u f_v c_u c_v k1 k2 p1 p2 k3, `extrinsic.transform` the pose of the camera with body axes (x
    forward, y left, z up) in the vehicle frame, whose origin is on the ground below the rear axle. Waymo does not say
    where pixel centres are; principal points are taken as they are.

    Args:
        path: JSON with a list of messages, alone or at `camera_calibrations`, alone or at `context`; keys in
            lower_case or camelCase, as protobuf writes them.

    Raises:
        DataError: the file is malformed.
    """
    content: Any = read_document(path, "a JSON file of Waymo's camera_calibrations")
    for keys in (("context",), ("camera_calibrations", "cameraCalibrations")):
        content = next((content[key] for key in keys if isinstance(content, dict) and key in content), content)
    if not isinstance(content, list):
        raise DataError(f"{path} has no list camera_calibrations; give Waymo's CameraCalibration messages as JSON")
    cameras = []
    for k, message in enumerate(content):
        row = Fields(f"{path}: camera {k}", message)
        name = row.get("name")
        name = WAYMO_NAMES[name] if isinstance(name, int) and 0 <= name < len(WAYMO_NAMES) else row.text("name")
        row = Fields(f"{path}: camera {name!r}", message)
        fx, fy, cx, cy, *distortion = row.array("intrinsic", (9,)).tolist()
        matrix = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
        transform = row.section("extrinsic").array("transform", (16,)).reshape(4, 4)
        size = (row.pixels("height"), row.pixels("width"))
        with located(row.where):
            model = pinhole_or_brown(matrix, distortion)
        cameras.append(RigCamera(name, size, model, transform @ BODY_FROM_OPTICAL))
    return cameras


WAYMO_NAMES = (
    "UNKNOWN",
    "FRONT",
    "FRONT_LEFT",
    "FRONT_RIGHT",
    "SIDE_LEFT",
    "SIDE_RIGHT",
    "REAR_LEFT",
    "REAR",
    "REAR_RIGHT",
)


def _key_rows(path: Path) -> dict[str, list[str]]:
    """Lines `KEY: words` of a KITTI file."""
    rows: dict[str, list[str]] = {}
    for line in read_text(path, "a calibration file of KITTI").splitlines():
        key, colon, words = line.partition(":")
        if colon:
            rows[key.strip()] = words.split()
    return rows


def _row(path: Path, rows: dict[str, list[str]], keys: tuple[str, ...], shape: tuple[int, ...]) -> Matrix:
    key = next((key for key in keys if key in rows), keys[0])
    if key not in rows:
        raise DataError(f"{path} has no {keys[0]}; {nearest(keys[0], rows, found=True)}")
    try:
        numbers = np.array([float(word) for word in rows[key]])
    except ValueError:
        raise DataError(f"{path}: {key} is {' '.join(rows[key])[:40]!r}; give numbers") from None
    if len(numbers) != np.prod(shape) or not np.isfinite(numbers).all():
        raise DataError(f"{path}: {key} has {len(numbers)} numbers; give {np.prod(shape)} finite ones")
    return numbers.reshape(shape)


def _size(path: Path, rows: dict[str, list[str]], key: str) -> tuple[int, int]:
    width, height = _row(path, rows, (key,), (2,))
    return int(height), int(width)


def _rigid(rows: Matrix) -> Matrix:
    return np.concatenate([rows, [[0.0, 0.0, 0.0, 1.0]]])


def _split_projection(path: Path, rows: dict[str, list[str]], key: str) -> tuple[CameraModel, Matrix]:
    """Splits KITTI's 3 x 4 projection matrix into a model and the pose [4, 4] of the rectified frame in the camera."""
    projection = _row(path, rows, (key,), (3, 4))
    with located(f"{path}: {key}"):
        model = pinhole_or_brown(projection[:, :3], ()).moved(FROM_INTEGER_CENTERS)
    cam_from_rect = np.eye(4)
    cam_from_rect[:3, 3] = np.linalg.solve(projection[:, :3], projection[:, 3])
    return model, cam_from_rect
