"""Divides work among forked processes, which see the data of their parent without a copy."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from perception.errors import PerceptionError

Job = TypeVar("Job")
Result = TypeVar("Result")

_work: Callable[[Any], Any]  # of a worker process


def processors() -> int:
    """Returns the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(work: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Generator[Result, None, None]:
    """Yields the results of all jobs in their order, whatever the number of workers.

    Processes are forked, as the workers of a DataLoader are, so `work` may be any function and may use large arrays of
    this process. It must not use a GPU. Jobs and results are copied through pipes. At most two jobs per worker are
    ahead of the one whose result is taken, which limits the memory. Workers end with their parent.

    Args:
        work: what is done with each job.
        jobs: its arguments.
        workers: largest number of processes; with 1, in a process that must not start others, or where the system
            cannot fork, the work is done here.

    Raises:
        PerceptionError: a worker was killed.
    """
    workers = min(workers, len(jobs))
    can_fork = "fork" in multiprocessing.get_all_start_methods() and not multiprocessing.current_process().daemon
    if workers <= 1 or not can_fork:
        yield from map(work, jobs)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_worker, (work,)) as pool:
        waiting: deque[Future[Any]] = deque()
        try:
            for job in jobs:
                with warnings.catch_warnings():  # of Python 3.12, about other threads; the worker uses no lock of them
                    warnings.simplefilter("ignore", DeprecationWarning)
                    waiting.append(pool.submit(_run, job))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise PerceptionError(
                f"one of {workers} worker processes was killed, probably because memory ran out; free memory, or allow "
                "fewer processors, for example with `taskset -c 0`"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """Ends this process with its parent: a killed parent cannot stop its workers."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _run(job: Any) -> Any:
    return _work(job)
