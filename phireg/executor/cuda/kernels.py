"""Triton kernels of the parts of a layer that take PyTorch several passes over memory.

``launch`` starts them and says what goes in and out. All sums, norms, rotations and softmaxes are
in float32, and values are rounded to the compute dtype where ``blocks`` has them in memory. Names
in capitals are constants of a compilation.

On GPUs that can (compute capability 9 and more) a kernel is launched while the one before it ends
(programmatic dependent launch). It may read at once what no kernel of the same step writes, weights
and the cache of earlier tokens, and calls ``_wait`` before it reads or writes anything else. Most
let the next kernel begin there. The long ones of a batch let it begin when they end, with
``_start_next``: programs that begin sooner take whatever places are free, and are not spread evenly
over the GPU.
"""

import triton
import triton.language as tl

# NaN stays NaN in a clamp, as in PyTorch; a minimum drops it otherwise.
_KEEP: tl.constexpr = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _wait(EARLY: tl.constexpr, NEXT: tl.constexpr = True):
    """Wait until the kernel launched before has written its results; ``NEXT`` may begin first."""
    if EARLY:
        if NEXT:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _start_next(EARLY: tl.constexpr):
    """Let the next kernel begin, once all programs have called this."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _on_grid(x, scale, GRID: tl.constexpr):
    """Round float32 x / scale to e4m3's values or to integers, ties to even, ends clamped."""
    # The quotient is rounded as a division's, which would branch for every value: its remainder is
    # exact (Markstein; but where all bits of the scale's fraction are set). What is beyond every
    # grid's end stays so.
    inverse = tl.minimum(tl.div_rn(1.0, scale), 3.0e38)
    near = tl.clamp(x * inverse, -1.0e4, 1.0e4, propagate_nan=_KEEP)
    x = tl.fma(tl.fma(-near, scale, x), inverse, near)
    if GRID == "int8":
        shift = 12582912.0  # 1.5 * 2^23: its ulp is 1
        return tl.clamp((x + shift) - shift, -128.0, 127.0, propagate_nan=_KEEP)
    x = tl.clamp(x, -448.0, 448.0, propagate_nan=_KEEP)
    # As in ``quantized``: the ulp of `step` is the grid's step at x.
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    step = tl.maximum(power, 0.015625) * 1572864.0
    return (x + step) - step


@triton.jit
def _decode(levels, dtype: tl.constexpr):
    """Return levels of one byte as numbers of a dtype, exactly; such numbers are themselves."""
    if levels.dtype == tl.int8 and dtype == tl.float16:
        bits = levels.to(tl.int16)
        return (((bits & 0xFF) ^ 0x80) | 0x6400).to(tl.float16, bitcast=True) - 1152.0
    if levels.dtype == tl.float8e4nv and dtype == tl.bfloat16:
        # Two conversions that GPUs have instead of one that they do not.
        return levels.to(tl.float16).to(tl.float32).to(tl.bfloat16)
    return levels.to(dtype)


@triton.jit
def _rounding(columns, inside, smoothing_ptr, scale_ptr, SMOOTH: tl.constexpr, GRID: tl.constexpr):
    """Load what ``_rounded`` rounds by; as constants, these are not waited for."""
    smoothing = 1.0
    scale = 1.0
    if GRID != "none":
        scale = tl.load(scale_ptr)
        if SMOOTH:
            smoothing = tl.load(smoothing_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    return smoothing, scale


@triton.jit
def _rounded(y, smoothing, scale, dtype: tl.constexpr, SMOOTH: tl.constexpr, GRID: tl.constexpr):
    """Return a linear's inputs as levels of their grid, or as they are if that is "none"."""
    if GRID != "none":
        y = y.to(dtype).to(tl.float32)
        if SMOOTH:
            y = (y * smoothing).to(dtype).to(tl.float32)
        y = _on_grid(y, scale, GRID)
    return y


@triton.jit
def _store_levels(out_ptr, place, y, mask, lost_ptr, AXIS: tl.constexpr = None):
    """Store a linear's inputs, of one token or those along ``AXIS`` of each.

    A NaN, which int8 does not have, goes into the token's hidden states.
    """
    kept: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + place, y.to(kept), mask=mask)
    if kept == tl.int8:
        tl.store(lost_ptr, float("nan"), mask=tl.max(((y != y) & mask).to(tl.int32), AXIS) > 0)


@triton.jit
def _activate(first, second, limit, KIND: tl.constexpr):
    """Apply the MLP's nonlinearity; ``second`` is unused by an ungated one."""
    if KIND == "swiglu":
        return second * tl.sigmoid(second) * first
    if KIND == "gegelu":
        gate = tl.minimum(first, limit, propagate_nan=_KEEP)
        value = tl.clamp(second, -limit, limit, propagate_nan=_KEEP)
        return gate * tl.sigmoid(1.702 * gate) * (value + 1.0)
    inner = 0.7978845608028654 * (first + 0.044715 * first * first * first)
    return first * tl.sigmoid(2.0 * inner)  # (1 + tanh(y)) / 2 = sigmoid(2 y)


