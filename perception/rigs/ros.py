"""Calibrations of ROS: camera_info YAML, URDF and static transforms, Autoware's sensor kits, Kalibr's camchains.

All of them are made with pixel centres at whole numbers, as in OpenCV: principal points are moved by half a pixel here.

A frame whose name holds `optical` has camera axes (x right, y down, z forward); every other frame has body axes (x
forward, y left, z up), as REP 103 has it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from perception.errors import DataError
from perception.geometry import invert_rigid, rigid_from_quaternion
from perception.reading import nearest
from perception.rigs.datasets import pinhole_or_brown
from perception.rigs.documents import Fields, located, read_document, read_documents, read_text
from perception.rigs.models import FROM_INTEGER_CENTERS, CameraModel, KannalaBrandt, Mei
from perception.rigs.rig import BODY_FROM_OPTICAL, RigCamera, rigid_from_rpy

Matrix = NDArray[np.float64]
AUTOWARE_FILES = ("sensors_calibration.yaml", "sensor_kit_calibration.yaml")
BASE_FRAME = "base_link"
FRAME_NAMES = (
    "{}_optical_frame", "{}_optical_link", "{}/camera_optical_link", "{}/camera_link", "{}_link", "{}_frame", "{}"
)  # fmt: skip


class Frames:
    """A tree of frames from a URDF, a YAML list of static transforms, or Autoware's calibration files.

    Args:
        path: the URDF or YAML file, or a folder with Autoware's `sensors_calibration.yaml` and
            `sensor_kit_calibration.yaml`.

    Raises:
        DataError: a file is missing or malformed, or a frame has two parents.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parents: dict[str, tuple[str, Matrix]] = {}  # by frame: its parent, and parent_from_frame
        if path.is_dir():
            files = [path / name for name in AUTOWARE_FILES if (path / name).exists()]
            if not files:
                raise DataError(
                    f"{path} has neither {' nor '.join(AUTOWARE_FILES)}; give a URDF, a YAML list or this folder"
                )
            for file in files:
                self._read_autoware(Fields(str(file), read_document(file, "a calibration of Autoware")))
        elif path.suffix in (".urdf", ".xml", ".xacro"):
            self._read_urdf(read_text(path, "a URDF"))
        else:
            self._read_yaml()

    @classmethod
    def of(cls, source: Path, transforms: Iterable[tuple[str, str, Matrix]]) -> Frames:
        """Makes a tree of transforms that were read elsewhere.

        Args:
            source: where they come from, for messages.
            transforms: parent, frame and parent_from_frame [4, 4].

        Raises:
            DataError: a frame has two parents.
        """
        tree = cls.__new__(cls)
        tree.path, tree.parents = source, {}
        for parent, frame, pose in transforms:
            tree._add(parent, frame, pose)
        return tree

    def base_from(self, frame: str, base: str) -> Matrix:
        """Returns the pose [4, 4] of a frame in the base frame."""
        if frame != base and frame not in self.parents:
            raise DataError(f"{self.path} has no frame {frame!r}; {nearest(frame, self.parents)}")
        chain = self._chain(frame, base)
        if chain[-1] != base:
            raise DataError(
                f"{self.path}: the parents of {frame!r} end at {chain[-1]!r}, not at {base!r}; give base_frame"
            )
        pose = np.eye(4)
        for at in chain[:-1]:
            pose = self.parents[at][1] @ pose
        return pose

    def leads_to(self, frame: str, base: str) -> bool:
        """Returns whether the parents of a frame lead to the base frame. Raises DataError if they form a circle."""
        return self._chain(frame, base)[-1] == base

    def root(self, frame: str) -> str:
        """Returns the frame at which the parents of a frame end. Raises DataError if they form a circle."""
        return self._chain(frame, None)[-1]

    def _chain(self, frame: str, base: str | None) -> list[str]:
        """Lists a frame and its parents up to the base frame, or up to a frame without a parent."""
        chain = [frame]
        while chain[-1] != base and chain[-1] in self.parents:
            parent = self.parents[chain[-1]][0]
            if parent in chain:
                raise DataError(f"{self.path}: the frame {parent!r} is its own parent; give a tree of frames")
            chain.append(parent)
        return chain

    def base_from_optical(self, frame: str, base: str) -> Matrix:
        """Returns the pose of the optical frame of a camera: `frame`, or the one that belongs to its body frame."""
        pose = self.base_from(frame, base)
        return pose if "optical" in frame else pose @ BODY_FROM_OPTICAL

    def _add(self, parent: str, frame: str, pose: Matrix) -> None:
        if frame in self.parents and self.parents[frame][0] != parent:
            raise DataError(
                f"{self.path}: the frame {frame!r} has the parents {self.parents[frame][0]!r} and {parent!r}"
            )
        self.parents[frame] = (parent, pose)

    def _read_autoware(self, root: Fields) -> None:
        for parent in root:
            children = root.section(parent)
            for frame in children:
                at = children.section(frame)
                at.only("x", "y", "z", "roll", "pitch", "yaw")
                x, y, z, *rpy = (at.number(key) for key in ("x", "y", "z", "roll", "pitch", "yaw"))
                if np.abs(rpy).max() > 2 * np.pi:
                    raise DataError(f"{at.where} has an angle of {np.abs(rpy).max():g}; Autoware's are radians")
                self._add(parent, frame, rigid_from_rpy(rpy, (x, y, z)))

    def _read_urdf(self, text: str) -> None:
        if "<xacro:" in text:
            raise DataError(f"{self.path} is a xacro file; run xacro first, and give the URDF that it writes")
        try:
            root = ElementTree.fromstring(text)
        except ElementTree.ParseError as error:
            raise DataError(f"{self.path} is not XML ({error}); give a URDF") from None
        for joint in root.iter("joint"):
            if joint.get("type") != "fixed":  # wheels and steering; cameras do not move
                continue
            links = {
                key: element.get("link") for key in ("parent", "child") if (element := joint.find(key)) is not None
            }
            origin = joint.find("origin")
            where = f"{self.path}: joint {joint.get('name')!r}"
            try:
                xyz, rpy = (
                    [float(word) for word in (origin.get(key, "0 0 0") if origin is not None else "0 0 0").split()]
                    for key in ("xyz", "rpy")
                )
                self._add(str(links["parent"]), str(links["child"]), rigid_from_rpy(rpy, xyz))
            except (KeyError, ValueError):
                raise DataError(f"{where} has no parent, child, or three numbers in xyz and rpy; give a URDF") from None

    def _read_yaml(self) -> None:
        documents = read_documents(self.path, "a URDF or a YAML list of static transforms")
        rows: list[Any] = []
        for document in documents:
            if isinstance(document, Mapping) and "transforms" in document:
                rows += document["transforms"]
            elif isinstance(document, list):
                rows += document
            else:
                self._read_autoware(Fields(str(self.path), document))
        for k, row in enumerate(rows):
            at = Fields(f"{self.path}: transform {k}", row)
            transform = at.section("transform")
            translation, rotation = (transform.section(key) for key in ("translation", "rotation"))
            quaternion = [rotation.number(key) for key in ("w", "x", "y", "z")]
            if abs(np.linalg.norm(quaternion) - 1) > 1e-2:
                raise DataError(f"{rotation.where} has length {np.linalg.norm(quaternion):.3g}; give a unit quaternion")
            pose = rigid_from_quaternion(quaternion, [translation.number(key) for key in ("x", "y", "z")])
            parent = at.section("header").text("frame_id")
            self._add(parent.lstrip("/"), at.text("child_frame_id").lstrip("/"), pose)


