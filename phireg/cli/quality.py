"""Text and JSON of what a quantization changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from phireg.cli.output import columns, table
from phireg.files.sizes import size

if TYPE_CHECKING:
    from phireg.quality.result import LinearQuality, Quality

_MOST = 8
"""Linears, and layers, that are shown."""


def quality_text(quality: Quality) -> str:
    """Show the verdict, the worst linears, and the error behind some layers."""
    from phireg.quality.result import percent

    layers = len(quality.hidden)
    step = max(1, -(-layers // _MOST))
    shown = sorted({*range(layers - 1, -1, -step), layers - 1})
    hidden = ", ".join(f"{layer}: {percent(quality.hidden[layer])}" for layer in shown)
    rows = [
        ("quality", quality.summary),
        ("text", quality.text.description),
        ("size", f"{size(quality.size)} instead of {size(quality.unquantized_size)}"),
        *(
            [("written", f"nothing: {quality.continuation}")]
            if isinstance(quality.continuation, str)
            else quality.continuation.rows
        ),
        ("hidden states", f"error behind layer {hidden}"),
    ]
    worst = quality.worst_first()[:_MOST]
    heading = f"the worst {len(worst)} of {len(quality.linears)} linears: errors, and SQNR in dB"
    cells = _rows(worst)
    shown_linears = table(cells, indent=2, right=range(1, len(cells[0]) - 1))
    return "\n".join((columns(rows), heading, shown_linears))


def _rows(worst: Sequence[LinearQuality]) -> list[tuple[str, ...]]:
    from phireg.quality.result import decibels, percent, share, times

    inputs = worst[0].activation is not None
    heads = ("inputs", "SQNR", "saturated") if inputs else ()
    rows: list[tuple[str, ...]] = [("", "weights", "SQNR", *heads, "outliers")]
    for linear in worst:
        cells = [percent(linear.weight), decibels(linear.weight)]
        if inputs:
            cells += [percent(linear.activation), decibels(linear.activation)]
            cells.append(share(linear.saturation))
        rows.append((f"layer {linear.layer} {linear.linear}", *cells, times(linear.outliers)))
    return rows


def quality_document(quality: Quality) -> dict[str, Any]:
    """Return what ``--json`` says of the quality; docs/command-line.md describes it."""
    from phireg.quality.result import sqnr

    text = quality.text
    return {
        "verdict": quality.verdict,
        "summary": quality.summary,
        "text": text.origin,
        "rows": text.rows,
        "tokens": text.tokens,
        "calibrated_on": text.calibrated,
        "perplexity": text.perplexity,
        "unquantized_perplexity": text.unquantized_perplexity,
        "perplexity_change": text.loss,
        "kl": text.kl,
        "top1": text.top1,
        "unquantized_bytes": quality.unquantized_size,
        "bytes": quality.size,
        "continuation": None
        if isinstance(quality.continuation, str)
        else dataclasses.asdict(quality.continuation),
        "hidden": quality.hidden,
        "linears": [
            {
                "layer": linear.layer,
                "linear": linear.linear,
                "weight_error": linear.weight,
                "weight_sqnr": sqnr(linear.weight),
                "activation_error": linear.activation,
                "activation_sqnr": None if linear.activation is None else sqnr(linear.activation),
                "saturation": linear.saturation,
                "outlier_ratio": linear.outliers,
            }
            for linear in quality.linears
        ],
    }
