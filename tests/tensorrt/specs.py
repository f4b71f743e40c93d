"""Configs of two layers: of four families and of a mixture of experts, in every format."""

import json
from pathlib import Path

from phireg.planning.plan import plan_config
from phireg.reader.schemes import KV_CACHES, SCHEMES
from phireg.reader.spec import parse_spec

DEMOS = Path(__file__).parents[2] / "plugins"
FAMILIES = ("phi2", "phi3-mini", "phi3-small", "phi3-medium")
GROUPED = tuple(name for name, scheme in SCHEMES.items() if scheme.grouped)
FORMATS = (
    *("float16", "bfloat16", "float32"),
    *(name for name in SCHEMES if name not in GROUPED),
    *(f"kv_{grid}" for grid in KV_CACHES),
)
EXPERTS = {
    "architecture": "PhiMoEForCausalLM", "hidden_size": 48, "num_attention_heads": 8,
    "vocab_size": 97, "max_position_embeddings": 128, "num_key_value_heads": 4,
    "intermediate_size": 20, "hidden_act": "swiglu", "norm_epsilon": 1e-3, "rotary_base": 5e3,
    "rotary_pct": 1.0, "position_embedding_type": "long_rope",
    "original_max_position_embeddings": 64, "longrope_scaling_short_factors": [1.0, 1.1, 1.3],
    "longrope_scaling_long_factors": [1.2, 2.5, 7.0], "longrope_short_mscale": 1.1,
    "longrope_long_mscale": 1.3,
    "moe": {
        "num_experts": 6, "top_k": 2, "normalization_mode": 2, "sparse_mixer_epsilon": 0.3
    },
}  # fmt: skip


def config_of(family, form="float16", tp_size=1):
    """The config.json of a demo model's checkpoint, or that of the experts, with two layers."""
    dtype = form if form.startswith(("float", "bfloat")) else "float16"
    if family == "phi3.5-moe":
        config = EXPERTS | {"dtype": dtype, "mapping": {"world_size": tp_size, "tp_size": tp_size}}
    else:
        demo = DEMOS / family.replace("-", "_") / "demo"
        config = dict(plan_config(demo, dtype=dtype, tp_size=tp_size).config)
    config["num_hidden_layers"] = 2
    if form in SCHEMES:
        config["quantization"] = {"quant_algo": SCHEMES[form].quant_algo}
    elif form.startswith("kv_"):
        config["quantization"] = {"kv_cache_quant_algo": KV_CACHES[form.removeprefix("kv_")]}
    return json.loads(json.dumps(config))


def spec_of(family, form="float16", tp_size=1):
    return parse_spec(config_of(family, form, tp_size))
