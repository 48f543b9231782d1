"""Camera models against OpenCV and against published formulas, and back."""

import subprocess
import sys

import cv2
import numpy as np
import pytest

from perception.errors import DataError
from perception.rigs.models import MODELS, BrownConrady, FTheta, KannalaBrandt, Mei, Pinhole

FOCAL = {"fx": 1085.2, "fy": 1079.6, "cx": 622.8, "cy": 502.5}
# Coefficients of real calibrations: a USB camera, a wide-angle camera of a vehicle, and the former with a thin prism.
BROWN = {
    4: (-0.273113, 0.136259, 0.00005, -0.000481),
    5: (-0.5894, 0.66, 0.0011, -0.001, -1.0088),
    8: (0.929988205433, 0.165922805667, -2.4369e-5, -1.3859e-5, 0.002885974478, 1.331432461739, 0.43583, 0.027607),
    12: (0.93, 0.166, -2.4e-5, -1.4e-5, 0.0029, 1.3314, 0.4358, 0.0276, 0.0011, -0.0004, -0.0017, 0.0006),
}
FISHEYE = (0.05, -0.008, 0.002, -0.0004)
KITTI360 = {"xi": 2.2134047507854890, "distortion": (1.6798e-2, 1.65487732, 4.2223943e-4, 4.2462134e-4)}
MANY = {
    "pinhole": Pinhole(**FOCAL, skew=3.0),
    **{f"brown {n}": BrownConrady(**FOCAL, distortion=k) for n, k in BROWN.items()},
    "fisheye": KannalaBrandt(fx=330.0, fy=331.0, cx=639.5, cy=482.5, distortion=FISHEYE),
    "narrow fisheye": KannalaBrandt(fx=497.8, fy=497.8, cx=396.9, cy=463.9, distortion=(-0.03, 0.02, -0.03, 0.0166)),
    "mei": Mei(fx=1336.3, fy=1335.8, cx=716.9, cy=705.8, **KITTI360),
    "mei below 1": Mei(fx=600.0, fy=600.0, cx=640.0, cy=480.0, xi=0.9, distortion=(-0.05, 0.01, 0.0, 0.0, -0.001)),
    "f-theta": FTheta(cx=960.0, cy=604.0, polynomial=(930.0, 12.0, -31.0, -8.0, 2.5)),
}  # fmt: skip


def rays(max_angle: float, count: int = 4000) -> np.ndarray:
    rng = np.random.default_rng(0)
    angle, azimuth = rng.uniform(0, max_angle, count), rng.uniform(-np.pi, np.pi, count)
    return np.stack([np.sin(angle) * np.cos(azimuth), np.sin(angle) * np.sin(azimuth), np.cos(angle)], -1)


def opencv_matrix(model) -> np.ndarray:
    """The matrix with OpenCV's pixel centres."""
    matrix = model.img_from_cam.copy()
    matrix[:2, 2] -= 0.5
    return matrix


@pytest.mark.parametrize("count", BROWN)
def test_brown_conrady_is_opencvs(count):
    model = BrownConrady(**FOCAL, distortion=BROWN[count])
    points = rays(min(model.max_angle, np.radians(60))) * np.linspace(0.3, 80, 4000)[:, None]
    uv, valid = model.project(points)
    expected = cv2.projectPoints(points, np.zeros(3), np.zeros(3), opencv_matrix(model), np.array(BROWN[count]))[0]
    assert valid.mean() > 0.99
    np.testing.assert_allclose(uv[valid], expected[valid, 0] + 0.5, atol=1e-8)


@pytest.mark.parametrize("name", ["fisheye", "narrow fisheye"])
def test_kannala_brandt_is_opencvs(name):
    model = MANY[name]
    points = rays(min(model.max_angle, np.radians(89))) * np.linspace(0.3, 80, 4000)[:, None]
    uv, valid = model.project(points)
    expected = cv2.fisheye.projectPoints(
        points[:, None], np.zeros(3), np.zeros(3), opencv_matrix(model), np.array(model.distortion)
    )[0]
    assert valid.all()
    np.testing.assert_allclose(uv, expected[:, 0] + 0.5, atol=1e-8)


def test_a_fisheye_sees_behind_itself():
    model = MANY["fisheye"]
    angle = np.radians(95)
    uv, valid = model.project([np.sin(angle), 0, np.cos(angle)])
    radius = angle + sum(k * angle ** (2 * i + 3) for i, k in enumerate(FISHEYE))
    assert valid
    np.testing.assert_allclose(uv, [model.fx * radius + model.cx, model.cy], atol=1e-9)


