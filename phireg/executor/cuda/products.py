"""Triton kernels of a linear over weights of more than four bits, for one token and for a few.

Each ends with what follows a linear: scales, the bias, the MLP's nonlinearity, and the rounding of
the next linear's inputs to its grid. Constants: ``SCALES`` is the number of ``scale``'s entries, 0,
1 or 2 for one a row; ``X_SCALE`` says that inputs are levels, ``OUT`` the grid of outputs, ``TYPE``
the compute dtype.
"""

import triton
import triton.language as tl

from phireg.executor.cuda.kernels import (
    _activate,
    _decode,
    _rounded,
    _rounding,
    _start_next,
    _store_levels,
    _wait,
)


@triton.jit
def _ending(
    first, second, inside, scale_ptr, x_scale_ptr, bias_ptr,
    SCALES: tl.constexpr, X_SCALE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Load scales and biases of the weight's rows first and second."""
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
    return y_scale, z_scale, y_bias, z_bias


@triton.jit
def _finish(
    y, z, ending, rounding, limit, dtype: tl.constexpr, KIND: tl.constexpr, SMOOTH: tl.constexpr,
    OUT: tl.constexpr,
):  # fmt: skip
    """Return the outputs of float32 sums ``y`` and ``z``; only gated ones use the second."""
    y_scale, z_scale, y_bias, z_bias = ending
    y = y * y_scale + y_bias
    if KIND != "none":
        z = z * z_scale + z_bias
        y = _activate(y.to(dtype).to(tl.float32), z.to(dtype).to(tl.float32), limit, KIND)
    return _rounded(y, rounding[0], rounding[1], dtype, SMOOTH, OUT)


@triton.jit
def _pair(row, outputs, KIND: tl.constexpr):
    """Return the two rows of a weight that make a gated output; another has one row, twice."""
    first, second = row, row
    if KIND == "swiglu":
        second = row + outputs
    if KIND == "gegelu":
        first = 2 * row
        second = first + 1
    return first, second


@triton.jit
def _own_expert(expert_ptr, first_expert, experts):
    """Return a program's pair of a token and an expert, this rank's number of it, and if it is one.

    Pairs of other ranks' experts leave zeros.
    """
    pair = tl.program_id(1).to(tl.int64)
    expert = tl.load(expert_ptr + pair) - first_expert
    mine = (expert >= 0) & (expert < experts)
    return pair, tl.where(mine, expert, 0), mine


@triton.jit
def _inputs(x_ptr, at, INPUTS: tl.constexpr, FULL: tl.constexpr):
    """Load inputs as float32."""
    if FULL:
        return tl.load(x_ptr + at).to(tl.float32)
    return tl.load(x_ptr + at, mask=at < INPUTS, other=0.0).to(tl.float32)


@triton.jit
def _fetch(start, at, inside, INPUTS: tl.constexpr):
    """Load a tile of a weight [rows, inputs]."""
    return tl.load(start + at[None, :], mask=inside[:, None] & (at < INPUTS)[None, :], other=0.0)


@triton.jit
def matvec_kernel(
    x_ptr, weight_ptr, scale_ptr, x_scale_ptr, bias_ptr, smoothing_ptr, out_scale_ptr, lost_ptr,
    lost_width, expert_ptr, out_ptr, outputs, limit, first_expert, experts,
    INPUTS: tl.constexpr, SCALES: tl.constexpr, X_SCALE: tl.constexpr, BIAS: tl.constexpr,
    KIND: tl.constexpr, SMOOTH: tl.constexpr, OUT: tl.constexpr, TYPE: tl.constexpr,
    PER_TOKEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    GATED: tl.constexpr = KIND == "swiglu" or KIND == "gegelu"
    FULL: tl.constexpr = INPUTS % BLOCK == 0
    STEPS: tl.constexpr = (INPUTS + BLOCK - 1) // BLOCK
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < outputs
    if PER_TOKEN > 0:
        _wait(EARLY)
        pair, expert, mine = _own_expert(expert_ptr, first_expert, experts)
        inside = rows < tl.where(mine, outputs, 0)
        x_ptr += pair // PER_TOKEN * INPUTS
        lost_ptr += pair // PER_TOKEN * lost_width
        out_ptr += pair * outputs
        rank_rows = expert * outputs * (2 if GATED else 1)
        weight_ptr += rank_rows * INPUTS
        scale_ptr += rank_rows if SCALES == 2 else expert
    first, second = _pair(rows, outputs, KIND)
    columns = tl.arange(0, BLOCK)
    left = weight_ptr + first.to(tl.int64)[:, None] * INPUTS
    right = weight_ptr + second.to(tl.int64)[:, None] * INPUTS
    # Weights are on their way while the kernel before this one ends: of DEPTH steps at a time.
    a, b = (), ()
    for step in tl.static_range(min(DEPTH, STEPS)):
        a += (_fetch(left, step * BLOCK + columns, inside, INPUTS),)
        if GATED:
            b += (_fetch(right, step * BLOCK + columns, inside, INPUTS),)
    ending = _ending(first, second, inside, scale_ptr, x_scale_ptr, bias_ptr, SCALES, X_SCALE, BIAS)
    rounding = _rounding(rows, inside, smoothing_ptr, out_scale_ptr, SMOOTH, OUT)
    if PER_TOKEN == 0:
        _wait(EARLY)
    a_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    b_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in tl.static_range(STEPS):
        at = step * BLOCK + columns
        x = _inputs(x_ptr, at, INPUTS, FULL)[None, :]
        a_sum += a[step].to(tl.float32) * x
        if GATED:
            b_sum += b[step].to(tl.float32) * x
        if step + DEPTH < STEPS:
            a += (_fetch(left, at + DEPTH * BLOCK, inside, INPUTS),)
            if GATED:
                b += (_fetch(right, at + DEPTH * BLOCK, inside, INPUTS),)
    y = tl.sum(a_sum, 1)
    z = tl.sum(b_sum, 1) if GATED else y
    y = _finish(y, z, ending, rounding, limit, TYPE, KIND, SMOOTH, OUT)
    _store_levels(out_ptr, rows, y, rows < outputs, lost_ptr)


@triton.jit
def _less_128(bits, dtype: tl.constexpr):
    """Return 2^-13 (u - 128) of int16 u: up to 255 it is the digits of a subnormal number."""
    up = tl.full(bits.shape, 2.0**11 if dtype == tl.float16 else 2.0**120, dtype)
    return tl.fma(bits.to(dtype, bitcast=True), up, tl.full(bits.shape, -(2.0**-6), dtype))


@triton.jit
def _of_words(words, dtype: tl.constexpr, RUN: tl.constexpr):
    """Return words of four int8, [blocks, 2, tiles, 8, 4, 4], as [tiles, 16, 64 inputs a block].

    A lane has four words of a row, and of the row eight below it, and keeps them as an operand.
    Bytes 0 and 2 of a word are a pair for the matrix units, and bytes 1 and 3. It is 2^-13 of them.
    """
    even = (words & 0x00FF00FF) ^ 0x00800080  # 128 is added to each
    odd = ((words >> 8) & 0x00FF00FF) ^ 0x00800080
    # The higher one first: so the compiler computes both at once, where they lie.
    high = _less_128((even >> 16).to(tl.int16), dtype), _less_128((odd >> 16).to(tl.int16), dtype)
    low = _less_128(even.to(tl.int16), dtype), _less_128(odd.to(tl.int16), dtype)
    # Block, which eight rows, tile, row, lane, word, of a pair, which pair.
    q = tl.join(tl.join(low[0], high[0]), tl.join(low[1], high[1]))
    q = tl.permute(q, [2, 1, 3, 0, 5, 4, 7, 6] if RUN == 4 else [2, 1, 3, 0, 5, 7, 4, 6])
    return tl.reshape(q, [words.shape[2], 16, 64 * words.shape[0]])


@triton.jit
def _place(tokens, rows, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """Return a program's tiles of rows and of tokens: eight of rows at once share their inputs."""
    row_tiles = tl.cdiv(rows, ROWS)
    several = 8 * tl.cdiv(tokens, TOKENS)
    first = tl.program_id(0) // several * 8
    height = min(row_tiles - first, 8)
    place = tl.program_id(0) % several
    return first + place % height, place // height


@triton.jit
def product_kernel(
    x_ptr, weight_ptr, scale_ptr, x_scale_ptr, bias_ptr, smoothing_ptr, out_scale_ptr, lost_ptr,
    lost_width, out_ptr, part_ptr, count_ptr, tokens, outputs, limit,
    INPUTS: tl.constexpr, SCALES: tl.constexpr, X_SCALE: tl.constexpr, BIAS: tl.constexpr,
    KIND: tl.constexpr, SMOOTH: tl.constexpr, OUT: tl.constexpr, TYPE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """``BLOCK`` inputs a step; int8 for half-precision inputs come as words of four.

    The two rows of a gated output are eight apart, where one lane has both of their sums.
    """
    PARTS: tl.constexpr = 2 if KIND == "swiglu" or KIND == "gegelu" else 1
    STEPS: tl.constexpr = (INPUTS + BLOCK - 1) // BLOCK
    FULL: tl.constexpr = INPUTS % BLOCK == 0
    SHARE: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    x_dtype: tl.constexpr = x_ptr.dtype.element_ty
    LEVELS: tl.constexpr = x_dtype == tl.int8
    WORDS: tl.constexpr = weight_ptr.dtype.element_ty == tl.int32
    WIDTH: tl.constexpr = INPUTS // 4 if WORDS else INPUTS
    split = tl.program_id(1)
    row_tile, token_tile = _place(tokens, outputs * PARTS, ROWS, TOKENS)
    token = token_tile * TOKENS + tl.arange(0, TOKENS)
    real = (token < tokens)[None, :]
    ending, rounding, output = _ends(
        row_tile, outputs, scale_ptr, x_scale_ptr, bias_ptr, smoothing_ptr, out_scale_ptr, ROWS,
        SCALES, X_SCALE, BIAS, KIND, SMOOTH, OUT,
    )  # fmt: skip
    inputs = tl.arange(0, BLOCK)
    row, inside = _rows(row_tile * ROWS + tl.arange(0, ROWS), outputs, KIND, 8)
    own, present, columns = row, inside, inputs[None, :]
    if WORDS:
        # A lane's words of a block of 64 inputs, and of the next ones, are rows of a load.
        place = tl.arange(0, ROWS * BLOCK // 64)
        own = place % (ROWS // 2) // 8 * 16 + place % ROWS // (ROWS // 2) * 8 + place % 8
        own, present = _rows(row_tile * ROWS + own, outputs, KIND, 8)
        columns = (place // ROWS * 16)[:, None] + tl.arange(0, 16)[None, :]
    weights = weight_ptr + own.to(tl.int64)[:, None] * WIDTH + columns
    xs = x_ptr + token.to(tl.int64)[None, :] * INPUTS + inputs[:, None]
    _wait(EARLY, False)
    acc = tl.zeros([ROWS, TOKENS], tl.int32 if LEVELS else tl.float32)
    for step in range(split * SHARE, min(split * SHARE + SHARE, STEPS)):
        start = step * (BLOCK * WIDTH // INPUTS)
        mask, known = present[:, None], real
        if not FULL:
            mask = mask & (start + columns < WIDTH)
            known = known & (step * BLOCK + inputs < INPUTS)[:, None]
        weight = tl.load(weights + start, mask=mask, other=0.0)
        x = tl.load(xs + step * BLOCK, mask=known, other=0.0)
        if LEVELS:
            acc = tl.dot(weight, x, acc, out_dtype=tl.int32)
        elif x_dtype == tl.float8e4nv:
            # Matrix units keep fewer bits of a sum than float32, to which each 128 are added.
            acc = tl.dot(weight, x, acc, max_num_imprecise_acc=128)
        elif WORDS:
            words = tl.reshape(weight, [BLOCK // 64, 2, ROWS // 16, 8, 4, 4])
            x = tl.reshape(x, [BLOCK // 64, 4, 4, 2, 2, TOKENS])
            x = tl.reshape(tl.permute(x, [0, 2, 4, 1, 3, 5]), [BLOCK, TOKENS])
            acc = tl.dot(tl.reshape(_of_words(words, x_dtype, 2), [ROWS, BLOCK]), x, acc)
        else:
            acc = tl.dot(_decode(weight, x_dtype), x, acc, input_precision="ieee")
    _start_next(EARLY)
    _store_outputs(
        acc.to(tl.float32) * (2.0**13 if WORDS else 1.0), ending, rounding, limit, out_ptr,
        lost_ptr, lost_width, part_ptr, count_ptr, split, row, inside, output, token, tokens,
        outputs, TYPE, KIND, SMOOTH, OUT, SPLITS, 8,
    )  # fmt: skip


@triton.jit
def _rows(number, outputs, KIND: tl.constexpr, APART: tl.constexpr):
    """Return a weight's rows in the programs' order, by number, and which of them there are."""
    if KIND == "swiglu" or KIND == "gegelu":
        output = number // (2 * APART) * APART + number % APART
        first, second = _pair(output, outputs, KIND)
        return tl.where(number // APART % 2 == 0, first, second), output < outputs
    return number, number < outputs


@triton.jit
def _ends(
    row_tile, outputs, scale_ptr, x_scale_ptr, bias_ptr, smoothing_ptr, out_scale_ptr,
    ROWS: tl.constexpr, SCALES: tl.constexpr, X_SCALE: tl.constexpr, BIAS: tl.constexpr,
    KIND: tl.constexpr, SMOOTH: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Return what follows a program's sums, and the outputs that these give."""
    EACH: tl.constexpr = ROWS // 2 if KIND == "swiglu" or KIND == "gegelu" else ROWS
    output = row_tile * EACH + tl.arange(0, EACH)
    column, inside = output[:, None], (output < outputs)[:, None]
    first, second = _pair(column, outputs, KIND)
    ending = _ending(first, second, inside, scale_ptr, x_scale_ptr, bias_ptr, SCALES, X_SCALE, BIAS)
    return ending, _rounding(column, inside, smoothing_ptr, out_scale_ptr, SMOOTH, OUT), output


@triton.jit
def _store_outputs(
    sums, ending, rounding, limit, out_ptr, lost_ptr, lost_width, part_ptr, count_ptr, split, row,
    inside, output, token, tokens, outputs,
    TYPE: tl.constexpr, KIND: tl.constexpr, SMOOTH: tl.constexpr, OUT: tl.constexpr,
    SPLITS: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Store a program's outputs; the last of a tile's splits to arrive adds all, in order.

    ``sums`` are those of the weight's rows ``row`` [rows, tokens]; the two of a gated output are
    ``APART``.
    """
    GATED: tl.constexpr = KIND == "swiglu" or KIND == "gegelu"
    real = (token < tokens)[None, :]
    number = token[None, :].to(tl.int64)
    if SPLITS > 1:
        width = outputs * (2 if GATED else 1)
        place, known = number * width + row[:, None], real & inside[:, None]
        size = tokens.to(tl.int64) * width
        tl.store(part_ptr + split * size + place, sums, mask=known)
        tl.debug_barrier()
        before = tl.atomic_add(count_ptr + tl.program_id(0), 1)
        if before == SPLITS - 1:
            tl.store(count_ptr + tl.program_id(0), 0)
            sums = tl.zeros(sums.shape, tl.float32)
            for other in tl.static_range(SPLITS):
                sums += tl.load(
                    part_ptr + other * size + place, mask=known, other=0.0, cache_modifier=".cg"
                )
        real = real & (before + tl.zeros(real.shape, tl.int32) == SPLITS - 1)
    y, z = sums, sums
    if GATED:
        pairs = tl.reshape(sums, [sums.shape[0] // (2 * APART), 2, APART, sums.shape[1]])
        y, z = tl.split(tl.permute(pairs, [0, 2, 3, 1]))
        y = tl.reshape(y, [sums.shape[0] // 2, sums.shape[1]])
        z = tl.reshape(z, [sums.shape[0] // 2, sums.shape[1]])
    y = _finish(y, z, ending, rounding, limit, TYPE, KIND, SMOOTH, OUT)
    place, mask = number * outputs + output[:, None], real & (output < outputs)[:, None]
    _store_levels(out_ptr, place, y, mask, lost_ptr + token.to(tl.int64) * lost_width, 0)


@triton.jit
def expand_kernel(
    weight_ptr, scale_ptr, out_ptr,
    INPUTS: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Write a weight's values, as ``Levels.values`` rounds them."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < INPUTS
    _wait(EARLY)
    scale = 1.0
    if SCALES > 0:
        scale = tl.load(scale_ptr + row) if SCALES == 2 else tl.load(scale_ptr)
    value = tl.load(weight_ptr + row * INPUTS + at, mask=inside, other=0.0).to(tl.float32)
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
