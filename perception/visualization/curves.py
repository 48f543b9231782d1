"""Projects straight lines of the world to curves in the images of any camera model, cut where the camera ends.

A line is sampled at equal angles as the camera sees it, so that its curve is exact to half a pixel near and far. It
is cut where it leaves the field of view of the lens, comes nearer than `NEAR` (or behind a pinhole), or leaves a window
around the image; the ends of a cut are found by trying parts of a step.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from perception.rigs.models import angles
from perception.rigs.rig import RigCamera

NEAR = 0.1  # metres from the optical centre
STEP_DEG = 2.0  # between samples; a chord is off its curve by less than 0.5 px, also where a lens bends most
WINDOW = 1.0  # how far outside the image a curve goes on, in image sides
SECTIONS, ROUNDS = 10, 3  # a step is divided so often to find where a curve ends: to 0.002 degrees

Floats = NDArray[np.float64]


def project_segments(
    camera: RigCamera, starts_cam: ArrayLike, ends_cam: ArrayLike, chains: ArrayLike
) -> list[tuple[int, Floats]]:
    """Projects segments, and joins those of one chain.

    Args:
        camera: of any model.
        starts_cam, ends_cam: [S, 3] metres, camera frame (x right, y down, z forward).
        chains: [S] number of the chain of each segment; the segments of a chain stand one after another, and each one
            begins where the one before it ends.

    Returns:
        For each uncut piece of a chain its number and its curve [K, 2] in pixels of the image. A piece is a part of the
        chain that is seen without a gap; chains that are not seen have none.
    """
    start, end, chain = np.asarray(starts_cam, float), np.asarray(ends_cam, float), np.asarray(chains)
    if not len(start):
        return []
    way = end - start
    length = np.linalg.norm(way, axis=1).clip(1e-9)
    along = way / length[:, None]
    foot = -(start * along).sum(1)  # where the line through the segment is nearest to the optical centre
    distance = np.linalg.norm(start + foot[:, None] * along, axis=1).clip(NEAR / 10)
    first, last = np.arctan2(-foot, distance), np.arctan2(length - foot, distance)
    counts = np.ceil((last - first) / np.radians(STEP_DEG)).astype(int).clip(1) + 1
    segment = np.repeat(np.arange(len(start)), counts)
    number = np.arange(len(segment)) - np.repeat(np.cumsum(counts) - counts, counts)
    share = number / (counts[segment] - 1)
    at = foot[segment] + distance[segment] * np.tan(first[segment] + share * (last - first)[segment])
    at = np.where(number == 0, 0.0, np.where(share == 1, length[segment], at))

    def project(segment: NDArray[np.int64], at: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        return _seen(camera, start[segment] + at[:, None] * along[segment])

    uv, seen = project(segment, at)
    cuts = np.flatnonzero((segment[1:] == segment[:-1]) & (seen[1:] != seen[:-1]))
    if cuts.size:
        inside = np.where(seen[cuts], at[cuts], at[cuts + 1])
        outside = np.where(seen[cuts], at[cuts + 1], at[cuts])
        for _ in range(ROUNDS):
            part = (outside - inside) / SECTIONS
            tried = inside[:, None] + part[:, None] * np.arange(1, SECTIONS)  # [cuts, SECTIONS - 1]
            _, is_seen = project(np.repeat(segment[cuts], SECTIONS - 1), tried.ravel())
            inside = inside + part * np.cumprod(is_seen.reshape(tried.shape), axis=1).sum(1)
            outside = inside + part
        uv = np.insert(uv, cuts + 1, project(segment[cuts], inside)[0], axis=0)
        seen = np.insert(seen, cuts + 1, True)
        segment = np.insert(segment, cuts + 1, segment[cuts])
    group = chain[segment]
    new = np.ones(len(uv), bool)
    new[1:] = (group[1:] != group[:-1]) | ~seen[:-1]
    kept = np.flatnonzero(seen)
    if not kept.size:
        return []
    pieces = np.split(kept, np.flatnonzero(new[kept])[1:])
    return [(int(group[piece[0]]), uv[piece]) for piece in pieces if len(piece) > 1]


def may_see(camera: RigCamera, centers_cam: Floats, radii: Floats) -> NDArray[np.bool_]:
    """Returns which spheres a camera may see, [M]; it leaves out only what is surely outside of its image.

    Args:
        camera: of any model.
        centers_cam: [M, 3] metres.
        radii: [M] metres.
    """
    distance = np.linalg.norm(centers_cam, axis=1).clip(1e-9)
    reach = np.arcsin((radii / distance).clip(0, 1)) + np.pi * (radii >= distance)
    return np.asarray(angles(centers_cam) - reach <= camera.max_angle)


def _seen(camera: RigCamera, points_cam: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Pixels of points, and whether a curve is drawn there."""
    uv, valid = camera.model.project(points_cam)
    H, W = camera.image_size
    size = np.array([W, H])
    with np.errstate(invalid="ignore"):  # of points without a pixel
        near_image = ((uv >= -WINDOW * size) & (uv <= (1 + WINDOW) * size)).all(1)
    far = np.linalg.norm(points_cam, axis=1) >= NEAR
    return uv, valid & near_image & far & (angles(points_cam) <= camera.lens_angle)
