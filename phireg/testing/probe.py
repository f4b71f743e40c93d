"""Probe checkpoints: every element is its own address, so a moved row tells its origin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from phireg.checkpoint.rankfiles import RankFile
from phireg.errors import SourceError

Addresses = npt.NDArray[np.uint32]
"""Addresses of source elements, in the shape of a tensor; 0 is padding."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The source element at an address.

    Attributes:
        tensor: source tensor; empty for padding.
        row: its row (its element, for a tensor with one axis).
        column: its column; 0 for a tensor with one axis.
    """

    tensor: str
    row: int
    column: int

    def __str__(self) -> str:
        return f"row {self.row} of {self.tensor}" if self.tensor else "the padding"


class AddressBook:
    """Addresses of the elements of all source tensors, from 1 on.

    Args:
        shapes: shapes by tensor name; one or two axes.

    Attributes:
        shapes: the same.
        end: one more than the last address.

    Raises:
        SourceError: there are more elements than 32 bits can number.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = dict(shapes)
        sizes = [int(np.prod(shape)) for shape in self.shapes.values()]
        self._starts = np.cumsum([1, *sizes])
        self._first = dict(zip(self.shapes, self._starts.tolist(), strict=False))
        self.end = int(self._starts[-1])
        if self.end > 2**32:
            raise SourceError("the model is too large to probe: it has 2^32 elements or more")

    def tensor(self, name: str) -> Addresses:
        """Return the addresses of a tensor, in its shape."""
        shape, first = self.shapes[name], self._first[name]
        return np.arange(first, first + np.prod(shape), dtype=np.uint32).reshape(shape)

    def origin(self, address: int) -> Origin:
        """Return the element at an address."""
        if not address:
            return Origin("", 0, 0)
        name = list(self.shapes)[int(np.searchsorted(self._starts, address, side="right")) - 1]
        width = self.shapes[name][1] if len(self.shapes[name]) > 1 else 1
        row, column = divmod(int(address) - self._first[name], width)
        return Origin(name, row, column)

    def write(self, directory: Path) -> None:
        """Write ``model.safetensors``: float32 tensors whose bits are the addresses."""
        from safetensors.numpy import save_file

        tensors = {name: self.tensor(name).view(np.float32) for name in self.shapes}
        save_file(tensors, directory / "model.safetensors")

    def difference(self, name: str, actual: Addresses, expected: Addresses) -> str | None:
        """Describe the first wrong row (or column) of a tensor; None if all are right."""
        actual, expected = rows_of(actual), rows_of(expected)
        if actual.shape != expected.shape:
            return f"{name} is {list(actual.shape)}, expected {list(expected.shape)}"
        wrong = actual != expected
        if not wrong.any():
            return None
        row = int(wrong.any(axis=1).argmax())
        column = int(wrong[row].argmax())
        origin, right = (self.origin(int(array[row, column])) for array in (actual, expected))
        if origin.tensor and (origin.tensor, origin.row) == (right.tensor, right.row):
            columns = int(wrong.any(axis=0).sum())
            return (
                f"column {column} of {name} came from column {origin.column} of {origin.tensor}, "
                f"expected column {right.column} ({columns} of {actual.shape[1]} columns are wrong)"
            )
        short = f"row {right.row}" if origin.tensor == right.tensor else str(right)
        rows = int(wrong.any(axis=1).sum())
        return (
            f"row {row} of {name} came from {origin}, expected {short} "
            f"({rows} of {len(actual)} rows are wrong)"
        )


def rows_of(array: Addresses) -> Addresses:
    """View a tensor as rows: stacked linears follow each other, a vector has rows of one."""
    return array.reshape(-1, array.shape[-1] if array.ndim > 1 else 1)


def read_addresses(path: Path) -> dict[str, Addresses]:
    """Read the addresses in a rank file of a converted probe checkpoint."""
    with RankFile(path) as file:
        return {
            name: file.read(name).view(np.uint32).reshape(entry.shape)
            for name, entry in file.header.entries.items()
        }
