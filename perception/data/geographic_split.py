"""Makes geographic splits: train and validation scenes that keep a minimum distance from each other.

`perception.data.leakage` explains why the distance matters and measures it for any pair of splits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.sparse.csgraph import connected_components

from perception.data.leakage import Keyframes, nearest_distances
from perception.errors import ConfigError, DataError

_STARTS = 16  # scenes tried as the centre of a validation area


class GeographicSplit(NamedTuple):
    """Two sets of scenes that keep a minimum distance, in the order of the dataset."""

    train: list[str]
    val: list[str]
    left_out: list[str]  # too near to scenes of both sets
    groups: int  # connected groups of scenes at the distance, before any scene was left out


def geographic_split(
    keyframes: Keyframes, *, min_distance: float, seed: int, val_share: float = 0.15, max_left_out: float = 0.0
) -> GeographicSplit:
    """Divides all scenes so that no validation keyframe lies within `min_distance` of a training keyframe.

    Two scenes are connected if any of their keyframes are at most `min_distance` apart. A connected group goes to one
    side as a whole. Each location contributes its share of validation keyframes as closely as its groups allow. The
    remainder is carried over to the next location; locations with the fewest groups come first. Where roads are so
    dense that all scenes are connected, scenes around a validation area may be left out: only as many as bring the
    share closer to the wanted one, and at most `max_left_out`.

    Args:
        keyframes: of the whole dataset.
        min_distance: metres.
        seed: selects one of the possible splits.
        val_share: wanted share of keyframes in validation, between 0 and 1.
        max_left_out: largest share of each location's scenes that may be left out.

    Raises:
        ConfigError: a number is out of its range.
        DataError: no division keeps the distance.
    """
    if not (np.isfinite(min_distance) and min_distance >= 0):
        raise ConfigError(f"min_distance is {min_distance}; give metres, 0 or more")
    if not 0 < val_share < 1:
        raise ConfigError(f"val_share is {val_share}; give a share between 0 and 1, such as 0.15")
    if not 0 <= max_left_out < 1:
        raise ConfigError(f"max_left_out is {max_left_out}; give a share from 0 to below 1, such as 0.05")
    if seed < 0:
        raise ConfigError(f"seed is {seed}; give a whole number of 0 or more")
    rng = np.random.default_rng(seed)
    near = scenes_within(keyframes, min_distance)  # [S, S]
    group = connected_components(near, directed=False)[1]  # [S]
    frames = np.bincount(keyframes.scene, minlength=len(near))  # [S]
    location = np.array(keyframes.location)
    names = sorted(rng.permutation(np.unique(location)), key=lambda name: len(np.unique(group[location == name])))
    val, left = np.zeros(len(near), dtype=bool), np.zeros(len(near), dtype=bool)
    carried = 0.0  # keyframes that earlier locations lacked (negative: had too many)
    for name in names:
        here = np.flatnonzero(location == name)
        wanted = carried + val_share * frames[here].sum()
        chosen = _whole_groups(group[here], frames[here], wanted, rng)
        most = int(max_left_out * len(here) + 1e-9)  # 0.29 x 100 is 28.999...
        if most:
            val[here], left[here] = _area(keyframes, here, near, frames, wanted, most, chosen, rng)
        else:
            val[here] = chosen
        carried = wanted - frames[val & (location == name)].sum()
    if not val.any() or not (~val & ~left).any():
        # The share fits no group, so nothing was left out either: the smallest group comes closest to it.
        sizes = np.bincount(group, weights=frames)
        if len(sizes) == 1:
            raise DataError(
                f"all {len(near)} scenes are connected at {min_distance:g} m, so no split keeps that distance; "
                "give a smaller min-distance or allow more scenes to be left out"
            )
        val = (group == sizes.argmin()) if val_share <= 0.5 else (group != sizes.argmin())

    def scenes(mask: np.ndarray) -> list[str]:
        return [keyframes.scene_name[k] for k in np.flatnonzero(mask)]

    return GeographicSplit(scenes(~val & ~left), scenes(val), scenes(left), int(group.max()) + 1)


def scenes_within(keyframes: Keyframes, distance: float) -> np.ndarray:
    """Returns which pairs of scenes have keyframes at most `distance` metres apart on the same map: [S, S] bool."""
    count = len(keyframes.scene_name)
    xy = [keyframes.xy[keyframes.scene == k] for k in range(count)]  # each [f, 2]
    low, high = np.array([points.min(0) for points in xy]), np.array([points.max(0) for points in xy])  # [S, 2]
    near = np.eye(count, dtype=bool)
    location = np.array(keyframes.location)
    for a in range(count):
        gap = np.maximum(0, np.maximum(low[a] - high, low - high[a]))  # [S, 2] between bounding boxes
        # The margin keeps rounding from excluding a pair; the distances of the keyframes decide.
        close = (np.linalg.norm(gap, axis=1) <= distance + 1e-6) & (location == location[a])
        for b in np.flatnonzero(close[:a]):
            near[a, b] = near[b, a] = nearest_distances(xy[a], xy[b]).min() <= distance
    return near


def _whole_groups(group: np.ndarray, frames: np.ndarray, wanted: float, rng: np.random.Generator) -> np.ndarray:
    """Selects the groups whose keyframes together come nearest to the wanted number: [s] bool over scenes."""
    numbers = rng.permutation(np.unique(group))
    sizes = [int(frames[group == number].sum()) for number in numbers]
    # Subset sums: every reachable sum with the last group that it needs; earlier groups make up the rest.
    last = np.full(sum(sizes) + 1, -1)
    reached = np.zeros(len(last), dtype=bool)
    reached[0] = True
    for k, size in enumerate(sizes):
        new = np.flatnonzero(reached[:-size]) + size
        new = new[~reached[new]]
        last[new], reached[new] = k, True
    sums = np.flatnonzero(reached)
    total = int(sums[np.abs(sums - wanted).argmin()])
    chosen = []
    while total:
        chosen.append(numbers[last[total]])
        total -= sizes[last[total]]
    return np.isin(group, chosen)


def _area(
    keyframes: Keyframes,
    here: np.ndarray,
    near: np.ndarray,
    frames: np.ndarray,
    wanted: float,
    most: int,
    chosen: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses a round validation area with a rim of scenes that are left out, or the given choice if that is better.

    An area grows from a scene to its nearest ones. The cost counts a keyframe too many or too few in validation like a
    keyframe that is left out. An empty validation is allowed only where less than half a scene is wanted.

    Args:
        keyframes: of the whole dataset.
        here: [s] scenes of one location.
        near: [S, S] bool, of all scenes.
        frames: [S] keyframes of each scene.
        wanted: keyframes in validation.
        most: largest number of scenes that may be left out.
        chosen: [s] bool, validation of a choice that leaves nothing out.
        rng: draws the scenes from which areas grow.

    Returns:
        Validation and left out, [s] bool each.
    """
    near, frames = near[np.ix_(here, here)], frames[here]
    middle = np.array([keyframes.xy[keyframes.scene == k].mean(0) for k in here])  # [s, 2]
    best, cost = (chosen, np.zeros_like(chosen)), abs(frames[chosen].sum() - wanted)
    if not chosen.any() and wanted >= frames.min() / 2:
        cost = np.inf
    for start in rng.permutation(len(here))[:_STARTS]:
        order = np.argsort(np.linalg.norm(middle - middle[start], axis=1), kind="stable")
        touched = np.logical_or.accumulate(near[order])  # [s, s] row k: scenes near to any of the first k + 1
        inside = np.cumsum(frames[order])  # [s]
        rim_scenes = touched.sum(1) - np.arange(1, len(here) + 1)
        price = np.abs(inside - wanted) + (touched @ frames - inside)
        price = np.where((rim_scenes <= most) & ~touched.all(1), price, np.inf)  # training needs a scene too
        k = int(price.argmin())
        if price[k] < cost:
            val = np.zeros(len(here), dtype=bool)
            val[order[: k + 1]] = True
            best, cost = (val, touched[k] & ~val), price[k]
    return best
