"""The attention of a layer: of a whole prompt, or of one new token over a cache.

A batch's rows are padded on the left, so that they end together: row b's first real token lies in
slot ``pads[b]``. Positions, of the block-sparse mask too, count from there. Heads of the mask count
from the model's first head: with a rank's own numbers it would be another model at TP 8.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor

from phireg.errors import PhiregWarning
from phireg.executor import blocks
from phireg.executor.blocks import Attend
from phireg.reader.spec import BlockSparse, ModelSpec

# (first, last, keys) -> bool that broadcasts to [B, H, last - first, keys]
Mask: TypeAlias = Callable[[int, int, int], Tensor]


def prompt_attention(
    spec: ModelSpec, layer: int, rank: int, length: int, pads: Sequence[int], device: torch.device
) -> Attend:
    """Return one rank's attention among a batch's ``length`` slots; ``pads`` may be empty."""
    scale, pattern, sparse = spec.attention_scale, spec.sparse, spec.is_sparse(layer)
    if pattern is None or not sparse or always_dense(pattern, length):
        if not any(pads) and (spec.sliding_window is None or length <= spec.sliding_window):
            return lambda query, key, value: blocks.causal_attention(query, key, value, scale)
        sparse = False
    elif has_kernels(device):
        from phireg.executor.cuda import launch

        if pattern.block_size % launch.SPARSE_TILE == 0:
            first_head = rank * spec.rank_heads
            starts = torch.tensor(pads, device=device) if any(pads) else None
            return lambda query, key, value: launch.sparse_attention(
                query, key, value, pattern, starts, first_head, scale
            )
    mask = slot_mask(spec, sparse, rank, torch.tensor(pads or (0,), device=device))
    return lambda query, key, value: blocks.masked_attention(query, key, value, scale, mask)


def slot_mask(spec: ModelSpec, sparse: bool, rank: int, pads: Tensor) -> Mask:
    """Return the mask of a dense or block-sparse layer between slots, for one rank's heads."""
    first_head = rank * spec.rank_heads
    heads = torch.arange(first_head, first_head + spec.rank_heads, device=pads.device)

    def mask(first: int, last: int, keys: int) -> Tensor:
        slots = torch.arange(keys, device=pads.device)
        key = slots - pads[:, None, None, None]
        query = key[..., first:last].transpose(2, 3)
        seen = key <= query
        if spec.sliding_window is not None:
            seen = seen & (query - key < spec.sliding_window)
        if sparse and spec.sparse is not None:
            seen = visible(spec.sparse, query, key, heads[:, None, None])
        # Padding sees itself, because softmax over nothing has no value.
        return (seen & (key >= 0)) | (query == key)

    return mask


def visible(pattern: BlockSparse, query: Tensor, key: Tensor, head: Tensor) -> Tensor:
    """Return whether a query sees a key (positions) in a head's mask; the three broadcast."""
    query_block = query // pattern.block_size
    key_block = key // pattern.block_size
    local = query_block - key_block < pattern.num_local_blocks
    stripe = (key_block + head * pattern.head_step + 1) % pattern.vertical_stride == 0
    return (key <= query) & (local | stripe)


def always_dense(pattern: BlockSparse, length: int) -> bool:
    """Return whether the mask is plain causal for every sequence of so many tokens or fewer."""
    return length <= pattern.block_size * pattern.num_local_blocks


def current_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one: Triton launches on that, whatever its tensors lie on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.cache
def has_kernels(device: torch.device) -> bool:
    """Return whether the kernels of ``executor.cuda`` run there; the first call builds one.

    Triton has integer products from compute capability 8.0 on. PyTorch's CUDA builds bring it on
    Linux; it needs a C compiler and Python's headers. Without these one warning says so, and
    everything is computed one operation at a time.
    """
    if device.type != "cuda":
        return False
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        _warn_of_no_kernels("they need a GPU of compute capability 8.0 or more")
        return False
    try:
        from phireg.executor.cuda import launch

        with current_device(device):
            launch.activate("gelu_tanh", torch.zeros(1, 16, device=device), None)
    except Exception as error:  # Triton's own errors, and those of the compiler it calls
        reason = " ".join(str(error).split())
        _warn_of_no_kernels(
            f"{type(error).__name__}: {reason}; Triton needs a C compiler and Python's headers: "
            "apt-get install gcc python3-dev"
        )
        return False
    return True


def _warn_of_no_kernels(reason: str) -> None:
    warnings.warn(
        "generation on this GPU goes without kernels of its own, so that it will take several "
        f"times as long: {reason}",
        PhiregWarning,
        stacklevel=3,
    )
