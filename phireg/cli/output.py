"""Output of commands: text and tables, JSON, and progress on stderr."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from phireg.cli.streams import results
from phireg.dtypes import WEIGHT_DTYPES
from phireg.errors import shortened
from phireg.findings import first

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_NARROWEST = 24
_MOST = 5000
"""Items of a list or an object in ``bounded``: more than any model has tensors on a rank."""
_LONGEST_TEXT = 2000
_MOST_ROWS = 500
_MOST_PROBLEMS = 50
_WIDEST = 200


def printable(text: str) -> str:
    """Escape control characters: names and texts in a model may hold anything."""
    text = _CONTROL.sub(lambda match: ascii(match.group())[1:-1], text)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def emit(text: str, *, styled: bool = False) -> None:
    """Print lines to standard output; ``styled`` text is escaped already and has click's styles.

    Raises OutputError on a full disk and BrokenPipeError if the reader has gone.
    """
    end_waiting()
    click.echo(text if styled else printable(text), file=results())


def emit_generated(text: str) -> None:
    """Print text that a model wrote, escaped on a terminal only; raises as :func:`emit`."""
    if results().isatty():
        text = "\t".join(map(printable, text.split("\t")))
    end_waiting()
    click.echo(text, nl=False, file=results())


def note(text: str) -> None:
    """Print a remark to stderr if that is a terminal."""
    end_waiting()
    if sys.stderr.isatty():
        click.secho(printable(text), err=True, dim=True)


def bounded(value: Any) -> Any:
    """Cut the long texts, lists and objects of a document that repeats a model's files."""
    if isinstance(value, str):
        return shortened(value, _LONGEST_TEXT)
    if isinstance(value, Mapping):
        items = [(shortened(str(key)), bounded(item)) for key, item in islice(value.items(), _MOST)]
        more = {"...": f"{len(value) - _MOST} more"} if len(value) > _MOST else {}
        return dict(items) | more
    if isinstance(value, list | tuple):
        more_items = [f"... and {len(value) - _MOST} more"] if len(value) > _MOST else []
        return [*map(bounded, value[:_MOST]), *more_items]
    return value


def emit_json(document: Any) -> None:
    """Print a JSON document; paths, dataclasses and infinite numbers become what JSON has."""
    import json

    emit(json.dumps(_plain(document), indent=2))


def _plain(value: Any) -> Any:
    """Replace numbers that are not finite by None, dataclasses by mappings, paths by strings."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value):
        names = (field.name for field in dataclasses.fields(value))
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Set):
        return sorted(map(_plain, value))
    return value


class Styled(str):
    """A cell of :func:`columns` with click's styles, which only a terminal shows."""

    style: dict[str, Any]

    def __new__(cls, text: str, **style: Any) -> Styled:
        """Add styles, for example ``Styled("failed", fg="red", bold=True)``."""
        cell = super().__new__(cls, text)
        cell.style = style
        return cell


def columns(rows: Iterable[Sequence[str]], *, indent: int = 0, right: Sequence[int] = ()) -> str:
    """Align rows of equally many cells; ``right`` names the columns aligned at their right edge.

    On a terminal the last column is folded to fit; elsewhere every row stays one line. If a cell
    is styled, all of them must be printable.
    """
    cells = [_cells(row) for row in islice(rows, _MOST_ROWS + 1)]
    if len(cells) > _MOST_ROWS:
        cells[_MOST_ROWS] = ["..."] + [""] * (len(cells[0]) - 1)
    widths = [max(map(len, column)) for column in zip(*(row[:-1] for row in cells), strict=True)]
    lines = []
    for *before, last in cells:
        padded = [
            _styled(cell, cell.rjust(width) if n in right else cell.ljust(width))
            for n, (cell, width) in enumerate(zip(before, widths, strict=True))
        ]
        head = " " * indent + "".join(f"{cell}  " for cell in padded)
        blank = " " * (indent + sum(width + 2 for width in widths))
        spaces = last[: len(last) - len(last.lstrip(" "))]
        text = _fold(last.lstrip(" "), blank + spaces, blank + spaces, results())
        body = "\n".join(_styled(last, line) for line in text[len(blank) :].split("\n"))
        lines.append((head + body).rstrip())
    return "\n".join(lines)


def _cells(row: Sequence[str]) -> list[str]:
    """Bound the cells of a row; only the last one may be long."""
    *before, last = (cell if isinstance(cell, Styled) else shortened(cell) for cell in row)
    return [*(cell if len(cell) <= _WIDEST else f"{cell[:_WIDEST]}..." for cell in before), last]


def table(rows: Iterable[Sequence[str]], *, indent: int = 0, right: Sequence[int] = ()) -> str:
    """Align rows of one-line cells; ``right`` names the columns aligned at their right edge.

    Where a terminal is too narrow, the columns that do not fit follow in a table below, in which
    every row begins with its first cell again.
    """
    cells = [_cells(row) for row in islice(rows, _MOST_ROWS + 1)]
    if not cells:
        return ""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        for n in right:
            row[n] = row[n].rjust(widths[n])
    room = _terminal_width() if results().isatty() else sys.maxsize
    tables, used = [[0]], indent + widths[0]
    for n in range(1, len(widths)):
        if used + 2 + widths[n] > room and len(tables[-1]) > 1:
            tables, used = [*tables, [0]], indent + widths[0]
        tables[-1].append(n)
        used += 2 + widths[n]
    return "\n".join(
        columns([[row[n] for n in chosen] for row in cells], indent=indent) for chosen in tables
    )


def _terminal_width() -> int:
    return shutil.get_terminal_size().columns


def _styled(cell: str, text: str) -> str:
    return click.style(text, **cell.style) if isinstance(cell, Styled) else text