@pytest.mark.parametrize("name", ["mei", "mei below 1"])
def test_mei_is_the_published_formula(name):
    model = MANY[name]
    points = rays(model.max_angle) * 7
    uv, valid = model.project(points)
    x, y, z = points.T / np.linalg.norm(points, axis=1)
    x, y = x / (z + model.xi), y / (z + model.xi)
    k1, k2, p1, p2, k3 = (*model.distortion, 0.0)[:5]
    r2 = x**2 + y**2
    radial = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3
    u = model.fx * (x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x**2)) + model.cx
    v = model.fy * (y * radial + p1 * (r2 + 2 * y**2) + 2 * p2 * x * y) + model.cy
    assert valid.mean() > 0.99
    np.testing.assert_allclose(uv[valid], np.stack([u, v], -1)[valid], rtol=1e-12, atol=1e-8)


def test_mei_without_shift_is_brown_conrady():
    lens = {**FOCAL, "distortion": BROWN[4]}
    points = rays(np.radians(50))
    np.testing.assert_allclose(
        Mei(**lens, xi=0.0).project(points)[0], BrownConrady(**lens).project(points)[0], atol=1e-9
    )


def test_f_theta_is_its_polynomial():
    model = MANY["f-theta"]
    points = rays(model.max_angle)
    uv, valid = model.project(points)
    angle = np.arccos(points[:, 2])
    radius = sum(a * angle ** (i + 1) for i, a in enumerate(model.polynomial))
    azimuth = np.arctan2(points[:, 1], points[:, 0])
    expected = np.stack([model.cx + radius * np.cos(azimuth), model.cy + radius * np.sin(azimuth)], -1)
    assert valid.all()
    np.testing.assert_allclose(uv, expected, atol=1e-5)  # arccos is coarse near the axis


@pytest.mark.parametrize("name", MANY)
def test_round_trip(name):
    model = MANY[name]
    points = rays(min(model.max_angle, np.radians(89)))
    uv, valid = model.project(points)
    back, again = model.unproject(uv)
    assert valid.mean() > 0.999 and again[valid].all() and not again[~valid].any()
    np.testing.assert_allclose(np.linalg.norm(back[valid], axis=1), 1, atol=1e-12)
    uv_again, still = model.project(back[valid])
    assert still.mean() > 0.999  # a ray at the very border may leave it by rounding
    np.testing.assert_allclose(uv_again[still], uv[valid][still], atol=1e-6)
    inside = np.arccos(np.clip(points[valid, 2], -1, 1)) < 0.95 * model.max_angle
    np.testing.assert_allclose(back[valid][inside], points[valid][inside], atol=1e-9)
    np.testing.assert_array_equal(model.unproject(uv)[0], back)  # deterministic


@pytest.mark.parametrize("name", MANY)
def test_the_optical_axis_meets_the_principal_point(name):
    model = MANY[name]
    uv, valid = model.project([0.0, 0.0, 5.0])
    assert valid
    np.testing.assert_allclose(uv, [model.cx, model.cy], atol=1e-12)
    np.testing.assert_allclose(model.unproject(uv)[0], [0, 0, 1], atol=1e-12)
    near = np.array([1e-6, -2e-6, 1.0])  # the pinhole near the axis
    np.testing.assert_allclose(model.project(near)[0], (model.img_from_cam @ near)[:2], atol=1e-7)


@pytest.mark.parametrize("name", MANY)
def test_nothing_outside_the_field_of_view_is_valid(name):
    model = MANY[name]
    angle = np.linspace(model.max_angle + 1e-6, np.pi, 200)
    uv, valid = model.project(np.stack([np.sin(angle), 0 * angle, np.cos(angle)], -1))
    assert not valid.any() and np.isnan(uv).all()
    for point in ([0, 0, 0], [np.nan, 0, 1], [np.inf, 0, 1]):
        assert not model.project(point)[1]
    assert not model.unproject([np.nan, 3.0])[1]


def test_distortion_that_turns_back_is_cut_where_it_turns():
    """Strong barrel distortion: rays beyond the turn would land in the image again."""
    model = BrownConrady(**FOCAL, distortion=(-0.4, 0.0, 0.0, 0.0))
    turn = np.arctan(np.sqrt(1 / (3 * 0.4)))  # the radius r - 0.4 r^3 has its maximum there
    assert turn * 0.998 < model.max_angle < turn
    folded = np.array([np.tan(1.05 * turn), 0, 1.0])
    assert not model.project(folded)[1]
    x = folded[0] - 0.4 * folded[0] ** 3
    assert 0 < model.fx * x + model.cx < 1280  # where OpenCV puts it
    highest = np.sqrt(1 / 1.2) * (2 / 3)  # no ray leads beyond the maximum
    rim = model.cx + model.fx * highest
    rays_cam, valid = model.unproject([[rim + 0.5, model.cy], [rim - 0.5, model.cy]])
    assert valid.tolist() == [False, True]
    assert np.isnan(rays_cam[0]).all()


