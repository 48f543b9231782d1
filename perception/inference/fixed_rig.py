"""Computes what depends on the calibration alone only when the calibration has changed.

Most vehicles have the same calibration in every frame. A network that can use that has a pure function
`rig_geometry(rig, image_size)`, whose result its `forward` takes as a third argument:

    fixed_rig = FixedRig(network)
    for frame in frames:
        prediction, state = network(frame, state, *fixed_rig(frame))

Other networks, exports and training compute everything in every frame.
"""

from __future__ import annotations

from typing import Any

import torch

from perception.types import Frame


class FixedRig:
    """The geometry of the last calibration, kept together with all bits of that calibration, so that it is never stale.

    Args:
        network: any network, also a prepared one. Its weights do not influence the geometry.
    """

    def __init__(self, network: Any) -> None:
        self._compute = getattr(network, "rig_geometry", None)
        self._key: tuple[Any, ...] = ()
        self._geometry: Any = None

    def __call__(self, frame: Frame) -> tuple[Any, ...]:
        """Returns the geometry for a frame as further arguments of the network, none if the network takes none."""
        if self._compute is None:
            return ()
        size = (frame.images.shape[-2], frame.images.shape[-1])
        key = (size, *map(_content, frame.rig))
        if key != self._key:
            self._key, self._geometry = key, self._compute(frame.rig, size)
        return (self._geometry,)


def _content(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Returns shape, type, device and bytes of a tensor."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return tensor.shape, tensor.dtype, tensor.device, flat.numpy().tobytes()
