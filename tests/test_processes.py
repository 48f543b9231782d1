"""Work is divided among forked processes: same results in the same order, and none outlives its parent."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from perception.errors import DataError, PerceptionError
from perception.processes import in_processes, processors


def test_results_come_in_order_from_other_processes():
    large = np.arange(1000)  # not copied through a pipe

    def work(job):
        time.sleep(0.02 * (job % 3 == 0))
        return os.getpid(), int(large[job])

    found = list(in_processes(work, range(40), 3))
    assert [number for _, number in found] == list(range(40))
    workers = {process for process, _ in found}
    assert 1 < len(workers) <= 3 and os.getpid() not in workers
    for alone in (in_processes(work, range(3), 1), in_processes(work, [1], 8)):
        assert {process for process, _ in alone} == {os.getpid()}
    assert list(in_processes(work, [], 4)) == [] and processors() >= 1


def test_errors_of_the_work_are_raised_and_the_rest_is_not_done(tmp_path):
    def work(job):
        if job == 2:
            raise DataError("number 2 is bad")
        (tmp_path / str(job)).touch()
        return job

    results = in_processes(work, range(1000), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(DataError, match="number 2 is bad"):
        next(results)
    assert len(list(tmp_path.iterdir())) < 20 and not multiprocessing.active_children()

    results = in_processes(work, range(3, 1000), 2)
    assert next(results) == 3
    results.close()  # the caller needs no more
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_named():
    def work(job):
        if job == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return job

    with pytest.raises(PerceptionError, match=r"one of 2 worker processes was killed, probably because memory ran out"):
        list(in_processes(work, range(8), 2))


def test_a_process_that_must_not_start_others_does_the_work_itself():
    with multiprocessing.get_context("fork").Pool(1) as pool:  # its processes are daemons, as those of a DataLoader
        parent, workers = pool.apply(_nested)
    assert workers == {parent}


def _nested():
    return os.getpid(), set(in_processes(lambda job: os.getpid(), range(4), 2))


def test_workers_end_with_a_killed_parent():
    code = (
        "import os, time\nfrom perception.processes import in_processes\n"
        "for k in in_processes(lambda job: (print(os.getpid(), flush=True), time.sleep(60)), range(2), 2): pass"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    workers = [psutil.Process(int(parent.stdout.readline())) for _ in range(2)]
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
