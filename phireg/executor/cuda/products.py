"""Triton kernels of a linear over weights as ``levels`` packs them, for one token and for a few.

Each ends with what follows a linear: scales, the bias, the MLP's nonlinearity, and the rounding of
the next linear's inputs to its grid. Constants: ``GRID`` is that of the weight, or "none" for
values; ``BITS`` those of a level where levels lie in words, or 0; ``WIDTH`` the columns of a row,
which are inputs or such words; ``GROUP`` the inputs to a scale, 0 for none; ``SCALES`` the number
of ``scale``'s entries, 0, 1 or 2 for one a row; ``X_SCALE`` says that inputs are levels, ``OUT``
the grid of outputs, ``TYPE`` the compute dtype.
"""

import triton
import triton.language as tl

from phireg.executor.cuda.kernels import _activate, _decode, _rounded, _rounding, _wait


@triton.jit
def _ending(
    first, second, inside, row, scale_ptr, x_scale_ptr, bias_ptr, smoothing_ptr, out_scale_ptr,
    SCALES: tl.constexpr, X_SCALE: tl.constexpr, BIAS: tl.constexpr, SMOOTH: tl.constexpr,
    OUT: tl.constexpr,
):  # fmt: skip
    """Load what ``_finish`` needs for the weight's rows first and second."""
    y_scale = 1.0
    z_scale = 1.0
    if SCALES == 2:
        y_scale = tl.load(scale_ptr + first, mask=inside, other=0.0)
        z_scale = tl.load(scale_ptr + second, mask=inside, other=0.0)
    if SCALES == 1:
        y_scale = tl.load(scale_ptr)
        z_scale = y_scale
    if X_SCALE:
        x_scale = tl.load(x_scale_ptr)
        y_scale = y_scale * x_scale
        z_scale = z_scale * x_scale
    y_bias = 0.0
    z_bias = 0.0
    if BIAS:
        y_bias = tl.load(bias_ptr + first, mask=inside, other=0.0).to(tl.float32)
        z_bias = tl.load(bias_ptr + second, mask=inside, other=0.0).to(tl.float32)
    smoothing, out_scale = _rounding(row, inside, smoothing_ptr, out_scale_ptr, SMOOTH, OUT)
    return y_scale, z_scale, y_bias, z_bias, smoothing, out_scale


@triton.jit
def _finish(
    y, z, ending, limit, dtype: tl.constexpr, KIND: tl.constexpr, SMOOTH: tl.constexpr,
    OUT: tl.constexpr,
):  # fmt: skip
    """Return the outputs of float32 sums ``y`` and ``z``; only gated ones use the second."""
    y_scale, z_scale, y_bias, z_bias, smoothing, out_scale = ending
    y = y * y_scale + y_bias
    if KIND != "none":
        z = z * z_scale + z_bias
        y = _activate(y.to(dtype).to(tl.float32), z.to(dtype).to(tl.float32), limit, KIND)
    return _rounded(y, smoothing, out_scale, dtype, SMOOTH, OUT)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


# Inputs are multiplied by this power of two where levels are taken as subnormal numbers.
_UP: tl.constexpr = tl.constexpr(2.0**100)


@triton.jit
def _inputs(x_ptr, at, INPUTS: tl.constexpr, FULL: tl.constexpr):
    """Load inputs as float32."""
    if FULL:
        return tl.load(x_ptr + at).to(tl.float32)
    return tl.load(x_ptr + at, mask=at < INPUTS, other=0.0).to(tl.float32)


@triton.jit
def _fetch(start, at, inside, WIDTH: tl.constexpr):
    """Load a tile of a weight [rows, columns]."""
    return tl.load(start + at[None, :], mask=inside[:, None] & (at < WIDTH)[None, :], other=0.0)


