"""A Triton kernel of one token's attention where each head has keys of its own, of many rows.

It is as ``kernels`` says; ``attention`` has one for fewer rows, and for keys of several heads. A
program is one warp. What its lanes read of 32 keys and values is what the matrix units want of
them: levels become their operand in the registers they were read to. The next keys are asked for
before these are attended to. All of an operand's rows or columns are the one query.
"""

import triton
import triton.language as tl

from phireg.executor.cuda.attention import _NONE, _angles, _kept, _turn
from phireg.executor.cuda.kernels import (
    _KEEP,
    _decode,
    _rounded,
    _rounding,
    _start_next,
    _store_levels,
    _wait,
)
from phireg.executor.cuda.tiles import _RUN


@triton.jit
def _half(bits):
    """Return the levels of int8 whose bits are those of numbers from 1024 to 1279, as float16."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True) - 1152.0


@triton.jit
def _opened(x, kept: tl.constexpr, dtype: tl.constexpr, WIDTH: tl.constexpr):
    """Return what lanes read of a cache as numbers [32, WIDTH]; int8's bytes as 0, 2, 1, 3."""
    if x.dtype == tl.int32 and kept == tl.int8:
        even, odd = (x & 0x00FF00FF) ^ 0x64806480, ((x >> 8) & 0x00FF00FF) ^ 0x64806480
        above, beside = _half(even >> 16), _half(odd >> 16)
        x = tl.join(tl.join(_half(even), _half(odd)), tl.join(above, beside))
    elif x.dtype == tl.int32 and kept == tl.float8e4nv:
        # A distance that the compiler does not know: so it takes pairs as they lie.
        y = x >> (16 * tl.num_programs(2))
        a, b, c, d = x.to(tl.int8), (x >> 8).to(tl.int8), y.to(tl.int8), (y >> 8).to(tl.int8)
        x = tl.join(tl.join(a, c), tl.join(b, d)).to(kept, bitcast=True)
    elif x.dtype == tl.int32:
        high = (x >> 16).to(tl.int16)
        x = tl.join(x.to(tl.int16), high).to(kept, bitcast=True)
    return tl.reshape(_decode(x, dtype), [32, WIDTH])


@triton.jit
def _sorted(x, INTEGERS: tl.constexpr):
    """Return what there is of 32 dims in the order of sums of values."""
    if INTEGERS:
        x = tl.permute(tl.reshape(x, [8, 2, 2]), [2, 1, 0])
    else:
        x = tl.permute(tl.reshape(x, [8, 4]), [1, 0])
    return tl.reshape(x, [32])


