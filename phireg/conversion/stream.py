"""Carrying out a plan: source blocks in, rows of outputs out to a sink.

Every worker takes whole tasks and holds one block of source rows at a time, so memory is bounded
for tensors of any size; a block is read once and goes to every output that needs it. Conversion's
sink writes and hashes, verification's compares.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import xxhash

from phireg.conversion.cast import NO_LOSS, Bits, Loss, cast, count_not_finite, one_thread_each
from phireg.dtypes import BITS, ITEMSIZE
from phireg.planning.model import (
    BLOCK_BYTES,
    Output,
    Plan,
    Rows,
    Scale,
    Step,
    Task,
    Write,
    row_bytes,
)
from phireg.source.model import Reader
from phireg.source.tensors import SourceTensor

if TYPE_CHECKING:
    from phireg.conversion.quantizer import WeightQuantizer

_Result = TypeVar("_Result")

WORKERS, CAST_WORKERS = 2, 4
"""More do not help: one core can hash while another's copy is in the kernel, and the blocks are so
small that more threads mostly wait for the interpreter. A cast takes as much of a core again."""

GPU_WORKERS, GPU_BLOCK_BYTES = 4, 4 * 2**20
"""The same where a GPU quantizes: what it takes to start a copy or a kernel counts, and the
interpreter is needed seldom."""

SYNC_BYTES = 64 * 2**20
"""After so many bytes a file is synced in the background, so that the disk need not wait until
everything is written."""

Progress = Callable[[int], None]
"""Takes the number of further bytes that are done; called from worker threads."""


class Sink(Protocol):
    """A receiver of the rows of all outputs."""

    def put(self, index: int, row: int, rows: Bits) -> None:
        """Take rows [rows, columns] of an output of the plan, the first of them row ``row``.

        The rows of an output come in order, without gaps, all by one worker; they are valid during
        the call only.
        """


def workers_of(plan: Plan) -> int:
    """Return how many workers carry out a plan on this machine's processors."""
    casts = plan.casts and not plan.linears
    return min(CAST_WORKERS, max(WORKERS, os.cpu_count() or 1)) if casts else WORKERS


def share(device: str, workers: int) -> tuple[int, int]:
    """The workers and the bytes of their blocks where ``device`` quantizes; a CPU's are given."""
    return (workers, BLOCK_BYTES) if device == "cpu" else (GPU_WORKERS, GPU_BLOCK_BYTES)


class Cancelled(Exception):  # noqa: N818 - not an error
    """Another worker failed; its error is the one to report."""


def carry(
    plan: Plan, sink: Sink, *, workers: int | None = None, quantizer: WeightQuantizer | None = None
) -> dict[str, Loss]:
    """Read the source once and pass the rows of every output to ``sink``.

    A plan with scales needs a quantizer. Returns the losses of casting and quantizing by source
    tensor, of those that lost something. Raises SourceError if a file changed or ended early.
    """
    stop = Event()
    device = quantizer.device if quantizer else "cpu"
    workers, block_bytes = share(device, workers or workers_of(plan))
    with ExitStack() as stack:
        reader = stack.enter_context(plan.source.open())
        if plan.source.adapter is not None or quantizer is not None:  # they compute with torch
            stack.enter_context(one_thread_each(workers))
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        carrier = _Carrier(plan, reader, sink, stop, quantizer, block_bytes)
        try:
            carrier.scales()
            results = collect([pool.submit(carrier.carry, task) for task in plan.tasks])
        except BaseException:
            stop.set()
            raise
    return {name: loss for losses in results for name, loss in losses.items()}


@dataclass(frozen=True, slots=True)
class Streamed:
    """The result of writing rank files."""

    digests: Mapping[tuple[int, str], str]  # xxh3_128 of each output tensor, by rank and name
    losses: Mapping[str, Loss]


