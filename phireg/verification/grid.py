"""Quantized weights against the source: every element within a step of its grid, every scale anew.

A weight's scale follows from the weight, so it is computed again from the source. The smoothing
vector of SmoothQuant does not: it comes from a calibration, and is taken as it is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import numpy as np

from phireg.checkpoint.rankfiles import RankFiles
from phireg.conversion.cast import Bits, Float32, one_thread_each
from phireg.conversion.stream import kept_columns, read_blocks
from phireg.dtypes import E4M3_MAX, INT8_MAX, UNIT_ROUNDOFF, WEIGHT_DTYPES, float32_values
from phireg.planning.model import Output, Plan, QuantizedLinear, Rows, Task
from phireg.planning.schedule import schedule
from phireg.source.model import Reader
from phireg.verification.scales import read_scale
from phireg.verification.weights import Difference, add_difference

_WORKERS = 2
_FLOAT32_ROUNDING = 1e-6
_SMALLEST_E4M3_EXPONENT = -6
_E4M3_MANTISSA_BITS = 3

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far quantized tensors may be from what the source gives, by the checkpoint's dtype.

    Attributes:
        dtype: safetensors code of the checkpoint's dtype.
        per_channel: whether it is INT8 SmoothQuant.
    """

    dtype: str
    per_channel: bool

    def weights(self, found: Float32, wanted: Float32) -> Any:
        """Whether grid values are within a step of what lies there unrounded.

        A step of SmoothQuant's grid is 1. The smoothing vector is rounded to the checkpoint's
        dtype, and so are the smoothed weights; exporters before modelopt 0.23 round both once more.
        """
        if self.per_channel:
            return np.abs(found - wanted) <= 1 + 4 * UNIT_ROUNDOFF[self.dtype] * np.abs(wanted)
        exponent = np.maximum(np.frexp(wanted)[1] - 1, _SMALLEST_E4M3_EXPONENT)
        step = np.ldexp(np.float32(1), exponent - _E4M3_MANTISSA_BITS)
        return np.abs(found - wanted) <= step

    @property
    def scales(self) -> float:
        """What a weight's scale may be off by, relatively."""
        return _FLOAT32_ROUNDING + (4 * UNIT_ROUNDOFF[self.dtype] if self.per_channel else 0)

    @property
    def usual(self) -> float:
        """What it is off by at most where nothing was rounded twice."""
        return _FLOAT32_ROUNDING + (2 * UNIT_ROUNDOFF[self.dtype] if self.per_channel else 0)


@dataclass(slots=True)
class Linear:
    """One linear on all ranks.

    Attributes:
        target: module path.
        weights: every rank's weight.
        scales: every rank's weight scales as found, [rows], or [1] for the whole tensor.
        smoother: what inputs are multiplied by, in the source's columns; None for FP8.
        wanted: as ``scales``, from the source.
        amax: the largest |W| so far.
    """

    target: str
    weights: tuple[Output, ...]
    scales: dict[int, Float32]
    smoother: Float32 | None
    wanted: dict[int, Float32] = field(default_factory=dict)
    amax: float = 0.0


@dataclass(frozen=True, slots=True)
class Seen:
    """What became of one linear.

    Attributes:
        linear: it, with the scales that the source gives.
        differences: weights off the grid, with the scales found and with those wanted.
        scales: ranks whose weight scales are not what the source gives.
        twice: whether scales are off by so little that they were rounded twice.
    """

    linear: Linear
    differences: tuple[Difference, ...]
    scales: tuple[int, ...]
    twice: bool


def tolerance_of(plan: Plan) -> Tolerance:
    """For a plan that quantizes weights."""
    assert plan.options.scheme is not None
    return Tolerance(WEIGHT_DTYPES[plan.options.dtype], plan.options.scheme.per_channel)


def compare_quantized(
    plan: Plan, files: RankFiles, there: Mapping[str, bool], progress: Progress
) -> list[Seen]:
    """Compare all linears whose tensors are there on every rank; memory is bounded by some blocks.

    Args:
        plan: a quantized plan.
        files: the rank files.
        there: by target, whether all its tensors can be read.
        progress: told how many more bytes of quantized weights have been compared.

    Raises:
        SourceError: a file could not be read.
    """
    linears = [linear for linear in plan.linears if there[linear.target]]
    with (
        plan.source.open() as reader,
        one_thread_each(_WORKERS),
        ThreadPoolExecutor(_WORKERS) as pool,
    ):
        return list(pool.map(lambda x: _Grid(plan, files, reader).judge(x, progress), linears))


def open_linear(plan: Plan, files: RankFiles, linear: QuantizedLinear) -> Linear:
    """Read a linear's scales."""
    weights = tuple(o for o in plan.outputs if o.name == f"{linear.target}.weight")
    name = f"{linear.target}.weights_scaling_factor"
    scales = {output.rank: read_scale(files, output.rank, name) for output in weights}
    name = f"{linear.target}.prequant_scaling_factor"
    if name not in plan.scales:
        return Linear(linear.target, weights, scales, None)
    smoother = np.zeros(linear.columns, np.float32)
    for output in plan.outputs:
        if output.name == name:
            own, position = read_scale(files, output.rank, name), 0
            for span in output.origin.spans:
                smoother[span.start : span.stop] = own[position : position + span.count]
                position += span.count
    return Linear(linear.target, weights, scales, smoother)


