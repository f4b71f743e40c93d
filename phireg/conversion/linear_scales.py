"""The scales of one linear, from its weights and the inputs that calibration saw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt

from phireg.calibration.statistics import Statistics
from phireg.conversion.cast import Bits, Float32, cast
from phireg.conversion.groups import int4_scales, nvfp4_scales, nvfp4_second_scale
from phireg.conversion.quantizer import pieces, smooth
from phireg.conversion.stream import Progress, read_blocks
from phireg.dtypes import BITS, E4M3_MAX, INT8_MAX, WEIGHT_DTYPES, as_torch
from phireg.formats import LARGEST, Format
from phireg.planning.model import Plan, QuantizedLinear, row_bytes
from phireg.source.model import Reader
from phireg.targets.target import INPUT_SCALE, PRE_SCALE, SECOND_SCALE, SHAPE, WEIGHT_SCALE

SMALLEST_SMOOTHER, LARGEST_SMOOTHER = 1e-4, 1e4
"""Range of the smoothing vector; a channel that calibration never saw gets the largest, but 1 where
it saw none of the linear's."""


@dataclass(eq=False)
class LinearScaler:
    """Computes the scales of one linear, in one thread; fields below ``compute`` are the result."""

    plan: Plan
    reader: Reader
    statistics: Statistics
    alpha: float
    device: str
    block_bytes: int
    progress: Progress
    stop: Event
    linear: QuantizedLinear
    inputs: Float32  # maxima of its input channels; empty where the format takes none

    def __post_init__(self) -> None:
        self.code = WEIGHT_DTYPES[self.plan.options.dtype]
        self.target = self.linear.target
        self.values: dict[str, Bits] = {}  # the scales by name
        self.inverse: Float32 | None = None  # 1 / s, for SmoothQuant
        self.rows: dict[str, Float32] = {}  # factors of rows, by source module
        self.overflowed: dict[str, int] = {}  # lost in the cast, by source tensor

    def compute(self) -> LinearScaler:
        """Compute the scales; a failure stops the other workers."""
        try:
            form = self.plan.options.format
            if self.plan.smoothed:
                self.smoothquant()
            elif form is not None and form.weight == "int4" and form.smoothing is None:
                self.int4(form)
            elif form is not None and form.weight == "int4":
                self.awq(form)
            elif form is not None and form.weight == "e2m1":
                self.nvfp4(form)
            elif form is not None and form.per == "channel":
                self.channels(LARGEST[form.weight])
            else:
                self.fp8()
        except BaseException:
            self.stop.set()
            raise
        return self

    def fp8(self) -> None:
        """One scale for the whole weight, fused or not, or each expert's, and one for its input."""
        largest = np.zeros(len(self.linear.groups), np.float32)
        for number, modules in enumerate(self.linear.groups):
            for module in modules:
                for _, block in self.blocks(module):
                    amax = np.float32(self.smooth(block).abs().max().item())
                    largest[number] = np.maximum(largest[number], amax)  # a NaN stays one
        self.put(WEIGHT_SCALE, _divided(largest, E4M3_MAX))
        self.put(INPUT_SCALE, _divided(self.inputs.max(), E4M3_MAX))

    def channels(self, top: float) -> None:
        """A scale for each row of the weight."""
        for module in self.linear.sources:
            # In one piece: small arrays between large ones would keep the allocator's memory.
            amax = np.empty(self.height(module), np.float32)
            for row, block in self.blocks(module):
                amax[row : row + len(block)] = (
                    self.smooth(block).abs().amax(1).float().cpu().numpy()
                )
            self.put(WEIGHT_SCALE, _divided(amax, top), module)

    def put(self, companion: str, values: npt.ArrayLike, module: str | None = None) -> None:
        """Add a scale of the linear, or of a source module, in the dtype that it is stored in."""
        name = f"{module or self.target}.{companion}"
        bits = np.asarray(values, np.float32).reshape(-1).view(BITS["F32"])
        self.values[name] = cast(bits, "F32", self.plan.scales[name].dtype)[0]

    def smoothquant(self) -> None:
        """A smoothing vector for the input, then a scale for each row of the smoothed weight."""
        smoother = self.smoother()
        self.inverse = np.float32(1) / smoother
        self.values[f"{self.target}.{PRE_SCALE}"] = self.rounded(smoother)
        with np.errstate(over="ignore"):  # an infinite scale is refused by name
            self.put_input_scale((self.inputs * smoother).max(keepdims=True), INT8_MAX)
        self.channels(INT8_MAX)

    def put_input_scale(self, largest: Float32, top: float) -> None:
        """Add the scale of smoothed inputs up to ``largest``; 1 where calibration saw zeros."""
        amax = as_torch(self.rounded(largest), self.code).float().numpy()
        self.put(INPUT_SCALE, amax / np.float32(top) if self.inputs.any() else np.float32(1))

    def int4(self, form: Format) -> None:
        """A scale for each group of the weight as it is, and the weight's shape."""
        for module in self.linear.sources:
            found = [
                int4_scales(self.smooth(block), form.group_size or 1).cpu().numpy()
                for _, block in self.blocks(module)
            ]
            self.put(WEIGHT_SCALE, np.concatenate(found), module)
        self.put_shape()

    def awq(self, form: Format) -> None:
        """The factors that calibration found, then a scale for each group of the smoothed one.

        Where a norm has the factors of several linears, they are the mean of what was found for
        each; the range of the inputs is the largest that any of these would give them.
        """
        group = self.sharing(self.linear)
        smoother = self.smoother_of(self.linear)
        self.inverse = np.float32(1) / smoother
        for fed, spans in self.linear.feeds:
            following = self.smoother_of(next(x for x in self.plan.linears if x.target == fed))
            for span in spans:
                module = span.source or ""
                rows = self.rows.setdefault(module, np.ones(self.height(module), np.float32))
                rows[span.start : span.stop], following = np.split(following, [span.count])
        if (name := f"{self.target}.{PRE_SCALE}") in self.plan.scales:
            self.values[name] = self.rounded(smoother)
        largest = np.float32(0)
        for other in group if form.levels == 2 else (self.linear,):
            for module in other.sources:
                found = []
                for row, block in self.blocks(module):
                    of_rows = self.rows.get(module)
                    own_rows = None if of_rows is None else of_rows[row : row + len(block)]
                    smoothed = self.smooth(block, own_rows)
                    largest = np.maximum(largest, np.float32(smoothed.abs().max().item()))
                    if other is self.linear:
                        found.append(int4_scales(smoothed, form.group_size or 1).cpu().numpy())
                if found:
                    self.put(WEIGHT_SCALE, np.concatenate(found), module)
        self.put_shape()
        if form.levels == 2:
            self.put(SECOND_SCALE, largest / np.float32(E4M3_MAX))
        if form.inputs is not None:
            own = (self.factors(other) for other in group)
            beyond = max((self.inputs * factors).max(keepdims=True) for factors in own)
            self.put_input_scale(beyond, E4M3_MAX)

    def sharing(self, linear: QuantizedLinear) -> list[QuantizedLinear]:
        """The linears that have their factors in one norm with this one, or this one alone."""
        if not linear.folded or not linear.alike:
            return [linear]
        return [other for other in self.plan.linears if other.target in linear.alike]

    def smoother_of(self, linear: QuantizedLinear) -> Float32:
        """What a linear's inputs are multiplied by: 1 where its target has no place for factors."""
        if self.plan.target.folds == "all" and not linear.folded:
            return np.ones(linear.columns, np.float32)
        own = [self.factors(other) for other in self.sharing(linear)]
        return self.mean(own) if linear.folded else own[0]

    def height(self, module: str) -> int:
        """The rows of a module's weight."""
        return self.plan.source.tensors[f"{module}.weight"].shape[0]

    def put_shape(self) -> None:
        """Add the size of a weight where its scales have that."""
        if (name := f"{self.target}.{SHAPE}") in self.plan.scales:
            rows = sum(map(self.height, self.linear.sources))
            self.values[name] = np.array([rows, self.linear.columns], BITS["I64"])

    def factors(self, linear: QuantizedLinear) -> Float32:
        """AWQ's factors of a linear's inputs; of several source modules their mean."""
        found = [self.statistics.awq[module] for module in linear.sources]
        return found[0] if len(found) == 1 else self.mean(found)

    def mean(self, factors: Sequence[Float32]) -> Float32:
        """The mean of factors as they would be stored, as it is stored."""
        stored = [as_torch(self.rounded(x), self.code).float().numpy() for x in factors]
        mean: Float32 = np.mean(stored, axis=0, dtype=np.float32)
        return as_torch(self.rounded(mean), self.code).float().numpy()  # type: ignore[no-any-return]

    def nvfp4(self, form: Format) -> None:
        """A scale for the whole weight, one for each group of it, and one for the input."""
        import torch

        divides = self.plan.target.layouts[form.name].scales[SECOND_SCALE].divides
        largest = max(
            as_torch(block, self.code).abs().max().item()
            for other in self.plan.linears
            if other.target in (self.target, *self.linear.alike)
            for module in other.sources
            for _, block in self.blocks(module)
        )
        second = nvfp4_second_scale(largest or 1.0, divides=divides)
        self.put(SECOND_SCALE, second.numpy())
        size = form.group_size or 1
        for module in self.linear.sources:
            found = [
                nvfp4_scales(as_torch(block, self.code), second, size, divides=divides)
                for _, block in self.blocks(module)
            ]
            bits = [x.view(torch.uint8).numpy() for x in found]
            self.values[f"{module}.{WEIGHT_SCALE}"] = np.concatenate(bits).reshape(-1)
        scale = nvfp4_second_scale(float(self.inputs.max()) or 1.0, divides=divides)
        self.put(INPUT_SCALE, scale.numpy())

    def smoother(self) -> Float32:
        """Per column wmax^(1 - alpha) / amax^alpha: the factor of the input."""
        import torch

        amax = torch.tensor(self.inputs)  # a copy: the statistics cannot be written to
        if not self.inputs.any():
            return np.ones(self.linear.columns, np.float32)
        if self.alpha == 1:
            smoother = 1 / amax
        else:
            wmax = torch.zeros(self.linear.columns)
            for module in self.linear.sources:
                for _, block in self.blocks(module):
                    wmax = torch.maximum(wmax, self.smooth(block).abs().amax(0).float().cpu())
            smoother = wmax.pow(1 - self.alpha) / amax.pow(self.alpha)
        if self.alpha > 0:
            smoother[amax == 0] = LARGEST_SMOOTHER
        clamped: Float32 = smoother.clamp(SMALLEST_SMOOTHER, LARGEST_SMOOTHER).numpy()
        return clamped

    def rounded(self, values: Float32) -> Bits:
        """Float32 values in the checkpoint's dtype."""
        return cast(values.view(BITS["F32"]), "F32", self.code)[0]

    def smooth(self, block: Bits, rows: Float32 | None = None) -> Any:
        """Rows of a weight on the device, with factors of columns and rows where there are any."""
        return smooth(block, self.code, self.inverse, self.device, rows)

    def blocks(self, module: str) -> Iterator[tuple[int, Bits]]:
        """A module's weight in the checkpoint's dtype: the first row, and the rows."""
        source = self.plan.source.tensors[f"{module}.weight"]
        overflowed = 0
        for row, block, loss in read_blocks(
            self.reader,
            source,
            0,
            source.shape[0],
            self.code,
            self.stop,
            block_bytes=self.block_bytes,
        ):
            overflowed += loss.overflowed
            for piece in pieces(block, self.device):
                yield row + piece.start, block[piece]
            self.progress(len(block) * row_bytes(source))
        if overflowed:
            self.overflowed[source.name] = overflowed


def _divided(largest: npt.ArrayLike, top: float) -> npt.NDArray[Any]:
    """Float32 maxima by the largest level; 1 where all is zero."""
    return np.where(np.equal(largest, 0), 1, np.divide(largest, np.float32(top)))
