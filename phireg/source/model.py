"""A source model directory as data: which tensors it holds, where their bytes lie, reading them."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Protocol

from phireg.dtypes import ITEMSIZE
from phireg.errors import SourceError
from phireg.files.kinds import WEIGHTS, kind_of_entries
from phireg.files.regular import Stamp, check_unchanged, listed, open_regular, read_into
from phireg.files.safetensors import Header, read_header
from phireg.source import torchbin
from phireg.source.index import ShardIndex, index_error, missing_shards, read_index, shard_defects


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One tensor of a source checkpoint.

    Attributes:
        name: its name in the checkpoint.
        dtype: a safetensors dtype code (`phireg.dtypes.ITEMSIZE`).
        shape: dimensions; the bytes are read in row-major order.
        file: the file that holds it, relative to the directory.
        offset: where its bytes start in that file; 0 for PyTorch .bin files, whose tensors
            need not be contiguous.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return ITEMSIZE[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One weights file.

    Attributes:
        name: relative to the directory.
        size: in bytes.
        header_digest: of a safetensors file, xxh3_128 of its header with the eight length bytes;
            of a .bin file, xxh3_128 of its sorted listing, one line ``name dtype shape`` per
            tensor. Hexadecimal.
    """

    name: str
    size: int
    header_digest: str


class _Fetch(Protocol):
    """How one kind of file gets the bytes of a tensor, once it is open."""

    def __call__(
        self, fd: int, path: Path, tensor: SourceTensor, start: int, view: memoryview
    ) -> None: ...


class Reader:
    """Reads tensors of an open source; several threads may use one reader at once.

    Files are opened when they are first needed and closed with the reader, which is a context
    manager.
    """

    def __init__(self, directory: Path, stamps: Mapping[str, Stamp], fetch: _Fetch) -> None:
        self._directory = directory
        self._stamps = stamps
        self._fetch = fetch
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def read_into(self, tensor: SourceTensor, start: int, view: memoryview) -> None:
        """Fill a view with bytes ``[start, start + len(view))`` of a tensor in row-major order.

        Args:
            tensor: one of the source's tensors.
            start: first byte, counted from the start of the tensor.
            view: one-dimensional writable view of bytes.

        Raises:
            SourceError: the file ended early, changed since it was opened as a source, or could
                not be read.
            ValueError: the range is not inside the tensor: a mistake of the caller.
        """
        if not 0 <= start <= start + len(view) <= tensor.nbytes:
            raise ValueError(f"{tensor.name}: bytes {start}+{len(view)} of {tensor.nbytes}")
        path = self._directory / tensor.file
        fd = self._descriptor(tensor.file, path)
        self._fetch(fd, path, tensor, start, view)
        # After the read, so that bytes written meanwhile cannot go unnoticed.
        check_unchanged(fd, path, self._stamps[tensor.file])

    def close(self) -> None:
        """Close the files; the reader can be used again and opens them anew."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _descriptor(self, file: str, path: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                fd = open_regular(path)
                self._descriptors[file] = fd
                check_unchanged(fd, path, self._stamps[file])
            return self._descriptors[file]


@dataclass(frozen=True, slots=True)
class Source:
    """A source checkpoint whose headers were read and found consistent.

    Attributes:
        directory: where it lies.
        revision: the hub commit it was resolved from, or None.
        tensors: by name, ordered by file and by place in the file; read-only.
        files: the weights files that are used, sorted by name.
        notes: things worth telling that are not errors.
    """

    directory: Path
    revision: str | None
    tensors: Mapping[str, SourceTensor]
    files: tuple[SourceFile, ...]
    notes: tuple[str, ...]
    _stamps: Mapping[str, Stamp] = field(repr=False)
    _fetch: _Fetch = field(repr=False)

    def open(self) -> Reader:
        """A reader for the tensors' bytes; use it in a ``with`` statement."""
        return Reader(self.directory, self._stamps, self._fetch)