class _Grid:
    """Reads a linear's source rows and the rank files' rows made of them."""

    def __init__(self, plan: Plan, files: RankFiles, reader: Reader) -> None:
        self.plan = plan
        self.files = files
        self.reader = reader
        self.tolerance = tolerance_of(plan)

    def judge(self, quantized: QuantizedLinear, progress: Progress) -> Seen:
        linear = open_linear(self.plan, self.files, quantized)
        tasks = schedule(linear.weights, self.plan.source.tensors)
        found = self.differences(linear, tasks, linear.scales, progress)
        wrong, twice = [], False
        for rank, scales in linear.scales.items():
            with np.errstate(all="ignore"):
                off = np.abs(scales / linear.wanted[rank] - 1)
            if not (off <= self.tolerance.scales).all():
                wrong.append(rank)
            twice = twice or not bool((off <= self.tolerance.usual).all())
        if found and wrong:
            found = self.differences(linear, tasks, linear.wanted, lambda count: None)
        return Seen(linear, tuple(found), tuple(wrong), twice and not wrong)

    def differences(
        self,
        linear: Linear,
        tasks: tuple[Task, ...],
        scales: Mapping[int, Float32],
        progress: Progress,
    ) -> list[Difference]:
        """Weights off the grid of these scales; the linear's wanted ones are filled in."""
        wrong: dict[int, Difference] = {}
        linear.wanted = {rank: np.ones_like(scale) for rank, scale in linear.scales.items()}
        for index, row, block in self.blocks(linear, tasks):
            output = linear.weights[index]
            rows, whole = slice(row, row + len(block)), kept_columns_of(block, output)
            if linear.smoother is None:
                linear.amax = max(linear.amax, float(np.abs(block).max(initial=0)))
                scale = scales[output.rank]
            else:
                linear.wanted[output.rank][rows] = _or_one(
                    np.abs(block).max(axis=1) / np.float32(INT8_MAX)
                )
                scale = scales[output.rank][rows, None]
            found = self.found(output, row, whole.shape)
            progress(found.size)
            with np.errstate(all="ignore"):
                right = self.tolerance.weights(found, whole / scale)
            add_difference(wrong, index, output, row, ~right)
        if linear.smoother is None:
            scale = _or_one(np.float32(linear.amax) / np.float32(E4M3_MAX))
            linear.wanted = {rank: np.array([scale]).reshape(1) for rank in linear.scales}
        return list(wrong.values())

    def found(self, output: Output, row: int, shape: tuple[int, ...]) -> Float32:
        columns = output.shape[-1]
        bits = self.files[output.rank].read(output.name, row * columns, int(np.prod(shape)))
        return float32_values(bits, output.dtype).reshape(shape)

    def blocks(self, linear: Linear, tasks: tuple[Task, ...]) -> Iterator[tuple[int, int, Float32]]:
        """Output, row in it, and the source's rows that belong there, smoothed, whole."""
        for step in (step for task in tasks for step in task.steps):
            assert step.source is not None  # a quantized linear has no padded rows
            for done, bits, _ in read_blocks(
                self.reader, step.source, step.row, step.count, self.tolerance.dtype, Event()
            ):
                block = self.smoothed(bits, linear)
                for write in step.writes:
                    yield write.output, write.row + done, block

    def smoothed(self, bits: Bits, linear: Linear) -> Float32:
        """W in the checkpoint's dtype, times 1 / s for SmoothQuant."""
        block = float32_values(bits, self.tolerance.dtype)
        if linear.smoother is None:
            return block
        with np.errstate(all="ignore"):  # a zero among them has been reported
            smoothed: Float32 = block * (np.float32(1) / linear.smoother)
        return smoothed


def whole_levels(plan: Plan, files: RankFiles, linear: Linear) -> tuple[list[Float32], ...]:
    """Every rank's weight, as the source's values on the wanted grid and as found.

    Args:
        plan: a quantized plan.
        files: the rank files.
        linear: from :func:`compare_quantized`; all of it is held in memory.
    """
    expected = [np.zeros(o.shape, np.float32) for o in linear.weights]
    with plan.source.open() as reader:
        grid = _Grid(plan, files, reader)
        for index, row, block in grid.blocks(linear, schedule(linear.weights, plan.source.tensors)):
            output = linear.weights[index]
            rows = slice(row, row + len(block))
            scale = linear.wanted[output.rank]
            scale = scale if linear.smoother is None else scale[rows, None]
            with np.errstate(all="ignore"):
                expected[index][rows] = kept_columns_of(block, output) / scale
        found = [grid.found(o, 0, o.shape) for o in linear.weights]
    return expected, found


def kept_columns_of(block: Float32, output: Output) -> Float32:
    """The columns of whole source rows that an output keeps."""
    assert isinstance(output.origin, Rows)
    kept: Float32 = kept_columns(block.view(np.uint32), output.origin).view(np.float32)
    return kept


def _or_one(scale: Any) -> Float32:
    """A tensor or row of zeros has the scale 1."""
    made: Float32 = np.where(scale == 0, np.float32(1), scale).astype(np.float32)
    return made
