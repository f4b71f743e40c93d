"""Layouts of Phi's files other than current transformers', made of those."""

import json

import torch
from safetensors.torch import load_file, save_file

from helpers import tiny_models


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


def separate_projections(tensors, config):
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads
    for name in list(tensors):
        if "qkv_proj" in name:
            rows = tensors.pop(name).split([heads * size, kv_heads * size, kv_heads * size])
            tensors |= {name.replace("qkv_", f"{p}_"): x for p, x in zip("qkv", rows, strict=True)}
        elif "gate_up" in name:
            gate, up = tensors.pop(name).chunk(2)
            tensors |= {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
    return tensors, config


def by_head(tensors, config):
    sizes = config["num_hidden_layers"], config["num_attention_heads"]
    return fused_per_head(tensors, *sizes), config


def gpt2_names(config, model_type):
    size = config["hidden_size"] // config["num_attention_heads"]
    return {
        "architectures": config["architectures"],
        "model_type": model_type,
        "n_embd": config["hidden_size"],
        "n_head": config["num_attention_heads"],
        "n_layer": config["num_hidden_layers"],
        "n_inner": config["intermediate_size"],
        "n_positions": config["max_position_embeddings"],
        "rotary_dim": int(size * 0.4),
        "activation_function": config["hidden_act"],
        "layer_norm_epsilon": config["layer_norm_eps"],
        "tie_word_embeddings": False,
        "vocab_size": config["vocab_size"],
    }


def phi_msft(tensors, config):
    return original(tensors, config["num_hidden_layers"]), gpt2_names(config, "phi-msft")


def mixformer(tensors, config):
    names = gpt2_names(config, "mixformer-sequential")
    return sequential(tensors, config["num_hidden_layers"]), names


def wrapped(prefix):
    return lambda tensors, config: ({f"{prefix}{k}": v for k, v in tensors.items()}, config)


def fsdp(tensors, config):
    inner = "_fsdp_wrapped_module"
    names = {k: k.replace("model.layers.", f"model.{inner}.layers.") for k in tensors}
    checkpointed = {
        k: x.replace(".mlp.", "._checkpoint_wrapped_module.mlp.") for k, x in names.items()
    }
    return {f"{inner}.{checkpointed[k]}": v for k, v in tensors.items()}, config


def without_model(tensors, config):
    return {k.removeprefix("model."): v for k, v in tensors.items()}, config


LAYOUTS = {
    "separate projections": ("phi3-gqa", separate_projections),
    "a head's q, k and v together": ("phi2", by_head),
    "phi-2 as first published": ("phi2", phi_msft),
    "phi-1 as first published": ("phi2", mixformer),
    "torch.compile": ("phi3-gqa", wrapped("_orig_mod.")),
    "DDP": ("phi2", wrapped("module.")),
    "PEFT": ("phi3-gqa", wrapped("base_model.model.")),
    "FSDP": ("phi3-gqa", fsdp),
    "no model.": ("phi3-small", without_model),
}
"""By name: the model of tiny_models, and what changes its tensors and config."""


def write_other(name, change, place):
    """Write a model of tiny_models in the usual layout and in another one; their directories."""
    plain, other = tiny_models.write(name, place / "plain"), place / "other"
    if name == "phi2":  # the older configs have no key for theta
        tiny_models.edit_config(plain, rope_parameters={"partial_rotary_factor": 0.4})
    config = json.loads((plain / "config.json").read_text())
    tensors, config = change(load_file(plain / "model.safetensors"), config)
    other.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, other / "model.safetensors")
    (other / "config.json").write_text(json.dumps(config))
    return plain, other
