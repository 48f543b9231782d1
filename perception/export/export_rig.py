"""The one calibration that an export was made for, where a network cannot take any (`Network.for_rig`).

It stands in the contract. The runtime refuses another one, because the graph would go on with the old one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from perception.errors import DataError
from perception.reading import number
from perception.types import NUSCENES_EGO_FROM_LIDAR, NumpyCameraRig

if TYPE_CHECKING:
    from perception.rigs.rig import Rig

SHAPES = {"img_from_cam": (3, 3), "ego_from_cam": (4, 4), "ego_from_lidar": (4, 4)}
SAME = 1e-5  # of numbers that are compared, and of metres and pixels near 0


class ExportRig(NamedTuple):
    """Calibration of the images of an export."""

    img_from_cam: NDArray[np.float64]  # [N, 3, 3] pixels of the images that the export takes
    ego_from_cam: NDArray[np.float64]  # [N, 4, 4] poses on the vehicle, metres
    ego_from_lidar: NDArray[np.float64]  # [4, 4]

    @classmethod
    def of_rig(cls, rig: Rig, image_size: tuple[int, int]) -> tuple[ExportRig, tuple[tuple[int, int], ...]]:
        """Returns the calibration of the pinholes through which a network sees a rig, and the sizes of their images.

        Args:
            rig: the physical cameras, as for `Runtime`.
            image_size: height and width of the network's images.
        """
        from perception.rigs.virtual import rig_for_network  # it needs Pillow, and a vehicle may have numpy alone

        pinholes = rig_for_network(rig, image_size)
        cameras = pinholes.camera_rig()
        lidar = np.array(NUSCENES_EGO_FROM_LIDAR if rig.ego_from_lidar is None else rig.ego_from_lidar)
        return cls(cameras.img_from_cam, cameras.ego_from_cam, lidar), tuple(c.image_size for c in pinholes.cameras)

    @classmethod
    def of_contract(cls, contract: Mapping[str, Any]) -> ExportRig | None:
        """Reads the calibration of a contract; None for an export that takes any."""
        found = contract.get("calibration")
        return None if found is None else cls(*(np.array(found[name], np.float64) for name in cls._fields))

    def as_dict(self) -> dict[str, Any]:
        """Returns the entry of a contract."""
        return {name: np.asarray(value).tolist() for name, value in self._asdict().items()}

    def check(self, rig: NumpyCameraRig) -> None:
        """Compares the calibration of a step, in which cameras may be missing.

        Raises:
            DataError: a camera that is present has another calibration.
        """
        for name in ("img_from_cam", "ego_from_cam"):
            wanted, given = getattr(self, name), getattr(rig, name)
            differs = ~np.isclose(given, wanted, SAME, SAME).all((1, 2)) & rig.present
            if differs.any():
                n = int(differs.argmax())
                raise DataError(
                    f"rig.{name}[{n}] differs by up to {np.abs(given[n] - wanted[n]).max():.2g} from the calibration "
                    "that the network was exported for; export it again for this rig"
                )


def fault_of(calibration: object, cameras: int) -> str:
    """Returns the first error in the entry of a contract as text, empty for none."""
    if not isinstance(calibration, dict):
        return f"calibration is {type(calibration).__name__}, not an object"
    for name, shape in SHAPES.items():
        wanted = shape if name == "ego_from_lidar" else (cameras, *shape)
        if not _has_shape(calibration.get(name), wanted):
            return f"calibration.{name} is not {' x '.join(map(str, wanted))} finite numbers"
    return ""


def _has_shape(value: object, shape: tuple[int, ...]) -> bool:
    if not shape:
        return bool(np.isfinite(number(value)))
    return isinstance(value, list) and len(value) == shape[0] and all(_has_shape(x, shape[1:]) for x in value)
