"""Geometry compared with closed forms by hand."""

import numpy as np
import pytest
import torch
from pyquaternion import Quaternion

from perception.errors import DataError
from perception.evaluation.detection import submission_from_predictions
from perception.geometry import (
    box_corners,
    invert_rigid,
    is_rigid,
    polyline_length,
    project_points,
    resample_polyline,
    rigid_from_quaternion,
    rigid_from_yaw,
    transform_points,
    wrap_angle,
    yaw_from_rotation,
)
from perception.inference.checks import checked_pose, checked_rig, checked_rigid
from perception.inference.ego_motion import EgoMotion
from perception.models.decoding import empty_boxes, empty_lines
from perception.types import Boxes, CameraRig, FrameObjects, map_tensors


def test_quarter_turn_rotates_x_to_y_and_then_moves():
    transform = rigid_from_yaw(np.pi / 2, (10, 20, 30))
    np.testing.assert_allclose(transform_points(transform, np.array([[1.0, 0, 0]])), [[10, 21, 30]], atol=1e-12)
    np.testing.assert_allclose(yaw_from_rotation(transform), np.pi / 2)
    assert rigid_from_yaw(0.3)[:3, 3].tolist() == [0, 0, 0]


def test_inverse_of_numpy_and_torch_batches():
    rng = np.random.default_rng(0)
    transforms = np.stack([rigid_from_quaternion(rng.normal(size=4), rng.normal(size=3)) for _ in range(5)])
    np.testing.assert_allclose(invert_rigid(transforms) @ transforms, np.broadcast_to(np.eye(4), (5, 4, 4)), atol=1e-12)
    points = rng.normal(size=(5, 7, 3))
    there = transform_points(torch.from_numpy(transforms), torch.from_numpy(points))
    back = transform_points(invert_rigid(torch.from_numpy(transforms)), there)
    np.testing.assert_allclose(back.numpy(), points, atol=1e-12)


def test_quaternions_agree_with_pyquaternion():
    rng = np.random.default_rng(1)
    for _ in range(10):
        q = rng.normal(size=4)
        expected = Quaternion(q).normalised.rotation_matrix
        np.testing.assert_allclose(rigid_from_quaternion(q, (0, 0, 0))[:3, :3], expected, atol=1e-12)


def test_projection_of_a_point_by_hand():
    # 2 m right, 1 m down, 4 m ahead; focal 100 px, middle (50, 40): u = 50 + 100 * 2 / 4, v = 40 + 100 * 1 / 4
    img_from_cam = np.array([[100.0, 0, 50], [0, 100, 40], [0, 0, 1]])
    uv, depth = project_points(img_from_cam, np.array([[2.0, 1, 4], [2.0, 1, -4]]))
    np.testing.assert_allclose(uv[0], [100, 65])
    np.testing.assert_allclose(depth, [4, -4])
    assert np.isfinite(uv).all()


def test_depths_below_the_least_are_clamped():
    """The depth divides the homogeneous coordinate, here 100 * 2 + 50 * depth; depths below `min_depth` do not."""
    img_from_cam = np.array([[100.0, 0, 50], [0, 100, 40], [0, 0, 1]])
    points = np.array([[2.0, 0, 4], [2.0, 0, 0.5], [2.0, 0, 0.05], [2.0, 0, 0], [2.0, 0, -4]])
    for min_depth in (0.1, 1.0):
        for library in (np.asarray, torch.from_numpy):
            uv, depth = project_points(library(img_from_cam), library(points), min_depth)
            expected = (200 + 50 * points[:, 2]) / np.maximum(points[:, 2], min_depth)
            np.testing.assert_allclose(np.asarray(uv)[:, 0], expected)
            np.testing.assert_allclose(np.asarray(depth), points[:, 2])
    assert project_points(img_from_cam, points)[0][3, 0] == pytest.approx(200 / 0.1)  # 0.1 m by default


