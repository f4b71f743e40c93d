"""Continuing prompts: text on the terminal as it comes, tokens and timings."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phireg.cli.output import emit, emit_generated

if TYPE_CHECKING:
    from phireg.executor import Sampling
    from phireg.generation import Backend, Description
    from phireg.generation.prompts import Prompt
    from phireg.generation.tokenizer import Tokenizer

DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that is settled before the weights are read."""

    directory: Path
    model: Description
    tokenizer: Tokenizer | None
    stops: frozenset[int]
    sampling: Sampling
    max_new_tokens: int | None
    num_beams: int = 1


@dataclass(slots=True)
class Timing:
    """How long a batch took.

    Attributes:
        prefill_s: seconds from the request to the first token.
        decode_s: seconds from there to the last token.
        tokens: new tokens of all rows.
        first: those that came with the prefill.
    """

    prefill_s: float = 0.0
    decode_s: float = 0.0
    tokens: int = 0
    first: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """While decoding, of all rows together; None where nothing was decoded."""
        return (self.tokens - self.first) / self.decode_s if self.tokens > self.first else None

    def __str__(self) -> str:
        rate = self.tokens_per_second
        rest = "" if rate is None else f", then {rate:,.1f} tokens/s"
        return f"{self.tokens:,} tokens, the first after {self.prefill_s * 1000:,.0f} ms{rest}"


def timed(steps: Iterable[list[int | None]], timing: Timing) -> Iterator[list[int | None]]:
    """Pass a batch's steps on and measure them."""
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


@dataclass(slots=True)
class Answer:
    """What became of one prompt.

    Attributes:
        tokens: the new tokens, a stop id included (but not where beams were searched).
        stopped: whether a stop id ended them.
    """

    tokens: list[int] = field(default_factory=list)
    stopped: bool = False

    @property
    def finish_reason(self) -> str:
        """``stop`` after a stop id, ``length`` where no more were asked for."""
        return "stop" if self.stopped else "length"


def collect(steps: Iterable[list[int | None]], rows: int, stops: frozenset[int]) -> list[Answer]:
    """The answers of a whole batch."""
    answers = [Answer() for _ in range(rows)]
    for step in steps:
        for answer, token in zip(answers, step, strict=True):
            if token is not None:
                answer.tokens.append(token)
                answer.stopped = token in stops
    return answers


def show_stream(
    steps: Iterable[list[int | None]], tokenizer: Tokenizer, stops: frozenset[int]
) -> Answer:
    """Print the text of a batch of one as it comes, whole characters only, and end its line."""
    answer = Answer()

    def tokens() -> Iterator[int]:
        for (token,) in steps:
            if token is not None:
                answer.tokens.append(token)
                answer.stopped = token in stops
                yield token

    try:
        for piece in tokenizer.stream(tokens()):
            emit_generated(piece)
    finally:
        emit_generated("\n")
    return answer


def new_tokens(job: Job, inputs: Sequence[Sequence[int]]) -> int:
    """How many new tokens a batch may get."""
    room = job.model.positions - max(map(len, inputs))
    return job.max_new_tokens or min(DEFAULT_NEW_TOKENS, room)


def batches(
    backend: Backend, job: Job, inputs: Sequence[Sequence[int]], size: int
) -> Iterator[tuple[list[Answer], Timing]]:
    """Continue all prompts, ``size`` at a time."""
    for number, start in enumerate(range(0, len(inputs), size)):
        batch = inputs[start : start + size]
        timing = Timing()
        # Batches with the same seed would draw alike.
        sampling = replace(job.sampling, seed=job.sampling.seed + number)
        count = new_tokens(job, batch)
        if job.num_beams > 1:
            yield searched(backend, job, batch, count, timing), timing
        else:
            steps = backend.stream(batch, count, job.stops, sampling)
            yield collect(timed(steps, timing), len(batch), job.stops), timing


def searched(
    backend: Backend, job: Job, batch: Sequence[Sequence[int]], count: int, timing: Timing
) -> list[Answer]:
    """The best beam of every row of a batch, which all come at the end."""
    started = time.monotonic()
    rows = backend.generate(batch, count, job.stops, job.sampling, job.num_beams)
    timing.prefill_s = time.monotonic() - started
    timing.tokens = timing.first = sum(map(len, rows))
    return [Answer(row, len(row) < count) for row in rows]


def show_answer(job: Job, number: str, prompt: Prompt, answer: Answer) -> None:
    """Print one of several answers under its number and prompt."""
    if prompt.text is not None:
        emit(f"{number} {' '.join(prompt.text.split())}")
    else:
        emit(f"{number} {len(prompt.ids or ())} token ids")
    # Without a tokenizer there is no text, only ids.
    text = job.tokenizer.decode(answer.tokens) if job.tokenizer else str(answer.tokens)
    emit_generated(f"{text}\n\n")


def document(
    job: Job,
    backend: Backend,
    prompts: Sequence[Prompt],
    inputs: Sequence[Sequence[int]],
    results: Sequence[tuple[list[Answer], Timing]],
    load_seconds: float,
) -> dict[str, Any]:
    """What ``--json`` prints; docs/command-line.md describes it."""
    tokenizer = job.tokenizer
    places = ("checkpoint_dir", "engine_dir", "model_dir")
    own = {"tensorrt-llm": "engine_dir", "hf": "model_dir"}.get(backend.name, "checkpoint_dir")
    answers = [(number, answer) for number, (rows, _) in enumerate(results) for answer in rows]
    return {
        **{key: str(job.directory) if key == own else None for key in places},
        "backend": backend.name,
        "device": backend.device,
        "dtype": backend.dtype,
        "tp_size": job.model.tp_size,
        "processes": backend.processes,
        "sampling": {
            key: getattr(job.sampling, key) for key in ("temperature", "top_k", "top_p", "seed")
        },
        "num_beams": job.num_beams,
        "stop_ids": sorted(job.stops),
        "load_seconds": round(load_seconds, 3),
        "batches": [
            {
                "prompts": len(rows),
                "new_tokens": timing.tokens,
                "prefill_ms": round(timing.prefill_s * 1000, 3),
                "tokens_per_second": timing.tokens_per_second,
            }
            for rows, timing in results
        ],
        "results": [
            {
                "batch": batch,
                "prompt": prompt.text,
                "input_ids": list(ids),
                "tokens": answer.tokens,
                "text": tokenizer.decode(answer.tokens) if tokenizer else None,
                "finish_reason": answer.finish_reason,
            }
            for prompt, ids, (batch, answer) in zip(prompts, inputs, answers, strict=True)
        ],
    }
