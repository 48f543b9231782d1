"""Multi-scale deformable attention as the published networks use it.

The operator of Deformable DETR (https://arxiv.org/abs/2010.04159), which BEVFormer and MapTR run as a compiled one.
Here it is plain PyTorch, or one of the fast implementations of `perception.ops.bilinear`.
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
    """The weighted sum of what each head reads at its locations on all levels.

    Args:
        value: [B, sum of h * w, heads, C], levels one after the other, each row by row.
        sizes: height and width of each level.
        locations: [B, Q, heads, levels, P, 2], x and y with 0..1 over a level; what lies outside reads zero.
        weight: [B, Q, heads, levels, P].
        implementation: of `perception.ops.bilinear.IMPLEMENTATIONS`, None for the fastest.

    Returns:
        [B, Q, heads * C], the channels of head 0 first.

    Raises:
        ConfigError: the implementation is not known.
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
        read = F.grid_sample(per_head, grid[:, :, level], align_corners=False)  # [B * heads, C, Q, P]
        total = total + (read * weight[:, :, :, level]).sum(-1)
    return total.view(B, heads * C, Q).transpose(1, 2)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """The logit of probabilities, kept finite as the published code does."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def refined(locations: Tensor, change: Tensor) -> Tensor:
    """Places in 0..1 after a decoder layer has changed their logits.

    In float32 whatever the network runs in: bfloat16 would round them to decimetres, and the gradient at a place that
    is rounded to one would be huge.
    """
    return (change.float() + inverse_sigmoid(locations)).sigmoid()
