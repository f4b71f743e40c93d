"""Processes started by mpirun or srun, and what their ranks tell each other."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any, Protocol

from phireg.errors import PhiregError, UsageError

# What Open MPI, MPICH's Hydra (also Intel MPI) and srun set in each process they start.
_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)


class Communicator(Protocol):
    """What is used of an mpi4py communicator."""

    def Get_rank(self) -> int:  # noqa: N802
        """Number of this process."""

    def Get_size(self) -> int:  # noqa: N802
        """How many processes there are."""

    def Dup(self) -> Communicator:  # noqa: N802
        """A communicator of the same processes, whose messages meet no others."""

    def Abort(self, errorcode: int) -> None:  # noqa: N802
        """End all processes at once."""

    def bcast(self, obj: Any, root: int) -> Any:
        """What ``root`` gave."""


def process_rank() -> tuple[int, int]:
    """The rank of this process and the number of processes; (0, 1) without mpirun.

    Raises:
        UsageError: the variables are not such as mpirun sets.
    """
    for name, count in _VARIABLES:
        if name in os.environ and count in os.environ:
            try:
                rank, size = int(os.environ[name]), int(os.environ[count])
            except ValueError:
                rank, size = -1, 0
            if not 0 <= rank < size:
                raise UsageError(
                    f"the environment variables {name} and {count} are not what mpirun sets",
                    hint="unset them, or start with mpirun.",
                )
            return rank, size
    return 0, 1


def communicator() -> Communicator:
    """One that TensorRT-LLM's own messages, which go over MPI's default one, do not meet.

    Raises:
        PhiregError: mpi4py is missing, or it sees other processes than the environment says.
    """
    try:
        world: Communicator = import_module("mpi4py.MPI").COMM_WORLD
    except ImportError as error:
        raise PhiregError(
            f"several processes need mpi4py, which cannot be imported: {error}",
            hint="pip install mpi4py",
        ) from None
    seen, (rank, size) = (world.Get_rank(), world.Get_size()), process_rank()
    if seen != (rank, size):
        raise PhiregError(
            f"mpirun started rank {rank} of {size}, but mpi4py sees rank {seen[0]} of {seen[1]}",
            hint="start with the mpirun of the MPI library that mpi4py was built for.",
        )
    return world.Dup()
