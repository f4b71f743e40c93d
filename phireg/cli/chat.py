"""``phireg run --chat``: a conversation, line by line."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING

import click

from phireg.cli.completions import stream_text
from phireg.cli.output import emit, note, printable
from phireg.cli.streams import give_back, results
from phireg.errors import UsageError

if TYPE_CHECKING:
    from phireg.generation import Backend
    from phireg.generation.generate import Generator
    from phireg.generation.tokenizer import Tokenizer

EXIT = "/exit"
_DEFAULT_NEW_TOKENS = 1024

Message = dict[str, str]


class Chat:
    """A conversation with a model; each answer has the next seed."""

    def __init__(self, generator: Generator, system: str | None) -> None:
        if generator.tokenizer is None:
            raise UsageError(
                "the model carries no tokenizer, and a chat needs one",
                hint="give --tokenizer-dir the directory of the source model.",
            )
        self._generator = generator
        self._tokenizer = generator.tokenizer
        self._stop_ids = generator.stop_ids | generator.tokenizer.end_of_turn_ids
        self._answers = 0
        self.messages = _first_messages(generator.tokenizer, system)

    def run(self, backend: Backend) -> None:
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
                    emit("")
                return
            except UnicodeDecodeError:
                _complain(UsageError("that line is not UTF-8 text"))
                continue
            if line.strip() == EXIT:
                return
            if line.strip():
                self._answer(backend, line)

    def _answer(self, backend: Backend, line: str) -> None:
        from phireg.executor.finite import rows_named
        from phireg.generation import Request
        from phireg.generation.batches import warn_of_switch
        from phireg.generation.generate import Timing, timed

        self.messages.append({"role": "user", "content": line})
        try:
            prompt, count = self._prompt()
        except UsageError as error:
            self.messages.pop()
            _complain(error)
            return
        timing = Timing()
        sampling = self._generator.sampling
        sampling = replace(sampling, seed=sampling.seed + self._answers)
        request = Request([prompt], count, self._stop_ids, sampling)
        steps = timed(backend.stream(request), timing)
        # Ctrl-C reaches worker processes too and ends the chat.
        with rows_named(["the conversation"]):
            if backend.processes > 1:
                tokens = stream_text(steps, self._tokenizer)
            else:
                with _interruptible() as interrupted:
                    tokens = stream_text(_until(steps, interrupted), self._tokenizer)
        warn_of_switch(self._generator.description, [len(prompt)], [len(tokens)])
        self._answers += 1
        self.messages.append({"role": "assistant", "content": self._tokenizer.decode(tokens)})
        note(str(timing))

    def _prompt(self) -> tuple[list[int], int]:
        """Return the conversation's tokens and the number of tokens of the answer at most."""
        prompt = self._tokenizer.chat_ids(self.messages)
        positions = self._generator.description.positions
        room = positions - len(prompt)
        if room < 1:
            raise UsageError(
                f"with this the conversation has {len(prompt)} tokens, and the model "
                f"{positions} positions",
                hint=f"say less, or {EXIT} and begin anew.",
            )
        return prompt, min(self._generator.max_new_tokens or _DEFAULT_NEW_TOKENS, room)


def _first_messages(tokenizer: Tokenizer, system: str | None) -> list[Message]:
    """Return the messages before the first question, and refuse what the template ignores."""
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
    return sys.stdin.isatty() and results().isatty()


def _read_line() -> str:
    if _at_terminal():
        import readline  # noqa: F401  (lets input() edit its line)

        give_back()
        with redirect_stdout(sys.__stdout__):
            return input("> ")
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    return line.decode("utf-8").rstrip("\r\n")


def _complain(error: UsageError) -> None:
    click.secho(printable(str(error)), err=True, fg="red")


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Record the first Ctrl-C inside the context, so that no step of the model is cut short."""
    before = signal.getsignal(signal.SIGINT)
    interrupted = False

    def record(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted and callable(before):
            before(number, frame)
        interrupted = True

    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, record)
    try:
        yield lambda: interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _until(
    steps: Iterator[list[int | None]], interrupted: Callable[[], bool]
) -> Iterator[list[int | None]]:
    for step in steps:
        yield step
        if interrupted():
            return
