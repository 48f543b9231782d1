"""Named cameras of a vehicle, and rig files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from perception.errors import DataError
from perception.files import replacing
from perception.geometry import rigid_from_quaternion
from perception.inference.checks import check_intrinsics, checked_rig, checked_rigid
from perception.reading import nearest
from perception.rigs.documents import Fields, located, read_document
from perception.rigs.models import (
    FROM_INTEGER_CENTERS,
    MODELS,
    BrownConrady,
    CameraModel,
    FTheta,
    KannalaBrandt,
    Mei,
    Pinhole,
    angles,
)
from perception.types import NumpyCameraRig

if TYPE_CHECKING:
    from perception.rigs.coverage import Coverage

SHIPPED = Path(__file__).parent  # *.yaml
SCHEMA = SHIPPED / "rig.schema.json"
RIG_FILE = "rig.yaml"  # in the folder of the tables of a dataset whose cameras are not all pinholes
RIG_FORMAT = 1  # version of the file format

# A frame with body axes (x forward, y left, z up) has its points from the optical frame (x right, y down, z forward).
BODY_FROM_OPTICAL = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
BORDER_POINTS = 64  # per side of an image, to find its field of view


@dataclass(frozen=True, eq=False)
class RigCamera:
    """One camera of a rig.

    Attributes:
        name: any text.
        image_size: height and width in pixels of the images that the model is calibrated for.
        model: the camera model.
        ego_from_cam: [4, 4] float64 metres; transforms points of the optical frame (x right, y down, z forward) to the
            ego frame (x forward, y left, z up, origin on the ground below the rear axle).
        lens_angle: largest angle between the optical axis and a ray that passes the lens, radians, where it is known. A
            polynomial may go on beyond it.
    """

    name: str
    image_size: tuple[int, int]
    model: CameraModel
    ego_from_cam: NDArray[np.float64]
    lens_angle: float = np.pi

    def project(self, points_cam: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Projects points of the camera frame into the image.

        Args:
            points_cam: [..., 3].

        Returns:
            uv_img [..., 2] pixels, NaN outside the field of view of the model; valid [...]: the lens shows the point in
            the image.
        """
        uv, valid = self.model.project(points_cam)
        return uv, valid & self._in_image(uv) & self._in_lens(np.asarray(points_cam, dtype=np.float64))

    def unproject(self, uv_img: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Returns the viewing rays of pixels of the image.

        Args:
            uv_img: [..., 2] pixels.

        Returns:
            rays_cam [..., 3] of length 1, NaN where the model has no ray; valid [...]: the pixel lies in the image, and
            the lens shows something there.
        """
        rays, valid = self.model.unproject(uv_img)
        return rays, valid & self._in_image(np.asarray(uv_img, dtype=np.float64)) & self._in_lens(rays)

    @cached_property
    def max_angle(self) -> float:
        """Largest angle between the optical axis and a ray that reaches the image, radians."""
        H, W = self.image_size
        u, v = np.linspace(0, W, BORDER_POINTS), np.linspace(0, H, BORDER_POINTS)
        border = np.concatenate([np.stack([u, np.full_like(u, y)], -1) for y in (0, H)]
                                + [np.stack([np.full_like(v, x), v], -1) for x in (0, W)])  # fmt: skip
        rays, valid = self.model.unproject(border)
        if not valid.all():  # the image is larger than the image circle
            return min(self.model.max_angle, self.lens_angle)
        return min(float(angles(rays).max()), self.lens_angle)

    def _in_image(self, uv: NDArray[np.float64]) -> NDArray[np.bool_]:
        H, W = self.image_size
        return np.asarray(((uv >= 0) & (uv <= (W, H))).all(-1))

    def _in_lens(self, points_cam: NDArray[np.float64]) -> NDArray[np.bool_]:
        return np.asarray(angles(points_cam) <= self.lens_angle)


class Rig:
    """The cameras of a vehicle.

    Args:
        cameras: at least one, with different names.
        ego_from_lidar: [4, 4] metres; pose of the LiDAR frame (x right, y ahead, z up), in which published networks
            were trained. None if it is not known; these networks then take `NUSCENES_EGO_FROM_LIDAR`.

    Raises:
        DataError: a name stands twice, or a calibration is invalid.
    """

    def __init__(self, cameras: Sequence[RigCamera], ego_from_lidar: ArrayLike | None = None) -> None:
        self.cameras = tuple(_checked(list(cameras)))
        self.ego_from_lidar = None if ego_from_lidar is None else _checked_lidar(ego_from_lidar)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the cameras in their order."""
        return tuple(camera.name for camera in self.cameras)

    def __len__(self) -> int:
        return len(self.cameras)

    def __iter__(self) -> Iterator[RigCamera]:
        return iter(self.cameras)

    def __getitem__(self, name: str) -> RigCamera:
        for camera in self.cameras:
            if camera.name == name:
                return camera
        raise DataError(f"the rig has no camera {name!r}; {nearest(str(name), self.names)}")

    def __repr__(self) -> str:
        return f"Rig({', '.join(f'{c.name}: {c.model.kind} {c.image_size[1]} x {c.image_size[0]}' for c in self)})"

    def camera_rig(self, names: Sequence[str] | None = None) -> NumpyCameraRig:
        """Returns the calibration that `Predictor.step` and the in-vehicle runtime take.

        Args:
            names: the cameras in the order of the images; None for all.

        Returns:
            img_from_cam [N, 3, 3], ego_from_cam [N, 4, 4], present [N], as numpy arrays.

        Raises:
            DataError: there is no camera of a name, or a camera is not a pinhole.
        """
        cameras = [self[name] for name in (self.names if names is None else names)]
        for camera in cameras:
            if not isinstance(camera.model, Pinhole):
                raise DataError(
                    f"camera {camera.name!r} has the model {camera.model.kind}, and a CameraRig holds pinholes; "
                    "give the rig to Predictor(rig=...), or undistort its images and give their pinhole"
                )
        return NumpyCameraRig(
            np.stack([camera.model.img_from_cam for camera in cameras]),
            np.stack([camera.ego_from_cam for camera in cameras]),
            np.ones(len(cameras), dtype=bool),
        )

    def scaled(self, factor: float) -> Rig:
        """Returns the rig of images that are resized by a factor; their sizes are rounded to whole pixels.

        Raises:
            DataError: the factor is not above 0, or an image would have no pixels.
        """
        if not 0 < factor < np.inf:
            raise DataError(f"the scale of the images is {factor:g}; give a number above 0, such as 0.5")
        return Rig(
            [
                replace(
                    camera,
                    image_size=(round(factor * camera.image_size[0]), round(factor * camera.image_size[1])),
                    model=camera.model.scaled(factor),
                )
                for camera in self
            ],
            self.ego_from_lidar,
        )

    def coverage(self, image_size: tuple[int, int]) -> Coverage:
        """Returns which rays and which ground of each camera reach a network (see `perception.rigs.virtual`).

        Args:
            image_size: height and width of the network's images (`model.config.image_size`).
        """
        from perception.rigs.virtual import chosen_pinholes  # it needs this module

        return chosen_pinholes(self, image_size).coverage()

    @classmethod
    def load(cls, path: str | Path) -> Rig:
        """Reads a rig file, YAML or JSON (see docs/rigs.md).

        Args:
            path: the file, or the name of a rig that is part of the library, such as "nuscenes".

        Raises:
            DataError: the file does not exist or is malformed; the message names the camera, the field and the fix.
        """
        cameras, ego_from_lidar = read_cameras(path)
        for camera in cameras.values():
            if isinstance(camera, DataError):
                raise camera
        with located(str(_shipped_or_given(path))):
            return cls([camera for camera in cameras.values() if isinstance(camera, RigCamera)], ego_from_lidar)

    def save(self, path: str | Path) -> None:
        """Writes a rig file that `Rig.load` reads back without loss, JSON if the suffix is `.json`, else YAML.

        The file appears complete or not at all.

        Raises:
            DataError: the suffix is none of `.yaml`, `.yml`, `.json`.
        """
        if Path(path).suffix not in (".yaml", ".yml", ".json"):
            raise DataError(f"{path} cannot be written as a rig file; give a name that ends with .yaml or .json")
        content: dict[str, Any] = {
            "rig_format": RIG_FORMAT, "cameras": {camera.name: _entry(camera) for camera in self},
        }  # fmt: skip
        if self.ego_from_lidar is not None:
            content["ego_from_lidar"] = {"matrix": self.ego_from_lidar.tolist()}
        if Path(path).suffix == ".json":
            text = json.dumps(content, indent=1) + "\n"
        else:
            import yaml

            text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def read_cameras(path: str | Path) -> tuple[dict[str, RigCamera | DataError], NDArray[np.float64] | None]:
    """Reads the cameras of a rig file, whatever their numbers say: `Rig` and `perception.rigs.check` judge these.

    Args:
        path: as for `Rig.load`.

    Returns:
        By name a camera, or what is wrong with its entry; and ego_from_lidar [4, 4], None if the file does not have it.

    Raises:
        DataError: the file does not exist, or is no rig file.
    """
    path = _shipped_or_given(path)
    root = Fields(str(path), read_document(path, "a rig file (docs/rigs.md), .yaml or .json"))
    root.only("rig_format", "description", "pixel_center", "cameras", "ego_from_lidar")
    if root.get("rig_format") != RIG_FORMAT:
        raise DataError(f"{root.at('rig_format')} is {root.get('rig_format')!r}; this version reads {RIG_FORMAT}")
    if "description" in root:
        root.text("description")
    shift = 0.0
    if "pixel_center" in root:
        if (center := root.number("pixel_center")) not in (0.0, 0.5):
            raise DataError(
                f"{root.at('pixel_center')} is {center:g}; give 0.5, or 0 for calibrations of OpenCV: the "
                "coordinate of the centre of the first pixel"
            )
        shift = FROM_INTEGER_CENTERS if center == 0 else 0.0
    entries = root.section("cameras")
    cameras: dict[str, RigCamera | DataError] = {}
    for name in entries:
        try:
            cameras[name] = _camera(name, Fields(f"{path}: camera {name!r}", entries.get(name)), shift)
        except DataError as error:
            cameras[name] = error
    ego_from_lidar = None
    if "ego_from_lidar" in root:
        section = root.section("ego_from_lidar")
        section.only("matrix", "translation_m", *_ROTATIONS)
        ego_from_lidar = _checked_lidar(_pose_matrix(section), section.where)
    return cameras, ego_from_lidar


def _shipped_or_given(path: str | Path) -> Path:
    if isinstance(path, str) and re.fullmatch(r"\w+", path) and not Path(path).exists():
        names = sorted(file.stem for file in SHIPPED.glob("*.yaml"))
        if path not in names:
            raise DataError(f"there is no rig {path!r}; give a file, or one of {', '.join(names)}")
        return SHIPPED / f"{path}.yaml"
    return Path(path)


def _checked(cameras: list[RigCamera]) -> list[RigCamera]:
    """Applies the checks of live use, so that a rig that loads is one that drives."""
    if not cameras:
        raise DataError("the rig has no cameras; give at least one")
    names = [camera.name for camera in cameras]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"the rig has two cameras {twice[0]!r}; give different names")
    for camera in cameras:
        if len(camera.image_size) != 2 or min(camera.image_size) < 1:
            raise DataError(
                f"camera {camera.name!r}: image_size is {camera.image_size}; give height and width in pixels"
            )
    given = NumpyCameraRig(
        np.stack([camera.model.img_from_cam for camera in cameras]),
        np.stack([_pose_array(camera) for camera in cameras]),
        np.ones(len(cameras), dtype=bool),
    )
    try:
        poses = checked_rig(given, len(cameras)).ego_from_cam
    except DataError as error:
        raise DataError(with_names(str(error), names)) from None
    found = []
    for camera, pose in zip(cameras, poses, strict=True):
        check_intrinsics(f"camera {camera.name!r}", camera.model.img_from_cam, camera.image_size)
        pose.setflags(write=False)
        found.append(replace(camera, ego_from_cam=pose))
    return found