def test_box_corners_of_a_rotated_box():
    corners = box_corners(np.array([1.0, 2, 3]), np.array([4.0, 2, 6]), np.array(np.pi / 2))
    # rotated by 90 degrees, front-left (2, 1) becomes (-1, 2)
    np.testing.assert_allclose(corners[0], [1 - 1, 2 + 2, 3 - 3], atol=1e-12)
    np.testing.assert_allclose(corners[4], [0, 4, 6], atol=1e-12)
    np.testing.assert_allclose(corners.mean(0), [1, 2, 3], atol=1e-12)


@pytest.mark.parametrize("angle, wrapped", [(0.0, 0.0), (np.pi, -np.pi), (-np.pi, -np.pi), (7.0, 7.0 - 2 * np.pi)])
def test_wrap_angle(angle, wrapped):
    assert wrap_angle(angle) == pytest.approx(wrapped)


def test_resampling_is_by_arc_length():
    corner = np.array([[0.0, 0], [3, 0], [3, 1]])
    assert polyline_length(corner) == pytest.approx(4)
    np.testing.assert_allclose(resample_polyline(corner, 5), [[0, 0], [1, 0], [2, 0], [3, 0], [3, 1]])
    # repeated vertices and a line of length zero
    np.testing.assert_allclose(resample_polyline(corner[[0, 0, 1, 1, 2]], 5), resample_polyline(corner, 5))
    np.testing.assert_allclose(resample_polyline(np.array([[1.0, 2], [1, 2]]), 3), [[1, 2]] * 3)


def test_rigid():
    pose = rigid_from_yaw(0.3, (1e7, -5.0, 2.0))
    assert is_rigid(pose) and is_rigid(pose.astype(np.float32).astype(np.float64))
    for row, column, value in ((0, 0, np.nan), (0, 3, np.inf), (3, 0, 1e-9), (0, 0, 1e300), (2, 2, 1.01), (2, 2, -1.0)):
        wrong = pose.copy()
        wrong[row, column] = value
        assert not is_rigid(wrong), (row, column, value)
    assert not is_rigid(pose[:3])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_reflections_are_no_rotations(axis):
    """A reflection is orthogonal and of unit length; everything that takes a rotation refuses it."""
    pose = rigid_from_yaw(0.3, (1.0, -0.5, 2.0))
    pose[:3, axis] *= -1
    assert np.allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3)) and not is_rigid(pose)
    assert not is_rigid(np.diag([-1.0, -1, -1, 1])) and not is_rigid(np.eye(4)[[1, 0, 2, 3]])
    rig = CameraRig(torch.tensor([[[100.0, 0, 50], [0, 100, 40], [0, 0, 1]]]), pose[None], torch.tensor([True]))
    nothing = map_tensors(lambda tensor: tensor[0], FrameObjects(empty_boxes(1, "cpu"), empty_lines(1, "cpu")))
    for use in (
        lambda: checked_pose(pose),
        lambda: checked_rigid("ego_from_cam", pose),
        lambda: checked_rig(rig, 1),
        lambda: EgoMotion().since_last(pose, 0.0),
        lambda: submission_from_predictions({"a": nothing}, {"a": pose}),
    ):
        with pytest.raises(DataError, match="rigid"):
            use()


@pytest.mark.parametrize(("stretch", "rigid"), [(1 + 4.9e-4, True), (1 + 5.1e-4, False)])
def test_live_use_and_evaluation_accept_the_same_poses(stretch, rigid):
    """A rotation that is stored with few digits: its product with its transpose is off by twice the stretch."""
    pose = rigid_from_yaw(0.3, (10.0, -5.0, 2.0))
    pose[:3, :3] *= stretch
    nothing = map_tensors(lambda tensor: tensor[0], FrameObjects(empty_boxes(1, "cpu"), empty_lines(1, "cpu")))
    boxes = Boxes(*(torch.zeros(1, *field.shape[1:], dtype=field.dtype) for field in nothing.boxes))
    boxes = boxes._replace(size=torch.ones(1, 3), valid=torch.ones(1, dtype=torch.bool), attribute=boxes.label - 1)
    scenes = {"a": nothing._replace(boxes=boxes)}
    for use in (lambda: checked_pose(pose), lambda: submission_from_predictions(scenes, {"a": pose})):
        if rigid:
            use()
        else:
            with pytest.raises(DataError, match="rigid"):
                use()
