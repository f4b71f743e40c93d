"""Phi-3-small's weight rules: qkv rows per KV group, gelu and linear rows alternating."""

from collections.abc import Mapping
from typing import Any

import phireg.api as ph


@ph.hookimpl
def phireg_weight_rules(config: Mapping[str, Any], hf: ph.HFConfig) -> ph.Rules:
    """Map source rows to target modules."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    layers = config["num_hidden_layers"]
    embedding = ph.src("model.embed_tokens", vocab)
    ties = config["tie_word_embeddings"]
    return ph.Rules(
        ph.Table("transformer.vocab_embedding", embedding, hidden),
        *(rule for i in range(layers) for rule in layer(i, config)),
        ph.Norm("transformer.ln_f", ph.src("model.final_layernorm", hidden), bias=True),
        ph.Linear(
            "lm_head",
            ph.pad(ph.tied(embedding) if ties else ph.src("lm_head", vocab)),
            hidden,
            ph.COLUMN,
        ),
        drop={"lm_head.weight": "tied to the embedding"} if ties else None,
    )


def layer(i: int, config: Mapping[str, Any]) -> tuple[ph.Rule, ...]:
    """Build the rules of layer ``i``."""
    hidden, size, inner = config["hidden_size"], config["head_size"], config["intermediate_size"]
    width = config["num_attention_heads"] * size
    source, target = f"model.layers.{i}", f"transformer.layers.{i}"
    return (
        ph.Norm(
            f"{target}.input_layernorm", ph.src(f"{source}.input_layernorm", hidden), bias=True
        ),
        ph.Linear(
            f"{target}.attention.qkv",
            grouped_qkv(f"{source}.self_attn.query_key_value", config),
            hidden,
            ph.COLUMN,
            bias=True,
        ),
        ph.Linear(
            f"{target}.attention.dense",
            ph.src(f"{source}.self_attn.dense", hidden),
            ph.columns(width, unit=size),
            ph.ROW,
            bias=True,
        ),
        ph.Norm(
            f"{target}.post_layernorm",
            ph.src(f"{source}.post_attention_layernorm", hidden),
            bias=True,
        ),
        # Even rows are the gelu branch, odd rows the linear branch, as the reader expects them;
        # a pair must stay on one rank.
        ph.Linear(
            f"{target}.mlp.fc",
            ph.src(f"{source}.mlp.up_proj", 2 * inner, unit=2),
            hidden,
            ph.COLUMN,
            bias=True,
        ),
        ph.Linear(
            f"{target}.mlp.proj",
            ph.src(f"{source}.mlp.down_proj", hidden),
            inner,
            ph.ROW,
            bias=True,
        ),
    )


def grouped_qkv(source: str, config: Mapping[str, Any]) -> ph.Axis:
    """Split qkv rows stored as one block of query heads, key head, value head per KV group."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["head_size"]
    axis = ph.ungroup(
        ph.src(source, (heads + 2 * kv_heads) * size),
        groups=kv_heads,
        unit=size,
        q=heads // kv_heads,
        k=1,
        v=1,
    )
    return ph.replicable(axis, "k", "v")


@ph.hookimpl
def phireg_quant_rules(config: Mapping[str, Any]) -> ph.QuantRules:
    """Quantize every linear, and regroup qkv rows in checkpoints of early exporters.

    Exporters of TensorRT-LLM's 0.11 development line left qkv in the source's grouped order.
    """
    hidden = config["hidden_size"]
    modules = [f"transformer.layers.{i}.attention.qkv" for i in range(config["num_hidden_layers"])]
    grouped = (
        ph.Linear(module, grouped_qkv(module, config), hidden, ph.COLUMN, bias=True)
        for module in modules
    )
    return ph.every_linear(config, postprocess=ph.Rules(*grouped))
