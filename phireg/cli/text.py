"""Plain text for people: aligned columns, folded lines, sizes. Names are never cut."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

import click

from phireg.dtypes import WEIGHT_DTYPES
from phireg.errors import OutputError

_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_NARROWEST = 24


def printable(text: str) -> str:
    """``text`` without what a terminal would obey: names in a model may hold anything."""
    text = _CONTROL.sub(lambda found: ascii(found.group())[1:-1], text)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def emit(text: str) -> None:
    """Print to standard output.

    Raises:
        OutputError: it cannot take any more (a full disk).
        BrokenPipeError: its reader has gone.
    """
    try:
        click.echo(printable(text))
    except BrokenPipeError:
        raise
    except OSError as error:
        mute_stdout()
        raise OutputError(f"cannot write to standard output: {error.strerror}") from error


def emit_json(document: Any) -> None:
    """Print a JSON document to standard output."""
    import json

    emit(json.dumps(document, indent=2))


def mute_stdout() -> None:
    """Let what is still buffered go nowhere, so that the interpreter does not complain at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def columns(rows: Iterable[Sequence[str]], *, indent: int = 0, right: Sequence[int] = ()) -> str:
    """Align rows of cells.

    On a terminal the last column is folded to fit; elsewhere every row stays one line.

    Args:
        rows: cells, equally many in each row.
        indent: spaces before each line.
        right: the columns to align at their right edge.
    """
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*(row[:-1] for row in cells), strict=True)]
    lines = []
    for *first, last in cells:
        padded = [
            cell.rjust(width) if n in right else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(first, widths, strict=True))
        ]
        head = " " * indent + "".join(f"{cell}  " for cell in padded)
        lines.append(_fold(last, head, " " * len(head), sys.stdout))
    return "\n".join(lines)


def folded(label: str, text: str) -> str:
    """An error message after its label; its lines are folded if stderr is a terminal."""
    first, *others = printable(text).split("\n")
    lines = [_fold(first, label, " " * len(label), sys.stderr)]
    for line in others:
        start = line[: len(line) - len(line.lstrip())]
        lines.append(_fold(line.lstrip(), start, f"{start}  ", sys.stderr))
    return "\n".join(lines)


def _fold(text: str, start: str, others: str, stream: TextIO) -> str:
    if not stream.isatty():
        return (start + text).rstrip()
    width = max(shutil.get_terminal_size().columns, len(others) + _NARROWEST)
    return (
        textwrap.fill(
            text,
            width,
            initial_indent=start,
            subsequent_indent=others,
            break_long_words=False,
            break_on_hyphens=False,
        )
        or start.rstrip()
    )


def size(count: int) -> str:
    """Bytes of files, in decimal units as disks are sold and tools show them."""
    if count < 1000:
        return f"{count} bytes"
    value = float(count)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.5:
            return f"{value:.3g} {unit}"
    return f"{value / 1000:.3g} TB"


def memory(count: int) -> str:
    """Bytes of memory, in binary units."""
    return f"{count / 2**20:,.4g} MiB"


def dtype_name(code: str) -> str:
    """A safetensors dtype code by TensorRT-LLM's name, where it has one."""
    return {code: name for name, code in WEIGHT_DTYPES.items()}.get(code, code)


def counted(count: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
