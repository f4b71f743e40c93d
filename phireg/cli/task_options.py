"""The options of ``phireg summarize`` that decide the task and what is asked of its scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from phireg.cli.options import Directory

_Function = TypeVar("_Function", bound=Callable[..., Any])

THRESHOLD = 15.0
"""Upstream's default of both thresholds."""

_COUNT = click.IntRange(min=1)


def task_options(function: _Function) -> _Function:
    """Articles, lengths, perplexity and thresholds, by upstream's names."""
    for option in reversed(
        (
            click.option(
                "--dataset",
                default="auto",
                show_default=True,
                metavar="FILE|NAME",
                help="JSONL, CSV or parquet with article, highlights; or cnn_dailymail, or demo.",
            ),
            click.option(
                "--dataset-dir", type=Directory(), metavar="DIR", help="cnn_dailymail on this disk."
            ),
            click.option("--eval-task", type=click.Choice(("summarize",)), default="summarize"),
            click.option("--batch-size", type=_COUNT, default=1, show_default=True, metavar="N"),
            click.option(
                "--max-ite",
                type=_COUNT,
                default=20,
                show_default=True,
                metavar="N",
                help="Batches at most.",
            ),
            click.option(
                "--max-input-length",
                type=click.IntRange(min=2),
                default=923,
                show_default=True,
                metavar="N",
                help="Tokens of a prompt at most; its beginning is cut off.",
            ),
            click.option(
                "--min-input-length",
                type=click.IntRange(min=0),
                default=0,
                show_default=True,
                metavar="N",
                help="Leave out articles whose prompt has no more tokens.",
            ),
            click.option(
                "--output-len",
                type=_COUNT,
                default=100,
                show_default=True,
                metavar="N",
                help="New tokens at most.",
            ),
            click.option("--num-beams", type=_COUNT, default=1, show_default=True, metavar="N"),
            click.option("--eval-ppl", is_flag=True, help="Also compute perplexity."),
            click.option(
                "--check-accuracy", is_flag=True, help="End with 4 if a threshold is missed."
            ),
            click.option(
                "--check-backend",
                "checked",
                multiple=True,
                metavar="NAME",
                help="Which backends to check; may be given repeatedly.  [default: all but hf]",
            ),
            click.option(
                "--tensorrt-llm-rouge1-threshold",
                "rouge1_threshold",
                type=float,
                metavar="X",
                help=f"rouge1 must be above it, whatever the backend.  [default: {THRESHOLD}]",
            ),
            click.option(
                "--tensorrt-llm-ppl-threshold",
                "ppl_threshold",
                type=float,
                metavar="X",
                help=f"Perplexity must be below it.  [default: {THRESHOLD}]",
            ),
        )
    ):
        function = option(function)
    return function
