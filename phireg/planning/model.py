"""A plan as immutable data: the outputs, and the steps that fill them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from phireg.dtypes import ITEMSIZE, WEIGHT_DTYPES
from phireg.findings import Finding, Severity
from phireg.formats import FORMATS, Format
from phireg.layout.ranks import Ranks
from phireg.layout.spans import Span
from phireg.reader.schemes import SCHEMES, Scheme
from phireg.registry import FamilyChoice
from phireg.source.model import Source
from phireg.source.readings import NO_CHOICE, Readings
from phireg.source.tensors import SourceTensor
from phireg.targets.target import Target

DEFAULT_TARGET = "trtllm"
SHARD_BYTES = 5 * 10**9
"""Bytes of a file that is no rank's, as transformers' ``max_shard_size`` has them by default."""

BLOCK_BYTES = 512 * 1024
"""Source bytes that a worker holds at a time; a single longer row is held whole.

Small enough that a block is still in the processor's cache when it is hashed and written: blocks of
4 MiB take half as long again.
"""

# Times BLOCK_BYTES at most where ranks take columns of the rows, and so parts of a block, and where
# values are cast, in steps after each of which a worker may have to wait for the interpreter.
_MANY_BLOCKS = 4


@dataclass(frozen=True, slots=True)
class Options:
    """Choices of the user; see :func:`phireg.plan`."""

    dtype: str = "auto"  # or a key of WEIGHT_DTYPES
    tp_size: int = 1
    qformat: str | None = None  # a key of FORMATS
    kv_cache_dtype: str | None = None  # a key of the target's kv_caches
    moe_ep_size: int | None = None  # None (not given) means 1
    readings: Readings = NO_CHOICE
    target: str = DEFAULT_TARGET
    max_shard_size: int = SHARD_BYTES
    exclude: tuple[str, ...] = ()  # patterns of modules that stay unquantized
    quantize_lm_head: bool = False  # lm_head as well as the layers' linears
    form: str | None = None  # the class of models to write it as; None for its own

    @property
    def ranks(self) -> Ranks:
        """The division of modules over ranks."""
        return Ranks(self.tp_size, self.moe_ep_size or 1)

    @property
    def scheme(self) -> Scheme | None:
        """TensorRT-LLM's quantization scheme of the format, if there is one."""
        return None if self.qformat is None else SCHEMES.get(self.qformat)

    @property
    def format(self) -> Format | None:
        """The format of quantized linears, if there is one."""
        return None if self.qformat is None else FORMATS[self.qformat]

    @property
    def weight_only(self) -> str | None:
        """``int8`` or ``int4`` for the portable weight-only form, else None."""
        if self.scheme is None or self.scheme.weight is not None:
            return None
        return self.scheme.qformat.removesuffix("_wo")

    def as_json(self) -> dict[str, Any]:
        """The options as manifests and ``--json`` have them."""
        return asdict(self) | {
            "moe_ep_size": self.ranks.moe_ep_size,
            "exclude": list(self.exclude),
            "weight_only": self.weight_only,
        }

    @property
    def calibrated(self) -> bool:
        """True if carrying out the plan needs calibration statistics."""
        chosen = self.format
        return self.kv_cache_dtype is not None or (chosen is not None and chosen.calibrated)

    @property
    def searched(self) -> bool:
        """True if the calibration searches AWQ's factors."""
        return self.qformat is not None and FORMATS[self.qformat].smoothing == "awq"


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of source tensors, in order (stacked linears one after the other), as an origin."""

    spans: tuple[Span, ...]  # over source tensors; zero rows have no source
    columns: tuple[Span, ...] | None = None  # that a row keeps; None for all, or for one axis


@dataclass(frozen=True, slots=True)
class Scale:
    """Elements of scales that the run computes, as the origin of an output."""

    spans: tuple[Span, ...]  # over the plan's ``scales``, in order
    groups: int = 1  # elements of a row
    columns: tuple[Span, ...] | None = None  # the groups that are kept, None for all


class Basis(Enum):
    """Something a scale is computed from."""

    CALIBRATION = "calibration"
    WEIGHTS = "weights"


@dataclass(frozen=True, slots=True)
class ScaleTensor:
    """A scale in the source's coordinates: its elements follow the source's rows or columns."""

    dtype: str  # safetensors code
    size: int  # elements
    computed_from: tuple[Basis, ...]
    """With SmoothQuant's alpha at 1; below, its scales all depend on the weights as well."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.size * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of one file."""

    rank: int  # the number of its file: of its rank, or of its shard
    name: str
    dtype: str  # safetensors code
    shape: tuple[int, ...]  # [] of a scalar; [experts, rows, columns] of experts' linears
    offset: int  # in the file, in bytes
    origin: Rows | Scale
    packing: tuple[int, int] = (1, 1)  # source rows and columns in one of its elements
    factor: str | None = None  # one of the plan's scales, which its rows are multiplied by

    @property
    def matrix(self) -> tuple[int, int]:
        """Number of rows and their length; a tensor with one axis has rows of one element."""
        if len(self.shape) < 2:
            return math.prod(self.shape), 1
        return math.prod(self.shape[:-1]), self.shape[-1]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]

    @property
    def sources(self) -> frozenset[str]:
        """Names of the source tensors that its rows are of."""
        spans = self.origin.spans if isinstance(self.origin, Rows) else ()
        return frozenset(span.source for span in spans if span.source is not None)


