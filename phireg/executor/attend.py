"""Which attention a layer gets: of a whole prompt, or of one new token over a cache.

A batch's rows are padded on the left, so that they end together: row b's first real token lies in
slot ``pads[b]``. Positions, for the block-sparse mask too, count from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from phireg.executor import blocks, blocksparse
from phireg.executor.blocks import Attend
from phireg.executor.blueprint import Blueprint

# (first, last, keys) -> bool that broadcasts to [B, H, last - first, keys]
Mask: TypeAlias = Callable[[int, int, int], Tensor]


def rank_heads(blueprint: Blueprint, rank: int, device: torch.device) -> Tensor:
    """Global numbers of a rank's query heads, int64 [H]."""
    first = rank * blueprint.rank_heads
    return torch.arange(first, first + blueprint.rank_heads, device=device)


def prompt_attention(
    blueprint: Blueprint,
    layer: int,
    rank: int,
    length: int,
    pads: Sequence[int],
    device: torch.device,
) -> Attend:
    """Attention among the ``length`` slots of a batch of prompts, for one rank's heads.

    ``pads`` may be empty when no row is padded.
    """
    scale, pattern = blueprint.attention_scale, blueprint.sparse
    sparse = blueprint.is_sparse(layer)
    if pattern is None or not sparse or blocksparse.always_dense(pattern, length):
        if not any(pads):
            return lambda query, key, value: blocks.causal_attention(query, key, value, scale)
        sparse = False
    elif device.type == "cuda" and blocksparse.tileable(pattern):
        offset = rank * blueprint.rank_heads

        def skip_tiles(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if not any(pads):
                return blocksparse.sparse_attention(query, key, value, pattern, offset, scale)
            # Blocks count from a row's first token: rows of unequal length have no common tiles.
            output = torch.zeros_like(query)
            for row, pad in enumerate(pads):
                part = (slice(row, row + 1), slice(None), slice(pad, None))
                output[part] = blocksparse.sparse_attention(
                    query[part], key[part], value[part], pattern, offset, scale
                )
            return output

        return skip_tiles
    mask = slot_mask(blueprint, sparse, rank, torch.tensor(pads or (0,), device=device))
    return lambda query, key, value: blocks.masked_attention(query, key, value, scale, mask)


def slot_mask(blueprint: Blueprint, sparse: bool, rank: int, pads: Tensor) -> Mask:
    """The mask of a dense or block-sparse layer between slots, for one rank's heads."""
    heads = rank_heads(blueprint, rank, pads.device)

    def mask(first: int, last: int, keys: int) -> Tensor:
        slots = torch.arange(keys, device=pads.device)
        key = slots - pads[:, None, None, None]
        query = key[..., first:last].transpose(2, 3)
        seen = key <= query
        if sparse and blueprint.sparse is not None:
            seen = blocksparse.visible(blueprint.sparse, query, key, heads[:, None, None])
        # Padding sees itself, because softmax over nothing has no value.
        return (seen & (key >= 0)) | (query == key)

    return mask
