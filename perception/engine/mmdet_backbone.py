"""Backbones of mmdet as backbones of the library's image encoder."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
from torch import Tensor, nn

from perception.engine.mmcv_ops import stand_in
from perception.errors import CheckpointError, ConfigError, not_installed


class MMDetBackbone(nn.Module):
    """A backbone of mmdet that gives maps at strides 4, 8, 16 and 32.

    Args:
        name: of its class, such as "ResNeXt", "Res2Net" or "SwinTransformer".
        count: how many of its maps to use, from the first.
        options: arguments of its constructor beside `out_indices`.

    Raises:
        ConfigError: mmdet is absent, has no such backbone, or refuses the options, or the maps have other strides.
    """

    def __init__(self, name: str, count: int, options: dict) -> None:
        super().__init__()
        try:
            stand_in()
            import mmdet.models.backbones as backbones
        except ModuleNotFoundError as error:
            raise (not_installed(error) or error) from None

        kind = getattr(backbones, name, None)
        if not inspect.isclass(kind):
            raise ConfigError(f"model.backbone: mmdet has no backbone {name!r}; it has {', '.join(backbones.__all__)}")
        try:
            self.network = kind(**options, out_indices=tuple(range(count)))
        except Exception as error:  # whatever a constructor thinks of its arguments
            raise ConfigError(f"model.backbone: mmdet's {name} refuses {options} ({error}); change them") from error
        self.network.eval()  # some return nothing here
        with torch.no_grad():
            maps = self.network(torch.zeros(1, 3, 64, 64))
        self.network.train()
        if [64 // x.shape[-1] for x in maps] != [4, 8, 16, 32][:count]:
            raise ConfigError(f"model.backbone: the maps of mmdet's {name} do not have strides 4, 8, 16 and 32")
        self.channels = [x.shape[1] for x in maps]

    def freeze(self, stages: int) -> None:
        """Backbones of mmdet freeze themselves.

        Raises:
            ConfigError: `stages` is not -1.
        """
        if stages != -1:
            raise ConfigError(
                f"train.frozen_stages is {stages}; for mmdet's backbones give frozen_stages in model.backbone"
            )

    def load_published(self, weights: dict[str, Tensor], path: Path) -> None:
        """Takes the weights of a whole detector or classifier; what is not the backbone's is left out.

        Raises:
            CheckpointError: one that is needed is missing or has another shape.
        """
        weights = {name.removeprefix("backbone."): tensor for name, tensor in weights.items()}
        wanted = self.network.state_dict()
        for name, tensor in wanted.items():
            if name not in weights or weights[name].shape != tensor.shape:
                raise CheckpointError(f"{path}: {name} is missing or has another shape; it belongs to another backbone")
        self.network.load_state_dict({name: weights[name] for name in wanted})

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(self.network(images))
