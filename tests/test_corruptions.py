"""Camera faults against closed forms."""

import numpy as np
import pytest
import torch

from perception.cameras import usual_mounting
from perception.data.corruptions import (
    CORRUPTIONS,
    FOG_COLOR,
    PHOTONS,
    SEVERITIES,
    as_first_frame,
    corrupt_camera,
    corrupt_images,
    drop_camera,
    droppable_cameras,
    perturb_extrinsics,
    rotate_extrinsics,
    yaw_extrinsics,
)
from perception.errors import ConfigError
from perception.geometry import invert_rigid, rigid_from_quaternion, rigid_from_yaw, transform_points
from perception.types import CameraRig, Frame, map_tensors

T, N, H, W = 2, 3, 48, 200


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture
def frame() -> Frame:
    """Frames with noise for images and cameras 1.5 m above ground that look ahead, left and back."""
    images = torch.from_numpy(rng(5).integers(0, 256, (T, N, 3, H, W), dtype=np.uint8))
    ahead = rigid_from_quaternion([0.5, -0.5, 0.5, -0.5], [1.7, 0.1, 1.5])  # x right, y down, z forward
    poses = [torch.from_numpy(rigid_from_yaw(yaw) @ ahead) for yaw in (0.0, np.pi / 2, np.pi)]
    img_from_cam = torch.tensor([[100.0, 0.0, W / 2], [0.0, 100.0, H / 2], [0.0, 0.0, 1.0]])
    rig = CameraRig(
        img_from_cam=img_from_cam.expand(T, N, 3, 3),
        ego_from_cam=torch.stack(poses).float().expand(T, N, 4, 4),
        present=torch.ones(T, N, dtype=torch.bool),
    )
    motion = torch.from_numpy(rigid_from_yaw(0.1, (3.0, 0.0, 0.0))).float().expand(T, 4, 4)
    return Frame(images, rig, motion, torch.full((T,), 0.5), torch.zeros(T, dtype=torch.bool), *usual_mounting(T, N))


def test_a_missing_camera_is_not_present_and_the_others_stay(frame):
    before = map_tensors(torch.clone, frame)
    without = drop_camera(frame, 1)
    assert without.rig.present.tolist() == [[True, False, True]] * T
    assert (without.images[:, 1] == 0).all() and torch.equal(without.images[:, [0, 2]], frame.images[:, [0, 2]])
    assert torch.equal(without.rig.ego_from_cam, frame.rig.ego_from_cam)
    # A pure function: the input is unchanged.
    assert torch.equal(frame.images, before.images) and torch.equal(frame.rig.present, before.rig.present)


def test_the_only_camera_of_a_frame_is_not_droppable(frame):
    present = torch.tensor([[True, True, False], [True, False, False]])  # camera 0 is the only one of the second frame
    assert droppable_cameras(frame.rig._replace(present=present)) == [1]
    assert droppable_cameras(frame.rig) == [0, 1, 2]
    assert droppable_cameras(frame.rig._replace(present=present[:1])) == [0, 1]
    assert droppable_cameras(frame.rig._replace(present=present[1:])) == []


def yaw_error(true, wrong):
    """Returns the yaw error [T, N] of the extrinsics of a frame, degrees."""
    turn = wrong.rig.ego_from_cam[..., :3, :3].double() @ true.rig.ego_from_cam[..., :3, :3].double().mT
    return torch.atan2(turn[..., 1, 0], turn[..., 0, 0]).rad2deg()


def test_one_degree_of_yaw_moves_a_point_at_ten_metres_by_the_chord(frame):
    wrong = yaw_extrinsics(frame, 1.0, rng(3))
    point_cam = torch.tensor([[0.0, 0.0, 10.0]], dtype=torch.float64)  # on the optical axis, which is level
    before = transform_points(frame.rig.ego_from_cam.double(), point_cam)[..., 0, :]
    after = transform_points(wrong.rig.ego_from_cam.double(), point_cam)[..., 0, :]
    moved = after - before
    assert moved.norm(dim=-1).numpy() == pytest.approx(2 * 10 * np.sin(np.radians(0.5)), abs=1e-4)  # 0.1745 m
    assert moved[..., 2].abs().max() < 1e-5  # about the vertical: the height is unchanged
    assert torch.equal(wrong.rig.ego_from_cam[..., 3], frame.rig.ego_from_cam[..., 3])  # about the camera centre
    # To the left (counter-clockwise) for some cameras, to the right for others, and the same in all frames.
    yaw = yaw_error(frame, wrong)
    assert yaw.abs().numpy() == pytest.approx(1.0, abs=1e-4) and torch.equal(yaw[0], yaw[1])
    drawn = {tuple(yaw_error(frame, yaw_extrinsics(frame, 1.0, rng(seed)))[0].gt(0).tolist()) for seed in range(40)}
    assert len(drawn) == 2**N


