"""Phi-3-small's block-sparse attention mask, and the block mask FlexAttention skips blocks by.

Positions count from a sequence's first real token, heads from the model's first head (not the
rank's): a mask of local head numbers would be another model at TP 8.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from phireg.executor.blueprint import BlockSparse

# Query and key tile of the prefill kernel: one block of the published pattern, so that no tile
# holds more than it must (measured fastest on an H200 among 64 and 128 either way).
QUERY_TILE = 64
KEY_TILE = 64


def visible(pattern: BlockSparse, query: Tensor, key: Tensor, head: Tensor) -> Tensor:
    """Whether a query sees a key.

    Args:
        pattern: the mask's numbers.
        query: int64 query positions.
        key: int64 key positions.
        head: int64 global head numbers; the three broadcast against each other.

    Returns:
        bool of the broadcast shape.
    """
    query_block = query // pattern.block_size
    key_block = key // pattern.block_size
    local = query_block - key_block < pattern.num_local_blocks
    stripe = (key_block + head * pattern.head_step + 1) % pattern.vertical_stride == 0
    return (key <= query) & (local | stripe)


def always_dense(pattern: BlockSparse, length: int) -> bool:
    """Whether the mask is plain causal for every sequence of this many tokens or fewer."""
    return length <= pattern.block_size * pattern.num_local_blocks


def tileable(pattern: BlockSparse) -> bool:
    """Whether whole blocks fill the kernel's tiles, so that ``sparse_attention`` can skip them."""
    return KEY_TILE % pattern.block_size == 0 or pattern.block_size % KEY_TILE == 0


def prefill_block_mask(
    pattern: BlockSparse, length: int, padded: int, head_offset: int, heads: int, device: str
) -> BlockMask:
    """Which tiles of a prompt's attention hold a visible pair, computed tile by tile.

    Args:
        pattern: the mask's numbers; ``tileable`` must hold.
        length: tokens of the prompt.
        padded: rows of the tensors the kernel gets, a multiple of QUERY_TILE; tiles past
            ``length`` have no work.
        head_offset: global number of the first head.
        heads: number of heads.
        device: where the tables go.
    """
    size = pattern.block_size
    blocks = torch.arange(-(-padded // size), device=device)
    head = torch.arange(head_offset, head_offset + heads, device=device)
    # Block by block the pattern is constant but for causality, which tiles decide below.
    some = visible(
        pattern, (blocks * size + size - 1)[:, None], (blocks * size)[None, :], head[:, None, None]
    )
    # A block may be larger than a tile (or smaller): bring both to tiles.
    unit = min(size, KEY_TILE)
    rows = torch.arange(0, padded, unit, device=device) // size
    some = some[:, rows][:, :, rows]
    tiles = (heads, padded // QUERY_TILE, QUERY_TILE // unit, padded // KEY_TILE, KEY_TILE // unit)
    queries = torch.arange(padded // QUERY_TILE, device=device)[:, None] * QUERY_TILE
    keys = torch.arange(padded // KEY_TILE, device=device) * KEY_TILE
    wanted = (queries < length) & (keys < queries + QUERY_TILE)
    some_tile = some.view(tiles).any(4).any(2) & wanted
    full_tile = some.view(tiles).all(4).all(2) & wanted & (keys + KEY_TILE <= queries)
    part_tile = some_tile & ~full_tile

    def mask_mod(_batch: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible(pattern, query, key, h + head_offset)

    return BlockMask.from_kv_blocks(
        *_listed(part_tile),
        *_listed(full_tile),
        BLOCK_SIZE=(QUERY_TILE, KEY_TILE),
        mask_mod=mask_mod,
        seq_lengths=(padded, padded),
    )


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """[heads, query tiles, key tiles] bool -> counts and the wanted tiles' numbers in front."""
    order = torch.argsort(tiles.int(), dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32)[None], order.int()[None]


def sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, pattern: BlockSparse, head_offset: int, scale: float
) -> Tensor:
    """Block-sparse attention of a whole prompt through FlexAttention, skipping unseen tiles.

    Args:
        query: [batch, heads, length, head_size], no padding.
        key: [batch, kv_heads, length, head_size].
        value: as ``key``.
        pattern: the mask's numbers; ``tileable`` must hold.
        head_offset: global number of the first head.
        scale: what q . k is multiplied by.

    Returns:
        As ``query``.
    """
    length = query.shape[2]
    # Powers of two keep the number of compiled shapes small; tiles of padding cost no work.
    padded = max(QUERY_TILE, 1 << (length - 1).bit_length())
    mask = _mask_for(pattern, length, padded, head_offset, query.shape[1], str(query.device))
    if padded > length:
        extra = (0, 0, 0, padded - length)
        query, key, value = (functional.pad(rows, extra) for rows in (query, key, value))
    attend = _compiled() if query.is_cuda else flex_attention
    output = attend(
        query,
        key,
        value,
        block_mask=mask,
        scale=scale,
        enable_gqa=True,
        kernel_options=_kernel_options(query),
    )
    return output[:, :, :length]


# One prompt's layers ask for the same mask one after another.
_mask_for = functools.lru_cache(maxsize=2)(prefill_block_mask)


def _kernel_options(query: Tensor) -> dict[str, int]:
    """Tile shape and pipeline depth of the kernel, within the GPU's shared memory."""
    if not query.is_cuda:
        return {}
    if query.dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    room = torch.cuda.get_device_properties(query.device).shared_memory_per_block_optin
    stages = 3 if room >= 128 * 1024 else 2
    return {"BLOCK_M": QUERY_TILE, "BLOCK_N": KEY_TILE, "num_warps": 4, "num_stages": stages}


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)
