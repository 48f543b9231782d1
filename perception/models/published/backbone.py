"""Image encoders of the published networks: ResNet in PyTorch and CAFFE style, DCNv2, FPN.

Modules are named as in the published checkpoints: `img_backbone.*` is `backbone.*` here, `img_neck.*` is `neck.*`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.errors import ConfigError
from perception.models.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone, FPNEncoder, weight_of_shape
from perception.models.resnet import BLOCKS, Bottleneck

PAD_MULTIPLE = 32  # pixels; images are padded below and at the right to a multiple of it


def padded_size(images: Tensor) -> tuple[int, int]:
    """Returns height and width of images [..., H, W] after padding to `PAD_MULTIPLE`."""
    H, W = (side + -side % PAD_MULTIPLE for side in images.shape[-2:])
    return H, W


def _padded(images: Tensor) -> Tensor:
    (H, W), (padded_h, padded_w) = images.shape[-2:], padded_size(images)
    return F.pad(images, (0, padded_w - W, 0, padded_h - H))


@dataclass(frozen=True)
class PublishedBackboneConfig:
    """Configures the ResNet and FPN of a published network.

    Args:
        depth: 50 or 101.
        caffe: CAFFE-style ResNet: the stride is on the first convolution of a bottleneck, and images are BGR with unit
            standard deviation. False is the PyTorch style of torchvision.
        deformable: whether each of the four stages uses DCNv2 convolutions.
        outputs: indices of the stages that the FPN uses, from 0.
        levels: number of FPN levels; levels beyond `outputs` come from strided convolutions.
        width: channels of the stem, 64 in all published networks.
        channels: channels of the FPN.
        trains_norm: batch norm of the ResNet is trained; else it always uses its running statistics.
    """

    depth: int = 50
    caffe: bool = False
    deformable: tuple[bool, bool, bool, bool] = (False, False, False, False)
    outputs: tuple[int, ...] = (3,)
    levels: int = 1
    width: int = 64
    channels: int = 256
    trains_norm: bool = False

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per cell of each level."""
        of_outputs = [4 * 2**stage for stage in self.outputs]
        extra = [of_outputs[-1] * 2**k for k in range(1, self.levels - len(of_outputs) + 1)]
        return (*of_outputs, *extra)

    def build(self, channels: int) -> PublishedImageEncoder:
        """Builds the image encoder of a network with this number of channels.

        Raises:
            ConfigError: `self.channels` is another number.
        """
        if self.channels != channels:
            raise ConfigError(f"model.backbone.channels is {self.channels}, model.channels {channels}; make them equal")
        return PublishedImageEncoder(self)


