"""What ``phireg run`` runs: a backend, its directory, and the right number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from phireg.errors import UsageError

if TYPE_CHECKING:
    from phireg.generation import Description


def chosen(
    place: str | None, backend: str | None, engine_dir: str | None, model_dir: str | None
) -> tuple[str, Path]:
    """The backend's name and the directory that it is to run.

    Raises:
        UsageError: there is no directory or more than one, or its option is for another backend.
    """
    from phireg.generation.choose import default_backend

    ways = (("the argument", place), ("--engine-dir", engine_dir), ("--model-dir", model_dir))
    given = [(way, path) for way, path in ways if path is not None]
    if not given:
        raise UsageError("there is nothing to run", hint="give a checkpoint or an engine.")
    if len(given) > 1:
        raise UsageError(
            f"{' and '.join(way for way, _ in given)} name one directory each, and only one is run",
            hint="give the one that the backend runs.",
        )
    ((way, path),) = given
    meant = {"--engine-dir": "tensorrt-llm", "--model-dir": "hf"}.get(way)
    if meant and backend and backend != meant:
        raise UsageError(
            f"{way} is for backend {meant}, not for {backend}",
            hint=f"leave out --backend, or give the directory without {way}.",
        )
    return backend or meant or default_backend(Path(path)), Path(path)


def check_starter(backend: str) -> None:
    """Refuse processes that were started by what the backend does not use.

    Raises:
        UsageError: they were, and this is rank 0; the others end in silence.
    """
    from phireg.generation.choose import check_starter

    rank, wrong = check_starter(backend)
    if wrong and rank > 0:
        raise click.exceptions.Exit(0)  # rank 0 says why; a failure here might end it before
    if wrong:
        raise UsageError(
            f"this process was {wrong}",
            hint="mpirun -n N phireg run ENGINE ...  or  torchrun --nproc-per-node N -m phireg run "
            "CKPT ...",
        )


def check_processes(
    backend: str, directory: Path, model: Description, tp: int | None, processes: int
) -> None:
    """Refuse a number of processes that cannot run the model.

    Args:
        backend: its name.
        directory: what it is to run.
        model: what the directory says.
        tp: how many processes are to be started.
        processes: how many were started.

    Raises:
        UsageError: says how to start it.
    """
    ranks = model.tp_size
    made = f"{directory} was made for {ranks} rank(s)"
    if tp and backend != "executor":
        raise UsageError(
            f"--tp starts processes for backend executor, not for {backend}",
            hint=f"{model.start} phireg run {directory} ..." if model.start else "leave it out.",
        )
    if tp and tp != ranks:
        raise UsageError(
            f"--tp {tp}, but {made}",
            hint=f"use --tp {ranks}, or convert the model again with --tp-size {tp}.",
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
        f"{started} started, but {made}",
        hint=f"{model.start} phireg run {directory} ...{alone}",
    )
