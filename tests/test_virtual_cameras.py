"""Virtual cameras: the pinholes that stand for the cameras of any rig, their images, and what of a rig they cover."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import PROJECT, existing
from PIL import Image

from perception.errors import ConfigError, DataError, PerceptionWarning
from perception.export.onnx import export_onnx
from perception.export.runtime import Runtime
from perception.inference.fitting import fit_image
from perception.inference.predictor import Predictor
from perception.rigs import Rig, RigCamera, import_rig
from perception.rigs.coverage import fitted_coverage
from perception.rigs.models import BrownConrady, FTheta, KannalaBrandt, Mei, Pinhole
from perception.rigs.remap import remap_table
from perception.rigs.rig import BODY_FROM_OPTICAL, rigid_from_rpy
from perception.rigs.virtual import HORIZON_RANGE, passes_through, virtual_rig

NANO, LARGE = (176, 448), (256, 704)
FOCAL = {"fx": 330.0, "fy": 332.0, "cx": 321.0, "cy": 238.0}
MODELS = {
    "pinhole": Pinhole(**FOCAL),
    "brown_conrady": BrownConrady(**FOCAL, distortion=(-0.25, 0.09, 0.001, -0.0005)),
    "kannala_brandt": KannalaBrandt(**FOCAL | {"fx": 170.0, "fy": 171.0}, distortion=(0.05, -0.008, 0.002, -0.0004)),
    "mei": Mei(**FOCAL, xi=1.3, distortion=(-0.05, 0.02, 0.0005, 0.0002)),
    "f_theta": FTheta(cx=318.0, cy=243.0, polynomial=(170.0, 4.0, -6.0)),
}


@pytest.fixture(params=["shipped", "real"])
def argoverse(request):
    if request.param == "shipped":
        return Rig.load("argoverse2")
    pytest.importorskip("pyarrow")
    return import_rig(existing(PROJECT.parent / "shared" / "data" / "rigs" / "argoverse2", "the calibration files"))


def camera(model, rpy_deg=(4.0, 12.0, 30.0), size=(480, 640), name="front", lens_deg=100.0):
    """A camera 1.6 m above the ground that is rolled, looks down, and to the left."""
    pose = rigid_from_rpy(np.radians(rpy_deg), (1.0, 0.2, 1.6)) @ BODY_FROM_OPTICAL
    return RigCamera(name, size, model, pose, np.radians(lens_deg))


def quiet(rig, image_size=NANO):
    """`virtual_rig` without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PerceptionWarning)
        return virtual_rig(rig, image_size)


def fitted(rig, image_size):
    """What is left of a rig of pinholes if its images are fitted."""
    return fitted_coverage(rig.names, rig.camera_rig(), [source.image_size for source in rig], image_size)


def pixel_rays_ego(pinhole):
    """Directions [H, W, 3] of the ego frame of the pixel centres of a pinhole."""
    H, W = pinhole.image_size
    v, u = np.mgrid[:H, :W] + 0.5
    rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(pinhole.img_from_cam).T
    rays = rays / np.linalg.norm(rays, axis=-1, keepdims=True)
    return rays @ pinhole.ego_from_cam[:3, :3].T


def color(rays_ego):
    """A smooth colour [..., 3] of directions: the truth of a far sphere around the vehicle."""
    axes = np.array([[3.0, 1.0, 9.0], [-5.0, 6.0, 3.0], [2.0, -8.0, 5.0]])
    return 127.5 + 110 * np.sin(rays_ego @ axes.T)


def photograph(source):
    """What a physical camera sees of the sphere, through its model; noise where the lens shows nothing."""
    H, W = source.image_size
    v, u = np.mgrid[:H, :W] + 0.5
    rays, valid = source.unproject(np.stack([u, v], -1))
    image = np.random.default_rng(0).integers(0, 256, (H, W, 3)).astype(np.uint8)
    image[valid] = color(rays[valid] @ source.ego_from_cam[:3, :3].T).round()
    return image