def camera_info(
    path: Path,
    poses: str | Path | None = None,
    frames: Mapping[str, str] | None = None,
    base_frame: str = BASE_FRAME,
) -> list[RigCamera]:
    """Reads camera_info files, for the raw (not the rectified) images, and the poses of their frames.

    Args:
        path: a file of ROS's camera calibration or of `ros2 topic echo`, or a folder of them.
        poses: see `Frames`.
        frames: frame of each camera by its name. None: `header.frame_id`, or the first frame that exists of
            NAME_optical_frame, NAME_optical_link, NAME/camera_optical_link, NAME/camera_link, NAME_link, NAME_frame,
            NAME.
        base_frame: the vehicle frame.

    Raises:
        DataError: poses are not given, a file is missing or malformed, or a camera has no frame.
    """
    if poses is None:
        raise DataError(
            f"{path} holds no poses; give `poses`: a URDF, a YAML list of static transforms, or Autoware's folder"
        )
    tree = Frames(Path(poses))
    infos = _camera_infos(path)
    for name in frames or {}:
        if name not in infos:
            raise DataError(f"frames names the camera {name!r}; {nearest(name, infos)}")
    cameras = []
    for name, info in infos.items():
        candidates = [pattern.format(name) for pattern in FRAME_NAMES]
        if "header" in info:
            candidates = [info.section("header").text("frame_id").lstrip("/")]
        if frames and name in frames:
            candidates = [frames[name]]
        frame = next((frame for frame in candidates if frame in tree.parents), None)
        if frame is None:
            raise DataError(
                f"{tree.path} has no frame {' or '.join(map(repr, candidates))} for the camera {name!r}; give frames, "
                f"such as {{{name!r}: FRAME}}, with one of {', '.join(sorted(tree.parents))}"
            )
        with located(info.where):
            size, model = model_of_camera_info(info)
        cameras.append(RigCamera(name, size, model, tree.base_from_optical(frame, base_frame)))
    return cameras


