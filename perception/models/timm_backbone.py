"""Adapts backbones of timm to the library's image encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perception.errors import ConfigError, not_installed
from perception.models.backbone import load_fitting

_STRIDES = (4, 8, 16, 32)
_ODD_SIDE = 68  # pixels: a map at stride 8 has 8 columns if sides are rounded down, and 9 if they are rounded up


class TimmBackbone(nn.Module):
    """Wraps a network of timm with feature maps at strides 4, 8, 16 and 32, with random weights.

    Args:
        name: as in `timm.list_models()`, such as "convnextv2_nano", "regnety_008" or "mobilenetv4_conv_small".
        count: number of feature maps to use, from the first.
        options: further arguments of `timm.create_model`, such as `drop_path_rate`.

    Raises:
        ConfigError: timm is absent or has no such network, it rejects the options, or it gives no maps at these
            strides, as plain vision transformers.
    """

    def __init__(self, name: str, count: int, options: dict[str, Any]) -> None:
        super().__init__()
        try:
            import timm
        except ModuleNotFoundError as error:
            raise (not_installed(error) or error) from None
        if name not in timm.list_models():
            near = ", ".join(timm.list_models(f"*{name.partition('_')[0]}*")[:5]) or "those of timm.list_models()"
            raise ConfigError(f"model.backbone: timm has no network {name!r}; near are {near}")
        where, wanted = f"model.backbone: timm's {name}", [*_STRIDES[:count]]
        settings: dict[str, Any] = {"features_only": True, "pretrained": False, **options}
        try:
            whole: Any = timm.create_model(name, **settings)
            strides = whole.feature_info.reduction()
            network: Any = timm.create_model(name, out_indices=tuple(map(strides.index, wanted)), **settings)
            with torch.no_grad():
                maps = network.eval()(torch.zeros(1, 3, _ODD_SIDE, _ODD_SIDE))
        except Exception as error:  # it raises many types
            raise ConfigError(
                f"{where} gives no maps at strides {', '.join(map(str, wanted))} for images of any size with the "
                f"options {options} ({error}); use a convolutional network"
            ) from error
        self.channels: list[int] = network.feature_info.channels()
        if [x.shape[1] for x in maps] != self.channels:
            raise ConfigError(f"{where} gives maps with the channels last; use another")
        self.rounds_down = [x.shape[-1] for x in maps] == [_ODD_SIDE // stride for stride in wanted]
        self.multiples_only = False  # others do not take the odd side
        self.network = network.train()

    def freeze(self, stages: int) -> None:
        """Freezes nothing.

        Raises:
            ConfigError: `stages` is not -1, because timm's networks have no stages in common.
        """
        if stages != -1:
            raise ConfigError(
                f"train.frozen_stages is {stages}; give -1 for backbones of timm, or lower backbone_lr_mult"
            )

    def load_published(self, weights: dict[str, Tensor], path: Path) -> None:
        """Loads the weights of timm's classifier of the same name.

        Args:
            weights: by timm's names; those of the head are ignored.
            path: of their file, for messages.

        Raises:
            CheckpointError: a weight of the backbone is missing or has another shape.
        """
        # Networks that timm wraps stage by stage have names such as `stages_0` for `stages.0`.
        by_flat_name = {name.replace(".", "_"): tensor for name, tensor in weights.items()}
        names = {name: name.replace(".", "_") for name in self.network.state_dict()}
        found = {name: by_flat_name[flat] for name, flat in names.items() if flat in by_flat_name}
        load_fitting(self.network, found, path)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Computes the feature maps of images [B, 3, H, W]."""
        return list(self.network(images))
