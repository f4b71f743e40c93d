"""Linears on a GPU, by weights as ``levels`` packs them: the kernels of ``products``.

One token's product reads the packed weight at its memory's speed; those of a few tokens go through
the matrix units, level by level. More tokens take the ordinary product of an expanded weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional

from phireg.executor.blocks import Weights
from phireg.executor.cuda import kernels, products
from phireg.executor.cuda.launch import GATED, TYPES, Rounding, counters, launch_options
from phireg.executor.levels import BITS, find_packed

# Tokens up to which reading the packed weight once more for every so many is the fastest.
FEW_TOKENS = 64
# A product of a few tokens is split until so many programs share it, which fill a GPU.
_PROGRAMS = 160


# Of one token's product: the fastest of some thirty tried on an H100 for each linear of Phi-3-mini.
# Many rows, few rows, two rows for an output, and many inputs.
_TILES = {
    "none": ((4, 1024, 1, 4), (4, 1024, 1, 4), (4, 1024, 1, 4), (4, 1024, 2, 4)),
    "e4m3": ((4, 1024, 2, 2), (4, 1024, 2, 2), (2, 512, 2, 1), (4, 1024, 2, 2)),
    "int8": ((4, 128, 1, 1), (4, 256, 3, 2), (4, 256, 1, 2), (4, 512, 1, 4)),
    "int4": ((4, 128, 1, 1), (8, 512, 1, 4), (4, 128, 1, 1), (8, 512, 1, 4)),
    "e2m1": ((4, 128, 1, 1), (8, 512, 1, 4), (2, 128, 1, 1), (4, 256, 2, 2)),
}


@dataclass(frozen=True, slots=True)
class Experts:
    """The pairs of a token and an expert that a product is made for.

    Attributes:
        chosen: the expert of each pair, int64 [pairs], numbered over all ranks.
        first: the number of this rank's first expert.
        per_token: pairs that share a row of the inputs, one after the other.
    """

    chosen: Tensor
    first: int
    per_token: int


@dataclass(frozen=True, slots=True)
class _Stored:
    """A weight as the kernels take it: words of levels, or levels of one byte, or values."""

    grid: str
    data: Tensor
    scale: Tensor | None
    group_scale: Tensor | None
    rows: int
    inputs: int

    @property
    def constants(self) -> dict[str, Any]:
        scales = 0
        if self.scale is not None:
            scales = 1 if self.scale.shape[-1] == 1 else 2
        groups = self.group_scale
        group = 0 if groups is None else self.inputs // groups.shape[-1]
        return {
            "INPUTS": self.inputs, "WIDTH": self.data.shape[-1], "GRID": self.grid,
            "BITS": BITS.get(self.grid, 0), "SCALES": scales, "GROUP": group,
        }  # fmt: skip


def matvec(
    weights: Weights,
    name: str,
    x: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    x_scale: Tensor | None = None,
    activation: str = "none",
    limit: float | None = None,
    rounding: Rounding | None = None,
    experts: Experts | None = None,
) -> Tensor:
    """Return one token's X W^T + b, and the MLP's nonlinearity on it.

    ``x`` is one row, contiguous, in the compute dtype; with ``x_scale`` it has levels, as another
    kernel's ``rounding`` leaves them. ``dtype`` is the compute dtype. ``activation`` is "none" or
    as in ``launch.activate``; gated ones halve the rows. With ``experts`` the weight is a stack,
    and x and the result have a row for each token and each pair.
    """
    stored = _stored(weights, name, x.shape[-1])
    outputs = stored.rows // 2 if activation in GATED else stored.rows
    pairs = 1 if experts is None else experts.chosen.numel()
    shape = (*x.shape[:-1], outputs) if experts is None else (pairs, outputs)
    out = torch.empty(shape, dtype=Rounding.kept_in(rounding, dtype), device=x.device)
    rows, block, depth, warps = _tile(stored, activation in GATED)
    products.matvec_kernel[(triton.cdiv(outputs, rows), pairs)](
        *_pointers(x, stored, x_scale, bias, rounding), x if experts is None else experts.chosen,
        out, outputs, math.inf if limit is None else limit, experts.first if experts else 0,
        stored.data.shape[0], **stored.constants, X_SCALE=x_scale is not None,
        BIAS=bias is not None, KIND=activation, **Rounding.constants(rounding, "OUT"),
        TYPE=TYPES[dtype], PER_TOKEN=experts.per_token if experts else 0, ROWS=rows, DEPTH=depth,
        BLOCK=min(block, triton.next_power_of_2(stored.data.shape[-1])),
        **launch_options(x.device, warps),
    )  # fmt: skip
    return out


def product(
    weights: Weights, name: str, x: Tensor, bias: Tensor | None, x_scale: Tensor | None = None
) -> Tensor:
    """Return X W^T + b of a few tokens [..., inputs], like ``matvec``."""
    stored = _stored(weights, name, x.shape[-1])
    tokens = x.numel() // stored.inputs
    out = torch.empty((*x.shape[:-1], stored.rows), dtype=x.dtype, device=x.device)
    width, rows, block = stored.data.shape[-1], 64, 128
    if stored.grid in BITS:
        # Words; in float32 more of them gave wrong sums on an H100 (Triton 3.6).
        levels = 32 // BITS[stored.grid]
        block = 16 if x.dtype == torch.float32 else 64 if stored.grid == "int8" else 32
        groups = stored.group_scale
        if groups is not None and stored.inputs // groups.shape[-1] >= 16 * levels:
            block = 16  # of one scale
        x = functional.pad(x, (0, missing)) if (missing := -stored.inputs % (levels * block)) else x
        x = x.unflatten(-1, (-1, block // 4, levels, 4)).transpose(-2, -3).contiguous()
    tiles, splits = triton.cdiv(stored.rows, rows), 1
    while tiles * splits < _PROGRAMS and splits < 16 and 2 * splits * block <= width:
        splits *= 2
    # Inputs in float32 would take more shared memory than Ada's multiprocessors have.
    widest = 32 if x.dtype == torch.float32 else 64
    tile = min(widest, max(16, triton.next_power_of_2(tokens)))
    columns = triton.cdiv(tokens, tile)
    parts = out if splits == 1 else x.new_empty(splits * out.numel(), dtype=torch.float32)
    products.product_kernel[(tiles, splits, columns)](
        *_pointers(x, stored, x_scale, bias, None), out, parts, counters(x.device), tokens,
        stored.rows, math.inf, **stored.constants, X_SCALE=x_scale is not None,
        BIAS=bias is not None, KIND="none", **Rounding.constants(None, "OUT"), ROWS=rows,
        BLOCK=block, TOKENS=tile, SPLITS=splits, num_stages=3, **launch_options(x.device, 4),
    )  # fmt: skip
    return out


def expanded(weights: Weights, name: str, inputs: int, dtype: torch.dtype) -> Tensor:
    """Return ``quantized.weight_values``, by one kernel."""
    if find_packed(weights, name) is None:
        return weights[f"{name}.weight"]
    return _values(_stored(weights, name, inputs), dtype)


def cache_values(levels: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the keys or values of a cache [B, G, C, D] of levels, in the compute dtype."""
    rows = levels.flatten(0, 1).flatten(1)
    stored = _Stored("none", rows, scale, None, *rows.shape)
    return _values(stored, dtype).view_as(levels)