def autoware(
    path: Path,
    intrinsics: str | Path | Mapping[str, str | Path] | None = None,
    base_frame: str = BASE_FRAME,
) -> list[RigCamera]:
    """Reads the sensor kit of Autoware: the frames `NAME/camera_link` and `NAME/camera_optical_link`.

    Angles are radians about the fixed axes x, y, z; `camera_link` has body axes.

    Args:
        path: folder with `sensors_calibration.yaml` and `sensor_kit_calibration.yaml`, or one of them.
        intrinsics: camera_info YAML files by the camera's name, for the cameras to import; or a folder with files whose
            `camera_name` or name is that of a camera, or with NAME/camera_info.yaml, for all cameras of the kit.
        base_frame: the vehicle frame.

    Raises:
        DataError: intrinsics are not given, a file is missing or malformed, or a camera has no intrinsics.
    """
    tree = Frames(path if path.is_dir() else path.parent)
    links = {
        match[1]: frame for frame in tree.parents if (match := re.fullmatch(r"(.+)/camera_(?:optical_)?link", frame))
    }
    if not links:
        raise DataError(f"{tree.path} has no frame NAME/camera_link; give the calibration of a kit with cameras")
    if intrinsics is None:
        raise DataError(
            f"{path} holds no intrinsics; give `intrinsics`: a folder of camera_info YAML files, or such a file for "
            f"each of {', '.join(sorted(links))}"
        )
    if isinstance(intrinsics, Mapping):
        infos = {name: _info(Path(file)) for name, file in intrinsics.items()}
    else:
        infos = _camera_infos(Path(intrinsics))
        if missing := sorted(set(links) - set(infos)):
            raise DataError(
                f"{intrinsics} has no camera_info of {missing[0]}; it has {', '.join(infos)}; give intrinsics by name, "
                "for the cameras to import"
            )
        infos = {name: infos[name] for name in sorted(links)}
    cameras = []
    for name, info in infos.items():
        if name not in links:
            raise DataError(f"{tree.path} has no frame {name}/camera_link; {nearest(name, links)}")
        with located(info.where):
            size, model = model_of_camera_info(info)
        cameras.append(RigCamera(name, size, model, tree.base_from_optical(links[name], base_frame)))
    return cameras


def _info(file: Path) -> Fields:
    return Fields(str(file), read_document(file, "a camera_info YAML file"))


def _camera_infos(path: Path) -> dict[str, Fields]:
    """camera_info files by the name of the camera; other YAML files of a folder are left out.

    The name is `camera_name`, or the name of the file; for NAME/camera_info.yaml, as Autoware has them, it is NAME.
    """
    files = [path]
    if path.is_dir():
        files = [*sorted(path.glob("*.y*ml")), *sorted(path.glob("*/camera_info.y*ml"))]
    infos: dict[str, Fields] = {}
    for file in files:
        content = read_document(file, "a camera_info YAML file")
        if path.is_dir() and not (isinstance(content, Mapping) and {"camera_matrix", "k", "K"} & set(content)):
            continue
        info = Fields(str(file), content)
        name = info.text("camera_name") if "camera_name" in info else file.stem
        if path.is_dir() and file.parent != path:
            name = file.parent.name
        if name in infos:
            raise DataError(f"{file} and {infos[name].where} are both of the camera {name!r}; give one of them")
        infos[name] = info
    if not infos:
        raise DataError(f"{path} has no camera_info YAML files; give a folder of them")
    return infos


