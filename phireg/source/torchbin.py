"""PyTorch ``.bin`` files: listed by torch's restricted unpickler, read as plain bytes.

``torch.load(weights_only=True)`` runs no code of the file. In FakeTensorMode it reads no data
either, and tells where each storage begins. The data is read with ``pread`` like that of any other
source: pages of a mapping would stay resident, and a file that is cut short while it is read would
end the process.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from phireg.dtypes import ITEMSIZE, TORCH_NAMES
from phireg.errors import SourceError
from phireg.files.regular import (
    bullets,
    check_unchanged,
    disguise,
    open_regular,
    read_bytes,
    read_into,
    stamp_of,
)
from phireg.source.pickles import MOST_BYTES, Asks, TooMuch, check_pickle
from phireg.source.tensors import SourceTensor, WeightsFile

_CODES = {f"torch.{name}": code for code, name in TORCH_NAMES.items()}
_GATHER_BYTES = 16 * 1024 * 1024
_MOST_EXPANDED = 2**30  # elements of a view that repeats its storage
_GATHERED = 4 * _GATHER_BYTES, 4 * 2**30
"""Bytes that any tensor may be gathered from at a time, and that none may exceed."""
_LOCAL_HEADER = 30
"""Bytes of a zip member's header before its name and extra field, whose lengths are its end."""

_RESAVE = (
    "if you trust the file: load it with torch.load and save its tensors with "
    "safetensors.torch.save_file as model.safetensors"
)


def list_bin(directory: Path, name: str) -> WeightsFile:
    """List the plain tensors of a dict in torch.save's zip format, without running its code."""
    path = directory / name
    fd = open_regular(path, inside=directory)
    try:
        stamp = stamp_of(fd)
        _check_magic(fd, path, stamp.size)
        members = _members(fd, path)
        _check_pickle(path)
        state = _load(path)
        if not isinstance(state, dict):
            raise _not_tensors(path, [f"it holds a {type(state).__name__}, not a dict of tensors"])
        if defects := [text for item in state.items() for text in _defects(*item)]:
            raise _not_tensors(path, defects)
        tensors = [_located(directory, name, members, key, value) for key, value in state.items()]
        check_unchanged(fd, path, stamp)
    finally:
        os.close(fd)
    lines = sorted(f"{tensor.name} {tensor.dtype} {list(tensor.shape)}" for tensor in tensors)
    digest = xxhash.xxh3_128_hexdigest("\n".join(lines).encode("utf-8", "surrogatepass"))
    ordered = sorted(tensors, key=lambda tensor: (tensor.offset, tensor.name))
    return WeightsFile(name, digest, stamp, tuple(ordered))


def _check_magic(fd: int, path: Path, size: int) -> None:
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
    problem = "not a PyTorch file" if size else "the file is empty"
    raise SourceError(f"{path}: {problem}", hint="download the file again")


