"""Trains a network with MMEngine's Runner.

This module holds the model that unrolls a clip and returns losses, and builds the Runner. The loops and hooks are in
`perception.engine.loops`; they are passed to the Runner as classes and not registered by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import barrier, get_dist_info
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.runner import set_random_seed
from torch import Tensor
from torch.utils.data import DataLoader

from perception.data.loader import TrainSampler, collate
from perception.data.nuscenes import NuScenesDataset
from perception.engine.checkpoints import KEPT, WorkDir, changed_settings, settings_of
from perception.engine.config import TrainConfig, TrainSection, build_dataset, check_trainable
from perception.engine.gradient_checkpointing import gradient_checkpointing, recomputable_modules
from perception.engine.launchers import join_processes
from perception.engine.loops import (
    CheckedOptimWrapper,
    Continuation,
    ExportHook,
    SharedStatisticsHook,
    StopRequest,
    StreamTrainLoop,
    StreamValLoop,
    TrainingRunner,
)
from perception.engine.step_times import ThroughputHook
from perception.engine.weights import make_core
from perception.errors import ConfigError
from perception.evaluation.dataset import check_evaluable
from perception.extensions import LOSSES, registered
from perception.files import check_space
from perception.models import Network
from perception.reading import short
from perception.types import Clip, Memory, map_tensors


class TrainingModel(BaseModel):
    """Unrolls a network over clips and computes its losses.

    Args:
        core: the network.
        disabled_losses: names of losses that are not used.
        extra_losses: weight by name of registered losses, see `perception.extensions.register_loss`.
        gradient_checkpointing: see `perception.engine.gradient_checkpointing`.

    Raises:
        ConfigError: a name is unknown, or all losses are disabled.
    """

    def __init__(
        self,
        core: Network,
        disabled_losses: tuple[str, ...] = (),
        extra_losses: Mapping[str, float] | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.core, self.disabled_losses = core, disabled_losses
        self.recomputes = gradient_checkpointing
        self.extra_losses = [
            (name, registered(LOSSES, "train.extra_losses", name), weight)
            for name, weight in (extra_losses or {}).items()
        ]
        weights = core.loss_weights
        if unknown := sorted(set(disabled_losses) - set(weights)):
            raise ConfigError(f"train.disabled_losses names {unknown[0]!r}; the losses are {', '.join(weights)}")
        if set(disabled_losses) == set(weights):
            raise ConfigError("train.disabled_losses names all losses; leave at least one")

    def forward(
        self,
        clip: Clip,
        state: Memory | None,
        images_only: bool = False,
        ended: Callable[[str], object] = lambda part: None,
    ) -> tuple[dict[str, Tensor], Memory | None]:
        """Unrolls clips and averages each loss over time.

        Args:
            clip: leading [B, T], on the device of the weights.
            state: memory at the end of the previous clip, None for an empty memory.
            images_only: compute only the image losses, without BEV map and memory.
            ended: is called with "forward" and "matching" at the end of each forward pass and of each matching with its
                losses; image losses are part of the forward pass.

        Returns:
            The losses, and the detached memory at the end of the clip: gradients flow back to the beginning of the clip
            (truncated back-propagation through time).

        Raises:
            FloatingPointError: a loss or a matching cost is NaN or infinite.
        """
        B, T = clip.sample_index.shape
        recomputed = recomputable_modules(self.core) if self.recomputes else ()
        if images_only:
            assert self.core.image_loss is not None  # see `check_trainable`
            flat = map_tensors(lambda tensor: tensor.flatten(0, 1), clip)
            with gradient_checkpointing(recomputed):
                image_losses = self.core.image_loss(flat.frames, flat.gt)
            ended("forward")
            return self._checked(image_losses), state
        state = self.core.initial_state(B) if state is None else state
        losses: dict[str, Tensor] = {}
        for t in range(T):
            step = map_tensors(partial(torch.select, dim=1, index=t), clip)
            gt = (step.gt,) if self.core.needs_gt and self.training else ()
            with gradient_checkpointing(recomputed):
                prediction, state = self.core(step.frames, state, *gt)
            ended("forward")
            # Matching and losses always run in float32.
            with torch.autocast(clip.sample_index.device.type, enabled=False):
                prediction = map_tensors(lambda x: x.float() if x.is_floating_point() else x, prediction)
                of_frame = self.core.loss(prediction, step.gt, step.frames)
                for name, function, weight in self.extra_losses:
                    of_frame |= _extra_losses(name, function(prediction, step.gt, step.frames), weight, of_frame)
                for name, loss in of_frame.items():
                    losses[name] = losses[name] + loss / T if name in losses else loss / T
            ended("matching")
        return self._checked(losses), map_tensors(Tensor.detach, state)

    def _checked(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        finite = torch.stack(list(losses.values())).isfinite().tolist()
        for name, ok in zip(losses, finite, strict=True):
            if not ok:
                raise FloatingPointError(f"loss {name} is {losses[name].item()}")
        return {name: loss for name, loss in losses.items() if name not in self.disabled_losses}


def _extra_losses(name: str, found: Any, weight: float, others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Checks and weights what a registered loss function returned."""
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) and x.numel() == 1 for x in found.values()):
        raise ConfigError(f"the loss {name} of train.extra_losses returns {short(found)}; return scalars by name")
    if taken := sorted(found.keys() & others.keys()):
        raise ConfigError(f"the loss {name} of train.extra_losses returns {taken[0]!r}, which exists; rename it")
    return {key: weight * loss.reshape(()) for key, loss in found.items()}


