"""The quantized part of a plan: scales, dtypes, errors and warnings.

A scale lives on axes of its weight: permuting, fusing or sharding a module moves all of its tensors
through one table (:data:`FOLLOWS`), and no family has code for scales.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from phireg.layout.rules import QuantRules, Rule, Rules
from phireg.layout.spans import Axis, LayoutError, Span, take
from phireg.planning.model import Basis, Options, Output, QuantizedLinear, Scale, ScaleTensor
from phireg.reader.schemes import SCHEMES
from phireg.targets.target import (
    PACKINGS,
    PRE_SCALE,
    SECOND_SCALE,
    SHAPE,
    WEIGHT_SCALE,
    Quantized,
    Stored,
    Target,
    ask,
)

HEAD = "lm_head"

FOLLOWS: dict[str, tuple[str, ...]] = {
    "weight": ("rows", "cols"),
    "bias": ("rows",),
    "weights_scaling_factor": ("rows",),
    "prequant_scaling_factor": ("cols",),
    "activation_scaling_factor": (),
    SECOND_SCALE: (),
}
"""The axes of a linear's tensors, in order, by the last component of the name.

Scales have TensorRT-LLM's names here, whatever the target calls them. ``weights_scaling_factor``
has one entry per output row; a per-tensor one (shape [1]) follows nothing.
"""


def axes_of(companion: str, shape: Sequence[int], rows: int) -> tuple[str, ...]:
    """Name the axes of a linear's tensor, out of ``rows`` (the module's count) and ``cols``."""
    if companion not in FOLLOWS:
        raise LayoutError(f"'{companion}' is not a companion of a linear")
    if companion == "weights_scaling_factor":
        per_tensor = len(shape) == 0 or (tuple(shape) == (1,) and rows > 1)
        return () if per_tensor else ("rows",)
    return FOLLOWS[companion]


@dataclass(frozen=True, slots=True)
class Folding:
    """The linears that share an input, and whose AWQ factors stand in norms or rows before it."""

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


class Quantization:
    """The quantized part of one plan in dtype ``code``, filled while its outputs are made."""

    def __init__(self, options: Options, target: Target, code: str) -> None:
        self.options, self.target, self.code = options, target, code
        self.format, self.kv_cache = options.format, options.kv_cache_dtype
        self.layout = None if self.format is None else target.layouts.get(self.format.name)
        self.rules = QuantRules(())
        self.folding = Folding({}, {}, {})
        self.linears: list[QuantizedLinear] = []
        self.scales: dict[str, ScaleTensor] = {}

    @property
    def algorithm(self) -> str:
        """What families' rules call the format: TensorRT-LLM's name, where it has one."""
        assert self.format is not None
        scheme = SCHEMES.get(self.format.name)
        return self.format.name if scheme is None else scheme.quant_algo

    def choose(
        self, quant: QuantRules, family: Rules, rules: Rules, fields: Mapping[str, Any]
    ) -> None:
        """Choose what ``rules`` name, by its names in the target; ``family`` makes weights."""
        chosen = ask(self.target, Target.quantized_modules, quant, family)
        if not self.target.by_rank:
            head = (HEAD,) if self.options.quantize_lm_head and HEAD in rules else ()
            linears = (*chosen.linears, *head)
            patterns = self.options.exclude
            kept = tuple(x for x in linears if not any(fnmatchcase(x, p) for p in patterns))
            others = {name for name, rule in rules.items() if rule.cols is not None}
            left = sorted(others.union(linears, (HEAD,)).difference(kept))
            chosen = replace(chosen, linears=kept, exclude_modules=tuple(left), notes=())
        self.rules = chosen
        awq = self.options.searched
        self.folding = fold(self.target, family, fields, chosen.linears, awq=awq)

    def facts(self) -> Quantized | None:
        """What config files tell of it."""
        if self.format is None or self.layout is None:
            return None
        linears, excluded = self.rules.linears, self.rules.exclude_modules
        return Quantized(self.format, self.layout, self.kv_cache, linears, excluded)

    def groups(self, rule: Rule) -> int | None:
        """The number of groups in a row of a quantized linear's weight; None without groups."""
        size = None if self.format is None else self.format.group_size
        return rule.cols.length // size if size and rule.cols else None

    def packed(self, output: Output) -> Output:
        """A quantized weight as it is stored: fewer rows or columns where levels are packed."""
        layout = self.layout
        assert layout is not None
        assert layout.weight is not None  # as in targets()
        rows, columns = packing = PACKINGS[layout.packing]
        *others, height, width = output.shape
        shape = (*others, height // rows, width // columns)
        name = output.name.removesuffix("weight") + layout.weight_name
        return replace(output, name=name, dtype=layout.weight, shape=shape, packing=packing)

    def shape_output(self, rule: Rule) -> Output:
        """Rows and columns of a packed weight, which the run states among the scales."""
        name = f"{rule.target}.{SHAPE}"
        self.scales[name] = ScaleTensor("I64", 2, (Basis.WEIGHTS,))
        return Output(0, name, "I64", (2,), 0, Scale((Span(name, 0, 2),)))

    def targets(self) -> tuple[str, ...]:
        """The linears whose weights this run quantizes."""
        quantizes = self.layout is not None and self.layout.weight is not None
        return tuple(dict.fromkeys(self.rules.linears)) if quantizes else ()

    def add(self, rule: Rule, rows: Axis) -> Mapping[str, Stored]:
        """Add a linear to the quantized ones; return how its scales are stored, by companion."""
        assert self.layout is not None
        assert rule.cols is not None  # problems() has checked it
        sources = tuple(module for module, _ in rows.sources)
        in_norm = self.folding.in_norm(rule.target)
        linear = QuantizedLinear(
            *(rule.target, sources, rule.cols.length, rule.experts),
            alike=self.folding.alike.get(rule.target, ()),
            folded=in_norm or rule.target in self.folding.feeds,
            feeds=tuple(
                (fed, tuple(s for own in spans for s in take(rows.spans, own.start, own.stop)))
                for fed, (module, spans) in self.folding.feeds.items()
                if module == rule.target
            ),
        )
        self.linears.append(linear)
        scales = self.layout.scales
        return {**scales, PRE_SCALE: Stored("", None)} if in_norm else scales

    def declare(self, rule: Rule, companion: str, rows: Axis, code: str) -> tuple[str, ...]:
        """Declare a scale that the run computes, and return the axes that it follows.

        One that follows the rows is a companion of every source module; any other belongs to the
        target. Stacked experts have each a scale of their weight, and one of all their inputs.
        """
        assert self.format is not None
        by_weight = companion == WEIGHT_SCALE
        follows = FOLLOWS[companion]
        if by_weight and self.format.per == "tensor":
            follows = ("experts",) if rule.experts else ()
        if "rows" in follows:
            groups = self.groups(rule) or 1
            sizes = {module: count * groups for module, count in rows.sources}
        elif "experts" in follows:
            sizes = {rule.target: rule.experts}
        else:
            sizes = {rule.target: rule.cols.length if rule.cols and "cols" in follows else 1}
        calibrated = not by_weight or self.format.smoothing is not None
        basis = (Basis.CALIBRATION,) * calibrated + (Basis.WEIGHTS,) * by_weight
        for module, size in sizes.items():
            self.scales[f"{module}.{companion}"] = ScaleTensor(code, size, basis)
        return follows

    def kv_outputs(self, tp_size: int) -> Iterator[Output]:
        """The scales of the KV caches, the same on every rank."""
        stored_scales = self.target.kv_caches[self.kv_cache] if self.kv_cache else {}
        for module in self.rules.kv_caches:
            for companion, stored in stored_scales.items():
                name, own = f"{module}.{companion}", f"{module}.{stored.name}"
                self.scales[name] = ScaleTensor(stored.code or self.code, 1, (Basis.CALIBRATION,))
                scale, sizes = Scale((Span(name, 0, 1),)), stored.sizes((1,))
                for rank in range(tp_size):
                    yield Output(rank, own, stored.code or self.code, sizes, 0, scale)


def by_group(output: Output, groups: int, rule: Rule, inputs: tuple[Span, ...] | None) -> Output:
    """The scales of groups of a rank's inputs in place of the scales of rows."""
    spans = tuple(
        replace(span, start=span.start * groups, count=span.count * groups)
        for span in output.origin.spans
    )
    columns, kept = None, groups
    if inputs is not None and rule.cols is not None:
        size = rule.cols.length // groups
        columns = tuple(replace(s, start=s.start // size, count=s.count // size) for s in inputs)
        kept = sum(span.count for span in columns)
    origin = Scale(spans, groups, columns)
    return replace(output, shape=(*output.shape, kept), origin=origin)
