"""What a backend is, and the table of those there are.

A backend is a module with the four functions of :class:`Opener` and an entry in ``BACKENDS``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Protocol

from phireg.errors import UsageError

if TYPE_CHECKING:
    from phireg.executor import Sampling

BACKENDS: dict[str, str] = {
    "executor": "phireg.generation.executor",
    "tensorrt-llm": "phireg.trtllm.runtime",
    "hf": "phireg.generation.hf",
}
"""Module by name; imported when it is asked for."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a backend is to compute. It refuses what it cannot do.

    Attributes:
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: to compute in, by name; None is the model's own.
        offload: read each layer when it is needed; None leaves it to the backend.
    """

    device: str = "auto"
    dtype: str | None = None
    offload: bool | None = None


DEFAULTS = Options()


@dataclass(frozen=True, slots=True)
class Description:
    """What a directory says of itself before its weights are read.

    Attributes:
        vocab_size: token ids are below this.
        positions: prompt and new tokens together at most.
        tp_size: how many ranks it was made for.
        processes: the numbers of processes that can run it.
        start: what starts one process for each rank ("torchrun --nproc-per-node 2 -m").
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
        dtype: what it computes in.
        processes: how many processes take part.
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
        """Continue a batch.

        Args:
            prompts: token ids of each row; the rows may differ in length.
            max_new_tokens: of each row at most.
            stop_ids: a row ends before the first of these.
            sampling: how tokens are chosen.
            num_beams: above 1: the best of so many beams, which is not sampled.

        Returns:
            The new tokens of each row, without the stop id.

        Raises:
            UsageError: it cannot do what is asked.
        """

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_ids: Collection[int],
        sampling: Sampling,
    ) -> Iterator[list[int | None]]:
        """As ``generate``, step by step, and with the stop ids.

        With several processes, it must be taken to its end.

        Yields:
            Each row's next token, or None where there is none: the row has ended, or is behind.
        """

    def mean_nll(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> list[float] | None:
        """How unlikely the model finds given continuations.

        Args:
            prompts: token ids, at least one each.
            continuations: token ids that follow them, at least one each.

        Returns:
            For each prompt the mean of -ln p over the tokens of its continuation, in nats; None if
            this backend cannot tell.
        """

    def peak_memory(self) -> int | None:
        """Bytes at most since it was opened: of the GPU, or of this process's main memory."""

    def close(self) -> None:
        """Give back memory and let other processes end."""


class Opener(Protocol):
    """What a backend's module offers; a module with these functions is one."""

    def describe(self, place: Path, options: Options) -> Description:
        """Look at a directory without reading weights or joining other processes.

        Raises:
            UsageError: an option means nothing to this backend.
            PhiregError: it cannot run the directory.
        """

    def process_rank(self) -> tuple[int, int]:
        """The rank of this process and the number of processes, as their starter set them."""

    def load(self, place: Path, options: Options) -> Backend:
        """Load the model; as rank 0 of several processes, with the others."""

    def follow(self, place: Path, options: Options) -> None:
        """As another rank: do as rank 0 says until it closes its backend or is gone."""


def opener(name: str) -> Opener:
    """The module of a backend.

    Raises:
        UsageError: there is no such backend.
    """
    if name not in BACKENDS:
        raise UsageError(f"unknown backend '{name}'", hint=f"known: {', '.join(BACKENDS)}.")
    module: Opener = resolve_name(BACKENDS[name])
    return module


def describe(name: str, place: str | Path, options: Options = DEFAULTS) -> Description:
    """See :meth:`Opener.describe`."""
    return opener(name).describe(Path(place), options)


def process_rank(name: str) -> tuple[int, int]:
    """See :meth:`Opener.process_rank`."""
    return opener(name).process_rank()


@contextmanager
def open_backend(name: str, place: str | Path, options: Options = DEFAULTS) -> Iterator[Backend]:
    """Load a model and close it at the end. Only rank 0 does this; the others ``follow``.

    Args:
        name: of ``BACKENDS``.
        place: a checkpoint, an engine directory, or the source model, as the backend needs.
        options: how to compute.

    Raises:
        PhiregError: see :meth:`Opener.describe`; or a file is damaged.
    """
    backend = opener(name).load(Path(place), options)
    try:
        yield backend
    finally:
        backend.close()


def follow(name: str, place: str | Path, options: Options = DEFAULTS) -> None:
    """See :meth:`Opener.follow`."""
    opener(name).follow(Path(place), options)
