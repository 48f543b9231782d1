"""The motion of the vehicle between two frames, with numpy alone."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np

from perception.errors import DataError, PerceptionWarning
from perception.geometry import invert_rigid
from perception.inference.checks import checked_pose, checked_setting, checked_time

MAX_GAP = 2.0  # seconds between two steps after which the memory is of no use
MAX_SPEED = 60.0  # m/s above which a motion is a jump of the pose
MAX_TURN_RATE = 2.0  # rad/s, likewise
JUMP_MARGIN_M, JUMP_MARGIN_RAD = 1.0, 0.1  # allowed for noise of poses, which is large beside a motion of milliseconds
STEP_UNITS = (("nanoseconds", 1e7, "1e9"), ("microseconds", 1e4, "1e6"), ("milliseconds", 1e1, "1e3"))


class Motion(NamedTuple):
    """The motion from the previous frame to this one, and what the next one is measured from."""

    ego_from_prev: np.ndarray  # [4, 4] float64, identity if first
    seconds: float  # 0 if first
    is_first: bool
    global_from_ego: np.ndarray  # [4, 4] float64
    time_s: float
    gaps: int  # how many frames in a row, up to this one, came after a gap
    warning: str  # empty if nothing is strange


class EgoMotion:
    """Remembers the pose and time of the last frame.

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
        """Forgets the last frame; the next one is a first one."""
        self._last: Motion | None = None

    def since_last(self, global_from_ego: np.ndarray, time_s: float) -> Motion:
        """Measures the motion since the frame that was kept last.

        The frame is a first one if there is none before it, if that was more than `MAX_GAP` seconds ago, or if the pose
        has jumped (see `jumped`).

        Raises:
            DataError: the pose is not rigid or out of range, the time is no number of seconds or did not go forward.
        """
        pose, time_s = checked_pose(global_from_ego), checked_time(time_s)
        first = Motion(np.eye(4), 0.0, True, pose, time_s, 0, "")
        last = self._last
        if last is None:
            return first
        if time_s <= last.time_s:
            raise DataError(
                f"time_s is {time_s:.6f}, but the last step was at {last.time_s:.6f}: give frames in order, or call "
                "reset() before another drive"
            )
        seconds = time_s - last.time_s
        if seconds > MAX_GAP:
            gaps = last.gaps + 1
            return first._replace(gaps=gaps, warning=_gap_warning(seconds) if gaps == 3 else "")
        # In float64: global coordinates are kilometres, the motion is centimetres.
        ego_from_prev = invert_rigid(pose) @ last.global_from_ego
        if jumped(ego_from_prev, seconds, self.max_speed, self.max_turn_rate):
            distance, angle = motion_size(ego_from_prev)
            return first._replace(
                warning=f"the pose moved {distance:.4g} m and turned {angle:.3g} rad in {seconds:.3g} s, but max_speed "
                f"is {self.max_speed:g} m/s and max_turn_rate {self.max_turn_rate:g} rad/s: the memory is dropped and "
                "this step is a first one; correct the poses, or raise the limit if the vehicle does move so"
            )
        return Motion(ego_from_prev, seconds, False, pose, time_s, 0, "")

    def keep(self, motion: Motion) -> None:
        """Makes a frame the last one, and warns of what was strange about it."""
        self._last = motion
        if motion.warning:
            warnings.warn(motion.warning, PerceptionWarning, stacklevel=3)  # at the line that called step()


def jumped(
    ego_from_prev: np.ndarray,
    seconds: np.ndarray | float,
    max_speed: float = MAX_SPEED,
    max_turn_rate: float = MAX_TURN_RATE,
) -> np.ndarray:
    """Tells which motions no vehicle makes: faster than the limits by more than `JUMP_MARGIN_M`, `JUMP_MARGIN_RAD`.

    Args:
        ego_from_prev: [..., 4, 4] rigid.
        seconds: [...] that each motion took.
        max_speed: m/s.
        max_turn_rate: rad/s, about any axis.

    Returns:
        [...] bool.
    """
    distance, angle = motion_size(ego_from_prev)
    return (distance > max_speed * seconds + JUMP_MARGIN_M) | (angle > max_turn_rate * seconds + JUMP_MARGIN_RAD)


def motion_size(ego_from_prev: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance in metres and angle in radians (0..pi, about any axis) of rigid motions [..., 4, 4], both [...]."""
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
        f"three steps in a row came more than {MAX_GAP:g} s after the one before, the last one {seconds:.6g} s after "
        f"it, so the memory is never used: {fix}"
    )
