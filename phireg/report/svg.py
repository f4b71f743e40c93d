"""Small SVG vocabulary: elements, and a chart frame with a logarithmic value axis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 900
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 14, 34


def element(tag: str, *children: str, **attributes: object) -> str:
    """An element; ``class_`` is class, ``stroke_width`` stroke-width, a float gets one decimal."""
    shown = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_value(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    inner = "".join(children)
    return f"<{tag}{shown}>{inner}</{tag}>" if inner else f"<{tag}{shown}/>"


def _value(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else escape(str(value))


def text(x: float, y: float, content: str, **attributes: object) -> str:
    """A line of text."""
    return element("text", escape(content), x=x, y=y, **attributes)


def picture(height: float, label: str, *children: str) -> str:
    """The outer element; ``label`` is what a screen reader says."""
    return element(
        "svg",
        *children,
        viewBox=f"0 0 {WIDTH} {height:.0f}",
        role="img",
        aria_label=label,
        xmlns="http://www.w3.org/2000/svg",
    )


@dataclass(frozen=True, slots=True)
class LogFrame:
    """A plot area whose values lie on powers of ten.

    Attributes:
        height: of the picture.
        low: exponent at the bottom.
        high: exponent at the top.
        first: value of the horizontal axis at the left edge.
        last: at the right edge.
    """

    height: float
    low: int
    high: int
    first: float
    last: float

    @classmethod
    def around(cls, height: float, values: Iterable[float], first: float, last: float) -> LogFrame:
        """The frame that shows all finite values above zero."""
        powers = [math.log10(v) for v in values if 0 < v < math.inf] or [-6.0]
        low, high = math.floor(min(powers)), math.ceil(max(powers))
        return cls(height, max(low, high - 12), max(high, low + 2), first, last)

    @property
    def bottom(self) -> float:
        """Vertical place of the horizontal axis."""
        return self.height - _BOTTOM

    def x(self, value: float) -> float:
        """Horizontal place."""
        share = (value - self.first) / ((self.last - self.first) or 1)
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Vertical place; what is too small stands on the bottom, what is not finite on top."""
        if not value < math.inf:
            return _TOP
        power = math.log10(value) if value > 0 else -math.inf
        share = (min(max(power, self.low), self.high) - self.low) / (self.high - self.low)
        return self.bottom - share * (self.bottom - _TOP)

    def axes(self) -> str:
        """Lines and labels of the powers of ten."""
        step = max(1, (self.high - self.low) // 6)
        made = []
        for power in range(self.low, self.high + 1, step):
            y = self.y(10.0**power)
            made.append(element("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
            label = element("tspan", str(power), dy="-5", class_="power")
            made.append(element("text", "10", label, x=_LEFT - 8.0, y=y + 4, class_="tick end"))
        return "".join(made)

    def limit(self, value: float, label: str) -> str:
        """A tolerance: a dashed line, and the part above it tinted."""
        y = self.y(value)
        width = WIDTH - _LEFT - _RIGHT
        return (
            element("rect", x=_LEFT, y=_TOP, width=width, height=max(0.0, y - _TOP), class_="over")
            + element("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y, class_="limit")
            + text(WIDTH - _RIGHT - 4.0, y - 5, label, class_="tick end limit-text")
        )

    def line(self, points: Sequence[tuple[float, float]], class_: str) -> str:
        """A line through points (place, value)."""
        path = " ".join(f"{self.x(a):.1f},{self.y(b):.1f}" for a, b in points)
        return element("polyline", points=path, class_=class_)