def _members(fd: int, path: Path) -> dict[int, int]:
    """Return the size of each member of the archive by the offset of its first byte."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _damaged(path, error) from None
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise SourceError(
            f"{path}: the archive is compressed; PyTorch writes its archives uncompressed",
            hint="unpack it and pack it again without compression, or " + _RESAVE,
        )
    members = {}
    for info in infos:
        lengths = read_bytes(fd, path, info.header_offset + _LOCAL_HEADER - 4, 4)
        name, extra = (int.from_bytes(length, "little") for length in (lengths[:2], lengths[2:]))
        offset = info.header_offset + _LOCAL_HEADER + name + extra
        members[offset] = info.file_size
        # torch finds names in any case, and would swap bytes of storages that have none (a crash).
        if info.filename.lower().endswith("byteorder") and (
            read_bytes(fd, path, offset, min(info.file_size, 16)) != sys.byteorder.encode()
        ):
            raise SourceError(f"{path}: written on a machine of another byte order", hint=_RESAVE)
    return members


def _check_pickle(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            # torch finds names in any case.
            if not info.filename.lower().endswith("data.pkl"):
                continue
            try:
                with archive.open(info) as file:
                    check_pickle(file.read(MOST_BYTES + 1))
            except Asks as name:
                raise _runs_code(path, f" (it asks for {name})") from None
            except TooMuch as error:
                raise SourceError(f"{path}: {error}", hint=_RESAVE) from None
            except (ValueError, zipfile.BadZipFile, EOFError, RuntimeError) as error:
                raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> SourceError:
    message = f"{path}: a damaged or incomplete PyTorch file: {error}"
    return SourceError(message, hint="download the file again")


def _runs_code(path: Path, wants: str) -> SourceError:
    return SourceError(
        f"{path}: refused: loading it would mean running code from the file{wants}",
        hint="do not use this file unless you trust its origin; " + _RESAVE,
    )


def _load(path: Path) -> Any:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with warnings.catch_warnings(), FakeTensorMode():
            warnings.simplefilter("ignore")  # of protocols that torch does not write
            return torch.load(str(path), map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own text recommends weights_only=False, which is what must not happen.
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        wants = f" (it asks for {name[1]})" if name else ""
        raise _runs_code(path, wants) from None
    except Exception as error:  # a damaged archive, or a kind of tensor without plain data
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise SourceError(
            f"{path}: PyTorch cannot load it as plain tensors: {reason}",
            hint="download the file again, or " + _RESAVE,
        ) from None


def _defects(name: Any, value: Any) -> Iterator[str]:
    import torch

    if not isinstance(name, str) or not name:
        yield f"a key is not a name: {str(name)[:80]!r}"
    elif isinstance(value, dict):
        yield f"{name!r} holds another dict: save that one by itself"
    elif not isinstance(value, torch.Tensor):
        yield f"{name!r} is not a tensor but of type {type(value).__name__}"
    elif value.layout != torch.strided:
        yield f"{name!r} is sparse"
    elif str(value.dtype) not in _CODES:
        yield f"{name!r} has dtype {value.dtype}, which is not supported"
    elif value.is_neg() or value.is_conj():
        yield f"{name!r} is a lazily negated or conjugated view"


def _located(
    directory: Path, file: str, members: Mapping[int, int], name: str, value: Any
) -> SourceTensor:
    """Find a tensor's bytes, which must lie inside the member that is its storage."""
    shape, strides = tuple(value.shape), tuple(value.stride())
    offset = 0
    if value.numel():
        storage = getattr(value.untyped_storage(), "_checkpoint_offset", None)
        first = value.storage_offset() * value.element_size()
        length = value.element_size() * _span(shape, strides)
        if storage is None or first + length > members.get(storage, -1):
            raise SourceError(
                f"{directory / file}: the data of {name!r} is not in the file", hint=_RESAVE
            )
        offset = storage + first
        if _is_scattered(value.element_size(), value.numel(), shape, strides):
            raise SourceError(
                f"{directory / file}: the elements of {name!r} lie too far apart, or repeat",
                hint=_RESAVE,
            )
    packed = value.is_contiguous()
    code = _CODES[str(value.dtype)]
    return SourceTensor(name, code, shape, file, offset, None if packed else strides)


def _not_tensors(path: Path, defects: list[str]) -> SourceError:
    return SourceError(
        f"{path}: not a state dict of plain tensors:{bullets(defects)}", hint=_RESAVE
    )


def read_strided(fd: int, path: Path, tensor: SourceTensor, start: int, view: memoryview) -> None:
    """Fill a view with bytes of a tensor with strides, in row-major order.

    The stretch of the file that holds the rows in question is read: at most 16 MiB at a time where
    rows lie one after another, the whole tensor where they interleave (a transposed matrix).
    ``start`` counts bytes of the row-major tensor, which is not empty.
    """
    assert tensor.strides is not None
    itemsize = ITEMSIZE[tensor.dtype]
    row = itemsize * math.prod(tensor.shape[1:])
    distance = itemsize * tensor.strides[0]
    step, _ = _gathered(itemsize, tensor.shape, tensor.strides)
    out = np.frombuffer(view, np.uint8)
    end = start + len(view)
    for first in range(start // row, -(-end // row), step):
        rows = min(step, -(-end // row) - first)
        shape = (rows, *tensor.shape[1:])
        stored = np.empty(itemsize * _span(shape, tensor.strides), np.uint8)
        read_into(fd, path, tensor.offset + first * distance, stored.data)
        strides = tuple(itemsize * stride for stride in tensor.strides)
        strided = np.ndarray(shape, f"u{itemsize}", stored, strides=strides)
        block = np.ascontiguousarray(strided).reshape(-1).view(np.uint8)
        low, high = max(start, first * row), min(end, (first + rows) * row)
        out[low - start : high - start] = block[low - first * row : high - first * row]


def _gathered(itemsize: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int]:
    """Return how many rows are read at a time, and how many bytes they span."""
    if not shape:
        return 1, itemsize
    rows = min(shape[0], max(1, _GATHER_BYTES // max(1, itemsize * strides[0])))
    return rows, itemsize * _span((rows, *shape[1:]), strides)


def _is_scattered(
    itemsize: int, count: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> bool:
    """Return whether elements lie far apart, or far more of them share few bytes."""
    least, most = _GATHERED
    gathered = _gathered(itemsize, shape, strides)[1]
    if gathered > min(max(least, 4 * itemsize * count), most):
        return True
    return count > max(_span(shape, strides), _MOST_EXPANDED)


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last one of a strided tensor that is not empty."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
