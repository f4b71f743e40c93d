"""A quantization report as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from phireg.cli.output import columns

if TYPE_CHECKING:
    from phireg.quality.result import LinearQuality, Quality

_WORST = 8
_LAYERS = 8


def quality_text(found: Quality) -> str:
    """The verdict, the worst linears, and the error behind some layers."""
    from phireg.quality.result import percent

    layers = len(found.hidden)
    step = max(1, -(-layers // _LAYERS))
    shown = sorted({*range(layers - 1, -1, -step), layers - 1})
    hidden = ", ".join(f"{layer}: {percent(found.hidden[layer])}" for layer in shown)
    rows = [
        ("quality", found.verdict),
        ("text", found.text.description),
        ("hidden states", f"error behind layer {hidden}"),
    ]
    worst = found.worst_first()[:_WORST]
    return "\n".join(
        (
            columns(rows),
            f"the worst {len(worst)} of {len(found.linears)} linears: errors, and SQNR in dB",
            columns(_table(worst), indent=2, right=(1, 2, 3, 4, 5)),
        )
    )


def _table(worst: Sequence[LinearQuality]) -> list[tuple[str, ...]]:
    from phireg.quality.result import decibels, percent, share, times

    rows: list[tuple[str, ...]] = []
    inputs = worst[0].activation is not None
    heads = ("", "weights", "SQNR")
    rows.append((*heads, *(("inputs", "SQNR", "saturated") if inputs else ()), "outliers"))
    for one in worst:
        cells = [f"layer {one.layer} {one.linear}", percent(one.weight), decibels(one.weight)]
        if inputs:
            cells += [percent(one.activation), decibels(one.activation), share(one.saturation)]
        rows.append((*cells, times(one.outliers)))
    return rows


def quality_document(found: Quality) -> dict[str, Any]:
    """What ``--json`` has under ``quality``."""
    from phireg.quality.result import sqnr

    text = found.text
    return {
        "close": found.close,
        "verdict": found.verdict,
        "text": text.origin,
        "rows": text.rows,
        "tokens": text.tokens,
        "calibrated_on": text.calibrated,
        "perplexity": text.perplexity,
        "unquantized_perplexity": text.unquantized_perplexity,
        "kl": text.kl,
        "top1": text.top1,
        "hidden": found.hidden,
        "linears": [
            {
                "layer": one.layer,
                "linear": one.linear,
                "weight_error": one.weight,
                "weight_sqnr": sqnr(one.weight),
                "activation_error": one.activation,
                "activation_sqnr": None if one.activation is None else sqnr(one.activation),
                "saturation": one.saturation,
                "outlier_ratio": one.outliers,
            }
            for one in found.linears
        ],
    }
