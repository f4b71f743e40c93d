"""Means over the positions of a text, with intervals for what other text of its kind would give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 16
_NORMAL = 1.959964
"""Standard deviations of 95%."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its 95% interval, which is infinite where there is too little text for one."""

    value: float
    low: float
    high: float


def mean(rows: Sequence[NDArray[Any]]) -> Estimate:
    """Estimate a mean of one value for each position.

    Neighboring positions depend on each other, so that the spread is that of the means of blocks
    of 16 consecutive positions of a row.
    """
    blocks = [row[at : at + _BLOCK] for row in rows for at in range(0, len(row), _BLOCK)]
    total, count = sum(float(block.sum()) for block in blocks), sum(map(len, blocks))
    value = total / count
    if not math.isfinite(value):
        return Estimate(math.inf, math.inf, math.inf)
    if len(blocks) < 3:
        return Estimate(value, -math.inf, math.inf)
    residuals = [float(block.sum()) - value * len(block) for block in blocks]
    variance = len(blocks) / (len(blocks) - 1) * sum(r * r for r in residuals) / count**2
    half = _student(len(blocks) - 1) * math.sqrt(variance)
    return Estimate(value, value - half, value + half)


def share(rows: Sequence[NDArray[Any]]) -> Estimate:
    """Estimate a share of positions; Wilson's interval is added for where all are the same."""
    of_blocks, count = mean(rows), sum(map(len, rows))
    p, z = of_blocks.value, _NORMAL**2 / count
    center, half = (p + z / 2) / (1 + z), math.sqrt(z * (p * (1 - p) + z / 4)) / (1 + z)
    low, high = min(of_blocks.low, center - half), max(of_blocks.high, center + half)
    return Estimate(p, max(0.0, low), min(1.0, high))


def _student(freedom: int) -> float:
    """Return the 97.5% point of Student's distribution, by its expansion in 1 / ``freedom``."""
    z, f = _NORMAL, float(freedom)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return float(np.polyval([*reversed(terms), z], 1 / f))
