"""Casting blocks of a tensor, and counting what a narrower range cannot hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from phireg.dtypes import BITS, INFINITY_BITS, ITEMSIZE, as_torch

Bits = npt.NDArray[np.unsignedinteger[Any]]
"""Elements as unsigned integers of their own width: numpy has no bfloat16, and needs none."""

Float32 = npt.NDArray[np.float32]

_WIDER = {("F16", "F32"), ("BF16", "F32")}

PIECE = 128 * 1024
"""Elements cast or quantized at a time: temporary copies of them stay small, and in the cache."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Numbers of values that a cast or quantization could not keep, or that were none before."""

    overflowed: int = 0  # finite values that became infinite
    flushed: int = 0  # values other than zero that became zero
    saturated: int = 0  # values beyond the quantized grid; none with the scales of the same weights
    nan: int = 0  # values of the source that are no number
    infinite: int = 0  # values of the source that are infinite

    def __add__(self, other: Loss) -> Loss:
        if other is NO_LOSS:  # of nearly every block
            return self
        return Loss(
            self.overflowed + other.overflowed,
            self.flushed + other.flushed,
            self.saturated + other.saturated,
            self.nan + other.nan,
            self.infinite + other.infinite,
        )


NO_LOSS = Loss()


def count_not_finite(block: Bits, code: str) -> Loss:
    """Count NaN and infinite elements of a source; other dtypes than weights' have none.

    They are the largest integers of either sign. Two maxima, which find that there are none, are
    a hundred times as fast as reading from a disk.
    """
    infinity, sign = INFINITY_BITS.get(code), 1 << (8 * ITEMSIZE[code] - 1)
    if infinity is None or (
        block.max(initial=0) < sign + infinity
        and block.view(BITS[code].replace("u", "i")).max(initial=0) < infinity
    ):
        return NO_LOSS
    magnitude = block & np.array(sign - 1, block.dtype)
    return Loss(
        nan=int(np.count_nonzero(magnitude > infinity)),
        infinite=int(np.count_nonzero(magnitude == infinity)),
    )


def cast(block: Bits, source: str, target: str) -> tuple[Bits, Loss]:
    """Round bits of one dtype to another (to nearest, ties to even), and count the losses."""
    result = np.empty(block.shape, BITS[target])
    flat = block.reshape(-1), result.reshape(-1)
    loss = NO_LOSS
    for start in range(0, block.size, PIECE):
        before, after = (elements[start : start + PIECE] for elements in flat)
        values, rounded = as_torch(before, source), as_torch(after, target)
        rounded.copy_(values)
        if (source, target) in _WIDER:
            continue
        overflowed = 0
        if not bool(rounded.abs().max().isfinite()):
            overflowed = int(rounded.isinf().sum()) - int(values.isinf().sum())
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
