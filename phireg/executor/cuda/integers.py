"""The Triton kernel of one token's product with int8 weights, through the matrix units.

A lane loads the weights of sixteen successive inputs of a row. The matrix units take them for other
ones of 64, and get the inputs in that order, too.
"""

import triton
import triton.language as tl

from phireg.executor.cuda.kernels import _rounding, _store_levels, _wait
from phireg.executor.cuda.products import _ending, _finish, _of_words, _own_expert, _pair
from phireg.executor.cuda.tiles import _RUN


@triton.jit
def integer_matvec_kernel(
    x_ptr, weight_ptr, scale_ptr, x_scale_ptr, bias_ptr, smoothing_ptr, out_scale_ptr, lost_ptr,
    lost_width, expert_ptr, out_ptr, outputs, limit, first_expert, experts,
    INPUTS: tl.constexpr, SCALES: tl.constexpr, X_SCALE: tl.constexpr, BIAS: tl.constexpr,
    KIND: tl.constexpr, SMOOTH: tl.constexpr, OUT: tl.constexpr, TYPE: tl.constexpr,
    PER_TOKEN: tl.constexpr, WARPS: tl.constexpr, DEPTH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """16 outputs a program. Weights for inputs that are no levels come as words of four.

    ``WARPS`` of a program share the inputs of its rows; ``DEPTH`` is the steps of 64 inputs that a
    warp has asked for in advance. Rows have multiples of 16 inputs.
    """
    PARTS: tl.constexpr = 2 if KIND == "swiglu" or KIND == "gegelu" else 1
    STEPS: tl.constexpr = (INPUTS + 64 * WARPS - 1) // (64 * WARPS)
    LEVELS: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    EACH: tl.constexpr = 1 if LEVELS else 4  # inputs in an element of the weight
    row = tl.program_id(0) * 16 + tl.arange(0, 16)
    # In this order a load gives each warp its own inputs, and a lane those of rows g and g + 8.
    lane = tl.arange(0, 16 * WARPS)[:, None]
    own = tl.program_id(0) * 16 + lane // (8 * WARPS) * 8 + lane % 8
    inside = own < outputs
    if PER_TOKEN > 0:
        _wait(EARLY)
        pair, expert, mine = _own_expert(expert_ptr, first_expert, experts)
        inside = own < tl.where(mine, outputs, 0)
        x_ptr += pair // PER_TOKEN * INPUTS
        lost_ptr += pair // PER_TOKEN * lost_width
        out_ptr += pair * outputs
        stacked = expert * outputs * PARTS
        weight_ptr += stacked * (INPUTS // EACH)
        scale_ptr += stacked if SCALES == 2 else expert
    first, second = _pair(row, outputs, KIND)
    rows = _pair(own, outputs, KIND)
    columns = lane // 8 % WARPS * (64 // EACH) + tl.arange(0, 64 // EACH)[None, :]
    # Weights are on their way while the kernel before this one ends.
    weights = ()
    for early in tl.static_range(min(DEPTH, STEPS)):
        for part in tl.static_range(PARTS):
            at = early * WARPS * (64 // EACH) + columns
            source = weight_ptr + rows[part].to(tl.int64) * (INPUTS // EACH) + at
            weights += (tl.load(source, mask=inside & (at < INPUTS // EACH), other=0),)
    ending = _ending(
        first, second, row < outputs, scale_ptr, x_scale_ptr, bias_ptr, SCALES, X_SCALE, BIAS
    )
    rounding = _rounding(row, row < outputs, smoothing_ptr, out_scale_ptr, SMOOTH, OUT)
    if PER_TOKEN == 0:
        _wait(EARLY)
    sums = ()
    for _ in tl.static_range(PARTS):
        sums += (tl.zeros([WARPS, 16, 8], tl.int32 if LEVELS else tl.float32),)
    # All of eight columns have the same inputs, of which a load of 16 bytes has so many.
    RUN: tl.constexpr = 16 if LEVELS else 8
    lane = tl.arange(0, 512 // RUN * WARPS)[:, None]
    column = lane // 32 % WARPS * 64 + lane % 4 * 16 + lane // (32 * WARPS) * RUN
    column += tl.arange(0, RUN)[None, :]
    for step in tl.static_range(STEPS):
        at = step * WARPS * 64 + column
        x = tl.load(x_ptr + at, mask=at < INPUTS, other=0.0)
        # Which load, warp, column, lane, word, and of its bytes: of a pair, which pair.
        x = tl.reshape(x, [16 // RUN, WARPS, 8, 4, RUN // 4, 2, 2])
        if LEVELS:
            x = tl.permute(x, [1, 0, 4, 3, 5, 6, 2])
        else:
            x = tl.permute(x, [1, 0, 4, 3, 6, 5, 2] if _RUN == 4 else [1, 0, 4, 6, 3, 5, 2])
        x = tl.reshape(x, [WARPS, 64, 8])
        new = ()
        for part in tl.static_range(PARTS):
            if step + DEPTH < STEPS:
                at = (step + DEPTH) * WARPS * (64 // EACH) + columns
                source = weight_ptr + rows[part].to(tl.int64) * (INPUTS // EACH) + at
                weights += (tl.load(source, mask=inside & (at < INPUTS // EACH), other=0),)
            if LEVELS:
                level = tl.reshape(weights[0], [2, WARPS, 8, 4, 4, 4])  # type: ignore[misc]
                level = tl.reshape(tl.permute(level, [1, 0, 2, 4, 3, 5]), [WARPS, 16, 64])
                new += (tl.dot(level, x, sums[part], out_dtype=tl.int32),)
            else:
                words = tl.reshape(weights[0], [1, 2, WARPS, 8, 4, 4])  # type: ignore[misc]
                new += (tl.dot(_of_words(words, TYPE, _RUN), x, sums[part]),)
            weights = weights[1:]
        sums = new
    y = _column_sums(sums[0], LEVELS)  # type: ignore[misc]
    z = _column_sums(sums[PARTS - 1], LEVELS)
    y = _finish(y, z, ending, rounding, limit, TYPE, KIND, SMOOTH, OUT)
    if PER_TOKEN > 0:
        y = tl.where(mine, y, 0.0)
    _store_levels(out_ptr, row, y, row < outputs, lost_ptr)


@triton.jit
def _column_sums(sums, LEVELS: tl.constexpr):
    """Return the sums of rows of one of eight equal columns of [WARPS, 16, 8]."""
    first = tl.arange(0, 8)[None, :] == 0
    y = tl.sum(tl.where(first, tl.sum(sums, 0), 0), 1).to(tl.float32)
    return y if LEVELS else y * 2.0**13