def folded(label: str, text: str) -> str:
    """An error message after its label; its lines are folded if stderr is a terminal."""
    top, *others = printable(text).split("\n")
    lines = [_fold(top, label, " " * len(label), sys.stderr)]
    for line in others:
        start = line[: len(line) - len(line.lstrip())]
        lines.append(_fold(line.lstrip(), start, f"{start}  ", sys.stderr))
    return "\n".join(lines)


def _fold(text: str, start: str, others: str, stream: TextIO) -> str:
    if not stream.isatty():
        return (start + text).rstrip()
    width = max(_terminal_width(), len(others) + _NARROWEST)
    lines = textwrap.wrap(
        text,
        width,
        initial_indent=start,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(lines) or start.rstrip()


def page_facts(started: float) -> tuple[tuple[str, str], ...]:
    """How a page came about; ``started`` is of ``time.monotonic()``."""
    command = shlex.join(["phireg", *sys.argv[1:]])
    return ("command", command), ("duration", f"{time.monotonic() - started:.1f} s")


def problem_list(problems: Sequence[str]) -> str:
    """List problems under their number: the end of a long text, where a terminal shows them."""
    rows = [("-", problem) for problem in first(problems, _MOST_PROBLEMS)]
    return f"{counted(len(problems), 'problem')}\n{columns(rows, indent=2)}"


def next_steps(*commands: Sequence[str]) -> str:
    """List command lines that make sense next, unfolded so that they can be copied."""
    return "\n".join(["next", *(f"  {shlex.join(words)}" for words in commands)])


def memory(count: int) -> str:
    """Bytes of memory, in binary units."""
    return f"{count / 2**20:,.4g} MiB"


def dtype_name(code: str) -> str:
    """A safetensors dtype code by TensorRT-LLM's name, where it has one."""
    return {code: name for name, code in WEIGHT_DTYPES.items()}.get(code, code)


def counted(count: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
"""Variables in which launchers tell a process its rank."""

_waiting = ExitStack()


@contextmanager
def waiting(doing: str, *, quiet: bool = False) -> Iterator[None]:
    """Show a spinner from now until anything else is printed or shown, or the end."""
    if any(os.environ.get(name, "0") != "0" for name in _RANKS):
        quiet = True  # rank 0 shows it
    bars = ProgressBars(quiet)
    bars.spinner(doing)
    _waiting.callback(bars.close)
    try:
        yield
    finally:
        end_waiting()


def end_waiting() -> None:
    """Remove the spinner of :func:`waiting`."""
    _waiting.close()


def has_plain_terminal() -> bool:
    """Tell if the terminal can neither move its cursor nor show colors."""
    return os.environ.get("TERM") in ("dumb", "unknown")


@contextmanager
def spinner(doing: str, *, quiet: bool = False) -> Iterator[None]:
    """Show a spinner on stderr if it is a terminal; nothing else may be printed meanwhile."""
    with ProgressBars(quiet) as bars:
        bars.spinner(doing)
        yield


class ProgressBars(AbstractContextManager["ProgressBars"]):
    """One bar or spinner after the other on stderr, opened by the first report of its stage.

    A context manager; its reports may come from any thread. Nothing is shown where ``quiet`` is
    set or stderr is not a terminal; a plain terminal gets a line for each stage.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._shown = sys.stderr.isatty() and not quiet
        self._lock = threading.Lock()
        self._open = ExitStack()
        self._stage = ""
        self._bar: Progress | None = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar."""
        self._open.close()
        self._stage = ""

    def spinner(self, doing: str) -> None:
        """Show a spinner until the next stage or ``close``."""
        if not self._shown:
            return
        with self._lock:
            if self._enter(doing):
                from rich.console import Console
                from rich.live import Live
                from rich.spinner import Spinner

                live = Live(
                    Spinner("dots", doing, style="status.spinner"),
                    console=Console(stderr=True),
                    refresh_per_second=12.5,
                    transient=True,
                    redirect_stdout=False,  # results go there, also while something moves
                )
                self._open.enter_context(live)

    def _enter(self, doing: str) -> bool:
        """End the stage before; return whether something can move on this terminal."""
        end_waiting()
        self._open.close()
        if has_plain_terminal() and doing != self._stage:
            click.echo(f"{doing} ...", err=True)
        self._stage = doing
        return not has_plain_terminal()

    def count(self, doing: str, noun: str) -> Callable[[int, int], None]:
        """Return a reporter of (things done since the last report, all things)."""
        return self._reporter(doing, doing, noun)

    def bytes(self, doing: str, then: str) -> Callable[[int, int], None]:
        """Return a reporter of (more bytes, all bytes); the bar says ``then`` once all are done."""
        return self._reporter(doing, then, None)

    def _reporter(self, doing: str, then: str, noun: str | None) -> Callable[[int, int], None]:
        def advance(more: int, total: int) -> None:
            with self._lock:
                if doing != self._stage:
                    self._bar = self._start(doing, total, noun) if self._enter(doing) else None
                if self._bar is None:
                    return
                task = self._bar.tasks[0]
                self._bar.advance(task.id, more)
                if task.finished:
                    self._bar.update(task.id, description=then)

        return advance if self._shown else lambda _more, _total: None

    def _start(self, doing: str, total: int, noun: str | None) -> Progress:
        from rich import progress
        from rich.console import Console

        counters: tuple[ProgressColumn, ...] = (
            (progress.MofNCompleteColumn(), progress.TextColumn(noun))
            if noun
            else (progress.DownloadColumn(), progress.TransferSpeedColumn())
        )
        bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=None),
            *counters,
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            refresh_per_second=5,
            transient=True,
            redirect_stdout=False,
        )
        bar.add_task(doing, total=total)
        return self._open.enter_context(bar)
