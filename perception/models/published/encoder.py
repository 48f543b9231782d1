"""The BEV encoder of BEVFormer, which MapTR uses too.

Modules are named as in the published checkpoints. Coordinate frames, the CAN bus vector and the alignment of previous
BEV features are in `perception.models.published.geometry`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perception.models.published.decoder import DecoderLayer, FeedForward, LayerStack, init_matrices, init_sampling
from perception.models.published.geometry import (
    PublishedConfig,
    bev_shift,
    cell_centers,
    constants,
    project_pillars,
    rotate_bev,
)
from perception.ops.deformable import deformable_attention


class TemporalSelfAttention(nn.Module):
    """Deformable attention of each BEV cell to the previous and the present BEV features, averaged over the two."""

    def __init__(self, channels: int, heads: int, points: int) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        self.sampling_offsets = nn.Linear(2 * channels, 2 * heads * points * 2)
        self.attention_weights = nn.Linear(2 * channels, 2 * heads * points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        init_sampling(self.sampling_offsets, self.attention_weights, heads, 2, points)

    def forward(
        self, query: Tensor, position: Tensor, values: Tensor, references: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """Adds the attended features to the queries.

        Args:
            query: [B, h * w, C].
            position: positional encoding [1, h * w, C].
            values: previous and present BEV features [B, 2, h * w, C].
            references: reference points of each cell in both [B, 2, h * w, 2], x and y normalised to 0..1.
            size: (h, w).

        Returns:
            [B, h * w, C].
        """
        B, Q, C = query.shape
        context = torch.cat([values[:, 0], query + position], -1)
        offsets = self.sampling_offsets(context).view(B, Q, self.heads, 2, 1, self.points, 2)
        weights = self.attention_weights(context).view(B, Q, self.heads, 2, 1, self.points).softmax(-1)
        locations = references.transpose(1, 2)[:, :, None, :, None, None] + offsets / constants(
            [size[1], size[0]], offsets
        )
        values = self.value_proj(values).view(B * 2, Q, self.heads, C // self.heads)
        locations, weights = (x.movedim(3, 1).flatten(0, 1) for x in (locations, weights))
        attended = deformable_attention(values, [size], locations, weights).view(B, 2, Q, C).mean(1)
        return self.output_proj(attended) + query


class _MultiScaleDeformableAttention(nn.Module):
    """The layers of spatial cross-attention before sampling, under their published names."""

    def __init__(self, channels: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.sampling_offsets = nn.Linear(channels, heads * levels * points * 2)
        self.attention_weights = nn.Linear(channels, heads * levels * points)
        self.value_proj = nn.Linear(channels, channels)
        init_sampling(self.sampling_offsets, self.attention_weights, heads, levels, points)


class SpatialCrossAttention(nn.Module):
    """Deformable attention of each BEV cell to the cameras that see its pillar, averaged over these cameras.

    Args:
        channels: of queries and features.
        heads: attention heads.
        levels: FPN levels.
        points: sampling points per head and level, divided among the reference points of a pillar.
    """

    def __init__(self, channels: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.deformable_attention = _MultiScaleDeformableAttention(channels, heads, levels, points)
        self.output_proj = nn.Linear(channels, channels)

    def forward(
        self, query: Tensor, features: Tensor, sizes: list[tuple[int, int]], references: Tensor, visible: Tensor
    ) -> Tensor:
        """Adds the attended features to the queries.

        Args:
            query: [B, Q, C].
            features: image features [B, N, sum of h * w, C] of all levels.
            sizes: (h, w) of each level.
            references: projected pillars [B, N, Q, Z, 2], x and y normalised to 0..1 over each image.
            visible: [B, N, Q] bool, whether a camera sees a pillar.

        Returns:
            [B, Q, C].
        """
        B, N, S, C = features.shape
        Q, Z = references.shape[2:4]
        layers = self.deformable_attention
        value = layers.value_proj(features).view(B, N, S, self.heads, C // self.heads)
        offsets = layers.sampling_offsets(query).view(B, Q, self.heads, self.levels, self.points // Z, Z, 2)
        offsets = offsets / constants([[w, h] for h, w in sizes], offsets)[:, None, None]
        weights = layers.attention_weights(query).view(B, Q, self.heads, self.levels * self.points).softmax(-1)
        weights = weights.view(B, Q, self.heads, self.levels, self.points)
        if torch.compiler.is_exporting():  # all cells in all cameras: shapes must not depend on visibility
            locations = references[:, :, :, None, None, None] + offsets[:, None]
            locations = locations.flatten(5, 6).flatten(0, 1)  # [B * N, Q, heads, levels, P, 2]
            weights = weights[:, None].expand(-1, N, -1, -1, -1, -1).flatten(0, 1)
            attended = deformable_attention(value.flatten(0, 1), sizes, locations, weights)
            total = (attended.view(B, N, Q, C) * visible[..., None]).sum(1)
        else:  # camera by camera; a weight of zero where a camera does not see the pillar skips its samples
            total = torch.zeros_like(query)
            for n in range(N):
                locations = (references[:, n, :, None, None, None] + offsets).flatten(4, 5)
                masked = weights * visible[:, n, :, None, None, None]  # [B, Q, heads, levels, P]
                total = total + deformable_attention(value[:, n], sizes, locations, masked)
        mean = total / visible.sum(1).clamp(min=1)[..., None]
        return self.output_proj(mean) + query


class KernelLayers(nn.Module):
    """The layers of kernel attention before sampling, under their published names."""

    def __init__(self, channels: int, heads: int, points: int) -> None:
        super().__init__()
        self.attention_weights = nn.Linear(channels, heads * points)
        self.value_proj = nn.Linear(channels, channels)
        for parameter in self.attention_weights.parameters():
            nn.init.zeros_(parameter)


def kernel_offsets(kernel: tuple[int, int]) -> Tensor:
    """Lists the pixels of a kernel as offsets (x, y) from its centre, column by column: [P, 2].

    Even sides lean to the upper left, as published.
    """
    y, x = (torch.arange(side) - side // 2 for side in kernel)
    return torch.cartesian_prod(x, y)


class GeometryKernelAttention(nn.Module):
    """Geometry-guided kernel attention of each BEV cell to the cameras (GKT, https://arxiv.org/abs/2206.04584).

    As in the published MapTR, each head attends to the kernel around one reference point of the pillar, without
    interpolation.

    Args:
        channels: of queries and features.
        heads: attention heads, as many as a pillar has reference points.
        kernel: height and width of the kernel in pixels of the features.
    """

    kernel: Tensor

    def __init__(self, channels: int, heads: int, kernel: tuple[int, int]) -> None:
        super().__init__()
        self.heads = heads
        self.attention = KernelLayers(channels, heads, kernel[0] * kernel[1])
        self.output_proj = nn.Linear(channels, channels)
        self.register_buffer("kernel", kernel_offsets(kernel), persistent=False)

    def forward(
        self, query: Tensor, features: Tensor, sizes: list[tuple[int, int]], references: Tensor, visible: Tensor
    ) -> Tensor:
        """Adds the attended features to the queries; arguments as in `SpatialCrossAttention.forward`, one level."""
        B, N, S, C = features.shape
        ((h, w),) = sizes
        layers = self.attention
        value = layers.value_proj(features).view(B, N, S, self.heads, C // self.heads)
        weights = layers.attention_weights(query).view(B, -1, self.heads, len(self.kernel)).softmax(-1)
        head = torch.arange(self.heads, device=query.device)[:, None]
        totals = []
        for b in range(B):
            total = torch.zeros_like(query[b])
            for n in range(N):
                locations = (references[b, n] * constants([w, h], references))[:, :, None] + self.kernel
                x, y = locations.round().long().unbind(-1)  # [Q, heads, P]
                pixel = y.clamp(0, h - 1) * w + x.clamp(0, w - 1)
                attended = (value[b, n][pixel, head] * weights[b][..., None]).sum(2)  # [Q, heads, C / heads]
                total = total + attended.flatten(1) * visible[b, n, :, None]
            totals.append(total)
        mean = torch.stack(totals) / visible.sum(1).clamp(min=1)[..., None]
        return self.output_proj(mean) + query


class BEVFormerLayer(nn.Module):
    """One layer of the BEV encoder: temporal self-attention, spatial cross-attention, feed-forward."""

    def __init__(self, config: PublishedConfig) -> None:
        super().__init__()
        C, heads = config.channels, config.heads
        spatial = (
            GeometryKernelAttention(C, config.pillar_points, config.gkt_kernel)
            if config.gkt_kernel
            else SpatialCrossAttention(C, heads, config.backbone.levels, config.camera_points)
        )
        self.attentions = nn.ModuleList([TemporalSelfAttention(C, heads, config.points), spatial])
        self.ffns = nn.ModuleList([FeedForward(C, config.feed_forward)])
        self.norms = nn.ModuleList([nn.LayerNorm(C) for _ in range(3)])

    def forward(
        self,
        query: Tensor,
        position: Tensor,
        values: Tensor,
        references: Tensor,
        size: tuple[int, int],
        features: Tensor,
        feature_sizes: list[tuple[int, int]],
        pillars: Tensor,
        visible: Tensor,
    ) -> Tensor:
        """Updates BEV queries [B, h * w, C].

        Args:
            query, position, values, references, size: as in `TemporalSelfAttention.forward`.
            features, feature_sizes, pillars, visible: as in `SpatialCrossAttention.forward`.
        """
        query = self.norms[0](self.attentions[0](query, position, values, references, size))
        query = self.norms[1](self.attentions[1](query, features, feature_sizes, pillars, visible))
        return self.norms[2](self.ffns[0](query))


class BEVFormerTransformer(nn.Module):
    """The BEV encoder of BEVFormer, the decoder layers and the layer that predicts initial reference points.

    Args:
        config: the network's.
        reference_size: coordinates per reference point, 3 for boxes and 2 for line points.
    """

    def __init__(self, config: PublishedConfig, reference_size: int) -> None:
        super().__init__()
        self.config = config
        C = config.channels
        self.level_embeds = nn.Parameter(torch.randn(config.level_embeddings, C))
        self.cams_embeds = nn.Parameter(torch.randn(config.cameras, C))
        self.can_bus_mlp = can_bus_mlp(C)
        self.encoder = LayerStack([BEVFormerLayer(config) for _ in range(config.encoder_layers)])
        self.reference_points = nn.Linear(C, reference_size)
        self.decoder = LayerStack([DecoderLayer(config) for _ in range(config.decoder_layers)])
        init_matrices(self)

    def encode(
        self,
        features: list[Tensor],
        queries: Tensor,
        position: Tensor,
        img_from_lidar: Tensor,
        can_bus: Tensor,
        image_size: tuple[int, int],
        previous: Tensor | None,
        is_first: Tensor | None = None,
    ) -> Tensor:
        """Encodes the image features of all cameras as BEV features.

        Args:
            features: FPN levels [B, N, C, h, w].
            queries: BEV queries [h * w, C].
            position: their positional encoding [1, h * w, C].
            img_from_lidar: [B, N, 4, 4] from `lidar_projections`.
            can_bus: [B, 18] from `can_bus_vector`.
            image_size: height and width in pixels of the images that `img_from_lidar` projects to.
            previous: BEV features [B, h * w, C] of the previous frame, in its LiDAR frame. None if all frames are first
                frames.
            is_first: [B] bool, True where `previous` is ignored. None ignores it nowhere.

        Returns:
            BEV features [B, h * w, C] in the LiDAR frame.
        """
        config = self.config
        B = len(can_bus)
        h, w = config.bev
        query = queries + self.can_bus_mlp(can_bus.float())[:, None]
        sizes = [(x.shape[-2], x.shape[-1]) for x in features]
        levels = []
        for level, x in enumerate(features):
            x = x.flatten(3).transpose(2, 3) + self.cams_embeds[:, None] + self.level_embeds[level]
            levels.append(x)  # [B, N, h * w, C]
        image_features = torch.cat(levels, 2)
        pillars, visible = project_pillars(config, img_from_lidar, image_size)
        cells = cell_centers(h, w, query.device).expand(B, -1, -1)  # [B, h * w, 2]
        references = torch.stack([cells, cells], 1)
        has_previous = aligned = None
        if previous is not None:
            first = torch.zeros_like(can_bus[:, 0], dtype=torch.bool) if is_first is None else is_first
            has_previous = ~first.view(B, 1, 1, 1)
            shifted = torch.stack([cells + bev_shift(config, can_bus)[:, None], cells], 1)
            references = torch.where(has_previous, shifted, references)
            # As published, all layers attend to the present BEV queries of before the first layer.
            aligned = torch.stack([rotate_bev(previous, config, can_bus[:, -1]), query], 1)
        for layer in self.encoder.layers:
            values = torch.stack([query, query], 1)
            if has_previous is not None and aligned is not None:
                values = torch.where(has_previous, aligned, values)
            query = layer(query, position, values, references, config.bev, image_features, sizes, pillars, visible)
        return query


def can_bus_mlp(channels: int) -> nn.Sequential:
    """Builds the MLP from a CAN bus vector to an embedding that is added to BEV queries."""
    mlp = nn.Sequential(
        nn.Linear(18, channels // 2), nn.ReLU(inplace=True), nn.Linear(channels // 2, channels), nn.ReLU(inplace=True)
    )
    mlp.add_module("norm", nn.LayerNorm(channels))
    return mlp
