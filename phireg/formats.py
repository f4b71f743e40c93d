"""The quantization formats: what each one stores of a linear, and what it computes.

How a reader's files name and shape the tensors of a format is not stated here. A grid times a
scaling factor gives the values: ``value = level * scale``, and ``level = round(value / scale)`` to
nearest, ties to even, saturating at the ends of the grid. Scales are float32 unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

Grid: TypeAlias = Literal["e4m3", "int8", "int4", "e2m1"]
"""e4m3 and e2m1 are floating-point; integers have one more negative level than positive ones."""

LARGEST: Mapping[Grid, float] = {"e4m3": 448.0, "int8": 127.0, "int4": 7.0, "e2m1": 6.0}
"""The level that the largest magnitude (amax) becomes: scale = amax / this."""

WEIGHT_BITS: Mapping[Grid, int] = {"e4m3": 8, "int8": 8, "int4": 4, "e2m1": 4}


@dataclass(frozen=True, slots=True)
class Inputs:
    """How the inputs of a linear are quantized."""

    grid: Grid
    scale: Literal["tensor", "token", "group"]
    """What has one: the tensor, a calibrated number; every token, its own amax, computed when it
    runs; or every group, as in a weight of two levels (see Format), the second one calibrated."""


@dataclass(frozen=True, slots=True)
class Format:
    """A value of ``--qformat``."""

    name: str
    weight: Grid  # levels of the weights
    per: Literal["tensor", "channel", "group"]  # what has a scale: all, a row, a group in it
    inputs: Inputs | None  # None for floating-point products
    summary: str  # one line for tables
    group_size: int | None = None  # inputs
    smoothing: Literal["smoothquant", "awq"] | None = None
    """How a factor of each input channel is found, by which inputs are multiplied and weights
    divided: from the maxima of inputs (and weights), or AWQ's, by searching the exponent with the
    least output error."""
    levels: Literal[1, 2] = 1
    """2 if the scales of groups are e4m3 numbers (or integers of a product in e4m3) times one
    float32 scale of the tensor."""

    @property
    def calibrated(self) -> bool:
        """True if the scales need sample texts."""
        static = self.inputs is not None and self.inputs.scale != "token"
        return static or self.smoothing is not None

    @property
    def rounds_products(self) -> bool:
        """True if products of levels and scales are rounded once more, to integers of e4m3."""
        return self.weight == "int4" and self.levels == 2


_STATIC_E4M3, _TOKEN_E4M3 = Inputs("e4m3", "tensor"), Inputs("e4m3", "token")

FORMATS: Mapping[str, Format] = {
    form.name: form
    for form in (
        Format("fp8", "e4m3", "tensor", _STATIC_E4M3, "FP8 weights and inputs, a scale each"),
        Format("fp8_pc_pt", "e4m3", "channel", _TOKEN_E4M3, "FP8, scales per channel and token"),
        Format("fp8_dynamic", "e4m3", "channel", _TOKEN_E4M3, "FP8, scales per channel and token"),
        Format(
            *("int8_sq", "int8", "channel", Inputs("int8", "tensor")),
            "INT8 weights and inputs, SmoothQuant",
            smoothing="smoothquant",
        ),
        Format(
            *("w8a8", "int8", "channel", Inputs("int8", "token")),
            "INT8 weights and inputs, scales per channel and token",
        ),
        Format("int8_wo", "int8", "channel", None, "INT8 weights"),
        Format("int4_wo", "int4", "channel", None, "INT4 weights"),
        Format(
            *("w4a16", "int4", "group", None, "INT4 weights in groups of 128, rounded to nearest"),
            group_size=128,
        ),
        Format(
            *("int4_awq", "int4", "group", None, "INT4 weights in groups of 128, AWQ"),
            group_size=128,
            smoothing="awq",
        ),
        Format(
            *("w4a8_awq", "int4", "group", _STATIC_E4M3),
            "INT4 weights in groups of 128, FP8 inputs, AWQ",
            group_size=128,
            smoothing="awq",
            levels=2,
        ),
        Format(
            *("nvfp4", "e2m1", "group", Inputs("e2m1", "group")),
            "FP4 weights and inputs in groups of 16",
            group_size=16,
            levels=2,
        ),
    )
}
"""By ``--qformat``. ``fp8_pc_pt`` and ``fp8_dynamic`` are ModelOpt's and compressed-tensors' names
of one arithmetic."""
