"""What the published BEVFormer and MapTR share: the map encoder of BEVFormer and a DETR-like decoder on its map.

Modules are named as the published checkpoints name them; frames, the CAN bus and the move of the map before are in
`perception.models.published.geometry`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from perception.models.published.geometry import (
    PublishedConfig,
    cell_locations,
    constants,
    map_shift,
    see_pillars,
    turn_map,
)
from perception.ops.deformable import deformable_attention


class FeedForward(nn.Module):
    """Two linear layers around which the input goes."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        first = nn.Sequential(nn.Linear(channels, inner), nn.ReLU(inplace=True))
        self.layers = nn.Sequential(first, nn.Linear(inner, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def initial_offsets(offsets: nn.Linear, weight: nn.Linear, heads: int, groups: int, points: int) -> None:
    """Sets where locations lie before anything is learned: head by head in another direction, point by point farther.

    Args:
        offsets, weight: the layers that tell locations [heads, groups, points, 2] and weights.
        groups: levels or maps, all alike.
    """
    angle = torch.arange(heads) * (2 * math.pi / heads)
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    locations = direction.view(heads, 1, 1, 2) * (torch.arange(points) + 1).view(1, 1, points, 1)
    nn.init.zeros_(offsets.weight)
    nn.init.zeros_(weight.weight)
    nn.init.zeros_(weight.bias)
    with torch.no_grad():
        offsets.bias.copy_(locations.expand(-1, groups, -1, -1).reshape(-1))


class TemporalSelfAttention(nn.Module):
    """Each cell reads the map before it was looked around, and the previous one, and takes the mean of the two."""

    def __init__(self, channels: int, heads: int, points: int) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        self.sampling_offsets = nn.Linear(2 * channels, 2 * heads * points * 2)
        self.attention_weights = nn.Linear(2 * channels, 2 * heads * points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        initial_offsets(self.sampling_offsets, self.attention_weights, heads, 2, points)

    def forward(
        self, query: Tensor, position: Tensor, values: Tensor, locations: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """Adds to the queries what they read.

        Args:
            query, position: [B, h * w, C].
            values: [B, 2, h * w, C], the previous map and the present one.
            locations: [B, 2, h * w, 2], where a cell lies in each, x and y in 0..1.
            size: (h, w).
        """
        B, Q, C = query.shape
        told = torch.cat([values[:, 0], query + position], -1)
        offsets = self.sampling_offsets(told).view(B, Q, self.heads, 2, 1, self.points, 2)
        weight = self.attention_weights(told).view(B, Q, self.heads, 2, 1, self.points).softmax(-1)
        locations = locations.transpose(1, 2)[:, :, None, :, None, None] + offsets / constants(
            [size[1], size[0]], offsets
        )
        value = self.value_proj(values).view(B * 2, Q, self.heads, C // self.heads)
        locations, weight = (x.movedim(3, 1).flatten(0, 1) for x in (locations, weight))
        read = deformable_attention(value, [size], locations, weight).view(B, 2, Q, C).mean(1)
        return self.output_proj(read) + query


class _CameraSampling(nn.Module):
    def __init__(self, channels: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.sampling_offsets = nn.Linear(channels, heads * levels * points * 2)
        self.attention_weights = nn.Linear(channels, heads * levels * points)
        self.value_proj = nn.Linear(channels, channels)
        initial_offsets(self.sampling_offsets, self.attention_weights, heads, levels, points)


class SpatialCrossAttention(nn.Module):
    """Each cell reads the cameras that see a point of its pillar, and takes the mean over them."""

    def __init__(self, channels: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.deformable_attention = _CameraSampling(channels, heads, levels, points)
        self.output_proj = nn.Linear(channels, channels)

    def forward(
        self, query: Tensor, features: Tensor, sizes: list[tuple[int, int]], locations: Tensor, seen: Tensor
    ) -> Tensor:
        """Adds to the queries what they read.

        Args:
            query: [B, Q, C].
            features: [B, N, sum of h * w, C].
            sizes: of the levels.
            locations: [B, N, Q, Z, 2] x and y of the pillar's points in 0..1 of each image.
            seen: [B, N, Q] bool, at least one of the points is.
        """
        B, N, S, C = features.shape
        Q, Z = locations.shape[2:4]
        part = self.deformable_attention
        value = part.value_proj(features).view(B, N, S, self.heads, C // self.heads)
        offsets = part.sampling_offsets(query).view(B, Q, self.heads, self.levels, self.points // Z, Z, 2)
        offsets = offsets / constants([[w, h] for h, w in sizes], offsets)[:, None, None]
        weight = part.attention_weights(query).view(B, Q, self.heads, self.levels * self.points).softmax(-1)
        weight = weight.view(B, Q, self.heads, self.levels, self.points)
        if torch.compiler.is_exporting():  # all cells of all cameras: shapes must not depend on what is seen
            at = locations[:, :, :, None, None, None] + offsets[:, None]  # [B, N, Q, heads, levels, P / Z, Z, 2]
            weights = weight[:, None].expand(-1, N, -1, -1, -1, -1).flatten(0, 1)
            read = deformable_attention(value.flatten(0, 1), sizes, at.flatten(5, 6).flatten(0, 1), weights)
            total = (read.view(B, N, Q, C) * seen[..., None]).sum(1)
        else:  # camera by camera, with weights of zero, which are not read, where a camera sees nothing of a pillar
            total = torch.zeros_like(query)
            for n in range(N):
                at = (locations[:, n, :, None, None, None] + offsets).flatten(4, 5)  # [B, Q, heads, levels, P, 2]
                counted = weight * seen[:, n, :, None, None, None]
                total = total + deformable_attention(value[:, n], sizes, at, counted)
        mean = total / seen.sum(1).clamp(min=1)[..., None]
        return self.output_proj(mean) + query


class _KernelSampling(nn.Module):
    def __init__(self, channels: int, heads: int, points: int) -> None:
        super().__init__()
        self.attention_weights = nn.Linear(channels, heads * points)
        self.value_proj = nn.Linear(channels, channels)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)


class KernelCrossAttention(nn.Module):
    """Each cell reads a patch of pixels around each point of its pillar, in the cameras that see one of the points.

    Geometry-guided kernel attention (GKT, https://arxiv.org/abs/2206.04584) as MapTR was published with it: as many
    heads as a pillar has points, each reads around its own, and nothing is interpolated.

    Args:
        channels: of queries and features.
        heads: points of a pillar.
        kernel: height and width of the patch in pixels of the features.
    """

    def __init__(self, channels: int, heads: int, kernel: tuple[int, int]) -> None:
        super().__init__()
        self.heads = heads
        self.attention = _KernelSampling(channels, heads, kernel[0] * kernel[1])
        self.output_proj = nn.Linear(channels, channels)
        y, x = (torch.arange(side) - side // 2 for side in kernel)
        patch = torch.cartesian_prod(x, y)  # [P, 2] column by column, as published
        self.register_buffer("patch", patch, persistent=False)

    def forward(
        self, query: Tensor, features: Tensor, sizes: list[tuple[int, int]], locations: Tensor, seen: Tensor
    ) -> Tensor:
        """Adds to the queries what they read; arguments as in `SpatialCrossAttention.forward`, of one level."""
        B, N, S, C = features.shape
        ((h, w),) = sizes
        part = self.attention
        value = part.value_proj(features).view(B, N, S, self.heads, C // self.heads)
        weight = part.attention_weights(query).view(B, -1, self.heads, len(self.patch)).softmax(-1)
        head = torch.arange(self.heads, device=query.device)[:, None]
        total = []
        for b in range(B):
            part = torch.zeros_like(query[b])
            for n in range(N):
                at = (locations[b, n] * constants([w, h], locations))[:, :, None] + self.patch  # [Q, heads, P, 2]
                x, y = at.round().long().unbind(-1)
                pixel = y.clamp(0, h - 1) * w + x.clamp(0, w - 1)
                read = (value[b, n][pixel, head] * weight[b][..., None]).sum(2)  # [Q, heads, C / heads]
                part = part + read.flatten(1) * seen[b, n, :, None]
            total.append(part)
        total = torch.stack(total)
        mean = total / seen.sum(1).clamp(min=1)[..., None]
        return self.output_proj(mean) + query


class BEVFormerLayer(nn.Module):
    """One round of the encoder."""

    def __init__(self, config: PublishedConfig) -> None:
        super().__init__()
        C, heads = config.channels, config.heads
        if config.kernel:
            cameras = KernelCrossAttention(C, config.pillar_points, config.kernel)
        else:
            cameras = SpatialCrossAttention(C, heads, config.backbone.levels, config.camera_points)
        self.attentions = nn.ModuleList([TemporalSelfAttention(C, heads, config.points), cameras])
        self.ffns = nn.ModuleList([FeedForward(C, config.feed_forward)])
        self.norms = nn.ModuleList([nn.LayerNorm(C) for _ in range(3)])


class QueryAttention(nn.Module):
    """Attention among queries, with their positions added to queries and keys."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(channels, heads, batch_first=True)

    def forward(self, query: Tensor, position: Tensor, apart: Tensor | None = None) -> Tensor:
        """query, position [B, Q, C] -> [B, Q, C]; `apart` [Q, Q] is True where two must not see each other."""
        key = query + position
        return query + self.attn(key, key, query, attn_mask=apart, need_weights=False)[0]


class MapAttention(nn.Module):
    """Queries read the map around their reference points."""

    def __init__(self, channels: int, heads: int, points: int) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        self.sampling_offsets = nn.Linear(channels, heads * points * 2)
        self.attention_weights = nn.Linear(channels, heads * points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        initial_offsets(self.sampling_offsets, self.attention_weights, heads, 1, points)

    def forward(
        self, query: Tensor, position: Tensor, value: Tensor, locations: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """query, position [B, Q, C], value [B, h * w, C], locations [B, Q, 2] x and y in 0..1 -> [B, Q, C]."""
        B, Q, C = query.shape
        asked = query + position
        offsets = self.sampling_offsets(asked).view(B, Q, self.heads, 1, self.points, 2)
        weight = self.attention_weights(asked).view(B, Q, self.heads, 1, self.points).softmax(-1)
        at = locations[:, :, None, None, None] + offsets / constants([size[1], size[0]], offsets)
        value = self.value_proj(value).view(B, -1, self.heads, C // self.heads)
        return self.output_proj(deformable_attention(value, [size], at, weight)) + query


class DecoderLayer(nn.Module):
    """One round of a DETR-like decoder on the map: among queries, from the map, by themselves."""

    def __init__(self, channels: int, heads: int, points: int, feed_forward: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([QueryAttention(channels, heads), MapAttention(channels, heads, points)])
        self.ffns = nn.ModuleList([FeedForward(channels, feed_forward)])
        self.norms = nn.ModuleList([nn.LayerNorm(channels) for _ in range(3)])

    def forward(
        self, query: Tensor, position: Tensor, value: Tensor, locations: Tensor, size: tuple[int, int]
    ) -> Tensor:
        query = self.norms[0](self.attentions[0](query, position))
        query = self.norms[1](self.attentions[1](query, position, value, locations, size))
        return self.norms[2](self.ffns[0](query))


class LearnedPosition(nn.Module):
    """A learned vector per column and per row: [1, h * w, C]."""

    def __init__(self, size: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(size[0], channels // 2)
        self.col_embed = nn.Embedding(size[1], channels // 2)

    def forward(self) -> Tensor:
        rows, columns = self.row_embed.weight, self.col_embed.weight
        h, w = len(rows), len(columns)
        return torch.cat([columns.expand(h, -1, -1), rows[:, None].expand(-1, w, -1)], -1).flatten(0, 1)[None]


class BEVFormerEncoder(nn.Module):
    """Features of all cameras to the map, in the frame of the LiDAR; MapTR uses it too."""

    def __init__(self, config: PublishedConfig) -> None:
        super().__init__()
        self.config = config
        C = config.channels
        self.level_embeds = nn.Parameter(torch.randn(config.level_embeddings, C))
        self.cams_embeds = nn.Parameter(torch.randn(config.cameras, C))
        self.can_bus_mlp = nn.Sequential(
            nn.Linear(18, C // 2), nn.ReLU(inplace=True), nn.Linear(C // 2, C), nn.ReLU(inplace=True)
        )
        self.can_bus_mlp.add_module("norm", nn.LayerNorm(C))
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList([BEVFormerLayer(config) for _ in range(config.encoder_layers)])

    def encode(
        self,
        features: list[Tensor],
        queries: Tensor,
        position: Tensor,
        img_from_lidar: Tensor,
        bus: Tensor,
        image_size: tuple[int, int],
        previous: Tensor | None,
        is_first: Tensor | None = None,
    ) -> Tensor:
        """The map [B, h * w, C].

        Args:
            features: levels [B, N, C, h, w].
            queries, position: [h * w, C] and [1, h * w, C].
            img_from_lidar: [B, N, 4, 4], points to (u depth, v depth, depth).
            bus: [B, 18], see `can_bus`.
            image_size: height and width that `img_from_lidar` is for.
            previous: the map of the previous frame alike, in its own frame, or None where all are first frames.
            is_first: [B] bool, True where `previous` must not count; None for nowhere.
        """
        config = self.config
        B = len(bus)
        h, w = config.bev
        query = queries + self.can_bus_mlp(bus.float())[:, None]
        sizes = [tuple(x.shape[-2:]) for x in features]
        flat = []
        for level, x in enumerate(features):
            x = x.flatten(3).transpose(2, 3) + self.cams_embeds[:, None] + self.level_embeds[level]
            flat.append(x)  # [B, N, h * w, C]
        seen_features = torch.cat(flat, 2)
        locations, seen = see_pillars(config, img_from_lidar, image_size)
        cells = cell_locations(h, w, query.device).expand(B, -1, -1)  # [B, h * w, 2]
        both = torch.stack([cells, cells], 1)
        known = None
        if previous is not None:
            first = torch.zeros_like(bus[:, 0], dtype=torch.bool) if is_first is None else is_first
            known = ~first.view(B, 1, 1, 1)
            moved = torch.stack([cells + map_shift(config, bus)[:, None], cells], 1)
            both = torch.where(known, moved, both)
            # The present half is the map before the first round, in all rounds.
            values = torch.stack([turn_map(previous, config, bus[:, -1]), query], 1)
        for layer in self.encoder.layers:
            read = torch.stack([query, query], 1)
            read = read if known is None else torch.where(known, values, read)
            query = layer.norms[0](layer.attentions[0](query, position.expand(B, -1, -1), read, both, config.bev))
            query = layer.norms[1](layer.attentions[1](query, seen_features, sizes, locations, seen))
            query = layer.norms[2](layer.ffns[0](query))
        return query


def branch(channels: int, outputs: int, norm: bool) -> nn.Sequential:
    """What classifies or locations a query."""
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Linear(channels, channels), *([nn.LayerNorm(channels)] if norm else []), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(channels, outputs))


def start_matrices(part: nn.Module) -> None:
    """Sets matrices as the published code does before anything is learned, but for what `initial_offsets` has set."""
    for name, parameter in part.named_parameters():
        if parameter.ndim > 1 and not any(word in name for word in ("sampling_offsets", "attention_weights", "embeds")):
            nn.init.xavier_uniform_(parameter)
