"""Phi-3-small's config fields, with the source class's defaults for absent keys."""

import phireg.api as ph

DEFAULTS = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 100352,
    "max_position_embeddings": 8192,
}  # fmt: skip
"""What the source's own class takes for absent keys."""


def intermediate_size(fields: ph.Fields, hf: ph.HFConfig) -> int:
    """Return ff_intermediate_size, 14336 if absent.

    If null, it is ff_dim_multiplier * (hidden_size // 3) * 2, rounded up to a multiple of 256
    unless gegelu_pad_to_256 is false.
    """
    stated, multiplier = hf.get("ff_intermediate_size"), hf.get("ff_dim_multiplier")
    if stated is None and not hf.is_null("ff_intermediate_size"):
        stated = 14336
    if stated is None and multiplier is None:
        raise ph.ConfigError("neither ff_intermediate_size nor ff_dim_multiplier is given")
    kind = ph.integer(1, 2**20)
    try:
        if stated is not None:
            return int(kind(stated))
        size = int(kind(int(ph.positive(multiplier) * (fields["hidden_size"] // 3) * 2)))
    except ValueError as problem:
        key = "ff_dim_multiplier" if stated is None else "ff_intermediate_size"
        raise ph.ConfigError(f"{key}: {problem}") from None
    padded = hf.get("gegelu_pad_to_256")
    return -(-size // 256) * 256 if padded is None or padded else size


def dense_every(fields: ph.Fields, hf: ph.HFConfig) -> int:
    """Return the period of dense layers: layer i is dense if (i + 1) is a multiple of it.

    The source states "no dense layer" as 0 or null; the reader needs a period no layer reaches.
    """
    value = hf.get("dense_attention_every_n_layers")
    if value == 0 or hf.is_null("dense_attention_every_n_layers"):
        return int(fields["num_hidden_layers"]) + 1
    try:
        return 2 if value is None else int(ph.integer()(value))
    except ValueError as problem:
        raise ph.ConfigError(str(problem)) from None


def mscale(name: str, fields: ph.Fields, hf: ph.HFConfig) -> float | None:
    """Return the stated factor on cos and sin; None if absent or not above zero."""
    for key in ph.in_rope(f"{name}_mscale"):
        stated = hf.get(key)
        if stated is not None:
            try:
                return ph.number(stated) if ph.number(stated) > 0 else None
            except ValueError as problem:
                raise ph.ConfigError(f"{key}: {problem}") from None
    return None


def short_mscale(fields: ph.Fields, hf: ph.HFConfig) -> float:
    """Return the factor for short sequences; the source defaults to 1 (Phi-3-mini does not)."""
    return mscale("short", fields, hf) or 1.0


def long_mscale(fields: ph.Fields, hf: ph.HFConfig) -> float:
    """Return the factor for long sequences; the source defaults to the formula."""
    lengths = fields["max_position_embeddings"], fields["original_max_position_embeddings"]
    return mscale("long", fields, hf) or ph.long_rope_scale(*lengths)


def position_scale(_: ph.Fields, hf: ph.HFConfig) -> str | None:
    """Refuse a rope_position_scale, which plain rope uses and the reader does not have."""
    scale = hf.get("rope_position_scale")
    if scale in (None, 1, 1.0) or ph.is_long_rope(hf):
        return None
    return f"is {scale!r}; TensorRT-LLM does not scale positions"


def fixed_epsilon(fields: ph.Fields, _: ph.HFConfig) -> str | None:
    """Report another epsilon: before 0.14 TensorRT-LLM's model did not pass it on."""
    epsilon = fields["norm_epsilon"]
    return (
        None if epsilon == 1e-5 else f"is {epsilon}; TensorRT-LLM before 0.14 computes with 1e-05"
    )


def known_head_size(fields: ph.Fields, _: ph.HFConfig) -> str | None:
    """Report a head size without block-sparse decoding kernels in TensorRT-LLM."""
    size = fields["head_size"]
    return None if size == 128 else f"is {size}; engines have block-sparse kernels for 128 only"


@ph.hookimpl
def phireg_config_fields() -> ph.FieldTable:
    """Translate Phi-3-small's config.json."""
    original = ph.field(
        *ph.in_rope("original_max_position_embeddings"),
        "original_max_position_embeddings",
        to="original_max_position_embeddings",
        kind=ph.integer(2, 2**31),
    )
    return ph.FieldTable(
        ph.const("architecture", "Phi3SmallForCausalLM"),
        *ph.dimensions(defaults=DEFAULTS),
        *ph.grouped_heads(default=8),
        ph.same_as("num_key_value_heads", to="num_kv_heads"),
        ph.check("head_size", known_head_size, severity=ph.Severity.WARNING),
        ph.derive("intermediate_size", intermediate_size, "ff_intermediate_size or its rule"),
        ph.field("hidden_act", kind=ph.text, via={"gegelu": "gegelu"}, default="gegelu"),
        ph.field("gegelu_limit", kind=ph.positive, default=20.0, null=None),
        ph.field("layer_norm_epsilon", to="norm_epsilon", kind=ph.positive, default=1e-5),
        ph.check("layer_norm_epsilon", fixed_epsilon, severity=ph.Severity.WARNING),
        ph.supported_rope("default", "longrope", "su"),
        ph.rotary_base("rope_embedding_base", "rope_theta", default=1e6),
        ph.same_as("rotary_base", to="rotary_embedding_base"),
        ph.refuse("rope_parameters.partial_rotary_factor", unless=[1.0], why="whole heads rotate"),
        ph.const("rotary_pct", 1.0),
        ph.derive("rotary_embedding_dim", ph.rotary_dim, "head_size"),
        ph.when(
            ph.is_long_rope,
            *ph.long_rope_factors(original),
            ph.derive("longrope_short_mscale", short_mscale, "short_mscale, or 1"),
            ph.derive("longrope_long_mscale", long_mscale, "long_mscale, or the long-rope formula"),
            otherwise=(ph.const("position_embedding_type", "rope_gpt_neox"),),
        ),
        ph.check("rope_position_scale", position_scale),
        # The source class ties by default; its published files have no head of their own.
        ph.field("tie_word_embeddings", kind=ph.boolean, default=True),
        ph.field("mup_embedding_multiplier", kind=ph.number, default=10.0, null=0.0),
        ph.field("mup_width_multiplier", kind=ph.positive, default=8.0, null=1.0),
        ph.field("mup_attn_multiplier", kind=ph.positive, default=1.0),
        ph.field("mup_use_scaling", kind=ph.boolean, default=True),
        ph.refuse(
            "mup_attn_multiplier", unless=[1.0], why="TensorRT-LLM scales scores by 1/head_size"
        ),
        ph.refuse(
            "mup_use_scaling", unless=[True], why="TensorRT-LLM scales scores by 1/head_size"
        ),
        ph.field("blocksparse_block_size", kind=ph.integer(), default=64),
        ph.field("blocksparse_num_local_blocks", kind=ph.integer(), default=16),
        ph.field(
            "blocksparse_vert_stride",
            to="blocksparse_vertical_stride",
            kind=ph.integer(),
            default=8,
        ),
        ph.field("blocksparse_homo_head_pattern", kind=ph.boolean, default=False),
        ph.derive("dense_attention_every_n_layers", dense_every, "the same, 0 and null as never"),
        *ph.CONSTANTS,
        *ph.BOOKKEEPING,
        ph.ignore(
            "attention_dropout_prob",
            "embedding_dropout_prob",
            "ffn_dropout_prob",
            why="training only",
        ),
        ph.ignore("attention_bias", why="every linear has a bias, whatever it says"),
        ph.ignore(
            "blocksparse_triton_kernel_block_size",
            "pad_sequence_to_multiple_of_64",
            "reorder_and_upcast_attn",
            why="chooses the source's kernels",
        ),
        ph.ignore("gegelu_pad_to_256", "ff_dim_multiplier", why="read with intermediate_size"),
        ph.ignore("rope_position_scale", why="unused with long rope, else checked"),
        ph.ignore("original_max_position_embeddings", why="used with long rope only"),
        ph.ignore("dummy_token_indices", why="the reader does not mask logits"),
    )
