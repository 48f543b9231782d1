"""Layers of Sparse4D and SparseDrive, named as in the published checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(channels_in: int, channels: int, loops: int, linears: int = 1) -> list[nn.Module]:
    """Builds the MLP of the published code: `loops` times some linear layers with ReLU, then a layer norm."""
    layers: list[nn.Module] = []
    for _ in range(loops):
        for _ in range(linears):
            layers += [nn.Linear(channels_in, channels), nn.ReLU(inplace=True)]
            channels_in = channels
        layers.append(nn.LayerNorm(channels))
    return layers


class Scale(nn.Module):
    """Multiplies each channel by a learned number."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Scales [..., C]."""
        return x * self.scale


class Attention(nn.Module):
    """Multi-head attention with a residual connection.

    `attn` holds the parameters under their published names, whether the weights were trained with plain attention or,
    as SparseDrive's, with flash attention.
    """

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attn = nn.MultiheadAttention(channels, heads)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, residual: Tensor) -> Tensor:
        """Adds what the queries attend to.

        Args:
            query: [B, Q, C].
            key, value: [B, K, C].
            mask: [B or 1, Q or 1, K] bool, True for keys that a query must not attend to; None for none.
            residual: [B, Q, C], to which the result is added.

        Returns:
            [B, Q, C].
        """
        weights, biases = self.attn.in_proj_weight.chunk(3), self.attn.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, Q or K, C / heads]
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        dropout = self.dropout if self.training else 0.0
        allowed = None if mask is None else ~mask[:, None]
        attended = F.scaled_dot_product_attention(q, k, v, allowed, dropout).transpose(1, 2).flatten(2)
        return residual + F.dropout(self.attn.out_proj(attended), dropout)


class FeedForward(nn.Module):
    """A two-layer MLP after a layer norm. As published, the residual connection starts after the norm."""

    def __init__(self, channels_in: int, hidden: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.pre_norm = nn.LayerNorm(channels_in)
        first = nn.Sequential(nn.Linear(channels_in, hidden), nn.ReLU(inplace=True), nn.Dropout(dropout))
        self.layers = nn.Sequential(first, nn.Linear(hidden, channels), nn.Dropout(dropout))
        self.identity_fc = nn.Linear(channels_in, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Transforms [..., channels_in] to [..., channels]."""
        x = self.pre_norm(x)
        return self.identity_fc(x) + self.layers(x)


class DepthBranch(nn.Module):
    """Predicts a depth per pixel from the image features: an auxiliary task, in training only."""

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        self.depth_layers = nn.ModuleList([nn.Conv2d(channels, 1, 1) for _ in range(levels)])

    def forward(self, features: list[Tensor], focal_px: Tensor) -> list[Tensor]:
        """Predicts depths in metres, as published for a focal length of 100 px.

        Args:
            features: levels [B, N, C, h, w], finest first.
            focal_px: [B, N] focal lengths in pixels of the images.

        Returns:
            [B, N, h, w] for each of the first levels.
        """
        scale = (focal_px / 100.0)[..., None, None]
        pairs = zip(self.depth_layers, features, strict=False)
        return [layer(x.flatten(0, 1).float()).exp().view(*x.shape[:2], *x.shape[3:]) * scale for layer, x in pairs]
