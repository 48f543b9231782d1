"""Recordings as files: folders of images, videos, and drives of KITTI raw."""

import shutil
from itertools import pairwise

import numpy as np
import pytest
from written_recordings import (
    SECOND,
    picture,
    two_cameras,
)

from perception.errors import DataError, PerceptionError
from perception.geometry import invert_rigid, rigid_from_yaw
from perception.recordings import open_recording
from perception.recordings.videos import VideoWriter
from perception.rigs import Rig

# Folders


@pytest.mark.parametrize(
    ("stems", "fps", "wanted"),
    [
        (["1532402927.612460", "1532402928.112460"], None, [1532402927612460000, 1532402928112460000]),
        (["1532402927612", "1532402928112"], None, [1532402927612000000, 1532402928112000000]),
        (["x_1532402927612460", "x_1532402928112460"], None, [1532402927612460000, 1532402928112460000]),
        (["1532402927612460123", "1532402928112460123"], None, [1532402927612460123, 1532402928112460123]),
        (["1532402927_612460123", "1532402928_112460123"], None, [1532402927612460123, 1532402928112460123]),
        (["9", "10", "000012"], 10, [1900000000, 2000000000, 2200000000]),
    ],
)
def test_names_of_images_hold_their_times(tmp_path, stems, fps, wanted):
    for camera in ("front", "Back"):
        for stem in stems:
            picture(tmp_path / "images" / camera / f"{stem}.png")
            picture(tmp_path / "flat" / f"{camera}_{stem}.png")
    start = {} if fps is None else {"fps": fps, "start": 1.0}
    for folder in ("images", "flat"):
        found = open_recording(tmp_path / folder, two_cameras(), **start)
        assert set(found.cameras) == {"front", "back"}
        assert [times.tolist() for times in found.times_ns.values()] == [wanted, wanted]


def test_a_folder_with_one_image_per_camera_is_one_frame(tmp_path):
    picture(tmp_path / "front.jpg", 50)
    picture(tmp_path / "the back one.png", 200)
    (frame,) = open_recording(tmp_path, two_cameras())
    assert {camera: round(image.mean()) for camera, image in frame.images.items()} == {"front": 50, "back": 200}
    one = Rig([two_cameras()["front"]])
    (tmp_path / "the back one.png").unlink()
    (tmp_path / "front.jpg").rename(tmp_path / "anything.jpg")
    assert [set(frame.images) for frame in open_recording(tmp_path, one)] == [{"front"}]


def test_folders_that_cannot_be_read(tmp_path):
    def refused(words, **how):
        with pytest.raises(PerceptionError, match=words) as error:
            list(open_recording(tmp_path / "images", **how))
        assert "\n" not in str(error.value)

    rig = two_cameras()
    refused("images does not exist; give a folder of images, videos, or a ROS bag")
    (tmp_path / "images").mkdir()
    refused("is a folder of images and holds no calibration; give a rig, or put rig.yaml into it")
    refused("images holds no images; give a folder with images", rig=rig)
    picture(tmp_path / "images" / "left.png")
    refused("left.png has no camera of the rig in its name", rig=rig)
    (tmp_path / "images" / "left.png").unlink()
    picture(tmp_path / "images" / "front" / "a1.png")
    picture(tmp_path / "images" / "front" / "a2.png")
    refused("a1.png has no time stamp in its name", rig=rig)
    refused("--scene does not belong to it; leave it out", rig=rig, scene="x")
    picture(tmp_path / "images" / "front" / "b2.png")
    refused("image 2 has the time 0.200000 s, and the one before 0.200000; times must rise", rig=rig, fps=10)
    (tmp_path / "images" / "front" / "b2.png").write_bytes(b"no image")
    (tmp_path / "images" / "front" / "a2.png").unlink()
    refused("b2.png cannot be read as an image", rig=rig, fps=10)
    (tmp_path / "images" / "drive.mcap").write_bytes(b"")
    refused("holds the bag drive.mcap; give the bag itself", rig=rig)
    with pytest.raises(DataError, match="is no recording that is known"):
        open_recording(picture(tmp_path / "a.png"), rig)
    with pytest.raises(DataError, match="no recording was given"):
        open_recording([], rig)


# Videos


