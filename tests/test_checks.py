"""Live use of Predictor and Runtime rejects invalid inputs in one sentence, and its state does not change."""

import copy
import warnings
from datetime import datetime
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import RAW

from perception.errors import ConfigError, DataError, PerceptionError, PerceptionWarning
from perception.geometry import rigid_from_yaw
from perception.inference.checks import check_intrinsics
from perception.inference.predictor import Predictor
from perception.types import CameraRig, State

H, W = RAW
N = 6


def arrays(live) -> list[np.ndarray]:
    return [np.asarray(array) for part in live.objects[:2] for array in part]


def same(one, other) -> bool:
    """Returns True for bit-identical results."""
    return all(np.array_equal(a, b) for a, b in zip(arrays(one), arrays(other), strict=True))


def with_value(array, value, *index):
    changed = np.array(array, dtype=np.result_type(np.asarray(array).dtype, np.float64))
    changed[index] = value
    return changed


def mirrored(pose):
    """Returns a mirrored pose, which is not a rotation."""
    return pose @ np.diag([1.0, -1, 1, 1])


def with_mounting(rig, value, *index):
    return rig._replace(ego_from_cam=with_value(rig.ego_from_cam, value, *index))


def with_intrinsics(rig, value, *index):
    return rig._replace(img_from_cam=with_value(rig.img_from_cam, value, *index))


def with_image(images, image, n=1):
    return [*images[:n], image, *images[n + 1 :]]


class Unreadable:
    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("on another device")


