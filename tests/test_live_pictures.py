"""Pictures of live results: curves as OpenCV projects them, cut in closed form, on the user's own images."""

import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
from conftest import PROJECT

from perception.errors import DataError
from perception.geometry import box_corners, invert_rigid, transform_points
from perception.rigs.models import BrownConrady, KannalaBrandt, Pinhole, angles
from perception.rigs.rig import Rig, RigCamera
from perception.rigs.virtual import virtual_rig
from perception.types import Ids, NumpyBoxes, NumpyCameraRig, NumpyLiveObjects, NumpyPolylines, NumpySeen, StepInfo
from perception.types import Weights as WeightsOf
from perception.visualization.canvas import BOX_COLORS, LINE_COLORS, PANEL
from perception.visualization.curves import NEAR, WINDOW, may_see, project_segments
from perception.visualization.live import draw_live

LENS = (-0.28, 0.11, 2e-4, -5e-4, -0.02)
FISHEYE = (0.05, -0.008, 0.002, -0.0004)
FORWARD = np.array([[0.0, 0, 1, 1.7], [-1, 0, 0, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]])
SIZE = (480, 640)
INTRINSICS = dict(fx=330.0, fy=335.0, cx=322.0, cy=241.0)
CAMERAS = {
    "pinhole": RigCamera("front", SIZE, Pinhole(**INTRINSICS), FORWARD),
    "brown_conrady": RigCamera("front", SIZE, BrownConrady(**INTRINSICS, distortion=LENS), FORWARD),
    "kannala_brandt": RigCamera(
        "front", SIZE, KannalaBrandt(**INTRINSICS, distortion=FISHEYE), FORWARD, np.radians(95)
    ),
}


def opencv(kind, points_cam):
    """Pixels [P, 2] of points in front of the camera, by OpenCV."""
    fx, fy, cx, cy = (INTRINSICS[k] for k in ("fx", "fy", "cx", "cy"))
    matrix = np.array([[fx, 0, cx - 0.5], [0, fy, cy - 0.5], [0, 0, 1]])  # OpenCV: pixel centres at whole numbers
    points, zero = points_cam.reshape(-1, 1, 3), np.zeros(3)
    if kind == "kannala_brandt":
        uv = cv2.fisheye.projectPoints(points, zero, zero, matrix, np.array(FISHEYE))[0]
    else:
        uv = cv2.projectPoints(points, zero, zero, matrix, np.array(LENS if kind == "brown_conrady" else (0.0,) * 4))[0]
    return uv.reshape(-1, 2) + 0.5


def distance_to(curve, points):
    """The distance of points [P, 2] to a polyline [K, 2]."""
    start, way = curve[:-1], np.diff(curve, axis=0)
    share = ((points[:, None] - start) * way).sum(-1) / (way**2).sum(-1).clip(1e-12)
    nearest = start + share.clip(0, 1)[..., None] * way
    return np.linalg.norm(points[:, None] - nearest, axis=-1).min(1)


@pytest.mark.parametrize("kind", CAMERAS)
def test_lines_on_the_ground_are_the_curves_of_opencv(kind):
    cam_from_ego, bends = invert_rigid(FORWARD), []
    for start, end in (((2.4, 3.0), (60.0, 4.0)), ((4.0, -9.0), (4.5, 9.0)), ((30.0, -8.0), (3.0, 1.0))):
        ends = transform_points(cam_from_ego, np.array([[*start, 0.0], [*end, 0.0]]))
        ((_, curve),) = project_segments(CAMERAS[kind], ends[:1], ends[1:], [0])
        dense = ends[0] + np.linspace(0, 1, 4000)[:, None] * (ends[1] - ends[0])
        dense = dense[angles(dense) < CAMERAS[kind].model.max_angle]  # OpenCV folds what is beyond into the image
        truth = opencv(kind, dense)
        inside = ((truth >= 0) & (truth <= (640, 480))).all(1)
        assert inside.sum() > 100 and distance_to(curve, truth[inside]).max() < 0.5
        in_image = curve[((curve >= 0) & (curve <= (640, 480))).all(1)]
        assert distance_to(truth, in_image).max() < 0.05
        bends.append(distance_to(truth[inside][[0, -1]], truth[inside]).max())
    assert (max(bends) > 20) == (kind != "pinhole")  # a lens bends lines


