"""Trains by a config while the process is killed at given moments, and goes on each time with the same folder.

    python tests/killed_training.py CONFIG OUT '["step 2", "0.7 s", ...]'

Each moment kills one process with SIGKILL, which no code can catch. A training that is finished before its moment comes
is followed by one in a new folder; the last one runs to its end. Prints the folders as a JSON list.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import safetensors.torch
import torch
from tqdm import tqdm

from perception.engine import loops
from perception.engine.config import load_config
from perception.engine.training import train

torch.set_num_threads(1)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(owner: object, name: str, count: int, before: bool) -> None:
    """Kills this process before or after the call number `count` of a function."""
    function, calls = getattr(owner, name), []

    def counted(*arguments, **keywords):
        calls.append(1)
        if before and len(calls) == count:
            die()
        result = function(*arguments, **keywords)
        if len(calls) == count:
            die()
        return result

    setattr(owner, name, counted)


def kill_halfway(owner: object, name: str, path_argument: int, count: int) -> None:
    """Kills this process when call number `count` of a writing function has written half of its file."""
    function, calls = getattr(owner, name), []

    def halved(*arguments, **keywords):
        calls.append(1)
        result = function(*arguments, **keywords)
        if len(calls) == count:
            path = arguments[path_argument]
            os.truncate(path, os.path.getsize(path) // 2)
            die()
        return result

    setattr(owner, name, halved)


def arm(moment: str) -> None:
    """Arms this process for a moment such as `step 3`, `before rename 2` or `half checkpoint 1`."""
    *words, count = moment.split()
    before = words[0] == "before"
    match words[-1]:
        case "step":
            kill_at(loops.StreamTrainLoop, "run_iter", int(count), before)
        case "rename":
            kill_at(os, "replace", int(count), before)
        case "removal":
            kill_at(Path, "unlink", int(count), before)
        case "stream":
            kill_at(loops, "predict_shared", int(count), before)
        case "evaluation":
            kill_at(loops, "evaluate_predictions", int(count), before)
        case "checkpoint":
            kill_halfway(torch, "save", 1, int(count))
        case "weights":
            kill_halfway(safetensors.torch, "save_file", 1, int(count))
        case _:
            raise ValueError(moment)


def run(config: str, folder: Path, moment: str | None) -> bool:
    """Trains in a child process until the moment or the end; returns whether the training is finished."""
    process = os.fork()
    if process == 0:
        with open(f"{folder}.log", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        tqdm.set_lock(threading.RLock())  # the one of tqdm is shared by all processes: a killed one would keep it
        if moment and not moment.endswith(" s"):
            arm(moment)
        train(load_config(config), folder, seed=5, resume=True)
        os._exit(0)
    if moment and moment.endswith(" s"):
        time.sleep(float(moment.split()[0]))
        os.kill(process, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if code not in (0, -signal.SIGKILL):
        sys.exit(f"{moment}: exit code {code}; see {folder}.log")
    return code == 0


if __name__ == "__main__":
    config, out, moments = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    folders = [out / "0"]
    for moment in moments:
        if run(config, folders[-1], moment):
            folders.append(out / str(len(folders)))
    while not run(config, folders[-1], None):
        pass
    print(json.dumps([str(folder) for folder in folders]))
