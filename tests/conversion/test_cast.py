"""Casting, against torch and bit arithmetic: every 16-bit pattern, and the edges of float32."""

import numpy as np
import pytest
import torch

from phireg.conversion import cast as casting
from phireg.conversion.cast import NO_LOSS, Loss, cast, count_not_finite, one_thread_each

ALL_16 = np.arange(2**16, dtype=np.uint16)


def edges():
    """float32 around every rounding boundary of both 16-bit formats, and at random."""
    exact = np.concatenate([widened(ALL_16, "F16"), widened(ALL_16, "BF16")])
    random = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    near = [exact + np.uint32(delta) for delta in (0, 1, 2**32 - 1, 0x7FFF, 0x8000, 0x8001)]
    half = [exact + np.uint32(delta) for delta in (0xFFF, 0x1000, 0x1001)]
    return np.concatenate([*near, *half, random])


def widened(bits, dtype):
    """The float32 with the same value."""
    if dtype == "BF16":
        return bits.astype(np.uint32) << np.uint32(16)
    if dtype == "F16":
        return bits.view(np.float16).astype(np.float32).view(np.uint32)
    return bits


def narrowed(bits, dtype):
    """float32 rounded to nearest, ties to even."""
    if dtype == "BF16":
        upper = bits.astype(np.uint64)
        return ((upper + 0x7FFF + ((upper >> 16) & 1)) >> 16).astype(np.uint16)
    if dtype == "F16":
        return torch.from_numpy(bits.view(np.float32)).half().numpy().view(np.uint16)
    return bits


def losses(before, after):
    """What became of values, given as float32."""
    finite = np.isfinite(before)
    return Loss(
        overflowed=int((finite & np.isinf(after)).sum()),
        flushed=int(((before != 0) & (after == 0)).sum()),
        nan=int(np.isnan(before).sum()),
        infinite=int(np.isinf(before).sum()),
    )


def values(bits, dtype):
    return widened(bits, dtype).view(np.float32)


SOURCES = {"F16": ALL_16, "BF16": ALL_16, "F32": edges()}
PAIRS = [(a, b) for a in SOURCES for b in SOURCES if a != b]


@pytest.mark.parametrize("source, target", PAIRS)
def test_every_value(source, target):
    bits = SOURCES[source]
    rounded, loss = cast(bits.copy(), source, target)
    before, after = values(bits, source), values(rounded, target)
    nan = np.isnan(before)
    assert nan.any() and np.isnan(after[nan]).all()
    expected = narrowed(widened(bits, source), target)
    assert rounded.dtype == expected.dtype
    assert np.array_equal(rounded[~nan], expected[~nan])
    assert np.array_equal(np.signbit(after[~nan]), np.signbit(before[~nan]))
    assert np.array_equal(np.isinf(after) & np.isinf(before), np.isinf(before))
    assert loss == losses(before, after)


@pytest.mark.parametrize(
    "source, target, pairs",
    [
        ("F32", "F16", {0x7F800001: 0x7E00, 0xFFBFE000: 0xFFFF, 0x7FC02000: 0x7E01}),
        ("F32", "BF16", {0x7F800001: 0xFFFF, 0xFFFFFFFF: 0xFFFF}),
        ("BF16", "F16", {0x7F81: 0x7E08, 0xFFBF: 0xFFF8, 0x7FC0: 0x7E00}),
        ("BF16", "F32", {0x7F81: 0x7F810000, 0xFFC0: 0xFFC00000}),
        ("F16", "BF16", {0x7C01: 0x7FC0, 0xFFFF: 0x7FC0}),
        ("F16", "F32", {0x7C01: 0x7FC02000, 0xFE00: 0xFFC00000}),
    ],
)
def test_a_nan_is_the_one_that_torch_makes(source, target, pairs):
    """On x86 with AVX-512, of enough elements; few of them, and other processors, differ."""
    bits = np.array(list(pairs), SOURCES[source].dtype)
    assert [hex(bit) for bit in cast(bits, source, target)[0]] == list(map(hex, pairs.values()))


