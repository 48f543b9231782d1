"""`perception rig check` against planted mistakes, right rigs, the renderer's images, and the ground of its buffers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy.spatial.transform import Rotation

from perception.cli import main
from perception.errors import ConfigError, DataError
from perception.rigs import Rig, RigCamera
from perception.rigs.check import check_rig, circular_runs, surround_view
from perception.rigs.models import Pinhole
from perception.rigs.rig import BODY_FROM_OPTICAL, SHIPPED, read_cameras, rigid_from_rpy
from perception.rigs.vanishing import LEAST_IMAGES, find_lines, measure_tilt
from perception.synthetic.render import TownRenderer
from perception.synthetic.scene import scene_district
from perception.synthetic.sensors import cameras_of
from perception.visualization.rig_check import draw_camera, draw_coverage

NUSCENES = yaml.safe_load((SHIPPED / "nuscenes.yaml").read_text())
FRONT, LEFT = "CAM_FRONT", "CAM_FRONT_LEFT"


def planted(change, tmp_path, of=NUSCENES):
    """The sentences of the check of a rig file in which `change` changed something."""
    content = json.loads(json.dumps(of))
    change(content["cameras"])
    (tmp_path / "rig.yaml").write_text(yaml.safe_dump(content))
    return [finding.sentence for finding in check_rig(read_cameras(tmp_path / "rig.yaml")[0]).findings]


def every(change):
    return lambda cameras: [change(camera) for camera in cameras.values()]


def optical(camera):
    pose = camera["ego_from_cam"]
    return rigid_from_rpy(np.radians(pose["roll_pitch_yaw_deg"]), pose["translation_m"]) @ BODY_FROM_OPTICAL


def set_pose(camera, matrix, axes="optical"):
    camera["ego_from_cam"] = {"axes": axes, "matrix": np.asarray(matrix).tolist()}


def scale_intrinsics(camera, factor, keys=("fx", "fy", "cx", "cy")):
    camera["intrinsics_px"] |= {key: camera["intrinsics_px"][key] * factor for key in keys}


def millimetres(camera):
    camera["ego_from_cam"]["translation_m"] = [1000 * x for x in camera["ego_from_cam"]["translation_m"]]


def degrees_as_radians(camera):
    camera["ego_from_cam"]["roll_pitch_yaw_rad"] = camera["ego_from_cam"].pop("roll_pitch_yaw_deg")


def radians_as_degrees(camera):
    pose = camera["ego_from_cam"]
    pose["roll_pitch_yaw_deg"] = [float(np.radians(x)) for x in pose["roll_pitch_yaw_deg"]]


def swap(camera, group, a, b):
    camera[group][a], camera[group][b] = camera[group][b], camera[group][a]


def exchange(cameras, a, b):
    cameras[a]["ego_from_cam"], cameras[b]["ego_from_cam"] = cameras[b]["ego_from_cam"], cameras[a]["ego_from_cam"]


def mirror(camera):
    pose = camera["ego_from_cam"]
    pose["translation_m"][1] *= -1
    pose["roll_pitch_yaw_deg"][2] *= -1


def to_frame(rotation, shift=(0, 0, 0)):
    """Poses in another vehicle frame."""

    def change(camera):
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = rotation, shift
        set_pose(camera, matrix @ optical(camera))

    return change


TURNED = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]  # a frame with x to the right and y ahead, as nuScenes' LiDAR


def reorder_quaternion(camera):
    xyzw = Rotation.from_matrix(optical(camera)[:3, :3]).as_quat().tolist()
    camera["ego_from_cam"] = {"axes": "optical", "translation_m": [1.5, 0.5, 1.5], "quaternion_wxyz": xyzw}


def copy_camera(cameras):
    cameras[LEFT] |= {key: cameras[FRONT][key] for key in ("ego_from_cam", "intrinsics_px")}


def look_up(camera):
    camera["ego_from_cam"]["roll_pitch_yaw_deg"][1] = -20


CAM_FROM_BODY = np.linalg.inv(BODY_FROM_OPTICAL)
MISTAKES = {
    "millimetres": (every(millimetres), "no vehicle is longer than 50; give metres (not millimetres)"),
    "normalised intrinsics": (every(lambda c: scale_intrinsics(c, 1 / 1600)), "(not millimetres, not 0..1)"),
    "focal length in millimetres": (lambda c: scale_intrinsics(c[FRONT], 0.004, ("fx", "fy")), "(not millimetres"),
    "another image size": (every(lambda c: scale_intrinsics(c, 0.5)), "centre of an image of about 490 x 820 pixels"),
    "width and height": (lambda c: swap(c[FRONT], "image_size_px", "width", "height"), "has its principal point at"),
    "cx and cy": (lambda c: swap(c[FRONT], "intrinsics_px", "cx", "cy"), "cx and cy are 490 and 820 px"),
    "unequal resize": (lambda c: scale_intrinsics(c[FRONT], 0.7, ("fx", "cx")), "and pixels of cameras are square"),
    "body axes": (every(lambda c: set_pose(c, optical(c) @ CAM_FROM_BODY)), "upwards, as a rotation for body axes"),
    "optical for body": (every(lambda c: set_pose(c, optical(c), "body")), "rolled by"),
    "inverted": (every(lambda c: set_pose(c, np.linalg.inv(optical(c)))), "cam_from_ego; give the inverses"),
    "one inverted": (
        lambda c: set_pose(c[FRONT], np.linalg.inv(optical(c[FRONT]))),
        "'CAM_FRONT': ego_from_cam is rolled",
    ),
    "left-handed": (
        every(lambda c: set_pose(c, optical(c) @ np.diag([-1, 1, 1, 1]))),
        "is left-handed, a mirror image",
    ),
    "mirrored": (every(mirror), "left and right are mirrored"),
    "left for right": (
        lambda c: exchange(c, LEFT, "CAM_FRONT_RIGHT"),
        "'CAM_FRONT_LEFT' looks 56 degrees to the right",
    ),
    "front for rear": (lambda c: exchange(c, FRONT, "CAM_BACK"), "'CAM_FRONT' looks to the rear, and its name says ah"),
    "copied pose": (copy_camera, "are the same pose"),
    "another vehicle frame": (every(to_frame(TURNED)), "the rig is turned by 90 degrees to the left"),
    "frame of the front camera": (every(to_frame(CAM_FROM_BODY[:3, :3])), "degrees upwards"),
    "z down": (every(to_frame(np.diag([1, -1, -1]))), "is rolled by"),
    "origin on the roof": (every(to_frame(np.eye(3), (0, 0, -1.9))), "is at a height of -0."),
    "origin at the camera": (
        every(to_frame(np.eye(3), (0, 0, -1.45))),
        "0.06 m above the ground; the origin of the ego",
    ),
    "sign of the pitch": (lambda c: look_up(c[FRONT]), "20 degrees upwards; a positive pitch"),
    "degrees as radians": (every(degrees_as_radians), "radians; give roll_pitch_yaw_deg"),
    "radians as degrees": (every(radians_as_degrees), "'CAM_BACK' looks ahead, and its name says to the rear"),
    "order of the quaternion": (lambda c: reorder_quaternion(c[LEFT]), "'CAM_FRONT_LEFT'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_planted_mistakes_are_named(name, tmp_path):
    change, words = MISTAKES[name]
    sentences = planted(change, tmp_path)
    assert any(words in sentence for sentence in sentences), sentences


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_rigs_of_the_library_have_no_finding(path):
    report = check_rig(read_cameras(path)[0])
    assert report.findings == () and len(report.cameras) == len(Rig.load(path))


def test_every_wrong_camera_is_named(tmp_path):
    def change(cameras):
        scale_intrinsics(cameras[FRONT], 1e-3)
        cameras[LEFT]["ego_from_cam"] = {"axes": "optical"}
        cameras["CAM_BACK"]["ego_from_cam"]["translation_m"][2] = -0.5

    sentences = planted(change, tmp_path)
    assert len(sentences) == 3
    for name in (FRONT, LEFT, "CAM_BACK"):
        assert any(f"camera '{name}'" in sentence for sentence in sentences)


def stereo(shift):
    pose = rigid_from_rpy((0, 0, 0), (1, shift, 1.5)) @ BODY_FROM_OPTICAL
    return Pinhole(fx=700, fy=700, cx=600, cy=200), (400, 1200), pose


def test_a_stereo_pair_on_the_wrong_sides(tmp_path):
    for sign, count in ((1, 0), (-1, 1)):
        pair = {}
        for name, shift in (("stereoLeft", 0.3), ("stereoRight", -0.3)):
            model, size, pose = stereo(sign * shift)
            pair[name] = RigCamera(name, size, model, pose)
        findings = check_rig(pair).findings
        assert len(findings) == count and all("stands to the right of" in f.sentence for f in findings)


def test_what_is_seen_agrees_with_closed_forms():
    """One level camera of 90 degrees at the origin sees a quarter of the circle, and the ground from h / tan(v)."""
    pose = rigid_from_rpy((0, 0, 0), (0, 0, 2.0)) @ BODY_FROM_OPTICAL
    camera = RigCamera("one", (400, 800), Pinhole(fx=400, fy=400, cx=400, cy=200), pose)
    view = surround_view([camera])
    assert view.sectors.sum() == 90 and view.blind_sectors() == [(45, 315)] and view.overlaps() == []
    x = np.arange(-50, 50) + 0.5
    expected = (x[:, None] >= 4.0) & (np.abs(x[None]) <= x[:, None])  # the lower edge is 26.6 degrees below the axis
    np.testing.assert_array_equal(view.cells[0], expected)
    assert view.unseen_share() == pytest.approx(1 - expected.mean())
    other = replace(camera, name="two", ego_from_cam=rigid_from_rpy((0, 0, np.pi / 3), (0, 0, 2.0)) @ BODY_FROM_OPTICAL)
    both = surround_view([camera, other])
    assert both.overlaps() == [("one", "two", 30)] and both.blind_sectors() == [(105, 315)]
    assert surround_view([]).blind_sectors() == [(0, 360)]
    marked = np.zeros(360, bool)
    marked[[0, 1, 359, 100]] = True
    assert circular_runs(marked) == [(100, 101), (359, 362)] and circular_runs(~np.zeros(360, bool)) == [(0, 360)]


@pytest.fixture(scope="module")
def drive():
    """Images of a front and a side camera in three places of a town, and the rig."""
    rig = Rig.load("nuscenes").scaled(0.45)
    rig = Rig([rig["CAM_FRONT"], rig["CAM_BACK_LEFT"]])
    images = {name: [] for name in rig.names}
    renderer = TownRenderer(scene_district(9, 0, 4), np.random.default_rng(0))
    cameras = cameras_of(rig, np.random.default_rng(1))
    for time in (0.1, 0.9, 1.6):
        for camera in cameras:
            images[camera.name].append(renderer.camera(camera, time, np.random.default_rng(2)).rgb)
    return rig, images


@pytest.fixture(scope="module")
def lines(drive):
    rig, images = drive
    return {name: [find_lines(image, rig[name]) for image in images[name]] for name in rig.names}


def miscalibrated(camera, rpy_deg):
    """A camera whose file lacks a rotation by these angles (of its body axes) that it has on the vehicle."""
    turn = BODY_FROM_OPTICAL.T @ rigid_from_rpy(-np.radians(rpy_deg)) @ BODY_FROM_OPTICAL
    return replace(camera, ego_from_cam=camera.ego_from_cam @ turn)


@pytest.mark.slow
@pytest.mark.parametrize("rpy_deg", [(0, 0, 0), (0, 4, 0), (0, -5, 0), (4, 0, 0), (-4, 0, 0), (0, 0, 6), (0, 0, -8)])
def test_lines_show_how_a_camera_really_stands(drive, lines, rpy_deg):
    rig, _ = drive
    for name in rig.names:
        tilt = measure_tilt(lines[name], miscalibrated(rig[name], rpy_deg))
        assert tilt.roll_deg == pytest.approx(rpy_deg[0], abs=0.3) and tilt.pitch_deg == pytest.approx(
            rpy_deg[1], abs=0.3
        )
        assert (tilt.yaw_deg is None) == (name != "CAM_FRONT")  # a camera to the side does not see where the road leads
        if name == "CAM_FRONT":
            assert tilt.yaw_deg == pytest.approx(rpy_deg[2], abs=0.5)
            assert bool(tilt.finding()) == any(rpy_deg)
    one = measure_tilt(lines["CAM_FRONT"][: LEAST_IMAGES - 1], rig["CAM_FRONT"])
    assert one.yaw_deg is None


def test_pictures_without_lines_show_nothing():
    camera = Rig.load("nuscenes").scaled(0.2)["CAM_FRONT"]
    noise = np.random.default_rng(0).integers(0, 256, (*camera.image_size, 3), dtype=np.uint8)
    for image in (noise, np.zeros_like(noise)):
        tilt = measure_tilt([find_lines(image, camera)] * 3, camera)
        assert (
            tilt.pitch_deg is tilt.roll_deg is tilt.yaw_deg is None
            and str(tilt) == "too few lines"
            and not tilt.finding()
        )


def run(*arguments):
    return main(["rig", *map(str, arguments)])


@pytest.mark.slow
def test_check_of_a_drive(drive, tmp_path, capsys):
    rig, images = drive
    for name, of_camera in images.items():
        for k, image in enumerate(of_camera):
            Image.fromarray(image).save(tmp_path / f"n{k}__{name}__{k}.png")
    rig.save(tmp_path / "rig.yaml")
    assert run("check", tmp_path / "rig.yaml", "--images", tmp_path, "--json", tmp_path / "a.json") == 0
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["findings"] == [] and content["cameras"]["CAM_FRONT"]["from_images"]["verticals"] > 24
    Rig([miscalibrated(rig["CAM_FRONT"], (0, 5, 0)), rig["CAM_BACK_LEFT"]]).save(tmp_path / "wrong.yaml")
    assert run("check", tmp_path / "wrong.yaml", "--images", tmp_path) == 1
    assert "looks 5.0 degrees farther downwards (pitch;" in capsys.readouterr().out


def test_lines_of_a_real_image(real_keyframe):
    """A right calibration has no finding, and a planted pitch is found, in one image of a street with buildings."""
    info = json.loads((real_keyframe / "sample.json").read_text())["data_list"][0]["images"]["CAM_BACK"]
    image = np.asarray(Image.open(real_keyframe / info["img_path"].rpartition("/")[2]).convert("RGB"))
    (fx, _, cx), (_, fy, cy), _ = info["cam2img"]
    pose = np.array(info["cam2ego"])
    camera = RigCamera("CAM_BACK", image.shape[:2], Pinhole(fx=fx, fy=fy, cx=cx, cy=cy), pose)
    lines = [find_lines(image, camera)]
    right, wrong = measure_tilt(lines, camera), measure_tilt(lines, miscalibrated(camera, (0, 5, 0)))
    assert not right.finding() and abs(right.pitch_deg) < 2 and abs(right.roll_deg) < 2
    assert "farther downwards (pitch;" in wrong.finding() and wrong.pitch_deg - right.pitch_deg == pytest.approx(
        5, abs=0.5
    )


SMALL = Rig.load("nuscenes").scaled(0.1)


@pytest.fixture
def folder(tmp_path):
    """Images of two cameras without anything in them that is a line."""
    rng = np.random.default_rng(0)
    for name in ("CAM_FRONT", "CAM_BACK"):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8))
        (tmp_path / "images" / name).mkdir(parents=True)
        coarse.resize((160, 90), Image.Resampling.BICUBIC).save(tmp_path / "images" / name / "1.png")
    return tmp_path / "images"


def test_check_writes_pictures_and_a_page(folder, tmp_path, capsys):
    SMALL.save(tmp_path / "rig.yaml")
    out = tmp_path / "out"
    assert run("check", tmp_path / "rig.yaml", "--images", folder, "--out", out, "--json", tmp_path / "a.json") == 0
    assert "too few lines" in capsys.readouterr().out
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["findings"] == [] and set(content["cameras"]) == set(SMALL.names)
    assert content["cameras"]["CAM_FRONT"]["from_images"]["pitch_deg"] is None
    assert {p.name for p in out.iterdir()} == {"coverage.png", "index.html", *(f"{name}.png" for name in SMALL.names)}
    page = (out / "index.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 7 and "No finding." in page

    Rig.load("nuscenes").save(tmp_path / "large.yaml")
    assert run("check", tmp_path / "large.yaml", "--images", folder, "--out", out) == 1
    words = "images of 1600 x 900 pixels (width x height), and its images have 160 x 90"
    assert words in capsys.readouterr().out and words in (out / "index.html").read_text()


def test_images_are_judged_as_in_live_use(folder):
    front = np.asarray(Image.open(folder / "CAM_FRONT" / "1.png"))
    entries = {camera.name: camera for camera in SMALL}
    turned = {name: [np.ascontiguousarray(np.rot90(front))] for name in ("CAM_FRONT",)}
    sentences = [finding.sentence for finding in check_rig(entries, turned).findings]
    assert len(sentences) == 1 and "they are turned by 90 degrees" in sentences[0]
    sentences = [f.sentence for f in check_rig(entries, {"CAM_FRONT": [front], "CAM_BACK_LEFT": [front]}).findings]
    assert "images['CAM_FRONT'] and images['CAM_BACK_LEFT'] are the same picture" in sentences[0]


def test_the_drawn_ground_lies_on_the_ground():
    """Posts and lines are drawn where the closed form of a level pinhole has them."""
    pose = rigid_from_rpy((0, 0, 0), (0, 0, 1.5)) @ BODY_FROM_OPTICAL
    camera = RigCamera("front", (480, 960), Pinhole(fx=600, fy=600, cx=480, cy=240), pose)
    picture = np.asarray(draw_camera(camera)).astype(int)
    yellow = (picture[..., 0] > 150) & (picture[..., 2] < 100)
    rows = np.flatnonzero(yellow.mean(1) > 0.5)
    assert len(rows) and abs(rows.mean() + 0.5 - 240) <= 1  # the horizon
    white = (picture[:, 480 + 300 - 12 : 480 + 300 + 13] > 200).all(-1)  # the post at 20 m ahead, 10 m to the right
    v = np.flatnonzero(white.any(1))
    assert abs(v.max() - (240 + 600 * 1.5 / 20)) <= 2 and abs(v.min() - (240 - 600 * 0.2 / 20)) <= 2
    coverage = draw_coverage([camera], surround_view([camera]), size=400)
    assert coverage.size == (400, 400)
    assert coverage.getpixel((200, 60)) != coverage.getpixel((200, 340))  # ahead is up


def test_cameras_whose_images_are_searched(tmp_path):
    for name in ("CAM_BACK/1.jpg", "CAM_BACK_LEFT/1.jpg", "x/a__CAM_BACK_LEFT__2.png", "notes.txt", "other.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    from perception.cli.rig import images_of

    found = images_of(tmp_path, ["CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT"])
    assert {name: len(paths) for name, paths in found.items()} == {"CAM_BACK": 1, "CAM_BACK_LEFT": 2}
    with pytest.raises(DataError, match="has no image of CAM_FRONT"):
        images_of(tmp_path, ["CAM_FRONT"])
    with pytest.raises(DataError, match="is not a folder"):
        images_of(tmp_path / "none", ["CAM_FRONT"])


def test_import_and_show(tmp_path, capsys):
    rows = ["P2: 721.5 0 609.6 0 0 721.5 172.9 0 0 0 1 0", "R0_rect: 1 0 0 0 1 0 0 0 1"]
    rows += ["Tr_velo_to_cam: 0 -1 0 0 0 0 -1 -0.08 1 0 0 -0.27", "Tr_imu_to_velo: 1 0 0 -0.81 0 1 0 0.32 0 0 1 -0.8"]
    (tmp_path / "calib.txt").write_text("\n".join(rows) + "\n")
    code = run("import", tmp_path / "calib.txt", "--image-size", "375x1242", "--out", tmp_path / "rig.yaml")
    assert code == 0 and "1242 x 375" in capsys.readouterr().out
    assert run("show", tmp_path / "rig.yaml") == 0 and run("check", tmp_path / "rig.yaml") == 0
    assert "no camera sees" in capsys.readouterr().out
    assert run("show", "nuscenes") == 0 and "CAM_FRONT and CAM_FRONT_RIGHT 6" in capsys.readouterr().out
    pose = ["--ego-from-vehicle", "0.5", "0", "0.8", "0", "0", "90"]
    run("import", tmp_path / "calib.txt", "--image-size", "375x1242", "--out", tmp_path / "turned.json", *pose)
    before, after = (Rig.load(tmp_path / name)["P2"].ego_from_cam for name in ("rig.yaml", "turned.json"))
    np.testing.assert_allclose(after[:3, 3], [0.5 - before[1, 3], before[0, 3], before[2, 3] - 0.93 + 0.8], atol=1e-9)
    with pytest.raises(DataError, match="there is no rig 'nuscene'"):
        run("check", "nuscene")
    with pytest.raises(ConfigError, match="--out"):
        run("check", "nuscenes", "--out", tmp_path / "calib.txt")
