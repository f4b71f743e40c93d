"""PyTorch ``.bin`` files: listed by torch's restricted unpickler, read as plain bytes.

``torch.load(weights_only=True, mmap=True)`` runs no code of the file and reads no tensor data; it
is only used to learn the names and where each tensor lies. The addresses it returns are inside a
mapping of the file, so they become file offsets, and the data is read with ``pread`` like any
other source: no page of the mapping stays resident, and a file that fails or is cut short while it
is read is an error, not a SIGBUS.
"""

from __future__ import annotations

import bisect
import ctypes
import math
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from phireg.dtypes import ITEMSIZE, TORCH_NAMES
from phireg.errors import SourceError
from phireg.files.regular import (
    Stamp,
    bullets,
    check_unchanged,
    disguise,
    open_regular,
    read_bytes,
    read_into,
    stamp_of,
)

_CODES = {f"torch.{name}": code for code, name in TORCH_NAMES.items()}
_GATHER_BYTES = 16 * 1024 * 1024
_RESAVE = (
    "if you trust the file: load it with torch.load and save its tensors with "
    "safetensors.torch.save_file as model.safetensors"
)


@dataclass(frozen=True, slots=True)
class BinTensor:
    """One tensor of a .bin file.

    Attributes:
        name: its key in the state dict.
        dtype: a safetensors dtype code.
        shape: dimensions.
        strides: elements from one index to the next, per dimension; never negative.
        start: where its first element lies in the file, in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class BinListing:
    """What a .bin file holds.

    Attributes:
        tensors: by place in the file, then name.
        digest: xxh3_128 of the sorted lines ``name dtype shape``, in hexadecimal.
        stamp: the state of the file that was listed.
    """

    tensors: tuple[BinTensor, ...]
    digest: str
    stamp: Stamp


def read_listing(path: Path) -> BinListing:
    """List the tensors of a .bin file without running any code it may contain.

    Args:
        path: a state dict written by ``torch.save`` in the zip format (PyTorch 1.6 or later).

    Raises:
        SourceError: the file is no such state dict, holds anything but plain tensors, or asks for
            code to be run; the message says which.
    """
    fd = open_regular(path)
    try:
        stamp = stamp_of(fd)
        _check_zip_magic(fd, path, stamp.size)
        members = _members(path, stamp.size)
        state = _load(path)
        defects = list(_state_defects(state))
        if defects:
            raise SourceError(
                f"{path}: not a state dict of plain tensors:{bullets(defects)}", hint=_RESAVE
            )
        tensors = _placed(state, fd, path, members)
        check_unchanged(fd, path, stamp)
    finally:
        os.close(fd)
    lines = sorted(f"{tensor.name} {tensor.dtype} {list(tensor.shape)}" for tensor in tensors)
    digest = xxhash.xxh3_128_hexdigest("\n".join(lines).encode("utf-8", "surrogatepass"))
    return BinListing(tuple(sorted(tensors, key=lambda t: (t.start, t.name))), digest, stamp)


def read_strided(fd: int, path: Path, tensor: BinTensor, start: int, view: memoryview) -> None:
    """Fill a view with bytes of a tensor in row-major order, whatever its strides are.

    A contiguous tensor is read directly. Of any other, the stretch of the file that holds the
    rows in question is read: at most 16 MiB at a time where rows lie one after another, the whole
    tensor where they interleave (a transposed matrix).

    Args:
        fd: the open file.
        path: its name, for messages.
        tensor: what to read.
        start: first byte, counted from the start of the row-major tensor.
        view: one-dimensional writable view of bytes, inside the tensor.

    Raises:
        SourceError: the file ended early or could not be read.
    """
    if not len(view):
        return
    if _is_contiguous(tensor.shape, tensor.strides):
        read_into(fd, path, tensor.start + start, view)
        return
    itemsize = ITEMSIZE[tensor.dtype]
    row = itemsize * math.prod(tensor.shape[1:])
    step = max(1, _GATHER_BYTES // max(1, itemsize * tensor.strides[0]))
    out = np.frombuffer(view, np.uint8)
    end = start + len(view)
    for first in range(start // row, -(-end // row), step):
        rows = min(step, -(-end // row) - first)
        block = _gather(fd, path, tensor, first, rows)
        low, high = max(start, first * row), min(end, (first + rows) * row)
        out[low - start : high - start] = block[low - first * row : high - first * row]


def _gather(fd: int, path: Path, tensor: BinTensor, first: int, rows: int) -> Any:
    """Rows of a strided tensor, packed: uint8 array, row-major."""
    itemsize = ITEMSIZE[tensor.dtype]
    shape = (rows, *tensor.shape[1:])
    buffer = np.empty(itemsize * _span(shape, tensor.strides), np.uint8)
    offset = tensor.start + first * tensor.strides[0] * itemsize
    read_into(fd, path, offset, buffer.data)
    strides = tuple(stride * itemsize for stride in tensor.strides)
    strided = np.ndarray(shape, f"u{itemsize}", buffer, strides=strides)
    return np.ascontiguousarray(strided).reshape(-1).view(np.uint8)


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last one of a strided tensor that is not empty."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _check_zip_magic(fd: int, path: Path, size: int) -> None:
    head = read_bytes(fd, path, 0, min(size, 64))
    if head.startswith(b"PK\x03\x04"):
        return
    if head.startswith(b"\x80"):
        raise SourceError(
            f"{path}: written in PyTorch's format from before 1.6, which cannot be read in part",
            hint=_RESAVE,
        )
    if known := disguise(head):
        raise SourceError(f"{path}: {known[0]}", hint=known[1])
    what = "not a PyTorch file" if size else "the file is empty"
    raise SourceError(f"{path}: {what}", hint="download the file again")


def _members(path: Path, size: int) -> list[tuple[int, int, int]]:
    """Each member of the archive: where it begins, the limit of its data, its size; sorted."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise SourceError(
            f"{path}: a damaged or incomplete PyTorch file: {error}",
            hint="download the file again",
        ) from None
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise SourceError(
            f"{path}: the archive is compressed; PyTorch writes its archives uncompressed",
            hint="unpack it and pack it again without compression, or " + _RESAVE,
        )
    limits = [info.header_offset for info in infos[1:]] + [size]
    return [
        (info.header_offset, limit, info.file_size)
        for info, limit in zip(infos, limits, strict=True)
    ]


