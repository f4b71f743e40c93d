"""Rows or columns that are all there, in the wrong places: which mistake puts them like that.

Tensors are lists of one array per rank, [rows, columns] of bits. Every function yields
``(what it looks like, what may mend it, the tensors that mistake would make)`` or tells how the
found rows lie; whoever asks compares bit for bit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from phireg.conversion.cast import Bits
from phireg.planning.report import ranges

Ranks = Sequence[Bits]
Candidate = tuple[str, str | None, list[Bits]]

REGROUP = "all q come first, then all k, then all v"


@dataclass(frozen=True, slots=True)
class Heads:
    """What decides how attention and MLP rows lie.

    Attributes:
        heads: query heads of the whole model.
        kv_heads: key/value heads of the whole model.
        size: rows of one head.
        activation: ``swiglu``, ``gegelu`` or one without a gate.
    """

    heads: int
    kv_heads: int
    size: int
    activation: str


def qkv_candidates(expected: Ranks, model: Heads) -> Iterator[Candidate]:
    """Mistakes with the parts of a fused qkv."""
    ranks = len(expected)
    query, key, value = qkv_parts(expected, model)
    local = [_split_qkv(e, model, ranks) for e in expected]
    for order in permutations("qkv"):
        if order == ("q", "k", "v"):
            continue
        made = [np.concatenate([rank["qkv".index(p)] for p in order]) for rank in local]
        swapped = [a for a, b in zip("qkv", order, strict=True) if a != b]
        text = (
            f"{swapped[0]} and {swapped[1]} are exchanged"
            if len(swapped) == 2
            else f"the parts lie in the order {', '.join(order)} instead of q, k, v"
        )
        yield text, None, made
    if ranks > 1:
        text = "q, k and v are cut over the ranks as one block, not each for itself"
        yield from _cut(np.concatenate([query, key, value]), ranks, text)
    grouped = _grouped(query, key, value, model)
    forgotten = (
        f"the rows are still grouped by KV head ({model.heads // model.kv_heads} q, 1 k, 1 v for "
        "each): the de-interleaving is missing"
    )
    for text, _, made in _cut(grouped, ranks, forgotten):
        yield text, REGROUP, made
    if ranks > 1 and model.kv_heads % ranks == 0:
        bounds = np.cumsum([len(query), len(key)])
        cuts = [np.split(part, ranks) for part in np.split(grouped, bounds)]
        made = [np.concatenate([cut[rank] for cut in cuts]) for rank in range(ranks)]
        yield f"{forgotten}, and then they were cut as q, k and v", REGROUP, made
    twice = _ungrouped(np.concatenate([query, key, value]), model)
    yield from _cut(twice, ranks, "the rows are de-interleaved twice", "convert again, once.")


def fc_candidates(expected: Ranks, model: Heads) -> Iterator[Candidate]:
    """Mistakes with the two halves of a gated MLP's first linear."""
    ranks = len(expected)
    if model.activation == "swiglu":
        halves = [np.split(e, 2) for e in expected]
        text = "gate and up are exchanged: the reader takes the second half as the gate"
        yield text, "up comes first.", [np.concatenate([b, a]) for a, b in halves]
        up, gate = (np.concatenate([pair[n] for pair in halves]) for n in (0, 1))
        if ranks > 1:
            one = "up and gate are cut over the ranks as one block, not each for itself"
            yield from _cut(np.concatenate([up, gate]), ranks, one)
            yield from _cut(np.concatenate([gate, up]), ranks, f"gate comes first, and {one}")
        alternating = np.stack([up, gate], 1).reshape(-1, up.shape[1])
        yield from _cut(alternating, ranks, "up and gate rows alternate instead of two halves")
    elif model.activation == "gegelu":
        pairs = [e.reshape(-1, 2, e.shape[1]) for e in expected]
        text = "the gelu and the linear row of every pair are exchanged"
        yield text, None, [pair[:, ::-1].reshape(-1, pair.shape[2]) for pair in pairs]
        text = "the rows are de-interleaved into two halves; the reader wants pairs, as the source"
        yield text, None, [np.concatenate([p[:, 0], p[:, 1]]) for p in pairs]
        whole = np.concatenate(pairs)
        yield from _cut(np.concatenate([whole[:, 0], whole[:, 1]]), ranks, text)


def transposed(expected: Ranks) -> Iterator[Candidate]:
    """Square tensors stored [in, out]."""
    if all(e.shape[0] == e.shape[1] > 1 for e in expected):
        yield "it is transposed", "weights are [out, in].", [e.T for e in expected]


def exchanged_ranks(expected: Ranks, found: Ranks) -> str | None:
    """Whether every rank holds what is another rank's."""
    if len(expected) == 1:
        return None
    holds = [next((s for s, e in enumerate(expected) if np.array_equal(e, f)), None) for f in found]
    if None in holds:
        return None
    moved = [f"rank {r} holds rank {s}'s" for r, s in enumerate(holds) if r != s]
    return "ranks are exchanged: " + ", ".join(moved) if moved else None


