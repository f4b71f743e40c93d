"""What quantized tensors that differ from the source look like: the mistake, if it is a known one.

Values agree only up to a step of the grid, so the patterns' exact tensors are held against the
found ones within that step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from phireg.checkpoint.rankfiles import RankFiles
from phireg.conversion.cast import Float32
from phireg.dtypes import UNIT_ROUNDOFF
from phireg.layout.spans import Span
from phireg.planning.model import Plan, Rows
from phireg.planning.report import ranges
from phireg.verification import patterns
from phireg.verification.diagnose import Diagnosis
from phireg.verification.grid import Linear, Seen, Tolerance, tolerance_of, whole_levels
from phireg.verification.patterns import Heads
from phireg.verification.recognise import MOST_LOOKED_AT, heads_of, place_of
from phireg.verification.result import Problem

_MOST_ELEMENTS = 2**28
"""A weight of more elements over all ranks is only located: looking holds it whole, in float32."""

Arrays = Sequence[Float32]
Close = Callable[[Float32, Float32], bool]


def recognise_quantized(plan: Plan, files: RankFiles, seen: Iterable[Seen]) -> list[Problem]:
    """One problem for each tensor that is not what the source gives."""
    problems: list[Problem] = []
    wrong = [linear for linear in seen if linear.differences or linear.scales]
    for number, one in enumerate(wrong):
        size = sum(int(np.prod(output.shape)) for output in one.linear.weights)
        if number >= MOST_LOOKED_AT or size > _MOST_ELEMENTS:
            problems += _located(one, tolerance_of(plan).scales)
        else:
            problems += _Look(plan, files, one).problems()
    return problems


def _located(seen: Seen, slack: float) -> Iterator[Problem]:
    target = seen.linear.target
    if seen.differences:
        elements = sum(difference.elements for difference in seen.differences)
        size = sum(int(np.prod(output.shape)) for output in seen.linear.weights)
        row, column = seen.differences[0].first
        yield _problem(
            f"{target}.weight",
            (difference.output.rank for difference in seen.differences),
            Diagnosis(
                f"{elements:,} of {size:,} elements are more than a step of the grid from the "
                f"source, first at row {row}, column {column}"
            ),
        )
    if seen.scales:
        name = f"{target}.weights_scaling_factor"
        yield _problem(name, seen.scales, _scale_by_value(seen, slack))


def _problem(name: str, ranks: Iterable[int], diagnosis: Diagnosis) -> Problem:
    where = f"rank{ranges(ranks)} {name}"
    return Problem(where, diagnosis.text, diagnosis.hint, *place_of(name))


class _Look:
    """One linear, whole."""

    def __init__(self, plan: Plan, files: RankFiles, seen: Seen) -> None:
        self.seen = seen
        self.linear: Linear = seen.linear
        self.tolerance: Tolerance = tolerance_of(plan)
        self.heads = heads_of(plan.config)
        self.expected, self.found = whole_levels(plan, files, seen.linear)

    def problems(self) -> Iterator[Problem]:
        target, ranks = self.linear.target, [output.rank for output in self.linear.weights]
        if self.seen.differences and (other := self.smoothing()):
            yield _problem(f"{target}.prequant_scaling_factor", ranks, other)
            return
        for problem in _located(self.seen, self.tolerance.scales):
            weight = problem.where.endswith(".weight")
            known = self.weight() if weight else self.scale()
            if known is None:
                yield problem
            else:
                yield Problem(problem.where, known.text, known.hint, problem.layer, problem.part)

    def weight(self) -> Diagnosis | None:
        def close(found: Float32, wanted: Float32) -> bool:
            with np.errstate(all="ignore"):
                return bool(self.tolerance.weights(found, wanted).all())

        return _pattern(self.linear.target, self.expected, self.found, self.heads, close)

    def scale(self) -> Diagnosis | None:
        def close(found: Float32, wanted: Float32) -> bool:
            return bool((np.abs(found - wanted) <= self.tolerance.scales * wanted).all())

        if len(next(iter(self.linear.scales.values()))) == 1:
            return None
        expected, found = (
            [of[output.rank][:, None] for output in self.linear.weights]
            for of in (self.linear.wanted, self.linear.scales)
        )
        return _pattern(self.linear.target, expected, found, self.heads, close)

    def smoothing(self) -> Diagnosis | None:
        """Whether the weight was smoothed with another vector than the one that is there.

        The least squares of every column tell the vector that was used, if the weight is the
        source's: W = s * (what the quantized weight stands for before s is taken out).
        """
        given = self.linear.smoother
        if given is None:
            return None
        products, squares = np.zeros((2, len(given)))
        parts = []
        for output, expected, found in zip(
            self.linear.weights, self.expected, self.found, strict=True
        ):
            assert isinstance(output.origin, Rows)
            columns = _columns(output.origin.columns, len(given))
            with np.errstate(all="ignore"):
                wanted, scale = (
                    of[output.rank][:, None] for of in (self.linear.wanted, self.linear.scales)
                )
                source = expected * wanted * given[columns]  # the source's values again
                stored = found * scale
                products[columns] += (source * stored).sum(axis=0, dtype=np.float64)
                squares[columns] += np.square(stored, dtype=np.float64).sum(axis=0)
            parts.append((columns, source, stored, found, scale))
        with np.errstate(all="ignore"):
            used = np.where(squares > 0, products / squares, given).astype(np.float32)
            for columns, source, _, found, scale in parts:
                if not self.tolerance.weights(found, source / used[columns] / scale).all():
                    return None
        return _other_vector(given, used, self.heads, 8 * UNIT_ROUNDOFF[self.tolerance.dtype])


def _columns(spans: Iterable[Span] | None, count: int) -> Any:
    everything = np.arange(count)
    if spans is None:
        return everything
    return np.concatenate([everything[s.start : s.stop] for s in spans])


def _pattern(
    target: str, expected: Arrays, found: Arrays, heads: Heads, close: Close
) -> Diagnosis | None:
    """The mistake with whole rows that turns ``expected`` into ``found``, on all ranks."""

    def same(made: Arrays) -> bool:
        return all(f.shape == m.shape and close(f, m) for f, m in zip(found, made, strict=True))

    bits = [np.ascontiguousarray(rows).view(np.uint32) for rows in expected]
    candidates: Iterable[patterns.Candidate] = ()
    if target.endswith("attention.qkv"):
        candidates = patterns.qkv_candidates(bits, heads)
    elif target.endswith("mlp.fc"):
        candidates = patterns.fc_candidates(bits, heads)
    for text, hint, made in (*candidates, *patterns.transposed(bits)):
        if same([np.ascontiguousarray(rows).view(np.float32) for rows in made]):
            return Diagnosis(text, hint)
    if len(expected) > 1 and same(moved := [*expected[1:], expected[0]]) and not same(expected):
        return Diagnosis("ranks are exchanged: " + _moves(len(moved)))
    return None


def _moves(ranks: int) -> str:
    return ", ".join(f"rank {rank} holds rank {(rank + 1) % ranks}'s" for rank in range(ranks))


def _scale_by_value(seen: Seen, slack: float) -> Diagnosis:
    ratios = []
    for rank in seen.scales:
        with np.errstate(all="ignore"):
            ratios.append(seen.linear.scales[rank] / seen.linear.wanted[rank])
    ratio = np.concatenate(ratios)
    judged = (
        "the weight is not on the grid of either scale"
        if seen.differences
        else "the weight itself is on the grid of one of the two"
    )
    if np.ptp(ratio) <= 3 * slack * abs(ratio[0]):
        rank = seen.scales[0]
        return Diagnosis(
            f"is {ratio[0]:.3g} times what the source's largest values give "
            f"({seen.linear.wanted[rank][0]:.6g}); {judged}"
        )
    off = np.flatnonzero(np.abs(ratio - 1) > 1e-2)
    row = int(off[0]) if len(off) else 0
    return Diagnosis(
        f"{len(off)} of {len(ratio)} scales are not what the source's rows give, first at row "
        f"{row}: {ratio[row]:.4g} times that; {judged}"
    )


def _other_vector(given: Float32, used: Float32, heads: Heads, slack: float) -> Diagnosis | None:
    """How the vector that is there differs from the one that was used."""
    off = np.flatnonzero(np.abs(given / used - 1) > slack)
    if not len(off):
        return None
    hint = "it belongs to the columns of the input and is never regrouped with rows."

    def close(left: Float32, right: Float32) -> bool:
        return bool((np.abs(left / right - 1) <= slack).all())

    total = heads.heads + 2 * heads.kv_heads
    if len(given) % total == 0:
        shape = Heads(heads.heads, heads.kv_heads, len(given) // total, heads.activation)
        for _, _, (made,) in patterns.qkv_candidates([used[:, None].view(np.uint32)], shape):
            if close(given[:, None], np.ascontiguousarray(made).view(np.float32)):
                return Diagnosis("its entries were regrouped as if they were rows of qkv", hint)
    first = int(off[0])
    text = (
        f"is not what the weight was smoothed with: {len(off)} of {len(given)} entries, first at "
        f"{first}: {given[first]:.5g} instead of {used[first]:.5g}"
    )
    if close(np.sort(given), np.sort(used)):
        return Diagnosis(f"{text}; the same entries in another order", hint)
    return Diagnosis(text)
