"""Quantizing blocks of weights with known scales.

The arithmetic is that of the exporters TensorRT-LLM's reader was written for: FP8 divides in
float32 and rounds once, to the nearest e4m3; INT8 SmoothQuant multiplies by the reciprocal of the
smoothing vector, rounds to the checkpoint's dtype, divides by the row's scale and rounds to the
nearest integer, ties to even.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from phireg.conversion.cast import Bits, Float32
from phireg.conversion.groups import column_pairs, row_pairs, to_e2m1, to_int4, words
from phireg.dtypes import BITS, E4M3_BEYOND, E4M3_MAX, WEIGHT_DTYPES, as_torch
from phireg.findings import Finding
from phireg.planning.model import Plan
from phireg.targets.target import SECOND_SCALE, WEIGHT_SCALE

# Elements quantized at a time on a CPU: float32 copies of them stay small.
PIECE = 128 * 1024

CPU = "cpu"
"""The name of a device. A GPU computes the same bits: every step is one IEEE operation per element,
or a maximum."""


@dataclass(frozen=True, slots=True, eq=False)
class Scales:
    """The scales of a plan, all of them checked."""

    values: Mapping[str, Bits]
    """By name in the plan's ``scales``, of the dtype named there."""
    inverse: Mapping[str, Float32]
    """By target of a SmoothQuant linear: 1 / s per source column, the factor of its weight. The
    float32 s itself is not in the checkpoint, only rounded."""
    rows: Mapping[str, Float32] = field(default_factory=dict)
    """By source module: factors of its rows, where they have those of the next linear's inputs."""
    findings: tuple[Finding, ...] = ()
    """Warnings about scales."""

    def float32(self, name: str) -> Float32:
        """A scale that is stored in float32."""
        return self.values[name].view(np.float32)


class WeightQuantizer:
    """Quantizes the weights of one plan with known scales; called by all workers."""

    def __init__(self, plan: Plan, scales: Scales, device: str = CPU) -> None:
        self.device = device
        self._code = WEIGHT_DTYPES[plan.options.dtype]
        self._scales = scales
        self._codes = plan.scales
        self._form = plan.options.format
        self._layout = plan.target.layouts.get(plan.options.qformat or "")
        self._group = {  # of a source module, in its target's scales
            module: number
            for linear in plan.linears
            for number, modules in enumerate(linear.groups)
            for module in modules
        }
        self.findings = scales.findings

    def scale(self, name: str) -> Bits:
        """All elements of one of the plan's scales."""
        return self._scales.values[name]

    def weight(self, target: str, source: str, row: int, block: Bits) -> tuple[Bits, int]:
        """Quantize rows of ``source`` from ``row`` on, which the output ``target`` gets.

        Takes them in the checkpoint's dtype, [rows, columns]; returns them on the quantized grid,
        and the number of elements beyond its ends.
        """
        linear, module = target.rpartition(".")[0], source.removesuffix(".weight")
        if self._form is not None and self._form.per == "group":
            return self._grouped(linear, module, row, block)
        if self._form is not None and self._form.per == "channel":
            rows = self._float32(f"{module}.{WEIGHT_SCALE}")[row : row + len(block)]
            if self._form.weight == "e4m3":
                return to_e4m3(block, self._code, rows[:, None], self.device)
            inverse = self._scales.inverse.get(linear)
            return to_int8(block, self._code, inverse, rows, self.device)
        scale = self._float32(f"{linear}.{WEIGHT_SCALE}")[self._group[module]]
        return to_e4m3(block, self._code, scale.reshape(1, 1), self.device)

    def _float32(self, name: str) -> Float32:
        """A scale, whatever it is stored in."""
        values: Float32 = (
            as_torch(self._scales.values[name], self._codes[name].dtype).float().numpy()
        )
        return values

    def folded(self, factor: str, row: int, block: Bits) -> Bits:
        """Rows of a norm, from ``row`` on, times a scale's elements, rounded to their dtype."""
        import torch

        scale = as_torch(self._scales.values[factor][row : row + len(block)], self._code)
        product: Bits = (as_torch(block, self._code) * scale[:, None]).view(torch.uint8).numpy()
        return product.view(block.dtype)

    def _grouped(self, linear: str, module: str, row: int, block: Bits) -> tuple[Bits, int]:
        """Quantize rows to levels of four bits, packed as the target has them."""
        import torch

        assert self._form is not None and self._layout is not None
        groups = block.shape[1] // (self._form.group_size or 1)
        name = f"{module}.{WEIGHT_SCALE}"
        own = self._scales.values[name][row * groups : (row + len(block)) * groups]
        inverse, rows = self._scales.inverse.get(linear), self._scales.rows.get(module)
        stored, saturated = [], 0
        for piece in pieces(block, self.device, 2):
            part = own[piece.start * groups : piece.stop * groups]
            own_rows = None if rows is None else rows[row + piece.start :][: len(block[piece])]
            weight = smooth(block[piece], self._code, inverse, self.device, own_rows)
            if self._form.weight == "e2m1":
                scales = as_torch(part, "F8_E4M3").to(self.device).reshape(-1, groups)
                second = torch.from_numpy(self._scales.float32(f"{linear}.{SECOND_SCALE}"))
                divides = self._layout.scales[SECOND_SCALE].divides
                levels, beyond = to_e2m1(weight, scales, second.to(self.device), divides=divides)
            else:
                scales = as_torch(part, self._codes[name].dtype).float().reshape(-1, groups)
                levels, beyond = to_int4(weight, scales.to(self.device))
            saturated += beyond
            stored.append(_PACKED[self._layout.packing or ""](levels).cpu().numpy())
        packed = np.concatenate(stored)
        return packed.view(BITS[self._layout.weight or ""]), saturated


