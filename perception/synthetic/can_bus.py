"""Writes the CAN bus messages of a scene, as `nuscenes.can_bus.can_bus_api` of nuscenes-devkit 1.2.0 reads them.

Format: nuScenes' CAN bus expansion, files `can_bus/<scene>_<message>.json`. All values follow from the trajectory of
the vehicle in closed form, without noise: its mean velocity within 0.05 s of a message, and that of the velocity. The
steering angle is that of a bicycle model, pedals and torque are those that the acceleration takes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from perception.synthetic.district import Trajectory

# Messages per second. nuScenes has about 900 zoesensors messages, which repeat values of slower messages.
RATES = {"ms_imu": 100, "pose": 50, "steeranglefeedback": 100, "vehicle_monitor": 2, "zoesensors": 100,
         "zoe_veh_info": 100}  # fmt: skip
WHEELBASE, TRACK_WIDTH, WHEEL_RADIUS = 2.588, 1.51, 0.305  # metres
STEERING_RATIO = 16.0  # degrees of the steering wheel per degree of the front wheels
GRAVITY = 9.81  # m/s2
_MASS = 1600.0  # kg
_HALF_STEP = 0.05  # seconds before and after a message over which its velocity is the mean
_SLOWEST = 0.5  # m/s, below which the steering angle goes to zero with the yaw rate
_HARDEST = 4.0  # m/s2, of pedals that are pressed to the floor
_STEER_OFFSET = -12.6  # degrees, as that of nuScenes' vehicles
_DIGITS = 6


class Motion(NamedTuple):
    """Motion of the rear axle at K times, in the ego frame: x forward, y left."""

    xy: np.ndarray  # [K, 2] global metres
    yaw: np.ndarray  # [K] radians
    velocity: np.ndarray  # [K, 2] m/s
    acceleration: np.ndarray  # [K, 2] m/s2
    yaw_rate: np.ndarray  # [K] rad/s
    steering: np.ndarray  # [K] rad of the steering wheel, left is positive


def ego_motion(trajectory: Trajectory, seconds: np.ndarray) -> Motion:
    """Returns the motion of a vehicle at times [K] on its trajectory, at least 0.1 s from its ends."""

    def pose(time: np.ndarray) -> np.ndarray:
        columns = (trajectory.xy[:, 0], trajectory.xy[:, 1], trajectory.yaw)
        return np.stack([np.interp(time, trajectory.times, column) for column in columns], axis=1)  # [K, 3]

    now, later, before = (pose(seconds + 2 * _HALF_STEP * k) for k in (0, 1, -1))
    change = (pose(seconds + _HALF_STEP) - pose(seconds - _HALF_STEP)) / (2 * _HALF_STEP)
    bend = (later - 2 * now + before) / (2 * _HALF_STEP) ** 2
    cos, sin = np.cos(now[:, 2]), np.sin(now[:, 2])
    velocity, acceleration = (
        np.stack([cos * v[:, 0] + sin * v[:, 1], cos * v[:, 1] - sin * v[:, 0]], axis=1) for v in (change, bend)
    )
    wheels = np.arctan(WHEELBASE * change[:, 2] / np.maximum(velocity[:, 0], _SLOWEST))
    return Motion(now[:, :2], now[:, 2], velocity, acceleration, change[:, 2], STEERING_RATIO * wheels)


def write_can_bus(folder: Path, scene: str, trajectory: Trajectory, start: float, stop: float, offset_us: int) -> None:
    """Writes all messages of one scene.

    Args:
        folder: `can_bus` of the dataset.
        scene: name of the scene, such as scene-0001.
        trajectory: of the vehicle's rear axle, over seconds of the scene.
        start, stop: seconds of the first and the last keyframe, between which there are messages.
        offset_us: timestamp of second 0, microseconds.
    """
    messages = {}
    for name, rate in RATES.items():
        count = int(round((stop - start) * rate, 6)) + 1
        seconds = start + np.arange(count) / rate
        fields = _FIELDS[name](ego_motion(trajectory, seconds), seconds)
        columns = {key: np.round(value, _DIGITS).tolist() for key, value in fields.items()}
        times = (offset_us + np.round(seconds * 1e6).astype(np.int64)).tolist()
        messages[name] = [
            dict(zip(columns, values, strict=True)) | {"utime": time}
            for time, *values in zip(times, *columns.values(), strict=True)
        ]
    meta = {name: _statistics(rows) for name, rows in messages.items()}
    for name, content in {**messages, "meta": meta, "route": _route(trajectory)}.items():
        (folder / f"{scene}_{name}.json").write_text(json.dumps(content), encoding="utf-8")


def _route(trajectory: Trajectory) -> list[list[float]]:
    """Returns the path of the vehicle, [x, y] about a metre apart, without the time that it stands."""
    points = [trajectory.xy[0]]
    for point in trajectory.xy[1:]:
        if np.linalg.norm(point - points[-1]) >= 1.0:
            points.append(point)
    return np.round([*points, trajectory.xy[-1]], _DIGITS).tolist()


def _statistics(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns number, frequency and extent of messages, and statistics of each value and of its changes."""
    times = np.array([row["utime"] for row in rows])
    span = float(times[-1] - times[0]) * 1e-6
    statistics: dict[str, dict[str, Any]] = {}
    for key in rows[0]:
        values = np.array([row[key] for row in rows], dtype=np.float64)
        changes = np.diff(values, axis=0) if len(values) > 1 else np.zeros_like(values)
        statistics[key] = {
            prefix + name: np.round(getattr(part, name)(axis=0), _DIGITS).tolist()
            for prefix, part in (("", values), ("diff_", changes))
            for name in ("max", "mean", "min", "std")
        }
    frequency = (len(rows) - 1) / span if span else 0.0
    return {"message_count": len(rows), "message_freq": frequency, "timespan": span, "var_stats": statistics}


