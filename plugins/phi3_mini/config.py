"""The config fields of Phi-3-mini and, unchanged, of Phi-3-medium."""

import math

import phireg.api as ph

DEFAULTS = {
    "hidden_size": 3072, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32064,
    "max_position_embeddings": 4096,
}  # fmt: skip
"""What transformers' Phi3Config takes for absent keys."""

SILU = dict.fromkeys(("silu", "swish"), "swiglu")
"""Two names of one function, which the reader names with its gate."""


def partial_rotary(fields: ph.Fields, _: ph.HFConfig) -> str | None:
    """Report partial rotation: readers up to 0.17 ignore rotary_pct and rotate whole heads."""
    if fields["rotary_pct"] == 1.0:
        return None
    return "only TensorRT-LLM 1.0 and later rotate a part of each head of this architecture"


def stated_scale(fields: ph.Fields, hf: ph.HFConfig) -> str | None:
    """Refuse a factor on cos and sin other than the one that the reader computes."""
    used = ph.long_rope_scale(
        fields["max_position_embeddings"], fields["original_max_position_embeddings"]
    )
    for name in ("attention_factor", "short_mscale", "long_mscale"):
        for key in ph.in_rope(name):
            stated = hf.get(key)
            known = isinstance(stated, int | float) and math.isclose(stated, used, rel_tol=1e-6)
            if stated is not None and not known:
                return (
                    f"{name} is {stated!r}, but TensorRT-LLM computes {used} for this architecture"
                )
    return None


def one_original_length(fields: ph.Fields, hf: ph.HFConfig) -> str | None:
    """Refuse another length in the rope block: every transformers reads the one at the top."""
    used = fields["original_max_position_embeddings"]
    for key in ph.in_rope("original_max_position_embeddings"):
        stated = hf.get(key)
        if stated is not None and stated != used:
            return (
                f"is {stated!r} in {key.partition('.')[0]}, where transformers does not read it: "
                f"it takes {used}, from the top level or by default; state it at the top level"
            )
    return None


@ph.hookimpl
def phireg_config_fields() -> ph.FieldTable:
    """Translate Phi-3's config.json."""
    # Published and saved by transformers 4 at the top level only, by transformers 5 in both places.
    original = ph.field("original_max_position_embeddings", kind=ph.integer(2, 2**31), default=4096)
    return ph.FieldTable(
        ph.const("architecture", "Phi3ForCausalLM"),
        *ph.dimensions(defaults=DEFAULTS),
        *ph.grouped_heads(),
        ph.field("intermediate_size", kind=ph.integer(1, 2**20), default=8192),
        ph.field("hidden_act", kind=ph.text, via=SILU, default="swiglu"),
        ph.field("rms_norm_eps", to="norm_epsilon", kind=ph.positive, default=1e-5),
        ph.supported_rope("default", "longrope", "su"),
        ph.rotary_base("rope_theta", default=10000.0),
        *ph.rotary_share(default=1.0),
        ph.check("partial_rotary_factor", partial_rotary, severity=ph.Severity.WARNING),
        ph.same_as("rotary_pct", to="partial_rotary_factor"),
        ph.derive("rotary_embedding_dim", ph.rotary_dim, "int(head_size * rotary_pct)"),
        ph.when(
            ph.is_long_rope,
            *ph.long_rope_factors(original),
            ph.check("original_max_position_embeddings", one_original_length),
            ph.check("rope_scaling", stated_scale),
            otherwise=(ph.const("position_embedding_type", "rope_gpt_neox"),),
        ),
        ph.field("tie_word_embeddings", kind=ph.boolean, default=False),
        ph.check("sliding_window", ph.sliding_window, severity=ph.Severity.NOTE),
        ph.refuse("mlp_bias", unless=[False], why="TensorRT-LLM's Phi-3 has no biases"),
        ph.refuse("lm_head_bias", unless=[False], why="TensorRT-LLM's Phi-3 has no biases"),
        *ph.CONSTANTS,
        *ph.BOOKKEEPING,
        ph.ignore("attention_bias", why="the architecture has no biases, and no code reads it"),
        ph.ignore("original_max_position_embeddings", why="used with long rope only"),
        ph.ignore("full_attn_mod", "interpolate_factor", why="no code reads it"),
    )
