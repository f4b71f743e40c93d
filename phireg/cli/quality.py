"""A quality measurement as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from phireg.cli.output import columns

if TYPE_CHECKING:
    from phireg.quality.result import LinearQuality, Quality

_WORST = 8
_LAYERS = 8


def quality_text(quality: Quality) -> str:
    """Show the verdict, the worst linears, and the error behind some layers."""
    from phireg.quality.result import percent

    layers = len(quality.hidden)
    step = max(1, -(-layers // _LAYERS))
    shown = sorted({*range(layers - 1, -1, -step), layers - 1})
    hidden = ", ".join(f"{layer}: {percent(quality.hidden[layer])}" for layer in shown)
    rows = [
        ("quality", quality.verdict),
        ("text", quality.text.description),
        ("hidden states", f"error behind layer {hidden}"),
    ]
    worst = quality.worst_first()[:_WORST]
    return "\n".join(
        (
            columns(rows),
            f"the worst {len(worst)} of {len(quality.linears)} linears: errors, and SQNR in dB",
            columns(_table(worst), indent=2, right=(1, 2, 3, 4, 5)),
        )
    )


def _table(worst: Sequence[LinearQuality]) -> list[tuple[str, ...]]:
    from phireg.quality.result import decibels, percent, share, times

    rows: list[tuple[str, ...]] = []
    inputs = worst[0].activation is not None
    heads = ("", "weights", "SQNR")
    rows.append((*heads, *(("inputs", "SQNR", "saturated") if inputs else ()), "outliers"))
    for linear in worst:
        cells = [
            f"layer {linear.layer} {linear.linear}",
            percent(linear.weight),
            decibels(linear.weight),
        ]
        if inputs:
            cells += [
                percent(linear.activation),
                decibels(linear.activation),
                share(linear.saturation),
            ]
        rows.append((*cells, times(linear.outliers)))
    return rows


def quality_document(quality: Quality) -> dict[str, Any]:
    """Return the document that ``--json`` has under ``quality``."""
    from phireg.quality.result import sqnr

    text = quality.text
    return {
        "close": quality.close,
        "verdict": quality.verdict,
        "text": text.origin,
        "rows": text.rows,
        "tokens": text.tokens,
        "calibrated_on": text.calibrated,
        "perplexity": text.perplexity,
        "unquantized_perplexity": text.unquantized_perplexity,
        "kl": text.kl,
        "top1": text.top1,
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
