"""Triton kernels of a linear over weights of four bits, in tiles as ``levels`` packs them.

What a lane reads of a tile is what the matrix units want from it: levels become their operand in
the registers they were read to, as numbers of the inputs' dtype times a power of two, by which sums
are divided. Constants are as in ``products``; ``GRID`` is the weight's, ``GROUP`` the inputs to a
scale, 0 for none. ``WARPS`` of a program share the inputs of its rows, ``DEPTH`` is the steps that
a warp has asked for in advance, and ``TOGETHER`` those whose inputs it reads at once. Groups of
fewer inputs than a tile are small; then a step is two tiles.
"""

import triton
import triton.language as tl

from phireg.executor.cuda.kernels import _rounding, _start_next, _store_levels, _wait
from phireg.executor.cuda.products import (
    _ending,
    _ends,
    _finish,
    _own_expert,
    _pair,
    _place,
    _rows,
    _store_outputs,
)

# Successive inputs that a lane has of a row, as Triton's releases assign them to one token's
# product. The other number is as right, but what a lane read goes to other lanes then.
_RUN: tl.constexpr = tl.constexpr(
    4 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) else 2
)
# Inputs are multiplied by it where levels of e2m1 are subnormal numbers of bfloat16; those of 2^64
# and more become infinite.
_UP: tl.constexpr = tl.constexpr(2.0**64)


@triton.jit
def _numbers(bits, dtype: tl.constexpr):
    """Return the number in the lower half of each of the words; float32's are bfloat16's.

    Subnormal ones are among them, which neither products nor matrix units take for zero.
    """
    if dtype == tl.float32:
        numbers = (bits << 16).to(tl.float32, bitcast=True)
    else:
        numbers = bits.to(tl.int16).to(dtype, bitcast=True)
    return numbers


@triton.jit
def _pairs(bits, scale, dtype: tl.constexpr, UP: tl.constexpr, SCALED: tl.constexpr):
    """Return the two numbers in words [...], times UP and less 2^-10, and scaled: [..., 2]."""
    # The higher one first: so the compiler computes both at once, where they lie.
    high, low = _numbers(bits >> 16, dtype), _numbers(bits, dtype)
    if UP != 1.0:
        up, less = tl.full(bits.shape, UP, dtype), tl.full(bits.shape, -(2.0**-10), dtype)
        high = tl.fma(high, up, less)
        low = tl.fma(low, up, less)
    if SCALED:
        zero = tl.zeros(bits.shape, dtype)
        high = tl.fma(high, scale, zero)
        low = tl.fma(low, scale, zero)
    return tl.join(low, high)


