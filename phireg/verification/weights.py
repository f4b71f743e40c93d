"""Every byte of the rank files against the source rows that the plan names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from phireg.checkpoint.rankfiles import RankFiles
from phireg.conversion.cast import Bits
from phireg.conversion.stream import carry
from phireg.planning.model import Output, Plan
from phireg.planning.schedule import restrict

Progress = Callable[[int], None]
"""Takes the number of further checkpoint bytes compared; called from worker threads."""


@dataclass(frozen=True, slots=True)
class Difference:
    """An output whose bytes are not the source's.

    Attributes:
        output: the output.
        elements: number of elements that differ.
        rows: number of rows with such elements.
        first: row and column of the first one.
    """

    output: Output
    elements: int
    rows: int
    first: tuple[int, int]


def comparable(files: RankFiles, output: Output) -> bool:
    """True if the files have a tensor of the output's dtype and shape."""
    return files.kind(output.rank, output.name) == (output.dtype, output.shape)


def compare(plan: Plan, files: RankFiles, progress: Progress | None = None) -> list[Difference]:
    """Compare all comparable outputs with the stream of source rows that a conversion would write.

    Raises:
        SourceError: a file could not be read.
    """
    sink = _Comparison(restrict(plan, lambda output: comparable(files, output)), files, progress)
    carry(sink.plan, sink)
    return [difference for _, difference in sorted(sink.differences.items())]


class _Comparison:
    """The sink that compares rows with those of the rank files."""

    def __init__(self, plan: Plan, files: RankFiles, progress: Progress | None) -> None:
        self.plan = plan
        self.files = files
        self.progress = progress or (lambda count: None)
        self.differences: dict[int, Difference] = {}

    def put(self, index: int, row: int, rows: Bits) -> None:
        """Compare consecutive rows of an output."""
        output = self.plan.outputs[index]
        start = row * output.matrix[1]
        stored = self.files[output.rank].read(output.name, start, rows.size).reshape(rows.shape)
        self.progress(stored.nbytes)
        add_difference(self.differences, index, output, row, stored != rows)


def add_difference(
    differences: dict[int, Difference], index: int, output: Output, row: int, unequal: Any
) -> None:
    """Note unequal elements among rows of an output.

    Args:
        differences: by index of the output.
        index: of the output.
        output: the output.
        row: the first of the rows.
        unequal: booleans, [rows, columns].
    """
    rows = unequal.any(axis=1)
    if not rows.any():
        return
    at = int(rows.argmax())
    first = (row + at, int(unequal[at].argmax()))
    before = differences.get(index, Difference(output, 0, 0, first))
    differences[index] = dataclasses.replace(
        before,
        elements=before.elements + int(unequal.sum()),
        rows=before.rows + int(rows.sum()),
        first=min(first, before.first),
    )
