"""Casting blocks of a tensor, and counting what a narrower range cannot hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.unsignedinteger[Any]]
"""Elements as unsigned integers of their own width: numpy has no bfloat16, and needs none."""

BITS: dict[str, type[np.unsignedinteger[Any]]] = {
    "F16": np.uint16,
    "BF16": np.uint16,
    "F32": np.uint32,
}
_TORCH = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_WIDER = {("F16", "F32"), ("BF16", "F32")}


@dataclass(frozen=True, slots=True)
class Loss:
    """What a cast could not keep.

    Attributes:
        overflowed: finite values that became infinite.
        flushed: values other than zero that became zero.
    """

    overflowed: int = 0
    flushed: int = 0

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.overflowed + other.overflowed, self.flushed + other.flushed)


NO_LOSS = Loss()


def cast(block: Bits, source: str, target: str) -> tuple[Bits, Loss]:
    """Round ``block`` to another dtype (to nearest, ties to even).

    Args:
        block: elements of dtype ``source``, as bits; any shape.
        source: safetensors code of what they are.
        target: of what they become.

    Returns:
        Elements of dtype ``target``, as bits, and what was lost.
    """
    import torch

    narrow: Any = torch.from_numpy(block).view(getattr(torch, _TORCH[source]))
    result = narrow.to(getattr(torch, _TORCH[target]))
    width = torch.uint16 if BITS[target] is np.uint16 else torch.uint32
    bits: Bits = result.view(width).numpy()
    if (source, target) in _WIDER:
        return bits, NO_LOSS
    overflowed = 0
    if not bool(result.abs().max().isfinite()):
        overflowed = int(result.isinf().sum()) - int(narrow.isinf().sum())
    return bits, Loss(overflowed, _nonzero(block) - _nonzero(bits))


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
