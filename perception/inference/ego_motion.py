"""Computes the motion of the vehicle between two frames from poses and times, or from its speed, with numpy alone.

A network uses its memory of the previous frame only if the motion since then is known. After a long gap or a jump of
the pose, the next frame is therefore a first frame, which ignores the memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from perception.errors import DataError
from perception.geometry import invert_rigid, rigid_from_yaw
from perception.inference.checks import checked_number, checked_pose, checked_rigid, checked_setting, checked_time

MAX_GAP = 2.0  # seconds between two steps above which the memory is dropped
MAX_SPEED = 60.0  # m/s above which a motion is a jump of the pose
MAX_TURN_RATE = 2.0  # rad/s above which a motion is a jump of the pose
# Allowance for pose noise, which is large compared with the motion in a few milliseconds.
JUMP_MARGIN_M, JUMP_MARGIN_RAD = 1.0, 0.1
STEP_UNITS = (("nanoseconds", 1e7, "1e9"), ("microseconds", 1e4, "1e6"), ("milliseconds", 1e1, "1e3"))


@dataclass(frozen=True, eq=False)
class Motion:
    """The motion of the vehicle since the last step, for vehicles that give no pose.

    Attributes:
        ego_from_prev: [4, 4] transforms points of the ego frame before the motion to the one after it, metres.
        seconds: duration, above 0.

    Raises:
        DataError: the transform is not rigid, or the duration is no time above 0.
    """

    ego_from_prev: NDArray[np.float64]
    seconds: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "ego_from_prev", checked_rigid("ego_from_prev", self.ego_from_prev))
        object.__setattr__(self, "seconds", checked_number("seconds of a motion", self.seconds, "s"))
        if self.seconds <= 0:
            raise DataError(f"seconds of a motion is {self.seconds:g}; give the time that it took, above 0")

    @classmethod
    def from_speed_yaw_rate(cls, speed_mps: float, yaw_rate_radps: float, seconds: float) -> Motion:
        """Returns the motion at a constant speed and yaw rate, as the CAN bus of a vehicle gives them.

        The rear axle, below which the ego frame has its origin, moves along an arc of the radius speed / yaw rate,
        without slip.

        Args:
            speed_mps: of the rear axle, m/s; negative when reversing.
            yaw_rate_radps: rad/s, positive to the left.
            seconds: duration.

        Raises:
            DataError: a number is not finite, or `seconds` is not above 0.
        """
        speed = checked_number("speed_mps", speed_mps, "m/s")
        yaw_rate = checked_number("yaw_rate_radps", yaw_rate_radps, "rad/s")
        duration = checked_number("seconds of a motion", seconds, "s")
        angle, way = yaw_rate * duration, speed * duration
        # sin(angle) / angle and (1 - cos(angle)) / angle, which are 1 and 0 straight ahead.
        along, aside = np.sinc(angle / np.pi), np.sinc(angle / 2 / np.pi) * np.sin(angle / 2)
        return cls(invert_rigid(rigid_from_yaw(angle, np.array([way * along, way * aside, 0.0]))), duration)

    def then(self, following: Motion) -> Motion:
        """Returns this motion and a following one as one, for several CAN messages between two frames."""
        return Motion(following.ego_from_prev @ self.ego_from_prev, self.seconds + following.seconds)


class FrameMotion(NamedTuple):
    """The motion from the previous frame to this one, with the pose and time of this frame."""

    ego_from_prev: NDArray[np.float64]  # [4, 4], identity if first
    seconds: float  # 0 if first
    is_first: bool
    global_from_ego: NDArray[np.float64] | None  # [4, 4], None if it is not known
    time_s: float | None
    gaps: int  # number of consecutive frames up to this one that came after a gap
    warning: str  # empty for none
    first_because: str = ""  # why it is a first frame; empty if it is none
    path: tuple[tuple[float, NDArray[np.float64]], ...] = ()  # times and poses before, back to an interruption


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
        self._last: FrameMotion | None = None

    def since_last(self, global_from_ego: object, time_s: object, motion: object = None) -> FrameMotion:
        """Computes the motion since the last frame that `keep` stored.

        The frame is a first frame if there is no last frame, if a pose or a time is missing, if the last frame was more
        than `MAX_GAP` seconds ago, or if the pose has jumped (see `jumped`).

        Args:
            global_from_ego: [4, 4] pose at `time_s`, metres; None if there is none.
            time_s: seconds, later than the time of the last frame; None if there is none.
            motion: a `Motion` since the last frame instead of a pose, to which its seconds add up.

        Raises:
            DataError: the pose is not rigid or out of range; the time is not a number of seconds or not later than the
                last time; the motion is none, was given with a pose, or has another duration than the times.
        """
        last = self._last
        time = None if time_s is None else checked_time(time_s)
        if last is not None and time is not None and last.time_s is not None and time <= last.time_s:
            raise DataError(
                f"time_s is {time:.6f}, but the last step was at {last.time_s:.6f}: give frames in order, or call "
                "reset() before another sequence"
            )
        if motion is not None:
            return self._after(_checked_motion(motion, global_from_ego), time)
        pose = None if global_from_ego is None else checked_pose(global_from_ego)
        first = FrameMotion(np.eye(4), 0.0, True, pose, time, 0, "")
        if pose is None or time is None:
            return first._replace(first_because=f"no {'pose' if pose is None else 'time'} was given")
        if last is None:
            return first._replace(first_because="it is the first frame")
        if last.global_from_ego is None or last.time_s is None:
            return first._replace(first_because="the last frame had no pose and time")
        # In float64, because global coordinates are kilometres and the motion is centimetres.
        return self._judged(first, invert_rigid(pose) @ last.global_from_ego, time - last.time_s, last)

    def _after(self, motion: Motion, time: float | None) -> FrameMotion:
        """The frame after a given motion."""
        last = self._last
        start, before = (np.eye(4), None) if last is None else (last.global_from_ego, last.time_s)
        start = np.eye(4) if start is None else start
        pose = start @ invert_rigid(motion.ego_from_prev)
        if time is not None and before is not None and abs(time - before - motion.seconds) > _slack(motion.seconds):
            raise DataError(
                f"the motion took {motion.seconds:.4g} s, but time_s is {time - before:.4g} s after the last step; "
                "give the motion since the last step, several ones joined with then()"
            )
        if time is None:
            time = (0.0 if before is None else before) + motion.seconds
        first = FrameMotion(np.eye(4), 0.0, True, pose, time, 0, "")
        if last is None:
            path = ((time - motion.seconds, start),)
            return first._replace(first_because="it is the first frame", path=path)
        return self._judged(first, motion.ego_from_prev, motion.seconds, last._replace(global_from_ego=start))

    def _judged(
        self, first: FrameMotion, ego_from_prev: NDArray[np.float64], seconds: float, last: FrameMotion
    ) -> FrameMotion:
        """A frame with its motion, or as a first one after a gap or a jump."""
        if seconds > MAX_GAP:
            gaps = last.gaps + 1
            return first._replace(
                gaps=gaps,
                warning=_gap_warning(seconds) if gaps == 3 else "",
                first_because=f"the last frame was {seconds:.3g} s before",
            )
        if interrupted(ego_from_prev, seconds, self.max_speed, self.max_turn_rate):
            distance, angle = motion_size(ego_from_prev)
            return first._replace(
                first_because="the pose has jumped",
                warning=f"the pose moved {distance:.4g} m and turned {angle:.3g} rad in {seconds:.3g} s, but max_speed "
                f"is {self.max_speed:g} m/s and max_turn_rate {self.max_turn_rate:g} rad/s: the memory is dropped and "
                "this step is a first one; correct the poses, or raise the limit if the vehicle moves this fast",
            )
        time = first.time_s or 0.0
        assert last.global_from_ego is not None  # checked by the callers
        before = (time - seconds if last.time_s is None else last.time_s, last.global_from_ego)
        path = (*(entry for entry in last.path if time - entry[0] <= MAX_GAP), before)
        return first._replace(ego_from_prev=ego_from_prev, seconds=seconds, is_first=False, path=path)

    def keep(self, motion: FrameMotion) -> None:
        """Stores a frame as the last frame."""
        self._last = motion


def ego_from_ego_at(motion: FrameMotion, time_s: float) -> NDArray[np.float64] | None:
    """Returns the transform [4, 4] from the ego frame at another time to that of a frame; None if it is not known.

    Between two known poses the vehicle moves with constant speed and turn rates (a screw motion); before the first and
    after the last of them it goes on as between the two nearest.

    Args:
        motion: of the frame, with a time and a pose.
        time_s: seconds.
    """
    if not motion.path or motion.global_from_ego is None or motion.time_s is None:
        return None
    times = [time for time, _ in motion.path] + [motion.time_s]
    poses = [pose for _, pose in motion.path] + [motion.global_from_ego]
    k = int(np.clip(np.searchsorted(times, time_s), 1, len(times) - 1))
    later_from_earlier = invert_rigid(poses[k]) @ poses[k - 1]
    share = (times[k] - time_s) / (times[k] - times[k - 1])
    result: NDArray[np.float64] = (
        invert_rigid(motion.global_from_ego) @ poses[k] @ part_of_motion(later_from_earlier, share)
    )
    return result


def part_of_motion(b_from_a: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """Returns b_from_c, where frame c lies the share of the way back from b to a, on a screw motion.

    It is exp(share * log(b_from_a)) of rigid transforms; the share may be negative or above 1.

    Args:
        b_from_a: [4, 4] rigid.
        share: 0 gives the identity, 1 gives `b_from_a`.
    """
    turn = _rotation_vector(b_from_a[:3, :3])
    rotation, along = _exponential(turn)
    part, part_along = _exponential(share * turn)
    result = np.eye(4)
    result[:3, :3] = part
    result[:3, 3] = part_along @ (share * np.linalg.solve(along, b_from_a[:3, 3]))
    return result


def _rotation_vector(rotation: NDArray[np.float64]) -> NDArray[np.float64]:
    """Axis times angle in 0..pi, [3]."""
    skew = (rotation - rotation.T)[[2, 0, 1], [1, 2, 0]] / 2  # axis times sine
    sin, cos = np.linalg.norm(skew), (np.trace(rotation) - 1) / 2
    angle = np.arctan2(sin, cos)
    if angle < 3.0:
        return np.asarray(skew * (angle / sin if sin > 1e-12 else 1.0))
    outer = (rotation + rotation.T) / 2 - cos * np.eye(3)  # (1 - cos) times the axis times its transpose
    axis = outer[:, np.argmax(np.diag(outer))]
    axis = axis / np.linalg.norm(axis)
    return np.asarray(axis * angle * (1 if axis @ skew >= 0 else -1))


def _exponential(turn: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rotation [3, 3] of a rotation vector, and the matrix [3, 3] from the way along the screw to the translation."""
    angle = float(np.linalg.norm(turn))
    x, y, z = turn
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    half = np.sinc(angle / 2 / np.pi) ** 2 / 2  # (1 - cos) / angle^2
    rest = (1 - np.sinc(angle / np.pi)) / angle**2 if angle > 1e-4 else 1 / 6  # (angle - sin) / angle^3
    square = cross @ cross
    return np.eye(3) + np.sinc(angle / np.pi) * cross + half * square, np.eye(3) + half * cross + rest * square


def _checked_motion(motion: object, global_from_ego: object) -> Motion:
    if not isinstance(motion, Motion):
        raise DataError(
            f"motion is {type(motion).__name__}; give a perception.Motion, such as Motion.from_speed_yaw_rate(...)"
        )
    if global_from_ego is not None:
        raise DataError("step was given global_from_ego and motion, and one of them tells the motion; leave one out")
    return motion


def _slack(seconds: float) -> float:
    """By how much the duration of a motion may differ from that of the times, seconds."""
    return 0.01 + 0.1 * seconds


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
