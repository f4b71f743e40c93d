"""Weights as levels of a grid and scales: what they stand for, and how a GPU's memory holds them.

A weight is ``level * group_scale * scale``, of which every format has one or both scales. Integers
and e2m1 lie in little-endian words of 32 bits: of each run of four words, word c holds input
4 n + c in its n-th bits from below, four or eight of them, so that four words at once go with four
inputs at once. A last run is filled up. Integers are stored with half of their range added, e2m1 as
its sign and its place among ``E2M1``. The kernels of ``cuda`` read the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from phireg.formats import Grid

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of e2m1 by the lower three bits of a level; the fourth is the sign."""

BITS: dict[str, int] = {"int8": 8, "int4": 4, "e2m1": 4}
"""Bits of a level of the grids that lie in words."""

_GRIDS: tuple[Grid, ...] = ("e4m3", "int8", "int4", "e2m1")
_SCALE, _GROUP_SCALE = "weights_scaling_factor", "group_scaling_factor"


@dataclass(frozen=True, slots=True)
class Levels:
    """A quantized weight [rows, inputs], or a stack of the experts' with one more dimension.

    Attributes:
        grid: what the levels are.
        levels: [..., rows, inputs], of a dtype that has the grid's values (e4m3 for e2m1, int8 for
            int4).
        scale: float32 [..., rows], or [..., 1] for all rows; None is 1.
        group_scale: [..., rows, groups of consecutive inputs]; None is 1.
    """

    grid: Grid
    levels: Tensor
    scale: Tensor | None = None
    group_scale: Tensor | None = None

    def values(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, multiplied in float32 and rounded once."""
        values = self.levels.float()
        if self.group_scale is not None:
            size = values.shape[-1] // self.group_scale.shape[-1]
            values = values * self.group_scale.float().repeat_interleave(size, dim=-1)
        if self.scale is not None:
            values = values * self.scale[..., None]
        return values.to(dtype)

    def packed(self, linear: str) -> dict[str, Tensor]:
        """Return the tensors a GPU keeps, by names of which one says the grid."""
        levels = self.levels
        if self.grid in BITS:
            levels = _pack(_codes(self.grid, levels), run_of(self.grid))
        kept = {f"{linear}.{self.grid}": levels.contiguous()}
        if self.scale is not None:
            kept[f"{linear}.{_SCALE}"] = self.scale.contiguous()
        if self.group_scale is not None:
            kept[f"{linear}.{_GROUP_SCALE}"] = self.group_scale.contiguous()
        return kept


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight as ``Levels.packed`` keeps it; ``data`` is [..., rows, inputs or half of them]."""

    grid: Grid
    data: Tensor
    scale: Tensor | None
    group_scale: Tensor | None

    def levels(self, inputs: int) -> Levels:
        """Return the weight with its levels apart; ``inputs`` are those of a row."""
        data = self.data
        if self.grid in BITS:
            codes = data.unflatten(-1, (-1, 4, 4)).transpose(-1, -2)
            if BITS[self.grid] == 4:
                codes = torch.stack((codes & 15, codes >> 4), dim=-2).flatten(-3, -2)
            codes = codes.flatten(-3)[..., :inputs]
            if self.grid != "e2m1":
                data = (codes - 2 ** (BITS[self.grid] - 1)).view(torch.int8)
            else:
                table = torch.tensor(E2M1, device=data.device).to(torch.float8_e4m3fn)
                data = torch.cat((table, (-table.float()).to(table.dtype)))[codes.long()]
        return Levels(self.grid, data, self.scale, self.group_scale)


def find_packed(weights: Mapping[str, Tensor], linear: str) -> Packed | None:
    """Return a linear's packed weight, or None where ``linear.weight`` has its values."""
    for grid in _GRIDS:
        data = weights.get(f"{linear}.{grid}")
        if data is not None:
            scales = (weights.get(f"{linear}.{part}") for part in (_SCALE, _GROUP_SCALE))
            return Packed(grid, data, *scales)
    return None


def is_per_expert(name: str) -> bool:
    """Return whether a tensor of experts' linears has an entry for each of them."""
    part = name.rpartition(".")[2]
    stacked = ("weight", "smoothing", _SCALE, _GROUP_SCALE, *_GRIDS)
    return part in stacked or part.startswith("inputs_")


def run_of(grid: Grid) -> int:
    """Return the inputs that are packed together."""
    return 4 * 32 // BITS[grid]


def packed_bytes(grid: Grid, shape: tuple[int, ...]) -> int:
    """Return the bytes that packed levels take."""
    *rows, inputs = shape
    if grid in BITS:
        inputs = -(-inputs // run_of(grid)) * 16
    return math.prod(rows) * inputs


def _pack(codes: Tensor, run: int) -> Tensor:
    """Return unsigned codes, uint8 [..., inputs], in words: bytes [..., 16 for a run]."""
    runs = functional.pad(codes, (0, -codes.shape[-1] % run)).unflatten(-1, (-1, 4, run // 16, 4))
    stored = runs[..., 0, :]
    if run == 32:
        stored = stored | (runs[..., 1, :] << 4)
    return stored.transpose(-1, -2).flatten(-3)


def _codes(grid: Grid, levels: Tensor) -> Tensor:
    """Return the bits that stand for levels, uint8."""
    if grid != "e2m1":
        return levels.view(torch.uint8) + 2 ** (BITS[grid] - 1)
    values = levels.float()
    table = torch.tensor(E2M1, device=levels.device)
    place = torch.bucketize(values.abs(), table).to(torch.uint8)
    return place | (values.signbit().to(torch.uint8) << 3)
