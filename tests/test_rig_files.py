"""Rig files: what is written is read back, every mistake is named, and the JSON Schema agrees with the reader."""

import copy
import json
import math
import re
from contextlib import contextmanager

import numpy as np
import pytest
import yaml
from conftest import PROJECT

from perception.errors import DataError
from perception.geometry import rigid_from_quaternion
from perception.rigs import Rig, RigCamera
from perception.rigs.models import BrownConrady, FTheta, KannalaBrandt, Mei, Pinhole
from perception.rigs.rig import SCHEMA, SHIPPED, rigid_from_rpy
from perception.types import NumpyCameraRig

FOCAL = {"fx": 1085.2, "fy": 1079.6, "cx": 622.8, "cy": 502.5}
SIZE = {"width": 1280, "height": 1024}
LOOKS_AHEAD = [[0.0, 0.0, 1.0, 1.7], [-1.0, 0.0, 0.0, 0.1], [0.0, -1.0, 0.0, 1.5], [0.0, 0.0, 0.0, 1.0]]
SHIPPED_FILES = sorted(SHIPPED.glob("*.yaml"))


@contextmanager
def refused(words: str):
    """The block raises a DataError of one line that holds these words."""
    with pytest.raises(DataError) as error:
        yield
    assert words in str(error.value) and "\n" not in str(error.value)


def pinhole(**changes) -> dict:
    """An entry of a rig file."""
    pose = {"axes": "optical", "matrix": copy.deepcopy(LOOKS_AHEAD)}
    entry = {"image_size_px": dict(SIZE), "model": "pinhole", "intrinsics_px": dict(FOCAL), "ego_from_cam": pose}
    return {key: value for key, value in {**entry, **changes}.items() if value is not None}


def written(folder, front: dict, suffix=".yaml", **root):
    path = folder / f"rig{suffix}"
    content = {"rig_format": 1, "cameras": {"front": front}, **root}
    path.write_text(json.dumps(content) if suffix == ".json" else yaml.safe_dump(content))
    return path


def schema_errors(content) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema", reason="the JSON Schema is checked with jsonschema")
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(content)]


def all_models() -> Rig:
    models = {
        "front": Pinhole(**FOCAL, skew=0.25),
        "left": BrownConrady(**FOCAL, distortion=(-0.27, 0.13, 5e-5, -0.00048)),
        "right": BrownConrady(**FOCAL, distortion=(0.9, 0.2, -2e-5, -1e-5, 0.003, 1.3, 0.4, 0.03, 1e-3, 0, 1e-4, 0)),
        "wide": KannalaBrandt(**FOCAL, distortion=(0.05, -0.008, 0.002, -0.0004)),
        "mirror": Mei(**{**FOCAL, "fx": 1336.0}, xi=2.2, distortion=(0.017, 1.65, 4e-4, 4e-4)),
        "Überblick": FTheta(cx=640.0, cy=512.0, polynomial=(330.0, 0.0, -12.5)),
    }
    return Rig(
        [
            RigCamera(
                name,
                (1024, 1280),
                model,
                rigid_from_rpy((-1.8, 0.02, -1.6 + 0.3 * k), (1 / 3, 0.1 * k, 1.5)),
                1.4 + 0.3 * k,
            )
            for k, (name, model) in enumerate(models.items())
        ]
    )


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_rig_is_read_back_to_the_last_digit(tmp_path, suffix):
    rig = all_models()
    rig.save(tmp_path / f"rig{suffix}")
    again = Rig.load(tmp_path / f"rig{suffix}")
    assert again.names == rig.names == ("front", "left", "right", "wide", "mirror", "Überblick")
    for camera in rig:
        assert again[camera.name].model == camera.model
        assert again[camera.name].image_size == camera.image_size
        np.testing.assert_array_equal(again[camera.name].ego_from_cam, camera.ego_from_cam)
        assert again[camera.name].lens_angle == pytest.approx(camera.lens_angle, rel=1e-15)
    text = (tmp_path / f"rig{suffix}").read_text(encoding="utf-8")
    assert schema_errors(json.loads(text) if suffix == ".json" else yaml.safe_load(text)) == []
    with refused("rig.txt cannot be written as a rig file; give a name that ends with .yaml"):
        rig.save(tmp_path / "rig.txt")


