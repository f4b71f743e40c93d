"""Casting blocks of a tensor, and counting what a narrower range cannot hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from phireg.dtypes import BITS, INFINITY_BITS, ITEMSIZE

Bits = npt.NDArray[np.unsignedinteger[Any]]
"""Elements as unsigned integers of their own width: numpy has no bfloat16, and needs none."""

Float32 = npt.NDArray[np.float32]

_FRACTION_BITS = {"F16": 10, "BF16": 7, "F32": 23}

# Elements cast at a time: copies of them stay in the cache, and the allocator keeps their memory.
PIECE = 64 * 1024


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
    magnitude = _magnitude(block, code)
    return Loss(
        nan=int(np.count_nonzero(magnitude > infinity)),
        infinite=int(np.count_nonzero(magnitude == infinity)),
    )


def cast(block: Bits, source: str, target: str, out: Bits | None = None) -> tuple[Bits, Loss]:
    """Round bits of one dtype to another (to nearest, ties to even), and count the losses.

    The result is ``out``, of the block's shape, if it is given. A NaN becomes the one that torch
    makes of it on x86.
    """
    result: Bits = np.empty(block.shape, BITS[target]) if out is None else out
    before, after = block.reshape(-1), result.reshape(-1)
    pieces = [slice(start, start + PIECE) for start in range(0, block.size, PIECE)]
    if (source, target) == ("BF16", "F32"):
        np.left_shift(before, 16, out=after, dtype=after.dtype)
        return result, NO_LOSS
    if source == "F16":  # its values are all in the range of the others
        for piece in pieces:
            np.take(_of_float16(target), before[piece], out=after[piece], mode="clip")
        return result, NO_LOSS
    odd = np.empty(block.size, bool)
    for piece in pieces:
        odd[piece] = _round_normal(before[piece], after[piece], source, target)
    places, loss = np.flatnonzero(odd), NO_LOSS
    for start in range(0, places.size, PIECE):
        some = places[start : start + PIECE]
        values = before[some]
        after[some] = rounded = _round(values, source, target)
        values, rounded = _magnitude(values, source), _magnitude(rounded, target)
        overflowed = (rounded == INFINITY_BITS[target]) & (values < INFINITY_BITS[source])
        flushed = (rounded == 0) & (values > 0)
        loss += Loss(int(np.count_nonzero(overflowed)), int(np.count_nonzero(flushed)))
    return result, loss


def _magnitude(bits: Bits, code: str) -> Bits:
    """Return the bits without the sign, which is the highest bit of every float."""
    return bits & np.array((1 << 8 * ITEMSIZE[code] - 1) - 1, bits.dtype)


def _round_normal(before: Bits, after: Bits, source: str, target: str) -> Any:
    """Round F32 or BF16 in integers; return where that is not right, as booleans.

    It is between the target's smallest normal number and what rounds to infinity. There the
    exponent moves by a constant, and a carry out of the fraction gives the right exponent.
    """
    kept, wanted = _FRACTION_BITS[source], _FRACTION_BITS[target]
    moved = 127 - 15 if target == "F16" else 0
    smallest, infinity = 1 + moved << kept, (INFINITY_BITS[target] >> wanted) + moved << kept
    magnitude = _magnitude(before, source)
    sign = before ^ magnitude
    if kept > wanted:
        half = 1 << kept - wanted - 1
        infinity -= half
        bits = magnitude >> kept - wanted
        bits &= 1  # a tie goes to the even one
        bits += magnitude
        bits += half - 1
        bits >>= kept - wanted
        sign >>= 16
    else:
        bits = magnitude << wanted - kept
    bits -= moved << wanted & 0xFFFF
    np.bitwise_or(bits, sign, out=after, casting="unsafe")
    magnitude -= smallest
    return magnitude >= infinity - smallest


def _round(bits: Bits, source: str, target: str) -> Bits:
    """Round any values, by way of float32."""
    if source == "F16":
        wide: Bits = bits.view(np.float16).astype(np.float32).view(np.uint32)
    else:
        wide = bits if source == "F32" else np.left_shift(bits, 16, dtype=np.uint32)
    nan = _magnitude(wide, "F32") > INFINITY_BITS["F32"]
    if target == "F32":
        wide[nan] |= 0x400000  # quiet
        return wide
    if target == "BF16":
        rounded: Bits = (wide + 0x7FFF + (wide >> 16 & 1) >> 16).astype(np.uint16)
        rounded[nan] = 0xFFFF if source == "F32" else 0x7FC0
        return rounded
    with np.errstate(all="ignore"):
        rounded = wide.view(np.float32).astype(np.float16).view(np.uint16)
    rounded[nan] = (wide[nan] >> 16 & 0x8000) | 0x7E00 | (wide[nan] >> 13 & 0x3FF)
    return rounded


@cache
def _of_float16(target: str) -> Bits:
    """Return what each pattern of a float16 becomes."""
    return _round(np.arange(2**16, dtype=np.uint16), "F16", target)


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
