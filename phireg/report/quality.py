"""The page about a quantization."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from phireg.quality.result import Quality, decibels, percent, share, times
from phireg.report.page import WIDTH, LogPlot, every, render_template

_WORST = 16
_LEFT, _TOP, _ROW, _GAP = 126, 4, 30, 2
_TICKS = 20


@dataclass(frozen=True, slots=True)
class Measure:
    """An attribute of every linear, the worse the larger.

    ``ends`` divide the values into classes of colors, which have ``labels``.
    """

    name: str
    attribute: str
    meaning: str
    ends: tuple[float, ...]
    labels: tuple[str, ...]
    text: Callable[[float], str]


_RELATIVE = tuple(10 ** (-ratio / 20) for ratio in (40, 35, 30, 25, 20, 15))
_DECIBELS = ("40 dB or more", "35 to 40", "30 to 35", "25 to 30", "20 to 25", "15 to 20", "less")

MEASURES = (
    Measure(
        "Weight",
        "weight",
        "Signal-to-noise ratio of the quantized weight.",
        _RELATIVE,
        _DECIBELS,
        decibels,
    ),
    Measure(
        "Input",
        "activation",
        "Signal-to-noise ratio of the quantized input on the report's text.",
        _RELATIVE,
        _DECIBELS,
        decibels,
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


def render_quality(quality: Quality) -> str:
    """Return the page as text."""
    layers = len(quality.hidden)
    measures = [m for m in MEASURES if getattr(quality.linears[0], m.attribute) is not None]
    return render_template(
        "quality.html",
        quality=quality,
        maps=[_heat_map(quality, measure) for measure in measures],
        plot=LogPlot.around(240, quality.hidden, -0.5, layers - 0.5),
        states=list(enumerate(quality.hidden)),
        ticks=[(layer, layer) for layer in every(layers, _TICKS)],
        worst=quality.worst_first()[:_WORST],
        provenance=quality.provenance,
        percent=percent,
        decibels=decibels,
        share=share,
        times=times,
    )


def _heat_map(quality: Quality, measure: Measure) -> dict[str, Any]:
    """Place a cell for every linear: layers across, linears down."""
    names = list(dict.fromkeys(linear.linear for linear in quality.linears))
    layers = len(quality.hidden)
    width = (WIDTH - _LEFT) / layers
    cells = []
    for linear in quality.linears:
        value = getattr(linear, measure.attribute)
        cells.append(
            {
                "x": _LEFT + linear.layer * width,
                "y": _TOP + names.index(linear.linear) * _ROW,
                "heat": bisect_left(measure.ends, value),
                "label": f"layer {linear.layer} {linear.linear}",
                "number": measure.text(value),
            }
        )
    return {
        "name": measure.name,
        "meaning": measure.meaning,
        "labels": measure.labels,
        "left": _LEFT,
        "height": _TOP + len(names) * _ROW + 24,
        "cell_width": width - min(_GAP, width * 0.12),
        "cell_height": _ROW - _GAP,
        "rows": [(name, _TOP + row * _ROW) for row, name in enumerate(names)],
        "cells": cells,
        "ticks": [(layer, _LEFT + (layer + 0.5) * width) for layer in every(layers, _TICKS)],
    }