@pytest.mark.parametrize("kind", CAMERAS)
def test_boxes_are_where_opencv_projects_their_corners(kind):
    corners = box_corners(np.array([9.0, 1.5, 0.8]), np.array([4.5, 1.9, 1.6]), np.array(0.6))
    corners_cam = transform_points(invert_rigid(FORWARD), corners)
    for k in range(8):
        ((chain, curve),) = project_segments(CAMERAS[kind], corners_cam[[k]], corners_cam[[(k + 1) % 8]], [7])
        assert chain == 7
        assert curve[[0, -1]] == pytest.approx(opencv(kind, corners_cam[[k, (k + 1) % 8]]), abs=1e-6)


def test_a_line_through_the_camera_plane_ends_at_the_window_in_closed_form():
    """From 10 m ahead to 10 m behind, 1.5 m below and 1 m to the right: u = cx + fx / z, v = cy + 1.5 fy / z."""
    start, end = np.array([[1.0, 1.5, 10.0]]), np.array([[1.0, 1.5, -10.0]])
    ((_, curve),) = project_segments(CAMERAS["pinhole"], start, end, [3])
    z = 1.5 * INTRINSICS["fy"] / ((1 + WINDOW) * 480 - INTRINSICS["cy"])  # it leaves the window at its lower border
    assert curve[0] == pytest.approx((322 + 330 / 10, 241 + 1.5 * 335 / 10), abs=1e-9)
    assert curve[-1] == pytest.approx((322 + 330 / z, (1 + WINDOW) * 480), abs=0.2)
    assert curve[-1, 1] <= (1 + WINDOW) * 480
    assert distance_to(curve[[0, -1]], curve).max() < 1e-6  # straight, and nothing mirrored from behind


def test_a_line_ends_where_the_lens_ends():
    start, end = np.array([[-3.0, 1.0, 4.0]]), np.array([[-3.0, 1.0, -4.0]])
    fisheye = CAMERAS["kannala_brandt"]
    ((_, curve),) = project_segments(fisheye, start, end, [0])
    rays, _ = fisheye.model.unproject(curve[-1:])
    assert np.degrees(angles(rays)[0]) == pytest.approx(95, abs=0.01)
    assert np.degrees(angles(rays)[0]) <= 95


def test_a_line_past_the_lens_is_cut_at_the_near_sphere():
    """Along the optical axis to the camera, 1 cm beside it."""
    model = KannalaBrandt(fx=300, fy=300, cx=2000, cy=2000, distortion=(0, 0, 0, 0))
    camera = RigCamera("front", (4000, 4000), model, FORWARD)
    ((_, curve),) = project_segments(camera, [[0.01, 0.0, 5.0]], [[0.01, 0.0, 0.0]], [0])
    angle = np.arcsin(0.01 / NEAR)
    assert curve[-1] == pytest.approx((2000 + 300 * angle, 2000), abs=0.02)
    assert project_segments(camera, [[0.01, 0.0, 0.05]], [[0.01, 0.0, 0.0]], [0]) == []
    assert project_segments(camera, np.zeros((0, 3)), np.zeros((0, 3)), []) == []


def test_a_chain_is_one_piece_and_a_hidden_middle_makes_two():
    pinhole = CAMERAS["pinhole"]
    points = np.array([[-1.0, 0, 5], [0, 0.5, 5], [1.0, 0, 5]])
    ((_, curve),) = project_segments(pinhole, points[:-1], points[1:], [0, 0])
    assert curve[[0, -1]] == pytest.approx(opencv("pinhole", points[[0, 2]]))
    points = np.array([[-1.0, 0, 5], [-1.0, 0, -5], [1.0, 0, -5], [1.0, 0, 5]])  # around the camera
    pieces = project_segments(pinhole, points[:-1], points[1:], [4, 4, 4])
    assert [chain for chain, _ in pieces] == [4, 4]
    assert pieces[0][1][:, 0].max() < 322 < pieces[1][1][:, 0].min()


