"""Measures the tilt and the heading of a camera from straight lines in its images, with numpy and SciPy alone.

Edges of buildings and posts are vertical, and kerbs, lane markings and facades run along the road. A line of the world
and the optical centre span a plane; its normal comes from two pixels of the line and the camera model, also of a
fisheye. All planes of parallel lines contain the direction of the lines (their vanishing point). If a calibration is
right, that of verticals is up, and that of most level lines is the direction of the road.

Lines are found as by Burns, Hanson and Riseman (PAMI 1986): connected pixels with about the same gradient direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage, optimize

from perception.rigs.rig import RigCamera

WIDTH = 1600  # pixels to which larger images are reduced
SECTORS = 16  # of the gradient direction
LEAST_LENGTH = 22.0  # pixels of a line
WIDEST = 1.1  # pixels: standard deviation across a line
LEAST_CONTRAST = 6.0  # grey values per pixel
STEEP_DEG = 18.0  # off the vertical up to which a line is taken for a vertical one
GROUND_DEG = -4.0  # elevation below which steep lines may be markings on the road
MOST_TILT_DEG, MOST_YAW_DEG = 14.0, 18.0  # that is looked for
SPREAD_DEG = 0.6  # of the planes of lines around the truth
LEAST_LINES = 24  # that agree
LEAST_IMAGES = 3  # for the yaw: one image shows where a street leads, not where the vehicle goes
HALVES_DEG = 1.0  # difference of the directions that two halves of the lines have, at most
GAIN = 1.35  # of the agreement over that of the calibration
SHARP = 0.8  # share of the agreement that is left 2 degrees off the best direction, at most
TILT_DEG, YAW_DEG = 3.0, 4.0  # deviations that are reported; roads slope, and bodies lean, by one or two degrees


Floats = NDArray[np.float64]


class Lines(NamedTuple):
    """Straight lines of images of one camera."""

    normals_cam: Floats  # [L, 3] unit normals of the planes through the optical centre
    middles_cam: Floats  # [L, 3] unit rays to their middles
    weights: Floats  # [L] length in pixels of the reduced image


class Tilt(NamedTuple):
    """How a camera really stands, relative to its calibration, where lines show it.

    Attributes:
        pitch_deg: downwards; None if too few vertical lines agree.
        roll_deg: clockwise as seen from behind the camera; None likewise.
        yaw_deg: to the left, if the vehicle follows the road; None if too few lines run along it.
        verticals, along: numbers of lines that agree.
    """

    pitch_deg: float | None
    roll_deg: float | None
    yaw_deg: float | None
    verticals: int
    along: int

    def __str__(self) -> str:
        if self.pitch_deg is None:
            return "too few lines"
        yaw = "" if self.yaw_deg is None else f", yaw {self.yaw_deg:+.1f}"
        return f"pitch {self.pitch_deg:+.1f}, roll {self.roll_deg:+.1f}{yaw}"

    def finding(self) -> str:
        """Returns what deviates, as the end of a sentence; an empty text if nothing does."""
        parts = []
        for name, value, limit, words in (
            ("pitch", self.pitch_deg, TILT_DEG, ("downwards", "upwards")),
            ("roll", self.roll_deg, TILT_DEG, ("clockwise", "counter-clockwise")),
            ("yaw", self.yaw_deg, YAW_DEG, ("to the left", "to the right")),
        ):
            if value is not None and abs(value) > limit:
                lines = f"{self.along} lines along the road" if name == "yaw" else f"{self.verticals} vertical lines"
                parts.append(f"{abs(value):.1f} degrees farther {words[value < 0]} ({name}; {lines})")
        return " and ".join(parts)


def find_lines(image: NDArray[np.uint8], camera: RigCamera) -> Lines:
    """Finds the straight lines of an image.

    Args:
        image: [H, W, 3] in the size of the camera.
        camera: its calibration.
    """
    scale = min(1.0, WIDTH / image.shape[1])
    picture = Image.fromarray(image).convert("L")
    size = (round(scale * picture.width), round(scale * picture.height))
    grey = np.asarray(picture.resize(size, Image.Resampling.BOX), np.float32)
    ends = _segments(grey) * (np.array(image.shape[1::-1]) / size)  # [L, 2, 2] pixels of the image
    rays, seen = camera.unproject(ends)
    good = seen.all(1)
    rays, length = rays[good], np.linalg.norm(ends[good, 1] - ends[good, 0], axis=-1) * scale
    normals = np.cross(rays[:, 0], rays[:, 1])
    middles = rays.sum(1)
    return Lines(_unit(normals), _unit(middles), length)


def measure_tilt(lines: Sequence[Lines], camera: RigCamera) -> Tilt:
    """Compares the lines of several images of a camera with its calibration.

    Args:
        lines: of each image.
        camera: its calibration.
    """
    rotation = camera.ego_from_cam[:3, :3]
    normals, middles = (
        np.concatenate([getattr(one, name) for one in lines]) @ rotation.T for name in Lines._fields[:2]
    )
    weights = np.concatenate([one.weights for one in lines])
    heading = np.arctan2(rotation[1, 2], rotation[0, 2])
    ahead, left = np.array([np.cos(heading), np.sin(heading), 0]), np.array([-np.sin(heading), np.cos(heading), 0])
    steep = np.abs(normals[:, 2]) < np.sin(np.radians(STEEP_DEG))
    high = middles[:, 2] > np.sin(np.radians(GROUND_DEG))

    def up(angles: Floats) -> Floats:
        return _unit(np.tan(angles[..., :1]) * ahead + np.tan(angles[..., 1:]) * left + [0.0, 0.0, 1.0])

    most = np.radians(MOST_TILT_DEG)
    tilt, verticals = _agreement(normals[steep & high], weights[steep & high], up, (most, most))
    if tilt is None:
        return Tilt(None, None, None, verticals, 0)
    # The measured vertical leans towards where the camera looks: the camera looks farther up than its calibration.
    pitch, roll = -np.degrees(tilt[0]), np.degrees(tilt[1])
    upright = up(tilt)
    level = _unit(ahead - (ahead @ upright) * upright)
    side = np.cross(upright, level)

    road = np.arctan2(-np.sin(heading), np.cos(heading))  # of ego x, seen from the heading of the camera

    def along(angles: Floats) -> Floats:
        return np.asarray(np.cos(angles + road) * level + np.sin(angles + road) * side)

    yaw, count = _agreement(normals[~(steep & high)], weights[~(steep & high)], along, (np.radians(MOST_YAW_DEG),))
    turned = None if yaw is None or len(lines) < LEAST_IMAGES else -float(np.degrees(yaw[0]))
    return Tilt(float(pitch), float(roll), turned, verticals, count)


def _agreement(
    normals: Floats, weights: Floats, direction: Callable[[Floats], Floats], most: Sequence[float]
) -> tuple[Floats | None, int]:
    """Finds the direction that most planes contain.

    Args:
        normals, weights: [L, 3] and [L] of the lines.
        direction: makes unit vectors [..., 3] of angles [..., A], radians.
        most: largest angles [A] that are tried.

    Returns:
        The angles [A], None if too few lines agree or they do not single one out; and the number of lines that agree.
    """
    if len(normals) < LEAST_LINES:
        return None, len(normals)
    spread = np.radians(SPREAD_DEG)

    def score(angles: Floats, part: slice = slice(None)) -> Floats:
        off = np.arcsin(np.clip(direction(angles) @ normals[part].T, -1, 1))  # [..., L]
        return np.asarray(np.exp(-((off / spread) ** 2) / 2) @ weights[part])

    steps = [np.arange(-limit, limit + 1e-9, spread) for limit in most]
    tried = np.stack(np.meshgrid(*steps, indexing="ij"), -1)
    scores = score(tried)
    found = _climbed(score, tried[np.unravel_index(scores.argmax(), scores.shape)])
    best = float(score(found))
    off = np.abs(np.arcsin(np.clip(direction(found) @ normals.T, -1, 1)))
    count = int((off < 2 * spread).sum())
    around = [found + sign * np.radians(2.0) * axis for axis in np.eye(len(most)) for sign in (-1, 1)]
    is_sharp = max(float(score(angles)) for angles in around) < SHARP * best
    deviates = np.abs(found).max() > np.radians(TILT_DEG)
    is_better = not deviates or best > GAIN * float(score(np.zeros(len(most))))
    if count < LEAST_LINES or not is_sharp or not is_better:
        return None, count
    halves = [_climbed(partial(score, part=slice(k, None, 2)), found) for k in (0, 1)]
    agree = np.abs(halves[0] - halves[1]).max() < np.radians(HALVES_DEG)
    return (found if agree else None), count


def _climbed(score: Callable[[Floats], Floats], start: Floats) -> Floats:
    """The angles [A] of the best score near a start."""
    options = {"xatol": 1e-4, "initial_simplex": start + np.radians(0.5) * np.eye(len(start) + 1, len(start))}
    return np.asarray(optimize.minimize(lambda x: -float(score(x)), start, method="Nelder-Mead", options=options).x)


def _segments(grey: NDArray[np.float32]) -> Floats:
    """Finds line segments, [L, 2 ends, 2] pixels of a grey image [H, W]."""
    dv, du = (ndimage.gaussian_filter(grey, 0.8, order=order) for order in ((1, 0), (0, 1)))
    strength, angle = np.hypot(du, dv), np.arctan2(dv, du)
    strong = strength > LEAST_CONTRAST
    # Two sets of sectors, half a sector apart: of a line at the edge of a sector the other set has all pixels.
    sets = [_supports(strong, angle + shift * np.pi / SECTORS) for shift in (0, 1)]
    sizes = [np.bincount(labels.ravel()) for labels in sets]
    for own in sizes:
        own[0] = 0
    first = sizes[0][sets[0]] >= sizes[1][sets[1]]  # each pixel belongs to the larger of its two regions
    found = []
    for labels, own, chosen in zip(sets, sizes, (first, ~first), strict=True):
        voted = np.bincount(labels[chosen], minlength=len(own))
        places = ndimage.find_objects(labels)
        for label in np.flatnonzero((own >= LEAST_LENGTH) & (2 * voted >= own)).tolist():
            where = places[label - 1]
            v, u = np.nonzero(labels[where] == label)
            v, u = v + where[0].start, u + where[1].start
            weight = strength[v, u]
            points = np.stack([u, v], -1) + 0.5
            middle = (points * weight[:, None]).sum(0) / weight.sum()
            spread, axes = np.linalg.eigh((points - middle).T @ ((points - middle) * weight[:, None]) / weight.sum())
            along = (points - middle) @ axes[:, 1]
            if np.sqrt(spread[0]) > WIDEST or np.ptp(along) < LEAST_LENGTH:
                continue
            found.append(middle + np.array([along.min(), along.max()])[:, None] * axes[:, 1])
    return np.array(found).reshape(-1, 2, 2)


def _supports(strong: NDArray[np.bool_], angle: NDArray[np.float32]) -> NDArray[np.int32]:
    """Labels connected strong pixels whose gradients are in one sector, [H, W]; 0 for the others."""
    sector = np.floor(angle / (2 * np.pi) * SECTORS).astype(int) % SECTORS
    labels, total = np.zeros(strong.shape, np.int32), 0
    for k in range(SECTORS):
        own, count = ndimage.label(strong & (sector == k), np.ones((3, 3)))
        labels[own > 0] = own[own > 0] + total
        total += count
    return labels


def _unit(vectors: Floats) -> Floats:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12))
