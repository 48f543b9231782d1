"""Trainings that differ in one thing, each with several seeds: what helps, and whether more than chance."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from perception.engine.config import TrainConfig
from perception.engine.training import train
from perception.errors import ConfigError
from perception.models.checkpoint import load_checkpoint

HEADLINE = ("nds", "map", "mATE", "mAOE", "mAVE", "lane_map")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Metrics after the last epoch, by variant, one dict per seed; the first variant is what the others are held to."""

    runs: dict[str, list[dict[str, float]]]

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
            }
            for name, runs in self.runs.items()
        }

    def table(self) -> str:
        """Means and spreads as Markdown; * marks what differs from the first row by more than chance."""
        lines = ["| variant | " + " | ".join(HEADLINE) + " |", "|---" * (len(HEADLINE) + 1) + "|"]
        for number, name in enumerate(self.runs):
            cells = []
            for metric in HEADLINE:
                star = "*" if number and self.gain(name, metric) is not None else ""
                cells.append(f"{self.mean(name, metric):.3f} ± {self.spread(name, metric) / 2:.3f}{star}")
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
            if not last.is_file() or load_checkpoint(last)[1]["epoch"] != epochs:
                train(config, folder, seed=seed, resume=True, amp=amp)
            runs.setdefault(name, []).append(load_checkpoint(last)[1])
    return Comparison(runs)
