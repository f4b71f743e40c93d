"""The table of dtypes, held against torch and against the definition of e4m3."""

import numpy as np
import pytest
import torch

from phireg.dtypes import (
    BITS,
    E4M3_BEYOND,
    E4M3_MAX,
    E4M3_SMALLEST_NORMAL,
    ITEMSIZE,
    SMALLEST_NORMAL,
    UNIT_ROUNDOFF,
    float32_values,
    torch_dtype,
)


@pytest.mark.parametrize("code", ITEMSIZE)
def test_item_sizes_are_those_of_torch_and_numpy(code):
    assert torch_dtype(code).itemsize == ITEMSIZE[code] == np.dtype(BITS[code]).itemsize


@pytest.mark.parametrize("code", UNIT_ROUNDOFF)
def test_bounds_are_those_of_torch(code):
    info = torch.finfo(torch_dtype(code))
    assert (2 * UNIT_ROUNDOFF[code], SMALLEST_NORMAL[code]) == (info.eps, info.smallest_normal)


def test_every_e4m3_value():
    """A sign, four bits of exponent (bias 7), three of fraction; 0x7F is no number."""
    bits = np.arange(256, dtype=np.uint8)
    exponent, fraction = (bits >> 3 & 15).astype(int), (bits & 7).astype(int)
    expected = np.where(
        exponent == 0, fraction * 2.0**-9, (1 + fraction / 8) * 2.0 ** (exponent - 7)
    )
    expected[bits & 127 == 127] = np.nan
    values = float32_values(bits, "F8_E4M3")
    np.testing.assert_array_equal(values, np.where(bits & 128, -expected, expected))
    assert np.nanmax(values) == E4M3_MAX
    assert E4M3_MAX < E4M3_BEYOND < E4M3_MAX + 32  # 480 would be the next value
    assert values[8] == E4M3_SMALLEST_NORMAL
