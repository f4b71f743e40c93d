"""What TensorRT-LLM's reader requires of a Phi checkpoint: tensor names and per-rank shapes.

Written down apart from the families' rules, so that a mapping is held against the reader and not
against itself. Shapes follow TensorRT-LLM's layers: ColumnLinear cuts output features, RowLinear
cuts input features and keeps its bias whole on every rank, attention holds at least one KV head per
rank, the vocabulary of lm_head is rounded up to a multiple of the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Model:
    """What distinguishes one reader class from another."""

    post_layernorm: bool
    norm_bias: bool
    linear_bias: bool
    head_bias: bool
    fused_gate: bool


_MODELS = {
    "PhiForCausalLM": _Model(
        post_layernorm=False, norm_bias=True, linear_bias=True, head_bias=True, fused_gate=False
    ),
    "Phi3ForCausalLM": _Model(
        post_layernorm=True, norm_bias=False, linear_bias=False, head_bias=False, fused_gate=True
    ),
    "Phi3SmallForCausalLM": _Model(
        post_layernorm=True, norm_bias=True, linear_bias=True, head_bias=False, fused_gate=True
    ),
}


def required_tensors(config: Mapping[str, Any], tp_size: int) -> Shapes | None:
    """Every tensor the reader wants in each rank file of an unquantized checkpoint.

    Args:
        config: the checkpoint's config.json.
        tp_size: number of tensor-parallel ranks; sizes it does not divide are rounded up.

    Returns:
        Shapes by name, equal for all ranks; None for an architecture this table does not know.
    """
    model = _MODELS.get(config["architecture"])
    if model is None:
        return None

    def share(count: int) -> int:
        return -(-count // tp_size)

    hidden, size = config["hidden_size"], config["head_size"]
    vocab, inner = config["vocab_size"], share(config["intermediate_size"])
    heads, kv_heads = share(config["num_attention_heads"]), share(config["num_key_value_heads"])
    shapes: Shapes = {"transformer.vocab_embedding.weight": (vocab, hidden)}

    def linear(name: str, rows: int, cols: int, *, bias: bool) -> None:
        shapes[f"{name}.weight"] = (rows, cols)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = (hidden,)
        if model.norm_bias:
            shapes[f"{name}.bias"] = (hidden,)

    for i in range(config["num_hidden_layers"]):
        layer = f"transformer.layers.{i}"
        norm(f"{layer}.input_layernorm")
        linear(
            f"{layer}.attention.qkv",
            (heads + 2 * kv_heads) * size,
            hidden,
            bias=model.linear_bias,
        )
        linear(f"{layer}.attention.dense", hidden, heads * size, bias=model.linear_bias)
        if model.post_layernorm:
            norm(f"{layer}.post_layernorm")
        rows = 2 * inner if model.fused_gate else inner
        linear(f"{layer}.mlp.fc", rows, hidden, bias=model.linear_bias)
        linear(f"{layer}.mlp.proj", hidden, inner, bias=model.linear_bias)
    norm("transformer.ln_f")
    linear("lm_head", share(vocab), hidden, bias=model.head_bias)
    return shapes