def stream(
    plan: Plan,
    directory: Path,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    quantizer: WeightQuantizer | None = None,
) -> Streamed:
    """Write the tensor files of a plan into a directory that has none; see :func:`carry`."""
    with ExitStack() as stack:
        files = []
        for name, header, size in zip(plan.files, plan.headers, plan.file_sizes, strict=True):
            path = directory / name
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            stack.callback(os.close, fd)
            os.ftruncate(fd, size)
            _write(fd, memoryview(header), 0)
            files.append(fd)
        syncing = ThreadPoolExecutor(1)
        stack.callback(syncing.shutdown, cancel_futures=True)
        writer = _Writer(plan, files, syncing, progress)
        losses = carry(plan, writer, workers=workers, quantizer=quantizer)
        collect(writer.syncs)  # the system reports an error once, and here
    digests = {
        (output.rank, output.name): digest.hexdigest()
        for output, digest in zip(plan.outputs, writer.hashes, strict=True)
    }
    return Streamed(digests, losses)


class _Writer:
    """The sink that writes rank files and hashes every tensor."""

    def __init__(
        self, plan: Plan, files: list[int], syncing: Executor, progress: Progress | None
    ) -> None:
        self.outputs = plan.outputs
        self.files = files
        self.progress = progress
        self.hashes = [xxhash.xxh3_128() for _ in plan.outputs]
        self.syncs: list[Future[None]] = []
        # The kernel lets one write to a file at a time, and the others spin.
        self._writing = [Lock() for _ in files]
        self._syncing = syncing
        self._unsynced = [0] * len(files)

    def put(self, index: int, row: int, rows: Bits) -> None:
        """Write whole rows of an output and add them to its digest."""
        output = self.outputs[index]
        view = rows.reshape(-1).view(np.uint8).data
        per_row = len(view) // len(rows)
        with self._writing[output.rank]:
            _write(self.files[output.rank], view, output.offset + row * per_row)
        self.hashes[index].update(view)
        self._unsynced[output.rank] += len(view)
        if self._unsynced[output.rank] >= SYNC_BYTES:
            self._unsynced[output.rank] = 0
            self.syncs.append(self._syncing.submit(os.fsync, self.files[output.rank]))
        if self.progress is not None:
            self.progress(len(view))


