"""Prompts to completions: batches of a model, with the time they take."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

from phireg.executor import Sampling
from phireg.executor.finite import rows_named
from phireg.generation.backend import (
    Backend,
    Description,
    Options,
    Request,
    check_directory,
    default_backend,
    describe,
    open_backend,
    opener,
)
from phireg.generation.batches import batches, warn_of_switch
from phireg.generation.limits import check_batch, check_prompts
from phireg.generation.processes import check_launcher, check_processes
from phireg.generation.prompts import Prompt, encode_prompts
from phireg.generation.tokenizer import Tokenizer, find_tokenizer, stop_ids
from phireg.source.hub import resolve_model_dir

DEFAULT_NEW_TOKENS = 128
DEFAULT_BATCH_SIZE = 8
GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Completion:
    """The continuation of one prompt.

    Attributes:
        batch: number of the batch that it ran in.
        prompt: the text; None if token ids were given.
        input_ids: the prompt's token ids.
        tokens: the new tokens, with the stop id (without it after a beam search).
        text: of ``tokens``; None without a tokenizer.
        finish_reason: "stop" after a stop id, "length" after as many tokens as were asked for.
    """

    batch: int
    prompt: str | None
    input_ids: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str | None
    finish_reason: str


@dataclass(slots=True)
class Timing:
    """The time of a batch."""

    prefill_s: float = 0.0  # from the request to the first token
    decode_s: float = 0.0  # from there to the last token
    tokens: int = 0  # new tokens of all rows
    first: int = 0  # new tokens that came with the prefill

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of all rows per second of decoding; None if nothing was decoded."""
        return (self.tokens - self.first) / self.decode_s if self.tokens > self.first else None

    def __str__(self) -> str:
        rate = self.tokens_per_second
        decoding = "" if rate is None else f", then {rate:,.1f} tokens/s"
        return f"{self.tokens:,} tokens, the first after {self.prefill_s * 1000:,.0f} ms{decoding}"


def timed(steps: Iterable[list[int | None]], timing: Timing) -> Iterator[list[int | None]]:
    """Yield the steps of a batch and measure them."""
    started = first = time.monotonic()
    for step in steps:
        now = time.monotonic()
        count = sum(token is not None for token in step)
        if timing.tokens == 0:
            first, timing.first = now, count
            timing.prefill_s = now - started
        timing.decode_s = now - first
        timing.tokens += count
        yield step


