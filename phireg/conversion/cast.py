"""Casting blocks of a tensor, and counting what a narrower range cannot hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import cache
from operator import add
from typing import Any

import numpy as np
import numpy.typing as npt

from phireg.dtypes import BITS, INFINITY_BITS, ITEMSIZE

Bits = npt.NDArray[np.unsignedinteger[Any]]
"""Elements as unsigned integers of their own width: numpy has no bfloat16, and needs none."""

Float32 = npt.NDArray[np.float32]

_NOWHERE = np.empty(0, np.intp)

# Bytes cast at a time: they and two copies of them stay in the cache. Fewer would mean more calls,
# after each of which a worker waits for the interpreter.
PIECE = 512 * 1024

_GROUP = 4
"""Elements that are cast again together if one of them needs it."""


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
        return Loss(*map(add, astuple(self), astuple(other)))


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
    if source == target or (source, target) == ("BF16", "F32"):  # whose zeros are at the end
        added = 8 * (ITEMSIZE[target] - ITEMSIZE[source])
        np.left_shift(before, added, out=after, dtype=after.dtype)
        return result, count_not_finite(before, source)
    loss, step = NO_LOSS, min(block.size, PIECE // ITEMSIZE[source])
    work = np.empty((2, step if source == "F32" else 0), np.uint32)
    for start in range(0, block.size, step or 1):
        some, rounded = before[start : start + step], after[start : start + step]
        if source == "F16":  # its values are all in the range of the others
            _look_up(some, source, target, rounded)
            loss += count_not_finite(some, source)
        elif source == "BF16":
            loss += _round_bf16_to_f16(some, rounded)
        else:
            round_most = _round_f32_to_f16 if target == "F16" else _round_f32_to_bf16
            odd = round_most(some, rounded, *work[:, : some.size])
            if len(odd):
                rounded[odd], lost = _round_any(some[odd], source, target)
                loss += lost
    return result, loss


def _magnitude(bits: Bits, code: str) -> Bits:
    """Return the bits without the sign, which is the highest bit of every float."""
    return bits & np.array((1 << 8 * ITEMSIZE[code] - 1) - 1, bits.dtype)


def _round_f32_to_f16(before: Bits, after: Bits, power: Bits, total: Bits) -> Any:
    """Round F32 to F16; return the places where that is not right, or something may be lost.

    A number plus 1.5 times the power of two 13 above its own has as last digit the one that is the
    last in F16; of subnormal numbers too, if no power is taken that is below the smallest normal
    number's. Of the sum's bits, the fraction with its sign is in the lower half.
    """
    np.bitwise_and(before, 0x7F800000, out=power)  # without sign and fraction
    np.maximum(power, _smallest_normals(PIECE // 4)[: before.size], out=power)
    odd = power.max(initial=0) >= 142 << 23  # its upper part rounds to infinity
    power += (13 << 23) + 0x400000
    with np.errstate(all="ignore"):  # NaN
        np.add(before.view(np.float32), power.view(np.float32), out=total.view(np.float32))
    np.copyto(after, total, casting="unsafe")
    sign, exponent = total.view(np.uint16).reshape(2, -1)  # in the place of the sum
    np.bitwise_and(after, 0x8000, out=sign)
    np.abs(after.view(np.int16), out=after.view(np.int16))
    odd |= after.min(initial=1) == 0
    np.right_shift(power, 13, out=exponent, casting="unsafe")
    exponent += 0x10000 - (113 + 13 << 10) - 0x200 & 0xFFFF
    after += exponent
    after |= sign
    return np.flatnonzero((power >= 155 << 23) | (after & 0x7FFF == 0)) if odd else _NOWHERE


def _round_f32_to_bf16(before: Bits, after: Bits, work: Bits, _: Bits) -> Any:
    """Round F32 to BF16; return the places where that is not right, or something may be lost."""
    np.right_shift(before, 16, out=work)
    work &= 1  # a tie goes to the even one
    work += before
    work += 0x7FFF
    np.right_shift(work, 16, out=after, casting="unsafe")
    doubled = after * 2  # without the sign
    if doubled.min(initial=1) > 0 and doubled.max(initial=0) < 2 * INFINITY_BITS["BF16"]:
        return _NOWHERE
    return np.flatnonzero((doubled == 0) | (doubled >= 2 * INFINITY_BITS["BF16"]))


@cache
def _smallest_normals(count: int) -> Bits:
    """Return F16's smallest normal number in F32, so often: numpy compares arrays fastest."""
    return np.full(count, 113 << 23, np.uint32)


def _round_bf16_to_f16(before: Bits, after: Bits) -> Loss:
    """Round BF16 to F16 and count the losses.

    Integers do between F16's smallest normal number and infinity: of either exponent the highest
    bit is the same one. The others are looked up, in groups.
    """
    grouped = before.size - before.size % _GROUP
    groups = before[:grouped].reshape(_GROUP, -1)
    smallest, infinity = 113 << 7, 143 << 7
    doubled = groups * 2  # without the sign
    doubled -= 2 * smallest
    odd = np.flatnonzero(np.maximum.reduce(doubled, axis=0) >= 2 * (infinity - smallest))
    np.multiply(before, 8, out=after)
    after ^= before  # the sign and the highest bit of the exponent, and all others
    after &= 0x3FFF
    after ^= before
    after[:grouped].reshape(_GROUP, -1)[:, odd], loss = _round_any(
        groups.take(odd, axis=1), "BF16", "F16"
    )
    after[grouped:], lost = _round_any(before[grouped:], "BF16", "F16")
    return loss + lost


def _round_any(bits: Bits, source: str, target: str) -> tuple[Bits, Loss]:
    """Round few values, whatever they are, and count the losses."""
    rounded = _look_up(bits, source, target) if source == "BF16" else _round(bits, source, target)
    after, infinity = _magnitude(rounded, target), INFINITY_BITS[target]
    if after.min(initial=1) > 0 and after.max(initial=0) < infinity:  # nearly always
        return rounded, NO_LOSS
    before, infinite = _magnitude(bits, source), INFINITY_BITS[source]
    found = {
        "overflowed": (after == infinity) & (before < infinite),
        "flushed": (after == 0) & (before > 0),
        "nan": before > infinite,
        "infinite": before == infinite,
    }
    return rounded, Loss(**{name: int(np.count_nonzero(here)) for name, here in found.items()})


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


def _look_up(bits: Bits, source: str, target: str, out: Bits | None = None) -> Bits:
    """Round values of 16 bits by a table."""
    # Every pattern is in it; this mode checks for others fastest.
    rounded: Bits = np.take(_table(source, target), bits, out=out, mode="wrap")
    return rounded


@cache
def _table(source: str, target: str) -> Bits:
    """Return what each pattern of 16 bits becomes."""
    return _round(np.arange(2**16, dtype=np.uint16), source, target)


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
