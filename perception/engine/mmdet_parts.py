"""Adapts backbones and necks of mmdet and mmdet3d to the library's image encoder."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perception.engine.mmcv_ops import install_stub
from perception.errors import ConfigError, not_installed
from perception.models.backbone import load_fitting

_STRIDES = (4, 8, 16, 32)
_SIDE = 64  # pixels of the image by which strides are found
_ODD_SIDE = 68  # pixels: a map at stride 8 has 8 columns if sides are rounded down, and 9 if they are rounded up


class MMDetBackbone(nn.Module):
    """Wraps a backbone of mmdet or mmdet3d with feature maps at strides 4, 8, 16 and 32.

    Args:
        library: "mmdet" or "mmdet3d".
        name: of the class, such as "ResNeXt", "Res2Net" or "SwinTransformer", or "DLANet" of mmdet3d.
        count: number of feature maps to use, from the first.
        options: arguments of the constructor. `out_indices` are the first `count` stages by default; give them for a
            backbone whose first stage has another stride than 4.

    Raises:
        ConfigError: the library is absent or has no such backbone, its constructor rejects the options, or the maps
            have other strides.
    """

    def __init__(self, library: str, name: str, count: int, options: dict) -> None:
        super().__init__()
        kind = _kind(library, "backbones", name, "model.backbone")
        where = f"model.backbone: {library}'s {name}"
        self.network = _built(kind, {"out_indices": tuple(range(count))}, options, where)
        self.network.eval()  # not chained, because eval() of some backbones returns None
        try:
            maps = self._maps(_SIDE)
        except Exception as error:  # a network for points, or one whose operators are missing
            raise ConfigError(f"{where} does not take images ({error}); use another one") from error
        try:
            odd = self._maps(_ODD_SIDE)
        except RuntimeError:  # its maps do not fit each other
            odd = []
        self.network.train()
        if [_SIDE // x.shape[-1] for x in maps] != [*_STRIDES[:count]]:
            raise ConfigError(
                f"{where} gives no maps at strides 4, 8, 16 and 32; give the out_indices of those that do"
            )
        self.channels = [x.shape[1] for x in maps]
        self.rounds_down = [x.shape[-1] for x in odd] == [_ODD_SIDE // stride for stride in _STRIDES[:count]]
        self.multiples_only = not odd

    def _maps(self, side: int) -> list[Tensor]:
        with torch.no_grad():
            return list(self.network(torch.zeros(1, 3, side, side)))

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
        by_name = {name.removeprefix("backbone."): tensor for name, tensor in weights.items()}
        load_fitting(self.network, by_name, path)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Computes the feature maps of images [B, 3, H, W]."""
        return list(self.network(images))


class MMDetNeck(nn.Module):
    """Wraps a neck of mmdet or mmdet3d, of which one map is used.

    Args:
        library: "mmdet" or "mmdet3d".
        name: of the class, such as "FPN", "PAFPN" or "BFP", or "SECONDFPN" of mmdet3d.
        in_channels: of the maps that it gets, the first of them with the wanted stride, each at half the resolution of
            the one before.
        channels: of the map that is used.
        options: further arguments of the constructor. `out_channels` and `num_outs` are given where it takes them.

    Raises:
        ConfigError: the library is absent or has no such neck, its constructor rejects the options, or no map of it has
            the size of the first one and these channels.
    """

    def __init__(self, library: str, name: str, in_channels: Sequence[int], channels: int, options: dict) -> None:
        super().__init__()
        kind, where = _kind(library, "necks", name, "model.neck"), f"model.neck: {library}'s {name}"
        known = inspect.signature(kind).parameters
        given = {"in_channels": list(in_channels), "out_channels": channels, "num_outs": len(in_channels)}
        self.network = _built(kind, {key: value for key, value in given.items() if key in known}, options, where)
        self.network.eval()
        try:
            maps = self._maps(in_channels, _SIDE)
        except Exception as error:  # options that do not fit the maps, or missing operators
            raise ConfigError(f"{where} fails on {len(in_channels)} maps ({error}); change its options") from error
        try:
            self.multiples_only = not self._maps(in_channels, _SIDE + 1)
        except RuntimeError:
            self.multiples_only = True
        self.network.train()
        fitting = [n for n, x in enumerate(maps) if x.shape[1:] == (channels, _SIDE, _SIDE)]
        if not fitting:
            found = ", ".join(f"{x.shape[1]} channels at 1/{_SIDE // x.shape[-1]}" for x in maps)
            raise ConfigError(f"{where} gives {found} of the resolution of its first map; give it {channels} at 1/1")
        self.index = fitting[0]

    def _maps(self, in_channels: Sequence[int], side: int) -> list[Tensor]:
        with torch.no_grad():
            return list(self.network([torch.zeros(1, c, *[-(-side // 2**n)] * 2) for n, c in enumerate(in_channels)]))

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Merges maps [B, C, h, w], finest first, into one of the size of the first."""
        merged: Tensor = self.network(maps)[self.index]
        return merged


def _kind(library: str, part: str, name: str, where: str) -> Any:
    """Returns a class of `mmdet.models.backbones` and the like."""
    try:
        install_stub()
        module = importlib.import_module(f"{library}.models.{part}")
    except ModuleNotFoundError as error:
        raise (not_installed(error) or error) from None
    kind = getattr(module, name, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ConfigError(f"{where}: {library} has no {part[:-1]} {name!r}; it has {', '.join(module.__all__)}")
    return kind


def _built(kind: Any, given: dict[str, Any], options: dict[str, Any], where: str) -> Any:
    try:
        return kind(**(given | options))
    except Exception as error:  # constructors raise many types
        raise ConfigError(f"{where} rejects {options} ({error}); change them") from error
