"""The town seen by any rig: the renderer's buffers against other people's projections, the tables, and the reader."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from nuscenes import NuScenes
from PIL import Image

from perception.cli.simulate import main
from perception.data.augment import Augment
from perception.data.inspection import inspect_dataset
from perception.data.loader import ClipRequest
from perception.data.nuscenes import NuScenesDataset
from perception.errors import ConfigError, DataError
from perception.geometry import invert_rigid, rigid_from_yaw, transform_points
from perception.inference.predictor import Predictor
from perception.inference.sequence import predict_stream
from perception.models.provenance import provenance_of
from perception.rigs import Rig, RigCamera, import_rig
from perception.rigs.models import BrownConrady, FTheta, KannalaBrandt, Mei, Pinhole
from perception.rigs.rig import BODY_FROM_OPTICAL, RIG_FILE, rigid_from_rpy
from perception.rigs.virtual import chosen_pinholes
from perception.synthetic import VERSION, simulate
from perception.synthetic.actors import actor_mesh
from perception.synthetic.mesh import Material
from perception.synthetic.render import TownRenderer
from perception.synthetic.scene import scene_district
from perception.synthetic.sensors import cameras_of, make_cameras

SIZE = (240, 320)  # height and width
TIME = 1.1
FOCAL = {"fx": 150.0, "fy": 152.0, "cx": 161.3, "cy": 118.2}
FISHEYE = KannalaBrandt(fx=80, fy=80, cx=161.3, cy=118.2, distortion=(0.05, -0.008, 0.002, -4e-4))
BROWN = BrownConrady(**FOCAL, distortion=(-0.28, 0.09, 8e-4, -6e-4, -0.01))
RATIONAL = BrownConrady(**FOCAL, distortion=(0.9, 0.2, 3e-4, 2e-4, 0.01, 1.2, 0.4, 0.05))


def mounted(name, model, rpy_deg, position, lens_deg=180.0, size=SIZE):
    pose = rigid_from_rpy(np.radians(rpy_deg), position) @ BODY_FROM_OPTICAL
    return RigCamera(name, size, model, pose, np.radians(lens_deg))


RIG = Rig(
    [
        mounted("pinhole", Pinhole(**FOCAL), (3, 4, 10), (1.6, 0.1, 1.5)),
        mounted("brown", BROWN, (-4, 6, 60), (1.2, 0.6, 1.4)),
        mounted("rational", RATIONAL, (0, 2, 0), (2, 0, 1)),
        mounted("fisheye", FISHEYE, (2, 25, 170), (-1, 0, 0.9), 95),
        mounted("omni", Mei(**FOCAL | {"fx": 250, "fy": 249}, xi=1.9, distortion=(-0.04, 0.3, 4e-4, -3e-4)),
                (0, 10, -95), (1, -0.9, 1.2), 95),
        mounted("theta", FTheta(cx=159.0, cy=121.0, polynomial=(105.0, 0.0, -3.0)), (0, 60, 45), (0.5, 0.2, 2.8), 88),
    ]
)  # fmt: skip


def by_others(model, points_cam):
    """Projects points in front of a camera with OpenCV, or by the published formula where it lacks the model."""
    points = np.asarray(points_cam, np.float64)
    if isinstance(model, FTheta):
        angle, flat = np.arctan2(np.hypot(*points[:, :2].T), points[:, 2]), np.hypot(*points[:, :2].T)
        radius = sum(a * angle ** (k + 1) for k, a in enumerate(model.polynomial))
        return points[:, :2] / flat[:, None] * radius[:, None] + (model.cx, model.cy)
    matrix = np.array([[model.fx, 0, model.cx - 0.5], [0, model.fy, model.cy - 0.5], [0, 0, 1]])  # centres at 0
    none = np.zeros(3)
    if isinstance(model, KannalaBrandt):
        uv = cv2.fisheye.projectPoints(points[:, None], none, none, matrix, np.array(model.distortion))[0]
    else:
        if isinstance(model, Mei):
            points = points / np.linalg.norm(points, axis=1, keepdims=True) + (0, 0, model.xi)
        uv = cv2.projectPoints(points, none, none, matrix, np.array(getattr(model, "distortion", (0.0,) * 4)))[0]
    return uv[:, 0] + 0.5


@pytest.fixture(scope="module")
def town():
    district = scene_district(11, 0, 4)
    renderer = TownRenderer(district, np.random.default_rng(0))
    cameras = cameras_of(RIG, np.random.default_rng(1))
    return district, renderer, {c.name: (c, renderer.camera(c, TIME, np.random.default_rng(2))) for c in cameras}


def surface(mesh, rng, count=3000):
    """Random points on the faces of a mesh, [count, 3]."""
    corners = mesh.vertices[mesh.faces].astype(np.float64)  # [F, 3, 3]
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    share = rng.dirichlet((1, 1, 1), count)
    return (corners[rng.choice(len(corners), count, p=area / area.sum())] * share[:, :, None]).sum(1)


def unseen_share(town, name, shift=0.0):
    """The share of unhidden points of labelled actors that have no pixel of the actor within 1 px, and their number."""
    district, renderer, pictures = town
    camera, picture = pictures[name]
    cam_from_global = invert_rigid(renderer.global_from_ego(TIME) @ camera.ego_from_cam)
    rng, bad, total = np.random.default_rng(3), 0, 0
    for k, actor in enumerate(district.actors):
        if (picture.actor == k).sum() < 40 or "cycle" in actor.category:  # parts that are thinner than a pixel
            continue
        xy, yaw = actor.trajectory.at(TIME)
        points = surface(actor_mesh(actor, k), rng) @ rigid_from_yaw(yaw)[:3, :3].T + (*xy, 0.0)
        points_cam = transform_points(cam_from_global, points)
        points_cam = points_cam[(points_cam[:, 2] > 0.2) & (np.linalg.norm(points_cam, axis=1) < 50)]
        points_cam = points_cam[camera.project(points_cam)[1]]
        if not len(points_cam):
            continue
        uv = by_others(camera.model, points_cam) + shift
        cells = np.floor(uv).astype(int)
        inside = ((cells >= 2) & (cells < np.array(SIZE[::-1]) - 2)).all(1)
        distance, cells, uv = np.linalg.norm(points_cam[inside], axis=1), cells[inside], uv[inside]
        near = np.stack([cells[:, None] + (du, dv) for du in (-1, 0, 1) for dv in (-1, 0, 1)], 1)[:, :, 0]  # [P, 9, 2]
        close = (np.abs(near + 0.5 - uv[:, None]) <= 1.0 + 1e-9).all(-1)
        u, v = near[..., 0], near[..., 1]
        hidden = np.nanmin(picture.distance[v, u], 1) < distance - 0.3  # something stands before it, or its own front
        bad += (~((picture.actor[v, u] == k) & close).any(1) & ~hidden).sum()
        total += (~hidden).sum()
    return bad / max(total, 1), total


@pytest.mark.parametrize("name", RIG.names)
def test_projected_labels_lie_on_the_pixels_of_the_id_buffer(town, name):
    share, count = unseen_share(town, name)
    assert count > 400
    assert share < 0.005, f"{share:.2%} of {count} points are farther than 1 px from their actor"
    assert unseen_share(town, name, 2.0)[0] > 0.1  # two pixels would be seen


@pytest.mark.parametrize("name", RIG.names)
def test_pixels_of_the_id_buffer_lie_in_their_labels(town, name):
    """The point that a pixel shows is in the box of its actor, and that of a ground pixel is on the ground."""
    district, renderer, pictures = town
    camera, picture = pictures[name]
    global_from_cam = renderer.global_from_ego(TIME) @ camera.ego_from_cam
    v, u = np.mgrid[: SIZE[0], : SIZE[1]]
    rays, seen = camera.unproject(np.stack([u, v], -1) + 0.5)
    np.testing.assert_array_equal(np.isnan(picture.distance), ~seen)
    hit = np.isfinite(picture.distance)
    points_cam = rays[hit] * picture.distance[hit][:, None]
    np.testing.assert_allclose(picture.depth[hit], points_cam[:, 2], rtol=1e-5, atol=1e-4)
    ahead = points_cam[:, 2] > 0.1
    off = by_others(camera.model, points_cam[ahead]) - (np.stack([u, v], -1)[hit][ahead] + 0.5)
    assert np.abs(off).max() < 0.01
    points = transform_points(global_from_cam, points_cam)
    flat = (picture.material[hit] > Material.SKY) & (picture.material[hit] <= Material.MARKING)
    near = flat & (picture.distance[hit] < 50)
    assert near.sum() > 500 and np.abs(points[near, 2]).max() < 0.02
    owners = picture.actor[hit]
    for k in np.unique(owners[owners >= 0]):
        xy, yaw = district.actors[k].trajectory.at(TIME)
        in_box = (points[owners == k] - (*xy, district.actors[k].size[2] / 2)) @ rigid_from_yaw(yaw)[:3, :3]
        assert (np.abs(in_box) <= np.array(district.actors[k].size) / 2 + 0.02).all()
    assert (owners >= 0).sum() > 100


def test_what_the_lens_does_not_show_is_black(town):
    camera, picture = town[2]["fisheye"]
    dark = np.isnan(picture.distance)
    assert 0.05 < dark.mean() < 0.6 and picture.rgb[dark].mean() < 8 < picture.rgb[~dark].mean()
    assert (picture.actor[dark] == -1).all()
    assert camera.sees(np.array([[0.0, 0, 5], [5, 0, 0.3], [0, 0, -5], [0, 0, 0.1]])).tolist() == [1, 1, 0, 0]


def test_old_towns_keep_their_cameras():
    """The order in which cameras are drawn decides the images of every seed."""
    camera = make_cameras(np.random.default_rng(5), (9, 16))[3]
    numbers = [
        *camera.img_from_cam[:2].ravel(),
        *camera.ego_from_cam[:3].ravel(),
        *camera.gain,
        camera.vignette,
        camera.noise,
    ]
    np.testing.assert_allclose(numbers, PINNED, atol=1e-9)


PINNED = (
    8.08342663375,
    0,
    8.00306480068,
    0,
    8.08342663375,
    4.42877241467,
    0.0252774425027,
    0.0160925593193,
    -0.99955093939,
    0.0575941441179,
    0.999642849108,
    0.00826799662611,
    0.025412879791,
    -0.0105695408871,
    0.00867324207001,
    -0.999836321488,
    -0.0158778180381,
    1.6060818385,
    1.00554483547,
    0.983186859791,
    0.96460680187,
    0.185355417507,
    0.0147902354382,
)


@pytest.fixture(scope="module")
def rig_town(tmp_path_factory):
    """A town of three cameras: one passes through to the network, one becomes a pinhole, one becomes three."""
    root = tmp_path_factory.mktemp("rig") / "town"
    ahead = Pinhole(fx=160.0, fy=160.0, cx=112.0, cy=60.0)
    rig = Rig(
        [
            mounted("wide", FISHEYE, (0, 20, 180), (-1, 0, 0.9), 95),
            mounted("ahead", ahead, (0, 0, 0), (1.6, 0, 1.5), size=(126, 224)),
            mounted("brown", BROWN.scaled(1.3), (-4, 6, 60), (1.2, 0.6, 1.4)),
        ]
    )
    simulate(root, scenes=1, seed=11, keyframes=2, workers=1, rig=rig)
    return root


IMAGE_SIZE = (40, 80)  # of small_network


@pytest.fixture(scope="module")
def rig_dataset(rig_town):
    with pytest.warns(match="rig.yaml: in the network's images"):
        return NuScenesDataset(rig_town, VERSION, "town_val", image_size=IMAGE_SIZE)


def test_tables_say_nothing_false_of_cameras_with_distortion(rig_town):
    nusc = NuScenes(VERSION, str(rig_town), verbose=False)
    rig = Rig.load(rig_town / VERSION / RIG_FILE)
    sample = nusc.sample[0]
    assert set(sample["data"]) == {*rig.names, "LIDAR_TOP"}
    for camera in rig:
        record = nusc.get("sample_data", sample["data"][camera.name])
        mount = nusc.get("calibrated_sensor", record["calibrated_sensor_token"])
        matrix = camera.model.img_from_cam.tolist() if isinstance(camera.model, Pinhole) else []
        assert mount["camera_intrinsic"] == matrix and record["timestamp"] == sample["timestamp"]
        with Image.open(rig_town / record["filename"]) as image:
            assert image.size == camera.image_size[::-1] == (record["width"], record["height"])
    with pytest.raises(IndexError):  # the devkit does not project with a matrix that it does not have
        nusc.get_sample_data(sample["data"]["wide"])
    assert len(nusc.get_sample_data(sample["data"]["ahead"])[1]) > 0
    assert inspect_dataset(rig_town) == (VERSION, [])
    imported = import_rig(rig_town / VERSION)
    assert [c.model for c in imported] == [c.model for c in rig] and imported["wide"].lens_angle == rig[
        "wide"
    ].lens_angle


def test_the_reader_gives_the_pinholes_of_live_use(rig_town, rig_dataset, small_network):
    rig = Rig.load(rig_town / VERSION / RIG_FILE)
    assert rig_dataset.cameras == ("wide_1", "wide_2", "wide_3", "ahead", "brown")
    virtual, predictor = (
        chosen_pinholes(rig, IMAGE_SIZE),
        Predictor(small_network, precision="float32", rig=rig, min_seen=0),
    )
    predicted = []
    for i in range(2):
        paths = dict(zip(rig.names, rig_dataset.index.image_path[i], strict=True))
        images = {name: np.asarray(Image.open(path.decode())) for name, path in paths.items()}
        frame = rig_dataset[i].frames
        expected, calibration = virtual.frame(images)
        for n, camera in enumerate(virtual.cameras):
            if not camera.is_unchanged:
                np.testing.assert_array_equal(frame.images[0, n].permute(1, 2, 0), expected[n])
        np.testing.assert_allclose(frame.rig.ego_from_cam[0], calibration.ego_from_cam, atol=1e-6)
        assert frame.rig.present.all() and frame.rig.present.shape == (1, 5)
        live = predictor.step(images, rig_dataset.ego_pose(i), float(rig_dataset.timestamps[i]))
        predicted.append(live)
    assert len(predicted[1].boxes.score) > 0
    provenance = provenance_of(rig_dataset)
    assert len(provenance.cameras) == 5 and provenance.height == pytest.approx((0.9, 1.5), abs=0.02)
    assert provenance.focal == pytest.approx((0.52, 0.72), abs=0.02)  # of the pinholes, not 0.25 of the fisheye


@pytest.mark.filterwarnings("ignore::perception.errors.PerceptionWarning")
def test_a_dataset_and_live_use_predict_the_same(rig_town, small_network):
    """Of cameras that become pinholes; of one that passes through, the dataset decodes the JPEG at a reduced size."""
    rig = Rig.load(rig_town / VERSION / RIG_FILE)
    rig = Rig([rig["wide"], rig["brown"]])
    dataset = NuScenesDataset(rig_town, VERSION, "town_val", image_size=IMAGE_SIZE, cameras=rig.names)
    stream = predict_stream(small_network, dataset).objects
    predictor = Predictor(small_network, precision="float32", rig=rig, min_seen=0)
    for i, token in enumerate(dataset.tokens):
        images = [np.asarray(Image.open(path.decode())) for path in dataset.index.image_path[i]]
        live = predictor.step(images, dataset.ego_pose(i), float(dataset.timestamps[i]))
        for field in ("center", "size", "score"):
            expected = getattr(stream[token].boxes, field)[stream[token].boxes.valid]
            torch.testing.assert_close(getattr(live.boxes, field), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(live.lines.points, stream[token].lines.points, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::perception.errors.PerceptionWarning")
def test_training_clips_of_a_rig(rig_town):
    augment = Augment(drop_camera=1.0, extrinsics_noise=1.0, corrupt=0.5)
    dataset = NuScenesDataset(rig_town, VERSION, "town_val", image_size=IMAGE_SIZE, augment=augment)
    clip = dataset[ClipRequest((0, 1), -1, (1, 2))]
    assert clip.frames.images.shape == (2, 5, 3, *IMAGE_SIZE) and clip.frames.rig.present.sum(1).tolist() == [4, 4]
    assert torch.isfinite(clip.frames.rig.img_from_cam).all() and clip.gt.boxes.valid.any()


def test_cameras_of_the_rig_file_can_be_chosen(rig_town):
    dataset = NuScenesDataset(rig_town, VERSION, "town_val", image_size=IMAGE_SIZE, cameras=("ahead",))
    assert dataset.cameras == ("ahead",) and dataset[0].frames.images.shape == (1, 1, 3, *IMAGE_SIZE)


def change_rig(root, folder, change):
    """A copy of the tables with another rig file; images stay where they are."""
    copy = folder / "copy"
    (copy / VERSION).mkdir(parents=True)
    for file in (root / VERSION).iterdir():
        (copy / VERSION / file.name).write_bytes(file.read_bytes())
    for name in ("samples", "maps"):
        (copy / name).symlink_to(root / name)
    rig = change(Rig.load(root / VERSION / RIG_FILE))
    if rig is not None:
        rig.save(copy / VERSION / RIG_FILE)
    else:
        (copy / VERSION / RIG_FILE).write_text("rig_format: 7\n")
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rig: Rig([rig["wide"], rig["ahead"], replace(rig["brown"], image_size=(244, 320))]),
         "sample_data.json of 320 x 240"),
        (lambda rig: Rig([rig["wide"], rig["ahead"]]), "camera_intrinsic"),
        (lambda rig: Rig([*rig, replace(rig["wide"], name="absent", ego_from_cam=RIG["omni"].ego_from_cam)]), None),
        (lambda rig: Rig([rig["wide"], rig["ahead"], replace(rig["brown"], ego_from_cam=RIG["omni"].ego_from_cam)]),
         "camera brown has another pose than in calibrated_sensor.json"),
        (lambda rig: None, "rig_format is 7"),
    ],
)  # fmt: skip
def test_rig_files_that_do_not_fit_the_tables(rig_town, tmp_path, change, message):
    copy = change_rig(rig_town, tmp_path, change)
    if message is None:  # a camera that no sample has is absent
        frame = NuScenesDataset(copy, VERSION, "town_val", image_size=IMAGE_SIZE)[0].frames
        assert frame.rig.present[0].tolist() == [True] * 5 + [False] * 3
        return
    with pytest.raises(DataError, match=message):
        NuScenesDataset(copy, VERSION, "town_val", image_size=IMAGE_SIZE)


def test_roots_of_different_rigs_are_refused(rig_town, tmp_path):
    other = change_rig(rig_town, tmp_path, lambda rig: Rig([rig["wide"], rig["brown"], rig["ahead"]]))
    with pytest.raises(DataError, match=f"have different cameras in {RIG_FILE}; give roots of one rig"):
        NuScenesDataset([rig_town, other], VERSION, "town_val", image_size=IMAGE_SIZE)


def test_rigs_that_cannot_be_rendered(tmp_path):
    many = [replace(RIG["pinhole"], name=f"c{k}") for k in range(13)]
    cases = [
        (many, "13 cameras; give at most 12"),
        ([replace(RIG["pinhole"], name="a/b")], "'a/b' gives a folder its name"),
        ([replace(RIG["pinhole"], name="LIDAR_TOP")], "LIDAR_TOP"),
        ([RIG["pinhole"], replace(RIG["brown"], name="Pinhole")], "in capitals"),
        ([mounted("low", Pinhole(**FOCAL), (0, 0, 0), (1, 0, 0.01))], "0.01 m above the ground"),
        (RIG.scaled(0.05), "12 x 16 pixels"),
    ]  # fmt: skip
    for cameras, message in cases:
        with pytest.raises(ConfigError, match=message):
            simulate(tmp_path / "town", scenes=1, seed=0, rig=cameras if isinstance(cameras, Rig) else Rig(cameras))
    assert not (tmp_path / "town").exists()


@pytest.mark.parametrize("name", RIG.names)
def test_a_scaled_rig_shows_the_same_at_another_size(name):
    camera, small = RIG[name], RIG.scaled(0.5)[name]
    assert small.image_size == (120, 160)
    rays, valid = camera.unproject(np.random.default_rng(0).uniform((0, 0), SIZE[::-1], (200, 2)))
    np.testing.assert_allclose(small.project(rays[valid])[0], camera.project(rays[valid])[0] / 2, atol=1e-6)
    with pytest.raises(DataError, match="give a number above 0"):
        RIG.scaled(0)


def test_simulate_takes_rigs_by_name_and_file(tmp_path, capsys):
    size = ["--scenes", "1", "--keyframes", "1", "--workers", "1"]
    main(
        [
            "--out",
            str(tmp_path / "town"),
            *size,
            "--rig",
            "front_camera",
            "--scale",
            "0.2",
            "--json",
            str(tmp_path / "a.json"),
        ]
    )
    assert json.loads((tmp_path / "a.json").read_text())["pictures"] == 1
    assert Rig.load(tmp_path / "town" / VERSION / RIG_FILE)["image_2"].image_size == (75, 248)
    capsys.readouterr()
    for arguments, message in (
        (["--rig", "nuscenes", "--image-size", "64x112"], "--image-size: the rig has the size"),
        (["--scale", "2"], "--scale belongs to --rig"),
    ):
        with pytest.raises(ConfigError, match=message):
            main(["--out", str(tmp_path / "other"), *size, *arguments])
