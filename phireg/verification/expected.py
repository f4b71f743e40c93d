"""What a planned output must hold, assembled from the source; and what a rank file holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from phireg.conversion.cast import Bits, cast
from phireg.dtypes import BITS
from phireg.errors import SourceError
from phireg.files.regular import open_regular, read_into
from phireg.files.safetensors import Header, read_header
from phireg.planning.model import Output, Plan, row_bytes
from phireg.source.source import Reader


def kept_columns(block: Bits, output: Output) -> Bits:
    """The columns of whole source rows that an output keeps."""
    if output.columns is None:
        return block
    return np.concatenate([block[:, span.start : span.stop] for span in output.columns], axis=1)


def expected_tensor(plan: Plan, output: Output, reader: Reader) -> Bits:
    """The whole output as the plan makes it, [rows, columns] (one column for a vector)."""
    made = np.zeros(output.matrix, BITS[output.dtype])
    position = 0
    for span in output.rows:
        if span.source is not None:
            source = plan.source.tensors[span.source]
            per_row = row_bytes(source)
            raw = np.empty(span.count * per_row, np.uint8)
            reader.read_into(source, span.start * per_row, raw.data)
            block: Bits = raw.view(BITS[source.dtype]).reshape(span.count, -1)
            if source.dtype != output.dtype:
                block = cast(block, source.dtype, output.dtype)[0]
            made[position : position + span.count] = kept_columns(block, output)
        position += span.count
    return made


class RankFiles:
    """The rank files of a checkpoint, open for reading; a context manager.

    Args:
        directory: the checkpoint.
        ranks: how many files it should have; one that cannot be read counts as empty.
    """

    def __init__(self, directory: Path, ranks: int) -> None:
        self.paths = [directory / f"rank{rank}.safetensors" for rank in range(ranks)]
        self.headers: list[Header | None] = []
        self._descriptors: list[int | None] = []
        for path in self.paths:
            try:
                self.headers.append(read_header(path))
                self._descriptors.append(open_regular(path))
            except SourceError:
                self.headers.append(None)
                self._descriptors.append(None)

    def __enter__(self) -> RankFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors:
            if descriptor is not None:
                os.close(descriptor)

    def kind(self, rank: int, name: str) -> tuple[str, tuple[int, ...]] | None:
        """Dtype code and shape of a tensor, or None if the file has no such tensor."""
        header = self.headers[rank]
        entry = header.entries.get(name) if header else None
        return (entry.dtype, entry.shape) if entry else None

    def read(self, rank: int, name: str, start: int, count: int) -> Bits:
        """``count`` elements of a tensor from element ``start`` on, as bits.

        Raises:
            SourceError: the file could not be read.
        """
        header, descriptor = self.headers[rank], self._descriptors[rank]
        assert header is not None and descriptor is not None
        entry = header.entries[name]
        bits = np.empty(count, BITS[entry.dtype])
        offset = entry.start + start * bits.itemsize
        read_into(descriptor, self.paths[rank], offset, bits.view(np.uint8).data)
        return bits

    def tensor(self, output: Output) -> Bits:
        """A whole tensor, [rows, columns] (one column for a vector)."""
        size = int(np.prod(output.shape))
        return self.read(output.rank, output.name, 0, size).reshape(output.matrix)


def tensors_of(files: RankFiles) -> list[Mapping[str, tuple[str, tuple[int, ...]]]]:
    """Dtype and shape by name, for each rank."""
    return [
        {name: (entry.dtype, entry.shape) for name, entry in header.entries.items()}
        if header
        else {}
        for header in files.headers
    ]
