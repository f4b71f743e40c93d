"""The table of ``phireg summarize``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from phireg.cli.output import columns, counted, emit, memory

if TYPE_CHECKING:
    from phireg.summarization.result import BackendResult, Summarization


def show_scores(found: Summarization, report: Path | None, results: Path | None) -> None:
    """Print which data was used, the scores of each backend, and what was checked."""
    emit(f"{found.data}: {counted(len(found.samples), 'article')}")
    if found.note is not None:
        emit(f"note: {found.note}")
    emit("")
    head = ["backend", "rouge1", "rouge2", "rougeL", "rougeLsum"]
    if found.settings.eval_ppl:
        head.append("perplexity")
    head += ["tokens/s", "latency", "memory"]
    rows = [head, *(_row(found, result) for result in found.backends)]
    # The last column is right-aligned by hand: columns() folds it on a narrow terminal.
    width = max(len(row[-1]) for row in rows)
    rows = [[*row[:-1], row[-1].rjust(width)] for row in rows]
    emit(columns(rows, right=range(1, len(head) - 1)))
    emit("")
    for (one, other), count in found.agreement().items():
        emit(f"{one} and {other}: {count} of {len(found.samples)} summaries are the same")
    if results is not None:
        total = sum(len(result.batches) for result in found.backends)
        rest = f" ({found.resumed} of {total} batches from an earlier run)" if found.resumed else ""
        emit(f"results: {results}{rest}")
    if report is not None:
        emit(f"report: {report}")
    for check in found.checks:
        word, colour = ("passed", "green") if check.passed else ("FAILED", "red")
        click.secho(f"{word}  {check}", fg=colour)


def _row(found: Summarization, result: BackendResult) -> list[str]:
    row = [result.name, *(f"{score:.2f}" for score in result.rouge.total.values())]
    if found.settings.eval_ppl:
        row.append("unknown" if result.perplexity is None else f"{result.perplexity:.3f}")
    used = "unknown" if result.memory is None else memory(result.memory)
    return [*row, f"{result.tokens_per_second:,.1f}", f"{result.latency:.3f} s", used]
