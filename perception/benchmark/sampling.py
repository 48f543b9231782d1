"""The fast ways of reading cameras against their plain twins, forward and backward, at the sizes of the networks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from perception import ops
from perception.benchmark.frames import CAMERAS, DTYPES, network_of, take_turns, timings
from perception.benchmark.stages import Recorder
from perception.models.bev_transformer import BEVTransformer
from perception.ops import sampling

LIMIT = 20.0  # seconds of one measurement, compiling a kernel included
PRECISIONS = {"fp32": torch.float32} | DTYPES


def inputs_of(network: BEVTransformer, precision: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments of `sample_cameras` at the sizes of a network; places, cameras and weights at random.

    Returns:
        features [1, N, C, h, w] in the precision; uv [1, Q, S, 2]; camera [1, Q, S]; weight [1, Q, S], of which 41 %
        are zero as for points that no camera sees.
    """
    device = network.cell_position.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    config, attention = network.config, network.camera_attention
    h, w = (side // network.image_encoder.stride for side in config.image_size)
    Q, S = attention.points_ego.shape[0] * attention.points_ego.shape[1], attention.cameras * attention.samples

    def drawn(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device, generator=generator)

    features = drawn(1, CAMERAS, config.channels, h, w).to(PRECISIONS[precision])
    camera = torch.randint(0, CAMERAS, (1, Q, S), device=device, generator=generator)
    return features, drawn(1, Q, S, 2), camera, drawn(1, Q, S) * (drawn(1, Q, S) > 0.41)


def measure_sampling(recorder: Recorder, models: tuple[str, ...], device_name: str) -> None:
    """Rows of `sample_cameras` as networks call it, in turns with the plain one.

    Args:
        recorder: takes the rows.
        models: for `network_of`, flagships.
        device_name: "cuda" or "cpu".
    """
    device = torch.device(device_name)
    for model in models:
        network = network_of(model, device)
        for precision in PRECISIONS:
            inputs = inputs_of(network, precision)
            for backward in (False, True):
                name = f"{model} {precision} {'forward and backward' if backward else 'forward'}"
                recorder.attempt(name, LIMIT, _measure, inputs, backward, device)


def _measure(inputs: tuple[Tensor, ...], backward: bool, device: torch.device) -> dict:
    fast, plain = (_passes(function, inputs, backward) for function in (ops.sample_cameras, sampling.sample_cameras))
    seconds = take_turns({"plain": plain, "fast": fast}, device)
    off = [
        float((one.float() - other.float()).norm() / other.float().norm())
        for one, other in zip(fast(), plain(), strict=True)
    ]
    return timings(seconds["fast"]) | {
        "plain_p50_ms": timings(seconds["plain"])["p50_ms"],
        "speedup": float(np.median(seconds["plain"] / seconds["fast"])),
        "difference": off,  # of the result and of the gradients, by their norms
    }


def _passes(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], backward: bool
) -> Callable[[], tuple[Tensor, ...]]:
    """A function that makes one pass and returns the result, with `backward` also all gradients."""
    features, uv, camera, weight = inputs
    leaves = [x.detach().clone().requires_grad_(backward) for x in (features, uv, weight)]

    def run() -> tuple[Tensor, ...]:
        result = function(leaves[0], leaves[1], camera, leaves[2])
        if not backward:
            return (result,)
        return (result.detach(), *torch.autograd.grad(result.square().sum(), leaves))

    return run