@pytest.mark.parametrize("kind", CAMERAS)
def test_boxes_that_are_left_out_are_not_in_the_image(kind):
    rng = np.random.default_rng(2)
    centers, radii = rng.normal(size=(300, 3)) * 10, rng.uniform(0.2, 4, 300)
    kept = may_see(CAMERAS[kind], centers, radii)
    around = rng.normal(size=(300, 200, 3))
    around /= np.linalg.norm(around, axis=-1, keepdims=True)
    _, seen = CAMERAS[kind].project(centers[:, None] + around * radii[:, None, None])
    assert not (seen.any(1) & ~kept).any() and 30 < kept.sum() < 290


# --- Pictures ---------------------------------------------------------------------------------------------------------


def result(boxes=(), lines=(), **changes):
    """Boxes (x, y, label, score) of 4 x 2 x 1.6 m, and lines (points, label, score)."""
    rows = np.array(boxes, np.float32).reshape(-1, 4)
    count = len(rows)
    zeros = np.zeros(count, np.float32)
    center = np.column_stack([rows[:, :2], np.full(count, 0.8, np.float32)])
    found = NumpyBoxes(
        center, np.tile(np.float32([4, 2, 1.6]), (count, 1)), zeros, np.tile(np.float32([3, 0]), (count, 1)),
        rows[:, 2].astype(np.int32), np.full(count, -1, np.int32), rows[:, 3], np.ones(count, bool),
        np.full((count, 9), 0.4, np.float32),
    )  # fmt: skip
    points = np.array([points for points, *_ in lines], np.float32).reshape(len(lines), -1 if lines else 12, 2)
    number = len(lines)
    polylines = NumpyPolylines(
        points, np.zeros(number, bool), np.array([line[1] for line in lines], np.int32),
        np.array([line[2] for line in lines], np.float32), np.ones(number, bool),
        np.full(points.shape, 0.5, np.float32),
    )  # fmt: skip
    seen = NumpySeen(np.ones(count, np.float32), np.ones(points.shape[:2], bool))
    return NumpyLiveObjects(found, polylines, seen, ())._replace(**changes)


GREY = np.full((*SIZE, 3), 90, np.uint8)
LINE = [[6.0 + 2 * k, 2.5] for k in range(12)]  # along the road, to the left


def tile_of(picture, height=560):
    """The tile of a single camera, without its name."""
    return np.asarray(picture.crop((8, 36, 8 + round(height * 640 / 480), 36 + height))).astype(int)


def near(pixels, color, tolerance=60):
    return np.abs(pixels - np.array(color)).max(-1) < tolerance


@pytest.mark.parametrize("kind", CAMERAS)
def test_lines_are_drawn_where_the_lens_shows_them(kind):
    """A pixel of the user's image lies at the same share of the tile."""
    picture = draw_live({"front": GREY}, Rig([CAMERAS[kind]]), result(lines=[(LINE, 2, 1.0)]))
    tile = tile_of(picture)
    dense = np.column_stack([np.linspace(6, 28, 400), np.full(400, 2.5), np.zeros(400)])
    uv = opencv(kind, transform_points(invert_rigid(FORWARD), dense)) * 560 / 480
    uv = uv[((uv >= 2) & (uv < (744, 558))).all(1)]
    found = near(tile, LINE_COLORS["boundary"])
    assert len(uv) == 400
    assert found[uv[:, 1].astype(int), uv[:, 0].astype(int)].mean() > 0.97
    distance = distance_to(uv, np.argwhere(found[:, :700])[:, ::-1] + 0.5)
    assert distance.max() < 3  # and nowhere else


