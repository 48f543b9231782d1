"""What surrounds a network in one step: arguments, blank frames, findings about the rig, and what is kept."""

import numpy as np
import pytest

from perception.errors import DataError
from perception.inference.checks import checked_rig
from perception.inference.live import LiveInput
from perception.rigs.models import Pinhole
from perception.rigs.rig import Rig, RigCamera
from perception.types import NumpyCameraRig, Weights

SIZE = 90, 160
AHEAD = np.array([[0.0, 0, 1, 1], [-1, 0, 0, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]])  # ego_from_cam, looking along x
UP = AHEAD @ np.array([[1, 0, 0, 0], [0, 0.6, -0.8, 0], [0, 0.8, 0.6, 0], [0, 0, 0, 1]])  # 53 degrees upwards
LIMITS = {"max_speed": 60.0, "max_turn_rate": 2.0}


def pinholes(*poses, present=None) -> NumpyCameraRig:
    """Cameras of 120 px focal length."""
    img_from_cam = np.tile([[120.0, 0, 80], [0, 120, 45], [0, 0, 1]], (len(poses), 1, 1))
    places = np.stack([np.array(pose, float) for pose in poses])
    places[:, 1, 3] = np.arange(len(poses)) / 4
    return NumpyCameraRig(img_from_cam, places, np.ones(len(poses), bool) if present is None else np.array(present))


def inspect(live, rig, k=0):
    pose = np.eye(4)
    pose[0, 3] = k
    return inspect_at(live, rig, pose, float(k))


def inspect_at(live, rig, pose, time):
    sizes, motion = [SIZE] * len(rig.present), live.ego_motion.since_last(pose, time)
    checked, moved, found = live.carried(checked_rig(rig, len(sizes)), motion, None)
    return live.inspect(motion, checked, moved, sizes, {}, found)


def make(remembers=True, **options) -> LiveInput:
    return LiveInput(SIZE, remembers, weights=Weights(None, None), **LIMITS, **options)


def test_a_good_frame_has_no_findings_and_is_fitted():
    live, rig = make(), pinholes(AHEAD, AHEAD)
    step = inspect(live, rig)
    assert step.findings == {} and not step.is_blank and step.motion.is_first
    assert step.view.sees(np.array([[20.0, 0, 0], [-20, 0, 0]])).tolist() == [True, False]
    np.testing.assert_allclose(step.fitted_rig.img_from_cam, rig.img_from_cam)


def test_without_cameras_and_memory_there_is_nothing_to_predict_from():
    nobody = pinholes(AHEAD, AHEAD, present=[False, False])
    live = make()
    blank = inspect(live, nobody)
    assert blank.is_blank and "nothing is predicted" in blank.findings["no camera"]
    live.keep(inspect(live, pinholes(AHEAD, AHEAD)))
    remembered = inspect(live, nobody, 1)
    assert not remembered.is_blank and "comes from the memory alone" in remembered.findings["no camera"]
    assert inspect(live, nobody, 5).is_blank  # after a gap of 5 s
    live.reset()
    assert inspect(live, nobody, 1).is_blank
    forgetful = make(remembers=False)
    forgetful.keep(inspect(forgetful, pinholes(AHEAD, AHEAD)))
    assert inspect(forgetful, nobody, 1).is_blank and not inspect(forgetful, pinholes(AHEAD, AHEAD), 1).is_blank


def test_one_camera_that_sees_the_ground_suffices():
    live = make()
    found = inspect(live, pinholes(AHEAD, UP)).findings
    assert found.keys() == {"elevation", "blind camera"} and "camera 1 sees nothing" in found["blind camera"]
    for rig in (pinholes(UP, UP), pinholes(AHEAD, UP, present=[False, True])):
        with pytest.raises(DataError, match="no camera of the rig sees the ground around the vehicle; probably"):
            inspect(make(), rig)
        with pytest.raises(DataError, match="no camera of the rig sees the ground"):  # and after a good rig
            inspect(live, rig)


def test_a_rig_is_looked_at_again_when_it_changes():
    live, good = make(), pinholes(AHEAD, AHEAD)
    high = pinholes(AHEAD, AHEAD)
    high.ego_from_cam[1, 2, 3] = 7.0
    for rig, kinds in ((good, []), (high, ["height"]), (high, ["height"]), (good, []), (good, []), (high, ["height"])):
        assert list(inspect(live, rig).findings) == kinds
    absent = high._replace(present=np.array([True, False]))
    assert inspect(live, absent).findings == {}


def test_a_jump_is_a_finding_and_only_kept_frames_count():
    live, rig = make(), pinholes(AHEAD)
    step = inspect(live, rig)
    live.keep(step)
    far = np.eye(4)
    far[0, 3] = 500
    jump = inspect_at(live, rig, far, 1.0)
    assert "moved 500 m" in jump.findings["motion"] and jump.motion.is_first
    assert not inspect(live, rig, 1).motion.is_first  # the jump was not kept
    assert inspect(live, rig, 1).motion.ego_from_prev[0, 3] == -1
    live.reset()
    assert inspect(live, rig, 1).motion.is_first


def test_arguments_without_a_rig_of_its_own():
    live, rig = make(), pinholes(AHEAD)
    assert live.arguments("images", rig, "pose", 1.0) == ("images", rig, "pose", 1.0)
    assert live.arguments("images", rig, "pose", None) == ("images", rig, "pose", None)  # the checks name the time
    assert live.arguments("images", "no rig", "pose", 1.0)[1] == "no rig"
    with pytest.raises(DataError, match="step needs images, rig, global_from_ego and time_s"):
        live.arguments("images", "pose", 1.0, None)


def test_arguments_with_a_rig_of_its_own():
    model = Pinhole(fx=120.0, fy=120.0, cx=80.0, cy=45.0)
    camera = RigCamera(name="front", image_size=SIZE, model=model, ego_from_cam=AHEAD)
    live, image = make(rig=Rig((camera,))), np.zeros((*SIZE, 3), np.uint8)
    for given in (("pose", 1.5, None), (None, "pose", 1.5)):
        images, rig, pose, time = live.arguments([image], *given)
        assert pose == "pose" and time == 1.5 and len(images) == 1 and rig.present.tolist() == [True]
    with pytest.raises(DataError, match="step was given a rig, and the cameras are those of the rig"):
        live.arguments([image], pinholes(AHEAD), "pose", 1.5)
    sized = make(rig=Rig((camera,)), sizes=[SIZE])
    assert sized.arguments([image], "pose", 1.5, None)[0][0].shape == (*SIZE, 3)
