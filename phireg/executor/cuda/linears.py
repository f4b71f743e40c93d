"""Linears on a GPU, by weights as ``levels`` packs them: the kernels of ``products`` and ``tiles``.

Products of one token and of a few read the packed weight, those of a few through the matrix units,
as all of tiles do. More tokens take the ordinary product of an expanded weight, unless inputs and
weight are int8, of which GPUs have products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from phireg.executor.blocks import Weights
from phireg.executor.cuda import integers, kernels, products, tiles
from phireg.executor.cuda.launch import GATED, Rounding, counters, launch_options
from phireg.executor.levels import TILED, find_packed

# Tokens up to which reading the packed weight once more for every so many is the fastest.
FEW_TOKENS = 64
# Tiles of inputs that a program of a few tokens' product takes in one step.
_TOGETHER = 4
_TYPES = {
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16
}  # fmt: skip

# Of one token's product: the fastest of those tried in a whole step of Phi-3-mini and -small, on an
# H200. Many rows, few rows, two rows for an output, and many inputs.
_BLOCKS = {
    "none": ((4, 1024, 1, 4), (4, 1024, 1, 4), (4, 1024, 1, 4), (4, 1024, 2, 4)),
    "e4m3": ((4, 1024, 2, 2), (4, 1024, 2, 2), (2, 512, 2, 1), (4, 1024, 2, 2)),
}
# Warps, and steps asked for in advance, of int8.
_WARPS = ((4, 6), (4, 12), (4, 4), (8, 8))
# The same, and the most steps whose inputs are read at once. Groups are int4's.
_STEPS = {
    "int4": ((4, 12, 12), (4, 12, 12), (4, 8, 12), (8, 16, 16)),
    "groups": ((8, 4, 2), (8, 6, 3), (4, 2, 6), (8, 16, 4)),
    "e2m1": ((4, 2, 2), (4, 6, 6), (4, 3, 1), (8, 4, 2)),
}
# In float32 inputs take shared memory, of which there is so much.
_STEPS_IN_FLOAT32 = (4, 1, 1)


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
    """A weight as the kernels take it: tiles of levels, levels of one byte, or values."""

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
        tiled = {"GRID": self.grid, "GROUP": self.group} if self.grid in TILED else {}
        return {"INPUTS": self.inputs, "SCALES": scales, **tiled}

    @property
    def group(self) -> int:
        """The inputs to a scale, or 0."""
        if self.grid == "e2m1":
            return 16
        return 0 if self.group_scale is None else self.inputs // self.group_scale.shape[-1]

    def pointers(
        self, x: Tensor, x_scale: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return the kernels' first arguments; what there is none of is never read."""
        tiled = (self.group_scale,) if self.grid in TILED else ()
        optional = (self.scale, *tiled, x_scale, bias)
        found = (x if tensor is None else tensor for tensor in optional)
        return (x, self.data.view(torch.int32) if self.in_words(x) else self.data, *found)

    def in_words(self, x: Tensor) -> bool:
        """Return whether the kernels read int8 in words, for inputs that are no levels."""
        halves = x.element_size() == 2
        return self.grid == "int8" and halves and self.inputs % 16 == 0


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
    kernel's ``rounding`` leaves them, which are int8 for a weight of that. ``dtype`` is the compute
    dtype. ``activation`` is "none" or as in ``launch.activate``; gated ones halve the rows. With
    ``experts`` the weight is a stack, and x and the result have a row for each token and each pair.
    """
    stored = _stored(weights, name, x.shape[-1])
    outputs = stored.rows // 2 if activation in GATED else stored.rows
    pairs = 1 if experts is None else experts.chosen.numel()
    shape = (*x.shape[:-1], outputs) if experts is None else (pairs, outputs)
    out = torch.empty(shape, dtype=Rounding.kept_in(rounding, dtype), device=x.device)
    arguments = (
        *stored.pointers(x, x_scale, bias), *Rounding.arguments(rounding, x),
        x if experts is None else experts.chosen, out, outputs,
        math.inf if limit is None else limit, experts.first if experts else 0, stored.data.shape[0],
    )  # fmt: skip
    constants = stored.constants | Rounding.constants(rounding, "OUT") | {
        "X_SCALE": x_scale is not None, "BIAS": bias is not None, "KIND": activation,
        "TYPE": _TYPES[dtype], "PER_TOKEN": experts.per_token if experts else 0,
    }  # fmt: skip
    if stored.grid in TILED:
        table = _STEPS["groups" if stored.group >= 32 else stored.grid]
        chosen = _chosen(table, stored, activation in GATED)
        warps, depth, most = _STEPS_IN_FLOAT32 if dtype == torch.float32 else chosen
        # Rounds of as many steps each: what a round has beyond the last input is computed, too.
        steps = triton.cdiv(stored.inputs, warps * (128 if 0 < stored.group < 64 else 64))
        together = triton.cdiv(steps, triton.cdiv(steps, most))
        tiles.tile_matvec_kernel[(outputs // 16, pairs)](
            *arguments, **constants, WARPS=warps, DEPTH=depth, TOGETHER=together, num_stages=1,
            **launch_options(x.device, warps),
        )  # fmt: skip
        return out
    if stored.grid == "int8" and x.dtype != torch.float32 and stored.inputs % 16 == 0:
        warps, depth = _chosen(_WARPS, stored, activation in GATED)
        integers.integer_matvec_kernel[(triton.cdiv(outputs, 16), pairs)](
            *arguments, **constants, WARPS=warps, DEPTH=depth, **launch_options(x.device, warps)
        )
        return out
    rows, block, depth, warps = _chosen(
        _BLOCKS["none" if stored.grid == "none" else "e4m3"], stored, activation in GATED
    )
    products.matvec_kernel[(triton.cdiv(outputs, rows), pairs)](
        *arguments, **constants, ROWS=rows, DEPTH=depth,
        BLOCK=min(block, triton.next_power_of_2(stored.inputs)),
        **launch_options(x.device, warps),
    )  # fmt: skip
    return out


def product(
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
) -> Tensor:
    """Return ``matvec`` of a few tokens, two at least, or of any number of levels in int8."""
    stored = _stored(weights, name, x.shape[-1])
    tokens = x.numel() // stored.inputs
    outputs = stored.rows // 2 if activation in GATED else stored.rows
    kept = Rounding.kept_in(rounding, dtype)
    out = torch.empty((*x.shape[:-1], outputs), dtype=kept, device=x.device)
    rows, block, stages, share, enough, warps = _of_few(stored, x, tokens)
    # Inputs in float32 would take more shared memory than Ada's multiprocessors have.
    widest = 32 if x.dtype == torch.float32 else 64 if tokens <= FEW_TOKENS else 128
    tile = min(widest, max(16, triton.next_power_of_2(tokens)))
    programs, splits = triton.cdiv(stored.rows, rows) * triton.cdiv(tokens, tile), 1
    while programs * splits < enough and splits < 16 and 2 * splits * share <= stored.inputs:
        splits *= 2
    parts = out
    if splits > 1:
        parts = out.new_empty(splits * tokens * stored.rows, dtype=torch.float32)
    arguments = (
        *stored.pointers(x, x_scale, bias), *Rounding.arguments(rounding, x), out, parts,
        counters(x.device), tokens, outputs, math.inf if limit is None else limit,
    )  # fmt: skip
    constants = stored.constants | Rounding.constants(rounding, "OUT") | {
        "X_SCALE": x_scale is not None, "BIAS": bias is not None, "KIND": activation,
        "TYPE": _TYPES[dtype], "TOKENS": tile, "SPLITS": splits,
    }  # fmt: skip
    if stored.grid in TILED:
        tiles.tile_product_kernel[(programs, splits)](
            *arguments, **constants, TILES=rows // 16, TOGETHER=_TOGETHER, num_stages=stages,
            **launch_options(x.device, warps),
        )  # fmt: skip
    else:
        products.product_kernel[(programs, splits)](
            *arguments, **constants, ROWS=rows, BLOCK=block, num_stages=stages,
            **launch_options(x.device, warps),
        )  # fmt: skip
    return out


def _of_few(stored: _Stored, x: Tensor, tokens: int) -> tuple[int, int, int, int, int, int]:
    """Return the fastest of some ten tried on an H200 for the linears of Phi-3-mini and -small.

    They are rows and inputs of a step, steps in flight, the least inputs of a split, the programs
    up to which a product is split, which fill a GPU, and the warps of one.
    """
    large = stored.rows * stored.inputs > 55_000_000
    if stored.grid in TILED:
        # Fewer rows and steps where Ada's multiprocessors have no shared memory for more.
        halves = x.element_size() == 2
        rows = 128 if halves and large and stored.grid == "int4" else 64
        stages = 3 if halves and stored.group != 32 else 2
        return rows, 64 * _TOGETHER, stages, 768, 200, rows // 16
    if stored.in_words(x):
        tall = stored.rows > 12_000
        return (128, 128, 3, 128, 160, 8) if tall else (64, 128, 3, 128, 320, 4)
    if tokens > FEW_TOKENS:
        return 128, 128, 3, 128, 160, 4
    block = 256 if large and x.element_size() == 1 else 128
    stages = 4 if x.element_size() == 1 and (block == 128 or tokens <= 32) else 3
    return 64, block, stages, block, 160, 4


def expanded(weights: Weights, name: str, inputs: int, dtype: torch.dtype) -> Tensor:
    """Return ``quantized.weight_values``, by one kernel."""
    if find_packed(weights, name) is None:
        return weights[f"{name}.weight"]
    stored = _stored(weights, name, inputs)
    out = torch.empty((stored.rows, inputs), dtype=dtype, device=stored.data.device)
    scales = out if stored.scale is None else stored.scale
    if stored.grid in TILED:
        groups = out if stored.group_scale is None else stored.group_scale
        tiles.tile_expand_kernel[(stored.rows // 16, triton.cdiv(inputs, 256))](
            stored.data, scales, groups, out, **stored.constants, TILES=4,
            **launch_options(out.device, 4),
        )  # fmt: skip
        return out
    block = min(4096, triton.next_power_of_2(inputs))
    products.expand_kernel[(stored.rows, triton.cdiv(inputs, block))](
        stored.data, scales, out, **stored.constants, BLOCK=block, **launch_options(out.device, 4)
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


_Choice = TypeVar("_Choice")


def _chosen(choices: tuple[_Choice, ...], stored: _Stored, gated: bool) -> _Choice:
    """Return which of four is a weight's."""
    plain, short, paired, long = choices
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
    data, rows = packed.data, packed.data.shape[-2]
    if packed.grid in TILED:
        data, rows = data.view(torch.int32), 16 * data.shape[-3]
    return _Stored(packed.grid, data, packed.scale, packed.group_scale, rows, inputs)
