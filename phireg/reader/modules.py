"""The modules of a Hugging Face directory: their tensors, and the blueprint's linears in them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from phireg.dtypes import WEIGHT_DTYPES
from phireg.formats import WEIGHT_BITS
from phireg.reader.config import Config
from phireg.reader.layouts import Layout, parse_layout
from phireg.reader.models import EMBEDDING, HEAD, Model, Order, find_model, parse_model
from phireg.reader.schemes import Quantization
from phireg.reader.spec import ModelSpec
from phireg.reader.storage import ANY_FLOAT, Part, Storage
from phireg.reader.structure import Deviation
from phireg.reader.tensors import EMBEDDING as TABLE
from phireg.reader.tensors import ROUTER, Kind, layer_prefix

_ROTARY = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""A constant that Phi-3-small's class saves, rounded to its dtype, and computes again."""

_FLOATS = tuple(WEIGHT_DTYPES.values())


@dataclass(frozen=True, slots=True)
class Module:
    """A linear of the directory; ``storage`` is None for the model's dtype."""

    name: str
    rows: int
    columns: int
    bias: bool
    storage: Storage | None

    def parts(self, code: str) -> dict[str, Part]:
        """Return its tensors by what they are, without the bias; ``code`` is the model's dtype."""
        if self.storage is None:
            return {"weight": Part("weight", code, (self.rows, self.columns))}
        return self.storage.parts(self.rows, self.columns, code)


