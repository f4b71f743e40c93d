"""The rank files of a TensorRT-LLM checkpoint: the one place that opens them."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xxhash

from phireg.dtypes import BITS, torch_dtype
from phireg.errors import SourceError
from phireg.files.regular import check_unchanged, open_regular, read_into
from phireg.files.safetensors import TensorEntry, read_header
from phireg.ranges import largest
from phireg.reader.tensors import Kind

if TYPE_CHECKING:
    from torch import Tensor

Bits = npt.NDArray[np.unsignedinteger[Any]]
"""Elements as unsigned integers of their own width: numpy has no bfloat16 and no float8."""

_MAP_NORESERVE = 0x4000  # Linux's; Python 3.12 has no name for it
_BLOCK = 4 * 1024 * 1024


def world_size(config: Mapping[str, Any]) -> int:
    """Return the number of rank files that a checkpoint's config.json asks for."""
    mapping = config.get("mapping")
    world = mapping.get("world_size", 1) if isinstance(mapping, Mapping) else 1
    if type(world) is not int or not 0 < world <= largest("world_size"):
        raise SourceError(f"config.json: mapping.world_size is {world!r}")
    return world


class RankFile(AbstractContextManager["RankFile"]):
    """One rank file, held open: its header, and its tensors as bytes, numpy arrays or in torch.

    What is read later belongs to the header that was read first, even if another checkpoint takes
    the directory's name in the meantime.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)
        self._stamp = self.header.stamp
        self._descriptor = open_regular(path)
        try:
            check_unchanged(self._descriptor, path, self._stamp)
        except SourceError:
            os.close(self._descriptor)
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; mapped tensors stay valid."""
        os.close(self._descriptor)

    def kinds(self) -> dict[str, Kind]:
        """Return dtype code and shape by name."""
        return {name: (entry.dtype, entry.shape) for name, entry in self.header.entries.items()}

    def module(self, name: str) -> dict[str, TensorEntry]:
        """Return the tensors of a module by the last component of their names."""
        return {
            tensor.removeprefix(f"{name}."): entry
            for tensor, entry in self.header.entries.items()
            if tensor.startswith(f"{name}.")
        }

    def read_bytes(self, offset: int, count: int) -> bytearray:
        """Read ``count`` bytes of the file from ``offset`` on; an error if the file changed."""
        buffer = bytearray(count)
        read_into(self._descriptor, self.path, offset, memoryview(buffer))
        check_unchanged(self._descriptor, self.path, self._stamp)
        return buffer

    def digest(self, name: str, progress: Callable[[int], None] = lambda more: None) -> str:
        """Return xxh3_128 of a tensor's bytes, in hexadecimal, read a block at a time."""
        entry, digest = self.header.entries[name], xxhash.xxh3_128()
        for offset in range(entry.start, entry.end, _BLOCK):
            block = self.read_bytes(offset, min(_BLOCK, entry.end - offset))
            digest.update(block)
            progress(len(block))
        return digest.hexdigest()

    def read(self, name: str, start: int = 0, count: int | None = None) -> Bits:
        """Read ``count`` elements of a tensor, or all that follow element ``start``, as bits."""
        entry = self.header.entries[name]
        if count is None:
            count = math.prod(entry.shape) - start
        bits = np.dtype(BITS[entry.dtype])
        raw = self.read_bytes(entry.start + start * bits.itemsize, count * bits.itemsize)
        return np.frombuffer(raw, bits)

    def mapped(self) -> Callable[[str], Tensor]:
        """Map the file and return a function from a tensor's name to the tensor, in torch.

        The tensors outlive this object; they lie in the mapped file until they are copied.
        ``safe_open`` maps a file for torch writably, and Linux then wants memory for all of it,
        should every page be written to: a file larger than memory and swap is refused. Nothing is
        reserved here. Writing to a tensor changes this process's copy of a page, not the file.
        """
        import torch

        entries = self.header.entries
        flags, access = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        data = mmap.mmap(self._descriptor, 0, flags=flags, prot=access)

        def tensor(name: str) -> Tensor:
            if data.size() < len(data):  # reading what is gone would be a SIGBUS
                raise SourceError(
                    f"{self.path}: the file became shorter while it was being used",
                    hint="write another checkpoint into a new directory, then rename that.",
                )
            entry = entries[name]
            dtype = torch_dtype(entry.dtype)
            if entry.start == entry.end:
                return torch.empty(entry.shape, dtype=dtype)
            size = entry.end - entry.start
            raw = torch.frombuffer(data, dtype=torch.uint8, count=size, offset=entry.start)
            return raw.view(dtype).reshape(entry.shape)

        return tensor


class RankFiles(Mapping[int, RankFile], AbstractContextManager["RankFiles"]):
    """The readable files of so many ranks, or of these; ``errors`` has those that are not."""

    def __init__(self, directory: Path, ranks: int | Iterable[int]) -> None:
        self._directory = directory
        numbers = range(ranks) if isinstance(ranks, int) else ranks
        self.paths = {rank: directory / f"rank{rank}.safetensors" for rank in numbers}
        self.errors: dict[int, SourceError] = {}
        self._files: dict[int, RankFile] = {}
        for rank, path in self.paths.items():
            try:
                self._files[rank] = RankFile(path)
            except SourceError as error:
                self.errors[rank] = error

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getitem__(self, rank: int) -> RankFile:
        return self._files[rank]

    def __iter__(self) -> Iterator[int]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def close(self) -> None:
        """Close all files; mapped tensors stay valid."""
        for file in self._files.values():
            file.close()

    def surplus(self) -> list[tuple[str, str]]:
        """Return names of rank files beside all of a checkpoint's, and what is wrong with them."""
        found = set(self._directory.glob("rank*.safetensors")) - set(self.paths.values())
        return [(x.name, f"config.json has only {len(self.paths)} rank(s)") for x in sorted(found)]

    def kind(self, rank: int, name: str) -> Kind | None:
        """Return dtype code and shape of a tensor, or None if there is no such tensor."""
        file = self._files.get(rank)
        entry = file.header.entries.get(name) if file else None
        return (entry.dtype, entry.shape) if entry else None

    def kinds(self) -> list[dict[str, Kind]]:
        """Return each rank's dtype codes and shapes by name; {} for a file that is not readable."""
        return [self[rank].kinds() if rank in self else {} for rank in self.paths]
