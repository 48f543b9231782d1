"""Pictures of boxes and lines, compared with pixels computed by hand."""

import numpy as np
import pytest
import torch

from perception.cameras import usual_mounting
from perception.errors import DataError
from perception.types import BOX_CLASSES, LINE_CLASSES, Boxes, CameraRig, Frame, FrameObjects, Polylines, Seen
from perception.visualization.pictures import BOX_COLORS, LINE_COLORS, draw_bev, draw_cameras, draw_frame

W, H, FOCAL = 480, 270, 200.0
CX, CY, HEIGHT = 240.0, 135.0, 1.5  # the camera is 1.5 m above the ego origin and looks along ego x
EGO_FROM_CAM = torch.tensor(
    [[0.0, 0.0, 1.0, 0.0], [-1.0, 0.0, 0.0, 0.0], [0.0, -1.0, 0.0, HEIGHT], [0.0, 0.0, 0.0, 1.0]]
)
GREY = 40


def make_rig(count=1):
    img_from_cam = torch.tensor([[FOCAL, 0.0, CX], [0.0, FOCAL, CY], [0.0, 0.0, 1.0]])
    return CameraRig(
        img_from_cam.expand(count, 3, 3), EGO_FROM_CAM.expand(count, 4, 4), torch.ones(count, dtype=torch.bool)
    )


def make_objects(boxes=(), lines=()):
    """boxes: (class, x, y, z, l, w, h, yaw, vx, vy); lines: (class, points). One padded NaN entry each."""
    M, P = len(boxes), max([len(points) for _, points in lines], default=2)
    numbers = torch.full((M + 1, 9), float("nan"))
    points = torch.full((len(lines) + 1, P, 2), float("nan"))
    for index, (_, *rest) in enumerate(boxes):
        numbers[index] = torch.tensor(rest)
    for index, (_, vertices) in enumerate(lines):
        points[index] = torch.tensor(vertices)
    box_labels = torch.tensor([BOX_CLASSES.index(b[0]) for b in boxes] + [-1])
    line_labels = torch.tensor([LINE_CLASSES.index(l[0]) for l in lines] + [-1])
    return FrameObjects(
        Boxes(
            numbers[:, :3],
            numbers[:, 3:6],
            numbers[:, 6],
            numbers[:, 7:],
            box_labels,
            torch.full((M + 1,), -1),
            torch.ones(M + 1),
            torch.arange(M + 1) < M,
            torch.zeros(M + 1, 9),
        ),
        Polylines(
            points,
            torch.zeros(len(lines) + 1, dtype=torch.bool),
            line_labels,
            torch.ones(len(lines) + 1),
            torch.arange(len(lines) + 1) < len(lines),
            torch.zeros(points.shape),
        ),
    )


def grey_images(count=1, height=H, width=W):
    return torch.full((count, 3, height, width), GREY, dtype=torch.uint8)


def camera_picture(objects, gt=None, **options):
    (picture,) = draw_cameras(grey_images(), make_rig(), objects, gt, **options)
    return np.asarray(picture).astype(int)


def drawn(picture):
    """Returns the centres u, v of all pixels that differ from the background."""
    v, u = np.nonzero(np.abs(picture - GREY).max(-1) > 12)
    return u + 0.5, v + 0.5


def test_a_line_on_the_ground_follows_the_pinhole_model():
    # 10 m ahead the ground is at v = CY + 200 * 1.5 / 10 = 165; y from 1 to 3 m (left) is u = 220 down to 180.
    picture = camera_picture(make_objects(lines=[("divider", [[10.0, 1.0], [10.0, 3.0]])]))
    assert tuple(picture[165, 200]) == LINE_COLORS["divider"]
    u, v = drawn(picture)
    assert u.min() == pytest.approx(180, abs=2.1) and u.max() == pytest.approx(220, abs=2.1)
    assert v.min() == pytest.approx(165, abs=2.1) and v.max() == pytest.approx(165, abs=2.1)