def test_videos_that_cannot_be_read(tmp_path):
    front = Rig([two_cameras()["front"]])
    with VideoWriter(tmp_path / "front.mp4") as video:
        for k in range(3):
            video.add(np.full((47, 81, 3), 60 * k, np.uint8), k * SECOND)

    def refused(words, path="front.mp4", **how):
        with pytest.raises(PerceptionError, match=words):
            list(open_recording(tmp_path / path, **how))

    assert [round(frame.images["front"].mean() / 60) for frame in open_recording(tmp_path / "front.mp4", front)] == [
        0,
        1,
        2,
    ]
    refused("front.mp4 holds no calibration; give a rig, or put rig.yaml next to the videos")
    (tmp_path / "front.avi").write_text("no video")
    refused(r"front.avi cannot be read as a video \(.*\); copy it again", "front.avi", rig=front)
    refused("--pose-topic does not belong to it", rig=front, pose_topic="/odom")
    (tmp_path / "front.avi").unlink()
    (tmp_path / "other.mp4").write_bytes((tmp_path / "front.mp4").read_bytes())
    two = [tmp_path / "front.mp4", tmp_path / "other.mp4"]
    rig = two_cameras()
    found = open_recording(two, rig, streams={"back": str(tmp_path / "other.mp4")})
    assert found.cameras == ("front", "back") and [len(frame.images) for frame in found] == [2, 2, 2]
    whole = (tmp_path / "front.mp4").read_bytes()
    (tmp_path / "front.mp4").write_bytes(whole[: whole.index(b"mdat") + 300])
    refused("front.mp4 cannot be read as a video|ends before its image", rig=front)


# KITTI raw


@pytest.fixture()
def kitti_drive(tmp_path):
    """Three frames of a drive that turns from east to north at the latitude of Karlsruhe."""
    day = tmp_path / "2011_09_26"
    drive = day / "2011_09_26_drive_0001_sync"
    turn = (
        "7.533745e-03 -0.9999714 -6.16602e-04 1.480249e-02 7.280733e-04 -0.9998902 0.9998621 7.52379e-03 1.480755e-02"
    )
    day.mkdir()
    (day / "calib_cam_to_cam.txt").write_text(
        "S_rect_02: 80.0 45.0\nR_rect_00: 1 0 0 0 1 0 0 0 1\nP_rect_02: 60 0 40 0 0 60 22 0 0 0 1 0\n"
    )
    (day / "calib_velo_to_cam.txt").write_text(f"R: {turn}\nT: -4.069766e-03 -7.631618e-02 -2.717806e-01\n")
    (day / "calib_imu_to_velo.txt").write_text("R: 1 0 0 0 1 0 0 0 1\nT: -0.81 0.32 -0.80\n")
    for k in range(3):
        picture(drive / "image_02" / "data" / f"{k:010d}.png", 50 + k)
        (drive / "oxts" / "data").mkdir(parents=True, exist_ok=True)
        # 10 m to the east per frame; at the end the car looks to the north.
        longitude = 8.4 + np.degrees(10 * k / (6378137.0 * np.cos(np.radians(49.0))))
        row = [49.0, longitude, 110 + k, 0.0, 0.0, np.pi / 2 * (k == 2), *np.zeros(24)]
        (drive / "oxts" / "data" / f"{k:010d}.txt").write_text(" ".join(map(repr, map(float, row))))
    stamps = "".join(f"2011-09-26 13:02:25.{964389445 + 500 * k}\n" for k in range(3))
    for folder in ("image_02", "oxts"):
        (drive / folder / "timestamps.txt").write_text(stamps)
    return drive


def test_drives_of_kitti_raw(kitti_drive):
    recording = open_recording(kitti_drive)
    assert recording.cameras == ("image_02",)
    assert recording.times_ns["image_02"][0] == 1317042145964389445  # date -u -d "2011-09-26 13:02:25" +%s
    frames = list(recording)
    assert [int(frame.images["image_02"].mean()) for frame in frames] == [50, 51, 52]
    motion = [invert_rigid(a.global_from_ego) @ b.global_from_ego for a, b in pairwise(frames)]
    np.testing.assert_allclose(motion[0][:3, 3], [10, 0, 1], atol=1e-3)  # ahead, and the altitude
    np.testing.assert_allclose(motion[1], rigid_from_yaw(np.pi / 2, (10, 0, 1)), atol=1e-3)
    rig = recording.rig
    assert rig["image_02"].ego_from_cam[2, 3] == pytest.approx(1.65, abs=0.05)  # the height that KITTI states
    shutil.rmtree(kitti_drive / "oxts")
    assert open_recording(kitti_drive, rig).trajectory is None


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("oxts/data/0000000001.txt", "49 8.4 110", "does not begin with lat lon alt roll pitch yaw"),
        ("oxts/data/0000000001.txt", "95 8.4 110 0 0 0", "does not begin with lat lon alt"),
        ("oxts/timestamps.txt", "2011-09-26 13:02:25.9\n", "has 1 lines for 3 files; give a whole drive"),
        ("image_02/timestamps.txt", "2011-09-26 13:02:25\n", "has 1 lines, and the last image is 0000000002.png"),
        ("image_02/timestamps.txt", "26.9.2011\n", "line 1 is '26.9.2011'; give a date and a time"),
        ("image_02/timestamps.txt", "2011-99-26 13:02:25\n", "line 1 is '2011-99-26 13:02:25'; give a date"),
    ],
)
def test_drives_of_kitti_raw_that_are_damaged(kitti_drive, file, text, words):
    (kitti_drive / file).write_text(text)
    with pytest.raises(DataError, match=words):
        open_recording(kitti_drive)