ROOT = math.sqrt(0.5)
POSES = {  # one pose of a camera that looks ahead, 10 degrees downwards, in all ways to write it
    "matrix": {"axes": "body", "matrix": rigid_from_rpy((0, math.radians(10), 0), (1.7, 0.1, 1.5)).tolist()},
    "degrees": {"axes": "body", "translation_m": [1.7, 0.1, 1.5], "roll_pitch_yaw_deg": [0, 10, 0]},
    "radians": {"axes": "body", "translation_m": [1.7, 0.1, 1.5], "roll_pitch_yaw_rad": [0, math.radians(10), 0]},
    "optical": {"axes": "optical", "translation_m": [1.7, 0.1, 1.5], "roll_pitch_yaw_deg": [-100, 0, -90]},
    "quaternion": {
        "axes": "body",
        "translation_m": [1.7, 0.1, 1.5],
        "quaternion_wxyz": [math.cos(math.radians(5)), 0, math.sin(math.radians(5)), 0],
    },
}


@pytest.mark.parametrize("name", POSES)
def test_every_way_to_write_a_pose(tmp_path, name):
    camera = Rig.load(written(tmp_path, pinhole(ego_from_cam=POSES[name])))["front"]
    down = math.radians(10)
    right, below, ahead = (
        np.array([0, -1, 0]),
        [-math.sin(down), 0, -math.cos(down)],
        [math.cos(down), 0, -math.sin(down)],
    )
    np.testing.assert_allclose(camera.ego_from_cam[:3, :3], np.stack([right, below, ahead], 1), atol=1e-12)
    np.testing.assert_array_equal(camera.ego_from_cam[:3, 3], [1.7, 0.1, 1.5])
    assert schema_errors(yaml.safe_load((tmp_path / "rig.yaml").read_text())) == []


def test_roll_pitch_yaw_are_those_of_ros():
    """Against a product of quaternions: yaw after pitch after roll, about fixed axes."""
    rpy = (-0.025, 0.315, 1.035)
    pose = np.eye(4)
    for angle, axis in zip(rpy, np.eye(3), strict=True):
        pose = rigid_from_quaternion([math.cos(angle / 2), *math.sin(angle / 2) * axis], np.zeros(3)) @ pose
    np.testing.assert_allclose(rigid_from_rpy(rpy), pose, atol=1e-15)


def test_pixel_centers_at_whole_numbers_are_moved(tmp_path):
    """A principal point of OpenCV, whose pixel centres are whole numbers."""
    model = Rig.load(written(tmp_path, pinhole(), pixel_center=0))["front"].model
    assert (model.cx, model.cy, model.fx) == (FOCAL["cx"] + 0.5, FOCAL["cy"] + 0.5, FOCAL["fx"])
    assert Rig.load(written(tmp_path, pinhole(), pixel_center=0.5))["front"].model.cx == FOCAL["cx"]
    assert Rig.load(written(tmp_path, pinhole()))["front"].model.cx == FOCAL["cx"]


def test_numbers_may_be_written_as_in_json(tmp_path):
    """1e3 is text in YAML 1.1, and a number for everybody else."""
    path = written(tmp_path, pinhole())
    path.write_text(path.read_text().replace("1085.2", "10852e-1"))
    assert Rig.load(path)["front"].model.fx == 1085.2


def test_entries_may_share_values(tmp_path):
    """YAML's anchors and merge keys: what stands beside a merge replaces it."""
    path = tmp_path / "rig.yaml"
    path.write_text("""
rig_format: 1
description: two cameras of one kind
cameras:
  left: &camera
    image_size_px: {width: 1280, height: 1024}
    model: pinhole
    intrinsics_px: {fx: 1000, fy: 1000, cx: 640, cy: 512}
    ego_from_cam: {axes: body, translation_m: [1, 0.5, 1.5], roll_pitch_yaw_deg: [0, 0, 90]}
  right:
    <<: *camera
    ego_from_cam: {axes: body, translation_m: [1, -0.5, 1.5], roll_pitch_yaw_deg: [0, 0, -90]}
""")
    rig = Rig.load(path)
    assert rig["left"].model == rig["right"].model
    assert [camera.ego_from_cam[1, 3] for camera in rig] == [0.5, -0.5]
    with refused("description is 3; give text"):
        Rig.load(written(tmp_path, pinhole(), description=3))


