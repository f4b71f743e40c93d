"""Phi-3.5-MoE's tensors: separate projections with biases, and experts one by one."""

from collections.abc import Mapping
from typing import Any

from phireg.api import (
    COLUMN,
    COPY,
    ROW,
    Experts,
    Linear,
    Norm,
    Rule,
    Rules,
    Table,
    columns,
    fuse,
    hookimpl,
    pad,
    replicable,
    src,
)


@hookimpl
def phireg_weight_rules(config: Mapping[str, Any]) -> Rules:
    """Where the rows of each target module come from."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    layers = config["num_hidden_layers"]
    return Rules(
        Table("transformer.vocab_embedding", src("model.embed_tokens", vocab), hidden),
        *(rule for i in range(layers) for rule in layer(i, config)),
        Norm("transformer.ln_f", src("model.norm", hidden), bias=True),
        Linear("lm_head", pad(src("lm_head", vocab)), hidden, COLUMN, bias=True),
    )


def layer(i: int, config: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The rules of layer ``i``."""
    hidden, size, inner = config["hidden_size"], config["head_size"], config["intermediate_size"]
    q = config["num_attention_heads"] * size
    kv = config["num_key_value_heads"] * size
    source, target = f"model.layers.{i}", f"transformer.layers.{i}"
    attention, moe = f"{source}.self_attn", f"{source}.block_sparse_moe"
    experts = [f"{moe}.experts.{e}" for e in range(config["moe"]["num_experts"])]
    qkv = fuse(
        q=src(f"{attention}.q_proj", q),
        k=src(f"{attention}.k_proj", kv),
        v=src(f"{attention}.v_proj", kv),
        unit=size,
    )
    return (
        Norm(f"{target}.input_layernorm", src(f"{source}.input_layernorm", hidden), bias=True),
        Linear(f"{target}.attention.qkv", replicable(qkv, "k", "v"), hidden, COLUMN, bias=True),
        Linear(
            f"{target}.attention.dense",
            src(f"{attention}.o_proj", hidden),
            columns(q, unit=size),
            ROW,
            bias=True,
        ),
        Norm(
            f"{target}.post_layernorm", src(f"{source}.post_attention_layernorm", hidden), bias=True
        ),
        Linear(
            f"{target}.mlp.router", src(f"{moe}.gate", len(experts)), hidden, COPY, float32=True
        ),
        # w1 is the gate and w3 is up. The second half is TensorRT-LLM's gate, so up comes first.
        Experts(
            f"{target}.mlp.fc",
            [fuse(up=src(f"{e}.w3", inner), gate=src(f"{e}.w1", inner)) for e in experts],
            hidden,
            COLUMN,
        ),
        Experts(f"{target}.mlp.proj", [src(f"{e}.w2", hidden) for e in experts], inner, ROW),
    )