def test_a_box_spans_the_pixels_of_its_nearest_face():
    # A bus ahead on the right: its rear face is at x = 10, y from -4 to -2, z from 0.5 to 3.5; all other
    # points are projected closer to the vanishing point (CX, CY).
    picture = camera_picture(make_objects([("bus", 13.0, -3.0, 2.0, 6.0, 2.0, 3.0, 0.0, 0.0, 0.0)]))
    u, v = drawn(picture)
    assert u.max() == pytest.approx(CX + FOCAL * 4 / 10, abs=2)
    assert v.max() == pytest.approx(CY + FOCAL * (HEIGHT - 0.5) / 10, abs=2)
    assert v.min() == pytest.approx(CY - FOCAL * (3.5 - HEIGHT) / 10, abs=2)
    assert u.min() == pytest.approx(CX + FOCAL * 2 / 16, abs=2)
    assert tuple(picture[130, 320]) == BOX_COLORS["bus"]  # on the outer post of the rear face
    # The front face is tinted: at x = 16 it spans u 265..290, v 110..147.5. The rear's middle has no tint.
    assert tuple(picture[120, 275]) != (GREY,) * 3
    assert tuple(picture[143, 301]) == (GREY,) * 3


def test_a_picture_of_another_size_keeps_the_geometry():
    big = draw_cameras(
        grey_images(height=2 * H, width=2 * W),
        make_rig()._replace(img_from_cam=torch.tensor([[[400.0, 0, 480.0], [0, 400.0, 270.0], [0, 0, 1]]])),
        make_objects(lines=[("divider", [[10.0, 1.0], [10.0, 3.0]])]),
    )[0]
    assert big.size == (W, H)
    assert big.getpixel((200, 165)) == LINE_COLORS["divider"]


def test_objects_behind_the_camera_are_not_drawn():
    objects = make_objects(
        [("car", -8.0, 0.5, 1.0, 4.0, 2.0, 1.6, 0.0, 5.0, 0.0)], [("boundary", [[-1.0, -5.0], [-20.0, 8.0]])]
    )
    assert len(drawn(camera_picture(objects, objects))[0]) == 0


def test_a_line_through_the_camera_plane_stays_on_its_own_ray():
    # Parallel to the car, 1 m to the left, from far behind to far ahead: it enters at the lower border and runs
    # towards the vanishing point on the line u - CX = -(1 / 1.5) (v - CY), always below the horizon.
    picture = camera_picture(make_objects(lines=[("boundary", [[-30.0, 1.0], [60.0, 1.0]])]))
    u, v = drawn(picture)
    assert len(u) > 100 and v.max() > H - 1
    assert v.min() > CY and u.max() < CX
    assert np.abs(u - CX + (v - CY) / 1.5).max() < 3


def test_a_box_around_the_camera_plane_stays_in_its_part_of_the_image():
    # A long trailer on the right of the car reaches from behind the camera to ahead of it.
    picture = camera_picture(make_objects([("trailer", 2.0, -4.0, 1.5, 12.0, 2.0, 2.0, 0.0, 0.0, 0.0)]))
    u, v = drawn(picture)
    assert u.min() > CX + FOCAL * 3 / 8 - 3  # its front inner post, 8 m ahead
    assert len(v) > 50


def test_near_boxes_cover_far_ones():
    near = ("car", 10.0, 0.0, 1.5, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0)
    # Its front bottom edge is the ground line of the farther box: both cross column 240 at the same row 142.
    far = ("bus", 21.0, 0.0, 2.5, 2.0, 20.0, 4.0, 0.0, 0.0, 0.0)
    for order in ([near, far], [far, near]):
        picture = camera_picture(make_objects(order))
        post = picture[125, 217:220].tolist()  # the near car's rear post at u = 240 - 200 / 9
        assert list(BOX_COLORS["car"]) in post


def test_ground_truth_is_dashed_white_and_predictions_are_solid():
    line = [("ped_crossing", [[10.0, -8.0], [10.0, 8.0]])]
    predicted = camera_picture(make_objects(lines=line))[165, 100:380]
    assert (predicted == LINE_COLORS["ped_crossing"]).all()
    gt = camera_picture(make_objects(), make_objects(lines=line))[164:167, 100:380].max(0)
    white = (gt > 200).all(-1)
    assert 0.3 < white.mean() < 0.8 and (gt == GREY).all(-1).mean() > 0.2


