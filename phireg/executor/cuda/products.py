"""Triton kernels of a linear over weights of more than four bits, for one token and for a few.

Each ends with what follows a linear: scales, the bias, the MLP's nonlinearity, and the rounding of
the next linear's inputs to its grid. Constants: ``WORDS`` says that levels lie in words, which are
int8's; ``WIDTH`` is the columns of a row, inputs or such words; ``SCALES`` the number of
``scale``'s entries, 0, 1 or 2 for one a row; ``X_SCALE`` says that inputs are levels, ``OUT`` the
grid of outputs, ``TYPE`` the compute dtype.
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


# Inputs are multiplied by it where levels are taken as subnormal numbers.
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
def _of_words(words, x_ptr, columns, INPUTS: tl.constexpr, FULL: tl.constexpr):
    """Return sums of products of words [rows, columns] and inputs, and an excess [columns].

    The excess is that of integers stored with half of their range added. An integer in the lowest
    24 bits of a float32 is that many times 2^-149, wherever its bits lie. Products with inputs that
    have been multiplied by enough are exact again but for a power of two, ``matvec_kernel``'s UNIT.
    Inputs of 2^28 and more become infinite.
    """
    start = columns // 4 * 16 + columns % 4
    excess = tl.zeros([columns.shape[0]], tl.float32)
    total = tl.zeros(words.shape, tl.float32)
    for n in tl.static_range(4):
        x = _inputs(x_ptr, start + 4 * n, INPUTS, FULL)
        # In the lowest 24 bits; the last ones are brought there.
        if n < 3:
            level, factor = _float(words & (255 << 8 * n)), _UP / 2.0 ** (8 * n)
        else:
            level, factor = _float((words >> 8) & (255 << 16)), _UP / 2.0**16
        excess += x * (_UP / 2.0**142)
        total += level * (x * factor)[None, :]
    return total, excess


@triton.jit
def matvec_kernel(
    x_ptr, weight_ptr, scale_ptr, x_scale_ptr, bias_ptr, smoothing_ptr, out_scale_ptr, expert_ptr,
    out_ptr, outputs, limit, first_expert, experts,
    INPUTS: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr, SCALES: tl.constexpr,
    X_SCALE: tl.constexpr, BIAS: tl.constexpr, KIND: tl.constexpr, SMOOTH: tl.constexpr,
    OUT: tl.constexpr, TYPE: tl.constexpr, PER_TOKEN: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    GATED: tl.constexpr = KIND == "swiglu" or KIND == "gegelu"
    UNIT: tl.constexpr = 2.0**49 if WORDS else 1.0
    FULL: tl.constexpr = INPUTS % 16 == 0 and WIDTH % BLOCK == 0
    STEPS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
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
    a_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    b_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    excess = tl.zeros([BLOCK], tl.float32)
    if WORDS:
        # Unrolled, it would take so many registers that few programs fit a multiprocessor.
        for step in range(STEPS):
            at = step * BLOCK + columns
            a += (_fetch(left, at + DEPTH * BLOCK, inside, WIDTH),)
            words = a[0]  # type: ignore[misc]  # mypy does not see what is added
            part, more = _of_words(words, x_ptr, at, INPUTS, FULL)
            a_sum += part
            excess += more
            a = a[1:]
            if GATED:
                b += (_fetch(right, at + DEPTH * BLOCK, inside, WIDTH),)
                words = b[0]  # type: ignore[misc]
                part = _of_words(words, x_ptr, at, INPUTS, FULL)
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
def _decode_code(codes, dtype: tl.constexpr):
    """Return a word's codes, int16, as the numbers of a dtype that they stand for, exactly."""
    if dtype == tl.bfloat16:
        # 128 or 256, by the highest bit, taken from 128 plus the others.
        low = ((codes & 0x7F) | 0x4300).to(tl.bfloat16, bitcast=True)
        return low - (((codes & 0x80) ^ 0x80) | 0x4300).to(tl.bfloat16, bitcast=True)
    if dtype == tl.float16:
        return (codes | 0x6400).to(tl.float16, bitcast=True) - 1152.0
    return codes.to(dtype) - 128.0


