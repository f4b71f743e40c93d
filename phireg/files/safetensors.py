"""Safetensors headers, read with every check the format asks for and written byte for byte.

A safetensors file is eight bytes of header length (little endian), the header (a JSON object that
maps each tensor's name to dtype, shape and byte range, padded with spaces), and the tensor data
without gaps. The library's own interface handles whole files or whole tensors; phireg moves
ranges of bytes, so it reads and writes the header itself.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import xxhash

from phireg.dtypes import ITEMSIZE
from phireg.errors import SourceError
from phireg.files.json import parse_object
from phireg.files.regular import (
    Stamp,
    bullets,
    check_unchanged,
    disguise,
    listed,
    open_regular,
    read_bytes,
    stamp_of,
)

_RANK = {code: rank for rank, code in enumerate(ITEMSIZE)}
_MAX_HEADER = 100_000_000  # the library's own limit
_MAX_DIMENSIONS = 32
_TOO_LARGE = 2**63
_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors file.

    Attributes:
        name: the tensor's name.
        dtype: a code of ``phireg.dtypes.ITEMSIZE``.
        shape: dimensions, row-major.
        start: first byte of the data, counted from the start of the file.
        end: the byte after the data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """A safetensors header that passed every check.

    Attributes:
        entries: the tensors by name, in the order of their data; read-only.
        digest: xxh3_128 of the eight length bytes and the header, in hexadecimal.
        file_size: size of the file in bytes.
        mtime_ns: modification time of the file, in nanoseconds.
        metadata: the file's ``__metadata__``; read-only.
    """

    entries: Mapping[str, TensorEntry]
    digest: str
    file_size: int
    mtime_ns: int
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Args:
        path: the file; the data behind the header is not read.

    Returns:
        The header, with offsets made absolute.

    Raises:
        SourceError: the file cannot be read or breaks a rule of the format; the message names the
            file and up to five defects of the header.
    """
    fd = open_regular(path)
    try:
        stamp = stamp_of(fd)
        raw = _raw_header(fd, path, stamp.size)
        check_unchanged(fd, path, stamp)
    finally:
        os.close(fd)
    try:
        listing = parse_object(raw[8:])
    except ValueError as error:
        raise _invalid(path, [f"header: {error}"]) from None
    return _checked(path, listing, raw, stamp)


