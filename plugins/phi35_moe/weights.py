"""Phi-3.5-MoE's weight rules: separate projections with biases, and experts one by one."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import phireg.api as ph


@ph.hookimpl
def phireg_weight_rules(config: Mapping[str, Any]) -> ph.Rules:
    """Map source rows to target modules."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    layers = config["num_hidden_layers"]
    return ph.Rules(
        ph.Table("transformer.vocab_embedding", ph.src("model.embed_tokens", vocab), hidden),
        *(rule for i in range(layers) for rule in layer(i, config)),
        ph.Norm("transformer.ln_f", ph.src("model.norm", hidden), bias=True),
        ph.Linear("lm_head", ph.pad(ph.src("lm_head", vocab)), hidden, ph.COLUMN, bias=True),
    )


def layer(i: int, config: Mapping[str, Any]) -> tuple[ph.Rule, ...]:
    """Build the rules of layer ``i``."""
    hidden, size, inner = config["hidden_size"], config["head_size"], config["intermediate_size"]
    q = config["num_attention_heads"] * size
    kv = config["num_key_value_heads"] * size
    source, target = f"model.layers.{i}", f"transformer.layers.{i}"
    attention, moe = f"{source}.self_attn", f"{source}.block_sparse_moe"
    experts = [f"{moe}.experts.{e}" for e in range(config["moe"]["num_experts"])]
    qkv = ph.fuse(
        q=ph.src(f"{attention}.q_proj", q),
        k=ph.src(f"{attention}.k_proj", kv),
        v=ph.src(f"{attention}.v_proj", kv),
        unit=size,
    )
    return (
        ph.Norm(
            f"{target}.input_layernorm", ph.src(f"{source}.input_layernorm", hidden), bias=True
        ),
        ph.Linear(
            f"{target}.attention.qkv", ph.replicable(qkv, "k", "v"), hidden, ph.COLUMN, bias=True
        ),
        ph.Linear(
            f"{target}.attention.dense",
            ph.src(f"{attention}.o_proj", hidden),
            ph.columns(q, unit=size),
            ph.ROW,
            bias=True,
        ),
        ph.Norm(
            f"{target}.post_layernorm",
            ph.src(f"{source}.post_attention_layernorm", hidden),
            bias=True,
        ),
        ph.Linear(
            f"{target}.mlp.router",
            ph.src(f"{moe}.gate", len(experts)),
            hidden,
            ph.COPY,
            float32=True,
        ),
        # w1 is the gate and w3 is up. The second half is TensorRT-LLM's gate, so up comes first.
        ph.Experts(
            f"{target}.mlp.fc",
            [ph.fuse(up=ph.src(f"{e}.w3", inner), gate=ph.src(f"{e}.w1", inner)) for e in experts],
            hidden,
            ph.COLUMN,
        ),
        ph.Experts(
            f"{target}.mlp.proj", [ph.src(f"{e}.w2", hidden) for e in experts], inner, ph.ROW
        ),
    )


@ph.hookimpl
def phireg_quant_rules(config: Mapping[str, Any], scheme: str) -> ph.QuantRules:
    """Quantize every linear but the router, to FP8 alone."""
    rules = ph.every_linear(config)
    if scheme != "FP8":
        return replace(rules, linears=(), notes=("experts can be quantized to fp8 alone",))
    return replace(rules, exclude_modules=("lm_head", "*router", "*vocab_embedding"))
