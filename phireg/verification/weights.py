"""Every byte of the rank files against the source rows that the plan names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from phireg.checkpoint.rankfiles import RankFiles
from phireg.conversion.cast import Bits, cast, one_thread_each
from phireg.dtypes import BITS
from phireg.planning.model import BLOCK_BYTES, Output, Plan, Step, Task, Write, row_bytes
from phireg.source.source import Reader, SourceTensor
from phireg.verification.expected import kept_columns

_WORKERS = 2

Progress = Callable[[int], None]
"""Told how many more checkpoint bytes have been compared; called from worker threads."""


@dataclass(frozen=True, slots=True)
class Difference:
    """An output whose bytes are not the source's.

    Attributes:
        output: which one.
        elements: how many elements differ.
        rows: in how many rows.
        first: row and column of the first one.
    """

    output: Output
    elements: int
    rows: int
    first: tuple[int, int]


def comparable(plan: Plan, files: RankFiles) -> list[bool]:
    """For every output of the plan, whether a tensor of its dtype and shape is there."""
    return [files.kind(o.rank, o.name) == (o.dtype, o.shape) for o in plan.outputs]


def compare(plan: Plan, files: RankFiles, progress: Progress | None = None) -> list[Difference]:
    """Compare all comparable outputs; memory is bounded by a few blocks.

    Each source row is read once for all ranks, in the order in which a conversion reads it.

    Raises:
        SourceError: a file could not be read.
    """
    there = comparable(plan, files)
    tell = progress or (lambda count: None)
    with (
        plan.source.open() as reader,
        one_thread_each(_WORKERS) if plan.casts else nullcontext(),
        ThreadPoolExecutor(_WORKERS) as pool,
    ):
        found = pool.map(lambda task: _compare(plan, files, reader, task, there, tell), plan.tasks)
        differences = [difference for per_task in found for difference in per_task]
    order = {(o.rank, o.name): n for n, o in enumerate(plan.outputs)}
    return sorted(differences, key=lambda d: order[d.output.rank, d.output.name])


def _compare(
    plan: Plan, files: RankFiles, reader: Reader, task: Task, there: list[bool], tell: Progress
) -> list[Difference]:
    wrong: dict[int, Difference] = {}
    for step in task.steps:
        by_dtype: dict[str, list[Write]] = {}
        for write in step.writes:
            if there[write.output]:
                by_dtype.setdefault(plan.outputs[write.output].dtype, []).append(write)
        for dtype, writes in by_dtype.items():
            for done, block in _blocks(step, reader, dtype):
                for write in writes:
                    output = plan.outputs[write.output]
                    columns = output.matrix[1]
                    wanted = (
                        np.zeros((len(block), columns), BITS[dtype])
                        if step.source is None
                        else kept_columns(block, output)
                    )
                    row = write.row + done
                    got = files[output.rank].read(output.name, row * columns, wanted.size)
                    tell(got.nbytes)
                    _note(wrong, write.output, output, row, wanted, got.reshape(wanted.shape))
    return list(wrong.values())


def _blocks(step: Step, reader: Reader, dtype: str) -> Iterator[tuple[int, Bits]]:
    """Rows of the step in bounded blocks, cast; of padding, rows without columns."""
    source: SourceTensor | None = step.source
    per_row = row_bytes(source) if source else 1
    most = max(1, BLOCK_BYTES // per_row)
    for done in range(0, step.count, most):
        rows = min(most, step.count - done)
        if source is None:
            yield done, np.empty((rows, 0), BITS[dtype])
            continue
        raw = np.empty(rows * per_row, np.uint8)
        reader.read_into(source, (step.row + done) * per_row, raw.data)
        block: Bits = raw.view(BITS[source.dtype])
        if source.dtype != dtype:
            block = cast(block, source.dtype, dtype)[0]
        yield done, block.reshape(rows, -1)


def _note(
    wrong: dict[int, Difference], index: int, output: Output, row: int, wanted: Bits, got: Bits
) -> None:
    if np.array_equal(wanted, got):
        return
    unequal = wanted != got
    rows = unequal.any(axis=1)
    at = int(rows.argmax())
    first = (row + at, int(unequal[at].argmax()))
    before = wrong.get(index)
    if before is not None:
        first = min(first, before.first)
    wrong[index] = Difference(
        output,
        int(unequal.sum()) + (before.elements if before else 0),
        int(rows.sum()) + (before.rows if before else 0),
        first,
    )
