"""Phi-3's tensors: fused as published, or with the separate projections some fine-tunes have."""

from collections.abc import Mapping
from typing import Any

from phireg.api import (
    COLUMN,
    ROW,
    HFConfig,
    Linear,
    Norm,
    Rule,
    Rules,
    Table,
    columns,
    fuse,
    hookimpl,
    one_of,
    order,
    pad,
    parts,
    replicable,
    src,
    tied,
)


@hookimpl
def phireg_weight_rules(config: Mapping[str, Any], hf: HFConfig) -> Rules:
    """Where the rows of each target module come from."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    layers = config["num_hidden_layers"]
    embedding, head = src("model.embed_tokens", vocab), pad(src("lm_head", vocab))
    tied_head = pad(tied(embedding))
    ties = hf.get("tie_word_embeddings")
    # Without a word from the config, the presence of the head's weight decides.
    heads = {True: (tied_head,), False: (head,)}.get(ties, (head, tied_head))
    drop = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": "a constant the reader computes itself"
        for i in range(layers)
    }
    if ties:
        drop["lm_head.weight"] = "tied to the embedding"
    return Rules(
        Table("transformer.vocab_embedding", embedding, hidden),
        *(rule for i in range(layers) for rule in layer(i, config)),
        Norm("transformer.ln_f", src("model.norm", hidden)),
        Linear("lm_head", one_of(*heads), hidden, COLUMN),
        drop=drop,
    )


def layer(i: int, config: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The rules of layer ``i``."""
    hidden, size, inner = config["hidden_size"], config["head_size"], config["intermediate_size"]
    q = config["num_attention_heads"] * size
    kv = config["num_key_value_heads"] * size
    source, target = f"model.layers.{i}", f"transformer.layers.{i}"
    attention, mlp = f"{source}.self_attn", f"{source}.mlp"
    qkv = (
        parts(src(f"{attention}.qkv_proj", q + 2 * kv), q=q, k=kv, v=kv, unit=size),
        fuse(
            q=src(f"{attention}.q_proj", q),
            k=src(f"{attention}.k_proj", kv),
            v=src(f"{attention}.v_proj", kv),
            unit=size,
        ),
    )
    gate_up = (
        parts(src(f"{mlp}.gate_up_proj", 2 * inner), gate=inner, up=inner),
        fuse(gate=src(f"{mlp}.gate_proj", inner), up=src(f"{mlp}.up_proj", inner)),
    )
    return (
        Norm(f"{target}.input_layernorm", src(f"{source}.input_layernorm", hidden)),
        Linear(
            f"{target}.attention.qkv",
            one_of(*(replicable(axis, "k", "v") for axis in qkv)),
            hidden,
            COLUMN,
        ),
        Linear(
            f"{target}.attention.dense",
            src(f"{attention}.o_proj", hidden),
            columns(q, unit=size),
            ROW,
        ),
        Norm(f"{target}.post_layernorm", src(f"{source}.post_attention_layernorm", hidden)),
        # TensorRT-LLM's swiglu takes the second half as the gate, so up comes first there.
        Linear(
            f"{target}.mlp.fc",
            one_of(*(order(axis, "up", "gate") for axis in gate_up)),
            hidden,
            COLUMN,
        ),
        Linear(f"{target}.mlp.proj", src(f"{mlp}.down_proj", hidden), inner, ROW),
    )
