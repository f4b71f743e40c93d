"""Render templates, place what their charts draw, and write a page complete or not at all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined

from phireg.files.writing import REPORT, write_file

WIDTH = 900
"""Width of every chart, in pixels of its own."""


_ENVIRONMENT = Environment(
    loader=PackageLoader("phireg.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters["px"] = "{:.1f}".format


def render_template(template: str, **values: Any) -> str:
    """Fill a template in; everything that a value holds is escaped."""
    return _ENVIRONMENT.get_template(template).render(values)


def write_page(page: str, path: Path) -> None:
    """Write a page; it appears complete or not at all."""
    write_file(path, page.encode("utf-8"), REPORT)


Ticks = list[tuple[float, object]]
"""Places on the horizontal axis, and what is written there."""


@dataclass(frozen=True, slots=True)
class LogPlot:
    """A plot area with a logarithmic vertical axis from exponent ``low`` to ``high``.

    ``first`` and ``last`` are the values at the ends of the horizontal axis.
    """

    height: int
    low: int
    high: int
    first: float
    last: float

    LEFT: ClassVar[int] = 56
    RIGHT: ClassVar[int] = WIDTH - 16
    TOP: ClassVar[int] = 14

    @classmethod
    def around(cls, height: int, values: Iterable[float], first: float, last: float) -> LogPlot:
        """Return the plot that shows all finite values above zero."""
        powers = [math.log10(value) for value in values if 0 < value < math.inf] or [-6.0]
        low, high = math.floor(min(powers)), math.ceil(max(powers))
        return cls(height, max(low, high - 12), max(high, low + 2), first, last)

    @property
    def bottom(self) -> int:
        """Vertical place of the horizontal axis."""
        return self.height - 34

    def x(self, value: float) -> float:
        """Return the horizontal place of a value."""
        share = (value - self.first) / ((self.last - self.first) or 1)
        return self.LEFT + share * (self.RIGHT - self.LEFT)

    def y(self, value: float) -> float:
        """Return the vertical place of a value; one that is not finite is at the top."""
        if not value < math.inf:
            return self.TOP
        power = math.log10(value) if value > 0 else -math.inf
        share = (min(max(power, self.low), self.high) - self.low) / (self.high - self.low)
        return self.bottom - share * (self.bottom - self.TOP)

    def powers(self) -> Iterator[tuple[int, float]]:
        """Yield the exponents to label and their vertical places."""
        for power in range(self.low, self.high + 1, max(1, (self.high - self.low) // 6)):
            yield power, self.y(10.0**power)


def every(count: int, most: int) -> range:
    """Return at most ``most`` of ``range(count)``, evenly spaced, for labels."""
    return range(0, count, max(1, -(-count // most)))
