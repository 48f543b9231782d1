"""The image encoders of the published networks: ResNet in both styles, deformable convolutions, feature pyramid.

Modules are named as the published checkpoints name them (`img_backbone.*` without its prefix is `backbone.*`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from perception.errors import CheckpointError, ConfigError
from perception.models.backbone import FPNEncoder

PAD_MULTIPLE = 32  # pixels; images are filled up to it below and at the right
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def padded_size(images: Tensor) -> tuple[int, int]:
    """Height and width of images [..., H, W] once they are filled up for the backbone."""
    H, W = (side + -side % PAD_MULTIPLE for side in images.shape[-2:])
    return H, W


def _padded(images: Tensor) -> Tensor:
    (H, W), (wanted_h, wanted_w) = images.shape[-2:], padded_size(images)
    return F.pad(images, (0, wanted_w - W, 0, wanted_h - H))


@dataclass(frozen=True)
class PublishedBackboneConfig:
    """What decides an image encoder's shape.

    Args:
        depth: 50 or 101.
        caffe: stride on the first convolution of a block and images in BGR with unit scale; otherwise as torchvision.
        deformable: which of the four stages use deformable convolutions.
        outputs: which stages the pyramid is made of, counted from 0.
        levels: maps of the pyramid; what goes beyond `outputs` comes from strided convolutions.
        width: channels of the stem, 64 in all published networks.
        channels: of the pyramid.
    """

    depth: int = 50
    caffe: bool = False
    deformable: tuple[bool, bool, bool, bool] = (False, False, False, False)
    outputs: tuple[int, ...] = (3,)
    levels: int = 1
    width: int = 64
    channels: int = 256

    def build(self, channels: int) -> PublishedImageEncoder:
        """The image encoder of a published network with maps of so many channels.

        Raises:
            ConfigError: this one has another number of channels.
        """
        if self.channels != channels:
            raise ConfigError(f"model.backbone.channels is {self.channels}, model.channels {channels}; make them equal")
        return PublishedImageEncoder(self)


@dataclass(frozen=True)
class FPNConfig:
    """The flagship's image encoder in a published network, for comparisons; see `perception.models.backbone`."""

    name: str = "resnet18"
    stages: int = 3
    stride: int = 8
    levels: ClassVar[int] = 1

    def build(self, channels: int) -> SingleMapEncoder:
        """The flagship's image encoder with maps of so many channels."""
        return SingleMapEncoder(self, channels)


