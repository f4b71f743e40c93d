"""Compare quantized tensors: weights within a step of their grid, weight scales computed anew.

A weight's scale follows from the weight, so it is computed again from the source. The smoothing
vector of SmoothQuant does not: it comes from a calibration, and is taken from the checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from phireg.checkpoint.rankfiles import RankFiles
from phireg.conversion.cast import Bits, Float32, one_thread_each
from phireg.conversion.stream import WORKERS, assemble, carry, kept_columns
from phireg.dtypes import (
    E4M3_MAX,
    E4M3_SMALLEST_NORMAL,
    INT8_MAX,
    SMALLEST_NORMAL,
    UNIT_ROUNDOFF,
    WEIGHT_DTYPES,
    float32_values,
)
from phireg.planning.model import Output, Plan, QuantizedLinear, Rows
from phireg.planning.report import ranges
from phireg.planning.schedule import restrict
from phireg.reader.tensors import is_scale
from phireg.source.model import Reader
from phireg.verification.comparison import Difference, Progress, RowComparison
from phireg.verification.result import Problem, place_of

_FLOAT32_ROUNDING = 1e-6
_E4M3_MANTISSA_BITS = 3

_SUFFIX = "_scaling_factor"
WEIGHT_SCALE, INPUT_SCALE, SMOOTHER = (
    f"{what}{_SUFFIX}" for what in ("weights", "activation", "prequant")
)
_CACHE, _KEY, _VALUE = (f"{what}_cache{_SUFFIX}" for what in ("kv", "k", "v"))


class Tolerance:
    """Bounds on the distance of quantized tensors from the values that the source gives."""

    def __init__(self, plan: Plan) -> None:
        assert plan.options.scheme is not None
        self.dtype = WEIGHT_DTYPES[plan.options.dtype]
        self.per_channel = plan.options.scheme.per_channel

    def weights(self, stored: Float32, unrounded: Float32) -> Any:
        """Return which grid values are within a step of the unrounded values.

        A step of SmoothQuant's grid is 1. The smoothing vector is rounded to the checkpoint's
        dtype, and so are the smoothed weights; exporters before modelopt 0.23 round both once more.
        """
        with np.errstate(all="ignore"):
            distance = np.abs(stored - unrounded)
            if self.per_channel:
                return distance <= 1 + 4 * UNIT_ROUNDOFF[self.dtype] * np.abs(unrounded)
            magnitude = np.maximum(np.abs(unrounded), np.float32(E4M3_SMALLEST_NORMAL))
            step = np.ldexp(np.float32(1), np.frexp(magnitude)[1] - 1 - _E4M3_MANTISSA_BITS)
            return distance <= step

    @property
    def scales(self) -> float:
        """Largest relative error of a weight's scale."""
        return _FLOAT32_ROUNDING + (4 * UNIT_ROUNDOFF[self.dtype] if self.per_channel else 0)

    @property
    def smoother(self) -> float:
        """Largest relative error of a smoothing vector that is inferred from the weight."""
        return 8 * UNIT_ROUNDOFF[self.dtype]


@dataclass(slots=True)
class LinearComparison:
    """One linear on all ranks."""

    target: str  # module path
    weights: tuple[Output, ...]
    stored_scales: dict[int, Float32]  # by rank, [rows], [experts], or [1] for the whole tensor
    smoother: Float32 | None  # factors of inputs, in the source's columns; None for FP8
    scales: dict[int, Float32] = field(default_factory=dict)  # from the source
    differences: tuple[Difference, ...] = ()  # off the grids of the stored and the source's scales
    wrong_scales: tuple[int, ...] = ()  # ranks
    rounded_twice: bool = False  # scales are off by no more than that

    def smoothed(self, output: Output, rows: Float32) -> Float32:
        """Return rows of a rank's weight times 1 / s; the rows themselves for FP8."""
        if self.smoother is None:
            return rows
        assert isinstance(output.origin, Rows)
        vector = kept_columns(self.smoother[None].view(np.uint32), output.origin)
        with np.errstate(all="ignore"):  # zeros in the vector are problems of the structure check
            smoothed: Float32 = rows * (np.float32(1) / vector.view(np.float32))
        return smoothed

    def levels(self, plan: Plan, files: RankFiles, reader: Reader) -> tuple[list[Float32], ...]:
        """Return every rank's whole weight on the grid: the source's unrounded, and as stored."""
        code = WEIGHT_DTYPES[plan.options.dtype]
        expected, stored = [], []
        for output in self.weights:
            unquantized = dataclasses.replace(output, dtype=code)
            rows = self.smoothed(output, float32_values(assemble(plan, unquantized, reader), code))
            with np.errstate(all="ignore"):
                expected.append(rows / _by_row(self.scales[output.rank], output, 0, len(rows)))
            bits = files[output.rank].read(output.name).reshape(output.matrix)
            stored.append(float32_values(bits, output.dtype))
        return expected, stored


