"""Implausible input of live use is refused or warned of once; real rigs and recordings give no warning."""

import json
import warnings

import numpy as np
import pytest
import torch
from conftest import RAW, existing, noisy
from PIL import Image
from toy_network import ToyConfig, ToyNetwork

from perception.errors import DataError, PerceptionWarning
from perception.geometry import invert_rigid, rigid_from_quaternion
from perception.inference.checks import checked_rig
from perception.inference.live import LiveInput
from perception.inference.plausibility import sampled_rgb
from perception.inference.predictor import Predictor
from perception.synthetic.sensors import EIGHT_CAMERAS, FIVE_CAMERAS, SIX_CAMERAS, make_cameras
from perception.types import CameraRig, NumpyCameraRig, Weights

H, W = RAW
OPTICAL = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])  # body axes from camera axes


# --- What is good: calibrations of real vehicles, and recordings where they are there -------------------------------


def pinhole(focal, center):
    return np.array([[focal, 0, center[0]], [0, focal, center[1]], [0, 0, 1]])


def mounted(x, y, z, roll=0.0, pitch=0.0, yaw=0.0):
    """ego_from_cam of a camera in body axes (ROS): yaw, pitch, roll about z, y, x in radians."""
    (sr, sp, sy), (cr, cp, cy) = np.sin([roll, pitch, yaw]), np.cos([roll, pitch, yaw])
    about_z, about_y = (
        np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]]),
        np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]]),
    )
    body = np.eye(4)
    body[:3, :3] = about_z @ about_y @ np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    body[:3, 3] = x, y, z
    return body @ OPTICAL


def argoverse2():
    """Ring and stereo cameras of Argoverse 2: height, width, focal length, principal point, quaternion, position."""
    return [
        ((2048, 1550), pinhole(1776.04, (777.99, 1013.52)), rigid_from_quaternion(q, t)) if portrait else
        ((1550, 2048), pinhole(1687.0, (1028.0, 766.0)), rigid_from_quaternion(q, t))
        for portrait, q, t in (
            (True, (0.5016, -0.4986, 0.5011, -0.4987), (1.635, 0.003, 1.398)),
            (False, (0.637, -0.6689, 0.2769, -0.2648), (1.546, 0.204, 1.394)),
            (False, (0.264, -0.2773, 0.6703, -0.6357), (1.551, -0.199, 1.398)),
            (False, (0.6019, -0.6035, -0.37, 0.3697), (1.09, 0.126, 1.419)),
            (False, (-0.3684, 0.3682, 0.6037, -0.6035), (1.101, -0.127, 1.415)),
            (False, (0.6877, -0.7215, -0.0593, 0.0545), (1.306, 0.276, 1.407)),
            (False, (-0.0561, 0.0536, 0.7234, -0.6861), (1.306, -0.279, 1.396)),
            (False, (0.5008, -0.499, 0.5007, -0.4995), (1.625, 0.251, 1.191)),
            (False, (0.5033, -0.4992, 0.4985, -0.4989), (1.631, -0.248, 1.19)),
        )
    ]  # fmt: skip


def kitti():
    """The two colour cameras, in an ego frame on the ground below the IMU (0.93 m high)."""
    ground = np.eye(4)
    ground[2, 3] = 0.93
    imu_from_velo, cam_from_velo = np.eye(4), np.eye(4)
    imu_from_velo[:3, 3] = 0.81, -0.32, 0.80
    cam_from_velo[:3] = [
        [0.007534, -0.999971, -0.000617, -0.00407], [0.014802, 0.000728, -0.99989, -0.07632],
        [0.999862, 0.007524, 0.014808, -0.27178],
    ]  # fmt: skip
    left = ground @ imu_from_velo @ invert_rigid(cam_from_velo)
    right = left.copy()
    right[1, 3] -= 0.53
    return [((375, 1242), pinhole(721.54, (609.56, 172.85)), pose) for pose in (left, right)]


def autoware():
    """Four pitched cameras around the sensor kit and two level ones, 1440 x 1080."""
    angles = ((-0.025, 0.315, 1.035), (-0.025, 0.32, -2.12), (0, 0.335, -1.04), (0, 0.325, 2.094), (0, -0.03, -0.005),
              (0, -0.01, 3.125))  # fmt: skip
    return [((1080, 1440), pinhole(1050.0, (720.0, 540.0)), mounted(0.9, 0.3, 1.75, *angle)) for angle in angles]