CHANGES = {
    "unknown key": (
        {"image_size": SIZE},
        "camera 'front' has the unknown key 'image_size'; did you mean image_size_px",
    ),
    "unknown model": ({"model": "pinhol"}, 'model is "pinhol"; did you mean pinhole?'),
    "no model": ({"model": None}, "camera 'front' has no model; it has "),
    "distortion of a pinhole": ({"distortion": [0.1]}, "camera 'front' has the unknown key 'distortion'"),
    "coefficients": (
        {"model": "brown_conrady", "distortion": [0.1, 0.2, 0.3]},
        "camera 'front': distortion of the brown_conrady model has 3 coefficients",
    ),
    "text": ({"intrinsics_px": {**FOCAL, "fx": "wide"}}, 'intrinsics_px: fx is "wide"; give a number'),
    "no number": ({"intrinsics_px": {**FOCAL, "fx": math.nan}}, "intrinsics_px: fx is NaN; give a number"),
    "negative": ({"intrinsics_px": {**FOCAL, "fy": -1}}, "camera 'front': fx, fy, cx, cy, skew of the pinhole model"),
    "missing": ({"intrinsics_px": {"fx": 1, "fy": 1, "cx": 1}}, "camera 'front': intrinsics_px has no cy; it has"),
    "half a pixel": ({"image_size_px": {"width": 12.5, "height": 9}}, "width is 12.5; give a whole number of pixels"),
    "wide": ({"max_angle_deg": 190}, "camera 'front': max_angle_deg is 190; give up to 180 degrees"),
    "size as a list": ({"image_size_px": [1280, 1024]}, "image_size_px is [1280, 1024]; give keys and values"),
    "millimetres": (
        {"intrinsics_px": {**FOCAL, "fx": 4.2, "fy": 4.2}},
        "camera 'front' has focal lengths of 4.2 and 4.2 px, and an image of 1024 x 1280",
    ),
    "another image": ({"image_size_px": {"width": 64, "height": 48}}, "camera 'front' has its principal point at"),
}
NO_TRANSLATION = {"axes": "body", "roll_pitch_yaw_deg": [0, 0, 0]}
POSE_CHANGES = {
    "no axes": ({"axes": None}, "ego_from_cam has no axes; it has matrix"),
    "other axes": ({"axes": "ros"}, 'axes is "ros"; give one of optical, body'),
    "two ways": ({"translation_m": [0, 0, 0]}, "ego_from_cam has a matrix and other fields"),
    "shape": ({"matrix": [[1, 0], [0, 1]]}, "matrix is [[1, 0], [0, 1]]; give 4 rows of 4 numbers"),
    "ragged": ({"matrix": [[1, 0], [0]]}, "matrix is [[1, 0], [0]]; give 4 rows of 4 numbers"),
    "no unit": ({"matrix": None, "translation": [0, 0, 1]}, "unknown key 'translation'; did you mean translation_m"),
    "no rotation": ({"matrix": None, "translation_m": [0, 0, 1]}, "ego_from_cam has no rotation; give a matrix, or"),
    "no translation": ({"matrix": None, **NO_TRANSLATION}, "ego_from_cam has no translation_m; it has"),
    "degrees": (
        {"matrix": None, "axes": "body", "translation_m": [0, 0, 1], "roll_pitch_yaw_rad": [0, 10, 90]},
        "roll_pitch_yaw_rad has 90 radians; give roll_pitch_yaw_deg",
    ),
    "quaternion": (
        {"matrix": None, "translation_m": [0, 0, 1], "quaternion_wxyz": [1, 1, 0, 0]},
        "quaternion_wxyz has length 1.41; give a unit one, w x y z",
    ),
    "no rotation matrix": (
        {"matrix": (2 * np.eye(4)).tolist()},
        "camera 'front': ego_from_cam is not a rigid transform; give finite numbers and 0 0 0 1 in the last row",
    ),
    "millimetres": (
        {"matrix": None, "translation_m": [1700, 0, 1500], "quaternion_wxyz": [0.5, -0.5, 0.5, -0.5]},
        "camera 'front': ego_from_cam is 1700 m from the ego origin",
    ),
}


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
@pytest.mark.parametrize("name", [*CHANGES, *(f"pose: {name}" for name in POSE_CHANGES)])
def test_mistakes_are_named(tmp_path, name, suffix):
    entry = pinhole()
    if name.startswith("pose: "):
        changes, words = POSE_CHANGES[name.removeprefix("pose: ")]
        entry["ego_from_cam"] = {k: v for k, v in {**entry["ego_from_cam"], **changes}.items() if v is not None}
    else:
        changes, words = CHANGES[name]
        entry = pinhole(**changes)
    path = written(tmp_path, entry, suffix)
    with pytest.raises(DataError) as error:
        Rig.load(path)
    assert words in str(error.value)
    assert str(error.value).startswith(f"{path}: ") and str(error.value).count(str(path)) == 1
    assert "camera 'front'" in str(error.value)


