"""Each limit of plausible rigs and images, just inside and just outside, on rigs and images in closed form."""

import numpy as np
import pytest

from perception.errors import PerceptionWarning
from perception.export.images import from_rgb
from perception.inference.plausibility import ImageStatistics, Warnings, implausible_rig, sampled_rgb
from perception.types import NumpyCameraRig

H, W = 100, 200
AHEAD = np.array([[0.0, 0, 1, 1], [-1, 0, 0, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]])  # ego_from_cam, looking along x


def about(axis, degrees):
    """A rotation about a camera axis (0 right, 1 down, 2 forward)."""
    a, b = [(1, 2), (2, 0), (0, 1)][axis]
    turn, angle = np.eye(4), np.radians(degrees)
    turn[a, a] = turn[b, b] = np.cos(angle)
    turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
    return turn


def found(cameras=1, change=lambda matrix, pose: None, seeing=True, turn=None):
    """Kinds and sentences for cameras in different places, the last of which is changed."""
    img_from_cam = np.tile([[150.0, 0, W / 2], [0, 150, H / 2], [0, 0, 1]], (cameras, 1, 1))
    poses = np.tile(AHEAD, (cameras, 1, 1))
    poses[:, 1, 3] = np.arange(cameras) / 10
    if turn is not None:
        poses[-1] = poses[-1] @ turn
    change(img_from_cam[-1], poses[-1])
    rig = NumpyCameraRig(img_from_cam, poses, np.ones(cameras, bool))
    return implausible_rig(rig, [(H, W)] * cameras, np.full(cameras, seeing))


def setting(**values):
    def change(matrix, pose):
        for name, value in values.items():
            row, column = {"fx": (0, 0), "fy": (1, 1), "cx": (0, 2), "cy": (1, 2)}.get(name, (0, 0))
            if name in ("x", "y", "z"):
                pose["xyz".index(name), 3] = value
            else:
                matrix[row, column] = value

    return change


LIMITS = {
    # 2 cx / W and 2 cy / H are about the same factor, of 1 / 1.18 or 1.18
    "smaller image": ("image size", {"cx": 86, "cy": 43}, {"cx": 84, "cy": 42}),
    "larger image": ("image size", {"cx": 117, "cy": 58.5}, {"cx": 118.5, "cy": 59.25}),
    "shape of another image": ("image size", {"cx": 126, "cy": 55}, {"cx": 126, "cy": 57}),
    "left of the centre": ("principal point", {"cx": 41}, {"cx": 39}),
    "right of the centre": ("principal point", {"cx": 159}, {"cx": 161}),
    "above the image": ("principal point", {"cy": -49}, {"cy": -51}),
    "below the image": ("principal point", {"cy": 149}, {"cy": 151}),
    "wide": ("focal length", {"fx": 31, "fy": 31}, {"fx": 29, "fy": 29}),
    "narrow": ("focal length", {"fx": 990, "fy": 990}, {"fx": 1010, "fy": 1010}),
    "squeezed": ("focal length", {"fx": 100, "fy": 159}, {"fx": 100, "fy": 161}),
    "stretched": ("focal length", {"fx": 159, "fy": 100}, {"fx": 161, "fy": 100}),
    "below the ground": ("height", {"z": 0.0}, {"z": -0.01}),
    "high": ("height", {"z": 6.0}, {"z": 6.01}),
    "far away": ("distance", {"x": 12.0, "y": -15.9}, {"x": 12.0, "y": -16.1}),
}  # fmt: skip


@pytest.mark.parametrize("name", LIMITS)
def test_limits_of_rigs(name):
    kind, good, bad = LIMITS[name]
    assert found(change=setting(**good)) == {}
    assert list(found(change=setting(**bad))) == [kind]
    sentence = found(4, change=setting(**bad))[kind]
    assert "_cam[3]" in sentence and "the same holds" not in sentence


def test_limits_of_angles():
    assert found(turn=about(2, 44)) == found(turn=about(2, -44)) == found(turn=about(0, 29)) == {}
    assert "rolled by" in found(turn=about(2, 46))["roll"] and "46 degrees" in found(turn=about(2, -46))["roll"]
    assert "looks 31 degrees upwards" in found(turn=about(0, 31))["elevation"]
    assert found(turn=about(0, -60)) == {}  # down to the road


def test_two_cameras_in_one_place_differ_in_their_focal_length():
    assert found(2) == {}
    same = setting(y=0.0)
    assert "ego_from_cam[1] and rig.ego_from_cam[0] are the same pose" in found(2, same)["same pose"]
    assert list(found(2, setting(y=0.0005))) == ["same pose"] and found(2, setting(y=0.002)) == {}
    for focal, kinds in ((134, []), (137, ["same pose"]), (163, ["same pose"]), (168, [])):
        assert list(found(2, setting(y=0.0, fx=focal, fy=focal))) == kinds, focal
    assert found(2, turn=about(1, 30), change=same) == {}


