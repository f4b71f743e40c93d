"""Weights as levels of a grid and scales: what they stand for, and how a GPU's memory holds them.

A weight is ``level * group_scale * scale``, of which every format has one or both scales. Levels of
e4m3 and int8 lie as they are. Those of four bits are in little-endian words of 32 bits, integers
with half of their range added, e2m1 as its sign and its place among ``E2M1``. The kernels of
``cuda`` read the same.

Four bits: tiles of 16 rows and 64 inputs are 128 words, as the matrix units of a GPU want a
tile's operands. Word 16 g + 4 t + j has of rows g and g + 8 (g < 8) the inputs 16 j + 2 t + {0, 1}
and 16 j + 8 + 2 t + {0, 1} (t, j < 4). Its halves are the two of a pair of inputs; in each, the
lowest bits are of the first pair, row g before row g + 8. A row's tiles are filled up to an even
number, by bits of zero whose inputs are none. The e4m3 scales of e2m1's groups of 16 are likewise,
for two tiles 128: scale 16 g + 4 t + 2 r + c is that of row g + 8 r and group 2 t + c.
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

TILED = ("int4", "e2m1")
"""Grids of four bits."""

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
        group_scale: [..., rows, groups of consecutive inputs], of e2m1 numbers of e4m3; None is 1.
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
        data, groups = self.levels, self.group_scale
        if self.grid in TILED:
            data = _tiles(_codes(self.grid, data))
        if self.grid == "e2m1" and groups is not None:
            groups = _scale_tiles(groups.to(torch.float8_e4m3fn))
        kept = {f"{linear}.{self.grid}": data.contiguous()}
        if self.scale is not None:
            kept[f"{linear}.{_SCALE}"] = self.scale.contiguous()
        if groups is not None:
            kept[f"{linear}.{_GROUP_SCALE}"] = groups.contiguous()
        return kept


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight as ``Levels.packed`` keeps it.

    ``data`` is [..., rows, inputs], in bytes of levels, or [..., rows / 16, tiles, 512]; of the
    latter, ``group_scale`` of e2m1 is [..., rows / 16, tiles / 2, 128].
    """

    grid: Grid
    data: Tensor
    scale: Tensor | None
    group_scale: Tensor | None

    def levels(self, inputs: int) -> Levels:
        """Return the weight with its levels apart; ``inputs`` are those of a row."""
        data, groups = self.data, self.group_scale
        if self.grid in TILED:
            *stack, tiles, _, _ = data.shape
            lanes = data.reshape(-1, tiles, data.shape[-2], 8, 4, 4, 2, 2)
            codes = torch.stack((lanes & 15, lanes >> 4), dim=2).permute(0, 1, 2, 4, 3, 6, 8, 5, 7)
            data = codes.reshape(*stack, 16 * tiles, -1)[..., :inputs]
            if groups is not None and self.grid == "e2m1":
                lanes = groups.view(torch.uint8).reshape(-1, tiles, groups.shape[-2], 8, 4, 2, 2)
                lanes = lanes.permute(0, 1, 5, 3, 2, 4, 6).reshape(*stack, 16 * tiles, -1)
                groups = lanes[..., : inputs // 16].view(groups.dtype)
            if self.grid == "int4":
                data = (data - 8).view(torch.int8)
            else:
                table = torch.tensor(E2M1, device=data.device).to(torch.float8_e4m3fn)
                data = torch.cat((table, (-table.float()).to(table.dtype)))[data.long()]
        return Levels(self.grid, data, self.scale, groups)


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


def packed_bytes(grid: Grid, shape: tuple[int, ...]) -> int:
    """Return the bytes that packed levels take."""
    *rows, inputs = shape
    if grid in TILED:
        inputs = -(-inputs // 128) * 64
    return math.prod(rows) * inputs


def _tiles(codes: Tensor) -> Tensor:
    """Return codes [..., rows, inputs] in tiles: bytes [..., rows / 16, tiles, 512]."""
    *stack, rows, inputs = codes.shape
    tiles = -(-inputs // 128) * 2
    filled = functional.pad(codes, (0, 64 * tiles - inputs))
    # Of rows: tiles, which eight, g. Of inputs: tiles, j, which eight, t, which of a pair.
    low, high = filled.reshape(-1, rows // 16, 2, 8, tiles, 4, 2, 4, 2).unbind(2)
    lanes = (low | (high << 4)).permute(0, 1, 3, 2, 6, 4, 7, 5)
    return lanes.reshape(*stack, rows // 16, tiles, 512)


def _scale_tiles(scales: Tensor) -> Tensor:
    """Return scales of e2m1 [..., rows, groups] in tiles: [..., rows / 16, pairs of tiles, 128]."""
    *stack, rows, groups = scales.shape
    filled = functional.pad(scales.view(torch.uint8), (0, -groups % 8))
    lanes = filled.reshape(-1, rows // 16, 2, 8, filled.shape[-1] // 8, 4, 2)
    lanes = lanes.permute(0, 1, 4, 3, 5, 2, 6)
    return lanes.reshape(*stack, rows // 16, -1, 128).view(scales.dtype)


def _codes(grid: Grid, levels: Tensor) -> Tensor:
    """Return the four bits that stand for levels, uint8."""
    if grid != "e2m1":
        return levels.view(torch.uint8) + 8
    values = levels.float()
    table = torch.tensor(E2M1, device=levels.device)
    place = torch.bucketize(values.abs(), table).to(torch.uint8)
    return place | (values.signbit().to(torch.uint8) << 3)
