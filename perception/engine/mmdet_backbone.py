"""Adapts backbones of mmdet to the library's image encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perception.engine.mmcv_ops import install_stub
from perception.errors import CheckpointError, ConfigError, not_installed


class MMDetBackbone(nn.Module):
    """Wraps a backbone of mmdet with feature maps at strides 4, 8, 16 and 32.

    Args:
        name: of the class, such as "ResNeXt", "Res2Net" or "SwinTransformer".
        count: number of feature maps to use, from the first.
        options: arguments of the constructor, without `out_indices`.

    Raises:
        ConfigError: mmdet is absent or has no such backbone, its constructor rejects the options, or the maps have
            other strides.
    """

    def __init__(self, name: str, count: int, options: dict) -> None:
        super().__init__()
        try:
            install_stub()
            import mmdet.models.backbones as backbones
        except ModuleNotFoundError as error:
            raise (not_installed(error) or error) from None

        kind: Any = getattr(backbones, name, None)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise ConfigError(f"model.backbone: mmdet has no backbone {name!r}; it has {', '.join(backbones.__all__)}")
        try:
            self.network = kind(**options, out_indices=tuple(range(count)))
        except Exception as error:  # constructors raise many types
            raise ConfigError(f"model.backbone: mmdet's {name} rejects {options} ({error}); change them") from error
        self.network.eval()  # not chained, because eval() of some backbones returns None
        with torch.no_grad():
            maps = self.network(torch.zeros(1, 3, 64, 64))
        self.network.train()
        if [64 // x.shape[-1] for x in maps] != [4, 8, 16, 32][:count]:
            raise ConfigError(f"model.backbone: the maps of mmdet's {name} do not have strides 4, 8, 16 and 32")
        self.channels = [x.shape[1] for x in maps]

    def freeze(self, stages: int) -> None:
        """Does nothing, because backbones of mmdet have their own option `frozen_stages`.

        Raises:
            ConfigError: `stages` is not -1.
        """
        if stages != -1:
            raise ConfigError(
                f"train.frozen_stages is {stages}; for mmdet's backbones give frozen_stages in model.backbone"
            )

    def load_published(self, weights: dict[str, Tensor], path: Path) -> None:
        """Loads the backbone from the weights of a whole detector or classifier.

        Args:
            weights: by name; those of other parts are ignored.
            path: of their file, for messages.

        Raises:
            CheckpointError: a weight of the backbone is missing or has another shape.
        """
        weights = {name.removeprefix("backbone."): tensor for name, tensor in weights.items()}
        expected = self.network.state_dict()
        for name, tensor in expected.items():
            if name not in weights or weights[name].shape != tensor.shape:
                raise CheckpointError(f"{path}: {name} is missing or has another shape; it belongs to another backbone")
        self.network.load_state_dict({name: weights[name] for name in expected})

    def forward(self, images: Tensor) -> list[Tensor]:
        """Computes the feature maps of images [B, 3, H, W]."""
        return list(self.network(images))
