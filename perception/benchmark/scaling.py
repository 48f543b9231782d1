"""Measures how the time of a frame grows with cameras, image size, grid, queries and batch.

One of them changes at a time. All sizes take turns with the unchanged network, so the ratios are fair.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from perception.benchmark.frames import CAMERAS as SIX
from perception.benchmark.frames import NAMES, example_frame, prepared_network
from perception.benchmark.machine import clock, describe, limited, wait
from perception.benchmark.roofline import MODES, checked_device, count_costs
from perception.errors import ConfigError
from perception.files import replacing, write_json
from perception.inference.acceleration import choose_precision
from perception.models.bev_transformer.config import BEVTransformerConfig
from perception.models.bev_transformer.model import BEVTransformer
from perception.types import Frame, Memory, map_tensors

FACTORS = (0.25, 0.5, 1.0, 2.0)  # of image pixels, cells and queries
CAMERAS, BATCHES = (1, 2, 4, 6, 8), (1, 2, 4)
STRIDE, COARSEST = 32, 4  # sides of images in pixels, and of the grid in cells, are multiples of it
AXES = ("cameras", "image", "grid", "queries", "batch")
TITLES = {
    "cameras": "cameras", "image": "pixels of an image", "grid": "BEV cells", "queries": "queries of boxes and lines",
    "batch": "frames in a batch",
}  # fmt: skip


class Size(NamedTuple):
    """One size along an axis."""

    value: int
    config: BEVTransformerConfig
    cameras: int = SIX
    batch: int = 1
    is_default: bool = False


def sizes(config: BEVTransformerConfig, axis: str) -> list[Size]:
    """Returns the sizes along one axis; one of them is the unchanged network."""
    if axis == "cameras":
        return [Size(count, config, cameras=count, is_default=count == SIX) for count in CAMERAS]
    if axis == "batch":
        return [Size(count, config, batch=count, is_default=count == 1) for count in BATCHES]
    found: dict[int, Size] = {}
    for factor in FACTORS:
        side = factor**0.5
        if axis == "image":
            H, W = (max(1, round(side * length / STRIDE)) * STRIDE for length in config.image_size)
            changed = replace(config, image_size=(H, W))
            value = H * W
        elif axis == "grid":
            X, Y = (max(1, round(side * cells / COARSEST)) * COARSEST for cells in config.grid)
            changed = replace(config, grid=(X, Y))
            value = X * Y
        else:
            boxes, lines = (max(1, round(factor * count)) for count in (config.box_queries, config.line_queries))
            changed = replace(config, box_queries=boxes, line_queries=lines)
            value = boxes + lines
        if factor == 1 or value not in found:  # small networks have few sizes
            found[value] = Size(value, changed, is_default=factor == 1)
    return list(found.values())


def frames_of(network: Any, device: torch.device, cameras: int, batch: int) -> Frame:
    """Makes a batch of frames of a number of cameras; more than six are the first ones again."""
    frame = example_frame(network, device)
    index = torch.arange(cameras, device=device) % frame.images.shape[1]
    rig = map_tensors(lambda x: x[:, index], frame.rig)
    exposure = frame.ego_from_exposure[:, index]
    frame = frame._replace(images=frame.images[:, index], rig=rig, ego_from_exposure=exposure)
    return map_tensors(lambda x: x.expand(batch, *x.shape[1:]).contiguous(), frame)


def measure_scaling(
    models: Sequence[str],
    *,
    axes: Sequence[str] = AXES,
    precision: str = "fp32",
    device: str = "cpu",
    passes: int = 5,
    threads: int = 0,
    cpus: Sequence[int] = (),
    max_seconds: float = 120.0,
    json: Path | None = None,
    progress: bool = False,
) -> dict:
    """Measures presets of the flagship with random weights at several sizes.

    Args:
        models: presets of the flagship.
        axes: some of `AXES`.
        precision: as for `perception.benchmark.roofline.measure_roofline`.
        device: "cpu" or "cuda".
        passes: timed per size.
        threads, cpus: as for `perception.benchmark.machine.limited`.
        max_seconds: per model and axis, after which no further turn begins; at least one is made.
        json: file for the result, rewritten after every axis; None for none.
        progress: show progress on stderr.

    Returns:
        Plain JSON values: "machine", "precision", and "models": for each axis a list of sizes with value, gflop, ms
        (median), and ratio, the median ratio to the unchanged network in the same turn.

    Raises:
        ConfigError: a model is not a preset of the flagship, or an axis, the precision or the device is unknown.
    """
    if unknown := [name for name in axes if name not in AXES]:
        raise ConfigError(f"--axes: {unknown[0]!r} is not known; use some of {', '.join(AXES)}")
    if precision not in MODES:
        raise ConfigError(f"--precision is {precision!r}; use one of {', '.join(MODES)}")
    where = checked_device(device)
    choose_precision(NAMES[precision], where)
    presets = BEVTransformerConfig.presets()
    if unknown := [model for model in models if model not in presets]:
        raise ConfigError(f"--models: {unknown[0]!r} is not a preset of the flagship; use some of {', '.join(presets)}")
    configs = {model: presets[model]() for model in models}
    with limited(cpus, threads) as count:
        content: dict = {"machine": describe(where, count), "precision": precision, "models": {}}
        for model, config in configs.items():
            found = content["models"][model] = {}
            for axis in tqdm(axes, desc=model, unit="axis", disable=not progress):
                found[axis] = _measure_axis(sizes(config, axis), precision, where, passes, max_seconds)
                if json:
                    write_json(json, content)
    return content


def _measure_axis(
    steps: Sequence[Size], precision: str, device: torch.device, passes: int, max_seconds: float
) -> list[dict]:
    networks: dict[BEVTransformerConfig, Any] = {}
    rows, runs = [], []
    for size in steps:
        if size.config not in networks:
            torch.manual_seed(0)
            networks[size.config] = prepared_network(BEVTransformer(size.config).to(device).eval(), MODES[precision])
        network = networks[size.config]
        frame = frames_of(network, device, size.cameras, size.batch)
        state = network.initial_state(size.batch)
        gflop = sum(cost.flop for cost in count_costs(network, frame, state).values()) / 1e9
        rows.append({"value": size.value, "default": size.is_default, "gflop": gflop})
        runs.append(partial(_run, network, frame, state))
    turns: list[list[float]] = []
    begin = time.perf_counter()
    while len(turns) < passes and (not turns or time.perf_counter() - begin < max_seconds):
        turns.append([run() for run in runs])
    seconds = np.array(turns)  # [turns, sizes]
    default = next(number for number, size in enumerate(steps) if size.is_default)
    ratios = np.median(seconds / seconds[:, default, None], 0)
    for row, passes_s, ratio in zip(rows, seconds.T, ratios, strict=True):
        row |= {"ms": 1e3 * float(np.median(passes_s)), "ratio": float(ratio), "passes_ms": (1e3 * passes_s).tolist()}
    return rows


@torch.inference_mode()
def _run(network: Any, frame: Frame, state: Memory) -> float:
    now = clock(frame.images.device)
    start = now()
    network.decode(network(frame, state)[0])
    wait(frame.images.device)
    return now() - start


# ---------------------------------------------------------------------------------------------------- tables and plots


def tables(content: dict) -> str:
    """Formats the result of `measure_scaling` as Markdown; every cell is a value with its ratio of times."""
    parts = []
    for model, axes in content["models"].items():
        lines = [f"| {model}, {content['precision']} | value: times the time (times the FLOP) |", "|---|---|"]
        for axis, rows in axes.items():
            default = next(row for row in rows if row["default"])
            cells = [f"{row['value']}: {row['ratio']:.2f} ({row['gflop'] / default['gflop']:.2f})" for row in rows]
            lines.append(f"| {TITLES[axis]}, {default['ms']:.0f} ms at {default['value']} | {', '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def draw(content: dict, path: str | Path) -> None:
    """Draws the growth along every axis as a PNG: time and FLOP over the value, both as multiples of the default."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    models = content["models"]
    axes = list(next(iter(models.values())))
    figure = Figure(figsize=(3.1 * len(axes), 3.3), layout="constrained")
    panels = figure.subplots(1, len(axes), squeeze=False)[0]
    for panel, axis in zip(panels, axes, strict=True):
        for number, (model, found) in enumerate(models.items()):
            rows, colour = found[axis], f"C{number}"
            default = next(row for row in rows if row["default"])
            x = [row["value"] / default["value"] for row in rows]
            panel.plot(x, [row["ratio"] for row in rows], "o-", color=colour, label=model)
            panel.plot(x, [row["gflop"] / default["gflop"] for row in rows], ":", color=colour, label=f"{model}, FLOP")
        ends = [min(x), max(x)]
        panel.plot(ends, ends, color="0.7", linewidth=1, zorder=0)
        panel.set(xscale="log", yscale="log")
        for side in (panel.xaxis, panel.yaxis):
            side.set_major_locator(FixedLocator([0.1, 0.25, 0.5, 1, 2, 4]))
            side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            side.set_minor_locator(NullLocator())
        panel.set_title(TITLES[axis], fontsize=9)
        panel.set_xlabel("times the default", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("times the time of the default", fontsize=8)
    panels[-1].legend(fontsize=7)
    figure.suptitle(f"Time of a frame in {content['precision']}; grey: proportional", fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)
