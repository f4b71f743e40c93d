"""The protocol of a backend, and the table of backends.

A backend is a module with the four functions of :class:`Opener` and an entry in ``BACKENDS``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Protocol

from phireg.errors import CheckError, UsageError
from phireg.files.kinds import CHECKPOINT, ENGINE, HF_MODEL, UNKNOWN, Kind, kind_of

if TYPE_CHECKING:
    from phireg.executor import Sampling

EXECUTOR, TENSORRT_LLM, HF = "executor", "tensorrt-llm", "hf"

BACKENDS: dict[str, str] = {
    EXECUTOR: "phireg.generation.executor",
    TENSORRT_LLM: "phireg.trtllm.runtime",
    HF: "phireg.generation.hf",
}
"""Module by name; a module is imported when its backend is asked for."""

_RUNS = {EXECUTOR: CHECKPOINT, TENSORRT_LLM: ENGINE, HF: HF_MODEL}
_HINTS = {
    CHECKPOINT: "run it with --backend executor, or build an engine of it first: phireg build "
    "{directory} --output-dir ENGINE",
    ENGINE: "run it with --backend tensorrt-llm.",
    HF_MODEL: "run it with --backend hf, or convert it first: phireg convert --model-dir "
    "{directory} --output-dir CKPT",
}


@dataclass(frozen=True, slots=True)
class Options:
    """How a backend computes; a backend refuses what it cannot do.

    Attributes:
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: to compute in, by name; None is the model's own.
        offload: read each layer when it is needed; None leaves the choice to the backend.
    """

    device: str = "auto"
    dtype: str | None = None
    offload: bool | None = None


DEFAULTS = Options()


@dataclass(frozen=True, slots=True)
class Description:
    """The limits of a model, read without its weights.

    Attributes:
        vocab_size: token ids are below this.
        positions: prompt and new tokens together at most.
        tp_size: the number of ranks it is split into.
        processes: the numbers of processes that can run it.
        start: the launcher of one process per rank ("torchrun --nproc-per-node 2 -m").
        max_input: tokens of a prompt at most; None is as many as there are positions.
        max_batch: rows of a batch at most; None is any number.
        max_beams: beams at most; None is any number.
    """

    vocab_size: int
    positions: int
    tp_size: int = 1
    processes: tuple[int, ...] = (1,)
    start: str = ""
    max_input: int | None = None
    max_batch: int | None = None
    max_beams: int | None = None


class Backend(Protocol):
    """A loaded model.

    Attributes:
        name: its name in ``BACKENDS``.
        device: where it computes.
        dtype: the dtype it computes in.
        processes: the number of processes that take part.
    """

    name: str
    device: str
    dtype: str
    processes: int

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_ids: Collection[int],
        sampling: Sampling,
        num_beams: int = 1,
    ) -> list[list[int]]:
        """Continue rows of token ids, which may differ in length.

        Args:
            prompts: token ids of each row.
            max_new_tokens: new tokens of each row at most.
            stop_ids: a row ends before the first of these.
            sampling: how tokens are chosen.
            num_beams: above 1, return the best of this many beams, without sampling.

        Raises:
            UsageError: the request exceeds the model's limits.
        """

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_ids: Collection[int],
        sampling: Sampling,
    ) -> Iterator[list[int | None]]:
        """Continue a batch as ``generate`` does, step by step and with the stop ids.

        With several processes the iterator must be exhausted.

        Yields:
            Each row's next token; None where the row has ended or is behind others.
        """

    def mean_nll(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> list[float] | None:
        """Return for each prompt the mean of -ln p over the tokens of its continuation, in nats.

        None if this backend does not give logits.
        """

    def peak_memory(self) -> int | None:
        """Return the peak in bytes since it was opened: of the GPU, or of this process."""

    def close(self) -> None:
        """Free the memory and end the worker processes."""


class Opener(Protocol):
    """The functions of a backend's module."""

    def describe(self, directory: Path, options: Options) -> Description:
        """Read a model's limits, without weights and without joining other processes.

        Raises:
            UsageError: an option has no meaning for this backend.
            PhiregError: the backend cannot run the directory.
        """

    def process_rank(self) -> tuple[int, int]:
        """Return the rank of this process and the number of processes, as the launcher set them."""

    def load(self, directory: Path, options: Options) -> Backend:
        """Load the model; of several processes, as rank 0 together with the others."""

    def run_worker(self, directory: Path, options: Options) -> None:
        """Load another rank and run the requests of rank 0, until rank 0 closes its backend."""


def opener(name: str) -> Opener:
    """Import the module of a backend; raise UsageError if there is none."""
    if name not in BACKENDS:
        raise UsageError(f"unknown backend '{name}'", hint=f"known: {', '.join(BACKENDS)}.")
    module: Opener = resolve_name(BACKENDS[name])
    return module


def describe(name: str, directory: str | Path, options: Options = DEFAULTS) -> Description:
    """Read a model's limits; see :meth:`Opener.describe`."""
    return opener(name).describe(Path(directory), options)


def process_rank(name: str) -> tuple[int, int]:
    """Return rank and number of processes; see :meth:`Opener.process_rank`."""
    return opener(name).process_rank()


@contextmanager
def open_backend(
    name: str, directory: str | Path, options: Options = DEFAULTS
) -> Iterator[Backend]:
    """Load a model and close it at the end; other ranks call ``run_worker`` instead."""
    backend = opener(name).load(Path(directory), options)
    try:
        yield backend
    finally:
        backend.close()


def run_worker(name: str, directory: str | Path, options: Options = DEFAULTS) -> None:
    """Run the requests of rank 0; see :meth:`Opener.run_worker`."""
    opener(name).run_worker(Path(directory), options)


def kind_of_place(directory: Path) -> Kind:
    """Return what a directory is.

    Raises:
        UsageError: there is no such directory.
    """
    if not directory.is_dir():
        raise UsageError(
            f"no such directory: {directory}",
            hint="give a checkpoint (phireg convert and phireg quantize write them), an engine, or "
            "with --backend hf a source model.",
        )
    return kind_of(directory)


def default_backend(directory: Path) -> str:
    """Choose TensorRT-LLM for an engine and the executor for anything else."""
    return TENSORRT_LLM if kind_of_place(directory) is ENGINE else EXECUTOR


def check_directory(backend: str, directory: Path) -> None:
    """Refuse a directory of a kind that another backend runs.

    Raises:
        CheckError: names the kind and what to do.
        UsageError: there is no such directory.
    """
    runs = _RUNS.get(backend)
    if runs is None or (runs is HF_MODEL and not directory.is_dir()):
        return  # a third-party backend, or a model on the hub
    kind = kind_of_place(directory)
    if kind is runs:
        return
    if kind is UNKNOWN and runs is CHECKPOINT and (directory / "config.json").exists():
        return  # loading it reports the problem
    raise CheckError(
        f"{directory} is {kind.name}, not {runs.name}, which backend {backend} runs",
        hint=_HINTS.get(kind, f"give {runs.name}.").format(directory=directory),
    )
