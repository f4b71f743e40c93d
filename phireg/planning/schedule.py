"""The order of the work: read each source row once, fill each output front to back.

Outputs are streams of source rows. A row range that several streams need (tensor-parallel ranks of
a row-parallel weight, replicated norms, a tied head) is read when all of them have come to it.
Filling outputs front to back is what lets them be hashed while they are written.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from phireg.layout.spans import Span
from phireg.planning.model import Output, Plan, Rows, Step, Task, Write
from phireg.source.tensors import SourceTensor


@dataclass(frozen=True, slots=True)
class _Atom:
    """A row range that no stream cuts."""

    source: str | None
    start: int
    count: int


def schedule(outputs: Sequence[Output], tensors: Mapping[str, SourceTensor]) -> tuple[Task, ...]:
    """Tasks that fill the outputs made of source rows, ordered by their first source bytes."""
    streams = {n: o.origin.spans for n, o in enumerate(outputs) if isinstance(o.origin, Rows)}
    tasks = [Task(tuple(_merge(group, streams, tensors))) for group in _connected(streams)]

    def place(task: Task) -> tuple[str, int]:
        first = next((step.source for step in task.steps if step.source is not None), None)
        return (first.file, first.offset) if first else ("", 0)

    return tuple(sorted(tasks, key=place))


def restrict(plan: Plan, keep: Callable[[Output], bool]) -> Plan:
    """The part of a plan that makes some of its outputs, at their places in the files."""
    outputs = tuple(filter(keep, plan.outputs))
    return dataclasses.replace(plan, outputs=outputs, tasks=schedule(outputs, plan.source.tensors))


def _connected(streams: Mapping[int, tuple[Span, ...]]) -> Iterable[list[int]]:
    """Indices of outputs that read a common source, directly or through others."""
    group_of: dict[str, list[int]] = {}
    groups: list[list[int]] = []
    for index, spans in streams.items():
        sources = {span.source for span in spans if span.source is not None}
        joined = [index]
        for other in {id(group_of[s]): group_of[s] for s in sources if s in group_of}.values():
            joined = other + joined
            groups.remove(other)
        groups.append(joined)
        for member in joined:
            group_of.update((s.source, joined) for s in streams[member] if s.source)
    return groups


def _merge(
    group: Sequence[int], spans: Mapping[int, tuple[Span, ...]], tensors: Mapping[str, SourceTensor]
) -> Iterable[Step]:
    streams = _atoms([spans[index] for index in group])
    heads = [0] * len(streams)
    rows = [0] * len(streams)
    waiting = [Counter(atom for atom in stream if atom.source is not None) for stream in streams]
    readers: dict[_Atom, list[int]] = defaultdict(list)
    for index, counts in enumerate(waiting):
        for atom in counts:
            readers[atom].append(index)

    def at(stream: int, atom: _Atom) -> bool:
        return heads[stream] < len(streams[stream]) and streams[stream][heads[stream]] == atom

    def emit(atom: _Atom, takers: Sequence[int]) -> Step:
        writes = tuple(Write(group[index], rows[index]) for index in takers)
        for index in takers:
            heads[index] += 1
            rows[index] += atom.count
            waiting[index][atom] -= 1
        source = None if atom.source is None else tensors[atom.source]
        return Step(source, atom.start, atom.count, writes)

    while unfinished := [i for i in range(len(streams)) if heads[i] < len(streams[i])]:
        emitted = False
        for index in unfinished:
            while heads[index] < len(streams[index]):
                atom = streams[index][heads[index]]
                if atom.source is None:
                    yield emit(atom, [index])
                else:
                    takers = [i for i in readers[atom] if waiting[i][atom] > 0]
                    if not all(at(i, atom) for i in takers):
                        break
                    yield emit(atom, takers)
                emitted = True
        if not emitted:
            # Two streams need two ranges in opposite orders: one is read again for the other.
            index = unfinished[0]
            yield emit(streams[index][heads[index]], [index])


def _atoms(rows: Sequence[tuple[Span, ...]]) -> list[list[_Atom]]:
    cuts: dict[str, set[int]] = defaultdict(set)
    for spans in rows:
        for span in spans:
            if span.source is not None:
                cuts[span.source] |= {span.start, span.stop}
    ordered = {source: sorted(marks) for source, marks in cuts.items()}

    def cut(span: Span) -> Iterable[_Atom]:
        if span.source is None:
            return [_Atom(None, 0, span.count)]
        marks = ordered[span.source]
        inside = marks[bisect_left(marks, span.start) : bisect_right(marks, span.stop)]
        return [_Atom(span.source, a, b - a) for a, b in pairwise(inside)]

    return [[atom for span in spans for atom in cut(span)] for spans in rows]
