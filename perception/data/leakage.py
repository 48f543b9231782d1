"""Measures geographic leakage: how near the keyframes of validation lie to those of training.

Roads repeat: two scenes on the same street show the same lanes, and a network that saw one of them in training can
reproduce its map in the other. Distances are between keyframes, in the xy plane of the map that both lie on.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.spatial import cKDTree

from perception.errors import DataError
from perception.files import replacing
from perception.inference.checks import FARTHEST_POSE

if TYPE_CHECKING:
    from nuscenes import NuScenes

DISTANCES = (5.0, 20.0, 60.0)  # metres; leakage is reported for each


class Keyframes(NamedTuple):
    """Positions of a dataset's F keyframes in S scenes."""

    xy: np.ndarray  # [F, 2] float64 metres, global: the ego pose of LIDAR_TOP
    scene: np.ndarray  # [F] int64 index into scene_name
    scene_name: tuple[str, ...]  # [S]
    location: tuple[str, ...]  # [S] name of each scene's map

    def of(self, names: Collection[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the keyframes of the named scenes: xy [f, 2], and location [f] as text."""
        wanted = set(names)
        rows = np.array([name in wanted for name in self.scene_name])[self.scene]
        return self.xy[rows], np.array(self.location)[self.scene[rows]]


def read_keyframes(nusc: NuScenes) -> Keyframes:
    """Reads the positions of all keyframes from the devkit's tables.

    Raises:
        DataError: there is no scene, a scene has no sample, a sample has no scene or no LIDAR_TOP keyframe with a
            finite position.
    """
    if not nusc.scene:
        raise DataError(f"{nusc.table_root}/scene.json has no scene; give the version of a dataset with scenes")
    number = {scene["token"]: k for k, scene in enumerate(nusc.scene)}
    xy, of_scene = [], []
    for sample in nusc.sample:
        try:
            lidar = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
            position = [float(value) for value in nusc.get("ego_pose", lidar["ego_pose_token"])["translation"][:2]]
        except (KeyError, TypeError, ValueError):
            position = []
        if len(position) != 2 or not np.abs(position).max() <= FARTHEST_POSE:
            raise DataError(
                f"{nusc.table_root}: sample {sample['token']} has no LIDAR_TOP keyframe with an ego_pose of finite "
                f"translation, at most {FARTHEST_POSE:.0e} m; unpack the metadata again"
            )
        if sample["scene_token"] not in number:
            raise DataError(
                f"{nusc.table_root}/sample.json: sample {sample['token']} has a scene_token that scene.json lacks; "
                "unpack the metadata again"
            )
        xy.append(position)
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
    """Distances of the V validation keyframes of a pair of splits to the T training keyframes.

    Args:
        nearest: [V] metres to the nearest training keyframe on the same map, inf if the map has none.
        val_xy, val_location: [V, 2] and [V] of the validation keyframes.
        train_xy, train_location: [T, 2] and [T] of the training keyframes.
        distances: metres for which shares are reported.
        shared_scenes: number of scenes that are in both splits.
    """

    nearest: np.ndarray
    val_xy: np.ndarray
    val_location: np.ndarray
    train_xy: np.ndarray
    train_location: np.ndarray
    distances: tuple[float, ...]
    shared_scenes: int

    def share(self, distance: float, location: str | None = None) -> float:
        """Returns the share (0..1) of validation keyframes within `distance` metres of a training keyframe.

        The share is NaN if there is no validation keyframe (at the location, where one is given).
        """
        nearest = self.nearest if location is None else self.nearest[self.val_location == location]
        return float(np.mean(nearest <= distance)) if len(nearest) else float("nan")

    def as_dict(self) -> dict:
        """Returns counts and shares as plain JSON values; a share of no frames becomes None."""

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
        """Lists the maps on which either split has keyframes, sorted."""
        return sorted({*self.val_location.tolist(), *self.train_location.tolist()})

    def table(self) -> str:
        """Formats the shares as text for a terminal."""
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
    """Measures how near the keyframes of `val` lie to those of `train`, each a collection of scene names."""
    train_xy, train_location = keyframes.of(train)
    val_xy, val_location = keyframes.of(val)
    nearest = np.full(len(val_xy), np.inf)  # [V]
    for location in np.unique(val_location):
        here, there = val_location == location, train_location == location
        nearest[here] = nearest_distances(val_xy[here], train_xy[there])
    shared = len(set(train) & set(val) & set(keyframes.scene_name))
    return Leakage(nearest, val_xy, val_location, train_xy, train_location, tuple(distances), shared)


def draw_leakage(leakage: Leakage, path: str | Path, title: str) -> None:
    """Draws one map per location as a PNG: training keyframes, and validation keyframes coloured by their distance."""
    from matplotlib.figure import Figure

    edges = [-np.inf, *leakage.distances, np.inf]
    names = [f"val, within {distance:g} m" for distance in leakage.distances] + ["val, farther away"]
    names[1:-1] = [f"{name} only" for name in names[1:-1]]
    # Leaking keyframes are red to yellow, the others blue. Red is drawn last, so that nothing hides it.
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
    order = [*range(1, len(labels)), 0]  # validation from far to near, as drawn; training last
    figure.legend(
        [marks[k] for k in order], [labels[k] for k in order],
        loc="outside lower center", ncols=len(labels), markerscale=2.5, fontsize=9,
    )  # fmt: skip
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def nearest_distances(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns the distance [P] from each point [P, 2] to the nearest of others [O, 2], inf if there is none."""
    return cKDTree(others).query(points)[0] if len(others) else np.full(len(points), np.inf)
