"""Compare the rank files bit for bit with the rows that a conversion of the source would write."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from phireg.checkpoint.rankfiles import RankFiles
from phireg.conversion.cast import Bits
from phireg.conversion.stream import carry
from phireg.dtypes import float32_values
from phireg.planning.model import Output, Plan
from phireg.planning.schedule import restrict

Progress = Callable[[int], None]
"""Takes the number of further checkpoint bytes compared; called from worker threads."""


@dataclass(frozen=True, slots=True)
class Difference:
    """An output that is not the source's."""

    output: Output
    elements: int  # that differ
    first: tuple[int, int]  # row and column
    stored: float  # value of the first; of a quantized weight, on the grid
    expected: float  # the same from the source


def is_comparable(files: RankFiles, output: Output) -> bool:
    """Return True if the files have a tensor of the output's dtype and shape."""
    return files.kind(output.rank, output.name) == (output.dtype, output.shape)


def compare(plan: Plan, files: RankFiles, progress: Progress) -> list[Difference]:
    """Compare all comparable outputs of a plan that quantizes nothing."""
    plan = restrict(plan, lambda output: is_comparable(files, output))
    sink = RowComparison(plan, files, progress)
    carry(plan, sink)
    return [difference for _, difference in sorted(sink.differences.items())]


class RowComparison:
    """The sink that compares rows with those of the rank files, here bit for bit."""

    def __init__(self, plan: Plan, files: RankFiles, progress: Progress) -> None:
        self.plan = plan
        self.files = files
        self.progress = progress
        self.differences: dict[int, Difference] = {}  # by number of the output

    def put(self, index: int, row: int, rows: Bits) -> None:
        """Compare consecutive rows of an output."""
        output = self.plan.outputs[index]
        start = row * output.matrix[1]
        stored = self.files[output.rank].read(output.name, start, rows.size).reshape(rows.shape)
        self.progress(stored.nbytes)
        unequal, *values = self.judged(index, row, stored, rows)
        if not unequal.any():
            return
        at, column = (int(axis[0]) for axis in np.nonzero(unequal))
        ours, expected = (float(array[at, column]) for array in values)
        first = Difference(output, 0, (row + at, column), ours, expected)
        before = self.differences.get(index, first)
        elements = before.elements + int(unequal.sum())
        first = min(first, before, key=lambda difference: difference.first)
        self.differences[index] = dataclasses.replace(first, elements=elements)

    def judged(self, index: int, row: int, stored: Bits, rows: Bits) -> tuple[Any, ...]:
        """Return which elements differ and, if any does, the values stored and expected."""
        unequal, code = stored != rows, self.plan.outputs[index].dtype
        if not unequal.any():
            return (unequal,)
        return unequal, float32_values(stored, code), float32_values(rows, code)