def train(
    config: TrainConfig,
    work_dir: str | Path,
    *,
    seed: int = 0,
    resume: bool = False,
    allow_change: bool = False,
    overwrite: bool = False,
    amp: bool = False,
    launcher: str = "none",
) -> Network:
    """Trains a network.

    Writes to the work directory: checkpoints of the last two epochs (`epoch_N.pth`), in long epochs one every ten
    minutes (`epoch_N_batch_K.pth`), `<name>.safetensors` (best by the mean of NDS and lane mAP),
    `<name>-last.safetensors`, TensorBoard scalars, the log and a copy of the config. After SIGTERM or SIGINT it saves a
    checkpoint and stops.

    Args:
        config: from `load_config`.
        work_dir: is created if it is missing.
        seed: of the initial weights, the order of samples and all augmentation. The same seed gives the same weights,
            also for a training that was interrupted and resumed (bit-identical on a CPU with the same thread count).
        resume: continue from the newest checkpoint in the work directory that is not damaged, with the validation that
            an interruption cut off; start if the folder holds no work.
        allow_change: continue with other values of the settings in `CHANGEABLE` of `perception.engine.checkpoints`.
        overwrite: delete the checkpoints and weights in the work directory and start.
        amp: run the network in bfloat16; losses and weights stay in float32.
        launcher: "none", or the launcher of the processes: "pytorch" (torchrun), "slurm" or "mpi", one process per GPU.
            Without a GPU they share the CPUs.

    Returns:
        The network after the last epoch, with raw weights instead of averaged ones.

    Raises:
        CheckpointError: the initial weights are missing or belong to another network, or no checkpoint can be read.
        ConfigError: the work directory holds work, a running training or one with other settings, the config is
            invalid, or the processes were started by another launcher.
        DataError: the dataset is missing or malformed.
        Interrupted: after SIGTERM or SIGINT.
        TrainingError: a loss or a gradient is not finite.
    """
    section, train_data = check_trainable(config)
    if resume and overwrite:
        raise ConfigError("resume and overwrite exclude each other; give one of them")
    folder = WorkDir(work_dir, config.name)
    if not (resume or overwrite) and (work := folder.work()):
        raise ConfigError(
            f"{folder.path} already holds {work[0].name} of a training; add --resume to go on, --overwrite to delete "
            "it, or choose another --work-dir"
        )
    join_processes(launcher)
    writes = get_dist_info()[0] == 0
    with folder.lock() if writes else nullcontext(), StopRequest() as stop:
        if overwrite and writes:
            folder.clear()
        barrier()
        checkpoint = folder.newest() if resume else None
        set_random_seed(seed)
        train_set, val_set = (build_dataset(data, config.model) for data in (train_data, config.val_data))
        check_evaluable(val_set)
        settings = settings_of(
            config,
            seed=seed,
            amp=amp,
            processes=get_dist_info()[1],
            **{"train_data.samples": hashlib.sha256(" ".join(train_set.tokens).encode()).hexdigest()[:16]},
        )
        changed = {}
        if checkpoint:
            before = json.loads(checkpoint["meta"]["settings"])
            changed = changed_settings(folder.path, before, settings, allow_change)
        core = make_core(config, initial_weights=checkpoint is None)
        if writes:
            # Weights, their average and two moments, in the checkpoints that stay and the one being written.
            numbers = 4 * sum(parameter.numel() for parameter in core.parameters())
            check_space(f"a training in {folder.path}", folder.path, (KEPT + 2) * 4 * numbers)
        # Convolutions are fastest in channels-last, on CPU and GPU.
        model = TrainingModel(core, section.disabled_losses, section.extra_losses, section.gradient_checkpointing)
        model = model.to(memory_format=torch.channels_last)
        continuation = Continuation(folder, settings, checkpoint, changed)
        runner = _build_runner(
            config, section, model, train_set, val_set, continuation, stop, seed=seed, amp=amp, launcher=launcher
        )
        runner.train()
        if writes:
            folder.prune()  # an interruption may have come before the deletion of the oldest checkpoint
    return model.core


