"""Samples of info files in the format of mmdet3d v1.1: calibration, images and boxes in the library's frames."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from perception.data.info_fields import read_flag, read_matrix, read_pinhole, read_rigid
from perception.data.loader import decode_image, pad_boxes, pad_lines
from perception.data.nuscenes import NUSCENES_CAMERAS
from perception.errors import DataError, PerceptionWarning
from perception.geometry import invert_rigid, rigid_from_yaw, transform_points, wrap_angle, yaw_from_rotation
from perception.inference.checks import check_intrinsics, checked_pose, checked_rig
from perception.inference.crop import fitted_rig
from perception.inference.plausibility import implausible_rig
from perception.inference.visibility import sees_ground
from perception.reading import numbers, short, typed
from perception.rigs.coverage import CUT_FIRST, fitted_coverage
from perception.types import (
    BOX_CLASSES,
    NUSCENES_EGO_FROM_LIDAR,
    Boxes,
    CameraRig,
    Clip,
    Frame,
    FrameObjects,
    NumpyCameraRig,
    map_tensors,
)

_FARTHEST = 1000.0  # metres from the car, and metres or metres per second of a box
_LARGEST_ANGLE = 100.0  # radians; angles of boxes are within a few turns
# Metres and degrees by which a car moves between the exposures of its LiDAR and a camera.
_LARGEST_MOVE, _LARGEST_TURN = 3.0, 10.0


class _Layout(NamedTuple):
    """What mmdet3d's infos of a dataset do not hold.

    Args:
        box_camera: boxes are in the axes of this camera, with the centre of the bottom face, as KITTI has them.
        ego_from_lidar: metres along x, y, z; the axes are those of the ego frame.
        folders: where the images of each camera are, below `training` or `testing`.
    """

    box_camera: str
    ego_from_lidar: tuple[float, float, float]
    folders: dict[str, str]


_LAYOUTS = {
    # The LiDAR is 1.73 m above the road and 0.81 m ahead of the rear axle (A. Geiger et al., IJRR 2013, figure 3).
    "kitti": _Layout("CAM2", (0.81, 0.0, 1.73), {f"CAM{n}": f"image_{n}" for n in range(4)}),
    "waymo": _Layout(
        "CAM_FRONT",
        (0.0, 0.0, 0.0),
        {
            f"CAM_{name}": f"image_{n}"
            for n, name in enumerate(("FRONT", "FRONT_LEFT", "FRONT_RIGHT", "SIDE_LEFT", "SIDE_RIGHT"))
        },
    ),
}


class InfoSample(NamedTuple):
    """One entry of an info file.

    Args:
        path: the file; image paths are relative to its folder.
        name: of the entry, for messages: the file and its number.
        entry: the fields.
        categories: class names by label; None if the file has no `metainfo.categories`.
        dataset: `metainfo.dataset` in lower case, empty if the file does not have it.
    """

    path: Path
    name: str
    entry: Mapping[str, Any]
    categories: Mapping[int, str] | None
    dataset: str

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the cameras that have an image: nuScenes' in the library's order, then others as in the file.

        Raises:
            DataError: the entry has no camera with an image.
        """
        images = typed(self.entry.get("images"), Mapping, f"{self.name}: images", "an object with the cameras by name")
        # KITTI's infos hold the calibration of cameras without an image, and a matrix, among the cameras.
        found = [name for name, camera in images.items() if isinstance(camera, Mapping) and "img_path" in camera]
        if not found or not all(isinstance(name, str) for name in found):
            raise DataError(f"{self.name}: images has no camera with an img_path; give one camera or more")
        return tuple(name for name in NUSCENES_CAMERAS if name in found) + tuple(
            name for name in found if name not in NUSCENES_CAMERAS
        )

    def global_from_ego(self) -> np.ndarray:
        """Returns the pose [4, 4] float64 of the entry.

        Raises:
            DataError: `ego2global` is missing or not a pose.
        """
        matrix = read_matrix(self.entry.get("ego2global"), f"{self.name}: ego2global", (4, 4))
        return _renamed(f"{self.name}: ", {"global_from_ego": "ego2global"}, checked_pose, matrix)

    def ego_from_lidar(self) -> np.ndarray | None:
        """Returns the pose [4, 4] float64 of the LiDAR, None if the entry does not have it.

        Infos of KITTI and Waymo do not have it; there it is that of the dataset's car.

        Raises:
            DataError: `lidar_points.lidar2ego` is not a rigid transform.
        """
        points = self.entry.get("lidar_points")
        if points is not None:
            points = typed(points, Mapping, f"{self.name}: lidar_points", "an object")
            if points.get("lidar2ego") is not None:
                return read_rigid(points["lidar2ego"], f"{self.name}: lidar_points.lidar2ego")
        layout = _LAYOUTS.get(self.dataset)
        return None if layout is None else rigid_from_yaw(0.0, layout.ego_from_lidar)

    def clip(
        self,
        *,
        image_size: tuple[int, int],
        cameras: Sequence[str] | None = None,
        points_per_line: int = 20,
        data_prefix: Mapping[str, str] | None = None,
    ) -> Clip:
        """Loads the sample as a clip of one frame, T = 1, without lines.

        Boxes are transformed from the LiDAR frame (x y z length width height yaw, z at the geometric centre) to the ego
        frame; those of KITTI and Waymo from the axes of a camera. All boxes are kept in the file's order. A box is
        valid if the file does not mark it as invalid and its class is one of BOX_CLASSES; other classes get label -1.

        The pose of a camera is `lidar2cam` with `lidar2ego`, because that holds the motion between the exposures of
        LiDAR and camera; `cam2ego` without a LiDAR.

        Args:
            image_size: height and width of the images, see `fit_image`.
            cameras: names, in order; one that the entry lacks is marked as not present. `self.cameras` by default.
            points_per_line: P of the (empty) ground truth lines.
            data_prefix: folder of the images by camera, or of all other cameras under `img`, relative to the file. By
                default images are looked for next to the file and where the dataset has them.

        Raises:
            DataError: an image is missing, a field is missing or malformed, or the calibration cannot be right.

        Warns:
            PerceptionWarning: the boxes cannot be used, or the calibration is implausible.
        """
        cameras = self.cameras if cameras is None else tuple(cameras)
        rig, ego_from_exposure = self.rig(cameras)
        paths = {int(n): self.image_path(cameras[n], data_prefix) for n in np.flatnonzero(rig.present)}
        sizes = {n: self.stored_size(cameras[n], path) for n, path in paths.items()}
        for n, size in sizes.items():
            check_intrinsics(f"{self.name}: images.{cameras[n]}.cam2img", rig.img_from_cam[n], size)
        fitted = fitted_rig(rig, sizes, image_size)
        for sentence in implausible_rig(rig, sizes, sees_ground(fitted, image_size)).values():
            _warn(f"{self.name}: {_in_words_of(_fields(cameras), sentence)}")
        if finding := fitted_coverage(cameras, rig, sizes, image_size).finding(CUT_FIRST):
            _warn(f"{self.name}: {finding}")
        frame = load_frame(rig, ego_from_exposure, self.ego_from_lidar(), paths, image_size)
        gt = FrameObjects(pad_boxes([self.boxes()]), pad_lines([[]], points_per_line))
        frames = map_tensors(lambda tensor: tensor[None], frame)
        return Clip(frames, gt, torch.zeros(1, dtype=torch.int64))

    def rig(self, cameras: Sequence[str]) -> tuple[NumpyCameraRig, np.ndarray]:
        """Reads the calibration of cameras, in pixels of the stored images, and their `ego_from_exposure` [N, 4, 4].

        Args:
            cameras: names, in order; one that the entry lacks is marked as not present.

        Raises:
            DataError: a field is missing or malformed.
        """
        N, given, ego_from_lidar = len(cameras), set(self.cameras), self.ego_from_lidar()
        rig = NumpyCameraRig(
            np.tile(np.eye(3), (N, 1, 1)), np.tile(np.eye(4), (N, 1, 1)), np.array([name in given for name in cameras])
        )
        ego_from_exposure = np.tile(np.eye(4), (N, 1, 1))
        for n in np.flatnonzero(rig.present):
            rig.img_from_cam[n], rig.ego_from_cam[n], ego_from_exposure[n] = self._camera(cameras[n], ego_from_lidar)
        return _renamed(f"{self.name}: ", _fields(cameras), checked_rig, rig, N), ego_from_exposure

    def _camera(self, name: str, ego_from_lidar: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns img_from_cam [3, 3] of the stored image, ego_from_cam [4, 4] and ego_from_exposure [4, 4]."""
        camera, where = self.entry["images"][name], f"{self.name}: images.{name}"
        img_from_cam, cam_from_rig = read_pinhole(camera.get("cam2img"), f"{where}.cam2img")
        by_lidar = by_ego = None
        moved = np.eye(4)
        if camera.get("lidar2cam") is not None and ego_from_lidar is not None:
            cam_from_lidar = cam_from_rig @ read_rigid(camera["lidar2cam"], f"{where}.lidar2cam")
            by_lidar = ego_from_lidar @ invert_rigid(cam_from_lidar)
        if camera.get("cam2ego") is not None:
            by_ego = read_rigid(camera["cam2ego"], f"{where}.cam2ego") @ invert_rigid(cam_from_rig)
        if by_lidar is not None and by_ego is not None:
            moved = by_lidar @ invert_rigid(by_ego)
            apart = float(np.linalg.norm(by_lidar[:3, 3] - by_ego[:3, 3]))
            cosine = (np.trace(by_lidar[:3, :3].T @ by_ego[:3, :3]) - 1) / 2
            angle = float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
            if apart > _LARGEST_MOVE or angle > _LARGEST_TURN:
                _warn(
                    f"{where}: cam2ego and the pose by lidar2cam and lidar2ego are {apart:.1f} m and {angle:.0f} "
                    "degrees apart, more than the car moves between two exposures; lidar2cam is used, remove the wrong "
                    "one"
                )
        pose = by_ego if by_lidar is None else by_lidar
        if pose is None:
            raise DataError(f"{where} has no pose; give cam2ego, or lidar2cam and lidar_points.lidar2ego")
        return img_from_cam, pose, moved

    def image_path(self, name: str, data_prefix: Mapping[str, str] | None) -> Path:
        """Returns the path of the image of a camera; `data_prefix` as in `clip`.

        Raises:
            DataError: there is no such file, or the name leads out of the folder.
        """
        where = f"{self.name}: images.{name}.img_path"
        image = typed(self.entry["images"][name]["img_path"], str, where, "the path of an image")
        parts = PurePath(image.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or not parts.parts or "\0" in image or ":" in parts.parts[0]:
            raise DataError(
                f"{where} is {short(image)}; give a path below the folder of the file, or a file name and its folder "
                "with --data-prefix"
            )
        if data_prefix is not None:
            folders = [data_prefix.get(name, data_prefix.get("img", ""))]
        else:
            folders = [""]
            if len(PurePath(name).parts) == 1 and name != "..":  # names may have any characters
                folders.append(f"samples/{name}")
            if (layout := _LAYOUTS.get(self.dataset)) and name in layout.folders:
                folders += [f"{part}/{layout.folders[name]}" for part in ("training", "testing")]
        paths = [self.path.parent / folder / image for folder in folders]
        try:
            found = next((path for path in paths if path.is_file()), None)
        except OSError:  # a name that is too long
            found = None
        if found is None:
            tried = ", ".join(str(path.parent) for path in paths)
            raise DataError(
                f"{where}: {short(image)} is missing in {tried}; copy it there, or give its folder with --data-prefix"
            )
        return found

    def stored_size(self, name: str, path: Path) -> tuple[int, int]:
        """Returns height and width of an image file, after comparing them with those of the entry.

        Raises:
            DataError: the file is no image, or has another size.
        """
        try:
            with Image.open(path) as image:
                size = image.size[1], image.size[0]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{path} cannot be read as an image ({error}): copy it again") from None
        camera = self.entry["images"][name]
        wanted = camera.get("height"), camera.get("width")
        if None not in wanted and wanted != size:
            raise DataError(
                f"{path} is {size[0]} x {size[1]} pixels (height x width), and {self.name}: images.{name} gives "
                f"{short(wanted[0])} x {short(wanted[1])}; give the image that belongs to the calibration"
            )
        return size

    def boxes(self) -> Boxes:
        """Reads the boxes [M] of the entry and transforms them to the ego frame; see `clip`.

        Raises:
            DataError: a box is malformed.

        Warns:
            PerceptionWarning: the file does not hold what is needed to use them.
        """
        ego_from_lidar = self.ego_from_lidar()
        found = self.entry.get("instances")
        instances = [] if found is None else typed(found, list, f"{self.name}: instances", "a list of boxes")
        layout = _LAYOUTS.get(self.dataset)
        lacking = ""
        if instances and self.categories is None:
            lacking = "the file has no metainfo.categories, which names their classes"
        elif instances and layout is None and ego_from_lidar is None:
            lacking = "the entry has no lidar_points.lidar2ego, in whose frame they are"
        if lacking:
            text = f"{self.name}: instances are left out, because {lacking}; add it to compare with the ground truth"
            warnings.warn(text, PerceptionWarning, stacklevel=4)
            instances = []
        box, velocity = np.zeros((len(instances), 7)), np.full((len(instances), 2), np.nan)
        label, valid = np.full(len(instances), -1), np.zeros(len(instances), dtype=bool)
        for row, item in enumerate(instances):
            where = f"{self.name}: instances[{row}]"
            item = typed(item, Mapping, where, "an object")
            box[row] = numbers(item.get("bbox_3d"), f"{where}.bbox_3d", 7)
            if item.get("velocity") is not None:
                velocity[row] = numbers(item["velocity"], f"{where}.velocity", 2, allow_nan=True)
            label[row] = self._label(item.get("bbox_label_3d"), f"{where}.bbox_label_3d")
            valid[row] = read_flag(item.get("bbox_3d_isvalid", True), f"{where}.bbox_3d_isvalid")
            if np.abs(box[row, :6]).max() > _FARTHEST or abs(box[row, 6]) > _LARGEST_ANGLE:
                raise DataError(
                    f"{where}.bbox_3d is {short(box[row].tolist())}; give metres from the LiDAR and radians"
                )
            if box[row, 3:6].min() <= 0:
                raise DataError(f"{where}.bbox_3d has a length, width or height that is not above 0; correct it")
            if np.nan_to_num(np.abs(velocity[row])).max() > _FARTHEST:
                raise DataError(f"{where}.velocity is {short(velocity[row].tolist())}; give metres per second")
        center, size, yaw = box[:, :3], box[:, 3:6], box[:, 6]
        ego_from_box = np.eye(4) if ego_from_lidar is None else ego_from_lidar
        if layout is not None and len(instances):
            camera = typed(
                self.entry["images"].get(layout.box_camera), Mapping, f"{self.name}: images.{layout.box_camera}",
                "the camera in whose axes the boxes are",
            )  # fmt: skip
            where = f"{self.name}: images.{layout.box_camera}.lidar2cam"
            lidar_from_cam = invert_rigid(read_rigid(camera.get("lidar2cam"), where))
            # Camera axes: x right, y down, z forward. The yaw is about y, from x towards -z.
            size = size[:, [0, 2, 1]]
            heading = np.stack([np.cos(yaw), np.zeros_like(yaw), -np.sin(yaw)], 1) @ lidar_from_cam[:3, :3].T
            center = transform_points(lidar_from_cam, center - np.pad(size[:, 2:] / 2, ((0, 0), (1, 1))))
            yaw = np.arctan2(heading[:, 1], heading[:, 0])
        # Velocities are level, and mmdet3d writes their projections onto the plane of the LiDAR's x and y. Its yaws are
        # angles about z against the LiDAR's x axis.
        ego_from_plane = np.linalg.inv(ego_from_box[:2, :2].T)
        return Boxes(
            center=torch.from_numpy(transform_points(ego_from_box, center)).float(),
            size=torch.from_numpy(size).float(),
            yaw=torch.from_numpy(wrap_angle(yaw + yaw_from_rotation(ego_from_box))).float(),
            velocity=torch.from_numpy(velocity @ ego_from_plane.T).float(),
            label=torch.from_numpy(label),
            attribute=torch.full((len(box),), -1),
            score=torch.ones(len(box)),
            valid=torch.from_numpy(valid & (label >= 0)),
            uncertainty=torch.zeros(len(box), 9),
        )

    def _label(self, value: object, where: str) -> int:
        """Returns the index into BOX_CLASSES of a label of the file, -1 for other classes."""
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
            raise DataError(f"{where} is {short(value)}; give a label of metainfo.categories, or -1")
        name = (self.categories or {}).get(int(value), "").lower()
        return BOX_CLASSES.index(name) if name in BOX_CLASSES else -1


def load_frame(
    rig: NumpyCameraRig,
    ego_from_exposure: np.ndarray,
    ego_from_lidar: np.ndarray | None,
    paths: Mapping[int, Path],
    image_size: tuple[int, int],
) -> Frame:
    """Decodes the images of a frame and fits them to the network; the frame is a first frame, without leading [T].

    Args:
        rig: calibration [N, ...] of the stored images; that of the frame is in pixels of the fitted ones.
        ego_from_exposure: [N, 4, 4].
        ego_from_lidar: [4, 4], None for that of nuScenes' cars.
        paths: of the images by number of the camera.
        image_size: height and width, see `fit_image`.

    Raises:
        DataError: an image is missing or damaged.
    """
    images = torch.zeros(len(rig.present), 3, *image_size, dtype=torch.uint8)  # [N, 3, H, W]
    img_from_cam = rig.img_from_cam.copy()
    for n, path in paths.items():
        images[n], img_from_cam[n] = decode_image(path, img_from_cam[n], image_size)
    lidar = np.array(NUSCENES_EGO_FROM_LIDAR) if ego_from_lidar is None else ego_from_lidar
    return Frame(
        images=images,
        rig=CameraRig(
            torch.from_numpy(img_from_cam).float(), torch.from_numpy(rig.ego_from_cam).float(),
            torch.from_numpy(rig.present),
        ),
        ego_from_prev=torch.eye(4),
        seconds_since_prev=torch.zeros(()),
        is_first=torch.ones((), dtype=torch.bool),
        ego_from_lidar=torch.from_numpy(lidar).float(),
        ego_from_exposure=torch.from_numpy(ego_from_exposure).float(),
    )  # fmt: skip


def _fields(cameras: Sequence[str]) -> dict[str, str]:
    """Names of the fields of a rig in the words of an info file."""
    fields = {f"rig.img_from_cam[{n}]": f"images.{name}.cam2img" for n, name in enumerate(cameras)}
    return fields | {f"rig.ego_from_cam[{n}]": f"the pose of images.{name}" for n, name in enumerate(cameras)}


def _renamed(prefix: str, names: Mapping[str, str], check: Any, *arguments: object) -> Any:
    """Calls a check of live use, and names the fields of the file in its error."""
    try:
        return check(*arguments)
    except DataError as error:
        raise DataError(prefix + _in_words_of(names, str(error))) from None


def _in_words_of(names: Mapping[str, str], text: str) -> str:
    for name, field in names.items():
        text = text.replace(name, field)
    return text


def _warn(text: str) -> None:
    warnings.warn(text, PerceptionWarning, stacklevel=3)