@dataclass(frozen=True, slots=True)
class Directory:
    """What config.json and ``hf_quant_config.json`` say of a directory."""

    spec: ModelSpec  # the meaning of the blueprint's tensors; one rank
    layout: Layout
    row: Model
    tied: bool  # lm_head is the embedding

    @property
    def code(self) -> str:
        """The safetensors code of the model's dtype."""
        return WEIGHT_DTYPES[self.spec.dtype]

    def layer(self, index: int) -> str:
        """Return what stands before a layer's names."""
        return f"model.layers.{index}."

    def linear(self, index: int, name: str) -> list[tuple[Module, ...]]:
        """Return the modules of a blueprint's linear: of each expert, or those of the layer."""
        linear, spec = self.row.linears[name], self.spec
        size, inner = spec.head_size, spec.intermediate_size
        queries, keys = spec.num_heads * size, spec.num_kv_heads * size
        columns = spec.hidden_size
        if name == "attention.qkv":
            rows = [queries, keys, keys] if len(linear.modules) == 3 else [queries + 2 * keys]
        elif name == "attention.dense":
            rows, columns = [spec.hidden_size], queries
        elif name == "mlp.proj":
            rows, columns = [spec.hidden_size], inner
        else:
            gated = spec.activation != "gelu_tanh"
            rows = [inner] * 2 if len(linear.modules) == 2 else [(1 + gated) * inner]
        of_expert = name.startswith("mlp.") and spec.experts is not None
        bias = (
            spec.architecture.attention_bias if "attention" in name else spec.architecture.mlp_bias
        )
        prefixes = [self.layer(index)]
        if of_expert and spec.experts is not None:
            numbers = range(spec.experts.count)
            prefixes = [self.layer(index) + self.row.experts.format(e) for e in numbers]
        return [
            tuple(
                self._module(prefix + module, count, columns, bias)
                for module, count in zip(linear.modules, rows, strict=True)
            )
            for prefix in prefixes
        ]

    def order(self, name: str) -> Order:
        """Return in which order a linear's module has its rows."""
        return self.row.linears[name].order

    def head(self) -> Module | None:
        """Return lm_head, or None where it is the embedding."""
        if self.tied:
            return None
        bias = self.spec.architecture.lm_head_bias
        return self._module(HEAD, self.spec.vocab_size, self.spec.hidden_size, bias)

    def modules(self) -> Iterator[Module]:
        """Yield every linear."""
        for index in range(self.spec.num_layers):
            for name in self.row.linears:
                for modules in self.linear(index, name):
                    yield from modules
        if (head := self.head()) is not None:
            yield head

    def renamed(self, index: int | None = None) -> Iterator[tuple[str, str]]:
        """Yield names of whole tensors in the blueprint and here: norms, router, embedding.

        They are those of a layer, or with None those that belong to no layer.
        """
        parts = ("weight", "bias") if self.spec.architecture.norm == "layer_norm" else ("weight",)
        for ours, theirs in self.row.norms.items():
            inside = not ours.startswith("transformer.")
            if inside == (index is not None):
                prefix = "" if index is None else self.layer(index)
                for part in parts:
                    yield f"{ours}.{part}", f"{prefix}{theirs}.{part}"
        if index is None:
            yield TABLE, f"{EMBEDDING}.weight"
        elif self.row.router:
            yield ROUTER, f"{self.layer(index)}{self.row.router}.weight"

    def cache_scales(self, index: int) -> dict[str, str]:
        """Return the names of a layer's scales of keys ("k") and values ("v")."""
        prefix = f"{self.layer(index)}self_attn."
        return {what: prefix + p.name for what, p in self.layout.cache_parts(self.code).items()}

    def tensors(self) -> dict[str, Part]:
        """Return every tensor the directory must or may have, by its whole name."""
        spec, code = self.spec, self.code
        tensors: dict[str, Part] = {}

        def add(name: str, part_code: str, shape: tuple[int, ...], required: bool = True) -> None:
            tensors[name] = Part(name, part_code, shape, required)

        for index in (None, *range(spec.num_layers)):
            for ours, name in self.renamed(index):
                shape: tuple[int, ...] = (spec.hidden_size,)
                if ours == TABLE:
                    shape = (spec.vocab_size, spec.hidden_size)
                elif ours == ROUTER and spec.experts is not None:
                    shape = (spec.experts.count, spec.hidden_size)
                add(name, code, shape)
            if index is not None:
                for what, part in self.layout.cache_parts(code).items():
                    add(self.cache_scales(index)[what], part.code, part.shape)
        for module in self.modules():
            for part in module.parts(code).values():
                add(f"{module.name}.{part.name}", part.code, part.shape, part.required)
            if module.bias:
                add(f"{module.name}.bias", code, (module.rows,))
        if self.tied:
            add(f"{HEAD}.weight", code, (spec.vocab_size, spec.hidden_size), required=False)
        return tensors

    def blueprint_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the blueprint's tensors, none of them quantized, by whole names."""
        known = self.tensors()
        shapes = {}
        for index in (None, *range(self.spec.num_layers)):
            prefix = "" if index is None else layer_prefix(index)
            for ours, theirs in self.renamed(index):
                shapes[prefix + ours] = known[theirs].shape
            for name in () if index is None else self.row.linears:
                experts = self.linear(index or 0, name)
                rows = sum(module.rows for module in experts[0])
                stacked = self.spec.experts is not None and name.startswith("mlp.")
                count = (len(experts),) if stacked else ()
                shapes[f"{prefix}{name}.weight"] = (*count, rows, experts[0][0].columns)
                if experts[0][0].bias:
                    shapes[f"{prefix}{name}.bias"] = (*count, rows)
        shapes["lm_head.weight"] = shapes[TABLE]
        if (head := self.head()) is not None and head.bias:
            shapes["lm_head.bias"] = (head.rows,)
        return shapes

    def deviations(self, tensors: Mapping[str, Kind]) -> Iterator[Deviation]:
        """Compare the tensors of all shards with what must be there."""
        for module in self.modules():
            problem = module.storage and module.storage.problem(module.rows, module.columns)
            if problem:
                yield Deviation(module.name, f"cannot be quantized so: {problem}", False)
        known = self.tensors()
        for name, part in known.items():
            kind = tensors.get(name)
            if kind is None:
                if part.required:
                    yield Deviation(name, "is missing", False)
                continue
            code, shape = kind
            if shape != part.shape:
                scalar = {shape, part.shape} == {(), (1,)}
                text = f"is {list(shape)}, not {list(part.shape)}"
                yield Deviation(name, text, scalar)
            if code != part.code and not (part.code == ANY_FLOAT and code in _FLOATS):
                expected = part.code or "one of " + ", ".join(_FLOATS)
                yield Deviation(name, f"is {code}, not {expected}", False)
        for name in sorted(tensors.keys() - known.keys()):
            if _ROTARY.fullmatch(name):
                yield Deviation(name, "is computed again by readers", True)
            else:
                yield Deviation(name, "has no place in the model", False)

    def _module(self, name: str, rows: int, columns: int, bias: bool) -> Module:
        return Module(name, rows, columns, bias, self.layout.storage(name))


def parse_directory(
    values: Mapping[str, Any], sidecar: Mapping[str, Any] | None, where: str = "config.json"
) -> Directory:
    """Read config.json and ``hf_quant_config.json``; a CheckError for what has no meaning."""
    spec = parse_model(values, where)
    layout = parse_layout(values, sidecar, where)
    config = Config(values, where)
    row = find_model(config)
    tied = config.flag("tie_word_embeddings", default=row.tied)
    whole = Directory(spec, layout, row, tied)
    bits = [WEIGHT_BITS[m.storage.form.weight] for m in whole.modules() if m.storage is not None]
    quantization = Quantization(
        layout.algorithm if bits else None, layout.cache, bits=min(bits, default=8)
    )
    return replace(whole, spec=replace(spec, quantization=quantization))
