"""The page about a quantization."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from phireg.quality.result import (
    CHANGED,
    CLOSE,
    FAR,
    LIMITS,
    UNCLEAR,
    UNINFORMATIVE,
    WORDS,
    Continuation,
    Quality,
    decibels,
    number,
    percent,
    share,
    times,
)
from phireg.report.page import Facts, LogPlot, every, render_template

_WORST = 16
_TICKS = 20

_STATES = {
    CLOSE: ("good", "✓"),
    CHANGED: ("part", "!"),
    FAR: ("bad", "✗"),
    UNCLEAR: ("open", "?"),
    UNINFORMATIVE: ("open", "?"),
}
"""A verdict's color and mark."""


@dataclass(frozen=True, slots=True)
class Measure:
    """An attribute of every linear, the worse the larger; its ``ends`` divide it into colors."""

    name: str
    attribute: str
    meaning: str
    ends: tuple[float, ...]
    labels: tuple[str, ...]
    text: Callable[[float], str]
    unit: str = ""


_RELATIVE = tuple(10 ** (-ratio / 20) for ratio in (40, 35, 30, 25, 20, 15))
_DECIBELS = ("40 dB or more", "35 to 40", "30 to 35", "25 to 30", "20 to 25", "15 to 20", "less")

MEASURES = (
    *(
        Measure(name, attribute, meaning, _RELATIVE, _DECIBELS, decibels, " dB")
        for name, attribute, meaning in (
            ("Weight", "weight", "Signal-to-noise ratio of the quantized weight."),
            ("Input", "activation", "The same of the quantized input on the report's text."),
        )
    ),
    Measure(
        "Saturation",
        "saturation",
        "Share of the input's values that lie beyond the ends of the calibrated scale.",
        (0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
        ("none", "to 0.001%", "to 0.01%", "to 0.1%", "to 1%", "to 10%", "more"),
        share,
    ),
    Measure(
        "Outliers",
        "outliers",
        "Largest channel of the input, before smoothing, over the median channel.",
        (3, 10, 30, 100, 300, 1000),
        ("to 3x", "to 10x", "to 30x", "to 100x", "to 300x", "to 1000x", "more"),
        times,
    ),
)


def render_quality(quality: Quality, facts: Facts = ()) -> str:
    """Return the page as text."""
    layers = len(quality.hidden)
    measures = [
        m for m in MEASURES if any(getattr(x, m.attribute) is not None for x in quality.linears)
    ]
    state, mark = _STATES[quality.verdict]
    written = quality.continuation
    return render_template(
        "quality.html",
        quality=quality,
        state=state,
        word=f"{mark} {WORDS[quality.verdict]}",
        limits=LIMITS,
        maps=[_heat_map(quality, measure) for measure in measures],
        plot=LogPlot.around(quality.hidden, -0.5, layers - 0.5),
        states=list(enumerate(quality.hidden)),
        ticks=[(layer, layer) for layer in every(layers, _TICKS)],
        worst=quality.worst_first()[:_WORST],
        written=written if isinstance(written, Continuation) else None,
        unwritten=written,
        provenance=(*quality.provenance, *facts),
        number=number,
        percent=percent,
        decibels=decibels,
        share=share,
        times=times,
    )


def _heat_map(quality: Quality, measure: Measure) -> dict[str, Any]:
    """Return a row of cells for each linear, by layer, or a sentence if all are alike."""
    rows: dict[str, list[dict[str, Any]]] = {}
    values = []
    for linear in quality.linears:
        value = getattr(linear, measure.attribute)
        if value is None:  # a linear that was left out
            value = 0.0
        values.append(value)
        rows.setdefault(linear.linear, []).append(
            {
                "heat": bisect_left(measure.ends, value),
                "label": f"layer {linear.layer} {linear.linear}",
                "number": measure.text(value),
            }
        )
    heats = {cell["heat"] for row in rows.values() for cell in row}
    best, worst = measure.text(min(values)), measure.text(max(values))
    everywhere = f"{best}{measure.unit}" + (f" to {worst}{measure.unit}" if worst != best else "")
    return {
        "name": measure.name,
        "meaning": measure.meaning,
        "labels": measure.labels,
        "rows": rows,
        "layers": len(quality.hidden),
        "everywhere": everywhere if len(heats) == 1 else None,
    }