def _spatial(planar: np.ndarray, up: float = 0.0) -> np.ndarray:
    """Adds a constant z to vectors [K, 2]."""
    return np.concatenate([planar, np.full((len(planar), 1), up)], axis=1)


def _quaternions(yaw: np.ndarray) -> np.ndarray:
    """Returns rotations about z as quaternions [K, 4]: w, x, y, z."""
    zero = np.zeros_like(yaw)
    return np.stack([np.cos(yaw / 2), zero, zero, np.sin(yaw / 2)], axis=1)


def _rates(motion: Motion) -> np.ndarray:
    """Returns angular velocities [K, 3]."""
    zero = np.zeros_like(motion.yaw_rate)
    return np.stack([zero, zero, motion.yaw_rate], axis=1)


def _ms_imu(motion: Motion, seconds: np.ndarray) -> dict[str, np.ndarray]:
    """Values of the inertial unit, which measures gravity too; its frame is the ego frame."""
    specific_force = _spatial(motion.acceleration, GRAVITY)
    return {"linear_accel": specific_force, "q": _quaternions(motion.yaw), "rotation_rate": _rates(motion)}


def _pose(motion: Motion, seconds: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "accel": _spatial(motion.acceleration, GRAVITY),
        "orientation": _quaternions(motion.yaw),
        "pos": _spatial(motion.xy),
        "rotation_rate": _rates(motion),
        "vel": _spatial(motion.velocity),
    }


def _steeranglefeedback(motion: Motion, seconds: np.ndarray) -> dict[str, np.ndarray]:
    return {"value": -motion.steering}  # right is positive in this message


def _pedals(motion: Motion) -> tuple[np.ndarray, np.ndarray]:
    """Returns the shares 0..1 of throttle and brake [K]."""
    share = motion.acceleration[:, 0] / _HARDEST
    return np.clip(share, 0, 1), np.clip(-share, 0, 1)


