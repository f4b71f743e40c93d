"""Compare the rank files bit for bit with the rows that a conversion of the source would write."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from phireg.checkpoint.rankfiles import RankFiles
from phireg.conversion.cast import Bits, Float32
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
    sink = _Comparison(plan, files, progress)
    carry(plan, sink)
    return [difference for _, difference in sorted(sink.differences.items())]


@dataclass(slots=True)
class _Comparison:
    """The sink that compares rows with those of the rank files."""

    plan: Plan
    files: RankFiles
    progress: Progress
    differences: dict[int, Difference] = field(default_factory=dict)

    def put(self, index: int, row: int, rows: Bits) -> None:
        """Compare consecutive rows of an output."""
        output = self.plan.outputs[index]
        start = row * output.matrix[1]
        stored = self.files[output.rank].read(output.name, start, rows.size).reshape(rows.shape)
        self.progress(stored.nbytes)
        unequal = stored != rows
        if unequal.any():
            values = float32_values(stored, output.dtype), float32_values(rows, output.dtype)
            add_difference(self.differences, index, output, row, unequal, values)


def add_difference(
    differences: dict[int, Difference],
    index: int,
    output: Output,
    row: int,
    unequal: Any,
    values: tuple[Float32, Float32],
) -> None:
    """Add unequal elements among rows of an output; ``values`` are stored and expected."""
    at, column = (int(axis[0]) for axis in np.nonzero(unequal))
    stored, expected = (float(array[at, column]) for array in values)
    first = Difference(output, 0, (row + at, column), stored, expected)
    before = differences.get(index, first)
    elements = before.elements + int(unequal.sum())
    first = min(first, before, key=lambda difference: difference.first)
    differences[index] = dataclasses.replace(first, elements=elements)
