"""Virtual cameras: the pinholes through which a network sees the cameras of any rig.

A network is trained on landscape images of pinholes that look ahead, with the horizon in the upper half. Cameras of
that kind pass through unchanged. Every other camera (with distortion, upright, tilted, or whose horizon would be cut
off) is replaced by one or more pinholes at the same place, levelled with the horizon:

- one pinhole takes the width that the camera sees at the horizon, up to `WIDEST_DEG`; a wider camera is divided into
  pinholes of about `USUAL_DEG` that overlap by `OVERLAP_DEG`;
- their images have the size of the network's, so that a narrow camera is scaled down no more than its width requires;
- the horizon is the row at `HORIZON` of the height, or nearer to the middle where the camera sees too little below it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from perception.errors import ConfigError, DataError, PerceptionWarning
from perception.inference.checks import checked_image
from perception.inference.crop import cropped_pixels, fitting_crop
from perception.reading import nearest
from perception.rigs.coverage import SEE_TABLE, Coverage, cover
from perception.rigs.models import Pinhole
from perception.rigs.remap import RemapTable, remap_table
from perception.rigs.rig import Rig, RigCamera
from perception.types import NumpyCameraRig

USUAL_DEG, WIDEST_DEG = 70.0, 110.0  # horizontal fields of view of nuScenes' cameras: five of 65, one called 110
OVERLAP_DEG = 5.0  # of neighbouring pinholes, so that one of them shows a thing at their border as a whole
LEVEL_DEG = 5.0  # pitch and roll of a camera that passes through
HORIZON = 0.3  # of the height; on nuScenes it lies at 0.28 to 0.36 after fitting
HORIZON_RANGE = 0.15, 0.6  # where it may lie in a camera that passes through
LEAST_WIDTH = 0.75  # of a camera that passes through: share of its columns that fitting keeps
SCAN_DEG = 0.1  # step of the search for the width and height that a camera sees
BELOW_HORIZON_DEG = (0.0, 5.0, 10.0)  # the width is that of any of these rows: traffic is there

Images = Mapping[str, NDArray[np.uint8] | None] | Sequence[NDArray[np.uint8] | None] | NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class VirtualCamera:
    """A pinhole that the network sees.

    Attributes:
        source: the physical camera.
        img_from_cam: [3, 3] intrinsics in pixels of the images that `VirtualRig.frame` returns.
        ego_from_cam: [4, 4] metres.
        image_size: height and width of these images.
        is_unchanged: the camera passes through: intrinsics, pose and images are those of the source.
    """

    source: RigCamera
    img_from_cam: NDArray[np.float64]
    ego_from_cam: NDArray[np.float64]
    image_size: tuple[int, int]
    is_unchanged: bool

    @cached_property
    def table(self) -> RemapTable:
        """Where its pixels lie in the image of the source. Unchanged cameras have and need no such table."""
        return remap_table(self.source, self.ego_from_cam, self.img_from_cam, self.image_size)


class VirtualRig:
    """The pinholes of a rig for one network. `virtual_rig` makes it.

    Attributes:
        rig: the physical cameras.
        image_size: height and width of the network's images.
        cameras: the pinholes, in the order of their sources and from left to right.
    """

    def __init__(self, rig: Rig, image_size: tuple[int, int], cameras: Sequence[VirtualCamera]) -> None:
        self.rig, self.image_size, self.cameras = rig, image_size, tuple(cameras)

    def __len__(self) -> int:
        return len(self.cameras)

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each pinhole: that of its camera, numbered from left to right if several stand for it."""
        sources = [camera.source.name for camera in self.cameras]
        return tuple(
            name if sources.count(name) == 1 else f"{name}_{1 + sources[:n].count(name)}"
            for n, name in enumerate(sources)
        )

    def camera_rig(self) -> NumpyCameraRig:
        """Returns the calibration of the pinholes, in pixels of the images that `frame` returns."""
        return NumpyCameraRig(
            np.stack([camera.img_from_cam for camera in self.cameras]),
            np.stack([camera.ego_from_cam for camera in self.cameras]),
            np.ones(len(self), dtype=bool),
        )

    def make_tables(self) -> None:
        """Computes the remap tables now. Otherwise the first frame does, which takes about 0.1 s per pinhole longer."""
        for camera in self.cameras:
            if not camera.is_unchanged:
                _ = camera.table

    def frame(
        self, images: Images, sizes: Sequence[tuple[int, int]] | None = None
    ) -> tuple[list[NDArray[np.uint8] | None], NumpyCameraRig]:
        """Returns the images and the calibration of the pinholes.

        Args:
            images: uint8 [H, W, 3] of the physical cameras, each in the size that the rig names: a mapping from camera
                names, or a sequence in the order of the rig. A camera that is None or not in the mapping is absent.
            sizes: height and width of the images to return, one for each pinhole, from `checked_sizes`; None for those
                of `cameras`.

        Returns:
            One image per pinhole, None if it is absent, and their calibration. The image of a camera that passes
            through is the given one, for `Predictor.step` to fit, or is fitted here if `sizes` has the network's size.

        Raises:
            DataError: a camera is not in the rig, or an image has another size, shape or type.
        """
        given = self._by_name(images)
        virtual: list[NDArray[np.uint8] | None] = []
        for camera in self.cameras:
            image = given[camera.source.name]
            virtual.append(image if image is None or camera.is_unchanged else camera.table(image))
        rig = self.camera_rig()._replace(present=np.array([image is not None for image in virtual]))
        for n, size in enumerate(sizes or ()):
            image = virtual[n]
            if image is not None and image.shape[:2] != size:
                virtual[n], crop = cropped_pixels(Image.fromarray(image), self.image_size)
                rig.img_from_cam[n] = crop.img_from_raw @ rig.img_from_cam[n]
        return virtual, rig

    def checked_sizes(self, sizes: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        """Returns the image sizes of an exported network after checking that this rig can give them.

        Raises:
            ConfigError: the number of images differs, or an image can be given neither as it is nor in the network's
                size.
        """
        if len(sizes) != len(self):
            raise ConfigError(
                f"the rig becomes {len(self)} pinholes for this network, and the export takes {len(sizes)} images; "
                f"export it for {len(self)} cameras"
            )
        for n, (size, camera) in enumerate(zip(sizes, self.cameras, strict=True)):
            given = dict.fromkeys((self.image_size, camera.image_size))  # the second one is fitted in the graph
            if tuple(size) not in given:
                raise ConfigError(
                    f"image {n} of the export has {size[1]} x {size[0]} pixels (width x height), and the rig gives "
                    f"{' or '.join(f'{W} x {H}' for H, W in given)}; export the network for images of its own size"
                )
        return tuple((int(H), int(W)) for H, W in sizes)

    def coverage(self) -> Coverage:
        """Returns which rays and which ground of each physical camera reach the network."""
        return Coverage(
            tuple(cover(source, self._network_cameras(source), self.image_size) for source in self.rig), self.image_size
        )

    def _network_cameras(self, source: RigCamera) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Intrinsics in pixels of the network's image, and poses, of the pinholes of a physical camera."""
        crops = (
            (camera, fitting_crop(camera.image_size, self.image_size).img_from_raw)
            for camera in self.cameras
            if camera.source is source
        )
        return [(img_from_raw @ camera.img_from_cam, camera.ego_from_cam) for camera, img_from_raw in crops]

    def _by_name(self, images: Images) -> dict[str, NDArray[np.uint8] | None]:
        names = self.rig.names
        if isinstance(images, Mapping):
            for name in images:
                if name not in names:
                    raise DataError(f"images: the rig has no camera {name!r}; {nearest(str(name), names)}")
            given = {name: images.get(name) for name in names}
        elif isinstance(images, Sequence | np.ndarray) and not isinstance(images, str | bytes):
            if len(images) != len(names):
                raise DataError(
                    f"images: {len(images)} images were given for {len(names)} cameras ({', '.join(names)}); give them "
                    "in this order with None for an absent one, or by name in a dict"
                )
            given = dict(zip(names, images, strict=True))
        else:
            raise DataError(f"images is {type(images).__name__}; give a dict of names and images, or a list")
        for camera in self.rig:
            image = given[camera.name]
            if image is None:
                continue
            H, W = checked_image(f"images[{camera.name!r}]", image).shape[:2]
            if (H, W) != camera.image_size:
                raise DataError(
                    f"images[{camera.name!r}] is {W} x {H} pixels, and the rig is calibrated for {camera.image_size[1]}"
                    f" x {camera.image_size[0]} (width x height); give images of that size, or correct image_size_px"
                )
        return given


def virtual_rig(rig: Rig, image_size: tuple[int, int]) -> VirtualRig:
    """Chooses the pinholes through which a network sees a rig, and warns of what is cut off.

    Args:
        rig: the physical cameras.
        image_size: height and width of the network's images (`model.config.image_size`).

    Warns:
        PerceptionWarning: much of what a camera sees on the ground does not reach the network; `VirtualRig.coverage`
            has the numbers.
    """
    chosen = chosen_pinholes(rig, image_size)
    if finding := chosen.coverage().finding(SEE_TABLE):
        warnings.warn(finding, PerceptionWarning, stacklevel=2)
    return chosen


def chosen_pinholes(rig: Rig, image_size: tuple[int, int]) -> VirtualRig:
    """Chooses the pinholes as `virtual_rig` does. The choice depends on the arguments alone."""
    H, W = image_size
    size = (int(H), int(W))
    cameras: list[VirtualCamera] = []
    for source in rig:
        cameras.extend([_unchanged(source)] if passes_through(source, size) else _pinholes(source, size))
    return VirtualRig(rig, size, cameras)


def rig_for_network(rig: object, image_size: tuple[int, int]) -> VirtualRig:
    """Returns the pinholes of a rig for a network.

    Args:
        rig: a `Rig`, or a `VirtualRig` for this network.
        image_size: height and width of the network's images.

    Raises:
        ConfigError: it is something else, or was made for another image size.
    """
    if isinstance(rig, Rig):
        return chosen_pinholes(rig, image_size)
    if not isinstance(rig, VirtualRig):
        raise ConfigError(f"rig is {type(rig).__name__}; give a perception.Rig, such as Rig.load('rig.yaml')")
    if rig.image_size != tuple(image_size):
        (H, W), (own_H, own_W) = image_size, rig.image_size
        raise ConfigError(
            f"the virtual rig was made for images of {own_W} x {own_H} pixels (width x height), and the network takes "
            f"{W} x {H}; give the rig itself"
        )
    return rig


def passes_through(camera: RigCamera, image_size: tuple[int, int]) -> bool:
    """Returns True for a camera that the network sees unchanged.

    That is a pinhole whose pitch and roll are below `LEVEL_DEG` and whose field of view is at most `WIDEST_DEG`, if
    fitting its image (see `fitting_crop`) keeps `LEAST_WIDTH` of its columns and the horizon within `HORIZON_RANGE`.

    Args:
        camera: a physical camera.
        image_size: height and width of the network's images.
    """
    if not isinstance(camera.model, Pinhole) or 2 * camera.lens_angle < np.pi:
        return False
    crop = fitting_crop(camera.image_size, image_size)
    width = camera.image_size[1]
    rotation = camera.ego_from_cam[:3, :3]
    pitch, roll = np.abs(np.degrees(np.arcsin(np.clip(rotation[2, [2, 0]], -1, 1))))
    upright = rotation[2, 1] < 0
    if max(pitch, roll) > LEVEL_DEG or not upright or 1 - 2 * crop.left / width < LEAST_WIDTH:
        return False
    rays, _ = camera.model.unproject([[0, camera.model.cy], [width, camera.model.cy]])
    if np.degrees(np.arccos(np.clip(rays[0] @ rays[1], -1, 1))) > WIDEST_DEG:
        return False
    # Points at infinity on the horizon have direction . up = 0: a line a u + b v + c = 0 in the image.
    a, b, c = np.linalg.inv(crop.img_from_raw @ camera.model.img_from_cam).T @ rotation[2]
    rows = -(a * np.array([0, image_size[1]]) + c) / b / image_size[0]
    low, high = HORIZON_RANGE
    return bool((rows >= low).all() and (rows <= high).all())


def _unchanged(source: RigCamera) -> VirtualCamera:
    return VirtualCamera(source, source.model.img_from_cam, source.ego_from_cam, source.image_size, True)


def _pinholes(source: RigCamera, image_size: tuple[int, int]) -> list[VirtualCamera]:
    """The levelled pinholes of a camera, from left to right."""
    H, W = image_size
    level = _levelled(source.ego_from_cam[:3, :3])
    if _sees(source, level, 0.0, 0.0):
        left, right = _width(source, level)
        usual = max(2, round((right - left) / np.radians(USUAL_DEG)))
        count = 1 if right - left <= np.radians(WIDEST_DEG) else usual
    else:  # it looks at the sky or at the ground; its own pitch stays
        level = _levelled(source.ego_from_cam[:3, :3], keep_pitch=True)
        left, right = _width(source, level)
        half = min(max(-left, right), np.radians(WIDEST_DEG) / 2)  # turned aside it would get a roll
        left, right, count = -half, half, 1
    overlap = np.radians(OVERLAP_DEG) if count > 1 else 0.0
    field = (right - left + (count - 1) * overlap) / count
    focal = W / 2 / np.tan(field / 2)
    cameras = []
    for k in range(count):
        yaw = left + field / 2 + k * (field - overlap)  # to the right
        pose = source.ego_from_cam.copy()
        pose[:3, :3] = level @ _turned_right(yaw)
        row = _horizon_row(source, pose[:3, :3], focal, H)
        img_from_cam = np.array([[focal, 0.0, W / 2], [0.0, focal, row], [0.0, 0.0, 1.0]])
        cameras.append(VirtualCamera(source, img_from_cam, pose, image_size, False))
    return cameras


def _levelled(ego_from_cam: NDArray[np.float64], *, keep_pitch: bool = False) -> NDArray[np.float64]:
    """Rotation [3, 3] of a camera without roll and pitch that looks where the given one does."""
    forward, down = ego_from_cam[:, 2], ego_from_cam[:, 1]
    # The heading of a camera that looks straight up or down is that of the upper edge of its image, or of the lower.
    heading = forward if np.hypot(*forward[:2]) > 0.1 else np.sign(forward[2]) * down
    yaw = np.arctan2(heading[1], heading[0])
    right = np.array([np.sin(yaw), -np.cos(yaw), 0.0])
    ahead = np.array([np.cos(yaw), np.sin(yaw), 0.0])
    if keep_pitch:
        ahead = ahead * np.hypot(*forward[:2]) + [0.0, 0.0, forward[2]]
    return np.stack([right, np.cross(ahead, right), ahead], -1)


def _turned_right(yaw: float) -> NDArray[np.float64]:
    """Rotation [3, 3] of a camera about its own y axis (down)."""
    return np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])


