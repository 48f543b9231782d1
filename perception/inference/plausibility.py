"""Finds inputs of live use that are possible but implausible, with numpy alone.

What cannot be right is refused by `perception.inference.checks`. What is merely implausible is a warning, because a
vehicle must go on when a camera dies, and because unusual rigs exist. All limits are far from real cameras, rigs and
images; tests hold them against recordings.

Images are checked on a grid of about 800 pixels each. Whether red and blue are swapped, or images are upside down, can
be told only from several frames, and only by day; see `ImageStatistics`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from perception.errors import PerceptionWarning
from perception.inference.checks import roll_and_elevation
from perception.inference.visibility import CELL, CELLS
from perception.types import NumpyCameraRig

Findings = dict[str, str]  # a sentence for each kind of fault
Sizes = Sequence[tuple[int, ...]] | Mapping[int, tuple[int, ...]]  # height and width by number of the camera

USUAL_FOCAL = 0.15, 5.0  # times the larger side of the image: fields of view of 147 and 11 degrees
USUAL_CENTER = (0.2, 0.8), (-0.5, 1.5)  # of the width and the height; many crop images at the top
MAX_SQUEEZE = 1.6  # ratio of the two focal lengths
OTHER_SIZE = 1.18, 0.12  # factor of another image size, and largest difference of its two estimates
MAX_ROLL = 45.0  # degrees
MAX_ELEVATION = 30.0  # degrees above the horizon
USUAL_HEIGHT = 0.0, 6.0  # metres above the ground
FARTHEST_USUAL = 20.0  # metres from the rear axle; the longest buses have 25 m
SAME_PLACE = 1e-3  # metres, and radians: poses of two cameras are never this close

SAMPLES = 24, 32  # rows and columns of pixels that are checked
MIN_CONTRAST = 0.5  # standard deviation of grey values; noise alone is more
MIN_FRAMES = 3  # before the statistics of images count
DECAY = 0.9  # of the statistics from frame to frame
COLOR_MARGIN = 6.0  # grey values by which the channels of a pixel must differ to count
MIN_FOLIAGE = 0.015  # share of green pixels that are needed
MIN_SWAPPED = 8.0  # ratio of bluish to reddish green; real foliage has 1 to 20 or less
SKY_BRIGHTNESS = 150.0  # grey value
DAYLIGHT = 60.0  # mean grey value
ENOUGH_CAMERAS = 3  # pictures of fewer may be odd by chance
MIN_INVERTED = 0.12, 0.45  # share by which there is more sky below than above: enough cameras, fewer cameras
CLEARLY, MIN_VOTES = 0.05, 2  # such a share in one camera; so many cameras with it for each camera with the contrary


class Warnings:
    """Emits the warnings of a predictor, each kind once.

    `EVERY_TIME` names the kinds that report an event of one step, such as a dropped memory. They are always emitted.

    Args:
        names: of the cameras, one for each image, which then stand in the sentences instead of their numbers.
    """

    EVERY_TIME = ("motion", "not finite")

    def __init__(self, names: Sequence[str] = ()) -> None:
        self._names = names
        self._emitted: set[str] = set()

    def emit(self, findings: Mapping[str, str]) -> tuple[str, ...]:
        """Emits what is new as a PerceptionWarning at the line that called `step`, and returns all sentences."""
        findings = {kind: self.named(sentence) for kind, sentence in findings.items()}
        for kind, sentence in findings.items():
            if kind in self.EVERY_TIME or kind not in self._emitted:
                self._emitted.add(kind)
                warnings.warn(sentence, PerceptionWarning, stacklevel=3)
        return tuple(findings.values())

    def named(self, sentence: str) -> str:
        """Returns a sentence with names in place of the numbers in `images[3]`, `rig.img_from_cam[3]`, `camera 3`."""
        if not self._names:
            return sentence
        numbered = re.compile(r"(?<=images\[)\d+(?=\])|(?<=_cam\[)\d+(?=\])|(?<=camera )\d+")
        return numbered.sub(lambda match: repr(self._names[int(match[0])]), sentence)


def first_of_each(images: Iterable[int], cameras: Sequence[str]) -> list[int]:
    """Returns the first image of each camera, because a wide camera becomes several images of the network.

    Args:
        images: numbers of images.
        cameras: the name of the camera of each image; empty if every image is that of another camera.
    """
    images = list(images)
    first = {cameras[n] if cameras else n: n for n in reversed(images)}
    return [n for n in images if first[cameras[n] if cameras else n] == n]


def whole_cameras(faulty: Iterable[int], images: Iterable[int], cameras: Sequence[str]) -> list[int]:
    """Returns the first image of each camera of which all images are faulty.

    Args:
        faulty: numbers of images with a fault.
        images: numbers of all images that were checked.
        cameras: as for `first_of_each`.
    """
    faulty = list(faulty)
    sound = {cameras[n] for n in set(images) - set(faulty)} if cameras else set()
    return [n for n in first_of_each(faulty, cameras) if not cameras or cameras[n] not in sound]


def implausible_rig(
    rig: NumpyCameraRig, sizes: Sizes, seeing: NDArray[np.bool_], cameras: Sequence[str] = ()
) -> Findings:
    """Finds what is implausible in the calibration of the present cameras.

    Args:
        rig: of the given images, from `checked_rig`.
        sizes: height and width of the given images by camera; those of cameras that are not present are not read.
        seeing: which present cameras see the ground, from `sees_ground`.
        cameras: as for `first_of_each`.
    """
    present = [int(n) for n in np.flatnonzero(rig.present)]
    if not present:
        return {"no camera": "no camera is present; what is predicted comes from the memory alone"}
    found: Findings = {}

    def check(kind: str, faults: Mapping[int, str], sentence: Callable[[int, str], str]) -> None:
        if of_cameras := whole_cameras(faults, present, cameras):
            n, more = of_cameras[0], len(of_cameras) - 1
            found[kind] = sentence(n, faults[n]) + (f"; the same holds for {more} more" if more else "")

    intrinsics = {n: (rig.img_from_cam[n], sizes[n][:2]) for n in present}
    poses = {n: rig.ego_from_cam[n] for n in present}
    check(
        "image size",
        {n: text for n, (matrix, size) in intrinsics.items() if (text := _other_size(matrix, size))},
        lambda n, text: (
            f"rig.img_from_cam[{n}] {text}; give the intrinsics of the given images, scaled and cropped as they are"
        ),
    )
    check(
        "principal point",
        {n: text for n, (matrix, size) in intrinsics.items() if (text := _off_center(matrix, size))},
        lambda n, text: (
            f"rig.img_from_cam[{n}] has its principal point at {text}, far from the centre of the image; "
            "give pixels of the given images, and check their size"
        ),
    )
    check(
        "focal length",
        {n: text for n, (matrix, size) in intrinsics.items() if (text := _unusual_focal(matrix, size))},
        lambda n, text: f"rig.img_from_cam[{n}] has {text}; give pixels of the given images (not millimetres)",
    )
    angles = {n: roll_and_elevation(pose) for n, pose in poses.items()}
    check(
        "roll",
        {n: f"{roll:.0f}" for n, (roll, _) in angles.items() if abs(roll) > MAX_ROLL},
        lambda n, text: (
            f"rig.ego_from_cam[{n}] is rolled by {text} degrees about its optical axis, so its image "
            "stands on its side or its head; check axes (camera: x right, y down, z forward) and the direction of the "
            "transform, and turn the images of a camera that is mounted so"
        ),
    )
    check(
        "elevation",
        {n: f"{up:.0f}" for n, (_, up) in angles.items() if up > MAX_ELEVATION},
        lambda n, text: (
            f"rig.ego_from_cam[{n}] looks {text} degrees upwards; check its axes (camera: x right, y down, "
            "z forward; ego: x forward, y left, z up)"
        ),
    )
    check(
        "height",
        {n: f"{pose[2, 3]:.3g}" for n, pose in poses.items() if not USUAL_HEIGHT[0] <= pose[2, 3] <= USUAL_HEIGHT[1]},
        lambda n, text: (
            f"rig.ego_from_cam[{n}] is at a height of {text} m; the origin of the ego frame is on the "
            "ground below the rear axle, and z points up: give metres in this frame"
        ),
    )
    check(
        "distance",
        {n: f"{far:.3g}" for n, pose in poses.items() if (far := float(np.hypot(*pose[:2, 3]))) > FARTHEST_USUAL},
        lambda n, text: f"rig.ego_from_cam[{n}] is {text} m from the rear axle; give metres in the ego frame",
    )
    check(
        "same pose",
        {b: f"{a}" for k, b in enumerate(present) for a in present[:k] if _same_camera(rig, a, b)},
        lambda n, text: (
            f"rig.ego_from_cam[{n}] and rig.ego_from_cam[{text}] are the same pose; give each camera its own"
        ),
    )
    check(
        "blind camera",
        {n: "" for n, sees in zip(present, seeing, strict=True) if not sees},
        lambda n, _: (
            f"rig: camera {n} sees nothing of the ground within {CELL * CELLS / 2:.0f} m in the part of its "
            "image that the network gets; check its calibration"
        ),
    )
    return found


def _other_size(img_from_cam: NDArray[np.float64], size: tuple[int, ...]) -> str:
    """Returns a text if the principal point is the centre of an image of another size and the same shape."""
    H, W = size
    across, down = 2 * img_from_cam[0, 2] / W, 2 * img_from_cam[1, 2] / H
    least, difference = OTHER_SIZE
    if min(across, down) <= 0 or abs(across / down - 1) > difference or 1 / least < (across + down) / 2 < least:
        return ""
    return (
        f"has its principal point at {img_from_cam[0, 2]:.4g}, {img_from_cam[1, 2]:.4g} px, the centre of an image of "
        f"about {2 * img_from_cam[1, 2]:.0f} x {2 * img_from_cam[0, 2]:.0f} pixels (height x width), but the image has "
        f"{H} x {W}"
    )


def _off_center(img_from_cam: NDArray[np.float64], size: tuple[int, ...]) -> str:
    (H, W), (u, v) = size, img_from_cam[:2, 2]
    for low_high, share in zip(USUAL_CENTER, (u / W, v / H), strict=True):
        if not low_high[0] <= share <= low_high[1]:
            return f"{u:.4g}, {v:.4g} px in an image of {H} x {W} pixels (height x width)"
    return ""


def _unusual_focal(img_from_cam: NDArray[np.float64], size: tuple[int, ...]) -> str:
    focal_x, focal_y, larger = img_from_cam[0, 0], img_from_cam[1, 1], max(size)
    low, high = (share * larger for share in USUAL_FOCAL)
    if not low <= min(focal_x, focal_y) <= max(focal_x, focal_y) <= high:
        return (
            f"focal lengths of {focal_x:.4g} and {focal_y:.4g} px, and usual cameras with an image of {size[0]} x "
            f"{size[1]} pixels (height x width) have {low:.4g} to {high:.4g}"
        )
    if max(focal_x / focal_y, focal_y / focal_x) > MAX_SQUEEZE:
        return f"focal lengths of {focal_x:.4g} and {focal_y:.4g} px, but pixels of cameras are square"
    return ""


def _same_camera(rig: NumpyCameraRig, a: int, b: int) -> bool:
    """Returns True for the same pose and about the same focal length; a wide and a narrow crop of an image differ."""
    same_pose = np.abs(rig.ego_from_cam[a] - rig.ego_from_cam[b]).max() < SAME_PLACE
    focal_a, focal_b = rig.img_from_cam[[a, b], 0, 0]
    return bool(same_pose and 0.9 < focal_a / focal_b < 1.1)


def sampled_rgb(image: NDArray[np.uint8], image_format: str = "rgb") -> NDArray[np.float32]:
    """Returns pixels on a regular grid, [about 24, about 32, 3] RGB 0..255.

    Args:
        image: in a format of `perception.export.contract.IMAGE_FORMATS`.
        image_format: the name of the format.
    """

    def steps(rows: int, columns: int) -> tuple[slice, slice]:
        row, column = (max(count // wanted, 1) for count, wanted in zip((rows, columns), SAMPLES, strict=True))
        return slice(row // 2, None, row), slice(column // 2, None, column)

    if image_format.startswith("nv12"):
        H = image.shape[0] // 3 * 2
        chroma = image[H:].reshape(H // 2, -1, 2)
        rows, columns = steps(*chroma.shape[:2])
        luma = image[0:H:2, 0::2][rows, columns].astype(np.float32)
        blue, red = np.moveaxis(chroma[rows, columns].astype(np.float32) - 128, -1, 0)
        rgb = np.stack([luma + 1.4 * red, luma - 0.34 * blue - 0.71 * red, luma + 1.77 * blue], -1)
        colors: NDArray[np.float32] = rgb.clip(0, 255)
        return colors
    if image_format.endswith("chw"):
        image = image.transpose(1, 2, 0)
    pixels = image[steps(*image.shape[:2])].astype(np.float32)
    return pixels[..., ::-1] if image_format.startswith("bgr") else pixels


class Statistics(NamedTuple):
    """Sums over frames, of which older ones count less."""

    frames: int
    sums: NDArray[np.float64]  # [10] of `_color_and_sky`, and shares of cameras with more sky below, and above


class ImageStatistics:
    """Finds implausible images, with statistics over several frames where one frame is not enough.

    Red and blue: foliage reflects more red than blue, and a bright sky is blue or white. If nearly all green pixels are
    bluish and bright pixels in the upper half are rather orange, red and blue are swapped. Upside down: more of the
    sky, which is bright and not reddish, is in the lower third of the images than in the upper third, and few cameras
    have it the other way: bright pavement before a wall looks like sky too. Nothing can be found by night, in a tunnel,
    without foliage, of one camera among several, or of the colours of one or two cameras. Snow below dark trees may
    look upside down. In 40 generated drives of three frames, 27 of 40 with swapped colours are found, in 24 others 20
    upside down, and none of the good ones; both are found in the two recordings of real drives.

    Args:
        cameras: as for `first_of_each`.
    """

    def __init__(self, cameras: Sequence[str] = ()) -> None:
        self._cameras = cameras
        self._kept = Statistics(0, np.zeros(10))

    def keep(self, statistics: Statistics) -> None:
        """Stores the statistics that `implausible` returned."""
        self._kept = statistics

    def implausible(self, images: Mapping[int, NDArray[np.float32]]) -> tuple[Findings, Statistics]:
        """Finds what is implausible in the images of one frame and those before. It changes nothing; `keep` does.

        Args:
            images: pixels from `sampled_rgb` of the present cameras, by number of the camera.
        """
        found: Findings = {}
        dark = [n for n, pixels in images.items() if pixels.max() == 1 and pixels.min() == 0]
        flat = [n for n, pixels in images.items() if n not in dark and pixels.std() < MIN_CONTRAST]
        if dead := first_of_each(flat, self._cameras):
            others = f" (and {len(dead) - 1} others)" if len(dead) > 1 else ""
            is_whole = dead[0] in whole_cameras(flat, images, self._cameras)
            where = "everywhere" if is_whole else "in a whole image of the network"
            found["no contrast"] = (
                f"images[{dead[0]}]{others} has the same value {where}, {images[dead[0]].mean():.0f}: the camera is "
                "covered or dead, or 0..1 was converted to uint8; set rig.present to False for such a camera"
            )
        if bits := whole_cameras(dark, images, self._cameras):
            found["0..1"] = (
                f"images[{bits[0]}] holds only the values 0 and 1, as after a conversion of 0..1 to uint8; give 0..255"
            )
        if pair := _same_images({n: pixels for n, pixels in images.items() if n not in flat}):
            found["same image"] = (
                f"images[{pair[0]}] and images[{pair[1]}] are the same picture; give each camera its own image"
            )
        usable = [n for n in images if n not in flat + dark]
        if not usable:
            return found, self._kept
        of_camera = np.array([_color_and_sky(images[n]) for n in usable])
        above, below = of_camera[:, 4], of_camera[:, 5]
        votes = [(below - above > CLEARLY).mean(), (above - below > CLEARLY).mean()]
        shares = np.append(of_camera.mean(0), votes)
        statistics = Statistics(self._kept.frames + 1, DECAY * self._kept.sums + shares)
        return found | _over_frames(statistics, len(first_of_each(usable, self._cameras))), statistics


def _over_frames(statistics: Statistics, cameras: int) -> Findings:
    found: Findings = {}
    weight = (1 - DECAY**statistics.frames) / (1 - DECAY)
    reddish, bluish, blue_sky, orange_sky, above, below, green, brightness, inverted, upright = statistics.sums / weight
    if statistics.frames < MIN_FRAMES or brightness < DAYLIGHT:
        return found
    is_swapped = bluish > MIN_SWAPPED * reddish and orange_sky > blue_sky
    if is_swapped and green > MIN_FOLIAGE and cameras >= ENOUGH_CAMERAS:
        found["swapped colours"] = (
            f"images: red and blue are probably swapped, because {100 * bluish / (reddish + bluish):.0f} % of the "
            "green pixels are bluish and bright pixels above are rather orange than blue; give RGB (OpenCV reads "
            "BGR: reverse the last axis)"
        )
    if below - above > MIN_INVERTED[cameras < ENOUGH_CAMERAS] and inverted >= MIN_VOTES * upright:
        found["upside down"] = (
            f"images: probably upside down, because {100 * below:.0f} % of their lower third and {100 * above:.0f} % "
            "of their upper third look like sky; turn them, or check the order of their rows"
        )
    return found


def _color_and_sky(pixels: NDArray[np.float32]) -> list[float]:
    """Returns the shares of pixels that `ImageStatistics` compares, and the mean grey value."""
    third, half = len(pixels) // 3, max(len(pixels) // 2, 1)
    red, green, blue = np.moveaxis(pixels, -1, 0)  # [h, w] each
    grey, redder = (red + green + blue) / 3, red - blue
    foliage = green > np.maximum(red, blue) + COLOR_MARGIN
    bright = grey[:half] > SKY_BRIGHTNESS - 20
    sky = (grey > SKY_BRIGHTNESS) & (redder < COLOR_MARGIN + 2)
    counts = [
        np.count_nonzero(share) / share.size
        for share in (
            foliage & (redder > COLOR_MARGIN), foliage & (redder < -COLOR_MARGIN), bright & (redder[:half] < -8),
            bright & (redder[:half] > 8), sky[:third] if third else sky, sky[-third:] if third else sky, foliage,
        )
    ]  # fmt: skip
    return [*counts, float(grey.mean())]


def _same_images(images: Mapping[int, NDArray[np.float32]]) -> tuple[int, int] | None:
    """Returns the numbers of two cameras with the same pixels, None for none."""
    seen: dict[bytes, int] = {}
    for n, pixels in images.items():
        first = seen.setdefault(pixels.tobytes(), n)
        if first != n:
            return first, n
    return None