@dataclass
class Generator:
    """A model and how to generate with it as ``generate`` does, checked without the weights."""

    backend: str
    directory: Path
    options: Options
    description: Description
    tokenizer_dir: Path | None = None
    sampling: Sampling = GREEDY
    max_new_tokens: int | None = None
    num_beams: int = 1
    batch_size: int | None = None
    tokenizer: Tokenizer | None = field(init=False)
    stop_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self._batch_size = self.batch_size or min(
            DEFAULT_BATCH_SIZE, self.description.max_batch or DEFAULT_BATCH_SIZE
        )
        check_batch(self.description, self._batch_size, self.num_beams, self.sampling)
        # Backend hf runs models of the hub.
        model_dir, _ = resolve_model_dir(str(self.directory), None)
        self.tokenizer = find_tokenizer(model_dir, self.tokenizer_dir)
        # Without generation_config.json, as in many engines, the tokenizer's directory may have it.
        has_config = (model_dir / "generation_config.json").exists()
        config_dir = model_dir if has_config else self.tokenizer_dir or model_dir
        self.stop_ids = stop_ids(config_dir, self.tokenizer)

    def encode(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Return the prompts with their token ids; raise UsageError if one does not fit."""
        most = self.description.positions + 1  # more are as many too many
        encoded = encode_prompts(prompts, self.tokenizer, most)
        rows = [prompt.ids for prompt in encoded]
        check_prompts(
            self.description, rows, self.max_new_tokens or 1, [prompt.where for prompt in prompts]
        )
        return encoded

    def open(self) -> AbstractContextManager[Backend]:
        """Load the model."""
        return open_backend(self.backend, self.directory, self.options)

    def steps(
        self, backend: Backend, prompts: Sequence[Prompt], timing: Timing, seed_offset: int = 0
    ) -> Iterator[list[int | None]]:
        """Yield the tokens of one batch step by step, stop ids included."""
        # Batches with the same seed would draw alike.
        sampling = replace(self.sampling, seed=self.sampling.seed + seed_offset)
        new = [0] * len(prompts)
        with rows_named([prompt.where for prompt in prompts]):
            for step in timed(backend.stream(self._request(prompts, sampling)), timing):
                yield step
                for row, token in enumerate(step):
                    new[row] += token is not None
        warn_of_switch(self.description, [len(prompt.ids) for prompt in prompts], new)

    def batches(
        self, backend: Backend, prompts: Sequence[Prompt]
    ) -> Iterator[tuple[list[Completion], Timing]]:
        """Complete all prompts of ``encode``, batch by batch."""
        lengths = [len(prompt.ids) for prompt in prompts]
        count = self.max_new_tokens or DEFAULT_NEW_TOKENS
        parts = batches(self.description, lengths, self._batch_size, count)
        for number, part in enumerate(parts):
            batch, timing = prompts[part], Timing()
            if self.num_beams > 1:
                rows, stopped = self._search(backend, batch, timing)
            else:
                rows, stopped = [[] for _ in batch], [False] * len(batch)
                for step in self.steps(backend, batch, timing, number):
                    for index, token in enumerate(step):
                        if token is not None:
                            rows[index].append(token)
                            stopped[index] = token in self.stop_ids
            results = zip(batch, rows, stopped, strict=True)
            yield [self._completion(number, *result) for result in results], timing

    def _search(
        self, backend: Backend, prompts: Sequence[Prompt], timing: Timing
    ) -> tuple[list[list[int]], list[bool]]:
        """Return the best beam of each prompt, and whether a stop id ended it."""
        started = time.monotonic()
        request = self._request(prompts, self.sampling)
        with rows_named([prompt.where for prompt in prompts]):
            rows = backend.generate(request)
        warn_of_switch(self.description, map(len, request.prompts), map(len, rows))
        timing.prefill_s = time.monotonic() - started
        timing.tokens = timing.first = sum(map(len, rows))
        return rows, [len(row) < request.max_new_tokens for row in rows]

    def _request(self, prompts: Sequence[Prompt], sampling: Sampling) -> Request:
        rows = [prompt.ids for prompt in prompts]
        room = self.description.positions - max(map(len, rows))
        count = self.max_new_tokens or min(DEFAULT_NEW_TOKENS, room)
        return Request(rows, count, self.stop_ids, sampling, self.num_beams)

    def _completion(
        self, batch: int, prompt: Prompt, tokens: Sequence[int], stopped: bool
    ) -> Completion:
        text = self.tokenizer.decode(tokens) if self.tokenizer else None
        reason = "stop" if stopped else "length"
        return Completion(batch, prompt.text, prompt.ids, tuple(tokens), text, reason)


def describe_runnable(
    backend: str, directory: Path, options: Options, tp: int | None = None
) -> Description:
    """Return a model's limits; refuse a directory or a number of processes that cannot run it."""
    check_directory(backend, directory)
    description = describe(backend, directory, options)
    check_processes(backend, directory, description, opener(backend).process_rank()[1], tp)
    return description


def generate(
    directory: str | Path,
    prompts: Iterable[str | Sequence[int]],
    *,
    backend: str | None = None,
    max_new_tokens: int | None = None,
    sampling: Sampling = GREEDY,
    num_beams: int = 1,
    batch_size: int | None = None,
    tokenizer_dir: str | Path | None = None,
    options: Options | None = None,
) -> list[Completion]:
    """Continue prompts with a checkpoint, an engine or the source model.

    Under torchrun or mpirun, call it in every process: those other than rank 0 return no
    completions.

    Args:
        directory: the checkpoint, the engine, or with ``backend="hf"`` the source model.
        prompts: texts, or token ids.
        backend: "executor", "tensorrt-llm" or "hf"; None chooses by the directory.
        max_new_tokens: of each prompt at most; None is 128, or as many as fit.
        sampling: how tokens are chosen, by default the most likely ones; each further batch has
            the next seed.
        num_beams: above 1: search that many beams instead of sampling.
        batch_size: prompts side by side; None is 8, or as many as an engine takes.
        tokenizer_dir: where the tokenizer is, if not in ``directory``.
        options: device, dtype and offload.

    Returns:
        The completions, in order.

    Raises:
        UsageError: a prompt, an option or the number of processes does not fit the model.
        PhiregError: the model cannot be run.
    """
    directory, options = Path(directory), options or Options()
    name = backend or default_backend(directory)
    if not check_launcher(name):
        return []
    if opener(name).process_rank()[0] > 0:
        opener(name).run_worker(directory, options)
        return []
    generator = Generator(
        name,
        directory,
        options,
        describe_runnable(name, directory, options),
        tokenizer_dir=None if tokenizer_dir is None else Path(tokenizer_dir),
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        batch_size=batch_size,
    )
    encoded = generator.encode(
        [
            Prompt(f"prompt {number}", prompt)
            if isinstance(prompt, str)
            else Prompt(f"prompt {number}", None, tuple(prompt))
            for number, prompt in enumerate(prompts, 1)
        ]
    )
    with generator.open() as model:
        done = [batch for batch, _ in generator.batches(model, encoded)]
    return [completion for batch in done for completion in batch]
