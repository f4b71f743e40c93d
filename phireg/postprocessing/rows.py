"""Telling the order of rows by comparing a sample of them with the source's.

Quantized rows are brought back to numbers and held against the source's smoothed as they were, so
the distance of a row to its own source row is the rounding error and to any other row is large.
Each row votes for the orders whose source row it fits; a row that fits several says nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from phireg.dtypes import BITS, WEIGHT_DTYPES, float32_values
from phireg.errors import CheckError, SourceError
from phireg.files.safetensors import TensorEntry
from phireg.planning.model import Plan
from phireg.postprocessing.evidence import Evidence
from phireg.postprocessing.orders import MENDABLE, RIGHT, TEXTS, Orders
from phireg.postprocessing.ranks import Ranks
from phireg.source.source import Reader, SourceTensor

Floats = npt.NDArray[np.float64]

_SAMPLE = {"weight": 48, "bias": 256}
"""Rows looked at in each rank file, spread evenly over those that tell orders apart."""

_FITS = {"weight": 0.25, "bias": 2**-6}
"""Largest distance of a row to its own source row, relative to its length: more than rounding to
e4m3 or int8 (a bias: to 16 bits) makes, less than there is to another row."""

_SHARE = 0.9
"""Share of the rows that say something which must agree."""

_FEWEST = 4
"""Rows that must agree at least."""

_COARSE = {"F8_E4M3": 0.125, "I8": 24.0}
"""A quantized row whose largest element is below this is mostly rounding error."""


@dataclass(frozen=True, slots=True)
class RowsFound:
    """What the rows say.

    Attributes:
        order: its name; None if the sample does not tell one from the other.
        evidence: the same for people.
    """

    order: str | None
    evidence: Evidence


def compare_rows(
    ranks: Ranks, every: Iterable[Orders], plan: Plan, algorithm: str | None
) -> RowsFound:
    """Which order the rows of all linears are in.

    Args:
        ranks: the checkpoint.
        every: the possible orders of each linear.
        plan: of the source at TP 1; its outputs say which source row each row comes from.
        algorithm: the checkpoint's ``quant_algo``.

    Raises:
        CheckError: linears are in different orders, or rows are not the source's in any order.
        SourceError: a file could not be read.
    """
    found: dict[str, list[str]] = {}
    looked = 0
    with plan.source.open() as reader:
        for orders in every:
            for companion in _SAMPLE:
                votes = _votes(ranks, orders, companion, plan, reader, algorithm)
                looked += votes.total()
                verdict = _verdict(votes)
                if verdict is not None:
                    found.setdefault(verdict, []).append(f"{orders.target}.{companion}")
    if _NONE in found:
        raise CheckError(
            f"the rows of {found[_NONE][0]} are not those of {plan.source.directory} in any order",
            hint="give the model that this checkpoint was made from.",
        )
    if len(found) > 1:
        raise CheckError(
            "the rows are not all in the same order: "
            + "; ".join(f"{len(n)} tensors ({n[0]}) in {TEXTS[o]}" for o, n in found.items()),
            hint="no post-processing mends this: convert or quantize again.",
        )
    if not found or looked < _FEWEST:
        text = "the rows that were compared are alike in every order"
        return RowsFound(None, Evidence("rows", None, text))
    (order,) = found
    text = f"{looked:,} rows compared with {plan.source.directory}: they are in {TEXTS[order]}"
    if order not in (RIGHT, *MENDABLE):
        raise CheckError(
            text, hint="the step was done twice, or without need; convert or quantize again."
        )
    return RowsFound(order, Evidence("rows", order == RIGHT, text))


_NONE = "none"


def _verdict(votes: Counter[str]) -> str | None:
    """The order that enough rows agree on; None if they say nothing."""
    said = votes.total()
    if not said:
        return None
    order, count = votes.most_common(1)[0]
    return order if count >= _SHARE * said else _NONE


def _votes(
    ranks: Ranks,
    orders: Orders,
    companion: str,
    plan: Plan,
    reader: Reader,
    algorithm: str | None,
) -> Counter[str]:
    name = f"{orders.target}.{companion}"
    output = next((output for output in plan.outputs if output.name == name), None)
    votes: Counter[str] = Counter()
    if output is None:
        return votes
    # Row i of the right order over one rank is row numbers[i] of the source's order.
    origin: dict[int, tuple[SourceTensor, int]] = {}
    numbers = orders.whole
    position = 0
    for span in output.origin.spans:
        if span.source is None or position + span.count > len(numbers):
            return votes
        for offset in range(span.count):
            tensor = plan.source.tensors[span.source]
            origin[int(numbers[position + offset])] = (tensor, span.start + offset)
        position += span.count
    for rank in range(len(ranks)):
        entry = ranks.companions(rank, orders.target).get(companion)
        if entry is None:
            continue
        told = [order[rank] for order in orders.by_name.values()]
        telling = np.flatnonzero(np.any([other != told[0] for other in told[1:]], axis=0))
        step = max(1, len(telling) // _SAMPLE[companion])
        scales = _Scales(ranks, rank, orders.target, algorithm)
        for row in telling[::step].tolist():
            found = scales.row(companion, entry, row)
            if found is None:
                continue
            fitting = []
            for order, by_rank in orders.by_name.items():
                source = scales.smoothed(
                    companion, _source_row(reader, *origin[int(by_rank[rank][row])])
                )
                if _distance(found, source) <= _FITS[companion]:
                    fitting.append(order)
            if len(fitting) < 2:
                votes[fitting[0] if fitting else _NONE] += 1
    return votes


def _distance(found: Floats, source: Floats) -> float:
    length = float(np.linalg.norm(source))
    return float(np.linalg.norm(found - source)) / length if length else np.inf


class _Scales:
    """What turns one rank's stored rows of a linear back into numbers."""

    def __init__(self, ranks: Ranks, rank: int, target: str, algorithm: str | None) -> None:
        self.ranks, self.rank = ranks, rank
        self.algorithm = algorithm
        found = ranks.companions(rank, target)
        self.weight = self._vector(found.get("weights_scaling_factor"))
        self.prequant = self._vector(found.get("prequant_scaling_factor"))

    def _vector(self, entry: TensorEntry | None) -> Floats | None:
        if entry is None:
            return None
        return numbers_of(self.ranks.read(self.rank, entry.start, entry.nbytes), entry.dtype)

    def row(self, companion: str, entry: TensorEntry, row: int) -> Floats | None:
        """A stored row as numbers; None if it holds too little to be compared."""
        size = entry.nbytes // entry.shape[0]
        raw = self.ranks.read(self.rank, entry.start + row * size, size)
        fp8_as_bytes = entry.dtype == "I8" and self.algorithm == "FP8"
        dtype = "F8_E4M3" if fp8_as_bytes else entry.dtype
        made = numbers_of(raw, dtype)
        largest = float(np.abs(made).max(initial=0))
        if not 0 < largest < np.inf or largest < _COARSE.get(dtype, 0):
            return None
        if companion == "weight" and self.weight is not None:
            made = made * self.weight[row if len(self.weight) > 1 else 0]
        return made

    def smoothed(self, companion: str, source: Floats) -> Floats:
        """A source row as it was before it was rounded."""
        if companion != "weight" or self.prequant is None:
            return source
        with np.errstate(divide="ignore", invalid="ignore"):
            return source / self.prequant


def _source_row(reader: Reader, tensor: SourceTensor, row: int) -> Floats:
    size = tensor.nbytes // tensor.shape[0]
    raw = bytearray(size)
    reader.read_into(tensor, row * size, memoryview(raw))
    return numbers_of(raw, tensor.dtype)


def numbers_of(raw: bytearray, dtype: str) -> Floats:
    """Return stored elements as numbers.

    Raises:
        SourceError: the dtype is none that weights or scales have.
    """
    if dtype not in ("F8_E4M3", "I8", *WEIGHT_DTYPES.values()):
        raise SourceError(f"a tensor of dtype {dtype} cannot be compared with a model's weights")
    return float32_values(np.frombuffer(raw, BITS[dtype]), dtype).astype(np.float64)