def _load(path: Path) -> Any:
    import torch

    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # torch's own text recommends weights_only=False, which is what must not happen.
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        wants = f" (it asks for {asked[1]})" if asked else ""
        raise SourceError(
            f"{path}: refused: loading it would mean running code from the file{wants}",
            hint="do not use this file unless you trust its origin; " + _RESAVE,
        ) from None
    except Exception as error:  # a damaged archive fails in many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise SourceError(
            f"{path}: PyTorch cannot load it: {reason}", hint="download the file again"
        ) from None


def _state_defects(state: Any) -> Iterator[str]:
    import torch

    if not isinstance(state, dict):
        yield f"it holds an object of type {type(state).__name__}, not a dict of tensors"
        return
    for name, value in state.items():
        if not isinstance(name, str) or not name:
            yield f"a key is not a name: {str(name)[:80]!r}"
        elif isinstance(value, dict):
            yield f"{name!r} holds another dict: save that one by itself"
        elif not isinstance(value, torch.Tensor):
            yield f"{name!r} is not a tensor but of type {type(value).__name__}"
        elif value.device.type != "cpu":
            yield f"{name!r} is on device {value.device.type}: it has no data"
        elif value.layout != torch.strided:
            yield f"{name!r} is sparse"
        elif value.is_quantized or str(value.dtype) not in _CODES:
            yield f"{name!r} has dtype {value.dtype}, which is not supported"
        elif value.is_neg() or value.is_conj():
            yield f"{name!r} is a lazily negated or conjugated view"


def _placed(
    state: dict[str, Any], fd: int, path: Path, members: list[tuple[int, int, int]]
) -> list[BinTensor]:
    """Turn addresses inside torch's mapping of the file into file offsets."""
    with Path("/proc/self/maps").open(encoding="utf-8", errors="replace") as lines:
        fields = [line.split(maxsplit=5) for line in lines]
    mappings = sorted(
        (*(int(bound, 16) for bound in span.split("-")), int(offset, 16))
        for span, _, offset, _, inode, *_ in fields
        if inode != "0"
    )
    tensors = []
    for name, value in state.items():
        shape, strides = tuple(value.shape), tuple(value.stride())
        start = 0
        if value.numel():
            length = value.element_size() * _span(shape, strides)
            start = _file_offset(mappings, value.data_ptr(), length)
            # The mapping is torch's affair: make sure that the bytes really are the tensor's.
            probe = min(length, 64)
            if (
                start < 0
                or not _in_one_member(members, start, length)
                or read_bytes(fd, path, start, probe) != ctypes.string_at(value.data_ptr(), probe)
            ):
                raise SourceError(
                    f"{path}: the data of {name!r} cannot be found in the file", hint=_RESAVE
                )
        tensors.append(BinTensor(name, _CODES[str(value.dtype)], shape, strides, start))
    return tensors


def _file_offset(mappings: list[tuple[int, ...]], address: int, length: int) -> int:
    """The file offset behind an address range, or -1 when no mapping of a file holds it."""
    place = bisect.bisect_right(mappings, address, key=lambda mapping: mapping[0]) - 1
    if place < 0:
        return -1
    low, high, offset = mappings[place]
    return offset + address - low if address + length <= high else -1


def _in_one_member(members: list[tuple[int, int, int]], start: int, length: int) -> bool:
    place = bisect.bisect_right(members, start, key=lambda member: member[0]) - 1
    _, limit, size = members[place]
    return length <= size and start + length <= limit