def test_mistakes_of_the_whole_file_are_named(tmp_path):
    path = tmp_path / "rig.yaml"
    cases = {
        "": "is null or missing; give keys and values",
        "cameras: {}": "has no rig_format; it has cameras",
        "rig_format: 2\ncameras: {}": "rig_format is 2; this version reads 1",
        "rig_format: 1\ncameras: {}": "the rig has no cameras; give at least one",
        "rig_format: 1\ncamera: {}": "unknown key 'camera'; did you mean cameras?",
        "rig_format: 1\npixel_center: 1\ncameras: {}": "pixel_center is 1; give 0.5, or 0",
        "rig_format: 1\nrig_format: 1": "the key 'rig_format' stands twice",
        "rig_format: 1\ncameras: {0: {}}": "cameras has the key 0, which is no text; write it in quotes",
        "rig_format: [1": "is not YAML",
        "cameras: !!python/object:os.system {}": "is not YAML",
    }
    for text, words in cases.items():
        path.write_text(text)
        with pytest.raises(DataError) as error:
            Rig.load(path)
        assert words in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "rig.json").write_text('{"rig_format": 1, "rig_format": 1}')
    with refused("rig.json is not JSON (the key 'rig_format' stands twice)"):
        Rig.load(tmp_path / "rig.json")
    with refused("nowhere.yaml does not exist; give a rig file"):
        Rig.load(tmp_path / "nowhere.yaml")
    with refused("there is no rig 'nuscene'; give a file, or one of argoverse2"):
        Rig.load("nuscene")


def test_the_schema_refuses_what_the_reader_refuses(tmp_path):
    """Mistakes of form; the schema knows nothing of vehicles."""
    for name in ("unknown key", "unknown model", "no model", "distortion of a pinhole", "coefficients", "text",
                 "negative", "missing", "half a pixel", "size as a list", "wide"):  # fmt: skip
        assert schema_errors({"rig_format": 1, "cameras": {"front": pinhole(**CHANGES[name][0])}}), name
    for name in ("no axes", "other axes", "two ways", "shape", "no unit", "no rotation", "no translation"):
        pose = {**pinhole()["ego_from_cam"], **POSE_CHANGES[name][0]}
        pose = {key: value for key, value in pose.items() if value is not None}
        assert schema_errors({"rig_format": 1, "cameras": {"front": pinhole(ego_from_cam=pose)}}), name
    assert schema_errors({"rig_format": 1, "cameras": {"front": pinhole()}}) == []


LIDAR = {"translation_m": [0.94, 0.01, 1.84], "roll_pitch_yaw_deg": [0.4, 1.5, -90.0]}


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_the_pose_of_the_lidar_is_read_back(tmp_path, suffix):
    rig = Rig.load(written(tmp_path, pinhole(), ego_from_lidar=LIDAR))
    wanted = rigid_from_rpy(np.radians([0.4, 1.5, -90.0]), (0.94, 0.01, 1.84))
    np.testing.assert_allclose(rig.ego_from_lidar, wanted, atol=1e-12)
    rig.scaled(0.5).save(tmp_path / f"again{suffix}")
    np.testing.assert_array_equal(Rig.load(tmp_path / f"again{suffix}").ego_from_lidar, rig.ego_from_lidar)
    assert Rig.load(written(tmp_path, pinhole())).ego_from_lidar is None


@pytest.mark.parametrize(
    "change, words",
    [
        ({"roll_pitch_yaw_deg": [0, 0, 0]}, "ego_from_lidar: the LiDAR's y axis does not point ahead"),
        ({"roll_pitch_yaw_deg": [180, 0, -90]}, "its z axis not up; give the pose of a frame with x right, y ahead"),
        ({"axes": "body"}, "unknown key 'axes'"),
        ({"roll_pitch_yaw_deg": None}, "ego_from_lidar has no rotation; give a matrix"),
        ({"matrix": np.eye(4).tolist()}, "has a matrix and other fields"),
    ],
)
def test_mistakes_in_the_pose_of_the_lidar_are_named(tmp_path, change, words):
    pose = {key: value for key, value in (LIDAR | change).items() if value is not None}
    with refused(words):
        Rig.load(written(tmp_path, pinhole(), ego_from_lidar=pose))
    with refused("ego_from_lidar is not a rigid transform"):
        Rig([RigCamera("front", (1024, 1280), Pinhole(**FOCAL), np.array(LOOKS_AHEAD))], np.ones((4, 4)))
    content = {"rig_format": 1, "cameras": {"front": pinhole()}, "ego_from_lidar": pose}
    assert bool(schema_errors(content)) == ("axis" not in words)  # the schema knows nothing of vehicles