_PACKED = {"rows": row_pairs, "columns": column_pairs, "words": words}


def pieces(block: Bits, device: str = CPU, multiple: int = 1) -> Iterator[slice]:
    """Whole rows of a block, on a CPU few; each piece has a multiple of ``multiple`` if it can."""
    step = max(1, PIECE // block.shape[1] if device == CPU else len(block))
    step += -step % multiple
    for start in range(0, len(block), step):
        yield slice(start, start + step)


def to_e4m3(block: Bits, code: str, scale: Float32, device: str = CPU) -> tuple[Bits, int]:
    """W / scale as the nearest e4m3, +-448 at the ends, and the number beyond them."""
    import torch

    quantized = np.empty(block.shape, BITS["F8_E4M3"])
    saturated = 0
    divisors = torch.tensor(scale, device=device)  # by a number, CUDA multiplies by 1 / it
    for piece in pieces(block, device):
        divisor = divisors if divisors.numel() == 1 else divisors[piece]
        scaled = as_torch(block[piece], code).to(device).float() / divisor
        beyond = int((scaled.abs() >= E4M3_BEYOND).sum())
        if beyond:
            scaled = scaled.clamp(-E4M3_MAX, E4M3_MAX)
            saturated += beyond
        quantized[piece] = scaled.to(torch.float8_e4m3fn).view(torch.uint8).cpu().numpy()
    return quantized, saturated


def to_int8(
    block: Bits, code: str, inverse: Float32 | None, scales: Float32, device: str = CPU
) -> tuple[Bits, int]:
    """The smoothed W / scale of its row as int8, rounded to nearest, ties to even.

    Takes W [rows, columns] of dtype ``code``, 1 / s [columns] or None, and scales [rows]; returns
    the bits, and the number of elements beyond the ends.
    """
    import torch

    quantized = np.empty(block.shape, BITS["I8"])
    saturated = 0
    by_row = torch.from_numpy(scales)[:, None].to(device)
    for piece in pieces(block, device):
        weight = smooth(block[piece], code, inverse, device)
        levels = (weight.float() / by_row[piece]).round()
        saturated += int(((levels > 127) | (levels < -128)).sum())
        quantized[piece] = levels.clamp(-128, 127).to(torch.int8).view(torch.uint8).cpu().numpy()
    return quantized, saturated


def smooth(
    block: Bits, code: str, inverse: Float32 | None, device: str = CPU, rows: Float32 | None = None
) -> Any:
    """W * (1 / s) per column, times factors of rows, rounded to W's dtype: a torch tensor of it.

    Without 1 / s it is W.
    """
    import torch

    weight = as_torch(block, code).to(device)
    if inverse is None:
        return weight
    smoothed = weight.float() * torch.from_numpy(inverse).to(device)
    if rows is not None:
        smoothed *= torch.from_numpy(rows)[:, None].to(device)
    return smoothed.to(weight.dtype)