def without_weights(directory: Path) -> Source:
    """The source of a model of which only the config is there: it has no tensors."""

    def nothing(fd: int, path: Path, tensor: SourceTensor, start: int, view: memoryview) -> None:
        raise AssertionError("there are no tensors to read")

    return Source(directory, None, {}, (), (), {}, nothing)


def source_of(
    directory: Path, tensors: Iterable[SourceTensor], headers: Mapping[str, Header]
) -> Source:
    """Tensors of safetensors files whose headers were read; ``headers`` is by file name."""
    return Source(
        directory,
        None,
        MappingProxyType({tensor.name: tensor for tensor in tensors}),
        tuple(SourceFile(name, h.file_size, h.digest) for name, h in headers.items()),
        (),
        MappingProxyType({name: Stamp(h.file_size, h.mtime_ns) for name, h in headers.items()}),
        _fetch_plain,
    )


@dataclass(frozen=True, slots=True)
class _Scan:
    """One weights file, whatever its kind."""

    file: SourceFile
    stamp: Stamp
    tensors: tuple[SourceTensor, ...]
    strided: tuple[torchbin.BinTensor, ...] = ()


@dataclass(frozen=True, slots=True)
class _Kind:
    """A way in which Hugging Face checkpoints store weights."""

    single: str
    suffix: str
    scan: Callable[[Path, str], _Scan]

    @property
    def index(self) -> str:
        return f"{self.single}.index.json"


def open_source(directory: Path, revision: str | None = None) -> Source:
    """Find the weights of a model directory, read every header, and check that all agrees.

    ``model.safetensors.index.json`` is preferred, then ``model.safetensors``,
    ``pytorch_model.bin.index.json`` and ``pytorch_model.bin``. No tensor data is read, and torch
    is imported for .bin files only. Dtypes are reported as they are: whether the tensors fit a
    model is for the plan to say.

    Args:
        directory: the model directory; shards may be symbolic links.
        revision: the hub commit the directory was resolved from.

    Raises:
        SourceError: there is no such directory, it holds something else (the message says what),
            or the index and the files do not agree (all such defects in one message).
    """
    names = _entries(directory)
    for kind in _KINDS:
        if kind.index in names:
            index = read_index(directory / kind.index, kind.suffix)
            scans = _scan_shards(directory, index, kind)
        elif kind.single in names:
            index = None
            scans = [kind.scan(directory, kind.single)]
        else:
            continue
        tensors = {tensor.name: tensor for scan in scans for tensor in scan.tensors}
        if not tensors:
            raise SourceError(f"{directory / kind.single}: the file holds no tensors")
        strided = {(s.file.name, t.name): t for s in scans for t in s.strided}
        return Source(
            directory,
            revision,
            MappingProxyType(tensors),
            tuple(scan.file for scan in scans),
            tuple(_notes(names, kind, scans, index)),
            MappingProxyType({scan.file.name: scan.stamp for scan in scans}),
            _fetch_strided(strided) if strided else _fetch_plain,
        )
    raise _no_weights(directory, names)


def _no_weights(directory: Path, names: Collection[str]) -> SourceError:
    kind, name = kind_of_entries(names)
    if kind is not None:
        return SourceError(f"{directory}: this is {kind.name} ({name})", hint=kind.advice)
    others = _weight_files(names, (".safetensors", ".bin", ".pt", ".pth", ".ckpt"))
    if others:
        content = f"no weights under a name that is known here, only {', '.join(others)}"
    else:
        content = "there are no weights in this directory" if names else "the directory is empty"
    return SourceError(
        f"{directory}: {content}",
        hint="expected config.json and model.safetensors, model.safetensors.index.json with its "
        "shards, or the same as pytorch_model.bin",
    )


