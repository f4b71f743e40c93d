"""The tensors of the source model, read out of a checkpoint's rank files.

The forward plan says which source rows and columns every tensor of every rank holds. Read
backwards, it says where each row of a source tensor lies; what several ranks hold must be equal.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from phireg.checkpoint.rankfiles import Bits, RankFiles
from phireg.dtypes import BITS, ITEMSIZE
from phireg.errors import SourceError
from phireg.layout.rules import Rules, published_shapes
from phireg.layout.spans import Span
from phireg.planning.model import Output, Plan, Scale
from phireg.source.model import Reader, Source
from phireg.source.tensors import SourceTensor


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows and columns of a source tensor, as they are stored, that lie in a tensor of a rank."""

    row: int
    count: int
    column: int
    width: int
    output: Output
    output_row: int
    output_column: int

    def has(self, row: int) -> bool:
        """Return whether a row is among these."""
        return self.row <= row < self.row + self.count

    def row_only(self, row: int) -> Piece:
        """Return the piece of one of these rows, as the only one of a tensor."""
        return replace(self, row=0, count=1, output_row=self.output_row + row - self.row)


def stated_source(directory: Path, rules: Rules, code: str) -> Source:
    """Return a source without data: the published layout's tensors, as the config sizes them."""
    shapes = published_shapes(rules)
    tensors = {name: SourceTensor(name, code, shape, "", 0) for name, shape in shapes.items()}
    return Source(directory, tensors, ())


def invert(plan: Plan) -> dict[str, list[Piece]]:
    """Return the pieces of every source tensor, and of every scale, by its name."""
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for output in plan.outputs:
        row = 0
        length = output.matrix[1]
        height, width = output.packing
        if isinstance(output.origin, Scale):
            height = output.origin.groups
        columns = output.origin.columns or (Span("", 0, length * width),)
        for span in output.origin.spans:
            start, count = span.start // height, span.count // height
            if span.source is not None:
                at = 0
                for kept in columns:
                    first, many = kept.start // width, kept.count // width
                    pieces[span.source].append(Piece(start, count, first, many, output, row, at))
                    at += many
            row += count
    return dict(pieces)


class RankReader(Reader):
    """Reads source tensors out of rank files, and compares what several ranks hold."""

    def __init__(self, files: RankFiles, pieces: Mapping[str, Sequence[Piece]]) -> None:
        self._files = files
        self._pieces = pieces

    def close(self) -> None:
        """Leave the rank files open: they are another's."""

    def read_into(self, tensor: SourceTensor, start: int, view: memoryview) -> None:
        """Fill a view with bytes ``[start, start + len(view))`` of a tensor in row-major order."""
        width = math.prod(tensor.shape[1:])
        per_row = width * ITEMSIZE[tensor.dtype]
        first, last = start // per_row, -(-(start + len(view)) // per_row)
        pieces, code = self._pieces[tensor.name], tensor.dtype
        rows = read_rows(self._files, pieces, tensor.name, code, first, last - first, width)
        raw = rows.reshape(-1).view(np.uint8).data
        view[:] = raw[start - first * per_row :][: len(view)]


@dataclass(frozen=True, slots=True)
class RankSource(Source):
    """A source model whose tensors are read out of rank files."""

    rank_files: RankFiles | None = None
    pieces: Mapping[str, Sequence[Piece]] = field(default_factory=dict)

    def open(self) -> Reader:
        """Return a reader for the tensors' bytes."""
        assert self.rank_files is not None
        return RankReader(self.rank_files, self.pieces)

    def digest(self) -> None:
        """Return None: values of rank files may be cast."""


def read_rows(
    files: RankFiles,
    pieces: Sequence[Piece],
    name: str,
    code: str,
    first: int,
    count: int,
    width: int,
) -> Bits:
    """Return rows of a tensor, or elements of a scale, as bits; SourceError where ranks differ."""
    block: Bits = np.empty((count, width), BITS[code])
    known = np.zeros((count, width), bool)
    for piece in pieces:
        start, stop = max(first, piece.row), min(first + count, piece.row + piece.count)
        if start >= stop:
            continue
        output = piece.output
        length = output.matrix[1]
        at = piece.output_row + start - piece.row
        bits = files[output.rank].read(output.name, at * length, (stop - start) * length)
        held = bits.reshape(-1, length)[:, piece.output_column : piece.output_column + piece.width]
        where = (
            slice(start - first, stop - first),
            slice(piece.column, piece.column + piece.width),
        )
        if (known[where] & (block[where] != held)).any():
            raise SourceError(
                f"rank{output.rank}.safetensors: {output.name} differs from another tensor of the "
                f"checkpoint with the same part of {name}; nothing was written",
                hint="the checkpoint is damaged: phireg verify says where.",
            )
        block[where], known[where] = held, True
    if not known.all():
        raise AssertionError(f"{name}: the plan has no place for some of its rows")
    return block
