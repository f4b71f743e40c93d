"""Rules: the source modules that each target module is made of, and how it is sharded.

A rule names modules, not tensors: ``attention.qkv`` covers the weight, the bias and every scale of
that linear, each along the axes it lives on (``phireg.planning.quantized``). Rules know neither
ranks nor data, so parallelism cannot leak into a mapping.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from phireg.findings import calling_line
from phireg.layout.axes import columns, stack
from phireg.layout.spans import Axis, LayoutError

_HERE = Path(__file__).parent


class Policy(enum.Enum):
    """The way a module is divided over tensor-parallel ranks."""

    COLUMN = "column"
    """Output features are cut, part by part; each rank holds its rows of the weight and bias."""
    ROW = "row"
    """Input features are cut; the bias stands whole on every rank and is added once, after the
    partial sums are reduced (TensorRT-LLM's RowLinear)."""
    COPY = "copy"
    """Every rank holds all of it."""


@dataclass(frozen=True, slots=True)
class OneOf:
    """Declared alternatives for the rows of a module; the first whose sources exist is taken."""

    alternatives: tuple[Axis, ...]


def one_of(*alternatives: Axis) -> OneOf:
    """Declare that a module's rows may come from differently named or stored sources."""
    return OneOf(alternatives)


@dataclass(frozen=True, slots=True)
class Rule:
    """One target module.

    Attributes:
        target: module path in the checkpoint, e.g. ``transformer.layers.0.attention.qkv``.
        weight: index maps of the output axis over source modules, the canonical one first; empty
            if the weight is another module's (a tied head that has a bias of its own).
        bias: the same for the bias; empty if the module has none.
        cols: index map of the input axis, or None for a module with one axis (a norm).
        policy: how it is sharded.
        where: file and line that made the rule, for error messages.
        dtype: safetensors code of the module whatever the checkpoint's dtype is, or None for that.
        experts: number of experts whose linears are stacked in it, one after the other in the row
            maps; their parts are sharded expert by expert. 0 for any other module.
    """

    target: str
    weight: tuple[Axis, ...]
    bias: tuple[Axis, ...]
    cols: Axis | None
    policy: Policy
    where: str = field(compare=False)
    dtype: str | None = None
    experts: int = 0

    @property
    def tensors(self) -> dict[str, tuple[Axis, ...]]:
        """Return the companions of an unquantized module, each with its declared row maps."""
        both = {"weight": self.weight, "bias": self.bias}
        return {name: axes for name, axes in both.items() if axes}


# The names below are capitalized on purpose: a mapping reads as a list of modules, and mypy,
# editors and people know them by TensorRT-LLM's class names.


def Linear(  # noqa: N802
    target: str,
    rows: Axis | OneOf,
    cols: int | Axis,
    policy: Policy,
    *,
    bias: bool | Axis | OneOf = False,
    float32: bool = False,
) -> Rule:
    """Declare a linear layer: ``weight`` [rows, cols] and, with ``bias``, ``bias`` [rows].

    The bias comes from the modules the weight comes from, unless ``bias`` names others (a tied
    head has the embedding's weight and its own bias). With ``float32`` it has that dtype whatever
    the checkpoint's is (the router of a mixture of experts).
    """
    rule = _rule(target, rows, cols, policy, bias)
    return replace(rule, dtype="F32") if float32 else rule


def Experts(  # noqa: N802
    target: str, rows: Sequence[Axis], cols: int | Axis, policy: Policy
) -> Rule:
    """Declare the same linear of every expert, stacked: ``weight`` [experts, rows, cols].

    ``rows`` has one axis per expert, all with the same parts. Ranks may share the experts out
    (expert parallelism), and divide each of them as ``policy`` says (tensor parallelism); the
    policy must be COLUMN or ROW.

    Raises:
        LayoutError: there are no experts, they differ in their parts, or the policy is COPY.
    """
    if policy is Policy.COPY:
        raise LayoutError(f"{target}: ranks that divide experts cannot each hold all of them")
    return replace(_rule(target, stack(rows), cols, policy, False), experts=len(rows))


def Norm(target: str, rows: Axis | OneOf, *, bias: bool = False) -> Rule:  # noqa: N802
    """Declare a norm: ``weight`` [rows] and, with ``bias``, ``bias`` [rows], on every rank."""
    return _rule(target, rows, None, Policy.COPY, bias)


def Table(target: str, rows: Axis | OneOf, cols: int | Axis) -> Rule:  # noqa: N802
    """Declare a lookup table, whole on every rank: ``weight`` [rows, cols]."""
    return _rule(target, rows, cols, Policy.COPY, False)


def _rule(
    target: str,
    rows: Axis | OneOf,
    cols: int | Axis | None,
    policy: Policy,
    bias: bool | Axis | OneOf,
) -> Rule:
    weight = _alternatives(rows)
    biases = (weight if bias else ()) if isinstance(bias, bool) else _alternatives(bias)
    lengths = {axis.length for axis in (*weight, *biases)}
    if len(lengths) != 1:
        raise LayoutError(f"{target}: the alternatives have {sorted(lengths)} rows")
    cuts = {
        tuple((part.length, part.unit, part.replicable, part.padded) for part in axis.parts)
        for axis in (*weight, *biases)
    }
    if len(cuts) != 1:
        raise LayoutError(f"{target}: the alternatives would be divided over ranks differently")
    axis = columns(cols) if isinstance(cols, int) else cols
    return Rule(target, weight, biases, axis, policy, calling_line(_HERE))


def _alternatives(rows: Axis | OneOf) -> tuple[Axis, ...]:
    return rows.alternatives if isinstance(rows, OneOf) else (rows,)


class Rules(Mapping[str, Rule]):
    """An immutable set of rules, keyed by target module.

    Args:
        rules: one per target module.
        drop: source tensors that are not carried over if present, each with the reason.

    Raises:
        LayoutError: two rules make the same target.
    """

    def __init__(self, *rules: Rule, drop: Mapping[str, str] | None = None) -> None:
        by_target: dict[str, Rule] = {}
        for rule in rules:
            other = by_target.setdefault(rule.target, rule)
            if other is not rule:
                raise LayoutError(f"{rule.target} is made twice: {other.where} and {rule.where}")
        self._rules = MappingProxyType(by_target)
        self.drop: Mapping[str, str] = MappingProxyType(dict(drop or {}))

    def __getitem__(self, target: str) -> Rule:
        return self._rules[target]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)

    def replace(self, *rules: Rule) -> Rules:
        """Return the rules with those of the same targets replaced, for derived families.

        Raises:
            LayoutError: a rule's target is not among the present ones, or two rules make it.
        """
        new = Rules(*rules)
        unknown = [target for target in new if target not in self]
        if unknown:
            raise LayoutError(f"nothing to replace: no rule makes {', '.join(unknown)}")
        merged = {**self._rules, **new}
        return Rules(*merged.values(), drop=self.drop)


