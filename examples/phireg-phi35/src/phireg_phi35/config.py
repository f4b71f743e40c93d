"""Phi-3.5-MoE's config fields. An absent key means the source class's default, given here."""

from typing import Any

from phireg.api import (
    BOOKKEEPING,
    CONSTANTS,
    ConfigError,
    Fields,
    FieldTable,
    HFConfig,
    Severity,
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
    positive,
    refuse,
    rotary_base,
    rotary_dim,
    same_as,
    supported_rope,
    text,
    when,
)

SPARSE_MIXER = 2
"""TensorRT-LLM's number for Phi-3.5-MoE's way of choosing experts."""


def experts(_: Fields, hf: HFConfig) -> dict[str, Any]:
    """The block whose presence makes TensorRT-LLM's reader build experts.

    ``router_jitter_noise`` decides at inference which scores count as equal, whatever its name.
    """
    count, chosen, noise = (
        hf.get(key) for key in ("num_local_experts", "num_experts_per_tok", "router_jitter_noise")
    )
    try:
        made = {
            "num_experts": integer(2, 2**12)(16 if count is None else count),
            "top_k": integer()(2 if chosen is None else chosen),
            "normalization_mode": SPARSE_MIXER,
            "sparse_mixer_epsilon": positive(0.01 if noise is None else noise),
        }
    except ValueError as problem:
        raise ConfigError(str(problem)) from None
    if made["top_k"] != 2:
        raise ConfigError(f"a token gets {made['top_k']} experts; sparse mixer chooses 2")
    return made


def biases(_: Fields, hf: HFConfig) -> str | None:
    """The reader's attention and head have biases; the source class has none unless it is told."""
    lacking = [key for key in ("attention_bias", "lm_head_bias") if hf.get(key) is not True]
    if not lacking:
        return None
    return f"{' and '.join(lacking)} must be true: TensorRT-LLM's PhiMoE has these biases"


def sliding_window(fields: Fields, hf: HFConfig) -> str | None:
    """TensorRT-LLM takes the window at run time, not from the checkpoint."""
    window, length = hf.get("sliding_window"), fields["max_position_embeddings"]
    if not isinstance(window, int) or window >= length:
        return None
    return (
        f"is {window} of {length} positions; TensorRT-LLM attends to all unless it is run with "
        f"--max_attention_window_size {window}"
    )


@hookimpl
def phireg_config_fields() -> FieldTable:
    """How Phi-3.5-MoE's config.json becomes the checkpoint's."""
    # Published in both places.
    original = field(
        "original_max_position_embeddings",
        *in_rope("original_max_position_embeddings"),
        kind=integer(2, 2**31),
    )
    return FieldTable(
        # Class and model share a name in TensorRT-LLM; transformers 5 spells its class otherwise.
        const("architecture", "PhiMoEForCausalLM"),
        *dimensions(),
        *grouped_heads(),
        field("intermediate_size", kind=integer(1, 2**20)),
        field("hidden_act", kind=text, via={"silu": "swiglu"}, default="swiglu"),
        derive("moe", experts, "num_local_experts, num_experts_per_tok, router_jitter_noise"),
        field("rms_norm_eps", to="norm_epsilon", kind=positive, default=1e-5),
        supported_rope("default", "longrope", "su"),
        rotary_base("rope_theta", default=1e6),
        refuse("rope_parameters.partial_rotary_factor", unless=[1.0], why="whole heads rotate"),
        const("rotary_pct", 1.0),
        same_as("rotary_pct", to="partial_rotary_factor"),
        derive("rotary_embedding_dim", rotary_dim, "head_size"),
        when(
            is_long_rope,
            *long_rope_factors(original),
            # The factors on cos and sin are the config's, not the formula's.
            field(*in_rope("short_mscale"), to="longrope_short_mscale", kind=positive),
            field(*in_rope("long_mscale"), to="longrope_long_mscale", kind=positive),
            otherwise=(const("position_embedding_type", "rope_gpt_neox"),),
        ),
        check("biases", biases),
        const("attention_bias", True),
        refuse("tie_word_embeddings", unless=[False], why="the head has weights of its own"),
        const("tie_word_embeddings", False),
        check("sliding_window", sliding_window, severity=Severity.NOTE),
        *CONSTANTS,
        *BOOKKEEPING,
        ignore(
            "input_jitter_noise",
            "output_router_logits",
            "router_aux_loss_coef",
            "hidden_dropout",
            why="training only",
        ),
        ignore("original_max_position_embeddings", why="used with long rope only"),
    )