def test_boxes_ids_and_scores():
    rig = Rig([CAMERAS["brown_conrady"]])
    bare = tile_of(draw_live({"front": GREY}, rig, result()))
    strong = tile_of(draw_live({"front": GREY}, rig, result([(12, 0, 0, 0.95)])))
    weak = tile_of(draw_live({"front": GREY}, rig, result([(12, 0, 0, 0.31)])))
    assert (np.abs(strong - bare).max(-1) > 20).sum() > 300
    assert near(strong, BOX_COLORS["car"]).sum() > 100 > 10 >= near(weak, BOX_COLORS["car"], 30).sum()
    assert (tile_of(draw_live({"front": GREY}, rig, result([(12, 0, 0, 0.2)]))) == bare).all()  # below min_score
    numbered = result([(12, 0, 0, 0.95)], ids=Ids(np.array([17]), np.zeros(0, int)))
    assert (tile_of(draw_live({"front": GREY}, rig, numbered)) != strong).any(-1).sum() > 20
    # A box that the camera is in, and one behind it: nothing but lines of the first, and no error.
    around = tile_of(draw_live({"front": GREY}, rig, result([(2.5, 0, 0, 0.9), (-9, 0, 0, 0.9)])))
    behind = tile_of(draw_live({"front": GREY}, rig, result([(-9, 0, 0, 0.9)])))
    assert (behind == bare).all() and (around != bare).any()


def bev_of(picture):
    return np.asarray(picture)[36:, 8 + 747 + 8 :].astype(int)


def test_what_is_not_seen_is_faint_from_above_and_not_in_images():
    rig = Rig([CAMERAS["pinhole"]])
    seen = np.ones((1, 12), bool)
    seen[0, 5:] = False
    whole = result(lines=[(LINE, 2, 1.0)])
    part = whole._replace(seen=whole.seen._replace(lines=seen))
    one, other = (draw_live({"front": GREY}, rig, x) for x in (whole, part))
    color = LINE_COLORS["boundary"]
    assert 0 < near(tile_of(other), color).sum() < near(tile_of(one), color).sum()
    assert 0 < near(bev_of(other), color, 40).sum() < 0.7 * near(bev_of(one), color, 40).sum()
    gone = whole._replace(seen=whole.seen._replace(lines=np.zeros((1, 12), bool)))
    assert near(tile_of(draw_live({"front": GREY}, rig, gone)), color).sum() == 0
    hidden = result([(12, 0, 0, 1.0)])
    hidden = hidden._replace(seen=hidden.seen._replace(boxes=np.zeros(1, np.float32)))
    clear = draw_live({"front": GREY}, rig, result([(12, 0, 0, 1.0)]))
    assert near(bev_of(draw_live({"front": GREY}, rig, hidden)), BOX_COLORS["car"], 40).sum() < 5
    assert near(bev_of(clear), BOX_COLORS["car"], 40).sum() > 20


def test_the_band_is_as_wide_as_the_uncertainty():
    """Along x it spans the uncertainty in y to both sides: 2 * 3 m at 2 px / 0.18 m of the canvas."""
    rig, objects = Rig([CAMERAS["pinhole"]]), result(lines=[([[5.0, 0.0], [25.0, 0.0]], 0, 1.0)])
    wide = objects.lines._replace(uncertainty=np.full((1, 2, 2), 3.0, np.float32))
    empty, picture = (bev_of(draw_live({"front": GREY}, rig, x)) for x in (result(), objects._replace(lines=wide)))
    scale = len(empty[: 560 + 8 + 64]) / 102.4
    row = round((51.2 - 15.0) * (empty.shape[0] - 8) / 102.4)
    changed = (picture[row] != empty[row]).any(-1)
    assert changed.sum() == pytest.approx(6.0 * (empty.shape[0] - 8) / 102.4, abs=2) and scale > 5


