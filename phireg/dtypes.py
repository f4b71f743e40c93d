"""The dtypes of tensors, under all their names, and the bounds of their values.

Bits are elements as unsigned integers of their own width, since numpy has neither bfloat16 nor
float8. numpy and torch are imported when a function needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

_TABLE = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "F32": ("float32", 4),
    "C64": ("complex64", 8),
    "F64": ("float64", 8),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
}
"""torch's name and bytes per element by safetensors code, as the safetensors library ranks them.

The library writes tensors by descending rank. Codes for less than a byte per element (F4, F6_E2M3,
F6_E3M2) are left out: no Phi checkpoint and no TensorRT-LLM checkpoint uses them.
"""

TORCH_NAMES = {code: name for code, (name, _) in _TABLE.items()}
ITEMSIZE = {code: size for code, (_, size) in _TABLE.items()}

BITS = {code: f"u{size}" for code, size in ITEMSIZE.items()}
"""numpy's name of the unsigned integers that hold the bits, by safetensors code."""

WEIGHT_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
"""Dtypes of unquantized weights by TensorRT-LLM's (and torch's) names, with their codes."""

SHORT_NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
"""Names of the same in the options of TensorRT-LLM's summarize.py and run.py."""

UNIT_ROUNDOFF = {"F16": 2.0**-11, "BF16": 2.0**-8, "F32": 2.0**-24}
"""Largest relative error of rounding to a dtype."""

SMALLEST_NORMAL = {"F16": 2.0**-14, "BF16": 2.0**-126, "F32": 2.0**-126}
"""Smaller values, except zero, are denormal: some devices take them for zero."""

INFINITY_BITS = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}
"""The bits of infinity; those of larger numbers, the sign apart, are NaN."""

E4M3_MAX = 448.0
"""Largest finite value of F8_E4M3."""

E4M3_BEYOND = 464.0
"""From here on the nearest e4m3 value would be the next one after the largest."""

E4M3_SMALLEST_NORMAL = 2.0**-6

INT8_MAX = 127.0


def torch_dtype(code: str) -> torch.dtype:
    """Return torch's dtype for a safetensors code."""
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAMES[code])
    return dtype


def as_torch(bits: npt.NDArray[Any], code: str) -> torch.Tensor:
    """View bits as a torch tensor of dtype ``code``; the memory is shared."""
    import torch

    return torch.from_numpy(bits).view(torch_dtype(code))


def float32_values(bits: npt.NDArray[Any], code: str) -> npt.NDArray[np.float32]:
    """Return the values of stored elements: F32, F16, BF16, F8_E4M3 or I8, any shape."""
    values: npt.NDArray[np.float32] = as_torch(bits, code).float().numpy()
    return values
