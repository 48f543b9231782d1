"""Processes of torchrun, Slurm and MPI find each other, and evaluate a dataset together as one process does."""

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import noisy
from torch import distributed

from perception.data.nuscenes import NuScenesDataset
from perception.engine.launchers import join_processes
from perception.errors import ConfigError
from perception.models.bev_transformer.config import BEVTransformerConfig
from perception.models.bev_transformer.model import BEVTransformer
from perception.models.checkpoint import save_checkpoint
from perception.synthetic import VERSION, simulate

PROJECT = Path(__file__).resolve().parent.parent
PREFIXES = ("SLURM_", "OMPI_", "MASTER_")
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SCONTROL = """#!/bin/sh
test "$1 $2 $3" = "show hostnames node[1-2]" || { echo "no such nodes: $*" >&2; exit 1; }
echo 127.0.0.1
echo node2
"""


@pytest.fixture
def scontrol(tmp_path) -> Path:
    """A folder with a stand-in for Slurm's scontrol, which knows one list of nodes."""
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(SCONTROL)
    program.chmod(0o755)
    return program.parent


@pytest.fixture(autouse=True)
def without_launcher(monkeypatch):
    """The environment of a process that no launcher started."""
    for name in [*os.environ]:
        if name.startswith(PREFIXES) or name in TORCHRUN:
            monkeypatch.delenv(name)


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def environment_of(launcher: str, rank: int, port: str, folder: Path) -> dict[str, str]:
    """What Slurm and Open MPI set for one of two processes; the place of Slurm's first host comes from scontrol."""
    if launcher == "slurm":
        own = {"PROCID": rank, "NTASKS": 2, "LOCALID": rank, "NODELIST": "node[1-2]", "JOB_ID": 123456}
        given = {f"SLURM_{name}": str(value) for name, value in own.items()}
        return given | {"MASTER_PORT": port, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    own = {"RANK": rank, "SIZE": 2, "LOCAL_RANK": rank, "LOCAL_SIZE": 2}
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in own.items()} | {"MASTER_PORT": port}


def _sum_of_ranks(launcher: str, environment: dict[str, str], results) -> None:
    os.environ.update(environment)
    join_processes(launcher)
    join_processes(launcher)  # again, as a training after an evaluation
    total = torch.tensor([10.0 + distributed.get_rank()])
    distributed.all_reduce(total)
    results.put((distributed.get_rank(), distributed.get_world_size(), total.item(), distributed.get_backend()))
    distributed.barrier()


@pytest.mark.skipif(torch.cuda.is_available(), reason="of processes without a GPU each")
@pytest.mark.parametrize("launcher", ["slurm", "mpi"])
def test_two_processes_find_each_other(launcher, scontrol):
    fork, port = multiprocessing.get_context("fork"), free_port()
    results = fork.Queue()
    places = [environment_of(launcher, rank, port, scontrol) for rank in range(2)]
    processes = [fork.Process(target=_sum_of_ranks, args=(launcher, place, results)) for place in places]
    for process in processes:
        process.start()
    assert sorted(results.get(timeout=60) for _ in processes) == [(0, 2, 21.0, "gloo"), (1, 2, 21.0, "gloo")]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


SLURM = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
OMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("launcher", "environment", "message"),
    [
        ("pytorch", {}, r"start them with: torchrun .* RANK is not set"),
        ("pytorch", {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR is not set"),
        ("slurm", {}, r"start them with: srun .* SLURM_PROCID is not set"),
        ("slurm", {"SLURM_PROCID": "0"}, "SLURM_NTASKS is not set"),
        ("slurm", SLURM | {"SLURM_NTASKS": "two"}, 'SLURM_NTASKS is "two"; the launcher sets it to a whole number'),
        ("slurm", SLURM, "SLURM_NODELIST is not set; set MASTER_ADDR to the host of process 0"),
        (
            "slurm",
            SLURM | {"SLURM_NODELIST": "n[3-4]"},
            r"show hostnames n\[3-4\]` fails \(no such nodes: .*MASTER_ADDR",
        ),
        ("slurm", SLURM | {"SLURM_NODELIST": "n[3-4]", "PATH": "/none"}, r"fails \(.*scontrol.*set MASTER_ADDR"),
        ("mpi", {}, r"start them with: mpirun .* OMPI_COMM_WORLD_RANK is not set"),
        ("mpi", OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "on several machines and MASTER_ADDR is not set; give"),
    ],
)
def test_what_a_launcher_did_not_set_is_named(monkeypatch, scontrol, launcher, environment, message):
    monkeypatch.setenv("PATH", f"{scontrol}{os.pathsep}{os.environ['PATH']}")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"--launcher {launcher}.*{message}"):
        join_processes(launcher)
    assert not distributed.is_initialized()


