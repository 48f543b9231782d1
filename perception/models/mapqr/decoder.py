"""The decoder of MapQR (https://arxiv.org/abs/2402.17430): one query per line, scattered to its points and gathered.

Modules are named as in the published checkpoints.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from perception.models.mapqr.config import MapQRConfig
from perception.models.published.decoder import BEVCrossAttention, FeedForward, LayerStack, QuerySelfAttention


def sine_embedding(points: Tensor, channels: int) -> Tensor:
    """Encodes positions by sines and cosines of geometrically spaced wavelengths.

    Args:
        points: [..., 2], x and y normalised to 0..1.
        channels: of the encoding, a multiple of 4.

    Returns:
        [..., channels]: y, then x; of each the sine and the cosine of every wavelength in turn.
    """
    half = channels // 2
    exponent = torch.arange(0, half, 2, device=points.device, dtype=torch.float32) / half
    angle = 2 * math.pi * points.float().flip(-1)[..., None] / 10000.0**exponent  # [..., 2, channels / 4]
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-3)


class InstancePointAttention(BEVCrossAttention):
    """Scatters each instance query to its points, samples BEV features around them, and gathers what they read."""

    def __init__(self, config: MapQRConfig) -> None:
        C, P = config.channels, config.line_points
        super().__init__(C, config.heads, config.points)
        self.output_proj = nn.Sequential(
            nn.Linear(C * P, C * P // 2), nn.ReLU(), nn.Linear(C * P // 2, C), nn.ReLU(), nn.Linear(C, C)
        )

    def forward(
        self, query: Tensor, position: Tensor, bev: Tensor, references: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """Adds the attended features to the queries.

        Args:
            query: [B, Q, C].
            position: positional encoding of each point [B, Q, P, C].
            bev: BEV features [B, h * w, C].
            references: reference points [B, Q, P, 2], x and y normalised to 0..1.
            size: (h, w).

        Returns:
            [B, Q, C].
        """
        Q, P = position.shape[1:3]
        scattered = (query[:, :, None] + position).flatten(1, 2)  # [B, Q * P, C]
        samples = self.attend(scattered, bev, references.flatten(1, 2), size)  # [B, Q * P, C]
        return self.output_proj(samples.unflatten(1, (Q, P)).flatten(2)) + query


class MapQRDecoderLayer(nn.Module):
    """One decoder layer: self-attention among instances, without positions; attention to BEV features; feed-forward."""

    def __init__(self, config: MapQRConfig) -> None:
        super().__init__()
        C = config.channels
        self.attentions = nn.ModuleList([QuerySelfAttention(C, config.heads), InstancePointAttention(config)])
        self.ffns = nn.ModuleList([FeedForward(C, config.feed_forward)])
        self.norms = nn.ModuleList([nn.LayerNorm(C) for _ in range(3)])

    def forward(
        self,
        query: Tensor,
        position: Tensor,
        bev: Tensor,
        references: Tensor,
        size: tuple[int, int],
        mask: Tensor | None,
    ) -> Tensor:
        """Updates queries [B, Q, C].

        Args:
            query, position, bev, references, size: as in `InstancePointAttention.forward`.
            mask: [Q, Q] bool, True for pairs of instances that must not attend to each other.
        """
        query = self.norms[0](self.attentions[0](query, None, mask))
        query = self.norms[1](self.attentions[1](query, position, bev, references, size))
        return self.norms[2](self.ffns[0](query))


class MapQRDecoder(LayerStack):
    """The decoder layers, and the projections of the positional encodings of points, one per layer."""

    def __init__(self, config: MapQRConfig) -> None:
        super().__init__([MapQRDecoderLayer(config) for _ in range(config.decoder_layers)])
        self.pt_pos_query_projs = nn.ModuleList([nn.Linear(config.channels, config.channels) for _ in self.layers])
