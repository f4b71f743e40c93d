"""Compare the quantized linears of a Hugging Face directory with the source's rows.

What a linear stands for is its levels times its scales, times what smoothing took out of the weight
and put into a vector of its own, a norm, or the rows that feed it. A value may be one step of its
grid away from the source. Factors in norms and vectors are read; those in rows are inferred from
both linears and must cancel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from phireg.checkpoint.rankfiles import RankFiles
from phireg.conversion.stream import assemble
from phireg.dtypes import UNIT_ROUNDOFF, WEIGHT_DTYPES, as_torch
from phireg.executor.directories import DirectorySource
from phireg.executor.levels import Levels
from phireg.executor.stored import Stored, ordered, stored_in_rank
from phireg.planning.model import Output, Plan, QuantizedLinear
from phireg.reader.models import Order
from phireg.reader.modules import Module
from phireg.reader.schemes import LINEARS
from phireg.reader.tensors import layer_prefix
from phireg.source.model import Reader
from phireg.verification.comparison import Progress
from phireg.verification.grids import (
    ALIKE,
    explaining_factors,
    fit,
    has_exchanged_nibbles,
    is_alike,
    is_scaled,
    relative_error,
    steps,
)
from phireg.verification.orders import Heads, named_mistake
from phireg.verification.result import Problem, own_place, place_of

_FOLDED = 0.1
"""Inferred factors of sound weights that nothing was folded into differ from 1 by a third of it."""

_SEARCHED = 4.0
"""Steps by which methods that correct one value by others (GPTQ) and clipping move a value."""


@dataclass(slots=True)
class Comparison:
    """The source's side, with what norms were multiplied by, and what was found in all linears."""

    plan: Plan
    norms: Mapping[str, Tensor] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    compared: int = 0
    searched: int = 0  # modules whose values are farther than a step, evenly
    folded: int = 0  # linears whose rows have factors of smoothing
    unfolded: set[str] = field(default_factory=set)  # norms whose factors the linears lack
    expected_scales: dict[str, Tensor] = field(default_factory=dict)
    wrong_scales: list[tuple[Module, Tensor, float]] = field(default_factory=list)


def compare_linears(
    plan: Plan, source: DirectorySource, norms: Mapping[str, Tensor], names: Sequence[str]
) -> Comparison:
    """Compare linears of layers (``names``, whole), and lm_head if it is among them."""
    result = Comparison(plan, norms)
    outputs = {o.name: o for o in plan.outputs if o.name.endswith(".weight")}
    with plan.source.open() as reader:
        if "lm_head" in names:
            head = source.directory.head()
            assert head is not None
            rows = _rows(plan, outputs["lm_head.weight"], reader)
            _Linear(result, "lm_head", (head,), [source.read(head)]).compare(rows)
        for layer in range(source.directory.spec.num_layers):
            present = [n for n in LINEARS if layer_prefix(layer) + n in names]
            if present:
                _Layer(result, source, layer).compare(present, outputs, reader)
    result.problems += _scale_problems(result)
    return result


def compare_ranks(
    plan: Plan, files: RankFiles, linears: Sequence[QuantizedLinear], progress: Progress
) -> Comparison:
    """Compare linears of rank files whose weights are in groups, rank by rank."""
    result, code = Comparison(plan), WEIGHT_DTYPES[plan.options.dtype]
    assert plan.options.scheme is not None and plan.options.scheme.storage is not None
    storage = plan.options.scheme.storage
    targets = {linear.target for linear in linears}
    with plan.source.open() as reader:
        for output in plan.outputs:
            target, _, part = output.name.rpartition(".")
            if part != "weight" or target not in targets:
                continue
            height, width = (n * k for n, k in zip(output.shape, output.packing, strict=True))
            rows = _rows(plan, replace(output, dtype=code, shape=(height, width)), reader)
            module = Module(f"rank{output.rank} {target}", height, width, False, storage)
            stored = stored_in_rank(storage, target, files[output.rank].mapped())
            _Linear(result, target, (module,), [stored]).compare(rows)
            progress(output.nbytes)
    result.problems += _scale_problems(result)
    return result


