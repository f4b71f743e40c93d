"""Carrying out a plan: source blocks in, rank files out, hashed on the way.

Every worker takes whole tasks and holds one block of source rows at a time, so memory is bounded
whatever the tensors' sizes; a block is read once and written to every rank that needs it.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Protocol, TypeVar

import numpy as np
import xxhash

from phireg.conversion.cast import NO_LOSS, Bits, Loss, cast, one_thread_each
from phireg.dtypes import BITS, WEIGHT_DTYPES
from phireg.planning.model import (
    BLOCK_BYTES,
    Output,
    Plan,
    Step,
    Task,
    Write,
    carried_code,
    row_bytes,
)
from phireg.source.source import Reader, SourceTensor

_Result = TypeVar("_Result")

WORKERS = 2
"""More do not help: one core can hash and cast while another's copy is in the kernel, and the
blocks are so small that more threads mostly wait for the interpreter."""

Progress = Callable[[int], None]
"""Told how many more output bytes have been written; called from worker threads."""


class Reads(Protocol):
    """Where source bytes come from; see :class:`phireg.source.source.Reader`."""

    def read_into(self, tensor: SourceTensor, start: int, view: memoryview) -> None:
        """Fill a view with bytes of a tensor."""


class Quantizes(Protocol):
    """The quantized part of a run; see :mod:`phireg.conversion.quantizer`."""

    def reader(self, files: Reads) -> Reads:
        """A reader that also knows the plan's scales."""

    def weight(self, target: str, source: str, row: int, block: Bits) -> tuple[Bits, int]:
        """Quantize rows of a weight.

        Args:
            target: the output tensor they are for.
            source: the source tensor they come from.
            row: the first of them in the source tensor.
            block: them, in the checkpoint's dtype, [rows, columns].

        Returns:
            The same rows on the quantized grid and how many of their elements lie beyond its ends.
        """


class Cancelled(Exception):  # noqa: N818 - nothing is wrong
    """Another worker failed; its error is the one to report."""


@dataclass(frozen=True, slots=True)
class Streamed:
    """What a run did.

    Attributes:
        digests: xxh3_128 of the bytes of each output tensor, by rank and name.
        losses: what casting lost, by source tensor; only those that lost something.
    """

    digests: Mapping[tuple[int, str], str]
    losses: Mapping[str, Loss]


def stream(
    plan: Plan,
    directory: Path,
    *,
    workers: int = WORKERS,
    progress: Progress | None = None,
    quantizer: Quantizes | None = None,
) -> Streamed:
    """Write the rank files of ``plan`` into ``directory``.

    Args:
        plan: without errors.
        directory: an existing one, without rank files.
        workers: number of threads.
        progress: told how many more bytes have been written.
        quantizer: needed by a plan with scales.

    Raises:
        SourceError: a source file ended early, changed, or could not be read.
        OSError: writing failed.
    """
    stop = Event()
    results: list[Streamed] = []
    with ExitStack() as stack:
        reader = stack.enter_context(plan.source.open())
        files = []
        for rank, (header, size) in enumerate(zip(plan.headers, plan.file_sizes, strict=True)):
            path = directory / f"rank{rank}.safetensors"
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            stack.callback(os.close, fd)
            os.ftruncate(fd, size)
            _write(fd, memoryview(header), 0)
            files.append(fd)
        busy = plan.casts or quantizer is not None
        stack.enter_context(one_thread_each(workers) if busy else nullcontext())
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        tell = progress or (lambda count: None)
        carrier = _Carrier(plan, reader, files, stop, tell, quantizer)
        try:
            results = collect([pool.submit(carrier.carry, task) for task in plan.tasks])
        except BaseException:
            stop.set()
            raise
    digests: dict[tuple[int, str], str] = {}
    losses: dict[str, Loss] = {}
    for result in results:
        digests.update(result.digests)
        losses.update(result.losses)
    return Streamed(digests, losses)