def surround():
    """Four fisheye cameras of a passenger car as 100 degree pinholes, as they are mounted: steep downwards."""
    places = ((3.7, 0, 0.66, 0, 20), (2.1, 0.98, 1.05, 90, 35), (2.1, -0.98, 1.05, -90, 35), (-1.05, 0, 0.9, 180, 25))
    return [
        ((966, 1280), pinhole(537.0, (640.0, 483.0)), mounted(x, y, z, 0, np.radians(down), np.radians(yaw)))
        for x, y, z, yaw, down in places
    ]


def others():
    """A truck's high camera, a tele camera, a portrait image, and an image that is cropped at its top."""
    return [
        ((1080, 1920), pinhole(1000.0, (960.0, 540.0)), mounted(5.0, 0, 2.9, 0, 0.15)),
        ((2160, 3840), pinhole(7300.0, (1920.0, 1080.0)), mounted(1.7, 0.1, 1.4)),
        ((1600, 900), pinhole(605.0, (450.0, 800.0)), mounted(1.7, 0.0, 1.4)),
        ((400, 1600), pinhole(1266.4, (816.3, -8.5)), mounted(1.7, -0.1, 1.4)),
    ]


def town_rig(mountings):
    def make():
        cameras = make_cameras(np.random.default_rng(4), (225, 400), mountings)
        return [(camera.image_size, camera.img_from_cam, camera.ego_from_cam) for camera in cameras]

    return make


RIGS = {
    "argoverse2": argoverse2, "kitti": kitti, "autoware": autoware, "surround": surround, "others": others,
    "six": town_rig(SIX_CAMERAS), "five": town_rig(FIVE_CAMERAS), "eight": town_rig(EIGHT_CAMERAS),
}  # fmt: skip


def inspected(live, sizes, rig, images, k=0, image_format="rgb"):
    """Inspects and keeps one frame of a vehicle that drives 1 m ahead in 0.1 s; returns its findings."""
    pose = np.eye(4)
    pose[0, 3] = k
    motion = live.ego_motion.since_last(pose, 0.1 * k)
    checked, moved, found = live.carried(checked_rig(rig, len(sizes)), motion, None)
    pixels = {n: sampled_rgb(image, image_format) for n, image in enumerate(images)}
    step = live.inspect(motion, checked, moved, sizes, pixels, found)
    live.keep(step)
    return step.findings


def make_input(image_size=(176, 448)):
    return LiveInput(image_size, True, weights=Weights(), max_speed=60, max_turn_rate=2)


@pytest.mark.parametrize("name", RIGS)
@pytest.mark.parametrize("image_size", [(176, 448), (928, 1600)])
def test_rigs_of_real_vehicles_are_plausible(name, image_size):
    sizes, img_from_cam, ego_from_cam = zip(*RIGS[name](), strict=True)
    rig = NumpyCameraRig(np.stack(img_from_cam), np.stack(ego_from_cam), np.ones(len(sizes), dtype=bool))
    assert inspected(make_input(image_size), sizes, rig, []) == {}


@pytest.fixture(scope="module")
def recordings(real_keyframe, small_town) -> dict:
    """Three frames each of nuScenes, of a drive with other cameras, and of the town: images, and the rig.

    Images of recordings are reduced to every fourth row and column, and the rig with them.
    """
    info = json.loads((real_keyframe / "sample.json").read_text())["data_list"][0]["images"]
    quarter = np.diag([0.25, 0.25, 1])
    still = [np.asarray(Image.open(real_keyframe / camera["img_path"]))[::4, ::4] for camera in info.values()]
    rig = NumpyCameraRig(
        quarter @ [camera["cam2img"] for camera in info.values()],
        np.array([camera["cam2ego"] for camera in info.values()]),
        np.ones(len(info), dtype=bool),
    )
    found = {"nuscenes": ([still] * 3, rig)}
    folder = existing(real_keyframe.parent / "real_drive", "the real drive")
    cameras = json.loads((folder / "rig.json").read_text())["cameras"]
    poses = [camera["vehicle_from_camera"] for camera in cameras.values()]
    rig = NumpyCameraRig(
        quarter @ [[[c["fx"], c["skew"], c["cx"]], [0, c["fy"], c["cy"]], [0, 0, 1]] for c in cameras.values()],
        np.stack([rigid_from_quaternion(pose["quaternion_wxyz"], pose["translation_m"]) for pose in poses]),
        np.ones(len(cameras), dtype=bool),
    )
    frames = json.loads((folder / "frames.json").read_text())
    drive = [
        [np.asarray(Image.open(folder / frame["cameras"][n]["file"]))[::4, ::4] for n in cameras] for frame in frames
    ]
    found["drive"] = (drive, rig)
    clips = [small_town[i].frames for i in (0, 10, 19)]
    images = [list(frames.images[0].permute(0, 2, 3, 1).numpy()) for frames in clips]
    found["town"] = (images, NumpyCameraRig(*(tensor[0].numpy() for tensor in clips[0].rig)))
    return found