def encode_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
) -> tuple[bytes, dict[str, TensorEntry]]:
    """Build a header as the safetensors library writes it for tensors without metadata.

    Args:
        tensors: name, dtype code and shape of each tensor, in any order.

    Returns:
        The first bytes of the file (length, JSON, padding), and each tensor's place in the file,
        in the order of the data: dtype rank descending, then name. The data follows directly.

    Raises:
        ValueError: a name is repeated or empty, or a dtype is unknown: a mistake of the caller.
    """
    if len({name for name, _, _ in tensors}) != len(tensors):
        raise ValueError("tensor names must be unique")
    if any(name in ("", "__metadata__") for name, _, _ in tensors):
        raise ValueError("a tensor needs a name of its own")
    if unknown := {dtype for _, dtype, _ in tensors} - set(ITEMSIZE):
        raise ValueError(f"unknown dtypes {sorted(unknown)}")
    ordered = sorted(tensors, key=lambda tensor: (-_RANK[tensor[1]], tensor[0]))
    listing: dict[str, Any] = {}
    end = 0
    for name, dtype, shape in ordered:
        start, end = end, end + ITEMSIZE[dtype] * math.prod(shape)
        listing[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(listing, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(8, "little") + text
    entries = {}
    for name, dtype, shape in ordered:
        start, end = listing[name]["data_offsets"]
        entries[name] = TensorEntry(name, dtype, tuple(shape), len(raw) + start, len(raw) + end)
    return raw, entries


def _raw_header(fd: int, path: Path, size: int) -> bytes:
    """The eight length bytes and the header behind them."""
    if size == 0:
        raise _invalid(path, ["the file is empty"])
    head = read_bytes(fd, path, 0, min(size, 64))
    # A header length may by chance spell another format's first bytes; "{" behind it settles it.
    if head[8:9] != b"{" and (known := disguise(head)):
        raise SourceError(f"{path}: {known[0]}", hint=known[1])
    if size < 8:
        raise _invalid(path, [f"the file is only {size} bytes long"])
    length = int.from_bytes(head[:8], "little")
    if length == 0:
        raise _invalid(path, ["the header length is zero"])
    if length > _MAX_HEADER:
        raise _invalid(path, [f"the header length {length} is over the limit of {_MAX_HEADER}"])
    if length > size - 8:
        raise _invalid(
            path, [f"the header length is {length}, but only {size - 8} bytes follow: truncated?"]
        )
    if head[8:9] != b"{":
        raise _invalid(path, ["the header is not a JSON object: it does not begin with '{'"])
    return read_bytes(fd, path, 0, 8 + length)


def _checked(path: Path, listing: dict[str, Any], raw: bytes, stamp: Stamp) -> Header:
    defects: list[str] = []
    metadata = listing.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        defects.append("__metadata__ must be an object of strings")
    entries: list[TensorEntry] = []
    for name, entry in listing.items():
        problems = list(_entry_defects(name, entry))
        defects.extend(f"{name[:200]!r}: {problem}" for problem in problems)
        if not problems:
            start, end = (len(raw) + offset for offset in entry["data_offsets"])
            entries.append(TensorEntry(name, entry["dtype"], tuple(entry["shape"]), start, end))
    entries.sort(key=lambda entry: (entry.start, entry.end))
    # Where an entry is unreadable its range is unknown, so that gaps would be reported wrongly.
    if not defects:
        defects.extend(_layout_defects(entries, len(raw), stamp.size))
    if defects:
        raise _invalid(path, defects)
    return Header(
        MappingProxyType({entry.name: entry for entry in entries}),
        xxhash.xxh3_128_hexdigest(raw),
        stamp.size,
        stamp.mtime_ns,
        MappingProxyType(metadata),
    )


def _entry_defects(name: str, entry: Any) -> Iterator[str]:
    if not name:
        yield "a tensor without a name"
    if not isinstance(entry, dict):
        yield "the entry is not an object"
        return
    if entry.keys() != _KEYS:
        if missing := sorted(_KEYS - entry.keys()):
            yield f"the entry lacks {listed(missing, len(missing))}"
        if extra := sorted(entry.keys() - _KEYS):
            yield f"the entry has unknown keys {listed(extra, len(extra))}"
        return
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    itemsize = ITEMSIZE.get(dtype) if isinstance(dtype, str) else None
    if itemsize is None:
        yield f"unknown or unsupported dtype {str(dtype)[:40]!r}"
    shape_defect = _shape_defect(shape)
    if shape_defect:
        yield shape_defect
    if not (_counts(offsets) and len(offsets) == 2):
        yield "data_offsets must be two integers from 0 to 2^63-1"
    elif offsets[0] > offsets[1]:
        yield f"data_offsets are reversed: {offsets}"
    elif itemsize is not None and not shape_defect:
        wanted = itemsize * math.prod(shape)
        if offsets[1] - offsets[0] != wanted:
            yield (
                f"data_offsets span {offsets[1] - offsets[0]} bytes, "
                f"but dtype {dtype} and shape {shape} need {wanted}"
            )


def _counts(value: Any) -> bool:
    """Whether a JSON value is a list of integers from 0 to 2^63-1 (true is not an integer)."""
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < _TOO_LARGE for item in value
    )


def _shape_defect(shape: Any) -> str | None:
    if not _counts(shape):
        return "shape must be a list of integers from 0 to 2^63-1"
    if len(shape) > _MAX_DIMENSIONS:
        return f"shape has {len(shape)} dimensions"
    if math.prod(size or 1 for size in shape) >= _TOO_LARGE:
        return "shape is too large for any file"
    return None


def _layout_defects(entries: list[TensorEntry], data_start: int, size: int) -> Iterator[str]:
    """Overlaps and holes, then what is missing or left over at the end of the file."""
    end, before = data_start, "the header"
    for entry in entries:
        if entry.start > end:
            yield f"a hole of {entry.start - end} bytes between {before} and {entry.name!r}"
        elif entry.start < end:
            yield f"{entry.name!r} overlaps {before} by {end - entry.start} bytes"
        if entry.end >= end:
            end, before = entry.end, repr(entry.name)
    if end > size:
        beyond = [entry.name for entry in entries if entry.end > size]
        yield (
            f"the file is truncated: {end - size} bytes are missing "
            f"(from {listed(beyond, len(beyond), 1)})"
        )
    elif end < size:
        yield f"{size - end} trailing bytes belong to no tensor"


def _invalid(path: Path, defects: list[str]) -> SourceError:
    return SourceError(
        f"{path}: not a valid safetensors file:{bullets(defects)}",
        hint="the file is damaged or incomplete; download it again",
    )
