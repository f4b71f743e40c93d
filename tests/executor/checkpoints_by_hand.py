"""TensorRT-LLM checkpoints of tiny models by hand, and their forward pass in float64.

Written from the format's description, apart from phireg's own mapping: a mistake there cannot hide
in a matching mistake here. ``forward`` takes the tensors of one rank (TP 1) and two functions, what
a linear and what the cache does, so that it runs unquantized, records maxima, or runs a scheme.
"""

import json

import torch
from safetensors.torch import load_file, save_file


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


SAME_KEYS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings",
)  # fmt: skip
SMALL_KEYS = (
    "gegelu_limit", "mup_embedding_multiplier", "mup_width_multiplier", "blocksparse_block_size",
    "blocksparse_num_local_blocks", "blocksparse_homo_head_pattern",
    "dense_attention_every_n_layers",
)  # fmt: skip
LONG_ROPE_KEYS = {
    "original_max_position_embeddings": "original_max_position_embeddings",
    "longrope_scaling_short_factors": "short_factor",
    "longrope_scaling_long_factors": "long_factor",
    "longrope_short_mscale": "short_mscale",
    "longrope_long_mscale": "long_mscale",
}


def checkpoint_config(model, ranks, dtype):
    c, architecture = model.config, type(model).__name__
    config = {
        "architecture": architecture,
        "dtype": str(dtype).removeprefix("torch."),
        **{key: getattr(c, key) for key in SAME_KEYS},
        "mapping": {"world_size": ranks, "tp_size": ranks, "pp_size": 1},
    }
    if architecture == "Phi3SmallForCausalLM":
        rope = c.rope_scaling or {}
        config |= {
            "intermediate_size": c.ff_intermediate_size,
            "hidden_act": "gegelu",
            "norm_epsilon": c.layer_norm_epsilon,
            "rotary_base": c.rope_embedding_base,
            "rotary_pct": 1.0,
            "blocksparse_vertical_stride": c.blocksparse_vert_stride,
            **{key: getattr(c, key) for key in SMALL_KEYS},
        }
    else:
        rope = c.rope_parameters
        config |= {
            "intermediate_size": c.intermediate_size,
            "hidden_act": "gelu_new",
            "rotary_base": rope["rope_theta"],
            "rotary_pct": rope["partial_rotary_factor"],
        }
    if architecture == "Phi3ForCausalLM":
        config |= {"hidden_act": "swiglu", "norm_epsilon": c.rms_norm_eps}
    if "long_factor" in rope:
        config |= {key: rope[name] for key, name in LONG_ROPE_KEYS.items() if name in rope}
    return config


def write_checkpoint(model, directory, ranks=1, dtype=torch.float32):
    config = checkpoint_config(model, ranks, dtype)
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


# quantized

LINEARS = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj")
ROWS = ("attention.dense", "mlp.proj")
ALGORITHMS = {
    "fp8": "FP8", "int8_sq": "W8A8_SQ_PER_CHANNEL", "int8_wo": "W8A16", "int4_wo": "W4A16",
}  # fmt: skip
E4M3 = torch.float8_e4m3fn


def e4m3(x):
    return x.float().clamp(-448, 448).to(E4M3)


def int8(x):
    return x.float().round().clamp(-128, 127).to(torch.int8)


# the forward pass


def norm(config, t, name, x):
    if config["architecture"] == "Phi3ForCausalLM":
        scaled = x / (x.square().mean(-1, keepdim=True) + config["norm_epsilon"]).sqrt()
        return scaled * t[f"{name}.weight"].double()
    epsilon = config.get("norm_epsilon", 1e-5)
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()
    return x * t[f"{name}.weight"].double() + t[f"{name}.bias"].double()


