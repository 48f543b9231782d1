"""Computes the motion of the vehicle between two frames from poses and times, with numpy alone.

A network uses its memory of the previous frame only if the motion since then is known. After a long gap or a jump of
the pose, the next frame is therefore a first frame, which ignores the memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from perception.errors import DataError
from perception.geometry import invert_rigid
from perception.inference.checks import checked_pose, checked_setting, checked_time

MAX_GAP = 2.0  # seconds between two steps above which the memory is dropped
MAX_SPEED = 60.0  # m/s above which a motion is a jump of the pose
MAX_TURN_RATE = 2.0  # rad/s above which a motion is a jump of the pose
# Allowance for pose noise, which is large compared with the motion in a few milliseconds.
JUMP_MARGIN_M, JUMP_MARGIN_RAD = 1.0, 0.1
STEP_UNITS = (("nanoseconds", 1e7, "1e9"), ("microseconds", 1e4, "1e6"), ("milliseconds", 1e1, "1e3"))


class Motion(NamedTuple):
    """The motion from the previous frame to this one, with the pose and time of this frame."""

    ego_from_prev: NDArray[np.float64]  # [4, 4], identity if first
    seconds: float  # 0 if first
    is_first: bool
    global_from_ego: NDArray[np.float64]  # [4, 4]
    time_s: float
    gaps: int  # number of consecutive frames up to this one that came after a gap
    warning: str  # empty for none
    first_because: str = ""  # why it is a first frame; empty if it is none


class EgoMotion:
    """Computes the motion between frames and keeps the pose and time of the last frame.

    Args:
        max_speed: m/s above which the pose has jumped, inf for no limit.
        max_turn_rate: rad/s above which the pose has jumped, inf for no limit.

    Raises:
        ConfigError: a limit is not a number, or negative.
    """

    def __init__(self, max_speed: float = MAX_SPEED, max_turn_rate: float = MAX_TURN_RATE) -> None:
        self.max_speed = checked_setting("max_speed", max_speed, 0, np.inf, "m/s, 0 or more")
        self.max_turn_rate = checked_setting("max_turn_rate", max_turn_rate, 0, np.inf, "rad/s, 0 or more")
        self.reset()

    def reset(self) -> None:
        """Drops the last frame; the next frame is a first frame."""
        self._last: Motion | None = None

    def since_last(self, global_from_ego: object, time_s: object) -> Motion:
        """Computes the motion since the last frame that `keep` stored.

        The frame is a first frame if there is no last frame, if the last frame was more than `MAX_GAP` seconds ago, or
        if the pose has jumped (see `jumped`).

        Args:
            global_from_ego: [4, 4] pose at `time_s`, metres.
            time_s: seconds, later than the time of the last frame.

        Raises:
            DataError: the pose is not rigid or out of range, or the time is not a number of seconds or not later than
                the last time.
        """
        pose, time = checked_pose(global_from_ego), checked_time(time_s)
        first = Motion(np.eye(4), 0.0, True, pose, time, 0, "", "it is the first frame")
        last = self._last
        if last is None:
            return first
        if time <= last.time_s:
            raise DataError(
                f"time_s is {time:.6f}, but the last step was at {last.time_s:.6f}: give frames in order, or call "
                "reset() before another sequence"
            )
        seconds = time - last.time_s
        if seconds > MAX_GAP:
            gaps = last.gaps + 1
            return first._replace(
                gaps=gaps,
                warning=_gap_warning(seconds) if gaps == 3 else "",
                first_because=f"the last frame was {seconds:.3g} s before",
            )
        # In float64, because global coordinates are kilometres and the motion is centimetres.
        ego_from_prev = invert_rigid(pose) @ last.global_from_ego
        if interrupted(ego_from_prev, seconds, self.max_speed, self.max_turn_rate):
            distance, angle = motion_size(ego_from_prev)
            return first._replace(
                first_because="the pose has jumped",
                warning=f"the pose moved {distance:.4g} m and turned {angle:.3g} rad in {seconds:.3g} s, but max_speed "
                f"is {self.max_speed:g} m/s and max_turn_rate {self.max_turn_rate:g} rad/s: the memory is dropped and "
                "this step is a first one; correct the poses, or raise the limit if the vehicle moves this fast",
            )
        return Motion(ego_from_prev, seconds, False, pose, time, 0, "")

    def keep(self, motion: Motion) -> None:
        """Stores a frame as the last frame."""
        self._last = motion


def jumped(
    ego_from_prev: NDArray[Any],
    seconds: NDArray[Any] | float,
    max_speed: float = MAX_SPEED,
    max_turn_rate: float = MAX_TURN_RATE,
) -> NDArray[np.bool_]:
    """Returns which motions exceed the limits by more than `JUMP_MARGIN_M` or `JUMP_MARGIN_RAD`.

    Args:
        ego_from_prev: [..., 4, 4] rigid.
        seconds: [...] duration of each motion.
        max_speed: m/s.
        max_turn_rate: rad/s, about any axis.

    Returns:
        [...] bool.
    """
    distance, angle = motion_size(ego_from_prev)
    result: NDArray[np.bool_] = (distance > max_speed * seconds + JUMP_MARGIN_M) | (
        angle > max_turn_rate * seconds + JUMP_MARGIN_RAD
    )
    return result


def interrupted(
    ego_from_prev: NDArray[Any],
    seconds: NDArray[Any] | float,
    max_speed: float = MAX_SPEED,
    max_turn_rate: float = MAX_TURN_RATE,
) -> NDArray[np.bool_]:
    """Returns before which frames the memory is dropped: after more than `MAX_GAP` seconds or a jump of the pose.

    Args: as for `jumped`.

    Returns:
        [...] bool.
    """
    result: NDArray[np.bool_] = (np.asarray(seconds) > MAX_GAP) | jumped(
        ego_from_prev, seconds, max_speed, max_turn_rate
    )
    return result


def motion_size(ego_from_prev: NDArray[Any]) -> tuple[Any, Any]:
    """Returns the distance in metres and the angle in radians (0..pi, about any axis) of rigid motions.

    Args:
        ego_from_prev: [..., 4, 4].

    Returns:
        Two float64 arrays [...].
    """
    rotation = ego_from_prev[..., :3, :3]
    skew = rotation - rotation.swapaxes(-1, -2)
    sin = np.sqrt(skew[..., 2, 1] ** 2 + skew[..., 0, 2] ** 2 + skew[..., 1, 0] ** 2)  # twice the sine
    cos = np.trace(rotation, axis1=-2, axis2=-1) - 1  # twice the cosine
    return np.linalg.norm(ego_from_prev[..., :3, 3], axis=-1), np.arctan2(sin, cos)


def _gap_warning(seconds: float) -> str:
    fix = "give frames more often"
    for unit, least, divisor in STEP_UNITS:
        if least <= seconds <= 100 * least:  # frames come every 0.01 to 1 s
            fix = f"these look like {unit}, so divide time_s by {divisor}"
            break
    return (
        f"three steps in a row came more than {MAX_GAP:g} s after the step before, the last of them {seconds:.6g} s "
        f"after it, so the memory is never used: {fix}"
    )
