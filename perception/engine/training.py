"""Training with MMEngine's Runner: the adapter between the core library and the engine.

The core knows nothing of the engine. What the engine needs is here: a model that unrolls a clip and returns losses,
loops that name the samples of a failed step and validate by streaming, and hooks for the frame rate and the exported
weights. Loops and hooks are handed to the Runner as classes; nothing is registered by name.
"""

from __future__ import annotations

import copy
import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import all_gather_object, broadcast_object_list, get_dist_info, init_dist, is_distributed
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, Runner, find_latest_checkpoint, set_random_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from perception.data.loader import TrainSampler, collate
from perception.engine.config import TrainConfig, TrainSection, build_dataset
from perception.errors import CheckpointError, ConfigError, TrainingError
from perception.evaluation.streaming import evaluate_scenes, predict_stream
from perception.losses import LOSS_WEIGHTS, image_losses, set_losses
from perception.models.backbone import load_trunk
from perception.models.bev_transformer import BEVTransformer, ModelConfig
from perception.models.checkpoint import (
    Network,
    NetworkConfig,
    build_network,
    halve,
    load_checkpoint,
    misfits,
    save_checkpoint,
)
from perception.published_losses import loss_weights, losses_of
from perception.types import Clip, State, map_tensors


class TrainingModel(BaseModel):
    """A network and its losses.

    Args:
        core: the network.
        without: names of losses to leave out.

    Raises:
        ConfigError: there is no loss of such a name, or none is left.
    """

    def __init__(self, core: Network, without: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.core, self.without = core, without
        weights = LOSS_WEIGHTS if isinstance(core, BEVTransformer) else loss_weights(core)
        if unknown := sorted(set(without) - set(weights)):
            raise ConfigError(f"train.without names {unknown[0]!r}; the losses are {', '.join(weights)}")
        if set(without) == set(weights):
            raise ConfigError("train.without names all losses; leave at least one")

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
            shown = self.core.look(flat.frames)[0]
            with torch.autocast(flat.sample_index.device.type, enabled=False):
                shown = map_tensors(Tensor.float, shown)
                return self._checked(image_losses(shown, flat.truth.boxes, flat.frames)), state
        state = self.core.initial_state(B) if state is None else state
        losses: dict[str, Tensor] = {}
        for t in range(T):
            now = map_tensors(lambda tensor, t=t: tensor[:, t], clip)
            prediction, state = self.core(now.frames, state)
            # Matching and losses stay in float32 whatever the network runs in.
            with torch.autocast(clip.sample_index.device.type, enabled=False):
                prediction = map_tensors(Tensor.float, prediction)
                if isinstance(self.core, BEVTransformer):
                    told = set_losses(prediction, now.truth, now.frames, self.core.grid)
                else:
                    told = losses_of(self.core, prediction, now.truth, now.frames)
                for name, loss in told.items():
                    losses[name] = losses[name] + loss / T if name in losses else loss / T
        return self._checked(losses), map_tensors(Tensor.detach, state)

    def _checked(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        finite = torch.stack(list(losses.values())).isfinite().tolist()
        for name, ok in zip(losses, finite, strict=True):
            if not ok:
                raise FloatingPointError(f"loss {name} is {losses[name].item()}")
        return {name: loss for name, loss in losses.items() if name not in self.without}


class CheckedOptimWrapper(OptimWrapper):
    """Refuses to step along a gradient that is not finite; runs the forward pass in bfloat16 where asked to.

    bfloat16 has float32's range, so no loss scaling is needed, and it is the same on CPU and GPU.
    """

    def __init__(self, optimizer, clip_grad: dict, device_type: str, bfloat16: bool) -> None:
        super().__init__(optimizer, clip_grad=clip_grad)
        self.autocast = {"device_type": device_type, "dtype": torch.bfloat16, "enabled": bfloat16}

    def optim_context(self, model: nn.Module):
        """The context of the forward pass."""
        return torch.autocast(**self.autocast)

    def _clip_grad(self) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, **self.clip_grad_kwargs)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient has norm {norm.item()} although every loss is finite")
        self.message_hub.update_scalar("train/grad_norm", float(norm))


class StreamTrainLoop(EpochBasedTrainLoop):
    """Epochs over scenes with the memory handed on along each scene; a step that is not finite ends training with
    the names of its samples.

    Args:
        groups: batches that take turns, each with a memory of its own; see `TrainSampler`.
        image_epochs: the first epochs, which train what the images show and nothing else. Where an object is seen, and
            how far away, is learned from images alone at half the cost; a map cannot be learned from features that do
            not know it yet.
    """

    def __init__(self, runner: Runner, dataloader: DataLoader, groups: int, image_epochs: int, **schedule) -> None:
        super().__init__(runner, dataloader, **schedule)
        self.image_epochs = image_epochs
        self.states: list[State | None] = [None] * groups

    def run_epoch(self) -> None:
        self.states = [None] * len(self.states)  # every epoch starts at the beginning of scenes
        super().run_epoch()

    def run_iter(self, idx: int, data_batch: Clip) -> None:
        runner, model, group = self.runner, self.runner.model, idx % len(self.states)
        runner.call_hook("before_train_iter", batch_idx=idx, data_batch=data_batch)
        device = next(model.parameters()).device
        clip = map_tensors(lambda tensor: tensor.to(device, non_blocking=True), data_batch)
        try:
            with runner.optim_wrapper.optim_context(model):
                losses, self.states[group] = model(clip, self.states[group], self.epoch < self.image_epochs)
            total = sum(losses.values())
            runner.optim_wrapper.update_params(total)
        except FloatingPointError as error:
            tokens = [self.dataloader.dataset.tokens[i] for i in data_batch.sample_index.flatten().tolist()]
            raise TrainingError(
                f"training stopped at iteration {self.iter + 1}: {error} for the samples {', '.join(tokens)}; look at "
                "their annotations and calibration, or lower train.lr"
            ) from None
        outputs = {"loss": total, **losses}
        runner.call_hook("after_train_iter", batch_idx=idx, data_batch=data_batch, outputs=outputs)
        self._iter += 1


class StreamValLoop(BaseLoop):
    """Streams the validation split in scene order, scenes shared out among the processes, and evaluates all of it once.

    Args:
        runner: the Runner.
        dataloader: holds the dataset to stream.
        evaluator: nothing; MMEngine passes one.
    """

    def __init__(self, runner: Runner, dataloader: DataLoader, evaluator: object) -> None:
        super().__init__(runner, dataloader)

    def run(self) -> dict[str, float]:
        runner, dataset = self.runner, self.dataloader.dataset
        runner.call_hook("before_val")
        runner.call_hook("before_val_epoch")
        rank, world = get_dist_info()
        model = runner.model.module if hasattr(runner.model, "module") else runner.model
        core = copy.deepcopy(model.core).eval()
        core.load_state_dict(halve(core.state_dict()))  # judged as it is exported
        stream = predict_stream(core, dataset, rank=rank, world_size=world, workers=self.dataloader.num_workers)
        scenes = {token: scene for part in all_gather_object(stream.scenes) for token, scene in part.items()}
        told = [evaluate_scenes(dataset, scenes).metrics() if rank == 0 else None]
        broadcast_object_list(told)
        metrics = told[0] | {"fps": 1 / stream.seconds_per_frame}
        runner.call_hook("after_val_epoch", metrics=metrics)
        runner.call_hook("after_val")
        return metrics


class FrameRateHook(Hook):
    """Logs the frames trained on per second, over all processes."""

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Clip, outputs: dict | None = None) -> None:
        seconds = runner.message_hub.get_scalar("train/time").current()
        _, world = get_dist_info()
        runner.message_hub.update_scalar("train/frames_per_s", data_batch.sample_index.numel() * world / seconds)


