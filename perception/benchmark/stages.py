"""Measurements in stages: each stage is a process with a time limit, each of its measurements has one too.

A process of its own is what survives everything: after an illegal memory access no call of CUDA works any more, and a
compiler that hangs can only be killed. Results are handed over one by one, so that nothing measured is lost.
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

import torch

SHORTEST = 3.0  # seconds; with less time left a stage is not started
GRACE = 5.0  # seconds that a stage may take beyond its limit before its process is killed
AGAIN = 0.5  # seconds; an exception may have met code that ignores exceptions, such as the callback of a weak reference


class OutOfTime(BaseException):
    """A measurement has used up its time; no `Exception`, so that no library takes it for a failure of its own."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `OutOfTime` in the block after so many seconds, and again until it ends; only in the main thread."""

    def stop(_signal, _frame) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Recorder:
    """Runs measurements, and hands over a row for each, whatever goes wrong in it.

    Args:
        send: takes a row, a dict of plain JSON values.
        seconds: of all measurements together.
    """

    def __init__(self, send: Callable[[dict], None], seconds: float) -> None:
        self._send, self._deadline = send, time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until the time of the stage is used up."""
        return self._deadline - time.monotonic()

    def attempt(self, name: str, limit: float, measure: Callable[..., dict], *arguments) -> dict:
        """One measurement.

        Args:
            name: of its row.
            limit: seconds; what is left to the stage counts where that is less.
            measure: returns the values of the row.
            arguments: of `measure`.

        Returns:
            The row; it has an `error`, a sentence, where the measurement failed.
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
        except Exception as error:  # whatever compilers, drivers and kernels may raise
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
        except RuntimeError:  # no call of CUDA works any more; the measurements that follow have it in their rows
            return


@dataclass(frozen=True)
class Stage:
    """Measurements that share a process.

    Args:
        name: of its rows.
        model: of its rows.
        measure: called in the process with a `Recorder` and `arguments`; a function that can be imported by name.
        arguments: plain values.
        seconds: of the whole stage.
    """

    name: str
    model: str
    measure: Callable[..., None]
    arguments: tuple
    seconds: float


def run_stages(stages: Sequence[Stage], seconds: float) -> Iterator[dict]:
    """The rows of all stages, as they come.

    While one stage runs, the process of the next one already imports its libraries.

    Args:
        stages: in order.
        seconds: of all stages together; those for which no time is left have one row, with an `error`.
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
    """A stage in a process that has been started and waits for its turn."""

    def __init__(self, stage: Stage) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share what CUDA knows of its parent
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, stage.measure, stage.arguments))
        self._process.start()
        theirs.close()

    def run(self, seconds: float) -> Iterator[dict]:
        """Rows until the stage ends, by itself or by force; its time counts from when its libraries are there."""
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
        self._process.kill()
        self._process.join()
        self._connection.close()


def _serve(connection: Connection, measure: Callable[..., None], arguments: tuple) -> None:
    """What the process of a stage does; None says that it is ready, and again that it is done."""
    try:
        connection.send(None)
        seconds = connection.recv()
    except (EOFError, OSError):  # whoever started this process has gone
        return
    try:
        measure(Recorder(connection.send, seconds), *arguments)
    except Exception as error:  # what a stage prepares for its measurements may fail too
        connection.send({"name": "", "error": _sentence(error)})
    connection.send(None)
