"""One process per rank: torchrun's environment, starting it, and checks of the launcher."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

from phireg.children import python_command
from phireg.errors import UsageError
from phireg.generation.backend import EXECUTOR, TENSORRT_LLM, Description, Options
from phireg.generation.mpi import process_rank as mpi_rank
from phireg.generation.mpi import stated_rank


def process_rank() -> tuple[int, int]:
    """Return the rank of this process and the number of processes, as torchrun sets them."""
    return stated_rank(("RANK", "WORLD_SIZE"), "torchrun")


def run_worker(directory: Path, options: Options) -> None:
    """Refuse to be another rank of a backend that runs in one process."""
    raise UsageError(f"{directory} is run by one process", hint="start it without torchrun.")


def run_processes(count: int, arguments: Sequence[str]) -> int:
    """Run ``phireg ARGUMENTS`` in ``count`` processes with torchrun's environment.

    A signal to this process goes to all of them. Each has its share of the CPU cores, unless
    OMP_NUM_THREADS says otherwise. Return the exit code of rank 0 if it failed, else of the first
    process that did (128 and the signal's number after a signal), else 0.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    command = python_command("from phireg.cli import main; main()")
    logging.disable(logging.CRITICAL)  # the processes report their own errors
    try:
        elastic_launch(config, command[0])(*command[1:], *arguments)
    except ChildFailedError as error:
        failures = error.failures
        code = (failures.get(0) or failures[min(failures)]).exitcode
        return int(code) if code >= 0 else 128 - int(code)
    except SignalException as error:
        return 128 + int(error.sigval)
    finally:
        logging.disable(logging.NOTSET)
    return 0


def check_launcher(backend: str) -> bool:
    """Refuse another backend's launcher on rank 0; return False on others, which must end."""
    torchrun = os.environ.get("WORLD_SIZE", "1") != "1"
    rank, size = mpi_rank()
    if backend == TENSORRT_LLM and torchrun and size == 1:
        rank = int(os.environ.get("RANK", "0") or 0)
        problem = "torchrun; ranks of an engine are started by mpirun"
    elif backend != TENSORRT_LLM and size > 1 and not torchrun:
        problem = f"mpirun; backend {backend} does not use it"
    else:
        return True
    if rank > 0:
        return False
    raise UsageError(
        f"this process was started by {problem}",
        hint="mpirun -n N phireg run ENGINE ...  or  torchrun --nproc-per-node N --no-python "
        "phireg run CKPT ...",
    )


def check_processes(
    backend: str, directory: Path, model: Description, processes: int, tp: int | None = None
) -> None:
    """Refuse numbers of processes, started and to start (``tp``), that the model cannot use."""
    ranks = model.tp_size
    if tp and backend != EXECUTOR:
        raise UsageError(
            f"--tp-size starts processes for backend executor, not for {backend}",
            hint=f"{model.start} phireg run {directory} ..." if model.start else "leave it out.",
        )
    if tp and tp != ranks:
        raise UsageError(
            f"--tp-size {tp}, but {directory} was made for {ranks} rank(s)",
            hint=f"use --tp-size {ranks}, or convert the model again with --tp-size {tp}.",
        )
    if processes in model.processes:
        return
    if not model.start:
        raise UsageError(
            f"{processes} processes were started, and backend {backend} runs in one",
            hint="start it without torchrun.",
        )
    alone = ", or one process for all ranks" if 1 in model.processes and ranks > 1 else ""
    started = "1 process was" if processes == 1 else f"{processes} processes were"
    raise UsageError(
        f"{started} started, but {directory} was made for {ranks} rank(s)",
        hint=f"{model.start} phireg run {directory} ...{alone}",
    )