class PlainCheckpointHook(Hook):
    """Keeps checkpoints to tensors and plain values, which torch.load reads without running code from the file.

    MMEngine 0.10.7 also pickles histories of logged scalars, objects with bound methods that torch >= 2.6 refuses for
    good reason. They only smooth the log, so a resumed training starts them afresh.
    """

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        hub = checkpoint["message_hub"]
        hub["log_scalars"] = {}
        hub["runtime_info"] = {
            key: value.item() if isinstance(value, np.generic) else value for key, value in hub["runtime_info"].items()
        }


class ExportHook(Hook):
    """Writes the validated weights (the averaged ones where there is an average), in half floats, for use without the
    engine.

    `<name>-last.safetensors` after every validation, `<name>.safetensors` where the score is the best so far.

    Args:
        name: of the files in the work directory.
    """

    priority = "HIGH"  # before the averaged weights are swapped out again

    def __init__(self, name: str) -> None:
        self.name = name

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if get_dist_info()[0] != 0:
            return
        core = (runner.model.module if hasattr(runner.model, "module") else runner.model).core
        told = metrics | {"epoch": runner.epoch}
        save_checkpoint(Path(runner.work_dir, f"{self.name}-last.safetensors"), core, told, half=True)
        if metrics["score"] > runner.message_hub.runtime_info.get("best_score", -math.inf):
            save_checkpoint(Path(runner.work_dir, f"{self.name}.safetensors"), core, told, half=True)


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
        launcher: "none", or "pytorch", "slurm" or "mpi" for one process per GPU.

    Returns:
        The network after the last epoch (raw weights, not their average).

    Raises:
        CheckpointError: the weights to start from are missing or belong to another network.
        ConfigError: the work directory holds another training, or the config cannot be.
        DataError: the dataset is missing or malformed.
        TrainingError: a loss or a gradient is not finite.
    """
    check_trainable(config)
    work_dir = Path(work_dir)
    if not resume and find_latest_checkpoint(str(work_dir)):
        raise ConfigError(
            f"{work_dir} already holds checkpoints of a training; add --resume or choose another --work-dir"
        )
    set_random_seed(seed)
    train_set, val_set = build_dataset(config.train_data, config.model), build_dataset(config.val_data, config.model)
    # Channels last is what convolutions are fastest with, on CPU and GPU.
    model = TrainingModel(make_core(config), config.train.without).to(memory_format=torch.channels_last)
    runner = _build_runner(config, work_dir, model, train_set, val_set, seed, resume, amp, launcher)
    runner.train()
    return model.core


def make_core(config: TrainConfig) -> Network:
    """The network that a training starts with.

    Raises:
        CheckpointError: the weights to start from are missing or belong to another network.
        ConfigError: weights are given twice, or not so many stages can be frozen.
    """
    section = config.train
    if section.init_from and section.trunk_weights:
        raise ConfigError("train.init_from and train.trunk_weights are both given; the first holds a trunk already")
    core = build_network(config.model)
    if section.init_from:
        core.load_state_dict(load_weights(section.init_from, config.model, any_size=True).state_dict())
    trunk = core.image_encoder.trunk
    if section.trunk_weights:
        load_trunk(trunk, section.trunk_weights)
    trunk.freeze(section.frozen_stages)
    return core


def check_trainable(config: TrainConfig) -> None:
    """Refuses a config that is for evaluation only.

    Raises:
        ConfigError: it has no `train` or `train_data`, or asks for what its network cannot.
    """
    for name in ("train", "train_data"):
        if getattr(config, name) is None:
            raise ConfigError(f"config {config.name} has no section {name}: it is for evaluation; choose another one")
    if config.train.image_epochs and not isinstance(config.model, ModelConfig):
        raise ConfigError(
            f"config {config.name}: train.image_epochs must be 0, its network has no losses in the images"
        )


def load_weights(path: str | Path, model_config: NetworkConfig, *, any_size: bool = False) -> Network:
    """A network in evaluation mode with the weights of a file.

    Args:
        path: weights exported by training (`.safetensors`) or a training checkpoint (`.pth`).
        model_config: the network that is wanted.
        any_size: the file may be of a network for images of another size; no weight depends on it.

    Raises:
        CheckpointError: the file is missing, unreadable, or belongs to another architecture.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        core, _ = load_checkpoint(path)
        if type(core.config) is not type(model_config):
            raise CheckpointError(
                f"{path}: holds a {type(core).__name__}, the config wants another network; use the config it belongs to"
            )
        for field in fields(model_config):
            has, wants = getattr(core.config, field.name), getattr(model_config, field.name)
            if has != wants and not (any_size and field.name == "image_size"):
                raise CheckpointError(
                    f"{path}: its network has {field.name}={has}, the config's model has {wants}; use the config "
                    "it was trained with"
                )
        return core
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; give a .safetensors or .pth file that training wrote")
    model = TrainingModel(build_network(model_config))
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:  # whatever unpickling foreign bytes may raise
        raise CheckpointError(
            f"{path}: not a readable training checkpoint ({type(error).__name__}); give a file that training wrote, "
            "or import one of the published code with scripts/import_checkpoint.py"
        ) from None
    for name in misfits(model, weights):
        raise CheckpointError(
            f"{path}: its {name} does not fit the config's model; evaluate with the config it was trained with"
        )
    model.load_state_dict(weights)
    return model.core.eval()


