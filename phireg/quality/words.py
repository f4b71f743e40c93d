"""The report's numbers as people read them."""

from __future__ import annotations

import math

from phireg.quality.result import sqnr

NONE = "-"


def decibels(relative: float | None) -> str:
    """A relative error as SQNR: ``31.5``; ``exact`` where there is none."""
    if relative is None:
        return NONE
    ratio = sqnr(relative)
    return f"{ratio:.1f}" if math.isfinite(ratio) else "exact" if ratio > 0 else "lost"


def percent(relative: float | None) -> str:
    """A relative error: ``2.65%``."""
    return NONE if relative is None else f"{relative:.2%}"


def share(value: float | None) -> str:
    """A share of many values: ``0``, ``0.002%``, ``12%``."""
    if value is None:
        return NONE
    return "0" if value == 0 else f"{100 * value:.2g}%"


def times(value: float) -> str:
    """A ratio: ``2.42x``, ``1,520x``."""
    if not math.isfinite(value):
        return "infinite"
    return f"{value:,.0f}x" if value >= 100 else f"{value:.3g}x"