def test_others_with_the_same_fault_are_counted():
    assert found(3, seeing=False)["blind camera"].endswith("check its calibration; the same holds for 2 more")
    rig = NumpyCameraRig(np.zeros((1, 3, 3)), np.eye(4)[None], np.zeros(1, bool))
    assert list(implausible_rig(rig, [(H, W)], np.zeros(0, bool))) == ["no camera"]


def test_a_camera_of_several_images_is_one_camera_and_faulty_as_a_whole():
    names = ("wide", "wide", "front")
    rig = NumpyCameraRig(np.tile(150 * np.eye(3), (3, 1, 1)), np.tile(AHEAD, (3, 1, 1)), np.ones(3, bool))
    rig.img_from_cam[:, :2, 2], rig.ego_from_cam[:, 1, 3] = (W / 2, H / 2), (0, 1, 2)

    def blind(seeing):
        return implausible_rig(rig, [(H, W)] * 3, np.array(seeing), names).get("blind camera", "")

    assert blind([False, True, True]) == "" and "rig: camera 0 sees nothing" in blind([False, False, True])
    assert "more" not in blind([False, False, True]) and blind([False] * 3).endswith("the same holds for 1 more")
    picture, flat = sampled_rgb(scenery(SKY, ROAD)), np.full((24, 32, 3), 7, np.float32)

    def dead(*images):
        return ImageStatistics(names).implausible(dict(enumerate(images)))[0].get("no contrast", "")

    assert dead(flat, picture, np.roll(picture, 1, 1)).startswith("images[0] has the same value in a whole image of")
    assert dead(flat, flat, picture).startswith("images[0] has the same value everywhere, 7:")
    assert "images[0] (and 1 others)" in dead(flat, flat, flat)
    # Colours of fewer than three cameras may be odd by chance, however many images they become.
    assert list(findings(scenery(ORANGE, ROAD, BLUISH), cameras=3)) == ["swapped colours"]
    assert findings(scenery(ORANGE, ROAD, BLUISH), cameras=3, names=names) == {}


def test_warnings_are_given_once_but_events_every_time():
    warned, findings = Warnings(["front", "rear"]), {"height": "rig.ego_from_cam[1] is high", "motion": "a jump"}
    with pytest.warns(PerceptionWarning) as first:
        sentences = warned.emit(findings)
    assert sentences == ("rig.ego_from_cam['rear'] is high", "a jump")
    assert [str(warning.message) for warning in first] == list(sentences)
    with pytest.warns(PerceptionWarning) as again:
        assert warned.emit(findings) == sentences
    assert [str(warning.message) for warning in again] == ["a jump"]
    text = "images[0] and images[1] are the same; camera 1 is blind; 1 of 2"
    with pytest.warns(PerceptionWarning):
        expected = "images['front'] and images['rear'] are the same; camera 'rear' is blind; 1 of 2"
        assert warned.emit({"new": text}) == (expected,)
    with pytest.warns(PerceptionWarning, match=r"images\[0\] and"):
        Warnings().emit({"new": text})


# --- Images -----------------------------------------------------------------------------------------------------------


def test_pixels_are_taken_from_a_regular_grid():
    rows, columns = np.mgrid[:96, :128].astype(np.uint8)
    image = np.stack([rows, columns, 255 - rows], -1)
    pixels = sampled_rgb(image)
    assert pixels.shape == (24, 32, 3) and pixels.dtype == np.float32
    assert pixels[:, 0, 0].tolist() == list(range(2, 96, 4)) and pixels[0, :, 1].tolist() == list(range(2, 128, 4))
    assert np.array_equal(sampled_rgb(image[..., ::-1], "bgr"), pixels)
    assert np.array_equal(sampled_rgb(image.transpose(2, 0, 1), "rgb-chw"), pixels)
    assert np.array_equal(sampled_rgb(image[..., ::-1].transpose(2, 0, 1), "bgr-chw"), pixels)
    assert sampled_rgb(image[:10, :20]).shape == (10, 20, 3)


@pytest.mark.parametrize("color", [(200, 40, 60), (30, 180, 90), (20, 40, 220), (128, 128, 128)])
def test_nv12_gives_about_the_colours(color):
    pixels = sampled_rgb(from_rgb(np.full((96, 128, 3), color, np.uint8), "nv12-709"), "nv12-709")
    assert pixels.shape == (24, 32, 3) and (pixels == pixels[0, 0]).all()
    assert np.abs(pixels[0, 0] - color).max() < 45 and pixels[0, 0].argmax() == np.argmax(color)


def scenery(top, bottom, foliage=None, share=0.3):
    """An image of a colour above and one below, and leaves on a share of the columns of its lower half."""
    image = np.zeros((24, 40, 3), np.uint8)
    image[:12], image[12:] = top, bottom
    if foliage is not None:
        image[12:, : round(40 * share)] = foliage
    image[::5, ::7] += 3  # no two images alike, and no image without contrast
    return image


