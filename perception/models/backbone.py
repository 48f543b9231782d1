"""Image encoders: one feature map per camera, from a backbone and a feature pyramid."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast
from urllib.parse import parse_qsl

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.errors import CheckpointError, ConfigError
from perception.models.foreign import read_state_dict
from perception.models.resnet import resnet

if TYPE_CHECKING:
    from perception.engine.mmdet_parts import MMDetNeck

RESNETS = {"resnet18": 64, "resnet34": 64, "resnet50": 256, "resnet101": 256, "resnet152": 256}
CONVNEXTS = {"convnext_tiny": 96, "convnext_small": 96, "convnext_base": 128, "convnext_large": 192}
MM_LIBRARIES = ("mmdet", "mmdet3d")  # see `perception.engine.mmdet_parts`
# RGB 0..255 of ImageNet; the published weights of backbones expect images normalised with it.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


class Backbone(Protocol):
    """A convolutional network without its head, an `nn.Module`: images to one feature map per stage."""

    channels: list[int]  # of the stages
    rounds_down: (
        bool  # sides of the maps of images whose sides are no multiples of the stride; else they are rounded up
    )

    multiples_only: bool  # images need sides that are multiples of the largest stride

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Extracts feature maps [B, C, h, w] at strides 4, 8, 16, 32 from normalised images [B, 3, H, W]."""
        ...

    def freeze(self, stages: int) -> None:
        """Freezes the stem and the first stages; -1 freezes nothing."""
        ...

    def load_published(self, weights: dict[str, Tensor], path: Path) -> None:
        """Loads a published state dict of this architecture; `path` is named in errors."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Returns parameters and buffers by name."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> Any:
        """Loads parameters and buffers by name."""
        ...


class TorchvisionBackbone(nn.Module):
    """A ResNet, or a ConvNeXt of torchvision, without its head: a stem, then stages at strides 4, 8, 16 and 32.

    Args:
        name: a key of `RESNETS` or `CONVNEXTS`.
        count: number of stages to keep, from the first.

    Raises:
        ConfigError: the name is unknown.
    """

    def __init__(self, name: str, count: int) -> None:
        super().__init__()
        if name in RESNETS:
            self.stem, stages = resnet(int(name.removeprefix("resnet")), count)
        elif name in CONVNEXTS:
            import torchvision  # it takes almost as long to load as PyTorch

            parts = list(getattr(torchvision.models, name)(weights=None).features)
            self.stem = parts[0]
            stages = [parts[1], *(nn.Sequential(*parts[i : i + 2]) for i in (2, 4, 6))]
        else:
            raise ConfigError(
                f"model.backbone is {name!r}; use one of {', '.join((*RESNETS, *CONVNEXTS))}, or mmdet:NAME?OPTIONS, "
                "mmdet3d:NAME?OPTIONS, timm:NAME?OPTIONS"
            )
        self.name = name
        self.rounds_down = name in CONVNEXTS  # its strided convolutions have no padding
        self.multiples_only = False
        self.stages = nn.ModuleList(stages[:count])
        width = (RESNETS | CONVNEXTS)[name]
        self.channels = [width * 2**stage for stage in range(count)]
        self.frozen: list[nn.Module] = []

    def freeze(self, stages: int) -> None:
        """Freezes weights and batch norm statistics of the stem and of the first stages; -1 freezes nothing.

        Raises:
            ConfigError: the backbone has fewer stages.
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
        """Loads the weights of a torchvision classifier under torchvision's names.

        Args:
            weights: the state dict. The head, dropped stages and all other keys are ignored.
            path: the file of the weights, named in errors.

        Raises:
            CheckpointError: a weight is missing or has another shape.
        """
        found = {}
        for name, tensor in self.state_dict().items():
            part, index, rest = name.split(".", 2) if name.startswith("stages") else ("stem", *name.split(".", 2)[1:])
            if self.name in RESNETS:
                published = f"layer{int(index) + 1}" if part == "stages" else ("conv1", "bn1")[int(index)]
            elif part == "stem":
                published = f"features.0.{index}"
            elif index == "0":
                published = "features.1"
            else:
                inner, rest = rest.split(".", 1)
                published = f"features.{2 * int(index) + int(inner)}"
            fix = f"give torchvision's weights of {self.name} as train.backbone_weights"
            found[name] = weight_of_shape(weights, f"{published}.{rest}", tensor.shape, path, fix)
        self.load_state_dict(found)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Extracts feature maps [B, C, h, w] at strides 4, 8, 16, 32 from normalised images [B, 3, H, W]."""
        x = self.stem(images)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class FPNEncoder(nn.Module):
    """A backbone and the top-down pathway of an FPN (https://arxiv.org/abs/1612.03144) down to one level.

    Args:
        backbone: name of a torchvision network ("resnet50", "convnext_base"), or a backbone of mmdet, mmdet3d or timm
            with its options ("mmdet:ResNeXt?depth=101&groups=32", "timm:regnety_008"). Its feature maps must have
            strides 4, 8, 16 and 32.
        stages: number of stages to keep (3: down to stride 16, 4: down to stride 32).
        stride: stride of the returned feature map, 4, 8, 16 or 32.
        channels: channels of the returned feature map.
        neck: a neck of mmdet or mmdet3d with its options instead of the FPN ("mmdet:PAFPN?num_outs=3"); it gets the
            maps from this stride on.

    Raises:
        ConfigError: the backbone or the neck is unknown, or no kept stage has this stride.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: str, stages: int, stride: int, channels: int, neck: str = "") -> None:
        super().__init__()
        strides = [4, 8, 16, 32][:stages]
        if stages not in (1, 2, 3, 4) or stride not in strides:
            raise ConfigError(
                f"feature_stride {stride} does not exist with backbone_stages {stages}; use one of {strides}"
            )
        self.backbone = _backbone(backbone, stages)
        self.first = strides.index(stride)
        widths = self.backbone.channels[self.first :]
        if neck:
            library, name, options = named_part(neck)
            if library not in MM_LIBRARIES:
                raise ConfigError(f"model.neck is {neck!r}; write mmdet:NAME?OPTIONS or mmdet3d:NAME?OPTIONS")
            from perception.engine.mmdet_parts import MMDetNeck

            self.neck: MMDetNeck | None = MMDetNeck(library, name, widths, channels, options)
        else:
            self.neck = None
            self.laterals = nn.ModuleList([nn.Conv2d(width, channels, 1) for width in widths])
            self.smooth = nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
            )
        self.channels, self.stride = channels, stride
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def feature_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Returns height and width of the feature map of images of this height and width.

        Raises:
            ConfigError: the backbone or the neck takes other sizes only.
        """
        H, W = image_size
        needed = 4 * 2 ** (len(self.backbone.channels) - 1)
        if self.backbone.multiples_only or (self.neck is not None and self.neck.multiples_only):
            if H % needed or W % needed:
                raise ConfigError(
                    f"model.image_size is {H} x {W}; this backbone and neck take sides that are multiples of {needed}"
                )
        if self.backbone.rounds_down:
            return H // self.stride, W // self.stride
        return -(-H // self.stride), -(-W // self.stride)

    def forward(self, images: Tensor) -> Tensor:
        """Encodes images [B, 3, H, W] (RGB 0..255, uint8 or float) to features [B, C, H / stride, W / stride]."""
        maps = self.backbone((images.float() - self.mean) / self.std)[self.first :]
        if self.neck is not None:
            of_neck: Tensor = self.neck(maps)
            return of_neck
        laterals = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        merged = laterals[-1]
        for x in reversed(laterals[:-1]):
            merged = x + F.interpolate(merged, size=x.shape[-2:], mode="nearest")
        return self.smooth(merged)  # [B, C, h, w]


def named_part(text: str) -> tuple[str, str, dict[str, Any]]:
    """Splits a name such as "mmdet:ResNeXt?depth=101&groups=32" into library, name and options."""
    library, _, rest = text.partition(":")
    name, _, options = rest.partition("?")
    return library, name, {key: _literal(value) for key, value in parse_qsl(options)}


def _backbone(text: str, stages: int) -> Backbone:
    """Builds a backbone; those of other libraries are imported here, because a vehicle has none of them."""
    library, name, options = named_part(text)
    if library in MM_LIBRARIES and name:
        from perception.engine.mmdet_parts import MMDetBackbone

        return MMDetBackbone(library, name, stages, options)
    if library == "timm" and name:
        from perception.models.timm_backbone import TimmBackbone

        return TimmBackbone(name, stages, options)
    return TorchvisionBackbone(text, stages)


def weight_of_shape(weights: Mapping[str, Tensor], name: str, shape: torch.Size, path: Path, fix: str) -> Tensor:
    """Returns a weight of a state dict.

    Args:
        weights: the state dict.
        name: key of the weight.
        shape: the shape that the network needs.
        path: the file of the weights, named in errors.
        fix: what to give instead, for errors.

    Raises:
        CheckpointError: the weight is missing or has another shape.
    """
    if name not in weights or weights[name].shape != shape:
        found = f"has shape {tuple(weights[name].shape)}" if name in weights else "is missing"
        raise CheckpointError(f"{path}: {name} {found}, shape {tuple(shape)} is needed; {fix}")
    return weights[name]


def load_fitting(network: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Loads those of the weights that a backbone of another library needs.

    Args:
        network: of the other library.
        weights: by the names in `network`; others are ignored.
        path: of their file, for messages.

    Raises:
        CheckpointError: a weight is missing or has another shape.
    """
    expected = network.state_dict()
    for name, tensor in expected.items():
        if name not in weights or weights[name].shape != tensor.shape:
            raise CheckpointError(f"{path}: {name} is missing or has another shape; it belongs to another backbone")
    network.load_state_dict({name: weights[name] for name in expected})


def load_backbone(backbone: nn.Module, path: str | Path) -> None:
    """Loads published weights of an image network into a backbone, or those of a checkpoint with the same backbone.

    Args:
        backbone: a `Backbone`.
        path: a `.safetensors` file, or a `.pth` of plain tensors.

    Raises:
        CheckpointError: the file is missing or holds other weights.
    """
    weights, needed = read_backbone_weights(path), backbone.state_dict()
    prefix = "image_encoder.backbone."
    own = {name: weights[prefix + name] for name in needed if prefix + name in weights}
    if own.keys() == needed.keys() and all(own[name].shape == needed[name].shape for name in needed):
        backbone.load_state_dict(own)
    else:
        cast(Backbone, backbone).load_published(weights, Path(path))


def read_backbone_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads the state dict of a published image network.

    Args:
        path: a `.safetensors` file, or a `.pth` of plain tensors.

    Raises:
        CheckpointError: the file is missing or unreadable.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file; give a weights file of the backbone as train.backbone_weights")
    return read_state_dict(path)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