def read_blocks(
    reader: Reader,
    source: SourceTensor,
    row: int,
    count: int,
    code: str,
    stop: Event,
    *,
    block_bytes: int | None = None,
) -> Iterator[tuple[int, Bits, Loss]]:
    """Read ``count`` rows of a tensor from ``row`` on and cast them to ``code``, block by block.

    Yields the number of rows before the block, the block [rows, columns], valid until the next one
    is read, and the losses of the cast. Raises Cancelled once ``stop`` is set.
    """
    per_row = row_bytes(source)
    per_block = max(1, (block_bytes or BLOCK_BYTES) // per_row)
    per_block += per_block % 2  # pairs of rows may be stored together
    buffer = np.empty(min(count, per_block) * per_row, np.uint8)
    casts = source.dtype != code
    rounded: Bits = np.empty(casts * len(buffer) // ITEMSIZE[source.dtype], BITS[code])
    for done in range(0, count, per_block):
        if stop.is_set():
            raise Cancelled
        rows = min(per_block, count - done)
        raw = buffer[: rows * per_row]
        reader.read_into(source, (row + done) * per_row, raw.data)
        block: Bits = raw.view(BITS[source.dtype])
        if casts:
            block, loss = cast(block, source.dtype, code, rounded[: block.size])
        else:
            loss = count_not_finite(block, source.dtype)
        yield done, block.reshape(rows, -1), loss


def assemble(plan: Plan, output: Output, reader: Reader) -> Bits:
    """A whole output made of source rows, unquantized, in memory: [rows, columns]."""
    assert isinstance(output.origin, Rows)
    result: Bits = np.zeros(output.matrix, BITS[output.dtype])
    position = 0
    for span in output.origin.spans:
        if span.source is not None:
            source = plan.source.tensors[span.source]
            for done, block, _ in read_blocks(
                reader, source, span.start, span.count, output.dtype, Event()
            ):
                rows = slice(position + done, position + done + len(block))
                result[rows] = kept_columns(block, output.origin)
        position += span.count
    return result


def kept_columns(block: Bits, origin: Rows | Scale, packed: int = 1) -> Bits:
    """The columns of ``block`` that an output keeps, contiguous; ``packed`` are in an element."""
    if origin.columns is None:
        return block
    kept = [block[:, s.start // packed : s.stop // packed] for s in origin.columns]
    return np.ascontiguousarray(kept[0]) if len(kept) == 1 else np.concatenate(kept, axis=1)


def collect(running: list[Future[_Result]]) -> list[_Result]:
    """The results of all workers, or the error of the one that stopped the others."""
    wait(running)
    errors = [error for future in running if (error := future.exception()) is not None]
    for error in errors:
        if not isinstance(error, Cancelled):
            raise error
    return [future.result() for future in running]


@dataclass(frozen=True, eq=False)
class _Carrier:
    """One run; its methods are called by all workers."""

    plan: Plan
    reader: Reader
    sink: Sink
    stop: Event
    quantizer: WeightQuantizer | None
    block_bytes: int

    def scales(self) -> None:
        for index, output in enumerate(self.plan.outputs):
            if isinstance(output.origin, Scale):
                assert self.quantizer is not None
                parts = [
                    self.quantizer.scale(span.source)[span.start : span.stop]
                    for span in output.origin.spans
                    if span.source is not None
                ]
                values = np.concatenate(parts).reshape(-1, output.origin.groups)
                self.sink.put(index, 0, kept_columns(values, output.origin).reshape(-1, 1))

    def carry(self, task: Task) -> dict[str, Loss]:
        """Do one task; a failure stops the other workers."""
        losses: dict[str, Loss] = defaultdict(Loss)
        try:
            for step in task.steps:
                if step.source is None:
                    self.fill(step)
                elif (loss := self.copy(step, step.source)) != NO_LOSS:
                    losses[step.source.name] += loss
        except BaseException:
            self.stop.set()
            raise
        return losses

    def copy(self, step: Step, source: SourceTensor) -> Loss:
        """Read the step's rows, once for each dtype that outputs hold them in."""
        by_code: dict[str, list[Write]] = defaultdict(list)
        for write in step.writes:
            by_code[self.plan.carried_code(self.plan.outputs[write.output])].append(write)
        first, *others = [
            self.copy_as(code, step, source, writes) for code, writes in by_code.items()
        ]
        # What is no finite number in the source counts once.
        return sum((replace(loss, nan=0, infinite=0) for loss in others), first)

    def copy_as(self, code: str, step: Step, source: SourceTensor, writes: list[Write]) -> Loss:
        """Read the step's rows block by block and pass each block to all of ``writes``."""
        loss, stop = NO_LOSS, self.stop
        blocks = read_blocks(
            self.reader,
            source,
            step.row,
            step.count,
            code,
            stop,
            block_bytes=self.block_bytes * self.plan.blocks(step),
        )
        for done, block, lost in blocks:
            loss += lost
            quantized: dict[str, Bits] = {}
            for write in writes:
                output = self.plan.outputs[write.output]
                rows = block
                if self.quantizer is not None and output.dtype != code:
                    if output.name not in quantized:
                        quantized[output.name], saturated = self.quantizer.weight(
                            output.name, source.name, step.row + done, block
                        )
                        loss += Loss(saturated=saturated)
                    rows = quantized[output.name]
                elif output.factor is not None:
                    assert self.quantizer is not None
                    rows = self.quantizer.folded(output.factor, write.row + done, block)
                assert isinstance(output.origin, Rows)
                row = (write.row + done) // output.packing[0]
                kept = kept_columns(rows, output.origin, output.packing[1])
                self.sink.put(write.output, row, kept)
        return loss

    def fill(self, step: Step) -> None:
        for write in step.writes:
            output = self.plan.outputs[write.output]
            zeros = np.zeros((step.count, output.matrix[1]), BITS[output.dtype])
            self.sink.put(write.output, write.row, zeros)


def _write(fd: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