class _Layer:
    """The linears of one layer, whose rows and columns may have factors that cancel."""

    def __init__(self, result: Comparison, source: DirectorySource, layer: int) -> None:
        self.result = result
        self.source = source
        self.layer = layer
        self.directory = source.directory

    def compare(self, names: Sequence[str], outputs: Mapping[str, Output], reader: Reader) -> None:
        prefix = layer_prefix(self.layer)
        for name in ("attention.qkv", "mlp.fc"):
            if name in names and (norm := self._norm_name(name)) in self.result.norms:
                (modules, *_) = self.directory.linear(self.layer, name)
                rows = _rows(self.result.plan, outputs[f"{prefix}{name}.weight"], reader)
                linear = self._linear(name, modules, None)
                if not linear.is_divided_by(
                    self.result.norms[norm], rows[0] if rows.ndim == 3 else rows
                ):
                    self.result.unfolded.add(norm)
        for first, second in (("attention.qkv", "attention.dense"), ("mlp.fc", "mlp.proj")):
            rows = {
                name: _rows(self.result.plan, outputs[f"{prefix}{name}.weight"], reader)
                for name in (first, second)
                if name in names
            }
            for expert in range(len(self.directory.linear(self.layer, second))):
                linears = {
                    name: self._linear(
                        name, self.directory.linear(self.layer, name)[expert], self._norm(name)
                    )
                    for name in rows
                }
                own = {name: r[expert] if r.ndim == 3 else r for name, r in rows.items()}
                factors = None
                if len(linears) == 2:
                    factors = self._carried(linears[first], linears[second], own, second)
                if first in linears:
                    linears[first].compare(own[first], row_factors=factors and factors[0])
                if second in linears:
                    linears[second].compare(own[second], column_factors=factors and factors[1])

    def _linear(self, name: str, modules: tuple[Module, ...], norm: Tensor | None) -> _Linear:
        whole = layer_prefix(self.layer) + name
        parts = ordered(self.directory, name, [self.source.read(module) for module in modules])
        return _Linear(self.result, whole, modules, parts, norm, self.directory.order(name))

    def _norm_name(self, name: str) -> str:
        sequential = self.directory.spec.architecture.residual == "sequential"
        after = name == "mlp.fc" and sequential
        return layer_prefix(self.layer) + ("post_layernorm" if after else "input_layernorm")

    def _norm(self, name: str) -> Tensor | None:
        fed = name in ("attention.qkv", "mlp.fc")
        norm = self._norm_name(name)
        return self.result.norms.get(norm) if fed and norm not in self.result.unfolded else None

    def _carried(
        self, first: _Linear, second: _Linear, rows: Mapping[str, Tensor], name: str
    ) -> tuple[Tensor, Tensor] | None:
        """Return factors of the rows of one linear that those of the next's columns cancel."""
        spec = self.directory.spec
        columns = second.inferred_columns(rows[name])
        if columns is None or not ((columns - 1).abs() > _FOLDED).any():
            return None
        carrying = torch.ones(len(next(iter(rows.values()))))
        if name == "attention.dense":
            group = spec.num_heads // spec.num_kv_heads
            by_head = columns.view(spec.num_kv_heads, group, spec.head_size)
            if not torch.allclose(by_head, by_head.mean(1, keepdim=True), rtol=_FOLDED):
                return None
            carrying[-spec.num_kv_heads * spec.head_size :] = 1 / by_head.mean(1).flatten()
        elif spec.activation == "swiglu":
            carrying[: spec.intermediate_size] = 1 / columns
        else:
            return None
        actual = first.inferred_rows(rows["attention.qkv" if "dense" in name else "mlp.fc"])
        if not torch.allclose(actual, carrying, rtol=_FOLDED):
            return None
        self.result.folded += 1
        return carrying, columns


