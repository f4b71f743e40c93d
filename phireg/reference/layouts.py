"""Where a parameter of a transformers model lies in files of other layouts.

Written from the code that published those files, apart from the rules of the families.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Parts:
    """What a parameter is made of: tensors one below the other, or a third of one tensor's rows."""

    tensors: tuple[str, ...]
    third: int | None = None  # of each of ``groups`` blocks of rows
    groups: int = 1

    def assemble(self, values: Sequence[Tensor]) -> Tensor:
        """Return the parameter."""
        rows = values[0] if len(values) == 1 else torch.cat(list(values))
        if self.third is None:
            return rows
        return rows.unflatten(0, (self.groups, 3, -1))[:, self.third].flatten(0, 1)


def locate(
    names: Sequence[str], present: Collection[str], *, heads: int, layers: int
) -> dict[str, Parts | None]:
    """Find the parts of parameters in files, all in the layout that lacks the fewest of them."""

    def parts_of(layout: Callable[[str], Iterator[Parts]]) -> dict[str, Parts | None]:
        return {
            name: next((p for p in layout(name) if all(t in present for t in p.tensors)), None)
            for name in names
        }

    layouts: tuple[Callable[[str], Iterator[Parts]], ...] = (
        _current,
        lambda name: _current(name.removeprefix("model.")),  # saved from the class without head
        lambda name: _fused_by_head(name, heads),
        _original,
        lambda name: _sequential(name, layers),
    )
    return min(map(parts_of, layouts), key=lambda parts: list(parts.values()).count(None))


SEPARATE = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Linears that Phi-3 fuses and Llama does not; fine-tuning tools save either."""


def _current(name: str) -> Iterator[Parts]:
    yield Parts((name,))
    for fused, parts in SEPARATE.items():
        if f".{fused}." in name:
            yield Parts(tuple(name.replace(f".{fused}.", f".{part}.") for part in parts))


def _fused_by_head(name: str, heads: int) -> Iterator[Parts]:
    """Transformers 4.36: rows of query_key_value are query, key and value of each head."""
    if match := re.fullmatch(r"(.+\.self_attn)\.([qkv])_proj\.(\w+)", name):
        attention, which, kind = match.groups()
        yield Parts((f"{attention}.query_key_value.{kind}",), "qkv".index(which), heads)
    yield Parts((name,))


def _original(name: str) -> Iterator[Parts]:
    """Phi-2 as first published."""
    yield _moved(name, "transformer.embd.wte", "transformer.h", 0, "lm_head.ln", "lm_head.linear")


def _sequential(name: str, layers: int) -> Iterator[Parts]:
    """Phi-1 and Phi-1.5 as first published: the embedding is layer 0 and the head the last."""
    last = f"layers.{layers + 1}"
    yield _moved(name, "layers.0.wte", "layers", 1, f"{last}.ln", f"{last}.linear")


_MODULES = {"input_layernorm": "ln", "self_attn.dense": "mixer.out_proj"}


def _moved(name: str, embedding: str, layer: str, first: int, norm: str, head: str) -> Parts:
    """Wqkv of those files holds all queries, all keys, all values."""
    module, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
        prefix, inner = f"{layer}.{int(match[1]) + first}", match[2]
        if which := re.fullmatch(r"self_attn\.([qkv])_proj", inner):
            return Parts((f"{prefix}.mixer.Wqkv.{kind}",), "qkv".index(which[1]))
        return Parts((f"{prefix}.{_MODULES.get(inner, inner)}.{kind}",))
    ends = {"model.embed_tokens": embedding, "model.final_layernorm": norm, "lm_head": head}
    return Parts((f"{ends.get(module, module)}.{kind}",))