def _weight_files(names: Iterable[str], suffixes: tuple[str, ...]) -> list[str]:
    """Names that end like weight files, sorted, without those of a trainer's own state."""
    return sorted(
        name
        for name in names
        if name.endswith(suffixes) and not name.startswith(("training_args", "optimizer"))
    )


def _entries(directory: Path) -> set[str]:
    try:
        return set(os.listdir(directory))  # noqa: PTH208 - names only
    except FileNotFoundError:
        raise SourceError(f"{directory}: no such directory") from None
    except NotADirectoryError:
        raise SourceError(
            f"{directory}: this is a file; a model is a directory",
            hint="give the directory that holds config.json and the weights",
        ) from None
    except (OSError, ValueError) as error:
        raise SourceError(f"{str(directory)!r}: cannot be read: {error}") from None


def _scan_shards(directory: Path, index: ShardIndex, kind: _Kind) -> list[_Scan]:
    defects: list[str] = []
    hint = None
    missing = missing_shards(index)
    if missing:
        defects.append(f"missing files: {listed(missing, len(missing), 20)}")
    scans = []
    for name in index.shards:
        if name in missing:
            continue
        try:
            scans.append(kind.scan(directory, name))
        except SourceError as error:
            defects.append(error.message)
            hint = hint or error.hint
    held = {scan.file.name: {t.name: t for t in scan.tensors} for scan in scans}
    defects += shard_defects(index, held)
    if defects:
        raise index_error(index.path, defects, hint)
    return scans


def _notes(
    names: Iterable[str], kind: _Kind, scans: list[_Scan], index: ShardIndex | None
) -> list[str]:
    used = {scan.file.name for scan in scans}
    notes = []
    for other in _KINDS:
        others = [n for n in _weight_files(names, (other.suffix,)) if n not in used]
        adapters = [n for n in others if n.startswith("adapter_")]
        strays = [n for n in others if n not in adapters]
        if adapters:
            notes.append(f"a LoRA adapter lies beside the model and is not applied: {adapters[0]}")
        if strays and other is kind:
            notes.append(
                f"not used, since {kind.single if index is None else kind.index} "
                f"does not name them: {listed(strays, len(strays))}"
            )
        elif strays:
            notes.append(
                f"the {kind.suffix} weights are used, "
                f"the {other.suffix} files are not: {listed(strays, len(strays))}"
            )
    total = sum(tensor.nbytes for scan in scans for tensor in scan.tensors)
    if index is not None and index.total_size not in (None, total):
        notes.append(
            f"{kind.index} says {index.total_size} bytes in total, the tensors have {total}"
        )
    return notes


def _scan_safetensors(directory: Path, name: str) -> _Scan:
    header = read_header(directory / name)
    return _Scan(
        SourceFile(name, header.file_size, header.digest),
        Stamp(header.file_size, header.mtime_ns),
        tuple(
            SourceTensor(entry.name, entry.dtype, entry.shape, name, entry.start)
            for entry in header.entries.values()
        ),
    )


def _scan_bin(directory: Path, name: str) -> _Scan:
    listing = torchbin.read_listing(directory / name)
    return _Scan(
        SourceFile(name, listing.stamp.size, listing.digest),
        listing.stamp,
        tuple(SourceTensor(t.name, t.dtype, t.shape, name, 0) for t in listing.tensors),
        listing.tensors,
    )


def _fetch_plain(fd: int, path: Path, tensor: SourceTensor, start: int, view: memoryview) -> None:
    read_into(fd, path, tensor.offset + start, view)


def _fetch_strided(strided: Mapping[tuple[str, str], torchbin.BinTensor]) -> _Fetch:
    def fetch(fd: int, path: Path, tensor: SourceTensor, start: int, view: memoryview) -> None:
        torchbin.read_strided(fd, path, strided[tensor.file, tensor.name], start, view)

    return fetch


_KINDS = (
    _Kind(WEIGHTS[0], ".safetensors", _scan_safetensors),
    _Kind(WEIGHTS[1], ".bin", _scan_bin),
)