def _sees(source: RigCamera, level: NDArray[np.float64], right: ArrayLike, down: ArrayLike) -> NDArray[np.bool_]:
    """Returns whether a camera sees directions, which are angles to the right and downwards in a levelled frame."""
    right, down = np.broadcast_arrays(right, down)
    directions = np.stack([np.sin(right) * np.cos(down), np.sin(down), np.cos(right) * np.cos(down)], -1)
    return source.project(directions @ level.T @ source.ego_from_cam[:3, :3])[1]


def _width(source: RigCamera, level: NDArray[np.float64]) -> tuple[float, float]:
    """The angles to the right, from and to, that a camera sees without a gap around the middle."""
    right = np.radians(np.arange(-180, 180 + SCAN_DEG, SCAN_DEG))
    seen = _sees(source, level, right, np.radians(BELOW_HORIZON_DEG)[:, None]).any(0)
    return _run(right, seen)


def _horizon_row(source: RigCamera, rotation: NDArray[np.float64], focal: float, height: int) -> float:
    """The row of the optical axis of a pinhole, at which the horizon lies if it is level.

    It is `HORIZON` of the height, moved so far that no row shows nothing while others could show more.
    """
    down = np.radians(np.arange(-80, 80 + SCAN_DEG, SCAN_DEG))
    top, bottom = (focal * np.tan(angle) for angle in _run(down, _sees(source, rotation, 0.0, down)))
    wanted = HORIZON * height
    lowest, highest = height - bottom, -top  # rows at which the lower and upper edges of the two images meet
    return float(np.clip(wanted, min(lowest, highest), max(lowest, highest)))


def _run(angles: NDArray[np.float64], seen: NDArray[np.bool_]) -> tuple[float, float]:
    """First and last angle of the seen ones without a gap around the middle; of all seen ones if it is not seen."""
    middle = len(angles) // 2
    if not seen[middle]:
        found = np.flatnonzero(seen)
        return (float(angles[found[0]]), float(angles[found[-1]])) if found.size else (-0.1, 0.1)
    gaps = np.flatnonzero(~seen)
    before, after = gaps[gaps < middle], gaps[gaps > middle]
    first = before[-1] + 1 if before.size else 0
    last = after[0] - 1 if after.size else len(angles) - 1
    return float(angles[first]), float(angles[last])