@dataclass(frozen=True, eq=False)
class _Linear:
    """One linear of the blueprint (of one expert) and its modules."""

    result: Comparison
    name: str
    modules: tuple[Module, ...]
    parts: list[Stored]
    norm: Tensor | None = None
    order: Order = "plain"

    def inferred_columns(self, rows: Tensor) -> Tensor | None:
        """Return what each column is multiplied by after its stored smoothing, by least squares."""
        (part, *more) = self.parts
        if more:
            return None
        factors = fit(part.values, rows, 0)
        return factors if part.smoothing is None else factors * part.smoothing.float()

    def is_divided_by(self, norm: Tensor, rows: Tensor) -> bool:
        """Return whether the weight is nearer to the source's without a norm's factors."""
        values = torch.cat([part.values for part in self.parts])
        expected = self._expected(rows, self.parts[0])
        return relative_error(values, expected / norm) <= relative_error(values, expected)

    def inferred_rows(self, rows: Tensor) -> Tensor:
        values = torch.cat([part.values for part in self.parts])
        return fit(values, self._expected(rows, self.parts[0]), 1)

    def compare(
        self, rows: Tensor, row_factors: Tensor | None = None, column_factors: Tensor | None = None
    ) -> None:
        """Compare the modules with rows of the source, in the blueprint's order."""
        start = 0
        whole: list[tuple[Tensor, Tensor]] = []
        wrong = []
        for module, part in zip(self.modules, self.parts, strict=True):
            at = slice(start, start + module.rows)
            expected = self._expected(rows[at], part)
            if column_factors is not None:
                stored = 1.0 if part.smoothing is None else part.smoothing.float()
                expected = rows[at] * column_factors / stored
            if row_factors is not None:
                expected = expected * row_factors[at, None]
            inferred = row_factors is not None or column_factors is not None
            values = part.values
            whole.append((values, expected))
            self.result.compared += 1
            code = WEIGHT_DTYPES[self.result.plan.options.dtype]
            slack = _FOLDED / 3 if inferred else 4 * UNIT_ROUNDOFF[code]
            distance = (values - expected).abs()
            step = steps(part, module, expected)
            off = ~(distance <= step + slack * expected.abs() + 1e-30)
            scale = part.weight.scale if isinstance(part.weight, Levels) else None
            if scale is not None and scale.numel() == 1:  # which may be another module's
                self.result.expected_scales[module.name] = expected.abs().amax()
            scaled = not inferred and is_scaled(module, values, expected)
            if (off.any() or scaled) and not self._is_searched(
                module, part, values, expected, step
            ):
                wrong.append((module, part, values, expected, off))
            start += module.rows
        if wrong:
            self.result.problems += list(self._explained(wrong, whole))

    def _expected(self, rows: Tensor, part: Stored) -> Tensor:
        """Return what a weight should be, given what its inputs are multiplied by."""
        factors = torch.ones(rows.shape[1])
        if self.norm is not None:
            factors = factors * self.norm
        if part.smoothing is not None:
            factors = factors * part.smoothing.float()
        return rows / factors

    def _is_searched(
        self, module: Module, part: Stored, values: Tensor, expected: Tensor, step: Tensor
    ) -> bool:
        """Return whether values are off evenly and by few steps, as by GPTQ and clipping."""
        storage = module.storage
        if storage is None or storage.form.weight not in ("int4", "e2m1"):
            return False
        within = ((values - expected).abs() <= _SEARCHED * step).all()
        error = (values - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-30)
        even = bool(within) and bool((error <= ALIKE).all())
        even = even and explaining_factors(values, expected) is None
        self.result.searched += even
        return even

    def _explained(
        self,
        wrong: Sequence[tuple[Module, Stored, Tensor, Tensor, Tensor]],
        whole: Sequence[tuple[Tensor, Tensor]],
    ) -> Iterator[Problem]:
        values, expected = (torch.cat(list(side)) for side in zip(*whole, strict=True))
        mistake = named_mistake(
            self.name, [expected.numpy()], [values.numpy()], Heads.of(self.result.plan), is_alike
        )
        if mistake is not None:
            names = ", ".join(f"{module.name}.weight" for module in self.modules)
            hint = mistake.hint
            if self.order == "halves" and hint == "up comes first.":
                hint = "here the gate comes first."
            yield Problem(names, mistake.text, hint, *place_of(self.name))
            return
        for module, part, stored, should, off in wrong:
            yield from self._of_module(module, part, stored, should, off)

    def _of_module(
        self, module: Module, part: Stored, values: Tensor, expected: Tensor, off: Tensor
    ) -> Iterator[Problem]:
        if has_exchanged_nibbles(module, part, expected):
            text = "the four-bit values of each pair lie in the other order"
            yield self._problem(module, "weight", text)
            return
        factors = explaining_factors(values, expected)
        if factors is not None and factors.dim() == 1:
            scale = part.weight.scale if isinstance(part.weight, Levels) else None
            scale = torch.ones(1) if scale is None else scale
            self.result.wrong_scales.append((module, scale, float(factors)))
            return
        if factors is not None:
            what, name, text = (
                ("rows", "scale", "is not scaled as the source's")
                if len(factors) > 1
                else (
                    "inputs",
                    "smoothing",
                    "is multiplied by something else than the weight was divided by",
                )
            )
            wrong = ((factors.flatten() - 1).abs() > 0.02).nonzero()
            first = int(wrong[0]) if len(wrong) else 0
            text = (
                f"{len(wrong)} of {factors.numel()} {what}: each {text}, number {first} "
                f"{float(factors.flatten()[first]):.4g} times"
            )
            smoothing = part.smoothing
            forgotten = what == "inputs" and (smoothing is None or bool((smoothing == 1).all()))
            hint = "the factors of smoothing were forgotten" if forgotten else None
            yield self._problem(module, name, text, hint)
            return
        if not off.any():
            return
        row, column = (int(axis) for axis in off.nonzero()[0])
        text = (
            f"{int(off.sum()):,} of {off.numel():,} elements are more than a step of the grid from "
            f"the source, first at row {row}, column {column}: {float(values[row, column]):.5g} "
            f"instead of {float(expected[row, column]):.5g}"
        )
        yield self._problem(module, "weight", text)

    def _problem(self, module: Module, part: str, text: str, hint: str | None = None) -> Problem:
        return Problem(_part_name(module, part), text, hint, *place_of(self.name))


def _scale_problems(result: Comparison) -> Iterator[Problem]:
    """Say whose scale each wrong one of a whole tensor is, if it is another module's."""
    largest = result.expected_scales
    for module, stored, factor in result.wrong_scales:
        text = f"is {factor:.5g} times what the source's largest value gives"
        for name in largest.keys() - {module.name} if module.name in largest else ():
            others = stored / factor * largest[name] / largest[module.name]
            if stored.numel() == 1 and abs(float(stored / others) - 1) < 0.01:
                text += f": it is that of {name}"
                break
        rank, _, name = module.name.rpartition(" ")
        place = place_of(name) if rank else own_place(name)
        yield Problem(_part_name(module, "scale"), text, None, *place)


def _rows(plan: Plan, output: Output, reader: Reader) -> Tensor:
    """Return the source's rows of an output, float32 [rows, columns], of experts with theirs."""
    bits = assemble(plan, output, reader)
    return as_torch(bits, output.dtype).float().reshape(output.shape)


def _part_name(module: Module, what: str) -> str:
    part = module.parts("").get(what)
    return f"{module.name}.{what if part is None else part.name}"
