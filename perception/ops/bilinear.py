"""Weighted sums of bilinear samples, fused so that single samples are never stored, for CPUs and GPUs.

`perception.ops.sampling` and `perception.ops.deformable` have the public functions and their plain implementations;
this module has the fast implementations behind them. Every public function takes `implementation`:

- "plain": `F.grid_sample`, then a product and a sum. It is the definition, and the implementation in exports.
- "embedding_bag": for CPUs. A bilinear sample is a weighted sum of four rows of a table.
- "gather": the same with standard operators of ONNX, for exports that run on CPUs, see `exporting_for_cpu`.
- "triton": one forward and one backward kernel for GPUs, registered as a PyTorch operator, so that `torch.compile` and
  CUDA graphs include it.
- None: the fastest one for the device of the tensors, see `choose_implementation`.

"embedding_bag" and "triton" do not read samples of weight zero: their values may be NaN, and the gradient of such a
weight is zero. The fast implementations compute in float32 for any dtype of the maps. On GPUs the gradient of the maps
is summed by atomic additions, so its last bits differ from run to run, as those of `F.grid_sample` do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from shutil import which
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perception.errors import ConfigError

IMPLEMENTATIONS = ("plain", "embedding_bag", "gather", "triton")
GATHERED = 2**24  # numbers that "gather" reads at once; they need 64 MiB
# Triton compiles a launcher with a C compiler when a kernel runs for the first time; slim containers have none.
HAS_TRITON = find_spec("triton") is not None and bool(os.environ.get("CC") or any(map(which, ("cc", "gcc", "clang"))))

_preferred: str | None = None
_exported = "plain"


@contextmanager
def exporting_for_cpu() -> Iterator[None]:
    """Makes exports within the block sample with "gather", where "embedding_bag" is the fastest on CPUs.

    Runtimes on CPUs read one channel after the other in GridSample, and a row of a table at once in Gather.
    """
    global _exported
    before, _exported = _exported, "gather"
    try:
        yield
    finally:
        _exported = before


@contextmanager
def preferred_implementation(implementation: str) -> Iterator[None]:
    """Makes an implementation the default within the block, for example to compare networks.

    Raises:
        ConfigError: the implementation is unknown.
    """
    global _preferred
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(f"implementation is {implementation!r}; use one of {', '.join(IMPLEMENTATIONS)}")
    before, _preferred = _preferred, implementation
    try:
        yield
    finally:
        _preferred = before


def choose_implementation(maps: Tensor, implementation: str | None, on_cpu: str) -> str:
    """Returns the implementation to use: the given one, or the fastest one.

    Args:
        maps: feature maps to sample.
        implementation: one of `IMPLEMENTATIONS`, or None.
        on_cpu: the fastest one on CPUs.

    Raises:
        ConfigError: the implementation is unknown.
    """
    if implementation is not None:
        if implementation not in IMPLEMENTATIONS:
            raise ConfigError(f"implementation is {implementation!r}; use one of {', '.join(IMPLEMENTATIONS)}")
        return implementation
    if torch.compiler.is_exporting():
        return _exported if on_cpu == "embedding_bag" else "plain"
    if maps.dtype == torch.float64:
        return "plain"
    if _preferred is not None:
        return _preferred
    if maps.device.type == "cpu":
        return on_cpu
    return "triton" if HAS_TRITON and maps.device.type == "cuda" else "plain"


def is_channels_last(tensor: Tensor) -> bool:
    """Returns whether a tensor [B, C, H, W] is stored in channels_last memory format and not in the default one."""
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def weighted_bilinear(
    maps: Tensor,
    locations: Tensor,
    index: Tensor | None,
    weight: Tensor,
    *,
    border: bool,
    dtype: torch.dtype,
    implementation: str,
) -> Tensor:
    """Sums bilinear samples of maps with weights.

    Args:
        maps: [B, N, h, w, heads, C]; fastest if contiguous, that is for maps in channels_last.
        locations: [B, Q, heads, S, 2] x and y, 0..1 over width and height.
        index: [B, Q, heads, S] integers, index of the map to sample, 0 to N - 1; None for map 0.
        weight: [B, Q, heads, S].
        border: whether locations outside are clamped to the centre of the nearest border pixel; else they sample zero.
        dtype: of the result.
        implementation: "embedding_bag", "gather" or "triton".

    Returns:
        [B, Q, heads, C].
    """
    if implementation == "triton":
        return _fused(maps.contiguous(), locations, index, weight, border, dtype)
    inputs = maps.float(), locations.float(), index, weight.float(), border
    return _summed_rows(*inputs, gather=implementation == "gather").to(dtype)


def _summed_rows(
    maps: Tensor, locations: Tensor, index: Tensor | None, weight: Tensor, border: bool, gather: bool
) -> Tensor:
    """Computes `weighted_bilinear` on a CPU, in float32, by sums of rows of a table."""
    B, N, h, w, heads, C = maps.shape
    _, Q, _, S, _ = locations.shape
    device = maps.device
    first_map = torch.arange(0, B * N, N, device=device).view(B, 1, 1, 1)
    index = first_map.expand(-1, Q, heads, S) if index is None else index + first_map
    head = torch.arange(heads, device=device).view(1, 1, heads, 1).expand(B, Q, -1, S)
    locations, weight, index, head = locations.reshape(-1, 2), weight.reshape(-1), index.reshape(-1), head.reshape(-1)
    offsets = None
    # Samples of weight zero are skipped. Their number depends on data, which would split a compiled graph.
    if not (gather or torch.compiler.is_compiling()):
        counts = weight != 0
        kept = counts.nonzero()[:, 0]
        locations, weight, index, head = (x.index_select(0, kept) for x in (locations, weight, index, head))
        ends = counts.view(-1, S).sum(-1).cumsum(0) * 4
        offsets = F.pad(ends.int(), (1, 0))
    x0, x1, x_share, x0_inside, x1_inside = _along(locations[:, 0], w, border)
    y0, y1, y_share, y0_inside, y1_inside = _along(locations[:, 1], h, border)
    lower = weight * y_share
    upper = weight - lower
    if not border:
        lower, upper = lower * y1_inside, upper * y0_inside
    right, left = x_share, 1 - x_share
    if not border:
        right, left = right * x1_inside, left * x0_inside
    row0, row1 = (index * h + y0) * w, (index * h + y1) * w
    rows = torch.stack([row0 + x0, row0 + x1, row1 + x0, row1 + x1], -1) * heads + head[:, None]
    share = torch.stack([upper * left, upper * right, lower * left, lower * right], -1)
    rows = rows.int() if B * N * h * w * heads < 2**31 else rows
    if offsets is None:
        rows, share = rows.view(-1, 4 * S), share.view(-1, 4 * S)
    else:
        rows, share = rows.flatten(), share.flatten()
    table = maps.reshape(-1, C)
    if gather:
        at_once = max(1, GATHERED // (4 * S * C))
        pairs = zip(rows.split(at_once), share.split(at_once), strict=True)
        summed = torch.cat([torch.bmm(part[:, None], F.embedding(chosen, table)) for chosen, part in pairs])
    else:
        summed = F.embedding_bag(
            rows, table, offsets, mode="sum", per_sample_weights=share, include_last_offset=offsets is not None
        )
    return summed.view(B, Q, heads, C)


def _along(location: Tensor, size: int, border: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns both neighbouring pixels along one axis, the weight of the second, and whether each is on the map."""
    at = location * size - 0.5
    at = at.clamp(0, size - 1) if border else at.clamp(-2, size + 1)
    first = at.detach().floor()
    share = at - first
    first = first.long()
    second = first + 1
    first_inside, second_inside = (first >= 0) & (first < size), (second >= 0) & (second < size)
    return first.clamp(0, size - 1), second.clamp(0, size - 1), share, first_inside, second_inside


