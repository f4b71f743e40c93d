"""The content of a weights file: its tensors, and where their bytes lie."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from phireg.dtypes import ITEMSIZE
from phireg.files.regular import Stamp


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One tensor of a source checkpoint; its bytes are read in row-major order."""

    name: str
    dtype: str  # a code of phireg.dtypes.ITEMSIZE
    shape: tuple[int, ...]
    file: str  # relative to the directory
    offset: int  # of its first element in the file, in bytes
    # Elements from one index to the next, per dimension, for tensors of PyTorch .bin files that do
    # not lie in row-major order without gaps.
    strides: tuple[int, ...] | None = None
    deltas: tuple[Delta, ...] = ()  # LoRA layers that are added to it while it is read

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return ITEMSIZE[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Delta:
    """Rows of ``scale * up @ down`` that are added to rows of a tensor."""

    row: int  # first row of the tensor
    first: int  # first row of the product
    count: int
    up: SourceTensor  # [rows, rank]
    down: SourceTensor  # [rank, columns]
    scale: float
    transposed: bool = False  # the product is (up @ down) transposed: an embedding's


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """One weights file; ``name`` is relative to the directory, ``tensors`` by place in the file.

    ``header_digest`` is xxh3_128 in hexadecimal: of a safetensors file's header with the eight
    length bytes, or of a .bin file's sorted listing, one line ``name dtype shape`` per tensor.
    """

    name: str
    header_digest: str
    stamp: Stamp
    tensors: tuple[SourceTensor, ...] = field(default=(), repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)  # safetensors' own

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.stamp.size
