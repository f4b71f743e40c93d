"""Signs of progress on stderr; nothing where stderr is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]


@contextmanager
def progress_bar(doing: str, then: str, total: int, *, quiet: bool) -> Iterator[Advance | None]:
    """Show bytes done, bytes per second and the time left.

    Args:
        doing: what is being done.
        then: what is going on once all bytes are done.
        total: how many bytes there are.
        quiet: show nothing.

    Yields:
        A function to call with the number of further bytes, from any thread; None where nothing
        is shown.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        refresh_per_second=5,
        transient=True,
    )
    with bar:
        task = bar.add_task(doing, total=total)

        def advance(count: int) -> None:
            bar.advance(task, count)
            if bar.tasks[0].finished:
                bar.update(task, description=then)

        yield advance


@contextmanager
def waiting(doing: str, *, quiet: bool) -> Iterator[None]:
    """Say what is going on while nobody can say for how long. Nothing else may be printed inside.

    Args:
        doing: what is being done.
        quiet: show nothing.
    """
    if quiet or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(doing):
        yield


Count = Callable[[str, int], None]


@contextmanager
def count_bar(what: str, total: int, *, quiet: bool) -> Iterator[Count]:
    """Show how many of ``total`` things are done, and the time left.

    Args:
        what: their plural.
        total: how many there are.
        quiet: show nothing.

    Yields:
        A function to call with what is being done and the number of further things done.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda _doing, _count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Left

    columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn(what), Left())
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"), *columns, console=console, transient=True
    ) as bar:
        task = bar.add_task("", total=total)
        yield lambda doing, count: bar.update(task, description=doing, advance=count)
