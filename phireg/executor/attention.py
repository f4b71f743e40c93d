"""Which attention a layer gets: of a whole prompt, or of one new token over a cache.

A batch's rows are padded on the left, so that they end together: row b's first real token lies in
slot ``pads[b]``. Positions, for the block-sparse mask too, count from there.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor

from phireg.executor import blocks, blocksparse
from phireg.executor.blocks import Attend
from phireg.reader.spec import BlockSparse, ModelSpec

# Block sizes that the kernel of prompts takes are multiples of this.
SPARSE_TILE = 64

# (first, last, keys) -> bool that broadcasts to [B, H, last - first, keys]
Mask: TypeAlias = Callable[[int, int, int], Tensor]


def rank_heads(spec: ModelSpec, rank: int, device: torch.device) -> Tensor:
    """Global numbers of a rank's query heads, int64 [H]."""
    first = rank * spec.rank_heads
    return torch.arange(first, first + spec.rank_heads, device=device)


def prompt_attention(
    spec: ModelSpec,
    layer: int,
    rank: int,
    length: int,
    pads: Sequence[int],
    device: torch.device,
) -> Attend:
    """Attention among the ``length`` slots of a batch of prompts, for one rank's heads.

    ``pads`` may be empty when no row is padded.
    """
    scale, pattern = spec.attention_scale, spec.sparse
    sparse = spec.is_sparse(layer)
    if pattern is None or not sparse or blocksparse.always_dense(pattern, length):
        if not any(pads):
            return lambda query, key, value: blocks.causal_attention(query, key, value, scale)
        sparse = False
    elif can_skip(pattern, device):
        from phireg.executor.cuda import launch

        first_head = rank * spec.rank_heads
        starts = torch.tensor(pads, device=device) if any(pads) else None
        return lambda query, key, value: launch.sparse_attention(
            query, key, value, pattern, starts, first_head, scale
        )
    mask = slot_mask(spec, sparse, rank, torch.tensor(pads or (0,), device=device))
    return lambda query, key, value: blocks.masked_attention(query, key, value, scale, mask)


def can_skip(pattern: BlockSparse, device: torch.device) -> bool:
    """Whether prompts go through the kernel that reads no tile which a query cannot see."""
    return has_kernels(device) and pattern.block_size % SPARSE_TILE == 0


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Where a GPU is the current one: Triton launches on that, whatever its tensors lie on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.cache
def has_kernels(device: torch.device) -> bool:
    """Whether the kernels of ``launch`` run there, which the first call finds out.

    PyTorch's CUDA builds bring Triton on Linux; it needs a C compiler and Python's headers. Without
    them one warning says so, and everything is computed one operation at a time.
    """
    if device.type != "cuda":
        return False
    try:
        from phireg.executor.cuda import launch

        with on(device):
            launch.activate("gelu_tanh", torch.zeros(1, 16, device=device), None)
    except Exception as error:  # Triton's own errors, and those of the compiler it calls
        reason = " ".join(str(error).split())
        warnings.warn(
            "the kernels for generation on a GPU cannot be built, so that it will take several "
            f"times as long ({type(error).__name__}: {reason}); Triton needs a C compiler and "
            "Python's headers: apt-get install gcc python3-dev",
            stacklevel=2,
        )
        return False
    return True


def slot_mask(spec: ModelSpec, sparse: bool, rank: int, pads: Tensor) -> Mask:
    """The mask of a dense or block-sparse layer between slots, for one rank's heads."""
    heads = rank_heads(spec, rank, pads.device)

    def mask(first: int, last: int, keys: int) -> Tensor:
        slots = torch.arange(keys, device=pads.device)
        key = slots - pads[:, None, None, None]
        query = key[..., first:last].transpose(2, 3)
        seen = key <= query
        if sparse and spec.sparse is not None:
            seen = blocksparse.visible(spec.sparse, query, key, heads[:, None, None])
        # Padding sees itself, because softmax over nothing has no value.
        return (seen & (key >= 0)) | (query == key)

    return mask