@dataclass(frozen=True, slots=True)
class Write:
    """Rows of a step go to ``output`` (an index into the plan's outputs) from row ``row`` on."""

    output: int
    row: int


@dataclass(frozen=True, slots=True)
class Step:
    """Consecutive source rows, read once and written in order to every place that needs them."""

    source: SourceTensor | None  # None for zero rows
    row: int  # an element, for a tensor with one axis
    count: int
    writes: tuple[Write, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """Steps that belong together; different tasks share no output and may run side by side."""

    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """A linear whose quantized weight and scales a run computes."""

    target: str  # module path in the checkpoint
    sources: tuple[str, ...]  # the source modules of its rows; no other target reads them
    columns: int  # input features in the source
    experts: int = 0  # that are stacked in it
    alike: tuple[str, ...] = ()  # targets with the same second scale, this one among them
    folded: bool = False  # a norm, or the rows before, have the factors of all alike
    feeds: tuple[tuple[str, tuple[Span, ...]], ...] = ()
    """The folded linears whose inputs are outputs of rows here, with these rows of the sources."""

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The source modules that share a scale of the weight: each expert's, or all."""
        size = len(self.sources) // max(1, self.experts)
        starts = range(0, len(self.sources), size)
        return tuple(self.sources[start : start + size] for start in starts)


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a conversion does, and every reason why it cannot be done.

    Attributes:
        chosen: the family, and the distribution that provides it.
        model_dir: the source as the user called it, a directory or a hub repository.
        options: the user's choices, with ``dtype`` resolved.
        source: the source model.
        target: what is written, and for which readers.
        documents: the JSON files by name, config.json among them.
        outputs: all tensors of all files; empty if there are errors.
        files: names of the files with tensors.
        headers: the safetensors header of each.
        tasks: the work on source rows, in source order; scales are no part of it.
        findings: errors, warnings and notes.
        linears: the quantized ones; empty unless the scheme quantizes weights.
        kv_caches: attention modules whose KV cache gets a scale, in the order of the layers.
        scales: the scales that a run computes before it writes, by name.
        tp_sizes: the numbers of ranks that can divide the model; empty if that is not known.
    """

    chosen: FamilyChoice
    model_dir: str
    options: Options
    source: Source
    target: Target
    documents: Mapping[str, Mapping[str, Any]]
    outputs: tuple[Output, ...]
    files: tuple[str, ...]
    headers: tuple[bytes, ...]
    tasks: tuple[Task, ...]
    findings: tuple[Finding, ...]
    linears: tuple[QuantizedLinear, ...] = ()
    kv_caches: tuple[str, ...] = ()
    scales: Mapping[str, ScaleTensor] = field(default_factory=dict)
    tp_sizes: tuple[int, ...] = ()

    @property
    def config(self) -> Mapping[str, Any]:
        """The directory's config.json."""
        return self.documents["config.json"]

    @property
    def advice(self) -> str | None:
        """What to do about a number of ranks that does not divide the model."""
        if not any(finding.code == "sharding" for finding in self.errors):
            return None
        return f"tp sizes that work: {', '.join(map(str, self.tp_sizes)) or 'none'}"

    @property
    def family(self) -> str:
        """Name of the family."""
        return self.chosen.family.name

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
    def sources(self) -> frozenset[str]:
        """Names of the source tensors that outputs are made of."""
        return frozenset(name for output in self.outputs for name in output.sources)

    @property
    def smoothed(self) -> bool:
        """True if weights are quantized with SmoothQuant."""
        chosen = self.options.format
        return chosen is not None and chosen.smoothing == "smoothquant"

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(output.nbytes for output in self.outputs)

    @property
    def file_sizes(self) -> tuple[int, ...]:
        """Bytes of each file with tensors."""
        ends = [len(header) for header in self.headers]
        for output in self.outputs:
            ends[output.rank] = max(ends[output.rank], output.offset + output.nbytes)
        return tuple(ends)

    @property
    def bytes_out(self) -> int:
        """Bytes of all files with tensors."""
        return sum(self.file_sizes)

    @property
    def casts(self) -> int:
        """Source tensors whose values change dtype."""
        read = {
            (name, self.carried_code(output)) for output in self.outputs for name in output.sources
        }
        return len({name for name, code in read if self.source.tensors[name].dtype != code})

    def carried_code(self, output: Output) -> str:
        """The dtype that source rows of an output are cast to, before they may be quantized."""
        quantizes = bool(self.linears) and output.dtype not in WEIGHT_DTYPES.values()
        return WEIGHT_DTYPES[self.options.dtype] if quantizes else output.dtype

    def blocks(self, step: Step) -> int:
        """Return how many times BLOCK_BYTES a worker holds of a step's rows."""
        outputs = [self.outputs[write.output] for write in step.writes]
        if self.linears or step.source is None:
            return 1
        if any(self.carried_code(output) != step.source.dtype for output in outputs):
            return _MANY_BLOCKS
        cut = any(isinstance(output.origin, Rows) and output.origin.columns for output in outputs)
        return min(len(outputs), _MANY_BLOCKS) if cut else 1

    def buffer_bytes(self, workers: int) -> int:
        """Upper bound of the memory a run holds in buffers.

        Each worker has a block of source rows, its cast copy, and the columns cut out for a rank;
        where a cast finds no number that is normal in both dtypes, also the place of each; when
        weights are quantized, the quantized block and float32 copies of a piece of it.
        Where LoRA layers are added, a block is summed in float64, and each worker has the factors
        of one tensor. The scales of all linears are in memory together.
        """
        largest = max(
            (
                max(BLOCK_BYTES * self.blocks(step), row_bytes(step.source))
                for task in self.tasks
                for step in task.steps
                if step.source
            ),
            default=BLOCK_BYTES,
        )
        factors = max((_factor_bytes(tensor) for tensor in self.source.tensors.values()), default=0)
        copies = (10 if self.linears or self.casts else 4) + (12 if factors else 0)
        scales = sum(scale.nbytes for scale in self.scales.values())
        return workers * (copies * largest + factors) + scales


def _factor_bytes(tensor: SourceTensor) -> int:
    """Bytes of the factors that are added to a tensor in float64, and of one as it is read."""
    sizes = [math.prod(x.shape) for delta in tensor.deltas for x in (delta.up, delta.down)]
    return 8 * (sum(sizes) + max(sizes, default=0))


def row_bytes(tensor: SourceTensor) -> int:
    """Bytes of one row of a source tensor (one element, if it has one axis)."""
    cols = tensor.shape[1] if len(tensor.shape) > 1 else 1
    return cols * ITEMSIZE[tensor.dtype]
