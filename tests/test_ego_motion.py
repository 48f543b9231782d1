"""Ego motion: limits of speed and turn rate, sizes of motions, and gaps between frames."""

import re

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from perception.errors import DataError
from perception.geometry import rigid_from_yaw
from perception.inference.ego_motion import EgoMotion, jumped, motion_size


def test_limits_of_speed_and_turn_rate():
    def pair(motion, seconds, **limits):
        ego_motion = EgoMotion(**limits)
        ego_motion.keep(ego_motion.since_last(rigid_from_yaw(1.0, (3e5, 5e6, 30)), 100.0))
        return ego_motion.since_last(rigid_from_yaw(1.0, (3e5, 5e6, 30)) @ motion, 100.0 + seconds)

    for seconds in (0.02, 0.1, 0.5, 1.9):
        for share, jumps in ((0.99, False), (1.01, True)):
            far = rigid_from_yaw(0.0, np.array([0.6, 0, 0.8]) * share * (60 * seconds + 1))
            assert pair(far, seconds).is_first is jumps
            angle = share * (2 * seconds + 0.1)
            if angle < np.pi:
                around = np.eye(4)
                around[:3, :3] = Rotation.from_rotvec(angle * np.array([0, 0.6, 0.8])).as_matrix()
                assert pair(around, seconds).is_first is jumps
    slow = rigid_from_yaw(0.0, (5.0, 0, 0))
    assert not pair(slow, 0.5).is_first and pair(slow, 0.5, max_speed=4).is_first
    motion = pair(slow, 0.5)
    assert motion.ego_from_prev == pytest.approx(rigid_from_yaw(0.0, (-5.0, 0, 0)), abs=1e-9) and motion.seconds == 0.5
    # GPS noise of decimetres is a high speed over milliseconds, and no jump.
    assert not pair(rigid_from_yaw(0.02, (0.6, 0.5, 0)), 0.001).is_first


def test_times_must_increase():
    ego_motion = EgoMotion()
    ego_motion.keep(ego_motion.since_last(np.eye(4), 7.0))
    for time in (7.0, 6.9):
        with pytest.raises(DataError, match=r"but the last step was at 7\.000000: give frames in order"):
            ego_motion.since_last(np.eye(4), time)
    assert ego_motion.since_last(np.eye(4), np.nextafter(7.0, 8)).seconds > 0
    ego_motion.reset()
    assert ego_motion.since_last(np.eye(4), 7.0).is_first


def test_a_motion_at_the_limit_is_no_jump():
    at_limit = rigid_from_yaw(0.0, (3.0, 0, 0))  # 4 m/s for half a second, and the margin of 1 m
    assert not jumped(at_limit, 0.5, max_speed=4) and jumped(at_limit, 0.5, max_speed=3.99)
    assert not jumped(at_limit, 0.25, max_speed=8) and jumped(at_limit, 0.25, max_speed=7.99)
    _, angle = motion_size(rigid_from_yaw(0.5))
    assert not jumped(rigid_from_yaw(0.5), 1.0, max_turn_rate=float(angle) - 0.1)
    assert jumped(rigid_from_yaw(0.5), 1.0, max_turn_rate=0.399)


def test_motion_size_equals_that_of_scipy():
    rng = np.random.default_rng(0)
    rotations = Rotation.from_rotvec(rng.normal(size=(50, 3)) * rng.choice([1e-6, 0.1, 1, 3], size=(50, 1)))
    motions = np.tile(np.eye(4), (50, 1, 1))
    motions[:, :3, :3], motions[:, :3, 3] = rotations.as_matrix(), rng.normal(size=(50, 3)) * 100
    distance, angle = motion_size(motions)
    assert angle == pytest.approx(rotations.magnitude(), abs=1e-9)
    assert distance == pytest.approx(np.sqrt((motions[:, :3, 3] ** 2).sum(1)))
    assert jumped(motions, np.full(50, 0.1)).tolist() == ((distance > 7) | (rotations.magnitude() > 0.3)).tolist()


@pytest.mark.parametrize(
    ("step", "advice"),
    [(10.5, "milliseconds, so divide time_s by 1e3"), (990.0, "milliseconds"), (1.05e4, "microseconds, so .*1e6"),
     (9.9e5, "microseconds"), (1.05e7, "nanoseconds, so .*1e9"), (9.9, "give frames more often"),
     (1010.0, "give frames more often")],
)  # fmt: skip
def test_three_gaps_in_a_row_name_the_likely_unit(step, advice):
    ego_motion = EgoMotion()

    def warning_at(time) -> str:
        motion = ego_motion.since_last(np.eye(4), time)
        ego_motion.keep(motion)
        return motion.warning

    assert not any(warning_at(k * step) for k in range(3))
    assert re.search(rf"the last of them {re.escape(f'{step:g}')} s after it, .*{advice}", warning_at(3 * step))
    assert not warning_at(4 * step)  # once
    # Single gaps in a sequence give no warning.
    assert not any(map(warning_at, (4 * step + 0.5, 5 * step, 6 * step, 6 * step + 0.5, 7 * step)))
