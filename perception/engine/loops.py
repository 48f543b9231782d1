"""Loops and hooks for MMEngine's Runner.

The loops pass the memory from clip to clip, name the samples of a failed step, and validate by streaming. The hooks log
the frame rate, write weights for use without MMEngine, and keep checkpoints to plain values.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, all_reduce_params, broadcast_object_list, get_dist_info
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, Runner
from torch import nn
from torch.utils.data import DataLoader

from perception.errors import TrainingError
from perception.evaluation.dataset import evaluate_predictions
from perception.inference.sequence import predict_stream
from perception.models import Network
from perception.models.checkpoint import halve, save_checkpoint
from perception.models.provenance import provenance_of
from perception.types import Clip, State, map_tensors


def core_of(runner: Runner) -> Network:
    """Returns the network of a Runner, without losses and without the wrapper for distributed training."""
    model = runner.model
    return (model.module if is_model_wrapper(model) else model).core


class CheckedOptimWrapper(OptimWrapper):
    """Clips gradients, raises an error if they are not finite, and runs the forward pass in bfloat16 if requested.

    bfloat16 has the range of float32, so it needs no loss scaling on CPU and GPU.

    Raises:
        FloatingPointError: from `update_params`, if the norm of the gradient is not finite.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, clip_grad: dict, device_type: str, bfloat16: bool) -> None:
        super().__init__(optimizer, clip_grad=clip_grad)
        self.device_type, self.bfloat16 = device_type, bfloat16

    def optim_context(self, model: nn.Module) -> torch.autocast:
        """Returns the autocast context of the forward pass."""
        return torch.autocast(self.device_type, torch.bfloat16, enabled=self.bfloat16)

    def _clip_grad(self) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, **self.clip_grad_kwargs)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient has norm {norm.item()} although every loss is finite")
        self.message_hub.update_scalar("train/grad_norm", float(norm))


class StreamTrainLoop(EpochBasedTrainLoop):
    """Trains epochs over scenes and passes the memory from clip to clip of each scene.

    Args:
        runner: the Runner.
        dataloader: with batches in the order of `TrainSampler`.
        streams: number of batches that alternate, each with its own memory; see `TrainSampler`.
        image_epochs: number of epochs at the start that train only the image losses. They teach the image encoder
            classes and depths at half the cost, and the BEV map needs such features before it can learn.
        schedule: further arguments of EpochBasedTrainLoop.

    Raises:
        TrainingError: from `run`, with the names of the samples, if a loss or a gradient is not finite.
    """

    def __init__(
        self, runner: Runner, dataloader: DataLoader, streams: int, image_epochs: int, **schedule: Any
    ) -> None:
        super().__init__(runner, dataloader, **schedule)
        self.image_epochs = image_epochs
        self.states: list[State | None] = [None] * streams

    def run_epoch(self) -> None:
        """Runs one epoch, with an empty memory at its start."""
        self.states = [None] * len(self.states)  # every epoch starts at the beginning of scenes
        super().run_epoch()

    def run_iter(self, idx: int, data_batch: Clip) -> None:
        """Runs one training step on batch `idx` of the epoch."""
        runner, model, stream = self.runner, self.runner.model, idx % len(self.states)
        runner.call_hook("before_train_iter", batch_idx=idx, data_batch=data_batch)
        device = next(model.parameters()).device
        clip = map_tensors(lambda tensor: tensor.to(device, non_blocking=True), data_batch)
        try:
            with runner.optim_wrapper.optim_context(model):
                losses, self.states[stream] = model(clip, self.states[stream], self.epoch < self.image_epochs)
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
    """Validates by streaming: each process runs a share of the scenes, and one process evaluates all predictions.

    Args:
        runner: the Runner.
        dataloader: with the validation dataset.
        evaluator: not used; MMEngine passes one.
    """

    def __init__(self, runner: Runner, dataloader: DataLoader, evaluator: object) -> None:
        super().__init__(runner, dataloader)

    def run(self) -> dict[str, float]:
        """Runs the validation and returns its metrics."""
        runner, dataset = self.runner, self.dataloader.dataset
        runner.call_hook("before_val")
        runner.call_hook("before_val_epoch")
        rank, world = get_dist_info()
        core = copy.deepcopy(core_of(runner)).eval()
        core.load_state_dict(halve(core.state_dict()))  # evaluates the weights that `ExportHook` writes
        stream = predict_stream(core, dataset, rank=rank, world_size=world, workers=self.dataloader.num_workers)
        predictions = {token: objects for part in all_gather_object(stream.objects) for token, objects in part.items()}
        results = [evaluate_predictions(dataset, predictions).metrics() if rank == 0 else {}]
        broadcast_object_list(results)
        metrics = results[0] | {"fps": 1 / stream.seconds_per_frame}
        runner.call_hook("after_val_epoch", metrics=metrics)
        runner.call_hook("after_val")
        return metrics


class FrameRateHook(Hook):
    """Logs the training throughput in frames per second over all processes."""

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Clip, outputs: dict | None = None) -> None:
        """Logs the throughput of one iteration."""
        seconds = runner.message_hub.get_scalar("train/time").current()
        _, world = get_dist_info()
        runner.message_hub.update_scalar("train/frames_per_s", data_batch.sample_index.numel() * world / seconds)


class SharedStatisticsHook(Hook):
    """Averages the running statistics of batch norms over all processes after every step.

    Each process trains on other scenes. Without this hook the processes would validate different networks, and a
    checkpoint would hold the statistics of one of them.
    """

    priority = "ABOVE_NORMAL"  # before the EMA hook copies the statistics

    def before_train(self, runner: Runner) -> None:
        """Collects the batch norms of the network."""
        norm = nn.modules.batchnorm._BatchNorm
        self.norms = [part for part in core_of(runner).modules() if isinstance(part, norm)]

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Clip, outputs: dict | None = None) -> None:
        """Averages the running statistics."""
        statistics = [x for norm in self.norms if norm.training for x in (norm.running_mean, norm.running_var)]
        all_reduce_params(statistics, op="mean")


class PlainCheckpointHook(Hook):
    """Reduces checkpoints to tensors and plain values, which torch.load reads without running code from the file.

    MMEngine 0.10.7 also pickles histories of logged scalars, which are objects with bound methods that torch >= 2.6
    rejects. The histories only smooth the log, so a resumed training starts with empty ones.
    """

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Removes the histories and converts numpy scalars."""
        hub = checkpoint["message_hub"]
        hub["log_scalars"] = {}
        hub["runtime_info"] = {
            key: value.item() if isinstance(value, np.generic) else value for key, value in hub["runtime_info"].items()
        }


class ExportHook(Hook):
    """Writes the validated weights in float16 for use without MMEngine.

    It writes `<name>-last.safetensors` after every validation and `<name>.safetensors` if the score is the best so far.
    With EMA the weights are the averaged ones.

    Args:
        name: of the files in the work directory.
    """

    priority = "HIGH"  # before the EMA hook swaps the raw weights back in

    def __init__(self, name: str) -> None:
        self.name = name

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Writes the weights after a validation."""
        if get_dist_info()[0] != 0 or metrics is None:
            return
        core, report = core_of(runner), metrics | {"epoch": runner.epoch}
        provenance = provenance_of(runner.train_dataloader.dataset)
        names = [f"{self.name}-last.safetensors"]
        if metrics["score"] > runner.message_hub.runtime_info.get("best_score", -math.inf):
            names.append(f"{self.name}.safetensors")
        for name in names:
            save_checkpoint(Path(runner.work_dir, name), core, report, half=True, provenance=provenance)