def compare_quantized(
    plan: Plan, files: RankFiles, linears: Sequence[QuantizedLinear], progress: Progress
) -> list[LinearComparison]:
    """Compare quantized linears; memory is bounded by some blocks."""
    if not linears:
        return []
    comparisons = {f"{linear.target}.weight": _open(plan, files, linear) for linear in linears}
    stored = {name: linear.stored_scales for name, linear in comparisons.items()}
    tolerance = Tolerance(plan)
    sink = _GridComparison(plan, files, comparisons, stored, progress)
    sink.run()
    again = {}
    for name, linear in comparisons.items():
        linear.scales = sink.source_scales(name)
        linear.differences = sink.of(name)
        with np.errstate(all="ignore"):
            error = {
                rank: np.abs(scales / linear.scales[rank] - 1)
                for rank, scales in linear.stored_scales.items()
            }
        linear.wrong_scales = tuple(
            rank for rank, off in error.items() if not (off <= tolerance.scales).all()
        )
        linear.rounded_twice = (
            tolerance.per_channel
            and not linear.wrong_scales
            and any((off > tolerance.scales / 2).any() for off in error.values())
        )
        if linear.differences and linear.wrong_scales:
            again[name] = linear
    if again:  # on the grid of the source's scales there may be no difference
        sink = _GridComparison(
            plan, files, again, {n: c.scales for n, c in again.items()}, lambda count: None
        )
        sink.run()
        for name, linear in again.items():
            linear.differences = sink.of(name)
    return list(comparisons.values())


def _open(plan: Plan, files: RankFiles, linear: QuantizedLinear) -> LinearComparison:
    outputs = [o for o in plan.outputs if o.name.rpartition(".")[0] == linear.target]
    weights = tuple(output for output in outputs if output.name.endswith(".weight"))
    name = f"{linear.target}.{WEIGHT_SCALE}"
    scales = {o.rank: read_scale(files, o.rank, name).ravel() for o in weights}
    smoother = None
    for output in outputs:
        if output.name.endswith(SMOOTHER):
            if smoother is None:
                smoother = np.zeros(linear.columns, np.float32)
            own, position = read_scale(files, output.rank, output.name), 0
            for span in output.origin.spans:
                smoother[span.start : span.stop] = own[position : position + span.count]
                position += span.count
    return LinearComparison(linear.target, weights, scales, smoother)


class _GridComparison(RowComparison):
    """The sink that compares unquantized rows, on the grid of given scales, with stored ones."""

    def __init__(
        self,
        plan: Plan,
        files: RankFiles,
        linears: Mapping[str, LinearComparison],
        scales: Mapping[str, Mapping[int, Float32]],
        progress: Progress,
    ) -> None:
        super().__init__(restrict(plan, lambda output: output.name in linears), files, progress)
        self.linears = linears
        self.scales = scales
        self.tolerance = Tolerance(plan)
        self.maxima = [np.zeros(output.matrix[0], np.float32) for output in self.plan.outputs]

    def run(self) -> None:
        """Read the source once; without a quantizer its rows come in the checkpoint's dtype."""
        with one_thread_each(WORKERS):
            carry(self.plan, self)

    def judged(self, index: int, row: int, stored: Bits, rows: Bits) -> tuple[Any, ...]:
        """Return which elements are off the grid, and the levels stored and expected."""
        output = self.plan.outputs[index]
        values = float32_values(rows, self.tolerance.dtype)
        values = self.linears[output.name].smoothed(output, values)
        self.maxima[index][row : row + len(rows)] = np.abs(values).max(axis=1, initial=0)
        levels = float32_values(stored, output.dtype)
        scale = _by_row(self.scales[output.name][output.rank], output, row, len(rows))
        with np.errstate(all="ignore"):
            unrounded: Float32 = values / scale
        return ~self.tolerance.weights(levels, unrounded), levels, unrounded

    def of(self, name: str) -> tuple[Difference, ...]:
        ordered = sorted(self.differences.items())
        return tuple(difference for _, difference in ordered if difference.output.name == name)

    def source_scales(self, name: str) -> dict[int, Float32]:
        """Return every rank's scales of a weight: its largest values over the grid's largest."""
        outputs = {o.rank: n for n, o in enumerate(self.plan.outputs) if o.name == name}
        maxima = {rank: self.maxima[index] for rank, index in outputs.items()}
        if not self.tolerance.per_channel:
            experts = self.plan.outputs[outputs[0]].shape[:-2]
            shares = self.plan.options.ranks.moe_ep_size if experts else 1
            whole: dict[int, Float32] = {}  # by share of the experts
            for rank, by_row in maxima.items():
                own = by_row.reshape(*experts or (1,), -1).max(-1)
                whole[rank % shares] = np.maximum(whole.get(rank % shares, own), own)
            return {rank: _scale(whole[rank % shares], E4M3_MAX) for rank in maxima}
        origins = [self.plan.outputs[index].origin for index in outputs.values()]
        if any(isinstance(origin, Rows) and origin.columns is not None for origin in origins):
            rows: Float32 = np.stack(list(maxima.values())).max(axis=0)
            maxima = dict.fromkeys(maxima, rows)  # every rank has columns of all rows
        return {rank: _scale(rows, INT8_MAX) for rank, rows in maxima.items()}


