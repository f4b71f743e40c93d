"""The order of the work: each source row is read once, each output is filled front to back.

Outputs are streams of source rows. A row range that several streams want (tensor-parallel ranks of
a row-parallel weight, replicated norms, a tied head) is read when all of them have come to it.
Filling outputs front to back is what lets them be hashed while they are written.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from phireg.layout.spans import Span
from phireg.planning.model import Output, Step, Task, Write
from phireg.source.source import SourceTensor


@dataclass(frozen=True, slots=True)
class _Atom:
    """A row range that no stream cuts any further."""

    source: str | None
    start: int
    count: int


def schedule(outputs: Sequence[Output], tensors: Mapping[str, SourceTensor]) -> tuple[Task, ...]:
    """Tasks that fill ``outputs``, ordered by where their first source bytes lie."""
    tasks = [Task(tuple(_merge(group, outputs, tensors))) for group in _connected(outputs) if group]

    def place(task: Task) -> tuple[str, int]:
        first = next((step.source for step in task.steps if step.source is not None), None)
        return (first.file, first.offset) if first else ("", 0)

    return tuple(sorted(tasks, key=place))


def _connected(outputs: Sequence[Output]) -> Iterable[list[int]]:
    """Indices of outputs that read a common source, directly or through others."""
    group_of: dict[str, list[int]] = {}
    groups: list[list[int]] = []
    for index, output in enumerate(outputs):
        sources = {span.source for span in output.rows if span.source is not None}
        joined = [index]
        for other in {id(group_of[s]): group_of[s] for s in sources if s in group_of}.values():
            joined = other + joined
            groups.remove(other)
        groups.append(joined)
        for member in joined:
            group_of.update((s.source, joined) for s in outputs[member].rows if s.source)
    return groups


def _merge(
    group: Sequence[int], outputs: Sequence[Output], tensors: Mapping[str, SourceTensor]
) -> Iterable[Step]:
    streams = _atoms([outputs[index].rows for index in group])
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
                    wanted = [i for i in readers[atom] if waiting[i][atom] > 0]
                    if not all(at(i, atom) for i in wanted):
                        break
                    yield emit(atom, wanted)
                emitted = True
        if not emitted:
            # Two streams want two ranges in opposite orders: one is read again for the other.
            index = unfinished[0]
            yield emit(streams[index][heads[index]], [index])


def _atoms(rows: Sequence[tuple[Span, ...]]) -> list[list[_Atom]]:
    cuts: dict[str, set[int]] = defaultdict(set)
    for spans in rows:
        for span in spans:
            if span.source is not None:
                cuts[span.source] |= {span.start, span.stop}
    ordered = {source: sorted(found) for source, found in cuts.items()}

    def cut(span: Span) -> Iterable[_Atom]:
        if span.source is None:
            return [_Atom(None, 0, span.count)]
        marks = ordered[span.source]
        inside = marks[bisect_left(marks, span.start) : bisect_right(marks, span.stop)]
        return [_Atom(span.source, a, b - a) for a, b in pairwise(inside)]

    return [[atom for span in spans for atom in cut(span)] for spans in rows]
