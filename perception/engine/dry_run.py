"""Estimates the cost of a training: builds everything and runs two real steps at full size on generated scenes."""

from __future__ import annotations

import copy
import dataclasses
import re
import time
from pathlib import Path

import torch
from mmengine.runner import set_random_seed
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from perception.benchmark.machine import wait
from perception.data.loader import TrainSampler, collate
from perception.engine.config import (
    AnyDataSection,
    CustomDataSection,
    DataSection,
    InfosSection,
    TrainConfig,
    build_dataset,
    check_trainable,
)
from perception.engine.training import TrainingModel, build_optimizer
from perception.files import scratch_folder
from perception.models import Network, build_network
from perception.synthetic import VERSION, simulate
from perception.types import Frame, map_tensors

NUSCENES_TRAIN_SAMPLES = 28130  # keyframes of nuScenes' official training split
STEPS = 2


@dataclasses.dataclass(frozen=True)
class DryRun:
    """The cost of two training steps.

    Args:
        parameters: number of parameters of each part of the network.
        learned: number of parameters that are not frozen.
        gflops: floating-point operations of the forward pass of one frame, products and sums counted separately.
        peak_memory: bytes, of the GPU or of the whole process without a GPU.
        seconds_per_step: of the second step, without loading.
        steps: of the whole training on its own dataset, None if the dataset is missing and its size unknown.
        device: on which the steps ran.
    """

    parameters: dict[str, int]
    learned: int
    gflops: float
    peak_memory: int
    seconds_per_step: float
    steps: int | None
    device: str

    @property
    def hours(self) -> float | None:
        """Hours of the whole training at this speed, without validation."""
        return None if self.steps is None else self.steps * self.seconds_per_step / 3600

    def as_dict(self) -> dict:
        """Returns plain JSON values."""
        return dataclasses.asdict(self) | {"hours": self.hours}

    def table(self) -> str:
        """Returns the results as text for a terminal."""
        rows = [(f"parameters of {part}", f"{count / 1e6:.2f} M") for part, count in self.parameters.items()]
        rows += [
            ("parameters", f"{sum(self.parameters.values()) / 1e6:.2f} M"),
            ("of these learned", f"{self.learned / 1e6:.2f} M"),
            ("forward, one frame", f"{self.gflops:.1f} GFLOP"),
            ("peak memory", f"{self.peak_memory / 2**30:.2f} GiB"),
            ("one step", f"{self.seconds_per_step:.2f} s"),
            ("steps", "unknown, the dataset is missing" if self.steps is None else f"{self.steps}"),
            ("whole training", "unknown" if self.hours is None else f"{self.hours:.1f} h"),
            ("measured on", self.device),
        ]
        return "\n".join(f"{name:34s}{value:>36s}" for name, value in rows)


def dry_run(config: TrainConfig, *, seed: int = 0, amp: bool = False) -> DryRun:
    """Builds network, losses, loader and optimizer of a config and runs two steps on generated scenes.

    Args:
        config: from `load_config`; its datasets may be missing.
        seed: of weights and scenes.
        amp: run the network in bfloat16.

    Raises:
        ConfigError: the config is invalid or for evaluation only.
    """
    section, train_data = check_trainable(config)
    set_random_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    core = build_network(config.model)  # random weights: initial weights do not change the cost
    core.image_encoder.backbone.freeze(section.frozen_stages)
    model = TrainingModel(core, section.disabled_losses, section.extra_losses, section.gradient_checkpointing)
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = build_optimizer(model, section)
    with scratch_folder("dry-run") as folder:
        root = Path(folder, "town")
        simulate(
            root, scenes=section.batch_size, seed=seed, keyframes=STEPS * section.frames_per_clip, split="dry",
            image_size=config.model.image_size,
        )  # fmt: skip
        augment = train_data.augment if isinstance(train_data, DataSection) else None
        data = DataSection(str(root), VERSION, "dry", augment)
        dataset = build_dataset(data, config.model)
        sampler = TrainSampler(
            dataset.scene_of_sample.tolist(), section.batch_size, 1, section.frames_per_clip, 0.0, seed
        )
        state = None
        for clip in DataLoader(dataset, section.batch_size, sampler=sampler, collate_fn=collate):
            clip = map_tensors(lambda tensor: tensor.to(device), clip)
            wait(device)
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                losses, state = model(clip, state)
            sum(losses.values()).backward()
            optimizer.step()
            optimizer.zero_grad()
            wait(device)
            seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _highest_resident()
        frame = map_tensors(lambda tensor: tensor[:1, 0], clip.frames)
    return DryRun(
        parameters={name: sum(p.numel() for p in part.parameters()) for name, part in core.named_children()},
        learned=sum(p.numel() for p in core.parameters() if p.requires_grad),
        gflops=forward_gflops(core.eval(), frame),
        peak_memory=peak,
        seconds_per_step=seconds,
        steps=_steps(config),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU cores",
    )


def forward_gflops(core: Network, frame: Frame) -> float:
    """Counts the operations (10^9) of one forward pass over a frame [1, ...], products and sums separately."""
    # FlopCounterMode fails on inputs that require gradients in inference mode.
    core = copy.deepcopy(core).requires_grad_(False)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        core(frame, core.initial_state(1))
    return counter.get_total_flops() / 1e9


def _steps(config: TrainConfig) -> int | None:
    """Returns the number of steps of the whole training in one process, None if unknown."""
    section, data = check_trainable(config)
    if _is_there(data):
        samples = len(build_dataset(data, config.model))
    elif isinstance(data, DataSection) and (data.version, data.split) == ("v1.0-trainval", "train"):
        samples = NUSCENES_TRAIN_SAMPLES
    else:
        return None
    per_epoch = round(samples * (1 - section.drop_frames) / (section.batch_size * section.frames_per_clip))
    return (section.image_epochs + section.epochs) * per_epoch


def _is_there(data: AnyDataSection) -> bool:
    if isinstance(data, CustomDataSection):
        return True
    if isinstance(data, InfosSection):
        return Path(data.infos).is_file()
    roots = (data.dataroot,) if isinstance(data.dataroot, str) else data.dataroot
    return all(Path(root, data.version).is_dir() for root in roots)


def _highest_resident() -> int:
    """Returns the peak memory of the process in bytes. getrusage() would include the peak of the parent process."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
