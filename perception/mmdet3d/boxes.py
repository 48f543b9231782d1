"""Converts boxes between the ego frame and mmdet3d's `LiDARInstance3DBoxes` and `CameraInstance3DBoxes`.

A box of the library is upright in the ego frame. One of mmdet3d is upright in the frame of its sensor, which is tilted
by a degree or two. Heading and velocity are therefore vectors in the plane of one frame, and their projections onto the
plane of the other count: that is how mmdet3d's `NuScenesMetric` turns boxes into the global frame, and there and back
again gives the same box. Centres are exact.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from mmdet3d.structures import BaseInstance3DBoxes, CameraInstance3DBoxes, LiDARInstance3DBoxes
from torch import Tensor

from perception.geometry import invert_rigid, transform_points
from perception.types import Boxes, map_tensors

SensorBoxes = TypeVar("SensorBoxes", LiDARInstance3DBoxes, CameraInstance3DBoxes)


class _Form(NamedTuple):
    """How a class of mmdet3d writes boxes.

    Args:
        axes: the two axes of the sensor that span the plane of the headings.
        turn: 1 if the yaw turns from the first of them to the second, -1 if it turns the other way.
        size: order of the sides, as indices into length, width, height; the same order leads back.
    """

    axes: tuple[int, int]
    turn: int
    size: tuple[int, int, int]


_FORMS: dict[type, _Form] = {
    LiDARInstance3DBoxes: _Form((0, 1), 1, (0, 1, 2)),  # x, y; length, width, height
    CameraInstance3DBoxes: _Form((0, 2), -1, (0, 2, 1)),  # x right, z forward; length, height, width
}


def _form_of(kind: type) -> _Form:
    return next(form for known, form in _FORMS.items() if issubclass(kind, known))


def _plane(form: _Form, ego_from_sensor: Tensor) -> Tensor:
    """Returns the matrix [2, 2] from vectors in the sensor's plane to those along ego x and y."""
    return ego_from_sensor[:2, list(form.axes)].double()


def sensor_boxes(boxes: Boxes, ego_from_sensor: Tensor, kind: type[SensorBoxes]) -> SensorBoxes:
    """Converts boxes of the ego frame to those of a sensor, with velocities along two axes of the sensor.

    Args:
        boxes: [M], all of them are taken.
        ego_from_sensor: [4, 4] pose of the LiDAR or of a camera.
        kind: `LiDARInstance3DBoxes` or `CameraInstance3DBoxes`.
    """
    form = _form_of(kind)
    pose = ego_from_sensor.double().to(boxes.center.device)
    sensor_from_plane = torch.linalg.inv(_plane(form, pose))
    yaw = boxes.yaw.double()
    heading = torch.stack([yaw.cos(), yaw.sin()], -1) @ sensor_from_plane.T  # [M, 2]
    box = torch.cat(
        [
            transform_points(invert_rigid(pose), boxes.center.double()),
            boxes.size.double()[:, list(form.size)],
            torch.atan2(form.turn * heading[:, 1], heading[:, 0])[:, None],
            boxes.velocity.double() @ sensor_from_plane.T,
        ],
        dim=1,
    )  # [M, 9]
    return kind(box.float(), box_dim=9, origin=(0.5, 0.5, 0.5))


def ego_boxes(boxes: BaseInstance3DBoxes, label: Tensor, ego_from_sensor: Tensor, score: Tensor | None = None) -> Boxes:
    """Converts boxes of a sensor to the ego frame.

    Args:
        boxes: M `LiDARInstance3DBoxes` or `CameraInstance3DBoxes`, with two velocities or without.
        label: [M] index into BOX_CLASSES; mmdet3d gives -1 to other classes, which are not valid.
        ego_from_sensor: [4, 4] pose of the LiDAR or of the camera.
        score: [M], 1 by default.

    Returns:
        Boxes [M] in float32; the velocity is NaN where there is none, the attribute -1.
    """
    form = _form_of(type(boxes))
    pose = ego_from_sensor.double().to(boxes.tensor.device)
    plane = _plane(form, pose)
    yaw = boxes.yaw.double()
    heading = torch.stack([yaw.cos(), form.turn * yaw.sin()], -1) @ plane.T  # [M, 2]
    velocity = boxes.tensor[:, 7:9].double() @ plane.T if boxes.box_dim >= 9 else torch.full_like(heading, torch.nan)
    converted = Boxes(
        center=transform_points(pose, boxes.gravity_center.double()),
        size=boxes.dims.double()[:, list(form.size)],
        yaw=torch.atan2(heading[:, 1], heading[:, 0]),
        velocity=velocity,
        label=label.long(),
        attribute=torch.full_like(label, -1).long(),
        score=torch.ones_like(yaw) if score is None else score.double(),
        valid=label >= 0,
        uncertainty=yaw.new_zeros(len(yaw), 9),
    )
    return map_tensors(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, converted)
