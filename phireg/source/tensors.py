"""The content of a weights file: its tensors, and where their bytes lie."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from phireg.dtypes import ITEMSIZE
from phireg.files.regular import Stamp


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One tensor of a source checkpoint.

    Attributes:
        name: its name in the checkpoint.
        dtype: a safetensors dtype code (``phireg.dtypes.ITEMSIZE``).
        shape: dimensions; the bytes are read in row-major order.
        file: the file that holds it, relative to the directory.
        offset: where its first element starts in that file, in bytes.
        strides: elements from one index to the next, per dimension, for tensors of PyTorch .bin
            files that do not lie in row-major order without gaps.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return ITEMSIZE[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """One weights file.

    Attributes:
        name: relative to the directory.
        header_digest: of a safetensors file, xxh3_128 of its header with the eight length bytes;
            of a .bin file, xxh3_128 of its sorted listing, one line ``name dtype shape`` per
            tensor. Hexadecimal.
        stamp: size and modification time when it was listed.
        tensors: by place in the file.
    """

    name: str
    header_digest: str
    stamp: Stamp
    tensors: tuple[SourceTensor, ...] = field(default=(), repr=False)

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.stamp.size
