"""The normal form of an index map, and the operations derived from it.

An :class:`Axis` is a sequence of named parts; a :class:`Part` is a sequence of spans of source
rows. "Row" means a position along whichever axis the map describes: an output feature, an input
feature or a vocabulary entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace


class LayoutError(ValueError):
    """An index map cannot be built or cut; the text says which part and why."""


@dataclass(frozen=True, slots=True)
class Span:
    """``count`` consecutive rows of ``source`` from row ``start``; ``source=None`` is zero rows.

    ``shared`` marks rows that another span owns and that are used again on purpose (tied
    embeddings, replicated KV heads).
    """

    source: str | None
    start: int
    count: int
    shared: bool = False

    def __post_init__(self) -> None:
        if self.count < 0:
            raise LayoutError(f"{self.source or 'columns'}: {self.count} rows are not possible")

    @property
    def stop(self) -> int:
        """The row after the last one."""
        return self.start + self.count

    def cut(self, start: int, stop: int) -> Span:
        """Take rows ``start`` to ``stop`` of this span, counted from its own beginning."""
        first = 0 if self.source is None else self.start + start
        return replace(self, start=first, count=stop - start)


@dataclass(frozen=True, slots=True)
class Part:
    """Rows that are sharded together: one segment of a fused axis."""

    name: str  # q, gate, rows, ...
    spans: tuple[Span, ...]  # in target order
    unit: int = 1  # rows that must stay on one rank (a head, an interleaved pair)
    replicable: bool = False  # whole units may be repeated when there are fewer than ranks
    padded: bool = False  # zero rows are appended until every rank gets the same number

    def __post_init__(self) -> None:
        if self.unit < 1:
            raise LayoutError(f"part '{self.name}': a unit of {self.unit} rows is not possible")

    @property
    def length(self) -> int:
        """Number of rows."""
        return sum(span.count for span in self.spans)


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a target tensor as an index map.

    Attributes:
        parts: the segments, in target order.
        sources: every source the map reads, with the number of rows it must have.
    """

    parts: tuple[Part, ...]
    sources: tuple[tuple[str, int], ...]

    @property
    def length(self) -> int:
        """Number of rows."""
        return sum(part.length for part in self.parts)

    @property
    def spans(self) -> tuple[Span, ...]:
        """All spans in target order, adjacent ones joined."""
        return coalesce(span for part in self.parts for span in part.spans)


def coalesce(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Join spans that follow each other in their source; drop empty ones."""
    joined: list[Span] = []
    for span in spans:
        if span.count == 0:
            continue
        last = joined[-1] if joined else None
        if (
            last is not None
            and (last.source, last.shared) == (span.source, span.shared)
            and (span.source is None or last.stop == span.start)
        ):
            joined[-1] = replace(last, count=last.count + span.count)
        else:
            joined.append(span)
    return tuple(joined)


def take(spans: Iterable[Span], start: int, stop: int) -> tuple[Span, ...]:
    """Take rows ``start`` to ``stop`` of a sequence of spans."""
    taken = []
    position = 0
    for span in spans:
        first, last = max(start - position, 0), min(stop - position, span.count)
        if first < last:
            taken.append(span.cut(first, last))
        position += span.count
    return coalesce(taken)


def change_parts(axis: Axis, change: Callable[[Part], Part]) -> Axis:
    """Return the map with every part changed."""
    return replace(axis, parts=tuple(map(change, axis.parts)))


def aligned(left: Sequence[Span], right: Sequence[Span]) -> Iterator[tuple[Span, Span]]:
    """Cut two maps of the same rows where either is cut."""
    ours, theirs = list(reversed(left)), list(reversed(right))
    while ours and theirs:
        a, b = ours.pop(), theirs.pop()
        count = min(a.count, b.count)
        yield a.cut(0, count), b.cut(0, count)
        if count < a.count:
            ours.append(a.cut(count, a.count))
        if count < b.count:
            theirs.append(b.cut(count, b.count))


def possible_ranks(part: Part, tp_size: int) -> bool:
    """Return whether ``part`` can be cut over ``tp_size`` ranks, or repeated if replicable."""
    if part.padded:
        return True
    units, rest = divmod(part.length, part.unit)
    return rest == 0 and (
        units % tp_size == 0 or (part.replicable and units > 0 and tp_size % units == 0)
    )


def shard(axis: Axis, tp_size: int, rank: int) -> Axis:
    """Take the share of ``axis`` of one rank: every part is cut separately, in whole units."""
    if not 0 <= rank < tp_size:
        raise LayoutError(f"rank {rank} does not exist among {tp_size} ranks")
    parts = tuple(_shard_part(part, tp_size, rank) for part in axis.parts)
    used = {span.source for part in parts for span in part.spans}
    return Axis(parts, tuple(source for source in axis.sources if source[0] in used))


def _shard_part(part: Part, tp_size: int, rank: int) -> Part:
    if part.padded:
        share = -(-part.length // (tp_size * part.unit)) * part.unit
        fill = Span(None, 0, share * tp_size - part.length)
        spans = take((*part.spans, fill), rank * share, (rank + 1) * share)
        return replace(part, spans=spans, padded=False)
    if not possible_ranks(part, tp_size):
        raise LayoutError(
            f"part '{part.name}': {_amount(part)} cannot be divided over {tp_size} ranks"
        )
    units = part.length // part.unit
    if units % tp_size == 0:
        share = part.length // tp_size
        return replace(part, spans=take(part.spans, rank * share, (rank + 1) * share))
    copies = tp_size // units
    start = rank // copies * part.unit
    spans = take(part.spans, start, start + part.unit)
    if rank % copies:
        spans = tuple(replace(span, shared=True) for span in spans)
    return replace(part, spans=spans)


def _amount(part: Part) -> str:
    if part.unit == 1:
        return f"{part.length} rows"
    units, rest = divmod(part.length, part.unit)
    return f"{units} units of {part.unit} rows" + (f" and {rest} rows" if rest else "")


def check_partition(targets: Mapping[str, Axis], sources: Mapping[str, int]) -> list[str]:
    """Return a sentence for each range of source rows not owned by exactly one target row."""
    used: dict[str, list[tuple[int, int, str]]] = {name: [] for name in sources}
    problems = []
    for target, span in ((name, span) for name, axis in targets.items() for span in axis.spans):
        if span.source is None:
            continue
        if span.source not in sources:
            problems.append(f"{target} reads {span.source}, which is not a source")
        elif span.start < 0 or span.stop > sources[span.source]:
            problems.append(
                f"{target} reads rows {span.start} to {span.stop} of {span.source}, "
                f"which has {sources[span.source]}"
            )
        elif not span.shared:
            used[span.source].append((span.start, span.stop, target))
    for source, ranges in used.items():
        end, owner = 0, ""
        for start, stop, target in sorted(ranges):
            if start > end:
                problems.append(f"rows {end} to {start} of {source} are used nowhere")
            elif start < end:
                problems.append(
                    f"rows {start} to {min(stop, end)} of {source} are used twice, "
                    f"by {owner} and {target}"
                )
            if stop > end:
                end, owner = stop, target
        if end < sources[source]:
            problems.append(f"rows {end} to {sources[source]} of {source} are used nowhere")
    return problems
