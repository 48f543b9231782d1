"""What weights were trained on: written into their file, and compared with the data that they are used for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from perception.inference.crop import fitted_rig, fitting_crop
from perception.types import CameraRig, NumpyCameraRig, Weights

if TYPE_CHECKING:
    from perception.data.nuscenes import NuScenesDataset

GENERATED = "v1.0-synthetic"  # version of the datasets of `perception simulate`
FOCAL_TOLERANCE = 1.25  # factor
HEIGHT_TOLERANCE = 0.5  # metres
INTERVAL_TOLERANCE = 2.5  # factor
COUNT_TOLERANCE = 2.0  # factor
SHARE = 2, 98  # percentiles of the values of a training that count as its range


@dataclass(frozen=True)
class Provenance:
    """The data that weights were trained on.

    Args:
        versions: of the datasets, such as "v1.0-trainval".
        frames: number of samples, each counted once.
        scenes: number of scenes, each counted once.
        cameras: names, in order.
        focal: smallest and largest focal length, in widths of the network's image.
        height: smallest and largest height of a camera above the ground, metres.
        interval_s: smallest and largest time between two frames, seconds.
    """

    versions: tuple[str, ...]
    frames: int
    scenes: int
    cameras: tuple[str, ...]
    focal: tuple[float, float]
    height: tuple[float, float]
    interval_s: tuple[float, float]

    @property
    def is_generated(self) -> bool:
        """True if all data came from `perception simulate`."""
        return bool(self.versions) and all(version == GENERATED for version in self.versions)

    def __str__(self) -> str:
        data = "generated scenes only" if self.is_generated else ", ".join(self.versions)
        return (
            f"trained on {data} ({self.scenes} scenes, {len(self.cameras)} cameras, focal lengths of "
            f"{self.focal[0]:.2f} to {self.focal[1]:.2f} image widths, heights of {self.height[0]:.1f} to "
            f"{self.height[1]:.1f} m, {self.interval_s[0]:.2g} to {self.interval_s[1]:.2g} s between frames)"
        )

    def misfit(
        self, rig: CameraRig | NumpyCameraRig, image_size: tuple[int, int], seconds_since_prev: float
    ) -> dict[str, str]:
        """Finds where a frame is unlike the training data: a sentence for each kind of difference.

        Args:
            rig: [N, ...] in pixels of the network's images.
            image_size: height and width of the network's images.
            seconds_since_prev: 0 for a first frame.
        """
        found: dict[str, str] = {}
        present = np.flatnonzero(np.asarray(rig.present))
        count, trained = len(np.asarray(rig.present)), len(self.cameras)
        end = f"; the weights were {self}: expect worse results"
        if not trained / COUNT_TOLERANCE <= count <= trained * COUNT_TOLERANCE:
            found["weights: cameras"] = f"the network gets {count} images per frame{end}"
        focal = np.asarray(rig.img_from_cam, np.float64)[:, 0, 0] / image_size[1]
        height = np.asarray(rig.ego_from_cam, np.float64)[:, 2, 3]
        for n in present:
            if not self.focal[0] / FOCAL_TOLERANCE <= focal[n] <= self.focal[1] * FOCAL_TOLERANCE:
                found["weights: focal length"] = (
                    f"camera {n} has a focal length of {focal[n]:.2f} widths of the network's image{end}"
                )
                break
        for n in present:
            if not self.height[0] - HEIGHT_TOLERANCE <= height[n] <= self.height[1] + HEIGHT_TOLERANCE:
                found["weights: height"] = f"camera {n} is at a height of {height[n]:.2f} m{end}"
                break
        if seconds_since_prev > 0:
            low, high = self.interval_s[0] / INTERVAL_TOLERANCE, self.interval_s[1] * INTERVAL_TOLERANCE
            if not low <= seconds_since_prev <= high:
                found["weights: interval"] = f"frames come {seconds_since_prev:.3g} s after each other{end}"
        return found

    def to_json(self) -> str:
        """Returns the text for the metadata of a weights file."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Provenance:
        """Reads what `to_json` wrote.

        Raises:
            ValueError, TypeError, KeyError: the text is something else.
        """
        values = json.loads(text)
        ranges = {}
        for name in ("focal", "height", "interval_s"):
            low, high = map(float, values[name])
            ranges[name] = (low, high)
        return cls(
            versions=tuple(map(str, values["versions"])),
            frames=int(values["frames"]),
            scenes=int(values["scenes"]),
            cameras=tuple(map(str, values["cameras"])),
            **ranges,
        )


def weights_of(name_or_path: str | Path, provenance: Provenance | None) -> Weights:
    """Returns what results of live use say about their weights.

    Args:
        name_or_path: of shipped weights, or a file, whose name alone is taken.
        provenance: of these weights, from `read_provenance`.
    """
    return Weights(Path(name_or_path).name, None if provenance is None else json.loads(provenance.to_json()))


def provenance_of(dataset: NuScenesDataset) -> Provenance:
    """Describes a training dataset. It reads the index only, no images."""
    index = dataset.index
    sizes = np.asarray(index.image_size)  # [S, N, 2]
    present = np.char.str_len(index.image_path) > 0  # [S, N]
    widths = np.ones(present.shape)  # of the network's images, in pixels of the given ones
    for size in np.unique(sizes[present], axis=0):
        crop = fitting_crop((int(size[0]), int(size[1])), dataset.image_size)
        widths[(sizes == size).all(-1)] = dataset.image_size[1] / crop.scale
    focal, height = index.img_from_cam[..., 0, 0] / widths, index.ego_from_cam[..., 2, 3]
    if dataset.virtual_rig is not None:  # the network sees its pinholes
        rig = dataset.virtual_rig
        fitted = fitted_rig(rig.camera_rig(), [camera.image_size for camera in rig.cameras], dataset.image_size)
        focal, height = fitted.img_from_cam[:, 0, 0] / dataset.image_size[1], fitted.ego_from_cam[:, 2, 3]
        present = fitted.present
    _, once = np.unique(index.token, return_index=True)  # roots may be given several times
    following = index.previous >= 0
    seconds = 1e-6 * (index.timestamp_us[following] - index.timestamp_us[index.previous[following]])
    return Provenance(
        versions=(dataset.version,),
        frames=len(once),
        scenes=int((~following[once]).sum()),
        cameras=tuple(dataset.cameras),
        focal=_range(focal[present]),
        height=_range(height[present]),
        interval_s=_range(seconds),
    )


def _range(values: NDArray[Any] | Sequence[float]) -> tuple[float, float]:
    """Returns the usual smallest and largest value, rounded; zeros for none."""
    low, high = np.percentile(values, SHARE) if len(values) else (0.0, 0.0)
    return round(float(low), 3), round(float(high), 3)
