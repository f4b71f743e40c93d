"""Phi-3-small's tensors: qkv rows stored per KV group, gelu and linear rows alternating."""

from collections.abc import Mapping
from typing import Any

from phireg.api import (
    COLUMN,
    ROW,
    Axis,
    HFConfig,
    Linear,
    Norm,
    Rule,
    Rules,
    Table,
    columns,
    hookimpl,
    pad,
    replicable,
    src,
    tied,
    ungroup,
)


@hookimpl
def phireg_weight_rules(config: Mapping[str, Any], hf: HFConfig) -> Rules:
    """Where the rows of each target module come from."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    layers = config["num_hidden_layers"]
    embedding = src("model.embed_tokens", vocab)
    ties = config["tie_word_embeddings"]
    drop = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": "a constant the reader computes itself"
        for i in range(layers)
    }
    if ties:
        drop["lm_head.weight"] = "tied to the embedding"
    return Rules(
        Table("transformer.vocab_embedding", embedding, hidden),
        *(rule for i in range(layers) for rule in layer(i, config)),
        Norm("transformer.ln_f", src("model.final_layernorm", hidden), bias=True),
        Linear("lm_head", pad(tied(embedding) if ties else src("lm_head", vocab)), hidden, COLUMN),
        drop=drop,
    )


def layer(i: int, config: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The rules of layer ``i``."""
    hidden, size, inner = config["hidden_size"], config["head_size"], config["intermediate_size"]
    width = config["num_attention_heads"] * size
    source, target = f"model.layers.{i}", f"transformer.layers.{i}"
    return (
        Norm(f"{target}.input_layernorm", src(f"{source}.input_layernorm", hidden), bias=True),
        Linear(
            f"{target}.attention.qkv",
            grouped_qkv(f"{source}.self_attn.query_key_value", config),
            hidden,
            COLUMN,
            bias=True,
        ),
        Linear(
            f"{target}.attention.dense",
            src(f"{source}.self_attn.dense", hidden),
            columns(width, unit=size),
            ROW,
            bias=True,
        ),
        Norm(
            f"{target}.post_layernorm",
            src(f"{source}.post_attention_layernorm", hidden),
            bias=True,
        ),
        # Even rows are the gelu branch, odd ones the linear branch, in the reader too: a pair is
        # inseparable, and nothing moves.
        Linear(
            f"{target}.mlp.fc",
            src(f"{source}.mlp.up_proj", 2 * inner, unit=2),
            hidden,
            COLUMN,
            bias=True,
        ),
        Linear(f"{target}.mlp.proj", src(f"{source}.mlp.down_proj", hidden), inner, ROW, bias=True),
    )


def grouped_qkv(source: str, config: Mapping[str, Any]) -> Axis:
    """Rows of each KV group are its query heads, its key head, its value head."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["head_size"]
    axis = ungroup(
        src(source, (heads + 2 * kv_heads) * size),
        groups=kv_heads,
        unit=size,
        q=heads // kv_heads,
        k=1,
        v=1,
    )
    return replicable(axis, "k", "v")
