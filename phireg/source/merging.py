"""Weights with LoRA layers added, while they are read.

Only the factors of one tensor and a block of its rows are in memory. Sums are computed in float64
and rounded once to the base weight's dtype, so that they do not depend on how rows are divided into
blocks; PEFT computes in float32, and rounds to the same values but for ties.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from phireg.dtypes import BITS, as_torch, torch_dtype
from phireg.errors import SourceError
from phireg.source.tensors import Delta, SourceTensor

if TYPE_CHECKING:
    import torch

Read = Callable[[SourceTensor, int, memoryview], None]
"""Fills a view with bytes of a tensor as the file has it."""

_BLOCK = 512 * 1024


class Factors:
    """The factors of the deltas of one tensor, in memory."""

    def __init__(self, tensor: SourceTensor, read: Read) -> None:
        self.tensor = tensor
        self.products = [(delta, *_factors(delta, read)) for delta in tensor.deltas]

    def add(self, values: torch.Tensor, first: int) -> None:
        """Add to rows of the tensor, float64 [rows, columns], from row ``first`` on."""
        for delta, up, down in self.products:
            low = max(first, delta.row)
            high = min(first + len(values), delta.row + delta.count)
            if low < high:
                rows = up[low - delta.row + delta.first : high - delta.row + delta.first]
                values[low - first : high - first] += (rows @ down) * delta.scale


def read_merged(factors: Factors, read: Read, start: int, view: memoryview) -> None:
    """Fill a view with bytes of a tensor, from byte ``start`` on, deltas added."""
    tensor = factors.tensor
    columns = math.prod(tensor.shape[1:])
    per_row = tensor.nbytes // tensor.shape[0]
    end = start + len(view)
    step = max(1, _BLOCK // per_row)
    for first in range(start // per_row, -(-end // per_row), step):
        rows = min(step, -(-end // per_row) - first)
        stored = np.empty(rows * per_row, np.uint8)
        read(tensor, first * per_row, stored.data)
        base = as_torch(stored.view(BITS[tensor.dtype]), tensor.dtype).view(rows, columns)
        values = base.double()
        factors.add(values, first)
        merged = values.to(torch_dtype(tensor.dtype))
        if not bool((merged.isfinite() | ~base.isfinite()).all()):
            raise SourceError(
                f"{tensor.name}: with the adapter added, values do not fit into {tensor.dtype}",
                hint="convert without it (--adapter ignore), or merge it in float32 with PEFT.",
            )
        data = merged.view(-1).view(torch_dtype("U8")).numpy()
        low, high = max(start, first * per_row), min(end, (first + rows) * per_row)
        view[low - start : high - start] = data[low - first * per_row : high - first * per_row].data


def _factors(delta: Delta, read: Read) -> tuple[torch.Tensor, torch.Tensor]:
    """Read ``up`` [rows, rank] and ``down`` [rank, columns] in float64."""
    up, down = (_read(tensor, read) for tensor in (delta.up, delta.down))
    return (down.T.contiguous(), up.T.contiguous()) if delta.transposed else (up, down)


def _read(tensor: SourceTensor, read: Read) -> torch.Tensor:
    bits = np.empty(tensor.shape, BITS[tensor.dtype])
    if bits.size:
        read(tensor, 0, bits.reshape(-1).view(np.uint8).data)
    return as_torch(bits, tensor.dtype).double()