def _checked_lidar(ego_from_lidar: ArrayLike, name: str = "ego_from_lidar") -> NDArray[np.float64]:
    pose = checked_rigid(name, ego_from_lidar)
    if not has_lidar_axes(pose):
        raise DataError(
            f"{name}: the LiDAR's y axis does not point ahead, or its z axis not up; give the pose of a frame with x "
            "right, y ahead and z up, as nuScenes' LIDAR_TOP has it (turn one with x ahead by -90 degrees about z)"
        )
    pose.setflags(write=False)
    return pose


def has_lidar_axes(ego_from_lidar: NDArray[np.float64]) -> bool:
    """Returns whether y of a LiDAR frame points ahead and z up, within 45 degrees."""
    return bool(min(ego_from_lidar[0, 1], ego_from_lidar[2, 2]) > np.cos(np.pi / 4))


def with_names(sentence: str, names: Sequence[str]) -> str:
    """Returns a sentence of the checks of live use, which count cameras, with the names that a person knows them by."""
    sentence = re.sub(r"rig\.(\w+)\[(\d+)\]", lambda m: f"camera {names[int(m[2])]!r}: {m[1]}", sentence)
    return re.sub(r"(?<=images\[)\d+(?=\])|(?<=camera )\d+", lambda m: repr(names[int(m[0])]), sentence)


