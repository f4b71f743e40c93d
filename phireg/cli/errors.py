"""Errors and findings of commands: messages on stderr, exit codes, Ctrl-C."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click

from phireg.cli.output import columns, counted, end_waiting, folded
from phireg.errors import PhiregError, PhiregWarning, UsageError, described
from phireg.findings import Finding, Severity

DEBUG = "PHIREG_DEBUG"
"""Environment variable: with a value, a defect shows its traceback."""

CLOSED_PIPE = 128 + signal.SIGPIPE
_PATIENCE_S = 2.0
_AGAIN_S = 0.01


class Stopped(KeyboardInterrupt):
    """Raised in the main thread when SIGINT or SIGTERM arrived."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


_last_stop = -_PATIENCE_S


def stop(number: int, frame: FrameType | None) -> None:
    """Unwind the main thread; a second signal soon after must not cut the cleaning short."""
    global _last_stop
    now = time.monotonic()
    if now - _last_stop < _PATIENCE_S:
        return
    while frame is not None:
        if frame.f_code.co_name == "__del__":  # Python drops what is raised in it: once more, soon
            threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number)).start()
            return
        frame = frame.f_back
    _last_stop = now
    raise Stopped(number)


def warn(message: str, label: str = "warning: ") -> None:
    """Print a warning to stderr."""
    end_waiting()
    click.echo(folded(label, message), err=True)


def show_warnings() -> None:
    """Print phireg's own warnings as this command line does, and leave others to Python."""
    others = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, PhiregWarning):
            warn(str(message))
        else:
            others(message, category, *place, **more)

    warnings.showwarning = show


def failed(message: str, exit_code: int, label: str = "error: ") -> click.exceptions.Exit:
    """Print what went wrong to stderr; return the exception that ends the process."""
    end_waiting()
    text = folded(label, message)
    click.echo(click.style(label, fg="red", bold=True) + text[len(label) :], err=True)
    return click.exceptions.Exit(exit_code)


def stopped(interrupt: KeyboardInterrupt, outcome: str) -> click.exceptions.Exit:
    """Print that a signal ended the run, and what became of the output."""
    number = getattr(interrupt, "number", signal.SIGINT)
    word = "terminated" if number == signal.SIGTERM else "interrupted"
    return failed(f"{word}; {outcome}", 128 + number, label="")


@contextmanager
def interruptible(
    output_dir: str | Path, unwritten: Callable[[], str] = lambda: "nothing was written"
) -> Iterator[None]:
    """On Ctrl-C report that the output directory was complete already, or ``unwritten()``."""
    before = identity(output_dir)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        complete = identity(output_dir) != before
        outcome = f"{output_dir} was already complete" if complete else unwritten()
        raise stopped(interrupt, outcome) from None


def identity(path: str | Path) -> tuple[int, int] | None:
    """Device and inode of a path; None if there is nothing."""
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


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
        raise click.exceptions.Exit(CLOSED_PIPE) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise failed(f"{error.filename}: {error.strerror}", UsageError.exit_code) from None
        if os.environ.get(DEBUG):
            click.echo(traceback.format_exc(), err=True)
        raise failed(
            f"{described(error)}\n  this is a defect in phireg, not in your input; "
            f"please report it with the traceback that {DEBUG}=1 shows.",
            PhiregError.exit_code,
            label="internal error: ",
        ) from None


def findings_text(findings: Iterable[Finding], *severities: Severity) -> str:
    """List findings under a heading for each of the severities (default: all, worst first)."""
    from phireg.planning.report import finding_texts

    findings = tuple(findings)
    parts = []
    for severity in severities or Severity:
        if chosen := [finding for finding in findings if finding.severity is severity]:
            parts.append(counted(len(chosen), severity.value))
            parts.append(columns(finding_texts(chosen), indent=2))
    return "\n".join(parts)
