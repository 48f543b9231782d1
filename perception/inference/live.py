"""What the predictor and the torch-free runtime do around a network in one step, with numpy alone.

step = live.inspect(motion, rig, sizes, pixels)   # refuses what cannot be right, changes nothing
...                                               # the network runs
live.keep(step)                                   # only now pose, time and what was seen are stored
live.warnings.emit(step.findings)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from numpy.typing import NDArray

from perception.errors import DataError
from perception.inference.checks import check_intrinsics
from perception.inference.crop import fitted_rig
from perception.inference.ego_motion import EgoMotion, Motion
from perception.inference.plausibility import Findings, ImageStatistics, Sizes, Statistics, Warnings, implausible_rig
from perception.inference.visibility import SeenMap, View, sees_ground
from perception.types import CameraRig, NumpyCameraRig, StepInfo, Weights

if TYPE_CHECKING:
    from perception.rigs.rig import Rig
    from perception.rigs.virtual import VirtualRig


class Step(NamedTuple):
    """The checked input of one step."""

    motion: Motion
    fitted_rig: NumpyCameraRig  # in pixels of the network's images
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
        max_speed: float,
        max_turn_rate: float,
    ) -> None:
        self.ego_motion = EgoMotion(max_speed, max_turn_rate)
        self.warnings = Warnings()
        self._image_size, self._remembers, self._weights = image_size, remembers, weights
        self._seen_map, self._statistics = SeenMap(remembers), ImageStatistics()
        self._last_rig: tuple[bytes, Findings] = (b"", {})
        self._virtual, self._sizes, self._cut_off = None, sizes, ""
        if rig is not None:
            from perception.rigs.coverage import SEE_TABLE
            from perception.rigs.virtual import rig_for_network  # it needs Pillow, and a vehicle may have numpy alone

            self._virtual = rig_for_network(rig, image_size)
            self._sizes = None if sizes is None else self._virtual.checked_sizes(sizes)
            self._virtual.make_tables()
            self.warnings = Warnings([camera.source.name for camera in self._virtual.cameras])
            self._cut_off = self._virtual.coverage().finding(SEE_TABLE)

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
        if rig is not None:
            if global_from_ego is not None and time_s is not None:
                raise DataError(
                    "step was given a rig, and the cameras are those of the rig that was given at construction; give "
                    "images, global_from_ego and time_s"
                )
            global_from_ego, time_s = rig, global_from_ego if time_s is None else time_s
        return *self._virtual.frame(images, self._sizes), global_from_ego, time_s

    def reset(self) -> None:
        """Drops the last frame and what was seen; the next frame is a first frame."""
        self.ego_motion.reset()
        self._seen_map.reset()

    def inspect(
        self,
        motion: Motion,
        rig: NumpyCameraRig,
        sizes: Sizes,
        pixels: Mapping[int, NDArray[Any]],
    ) -> Step:
        """Checks a frame. It changes nothing.

        Args:
            motion: from `ego_motion.since_last`.
            rig: of the given images, from `checked_rig`.
            sizes: height and width of the given images by number of the camera, for all present cameras.
            pixels: from `sampled_rgb`, for all present cameras.

        Raises:
            DataError: the intrinsics do not fit the size of their image, or no camera sees the ground.
        """
        present = [n for n, is_present in enumerate(rig.present) if is_present]
        for n in present:
            check_intrinsics(f"rig.img_from_cam[{n}]", rig.img_from_cam[n], sizes[n])
        fitted = fitted_rig(rig, sizes, self._image_size)
        view = self._seen_map.look(fitted, self._image_size, motion.ego_from_prev, motion.is_first)
        is_blank = not present and (motion.is_first or not self._remembers)
        findings = {"motion": motion.warning} if motion.warning else {}
        if self._cut_off:
            findings["coverage"] = self._cut_off
        findings |= self._implausible_rig(rig, fitted, {n: sizes[n] for n in present})
        if is_blank:
            findings["no camera"] = "no camera is present and the memory is empty: nothing is predicted"
        found, statistics = self._statistics.implausible(pixels)
        reason = motion.first_because if self._remembers else "the network has no memory"
        info = StepInfo(motion.time_s, motion.global_from_ego, not reason, reason, self._weights)
        return Step(motion, fitted, view, statistics, findings | found, is_blank, info)

    def _implausible_rig(self, rig: NumpyCameraRig, fitted: NumpyCameraRig, sizes: Sizes) -> Findings:
        """Returns what is implausible in a rig, which most vehicles give unchanged in every step."""
        key = b"".join(part.tobytes() for part in rig) + repr(sizes).encode()
        if key != self._last_rig[0]:
            seeing = sees_ground(fitted, self._image_size)
            found = implausible_rig(rig, sizes, seeing)
            if sizes and not seeing.any():
                cause = next(iter(found.values()))
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
