"""What TensorRT-LLM's reader requires of a Phi checkpoint: names, per-rank shapes and dtypes.

Written down apart from the families' rules, so that a mapping is held against the reader and not
against itself. Shapes follow TensorRT-LLM's layers: ColumnLinear cuts output features, RowLinear
cuts input features and keeps its bias whole on every rank, attention holds at least one KV head per
rank, the vocabulary of lm_head is rounded up to a multiple of the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from phireg.dtypes import WEIGHT_DTYPES

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Safetensors code and shape by name."""

RAW = (None, "W8A16", "W4A16")
"""Values of ``quant_algo`` whose weights are in the checkpoint's dtype: TensorRT-LLM's builder
quantizes them where there is something to quantize."""

KNOWN = (*RAW, "FP8", "W8A8_SQ_PER_CHANNEL")
"""Values of ``quant_algo`` whose tensors this module knows."""


@dataclass(frozen=True, slots=True)
class _Model:
    """What distinguishes one reader class from another."""

    post_layernorm: bool
    norm_bias: bool
    attention_bias: bool
    mlp_bias: bool
    head_bias: bool
    fused_gate: bool


_MODELS = {
    "PhiForCausalLM": _Model(
        post_layernorm=False,
        norm_bias=True,
        attention_bias=True,
        mlp_bias=True,
        head_bias=True,
        fused_gate=False,
    ),
    "Phi3ForCausalLM": _Model(
        post_layernorm=True,
        norm_bias=False,
        attention_bias=False,
        mlp_bias=False,
        head_bias=False,
        fused_gate=True,
    ),
    "Phi3SmallForCausalLM": _Model(
        post_layernorm=True,
        norm_bias=True,
        attention_bias=True,
        mlp_bias=True,
        head_bias=False,
        fused_gate=True,
    ),
    "PhiMoEForCausalLM": _Model(
        post_layernorm=True,
        norm_bias=True,
        attention_bias=True,
        mlp_bias=False,
        head_bias=True,
        fused_gate=True,
    ),
}


def required_tensors(config: Mapping[str, Any], tp_size: int) -> Tensors | None:
    """Every tensor the reader wants in each rank file.

    Quantized linears follow TensorRT-LLM's FP8Linear and SmoothQuantLinear: scales are parameters,
    so all of them must be there. With a list of ``exclude_modules`` the linears it names keep the
    checkpoint's dtype; ``lm_head`` always does.

    A config with ``moe`` has experts in the place of the MLP: one tensor for all experts of a rank,
    [experts, rows, columns], and a float32 router that is whole on every rank. Ranks divide each
    expert unless ``mapping`` has a ``moe_ep_size``, which shares the experts out.

    Args:
        config: the checkpoint's config.json, with a ``quant_algo`` out of :data:`KNOWN`.
        tp_size: number of tensor-parallel ranks; sizes it does not divide are rounded up.

    Returns:
        Code and shape by name, equal for all ranks; None for an architecture this table does not
        know. The code of what has the
        checkpoint's dtype is empty if that is not among ``phireg.dtypes.WEIGHT_DTYPES``.
    """
    model = _MODELS.get(config["architecture"])
    if model is None:
        return None

    def share(count: int) -> int:
        return -(-count // tp_size)

    code = WEIGHT_DTYPES.get(str(config["dtype"]), "")
    quantization = config.get("quantization") or {}
    algorithm = quantization.get("quant_algo")
    excluded = quantization.get("exclude_modules") or ()
    hidden, size = config["hidden_size"], config["head_size"]
    vocab, inner = config["vocab_size"], share(config["intermediate_size"])
    heads, kv_heads = share(config["num_attention_heads"]), share(config["num_key_value_heads"])
    table = (vocab, hidden)
    if config.get("use_parallel_embedding"):
        by_width = config.get("embedding_sharding_dim") == 1
        table = (vocab, share(hidden)) if by_width else (share(vocab), hidden)
    tensors: Tensors = {"transformer.vocab_embedding.weight": (code, table)}

    def linear(name: str, rows: int, cols: int, *, bias: bool) -> None:
        kind = code
        if name != "lm_head" and algorithm not in RAW and not is_excluded(name, excluded):
            kind = "F8_E4M3" if algorithm == "FP8" else "I8"
            per_tensor = algorithm == "FP8"
            tensors[f"{name}.weights_scaling_factor"] = ("F32", (1,) if per_tensor else (rows,))
            tensors[f"{name}.activation_scaling_factor"] = ("F32", (1,))
            if not per_tensor:
                tensors[f"{name}.prequant_scaling_factor"] = (code, (cols,))
        tensors[f"{name}.weight"] = (kind, (rows, cols))
        if bias:
            tensors[f"{name}.bias"] = (code, (rows,))

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = (code, (hidden,))
        if model.norm_bias:
            tensors[f"{name}.bias"] = (code, (hidden,))

    for i in range(config["num_hidden_layers"]):
        layer = f"transformer.layers.{i}"
        norm(f"{layer}.input_layernorm")
        linear(
            f"{layer}.attention.qkv",
            (heads + 2 * kv_heads) * size,
            hidden,
            bias=model.attention_bias,
        )
        if quantization.get("kv_cache_quant_algo"):
            tensors[f"{layer}.attention.kv_cache_scaling_factor"] = ("F32", (1,))
        linear(f"{layer}.attention.dense", hidden, heads * size, bias=model.attention_bias)
        if model.post_layernorm:
            norm(f"{layer}.post_layernorm")
        if moe := config.get("moe"):
            tensors |= _experts(f"{layer}.mlp", config, moe["num_experts"], tp_size, code)
            continue
        rows = 2 * inner if model.fused_gate else inner
        linear(f"{layer}.mlp.fc", rows, hidden, bias=model.mlp_bias)
        linear(f"{layer}.mlp.proj", hidden, inner, bias=model.mlp_bias)
    norm("transformer.ln_f")
    linear("lm_head", share(vocab), hidden, bias=model.head_bias)
    return tensors


def _experts(mlp: str, config: Mapping[str, Any], experts: int, tp_size: int, code: str) -> Tensors:
    """What a rank holds of the experts: TensorRT-LLM's MixtureOfExperts with a gated activation."""
    ep_size = (config.get("mapping") or {}).get("moe_ep_size", 1)
    hidden, own = config["hidden_size"], -(-experts // ep_size)
    inner = -(-config["intermediate_size"] // max(1, tp_size // ep_size))
    return {
        f"{mlp}.router.weight": ("F32", (experts, hidden)),
        f"{mlp}.fc.weight": (code, (own, 2 * inner, hidden)),
        f"{mlp}.proj.weight": (code, (own, hidden, inner)),
    }


def is_excluded(name: str, patterns: Sequence[str]) -> bool:
    """Whether the reader leaves a module alone: by pattern, in early releases by its last name."""
    leaf = name.rpartition(".")[2]
    return any(fnmatchcase(name, str(pattern)) or leaf == pattern for pattern in patterns)
