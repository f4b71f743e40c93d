"""Building a plan out of a family's config table and weight rules, source headers and ranks."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from phireg.config.hf import HFConfig
from phireg.dtypes import WEIGHT_DTYPES
from phireg.findings import Finding, Severity, limited
from phireg.layout.axes import OWN_COLUMNS
from phireg.layout.ranks import held, tp_sizes, undivided
from phireg.layout.rules import Rule, Rules
from phireg.layout.spans import Axis, LayoutError, Span, check_partition
from phireg.planning.fitness import obstacles, remarks
from phireg.planning.merging import merge_adapter
from phireg.planning.model import Options, Output, Plan, Rows, Scale
from phireg.planning.quantized import FOLLOWS, Quantization, by_group
from phireg.planning.recognition import unwrapped
from phireg.planning.schedule import schedule
from phireg.planning.shards import INDEX_FILE, MOST_FILES, PT, in_shards, placed, shard_index
from phireg.planning.ties import TIES, settle_ties
from phireg.reader.tensors import required_tensors
from phireg.registry import load_target
from phireg.source.model import Source
from phireg.targets.target import (
    PRE_SCALE,
    SHAPE,
    WEIGHT_SCALE,
    Target,
    WrittenModel,
    ask,
    check_files,
)

if TYPE_CHECKING:
    from phireg.registry import FamilyChoice

CONSTANT_BUFFERS = tuple(
    f".{name}"
    for name in (
        *("rotary_emb.inv_freq", "rotary_emb.original_inv_freq", "rotary_emb.long_inv_freq"),
        *("rotary_emb.cos_cached", "rotary_emb.sin_cached", "rotary_emb.scale"),
        *("attn.masked_bias", "attention.masked_bias", "embeddings.position_ids"),
    )
)
"""Ends of the names of buffers that releases of the sources' code saved with the weights."""

_CONSTANT = "a constant the reader computes itself"
_LISTED_CODES = ", ".join(WEIGHT_DTYPES.values())


def build_plan(
    chosen: FamilyChoice,
    hf: HFConfig,
    source: Source,
    options: Options,
    model_dir: str | None = None,
) -> Plan:
    """Plan a conversion. Problems of the model are findings, all of them at once."""
    return _Builder(chosen, hf, source, options).plan(model_dir or str(source.directory))


