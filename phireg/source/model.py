"""A Hugging Face model directory as data: its tensors, and reading their bytes."""

from __future__ import annotations

import os
import posixpath
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from phireg.errors import SourceError
from phireg.files.json import read_json_object
from phireg.files.kinds import WEIGHTS, kind_of_entries
from phireg.files.regular import Stamp, bullets, check_unchanged, listed, open_regular, read_into
from phireg.files.safetensors import read_header
from phireg.source.tensors import SourceTensor, WeightsFile
from phireg.source.torchbin import list_bin, read_strided


class Reader:
    """Reads tensors of an open source; several threads may use one reader at once.

    Files are opened when they are first needed and closed with the reader, which is a context
    manager.
    """

    def __init__(self, directory: Path, stamps: Mapping[str, Stamp]) -> None:
        self._directory = directory
        self._stamps = stamps
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def read_into(self, tensor: SourceTensor, start: int, view: memoryview) -> None:
        """Fill a view with bytes ``[start, start + len(view))`` of a tensor in row-major order."""
        if not 0 <= start <= start + len(view) <= tensor.nbytes:
            raise ValueError(f"{tensor.name}: bytes {start}+{len(view)} of {tensor.nbytes}")
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

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
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
    """A source checkpoint whose headers were read and are consistent."""

    directory: Path
    tensors: Mapping[str, SourceTensor]  # by name, ordered by file and by place in the file
    files: tuple[WeightsFile, ...]  # those that are used, sorted by name
    revision: str | None = None  # the hub commit it was resolved from
    notes: tuple[str, ...] = ()

    def open(self) -> Reader:
        """Return a reader for the tensors' bytes; use it in a ``with`` statement."""
        return Reader(self.directory, {file.name: file.stamp for file in self.files})


@dataclass(frozen=True, slots=True)
class _Format:
    """A format in which Hugging Face checkpoints store weights."""

    single: str
    suffix: str
    list_file: Callable[[Path, str], WeightsFile]

    @property
    def index(self) -> str:
        return f"{self.single}.index.json"


def list_safetensors(directory: Path, name: str) -> WeightsFile:
    """List the tensors of a safetensors file."""
    header = read_header(directory / name)
    tensors = tuple(
        SourceTensor(entry.name, entry.dtype, entry.shape, name, entry.start)
        for entry in header.entries.values()
    )
    return WeightsFile(name, header.digest, header.stamp, tensors)


_FORMATS = (
    _Format(WEIGHTS[0], ".safetensors", list_safetensors),
    _Format(WEIGHTS[1], ".bin", list_bin),
)


def open_source(directory: Path, revision: str | None = None) -> Source:
    """Find the weights of a model directory, read every header, and check that all agrees.

    ``model.safetensors.index.json`` is preferred, then ``model.safetensors``,
    ``pytorch_model.bin.index.json`` and ``pytorch_model.bin``. No tensor data is read, and torch
    is imported for .bin files only. All disagreements of the index and the files come in one error.
    """
    names = _entries(directory)
    for format_ in _FORMATS:
        if format_.index in names:
            index = _read_index(directory / format_.index, format_.suffix)
            files = _list_shards(directory, index, format_)
        elif format_.single in names:
            index = None
            files = [format_.list_file(directory, format_.single)]
        else:
            continue
        tensors = {tensor.name: tensor for file in files for tensor in file.tensors}
        if not tensors:
            raise SourceError(f"{directory / format_.single}: the file holds no tensors")
        notes = _notes(names, format_, files, index)
        return Source(directory, MappingProxyType(tensors), tuple(files), revision, tuple(notes))
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


def _list_shards(directory: Path, index: _ShardIndex, format_: _Format) -> list[WeightsFile]:
    defects: list[str] = []
    hint = None
    missing = [name for name in index.shards if not os.access(directory / name, os.F_OK)]
    if missing:
        defects.append(f"missing files: {listed(missing, 20)}")
    files = []
    for name in index.shards:
        if name in missing:
            continue
        try:
            files.append(format_.list_file(directory, name))
        except SourceError as error:
            defects.append(error.message)
            hint = hint or error.hint
    defects += _shard_defects(index, {file.name: {t.name for t in file.tensors} for file in files})
    if defects:
        raise _index_error(index.path, defects, hint)
    return files


@dataclass(frozen=True, slots=True)
class _ShardIndex:
    """A checked ``*.index.json``; shard names are relative paths inside its directory."""

    path: Path
    weight_map: Mapping[str, str]  # tensor name to shard name
    total_size: int | None  # metadata.total_size in bytes; None where absent or no integer

    @property
    def shards(self) -> tuple[str, ...]:
        """The shard names, each once, sorted."""
        return tuple(sorted(set(self.weight_map.values())))


def _read_index(path: Path, suffix: str) -> _ShardIndex:
    """Read ``model.safetensors.index.json`` or the like, and check all that needs no shard."""
    document = read_json_object(path)
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _index_error(path, ["weight_map must be an object: tensor name to file name"])
    if defects := list(_map_defects(weight_map, suffix)):
        raise _index_error(path, defects)
    metadata = document.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return _ShardIndex(path, MappingProxyType(weight_map), total if type(total) is int else None)


def _shard_defects(index: _ShardIndex, held: Mapping[str, Collection[str]]) -> list[str]:
    """Compare the index with the names of the tensors in each shard that could be read."""
    defects = []
    for shard, tensors in held.items():
        expected = [name for name, file in index.weight_map.items() if file == shard]
        absent = [name for name in expected if name not in tensors]
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
    """Return what is wrong with the text of a shard name.

    Links are not resolved: the Hugging Face cache keeps snapshots as links to blobs elsewhere.
    """
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


def _notes(
    names: Iterable[str], format_: _Format, files: list[WeightsFile], index: _ShardIndex | None
) -> list[str]:
    used = {file.name for file in files}
    notes = []
    for other in _FORMATS:
        unused = [name for name in _weight_files(names, (other.suffix,)) if name not in used]
        adapters = [name for name in unused if name.startswith("adapter_")]
        strays = [name for name in unused if name not in adapters]
        if adapters:
            notes.append(f"a LoRA adapter lies beside the model and is not applied: {adapters[0]}")
        if strays and other is format_:
            notes.append(
                f"not used, since {format_.single if index is None else format_.index} "
                f"does not name them: {listed(strays)}"
            )
        elif strays:
            notes.append(
                f"the {format_.suffix} weights are used, "
                f"the {other.suffix} files are not: {listed(strays)}"
            )
    total = sum(tensor.nbytes for file in files for tensor in file.tensors)
    if index is not None and index.total_size not in (None, total):
        notes.append(
            f"{format_.index} says {index.total_size} bytes in total, the tensors have {total}"
        )
    return notes
