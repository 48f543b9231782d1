"""Image encoders: one feature map per camera, from backbones of torchvision or mmdet."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Protocol
from urllib.parse import parse_qsl

import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from perception.errors import CheckpointError, ConfigError

RESNETS = {"resnet18": 64, "resnet34": 64, "resnet50": 256, "resnet101": 256, "resnet152": 256}
CONVNEXTS = {"convnext_tiny": 96, "convnext_small": 96, "convnext_base": 128, "convnext_large": 192}


class ImageEncoder(Protocol):
    """Anything that turns images into one feature map: the only thing the BEV encoder knows of a backbone."""

    channels: int
    stride: int

    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W], RGB 0..255, to features [B, channels, H / stride, W / stride]."""
        ...


class TorchvisionBackbone(nn.Module):
    """A classification network of torchvision without its head: a stem, then stages at strides 4, 8, 16 and 32.

    Args:
        name: a key of `RESNETS` or `CONVNEXTS`.
        count: how many stages to keep, from the first.

    Raises:
        ConfigError: the name is not known.
    """

    def __init__(self, name: str, count: int) -> None:
        super().__init__()
        if name in RESNETS:
            network = getattr(torchvision.models, name)(weights=None)
            self.stem = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
            stages = [network.layer1, network.layer2, network.layer3, network.layer4]
        elif name in CONVNEXTS:
            parts = list(getattr(torchvision.models, name)(weights=None).features)
            self.stem = parts[0]
            stages = [parts[1], *(nn.Sequential(*parts[i : i + 2]) for i in (2, 4, 6))]
        else:
            raise ConfigError(
                f"model.backbone is {name!r}; use one of {', '.join((*RESNETS, *CONVNEXTS))}, or mmdet:NAME?OPTIONS"
            )
        self.name = name
        self.stages = nn.ModuleList(stages[:count])
        width = (RESNETS | CONVNEXTS)[name]
        self.channels = [width * 2**stage for stage in range(count)]
        self.frozen: list[nn.Module] = []

    def freeze(self, stages: int) -> None:
        """Holds the stem and the first stages as they are, weights and statistics; -1 holds nothing.

        Raises:
            ConfigError: there are not so many stages.
        """
        if not -1 <= stages <= len(self.stages):
            raise ConfigError(f"train.frozen_stages is {stages}; use -1 to {len(self.stages)}, as many as there are")
        self.frozen = [] if stages < 0 else [self.stem, *self.stages[:stages]]
        for part in self.frozen:
            part.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> TorchvisionBackbone:
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def load_published(self, weights: dict[str, Tensor], path: Path) -> None:
        """Takes the weights of a whole network of torchvision, as its weight files name them.

        Args:
            weights: the state dict; the head, stages that are not kept, and what follows the backbone are left out.
            path: where they are from, for errors.

        Raises:
            CheckpointError: one that is needed is missing or has another shape.
        """
        wanted = self.state_dict()
        found = {}
        for name in wanted:
            part, index, rest = name.split(".", 2) if name.startswith("stages") else ("stem", *name.split(".", 2)[1:])
            if self.name in RESNETS:
                theirs = f"layer{int(index) + 1}" if part == "stages" else ("conv1", "bn1")[int(index)]
            elif part == "stem":
                theirs = f"features.0.{index}"
            elif index == "0":
                theirs = "features.1"
            else:
                inner, rest = rest.split(".", 1)
                theirs = f"features.{2 * int(index) + int(inner)}"
            theirs = f"{theirs}.{rest}"
            if theirs not in weights or weights[theirs].shape != wanted[name].shape:
                has = f"has shape {tuple(weights[theirs].shape)}" if theirs in weights else "is missing"
                raise CheckpointError(
                    f"{path}: {theirs} {has}, shape {tuple(wanted[name].shape)} is needed; give torchvision's weights "
                    f"of {self.name} as train.backbone_weights"
                )
            found[name] = weights[theirs]
        self.load_state_dict(found)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.stem(images)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class FPNEncoder(nn.Module):
    """A backbone whose deeper stages are added into the map at the wanted stride.

    The top-down pathway is that of Feature Pyramid Networks (https://arxiv.org/abs/1612.03144), cut off at one level.

    Args:
        backbone: a network of torchvision by name ("resnet50", "convnext_base"), or a backbone of mmdet with its
            options ("mmdet:ResNeXt?depth=101&groups=32"), whose four maps must have strides 4, 8, 16 and 32.
        stages: how many stages to keep (3: down to stride 16, 4: down to stride 32).
        stride: of the returned map, 4, 8, 16 or 32.
        channels: of the returned map.

    Raises:
        ConfigError: for an unknown backbone or a stride that the kept stages do not have.
    """

    def __init__(self, backbone: str, stages: int, stride: int, channels: int) -> None:
        super().__init__()
        strides = [4, 8, 16, 32][:stages]
        if stages not in (1, 2, 3, 4) or stride not in strides:
            raise ConfigError(
                f"feature_stride {stride} does not exist with backbone_stages {stages}; use one of {strides}"
            )
        if backbone.startswith("mmdet:"):
            name, _, options = backbone.removeprefix("mmdet:").partition("?")
            # Only who asks for mmdet needs it: a vehicle has none.
            from perception.engine.mmdet_backbone import MMDetBackbone

            self.backbone = MMDetBackbone(name, stages, {key: _literal(value) for key, value in parse_qsl(options)})
        else:
            self.backbone = TorchvisionBackbone(backbone, stages)
        self.first = strides.index(stride)
        self.laterals = nn.ModuleList([nn.Conv2d(width, channels, 1) for width in self.backbone.channels[self.first :]])
        self.smooth = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        )
        self.channels, self.stride = channels, stride
        # ImageNet's statistics, as published weights expect them.
        self.register_buffer("mean", torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W], RGB 0..255, uint8 or float, to features [B, C, H / stride, W / stride]."""
        maps = self.backbone((images.float() - self.mean) / self.std)
        merged = None
        for lateral, x in zip(reversed(self.laterals), reversed(maps[self.first :]), strict=True):
            x = lateral(x)
            merged = x if merged is None else x + F.interpolate(merged, size=x.shape[-2:], mode="nearest")
        return self.smooth(merged)  # [B, C, h, w]


def load_backbone(backbone: nn.Module, path: str | Path) -> None:
    """Gives the backbone of an image encoder the weights of a published image network, or of a flagship with such a
    backbone.

    Args:
        backbone: a `TorchvisionBackbone` or another with `load_published`.
        path: of a `.safetensors` file or a `.pth` of plain tensors.

    Raises:
        CheckpointError: the file is missing or holds other weights.
    """
    weights, wanted = read_backbone_weights(path), backbone.state_dict()
    own = {name: weights.get(f"image_encoder.backbone.{name}") for name in wanted}
    if all(own[name] is not None and own[name].shape == wanted[name].shape for name in wanted):
        backbone.load_state_dict(own)
    else:
        backbone.load_published(weights, Path(path))


def read_backbone_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a published image network, from a `.safetensors` file or a `.pth` of plain tensors.

    Raises:
        CheckpointError: the file is missing or is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give a weight file of the backbone as train.backbone_weights")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever foreign bytes may raise
        raise CheckpointError(
            f"{path}: not readable as weights ({type(error).__name__}); give a .safetensors file or a .pth of tensors"
        ) from None
    weights = weights.get("state_dict", weights) if isinstance(weights, dict) else {}
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{path}: holds no state dict; give a .pth whose content is one")
    return weights


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
