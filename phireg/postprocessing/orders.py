"""The orders in which the rank files of a checkpoint may hold the rows of a linear.

A row has the number it has in the source's order, so an order is, for each rank, an array of such
numbers. A family's rules (``QuantRules.postprocess``) give the right order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from phireg.checkpoint.rankfiles import RankFile, RankFiles
from phireg.errors import CheckError
from phireg.layout.rules import Policy, Rule
from phireg.layout.spans import Axis, LayoutError, Part, Span, coalesce, shard, take
from phireg.planning.quantized import axes_of
from phireg.reader.config import Config
from phireg.reader.schemes import SCHEMES

if TYPE_CHECKING:
    from phireg.family import Family

Numbers = npt.NDArray[np.int64]
Ranked = tuple[Numbers, ...]
"""For each rank, the numbers of the rows it holds, in order."""

RIGHT, BLOCK, PARTS, TWICE = "right", "block", "parts", "twice"

TEXTS: Mapping[str, str] = {
    RIGHT: "the order that TensorRT-LLM's reader wants",
    BLOCK: "the source's order",
    PARTS: "the source's order, cut over the ranks as if it were the right one",
    TWICE: "an order that comes of putting the right one right again",
}
"""The orders for people. At TP 1 the second and the third are the same, :data:`BLOCK`."""

REPAIRABLE = (BLOCK, PARTS)

SIZES = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_size",
)  # fmt: skip
"""Keys of config.json that decide the order of rows."""

_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class LinearOrders:
    """The orders that one linear's rows may be in."""

    linear: str  # module path
    whole: Numbers  # the right order of the whole linear
    columns: int  # input features
    by_name: Mapping[str, Ranked]  # those that are possible for this number of ranks and differ


def orders_of(rule: Rule, ranks: int) -> LinearOrders:
    """Find the orders of a rule's target over ``ranks`` files; LayoutError without a right one."""
    axis = rule.weight[0]
    if rule.policy is not Policy.COLUMN or [name for name, _ in axis.sources] != [rule.target]:
        raise LayoutError(f"{rule.target}: the rule must order this linear's own rows, by column")
    rows = axis.sources[0][1]
    if sorted(_numbers(axis.spans)) != list(range(rows)) or rule.cols is None:
        raise LayoutError(f"{rule.target}: the rule must use each of its {rows} rows once")
    plain = (Span(rule.target, 0, rows),)
    twice = tuple(piece for s in axis.spans for piece in take(axis.spans, s.start, s.stop))
    by_name = {RIGHT: _ranked(axis, ranks)}
    for name, candidate in (
        (BLOCK, Axis((Part("rows", plain),), axis.sources)),
        (PARTS, _cut_like(axis, plain)),
        (TWICE, _cut_like(axis, twice)),
    ):
        with suppress(LayoutError):
            order = _ranked(candidate, ranks)
            # With repeated KV heads the right order has more rows than others.
            fits = list(map(len, order)) == list(map(len, by_name[RIGHT]))
            if fits and not any(
                all(map(np.array_equal, order, other)) for other in by_name.values()
            ):
                by_name[name] = order
    return LinearOrders(rule.target, _numbers(axis.spans), rule.cols.length, by_name)


def moves(held: Ranked, right: Ranked) -> list[tuple[Span, ...]]:
    """Return the rows each rank is to hold as spans of ``rank{r}``, its own where possible."""
    by_rank = []
    for rank, numbers in enumerate(right):
        places: dict[int, Span] = {}
        for other in sorted(range(len(held)), key=lambda number: number != rank):
            for row, number in enumerate(held[other].tolist()):
                places.setdefault(number, Span(f"rank{other}", row, 1))
        by_rank.append(coalesce(places[number] for number in numbers.tolist()))
    return by_rank


def _ranked(axis: Axis, ranks: int) -> Ranked:
    return tuple(_numbers(shard(axis, ranks, rank).spans) for rank in range(ranks))


def _cut_like(axis: Axis, spans: tuple[Span, ...]) -> Axis:
    """Other rows, in parts as long as those of ``axis``."""
    parts, start = [], 0
    for part in axis.parts:
        parts.append(replace(part, spans=take(spans, start, start + part.length)))
        start += part.length
    return Axis(tuple(parts), axis.sources)


def _numbers(spans: Iterable[Span]) -> Numbers:
    arrays = [np.arange(span.start, span.stop, dtype=np.int64) for span in spans]
    return np.concatenate(arrays) if arrays else np.empty(0, np.int64)


