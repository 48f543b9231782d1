"""Runs a network, and computes what depends on the calibration alone only when the calibration has changed.

Most vehicles have the same calibration in every frame. A network that can use that has a pure function
`rig_geometry(rig, image_size)`, whose result its `forward` takes as a third argument. Other networks, exports and
training compute everything in every frame.
"""

from __future__ import annotations

from typing import Any

import torch

from perception.models import Network
from perception.types import Frame


class FixedRig:
    """A network for consecutive frames. It is called as the network itself, and returns the same numbers.

    The geometry of the last calibration is kept together with all bits of that calibration, so that it is never used
    for another one. It does not depend on weights.

    Args:
        network: any network, also a compiled one.
    """

    def __init__(self, network: Network) -> None:
        self._network: Any = network
        self._compute = getattr(network, "rig_geometry", None)
        self._key: tuple[Any, ...] = ()
        self._geometry: Any = None

    def __call__(self, frame: Frame, state: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        """Processes one frame, as `Network.forward` does."""
        if self._compute is None:
            result: tuple[Any, tuple[Any, ...]] = self._network(frame, state)
            return result
        size = (frame.images.shape[-2], frame.images.shape[-1])
        key = (size, *map(_content, frame.rig))
        if key != self._key:
            self._key, self._geometry = key, self._compute(frame.rig, size)
        result = self._network(frame, state, self._geometry)
        return result


def _content(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Returns shape, type, device and bytes of a tensor."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return tensor.shape, tensor.dtype, tensor.device, flat.numpy().tobytes()
