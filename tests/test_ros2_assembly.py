"""Frames from images that arrive one by one."""

import numpy as np
import pytest

from perception.errors import ConfigError
from perception.recordings import Recording
from perception.ros2.assembly import FrameAssembler

MS = 1_000_000


def played(assembler, arrivals):
    """The frames as (time in ms, {camera: time in ms}), from arrivals (camera, time in ms) in this order."""
    return [
        (frame.time_ns // MS, {camera: time // MS for camera, (time, _) in frame.images.items()})
        for camera, time in arrivals
        for frame in assembler.add(camera, round(time * MS), None)
    ]


def test_a_frame_is_complete_with_the_last_camera():
    assembler = FrameAssembler(["front", "left", "right"])
    assert played(assembler, [("left", 990), ("front", 1000)]) == []
    assert played(assembler, [("right", 1010)]) == []  # an image of the left camera nearer to 1000 may come
    assert played(assembler, [("left", 1090)]) == [(1000, {"front": 1000, "left": 990, "right": 1010})]


def test_the_nearest_image_within_the_tolerance_counts():
    """A camera of 30 Hz beside a reference of 10 Hz."""
    times = np.arange(0, 1000, 100 / 3)
    arrivals = sorted([*(("fast", t) for t in times), *(("slow", t) for t in range(7, 1000, 100))], key=lambda a: a[1])
    frames = played(FrameAssembler(["slow", "fast"]), arrivals)
    assert len(frames) >= 9
    for time, images in frames:
        assert images["fast"] == min(map(int, times), key=lambda t: abs(t - time))


def test_the_frames_are_those_of_a_recording():
    """Cameras of other rates and phases, with jitter and missing images, in the order of a network with delays."""
    rng = np.random.default_rng(0)
    times = {}
    for camera, period in {"a": 100, "b": 71, "c": 33}.items():
        regular = np.arange(rng.uniform(0, period), 20_000, period) + rng.uniform(0, 15, 1)
        times[camera] = np.unique((regular + rng.uniform(0, 10, len(regular))).round(3))[rng.random(len(regular)) > 0.1]
    nanoseconds = {camera: (stream * MS).round().astype(np.int64) for camera, stream in times.items()}
    expected = Recording("random", nanoseconds, decode=None).plan(reference="a")
    delays = {"a": 30, "b": 5, "c": 50}
    arrivals = sorted(
        (t / MS + delays[camera], camera, int(t)) for camera, stream in nanoseconds.items() for t in stream
    )
    assembler = FrameAssembler(["a", "b", "c"])
    frames = [frame for _, camera, time in arrivals for frame in assembler.add(camera, time, None)]
    assert len(frames) > 150
    for frame, moment in zip(frames, expected, strict=False):
        assert frame.time_ns == moment.time_ns
        assert {camera: time for camera, (time, _) in frame.images.items()} == {
            camera: nanoseconds[camera][number] for camera, number in moment.images.items()
        }


def test_a_missing_camera_is_waited_for_only_so_long():
    assembler = FrameAssembler(["front", "left"])
    regular = [(camera, t) for t in range(0, 300, 100) for camera in ("front", "left")]
    assert [time for time, _ in played(assembler, regular)] == [0, 100, 200]
    # The left camera stops: frames come late at first, then at once.
    later = [(t, played(assembler, [("front", t)])) for t in range(300, 2500, 100)]
    assert later[0] == (300, []) and later[1] == (400, [(300, {"front": 300})])
    assert later[-1] == (2400, [(2400, {"front": 2400})])
    # It comes back.
    assert played(assembler, [("left", 2490), ("front", 2500), ("left", 2590)]) == [
        (2500, {"front": 2500, "left": 2490})
    ]


def test_another_camera_becomes_the_reference():
    assembler = FrameAssembler(["front", "left", "right"])
    frames = played(assembler, [(camera, t) for t in range(0, 400, 100) for camera in ("front", "left", "right")])
    assert [time for time, _ in frames] == [0, 100, 200, 300]
    silent = played(assembler, [(camera, t + 3) for t in range(400, 2400, 100) for camera in ("left", "right")])
    times = [time for time, _ in silent]
    assert 1103 <= times[0] <= 1303 and times[-1] == 2303 and np.diff(times).min() == 100
    assert all(set(images) == {"left", "right"} for _, images in silent)
    # Its images are the reference again when it returns, and no time comes twice.
    back = played(assembler, [(camera, t) for t in range(2400, 2800, 100) for camera in ("front", "left", "right")])
    assert [time for time, _ in back] == [2400, 2500, 2600, 2700]


def test_the_first_frame_waits_for_the_first_camera():
    """It begins to send later than the others, but belongs to the first frame."""
    assembler = FrameAssembler(["front", "left"])
    assert played(assembler, [("left", 90), ("front", 65)]) == [(65, {"front": 65, "left": 90})]
    silent = FrameAssembler(["front", "left"])
    frames = played(silent, [("left", t) for t in range(0, 1500, 100)])
    assert [time for time, _ in frames] == [1100, 1200, 1300, 1400]


def test_slow_cameras_lose_no_frame():
    """At 2 Hz the next image comes long after the patience has ended."""
    arrivals = [(camera, t + shift) for t in (0, 500, 1000) for camera, shift in (("left", 57), ("front", 65))]
    assert [time for time, _ in played(FrameAssembler(["front", "left"]), arrivals)] == [65, 565]


def test_late_and_repeated_images_are_dropped():
    assembler = FrameAssembler(["front"])
    assert [time for time, _ in played(assembler, [("front", t) for t in (0, 100, 100, 50, 200)])] == [0, 100, 200]


def test_a_clock_that_goes_back_starts_anew():
    assembler = FrameAssembler(["front", "left"])
    first = [frame for t in (5000, 5100) for c in ("front", "left") for frame in assembler.add(c, t * MS, None)]
    again = [frame for t in (0, 100) for c in ("front", "left") for frame in assembler.add(c, t * MS, None)]
    assert [frame.restarted for frame in first + again] == [False, False, True, False]
    assert [frame.time_ns // MS for frame in again] == [0, 100]


@pytest.mark.parametrize("cameras", [[], ["front", "front"]])
def test_names_are_checked(cameras):
    with pytest.raises(ConfigError, match="the cameras are"):
        FrameAssembler(cameras)
    with pytest.raises(ConfigError, match="no camera 'rear'; the cameras are front"):
        FrameAssembler(["front"]).add("rear", 0, None)