@pytest.mark.parametrize("image_size", [NANO, (96, 240)], ids=["fine", "reduced"])
@pytest.mark.parametrize("kind", MODELS)
def test_pixels_show_what_their_direction_says(kind, image_size):
    source = camera(MODELS[kind])
    virtual = quiet(Rig([source]), image_size)
    images, rig = virtual.frame({"front": photograph(source)})
    assert len(images) == len(virtual) == (1 if kind in ("pinhole", "brown_conrady") else 3)
    for n, (image, pinhole) in enumerate(zip(images, virtual.cameras, strict=True)):
        seen = pinhole.table.seen
        rays_ego = pixel_rays_ego(pinhole)
        shown = source.project(rays_ego @ source.ego_from_cam[:3, :3])[1]
        assert (seen == shown).all() and seen.mean() > 0.75
        assert (image[~seen] == 0).all()
        uv = pinhole.table.uv_img[seen]
        inner = ((uv > 4) & (uv < np.array(source.image_size[::-1]) - 4)).all(-1)  # noise begins outside the lens
        inner &= source.unproject(uv)[1] & (np.arccos(rays_ego[seen] @ source.ego_from_cam[:3, 2]) < np.radians(97))
        error = np.abs(image[seen].astype(float) - color(rays_ego[seen]))[inner]
        assert error.max() < 4 and error.mean() < 0.8, (kind, error.max(), error.mean())
        np.testing.assert_array_equal(rig.img_from_cam[n], pinhole.img_from_cam)
        np.testing.assert_array_equal(rig.ego_from_cam[n, :3, 3], source.ego_from_cam[:3, 3])


