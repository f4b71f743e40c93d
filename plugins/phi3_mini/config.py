"""The config fields of Phi-3-mini and, unchanged, of Phi-3-medium."""

import math

from phireg.api import (
    BOOKKEEPING,
    CONSTANTS,
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
    in_rope,
    integer,
    is_long_rope,
    long_rope_factors,
    long_rope_scale,
    positive,
    refuse,
    rotary_base,
    rotary_dim,
    same_as,
    supported_rope,
    text,
    when,
)


def sliding_window(fields: Fields, hf: HFConfig) -> str | None:
    """TensorRT-LLM takes the window at run time, not from the checkpoint."""
    window, length = hf.get("sliding_window"), fields["max_position_embeddings"]
    if not isinstance(window, int) or window >= length:
        return None
    return (
        f"is {window} of {length} positions; TensorRT-LLM attends to all unless it is run with "
        f"--max_attention_window_size {window}"
    )


def partial_rotary(fields: Fields, _: HFConfig) -> str | None:
    """Readers up to 0.17 rotate whole heads whatever rotary_pct says."""
    if fields["rotary_pct"] == 1.0:
        return None
    return "only TensorRT-LLM 1.0 and later rotate a part of each head of this architecture"


def stated_scale(fields: Fields, hf: HFConfig) -> str | None:
    """The reader computes the factor on cos and sin itself."""
    used = long_rope_scale(
        fields["max_position_embeddings"], fields["original_max_position_embeddings"]
    )
    for name in ("attention_factor", "short_mscale", "long_mscale"):
        for key in in_rope(name):
            stated = hf.get(key)
            known = isinstance(stated, int | float) and math.isclose(stated, used, rel_tol=1e-6)
            if stated is not None and not known:
                return (
                    f"{name} is {stated!r}, but TensorRT-LLM computes {used} for this architecture"
                )
    return None


@hookimpl
def phireg_config_fields() -> FieldTable:
    """How Phi-3's config.json becomes the checkpoint's."""
    # Published and saved by transformers 4 at the top level only, by transformers 5 in both places.
    original = field(
        "original_max_position_embeddings",
        *in_rope("original_max_position_embeddings"),
        kind=integer(2, 2**31),
        default=4096,
    )
    return FieldTable(
        const("architecture", "Phi3ForCausalLM"),
        *dimensions(),
        *grouped_heads(),
        field("intermediate_size", kind=integer(1, 2**20)),
        field("hidden_act", kind=text, via={"silu": "swiglu"}),
        field("rms_norm_eps", to="norm_epsilon", kind=positive, default=1e-5),
        supported_rope("default", "longrope", "su"),
        rotary_base("rope_theta", default=10000.0),
        field(
            *in_rope("partial_rotary_factor"),
            "partial_rotary_factor",
            to="rotary_pct",
            kind=positive,
            default=1.0,
        ),
        check("partial_rotary_factor", partial_rotary, severity=Severity.WARNING),
        same_as("rotary_pct", to="partial_rotary_factor"),
        derive("rotary_embedding_dim", rotary_dim, "int(head_size * rotary_pct)"),
        when(
            is_long_rope,
            *long_rope_factors(original),
            check("rope_scaling", stated_scale),
            refuse("rope_parameters.factor", unless=[], why="the reader scales by lengths"),
            refuse("rope_scaling.factor", unless=[], why="the reader scales by lengths"),
            otherwise=(const("position_embedding_type", "rope_gpt_neox"),),
        ),
        field("tie_word_embeddings", kind=boolean, default=False),
        check("sliding_window", sliding_window, severity=Severity.NOTE),
        refuse("mlp_bias", unless=[False], why="TensorRT-LLM's Phi-3 has no biases"),
        refuse("lm_head_bias", unless=[False], why="TensorRT-LLM's Phi-3 has no biases"),
        *CONSTANTS,
        *BOOKKEEPING,
        ignore("attention_bias", why="the architecture has no biases, and no code reads it"),
        ignore("original_max_position_embeddings", why="used with long rope only"),
        ignore("full_attn_mod", "interpolate_factor", why="no code reads it"),
    )
