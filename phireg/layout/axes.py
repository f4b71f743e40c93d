"""Constructors of index maps for plugins. Every one returns a new :class:`Axis`.

Sizes are stated, never guessed: they come from the config, and the plan checks them against the
headers of the source files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from phireg.layout.spans import Axis, LayoutError, Part, Span, change_parts, take


def src(name: str, rows: int, *, unit: int = 1) -> Axis:
    """Take the source module ``name`` as it is: ``rows`` rows, ``unit`` of them inseparable."""
    return Axis((Part("rows", (Span(name, 0, rows),), unit),), ((name, rows),))


def fuse(*, unit: int = 1, **axes: Axis) -> Axis:
    """Concatenate ``axes`` as parts named by their keywords (q, k, v into one qkv).

    Raises:
        LayoutError: two axes state different lengths of one source.
    """
    parts = tuple(Part(name, axis.spans, _unit(unit, axis)) for name, axis in axes.items())
    return Axis(parts, _sources(*axes.values()))


def parts(axis: Axis, *, unit: int = 1, **lengths: int) -> Axis:
    """Name the segments of an already fused axis, in source order.

    Raises:
        LayoutError: the lengths do not add up to the axis, or one is negative.
    """
    _check_counts(axis, lengths)
    if sum(lengths.values()) != axis.length:
        raise LayoutError(
            f"{_names(axis)}: parts {lengths} add up to {sum(lengths.values())}, "
            f"not to {axis.length} rows"
        )
    return _segments(axis, 1, lengths, _unit(unit, axis))


def order(axis: Axis, *names: str) -> Axis:
    """Put the parts of ``axis`` in another order; every part must be named once.

    Raises:
        LayoutError: the names are not exactly the parts.
    """
    known = {part.name: part for part in axis.parts}
    if sorted(names) != sorted(known):
        raise LayoutError(f"{_names(axis)} has parts {sorted(known)}, order names {list(names)}")
    return replace(axis, parts=tuple(known[name] for name in names))


def select(axis: Axis, name: str) -> Axis:
    """Take one named part of ``axis`` alone.

    Raises:
        LayoutError: there is no such part.
    """
    for part in axis.parts:
        if part.name == name:
            return replace(axis, parts=(part,))
    raise LayoutError(f"{_names(axis)} has no part '{name}'")


def ungroup(axis: Axis, *, groups: int, unit: int, **heads: int) -> Axis:
    """De-interleave rows stored group by group into one part per kind.

    The source holds ``groups`` groups; each has, in the order of the keywords, ``heads[kind]``
    units of ``unit`` rows. Phi-3-small's query_key_value is
    ``ungroup(x, groups=num_key_value_heads, unit=head_size, q=H // K, k=1, v=1)``.

    Raises:
        LayoutError: the sizes do not add up to the axis, or one is negative.
    """
    _check_counts(axis, heads)
    group = sum(heads.values()) * unit
    if groups * group != axis.length:
        raise LayoutError(
            f"{_names(axis)}: {groups} groups of {group} rows are {groups * group}, "
            f"not {axis.length} rows"
        )
    return _segments(axis, groups, {name: count * unit for name, count in heads.items()}, unit)


def tied(axis: Axis) -> Axis:
    """Use rows that another target owns (lm_head of a model with tied embeddings)."""
    return change_parts(
        axis,
        lambda part: replace(part, spans=tuple(replace(span, shared=True) for span in part.spans)),
    )


def pad(axis: Axis) -> Axis:
    """Append zero rows, at sharding, until every rank holds the same number (vocabularies)."""
    return change_parts(axis, lambda part: replace(part, padded=True))


def replicable(axis: Axis, *names: str) -> Axis:
    """Allow whole units of the named parts to be repeated when there are more ranks than units.

    TensorRT-LLM's attention holds at least one KV head per rank, so with fewer KV heads than ranks
    the same head stands on several of them.
    """
    missing = set(names) - {part.name for part in axis.parts}
    if missing:
        raise LayoutError(f"{_names(axis)} has no part {sorted(missing)}")
    return change_parts(
        axis, lambda part: replace(part, replicable=part.replicable or part.name in names)
    )


def stack(axes: Sequence[Axis]) -> Axis:
    """Concatenate ``axes`` that all have the same parts.

    Raises:
        LayoutError: there are no axes, or two differ in the names, lengths or units of their parts.
    """
    if not axes:
        raise LayoutError("stack() needs at least one axis")
    for axis in axes[1:]:
        if _form(axis) != _form(axes[0]):
            raise LayoutError(
                f"{_names(axis)} and {_names(axes[0])} cannot be stacked: they have "
                f"parts {_form(axis)} and {_form(axes[0])}"
            )
    return Axis(tuple(part for axis in axes for part in axis.parts), _sources(*axes))


def columns(count: int, *, unit: int = 1) -> Axis:
    """Take the input features of a linear in order: ``count``, ``unit`` of them inseparable."""
    return src(OWN_COLUMNS, count, unit=unit)


OWN_COLUMNS = ""
"""The source name of a column axis: the columns of whichever tensor the rows come from."""


def _segments(axis: Axis, groups: int, lengths: Mapping[str, int], unit: int) -> Axis:
    """Return an axis whose parts are the segments of so many groups of such ``lengths``."""
    named, first, group = [], 0, sum(lengths.values())
    for name, length in lengths.items():
        starts = (index * group + first for index in range(groups))
        spans = (span for start in starts for span in take(axis.spans, start, start + length))
        named.append(Part(name, tuple(spans), unit))
        first += length
    return replace(axis, parts=tuple(named))


def _sources(*axes: Axis) -> tuple[tuple[str, int], ...]:
    merged: dict[str, int] = {}
    for axis in axes:
        for name, rows in axis.sources:
            if merged.setdefault(name, rows) != rows:
                raise LayoutError(f"{name} cannot have both {merged[name]} and {rows} rows")
    return tuple(merged.items())


def _form(axis: Axis) -> list[tuple[str, int, int]]:
    return [(part.name, part.length, part.unit) for part in axis.parts]


def _unit(unit: int, axis: Axis) -> int:
    """The unit combined with those of the axis."""
    return math.lcm(unit, *(part.unit for part in axis.parts))


def _check_counts(axis: Axis, amounts: Mapping[str, int]) -> None:
    if negative := [name for name, amount in amounts.items() if amount < 0]:
        raise LayoutError(f"{_names(axis)}: {', '.join(negative)} would be negative: {amounts}")


def _names(axis: Axis) -> str:
    return ", ".join(name or "columns" for name, _ in axis.sources)
