"""Hugging Face directories: every module under the name of the published model.

The family's rules say which rows of a source make a TensorRT-LLM module, for the published layout
and for older ones. Read from the other side, they say how the published modules are made of
whichever layout the source has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from phireg.config.hf import HFConfig
from phireg.layout.axes import columns, src
from phireg.layout.rules import Policy, QuantRules, Rule, Rules
from phireg.layout.spans import Axis, Part, Span, aligned, change_parts, coalesce
from phireg.targets.llama import llama_config, llama_problems, llama_rules
from phireg.targets.target import Target, WrittenModel

FORMS = ("llama",)
"""Values of ``--as``."""

_CODE_KEYS = ("auto_map",)
"""Keys of config.json that name code, which no directory of phireg's carries."""


def published(axes: Sequence[Axis]) -> dict[str, tuple[Axis, ...]]:
    """Return the modules of the first of some alternatives, each made of every one of them.

    All alternatives describe the same target rows. Modules whose rows belong to another target
    (tied heads) are left out.
    """
    first = axes[0]
    owned = {span.source for span in first.spans if not span.shared}
    return {
        module: tuple(_pull(first, axis, module, count) for axis in axes)
        for module, count in first.sources
        if module in owned
    }


def _pull(first: Axis, other: Axis, module: str, count: int) -> Axis:
    """Return the rows of a module of ``first`` by where ``other`` has them."""
    if other is first:
        return src(module, count)
    pieces = [
        (ours.start, theirs)
        for ours, theirs in aligned(first.spans, other.spans)
        if ours.source == module and not ours.shared
    ]
    spans = coalesce(span for _, span in sorted(pieces, key=lambda piece: piece[0]))
    used = {span.source for span in spans}
    sources = tuple(source for source in other.sources if source[0] in used)
    return Axis((Part("rows", spans),), sources)


def published_rules(rules: Rules) -> Rules:
    """Return rules whose targets are the modules of the published model."""
    made: dict[str, Rule] = {}
    for rule in rules.values():
        cols = None if rule.cols is None else columns(rule.cols.length)
        plain = Rule("", (), (), cols, Policy.COPY, rule.where)
        for companion, alternatives in rule.tensors.items():
            for module, axes in published(alternatives).items():
                known = made.get(module, replace(plain, target=module))
                if companion == "weight":
                    made[module] = replace(known, weight=axes)
                else:
                    made[module] = replace(known, bias=axes)
    return Rules(*made.values(), drop=rules.drop)


def modules_of(rules: Rules) -> dict[str, tuple[str, ...]]:
    """Return the published modules of every TensorRT-LLM module."""
    return {target: tuple(published(rule.weight)) for target, rule in rules.items()}


@dataclass(frozen=True, kw_only=True)
class HuggingFace(Target):
    """A directory of the published layout; subclasses add what their quantized ones have.

    Attributes:
        form: the class of models that it is written as: the source's own (None) or ``llama``.
    """

    form: str | None = None

    def written_as(self, form: str | None) -> Target:
        """Return the target that writes models as Llama's class, for ``llama``."""
        if form not in FORMS or self.layouts:
            return super().written_as(form)
        return replace(self, form=form)

    def problems(self, fields: Mapping[str, Any], hf: HFConfig) -> Iterator[tuple[str, str]]:
        """Refuse configs of code that no library has, and what Llama cannot compute."""
        if self.form == "llama":
            yield from llama_problems(fields, hf)
        elif hf.model_type in ("phi-msft", "mixformer-sequential"):
            yield (
                "model_type",
                f"is {hf.model_type}, the config of code that came with the model; readers know "
                "phi's: take config.json of microsoft/phi-2",
            )

    def rules(self, rules: Rules, fields: Mapping[str, Any]) -> Rules:
        """Return the rules of the published modules, or of Llama's."""
        if self.form == "llama":
            rules = llama_rules(rules, fields["num_hidden_layers"])
            return Rules(*(replace(r, policy=Policy.COPY) for r in _owned(rules)), drop=rules.drop)
        return published_rules(rules)

    def quantized_modules(self, quant: QuantRules, rules: Rules) -> QuantRules:
        """Return the published modules of the linears, and the attention modules of the caches."""
        modules = modules_of(rules)
        linears = [name for target in quant.linears for name in modules.get(target, ())]
        attention = [modules[f"{cache}.qkv"][0].rpartition(".")[0] for cache in quant.kv_caches]
        return replace(quant, linears=tuple(linears), kv_caches=tuple(attention))

    def shared_inputs(self, rules: Rules) -> Mapping[str, tuple[str, ...]]:
        """Return the projections that see a norm: q, k, v, and fc1, of which both may see one."""
        modules, groups = modules_of(rules), {}
        for target in rules:
            layer, dot, name = target.partition(".attention.qkv")
            if not dot or name:
                continue
            parallel = f"{layer}.post_layernorm" not in rules
            (norm,) = modules[f"{layer}.input_layernorm"]
            first = modules.get(f"{layer}.mlp.fc", ())
            groups[norm] = modules[target] + (first if parallel else ())
            if first and not parallel and not rules[f"{layer}.mlp.fc"].experts:
                (norm,) = modules[f"{layer}.post_layernorm"]
                groups[norm] = first
        return groups

    def fed_rows(
        self, rules: Rules, fields: Mapping[str, Any]
    ) -> Mapping[str, tuple[str, tuple[Span, ...]]]:
        """Return v's rows if each feeds one head, and up's behind SiLU's gate; without biases."""
        modules, fed = modules_of(rules), {}
        for target, rule in rules.items():
            rest = target.rpartition(".layers.")[2].partition(".")[2]
            after = {"attention.qkv": "v", "mlp.fc": "up"}.get(rest)
            if after is None or rule.bias or rule.experts:
                continue
            if rest == "mlp.fc" and fields.get("hidden_act") != "swiglu":
                continue
            prefix = target.removesuffix(rest)
            following = rules[prefix + {"attention.qkv": "attention.dense"}.get(rest, "mlp.proj")]
            spans = [s for part in rule.weight[0].parts if part.name == after for s in part.spans]
            sources = {span.source for span in spans}
            if following.cols is None or len(sources) != 1:
                continue
            if sum(span.count for span in spans) == following.cols.length:
                (linear,), (source,) = modules[following.target], sources
                fed[linear] = str(source), tuple(spans)
        return fed

    def config_files(self, model: WrittenModel) -> dict[str, dict[str, Any]]:
        """Return config.json: the source's, without code, and with the final dtype and ties."""
        if self.form == "llama":
            config = llama_config(model.fields, model.hf)
            return {"config.json": config | {"torch_dtype": model.dtype}}
        config = {key: value for key, value in model.hf.plain().items() if key not in _CODE_KEYS}
        config["dtype" if "dtype" in config else "torch_dtype"] = model.dtype
        if "tie_word_embeddings" in model.fields:
            config["tie_word_embeddings"] = model.fields["tie_word_embeddings"]
        return {"config.json": config}


def _owned(rules: Rules) -> Iterator[Rule]:
    """Yield the rules of modules that own rows: not those of tied heads."""
    for rule in rules.values():
        if published(rule.weight):
            # Ranks' padding of the vocabulary has no place here.
            axes = (change_parts(x, lambda part: replace(part, padded=False)) for x in rule.weight)
            yield replace(rule, weight=tuple(axes))


TARGET = HuggingFace(name="hf", summary="an unquantized Hugging Face directory", api=1)