def _pose_array(camera: RigCamera) -> NDArray[np.float64]:
    pose = np.asarray(camera.ego_from_cam, dtype=np.float64)
    if pose.shape != (4, 4):
        raise DataError(f"camera {camera.name!r}: ego_from_cam has shape {pose.shape}; give (4, 4)")
    return pose


def _camera(name: str, entry: Fields, shift: float) -> RigCamera:
    """One entry of a rig file."""
    model = entry.text("model", tuple(MODELS))
    entry.only("image_size_px", "model", "max_angle_deg", "ego_from_cam", *_MODEL_KEYS[model])
    size = entry.section("image_size_px")
    size.only("width", "height")
    pose = read_pose(entry.section("ego_from_cam"))
    with located(entry.where):
        calibrated = _READ[model](entry).moved(shift)
    lens_angle = np.pi
    if "max_angle_deg" in entry:
        lens_angle = float(np.radians(entry.number("max_angle_deg")))
        if not 0 < lens_angle <= np.pi:
            raise DataError(f"{entry.at('max_angle_deg')} is {np.degrees(lens_angle):g}; give up to 180 degrees")
    return RigCamera(name, (size.pixels("height"), size.pixels("width")), calibrated, pose, lens_angle)


def _focal(entry: Fields) -> dict[str, float]:
    section = entry.section("intrinsics_px")
    section.only("fx", "fy", "cx", "cy", "skew")
    keys = ["fx", "fy", "cx", "cy", *(["skew"] if "skew" in section else [])]
    return {key: section.number(key) for key in keys}