@triton.jit
def _read(
    cache_ptr, at, end, STEPS: tl.constexpr, SIZE: tl.constexpr, PER: tl.constexpr
):  # fmt: skip
    """Return what lanes read of 32 keys or values, in chunks of 32 dims.

    Lanes read eight dims of four keys or four dims of eight values: of one and those STEPS further.
    """
    WIDTH: tl.constexpr = 32 // len(STEPS)
    lane = tl.arange(0, 32)[:, None]
    key, dim = (lane // 4, lane % 4 * 8) if WIDTH == 8 else (lane % 4 * 2, lane // 4 * 4)
    source = cache_ptr + (key * SIZE + dim) // PER + tl.arange(0, WIDTH // PER)[None, :]
    source += at * (SIZE // PER)
    if SIZE % 8 != 0:
        dim += tl.arange(0, WIDTH)[None, :]
    read = ()
    for number in tl.static_range(len(STEPS)):
        step = STEPS[number]
        for c in tl.static_range((SIZE + 31) // 32):
            mask = at + key + step < end
            if SIZE % 32 != 0:
                mask = mask & (dim + 32 * c < SIZE)
            read += (tl.load(source + (step * SIZE + 32 * c) // PER, mask=mask, other=0.0),)
    return read


@triton.jit
def _joined(x):
    return tl.join(tl.join(x[0], x[1]), tl.join(x[2], x[3]))


@triton.jit
def _scores(keys, queries, kept: tl.constexpr):
    """Return the products of a query and 32 keys, whose dims are in chunks of 32: [16, 32]."""
    CHUNKS: tl.constexpr = len(queries)
    dtype: tl.constexpr = queries[0].dtype
    scores = tl.zeros([16, 32], tl.float32)
    for c in tl.static_range(CHUNKS):
        eights = ()
        for eight in tl.static_range(4):
            eights += (_opened(keys[eight * CHUNKS + c], kept, dtype, 8),)
        # Key of eight, lane of its four, dim of eight; which eight keys.
        x = tl.reshape(_joined(eights), [8, 4, 2, 2, 2, 2, 2])
        x = tl.permute(x, [2, 1, 3, 4, 6, 5, 0] if _RUN == 4 else [2, 3, 1, 4, 6, 5, 0])
        scores = tl.dot(queries[c], tl.reshape(x, [32, 32]), scores, input_precision="ieee")
    return scores


@triton.jit
def _add(values, weight, fade, accs, kept: tl.constexpr, dtype: tl.constexpr):
    """Fade sums [32 dims, 8], and add the values of 32 keys times weights [8, 32]."""
    CHUNKS: tl.constexpr = len(accs)
    # Which sixteen keys, eight, two; one of these.
    weight = tl.reshape(weight.to(dtype), [8, 2, 2, 4, 2])
    weight = tl.permute(weight, [1, 3, 2, 4, 0] if _RUN == 4 else [1, 2, 3, 4, 0])
    weight = tl.reshape(weight, [32, 8])
    new = ()
    for c in tl.static_range(CHUNKS):
        pairs = ()
        for eight in tl.static_range(4):
            one = _opened(values[2 * eight * CHUNKS + c], kept, dtype, 4)
            pairs += (tl.join(one, _opened(values[(2 * eight + 1) * CHUNKS + c], kept, dtype, 4)),)
        # Dim's eighth, two keys, dim of four; one of the keys, which eight, sixteen.
        x = tl.reshape(_joined(pairs), [8, 4, 4, 2, 2, 2])
        x = tl.permute(x, [2, 0, 5, 1, 4, 3] if _RUN == 4 else [2, 0, 5, 4, 1, 3])
        acc = accs[c] * fade[None, :]
        new += (tl.dot(tl.reshape(x, [32, 32]), weight, acc, input_precision="ieee"),)
    return new


@triton.jit
def head_attend_kernel(
    qkv_ptr, cos_ptr, sin_ptr, key_ptr, value_ptr, kv_scale_ptr, slot_ptr, pads_ptr, out_ptr,
    smoothing_ptr, scale_ptr, lost_ptr, lost_width, scale, capacity, original,
    HEADS: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, KV_GRID: tl.constexpr,
    SMOOTH: tl.constexpr, GRID: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = (SIZE + 31) // 32
    TYPE: tl.constexpr = qkv_ptr.dtype.element_ty
    KEPT: tl.constexpr = key_ptr.dtype.element_ty
    # Levels are float16's numbers, too, and become these in fewer steps. A query that float16
    # does not hold gives no finite logits, which is reported.
    DOT: tl.constexpr = tl.float16 if KEPT != TYPE and tl.float32 != TYPE else TYPE
    # Words are carried to the next step in fewer registers than what they consist of.
    PER: tl.constexpr = 32 // KEPT.primitive_bitwidth if SIZE % 8 == 0 else 1
    UNIT: tl.constexpr = tl.int32 if PER > 1 else KEPT
    INTEGERS: tl.constexpr = PER > 1 and tl.int8 == KEPT
    row, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    # What the step's own kernels do not write is not waited for: the first of its keys, too.
    slot = tl.load(slot_ptr).to(tl.int32)
    pad = tl.load(pads_ptr + row).to(tl.int32)
    position = slot - pad
    cache = tl.program_id(0).to(tl.int64) * capacity * SIZE
    keys_ptr = (key_ptr + cache).to(tl.pointer_type(UNIT))
    values_ptr = (value_ptr + cache).to(tl.pointer_type(UNIT))
    KEYS: tl.constexpr = (0, 8, 16, 24)
    VALUES: tl.constexpr = (0, 1, 8, 9, 16, 17, 24, 25)
    keys = _read(keys_ptr, pad, slot, KEYS, SIZE, PER)
    values = _read(values_ptr, pad, slot, VALUES, SIZE, PER)
    # The second half of the tables is for sequences that are longer than the original context.
    angle = (tl.where(position < original, 0, capacity) + position).to(tl.int64) * HALF
    kv_scale = tl.load(kv_scale_ptr) if KV_GRID != "none" else 1.0
    lane = tl.arange(0, 32)[:, None]
    lane_dim = lane % 4 * 8 + tl.arange(0, 8)[None, :]
    dim = tl.arange(0, 32)
    of_sum = _sorted(dim, INTEGERS)
    angles, lane_angles, roundings = (), (), ()
    for c in tl.static_range(CHUNKS):
        angles += (_angles(cos_ptr + angle, sin_ptr + angle, dim + 32 * c, HALF),)
        lane_angles += (_angles(cos_ptr + angle, sin_ptr + angle, lane_dim + 32 * c, HALF),)
        at = (of_sum + 32 * c)[:, None]
        column = head * SIZE + at
        roundings += (_rounding(column, at < SIZE, smoothing_ptr, scale_ptr, SMOOTH, GRID),)
    _wait(EARLY, False)
    query_ptr = qkv_ptr + row.to(tl.int64) * 3 * HEADS * SIZE + head * SIZE
    start = query_ptr + HEADS * SIZE
    # The scale of a cache of levels goes with the scores, and with the sum of values at the end.
    if KEPT != TYPE:
        scale *= kv_scale
    new_place = cache + slot * SIZE
    score = tl.zeros([32], tl.float32)
    queries, new_values, accs = (), (), ()
    for c in tl.static_range(CHUNKS):
        at = dim + 32 * c
        new_key = _turn(start, at, at < SIZE, at < 2 * HALF, *angles[c], HALF)
        new_key = _kept(new_key, kv_scale, key_ptr, KV_GRID)
        new_value = tl.load(start + HEADS * SIZE + at, mask=at < SIZE, other=0.0)
        new_value = _kept(new_value, kv_scale, key_ptr, KV_GRID)
        tl.store(key_ptr + new_place + at, new_key.to(KEPT), mask=at < SIZE)
        tl.store(value_ptr + new_place + at, new_value.to(KEPT), mask=at < SIZE)
        new_values += (_sorted(new_value.to(tl.float32), INTEGERS),)
        at = lane_dim + 32 * c
        query = _turn(query_ptr, at, at < SIZE, at < 2 * HALF, *lane_angles[c], HALF).to(DOT)
        new_key = tl.broadcast_to(tl.reshape(new_key.to(tl.float32), [1, 4, 8]), [8, 4, 8])
        score += tl.sum(query.to(tl.float32) * tl.reshape(new_key, [32, 8]), 1)
        # Row of eight, lane of its four, which eight rows, dim of eight.
        query = tl.broadcast_to(query[:, None, :], [32, 2, 8])
        query = tl.reshape(query, [8, 4, 2, 2, 2, 2])
        if INTEGERS:
            query = tl.permute(query, [0, 1, 2, 3, 5, 4])
        query = tl.permute(query, [2, 0, 3, 1, 4, 5] if _RUN == 4 else [2, 0, 3, 4, 1, 5])
        queries += (tl.reshape(query, [16, 32]),)
        accs += (tl.zeros([32, 8], tl.float32),)
    best = tl.full([8], _NONE, tl.float32)
    total = tl.zeros([8], tl.float32)
    for at in range(pad, slot, 32):
        scores = _scores(keys, queries, KEPT)
        keys = _read(keys_ptr, at + 32, slot, KEYS, SIZE, PER)
        scores, _ = tl.split(tl.permute(tl.reshape(scores, [2, 8, 32]), [1, 2, 0]))
        scores = tl.where((at + tl.arange(0, 32) < slot)[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1) * scale)
        weight = tl.exp2(scores * scale - new_best[:, None])
        fade = tl.exp2(best - new_best)
        total = total * fade + tl.sum(weight, 1)
        best = new_best
        accs = _add(values, weight, fade, accs, KEPT, DOT)
        values = _read(values_ptr, at + 32, slot, VALUES, SIZE, PER)
    _start_next(EARLY)
    score = tl.sum(tl.reshape(score, [8, 4]), 1) * scale
    top = tl.maximum(best, score, propagate_nan=_KEEP)
    fade, weight = tl.exp2(best - top), tl.exp2(score - top)
    total = total * fade + weight
    first = tl.arange(0, 8) == 0
    for c in tl.static_range(CHUNKS):
        at = (of_sum + 32 * c)[:, None]
        inside = (at < SIZE) & first[None, :]
        y = accs[c] * fade[None, :] + weight[None, :] * new_values[c][:, None]
        if KEPT != TYPE:
            y *= kv_scale
        y = _rounded(y / total[None, :], *roundings[c], TYPE, SMOOTH, GRID)
        place = tl.program_id(0) * SIZE + tl.broadcast_to(at, [32, 8])
        _store_levels(out_ptr, place, y, inside, lost_ptr + row * lost_width)
