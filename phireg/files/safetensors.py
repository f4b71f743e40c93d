"""Safetensors headers: read through the safetensors library, written byte for byte as it does.

A safetensors file is eight bytes of header length (little endian), the header (a JSON object that
maps each tensor's name to dtype, shape and byte range, padded with spaces), and the tensor data
without gaps. The library decides what a valid file is; it does not tell where the bytes of a tensor
lie, and writes only whole tensors that are in memory, so offsets are read and headers are encoded
here.
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
from safetensors import SafetensorError, safe_open

from phireg.dtypes import ITEMSIZE
from phireg.errors import SourceError
from phireg.files.json import parse_object
from phireg.files.regular import (
    Stamp,
    check_unchanged,
    disguise,
    open_regular,
    read_bytes,
    stamp_of,
)

_RANK = {code: rank for rank, code in enumerate(ITEMSIZE)}
_PREFIX = "Error while deserializing header: "
_MAX_HEADER = 100_000_000  # the library's own limit
_MAX_DIMENSIONS = 32
_TOO_LARGE = 2**63


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors file; byte offsets count from the start of the file."""

    name: str
    dtype: str  # a code of phireg.dtypes.ITEMSIZE
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """A valid safetensors header."""

    entries: Mapping[str, TensorEntry]  # in the order of their data
    digest: str  # xxh3_128 of the eight length bytes and the header, in hexadecimal
    metadata: Mapping[str, str]
    stamp: Stamp


def read_header(path: Path, *, inside: Path | None = None, limit: int | None = None) -> Header:
    """Read the header of a safetensors file, and no tensor data; see ``open_regular``."""
    fd = open_regular(path, inside=inside, limit=limit)
    try:
        stamp = stamp_of(fd)
        head = read_bytes(fd, path, 0, min(stamp.size, 64))
        # A header length may by chance spell another format's first bytes: "{" behind it decides.
        if head[8:9] != b"{" and (known := disguise(head)):
            raise SourceError(f"{path}: {known[0]}", hint=known[1])
        length = 8 + int.from_bytes(head[:8], "little")
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (SafetensorError, OSError, MemoryError) as error:
            problem = str(error).removeprefix(_PREFIX)
            if length <= min(stamp.size, _MAX_HEADER):
                raw = read_bytes(fd, path, 0, length)
                problem = _truncation(raw, stamp.size) or problem
            raise _invalid(path, [problem]) from None
        raw = read_bytes(fd, path, 0, length)
        check_unchanged(fd, path, stamp)
    finally:
        os.close(fd)
    try:
        listing = parse_object(raw[8:])
    except ValueError as error:  # a repeated name, which the library lets pass
        raise _invalid(path, [str(error)]) from None
    metadata = listing.pop("__metadata__", None) or {}
    if defects := [defect for name in listing for defect in _defects(name, listing[name])]:
        raise _invalid(path, defects)
    entries = []
    for name, entry in listing.items():
        start, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        entries.append(TensorEntry(name, entry["dtype"], shape, length + start, length + end))
    entries.sort(key=lambda entry: (entry.start, entry.end))
    by_name = MappingProxyType({entry.name: entry for entry in entries})
    return Header(by_name, xxhash.xxh3_128_hexdigest(raw), metadata, stamp)


def _truncation(raw: bytes, size: int) -> str | None:
    """Name the first tensor that a truncated file lacks, which the library does not."""
    try:
        listing = parse_object(raw[8:])
        listing.pop("__metadata__", None)
        ends = sorted((len(raw) + entry["data_offsets"][1], key) for key, entry in listing.items())
        name = next(key for end, key in ends if end > size)
        missing = ends[-1][0] - size
        return f"the file is truncated: {missing} bytes are missing, from {name[:200]!r} on"
    except (ValueError, TypeError, LookupError, StopIteration):
        return None  # damaged in another way


def _defects(name: str, entry: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the library accepts and phireg cannot work with."""
    if not name:
        yield "a tensor has no name"
    if entry["dtype"] not in ITEMSIZE:
        yield f"{name[:200]!r}: dtype {entry['dtype']} is not supported"
    shape = entry["shape"]
    # Zero in a shape makes the rest of it meaningless to the library, but not to numpy and torch.
    if len(shape) > _MAX_DIMENSIONS or math.prod(size or 1 for size in shape) >= _TOO_LARGE:
        yield f"{name[:200]!r}: the shape is too large"


def encode_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, TensorEntry]]:
    """Build a header as the safetensors library writes it.

    ``tensors`` are names, dtype codes and shapes. The result is the first bytes of the file
    (length, JSON, padding), which the data follows directly, and each tensor's place in the file,
    in the order of the data: dtype rank descending, then name.
    """
    if len({name for name, _, _ in tensors}) != len(tensors):
        raise ValueError("tensor names must be unique")
    if any(name in ("", "__metadata__") for name, _, _ in tensors):
        raise ValueError("a tensor needs a name of its own")
    if unknown := {dtype for _, dtype, _ in tensors} - set(ITEMSIZE):
        raise ValueError(f"unknown dtypes {sorted(unknown)}")
    ordered = sorted(tensors, key=lambda tensor: (-_RANK[tensor[1]], tensor[0]))
    listing: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
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


def _invalid(path: Path, defects: list[str]) -> SourceError:
    more = f"; and {len(defects) - 5} more" if len(defects) > 5 else ""
    return SourceError(
        f"{path}: not a valid safetensors file: {'; '.join(defects[:5])}{more}",
        hint="the file is damaged or incomplete; make or download it again",
    )