class _Builder:
    def __init__(
        self, chosen: FamilyChoice, hf: HFConfig, source: Source, options: Options
    ) -> None:
        self.chosen = chosen
        self.family = chosen.family
        self.hf = hf
        self.source = source
        self.options = options
        self.target = load_target(options.target, options.form)
        self.failed = False
        self.findings: list[Finding] = [*source.findings]
        self.tp_sizes: tuple[int, ...] = ()

    def plan(self, model_dir: str) -> Plan:
        translation = self.family.config_fields().translate(self.hf)
        self.findings += (
            finding
            for finding in translation.findings
            # Warnings and notes of the table are about TensorRT-LLM's readers.
            if self.target.by_rank or finding.severity is Severity.ERROR
        )
        dtype = self.dtype()
        code = WEIGHT_DTYPES.get(dtype, "")
        self.quantization = Quantization(self.options, self.target, code)
        outputs: tuple[Output, ...] = ()
        documents: dict[str, dict[str, Any]] = {"config.json": {}}
        fields = dict(translation.fields)
        unfit = [*ask(self.target, Target.problems, fields, self.hf)] if translation.ok else []
        for key, detail in unfit:
            self.error("target", key, detail)
        if translation.ok and not unfit:
            try:
                family = self.settle(fields)
                rules = ask(self.target, Target.rules, family, fields)
                if self.quantization.format is not None:
                    quant = self.family.quant_rules(fields, self.quantization.algorithm)
                    self.quantization.choose(quant, family, rules, fields)
            except LayoutError as problem:
                self.error("layout", self.family.name, f"the config's sizes do not fit: {problem}")
                documents = self.documents(fields, dtype)
            else:
                documents = self.documents(fields, dtype)
                outputs = self.outputs(rules, code)
                if self.target.by_rank:
                    self.check_schema(documents["config.json"], outputs)
                self.findings += remarks(self.quantization, fields, outputs)
        else:
            self.findings.append(
                Finding(Severity.NOTE, "weights", "", "not checked, because the config has errors")
            )
        headers: tuple[bytes, ...] = ()
        if self.target.by_rank:
            files = tuple(f"rank{rank}.safetensors" for rank in range(self.options.tp_size))
        else:
            outputs, files = in_shards(outputs, self.options.max_shard_size)
            if len(files) > MOST_FILES:
                detail = f"makes {len(files)} files; {MOST_FILES} are the most"
                self.error("target", "--max-shard-size", detail)
        if any(finding.severity is Severity.ERROR for finding in self.findings):
            outputs, files = (), ()
            self.quantization = Quantization(self.options, self.target, code)
        else:
            headers, outputs = placed(outputs, len(files), None if self.target.by_rank else PT)
            if not self.target.by_rank and len(files) > 1:
                documents[INDEX_FILE] = shard_index(outputs, files)
        return Plan(
            chosen=self.chosen,
            model_dir=model_dir,
            options=dataclasses.replace(self.options, dtype=dtype),
            source=self.source,
            target=self.target,
            documents=documents,
            outputs=outputs,
            files=files,
            headers=headers,
            tasks=schedule(outputs, self.source.tensors),
            findings=limited(self.findings),
            linears=tuple(self.quantization.linears),
            kv_caches=self.quantization.rules.kv_caches if self.options.kv_cache_dtype else (),
            scales=self.quantization.scales,
            tp_sizes=self.tp_sizes,
        )

    def error(self, code: str, subject: str, detail: str, where: str = "") -> None:
        self.failed = True
        self.findings.append(Finding(Severity.ERROR, code, subject, detail, where))

    def dtype(self) -> str:
        """The checkpoint's dtype.

        ``auto`` is what TensorRT-LLM's own converters do since 0.16: the source's, but float16 for
        float32. A config that names none is answered from the tensors.
        """
        if self.options.dtype != "auto":
            return self.options.dtype
        stated = self.hf.get("dtype") or self.hf.get("torch_dtype")
        if stated is None:
            sizes: Counter[str] = Counter()
            for tensor in self.source.tensors.values():
                sizes[tensor.dtype] += tensor.nbytes
            codes = {code: name for name, code in WEIGHT_DTYPES.items()}
            stated = next((codes[c] for c, _ in sizes.most_common() if c in codes), "float16")
        name = str(stated).removeprefix("torch.")
        if name not in WEIGHT_DTYPES:
            detail = f"is {stated!r}; known are {', '.join(WEIGHT_DTYPES)}"
            self.error("dtype", "torch_dtype", detail)
            return "float16"
        return "float16" if name == "float32" and self.target.by_rank else name

    def settle(self, fields: dict[str, Any]) -> Rules:
        """Settle names, adapter and ties of the source; ``fields`` gets the final value of ties."""
        untied = self.rules({**fields, TIES: False} if TIES in fields else fields)
        self.source, notes = unwrapped(self.source, untied)
        self.findings += notes
        if (adapter := self.source.adapter) is not None:
            self.source, notes = merge_adapter(self.source, adapter, untied)
            self.findings += notes
        if TIES not in fields:
            return untied
        ties = settle_ties(fields[TIES], self.options.readings.tie, self.source, untied)
        self.source = ties.source
        self.findings += ties.findings
        fields[TIES] = ties.tied
        return self.rules(fields) if ties.tied else untied

    def rules(self, fields: Mapping[str, Any]) -> Rules:
        hf = self.hf.having(TIES, fields[TIES]) if TIES in fields else self.hf
        return self.family.weight_rules(fields, hf)

    def documents(self, fields: Mapping[str, Any], dtype: str) -> dict[str, dict[str, Any]]:
        model = WrittenModel(fields, self.hf, dtype, self.quantization.facts(), self.options.ranks)
        files = ask(self.target, Target.config_files, model)
        check_files(self.target, files)
        return files

    def outputs(self, rules: Rules, code: str) -> tuple[Output, ...]:
        """Every tensor of every rank, not placed in files yet; findings on the way."""
        self.check_ranks(rules)
        outputs: list[Output] = []
        mapped: set[str] = set()
        owners: dict[str, dict[str, Axis]] = {"weight": {}, "bias": {}}
        quantized = self.quantization.targets()
        for rule in rules.values():
            for companion, alternatives in rule.tensors.items():
                rows = self.choose(alternatives, companion)
                owners[companion][rule.target] = rows
                self.check_sources(rule, companion, rows, mapped)
                made = self.shards(rule, companion, rows, rule.dtype or code, FOLLOWS[companion])
                if companion == "weight" and rule.cols and rule.target in quantized:
                    made = map(self.quantization.packed, made)
                elif factor := self.quantization.folding.factor(rule.target):
                    made = (dataclasses.replace(output, factor=factor) for output in made)
                outputs += made
            if rule.cols is not None:
                columns = {OWN_COLUMNS: rule.cols.length}
                for problem in check_partition({rule.target: rule.cols}, columns):
                    self.error("columns", rule.target, problem, rule.where)
        for companion, axes in owners.items():
            sources = {name: count for axis in axes.values() for name, count in axis.sources}
            for problem in check_partition(axes, sources):
                self.error("partition", f"rows of every {companion}", problem)
        self.check_unmapped(mapped, rules)
        problems = list(obstacles(self.quantization, rules, owners["weight"]))
        for subject, detail, where in problems:
            self.error("quant", subject, detail, where)
        if not problems:
            for target in quantized:
                outputs += self.scales(rules[target], owners["weight"][target], code)
            outputs += self.quantization.kv_outputs(self.options.tp_size)
        return tuple(outputs)

    def scales(self, rule: Rule, rows: Axis, code: str) -> Iterator[Output]:
        """The scales of a quantized linear, cut over ranks as its weight is."""
        for companion, stored in self.quantization.add(rule, rows).items():
            if companion == SHAPE:
                yield self.quantization.shape_output(rule)
                continue
            kind = stored.code or code
            follows = self.quantization.declare(rule, companion, rows, kind)
            if companion == PRE_SCALE and self.quantization.linears[-1].folded:
                continue
            groups = self.quantization.groups(rule) if companion == WEIGHT_SCALE else None
            for output in self.shards(rule, companion, rows, kind, follows):
                if groups is not None:
                    _, cols = held(rule, rows, rule.cols, self.options.ranks, output.rank)
                    output = by_group(output, groups, rule, _kept(cols))
                name, shape = f"{rule.target}.{stored.name}", stored.sizes(output.shape)
                yield dataclasses.replace(output, name=name, shape=shape)

    def choose(self, alternatives: tuple[Axis, ...], companion: str) -> Axis:
        """The first alternative whose sources all exist, else some of them, else the first."""

        def present(axis: Axis) -> list[bool]:
            return [f"{name}.{companion}" in self.source.tensors for name, _ in axis.sources]

        for test in (all, any):
            for axis in alternatives:
                if test(present(axis)):
                    return axis
        return alternatives[0]

    def check_sources(self, rule: Rule, companion: str, rows: Axis, mapped: set[str]) -> None:
        cols = rule.cols if "cols" in FOLLOWS[companion] else None
        for module, count in rows.sources:
            name = f"{module}.{companion}"
            if name in mapped:
                continue
            mapped.add(name)
            shape = (count,) if cols is None else (count, cols.length)
            tensor = self.source.tensors.get(name)
            if tensor is None:
                self.error("missing", name, f"needed by {rule.target}", rule.where)
            elif tensor.shape != shape:
                detail = f"is {list(tensor.shape)}, the config says {list(shape)}"
                self.error("shape", name, detail, rule.where)
            elif tensor.dtype not in WEIGHT_DTYPES.values():
                detail = f"is {tensor.dtype}; unquantized weights are {_LISTED_CODES}"
                self.error("dtype", name, detail, rule.where)

    def shards(
        self, rule: Rule, companion: str, rows: Axis, code: str, follows: tuple[str, ...]
    ) -> Iterator[Output]:
        """A tensor of a module on every rank, cut along the axes that it follows."""
        ranks = self.options.ranks
        cols = rule.cols if "cols" in follows else None
        # With an error there will be no outputs: those of one rank are enough to check.
        for rank in range(1 if self.failed else ranks.tp_size):
            try:
                rank_rows, rank_cols = held(rule, rows, cols, ranks, rank)
            except LayoutError:
                return  # check_ranks reports it
            own = f"{rule.target}.{companion}"
            if "rows" in follows:
                spans = tuple(
                    dataclasses.replace(span, source=span.source and f"{span.source}.{companion}")
                    for span in rank_rows.spans
                )
                sizes = (rank_rows.length, *(() if rank_cols is None else (rank_cols.length,)))
                if experts := rule.experts // ranks.moe_ep_size:
                    sizes = (experts, sizes[0] // experts, *sizes[1:])
            elif "experts" in follows:
                count = rule.experts // ranks.moe_ep_size
                spans = (Span(own, rank % ranks.moe_ep_size * count, count),)
                sizes = (count, 1)
            elif rank_cols is not None:
                spans = tuple(dataclasses.replace(span, source=own) for span in rank_cols.spans)
                sizes = (rank_cols.length,)
            else:
                spans, sizes = (Span(own, 0, 1),), (1,)
            computed = companion not in ("weight", "bias")
            origin = Scale(spans) if computed else Rows(spans, _kept(rank_cols))
            yield Output(rank, own, code, sizes, 0, origin)

    def check_ranks(self, rules: Rules) -> None:
        ranks = self.options.ranks
        mixtures = [rule for rule in rules.values() if rule.experts]
        if self.options.moe_ep_size is not None and not mixtures:
            self.error("sharding", self.family.name, "has no experts to divide or share out")
            return
        for rule in mixtures:
            if rule.experts % ranks.moe_ep_size:
                detail = f"{rule.experts} experts do not divide over {ranks.moe_ep_size} ranks"
                self.error("sharding", rule.target, detail, rule.where)
                return
        self.tp_sizes = tuple(tp_sizes(rules, ranks.moe_ep_size))
        for rule, parts in groupby(undivided(rules, ranks), key=itemgetter(0)):
            texts = [
                f"{part.length // part.unit} {f'units of {part.unit}' if part.unit > 1 else 'rows'}"
                f" of part '{part.name}'"
                for _, part in parts
            ]
            over = ranks.moe_tp_size if rule.experts else ranks.tp_size
            detail = f"{', '.join(texts)} cannot be divided over {over} ranks"
            self.error("sharding", rule.target, detail, rule.where)

    def check_unmapped(self, mapped: set[str], rules: Rules) -> None:
        for name in self.source.tensors:
            if name in mapped:
                continue
            reason = _CONSTANT if name.endswith(CONSTANT_BUFFERS) else rules.drop.get(name)
            if reason is not None:
                self.findings.append(Finding(Severity.NOTE, "dropped", name, reason))
            else:
                self.error("unmapped", name, "is in the source, and no rule maps it")

    def check_schema(self, config: Mapping[str, Any], outputs: tuple[Output, ...]) -> None:
        """Compare the targets of the family with the tensors that the reader requires."""
        required = required_tensors(config, self.options.tp_size)
        if required is None:
            detail = "phireg does not know what the reader requires of it"
            architecture = str(config["architecture"])
            self.findings.append(Finding(Severity.WARNING, "schema", architecture, detail))
            return
        if any(finding.code in ("sharding", "quant") for finding in self.findings):
            return
        by_name = {output.name: output for output in outputs}
        for name, (code, shape) in required.items():
            output = by_name.get(name)
            if output is None:
                self.error("schema", name, "the reader requires it, and no rule makes it")
                continue
            for actual, expected in ((list(output.shape), list(shape)), (output.dtype, code)):
                if actual != expected:
                    detail = f"would be {actual}; the reader expects {expected}"
                    self.error("schema", name, detail)
                    break
        for name in by_name.keys() - required.keys():
            self.error("schema", name, "is made by a rule, and the reader does not know it")


def _kept(cols: Axis | None) -> tuple[Span, ...] | None:
    if cols is None:
        return None
    whole = (Span(OWN_COLUMNS, 0, dict(cols.sources)[OWN_COLUMNS]),)
    return None if cols.spans == whole else cols.spans