def test_the_score_threshold_applies_to_predictions_only():
    objects = make_objects([("car", 10.0, 0.0, 1.0, 4.0, 2.0, 1.6, 0.0, 0.0, 0.0)])
    weak = objects._replace(boxes=objects.boxes._replace(score=torch.full((2,), 0.2)))
    assert len(drawn(camera_picture(weak))[0]) == 0
    assert len(drawn(camera_picture(weak, min_score=0.1))[0]) > 0
    assert len(drawn(camera_picture(make_objects(), weak))[0]) > 0


def test_unseen_parts_of_lines_are_faint_from_above_and_not_in_images():
    # Eleven points from 10 m ahead to 10 m behind, 3 m to the left; what is behind is not seen.
    line = make_objects(lines=[("boundary", [[10.0 - 2 * k, 3.0] for k in range(11)])])
    points = line.lines.points
    seen = Seen(torch.ones(1), (points[..., 0] >= 0) & points.isfinite().all(-1))
    above = bev(line, seen=seen)
    column = above[:, 128 - 30]
    ahead, behind = column[256 - 90 : 256 - 20], column[256 + 30 : 256 + 90]
    assert (ahead == LINE_COLORS["boundary"]).all()
    panel, color = np.array(bev(make_objects()))[300, 98], np.array(LINE_COLORS["boundary"])
    share = (behind[:, 0] - panel[0]) / (color[0] - panel[0])
    assert 0.1 < np.median(share) < 0.6
    assert (bev(line)[256 + 30 : 256 + 90, 128 - 30] == LINE_COLORS["boundary"]).all()
    across = make_objects(lines=[("divider", [[10.0, 1.0], [10.0, 3.0], [10.0, 5.0]])])
    half = Seen(torch.ones(1), torch.tensor([[True, False, False], [False] * 3]))
    u, _ = drawn(camera_picture(across, seen=half))  # y from 1 to 3 m is u = 220 down to 180; the rest is not seen
    assert u.min() == pytest.approx(180, abs=2.1)
    assert len(drawn(camera_picture(across, seen=Seen(half.boxes, torch.zeros(2, 3, dtype=torch.bool))))[0]) == 0


def test_a_note_is_red_and_ends_before_the_border():
    mounting = (tensor[0] for tensor in usual_mounting(1, 6))
    frame = Frame(grey_images(), make_rig(), torch.eye(4), torch.zeros(()), torch.tensor(True), *mounting)
    plain = np.asarray(draw_frame(frame, make_objects(), caption="a")).astype(int)
    noted = np.asarray(draw_frame(frame, make_objects(), caption="a", note="trained on other data " * 20)).astype(int)
    v, u = np.nonzero((noted != plain).any(-1))
    assert len(u) > 500 and v.max() < 44 and u.max() < noted.shape[1] - 8
    added = (noted - plain)[v, u]
    assert (added[:, 0] >= added[:, 2]).all()


def bev(objects, gt=None, **options):
    picture = draw_bev(
        objects, gt, **options, x_range=(-25.6, 25.6), y_range=(-12.8, 12.8), height=512
    )  # 10 pixels per metre
    return np.asarray(picture).astype(int)


def test_bev_has_x_up_and_y_left():
    box = ("car", 20.0, 8.0, 1.0, 4.0, 2.0, 1.6, 0.0, 0.0, 0.0)
    picture, empty = bev(make_objects([box])), bev(make_objects())
    assert picture.shape == (512, 256, 3)
    v, u = np.nonzero((picture != empty).any(-1))
    # x 18..22 is v = 36..76, y 7..9 is u = 38..58.
    assert (u.min(), u.max() + 1) == pytest.approx((38, 58), abs=2)
    assert (v.min(), v.max() + 1) == pytest.approx((36, 76), abs=2)
    assert tuple(picture[50, 38]) == BOX_COLORS["car"]
    # The heading runs from the centre (56, 48) up to the nose, not down to the tail.
    assert tuple(picture[45, 48]) == BOX_COLORS["car"] != tuple(picture[66, 48])


