"""The standard streams of the process.

Only results reach standard output. What plugins and libraries print there, in Python or in native
code, goes to standard error.
"""

from __future__ import annotations

import faulthandler
import io
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from phireg.children import environment
from phireg.errors import OutputError

_PATIENCE_S = 2.0
_results: TextIO | None = None
_is_prepared = False


class _Output(io.FileIO):
    """Standard output: a write that fails is an error once, and what is left is dropped."""

    _lost = False

    def write(self, data: Any) -> int:
        if self._lost:
            return len(data)
        try:
            return super().write(data)
        except OSError as error:
            self._lost = True
            if isinstance(error, BrokenPipeError):
                raise
            raise OutputError(f"cannot write to standard output: {error.strerror}") from error


class _Messages(io.FileIO):
    """Standard error: what cannot be written is dropped, since there is no other place for it."""

    def write(self, data: Any) -> int:
        with suppress(OSError):
            return super().write(data)
        return len(data)


def prepare() -> None:
    """Set up this process: its streams may be closed or full, its directory a stranger's."""
    global _is_prepared
    _is_prepared = True
    os.environ.update(environment())
    for descriptor, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file would take its number, and what is printed
            os.open(os.devnull, flags)
    sys.stdout = _text(_Output(os.dup(1), "w"), sys.stdout)
    sys.stderr = _text(_Messages(2, "w", closefd=False), sys.stderr)
    os.dup2(2, 1)
    faulthandler.enable(file=2, all_threads=False)  # a crash of native code says where it was


def _text(raw: io.FileIO, former: TextIO | None) -> io.TextIOWrapper:
    encoding = former.encoding if former else "utf-8"
    is_messages = isinstance(raw, _Messages)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding,
        errors="backslashreplace",
        line_buffering=is_messages or raw.isatty(),
        write_through=is_messages,
    )


@contextmanager
def results_apart() -> Iterator[None]:
    """Keep standard output for results; what others print meanwhile goes to standard error."""
    global _results
    # A stream of its own: a plugin may close it.
    others = _text(_Messages(2, "w", closefd=False), sys.stderr) if _is_prepared else sys.stderr
    former, _results, sys.stdout = _results, sys.stdout, others
    try:
        yield
    finally:
        if not _is_prepared:  # else threads of others may print until the process ends
            sys.stdout, _results = _results, former


def results() -> TextIO:
    """Return standard output, for results."""
    return _results or sys.stdout


def give_back() -> None:
    """Let descriptor 1 be standard output again, for a child or for ``input``."""
    with suppress(OSError):  # in a test it is no file
        os.dup2(results().fileno(), 1)


def leave(code: Any) -> None:
    """End the process although threads of others may never end."""
    main = threading.main_thread()
    if any(thread is not main and not thread.daemon for thread in threading.enumerate()):
        timer = threading.Timer(_PATIENCE_S, os._exit, [code if isinstance(code, int) else 1])
        timer.daemon = True
        timer.start()
    sys.exit(code)
