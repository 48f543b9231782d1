"""What the predictor and the torch-free runtime do around a network in one step, with numpy alone.

images, rig, pose, time = live.arguments(...)         # images and calibration of pinholes
motion = live.ego_motion.since_last(pose, time)
rig, moved, found = live.carried(rig, motion, times)  # poses of cameras that expose at other times
step = live.inspect(motion, rig, moved, ..., found)   # refuses what cannot be right, changes nothing
...                                                   # the network runs
live.keep(step)                                       # only now pose, time and what was seen are stored
live.warnings.emit(step.findings)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from perception.errors import DataError
from perception.inference.checks import check_intrinsics, checked_rigid, checked_time
from perception.inference.crop import fitted_rig
from perception.inference.ego_motion import EgoMotion, FrameMotion, ego_from_ego_at
from perception.inference.images import as_pixels
from perception.inference.plausibility import Findings, ImageStatistics, Sizes, Statistics, Warnings, implausible_rig
from perception.inference.visibility import SeenMap, View, sees_ground
from perception.types import NUSCENES_EGO_FROM_LIDAR, CameraRig, NumpyCameraRig, StepInfo, Weights

if TYPE_CHECKING:
    from perception.rigs.rig import Rig
    from perception.rigs.virtual import VirtualRig


MAX_CAMERA_OFFSET = 1.0  # seconds between a camera and its frame that are refused
USUAL_CAMERA_OFFSET = 0.25  # seconds above which they are warned of
STILL_OFFSET = 0.1  # seconds above which an unknown motion is warned of; it is 1.5 m at 15 m/s
NO_MEMORY = (
    "{reason}, so every frame stands for itself: there is no memory, and velocities are at their worst; give "
    "global_from_ego and time_s, or motion=Motion.from_speed_yaw_rate(...)"
)

NO_MEMORY_IN_NETWORK = "the network has no memory"


class Step(NamedTuple):
    """The checked input of one step."""

    motion: FrameMotion
    fitted_rig: NumpyCameraRig  # in pixels of the network's images
    ego_from_exposure: NDArray[np.float64]  # [N, 4, 4], see `Frame`
    view: View
    statistics: Statistics
    findings: Findings  # what is implausible
    is_blank: bool  # no camera is present and there is no memory, so there is nothing to predict from
    info: StepInfo


class LiveInput:
    """Checks the inputs of one step after another, and remembers poses, times and what the cameras have seen.

    Args:
        image_size: height and width of the network's images.
        remembers: False for a network without a memory.
        rig: the physical cameras whose images `step` gets; None if it gets images and calibration of pinholes.
        sizes: height and width of the images that the network takes, if they are fixed.
        weights: which ones the network has.
        bgr: arrays and tensors of images have blue first.
        as_bgr: the network takes images with blue first.
        max_speed, max_turn_rate: see `EgoMotion`.

    Raises:
        ConfigError: a limit is not a number, or negative; or the rig does not fit the network.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        remembers: bool,
        *,
        rig: Rig | VirtualRig | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
        weights: Weights,
        bgr: bool = False,
        as_bgr: bool = False,
        max_speed: float,
        max_turn_rate: float,
    ) -> None:
        self.ego_motion = EgoMotion(max_speed, max_turn_rate)
        self._image_size, self._remembers, self._weights = image_size, remembers, weights
        self._bgr, self._as_bgr = bgr, as_bgr
        self._seen_map = SeenMap(remembers)
        self.name_cameras(())
        self._last_rig: tuple[bytes, Findings] = (b"", {})
        self._virtual, self._sizes, self._cut_off = None, sizes, ""
        self.ego_from_lidar = np.array(NUSCENES_EGO_FROM_LIDAR)  # [4, 4], see `Frame`
        if rig is not None:
            from perception.rigs.coverage import SEE_TABLE
            from perception.rigs.virtual import rig_for_network  # it needs Pillow, and a vehicle may have numpy alone

            self._virtual = rig_for_network(rig, image_size)
            self._sizes = None if sizes is None else self._virtual.checked_sizes(sizes)
            self._virtual.make_tables()
            self.name_cameras([camera.source.name for camera in self._virtual.cameras])
            self._cut_off = self._virtual.coverage().finding(SEE_TABLE)
            if self._virtual.rig.ego_from_lidar is not None:
                self.ego_from_lidar = self._virtual.rig.ego_from_lidar.copy()

    @property
    def cameras(self) -> int | None:
        """Number of images that the network gets, None if every step decides."""
        return None if self._virtual is None else len(self._virtual.cameras)

    def name_cameras(self, names: Sequence[str]) -> None:
        """Gives the camera of each image a name, which warnings use. Images of one camera have the same name.

        Without names every image is that of another camera, and warnings give its number.
        """
        self._cameras = tuple(names)
        self.warnings, self._statistics = Warnings(self._cameras), ImageStatistics(self._cameras)

    def arguments(self, images: Any, rig: Any, global_from_ego: Any, time_s: Any) -> tuple[Any, Any, Any, Any]:
        """Returns the arguments of `step` with the images and the calibration of pinholes.

        With a rig at construction, `images` are those of its cameras, and `step` takes no other calibration: the pose
        and the time follow the images.

        Raises:
            DataError: both rigs were given, or neither, or the images do not fit the rig.
        """
        if self._virtual is None:
            if time_s is None and not isinstance(rig, CameraRig | NumpyCameraRig):
                raise DataError(
                    "step needs images, rig, global_from_ego and time_s; without rig if one was given at construction"
                )
            return images, rig, global_from_ego, time_s
        names = self._virtual.rig.names
        if rig is not None:
            if global_from_ego is not None and time_s is not None:
                raise DataError(
                    "step was given a rig, and the cameras are those of the rig that was given at construction; give "
                    "images, global_from_ego and time_s"
                )
            global_from_ego, time_s = rig, global_from_ego if time_s is None else time_s
        if isinstance(images, Mapping):
            images = {name: self._converted(name, image) for name, image in images.items()}
        elif isinstance(images, Sequence | np.ndarray) and len(images) == len(names) and not isinstance(images, str):
            images = [self._converted(name, image) for name, image in zip(names, images, strict=True)]
        return *self._virtual.frame(images, self._sizes), global_from_ego, time_s

    def pixels(self, n: int, image: Any) -> NDArray[np.uint8]:
        """Returns the pixels of an image that `arguments` returned, of a present camera."""
        pixels: NDArray[np.uint8] = image if self._virtual is not None else self._as_pixels(n, image)
        return pixels

    def _converted(self, name: Any, image: Any) -> NDArray[np.uint8] | None:
        return None if image is None else self._as_pixels(name, image)

    def _as_pixels(self, camera: Any, image: Any) -> NDArray[np.uint8]:
        return as_pixels(f"images[{camera!r}]", image, given_bgr=self._bgr, wanted_bgr=self._as_bgr)

    def carried(
        self, rig: NumpyCameraRig, motion: FrameMotion, camera_times_s: Any, ego_from_exposure: Any = None
    ) -> tuple[NumpyCameraRig, NDArray[np.float64], Findings]:
        """Carries the poses of cameras from their exposure to the time of the frame.

        Args:
            rig: with the poses of the cameras on the vehicle.
            motion: of the frame.
            camera_times_s: seconds by name of a camera if a rig was given at construction, else one per camera in their
                order. A camera without a time, or with None, exposed at the time of the frame. None for no times.
            ego_from_exposure: [N, 4, 4] the motion of each camera since its exposure, instead of times.

        Returns:
            The rig with `ego_from_cam` in the ego frame at the time of the frame; the motion [N, 4, 4] that it holds,
            `Frame.ego_from_exposure`; and what is implausible.

        Raises:
            DataError: the times have no frame time to be compared with, name no camera, are no seconds, or are farther
                than `MAX_CAMERA_OFFSET` from the time of the frame.
        """
        motions = np.tile(np.eye(4), (len(rig.present), 1, 1))
        if ego_from_exposure is not None:
            if camera_times_s is not None:
                raise DataError("camera_times_s and ego_from_exposure were given; give one of them")
            if (given := len(ego_from_exposure)) != len(motions):
                raise DataError(f"ego_from_exposure has {given} matrices for {len(motions)} images; give one for each")
            for n in np.flatnonzero(rig.present):
                motions[n] = checked_rigid(f"ego_from_exposure[{n}]", ego_from_exposure[n])
            return rig._replace(ego_from_cam=motions @ rig.ego_from_cam), motions, {}
        if camera_times_s is None:
            return rig, motions, {}
        if motion.time_s is None:
            raise DataError("camera_times_s was given without time_s; give the time of the frame in the same clock")
        found = Findings()
        for n, time in enumerate(self._times(camera_times_s, len(motions))):
            if time is None or not rig.present[n] or (offset := checked_time(time) - motion.time_s) == 0:
                continue
            if abs(offset) > MAX_CAMERA_OFFSET:
                raise DataError(
                    f"camera_times_s of camera {self._name(n)} is {offset:+.4g} s from time_s; give seconds of one "
                    "clock, and leave out a camera that is this late"
                )
            moved = ego_from_ego_at(motion, motion.time_s + offset)
            if moved is not None:
                motions[n] = moved
            elif abs(offset) > STILL_OFFSET:
                found["camera motion"] = (
                    f"camera {n} exposed {offset:+.2g} s from the time of the frame, and the motion there is not known "
                    "in a first frame: its pose is taken as it is on the vehicle"
                )
            if abs(offset) > USUAL_CAMERA_OFFSET:
                found["camera time"] = (
                    f"camera {n} exposed {offset:+.2g} s from the time of the frame: what moves has moved since; give "
                    "times of one clock, or leave out a camera that is late"
                )
        return rig._replace(ego_from_cam=motions @ rig.ego_from_cam), motions, found

    def _times(self, camera_times_s: Any, cameras: int) -> list[Any]:
        """One time or None for each image of the network."""
        if self._virtual is None:
            if not isinstance(camera_times_s, Sequence | np.ndarray) or len(camera_times_s) != cameras:
                raise DataError(
                    f"camera_times_s has not one time for each of the {cameras} images; give a list in their order, "
                    "with None for a camera at time_s"
                )
            return list(camera_times_s)
        names = self._virtual.rig.names
        if not isinstance(camera_times_s, Mapping):
            raise DataError(
                f"camera_times_s is {type(camera_times_s).__name__}; give a dict of camera names and seconds"
            )
        if unknown := [name for name in camera_times_s if name not in names]:
            raise DataError(f"camera_times_s: the rig has no camera {unknown[0]!r}; it has {', '.join(names)}")
        return [camera_times_s.get(camera.source.name) for camera in self._virtual.cameras]

    def _name(self, n: int) -> str:
        return repr(self._cameras[n]) if self._cameras else str(n)

    def reset(self) -> None:
        """Drops the last frame and what was seen; the next frame is a first frame."""
        self.ego_motion.reset()
        self._seen_map.reset()

    def inspect(
        self,
        motion: FrameMotion,
        rig: NumpyCameraRig,
        ego_from_exposure: NDArray[np.float64],
        sizes: Sizes,
        pixels: Mapping[int, NDArray[Any]],
        found: Findings,
    ) -> Step:
        """Checks a frame. It changes nothing.

        Args:
            motion: from `ego_motion.since_last`.
            rig, ego_from_exposure: from `carried`, of the given images.
            sizes: height and width of the given images by number of the camera, for all present cameras.
            pixels: from `sampled_rgb`, for all present cameras.
            found: what is implausible so far, from `carried`.

        Raises:
            DataError: the intrinsics do not fit the size of their image, or no camera sees the ground.
        """
        present = [n for n, is_present in enumerate(rig.present) if is_present]
        for n in present:
            check_intrinsics(f"rig.img_from_cam[{self._name(n)}]", rig.img_from_cam[n], sizes[n])
        fitted = fitted_rig(rig, sizes, self._image_size)
        view = self._seen_map.look(fitted, self._image_size, motion.ego_from_prev, motion.is_first)
        is_blank = not present and (motion.is_first or not self._remembers)
        findings = found | ({"motion": motion.warning} if motion.warning else {})
        if self._remembers and (motion.global_from_ego is None or motion.time_s is None):
            findings["no memory"] = NO_MEMORY.format(reason=motion.first_because)
        if self._cut_off:
            findings["coverage"] = self._cut_off
        findings |= self._implausible_rig(rig, fitted, {n: sizes[n] for n in present})
        if is_blank:
            findings["no camera"] = "no camera is present and the memory is empty: nothing is predicted"
        odd, statistics = self._statistics.implausible(pixels)
        reason = motion.first_because if self._remembers else NO_MEMORY_IN_NETWORK
        info = StepInfo(motion.time_s, motion.global_from_ego, not reason, reason, self._weights)
        return Step(motion, fitted, ego_from_exposure, view, statistics, findings | odd, is_blank, info)

    def _implausible_rig(self, rig: NumpyCameraRig, fitted: NumpyCameraRig, sizes: Sizes) -> Findings:
        """Returns what is implausible in a rig, which most vehicles give unchanged in every step."""
        key = b"".join(part.tobytes() for part in rig) + repr(sizes).encode()
        if key != self._last_rig[0]:
            seeing = sees_ground(fitted, self._image_size)
            found = implausible_rig(rig, sizes, seeing, self._cameras)
            if sizes and not seeing.any():
                cause = self.warnings.named(next(iter(found.values())))
                raise DataError(f"no camera of the rig sees the ground around the vehicle; probably because {cause}")
            self._last_rig = key, found
        return self._last_rig[1]

    def keep(self, step: Step) -> None:
        """Stores a frame as the last one, once the network has run."""
        self.ego_motion.keep(step.motion)
        self._seen_map.keep(step.view)
        self._statistics.keep(step.statistics)


def without_result(info: StepInfo) -> StepInfo:
    """Returns the information of a step that predicts nothing."""
    return info._replace(used_memory=False, no_memory_because="nothing is predicted in this step")
