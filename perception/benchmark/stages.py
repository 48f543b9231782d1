"""Runs measurements in stages. Each stage is a process with a time limit; each measurement has a limit too.

A separate process isolates failures: after an illegal memory access no CUDA call of a process works, and a compiler
that hangs can only be killed. Results are sent one by one, so that no measurement is lost.
"""

from __future__ import annotations

import gc
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

import torch

SHORTEST = 3.0  # seconds; a stage is not started with less time left
GRACE = 5.0  # seconds beyond the limit of a stage after which its process is killed
REPEAT = 0.5  # seconds; the exception is raised again, because callbacks of weak references, for example, ignore it


class OutOfTime(BaseException):
    """A measurement exceeded its time limit. It is not an `Exception`, so that libraries do not handle it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `OutOfTime` in the block after a time, repeatedly until the block ends; only in the main thread."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), REPEAT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Recorder:
    """Runs measurements and sends a row for each, also for those that fail.

    Args:
        send: receives a row, a dict of plain JSON values.
        seconds: time limit of all measurements together.
    """

    def __init__(self, send: Callable[[dict], None], seconds: float) -> None:
        self._send, self._deadline = send, time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until the time limit of the stage."""
        return self._deadline - time.monotonic()

    def attempt(self, name: str, limit: float, measure: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """Runs one measurement.

        Args:
            name: of its row.
            limit: seconds; at most the time left of the stage.
            measure: returns the values of the row as a dict.
            arguments: of `measure`.

        Returns:
            The row; it has an `error`, a sentence, if the measurement failed.
        """
        limit = min(limit, self.left)
        try:
            if limit <= 0:
                raise OutOfTime
            with time_limit(limit):
                row = measure(*arguments)
        except OutOfTime:
            row = {"error": f"stopped after {max(limit, 0):.0f} s"}
        except torch.OutOfMemoryError:
            row = {"error": "out of memory"}
        except Exception as error:  # compilers, drivers and kernels raise all kinds
            row = {"error": _sentence(error)}
        if "error" in row:
            _free_memory()
        row = {"name": name, **row}
        self._send(row)
        return row


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.empty_cache()
        except RuntimeError:  # CUDA has failed; the rows of all further measurements have the error
            return


@dataclass(frozen=True)
class Stage:
    """Measurements that share a process.

    Args:
        name: of its rows.
        model: of its rows.
        measure: called in the process with a `Recorder` and `arguments`; must be importable by name.
        arguments: plain values.
        seconds: time limit of the stage.
    """

    name: str
    model: str
    measure: Callable[..., None]
    arguments: tuple
    seconds: float


def run_stages(stages: Sequence[Stage], seconds: float) -> Iterator[dict]:
    """Yields the rows of all stages as they come.

    While one stage runs, the process of the next one imports its libraries.

    Args:
        stages: in order.
        seconds: time limit of all stages together; a stage without time left has one row with an `error`.
    """
    deadline = time.monotonic() + seconds
    waiting = [_Process(stages[0])] if stages else []
    try:
        for number, stage in enumerate(stages):
            process = waiting.pop()
            if number + 1 < len(stages):
                waiting.append(_Process(stages[number + 1]))
            left = min(stage.seconds, deadline - time.monotonic() - GRACE)
            rows = process.run(left) if left >= SHORTEST else iter([{"name": "", "error": "no time was left"}])
            for row in rows:
                yield {"stage": stage.name, "model": stage.model, **row}
            process.end()
    finally:
        for process in waiting:
            process.end()


class _Process:
    """A stage in a process that is started and waits until it may run."""

    def __init__(self, stage: Stage) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share the CUDA state of its parent
        self._connection, remote = context.Pipe()
        self._process = context.Process(target=_serve, args=(remote, stage.measure, stage.arguments))
        self._process.start()
        remote.close()

    def run(self, seconds: float) -> Iterator[dict]:
        """Yields rows until the stage ends or is stopped; its time counts from the end of its imports."""
        limit = seconds + GRACE
        deadline = time.monotonic() + limit
        ready = False
        while self._connection.poll(max(deadline - time.monotonic(), 0)):
            try:
                row = self._connection.recv()
            except EOFError:
                self._process.join()
                yield {"name": "", "error": f"the process ended with code {self._process.exitcode}"}
                return
            if row is not None:
                yield row
            elif ready:
                return
            else:
                ready = True
                deadline = time.monotonic() + limit
                self._connection.send(seconds)
        yield {"name": "", "error": f"the process was ended after {limit:.0f} s"}

    def end(self) -> None:
        """Kills the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()


def _serve(connection: Connection, measure: Callable[..., None], arguments: tuple) -> None:
    """Runs a stage in its process; sends None when it is ready, and again when it is done."""
    try:
        connection.send(None)
        seconds = connection.recv()
    except (EOFError, OSError):  # the parent process has ended
        return
    try:
        measure(Recorder(connection.send, seconds), *arguments)
    except Exception as error:  # the preparation of a stage may fail too
        connection.send({"name": "", "error": _sentence(error)})
    connection.send(None)
