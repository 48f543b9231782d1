"""Compares variants of a training over several seeds, and measures the cost of their networks."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from perception.data.loader import collate
from perception.engine.config import TrainConfig, build_dataset, check_trainable
from perception.engine.dry_run import forward_gflops
from perception.engine.training import train
from perception.errors import ConfigError
from perception.models import build_network
from perception.models.checkpoint import read_metrics
from perception.types import map_tensors

HEADLINE = ("nds", "mAP", "mATE", "mAOE", "mAVE", "lane_mAP")


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a network for one frame of the validation data.

    Args:
        parameters: number of parameters of the whole network.
        gflops: floating-point operations of the forward pass, products and sums counted separately.
        seconds: median latency of network and decoding.
        share: median ratio of the latency to that of the first network in the same turn.
    """

    parameters: int
    gflops: float
    seconds: float
    share: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Metrics after the last epoch by variant, one dict per seed. The other variants are compared with the first."""

    runs: dict[str, list[dict[str, float]]]
    costs: dict[str, Cost] = dataclasses.field(default_factory=dict)

    def mean(self, variant: str, metric: str) -> float:
        """Returns the mean over the seeds."""
        return statistics.fmean(run[metric] for run in self.runs[variant])

    def spread(self, variant: str, metric: str) -> float:
        """Returns the range over the seeds, largest minus smallest."""
        values = [run[metric] for run in self.runs[variant]]
        return max(values) - min(values)

    def gain(self, variant: str, metric: str) -> float | None:
        """Returns the difference from the first variant, None if it is not above the larger of the two spreads."""
        first = next(iter(self.runs))
        gain = self.mean(variant, metric) - self.mean(first, metric)
        return gain if abs(gain) > max(self.spread(variant, metric), self.spread(first, metric)) else None

    def as_dict(self) -> dict:
        """Returns plain JSON values."""
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
        """Returns means and half spreads in Markdown; * marks differences from the first row above the spreads."""
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
    """Trains every variant with every seed. Finished runs are skipped and interrupted runs are resumed.

    Args:
        variants: configs by name; the others are compared with the first.
        seeds: at least two, to separate gains from chance.
        out: folder for one subfolder per run.
        amp: train in bfloat16.

    Raises:
        ConfigError: there are fewer than two seeds, or a config is for evaluation only.
    """
    if len(set(seeds)) < 2:
        raise ConfigError("a comparison needs at least two different seeds; give e.g. --seeds 0 1")
    runs: dict[str, list[dict[str, float]]] = {}
    for name, config in variants.items():
        for seed in dict.fromkeys(seeds):
            folder = Path(out, f"{name.replace(' ', '_').replace('/', '_')}-{seed}")
            last = folder / f"{config.name}-last.safetensors"
            section, _ = check_trainable(config)
            epochs = section.image_epochs + section.epochs
            if not last.is_file() or read_metrics(last)["epoch"] != epochs:
                train(config, folder, seed=seed, resume=True, amp=amp)
            runs.setdefault(name, []).append(read_metrics(last))
    return Comparison(runs)


@torch.inference_mode()
def measure_costs(configs: Mapping[str, TrainConfig], passes: int = 60) -> dict[str, Cost]:
    """Measures the cost of one frame for each network, on the GPU if there is one.

    Args:
        configs: by name.
        passes: number of timed passes per network, after two passes of warm-up. The networks take turns, so that other
            load on the machine affects all of them.

    Raises:
        DataError: the validation data of a config are missing.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    networks, frames = {}, {}
    seconds: dict[str, list[float]] = {name: [] for name in configs}
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