def quantization_of(config: Mapping[str, Any]) -> str | None:
    """Return the quantization algorithm; refuse one whose tensors have other axes (AWQ)."""
    block = config.get("quantization")
    algorithm = block.get("quant_algo") if isinstance(block, Mapping) else None
    known = [None, *(s.quant_algo for s in SCHEMES.values() if not s.grouped)]
    if algorithm not in known:
        raise CheckError(
            f"the checkpoint is quantized as {algorithm!r}, whose rows phireg does not reorder",
            hint=f"it does for {', '.join(str(name) for name in known if name)}.",
        )
    return None if algorithm is None else str(algorithm)


def linears_of(
    family: Family, config: Mapping[str, Any], files: RankFiles
) -> tuple[LinearOrders, ...]:
    """Find the linears that an exporter may have left in the source's order."""
    algorithm = quantization_of(config)
    sizes = _sizes(config, files[0])
    try:
        rules = family.quant_rules({**config, **sizes}, algorithm or "").postprocess
        linears = [orders_of(rule, len(files)) for rule in rules.values()]
    except LayoutError as problem:
        raise CheckError(
            f"config.json's sizes do not fit {len(files)} rank(s): {problem}",
            hint="quantize again, with phireg quantize or with TP 1.",
        ) from None
    linears = [orders for orders in linears if set(REPAIRABLE) & set(orders.by_name)]
    for orders in linears:
        for rank in files:
            list(row_tensors(files, orders, rank))
    return tuple(linears)


def _sizes(config: Mapping[str, Any], file: RankFile) -> dict[str, int]:
    """Read config.json's sizes; early exporters write ``num_kv_heads`` and no ``head_size``."""
    path = file.path.with_name("config.json")
    keys = Config(config, str(path))
    sizes = {key: keys.integer(key) for key in SIZES[:3]}
    sizes["num_key_value_heads"] = keys.integer("num_key_value_heads", "num_kv_heads")
    whole = sizes["hidden_size"] // sizes["num_attention_heads"]
    sizes["head_size"] = keys.integer("head_size", default=whole)
    layers = {match[1] for name in file.header.entries if (match := _LAYER.search(name))}
    if len(layers) != sizes["num_hidden_layers"]:
        raise CheckError(
            f"{path} says {sizes['num_hidden_layers']} layers, {file.path.name} has {len(layers)}"
        )
    return sizes


def row_tensors(files: RankFiles, orders: LinearOrders, rank: int) -> Iterator[str]:
    """Check a rank's tensors of a linear; give those with a row (or entry) per output feature."""
    rows = len(orders.by_name[RIGHT][rank])
    sizes = {"rows": rows, "cols": orders.columns}
    tensors = files[rank].module(orders.linear)
    where = f"{files[rank].path.name}: {orders.linear}"
    if "weight" not in tensors:
        raise CheckError(f"{where}.weight is missing")
    for companion, entry in tensors.items():
        try:
            axes = axes_of(companion, entry.shape, rows)
        except LayoutError:
            raise CheckError(
                f"{where}.{companion} is not a tensor phireg knows, so nothing says whether it "
                "has a row per output feature"
            ) from None
        shape = tuple(sizes[axis] for axis in axes)
        if entry.shape != shape and (axes or entry.shape != (1,)):
            raise CheckError(
                f"{where}.{companion} is {list(entry.shape)}, and config.json calls for "
                f"{list(shape) or [1]}",
                hint="with more than one rank: the exporter may have cut through the groups of a "
                "KV head; quantize again with phireg quantize or with TP 1."
                if len(files) > 1
                else "does config.json belong to this checkpoint?",
            )
        if "rows" in axes:
            yield companion


def check_scales(files: RankFiles, orders: LinearOrders, moved: Sequence[str]) -> None:
    """Refuse to move rows from rank to rank if scales that stay differ: they are on two grids."""
    for companion, entry in files[0].module(orders.linear).items():
        name = f"{orders.linear}.{companion}"
        for rank in range(1, len(files)):
            other = files[rank].header.entries.get(name)
            same = other is not None and other.dtype == entry.dtype
            if same and companion not in moved:
                same = np.array_equal(files[rank].read(name), files[0].read(name))
            if not same:
                raise CheckError(
                    f"{name} differs between the ranks, and rows would have to go from one to "
                    "another",
                    hint="quantize again, with phireg quantize or with TP 1.",
                )