# The schemas are explicit: older versions of PyTorch cannot infer them from annotations that are strings.
@torch.library.custom_op(
    "perception::weighted_bilinear",
    mutates_args=(),
    schema="(Tensor maps, Tensor locations, Tensor? index, Tensor weight, bool border, ScalarType dtype) -> Tensor",
)
def _fused(
    maps: Tensor, locations: Tensor, index: Tensor | None, weight: Tensor, border: bool, dtype: torch.dtype
) -> Tensor:
    from perception.ops import kernels  # imported here, because machines without a GPU may lack Triton

    return kernels.forward(maps, locations, index, weight, border, dtype)


@torch.library.custom_op(
    "perception::weighted_bilinear_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor maps, Tensor locations, Tensor? index, Tensor weight, bool border)"
    " -> (Tensor, Tensor, Tensor)",
)
def _fused_backward(
    grad: Tensor, maps: Tensor, locations: Tensor, index: Tensor | None, weight: Tensor, border: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from perception.ops import kernels

    return kernels.backward(grad, maps, locations, index, weight, border)


@_fused.register_fake
def _fake(
    maps: Tensor, locations: Tensor, index: Tensor | None, weight: Tensor, border: bool, dtype: torch.dtype
) -> Tensor:
    B, Q, heads = locations.shape[:3]
    return maps.new_empty(B, Q, heads, maps.shape[-1], dtype=dtype)


@_fused_backward.register_fake
def _fake_backward(
    grad: Tensor, maps: Tensor, locations: Tensor, index: Tensor | None, weight: Tensor, border: bool
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (maps, locations, weight))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    maps, locations, index, weight, border, _ = inputs
    ctx.save_for_backward(maps, locations, index, weight)
    ctx.border = border


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    maps, locations, index, weight = ctx.saved_tensors
    maps_grad, locations_grad, weight_grad = _fused_backward(grad, maps, locations, index, weight, ctx.border)
    return maps_grad, locations_grad, None, weight_grad, None, None


_fused.register_autograd(_gradients, setup_context=_save)
