"""Phi-3's weight rules: fused as published, or separate projections as in some fine-tunes."""

from collections.abc import Mapping
from typing import Any

import phireg.api as ph


@ph.hookimpl
def phireg_weight_rules(config: Mapping[str, Any], hf: ph.HFConfig) -> ph.Rules:
    """Map source rows to target modules."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    layers = config["num_hidden_layers"]
    embedding, head = ph.src("model.embed_tokens", vocab), ph.pad(ph.src("lm_head", vocab))
    tied_head = ph.pad(ph.tied(embedding))
    ties = config["tie_word_embeddings"]
    return ph.Rules(
        ph.Table("transformer.vocab_embedding", embedding, hidden),
        *(rule for i in range(layers) for rule in layer(i, config)),
        ph.Norm("transformer.ln_f", ph.src("model.norm", hidden)),
        ph.Linear("lm_head", tied_head if ties else head, hidden, ph.COLUMN),
        drop={"lm_head.weight": "tied to the embedding"} if ties else None,
    )


def layer(i: int, config: Mapping[str, Any]) -> tuple[ph.Rule, ...]:
    """Build the rules of layer ``i``."""
    hidden, size, inner = config["hidden_size"], config["head_size"], config["intermediate_size"]
    q = config["num_attention_heads"] * size
    kv = config["num_key_value_heads"] * size
    source, target = f"model.layers.{i}", f"transformer.layers.{i}"
    attention, mlp = f"{source}.self_attn", f"{source}.mlp"
    qkv = (
        ph.parts(ph.src(f"{attention}.qkv_proj", q + 2 * kv), q=q, k=kv, v=kv, unit=size),
        ph.fuse(
            q=ph.src(f"{attention}.q_proj", q),
            k=ph.src(f"{attention}.k_proj", kv),
            v=ph.src(f"{attention}.v_proj", kv),
            unit=size,
        ),
    )
    gate_up = (
        ph.parts(ph.src(f"{mlp}.gate_up_proj", 2 * inner), gate=inner, up=inner),
        ph.fuse(gate=ph.src(f"{mlp}.gate_proj", inner), up=ph.src(f"{mlp}.up_proj", inner)),
    )
    return (
        ph.Norm(f"{target}.input_layernorm", ph.src(f"{source}.input_layernorm", hidden)),
        ph.Linear(
            f"{target}.attention.qkv",
            ph.one_of(*(ph.replicable(axis, "k", "v") for axis in qkv)),
            hidden,
            ph.COLUMN,
        ),
        ph.Linear(
            f"{target}.attention.dense",
            ph.src(f"{attention}.o_proj", hidden),
            ph.columns(q, unit=size),
            ph.ROW,
        ),
        ph.Norm(f"{target}.post_layernorm", ph.src(f"{source}.post_attention_layernorm", hidden)),
        # TensorRT-LLM's swiglu takes the second half as the gate, so up comes first there.
        ph.Linear(
            f"{target}.mlp.fc",
            ph.one_of(*(ph.order(axis, "up", "gate") for axis in gate_up)),
            hidden,
            ph.COLUMN,
        ),
        ph.Linear(f"{target}.mlp.proj", ph.src(f"{mlp}.down_proj", hidden), inner, ph.ROW),
    )


@ph.hookimpl
def phireg_quant_rules(config: Mapping[str, Any]) -> ph.QuantRules:
    """Quantize every linear; exporters write Phi-3's rows in the reader's order."""
    return ph.every_linear(config)