def test_bev_turns_yaw_and_velocity_to_the_left():
    turned = ("truck", 0.0, 6.0, 1.0, 8.0, 2.0, 2.0, np.pi / 2, 0.0, 0.0)
    v, u = np.nonzero((bev(make_objects([turned])) != bev(make_objects())).any(-1))
    assert (u.min(), u.max() + 1) == pytest.approx((28, 108), abs=2)  # y 2..10
    assert (v.min(), v.max() + 1) == pytest.approx((246, 266), abs=2)  # x -1..1
    moving = (*turned[:-1], 2.0)  # 2 m/s to the left: the arrow starts at the nose, u = 28
    v, u = np.nonzero((bev(make_objects([moving])) != bev(make_objects([turned]))).any(-1))
    assert u.min() < 12 and u.max() < 32 and (v.min() + v.max()) / 2 == pytest.approx(256, abs=2)


def test_bev_lines_and_ego_marker():
    picture = bev(make_objects(lines=[("divider", [[5.0, -10.0], [15.0, -10.0]])]))
    assert tuple(picture[150, 228]) == LINE_COLORS["divider"]
    assert tuple(picture[240, 128]) != tuple(picture[240, 28])  # the car at the origin


def make_frame(names, rig=None):
    images = grey_images(len(names))
    for index in range(len(names)):
        images[index] = 23 * index + 20
    mounting = (tensor[0] for tensor in usual_mounting(1, len(names)))
    return Frame(images, rig or make_rig(len(names)), torch.eye(4), torch.tensor(0.0), torch.tensor(True), *mounting)


def test_composite_arranges_six_cameras_as_on_the_car():
    names = ["CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT"]
    picture = draw_frame(make_frame(names), make_objects(), make_objects(), cameras=names, caption="town")
    grid = [["CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT"], ["CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT"]]
    for row in range(2):
        for column in range(3):
            pixel = picture.getpixel((8 + column * 488 + 240, 44 + row * 278 + 200))
            assert pixel == (23 * names.index(grid[row][column]) + 20,) * 3
    assert picture.width > 3 * 480 + 500 and picture.height > 600


@pytest.mark.parametrize("count", [1, 5, 11])
def test_composite_of_any_number_of_cameras(count):
    names = [f"cam{index}" for index in range(count)]
    picture = draw_frame(make_frame(names), make_objects(), camera_width=160)
    row, column = divmod(count - 1, 3)
    assert picture.getpixel((8 + column * 168 + 80, 44 + row * 98 + 70)) == (23 * (count - 1) + 20,) * 3


def test_a_missing_camera_leaves_an_empty_tile():
    rig = make_rig(2)._replace(present=torch.tensor([True, False]))
    objects = make_objects([("car", 10.0, 0.0, 1.0, 4.0, 2.0, 1.6, 0.0, 0.0, 0.0)])
    seen, missing = draw_cameras(grey_images(2), rig, objects)
    assert len(missing.getcolors()) == 1 and len(seen.getcolors(100000)) > 1
    draw_frame(make_frame(["a", "b"], rig), objects)


def test_float_images_are_drawn_as_uint8():
    images = grey_images().float() + 0.4
    (picture,) = draw_cameras(images, make_rig(), make_objects())
    assert picture.getpixel((3, 3)) == (GREY,) * 3


def test_wrong_shapes_are_named():
    objects, rig = make_objects([("car", 10.0, 0.0, 1.0, 4.0, 2.0, 1.6, 0.0, 0.0, 0.0)]), make_rig()
    batched = FrameObjects(Boxes(*(f[None] for f in objects.boxes)), Polylines(*(f[None] for f in objects.lines)))
    with pytest.raises(DataError, match="one frame"):
        draw_cameras(grey_images()[None], rig, objects)
    with pytest.raises(DataError, match="one frame"):
        draw_bev(batched)
    with pytest.raises(DataError, match="one frame"):
        draw_bev(objects._replace(lines=batched.lines))
    with pytest.raises(DataError, match="1 camera images but 2 camera names"):
        draw_frame(make_frame(["a"]), objects, cameras=["a", "b"])
    with pytest.raises(DataError, match="x_range"):
        draw_bev(objects, x_range=(5.0, -5.0))
