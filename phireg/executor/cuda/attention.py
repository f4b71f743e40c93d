"""Triton kernels of attention: of prompts into a cache, of one token over it, and block-sparse.

They are as ``kernels`` says.
"""

import triton
import triton.language as tl

from phireg.executor.cuda.kernels import (
    _KEEP,
    _decode,
    _on_grid,
    _rounded,
    _rounding,
    _store_levels,
    _wait,
)

# The largest score before there is one: finite, so that a masked score can be taken from it.
_NONE: tl.constexpr = tl.constexpr(-1.0e30)


@triton.jit
def _angles(cos_ptr, sin_ptr, dim, HALF: tl.constexpr):
    """Return the cosine of each dimension, and the sine with the sign that ``_turn`` wants."""
    cos = tl.load(cos_ptr + dim % HALF, mask=dim < 2 * HALF, other=0.0)
    sin = tl.load(sin_ptr + dim % HALF, mask=dim < 2 * HALF, other=0.0)
    return cos, tl.where(dim < HALF, -sin, sin)


@triton.jit
def _turn(start, dim, inside, turned, cos, sin, HALF: tl.constexpr):
    """Return heads of queries or keys, rotated where ``turned``, in their dtype."""
    x = tl.load(start + dim, mask=inside, other=0.0)
    partner = tl.where(dim < HALF, dim + HALF, dim - HALF)
    other = tl.load(start + partner, mask=turned, other=0.0).to(tl.float32)
    y = tl.where(turned, x.to(tl.float32) * cos + other * sin, x.to(tl.float32))
    return y.to(x.dtype)


@triton.jit
def _kept(x, scale, like_ptr, GRID: tl.constexpr):
    """Return keys or values for a cache: as they are, on a grid, or as its levels in float32."""
    kept = x
    if GRID != "none":
        kept = _on_grid(x.to(tl.float32), scale, GRID)
        if like_ptr.dtype.element_ty == x.dtype:
            kept = (kept * scale).to(x.dtype)
    return kept