def findings(image, cameras=4, frames=3, names=()):
    statistics = ImageStatistics(names)
    for _ in range(frames):
        images = {n: sampled_rgb(np.roll(image, n, 1)) for n in range(cameras)}
        result, kept = statistics.implausible(images)
        statistics.keep(kept)
    return result


SKY, ROAD, LEAVES, BLUISH = (180, 190, 210), (100, 100, 100), (60, 110, 40), (40, 110, 60)
ORANGE = SKY[::-1]


def test_swapped_colours():
    assert findings(scenery(SKY, ROAD, LEAVES)) == {}
    assert list(findings(scenery(ORANGE, ROAD, BLUISH))) == ["swapped colours"]
    assert findings(scenery(ORANGE, ROAD, LEAVES)) == findings(scenery(SKY, ROAD, BLUISH)) == {}
    assert findings(scenery(ORANGE, ROAD)) == {}  # without foliage
    assert list(findings(scenery(ORANGE, ROAD, BLUISH, 0.05))) == ["swapped colours"]  # 0.025 of the image
    assert findings(scenery(ORANGE, ROAD, BLUISH, 0.025)) == {}  # 0.0125
    assert list(findings(scenery(ORANGE, ROAD, BLUISH), cameras=3)) == ["swapped colours"]
    assert findings(scenery(ORANGE, ROAD, BLUISH), cameras=2) == {}
    assert findings(scenery(ORANGE, ROAD, BLUISH), frames=2) == {}
    dusk = (scenery(ORANGE, ROAD, BLUISH) * 0.4).astype(np.uint8)
    assert findings(dusk) == {}


def test_upside_down():
    assert findings(scenery(SKY, ROAD)) == {}
    assert list(findings(scenery(ROAD, SKY))) == ["upside down"]
    assert "100 % of their lower third and 0 %" in findings(scenery(ROAD, SKY))["upside down"]
    assert findings(scenery(ROAD, SKY), frames=2) == {}
    for share, cameras, kinds in (
        (0.1, 4, []), (0.15, 4, ["upside down"]), (0.15, 3, ["upside down"]), (0.15, 2, []), (0.4, 2, []),
        (0.5, 2, ["upside down"]), (0.5, 1, ["upside down"]),
    ):  # fmt: skip
        assert list(findings(scenery(ROAD, ROAD, SKY, share), cameras)) == kinds, (share, cameras)


@pytest.mark.parametrize(("walls", "kinds"), [(4, []), (5, []), (6, ["upside down"])])
def test_bright_pavement_before_walls_is_no_sky(walls, kinds):
    """Of eight cameras some see a dark wall above bright pavement, and the others the sky."""
    statistics = ImageStatistics()
    for _ in range(3):
        images = [scenery(ROAD, SKY)] * walls + [scenery(SKY, ROAD)] * (8 - walls)
        result, kept = statistics.implausible({n: sampled_rgb(np.roll(im, n, 1)) for n, im in enumerate(images)})
        statistics.keep(kept)
    assert list(result) == kinds


def test_a_few_frames_the_other_way_do_not_outweigh_many():
    statistics, good, bad = ImageStatistics(), scenery(SKY, ROAD), scenery(ROAD, SKY)
    counts = []
    for image in [good] * 5 + [bad] * 12:
        result, kept = statistics.implausible({n: sampled_rgb(np.roll(image, n, 1)) for n in range(4)})
        statistics.keep(kept)
        counts.append("upside down" in result)
    # With weights of 0.9 to the age: after k bad frames 1 - 0.9^k against 0.9^k (1 - 0.9^5), twice as much.
    expected = []
    for k in range(1, 13):
        good_weight, bad_weight = 0.9**k * (1 - 0.9**5), 1 - 0.9**k
        expected.append(bad_weight >= 2 * good_weight)
    assert counts == [False] * 5 + expected and 3 < expected.index(True) < 12


def test_images_without_content_and_the_same_image_twice():
    def kinds(**images):
        pixels = {n: np.asarray(image, np.float32) for n, image in enumerate(images.values())}
        return ImageStatistics().implausible(pixels)[0]

    picture = sampled_rgb(scenery(SKY, ROAD))
    assert kinds(a=picture, b=np.roll(picture, 1, 1)) == {}
    flat = kinds(a=picture, b=np.full_like(picture, 7), c=np.full_like(picture, 9))
    assert flat.keys() == {"no contrast"} and "images[1] (and 1 others)" in flat["no contrast"]
    assert "everywhere, 7:" in flat["no contrast"]
    assert "others" not in kinds(a=picture, b=np.full_like(picture, 7))["no contrast"]
    bits = (np.arange(picture.size).reshape(picture.shape) // 3) % 2
    assert list(kinds(a=bits, b=picture)) == ["0..1"] and kinds(a=2 * bits, b=picture) == {}
    twice = kinds(a=picture, b=np.roll(picture, 1, 1), c=picture)
    assert "images[0] and images[2] are the same picture" in twice["same image"]
    assert list(kinds(a=np.full_like(picture, 7), b=np.full_like(picture, 7))) == ["no contrast"]