def test_a_wrong_yaw_shifts_projections_by_its_tangent(frame):
    wrong = rotate_extrinsics(frame, np.array([[0.0, 0.0, np.radians(2.0)]] * N))
    point = transform_points(frame.rig.ego_from_cam, torch.tensor([[0.0, 0.0, 20.0]]))
    seen = transform_points(invert_rigid(wrong.rig.ego_from_cam), point)[..., 0, :]
    u = 100 * seen[..., 0] / seen[..., 2]
    # The wrong extrinsics point further left than the camera does, so the point projects further right.
    assert u.numpy() == pytest.approx(100 * np.tan(np.radians(2.0)), abs=1e-3)


def test_extrinsics_noise_turns_about_the_vertical_within_its_bounds(frame):
    turns = []
    for seed in range(60):
        wrong = perturb_extrinsics(frame, 2.0, rng(seed))
        turn = wrong.rig.ego_from_cam[0, :, :3, :3].double() @ frame.rig.ego_from_cam[0, :, :3, :3].double().mT
        yaw = torch.atan2(turn[:, 1, 0], turn[:, 0, 0])
        zero = torch.zeros_like(yaw)
        about = torch.stack([yaw.cos(), -yaw.sin(), zero, yaw.sin(), yaw.cos(), zero, zero, zero, zero + 1], -1)
        assert torch.allclose(turn, about.unflatten(-1, (3, 3)), atol=1e-5)
        turns.append(yaw)
        assert torch.equal(wrong.rig.ego_from_cam[..., 3], frame.rig.ego_from_cam[..., 3])
    turns = torch.stack(turns).rad2deg()  # [seeds, N]
    assert 1.9 < turns.abs().max() < 2.01
    # Uniform: standard deviation of 2 / sqrt(3), independent for each camera.
    assert turns.std().item() == pytest.approx(2 / np.sqrt(3), rel=0.15)
    assert np.abs(np.corrcoef(turns.T.numpy()) - np.eye(N)).max() < 0.4


def test_as_first_frame(frame):
    first = as_first_frame(frame)
    assert first.is_first.all() and (first.seconds_since_prev == 0).all()
    assert torch.equal(first.ego_from_prev, torch.eye(4).expand(T, 4, 4))
    assert torch.equal(first.images, frame.images)


def gray(value, height=H, width=W) -> torch.Tensor:
    return torch.full((2, 3, height, width), value, dtype=torch.uint8)


@pytest.mark.parametrize("severity, std", [(1, 20.4), (2, 30.6), (3, 45.9)])  # 0.08, 0.12 and 0.18 of 255
def test_noise_has_its_standard_deviation(severity, std):
    noisy = corrupt_images(gray(128), "noise", severity, rng()).double() - 128
    # 57,600 values: the standard deviation is known to 0.3 %, the mean to 0.2; a fifth of a percent is clipped at most.
    assert noisy.std().item() == pytest.approx(std, rel=0.015)
    assert abs(noisy.mean().item()) < 0.8
    a, b = noisy[0].flatten(), noisy[1].flatten()
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03  # independent for every frame


@pytest.mark.parametrize("severity, level", [(1, 0.7), (2, 0.5), (3, 0.3)])
def test_dark_is_the_square_with_photon_noise(severity, level):
    dark = corrupt_images(gray(204), "dark", severity, rng()).double()  # 204 is 0.8 of white
    light = level * 0.64
    assert dark.mean().item() == pytest.approx(255 * light, abs=0.3)
    assert dark.std().item() == pytest.approx(255 * np.sqrt(light / PHOTONS), rel=0.03)
    assert (corrupt_images(gray(0), "dark", severity, rng()) == 0).all()


