"""Runs an exported graph without ONNX Runtime, as the second executor of certificates.

It uses the operators of `onnx.reference`, the definition of ONNX in numpy. Operators that are too slow there for a
network of real size, or not supported, are replaced below: sampling, gathering and resizing in numpy, convolution and
pooling in torch.

Operators in float16 are computed in float32 and rounded once per operator. ONNX does not define the rounding: ONNX
Runtime on a CPU rounds less often, because it runs chains of operators in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops import load_op
from torch.nn import functional

from perception.errors import ConfigError

NEWEST = 20  # opset of the operators of `onnx.reference` that run the forms which are not implemented below
_Conv: Any = load_op("", "Conv", NEWEST)
_MaxPool: Any = load_op("", "MaxPool", NEWEST)
_Resize: Any = load_op("", "Resize", NEWEST)
_GatherND: Any = load_op("", "GatherND", NEWEST)


class ReferenceSession:
    """Runs one graph as ONNX defines it.

    Args:
        model: without subgraphs, or its path.

    Raises:
        ConfigError: the graph holds an operator that `onnx.reference` does not support.
    """

    def __init__(self, model: onnx.ModelProto | str | Path) -> None:
        model = model if isinstance(model, onnx.ModelProto) else onnx.load(model)
        try:
            evaluator = ReferenceEvaluator(model, new_ops=OPERATORS)
        except RuntimeError as error:
            raise ConfigError(f"onnx.reference cannot run the graph: {error}") from None
        self.output_names = list(evaluator.output_names)
        self._constants, self._nodes = evaluator.rt_inits_, evaluator.rt_nodes_
        # Values are dropped after their last use, because all of them together need gigabytes.
        last_use = {name: k for k, node in enumerate(self._nodes) for name in (*node.input, *node.output)}
        self._dropped: list[list[str]] = [[] for _ in self._nodes]
        for name in last_use.keys() - {"", *self.output_names}:
            self._dropped[last_use[name]].append(name)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the graph and returns all outputs by name.

        Args:
            inputs: all inputs by name, in the types of the graph.

        Raises:
            ConfigError: an operator cannot run with its inputs.
        """
        values: dict[str, Any] = {"": None, **self._constants, **inputs}
        with np.errstate(all="ignore"):
            for node, dropped in zip(self._nodes, self._dropped, strict=True):
                arguments = [values[name] for name in node.input]
                halves = node.op_type != "Cast" and any(x is not None and x.dtype == np.float16 for x in arguments)
                if halves:
                    arguments = [_in_type(x, np.float16, np.float32) for x in arguments]
                try:
                    results = node.run(*arguments)
                except (ValueError, IndexError, RuntimeError) as error:
                    raise ConfigError(f"{node.op_type} {node.onnx_node.name} cannot be run: {error}") from None
                if halves:
                    results = [_in_type(x, np.float32, np.float16) for x in results]
                values.update(zip(node.output, results, strict=False))  # optional outputs may have no name
                for name in dropped:
                    del values[name]
        return {name: values[name] for name in self.output_names}


def _in_type(array: np.ndarray | None, old: type, new: type) -> np.ndarray | None:
    return array.astype(new) if array is not None and array.dtype == old else array


def grid_sample(x: np.ndarray, grid: np.ndarray, mode: str, padding: str, align_corners: bool) -> np.ndarray:
    """Samples images at given locations, as ONNX defines GridSample.

    Args:
        x: [N, C, H, W] float32.
        grid: [N, h, w, 2] float32, columns then rows; -1 and 1 are the outer edges of the image or, with
            `align_corners`, the centres of its outer pixels.
        mode: "linear", or "nearest", which rounds ties to the even pixel.
        padding: values outside the image: "zeros", or "border" for the nearest pixel of the image.

    Returns:
        [N, C, h, w] float32.
    """
    N, C, H, W = x.shape
    _, h, w, _ = grid.shape
    # Locations outside the image are clipped to a ring of one pixel around it.
    beyond: Literal["edge", "constant"] = "edge" if padding == "border" else "constant"
    ring = np.pad(x.transpose(0, 2, 3, 1), ((0, 0), (1, 1), (1, 1), (0, 0)), beyond)
    ring = ring.reshape(N, (H + 2) * (W + 2), C)
    column, row = (
        np.clip((g + 1) / 2 * (size - 1) if align_corners else ((g + 1) * size - 1) / 2, -1, size)
        for g, size in ((grid[..., 0].reshape(N, h * w), W), (grid[..., 1].reshape(N, h * w), H))
    )  # [N, h * w], in pixels whose centres are whole numbers
    column, row = np.nan_to_num(column, nan=-1), np.nan_to_num(row, nan=-1)  # outside; not defined by ONNX
    if mode == "nearest":
        corners = [(np.rint(row), np.rint(column), None)]
    else:
        top, left = np.floor(row), np.floor(column)
        down, right = row - top, column - left
        corners = [
            (top, left, (1 - down) * (1 - right)),
            (top, np.minimum(left + 1, W), (1 - down) * right),
            (np.minimum(top + 1, H), left, down * (1 - right)),
            (np.minimum(top + 1, H), np.minimum(left + 1, W), down * right),
        ]
    sampled = np.zeros((N, h * w, C), x.dtype)
    for row, column, weight in corners:
        index = ((row + 1) * (W + 2) + column + 1).astype(np.int64)
        for n in range(N):
            pixels = ring[n, index[n]]
            sampled[n] += pixels if weight is None else pixels * weight[n, :, None]
    return sampled.transpose(0, 2, 1).reshape(N, C, h, w)