@triton.jit
def product_kernel(
    x_ptr, weight_ptr, scale_ptr, x_scale_ptr, bias_ptr, smoothing_ptr, out_scale_ptr,
    out_ptr, part_ptr, count_ptr, tokens, outputs, limit,
    INPUTS: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr, SCALES: tl.constexpr,
    X_SCALE: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    TOKENS: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    LEVELS: tl.constexpr = 4 if WORDS else 1
    STEPS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    FULL: tl.constexpr = WIDTH % BLOCK == 0
    SHARE: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    split = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    inside = row < outputs
    columns = tl.arange(0, BLOCK)
    x_dtype = x_ptr.dtype.element_ty
    ending = _ending(
        row[:, None], row[:, None], inside[:, None], row[:, None], scale_ptr, x_scale_ptr, bias_ptr,
        smoothing_ptr, out_scale_ptr, SCALES, X_SCALE, BIAS, False, "none",
    )  # fmt: skip
    _wait(EARLY)
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    weights = weight_ptr + row.to(tl.int64)[:, None] * WIDTH
    # Rows of inputs for words of levels are filled up to whole steps and sorted as these are.
    inputs = x_ptr + token.to(tl.int64)[None, :] * (STEPS * BLOCK * LEVELS if WORDS else INPUTS)
    real = (token < tokens)[None, :]
    for step in range(split * SHARE, min(split * SHARE + SHARE, STEPS)):
        at = step * BLOCK + columns
        mask = inside[:, None]
        if not FULL:
            mask = mask & (at < WIDTH)[None, :]
        weight = tl.load(weights + at[None, :], mask=mask, other=0.0)
        if WORDS:
            for n in tl.static_range(LEVELS):
                level = _decode_code((weight >> (8 * n)).to(tl.int16) & 255, x_dtype)
                place = (step * LEVELS + n) * BLOCK + columns
                x = tl.load(inputs + place[:, None], mask=real, other=0.0)
                acc = tl.dot(level, x, acc, input_precision="ieee")
        else:
            x = tl.load(inputs + at[:, None], mask=real & (at < INPUTS)[:, None], other=0.0)
            acc = tl.dot(_decode(weight, x_dtype), x, acc, input_precision="ieee")
    place = token[None, :].to(tl.int64) * outputs + row[:, None]
    _store(
        acc, ending, limit, out_ptr, part_ptr, count_ptr, split, tokens.to(tl.int64) * outputs,
        place, real & inside[:, None], SPLITS,
    )  # fmt: skip


@triton.jit
def _store(
    sums, ending, limit, out_ptr, part_ptr, count_ptr, split, size, place, real,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Store a program's outputs; the last of a tile's splits to arrive adds all, in order."""
    dtype = out_ptr.dtype.element_ty
    if SPLITS == 1:
        y = _finish(sums, sums, ending, limit, dtype, "none", False, "none")
        tl.store(out_ptr + place, y.to(dtype), mask=real)
    else:
        tl.store(part_ptr + split * size + place, sums, mask=real)
        tl.debug_barrier()
        tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(count_ptr + tile, 1) == SPLITS - 1:
            tl.store(count_ptr + tile, 0)
            total = tl.zeros(sums.shape, tl.float32)
            for other in tl.static_range(SPLITS):
                total += tl.load(
                    part_ptr + other * size + place, mask=real, other=0.0, cache_modifier=".cg"
                )
            y = _finish(total, total, ending, limit, dtype, "none", False, "none")
            tl.store(out_ptr + place, y.to(dtype), mask=real)


@triton.jit
def expand_kernel(
    weight_ptr, scale_ptr, out_ptr,
    INPUTS: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr, SCALES: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
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
    if WORDS:
        word = tl.load(weight_ptr + at // 16 * 4 + at % 4, mask=inside, other=0)
        value = _decode_code((word >> (at % 16 // 4 * 8)).to(tl.int16) & 255, tl.float32)
    else:
        value = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
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