def _values(stored: _Stored, dtype: torch.dtype) -> Tensor:
    out = torch.empty((stored.rows, stored.inputs), dtype=dtype, device=stored.data.device)
    block = min(1024, triton.next_power_of_2(stored.inputs))
    scales = (out if scale is None else scale for scale in (stored.scale, stored.group_scale))
    products.expand_kernel[(stored.rows, triton.cdiv(stored.inputs, block))](
        stored.data, *scales, out, **stored.constants, BLOCK=block, **launch_options(out.device, 4)
    )
    return out


def route(scores: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return ``blocks.route`` of float32 [tokens, experts]."""
    tokens, experts = scores.shape
    chosen = torch.empty((tokens, 2), dtype=torch.int64, device=scores.device)
    shares = torch.empty((tokens, 2), dtype=torch.float32, device=scores.device)
    products.route_kernel[(tokens,)](
        scores, chosen, shares, experts, epsilon, BLOCK=triton.next_power_of_2(experts),
        **launch_options(scores.device, 1),
    )  # fmt: skip
    return chosen, shares


def combine(outputs: Tensor, shares: Tensor) -> Tensor:
    """Return the sums [tokens, width] of each token's ``outputs`` [pairs, width] by ``shares``."""
    tokens, per_token = shares.shape
    width, block = outputs.shape[-1], 256
    out = torch.empty((tokens, width), dtype=outputs.dtype, device=outputs.device)
    kernels.combine_kernel[(tokens, triton.cdiv(width, block))](
        outputs, shares, out, width, PER_TOKEN=per_token, BLOCK=block,
        **launch_options(out.device, 1),
    )  # fmt: skip
    return out


def _pointers(
    x: Tensor,
    stored: _Stored,
    x_scale: Tensor | None,
    bias: Tensor | None,
    rounding: Rounding | None,
) -> tuple[Tensor, ...]:
    """Return the kernels' first arguments; what there is none of is never read."""
    optional = (stored.scale, stored.group_scale, x_scale, bias)
    found = (x if tensor is None else tensor for tensor in optional)
    return (x, stored.data, *found, *Rounding.pointers(rounding, x))


def _tile(stored: _Stored, gated: bool) -> tuple[int, int, int, int]:
    """Return rows, columns (inputs or words), steps in flight and warps of one program."""
    plain, short, paired, long = _TILES[stored.grid]
    if stored.inputs > 4096:
        return long
    if gated:
        return paired
    return short if stored.rows <= 4096 else plain


def _stored(weights: Weights, name: str, inputs: int) -> _Stored:
    packed = find_packed(weights, name)
    if packed is None:
        data = weights[f"{name}.weight"]
        return _Stored("none", data, None, None, data.shape[-2], inputs)
    data = packed.data
    if packed.grid in BITS:
        data = data.view(torch.int32)
    return _Stored(packed.grid, data, packed.scale, packed.group_scale, data.shape[-2], inputs)
