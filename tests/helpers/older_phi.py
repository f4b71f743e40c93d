"""Tensors of Phi in the layouts before transformers 4.37."""

import torch


def fused_per_head(state, layers, heads):
    """transformers 4.36: [q_i; k_i; v_i] for every head i."""
    state = dict(state)
    for i in range(layers):
        for kind in ("weight", "bias"):
            parts = [
                state.pop(f"model.layers.{i}.self_attn.{p}_proj.{kind}").unflatten(0, (heads, -1))
                for p in "qkv"
            ]
            fused = torch.stack(parts, dim=1).flatten(0, 2)
            state[f"model.layers.{i}.self_attn.query_key_value.{kind}"] = fused
    return state


def older(state, layers, prefix, first, embedding, norm, head):
    """The layouts before transformers: [Q; K; V] in Wqkv, shorter names."""
    state = dict(state)
    new = {f"{embedding}.weight": state.pop("model.embed_tokens.weight")}
    for kind in ("weight", "bias"):
        new[f"{norm}.{kind}"] = state.pop(f"model.final_layernorm.{kind}")
        new[f"{head}.{kind}"] = state.pop(f"lm_head.{kind}")
        for i in range(layers):
            old, layer = f"model.layers.{i}", f"{prefix}.{i + first}"
            qkv = [state.pop(f"{old}.self_attn.{p}_proj.{kind}") for p in "qkv"]
            new[f"{layer}.mixer.Wqkv.{kind}"] = torch.cat(qkv)
            new[f"{layer}.mixer.out_proj.{kind}"] = state.pop(f"{old}.self_attn.dense.{kind}")
            new[f"{layer}.ln.{kind}"] = state.pop(f"{old}.input_layernorm.{kind}")
            for fc in ("mlp.fc1", "mlp.fc2"):
                new[f"{layer}.{fc}.{kind}"] = state.pop(f"{old}.{fc}.{kind}")
    assert not state
    return new


def original(state, layers):
    """phi-2 as first published."""
    names = "transformer.embd.wte", "lm_head.ln", "lm_head.linear"
    return older(state, layers, "transformer.h", 0, *names)


def sequential(state, layers):
    """phi-1 and phi-1.5 as first published."""
    last = f"layers.{layers + 1}"
    return older(state, layers, "layers", 1, "layers.0.wte", f"{last}.ln", f"{last}.linear")