def findings_of(frames, rig, change, live=None, image_format="rgb") -> set:
    live, found = live or make_input(), set()
    for k, images in enumerate(frames):
        changed = [np.ascontiguousarray(change(image)) for image in images]
        found |= inspected(live, [image.shape[:2] for image in images], rig, changed, k, image_format).keys()
    return found


@pytest.mark.parametrize("name", ["nuscenes", "drive", "town"])
def test_recordings_are_plausible_and_their_swapped_versions_are_not(recordings, name):
    frames, rig = recordings[name]

    def tint(*gains):
        return lambda image: (image * np.array(gains)).astype(np.uint8)

    assert findings_of(frames, rig, lambda image: image) == set()
    for light in (0.5, 0.12):  # dusk and night
        assert findings_of(frames, rig, tint(light, light, light)) == set()
    assert findings_of(frames, rig, tint(1, 0.85, 0.6)) == findings_of(frames, rig, tint(0.75, 0.9, 1)) == set()
    assert findings_of(frames, rig, lambda image: image[:, ::-1]) == set()  # mirrored: cannot be told
    assert findings_of(frames, rig, lambda image: image[..., ::-1]) == {"swapped colours"}
    assert findings_of(frames, rig, lambda image: image[::-1]) == {"upside down"}
    assert findings_of(frames, rig, lambda image: image[::-1, ::-1]) == {"upside down"}
    # Two frames do not suffice.
    assert findings_of(frames[:2], rig, lambda image: image[::-1, :, ::-1]) == set()
    # Each camera alone is plausible too.
    for n in range(len(frames[0])):
        one = NumpyCameraRig(*(part[n : n + 1] for part in rig))
        assert findings_of([[images[n]] for images in frames], one, lambda image: image) == set()


def test_the_shipped_weights_on_recordings(recordings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (images, *_), rig = recordings["nuscenes"]
        assert Predictor("nano").step(images, rig, np.eye(4), 0.0).warnings == ()
    # The long front camera of the other drive is unlike the cameras that the weights know; nothing else is.
    (images, *_), rig = recordings["drive"]
    with pytest.warns(PerceptionWarning, match=r"camera 0 has a focal length of 1\.\d+ widths of the network's image"):
        assert len(Predictor("nano").step(images, rig, np.eye(4), 0.0).warnings) == 1


def test_every_image_format_is_looked_at_alike(recordings):
    from perception.export.images import from_rgb

    frames, rig = recordings["town"]
    for image_format in ("bgr", "rgb-chw", "bgr-chw", "nv12-er", "nv12-709"):
        for change, expected in ((lambda x: x, set()), (lambda x: x[..., ::-1], {"swapped colours"})):
            live, found = make_input(), set()
            for k, images in enumerate(frames):
                converted = [from_rgb(np.ascontiguousarray(change(image)), image_format) for image in images]
                found |= inspected(live, [RAW] * len(images), rig, converted, k, image_format).keys()
            assert found == expected, image_format


# --- What is not ------------------------------------------------------------------------------------------------------


def scaled(rig, *factors):
    return rig._replace(img_from_cam=np.diag([*factors, 1.0]) @ rig.img_from_cam)


def posed(rig, change):
    return rig._replace(ego_from_cam=np.stack([change(pose) for pose in rig.ego_from_cam.astype(np.float64)]))


def with_value(array, value, *index):
    changed = np.array(array, dtype=np.float64)
    changed[index] = value
    return changed


def with_intrinsics(rig, value, *index):
    return rig._replace(img_from_cam=with_value(rig.img_from_cam, value, *index))


def with_mounting(rig, value, *index):
    return rig._replace(ego_from_cam=with_value(rig.ego_from_cam, value, *index))


def turned(down):
    """A rotation about the camera's x axis, radians downwards."""
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(down), np.sin(down)], [-np.sin(down), np.cos(down)]]
    return turn


