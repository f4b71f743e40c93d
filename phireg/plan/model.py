"""What a plan consists of: outputs, and the steps that fill them. Immutable data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phireg.checkpoint.source import Source, SourceTensor
from phireg.findings import Finding, Severity
from phireg.layout.spans import Span

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
"""Checkpoint dtypes by TensorRT-LLM's names, with their safetensors codes."""

BLOCK_BYTES = 512 * 1024
"""Source bytes a worker holds at a time; a single longer row is held whole.

Small enough that a block is still in the processor's cache when it is hashed and written: blocks of
4 MiB take half as long again.
"""


@dataclass(frozen=True, slots=True)
class Options:
    """What the user chose.

    Attributes:
        dtype: ``auto`` or a key of :data:`DTYPES`.
        tp_size: number of tensor-parallel ranks.
        weight_only: ``int8`` or ``int4`` for the portable weight-only form, else None.
    """

    dtype: str = "auto"
    tp_size: int = 1
    weight_only: str | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of one rank file.

    Attributes:
        rank: the file, ``rank{rank}.safetensors``.
        name: tensor name.
        dtype: safetensors code.
        shape: its shape.
        offset: absolute byte offset in the file.
        rows: where its rows come from: spans over source *tensors*, in order.
        columns: which source columns a row keeps, in order; None for all, or for one axis.
    """

    rank: int
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    rows: tuple[Span, ...]
    columns: tuple[Span, ...] | None


@dataclass(frozen=True, slots=True)
class Write:
    """Rows of a step go to ``output`` (an index into the plan's outputs) from row ``row`` on."""

    output: int
    row: int


@dataclass(frozen=True, slots=True)
class Step:
    """Consecutive source rows, read once and written to every place that needs them.

    Attributes:
        source: the source tensor, or None for zero rows.
        row: first row (an element, for a tensor with one axis).
        count: number of rows.
        writes: where they go. Every output receives its rows in order over the steps of a task.
    """

    source: SourceTensor | None
    row: int
    count: int
    writes: tuple[Write, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """Steps that belong together; different tasks share no output and may run side by side."""

    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a conversion does, and everything that speaks against it.

    Attributes:
        family: name of the family.
        options: what was asked for, with ``dtype`` resolved.
        source: the source model.
        config: the checkpoint's config.json.
        outputs: all tensors of all ranks; empty if there are errors.
        headers: the safetensors header of each rank file.
        tasks: the work, in source order.
        findings: errors, warnings and notes.
    """

    family: str
    options: Options
    source: Source
    config: Mapping[str, Any]
    outputs: tuple[Output, ...]
    headers: tuple[bytes, ...]
    tasks: tuple[Task, ...]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings that forbid the conversion."""
        return tuple(f for f in self.findings if f.severity is Severity.ERROR)

    @property
    def bytes_in(self) -> int:
        """Source bytes that are read, those read twice counted twice."""
        return sum(
            step.count * row_bytes(step.source)
            for task in self.tasks
            for step in task.steps
            if step.source is not None
        )

    @property
    def file_sizes(self) -> tuple[int, ...]:
        """Bytes of each rank file."""
        ends = [len(header) for header in self.headers]
        for output in self.outputs:
            ends[output.rank] = max(ends[output.rank], output.offset + output_bytes(output))
        return tuple(ends)

    @property
    def bytes_out(self) -> int:
        """Bytes of all rank files."""
        return sum(self.file_sizes)

    @property
    def casts(self) -> int:
        """Source tensors whose values change dtype."""
        wanted = DTYPES.get(self.options.dtype)
        return sum(
            1
            for name in {s.source for o in self.outputs for s in o.rows if s.source is not None}
            if self.source.tensors[name].dtype != wanted
        )

    def buffer_bytes(self, workers: int) -> int:
        """Upper bound of the memory a run holds in buffers.

        Each worker has a block of source rows, its cast copy, and the columns cut out for a rank.
        """
        longest = max(
            (row_bytes(step.source) for task in self.tasks for step in task.steps if step.source),
            default=0,
        )
        return workers * 4 * max(BLOCK_BYTES, longest)


ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4}
"""Bytes per element of the dtypes a plan accepts."""


def row_bytes(tensor: SourceTensor) -> int:
    """Bytes of one row of a source tensor (one element, if it has one axis)."""
    cols = tensor.shape[1] if len(tensor.shape) > 1 else 1
    return cols * ITEM_BYTES[tensor.dtype]


def output_bytes(output: Output) -> int:
    """Bytes of an output tensor."""
    total = ITEM_BYTES[output.dtype]
    for size in output.shape:
        total *= size
    return total