@pytest.mark.parametrize("source, target", PAIRS)
def test_pieces_do_not_matter(source, target, monkeypatch):
    bits = SOURCES[source][-60_000:].reshape(300, 200)
    expected, loss = cast(bits, source, target)
    monkeypatch.setattr(casting, "PIECE", 7_001)
    out = np.ones_like(expected)
    result, again = cast(bits, source, target, out)
    assert result is out
    assert again == loss
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("source, target", [("BF16", "F16"), ("F32", "F16"), ("F32", "BF16")])
@pytest.mark.parametrize("size", [1, 4, 11])
def test_one_value_out_of_range_is_rounded_and_counted_wherever_it_is(source, target, size):
    numbers = np.linspace(0.5, -1.5, size, dtype=np.float32)
    for place in range(size):
        for odd in (0.0, -0.0, 1e-7, -3e-6, 1e-45, 3.3e38, 7e4, -np.inf):
            numbers[place] = odd
            bits = narrowed(numbers.view(np.uint32), source)
            rounded, loss = cast(bits, source, target)
            assert np.array_equal(rounded, narrowed(widened(bits, source), target))
            before, after = values(bits, source), values(rounded, target)
            assert loss == losses(before, after)
        numbers[place] = 0.5


def test_losses_happen_where_they_must():
    """The counts above are not all zero."""
    lost = {pair: cast(SOURCES[pair[0]].copy(), *pair)[1] for pair in PAIRS}
    for every_exponent in (("F16", "F32"), ("BF16", "F32"), ("F16", "BF16")):
        found = lost[every_exponent]
        assert found == Loss(nan=found.nan, infinite=found.infinite)
    for narrowing in (("F32", "F16"), ("F32", "BF16"), ("BF16", "F16")):
        assert lost[narrowing].overflowed > 0 and lost[narrowing].flushed > 0


def test_subnormals():
    # The smallest float16 is 2**-24; half of it is a tie and goes to zero.
    numbers = [2.0**-24, 2.0**-25, -(2.0**-25), 1.5 * 2.0**-25, 2.0**-26, 0.0]
    bits, loss = cast(np.array(numbers, np.float32).view(np.uint32), "F32", "F16")
    assert bits.tolist() == [0x0001, 0x0000, 0x8000, 0x0001, 0x0000, 0x0000]
    assert loss == Loss(0, 3)


def test_the_last_finite_values():
    # 65504 is float16's largest; 65520 is halfway to the next and becomes infinite.
    numbers = [65504.0, 65519.9, 65520.0, -65520.0, 1e30, np.inf, np.nan]
    bits, loss = cast(np.array(numbers, np.float32).view(np.uint32), "F32", "F16")
    assert bits[:6].tolist() == [0x7BFF, 0x7BFF, 0x7C00, 0xFC00, 0x7C00, 0x7C00]
    assert np.isnan(values(bits, "F16")[6])
    assert loss == Loss(3, 0, nan=1, infinite=1)


@pytest.mark.parametrize("code", SOURCES)
def test_values_that_are_no_numbers_are_counted(code):
    bits = SOURCES[code]
    number = values(bits, code)
    nan, infinite = np.isnan(number), np.isinf(number)
    expected = Loss(nan=int(nan.sum()), infinite=int(infinite.sum()))
    assert expected.nan and expected.infinite
    assert count_not_finite(bits.reshape(1, -1), code) == expected
    assert count_not_finite(bits[~nan & ~infinite], code) == NO_LOSS
    for value in (np.inf, -np.inf, np.nan, -np.nan):  # alone among numbers, each of its sign
        kind = narrowed(np.array([value], np.float32).view(np.uint32), code)
        mixed = np.concatenate([bits[~nan & ~infinite][:1000], kind])
        found = count_not_finite(mixed, code)
        assert found == (Loss(nan=1) if np.isnan(value) else Loss(infinite=1))


def test_threads_are_given_back():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        with pytest.raises(KeyError), one_thread_each(2):
            assert torch.get_num_threads() == 2
            raise KeyError
        assert torch.get_num_threads() == 4
        with one_thread_each(9):
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