def resize_linear(x: np.ndarray, sizes: tuple[int, ...], scales: tuple[float, ...]) -> np.ndarray:
    """Resizes an array axis by axis with linear interpolation, pixel centres at +0.5 and repeated edges."""
    for axis, (size, scale) in enumerate(zip(sizes, scales, strict=True)):
        given = x.shape[axis]
        if size == given:
            continue
        position = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(scale) - np.float32(0.5)
        low = np.floor(position)
        share = (position - low).reshape([-1 if k == axis else 1 for k in range(x.ndim)])
        one, other = (np.take(x, np.clip(low + k, 0, given - 1).astype(np.int64), axis) for k in (0, 1))
        x = one * (1 - share) + other * share
    return x


class GridSample(OpRun):
    """Runs `grid_sample`. The linear mode is named bilinear up to opset 19."""

    def _run(self, x, grid, align_corners=None, mode=None, padding_mode=None):
        mode = {"bilinear": "linear"}.get(mode, mode)
        if mode not in ("linear", "nearest") or padding_mode not in ("zeros", "border") or x.ndim != 4:
            raise ConfigError(
                f"GridSample {self.onnx_node.name}: {mode} with {padding_mode} of rank {x.ndim} cannot be run; use "
                "bilinear or nearest with zeros or border, of rank 4"
            )
        return (grid_sample(x, grid, mode, padding_mode, bool(align_corners)),)


class Resize(_Resize):
    """Runs `resize_linear` if possible, otherwise the slow implementation of `onnx.reference`."""

    def _run(self, X, roi=None, scales=None, sizes=None, **attributes):
        stretched = (self.mode, self.coordinate_transformation_mode) == ("linear", "half_pixel")
        special = self.antialias or self.exclude_outside or self.keep_aspect_ratio_policy != "stretch" or self.axes
        if not stretched or special:
            return super()._run(X, roi, scales, sizes, **attributes)
        if sizes is None:
            sizes = np.floor(np.array(X.shape) * scales).astype(int)
        else:
            scales = np.asarray(sizes) / X.shape
        return (resize_linear(X, tuple(sizes), tuple(scales)),)


class Conv(_Conv):
    """Runs convolutions of images in torch."""

    def _run(self, X, W, B=None, **attributes):
        if X.ndim != 4 or self.auto_pad != "NOTSET":
            return super()._run(X, W, B, **attributes)
        x, weight, bias = (None if array is None else _tensor(array) for array in (X, W, B))
        x = functional.pad(x, _outermost_last(self.pads))
        return (functional.conv2d(x, weight, bias, self.strides or 1, 0, self.dilations or 1, self.group).numpy(),)


class MaxPool(_MaxPool):
    """Runs pooling of images in torch."""

    def _run(self, x, **attributes):
        if x.ndim != 4 or self.auto_pad != "NOTSET" or self.ceil_mode or len(self.onnx_node.output) > 1:
            return super()._run(x, **attributes)
        pixels = functional.pad(_tensor(x), _outermost_last(self.pads), value=-torch.inf)
        return (functional.max_pool2d(pixels, self.kernel_shape, self.strides or 1, 0, self.dilations or 1).numpy(),)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _outermost_last(pads: list[int] | None) -> list[int]:
    """Converts padding from ONNX' order [top, left, bottom, right] to torch's order [left, right, top, bottom]."""
    top, left, bottom, right = pads or (0, 0, 0, 0)
    return [left, right, top, bottom]


class GatherElements(OpRun):
    """Gathers along one axis. The other axes are cut to the shape of the indices."""

    def _run(self, data, indices, axis=None):
        axis = axis % data.ndim
        reached = tuple(slice(None) if k == axis else slice(size) for k, size in enumerate(indices.shape))
        return (np.take_along_axis(data[reached], indices, axis),)


class DequantizeLinear(OpRun):
    """Dequantizes with one scale, or one per index of an axis. `onnx.reference` lacks the forms up to opset 19."""

    def _run(self, x, scale, zero=None, axis=None, block_size=None, output_dtype=None):
        shape = [-1 if k == axis % x.ndim else 1 for k in range(x.ndim)] if scale.size > 1 else ()
        offset = 0 if zero is None else zero.astype(np.float32).reshape(shape)
        return ((x.astype(np.float32) - offset) * scale.reshape(shape),)


class GatherND(_GatherND):
    """Gathers all elements at once instead of one by one."""

    def _run(self, data, indices, batch_dims=None):
        if batch_dims:
            return super()._run(data, indices, batch_dims)
        return (data[tuple(np.moveaxis(indices, -1, 0))],)


OPERATORS: list[type[OpRun]] = [Conv, MaxPool, Resize, GridSample, DequantizeLinear, GatherElements, GatherND]
