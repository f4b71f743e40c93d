"""Render templates, place what their charts draw, and write a page complete or not at all.

Places are percent of a chart's area, so that a chart fills the width that a screen has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from phireg.files.sizes import size
from phireg.files.writing import REPORT, write_file

Facts = Sequence[tuple[str, str]]
"""Labels and values of how a page came about: the command, its duration."""

_STEPS = (1, 2, 5)


_ENVIRONMENT = Environment(
    loader=PackageLoader("phireg.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters["at"] = "{:.2f}".format
_ENVIRONMENT.filters["bytes"] = size


def render_template(template: str, **values: Any) -> str:
    """Fill a template in; everything that a value holds is escaped."""
    return _ENVIRONMENT.get_template(template).render(values)


def write_page(page: str, path: Path) -> None:
    """Write a page; it appears complete or not at all."""
    write_file(path, page.encode("utf-8"), REPORT)


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis from ``low`` to ``high``, whose ends are round numbers."""

    low: float
    high: float
    step: float

    @classmethod
    def around(cls, values: Iterable[float], least: float, most_ticks: int = 6) -> Axis:
        """Return an axis that shows all values; it spans ``least`` at least."""
        numbers = list(values)
        low, high = min(numbers), max(numbers)
        span = max(high - low, least)
        power = 10.0 ** math.floor(math.log10(span / most_ticks))
        step = next(n * power for n in (*_STEPS, 10) if span / (n * power) <= most_ticks)
        start = math.floor(low / step) * step
        end = math.ceil(high / step) * step
        return cls(start, max(end, start + step), step)

    def at(self, value: float) -> float:
        """Return the place of a value."""
        return 100 * (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """Return the values to label, and their labels."""
        count = round((self.high - self.low) / self.step)
        return [(v, f"{v:g}") for v in (self.low + n * self.step for n in range(count + 1))]


@dataclass(frozen=True, slots=True)
class LogPlot:
    """A plot whose vertical axis is logarithmic, from ``low`` to ``high``.

    With ``exact`` there is a row below ``low`` for values that are zero. ``first`` and ``last`` are
    at the ends of the horizontal axis.
    """

    low: float
    high: float
    first: float
    last: float
    exact: bool

    @classmethod
    def around(cls, values: Iterable[float], first: float, last: float) -> LogPlot:
        """Return the plot that shows all values; twelve powers of ten at most."""
        numbers = list(values)
        powers = [math.log10(value) for value in numbers if 0 < value < math.inf] or [-6.0, 0.0]
        low, high = max(min(powers), max(powers) - 12), max(powers)
        if high - low < 2:  # one, two or five times a power of ten
            low, high = (_rounded(end, up) for end, up in ((low, False), (high, True)))
        else:
            low, high = math.floor(low), math.ceil(high)
        return cls(low, max(high, low + 0.3), first, last, 0 in numbers)

    def x(self, value: float) -> float:
        """Return the horizontal place of a value."""
        return 100 * (value - self.first) / ((self.last - self.first) or 1)

    def y(self, value: float) -> float:
        """Return the vertical place of a value, from the top; one that is not finite is there."""
        if not value < math.inf:
            return 0.0
        if value <= 0:
            return 100.0
        share = (min(max(math.log10(value), self.low), self.high) - self.low) / (
            self.high - self.low
        )
        return (90.0 if self.exact else 100.0) * (1 - share)

    def ticks(self) -> Iterator[tuple[float, float]]:
        """Yield the values to label and their vertical places."""
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        narrow = self.high - self.low < 2
        for power in powers[:: 1 if narrow else max(1, len(powers) // 6)]:
            for factor in _STEPS if narrow else (1,):
                value = factor * 10.0**power
                if self.low - 1e-9 <= math.log10(value) <= self.high + 1e-9:
                    yield value, self.y(value)


def _rounded(exponent: float, up: bool) -> float:
    """Return the next exponent of one, two or five times a power of ten."""
    base = math.floor(exponent)
    ends = [base + math.log10(n) for n in (*_STEPS, 10)]
    if up:
        return next(end for end in ends if end >= exponent - 1e-9)
    return max(end for end in ends if end <= exponent + 1e-9)


def every(count: int, most: int) -> range:
    """Return at most ``most`` of ``range(count)``, evenly spaced, for labels."""
    return range(0, count, max(1, -(-count // most)))
