"""Importers of calibrations against published projection formulas, OpenCV, SciPy's rotations, and known geometry."""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from conftest import PROJECT, existing
from scipy.spatial.transform import Rotation

from perception.errors import DataError, PerceptionWarning
from perception.geometry import invert_rigid, rigid_from_yaw, transform_points
from perception.rigs import Rig, import_rig
from perception.rigs.importers import FORMATS
from perception.rigs.models import BrownConrady, KannalaBrandt, Mei, Pinhole
from perception.rigs.ros import Frames

RIGS = PROJECT.parent / "shared" / "data" / "rigs"
HALF = 0.5  # px, from pixel centres at whole numbers to ours


@contextmanager
def refused(words: str):
    """The block raises a DataError of one line that holds these words."""
    with pytest.raises(DataError) as error:
        yield
    assert words in str(error.value) and "\n" not in str(error.value)


def ahead(camera, yaw_deg: float = 0.0, tolerance_deg: float = 6.0) -> None:
    """The camera looks into a direction on the ground, and its image stands upright."""
    right, down, forward = camera.ego_from_cam[:3, :3].T
    yaw = np.radians(yaw_deg)
    angle = np.degrees(np.arccos(np.clip(forward @ [np.cos(yaw), np.sin(yaw), 0], -1, 1)))
    assert angle < tolerance_deg, f"{camera.name} looks {angle:.1f} degrees beside {yaw_deg}"
    assert down[2] < -0.9, f"{camera.name} is not upright"