def _build_runner(
    config: TrainConfig,
    section: TrainSection,
    model: TrainingModel,
    train_set: NuScenesDataset,
    val_set: NuScenesDataset,
    continuation: Continuation,
    stop: StopRequest,
    *,
    seed: int,
    amp: bool,
    launcher: str,
) -> TrainingRunner:
    cuda = torch.cuda.is_available()
    if section.streams < 1:
        raise ConfigError(f"train.streams is {section.streams}; give at least 1")
    if not 0 <= section.drop_frames < 1:
        raise ConfigError(f"train.drop_frames is {section.drop_frames}; give a share of at least 0 and less than 1")
    if section.log_every < 1:
        raise ConfigError(f"train.log_every is {section.log_every}; give at least 1 iteration between two lines")
    # With a generator of their own, loaders take no random numbers from the training.
    loading: dict[str, Any] = {
        "collate_fn": collate, "num_workers": section.workers, "generator": torch.Generator().manual_seed(seed),
    }  # fmt: skip
    train_loader = DataLoader(
        train_set,
        batch_size=section.batch_size,
        sampler=TrainSampler(
            train_set.scene_of_sample.tolist(),
            section.batch_size,
            section.streams,
            section.frames_per_clip,
            section.drop_frames,
            seed,
            *get_dist_info(),
        ),
        pin_memory=cuda,
        persistent_workers=section.workers > 0,
        **loading,
    )
    if section.warmup_iters < 2:
        raise ConfigError(f"train.warmup_iters is {section.warmup_iters}; give at least 2 iterations")
    epochs = section.image_epochs + section.epochs
    iterations = epochs * len(train_loader)
    if iterations <= section.warmup_iters:
        raise ConfigError(
            f"{epochs} epochs of {len(train_set)} samples are {iterations} iterations, not more than "
            f"train.warmup_iters={section.warmup_iters}; lower it or train longer"
        )
    optimizer = build_optimizer(model, section)
    throughput = {"type": ThroughputHook, "interval": section.log_every, "precision": "bf16" if amp else "fp32"}
    hooks: list[dict] = [throughput, {"type": ExportHook}]
    if launcher != "none":
        distributed = MMDistributedDataParallel(
            model.to(get_device()),
            device_ids=[torch.cuda.current_device()] if cuda else None,
            broadcast_buffers=False,
            # Image epochs and disabled losses leave parameters without gradients.
            find_unused_parameters=bool(section.image_epochs or section.disabled_losses),
        )
        hooks.append({"type": SharedStatisticsHook})
    if section.ema_momentum > 0:
        hooks.append({"type": "EMAHook", "momentum": section.ema_momentum, "strict_load": True})
    settings = {
        "default_hooks": {
            "logger": {"type": "LoggerHook", "interval": section.log_every},
            "checkpoint": None,  # `StreamTrainLoop` saves
        },
        "custom_hooks": hooks,
        "visualizer": {
            "type": "Visualizer",
            "vis_backends": [{"type": "TensorboardVisBackend"}, {"type": "LocalVisBackend"}],
        },
        "log_processor": {"window_size": section.log_every},
        # All batches have the same shapes, so cuDNN searches the fastest convolutions once.
        "env_cfg": {"cudnn_benchmark": cuda},
    }
    return TrainingRunner(
        continuation,
        stop,
        model=model if launcher == "none" else distributed,
        train_dataloader=train_loader,
        train_cfg={
            "type": StreamTrainLoop,
            "max_epochs": epochs,
            "val_begin": section.image_epochs + 1,
            "val_interval": section.val_every,
            "streams": section.streams,
            "image_epochs": section.image_epochs,
        },
        val_dataloader=DataLoader(val_set, batch_size=1, **loading),
        val_cfg={"type": StreamValLoop},
        val_evaluator={},
        optim_wrapper={
            "type": CheckedOptimWrapper,
            "optimizer": optimizer,
            "clip_grad": {"max_norm": section.grad_clip},
            "device_type": "cuda" if cuda else "cpu",
            "bfloat16": amp,
        },
        param_scheduler=[
            {"type": "LinearLR", "start_factor": 0.01, "by_epoch": False, "begin": 0, "end": section.warmup_iters},
            {
                "type": "CosineAnnealingLR",
                "T_max": iterations - section.warmup_iters,
                "eta_min_ratio": 0.01,
                "by_epoch": False,
                "begin": section.warmup_iters,
                "end": iterations,
            },
        ],
        randomness={"seed": seed},
        launcher=launcher,
        # MMEngine looks up logs and message hubs by this name; two trainings in one process must have different names.
        experiment_name=f"{config.name} {continuation.folder.path.resolve()}",
        cfg=config.source,
        **config.runner.over(settings),
    )


def build_optimizer(model: TrainingModel, section: TrainSection) -> torch.optim.AdamW:
    """Creates AdamW without weight decay for biases and norms, and with `backbone_lr_mult` for the backbone."""
    backbone = set(model.core.image_encoder.backbone.parameters())
    groups = []
    for inside in (False, True):
        for matrices in (True, False):
            chosen = [
                p
                for p in model.parameters()
                if p.requires_grad and (p in backbone) == inside and (p.ndim > 1) == matrices
            ]
            if chosen:
                lr = section.lr * (section.backbone_lr_mult if inside else 1.0)
                groups.append({"params": chosen, "lr": lr, **({} if matrices else {"weight_decay": 0.0})})
    return torch.optim.AdamW(groups, lr=section.lr, weight_decay=section.weight_decay)
