"""A hand-written way from the tensors of tiny models to a TensorRT-LLM checkpoint.

Written from the format's description, apart from phireg's own mapping: a mistake there cannot hide
in a matching mistake here.
"""

import json

import torch
from safetensors.torch import load_file, save_file
from transformers import Phi3ForCausalLM, PhiForCausalLM


def split(tensor, rank, ranks, dim=0):
    size = tensor.shape[dim] // ranks
    return tensor.narrow(dim, rank * size, size).clone()


def kv_split(tensor, kv_heads, rank, ranks):
    """Rows of key or value heads; with more ranks than heads every head goes to several ranks."""
    if ranks <= kv_heads:
        return split(tensor, rank, ranks)
    return split(tensor, rank * kv_heads // ranks, kv_heads)


def padded_split(tensor, rank, ranks):
    rows = -(-tensor.shape[0] // ranks)
    padding = torch.zeros(rows * ranks - tensor.shape[0], *tensor.shape[1:], dtype=tensor.dtype)
    return split(torch.cat((tensor, padding)), rank, ranks)


def base_config(config, architecture, ranks):
    return {
        "architecture": architecture,
        "dtype": "float32",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "rotary_pct": 1.0,
        "mapping": {"world_size": ranks, "tp_size": ranks, "pp_size": 1},
    }


def phi2_layer(model, name, kind):
    """Rows of queries, keys and values, and the parts of fc that ranks split one by one."""
    s = model.state_dict()
    rows = [s[f"{name}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
    return rows, [s[f"{name}.mlp.fc1.{kind}"]]


def phi3_layer(model, name, kind):
    c, s = model.config, model.state_dict()
    kv_rows = c.num_key_value_heads * c.hidden_size // c.num_attention_heads
    rows = s[f"{name}.self_attn.qkv_proj.{kind}"].split([c.hidden_size, kv_rows, kv_rows])
    gate, up = s[f"{name}.mlp.gate_up_proj.{kind}"].split(c.intermediate_size)
    return rows, [up, gate]


def small_layer(model, name, kind):
    c, s = model.config, model.state_dict()
    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
    group, rows = heads // kv_heads, s[f"{name}.self_attn.query_key_value.{kind}"]
    rows = rows.reshape(kv_heads, group + 2, c.hidden_size // heads, *rows.shape[1:])
    q, k, v = rows[:, :group].flatten(0, 2), rows[:, group], rows[:, group + 1]
    return [q, k.flatten(0, 1), v.flatten(0, 1)], [s[f"{name}.mlp.up_proj.{kind}"]]


# By class: the last norm, lm_head, norms and row linears of a layer, the kinds of tensors, the rest
SOURCES = {
    "PhiForCausalLM": (
        "model.final_layernorm", "lm_head", {"input_layernorm": "input_layernorm"},
        ("self_attn.dense", "mlp.fc2"), ("weight", "bias"), phi2_layer,
    ),
    "Phi3ForCausalLM": (
        "model.norm", "lm_head",
        {"input_layernorm": "input_layernorm", "post_layernorm": "post_attention_layernorm"},
        ("self_attn.o_proj", "mlp.down_proj"), ("weight",), phi3_layer,
    ),
    "Phi3SmallForCausalLM": (
        "model.final_layernorm", "model.embed_tokens",
        {"input_layernorm": "input_layernorm", "post_layernorm": "post_attention_layernorm"},
        ("self_attn.dense", "mlp.down_proj"), ("weight", "bias"), small_layer,
    ),
}  # fmt: skip


def rank_tensors(model, rank, ranks):
    last_norm, head, norms, row_linears, kinds, layer_parts = SOURCES[type(model).__name__]
    s, kv_heads = model.state_dict(), model.config.num_key_value_heads
    out = {"transformer.vocab_embedding.weight": s["model.embed_tokens.weight"]}
    for kind in kinds:
        out[f"transformer.ln_f.{kind}"] = s[f"{last_norm}.{kind}"]
        if f"{head}.{kind}" in s:
            out[f"lm_head.{kind}"] = padded_split(s[f"{head}.{kind}"], rank, ranks)
        for i in range(model.config.num_hidden_layers):
            a, b = f"model.layers.{i}", f"transformer.layers.{i}"
            (q, *kv), fc = layer_parts(model, a, kind)
            kv = [kv_split(x, kv_heads, rank, ranks) for x in kv]
            out[f"{b}.attention.qkv.{kind}"] = torch.cat([split(q, rank, ranks), *kv])
            out[f"{b}.mlp.fc.{kind}"] = torch.cat([split(x, rank, ranks) for x in fc])
            for new, old in zip(("attention.dense", "mlp.proj"), row_linears, strict=True):
                tensor = s[f"{a}.{old}.{kind}"]
                whole = kind == "bias"  # every rank has all of it
                out[f"{b}.{new}.{kind}"] = tensor if whole else split(tensor, rank, ranks, dim=1)
            for new, old in norms.items():
                out[f"{b}.{new}.{kind}"] = s[f"{a}.{old}.{kind}"]
    return out


SMALL_KEYS = (
    "gegelu_limit", "mup_embedding_multiplier", "mup_width_multiplier", "blocksparse_block_size",
    "blocksparse_num_local_blocks", "blocksparse_homo_head_pattern",
    "dense_attention_every_n_layers",
)  # fmt: skip


def long_rope_keys(rope):
    keys = {
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "longrope_scaling_short_factors": rope["short_factor"],
        "longrope_scaling_long_factors": rope["long_factor"],
    }
    if "short_mscale" in rope:
        keys["longrope_short_mscale"] = rope["short_mscale"]
        keys["longrope_long_mscale"] = rope["long_mscale"]
    return keys


def checkpoint_config(model, ranks):
    c = model.config
    if isinstance(model, PhiForCausalLM):
        return base_config(c, "PhiForCausalLM", ranks) | {
            "intermediate_size": c.intermediate_size,
            "hidden_act": "gelu_new",
            "rotary_base": c.rope_parameters["rope_theta"],
            "rotary_pct": c.rope_parameters["partial_rotary_factor"],
        }
    if isinstance(model, Phi3ForCausalLM):
        rope = c.rope_parameters
        config = base_config(c, "Phi3ForCausalLM", ranks) | {
            "intermediate_size": c.intermediate_size,
            "hidden_act": "swiglu",
            "norm_epsilon": c.rms_norm_eps,
            "rotary_base": rope["rope_theta"],
        }
        if rope["rope_type"] == "longrope":
            config |= long_rope_keys(rope)
        return config
    return base_config(c, "Phi3SmallForCausalLM", ranks) | {
        "intermediate_size": c.ff_intermediate_size,
        "hidden_act": "gegelu",
        "norm_epsilon": c.layer_norm_epsilon,
        "rotary_base": c.rope_embedding_base,
        "blocksparse_vertical_stride": c.blocksparse_vert_stride,
        **{key: getattr(c, key) for key in SMALL_KEYS},
        **(long_rope_keys(c.rope_scaling) if c.rope_scaling else {}),
    }


def write_checkpoint(model, directory, ranks=1, dtype=torch.float32):
    config = checkpoint_config(model, ranks)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(config))
    for rank in range(ranks):
        tensors = rank_tensors(model, rank, ranks).items()
        save_file(
            {name: t.to(dtype).contiguous() for name, t in tensors},
            directory / f"rank{rank}.safetensors",
        )
    return directory


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def reference_logits(model, ids):
    with torch.no_grad():
        return model(ids).logits.float()


def random_ids(model, *shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, shape, generator=generator)


def edit_tensors(directory, rank, change):
    path = directory / f"rank{rank}.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
