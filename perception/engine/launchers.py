"""Joins the processes that a launcher started: torchrun, Slurm's srun, or mpirun, with a GPU each or without GPUs."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import distributed

from perception.errors import ConfigError
from perception.reading import short


class Place(NamedTuple):
    """The place of this process among all processes."""

    rank: int
    world_size: int
    local_rank: int  # among the processes of this machine
    address: str  # host of process 0
    port: str


def join_processes(launcher: str) -> None:
    """Initialises distributed work in this process: with NCCL and one GPU per process, or with gloo without GPUs.

    Does nothing for the launcher "none", or if the process has joined already.

    Args:
        launcher: "none", "pytorch", "slurm" or "mpi".

    Raises:
        ConfigError: the launcher did not start this process, there are fewer GPUs than processes, or process 0 cannot
            be reached.
    """
    if launcher == "none" or distributed.is_initialized():
        return
    place = {"pytorch": _of_torchrun, "slurm": _of_slurm, "mpi": _of_mpi}[launcher](os.environ)
    if torch.cuda.is_available():
        if place.local_rank >= (gpus := torch.cuda.device_count()):
            raise ConfigError(
                f"--launcher {launcher}: this is process {place.local_rank + 1} of this machine, with {gpus} GPUs; "
                "start one process per GPU"
            )
        torch.cuda.set_device(place.local_rank)
    os.environ |= {
        "RANK": str(place.rank), "WORLD_SIZE": str(place.world_size), "LOCAL_RANK": str(place.local_rank),
        "MASTER_ADDR": place.address, "MASTER_PORT": place.port,
    }  # fmt: skip
    try:
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    except (RuntimeError, ValueError) as error:  # of the store at the address of process 0
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"--launcher {launcher}: process {place.rank} of {place.world_size} cannot join process 0 at "
            f"{place.address}:{place.port} ({reason}); set MASTER_ADDR and MASTER_PORT to a free port of its host"
        ) from None


def _of_torchrun(environment: Mapping[str, str]) -> Place:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    start = "is for processes of torchrun; start them with: torchrun --nproc_per_node N -m perception COMMAND ..."
    _check_given("pytorch", environment, names, start)
    rank, size, local = (_number("pytorch", environment, name) for name in names[:3])
    return Place(rank, size, local, environment["MASTER_ADDR"], environment["MASTER_PORT"])


def _of_slurm(environment: Mapping[str, str]) -> Place:
    start = "is for processes of Slurm; start them with: srun --ntasks N python -m perception COMMAND ..."
    _check_given("slurm", environment, ("SLURM_PROCID", "SLURM_NTASKS"), start)
    rank, size = (_number("slurm", environment, name) for name in ("SLURM_PROCID", "SLURM_NTASKS"))
    if "SLURM_LOCALID" in environment:
        local = _number("slurm", environment, "SLURM_LOCALID")
    else:
        local = rank % max(1, torch.cuda.device_count())
    # Jobs that share a machine need ports of their own.
    job = environment.get("SLURM_JOB_ID", "")
    port = environment.get("MASTER_PORT") or str(15000 + int(job[-4:]) if job.isdecimal() else 29500)
    return Place(rank, size, local, environment.get("MASTER_ADDR") or _first_host(environment), port)


def _first_host(environment: Mapping[str, str]) -> str:
    """Returns the host of process 0: the first one of Slurm's list of nodes, such as `gpu[01-04,07]`."""
    names = ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
    nodes = next((environment[name] for name in names if environment.get(name)), None)
    if nodes is None:
        raise ConfigError("--launcher slurm: SLURM_NODELIST is not set; set MASTER_ADDR to the host of process 0")
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        hosts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        reason = " ".join((getattr(error, "stderr", None) or str(error)).split())[:200]
        raise ConfigError(
            f"--launcher slurm: `{' '.join(command)}` fails ({reason}); set MASTER_ADDR to the host of process 0"
        ) from None
    if not hosts:
        raise ConfigError(f"--launcher slurm: scontrol finds no host in {nodes}; set MASTER_ADDR to that of process 0")
    return hosts[0]


def _of_mpi(environment: Mapping[str, str]) -> Place:
    names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
    start = "is for processes of Open MPI; start them with: mpirun -np N python -m perception COMMAND ..."
    _check_given("mpi", environment, names, start)
    rank, size, local = (_number("mpi", environment, name) for name in names)
    address = environment.get("MASTER_ADDR")
    if not address:
        if environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") != str(size):
            raise ConfigError(
                "--launcher mpi: the processes are on several machines and MASTER_ADDR is not set; give the host of "
                "process 0, as in: mpirun -x MASTER_ADDR=HOST ..."
            )
        address = "127.0.0.1"
    return Place(rank, size, local, address, environment.get("MASTER_PORT") or "29500")


def _check_given(launcher: str, environment: Mapping[str, str], names: tuple[str, ...], start: str) -> None:
    if missing := [name for name in names if not environment.get(name)]:
        raise ConfigError(f"--launcher {launcher} {start} (the environment variable {missing[0]} is not set)")


def _number(launcher: str, environment: Mapping[str, str], name: str) -> int:
    if not environment[name].isdecimal():
        raise ConfigError(
            f"--launcher {launcher}: {name} is {short(environment[name])}; the launcher sets it to a whole number"
        )
    return int(environment[name])
