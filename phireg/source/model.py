"""A Hugging Face model directory as data: its tensors, and reading their bytes."""

from __future__ import annotations

import os
import posixpath
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import xxhash

from phireg.errors import SourceError
from phireg.files.json import read_json_object
from phireg.files.regular import bullets, check_unchanged, listed, open_regular, read_into
from phireg.files.safetensors import read_header
from phireg.findings import Finding, Severity
from phireg.source.merging import Factors, read_merged
from phireg.source.tensors import SourceTensor, WeightsFile
from phireg.source.torchbin import list_bin, read_strided

if TYPE_CHECKING:
    from phireg.source.adapter import Adapter

_BLOCK = 1024 * 1024
_SAMPLE = 4096

INDEX = ".index.json"
"""End of the name of an index, after the name that a single file would have."""


class Reader(AbstractContextManager["Reader"]):
    """Reads tensors of an open source, in several threads; files are opened when needed."""

    def __init__(self, directory: Path, files: Iterable[WeightsFile]) -> None:
        self._directory = directory
        self._stamps = {file.name: file.stamp for file in files}
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        self._merged = threading.local()  # each thread's current tensor with a LoRA layer

    def read_into(self, tensor: SourceTensor, start: int, view: memoryview) -> None:
        """Fill a view with bytes ``[start, start + len(view))`` of a tensor in row-major order."""
        if not 0 <= start <= start + len(view) <= tensor.nbytes:
            raise ValueError(f"{tensor.name}: bytes {start}+{len(view)} of {tensor.nbytes}")
        if not tensor.deltas:
            self._read_stored(tensor, start, view)
        elif len(view):
            merged = getattr(self._merged, "factors", None)
            if merged is None or merged.tensor is not tensor:
                merged = self._merged.factors = Factors(tensor, self._read_stored)
            read_merged(merged, self._read_stored, start, view)

    def _read_stored(self, tensor: SourceTensor, start: int, view: memoryview) -> None:
        """Fill a view with bytes of a tensor as the file has them."""
        path = self._directory / tensor.file
        fd = self._descriptor(tensor.file, path)
        if tensor.strides is None:
            read_into(fd, path, tensor.offset + start, view)
        elif len(view):
            read_strided(fd, path, tensor, start, view)
        # After the read, so that bytes written meanwhile cannot go unnoticed.
        check_unchanged(fd, path, self._stamps[tensor.file])

    def close(self) -> None:
        """Close the files; the reader can be used again and opens them anew."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def __exit__(self, *_: object) -> None:
        self.close()

    def _descriptor(self, file: str, path: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                fd = open_regular(path, inside=self._directory)
                self._descriptors[file] = fd
                check_unchanged(fd, path, self._stamps[file])
            return self._descriptors[file]


def same_bytes(
    reader: Reader,
    left: SourceTensor,
    second: Reader,
    right: SourceTensor,
    limit: int | None = None,
) -> bool:
    """Compare the bytes of two tensors of one dtype and shape, or the first of them."""
    if left.nbytes != right.nbytes:
        return False
    size = left.nbytes if limit is None else min(left.nbytes, limit)
    blocks = bytearray(min(size, _BLOCK)), bytearray(min(size, _BLOCK))
    for start in range(0, size, _BLOCK):
        ours, theirs = (memoryview(block)[: min(_BLOCK, size - start)] for block in blocks)
        reader.read_into(left, start, ours)
        second.read_into(right, start, theirs)
        if ours != theirs:
            return False
    return True


@dataclass(frozen=True, slots=True)
class Source:
    """A source checkpoint whose headers were read and are consistent."""

    directory: Path
    tensors: Mapping[str, SourceTensor]  # by name, ordered by file and by place in the file
    files: tuple[WeightsFile, ...]  # those that are used, sorted by name
    revision: str | None = None  # the hub commit it was resolved from
    findings: tuple[Finding, ...] = ()  # on the choice of the files
    adapter: Adapter | None = None  # that a plan is to add to the weights
    aliases: Mapping[str, SourceTensor] = field(default_factory=dict)  # other names of tensors

    def check_settled(self) -> None:
        """Raise a SourceError if the user must choose first how to read it."""
        if errors := [f for f in self.findings if f.severity is Severity.ERROR]:
            lines = "".join(f"\n  {finding.subject}: {finding.detail}" for finding in errors)
            raise SourceError(
                f"{self.directory} can be read in more than one way:{lines}",
                hint="the options are those of phireg convert: convert the model and run the "
                "checkpoint, or move away what is not to be read.",
            )

    def open(self) -> Reader:
        """Return a reader for the tensors' bytes; use it in a ``with`` statement."""
        return Reader(self.directory, self.files)

    def digest(self) -> str | None:
        """Return xxh3_128 of 4 KiB of the middle of every tensor: all versions' headers are alike.

        None where the values are not those of the model's own files.
        """
        hashed = xxhash.xxh3_128()
        with self.open() as reader:
            for name, tensor in sorted(self.tensors.items()):
                part = bytearray(min(_SAMPLE, tensor.nbytes))
                reader.read_into(tensor, (tensor.nbytes - len(part)) // 2, memoryview(part))
                hashed.update(name.encode())
                hashed.update(part)
        return hashed.hexdigest()


def list_safetensors(directory: Path, name: str) -> WeightsFile:
    """List the tensors of a safetensors file."""
    header = read_header(directory / name, inside=directory)
    tensors = tuple(
        SourceTensor(entry.name, entry.dtype, entry.shape, name, entry.start)
        for entry in header.entries.values()
    )
    return WeightsFile(name, header.digest, header.stamp, tensors, header.metadata)


FORMATS: Mapping[str, Callable[[Path, str], WeightsFile]] = {
    ".safetensors": list_safetensors,
    ".bin": list_bin,
    ".pt": list_bin,
    ".pth": list_bin,
}
"""How weights files are listed, by the ends of their names."""


def list_shards(directory: Path, name: str) -> tuple[ShardIndex, list[WeightsFile]]:
    """List the files of an index; all disagreements of the index and its files are one error."""
    index = read_index(directory / name)
    list_file = FORMATS[index.suffix]
    defects: list[str] = []
    hint = None
    missing = index.missing
    if missing:
        defects.append(f"missing files: {listed(missing, 20)}")
    files = []
    for shard in sorted({*index.shards} - {*missing}):
        try:
            files.append(list_file(directory, shard))
        except SourceError as error:
            defects.append(error.message)
            hint = hint or error.hint
    defects += shard_defects(index, {file.name: {t.name for t in file.tensors} for file in files})
    if defects:
        raise _index_error(index.path, defects, hint)
    return index, files


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """A checked ``*.index.json``; shard names are relative paths inside its directory."""

    path: Path
    weight_map: Mapping[str, str]  # tensor name to shard name
    total_size: int | None  # metadata.total_size in bytes; None where absent or no integer

    @property
    def shards(self) -> tuple[str, ...]:
        """The shard names, each once, sorted."""
        return tuple(sorted(set(self.weight_map.values())))

    @property
    def missing(self) -> list[str]:
        """The shards that do not exist."""
        beside = self.path.parent
        return [name for name in self.shards if not os.access(beside / name, os.F_OK)]

    @property
    def suffix(self) -> str:
        """The end of the shards' names: a key of FORMATS."""
        return Path(self.path.name.removesuffix(INDEX)).suffix


def read_index(path: Path) -> ShardIndex:
    """Read ``model.safetensors.index.json`` or the like, and check all that needs no shard."""
    document = read_json_object(path)
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _index_error(path, ["weight_map must be an object: tensor name to file name"])
    metadata = document.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = total if type(total) is int else None
    index = ShardIndex(path, MappingProxyType(weight_map), total)
    if defects := list(_map_defects(weight_map, index.suffix)):
        raise _index_error(path, defects)
    return index


def shard_defects(index: ShardIndex, held: Mapping[str, Collection[str]]) -> list[str]:
    """Compare the index with the names of the tensors in each shard that could be read."""
    defects = []
    expected: dict[str, list[str]] = {}
    for name, file in index.weight_map.items():
        expected.setdefault(file, []).append(name)
    for shard, tensors in held.items():
        absent = [name for name in expected[shard] if name not in tensors]
        unlisted = [name for name in tensors if name not in index.weight_map]
        if absent:
            defects.append(f"{shard} lacks tensors listed for it: {listed(absent)}")
        if unlisted:
            defects.append(f"{shard} holds tensors the index does not list: {listed(unlisted)}")
        elsewhere: dict[str, list[str]] = {}
        for name in tensors:
            if (file := index.weight_map.get(name, shard)) != shard:
                elsewhere.setdefault(file, []).append(name)
        for file, names in elsewhere.items():
            defects.append(f"{shard} holds tensors the index lists for {file}: {listed(names)}")
    return defects


def _map_defects(weight_map: dict[str, Any], suffix: str) -> Iterator[str]:
    if "" in weight_map:
        yield "weight_map has an entry without a tensor name"
    if wrong := [name for name, file in weight_map.items() if not isinstance(file, str)]:
        yield f"weight_map: the file name is not a string for {listed(wrong)}"
    files = sorted({file for file in weight_map.values() if isinstance(file, str)})
    for file in files:
        if defect := _name_defect(file, suffix):
            yield f"shard name {file[:100]!r} {defect}"


def _name_defect(name: str, suffix: str) -> str | None:
    """Return what is wrong with a shard's name; links are left alone: the hub's cache has them."""
    if not name:
        return "is empty"
    if len(name) > 255:
        return "is too long"
    if "\0" in name or "\\" in name:
        return "contains a NUL or a backslash"
    if name.startswith("/"):
        return "is absolute; shards lie beside their index"
    if ".." in name.split("/"):
        return "leaves the directory"
    if posixpath.normpath(name) != name:
        return "is not a plain relative path"
    if not name.endswith(suffix):
        return f"does not end with {suffix}"
    return None


def _index_error(path: Path, defects: list[str], hint: str | None = None) -> SourceError:
    return SourceError(
        f"{path}: the index and its shards cannot be used:{bullets(defects, 20)}",
        hint=hint or "download the model again; every file of it must come from the same revision",
    )
