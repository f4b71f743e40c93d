"""TensorRT's dtypes in torch, and the memory by which a network holds its constants."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from phireg.errors import CheckError

DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "INT8": torch.int8,
    "BOOL": torch.bool,
    "FP8": torch.float8_e4m3fn,
    "INT4": torch.int8,  # one value to an element
}
"""By the name of a ``DataType``."""


def held_tensor(package: Any, weights: Any, shape: tuple[int, ...]) -> Tensor:
    """View weights in torch; the bindings give dtypes that numpy lacks as an opaque object."""
    if not isinstance(weights, package.Weights):
        return torch.from_numpy(weights).reshape(shape)
    # pybind11 keeps the address of the C++ struct {int32 type; void* values; int64 count} behind
    # the object's header. The type and the count say whether that is so.
    dtype, count = weights.dtype, math.prod(shape)
    struct = ctypes.c_void_p.from_address(id(weights) + object.__basicsize__).value
    kind = ctypes.c_int32.from_address(struct).value if struct else None
    if not struct or (kind, weights.size) != (int(dtype), count):
        raise CheckError("the bindings of TensorRT keep weights in another way than is known")
    packed, itemsize = dtype.name == "INT4", DTYPES[dtype.name].itemsize
    buffer = ctypes.c_uint8 * (-(-count // 2) if packed else count * itemsize)
    address = ctypes.c_void_p.from_address(struct + ctypes.sizeof(ctypes.c_void_p)).value
    raw = torch.frombuffer(buffer.from_address(address or 0), dtype=torch.uint8)
    if packed:  # two's complement, the low half of a byte first
        halves = torch.stack((raw & 15, raw >> 4), dim=-1).flatten()[:count].to(torch.int8)
        return torch.where(halves > 7, halves - 16, halves).reshape(shape)
    return raw.view(DTYPES[dtype.name]).reshape(shape)
