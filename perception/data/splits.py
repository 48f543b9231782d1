"""Which scenes belong to a split, how far validation leaks from training, and splits that do not leak.

A split is a name or a file. A file is a JSON list of scene names (`.json`), or holds one name a line, where empty lines
and lines that start with `#` do not count. A name is one of `splits.json` beside the tables or one of the devkit's own.

Roads repeat: two scenes that pass the same street show the same lanes, and a network that saw one in training can
recite the map in the other. Distances here are between keyframes, in the xy plane of the map that both lie on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from perception.errors import ConfigError, DataError
from perception.files import replacing

DISTANCES = (5.0, 20.0, 60.0)  # metres that leakage is reported for
_STARTS = 16  # places that are tried as the middle of a validation area


def is_split_file(split: str | Path) -> bool:
    """Whether a split is a file: a Path always, text if it ends in .json or .txt or has a folder in it.

    The text alone decides. What happens to lie in the working directory must not change the meaning of `val`.
    """
    return isinstance(split, Path) or split.endswith((".json", ".txt")) or "/" in split or os.sep in split


def read_split_file(path: str | Path) -> list[str]:
    """The scene names of a split file, each once, in the file's order.

    Raises:
        DataError: the file is missing, is not of the format, or names nothing.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"split file {path} cannot be read ({reason}); give a list of scene names") from None
    if path.suffix == ".json":
        try:
            names = json.loads(text)
        except ValueError as error:
            raise DataError(f"split file {path} is not valid JSON ({error}); write a list of scene names") from None
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise DataError(f'split file {path} is not a JSON list of scene names; write ["scene-0001", ...]')
    else:
        lines = [line.strip() for line in text.splitlines()]
        names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise DataError(f"split file {path} names no scene; write one name a line")
    return list(dict.fromkeys(names))


def write_split_file(path: str | Path, names: Sequence[str], comment: str) -> None:
    """Writes scene names one a line below a line that says where they come from."""
    with replacing(path) as beside:
        beside.write_text("".join(f"{line}\n" for line in (f"# {comment}", *names)), encoding="utf-8")


def split_scenes(split: str | Path, tables: Path, known: Collection[str]) -> list[str]:
    """The scenes of a split that a dataset has, in the dataset's order.

    A named split may list scenes that the dataset lacks, as `val` does for the small version of nuScenes. A file may
    not: it is written for one dataset, and a scene less would change the score without a word.

    Args:
        split: a file (see `is_split_file`), or a name.
        tables: folder of the tables, for its `splits.json` and for errors.
        known: names of all scenes of the tables.

    Raises:
        DataError: the file is malformed or names a scene that is not there, or the split is unknown or empty.
    """
    if is_split_file(split):
        names = read_split_file(split)
        if strange := [name for name in names if name not in known]:
            raise DataError(
                f"split file {split} names {len(strange)} of {len(names)} scenes that {tables / 'scene.json'} lacks, "
                f"{strange[0]} among them; remove them or give the version that they belong to"
            )
    else:
        from nuscenes.utils.splits import create_splits_scenes  # the devkit is slow to import

        path = tables / "splits.json"
        try:
            custom = json.loads(path.read_bytes()) if path.is_file() else {}
        except ValueError as error:
            raise DataError(f"{path} is not valid JSON ({error})") from None
        splits = create_splits_scenes() | custom
        if split not in splits:
            raise DataError(f"{path} has no split '{split}': known are {sorted(splits)}")
        names = splits[split]
    wanted = set(names)
    found = [name for name in known if name in wanted]
    if not found:
        raise DataError(f"{tables / 'scene.json'} holds no scene of split '{split}': give another split or version")
    return found


