"""Loops and hooks for MMEngine's Runner.

The loops pass the memory from clip to clip, name the samples of a failed step, validate by streaming, and save and
restore checkpoints. The hooks average statistics and write weights for use without MMEngine.
"""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import torch
from mmengine.config import Config
from mmengine.dist import (
    all_gather_object,
    all_reduce,
    all_reduce_params,
    barrier,
    broadcast_object_list,
    get_dist_info,
)
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from perception import __version__
from perception.data.nuscenes import NuScenesDataset
from perception.engine.checkpoints import WorkDir, plain
from perception.engine.step_times import StepFlop, StepTimes
from perception.errors import Interrupted, TrainingError
from perception.evaluation.dataset import evaluate_predictions
from perception.inference.acceleration import accelerated
from perception.inference.shared import from_first, predict_shared
from perception.models import Network
from perception.models.checkpoint import halve, read_metrics, save_checkpoint
from perception.models.provenance import provenance_of
from perception.types import Clip, Memory, map_tensors

SAVE_SECONDS = 600  # between two checkpoints inside of an epoch
_SET_BY_CONFIG = ("lr", "initial_lr", "weight_decay")  # of a parameter group


def unwrapped(runner: Runner) -> Any:
    """Returns the model of a Runner, without the wrapper for distributed training."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def core_of(runner: Runner) -> Network:
    """Returns the network of a Runner, without losses."""
    return unwrapped(runner).core


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


class StopRequest:
    """Catches SIGTERM and SIGINT while it is entered, so that a training ends with a checkpoint.

    A second signal ends the process at once, and so does the first one inside of `nothing_to_save`. Signals are caught
    in the main thread of the main process only; elsewhere they keep their meaning.
    """

    def __init__(self) -> None:
        self.signal_number = 0  # of the signal that was received
        self._process, self._wait = os.getpid(), True
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker process that inherited the handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        again, self.signal_number = bool(self.signal_number), number
        if again or not self._wait:
            self.stop("with its last checkpoint")

    @contextmanager
    def nothing_to_save(self) -> Iterator[None]:
        """Ends the process at once on a signal inside of the block, also on one that was received before."""
        self._wait = False
        try:
            if self.signal_number:
                self.stop("with its last checkpoint")
            yield
        finally:
            self._wait = True

    def stop(self, what: str) -> NoReturn:
        """Raises the error that ends the training.

        Raises:
            Interrupted: always.
        """
        number = self.signal_number or signal.SIGTERM
        raise Interrupted(
            f"the training was stopped by {signal.Signals(number).name} {what}; repeat the command with --resume to "
            "go on",
            number,
        )


class StreamTrainLoop(EpochBasedTrainLoop):
    """Trains epochs over scenes and passes the memory from clip to clip of each scene.

    It saves a checkpoint after each epoch, in long epochs also every `SAVE_SECONDS`, and when a signal asks it to stop.

    Args:
        runner: holds the work directory, the settings and the request to stop.
        dataloader: with batches in the order of `TrainSampler`.
        streams: number of batches that alternate, each with its own memory; see `TrainSampler`.
        image_epochs: number of epochs at the start that train only the image losses. They teach the image encoder
            classes and depths at half the cost, and the BEV map needs such features before it can learn.
        schedule: further arguments of EpochBasedTrainLoop.

    Raises:
        Interrupted: from `run`, after a signal.
        TrainingError: from `run`, with the names of the samples, if a loss or a gradient is not finite.
    """

    runner: TrainingRunner

    def __init__(
        self, runner: TrainingRunner, dataloader: DataLoader, streams: int, image_epochs: int, **schedule: Any
    ) -> None:
        super().__init__(runner, dataloader, **schedule)
        self.image_epochs = image_epochs
        self.states: list[Memory | None] = [None] * streams
        self.batch = 0  # finished batches of the current epoch
        self.resumed = False
        self.times, self.flop = StepTimes(next(runner.model.parameters()).device), StepFlop()
        self._saved_at = time.monotonic()

    def run(self) -> nn.Module:
        """Runs all epochs, or those that are left, and the validations."""
        self.runner.call_hook("before_train")
        if self.resumed and self.batch == 0 and self._validation_is_missing():
            self._validate()
        while self._epoch < self._max_epochs:
            self.run_epoch()
            self.save()
            if self._validation_is_due():
                self._validate()
            elif self._asked()[0]:
                self.runner.stop.stop(f"after epoch {self._epoch}")
        self.runner.call_hook("after_train")
        return self.runner.model

    def _validation_is_due(self) -> bool:
        last = self._epoch == self._max_epochs
        return self._epoch >= self.val_begin and (self._epoch % self.val_interval == 0 or last)

    def _validation_is_missing(self) -> bool:
        """Whether an interruption came between the checkpoint of an epoch and the end of its validation."""
        validated = [0.0]
        if get_dist_info()[0] == 0 and self.runner.folder.last.exists():
            validated = [read_metrics(self.runner.folder.last)["epoch"]]
        broadcast_object_list(validated)
        return self._validation_is_due() and validated[0] != self._epoch

    def _validate(self) -> None:
        with self.runner.stop.nothing_to_save():
            self.runner.val_loop.run()
        self._saved_at = time.monotonic()

    def run_epoch(self) -> None:
        """Runs one epoch, or the rest of one. The memory is empty at its start."""
        if self.batch == 0:
            self.states = [None] * len(self.states)  # every epoch starts at the beginning of scenes
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        self.dataloader.sampler.set_start(self.batch)
        self.times.start()
        for idx, data_batch in enumerate(self.dataloader, self.batch):
            self.run_iter(idx, data_batch)
            self.batch = idx + 1
            if self.batch < len(self.dataloader):  # otherwise the end of the epoch follows
                asked_to_stop, is_long_ago = self._asked()
                if asked_to_stop or is_long_ago:
                    self.save()
                if asked_to_stop:
                    self.runner.stop.stop(f"after batch {self.batch} of epoch {self._epoch + 1}")
                self.times.start()
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1
        self.batch = 0

    def run_iter(self, idx: int, data_batch: Clip) -> None:
        """Runs one training step on batch `idx` of the epoch."""
        runner, model, stream = self.runner, self.runner.model, idx % len(self.states)
        runner.call_hook("before_train_iter", batch_idx=idx, data_batch=data_batch)
        device = next(model.parameters()).device
        clip = map_tensors(lambda tensor: tensor.to(device, non_blocking=True), data_batch)
        images_only, optimizer, ended = self.epoch < self.image_epochs, runner.optim_wrapper, self.times.end
        ended("data")
        try:
            with self.flop.counted((images_only, clip.frames.images.shape)):
                with optimizer.optim_context(model):
                    losses, self.states[stream] = model(clip, self.states[stream], images_only, ended)
                total = sum(losses.values())
                optimizer.backward(total)
            ended("backward")
            optimizer.step()
            optimizer.zero_grad()
            ended("optimizer")
        except FloatingPointError as error:
            tokens = [self.dataloader.dataset.tokens[i] for i in data_batch.sample_index.flatten().tolist()]
            raise TrainingError(
                f"training stopped at iteration {self.iter + 1}: {error} for the samples {', '.join(tokens)}; look at "
                "their annotations and calibration, or lower train.lr"
            ) from None
        outputs = {"loss": total, **losses}
        runner.call_hook("after_train_iter", batch_idx=idx, data_batch=data_batch, outputs=outputs)
        ended("rest")
        self._iter += 1

    def _asked(self) -> tuple[bool, bool]:
        """Whether a signal asks to stop, and whether the last checkpoint is long ago; the same in all processes."""
        answers = [bool(self.runner.stop.signal_number), time.monotonic() - self._saved_at > SAVE_SECONDS]
        if get_dist_info()[1] > 1:
            shared = torch.tensor(answers, dtype=torch.float32, device=next(self.runner.model.parameters()).device)
            all_reduce(shared, op="max")
            answers = shared.bool().tolist()
        return answers[0], answers[1]

    def save(self) -> None:
        """Writes a checkpoint with everything that the rest of the training depends on."""
        runner = self.runner
        content: dict[str, Any] = {
            "meta": {"iter": self._iter, "settings": json.dumps(self.runner.settings), "version": __version__},
            "state_dict": dict(unwrapped(runner).state_dict()),
            "optimizer": runner.optim_wrapper.state_dict(),
            "schedules": [schedule.state_dict() for schedule in runner.param_schedulers],
        }
        runner.call_hook("before_save_checkpoint", checkpoint=content)
        own = {"random": _random_states(), "memory": [state and _as_dicts(state) for state in self.states]}
        content["processes"] = all_gather_object(plain(own))
        if get_dist_info()[0] == 0:
            self.runner.folder.save(content, self._epoch, self.batch)
        barrier()  # otherwise a launcher that sees one process end kills the one that writes
        self._saved_at = time.monotonic()

    def restore(self, content: dict[str, Any], changed: Collection[str]) -> None:
        """Continues from a checkpoint.

        Args:
            content: of `WorkDir.newest`.
            changed: settings that have another value than when the checkpoint was written.
        """
        runner, optimizer = self.runner, self.runner.optim_wrapper
        runner.call_hook("after_load_checkpoint", checkpoint=content)
        unwrapped(runner).load_state_dict(content["state_dict"])
        if changed:  # the learning rates that the new settings give for this iteration
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Detected call of")  # no optimizer step between them
                for _ in range(content["meta"]["iter"]):
                    for schedule in runner.param_schedulers:
                        schedule.step()
            wanted = [{key: group[key] for key in _SET_BY_CONFIG} for group in optimizer.param_groups]
            optimizer.load_state_dict(content["optimizer"])
            for group, values in zip(optimizer.param_groups, wanted, strict=True):
                group.update(values)
        else:
            optimizer.load_state_dict(content["optimizer"])
            for schedule, state in zip(runner.param_schedulers, content["schedules"], strict=True):
                schedule.load_state_dict(state)
        self._epoch, self.batch, self._iter = (content["meta"][key] for key in ("epoch", "batch", "iter"))
        own = content["processes"][get_dist_info()[0]]
        device = next(runner.model.parameters()).device
        empty = unwrapped(runner).core.initial_state(1)
        self.states = [values and _restored(empty, values, device) for values in own["memory"]]
        _set_random_states(own["random"])
        self.resumed = True


def _as_dicts(memory: Memory) -> dict[str, Any]:
    """Converts the memory of a network to nested dicts by the names of its fields."""
    parts = zip(memory._fields, memory, strict=True)  # type: ignore[attr-defined]
    return {name: _as_dicts(part) if isinstance(part, tuple) else part for name, part in parts}


def _restored(like: Any, values: Any, device: torch.device) -> Any:
    """Converts what `_as_dicts` returned to a memory of the type of another one."""
    if not isinstance(like, tuple):
        return like if like is None else values.to(device)
    names = like._fields  # type: ignore[attr-defined]
    return type(like)(*(_restored(part, values[name], device) for name, part in zip(names, like, strict=True)))


def _random_states() -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def _set_random_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if torch.cuda.is_available() and len(states) > 1:
        torch.cuda.set_rng_state(states[1])


class Continuation(NamedTuple):
    """How a training stands to what its work directory holds."""

    folder: WorkDir
    settings: dict[str, Any]  # of this training, see `settings_of`
    checkpoint: dict[str, Any] | None  # of `WorkDir.newest`, None to start
    changed: Collection[str]  # settings that have another value than in the checkpoint


class TrainingRunner(Runner):
    """MMEngine's Runner, which continues from a checkpoint that was read before.

    MMEngine's own way follows a file that holds a path or an address, and runs the config that the checkpoint holds.

    Args:
        continuation: the work directory and what it holds.
        stop: tells whether a signal asks to stop.
        cfg: the config, of which a copy is written into the work directory.
        arguments: of Runner.
    """

    def __init__(self, continuation: Continuation, stop: StopRequest, cfg: Config, **arguments: Any) -> None:
        self.folder, self.settings, self.checkpoint, self.changed = continuation
        self.stop = stop
        work_dir = str(self.folder.path)
        with_folder = copy.deepcopy(cfg)
        with_folder.work_dir = work_dir  # trackers look there for what they upload at the end
        resume = self.checkpoint is not None
        super().__init__(**arguments, cfg=with_folder, work_dir=work_dir, resume=resume)

    def dump_config(self) -> None:
        """Writes the config into the work directory as it was given."""
        with_folder: Config = self.cfg
        self.cfg: Config = copy.deepcopy(with_folder)
        self.cfg.pop("work_dir")
        super().dump_config()
        self.cfg = with_folder

    def load_or_resume(self) -> None:
        """Continues from the checkpoint, if there is one."""
        if self.checkpoint is not None:
            self.train_loop.restore(self.checkpoint, self.changed)
            self.checkpoint = None  # frees its memory


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
        """Runs the validation and returns its metrics. The random numbers of the training do not depend on it."""
        runner, dataset = self.runner, self.dataloader.dataset
        runner.call_hook("before_val")
        runner.call_hook("before_val_epoch")
        random_states = _random_states()
        core = copy.deepcopy(core_of(runner)).eval()
        core.load_state_dict(halve(core.state_dict()))  # evaluates the weights that `ExportHook` writes
        # Float32, as `perception evaluate` runs by default: both give the same numbers for the same weights.
        network = accelerated(core, precision="float32")
        stream = predict_shared(network, dataset, workers=self.dataloader.num_workers)
        metrics = from_first(lambda: evaluate_predictions(dataset, stream.objects).metrics())
        metrics |= {"fps": 1 / stream.seconds_per_frame}
        _set_random_states(random_states)
        runner.call_hook("after_val_epoch", metrics=metrics)
        runner.call_hook("after_val")
        return metrics


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


class ExportHook(Hook):
    """Writes the validated weights in float16 for use without MMEngine.

    It writes `<name>.safetensors` if the score is the best so far, and then `<name>-last.safetensors`, which tells that
    the validation is complete. With EMA the weights are the averaged ones.
    """

    priority = "HIGH"  # before the EMA hook swaps the raw weights back in

    def after_val_epoch(self, runner: TrainingRunner, metrics: dict[str, float] | None = None) -> None:
        """Writes the weights after a validation."""
        if get_dist_info()[0] != 0 or metrics is None:
            return
        core, report = core_of(runner), metrics | {"epoch": runner.epoch}
        dataset = runner.train_dataloader.dataset
        provenance = provenance_of(dataset) if isinstance(dataset, NuScenesDataset) else None
        best = read_metrics(runner.folder.best)["score"] if runner.folder.best.exists() else -math.inf
        if metrics["score"] > best:
            save_checkpoint(runner.folder.best, core, report, half=True, provenance=provenance)
        save_checkpoint(runner.folder.last, core, report, half=True, provenance=provenance)
