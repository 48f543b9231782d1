"""Step times: parts of training steps add up, and their operations are counted once, by their definition."""

import time
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from perception.benchmark.machine import read_gpu_utilization
from perception.engine.gradient_checkpointing import gradient_checkpointing
from perception.engine.step_times import PARTS, StepFlop, StepTimes

CPU = torch.device("cpu")


def test_parts_get_the_time_before_their_end():
    times = StepTimes(CPU)
    time.sleep(0.05)  # before `start`: belongs to no part
    begin = time.perf_counter()
    times.start()
    for part, seconds in (("forward", 0.02), ("matching", 0.01), ("forward", 0.02), ("backward", 0.0)):
        time.sleep(seconds)
        times.end(part)
    whole = time.perf_counter() - begin
    taken = times.take()
    assert tuple(taken) == PARTS and taken["data"] == taken["rest"] == 0
    assert taken["forward"] >= 0.04 and taken["matching"] >= 0.01
    assert sum(taken.values()) == pytest.approx(whole, abs=2e-3) and set(times.take().values()) == {0.0}


@pytest.mark.parametrize("recompute", [False, True])
def test_operations_of_a_step(recompute):
    """A product of [B, I] and [I, O] takes 2 B I O operations, its backward pass twice as many."""
    network, flop = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), StepFlop()
    first, second = 2 * 5 * 8 * 16, 2 * 5 * 16 * 4
    for x, count in ((torch.randn(5, 8, requires_grad=True), 3 * (first + second)), (torch.randn(5, 8), None)):
        with flop.counted("one kind"), gradient_checkpointing([network] if recompute else []):
            network(x).square().sum().backward()
        assert flop.take() == (count or 3 * (first + second))  # as of the first step of this kind
    with flop.counted("another kind"), gradient_checkpointing([network] if recompute else []):
        network(torch.randn(5, 8)).square().sum().backward()
    assert flop.take() == 2 * first + 3 * second  # no gradient of the input
    assert flop.take() == 0


def test_counting_changes_neither_results_nor_random_numbers():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    x, found = torch.randn(2, 3, 8, 8), []
    for context in (StepFlop().counted("kind"), nullcontext()):
        torch.manual_seed(0)
        network.zero_grad()
        with context:
            network(x).square().sum().backward()
        found.append([torch.rand(1), *(parameter.grad.clone() for parameter in network.parameters())])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_without_a_gpu_there_is_no_utilization():
    assert read_gpu_utilization(CPU) is None