# Invalid arguments of step(), and a pattern of the error message.
BAD = {
    "pose 1e300": (lambda i, r, p, t: (i, r, with_value(p, 1e300, 0, 3), t), r"global_from_ego is 1e\+300 m .*metres"),
    "pose in millimetres of ECEF": (lambda i, r, p, t: (i, r, with_value(p, 4.2e9, 1, 3), t), "is 4.2e"),
    "pose -1e39": (lambda i, r, p, t: (i, r, with_value(p, -1e39, 2, 3), t), "global_from_ego is 1e"),
    "pose NaN": (lambda i, r, p, t: (i, r, with_value(p, np.nan, 0, 3), t), "global_from_ego .* finite"),
    "pose inf": (lambda i, r, p, t: (i, r, with_value(p, np.inf, 0, 0), t), "global_from_ego .* finite"),
    "rotation 1e300": (lambda i, r, p, t: (i, r, with_value(p, 1e300, 0, 0), t), "global_from_ego .* rotation"),
    "pose mirrored": (lambda i, r, p, t: (i, r, mirrored(p), t), "global_from_ego .* rotation"),
    "pose of zeros": (lambda i, r, p, t: (i, r, np.zeros((4, 4)), t), "global_from_ego .* last row"),
    "pose text": (lambda i, r, p, t: (i, r, "here", t), "global_from_ego is str"),
    "pose list of text": (lambda i, r, p, t: (i, r, [["1"] * 4] * 4, t), "global_from_ego is list"),
    "pose ragged": (lambda i, r, p, t: (i, r, [[1, 0], [0]], t), "global_from_ego cannot be read as an array"),
    "pose flat list": (lambda i, r, p, t: (i, r, list(range(16)), t), r"global_from_ego has shape \(16,\)"),
    "pose 3 x 4": (lambda i, r, p, t: (i, r, p[:3], t), r"global_from_ego has shape \(3, 4\)"),
    "pose complex": (lambda i, r, p, t: (i, r, p + 0j, t), "global_from_ego is complex128"),
    "pose objects": (lambda i, r, p, t: (i, r, p.astype(object), t), "global_from_ego is object"),
    "pose dict": (lambda i, r, p, t: (i, r, {"x": 0}, t), "global_from_ego is dict"),
    "pose on a device": (lambda i, r, p, t: (i, r, Unreadable(), t), r"global_from_ego cannot .*on another device"),
    "pose with a gradient": (
        lambda i, r, p, t: (i, r, torch.tensor(p, requires_grad=True), t),
        "global_from_ego cannot be read",
    ),
    "time datetime": (lambda i, r, p, t: (i, r, p, datetime(2024, 5, 1)), r"time_s is datetime; .*timestamp\(\)"),
    "time datetime64": (lambda i, r, p, t: (i, r, p, np.datetime64("2024-05-01T00:00:00")), "time_s is datetime64"),
    "time text": (lambda i, r, p, t: (i, r, p, "1.7e9"), "time_s is str"),
    "time bool": (lambda i, r, p, t: (i, r, p, True), "time_s is bool"),
    "time complex": (lambda i, r, p, t: (i, r, p, 1j), "time_s is complex"),
    "time of all frames": (lambda i, r, p, t: (i, r, p, np.array([t, t])), r"time_s is float64 \(2,\)"),
    "time NaN": (lambda i, r, p, t: (i, r, p, np.nan), "time_s is nan"),
    "time inf": (lambda i, r, p, t: (i, r, p, np.inf), "time_s is inf"),
    "time beyond float64": (lambda i, r, p, t: (i, r, p, 10**400), "time_s is inf"),
    "time in ms": (lambda i, r, p, t: (i, r, p, t * 1e3), "time_s .*milliseconds since 1970; divide it by 1e3"),
    "time in us": (lambda i, r, p, t: (i, r, p, int(t * 1e6)), "time_s .*microseconds since 1970; divide it by 1e6"),
    "time in ns": (lambda i, r, p, t: (i, r, p, np.int64(t * 1e9)), "time_s .*nanoseconds .* divide it by 1e9"),
    "time back": (lambda i, r, p, t: (i, r, p, t - 1), r"time_s is .*last step was at .*reset\(\)"),
    "images dict": (lambda i, r, p, t: (dict(enumerate(i)), r, p, t), "images is dict; give a list"),
    "images None": (lambda i, r, p, t: (None, r, p, t), "images is NoneType"),
    "images text": (lambda i, r, p, t: ("012345", r, p, t), "images is str"),
    "images generator": (lambda i, r, p, t: ((x for x in i), r, p, t), "images is generator"),
    "images tensor": (lambda i, r, p, t: (torch.tensor(np.stack(i)), r, p, t), "images is Tensor"),
    "one image": (lambda i, r, p, t: (i[0], r, p, t), r"images is uint8 \(64, 112, 3\); give \[N, H, W, 3\]"),
    "images of no dimension": (lambda i, r, p, t: (np.zeros((), np.uint8), r, p, t), r"images is uint8 \(\)"),
    "no images": (lambda i, r, p, t: ([], r, p, t), "images is empty"),
    "zero cameras": (
        lambda i, r, p, t: (np.zeros((0, H, W, 3), np.uint8), CameraRig(*(x[:0] for x in r)), p, t),
        "images is empty",
    ),
    "five images": (lambda i, r, p, t: (i[:5], r, p, t), r"rig\.present|images: 5 images"),
    "image None": (lambda i, r, p, t: (with_image(i, None), r, p, t), r"images\[1\] is NoneType"),
    "image of no rows": (lambda i, r, p, t: ([x[:0] for x in i], r, p, t), r"images\[0\] .*\(0, 112, 3\)"),
    "image of no columns": (lambda i, r, p, t: (with_image(i, i[1][:, :0]), r, p, t), r"images\[1\] .*\(64, 0, 3\)"),
    "two channels": (lambda i, r, p, t: (with_image(i, i[1][..., :2]), r, p, t), r"images\[1\] .*\(64, 112, 2\)"),
    "five channels": (lambda i, r, p, t: (with_image(i, i[1].repeat(2, -1)[..., :5]), r, p, t), r"images\[1\]"),
    "image float": (lambda i, r, p, t: (with_image(i, i[1] / 255), r, p, t), r"images\[1\] is float64"),
    "image list": (lambda i, r, p, t: (with_image(i, i[1].tolist()), r, p, t), r"images\[1\] is list"),
    "rig dict": (lambda i, r, p, t: (i, r._asdict(), p, t), r"rig is dict; give a perception\.CameraRig"),
    "rig None": (lambda i, r, p, t: (i, None, p, t), "rig is NoneType"),
    "rig alike": (lambda i, r, p, t: (i, SimpleNamespace(**r._asdict()), p, t), "rig is SimpleNamespace"),
    "present None": (lambda i, r, p, t: (i, r._replace(present=None), p, t), r"rig\.present .* \[6\] bool"),
    "present numbers": (lambda i, r, p, t: (i, r._replace(present=r.present * 1.0), p, t), r"rig\.present .*float64"),
    "present ragged": (lambda i, r, p, t: (i, r._replace(present=[[True], []]), p, t), r"rig\.present cannot be read"),
    "intrinsics None": (lambda i, r, p, t: (i, r._replace(img_from_cam=None), p, t), r"rig\.img_from_cam is NoneType"),
    "intrinsics partly None": (
        lambda i, r, p, t: (i, r._replace(img_from_cam=with_image(list(r.img_from_cam), None)), p, t),
        r"rig\.img_from_cam cannot be read",
    ),
    "intrinsics text": (
        lambda i, r, p, t: (i, r._replace(img_from_cam=r.img_from_cam.astype(str)), p, t),
        r"rig\.img_from_cam is <U",
    ),
    "intrinsics of one": (
        lambda i, r, p, t: (i, r._replace(img_from_cam=r.img_from_cam[0]), p, t),
        r"rig\.img_from_cam has shape \(3, 3\); 6 images were given, so give \(6, 3, 3\)",
    ),
    "intrinsics NaN": (lambda i, r, p, t: (i, with_intrinsics(r, np.nan, 2, 0, 1), p, t), r"rig\.img_from_cam\[2\]"),
    "principal point 1e39": (
        lambda i, r, p, t: (i, with_intrinsics(r, 1e39, 2, 0, 2), p, t),
        r"rig\.img_from_cam\[2\] has its principal point at 1e\+39, .* px, far outside an image of 64 x 112",
    ),
    "principal point 500": (lambda i, r, p, t: (i, with_intrinsics(r, 500, 2, 1, 2), p, t), "at .*500 px, far"),
    "focal length 1e39": (lambda i, r, p, t: (i, with_intrinsics(r, 1e39, 2, 0, 0), p, t), r"\[2\] .*1e\+39 and"),
    "focal length 1e-39": (lambda i, r, p, t: (i, with_intrinsics(r, 1e-39, 2, 1, 1), p, t), r"\[2\] .*1e-39 px"),
    "focal length in mm": (lambda i, r, p, t: (i, with_intrinsics(r, 4, 2, (0, 1), (0, 1)), p, t), "not millimetres"),
    "focal length negative": (lambda i, r, p, t: (i, with_intrinsics(r, -50, 2, 0, 0), p, t), r"\[2\] .* above 0"),
    "skew": (lambda i, r, p, t: (i, with_intrinsics(r, 1e39, 2, 0, 1), p, t), r"\[2\] has a skew"),
    "skew below": (lambda i, r, p, t: (i, with_intrinsics(r, 1e300, 2, 1, 0), p, t), r"\[2\] has a skew"),
    "mounting 1e39": (
        lambda i, r, p, t: (i, with_mounting(r, 1e39, 4, 0, 3), p, t),
        r"rig\.ego_from_cam\[4\] is 1e\+39 m from the ego origin",
    ),
    "mounting in mm": (lambda i, r, p, t: (i, with_mounting(r, 1600, 4, 2, 3), p, t), r"\[4\] is 1600 m .*millimetres"),
    "mounting NaN": (lambda i, r, p, t: (i, with_mounting(r, np.nan, 4, 1, 1), p, t), r"ego_from_cam\[4\] .*finite"),
    "mounting 1e200": (lambda i, r, p, t: (i, with_mounting(r, 1e200, 4, 1, 1), p, t), r"ego_from_cam\[4\] .*rotat"),
    "mounting complex": (
        lambda i, r, p, t: (i, r._replace(ego_from_cam=r.ego_from_cam * 1j), p, t),
        r"rig\.ego_from_cam is complex",
    ),
    "mounting 3 x 4": (
        lambda i, r, p, t: (i, r._replace(ego_from_cam=r.ego_from_cam[:, :3]), p, t),
        r"rig\.ego_from_cam has shape \(6, 3, 4\)",
    ),
}  # fmt: skip


