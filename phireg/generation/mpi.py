"""Processes started by mpirun or srun, and the communicator of their ranks."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from phireg.errors import PhiregError, UsageError

# Open MPI, MPICH's Hydra (also Intel MPI) and srun set these in each process they start.
_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)

Communicator = Any
"""An ``mpi4py.MPI.Comm``."""


def process_rank() -> tuple[int, int]:
    """Return the rank of this process and the number of processes; (0, 1) without mpirun."""
    for names in _VARIABLES:
        if all(name in os.environ for name in names):
            return stated_rank(names, "mpirun")
    return 0, 1


def stated_rank(names: tuple[str, str], launcher: str) -> tuple[int, int]:
    """Return the rank and the number of processes that two variables state; by default (0, 1)."""
    try:
        rank, size = (int(os.environ.get(name, n)) for n, name in enumerate(names))
    except ValueError:
        rank, size = -1, 0
    if not 0 <= rank < size:
        raise UsageError(
            f"the environment variables {' and '.join(names)} are not what {launcher} sets",
            hint=f"unset them, or start with {launcher}.",
        )
    return rank, size


def communicator() -> Communicator:
    """Duplicate MPI's default communicator, over which TensorRT-LLM's own messages go."""
    try:
        world = import_module("mpi4py.MPI").COMM_WORLD
    except ImportError as error:
        raise PhiregError(
            f"several processes need mpi4py, which cannot be imported: {error}",
            hint="pip install mpi4py",
        ) from None
    rank, size = process_rank()
    mpi_rank, mpi_size = world.Get_rank(), world.Get_size()
    if (mpi_rank, mpi_size) != (rank, size):
        raise PhiregError(
            f"mpirun started rank {rank} of {size}, but mpi4py sees rank {mpi_rank} of {mpi_size}",
            hint="start with the mpirun of the MPI library that mpi4py was built for.",
        )
    return world.Dup()