def _scale(maxima: Float32, largest: float) -> Float32:
    """Return maxima over the grid's largest value; a tensor or row of zeros has the scale 1."""
    scale = maxima / np.float32(largest)
    scales: Float32 = np.where(scale == 0, np.float32(1), scale).astype(np.float32)
    return scales


def _by_row(scales: Float32, output: Output, row: int, count: int) -> Float32:
    """Return scales of consecutive rows, [count, 1]: their own, an expert's, or the only one."""
    rows = np.arange(row, row + count)
    of_rows: Float32 = scales[rows * len(scales) // output.matrix[0], None]
    return of_rows


# Scales


def read_scale(files: RankFiles, rank: int, name: str) -> Float32:
    """Read a whole scale in float32; one without dimensions has one element."""
    file = files[rank]
    return float32_values(file.read(name), file.header.entries[name].dtype)


def scale_defects(files: RankFiles) -> Iterator[Problem]:
    """Yield scales that are zero, negative, infinite, not a number or denormal."""
    codes = (*SMALLEST_NORMAL, "F8_E4M3")
    for rank, file in files.items():
        entries = file.header.entries.items()
        scales = {name: e.dtype for name, e in entries if is_scale(name) and e.dtype in codes}
        if not scales:  # torch need not be loaded
            continue
        from phireg.executor.sources import scale_defect

        read = file.mapped()
        for name, code in scales.items():
            if defect := scale_defect(read(name), SMALLEST_NORMAL.get(code, 0.0)):
                yield Problem(f"rank{rank}.safetensors: {name}", defect, None, *place_of(name))


def rank_problems(files: RankFiles, scales: Iterable[Output]) -> Iterator[Problem]:
    """Yield scales that every rank must repeat and some rank has other values of."""
    repeated: dict[tuple[object, ...], list[Output]] = {}
    for output in scales:
        repeated.setdefault((output.name, output.origin), []).append(output)
    for first, *others in repeated.values():
        value = read_scale(files, first.rank, first.name)
        different = {}
        for output in others:
            other = read_scale(files, output.rank, output.name)
            if not np.array_equal(other, value, equal_nan=True):
                different[output.rank] = other
        if different:
            rank, other = next(iter(different.items()))
            text = f"is {_shown(value)} on rank {first.rank} and {_shown(other)} on rank {rank}; "
            text += "every rank must hold the same"
            where = f"rank{ranges(different)} {first.name}"
            yield Problem(where, text, None, *place_of(first.name))


def cache_problems(files: RankFiles, scales: Iterable[Output]) -> Iterator[Problem]:
    """Yield KV cache scales that are not the larger one of the keys' and the values'."""
    for output in scales:
        rank, name = output.rank, output.name
        parts = [name.replace(_CACHE, part) for part in (_KEY, _VALUE)]
        if not name.endswith(_CACHE) or any(files.kind(rank, part) is None for part in parts):
            continue
        key, value = (read_scale(files, rank, part) for part in parts)
        scale = read_scale(files, rank, name)
        if not np.isclose(scale, np.maximum(key, value), rtol=1e-6).all():
            text = f"is {_shown(scale)}; keys have {_shown(key)} and values {_shown(value)}, and "
            text += "it must be the larger one"
            yield Problem(f"rank{rank} {name}", text, None, *place_of(name))


def activation_problems(
    plan: Plan, files: RankFiles, scales: Iterable[Output]
) -> Iterator[Problem]:
    """Yield activation scales that do not follow from the smoothing vector, as with alpha 1.

    The vector is 1 / amax then, so that every smoothed channel reaches 1 and the scale is 1 / 127;
    unless channels were so small or large that their entries were clamped to 1e4 or 1e-4, or all
    were zero, so that both are 1.
    """
    names = {output.name for output in scales}
    for linear in plan.linears:
        name, smoother = f"{linear.target}.{INPUT_SCALE}", f"{linear.target}.{SMOOTHER}"
        if not {name, smoother} <= names:
            continue
        scale = read_scale(files, 0, name)
        ranks = range(plan.options.tp_size)
        vector = np.concatenate([read_scale(files, rank, smoother) for rank in ranks])
        slack = 2 * UNIT_ROUNDOFF[WEIGHT_DTYPES[plan.options.dtype]] + 1e-6
        clamped = (vector <= 1e-4 * (1 + slack)) | (vector >= 1e4 * (1 - slack))
        off = np.abs(scale * 127 - 1) > slack
        unseen = (scale == 1).all() and (vector == 1).all()
        if off.any() and not clamped.any() and not unseen:
            text = f"is {_shown(scale * 127)} times 1/127, which it is where inputs are smoothed"
            yield Problem(f"rank0 {name}", f"{text} with alpha 1", None, *place_of(name))


def _shown(value: Float32) -> str:
    flat = value.ravel()
    return f"{flat[0]:.6g}" if flat.size == 1 else f"[{flat[0]:.6g}, ...]"