def body_axes(pose):
    return pose @ invert_rigid(OPTICAL)


def raised(z):
    return lambda pose: with_value(pose, z, 2, 3)


QUARTER = rigid_from_quaternion((0.70711, 0, 0, 0.70711), (0, 0, 0))
NO_GROUND = "no camera of the rig sees the ground around the vehicle; probably because "

# How the rig is changed, and what the error or the warning says.
REFUSED = {
    "intrinsics of a huge image": (lambda r: scaled(r, 4, 4), NO_GROUND + ".*centre of an image of about"),
    "intrinsics in millimetres": (lambda r: scaled(r, 0.05, 0.05), "focal lengths of .*not millimetres"),
    "normalised intrinsics": (lambda r: scaled(r, 1 / W, 1 / H), r"not 0\.\.1"),
    "principal point far outside": (lambda r: with_intrinsics(r, 1e4, 2, 1, 2), "principal point .*far outside"),
    "skew 1e4": (lambda r: with_intrinsics(r, 1e4, 2, 0, 1), "skew"),
    "inverted extrinsics": (lambda r: posed(r, invert_rigid), "look like cam_from_ego; give the inverses"),
    "body axes": (lambda r: posed(r, body_axes), r"rig.ego_from_cam\[0\] looks [89]. degrees upwards.*ROS"),
    "identity": (lambda r: posed(r, lambda pose: np.eye(4)), "looks 90 degrees upwards.*ROS"),
    "100 m high": (lambda r: posed(r, raised(100)), "100 m from the ego origin"),
    "40 m high": (lambda r: posed(r, raised(40)), NO_GROUND + ".*at a height of 40 m"),
    "towards the sky": (lambda r: posed(r, lambda pose: pose @ turned(-0.95)), NO_GROUND + ".*looks .* upwards"),
}  # fmt: skip
WARNED = {
    "intrinsics of a smaller image": (lambda r: scaled(r, 0.5, 0.5), "centre of an image of about 3. x 5. pixels"),
    "intrinsics of a larger image": (lambda r: scaled(r, 1.5, 1.5), "centre of an image of about 9. x 1.. pixels"),
    "focal length of 0.1 images": (
        lambda r: with_intrinsics(r, 0.1 * W, 1, (0, 1), (0, 1)), r"img_from_cam\[1\] has focal lengths of 11\.2",
    ),
    "one focal length twice": (lambda r: with_intrinsics(r, 2 * W, 2, 0, 0), "but pixels of cameras are square"),
    "principal point outside": (lambda r: with_intrinsics(r, -30, 2, 0, 2), "principal point at -30"),
    "principal point of 0..1": (lambda r: with_intrinsics(r, 0.5, 2, (0, 1), (2, 2)), "principal point at 0.5, 0.5"),
    "looks up": (
        lambda r: with_mounting(r, r.ego_from_cam[3] @ turned(-0.7), 3), r"ego_from_cam\[3\] looks .* degrees upwards",
    ),
    "on its side": (
        lambda r: posed(r, lambda pose: pose @ QUARTER), r"rolled by -?[89]. degrees .*; the same holds for 5 more",
    ),
    "on its head": (lambda r: with_mounting(r, r.ego_from_cam[5] @ QUARTER @ QUARTER, 5), "rolled by -?1[78]. degrees"),
    "8 m high": (lambda r: posed(r, raised(8)), "at a height of 8 m"),
    "below the ground": (lambda r: with_mounting(r, -0.4, 0, 2, 3), "at a height of -0.4 m"),
    "30 m ahead": (lambda r: with_mounting(r, 30, 0, 0, 3), "is 30 m from the rear axle"),
    "one pose": (lambda r: posed(r, lambda _: r.ego_from_cam[0]), r"ego_from_cam\[0\] are the same pose"),
    "one camera blind": (lambda r: with_mounting(r, 45.0, 3, 2, 3), "camera 3 sees nothing of the ground"),
}  # fmt: skip
IMAGES = {
    "one image is black": (lambda i: [*i[:4], 0 * i[4], i[5]], r"images\[4\] has the same value everywhere, 0"),
    "all images are grey": (lambda i: [0 * x + 127 for x in i], r"images\[0\] \(and 5 others\) .*, 127"),
    "0..1 as bytes": (lambda i: [(x > 100).astype(np.uint8) for x in i], "only the values 0 and 1"),
    "one image for all": (lambda i: [i[0]] * 6, r"images\[0\] and images\[1\] are the same picture"),
}


