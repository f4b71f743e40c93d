"""What forbids the quantization of a plan, and what its user should know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from phireg.findings import UNMEASURED, Finding, Severity
from phireg.formats import FORMATS
from phireg.layout.ranks import held
from phireg.layout.rules import Rule, Rules
from phireg.layout.spans import Axis, LayoutError
from phireg.planning.model import Output
from phireg.planning.quantized import HEAD, Quantization
from phireg.targets.target import PACKINGS

FP8_ALIGNMENT = 16
"""TensorRT's FP8 matrix products want both sides of a rank's weight to be multiples of this."""


def obstacles(
    quant: Quantization, rules: Rules, axes: Mapping[str, Axis]
) -> Iterator[tuple[str, str, str]]:
    """Errors of the family's quantization rules (subject, detail, place); ``axes`` are row maps."""
    if quant.kv_cache and not quant.rules.kv_caches:
        yield "KV cache", "the family's quantization rules name no attention module", ""
    if quant.format is None or quant.layout is None:
        return
    names = {*quant.rules.linears, *quant.rules.exclude_modules}
    for pattern in quant.options.exclude:
        if not any(fnmatchcase(name, pattern) for name in names):
            yield pattern or "''", "is the pattern of no module (--exclude)", ""
    if not quant.rules.linears and quant.options.exclude:
        yield quant.format.name, "nothing is left that is quantized to it (--exclude)", ""
    elif not quant.rules.linears:
        none = "the family's quantization rules name no linears for it"
        yield quant.format.name, "; ".join((none, *quant.rules.notes)), ""
    if quant.options.quantize_lm_head and HEAD not in rules:
        yield HEAD, "is the embedding, which stays unquantized (--quantize-lm-head)", ""
    elif quant.options.quantize_lm_head and HEAD not in quant.rules.linears:
        yield HEAD, "is to be quantized (--quantize-lm-head) and left out (--exclude)", ""
    readers: dict[str, list[str]] = {}
    for target, axis in axes.items():
        for module, _ in axis.sources:
            readers.setdefault(module, []).append(target)
    for target in quant.rules.linears:
        rule = rules.get(target)
        if rule is None:
            yield target, "the quantization rules name it, and no weight rule makes it", ""
        elif rule.cols is None:
            yield target, "has no input features, so it cannot be quantized", rule.where
        elif rule.experts and quant.format.name != "fp8":
            yield target, "experts can be quantized to fp8 alone", rule.where
        elif quant.layout.weight is None:
            continue
        elif unfit := _unfit(quant, rule, axes[target]):
            yield target, unfit, rule.where
        elif any(p.padded or None in (s.source for s in p.spans) for p in axes[target].parts):
            yield target, "has padded rows, which have no scale", rule.where
        elif rule.experts and not _separate(rule.experts, axes[target]):
            detail = "its experts share source modules, so their scales cannot be told apart"
            yield target, detail, rule.where
        else:
            for module, _ in axes[target].sources:
                if others := [name for name in readers[module] if name != target]:
                    detail = f"is made of {module}, which {', '.join(others)} reads as well"
                    yield target, f"{detail}: its scale would not be its own", rule.where


def _unfit(quant: Quantization, rule: Rule, rows: Axis) -> str | None:
    """Why the sizes of a linear do not fit the format on every rank."""
    assert quant.format is not None and quant.layout is not None
    size, pair = quant.format.group_size or 1, PACKINGS[quant.layout.packing][0]
    ranks = quant.options.ranks
    if size == 1:
        return None
    for rank in range(ranks.tp_size):
        try:
            rank_rows, rank_cols = held(rule, rows, rule.cols, ranks, rank)
        except LayoutError:
            return None  # the plan has an error that says so
        on_rank = f" on rank {rank} of {ranks.tp_size}" if ranks.tp_size > 1 else ""
        if rank_cols and any(s.start % size or s.count % size for s in rank_cols.spans):
            plain = [name for name in quant.target.formats if FORMATS[name].group_size is None]
            ways = [
                *(["take fewer ranks"] if on_rank else []),
                *([f"take a format without groups ({', '.join(plain)})"] if plain else []),
            ]
            if not quant.target.by_rank:
                ways.append(f"leave it out (--exclude '*.{rule.target.rpartition('.')[2]}')")
            return (
                f"has {rank_cols.length} inputs{on_rank}, which are no groups of {size}: "
                f"{', or '.join(ways)}"
            )
        if any(span.start % pair or span.count % pair for span in rank_rows.spans):
            return f"has {rank_rows.length} rows{on_rank} that make no pairs of neighbors"
    return None


def remarks(
    quant: Quantization, config: Mapping[str, Any], outputs: tuple[Output, ...]
) -> Iterator[Finding]:
    """Warnings and notes, which do not forbid the conversion."""
    for note in quant.rules.notes if quant.rules.linears else ():
        yield Finding(Severity.NOTE, "quant", str(config["architecture"]), note)
    if quant.kv_cache == "fp8" and (
        config.get("position_embedding_type") == "long_rope"
        or "longrope_scaling_short_factors" in config
    ):
        detail = (
            "three bits of mantissa hold keys whose angles differ little far apart, and "
            "calibration texts are short: compare long prompts first"
        ) + (", or use int8" if "int8" in quant.target.kv_caches else "")
        yield Finding(Severity.WARNING, "kv-cache", "FP8 on a long-rope model", detail)
    if quant.kv_cache is not None and config.get("architecture") == "PhiForCausalLM":
        detail = (
            "phi-2 with an FP8 cache was reported to have a perplexity 44% higher (LAMBADA, "
            "5.90 to 8.51; optimum-habana PR 902); quantize --measure tells what it costs here"
        )
        yield Finding(Severity.NOTE, UNMEASURED, "KV cache of 8 bits", detail)
    if quant.layout is None or quant.layout.weight != "F8_E4M3" or not quant.target.by_rank:
        return
    for output in outputs:
        quantized = output.dtype == quant.layout.weight and output.rank == 0
        if quantized and any(size % FP8_ALIGNMENT for size in output.shape[-2:]):
            detail = (
                f"is {list(output.shape)} on each rank; TensorRT's FP8 kernels want multiples "
                f"of {FP8_ALIGNMENT}"
            )
            yield Finding(Severity.WARNING, "alignment", output.name, detail)


def _separate(experts: int, rows: Axis) -> bool:
    """Return whether every stacked expert has source modules of its own, and all equally many."""
    share = len(rows.parts) // experts
    owners = [
        {span.source for part in rows.parts[start : start + share] for span in part.spans}
        for start in range(0, len(rows.parts), share)
    ]
    return len(set(map(len, owners))) == 1 and sum(map(len, owners)) == len(rows.sources)
