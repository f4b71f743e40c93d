"""The orders in which the rank files of a checkpoint may hold the rows of a linear.

A row has the number it has in the source's order, so an order is, for each rank, an array of such
numbers. The rules of a family (``QuantRules.postprocess``) say what the right order is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from phireg.layout.rules import Policy, Rule
from phireg.layout.spans import Axis, LayoutError, Part, Span, shard, take

Numbers = npt.NDArray[np.int64]
Ranked = tuple[Numbers, ...]
"""For each rank, the numbers of the rows it holds, in order."""

RIGHT = "right"
BLOCK = "block"
PARTS = "parts"
TWICE = "twice"

TEXTS: Mapping[str, str] = {
    RIGHT: "the order that TensorRT-LLM's reader wants",
    BLOCK: "the source's order",
    PARTS: "the source's order, cut over the ranks as if it were the right one",
    TWICE: "an order that comes of putting the right one right again",
}
"""What the orders are. At TP 1 the second and the third are the same and called :data:`BLOCK`."""

MENDABLE = (BLOCK, PARTS)


@dataclass(frozen=True, slots=True)
class Orders:
    """The orders one linear's rows may be in.

    Attributes:
        target: the linear.
        whole: the right order of the whole linear.
        columns: number of its input features.
        by_name: the orders that are possible for this number of ranks and differ, by name.
    """

    target: str
    whole: Numbers
    columns: int
    by_name: Mapping[str, Ranked]


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive rows of one rank file that go to another (or the same) together."""

    rank: int
    row: int
    count: int


def orders_of(rule: Rule, ranks: int) -> Orders:
    """What the rows of a rule's target may look like over ``ranks`` files.

    Raises:
        LayoutError: the rule is not one from a checkpoint to a checkpoint, or the right order
            cannot be divided over the ranks.
    """
    axis = rule.weight[0]
    if rule.policy is not Policy.COLUMN or [name for name, _ in axis.sources] != [rule.target]:
        raise LayoutError(f"{rule.target}: the rule must order this linear's own rows, by column")
    rows = axis.sources[0][1]
    if sorted(_numbers(axis.spans)) != list(range(rows)) or rule.cols is None:
        raise LayoutError(f"{rule.target}: the rule must use each of its {rows} rows once")
    plain = (Span(rule.target, 0, rows),)
    again = tuple(piece for s in axis.spans for piece in take(axis.spans, s.start, s.stop))
    whole = Axis((Part("rows", plain),), axis.sources)
    candidates = {
        RIGHT: axis,
        BLOCK: whole,
        PARTS: _named_like(axis, plain),
        TWICE: _named_like(axis, again),
    }
    found: dict[str, Ranked] = {}
    for name, candidate in candidates.items():
        try:
            made = tuple(_numbers(shard(candidate, ranks, rank).spans) for rank in range(ranks))
        except LayoutError:
            if name == RIGHT:
                raise
            continue
        fitting = RIGHT not in found or _alike(made, found[RIGHT])
        if fitting and not any(_same(made, other) for other in found.values()):
            found[name] = made
    return Orders(rule.target, _numbers(axis.spans), rule.cols.length, found)


def runs(held: Ranked, wanted: Ranked) -> list[list[Run]]:
    """For each rank, where the rows it is to hold lie now; its own file first.

    Raises:
        LayoutError: a row is nowhere.
    """
    made = []
    for rank, numbers in enumerate(wanted):
        where: dict[int, tuple[int, int]] = {}
        for other in sorted(range(len(held)), key=lambda r: r != rank):
            for row, number in enumerate(held[other].tolist()):
                where.setdefault(number, (other, row))
        own: list[Run] = []
        for number in numbers.tolist():
            if number not in where:
                raise LayoutError(f"row {number} is in no rank file")
            other, row = where[number]
            last = own[-1] if own else None
            if last and last.rank == other and last.row + last.count == row:
                own[-1] = replace(last, count=last.count + 1)
            else:
                own.append(Run(other, row, 1))
        made.append(own)
    return made


def _named_like(axis: Axis, spans: tuple[Span, ...]) -> Axis:
    """Other rows, cut as those of ``axis`` are."""
    parts, start = [], 0
    for part in axis.parts:
        parts.append(replace(part, spans=take(spans, start, start + part.length)))
        start += part.length
    return Axis(tuple(parts), axis.sources)


def _numbers(spans: Iterable[Span]) -> Numbers:
    made = [np.arange(span.start, span.stop, dtype=np.int64) for span in spans]
    return np.concatenate(made) if made else np.empty(0, np.int64)


def _alike(left: Ranked, right: Ranked) -> bool:
    """Whether each rank has as many rows: those of KV heads that are repeated may be more."""
    return all(len(a) == len(b) for a, b in zip(left, right, strict=True))


def _same(left: Ranked, right: Ranked) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))