def test_a_camera_knows_its_field_of_view():
    size = (1024, 1280)
    model = Pinhole(fx=640.0, fy=640.0, cx=640.0, cy=512.0)
    camera = RigCamera("front", size, model, np.array(LOOKS_AHEAD))
    assert camera.max_angle == pytest.approx(math.atan(math.hypot(640, 512) / 640), abs=1e-12)
    uv, valid = camera.project([[0, 0, 5], [4.9, 0, 5], [5.1, 0, 5], [0, 0, -5]])
    assert valid.tolist() == [True, True, False, False]
    assert np.isfinite(uv[2]).all() and np.isnan(uv[3]).all()
    assert camera.unproject([[0.5, 0.5], [-0.5, 0.5], [1280.5, 3]])[1].tolist() == [True, False, False]
    # The image circle of a fisheye is smaller than its image.
    fisheye = KannalaBrandt(fx=200.0, fy=200.0, cx=640.0, cy=512.0, distortion=(-0.1, 0.0, 0.0, 0.0))
    assert RigCamera("wide", size, fisheye, np.array(LOOKS_AHEAD)).max_angle == fisheye.max_angle
    # A polynomial that goes on beyond the lens.
    camera = Rig.load("surround_fisheye")["front"]
    assert camera.model.max_angle > math.radians(120) and camera.max_angle == math.radians(95)
    rays = np.array([[math.sin(math.radians(a)), 0, math.cos(math.radians(a))] for a in (94.9, 95.1)])
    uv, valid = camera.project(rays)
    assert valid.tolist() == camera.unproject(uv)[1].tolist() == [True, False]


def test_a_rig_of_pinholes_is_the_input_of_the_predictor():
    other = np.array(LOOKS_AHEAD) @ np.diag([-1.0, 1, -1, 1])
    cameras = [
        RigCamera("front", (1024, 1280), Pinhole(**FOCAL), np.array(LOOKS_AHEAD)),
        RigCamera("back", (1024, 1280), Pinhole(**{**FOCAL, "fx": 900.0}), other),
    ]
    rig = Rig(cameras).camera_rig()
    assert isinstance(rig, NumpyCameraRig) and rig.present.all()
    np.testing.assert_array_equal(rig.img_from_cam[1], [[900, 0, 622.8], [0, 1079.6, 502.5], [0, 0, 1]])
    np.testing.assert_array_equal(rig.ego_from_cam, [LOOKS_AHEAD, other])
    np.testing.assert_array_equal(Rig(cameras).camera_rig(["back"]).ego_from_cam, [other])
    with refused("no camera 'bac'; did you mean back"):
        Rig(cameras).camera_rig(["bac"])
    with refused("camera 'left' has the model brown_conrady, and a CameraRig holds pinholes"):
        all_models().camera_rig()
    with refused("two cameras 'front'"):
        Rig([cameras[0], cameras[0]])


def test_the_examples_of_the_docs(tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", (PROJECT / "docs" / "rigs.md").read_text(encoding="utf-8"), re.S)
    assert blocks
    for block in blocks:
        (tmp_path / "rig.yaml").write_text(block)
        rig = Rig.load(tmp_path / "rig.yaml")
        assert schema_errors(yaml.safe_load(block)) == []
        for name, axis in (("front", [1, 0, 0]), ("back", [-1, 0, 0])):
            np.testing.assert_allclose(rig[name].ego_from_cam[:3, 2], axis, atol=1e-12)
        down = np.radians(35)
        np.testing.assert_allclose(rig["left"].ego_from_cam[:3, 2], [0, np.cos(down), -np.sin(down)], atol=1e-12)


@pytest.mark.parametrize("path", SHIPPED_FILES, ids=lambda path: path.stem)
def test_shipped_rigs(path):
    rig = Rig.load(path.stem)
    assert schema_errors(yaml.safe_load(path.read_text())) == []
    for camera in rig:
        up, height = -camera.ego_from_cam[2, 1], camera.ego_from_cam[2, 3]
        assert up > 0.7, f"{camera.name} is not upright"
        assert 0.4 < height < 3.5, f"{camera.name} is {height} m above the ground"
        assert camera.max_angle < 2.5
        uv = np.random.default_rng(0).uniform((0, 0), camera.image_size[::-1], (500, 2))
        rays, valid = camera.unproject(uv)
        assert valid.mean() > 0.65, camera.name
        np.testing.assert_allclose(camera.project(rays[valid])[0], uv[valid], atol=1e-6)
    ahead = {name for name in rig.names if rig[name].ego_from_cam[0, 2] > 0.9}
    assert ahead or path.stem == "surround_fisheye"
    assert "# Source: " in path.read_text(encoding="utf-8")