def points_ego(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform((8, -4, 0), (40, 4, 3), (200, 3))


def pixels(camera, points: np.ndarray) -> np.ndarray:
    uv, valid = camera.model.project(transform_points(invert_rigid(camera.ego_from_cam), points))
    assert valid.all()
    return uv


def homogeneous(points: np.ndarray) -> np.ndarray:
    return np.concatenate([points, np.ones((len(points), 1))], 1).T


KITTI = """\
P0: 7.215377e+02 0.0 6.095593e+02 0.0 0.0 7.215377e+02 1.728540e+02 0.0 0.0 0.0 1.0 0.0
P2: 7.215377e+02 0.0 6.095593e+02 4.485728e+01 0.0 7.215377e+02 1.728540e+02 2.163791e-01 0.0 0.0 1.0 2.745884e-03
P3: 7.215377e+02 0.0 6.095593e+02 -3.395242e+02 0.0 7.215377e+02 1.728540e+02 2.199936e+00 0.0 0.0 1.0 2.729905e-03
R0_rect: 9.999239e-01 9.837760e-03 -7.445048e-03 -9.869795e-03 9.999421e-01 -4.278459e-03 7.402527e-03 4.351614e-03 \
9.999631e-01
Tr_velo_to_cam: 7.533745e-03 -9.999714e-01 -6.166020e-04 -4.069766e-03 1.480249e-02 7.280733e-04 -9.998902e-01 \
-7.631618e-02 9.998621e-01 7.523790e-03 1.480755e-02 -2.717806e-01
Tr_imu_to_velo: 9.999976e-01 7.553071e-04 -2.035826e-03 -8.086759e-01 -7.854027e-04 9.998898e-01 -1.482298e-02 \
3.195559e-01 2.024406e-03 1.482454e-02 9.998881e-01 -7.997231e-01
"""


def kitti_rows() -> dict[str, np.ndarray]:
    rows = (line.split(":") for line in KITTI.splitlines())
    return {key: np.array(words.split(), float).reshape(3, -1) for key, words in rows}


def four(rows: np.ndarray) -> np.ndarray:
    square = np.eye(4)
    square[:3, : rows.shape[1]] = rows
    return square


def kitti_formula(projection: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The formula of KITTI's readme, for points above the road."""
    rows = kitti_rows()
    points_imu = points - [0, 0, 0.93]
    uvw = projection @ four(rows["R0_rect"]) @ four(rows["Tr_velo_to_cam"]) @ four(rows["Tr_imu_to_velo"])
    u, v, w = uvw @ homogeneous(points_imu)
    return np.stack([u / w, v / w], -1)


def test_kitti_object(tmp_path):
    path = tmp_path / "calib.txt"
    path.write_text(KITTI)
    rig = import_rig(path, image_size=(375, 1242))
    assert rig.names == ("P0", "P2", "P3") and rig["P2"].image_size == (375, 1242)
    for camera in rig:
        np.testing.assert_allclose(
            pixels(camera, points_ego()), kitti_formula(kitti_rows()[camera.name], points_ego()) + HALF, atol=1e-3
        )  # the file has seven digits, so its rotations are not exact
        ahead(camera)
        assert camera.ego_from_cam[2, 3] == pytest.approx(1.65, abs=0.05)  # the height that KITTI states
    baseline = np.linalg.norm(rig["P2"].ego_from_cam[:3, 3] - rig["P3"].ego_from_cam[:3, 3])
    assert baseline == pytest.approx(0.53, abs=0.01)
    with refused("calib.txt does not hold the size of the images; give image_size"):
        import_rig(path)
    with refused("image_size is (1242, 375); give height and width of"):
        import_rig(path, image_size=(1242, 375))
    path.write_text(KITTI.replace("P2: 7.215377e+02", "P2: 0.0"))
    with refused("calib.txt: P2: fx, fy, cx, cy, skew of the pinhole model are 0, 721.538, 609.559, 172.854, 0; give"):
        import_rig(path, image_size=(375, 1242))
    path.write_text(KITTI.replace("R0_rect", "R1_rect"))
    with refused("(did you mean R0_rect by R1_rect?)"):
        import_rig(path, image_size=(375, 1242))


def test_kitti_raw(tmp_path):
    rows = kitti_rows()
    text = {key: " ".join(map(repr, value.ravel().tolist())) for key, value in rows.items()}
    (tmp_path / "calib_cam_to_cam.txt").write_text(
        f"calib_time: 09-Jan-2012 13:57:47\nS_rect_02: 1242.0 375.0\n"
        f"R_rect_00: {text['R0_rect']}\nP_rect_02: {text['P2']}\n"
    )
    for name, key in (("velo_to_cam", "Tr_velo_to_cam"), ("imu_to_velo", "Tr_imu_to_velo")):
        rotation, translation = rows[key][:, :3], rows[key][:, 3]
        (tmp_path / f"calib_{name}.txt").write_text(
            f"R: {' '.join(map(repr, rotation.ravel().tolist()))}\nT: {' '.join(map(repr, translation.tolist()))}\n"
        )
    rig = import_rig(tmp_path)
    assert rig.names == ("image_02",) and rig["image_02"].image_size == (375, 1242)
    np.testing.assert_allclose(
        pixels(rig["image_02"], points_ego()), kitti_formula(rows["P2"], points_ego()) + HALF, atol=1e-3
    )
    (tmp_path / "calib_imu_to_velo.txt").unlink()
    with refused("calib_imu_to_velo.txt does not exist"):
        import_rig(tmp_path)


CAM_TO_POSE = """\
image_00: 0.0371783278 -0.0986182135 0.9944306009 1.5752681039 0.9992675562 -0.0053553387 -0.0378902567 0.0043914093 \
0.0090621821 0.9951109327 0.0983468786 -0.6500000000
image_02: 0.9995185086 0.0041276589 -0.0307524527 0.7264036936 -0.0307926666 0.0100608424 -0.9994751579 -0.1499658517 \
-0.0038160970 0.9999408692 0.0101830998 -1.0686400091
"""
PERSPECTIVE = """\
R_rect_00: 0.999974 -0.007141 -0.000089 0.007141 0.999969 -0.003247 0.000112 0.003247 0.999995
S_rect_00: 1408.000000 376.000000
P_rect_00: 552.554261 0.0 682.049453 0.0 0.0 552.554261 238.769549 0.0 0.0 0.0 1.0 0.0
"""
FISHEYE = """\
%YAML:1.0
---
model_type: MEI
camera_name: image_02
image_width: 1400
image_height: 1400
mirror_parameters:
   xi: 2.2134047507854890e+00
distortion_parameters:
   k1: 1.6798235660113681e-02
   k2: 1.6548773243373522e+00
   p1: 4.2223943394772046e-04
   p2: 4.2462134260997584e-04
projection_parameters:
   gamma1: 1.3363220825849971e+03
   gamma2: 1.3357883350012958e+03
   u0: 7.1694323510126321e+02
   v0: 7.0576498308221585e+02
"""


def test_kitti_360(tmp_path):
    (tmp_path / "calib_cam_to_pose.txt").write_text(CAM_TO_POSE)
    (tmp_path / "perspective.txt").write_text(PERSPECTIVE)
    (tmp_path / "image_02.yaml").write_text(FISHEYE)
    rig = import_rig(tmp_path)
    assert rig.names == ("image_00", "image_02")
    cam_to_pose = {k: four(np.array(v.split(), float).reshape(3, 4)) for k, v in
                   (line.split(":") for line in CAM_TO_POSE.splitlines())}  # fmt: skip
    rectified = [line.split(":") for line in PERSPECTIVE.splitlines()]
    rotation, _, projection = (np.array(words.split(), float) for _, words in rectified)
    # The devkit's way from the pose frame (x forward, y right, z down), 0.90 m above the road.
    points = points_ego()
    points_pose = (points - [0, 0, 0.90]) * [1, -1, -1]
    local = np.linalg.inv(cam_to_pose["image_00"] @ np.linalg.inv(four(rotation.reshape(3, 3)))) @ homogeneous(
        points_pose
    )
    u, v, w = projection.reshape(3, 4) @ local
    np.testing.assert_allclose(pixels(rig["image_00"], points), np.stack([u / w, v / w], -1) + HALF, atol=2e-3)
    ahead(rig["image_00"], tolerance_deg=8)  # it looks 5 degrees downwards
    assert rig["image_00"].ego_from_cam[2, 3] == pytest.approx(1.55)
    assert rig["image_00"].image_size == (376, 1408)

    ahead(rig["image_02"], yaw_deg=90)
    points = points[:, [1, 0, 2]]  # to the left
    points_pose = (points - [0, 0, 0.90]) * [1, -1, -1]
    x, y, z, _ = np.linalg.inv(cam_to_pose["image_02"]) @ homogeneous(points_pose)
    norm, xi = np.sqrt(x**2 + y**2 + z**2), 2.2134047507854890
    x, y = x / norm / (z / norm + xi), y / norm / (z / norm + xi)
    r2 = x**2 + y**2
    radial = 1 + 1.6798235660113681e-02 * r2 + 1.6548773243373522 * r2**2
    devkit = np.stack([1336.3220825849971 * x * radial + 716.94323510126321,
                       1335.7883350012958 * y * radial + 705.76498308221585], -1)  # fmt: skip
    # The devkit leaves out the tangential terms p1 and p2, which are below a pixel.
    np.testing.assert_allclose(pixels(rig["image_02"], points), devkit + HALF, atol=0.6)
    assert rig["image_02"].model == Mei(
        fx=1336.3220825849971, fy=1335.7883350012958, cx=717.44323510126321, cy=706.26498308221585, xi=xi,
        distortion=(1.6798235660113681e-02, 1.6548773243373522, 4.2223943394772046e-04, 4.2462134260997584e-04),
    )  # fmt: skip


def test_argoverse_2():
    pytest.importorskip("pyarrow", reason="feather files are read with pyarrow")
    rig = import_rig(existing(RIGS / "argoverse2", "the Argoverse 2 calibration"))
    assert len(rig) == 9
    yaws = {"front_center": 0, "front_left": 45, "front_right": -45, "side_left": 100, "side_right": -100,
            "rear_left": 153, "rear_right": -153}  # fmt: skip
    for name, yaw in yaws.items():
        ahead(rig[f"ring_{name}"], yaw_deg=yaw)
        assert rig[f"ring_{name}"].ego_from_cam[2, 3] == pytest.approx(1.73, abs=0.03)
    camera = rig["ring_front_center"]
    assert camera.image_size == (2048, 1550) and isinstance(camera.model, Pinhole)
    # The devkit: no distortion, pixel centres at whole numbers, the egovehicle frame 0.33 m above the ground.
    matrix = np.array([[1776.0414843455, 0, 777.9905731522801], [0, 1776.0414843455, 1013.5243245107571], [0, 0, 1]])
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_quat(
        [-0.49861992463738697, 0.5010700093854159, -0.4986570973931321, 0.5016454083000883]
    ).as_matrix()
    pose[:3, 3] = 1.6350176513238963, 0.0026764466473251165, 1.3979667966613305
    u, v, w = matrix @ (np.linalg.inv(pose) @ homogeneous(points_ego() - [0, 0, 0.33]))[:3]
    np.testing.assert_allclose(pixels(camera, points_ego()), np.stack([u / w, v / w], -1) + HALF, atol=1e-8)


def test_without_pyarrow_the_package_is_named(tmp_path, monkeypatch):
    for name in ("intrinsics.feather", "egovehicle_SE3_sensor.feather"):
        (tmp_path / name).write_bytes(b"nothing")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.feather", None)
    with refused("is a feather file, and pyarrow is not installed; install it, or the extra [argoverse]"):
        import_rig(tmp_path)


def test_a_pyarrow_that_cannot_be_imported_is_named(tmp_path, monkeypatch):
    """Releases of pyarrow refuse an older NumPy at the import."""
    (tmp_path / "intrinsics.feather").write_bytes(b"nothing")
    (tmp_path / "egovehicle_SE3_sensor.feather").write_bytes(b"nothing")
    (tmp_path / "pyarrow.py").write_text("raise ImportError('pyarrow requires NumPy 2.0 or newer')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with refused("is a feather file, and pyarrow requires NumPy 2.0 or newer"):
        import_rig(tmp_path)


WAYMO = {  # the calibration in the unit test of Waymo's camera model
    "name": "FRONT",
    "intrinsic": [2055.55614936, 2055.55614936, 939.657469886, 641.072182194, 0.032316008498, -0.321412482553,
                  0.000793258395371, -0.000625749354133, 0.0],
    "extrinsic": {"transform": [0.999892684989, -0.00599320840002, 0.0133678704017, 1.53891424471,
                                0.00604223652133, 0.999975156055, -0.0036302411765, -0.0236339408393,
                                -0.0133457814992, 0.00371062343188, 0.999904056092, 2.11527057298, 0, 0, 0, 1]},
    "width": 1920, "height": 1280, "rollingShutterDirection": "LEFT_TO_RIGHT",
}  # fmt: skip


def test_waymo(tmp_path):
    """The pose and the point of that unit test: it expects pixel 100, 1000 to 0.1 m at a depth of 20 m."""
    path = tmp_path / "camera.json"
    path.write_text(json.dumps({"context": {"cameraCalibrations": [WAYMO]}}))
    rig = import_rig(path)
    ahead(rig["FRONT"])
    assert isinstance(rig["FRONT"].model, BrownConrady) and rig["FRONT"].image_size == (1280, 1920)
    world_from_vehicle = np.array([
        [-0.913574384152, -0.406212760482, -0.0193141875914, -4069.03497872],
        [0.406637479491, -0.913082565675, -0.0304333457449, 11526.3118079],
        [-0.00527303457417, -0.0356569976572, 0.999350175676, 86.504], [0, 0, 0, 1],
    ])  # fmt: skip
    point = invert_rigid(world_from_vehicle) @ [-4091.97180, 11527.48092, 84.46586, 1]
    np.testing.assert_allclose(pixels(rig["FRONT"], point[None, :3])[0], [100, 1000], atol=12)
    depth = (invert_rigid(rig["FRONT"].ego_from_cam) @ point)[2]
    assert depth == pytest.approx(20, abs=0.15)
    for content in ([{**WAYMO, "name": 1}], {"camera_calibrations": [WAYMO]}):
        path.write_text(json.dumps(content))
        np.testing.assert_array_equal(import_rig(path, "waymo")["FRONT"].ego_from_cam, rig["FRONT"].ego_from_cam)
    path.write_text(json.dumps([{**WAYMO, "intrinsic": [1, 2, 3]}]))
    with refused("camera.json: camera 'FRONT': intrinsic is [1, 2, 3]; give 9 numbers"):
        import_rig(path, "waymo")


def test_nuscenes_tables(tmp_path):
    """Against the devkit and against the dataset of the library, on a generated scene."""
    from nuscenes import NuScenes

    from perception.synthetic import VERSION, simulate

    simulate(tmp_path, scenes=1, seed=3, keyframes=2, image_size=(36, 64))
    rig = import_rig(tmp_path / VERSION)
    devkit = NuScenes(VERSION, str(tmp_path), verbose=False)
    sample = devkit.sample[0]
    assert set(rig.names) == {name for name in sample["data"] if name.startswith("CAM")} and len(rig) == 6
    for camera in rig:
        data = devkit.get("sample_data", sample["data"][camera.name])
        stored = devkit.get("calibrated_sensor", data["calibrated_sensor_token"])
        assert camera.image_size == (data["height"], data["width"])
        np.testing.assert_array_equal(camera.model.img_from_cam, stored["camera_intrinsic"])
        np.testing.assert_allclose(camera.ego_from_cam[:3, 3], stored["translation"], atol=1e-12)
        w, x, y, z = stored["rotation"]
        np.testing.assert_allclose(camera.ego_from_cam[:3, :3], Rotation.from_quat([x, y, z, w]).as_matrix(), atol=1e-9)
    lidar = devkit.get("sample_data", sample["data"]["LIDAR_TOP"])
    stored = devkit.get("calibrated_sensor", lidar["calibrated_sensor_token"])
    w, x, y, z = stored["rotation"]
    np.testing.assert_allclose(rig.ego_from_lidar[:3, :3], Rotation.from_quat([x, y, z, w]).as_matrix(), atol=1e-9)
    np.testing.assert_array_equal(rig.ego_from_lidar[:3, 3], stored["translation"])
    ahead(rig["CAM_FRONT"])
    ahead(rig["CAM_BACK"], 180)
    assert import_rig(tmp_path / VERSION, scene=devkit.scene[0]["name"]).names == rig.names
    with refused("scene.json has no scene 'scene-9999'; "):
        import_rig(tmp_path / VERSION, scene="scene-9999")
    turned = json.loads((tmp_path / VERSION / "calibrated_sensor.json").read_text())
    for row in turned:
        if row["sensor_token"] == stored["sensor_token"]:
            row["rotation"] = [1, 0, 0, 0]  # x ahead
    (tmp_path / VERSION / "calibrated_sensor.json").write_text(json.dumps(turned))
    with pytest.warns(PerceptionWarning, match="the axes of LIDAR_TOP are not x right, y ahead, z up"):
        assert import_rig(tmp_path / VERSION).ego_from_lidar is None


def camera_info(name: str, model: str, coefficients: list[float], size=(1280, 1024), focal=1085.2) -> dict:
    return {
        "image_width": size[0], "image_height": size[1], "camera_name": name,
        "camera_matrix": {"rows": 3, "cols": 3, "data": [focal, 0, 622.8, 0, focal + 0.1, 502.6, 0, 0, 1]},
        "distortion_model": model,
        "distortion_coefficients": {"rows": 1, "cols": len(coefficients), "data": coefficients},
        "rectification_matrix": {"rows": 3, "cols": 3, "data": [1, 0, 0, 0, 1, 0, 0, 0, 1]},
        "projection_matrix": {"rows": 3, "cols": 4, "data": [1033.5, 0, 712.4, 0, 0, 1033.5, 503, 0, 0, 0, 1, 0]},
    }  # fmt: skip


PLUMB_BOB = [-0.273113, 0.136259, 0.00005, -0.000481, 0.0]
RATIONAL = [0.929988205433, 0.165922805667, -0.000024369263, -0.000013859207, 0.002885974478, 1.331432461739,
            0.435830116272, 0.027607271448]  # fmt: skip
EQUIDISTANT = [-0.029225109913, 0.020824034923, -0.031941589711, 0.016593413441]
URDF = """<robot name="car">
  <joint name="mount" type="fixed"><parent link="base_link"/><child link="roof"/><origin xyz="1.0 0 1.6"/></joint>
  <joint name="front" type="fixed">
    <parent link="roof"/><child link="front_link"/><origin xyz="0.5 0.1 0" rpy="0 0.1 0.05"/>
  </joint>
  <joint name="front_optical" type="fixed">
    <parent link="front_link"/><child link="front_optical_frame"/>
    <origin rpy="-1.5707963267948966 0 -1.5707963267948966"/>
  </joint>
  <joint name="wheel" type="continuous"><parent link="base_link"/><child link="wheel"/></joint>
</robot>"""


def stamped(parent: str, child: str, xyz, rotation: Rotation) -> dict:
    x, y, z, w = map(float, rotation.as_quat())
    return {
        "header": {"stamp": {"sec": 0, "nanosec": 0}, "frame_id": parent}, "child_frame_id": child,
        "transform": {"translation": dict(zip("xyz", xyz, strict=True)), "rotation": {"x": x, "y": y, "z": z, "w": w}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "coefficients"),
    [("plumb_bob", PLUMB_BOB), ("rational_polynomial", RATIONAL), ("equidistant", EQUIDISTANT)],
)
def test_ros_camera_info_with_a_urdf(tmp_path, model, coefficients):
    """Against OpenCV, whose functions ROS's tools call."""
    (tmp_path / "front.yaml").write_text(yaml.safe_dump(camera_info("front", model, coefficients)))
    (tmp_path / "car.urdf").write_text(URDF)
    rig = import_rig(tmp_path / "front.yaml", poses=tmp_path / "car.urdf")
    camera = rig["front"]
    ahead(camera, tolerance_deg=8)
    assert camera.ego_from_cam[:3, 3] == pytest.approx([1.5, 0.1, 1.6])
    forward = Rotation.from_euler("ZYX", [0.05, 0.1, 0]).apply([1, 0, 0])  # the link's x axis, 0.1 rad downwards
    np.testing.assert_allclose(camera.ego_from_cam[:3, 2], forward, atol=1e-12)
    points_cam = transform_points(invert_rigid(camera.ego_from_cam), points_ego())
    matrix = np.array([[1085.2, 0, 622.8], [0, 1085.3, 502.6], [0, 0, 1]])
    arguments = np.zeros(3), np.zeros(3), matrix, np.array(coefficients)
    project = cv2.fisheye.projectPoints if model == "equidistant" else cv2.projectPoints
    expected = project(points_cam[:, None], *arguments)[0][:, 0]
    np.testing.assert_allclose(pixels(camera, points_ego()), expected + HALF, atol=1e-8)
    assert camera.image_size == (1024, 1280)


def test_ros_static_transforms_body_and_optical_frames(tmp_path):
    """The same camera from an optical frame, from its link with body axes, and as an echoed message."""
    turned = Rotation.from_euler("ZYX", [-1.0, 0.2, 0.0])
    optical = Rotation.from_euler("ZYX", [-np.pi / 2, 0, -np.pi / 2])
    transforms = [stamped("base_link", "kit", (0.9, 0.0, 2.0), Rotation.identity()),
                  stamped("kit", "right_link", (0.1, -0.5, -0.3), turned),
                  stamped("right_link", "right_optical_frame", (0.0, 0.0, 0.0), optical)]  # fmt: skip
    (tmp_path / "tf.yaml").write_text(
        "\n---\n".join(yaml.safe_dump({"transforms": [t]}) for t in transforms) + "\n---\n"
    )
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(transforms))
    (tmp_path / "right.yaml").write_text(yaml.safe_dump(camera_info("right", "plumb_bob", [0.0] * 5)))
    rig = import_rig(tmp_path / "right.yaml", poses=tmp_path / "tf.yaml")
    np.testing.assert_allclose(rig["right"].ego_from_cam[:3, 2], turned.apply([1, 0, 0]), atol=1e-12)
    np.testing.assert_allclose(rig["right"].ego_from_cam[:3, 1], turned.apply([0, 0, -1]), atol=1e-12)
    np.testing.assert_allclose(rig["right"].ego_from_cam[:3, 3], [1.0, -0.5, 1.7], atol=1e-12)
    assert isinstance(rig["right"].model, Pinhole) and rig["right"].model.cx == 622.8 + HALF
    body = import_rig(tmp_path / "right.yaml", poses=tmp_path / "list.yaml", frames={"right": "right_link"})
    np.testing.assert_allclose(body["right"].ego_from_cam, rig["right"].ego_from_cam, atol=1e-12)
    message = {"header": {"frame_id": "right_optical_frame"}, "width": 1280, "height": 1024, "d": [0.0] * 5,
               "distortion_model": "plumb_bob", "k": [1085.2, 0, 622.8, 0, 1085.3, 502.6, 0, 0, 1]}  # fmt: skip
    (tmp_path / "echo.yaml").write_text(yaml.safe_dump(message) + "---\n")
    echoed = import_rig(tmp_path / "echo.yaml", "ros", poses=tmp_path / "tf.yaml")
    np.testing.assert_array_equal(echoed["echo"].ego_from_cam, rig["right"].ego_from_cam)
    assert echoed["echo"].model == rig["right"].model


def test_frames_that_are_their_own_parents_are_named():
    step = rigid_from_yaw(0.3, (1.0, 2.0, 0.0))
    tree = Frames.of(Path("/tf"), [("a", "b", step), ("b", "a", step), ("base", "c", step), ("c", "d", step)])
    for ask in (lambda: tree.base_from("a", "base"), lambda: tree.leads_to("b", "base"), lambda: tree.root("a")):
        with refused("its own parent; give a tree of frames"):
            ask()
    assert tree.leads_to("d", "base") and not tree.leads_to("base", "d") and tree.root("d") == "base"
    np.testing.assert_allclose(tree.base_from("d", "base"), step @ step)
    np.testing.assert_allclose(tree.base_from("b", "a"), step)


def test_mistakes_in_ros_files_are_named(tmp_path):
    info, urdf = tmp_path / "front.yaml", tmp_path / "car.urdf"
    info.write_text(yaml.safe_dump(camera_info("front", "plumb_bob", PLUMB_BOB)))
    urdf.write_text(URDF)

    with refused("front.yaml holds no poses; give `poses`: a URDF"):
        import_rig(info, "ros")
    with refused("end at 'base_link', not at 'base_footprint'; give base_frame"):
        import_rig(info, "ros", poses=urdf, base_frame="base_footprint")
    with refused("has no frame 'front_lnk' for the camera 'front'"):
        import_rig(info, "ros", poses=urdf, frames={"front": "front_lnk"})
    with refused("frames names the camera 'frnt'; did you mean front"):
        import_rig(info, "ros", poses=urdf, frames={"frnt": "front_link"})
    urdf.write_text(URDF.replace("<robot", '<robot xmlns:xacro="x"><xacro:include/></robot><robot'))
    with refused("is a xacro file; run xacro first"):
        import_rig(info, "ros", poses=urdf)
    urdf.write_text("<robot")
    with refused("car.urdf is not XML"):
        import_rig(info, "ros", poses=urdf)
    urdf.write_text(URDF)
    info.write_text(yaml.safe_dump(camera_info("front", "double_sphere", PLUMB_BOB)))
    with refused("distortion_model is 'double_sphere'; give one of plumb_bob, rational_polynomial"):
        import_rig(info, "ros", poses=urdf)
    info.write_text(yaml.safe_dump(camera_info("front", "plumb_bob", RATIONAL)))
    with refused("front.yaml: 8 distortion coefficients of 'plumb_bob'; give 0 or 4 or 5"):
        import_rig(info, "ros", poses=urdf)


KIT = {  # two cameras of Autoware's sample sensor kit
    "sensor_kit_base_link": {
        "camera2/camera_link": {"x": 0.10731, "y": -0.56343, "z": -0.27697, "roll": -0.0, "pitch": 0.335, "yaw": -1.04},
        "camera4/camera_link": {"x": 0.07356, "y": 0.0, "z": -0.0525, "roll": 0.0, "pitch": -0.03, "yaw": -0.005},
        "velodyne_top_base_link": {"x": 0.0, "y": 0.0, "z": 0.0, "roll": 0.0, "pitch": 0.0, "yaw": 1.575},
    }
}
SENSORS = {
    "base_link": {
        "sensor_kit_base_link": {"x": 0.9, "y": 0.0, "z": 2.0, "roll": -0.001, "pitch": 0.015, "yaw": -0.0364}
    }
}


def test_autoware_sensor_kit(tmp_path):
    (tmp_path / "sensor_kit_calibration.yaml").write_text(yaml.safe_dump(KIT))
    (tmp_path / "sensors_calibration.yaml").write_text(yaml.safe_dump(SENSORS))
    folder = tmp_path / "intrinsics"
    folder.mkdir()
    for name in ("camera2", "camera4"):
        info = camera_info(name, "rational_polynomial", RATIONAL, (2880, 1860), 1495.3)
        (folder / f"{name}_info.yaml").write_text(yaml.safe_dump(info))
    rig = import_rig(tmp_path, intrinsics=folder)
    assert rig.names == ("camera2", "camera4")
    kit = Rotation.from_euler("ZYX", [-0.0364, 0.015, -0.001])
    for name, yaw, pitch, xyz in (
        ("camera2", -1.04, 0.335, (0.10731, -0.56343, -0.27697)),
        ("camera4", -0.005, -0.03, (0.07356, 0.0, -0.0525)),
    ):
        link = kit * Rotation.from_euler("ZYX", [yaw, pitch, 0.0])
        pose = rig[name].ego_from_cam
        for axis, expected in enumerate(([0, -1, 0], [0, 0, -1], [1, 0, 0])):  # right, down, forward
            np.testing.assert_allclose(pose[:3, axis], link.apply(expected), atol=1e-12)
        np.testing.assert_allclose(pose[:3, 3], np.array([0.9, 0, 2.0]) + kit.apply(xyz), atol=1e-12)
    ahead(rig["camera4"])
    of_file = import_rig(tmp_path / "sensor_kit_calibration.yaml", intrinsics=folder)  # recognised by its name
    np.testing.assert_array_equal(of_file["camera4"].ego_from_cam, rig["camera4"].ego_from_cam)
    one = import_rig(tmp_path, intrinsics={"camera4": folder / "camera4_info.yaml"})
    assert one.names == ("camera4",)
    # The kit is also a source of poses for the ROS importer.
    same = import_rig(folder / "camera4_info.yaml", poses=tmp_path)
    np.testing.assert_array_equal(same["camera4"].ego_from_cam, rig["camera4"].ego_from_cam)
    # The layout of individual_params: NAME/camera_info.yaml beside the sensor kit's files.
    for name in ("camera2", "camera4"):
        (tmp_path / name).mkdir()
        info = camera_info("v4l2_camera", "rational_polynomial", RATIONAL, (2880, 1860), 1495.3)
        (tmp_path / name / "camera_info.yaml").write_text(yaml.safe_dump(info))
    laid_out = import_rig(tmp_path, intrinsics=tmp_path)
    assert laid_out.names == rig.names and laid_out["camera2"].model == rig["camera2"].model
    with refused("or such a file for each of camera2, camera4"):
        import_rig(tmp_path)
    (folder / "camera2_info.yaml").unlink()
    with refused("has no camera_info of camera2; it has camera4"):
        import_rig(tmp_path, intrinsics=folder)
    KIT_IN_DEGREES = yaml.safe_dump(KIT).replace("yaw: -1.04", "yaw: -59.6")
    (tmp_path / "sensor_kit_calibration.yaml").write_text(KIT_IN_DEGREES)
    with refused("camera2/camera_link has an angle of 59.6; Autoware's are radians"):
        import_rig(tmp_path, intrinsics=folder)


def chain(**second) -> dict:
    first = {
        "T_cam_imu": [[-0.9999730211612913, 0.0011654864078604154, 0.007252488606936615, 0.05855576022314668],
                      [0.0011859186262073965, 0.9999953385940187, 0.002813607514727948, 0.002858928245212033],
                      [-0.00724917557882737, 0.0028221324681899397, -0.9999697420531085, -0.005490310834812385],
                      [0.0, 0.0, 0.0, 1.0]],
        "camera_model": "pinhole", "distortion_model": "equidistant", "resolution": [816, 960],
        "distortion_coeffs": [-0.029225109913193572, 0.02082403492287568, -0.03194158971070967, 0.0165934134408496],
        "intrinsics": [497.81111262347383, 497.8055103598601, 396.48820025924294, 463.4451903675188],
    }  # fmt: skip
    return {"cam0": first, "cam1": {key: value for key, value in {**first, **second}.items() if value is not None}}


def test_kalibr_camchain(tmp_path):
    path = tmp_path / "camchain-imucam.yaml"
    baseline = np.eye(4)
    baseline[0, 3] = -0.07
    radtan = {"camera_model": "omni", "distortion_model": "radtan", "distortion_coeffs": [-0.2, 0.03, 1e-3, -1e-3]}
    second = {"T_cam_imu": None, "T_cn_cnm1": baseline.tolist(), "intrinsics": [1.2, 900.0, 901.0, 400.0, 470.0]}
    path.write_text(yaml.safe_dump(chain(**second, **radtan)))
    cam_from_imu = np.array(chain()["cam0"]["T_cam_imu"])
    # The IMU of this rig has x left, y down, z backward: the camera looks ahead when the car says so.
    ego_from_imu = np.eye(4)
    ego_from_imu[:3, :3] = np.array([[0, 0, -1], [1, 0, 0], [0, -1, 0]])
    ego_from_imu[:3, 3] = 1.5, 0.0, 1.4
    rig = import_rig(path, ego_from_vehicle=ego_from_imu)
    ahead(rig["cam0"])
    np.testing.assert_allclose(rig["cam0"].ego_from_cam, ego_from_imu @ np.linalg.inv(cam_from_imu), atol=1e-9)
    np.testing.assert_allclose(
        rig["cam1"].ego_from_cam, ego_from_imu @ np.linalg.inv(baseline @ cam_from_imu), atol=1e-9
    )
    offset = invert_rigid(rig["cam0"].ego_from_cam) @ rig["cam1"].ego_from_cam
    assert offset[0, 3] == pytest.approx(0.07)  # the second camera is to the right of the first
    assert isinstance(rig["cam0"].model, KannalaBrandt) and rig["cam0"].model.cx == 396.48820025924294 + HALF
    assert rig["cam1"].model == Mei(
        fx=900.0, fy=901.0, cx=400.5, cy=470.5, xi=1.2, distortion=(-0.2, 0.03, 1e-3, -1e-3)
    )
    assert rig["cam0"].image_size == (960, 816)
    with refused("kalibr has no vehicle frame; give ego_from_vehicle"):
        import_rig(path)
    for changes, words in (
        ({"camera_model": "ds"}, "cam1 has the model ds-equidistant, which this library does not have"),
        ({"camera_model": "eucm", "distortion_model": "none"}, "cam1 has the model eucm-none"),
        ({"T_cam_imu": None}, "cam1 has no T_cn_cnm1"),
        ({"intrinsics": [1, 2]}, "cam1: intrinsics is [1, 2]; give 4 numbers"),
    ):
        path.write_text(yaml.safe_dump(chain(**changes)))
        with refused(words):
            import_rig(path, ego_from_vehicle=ego_from_imu)


def test_cameras_are_chosen_and_a_rig_is_saved(tmp_path):
    (tmp_path / "calib.txt").write_text(KITTI)
    rig = import_rig(tmp_path / "calib.txt", image_size=(375, 1242), cameras=["P3", "P2"])
    assert rig.names == ("P3", "P2")
    rig.save(tmp_path / "rig.yaml")
    np.testing.assert_array_equal(Rig.load(tmp_path / "rig.yaml")["P2"].ego_from_cam, rig["P2"].ego_from_cam)
    moved = np.eye(4)
    moved[0, 3] = 0.3
    other = import_rig(tmp_path / "calib.txt", image_size=(375, 1242), ego_from_vehicle=moved)
    assert other["P2"].ego_from_cam[2, 3] == pytest.approx(rig["P2"].ego_from_cam[2, 3] - 0.93)
    with refused("calib.txt has no camera 'P5'; give one of P0, P2, P3"):
        import_rig(tmp_path / "calib.txt", image_size=(375, 1242), cameras=["P5"])


def test_formats_that_cannot_be_recognised_are_listed(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text("a: 1")
    with refused("some.yaml is of no known format; give `format`, one of these"):
        import_rig(path)
    path.write_text("rig_format: 1")
    with refused("is a rig file of this library; open it with Rig.load"):
        import_rig(path)
    with refused("format is 'kiti'; did you mean kitti"):
        import_rig(path, "kiti")
    with refused("nowhere does not exist; give a calibration file or folder"):
        import_rig(tmp_path / "nowhere")
    with refused("scene was given, and the format kitti does not read it"):
        import_rig(path, "kitti", scene="scene-0001")
    assert set(FORMATS) == {
        "nuscenes", "kitti", "kitti_raw", "kitti360", "argoverse2", "waymo", "kalibr", "ros", "rosbag", "autoware"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["plumb_bob", "rational_polynomial", "equidistant"])
def test_real_camera_info_files(name, tmp_path):
    path = existing(RIGS / "ros" / f"{name}.yaml", "a real camera_info file")
    camera = yaml.safe_load(path.read_text())["camera_name"]
    (tmp_path / "tf.yaml").write_text(
        yaml.safe_dump([stamped("base_link", f"{camera}_link", (1, 0, 1.5), Rotation.identity())])
    )
    rig = import_rig(path, poses=tmp_path / "tf.yaml")
    ahead(rig[camera])
    uv = np.random.default_rng(0).uniform((0, 0), rig[camera].image_size[::-1], (1000, 2))
    rays, valid = rig[camera].unproject(uv)
    assert valid.all()
    np.testing.assert_allclose(rig[camera].project(rays)[0], uv, atol=1e-6)
