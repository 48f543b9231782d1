"""The flagship: one recurrent BEV transformer for boxes and lines.

    model = BEVTransformer(BEVTransformerConfig.nano())
    state = model.initial_state(batch_size=1)
    for frame in frames:
        prediction, state = model(frame, state)
        scene = model.decode(prediction)

The same `forward` is unrolled in training, called in live use and flattened for export.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from perception.errors import ConfigError
from perception.grid import BEVGrid
from perception.models.backbone import FPNEncoder
from perception.models.bev_encoder import BEVNeck, CameraAwareHead, SpatialCrossAttention, TemporalFusion
from perception.models.decoder import PRIOR_LOGIT, BoxDecoder, LineDecoder, decode, encode_position
from perception.types import BOX_CLASSES, LINE_CLASSES, Frame, FrameObjects, ImagePrediction, Prediction, State


@dataclass(frozen=True)
class BEVTransformerConfig:
    """Everything that decides the shape of the network. Lengths in metres, in the ego frame."""

    image_size: tuple[int, int] = (160, 288)  # height and width of the input
    backbone: str = "resnet18"
    backbone_stages: int = 3
    feature_stride: int = 8
    channels: int = 64
    x_range: tuple[float, float] = (-51.2, 51.2)
    y_range: tuple[float, float] = (-51.2, 51.2)
    grid: tuple[int, int] = (80, 80)  # BEV cells along x and y
    heights: tuple[float, ...] = (0.0, 0.6, 1.2, 2.4)  # of the reference points of a pillar, above ground
    cameras_per_cell: int = 2
    camera_samples: int = 1  # places read per height and camera
    depth_bins: int = 32
    map_x_range: tuple[float, float] = (-30.0, 30.0)
    map_y_range: tuple[float, float] = (-15.0, 15.0)
    heads: int = 4
    decoder_layers: int = 3
    box_queries: int = 100
    line_queries: int = 40
    line_points: int = 20

    @classmethod
    def nano(cls) -> BEVTransformerConfig:
        """Trains on two CPU cores; ResNet-18 without its last stage, 160x288 images."""
        return cls(heights=(0.0, 0.8, 2.0), cameras_per_cell=1, depth_bins=64)

    @classmethod
    def tiny(cls) -> BEVTransformerConfig:
        """ResNet-18, 256x448 images, a finer grid."""
        return cls(
            image_size=(256, 448), backbone_stages=4, channels=128, grid=(128, 128), heads=8, camera_samples=4,
            decoder_layers=4, box_queries=200, line_queries=50,
        )  # fmt: skip

    @classmethod
    def base(cls) -> BEVTransformerConfig:
        """ResNet-50, 256x704 images: boxes on 102.4 x 102.4 m, lines on 60 x 30 m."""
        return cls(
            image_size=(256, 704), backbone="resnet50", backbone_stages=4, feature_stride=16, channels=256,
            grid=(128, 128), heads=8, camera_samples=4, depth_bins=64, decoder_layers=6, box_queries=300,
            line_queries=50,
        )  # fmt: skip

    @classmethod
    def preset(cls, name: str, **changes) -> BEVTransformerConfig:
        """A preset by name with some fields changed.

        Raises:
            ConfigError: for an unknown preset or field.
        """
        presets = {"nano": cls.nano, "tiny": cls.tiny, "base": cls.base}
        if name not in presets:
            raise ConfigError(f"model preset is {name!r}; use one of {', '.join(presets)}")
        known = {field.name for field in fields(cls)}
        for key in changes:
            if key not in known:
                raise ConfigError(f"model.{key} does not exist; BEVTransformerConfig has {', '.join(sorted(known))}")
        return replace(presets[name](), **{k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()})


class BEVTransformer(nn.Module):
    """Calibrated images in, raw boxes and lines out, with a memory that is passed in and out."""

    def __init__(self, config: BEVTransformerConfig) -> None:
        super().__init__()
        self.config = config
        C, classes, line_classes = config.channels, len(BOX_CLASSES), len(LINE_CLASSES)
        self.grid = BEVGrid(config.x_range, config.y_range, config.grid)
        self.image_encoder = FPNEncoder(config.backbone, config.backbone_stages, config.feature_stride, C)
        # What each pixel shows, how far away it is, where it is heading, how open it is to all distances.
        self.image_head = CameraAwareHead(C, classes + config.depth_bins + 2 + 1)
        nn.init.constant_(self.image_head.head.bias[:classes], PRIOR_LOGIT)
        seen = C + classes + 2 + 1  # features, class, heading, depth
        self.cell_position = nn.Linear(C, C)
        self.spatial_cross_attention = SpatialCrossAttention(
            self.grid, config.heights, seen, C, config.cameras_per_cell, config.camera_samples
        )
        self.temporal_fusion = TemporalFusion(self.grid, C)
        self.bev_neck = BEVNeck(C)
        self.box_decoder = BoxDecoder(
            self.grid, seen, C, config.heads, config.decoder_layers, config.box_queries, classes
        )
        self.line_decoder = LineDecoder(
            self.grid, C, config.heads, config.decoder_layers, config.line_queries, config.line_points, line_classes,
            config.map_x_range, config.map_y_range,
        )  # fmt: skip

    def initial_state(self, batch_size: int) -> State:
        """The memory of a network that has seen nothing, on the device of the weights."""
        return State(self.cell_position.weight.new_zeros(batch_size, self.config.channels, *self.config.grid))

    def encode_images(self, frame: Frame) -> tuple[ImagePrediction, Tensor, Tensor]:
        """What the images show, each by itself.

        Args:
            frame: leading [B].

        Returns:
            The predictions, what the map reads [B, N, C + K + 3, h, w] (features, class, heading, depth), and
            how it reads [B, N, 2 + D, h, w]: how open a pixel is to all distances, its mean depth, and how likely it is
            at each.
        """
        B, N, _, H, W = frame.images.shape
        features = self.image_encoder(frame.images.flatten(0, 1)).unflatten(0, (B, N))  # [B, N, C, h, w]
        features, shown = self.image_head(features, frame.rig, (H, W))
        logits, depth_logits, heading, opening = shown.split([len(BOX_CLASSES), self.config.depth_bins, 2, 1], 2)
        likely = depth_logits.float().softmax(2)
        bins = torch.linspace(0, 1, likely.shape[2], device=likely.device).view(-1, 1, 1)
        depth = (likely * bins).sum(2, keepdim=True)
        images = torch.cat([features, logits.sigmoid(), heading, depth.to(features.dtype)], 2)
        distance = torch.cat([opening.float().sigmoid(), depth, likely], 2)
        return ImagePrediction(logits, depth_logits, heading), images, distance

    def forward(self, frame: Frame, state: State) -> tuple[Prediction, State]:
        """One frame.

        Args:
            frame: leading [B]; images [B, N, 3, H, W] of the configured size, any number of cameras.
            state: what the previous call returned, or `initial_state`.

        Returns:
            The raw outputs of every decoder layer, and the memory for the next call.
        """
        size = frame.images.shape[-2:]
        shown, images, distance = self.encode_images(frame)
        place = self.grid.normalize(self.grid.cell_centers(images.device)).flatten(0, 1)  # [X * Y, 2]
        query = self.cell_position(encode_position(place, self.config.channels)).expand(len(images), -1, -1)
        bev = self.spatial_cross_attention(query, images, distance, frame.rig, size)  # [B, X * Y, C]
        bev = bev.transpose(1, 2).unflatten(2, self.config.grid)  # [B, C, X, Y]
        memory, past = self.temporal_fusion(
            bev, state.bev, frame.ego_from_prev, frame.seconds_since_prev, frame.is_first
        )
        bev = self.bev_neck(memory, past)
        box_logits, box_params, box_log_uncertainty, heatmap_logits = self.box_decoder(bev, images, frame.rig, size)
        line_logits, line_points, line_log_uncertainty, bev_seg_logits = self.line_decoder(bev)
        prediction = Prediction(
            box_logits, box_params, box_log_uncertainty, line_logits, line_points, line_log_uncertainty, heatmap_logits,
            bev_seg_logits, shown,
        )  # fmt: skip
        # In one layout, whichever the convolutions left it in: another one would have the next frame compiled anew.
        return prediction, State(memory.contiguous())

    def decode(self, prediction: Prediction) -> FrameObjects:
        """What the last layer says there is, see `perception.models.decoder.decode`."""
        return decode(prediction)