def test_a_table_to_the_same_pinhole_changes_nothing_and_half_a_pixel_is_the_mean():
    source = camera(MODELS["pinhole"], size=(48, 64))
    image = np.random.default_rng(1).integers(0, 256, (48, 64, 3)).astype(np.uint8)
    matrix = source.model.img_from_cam
    table = remap_table(source, source.ego_from_cam, matrix, (48, 64))
    np.testing.assert_array_equal(table(image), image)
    shifted = remap_table(source, source.ego_from_cam, matrix - [[0, 0, 0.5], [0, 0, 0], [0, 0, 0]], (48, 63))
    wide = image.astype(int)
    np.testing.assert_array_equal(shifted(image), (wide[:, :-1] + wide[:, 1:] + 1) // 2)


def test_fine_patterns_do_not_alias():
    source = camera(MODELS["brown_conrady"])
    board = np.indices((480, 640)).sum(0) % 2 * 255
    (image,), _ = quiet(Rig([source]), (96, 240)).frame([np.repeat(board[..., None], 3, -1).astype(np.uint8)])
    inner = image[20:-20, 20:-20].astype(float)
    assert abs(inner.mean() - 127.5) < 2 and inner.std() < 12


@pytest.mark.parametrize("name", ["argoverse2", "waymo", "surround_fisheye", "kitti360"])
def test_virtual_cameras_are_level(name):
    for pinhole in quiet(Rig.load(name)).cameras:
        if pinhole.is_unchanged:
            continue
        azimuth = np.radians(np.arange(0, 360, 0.5))
        horizon = np.stack([np.cos(azimuth), np.sin(azimuth), np.zeros_like(azimuth)], -1)
        points = horizon @ pinhole.ego_from_cam[:3, :3] @ pinhole.img_from_cam.T
        ahead = points[:, 2] > 0.1
        rows = points[ahead, 1] / points[ahead, 2]
        np.testing.assert_allclose(rows, pinhole.img_from_cam[1, 2], atol=1e-6)
        assert 0.1 < rows[0] / NANO[0] < HORIZON_RANGE[1]
        rotation = pinhole.ego_from_cam[:3, :3]
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(rotation) > 0
        field = 2 * np.degrees(np.arctan(NANO[1] / 2 / pinhole.img_from_cam[0, 0]))
        assert 40 < field < 111


@pytest.mark.parametrize("image_size", [NANO, LARGE])
def test_a_rig_like_nuscenes_passes_through_to_the_last_bit(image_size):
    rig = Rig.load("nuscenes")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        virtual = virtual_rig(rig, image_size)
    assert [c.source.name for c in virtual.cameras] == list(rig.names) and all(c.is_unchanged for c in virtual.cameras)
    rng = np.random.default_rng(2)
    images = {name: rng.integers(0, 256, (900, 1600, 3)).astype(np.uint8) for name in rig.names}
    given, camera_rig = virtual.frame(images)
    assert all(image is images[name] for image, name in zip(given, rig.names, strict=True))
    for one, other in zip(camera_rig, rig.camera_rig(), strict=True):
        np.testing.assert_array_equal(one, other)
    fitted, fitted_camera_rig = virtual.frame(images, [image_size] * len(rig))
    for n, name in enumerate(rig.names):
        pixels, matrix = fit_image(Image.fromarray(images[name]), rig[name].model.img_from_cam, image_size)
        assert torch.equal(torch.from_numpy(fitted[n]).permute(2, 0, 1), pixels)
        np.testing.assert_array_equal(fitted_camera_rig.img_from_cam[n], matrix)


@pytest.mark.parametrize("image_size", [NANO, LARGE])
def test_every_camera_of_argoverse_keeps_its_horizon(argoverse, image_size):
    front = argoverse["ring_front_center"]
    assert front.image_size == (2048, 1550)
    # Fitting keeps the lower rows only.
    before = fitted(argoverse, image_size)["ring_front_center"]
    top = front.image_size[0] - image_size[0] * front.image_size[1] / image_size[1]
    below = np.arcsin(-front.ego_from_cam[2, 2]) + np.arctan((top - front.model.cy) / front.model.fy)
    assert before.horizon_is_lost and before.reached.farthest < 8
    assert before.reached.farthest == pytest.approx(front.ego_from_cam[2, 3] / np.tan(below), rel=0.01)
    with pytest.warns(PerceptionWarning, match="below the horizon are left of 'ring_front_center'"):
        virtual = virtual_rig(argoverse, image_size)
    assert len(virtual) == len(argoverse)
    for covered in virtual.coverage().cameras:
        assert covered.reached.horizon and covered.reached.nearest < 9 and covered.rays > 0.3


def test_wide_cameras_become_several_pinholes_and_narrow_ones_keep_their_pixels():
    counts = {}
    for half, model in ((95, MODELS["kannala_brandt"]), (60, MODELS["kannala_brandt"]), (50, MODELS["mei"])):
        source = camera(model, (0, 0, 0), size=(960, 1400), lens_deg=half)
        source = replace(source, model=replace(model, cx=700.0, cy=480.0))
        counts[half] = len(quiet(Rig([source])))
    assert counts == {95: 3, 60: 2, 50: 1}
    # Long range: 28 degrees with distortion. The network's columns take the whole width, and no more is lost.
    model = BrownConrady(fx=3800.0, fy=3800.0, cx=960.0, cy=640.0, distortion=(-0.1, 0.02, 0.0, 0.0))
    (pinhole,) = quiet(Rig([camera(model, (1, 2, 0), size=(1280, 1920))])).cameras
    assert pinhole.img_from_cam[0, 0] / 3800 == pytest.approx(NANO[1] / 1920, rel=0.02)
    assert pinhole.table.seen.mean() > 0.98


def test_pinholes_stand_from_left_to_right_where_the_camera_sees():
    """The principal point lies near the left border, so that the camera sees much more to its right."""
    model = replace(MODELS["kannala_brandt"], cx=150.0)
    virtual = quiet(Rig([camera(model, (0, 0, 0), lens_deg=90)]))
    yaws = [np.degrees(np.arctan2(p.ego_from_cam[1, 2], p.ego_from_cam[0, 2])) for p in virtual.cameras]
    assert len(yaws) == 2 and yaws == sorted(yaws, reverse=True) and yaws[1] < -45 and 10 < yaws[0] < 20
    assert all(pinhole.table.seen.mean() > 0.9 for pinhole in virtual.cameras)


@pytest.mark.parametrize(
    ("change", "is_unchanged"),
    [({}, True), ({"rpy_deg": (0, 4, 0)}, True), ({"rpy_deg": (0, 7, 0)}, False), ({"rpy_deg": (-7, 0, 0)}, False),
     ({"rpy_deg": (180, 0, 0)}, False), ({"size": (1600, 900)}, False), ({"focal": 500.0}, False),
     ({"center": 300.0}, False), ({"size": (300, 1600), "center": 150.0}, False), ({"lens_deg": 40.0}, False)],
)  # fmt: skip
def test_which_pinholes_pass_through(change, is_unchanged):
    """Pitch, roll, upside down, portrait, 116 degrees wide, horizon near the top, a strip, and a small image circle."""
    given = {"rpy_deg": (0, 0, 0), "size": (900, 1600), "focal": 1260.0, "center": 480.0} | change
    focal, center = given.pop("focal"), given.pop("center")
    source = camera(Pinhole(fx=focal, fy=focal, cx=given["size"][1] / 2, cy=center), **given)
    assert passes_through(source, NANO) == is_unchanged
    assert all(pinhole.is_unchanged == is_unchanged for pinhole in quiet(Rig([source])).cameras)


@pytest.mark.parametrize("rpy", [(0, 90, 0), (0, 70, -30), (90, 0, 10), (180, 3, 170)])
def test_odd_mountings_have_an_upright_image(rpy):
    """Straight down, steeply down, on its side, and upside down."""
    source = camera(MODELS["pinhole"], rpy)
    virtual = quiet(Rig([source]))
    (pinhole,) = virtual.cameras
    right, down, forward = pinhole.ego_from_cam[:3, :3].T
    assert abs(right[2]) < 1e-12 and down[2] <= 1e-12
    assert forward @ source.ego_from_cam[:3, 2] > 0.95
    assert pinhole.table.seen.mean() > 0.6
    (covered,) = virtual.coverage().cameras
    assert not covered.horizon_is_lost


def test_coverage_agrees_with_random_rays():
    for source in (Rig.load("argoverse2")["ring_front_center"], Rig.load("surround_fisheye")["left"]):
        virtual = quiet(Rig([source]))
        rays = np.random.default_rng(3).normal(size=(400_000, 3))
        rays = rays[source.project(rays @ source.ego_from_cam[:3, :3])[1]]
        inside = np.zeros(len(rays), bool)
        for pinhole in virtual.cameras:
            x, y, z = (rays @ pinhole.ego_from_cam[:3, :3] @ pinhole.img_from_cam.T).T
            inside |= (z > 0) & (x >= 0) & (x <= z * NANO[1]) & (y >= 0) & (y <= z * NANO[0])
        covered = virtual.coverage()[source.name]
        assert covered.rays == pytest.approx(inside.mean(), abs=0.01)
        assert covered.ground_rays == pytest.approx(inside[rays[:, 2] < 0].mean(), abs=0.01)


def test_ground_range_of_a_level_pinhole_in_closed_form():
    source = camera(Pinhole(fx=400.0, fy=400.0, cx=320.0, cy=200.0), (0, 0, 0), size=(360, 640))
    covered = fitted(Rig([source]), (300, 640))["front"]
    assert covered.in_view.nearest == pytest.approx(1.6 * 400 / 160, rel=1e-3)
    assert covered.reached.nearest == pytest.approx(4.0, rel=1e-3) and covered.reached.horizon
    lost = fitted(Rig([source]), (100, 640))
    assert lost["front"].horizon_is_lost and lost["front"].reached.farthest == pytest.approx(1.6 * 400 / 60, rel=3e-3)
    assert "the horizon is cut off from 'front' (ground in the image: 4.0 m to 10.7 m)" in lost.finding("cut")
    assert "4.0 m to horizon  4.0 m to 10.7 m" in lost.table()


def test_the_same_rig_has_the_same_pinholes_and_tables():
    rig = Rig.load("surround_fisheye")
    one, other = quiet(rig), quiet(Rig.load("surround_fisheye"))
    for first, second in zip(one.cameras, other.cameras, strict=True):
        np.testing.assert_array_equal(first.img_from_cam, second.img_from_cam)
        np.testing.assert_array_equal(first.ego_from_cam, second.ego_from_cam)
        assert first.table is second.table
    assert rig.coverage(NANO) == one.coverage()
    two = one.cameras[0].table
    moved = replace(rig.cameras[0], ego_from_cam=np.eye(4) @ rig.cameras[0].ego_from_cam)
    assert remap_table(moved, one.cameras[0].ego_from_cam, one.cameras[0].img_from_cam, NANO) is two


def test_absent_cameras_and_wrong_images():
    rig = Rig.load("waymo")
    virtual = quiet(rig)
    image = np.zeros((1280, 1920, 3), np.uint8)
    images, camera_rig = virtual.frame({"FRONT": image, "SIDE_LEFT": None})
    assert [i is not None for i in images] == camera_rig.present.tolist() == [True, False, False, False, False]
    images, camera_rig = virtual.frame([image, None, image, None, None])
    assert camera_rig.present.tolist() == [True, False, True, False, False] and images[0].shape == (*NANO, 3)
    for given, message in (
        ({"FRNT": image}, "no camera 'FRNT'; did you mean FRONT"),
        ({"FRONT": image[::2]}, r"images\['FRONT'\] is 1920 x 640 pixels, and the rig is calibrated for 1920 x 1280"),
        ({"FRONT": image[..., 0]}, r"images\['FRONT'\] is uint8 \(1280, 1920\)"),
        ([image], "1 images were given for 5 cameras"),
        ("FRONT", "images is str; give a dict"),
    ):
        with pytest.raises(DataError, match=message):
            virtual.frame(given)


SMALL = (40, 80)  # images of the small network


@pytest.fixture(scope="module")
def mixed_rig():
    """A camera that passes through and a fisheye that becomes three pinholes, and photographs of the sphere."""
    cameras = Rig.load("nuscenes").cameras[0], Rig.load("surround_fisheye").cameras[1]
    return Rig(cameras), {source.name: photograph(source) for source in cameras}


def live_frames(images):
    """The images of three steps as a dict, as a list, and with an absent camera."""
    return images, list(images.values()), {"CAM_FRONT": None, "left": images["left"]}


@pytest.mark.filterwarnings("ignore::perception.errors.PerceptionWarning")
def test_the_predictor_gives_the_network_the_pinholes(small_network, mixed_rig):
    rig, images = mixed_rig
    frames = []
    predictor = Predictor(small_network, rig=rig)
    hook = predictor.model.register_forward_pre_hook(lambda _, given: frames.append(given[0]))
    for k, given in enumerate(live_frames(images)):
        result = predictor.step(given, np.eye(4), 0.5 * k)
        assert "below the horizon are left of 'left'" in result.warnings[0]
    hook.remove()
    flat = Predictor(small_network, rig=rig).step({"left": np.full((966, 1280, 3), 90, np.uint8)}, np.eye(4), 0.0)
    assert any(text.startswith("images['left'] has the same value") for text in flat.warnings)
    assert not any("others" in text or "more" in text for text in flat.warnings)  # three pinholes of one camera
    virtual = virtual_rig(rig, SMALL)
    for frame, given in zip(frames, live_frames(images), strict=True):
        expected, camera_rig = virtual.frame(given, [SMALL] * 4)
        assert (
            frame.rig.present[0].tolist() == camera_rig.present.tolist() == [frame is not frames[2], True, True, True]
        )
        for n in np.flatnonzero(camera_rig.present):
            np.testing.assert_array_equal(frame.images[0, n].permute(1, 2, 0), expected[n])
            np.testing.assert_array_equal(frame.rig.img_from_cam[0, n], camera_rig.img_from_cam[n].astype(np.float32))
            np.testing.assert_array_equal(frame.rig.ego_from_cam[0, n], camera_rig.ego_from_cam[n].astype(np.float32))


@pytest.mark.slow  # it exports a network
@pytest.mark.filterwarnings("ignore::perception.errors.PerceptionWarning")
def test_predictor_and_runtime_give_the_network_the_same_inputs(small_network, mixed_rig, tmp_path):
    rig, images = mixed_rig
    predictor = Predictor(small_network, rig=rig, precision="float32")
    runtime = Runtime(export_onnx(small_network, tmp_path, cameras=4), rig=virtual_rig(rig, SMALL))
    frames = []
    hook = predictor.model.register_forward_pre_hook(lambda _, given: frames.append(given[0]))
    for k, given in enumerate(live_frames(images)):
        one, other = predictor.step(given, np.eye(4), 0.5 * k), runtime.step(given, np.eye(4), time_s=0.5 * k)
        for n in torch.nonzero(frames[k].rig.present[0]).flatten().tolist():
            np.testing.assert_array_equal(frames[k].images[0, n].permute(1, 2, 0), runtime.inputs[f"image_{n}"])
        for name in ("img_from_cam", "ego_from_cam", "present"):
            np.testing.assert_array_equal(getattr(frames[k].rig, name)[0], runtime.inputs[name])
        assert one.warnings == other.warnings and len(one.boxes.score) == len(other.boxes.score) > 0
        assert other.boxes.score == pytest.approx(one.boxes.score.numpy(), abs=1e-4)
    hook.remove()


@pytest.mark.filterwarnings("ignore::perception.errors.PerceptionWarning")
def test_live_use_of_a_rig_like_nuscenes_is_as_without_a_rig(small_network):
    rig = Rig.load("nuscenes")
    rng = np.random.default_rng(4)
    images = {name: rng.integers(0, 256, (900, 1600, 3)).astype(np.uint8) for name in rig.names}
    one = Predictor(small_network, rig=rig).step(images, np.eye(4), 0.0)
    other = Predictor(small_network).step(list(images.values()), rig.camera_rig(), np.eye(4), 0.0)
    assert len(one.boxes.score) > 0
    for first, second in zip((*one.boxes, *one.lines), (*other.boxes, *other.lines), strict=True):
        assert torch.equal(first, second)


def test_rigs_that_do_not_fit(small_network, fp32_export, mixed_export, mixed_rig):
    rig, images = mixed_rig
    predictor = Predictor(small_network, rig=rig)
    with pytest.raises(DataError, match="the cameras are those of the rig that was given at construction"):
        predictor.step(images, rig, np.eye(4), 0.0)
    with pytest.raises(DataError, match="step needs images, rig, global_from_ego and time_s; without rig if one"):
        Predictor(small_network).step(list(images.values()), np.eye(4), 0.0)
    with pytest.raises(ConfigError, match=r"rig is str; give a perception\.Rig"):
        Predictor(small_network, rig="nuscenes")
    with pytest.raises(ConfigError, match=r"made for images of 448 x 176 .* the network takes 80 x 40"):
        Predictor(small_network, rig=quiet(rig))
    with pytest.raises(ConfigError, match="becomes 12 pinholes for this network, and the export takes 6 images"):
        Runtime(fp32_export, rig=Rig.load("surround_fisheye"))
    with pytest.raises(ConfigError, match="the export takes nv12, and images of a rig are remapped as rgb or bgr"):
        Runtime(mixed_export, rig=rig)
    with pytest.raises(ConfigError, match=r"image 0 of the export has 100 x 50 .* the rig gives 80 x 40 or 1600 x 900"):
        quiet(rig, SMALL).checked_sizes([(50, 100), SMALL, SMALL, SMALL])