def test_cameras_stand_as_on_the_car_and_absent_ones_are_named():
    rig = Rig.load("nuscenes")
    images = {name: np.full((900, 1600, 3), 20 + 30 * k, np.uint8) for k, name in enumerate(rig.names)}
    del images["CAM_BACK"]
    picture = np.asarray(draw_live(images, virtual_rig(rig, (176, 448)), result(), height=300)).astype(int)
    width, height = round(146 * 1600 / 900), 146
    layout = (("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT"), ("CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT"))
    for row, names in enumerate(layout):
        for column, name in enumerate(names):
            pixel = picture[36 + row * (height + 8) + 100, 8 + column * (width + 8) + 120]
            expected = images[name][0, 0] if name in images else PANEL
            assert pixel.tolist() == list(expected), name


def test_one_call_for_any_kind_of_image_and_a_rig_without_names():
    bgr = np.zeros((*SIZE, 3), np.uint8)
    bgr[..., 0] = 200
    camera = CAMERAS["pinhole"]
    by_rig = draw_live([bgr], Rig([camera]), result(), bgr=True)
    assert tile_of(by_rig)[300, 300].tolist() == [0, 0, 200]
    plain = NumpyCameraRig(np.array([camera.model.img_from_cam] * 2), np.array([FORWARD] * 2), np.array([True, False]))
    assert tile_of(draw_live([bgr, None], plain, result(), bgr=True))[300, 300].tolist() == [0, 0, 200]
    small = Rig([RigCamera("front", (48, 64), Pinhole(fx=33, fy=33, cx=32, cy=24), FORWARD)])
    line = result(lines=[(LINE, 2, 1.0)])
    assert near(tile_of(draw_live({"front": GREY[:48, :64]}, small, line)), LINE_COLORS["boundary"]).sum() > 300


def test_the_caption_says_what_the_result_says():
    rig = Rig([CAMERAS["pinhole"]])
    told = StepInfo(12.0, np.eye(4), True, "", WeightsOf("nano"))
    plain, full, warned = (
        np.asarray(draw_live({"front": GREY}, rig, x, caption=c))[:36].astype(int)
        for x, c in ((result(), ""), (result(info=told), "run 7"), (result(warnings=("too dark " * 60,)), ""))
    )
    assert (plain != full).any() and near(warned, (255, 123, 114)).sum() > 50 > near(plain, (255, 123, 114)).sum()


@pytest.mark.parametrize(
    ("images", "settings", "message"),
    [({"frnt": GREY}, {}, "no camera 'frnt'; did you mean front"),
     ({"front": GREY[::2]}, {}, "is 640 x 240 pixels, and"),
     ([GREY, GREY], {}, "2 images were given for 1 cameras"), ({"front": 3.0}, {}, "is float; give RGB"),
     ({"front": GREY}, {"x_range": (5.0, 5.0)}, "x_range of the bird's-eye view is"),
     ({"front": GREY}, {"y_range": (5.0, 1.0)}, "y_range of the bird's-eye view is")],
)  # fmt: skip
def test_what_does_not_fit_is_named(images, settings, message):
    with pytest.raises(DataError, match=message):
        draw_live(images, Rig([CAMERAS["pinhole"]]), result(), **settings)


def test_a_list_of_another_length_than_the_camera_rig():
    plain = NumpyCameraRig(np.eye(3)[None], FORWARD[None], np.array([True]))
    with pytest.raises(DataError, match="2 images were given, and the rig has 1 cameras"):
        draw_live([GREY, GREY], plain, result())


def test_pictures_need_no_torch():
    code = """
import sys
sys.modules["torch"] = None
import perception.visualization.live
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=PROJECT)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow  # a measurement
def test_six_images_take_less_than_50_ms():
    rig, rng = Rig.load("nuscenes"), np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (900, 1600, 3), dtype=np.uint8) for name in rig.names}
    boxes = [(*rng.uniform(-40, 40, 2), rng.integers(10), 0.9) for _ in range(40)]
    lines = [
        (np.cumsum(rng.normal(size=(20, 2)), 0) + rng.uniform(-25, 25, 2), rng.integers(3), 0.9) for _ in range(15)
    ]
    objects, seconds = result(boxes, lines), []
    for _ in range(40):
        start = time.process_time()
        draw_live(images, rig, objects)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.05
