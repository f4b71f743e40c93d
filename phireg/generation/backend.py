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

from phireg.checkpoint.shards import has_quantized_layout, is_executed
from phireg.errors import SourceError, UsageError, check_known
from phireg.files.json import read_json_object
from phireg.files.kinds import CHECKPOINT, ENGINE, HF_MODEL, check_kind

if TYPE_CHECKING:
    from phireg.executor import Sampling

EXECUTOR, TENSORRT_LLM, TENSORRT, HF = "executor", "tensorrt-llm", "tensorrt", "hf"

BACKENDS: dict[str, str] = {
    EXECUTOR: "phireg.generation.executor",
    TENSORRT_LLM: "phireg.trtllm.runtime",
    TENSORRT: "phireg.tensorrt.runtime",
    HF: "phireg.generation.hf",
}
"""Module by name; a module is imported when its backend is asked for."""

_RUNS = {EXECUTOR: CHECKPOINT, TENSORRT_LLM: ENGINE, TENSORRT: ENGINE, HF: HF_MODEL}


@dataclass(frozen=True, slots=True)
class Options:
    """How a backend computes; a backend refuses what it cannot do.

    Attributes:
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: to compute in, by name; None is the model's own.
        offload: read each layer when it is needed; None leaves the choice to the backend.
        weights_dir: the weights of an engine that was built without; None is the checkpoint
            that it was built from.
    """

    device: str = "auto"
    dtype: str | None = None
    offload: bool | None = None
    weights_dir: Path | None = None


DEFAULTS = Options()


@dataclass(frozen=True, slots=True)
class LongRope:
    """Where a model's rotary factors change, and how a backend decides it."""

    switch: int  # tokens above which the long factors are taken
    by_row: bool  # each row of a batch by its own tokens; else all by the longest's
    crossing: str  # what becomes of a text that passes it while it is generated


KEYS_STAY = (
    "keys before keep the short ones, as in TensorRT-LLM, while transformers computes the whole "
    "text again and goes on otherwise"
)
"""The ``crossing`` of a backend that does so."""


@dataclass(frozen=True, slots=True)
class Description:
    """The limits of a model, read without its weights; a maximum of None is no further limit."""

    vocab_size: int
    positions: int  # prompt and new tokens together at most
    tp_size: int = 1
    processes: tuple[int, ...] = (1,)  # the numbers of processes that can run it
    start: str = ""  # the launcher of one process per rank
    max_input: int | None = None  # tokens of a prompt
    max_prompts: int | None = None  # tokens of all prompts of a batch together
    max_batch: int | None = None  # rows of a batch
    max_beams: int | None = None
    long_rope: LongRope | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """A batch to continue."""

    prompts: Sequence[Sequence[int]]  # token ids of each row; rows may differ in length
    max_new_tokens: int  # of each row
    stop_ids: Collection[int]  # end a row
    sampling: Sampling
    num_beams: int = 1  # above 1: the best of this many beams, without sampling


class Backend(Protocol):
    """A loaded model; its methods raise UsageError for a request beyond the model's limits."""

    name: str
    description: Description
    device: str
    dtype: str  # that it computes in
    processes: int  # that take part

    def generate(self, request: Request) -> list[list[int]]:
        """Return the new tokens of each row, without the stop id."""

    def stream(self, request: Request) -> Iterator[list[int | None]]:
        """Yield each row's next token, stop id included; None where it has ended or is behind.

        There are no beams. With several processes the iterator must be exhausted.
        """

    def mean_nll(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> list[float] | None:
        """Return for each prompt the mean of -ln p of its continuation's tokens, in nats.

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

        Raise UsageError for an option that has no meaning for this backend.
        """

    def process_rank(self) -> tuple[int, int]:
        """Return the rank of this process and the number of processes, as the launcher set them."""

    def load(self, directory: Path, options: Options) -> Backend:
        """Load the model; of several processes, as rank 0 together with the others."""

    def run_worker(self, directory: Path, options: Options) -> None:
        """Load another rank and run the requests of rank 0, until rank 0 closes its backend."""


def opener(name: str) -> Opener:
    """Import the module of a backend; raise UsageError if there is none."""
    check_known("backend", name, BACKENDS)
    module: Opener = resolve_name(BACKENDS[name])
    return module


def describe(name: str, directory: str | Path, options: Options = DEFAULTS) -> Description:
    """Read a model's limits; see :meth:`Opener.describe`."""
    return opener(name).describe(Path(directory), options)


@contextmanager
def open_backend(
    name: str, directory: str | Path, options: Options = DEFAULTS
) -> Iterator[Backend]:
    """Load a model and close it at the end; other ranks call `Opener.run_worker` instead."""
    backend = opener(name).load(Path(directory), options)
    try:
        yield backend
    finally:
        backend.close()


def default_backend(directory: Path) -> str:
    """Return the backend that runs the kind of a directory."""
    kind = check_kind(directory, CHECKPOINT, ENGINE, HF_MODEL)
    if kind is ENGINE:
        return engine_backend(directory)
    return EXECUTOR if kind is CHECKPOINT or is_executed(directory) else HF


def engine_backend(engine_dir: Path) -> str:
    """Return the backend that runs an engine; phireg's own say which TensorRT built them."""
    config = read_json_object(engine_dir / "config.json")
    return TENSORRT if "backend" in config else TENSORRT_LLM


def check_directory(backend: str, directory: Path) -> None:
    """Raise a SourceError if a directory is of a kind that another backend runs."""
    runs = _RUNS.get(backend)
    if runs is None or (runs is HF_MODEL and not directory.is_dir()):
        return  # a third-party backend, or a model on the hub
    if runs is HF_MODEL and has_quantized_layout(directory):
        raise SourceError(
            f"{directory} is a quantized Hugging Face model, which backend {backend} does not "
            "compute",
            hint=f"use --backend {EXECUTOR}.",
        )
    if runs is not CHECKPOINT or not is_executed(directory):
        check_kind(directory, runs)
    if runs is ENGINE and (other := engine_backend(directory)) != backend:
        raise SourceError(
            f"{directory} is an engine for backend {other}, not {backend}",
            hint=f"use --backend {other}.",
        )


def check_engine_options(options: Options) -> None:
    """Refuse options that were decided when an engine was built."""
    settled = {"--dtype": options.dtype, "--offload and --no-offload": options.offload}
    for name, value in settled.items():
        if value is not None:
            raise UsageError(
                f"{name} cannot be chosen for an engine: it was decided when it was built",
                hint="leave it out.",
            )
