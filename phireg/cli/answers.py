"""Continuing prompts: text on the terminal as it comes, tokens and timings."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click

from phireg.cli.text import mute_stdout, printable
from phireg.errors import OutputError

if TYPE_CHECKING:
    from phireg.text.tokenizer import Tokenizer


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
        tokens: the new tokens, a stop id included.
        stopped: whether the last one is a stop id.
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
    from phireg.text.pieces import Pieces

    answer, pieces = Answer(), Pieces(tokenizer)
    try:
        for (token,) in steps:
            if token is not None:
                answer.tokens.append(token)
                answer.stopped = token in stops
                show(pieces.push(token))
        show(pieces.finish())
    finally:
        show("\n")
    return answer


def show(text: str) -> None:
    """Print text of a model. A terminal is not to obey it; elsewhere it goes as it is.

    Raises:
        OutputError: standard output cannot take any more (a full disk).
        BrokenPipeError: its reader has gone.
    """
    if not text:
        return
    if sys.stdout.isatty():
        text = "\t".join(map(printable, text.split("\t")))
    try:
        click.echo(text, nl=False)
    except BrokenPipeError:
        raise
    except OSError as error:
        mute_stdout()
        raise OutputError(f"cannot write to standard output: {error.strerror}") from error


def note(text: str) -> None:
    """Say something beside the text, where a person sees it."""
    if sys.stderr.isatty():
        click.secho(printable(text), err=True, dim=True)