@dataclass(frozen=True)
class FPNConfig:
    """Configures the flagship's image encoder for a published network, so that both are compared on the same one."""

    name: str = "resnet18"
    stages: int = 3
    stride: int = 8
    levels: ClassVar[int] = 1  # feature maps that the network samples

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per cell of the one level."""
        return (self.stride,)

    def build(self, channels: int) -> SingleLevelEncoder:
        """Builds the image encoder of a network with this number of channels."""
        return SingleLevelEncoder(self, channels)


class DeformableConv(nn.Module):
    """A modulated deformable 3x3 convolution (DCNv2, https://arxiv.org/abs/1811.11168)."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.conv_offset = nn.Conv2d(channels, 27, 3, stride, 1)
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Convolves [B, C, H, W] to [B, C, H / stride, W / stride]."""
        from torchvision.ops import deform_conv2d  # it is slow to load

        # In float32 at least: torchvision has no half precision on CPUs, where its autocast does not change this.
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, offsets, weight = (tensor.to(dtype) for tensor in (x, self.conv_offset(x), self.weight))
        offset, mask = offsets.split([18, 9], 1)  # (dy, dx) and modulation of the nine sampling locations
        return deform_conv2d(x, offset, weight, stride=self.stride, padding=1, mask=mask.sigmoid())


class PublishedResNet(nn.Module):
    """ResNet-50 or ResNet-101 without its head."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, config: PublishedBackboneConfig) -> None:
        super().__init__()
        width = config.width
        self.trains_norm = config.trains_norm
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        self.channels = []  # of the stages
        for stage, count in enumerate(BLOCKS[config.depth]):
            blocks = []
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                inner = width * 2**stage
                bottleneck = Bottleneck(channels, inner, stride, config.caffe)
                if config.deformable[stage]:
                    bottleneck.conv2 = DeformableConv(inner, 1 if config.caffe else stride)
                blocks.append(bottleneck)
                channels = 4 * inner
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            self.channels.append(channels)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(config.trains_norm)

    def freeze(self, stages: int) -> None:
        """Freezes the weights of the stem and of the first stages; -1 freezes nothing.

        Raises:
            ConfigError: the backbone has fewer stages.
        """
        if not -1 <= stages <= 4:
            raise ConfigError(f"train.frozen_stages is {stages}; use -1 to 4")
        parts = [self.conv1, *(getattr(self, f"layer{stage + 1}") for stage in range(stages))] if stages >= 0 else []
        for part in parts:
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> PublishedResNet:
        """Sets the mode of all modules but frozen batch norm, which always uses its running statistics."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and not self.trains_norm:
                module.eval()
        return self

    def load_published(self, weights: dict[str, Tensor], path: Path) -> None:
        """Loads the weights of an image classifier under torchvision's names.

        Args:
            weights: the state dict. Its head and all other keys are ignored. A classifier has no offset layers of
                deformable convolutions (`conv_offset`); without them, the present ones are kept.
            path: the file of the weights, named in errors.

        Raises:
            CheckpointError: a weight is missing or has another shape.
        """
        fix = "give the weights of a ResNet of this depth as train.backbone_weights"
        needed = self.state_dict()
        offsets = {name: tensor for name, tensor in needed.items() if ".conv_offset." in name}
        weights = offsets | weights
        self.load_state_dict(
            {name: weight_of_shape(weights, name, tensor.shape, path, fix) for name, tensor in needed.items()}
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Extracts feature maps [B, C, h, w] at strides 4, 8, 16, 32 from normalised images [B, 3, H, W]."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, 2, 1)
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps


class _Conv(nn.Module):
    """A convolution with the parameter names of the published `ConvModule`."""

    def __init__(self, channels_in: int, channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class PublishedFPN(nn.Module):
    """FPN (https://arxiv.org/abs/1612.03144) with extra levels from strided convolutions on its coarsest output."""

    def __init__(self, channels_in: list[int], channels: int, levels: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList([_Conv(c, channels, 1) for c in channels_in])
        extra = levels - len(channels_in)
        self.fpn_convs = nn.ModuleList(
            [_Conv(channels, channels, 3) for _ in channels_in]
            + [_Conv(channels, channels, 3, 2) for _ in range(extra)]
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Merges feature maps [B, C_i, h, w], finest first, to levels [B, C, h, w]."""
        merged = [lateral(x) for lateral, x in zip(self.lateral_convs, maps, strict=True)]
        for i in range(len(merged) - 1, 0, -1):
            merged[i - 1] = merged[i - 1] + F.interpolate(merged[i], size=merged[i - 1].shape[-2:], mode="nearest")
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, merged, strict=False)]
        for conv in self.fpn_convs[len(merged) :]:
            # As published, a ReLU precedes every extra level but the first.
            last = outputs[-1]
            outputs.append(conv(last if len(outputs) == len(merged) else F.relu(last)))
        return outputs


class PublishedImageEncoder(nn.Module):
    """Backbone and FPN of the published networks, with their normalisation and padding of images."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: PublishedBackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = PublishedResNet(config)
        widths = [self.backbone.channels[stage] for stage in config.outputs]
        self.neck = PublishedFPN(widths, config.channels, config.levels)
        mean = IMAGENET_MEAN[::-1] if config.caffe else IMAGENET_MEAN
        std = (1.0, 1.0, 1.0) if config.caffe else IMAGENET_STD
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Encodes images [B, N, 3, H, W] (RGB 0..255) to levels [B, N, C, h, w] of the padded images, finest first."""
        B, N = images.shape[:2]
        x = images.flatten(0, 1).float()
        x = ((x.flip(1) if self.config.caffe else x) - self.mean) / self.std  # CAFFE-style weights need BGR
        maps = self.backbone(_padded(x))
        return [x.unflatten(0, (B, N)) for x in self.neck([maps[stage] for stage in self.config.outputs])]


class SingleLevelEncoder(nn.Module):
    """The flagship's image encoder with the interface of `PublishedImageEncoder`."""

    def __init__(self, config: FPNConfig, channels: int) -> None:
        super().__init__()
        self.encoder = FPNEncoder(config.name, config.stages, config.stride, channels)

    @property
    def backbone(self) -> Backbone:
        """The backbone, for freezing and for loading published weights."""
        return self.encoder.backbone

    def forward(self, images: Tensor) -> list[Tensor]:
        """Encodes images [B, N, 3, H, W] (RGB 0..255) to one level [B, N, C, h, w] of the padded images."""
        return [self.encoder(_padded(images.flatten(0, 1))).unflatten(0, images.shape[:2])]
