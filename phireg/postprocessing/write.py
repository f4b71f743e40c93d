"""Writing the rank files anew: every byte as it was, but rows in another order."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import xxhash

from phireg.files.safetensors import TensorEntry
from phireg.postprocessing.orders import Run
from phireg.postprocessing.ranks import Ranks

_BLOCK = 4 * 1024 * 1024

Moves = Mapping[str, Sequence[Run]]
"""By tensor name, where the rows of one rank's tensor come from; others stay as they are."""

Progress = Callable[[int], None]
"""Told how many more bytes have been written."""


def write_rank(
    ranks: Ranks, rank: int, moves: Moves, path: Path, progress: Progress
) -> dict[str, str]:
    """Write one rank file: the same header, so every tensor stays in its place.

    Memory is one block of 4 MiB.

    Returns:
        xxh3_128 of each tensor.

    Raises:
        SourceError: a source file changed or could not be read.
        OSError: writing failed.
    """
    header = ranks.headers[rank]
    digests: dict[str, str] = {}
    with path.open("xb", buffering=0) as file:
        first = min((entry.start for entry in header.entries.values()), default=header.file_size)
        _write(file.fileno(), ranks.read(rank, 0, first))
        for name, entry in header.entries.items():
            hashed = xxhash.xxh3_128()
            for source, start, count in _pieces(ranks, rank, name, entry, moves):
                for done in range(0, count, _BLOCK):
                    block = ranks.read(source, start + done, min(_BLOCK, count - done))
                    _write(file.fileno(), block)
                    hashed.update(block)
                    progress(len(block))
            digests[name] = hashed.hexdigest()
    return digests


def header_bytes(ranks: Ranks, rank: int) -> bytes:
    """The header of a rank file with its length."""
    entries = ranks.headers[rank].entries.values()
    return bytes(ranks.read(rank, 0, min(entry.start for entry in entries)))


def _pieces(
    ranks: Ranks, rank: int, name: str, entry: TensorEntry, moves: Moves
) -> list[tuple[int, int, int]]:
    """(rank, first byte, number of bytes) of what a tensor consists of, in order."""
    if name not in moves:
        return [(rank, entry.start, entry.nbytes)]
    row = entry.nbytes // entry.shape[0]
    starts = [header.entries[name].start for header in ranks.headers]
    return [(run.rank, starts[run.rank] + run.row * row, run.count * row) for run in moves[name]]


def _write(descriptor: int, block: bytearray) -> None:
    view = memoryview(block)
    while view:
        view = view[os.write(descriptor, view) :]