def test_fewer_gpus_than_processes_are_named(monkeypatch):
    for name, value in (OMPI | {"MASTER_ADDR": "127.0.0.1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ConfigError, match="--launcher mpi: this is process 2 of this machine, with 1 GPUs; start one"):
        join_processes("mpi")


CONFIG = """
model = dict(preset="nano", image_size=(64, 96), grid=(20, 20), channels=16, depth_bins=8, backbone_stages=2,
             decoder_layers=2, box_queries=20, line_queries=8)
val_data = dict(dataroot={root!r}, version={version!r}, split="town_val")
"""


@pytest.fixture(scope="module")
def town(tmp_path_factory) -> Path:
    """Three scenes: of two processes, the first has the first and the last one."""
    root = tmp_path_factory.mktemp("launched") / "town"
    simulate(root, scenes=3, seed=11, keyframes=2, image_size=(64, 96), split="town_val", workers=1)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory, town) -> Path:
    """A config and weights of a small network."""
    folder = tmp_path_factory.mktemp("launched")
    (folder / "small.py").write_text(CONFIG.format(root=str(town), version=VERSION))
    config = BEVTransformerConfig.preset(
        "nano", image_size=(64, 96), grid=(20, 20), channels=16, depth_bins=8, backbone_stages=2, decoder_layers=2,
        box_queries=20, line_queries=8,
    )  # fmt: skip
    save_checkpoint(folder / "small.safetensors", noisy(BEVTransformer, config), {})
    return folder


EVALUATE = ("evaluate", "small.py", "small.safetensors", "--no-memory")


def started(command: tuple, folder: Path, **environment: str) -> subprocess.Popen:
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT), "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, command)], env=os.environ | own | environment, cwd=folder, **pipes
    )


def launched(launcher: str, arguments: tuple, folder: Path, scontrol: Path) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of two processes, which Slurm or MPI would start."""
    port, command = free_port(), ("perception", *arguments, "--launcher", launcher)
    processes = [started(command, folder, **environment_of(launcher, rank, port, scontrol)) for rank in range(2)]
    results = [process.communicate(timeout=500) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, results, strict=True)]


def without_times(text: str) -> list[str]:
    return [line for line in text.splitlines() if "fps" not in line]


@pytest.fixture(scope="module")
def alone(folder) -> str:
    """What one process prints; it writes `alone.json` and the submission `alone`."""
    process = started(("perception", *EVALUATE, "--json", "alone.json", "--save-submission", "alone"), folder)
    printed, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    return printed


def check_same(folder: Path, name: str) -> None:
    """Compares numbers and predictions digit by digit."""
    numbers, wanted = (json.loads((folder / f"{one}.json").read_text()) for one in (name, "alone"))
    assert numbers.pop("fps") > 0 and wanted.pop("fps") > 0
    assert numbers == wanted and wanted["robustness"]["trials"]
    for file in ("detection.json", "lanes.json"):
        assert (folder / name / file).read_bytes() == (folder / "alone" / file).read_bytes()


@pytest.mark.slow
def test_torchrun_evaluates_with_the_digits_of_one_process(folder, alone):
    command = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "perception", *EVALUATE)
    outputs = ("--json", "torchrun.json", "--save-submission", "torchrun", "--launcher", "pytorch")
    process = started((*command, *outputs), folder)
    printed, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    assert without_times(printed) == without_times(alone)
    assert errors.count("precision: ") == 1
    check_same(folder, "torchrun")


@pytest.mark.slow
def test_slurm_evaluates_with_the_digits_of_one_process(folder, alone, scontrol):
    outputs = ("--json", "slurm.json", "--save-submission", "slurm")
    first, second = launched("slurm", (*EVALUATE, *outputs), folder, scontrol)
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert without_times(first[1]) == without_times(alone) and second[1] == second[2] == ""
    check_same(folder, "slurm")


@pytest.mark.slow
def test_an_error_of_one_process_is_one_sentence_of_process_0(folder, town, scontrol, tmp_path):
    root = tmp_path / "town"
    shutil.copytree(town, root)
    dataset = NuScenesDataset(root, VERSION, "town_val", image_size=(64, 96))
    image = Path(os.fsdecode(dataset.index.image_path[2, 0]))  # of the second scene, which process 1 predicts
    image.write_bytes(image.read_bytes()[:2000])
    first, second = launched("mpi", (*EVALUATE[:3], "--dataroot", root), folder, scontrol)
    assert first[0] == second[0] == 2, first[2] + second[2]
    assert f"error: {image} cannot be read" in first[2] and "Traceback" not in first[2] + second[2]
    assert second[1:] == ("", "") and first[1] == ""


@pytest.mark.slow
def test_one_process_predicts_a_sample(folder, town, scontrol):
    """Its frames follow one another with memory, so process 0 predicts them and the others leave."""
    sample = ("--dataroot", town, "--version", VERSION, "--split", "town_val", "--checkpoint", "small.safetensors")
    arguments = ("predict", *sample, "--out", "one.png", "--json", "one.json")
    first, second = launched("mpi", arguments, folder, scontrol)
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert "matched" in first[1] and second[1] == second[2] == ""
    assert json.loads((folder / "one.json").read_text())["boxes"] is not None
