"""Phi-3-small's block-sparse attention mask.

Positions count from a sequence's first real token, heads from the model's first head (not the
rank's): a mask of local head numbers would be another model at TP 8.
"""

from __future__ import annotations

from torch import Tensor

from phireg.reader.spec import BlockSparse


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