class Keyframes(NamedTuple):
    """Where a dataset's F keyframes were taken, S scenes."""

    xy: np.ndarray  # [F, 2] float64 metres, global: the ego pose of LIDAR_TOP
    scene: np.ndarray  # [F] int64 index into scene_name
    scene_name: tuple[str, ...]  # [S]
    location: tuple[str, ...]  # [S] the map that each scene lies on

    def of(self, names: Collection[str]) -> tuple[np.ndarray, np.ndarray]:
        """The keyframes of some scenes: xy [f, 2], and location [f] as text."""
        wanted = set(names)
        rows = np.array([name in wanted for name in self.scene_name])[self.scene]
        return self.xy[rows], np.array(self.location)[self.scene[rows]]


def read_keyframes(nusc) -> Keyframes:
    """The keyframes of the devkit's tables (`nuscenes.NuScenes`).

    Raises:
        DataError: a scene has no sample, or a sample no LIDAR_TOP keyframe with a place.
    """
    number = {scene["token"]: k for k, scene in enumerate(nusc.scene)}
    xy, of_scene = [], []
    for sample in nusc.sample:
        try:
            lidar = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
            place = [float(value) for value in nusc.get("ego_pose", lidar["ego_pose_token"])["translation"][:2]]
        except (KeyError, TypeError, ValueError):
            place = []
        if len(place) != 2 or not np.isfinite(place).all():
            raise DataError(
                f"{nusc.table_root}: sample {sample['token']} has no LIDAR_TOP keyframe with an ego_pose of finite "
                "translation; unpack the metadata again"
            )
        xy.append(place)
        of_scene.append(number[sample["scene_token"]])
    counts = np.bincount(of_scene, minlength=len(nusc.scene))
    if not counts.all():
        name = nusc.scene[int(counts.argmin())]["name"]
        raise DataError(f"{nusc.table_root}/sample.json has no sample of scene {name}; unpack the metadata again")
    return Keyframes(
        np.array(xy, dtype=np.float64),
        np.array(of_scene),
        tuple(scene["name"] for scene in nusc.scene),
        tuple(nusc.get("log", scene["log_token"])["location"] for scene in nusc.scene),
    )


@dataclass(frozen=True)
class Leakage:
    """How near the V validation keyframes of a pair of splits lie to the T training keyframes.

    Args:
        nearest: [V] metres to the nearest training keyframe on the same map, inf where the map has none.
        val_xy, val_location: [V, 2] and [V] of the validation keyframes.
        train_xy, train_location: [T, 2] and [T].
        distances: metres that the shares are reported for.
        shared_scenes: scenes that are in both splits.
    """

    nearest: np.ndarray
    val_xy: np.ndarray
    val_location: np.ndarray
    train_xy: np.ndarray
    train_location: np.ndarray
    distances: tuple[float, ...]
    shared_scenes: int

    def share(self, distance: float, location: str | None = None) -> float:
        """Share (0..1) of validation keyframes within `distance` metres of a training keyframe; NaN without any."""
        nearest = self.nearest if location is None else self.nearest[self.val_location == location]
        return float(np.mean(nearest <= distance)) if len(nearest) else float("nan")

    def as_dict(self) -> dict:
        """Counts and shares as plain JSON values; a share of no frames becomes None."""

        def row(location: str | None) -> dict:
            count = len(self.nearest) if location is None else int(np.sum(self.val_location == location))
            others = len(self.train_xy) if location is None else int(np.sum(self.train_location == location))
            shares = {f"{distance:g}": self.share(distance, location) if count else None for distance in self.distances}
            return {"val_frames": count, "train_frames": others, "share_within_m": shares}

        return {
            "distances_m": list(self.distances),
            "shared_scenes": self.shared_scenes,
            "all": row(None),
            "locations": {location: row(location) for location in self.locations()},
        }

    def locations(self) -> list[str]:
        """The maps that either split has keyframes on, sorted."""
        return sorted({*self.val_location.tolist(), *self.train_location.tolist()})

    def table(self) -> str:
        """The shares as text for a terminal."""
        record = self.as_dict()
        heads = "".join(f"{f'<= {distance:g} m':>10}" for distance in self.distances)
        lines = [f"{'location':<26}{'train':>8}{'val':>8}{heads}"]
        for name, row in [*record["locations"].items(), ("all", record["all"])]:
            shares = row["share_within_m"].values()
            cells = "".join(f"{'-' if share is None else f'{share:.1%}':>10}" for share in shares)
            lines.append(f"{name:<26}{row['train_frames']:>8}{row['val_frames']:>8}{cells}")
        return "\n".join(lines)