@pytest.fixture(scope="module", params=["predictor", "runtime"])
def started(request, make_live, live_frames):
    """Creates predictors or runtimes after their first frame."""

    def make():
        live = make_live[request.param](min_score=0.2)
        assert live.step(*live_frames[0]).warnings == ()
        return live

    return make


def test_what_cannot_be_is_refused(started, live_frames):
    live = started()
    images, rig, pose, time = live_frames[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for case, (change, message) in REFUSED.items():
            with pytest.raises(DataError, match=message) as caught:
                live.step(images, change(rig), pose, time)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 400, case
        assert live.step(*live_frames[1]).warnings == ()


@pytest.mark.parametrize("case", [*WARNED, *IMAGES])
def test_what_is_implausible_is_warned_of_once(started, live_frames, case):
    live = started()
    change, message = (WARNED | IMAGES)[case]

    def step(frame, seconds=0.0, changed=True):
        images, rig, pose, time = frame
        if changed:
            images, rig = (change(images), rig) if case in IMAGES else (images, change(rig))
        return live.step(images, rig, pose, time + seconds)

    with pytest.warns(PerceptionWarning, match=message) as warned:
        result = step(live_frames[1])
    assert {str(warning.message) for warning in warned} == set(result.warnings)
    assert all(warning.filename == __file__ for warning in warned)
    assert not any("\n" in sentence or len(sentence) > 400 for sentence in result.warnings)
    assert len(result.warnings) <= 3, result.warnings
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once by kind, and still in the result
        assert step(live_frames[2]).warnings
        assert step(live_frames[2], 0.5, changed=False).warnings == ()


def test_two_crops_of_one_camera_are_not_one_pose():
    pose = mounted(1.7, 0, 1.5)
    rig = NumpyCameraRig(
        np.stack([pinhole(400.0, (480.0, 270.0)), pinhole(1200.0, (480.0, 270.0))]),
        np.stack([pose, pose]),
        np.ones(2, bool),
    )
    assert inspected(make_input(), [(540, 960)] * 2, rig, []) == {}


def test_without_cameras_and_memory_nothing_is_predicted(make_live, live_kind, live_frames):
    images, rig, pose, time = live_frames[0]
    nobody = rig._replace(present=np.zeros(len(images), dtype=bool))
    live = make_live[live_kind]()
    with pytest.warns(PerceptionWarning, match="no camera is present and the memory is empty: nothing is predicted"):
        first = live.step(images, nobody, pose, time)
    assert len(first.boxes.score) == len(first.lines.score) == len(first.seen.boxes) == len(first.seen.lines) == 0
    # The step left nothing: what follows is a first frame.
    fresh, result = make_live[live_kind]().step(*live_frames[1]), live.step(*live_frames[1])
    assert np.array_equal(np.asarray(result.boxes.score), np.asarray(fresh.boxes.score)) and len(fresh.boxes.score)
    # With a memory the network predicts from it, until the memory is dropped.
    images, _, pose, time = live_frames[2]
    remembered = live.step(images, nobody, pose, time)
    assert len(remembered.boxes.score) and "from the memory alone" in remembered.warnings[0]
    assert len(live.step(images, nobody, pose, time + 10).boxes.score) == 0
    later = live.step(images, rig, pose, time + 10.5)
    first = make_live[live_kind]().step(images, rig, pose, time)
    assert np.array_equal(np.asarray(later.boxes.score), np.asarray(first.boxes.score))


def test_a_network_without_memory_predicts_nothing_without_cameras():
    live = Predictor(noisy(ToyNetwork, ToyConfig()))
    cameras = make_cameras(np.random.default_rng(0), (64, 112))
    rig = CameraRig(
        np.stack([camera.img_from_cam for camera in cameras]), np.stack([camera.ego_from_cam for camera in cameras]),
        np.ones(6, bool),
    )  # fmt: skip
    images = np.random.default_rng(0).integers(0, 255, (6, 64, 112, 3), dtype=np.uint8)
    assert len(live.step(images, rig, np.eye(4), 0.0).boxes.score)
    with pytest.warns(PerceptionWarning, match="nothing is predicted"):
        assert len(live.step(images, rig._replace(present=np.zeros(6, bool)), np.eye(4), 0.1).boxes.score) == 0
    assert torch.is_tensor(live.step(images, rig, np.eye(4), 0.2).seen.lines)
