"""A quantization report as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from phireg.cli.output import columns

if TYPE_CHECKING:
    from phireg.quality.result import LinearQuality, Quality

_WORST = 8
_LAYERS = 8


def quality_text(found: Quality) -> str:
    """The verdict, the worst linears, and the error behind some layers."""
    from phireg.quality.words import percent

    layers = len(found.hidden)
    step = max(1, -(-layers // _LAYERS))
    shown = sorted({*range(layers - 1, -1, -step), layers - 1})
    hidden = ", ".join(f"{layer}: {percent(found.hidden[layer])}" for layer in shown)
    text = found.text
    count = f"{text.rows} sample{'s' if text.rows > 1 else ''}, {text.tokens} tokens"
    which = "calibrated on as well" if text.calibrated else "not calibrated on"
    rows = [
        ("quality", found.verdict),
        ("text", f"{text.origin}: {count}, {which}"),
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
    from phireg.quality.words import decibels, percent, share, times

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
    """What ``--json`` has under ``quality``; a number that is not finite is null."""
    from phireg.quality.result import sqnr

    text = found.text
    return {
        "close": found.close,
        "verdict": found.verdict,
        "text": text.origin,
        "rows": text.rows,
        "tokens": text.tokens,
        "calibrated_on": text.calibrated,
        "perplexity": _finite(text.perplexity),
        "unquantized_perplexity": _finite(text.unquantized_perplexity),
        "kl": _finite(text.kl),
        "top1": text.top1,
        "hidden": [_finite(error) for error in found.hidden],
        "linears": [
            {
                "layer": one.layer,
                "linear": one.linear,
                "weight_error": _finite(one.weight),
                "weight_sqnr": _finite(sqnr(one.weight)),
                "activation_error": _finite(one.activation),
                "activation_sqnr": None
                if one.activation is None
                else _finite(sqnr(one.activation)),
                "saturation": one.saturation,
                "outlier_ratio": _finite(one.outliers),
            }
            for one in found.linears
        ],
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
