"""The flagship: one recurrent BEV transformer that predicts boxes and lines.

    model = BEVTransformer(BEVTransformerConfig.nano())
    state = model.initial_state(batch_size=1)
    for frame in frames:
        prediction, state = model(frame, state)
        scene = model.decode(prediction)

The same `forward` is unrolled in training, called in live use and flattened for export.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from perception.grid import BEVGrid
from perception.models.backbone import FPNEncoder
from perception.models.bev_transformer.config import BEVTransformerConfig
from perception.models.bev_transformer.decoder import PRIOR_LOGIT, BoxDecoder, LineDecoder, decode, encode_position
from perception.models.bev_transformer.encoder import (
    BEVNeck,
    CameraAwareHead,
    PillarViews,
    SpatialCrossAttention,
    TemporalFusion,
    ray_features,
)
from perception.models.bev_transformer.losses import LOSS_WEIGHTS, frame_losses, image_losses
from perception.types import (
    BOX_CLASSES,
    LINE_CLASSES,
    CameraRig,
    Frame,
    FrameObjects,
    ImagePrediction,
    Prediction,
    State,
    map_tensors,
)


class RigGeometry(NamedTuple):
    """What the network computes from the calibration alone, without weights."""

    rays: Tensor  # [B, N, h * w, ...] from `ray_features`
    views: PillarViews


class BEVTransformer(nn.Module):
    """Calibrated images in, raw boxes and lines out, with a memory that is passed in and out."""

    finds = ("box", "line")
    loss_weights = LOSS_WEIGHTS
    needs_gt = tracks = False
    raw_names = ("box_logits", "box_params", "line_logits", "line_points")
    extra_inputs: ClassVar[tuple[str, ...]] = ()
    no_export = ""
    recomputable = (
        "image_head", "spatial_cross_attention", "temporal_fusion", "bev_neck", "box_decoder", "line_decoder",
    )  # fmt: skip
    published_prefixes: ClassVar[dict[str, str]] = {}

    def __init__(self, config: BEVTransformerConfig) -> None:
        super().__init__()
        self.config = config
        C, classes, line_classes = config.channels, len(BOX_CLASSES), len(LINE_CLASSES)
        self.grid = BEVGrid(config.x_range, config.y_range, config.grid)
        self.image_encoder = FPNEncoder(config.backbone, config.backbone_stages, config.feature_stride, C, config.neck)
        # Per pixel: classes, depth bins, heading as sin and cos, bypass of the depth gate.
        self.image_head = CameraAwareHead(C, classes + config.depth_bins + 2 + 1)
        assert self.image_head.head.bias is not None
        nn.init.constant_(self.image_head.head.bias[:classes], PRIOR_LOGIT)
        sampled = C + classes + 2 + 1  # features, class, heading, depth
        self.cell_position = nn.Linear(C, C)
        self.spatial_cross_attention = SpatialCrossAttention(
            self.grid, config.heights, sampled, C, config.cameras_per_cell, config.camera_samples
        )
        self.temporal_fusion = TemporalFusion(self.grid, C)
        self.bev_neck = BEVNeck(C)
        self.box_decoder = BoxDecoder(
            self.grid, sampled, C, config.heads, config.decoder_layers, config.box_queries, classes
        )
        self.line_decoder = LineDecoder(
            self.grid, C, config.heads, config.decoder_layers, config.line_queries, config.line_points, line_classes,
            config.lane_range,
        )  # fmt: skip

    def initial_state(self, batch_size: int) -> State:
        """Returns the empty memory of a first frame, on the device of the weights."""
        return State(self.cell_position.weight.new_zeros(batch_size, self.config.channels, *self.config.grid))

    def rig_geometry(self, rig: CameraRig, image_size: tuple[int, int]) -> RigGeometry:
        """Computes what `forward` needs of a calibration; it is the same for all frames with the same calibration.

        Args:
            rig: leading [B, N].
            image_size: height and width in pixels of the network's images.
        """
        rays = ray_features(rig, image_size, self.image_encoder.feature_size(image_size))
        return RigGeometry(rays, self.spatial_cross_attention.views(rig, image_size))

    def encode_images(self, images: Tensor, rays: Tensor) -> tuple[ImagePrediction, Tensor, Tensor]:
        """Encodes images, each by itself.

        Args:
            images: [B, N, 3, H, W] as in `Frame`.
            rays: of the pixels, from `ray_features`.

        Returns:
            The predictions per pixel; image features [B, N, C + K + 3, h, w] (features, class, heading, depth); and
            the depth gate [B, N, 2 + D, h, w] (bypass, mean depth, probability of each depth bin), see
            `SpatialCrossAttention`.
        """
        features = self.image_encoder(images.flatten(0, 1)).unflatten(0, images.shape[:2])  # [B, N, C, h, w]
        features, outputs = self.image_head(features, rays)
        logits, depth_logits, heading, bypass = outputs.split([len(BOX_CLASSES), self.config.depth_bins, 2, 1], 2)
        probability = depth_logits.float().softmax(2)
        bins = torch.linspace(0, 1, probability.shape[2], device=probability.device).view(-1, 1, 1)
        depth = (probability * bins).sum(2, keepdim=True)
        images = torch.cat([features, logits.sigmoid(), heading, depth.to(features.dtype)], 2)
        depth_gate = torch.cat([bypass.float().sigmoid(), depth, probability], 2)
        return ImagePrediction(logits, depth_logits, heading), images, depth_gate

    def forward(self, frame: Frame, state: State, geometry: RigGeometry | None = None) -> tuple[Prediction, State]:
        """Processes one frame.

        Args:
            frame: leading [B]; images [B, N, 3, H, W] of the configured size, any number of cameras.
            state: what the previous call returned, or `initial_state`.
            geometry: `rig_geometry` of the frame's calibration, if the caller has it.

        Returns:
            The raw outputs of every decoder layer, and the memory for the next call.
        """
        size = (frame.images.shape[-2], frame.images.shape[-1])
        geometry = geometry or self.rig_geometry(frame.rig, size)
        image_prediction, images, depth_gate = self.encode_images(frame.images, geometry.rays)
        position = self.grid.normalize(self.grid.cell_centers(images.device)).flatten(0, 1)  # [X * Y, 2]
        query = self.cell_position(encode_position(position, self.config.channels)).expand(len(images), -1, -1)
        bev = self.spatial_cross_attention(query, images, depth_gate, geometry.views)  # [B, X * Y, C]
        bev = bev.transpose(1, 2).unflatten(2, self.config.grid)  # [B, C, X, Y]
        memory, previous = self.temporal_fusion(
            bev, state.bev, frame.ego_from_prev, frame.seconds_since_prev, frame.is_first
        )
        bev = self.bev_neck(memory, previous)
        box_logits, box_params, box_log_uncertainty, heatmap_logits = self.box_decoder(bev, images, frame.rig, size)
        line_logits, line_points, line_log_uncertainty, bev_seg_logits = self.line_decoder(bev)
        prediction = Prediction(
            box_logits, box_params, box_log_uncertainty, line_logits, line_points, line_log_uncertainty, heatmap_logits,
            bev_seg_logits, image_prediction,
        )  # fmt: skip
        # Always in the same layout and precision, so that a compiled network is not compiled again for the next frame.
        return prediction, State(memory.to(state.bev.dtype).contiguous())

    def loss(self, prediction: Prediction, gt: FrameObjects, frame: Frame) -> dict[str, Tensor]:
        """Weighted losses by name, averaged over the layers; see `perception.models.bev_transformer.losses`."""
        return frame_losses(prediction, gt, frame, self.grid)

    def image_loss(self, frame: Frame, gt: FrameObjects) -> dict[str, Tensor]:
        """Weighted losses of the images alone, each frame by itself; matching and losses run in float32."""
        H, W = frame.images.shape[-2:]
        rays = ray_features(frame.rig, (H, W), self.image_encoder.feature_size((H, W)))
        predicted = self.encode_images(frame.images, rays)[0]
        with torch.autocast(frame.images.device.type, enabled=False):
            return image_losses(map_tensors(Tensor.float, predicted), gt.boxes, frame)

    def raw_outputs(self, prediction: Prediction) -> tuple[Tensor, ...]:
        """Logits and parameters of boxes, logits and points of lines, of the last layer: [B, Q, ...]."""
        return tuple(getattr(prediction, name)[-1] for name in self.raw_names)

    def decode(self, prediction: Prediction) -> FrameObjects:
        """Decodes the last layer, see `perception.models.bev_transformer.decoder.decode`."""
        return decode(prediction)
