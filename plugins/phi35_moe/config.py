"""Phi-3.5-MoE's config fields, with the source class's defaults for absent keys."""

from collections.abc import Callable
from typing import Any

import phireg.api as ph

SPARSE_MIXER = 2
"""TensorRT-LLM's number for Phi-3.5-MoE's way of choosing experts."""


def experts(_: ph.Fields, hf: ph.HFConfig) -> dict[str, Any]:
    """Build the ``moe`` block, whose presence makes TensorRT-LLM's reader build experts.

    ``router_jitter_noise`` also decides at inference which router scores count as equal.
    """
    keys = ("num_local_experts", "num_experts_per_tok", "router_jitter_noise")
    values = {key: hf.get(key) for key in keys}

    def stated(key: str, default: float, kind: Callable[[Any], Any]) -> Any:
        value = values[key]
        try:
            return kind(default if value is None else value)
        except ValueError as problem:
            raise ph.ConfigError(f"{key} is {value!r}: {problem}") from None

    block = {
        "num_experts": stated("num_local_experts", 16, ph.integer(2, 2**12)),
        "top_k": stated("num_experts_per_tok", 2, ph.integer()),
        "normalization_mode": SPARSE_MIXER,
        "sparse_mixer_epsilon": stated("router_jitter_noise", 0.01, ph.positive),
    }
    if block["top_k"] != 2:
        raise ph.ConfigError(f"a token gets {block['top_k']} experts; sparse mixer chooses 2")
    return block


def biases(_: ph.Fields, hf: ph.HFConfig) -> str | None:
    """Require the biases of attention and head, which TensorRT-LLM's reader always has."""
    lacking = [key for key in ("attention_bias", "lm_head_bias") if hf.get(key) is not True]
    if not lacking:
        return None
    return f"{' and '.join(lacking)} must be true: TensorRT-LLM's PhiMoE has these biases"


@ph.hookimpl
def phireg_config_fields() -> ph.FieldTable:
    """Translate Phi-3.5-MoE's config.json."""
    # Published in both places.
    original = ph.field(
        "original_max_position_embeddings",
        *ph.in_rope("original_max_position_embeddings"),
        kind=ph.integer(2, 2**31),
    )
    return ph.FieldTable(
        # Class and model share a name in TensorRT-LLM; transformers 5 spells its class otherwise.
        ph.const("architecture", "PhiMoEForCausalLM"),
        *ph.dimensions(),
        *ph.grouped_heads(),
        ph.field("intermediate_size", kind=ph.integer(1, 2**20)),
        ph.field("hidden_act", kind=ph.text, via={"silu": "swiglu"}, default="swiglu"),
        ph.derive("moe", experts, "num_local_experts, num_experts_per_tok, router_jitter_noise"),
        ph.field("rms_norm_eps", to="norm_epsilon", kind=ph.positive, default=1e-5),
        ph.supported_rope("default", "longrope", "su"),
        ph.rotary_base("rope_theta", default=1e6),
        ph.refuse("rope_parameters.partial_rotary_factor", unless=[1.0], why="whole heads rotate"),
        ph.const("rotary_pct", 1.0),
        ph.same_as("rotary_pct", to="partial_rotary_factor"),
        ph.derive("rotary_embedding_dim", ph.rotary_dim, "head_size"),
        ph.when(
            ph.is_long_rope,
            *ph.long_rope_factors(original),
            # The factors on cos and sin are the config's, not the formula's.
            ph.field(*ph.in_rope("short_mscale"), to="longrope_short_mscale", kind=ph.positive),
            ph.field(*ph.in_rope("long_mscale"), to="longrope_long_mscale", kind=ph.positive),
            otherwise=(ph.const("position_embedding_type", "rope_gpt_neox"),),
        ),
        ph.check("biases", biases),
        ph.const("attention_bias", True),
        ph.refuse("tie_word_embeddings", unless=[False], why="the head has weights of its own"),
        ph.const("tie_word_embeddings", False),
        ph.check("sliding_window", ph.sliding_window, severity=ph.Severity.NOTE),
        *ph.CONSTANTS,
        *ph.BOOKKEEPING,
        ph.ignore(
            "input_jitter_noise",
            "output_router_logits",
            "router_aux_loss_coef",
            "hidden_dropout",
            why="training only",
        ),
        ph.ignore("original_max_position_embeddings", why="used with long rope only"),
    )
