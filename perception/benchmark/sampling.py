"""Compares the fast implementations of deformable sampling with the plain one, at the tensor sizes of networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from perception.benchmark.frames import CAMERAS, DTYPES, load_network, time_interleaved, timings
from perception.benchmark.stages import Recorder
from perception.inference.acceleration import capture_graph
from perception.ops import sample_bev, sample_cameras

LIMIT = 20.0  # seconds of one measurement, with compilation of the kernel
PRECISIONS = {"fp32": torch.float32} | DTYPES
UNSEEN = 0.41  # share of samples that are outside all cameras of a usual rig


class Sampling(NamedTuple):
    """A function of `perception.ops` and random inputs of the sizes in a network; other arguments are bound."""

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]  # inputs that have gradients


def network_samplings(network: Any, precision: str, seed: int = 0) -> dict[str, Sampling]:
    """Makes the sampling operations of a network, by the name of the function.

    Args:
        network: a `BEVTransformer`.
        precision: of the feature maps; locations and weights are in float32.
        seed: of feature maps, locations, cameras and weights.
    """
    device = network.cell_position.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    config, attention = network.config, network.spatial_cross_attention
    h, w = (side // network.image_encoder.stride for side in config.image_size)
    Q, S = attention.points_ego.shape[0] * attention.points_ego.shape[1], attention.cameras * attention.samples
    bev_attention = network.box_decoder.layers[0].bev_attention
    dtype = PRECISIONS[precision]

    def drawn(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device, generator=generator)

    camera = torch.randint(0, CAMERAS, (1, Q, S), device=device, generator=generator)
    weight = drawn(1, Q, S) * (drawn(1, Q, S) > UNSEEN)
    features = drawn(1, CAMERAS, config.channels, h, w).to(dtype)
    low, high = (torch.tensor(edge, device=device) for edge in zip(config.x_range, config.y_range, strict=True))
    locations = low + (high - low) * drawn(1, config.box_queries, bev_attention.heads, bev_attention.samples, 2)
    return {
        "sample_cameras": Sampling(
            lambda features, uv, weight, **options: sample_cameras(features, uv, camera, weight, **options),
            (features, drawn(1, Q, S, 2), weight),
        ),
        "sample_bev": Sampling(
            lambda bev, points, weight, **options: sample_bev(bev, network.grid, points, weight, **options),
            (drawn(1, config.channels, *config.grid).to(dtype), locations, drawn(*locations.shape[:-1])),
        ),
    }


def measure_sampling(recorder: Recorder, models: tuple[str, ...], device_name: str) -> None:
    """Records rows of each function, interleaved with the plain implementation; on a GPU both run as CUDA graphs.

    Args:
        recorder: receives the rows.
        models: flagships, see `load_network`.
        device_name: "cuda" or "cpu".
    """
    device = torch.device(device_name)
    for model in models:
        network = load_network(model, device)
        for precision in PRECISIONS:
            for function, sampling in network_samplings(network, precision).items():
                for backward in (False, True):
                    name = f"{function} {model} {precision} {'forward and backward' if backward else 'forward'}"
                    recorder.attempt(name, LIMIT, _measure, sampling, backward, device)


def _measure(sampling: Sampling, backward: bool, device: torch.device) -> dict:
    """Times a pass and compares its results with the plain implementation."""
    fast = _passes(sampling, backward)
    plain = _passes(sampling, backward, implementation="plain")
    found, expected = fast(), plain()
    runs: dict[str, Callable[[], object]] = {"plain": plain, "fast": fast}
    if device.type == "cuda":
        runs = {name: capture_graph(run).replay for name, run in runs.items()}
    seconds = time_interleaved(runs, device)
    return timings(seconds["fast"]) | {
        "plain_p50_ms": timings(seconds["plain"])["p50_ms"],
        "speedup": float(np.median(seconds["plain"] / seconds["fast"])),
        # Relative differences of the result and of the gradients, by norm.
        "difference": [
            float((one.float() - other.float()).norm() / other.float().norm())
            for one, other in zip(found, expected, strict=True)
        ],
    }


def _passes(sampling: Sampling, backward: bool, **options: str) -> Callable[[], tuple[Tensor, ...]]:
    """Makes a function that runs one pass and returns the result, with `backward` also the gradients of all inputs."""
    leaves = [x.detach().clone().requires_grad_(backward) for x in sampling.inputs]
    function = partial(sampling.function, **options)

    def run() -> tuple[Tensor, ...]:
        result = function(*leaves)
        if not backward:
            return (result,)
        return (result.detach(), *torch.autograd.grad(result.square().sum(), leaves))

    return run
