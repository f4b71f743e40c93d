"""The pictures of the report: heat maps of all linears, and the error behind every layer."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from phireg.quality.result import LinearQuality, Quality, sqnr
from phireg.quality.words import decibels, share, times
from phireg.report.svg import WIDTH, LogFrame, element, picture, text

_LABELS, _TOP, _ROW, _GAP = 126.0, 4.0, 30.0, 2.0
_WRITTEN = 40.0
"""Cells at least so wide have their number written in them."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One kind of number that every linear has.

    Attributes:
        name: a heading.
        meaning: what it is, in a sentence.
        badness: ends of the colours' classes in ascending order; what is not above the first has
            the palest colour.
        labels: of the classes, one more than ends.
        value: the number on that axis, the worse the larger; None if the linear has none.
        shown: the number for people.
    """

    name: str
    meaning: str
    badness: tuple[float, ...]
    labels: tuple[str, ...]
    value: Callable[[LinearQuality], float | None]
    shown: Callable[[LinearQuality], str]


def _loss(relative: float | None) -> float | None:
    return None if relative is None else -sqnr(relative)


_DECIBELS = ("40 dB or more", "35 to 40", "30 to 35", "25 to 30", "20 to 25", "15 to 20", "less")

MEASURES = (
    Measure(
        "Weight",
        "Signal-to-noise ratio of the quantized weight.",
        (-40, -35, -30, -25, -20, -15),
        _DECIBELS,
        lambda one: _loss(one.weight),
        lambda one: decibels(one.weight),
    ),
    Measure(
        "Input",
        "Signal-to-noise ratio of the quantized input on the report's text.",
        (-40, -35, -30, -25, -20, -15),
        _DECIBELS,
        lambda one: _loss(one.activation),
        lambda one: decibels(one.activation),
    ),
    Measure(
        "Saturation",
        "Share of the input's values that lie beyond the ends of the calibrated scale.",
        (0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
        ("none", "to 0.001%", "to 0.01%", "to 0.1%", "to 1%", "to 10%", "more"),
        lambda one: one.saturation,
        lambda one: share(one.saturation),
    ),
    Measure(
        "Outliers",
        "Largest channel of the input, before smoothing, over the median channel.",
        (3, 10, 30, 100, 300, 1000),
        ("to 3x", "to 10x", "to 30x", "to 100x", "to 300x", "to 1000x", "more"),
        lambda one: one.outliers,
        lambda one: times(one.outliers),
    ),
)


def applicable(found: Quality) -> tuple[Measure, ...]:
    """The measures that this format has."""
    return tuple(m for m in MEASURES if m.value(found.linears[0]) is not None)


def heat_map(found: Quality, measure: Measure) -> str:
    """Layers across, linears down."""
    names = list(dict.fromkeys(one.linear for one in found.linears))
    layers = len(found.hidden)
    width = (WIDTH - _LABELS) / layers
    marks = []
    for row, name in enumerate(names):
        y = _TOP + row * _ROW
        marks.append(text(_LABELS - 12, y + _ROW / 2 + 4, name, class_="tick end"))
    for one in found.linears:
        x, y = _LABELS + one.layer * width, _TOP + names.index(one.linear) * _ROW
        marks.append(_cell(one, measure, x, y, width))
    bottom = _TOP + len(names) * _ROW
    step = max(1, -(-layers // 20))
    for layer in range(0, layers, step):
        x = _LABELS + (layer + 0.5) * width
        marks.append(text(x, bottom + 16, str(layer), class_="tick middle"))
    marks.append(text(_LABELS - 12, bottom + 16, "layer", class_="tick end"))
    label = f"{measure.name.lower()} of every linear, by layer"
    return picture(bottom + 24, label, *marks)


def _cell(one: LinearQuality, measure: Measure, x: float, y: float, width: float) -> str:
    value = measure.value(one)
    assert value is not None
    kind = bisect_left(measure.badness, value)
    gap = min(_GAP, width * 0.12)
    title = element("title", f"layer {one.layer} {one.linear}: {measure.shown(one)}")
    square = element(
        "rect",
        title,
        x=x,
        y=y,
        width=f"{width - gap:.2f}",
        height=_ROW - _GAP,
        rx=2,
        class_=f"heat{kind}",
    )
    if width < _WRITTEN:
        return square
    middle = x + (width - gap) / 2
    shown = measure.shown(one)
    return square + text(middle, y + _ROW / 2 + 3, shown, class_=f"middle on{kind}")


def hidden_chart(errors: Sequence[float]) -> str:
    """The error of the hidden states behind every layer."""
    last = len(errors) - 1
    frame = LogFrame.around(240, errors, -0.5, last + 0.5)
    step = max(1, -(-len(errors) // 20))
    ticks = [
        text(frame.x(layer), frame.bottom + 16, str(layer), class_="tick middle")
        for layer in range(0, len(errors), step)
    ]
    dots = [
        element(
            "circle",
            element("title", f"layer {layer}: {error:.2%}"),
            cx=frame.x(layer),
            cy=frame.y(error),
            r=4,
            class_="state",
        )
        for layer, error in enumerate(errors)
    ]
    return picture(
        frame.height,
        "error of the hidden states behind every layer",
        frame.axes(),
        frame.line([(float(n), error) for n, error in enumerate(errors)], "states"),
        *dots,
        *ticks,
        text(frame.x(last / 2), frame.bottom + 31, "layer", class_="tick middle"),
    )