def test_invalid_inputs_are_rejected_and_change_nothing(make_live, live_kind, live_frames):
    live, undisturbed = make_live[live_kind](), make_live[live_kind]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for each in (live, undisturbed):
            each.step(*live_frames[0])
        for case, (change, message) in BAD.items():
            with pytest.raises(DataError, match=message) as caught:
                live.step(*change(*live_frames[1]))
            sentence = str(caught.value)
            assert "\n" not in sentence and len(sentence) < 300, (case, sentence)
        for frame in live_frames[1:]:
            expected = undisturbed.step(*frame)
            assert same(live.step(*frame), expected) and len(expected.boxes.score)


def test_unusual_types_are_accepted(make_live, live_kind, live_frames):
    live = make_live[live_kind]()

    def first(*frame):
        live.reset()
        return live.step(*frame)

    images, rig, pose, time = live_frames[0]
    expected = first(*live_frames[0])
    lists = CameraRig(*(np.asarray(field).tolist() for field in rig))
    tensors = CameraRig(*(torch.from_numpy(field) for field in rig))
    assert same(first(tuple(images), lists, pose.tolist(), Fraction(time)), expected)
    assert same(first(images, tensors, torch.from_numpy(pose), np.float64(time)), expected)
    assert same(first(np.stack(images), rig, np.asfortranarray(pose), np.array(int(time))), expected)
    # The calibration of a camera that is not present is ignored.
    absent = rig._replace(present=np.arange(N) != 2)
    broken = with_mounting(with_intrinsics(absent, 1e300, 2), np.nan, 2)
    assert same(first(images, broken, pose, time), first(images, absent, pose, time))