def _rpm(motion: Motion, side: int, front: bool) -> np.ndarray:
    """Returns the revolutions per minute [K] of a wheel: side +1 left, -1 right."""
    along = motion.velocity[:, 0] - motion.yaw_rate * side * TRACK_WIDTH / 2
    speed = np.hypot(along, motion.yaw_rate * WHEELBASE) if front else along
    return np.asarray(speed / (2 * np.pi * WHEEL_RADIUS) * 60)


def _vehicle_monitor(motion: Motion, seconds: np.ndarray) -> dict[str, np.ndarray]:
    throttle, brake = _pedals(motion)
    constant = np.ones(len(seconds), dtype=np.int64)
    turning = np.degrees(motion.steering) / STEERING_RATIO  # degrees of the front wheels
    return {
        "available_distance": 200 * constant,
        "battery_level": 80 * constant,
        "brake": np.round(126 * brake).astype(np.int64),
        "brake_switch": np.where(brake > 0.01, 2, 1),
        "gear_position": 7 * constant,
        "left_signal": (turning > 5).astype(np.int64),
        "rear_left_rpm": _rpm(motion, 1, False),
        "rear_right_rpm": _rpm(motion, -1, False),
        "right_signal": (turning < -5).astype(np.int64),
        "steering": np.degrees(motion.steering),
        "steering_speed": np.gradient(np.degrees(motion.steering), seconds) if len(seconds) > 1 else 0.0 * seconds,
        "throttle": np.round(1000 * throttle).astype(np.int64),
        "vehicle_speed": 3.6 * motion.velocity[:, 0],
        "yaw_rate": np.degrees(motion.yaw_rate),
    }


def _zoesensors(motion: Motion, seconds: np.ndarray) -> dict[str, np.ndarray]:
    throttle, brake = _pedals(motion)
    return {
        "brake_sensor": 0.375 + 0.036 * brake,
        "steering_sensor": np.degrees(motion.steering),
        "throttle_sensor": np.round(1000 * throttle).astype(np.int64),
    }


def _zoe_veh_info(motion: Motion, seconds: np.ndarray) -> dict[str, np.ndarray]:
    throttle, _ = _pedals(motion)
    degrees = np.degrees(motion.steering)
    torque = _MASS * motion.acceleration[:, 0] * WHEEL_RADIUS
    turn = 2 * np.pi * WHEEL_RADIUS * 100  # centimetres
    # The distance since the first message is that of the mean speeds between messages.
    steps = np.diff(seconds) * (motion.velocity[1:, 0] + motion.velocity[:-1, 0]) / 2
    constant = np.ones(len(seconds), dtype=np.int64)
    return {
        "FL_wheel_speed": _rpm(motion, 1, True),
        "FR_wheel_speed": _rpm(motion, -1, True),
        "RL_wheel_speed": _rpm(motion, 1, False),
        "RR_wheel_speed": _rpm(motion, -1, False),
        "left_solar": 100 * constant,
        "longitudinal_accel": motion.acceleration[:, 0],
        "meanEffTorque": torque,
        "odom": np.floor(100 * np.concatenate([[0.0], np.cumsum(steps)]) % turn * 124 / turn).astype(np.int64),
        "odom_speed": 3.6 * motion.velocity[:, 0],
        "pedal_cc": np.round(1000 * throttle).astype(np.int64),
        "regen": np.round(100 * (throttle == 0)).astype(np.int64),
        "requestedTorqueAfterProc": torque,
        "right_solar": 100 * constant,
        "steer_corrected": degrees,
        "steer_offset_can": _STEER_OFFSET * constant,
        "steer_raw": degrees - _STEER_OFFSET,
        "transversal_accel": motion.acceleration[:, 1] / GRAVITY,
    }


_FIELDS = {
    "ms_imu": _ms_imu,
    "pose": _pose,
    "steeranglefeedback": _steeranglefeedback,
    "vehicle_monitor": _vehicle_monitor,
    "zoesensors": _zoesensors,
    "zoe_veh_info": _zoe_veh_info,
}
