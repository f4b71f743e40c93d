"""One progress bar after the other, each opened by the first report of its stage."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from phireg.cli.progress import count_bar, progress_bar, waiting


class Stages:
    """The bars of a command with several; a context manager. May be told from any thread.

    Args:
        quiet: show nothing.
    """

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._lock = threading.Lock()
        self._open = ExitStack()
        self._stage = ""
        self._advance: Any = None
        self._bytes = 0

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away."""
        self._open.close()
        self._stage = ""

    def waiting(self, doing: str) -> None:
        """A stage of unknown length, which the next one or ``close`` ends."""
        with self._lock:
            self._enter(doing, lambda: waiting(doing, quiet=self._quiet))

    def counting(self, doing: str, what: str) -> Callable[[int, int], None]:
        """A stage of (how many more things are done, how many there are).

        Args:
            doing: what is being done.
            what: plural of the things.
        """

        def advance(more: int, total: int) -> None:
            with self._lock:
                self._enter(doing, lambda: count_bar(what, total, quiet=self._quiet))
                self._advance(doing, more)

        return advance

    def reading(self, doing: str, then: str) -> Callable[[int, int], None]:
        """A stage of (how many more bytes are done, how many there are).

        Args:
            doing: what is being done.
            then: what is going on once all bytes are done.
        """

        def advance(more: int, total: int) -> None:
            with self._lock:
                self._enter(doing, lambda: progress_bar(doing, then, total, quiet=self._quiet))
                if self._advance is not None:
                    self._advance(more)

        return advance

    def exporting(self, scales: int, total: int) -> Callable[[int], None]:
        """Two stages of bytes: those read for the scales come first, then those written."""

        def advance(more: int) -> None:
            with self._lock:
                if self._bytes < scales:
                    bar = progress_bar("computing scales", "scales", scales, quiet=self._quiet)
                else:
                    written = total - scales
                    bar = progress_bar("writing", "flushing to disk", written, quiet=self._quiet)
                self._enter("scales" if self._bytes < scales else "writing", lambda: bar)
                self._bytes += more
                if self._advance is not None:
                    self._advance(more)

        return advance

    def _enter(self, stage: str, make: Callable[[], AbstractContextManager[Any]]) -> None:
        if stage != self._stage:
            self._open.close()
            self._advance = self._open.enter_context(make())
            self._stage = stage