def test_accepted_inputs_keep_the_memory_finite(make_live, live_kind, live_frames):
    live = make_live[live_kind]()
    images, rig, pose, time = live_frames[0]
    extremes = [
        with_intrinsics(rig, 0.0501 * W, slice(None), (0, 1), (0, 1)),
        with_intrinsics(rig, 15.0 * W, slice(None), (0, 1), (0, 1)),
        with_intrinsics(rig, -0.4 * W, slice(None), (0, 1), (2, 2)),
        with_mounting(rig, -49.9, slice(None), slice(0, 2), 3),
        with_mounting(rig, 8.0, slice(None), 2, 3),
        rig._replace(present=np.zeros(N, dtype=bool)),
    ]
    for k, extreme in enumerate(extremes):
        far = with_value(pose, 9.9e7, slice(0, 3), 3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            live.step(images, extreme, far @ rigid_from_yaw(0.9 * k, (50.0 * k, 0, 0)), time + k)
        assert caught and all(warning.category is PerceptionWarning for warning in caught)
        memory = live.memory() if live_kind == "runtime" else live._state.bev
        assert bool(np.isfinite(np.asarray(memory)).all())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        last = live.step(images, rig, far @ rigid_from_yaw(0.9 * k, (50.0 * k, 0, 0)), time + k + 1)
    assert all(np.isfinite(array).all() for array in arrays(last))


def poison(live) -> None:
    """Writes a NaN into the memory, which no accepted input does."""
    if isinstance(live, Predictor):
        bev = live._state.bev.clone()
        bev[0, 3, 10, 10] = torch.nan
        live._state = State(bev)
    else:
        memory = live.memory()
        memory[0, 3, 10, 10] = np.nan
        live._session._memories[live._turn]["memory"].update_inplace(memory)


@pytest.mark.parametrize("shown", [True, False], ids=["in what is returned", "in the memory alone"])
def test_a_memory_that_is_not_finite_is_dropped_with_a_warning(make_live, live_kind, live_frames, shown, monkeypatch):
    if not shown:  # as if no query attended to the broken cells
        module = "perception.inference.predictor" if live_kind == "predictor" else "perception.export.runtime"
        monkeypatch.setattr(f"{module}.objects_are_finite", lambda predicted, returned: True)
    live = make_live[live_kind]()
    live.step(*live_frames[0])
    poison(live)
    with pytest.warns(PerceptionWarning, match="not finite: this step returns no boxes .* memory is dropped") as caught:
        objects = live.step(*live_frames[1])
    assert len(caught) == 1 and caught[0].filename == __file__
    assert len(objects.boxes.score) == len(objects.lines.points) == 0
    assert not (live.memory() if live_kind == "runtime" else live._state.bev.numpy()).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(live.step(*live_frames[2]), make_live[live_kind]().step(*live_frames[2]))
    # The state is the same if warnings are raised as errors.
    poison(live)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images, rig, pose, time = live_frames[2]
        with pytest.raises(PerceptionWarning):
            live.step(images, rig, pose, time + 0.1)
        assert same(live.step(*live_frames[2]), make_live[live_kind]().step(*live_frames[2]))


def test_scores_that_are_not_finite_are_reported(small_network, live_frames):
    # The memory stays finite here: only weights of the decoder are NaN.
    broken = copy.deepcopy(small_network)
    with torch.no_grad():
        for parameter in broken.line_decoder.parameters():
            parameter.fill_(torch.nan)
    with pytest.warns(PerceptionWarning, match="not finite"):
        objects = Predictor(broken).step(*live_frames[0])
    assert len(objects.boxes.score) == len(objects.lines.score) == 0


def test_an_error_inside_the_network_changes_nothing(make_live, live_kind, live_frames):
    live, undisturbed = make_live[live_kind](), make_live[live_kind]()
    for each in (live, undisturbed):
        each.step(*live_frames[0])

    def fail(*_):
        raise RuntimeError("out of memory")

    images, rig, pose, time = live_frames[2]
    with pytest.MonkeyPatch.context() as patch:
        owner, name = (live.model, "decode") if live_kind == "predictor" else (live._session, "run")
        patch.setattr(owner, name, fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            live.step(images[::-1], rig, pose, time - 0.1)
    assert same(live.step(*live_frames[1]), undisturbed.step(*live_frames[1]))


@pytest.mark.parametrize("move", [rigid_from_yaw(0.0, (200.0, 0, 0)), rigid_from_yaw(2.0)], ids=["moved", "turned"])
def test_a_jump_of_the_pose_drops_the_memory(make_live, live_kind, live_frames, move):
    images, rig, pose, time = live_frames[1]
    jump = images, rig, pose @ move, time
    live = make_live[live_kind]()
    fresh = live.step(*jump)
    live.reset()
    live.step(*live_frames[0])
    with pytest.warns(PerceptionWarning, match=r"pose moved .* m and turned .* rad in 0\.5 s, .*first one") as caught:
        assert same(live.step(*jump), fresh)
    assert len(caught) == 1 and caught[0].filename == __file__
    allowed = make_live[live_kind](max_speed=1000.0, max_turn_rate=np.inf)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        allowed.step(*live_frames[0])
        assert not same(allowed.step(*jump), fresh)
        # After a jump the memory continues from the new pose.
        following = images, rig, pose @ move, time + 0.1
        remembering = live.step(*following)
        live.reset()
        assert not same(remembering, live.step(*following))


@pytest.mark.parametrize("name", ["max_speed", "max_turn_rate", "min_score"])
@pytest.mark.parametrize("value", [np.nan, -1, "fast", None, True, [1.0], 1j])
def test_invalid_settings_are_named(make_live, live_kind, name, value):
    with pytest.raises(ConfigError, match=rf"{name} is .*; give ") as caught:
        make_live[live_kind](**{name: value})
    assert "\n" not in str(caught.value)


def test_intrinsics_of_real_cameras_pass():
    usual = [
        ((900, 1600), (1266.4, 1266.4, 816.3, 491.5)),  # front camera of nuScenes
        ((900, 1600), (809.2, 809.2, 829.2, 481.8)),  # back camera of nuScenes
        ((1280, 1920), (2059.6, 2059.6, 936.2, 639.1)),
        ((2160, 3840), (1905.0, 1905.0, 1920.0, 1080.0)),  # 90 degrees
        ((2160, 3840), (7300.0, 7300.0, 1920.0, 1080.0)),  # tele, 30 degrees
        ((400, 1600), (1266.4, 1266.4, 816.3, -8.5)),  # cropped at the top
        ((1600, 900), (600.0, 610.0, 450.0, 800.0)),  # portrait
        ((96, 162), (80.0, 80.0, 81.0, 48.0)),
    ]
    for image_size, (focal_x, focal_y, u, v) in usual:
        check_intrinsics("rig", np.array([[focal_x, 0.1, u], [0, focal_y, v], [0, 0, 1]]), image_size)
    with pytest.raises(PerceptionError, match=r"focal lengths of 0\.79 and 1\.4 px, .* can have 80 to 1.6e\+05; give"):
        check_intrinsics("rig", np.array([[0.79, 0, 0.5], [0, 1.4, 0.5], [0, 0, 1]]), (900, 1600))
