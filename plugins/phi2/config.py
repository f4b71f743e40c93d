"""phi-2's config fields. Older layouts spell them in GPT-2's way (``n_embd``, ``n_layer``)."""

import math

from phireg.api import (
    BOOKKEEPING,
    CONSTANTS,
    ConfigError,
    Fields,
    FieldTable,
    HFConfig,
    Severity,
    boolean,
    check,
    const,
    derive,
    dimensions,
    field,
    grouped_heads,
    hookimpl,
    ignore,
    integer,
    positive,
    refuse,
    rotary_base,
    rotary_dim,
    same_as,
    supported_rope,
    text,
)

TANH_GELU = dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_new")
"""One function under three names; ``gelu`` itself is the erf form, which TensorRT-LLM lacks."""


def rotary_pct(fields: Fields, hf: HFConfig) -> float:
    """The rotated share of a head; transformers' default for phi is one half."""
    for key in ("rope_parameters.partial_rotary_factor", "partial_rotary_factor"):
        value = hf.get(key)
        if value is not None:
            if not isinstance(value, int | float) or not 0 < value <= 1:
                raise ConfigError(f"{key} is {value!r}: expected a number above 0, at most 1")
            return float(value)
    rotated = hf.get("rotary_dim")
    if rotated is None:
        return 0.5
    head_size = fields["head_size"]
    if not isinstance(rotated, int) or not 0 < rotated <= head_size:
        raise ConfigError(f"rotary_dim is {rotated!r}: expected a whole number up to {head_size}")
    share = rotated / head_size
    # Readers compute int(head_size * share), which must not fall below the number it came from.
    return share if int(head_size * share) == rotated else math.nextafter(share, 2)


def no_grouping(fields: Fields, _: HFConfig) -> str | None:
    """TensorRT-LLM's phi model passes no number of KV heads: its qkv has 3 x hidden rows."""
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    if heads == kv_heads:
        return None
    return f"is {kv_heads} for {heads} heads; TensorRT-LLM's phi-2 has no grouped KV heads"


def fixed_epsilon(fields: Fields, _: HFConfig) -> str | None:
    """TensorRT-LLM's phi model never passes an epsilon to its LayerNorm."""
    found = fields["norm_epsilon"]
    return None if found == 1e-5 else f"is {found}, but TensorRT-LLM computes phi-2 with 1e-05"


@hookimpl
def phireg_config_fields() -> FieldTable:
    """How phi-2's config.json becomes the checkpoint's."""
    return FieldTable(
        const("architecture", "PhiForCausalLM"),
        *dimensions(
            hidden_size="n_embd",
            num_hidden_layers="n_layer",
            num_attention_heads="n_head",
            max_position_embeddings="n_positions",
        ),
        *grouped_heads(),
        check("num_key_value_heads", no_grouping),
        field(
            "intermediate_size",
            "n_inner",
            kind=integer(1, 2**20),
            default=lambda fields: 4 * fields["hidden_size"],
        ),
        field("hidden_act", "activation_function", kind=text, via=TANH_GELU),
        field(
            "layer_norm_eps", "layer_norm_epsilon", to="norm_epsilon", kind=positive, default=1e-5
        ),
        check("layer_norm_eps", fixed_epsilon, severity=Severity.WARNING),
        supported_rope("default"),
        const("position_embedding_type", "rope_gpt_neox"),
        rotary_base("rope_theta", default=10000.0),
        derive("rotary_pct", rotary_pct, "partial_rotary_factor, or rotary_dim / head_size"),
        same_as("rotary_pct", to="partial_rotary_factor"),
        derive("rotary_embedding_dim", rotary_dim, "int(head_size * rotary_pct)"),
        field("tie_word_embeddings", kind=boolean, default=False),
        refuse("qk_layernorm", unless=[False], why="TensorRT-LLM's phi-2 has no q/k norms"),
        *CONSTANTS,
        *BOOKKEEPING,
        ignore("flash_attn", "flash_rotary", "fused_dense", why="chooses the source's kernels"),
        ignore("rotary_dim", why="read with rotary_pct"),
    )
