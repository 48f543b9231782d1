"""What MMEngine's Runner does differently here.

Loops that hand the memory on, name the samples of a failed step and validate by streaming, and hooks for the frame rate
and the exported weights.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

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
from perception.types import Clip, State, map_tensors


def core_of(runner: Runner) -> Network:
    """The network that a Runner trains, without losses and whatever makes it one of several processes'."""
    model = runner.model
    return (model.module if is_model_wrapper(model) else model).core


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
        streams: batches that take turns, each with a memory of its own; see `TrainSampler`.
        image_epochs: the first epochs, which train what the images show and nothing else. Where an object is seen, and
            how far away, is learned from images alone at half the cost; a map cannot be learned from features that do
            not know it yet.
    """

    def __init__(self, runner: Runner, dataloader: DataLoader, streams: int, image_epochs: int, **schedule) -> None:
        super().__init__(runner, dataloader, **schedule)
        self.image_epochs = image_epochs
        self.states: list[State | None] = [None] * streams

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
        core = copy.deepcopy(core_of(runner)).eval()
        core.load_state_dict(halve(core.state_dict()))  # judged as it is exported
        stream = predict_stream(core, dataset, rank=rank, world_size=world, workers=self.dataloader.num_workers)
        scenes = {token: scene for part in all_gather_object(stream.scenes) for token, scene in part.items()}
        told = [evaluate_predictions(dataset, scenes).metrics() if rank == 0 else None]
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


class SharedStatisticsHook(Hook):
    """Gives all processes the mean of what their batch norms have seen, after every step.

    Each sees scenes of its own; without this they would be validated as different networks and resumed as one of them.
    """

    priority = "ABOVE_NORMAL"  # before the averaged network copies them

    def before_train(self, runner: Runner) -> None:
        norm = nn.modules.batchnorm._BatchNorm
        self.norms = [part for part in core_of(runner).modules() if isinstance(part, norm)]

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Clip, outputs: dict | None = None) -> None:
        seen = [tensor for norm in self.norms if norm.training for tensor in (norm.running_mean, norm.running_var)]
        all_reduce_params(seen, op="mean")


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
        core, told = core_of(runner), metrics | {"epoch": runner.epoch}
        save_checkpoint(Path(runner.work_dir, f"{self.name}-last.safetensors"), core, told, half=True)
        if metrics["score"] > runner.message_hub.runtime_info.get("best_score", -math.inf):
            save_checkpoint(Path(runner.work_dir, f"{self.name}.safetensors"), core, told, half=True)
