"""Gradient checkpointing: less is kept, and gradients, statistics and random numbers stay the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import one_thread
from test_compile import FAST, replay_frames, small_preset, tensors
from test_engine import CONFIG

from perception.engine.gradient_checkpointing import gradient_checkpointing, recomputable_modules
from perception.synthetic import VERSION

PROJECT = Path(__file__).resolve().parent.parent


def step(network, frames, *, recompute: bool, amp: bool = False) -> tuple[dict, int]:
    """Runs frames forward and backward; returns gradients and buffers by name, and the bytes kept between the two."""
    network.train().zero_grad()
    torch.manual_seed(0)  # of dropout
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    state, total = network.initial_state(1), torch.zeros(())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for frame in frames:
            modules = recomputable_modules(network) if recompute else ()
            with torch.autocast("cpu", torch.bfloat16, enabled=amp), gradient_checkpointing(modules):
                prediction, state = network(frame, state)
            total = total + sum(tensor.square().mean() for tensor in tensors(prediction) if tensor.requires_grad)
    total.backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return gradients | {name: tensor.clone() for name, tensor in network.named_buffers()}, sum(kept.values())


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("amp", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients_and_statistics_are_the_same_and_less_is_kept(name, amp):
    network = small_preset(name)
    frames = replay_frames(network.config.image_size, 2)
    start = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with one_thread():
        expected, kept = step(network, frames, recompute=False, amp=amp)
        network.load_state_dict(start)
        found, kept_with = step(network, frames, recompute=True, amp=amp)
    assert found.keys() == expected.keys() and any(tensor.abs().max() > 0 for tensor in found.values())
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6 * float(tensor.abs().max()), msg=key)
    assert not any("forward" in vars(module) for module in network.modules())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    assert kept_with < 0.5 * kept + weights


ONE_OF_TWO = """
import sys, torch
from perception.engine.config import load_config
from perception.engine.training import train

weights = []
for recompute in (False, True):
    options = {"train.epochs": 1, "train.gradient_checkpointing": recompute}
    folder = f"{sys.argv[2]}/{recompute}"
    weights.append(train(load_config(sys.argv[1], options), folder, seed=5, amp=True, launcher="pytorch").state_dict())
for name, tensor in weights[0].items():
    assert torch.equal(weights[1][name], tensor), name
"""


@pytest.mark.slow
def test_two_processes_train_the_same_network(tmp_path, town_root):
    """One epoch of images, which leaves parameters without gradients, and one of two frames, in bfloat16."""
    script, config = tmp_path / "one_of_two.py", tmp_path / "small.py"
    script.write_text(ONE_OF_TWO)
    config.write_text(CONFIG.format(root=str(town_root), version=VERSION))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, script, config, tmp_path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
