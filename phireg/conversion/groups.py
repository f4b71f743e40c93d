"""Weights of four bits in groups of inputs: their levels, scales and packing.

The arithmetic is ModelOpt 0.47's, as its unified Hugging Face export writes it: int4 divides by
amax / 7 of the group in float32 and rounds to nearest, ties to even; NVFP4 has a float32 scale of
the whole weight, amax / (6 * 448), and e4m3 ones of groups of 16. compressed-tensors 0.20 has the
reciprocal of the former and computes with that (``divides``).
"""

from __future__ import annotations

from typing import Any

from phireg.dtypes import E4M3_MAX
from phireg.formats import LARGEST

_SMALLEST_E4M3 = 2.0**-9


def group_maxima(weight: Any, size: int) -> Any:
    """Return the maxima of |W| in groups of ``size`` inputs: float32 [rows, groups]."""
    return weight.abs().unflatten(1, (-1, size)).amax(2).float()


def int4_scales(weight: Any, size: int) -> Any:
    """Return the scale of each group, float32 [rows, groups]; 1 for a group of zeros."""
    amax = group_maxima(weight, size)
    return (amax / LARGEST["int4"]).masked_fill(amax == 0, 1)


def to_int4(weight: Any, scales: Any) -> tuple[Any, int]:
    """Return levels -8 to 7, int8 [rows, inputs], and how many values were beyond the ends."""
    import torch

    size = weight.shape[1] // scales.shape[1]
    levels = (weight.float().unflatten(1, (-1, size)) / scales[:, :, None]).round().flatten(1)
    saturated = int(((levels > 7) | (levels < -8)).sum())
    return levels.clamp(-8, 7).to(torch.int8), saturated


def row_pairs(levels: Any) -> Any:
    """Return two rows in one of bytes, the even one in the lower half: uint8 [rows / 2, inputs]."""
    import torch

    low, high = (levels.view(torch.uint8) & 15).unflatten(0, (-1, 2)).unbind(1)
    return low | (high << 4)


def words(levels: Any) -> Any:
    """Return eight levels + 8 in a word of 32 bits, the first in the lowest: [rows, inputs / 8]."""
    import torch

    codes = (levels.to(torch.int64) + 8).unflatten(1, (-1, 8))
    shifts = torch.arange(0, 32, 4, device=levels.device)
    packed = (codes << shifts).sum(2)
    return (packed - (packed >> 31 << 32)).to(torch.int32)


def nvfp4_second_scale(amax: float, *, divides: bool) -> Any:
    """Return the scale of a whole weight, or of inputs: amax / (6 * 448) in float32."""
    import torch

    largest, top = torch.tensor(amax), LARGEST["e2m1"] * E4M3_MAX
    return top / largest if divides else largest / top


def nvfp4_scales(weight: Any, second: Any, size: int, *, divides: bool) -> Any:
    """Return the e4m3 scale of each group [rows, groups]; 1 for a group of zeros."""
    import torch

    amax, top = group_maxima(weight, size), LARGEST["e2m1"]
    scales = amax / top * second if divides else amax / (top * second)
    scales = scales.masked_fill(scales == 0, 1)
    return scales.clamp(_SMALLEST_E4M3, E4M3_MAX).to(torch.float8_e4m3fn)


def to_e2m1(weight: Any, scales: Any, second: Any, *, divides: bool) -> tuple[Any, int]:
    """Return four-bit codes, uint8 [rows, inputs], and the number of elements beyond 6.

    A code is the sign and the place among 0, 0.5, 1, 1.5, 2, 3, 4, 6; ties go to even places.
    """
    import torch

    size = weight.shape[1] // scales.shape[1]
    scale = scales.float() / second if divides else scales.float() * second
    values = (weight.float().unflatten(1, (-1, size)) / scale[:, :, None]).flatten(1)
    magnitudes = values.abs()
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=weight.device)
    places = torch.searchsorted(middles, magnitudes, out_int32=True)
    places += (magnitudes[..., None] == middles[1::2]).any(-1)
    codes = places.to(torch.uint8) | ((values < 0).to(torch.uint8) << 3)
    return codes, int((magnitudes > 6.5).sum())


def column_pairs(codes: Any) -> Any:
    """Return two inputs in a byte, the first in the lower half: uint8 [rows, inputs / 2]."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)