@triton.jit
def _of_words(
    words, x_ptr, scale_ptr, mask, columns,
    INPUTS: tl.constexpr, GRID: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Return sums of products of words [rows, columns] and inputs, and an excess [columns].

    The excess is that of integers, which are stored with half of their range added. An integer in
    the lowest 24 bits of a float32 is that many times 2^-149, wherever its bits lie. An e2m1 level
    there, its lowest bit in bit 22, is itself times 2^-126. Products with inputs that have been
    multiplied by enough are exact again but for a power of two, ``matvec_kernel``'s UNIT. Inputs
    of 2^28 and more become infinite.
    """
    LEVELS: tl.constexpr = 32 // BITS
    start = columns // 4 * (4 * LEVELS) + columns % 4
    excess = tl.zeros([columns.shape[0]], tl.float32)
    total = tl.zeros(words.shape, tl.float32)
    part = tl.zeros(words.shape, tl.float32)
    shifted = words >> 8
    for n in tl.static_range(LEVELS):
        x = _inputs(x_ptr, start + 4 * n, INPUTS, FULL)
        if GRID == "e2m1":
            high = words << (22 - 4 * n) if n < 6 else words >> (4 * n - 22)
            level = _float((high & 0x01C00000) | ((high << 6) & -2147483648))
            x = x * _UP
        else:
            # In the lowest 24 bits; the last ones are brought there.
            if BITS * (n + 1) <= 24:
                level, factor = _float(words & (2**BITS - 1 << BITS * n)), _UP / 2.0 ** (BITS * n)
            else:
                level = _float(shifted & (2**BITS - 1 << BITS * n - 8))
                factor = _UP / 2.0 ** (BITS * n - 8)
            excess += x * (_UP / 2.0 ** (150 - BITS))
            x = x * factor
        part += level * x[None, :]
        # A word's inputs, 32 apart at most, have one scale, or two.
        if GROUP == 16 and (n == 3 or n == 7):
            scale = tl.load(scale_ptr + (start // 16 + n // 4)[None, :], mask=mask, other=0.0)
            total += part * scale.to(tl.float32)
            part = tl.zeros(words.shape, tl.float32)
    if GROUP > 16:
        scale = tl.load(scale_ptr + (start // GROUP)[None, :], mask=mask, other=0.0)
        part = (part - excess[None, :]) * scale.to(tl.float32)
        excess = tl.zeros([columns.shape[0]], tl.float32)
    if GROUP == 16:
        part = total
    return part, excess


@triton.jit
def matvec_kernel(
    x_ptr, weight_ptr, scale_ptr, group_ptr, x_scale_ptr, bias_ptr, smoothing_ptr, out_scale_ptr,
    expert_ptr, out_ptr, outputs, limit, first_expert, experts,
    INPUTS: tl.constexpr, WIDTH: tl.constexpr, GRID: tl.constexpr, BITS: tl.constexpr,
    SCALES: tl.constexpr, GROUP: tl.constexpr,
    X_SCALE: tl.constexpr, BIAS: tl.constexpr, KIND: tl.constexpr, SMOOTH: tl.constexpr,
    OUT: tl.constexpr, TYPE: tl.constexpr, PER_TOKEN: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    GATED: tl.constexpr = KIND == "swiglu" or KIND == "gegelu"
    UNIT: tl.constexpr = 1.0 if BITS == 0 else 2.0**26 if GRID == "e2m1" else 2.0**49
    FULL: tl.constexpr = INPUTS % 32 == 0 and WIDTH % BLOCK == 0
    STEPS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    GROUPS: tl.constexpr = INPUTS // GROUP if GROUP > 0 else 0
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < outputs
    if PER_TOKEN > 0:
        # The pairs of a token and one of its experts, which is this rank's or leaves zeros.
        _wait(EARLY)
        pair = tl.program_id(1).to(tl.int64)
        expert = tl.load(expert_ptr + pair) - first_expert
        mine = (expert >= 0) & (expert < experts)
        inside = rows < tl.where(mine, outputs, 0)
        expert = tl.where(mine, expert, 0)
        x_ptr += pair // PER_TOKEN * INPUTS
        out_ptr += pair * outputs
        rank_rows = expert * outputs * (2 if GATED else 1)
        weight_ptr += rank_rows * WIDTH
        group_ptr += rank_rows * GROUPS
        scale_ptr += rank_rows if SCALES == 2 else expert
    first, second = rows, rows
    if KIND == "swiglu":
        second = rows + outputs
    if KIND == "gegelu":
        first = 2 * rows
        second = first + 1
    columns = tl.arange(0, BLOCK)
    left = weight_ptr + first.to(tl.int64)[:, None] * WIDTH
    right = weight_ptr + second.to(tl.int64)[:, None] * WIDTH
    # Weights are on their way while the kernel before this one ends: of DEPTH steps at a time.
    a, b = (), ()
    for step in tl.static_range(min(DEPTH, STEPS)):
        a += (_fetch(left, step * BLOCK + columns, inside, WIDTH),)
        if GATED:
            b += (_fetch(right, step * BLOCK + columns, inside, WIDTH),)
    ending = _ending(
        first, second, inside, rows, scale_ptr, x_scale_ptr, bias_ptr, smoothing_ptr, out_scale_ptr,
        SCALES, X_SCALE, BIAS, SMOOTH, OUT,
    )  # fmt: skip
    if PER_TOKEN == 0:
        _wait(EARLY)
    a_groups = group_ptr + first[:, None] * GROUPS
    b_groups = group_ptr + second[:, None] * GROUPS
    a_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    b_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    excess = tl.zeros([BLOCK], tl.float32)
    if BITS > 0:
        # Unrolled, it would take so many registers that few programs fit a multiprocessor.
        for step in range(STEPS):
            at = step * BLOCK + columns
            mask = inside[:, None] & (at < WIDTH)[None, :]
            a += (_fetch(left, at + DEPTH * BLOCK, inside, WIDTH),)
            words = a[0]  # type: ignore[misc]  # mypy does not see what is added
            part, more = _of_words(
                words, x_ptr, a_groups, mask, at, INPUTS, GRID, BITS, GROUP, FULL
            )
            a_sum += part
            excess += more
            a = a[1:]
            if GATED:
                b += (_fetch(right, at + DEPTH * BLOCK, inside, WIDTH),)
                words = b[0]  # type: ignore[misc]
                part = _of_words(words, x_ptr, b_groups, mask, at, INPUTS, GRID, BITS, GROUP, FULL)
                b_sum += part[0]
                b = b[1:]
    else:
        for step in tl.static_range(STEPS):
            at = step * BLOCK + columns
            x = _inputs(x_ptr, at, INPUTS, FULL)[None, :]
            a_sum += a[step].to(tl.float32) * x
            if GATED:
                b_sum += b[step].to(tl.float32) * x
            if step + DEPTH < STEPS:
                a += (_fetch(left, at + DEPTH * BLOCK, inside, WIDTH),)
                if GATED:
                    b += (_fetch(right, at + DEPTH * BLOCK, inside, WIDTH),)
    y = tl.sum(a_sum - excess[None, :], 1) * UNIT
    z = tl.sum(b_sum - excess[None, :], 1) * UNIT if GATED else y
    y = _finish(y, z, ending, limit, TYPE, KIND, SMOOTH, OUT)
    tl.store(out_ptr + rows, y.to(out_ptr.dtype.element_ty), mask=rows < outputs)


@triton.jit
def _decode_code(codes, dtype: tl.constexpr, GRID: tl.constexpr):
    """Return a word's codes, int16, as the numbers of a dtype that they stand for, exactly."""
    if GRID == "int8":
        if dtype == tl.bfloat16:
            # 128 or 256, by the highest bit, taken from 128 plus the others.
            low = ((codes & 0x7F) | 0x4300).to(tl.bfloat16, bitcast=True)
            return low - (((codes & 0x80) ^ 0x80) | 0x4300).to(tl.bfloat16, bitcast=True)
        if dtype == tl.float16:
            return (codes | 0x6400).to(tl.float16, bitcast=True) - 1152.0
        return codes.to(dtype) - 128.0
    if GRID == "int4":
        if dtype == tl.bfloat16:
            return (codes | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
        if dtype == tl.float16:
            return (codes | 0x6400).to(tl.float16, bitcast=True) - 1032.0
        return codes.to(dtype) - 8.0
    sign = (codes & 8) << 12
    if dtype == tl.float16:
        return (sign | ((codes & 7) << 9)).to(tl.float16, bitcast=True) * 16384.0
    # A float16 subnormal or nearly, whose values float32 and bfloat16 have too.
    value = (sign | ((codes & 7) << 9)).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
    return value.to(dtype)


@triton.jit
def product_kernel(
    x_ptr, weight_ptr, scale_ptr, group_ptr, x_scale_ptr, bias_ptr, smoothing_ptr, out_scale_ptr,
    out_ptr, part_ptr, count_ptr, tokens, outputs, limit,
    INPUTS: tl.constexpr, WIDTH: tl.constexpr, GRID: tl.constexpr, BITS: tl.constexpr,
    SCALES: tl.constexpr, GROUP: tl.constexpr,
    X_SCALE: tl.constexpr, BIAS: tl.constexpr, KIND: tl.constexpr, SMOOTH: tl.constexpr,
    OUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
    SPLITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    LEVELS: tl.constexpr = 32 // BITS if BITS > 0 else 1
    STEPS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    FULL: tl.constexpr = WIDTH % BLOCK == 0
    GROUPS: tl.constexpr = INPUTS // GROUP if GROUP > 0 else 0
    SHARE: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    WIDE: tl.constexpr = GROUP > 0 and GROUP % (BLOCK * LEVELS) == 0  # a step has one scale
    split = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    inside = row < outputs
    columns = tl.arange(0, BLOCK)
    x_dtype = x_ptr.dtype.element_ty
    ending = _ending(
        row[:, None], row[:, None], inside[:, None], row[:, None], scale_ptr, x_scale_ptr, bias_ptr,
        smoothing_ptr, out_scale_ptr, SCALES, X_SCALE, BIAS, SMOOTH, OUT,
    )  # fmt: skip
    _wait(EARLY)
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    weights = weight_ptr + row.to(tl.int64)[:, None] * WIDTH
    # Rows of inputs for words of levels are filled up to whole steps and sorted as these are.
    inputs = x_ptr + token.to(tl.int64)[None, :] * (STEPS * BLOCK * LEVELS if BITS > 0 else INPUTS)
    real = (token < tokens)[None, :]
    groups = group_ptr + row[:, None] * GROUPS
    for step in range(split * SHARE, min(split * SHARE + SHARE, STEPS)):
        at = step * BLOCK + columns
        mask = inside[:, None]
        if not FULL:
            mask = mask & (at < WIDTH)[None, :]
        weight = tl.load(weights + at[None, :], mask=mask, other=0.0)
        if BITS > 0:
            part = tl.zeros([ROWS, TOKENS], tl.float32) if WIDE else acc
            for n in tl.static_range(LEVELS):
                code = (weight >> (BITS * n)).to(tl.int16) & (2**BITS - 1)
                level = _decode_code(code, x_dtype, GRID)
                if GROUP > 0 and not WIDE:
                    if 4 * n % GROUP == 0:
                        group = (at // 4 * (4 * LEVELS) + 4 * n) // GROUP
                        scale = tl.load(groups + group[None, :], mask=mask, other=0.0).to(x_dtype)
                    level = level * scale
                place = (step * LEVELS + n) * BLOCK + columns
                x = tl.load(inputs + place[:, None], mask=real, other=0.0)
                part = tl.dot(level, x, part, input_precision="ieee")
            if WIDE:
                scales = groups + step * BLOCK * LEVELS // GROUP
                part = acc + part * tl.load(scales, mask=inside[:, None], other=0.0).to(tl.float32)
            acc = part
        else:
            x = tl.load(inputs + at[:, None], mask=real & (at < INPUTS)[:, None], other=0.0)
            acc = tl.dot(_decode(weight, x_dtype), x, acc, input_precision="ieee")
    place = token[None, :].to(tl.int64) * outputs + row[:, None]
    real = real & inside[:, None]
    if SPLITS == 1:
        y = _finish(acc, acc, ending, limit, out_ptr.dtype.element_ty, KIND, SMOOTH, OUT)
        tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=real)
    else:
        # The last of a tile's splits to arrive adds all of them, in order.
        size = tokens.to(tl.int64) * outputs
        tl.store(part_ptr + split * size + place, acc, mask=real)
        tl.debug_barrier()
        tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(count_ptr + tile, 1) == SPLITS - 1:
            tl.store(count_ptr + tile, 0)
            total = tl.zeros([ROWS, TOKENS], tl.float32)
            for other in tl.static_range(SPLITS):
                total += tl.load(
                    part_ptr + other * size + place, mask=real, other=0.0, cache_modifier=".cg"
                )
            y = _finish(total, total, ending, limit, out_ptr.dtype.element_ty, KIND, SMOOTH, OUT)
            tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def expand_kernel(
    weight_ptr, scale_ptr, group_ptr, out_ptr,
    INPUTS: tl.constexpr, WIDTH: tl.constexpr, GRID: tl.constexpr, BITS: tl.constexpr,
    SCALES: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Write a weight's values, as ``Levels.values`` rounds them."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < INPUTS
    _wait(EARLY)
    scale = 1.0
    if SCALES > 0:
        scale = tl.load(scale_ptr + row) if SCALES == 2 else tl.load(scale_ptr)
    weight_ptr += row * WIDTH
    if BITS > 0:
        RUN: tl.constexpr = 128 // BITS
        word = tl.load(weight_ptr + at // RUN * 4 + at % 4, mask=inside, other=0)
        code = (word >> (at % RUN // 4 * BITS)).to(tl.int16) & (2**BITS - 1)
        value = _decode_code(code, tl.float32, GRID)
    else:
        value = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if GROUP > 0:
        groups = group_ptr + row * (INPUTS // GROUP) + at // GROUP
        value = value * tl.load(groups, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * INPUTS + at, (value * scale).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def route_kernel(
    scores_ptr, chosen_ptr, share_ptr, experts, epsilon, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    """Choose a token's two experts and their weights as ``blocks.route`` does."""
    token = tl.program_id(0)
    number = tl.arange(0, BLOCK)
    _wait(EARLY)
    scores = tl.load(scores_ptr + token * experts + number, mask=number < experts, other=-1.0e38)
    left = scores
    for place in tl.static_range(2):
        best = tl.max(left, 0)
        # The first of the largest; a score that is no number is none, and its share neither.
        chosen = tl.min(tl.where(left == best, number, BLOCK - 1), 0)
        chosen = tl.minimum(chosen, experts - 1)
        far = (best - scores) / tl.maximum(tl.abs(scores), best) > 2 * epsilon
        near = tl.where(far | (number >= experts), 0.0, tl.exp(left - best))
        own = tl.sum(tl.where(number == chosen, near, 0.0), 0)
        tl.store(chosen_ptr + 2 * token + place, chosen.to(tl.int64))
        tl.store(share_ptr + 2 * token + place, own / tl.sum(near, 0))
        left = tl.where(number == chosen, float("-inf"), left)
