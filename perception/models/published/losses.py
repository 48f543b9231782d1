"""What the losses of the published networks share."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_layers(layers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Adds up the losses of all decoder layers by name, as the published code does."""
    return {name: torch.stack([layer[name] for layer in layers]).sum() for name in layers[0]}
