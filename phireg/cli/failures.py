"""How a command ends when it does not end well: one message on stderr and an exit code."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click

from phireg.cli.text import folded, mute_stdout
from phireg.errors import PhiregError

DEBUG = "PHIREG_DEBUG"
"""Environment variable: with a value, a defect shows its traceback."""

CLOSED_PIPE = 128 + signal.SIGPIPE
_PATIENCE_S = 2.0


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived.

    Args:
        number: which signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


_last_stop = -_PATIENCE_S


def stop(number: int, frame: FrameType | None) -> None:
    """Signal handler: unwind the main thread, cleaning up on the way.

    The same again within a moment is the same wish, and must not cut the cleaning short.
    """
    global _last_stop
    now = time.monotonic()
    if now - _last_stop >= _PATIENCE_S:
        _last_stop = now
        raise Stopped(number)


def failed(message: str, exit_code: int, label: str = "error: ") -> click.exceptions.Exit:
    """Say on stderr what went wrong; the exception to raise ends the process with the code."""
    text = folded(label, message)
    click.echo(click.style(label, fg="red", bold=True) + text[len(label) :], err=True)
    return click.exceptions.Exit(exit_code)


def stopped(interrupt: KeyboardInterrupt, outcome: str) -> click.exceptions.Exit:
    """Say that a signal ended the run, and what became of the output."""
    number = getattr(interrupt, "number", signal.SIGINT)
    word = "terminated" if number == signal.SIGTERM else "interrupted"
    return failed(f"{word}; {outcome}", 128 + number, label="")


@contextmanager
def reported() -> Iterator[None]:
    """Turn whatever is raised inside into a message and an exit code."""
    try:
        yield
    except (click.exceptions.Exit, click.ClickException, click.Abort):
        raise
    except PhiregError as error:
        raise failed(str(error), error.exit_code) from None
    except KeyboardInterrupt as interrupt:
        raise stopped(interrupt, "nothing was written") from None
    except BrokenPipeError:
        mute_stdout()
        raise click.exceptions.Exit(CLOSED_PIPE) from None
    except Exception as error:
        if os.environ.get(DEBUG):
            click.echo(traceback.format_exc(), err=True)
        raise failed(
            f"{type(error).__name__}: {error}\n  this is a defect in phireg, not in your input; "
            f"please report it with the traceback that {DEBUG}=1 shows.",
            PhiregError.exit_code,
            label="internal error: ",
        ) from None
