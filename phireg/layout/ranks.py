"""Dividing modules over ranks: parts in whole units; experts as a whole, or each by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from phireg.layout.rules import Policy, Rule, Rules
from phireg.layout.spans import Axis, LayoutError, Part, possible_ranks, shard

MOST_RANKS = 64
"""The largest number of ranks that is suggested where another one does not work."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The number of ranks, and how they hold the experts of a mixture.

    Tensor-parallel rank r has the experts of expert-parallel rank r mod ``moe_ep_size`` and of each
    of them the share of r // ``moe_ep_size``, as TensorRT-LLM's Mapping numbers them.
    """

    tp_size: int
    moe_ep_size: int = 1

    @property
    def moe_tp_size(self) -> int:
        """The number of ranks that each expert is divided over."""
        return self.tp_size // self.moe_ep_size

    def divides(self, rule: Rule, part: Part) -> bool:
        """Return whether a part of a module can be cut over these ranks."""
        if not rule.experts:
            return possible_ranks(part, self.tp_size)
        return (
            self.tp_size % self.moe_ep_size == 0
            and rule.experts % self.moe_ep_size == 0
            and possible_ranks(part, self.moe_tp_size)
        )


def held(
    rule: Rule, rows: Axis, cols: Axis | None, ranks: Ranks, rank: int
) -> tuple[Axis, Axis | None]:
    """Return one rank's share of rows and columns; a LayoutError if they cannot be divided so."""
    size = ranks.tp_size
    if rule.experts:
        rows = _own_experts(rule, rows, ranks, rank % ranks.moe_ep_size)
        size, rank = ranks.moe_tp_size, rank // ranks.moe_ep_size
    if rule.policy is Policy.COLUMN:
        rows = shard(rows, size, rank)
    if rule.policy is Policy.ROW and cols is not None:
        cols = shard(cols, size, rank)
    return rows, cols


def _own_experts(rule: Rule, rows: Axis, ranks: Ranks, ep_rank: int) -> Axis:
    if ranks.tp_size % ranks.moe_ep_size or rule.experts % ranks.moe_ep_size:
        raise LayoutError(
            f"{rule.experts} experts cannot be distributed over {ranks.moe_ep_size} "
            f"of {ranks.tp_size} ranks"
        )
    share = len(rows.parts) // ranks.moe_ep_size
    parts = rows.parts[ep_rank * share : (ep_rank + 1) * share]
    used = {span.source for part in parts for span in part.spans}
    return replace(rows, parts=parts, sources=tuple(s for s in rows.sources if s[0] in used))


def cut_parts(rule: Rule) -> tuple[Part, ...]:
    """Return the parts of a module that ranks divide; of experts those of the first."""
    if rule.policy is Policy.COLUMN:
        parts = rule.weight[0].parts
        return parts[: len(parts) // rule.experts] if rule.experts else parts
    return rule.cols.parts if rule.policy is Policy.ROW and rule.cols else ()


def undivided(rules: Rules, ranks: Ranks) -> Iterator[tuple[Rule, Part]]:
    """Yield the parts that these ranks cannot divide."""
    for rule in rules.values():
        for part in cut_parts(rule):
            if not ranks.divides(rule, part):
                yield rule, part


def tp_sizes(rules: Rules, moe_ep_size: int = 1) -> list[int]:
    """List the numbers of ranks, up to :data:`MOST_RANKS`, that can divide all modules."""
    kinds = {(rule.experts, part): rule for rule in rules.values() for part in cut_parts(rule)}
    return [
        size
        for size in range(1, MOST_RANKS + 1)
        if all(Ranks(size, moe_ep_size).divides(rule, part) for (_, part), rule in kinds.items())
    ]
