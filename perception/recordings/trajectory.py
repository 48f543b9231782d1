"""Poses of the vehicle over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perception.errors import DataError
from perception.geometry import invert_rigid, rigid_from_quaternion
from perception.inference.ego_motion import MAX_GAP, part_of_motion
from perception.reading import read_bytes, short

BEYOND_NS = 100_000_000  # how far beyond the first and the last pose the motion is continued
MAX_GAP_NS = round(MAX_GAP * 1e9)  # between two poses; nothing is interpolated across a longer gap


class Trajectory:
    """Poses of the vehicle over time, in one frame that stays the same.

    Args:
        times_ns: [K] int64 nanoseconds in any order. Of several poses with one time the last counts.
        global_from_ego: [K, 4, 4] float64 metres.
        source: where the poses come from, for messages.

    Raises:
        DataError: there is no pose.
    """

    def __init__(self, times_ns: NDArray[np.int64], global_from_ego: NDArray[np.float64], source: str) -> None:
        if not len(times_ns):
            raise DataError(f"{source} holds no poses; give one that does, or none")
        backwards, first = np.unique(times_ns[::-1], return_index=True)
        self.times_ns = backwards
        self.global_from_ego = global_from_ego[::-1][first]
        self.source = source

    def __len__(self) -> int:
        return len(self.times_ns)

    def at(self, time_ns: int) -> NDArray[np.float64] | None:
        """Returns the pose at a time, interpolated between the two poses around it.

        The vehicle moves with constant speed and turn rates, as in `ego_from_ego_at`. Up to 0.1 s before the first pose
        and after the last one, the motion there is continued.

        Args:
            time_ns: nanoseconds.

        Returns:
            global_from_ego [4, 4], or None if the time is farther away or in a gap of more than 2 s.
        """
        times = self.times_ns
        after = int(np.searchsorted(times, time_ns))
        if after < len(times) and times[after] == time_ns:
            return self.global_from_ego[after].copy()
        if not times[0] - BEYOND_NS <= time_ns <= times[-1] + BEYOND_NS or len(times) == 1:
            return None
        after = min(max(after, 1), len(times) - 1)
        low, high = int(times[after - 1]), int(times[after])
        if high - low > MAX_GAP_NS:
            return None
        earlier, later = self.global_from_ego[after - 1], self.global_from_ego[after]
        back = (high - time_ns) / (high - low)
        pose: NDArray[np.float64] = later @ part_of_motion(invert_rigid(later) @ earlier, back)
        return pose


def read_trajectory(path: Path) -> Trajectory:
    """Reads a trajectory file as TUM and evo have it: lines of `time x y z qx qy qz qw`.

    Times are seconds, positions metres; lines that begin with # are comments. The pose is that of the ego frame in any
    frame that stays the same.

    Raises:
        DataError: the file is missing, a line has other than eight numbers, or a quaternion is not of length 1.
    """
    kind = "a trajectory file with lines of `time x y z qx qy qz qw`"
    try:
        text = read_bytes(path, kind).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text file ({error.reason}); give {kind}") from None
    times, poses = [], []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"{path}: line {number}"
        try:
            values = [float(word) for word in words]
        except ValueError:
            values = []
        if len(values) != 8 or not np.isfinite(values).all() or abs(values[0]) > 9e9:
            raise DataError(f"{where} is {short(line.strip())}; give time in seconds, x y z and qx qy qz qw")
        times.append(nanoseconds(words[0]))
        poses.append(pose_from(values[1:4], [values[7], *values[4:7]], where))
    return Trajectory(np.array(times, np.int64), np.array(poses).reshape(-1, 4, 4), str(path))


def pose_from(translation: Any, quaternion_wxyz: Any, where: str) -> NDArray[np.float64]:
    """Returns a pose [4, 4] from a position and a quaternion.

    Raises:
        DataError: a number is not finite, or the quaternion is not of length 1; `where` names the place.
    """
    norm = float(np.linalg.norm(quaternion_wxyz))
    if not np.isfinite([*translation, norm]).all() or abs(norm - 1) > 1e-2 or np.abs(translation).max() > 1e8:
        raise DataError(
            f"{where}: position {short(list(map(float, translation)))} and quaternion (w x y z) "
            f"{short(list(map(float, quaternion_wxyz)))} are no pose; give metres and a quaternion of length 1"
        )
    return np.asarray(rigid_from_quaternion(np.asarray(quaternion_wxyz) / norm, translation), dtype=np.float64)


def nanoseconds(text: str) -> int:
    """Converts a text of decimal seconds, such as "1532402927.612460", to nanoseconds without rounding.

    Raises:
        ValueError: it is no number.
    """
    from decimal import Decimal, InvalidOperation

    try:
        return int((Decimal(text) * 1_000_000_000).to_integral_value())
    except (InvalidOperation, ValueError, OverflowError):
        raise ValueError(f"{text!r} is no number of seconds") from None
