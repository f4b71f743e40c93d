"""Casting blocks of a tensor, and counting what a narrower range cannot hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from phireg.dtypes import BITS, as_torch

Bits = npt.NDArray[np.unsignedinteger[Any]]
"""Elements as unsigned integers of their own width: numpy has no bfloat16, and needs none."""

Float32 = npt.NDArray[np.float32]

_WIDER = {("F16", "F32"), ("BF16", "F32")}

PIECE = 128 * 1024
"""Elements cast or quantized at a time: temporary copies of them stay small, and in the cache."""


@dataclass(frozen=True, slots=True)
class Loss:
    """What a cast or quantization could not keep.

    Attributes:
        overflowed: finite values that became infinite in a cast.
        flushed: values other than zero that became zero in a cast.
        saturated: values beyond the quantized grid, which hold its end instead; none as long as
            the scales are those of the same weights.
    """

    overflowed: int = 0
    flushed: int = 0
    saturated: int = 0

    def __add__(self, other: Loss) -> Loss:
        return Loss(
            self.overflowed + other.overflowed,
            self.flushed + other.flushed,
            self.saturated + other.saturated,
        )


NO_LOSS = Loss()


def cast(block: Bits, source: str, target: str) -> tuple[Bits, Loss]:
    """Round ``block`` to another dtype (to nearest, ties to even).

    Args:
        block: elements of dtype ``source``, as bits; any shape.
        source: safetensors code of what they are.
        target: of what they become.

    Returns:
        Elements of dtype ``target``, as bits, and what was lost.
    """
    result = np.empty(block.shape, BITS[target])
    flat = block.reshape(-1), result.reshape(-1)
    loss = NO_LOSS
    for start in range(0, block.size, PIECE):
        before, after = (elements[start : start + PIECE] for elements in flat)
        given, made = as_torch(before, source), as_torch(after, target)
        made.copy_(given)
        if (source, target) in _WIDER:
            continue
        overflowed = 0
        if not bool(made.abs().max().isfinite()):
            overflowed = int(made.isinf().sum()) - int(given.isinf().sum())
        loss += Loss(overflowed, _nonzero(before) - _nonzero(after))
    return result, loss


def _nonzero(bits: Bits) -> int:
    """Number of elements other than +0 and -0: the sign is the highest bit of every float."""
    return int(np.count_nonzero(bits << 1))


@contextmanager
def one_thread_each(workers: int) -> Iterator[None]:
    """Keep torch from starting its own threads inside each of several workers."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // workers))
    try:
        yield
    finally:
        torch.set_num_threads(before)
