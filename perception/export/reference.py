"""Runs an exported graph without ONNX Runtime, so that two executors can be compared.

Operators are those of `onnx.reference`, the definition of ONNX in numpy, and where these are too slow for a network of
real size, or refuse what it holds, the ones below: sampling, gathering and resizing in numpy, convolution and pooling
in torch.

Halves are computed in float32 and rounded once per operator. ONNX leaves that to the runtime: ONNX Runtime on a CPU
rounds more rarely, because it runs chains of operators in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops import load_op
from torch.nn import functional

from perception.errors import ConfigError

NEWEST = 20  # the opset whose operators of `onnx.reference` stand in for forms that are not written below
_Conv, _MaxPool, _Resize, _GatherND = (load_op("", kind, NEWEST) for kind in ("Conv", "MaxPool", "Resize", "GatherND"))


class ReferenceSession:
    """Runs one graph as plain ONNX.

    Args:
        model: an `onnx.ModelProto` without subgraphs, or the path of one.

    Raises:
        ConfigError: the graph holds an operator that `onnx.reference` does not know.
    """

    def __init__(self, model: onnx.ModelProto | str | Path) -> None:
        model = model if isinstance(model, onnx.ModelProto) else onnx.load(model)
        try:
            evaluator = ReferenceEvaluator(model, new_ops=OPERATORS)
        except RuntimeError as error:
            raise ConfigError(f"onnx.reference cannot run the graph: {error}") from None
        self.output_names = list(evaluator.output_names)
        self._constants, self._nodes = evaluator.rt_inits_, evaluator.rt_nodes_
        # Values are dropped after their last use: all of them together would take gigabytes.
        last_use = {name: k for k, node in enumerate(self._nodes) for name in (*node.input, *node.output)}
        self._dropped: list[list[str]] = [[] for _ in self._nodes]
        for name in last_use.keys() - {"", *self.output_names}:
            self._dropped[last_use[name]].append(name)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns all outputs by name.

        Args:
            inputs: all inputs by name, in the types of the graph.

        Raises:
            ConfigError: an operator cannot be run with what it is given.
        """
        values = {"": None, **self._constants, **inputs}
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
                values.update(zip(node.output, results, strict=False))  # what nobody asks for has no name
                for name in dropped:
                    del values[name]
        return {name: values[name] for name in self.output_names}


def _in_type(array: np.ndarray | None, old: type, new: type) -> np.ndarray | None:
    return array.astype(new) if array is not None and array.dtype == old else array


def grid_sample(x: np.ndarray, grid: np.ndarray, mode: str, padding: str, align_corners: bool) -> np.ndarray:
    """Samples images at given places, as ONNX defines GridSample.

    Args:
        x: [N, C, H, W] float32.
        grid: [N, h, w, 2] float32, columns then rows; -1 and 1 are the outer edges of the image or, with
            `align_corners`, the centres of its outer pixels.
        mode: "linear" or "nearest", where halves go to the even pixel.
        padding: "zeros", or "border" for the nearest pixel of the image, of what lies outside.

    Returns:
        [N, C, h, w] float32.
    """
    N, C, H, W = x.shape
    _, h, w, _ = grid.shape
    # A ring of one pixel around the image holds all that can be read outside of it.
    beyond = "edge" if padding == "border" else "constant"
    ring = np.pad(x.transpose(0, 2, 3, 1), ((0, 0), (1, 1), (1, 1), (0, 0)), beyond)
    ring = ring.reshape(N, (H + 2) * (W + 2), C)
    column, row = (
        np.clip((g + 1) / 2 * (size - 1) if align_corners else ((g + 1) * size - 1) / 2, -1, size)
        for g, size in ((grid[..., 0].reshape(N, h * w), W), (grid[..., 1].reshape(N, h * w), H))
    )  # [N, h * w], in pixels whose centres are whole numbers
    column, row = np.nan_to_num(column, nan=-1), np.nan_to_num(row, nan=-1)  # ONNX does not say; here they are outside
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
    """Resizes an array axis by axis with linear interpolation, pixel centres at +0.5, edges continued."""
    for axis, (size, scale) in enumerate(zip(sizes, scales, strict=True)):
        given = x.shape[axis]
        if size == given:
            continue
        place = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(scale) - np.float32(0.5)
        low = np.floor(place)
        share = (place - low).reshape([-1 if k == axis else 1 for k in range(x.ndim)])
        one, other = (np.take(x, np.clip(low + k, 0, given - 1).astype(np.int64), axis) for k in (0, 1))
        x = one * (1 - share) + other * share
    return x


