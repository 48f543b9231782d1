"""Trainings that differ in one thing, each with several seeds: what helps, and whether more than chance."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from perception.data.loader import collate
from perception.engine.config import TrainConfig, build_dataset
from perception.engine.dry_run import forward_gflops
from perception.engine.training import train
from perception.errors import ConfigError
from perception.models import build_network
from perception.models.checkpoint import read_metrics
from perception.types import map_tensors

HEADLINE = ("nds", "mAP", "mATE", "mAOE", "mAVE", "lane_mAP")


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one frame of the validation data costs a network.

    Args:
        parameters: of the whole network.
        gflops: forward; products and sums counted apart.
        seconds: network and decoding, the median of passes that took turns with those of the others.
        share: of what the first network took in the same turn, the median.
    """

    parameters: int
    gflops: float
    seconds: float
    share: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Metrics after the last epoch, by variant, one dict per seed; the first variant is what the others are held to."""

    runs: dict[str, list[dict[str, float]]]
    costs: dict[str, Cost] = dataclasses.field(default_factory=dict)

    def mean(self, variant: str, metric: str) -> float:
        """Over the seeds."""
        return statistics.fmean(run[metric] for run in self.runs[variant])

    def spread(self, variant: str, metric: str) -> float:
        """The largest of the seeds less the smallest."""
        values = [run[metric] for run in self.runs[variant]]
        return max(values) - min(values)

    def gain(self, variant: str, metric: str) -> float | None:
        """How much more than the first variant, None where that is within the larger of the two spreads."""
        first = next(iter(self.runs))
        gain = self.mean(variant, metric) - self.mean(first, metric)
        return gain if abs(gain) > max(self.spread(variant, metric), self.spread(first, metric)) else None

    def as_dict(self) -> dict:
        """Plain JSON values."""
        return {
            name: {
                "seeds": runs,
                **{
                    metric: {
                        "mean": self.mean(name, metric),
                        "spread": self.spread(name, metric),
                        "gain": self.gain(name, metric),
                    }
                    for metric in HEADLINE
                },
                **({"cost": dataclasses.asdict(self.costs[name])} if self.costs else {}),
            }
            for name, runs in self.runs.items()
        }

    def table(self) -> str:
        """Means and spreads as Markdown; * marks what differs from the first row by more than chance."""
        costs = ["M parameters", "GFLOP", "ms a frame", "of the first"] if self.costs else []
        heads = ["variant", *HEADLINE, *costs]
        lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for number, name in enumerate(self.runs):
            cells = []
            for metric in HEADLINE:
                star = "*" if number and self.gain(name, metric) is not None else ""
                cells.append(f"{self.mean(name, metric):.3f} ± {self.spread(name, metric) / 2:.3f}{star}")
            if self.costs:
                cost = self.costs[name]
                cells += [f"{cost.parameters / 1e6:.2f}", f"{cost.gflops:.1f}", f"{1e3 * cost.seconds:.0f}"]
                cells.append(f"{cost.share:.2f}")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return "\n".join(lines)


def compare(
    variants: Mapping[str, TrainConfig], seeds: Sequence[int], out: str | Path, *, amp: bool = False
) -> Comparison:
    """Trains every variant with every seed. What is finished is not done again, what was interrupted goes on.

    Args:
        variants: configs by name; the first is what the others are held to.
        seeds: at least two, or chance cannot be told from a gain.
        out: a folder per run is made there.
        amp: in bfloat16.

    Raises:
        ConfigError: there are fewer than two seeds.
    """
    if len(set(seeds)) < 2:
        raise ConfigError("a comparison needs at least two different seeds; give e.g. --seeds 0 1")
    runs: dict[str, list[dict[str, float]]] = {}
    for name, config in variants.items():
        for seed in dict.fromkeys(seeds):
            folder = Path(out, f"{name.replace(' ', '_').replace('/', '_')}-{seed}")
            last = folder / f"{config.name}-last.safetensors"
            epochs = config.train.image_epochs + config.train.epochs
            if not last.is_file() or read_metrics(last)["epoch"] != epochs:
                train(config, folder, seed=seed, resume=True, amp=amp)
            runs.setdefault(name, []).append(read_metrics(last))
    return Comparison(runs)


@torch.inference_mode()
def measure_costs(configs: Mapping[str, TrainConfig], passes: int = 60) -> dict[str, Cost]:
    """What one frame costs each network, on the GPU where there is one.

    Args:
        configs: by name.
        passes: timed for each network, after two that are not; the networks take turns, so that whatever else the
            machine does falls on all of them.

    Raises:
        DataError: the validation data of a config are missing.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    networks, frames, seconds = {}, {}, {name: [] for name in configs}
    for name, config in configs.items():
        clip = collate([build_dataset(config.val_data, config.model)[0]])
        frames[name] = map_tensors(lambda tensor: tensor[:, 0].to(device), clip.frames)
        networks[name] = build_network(config.model).eval().to(device)
    for number in range(passes + 2):
        for name, network in networks.items():
            state = network.initial_state(1)
            _wait(device)
            start = time.perf_counter()
            network.decode(network(frames[name], state)[0])
            _wait(device)
            if number >= 2:
                seconds[name].append(time.perf_counter() - start)
    first = next(iter(seconds.values()))
    return {
        name: Cost(
            sum(p.numel() for p in network.parameters()),
            forward_gflops(network, frames[name]),
            statistics.median(seconds[name]),
            statistics.median(own / other for own, other in zip(seconds[name], first, strict=True)),
        )
        for name, network in networks.items()
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
