"""Probe checkpoints: every element is its own address, so a moved row says where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from phireg.checkpoint.rankfiles import RankFile
from phireg.errors import SourceError
from phireg.files.safetensors import encode_header

Addresses = npt.NDArray[np.uint32]
"""Addresses of source elements, in the shape of a tensor; 0 is a zero that was filled in."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an address points.

    Attributes:
        tensor: source tensor; empty for zeros that were filled in.
        row: its row (its element, for a tensor with one axis).
        column: its column; 0 for a tensor with one axis.
    """

    tensor: str
    row: int
    column: int

    def __str__(self) -> str:
        return f"row {self.row} of {self.tensor}" if self.tensor else "the padding"


class AddressBook:
    """Numbers the elements of all source tensors, from 1 on.

    Args:
        shapes: shapes by tensor name; one or two axes.

    Attributes:
        shapes: the same.
        end: the number after the last address.

    Raises:
        SourceError: there are more elements than 32 bits can number.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = dict(shapes)
        self._first: dict[str, int] = {}
        end = 1
        for name, shape in self.shapes.items():
            self._first[name] = end
            end += int(np.prod(shape))
        if end > 2**32:
            raise SourceError("the model is too large to probe: it has 2^32 elements or more")
        self.end = end
        self._names = list(self._first)
        self._starts = np.fromiter(self._first.values(), np.int64, len(self._first))

    def tensor(self, name: str) -> Addresses:
        """The addresses of a tensor, in its shape."""
        shape = self.shapes[name]
        first = self._first[name]
        return np.arange(first, first + int(np.prod(shape)), dtype=np.uint32).reshape(shape)

    def origin(self, address: int) -> Origin:
        """What an address points at."""
        if not address:
            return Origin("", 0, 0)
        number = int(np.searchsorted(self._starts, address, side="right")) - 1
        name = self._names[number]
        width = self.shapes[name][1] if len(self.shapes[name]) > 1 else 1
        row, column = divmod(int(address) - int(self._starts[number]), width)
        return Origin(name, row, column)

    def write(self, directory: Path) -> None:
        """Write ``model.safetensors`` whose float32 elements are their addresses as raw bits."""
        header, entries = encode_header([(n, "F32", s) for n, s in self.shapes.items()])
        with (directory / "model.safetensors").open("wb") as out:
            out.write(header)
            for name in entries:
                out.write(self.tensor(name).tobytes())

    def difference(self, name: str, got: Addresses, expected: Addresses) -> str | None:
        """How a tensor differs from what was expected, by its first wrong row; None if it does not.

        Args:
            name: what to call the tensor.
            got: its addresses.
            expected: those it should have.
        """
        got, expected = (rows_of(array) for array in (got, expected))
        if got.shape != expected.shape:
            return f"{name} is {list(got.shape)}, expected {list(expected.shape)}"
        wrong = got != expected
        if not wrong.any():
            return None
        row = int(wrong.any(axis=1).argmax())
        column = int(wrong[row].argmax())
        found, wanted = (self.origin(int(array[row, column])) for array in (got, expected))
        if found.tensor and (found.tensor, found.row) == (wanted.tensor, wanted.row):
            columns = int(wrong.any(axis=0).sum())
            return (
                f"column {column} of {name} came from column {found.column} of {found.tensor}, "
                f"expected column {wanted.column} ({columns} of {got.shape[1]} columns are wrong)"
            )
        short = f"row {wanted.row}" if found.tensor == wanted.tensor else str(wanted)
        rows = int(wrong.any(axis=1).sum())
        return (
            f"row {row} of {name} came from {found}, expected {short} "
            f"({rows} of {len(got)} rows are wrong)"
        )


def rows_of(array: Addresses) -> Addresses:
    """A tensor as rows: stacked linears follow each other, a vector has rows of one element."""
    return array.reshape(-1, array.shape[-1] if array.ndim > 1 else 1)


def read_addresses(path: Path) -> dict[str, Addresses]:
    """The tensors of a rank file of a converted probe checkpoint, as addresses."""
    with RankFile(path) as file:
        return {
            name: file.read(name).view(np.uint32).reshape(entry.shape)
            for name, entry in file.header.entries.items()
        }