class DeformableConv(nn.Module):
    """A 3x3 convolution that chooses where it reads and how much that counts (DCNv2, https://arxiv.org/abs/1811.11168)."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.conv_offset = nn.Conv2d(channels, 27, 3, stride, 1)
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        offset, mask = self.conv_offset(x).split([18, 9], 1)  # (dy, dx) of each of the nine places, and its weight
        return deform_conv2d(x, offset, self.weight, stride=self.stride, padding=1, mask=mask.sigmoid())


class Bottleneck(nn.Module):
    """A residual block of three convolutions."""

    def __init__(self, channels_in: int, width: int, stride: int, caffe: bool, deformable: bool) -> None:
        super().__init__()
        first, second = (stride, 1) if caffe else (1, stride)
        self.conv1 = nn.Conv2d(channels_in, width, 1, first, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = DeformableConv(width, second) if deformable else nn.Conv2d(width, width, 3, second, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride != 1 or channels_in != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)) + skip)


class PublishedResNet(nn.Module):
    """ResNet-50 or -101; every stage is returned."""

    def __init__(self, config: PublishedBackboneConfig) -> None:
        super().__init__()
        width = config.width
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for stage, count in enumerate(BLOCKS[config.depth]):
            blocks = []
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                inner = width * 2**stage
                blocks.append(Bottleneck(channels, inner, stride, config.caffe, config.deformable[stage]))
                channels = 4 * inner
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))

        for (
            module
        ) in self.modules():  # published networks keep the statistics and scales of the weights they start from
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)

    def freeze(self, stages: int) -> None:
        """Holds the stem and the first stages as they are; -1 holds nothing.

        Raises:
            ConfigError: there are not so many stages.
        """
        if not -1 <= stages <= 4:
            raise ConfigError(f"train.frozen_stages is {stages}; use -1 to 4")
        parts = [self.conv1, *(getattr(self, f"layer{stage + 1}") for stage in range(stages))] if stages >= 0 else []
        for part in parts:
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> PublishedResNet:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def load_published(self, weights: dict[str, Tensor], path: Path) -> None:
        """Takes the weights of a whole image network, named as torchvision names them; its head is left out.

        Args:
            weights: its state dict.
            path: where they are from, for errors.

        Raises:
            CheckpointError: one that is needed is missing or has another shape. The layers that tell deformable
                convolutions where to read are no part of an image network and may be missing.
        """
        wanted = self.state_dict()
        for name, tensor in wanted.items():
            told = ".conv_offset." in name
            if (name not in weights and not told) or (name in weights and weights[name].shape != tensor.shape):
                has = f"has shape {tuple(weights[name].shape)}" if name in weights else "is missing"
                raise CheckpointError(
                    f"{path}: {name} {has}, shape {tuple(tensor.shape)} is needed; give the weights of a ResNet of "
                    "this depth as train.backbone_weights"
                )
        self.load_state_dict({name: weights.get(name, tensor) for name, tensor in wanted.items()})

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images [B, 3, H, W] to maps at strides 4, 8, 16 and 32."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, 2, 1)
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps


class _Conv(nn.Module):
    """A convolution under the name that the published modules give it."""

    def __init__(self, channels_in: int, channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class PublishedFPN(nn.Module):
    """Feature pyramid (https://arxiv.org/abs/1612.03144) with further levels from its coarsest output."""

    def __init__(self, channels_in: list[int], channels: int, levels: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList([_Conv(c, channels, 1) for c in channels_in])
        extra = levels - len(channels_in)
        self.fpn_convs = nn.ModuleList(
            [_Conv(channels, channels, 3) for _ in channels_in]
            + [_Conv(channels, channels, 3, 2) for _ in range(extra)]
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        merged = [lateral(x) for lateral, x in zip(self.lateral_convs, maps, strict=True)]
        for i in range(len(merged) - 1, 0, -1):
            merged[i - 1] = merged[i - 1] + F.interpolate(merged[i], size=merged[i - 1].shape[-2:], mode="nearest")
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, merged, strict=False)]
        for conv in self.fpn_convs[len(merged) :]:
            # All further levels but the first have a ReLU before them.
            last = outputs[-1]
            outputs.append(conv(last if len(outputs) == len(merged) else F.relu(last)))
        return outputs


class PublishedImageEncoder(nn.Module):
    """Images to the levels of a pyramid, with the pixels that the published weights expect."""

    def __init__(self, config: PublishedBackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = PublishedResNet(config)
        widths = [4 * config.width * 2**stage for stage in config.outputs]
        self.neck = PublishedFPN(widths, config.channels, config.levels)
        mean = [103.530, 116.280, 123.675] if config.caffe else [123.675, 116.28, 103.53]
        std = [1.0, 1.0, 1.0] if config.caffe else [58.395, 57.12, 57.375]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [B, N, 3, H, W], RGB 0..255, to levels [B, N, C, h, w] of the padded images, finest first."""
        B, N = images.shape[:2]
        x = images.flatten(0, 1).float()
        x = ((x.flip(1) if self.config.caffe else x) - self.mean) / self.std  # Caffe's weights want BGR
        maps = self.backbone(_padded(x))
        return [x.unflatten(0, (B, N)) for x in self.neck([maps[stage] for stage in self.config.outputs])]


class SingleMapEncoder(nn.Module):
    """The flagship's image encoder behind the interface of the published ones."""

    def __init__(self, config: FPNConfig, channels: int) -> None:
        super().__init__()
        self.encoder = FPNEncoder(config.name, config.stages, config.stride, channels)

    @property
    def backbone(self) -> nn.Module:
        """What is frozen, and what published weights are loaded into."""
        return self.encoder.backbone

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [B, N, 3, H, W], RGB 0..255, to one level [B, N, C, h, w] of the padded images."""
        return [self.encoder(_padded(images.flatten(0, 1))).unflatten(0, images.shape[:2])]
