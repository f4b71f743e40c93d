"""What TensorRT-LLM's reader makes of config.json: defaults, keys it needs, keys it looks at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NESTED = {
    "mapping": {
        "world_size", "tp_size", "pp_size", "rank", "gpus_per_node", "moe_tp_size", "moe_ep_size",
        "cp_size", "cp_config", "moe_cluster_size", "attn_tp_size", "attn_cp_size",
        "auto_parallel", "enable_attention_dp", "enable_lm_head_tp_in_adp",
    },
    "quantization": {
        "quant_algo", "kv_cache_quant_algo", "group_size", "smoothquant_val", "has_zero_point",
        "pre_quant_scale", "exclude_modules", "clamp_val", "use_meta_recipe",
    },
}  # fmt: skip
"""Keys that some release accepts inside a block; any other one makes every release raise."""

_ARCHITECTURES = (
    "PhiForCausalLM", "Phi3ForCausalLM", "Phi3SmallForCausalLM", "PhiMoEForCausalLM",
)  # fmt: skip
_COMMON = (
    "dtype", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "intermediate_size", "max_position_embeddings", "hidden_act", "position_embedding_type",
    "rotary_pct",
)  # fmt: skip
_SMALL = (
    "num_key_value_heads", "rotary_base", "mup_embedding_multiplier",
    "dense_attention_every_n_layers", "blocksparse_block_size", "blocksparse_homo_head_pattern",
    "blocksparse_num_local_blocks", "blocksparse_vertical_stride",
)  # fmt: skip
_MOE = ("num_key_value_heads", "rotary_base", "moe")
_LONG = (
    "longrope_scaling_short_factors",
    "longrope_scaling_long_factors",
    "original_max_position_embeddings",
)
_MSCALES = ("longrope_short_mscale", "longrope_long_mscale")
_OPTIONAL = {
    "num_key_value_heads", "norm_epsilon", "rotary_base", "rotary_scaling", "head_size",
    "qk_layernorm", "mup_width_multiplier", "gegelu_limit", "moe", "use_parallel_embedding",
    "embedding_sharding_dim", "share_embedding_table", "architecture", "mapping", "quantization",
}  # fmt: skip
READ = {*_COMMON, *_SMALL, *_LONG, *_MSCALES, *_OPTIONAL}
"""Keys that change what the reader builds, for one architecture or another."""


def required_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys without which the newest releases raise; none for an architecture unknown here.

    TensorRT-LLM sets unknown keys as attributes and reads them without a default, so absence is an
    AttributeError; ``gegelu_limit`` must be there even when it is null.
    """
    if config.get("architecture") not in _ARCHITECTURES:
        return ()
    small = config["architecture"] == "Phi3SmallForCausalLM"
    moe = config["architecture"] == "PhiMoEForCausalLM"
    long = config.get("position_embedding_type") == "long_rope" or _LONG[0] in config
    return (
        *_COMMON,
        *((*_SMALL, "gegelu_limit") if small else ()),
        *(_MOE if moe else ()),
        *(_LONG if long else ()),
        *(_MSCALES if long and (small or moe) else ()),
    )


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the value the reader takes for every key that has a default and is absent."""
    made = dict(config)
    defaults: dict[str, Any] = {
        "norm_epsilon": 1e-5,
        "rotary_base": 10000.0,
        "rotary_scaling": None,
        "logits_dtype": "float32",
        "qk_layernorm": False,
        "share_embedding_table": False,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "mup_width_multiplier": None,
        "num_key_value_heads": config.get("num_attention_heads"),
        "original_max_position_embeddings": config.get("max_position_embeddings"),
    }
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        defaults["head_size"] = hidden // heads
    for key, value in defaults.items():
        if made.get(key) is None:
            made[key] = value
    return made
