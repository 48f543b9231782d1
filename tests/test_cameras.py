"""Pixel rays, visibility and the choice of cameras, by hand."""

import math

import pytest
import torch

from perception.cameras import choose_cameras, pixel_rays, see_points
from perception.types import CameraRig

SIZE = 60, 100  # height and width of the images
# Columns are the camera's right, down and forward axes in the ego frame: one looks ahead, one to the left.
AHEAD = [[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]]
LEFT = [[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]


def rig(*rotations, skew=0.0, height=1.5):
    """Cameras of 50 and 40 px focal length at the origin of the ego frame, at the same height."""
    count = len(rotations)
    img_from_cam = torch.tensor([[50.0, skew, 48], [0, 40, 33], [0, 0, 1]]).repeat(1, count, 1, 1)
    ego_from_cam = torch.eye(4).repeat(1, count, 1, 1)
    ego_from_cam[0, :, :3, :3] = torch.tensor(rotations)
    ego_from_cam[0, :, 2, 3] = height
    return CameraRig(img_from_cam, ego_from_cam, torch.ones(1, count, dtype=torch.bool))


@pytest.mark.parametrize("skew", [0.0, 4.0])
def test_rays_of_a_feature_map_project_to_the_centres_of_its_pixels(skew):
    h, w = 3, 4
    cameras = rig(AHEAD, LEFT, skew=skew)
    rays = pixel_rays(cameras, SIZE, (h, w))
    assert rays.cam.shape == rays.ego.shape == (1, 2, 12, 3)
    assert (rays.cam[..., 2] == 1).all()
    seen = cameras.img_from_cam[:, :, None] @ rays.cam[..., None]
    for pixel in range(12):
        expected = [(pixel % w + 0.5) * 25, (pixel // w + 0.5) * 20, 1]
        assert seen[0, 0, pixel, :, 0].tolist() == pytest.approx(expected, abs=1e-4)
    # The camera that looks left has its depth along y; up in the ego frame is up in the image.
    x, y, z = rays.cam[0, 1].unbind(-1)
    torch.testing.assert_close(rays.ego[0, 1], torch.stack([x, z, -y], -1))
    assert rays.pixel_width[0].tolist() == pytest.approx([25 / 50] * 2)  # a pixel of the map is 25 pixels of the image


def test_a_point_is_seen_in_front_of_a_present_camera_and_inside_its_image():
    cameras = rig(AHEAD, AHEAD)
    cameras = cameras._replace(present=torch.tensor([[True, False]]))
    points = {
        (10.0, 1.0, 2.5): (48 - 5, 33 - 4, True),  # 10 m ahead, 1 m left, 1 m above the camera
        (-10.0, 1.0, 2.5): None,
        (10.0, 9.5, 1.5): (0.5, 33, True),
        (10.0, 9.7, 1.5): (-0.5, 33, False),
        (10.0, -10.3, 1.5): (99.5, 33, True),
        (10.0, -10.5, 1.5): (100.5, 33, False),
        (10.0, 0.0, 1.5 + 8.1): (48, 0.6, True),
        (10.0, 0.0, 1.5 + 8.4): (48, -0.6, False),
        (10.0, 0.0, 1.5 - 6.6): (48, 59.4, True),
        (10.0, 0.0, 1.5 - 6.9): (48, 60.6, False),
        (0.11, 0.0, 1.5): (48, 33, True),
        (0.1, 0.0, 1.5): (48, 33, False),  # nearer than the minimal depth
        (0.05, 0.01, 1.5): ((48 * 0.05 - 50 * 0.01) / 0.1, 33 * 0.05 / 0.1, False),  # divided by the minimal depth
    }
    uv, depth, seen = see_points(cameras, torch.tensor(list(points)), SIZE)
    assert depth[0, 0].tolist() == pytest.approx([point[0] for point in points])
    assert not seen[0, 1].any()
    for p, expected in enumerate(points.values()):
        if expected is None:
            assert not seen[0, 0, p]
            continue
        u, v, visible = expected
        assert uv[0, 0, p].tolist() == pytest.approx([u / 100, v / 60], abs=1e-5)
        assert bool(seen[0, 0, p]) == visible, (u, v)


def test_groups_get_the_cameras_that_see_most_of_their_points_and_then_the_most_central():
    turned = math.radians(30)  # to the left, so that its image overlaps with the one ahead
    half_left = [[math.sin(turned), 0, math.cos(turned)], [-math.cos(turned), 0, math.sin(turned)], [0.0, -1, 0]]
    cameras = rig(AHEAD, half_left, LEFT)
    groups = torch.tensor(
        [
            [[10.0, 0, 1.5], [10.0, -9, 1.5]],  # the first camera sees both, the second only one
            [[10.0, 5.0, 1.5], [10.0, 5.2, 1.5]],  # both see both: 26.6 degrees are more central in the second
            [[10.0, 1.0, 1.5], [10.0, 1.2, 1.5]],  # and 6 degrees in the first
            [[0.0, 10, 1.5], [1.0, 10, 1.5]],  # the third; of the others none sees a point
        ]
    )
    uv, depth, seen, camera = choose_cameras(cameras, groups, SIZE, 2)
    assert uv.shape == (1, 4, 2, 2, 2) and depth.shape == seen.shape == camera.shape == (1, 4, 2, 2)
    assert (camera[0, :, 0] == camera[0, :, 1]).all()  # one choice for all points of a group
    assert camera[0, :3, 0].tolist() == [[0, 1], [1, 0], [0, 1]]
    assert camera[0, 3, 0, 0] == 2
    assert seen[0].tolist() == [
        [[True, True], [True, False]], [[True, True]] * 2, [[True, True]] * 2, [[True, False]] * 2,
    ]  # fmt: skip
    assert depth[0, 0, :, 0].tolist() == pytest.approx([10, 10])
    all_uv, all_depth, _ = see_points(cameras, groups.flatten(0, 1), SIZE)
    for q in range(4):
        for g in range(2):
            for k, n in enumerate(camera[0, q, g].tolist()):
                assert torch.equal(uv[0, q, g, k], all_uv[0, n, 2 * q + g])
                assert depth[0, q, g, k] == all_depth[0, n, 2 * q + g]
    assert choose_cameras(cameras, groups, SIZE, 5)[3].shape[-1] == 3  # no more than there are