def _build_runner(config, work_dir, model, train_set, val_set, seed, resume, amp, launcher) -> Runner:
    section: TrainSection = config.train
    cuda = torch.cuda.is_available()
    if section.groups < 1:
        raise ConfigError(f"train.groups is {section.groups}; give at least 1")
    if not 0 <= section.drop_frames < 1:
        raise ConfigError(f"train.drop_frames is {section.drop_frames}; give a share of at least 0 and less than 1")
    if launcher != "none" and not cuda:
        raise ConfigError(f"--launcher {launcher} needs a GPU per process and finds none; train with --launcher none")
    if launcher != "none" and not is_distributed():
        init_dist(launcher)  # before the sampler, which asks how many processes there are
    loading = {"collate_fn": collate, "num_workers": section.workers}
    train_loader = DataLoader(
        train_set,
        batch_size=section.batch_size,
        sampler=TrainSampler(
            train_set.scene_of_sample,
            section.batch_size,
            section.groups,
            section.window,
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
    hooks = [{"type": FrameRateHook}, {"type": PlainCheckpointHook}, {"type": ExportHook, "name": config.name}]
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
            "groups": section.groups,
            "image_epochs": section.image_epochs,
        },
        val_dataloader=DataLoader(val_set, batch_size=1, **loading),
        val_cfg={"type": StreamValLoop},
        val_evaluator={},
        optim_wrapper={
            "type": CheckedOptimWrapper,
            "optimizer": build_optimizer(model, section),
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
    """AdamW that leaves biases and the scales of norms alone with its decay, slower in the trunk where asked to."""
    trunk = set(model.core.image_encoder.trunk.parameters())
    groups = []
    for inside in (False, True):
        for matrices in (True, False):
            chosen = [
                p for p in model.parameters() if p.requires_grad and (p in trunk) == inside and (p.ndim > 1) == matrices
            ]
            if chosen:
                lr = section.lr * (section.trunk_lr_share if inside else 1.0)
                groups.append({"params": chosen, "lr": lr, **({} if matrices else {"weight_decay": 0.0})})
    return torch.optim.AdamW(groups, lr=section.lr, weight_decay=section.weight_decay)