def rotated(config, x):
    """[heads, tokens, size]."""
    dim = int(x.shape[-1] * config["rotary_pct"])
    frequencies = config["rotary_base"] ** (-torch.arange(0, dim, 2).double() / dim)
    angles = torch.arange(x.shape[1]).double()[:, None] * frequencies
    a, b, rest = x[..., : dim // 2], x[..., dim // 2 : dim], x[..., dim:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)


def seen(config, layer, heads, tokens):
    """bool [heads, tokens, tokens]."""
    causal = torch.ones(tokens, tokens).tril().bool()
    every = config.get("dense_attention_every_n_layers")
    if every is None or (layer + 1) % every == 0:
        return causal.expand(heads, -1, -1)
    size, stride = config["blocksparse_block_size"], config["blocksparse_vertical_stride"]
    block = torch.arange(tokens) // size
    near = block[:, None] - block < config["blocksparse_num_local_blocks"]
    head = torch.arange(heads)[:, None, None] * max(1, stride // heads)
    return causal & (near | ((block + head + 1) % stride == 0))


def attention(config, layer, rows, cache):
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads
    q, k, v = rows.unflatten(-1, (-1, size)).transpose(0, 1).split([heads, groups, groups])
    q, k, v = rotated(config, q), cache(layer, rotated(config, k)), cache(layer, v)
    k, v = (x.repeat_interleave(heads // groups, 0) for x in (k, v))
    scale = 1 / size if config["architecture"] == "Phi3SmallForCausalLM" else size**-0.5
    mask = seen(config, layer, heads, len(rows))
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def activated(config, z):
    if config["hidden_act"] == "swiglu":
        up, gate = z.chunk(2, -1)
        return gate * torch.sigmoid(gate) * up
    if config["hidden_act"] == "gegelu":
        limit = config["gegelu_limit"]
        gate, value = z[..., 0::2].clamp(max=limit), z[..., 1::2].clamp(-limit, limit)
        return gate * torch.sigmoid(1.702 * gate) * (value + 1)
    return z / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))


def forward(config, t, ids, linear, cache):
    """float64 logits [tokens, vocabulary] of one sequence."""
    x = t["transformer.vocab_embedding.weight"].double()[ids]
    x = x * config.get("mup_embedding_multiplier", 1.0)
    for i in range(config["num_hidden_layers"]):
        layer = f"transformer.layers.{i}"
        u = norm(config, t, f"{layer}.input_layernorm", x)
        rows = linear(f"{layer}.attention.qkv", u)
        attended = linear(f"{layer}.attention.dense", attention(config, i, rows, cache))
        if config["architecture"] != "PhiForCausalLM":
            x, attended = x + attended, 0
            u = norm(config, t, f"{layer}.post_layernorm", x)
        hidden = activated(config, linear(f"{layer}.mlp.fc", u))
        x = x + attended + linear(f"{layer}.mlp.proj", hidden)
    x = norm(config, t, "transformer.ln_f", x) @ t["lm_head.weight"].double().T
    if "lm_head.bias" in t:
        x = x + t["lm_head.bias"].double()
    return x / config.get("mup_width_multiplier", 1.0)


# what linears and the cache do


def plain_linear(t):
    def linear(name, x):
        y = x @ t[f"{name}.weight"].double().T
        return y + t[f"{name}.bias"].double() if f"{name}.bias" in t else y

    return linear


def quantized_linear(t, scheme, ranks=1):
    """From the tensors of a quantized checkpoint at TP 1; ``ranks`` matters to weight-only ones."""

    def linear(name, x):
        scales = {k: t.get(f"{name}.{k}_scaling_factor") for k in ("weights", "activation")}
        weight = t[f"{name}.weight"]
        if scheme == "fp8":
            x = e4m3(x.float() / scales["activation"]).double() * scales["activation"].double()
            weight = weight.double() * scales["weights"].double()
        elif scheme == "int8_sq":
            x = x.float() * t[f"{name}.prequant_scaling_factor"].float()
            x = int8(x / scales["activation"]).double() * scales["activation"].double()
            weight = weight.double() * scales["weights"].double()[:, None]
        else:
            # The builder sees one rank's columns of a row linear, and takes its maxima of them.
            parts = weight.chunk(ranks if name.endswith(ROWS) else 1, dim=1)
            weight = torch.cat([weight_only(part, scheme) for part in parts], dim=1)
        y = x @ weight.T
        return y + t[f"{name}.bias"].double() if f"{name}.bias" in t else y

    return linear


def weight_only(weight, scheme):
    """Integers and back; what divides is float32, what multiplies has the weight's dtype."""
    end = {"int8_wo": 128, "int4_wo": 8}[scheme]
    scale = weight.float().abs().amax(1, keepdim=True) / end
    ratio = (weight.float() / scale).double()
    whole = torch.floor(ratio.abs() + 0.5) * ratio.sign()  # half away from zero
    return whole.clamp(-end, end - 1) * scale.to(weight.dtype).double()


def quantized_cache(t, grid):
    def cache(layer, x):
        if grid is None:
            return x
        scale = t[f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"]
        stored = (e4m3 if grid == "fp8" else int8)(x.float() / scale)
        return stored.double() * scale.double()

    return cache


# writing


def maxima(config, tensors, ids):
    """Largest |x|: of every channel of the linears' inputs, of every layer's keys and values."""
    inputs, cached = {}, {}

    def linear(name, x):
        inputs[name] = x.abs().amax(0).float()
        return plain_linear(tensors)(name, x)

    def cache(layer, x):
        cached[layer] = max(cached.get(layer, 0.0), x.abs().max().item())
        return x

    forward(config, tensors, ids, linear, cache)
    return inputs, cached


def quantize(directory, calibration, scheme, kv=None, shrink=1.0):
    """Turn a checkpoint of :func:`write_checkpoint`, of any number of ranks, into a quantized one.

    ``calibration`` is (tensors at TP 1, maxima); ``shrink`` below 1 puts values beyond the grid.
    """
    whole, (inputs, cached) = calibration
    config = json.loads((directory / "config.json").read_text())
    config["quantization"] = {
        "quant_algo": ALGORITHMS.get(scheme),
        "kv_cache_quant_algo": kv and kv.upper(),
        "exclude_modules": ["lm_head", "*vocab_embedding"],
    }
    (directory / "config.json").write_text(json.dumps(config))
    ranks = config["mapping"]["tp_size"]
    for rank in range(ranks):
        path = directory / f"rank{rank}.safetensors"
        t = load_file(path)
        for i in range(config["num_hidden_layers"]):
            for linear in LINEARS if scheme in ("fp8", "int8_sq") else ():
                name = f"transformer.layers.{i}.{linear}"
                part = rank if linear in ROWS else None
                smooth = scheme == "int8_sq"
                change = int8_linear if smooth else fp8_linear
                change(t, name, whole[f"{name}.weight"], inputs[name], shrink, part, ranks)
            if kv is not None:
                scale = max(1.0, cached[i] / 448) if kv == "fp8" else cached[i] / 127
                name = f"transformer.layers.{i}.attention.kv_cache_scaling_factor"
                t[name] = torch.tensor([scale * shrink])
        save_file(t, path)
    return directory


def fp8_linear(t, name, whole, amax, shrink, _part, _ranks):
    weights, activation = whole.float().abs().max() / 448, amax.max() / 448 * shrink
    t[f"{name}.weight"] = e4m3(t[f"{name}.weight"].float() / weights)
    t[f"{name}.weights_scaling_factor"] = weights.reshape(1)
    t[f"{name}.activation_scaling_factor"] = activation.reshape(1)


def int8_linear(t, name, whole, amax, shrink, part, ranks):
    dtype = whole.dtype
    smoothing = (1 / amax).clamp(1e-4, 1e4)
    weights = ((whole.float() / smoothing).to(dtype).float().abs().amax(1)) / 127
    if part is None:
        own, rows = smoothing, t[f"{name}.weight"].float() / smoothing
        weights = rows.to(dtype).float().abs().amax(1) / 127
    else:
        own = smoothing.chunk(ranks)[part]
    smoothed = (t[f"{name}.weight"].float() / own).to(dtype).float()
    t[f"{name}.weight"] = int8(smoothed / weights[:, None])
    t[f"{name}.weights_scaling_factor"] = weights
    t[f"{name}.activation_scaling_factor"] = torch.tensor([shrink / 127])
    t[f"{name}.prequant_scaling_factor"] = own.to(dtype).clone()


def written(model, directory, ids, scheme, kv=None, ranks=1, dtype=torch.float32, shrink=1.0):
    """A quantized checkpoint in ``directory``; the same at TP 1 as (config, tensors)."""
    single = directory / "single"
    single.mkdir(parents=True)
    write_checkpoint(model, single, 1, dtype)
    config = json.loads((single / "config.json").read_text())
    tensors = load_file(single / "rank0.safetensors")
    calibration = tensors, maxima(config, tensors, ids)
    write_checkpoint(model, directory, ranks, dtype)
    quantize(directory, calibration, scheme, kv, shrink)
    quantize(single, calibration, scheme, kv, shrink)
    return config, load_file(single / "rank0.safetensors")
