"""The Triton kernels as functions of tensors.

Generation on a GPU uses them, through ``fused``; a forward pass there uses ``sparse_attention``
alone. Tests compare each with ``blocks``, with which ``verify`` computes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from phireg.executor.blocks import Cache, Rotary
from phireg.executor.cuda import attention, head_attention, kernels
from phireg.executor.finite import NO_TOKEN
from phireg.reader.schemes import Grid
from phireg.reader.spec import BlockSparse, ModelSpec

# Block sizes that the kernel of prompts takes are multiples of this.
SPARSE_TILE = 64
GATED = ("swiglu", "gegelu")
_LOG2_E = math.log2(math.e)
# Of one token's attention; twice as many or half as many are no faster on an H200.
_PROGRAMS_PER_PROCESSOR = 2
# Splits of one token's attention over a short cache: the last of them to arrive merges all.
_MOST_SPLITS = 16


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a linear's inputs become levels: multiplied by ``smoothing`` [width], then rounded.

    Attributes:
        scale: float32 [1].
        smoothing: in the compute dtype, or None.
        grid: of the levels.
        dtype: that the levels are kept in; None is the compute dtype.
        lost: for int8, which has no NaN: contiguous hidden states of the same tokens, in which NaN
            is stored for each token that would have one. They must be read again, and not be
            written to by the same kernel's other programs.
    """

    scale: Tensor
    smoothing: Tensor | None
    grid: Grid
    dtype: torch.dtype | None = None
    lost: Tensor | None = None

    @staticmethod
    def constants(rounding: Rounding | None, grid: str = "GRID") -> dict[str, Any]:
        """Return a kernel's constants, of which ``grid`` is the name of one."""
        if rounding is None:
            return {"SMOOTH": False, grid: "none"}
        return {"SMOOTH": rounding.smoothing is not None, grid: rounding.grid}

    @staticmethod
    def kept_in(rounding: Rounding | None, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of a result, whose compute dtype is ``dtype``."""
        return dtype if rounding is None or rounding.dtype is None else rounding.dtype

    @staticmethod
    def arguments(rounding: Rounding | None, other: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """Return the smoothing, the scale, what is lost and its width, or ``other`` for none."""
        if rounding is None:
            return other, other, other, 0
        smoothing = other if rounding.smoothing is None else rounding.smoothing
        lost = rounding.lost
        if lost is None:
            assert rounding.dtype != torch.int8
            return smoothing, rounding.scale, other, 0
        return smoothing, rounding.scale, lost, lost.shape[-1]


def norm(
    kind: str,
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    rounding: Rounding | None = None,
) -> Tensor:
    """Return LayerNorm or RMSNorm of contiguous ``x`` + ``delta``; ``x`` becomes that sum.

    With ``rounding`` these are levels.
    """
    width = x.shape[-1]
    out = torch.empty_like(x, dtype=Rounding.kept_in(rounding, x.dtype))
    kernels.norm_kernel[(x.numel() // width,)](
        x, x if delta is None else delta, weight, weight if bias is None else bias,
        *Rounding.arguments(rounding, weight), out, width, epsilon, DELTA=delta is not None,
        RMS=kind == "rms_norm", **Rounding.constants(rounding),
        BLOCK=triton.next_power_of_2(width), **launch_options(x.device, 8),
    )  # fmt: skip
    return out


def quantize(x: Tensor, rounding: Rounding, *, levels: bool) -> Tensor:
    """Return the nearest values on a grid, ties to even, or their levels, in ``rounding.dtype``.

    ``x`` is contiguous [..., width].
    """
    width, block = x.shape[-1], 1024
    out = torch.empty_like(x, dtype=Rounding.kept_in(rounding, x.dtype) if levels else x.dtype)
    kernels.quantize_kernel[(x.numel() // width, triton.cdiv(width, block))](
        x, *Rounding.arguments(rounding, x), out, width, **Rounding.constants(rounding),
        STORED=levels, BLOCK=block, **launch_options(x.device, 4),
    )  # fmt: skip
    return out


def activate(kind: str, z: Tensor, limit: float | None, rounding: Rounding | None = None) -> Tensor:
    """Return ``blocks.activate`` of contiguous ``z``, or its levels.

    ``limit`` is gegelu's clamp, or None.
    """
    width, block = z.shape[-1] // (2 if kind in GATED else 1), 1024
    kept = Rounding.kept_in(rounding, z.dtype)
    out = torch.empty((*z.shape[:-1], width), dtype=kept, device=z.device)
    kernels.activation_kernel[(out.numel() // width, triton.cdiv(width, block))](
        z, *Rounding.arguments(rounding, z), out, width, math.inf if limit is None else limit,
        KIND=kind, **Rounding.constants(rounding), BLOCK=block, **launch_options(z.device, 4),
    )  # fmt: skip
    return out


def rotate_into(
    spec: ModelSpec,
    qkv: Tensor,
    rotary: Rotary,
    cache: Cache,
    slot: Tensor,
    kv_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate queries and keys; put keys and values into the cache, through its grid if it has one.

    A cache of another dtype than ``qkv`` holds levels. ``qkv`` is contiguous [B, T, (H + 2 G) * D];
    the first of the T tokens goes to ``slot``, int64 [1]; ``kv_scale`` is float32 [1]. Returns the
    queries, [B, H, T, D] with the heads of a token side by side in memory, and the keys and values
    that the tokens' attention sees: the cache, or of one of levels their values [B, G, T, D].
    """
    batch, tokens, _ = qkv.shape
    heads, kv_heads, size = spec.rank_heads, spec.rank_kv_heads, spec.head_size
    cos, sin = (table.contiguous() for table in rotary)
    query = torch.empty((batch, tokens, heads, size), dtype=qkv.dtype, device=qkv.device)
    keys, values = seen = cache
    if keys.dtype != qkv.dtype:
        shape = (batch, kv_heads, tokens, size)
        seen = (qkv.new_empty(shape), qkv.new_empty(shape))
    rows = 16
    attention.rotate_kernel[(batch * tokens, triton.cdiv(heads + 2 * kv_heads, rows))](
        qkv, cos, sin, slot, cos if kv_scale is None else kv_scale, query, keys, values, *seen,
        tokens, keys.shape[2], cos.shape[0],
        HEADS=heads, KV_HEADS=kv_heads, SIZE=size, HALF=cos.shape[-1],
        GRID="none" if kv_scale is None else spec.quantization.kv_cache, ROWS=rows,
        BLOCK=triton.next_power_of_2(size), **launch_options(qkv.device, 4),
    )  # fmt: skip
    return query.transpose(1, 2), *seen


def attend_step(
    spec: ModelSpec,
    tables: Rotary,
    slot: Tensor,
    pads: Tensor,
    pattern: BlockSparse | None,
    first_head: int,
    qkv: Tensor,
    cache: Cache,
    kv_scale: Tensor | None = None,
    rounding: Rounding | None = None,
) -> Tensor:
    """Return the attention of one new token per row, which enters the cache: [B, 1, H * D].

    ``qkv``, ``cache`` and ``kv_scale`` are as for ``rotate_into``, with T = 1. ``tables`` are
    ``blocks.rotary_tables`` of the cache's slots, the short and the long ones: [2, C, R/2]. The
    token goes to ``slot``, int64 [1]; each row's first token is in ``pads``, int64 [B].
    ``first_head`` is the global number of the first head. With ``rounding`` the result has levels.
    """
    keys, values = cache
    batch, kv_heads, capacity, size = keys.shape
    heads = spec.rank_heads
    group = heads // kv_heads
    device, dtype = qkv.device, qkv.dtype
    cos, sin = tables
    kept = Rounding.kept_in(rounding, dtype)
    out = torch.empty((batch, 1, heads * size), dtype=kept, device=device)
    # Enough programs to fill the GPU, whatever the batch; a split without tiles costs nothing.
    programs = _PROGRAMS_PER_PROCESSOR * _processors(device) // (batch * kv_heads)
    most = max(_MOST_SPLITS, capacity // 64)
    splits = 1 << max(0, min(programs, most).bit_length() - 1)
    inputs = (qkv, cos, sin, keys, values, cos if kv_scale is None else kv_scale)
    ending = (
        *Rounding.arguments(rounding, qkv), spec.attention_scale * _LOG2_E, capacity,
        min(spec.rope.original, capacity),
    )  # fmt: skip
    constants = Rounding.constants(rounding) | {
        "SIZE": size, "HALF": cos.shape[-1],
        "KV_GRID": "none" if kv_scale is None else spec.quantization.kv_cache,
    }  # fmt: skip
    # Programs of a batch begin late, to be spread evenly over the GPU. Those of one warp that read
    # 8-bit keys were in any case.
    if splits == group == 1 and pattern is None:
        head_attention.head_attend_kernel[(batch * heads,)](
            *inputs, slot, pads, out, *ending, **constants, HEADS=heads, num_stages=1,
            **launch_options(device, 1, early=keys.element_size() == 1),
        )  # fmt: skip
        return out
    parts = torch.empty((batch * heads * splits, size), dtype=torch.float32, device=device)
    stats = torch.empty((batch * heads * splits, 2), dtype=torch.float32, device=device)
    attention.attend_kernel[(batch * kv_heads, splits)](
        *inputs, slot, pads, out, parts, stats, counters(device), *ending, first_head, **constants,
        KV_HEADS=kv_heads, GROUP=group, SPLITS=splits, SPARSE=pattern is not None,
        BLOCK_SIZE=pattern.block_size if pattern else 1,
        LOCAL=pattern.num_local_blocks if pattern else 1,
        STRIDE=pattern.vertical_stride if pattern else 1,
        STEP=pattern.head_step if pattern else 0,
        PADDED=triton.next_power_of_2(group), TILE=32 if dtype == torch.float32 else 64,
        BLOCK=max(16, triton.next_power_of_2(size)),
        num_stages=3 if batch > 1 and keys.element_size() == 1 else 2,
        **launch_options(device, 4, early=batch == 1),
    )  # fmt: skip
    return out


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockSparse,
    pads: Tensor | None,
    first_head: int,
    scale: float,
) -> Tensor:
    """Return block-sparse attention of a batch of prompts; tiles that no query sees are not read.

    ``query`` is [B, H, T, D] and ``key`` and ``value`` [B, G, T, D], with any strides but the last;
    the pattern's blocks are multiples of ``SPARSE_TILE``. ``pads``, int64 [B], is the slot of each
    row's first token, before which the result is 0; None when no row is padded.
    """
    batch, heads, length, size = query.shape
    device = query.device
    shape = (batch, length, heads, size)
    # Unwritten rows of padding must be numbers, since they will be multiplied by 0.
    new = torch.empty if pads is None else torch.zeros
    out = new(shape, dtype=query.dtype, device=device)
    half = query.dtype != torch.float32
    tile = SPARSE_TILE if half else SPARSE_TILE // 2
    attention.sparse_kernel[(triton.cdiv(length, tile), heads, batch)](
        query, key, value, out, query if pads is None else pads,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        length, first_head, scale * _LOG2_E,
        GROUP=heads // key.shape[1], SIZE=size, BLOCK_SIZE=pattern.block_size,
        LOCAL=pattern.num_local_blocks, STRIDE=pattern.vertical_stride, STEP=pattern.head_step,
        PADDED=pads is not None, TILE=tile, BLOCK=max(16, triton.next_power_of_2(size)),
        num_stages=3 if half else 1, **launch_options(device, 4),
    )  # fmt: skip
    return out.transpose(1, 2)


def choose(logits: Tensor, token: Tensor) -> None:
    """Put the best of float32 logits [B, vocab_size] into int64 ``token`` [B].

    It is the first of equal ones, and ``NO_TOKEN`` in rows whose largest logit is not finite. Rows
    of logits have any stride.
    """
    batch, vocab_size = logits.shape
    block = 1024
    splits = triton.cdiv(vocab_size, block)
    best = torch.empty((batch, splits), dtype=torch.float32, device=logits.device)
    place = torch.empty((batch, splits), dtype=torch.int32, device=logits.device)
    kernels.choose_kernel[(batch, splits)](
        logits, token, best, place, counters(logits.device), vocab_size, logits.stride(0),
        NO_TOKEN=NO_TOKEN, SPLITS=splits, PADDED=triton.next_power_of_2(splits), BLOCK=block,
        **launch_options(logits.device, 4),
    )  # fmt: skip


@functools.cache
def counters(device: torch.device) -> Tensor:
    """Return zeros that every kernel leaves as zeros, to count the programs that have arrived."""
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)


def launch_options(device: torch.device, num_warps: int, *, early: bool = True) -> dict[str, Any]:
    """Return a launch's options: threads, and an early start, if wanted, on GPUs that can."""
    early = early and _can_start_early(device)
    options: dict[str, Any] = {"num_warps": num_warps, "EARLY": early}
    return options | {"launch_pdl": True} if early else options


@functools.cache
def _can_start_early(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and hasattr(tl.extra.cuda, "gdc_wait")
    )


@functools.cache
def _processors(device: torch.device) -> int:
    """Return a GPU's multiprocessors; a few where Triton's interpreter plays one in tests."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
