"""Residual networks (https://arxiv.org/abs/1512.03385), with the parameter names and the numbers of torchvision's.

torchvision itself takes almost as long to load as PyTorch, for which a vehicle would wait at every start.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

# Residual blocks of each stage by depth.
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def conv3x3(channels_in: int, channels: int, stride: int) -> nn.Conv2d:
    """Builds a 3x3 convolution without bias."""
    return nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)


def shortcut(channels_in: int, channels: int, stride: int) -> nn.Sequential | None:
    """Builds the projection of the residual connection, None if the input can be added as it is."""
    if stride == 1 and channels_in == channels:
        return None
    return nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a residual connection, the block of ResNet-18 and ResNet-34."""

    expansion = 1

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels_in, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, 1)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut(channels_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Transforms [B, channels_in, H, W] to [B, width, H / stride, W / stride]."""
        skip = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.bn2(self.conv2(x))
        return F.relu(x.add_(skip), inplace=True)


class Bottleneck(nn.Module):
    """A residual bottleneck block, the block of ResNet-50 and deeper ones.

    Args:
        channels_in: of the input; the output has four times `width`.
        width: channels of the 3x3 convolution.
        stride: of the block.
        caffe: the stride is on the first convolution and not on the 3x3 convolution.
    """

    expansion = 4

    def __init__(self, channels_in: int, width: int, stride: int, caffe: bool = False) -> None:
        super().__init__()
        stride1, stride2 = (stride, 1) if caffe else (1, stride)
        self.conv1 = nn.Conv2d(channels_in, width, 1, stride1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2: nn.Module = conv3x3(width, width, stride2)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = shortcut(channels_in, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Transforms [B, channels_in, H, W] to [B, 4 * width, H / stride, W / stride]."""
        skip = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = self.bn3(self.conv3(x))
        return F.relu(x.add_(skip), inplace=True)


def resnet(depth: int, stages: int) -> tuple[nn.Sequential, list[nn.Sequential]]:
    """Builds a ResNet without its head, with torchvision's initial weights.

    Args:
        depth: a key of `BLOCKS`.
        stages: number of stages to build, from the first.

    Returns:
        The stem, of stride 4, and the stages, of strides 1, 2, 2 and 2.
    """
    block = BasicBlock if depth < 50 else Bottleneck
    stem = nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
    )
    channels, built = 64, []
    for stage, count in enumerate(BLOCKS[depth][:stages]):
        width, blocks = 64 * 2**stage, []
        for number in range(count):
            blocks.append(block(channels, width, 2 if stage > 0 and number == 0 else 1))
            channels = width * block.expansion
        built.append(nn.Sequential(*blocks))
    for part in (stem, *built):
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return stem, built