class GridSample(OpRun):
    """As `grid_sample`; modes have one name up to opset 19 and another one from 20 on."""

    def _run(self, x, grid, align_corners=None, mode=None, padding_mode=None):
        mode = {"bilinear": "linear"}.get(mode, mode)
        if mode not in ("linear", "nearest") or padding_mode not in ("zeros", "border") or x.ndim != 4:
            raise ConfigError(
                f"GridSample {self.onnx_node.name}: {mode} with {padding_mode} of rank {x.ndim} cannot be run; use "
                "bilinear or nearest with zeros or border, of rank 4"
            )
        return (grid_sample(x, grid, mode, padding_mode, bool(align_corners)),)


class Resize(_Resize):
    """As `resize_linear` where it is that; otherwise as the library does it, one number at a time."""

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
    """Convolution of images by torch."""

    def _run(self, X, W, B=None, **attributes):
        if X.ndim != 4 or self.auto_pad != "NOTSET":
            return super()._run(X, W, B, **attributes)
        x, weight, bias = (None if array is None else _tensor(array) for array in (X, W, B))
        x = functional.pad(x, _outermost_last(self.pads))
        return (functional.conv2d(x, weight, bias, self.strides or 1, 0, self.dilations or 1, self.group).numpy(),)


class MaxPool(_MaxPool):
    """Pooling of images by torch."""

    def _run(self, x, **attributes):
        if x.ndim != 4 or self.auto_pad != "NOTSET" or self.ceil_mode or len(self.onnx_node.output) > 1:
            return super()._run(x, **attributes)
        pixels = functional.pad(_tensor(x), _outermost_last(self.pads), value=-torch.inf)
        return (functional.max_pool2d(pixels, self.kernel_shape, self.strides or 1, 0, self.dilations or 1).numpy(),)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _outermost_last(pads: list[int] | None) -> list[int]:
    """Padding [top, left, bottom, right] of ONNX as torch wants it: left, right, top, bottom."""
    top, left, bottom, right = pads or (0, 0, 0, 0)
    return [left, right, top, bottom]


class GatherElements(OpRun):
    """Takes along an axis; of the other axes, what the indices do not reach is left out."""

    def _run(self, data, indices, axis=None):
        axis = axis % data.ndim
        reached = tuple(slice(None) if k == axis else slice(size) for k, size in enumerate(indices.shape))
        return (np.take_along_axis(data[reached], indices, axis),)


class DequantizeLinear(OpRun):
    """Up to opset 19, whose older forms the library does not have: one scale, or one per index of an axis."""

    def _run(self, x, scale, zero=None, axis=None, block_size=None, output_dtype=None):
        shape = [-1 if k == axis % x.ndim else 1 for k in range(x.ndim)] if scale.size > 1 else ()
        offset = 0 if zero is None else zero.astype(np.float32).reshape(shape)
        return ((x.astype(np.float32) - offset) * scale.reshape(shape),)


class GatherND(_GatherND):
    """Takes all at once instead of one by one."""

    def _run(self, data, indices, batch_dims=None):
        if batch_dims:
            return super()._run(data, indices, batch_dims)
        return (data[tuple(np.moveaxis(indices, -1, 0))],)


OPERATORS = [Conv, MaxPool, Resize, GridSample, DequantizeLinear, GatherElements, GatherND]