def test_the_field_of_view_ends_just_before_the_turn():
    """r - 0.4 r^3 turns at r^2 = 1 / 1.2, and r / (1 + 2 r^2) at r^2 = 1 / 2; the models end at 0.999 of it."""
    for distortion, square in (((-0.4, 0.0, 0.0, 0.0), 1 / 1.2), ((0.0,) * 5 + (2.0, 0.0, 0.0), 1 / 2)):
        model = BrownConrady(**FOCAL, distortion=distortion)
        assert model.max_angle == pytest.approx(np.arctan(0.999 * np.sqrt(square)), abs=1e-9)
    # Tangential distortion folds earlier on one side: u = x + 3 p2 x^2 on the horizontal axis turns at x = -1 / (6 p2).
    folded = BrownConrady(**FOCAL, distortion=(0.0, 0.0, 0.0, 0.2))
    assert 0.97 / 1.2 < np.tan(folded.max_angle) < 1 / 1.2


@pytest.mark.parametrize(
    ("xi", "degrees"),
    # The outline of the sphere at cos = -1 / xi; the whole sphere; cos = -xi, where all radii end, with the margin of
    # half a degree that the pinhole keeps from 90 degrees.
    [(2.0, 120), (1.25, np.degrees(np.arccos(-0.8))), (1.0, 180), (0.5, 119.5), (0.0, 89.5)],
)
def test_the_field_of_view_of_a_mirror_in_closed_form(xi, degrees):
    model = Mei(**FOCAL, xi=xi, distortion=(0.0,) * 4)
    assert np.degrees(model.max_angle) == pytest.approx(degrees, abs=0.06)


@pytest.mark.parametrize("name", MANY)
def test_a_model_can_be_moved_and_gives_the_matrix_of_a_pinhole(name):
    model = MANY[name]
    moved = model.moved(0.5)
    assert (moved.cx, moved.cy) == (model.cx + 0.5, model.cy + 0.5) and type(moved) is type(model)
    np.testing.assert_allclose(moved.project([0.1, -0.2, 1.0])[0] - model.project([0.1, -0.2, 1.0])[0], 0.5, atol=1e-9)
    fx, fy = (model.polynomial[0],) * 2 if name == "f-theta" else (model.fx, model.fy)
    shrunk = 1 + getattr(model, "xi", 0.0)
    expected = [[fx / shrunk, getattr(model, "skew", 0.0) / shrunk, model.cx], [0, fy / shrunk, model.cy], [0, 0, 1]]
    np.testing.assert_allclose(model.img_from_cam, expected, rtol=1e-12)


def test_leading_dimensions_and_units_do_not_matter():
    model = MANY["brown 8"]
    points = rays(0.6, 24).reshape(2, 3, 4, 3)
    uv, valid = model.project(points)
    assert uv.shape == (2, 3, 4, 2) and valid.shape == (2, 3, 4)
    np.testing.assert_allclose(model.project(points * 1e200)[0], uv, atol=1e-9)
    assert model.project(np.zeros((0, 3)))[0].shape == (0, 2)
    assert model.unproject(uv[0, 0])[0].shape == (4, 3)


def test_models_compare_by_their_numbers():
    assert KannalaBrandt(**FOCAL, distortion=np.array(FISHEYE)) == KannalaBrandt(**FOCAL, distortion=list(FISHEYE))
    assert len({MANY["brown 4"], BrownConrady(**FOCAL, distortion=BROWN[4]), MANY["brown 8"]}) == 2


def test_numbers_that_cannot_be_a_model_are_refused():
    for make, words in (
        (lambda: Pinhole(**{**FOCAL, "fx": -1.0}), "focal lengths above 0"),
        (lambda: BrownConrady(**FOCAL, distortion=(0.1,) * 6), "has 6 coefficients"),
        (lambda: KannalaBrandt(**FOCAL, distortion=(0.1, np.nan, 0, 0)), "give 4 finite numbers"),
        (lambda: Mei(**FOCAL, xi=-1.0, distortion=(0,) * 4), "xi of the mei model"),
        (lambda: FTheta(cx=1, cy=1, polynomial=(-3.0,)), "a first one above 0"),
    ):
        with pytest.raises(DataError, match=words):
            make()
    assert sorted(MODELS) == ["brown_conrady", "f_theta", "kannala_brandt", "mei", "pinhole"]


def test_models_need_no_torch():
    code = "import sys, perception.rigs; sys.exit(' '.join({'torch', 'cv2', 'pyarrow'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
