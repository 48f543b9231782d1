"""The BEV encoder of MapQR (https://arxiv.org/abs/2402.17430): BEVFormer's, with pillars whose heights are learned.

Modules are named as in the published checkpoints. Coordinate frames are described in
`perception.models.published.geometry`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perception.models.mapqr.config import MapQRConfig
from perception.models.published.decoder import FeedForward
from perception.models.published.encoder import KernelLayers, TemporalSelfAttention, kernel_offsets
from perception.models.published.geometry import cell_centers, constants, image_references
from perception.ops.deformable import deformable_attention


def initial_heights(config: MapQRConfig, like: Tensor) -> Tensor:
    """Returns the heights of the points of a pillar before the first layer: [Z], normalised to 0..1 over the range.

    As published, they run from one end of the range to the other, not from half a metre inside as in BEVFormer.
    """
    return torch.linspace(0, 1, config.pillar_points, dtype=torch.float32, device=like.device)


def project_heights(
    config: MapQRConfig, heights: Tensor, img_from_lidar: Tensor, image_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Projects pillar points at given heights into the cameras, in float32.

    Args:
        config: the grid and its range.
        heights: [B, h * w, Z], normalised over the range; they may leave 0..1.
        img_from_lidar: [B, N, 4, 4] from `lidar_projections`.
        image_size: height and width in pixels of the images that `img_from_lidar` projects to.

    Returns:
        Reference points [B, N, h * w, Z, 2], x and y normalised to 0..1 over the image; whether the image shows the
        point [B, N, h * w, Z] bool.
    """
    matrix = img_from_lidar.float()
    low, high = (constants(x, matrix) for x in (config.low, config.high))
    xy = low[:2] + cell_centers(*config.bev, matrix.device) * (high - low)[:2]  # [h * w, 2]
    z = low[2] + heights.float() * (high - low)[2]  # [B, h * w, Z]
    # Products and sums instead of a matrix product, which autocast would run in half precision. All points of a pillar
    # share the part of x and y.
    ground = (matrix[:, :, None, :, :2] * xy[:, None]).sum(-1) + matrix[:, :, None, :, 3]  # [B, N, h * w, 4]
    projected = ground[:, :, :, None] + z[:, None, ..., None] * matrix[:, :, None, None, :, 2]
    return image_references(projected, image_size)


class HeightKernelAttention(nn.Module):
    """Attention of each BEV cell to the kernels of pixels around the points of its pillar, whose heights it learns.

    Each attention head reads the kernel around one point, bilinearly, in all cameras that see the pillar.
    """

    kernel: Tensor

    def __init__(self, config: MapQRConfig) -> None:
        super().__init__()
        self.config = config
        C, Z = config.channels, config.pillar_points
        self.register_buffer("kernel", kernel_offsets(config.gkt_kernel), persistent=False)  # [P, 2]
        self.attention = KernelLayers(C, Z, len(self.kernel))
        self.output_proj = nn.Linear(C, C)
        self.height_offsets = nn.Linear(C, Z)  # metres

    def forward(
        self, query: Tensor, features: Tensor, size: tuple[int, int], heights: Tensor, img_from_lidar: Tensor,
        image_size: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Adds the attended features to the queries.

        Args:
            query: [B, Q, C], one per BEV cell.
            features: image features [B, N, h * w, C].
            size: (h, w).
            heights: of the points of each pillar [B, Q, Z], normalised over the range.
            img_from_lidar, image_size: as in `project_heights`.

        Returns:
            Queries [B, Q, C]; heights [B, Q, Z] with the offsets of this layer, for the next one.
        """
        B, N, S, C = features.shape
        Z = heights.shape[-1]
        config, layers = self.config, self.attention
        heights = heights + self.height_offsets(query).float() / (config.high[2] - config.low[2])
        references, inside = project_heights(config, heights, img_from_lidar, image_size)
        visible = inside.any(-1)  # [B, N, Q]
        value = layers.value_proj(features).view(B, N, S, Z, C // Z)
        weights = layers.attention_weights(query).view(B, -1, Z, len(self.kernel)).softmax(-1)  # [B, Q, Z, P]
        offsets = self.kernel / constants([size[1], size[0]], references)
        total = torch.zeros_like(query)
        for n in range(N):  # a weight of zero where a camera does not see the pillar skips its samples
            locations = (references[:, n, :, :, None] + offsets)[:, :, :, None]  # [B, Q, Z, 1, P, 2]
            masked = (weights * visible[:, n, :, None, None])[:, :, :, None]
            total = total + deformable_attention(value[:, n], [size], locations, masked)
        mean = total / visible.sum(1).clamp(min=1)[..., None]
        return self.output_proj(mean) + query, heights


class MapQREncoderLayer(nn.Module):
    """One layer of the BEV encoder: self-attention, height kernel attention, feed-forward."""

    def __init__(self, config: MapQRConfig) -> None:
        super().__init__()
        C = config.channels
        self.config = config
        self.attentions = nn.ModuleList(
            [TemporalSelfAttention(C, config.heads, config.points), HeightKernelAttention(config)]
        )
        self.ffns = nn.ModuleList([FeedForward(C, config.feed_forward)])
        self.norms = nn.ModuleList([nn.LayerNorm(C) for _ in range(3)])

    def forward(
        self, query: Tensor, position: Tensor, features: Tensor, size: tuple[int, int], heights: Tensor,
        img_from_lidar: Tensor, image_size: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Updates BEV queries [B, h * w, C] and heights [B, h * w, Z].

        Args:
            query: BEV queries.
            position: their positional encoding [1, h * w, C].
            features, size, heights, img_from_lidar, image_size: as in `HeightKernelAttention.forward`.
        """
        # Without a previous frame both inputs of temporal self-attention are the present BEV queries.
        cells = cell_centers(*self.config.bev, query.device).expand(len(query), 2, -1, -1)
        values = torch.stack([query, query], 1)
        query = self.norms[0](self.attentions[0](query, position, values, cells, self.config.bev))
        query, heights = self.attentions[1](query, features, size, heights, img_from_lidar, image_size)
        query = self.norms[1](query)
        return self.norms[2](self.ffns[0](query)), heights
