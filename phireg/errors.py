"""Every error phireg raises on purpose: what went wrong, where, and what to do.

The command line prints ``message`` and ``hint`` and ends with ``exit_code``; a user never sees a
traceback for bad input. Exit codes are part of the interface (docs/command-line.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

_LONGEST = 2000
_LONGEST_LINE = 1000
_MOST_LINES = 100


def shortened(text: str, longest: int = _LONGEST_LINE) -> str:
    """Cut what a hostile file can make long: the middle of lines, and lines beyond a hundred."""
    if len(text) <= longest and text.count("\n") < _MOST_LINES:
        return text
    lines = text.split("\n", _MOST_LINES)
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES] = f"... and {lines[_MOST_LINES].count(chr(10)) + 1} more lines"
    half = longest // 2
    return "\n".join(
        line if len(line) <= longest else f"{line[:half]} ... {line[-half // 2 :]}"
        for line in lines
    )


class PhiregError(Exception):
    """Base of all expected errors.

    Args:
        message: what is wrong and where (file, tensor, option), in one or more lines.
        hint: what the user can do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = shortened(message)
        super().__init__(self.message)
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  {self.hint}"


def described(error: BaseException) -> str:
    """Return kind and text of an error of other code: bounded, and even if it has no text."""
    try:
        text = str(error)
    except BaseException:
        text = "(the error cannot be printed)"
    return f"{type(error).__name__}: {text[:_LONGEST]}"


class UsageError(PhiregError):
    """The request itself makes no sense (an option, a name, a combination)."""

    exit_code = 2


def check_known(what: str, name: object, known: Iterable[str]) -> None:
    """Refuse a name that is none of those known."""
    known = tuple(known)
    if name not in known:
        raise UsageError(f"unknown {what} {name!r}", hint=f"known: {', '.join(known) or 'none'}.")


class SourceError(PhiregError):
    """The source directory cannot be read as an unquantized model."""

    exit_code = 3


class PlanError(PhiregError):
    """The plan has problems; nothing was written."""

    exit_code = 3


class CheckError(PhiregError):
    """A checkpoint is not what its manifest or the reader's rules say."""

    exit_code = 4


class PluginError(PhiregError):
    """A family cannot be found, loaded or used."""

    exit_code = 5


class OutputError(PhiregError):
    """The output cannot be written: it exists, the disk is full, another run holds it."""

    exit_code = 6


class EngineError(PhiregError):
    """TensorRT-LLM is missing, is a release without engine backend, or failed."""

    exit_code = 7


class IncompleteError(PhiregError):
    """Nothing was found wrong, but a check that was promised could not be made."""

    exit_code = 8


class PhiregWarning(UserWarning):
    """Something to know about a result; the command line prints each once."""
