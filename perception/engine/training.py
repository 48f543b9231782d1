"""Training with MMEngine's Runner: the adapter between the core library and the engine.

The core knows nothing of the engine. What the engine needs is here, a model that unrolls a clip and returns losses, and
in `perception.engine.loops`, which are handed to the Runner as classes; nothing is registered by name.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from mmengine.device import get_device
from mmengine.dist import get_dist_info, init_dist, is_distributed
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.runner import Runner, find_latest_checkpoint, set_random_seed
from torch import Tensor
from torch.utils.data import DataLoader

from perception.data.loader import TrainSampler, collate
from perception.engine.config import TrainConfig, TrainSection, build_dataset
from perception.engine.loops import (
    CheckedOptimWrapper,
    ExportHook,
    FrameRateHook,
    PlainCheckpointHook,
    SharedStatisticsHook,
    StreamTrainLoop,
    StreamValLoop,
)
from perception.engine.weights import make_core
from perception.errors import ConfigError
from perception.models import Network, network_class
from perception.types import Clip, State, map_tensors


class TrainingModel(BaseModel):
    """A network and its losses.

    Args:
        core: the network.
        disabled_losses: names of losses to leave out.

    Raises:
        ConfigError: there is no loss of such a name, or none is left.
    """

    def __init__(self, core: Network, disabled_losses: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.core, self.disabled_losses = core, disabled_losses
        weights = core.loss_weights
        if unknown := sorted(set(disabled_losses) - set(weights)):
            raise ConfigError(f"train.disabled_losses names {unknown[0]!r}; the losses are {', '.join(weights)}")
        if set(disabled_losses) == set(weights):
            raise ConfigError("train.disabled_losses names all losses; leave at least one")

    def forward(
        self, clip: Clip, state: State | None, images_only: bool = False
    ) -> tuple[dict[str, Tensor], State | None]:
        """Unrolls clips and averages each loss over time.

        Args:
            clip: leading [B, T], on the device of the weights.
            state: the memory that the clip before ended with, None for an empty one.
            images_only: leave map and memory alone; only what the images show has losses.

        Returns:
            The losses, and the memory at the end of the clip, cut off from the graph: gradients reach back to the
            beginning of the clip and no farther (truncated back-propagation through time).

        Raises:
            FloatingPointError: a loss or the cost of a match is NaN or infinite.
        """
        B, T = clip.sample_index.shape
        if images_only:
            flat = map_tensors(lambda tensor: tensor.flatten(0, 1), clip)
            return self._checked(self.core.image_loss(flat.frames, flat.gt)), state
        state = self.core.initial_state(B) if state is None else state
        losses: dict[str, Tensor] = {}
        for t in range(T):
            now = map_tensors(lambda tensor, t=t: tensor[:, t], clip)
            prediction, state = self.core(now.frames, state)
            # Matching and losses stay in float32 whatever the network runs in.
            with torch.autocast(clip.sample_index.device.type, enabled=False):
                prediction = map_tensors(Tensor.float, prediction)
                for name, loss in self.core.loss(prediction, now.gt, now.frames).items():
                    losses[name] = losses[name] + loss / T if name in losses else loss / T
        return self._checked(losses), map_tensors(Tensor.detach, state)

    def _checked(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        finite = torch.stack(list(losses.values())).isfinite().tolist()
        for name, ok in zip(losses, finite, strict=True):
            if not ok:
                raise FloatingPointError(f"loss {name} is {losses[name].item()}")
        return {name: loss for name, loss in losses.items() if name not in self.disabled_losses}


def train(
    config: TrainConfig,
    work_dir: str | Path,
    *,
    seed: int = 0,
    resume: bool = False,
    amp: bool = False,
    launcher: str = "none",
) -> Network:
    """Trains a network as a config says.

    Leaves in the work directory: checkpoints of the last two epochs, `<name>.safetensors` (best by the mean of NDS and
    lane mAP) and `<name>-last.safetensors`, TensorBoard scalars, the log and a copy of the config.

    Args:
        config: from `load_config`.
        work_dir: made where it does not exist.
        seed: of the initial weights, the order of samples and all augmentation. The same seed gives the same weights,
            also when training was interrupted and resumed (bit for bit on CPU with the same number of threads).
        resume: goes on from the newest checkpoint in the work directory, from the start where there is none.
        amp: runs the network in bfloat16; losses and weights stay in float32.
        launcher: "none", or what started the processes: "pytorch" (torchrun), "slurm" or "mpi", one per GPU. Without
            GPUs those of torchrun share the CPU.

    Returns:
        The network after the last epoch (raw weights, not their average).

    Raises:
        CheckpointError: the weights to start from are missing or belong to another network.
        ConfigError: the work directory holds another training, the config cannot be, or the launcher is another one.
        DataError: the dataset is missing or malformed.
        TrainingError: a loss or a gradient is not finite.
    """
    check_trainable(config)
    work_dir = Path(work_dir)
    if not resume and find_latest_checkpoint(str(work_dir)):
        raise ConfigError(
            f"{work_dir} already holds checkpoints of a training; add --resume or choose another --work-dir"
        )
    join_processes(launcher)
    set_random_seed(seed)
    train_set, val_set = build_dataset(config.train_data, config.model), build_dataset(config.val_data, config.model)
    # Channels last is what convolutions are fastest with, on CPU and GPU.
    model = TrainingModel(make_core(config), config.train.disabled_losses).to(memory_format=torch.channels_last)
    runner = _build_runner(config, work_dir, model, train_set, val_set, seed, resume, amp, launcher)
    runner.train()
    return model.core


def join_processes(launcher: str) -> None:
    """Makes this process one of those that train together; the sampler asks how many they are.

    Raises:
        ConfigError: the launcher did not start this process, or needs GPUs and there is none.
    """
    if launcher == "none" or is_distributed():
        return
    if launcher == "pytorch" and "RANK" not in os.environ:
        raise ConfigError(
            "--launcher pytorch is for processes of torchrun; start them with: torchrun --nproc_per_node N "
            "-m perception train CONFIG --work-dir DIR --launcher pytorch"
        )
    if torch.cuda.is_available():
        init_dist(launcher)
    elif launcher == "pytorch":
        torch.distributed.init_process_group("gloo")
    else:
        raise ConfigError(f"--launcher {launcher} needs a GPU per process and finds none; torchrun can do without")


def check_trainable(config: TrainConfig) -> None:
    """Refuses a config that is for evaluation only.

    Raises:
        ConfigError: it has no `train` or `train_data`, or asks for what its network cannot.
    """
    for name in ("train", "train_data"):
        if getattr(config, name) is None:
            raise ConfigError(f"config {config.name} has no section {name}: it is for evaluation; choose another one")
    if config.train.image_epochs and network_class(config.model).image_loss is None:
        raise ConfigError(
            f"config {config.name}: train.image_epochs must be 0, its network has no losses in the images"
        )


def _build_runner(config, work_dir, model, train_set, val_set, seed, resume, amp, launcher) -> Runner:
    section: TrainSection = config.train
    cuda = torch.cuda.is_available()
    if section.streams < 1:
        raise ConfigError(f"train.streams is {section.streams}; give at least 1")
    if not 0 <= section.drop_frames < 1:
        raise ConfigError(f"train.drop_frames is {section.drop_frames}; give a share of at least 0 and less than 1")
    loading = {"collate_fn": collate, "num_workers": section.workers}
    train_loader = DataLoader(
        train_set,
        batch_size=section.batch_size,
        sampler=TrainSampler(
            train_set.scene_of_sample,
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
    hooks = [{"type": FrameRateHook}, {"type": PlainCheckpointHook}, {"type": ExportHook, "name": config.name}]
    if launcher != "none":
        model = MMDistributedDataParallel(
            model.to(get_device()),
            device_ids=[torch.cuda.current_device()] if cuda else None,
            broadcast_buffers=False,
            # Epochs of images alone leave the rest of the network out, and so do losses that are left out.
            find_unused_parameters=bool(section.image_epochs or section.disabled_losses),
        )
        hooks.append({"type": SharedStatisticsHook})
    if section.ema_momentum > 0:
        hooks.append({"type": "EMAHook", "momentum": section.ema_momentum, "strict_load": True})
    return Runner(
        model=model,
        work_dir=str(work_dir),
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
        default_hooks={
            "logger": {"type": "LoggerHook", "interval": section.log_every},
            "checkpoint": {
                "type": "CheckpointHook",
                "interval": 1,
                "max_keep_ckpts": 2,
                "save_best": "score",
                "rule": "greater",
            },
        },
        custom_hooks=hooks,
        visualizer={
            "type": "Visualizer",
            "vis_backends": [{"type": "TensorboardVisBackend"}, {"type": "LocalVisBackend"}],
        },
        log_processor={"window_size": section.log_every},
        randomness={"seed": seed},
        # All batches have the same shapes, so the fastest convolutions are sought once.
        env_cfg={"cudnn_benchmark": cuda, "dist_cfg": {"backend": "nccl"}},
        launcher=launcher,
        resume=resume,
        # MMEngine finds logs and hubs again by this name, so two trainings in one process must not share it.
        experiment_name=f"{config.name} {work_dir.resolve()}",
        cfg=config.source,
    )


def build_optimizer(model: TrainingModel, section: TrainSection) -> torch.optim.AdamW:
    """AdamW that leaves biases and the scales of norms alone with its decay, slower in the backbone where asked to."""
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
