"""``phireg run --chat``: a conversation, line by line."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING

import click

from phireg.cli.answers import Timing, show_stream, timed
from phireg.cli.output import note
from phireg.errors import UsageError

if TYPE_CHECKING:
    from phireg.executor import Sampling
    from phireg.generation import Backend
    from phireg.generation.tokenizer import Tokenizer

EXIT = "/exit"
_DEFAULT_NEW_TOKENS = 1024

Message = dict[str, str]


@dataclass(slots=True)
class Chat:
    """A conversation with a model.

    Args:
        tokenizer: with a chat template.
        stops: the ids that end an answer.
        positions: how many tokens the model can see.
        max_new_tokens: of one answer; None is as many as are sensible and possible.
        sampling: how tokens are chosen; each answer has a seed of its own.
        messages: what has been said.
    """

    tokenizer: Tokenizer
    stops: frozenset[int]
    positions: int
    max_new_tokens: int | None
    sampling: Sampling
    messages: list[Message]

    def hold(self, backend: Backend) -> None:
        """Answer lines of standard input until it ends or says ``/exit``."""
        note(f"{EXIT} or Ctrl-D leaves, Ctrl-C stops an answer")
        while True:
            try:
                line = _read_line()
            except KeyboardInterrupt as interrupt:
                if not _at_terminal() or getattr(interrupt, "number", None) != signal.SIGINT:
                    raise
                note(f"\n{EXIT} or Ctrl-D leaves")
                continue
            except EOFError:
                if _at_terminal():
                    click.echo()
                return
            except UnicodeDecodeError:
                _complain(UsageError("that line is not UTF-8 text"))
                continue
            if line.strip() == EXIT:
                return
            if line.strip():
                self._turn(backend, line)

    def _turn(self, backend: Backend, line: str) -> None:
        self.messages.append({"role": "user", "content": line})
        try:
            prompt, count = self._prompt()
        except UsageError as error:
            self.messages.pop()
            _complain(error)
            return
        timing = Timing()
        steps = timed(backend.stream([prompt], count, self.stops, self.sampling), timing)
        # With other processes Ctrl-C goes to all of them and ends the chat.
        if backend.processes > 1:
            answer = show_stream(steps, self.tokenizer, self.stops)
        else:
            with _interruptible() as interrupted:
                answer = show_stream(_until(steps, interrupted), self.tokenizer, self.stops)
        self.sampling = replace(self.sampling, seed=self.sampling.seed + 1)
        self.messages.append({"role": "assistant", "content": self.tokenizer.decode(answer.tokens)})
        note(str(timing))

    def _prompt(self) -> tuple[list[int], int]:
        """The conversation's tokens and how many may follow."""
        prompt = self.tokenizer.chat_ids(self.messages)
        room = self.positions - len(prompt)
        if room < 1:
            raise UsageError(
                f"with this the conversation has {len(prompt)} tokens, and the model "
                f"{self.positions} positions",
                hint=f"say less, or {EXIT} and begin anew.",
            )
        return prompt, min(self.max_new_tokens or _DEFAULT_NEW_TOKENS, room)


def opening(tokenizer: Tokenizer, system: str | None) -> list[Message]:
    """What a conversation begins with.

    Raises:
        UsageError: the chat template has no place for a system prompt, or there is no template.
    """
    probe = [{"role": "user", "content": "?"}]
    if system is None:
        tokenizer.chat_text(probe)
        return []
    messages = [{"role": "system", "content": system}]
    if system.strip() not in tokenizer.chat_text(messages + probe):
        raise UsageError(
            "the model's chat template leaves out system prompts, so --system would do nothing",
            hint="put it into the first question.",
        )
    return messages


def _at_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _read_line() -> str:
    if _at_terminal():
        import readline  # noqa: F401  (lets input() edit its line)

        return input("> ")
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    return line.decode("utf-8").rstrip("\r\n")


def _complain(error: UsageError) -> None:
    click.secho(str(error), err=True, fg="red")


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Within this the first Ctrl-C is only noted, so that no step of the model is torn apart."""
    before = signal.getsignal(signal.SIGINT)
    noted = False

    def note_it(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        if noted and callable(before):
            before(number, frame)
        noted = True

    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, note_it)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)


def _until(
    steps: Iterator[list[int | None]], interrupted: Callable[[], bool]
) -> Iterator[list[int | None]]:
    for step in steps:
        yield step
        if interrupted():
            return
