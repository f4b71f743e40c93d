"""Stored elements as float32 values, whatever their dtype."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from phireg.conversion.cast import Bits

Float32 = npt.NDArray[np.float32]

UNIT_ROUNDOFF = {"F16": 2.0**-11, "BF16": 2.0**-8, "F32": 2.0**-24}
"""Largest relative error of rounding to a dtype."""

SMALLEST_NORMAL = {"F16": 2.0**-14, "BF16": 2.0**-126, "F32": 2.0**-126}
"""What is below, and not zero, is denormal: some devices take it for zero."""


def _e4m3_values() -> Float32:
    """All 256 values: a sign, four bits of exponent (bias 7), three of mantissa; 0x7F is no number.

    There are no infinities: the other values of the highest exponent are numbers, up to 448.
    """
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    magnitude = np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    magnitude[bits & 0x7F == 0x7F] = np.nan
    return np.where(bits >> 7 == 1, -magnitude, magnitude).astype(np.float32)


_E4M3 = _e4m3_values()


def float32(bits: Bits, code: str) -> Float32:
    """Values of a safetensors dtype: F32, F16, BF16, F8_E4M3 or I8.

    Args:
        bits: elements as unsigned integers, any shape.
        code: their dtype.
    """
    bits = np.ascontiguousarray(bits)
    if code == "F32":
        return bits.view(np.float32)
    if code == "F16":
        return bits.view(np.float16).astype(np.float32)
    if code == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if code == "I8":
        return bits.view(np.int8).astype(np.float32)
    values: Float32 = _E4M3[bits]
    return values
