"""Ego motion: limits of speed and turn rate, sizes of motions, and gaps between frames."""

import re

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from perception.errors import DataError
from perception.geometry import invert_rigid, rigid_from_yaw
from perception.inference.ego_motion import EgoMotion, Motion, ego_from_ego_at, jumped, motion_size, part_of_motion


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


# --- Motions from speed and yaw rate, and poses between poses --------------------------------------------------------


def on_circle(time, speed=12.0, yaw_rate=0.3, start=1.0):
    """global_from_ego of a rear axle on a circle, from its centre and radius."""
    angle, radius = start + yaw_rate * time, speed / yaw_rate
    return rigid_from_yaw(angle, (4e5 + radius * np.sin(angle), 5e6 - radius * np.cos(angle), 31.0))


@pytest.mark.parametrize("yaw_rate", [0.3, -1.2, 1e-3, 1e-9, -0.02])
@pytest.mark.parametrize("speed", [12.0, -3.0, 0.0])
def test_motion_from_speed_and_yaw_rate_is_an_arc(speed, yaw_rate):
    motion = Motion.from_speed_yaw_rate(speed, yaw_rate, 0.5)
    # Both ends on a circle around the origin of another frame, whose radius is speed / yaw rate.
    radius, angle = speed / yaw_rate, yaw_rate * 0.5
    x, y = radius * np.sin(angle), 2 * radius * np.sin(angle / 2) ** 2
    assert invert_rigid(motion.ego_from_prev) == pytest.approx(rigid_from_yaw(angle, (x, y, 0)), abs=1e-9)
    if speed == 12.0 and yaw_rate == 0.3:
        expected = invert_rigid(on_circle(0.5)) @ on_circle(0.0)
        assert motion.ego_from_prev == pytest.approx(expected, abs=1e-8)


def test_straight_ahead_and_several_messages():
    straight = Motion.from_speed_yaw_rate(10.0, 0.0, 0.2)
    assert straight.ego_from_prev == pytest.approx(rigid_from_yaw(0.0, (-2.0, 0, 0)), abs=1e-12)
    parts = [Motion.from_speed_yaw_rate(12.0, 0.3, 0.02) for _ in range(25)]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.then(part)
    assert whole.seconds == pytest.approx(0.5)
    assert whole.ego_from_prev == pytest.approx(Motion.from_speed_yaw_rate(12.0, 0.3, 0.5).ego_from_prev, abs=1e-9)


def test_motions_integrate_to_poses():
    by_pose, by_motion = EgoMotion(), EgoMotion()
    for k in range(6):
        one = by_pose.since_last(on_circle(0.1 * k), 100 + 0.1 * k)
        other = by_motion.since_last(None, None, Motion.from_speed_yaw_rate(12.0, 0.3, 0.1))
        assert other.is_first is one.is_first is (k == 0)
        assert other.ego_from_prev == pytest.approx(one.ego_from_prev, abs=1e-8)
        assert other.seconds == pytest.approx(one.seconds) and other.time_s == pytest.approx(0.1 * (k + 1))
        by_pose.keep(one)
        by_motion.keep(other)
    # Where poses fail for a while, motions go on from the last one.
    bridged = by_pose.since_last(None, 100.6, Motion.from_speed_yaw_rate(12.0, 0.3, 0.1))
    assert bridged.global_from_ego == pytest.approx(on_circle(0.6), abs=1e-6) and not bridged.is_first


