"""The scales of one linear, from its weights and the inputs that calibration saw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from threading import Event

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


@dataclass(slots=True)
class LinearScales:
    """The scales of one linear."""

    target: str
    values: dict[str, Bits] = field(default_factory=dict)  # by name
    inverse: Float32 | None = None  # 1 / s, for SmoothQuant
    rows: dict[str, Float32] = field(default_factory=dict)  # factors of rows, by source module
    overflowed: dict[str, int] = field(default_factory=dict)  # lost in the cast, by source tensor


@dataclass(eq=False)
class LinearScaler:
    """Reads weights; its methods are called by all threads."""

    plan: Plan
    reader: Reader
    statistics: Statistics
    alpha: float
    device: str
    block_bytes: int
    progress: Progress
    stop: Event = field(default_factory=Event, init=False)

    def __post_init__(self) -> None:
        self.code = WEIGHT_DTYPES[self.plan.options.dtype]

    def compute(self, linear: QuantizedLinear, inputs: Float32) -> LinearScales:
        """Compute the scales of one linear; a failure stops the other workers."""
        scales = LinearScales(linear.target)
        try:
            form = self.plan.options.format
            if self.plan.smoothed:
                self.smoothquant(linear, inputs, scales)
            elif form is not None and form.weight == "int4" and form.smoothing is None:
                self.int4(linear, scales, form)
            elif form is not None and form.weight == "int4":
                self.awq(linear, inputs, scales, form)
            elif form is not None and form.weight == "e2m1":
                self.nvfp4(linear, inputs, scales, form)
            elif form is not None and form.per == "channel":
                self.channels(linear, scales, form)
            else:
                self.fp8(linear, inputs, scales)
        except BaseException:
            self.stop.set()
            raise
        return scales

    def fp8(self, linear: QuantizedLinear, inputs: Float32, scales: LinearScales) -> None:
        """One scale for the whole weight, fused or not, or each expert's, and one for its input."""
        largest = np.zeros(len(linear.groups), np.float32)
        for number, modules in enumerate(linear.groups):
            for module in modules:
                for _, block in self.blocks(module, scales):
                    amax = as_torch(block, self.code).to(self.device).abs().max().item()
                    largest[number] = np.maximum(largest[number], np.float32(amax))
        per_group = np.where(largest == 0, np.float32(1), largest / np.float32(E4M3_MAX))
        self.put(scales, f"{linear.target}.weights_scaling_factor", per_group)
        scale = inputs.max() / np.float32(E4M3_MAX) if inputs.any() else np.float32(1)
        self.put(scales, f"{linear.target}.activation_scaling_factor", scale)

    def channels(self, linear: QuantizedLinear, scales: LinearScales, form: Format) -> None:
        """A scale for each row of the weight."""
        top = np.float32(LARGEST[form.weight])
        for module in linear.sources:
            amax = [
                as_torch(block, self.code).to(self.device).abs().amax(1).float().cpu().numpy()
                for _, block in self.blocks(module, scales)
            ]
            largest = np.concatenate(amax)
            self.put(scales, f"{module}.{WEIGHT_SCALE}", np.where(largest == 0, 1, largest / top))

    def put(self, scales: LinearScales, name: str, values: npt.ArrayLike) -> None:
        """Add a scale in the dtype that it is stored in."""
        code = self.plan.scales[name].dtype
        bits = np.asarray(values, np.float32).reshape(-1).view(BITS["F32"])
        scales.values[name] = cast(bits, "F32", code)[0]

    def smoothquant(self, linear: QuantizedLinear, inputs: Float32, scales: LinearScales) -> None:
        """A smoothing vector for the input, then a scale for each row of the smoothed weight."""
        smoother = self.smoother(linear, inputs, scales)
        scales.inverse = np.float32(1) / smoother
        scales.values[f"{linear.target}.prequant_scaling_factor"] = self.rounded(smoother)
        with np.errstate(over="ignore"):  # an infinite scale is refused by name
            largest = as_torch(self.rounded((inputs * smoother).max(keepdims=True)), self.code)
        self.put(
            scales,
            f"{linear.target}.activation_scaling_factor",
            largest.float().numpy() / np.float32(INT8_MAX) if inputs.any() else np.float32(1),
        )
        for module in linear.sources:
            amax = np.empty(self.plan.source.tensors[f"{module}.weight"].shape[0], np.float32)
            for row, block in self.blocks(module, scales):
                smoothed = smooth(block, self.code, scales.inverse, self.device).float()
                amax[row : row + len(block)] = smoothed.abs().amax(1).cpu().numpy()
            per_row = np.where(amax == 0, np.float32(1), amax / np.float32(INT8_MAX))
            self.put(scales, f"{module}.weights_scaling_factor", per_row)

    def int4(self, linear: QuantizedLinear, scales: LinearScales, form: Format) -> None:
        """A scale for each group of the weight as it is, and the weight's shape."""
        for module in linear.sources:
            found = [
                int4_scales(as_torch(block, self.code).to(self.device), form.group_size or 1)
                for _, block in self.blocks(module, scales)
            ]
            values = np.concatenate([x.cpu().numpy() for x in found])
            self.put(scales, f"{module}.{WEIGHT_SCALE}", values)
        self.put_shape(linear, scales)

    def awq(
        self, linear: QuantizedLinear, inputs: Float32, scales: LinearScales, form: Format
    ) -> None:
        """The factors that calibration found, then a scale for each group of the smoothed one.

        Where a norm has the factors of several linears, they are the mean of what was found for
        each; the range of the inputs is the largest that any of these would give them.
        """
        group = self.sharing(linear)
        own = [self.factors(other) for other in group]
        smoother = self.smoother_of(linear)
        scales.inverse = np.float32(1) / smoother
        for fed, spans in linear.feeds:
            following = self.smoother_of(next(x for x in self.plan.linears if x.target == fed))
            for span in spans:
                module = span.source or ""
                rows = scales.rows.setdefault(module, np.ones(self.height(module), np.float32))
                rows[span.start : span.stop], following = np.split(following, [span.count])
        if (name := f"{linear.target}.{PRE_SCALE}") in self.plan.scales:
            scales.values[name] = self.rounded(smoother)
        largest = np.float32(0)
        for other in group if form.levels == 2 else (linear,):
            for module in other.sources:
                found = []
                for row, block in self.blocks(module, scales):
                    of_rows = scales.rows.get(module)
                    own_rows = None if of_rows is None else of_rows[row : row + len(block)]
                    smoothed = smooth(block, self.code, scales.inverse, self.device, own_rows)
                    largest = np.maximum(largest, np.float32(smoothed.abs().max().item()))
                    if other is linear:
                        found.append(int4_scales(smoothed, form.group_size or 1).cpu().numpy())
                if found:
                    self.put(scales, f"{module}.{WEIGHT_SCALE}", np.concatenate(found))
        self.put_shape(linear, scales)
        if form.levels == 2:
            self.put(scales, f"{linear.target}.{SECOND_SCALE}", largest / np.float32(E4M3_MAX))
        if form.inputs is not None:
            beyond = max((inputs * factors).max(keepdims=True) for factors in own)
            amax = as_torch(self.rounded(beyond), self.code)
            scale = amax.float().numpy() / np.float32(E4M3_MAX) if inputs.any() else np.float32(1)
            self.put(scales, f"{linear.target}.{INPUT_SCALE}", scale)

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

    def put_shape(self, linear: QuantizedLinear, scales: LinearScales) -> None:
        """Add the size of a weight where its scales have that."""
        if (name := f"{linear.target}.{SHAPE}") in self.plan.scales:
            rows = sum(map(self.height, linear.sources))
            scales.values[name] = np.array([rows, linear.columns], BITS["I64"])

    def factors(self, linear: QuantizedLinear) -> Float32:
        """AWQ's factors of a linear's inputs; of several source modules their mean."""
        found = [self.statistics.awq[module] for module in linear.sources]
        return found[0] if len(found) == 1 else self.mean(found)

    def mean(self, factors: Sequence[Float32]) -> Float32:
        """The mean of factors as they would be stored, as it is stored."""
        stored = [as_torch(self.rounded(x), self.code).float().numpy() for x in factors]
        mean: Float32 = np.mean(stored, axis=0, dtype=np.float32)
        return as_torch(self.rounded(mean), self.code).float().numpy()  # type: ignore[no-any-return]

    def nvfp4(
        self, linear: QuantizedLinear, inputs: Float32, scales: LinearScales, form: Format
    ) -> None:
        """A scale for the whole weight, one for each group of it, and one for the input."""
        import torch

        divides = self.plan.target.layouts[form.name].scales[SECOND_SCALE].divides
        largest = max(
            as_torch(block, self.code).abs().max().item()
            for other in self.plan.linears
            if other.target in (linear.target, *linear.alike)
            for module in other.sources
            for _, block in self.blocks(module, scales)
        )
        second = nvfp4_second_scale(largest or 1.0, divides=divides)
        self.put(scales, f"{linear.target}.{SECOND_SCALE}", second.numpy())
        for module in linear.sources:
            found = [
                nvfp4_scales(
                    as_torch(block, self.code), second, form.group_size or 1, divides=divides
                )
                for _, block in self.blocks(module, scales)
            ]
            bits = [x.view(torch.uint8).numpy() for x in found]
            scales.values[f"{module}.{WEIGHT_SCALE}"] = np.concatenate(bits).reshape(-1)
        scale = nvfp4_second_scale(float(inputs.max()) or 1.0, divides=divides)
        self.put(scales, f"{linear.target}.{INPUT_SCALE}", scale.numpy())

    def smoother(self, linear: QuantizedLinear, inputs: Float32, scales: LinearScales) -> Float32:
        """Per column wmax^(1 - alpha) / amax^alpha: the factor of the input."""
        import torch

        amax = torch.tensor(inputs)  # a copy: the statistics cannot be written to
        if not inputs.any():
            return np.ones(linear.columns, np.float32)
        if self.alpha == 1:
            smoother = 1 / amax
        else:
            wmax = torch.zeros(linear.columns)
            for module in linear.sources:
                for _, block in self.blocks(module, scales):
                    columns = as_torch(block, self.code).to(self.device).abs().amax(0).float()
                    wmax = torch.maximum(wmax, columns.cpu())
            smoother = wmax.pow(1 - self.alpha) / amax.pow(self.alpha)
        if self.alpha > 0:
            smoother[amax == 0] = LARGEST_SMOOTHER
        clamped: Float32 = smoother.clamp(SMALLEST_SMOOTHER, LARGEST_SMOOTHER).numpy()
        return clamped

    def rounded(self, values: Float32) -> Bits:
        """Float32 values in the checkpoint's dtype."""
        return cast(values.view(BITS["F32"]), "F32", self.code)[0]

    def blocks(self, module: str, scales: LinearScales) -> Iterator[tuple[int, Bits]]:
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
            scales.overflowed[source.name] = overflowed
