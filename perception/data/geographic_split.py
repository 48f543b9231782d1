"""Splits whose validation keeps a distance from training."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.sparse.csgraph import connected_components

from perception.data.leakage import Keyframes, nearest_distances
from perception.errors import ConfigError, DataError

_STARTS = 16  # places that are tried as the middle of a validation area


class GeographicSplit(NamedTuple):
    """Two sets of scenes that keep a distance, in the order of the dataset."""

    train: list[str]
    val: list[str]
    left_out: list[str]  # too near to both
    groups: int  # of scenes that hang together at the distance, before anything was left out


def geographic_split(
    keyframes: Keyframes, *, min_distance: float, seed: int, val_share: float = 0.15, max_left_out: float = 0.0
) -> GeographicSplit:
    """Divides all scenes so that no validation keyframe lies within a distance of a training keyframe.

    Scenes with keyframes at most `min_distance` apart hang together, also by way of others, and such a group goes to
    one side. Each location gives its share of keyframes as nearly as its groups allow; what it cannot give is asked of
    the next one, those with fewest groups first. Where roads are so dense that everything hangs together, scenes may
    be left out around a validation area: as many as bring the share nearer, and no more than allowed.

    Args:
        min_distance: metres.
        seed: which of the possible splits it is.
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
    rng = np.random.default_rng(seed)
    near = scenes_within(keyframes, min_distance)  # [S, S]
    group = connected_components(near, directed=False)[1]  # [S]
    frames = np.bincount(keyframes.scene, minlength=len(near))  # [S]
    location = np.array(keyframes.location)
    places = sorted(rng.permutation(np.unique(location)), key=lambda place: len(np.unique(group[location == place])))
    val, left = np.zeros(len(near), dtype=bool), np.zeros(len(near), dtype=bool)
    owed = 0.0  # keyframes that earlier locations could not give
    for place in places:
        here = np.flatnonzero(location == place)
        wanted = owed + val_share * frames[here].sum()
        chosen = _whole_groups(group[here], frames[here], wanted, rng)
        most = int(max_left_out * len(here) + 1e-9)  # 0.29 x 100 is 28.999...
        if most:
            val[here], left[here] = _area(keyframes, here, near, frames, wanted, most, chosen, rng)
        else:
            val[here] = chosen
        owed = wanted - frames[val & (location == place)].sum()
    if not val.any() or not (~val & ~left).any():
        # The share fits no group, so nothing was left out either: the smallest group is the nearest there is.
        sizes = np.bincount(group, weights=frames)
        if len(sizes) == 1:
            raise DataError(
                f"the {len(near)} scenes hang together at {min_distance:g} m, so no split keeps that distance; "
                "give a smaller min-distance or allow more scenes to be left out"
            )
        val = (group == sizes.argmin()) if val_share <= 0.5 else (group != sizes.argmin())

    def names(mask: np.ndarray) -> list[str]:
        return [keyframes.scene_name[k] for k in np.flatnonzero(mask)]

    return GeographicSplit(names(~val & ~left), names(val), names(left), int(group.max()) + 1)


def scenes_within(keyframes: Keyframes, distance: float) -> np.ndarray:
    """Which pairs of scenes have keyframes at most `distance` metres apart on the same map: [S, S] bool."""
    count = len(keyframes.scene_name)
    places = [keyframes.xy[keyframes.scene == k] for k in range(count)]
    low, high = np.array([p.min(0) for p in places]), np.array([p.max(0) for p in places])  # [S, 2]
    near = np.eye(count, dtype=bool)
    location = np.array(keyframes.location)
    for a in range(count):
        gap = np.maximum(0, np.maximum(low[a] - high, low - high[a]))  # [S, 2] between bounding boxes
        # The margin keeps rounding from ruling out a pair; the keyframes themselves decide.
        close = (np.linalg.norm(gap, axis=1) <= distance + 1e-6) & (location == location[a])
        for b in np.flatnonzero(close[:a]):
            near[a, b] = near[b, a] = nearest_distances(places[a], places[b]).min() <= distance
    return near


def _whole_groups(group: np.ndarray, frames: np.ndarray, wanted: float, rng: np.random.Generator) -> np.ndarray:
    """FrameObjects [s] bool of those groups whose keyframes together come nearest to the wanted number."""
    numbers = rng.permutation(np.unique(group))
    sizes = [int(frames[group == number].sum()) for number in numbers]
    # Every sum that some groups reach, with the group that reached it first; those before it make up the rest.
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
    """A round validation area with a rim of scenes that are left out, or the given choice where that is better.

    An area grows from a scene to the next nearest one. A keyframe too many or too few in validation weighs as much as
    one that is left out, but no validation at all is only right where less than half a scene is wanted.

    Args:
        here: [s] scenes of one location.
        near, frames: of all scenes.
        wanted: keyframes of validation.
        most: scenes that may be left out.
        chosen: [s] bool, a choice that leaves nothing out.

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
        touched = np.logical_or.accumulate(near[order])  # [s, s] row k: what the first k + 1 scenes are near to
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