def _coefficients(entry: Fields, key: str) -> tuple[float, ...]:
    return tuple(map(float, entry.array(key, None)))


def _f_theta(entry: Fields) -> FTheta:
    section = entry.section("intrinsics_px")
    section.only("cx", "cy", "radius_polynomial")
    return FTheta(
        cx=section.number("cx"), cy=section.number("cy"), polynomial=_coefficients(section, "radius_polynomial")
    )


_MODEL_KEYS = {
    "pinhole": ("intrinsics_px",),
    "brown_conrady": ("intrinsics_px", "distortion"),
    "kannala_brandt": ("intrinsics_px", "distortion"),
    "mei": ("intrinsics_px", "distortion", "xi"),
    "f_theta": ("intrinsics_px",),
}
_READ: dict[str, Callable[[Fields], CameraModel]] = {
    "pinhole": lambda entry: Pinhole(**_focal(entry)),
    "brown_conrady": lambda entry: BrownConrady(**_focal(entry), distortion=_coefficients(entry, "distortion")),
    "kannala_brandt": lambda entry: KannalaBrandt(**_focal(entry), distortion=_coefficients(entry, "distortion")),
    "mei": lambda entry: Mei(**_focal(entry), xi=entry.number("xi"), distortion=_coefficients(entry, "distortion")),
    "f_theta": _f_theta,
}


