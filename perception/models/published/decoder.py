"""Decoder layers of the published networks, and the layers that encoders and decoders share.

Modules are named as in the published checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perception.models.published.geometry import PublishedConfig, constants
from perception.ops.deformable import deformable_attention


class FeedForward(nn.Module):
    """A two-layer MLP with a residual connection."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        first = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(inplace=True))
        self.layers = nn.Sequential(first, nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Transforms [..., C] to [..., C]."""
        return x + self.layers(x)


def init_sampling(offsets: nn.Linear, weights: nn.Linear, heads: int, groups: int, points: int) -> None:
    """Sets initial offsets and uniform attention weights (Deformable DETR, https://arxiv.org/abs/2010.04159).

    The offsets of each head point in another direction; those of successive points are farther away.

    Args:
        offsets: layer that predicts sampling offsets [heads, groups, points, 2].
        weights: layer that predicts attention weights [heads, groups, points].
        heads: attention heads.
        groups: feature levels or BEV feature tensors; all get the same offsets.
        points: sampling points per head and group.
    """
    angle = torch.arange(heads) * (2 * math.pi / heads)
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    initial = direction.view(heads, 1, 1, 2) * (torch.arange(points) + 1).view(1, 1, points, 1)
    nn.init.zeros_(offsets.weight)
    for parameter in weights.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        offsets.bias.copy_(initial.expand(-1, groups, -1, -1).reshape(-1))


class QuerySelfAttention(nn.Module):
    """Multi-head self-attention among decoder queries, with a residual connection."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(channels, heads, batch_first=True)

    def forward(self, query: Tensor, position: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """Adds the attended queries.

        Args:
            query: [B, Q, C].
            position: positional encoding [B, Q, C], added to queries and keys; None for none.
            mask: [Q, Q] bool, True for pairs that must not attend to each other.

        Returns:
            [B, Q, C].
        """
        key = query if position is None else query + position
        return query + self.attn(key, key, query, attn_mask=mask, need_weights=False)[0]


class BEVCrossAttention(nn.Module):
    """Deformable cross-attention of decoder queries to BEV features around their reference points."""

    def __init__(self, channels: int, heads: int, points: int) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        self.sampling_offsets = nn.Linear(channels, heads * points * 2)
        self.attention_weights = nn.Linear(channels, heads * points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj: nn.Module = nn.Linear(channels, channels)
        init_sampling(self.sampling_offsets, self.attention_weights, heads, 1, points)

    def forward(
        self, query: Tensor, position: Tensor, bev: Tensor, references: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """Adds the attended features to the queries.

        Args:
            query: [B, Q, C].
            position: positional encoding [B, Q, C].
            bev: BEV features [B, h * w, C].
            references: reference points [B, Q, 2], x and y normalised to 0..1.
            size: (h, w).

        Returns:
            [B, Q, C].
        """
        return self.output_proj(self.attend(query + position, bev, references, size)) + query

    def attend(self, context: Tensor, bev: Tensor, references: Tensor, size: tuple[int, int]) -> Tensor:
        """Samples BEV features [B, Q, C] for queries with position [B, Q, C], before the output projection."""
        B, Q, C = context.shape
        offsets = self.sampling_offsets(context).view(B, Q, self.heads, 1, self.points, 2)
        weights = self.attention_weights(context).view(B, Q, self.heads, 1, self.points).softmax(-1)
        locations = references[:, :, None, None, None] + offsets / constants([size[1], size[0]], offsets)
        value = self.value_proj(bev).view(B, -1, self.heads, C // self.heads)
        return deformable_attention(value, [size], locations, weights)


class DecoderLayer(nn.Module):
    """One DETR-like decoder layer: query self-attention, BEV cross-attention, feed-forward."""

    def __init__(self, config: PublishedConfig) -> None:
        super().__init__()
        C, heads = config.channels, config.heads
        self.attentions = nn.ModuleList([QuerySelfAttention(C, heads), BEVCrossAttention(C, heads, config.points)])
        self.ffns = nn.ModuleList([FeedForward(C, config.feed_forward)])
        self.norms = nn.ModuleList([nn.LayerNorm(C) for _ in range(3)])

    def forward(
        self, query: Tensor, position: Tensor, bev: Tensor, references: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """Updates queries [B, Q, C]; arguments as in `BEVCrossAttention.forward`."""
        query = self.norms[0](self.attentions[0](query, position))
        query = self.norms[1](self.attentions[1](query, position, bev, references, size))
        return self.norms[2](self.ffns[0](query))


class LayerStack(nn.Module):
    """Layers under the name that the published checkpoints give them; the parent runs them."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class LearnedPositionalEncoding(nn.Module):
    """A learned positional encoding of a grid: an embedding per column and one per row, concatenated."""

    def __init__(self, size: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(size[0], channels // 2)
        self.col_embed = nn.Embedding(size[1], channels // 2)

    def forward(self) -> Tensor:
        """Returns the encoding of all cells, row by row: [1, h * w, C]."""
        rows, columns = self.row_embed.weight, self.col_embed.weight
        h, w = len(rows), len(columns)
        return torch.cat([columns.expand(h, -1, -1), rows[:, None].expand(-1, w, -1)], -1).flatten(0, 1)[None]


def class_branches(channels: int, classes: int, layers: int) -> nn.ModuleList:
    """Builds the classification branch of each decoder layer, with an initial score of 0.01 (RetinaNet)."""
    branches = [_branch(channels, classes, norm=True) for _ in range(layers)]
    for branch in branches:
        nn.init.constant_(branch[-1].get_parameter("bias"), -math.log(99))
    return nn.ModuleList(branches)


def regression_branches(channels: int, outputs: int, layers: int) -> nn.ModuleList:
    """Builds the regression branch of each decoder layer."""
    return nn.ModuleList([_branch(channels, outputs, norm=False) for _ in range(layers)])


def _branch(channels: int, outputs: int, norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Linear(channels, channels), *([nn.LayerNorm(channels)] if norm else []), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(channels, outputs))


def init_matrices(module: nn.Module) -> None:
    """Initialises weight matrices as the published code does, except embeddings and those of `init_sampling`."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1 and not any(word in name for word in ("sampling_offsets", "attention_weights", "embeds")):
            nn.init.xavier_uniform_(parameter)
