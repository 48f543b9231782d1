"""Multi-scale deformable attention of the published networks.

This is the operator of Deformable DETR (https://arxiv.org/abs/2010.04159), which BEVFormer and MapTR use as a compiled
CUDA extension. Here it is plain PyTorch, or one of the fast implementations of `perception.ops.bilinear`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from perception.ops.bilinear import choose_implementation, weighted_bilinear


def deformable_attention(
    value: Tensor,
    sizes: Sequence[tuple[int, int]],
    locations: Tensor,
    weight: Tensor,
    implementation: str | None = None,
) -> Tensor:
    """Sums bilinear samples with weights, per head, over the sampling locations of all levels.

    Args:
        value: [B, sum of h * w, heads, C], levels one after the other, each row by row.
        sizes: height and width of each level.
        locations: [B, Q, heads, levels, P, 2], x and y, 0..1 over a level; locations outside sample zero.
        weight: [B, Q, heads, levels, P].
        implementation: one of `perception.ops.bilinear.IMPLEMENTATIONS`, None for the fastest.

    Returns:
        [B, Q, heads * C], the channels of head 0 first.

    Raises:
        ConfigError: the implementation is unknown.
    """
    B, _, heads, C = value.shape
    Q = locations.shape[1]
    implementation = choose_implementation(value, implementation, on_cpu="embedding_bag")
    if implementation != "plain":
        dtype = torch.promote_types(torch.promote_types(value.dtype, locations.dtype), weight.dtype)
        parts = value.split([h * w for h, w in sizes], 1)
        levels = [
            weighted_bilinear(
                part.unflatten(1, size)[:, None], locations[:, :, :, level], None, weight[:, :, :, level], border=False,
                dtype=dtype, implementation=implementation,
            )
            for level, (part, size) in enumerate(zip(parts, sizes, strict=True))
        ]  # fmt: skip
        return torch.stack(levels).sum(0).flatten(2) if len(levels) > 1 else levels[0].flatten(2)
    grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # [B * heads, Q, levels, P, 2]
    weight = weight.transpose(1, 2).flatten(0, 1)[:, None]  # [B * heads, 1, Q, levels, P]
    total = value.new_zeros(B * heads, C, Q)
    for level, (part, (h, w)) in enumerate(zip(value.split([h * w for h, w in sizes], 1), sizes, strict=True)):
        per_head = part.permute(0, 2, 3, 1).reshape(B * heads, C, h, w)
        samples = F.grid_sample(per_head, grid[:, :, level], align_corners=False)  # [B * heads, C, Q, P]
        total = total + (samples * weight[:, :, :, level]).sum(-1)
    return total.view(B, heads * C, Q).transpose(1, 2)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Returns the logits of probabilities, clamped to finite values as in the published code."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def refined(locations: Tensor, change: Tensor) -> Tensor:
    """Refines locations in 0..1 by adding a decoder layer's change to their logits.

    Computed in float32 for any precision of the network: bfloat16 would round locations to decimetres, and the gradient
    at a location that is rounded to 1 would be huge.
    """
    return (change.float() + inverse_sigmoid(locations)).sigmoid()