def test_bright_adds_and_saturates():
    values = torch.tensor([0, 100, 204, 205, 255], dtype=torch.uint8).expand(3, 1, 5)
    # 0.2 of 255 is 51; 204 + 51 is white.
    assert corrupt_images(values, "bright", 1, rng())[0, 0].tolist() == [51, 151, 255, 255, 255]


@pytest.mark.parametrize("severity, bits", [(1, 4), (2, 3), (3, 2)])
def test_quantised_images_keep_their_upper_bits(severity, bits):
    values = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    step = 2 ** (8 - bits)
    expected = [value // step * step for value in range(256)]
    assert corrupt_images(values, "quantize", severity, rng())[1, 0].tolist() == expected


def test_fog_follows_koschmieder():
    fog = [corrupt_images(gray(value), "fog", 2, rng(1)).double() for value in (25, 125)]
    # Two colours in the same fog: their contrast is the transmission, 0.45 ** thickness with thickness 0.5 to 1.5.
    through = (fog[1] - fog[0]) / 100
    assert 0.45**1.5 - 0.01 < through.min() < 0.42 and 0.48 < through.max() < 0.45**0.5 + 0.01
    assert (fog[0] - (25 * through + FOG_COLOR * (1 - through))).abs().max() < 3  # rounding, magnified
    assert torch.equal(fog[0][0], fog[0][1])  # the same in all frames
    assert (through.diff(dim=-1).abs() < 0.03).all()  # smooth


def test_motion_blur_smears_a_bright_pixel_along_a_segment():
    image = torch.zeros(1, 3, H, W, dtype=torch.uint8)
    image[..., 24, 100] = 255
    for severity, steps in ((1, 3), (2, 5), (3, 7)):  # 200 pixels wide: segments of 2, 4, 6 pixels, both ends included
        slopes = []
        for seed in range(30):
            blurred = corrupt_images(image, "blur", severity, rng(seed))[0, 0].double()
            assert blurred.sum().item() == pytest.approx(255, abs=steps / 2)  # the light is preserved
            row, column = (index - start for index, start in zip(blurred.nonzero().T, (24, 100), strict=True))
            assert (row == -row.flip(0)).all() and (column == -column.flip(0)).all()  # the middle stays
            reach = steps // 2
            assert column.max() >= row.abs().max() and reach - 1 <= torch.hypot(row.double(), column.double()).max()
            assert column.max() <= reach  # within 45 degrees of the horizontal, no longer than the level
            assert {round(255 * k / steps) for k in (1, 2)} >= set(blurred[blurred > 0].tolist())
            slopes.append(int(row[column.argmax()]))
        assert max(slopes) > 0 > min(slopes)
    even = corrupt_images(gray(77), "blur", 3, rng())
    assert (even == 77).all()  # also at the edges


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_severity_grows_and_a_seed_fixes_the_result(kind):
    v, u = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    image = ((u // 8 + v // 8) % 2 * 120 + u % 40).byte().expand(1, 3, H, W)  # a shaded chessboard
    change = [(corrupt_images(image, kind, s, rng(2)).int() - image.int()).abs().double().mean() for s in SEVERITIES]
    assert 0 < change[0] < change[1] < change[2]
    one, same = (corrupt_images(image, kind, 2, rng(7)) for _ in range(2))
    assert torch.equal(one, same) and one.dtype == torch.uint8 and one.shape == image.shape


def test_only_the_images_of_one_present_camera_are_corrupted(frame):
    present = frame.rig.present.clone()
    present[1, 2] = False
    frame = frame._replace(rig=frame.rig._replace(present=present))
    bad = corrupt_camera(frame, 2, "noise", 3, rng())
    assert torch.equal(bad.images[:, :2], frame.images[:, :2]) and torch.equal(bad.images[1], frame.images[1])
    assert not torch.equal(bad.images[0, 2], frame.images[0, 2])


def test_unknown_kinds_and_severities_are_errors(frame):
    with pytest.raises(ConfigError, match="corruption 'snow' does not exist; use one of bright, dark"):
        corrupt_images(frame.images, "snow", 1, rng())
    with pytest.raises(ConfigError, match="severity of fog is 4; use 1, 2 or 3"):
        corrupt_images(frame.images, "fog", 4, rng())
