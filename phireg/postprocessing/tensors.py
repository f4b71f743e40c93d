"""Which tensors of a checkpoint hold the rows in question, found by name and axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from phireg.errors import CheckError
from phireg.files.safetensors import TensorEntry
from phireg.layout.spans import LayoutError
from phireg.planning.companions import axes_of
from phireg.postprocessing.orders import RIGHT, Orders
from phireg.postprocessing.ranks import Ranks
from phireg.reader.schema import KNOWN


def algorithm_of(config: Mapping[str, Any]) -> str | None:
    """The quantization algorithm.

    Raises:
        CheckError: one whose tensors have other axes (AWQ packs rows together).
    """
    block = config.get("quantization")
    algorithm = block.get("quant_algo") if isinstance(block, Mapping) else None
    if algorithm not in KNOWN:
        raise CheckError(
            f"the checkpoint is quantized as {algorithm!r}, whose tensors phireg does not know",
            hint=f"known: {', '.join(str(name) for name in KNOWN if name)}.",
        )
    return None if algorithm is None else str(algorithm)


def row_tensors(ranks: Ranks, orders: Orders) -> list[tuple[str, ...]]:
    """For each rank, the companions of a linear that have a row (or entry) per output feature.

    Raises:
        CheckError: a tensor is missing, or its name and shape do not say which axes it has.
    """
    return [tuple(_companions(ranks, orders, rank)) for rank in range(len(ranks))]


def _companions(ranks: Ranks, orders: Orders, rank: int) -> Iterator[str]:
    rows = len(orders.by_name[RIGHT][rank])
    sizes = {"rows": rows, "cols": orders.columns}
    found = ranks.companions(rank, orders.target)
    where = f"{ranks.paths[rank].name}: {orders.target}"
    if "weight" not in found:
        raise CheckError(f"{where}.weight is missing")
    for companion, entry in found.items():
        try:
            axes = axes_of(companion, entry.shape, rows)
        except LayoutError:
            raise CheckError(
                f"{where}.{companion} is not a tensor phireg knows, so nothing says whether it "
                "has a row per output feature"
            ) from None
        if entry.shape not in (tuple(sizes[axis] for axis in axes), *_scalars(axes)):
            raise CheckError(
                f"{where}.{companion} is {list(entry.shape)}, and config.json calls for "
                f"{[sizes[axis] for axis in axes] or [1]}",
                hint="with more than one rank: the exporter may have cut through the groups of a "
                "KV head; quantize again with phireg quantize or with TP 1."
                if len(ranks) > 1
                else "does config.json belong to this checkpoint?",
            )
        if "rows" in axes:
            yield companion


def _scalars(axes: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    return () if axes else ((), (1,))


def check_alike(ranks: Ranks, orders: Orders, moved: tuple[str, ...]) -> None:
    """Before rows go from rank to rank: what is not moved must mean the same on all of them.

    Raises:
        CheckError: a scale differs from rank to rank, so the rows are not on one grid.
    """
    for companion, entry in ranks.companions(0, orders.target).items():
        for rank in range(1, len(ranks)):
            other = ranks.companions(rank, orders.target).get(companion)
            if (
                other is None
                or other.dtype != entry.dtype
                or (
                    companion not in moved and _bytes(ranks, rank, other) != _bytes(ranks, 0, entry)
                )
            ):
                raise CheckError(
                    f"{orders.target}.{companion} differs between the ranks, and rows would have "
                    "to go from one to another",
                    hint="quantize again, with phireg quantize or with TP 1.",
                )


def _bytes(ranks: Ranks, rank: int, entry: TensorEntry) -> bytearray:
    return ranks.read(rank, entry.start, entry.nbytes)