def measure_leakage(
    keyframes: Keyframes, train: Collection[str], val: Collection[str], distances: Sequence[float] = DISTANCES
) -> Leakage:
    """Compares the places of two splits, each a collection of scene names."""
    train_xy, train_location = keyframes.of(train)
    val_xy, val_location = keyframes.of(val)
    nearest = np.full(len(val_xy), np.inf)  # [V]
    for location in np.unique(val_location):
        here, there = val_location == location, train_location == location
        nearest[here] = _nearest(val_xy[here], train_xy[there])
    shared = len(set(train) & set(val) & set(keyframes.scene_name))
    return Leakage(nearest, val_xy, val_location, train_xy, train_location, tuple(distances), shared)


def draw_leakage(leakage: Leakage, path: str | Path, title: str) -> None:
    """Draws one map per location as a PNG: training keyframes, and validation keyframes by how near those are."""
    from matplotlib.figure import Figure

    edges = [-np.inf, *leakage.distances, np.inf]
    names = [f"val, within {distance:g} m" for distance in leakage.distances] + ["val, farther away"]
    names[1:-1] = [f"{name} only" for name in names[1:-1]]
    # From red to yellow, what leaks; blue, what does not. Red is drawn last, so that nothing hides it.
    warm = [(0.80, 0.08 + 0.72 * t, 0.10) for t in np.linspace(0, 1, len(leakage.distances))]
    colours = [*warm, (0.12, 0.40, 0.85)]
    locations = leakage.locations()
    columns = int(np.ceil(np.sqrt(len(locations))))
    rows = -(-len(locations) // columns)
    figure = Figure(figsize=(6.0 * columns, 5.4 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, location in zip(axes, locations, strict=False):
        train = leakage.train_xy[leakage.train_location == location]
        panel.scatter(*train.T, s=9, color="0.78", label="train", linewidths=0)
        here = leakage.val_location == location
        xy, nearest = leakage.val_xy[here], leakage.nearest[here]
        for k in reversed(range(len(names))):
            inside = (nearest > edges[k]) & (nearest <= edges[k + 1])
            panel.scatter(*xy[inside].T, s=9, color=[colours[k]], label=names[k], linewidths=0)
        first = leakage.distances[0]
        share = f"{leakage.share(first, location):.0%} within {first:g} m" if here.any() else "no val"
        panel.set_title(f"{location}: {share}", fontsize=11)
        panel.set_aspect("equal", adjustable="datalim")
        panel.tick_params(labelsize=8)
        panel.set_xlabel("x, metres", fontsize=8)
        panel.set_ylabel("y, metres", fontsize=8)
    for panel in axes[len(locations) :]:
        panel.set_axis_off()
    figure.suptitle(title, fontsize=12)
    marks, labels = axes[0].get_legend_handles_labels()
    order = [*range(1, len(labels)), 0]  # as they were drawn: from far to near, training last
    figure.legend(
        [marks[k] for k in order], [labels[k] for k in order],
        loc="outside lower center", ncols=len(labels), markerscale=2.5, fontsize=9,
    )  # fmt: skip
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=110)


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
            near[a, b] = near[b, a] = _nearest(places[a], places[b]).min() <= distance
    return near


def _nearest(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Per point [P, 2] the distance to the nearest other [O, 2], inf without any: [P]."""
    return cKDTree(others).query(points)[0] if len(others) else np.full(len(points), np.inf)


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
