"""The architectures that TensorRT-LLM's reader builds Phi models of, and the keys of config.json.

A further architecture is a row of ``ARCHITECTURES``. Facts are from the model classes and
``modeling_utils.PretrainedConfig`` of TensorRT-LLM 0.10 to 1.3; docs/checkpoint-config.md says
which release reads which key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from phireg.ranges import largest

Norm = Literal["layer_norm", "rms_norm"]
Residual = Literal["parallel", "sequential"]
Activation = Literal["gelu_tanh", "swiglu", "gegelu"]

_KV_HEADS = ("num_key_value_heads", "rotary_base")
_BLOCK_SPARSE = (
    "mup_embedding_multiplier", "dense_attention_every_n_layers", "blocksparse_block_size",
    "blocksparse_homo_head_pattern", "blocksparse_num_local_blocks", "blocksparse_vertical_stride",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model class of the reader.

    The "parallel" residual is x + attention(u) + mlp(u) with one norm, the "sequential" one has two
    norms. With ``block_sparse``, attention is block-sparse but for every n-th layer, scores are
    divided by the head size, and the embedding has a multiplier. ``since`` and its like are
    TensorRT-LLM's versions, None if there is no such version.
    """

    name: str  # ``architecture`` in config.json
    norm: Norm  # of every layer and before lm_head; a layer norm has a bias
    activation: Activation  # of the published models; ``hidden_act`` decides
    residual: Residual = "sequential"
    attention_bias: bool = False  # of qkv and dense
    mlp_bias: bool = False  # of fc and proj
    lm_head_bias: bool = False
    required: tuple[str, ...] = ()  # keys without a default, besides those that all require
    older_names: Mapping[str, str] = field(default_factory=dict)  # of the first releases; required
    long_rope: bool = True  # the presence of ``longrope_*`` keys switches to long rope
    mscales: bool = False  # long rope takes its factors on cos and sin from config.json
    block_sparse: bool = False
    experts: bool = False  # in the MLP's place
    norm_epsilon: float | None = None  # of norms that are built without the config's
    since: str = "0.10.0.dev0"  # the first to read it
    grouped_since: str | None = None  # the first to read fewer key/value heads than heads
    # Before it, the reader splits one unsplit rank file by ``trtllm-build --tp_size``, and takes
    # no others.
    split_until: str | None = None


ARCHITECTURES = {
    row.name: row
    for row in (
        Architecture(
            "PhiForCausalLM",
            norm="layer_norm",
            residual="parallel",
            activation="gelu_tanh",
            attention_bias=True,
            mlp_bias=True,
            lm_head_bias=True,
            older_names={"rotary_pct": "partial_rotary_factor"},
            long_rope=False,
            norm_epsilon=1e-5,
            split_until="0.12.0.dev0",
        ),
        Architecture(
            "Phi3ForCausalLM",
            norm="rms_norm",
            activation="swiglu",
            grouped_since="0.11.0.dev2024060400",
        ),
        Architecture(
            "Phi3SmallForCausalLM",
            norm="layer_norm",
            activation="gegelu",
            attention_bias=True,
            mlp_bias=True,
            required=(*_KV_HEADS, *_BLOCK_SPARSE, "gegelu_limit"),
            older_names={
                "num_key_value_heads": "num_kv_heads",
                "rotary_base": "rotary_embedding_base",
            },
            mscales=True,
            block_sparse=True,
            since="0.11.0.dev2024060400",
            grouped_since="0.11.0.dev2024060400",
        ),
        Architecture(
            "PhiMoEForCausalLM",
            norm="layer_norm",
            activation="swiglu",
            attention_bias=True,
            lm_head_bias=True,
            required=(*_KV_HEADS, "moe"),
            mscales=True,
            experts=True,
            since="0.14.0.dev0",
            grouped_since="0.14.0.dev0",
        ),
    )
}
"""By the value of ``architecture`` in config.json."""

ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "swiglu": "swiglu",
    "gegelu": "gegelu",
}
"""By ``hidden_act``: four names of the tanh approximation; the reader has no erf gelu for Phi."""

_COMMON = (
    "dtype", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "intermediate_size", "max_position_embeddings", "hidden_act", "position_embedding_type",
    "rotary_pct",
)  # fmt: skip
SHORT_FACTORS, LONG_FACTORS = "longrope_scaling_short_factors", "longrope_scaling_long_factors"
_LONG_ROPE = (SHORT_FACTORS, LONG_FACTORS, "original_max_position_embeddings")
_MSCALES = ("longrope_short_mscale", "longrope_long_mscale")
_OPTIONAL = (
    "num_key_value_heads", "norm_epsilon", "rotary_base", "rotary_scaling", "head_size",
    "qk_layernorm", "mup_width_multiplier", "use_parallel_embedding", "embedding_sharding_dim",
    "share_embedding_table", "architecture", "mapping", "quantization",
)  # fmt: skip
READ = {*_COMMON, *_LONG_ROPE, *_MSCALES, *_OPTIONAL} | {
    key for row in ARCHITECTURES.values() for key in row.required
}
"""Keys that change what the reader builds, for one architecture or another."""

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


def required_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys without which the newest releases raise; none for an unknown architecture.

    TensorRT-LLM sets unknown keys as attributes and reads them without a default, so absence is an
    AttributeError; ``gegelu_limit`` must be there even when it is null.
    """
    row = ARCHITECTURES.get(str(config.get("architecture")))
    if row is None:
        return ()
    long = config.get("position_embedding_type") == "long_rope" or SHORT_FACTORS in config
    keys = (*_COMMON, *row.required)
    return (*keys, *_LONG_ROPE, *(_MSCALES if row.mscales else ())) if long else keys


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with the reader's default for every absent key that has one."""
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
    absent = {key: value for key, value in defaults.items() if config.get(key) is None}
    return {**config, **absent}


def mapping_problems(mapping: Mapping[str, Any]) -> Iterator[str]:
    """Yield what no reader accepts of config.json's ``mapping``."""
    stated = {key: value for key, value in mapping.items() if value is not None}
    sizes = {key: stated.get(key, 1) for key in ("world_size", "tp_size", "pp_size")}
    experts = {key: stated[key] for key in ("moe_tp_size", "moe_ep_size") if key in stated}
    for key, value in (sizes | experts).items():
        if type(value) is not int or not 1 <= value <= largest(key):
            yield f"{key} is {value!r}, not a whole number from 1 to {largest(key)}"
            return
    world, tp, pp = sizes.values()
    if pp != 1:
        yield f"pp_size is {pp}; no Phi model of the reader has pipeline stages"
    elif tp != world:
        yield f"tp_size is {tp} and world_size {world}"
    if "moe_ep_size" in experts:
        ep = experts["moe_ep_size"]
        divided = experts.get("moe_tp_size", tp // ep)
        if divided * ep != tp:
            yield f"moe_tp_size {divided} times moe_ep_size {ep} is not tp_size {tp}"