def read_blocks(
    reader: Reads, source: SourceTensor, row: int, count: int, code: str, stop: Event
) -> Iterator[tuple[int, Bits, Loss]]:
    """Rows of a tensor, a block at a time, cast; a block lives until the next one is asked for.

    Args:
        reader: of the source.
        source: the tensor.
        row: first row.
        count: number of rows.
        code: dtype to cast to.
        stop: set when another worker failed.

    Yields:
        How many rows came before, the block [rows, columns], and what casting it lost.

    Raises:
        Cancelled: ``stop`` was set.
    """
    per_row = row_bytes(source)
    per_block = max(1, BLOCK_BYTES // per_row)
    buffer = np.empty(min(count, per_block) * per_row, np.uint8)
    for done in range(0, count, per_block):
        if stop.is_set():
            raise Cancelled
        rows = min(per_block, count - done)
        raw = buffer[: rows * per_row]
        reader.read_into(source, (row + done) * per_row, raw.data)
        block: Bits = raw.view(BITS[source.dtype])
        loss = NO_LOSS
        if source.dtype != code:
            block, loss = cast(block, source.dtype, code)
        yield done, block.reshape(rows, -1), loss


def collect(running: list[Future[_Result]]) -> list[_Result]:
    """The results of all workers, or the error of the one that stopped the others."""
    wait(running)
    errors = [error for future in running if (error := future.exception()) is not None]
    for error in errors:
        if not isinstance(error, Cancelled):
            raise error
    return [future.result() for future in running]


class _Carrier:
    """One run's open files; its methods are called by all workers."""

    def __init__(
        self,
        plan: Plan,
        reader: Reader,
        files: list[int],
        stop: Event,
        progress: Progress,
        quantizer: Quantizes | None,
    ) -> None:
        self.plan = plan
        self.quantizer = quantizer
        self.reader: Reads = quantizer.reader(reader) if quantizer else reader
        self.code = WEIGHT_DTYPES[plan.options.dtype]
        self.files = files
        self.stop = stop
        self.progress = progress

    def carry(self, task: Task) -> Streamed:
        """Do one task; a failure stops the other workers."""
        try:
            return self._carry(task)
        except BaseException:
            self.stop.set()
            raise

    def _carry(self, task: Task) -> Streamed:
        hashes: dict[int, xxhash.xxh3_128] = {}
        losses: dict[str, Loss] = defaultdict(Loss)
        for step in task.steps:
            for write in step.writes:
                hashes.setdefault(write.output, xxhash.xxh3_128())
            if step.source is None:
                self.fill(step, hashes)
            else:
                loss = self.copy(step, step.source, hashes)
                if loss != NO_LOSS:
                    losses[step.source.name] += loss
        outputs = self.plan.outputs
        digests = {
            (outputs[i].rank, outputs[i].name): hashed.hexdigest() for i, hashed in hashes.items()
        }
        return Streamed(digests, losses)

    def copy(self, step: Step, source: SourceTensor, hashes: Mapping[int, xxhash.xxh3_128]) -> Loss:
        """Read the step's rows block by block and write each block wherever it goes."""
        loss = NO_LOSS
        by_code: dict[str, list[Write]] = defaultdict(list)
        for write in step.writes:
            computed = source.name in self.plan.scales
            output = self.plan.outputs[write.output]
            by_code[source.dtype if computed else carried_code(output, self.code)].append(write)
        for code, writes in by_code.items():
            loss += self.copy_as(code, step, source, writes, hashes)
        return loss

    def copy_as(
        self,
        code: str,
        step: Step,
        source: SourceTensor,
        writes: list[Write],
        hashes: Mapping[int, xxhash.xxh3_128],
    ) -> Loss:
        """The writes of a step whose values are cast to one dtype."""
        loss = NO_LOSS
        for done, block, lost in read_blocks(
            self.reader, source, step.row, step.count, code, self.stop
        ):
            loss += lost
            quantized: dict[str, Bits] = {}
            for write in writes:
                output = self.plan.outputs[write.output]
                rows = block
                if self.quantizer is not None and output.dtype != code:
                    if output.name not in quantized:
                        made, saturated = self.quantizer.weight(
                            output.name, source.name, step.row + done, block
                        )
                        quantized[output.name] = made
                        loss += Loss(saturated=saturated)
                    rows = quantized[output.name]
                self.put(output, write.row + done, _columns(rows, output), hashes[write.output])
        return loss

    def fill(self, step: Step, hashes: Mapping[int, xxhash.xxh3_128]) -> None:
        """Write zero rows."""
        for write in step.writes:
            output = self.plan.outputs[write.output]
            zeros = np.zeros((step.count, output.matrix[1]), BITS[output.dtype])
            self.put(output, write.row, zeros, hashes[write.output])

    def put(self, output: Output, row: int, rows: Bits, hashed: xxhash.xxh3_128) -> None:
        """Write whole rows of an output and add them to its digest."""
        view = rows.reshape(-1).view(np.uint8).data
        per_row = len(view) // len(rows)
        _write(self.files[output.rank], view, output.offset + row * per_row)
        hashed.update(view)
        self.progress(len(view))


def _columns(block: Bits, output: Output) -> Bits:
    """The columns of ``block`` that ``output`` keeps, contiguous."""
    if output.columns is None:
        return block
    if len(output.columns) == 1:
        only = output.columns[0]
        return np.ascontiguousarray(block[:, only.start : only.stop])
    return np.concatenate([block[:, span.start : span.stop] for span in output.columns], axis=1)


def _write(fd: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
