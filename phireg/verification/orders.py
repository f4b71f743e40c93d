"""Recognize tensors whose rows lie in another order or on other ranks, as exporters' mistakes do.

A named mistake is one that makes exactly the tensors of the rank files, from those that the source
gives: rows of a fused linear in another order, halves exchanged, tensors divided over the ranks as
one block, a rank's part in another rank's file, a transposed weight, a scale along the wrong axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt

from phireg.planning.model import Plan

REGROUP = "all q come first, then all k, then all v"
"""The hint for rows that ``phireg postprocess`` puts in order."""

Array = npt.NDArray[Any]
Ranks = Sequence[Array]
"""A tensor of each rank, [rows, columns], as bits or values."""

Close = Callable[[Array, Array], bool]
"""Takes a stored and an expected array of one shape; True if they are the same or close enough."""

Candidate = tuple["Mistake", list[Array]]
"""A mistake, and the tensors that it would make."""


@dataclass(frozen=True, slots=True)
class Mistake:
    """A known mistake: its name, and what may correct it."""

    text: str
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Heads:
    """The order of attention and MLP rows, by sizes of the whole model; ``size`` is of one head."""

    heads: int
    kv_heads: int
    size: int
    activation: str

    @classmethod
    def of(cls, plan: Plan) -> Heads:
        """Return the order of a plan's config.json."""
        keys = ("num_attention_heads", "num_key_value_heads", "head_size", "hidden_act")
        return cls(*(plan.config[key] for key in keys))


def named_mistake(
    module: str, expected: Ranks, stored: Ranks, heads: Heads, close: Close
) -> Mistake | None:
    """Return the mistake that turns ``expected`` into ``stored``, if it is a known one."""
    for mistake, tensors in _candidates(module, expected, heads):
        pairs = list(zip(stored, tensors, strict=True))
        if all(s.shape == t.shape for s, t in pairs) and all(close(s, t) for s, t in pairs):
            return mistake
    return _misplaced_ranks(expected, stored, close)


def _candidates(module: str, expected: Ranks, heads: Heads) -> Iterator[Candidate]:
    if module.endswith("attention.qkv"):
        yield from _qkv_candidates(expected, heads)
    elif module.endswith("mlp.fc"):
        yield from _fc_candidates(expected, heads)
    if all(e.shape[0] == e.shape[1] > 1 for e in expected):
        yield Mistake("it is transposed", "weights are [out, in]."), [e.T for e in expected]


def _qkv_candidates(expected: Ranks, heads: Heads) -> Iterator[Candidate]:
    ranks = len(expected)
    own = heads.heads // ranks * heads.size
    kv = max(1, heads.kv_heads // ranks) * heads.size
    local = [np.split(rows, [own, own + kv]) for rows in expected]
    for order in permutations("qkv"):
        exchanged = [a for a, b in zip("qkv", order, strict=True) if a != b]
        if not exchanged:
            continue
        text = (
            f"{exchanged[0]} and {exchanged[1]} are exchanged"
            if len(exchanged) == 2
            else f"the parts lie in the order {', '.join(order)} instead of q, k, v"
        )
        parts = [[rank["qkv".index(part)] for part in order] for rank in local]
        yield Mistake(text), list(map(np.concatenate, parts))
    owners = local[:: max(1, ranks // heads.kv_heads)]  # KV heads may be repeated
    query = np.concatenate([rank[0] for rank in local])
    key, value = (np.concatenate([rank[part] for rank in owners]) for part in (1, 2))
    if ranks > 1:
        text = "q, k and v are cut over the ranks as one block, not each for itself"
        yield from _cut(Mistake(text), np.concatenate([query, key, value]), ranks)
    groups = [part.reshape(heads.kv_heads, -1, part.shape[1]) for part in (query, key, value)]
    grouped = np.concatenate(groups, axis=1).reshape(-1, query.shape[1])
    text = (
        f"the rows are still grouped by KV head ({heads.heads // heads.kv_heads} q, 1 k, 1 v for "
        "each): the de-interleaving is missing"
    )
    yield from _cut(Mistake(text, REGROUP), grouped, ranks)
    if ranks > 1 and heads.kv_heads % ranks == 0:
        bounds = [len(query), len(query) + len(key)]
        parts = [np.split(part, ranks) for part in np.split(grouped, bounds)]
        tensors = [np.concatenate([part[rank] for part in parts]) for rank in range(ranks)]
        yield Mistake(f"{text}, and then they were cut as q, k and v", REGROUP), tensors


def _fc_candidates(expected: Ranks, heads: Heads) -> Iterator[Candidate]:
    ranks = len(expected)
    if heads.activation == "swiglu":
        halves = [np.split(rows, 2) for rows in expected]
        text = "gate and up are exchanged: the reader takes the second half as the gate"
        exchanged = [np.concatenate([gate, up]) for up, gate in halves]
        yield Mistake(text, "up comes first."), exchanged
        if ranks > 1:
            up, gate = (np.concatenate([pair[n] for pair in halves]) for n in (0, 1))
            text = "up and gate are cut over the ranks as one block, not each for itself"
            yield from _cut(Mistake(text), np.concatenate([up, gate]), ranks)
            yield from _cut(
                Mistake(f"gate comes first, and {text}"), np.concatenate([gate, up]), ranks
            )
    elif heads.activation == "gegelu":
        pairs = [rows.reshape(-1, 2, rows.shape[1]) for rows in expected]
        text = "the gelu and the linear row of every pair are exchanged"
        yield Mistake(text), [pair[:, ::-1].reshape(-1, pair.shape[2]) for pair in pairs]
        text = "the rows are de-interleaved into two halves; the reader wants pairs, as the source"
        yield Mistake(text), [np.concatenate([pair[:, 0], pair[:, 1]]) for pair in pairs]
        whole = np.concatenate(pairs)
        yield from _cut(Mistake(text), np.concatenate([whole[:, 0], whole[:, 1]]), ranks)


def _cut(mistake: Mistake, whole: Array, ranks: int) -> Iterator[Candidate]:
    if len(whole) % ranks == 0:
        yield mistake, np.split(whole, ranks)


def _misplaced_ranks(expected: Ranks, stored: Ranks, close: Close) -> Mistake | None:
    """Recognize parts of other ranks: exchanged, or one in several files."""
    holds = []
    for rank, tensor in enumerate(stored):
        order = [rank, *(other for other in range(len(expected)) if other != rank)]
        fits = (
            other
            for other in order
            if expected[other].shape == tensor.shape and close(tensor, expected[other])
        )
        holds.append(next(fits, None))
    moved = [f"rank {r} holds rank {s}'s" for r, s in enumerate(holds) if r != s]
    if None in holds or not moved:
        return None
    text = "ranks are exchanged" if len(set(holds)) == len(holds) else "a rank's part is repeated"
    return Mistake(f"{text}: {', '.join(moved)}")
