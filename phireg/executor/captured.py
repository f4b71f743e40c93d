"""The decode step on a GPU: fused by torch.compile, attended by tiles, captured in a CUDA graph.

It computes what the plain step computes. Everything that changes from one token to the next lies
in tensors on the device (the token, its slot, what it sees), so that one captured graph serves
every step of every call with the same batch and capacity, and the host never waits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._inductor import config as inductor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from phireg.executor import blocks, blocksparse
from phireg.executor.attend import rank_heads
from phireg.executor.blocks import Attend, Rotary, Weights
from phireg.executor.blueprint import Blueprint, Rope

# Slots per tile; a cache's capacity is a multiple of it.
TILE = 64
# Loads should be in flight ahead of their use; what FlexAttention picks for short queries has one
# stage. Two stages of half-precision tiles fit into every GPU's shared memory.
KERNEL_OPTIONS = {"num_stages": 2, "num_warps": 4}

# What a step's query sees: bool [B, H or 1, C]; the number of tiles with anything seen, int32
# [B, G or 1, 1]; and all tiles' numbers, those first, int32 [B, G or 1, 1, C / TILE].
Sight: TypeAlias = "tuple[Tensor, Tensor, Tensor]"
Cache: TypeAlias = "tuple[Tensor, Tensor]"


def step_rotary(rope: Rope, tables: Rotary, slot: Tensor, pads: Tensor) -> Rotary:
    """Cos and sin [B, 1, 1, R/2] of the token in ``slot``.

    Args:
        rope: decides between the short and the long factors by the tokens so far.
        tables: float32 [2, C, R/2] each, with the short and the long factors.
        slot: int64 [1].
        pads: int64 [B].
    """
    long = (slot + 1 > rope.original).long()
    position = slot - pads
    cos, sin = (table[long, position][:, None, None] for table in tables)
    return cos, sin


def sight(
    blueprint: Blueprint, sparse: bool, rank: int, slot: Tensor, pads: Tensor, capacity: int
) -> Sight:
    """What the token in ``slot`` sees of the cache, in a dense or a block-sparse layer."""
    key = torch.arange(capacity, device=slot.device) - pads[:, None, None]
    query = (slot - pads)[:, None, None]
    seen = (key >= 0) & (key <= query)
    groups, pattern = 1, blueprint.sparse
    if sparse and pattern is not None:
        heads = rank_heads(blueprint, rank, slot.device)
        seen = seen & blocksparse.visible(pattern, query, key, heads[:, None])
        groups = blueprint.rank_kv_heads
    by_tile = seen.reshape(seen.shape[0], groups, -1, capacity // TILE, TILE)
    tiles = by_tile.any(-1).any(2)[:, :, None]
    order = torch.argsort(tiles.int(), dim=-1, descending=True, stable=True)
    return seen, tiles.sum(-1, dtype=torch.int32), order.int()


def tile_attention(query: Tensor, cache: Cache, seen_by: Sight, scale: float) -> Tensor:
    """Attention of one token over the tiles of the cache that it sees.

    Args:
        query: [B, H, 1, D].
        cache: keys and values, [B, G, C, D] each.
        seen_by: see ``sight``.
        scale: what q . k is multiplied by.

    Returns:
        As ``query``.
    """
    keys, values = cache
    seen, count, order = seen_by
    batch, groups, capacity, size = keys.shape
    # The query heads of one key/value head become rows of one query: keys are read once for all.
    rows = query.reshape(batch, groups, -1, size)
    group = rows.shape[2]
    per_head = seen.shape[1] > 1

    def mask_mod(b: Tensor, g: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return seen[b, g * group + row if per_head else 0, key]

    mask = BlockMask.from_kv_blocks(
        count, order, BLOCK_SIZE=(128, TILE), mask_mod=mask_mod, seq_lengths=(group, capacity)
    )
    options = {} if keys.dtype == torch.float32 else dict(KERNEL_OPTIONS)
    output = flex_attention(
        rows, keys, values, block_mask=mask, scale=scale, kernel_options=options
    )
    return output.reshape(query.shape)


def step_layer(
    blueprint: Blueprint,
    shards: list[Weights],
    x: Tensor,
    rotary: Rotary,
    caches: list[Cache],
    sights: list[Sight],
    slot: Tensor,
    reduce: blocks.Reduce,
) -> Tensor:
    """One layer for one new token per row; its key and value go into the caches."""

    def attend_with(cache: Cache, seen_by: Sight) -> Attend:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = cache
            keys[:, :, slot] = key
            values[:, :, slot] = value
            return tile_attention(query, cache, seen_by, blueprint.attention_scale)

        return attend

    attends = [attend_with(*pair) for pair in zip(caches, sights, strict=True)]
    return blocks.layer(
        blueprint, shards, x, rotary, attends, reduce, observe_inputs=_settle_activations
    )


def _settle_activations(name: str, inputs: list[Tensor]) -> None:
    """Keep the compiler from computing the activation again for every row of mlp.proj.

    Fused, the two take twice as long as the weight's bytes need (29 us instead of 15 on an H200);
    a norm before a linear is better fused.
    """
    if name == "mlp.proj":
        for x in inputs:
            settle(x)


def _nothing(x: Tensor) -> None:
    """What the compiler may not look into."""


# To the compiler a change of its argument, which must be in memory before; at run time nothing.
settle = torch.library.custom_op("phireg::settle", _nothing, mutates_args={"x"})
settle.register_fake(_nothing)


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` fused for fixed shapes; matrix-vector products become bandwidth-bound loops."""
    options = {"coordinate_descent_tuning": True}
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    if hopper and hasattr(inductor.triton, "enable_pdl"):
        # A kernel's launch overlaps the end of the one before it, which matters when none of them
        # runs for more than thirty microseconds.
        options["triton.enable_pdl"] = True
    compiled_function: Callable[..., Any] = torch.compile(
        function, fullgraph=True, dynamic=False, options=options
    )
    return compiled_function


def capture(step: Callable[[], None], restore: Callable[[], None]) -> Callable[[], None]:
    """Record ``step`` in a CUDA graph.

    Args:
        step: reads and writes tensors that stay where they are.
        restore: undoes what ``step`` did to them.

    Returns:
        What to call in place of ``step``.
    """
    # Every batch size and capacity is its own compilation; the default limit is eight.
    with torch._dynamo.config.patch(recompile_limit=4096, accumulated_recompile_limit=4096):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compile, tune and load before recording
                step()
                restore()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    replay: Callable[[], None] = graph.replay
    return replay