def moved_units(expected: Bits, found: Bits, unit: int, name: Callable[[int], str]) -> str | None:
    """How whole units of rows have changed places, if every found unit is an expected one.

    Args:
        expected: rows of all ranks together.
        found: the same.
        unit: rows per unit.
        name: what to call the unit of a number.
    """
    if len(expected) % unit or len(expected) == unit:
        return None
    places: dict[bytes, list[int]] = defaultdict(list)
    for number, rows in enumerate(_units(expected, unit)):
        places[rows].append(number)
    came: list[int] = []
    for number, rows in enumerate(_units(found, unit)):
        known = places.get(rows)
        if known is None:
            return None
        came.append(number if number in known else known[0])
    moved = [(to, origin) for to, origin in enumerate(came) if to != origin]
    if not moved:
        return None
    if len(moved) == 2 and moved[0] == moved[1][::-1]:
        return f"{name(moved[0][0])} and {name(moved[0][1])} are exchanged"
    if all(origin == len(came) - 1 - to for to, origin in enumerate(came)):
        return f"{name(0)} to {name(len(came) - 1)} stand in reverse order"
    shown = ", ".join(f"{name(to)} holds {name(origin)}" for to, origin in moved[:3])
    repeated = len(set(came)) < len(came)
    text = (
        f"{len(moved)} of {len(came)} are out of place: {shown}{', ...' if len(moved) > 3 else ''}"
    )
    return f"{text} (some twice, others not at all)" if repeated else text


def misplaced_padding(expected: Bits, found: Bits) -> str | None:
    """Zero rows between or before the rows instead of behind them."""
    blank_wanted, blank_found = (~rows.any(axis=1) for rows in (expected, found))
    wanted, got = expected[~blank_wanted], found[~blank_found]
    if len(expected) != len(found) or not blank_found.any() or not blank_wanted.any():
        return None
    if len(wanted) != len(got) or not np.array_equal(wanted, got):
        return None
    return (
        f"the padding is in the wrong place: zero rows are {_list(np.flatnonzero(blank_found))}, "
        f"they belong at {_list(np.flatnonzero(blank_wanted))}"
    )


def qkv_parts(expected: Ranks, model: Heads) -> tuple[Bits, Bits, Bits]:
    """Q, K and V of the whole model; of KV heads that stand on several ranks, one copy."""
    ranks = len(expected)
    local = [_split_qkv(e, model, ranks) for e in expected]
    owners = local[:: max(1, ranks // model.kv_heads)]
    return (
        np.concatenate([rank[0] for rank in local]),
        np.concatenate([rank[1] for rank in owners]),
        np.concatenate([rank[2] for rank in owners]),
    )


def head_name(model: Heads, ranks: int) -> Callable[[int], str]:
    """The name of a head by its place in the ranks' qkv rows one after the other."""
    own, kv = model.heads // ranks, max(1, model.kv_heads // ranks)

    def name(number: int) -> str:
        rank, place = divmod(number, own + 2 * kv)
        if place < own:
            return f"query head {rank * own + place}"
        part, place = divmod(place - own, kv)
        return f"{('key', 'value')[part]} head {rank * model.kv_heads // ranks + place}"

    return name


def _split_qkv(rows: Bits, model: Heads, ranks: int) -> list[Bits]:
    own = model.heads // ranks * model.size
    kv = max(1, model.kv_heads // ranks) * model.size
    return np.split(rows, [own, own + kv])


def _grouped(query: Bits, key: Bits, value: Bits, model: Heads) -> Bits:
    """[q.., k, v] for each KV head."""
    by_group = [part.reshape(model.kv_heads, -1, part.shape[1]) for part in (query, key, value)]
    return np.concatenate(by_group, axis=1).reshape(-1, query.shape[1])


def _ungrouped(rows: Bits, model: Heads) -> Bits:
    shape = (model.kv_heads, model.heads // model.kv_heads + 2, model.size, rows.shape[1])
    groups = rows.reshape(shape)
    parts = (groups[:, :-2], groups[:, -2], groups[:, -1])
    return np.concatenate([part.reshape(-1, rows.shape[1]) for part in parts])


def _cut(whole: Bits, ranks: int, text: str, hint: str | None = None) -> Iterator[Candidate]:
    if len(whole) % ranks == 0:
        yield text, hint, np.split(whole, ranks)


def _units(rows: Bits, unit: int) -> Iterator[bytes]:
    return (rows[start : start + unit].tobytes() for start in range(0, len(rows), unit))


def _list(numbers: Iterable[int]) -> str:
    return ranges(int(n) for n in numbers)