def _entry(camera: RigCamera) -> dict[str, Any]:
    """The entry of a rig file of a camera."""
    model: Any = camera.model
    if isinstance(model, FTheta):
        intrinsics: dict[str, Any] = {"cx": model.cx, "cy": model.cy, "radius_polynomial": list(model.polynomial)}
    else:
        intrinsics = {key: float(getattr(model, key)) for key in ("fx", "fy", "cx", "cy")}
        if model.skew:
            intrinsics["skew"] = float(model.skew)
    entry = {
        "image_size_px": {"width": int(camera.image_size[1]), "height": int(camera.image_size[0])},
        "model": model.kind,
        "intrinsics_px": intrinsics,
    }
    for key in _MODEL_KEYS[model.kind][1:]:
        value = getattr(model, key)
        entry[key] = [float(x) for x in value] if isinstance(value, tuple) else float(value)
    if camera.lens_angle < np.pi:
        entry["max_angle_deg"] = float(np.degrees(camera.lens_angle))
    entry["ego_from_cam"] = {"axes": "optical", "matrix": camera.ego_from_cam.tolist()}
    return entry


_ROTATIONS = ("quaternion_wxyz", "roll_pitch_yaw_deg", "roll_pitch_yaw_rad")


def read_pose(section: Fields) -> NDArray[np.float64]:
    """Reads a pose of a rig file.

    A pose is `matrix` (4 x 4, metres), or `translation_m` with one of `quaternion_wxyz`, `roll_pitch_yaw_deg`,
    `roll_pitch_yaw_rad` (about the fixed axes x, y, z in this order, as in URDF). `axes` says whether the rotation is
    that of the optical frame (x right, y down, z forward) or of a frame with body axes (x forward, y left, z up).

    Returns:
        ego_from_cam [4, 4] of the optical frame.

    Raises:
        DataError: a field is missing, unknown or malformed.
    """
    section.only("axes", "matrix", "translation_m", *_ROTATIONS)
    axes = section.text("axes", ("optical", "body"))
    pose = _pose_matrix(section)
    return pose @ BODY_FROM_OPTICAL if axes == "body" else pose


def _pose_matrix(section: Fields) -> NDArray[np.float64]:
    """Reads the matrix [4, 4] of a pose."""
    if "matrix" in section:
        if section.values.keys() - {"matrix", "axes"}:
            raise DataError(f"{section.where} has a matrix and other fields; give the matrix and axes alone")
        pose = section.array("matrix", (4, 4), "4 rows of 4 numbers")
    else:
        given = [key for key in _ROTATIONS if key in section]
        if len(given) != 1:
            raise DataError(
                f"{section.where} has {' and '.join(given) or 'no rotation'}; give a matrix, or translation_m and one "
                f"of {', '.join(_ROTATIONS)}"
            )
        translation = section.array("translation_m", (3,))
        if given[0] == "quaternion_wxyz":
            quaternion = section.array(given[0], (4,))
            if abs(np.linalg.norm(quaternion) - 1) > 1e-2:
                raise DataError(
                    f"{section.at(given[0])} has length {np.linalg.norm(quaternion):.3g}; give a unit one, w x y z"
                )
            pose = rigid_from_quaternion(quaternion, translation)
        else:
            angles = section.array(given[0], (3,))
            if given[0].endswith("_rad") and np.abs(angles).max() > 2 * np.pi:
                raise DataError(f"{section.at(given[0])} has {np.abs(angles).max():g} radians; give roll_pitch_yaw_deg")
            pose = rigid_from_rpy(np.radians(angles) if given[0].endswith("_deg") else angles, translation)
    return pose


def rigid_from_rpy(rpy: ArrayLike, translation: ArrayLike = (0.0, 0.0, 0.0)) -> NDArray[np.float64]:
    """Returns a [4, 4] transform from roll, pitch, yaw in radians.

    The rotations are about the fixed axes x, y, z, in this order, as in URDF and ROS.
    """
    (cr, cp, cy), (sr, sp, sy) = np.cos(rpy), np.sin(rpy)
    pose = np.eye(4)
    pose[:3, :3] = [
        [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
        [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
        [-sp, cp * sr, cp * cr],
    ]
    pose[:3, 3] = translation
    return pose
