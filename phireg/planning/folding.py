"""Where AWQ's factors stand, if not beside a linear: in norms, and in the rows that feed it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from phireg.layout.rules import Rules
from phireg.layout.spans import Span
from phireg.targets.target import PRE_SCALE, Target, ask


@dataclass(frozen=True, slots=True)
class Folding:
    """The linears that share an input, and those whose factors stand before it."""

    alike: Mapping[str, tuple[str, ...]]  # that share one with a linear, by each of them
    norms: Mapping[str, str]  # by norm the first of the linears behind, which have one factor
    feeds: Mapping[str, tuple[str, tuple[Span, ...]]]  # by linear a module and its rows, in order

    def factor(self, norm: str) -> str | None:
        """The scale that a norm's weight and bias are multiplied by."""
        return f"{self.norms[norm]}.{PRE_SCALE}" if norm in self.norms else None

    def in_norm(self, linear: str) -> bool:
        """Whether a norm has the factors of a linear."""
        return any(linear in self.alike[first] for first in self.norms.values())


def fold(
    target: Target, family: Rules, fields: Mapping[str, Any], linears: Collection[str], *, awq: bool
) -> Folding:
    """Return which quantized linears share an input, and for AWQ where their factors stand."""
    shared = ask(target, Target.shared_inputs, family)
    fed = ask(target, Target.fed_rows, family, fields) if awq and target.folds == "all" else {}
    chosen, least = set(linears), {"shared": 2, "all": 1}.get(target.folds or "", 0)
    alike = {x: tuple(n for n in group if n in chosen) for group in shared.values() for x in group}
    return Folding(
        alike,
        {
            norm: modules[0]
            for norm, modules in shared.items()
            if awq and 0 < least <= len(modules) and alike[modules[0]] == modules
        },
        {linear: rows for linear, rows in fed.items() if {linear, rows[0]} <= chosen},
    )