@triton.jit
def _levels(
    words, scales, dtype: tl.constexpr, GRID: tl.constexpr, TILES: tl.constexpr, RUN: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """Return levels of tiles of words [TILES, 128]: [TILES, 16 rows, 64 inputs].

    With ``SCALED`` they are multiplied by scales of groups of 16, [TILES, 256]: each lane's eight.

    The inputs are in order with a ``RUN`` of two. With one of four a lane's two pairs of each
    sixteen are side by side.
    """
    HALF: tl.constexpr = dtype == tl.float16
    w = tl.reshape(words, [TILES, 8, 4, 4])
    low, high = w, w
    if SCALED:
        scale = tl.permute(tl.reshape(scales, [TILES, 8, 4, 2, 2, 2]), [0, 1, 2, 3, 5, 4])
        low, high = tl.split(tl.reshape(scale, [TILES, 8, 4, 4, 2]))
    INTEGERS: tl.constexpr = GRID == "int4"
    if INTEGERS:
        # An integer u is the digits of a subnormal number, and becomes 2^-13 (u - 8).
        a, c = w & 0x000F000F, (w >> 8) & 0x000F000F
        b, d = w & 0x00F000F0, (w >> 8) & 0x00F000F0
    else:
        # The sign, and two bits of the exponent and one of the mantissa.
        SIGN: tl.constexpr = -0x7FFF8000
        REST: tl.constexpr = 0x0E000E00 if HALF else 0x01C001C0
        a = ((w << 12) & SIGN) | ((w << (9 if HALF else 6)) & REST)
        b = ((w << 8) & SIGN) | ((w << (5 if HALF else 2)) & REST)
        c = ((w << 4) & SIGN) | ((w << 1 if HALF else w >> 2) & REST)
        d = (w & SIGN) | ((w >> (3 if HALF else 6)) & REST)
    UP: tl.constexpr = 1.0 if not INTEGERS else 2.0**11 if HALF else 2.0**120
    LATE: tl.constexpr = UP / 16 if INTEGERS else UP
    a = _pairs(a, low, dtype, UP, SCALED)
    b = _pairs(b, high, dtype, LATE, SCALED)
    c = _pairs(c, low, dtype, UP, SCALED)
    d = _pairs(d, high, dtype, LATE, SCALED)
    # Tile, row, lane's pair, sixteen inputs, of a pair, which eight inputs, which eight rows.
    q = tl.join(tl.join(a, c), tl.join(b, d))
    q = tl.permute(q, [0, 6, 1, 3, 2, 5, 4] if RUN == 4 else [0, 6, 1, 3, 5, 2, 4])
    return tl.reshape(q, [TILES, 16, 64])


@triton.jit
def _column(
    x_ptr, first, inside, tile: tl.constexpr, dtype: tl.constexpr, INPUTS: tl.constexpr,
    GROUP: tl.constexpr, FULL: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Return 64 inputs from ``first`` [WARPS, 1] on as an operand [WARPS, 64, 8], as ``_RUN`` says.

    All columns are the same. With small groups, of which a step's ``tile`` 0 or 1 has the inputs,
    a column has those of one group and zeros: it sums the products that have one scale.
    """
    SMALL: tl.constexpr = GROUP > 0 and GROUP < 64
    lane = tl.arange(0, 64)[None, :]
    place = first + lane % 8
    x = ()
    for eight in tl.static_range(8):
        at = place + 8 * eight
        if SMALL:
            mine = lane // 8 == (64 * tile + 8 * eight) // GROUP
            x += (tl.load(x_ptr + at, mask=inside & (at < INPUTS) & mine, other=0.0),)
        elif FULL:
            x += (tl.load(x_ptr + at),)
        else:
            x += (tl.load(x_ptr + at, mask=inside & (at < INPUTS), other=0.0),)
    a, b, c, d, e, f, g, h = x  # type: ignore[misc]  # mypy does not see what is added
    even, odd = tl.join(tl.join(a, c), tl.join(e, g)), tl.join(tl.join(b, d), tl.join(f, h))
    y = tl.permute(tl.join(even, odd), [0, 1, 3, 2, 4]).to(dtype)
    y = tl.reshape(y, [WARPS, 8, 4, 2, 4, 2])
    y = tl.permute(y, [0, 4, 2, 5, 3, 1] if _RUN == 4 else [0, 4, 5, 2, 3, 1])
    return tl.reshape(y, [WARPS, 64, 8])


@triton.jit
def _total(sums, SMALL: tl.constexpr):
    """Return the sums of rows of [WARPS, 16, 8], of all columns or of one of eight equal ones."""
    y = tl.sum(sums, 0)
    if not SMALL:
        y = tl.where(tl.arange(0, 8)[None, :] == 0, y, 0.0)
    return tl.sum(y, 1)


@triton.jit
def tile_matvec_kernel(
    x_ptr, weight_ptr, scale_ptr, group_ptr, x_scale_ptr, bias_ptr, smoothing_ptr, out_scale_ptr,
    lost_ptr, lost_width, expert_ptr, out_ptr, outputs, limit, first_expert, experts,
    INPUTS: tl.constexpr, GRID: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr,
    X_SCALE: tl.constexpr, BIAS: tl.constexpr, KIND: tl.constexpr, SMOOTH: tl.constexpr,
    OUT: tl.constexpr, TYPE: tl.constexpr, PER_TOKEN: tl.constexpr, WARPS: tl.constexpr,
    DEPTH: tl.constexpr, TOGETHER: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One token's product: 16 outputs a program, of 32 rows where the nonlinearity joins two."""
    PARTS: tl.constexpr = 2 if KIND == "swiglu" or KIND == "gegelu" else 1
    HALF: tl.constexpr = tl.float16 == TYPE
    SMALL: tl.constexpr = GROUP > 0 and GROUP < 64
    PAIR: tl.constexpr = 2 if SMALL else 1  # tiles of a step
    STRIDE: tl.constexpr = (INPUTS + 127) // 128 * 2
    WIDTH: tl.constexpr = (INPUTS + 64 * PAIR - 1) // (64 * PAIR)  # steps of all warps
    STEPS: tl.constexpr = (WIDTH + WARPS - 1) // WARPS
    ROUNDS: tl.constexpr = (STEPS + TOGETHER - 1) // TOGETHER
    FULL: tl.constexpr = WIDTH % (WARPS * TOGETHER) == 0 and INPUTS % 64 == 0
    GROUPS: tl.constexpr = INPUTS // GROUP if GROUP > 0 else 0
    number = tl.program_id(0)
    row = number * 16 + tl.arange(0, 16)
    width, mine = WIDTH, outputs
    if PER_TOKEN > 0:
        _wait(EARLY)
        pair, expert, inside = _own_expert(expert_ptr, first_expert, experts)
        width, mine = tl.where(inside, WIDTH, 0), tl.where(inside, outputs, 0)
        x_ptr += pair // PER_TOKEN * INPUTS
        lost_ptr += pair // PER_TOKEN * lost_width
        out_ptr += pair * outputs
        stacked = expert * outputs * PARTS
        weight_ptr += stacked // 16 * (STRIDE * 128)
        group_ptr += stacked * (STRIDE * 4 if GRID == "e2m1" else GROUPS)
        scale_ptr += stacked if SCALES == 2 else expert
    first, second = _pair(row, outputs, KIND)
    tiles = _pair(number.to(tl.int64), outputs // 16, KIND)
    warp = tl.arange(0, WARPS)[:, None]
    lane = tl.arange(0, 128)[None, :]
    # Weights are on their way while the kernel before this one ends.
    words, scales = (), ()
    for early in tl.static_range(min(DEPTH, STEPS)):
        soon = warp + early * WARPS < width
        for part in tl.static_range(PARTS):
            start = (tiles[part] * (STRIDE // PAIR) + early * WARPS + warp) * 128
            for tile in tl.static_range(PAIR):
                source = weight_ptr + start * PAIR + tile * 128 + lane
                words += (tl.load(source, mask=soon, other=0),)
            if GRID == "e2m1":
                scales += (tl.load(group_ptr + start + lane, mask=soon, other=0.0),)
    ending = _ending(
        first, second, row < mine, scale_ptr, x_scale_ptr, bias_ptr, SCALES, X_SCALE, BIAS
    )
    rounding = _rounding(row, row < mine, smoothing_ptr, out_scale_ptr, SMOOTH, OUT)
    if PER_TOKEN == 0:
        _wait(EARLY)
    sums = ()
    for _ in tl.static_range(PARTS):
        sums += (tl.zeros([WARPS, 16, 8], tl.float32),)
    for turn in range(ROUNDS):
        inputs = ()
        for ahead in tl.static_range(TOGETHER):
            step = (turn * TOGETHER + ahead) * WARPS + warp
            for tile in tl.static_range(PAIR):
                x = _column(
                    x_ptr, (step * PAIR + tile) * 64, step < width, tile, TYPE, INPUTS,
                    GROUP, FULL, WARPS,
                )  # fmt: skip
                inputs += (x,)
        for ahead in tl.static_range(TOGETHER):
            step = (turn * TOGETHER + ahead) * WARPS + warp
            later = step + DEPTH * WARPS
            new = ()
            for part in tl.static_range(PARTS):
                at = (tiles[part] * (STRIDE // PAIR) + later) * 128
                asked = later < width
                total = tl.zeros([WARPS, 16, 8], tl.float32) if GROUP > 0 else sums[part]
                for tile in tl.static_range(PAIR):
                    place = weight_ptr + at * PAIR + tile * 128 + lane
                    words += (tl.load(place, mask=asked, other=0),)
                    x = inputs[ahead * PAIR + tile]
                    if GRID == "e2m1" and not HALF:
                        x = x * _UP
                    level = _levels(words[0], x, TYPE, GRID, WARPS, _RUN, False)  # type: ignore[misc]
                    total = tl.dot(level, x, total, input_precision="ieee")
                    words = words[1:]
                if GRID == "e2m1":
                    scales += (tl.load(group_ptr + at + lane, mask=asked, other=0.0),)
                    scale = tl.reshape(scales[0], [WARPS, 8, 4, 2, 2])  # type: ignore[misc]
                    scale = tl.permute(scale, [0, 3, 1, 2, 4]).to(tl.float32)
                    scale = tl.reshape(scale, [WARPS, 16, 8])
                    scales = scales[1:]
                    total = sums[part] + total * scale
                elif GROUP > 0:
                    column = tl.arange(0, 8 if SMALL else 1)[None, None, :]
                    group = (step * (64 * PAIR) // GROUP)[:, :, None] + column
                    known = (group < GROUPS) & (column < max(1, 64 * PAIR // GROUP))
                    known = known & (step < width)[:, :, None]
                    group += (tiles[part] * 16 + tl.arange(0, 16))[None, :, None] * GROUPS
                    scale = tl.load(group_ptr + group, mask=known, other=0.0).to(tl.float32)
                    total = sums[part] + total * scale
                new += (total,)
            sums = new
    UNIT: tl.constexpr = 2.0**13 if GRID == "int4" else 2.0**14 if HALF else 2.0**62
    y = _total(sums[0], SMALL) * UNIT  # type: ignore[misc]
    z = _total(sums[PARTS - 1], SMALL) * UNIT
    if KIND == "gegelu":
        y, z = tl.split(tl.reshape(tl.permute(tl.join(y, z), [1, 0]), [16, 2]))
    y = _finish(y, z, ending, rounding, limit, TYPE, KIND, SMOOTH, OUT)
    _store_levels(out_ptr, row, tl.where(row < mine, y, 0.0), row < outputs, lost_ptr)


@triton.jit
def tile_product_kernel(
    x_ptr, weight_ptr, scale_ptr, group_ptr, x_scale_ptr, bias_ptr, smoothing_ptr, out_scale_ptr,
    lost_ptr, lost_width, out_ptr, part_ptr, count_ptr, tokens, outputs, limit,
    INPUTS: tl.constexpr, GRID: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr,
    X_SCALE: tl.constexpr, BIAS: tl.constexpr, KIND: tl.constexpr, SMOOTH: tl.constexpr,
    OUT: tl.constexpr, TYPE: tl.constexpr, TILES: tl.constexpr, TOGETHER: tl.constexpr,
    TOKENS: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A few tokens' product: a program has ``TILES`` of rows and one of ``SPLITS`` of inputs.

    Of swiglu's two tiles of rows for one of outputs, each second of a program's tiles is the other.
    """
    PARTS: tl.constexpr = 2 if KIND == "swiglu" or KIND == "gegelu" else 1
    ROWS: tl.constexpr = 16 * TILES
    SMALL: tl.constexpr = GROUP > 0 and GROUP < 64
    # Tiles that have one scale.
    SPAN: tl.constexpr = TOGETHER if GROUP % (64 * TOGETHER) == 0 else 2 if GROUP % 128 == 0 else 1
    STRIDE: tl.constexpr = (INPUTS + 127) // 128 * 2
    STEPS: tl.constexpr = (STRIDE + TOGETHER - 1) // TOGETHER
    SHARE: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    FULL: tl.constexpr = INPUTS % (64 * TOGETHER) == 0
    GROUPS: tl.constexpr = INPUTS // GROUP if GROUP > 0 else 0
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # Products of levels and scales become as large as their dtype wants them. In float16 scales of
    # int4's groups from 64 on are infinite then.
    HALF: tl.constexpr = dtype == tl.float16
    UP: tl.constexpr = (
        (2.0**7 if HALF else 2.0**110) if GRID == "e2m1" else 2.0**10 if HALF else 1.0
    )
    UNIT: tl.constexpr = (
        (2.0**7 if HALF else 2.0**16) if GRID == "e2m1" else 2.0**13 / UP if SMALL else 2.0**13
    )
    split = tl.program_id(1)
    row_tile, token_tile = _place(tokens, outputs * PARTS, ROWS, TOKENS)
    APART: tl.constexpr = 16 if KIND == "swiglu" else 1
    row, inside = _rows(row_tile * ROWS + tl.arange(0, ROWS), outputs, KIND, APART)
    token = token_tile * TOKENS + tl.arange(0, TOKENS)
    real = token < tokens
    ending, rounding, output = _ends(
        row_tile, outputs, scale_ptr, x_scale_ptr, bias_ptr, smoothing_ptr, out_scale_ptr, ROWS,
        SCALES, X_SCALE, BIAS, KIND, SMOOTH, OUT,
    )  # fmt: skip
    _wait(EARLY, False)
    number = row_tile.to(tl.int64) * TILES + tl.arange(0, TILES)[:, None]
    number, present = _rows(number, outputs // 16, KIND, 1)
    lane, own = tl.arange(0, 128)[None, :], tl.arange(0, 256)[None, :]
    weights = weight_ptr + number * (STRIDE * 128) + lane
    inputs = x_ptr + token.to(tl.int64)[None, :] * INPUTS
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    for step in range(split * SHARE, min(split * SHARE + SHARE, STEPS)):
        total = acc
        for ahead in tl.static_range(TOGETHER):
            tile = step * TOGETHER + ahead
            at = tile * 64 + tl.arange(0, 64)
            if FULL:
                words = tl.load(weights + tile * 128, mask=present, other=0)
                x = tl.load(inputs + at[:, None], mask=real[None, :], other=0.0)
            else:
                words = tl.load(
                    weights + tile * 128, mask=present & (tile * 128 + lane < STRIDE * 128), other=0
                )
                x = tl.load(
                    inputs + at[:, None], mask=real[None, :] & (at < INPUTS)[:, None], other=0.0
                )
            scales = words
            if SMALL:
                # In each lane's order: eight scales of a row and the one eight below it.
                if GRID == "e2m1":
                    place = number * (STRIDE * 64) + tile // 2 * 128 + tile % 2 * 8
                    place += own // 32 * 16 + own % 8
                    known = present & (own >= 0)
                    if not FULL:
                        known = known & (tile * 256 + own < STRIDE * 256)
                else:
                    group = (tile * 64 + (own // 4 % 2 * 2 + own % 2) * 16) // GROUP
                    known = present & (group < GROUPS)
                    place = (number * 16 + own // 32 + own // 2 % 2 * 8) * GROUPS + group
                scales = tl.load(group_ptr + place, mask=known, other=0.0).to(tl.float32) * UP
                scales = scales.to(dtype)
            elif GROUP > 0 and ahead % SPAN == 0:
                total = tl.zeros([ROWS, TOKENS], tl.float32)
            level = _levels(words, scales, dtype, GRID, TILES, 2, SMALL)
            total = tl.dot(tl.reshape(level, [ROWS, 64]), x, total, input_precision="ieee")
            if GROUP > 0 and not SMALL and ahead % SPAN == SPAN - 1:
                place = row.to(tl.int64) * GROUPS + tile * 64 // GROUP
                known = inside & (place < (row + 1).to(tl.int64) * GROUPS)
                scale = tl.load(group_ptr + place, mask=known, other=0.0).to(tl.float32)
                acc += total * scale[:, None]
        if GROUP == 0 or SMALL:
            acc = total
    _start_next(EARLY)
    _store_outputs(
        acc * UNIT, ending, rounding, limit, out_ptr, lost_ptr, lost_width, part_ptr, count_ptr,
        split, row, inside, output, token, tokens, outputs, TYPE, KIND, SMOOTH, OUT, SPLITS,
        APART,
    )  # fmt: skip


@triton.jit
def tile_expand_kernel(
    weight_ptr, scale_ptr, group_ptr, out_ptr,
    INPUTS: tl.constexpr, GRID: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr,
    TILES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Write a weight's values, as ``Levels.values`` rounds them."""
    STRIDE: tl.constexpr = (INPUTS + 127) // 128 * 2
    number = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    row = (number * 16 + tl.arange(0, 16))[None, :, None]
    at = tile[:, None, None] * 64 + tl.arange(0, 64)[None, None, :]
    inside = at < INPUTS
    _wait(EARLY)
    place = (number * STRIDE + tile)[:, None] * 128 + tl.arange(0, 128)[None, :]
    words = tl.load(weight_ptr + place, mask=(tile < STRIDE)[:, None], other=0)
    value = _levels(words, words, tl.float32, GRID, TILES, 2, False) * (
        2.0**13 if GRID == "int4" else 2.0**126
    )
    if GRID == "e2m1":
        pair, column = number * (STRIDE // 2) + at // 128, at % 128 // 16
        group = pair * 128 + row % 8 * 16 + column // 2 * 4 + row % 16 // 8 * 2 + column % 2
        value *= tl.load(group_ptr + group, mask=inside, other=0.0).to(tl.float32)
    elif GROUP > 0:
        group = row * (INPUTS // GROUP) + at // GROUP
        value *= tl.load(group_ptr + group, mask=inside, other=0.0).to(tl.float32)
    if SCALES > 0:
        value *= tl.load(scale_ptr + row) if SCALES == 2 else tl.load(scale_ptr)
    tl.store(out_ptr + row * INPUTS + at, value.to(out_ptr.dtype.element_ty), mask=inside)