@triton.jit
def norm_kernel(
    x_ptr, delta_ptr, weight_ptr, bias_ptr, smoothing_ptr, scale_ptr, lost_ptr, lost_width, out_ptr,
    width, epsilon,
    DELTA: tl.constexpr, RMS: tl.constexpr, SMOOTH: tl.constexpr, GRID: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if not RMS:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    smoothing, grid_scale = _rounding(columns, inside, smoothing_ptr, scale_ptr, SMOOTH, GRID)
    _wait(EARLY)
    place = tl.program_id(0).to(tl.int64) * width + columns
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if DELTA:
        total = (x + tl.load(delta_ptr + place, mask=inside, other=0.0).to(tl.float32)).to(dtype)
        tl.store(x_ptr + place, total, mask=inside)
        x = total.to(tl.float32)
    if RMS:
        scale = tl.rsqrt(tl.sum(x * x, 0) / width + epsilon)
        u = (x * scale).to(dtype).to(tl.float32) * weight
    else:
        x = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
        u = x * tl.rsqrt(tl.sum(x * x, 0) / width + epsilon) * weight + bias
    u = _rounded(u, smoothing, grid_scale, dtype, SMOOTH, GRID)
    if DELTA and out_ptr.dtype.element_ty == tl.int8:
        tl.debug_barrier()  # what is lost may be stored where the sum was
    lost_ptr += tl.program_id(0).to(tl.int64) * lost_width
    _store_levels(out_ptr, place, u, inside, lost_ptr)


@triton.jit
def quantize_kernel(
    x_ptr, smoothing_ptr, scale_ptr, lost_ptr, lost_width, out_ptr, width,
    SMOOTH: tl.constexpr, GRID: tl.constexpr, STORED: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    smoothing, scale = _rounding(columns, inside, smoothing_ptr, scale_ptr, SMOOTH, GRID)
    _wait(EARLY)
    place = tl.program_id(0).to(tl.int64) * width + columns
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    stored = _rounded(x, smoothing, scale, x_ptr.dtype.element_ty, SMOOTH, GRID)
    if not STORED:
        stored = stored * scale
    lost_ptr += tl.program_id(0).to(tl.int64) * lost_width
    _store_levels(out_ptr, place, stored, inside, lost_ptr)


@triton.jit
def activation_kernel(
    z_ptr, smoothing_ptr, scale_ptr, lost_ptr, lost_width, out_ptr, width, limit,
    KIND: tl.constexpr, SMOOTH: tl.constexpr, GRID: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    smoothing, scale = _rounding(columns, inside, smoothing_ptr, scale_ptr, SMOOTH, GRID)
    _wait(EARLY)
    if KIND == "gegelu":
        both = tl.program_id(1) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
        pairs = tl.load(z_ptr + row * 2 * width + both, mask=both < 2 * width, other=0.0)
        first, second = tl.split(tl.reshape(pairs, [BLOCK, 2]))
    elif KIND == "swiglu":
        first = tl.load(z_ptr + row * 2 * width + columns, mask=inside, other=0.0)
        second = tl.load(z_ptr + row * 2 * width + width + columns, mask=inside, other=0.0)
    else:
        first = tl.load(z_ptr + row * width + columns, mask=inside, other=0.0)
        second = first
    y = _activate(first.to(tl.float32), second.to(tl.float32), limit, KIND)
    y = _rounded(y, smoothing, scale, z_ptr.dtype.element_ty, SMOOTH, GRID)
    _store_levels(out_ptr, row * width + columns, y, inside, lost_ptr + row * lost_width)


@triton.jit
def choose_kernel(
    logits_ptr, token_ptr, best_ptr, place_ptr, count_ptr, vocab_size, logits_row,
    NO_TOKEN: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = split * BLOCK + tl.arange(0, BLOCK)
    _wait(EARLY)
    inside = place < vocab_size
    logits = tl.load(logits_ptr + row * logits_row + place, mask=inside, other=float("-inf"))
    # Infinity stands for all that is no number.
    logits = tl.where(logits == logits, logits, float("inf"))
    best = tl.max(logits, 0)
    tl.store(best_ptr + row * SPLITS + split, best)
    tl.store(
        place_ptr + row * SPLITS + split, tl.min(tl.where(logits == best, place, vocab_size), 0)
    )
    tl.debug_barrier()
    # The last of a row's splits to arrive compares all of them.
    if tl.atomic_add(count_ptr + row, 1) == SPLITS - 1:
        tl.store(count_ptr + row, 0)
        other = tl.arange(0, PADDED)
        known = row * SPLITS + other
        there = other < SPLITS
        tops = tl.load(best_ptr + known, mask=there, other=float("-inf"), cache_modifier=".cg")
        places = tl.load(place_ptr + known, mask=there, other=0, cache_modifier=".cg")
        best = tl.max(tops, 0)
        chosen = tl.min(tl.where(there & (tops == best), places, vocab_size), 0)
        finite = (best < float("inf")) & (best > float("-inf"))
        tl.store(token_ptr + row, tl.where(finite, chosen, NO_TOKEN).to(tl.int64))


@triton.jit
def combine_kernel(
    output_ptr, share_ptr, out_ptr, width,
    PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Add the outputs of a token's experts, each times its share and rounded."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    _wait(EARLY)
    total = tl.zeros([BLOCK], tl.float32)
    for pair in tl.static_range(PER_TOKEN):
        place = token * PER_TOKEN + pair
        y = tl.load(output_ptr + place * width + columns, mask=inside, other=0.0).to(tl.float32)
        y = y * tl.load(share_ptr + place)
        total += y.to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + token * width + columns, total.to(out_ptr.dtype.element_ty), mask=inside)
