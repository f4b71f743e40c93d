"""``phireg verify``: prove a checkpoint to be its source, or say where it is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import phireg
from phireg.cli.options import (
    Directory,
    check_file,
    family_option,
    json_option,
    model_dir_option,
    quiet_option,
    report_option,
    revision_option,
)
from phireg.cli.output import ProgressBars, emit, emit_json, printable
from phireg.errors import CheckError

if TYPE_CHECKING:
    from phireg.verification.result import Check, Problem, Verification

_MOST_PROBLEMS = 12
_PIPE_WIDTH = 80


@click.command()
@click.argument("checkpoint_dir", type=Directory(), metavar="CKPT")
@model_dir_option
@family_option
@revision_option
@click.option("--quick", is_flag=True, help="Stop before anything is computed.")
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu or cuda.")
@click.option(
    "--dtype",
    type=click.Choice(("float32", "float16", "bfloat16")),
    default="float32",
    show_default=True,
    help="In which dtype to compute; float32 compares sharpest.",
)
@click.option(
    "--max-tokens",
    type=int,
    metavar="N",
    help="Longest prompt.  [default: what crosses the model's thresholds, within a budget]",
)
@report_option
@quiet_option("No progress bar.")
@json_option
def command(
    checkpoint_dir: str,
    *,
    model_dir: str,
    quick: bool,
    report: str | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare the checkpoint in CKPT with the model it was made from.

    Checks, weakest to strongest: structure and config.json, every byte, the logits against the
    source's own model, the ranks against themselves merged. Ends with 4 if one of them fails.
    """
    from phireg.verification.result import CHECKS, QUICK

    page = None if report is None else check_file(Path(report), "--report")
    with ProgressBars(quiet) as bars:
        advance = {
            "weights": bars.bytes("comparing bytes", "comparing"),
            "logits": bars.count("comparing logits", "layers"),
            "ranks": bars.count("comparing ranks", "layers"),
        }
        found = phireg.verify(
            checkpoint_dir,
            model_dir,
            checks=QUICK if quick else tuple(CHECKS),
            progress=lambda check, more, total: advance[check](more, total),
            **options,
        )
    if page is not None:
        from phireg.report.page import write_page
        from phireg.report.verification import render_verification

        write_page(render_verification(found), page)
    if as_json:
        emit_json(verification_document(found))
    else:
        show_verification(found)
    if not found.passed:
        raise click.exceptions.Exit(CheckError.exit_code)


def verification_document(found: Verification) -> dict[str, Any]:
    """What ``--json`` prints; docs/command-line.md describes it."""
    import dataclasses

    logits = None
    if found.logits is not None:
        logits = dataclasses.asdict(found.logits)
        logits["places"] = [
            {"layer": layer, "part": part, "error": error}
            for (layer, part), error in found.logits.places
        ]
        logits["wrong_places"] = found.logits.wrong_places
    return {
        "checkpoint_dir": found.checkpoint_dir,
        "model_dir": found.model_dir,
        "family": found.family,
        "passed": found.passed,
        "checks": [dataclasses.asdict(check) for check in found.checks],
        "logits": logits,
        "provenance": dict(found.provenance),
    }


def show_verification(found: Verification) -> None:
    """Print the table of checks and the verdict."""
    import io
    import shutil
    import sys

    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else _PIPE_WIDTH
    styles = {"passed": "green", "failed": "bold red", "skipped": "yellow"}
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in found.checks:
        table.add_row(
            Text(check.name), Text(check.verdict, styles[check.verdict]), Text(check.summary)
        )
        for line, style in _lines(check):
            indent = len(line) - len(line.lstrip())
            table.add_row("", "", Padding(Text(printable(line.lstrip()), style), (0, 0, 0, indent)))
    last = ("verified", "green") if found.passed else ("not verified", "bold red")
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=terminal, highlight=False)
    console.print(table)
    console.print(Text(f"{printable(found.checkpoint_dir)}: {last[0]}{_limits(found)}", last[1]))
    lines = (line.rstrip() for line in text.getvalue().splitlines())
    if terminal:
        click.echo("\n".join(lines))  # with its colours; names in it were made printable
    else:
        emit("\n".join(lines))


def _lines(check: Check) -> Iterator[tuple[str, str]]:
    for problem in check.problems[:_MOST_PROBLEMS]:
        yield from _problem(problem)
    if len(check.problems) > _MOST_PROBLEMS:
        yield f"and {len(check.problems) - _MOST_PROBLEMS} more; --json has all", ""
    for note in check.notes:
        yield f"note: {note}", "dim"


def _problem(problem: Problem) -> Iterator[tuple[str, str]]:
    yield problem.where, "red"
    yield f"  {problem.text}", ""
    if problem.hint:
        yield f"  {problem.hint}", "dim"


def _limits(found: Verification) -> str:
    missing = ", ".join(found.unchecked)
    return f", but not checked: {missing}" if missing and found.passed else ""