def model_of_camera_info(info: Fields) -> tuple[tuple[int, int], CameraModel]:
    """Returns height and width of the raw images, and their camera model, of a camera_info file or message.

    Raises:
        DataError: a field is missing or malformed, or the distortion is of another kind.
    """
    if "camera_matrix" in info:  # a file of camera_calibration
        matrix = info.section("camera_matrix").array("data", (9,))
        lens, width, height = info.section("distortion_coefficients"), "image_width", "image_height"
        coefficients = tuple(lens.array("data", None).tolist())
    else:  # the message: lower case in ROS 2, upper case in ROS 1
        matrix = info.array("K" if "K" in info else "k", (9,))
        coefficients, width, height = tuple(info.array("D" if "D" in info else "d", None).tolist()), "width", "height"
    size = (info.pixels(height), info.pixels(width))
    kind, matrix = info.text("distortion_model"), matrix.reshape(3, 3)
    counts = {"plumb_bob": (0, 4, 5), "rational_polynomial": (8, 12), "equidistant": (4,), "fisheye": (4,), "": (0,)}
    if kind not in counts:
        raise DataError(f"{info.at('distortion_model')} is {kind!r}; {nearest(kind, filter(None, counts))}")
    if kind == "rational_polynomial" and len(coefficients) == 14 and not any(coefficients[12:]):
        coefficients = coefficients[:12]  # OpenCV's tilted sensor, which is not tilted
    if len(coefficients) not in counts[kind]:
        wanted = " or ".join(map(str, counts[kind]))
        raise DataError(f"{info.where}: {len(coefficients)} distortion coefficients of {kind!r}; give {wanted}")
    if counts[kind] == (4,):
        model: CameraModel = KannalaBrandt(
            fx=matrix[0, 0],
            fy=matrix[1, 1],
            cx=matrix[0, 2],
            cy=matrix[1, 2],
            skew=matrix[0, 1],
            distortion=coefficients,
        )
    else:
        model = pinhole_or_brown(matrix, coefficients)
    return size, model.moved(FROM_INTEGER_CENTERS)


def kalibr(path: Path) -> list[RigCamera]:
    """Reads a camchain of Kalibr.

    The vehicle frame is that of the IMU (`T_cam_imu`), or of cam0 (optical axes) for a chain without an IMU
    (`T_cn_cnm1`). The models pinhole-radtan, pinhole-equidistant and omni-radtan are read.

    Raises:
        DataError: the file is malformed, a camera has no pose, or a model is another one.
    """
    root = Fields(str(path), read_document(path, "a camchain YAML of Kalibr"))
    cam_from_vehicle: Matrix | None = None
    cameras = []
    for k, name in enumerate(
        sorted(root, key=lambda name: [int(n) if n.isdecimal() else n for n in re.split(r"(\d+)", name)])
    ):
        if name != f"cam{k}":
            raise DataError(
                f"{path} has {name!r} where cam{k} is expected; give the cameras cam0, cam1, ... of a chain"
            )
        camera = root.section(name)
        if "T_cam_imu" in camera:
            cam_from_vehicle = camera.array("T_cam_imu", (4, 4))
        elif k == 0:
            cam_from_vehicle = np.eye(4)
        elif cam_from_vehicle is not None:
            cam_from_vehicle = camera.array("T_cn_cnm1", (4, 4)) @ cam_from_vehicle
        assert cam_from_vehicle is not None
        width, height = (int(n) for n in camera.array("resolution", (2,), "width and height"))
        with located(camera.where):
            model = _model_of_kalibr(camera)
        cameras.append(RigCamera(name, (height, width), model, invert_rigid(cam_from_vehicle)))
    return cameras


def _model_of_kalibr(camera: Fields) -> CameraModel:
    kind, lens = camera.text("camera_model"), camera.text("distortion_model")
    if (
        kind not in ("pinhole", "omni")
        or lens not in ("radtan", "equidistant", "none")
        or (kind, lens) == ("omni", "equidistant")
    ):
        raise DataError(
            f"{camera.where} has the model {kind}-{lens}, which this library does not have; calibrate with one of "
            "pinhole-radtan, pinhole-equi, omni-radtan"
        )
    *xi, fx, fy, cx, cy = camera.array("intrinsics", (4,) if kind == "pinhole" else (5,)).tolist()
    coefficients = (0.0,) * 4 if lens == "none" else tuple(camera.array("distortion_coeffs", (4,)).tolist())
    if kind == "omni":
        model: CameraModel = Mei(fx=fx, fy=fy, cx=cx, cy=cy, xi=xi[0], distortion=coefficients)
    elif lens == "equidistant":
        model = KannalaBrandt(fx=fx, fy=fy, cx=cx, cy=cy, distortion=coefficients)
    else:
        model = pinhole_or_brown(np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]), coefficients)
    return model.moved(FROM_INTEGER_CENTERS)