def test_what_a_motion_cannot_be():
    for arguments, message in (
        ((np.nan, 0, 1), "speed_mps is nan; give a finite number of m/s"),
        ((1, "left", 1), "yaw_rate_radps is str; give a finite number of rad/s"),
        ((1, 0, 0), "seconds of a motion is 0; give the time that it took, above 0"),
    ):
        with pytest.raises(DataError, match=message):
            Motion.from_speed_yaw_rate(*arguments)
    with pytest.raises(DataError, match="ego_from_prev is not a rigid transform"):
        Motion(np.zeros((4, 4)), 0.1)
    ego_motion, motion = EgoMotion(), Motion.from_speed_yaw_rate(1.0, 0.0, 0.1)
    with pytest.raises(DataError, match=r"motion is float; give a perception\.Motion"):
        ego_motion.since_last(None, None, 3.0)
    with pytest.raises(DataError, match="global_from_ego and motion, and one of them"):
        ego_motion.since_last(np.eye(4), 0.0, motion)
    ego_motion.keep(ego_motion.since_last(None, 5.0, motion))
    with pytest.raises(
        DataError, match=r"the motion took 0\.1 s, but time_s is 0\.4 s after the last step; .*then\(\)"
    ):
        ego_motion.since_last(None, 5.4, motion)
    fast = ego_motion.since_last(None, 5.1, Motion.from_speed_yaw_rate(90.0, 0.0, 0.1))
    assert fast.is_first and "max_speed is 60 m/s" in fast.warning and fast.first_because == "the pose has jumped"
    slow = ego_motion.since_last(None, None, Motion.from_speed_yaw_rate(1.0, 0.0, 2.5))
    assert slow.is_first and slow.first_because == "the last frame was 2.5 s before"


def test_frames_without_a_pose_or_a_time_stand_for_themselves():
    ego_motion = EgoMotion()
    for pose, time, reason in (
        (None, 1.0, "no pose was given"),
        (None, None, "no pose was given"),
        (np.eye(4), None, "no time was given"),
        (np.eye(4), 2.0, "the last frame had no pose and time"),
    ):
        motion = ego_motion.since_last(pose, time)
        assert motion.is_first and motion.first_because == reason and not motion.warning
        ego_motion.keep(motion)
    after = ego_motion.since_last(np.eye(4), 2.5)
    assert not after.is_first and after.first_because == ""
    # A motion since a frame without a pose is known.
    ego_motion.keep(ego_motion.since_last(None, 3.0))
    assert not ego_motion.since_last(None, None, Motion.from_speed_yaw_rate(3.0, 0.0, 0.1)).is_first


def test_parts_of_motions_equal_those_of_scipy():
    """exp(share log T): turns of Rotation, and halves that give the whole."""
    rng = np.random.default_rng(5)
    for angle in (0.0, 1e-9, 1e-5, 0.3, 2.0, 3.1, np.pi - 1e-9, np.pi):
        motion = np.eye(4)
        axis = rng.normal(size=3)
        turn = angle * axis / np.linalg.norm(axis)
        motion[:3, :3], motion[:3, 3] = Rotation.from_rotvec(turn).as_matrix(), rng.normal(size=3) * 20
        half, third = part_of_motion(motion, 0.5), part_of_motion(motion, 1 / 3)
        assert half @ half == pytest.approx(motion, abs=1e-6)
        assert third @ third @ third == pytest.approx(motion, abs=1e-6)
        assert part_of_motion(motion, -1.0) @ motion == pytest.approx(np.eye(4), abs=1e-6)
        if angle < 3.1:
            assert half[:3, :3] == pytest.approx(Rotation.from_rotvec(turn / 2).as_matrix(), abs=1e-9)


def test_poses_between_and_beyond_the_given_ones():
    ego_motion = EgoMotion()
    first = ego_motion.since_last(on_circle(0.0), 100.0)
    assert ego_from_ego_at(first, 99.9) is None
    ego_motion.keep(first)
    for time in (0.5, 0.8, 1.0):
        ego_motion.keep(ego_motion.since_last(on_circle(time), 100.0 + time))
    motion = ego_motion.since_last(on_circle(1.2), 101.2)
    for time in (1.25, 1.2, 1.15, 0.9, 0.6, 0.1):  # after, now, in the last step and in earlier ones
        expected = invert_rigid(on_circle(1.2)) @ on_circle(time)
        assert ego_from_ego_at(motion, 100.0 + time) == pytest.approx(expected, abs=1e-6)
    # The first frame with a motion knows it too.
    moving = EgoMotion().since_last(None, 7.0, Motion.from_speed_yaw_rate(12.0, 0.3, 0.1))
    expected = invert_rigid(on_circle(7.0)) @ on_circle(6.96)
    assert ego_from_ego_at(moving, 6.96) == pytest.approx(expected, abs=1e-7)