def published_shapes(rules: Rules) -> dict[str, tuple[int, ...]]:
    """Return the source tensors of the published layout, the first alternative, by name."""
    shapes = {}
    for rule in rules.values():
        for companion, alternatives in rule.tensors.items():
            columns = (rule.cols.length,) if rule.cols and companion == "weight" else ()
            for module, rows in alternatives[0].sources:
                shapes[f"{module}.{companion}"] = (rows, *columns)
    return shapes


@dataclass(frozen=True, slots=True)
class QuantRules:
    """The modules that a family quantizes: the result of ``phireg_quant_rules``.

    Attributes:
        linears: target modules the scheme quantizes; everything else stays in the checkpoint's
            dtype.
        kv_caches: target attention modules that hold a KV cache, one per layer and in the order of
            the layers.
        exclude_modules: patterns TensorRT-LLM's reader must leave alone. A list given to the
            reader replaces its own defaults, so it must name the embedding as well as the head:
            with ``lm_head`` alone, weight-only readers would also quantize the embedding.
        postprocess: modules that an exporter may have written in the source's row order, as rules
            from such a checkpoint to a right one (target and source are both checkpoint names).
        notes: what a user of the scheme should know about it, a sentence each.
    """

    linears: tuple[str, ...]
    kv_caches: tuple[str, ...] = ()
    exclude_modules: tuple[str, ...] = ("lm_head", "*vocab_embedding")
    postprocess: Rules = field(default_factory=Rules)
    notes: tuple[str, ...] = ()


def every_linear(
    config: Mapping[str, Any], *, postprocess: Rules | None = None, notes: tuple[str, ...] = ()
) -> QuantRules:
    """Quantize the four linears and the KV cache of every layer, but no router of experts."""
    layers = [f"transformer.layers.{i}" for i in range(config["num_hidden_layers"])]
    linears = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj")
    return QuantRules(
        linears=tuple(f"{layer}.{linear}" for layer in layers for linear in linears),
        kv_caches=tuple(f"{layer}.attention" for layer in layers),
        postprocess=postprocess or Rules(),
        notes=notes,
    )
