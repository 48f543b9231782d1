"""Image encoders: one feature map per camera, and a distribution over depth for each of its pixels."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from perception.errors import ConfigError


class ImageEncoder(Protocol):
    """Anything that turns images into one feature map: the only thing the BEV encoder knows of a backbone."""

    channels: int
    stride: int

    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W], RGB 0..255, to features [B, channels, H / stride, W / stride]."""
        ...


class ResNetFPN(nn.Module):
    """A torchvision ResNet whose deeper stages are added into the map at the wanted stride.

    The top-down pathway is that of Feature Pyramid Networks (https://arxiv.org/abs/1612.03144), cut off at one level.

    Args:
        name: "resnet18", "resnet34", "resnet50" or "resnet101".
        stages: how many residual stages to keep (3: down to stride 16, 4: down to stride 32).
        stride: stride of the returned map, 4, 8 or 16.
        channels: channels of the returned map.

    Raises:
        ConfigError: for an unknown name or a stride that the kept stages do not have.
    """

    def __init__(self, name: str, stages: int, stride: int, channels: int) -> None:
        super().__init__()
        if name not in ("resnet18", "resnet34", "resnet50", "resnet101"):
            raise ConfigError(f"backbone is {name!r}; use resnet18, resnet34, resnet50 or resnet101")
        strides = [4, 8, 16, 32][:stages]
        if stages not in (1, 2, 3, 4) or stride not in strides:
            raise ConfigError(
                f"feature_stride {stride} does not exist with backbone_stages {stages}; use one of {strides}"
            )
        trunk = getattr(torchvision.models, name)(weights=None)
        self.stem = nn.Sequential(trunk.conv1, trunk.bn1, trunk.relu, trunk.maxpool)
        self.stages = nn.ModuleList([trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4][:stages])
        widths = [64, 128, 256, 512] if name in ("resnet18", "resnet34") else [256, 512, 1024, 2048]
        self.first = strides.index(stride)
        self.laterals = nn.ModuleList([nn.Conv2d(width, channels, 1) for width in widths[self.first : stages]])
        self.smooth = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        )
        self.channels, self.stride = channels, stride
        # ImageNet's statistics, as torchvision's weights expect them.
        self.register_buffer("mean", torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W], RGB 0..255, uint8 or float, to features [B, C, H / stride, W / stride]."""
        x = self.stem((images.float() - self.mean) / self.std)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        merged = None
        for lateral, x in zip(reversed(self.laterals), reversed(maps[self.first :]), strict=True):
            x = lateral(x)
            merged = x if merged is None else x + F.interpolate(merged, size=x.shape[-2:], mode="nearest")
        return self.smooth(merged)  # [B, C, h, w]