@triton.jit
def rotate_kernel(
    qkv_ptr, cos_ptr, sin_ptr, slot_ptr, scale_ptr, query_ptr, key_ptr, value_ptr, seen_key_ptr,
    seen_value_ptr, tokens, capacity, rotary_rows,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr,
    GRID: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    TOTAL: tl.constexpr = HEADS + 2 * KV_HEADS
    token = tl.program_id(0).to(tl.int64)  # of the batch
    row, position = token // tokens, token % tokens
    head = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    dim = tl.arange(0, BLOCK)[None, :]
    inside = (head < TOTAL) & (dim < SIZE)
    _wait(EARLY)
    # Dimension j < HALF is paired with j + HALF; the ones from 2 * HALF on pass through.
    turned = inside & (dim < 2 * HALF) & (head < HEADS + KV_HEADS)
    angle = (row % rotary_rows * tokens + position) * HALF
    cos, sin = _angles(cos_ptr + angle, sin_ptr + angle, dim, HALF)
    start = qkv_ptr + token * TOTAL * SIZE + head * SIZE
    x = _turn(start, dim, inside, turned, cos, sin, HALF)
    tl.store(query_ptr + token * HEADS * SIZE + head * SIZE + dim, x, mask=inside & (head < HEADS))
    scale = tl.load(scale_ptr)
    kept = _kept(x, scale, key_ptr, GRID)
    slot = tl.load(slot_ptr) + position
    head -= HEADS
    is_key, is_value = inside & (head >= 0) & (head < KV_HEADS), inside & (head >= KV_HEADS)
    own = row * KV_HEADS + head % KV_HEADS
    place = (own * capacity + slot) * SIZE + dim
    tl.store(key_ptr + place, kept.to(key_ptr.dtype.element_ty), mask=is_key)
    tl.store(value_ptr + place, kept.to(key_ptr.dtype.element_ty), mask=is_value)
    if key_ptr.dtype.element_ty != x.dtype:
        seen = (kept * scale).to(x.dtype)
        place = (own * tokens + position) * SIZE + dim
        tl.store(seen_key_ptr + place, seen, mask=is_key)
        tl.store(seen_value_ptr + place, seen, mask=is_value)


@triton.jit
def _fold(scores, value, best, total, acc, scale):
    """Add a tile of keys to the running maximum, sum and output; scores times scale are log2s."""
    new_best = tl.maximum(best, tl.max(scores, 1) * scale)
    weight = tl.exp2(scores * scale - new_best[:, None])
    fade = tl.exp2(best - new_best)
    total = total * fade + tl.sum(weight, 1)
    acc = tl.dot(weight.to(value.dtype), value, acc * fade[:, None], input_precision="ieee")
    return new_best, total, acc


@triton.jit
def _tile(
    tile, bound, slot, pad, number, member, dim, TILE: tl.constexpr, SIZE: tl.constexpr,
    SPARSE: tl.constexpr, BLOCK_SIZE: tl.constexpr, LOCAL: tl.constexpr, STRIDE: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Return what the heads see of a tile of keys, and where these lie and are to be read."""
    key_slot = tile * TILE + tl.arange(0, TILE)
    needed = key_slot < bound
    seen = (needed & (key_slot >= pad))[None, :] & member[:, None]
    if SPARSE:
        key_block = (key_slot - pad) // BLOCK_SIZE
        local = (slot - pad) // BLOCK_SIZE - key_block < LOCAL
        stripe = (key_block[None, :] + number[:, None] * STEP + 1) % STRIDE == 0
        seen = seen & (local[None, :] | stripe)
        # A key that no head of the group sees is not read.
        needed = tl.max(seen.to(tl.int32), 0) > 0
    place = key_slot[:, None] * SIZE + dim[None, :]
    return seen, place, needed[:, None] & (dim < SIZE)[None, :]


@triton.jit
def _see(query, key, value, seen, best, total, acc, scale):
    """Add a tile of a cache to ``_fold``'s sums; its levels become numbers of the query's dtype."""
    scores = tl.dot(query, tl.trans(_decode(key, query.dtype)), input_precision="ieee")
    scores = tl.where(seen, scores, float("-inf"))
    return _fold(scores, _decode(value, query.dtype), best, total, acc, scale)


@triton.jit
def _merged(
    part_ptr, stats_ptr, first, dim, mine, inside, SIZE: tl.constexpr, SPLITS: tl.constexpr
):
    """Return heads' output from what their splits stored, past the processor's own cache."""
    SOME: tl.constexpr = max(1, min(SPLITS, 64 // inside.shape[0]))  # that are read at once
    best = tl.full([inside.shape[0]], _NONE, tl.float32)
    total = tl.zeros([inside.shape[0]], tl.float32)
    acc = tl.zeros(inside.shape, tl.float32)
    for split in range(0, SPLITS, SOME):
        part = first + split + tl.arange(0, SOME)[None, :]
        place = part[:, :, None] * SIZE + dim[None, None, :]
        tops = tl.load(stats_ptr + 2 * part, mask=mine, other=0.0, cache_modifier=".cg")
        sums = tl.load(stats_ptr + 2 * part + 1, mask=mine, other=1.0, cache_modifier=".cg")
        values = tl.load(part_ptr + place, mask=inside[:, None, :], other=0.0, cache_modifier=".cg")
        new_best = tl.maximum(best, tl.max(tops, 1))
        weight, fade = tl.exp2(tops - new_best[:, None]), tl.exp2(best - new_best)
        total = total * fade + tl.sum(sums * weight, 1)
        acc = acc * fade[:, None] + tl.sum(values * weight[:, :, None], 1)
        best = new_best
    return acc / total[:, None]


@triton.jit
def attend_kernel(
    qkv_ptr, cos_ptr, sin_ptr, key_ptr, value_ptr, kv_scale_ptr, slot_ptr, pads_ptr, out_ptr,
    part_ptr, stats_ptr, count_ptr, smoothing_ptr, scale_ptr, lost_ptr, lost_width, scale, capacity,
    original, first_head,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr,
    KV_GRID: tl.constexpr, SPLITS: tl.constexpr, SPARSE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    LOCAL: tl.constexpr, STRIDE: tl.constexpr, STEP: tl.constexpr, PADDED: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, SMOOTH: tl.constexpr, GRID: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    HEADS: tl.constexpr = KV_HEADS * GROUP
    ROWS: tl.constexpr = max(16, PADDED)  # the matrix units take sixteen at least
    pair, split = tl.program_id(0), tl.program_id(1)
    row, group = pair // KV_HEADS, pair % KV_HEADS
    member = tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK)
    own = group * GROUP + member  # heads of this rank
    query_mask = (member < GROUP)[:, None] & (dim < SIZE)[None, :]
    # What the step's own kernels do not write is not waited for: the first of its tiles, too. Every
    # split gets its share of the tiles between the padding and the new token.
    slot = tl.load(slot_ptr).to(tl.int32)
    pad = tl.load(pads_ptr + row).to(tl.int32)
    first = pad // TILE
    last = tl.cdiv(slot, TILE)
    share = tl.cdiv(last - first, SPLITS)
    begin = first + split * share
    end = tl.minimum(begin + share, last)
    bound = tl.minimum(end * TILE, slot)
    cache = (row * KV_HEADS + group).to(tl.int64) * capacity * SIZE
    if SPLITS > 1:  # otherwise there are programs enough to hide what each waits for
        seen, place, mask = _tile(
            begin, bound, slot, pad, first_head + own, member < GROUP, dim, TILE, SIZE, SPARSE,
            BLOCK_SIZE, LOCAL, STRIDE, STEP,
        )  # fmt: skip
        key = tl.load(key_ptr + cache + place, mask=mask, other=0.0)
        value = tl.load(value_ptr + cache + place, mask=mask, other=0.0)
    # The second half of the tables is for sequences that are longer than the original context.
    position = slot - pad
    angle = (tl.where(position < original, 0, capacity) + position).to(tl.int64) * HALF
    cos, sin = _angles(cos_ptr + angle, sin_ptr + angle, dim, HALF)
    STORED: tl.constexpr = key_ptr.dtype.element_ty != qkv_ptr.dtype.element_ty
    kv_scale = tl.load(kv_scale_ptr) if KV_GRID != "none" else 1.0
    head = tl.arange(0, ROWS if SPLITS == 1 else PADDED)[:, None]
    columns = (group * GROUP + head) * SIZE + dim[None, :]
    inside = (head < GROUP) & (dim < SIZE)[None, :]
    smoothing, grid_scale = _rounding(columns, inside, smoothing_ptr, scale_ptr, SMOOTH, GRID)
    _wait(EARLY)
    qkv_ptr += row.to(tl.int64) * (HEADS + 2 * KV_HEADS) * SIZE
    wide = dim < SIZE
    turned = wide & (dim < 2 * HALF)
    query = _turn(
        qkv_ptr + own[:, None] * SIZE, dim[None, :], query_mask,
        (member < GROUP)[:, None] & turned[None, :], cos[None, :], sin[None, :], HALF,
    )  # fmt: skip
    # The new token's key and value are kept by one split, which also sees them.
    start = qkv_ptr + (HEADS + group) * SIZE
    new_key = _kept(_turn(start, dim, wide, turned, cos, sin, HALF), kv_scale, key_ptr, KV_GRID)
    new_value = tl.load(start + KV_HEADS * SIZE + dim, mask=wide, other=0.0)
    new_value = _kept(new_value, kv_scale, key_ptr, KV_GRID)
    if split == SPLITS - 1:
        new_place = cache + slot * SIZE + dim
        tl.store(key_ptr + new_place, new_key.to(key_ptr.dtype.element_ty), mask=wide)
        tl.store(value_ptr + new_place, new_value.to(key_ptr.dtype.element_ty), mask=wide)
    # The scale of a cache of levels goes with the scores, and with the sum of values at the end.
    if STORED:
        scale *= kv_scale
        # Levels are float16's numbers, too, and become these in fewer steps. A query that float16
        # does not hold gives no finite logits, which is reported.
        query = query.to(tl.float32 if query.dtype == tl.float32 else tl.float16)
    best = tl.full([ROWS], _NONE, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    if SPLITS > 1:
        best, total, acc = _see(query, key, value, seen, best, total, acc, scale)
        begin += 1
    for tile in range(begin, end):
        seen, place, mask = _tile(
            tile, bound, slot, pad, first_head + own, member < GROUP, dim, TILE, SIZE, SPARSE,
            BLOCK_SIZE, LOCAL, STRIDE, STEP,
        )  # fmt: skip
        key = tl.load(key_ptr + cache + place, mask=mask, other=0.0)
        value = tl.load(value_ptr + cache + place, mask=mask, other=0.0)
        best, total, acc = _see(query, key, value, seen, best, total, acc, scale)
    if split == SPLITS - 1:
        score = tl.sum(query.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scale
        new_best = tl.maximum(best, score, propagate_nan=_KEEP)
        weight, fade = tl.exp2(score - new_best), tl.exp2(best - new_best)
        total = total * fade + weight
        acc = acc * fade[:, None] + weight[:, None] * new_value.to(tl.float32)[None, :]
        best = new_best
    if STORED:
        acc *= kv_scale
    last_arrived = True
    if SPLITS > 1:
        part = (pair * GROUP + member) * SPLITS + split
        tl.store(part_ptr + part[:, None] * SIZE + dim[None, :], acc, mask=query_mask)
        tl.store(stats_ptr + 2 * part, best, mask=member < GROUP)
        tl.store(stats_ptr + 2 * part + 1, total, mask=member < GROUP)
        tl.debug_barrier()
        last_arrived = tl.atomic_add(count_ptr + pair, 1) == SPLITS - 1
    if last_arrived:
        if SPLITS == 1:
            y = acc / total[:, None]
        else:
            tl.store(count_ptr + pair, 0)
            parts = (pair * GROUP + head) * SPLITS
            y = _merged(part_ptr, stats_ptr, parts, dim, head < GROUP, inside, SIZE, SPLITS)
        y = _rounded(y, smoothing, grid_scale, qkv_ptr.dtype.element_ty, SMOOTH, GRID)
        _store_levels(out_ptr + row * HEADS * SIZE, columns, y, inside, lost_ptr + row * lost_width)


@triton.jit
def sparse_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, pads_ptr,
    query_row, query_head, query_token, key_row, key_head, key_token,
    value_row, value_head, value_token, length, first_head, scale,
    GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, LOCAL: tl.constexpr,
    STRIDE: tl.constexpr, STEP: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    # Long rows first. Positions count from a sequence's first token.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, TILE)
    dim = tl.arange(0, BLOCK)
    wide = (dim < SIZE)[None, :]
    _wait(EARLY)
    pad = tl.load(pads_ptr + row) if PADDED else 0
    queries = tile * TILE + lane
    inside = (pad + queries < length)[:, None]
    query_ptr += row * query_row + head * query_head + pad * query_token
    key_ptr += row * key_row + head // GROUP * key_head + pad * key_token
    value_ptr += row * value_row + head // GROUP * value_head + pad * value_token
    query = tl.load(
        query_ptr + queries[:, None] * query_token + dim[None, :], mask=inside & wide, other=0.0
    )
    # The queries of a tile lie in one block, so that all of them see a tile of keys or none does,
    # but for the last one, their own.
    PARTS: tl.constexpr = BLOCK_SIZE // TILE
    near = tl.maximum(tile // PARTS - LOCAL + 1, 0)  # the first of the blocks close by
    first = STRIDE - 1 - ((first_head + head) * STEP) % STRIDE  # the head's first stripe
    far = tl.maximum(near - first + STRIDE - 1, 0) // STRIDE * PARTS  # tiles of stripes before it
    whole = tl.where(tile * TILE + pad < length, far + tile - near * PARTS, 0)
    best = tl.full([TILE], _NONE, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, BLOCK], tl.float32)
    key_place = lane[:, None] * key_token + dim[None, :]
    value_place = lane[:, None] * value_token + dim[None, :]
    for t in range(0, whole):
        stripe = (first + t // PARTS * STRIDE) * PARTS + t % PARTS
        start = tl.where(t < far, stripe, near * PARTS + t - far) * TILE
        key = tl.load(key_ptr + start * key_token + key_place, mask=wide, other=0.0)
        value = tl.load(value_ptr + start * value_token + value_place, mask=wide, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        best, total, acc = _fold(scores, value, best, total, acc, scale)
    start, mask = tile * TILE, inside & wide
    key = tl.load(key_ptr + start * key_token + key_place, mask=mask, other=0.0)
    value = tl.load(value_ptr + start * value_token + value_place, mask=mask, other=0.0)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    scores = tl.where(lane[None, :] <= lane[:, None], scores, float("-inf"))
    best, total, acc = _fold(scores, value, best, total, acc, scale)
    slots = pad + queries
    place = ((row * length + slots) * tl.num_programs(1) + head)[:, None] * SIZE + dim[None, :]
    y = acc / total[:, None]
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=mask)
